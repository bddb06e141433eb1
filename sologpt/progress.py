"""How far a run is, on the terminal."""

import math
import shutil
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Any

from sologpt.log import Record

BAR = 12  # characters
RECENT = 20  # steps that the time left is computed from
LOSSES = {"loss": "loss", "val_loss": "val"}  # metric: its name on a terminal
SLOW = 3.0  # seconds after which a step shows its micro-batches


class Progress:
    """How far a run is, shown by the main process. A terminal has one line, redrawn in place.

    The lines of evaluations stay, each with the first lines of a `sample`. A file gets a line for each
    record, and one for what begins: the first evaluation, the first step. config is that of train.py.
    """

    def __init__(self, config: Any, first_step: int, is_main: bool = True) -> None:
        self.first_step = first_step
        self.last_step = config.max_iters
        self.eval_interval = config.eval_interval
        self.eval_only = config.eval_only
        self.compiles = config.compile
        self.is_main = is_main
        self.in_place = sys.stdout.isatty()
        self.begun: set[str] = set()  # what has been announced
        self.latest: Record = {}  # the last value of each metric
        self.sample: list[str] = []  # lines to show below the next evaluation
        self.begins: deque[float] = deque(maxlen=RECENT + 1)  # when the last steps began; see `_begin_step`
        self.step = -1  # the one that has begun
        self.paused: float | None = None  # when an evaluation began, if one has since the last step
        self.eval_seconds = 0.0  # of the last evaluation, and of saving
        self.drawn = -math.inf  # when the line was last drawn
        self.is_open = False  # whether the terminal's line has no end yet

    def status(self, step: int, doing: str, count: str = "") -> None:
        """Show what is being done now, "evaluating" or "training", and how far that is."""
        now = time.monotonic()
        if doing == "evaluating":
            self.paused = now if self.paused is None else self.paused
        elif step != self.step:
            self._begin_step(step, now)
        begins = doing not in self.begun
        self.begun.add(doing)
        if self.compiles and step == self.first_step:
            doing = f"compiling, {doing}"
        if self.in_place and (begins or now - self.drawn > 0.1):
            parts = [f"{doing} {count}".rstrip()]
            if doing == "training" and "loss" in self.latest:
                is_slow = bool(count) and now - self.begins[-1] > SLOW
                parts = [*self._short(step), *[f"micro-batch {count}"] * is_slow]
            self._draw(step, parts)
        elif not self.in_place and begins:
            self._draw(step, [f"{doing} ..."])

    def show(self, record: Record) -> None:
        """Show the metrics of a step that is done."""
        self.latest |= record
        evaluated = "val_loss" in record
        if self.in_place:
            self._draw(record["step"], self._short(record["step"] + 1), ends=evaluated)
        else:
            self._draw(record["step"], self._long(record))
        if evaluated and self.sample:
            self.line("\n".join(f"    {line}" for line in self.sample))
            self.sample = []

    def line(self, text: str) -> None:
        """Print a text in place of the terminal's line."""
        if self.is_main:
            write(f"\r\x1b[K{text}" if self.is_open else text)
        self.is_open = False

    def close(self) -> None:
        """End the line: something else is to be printed."""
        if self.is_open:
            write("")
        self.is_open = False

    def left(self, step: int) -> list[str]:
        """Return the time left after `step` steps, by the last ones and the last evaluation, or nothing."""
        if len(self.begins) < 2 or step >= self.last_step:
            return []
        step_seconds = (self.begins[-1] - self.begins[0]) / (len(self.begins) - 1)
        evaluations = math.ceil(self.last_step / self.eval_interval) - step // self.eval_interval
        seconds = (self.last_step - step) * step_seconds + evaluations * self.eval_seconds
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return [f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"]

    def _begin_step(self, step: int, now: float) -> None:
        """Note when a step begins. The time of an evaluation before it does not count as a step's."""
        if self.paused is not None:
            self.eval_seconds = now - self.paused
            self.begins = deque((then + self.eval_seconds for then in self.begins), RECENT + 1)
            self.paused = None
        if step == self.first_step + 1:
            self.begins.clear()  # the first step compiles, or allocates the memory for the others
        self.begins.append(now)
        self.step = step
        if len(self.begins) == 4 and not self.in_place and "left" not in self.begun:
            self.begun.add("left")
            self._draw(step, self.left(step))

    def _short(self, step: int) -> list[str]:
        """Return the latest metrics, for a line of a terminal."""
        latest = self.latest
        losses = [f"{name} {latest[key]:.2f}" for key, name in LOSSES.items() if key in latest]
        parts = [", ".join(losses)] if losses else []
        if "tokens_per_second" in latest:
            speed = latest["tokens_per_second"]
            parts.append(f"{speed / 1000:.1f}k tok/s" if speed >= 1000 else f"{speed:.0f} tok/s")
        if "mfu" in latest:
            parts.append(f"{latest['mfu']:.0%} MFU")
        return [*parts, *self.left(step)]

    def _long(self, record: Record) -> list[str]:
        """Return the metrics of a record, for a line of a file."""
        parts = []
        if "loss" in record:
            parts.append(f"loss {record['loss']:.4f}")
            if "tokens_per_second" in record:
                parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
            if "mfu" in record:
                parts.append(f"{record['mfu']:.1%} MFU")
            if "compile_seconds" in record:
                parts.append(f"compiled in {record['compile_seconds']:.0f} s")
            parts += self.left(record["step"] + 1)
        if "val_loss" in record:
            parts.append(f"val loss {record['val_loss']:.4f}, {record['val_bpb']:.4f} bits/byte")
        return parts

    def _draw(self, step: int, parts: list[str], ends: bool = False) -> None:
        """Print a line: a terminal's is open until it `ends`."""
        if not self.is_main:
            return
        done = step / max(self.last_step, 1)
        head = f"{done:4.0%} step {step}/{self.last_step}"
        if self.in_place:
            bar = "#" * int(BAR * done)
            head = f"[{bar:-<{BAR}}] {done:4.0%}  {step}/{self.last_step}"
        line = " | ".join(parts if self.eval_only else [head, *parts])
        if not self.in_place:
            write(line)
            return
        line = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be redrawn
        write(f"\r\x1b[K{line}", end="\n" if ends else "")
        self.drawn = time.monotonic()
        self.is_open = not ends


def write(text: str, end: str = "\n") -> None:
    with suppress(BrokenPipeError):  # then SIGPIPE has come: see `parallel.catch_signals`
        print(text, end=end, flush=True)

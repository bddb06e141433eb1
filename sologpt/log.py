"""The metrics of a run: the terminal, metrics.jsonl, loss.png, Weights & Biases, TensorBoard."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt import GPT
from sologpt.device import peak_flops
from sologpt.errors import writing
from sologpt.parallel import World

Record = dict[str, Any]  # {"step": int, "loss": float, "val_loss": float, ...}


def flops_per_token(model: GPT, sequence_len: int | None = None) -> int:
    """Return the FLOPs of a training step per token, by PaLM's formula (https://arxiv.org/abs/2204.02311).

    sequence_len: tokens in a training sequence; None means the model's own.
    """
    config = model.config
    T = sequence_len or config.sequence_len
    matmul_params = model.num_params()
    if not config.tie_embd:  # a tied embedding is the head as well
        matmul_params -= model.wte.weight.numel()  # a lookup
    if model.wpe is not None:
        matmul_params -= model.wpe.weight.numel()
    return 6 * matmul_params + 12 * config.n_layer * config.n_head * config.head_dim * T


class Clock:
    """The speed of training, without evaluations and saves."""

    def __init__(self, flops_per_token: int, world: World) -> None:
        self.n_tokens = 0
        self.started = time.perf_counter()
        self.flops_per_token = flops_per_token
        peak = peak_flops(world.device)
        self.peak = peak * world.size if peak else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def speed(self, n_tokens: int) -> dict[str, float]:
        """Return tokens per second since the last call, and on a known GPU MFU (model FLOPs utilization).

        n_tokens: how many were trained on since the start.
        """
        now = time.perf_counter()
        speed = {"tokens_per_second": (n_tokens - self.n_tokens) / (now - self.started)}
        self.n_tokens = n_tokens
        self.started = now
        if self.peak:
            speed["mfu"] = speed["tokens_per_second"] * self.flops_per_token / self.peak
        return speed


class Progress:
    """What a run is doing, shown by the main process. A terminal has one line, redrawn in place.

    The lines of evaluations stay. A file gets a line for each record, and one for what begins: the first
    evaluation, the first step.
    """

    def __init__(self, first_step: int, last_step: int, is_main: bool = True, compiles: bool = False) -> None:
        self.first_step = first_step
        self.last_step = last_step
        self.is_main = is_main
        self.compiles = compiles
        self.in_place = sys.stdout.isatty()
        self.begun: set[str] = set()  # what has been announced
        self.latest: list[str] = []  # the loss and the speed, until the next ones
        self.clock: tuple[int, float] | None = (
            None  # steps done, and when: at the first record, after compiling
        )
        self.drawn = -math.inf  # when the line was last drawn
        self.is_open = False  # whether the terminal's line has no end yet

    def status(self, step: int, doing: str, count: str = "") -> None:
        """Show what is being done now, such as "evaluating", and how far that is."""
        if self.compiles and step == self.first_step:
            doing = f"compiling, {doing}"
        begins = doing not in self.begun
        self.begun.add(doing)
        if not self.in_place and begins:
            self._draw(step, [f"{doing} ..."], end="\n")
        elif self.in_place and (begins or time.monotonic() - self.drawn > 0.1):
            parts = [f"{doing} {count}".rstrip()]
            if doing == "training" and self.latest:
                parts = self.latest
            self._draw(step, parts)

    def show(self, record: Record) -> None:
        """Show the metrics of a step that is done."""
        parts: list[str] = []
        if "loss" in record:
            parts = [f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:,.0f} tokens/s"]
            if "mfu" in record:
                parts.append(f"{record['mfu']:.1%} MFU")
            done = record["step"] + 1
            now = time.monotonic()
            if self.clock and done > self.clock[0]:
                seconds = (now - self.clock[1]) / (done - self.clock[0]) * (self.last_step - done)
                parts += ["{:.0f}:{:02.0f} left".format(*divmod(round(seconds), 60))]
            self.clock = self.clock or (done, now)
            self.latest = list(parts)
        if "val_loss" in record:
            parts += [f"val loss {record['val_loss']:.4f}, {record['val_bpb']:.4f} bits/byte"]
        self._draw(record["step"], parts, "" if self.in_place and "val_loss" not in record else "\n")

    def close(self) -> None:
        """End the line: something else is to be printed."""
        if self.is_open:
            print(flush=True)
        self.is_open = False

    def _draw(self, step: int, parts: list[str], end: str = "") -> None:
        if self.is_main:
            line = " | ".join([f"{step / max(self.last_step, 1):4.0%} step {step}/{self.last_step}", *parts])
            with suppress(BrokenPipeError):  # then SIGPIPE has come: see `parallel.catch_signals`
                print(f"\r\x1b[K{line}" if self.in_place else line, end=end, flush=True)
            self.drawn = time.monotonic()
            self.is_open = not end


class Log:
    """metrics.jsonl, one JSON object per logged step, loss.png, and the services that config asks for.

    A resumed run keeps the records before first_step. config is a dict of the run's settings. The services
    know the run by run_id. RunError if out_dir cannot be written, ImportError if an extra is missing.
    """

    def __init__(self, out_dir: Path, config: dict[str, Any], first_step: int, run_id: str) -> None:
        self.path = out_dir / "metrics.jsonl"
        with writing(self.path):
            self.records = [record for record in read_records(self.path) if record["step"] < first_step]
            temporary = self.path.with_name("metrics.jsonl.tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            os.replace(temporary, self.path)
        self.services: list[Callable[[Record], None]] = []
        if config["wandb_log"]:
            self.services.append(open_wandb(out_dir, config, run_id))
        if config["tensorboard"]:
            self.services.append(open_tensorboard(out_dir, first_step))

    def write(self, record: Record) -> None:
        """Append a record to metrics.jsonl and send it to the services."""
        self.records.append(record)
        with writing(self.path), open(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")
        for send in self.services:
            send(record)

    def plot(self) -> None:
        """Draw the losses into loss.png, if the extra 'plot' is installed."""
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        for key, style in (("loss", "-"), ("val_loss", "o-")):
            records = [record for record in self.records if key in record]
            steps = [record["step"] for record in records]
            losses = [record[key] for record in records]
            axes.plot(steps, losses, style, label=key.replace("_", " "), linewidth=1, markersize=4)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
        path = self.path.with_name("loss.png")
        with writing(path):
            figure.savefig(path, dpi=150, bbox_inches="tight")


def read_records(path: Path) -> list[Record]:
    """Return the records of metrics.jsonl. Skip other lines, such as a last one that was cut off."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = [record for record in map(to_record, lines) if record]
    if len(records) < len(lines):
        skipped = len(lines) - len(records)
        print(f"{path}: skipped {skipped} of {len(lines)} lines: not records", file=sys.stderr)
    return records


def to_record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(record, dict) and all(type(value) in (int, float) for value in record.values())
    return record if numbers and type(record.get("step")) is int else None


def open_wandb(out_dir: Path, config: dict[str, Any], run_id: str) -> Callable[[Record], None]:
    """Return a function that sends a record to Weights & Biases. A resumed run continues its curves there."""
    try:
        import wandb
    except ImportError as e:
        raise ImportError("--wandb_log needs the extra 'wandb': pip install wandb") from e
    name = config["wandb_run_name"] or out_dir.resolve().name
    project = config["wandb_project"]
    run = wandb.init(project=project, name=name, id=run_id, resume="allow", dir=out_dir, config=config)
    return lambda record: run.log(record, step=record["step"])


def open_tensorboard(out_dir: Path, first_step: int) -> Callable[[Record], None]:
    """Return a function that writes a record for TensorBoard. A resumed run shows no step twice there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ImportError("--tensorboard needs the extra 'tensorboard': pip install tensorboard") from e
    writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=first_step)

    def write(record: Record) -> None:
        for key, value in record.items():
            if key != "step":
                writer.add_scalar(key, value, record["step"])
        writer.flush()

    return write

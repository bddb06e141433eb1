"""Where the metrics of a run go: the terminal, metrics.jsonl, loss.png, Weights & Biases, TensorBoard."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # {"step": int, "loss": float, "val_loss": float, ...}


class Progress:
    """What a run is doing, where is_main. A terminal shows it in one line, in place, and keeps those of evaluations.

    Anything else gets a line for each record, and one for what begins: the first evaluation, the first step.
    """

    def __init__(self, first_step: int, last_step: int, is_main: bool = True, compiles: bool = False) -> None:
        self.first_step, self.last_step, self.is_main, self.compiles = first_step, last_step, is_main, compiles
        self.in_place = sys.stdout.isatty()
        self.begun: set[str] = set()  # what has been said to begin
        self.latest: list[str] = []  # the loss and the speed, until the next ones
        self.clock: tuple[int, float] | None = None  # how many steps were done when, without compilation
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
            self._draw(step, self.latest if doing == "training" and self.latest else [f"{doing} {count}".rstrip()])

    def show(self, record: Record) -> None:
        """Show the metrics of a step that is done."""
        parts: list[str] = []
        if "loss" in record:
            parts = [f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:,.0f} tokens/s"]
            done, now = record["step"] + 1, time.monotonic()
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
            print(f"\r\x1b[K{line}" if self.in_place else line, end=end, flush=True)
            self.drawn, self.is_open = time.monotonic(), not end


class Log:
    """metrics.jsonl, one JSON object per logged step, loss.png, and the services that are asked for.

    A resumed run keeps the records before first_step. config is the run's, with wandb_log and tensorboard; run_id is
    how the services recognize it. OSError if out_dir cannot be written, ImportError if an extra is missing.
    """

    def __init__(self, out_dir: Path, config: dict[str, Any], first_step: int, run_id: str) -> None:
        self.path = out_dir / "metrics.jsonl"
        self.records = [record for record in read_records(self.path) if record["step"] < first_step]
        temporary = self.path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        os.replace(temporary, self.path)
        self.sinks = [open_wandb(out_dir, config, run_id)] if config["wandb_log"] else []
        self.sinks += [open_tensorboard(out_dir, first_step)] if config["tensorboard"] else []

    def write(self, record: Record) -> None:
        """Append a record to metrics.jsonl and send it to the services."""
        self.records.append(record)
        with open(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")
        for sink in self.sinks:
            sink(record)

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
            points = [(record["step"], record[key]) for record in self.records if key in record] or [(0, math.nan)]
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "), linewidth=1, markersize=4)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
        figure.savefig(self.path.with_name("loss.png"), dpi=150, bbox_inches="tight")


def read_records(path: Path) -> list[Record]:
    """The records of metrics.jsonl. Lines that are none, such as a last one that was cut off, are skipped."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = [record for record in map(to_record, lines) if record]
    if len(records) < len(lines):
        print(f"{path}: skipped {len(lines) - len(records)} of {len(lines)} lines: not records", file=sys.stderr)
    return records


def to_record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(record, dict) and all(type(value) in (int, float) for value in record.values())
    return record if numbers and type(record.get("step")) is int else None


def open_wandb(out_dir: Path, config: dict[str, Any], run_id: str) -> Callable[[Record], None]:
    """A function that sends a record to Weights & Biases. A resumed run continues the one that it was there."""
    try:
        import wandb
    except ImportError as e:
        raise ImportError("--wandb_log needs the extra 'wandb': pip install wandb") from e
    project, name = config["wandb_project"], config["wandb_run_name"] or out_dir.resolve().name
    run = wandb.init(project=project, name=name, id=run_id, resume="allow", dir=out_dir, config=config)
    return lambda record: run.log(record, step=record["step"])


def open_tensorboard(out_dir: Path, first_step: int) -> Callable[[Record], None]:
    """A function that writes a record for TensorBoard, which shows no step of a resumed run twice."""
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

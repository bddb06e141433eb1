"""Where the metrics of a run go: metrics.jsonl, the terminal, loss.png, Weights & Biases, TensorBoard."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # {"step": int, "loss": float, "val_loss": float, ...}


class Log:
    """metrics.jsonl, one JSON object per logged step, and a progress line, which a terminal shows in place.

    A resumed run keeps the records before first_step. config is the run's, with wandb_log and tensorboard; run_id is
    how the services recognize it. OSError if out_dir cannot be written, ImportError if an extra is missing.
    """

    def __init__(self, out_dir: Path, config: dict[str, Any], first_step: int, run_id: str) -> None:
        self.path, self.last_step = out_dir / "metrics.jsonl", config["max_iters"]
        self.started, self.first_step = time.monotonic(), first_step
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

    def show(self, record: Record) -> None:
        """Print the progress line."""
        step, last = record["step"], self.last_step
        seconds_left = (time.monotonic() - self.started) / max(step - self.first_step, 1) * (last - step)
        parts = [f"{step / max(last, 1):4.0%} step {step}/{last}"]
        if "loss" in record:
            parts += [f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:,.0f} tokens/s"]
            parts += [f"{seconds_left:.0f}s left"]
        if "val_loss" in record:
            parts += [f"val loss {record['val_loss']:.4f}, {record['val_bpb']:.4f} bits/byte"]
        line = " | ".join(parts)
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="\n" if "val_loss" in record else "", flush=True)
        else:
            print(line, flush=True)

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

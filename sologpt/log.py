"""The metrics of a run: their speeds, metrics.jsonl, loss.png, Weights & Biases, TensorBoard."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """The speed of training, without evaluations and saves. compiles: whether the first step is slow."""

    def __init__(self, flops_per_token: int, world: World, compiles: bool = False) -> None:
        self.n_tokens = 0
        self.started = self.created = time.perf_counter()
        self.compiles = compiles
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

        n_tokens: how many were trained on since the start. The first evaluation and step of a run that
        compiles are no measure of speed: then the result is how many seconds they took.
        """
        now = time.perf_counter()
        speed = {"tokens_per_second": (n_tokens - self.n_tokens) / (now - self.started)}
        self.n_tokens = n_tokens
        self.started = now
        if self.compiles:
            self.compiles = False
            return {"compile_seconds": now - self.created}
        if self.peak:
            speed["mfu"] = speed["tokens_per_second"] * self.flops_per_token / self.peak
        return speed


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

    def plot(self) -> str:
        """Draw the losses into loss.png, if the extra 'plot' is installed. Return what to tell the user."""
        try:
            import matplotlib
        except ImportError:
            return "pip install matplotlib, and a run also draws its losses into loss.png"
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
        return f"how the loss fell: {path}"


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

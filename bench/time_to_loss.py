"""Time to loss: nanoGPT's quick run on a CPU and runs of its shape, each timed with its start.

The data is tiny Shakespeare. nanoGPT and nanochat read characters, soloGPT bytes, which are the same there.
"""

import multiprocessing
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import peers
from gpt import GPT, GPTConfig
from sologpt.errors import RunError

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "shakespeare"
CPU = torch.device("cpu")
CONTEXT, BATCH_SIZE, STEPS = 64, 12, 178
CHARACTERS = 65  # different ones in the text
SHAPE: dict[str, Any] = dict(n_layer=4, n_embd=128)
HEADS: dict[str, Any] = dict(n_head=2, n_kv_head=1)  # soloGPT's and nanochat's; nanoGPT's own run has 4
SOLO = "--learning_rate=0.03 --momentum=0.8 --embd_lr=0.15 --head_lr=0.012 --warmdown=0.5"
NANOGPT = "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --device=cpu --eval_iters=20"

# (the peer's folder, a temporary folder) -> a function that computes the trained model's validation loss
Run = Callable[[str, Path], Callable[[], float]]


# -----------------------------------------------------------------------------
# Data and loss


def read_bytes(split: str) -> np.ndarray:
    """Return the token ids of a split, (N,), as data/shakespeare/prepare.py --tokenizer=bytes writes them."""
    return np.fromfile(DATA / f"{split}.bin", "<u2").astype(np.int64)


def read_characters(split: str) -> np.ndarray:
    """The same with the ids of nanoGPT's shakespeare_char, which numbers the characters of the text."""
    return np.searchsorted(np.unique(read_bytes("train")), read_bytes(split))


def windows(starts: np.ndarray, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, T) that begin at starts (B,)."""
    rows = torch.from_numpy(ids[starts[:, None] + np.arange(CONTEXT + 1)])  # (B, T + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@torch.no_grad()
def mean_loss(loss: Callable[[Tensor, Tensor], Any], ids: np.ndarray) -> float:
    """Return the mean of loss(idx, targets) over ids, cut into windows that do not overlap."""
    idx, targets = windows(np.arange((len(ids) - 1) // CONTEXT) * CONTEXT, ids)
    batches = zip(idx.split(100), targets.split(100), strict=True)
    return sum(float(loss(*batch)) * len(batch[0]) for batch in batches) / len(idx)


# -----------------------------------------------------------------------------
# The runs


def run_script(script: list[str], values: dict[str, Any], flags: str, folder: Path) -> None:
    settings = [f"--{name}={value}" for name, value in values.items()]
    command = [sys.executable, *script, *settings, *flags.split()]
    if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode:
        raise RunError(f"{' '.join(script)} has failed: its own error is above")


def run_solo(path: str, folder: Path) -> Callable[[], float]:
    """Our train.py. Its defaults are those of another small model: the flags name all that differs."""
    values = SHAPE | HEADS | dict(sequence_len=CONTEXT, batch_size=BATCH_SIZE, max_iters=STEPS)
    values |= dict(dataset="shakespeare", tokenizer="bytes", optimizer="muon", out_dir=folder)
    values |= dict(eval_interval=STEPS, eval_iters=20, log_interval=10, sample_tokens=0)
    run_script(["train.py"], values, SOLO, ROOT)
    return lambda: mean_loss(GPT.load(folder / "best.pt"), read_bytes("val"))


def run_nanogpt(path: str, folder: Path, compile: bool = False) -> Callable[[], float]:
    """nanoGPT's train.py with its own config, in a folder that holds the data as it expects them."""
    for name in ("train.py", "model.py", "configurator.py", "config"):
        (folder / name).symlink_to(Path(path).resolve() / name)
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for split in ("train", "val"):
        read_characters(split).astype("<u2").tofile(data / f"{split}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": CHARACTERS}))
    values = SHAPE | dict(n_head=4, block_size=CONTEXT, batch_size=BATCH_SIZE, out_dir="out", compile=compile)
    run_script(["train.py", "config/train_shakespeare_char.py"], values, NANOGPT, folder)

    def loss() -> float:
        config = GPTConfig(sequence_len=CONTEXT, vocab_size=CHARACTERS, n_head=4, **SHAPE)
        model = peers.make_nanogpt(path, config, CPU)
        weights = torch.load(folder / "out" / "ckpt.pt", weights_only=True)["model"]
        model.load_state_dict({name.removeprefix("_orig_mod."): x for name, x in weights.items()})
        return mean_loss(lambda idx, targets: model(idx, targets)[1], read_characters("val"))

    return loss


def run_nanochat(path: str, folder: Path) -> Callable[[], float]:
    """nanochat's model and optimizer in a loop like ours: its own trainer has no such small run."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        loss = pool.submit(train_nanochat, path).result()
    return lambda: loss


def train_nanochat(path: str) -> float:
    """Return the validation loss after as many steps and tokens as ours, at nanochat's own learning rates."""
    config = GPTConfig(sequence_len=CONTEXT, vocab_size=CHARACTERS, **SHAPE, **HEADS)
    model = peers.make_nanochat(path, config, CPU, torch.float32)
    optimizer, ids = model.setup_optimizer(), read_characters("train")
    for step in range(STEPS):
        starts = np.random.default_rng((0, step)).integers(len(ids) - CONTEXT, size=BATCH_SIZE)
        model(*windows(starts, ids)).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1, 2 * (STEPS - step) / STEPS)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return mean_loss(model, read_characters("val"))


def time_to_loss(paths: dict[str, str], rounds: int) -> Iterator[str]:
    """Yield a line with seconds and loss of each run in each round, then the medians. paths: peers by name.

    FileNotFoundError if the data is not prepared, RunError if a run fails.
    """
    if not (DATA / "meta.json").exists():
        command = "python data/shakespeare/prepare.py --tokenizer=bytes"
        raise FileNotFoundError(f"no data in {DATA}: run {command}")
    runs: dict[str, Run] = {"soloGPT": run_solo, "nanogpt": run_nanogpt}
    runs |= {"nanogpt compiled": partial(run_nanogpt, compile=True), "nanochat": run_nanochat}
    paths = {"soloGPT": ""} | paths
    if "nanogpt" in paths:
        paths["nanogpt compiled"] = paths["nanogpt"]
    seconds: dict[str, list[float]] = {name: [] for name in runs if name in paths}
    for _ in range(rounds):
        for name, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                loss = runs[name](paths[name], Path(folder))
                times.append(time.perf_counter() - started)
                yield f"{name:16} {times[-1]:6.1f} s to a validation loss of {loss():.4f}"
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        yield f"{name:16} {median:6.1f} s, soloGPT is {median / medians['soloGPT']:.2f} x as fast"

"""A prepared dataset, and the batches that a run draws from it."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sologpt.errors import UserError
from sologpt.parallel import World
from sologpt.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "data"
FILES = ("train.bin", "val.bin", "meta.json")
SCAN = 100 * 2**20  # a token file up to this many bytes is scanned for its largest id when it is loaded

NANOGPT_DATASETS = {  # a dataset of nanoGPT: what to use instead
    "shakespeare_char": "use --dataset=shakespeare, or the config file config/shakespeare_char.py",
    "openwebtext": "use --dataset=fineweb, prepared by data/fineweb/prepare.py",
}


def find(name: str) -> Path:
    """Return the folder data/NAME if it exists, else name as a path."""
    folder = FOLDER / name
    return folder if folder.is_dir() else Path(name)


def prepare(name: str, tokenizer: str | dict[str, Any]) -> None:
    """Run a dataset's prepare.py if its meta.json is missing. tokenizer: a spec, or a checkpoint's dict.

    stdlib is quick to prepare, so it is also prepared again when it has another tokenizer. UserError if there
    is no such dataset. If prepare.py fails, it has printed the error: exit with its status.
    """
    folder = find(name)
    meta = folder / "meta.json"
    if meta.exists() and (name != "stdlib" or has_tokenizer(meta, tokenizer)):
        return
    if not (folder / "prepare.py").exists():
        if folder.is_dir():
            return  # load() reports the missing files
        names = ", ".join(sorted(path.parent.name for path in FOLDER.glob("*/prepare.py")))
        instead = NANOGPT_DATASETS.get(name, f"give the path of a folder, or one of {names}")
        raise UserError(f"--dataset={name}: no such dataset; {instead}")
    with tempfile.TemporaryDirectory() as scratch:
        spec = tokenizer
        if not isinstance(spec, str):
            spec = f"{scratch}/tokenizer.json"
            Path(spec).write_text(json.dumps(tokenizer))
        print(f"preparing the dataset {name} ...", flush=True)
        status = subprocess.call([sys.executable, folder / "prepare.py", f"--tokenizer={spec}"])
    if status:
        sys.exit(status)


def has_tokenizer(meta: Path, tokenizer: str | dict[str, Any]) -> bool:
    """Return whether a dataset has this tokenizer, by its name (a spec) or by its dict."""
    try:
        found = json.loads(meta.read_bytes())["tokenizer"]
        return (found["name"] if isinstance(tokenizer, str) else found) == tokenizer
    except (ValueError, KeyError, TypeError):
        return True  # load() reports a damaged file


@dataclass
class Dataset:
    """Both splits as memory-mapped token ids, with their tokenizer."""

    folder: Path
    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: float  # of val: converts its loss to bits per byte
    max_token: int  # the largest id in both splits

    def check(self, sequence_len: int, vocab_size: int) -> None:
        """Raise UserError if a split is too short for one sequence, or an id is not in the vocabulary."""
        for name, tokens in (("train", self.train), ("val", self.val)):
            if len(tokens) <= sequence_len:
                raise UserError(
                    f"{self.folder / name}.bin has {len(tokens)} tokens, too few for "
                    f"--sequence_len={sequence_len}: prepare more text, or train with "
                    f"--sequence_len={len(tokens) - 1}, or less"
                )
        if self.max_token >= vocab_size:
            raise UserError(
                f"{self.folder} has token id {self.max_token}, outside the vocabulary of {vocab_size}: "
                "make --vocab_size larger, or 0 for the tokenizer's size"
            )


def load(folder: Path) -> Dataset:
    """Open a prepared dataset. UserError if a file is missing or damaged, or does not match the others.

    The largest id of a file above SCAN bytes is that in meta.json, so more data does not slow down a start.
    """
    if missing := [name for name in FILES if not (folder / name).exists()]:
        raise UserError(f"{folder} has no {', '.join(missing)}: a prepare.py writes {', '.join(FILES)}")

    meta_path = folder / "meta.json"
    content = meta_path.read_bytes()
    try:
        meta = json.loads(content)
        tokenizer = Tokenizer.from_dict(meta["tokenizer"])
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        counts = {name: int(meta[f"{name}_tokens"]) for name in ("train", "val")}
        largest = {name: int(meta.get(f"{name}_max_token", -1)) for name in ("train", "val")}
        bytes_per_token = meta["val_bytes"] / max(counts["val"], 1)
        if not 0 < bytes_per_token < float("inf"):
            raise ValueError(bytes_per_token)
    except ImportError:  # the tokenizer needs an extra
        raise
    except Exception as e:  # a damaged file can raise anything
        what = "is damaged, or not the meta.json of a dataset"
        raise UserError(f"{meta_path} {what}: run prepare.py again") from e

    splits = {}
    for name, n_tokens in counts.items():
        path = folder / f"{name}.bin"
        size = path.stat().st_size
        if size != n_tokens * dtype.itemsize or size == 0:
            raise UserError(
                f"{path} has {size} bytes, but {meta_path} says {n_tokens} tokens of {dtype.name}: "
                "run prepare.py again"
            )
        if size <= SCAN or largest[name] < 0:
            largest[name] = max_token(path, dtype)
        if largest[name] >= tokenizer.vocab_size:
            raise UserError(
                f"{path} has token id {largest[name]}, outside the vocabulary of {tokenizer.vocab_size} "
                f"({tokenizer.name}): run prepare.py again"
            )
        splits[name] = np.memmap(path, dtype=dtype, mode="r")
    max_id = max(largest.values())
    return Dataset(folder, splits["train"], splits["val"], tokenizer, bytes_per_token, max_id)


def max_token(path: Path, dtype: np.dtype) -> int:
    """Return the largest id in a file."""
    with open(path, "rb") as f:  # not by a memory map, whose pages would all count as this process's memory
        return max(int(np.frombuffer(chunk, dtype).max()) for chunk in iter(lambda: f.read(2**20), b""))


def open_dataset(name: str, tokenizer: str | dict[str, Any], world: World) -> Dataset:
    """`prepare` and `load` a dataset in every process of a run.

    UserError if the dataset was prepared with another tokenizer than that of a checkpoint (a dict).
    """
    if world.rank == 0:
        prepare(name, tokenizer)
    world.barrier()
    if world.local_rank == 0:  # the other machines may have folders of their own
        prepare(name, tokenizer)
    world.barrier()
    data = load(find(name))
    if isinstance(tokenizer, dict) and tokenizer != data.tokenizer.to_dict():
        raise UserError(
            f"the dataset {name} has another tokenizer ({data.tokenizer.name}) than the checkpoint: "
            "prepare it again with --tokenizer=CHECKPOINT"
        )
    return data


def draw_batches(
    seed: int, step: int, n_tokens: int, sequence_len: int, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the start of each sequence of a step, (micro-batches, batch_size), and a dropout seed per batch.

    A function of (seed, step), however many processes share the step.
    """
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(n_tokens - sequence_len, size=shape)
    return starts, rng.integers(2**63, size=shape[0])


def eval_batches(n_tokens: int, sequence_len: int, batch_size: int, n_batches: int) -> list[np.ndarray]:
    """Return where the windows of an evaluation begin, in batches: evenly spread, or all if there are few."""
    n_windows = (n_tokens - 1) // sequence_len
    n = min(n_windows, n_batches * batch_size)
    starts = np.linspace(0, n_windows - 1, n).astype(np.int64) * sequence_len
    return [starts[i : i + batch_size] for i in range(0, n, batch_size)]


def get_batch(
    tokens: np.ndarray, starts: np.ndarray, sequence_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (B, sequence_len) int64, from the positions starts (B,).

    Targets are the inputs one token ahead.
    """
    positions = starts[:, None] + np.arange(sequence_len + 1)  # (B, T + 1)
    windows = torch.from_numpy(tokens[positions].astype(np.int64))
    if device.type == "cuda":
        windows = windows.pin_memory()  # the copy to the GPU is then asynchronous
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]

"""A prepared dataset, of text or of conversations, and the batches that a run draws from it."""

import json
import mmap
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sologpt.errors import RunError, UserError
from sologpt.parallel import World
from sologpt.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "data"
FILES = ("train.bin", "val.bin", "meta.json")
QUICK = ("stdlib", "docstrings")  # to prepare: that is done again for another tokenizer
SCAN = 100 * 2**20  # a token file up to this many bytes is checked when it is loaded

NANOGPT_DATASETS = {  # a dataset of nanoGPT: what to use instead
    "shakespeare_char": "use --dataset=shakespeare, or the config file config/shakespeare_char.py",
    "openwebtext": "use --dataset=fineweb, prepared by data/fineweb/prepare.py",
}


def find(name: str) -> Path:
    """Return the folder data/NAME if it exists, else name as a path."""
    folder = FOLDER / name
    return folder if folder.is_dir() else Path(name)


def prepare(name: str, tokenizer: str | dict[str, Any], sequence_len: int) -> None:
    """Run a dataset's prepare.py if its meta.json is missing. tokenizer: a spec, or a checkpoint's dict.

    stdlib and docstrings are quick to prepare. So they are prepared again if they have another tokenizer, or
    conversations that are too long. UserError if there is no such dataset. If prepare.py fails, it has
    printed the error: exit with its status.
    """
    folder = find(name)
    meta = folder / "meta.json"
    if meta.exists() and (name not in QUICK or suits(meta, tokenizer, sequence_len)):
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
            about = {"tokenizer": tokenizer, "sequence_len": sequence_len}
            Path(spec).write_text(json.dumps(about))
        print(f"preparing the dataset {name} ...", flush=True)
        status = subprocess.call([sys.executable, folder / "prepare.py", f"--tokenizer={spec}"])
    if status:
        sys.exit(status)


def suits(meta: Path, tokenizer: str | dict[str, Any], sequence_len: int) -> bool:
    """Whether a dataset has this tokenizer, by its name (a spec) or its dict, and no longer conversations."""
    try:
        about = json.loads(meta.read_bytes())
        found = about["tokenizer"]
        if about.get("sequence_len", sequence_len) > sequence_len:
            return False
        if isinstance(tokenizer, str):
            return found["name"] == tokenizer
        return Tokenizer.from_dict(found).has_ids_of(Tokenizer.from_dict(tokenizer))
    except (ValueError, KeyError, TypeError):
        return True  # load() reports a damaged file


@dataclass
class Rows:
    """Where the conversations of a split are in its tokens, and which tokens are trained."""

    starts: np.ndarray  # (rows + 1,) int64: row r is [starts[r], starts[r + 1])
    trained: np.ndarray  # (tokens,) uint8, 1 if the loss counts the token

    def count_targets(self) -> np.ndarray:
        """Return how many tokens of each row are trained, but for its first, which is not predicted."""
        begins = self.starts[:-1]
        return np.add.reduceat(self.trained, begins, dtype=np.int64) - self.trained[begins]


@dataclass
class Dataset:
    """Both splits as memory-mapped token ids, with their tokenizer."""

    folder: Path
    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: float  # of val: converts its loss to bits per byte
    max_token: int  # the largest id in both splits
    rows: dict[str, Rows]  # of conversations, by split; empty for plain text
    fingerprint: str  # other for other tokens

    def check(self, sequence_len: int, vocab_size: int) -> None:
        """Raise UserError if the sequences do not fit, or an id is not in the vocabulary."""
        for name, tokens in (("train", self.train), ("val", self.val)):
            if name in self.rows:
                longest = int(np.diff(self.rows[name].starts).max())
                if longest > sequence_len:
                    raise UserError(
                        f"{self.folder / name}.bin has a conversation of {longest} tokens, but "
                        f"--sequence_len={sequence_len}: give it to prepare.py, too, to drop old turns"
                    )
            elif len(tokens) <= sequence_len:
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

    def batches(self, split: str, sequence_len: int) -> "Windows | Conversations":
        tokens = getattr(self, split)
        if self.rows:
            return Conversations(tokens, self.rows[split])
        return Windows(tokens, sequence_len)


def load(folder: Path) -> Dataset:
    """Open a prepared dataset. UserError if a file is missing or damaged, or does not match the others.

    The largest id and the CRC of a file above SCAN bytes are those in meta.json, so more data does not slow
    down a start.
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
        largest = {name: int(meta.get(f"{name}_max_token", -1)) for name in counts}
        crcs = {name: int(meta.get(f"{name}_crc32", -1)) for name in counts}  # -1: unknown
        bytes_per_token = meta["val_bytes"] / max(meta.get("val_trained", counts["val"]), 1)
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
        crc = crcs[name]
        if size <= SCAN or largest[name] < 0:
            largest[name], crc = scan(path, dtype)
        if largest[name] >= tokenizer.vocab_size:
            raise UserError(
                f"{path} has token id {largest[name]}, outside the vocabulary of {tokenizer.vocab_size} "
                f"({tokenizer.name}): run prepare.py again"
            )
        if crcs[name] not in (crc, -1):
            raise UserError(f"{path} has changed since {meta_path} was written: run prepare.py again")
        crcs[name] = crc
        splits[name] = np.memmap(path, dtype=dtype, mode="r")
    rows = {name: load_rows(folder, name, counts[name]) for name in splits if f"{name}_rows" in meta}
    max_id = max(largest.values())
    fingerprint = ", ".join(f"{name} {counts[name]} {crcs[name]:x}" for name in splits)
    return Dataset(
        folder, splits["train"], splits["val"], tokenizer, bytes_per_token, max_id, rows, fingerprint
    )


def load_rows(folder: Path, split: str, n_tokens: int) -> Rows:
    """Open the rows of a split. UserError if a file is missing, or they are not rows of n_tokens tokens."""
    try:
        starts = np.fromfile(folder / f"{split}_rows.bin", dtype="<i8")
        trained = np.memmap(folder / f"{split}_trained.bin", dtype=np.uint8, mode="r")
        rows = Rows(starts, trained)
        lengths = np.diff(starts)
        if (starts[0], starts[-1], len(trained)) != (0, n_tokens, n_tokens) or lengths.min() < 2:
            raise ValueError("these are not the rows of the split")
        if not rows.count_targets().all():
            raise ValueError("a row has no target")
    except (OSError, ValueError, IndexError) as e:
        what = f"{split}_rows.bin or {split}_trained.bin is missing, or does not match {split}.bin"
        raise UserError(f"{folder}: {what}: run prepare.py again") from e
    return rows


def scan(path: Path, dtype: np.dtype) -> tuple[int, int]:
    """Return the largest id in a file, and its CRC-32."""
    largest = crc = 0
    with open(path, "rb") as f:  # not by a memory map, whose pages would all count as this process's memory
        while chunk := f.read(2**20):
            largest = max(largest, int(np.frombuffer(chunk, dtype).max()))
            crc = zlib.crc32(chunk, crc)
    return largest, crc


def check_size(tokens: Any) -> None:
    """RunError if a memory-mapped file has been truncated: to read past its end is a fatal SIGBUS."""
    if isinstance(tokens.base, mmap.mmap) and tokens.base.size() < tokens.nbytes:
        hint = "prepare the dataset again, then go on with --init_from=resume"
        raise RunError(f"{tokens.filename} has become shorter while the run was reading it: {hint}")


def open_dataset(name: str, tokenizer: str | dict[str, Any], sequence_len: int, world: World) -> Dataset:
    """`prepare` and `load` a dataset in every process of a run.

    UserError if the dataset was prepared with another tokenizer than that of a checkpoint (a dict).
    """
    if world.rank == 0:
        prepare(name, tokenizer, sequence_len)
    world.barrier()
    if world.local_rank == 0:  # the other machines may have folders of their own
        prepare(name, tokenizer, sequence_len)
    world.barrier()
    data = load(find(name))
    if isinstance(tokenizer, dict) and not data.tokenizer.has_ids_of(Tokenizer.from_dict(tokenizer)):
        raise UserError(
            f"the dataset {name} has another tokenizer ({data.tokenizer.name}) than the checkpoint: "
            "prepare it again with --tokenizer=CHECKPOINT"
        )
    return data


# -----------------------------------------------------------------------------
# Batches. A batch is an array of numbers: where its windows begin in a text, or which conversations it has


class Windows:
    """Batches of a text: sequences of sequence_len tokens that begin anywhere."""

    def __init__(self, tokens: np.ndarray, sequence_len: int) -> None:
        self.tokens = tokens
        self.sequence_len = sequence_len

    def draw(self, seed: int, step: int, n: int, batch_size: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Draw a step's n micro-batches, and a dropout seed for each: a function of (seed, step)."""
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(len(self.tokens) - self.sequence_len, size=(n, batch_size))
        return [*starts], rng.integers(2**63, size=n)

    def spread(self, n: int, batch_size: int) -> list[np.ndarray]:
        """Return the n batches of an evaluation, spread evenly over the split; fewer if it is short."""
        n_windows = (len(self.tokens) - 1) // self.sequence_len
        starts = np.linspace(0, n_windows - 1, min(n_windows, n * batch_size)).astype(np.int64)
        return split(starts * self.sequence_len, batch_size)

    def get(self, batch: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        check_size(self.tokens)
        return get_batch(self.tokens, batch, self.sequence_len, device)

    def n_tokens(self, batch: np.ndarray) -> int:
        return len(batch) * self.sequence_len

    n_targets = n_tokens

    def describe_steps(self, batch_size: int) -> str:
        return f"{batch_size * self.sequence_len:,} tokens a step, {len(self.tokens):,} to train on"


class Conversations:
    """Batches of whole conversations, one a row, with the trained tokens as targets.

    Rows of similar lengths are together, padded on the right to the longest. Every conversation comes once an
    epoch, in an order that is a function of (seed, epoch).
    """

    SORTED = 50  # batches whose rows are sorted by length

    def __init__(self, tokens: np.ndarray, rows: Rows) -> None:
        self.tokens = tokens
        self.starts = rows.starts
        self.trained = rows.trained
        self.lengths = np.diff(rows.starts)
        self.targets = rows.count_targets()
        self.epoch: tuple[Any, list[np.ndarray]] = (None, [])  # the last one drawn: its key and its batches

    def draw(self, seed: int, step: int, n: int, batch_size: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Draw a step's n micro-batches, and a dropout seed for each: a function of (seed, step)."""
        per_epoch = -(-len(self.lengths) // batch_size)
        batches = []
        for i in range(step * n, (step + 1) * n):
            epoch, at = divmod(i, per_epoch)
            batches.append(self.draw_epoch(seed, epoch, batch_size)[at])
        return batches, np.random.default_rng((seed, step)).integers(2**63, size=n)

    def draw_epoch(self, seed: int, epoch: int, batch_size: int) -> list[np.ndarray]:
        """Draw all batches of an epoch, the last rows in a smaller one."""
        key = (seed, epoch, batch_size)
        if self.epoch[0] != key:
            rng = np.random.default_rng((seed, epoch, 1))
            order = rng.permutation(len(self.lengths))
            parts = [part[np.argsort(self.lengths[part])] for part in split(order, self.SORTED * batch_size)]
            batches = split(np.concatenate(parts), batch_size)
            self.epoch = key, [batches[i] for i in rng.permutation(len(batches))]
        return self.epoch[1]

    def spread(self, n: int, batch_size: int) -> list[np.ndarray]:
        """Return the n batches of an evaluation, spread evenly over the split; fewer if it is short."""
        n_rows = len(self.lengths)
        rows = np.linspace(0, n_rows - 1, min(n_rows, n * batch_size)).astype(np.int64)
        return split(rows[np.argsort(self.lengths[rows])], batch_size)

    def get(self, batch: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, longest row - 1), with targets -1 for what is not trained."""
        check_size(self.tokens)
        check_size(self.trained)
        shape = (len(batch), self.lengths[batch].max() - 1)
        x, y = np.zeros(shape, np.int64), np.full(shape, -1)
        for i, row in enumerate(batch):
            at = slice(self.starts[row], self.starts[row + 1])
            ids, trained = self.tokens[at], self.trained[at]
            x[i, : len(ids) - 1] = ids[:-1]
            y[i, : len(ids) - 1] = np.where(trained[1:], ids[1:].astype(np.int64), -1)
        return to_device(torch.from_numpy(x), device), to_device(torch.from_numpy(y), device)

    def n_tokens(self, batch: np.ndarray) -> int:
        """Return how many tokens the model reads, without padding."""
        return int(self.lengths[batch].sum()) - len(batch)

    def n_targets(self, batch: np.ndarray) -> int:
        return int(self.targets[batch].sum())

    def question(self, row: int) -> list[int]:
        """Return the ids of a row up to its last answer."""
        ids, trained = (x[self.starts[row] : self.starts[row + 1]] for x in (self.tokens, self.trained))
        begins = np.flatnonzero(np.diff(trained.astype(np.int8)) == 1) + 1  # of each answer
        return ids[: begins[-1]].tolist()

    def describe_steps(self, batch_size: int) -> str:
        n = len(self.lengths)
        epoch = f"an epoch is {n / batch_size:,.1f} steps"
        return f"{batch_size} conversations a step, {n:,} to train on: {epoch}"


def split(items: np.ndarray, size: int) -> list[np.ndarray]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def get_batch(
    tokens: np.ndarray, starts: np.ndarray, sequence_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (B, sequence_len) int64, from the positions starts (B,).

    Targets are the inputs one token ahead.
    """
    positions = starts[:, None] + np.arange(sequence_len + 1)  # (B, T + 1)
    windows = to_device(torch.from_numpy(tokens[positions].astype(np.int64)), device)
    return windows[:, :-1], windows[:, 1:]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        x = x.pin_memory()  # the copy to the GPU is then asynchronous
    return x.to(device, non_blocking=True)

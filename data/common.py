"""What all datasets share: documents to token files, and token files to training batches.

A dataset is a folder with train.bin and val.bin (flat little-endian token ids, uint16 or uint32) and meta.json (the
tokenizer, the dtype, token and byte counts). Text is read, tokenized and written in chunks, and token files are
memory-mapped, so memory use does not grow with the size of a dataset.
"""

import argparse
import codecs
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:  # torch is imported only where it is used: prepare.py starts fast without it
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for prepare.py, run from any folder
from sologpt.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
SPLITS = ("train", "val")
FILES = ("train.bin", "val.bin", "meta.json")
NANOGPT_DATASETS = {  # a name of nanoGPT's: what has its place
    "shakespeare_char": "here it is --dataset=shakespeare, and its run is config/shakespeare_char.py",
    "openwebtext": "here --dataset=fineweb has web text, prepared by data/fineweb/prepare.py",
}
CHUNK = 2**20  # bytes per read
LEAST = 32  # tokens of a split: from fewer there is nothing to learn
SCAN = 100 * 2**20  # a token file up to this many bytes is scanned for its largest id when it is loaded

# -----------------------------------------------------------------------------
# Documents


@dataclass(frozen=True)
class Document:
    """The text of a file, or its characters [start, stop). Iterating yields it in chunks.

    A chunk ends before a space that follows a non-space character. The pre-tokenization patterns of BPE tokenizers
    attach a space to the word after it, so this is always a token boundary, and the ids of the chunks, concatenated,
    are the ids of the whole text. There are two exceptions: text without such a space for a whole chunk is cut
    mid-word, and a tokenizer that prepends a space to its input (SentencePiece) prepends one to each chunk.
    """

    path: Path
    errors: str = "strict"  # how to handle bytes that are not UTF-8, as in bytes.decode
    start: int = 0
    stop: int = sys.maxsize

    def __iter__(self) -> Iterator[str]:
        position = 0
        for text in self._chunks():
            yield text[max(self.start - position, 0) : max(self.stop - position, 0)]
            position += len(text)

    def _chunks(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        text, size = "", 0
        with open(self.path, "rb") as f:
            while chunk := f.read(CHUNK):
                size += len(chunk)
                if text:
                    last_boundary = re.match(r"(?s:.*)\S(?= )", text)
                    end = last_boundary.end() if last_boundary else len(text)
                    yield text[:end]
                    text = text[end:]
                text += self._decode(decoder, chunk, size)
        yield text + self._decode(decoder, b"", size)

    def _decode(self, decoder: codecs.IncrementalDecoder, chunk: bytes, size: int) -> str:
        """Decode the next chunk, or b"" at the end of the file; `size` is the number of bytes read so far."""
        try:
            return decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as e:  # e.object starts with the bytes that the decoder had buffered
            raise ValueError(
                f"{self.path} is not UTF-8 text: {e.reason} at byte {size - len(e.object) + e.start}"
            ) from e


def split(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, in order; empty files are dropped.

    Every n-th document is for validation, n = 1 / val_fraction. If there is only one, its end is.
    ValueError if there is too little text for two splits.
    """
    documents = [document for document in documents if document.path.stat().st_size]
    if not documents:
        raise ValueError("there is no text: no input file, or only empty ones")
    if len(documents) > 1:
        n = min(round(1 / val_fraction), len(documents))
        return [d for i, d in enumerate(documents) if i % n < n - 1], documents[n - 1 :: n]
    (document,) = documents
    length = sum(map(len, document))
    cut = int(length * (1 - val_fraction))
    if not 0 < cut < length:
        raise ValueError(f"{document.path} has too little text for a training and a validation split")
    return [replace(document, stop=cut)], [replace(document, start=cut)]


# -----------------------------------------------------------------------------
# Writing a dataset


def write(folder: Path, documents: list[Document], spec: str, val_fraction: float) -> None:
    """Tokenize documents, separated by <|endoftext|>, into folder's train.bin, val.bin and meta.json.

    An existing dataset is replaced only after everything has been written. ValueError if a split would be empty.
    """
    parts = dict(zip(SPLITS, split(documents, val_fraction), strict=True))
    tokenizer = open_tokenizer(spec, (text for document in parts["train"] for text in document))
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    meta: dict[str, Any] = {"tokenizer": tokenizer.to_dict(), "dtype": dtype}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, part in parts.items():
            counts = {"tokens": 0, "bytes": 0, "max_token": 0}
            with open(folder / f"{name}.bin.tmp", "wb") as f:
                for text, ids in tokenize(part, tokenizer):
                    f.write(np.array(ids, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())
                    counts["tokens"] += len(ids)
                    counts["bytes"] += len(text.encode())
                    counts["max_token"] = max(counts["max_token"], max(ids, default=0))
            meta |= {f"{name}_{key}": count for key, count in counts.items()}
            tokens = f"{counts['tokens']:,} tokens"
            if counts["tokens"] < LEAST:
                raise ValueError(f"too little text: {name}.bin would have {tokens}, and needs {LEAST} or more")
            print(f"{folder.name}/{name}.bin: {len(part):,} documents, {tokens} (tokenizer: {tokenizer.name})")
        (folder / "meta.json.tmp").write_text(json.dumps(meta))
        (folder / "meta.json").unlink(missing_ok=True)  # a kill between renames leaves no meta.json beside other files
        for name in FILES:
            os.replace(folder / f"{name}.tmp", folder / name)
    finally:
        for name in FILES:
            (folder / f"{name}.tmp").unlink(missing_ok=True)


def tokenize(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """Each chunk of text with its ids; the <|endoftext|> between two documents has no text."""
    for i, document in enumerate(documents):
        if i:
            yield "", [tokenizer.eot]
        for text in document:
            yield text, tokenizer.encode(text)


def open_tokenizer(spec: str, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer in FILE.json (its dict, or a dataset's meta.json) or FILE.pt (a checkpoint), or the one that comes
    with the dataset stdlib, else Tokenizer.from_spec(spec, texts).

    ValueError if the file has no tokenizer, ImportError if the tokenizer needs a missing extra.
    """
    path = Path(spec)
    if spec == "stdlib":
        return Tokenizer.from_merges(spec, (FOLDER / "stdlib" / "merges.txt").read_text("utf-8"))
    if path.suffix not in (".json", ".pt"):
        return Tokenizer.from_spec(spec, texts)
    try:
        if path.suffix == ".pt":
            import torch

            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            content = json.loads(path.read_bytes())
        tokenizer = Tokenizer.from_dict(content.get("tokenizer", content))
        tokenizer.eot  # noqa: B018  KeyError if there is no <|endoftext|> to separate documents
        return tokenizer
    except OSError as e:
        raise ValueError(f"--tokenizer={spec} cannot be read: {e.strerror}") from e
    except ImportError:
        raise
    except Exception as e:  # a damaged file can raise anything
        raise ValueError(
            f"--tokenizer={spec} has no tokenizer, or is damaged: it takes FILE.json (a tokenizer's dict, or a "
            "dataset's meta.json) or FILE.pt (a checkpoint)"
        ) from e


# -----------------------------------------------------------------------------
# The command line of a prepare.py


def main(folder: Path, documents: Callable[[str | None], list[Document]], val_fraction: float, about: str) -> None:
    """A whole prepare.py: `documents` gets the value of --input, or None, and returns the documents of the dataset."""
    parser = make_parser(folder, about)
    parser.add_argument("--input", metavar="PATH", help="The text is read from this file or folder.")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="The text is tokenized by bytes, by stdlib (a BPE trained on Python's standard library), by bpe:N (N ids, "
        "trained on this text), by a tiktoken encoding such as gpt2, or by the tokenizer in FILE.pt (a checkpoint) or "
        "FILE.json (a meta.json). The default is %(default)s.",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=val_fraction,
        metavar="X",
        help="This fraction of the text is held out for validation. The default is %(default)s.",
    )
    args = parser.parse_args()
    if not 0 < args.val_fraction <= 0.5:
        fail(2, f"--val_fraction must be in (0, 0.5], not {args.val_fraction}")
    run(args.out_dir, lambda: write(args.out_dir, documents(args.input), args.tokenizer, args.val_fraction))


def make_parser(folder: Path, about: str) -> argparse.ArgumentParser:
    """A parser with --out_dir, whose errors are one line."""
    parser = argparse.ArgumentParser(f"python {sys.argv[0]}", description=about)
    parser.add_argument(
        "--out_dir",
        type=Path,
        default=folder,
        metavar="FOLDER",
        help="The dataset (train.bin, val.bin, meta.json) goes to this folder. The default is that of prepare.py.",
    )
    parser.error = lambda message: fail(2, message)  # type: ignore[method-assign]
    return parser


def run(folder: Path, write_dataset: Callable[[], None]) -> None:
    """Call write_dataset. An error becomes one line on stderr and exit status 2 (bad input) or 1 (failure)."""
    try:
        write_dataset()
    except (ValueError, ImportError, FileNotFoundError) as e:
        fail(2, str(e))
    except OSError as e:
        fail(1, f"cannot write to {folder}: {e.strerror}" if e.errno and not e.filename else str(e))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(status: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


# -----------------------------------------------------------------------------
# Reading a dataset


def find(name: str) -> Path:
    """The folder data/NAME if there is one, else name as a path."""
    folder = FOLDER / name
    return folder if folder.is_dir() else Path(name)


def prepare(name: str, tokenizer: str | dict[str, Any]) -> None:
    """Run a dataset's prepare.py if its meta.json is missing. tokenizer: its spec, or the dict of a checkpoint's.

    stdlib takes seconds and nothing to prepare, so it is also prepared anew if it has another tokenizer. ValueError if
    there is no such dataset. If prepare.py fails, it has printed the error: exits with its status.
    """
    folder = find(name)
    meta = folder / "meta.json"
    if meta.exists() and (name != "stdlib" or has_tokenizer(meta, tokenizer)):
        return
    if not (folder / "prepare.py").exists():
        if folder.is_dir():
            return  # load() reports which files are missing
        names = ", ".join(sorted(path.parent.name for path in FOLDER.glob("*/prepare.py")))
        instead = NANOGPT_DATASETS.get(name, f"it takes the path of a folder, or one of {names}")
        raise ValueError(f"--dataset={name}: no such dataset; {instead}")
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
    """Whether a dataset has the tokenizer of a spec, by its name, or that of a checkpoint (a dict)."""
    try:
        have = json.loads(meta.read_bytes())["tokenizer"]
        return (have["name"] if isinstance(tokenizer, str) else have) == tokenizer
    except (ValueError, KeyError, TypeError):
        return True  # load() reports a damaged file


@dataclass
class Dataset:
    """Both splits as memory-mapped token ids, and what to know about them."""

    folder: Path
    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: float  # of val: converts its loss to bits per byte
    max_token: int  # the largest id in both splits

    def check(self, sequence_len: int, vocab_size: int) -> None:
        """ValueError if a split is too short for one sequence, or an id is outside the model's vocabulary."""
        for name, tokens in (("train", self.train), ("val", self.val)):
            if len(tokens) <= sequence_len:
                raise ValueError(
                    f"{self.folder / name}.bin has {len(tokens)} tokens, too few for --sequence_len={sequence_len}: "
                    f"prepare more text, or train with --sequence_len={len(tokens) - 1}, or less"
                )
        if self.max_token >= vocab_size:
            raise ValueError(
                f"{self.folder} has token id {self.max_token}, outside the vocabulary of {vocab_size}: "
                "make --vocab_size larger, or 0 for the tokenizer's size"
            )


def load(folder: Path) -> Dataset:
    """Open a prepared dataset.

    A file above SCAN bytes is not scanned for its largest id: meta.json has it, and a start takes no longer with more
    data. ValueError if a file is missing or damaged or does not match the others, ImportError if the tokenizer needs a
    missing extra.
    """
    if missing := [name for name in FILES if not (folder / name).exists()]:
        raise ValueError(f"{folder} has no {', '.join(missing)}: a prepare.py writes {', '.join(FILES)}")
    meta_path = folder / "meta.json"
    content = meta_path.read_bytes()
    try:
        meta = json.loads(content)
        tokenizer = Tokenizer.from_dict(meta["tokenizer"])
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        lengths = {name: int(meta[f"{name}_tokens"]) for name in SPLITS}
        largest = {name: int(meta.get(f"{name}_max_token", -1)) for name in SPLITS}
        bytes_per_token = meta["val_bytes"] / max(lengths["val"], 1)
        if not 0 < bytes_per_token < float("inf"):
            raise ValueError(bytes_per_token)
    except ImportError:
        raise
    except Exception as e:  # a damaged file can raise anything
        raise ValueError(f"{meta_path} is damaged, or not the meta.json of a dataset: run prepare.py again") from e
    splits = {}
    for name, tokens in lengths.items():
        path = folder / f"{name}.bin"
        size = path.stat().st_size
        if size != tokens * dtype.itemsize or size == 0:
            raise ValueError(
                f"{path} has {size} bytes, but {meta_path} says {tokens} tokens of {dtype.name}: run prepare.py again"
            )
        if size <= SCAN or largest[name] < 0:
            largest[name] = max_token(path, dtype)
        if largest[name] >= tokenizer.vocab_size:
            raise ValueError(
                f"{path} has token id {largest[name]}, outside the vocabulary of {tokenizer.vocab_size} "
                f"({tokenizer.name}): run prepare.py again"
            )
        splits[name] = np.memmap(path, dtype=dtype, mode="r")
    return Dataset(folder, splits["train"], splits["val"], tokenizer, bytes_per_token, max(largest.values()))


def max_token(path: Path, dtype: np.dtype) -> int:
    """The largest id in a file, by plain reads: the pages of a memory map would all count as this process's memory."""
    with open(path, "rb") as f:
        return max(int(np.frombuffer(chunk, dtype).max()) for chunk in iter(lambda: f.read(CHUNK), b""))


def open_dataset(name: str, tokenizer: str | dict[str, Any], world: Any) -> Dataset:
    """`prepare` and `load` for all processes of a run: the first prepares, then one on each other machine.

    ValueError if the dataset was prepared before, and not with the tokenizer of a checkpoint (a dict).
    """
    for is_my_turn in (world.rank == 0, world.local_rank == 0):
        if is_my_turn:
            prepare(name, tokenizer)
        world.barrier()
    data = load(find(name))
    if isinstance(tokenizer, dict) and tokenizer != data.tokenizer.to_dict():
        raise ValueError(
            f"the dataset {name} has another tokenizer ({data.tokenizer.name}) than the checkpoint: prepare it again "
            "with --tokenizer=CHECKPOINT"
        )
    return data


def draw_batches(
    seed: int, step: int, n_tokens: int, sequence_len: int, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the sequences of a step begin, of shape (micro-batches, batch_size), and a dropout seed per micro-batch.

    A function of (seed, step), however many processes share the step.
    """
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(n_tokens - sequence_len, size=shape)
    return starts, rng.integers(2**63, size=shape[0])


def eval_batches(n_tokens: int, sequence_len: int, batch_size: int, n_batches: int) -> list[np.ndarray]:
    """Where the windows of an evaluation begin, in batches: spread evenly, or all windows if there are no more."""
    n_windows = (n_tokens - 1) // sequence_len
    n = min(n_windows, n_batches * batch_size)
    starts = np.linspace(0, n_windows - 1, n).astype(np.int64) * sequence_len
    return [starts[i : i + batch_size] for i in range(0, n, batch_size)]


def get_batch(
    tokens: np.ndarray, starts: np.ndarray, sequence_len: int, device: "torch.device"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Inputs and targets, (B, sequence_len) int64, from the positions `starts` (B,): targets are one token ahead."""
    import torch

    windows = torch.from_numpy(tokens[starts[:, None] + np.arange(sequence_len + 1)].astype(np.int64))  # (B, T + 1)
    if device.type == "cuda":
        windows = windows.pin_memory()  # the copy to the GPU is then asynchronous
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]

"""What the datasets share: writing train.bin, val.bin and meta.json, and reading them for training.

Memory does not grow with the text: a document is read, tokenized and written in pieces, and read back by memory map.
"""

import argparse
import codecs
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # prepare.py runs in any folder
from sologpt.tokenizer import Tokenizer

SPLITS = ("train", "val")
PIECE = 2**20  # bytes that are read at a time
SCAN = 100 * 2**20  # bytes of a split that are looked through at each start

# -----------------------------------------------------------------------------
# Documents


@dataclass(frozen=True)
class Document:
    """A file's text, or its characters from start to stop, as an iterable of pieces: a large one needs no more memory.

    Two pieces meet before a space that follows something else. Tokens meet there too, since the patterns of BPEs join a
    space to what comes after it, never to what is before: the ids of the pieces, joined, are those of the whole. Two
    exceptions: a megabyte without such a place is cut at its end, in whatever word that is; and a tokenizer that puts a
    space before any text, as SentencePiece's do, puts one before each piece.
    """

    path: Path
    errors: str = "strict"  # what is done about bytes that are not UTF-8: see codecs
    start: int = 0
    stop: int = sys.maxsize

    def __iter__(self) -> Iterator[str]:
        at = 0
        for text in self._pieces():
            yield text[max(self.start - at, 0) : max(self.stop - at, 0)]
            at += len(text)

    def _pieces(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        text, size = "", 0
        with open(self.path, "rb") as f:
            while piece := f.read(PIECE):
                size += len(piece)
                if text:  # and now it is certain that there is more
                    seam = re.match(r"(?s:.*)\S(?= )", text)
                    end = seam.end() if seam else len(text)
                    yield text[:end]
                    text = text[end:]
                text += self._decode(decoder, piece, size)
        yield text + self._decode(decoder, b"", size)

    def _decode(self, decoder: codecs.IncrementalDecoder, piece: bytes, size: int) -> str:
        try:
            return decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as e:  # it counts from the bytes that the decoder still held
            raise ValueError(
                f"{self.path} is not UTF-8 text: {e.reason} at byte {size - len(e.object) + e.start}"
            ) from e


def split(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Documents for training and for validation, each in their order; empty ones are left out.

    Of several documents every n-th is for validation, n = 1 / val_fraction. A single one is cut: its end is.
    ValueError if there is too little for both.
    """
    documents = [document for document in documents if document.path.stat().st_size]
    if len(documents) > 1:
        n = min(round(1 / val_fraction), len(documents))
        return [d for i, d in enumerate(documents) if i % n < n - 1], documents[n - 1 :: n]
    length = sum(len(text) for document in documents for text in document)
    cut = int(length * (1 - val_fraction))
    if not 0 < cut < length:
        raise ValueError("there is no text, or too little to hold some out for validation")
    return [replace(documents[0], stop=cut)], [replace(documents[0], start=cut)]


# -----------------------------------------------------------------------------
# Writing


def write(folder: Path, documents: list[Document], spec: str, val_fraction: float) -> None:
    """Tokenize documents, <|endoftext|> between them, into folder's train.bin, val.bin and meta.json.

    What was there is replaced once all is written. ValueError if a split would be empty.
    """
    parts = dict(zip(SPLITS, split(documents, val_fraction), strict=True))
    tokenizer = open_tokenizer(spec, (text for document in parts["train"] for text in document))
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    meta: dict[str, Any] = {"tokenizer": tokenizer.to_dict(), "dtype": dtype}
    names = ("train.bin", "val.bin", "meta.json")
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
            meta |= {f"{name}_{what}": n for what, n in counts.items()}
            print(f"{folder / name}.bin: {len(part):,} documents, {counts['tokens']:,} tokens of {tokenizer.name}")
        (folder / "meta.json.tmp").write_text(json.dumps(meta))
        (folder / "meta.json").unlink(missing_ok=True)  # so that it never stands beside the files of another
        for name in names:
            os.replace(folder / f"{name}.tmp", folder / name)
    finally:
        for name in names:
            (folder / f"{name}.tmp").unlink(missing_ok=True)


def tokenize(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """The pieces of documents, each with its ids; <|endoftext|>, between two documents, is an id without text."""
    for i, document in enumerate(documents):
        if i:
            yield "", [tokenizer.eot]
        for text in document:
            yield text, tokenizer.encode(text)


def open_tokenizer(spec: str, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer of a file, or else the one that `Tokenizer.from_spec` makes, trained on texts if it is bpe:N.

    FILE.json is a tokenizer's dict, or a dataset's meta.json; FILE.pt a checkpoint. ValueError if none is in there,
    ImportError if it needs an extra that is missing.
    """
    path = Path(spec)
    if path.suffix not in (".json", ".pt"):
        return Tokenizer.from_spec(spec, texts)
    try:
        if path.suffix == ".pt":
            import torch  # only here: preparing a dataset is quick to start

            holder = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            holder = json.loads(path.read_bytes())
        tokenizer = Tokenizer.from_dict(holder.get("tokenizer", holder))
        tokenizer.eot  # noqa: B018  KeyError if there is none to stand between documents
        return tokenizer
    except OSError as e:
        raise ValueError(f"--tokenizer={spec} cannot be read: {e.strerror}") from e
    except ImportError:  # it says which extra is missing
        raise
    except Exception as e:  # a damaged file can fail in any way
        raise ValueError(
            f"--tokenizer={spec} holds no tokenizer, or is damaged: FILE.json is the dict of one, FILE.pt a checkpoint"
        ) from e


# -----------------------------------------------------------------------------
# The command line of a prepare.py


def main(folder: Path, documents: Callable[[str | None], list[Document]], val_fraction: float, about: str) -> None:
    """Prepare a dataset of texts: `documents(input)` returns them, input being what --input says or None."""
    parser = make_parser(folder, about)
    parser.add_argument("--input", help="read this file or folder instead")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, bpe:N, tiktoken's gpt2, ..., FILE.json, FILE.pt")
    parser.add_argument("--val_fraction", type=float, default=val_fraction, help="share held out for validation")
    args = parser.parse_args()
    if not 0 < args.val_fraction <= 0.5:
        fail(2, f"--val_fraction must be in (0, 0.5], not {args.val_fraction}")
    run(args.out_dir, lambda: write(args.out_dir, documents(args.input), args.tokenizer, args.val_fraction))


def make_parser(folder: Path, about: str) -> argparse.ArgumentParser:
    """What every prepare.py takes; its mistakes are one line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=folder, help="where train.bin, val.bin and meta.json go")
    parser.error = lambda message: fail(2, message)  # type: ignore[method-assign]
    return parser


def run(folder: Path, prepare: Callable[[], None]) -> None:
    """Call prepare, which writes to folder. What fails is one line on stderr: status 2 for a mistake, else 1."""
    try:
        prepare()
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
# Reading


@dataclass
class Dataset:
    """The two splits as memory-mapped token ids, their tokenizer, and how many bytes of text one token stands for."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: float  # of val, to show its loss as bits per byte
    max_token: int  # the largest id in both: the model's vocabulary has to be larger


def load(folder: Path) -> Dataset:
    """Open a prepared dataset. ValueError if a file is missing or damaged, or if they do not go together, ImportError
    if its tokenizer needs an extra that is missing.

    The largest id is looked for in a split of up to 100 MB. For a longer one meta.json is believed, so that a start
    takes no longer with more data.
    """
    meta_path = folder / "meta.json"
    missing = [name for name in ("train.bin", "val.bin", "meta.json") if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}: a dataset is train.bin, val.bin and meta.json, as a prepare.py "
            "writes them"
        )
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
    except Exception as e:  # a damaged file can fail in any way
        raise ValueError(f"{meta_path} is not a dataset's, or is damaged: run its prepare.py again") from e
    splits = {}
    for name, tokens in lengths.items():
        path = folder / f"{name}.bin"
        size = path.stat().st_size
        if size != tokens * dtype.itemsize or size == 0:
            raise ValueError(
                f"{path} has {size} bytes where {meta_path} says {tokens} tokens of {dtype.name}: "
                "run its prepare.py again"
            )
        if size <= SCAN or largest[name] < 0:
            largest[name] = max_token(path, dtype)
        if largest[name] >= tokenizer.vocab_size:
            raise ValueError(
                f"{path} has token id {largest[name]}, outside the vocabulary of {tokenizer.vocab_size} "
                f"({tokenizer.name}): run its prepare.py again"
            )
        splits[name] = np.memmap(path, dtype=dtype, mode="r")
    return Dataset(splits["train"], splits["val"], tokenizer, bytes_per_token, max(largest.values()))


def max_token(path: Path, dtype: np.dtype) -> int:
    """The largest id in a file, which is read in pieces: to look through a memory map would hold all of it."""
    with open(path, "rb") as f:
        return max(int(np.frombuffer(piece, dtype).max()) for piece in iter(lambda: f.read(PIECE), b""))

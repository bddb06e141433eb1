"""How a prepare.py writes a dataset: documents to token files.

A dataset is a folder with train.bin and val.bin (flat little-endian token ids, uint16 or uint32) and
meta.json (the tokenizer, the dtype, token and byte counts). Text is read, tokenized and written in chunks, so
memory use does not grow with its size. `sologpt.data` reads a dataset.
"""

import argparse
import codecs
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for prepare.py, run from any folder
from sologpt import errors
from sologpt.errors import RunError, UserError
from sologpt.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
SPLITS = ("train", "val")
FILES = ("train.bin", "val.bin", "meta.json")
CHUNK = 2**20  # bytes per read
MIN_TOKENS = 32  # in a split

# -----------------------------------------------------------------------------
# Documents


@dataclass(frozen=True)
class Document:
    """The text of a file, or its characters [start, stop). Iterating yields it in chunks.

    A chunk ends before a space that follows a non-space character. BPE tokenizers attach a space to the word
    after it, so this is a token boundary, and the ids of the chunks, concatenated, are the ids of the whole
    text. There are two exceptions: text without such a space for a whole chunk is cut mid-word, and a
    tokenizer that prepends a space to its input (SentencePiece) prepends one to each chunk.
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
        text = ""
        size = 0
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
        """Decode the next chunk, or b"" at the end of the file. size: the number of bytes read so far."""
        try:
            return decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as e:
            at = size - len(e.object) + e.start  # e.object begins with bytes that the decoder had buffered
            raise UserError(f"{self.path} is not UTF-8 text: {e.reason} at byte {at}") from e


def split(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Return the training and validation documents, in order, without empty files.

    Every n-th document is for validation, n = 1 / val_fraction. A single document is cut: its end is for
    validation. UserError if there is too little text.
    """
    documents = [document for document in documents if document.path.stat().st_size]
    if not documents:
        raise UserError("there is no text: no input file, or only empty ones")
    if len(documents) > 1:
        n = min(round(1 / val_fraction), len(documents))
        train = [document for i, document in enumerate(documents) if i % n < n - 1]
        return train, documents[n - 1 :: n]
    (document,) = documents
    length = sum(map(len, document))
    cut = int(length * (1 - val_fraction))
    if not 0 < cut < length:
        raise UserError(f"{document.path} has too little text for a training and a validation split")
    return [replace(document, stop=cut)], [replace(document, start=cut)]


# -----------------------------------------------------------------------------
# Writing a dataset


def write(folder: Path, documents: list[Document], spec: str, val_fraction: float) -> None:
    """Tokenize documents, separated by <|endoftext|>, into folder's train.bin, val.bin and meta.json.

    An existing dataset is replaced only after everything has been written. UserError if there is too little
    text, RunError if the folder cannot be written.
    """
    train, val = split(documents, val_fraction)
    tokenizer = open_tokenizer(spec, (text for document in train for text in document))
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    meta: dict[str, Any] = {"tokenizer": tokenizer.to_dict(), "dtype": dtype}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with write_errors(folder):
            for name, part in (("train", train), ("val", val)):
                counts = write_tokens(folder / f"{name}.bin.tmp", part, tokenizer, dtype)
                meta |= {f"{name}_{key}": count for key, count in counts.items()}
                tokens = f"{counts['tokens']:,} tokens"
                if counts["tokens"] < MIN_TOKENS:
                    needed = f"needs {MIN_TOKENS} or more"
                    raise UserError(f"too little text: {name}.bin would have {tokens}, and {needed}")
                size = f"{len(part):,} documents, {tokens}"
                print(f"{folder.name}/{name}.bin: {size} (tokenizer: {tokenizer.name})")
            (folder / "meta.json.tmp").write_text(json.dumps(meta))
            # Removed first: a kill between two renames must not leave an old meta.json beside a new train.bin
            (folder / "meta.json").unlink(missing_ok=True)
            for name in FILES:
                os.replace(folder / f"{name}.tmp", folder / name)
    finally:
        for name in FILES:
            (folder / f"{name}.tmp").unlink(missing_ok=True)


def write_tokens(path: Path, documents: list[Document], tokenizer: Tokenizer, dtype: str) -> dict[str, int]:
    """Write the tokens of documents to a file. Return how many tokens and bytes, and the largest id."""
    n_tokens = n_bytes = max_token = 0
    with open(path, "wb") as f:
        for text, ids in tokenize(documents, tokenizer):
            f.write(np.array(ids, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())
            n_tokens += len(ids)
            n_bytes += len(text.encode())
            max_token = max(max_token, max(ids, default=0))
    return {"tokens": n_tokens, "bytes": n_bytes, "max_token": max_token}


def tokenize(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """Yield each chunk of text with its ids, and between two documents "" with the id of <|endoftext|>."""
    for i, document in enumerate(documents):
        if i:
            yield "", [tokenizer.eot]
        for text in document:
            yield text, tokenizer.encode(text)


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Raise RunError for an OSError that names no file: a failed write, for example on a full disk."""
    try:
        yield
    except OSError as e:
        if e.filename:
            raise
        raise RunError(f"cannot write to {folder}: {e.strerror or e}") from e


def open_tokenizer(spec: str, texts: Iterable[str] = ()) -> Tokenizer:
    """Return the tokenizer "stdlib", that of a file, or Tokenizer.from_spec(spec, texts).

    A file is FILE.json (a tokenizer's dict, or a dataset's meta.json) or FILE.pt (a checkpoint). UserError if
    it has no tokenizer, ImportError if the tokenizer needs a missing extra.
    """
    if spec == "stdlib":
        return Tokenizer.from_merges(spec, (FOLDER / "stdlib" / "merges.txt").read_text("utf-8"))
    path = Path(spec)
    if path.suffix not in (".json", ".pt"):
        return Tokenizer.from_spec(spec, texts)
    try:
        if path.suffix == ".pt":
            from sologpt.load import read_checkpoint  # imports torch

            content = read_checkpoint(path)
        else:
            content = json.loads(path.read_bytes())
        tokenizer = Tokenizer.from_dict(content.get("tokenizer", content))
        tokenizer.eot  # noqa: B018  KeyError if no <|endoftext|> can separate documents
        return tokenizer
    except OSError as e:
        raise UserError(f"--tokenizer={spec} cannot be read: {e.strerror}") from e
    except ImportError:
        raise
    except Exception as e:  # a damaged file can raise anything
        raise UserError(
            f"--tokenizer={spec} has no tokenizer, or is damaged: give FILE.json (a tokenizer's dict, or a "
            "dataset's meta.json) or FILE.pt (a checkpoint)"
        ) from e


# -----------------------------------------------------------------------------
# The command line of a prepare.py


Documents = Callable[[str | None], list[Document]]  # from the value of --input, or None


class Parser(argparse.ArgumentParser):
    """The flag --out_dir. An error is a UserError."""

    def __init__(self, folder: Path, about: str) -> None:
        super().__init__(f"python {sys.argv[0]}", description=about)
        self.add_argument(
            "--out_dir",
            type=Path,
            default=folder,
            metavar="FOLDER",
            help="Write the dataset (train.bin, val.bin, meta.json) here. Default: the folder of prepare.py.",
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(folder: Path, documents: Documents, val_fraction: float, about: str) -> NoReturn:
    """Run a whole prepare.py, and exit."""
    errors.run(lambda: prepare(folder, documents, val_fraction, about))


def prepare(folder: Path, documents: Documents, val_fraction: float, about: str) -> None:
    """Write a dataset as the command line says."""
    parser = Parser(folder, about)
    parser.add_argument("--input", metavar="PATH", help="Read the text from this file or folder.")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="Tokenize by bytes, stdlib (a BPE trained on Python's standard library), bpe:N (a BPE of N ids, "
        "trained on this text), a tiktoken encoding such as gpt2, or the tokenizer in FILE.pt (a checkpoint) "
        "or FILE.json (a meta.json). Default: %(default)s.",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=val_fraction,
        metavar="X",
        help="Hold out this fraction of the text for validation. Default: %(default)s.",
    )
    args = parser.parse_args()
    if not 0 < args.val_fraction <= 0.5:
        raise UserError(f"--val_fraction must be in (0, 0.5], not {args.val_fraction}")
    write(args.out_dir, documents(args.input), args.tokenizer, args.val_fraction)

"""What the datasets share: writing train.bin, val.bin and meta.json, and reading them for training."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # prepare.py runs in any folder
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# Writing


def split(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Documents for training and for validation, each in their order.

    Of several documents every n-th is for validation, n = 1 / val_fraction. A single one is cut: its end is.
    """
    if len(documents) < 2:
        documents = documents or [""]
        cut = int(len(documents[0]) * (1 - val_fraction))
        return [documents[0][:cut]], [documents[0][cut:]]
    n = min(round(1 / val_fraction), len(documents))
    return [d for i, d in enumerate(documents) if i % n < n - 1], documents[n - 1 :: n]


def write(folder: Path, documents: list[str], spec: str, val_fraction: float) -> None:
    """Tokenize documents, <|endoftext|> between them, into folder's train.bin, val.bin and meta.json.

    What was there is replaced once all is written, meta.json last. ValueError if a split would be empty.
    """
    train, val = split([document for document in documents if document], val_fraction)
    if not any(train) or not any(val):
        raise ValueError("there is no text, or too little to hold some out for validation")
    tokenizer = Tokenizer.from_spec(spec, train)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    meta: dict = {"tokenizer": tokenizer.to_dict(), "dtype": dtype}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("val", val)):
        tokens = 0
        with open(folder / f"{name}.bin.tmp", "wb") as f:
            for i, document in enumerate(part):
                ids = ([tokenizer.eot] if i else []) + tokenizer.encode(document)
                f.write(np.array(ids, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())
                tokens += len(ids)
        meta |= {f"{name}_tokens": tokens, f"{name}_bytes": sum(len(document.encode()) for document in part)}
        print(f"{folder / name}.bin: {len(part):,} documents, {tokens:,} tokens of {tokenizer.name}")
    (folder / "meta.json.tmp").write_text(json.dumps(meta))
    for name in ("train.bin", "val.bin", "meta.json"):
        os.replace(folder / f"{name}.tmp", folder / name)


def main(folder: Path, documents: Callable[[str | None], list[str]], val_fraction: float, description: str) -> None:
    """The command line of a prepare.py: `documents(input)` returns its texts, input being what --input says or None."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input", help="read this file or folder instead")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, bpe:N, or an encoding of tiktoken's such as gpt2")
    parser.add_argument("--val_fraction", type=float, default=val_fraction, help="share held out for validation")
    parser.add_argument("--out_dir", type=Path, default=folder, help="where train.bin, val.bin and meta.json go")
    parser.error = lambda message: fail(2, message)  # type: ignore[method-assign]
    args = parser.parse_args()
    if not 0 < args.val_fraction <= 0.5:
        fail(2, f"--val_fraction must be in (0, 0.5], not {args.val_fraction}")
    try:
        write(args.out_dir, documents(args.input), args.tokenizer, args.val_fraction)
    except (ValueError, ImportError, FileNotFoundError) as e:
        fail(2, str(e))
    except OSError as e:
        fail(1, str(e))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(status: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def read_text(path: Path) -> str:
    """A file's text, as UTF-8; ValueError if it is not."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e


# -----------------------------------------------------------------------------
# Reading


@dataclass
class Dataset:
    """The two splits as memory-mapped token ids, their tokenizer, and how many bytes of text one token stands for."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: float  # of val, to show its loss as bits per byte


def load(folder: Path) -> Dataset:
    """Open a prepared dataset. ValueError if its files do not go together."""
    meta_path = folder / "meta.json"
    try:
        meta = json.loads(meta_path.read_text())
        tokenizer = Tokenizer.from_dict(meta["tokenizer"])
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        bytes_per_token = meta["val_bytes"] / meta["val_tokens"]
        splits = {}
        for name in ("train", "val"):
            path = folder / f"{name}.bin"
            size, tokens = path.stat().st_size, meta[f"{name}_tokens"]
            if size != tokens * dtype.itemsize or tokens == 0:
                raise ValueError(f"{path} has {size} bytes where {meta_path} says {tokens} tokens of {dtype.name}")
            splits[name] = np.memmap(path, dtype=dtype, mode="r")
    except (KeyError, TypeError, ZeroDivisionError, json.JSONDecodeError) as e:
        raise ValueError(f"{meta_path} is not a dataset's: prepare it anew") from e
    return Dataset(splits["train"], splits["val"], tokenizer, bytes_per_token)

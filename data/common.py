"""How a prepare.py writes a dataset: documents or conversations to token files.

A dataset is a folder with train.bin and val.bin (flat little-endian token ids, uint16 or uint32) and
meta.json (the tokenizer, the dtype, token and byte counts). Text is read, tokenized and written in chunks, so
memory use does not grow with its size. A dataset of conversations also has, for each split, which tokens are
trained (train_trained.bin) and where the rows begin (train_rows.bin). `sologpt.data` reads a dataset.
"""

import argparse
import codecs
import importlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for prepare.py, run from any folder
from sologpt import errors
from sologpt.conversations import Example, Row, encode_examples
from sologpt.errors import RunError, UserError
from sologpt.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
SPLITS = ("train", "val")
FILES = ("train.bin", "val.bin", "meta.json")
ROW_FILES = ("train_trained.bin", "train_rows.bin", "val_trained.bin", "val_rows.bin", *FILES)
CHUNK = 2**20  # bytes per read
MIN_TOKENS = 32  # in a split
MAX_ROW = 1024  # tokens, unless --sequence_len says more

UTF16 = (b"\xff\xfe", b"\xfe\xff")  # with which such a file begins

T = TypeVar("T")

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
            hint = how_to_convert(self.path)
            raise UserError(f"{self.path} is not UTF-8 text: {e.reason} at byte {at}; {hint}") from e


def how_to_convert(path: Path) -> str:
    with open(path, "rb") as f:
        is_utf16 = f.read(2) in UTF16
    encoding, condition = ("UTF-16", "") if is_utf16 else ("LATIN1", ", if it is in Latin-1")
    return f"iconv -f {encoding} -t UTF-8 OLD > NEW converts it{condition}"


def split(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Return the training and validation documents, in order, without empty files.

    Every n-th document is for validation, n = 1 / val_fraction. A single document is cut: its end is for
    validation. UserError if there is too little text.
    """
    documents = [document for document in documents if document.path.stat().st_size]
    if not documents:
        raise UserError("there is no text: no input file, or only empty ones")
    if len(documents) > 1:
        return hold_out(documents, val_fraction)
    (document,) = documents
    length = sum(map(len, document))
    cut = int(length * (1 - val_fraction))
    if not 0 < cut < length:
        raise UserError(f"{document.path} has too little text for a training and a validation split")
    return [replace(document, stop=cut)], [replace(document, start=cut)]


def hold_out(items: list[T], val_fraction: float) -> tuple[list[T], list[T]]:
    """Return the others and every n-th of two or more items, n = 1 / val_fraction."""
    n = min(round(1 / val_fraction), len(items))
    return [item for i, item in enumerate(items) if i % n < n - 1], items[n - 1 :: n]


# -----------------------------------------------------------------------------
# Writing a dataset


def write(folder: Path, documents: list[Document], spec: str, val_fraction: float) -> None:
    """Tokenize documents, separated by <|endoftext|>, into folder's train.bin, val.bin and meta.json.

    An existing dataset is replaced only after everything has been written. UserError if there is too little
    text, RunError if the folder cannot be written.
    """
    train, val = split(documents, val_fraction)
    tokenizer = open_tokenizer(spec, (text for document in train for text in document))
    meta = first_meta(tokenizer)
    lines = []
    warn_of_another_tokenizer(folder, tokenizer)
    with replacing_dataset(folder, FILES):
        for name, part in (("train", train), ("val", val)):
            counts = write_tokens(folder / f"{name}.bin.tmp", part, tokenizer, meta["dtype"])
            meta |= {f"{name}_{key}": count for key, count in counts.items()}
            tokens = f"{counts['tokens']:,} tokens"
            if counts["tokens"] < MIN_TOKENS:
                needed = f"needs {MIN_TOKENS} or more"
                raise UserError(f"too little text: {name}.bin would have {tokens}, and {needed}")
            size = f"{plural(len(part), 'document')}, {tokens}"
            lines.append(f"{folder.name}/{name}.bin: {size} (tokenizer: {tokenizer.name})")
        (folder / "meta.json.tmp").write_text(json.dumps(meta))
    print(*lines, sep="\n")
    share = meta["val_tokens"] / (meta["train_tokens"] + meta["val_tokens"])
    if share > 2 * val_fraction:
        why = "documents are held out whole, and these differ in length; one file for all of them is cut"
        print(f"note: val.bin has {share:.0%} of the text: {why}")


def plural(n: int, what: str) -> str:
    return f"{n:,} {what}" + "s" * (n != 1)


def warn_of_another_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Say so if the dataset in folder, which is to be replaced, has another tokenizer."""
    try:
        old = Tokenizer.from_dict(json.loads((folder / "meta.json").read_bytes())["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return  # there is none, or it is damaged
    if not old.has_ids_of(tokenizer):
        what = f"{folder} had the tokenizer {old.name}, and now gets {tokenizer.name}"
        keep = "prepare.py --out_dir=data/NAME keeps both"
        print(f"note: {what}: to resume a run with the old one, prepare it with that again ({keep})")


def first_meta(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what meta.json holds besides counts: the tokenizer, and a dtype for its ids."""
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    return {"tokenizer": tokenizer.to_dict(), "dtype": dtype}


@contextmanager
def replacing_dataset(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Rename NAME.tmp to NAME for each name, once all have been written. meta.json must be the last name."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with write_errors(folder):
            yield
            # Removed first: a kill between two renames must not leave an old meta.json beside a new train.bin
            (folder / "meta.json").unlink(missing_ok=True)
            for name in names:
                os.replace(folder / f"{name}.tmp", folder / name)
    finally:
        for name in names:
            (folder / f"{name}.tmp").unlink(missing_ok=True)


def write_tokens(path: Path, documents: list[Document], tokenizer: Tokenizer, dtype: str) -> dict[str, int]:
    """Write the tokens of documents to a file. Return how many, their bytes, the largest id and the CRC."""
    n_tokens = n_bytes = max_token = crc = 0
    with open(path, "wb") as f:
        for text, ids in tokenize(documents, tokenizer):
            content = np.array(ids, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
            f.write(content)
            crc = zlib.crc32(content, crc)
            n_tokens += len(ids)
            n_bytes += len(text.encode())
            max_token = max(max_token, max(ids, default=0))
    return {"tokens": n_tokens, "bytes": n_bytes, "max_token": max_token, "crc32": crc}


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

    A file is FILE.json (a tokenizer's dict, or a dataset's meta.json) or a model, as in `load_model`.
    UserError if it has no tokenizer, ImportError if the tokenizer needs a missing extra.
    """
    return open_tokenizer_and_window(spec, texts)[0]


def open_tokenizer_and_window(spec: str, texts: Iterable[str] = ()) -> tuple[Tokenizer, int]:
    """Return `open_tokenizer`'s, and how many tokens a row may have for the model that the file is from."""
    if spec == "stdlib":
        merges = (FOLDER / "stdlib" / "merges.txt").read_text("utf-8")
        return Tokenizer.from_merges(spec, merges), MAX_ROW
    path = Path(spec).expanduser()
    if path.suffix not in (".json", ".pt"):
        if not (spec.startswith(("hf:", "gguf:")) or path.suffix == ".gguf" or path.is_dir()):
            return Tokenizer.from_spec(spec, texts), MAX_ROW
        from sologpt.load import find_checkpoint, find_source  # imports torch

        kind, name = find_source(spec)
        if kind:
            # On the meta device, weights take no memory, and those of safetensors are not even read
            model, tokenizer = importlib.import_module(f"sologpt.{kind}").load(name, device="meta")
            return tokenizer, min(MAX_ROW, model.config.sequence_len)
        path = find_checkpoint(path)
    try:
        if path.suffix == ".pt":
            from sologpt.load import make_config, read_checkpoint

            content = read_checkpoint(path)
            config = make_config(content.get("config", {"sequence_len": MAX_ROW}))
            window = min(MAX_ROW, config.sequence_len)
        else:
            content = json.loads(path.read_bytes())
            window = int(content.get("sequence_len", MAX_ROW))
        tokenizer = Tokenizer.from_dict(content.get("tokenizer", content))
        tokenizer.eot  # noqa: B018  KeyError if no <|endoftext|> can separate documents
        return tokenizer, window
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
# Conversations


def write_conversations(
    folder: Path, train: list[Example], val: list[Example], spec: str, sequence_len: int | None
) -> None:
    """Write the rows of conversations into folder, as `write` does, and print one row and the counts.

    A row has at most sequence_len tokens; None: what the tokenizer's model has room for, or MAX_ROW.
    UserError if a conversation does not fit the chat template, or a split is without rows.
    """
    texts = (message["content"] for example in train for message in example.messages)
    tokenizer, window = open_tokenizer_and_window(spec, texts)
    tokenizer = tokenizer.with_chat_template()
    sequence_len = sequence_len or window
    warn_of_another_tokenizer(folder, tokenizer)
    meta = first_meta(tokenizer) | {"sequence_len": sequence_len}
    lines = []
    with replacing_dataset(folder, ROW_FILES):
        for name, part in (("train", train), ("val", val)):
            examples = encode_examples(tokenizer, part, sequence_len)
            counts = write_rows(folder, name, examples, tokenizer, meta["dtype"])
            lines.append(describe(folder, name, part, counts))
            if not counts["rows"]:
                raise UserError(f"no conversation is left. {lines[-1]}")
            # The token that ends a turn ends each row, and must end an answer
            tokenizer = tokenizer.with_eos_tokens(int(row.ids[-1]) for x in part for row in x.rows)
            del counts["longest"]
            meta |= {f"{name}_{key}": count for key, count in counts.items()}
        meta["tokenizer"] = tokenizer.to_dict()
        (folder / "meta.json.tmp").write_text(json.dumps(meta))
    show(tokenizer, next(row for example in train for row in example.rows))
    print(*lines, sep="\n")


def write_rows(
    folder: Path, name: str, examples: Iterable[Example], tokenizer: Tokenizer, dtype: str
) -> dict[str, int]:
    """Write the rows of a split. Return how many rows, tokens, trained tokens and their bytes, and more."""
    special = set(tokenizer.special_ids.values())
    n_bytes = {i: 0 if i in special else len(tokenizer.token_bytes(i)) for i in tokenizer.ids}
    counts = dict.fromkeys(("rows", "tokens", "trained", "bytes", "max_token", "crc32", "longest"), 0)
    starts = [0]
    with (
        open(folder / f"{name}.bin.tmp", "wb") as ids_file,
        open(folder / f"{name}_trained.bin.tmp", "wb") as trained_file,
    ):
        for row in (row for example in examples for row in example.rows):
            content = row.ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            ids_file.write(content)
            trained_file.write(row.trained.astype(np.uint8).tobytes())
            trained = row.ids[row.trained].tolist()
            starts.append(starts[-1] + len(row.ids))
            counts["trained"] += len(trained)
            counts["bytes"] += sum(n_bytes[i] for i in trained)
            counts["max_token"] = max(counts["max_token"], int(row.ids.max()))
            counts["crc32"] = zlib.crc32(content, counts["crc32"])
            counts["longest"] = max(counts["longest"], len(row.ids))
    (folder / f"{name}_rows.bin.tmp").write_bytes(np.array(starts, dtype="<i8").tobytes())
    return counts | {"rows": len(starts) - 1, "tokens": starts[-1]}


def describe(folder: Path, name: str, examples: list[Example], counts: dict[str, int]) -> str:
    """Return the line of a split: what is in it, and what was cut or dropped."""
    lost = {
        "cut to their last turns": sum(example.shortened for example in examples),
        "dropped as too long": sum(example.too_long for example in examples),
        "dropped without a trained token": sum(example.untrained for example in examples),
    }
    losses = [f"{n:,} {what}" for what, n in lost.items() if n]
    return (
        f"{folder.name}/{name}.bin: {plural(len(examples), 'conversation')}, "
        f"{plural(counts['rows'], 'row')}, "
        f"{counts['tokens']:,} tokens, {counts['trained']:,} trained, the longest row {counts['longest']:,}"
        + "".join(f"; {loss}" for loss in losses)
    )


def show(tokenizer: Tokenizer, row: Row) -> None:
    """Print a row as the model sees it: its trained tokens in green, or between [[ and ]]."""
    in_color = sys.stdout.isatty()
    begin, end = ("\x1b[32m", "\x1b[0m") if in_color else ("[[", "]]")
    print(f"one row; trained tokens are {'green' if in_color else 'between [[ and ]]'}:\n")
    decoder = tokenizer.decoder()
    text = ""
    before = False
    for i, trained in zip(row.ids.tolist(), row.trained.tolist(), strict=True):
        if trained != before:
            text += begin if trained else end
        # An escape sequence of a conversation must not reach the terminal
        text += "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoder.decode(i))
        before = trained
    print(text + decoder.flush() + (end if before else ""), end="\n\n")


# -----------------------------------------------------------------------------
# The command line of a prepare.py


Documents = Callable[[str | None], list[Document]]  # from the value of --input, or None


class Parser(argparse.ArgumentParser):
    """The flag --out_dir, and others that several have. An error is a UserError."""

    def __init__(self, folder: Path, about: str) -> None:
        super().__init__(f"python {sys.argv[0]}", description=about)
        self.add_argument(
            "--out_dir",
            type=Path,
            default=folder,
            metavar="FOLDER",
            help="Write the dataset (train.bin, val.bin, meta.json, ...) here. Default: prepare.py's folder.",
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def add_tokenizer(self) -> None:
        self.add_argument(
            "--tokenizer",
            default="bytes",
            metavar="NAME",
            help="Tokenize by bytes, stdlib (a BPE trained on Python's standard library), bpe:N (a BPE of N "
            "ids, trained on this text), a tiktoken encoding such as gpt2, or by the tokenizer of a model (a "
            "checkpoint, a run's folder, hf:NAME, gguf:FILE) or of FILE.json (a meta.json). Default: "
            "%(default)s.",
        )

    def add_val_fraction(self, default: float) -> None:
        self.add_argument(
            "--val_fraction",
            type=fraction,
            default=default,
            metavar="X",
            help="Hold out this fraction of the text for validation. Default: %(default)s.",
        )

    def add_sequence_len(self) -> None:
        self.add_argument(
            "--sequence_len",
            type=row_length,
            metavar="N",
            help=f"The most tokens in a row. Default: {MAX_ROW}, or the window of --tokenizer=FILE's model.",
        )


def row_length(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, not {text}")
    return int(text)


def fraction(text: str) -> float:
    if not 0 < float(text) <= 0.5:
        raise argparse.ArgumentTypeError(f"must be in (0, 0.5], not {text}")
    return float(text)


def main(folder: Path, documents: Documents, val_fraction: float, about: str) -> NoReturn:
    """Run a whole prepare.py, and exit."""
    errors.run(lambda: prepare(folder, documents, val_fraction, about))


def prepare(folder: Path, documents: Documents, val_fraction: float, about: str) -> None:
    """Write a dataset as the command line says."""
    parser = Parser(folder, about)
    parser.add_argument("--input", metavar="PATH", help="Read the text from this file or folder.")
    parser.add_tokenizer()
    parser.add_val_fraction(val_fraction)
    args = parser.parse_args()
    write(args.out_dir, documents(args.input), args.tokenizer, args.val_fraction)

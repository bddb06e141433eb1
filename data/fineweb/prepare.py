"""FineWeb, web text as 10 billion GPT-2 tokens: --shards of 100 million tokens each, 200 MB per download.

Needs the extra 'hf'. Stop it at any time: the same command continues after the last complete shard. For a
mirror of the Hugging Face Hub, set the environment variable HF_ENDPOINT.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

from sologpt import errors
from sologpt.errors import RunError, UserError
from sologpt.tokenizer import Tokenizer

REPO = "kjj0/fineweb10B-gpt2"  # a dataset on the Hugging Face Hub
VAL = "fineweb_val_000000.bin"
TRAIN = [f"fineweb_train_{i:06}.bin" for i in range(1, 104)]
HEADER = 1024  # bytes, as int32: MAGIC, VERSION, the number of tokens, zeros; then the tokens as uint16
MAGIC, VERSION = 20240520, 1
FOLDER = Path(__file__).resolve().parent


def prepare(folder: Path, shards: int, spec: str) -> None:
    """Extend the dataset in folder to the validation shard and at least `shards` training shards."""
    try:
        tokenizer = common.open_tokenizer(spec)
    except RunError as e:
        hint = "use --tokenizer=FILE with the GPT-2 tokenizer"
        raise RunError(f"tokenizer {spec!r} cannot be downloaded: {hint}") from e
    token_bytes = bytes_per_id(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    downloads = folder / "shards.tmp"
    with common.write_errors(folder):
        meta = open_meta(folder, tokenizer)
        if missing := [name for name in (VAL, *TRAIN[:shards]) if name not in meta["shards"]]:
            checksums = fetch_checksums(missing)
            for name in missing:
                shard = download(name, downloads)
                verify(shard, checksums.get(name))
                append(shard, folder, meta, token_bytes)
                shutil.rmtree(downloads)
    shutil.rmtree(downloads, ignore_errors=True)  # left behind by a kill right after the last append
    for split in common.SPLITS:
        print(f"{folder / split}.bin: {meta[f'{split}_tokens']:,} tokens of {tokenizer.name}")


def bytes_per_id(tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of bytes of each token id, (2^16,) int: 0 for <|endoftext|>, -1 for an unknown id."""
    sizes = np.full(2**16, -1)
    for i in {*range(2**16)}.difference(tokenizer.gaps(2**16)):
        sizes[i] = 0 if i == tokenizer.eot else len(tokenizer.token_bytes(i))
    return sizes


# -----------------------------------------------------------------------------
# Downloading


def fetch_checksums(names: list[str]) -> dict[str, str]:
    """Return the SHA-256 of each shard, from the Hub: hf_hub_download checks only a file's size."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile
    except ImportError as e:
        raise ImportError("the fineweb dataset needs the extra 'hf': pip install huggingface_hub") from e
    try:
        files = HfApi().get_paths_info(REPO, names, repo_type="dataset")
    except Exception as e:  # the library raises its own classes, httpx's and OSError
        raise download_error("the list of files", e) from e
    return {file.path: file.lfs.sha256 for file in files if isinstance(file, RepoFile) and file.lfs}


def download(name: str, folder: Path) -> Path:
    """Download one shard from the Hub, unless it is in folder already."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # retries are not logged: a failure is one line
    try:
        return Path(hf_hub_download(REPO, name, repo_type="dataset", local_dir=folder))
    except Exception as e:
        if isinstance(e, OSError) and isinstance(e.errno, int):  # of the file system, such as a full disk
            raise
        raise download_error(name, e) from e


def verify(shard: Path, sha256: str | None) -> None:
    """Raise RunError if a shard is damaged. It is removed first, so that the next run downloads it again."""
    with open(shard, "rb") as f:
        header = f.read(HEADER)
        f.seek(0)
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    magic, version, tokens = np.frombuffer(header[:12].ljust(12, b"\0"), "<i4").tolist()
    size = shard.stat().st_size
    if (magic, version) != (MAGIC, VERSION):
        damage = f"is not a token shard: it begins with {header[:8]!r}"
    elif size != HEADER + 2 * tokens:
        damage = f"has {size:,} bytes, but its header says {tokens:,} tokens"
    elif sha256 not in (None, digest):
        damage = "has the wrong SHA-256 checksum: run the same command to download it again"
    else:
        return
    shard.unlink()
    raise RunError(f"{shard.name} {damage}")


def download_error(what: str, error: Exception) -> RunError:
    from huggingface_hub import constants

    cause = error.__cause__ or error
    reason = str(cause).partition("\n")[0] or type(cause).__name__
    return RunError(
        f"cannot download {what} from {constants.ENDPOINT}/datasets/{REPO}: {reason}; "
        "the same command continues after the last complete shard"
    )


# -----------------------------------------------------------------------------
# Appending


def open_meta(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Read meta.json, which lists the shards already in train.bin and val.bin, or create it."""
    path = folder / "meta.json"
    counts = {f"{split}_{key}": 0 for split in common.SPLITS for key in ("tokens", "bytes", "max_token")}
    if not path.exists():
        if found := [str(file) for file in (folder / "train.bin", folder / "val.bin") if file.exists()]:
            hint = "remove them to start over"
            raise UserError(f"{folder} has no meta.json for its {' and '.join(found)}: {hint}")
        meta = {"tokenizer": tokenizer.to_dict(), "dtype": "uint16", **counts, "shards": []}
        save_meta(folder, meta)
        return meta
    content = path.read_bytes()
    try:
        meta = json.loads(content)
        meta |= {"shards": [*meta["shards"]], **{key: int(meta[key]) for key in counts}}
        same = meta["tokenizer"] == tokenizer.to_dict()
    except Exception as e:  # a damaged file can raise anything
        hint = "use another --out_dir, or remove it"
        raise UserError(f"{path} belongs to another dataset, or is damaged: {hint}") from e
    if not same:
        hint = f"--tokenizer={path} continues with that one"
        raise UserError(f"{folder} was prepared with another tokenizer: {hint}")
    return meta


def save_meta(folder: Path, meta: dict[str, Any]) -> None:
    (folder / "meta.json.tmp").write_text(json.dumps(meta))
    os.replace(folder / "meta.json.tmp", folder / "meta.json")


def append(shard: Path, folder: Path, meta: dict[str, Any], token_bytes: np.ndarray) -> None:
    """Append the tokens of a shard to its split. They belong to the dataset once meta.json is saved.

    If this fails, the split is truncated to the length in meta.json, now or in the next run.
    """
    split = "val" if shard.name == VAL else "train"
    path = folder / f"{split}.bin"
    size = 2 * meta[f"{split}_tokens"]
    path.touch()
    if path.stat().st_size < size:
        raise UserError(f"{path} is shorter than {folder / 'meta.json'} says: remove both to start over")
    os.truncate(path, size)
    try:
        counts = copy(shard, path)
        if len(unknown := np.flatnonzero((counts > 0) & (token_bytes < 0))):
            what = f"token id {unknown[0]}, not in the vocabulary of --tokenizer"
            raise UserError(f"{shard.name} has {what}: use gpt2")
    except BaseException:
        os.truncate(path, size)
        raise
    meta[f"{split}_tokens"] += int(counts.sum())
    meta[f"{split}_bytes"] += int(counts @ token_bytes)
    meta[f"{split}_max_token"] = max(meta[f"{split}_max_token"], int(np.flatnonzero(counts).max(initial=0)))
    meta["shards"].append(shard.name)
    save_meta(folder, meta)


def copy(shard: Path, path: Path) -> np.ndarray:
    """Append the tokens of a shard to path. Return how often each id occurs, (2^16,)."""
    counts = np.zeros(2**16, dtype=np.int64)
    with open(shard, "rb") as source, open(path, "ab") as f:
        source.seek(HEADER)
        while chunk := source.read(common.CHUNK):
            counts += np.bincount(np.frombuffer(chunk, "<u2"), minlength=2**16)
            f.write(chunk)
        f.flush()
        os.fsync(f.fileno())
    return counts


def main() -> None:
    parser = common.Parser(FOLDER, __doc__)
    parser.add_argument(
        "--shards",
        type=int,
        default=1,
        metavar="N",
        help=f"Download training shards until there are this many, 1 to {len(TRAIN)}. Default: %(default)s.",
    )
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="Take GPT-2's tokenizer from gpt2 (a download), FILE.json or FILE.pt. Default: %(default)s.",
    )
    args = parser.parse_args()
    if not 1 <= args.shards <= len(TRAIN):
        raise UserError(f"--shards must be from 1 to {len(TRAIN)}, not {args.shards}")
    prepare(args.out_dir, args.shards, args.tokenizer)


if __name__ == "__main__":
    errors.run(main)

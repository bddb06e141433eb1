"""FineWeb, text of the web, as 10 billion tokens of GPT-2: --shards of 100 million each, downloads of 200 MB.

A shard belongs to the dataset once it is whole: stop this at any time, and the same command goes on from there.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from download import download

from sologpt.tokenizer import Tokenizer

URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
VAL = "fineweb_val_000000.bin"
TRAIN = [f"fineweb_train_{i:06}.bin" for i in range(1, 104)]
HEADER = 1024  # bytes: int32, of which the first three say MAGIC, VERSION and how many uint16 tokens come after it
MAGIC, VERSION = 20240520, 1
FOLDER = Path(__file__).resolve().parent


def prepare(folder: Path, url: str, shards: int, spec: str) -> None:
    """Bring the dataset in folder to the shard for validation and at least so many for training."""
    try:
        tokenizer = common.open_tokenizer(spec)
    except OSError as e:
        raise OSError(f"tokenizer {spec!r} cannot be downloaded, so nothing else was: say --tokenizer=FILE") from e
    sizes = text_sizes(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    meta = open_meta(folder, tokenizer)
    for name in [VAL, *TRAIN[:shards]]:
        shard = folder / name
        if name not in meta["shards"]:
            download(f"{url.rstrip('/')}/{name}", shard, check=partial(check, name, sizes))
            append(shard, folder, meta, sizes)
        shard.unlink(missing_ok=True)
    for split in common.SPLITS:
        print(f"{folder / split}.bin: {meta[f'{split}_tokens']:,} tokens of {tokenizer.name}")


def text_sizes(tokenizer: Tokenizer) -> np.ndarray:
    """The bytes of text that each id stands for, (2^16,): none for <|endoftext|>, and -1 if there is no such id."""
    sizes = np.full(2**16, -1)
    for i in {*range(2**16)}.difference(tokenizer.gaps(2**16)):
        sizes[i] = 0 if i == tokenizer.eot else len(tokenizer.token_bytes(i))
    return sizes


def open_meta(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What meta.json says of the shards that are in train.bin and val.bin already; begun, if there is none."""
    path = folder / "meta.json"
    empty = {f"{split}_{what}": 0 for split in common.SPLITS for what in ("tokens", "bytes", "max_token")}
    if not path.exists():
        if found := [str(file) for file in (folder / "train.bin", folder / "val.bin") if file.exists()]:
            raise ValueError(f"no meta.json says what is in {' and '.join(found)}: remove it to start anew")
        meta = {"tokenizer": tokenizer.to_dict(), "dtype": "uint16", **empty, "shards": []}
        save_meta(folder, meta)
        return meta
    content = path.read_bytes()
    try:
        meta = json.loads(content)
        meta |= {"shards": [*meta["shards"]], **{key: int(meta[key]) for key in empty}}
        same = meta["tokenizer"] == tokenizer.to_dict()
    except Exception as e:  # a damaged file can fail in any way
        raise ValueError(f"{path} is of another dataset, or damaged: say another --out_dir, or remove it") from e
    if not same:
        raise ValueError(f"{folder} has shards already, with another tokenizer: --tokenizer={path} goes on with that")
    return meta


def save_meta(folder: Path, meta: dict[str, Any]) -> None:
    (folder / "meta.json.tmp").write_text(json.dumps(meta))
    os.replace(folder / "meta.json.tmp", folder / "meta.json")


def append(shard: Path, folder: Path, meta: dict[str, Any], sizes: np.ndarray) -> None:
    """Copy the tokens of a shard to the end of its split, and enter them into meta.json: only then do they count."""
    split = "val" if shard.name == VAL else "train"
    path, size = folder / f"{split}.bin", 2 * meta[f"{split}_tokens"]
    path.touch()
    if path.stat().st_size < size:
        raise ValueError(f"{path} is shorter than {folder / 'meta.json'} says: remove both to start anew")
    os.truncate(path, size)  # what is past it was being copied when the process was killed
    try:
        counts = copy(shard, path, sizes)
    except BaseException:
        os.truncate(path, size)
        raise
    meta[f"{split}_tokens"] += int(counts.sum())
    meta[f"{split}_bytes"] += int(counts @ sizes)
    meta[f"{split}_max_token"] = max(meta[f"{split}_max_token"], int(np.flatnonzero(counts).max(initial=0)))
    meta["shards"].append(shard.name)
    save_meta(folder, meta)


def copy(shard: Path, path: Path, sizes: np.ndarray) -> np.ndarray:
    """Append the tokens of a shard to path; returns how often each id comes, (2^16,)."""
    counts = np.zeros(2**16, dtype=np.int64)
    with open(shard, "rb") as source, open(path, "ab") as f:
        try:
            check(shard.name, sizes, source.read(HEADER), shard.stat().st_size)
        except OSError:
            shard.unlink()  # the next attempt fetches it anew
            raise
        while piece := source.read(common.PIECE):
            counts += np.bincount(np.frombuffer(piece, "<u2"), minlength=2**16)
            f.write(piece)
        f.flush()
        os.fsync(f.fileno())
    check_ids(shard.name, np.flatnonzero(counts), sizes)
    return counts


def check(name: str, sizes: np.ndarray, head: bytes, size: int | None) -> None:
    """OSError if a file of this head and size is no shard, ValueError if its ids are another tokenizer's."""
    magic, version, tokens = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise OSError(f"{name} is no shard of tokens: it begins with {head[:8]!r}")
    if size not in (None, HEADER + 2 * tokens):
        raise OSError(f"{name} has {size:,} bytes, but its header says {tokens:,} tokens, which are not as many")
    check_ids(name, np.frombuffer(head[HEADER : len(head) // 2 * 2], "<u2"), sizes)


def check_ids(name: str, ids: np.ndarray, sizes: np.ndarray) -> None:
    if len(unknown := ids[sizes[ids] < 0]):
        raise ValueError(f"{name} has token id {unknown[0]}, which is none of --tokenizer's: the shards are gpt2's")


def main() -> None:
    parser = common.make_parser(FOLDER, __doc__)
    parser.add_argument("--shards", type=int, default=1, help=f"of 100 million tokens to train on, up to {len(TRAIN)}")
    parser.add_argument("--url", default=URL, help="the address of the folder of shards, say of a mirror")
    parser.add_argument("--tokenizer", default="gpt2", help="the one of the shards; FILE.json or FILE.pt has it too")
    args = parser.parse_args()
    if not 1 <= args.shards <= len(TRAIN):
        common.fail(2, f"--shards must be from 1 to {len(TRAIN)}, not {args.shards}")
    common.run(args.out_dir, lambda: prepare(args.out_dir, args.url, args.shards, args.tokenizer))


if __name__ == "__main__":
    main()

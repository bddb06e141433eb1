"""Your own text: --input FILE, or --input FOLDER with one document per file."""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

from sologpt.errors import UserError

CHATS = ("messages", "conversations", "instruction", "completion")  # a key of a record for data/chat


def documents(path: str | None) -> list[common.Document]:
    """Return one document per file, sorted by path. Skip hidden, empty and binary files, and count all."""
    if path is None:
        raise UserError("--input is missing: python data/text/prepare.py --input FILE_OR_FOLDER")
    root = Path(path)
    if not root.exists():
        raise UserError(f"--input={path} does not exist")
    if root.is_file():
        if holds_conversations(root):
            raise UserError(f"{root} holds conversations: python data/chat/prepare.py --input {root}")
        return [common.Document(root)]
    taken = []
    counts: dict[str, Counter] = {"taken": Counter(), "skipped": Counter()}
    for file in sorted(file for file in root.rglob("*") if file.is_file()):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        why = "hidden" if hidden else reason_to_skip(file)
        kind = file.suffix or "without a suffix"
        counts["skipped" if why else "taken"][f"{kind} ({why})" if why else kind] += 1
        if not why:
            taken.append(common.Document(file))
    for what, kinds in counts.items():
        if kinds:
            print(f"{what}: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common()))
    return taken


def reason_to_skip(path: Path) -> str:
    """Say why a file is no text; "" if it is. Whether it is UTF-8 shows when it is read."""
    with open(path, "rb") as f:
        start = f.read(8192)
    is_binary = b"\0" in start and not start.startswith(common.UTF16)
    return "binary" if is_binary else "" if start else "empty"


def holds_conversations(path: Path) -> bool:
    """Whether a file begins as JSON Lines, or as a JSON array, of records for data/chat."""
    if path.suffix not in (".json", ".jsonl"):
        return False
    with open(path, "rb") as f:
        line = f.readline(common.CHUNK)
    try:
        records = json.loads(line) if path.suffix == ".jsonl" else json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    first = records[0] if isinstance(records, list) and records else records
    return isinstance(first, dict) and any(key in first for key in CHATS)


if __name__ == "__main__":
    common.main(Path(__file__).resolve().parent, documents, 0.1, __doc__)

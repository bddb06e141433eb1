"""Your own text: --input FILE, or --input FOLDER with one document per file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

from sologpt.errors import UserError


def documents(path: str | None) -> list[common.Document]:
    """Return one document per file, sorted by path, without hidden files and folders."""
    if path is None:
        raise UserError("--input is missing: python data/text/prepare.py --input FILE_OR_FOLDER")
    root = Path(path)
    if not root.exists():
        raise UserError(f"--input={path} does not exist")
    if root.is_file():
        return [common.Document(root)]
    files = [f for f in sorted(root.rglob("*")) if f.is_file()]
    hidden = {f for f in files if any(part.startswith(".") for part in f.relative_to(root).parts)}
    return [common.Document(f) for f in files if f not in hidden]


if __name__ == "__main__":
    common.main(Path(__file__).resolve().parent, documents, 0.1, __doc__)

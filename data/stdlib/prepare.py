"""The source of the Python standard library that runs this script: real text, already on every machine."""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

from sologpt.errors import UserError

SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIP |= {"encodings", "pydoc_data"}  # tables of characters, generated help
VAL_FRACTION = 0.05


def documents(path: str | None) -> list[common.Document]:
    """Return one document per module, sorted by path."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    modules = [m for m in sorted(root.rglob("*.py")) if not SKIP.intersection(m.relative_to(root).parts)]
    if not modules:
        raise UserError(f"no Python source in {root}")
    return [common.Document(m, errors="replace") for m in modules]


if __name__ == "__main__":
    common.main(Path(__file__).resolve().parent, documents, VAL_FRACTION, __doc__)

"""The source of the Python standard library that runs this script: real text, already on every machine."""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# Left out: tests, character tables, generated help, installed packages
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
VAL_FRACTION = 0.05


def documents(path: str | None) -> list[common.Document]:
    """One document per module, sorted by path."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    modules = [m for m in sorted(root.rglob("*.py")) if not SKIP.intersection(m.relative_to(root).parts)]
    if not modules:
        raise ValueError(f"no Python source in {root}")
    return [common.Document(m, errors="replace") for m in modules]


if __name__ == "__main__":
    common.main(Path(__file__).resolve().parent, documents, VAL_FRACTION, __doc__)

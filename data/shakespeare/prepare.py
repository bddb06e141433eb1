"""Tiny Shakespeare: 1.1 MB of his plays, downloaded once, or read from --input FILE."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from download import download

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FOLDER = Path(__file__).resolve().parent


def documents(path: str | None) -> list[common.Document]:
    try:
        return [common.Document(Path(path) if path else download(URL, FOLDER / "input.txt", SHA256))]
    except OSError as e:
        raise OSError(f"{e}; with the file at hand, say --input FILE") from e


if __name__ == "__main__":
    common.main(FOLDER, documents, 0.1, __doc__)

"""Tiny Shakespeare: 1.1 MB of his plays, downloaded once, or read from --input FILE."""

import hashlib
import http.client
import os
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

from sologpt.errors import RunError

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FOLDER = Path(__file__).resolve().parent
ATTEMPTS = 3


def documents(path: str | None) -> list[common.Document]:
    return [common.Document(Path(path) if path else download(FOLDER / "input.txt"))]


def download(path: Path) -> Path:
    """Download URL to path, unless it is there already. RunError if that fails ATTEMPTS times."""
    if path.exists() and is_intact(path.read_bytes()):
        return path
    for seconds in range(ATTEMPTS):
        time.sleep(seconds)
        try:
            with urllib.request.urlopen(URL, timeout=10) as response:
                content = response.read()
            if is_intact(content):
                break
            reason = "the SHA-256 checksum is wrong"
        except (OSError, http.client.HTTPException) as e:
            reason = str(getattr(e, "reason", e))
    else:
        raise RunError(f"cannot download {URL}: {reason}; if you have the file, use --input FILE")
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path


def is_intact(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256


if __name__ == "__main__":
    common.main(FOLDER, documents, 0.1, __doc__)

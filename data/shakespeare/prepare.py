"""Tiny Shakespeare: 1.1 MB of his plays, downloaded once, or read from --input FILE."""

import hashlib
import http.client
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FOLDER = Path(__file__).resolve().parent


def documents(path: str | None) -> list[str]:
    return [common.read_text(Path(path) if path else download(URL, FOLDER / "input.txt"))]


def download(url: str, path: Path, attempts: int = 3) -> Path:
    """Fetch url into path unless it is there; it counts as there only with the right checksum. OSError if it fails."""
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
        return path
    for attempt in range(attempts):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() != SHA256:
                raise OSError("the checksum is wrong")
            break
        except (OSError, http.client.HTTPException) as e:  # URLError is an OSError
            reason = e
            if attempt + 1 < attempts:
                time.sleep(2**attempt)
    else:
        raise OSError(f"cannot download {url} ({reason}); with the file at hand, say --input FILE")
    path.write_bytes(content)
    return path


if __name__ == "__main__":
    common.main(FOLDER, documents, 0.1, __doc__)

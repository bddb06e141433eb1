"""A file from the web: fetched in pieces, resumed where it was left, tried again, checked."""

import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK = 2**16  # bytes that are received at a time
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # HTTP status codes that the next attempt may not meet
Check = Callable[[bytes, int | None], None]


class Dropped(Exception):
    """The connection or the server failed in a way that may pass."""

    def __init__(self, reason: str, wait: int | None = None) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds, if the server asks for some


def download(url: str, path: Path, sha256: str | None = None, check: Check | None = None, attempts: int = 5) -> Path:
    """Fetch url into path, unless it is there. OSError when so many attempts have ended without anything new.

    What has come stays in path.part, whatever happens, and the next attempt or call goes on from there. The checksum is
    sha256, else the one that the server gives, if any. `check(head, size)` sees the first bytes, and the size of the
    file if the server says it, before the rest is fetched: it raises if this is the wrong file.
    """
    if path.exists() and sha256 in (None, digest(path)):
        return path
    part = path.with_name(f"{path.name}.part")
    most = failures = 0  # bytes that were there at most; attempts that have ended there
    while True:
        try:
            checksum = fetch(url, part, check)
            if (sha256 or checksum) not in (None, digest(part)):
                part.unlink()
                raise Dropped("the checksum is wrong")
            os.replace(part, path)
            return path
        except Dropped as e:
            size = part.stat().st_size if part.exists() else 0
            failures = 1 if size > most else failures + 1
            most = max(size, most)
            if failures == attempts:
                kept = "; what has come is kept: the same command goes on from there" if size else ""
                raise OSError(f"cannot download {url}: {e}{kept}") from e
            wait = 2 ** (failures - 1) if e.wait is None else e.wait
            print(f"{path.name}: {e}; trying again in {wait} s", flush=True)
            time.sleep(wait)


def fetch(url: str, part: Path, check: Check | None) -> str | None:
    """One attempt to add to part what it lacks of url; returns the SHA-256 that the server gives, if any."""
    # The last byte is fetched again: a part that is whole is then no case of its own
    start = max(part.stat().st_size - 1, 0) if part.exists() else 0
    redirects = Redirects()
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=30)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # there is less than this: it is part of another file
            part.unlink()
        elif e.code not in TRANSIENT:
            raise OSError(f"cannot download {url}: HTTP {e.code} {e.reason}") from e
        wait = e.headers.get("Retry-After", "")
        raise Dropped(f"HTTP {e.code} {e.reason}", min(int(wait), 300) if wait.isdecimal() else None) from e
    except (OSError, http.client.HTTPException) as e:
        raise Dropped(str(getattr(e, "reason", e))) from e
    with response:
        if response.status != 206:  # the server sends all of it
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise Dropped("the server sent another range than it was asked for")
        length = response.headers.get("Content-Length", "")
        size, total = start, start + int(length) if length.isdecimal() else None
        chunk = receive(response)
        if check and not start:
            if total and len(chunk) < min(CHUNK, total):
                raise Dropped(f"the connection ended at byte {len(chunk):,} of {total:,}")
            check(chunk, total)
        progress = Progress(part.stem, start, total)
        try:
            with open(part, "r+b" if start else "wb") as f:
                f.seek(start)
                while chunk:
                    f.write(chunk)
                    size += len(chunk)
                    progress.show(size)
                    chunk = receive(response)
        finally:
            progress.show(size, last=True)
        if total and size < total:
            raise Dropped(f"the connection ended at byte {size:,} of {total:,}")
        checksum = response.headers.get("X-Linked-ETag", redirects.etag).strip('"')
    return checksum if re.fullmatch("[0-9a-f]{64}", checksum) else None


def receive(response: Any) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as e:
        raise Dropped(f"the connection failed: {e}") from e


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps what Hugging Face says in the first of them: the SHA-256 of a large file."""

    etag = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.etag = headers.get("X-Linked-ETag", self.etag)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Progress:
    """A line about a download: in place on a terminal, else one every ten seconds."""

    def __init__(self, name: str, start: int, total: int | None) -> None:
        self.name, self.start, self.total = name, start, total
        self.started = self.shown = time.monotonic()

    def show(self, size: int, last: bool = False) -> None:
        now, in_place = time.monotonic(), sys.stdout.isatty()
        if now - self.shown < (0.2 if in_place else 10) and not last:
            return
        self.shown = now
        of = f"of {self.total / 1e6:,.1f} " if self.total else ""
        rate = (size - self.start) / max(now - self.started, 1e-3)
        line = f"{self.name}: {size / 1e6:,.1f} {of}MB, {rate / 1e6:,.1f} MB/s"
        print(f"\r\x1b[K{line}" if in_place else line, end="" if in_place and not last else "\n", flush=True)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

"""How a script ends: with one line for a mistake of the user or a failure of the run, else with a traceback.

    if __name__ == "__main__":
        errors.run(main)

Libraries raise `UserError` and `RunError` where they find the mistake, and `run` catches them, once.
"""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn


class UserError(ValueError):
    """A mistake of the user: what, where, what to do. Exit status 2."""


class RunError(RuntimeError):
    """A failure of the run: disk full, loss not finite, damaged checkpoint. Exit status 1."""


KNOWN_FAILURES = {  # pattern in a message of Python, PyTorch or gpt.py: the line to print
    "MemoryError|out of memory|can't allocate memory": "out of memory: try {less}",
    "No working C\\+\\+ compiler": "--compile needs a C++ compiler, such as g++, and none was found",
    "logits are not finite": "the logits are not finite: weights are damaged, or too large for their dtype",
}
FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}  # of the machine, not of the user


class Notes(io.FileIO):
    """Standard error. What it does not take is lost, which is no reason to lose the output, too."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            super().write(data)
        return len(data)


def run(main: Callable[[], None], less: str = "a smaller model") -> NoReturn:
    """Call a script's main and exit. less: what to try when memory runs out."""
    try:
        open_streams()
        try:
            main()
        finally:
            flush_output()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has exited (`| head`)
        sys.exit(141)  # 128 + SIGPIPE, a signal that Windows does not have
    except Exception as e:
        message, status = describe(e, less)
        if not status:
            raise
        # still one line if the name of a file has a line break
        print("error:", "".join(c if c.isprintable() else repr(c)[1:-1] for c in message), file=sys.stderr)
        sys.exit(status)
    sys.exit(0)


def open_streams() -> None:
    """Make a closed stdin empty, and stderr take everything. UserError if stdout is closed."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # else the next file would be descriptor 2, and C code would print its warnings into it
    os.close(fd)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stderr is sys.__stderr__:  # not in a notebook
        encoding = getattr(sys.stderr, "encoding", None)
        raw: Any = Notes(2, "w", closefd=False)
        sys.stderr = io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)
    if sys.stdout is None:
        raise UserError("standard output is closed: send it to a file, or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show is no error


def flush_output() -> None:
    """Flush stdout. If that fails, drop the rest: else Python would try again, and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def describe(e: Exception, less: str) -> tuple[str, int]:
    """Return the line for an exception and its exit status. Status 0 is a bug, which needs its traceback."""
    if isinstance(e, UserError | ImportError):
        return one_line(e), 2
    if isinstance(e, RunError):
        return one_line(e), 1
    if isinstance(e, OSError):
        failed = e.errno in FAILURES
        where = e.filename or ("standard output" if failed else None)  # `writing` names a file
        return f"{where}: {e.strerror}" if where and e.strerror else one_line(e), 1 if failed else 2
    for pattern, message in KNOWN_FAILURES.items():
        if isinstance(e, MemoryError | RuntimeError) and re.search(pattern, f"{type(e).__name__}: {e}"):
            return message.format(less=less), 1
    return "", 0


def one_line(e: Exception) -> str:
    return " ".join(str(e).split("\n"))


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Raise RunError if path cannot be written. On a full disk, torch.save may raise a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # what stopped PyTorch's C++ code
        reason = getattr(cause, "strerror", None) or one_line(e)
        raise RunError(f"cannot write {os.fspath(path)}: {reason}") from e


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of path when it is whole. RunError if it cannot be written."""
    temporary = f"{os.fspath(path)}.tmp"
    with writing(path):
        try:
            with open(temporary, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)  # it is still there if something failed

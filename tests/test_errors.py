"""How a script ends: one line and an exit status, or the traceback of a bug."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from sologpt import errors
from sologpt.errors import RunError, UserError

OUT_OF_MEMORY = "error: out of memory: try a smaller batch\n"


@pytest.mark.parametrize(
    "raised, status, line",
    [
        (UserError("what"), 2, "error: what\n"),
        (RunError("what"), 1, "error: what\n"),
        (RunError("two\nlines"), 1, "error: two lines\n"),
        (UserError("a\x1b[2Jb\rc"), 2, "error: a\\x1b[2Jb\\rc\n"),
        (ImportError("needs the extra 'hf'"), 2, "error: needs the extra 'hf'\n"),
        (FileNotFoundError("no best.pt in out"), 2, "error: no best.pt in out\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.pt"), 2, "error: a.pt: No such file\n"),
        (OSError(errno.ENOSPC, "No space left", "a.pt"), 1, "error: a.pt: No space left\n"),
        (OSError(errno.ENOSPC, "No space left"), 1, "error: standard output: No space left\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] can't allocate memory: 4 bytes"), 1, OUT_OF_MEMORY),
        (MemoryError(), 1, OUT_OF_MEMORY),
        (KeyboardInterrupt(), 130, ""),
        (None, 0, ""),
    ],
)
def test_exit_statuses(capsys, raised, status, line):
    def main():
        if raised:
            raise raised

    with pytest.raises(SystemExit) as e:
        errors.run(main, "a smaller batch")
    assert e.value.code == status and capsys.readouterr().err == line


FULL = f"error: standard output: {os.strerror(errno.ENOSPC)}\n"
CLOSED = "error: standard output is closed: send it to a file, or to /dev/null\n"


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "main, streams, status, out, err",
    [
        ("print('a' * 10**6)", "| true", 141, "", ""),
        ("print('a' * 10**6, flush=True); print('b')", "| true", 141, "", ""),
        ("print('a')", ">/dev/full", 1, "", FULL),
        ("print('a'); sys.exit(0)", ">/dev/full", 1, "", FULL),
        ("print('a', flush=True); print('b')", ">/dev/full", 1, "", FULL),
        ("raise errors.UserError('what')", ">/dev/full", 2, "", "error: what\n"),
        ("print('a')", ">&-", 2, "", CLOSED),
        ("print('note', file=sys.stderr); print('a')", "2>/dev/full", 0, "a\n", ""),
        ("print('note', file=sys.stderr); print('a')", "2>&-", 0, "a\n", ""),
        ("warnings.warn('note'); print('a')", "2>/dev/full", 0, "a\n", ""),
        ("raise errors.UserError('what')", "2>/dev/full", 2, "", ""),
        ("print('\\udcff\\u2028', file=sys.stderr)", "", 0, "", "\\udcff\u2028\n"),
        ("print([sys.stdin.read()])", "<&-", 0, "['']\n", ""),
        ("print([*sys.stdin])", "<&-", 0, "[]\n", ""),
        ("print(open('/dev/null').fileno() > 2)", "<&- 2>&-", 0, "True\n", ""),
    ],
)
def test_standard_streams_that_are_full_closed_or_without_a_reader(main, streams, status, out, err, buffered):
    code = f"import sys, warnings\nfrom sologpt import errors\ndef main(): {main}\nerrors.run(main)"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {streams}', sys.executable, code],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


@pytest.mark.parametrize("bug", [ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)):
        errors.run(main)


def test_mistakes_and_failures_stay_what_they_are_to_a_notebook():
    assert issubclass(UserError, ValueError) and issubclass(RunError, RuntimeError)


@pytest.mark.parametrize(
    "raised, line",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "cannot write out/ckpt.pt: No space left on device",
        ),
        (RuntimeError("unexpected pos 64"), "cannot write out/ckpt.pt: unexpected pos 64"),
    ],
)
def test_writing(raised, line):
    with pytest.raises(RunError) as e, errors.writing("out/ckpt.pt"):
        raise raised
    assert str(e.value) == line


def test_writing_says_what_stopped_torch_save():
    with pytest.raises(RunError, match=r"No space left on device$"), errors.writing("out/ckpt.pt"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64")


def test_writing_to_a_missing_folder(tmp_path):
    path = tmp_path / "none" / "x"
    reason = os.strerror(errno.ENOENT)
    with pytest.raises(RunError, match=f"cannot write {path}: {reason}"), errors.writing(path):
        path.write_text("x")

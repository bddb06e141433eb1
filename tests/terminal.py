"""A Python script in a pseudo-terminal."""

import os
import pty
import re
import select
import sys

from conftest import ROOT


class Terminal:
    """`python *args` in a terminal of its own. output: what it has shown since the last `wait_for`."""

    def __init__(self, *args, term: str = "dumb"):
        self.output = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, *map(str, args)], os.environ | {"TERM": term})

    def read(self) -> bool:
        """Wait for more output. Return whether more can come."""
        assert select.select([self.fd], [], [], 120)[0], self.output
        try:
            new = os.read(self.fd, 65536)
        except OSError:  # the script has ended
            new = b""
        self.output += new.decode("utf-8", "replace")
        return bool(new)

    def wait_for(self, pattern: str) -> str:
        """Return what is shown, up to the first match of pattern."""
        while not (match := re.search(pattern, self.output)):
            assert self.read(), f"no {pattern!r} in {self.output!r}"
        seen, self.output = self.output[: match.end()], self.output[match.end() :]
        return seen

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def status(self) -> int:
        """Wait for the end. Return the exit status, -N for signal N; output has the rest."""
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

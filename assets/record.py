"""Draw a terminal session as an SVG: python assets/record.py assets/terminal.json assets/terminal.svg

The JSON file is a list of [command, text typed at each prompt "> " ...]. The commands run in a
pseudo-terminal, one after the other, and the picture shows the final screen.
"""

import html
import json
import os
import pty
import re
import select
import sys
from pathlib import Path

COLUMNS = 114
LINE = 19  # height in pixels
CHARACTER = 8.4  # width in pixels
CONTROL = re.compile(r"\x1b\[\?\d+[hl]")  # bracketed paste on and off


def record(command: str, typed: list[str]) -> str:
    """Run a command in a pseudo-terminal and type at its prompts. Return its output."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": str(COLUMNS)}
        os.execlp("bash", "bash", "-c", command)
    output = ""
    seen = 0
    while True:
        if typed and output.endswith("> ") and len(output) > seen and not select.select([fd], [], [], 1)[0]:
            seen = len(output)
            os.write(fd, typed.pop(0).encode() + b"\r")
        try:
            new = os.read(fd, 65536)
        except OSError:  # the command has ended
            break
        output = CONTROL.sub("", output + new.decode(errors="replace"))
    os.waitpid(pid, 0)
    return output


def screen(output: str) -> list[str]:
    """Return the lines of the final screen: a carriage return overwrites, long lines wrap."""
    lines = []
    for line in output.replace("\r\n", "\n").removesuffix("\n").split("\n"):
        shown = line.rpartition("\x1b[K")[2].rpartition("\r")[2]
        lines += [shown[i : i + COLUMNS] for i in range(0, len(shown), COLUMNS)] or [""]
    return lines


def draw(lines: list[tuple[str, str]]) -> str:
    """Return an SVG of the lines, (CSS class, text) each."""
    width, height = round(COLUMNS * CHARACTER + 40), (len(lines) + 3) * LINE
    rows = []
    for i, (kind, line) in enumerate(lines):
        if text := line.strip():
            x = 20 + (len(line) - len(line.lstrip())) * CHARACTER
            place = f'x="{x:.1f}" y="{(i + 3) * LINE}" textLength="{len(text) * CHARACTER:.1f}"'
            rows.append(f'<text class="{kind}" {place}>{html.escape(text, quote=False)}</text>')
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            "<style>",
            "text { font: 14px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace }",
            "text { white-space: pre }",
            ".out { fill: #c9d1d9 } .typed { fill: #7ee787; font-weight: bold }",
            "</style>",
            f'<rect width="{width}" height="{height}" rx="10" fill="#0d1117"/>',
            *(f'<circle cx="{26 + 20 * i}" cy="22" r="6" fill="#484f58"/>' for i in range(3)),
            *rows,
            "</svg>",
        ]
    )


def main() -> None:
    lines: list[tuple[str, str]] = []
    for command, *typed in json.loads(Path(sys.argv[1]).read_text()):
        lines.append(("typed", f"$ {command}"))
        for line in screen(record(command, typed)):
            lines.append(("typed" if line.startswith("> ") else "out", line))
        lines.append(("out", ""))
    Path(sys.argv[2]).write_text(draw(lines[:-1]) + "\n")


if __name__ == "__main__":
    main()

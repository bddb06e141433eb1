"""Chat templates of open models: a conversation to text, with the origin of each special token in it.

A template is a Jinja program that comes with a model. `render` runs it in jinja2's sandbox, in a process of
its own with limits on time and memory: it can neither run foreign code, nor hang, nor fill the memory.
"""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from datetime import datetime
from itertools import chain
from typing import Any, NoReturn

SECONDS = 10
MEMORY = 2**29  # bytes; not on Windows, which has no module resource
LENGTH = 10**7  # characters of the rendered text
MARK = "\ufdd0"  # a Unicode noncharacter, never used in text


class SpecialTokens:
    """Distinguishes the special tokens that a template writes from those that a message spells.

    `mark` puts a MARK between the characters of each special token in a message, in upper or lower case, and
    at an end of the message where text beside it could complete one. The template may slice the message,
    escape it, change its case, or join it to other text: a special token that begins or ends in a message
    still has a MARK inside.
    """

    def __init__(self, texts: Collection[str]) -> None:
        longest_first = sorted(texts, key=len, reverse=True)
        marked = (f"{MARK}*".join(map(re.escape, text)) for text in longest_first)
        any_token = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.in_message = re.compile(f"(?=({any_token}))", re.IGNORECASE)  # lookahead: tokens may overlap
        self.in_rendered = re.compile("|".join(marked) or "(?!)")
        self.heads = {text[:n] for text in texts for n in range(1, len(text))}
        self.tails = {text[n:] for text in texts for n in range(1, len(text))}
        self.lengths = range(1, max(map(len, texts), default=0))

    def mark(self, message: str) -> str:
        """Return the message with MARKs, and without those that it has itself."""
        message = message.replace(MARK, "")
        before = MARK if any(message[:n] in self.tails for n in self.lengths) else ""
        after = MARK if any(message[-n:] in self.heads for n in self.lengths) else ""
        spans = [range(match.start(1) + 1, match.end(1)) for match in self.in_message.finditer(message)]
        inside = set(chain.from_iterable(spans))
        marked = (MARK + character if i in inside else character for i, character in enumerate(message))
        return before + "".join(marked) + after

    def split(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """Yield pieces of a text, without MARKs: (piece, whether the template wrote its special tokens)."""
        start = 0
        for match in self.in_rendered.finditer(rendered):
            if MARK in match[0]:
                yield rendered[start : match.start()].replace(MARK, ""), True
                yield match[0].replace(MARK, ""), False
                start = match.end()
        yield rendered[start:].replace(MARK, ""), True


def render(template: str, values: dict[str, Any]) -> str:
    """Return the text of a template. values are JSON types.

    UserError if the template raises an exception or exceeds a limit, ImportError without the extra.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("a chat template needs the extra 'hf': pip install jinja2")
    return run(json.dumps({"path": [str(path) for path in sys.path], "template": template, "values": values}))


def run(job: str) -> str:
    """Run this file in a process of its own. Return the rendered text."""
    from sologpt.errors import UserError  # here: that process has no path to the package

    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", __file__],  # without site, which takes a while to import
            input=job,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            start_new_session=True,  # Ctrl-C is for this process
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the chat template takes more than {SECONDS} s") from None
    if done.returncode:  # the process was killed, or has crashed
        raise UserError(f"the chat template ends its process with status {done.returncode}")
    text, error = json.loads(done.stdout)
    if error:
        raise UserError(f"the chat template rejects this conversation: {error}")
    return text


# -----------------------------------------------------------------------------
# In the process of its own


def main() -> None:
    """Read a job from standard input and write [text, error], in ASCII: the streams may have any encoding."""
    job = json.load(sys.stdin)
    sys.path[:] = job["path"]
    with suppress(ImportError, ValueError, OSError):  # the system has no such limit, or a lower one
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # in case the parent has died
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        text = environment().from_string(job["template"]).render(job["values"])
        if len(text) > LENGTH:
            raise ValueError(f"more than {LENGTH:,} characters")
        answer = json.dumps([text, ""])
    except MemoryError:
        answer = json.dumps(["", "out of memory"])
    except Exception as e:  # a template can raise anything
        answer = json.dumps(["", " ".join(str(e).split())[:300] or type(e).__name__])
    sys.stdout.write(answer)


def environment() -> Any:
    """Return a sandboxed Jinja environment, with the extensions that `transformers` gives to templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, the assistant's tokens for a training mask: a no-op."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise ValueError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        text = json.dumps(value, ensure_ascii=False, **options)  # Jinja's own filter escapes HTML
        others = f"[^\x00-\x7e{MARK}]"  # not the MARK: escaped, it would be text
        return re.sub(others, lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text

    extensions = [loopcontrols, Generation]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return jinja


if __name__ == "__main__":
    main()

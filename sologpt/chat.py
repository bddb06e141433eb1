"""Chat templates of open models: a conversation to text, and whose the special tokens in that text are.

A template is a Jinja program that comes with a model. `render` runs it in jinja2's sandbox, in a process of its own
with limits on time and memory: it can neither run foreign code, nor hang, nor fill the memory.
"""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

SECONDS = 10
MEMORY = 2**29  # bytes; needs the module resource, which Windows does not have
LENGTH = 10**7  # characters of the rendered text
MARK = "\ufdd0"  # a noncharacter, which text has no use for


class SpecialTokens:
    """Tells the special tokens that a template writes from those that a message spells.

    `mark` puts a MARK between the characters of each special token in a message, in whatever case, and at an end of the
    message where text beside it could complete one. The template may slice the message, escape it, change its case, or
    join it to other text: where a special token of the rendered text begins or ends in a message, a MARK is inside.
    """

    def __init__(self, texts: Collection[str]) -> None:
        longest_first = sorted(texts, key=len, reverse=True)
        marked = (f"{MARK}*".join(map(re.escape, text)) for text in longest_first)
        self.in_message = re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)
        self.in_rendered = re.compile("|".join(marked) or "(?!)")
        self.heads = {text[:n] for text in texts for n in range(1, len(text))}
        self.tails = {text[n:] for text in texts for n in range(1, len(text))}
        self.lengths = range(1, max(map(len, texts), default=0))

    def mark(self, message: str) -> str:
        """The message with its MARKs; those that it has itself are dropped."""
        message = message.replace(MARK, "")
        before = MARK if any(message[:n] in self.tails for n in self.lengths) else ""
        after = MARK if any(message[-n:] in self.heads for n in self.lengths) else ""
        return before + self.in_message.sub(lambda match: MARK.join(match[0]), message) + after

    def split(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """The pieces of the text, without MARKs; true for a piece whose special tokens the template has written."""
        start = 0
        for match in self.in_rendered.finditer(rendered):
            if MARK in match[0]:
                yield rendered[start : match.start()].replace(MARK, ""), True
                yield match[0].replace(MARK, ""), False
                start = match.end()
        yield rendered[start:].replace(MARK, ""), True


def render(template: str, values: dict[str, Any]) -> str:
    """The text of a template. values are JSON types.

    ValueError if the template raises an exception or exceeds a limit, ImportError without the extra.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("a chat template needs the extra 'hf': pip install jinja2")
    return run(json.dumps({"path": [*map(str, sys.path)], "template": template, "values": values}))


def run(job: str) -> str:
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
        raise ValueError(f"the chat template takes more than {SECONDS} s") from None
    if done.returncode:  # killed, or a crash of the interpreter
        raise ValueError(f"the chat template ends its process with status {done.returncode}")
    text, error = json.loads(done.stdout)
    if error:
        raise ValueError(f"the chat template rejects this conversation: {error}")
    return text


# -----------------------------------------------------------------------------
# In the process of its own


def main() -> None:
    """Read a job from standard input, write [text, error]. In ASCII: the standard streams may have any encoding."""
    job = json.load(sys.stdin)
    sys.path[:] = job["path"]
    with suppress(ImportError, ValueError, OSError):  # no such limit here, or one that is lower
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # should the parent be gone
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
    """The sandboxed Jinja environment, with the extensions that `transformers` gives to templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's tokens for a training mask; a no-op here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise ValueError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        text = json.dumps(value, ensure_ascii=False, **options)  # Jinja's own filter escapes HTML
        others = f"[^\x00-\x7e{MARK}]"  # an escaped MARK would be text
        return re.sub(others, lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


if __name__ == "__main__":
    main()

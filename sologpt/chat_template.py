"""Chat templates of open models: a conversation to text, with the origin of each special token in it.

A template is a Jinja program that comes with a model. `render` runs it in jinja2's sandbox, in a process of
its own with limits on time and memory: it can neither run foreign code, nor hang, nor fill the memory.
"""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import chain
from typing import Any, NoReturn

SECONDS = 10
MEMORY = 2**29  # bytes; not on Windows, which has no module resource
LENGTH = 10**7  # characters of the rendered text
REJECTED = "the chat template rejects this conversation: "
# Unicode noncharacters, which are never used in text; a message loses its own
MARK = "\ufdd0"  # in a special token that a message spells
BEGIN, END = "\ufdd1", "\ufdd2"  # around what {% generation %} writes
RESERVED = re.compile(f"[{MARK}{BEGIN}{END}]")

# The template of a tokenizer that has none: it needs no new ids, and each turn ends with the eos_token
PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] + '\\n' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)

Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}
Cut = tuple[int, bool]  # the first n messages, with the generation prompt or without
Answer = tuple[list[str], str]  # the texts of a conversation, and "" or an error


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
        """Return the message with MARKs, and without the RESERVED characters that it has itself."""
        message = RESERVED.sub("", message)
        before = MARK if any(message[:n] in self.tails for n in self.lengths) else ""
        after = MARK if any(message[-n:] in self.heads for n in self.lengths) else ""
        spans = [range(match.start(1) + 1, match.end(1)) for match in self.in_message.finditer(message)]
        if spans:
            inside = set(chain.from_iterable(spans))
            message = "".join(MARK + c if i in inside else c for i, c in enumerate(message))
        return before + message + after

    def own(self, rendered: str) -> list[re.Match[str]]:
        """Return the special tokens in a text that the template wrote."""
        return [match for match in self.in_rendered.finditer(rendered) if MARK not in match[0]]

    def split(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """Yield pieces of a text, without MARKs: (piece, whether the template wrote its special tokens)."""
        start = 0
        for match in self.in_rendered.finditer(rendered):
            if MARK in match[0]:
                yield rendered[start : match.start()].replace(MARK, ""), True
                yield match[0].replace(MARK, ""), False
                start = match.end()
        yield rendered[start:].replace(MARK, ""), True


def render(template: str, values: dict[str, Any], messages: Messages) -> str:
    """Return the text of a conversation, with the generation prompt.

    values are the special tokens, by name. UserError if the template raises an exception or exceeds a limit,
    ImportError without the extra.
    """
    [[text]] = render_all(template, values, [(messages, [(len(messages), True)])])
    return text


def render_all(
    template: str,
    values: dict[str, Any],
    conversations: Sequence[tuple[Messages, Sequence[Cut]]],
    mark_generation: bool = False,
) -> Iterator[list[str]]:
    """Yield the texts of each conversation, one for each Cut. One process renders all.

    With mark_generation, BEGIN and END stand around what the template writes in {% generation %}. UserError
    in the place of a conversation that fails, ImportError without the extra.
    """
    from sologpt.errors import UserError  # here: the other process has no path to the package

    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("a chat template needs the extra 'hf': pip install jinja2")
    job: dict[str, Any] = {"path": [str(path) for path in sys.path], "template": template, "values": values}
    job |= {"conversations": conversations, "mark_generation": mark_generation}
    answers, failure = run(json.dumps(job))
    answers = answers or [([], failure)] * len(conversations)
    for conversation, (texts, error) in zip(conversations, answers, strict=True):
        if error and len(conversations) > 1:  # the time or the memory may have been another one's: try alone
            yield from render_all(template, values, [conversation], mark_generation)
        elif error:
            raise UserError(error)
        else:
            yield texts


def run(job: str) -> tuple[list[Answer], str]:
    """Run this file in a process of its own. Return its answers, or none and why it has failed."""
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
        return [], f"the chat template takes more than {SECONDS} s"
    if done.returncode:  # the process was killed, or has crashed
        return [], f"the chat template ends its process with status {done.returncode}"
    return json.loads(done.stdout), ""


# -----------------------------------------------------------------------------
# In the process of its own


def main() -> None:
    """Read a job from standard input and write its answers, in ASCII: the streams may have any encoding."""
    job = json.load(sys.stdin)
    sys.path[:] = job["path"]
    with suppress(ImportError, ValueError, OSError):  # the system has no such limit, or a lower one
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # in case the parent has died
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = list(render_job(job))
    try:
        answer = json.dumps(answers)
    except MemoryError:
        answer = json.dumps([([], REJECTED + "out of memory")] * len(job["conversations"]))
    sys.stdout.write(answer)


def render_job(job: dict[str, Any]) -> Iterator[Answer]:
    template = None
    for messages, cuts in job["conversations"]:
        try:
            template = template or environment(job["mark_generation"]).from_string(job["template"])
            yield [render_cut(template, job["values"], messages, *cut) for cut in cuts], ""
        except MemoryError:
            yield [], REJECTED + "out of memory"
        except Exception as e:  # a template can raise anything
            yield [], REJECTED + (" ".join(str(e).split())[:300] or type(e).__name__)


def render_cut(template: Any, values: dict[str, Any], messages: list[Any], n: int, prompt: bool) -> str:
    given = dict(messages=messages[:n], tools=None, documents=None, add_generation_prompt=prompt)
    text = template.render(values | given)
    if len(text) > LENGTH:
        raise ValueError(f"more than {LENGTH:,} characters")
    return text


def environment(mark_generation: bool) -> Any:
    """Return a sandboxed Jinja environment, with the extensions that `transformers` gives to templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: the assistant's tokens, for a training mask."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if not mark_generation:
                return body
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
            return [begin, *body, end]

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

"""Chat templates of open models: a conversation to text, with marks around the template's special tokens.

A template is a Jinja program that comes with a model. jinja2's sandbox runs no foreign code, but a template
can still loop for ever or fill the memory, and no thread of Python can stop it. So templates are rendered in
a worker process with limits. It lives as long as this one: to start it takes 100 ms, a render half of one.
"""

import faulthandler
import functools
import importlib.util
import json
import os
import re
import string
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

from sologpt.errors import UserError

SECONDS = 10  # for one conversation
MEMORY = 2**29  # bytes; not on Windows, which has no module resource
LENGTH = 10**7  # characters of a rendered text
TIMEOUT, OUT_OF_MEMORY, FAILED = 1, 2, 3  # exit statuses of the worker; faulthandler's is 1
REJECTED = "the chat template rejects this conversation: "

# Marks are Unicode noncharacters, which are never used in text; a message loses its own
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around a special token that the template writes
CUT = "\ufdd2"  # before and after one that a message spells: it is encoded by itself, as transformers does
BEGIN, END = "\ufdd3", "\ufdd4"  # around what {% generation %} writes
RESERVED = re.compile(f"[{OPEN}-{END}]")
MARKS = re.compile(f"[{OPEN}-{CUT}]")
OWN = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")

# The template of a tokenizer that has none: it needs no new ids, and each turn ends with the eos_token
PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] + '\\n' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)

Messages = Sequence[Mapping[str, Any]]  # {"role": ..., "content": ...}
Cut = tuple[int, bool]  # the first n messages, with the generation prompt or without


class TooLong(UserError):
    """A rendered text has more characters than allowed."""


class SpecialTokens:
    """Distinguishes the special tokens that a template writes from those that a message spells.

    A template may slice a message, join it to other text, or change its letters, so a token can come from a
    message that does not have it. Therefore each conversation is rendered a second time, with neutral
    messages: none of their characters is in a special token. The special tokens of that text are the
    template's own.
    """

    def __init__(self, texts: Collection[str]) -> None:
        longest_first = sorted(texts, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        used = {*"".join(texts), *"".join(texts).lower()}
        self.letter = next((c for c in string.ascii_lowercase if c not in used), "\ufffe")
        kept = re.escape("".join(c for c in string.punctuation if c not in used))
        if not any(c.isspace() for c in used):
            kept += r"\s"
        self.not_kept = re.compile(f"[^{kept}]+" if kept else r"[\s\S]+")

    def neutral(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """Return messages of the same lengths, whitespace and punctuation, as far as no token has them."""

        def of(text: str) -> str:
            return self.not_kept.sub(lambda match: self.letter * len(match[0]), text)

        return [{k: text if k == "role" else of(text) for k, text in m.items()} for m in messages]

    def mark(self, text: str, neutral: str) -> str:
        """Return a rendered text with marks around its special tokens.

        Those that the neutral text has, too, at the same place, are the template's own. If the texts are not
        of one length, all must be the template's, in the same order. UserError if one of its own is missing.
        """
        text = MARKS.sub("", text)  # a template can decode them from a message
        neutral = MARKS.sub("", neutral)
        in_place = len(text) == len(neutral)

        def mark(match: re.Match[str]) -> str:
            if in_place and not neutral.startswith(match[0], match.start()):
                return CUT + match[0] + CUT
            return OPEN + match[0] + CLOSE

        marked = self.pattern.sub(mark, text)
        if OWN.findall(marked) != self.pattern.findall(neutral):
            error = "a message spells a special token that cannot be told from the chat template's own"
            raise UserError(f"{error}: remove it")
        return marked


def check_messages(messages: Messages) -> list[dict[str, str]]:
    """Return messages whose values are texts. Join text parts. UserError, with the index, for other content.

    A role is trusted: templates write special tokens with it. So it must be a word.
    """
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{i}] must have a role and a content, and is {str(message)[:50]!r}")
        role = message.get("role")
        if not isinstance(role, str) or not re.fullmatch(r"[\w-]+", role):
            raise UserError(f"messages[{i}]: role must be a word, such as 'user', not {str(role)[:50]!r}")
        texts = {}
        for key, value in {**message, "content": message.get("content")}.items():
            text = as_text(value)
            if text is not None:
                texts[key] = RESERVED.sub("", text)
            elif value or key == "content":
                shown = repr(value)[:50]
                raise UserError(f"messages[{i}]: {key} must be text, or a list of text parts, not {shown}")
        checked.append(texts)
    return checked


def as_text(value: Any) -> str | None:
    """Return a text, or the joined texts of a list of parts. None if it is neither."""
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    is_text = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if is_text else None


def render(
    template: str,
    values: dict[str, str],
    special: SpecialTokens,
    messages: Messages,
    cuts: Sequence[Cut],
    limit: int = LENGTH,
    mark_generation: bool = False,
) -> list[str]:
    """Return the texts of a conversation, one for each Cut, with marks around special tokens.

    values are the special tokens, by name. With mark_generation, BEGIN and END stand around what the template
    writes in {% generation %}. UserError for bad messages, or if the template raises an exception or exceeds
    a limit (TooLong for that of characters). ImportError without the extra.
    """
    checked = check_messages(messages)
    job: dict[str, Any] = {"template": template, "values": values, "cuts": cuts, "limit": limit}
    job |= {"conversations": [checked, special.neutral(checked)], "mark_generation": mark_generation}
    texts, neutral = WORKER.ask(job)
    return [special.mark(*pair) for pair in zip(texts, neutral, strict=True)]


class Worker:
    """The process that renders: started by the first job, and again after a job that it does not survive."""

    START = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import sologpt.chat_template as c; c.main()"
    )

    def __init__(self) -> None:
        self.lock = threading.Lock()  # a server renders in several threads
        self.process: subprocess.Popen[bytes] | None = None
        self.parent = 0

    def ask(self, job: dict[str, Any]) -> list[list[str]]:
        """Return the texts of each conversation of a job. UserError if it fails."""
        line = json.dumps(job | {"seconds": SECONDS}).encode() + b"\n"
        with self.lock:
            process = self.running()
            assert process.stdin and process.stdout
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BaseException:  # Ctrl-C, say: the answer would be taken for that of the next job
                self.stop()
                raise
            if not answer:
                raise UserError(failure(self.stop()))
        texts, error, is_too_long = json.loads(answer)
        if error:
            raise (TooLong if is_too_long else UserError)(error)
        return texts

    def running(self) -> subprocess.Popen[bytes]:
        if self.parent != os.getpid():  # a fork: the worker is the other process's
            self.process = None
        if self.process is None or self.process.poll() is not None:
            if importlib.util.find_spec("jinja2") is None:
                raise ImportError("a chat template needs the extra 'hf': pip install jinja2")
            self.parent = os.getpid()
            self.process = subprocess.Popen(
                # without site, which takes a while to import
                [sys.executable, "-I", "-S", "-c", self.START, json.dumps([str(path) for path in sys.path])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process
            )
        return self.process

    def stop(self) -> int:
        """Wait for the end of the worker, which has died or must. Return its exit status."""
        process = self.process
        self.process = None
        assert process and process.stdin and process.stdout
        process.kill()  # nothing happens to one that has exited
        with suppress(OSError):  # a broken pipe
            process.stdin.close()
        process.stdout.close()
        return process.wait()


WORKER = Worker()  # one for all templates: what a render leaves behind does not reach the next


def failure(status: int) -> str:
    if status == TIMEOUT:
        return f"the chat template takes more than {SECONDS} s"
    if status == OUT_OF_MEMORY:
        return REJECTED + "out of memory"
    return f"the chat template ends its process with status {status}"


# -----------------------------------------------------------------------------
# In the worker


def main() -> None:
    """Answer each job, a line of standard input, by a line in ASCII: the streams may have any encoding."""
    with suppress(ImportError, ValueError, OSError):  # the system has no such limit, or a lower one
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        for line in sys.stdin.buffer:
            job = json.loads(line)
            # A watchdog thread in C: a template that computes in C does not let one in Python run
            faulthandler.dump_traceback_later(job.pop("seconds"), exit=True)
            answer = json.dumps(answer_job(**job))
            faulthandler.cancel_dump_traceback_later()
            print(answer, flush=True)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # memory may be in pieces: the next job gets a new process
    except BaseException:
        os._exit(FAILED)


def answer_job(
    template: str,
    values: dict[str, str],
    conversations: list[list[dict[str, str]]],
    cuts: list[Cut],
    limit: int,
    mark_generation: bool,
) -> tuple[list[list[str]], str, bool]:
    """Return the texts of each conversation, or an error and whether it is that of a text too long."""
    try:
        compiled = compile_template(template, mark_generation)
        cut = functools.partial(render_cut, compiled, values, limit)
        return [[cut(messages[:n], prompt) for n, prompt in cuts] for messages in conversations], "", False
    except MemoryError:
        raise
    except TooLong as e:
        return [], str(e), True
    except Exception as e:  # a template can raise anything
        return [], REJECTED + (" ".join(str(e).split())[:300] or type(e).__name__), False


def render_cut(template: Any, values: dict[str, str], limit: int, messages: list[Any], prompt: bool) -> str:
    given = dict(messages=messages, tools=None, documents=None, add_generation_prompt=prompt)
    text = template.render(values | given)
    if len(text) > limit:
        raise TooLong(f"the chat template makes more than {limit:,} characters of this conversation")
    return text


@functools.lru_cache(maxsize=8)
def compile_template(source: str, mark_generation: bool) -> Any:
    """Return a sandboxed Jinja template, with the extensions that `transformers` gives to it."""
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
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own filter escapes HTML

    extensions = [loopcontrols, Generation]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return jinja.from_string(source)

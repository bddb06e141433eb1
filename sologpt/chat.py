"""A conversation with a model, and its commands in a terminal.

talk = Conversation(model, tokenizer, system="Be brief.", max_tokens=100)
for text in talk.ask("What is a cache?"):
    print(text, end="")
"""

import io
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from gpt import GPT, GPTConfig, KVCache
from sologpt.errors import RunError, UserError, writing
from sologpt.stream import Prompt, TextStream, drop_old_turns, stream_text
from sologpt.tokenizer import Tokenizer

ANSWER = {"temperature": 0.6, "top_p": 0.9}  # where a model comes without settings
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)  # a path or a comment of C is text, not a command
HELP = """\
/reset        forget the conversation
/system TEXT  forget it, and begin a new one with this system message (--chat)
/save FILE    write the conversation to a file: JSON with --chat, else text
/quit         leave, as Ctrl-D does
Ctrl-C stops an answer. A pasted text of several lines is one message."""


class Conversation:
    """Prompts and answers. A KVCache keeps their tokens, so a turn prefills only the new ones.

    With chat, a prompt is a user's message for the chat template, and the oldest turns are dropped when an
    answer would not fit into the window with them. Without, prompts and answers are one text that goes on.
    settings are those of `stream_text`. UserError for bad ones, or if the chat template is missing or rejects
    the system message.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        chat: bool = True,
        system: str = "",
        max_tokens: int = 500,
        **settings: Any,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat
        self.max_tokens = max_tokens
        self.settings = settings
        max_len = min(1024, model.config.sequence_len)
        self.kv_cache = KVCache(model.config, 1, max_len, model.device, model.dtype)
        self.reset(system)

    def reset(self, system: str = "") -> None:
        """Begin anew with this system message. UserError if it is rejected; then nothing changes."""
        messages = [{"role": "system", "content": system}] if system else []
        probe: Prompt = [*messages, {"role": "user", "content": ""}] if self.chat else [0]
        self.stream(probe)  # checks all settings; nothing is generated before the first token is read
        self.system = system
        self.messages = messages
        self.answer: TextStream | None = None  # the last one, which may still be streaming
        self.dropped = 0  # number of oldest messages, after the system message, that the model no longer sees
        self.kv_cache.reset()

    def ask(self, prompt: str) -> TextStream:
        """Stream the answer. If the stream is closed early, its text so far is the answer."""
        self.messages = [*self.history(), {"role": "user", "content": prompt}]
        window = self.model.config.sequence_len
        question: Prompt = prompt
        tokens = None
        if self.chat:
            first = 1 if self.system else 0
            seen = self.messages[:first] + self.messages[first + self.dropped :]
            question, tokens = drop_old_turns(self.tokenizer, seen, window, self.max_tokens)
            self.dropped += len(seen) - len(question)
            n_tokens = len(tokens)
        else:
            n_tokens = int(self.kv_cache.lengths) + len(self.tokenizer.encode_prompt(prompt))
        self.kv_cache = with_room(self.kv_cache, self.model.config, n_tokens + self.max_tokens)
        self.answer = self.stream(question, kv_cache=self.kv_cache, chat_tokens=tokens)
        return self.answer

    def stream(self, prompt: Prompt, **options: Any) -> TextStream:
        return stream_text(self.model, self.tokenizer, prompt, self.max_tokens, **self.settings, **options)

    def history(self) -> list[dict[str, str]]:
        """Return all messages so far, the last answer included."""
        if self.answer is None:
            return self.messages
        return [*self.messages, {"role": "assistant", "content": self.answer.text}]

    def save(self, path: str | Path) -> None:
        """Write all messages as JSON, for `stream_text`; without chat, write the text."""
        messages = self.history()
        text = "".join(message["content"] for message in messages)
        if self.chat:
            text = json.dumps(messages, indent=2, ensure_ascii=False)
        with writing(path):
            Path(path).write_text(text + "\n", encoding="utf-8", errors="replace")


def answer_sampling(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings with which the model answers by default: its own, if it has a temperature."""
    own = tokenizer.sampling
    return own if "temperature" in own else ANSWER | own


def with_room(kv_cache: KVCache, config: GPTConfig, n: int) -> KVCache:
    """Return the cache, or if it is too small for n tokens, a copy with at least twice the room."""
    size = kv_cache.max_len
    window = config.sequence_len
    if min(n, window) <= size:
        return kv_cache
    larger = KVCache(config, 1, min(max(n, 2 * size), window), kv_cache.k.device, kv_cache.k.dtype)
    larger.k[:, :, :, :size] = kv_cache.k
    larger.v[:, :, :, :size] = kv_cache.v
    larger.ids[:, :size] = kv_cache.ids
    larger.lengths.copy_(kv_cache.lengths)
    return larger


# -----------------------------------------------------------------------------
# In a terminal


def converse(talk: Conversation, first: str = "") -> None:
    """Answer each message that the user enters in a terminal, after a first one that is given."""
    window = talk.model.config.sequence_len
    if first:
        print(f"> {first}")
    for prompt in chain([first] if first else [], read_messages(talk)):
        with catch_sigint() as signals:
            saw_all = talk.dropped == 0
            stream = talk.ask(prompt)
            if saw_all and talk.dropped:
                print(f"over {window} tokens: the model no longer sees the oldest turns", file=sys.stderr)
            warn_if_cut(stream, window)
            for text in stream:
                print(text, end="", flush=True)
                if signals:
                    print(stream.close(), end="")
            print(flush=True)
            print(stream.summary(), file=sys.stderr)
            warn_if_silent(stream, talk.tokenizer, talk.chat)


def warn_if_silent(stream: TextStream, tokenizer: Tokenizer, chat: bool) -> None:
    """A model that was trained on conversations ends a text that is none at once."""
    is_silent = all(len(row.tokens) == 1 and row.reason == "stop" for row in stream.rows)
    if is_silent and tokenizer.chat_template and not chat:
        print("the model ended at its first token; it has a chat template: add --chat", file=sys.stderr)


def warn_if_cut(stream: TextStream, window: int) -> None:
    n = len(stream.prompt_tokens)
    if n > window:
        print(f"the prompt has {n} tokens: the model reads the last {window}", file=sys.stderr)


@contextmanager
def catch_sigint() -> Iterator[list[int]]:
    """In a terminal, append each Ctrl-C to a list, so that an answer ends between two tokens."""
    signals: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if sys.stdin.isatty():
        signal.signal(signal.SIGINT, lambda signum, _: signals.append(signum))
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def read_messages(talk: Conversation) -> Iterator[str]:
    """Yield each line that the user enters, until Ctrl-D or /quit. Skip empty lines and run commands.

    A text of several lines that is pasted into a terminal is one message (bracketed paste of GNU readline).
    """
    with suppress(ImportError):  # not on Windows
        import readline  # gives input() line editing and history

        readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    in_terminal = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if in_terminal else "")
        except EOFError:
            if in_terminal:
                print()
            return
        except KeyboardInterrupt:
            if not in_terminal:
                raise
            print("\nCtrl-D or /quit leaves", file=sys.stderr)
            continue
        command = COMMAND.fullmatch(text.rstrip())
        if command is None:
            if text.strip():
                yield text
        elif command[1] == "quit":
            return
        else:
            try:
                print(run_command(talk, command[1], command[2] or ""), file=sys.stderr)
            except (UserError, RunError) as e:
                print(f"error: {e}", file=sys.stderr)


def run_command(talk: Conversation, name: str, argument: str) -> str:
    """Run a command. Return what to tell the user."""
    if name == "help":
        return HELP
    if name == "reset":
        talk.reset(talk.system)
        return "a new conversation"
    if name == "system":
        if not talk.chat:
            raise UserError("/system works only with --chat")
        if not argument:
            raise UserError("/system needs a text")
        talk.reset(argument)
        return "a new conversation, with this system message"
    if name == "save":
        if not argument:
            raise UserError("/save needs a file")
        path = os.path.expanduser(argument)
        talk.save(path)
        return f"wrote {path}"
    raise UserError(f"no command /{name}: /help lists them; a space before the slash makes it a message")

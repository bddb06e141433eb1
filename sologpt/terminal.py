"""The user's side of a conversation in a terminal: messages, commands, and Ctrl-C between two tokens."""

import io
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sologpt.conversation import Conversation

COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)  # not a path, nor a comment of C: they are text
HELP = """\
/reset        forget the conversation
/system TEXT  forget it, and begin a new one with this system message (--chat)
/save FILE    write the conversation to a file: JSON with --chat, else text
/quit         leave, as Ctrl-D does
Ctrl-C stops an answer. A pasted text of several lines is one message."""


@contextmanager
def on_sigint(handler: Callable[..., Any]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def catch_sigint() -> Iterator[list[int]]:
    """Append each Ctrl-C to the list that this yields, so that an answer ends between two tokens, not within one.

    Where standard input is no terminal, Ctrl-C ends the script.
    """
    signals: list[int] = []
    with on_sigint(lambda signum, _: signals.append(signum)) if sys.stdin.isatty() else nullcontext():
        yield signals


def read_messages(talk: Conversation) -> Iterator[str]:
    """Each message that the user enters, until Ctrl-D or /quit. Empty lines are skipped, commands are carried out.

    A message is a line. GNU readline knows what is pasted into a terminal (bracketed paste) and keeps its line ends.
    """
    with suppress(ImportError):  # not on Windows
        import readline  # gives input() line editing and history

        readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    in_terminal = sys.stdin.isatty()
    while True:
        try:
            with on_sigint(signal.default_int_handler):
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
        if command := COMMAND.fullmatch(text.rstrip()):
            name, argument = command[1], command[2] or ""
            if name == "quit":
                return
            try:
                print(run_command(talk, name, argument), file=sys.stderr)
            except (ValueError, OSError) as e:
                print(f"error: {e}", file=sys.stderr)
        elif text.strip():
            yield text


def run_command(talk: Conversation, name: str, argument: str) -> str:
    """Carry out a command; returns what to tell the user. ValueError if that is impossible, OSError from /save."""
    match name:
        case "help":
            return HELP
        case "reset":
            talk.reset(talk.system)
            return "a new conversation"
        case "system":
            if not talk.chat:
                raise ValueError("/system works only with --chat")
            if not argument:
                raise ValueError("/system needs a text")
            talk.reset(argument)
            return "a new conversation, with this system message"
        case "save":
            if not argument:
                raise ValueError("/save needs a file")
            path = Path(argument).expanduser()
            try:
                talk.save(path)
            except OSError as e:
                raise OSError(f"cannot write {path}: {e.strerror}") from e
            return f"wrote {path}"
    raise ValueError(f"no command /{name}: /help lists them; a space before the slash makes it a message")

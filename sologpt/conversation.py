"""A conversation with a model: its messages, and the cache that keeps their tokens from turn to turn.

talk = Conversation(model, tokenizer, system="Be brief.", max_tokens=100)
for text in talk.ask("What is a cache?"):
    print(text, end="")
"""

import json
from pathlib import Path
from typing import Any

from gpt import GPT, GPTConfig, KVCache
from sologpt.text import TextStream, drop_old_turns, stream_text
from sologpt.tokenizer import Tokenizer


class Conversation:
    """Prompts and answers. The cache keeps their tokens, so a turn prefills only what is new.

    With chat, a prompt is a user's message for the chat template, and the oldest turns are dropped once an answer would
    not fit into the window with them (`dropped`). Without, prompts and answers are one text that goes on. settings are
    those of `stream_text`. ValueError for bad ones, or if there is no chat template.
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
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.max_tokens, self.settings = max_tokens, settings
        probe = [{"role": "user", "content": ""}] if chat else [0]
        stream_text(model, tokenizer, probe, max_tokens, **settings)  # checks all arguments now, and generates nothing
        window = model.config.sequence_len
        self.kv_cache = KVCache(model.config, 1, min(1024, window), model.device, model.dtype)
        self.reset(system)

    def reset(self, system: str = "") -> None:
        """Forget all turns, and begin anew with this system message."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []
        self.answer: TextStream | None = None  # the last one, which may still be streaming
        self.dropped = False
        self.kv_cache.reset()

    def ask(self, prompt: str) -> TextStream:
        """Stream the answer. If it is closed half-way, the conversation goes on with what there is of it."""
        self.messages = [*self.history(), {"role": "user", "content": prompt}]
        window, tokens = self.model.config.sequence_len, None
        if self.chat:
            kept, tokens = drop_old_turns(self.tokenizer, self.messages, window, self.max_tokens)
            self.dropped, self.messages = self.dropped or len(kept) < len(self.messages), kept
            n = len(tokens)
        else:
            n = int(self.kv_cache.lengths) + len(self.tokenizer.encode_prompt(prompt))
        self.kv_cache = with_room(self.kv_cache, self.model.config, n + self.max_tokens)
        self.answer = stream_text(
            self.model,
            self.tokenizer,
            self.messages if self.chat else prompt,
            self.max_tokens,
            kv_cache=self.kv_cache,
            chat_tokens=tokens,
            **self.settings,
        )
        return self.answer

    def history(self) -> list[dict[str, str]]:
        """The messages so far, the last answer included."""
        if self.answer is None:
            return self.messages
        return [*self.messages, {"role": "assistant", "content": self.answer.text}]

    def save(self, path: str | Path) -> None:
        """Write a JSON list of messages or, without chat, the text. OSError if it cannot be written."""
        messages = self.history()
        text = (
            json.dumps(messages, indent=2, ensure_ascii=False) if self.chat else "".join(m["content"] for m in messages)
        )
        Path(path).write_text(text + "\n", encoding="utf-8")


HELP = """\
/reset        forget the conversation
/system TEXT  forget it, and begin a new one with this system message
/save FILE    write the conversation to a file: JSON with --chat, else text
/quit         leave, as Ctrl-D does
Ctrl-C stops an answer. A pasted text of several lines is one message."""


def run_command(line: str, talk: Conversation) -> str:
    """Carry out a line that begins with a slash; returns what to tell the user. EOFError for /quit."""
    command, _, rest = line.strip().partition(" ")
    match command, rest.strip():
        case "/help", "":
            return HELP
        case "/quit", "":
            raise EOFError
        case "/reset", "":
            talk.reset(talk.system)
            return "a new conversation"
        case "/system", text if text and talk.chat:
            talk.reset(text)
            return "a new conversation, with this system message"
        case "/system", _:
            return "/system needs a text, and --chat"
        case "/save", "":
            return "/save needs a file"
        case "/save", file:
            try:
                talk.save(file)
            except OSError as e:
                return f"cannot write {file}: {e.strerror}"
            return f"wrote {file}"
    return f"no command {line.strip()}: /help lists them; a space before the slash makes it a message"


def with_room(kv_cache: KVCache, config: GPTConfig, n: int) -> KVCache:
    """The cache, or where it is too small for n tokens, a copy with at least twice the room."""
    size, n = kv_cache.max_len, min(n, config.sequence_len)
    if n <= size:
        return kv_cache
    k = kv_cache.k
    larger = KVCache(config, 1, min(max(n, 2 * size), config.sequence_len), k.device, k.dtype)
    larger.k[:, :, :, :size], larger.v[:, :, :, :size], larger.ids[:, :size] = k, kv_cache.v, kv_cache.ids
    larger.lengths.copy_(kv_cache.lengths)
    return larger

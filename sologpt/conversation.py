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
    those of `stream_text`. ValueError for bad ones, or if the chat template is missing or rejects the system message.
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
        window = model.config.sequence_len
        self.kv_cache = KVCache(model.config, 1, min(1024, window), model.device, model.dtype)
        self.reset(system)

    def reset(self, system: str = "") -> None:
        """Forget all turns, and begin anew with this system message. If it is rejected: ValueError, no change."""
        messages = [{"role": "system", "content": system}] if system else []
        probe = [*messages, {"role": "user", "content": ""}] if self.chat else [0]
        stream_text(self.model, self.tokenizer, probe, self.max_tokens, **self.settings)  # checks, generates nothing
        self.system, self.messages = system, messages
        self.answer: TextStream | None = None  # the last one, which may still be streaming
        self.dropped = 0  # so many of the oldest messages, after the system message, are no longer seen by the model
        self.kv_cache.reset()

    def ask(self, prompt: str) -> TextStream:
        """Stream the answer. If it is closed half-way, the conversation goes on with what there is of it."""
        self.messages = [*self.history(), {"role": "user", "content": prompt}]
        first, window, tokens = bool(self.system), self.model.config.sequence_len, None
        seen = self.messages[:first] + self.messages[first + self.dropped :]
        if self.chat:
            kept, tokens = drop_old_turns(self.tokenizer, seen, window, self.max_tokens)
            self.dropped, seen = self.dropped + len(seen) - len(kept), kept
            n = len(tokens)
        else:
            n = int(self.kv_cache.lengths) + len(self.tokenizer.encode_prompt(prompt))
        self.kv_cache = with_room(self.kv_cache, self.model.config, n + self.max_tokens)
        self.answer = stream_text(
            self.model,
            self.tokenizer,
            seen if self.chat else prompt,
            self.max_tokens,
            kv_cache=self.kv_cache,
            chat_tokens=tokens,
            **self.settings,
        )
        return self.answer

    def history(self) -> list[dict[str, str]]:
        """All messages so far, the last answer included."""
        if self.answer is None:
            return self.messages
        return [*self.messages, {"role": "assistant", "content": self.answer.text}]

    def save(self, path: str | Path) -> None:
        """Write all messages as JSON, for `stream_text`; without chat, the text. OSError if it cannot be written."""
        messages = self.history()
        text = (
            json.dumps(messages, indent=2, ensure_ascii=False) if self.chat else "".join(m["content"] for m in messages)
        )
        Path(path).write_text(text + "\n", encoding="utf-8")


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

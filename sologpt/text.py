"""Text from a model: streamed as whole characters, up to a stop sequence.

    for text in stream_text(model, tokenizer, "def main(", stop=["\\n\\n"], max_tokens=200, temperature=0.8):
        print(text, end="")

`stream_text` encodes the prompt and starts `GPT.generate_batch`; a `TextRow` turns the token ids of one row into text.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Protocol

from sologpt.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
Steps = Generator[list[int | None], None, list[str]]  # a token id for each row, None for a row that has ended


class Model(Protocol):
    """The part of a GPT that is used here: this module does not import gpt."""

    config: Any

    def generate_batch(self, *args: Any, **kwargs: Any) -> Steps: ...


class TextRow:
    """The text of one generated sequence: token ids are pushed in, text comes out once it is certain.

    An incomplete character and the possible beginning of a stop sequence are held back. `reason` is empty until the row
    ends. Then it is 'stop' (an end-of-text token or a stop sequence; neither becomes text), 'repeat' (the last
    stop_on_repeat tokens equal those before them), or what `end` was given.

    continues: the row continues a text, so a leading space is kept. ValueError for an empty stop sequence or a negative
    stop_on_repeat.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), stop_on_repeat: int = 0, continues: bool = True
    ) -> None:
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        if "" in self.stop:
            raise ValueError("stop must not be empty text: every text contains it")
        if stop_on_repeat < 0:
            raise ValueError(f"stop_on_repeat must be at least 0, not {stop_on_repeat}")
        self.stop_on_repeat, self.eos_tokens = stop_on_repeat, tokenizer.eos_tokens
        self.decoder = tokenizer.decoder(continues)
        self.tokens: list[int] = []  # all that were pushed, an end-of-text token included
        self.text = ""  # all that has come out
        self.held = ""  # what is held back
        self.reason = ""
        self.seconds = 0.0  # from the first step of generation to the last token, set by `stream_rows`

    def push(self, token: int) -> str:
        """Add a token id; returns the text that is now certain. Sets `reason` if the row ends here."""
        self.tokens.append(token)
        if token in self.eos_tokens:
            return self.end("stop")
        text, n = self._add(self.decoder.decode(token)), self.stop_on_repeat
        if n and len(self.tokens) >= 2 * n and self.tokens[-n:] == self.tokens[-2 * n : -n]:
            text += self.end("repeat")
        return text

    def end(self, reason: str) -> str:
        """No token follows: returns the text that was held back. Does nothing to a row that has ended."""
        if self.reason:
            return ""
        text = self._add(self.decoder.flush())
        if not self.reason:  # no stop sequence in the flushed text
            text += self._release(len(self.held))
            self.reason = reason
        return text

    def _add(self, text: str) -> str:
        """Hold decoded text back; returns what is now certain. Sets `reason` at a stop sequence."""
        self.held += text
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.held, self.reason = self.held[: min(found)], "stop"
            return self._release(len(self.held))
        # Hold back the longest end of the text that a stop sequence begins with
        lengths = range(min(len(self.held), max(map(len, self.stop), default=0)), 0, -1)
        partial = next((k for k in lengths if any(stop.startswith(self.held[-k:]) for stop in self.stop)), 0)
        return self._release(len(self.held) - partial)

    def _release(self, n: int) -> str:
        text, self.held = self.held[:n], self.held[n:]
        self.text += text
        return text


def stream_rows(steps: Steps, rows: Sequence[TextRow]) -> Generator[list[str], None, None]:
    """Push the steps of `GPT.generate_batch` into rows; yields the new text of each row, until all have ended.

    Rows that are still running when max_tokens are reached end by 'length'. Closing the generator closes steps.
    """
    started = time.perf_counter()
    try:
        for tokens in steps:
            texts = [""] * len(rows)
            for b, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                if token is not None and not row.reason:
                    texts[b] = row.push(token)
                    row.seconds = time.perf_counter() - started
            yield texts
            if all(row.reason for row in rows):
                return
    finally:
        steps.close()
    yield [row.end("length") for row in rows]


class TextStream(Iterator[str]):
    """What `stream_text` returns: yields the text of the first row, a piece for each token (it may be empty).

    `rows` are all rows, `prompt_tokens` the encoded prompt. `text`, `tokens`, `reason` and `seconds` are those of the
    first row so far. Leaving a for loop half-way, by break or an exception, closes the stream: rows that are still
    running end by 'interrupt'.
    """

    def __init__(self, steps: Steps, rows: list[TextRow], prompt_tokens: list[int]) -> None:
        self.rows, self.prompt_tokens = rows, prompt_tokens
        self._texts = stream_rows(steps, rows)

    def __next__(self) -> str:
        return next(self._texts)[0]

    def __iter__(self) -> Generator[str, None, None]:
        try:
            for texts in self._texts:
                yield texts[0]
        finally:  # also when the caller leaves the loop
            self.close()

    def close(self) -> str:
        """Stop generating; returns the text that the first row held back."""
        self._texts.close()
        held = [row.end("interrupt") for row in self.rows]
        return held[0]

    @property
    def text(self) -> str:
        return self.rows[0].text

    @property
    def tokens(self) -> list[int]:
        return self.rows[0].tokens

    @property
    def reason(self) -> str:
        return self.rows[0].reason

    @property
    def seconds(self) -> float:
        return self.rows[0].seconds


def stream_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_tokens: int = 500,
    num_samples: int = 1,
    stop: str | Sequence[str] = (),
    stop_on_repeat: int = 0,
    kv_cache: Any = None,
    chat_tokens: list[int] | None = None,
    **settings: Any,
) -> TextStream:
    """Generate text after a prompt: a stream of its pieces.

        for text in stream_text(model, tokenizer, "def main(", max_tokens=100, temperature=0.8):
            print(text, end="")
        answer = "".join(stream_text(model, tokenizer, [{"role": "user", "content": "Hello"}]))

    prompt is text, a list of messages for the chat template, or token ids; it is not repeated in the stream. The text
    ends after max_tokens, at an end-of-text token, before a stop sequence, or when the last stop_on_repeat tokens equal
    those before them: `reason` says which. num_samples rows are drawn at once: the first is streamed, `rows` has all.

    settings are those of `GPT.generate_batch`: temperature=1.0 (0 is greedy), top_k, top_p, min_p, repetition_penalty,
    seed=42 (the same text at each call; None draws anew), and decode (`fast.prepare` makes a faster one).

    With a kv_cache of one row, text or ids come after what it holds. A conversation is given whole, and the cache keeps
    the tokens that both begin with: only the rest is prefilled. chat_tokens are its token ids, if they are known.

    Arguments are checked here, before the first token: ValueError for bad ones, or if there is no chat template.
    """
    chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    prompt_tokens = new_tokens = chat_tokens or _encode(tokenizer, prompt, chat, kv_cache)
    if chat and kv_cache is not None:
        new_tokens = reuse_prefix(kv_cache, prompt_tokens)
    steps = model.generate_batch(
        [new_tokens],
        max_tokens,
        num_samples,
        stop_tokens=tokenizer.eos_tokens,
        suppress_tokens=tokenizer.gaps(model.config.vocab_size),
        kv_cache=kv_cache,
        **settings,
    )
    rows = [TextRow(tokenizer, stop, stop_on_repeat, continues=not chat) for _ in range(num_samples)]
    return TextStream(steps, rows, prompt_tokens)


def _encode(tokenizer: Tokenizer, prompt: Any, chat: bool, kv_cache: Any) -> list[int]:
    if chat:
        return tokenizer.encode_chat(prompt)
    if not isinstance(prompt, str):
        return list(prompt)
    within_text = kv_cache is not None and kv_cache.lengths.any()  # no token that begins a text, such as <s>
    return tokenizer.encode(prompt) if within_text else tokenizer.encode_prompt(prompt)


def reuse_prefix(kv_cache: Any, tokens: list[int]) -> list[int]:
    """Truncate a cache of one row to the prefix that it shares with tokens; returns the other tokens, at least one."""
    pairs = zip(kv_cache.tokens()[0], tokens[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    kv_cache.truncate(shared)
    return tokens[shared:]


def drop_old_turns(
    tokenizer: Tokenizer, messages: list[dict[str, str]], window: int, max_tokens: int
) -> tuple[list[dict[str, str]], list[int]]:
    """A conversation without its oldest turns, where an answer of max_tokens would not fit into the window with them.

    Returns what is left and its tokens. A system message at the beginning stays, and so does the last turn. The rest is
    cut to half a window, since a conversation whose beginning has changed must be prefilled anew.
    """
    tokens = tokenizer.encode_chat(messages)
    if len(tokens) + min(max_tokens, window // 2) <= window:
        return messages, tokens
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    kept = messages
    for start in turns[1:]:
        kept = [*system, *messages[start:]]
        tokens = tokenizer.encode_chat(kept)
        if len(tokens) <= window // 2:
            break
    return kept, tokens

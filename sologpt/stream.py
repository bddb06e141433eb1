"""Text from a model: streamed as whole characters, up to a stop sequence.

    for text in stream_text(model, tokenizer, "def main(", stop=["\\n\\n"], max_tokens=200, temperature=0.8):
        print(text, end="")

`stream_text` encodes the prompt and starts `GPT.generate_batch`. A `TextRow` turns the token ids of one row
into text.
"""

import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from gpt import GPT, Decoder, KVCache, Sampling
from sologpt.chat_template import TooLong
from sologpt.errors import UserError
from sologpt.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, str]]  # text, token ids, or messages for the chat template
Stop = str | Sequence[str]  # one or more stop sequences
Steps = Generator[list[int | None], None, list[str]]  # a token id for each row, None for a row that has ended


class TextRow:
    """The text of one generated sequence: token ids are pushed in, text comes out once it is certain.

    An incomplete character and the possible beginning of a stop sequence are held back. `reason` is empty
    until the row ends. Then it is 'stop' (an end-of-text token or a stop sequence; neither becomes text),
    'repeat' (the last stop_on_repeat tokens equal those before them), or the argument of `end`.

    continues: the row continues a text, so a leading space is kept. UserError for an empty stop sequence or a
    negative stop_on_repeat.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Stop = (), stop_on_repeat: int = 0, continues: bool = True
    ) -> None:
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        if "" in self.stop:
            raise UserError("stop must not be empty text: every text contains it")
        if stop_on_repeat < 0:
            raise UserError(f"stop_on_repeat must be at least 0, not {stop_on_repeat}")
        self.stop_on_repeat = stop_on_repeat
        self.eos_tokens = tokenizer.eos_tokens
        self.decoder = tokenizer.decoder(continues)
        self.tokens: list[int] = []  # all that were pushed, an end-of-text token included
        self.text = ""  # what has come out
        self.held = ""  # what is held back
        self.reason = ""
        self.seconds = 0.0  # from the start of generation to the last token, set by `stream_rows`
        self.first_seconds = 0.0  # and to the first one: the prompt is read before it

    def push(self, token: int) -> str:
        """Add a token id. Return the text that is now certain; `reason` is set if the row ends here."""
        self.tokens.append(token)
        if token in self.eos_tokens:
            return self.end("stop")
        text = self._add(self.decoder.decode(token))
        n = self.stop_on_repeat
        if n and len(self.tokens) >= 2 * n and self.tokens[-n:] == self.tokens[-2 * n : -n]:
            text += self.end("repeat")
        return text

    def end(self, reason: str) -> str:
        """End the row, unless it has ended. Return the text that was held back."""
        if self.reason:
            return ""
        text = self._add(self.decoder.flush())
        if not self.reason:  # the flushed text completes no stop sequence
            text += self._release(len(self.held))
            self.reason = reason
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the text and its statistics, as JSON types."""
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "reason": self.reason,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(len(self.tokens) / max(self.seconds, 1e-9), 1),
        }

    def _add(self, text: str) -> str:
        """Append decoded text to what is held back. Return what is now certain; set `reason` at a stop."""
        self.held += text
        found = [self.held.index(stop) for stop in self.stop if stop in self.held]
        if found:
            self.held = self.held[: min(found)]
            self.reason = "stop"
            return self._release(len(self.held))
        # Hold back the longest end of the text with which a stop sequence begins
        longest = max(map(len, self.stop), default=0)
        for n in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-n:]) for stop in self.stop):
                return self._release(len(self.held) - n)
        return self._release(len(self.held))

    def _release(self, n: int) -> str:
        text = self.held[:n]
        self.held = self.held[n:]
        self.text += text
        return text


def stream_rows(steps: Steps, rows: Sequence[TextRow]) -> Generator[list[str], None, None]:
    """Push the steps of `GPT.generate_batch` into rows. Yield the new text of each row until all have ended.

    Rows that are still running after max_tokens end by 'length'. Closing the generator closes steps.
    """
    started = time.perf_counter()
    try:
        for tokens in steps:
            texts = [""] * len(rows)
            for b, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                if token is not None and not row.reason:
                    texts[b] = row.push(token)
                    row.seconds = time.perf_counter() - started
                    row.first_seconds = row.first_seconds or row.seconds
            yield texts
            if all(row.reason for row in rows):
                return
    finally:
        steps.close()
    yield [row.end("length") for row in rows]


class TextStream(Iterator[str]):
    """An iterator over the text of the first row, a piece for each token (which may be empty).

    `rows` are all rows, `prompt_tokens` the encoded prompt. `text`, `tokens`, `reason` and `seconds` are
    those of the first row so far. Leaving a for loop early, by break or an exception, closes the stream: rows
    that are still running end by 'interrupt'.
    """

    def __init__(self, steps: Steps, rows: list[TextRow], prompt_tokens: list[int]) -> None:
        self.rows = rows
        self.prompt_tokens = prompt_tokens
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
        """Stop generating. Return the text that the first row held back."""
        self._texts.close()
        held = [row.end("interrupt") for row in self.rows]
        return held[0]

    def summary(self) -> str:
        """Say how many tokens there are, how fast they were generated, and why each row ended."""
        n_tokens = sum(len(row.tokens) for row in self.rows)
        later = sum(max(len(row.tokens) - 1, 0) for row in self.rows)
        first = max(row.first_seconds for row in self.rows)
        speed = later / max(*(row.seconds - first for row in self.rows), 1e-9)
        counts = Counter(row.reason for row in self.rows)
        reasons = ", ".join(reason if len(counts) == 1 else f"{reason} ({n})" for reason, n in counts.items())
        line = f"{n_tokens} tokens, the first after {1000 * first:,.0f} ms"
        return f"{line}, {speed:,.0f} tokens/s, ended by {reasons}"

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


def is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def encode_prompt(
    model: GPT, tokenizer: Tokenizer, prompt: Prompt, window: int, at_start: bool = True
) -> list[int]:
    """The token ids of a prompt, at least one. at_start: nothing comes before it. UserError for a bad one."""
    ids: Any = prompt
    if is_chat(prompt):
        ids = tokenizer.encode_chat(ids, window)
    elif isinstance(prompt, str):
        ids = tokenizer.encode_prompt(prompt) if at_start else tokenizer.encode(prompt)
    try:
        ids = model.token_ids(ids)
    except ValueError as e:
        raise UserError(str(e)) from e
    if not ids:
        raise UserError("the prompt is empty: it needs at least one token")
    return ids


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_tokens: int = 500,
    num_samples: int = 1,
    stop: Stop = (),
    stop_on_repeat: int = 0,
    seed: int | None = 42,
    kv_cache: KVCache | None = None,
    decode: Decoder | None = None,
    chat_tokens: list[int] | None = None,
    **sampling: Any,
) -> TextStream:
    """Generate text after a prompt: a stream of its pieces.

        for text in stream_text(model, tokenizer, "def main(", max_tokens=100, temperature=0.8):
            print(text, end="")
        answer = "".join(stream_text(model, tokenizer, [{"role": "user", "content": "Hello"}]))

    prompt is text, a list of messages for the chat template, or token ids; it is not part of the stream. The
    text ends after max_tokens, at an end-of-text token, before a stop sequence, or when the last
    stop_on_repeat tokens equal those before them: `reason` says which. num_samples rows are drawn at once:
    the first is streamed, `rows` has all.

    sampling are the fields of `gpt.Sampling`: temperature=1.0 (0 is greedy), top_k, top_p, min_p,
    repetition_penalty. The same seed gives the same text; None draws anew. decode is a faster decoder
    (`fast.prepare`).

    With a kv_cache of one row, text or ids follow what it holds. A conversation is given whole: the cache
    keeps the tokens that both begin with, and only the rest is prefilled. chat_tokens are its ids, if they
    are known.

    Arguments are checked at the call: UserError for bad ones, or if there is no chat template.
    """
    if not 0 <= max_tokens < 2**63:
        raise UserError(f"max_tokens must be a whole number from 0 to {2**63 - 1}, not {max_tokens}")
    if not 1 <= num_samples <= 2**16:
        raise UserError(f"num_samples must be a whole number from 1 to {2**16}, not {num_samples}")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise UserError(f"seed must be a whole number of at most 64 bits, not {seed}")
    at_start = kv_cache is None or not kv_cache.lengths.any()  # where a BOS token belongs
    chat = is_chat(prompt)
    prompt_tokens = chat_tokens or encode_prompt(
        model, tokenizer, prompt, model.config.sequence_len, at_start
    )
    try:
        Sampling(**sampling)
    except ValueError as e:
        raise UserError(str(e)) from e
    rows = [TextRow(tokenizer, stop, stop_on_repeat, continues=not chat) for _ in range(num_samples)]
    new_tokens = reuse_prefix(kv_cache, prompt_tokens) if chat and kv_cache is not None else prompt_tokens
    steps = model.generate_batch(
        [new_tokens],
        max_tokens,
        num_samples,
        stop_tokens=tokenizer.eos_tokens,
        seed=seed,
        suppress_tokens=tokenizer.gaps(model.config.vocab_size),
        kv_cache=kv_cache,
        decode=decode,
        **sampling,
    )
    return TextStream(steps, rows, prompt_tokens)


def reuse_prefix(kv_cache: KVCache, tokens: list[int]) -> list[int]:
    """Truncate a cache of one row to the prefix that it shares with tokens. Return the rest, at least one."""
    shared = 0
    for cached, token in zip(kv_cache.tokens()[0], tokens[:-1], strict=False):
        if cached != token:
            break
        shared += 1
    kv_cache.truncate(shared)
    return tokens[shared:]


def drop_old_turns(
    tokenizer: Tokenizer, messages: list[dict[str, str]], window: int, max_tokens: int
) -> tuple[list[dict[str, str]], list[int]]:
    """Drop the oldest turns of a conversation if the window has no room for an answer of max_tokens.

    Return the other messages and their tokens. A system message at the beginning stays, and so does the last
    turn. The rest is cut to half a window, since a conversation whose beginning has changed must be prefilled
    anew.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    *longer, last = [messages, *([*system, *messages[start:]] for start in turns[1:])]
    room = window - min(max_tokens, window // 2)
    for kept in longer:
        with suppress(TooLong):
            tokens = tokenizer.encode_chat(kept, window)
            if len(tokens) <= room:
                return kept, tokens
        room = window // 2
    return last, tokenizer.encode_chat(last, window)

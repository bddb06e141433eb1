"""Many requests, one model: continuous batching over the rows of one KVCache.

    engine = Engine(model, tokenizer, rows=8)
    for text in engine.generate("def main(", max_tokens=100, temperature=0.8):
        print(text, end="")
    engine.close()

`generate` may be called from many threads at once. One thread computes, in rounds: prefill a chunk of the
oldest prompt that waits, in an idle row, then decode one token of each running row.
"""

import math
import operator
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from gpt import GPT, Decoder, KVCache, Sampling
from sologpt import fast
from sologpt.device import free_memory, release_threads, zeros_on_demand
from sologpt.errors import RunError, UserError
from sologpt.stream import Prompt, Stop, TextRow, encode_prompt, is_chat
from sologpt.tokenizer import Tokenizer


class QueueFull(RunError):
    """As many requests wait as may wait."""


@dataclass
class Token:
    """A token of an answer. Log probabilities are the model's own, before the filters of `Sampling`."""

    id: int
    start: int  # the character at which it begins, in all that is sent
    logprob: float | None = None  # None if nobody asked, and for the first token of a prompt
    top: Sequence[tuple[int, float]] = ()  # the most likely ids in its place, with their log probabilities


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text that is certain, and tokens that are. The last has a reason.

    Without stop sequences each has one token. Its text is empty until a character is complete.
    """

    text: str
    tokens: list[Token]
    reason: str = ""  # stop, length, cancelled or error
    error: Exception | None = None


class Request:
    """A prompt and its answer, which `Engine.submit` starts. UserError for bad arguments.

    prompt: text, token ids, or messages. max_tokens: None is as many as fit. logprobs: so many of the most
    likely tokens with each token; None: no probabilities. echo: the first piece is the prompt. continues: the
    answer's leading space is kept, as after a text. receive: called by the engine's thread. sampling: the
    fields of `gpt.Sampling`.
    """

    def __init__(
        self,
        engine: "Engine",
        prompt: Prompt,
        max_tokens: int | None = None,
        stop: Stop = (),
        seed: int | None = 42,
        logprobs: int | None = None,
        echo: bool = False,
        continues: bool = True,
        receive: Callable[[Piece], None] = lambda piece: None,
        **sampling: Any,
    ) -> None:
        model, tokenizer, window = engine.model, engine.tokenizer, engine.max_len
        ids = self.prompt = encode_prompt(model, tokenizer, prompt, window)
        try:
            self.sampling = Sampling(**sampling)
        except ValueError as e:
            raise UserError(str(e)) from e
        if unknown := {*ids} - tokenizer.ids:
            raise UserError(f"token id {min(unknown)} of the prompt is not in the vocabulary")
        if len(ids) > window:
            raise UserError(f"the prompt has {len(ids)} tokens, more than the context of {window}")
        for name, value in (("max_tokens", max_tokens), ("logprobs", logprobs)):
            if operator.index(value or 0) < 0:
                raise UserError(f"{name} must be at least 0, not {value}")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise UserError(f"seed must be a whole number of at most 64 bits, not {seed}")
        room = window - len(ids) + 1  # the last token is drawn, but not read
        self.max_tokens = room if max_tokens is None else min(max_tokens, room)
        self.generator = torch.Generator(model.device)
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.answer = TextRow(tokenizer, stop, continues=continues and not is_chat(prompt))
        self.logprobs, self.echo, self.receive = logprobs, echo, receive
        self.held = [Token(ids[0], 0)] if echo else []  # tokens that are not sent yet
        self.offset = 0  # characters of the prompt that were sent
        self.cached = 0  # tokens of the prompt that needed no prefill
        self.row = 0  # of the cache, while the prompt is prefilled
        self.seen: Tensor  # the tokens so far, (1, V), from then on
        self.cancelled = False  # may be set by any thread, at any time

    def send(self, text: str, error: Exception | None = None) -> None:
        """Send text that is certain, with its tokens. Those of a stop sequence are never sent."""
        answer, tokens = self.answer, self.held
        stopped_by_text = answer.reason == "stop" and answer.tokens[-1] not in answer.eos_tokens
        if stopped_by_text or (answer.stop and not answer.reason):
            certain = self.offset + len(answer.text)
            tokens = [token for token in self.held if token.start < certain]
        self.held = self.held[len(tokens) :]
        if tokens or text or answer.reason:
            self.receive(Piece(text, tokens, answer.reason, error))

    def end(self, reason: str, error: Exception | None = None) -> None:
        self.send(self.answer.end(reason), error)


class Rows(KVCache):
    """A cache whose first rows run, so that a decoder reads a slice of it.

    Idle rows keep the tokens of requests that have ended, for prompts that begin with the same ones.
    """

    def __init__(self, model: GPT, rows: int, max_len: int) -> None:
        super().__init__(model.config, rows, max_len, "meta", model.dtype)
        self.k, self.v, self.ids = (zeros_on_demand(x, model.device) for x in (self.k, self.v, self.ids))
        self.ended = torch.zeros(rows, dtype=torch.float64)  # when the last answer in each row ended

    def take(self, prompt: list[int], n_running: int) -> int:
        """Return an idle row. It holds what a prompt shares with any row."""
        ids = self.ids.new_tensor(prompt)
        equal = (self.ids[:, : len(ids)] == ids).long().cumprod(dim=1).sum(dim=1)  # (rows,)
        shared = torch.minimum(equal.cpu(), self.lengths)
        b = source = int(shared.argmax())
        n = int(shared[source])
        if source < n_running or 2 * n < int(self.lengths[source]):
            # It runs, or most of it would be lost: copy to the row that ended first
            b = n_running + int(self.ended[n_running:].argmin())
            for x in (self.k, self.v):  # (n_layer, rows, G, max_len, D)
                x[:, b, :, :n] = x[:, source, :, :n]
            self.ids[b] = self.ids[source]
        for x in (self.k, self.v):  # NaNs would reach the rows beside it: even masked, 0 * NaN is NaN
            x[:, b, :, n : int(self.lengths[b])] = 0
        self.lengths[b] = n
        return b

    def swap(self, a: int, b: int) -> None:
        if a == b:
            return
        n = int(self.lengths[[a, b]].max())
        for x in (self.k, self.v):  # (n_layer, rows, G, max_len, D)
            x[:, [a, b], :, :n] = x[:, [b, a], :, :n]
        for y in (self.ids, self.lengths, self.ended):
            y[[a, b]] = y[[b, a]]

    def clear(self, index: slice, beyond: int = 0) -> None:
        """Clear rows after an error, which may have written up to `beyond` slots past their lengths."""
        n = int(self.lengths[index].max()) + beyond  # all slots would take all of their memory
        for x in (self.k, self.v):  # (n_layer, rows, G, max_len, D)
            x[:, index, :, :n] = 0
        self.lengths[index] = 0


class Engine:
    """Generates for many requests at once.

    rows: requests that run at once. max_waiting: requests that may wait for a row. chunk: tokens that are
    prefilled between two steps of decoding. max_len: tokens of a prompt and its answer; 0 is the window, or
    less if such a cache would take more than a quarter of the free memory. decode: as for `GPT.generate`.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        rows: int = 8,
        decode: Decoder | None = None,
        max_waiting: int = 128,
        chunk: int = 256,
        max_len: int = 0,
    ) -> None:
        for name, value, least in (("rows", rows, 1), ("chunk", chunk, 1), ("max_waiting", max_waiting, 0)):
            if value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        window = model.config.sequence_len
        if not 0 <= max_len <= window:
            raise UserError(f"max_len {max_len} must be at most the window, {window} tokens")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.decode = decode or fast.prepare(model, rows=rows)
        self.prefill = getattr(self.decode, "prefill", model.prefill)
        self.never = torch.tensor(tokenizer.gaps(model.config.vocab_size), device=model.device).long()
        self.max_len = max_len or fitting_len(model, rows)
        self.capacity = rows + max_waiting
        self.chunk = chunk
        self.cache = Rows(model, rows, self.max_len)
        self.running: list[Request] = []  # request b is in row b
        self.prefilling: Request | None = None
        self.active: list[Request] = []  # by age: those that run, the one that is prefilled, those that wait
        self.closed = False
        self.changed = threading.Condition()  # guards changes of these two
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        release_threads()  # this one's: the engine's thread needs the cores
        self.thread.start()

    # ---- Any thread
    def generate(self, prompt: Prompt, max_tokens: int = 500, **settings: Any) -> Generator[str, None, str]:
        """Yield the text after a prompt, a piece for each token. Return why it ended: stop or length.

        settings are those of `Request`. Closing the generator cancels the request.
        """
        pieces: SimpleQueue[Piece] = SimpleQueue()
        request = self.request(prompt, max_tokens, receive=pieces.put, **settings)
        self.submit(request)

        def texts() -> Generator[str, None, str]:
            try:
                while not (piece := pieces.get()).reason:
                    yield piece.text
                if piece.error:
                    raise piece.error
                yield piece.text
                return piece.reason
            finally:
                request.cancelled = True

        return texts()

    def request(self, prompt: Prompt, max_tokens: int | None = None, **settings: Any) -> Request:
        """Return a `Request`, which has the settings."""
        return Request(self, prompt, max_tokens, **settings)

    def submit(self, *requests: Request) -> None:
        """Start requests, all or none. QueueFull if there are too many, RunError if the engine is closed."""
        with self.changed:
            if self.closed:
                raise RunError("the engine is closed")
            if len(self.active) + len(requests) > self.capacity:
                raise QueueFull(f"{len(self.active)} requests run or wait, and {self.capacity} may")
            self.active += requests
            self.changed.notify()

    def close(self) -> None:
        """Stop after this round. Requests that have not ended end with an error."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    # ---- The engine's thread
    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.active or self.closed)
                if self.closed:
                    break
            try:
                self._round()
            except Exception as e:  # such as out of memory: fails these requests, but not the engine
                self.cache.clear(slice(None), beyond=self.chunk)
                self._end(self.active, "error", e)
        self._end(self.active, "error", RunError("the engine was closed"))

    @torch.inference_mode()
    def _round(self) -> None:
        self._end([request for request in self.active if request.cancelled], "cancelled")
        room = self.chunk
        while room and (request := self.prefilling or self._admit()):
            room -= self._prefill(request, room)
        if self.running:
            self._decode()

    def _end(self, requests: list[Request], reason: str, error: Exception | None = None) -> None:
        for request in requests:
            request.end(reason, error)
        self._retire()

    def _retire(self) -> None:
        """Take out the requests that have ended."""
        if self.prefilling and self.prefilling.answer.reason:
            self.prefilling = None
        for b in reversed(range(len(self.running))):
            if reason := self.running[b].answer.reason:
                self.cache.ended[b] = time.monotonic()
                if reason == "error":
                    self.cache.clear(slice(b, b + 1))
                # The last one that runs takes its row
                self.running[b] = self.running[-1]
                self.running.pop()
                self.cache.swap(b, len(self.running))
        with self.changed:
            self.active = [request for request in self.active if not request.answer.reason]

    def _admit(self) -> Request | None:
        """Give the oldest waiting request an idle row."""
        n_running = len(self.running)
        if n_running == self.cache.batch_size or n_running == len(self.active):
            return None
        request = self.prefilling = self.active[n_running]
        known = [] if request.echo else request.prompt[:-1]  # the others are read for their logits
        request.row = self.cache.take(known, n_running)
        request.cached = int(self.cache.lengths[request.row])
        request.seen = self.never.new_zeros(1, self.model.config.vocab_size, dtype=torch.bool)
        request.seen[0, request.prompt] = True
        return request

    def _prefill(self, request: Request, room: int) -> int:
        """Read up to room tokens of a prompt. After the last one, the request runs. Return how many."""
        row = self.cache.rows(slice(request.row, request.row + 1))
        n = int(row.lengths)
        chunk = request.prompt[n : n + room]
        if request.echo:
            x = self.model.hidden(self.never.new_tensor([chunk]), row)  # (1, T, C)
            parts = x[0].split(64)  # bounds the memory for logits
            rows = (logits for part in parts for logits in self.model.logits(part))
            for token, logits in zip(request.prompt[n + 1 :], rows, strict=False):
                request.held.append(self._token(token, 0, logits, request.logprobs))
            logits = self.model.logits(x[:, -1])  # (1, V)
        else:
            logits = self.prefill([chunk], row)
        if n + len(chunk) == len(request.prompt):
            self.cache.swap(request.row, len(self.running))
            self.running.append(request)
            self.prefilling = None
            if request.echo:
                self._send_prompt(request)
            if request.max_tokens:
                self._draw(request, logits)
            else:
                request.end("length")
            self._retire()
        return len(chunk)

    def _send_prompt(self, request: Request) -> None:
        """Send the prompt as the first piece of its answer."""
        decoder, text = self.tokenizer.decoder(), ""
        for token in request.held:
            token.start = len(text)
            text += decoder.decode(token.id)
        text += decoder.flush()
        request.receive(Piece(text, request.held))
        request.held, request.offset = [], len(text)

    def _decode(self) -> None:
        """Decode one token of each running row, and draw the next ones."""
        ids = self.never.new_tensor([request.answer.tokens[-1] for request in self.running])
        logits = self.decode(ids, self.cache.rows(slice(0, len(ids))))  # (B, V)
        for request, row in zip(self.running, logits, strict=True):
            self._draw(request, row[None])
        self._retire()

    def _draw(self, request: Request, logits: Tensor) -> None:
        """Draw a token from logits (1, V), and send it."""
        answer = request.answer
        try:
            known = logits.index_fill(1, self.never, -math.inf)
            token = int(request.sampling.draw(known, request.generator, request.seen))
        except RuntimeError as e:  # the logits are not finite
            request.end("error", e)
            return
        request.seen[0, token] = True
        start = request.offset + len(answer.text) + len(answer.held)
        request.held.append(self._token(token, start, logits[0], request.logprobs))
        text = answer.push(token)
        if len(answer.tokens) == request.max_tokens:
            text += answer.end("length")
        request.send(text)

    def _token(self, token: int, start: int, logits: Tensor, logprobs: int | None) -> Token:
        """A token with what logits (V,) say about it."""
        if logprobs is None:
            return Token(token, start)
        distribution = logits.log_softmax(dim=-1)
        known = distribution.index_fill(0, self.never, -math.inf)
        values, ids = known.topk(min(logprobs, len(known) - len(self.never)))
        top = [*zip(ids.tolist(), values.tolist(), strict=True)]
        return Token(token, start, float(distribution[token]), top)


def fitting_len(model: GPT, rows: int) -> int:
    """The window, or fewer tokens if a cache of so many rows would take over a quarter of the free memory."""
    of_a_token = KVCache(model.config, rows, 1, "meta", model.dtype).nbytes
    return max(1, min(model.config.sequence_len, free_memory(model.device) // 4 // of_a_token))

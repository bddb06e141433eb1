"""Conversations as rows of token ids, and which of them are trained.

Trained are what the assistant says and the token that ends its turn: without that one, a model never stops.
A chat template may have it between {% generation %} and {% endgeneration %}. If not, an answer is what a
render with it adds to the render of the messages before it, with the generation prompt.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from sologpt.chat_template import BEGIN, END, OWN, Cut
from sologpt.errors import UserError
from sologpt.tokenizer import Tokenizer

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
ROLE_TOKENS = 16  # what a template writes around a message, generously


@dataclass
class Row:
    """Token ids, (T,) int64, and whether each is trained: predicted from those before it, (T,) bool."""

    ids: np.ndarray
    trained: np.ndarray


@dataclass
class Example:
    """A conversation, and what became of it. place is its file and line, for errors."""

    place: str
    messages: list[dict[str, str]]
    rows: list[Row] = field(default_factory=list)
    shortened: int = 0  # rows that begin after the oldest turns: with them they are too long
    too_long: int = 0  # dropped rows: the last turn alone is too long
    untrained: int = 0  # dropped rows: no token is trained


@dataclass
class Job:
    """Messages to render, of which the last n answers are trained."""

    example: Example
    messages: list[dict[str, str]]
    n_answers: int
    is_shortened: bool = False

    def cuts(self) -> list[Cut]:
        """Return two renders for each answer: up to its generation prompt, and up to its end."""
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [cut for i in answers[-self.n_answers :] for cut in ((i, True), (i + 1, False))]

    def shorten(self, tokenizer: Tokenizer, excess: int) -> "Job | None":
        """Drop the oldest turns, about `excess` tokens. Keep a system message. None if one turn is left."""
        n_system = int(self.messages[0]["role"] == "system")
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "user" and i > n_system]
        start = n_system
        for turn in turns:
            for message in self.messages[start:turn]:
                excess -= sum(len(tokenizer.encode(text)) for text in message.values()) + ROLE_TOKENS
            start = turn
            if excess <= 0:
                break
        if start == n_system:
            return None
        messages = self.messages[:n_system] + self.messages[start:]
        return replace(self, messages=messages, is_shortened=True)


def encode_examples(
    tokenizer: Tokenizer, examples: Iterable[Example], sequence_len: int
) -> Iterator[Example]:
    """Give each example its rows, of at most sequence_len tokens: usually one.

    A template may rewrite old turns: Qwen 3's drops what the assistant thought in them. The next answer is
    then in a row of its own, in which older ones are not trained.

    UserError, with the place, if the template rejects a conversation, begins an answer otherwise than with
    the generation prompt, or does not end it with a special token.
    """
    for example in examples:
        jobs = [Job(example, *until_last_answer(example.messages))]
        while jobs:
            for job, row in encode_job(tokenizer, jobs.pop(0)):
                excess = len(row.ids) - sequence_len
                if excess <= 0 and row.trained[1:].any():
                    example.rows.append(row)
                    example.shortened += job.is_shortened
                elif excess <= 0:
                    example.untrained += 1
                elif shorter := job.shorten(tokenizer, excess):
                    jobs.append(shorter)
                else:
                    example.too_long += 1
        yield example


def until_last_answer(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], int]:
    """Return the messages up to the last answer, and the number of answers."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1] + 1], len(answers)


# -----------------------------------------------------------------------------
# One conversation


class Piece(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    trained: bool


def encode_job(tokenizer: Tokenizer, job: Job) -> Iterator[tuple[Job, Row]]:
    """Yield the rows of a job, each with the job that would give this row alone."""
    has_tag = GENERATION.search(tokenizer.chat_template) is not None
    cuts = [(len(job.messages), False)] if has_tag else job.cuts()
    try:
        texts = tokenizer.render_cuts(job.messages, cuts, mark_generation=has_tag)
        rows = [tagged_pieces(texts[0])] if has_tag else answer_pieces(texts)
        encoded = [encode_pieces(tokenizer, pieces) for pieces in rows]
    except UserError as e:
        raise UserError(f"{job.example.place}: {e}") from e
    if has_tag:
        yield job, encoded[0]
        return
    ends = [n for n, is_prompt in cuts if not is_prompt]
    for pieces, row in zip(rows, encoded, strict=True):
        n_answers = sum(piece.trained for piece in pieces)
        end = ends[n_answers - 1]
        del ends[:n_answers]
        yield replace(job, messages=job.messages[:end], n_answers=n_answers), row


def answer_pieces(texts: Sequence[str]) -> list[list[Piece]]:
    """Return the pieces of each row, from the renders of `Job.cuts`."""
    rows: list[list[Piece]] = []
    row_text = ""
    for prompt, text in zip(texts[::2], texts[1::2], strict=True):
        if not text.startswith(prompt):
            raise UserError("the chat template does not begin an answer with its generation prompt")
        answer = text[len(prompt) :]
        answer = answer[: end_of_turn(answer)]
        if not rows or not prompt.startswith(row_text):
            rows.append([])
            row_text = ""
        rows[-1] += [Piece(prompt[len(row_text) :], False), Piece(answer, True)]
        row_text = prompt + answer
    return rows


def tagged_pieces(text: str) -> list[Piece]:
    """Return the pieces of a render with BEGIN and END: what is between them is trained.

    So is the token that ends the turn, if the template writes it right behind the tag.
    """
    parts = re.split(f"[{BEGIN}{END}]", text)
    for i in range(1, len(parts), 2):
        own = list(OWN.finditer(parts[i]))
        if not own or parts[i][own[-1].end() :].strip():
            behind = parts[i + 1]
            token = OWN.search(behind)
            if token and not behind[: token.start()].strip():
                parts[i] += behind[: token.end()]
                parts[i + 1] = behind[token.end() :]
    if len(parts) > 1:
        parts[-2] = parts[-2][: end_of_turn(parts[-2])]
        del parts[-1]
    return [Piece(part, i % 2 == 1) for i, part in enumerate(parts)]


def end_of_turn(answer: str) -> int:
    """Return where the special token ends that ends an answer. Only whitespace may follow it."""
    own = list(OWN.finditer(answer))
    if not own or answer[own[-1].end() :].strip():
        raise UserError("the chat template ends an answer without a special token: a model would never stop")
    return own[-1].end()


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Row:
    """Encode each piece as what follows the one before it. No token is in two pieces."""
    ids: list[int] = []
    trained: list[bool] = []
    before = ""
    for piece in pieces:
        new = encode_after(tokenizer, before, piece.text)
        ids += new
        trained += [piece.trained] * len(new)
        before = piece.text
    return Row(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool))


def encode_after(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """Encode a text that follows another, at a boundary of tokens. Special tokens separate what they part."""
    own = list(OWN.finditer(before))
    for context in (before[own[-1].start() :] if own else before, "\n"):
        head = tokenizer.encode_rendered(context)
        both = tokenizer.encode_rendered(context + text)
        if both[: len(head)] == head:
            return both[len(head) :]
    return tokenizer.encode_rendered(text)

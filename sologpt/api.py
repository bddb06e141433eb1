"""What OpenAI's API says: the fields of a request, checked, and an answer's JSON. Nothing about HTTP."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

from sologpt import errors
from sologpt.chat import answer_sampling
from sologpt.chat_template import RESERVED, as_text
from sologpt.conversations import encode_after
from sologpt.engine import Engine, Piece, QueueFull, Request, Token
from sologpt.errors import UserError

MAX_CHOICES = 128  # answers to one request
MAX_STOPS = 16
MAX_LOGPROBS = 20


class APIError(Exception):
    """What is wrong with a request. param: the field that is."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def api_error(e: Exception) -> APIError:
    """The error for the client of any exception. That of a bug says no more than that it is one."""
    if isinstance(e, APIError):
        return e
    if isinstance(e, UserError):
        return APIError(400, errors.one_line(e))
    if isinstance(e, QueueFull):
        return APIError(503, f"too many requests: {e}", code="overloaded")
    message, _ = errors.describe(e, "a smaller --context or --rows")
    return APIError(500, message or "internal error: see the server's stderr")


# -----------------------------------------------------------------------------
# What a request says


class Field(NamedTuple):
    """What a field must be: in words, and as a check."""

    what: str
    is_valid: Callable[[Any], bool]


def whole_number(least: int, most: int) -> Field:
    return Field(f"a whole number from {least} to {most}", lambda x: type(x) is int and least <= x <= most)


def is_text(x: Any) -> bool:
    return isinstance(x, str)


def is_list_of(x: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and len(x) > 0 and all(map(is_valid, x))


def is_ids(x: Any) -> bool:
    return is_list_of(x, lambda i: type(i) is int)


def is_prompt(x: Any) -> bool:
    return is_text(x) or is_ids(x) or is_list_of(x, is_text) or is_list_of(x, is_ids)


def is_stop(x: Any) -> bool:
    texts = [x] if is_text(x) else x
    return texts == [] or (is_list_of(texts, is_text) and "" not in texts and len(texts) <= MAX_STOPS)


TEXT = Field("text", is_text)
NUMBER = Field("a number", lambda x: type(x) in (int, float))
SWITCH = Field("true or false", lambda x: type(x) is bool)
OBJECT = Field("an object", lambda x: isinstance(x, dict))
SAMPLING = dict(  # their ranges are checked by gpt.Sampling
    temperature=NUMBER, top_p=NUMBER, min_p=NUMBER, repetition_penalty=NUMBER, top_k=whole_number(0, 2**31)
)
COMMON = SAMPLING | dict(
    model=TEXT,
    user=TEXT,
    stream=SWITCH,
    stream_options=OBJECT,
    max_tokens=whole_number(0, 2**31),
    n=whole_number(1, MAX_CHOICES),
    seed=whole_number(-(2**63), 2**64 - 1),
    stop=Field(f"text, or a list of at most {MAX_STOPS} texts, none empty", is_stop),
)
CHAT = COMMON | dict(
    messages=Field("a list of at least one message", lambda x: is_list_of(x, OBJECT.is_valid)),
    max_completion_tokens=COMMON["max_tokens"],
    logprobs=SWITCH,
    top_logprobs=whole_number(0, MAX_LOGPROBS),
    continue_final_message=SWITCH,
)
COMPLETION = COMMON | dict(
    prompt=Field("text, token ids, or a list of either, and not empty", is_prompt),
    logprobs=whole_number(0, MAX_LOGPROBS),
    echo=SWITCH,
)
ROLES = ("system", "developer", "user", "assistant")
MESSAGE = dict(
    role=Field(f"one of {', '.join(ROLES)}", lambda x: x in ROLES),
    content=Field("text, or a list of text parts", lambda x: x != [] and as_text(x) is not None),
)
NEUTRAL: dict[str, Any] = dict(  # values that ask for nothing, of fields that are not there
    frequency_penalty=0, presence_penalty=0, logit_bias={}, tools=[], functions=[], best_of=1, suffix="",
    response_format={"type": "text"}, store=False, metadata={},
)  # fmt: skip


def read_fields(
    values: dict[str, Any], known: dict[str, Field], *required: str, where: str = ""
) -> dict[str, Any]:
    """The fields that are set, all of them known and valid. where: before their names in an error."""
    fields = {}
    for name, value in values.items():
        param = where + name[:100]
        if value is None or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name not in known:
            raise APIError(400, f"the field {param!r} is not supported", param)
        if not known[name].is_valid(value):
            raise APIError(400, f"{param} must be {known[name].what}, not {str(value)[:100]!r}", param)
        fields[name] = value
    for name in required:
        if name not in fields:
            raise APIError(400, f"{where}{name} is missing: {known[name].what}", where + name)
    return fields


def read_messages(values: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The messages of a chat, as {"role": ..., "content": text}."""
    messages = []
    for i, value in enumerate(values):
        given = {key: x for key, x in value.items() if x or key in MESSAGE}  # answers have empty fields
        fields = read_fields(given, MESSAGE, *MESSAGE, where=f"messages[{i}].")
        role = "system" if fields["role"] == "developer" else fields["role"]
        messages.append({"role": role, "content": as_text(fields["content"]) or ""})
    return messages


# -----------------------------------------------------------------------------
# Chat and text completions


class API:
    """What they have in common."""

    fields: ClassVar[dict[str, Field]]
    required: ClassVar[str]  # field
    prefix: ClassVar[str]  # of an id
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer

    def read(self, fields: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The prompts, and arguments of `Engine.request`."""
        raise NotImplementedError

    def content(self, text: str, is_first: bool | None) -> dict[str, Any]:
        """The text of a choice. is_first: of its chunks; None: it is the whole text."""
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        raise NotImplementedError

    def requests(self, fields: dict[str, Any], receive: Callable[[int, Piece], None]) -> list[Request]:
        """The requests for all choices: n for each prompt. receive gets the index of a choice, too."""
        (prompts, settings), n = self.read(fields), fields.get("n", 1)
        most = min(MAX_CHOICES, self.engine.capacity)
        if len(prompts) * n > most:
            raise APIError(400, f"{len(prompts)} prompts, {n} times each, are more than {most}", "n")
        settings |= {key: fields[key] for key in (*SAMPLING, "stop") if key in fields}
        seed = fields.get("seed")
        requests: list[Request] = []
        for prompt in prompts:
            ids = self.tokenizer.encode_prompt(prompt) if is_text(prompt) else prompt
            for i in range(n):
                settings["seed"] = None if seed is None else seed + i
                settings["receive"] = partial(receive, len(requests))
                requests.append(self.engine.request(ids, **settings))
        return requests

    def choice(self, index: int, request: Request, piece: Piece, is_first: bool | None) -> dict[str, Any]:
        return {
            "index": index,
            **self.content(piece.text, is_first),
            "logprobs": None if request.logprobs is None else self.logprobs(piece.tokens),
            "finish_reason": piece.reason or None,
        }


class Chat(API):
    fields, required = CHAT, "messages"
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def read(self, fields: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        if "top_logprobs" in fields and not fields.get("logprobs"):
            raise APIError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        goes_on = fields.get("continue_final_message", False)
        ids = self.encode(read_messages(fields["messages"]), goes_on)
        return [ids], answer_sampling(self.tokenizer) | {
            "max_tokens": fields.get("max_completion_tokens", fields.get("max_tokens")),
            "logprobs": fields.get("top_logprobs", 0) if fields.get("logprobs") else None,
            "continues": goes_on,
        }

    def encode(self, messages: list[dict[str, str]], goes_on: bool) -> list[int]:
        """Their token ids. goes_on: they end within the last message, which is the assistant's."""
        if not goes_on or not self.tokenizer.chat_template:
            return self.tokenizer.encode_chat(messages, self.engine.max_len)
        *earlier, last = messages
        if last["role"] != "assistant":
            raise APIError(400, "continue_final_message needs a last message of the assistant", "messages")
        before = self.tokenizer.render_chat(earlier)
        content = RESERVED.sub("", last["content"])
        return self.tokenizer.encode_rendered(before) + encode_after(self.tokenizer, before, content)

    def content(self, text: str, is_first: bool | None) -> dict[str, Any]:
        if is_first is None:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"delta": ({"role": "assistant"} if is_first else {}) | {"content": text}}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        special = {*self.tokenizer.special_ids.values()}

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            data = self.tokenizer.token_bytes(token)
            text = data.decode("utf-8", "replace")
            return {"token": text, "logprob": logprob, "bytes": None if token in special else [*data]}

        content = [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*other) for other in token.top]}
            for token in tokens
            if token.id not in self.tokenizer.eos_tokens
        ]
        return {"content": content, "refusal": None}


class Completion(API):
    fields, required = COMPLETION, "prompt"
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def read(self, fields: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        prompt = fields["prompt"]
        prompts = [prompt] if is_text(prompt) or is_ids(prompt) else prompt
        defaults = {"max_tokens": 16, "logprobs": None, "echo": False}  # 16 is OpenAI's
        return prompts, {key: fields.get(key, default) for key, default in defaults.items()}

    def content(self, text: str, is_first: bool | None) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        top: list[dict[str, float] | None] = []
        for token in tokens:
            by_text: dict[str, float] = {}
            for other, logprob in (*token.top, (token.id, token.logprob)):
                if logprob is not None:
                    by_text.setdefault(self.spell(other), logprob)  # two ids may have the same text
            top.append(by_text or None)
        return {
            "tokens": [self.spell(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top,
            "text_offset": [token.start for token in tokens],
        }

    def spell(self, token: int) -> str:
        """A token's text, or its bytes if they are no whole characters."""
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

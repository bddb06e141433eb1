"""The OpenAI API for one model, and a page to chat: python -m sologpt.serve out/tiny

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "def main(", "max_tokens": 100}'

Beyond OpenAI's fields it takes top_k, min_p, repetition_penalty, and for chat continue_final_message: the
answer goes on with the last message, which is the assistant's. A field that it does not know is an error.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import re
import socket
import sys
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch

from sologpt import errors
from sologpt.chat_template import RESERVED
from sologpt.conversations import encode_after
from sologpt.engine import Engine, Piece, QueueFull, Request, Token
from sologpt.errors import RunError, UserError
from sologpt.hf import Parser
from sologpt.load import describe_run, find_checkpoint, load_model
from sologpt.quantize import KINDS
from sologpt.tokenizer import Tokenizer

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as e:
    message = f"the server needs the extra 'serve': pip install starlette uvicorn ({e})"
    if __name__ == "__main__":
        sys.exit(f"error: {message}")
    raise ImportError(message) from e

MAX_BODY = 2**22  # bytes of a request
SECONDS = 30  # for a client to send its headers, then its body; for answers to end after SIGTERM
MAX_CHOICES = 128  # answers to one request
MAX_STOPS = 16
MAX_LOGPROBS = 20


def log(line: str) -> None:
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# Errors, in OpenAI's form


class APIError(Exception):
    """What is wrong with a request. param: the field that is."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}
        return JSONResponse(self.body(), self.status, headers.get(self.status))


def api_error(e: Exception) -> APIError:
    """The error for the client of any exception. That of a bug says no more than that it is one."""
    if isinstance(e, APIError):
        return e
    if isinstance(e, HTTPException):
        return APIError(e.status_code, e.detail)
    if isinstance(e, UserError):
        return APIError(400, errors.one_line(e))
    if isinstance(e, QueueFull):
        return APIError(503, f"too many requests: {e}", code="overloaded")
    message, _ = errors.describe(e, "a smaller --context or --rows")
    return APIError(500, message or "internal error: see the server's stderr")


async def respond_to_error(http: HTTPRequest, e: Exception) -> Response:
    error = api_error(e)
    log(f"{http.method} {http.url.path} {error.status}: {error}")
    return error.response()


# -----------------------------------------------------------------------------
# What a request says

SAMPLING = dict(temperature=float, top_p=float, top_k=int, min_p=float, repetition_penalty=float)
COMMON = SAMPLING | dict(
    model=str, stream=bool, stream_options=dict, max_tokens=int, stop=(str, list), seed=int, n=int, user=str
)
LIMITS = dict(
    n=(1, MAX_CHOICES),
    max_tokens=(0, 2**31),
    max_completion_tokens=(0, 2**31),
    top_logprobs=(0, MAX_LOGPROBS),
)
NEUTRAL: dict[str, Any] = dict(  # values that ask for nothing, of fields that are not there
    frequency_penalty=0, presence_penalty=0, logit_bias={}, tools=[], functions=[], best_of=1, suffix="",
    response_format={"type": "text"}, store=False, metadata={},
)  # fmt: skip
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
TYPE_NAMES |= {dict: "an object"}


async def read_body(http: HTTPRequest) -> dict[str, Any]:
    """The JSON object in the body of a request."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise APIError(415, "the header Content-Type must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for part in http.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise APIError(413, f"the body has more than {MAX_BODY} bytes")
    except TimeoutError as e:
        raise APIError(408, f"the body has not arrived within {SECONDS} s") from e
    except ClientDisconnect as e:
        raise APIError(400, "the client has left before the end of the body") from e
    try:
        fields = json.loads(body.decode())
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogate, no NaN
    except (ValueError, RecursionError) as e:
        raise APIError(400, f"the body is not valid JSON: {str(e)[:200]}") from e
    if not isinstance(fields, dict):
        raise APIError(400, "the body must be a JSON object")
    return fields


def read_fields(values: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """The fields of a body that are set, in their types and limits."""
    fields = {}
    for name, value in values.items():
        if value is None or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name not in kinds:
            raise APIError(400, f"the field {name[:100]!r} is not supported", name[:100])
        allowed = kinds[name] if isinstance(kinds[name], tuple) else (kinds[name],)
        if not (type(value) in allowed or (type(value) is int and float in allowed)):
            expected = " or ".join(TYPE_NAMES[kind] for kind in allowed)
            raise APIError(400, f"{name} must be {expected}, not {str(value)[:100]!r}", name)
        least, most = LIMITS.get(name, (None, None))
        if least is not None and not least <= value <= most:
            raise APIError(400, f"{name} must be from {least} to {most}, not {value}", name)
        fields[name] = value
    return fields


def read_stop(fields: dict[str, Any]) -> list[str]:
    stop = fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(text, str) and text for text in stops) or len(stops) > MAX_STOPS:
        raise APIError(400, f"stop must be text, or a list of at most {MAX_STOPS} texts, none empty", "stop")
    return stops


def read_prompts(fields: dict[str, Any]) -> list[str | list[int]]:
    """The prompts of a completion: a text, token ids, or a list of either."""

    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and len(value) > 0 and all(type(i) is int for i in value)

    prompt = fields.get("prompt")
    prompts: Any = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    if not prompts or not (all(isinstance(p, str) for p in prompts) or all(map(is_ids, prompts))):
        raise APIError(400, "prompt must be text, token ids, or a list of either, and not empty", "prompt")
    return prompts


def read_messages(fields: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a chat, as {"role": ..., "content": text}."""
    messages = []
    for i, message in enumerate(fields.get("messages", [])):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise APIError(400, f"{where} must be an object", "messages")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            raise APIError(400, f"{where}: role must be system, user or assistant", "messages")
        for key, value in message.items():
            if value and key not in ("role", "content"):
                raise APIError(400, f"{where}: the field {key[:100]!r} is not supported", "messages")
        if isinstance(content, list):
            is_text = [
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
                for p in content
            ]
            content = "".join(part["text"] for part in content) if all(is_text) else None
        if not isinstance(content, str):
            raise APIError(400, f"{where}: content must be text, or a list of text parts", "messages")
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    if not messages:
        raise APIError(400, "messages must be a list of at least one message", "messages")
    return messages


def encode_messages(
    tokenizer: Tokenizer, messages: list[dict[str, str]], goes_on: bool, window: int
) -> list[int]:
    """The token ids of a chat. goes_on: they end within the last message, which is the assistant's."""
    if not goes_on:
        return tokenizer.encode_chat(messages, window)
    *earlier, last = messages
    if last["role"] != "assistant":
        raise APIError(400, "continue_final_message needs a last message of the assistant", "messages")
    before = tokenizer.render_chat(earlier)
    content = RESERVED.sub("", last["content"])
    return tokenizer.encode_rendered(before) + encode_after(tokenizer, before, content)


# -----------------------------------------------------------------------------
# Answers


class Job:
    """The choices of one HTTP request: an asynchronous iterator of (choice, piece) until all have ended."""

    def __init__(self, http: HTTPRequest) -> None:
        self.title = f"{http.method} {http.url.path}"
        self.requests: list[Request] = []
        self.n = 1  # choices with the same prompt stand next to each other
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def receiver(self, index: int) -> Callable[[Piece], None]:
        def receive(piece: Piece) -> None:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

        return receive

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        left = len(self.requests)
        while left:
            index, piece = await self.pieces.get()
            if piece.error:
                raise piece.error
            left -= bool(piece.reason)
            yield index, piece

    def cancel(self) -> None:
        for request in self.requests:
            request.cancelled = True

    async def cancel_at_disconnect(self, http: HTTPRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    def usage(self) -> dict[str, Any]:
        prompts = self.requests[:: self.n]
        n_prompt = sum(len(request.prompt) for request in prompts)
        n_answer = sum(len(request.answer.tokens) for request in self.requests)
        details = {"cached_tokens": sum(request.cached for request in prompts)}
        usage = dict(prompt_tokens=n_prompt, completion_tokens=n_answer, total_tokens=n_prompt + n_answer)
        return usage | {"prompt_tokens_details": details}

    def log(self) -> None:
        usage = self.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        line = f"{self.title} 200: {usage['prompt_tokens']} tokens in ({cached} cached), "
        line += f"{usage['completion_tokens']} out"
        started = [request for request in self.requests if request.first]
        if started:
            first = min(request.first for request in started)
            waited = 1000 * (first - started[0].submitted)
            seconds = max(request.last for request in started) - first
            speed = (usage["completion_tokens"] - len(started)) / max(seconds, 1e-9)
            line += f", the first after {waited:.0f} ms, {speed:.1f} tokens/s"
        reasons = dict.fromkeys(request.answer.reason or "cancelled" for request in self.requests)
        log(f"{line}, {' '.join(reasons)}")


class StreamOfJob(StreamingResponse):
    """Server-sent events. However the response ends, the job does, too."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()
            self.job.log()


class Endpoint:
    """What chat and text completions have in common."""

    kinds: ClassVar[dict[str, Any]]
    prefix: ClassVar[str]  # of an id
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.tokenizer, self.name = engine, engine.tokenizer, name

    def prompts(self, fields: dict[str, Any]) -> list[Any]:
        raise NotImplementedError

    def options(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `Engine.request`."""
        raise NotImplementedError

    def content(self, text: str, is_first: bool | None) -> dict[str, Any]:
        """The text of a choice. is_first: of its chunks; None: it is the whole text."""
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        raise NotImplementedError

    def make_requests(self, job: Job, fields: dict[str, Any]) -> None:
        prompts, job.n = self.prompts(fields), fields.get("n", 1)
        most = min(MAX_CHOICES, self.engine.capacity)
        if len(prompts) * job.n > most:
            raise APIError(400, f"{len(prompts)} prompts, {job.n} times each, are more than {most}", "n")
        settings = {key: fields[key] for key in SAMPLING if key in fields}
        settings |= self.options(fields) | {"stop": read_stop(fields)}
        seed = fields.get("seed")
        for prompt in prompts:
            ids = self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
            for i in range(job.n):
                settings["seed"] = None if seed is None else seed + i
                receive = job.receiver(len(job.requests))
                job.requests.append(self.engine.request(ids, receive=receive, **settings))

    def choice(self, job: Job, index: int, piece: Piece, is_first: bool | None = None) -> dict[str, Any]:
        has_logprobs = job.requests[index].logprobs is not None
        return {
            "index": index,
            **self.content(piece.text, is_first),
            "logprobs": self.logprobs(piece.tokens) if has_logprobs else None,
            "finish_reason": piece.reason or None,
        }

    async def respond(self, http: HTTPRequest) -> Response:
        fields = read_fields(await read_body(http), self.kinds)
        if fields.get("model", self.name) != self.name:
            message = f"there is no model {fields['model'][:100]!r} here, only {self.name!r}"
            raise APIError(404, message, "model", "model_not_found")
        options = read_fields(fields.get("stream_options", {}), {"include_usage": bool})
        job = Job(http)
        await asyncio.to_thread(self.make_requests, job, fields)
        self.engine.submit(*job.requests)
        head: dict[str, Any] = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "object": self.object}
        head |= {"created": int(time.time()), "model": self.name}
        if fields.get("stream"):
            return StreamOfJob(job, self.events(job, head, options.get("include_usage", False)))
        watcher = asyncio.create_task(job.cancel_at_disconnect(http))
        pieces: list[list[Piece]] = [[] for _ in job.requests]
        try:
            async for index, piece in job:
                pieces[index].append(piece)
        finally:
            watcher.cancel()
            job.cancel()
        job.log()
        whole = [
            Piece("".join(p.text for p in parts), [t for p in parts for t in p.tokens], parts[-1].reason)
            for parts in pieces
        ]
        choices = [self.choice(job, index, piece) for index, piece in enumerate(whole)]
        return JSONResponse(head | {"choices": choices, "usage": job.usage()})

    async def events(self, job: Job, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
        head["object"] = self.chunk_object
        usage = {"usage": None} if with_usage else {}
        begun = set[int]()
        try:
            async for index, piece in job:
                choice = self.choice(job, index, piece, index not in begun)
                begun.add(index)
                yield event(head | {"choices": [choice]} | usage)
            if with_usage:
                yield event(head | {"choices": [], "usage": job.usage()})
        except Exception as e:  # the status has been sent
            yield event(api_error(e).body())
        yield "data: [DONE]\n\n"


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class Chat(Endpoint):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    kinds = COMMON | dict(
        messages=list, max_completion_tokens=int, logprobs=bool, top_logprobs=int, continue_final_message=bool
    )

    def prompts(self, fields: dict[str, Any]) -> list[Any]:
        messages = read_messages(fields)
        goes_on = fields.get("continue_final_message", False)
        return [encode_messages(self.tokenizer, messages, goes_on, self.engine.max_len)]

    def options(self, fields: dict[str, Any]) -> dict[str, Any]:
        if "top_logprobs" in fields and not fields.get("logprobs"):
            raise APIError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return {
            "max_tokens": fields.get("max_completion_tokens", fields.get("max_tokens")),
            "logprobs": fields.get("top_logprobs", 0) if fields.get("logprobs") else None,
            "continues": fields.get("continue_final_message", False),
        }

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


class Text(Endpoint):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"
    kinds = COMMON | dict(prompt=(str, list), logprobs=int, echo=bool)

    def prompts(self, fields: dict[str, Any]) -> list[Any]:
        return read_prompts(fields)

    def options(self, fields: dict[str, Any]) -> dict[str, Any]:
        logprobs = fields.get("logprobs")
        if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
            raise APIError(400, f"logprobs must be from 0 to {MAX_LOGPROBS}, not {logprobs}", "logprobs")
        max_tokens = fields.get("max_tokens", 16)  # OpenAI's default
        return {"max_tokens": max_tokens, "logprobs": logprobs, "echo": fields.get("echo", False)}

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


# -----------------------------------------------------------------------------
# The server


class Guard:
    """Refuses a request without the API key, or for another host (DNS rebinding), before it is read."""

    def __init__(self, app: ASGIApp, api_key: str, hosts: set[str]) -> None:
        self.app, self.api_key, self.hosts = app, api_key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            http = HTTPRequest(scope)
            try:
                self.check(http)
            except APIError as e:
                response = await respond_to_error(http, e)
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def check(self, http: HTTPRequest) -> None:
        try:
            host = urlsplit(f"//{http.headers.get('host', '')}").hostname
        except ValueError:
            host = None
        if self.hosts and host not in self.hosts:
            raise APIError(403, "the Host header is not a name of this server")
        sent = http.headers.get("authorization", "").encode("latin-1")
        is_right = hmac.compare_digest(sent, f"Bearer {self.api_key}".encode())
        if self.api_key and http.url.path.startswith("/v1/") and not is_right:
            raise APIError(
                401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key"
            )


def page_response() -> Response:
    """The page. The browser runs only the script that is in it, and sends requests only to this server."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    policy = f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; "
    policy += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    headers |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Response(html, media_type="text/html", headers=headers)


def make_app(
    engine: Engine, name: str, api_key: str = "", cors: Sequence[str] = (), hosts: Sequence[str] = ()
) -> Starlette:
    """The API of an engine, which is closed when the server stops. hosts: for the Host header; () is any."""
    created = int(time.time())
    model = {"id": name, "object": "model", "created": created, "owned_by": "sologpt"}
    model |= {"chat": bool(engine.tokenizer.chat_template), "context": engine.max_len}

    async def models(http: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(http: HTTPRequest) -> Response:
        if http.path_params["name"] != name:
            raise APIError(404, f"there is only the model {name!r} here", "model", "model_not_found")
        return JSONResponse(model)

    async def health(http: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok", "requests": len(engine.active)})

    async def page(http: HTTPRequest) -> Response:
        return page_response()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", Chat(engine, name).respond, methods=["POST"]),
        Route("/v1/completions", Text(engine, name).respond, methods=["POST"]),
    ]
    headers = ["Authorization", "Content-Type"]
    shared = Middleware(
        CORSMiddleware, allow_origins=cors, allow_methods=["GET", "POST"], allow_headers=headers
    )
    guard = Middleware(Guard, api_key=api_key, hosts={*hosts})
    handlers: Any = dict.fromkeys((Exception, APIError, HTTPException, UserError, RunError), respond_to_error)
    return Starlette(
        routes=routes, middleware=[shared, guard], exception_handlers=handlers, lifespan=lifespan
    )


class Protocol(H11Protocol):
    """HTTP/1.1, with a time limit for headers, and JSON for what is not HTTP."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.timer = self.loop.call_later(SECONDS, self.refuse, 408, f"no headers within {SECONDS} s")

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.timer is None and self.conn.their_state is h11.IDLE:  # another request of this connection
            self.timer = self.loop.call_later(SECONDS, self.refuse, 408, f"no headers within {SECONDS} s")
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self.stop_timer()

    def stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer = None

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no response has begun
            body = json.dumps(APIError(status, message).body()).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            response = h11.Response(status_code=status, headers=[*headers, ("Connection", "close")])
            for part in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """A server that ends with status 0 at SIGTERM and Ctrl-C, when the answers that run have ended.

    greeting: what it logs when it is ready.
    """

    def __init__(self, app: Starlette, greeting: str) -> None:
        self.greeting = greeting
        config = uvicorn.Config(
            app, http=Protocol, ws="none", log_level="error", access_log=False, timeout_keep_alive=SECONDS,
            timeout_graceful_shutdown=SECONDS,
        )  # fmt: skip
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log(self.greeting)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()  # which would be raised again


def is_loopback(sock: socket.socket) -> bool:
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m sologpt.serve",
        description="The OpenAI API for a model, and a page to chat with it.",
        epilog="examples:\n"
        "  python -m sologpt.serve out/tiny\n"
        "  python -m sologpt.serve hf:HuggingFaceTB/SmolLM2-135M-Instruct --quantize=int8",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="",
        help="a checkpoint, a run's out_dir, hf:NAME_OR_DIR or gguf:FILE; the newest in out if there is none",
    )  # fmt: skip
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 is all (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--api_key", default="", help="clients must send this key")
    add("--cors", metavar="ORIGIN", action="append", default=[], help="let pages of this origin use the API")
    add("--rows", type=int, default=8, help="requests that run at once (default: %(default)s)")
    add("--context", type=int, default=0, help="tokens of a prompt and its answer; 0 (the default) is the "
        "model's window, or less if memory is short")  # fmt: skip
    add("--device", default="auto", help="cuda, mps, cpu, ...; auto is an accelerator if there is one")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights; auto keeps that of the file")  # fmt: skip
    add("--quantize", choices=("", *KINDS), default="", help="the weights, on the CPU")
    add("--adapter", default="", help="merge a LoRA adapter of this folder into the model")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    # 1. The address, first: if it is taken, say so at once
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        sock = socket.create_server((args.host, args.port), family=family)
    except (OSError, OverflowError) as e:
        hint = "try another --port"
        raise UserError(
            f"cannot listen on {args.host}, port {args.port}: {getattr(e, 'strerror', None) or e}; {hint}"
        ) from e
    # 2. The model
    source, hint = args.model, ""
    if not source:
        path = find_checkpoint("out", Path(__file__).resolve().parent.parent / "out")
        source, hint = str(path), f" ({describe_run(path) or 'the newest in out'})"
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with warnings.catch_warnings(record=True, action="default") as caught:
        model, tokenizer, about = load_model(
            source, args.device, dtype, args.quantize or None, args.adapter or None
        )
    engine = Engine(model, tokenizer, args.rows, max_len=args.context)
    window = model.config.sequence_len
    if not args.context and engine.max_len < window:
        log(f"note: {engine.max_len} of the window's {window} tokens fit into memory; --context sets it")
    # 3. The server
    hosts = ["localhost", "127.0.0.1", "::1", args.host] if is_loopback(sock) else []
    if not hosts and not args.api_key:
        log(f"warning: whoever reaches {args.host} can use the model; --api_key KEY demands a key")
    for warning in caught:
        log(f"note: {warning.message}")
    host, port = sock.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    app = make_app(engine, source, args.api_key, args.cors, hosts)
    Server(app, f"{about['source']}, on {model.device}{hint}: {url}").run(sockets=[sock])


if __name__ == "__main__":
    errors.run(main, "a smaller --context, --rows or model, or --dtype=bfloat16")

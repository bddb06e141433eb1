"""The OpenAI API for one model, and a page to chat: python -m sologpt.serve out/tiny

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "def main(", "max_tokens": 100}'

Beyond OpenAI's fields it takes top_k, min_p, repetition_penalty, and for chat continue_final_message: the
answer goes on with the last message, which is the assistant's. A field that it does not know is an error.
vLLM's /tokenize and /tokenizer_info let lm-evaluation-harness count tokens (docs/evaluation.md).
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import socket
import sys
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from sologpt import errors
from sologpt.api import API, SWITCH, TEXT, APIError, Chat, Completion, api_error, read_fields
from sologpt.chat import answer_sampling
from sologpt.engine import Engine, Piece, Request
from sologpt.errors import RunError, UserError
from sologpt.hf import SOURCE, Parser
from sologpt.load import describe_run, find_checkpoint, load_model
from sologpt.quantize import KINDS

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
    from starlette.routing import Mount, Route
    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as e:
    message = "the server needs the extra 'serve': pip install starlette uvicorn"
    if __name__ == "__main__":
        sys.exit(f"error: {message}")
    raise ImportError(message) from e

MAX_BODY = 2**22  # bytes of a request
SECONDS = 30  # for a client to send its headers, then its body; for answers to end after SIGTERM


def log(line: str) -> None:
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr, flush=True)


async def respond_to_error(http: HTTPRequest, e: Exception) -> Response:
    error = APIError(e.status_code, e.detail) if isinstance(e, HTTPException) else api_error(e)
    log(f"{http.method} {http.url.path} {error.status}: {error}")
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}
    return JSONResponse(error.body, error.status, headers.get(error.status))


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


def check_model(asked: str, name: str) -> None:
    if asked != name:
        message = f"there is no model {asked[:100]!r} here, only {name!r}"
        raise APIError(404, message, "model", "model_not_found")


# -----------------------------------------------------------------------------
# Answers


class Job:
    """The choices of one HTTP request: an asynchronous iterator of (choice, piece) until all have ended."""

    def __init__(self, http: HTTPRequest, api: API, n: int) -> None:
        self.http, self.api = http, api
        self.n = n  # choices with the same prompt, which stand next to each other
        self.requests: list[Request] = []
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.begun = time.perf_counter()
        self.first = self.last = 0.0  # when the first token came, and the last one

    def receive(self, index: int, piece: Piece) -> None:
        if piece.tokens:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

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

    async def cancel_at_disconnect(self) -> None:
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    def choice(self, index: int, piece: Piece, is_first: bool | None = None) -> dict[str, Any]:
        return self.api.choice(index, self.requests[index], piece, is_first)

    async def whole(self) -> dict[str, Any]:
        """The JSON of an answer that is no stream."""
        pieces: list[list[Piece]] = [[] for _ in self.requests]
        watcher = asyncio.create_task(self.cancel_at_disconnect())
        try:
            async for index, piece in self:
                pieces[index].append(piece)
        finally:
            watcher.cancel()
        choices = []
        for index, parts in enumerate(pieces):
            text = "".join(piece.text for piece in parts)
            tokens = [token for piece in parts for token in piece.tokens]
            choices.append(self.choice(index, Piece(text, tokens, parts[-1].reason)))
        return {"object": self.api.object, "choices": choices, "usage": self.usage()}

    async def events(self, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
        """The server-sent events of a stream."""
        head = head | {"object": self.api.chunk_object} | ({"usage": None} if with_usage else {})
        begun = set[int]()
        try:
            async for index, piece in self:
                yield event(head | {"choices": [self.choice(index, piece, index not in begun)]})
                begun.add(index)
            if with_usage:
                yield event(head | {"choices": [], "usage": self.usage()})
        except Exception as e:  # the status has been sent
            yield event(api_error(e).body)
        yield "data: [DONE]\n\n"

    def usage(self) -> dict[str, Any]:
        prompts = self.requests[:: self.n]
        n_prompt = sum(len(request.prompt) for request in prompts)
        n_answer = sum(len(request.answer.tokens) for request in self.requests)
        cached = sum(request.cached for request in prompts)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def log(self) -> None:
        usage = self.usage()
        cached, n = usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"]
        line = f"{self.http.method} {self.http.url.path} 200: "
        line += f"{usage['prompt_tokens']} tokens in ({cached} cached), {n} out"
        if self.first:
            later = n - sum(bool(request.answer.tokens) for request in self.requests)
            line += f", the first after {1000 * (self.first - self.begun):.0f} ms"
            line += f", {later / max(self.last - self.first, 1e-9):.1f} tokens/s"
        reasons = dict.fromkeys(request.answer.reason or "cancelled" for request in self.requests)
        log(f"{line}, {' '.join(reasons)}")


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class Endpoint:
    """An ASGI app that answers requests for text. However a response ends, its job does, too."""

    def __init__(self, name: str, api: API) -> None:
        self.name, self.api = name, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http, api = HTTPRequest(scope, receive), self.api
        fields = read_fields(await read_body(http), api.fields, api.required)
        check_model(fields.get("model", self.name), self.name)
        options = read_fields(fields.get("stream_options", {}), {"include_usage": SWITCH})
        job = Job(http, api, fields.get("n", 1))
        job.requests = await asyncio.to_thread(api.requests, fields, job.receive)
        api.engine.submit(*job.requests)
        head = {"id": f"{api.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        response: Response
        try:
            if fields.get("stream"):
                parts = job.events(head, options.get("include_usage", False))
                no_cache = {"Cache-Control": "no-cache"}
                response = StreamingResponse(parts, media_type="text/event-stream", headers=no_cache)
            else:
                response = JSONResponse(head | await job.whole())
            await response(scope, receive, send)
            job.log()
        finally:
            job.cancel()


# -----------------------------------------------------------------------------
# The server


class Guard:
    """Refuses a request without the API key, or for another host (DNS rebinding), before it is read."""

    def __init__(self, app: ASGIApp, api_key: str, hosts: set[str]) -> None:
        self.app, self.api_key, self.hosts = app, api_key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = HTTPRequest(scope)
        try:
            host = urlsplit(f"//{http.headers.get('host', '')}").hostname
        except ValueError:
            host = None
        if self.hosts and host not in self.hosts:
            raise APIError(403, "the Host header is not a name of this server")
        sent = http.headers.get("authorization", "").encode("latin-1")
        is_right = hmac.compare_digest(sent, f"Bearer {self.api_key}".encode())
        if self.api_key and http.url.path not in ("/", "/health") and not is_right:
            message = "the API key is missing or wrong: Authorization: Bearer KEY"
            raise APIError(401, message, code="invalid_api_key")
        await self.app(scope, receive, send)


def page() -> Response:
    """The page. The browser runs only the script that is in it, and sends requests only to this server."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def source(tag: str) -> str:
        text = html.partition(f"<{tag}")[2].partition(">")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; "
    policy += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    headers |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Response(html, media_type="text/html", headers=headers)


def make_app(
    engine: Engine, name: str, api_key: str = "", cors: Sequence[str] = (), hosts: Sequence[str] = ()
) -> Starlette:
    """The API of an engine, which is closed when the server stops. hosts: for the Host header; () is any."""
    tokenizer = engine.tokenizer
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "sologpt"}
    model |= {"chat": bool(tokenizer.chat_template), "context": engine.max_len}
    model["sampling"] = answer_sampling(tokenizer) if tokenizer.chat_template else {}

    def one_model(http: HTTPRequest) -> Response:
        check_model(http.path_params["name"], name)
        return JSONResponse(model)

    async def tokenize(http: HTTPRequest) -> Response:
        known = {"model": TEXT, "prompt": TEXT, "add_special_tokens": SWITCH}
        fields = read_fields(await read_body(http), known, "prompt")
        text, special = fields["prompt"], tokenizer.special_ids
        encode = tokenizer.encode_prompt if fields.get("add_special_tokens", True) else tokenizer.encode
        ids = [special[text]] if text in special else await asyncio.to_thread(encode, text)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": engine.max_len})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    routes = [
        Route("/", lambda http: page()),
        Route("/health", lambda http: JSONResponse({"status": "ok", "requests": len(engine.active)})),
        Route("/v1/models", lambda http: JSONResponse({"object": "list", "data": [model]})),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", Endpoint(name, Chat(engine)), methods=["POST"]),
        Route("/v1/completions", Endpoint(name, Completion(engine)), methods=["POST"]),
        Route("/tokenizer_info", lambda http: JSONResponse(tokenizer.special_tokens)),
        Route("/tokenize", tokenize, methods=["POST"]),
    ]
    # The guard is within the error handlers, and these within CORS: a page of another origin reads errors
    guarded = Mount("", routes=routes, middleware=[Middleware(Guard, api_key=api_key, hosts={*hosts})])
    allowed: Any = dict(allow_methods=["GET", "POST"], allow_headers=["Authorization", "Content-Type"])
    shared = Middleware(CORSMiddleware, allow_origins=cors, **allowed)
    handlers: Any = dict.fromkeys((Exception, APIError, HTTPException, UserError, RunError), respond_to_error)
    return Starlette(routes=[guarded], middleware=[shared], exception_handlers=handlers, lifespan=lifespan)


class Protocol(H11Protocol):
    """HTTP/1.1, with a time limit for headers, and JSON for what is not HTTP."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.limit_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.limit_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()
        super().connection_lost(exc)

    def limit_headers(self) -> None:
        """Start a timer while headers are to come, and stop it when they are there."""
        waits = self.conn.their_state is h11.IDLE
        if waits and self.timer is None:
            self.timer = self.loop.call_later(SECONDS, self.refuse, 408, f"no headers within {SECONDS} s")
        elif self.timer and not waits:
            self.timer.cancel()
            self.timer = None

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no response has begun
            body = json.dumps(APIError(status, message).body)
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            self.transport.write((head + body).encode())
        self.transport.close()


class Server(uvicorn.Server):
    """A server that ends with status 0 at SIGTERM and Ctrl-C, when the answers that run have ended.

    greeting: what it logs when it is ready.
    """

    def __init__(self, app: Starlette, greeting: str) -> None:
        self.greeting = greeting
        limits: Any = dict(timeout_keep_alive=SECONDS, timeout_graceful_shutdown=SECONDS)
        super().__init__(uvicorn.Config(app, http=Protocol, ws="none", log_level="error", **limits))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log(self.greeting)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()  # which would be raised again


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m sologpt.serve",
        description="The OpenAI API for a model, and a page to chat with it.",
        epilog="examples:\n"
        "  python -m sologpt.serve out/tiny\n"
        "  python -m sologpt.serve hf:HuggingFaceTB/SmolLM2-135M-Instruct --quantize=int8",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help=f"{SOURCE}; the newest in out if there is none")
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
        reason = getattr(e, "strerror", None) or e
        where = f"{args.host}, port {args.port}"
        raise UserError(f"cannot listen on {where}: {reason}; try another --port") from e
    host, port = sock.getsockname()[:2]
    # 2. The model
    source, hint = args.model, ""
    if not source:
        path = find_checkpoint("out", Path(__file__).resolve().parent.parent / "out")
        source, hint = str(path), f" ({describe_run(path) or 'the newest in out'})"
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with warnings.catch_warnings(record=True, action="default") as caught:
        model, tokenizer, about = load_model(source, args.device, dtype, args.quantize, args.adapter)
    engine = Engine(model, tokenizer, args.rows, max_len=args.context)
    window = model.config.sequence_len
    if not args.context and engine.max_len < window:
        log(f"note: {engine.max_len} of the window's {window} tokens fit into memory; --context sets it")
    # 3. The server
    is_private = ipaddress.ip_address(host).is_loopback
    hosts = ["localhost", "127.0.0.1", "::1", args.host] if is_private else []
    if not is_private and not args.api_key:
        log(f"warning: whoever reaches {args.host} can use the model; --api_key KEY demands a key")
    for warning in caught:
        log(f"note: {warning.message}")
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    app = make_app(engine, source, args.api_key, args.cors, hosts)
    Server(app, f"{about['source']}, on {model.device}{hint}: {url}").run(sockets=[sock])


if __name__ == "__main__":
    errors.run(main, "a smaller --context, --rows or model, or --dtype=bfloat16")

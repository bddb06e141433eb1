"""The server beside the engine and `generate`, with the `openai` package as its client."""

import contextlib
import copy
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPResponse
from pathlib import Path

import httpx
import openai
import pytest
import torch
import transformers
from conftest import LLAMA, ROOT, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import GPT
from sologpt import hf
from sologpt.engine import Engine
from sologpt.errors import UserError
from sologpt.serve import MAX_BODY, Server, main, make_app
from sologpt.stream import stream_text
from sologpt.tokenizer import Tokenizer

BYTES = Tokenizer.from_spec("bytes").with_chat_template()
MODEL = make_model(vocab_size=260, sequence_len=256, norm_weight=True).eval()
SCRIPT_MODEL = make_model(vocab_size=257, sequence_len=4096).eval()
QUESTION = [{"role": "user", "content": "What?"}]
OFF = openai.omit


@contextlib.contextmanager
def serving(model=MODEL, tokenizer=BYTES, engine_options=None, **options):
    """The address of a server in a thread, with its engine."""
    engine = Engine(model, tokenizer, **engine_options or {})
    sock = socket.create_server(("127.0.0.1", 0))
    server = Server(make_app(engine, "tiny", **options), "ready")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    port = sock.getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", engine
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not engine.thread.is_alive()


@pytest.fixture(scope="module")
def server():
    with serving() as (url, engine):
        yield url, engine


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=server[0], timeout=30) as web:
        yield web


def alone(prompt, max_tokens=20, **options):
    """Text and finish_reason of a stream of its own."""
    stream = stream_text(MODEL, BYTES, prompt, max_tokens, **options)
    return "".join(stream), stream.reason


def wait_until_idle(engine: Engine) -> None:
    for _ in range(2000):
        if not engine.active:
            return
        time.sleep(0.005)
    raise AssertionError(f"still active: {engine.active}")


# ---- Chat


def test_chat(client):
    options = dict(temperature=0, max_tokens=20)
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, **options)
    text, reason = alone(QUESTION, temperature=0)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert choice.finish_reason == reason and choice.logprobs is None
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    n = len(BYTES.encode_chat(QUESTION))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        n,
        20,
        n + 20,
    )
    again = client.chat.completions.create(model="tiny", messages=QUESTION, **options)
    assert again.usage.prompt_tokens_details.cached_tokens == n - 1
    assert again.choices[0].message.content == text


def test_streamed_chat(client):
    options = dict(temperature=0, max_completion_tokens=20, stream_options={"include_usage": True})
    chunks = [*client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, **options)]
    *parts, last = chunks
    text, reason = alone(QUESTION, temperature=0)
    assert "".join(part.choices[0].delta.content for part in parts) == text
    assert [part.choices[0].delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + [reason]
    assert last.choices == [] and last.usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)


def test_messages_of_parts_and_of_earlier_answers(client):
    first = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=5, seed=1)
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "at?"}]
    messages = [
        {"role": "user", "content": parts},
        first.choices[0].message,
        {"role": "user", "content": "And?"},
    ]
    plain = [*QUESTION, {"role": "assistant", "content": first.choices[0].message.content}, messages[-1]]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == alone(plain, temperature=0)[0]


def test_developer_is_system(client):
    texts = []
    for role in ("developer", "system"):
        messages = [{"role": role, "content": "Be brief."}, *QUESTION]
        answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=9)
        texts.append(answer.choices[0].message.content)
    assert texts[0] == texts[1]


def test_chat_logprobs(client):
    options = dict(temperature=0, max_tokens=12, logprobs=True, top_logprobs=3)
    [choice] = client.chat.completions.create(model="tiny", messages=QUESTION, **options).choices
    stream = stream_text(MODEL, BYTES, QUESTION, 12, temperature=0)
    text = "".join(stream)
    ids = stream.prompt_tokens + stream.tokens
    with torch.inference_mode():
        rows = MODEL(torch.tensor([ids])).log_softmax(-1)[0, len(stream.prompt_tokens) - 1 :]
    content = choice.logprobs.content
    assert bytes(b for token in content for b in token.bytes).decode("utf-8", "replace") == text
    for token, id, row in zip(content, stream.tokens, rows, strict=False):
        assert token.logprob == pytest.approx(row[id].item())
        values, top = row[:257].topk(3)
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(values.tolist())
        assert token.top_logprobs[0].bytes == token.bytes  # greedy
        assert [other.token for other in token.top_logprobs] == [
            BYTES.token_bytes(i).decode("utf-8", "replace") for i in top.tolist()
        ]
    chunks = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, **options)
    streamed = [chunk.choices[0].logprobs.content for chunk in chunks]
    assert [token for tokens in streamed for token in tokens] == content
    assert all(len(tokens) <= 1 for tokens in streamed)


def test_continue_final_message(client):
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=20)
    text = whole.choices[0].message.content
    beginning = {"role": "assistant", "content": text[:4]}
    n = len(text[:4].encode())
    rest = client.chat.completions.create(
        model="tiny", messages=[*QUESTION, beginning], temperature=0, max_tokens=20 - n,
        extra_body={"continue_final_message": True},
    )  # fmt: skip
    assert "\ufffd" not in text[:4] and text[:4] + rest.choices[0].message.content == text
    other = [*QUESTION, {"role": "assistant", "content": "<|endoftext|>"}]
    answer = client.chat.completions.create(
        model="tiny", messages=other, max_tokens=1, extra_body={"continue_final_message": True}
    )
    n = len(BYTES.encode_chat(QUESTION)) + len("<|endoftext|>")  # it is text, not the token
    assert answer.usage.prompt_tokens == n
    with pytest.raises(openai.BadRequestError, match="last message"):
        client.chat.completions.create(
            model="tiny", messages=QUESTION, extra_body={"continue_final_message": True}
        )


def test_n_and_seed(client):
    options = dict(model="tiny", messages=QUESTION, max_tokens=15, n=3, temperature=1, top_p=1)
    answer = client.chat.completions.create(seed=5, **options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert texts == [alone(QUESTION, 15, seed=5 + i)[0] for i in range(3)] and len({*texts}) == 3
    assert answer.usage.prompt_tokens == len(BYTES.encode_chat(QUESTION))
    parts = ["", "", ""]
    reasons = []
    for chunk in client.chat.completions.create(seed=5, stream=True, **options):
        parts[chunk.choices[0].index] += chunk.choices[0].delta.content
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert parts == texts and len(reasons) == 3
    without = [client.chat.completions.create(**options).choices[0].message.content for _ in range(2)]
    assert without[0] != without[1]


def test_sampling_fields(client):
    sampling = dict(temperature=1.3, top_p=0.9)
    others = dict(top_k=7, min_p=0.02, repetition_penalty=1.2)
    answer = client.completions.create(
        model="tiny", prompt="Once", max_tokens=30, seed=3, **sampling, extra_body=others
    )
    assert answer.choices[0].text == alone("Once", 30, seed=3, **sampling, **others)[0]


# ---- Completions


@pytest.mark.parametrize("prompt", ["Some text", [83, 111, 109], ["Some", "Other text"], [[83], [84, 85]]])
def test_completions(client, prompt):
    answer = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=20)
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    expected = [alone(p, temperature=0) for p in prompts]
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == expected
    assert answer.object == "text_completion"
    texts = [""] * len(prompts)
    for chunk in client.completions.create(
        model="tiny", prompt=prompt, temperature=0, max_tokens=20, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [text for text, _ in expected]


def test_default_max_tokens(client):
    assert client.completions.create(model="tiny", prompt="x", temperature=0).usage.completion_tokens == 16
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, seed=2)
    assert answer.choices[0].finish_reason in ("stop", "length")
    if answer.choices[0].finish_reason == "length":  # at the end of the window
        assert answer.usage.total_tokens == 257


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, stream):
    text = alone("Once", 60, temperature=0)[0]
    stop = text[20:23]
    options = dict(
        model="tiny", prompt="Once", max_tokens=60, temperature=0, logprobs=1, stop=[stop, "never"]
    )
    answer = client.completions.create(stream=stream, **options)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert max(offsets) < text.index(stop)


def test_end_of_text_is_no_text_but_a_token(client):
    """As lm-evaluation-harness counts: one token for each of max_tokens."""
    for seed in range(300):
        answer = client.completions.create(model="tiny", prompt="x", seed=seed, max_tokens=20, logprobs=0)
        if answer.choices[0].finish_reason == "stop":
            break
    assert "<|endoftext|>" not in answer.choices[0].text
    assert answer.choices[0].logprobs.tokens[-1] == "<|endoftext|>"
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client, stream):
    """What lm-evaluation-harness asks for."""
    options = dict(model="tiny", prompt="Ein schöner Tag", echo=True, logprobs=2, max_tokens=1, temperature=0)
    answer = client.completions.create(stream=stream, **options)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text = "".join(choice.text for choice in choices)
    tokens, values, tops, offsets = (
        [x for choice in choices for x in getattr(choice.logprobs, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    ids = BYTES.encode("Ein schöner Tag")
    assert text.startswith("Ein schöner Tag") and len(tokens) == len(ids) + 1
    with torch.inference_mode():
        rows = MODEL(torch.tensor([ids])).log_softmax(-1)[0]
    assert values[0] is None and tops[0] is None
    expected = [row[i].item() for row, i in zip(rows, ids[1:], strict=False)]
    assert values[1:-1] == pytest.approx(expected)
    assert values[-1] == max(tops[-1].values()) == pytest.approx(rows[-1].max().item())
    for i, row in enumerate(rows[:-1]):
        assert max(tops[i + 1].values()) == pytest.approx(row[:257].max().item())
    assert offsets[:7] == [0, 1, 2, 3, 4, 5, 6] and offsets[8:10] == [7, 8]
    assert tokens[6:9] == ["h", "bytes:\\xc3", "bytes:\\xb6"]


def test_echo_alone(client):
    answer = client.completions.create(model="tiny", prompt="abc", echo=True, max_tokens=0, logprobs=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "length")


def test_lm_evaluation_harness(tmp_path):
    """What its local-completions sends, and reads of the answer, beside transformers."""
    tokenizer = Tokenizer.from_spec("bytes")
    model = make_model(torch.float32, vocab_size=257, sequence_len=64, **LLAMA).eval()
    hf.save(model, tokenizer, tmp_path / "model")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    pairs = [("Ein schöner", " Tag"), ("", "x"), ("def f(", "a, b):\n" * 6)]
    with serving(model, tokenizer) as (url, _), httpx.Client(base_url=url) as web:
        eos = web.get("/tokenizer_info").json()["eos_token"]

        def encode(text: str) -> list[int]:
            ask = {"prompt": text, "add_special_tokens": False}
            return web.post("/tokenize", json=ask).json()["tokens"]

        assert encode(eos) == [theirs.eos_token_id]
        prompts, lengths = [], []
        for context, continuation in pairs:
            head = encode(context) if context else encode(eos)
            assert encode(continuation) == tokenizer.encode(continuation)
            prompts.append(head + encode(continuation))
            lengths.append(len(head))
        body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1}
        answer = web.post("/v1/completions", json=body | {"seed": 1234, "echo": True}).json()
        for choice, ids, n in zip(answer["choices"], prompts, lengths, strict=True):
            with torch.no_grad():
                logits = oracle(torch.tensor([ids])).logits[0, n - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(ids) - n), ids[n:]]
            logprobs, tops = (choice["logprobs"][key][n:-1] for key in ("token_logprobs", "top_logprobs"))
            assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)
            is_greedy = all(p == max(top.values()) for p, top in zip(logprobs, tops, strict=True))
            assert is_greedy == (logits.argmax(-1).tolist() == ids[n:])


# ---- Models, health, page


def test_a_chat_samples_as_the_model_suggests():
    """Its own settings, or 0.6 and 0.9; a field of the request wins. A completion has OpenAI's defaults."""
    own = copy.copy(BYTES)
    own.sampling = {"temperature": 0.3, "top_k": 7}
    body = {"messages": QUESTION, "seed": 5, "max_tokens": 20}

    def content(url: str, **fields) -> str:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body | fields).json()
        return answer["choices"][0]["message"]["content"]

    for tokenizer, sampling in ((own, own.sampling), (BYTES, {"temperature": 0.6, "top_p": 0.9})):
        with serving(tokenizer=tokenizer) as (url, _):
            assert httpx.get(f"{url}/v1/models").json()["data"][0]["sampling"] == sampling
            assert content(url) == alone(QUESTION, seed=5, **sampling)[0]
            assert (
                content(url, temperature=1.4) == alone(QUESTION, seed=5, **sampling | {"temperature": 1.4})[0]
            )
            text = {"prompt": "Once", "seed": 5, "max_tokens": 20}
            answer = httpx.post(f"{url}/v1/completions", json=text).json()["choices"][0]["text"]
            assert answer == alone("Once", seed=5)[0] != alone("Once", seed=5, **sampling)[0]


def test_models(client, web):
    [model] = client.models.list().data
    assert (model.id, model.chat, model.context) == ("tiny", True, 256)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert web.get("/health").json()["status"] == "ok"


def test_page(web):
    page = web.get("/")
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert len(re.findall("<script", page.text)) == policy.split("script-src")[1].split(";")[0].count(
        "sha256-"
    )
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page.text)


# ---- Errors


def test_errors_of_the_client(client):
    def chat(**options):
        return client.chat.completions.create(**dict(model="tiny", messages=QUESTION) | options)

    with pytest.raises(openai.NotFoundError, match="'gpt-4'"):
        chat(model="gpt-4")
    with pytest.raises(openai.BadRequestError) as e:
        chat(tools=[{"type": "function", "function": {"name": "f"}}])
    assert e.value.param == "tools" and e.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(temperature=-1)
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        chat(frequency_penalty=0.5)
    assert chat(frequency_penalty=0, tools=[], response_format={"type": "text"}, max_tokens=1).choices
    with pytest.raises(openai.BadRequestError, match=r"300 tokens.*256"):
        client.completions.create(model="tiny", prompt=[1] * 300)
    with pytest.raises(openai.BadRequestError, match="258"):
        client.completions.create(model="tiny", prompt=[258])


BAD_FIELDS = [
    {"messages": []},
    {"messages": "text"},
    {"messages": [1]},
    {"messages": [{}]},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": [], "content": "x"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": 1}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
    {"messages": [{"role": "user", "content": "\ud800"}]},
    {"messages": None},
    {"model": 1},
    {"stream": 1},
    {"stream": "true"},
    {"stream_options": {"other": True}},
    {"stream_options": {"include_usage": 1}},
    {"max_tokens": -1},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"max_tokens": 10**30},
    {"temperature": "1"},
    {"temperature": -0.1},
    {"temperature": 10**400},
    {"top_p": 1.5},
    {"top_k": -1},
    {"top_k": 10**20},
    {"min_p": 3},
    {"repetition_penalty": 0},
    {"repetition_penalty": 10**40},
    {"seed": 2**64},
    {"seed": 1.5},
    {"n": 0},
    {"n": 1000},
    {"stop": [""]},
    {"stop": ""},
    {"stop": [1]},
    {"stop": {"a": 1}},
    {"stop": ["x"] * 100},
    {"logprobs": 5},
    {"top_logprobs": 3},
    {"logprobs": True, "top_logprobs": 21},
    {"logit_bias": {"50256": -100}},
    {"response_format": {"type": "json_object"}},
    {"presence_penalty": 1},
    {"prompt": "x"},
    {"": 1},
    {"x" * 10000: 1},
    {"\n\x1b[31m": 1},
]


@pytest.mark.parametrize("bad", BAD_FIELDS, ids=lambda bad: ascii(bad)[:40])
def test_bad_fields(web, bad):
    body = json.dumps({"messages": QUESTION, "max_tokens": 1} | bad)
    answer = web.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"] and len(answer.text) < 1000


@pytest.mark.parametrize(
    "prompt", [None, [], "", [[]], [""], [1, "a"], ["a", [1]], [True], [1.0], [[1], 2], {}, [-1], [10**30]]
)
def test_bad_prompts(web, prompt):
    answer = web.post("/v1/completions", json={"prompt": prompt})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


BAD_BODIES = [
    b"", b"{", b"[]", b"1", b'"x"', b"null", b"\xff\xfe", b"{'a': 1}", b'{"temperature": NaN}', b'{"temperature": 1e999}',
    b'{"temperature": -Infinity}', b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b'{"prompt": "\\ud800"}', b'{"a": 1}}',
    '{"prompt": "x"}'.encode("utf-16"), b"\x00", b'{"prompt": "\x00"}', b'{"prompt": "' + b"x" * MAX_BODY + b'"}',
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: ascii(body[:20]))
def test_bad_bodies(web, body):
    answer = web.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413) and answer.json()["error"]["message"], answer.text


def test_other_paths_methods_and_types(web):
    for method, path, status in [
        ("GET", "/v1/completions", 405),
        ("POST", "/", 405),
        ("GET", "/v1/embeddings", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%00%0a%1b", 404),
        ("DELETE", "/v1/models/tiny", 405),
    ]:
        answer = web.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]
    answer = web.post("/v1/completions", content='{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 30)


def read_answer(sock: socket.socket) -> tuple[int, str]:
    """The status of what the server answers, and the message of its JSON error."""
    answer = HTTPResponse(sock)
    answer.begin()
    return answer.status, json.loads(answer.read()).get("error", {}).get("message", "")


def raw(url: str, data: bytes) -> tuple[int, str]:
    """What the server answers to these bytes."""
    with connect(url) as sock:
        with contextlib.suppress(ConnectionError):  # it may refuse before all is sent
            sock.sendall(data)
        return read_answer(sock)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BAD_HTTP = [
    b"hello\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
    b"GET / HTTP/9\r\n\r\n",
    b"GET  / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nA B: c\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # no host
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000,
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    HEAD + b"Content-Length: x\r\n\r\n",
    HEAD + b"Content-Length: -5\r\n\r\n",
    HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh\r\n",
    HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
]


@pytest.mark.parametrize("data", BAD_HTTP, ids=lambda data: ascii(data[-30:]))
def test_bad_http(server, data):
    status, message = raw(server[0], data)
    assert (400 <= status < 500 or status == 501) and message


def test_bodies_and_headers_that_stop(monkeypatch):
    begun = [
        HEAD + b"Content-Length: 9\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        HEAD,
        b"",
    ]
    with serving() as (url, _), ThreadPoolExecutor(4) as pool, connect(url) as sock:
        sock.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")
        assert read_answer(sock)[0] == 400
        with monkeypatch.context() as patch:
            patch.setattr("sologpt.serve.SECONDS", 1)
            sock.sendall(HEAD)  # a second request, whose headers stop
            assert read_answer(sock)[0] == 408
            for status, message in pool.map(partial(raw, url), begun):
                assert status == 408 and message
        assert httpx.get(f"{url}/health").status_code == 200


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "max_tokens", "temperature", "stop", "n", "logprobs", "echo", "seed", "top_k", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-3, 30) | st.floats() | st.text(max_size=5) | st.just("x"),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=5,
        ),
    )
)  # fmt: skip
def test_random_fields(web, fields):
    body = json.dumps({"prompt": "x", "max_tokens": 2} | fields)
    answer = web.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    assert "choices" in answer.json() if answer.status_code == 200 else "error" in answer.json()


def malformed_requests(rng: random.Random, count: int) -> Iterator[bytes]:
    """The bytes of requests that are wrong in one way each: fields, JSON, bodies, headers, HTTP."""

    def post(body: bytes, path: str = "/v1/completions", kind: str = "application/json") -> bytes:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def junk() -> bytes:
        return rng.randbytes(rng.randint(1, 300)).replace(b"\n", b" ")

    def bad_field() -> bytes:
        name = rng.choice(["max_tokens", "n", "seed", "top_k", "temperature", "top_p", "stream", "prompt"])
        values = [[], {}, [[]], {"a": [None]}, 1e999, float("nan"), 10**100, "\ud800"]
        values += ["x", "\U0001f469\u200d"] * (name != "prompt")
        name, value = rng.choice([(name, rng.choice(values)), (f"field{rng.random()}\u202e\0", 1)])
        return post(json.dumps({"prompt": "x", "max_tokens": 1, name: value}).encode())

    def bad_message() -> bytes:
        message = rng.choice([{}, 1, {"role": "user"}, {"role": "user", "content": [{"type": "image_url"}]}])
        return post(json.dumps({"messages": [message] * rng.randint(1, 50)}).encode(), "/v1/chat/completions")

    def deep() -> bytes:
        opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        n = rng.randint(3, rng.choice([1_200, 50_000]))  # the limit of recursion is 1000
        return post(b'{"prompt":' + opening * n + b"1" + closing * n + b"}")

    def cut() -> bytes:
        whole = post(json.dumps({"prompt": "x" * rng.randint(1, 2000)}).encode())
        body = whole.partition(b"\r\n\r\n")[2]
        return post(body[: rng.randrange(len(body))])

    def chunks() -> bytes:
        """A chunked body that is wrong, or that stops."""
        bad = [
            b"zz\r\n{}\r\n",
            b"2\r\n{}x\r\n",
            b"-2\r\n{}\r\n",
            b"2\r\n{",
            b"f" * 30 + b"\r\n",
            b"2\r\n{}\r\n",
        ]
        return (
            HEAD
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + b"1\r\n \r\n" * rng.randint(0, 20)
            + rng.choice(bad)
        )

    def headers() -> bytes:
        lines = [
            b"Content-Length: 5",
            b"Content-Length: x",
            b"Transfer-Encoding: " + junk(),
            b"X: " + b"a" * 100_000,
        ]
        lines += [b"A b: c", b"\0: x", b": x", b"Content-Length: 99999999999999999999999"]
        bad = rng.sample(lines, 2)
        return HEAD + b"\r\n".join(bad) + b"\r\n\r\n" + junk()

    kinds = [bad_field, bad_message, deep, cut, chunks, headers]
    kinds += [lambda: post(junk()), lambda: junk() + b"\r\n\r\n", lambda: post(b"{}", kind="text/plain")]
    kinds += [lambda: post(b'{"prompt": "' + b"x" * rng.randint(MAX_BODY, 2 * MAX_BODY) + b'"}')]
    kinds += [lambda: post(b'{"prompt": "x"}', "/" + "".join(rng.choices("ab/.%~", k=rng.randint(1, 3000))))]
    for i in range(count):
        yield kinds[i % len(kinds)]()


@pytest.mark.slow
def test_400_malformed_requests(capfd, monkeypatch):
    """Each gets a status of 4xx with a JSON error, and none a traceback. The server goes on."""
    requests = [*malformed_requests(random.Random(0), 400)]
    with serving() as (url, engine), ThreadPoolExecutor(16) as pool:
        with monkeypatch.context() as patch:
            patch.setattr("sologpt.serve.SECONDS", 2)
            answers = [*pool.map(partial(raw, url), requests)]
        for data, (status, message) in zip(requests, answers, strict=True):
            assert 400 <= status < 500 and message, (status, data[:300])
        wait_until_idle(engine)
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 5, "temperature": 0})
        assert answer.json()["choices"][0]["text"] == alone("x", 5, temperature=0)[0]
    assert "Traceback" not in capfd.readouterr().err


def test_400_a_prompt_on_which_the_pattern_fails():
    evil = Tokenizer.from_dict(BYTES.to_dict() | {"pattern": r"(?:a|a)+(?!a)b|[\s\S]"})
    with serving(tokenizer=evil) as (url, _):
        for prompt, status in (("a" * 99, 400), ("b", 200)):
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 2})
            assert answer.status_code == status, answer.text
            assert ("cannot encode this text" in answer.text) == (status == 400)


def endless_model() -> GPT:
    """A window in which an answer takes long."""
    model = make_model(vocab_size=260, sequence_len=20_000).eval()
    with torch.no_grad():
        model.lm_head.weight[256] = 0  # end of text is never the most likely
    return model


LONG = {"prompt": "x", "max_tokens": 19_000, "temperature": 0}


def test_too_many_requests():
    with (
        serving(endless_model(), engine_options=dict(rows=1, max_waiting=1)) as (url, engine),
        httpx.Client(base_url=url) as web,
    ):
        with web.stream("POST", "/v1/completions", json=LONG | {"n": 2, "stream": True}) as stream:
            pieces = stream.iter_bytes()  # the stream is closed when this is forgotten
            next(pieces)
            answer = web.post("/v1/completions", json={"prompt": "x"})
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] == "overloaded"
        wait_until_idle(engine)
        assert web.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        answer = web.post("/v1/completions", json={"prompt": "x", "n": 3})
        assert answer.status_code == 400 and "more than 2" in answer.text


def test_a_model_without_template():
    with serving(tokenizer=Tokenizer.from_spec("bytes")) as (url, _):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["chat"] is False
        for more in ({}, {"continue_final_message": True}):
            messages = [*QUESTION, {"role": "assistant", "content": "x"}]
            answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages} | more)
            assert answer.status_code == 400 and "no chat template" in answer.text


def test_an_error_in_the_middle(capfd):
    model = make_model(vocab_size=260, sequence_len=256).eval()
    with torch.no_grad():
        model.wte.weight[7] = torch.nan
    with serving(model) as (url, engine):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": [7], "max_tokens": 5})
        assert answer.status_code == 500 and "not finite" in answer.json()["error"]["message"]
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": [7], "max_tokens": 5, "stream": True})
        events = answer.text.split("\n\n")
        assert "not finite" in events[0] and events[1] == "data: [DONE]"
        wait_until_idle(engine)


# ---- Who may ask


def test_api_key():
    with serving(api_key="sé-cret") as (url, _):
        body = {"prompt": "x", "max_tokens": 1}
        for key in ("Bearer wrong", "", "sé-cret", "Basic sé-cret"):
            answer = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": key.encode()})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/health").status_code == 200
        header = {"Authorization": "Bearer sé-cret".encode()}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=header).status_code == 200


def test_host():
    with serving(hosts=["localhost", "127.0.0.1", "::1"]) as (url, _):
        for host, status in [
            ("localhost", 200),
            ("LOCALHOST:99", 200),
            ("127.0.0.1:8000", 200),
            ("[::1]:8000", 200),
            ("evil.example", 403),
            ("localhost.evil.example", 403),
            ("[::1", 403),
            ("", 403),
        ]:
            answer = httpx.get(f"{url}/v1/models", headers={"Host": host})
            assert answer.status_code == status, host
        assert answer.json()["error"]["message"]


def test_cors():
    origin = {"Origin": "https://example.org"}
    ask = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with serving() as (url, _):
        assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=origin).headers
        assert httpx.options(f"{url}/v1/completions", headers=ask).status_code >= 400
    with serving(cors=["https://example.org"], api_key="key") as (url, _):
        answer = httpx.options(f"{url}/v1/completions", headers=ask)
        assert (
            answer.status_code == 200
            and answer.headers["access-control-allow-origin"] == "https://example.org"
        )
        answer = httpx.get(f"{url}/v1/models", headers=origin)  # an error can be read, too
        assert answer.status_code == 401 and "access-control-allow-origin" in answer.headers
        other = httpx.get(f"{url}/v1/models", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


# ---- Leaving


@pytest.fixture(scope="module")
def slow_server():
    with serving(endless_model(), engine_options=dict(rows=2)) as (url, engine):
        yield url, engine


def test_leaving_a_stream_ends_it(slow_server):
    url, engine = slow_server
    with (
        httpx.Client() as web,
        web.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}) as stream,
    ):
        pieces = stream.iter_bytes()
        next(pieces)
        assert len(engine.active) == 1
    wait_until_idle(engine)


def test_leaving_without_a_stream_ends_it(slow_server):
    url, engine = slow_server
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=LONG | {"n": 3}, timeout=0.5)
    wait_until_idle(engine)


def test_cancelling_by_the_openai_client(slow_server):
    url, engine = slow_server
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = client.completions.create(model="tiny", stream=True, **LONG)
        next(stream)
        stream.close()
    wait_until_idle(engine)


def hang_up(url: str, body: dict, seconds: float) -> None:
    """Ask, and be killed after a while: the connection is reset."""
    data = json.dumps(body).encode()
    with connect(url) as sock:
        sock.sendall(
            HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data[: random.randint(1, 2 * len(data))]
        )
        time.sleep(seconds)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_the_log(capfd):
    with serving() as (url, _):
        httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 10, "max_tokens": 5, "temperature": 0})
        httpx.post(
            f"{url}/v1/completions",
            json={"prompt": "x" * 12, "max_tokens": 5, "temperature": 0, "stream": True},
        )
        httpx.post(f"{url}/v1/completions", json={"a\nb\x1b": 1})
        httpx.get(f"{url}/health")
    ready, *lines = capfd.readouterr().err.splitlines()
    assert ready == "ready"
    number = r"[\d.,]+"
    for line, n, cached in zip(lines, (10, 12), (0, 10), strict=False):
        pattern = rf"POST /v1/completions 200: {n} tokens in \({cached} cached\), 5 out, "
        assert re.fullmatch(rf"{pattern}the first after \d+ ms, {number} tokens/s, length", line), line
    assert lines[2] == r"POST /v1/completions 400: the field 'a\nb\x1b' is not supported" and len(lines) == 3


# ---- The script


@pytest.fixture
def start(tmp_path, request):
    """Start python -m sologpt.serve on a tiny checkpoint. Return the process and its address."""
    path = tmp_path / "best.pt"
    SCRIPT_MODEL.save(path, tokenizer=BYTES.to_dict())
    processes = []

    def start(*args: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-m", "sologpt.serve", str(path), "--port=0", *args]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        for line in process.stderr:
            if found := re.search(r"http://\S+", line):
                return process, found[0]
        raise AssertionError("it has not started")

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow
def test_sigterm_lets_answers_end(start):
    process, url = start()
    body = {"prompt": "x", "max_tokens": 1000, "temperature": 0, "stream": True}
    with httpx.Client(timeout=60) as web, web.stream("POST", f"{url}/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(30) == 0
    log = process.stderr.read()
    assert "Traceback" not in log and "1000 out" in log


@pytest.mark.slow
def test_ctrl_c(start):
    process, _ = start("--host=0.0.0.0")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert "Traceback" not in process.stderr.read()


def test_bad_arguments(server):
    port = server[0].rsplit(":")[-1]
    for args, pattern in [
        (["--port", port], rf"cannot listen on 127\.0\.0\.1, port {port}: .*--port"),
        (["--port=99999"], "99999"),
        (["--host=nowhere.invalid"], "nowhere.invalid"),
        (["--port=0", "nothing.pt"], "no checkpoint .*nothing.pt"),
        (["--port=x"], "port.*'x'"),
        (["--prot=1"], "--prot"),
    ]:
        with pytest.raises((UserError, FileNotFoundError), match=pattern):
            main(args)


def resources(process: subprocess.Popen) -> tuple[int, int, int]:
    """Resident megabytes, threads and open files."""
    folder = Path(f"/proc/{process.pid}")
    pages = int((folder / "statm").read_text().split()[1])
    counts = [len(os.listdir(folder / name)) for name in ("task", "fd")]
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20, *counts


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_random_requests_and_killed_clients(start):
    """No row, thread, file or memory is lost, and who stays gets what he would get alone."""
    random.seed(0)
    process, url = start("--rows=4")
    threading.Thread(target=process.stderr.read, daemon=True).start()
    prompts = [bytes(random.choices(b"ab ", k=random.randint(1, 60))).decode() for _ in range(30)]
    streams = {p: stream_text(SCRIPT_MODEL, BYTES, p, 60, temperature=0) for p in prompts}
    tokens = {
        p: [*stream] and [token for token in stream.tokens if token != BYTES.eot]
        for p, stream in streams.items()
    }
    settings = [{"temperature": 0}, {"temperature": 0, "logprobs": 3}, {"top_p": 0.9, "n": 2}]

    def one(_) -> bool:
        prompt, n = random.choice(prompts), random.randint(1, 60)
        body = {"prompt": prompt, "max_tokens": n, "stream": random.random() < 0.5} | random.choice(settings)
        if random.random() < 1 / 3:
            hang_up(url, body, random.random() / 5)
            return False
        if body["stream"] and random.random() < 1 / 3:
            with web.stream("POST", "/v1/completions", json=body) as stream:
                next(stream.iter_bytes())  # and leave
            return False
        answer = web.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        if "temperature" not in body:
            return False
        events = (
            [json.loads(event[6:]) for event in answer.text.split("\n\n")[:-2]]
            if body["stream"]
            else [answer.json()]
        )
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == BYTES.decode(tokens[prompt][:n])
        return True

    def ask(n: int) -> int:
        finished = sum(pool.map(one, range(n)))
        while web.get("/health").json()["requests"]:
            time.sleep(0.05)
        return finished

    with httpx.Client(base_url=url, timeout=60) as web, ThreadPoolExecutor(16) as pool:
        ask(300)
        before = resources(process)
        finished = ask(500)
        time.sleep(1)
        after = resources(process)
    assert finished > 100
    # a few more threads of the pool that encodes may have started, and connections are kept alive for a while
    assert after[0] <= before[0] + 8 and after[1] <= before[1] + 4 and after[2] <= before[2] + 16, (
        before,
        after,
    )

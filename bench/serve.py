"""Measure servers of the OpenAI API under load:

    python -m bench.serve "--server=soloGPT=python -m sologpt.serve hf:smollm2 --port={port}" \\
        "--server=llama.cpp=python -m llama_cpp.server --model smollm2.gguf --port={port}"

Each server is started, and asked by 1, 4, 8 and 16 clients at once. A client asks a few times, one after the
other, with a prompt of its own. Then the second turn of a long chat is measured beside a first one.
"""

import asyncio
import json
import random
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import httpx

import configurator
from sologpt import errors
from sologpt.errors import RunError, UserError

WORDS = """river stone garden winter letter music island silver morning bridge forest doctor window market
summer paper mountain kitchen teacher village machine castle sailor mirror candle pocket train shadow"""


@dataclass
class Config:
    server: tuple[str, ...] = ()  # NAME=COMMAND of a server, with {port} in the command; may be given again
    model: str = ""  # the model that requests name, where the server demands a name
    clients: str = "1,4,8,16"  # numbers of clients
    requests: int = 3  # of each client
    prompt: int = 100  # tokens of a prompt, roughly
    tokens: int = 64  # tokens of an answer, at most
    history: int = 2000  # tokens of the chat before its second turn, roughly; 0 measures none

    def __post_init__(self) -> None:
        for server in self.server:
            if "=" not in server or "{port}" not in server:
                raise UserError(f"server must be NAME=COMMAND with {{port}} in the command, not {server!r}")


@dataclass
class Answer:
    """Times are in seconds, after the request."""

    text: str = ""
    times: list[float] = field(default_factory=list)  # of each piece of text: a token, roughly


def make_prompt(tokens: int) -> str:
    words = " ".join(random.choices(WORDS.split(), k=tokens))
    return f"Write a long story with all of these words: {words}"


async def ask(client: httpx.AsyncClient, messages: list[dict[str, str]], config: Config) -> Answer:
    """Stream an answer."""
    body: dict[str, Any] = {
        "messages": messages,
        "max_tokens": config.tokens,
        "temperature": 0,
        "stream": True,
    }
    if config.model:
        body["model"] = config.model
    answer, started = Answer(), time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RunError(f"status {response.status_code}: {(await response.aread()).decode()[:200]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:]).get("choices", []):
                if text := choice["delta"].get("content"):
                    answer.text += text
                    answer.times.append(time.perf_counter() - started)
    return answer


async def load(url: str, clients: int, config: Config) -> str:
    """Tokens/s of all clients together, and the time to the first token."""

    async def ask_repeatedly(client: httpx.AsyncClient) -> list[Answer]:
        prompts = [make_prompt(config.prompt) for _ in range(config.requests)]
        return [await ask(client, [{"role": "user", "content": prompt}], config) for prompt in prompts]

    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        started = time.perf_counter()
        lists = await asyncio.gather(*(ask_repeatedly(client) for _ in range(clients)))
        seconds = time.perf_counter() - started
    answers = [answer for answers in lists for answer in answers]
    first = sorted(1000 * answer.times[0] for answer in answers if answer.times)
    n = sum(len(answer.times) for answer in answers)
    late = quantiles(first, n=20)[-1] if len(first) > 1 else first[0]
    return f"{clients:8} {n:8} {n / seconds:10.1f} {median(first):12.0f} {late:12.0f}"


async def turns(url: str, config: Config) -> str:
    """The time to the first token in the second turn of a long chat, and in a chat of that turn alone."""
    fresh, second = [], []
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        for _ in range(config.requests):
            chat = [{"role": "user", "content": make_prompt(config.history)}]
            answer = await ask(client, chat, config)
            question = make_prompt(config.prompt)
            chat += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": question}]
            again = await ask(client, chat, config)
            first = await ask(client, [{"role": "user", "content": make_prompt(config.prompt)}], config)
            if again.times and first.times:  # both have an answer
                second.append(1000 * again.times[0])
                fresh.append(1000 * first.times[0])
    line = f"first token: {median(second):.0f} ms in the second turn after {config.history} tokens, "
    return line + f"{median(fresh):.0f} ms in a fresh chat ({median(second) / median(fresh):.2f} x)"


def wait_until_ready(process: subprocess.Popen, url: str) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RunError(f"{shlex.join(process.args)} has ended with status {process.returncode}")  # type: ignore
        try:
            httpx.get(f"{url}/v1/models", timeout=10)
            return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RunError(f"{url} does not answer")


def measure(name: str, command: str, config: Config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    random.seed(0)
    silent: dict = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(shlex.split(command.format(port=port)), **silent)
    try:
        wait_until_ready(process, url)
        asyncio.run(load(url, 1, config))  # warm up
        print(f"{name}\n clients   tokens   tokens/s   first (ms)     95% (ms)")
        for clients in map(int, config.clients.split(",")):
            print(asyncio.run(load(url, clients, config)), flush=True)
        if config.history:
            print(asyncio.run(turns(url, config)), flush=True)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    config = configurator.parse(Config)
    for server in config.server:
        name, _, command = server.partition("=")
        try:
            measure(name, command, config)
        except (RunError, httpx.HTTPError) as e:
            print(f"{name}: {e}", file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)

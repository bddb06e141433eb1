"""The benchmarks: decode, position, prefill and training, each beside its limit.

Candidates take turns (A B A B ...), so that a machine that slows down slows down all of them. Decode is
limited by memory bandwidth, since each token reads the weights and its row's KV cache. Prefill and training
are limited by the speed of matrix products.
"""

import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.peers import SHAPES, Candidate, SoloGPT
from bench.report import Row
from gpt import GPT, GPTConfig, KVCache
from sologpt import errors, fast
from sologpt import quantize as weights
from sologpt.device import keep_freed_memory
from sologpt.errors import RunError, UserError
from sologpt.graphs import compile_rotate
from sologpt.log import flops_per_token
from sologpt.loss import chunked_cross_entropy
from sologpt.optim import configure_optimizers

BENCHMARKS = ("train", "prefill", "decode", "generate", "position")
DECODE_ROWS = (1, 4, 8, 16)
DECODE_PROMPT, PREFILL_PROMPT = 16, 512  # tokens
TRAIN_BATCH = (4, 256)  # rows and tokens of a training step
POSITIONS = (100, 1000)  # tokens in the KV cache
POSITION_CACHE = 1024  # its size

SPAWN = multiprocessing.get_context("spawn")  # a fork would inherit threads and CUDA
Call = Callable[[], Any]


# -----------------------------------------------------------------------------
# Timing


def take_turns(
    calls: dict[str, Call], tokens_per_call: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the tokens/s of each call in each round, after a round to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            synchronize(device)
            seconds = time.perf_counter() - started
            if i > 0:
                rates[name].append(tokens_per_call / seconds)
    return rates


def synchronize(device: torch.device) -> None:
    """Wait for the kernels that the device has queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


class Subprocess:
    """A call in a subprocess of its own: what it changes there, such as the allocator, stays there."""

    def __init__(self, make_call: Callable[[], Call], device: torch.device) -> None:
        self.peak_memory: int | None = None  # bytes, None if unknown
        self.connection, theirs = SPAWN.Pipe()
        SPAWN.Process(target=run_on_request, args=(make_call, device, theirs), daemon=True).start()

    def __call__(self) -> None:
        self.connection.send("run")
        self.peak_memory = self.connection.recv()


def run_on_request(make_call: Callable[[], Call], device: torch.device, connection: Connection) -> None:
    """In the subprocess: make one call per message, and answer with the peak memory so far."""
    sys.stdout = sys.stderr  # as in send_rows
    call = make_call()
    with suppress(EOFError):  # the parent has closed its end
        while connection.recv():
            call()
            synchronize(device)
            connection.send(peak_memory(device))


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process has used: of the GPU's memory on CUDA, else of main memory."""
    status = Path("/proc/self/status")
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "cpu" and status.exists():
        return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) * 1024
    return None


# -----------------------------------------------------------------------------
# Limits


def calls_per_second(call: Call, device: torch.device) -> float:
    return statistics.median(take_turns({"": call}, 1, 7, device)[""])


def memory_bandwidth(device: torch.device) -> float:
    """Return the bytes/s of reading a tensor that is larger than any cache."""
    x = torch.ones(2**28, device=device)
    return x.nbytes * calls_per_second(x.sum, device)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of multiplying two large matrices, plain or packed, whichever is faster."""
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=dtype)
    products: list[Call] = [lambda: x @ x]
    if weights.packs(device, dtype):
        products.append(partial(weights.packed_linear, x, torch.ops.mkldnn._reorder_linear_weight(x)))
    return 2 * n**3 * max(calls_per_second(product, device) for product in products)


def weights_read(model: GPT) -> int:
    """Return the bytes of weights that a forward reads: all but an untied embedding, which is a lookup."""
    embedding = 0 if model.config.tie_embd else model.wte.weight.nbytes
    return sum(p.nbytes for p in model.parameters()) - embedding


def decode_limit(model: GPT, rows: int, tokens: int, bandwidth: float) -> float:
    """Return the tokens/s if a step reads the weights once, and each row's KV cache at its mean length."""
    kv_cache = KVCache(model.config, 1, DECODE_PROMPT + tokens // 2, dtype=model.dtype)
    return rows * bandwidth / (weights_read(model) + rows * kv_cache.nbytes)


def prefill_flops(model: GPT, n: int) -> float:
    """Return the FLOPs per token of a prefill of n tokens: 2 for each weight, and attention to n / 2 tokens.

    The head does not count, since only the last token needs it.
    """
    c = model.config
    n_weights = weights_read(model) // model.dtype.itemsize - model.head_weight.numel()
    return 2 * n_weights + 4 * c.n_layer * c.n_head * c.head_dim * n / 2


# -----------------------------------------------------------------------------
# Inference


def decode_calls(
    candidates: list[Candidate], vocab_size: int, rows: int, prompt: int, n: int
) -> dict[str, Call]:
    """Whole calls of generate: a prefill of `prompt` tokens, then n greedy tokens for each row."""
    prompts = torch.randint(1, vocab_size, (rows, prompt)).tolist()
    calls = {candidate.name: candidate.decode(prompts, n) for candidate in candidates}
    return {name: call for name, call in calls.items() if call}


def prefill_calls(candidates: list[Candidate], vocab_size: int) -> dict[str, Call]:
    prompt = torch.randint(1, vocab_size, (PREFILL_PROMPT,)).tolist()
    calls = {candidate.name: candidate.prefill(prompt) for candidate in candidates}
    return {name: call for name, call in calls.items() if call}


def position_calls(model: GPT, n: int, compile: bool) -> dict[str, Call]:
    """n decode steps each, with few and with many tokens in the cache."""
    model = peers.for_inference(model)
    decode = fast.prepare(model, compile=compile)
    cache = KVCache(model.config, 1, POSITION_CACHE, model.device, model.dtype)

    def call(length: int) -> None:
        ids = torch.zeros(1, dtype=torch.long, device=model.device)
        for _ in range(n):
            cache.lengths[:] = length
            ids = decode(ids, cache).argmax(-1)
            ids.tolist()  # waits for the device, as generate does

    return {f"at {length}": partial(call, length) for length in POSITIONS}


# -----------------------------------------------------------------------------
# Training. A step is forward, backward and optimizers, as the candidate's own trainer runs them here


def training_call(
    forward: Any,
    optimizers: list[torch.optim.Optimizer],
    vocab_size: int,
    device: torch.device,
    autocast: AbstractContextManager,
) -> Call:
    idx, targets = torch.randint(vocab_size, (2, *TRAIN_BATCH), device=device)  # (B, T)

    def call() -> None:
        with autocast:
            output = forward(idx, targets)
        loss = output[1] if isinstance(output, tuple) else output
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return call


def train_solo(
    config: GPTConfig, device: torch.device, dtype: torch.dtype,
    optimizer: str = "muon", compile: bool = False,
) -> Call:  # fmt: skip
    keep_freed_memory()
    torch.manual_seed(0)
    model = GPT(config).to(device)
    model.loss = chunked_cross_entropy
    is_bfloat16 = dtype == torch.bfloat16
    optimizers = configure_optimizers(model, optimizer=optimizer, dtype=dtype if is_bfloat16 else None)
    autocast = torch.autocast(device.type, dtype) if is_bfloat16 else nullcontext()
    if compile:
        compile_rotate()
    forward = torch.compile(model) if compile else model
    return training_call(forward, optimizers, config.vocab_size, device, autocast)


def train_nanogpt(config: GPTConfig, device: torch.device, path: str, compile: bool = False) -> Call:
    model = peers.make_nanogpt(path, config, device)
    optimizers = [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)]
    model = torch.compile(model) if compile else model
    autocast = torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()
    return training_call(model, optimizers, config.vocab_size, device, autocast)


def train_nanochat(config: GPTConfig, device: torch.device, dtype: torch.dtype, path: str) -> Call:
    model = peers.make_nanochat(path, config, device, dtype)
    return training_call(model, [model.setup_optimizer()], config.vocab_size, device, nullcontext())


def training_calls(
    config: GPTConfig, device: torch.device, dtype: torch.dtype, paths: dict[str, str], compile: bool
) -> dict[str, Subprocess]:
    makers: dict[str, Callable[[], Call]] = {
        "soloGPT": partial(train_solo, config, device, dtype),
        "soloGPT AdamW": partial(train_solo, config, device, dtype, "adamw"),
    }
    if compile:
        makers["soloGPT compiled"] = partial(train_solo, config, device, dtype, compile=True)
        makers["soloGPT AdamW compiled"] = partial(train_solo, config, device, dtype, "adamw", compile=True)
    if "nanogpt" in paths:
        makers["nanoGPT"] = partial(train_nanogpt, config, device, paths["nanogpt"])
    if "nanogpt" in paths and compile:
        makers["nanoGPT compiled"] = partial(train_nanogpt, config, device, paths["nanogpt"], compile=True)
    if "nanochat" in paths:
        makers["nanochat"] = partial(train_nanochat, config, device, dtype, paths["nanochat"])
    return {name: Subprocess(maker, device) for name, maker in makers.items()}


# -----------------------------------------------------------------------------
# All benchmarks of one shape and dtype


def make_candidates(
    model: GPT, shape: str, device: torch.device, dtype: torch.dtype, paths: dict[str, str],
    compile: bool, quantize: tuple[str, ...],
) -> list[Candidate]:  # fmt: skip
    """Return soloGPT and the peers that have this shape: nanoGPT and nanochat read no open weights.

    On a CPU, "compiled" is decode.cpp, which a large model has without being asked for.
    """
    candidates: list[Candidate] = []
    for kind in (None, *quantize):
        candidates.append(SoloGPT(model, quantize=kind))
        if compile and (device.type != "cpu" or shape == "tiny"):
            candidates.append(SoloGPT(model, compile=True, quantize=kind))
    if "transformers" in paths:
        candidates.append(peers.Transformers(model))
    if "nanochat" in paths and shape in SHAPES:
        candidates.append(peers.NanoChat(paths["nanochat"], model.config, device, dtype))
    if "nanogpt" in paths and shape in SHAPES:
        candidates.append(peers.NanoGPT(paths["nanogpt"], model.config, device, dtype))
    if "gpt-fast" in paths:
        candidates.append(peers.GptFast(paths["gpt-fast"], model.config, device, dtype, compile))
    for name, path in paths.items():
        if name.startswith("llama.cpp") and shape not in SHAPES:
            candidates.append(peers.LlamaCpp(name, path, max(DECODE_ROWS), PREFILL_PROMPT))
    return candidates


@torch.no_grad()
def run(
    benchmarks: tuple[str, ...], shape: str, dtype: torch.dtype, device: torch.device, paths: dict[str, str],
    rounds: int, tokens: int, compile: bool, quantize: tuple[str, ...] = (),
) -> Iterator[list[Row]]:  # fmt: skip
    """Yield the rows of each benchmark. paths: peers by name. tokens: how many a row decodes in a call."""
    model = peers.make_model(shape, device, dtype)
    candidates = make_candidates(model, shape, device, dtype, paths, compile, quantize)
    fewer_bytes = {candidate.name for candidate in candidates if not candidate.reads_all_bytes}
    vocab_size = model.config.vocab_size
    bandwidth = memory_bandwidth(device)
    flops = peak_flops(device, dtype)

    def time_calls(benchmark: str, calls: dict[str, Call], n: int, limit: float | None = None) -> list[Row]:
        rates = take_turns(calls, n, rounds, device)
        rows = []
        for name in calls:
            reads_less = name in fewer_bytes and "decode" in benchmark
            its_limit = None if reads_less else limit
            rows.append(
                Row(benchmark, shape, str(dtype).removeprefix("torch."), name, rates[name], its_limit)
            )
        return rows

    if "decode" in benchmarks:
        for B in DECODE_ROWS:
            calls = decode_calls(candidates, vocab_size, B, DECODE_PROMPT, tokens)
            limit = decode_limit(model, B, tokens, bandwidth)
            yield time_calls(f"decode, batch {B}", calls, B * tokens, limit)
    if "generate" in benchmarks:
        calls = decode_calls(candidates, vocab_size, 1, PREFILL_PROMPT, tokens)
        yield time_calls(f"{PREFILL_PROMPT} + {tokens}", calls, tokens)
    if "position" in benchmarks:
        yield time_calls("decode", position_calls(model, tokens, compile), tokens)
    if "prefill" in benchmarks:
        calls = prefill_calls(candidates, vocab_size)
        limit = flops / prefill_flops(model, PREFILL_PROMPT)
        yield time_calls(f"prefill of {PREFILL_PROMPT}", calls, PREFILL_PROMPT, limit)
    if "train" in benchmarks and shape in SHAPES:
        B, T = TRAIN_BATCH
        config = replace(model.config, sequence_len=T)
        limit = flops / flops_per_token(model, T)
        del model, candidates
        calls = {}  # frees their memory for the subprocesses
        training = training_calls(config, device, dtype, paths, compile)
        rows = time_calls("train", dict(training), B * T, limit)
        for row in rows:
            row.peak_memory = training[row.candidate].peak_memory
        yield rows


def run_in_subprocess(*args: Any, **kwargs: Any) -> Iterator[list[Row]]:
    """`run` in a subprocess, since some peers keep the dtype that they were imported with.

    UserError for a mistake of the user, RunError if the subprocess fails. A bug's traceback is on stderr.
    """
    connection, theirs = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=send_rows, args=(theirs, args, kwargs))
    process.start()
    theirs.close()  # so that recv raises when the subprocess has died
    with suppress(EOFError):
        while rows := connection.recv():
            if isinstance(rows, Exception):
                raise rows
            yield rows
    process.join()
    if process.exitcode:
        raise RunError(f"the subprocess of the benchmark has failed with exit status {process.exitcode}")


def send_rows(connection: Connection, args: tuple, kwargs: dict[str, Any]) -> None:
    """In the subprocess: send lists of rows, or the error that ends them."""
    sys.stdout = sys.stderr  # peers print, and stdout is for the results
    try:
        for rows in run(*args, **kwargs):
            connection.send(rows)
    except Exception as e:
        message, status = errors.describe(e, "a smaller shape")
        if not status:
            raise
        connection.send(UserError(message) if status == 2 else RunError(message))

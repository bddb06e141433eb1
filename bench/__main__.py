"""How fast it is, beside its limits and its peers: python bench.py [--peers=transformers --peers=nanogpt=DIR ...]

Rivals take turns (A B A B ...) in one process; a figure is the median of several rounds, a ratio that of two medians.
The limits are measured in the same run: what a token must read (the weights once, and its row's keys and values) over
the speed at which memory is read, for decode; the products that a token takes over the speed of the largest matrix
product, for prefill and training. Absolute figures belong to the machine that this prints first.
"""

import importlib.util
import json
import multiprocessing
import os
import pickle
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import configurator
from sologpt import hf
from configurator import RunError, UserError
from gpt import GPT, GPTConfig, KVCache, packed_linear, packs, pick_device
from train import keep_freed_memory

SHAPES = {
    "tiny": GPTConfig(sequence_len=1024, vocab_size=256, n_layer=6, n_head=6, n_embd=384),
    "gpt2": GPTConfig(sequence_len=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768),
}
MEASURES = ("train", "prefill", "decode", "position")
PEERS = ("transformers", "nanogpt", "nanochat", "gpt-fast", "llama.cpp")
PROMPT, BATCH = 512, (4, 256)  # tokens of a prefill; rows and tokens of a training step
Rival = Callable[[], int]  # does a turn, and returns how many tokens it made


@dataclass
class Config:
    shape: tuple[str, ...] = ("tiny", "gpt2")  # tiny (6 x 384, 256 ids), gpt2 (12 x 768, 50304), or hf:NAME_OR_DIR
    dtype: tuple[str, ...] = ("float32", "bfloat16")  # of the weights; in training, of the products
    measure: tuple[str, ...] = MEASURES  # train, prefill, decode, position (a token late in the cache, and early)
    peers: tuple[str, ...] = ()  # transformers, nanogpt=DIR, nanochat=DIR, gpt-fast=DIR, llama.cpp=GGUF (with hf:)
    rounds: int = 5  # turns of each rival
    tokens: int = 64  # decoded in one turn
    compile: bool = True  # measure what torch.compile makes of it, too
    time_to_loss: bool = False  # instead: seconds to nanoGPT's loss on tiny Shakespeare, beside nanogpt= and nanochat=
    json: bool = False  # print one object instead of a table
    plot: str = ""  # draw the table into this file, with the extra 'plot'
    device: str = "auto"  # cuda, mps, cpu, ...; auto takes the first of these that is there

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("dtype", ("float32", "bfloat16")), ("measure", MEASURES)):
            for value in getattr(self, name):
                if value not in known and not (name == "shape" and value.startswith("hf:")):
                    raise ValueError(f"{name} must be of {', '.join(known)}, not {value!r}")
        for peer in self.peers:
            name, is_path, path = peer.partition("=")
            if name not in PEERS or (bool(is_path) != (name != "transformers")):
                raise ValueError(
                    f"peers are transformers and {', '.join(f'{p}=PATH' for p in PEERS[1:])}, not {peer!r}"
                )
            if is_path and not Path(path).exists():
                raise ValueError(f"--peers={peer}: there is no {path}")
        if self.rounds < 1 or self.tokens < 1:
            raise ValueError("rounds and tokens must be at least 1")

    @property
    def paths(self) -> dict[str, str]:
        """The path of each peer, by its name."""
        return {name: path for name, _, path in (peer.partition("=") for peer in self.peers)}


# -----------------------------------------------------------------------------
# Turns and limits


def take_turns(rivals: dict[str, Rival], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Tokens/s of each rival in each round, after one turn to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, rival in rivals.items():
            started = time.perf_counter()
            tokens = rival()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if turn:
                rates[name].append(tokens / (time.perf_counter() - started))
    return rates


def per_second(call: Callable[[], Any], device: torch.device) -> float:
    """How often a call can be made."""

    def turn() -> int:
        call()
        return 1

    return statistics.median(take_turns({"": turn}, 7, device)[""])


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s at which a tensor that fits no cache is read."""
    x = torch.ones(2**28, device=device)
    return x.nbytes * per_second(x.sum, device)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations/s of a product of two large matrices, by whichever library is faster at it."""
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=dtype)
    products: list[Callable[[], Any]] = [lambda: x @ x]
    if packs(device, dtype):
        products.append(partial(packed_linear, x, torch.ops.mkldnn._reorder_linear_weight(x)))
    return 2 * n**3 * max(per_second(product, device) for product in products)


def weights_read(model: GPT) -> int:
    """Bytes of the weights that each forward reads: all but the embedding, unless it is the head too."""
    looked_up = 0 if model.config.tie_embd else model.wte.weight.nbytes
    return sum(p.nbytes for p in model.parameters()) - looked_up


# -----------------------------------------------------------------------------
# What is measured, for us and for each peer that can do it


def make_model(shape: str, device: torch.device, dtype: torch.dtype) -> GPT:
    if shape.startswith("hf:"):
        return hf.load(shape.removeprefix("hf:"), device, dtype)[0]
    torch.manual_seed(0)
    model = GPT(SHAPES[shape])
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return model.to(device, dtype).eval()


def for_inference(model: GPT, compiled: bool, packed: bool) -> GPT:
    """The same weights, as sample.py has them."""
    with torch.device("meta"):
        fast = GPT(model.config)
    fast.load_state_dict(model.state_dict(), assign=True)  # the same memory
    if compiled:
        fast.compile_decode()
    if packed:
        fast.prepack()
    return fast.eval()


def as_transformers(model: GPT) -> Any:
    """The same weights in Hugging Face's model of the same architecture, written independently of ours."""
    import transformers

    said, weights = hf.export(model)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**said))
    theirs.load_state_dict(weights, strict=not model.config.tie_embd)
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
    return theirs.to(model.device, model.dtype).eval()


def as_nanochat(path: str, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """nanochat's model of the same shape, with weights of its own: it has value embeddings besides."""
    os.environ["NANOCHAT_DTYPE"] = str(dtype).removeprefix("torch.")  # is read when it is imported, and holds for all
    sys.path.append(path)
    from nanochat.gpt import GPT as NanoChat  # type: ignore[import-not-found]
    from nanochat.gpt import GPTConfig as NanoChatConfig

    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    model = NanoChat(NanoChatConfig(**{name: getattr(config, name) for name in names}, window_pattern="L"))
    model.to(device).init_weights()
    return model


def load_file(path: str, name: str) -> Any:
    """The module in a file. Not by sys.path: beside a peer's model there may be a configurator."""
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_nanogpt(path: str, config: GPTConfig, device: torch.device) -> Any:
    nanogpt = load_file(f"{path}/model.py", "nanogpt")
    shape = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    theirs = nanogpt.GPTConfig(**shape, block_size=config.sequence_len, dropout=0.0, bias=False)
    return nanogpt.GPT(theirs).to(device)


def as_gpt_fast(path: str, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """gpt-fast's Llama of the same shape; for an MLP of two matrices, one of three with as many weights."""
    gpt_fast = load_file(f"{path}/model.py", "gpt_fast")
    shape = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head")}
    shape |= dict(dim=config.n_embd, n_local_heads=config.n_kv_head, block_size=config.sequence_len)
    hidden = config.n_hidden if config.mlp == "swiglu" else None
    return gpt_fast.Transformer(gpt_fast.ModelArgs(**shape, intermediate_size=hidden)).to(device, dtype).eval()


class LlamaCpp:
    """llama.cpp on a GGUF file, by llama-cpp-python's low-level calls: no sampler and no text in its way."""

    def __init__(self, path: str, n_seq: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.mute = llama_cpp.llama_log_callback(lambda level, text, data: None)  # must outlive the calls
        llama_cpp.llama_log_set(self.mute, None)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise UserError(f"--peers=llama.cpp={path} cannot be loaded")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 1024 * n_seq, PROMPT, PROMPT, n_seq
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def forward(self, tokens: list[int], position: int, rows: int = 1) -> list[int]:
        """Read tokens for each of so many rows; returns the likeliest next of each. Only the last gives logits."""
        batch = self.api.llama_batch_init(len(tokens) * rows, 0, 1)
        batch.n_tokens = len(tokens) * rows
        for row in range(rows):
            for i, token in enumerate(tokens):
                at = row * len(tokens) + i
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + i, 1
                batch.seq_id[at][0], batch.logits[at] = row, i == len(tokens) - 1
        assert self.api.llama_decode(self.context, batch) == 0
        ends = [row * len(tokens) + len(tokens) - 1 for row in range(rows)]
        found = [self.api.llama_get_logits_ith(self.context, end) for end in ends]
        self.api.llama_batch_free(batch)
        return [int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax()) for logits in found]

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)


def decode(model: GPT, peers: dict[str, Any], batch_size: int, n: int, compiled: bool) -> dict[str, Rival]:
    """Whole calls of generate: a prompt of 16 tokens, then n greedy ones, for each of so many rows."""
    prompts = torch.randint(1, model.config.vocab_size, (batch_size, 16)).tolist()

    def ours(model: GPT) -> int:
        return sum(len(row) for row in model.generate_batch(prompts, n, temperature=0))

    rivals: dict[str, Rival] = {"soloGPT": partial(ours, for_inference(model, False, packed=True))}
    if compiled:
        rivals["soloGPT compiled"] = partial(ours, for_inference(model, True, packed=batch_size > 1))
    if theirs := peers.get("transformers"):
        idx = torch.tensor(prompts, device=model.device)
        settings = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False)

        def transformers() -> int:
            return theirs.generate(idx, attention_mask=torch.ones_like(idx), **settings)[:, 16:].numel()

        rivals["transformers"] = transformers
    if nanochat := peers.get("nanochat"):
        from nanochat.engine import KVCache as NanoChatCache  # type: ignore[import-not-found]

        def nanochat_decode() -> int:
            c = nanochat.config
            shape = (batch_size, c.n_kv_head, 16 + n, c.n_embd // c.n_head, c.n_layer, model.device, model.dtype)
            cache, ids = NanoChatCache(*shape), torch.tensor(prompts, device=model.device)
            for _ in range(n):
                ids = nanochat(ids, kv_cache=cache)[:, -1].argmax(-1, keepdim=True)
                ids.tolist()
            return n * batch_size

        rivals["nanochat"] = nanochat_decode
    if gpt_fast := peers.get("gpt-fast"):
        with model.device:
            gpt_fast.setup_caches(batch_size, 16 + n)
        one = torch.compile(gpt_fast.forward, mode="reduce-overhead", fullgraph=True) if compiled else gpt_fast

        def gpt_fast_decode() -> int:
            positions = torch.arange(16 + n, device=model.device)
            ids = gpt_fast(torch.tensor(prompts, device=model.device), positions[:16])[:, -1].argmax(-1, keepdim=True)
            for i in range(16, 16 + n - 1):
                ids = one(ids.clone(), positions[i : i + 1])[:, -1].argmax(-1, keepdim=True)
                ids.tolist()
            return n * batch_size

        rivals["gpt-fast"] = gpt_fast_decode
    if llama := peers.get("llama.cpp"):

        def llama_decode() -> int:
            llama.reset()
            [token, *_] = llama.forward(prompts[0], 0, batch_size)
            for i in range(n - 1):
                [token, *_] = llama.forward([token], 16 + i, batch_size)
            return n * batch_size

        rivals["llama.cpp"] = llama_decode
    return rivals


def prefill(model: GPT, peers: dict[str, Any]) -> dict[str, Rival]:
    """One prompt, and the logits after it."""
    prompt = torch.randint(1, model.config.vocab_size, (PROMPT,)).tolist()
    idx = torch.tensor([prompt], device=model.device)
    packed = for_inference(model, False, packed=True)

    def ours() -> int:
        packed._prefill([prompt], KVCache(model.config, 1, PROMPT, model.device, model.dtype))
        return PROMPT

    calls: dict[str, Callable[[], Any]] = {"soloGPT": ours}
    if theirs := peers.get("transformers"):
        calls["transformers"] = lambda: theirs(idx, use_cache=True, logits_to_keep=1)
    if nanochat := peers.get("nanochat"):
        calls["nanochat"] = lambda: nanochat(idx)
    if nanogpt := peers.get("nanogpt"):
        calls["nanoGPT"] = lambda: nanogpt(idx)
    if llama := peers.get("llama.cpp"):
        calls["llama.cpp"] = lambda: (llama.reset(), llama.forward(prompt, 0))

    def rival(call: Callable[[], Any]) -> int:
        call()
        return PROMPT

    return {name: partial(rival, call) for name, call in calls.items()}


def position(model: GPT, config: Config) -> dict[str, Rival]:
    """Greedy tokens after 100, and after 1000."""
    if config.compile:
        model.compile_decode()
    cache = KVCache(model.config, 1, 1024, model.device, model.dtype)

    def at(length: int) -> int:
        cache.lengths[:] = length
        ids = torch.zeros(1, dtype=torch.long, device=model.device)
        for _ in range(config.tokens):
            cache.truncate(length)
            ids = model._decode(ids, cache, torch.tensor([True])).argmax(-1)
            ids.tolist()
        return config.tokens

    return {f"at {length}": partial(at, length) for length in (100, 1000)}


def training(name: str, config: GPTConfig, device: torch.device, dtype: torch.dtype, path: str = "") -> Rival:
    """A step of training, forward, backward and optimizers, as its train.py does it on this device."""
    B, T = BATCH
    idx, targets = torch.randint(config.vocab_size, (2, B, T), device=device)
    autocast: AbstractContextManager = nullcontext()
    model: Any
    if name.startswith("soloGPT"):
        keep_freed_memory()
        torch.manual_seed(0)
        model = GPT(config).to(device)
        forward, optimizers = model, model.configure_optimizers(optimizer="adamw" if "AdamW" in name else "muon")
        if dtype == torch.bfloat16:
            autocast = torch.autocast(device.type, dtype)
        if "compiled" in name:
            forward = torch.compile(model)
    elif name == "nanochat":
        model = forward = as_nanochat(path, config, device, dtype)
        optimizers = [model.setup_optimizer()]
    else:
        model = forward = as_nanogpt(path, config, device)
        optimizers = [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)]
        if device.type == "cuda":
            autocast = torch.autocast(device.type, torch.bfloat16)

    def step() -> int:
        with autocast:
            loss = forward(idx, targets)
        (loss[1] if isinstance(loss, tuple) else loss).backward()
        for optimizer in optimizers:
            with autocast:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return B * T

    return step


def serve(make: Callable[[], Rival], device: torch.device, connection: Any) -> None:
    """In a process of its own: do a turn when told to, and answer with its tokens and the peak of memory so far."""
    rival, status = make(), Path("/proc/self/status")
    with suppress(EOFError):  # the other end is gone
        while connection.recv():
            tokens, peak = rival(), None
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated()
            elif status.exists():
                peak = int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) * 1024
            connection.send((tokens, peak))


class Apart:
    """A rival in a process of its own, where what it changes is not there for the others."""

    def __init__(self, make: Callable[[], Rival], device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self.peak: int | None = None  # bytes of memory at most, in all its turns, where something tells
        self.connection, theirs = context.Pipe()
        context.Process(target=serve, args=(make, device, theirs), daemon=True).start()

    def __call__(self) -> int:
        self.connection.send(True)
        tokens, self.peak = self.connection.recv()
        return tokens


# -----------------------------------------------------------------------------
# Seconds to a loss: nanoGPT's quick run on a CPU, and others of its shape. Each is a process, timed from its start

ROOT = Path(__file__).resolve().parent
CONTEXT, STEPS = 64, 178
SHAPE: dict[str, Any] = dict(n_layer=4, n_embd=128)
HEADS: dict[str, Any] = dict(n_head=2, n_kv_head=1)  # ours, and nanochat's; nanoGPT's run has 4 and 4
OURS = "--learning_rate=0.03 --momentum=0.8 --embd_lr=0.15 --head_lr=0.012 --warmdown=0.5 --sample_tokens=0"
NANOGPT = "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --device=cpu --compile=False --eval_iters=20"


def shakespeare(split: str) -> np.ndarray:
    """The bytes of tiny Shakespeare."""
    return np.fromfile(ROOT / f"data/shakespeare/{split}.bin", "<u2").astype(np.int64)


def characters(split: str) -> np.ndarray:
    """The same with an id for each of the 65 that come in it, as nanoGPT has it."""
    return np.searchsorted(np.unique(shakespeare("train")), shakespeare(split))


def windows(starts: np.ndarray, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T) from each of starts (B,) on."""
    rows = torch.from_numpy(ids[starts[:, None] + np.arange(CONTEXT + 1)])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@torch.no_grad()
def whole_loss(loss: Callable[..., Any], ids: np.ndarray) -> float:
    """The mean of loss(x, y) over all ids, in windows that do not overlap."""
    starts = np.arange((len(ids) - 1) // CONTEXT) * CONTEXT
    x, y = windows(starts, ids)
    return sum(float(loss(*pair)) * len(pair[0]) for pair in zip(x.split(100), y.split(100), strict=True)) / len(x)


def solo_to_loss(path: str, folder: Path) -> Callable[[], float]:
    """The run of the README: it has bytes for tokens."""
    values = SHAPE | HEADS | dict(sequence_len=CONTEXT, max_iters=STEPS, eval_interval=STEPS, eval_iters=20)
    flags = [f"--{name}={value}" for name, value in values.items()]
    command = ["train.py", "--dataset=shakespeare", *flags, *OURS.split()]
    subprocess.run([sys.executable, *command, f"--out_dir={folder}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return lambda: whole_loss(GPT.load(folder / "best.pt"), shakespeare("val"))


def nanogpt_to_loss(path: str, folder: Path) -> Callable[[], float]:
    """Its own train.py and configuration, in a folder with its data."""
    for name in ("train.py", "model.py", "configurator.py", "config"):
        (folder / name).symlink_to(Path(path).resolve() / name)
    where = folder / "data" / "shakespeare_char"
    where.mkdir(parents=True)
    for split in ("train", "val"):
        characters(split).astype("<u2").tofile(where / f"{split}.bin")
    (where / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))
    values = SHAPE | dict(n_head=4, block_size=CONTEXT, batch_size=12)
    flags = [f"--{name}={value}" for name, value in values.items()]
    command = ["train.py", "config/train_shakespeare_char.py", *flags, *NANOGPT.split(), "--out_dir=out"]
    subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)

    def loss() -> float:
        config = GPTConfig(sequence_len=CONTEXT, vocab_size=65, n_head=4, **SHAPE)
        model = as_nanogpt(path, config, torch.device("cpu"))
        model.load_state_dict(torch.load(folder / "out" / "ckpt.pt", weights_only=True)["model"])
        return whole_loss(lambda x, y: model(x, y)[1], characters("val"))

    return loss


def nanochat_to_loss(path: str, folder: Path) -> Callable[[], float]:
    """Its model and its optimizer with its own rates, in a loop as ours: as many steps and tokens, one evaluation."""
    loss = in_a_process(train_nanochat, path)
    return lambda: loss


def train_nanochat(path: str) -> float:
    model = as_nanochat(
        path, GPTConfig(sequence_len=CONTEXT, vocab_size=65, **SHAPE, **HEADS), torch.device("cpu"), torch.float32
    )
    optimizer, ids = model.setup_optimizer(), characters("train")
    for step in range(STEPS):
        starts = np.random.default_rng((0, step)).integers(len(ids) - CONTEXT, size=12)
        model(*windows(starts, ids)).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1, 2 * (STEPS - step) / STEPS)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return whole_loss(model, characters("val"))


# -----------------------------------------------------------------------------
# The table


@dataclass
class Row:
    what: str
    shape: str
    dtype: str
    who: str
    rates: list[float]  # tokens/s in each round
    limit: float | None = None  # tokens/s
    peak: int | None = None  # bytes of memory

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def measure(queue: Any, config: Config, shape: str, dtype_name: str, device: torch.device) -> None:
    """In a process of its own, since some peers know one dtype each: put lists of rows into queue, then None."""
    try:
        for rows in measured(config, shape, getattr(torch, dtype_name), device):
            queue.put(rows)
    except (UserError, ImportError, OSError, ValueError) as e:
        queue.put(str(e))
    finally:
        queue.put(None)


def measured(config: Config, shape: str, dtype: torch.dtype, device: torch.device) -> Iterator[list[Row]]:
    torch.set_grad_enabled(False)
    paths, known = config.paths, shape in SHAPES
    peers: dict[str, Any] = {}
    model = make_model(shape, device, dtype)
    if "transformers" in paths:
        peers["transformers"] = as_transformers(model)
    if "nanochat" in paths and known:
        peers["nanochat"] = as_nanochat(paths["nanochat"], model.config, device, dtype).eval()
    if "nanogpt" in paths and known:
        peers["nanogpt"] = as_nanogpt(paths["nanogpt"], model.config, device).to(dtype).eval()
    if "gpt-fast" in paths:
        peers["gpt-fast"] = as_gpt_fast(paths["gpt-fast"], model.config, device, dtype)
    if "llama.cpp" in paths and not known:
        peers["llama.cpp"] = LlamaCpp(paths["llama.cpp"], 16)
    bandwidth, peak = read_bandwidth(device), matmul_peak(device, dtype)

    def rows(what: str, rivals: dict[str, Rival], limit: float | None = None) -> list[Row]:
        rates = take_turns(rivals, config.rounds, device)
        return [Row(what, shape, str(dtype).removeprefix("torch."), who, rates[who], limit) for who in rivals]

    if "decode" in config.measure:
        cache_of_one = KVCache(model.config, 1, 16 + config.tokens // 2, dtype=dtype).nbytes
        for B in (1, 16):
            limit = B * bandwidth / (weights_read(model) + B * cache_of_one)
            yield rows(f"decode, batch {B}", decode(model, peers, B, config.tokens, config.compile), limit)
    if "position" in config.measure:
        yield rows("decode", position(model, config))
    if "prefill" in config.measure:
        # Two for each weight, but the head is for the last token only; and attention, half a prompt back
        c = model.config
        flops = 2 * weights_read(model) / dtype.itemsize - 2 * model.head_weight.numel()
        flops += 4 * c.n_layer * c.heads[0] * c.heads[2] * PROMPT / 2
        yield rows(f"prefill of {PROMPT}", prefill(model, peers), peak / flops)
    if "train" in config.measure and known:
        c = model.config = replace(model.config, sequence_len=BATCH[1])
        limit = peak / model.flops_per_token()
        del model
        peers.clear()
        names = dict.fromkeys(["soloGPT", "soloGPT AdamW"] + ["soloGPT AdamW compiled"] * config.compile, "")
        names |= {name: paths[key] for key, name in (("nanogpt", "nanoGPT"), ("nanochat", "nanochat")) if key in paths}
        steps = {who: Apart(partial(training, who, c, device, dtype, path), device) for who, path in names.items()}
        found = rows("train", dict(steps), limit)
        for row in found:
            row.peak = steps[row.who].peak
        yield found


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def table(rows: list[Row]) -> Iterator[str]:
    """A line for each: tokens/s with their spread, the share of the limit, how much faster our fastest is, memory."""
    ours = max((row.median for row in rows if row.who.startswith("soloGPT")), default=rows[0].median)
    for row in rows:
        spread = f"{row.median:10,.1f} ({min(row.rates):,.1f} to {max(row.rates):,.1f})"
        cells = [f"{row.what:16} {row.shape[-12:]:12} {row.dtype:9} {row.who:22} {spread:36}"]
        cells += [f"{row.median / row.limit:4.0%} of the limit"] if row.limit else []
        cells += [f"{ours / row.median:.2f} x"] if row.median != ours else []
        cells += [f"{row.peak / 2**30:.2f} GiB"] if row.peak else []
        yield "  ".join(cells)


def draw(rows: list[Row], path: str) -> None:
    """Bars of each rival's tokens/s as a share of the fastest's, a group for each thing measured."""
    try:
        import matplotlib
    except ImportError as e:
        raise UserError("--plot needs the extra 'plot': pip install matplotlib") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.what}\n{row.shape}, {row.dtype}", []).append(row)
    names = list(dict.fromkeys(row.who for row in rows))
    figure, axes = plt.subplots(figsize=(max(7, 1.5 * len(groups)), 4))
    for i, name in enumerate(names):
        points = {
            x + 0.8 * i / len(names): row.median / max(other.median for other in group)
            for x, group in enumerate(groups.values())
            for row in group
            if row.who == name
        }
        axes.bar(list(points), list(points.values()), 0.8 / len(names), align="edge", label=name)
    axes.set_xticks([x + 0.4 for x in range(len(groups))], groups, fontsize=7)
    axes.set_ylabel("tokens/s, share of the fastest")
    axes.legend(fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def time_to_loss(config: Config) -> None:
    """Print, for each round, the seconds of a whole process and the loss that it ends with, over the whole split."""
    if not (ROOT / "data/shakespeare/meta.json").exists():
        raise UserError("--time_to_loss needs the text: python data/shakespeare/prepare.py --tokenizer=bytes")
    runs = {"soloGPT": solo_to_loss, "nanogpt": nanogpt_to_loss, "nanochat": nanochat_to_loss}
    seconds: dict[str, list[float]] = {who: [] for who in runs if who == "soloGPT" or who in config.paths}
    for _ in range(config.rounds):
        for who, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                loss = runs[who](config.paths.get(who, ""), Path(folder))
                times.append(time.perf_counter() - started)
                print(f"{who:9} {times[-1]:6.1f} s to a validation loss of {loss():.4f}", flush=True)
    ours = statistics.median(seconds["soloGPT"])
    for who, times in seconds.items():
        print(f"{who:9} {statistics.median(times):6.1f} s, soloGPT is {statistics.median(times) / ours:.2f} x")


def main() -> None:
    config = configurator.parse(Config)
    if config.time_to_loss:
        return time_to_loss(config)
    try:
        device = pick_device(config.device)
    except ValueError as e:
        raise UserError(str(e)) from e
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    machine = (
        f"{where}, Python {platform.python_version()}, torch {torch.__version__}, median of {config.rounds} rounds"
    )
    if not config.json:
        print(machine)
    context, found = multiprocessing.get_context("spawn"), []
    for shape in config.shape:
        for dtype in config.dtype:
            queue = context.Queue()
            process = context.Process(target=measure, args=(queue, config, shape, dtype, device))
            process.start()
            while rows := queue.get():
                if isinstance(rows, str):
                    raise UserError(rows)
                found += rows
                if not config.json:
                    print(*table(rows), sep="\n", flush=True)
            process.join()
            if process.exitcode:
                raise RunError(f"{shape} in {dtype} has failed")
    if config.json:
        print(json.dumps({"machine": machine, "rows": [asdict(row) | {"median": row.median} for row in found]}))
    if config.plot:
        draw(found, config.plot)


if __name__ == "__main__":
    configurator.run(main)

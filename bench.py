"""How fast it is, beside what else there is: python bench.py [--peers=transformers] [--json]

Rivals take turns (A B A B ...) on the same weights in one process; a figure is the median of several rounds, a ratio
that of two medians. Absolute figures belong to the machine that this prints first.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import configurator
import hf
from configurator import UserError
from gpt import GPT, GPTConfig, KVCache, pick_device

SHAPES = {
    "tiny": GPTConfig(sequence_len=1024, vocab_size=256, n_layer=6, n_head=6, n_embd=384),
    "gpt2": GPTConfig(sequence_len=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768),
}


@dataclass
class Config:
    shape: str = "gpt2"  # tiny (6 layers, 384 channels, 256 ids) or gpt2 (12, 768, 50304)
    dtype: str = "float32"  # float32 or bfloat16
    rounds: int = 5  # turns of each rival
    tokens: int = 32  # decoded in one turn
    peers: str = ""  # transformers: its NanoChatForCausalLM with the same weights
    json: bool = False  # print one object instead of tables
    device: str = "auto"  # cuda, mps, cpu, ...; auto takes the first of these that is there

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("dtype", ("float32", "bfloat16")), ("peers", ("", "transformers"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(filter(None, known))}, not {getattr(self, name)!r}")
        if self.rounds < 1 or self.tokens < 1:
            raise ValueError("rounds and tokens must be at least 1")


def as_transformers(model: GPT) -> Any:
    """The same weights in Hugging Face's model of that architecture, written independently of ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config, weights = hf.export(model)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, eos_token_id=None, pad_token_id=0))
    theirs.load_state_dict(weights)
    return theirs.to(model.device, model.dtype).eval()


def take_turns(rivals: dict[str, Callable[[], int]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Tokens/s of each rival in each round, after one turn to warm up. A rival returns how many tokens it made."""
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


@torch.inference_mode()
def at_position(model: GPT, position: int, config: Config) -> dict[str, list[float]]:
    """Greedy decode where the sequence is `position` tokens long, with the cache and without."""
    device = model.device
    idx = torch.randint(model.config.vocab_size, (1, position), device=device)
    kv_cache = KVCache(model.config, 1, model.config.sequence_len, device, model.dtype)
    model.hidden(idx, kv_cache)

    def cached() -> int:
        for _ in range(config.tokens):
            kv_cache.truncate(position - 1)
            model.logits(model.hidden(idx[:, -1:], kv_cache)[:, -1]).argmax(-1).tolist()
        return config.tokens

    def uncached() -> int:
        model.logits(model.hidden(idx)[:, -1]).argmax(-1).tolist()
        return 1

    return take_turns({"cache": cached, "no cache": uncached}, config.rounds, device)


@torch.inference_mode()
def ragged_batch(model: GPT, theirs: Any, batch_size: int, config: Config) -> dict[str, list[float]]:
    """Whole calls of generate for prompts of 16 to 128 tokens: ours, and transformers' with padding on the left."""
    generator = torch.Generator().manual_seed(batch_size)
    lengths = torch.linspace(128, 16, batch_size).long().tolist()
    prompts = [torch.randint(1, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    def ours() -> int:
        return sum(len(row) for row in model.generate_batch(prompts, config.tokens, temperature=0))

    rivals = {"soloGPT": ours}
    if theirs is not None:
        width = max(lengths)
        idx = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)

        def transformers() -> int:
            out = theirs.generate(
                idx, attention_mask=mask, max_new_tokens=config.tokens, min_new_tokens=config.tokens, do_sample=False
            )
            return out[:, width:].numel()

        rivals["transformers"] = transformers
    return take_turns(rivals, config.rounds, model.device)


def main() -> None:
    config = configurator.parse(Config)
    try:
        device = pick_device(config.device)
    except ValueError as e:
        raise UserError(str(e)) from e
    torch.manual_seed(0)
    model = GPT(SHAPES[config.shape])
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model = model.to(device, getattr(torch, config.dtype)).eval()
    theirs = None
    if config.peers:
        try:
            theirs = as_transformers(model)
        except ImportError as e:
            raise UserError("--peers=transformers needs the extra 'dev': pip install transformers") from e

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    machine = f"{where}, torch {torch.__version__}, {config.shape} {config.dtype}, median of {config.rounds}"
    results: dict[str, Any] = {"machine": machine, "position": {}, "batch": {}}
    if not config.json:
        print(machine)
    for title, sizes, measure in (
        ("position", (100, 500, 1000), lambda n: at_position(model, n, config)),
        ("batch", (1, 4, 16), lambda n: ragged_batch(model, theirs, n, config)),
    ):
        for size in sizes:
            rates = measure(size)
            medians = {name: statistics.median(values) for name, values in rates.items()}
            results[title][size] = {name: dict(median=medians[name], rounds=rates[name]) for name in rates}
            if not config.json:
                cells = [
                    f"{name} {rate:8.1f} ({min(rates[name]):.1f}-{max(rates[name]):.1f})"
                    for name, rate in medians.items()
                ]
                first, *others = medians.values()
                ratio = f"  ratio {first / others[0]:.2f}" if others else ""
                print(f"{title} {size:5}: tokens/s " + "  ".join(cells) + ratio, flush=True)
    if config.json:
        print(json.dumps(results))


if __name__ == "__main__":
    configurator.run(main)

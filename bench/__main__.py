"""Measure soloGPT beside its peers and limits: python -m bench [--peers=transformers --peers=nanogpt=DIR ...]

Candidates take turns for several rounds. A figure is the median of the rounds, and a ratio is one of two
medians. The limits, memory bandwidth and the speed of matrix products, are measured in the same run.
"""

import os
import platform
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
from bench import peers, report
from bench.measures import BENCHMARKS, run_in_subprocess
from bench.report import Row
from bench.time_to_loss import time_to_loss
from sologpt import errors
from sologpt.device import pick_device
from sologpt.errors import UserError
from sologpt.quantize import KINDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Config:
    shape: tuple[str, ...] = ("tiny", "gpt2")  # tiny (10M parameters), gpt2 (124M) or hf:NAME_OR_DIR
    dtype: tuple[str, ...] = ("float32", "bfloat16")  # of the weights; in training, of matrix products
    measure: tuple[str, ...] = BENCHMARKS  # generate is both, position is after 100 and 1000 tokens
    peers: tuple[str, ...] = ()  # transformers, nanogpt=DIR, nanochat=DIR, gpt-fast=DIR, llama.cpp=GGUF
    quantize: tuple[str, ...] = ()  # measure soloGPT with int8 or int4 weights, too
    rounds: int = 5  # timed rounds
    tokens: int = 64  # tokens to decode per row and round
    compile: bool = True  # measure soloGPT and gpt-fast with torch.compile, too
    time_to_loss: bool = False  # only time a training run to nanoGPT's loss on tiny Shakespeare
    json: bool = False  # print one JSON object instead of a table
    plot: str = ""  # draw the results into this image file; needs the extra 'plot'
    device: str = "auto"  # cuda, mps, cpu, ...; auto is an accelerator if there is one, else the CPU

    def __post_init__(self) -> None:
        choices: dict[str, Collection[str]] = dict(
            shape=peers.SHAPES, dtype=DTYPES, measure=BENCHMARKS, quantize=KINDS
        )
        for key, known in choices.items():
            for value in getattr(self, key):
                if value not in known and not (key == "shape" and value.startswith("hf:")):
                    hint = " or hf:NAME_OR_DIR" if key == "shape" else ""
                    raise UserError(f"{key} must be one of {', '.join(known)}{hint}, not {value!r}")
        for peer in self.peers:
            name, equals, path = peer.partition("=")
            if name not in peers.NAMES or bool(equals) == (name == "transformers"):
                names = ", ".join(f"{name}=PATH" for name in peers.NAMES[1:])
                raise UserError(f"peers must be of transformers, {names}, not {peer!r}")
            if equals and not Path(path).exists():
                raise UserError(f"--peers={peer}: {path} does not exist")
        if self.rounds < 1 or self.tokens < 1:
            raise UserError(f"rounds and tokens must be at least 1, not {self.rounds} and {self.tokens}")

    @property
    def paths(self) -> dict[str, str]:
        """The path of each peer by name; it is empty for transformers. llama.cpp's names have its file's."""
        paths = {}
        for peer in self.peers:
            name, _, path = peer.partition("=")
            paths[f"{name} {Path(path).stem}" if name == "llama.cpp" else name] = path
        return paths


def describe_machine(device: torch.device, rounds: int) -> str:
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}, median of {rounds} rounds"


def measure(config: Config, device: torch.device) -> Iterator[list[Row]]:
    """Yield the rows of each benchmark, for each shape and dtype."""
    settings = {name: getattr(config, name) for name in ("rounds", "tokens", "compile", "quantize")}
    for shape in config.shape:
        for name in config.dtype:
            dtype = DTYPES[name]
            yield from run_in_subprocess(config.measure, shape, dtype, device, config.paths, **settings)


def main() -> None:
    config = configurator.parse(Config)
    if config.time_to_loss:
        for line in time_to_loss(config.paths, config.rounds):
            print(line, flush=True)
        return
    device = pick_device(config.device)
    machine = describe_machine(device, config.rounds)
    results = []
    if not config.json:
        print(machine, flush=True)
    for rows in measure(config, device):
        results += rows
        if not config.json:
            print(*report.table(rows), sep="\n", flush=True)
    if config.json:
        print(report.to_json(machine, results))
    if config.plot:
        with errors.writing(config.plot):
            report.plot(results, config.plot)


if __name__ == "__main__":
    errors.run(main, "a smaller shape")

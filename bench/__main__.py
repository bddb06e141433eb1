"""Measure soloGPT beside its limits and its peers: python -m bench [--peers=transformers --peers=nanogpt=DIR ...]

A figure is the median of several rounds in which the candidates take turns, a ratio that of two medians. The limits,
memory bandwidth and the speed of matrix products, are measured in the same run.
"""

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

import configurator
from bench import peers, report
from bench.measures import BENCHMARKS, run_in_subprocess
from bench.report import Row
from bench.time_to_loss import time_to_loss
from sologpt.load import pick_device
from sologpt.weights import KINDS

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Config:
    shape: tuple[str, ...] = ("tiny", "gpt2")  # model shapes: tiny (10M parameters), gpt2 (124M) or hf:NAME_OR_DIR
    dtype: tuple[str, ...] = ("float32", "bfloat16")  # data types of the weights; in training, of the matrix products
    measure: tuple[str, ...] = BENCHMARKS  # train, prefill, decode, generate (both), position (after 100, 1000)
    peers: tuple[str, ...] = ()  # transformers, nanogpt=DIR, nanochat=DIR, gpt-fast=DIR, llama.cpp=GGUF (hf: shapes)
    quantize: tuple[str, ...] = ()  # measure soloGPT with int8 or int4 weights, too
    rounds: int = 5  # timed rounds
    tokens: int = 64  # tokens to decode per row and round
    compile: bool = True  # measure soloGPT and gpt-fast with torch.compile, too
    time_to_loss: bool = False  # measure only the time of a training run to nanoGPT's loss on tiny Shakespeare
    json: bool = False  # print one JSON object instead of a table
    plot: str = ""  # draw the results into this image file; needs the extra 'plot'
    device: str = "auto"  # cuda, mps, cpu, ...; auto picks an accelerator if there is one, else the CPU

    def __post_init__(self) -> None:
        for name, known in (("shape", peers.SHAPES), ("dtype", DTYPES), ("measure", BENCHMARKS), ("quantize", KINDS)):
            for value in getattr(self, name):
                if value not in known and not (name == "shape" and value.startswith("hf:")):
                    hint = " or hf:NAME_OR_DIR" if name == "shape" else ""
                    raise ValueError(f"{name} must be one of {', '.join(known)}{hint}, not {value!r}")
        for peer in self.peers:
            name, has_path, path = peer.partition("=")
            if name not in peers.NAMES or bool(has_path) != (name != "transformers"):
                names = ", ".join(f"{name}=PATH" for name in peers.NAMES[1:])
                raise ValueError(f"peers must be of transformers, {names}, not {peer!r}")
            if has_path and not Path(path).exists():
                raise ValueError(f"--peers={peer}: {path} does not exist")
        if self.rounds < 1 or self.tokens < 1:
            raise ValueError(f"rounds and tokens must be at least 1, not {self.rounds} and {self.tokens}")

    @property
    def paths(self) -> dict[str, str]:
        """The path of each peer by its name; empty for transformers. llama.cpp's names are those of its files."""
        pairs = ((name, path) for name, _, path in (peer.partition("=") for peer in self.peers))
        return {f"{name} {Path(path).stem}" if name == "llama.cpp" else name: path for name, path in pairs}


def reported(items: Iterable[T]) -> Iterator[T]:
    """The items of a generator whose errors are reported; errors of printing them, such as a closed pipe, are not."""
    with configurator.reported():
        yield from items


def describe_machine(device: torch.device, rounds: int) -> str:
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}, median of {rounds} rounds"


def measure(config: Config, device: torch.device) -> Iterator[list[Row]]:
    """The rows of each benchmark, for each shape and dtype."""
    names = "rounds", "tokens", "compile", "quantize"
    settings = {name: getattr(config, name) for name in names}
    for shape in config.shape:
        for dtype in config.dtype:
            yield from run_in_subprocess(config.measure, shape, DTYPES[dtype], device, config.paths, **settings)


def main() -> None:
    config = configurator.parse(Config)
    if config.time_to_loss:
        for line in reported(time_to_loss(config.paths, config.rounds)):
            print(line, flush=True)
        return
    with configurator.reported():
        device = pick_device(config.device)
    machine, results = describe_machine(device, config.rounds), []
    if not config.json:
        print(machine, flush=True)
    for rows in reported(measure(config, device)):
        results += rows
        if not config.json:
            print(*report.table(rows), sep="\n", flush=True)
    if config.json:
        print(report.to_json(machine, results))
    if config.plot:
        with configurator.reported(), configurator.writing(config.plot):
            report.plot(results, config.plot)


if __name__ == "__main__":
    configurator.run(main)

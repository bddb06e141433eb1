"""Text from a checkpoint: python sample.py --prompt "def " --temperature 0.8"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import configurator
from configurator import RunError, UserError
from gpt import GPT, pick_device
from tokenizer import Tokenizer


@dataclass
class Config:
    prompt: str = "\n"  # what to go on from: text, FILE:path, or - for standard input
    num_samples: int = 1  # how many to draw, as one batch
    max_tokens: int = 500  # longest sample
    temperature: float = 0.8  # 0 takes the likeliest token; the higher, the wilder
    top_k: int | None = None  # draw from the k likeliest tokens
    top_p: float | None = None  # draw from the fewest tokens that together have this probability
    min_p: float | None = None  # draw from the tokens at least this many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1, what was said becomes less likely
    seed: int = 42  # the same seed gives the same text
    out_dir: str = "out"  # take the newest best.pt in this folder or below it
    ckpt: str = ""  # take this checkpoint instead
    device: str = "auto"  # cuda, mps, cpu, ...; auto takes the first of these that is there


def find_checkpoint(config: Config) -> Path:
    if config.ckpt:
        return Path(config.ckpt)
    found = sorted(Path(config.out_dir).rglob("best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"no best.pt in {config.out_dir} or below: train one (python train.py config/tiny.py) or say --ckpt"
        )
    return found[-1]


def read_prompt(prompt: str) -> str:
    try:
        if prompt == "-":
            return sys.stdin.read()
        if prompt.startswith("FILE:"):
            return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompt={prompt} cannot be read: {e}") from e
    return prompt


def load(path: Path, device: torch.device) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    try:
        model, extra = GPT.load_checkpoint(path, device)
        return model, Tokenizer.from_dict(extra["tokenizer"]), extra
    except FileNotFoundError as e:
        raise UserError(f"there is no checkpoint {path}") from e
    except (RuntimeError, KeyError, ValueError) as e:
        raise RunError(f"{path} is no checkpoint of train.py, or is damaged") from e


def main() -> None:
    config = configurator.parse(Config)
    path = find_checkpoint(config)
    prompt = read_prompt(config.prompt)
    try:
        model, tokenizer, extra = load(path, pick_device(config.device))
        tokens = tokenizer.encode(prompt)
        steps = model.generate_batch(
            [tokens],
            config.max_tokens,
            config.num_samples,
            config.temperature,
            config.top_k,
            config.top_p,
            config.min_p,
            config.repetition_penalty,
            stop_tokens=[tokenizer.eot],
            seed=config.seed,
        )
    except ValueError as e:
        raise UserError(str(e)) from e
    print(f"{path}, step {extra.get('step')}, on {model.device}", file=sys.stderr)
    if len(tokens) > (window := model.config.sequence_len):
        print(f"the prompt has {len(tokens)} tokens; the model sees the last {window}", file=sys.stderr)

    # The first sample streams; the others, drawn in the same steps, follow whole
    decoders = [tokenizer.decoder() for _ in range(config.num_samples)]
    texts = [""] * config.num_samples
    count, started = 0, time.perf_counter()
    print(prompt, end="", flush=True)
    try:
        while True:
            for row, token in enumerate(next(steps)):
                if token is None:
                    continue
                count += 1
                if token == tokenizer.eot:
                    continue
                text = decoders[row].decode(token)
                texts[row] += text
                if row == 0:
                    print(text, end="", flush=True)
    except StopIteration as end:
        reasons = end.value
    seconds = time.perf_counter() - started
    print(decoders[0].flush())
    for row in range(1, config.num_samples):
        print(f"---\n{prompt}{texts[row]}{decoders[row].flush()}")
    print(f"{count} tokens, {count / seconds:,.0f} tokens/s, ended by {', '.join(reasons)}", file=sys.stderr)


if __name__ == "__main__":
    configurator.run(main)

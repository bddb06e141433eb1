"""Text from a checkpoint: python sample.py --prompt "def __init__(self" --temperature 0.8

An open model: python sample.py --init_from=hf:HuggingFaceTB/SmolLM2-135M-Instruct --chat --interactive
"""

import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
from gpt import Sampling
from sologpt import errors, fast
from sologpt.chat import Conversation, answer_sampling, converse, warn_if_cut, warn_if_silent
from sologpt.errors import UserError
from sologpt.load import describe_run, find_checkpoint, load_model
from sologpt.quantize import KINDS
from sologpt.stream import TextStream, stream_text

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Config:
    # ---- prompt
    prompt: str = "\n"  # text to continue; FILE:path reads it from a file, - from standard input
    interactive: bool = False  # read one prompt after the other, the first from --prompt if it is given
    chat: bool = False  # answer the prompt by the chat template; sampling is as the model suggests
    system: str = ""  # system message that begins the conversation; needs --chat

    # ---- sampling
    num_samples: int = 1  # samples to draw, as one batch
    max_tokens: int = 500  # tokens in a sample, at most
    sampling: configurator.Part = configurator.keys_of(Sampling, temperature=0.8)
    stop: tuple[str, ...] = ()  # end a sample before this text; may be given several times
    stop_on_repeat: int = 0  # end a sample when its last N tokens repeat the N before them; 0 is off
    seed: int = 42  # the same seed gives the same text

    # ---- output
    json: bool = False  # print each sample as JSON: prompt, text, tokens, reason, seconds, tokens_per_second

    # ---- model
    out_dir: str = "out"  # use the newest best.pt in or below this folder, else the newest ckpt.pt
    ckpt: str = ""  # use this model: a checkpoint, a run's folder, hf:NAME, gguf:FILE or gpt2
    init_from: str = ""  # the same, by the name that train.py has for it
    adapter: str = ""  # merge a LoRA adapter of this folder (PEFT's format) into the model it was trained on
    device: str = "auto"  # cuda, mps, cpu, ...; auto is an accelerator if there is one, else the CPU
    dtype: str = "auto"  # float32, bfloat16 or float16 for the weights; auto keeps the dtype of the file
    quantize: str = ""  # int8 or int4 for the weights: less memory and faster decoding, on the CPU
    compile: bool = False  # faster after a slow start: torch.compile on a GPU, C++ for a small model on a CPU
    lookup: int = 0  # draft up to N tokens by prompt lookup: faster where text repeats itself; 0 is off

    def __post_init__(self) -> None:
        Sampling(**self.sampling)  # ValueError for a bad value
        if self.system and not self.chat:
            raise UserError("--system is the first message of a conversation: it needs --chat")
        if self.ckpt and self.init_from:
            raise UserError("--ckpt and --init_from both name a model: give only one of them")
        if self.adapter and not (self.ckpt or self.init_from):
            raise UserError("--adapter changes another model: name that by --init_from or --ckpt")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.quantize not in ("", *KINDS):
            raise UserError(f"quantize must be {' or '.join(KINDS)}, not {self.quantize!r}")
        if self.interactive and (self.num_samples > 1 or self.json):
            raise UserError("--interactive cannot be combined with --num_samples or --json")
        if self.lookup and self.num_samples > 1:
            raise UserError(f"--lookup works on one sample only, not on --num_samples={self.num_samples}")


def read_prompt(prompt: str) -> str:
    """Return the text of --prompt: itself, that of FILE:path, or that of standard input."""
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode()
        if prompt.startswith("FILE:"):
            return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"--prompt={prompt} is not UTF-8 text: {e}") from e
    return prompt


def sample_once(stream: TextStream, prompt: str, config: Config) -> None:
    """Print the first sample as it comes, then the rest of the batch."""
    if config.json:
        list(stream)  # generate all
        for row in stream.rows:
            print(json.dumps({"prompt": prompt, **row.to_dict()}, ensure_ascii=False))
        return
    shown = "" if config.chat else prompt
    print(shown, end="", flush=True)
    for text in stream:
        print(text, end="", flush=True)
    print()
    for row in stream.rows[1:]:
        print(f"---\n{shown}{row.text}")
    print(stream.summary(), file=sys.stderr)


def main() -> None:
    config = configurator.parse(Config)
    # 1. The model
    source: str | Path = config.init_from or config.ckpt
    hint = ""
    if not source:
        source = find_checkpoint(config.out_dir, Path(__file__).resolve().parent / config.out_dir)
        which = describe_run(source) or f"the newest in {config.out_dir}"
        hint = f" ({which}; --ckpt FILE takes another)"
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    with warnings.catch_warnings(record=True, action="default") as caught:
        model, tokenizer, about = load_model(
            source, config.device, dtype, config.quantize or None, config.adapter or None
        )
    step = f", step {about['step']}" if "step" in about else ""
    notes = [str(warning.message) for warning in caught]
    adapter = f" with {about['adapter']}" if "adapter" in about else ""
    # 2. The settings of `stream_text`
    sampling = dict(config.sampling)
    if config.chat:
        sampling = answer_sampling(tokenizer) | config.sampling.given
    shown = "".join(f", {name} {value:g}" for name, value in sampling.items() if value is not None)
    notes.append(f"{about['source']}{step}{adapter}, on {model.device}{shown}{hint}")
    settings = {name: getattr(config, name) for name in ("max_tokens", "stop", "stop_on_repeat", "seed")}
    decode = fast.prepare(model, compile=config.compile, lookup=config.lookup, rows=config.num_samples)
    if config.compile and model.device.type != "cpu":  # which happens at the first tokens
        started = time.perf_counter()
        list(stream_text(model, tokenizer, [tokenizer.eot], 2, config.num_samples, decode=decode))
        notes.append(f"compiled in {time.perf_counter() - started:.1f} s")
    settings |= sampling | {"decode": decode}
    # 3. A conversation, or one prompt
    if config.interactive:
        talk = Conversation(model, tokenizer, config.chat, config.system, **settings)
        print(*notes, "/help shows the commands, Ctrl-D leaves", sep="\n", file=sys.stderr)
        converse(talk, "" if config.prompt == Config.prompt else read_prompt(config.prompt))
        return
    prompt = read_prompt(config.prompt)
    system = [{"role": "system", "content": config.system}] if config.system else []
    messages = [*system, {"role": "user", "content": prompt}]
    question = messages if config.chat else prompt
    stream = stream_text(model, tokenizer, question, num_samples=config.num_samples, **settings)
    print(*notes, sep="\n", file=sys.stderr)
    warn_if_cut(stream, model.config.sequence_len)
    sample_once(stream, prompt, config)
    warn_if_silent(stream, tokenizer, config.chat)


if __name__ == "__main__":
    errors.run(main, "a smaller num_samples, prompt, max_tokens or model, or --dtype=bfloat16")

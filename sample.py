"""Text from a checkpoint: python sample.py --prompt "def __init__(self" --temperature 0.8

Or from an open model: python sample.py --init_from=hf:HuggingFaceTB/SmolLM2-135M-Instruct --chat --interactive
"""

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import configurator
from configurator import UserError
from gpt import GPT
from sologpt import fast
from sologpt.conversation import Conversation
from sologpt.load import SHORT_NAMES, describe_run, find_checkpoint, load_model
from sologpt.terminal import catch_sigint, read_messages
from sologpt.text import TextRow, TextStream, stream_text
from sologpt.weights import KINDS

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Generate = Callable[..., TextStream]  # `stream_text` with the model, the tokenizer and the settings filled in


@dataclass
class Config:
    # ---- prompt
    prompt: str = "\n"  # The model continues this text, that of FILE:path, or that of standard input if it is a -.
    interactive: bool = False  # You enter one prompt after the other; with --chat, they are one conversation.
    chat: bool = False  # The prompt is a user's message, and the model answers it by its chat template.
    system: str = ""  # The conversation begins with this system message; it needs --chat.

    # ---- sampling
    num_samples: int = 1  # This many samples are drawn, as one batch.
    max_tokens: int = 500  # A sample has at most this many tokens.
    temperature: float = 0.8  # The logits are divided by this; 0 always takes the most likely token.
    top_k: int | None = None  # Only the k most likely tokens are sampled from.
    top_p: float | None = None  # Only the fewest tokens whose probabilities add up to p are sampled from.
    min_p: float | None = None  # Only tokens at least p times as likely as the most likely one are sampled from.
    repetition_penalty: float = 1.0  # Above 1, tokens that already occur in the text become less likely.
    stop: tuple[str, ...] = ()  # A sample ends before this text, the stop sequence; it may be given several times.
    stop_on_repeat: int = 0  # A sample ends when its last N tokens repeat the N before them; 0 switches it off.
    seed: int = 42  # The same seed gives the same text.

    # ---- output
    json: bool = False  # Each sample is a JSON object: prompt, text, tokens, reason, seconds, tokens_per_second.

    # ---- model
    out_dir: str = "out"  # The newest best.pt in this folder or below it is used, else the newest ckpt.pt.
    ckpt: str = ""  # This checkpoint file is used instead.
    init_from: str = ""  # An open model is used instead: gpt2, hf:NAME, hf:FOLDER or gguf:FILE.
    device: str = "auto"  # It runs on cuda, mps, cpu, ...; auto takes an accelerator if there is one, else the CPU.
    dtype: str = "auto"  # The weights are float32, bfloat16 or float16; auto keeps the type they are stored in.
    quantize: str = ""  # Weights become int8 or int4: less memory and faster decoding, on the CPU.
    compile: bool = False  # torch.compile makes decoding faster, after a slow start.
    lookup: int = 0  # A forward verifies up to N draft tokens (prompt lookup decoding): faster where text repeats.

    def __post_init__(self) -> None:
        if self.system and not self.chat:
            raise ValueError("--system is the first message of a conversation: it needs --chat")
        if self.ckpt and self.init_from:
            raise ValueError("--ckpt and --init_from both name a model: give only one of them")
        if self.init_from and not self.init_from.startswith(("hf:", "gguf:")) and self.init_from not in SHORT_NAMES:
            raise ValueError(
                f"init_from must be hf:NAME, hf:FOLDER or gguf:FILE, not {self.init_from!r}; a checkpoint is --ckpt"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16, float16 or auto, not {self.dtype!r}")
        if self.quantize not in ("", *KINDS):
            raise ValueError(f"quantize must be {' or '.join(KINDS)}, not {self.quantize!r}")
        if self.interactive and (self.num_samples > 1 or self.json):
            raise ValueError("--interactive cannot be combined with --num_samples or --json")
        if self.lookup and self.num_samples > 1:
            raise ValueError(f"--lookup works on one sample only, not on --num_samples={self.num_samples}")


# -----------------------------------------------------------------------------
# Prompts and reports


def read_prompt(prompt: str) -> str:
    try:
        if prompt == "-":
            return sys.stdin.read()
        if prompt.startswith("FILE:"):
            return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompt={prompt} cannot be read: {e}") from e
    return prompt


def warn_if_cut(stream: TextStream, model: GPT) -> None:
    n, window = len(stream.prompt_tokens), model.config.sequence_len
    if n > window:
        print(f"the prompt has {n} tokens: the model reads the last {window}", file=sys.stderr)


def tokens_per_second(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else 0.0


def report(rows: list[TextRow]) -> None:
    n, reasons = sum(len(row.tokens) for row in rows), ", ".join(row.reason for row in rows)
    speed = tokens_per_second(n, max(row.seconds for row in rows))
    print(f"{n} tokens, {speed:,.0f} tokens/s, ended by {reasons}", file=sys.stderr)


def to_json(prompt: str, row: TextRow) -> str:
    record = {
        "prompt": prompt,
        "text": row.text,
        "tokens": len(row.tokens),
        "reason": row.reason,
        "seconds": round(row.seconds, 4),
        "tokens_per_second": round(tokens_per_second(len(row.tokens), row.seconds), 1),
    }
    return json.dumps(record, ensure_ascii=False)


# -----------------------------------------------------------------------------
# One prompt, or a conversation


def sample_once(config: Config, model: GPT, generate: Generate, description: str) -> None:
    """Stream the first sample; the others are drawn with it and printed after it."""
    prompt = read_prompt(config.prompt)
    messages = [{"role": "system", "content": config.system}] if config.system else []
    messages.append({"role": "user", "content": prompt})
    with configurator.reported():
        stream = generate(messages if config.chat else prompt, num_samples=config.num_samples)
    print(description, file=sys.stderr)
    warn_if_cut(stream, model)
    if config.json:
        with configurator.reported():
            for _ in stream:
                pass
        for row in stream.rows:
            print(to_json(prompt, row))
        return
    shown = "" if config.chat else prompt
    print(shown, end="", flush=True)
    with configurator.reported():
        for text in stream:
            print(text, end="", flush=True)
    print()
    for row in stream.rows[1:]:
        print(f"---\n{shown}{row.text}")
    report(stream.rows)


def converse(talk: Conversation) -> None:
    """Answer one prompt after the other."""
    window = talk.model.config.sequence_len
    with catch_sigint() as signals:
        for prompt in read_messages(talk):
            signals.clear()
            dropped = talk.dropped
            with configurator.reported():
                stream = talk.ask(prompt)
                if talk.dropped > dropped == 0:
                    print(f"over {window} tokens: the model no longer sees the oldest turns", file=sys.stderr)
                warn_if_cut(stream, talk.model)
                for text in stream:
                    print(text, end="", flush=True)
                    if signals:
                        print(stream.close(), end="")
                print(flush=True)
                report(stream.rows)


def main() -> None:
    config = configurator.parse(Config)
    named = config.init_from or config.ckpt
    with configurator.reported():
        source = named or find_checkpoint(config.out_dir, Path(__file__).resolve().parent / config.out_dir)
        with warnings.catch_warnings(record=True, action="default") as notes:
            model, tokenizer, about = load_model(source, config.device, DTYPES[config.dtype], config.quantize or None)
        for note in notes:
            print(note.message, file=sys.stderr)
        decode = fast.prepare(model, compile=config.compile, lookup=config.lookup, rows=config.num_samples)
    step = f", step {about['step']}" if "step" in about else ""
    description = f"{about['source']}{step}, on {model.device}"
    if not named:
        which = describe_run(Path(source)) or f"the newest in {config.out_dir}"
        description += f" ({which}; --ckpt FILE takes another)"
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    settings = {name: getattr(config, name) for name in (*names, "stop", "stop_on_repeat")} | {"decode": decode}
    if config.interactive:
        with configurator.reported():
            talk = Conversation(model, tokenizer, config.chat, config.system, **settings)
        print(f"{description}\n/help shows the commands, Ctrl-D leaves", file=sys.stderr)
        converse(talk)
    else:
        sample_once(config, model, partial(stream_text, model, tokenizer, **settings), description)


if __name__ == "__main__":
    configurator.run(main, "a smaller num_samples, prompt, max_tokens or model, or --dtype=bfloat16")

"""Text from a checkpoint: python sample.py --prompt "def " --temperature 0.8

Or from an open model: python sample.py --init_from=hf:HuggingFaceTB/SmolLM2-135M-Instruct --chat --interactive
"""

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import configurator
from configurator import UserError
from gpt import GPT
from sologpt import fast
from sologpt.conversation import Conversation, run_command
from sologpt.load import SHORT_NAMES, find_checkpoint, load_model
from sologpt.text import TextRow, TextStream, stream_text

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Generate = Callable[..., TextStream]  # `stream_text` with the model, the tokenizer and the settings filled in


@dataclass
class Config:
    # ---- prompt
    prompt: str = "\n"  # text to continue, FILE:path to read it from a file, or - to read it from standard input
    interactive: bool = False  # read one prompt after the other; with --chat, as turns of one conversation
    chat: bool = False  # answer the prompt as a user's message, by the model's chat template
    system: str = ""  # system message that begins the conversation; needs --chat

    # ---- sampling
    num_samples: int = 1  # samples to draw, as one batch
    max_tokens: int = 500  # maximum number of tokens of a sample
    temperature: float = 0.8  # divides the logits; 0 always takes the most likely token
    top_k: int | None = None  # sample from the k most likely tokens only
    top_p: float | None = None  # sample from the fewest tokens whose probabilities add up to p
    min_p: float | None = None  # sample from tokens at least p times as likely as the most likely one
    repetition_penalty: float = 1.0  # above 1, tokens that already occur in the text become less likely
    stop: tuple[str, ...] = ()  # stop sequence: a sample ends before this text; may be given several times
    stop_on_repeat: int = 0  # end a sample when its last N tokens repeat the N before them; 0 switches it off
    seed: int = 42  # the same seed gives the same text

    # ---- output
    json: bool = False  # print one JSON object per sample: prompt, text, tokens, reason, seconds, tokens_per_second

    # ---- model
    out_dir: str = "out"  # use the newest best.pt in this folder or below it
    ckpt: str = ""  # use this checkpoint file instead
    init_from: str = ""  # use an open model instead: gpt2, hf:NAME, hf:FOLDER or gguf:FILE
    device: str = "auto"  # cuda, mps, cpu, ...; auto picks an accelerator if there is one, else the CPU
    dtype: str = "auto"  # data type of the weights: float32, bfloat16, float16; auto keeps the one they are stored in
    compile: bool = False  # torch.compile the decoding: takes a while to start, then is faster
    lookup: int = 0  # verify up to N draft tokens per forward (prompt lookup decoding): faster where text repeats

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


@contextmanager
def catch_sigint() -> Iterator[list[int]]:
    """Append each Ctrl-C to the list that this yields, so that an answer ends between two tokens, not within one."""
    signals: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, _: signals.append(signum))
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def converse(talk: Conversation, description: str) -> None:
    """Answer one prompt after the other."""
    with suppress(ImportError):  # not on Windows
        import readline  # gives input() line editing and history

        readline.parse_and_bind("set enable-bracketed-paste on")  # keeps the line ends of a pasted text
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    print(f"{description}\n/help shows the commands, Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
            if prompt.startswith("/"):
                print(run_command(prompt, talk), file=sys.stderr)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D or /quit leaves", file=sys.stderr)
            continue
        if prompt.strip() and not prompt.startswith("/"):
            answer(prompt, talk)


def answer(prompt: str, talk: Conversation) -> None:
    dropped = talk.dropped
    with catch_sigint() as signals, configurator.reported():
        stream = talk.ask(prompt)
        if talk.dropped and not dropped:
            window = talk.model.config.sequence_len
            print(f"over {window} tokens: the model no longer sees the oldest turns", file=sys.stderr)
        warn_if_cut(stream, talk.model)
        for text in stream:
            print(text, end="", flush=True)
            if signals:
                print(stream.close(), end="")
        print(flush=True)
        report(stream.rows)


def find_model(config: Config) -> str | Path:
    """The open model or checkpoint that was named, or else the newest in out_dir, which may lie beside this script."""
    beside = Path(__file__).resolve().parent / config.out_dir
    folder = beside if beside.is_dir() and not Path(config.out_dir).is_dir() else config.out_dir
    return config.init_from or config.ckpt or find_checkpoint(folder)


def main() -> None:
    config = configurator.parse(Config)
    with configurator.reported():
        model, tokenizer, about = load_model(find_model(config), config.device, DTYPES[config.dtype])
        decode = fast.prepare(model, compile=config.compile, lookup=config.lookup, rows=config.num_samples)
    step = f", step {about['step']}" if "step" in about else ""
    newest = "" if config.init_from or config.ckpt else " (the newest in --out_dir; --ckpt FILE takes another)"
    description = f"{about['source']}{step}, on {model.device}{newest}"
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    settings = {name: getattr(config, name) for name in (*names, "stop", "stop_on_repeat")}
    if config.interactive:
        with configurator.reported():
            talk = Conversation(model, tokenizer, config.chat, config.system, decode=decode, **settings)
        converse(talk, description)
    else:
        generate = partial(stream_text, model, tokenizer, decode=decode, **settings)
        sample_once(config, model, generate, description)


if __name__ == "__main__":
    configurator.run(main, "a smaller num_samples, prompt, max_tokens or model, or --dtype=bfloat16")

"""Text from a checkpoint: python sample.py --prompt "def " --temperature 0.8

Or from an open model: python sample.py --init_from=hf:HuggingFaceTB/SmolLM2-135M-Instruct --chat --interactive
"""

import io
import json
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

import configurator
from configurator import RunError, UserError
from gpt import GPT, KVCache, pick_device
from sologpt.tokenizer import Tokenizer

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Config:
    prompt: str = "\n"  # what to go on from: text, FILE:path, or - for standard input
    interactive: bool = False  # ask for one prompt after the other, as turns of one conversation
    chat: bool = False  # the prompt is a message to answer: the model's chat template goes around it
    system: str = ""  # with --chat, the message that comes before all others
    num_samples: int = 1  # how many to draw, as one batch
    max_tokens: int = 500  # longest sample
    temperature: float = 0.8  # 0 takes the likeliest token; the higher, the wilder
    top_k: int | None = None  # draw from the k likeliest tokens
    top_p: float | None = None  # draw from the fewest tokens that together have this probability
    min_p: float | None = None  # draw from the tokens at least this many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1, what was said becomes less likely
    stop: tuple[str, ...] = ()  # end before this text; may be given several times
    stop_on_repeat: int = 0  # end when the last N tokens repeat the N before them; 0 for never
    lookup: int = 0  # read so many tokens ahead, guessed from what came before: the same text, sooner if it repeats
    seed: int = 42  # the same seed gives the same text
    json: bool = False  # print an object for each sample: prompt, text, tokens, reason, seconds, tokens_per_second
    out_dir: str = "out"  # take the newest best.pt in this folder or below it
    ckpt: str = ""  # take this checkpoint instead
    init_from: str = ""  # take an open model instead: hf:NAME or hf:FOLDER
    dtype: str = "auto"  # of the weights: float32, bfloat16, or auto for what they are saved in
    compile: bool = False  # torch.compile what reads a token at a time: seconds until the first, then faster
    device: str = "auto"  # cuda, mps, cpu, ...; auto takes the first of these that is there

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ValueError("--stop needs some text: every text contains the empty one")
        if self.stop_on_repeat < 0:
            raise ValueError(f"stop_on_repeat must not be negative, but is {self.stop_on_repeat}")
        if self.system and not self.chat:
            raise ValueError("--system is the first message of a conversation: it needs --chat")
        if self.ckpt and self.init_from:
            raise ValueError("--ckpt and --init_from both say what to sample from: give one of them")
        if self.init_from and not self.init_from.startswith("hf:"):
            raise ValueError(
                f"init_from must be hf:NAME or hf:FOLDER, not {self.init_from!r}; --ckpt takes a checkpoint"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or auto, not {self.dtype!r}")
        if self.interactive and (self.num_samples > 1 or self.json):
            raise ValueError("--interactive goes neither with --num_samples nor with --json")


# -----------------------------------------------------------------------------
# From token ids to text that ends where it should


class Sample:
    """One sample as it grows: tokens go in, text comes out as soon as it is certain."""

    def __init__(self, tokenizer: Tokenizer, config: Config) -> None:
        self.decoder = tokenizer.decoder(continues=not config.chat)
        self.eos_tokens, self.config = tokenizer.eos_tokens, config
        self.ids: list[int] = []
        self.text = ""  # what has come out
        self.held = ""  # what has not, since it may be the beginning of a stop text
        self.reason = ""  # why it has ended, once it has
        self.started, self.seconds = time.perf_counter(), 0.0

    def push(self, token: int) -> str:
        """Take a token; returns the text that it makes certain. Sets `reason` if it ends the sample."""
        self.ids.append(token)
        self.seconds = time.perf_counter() - self.started
        if token in self.eos_tokens:
            return self.end("stop")
        self.held += self.decoder.decode(token)
        found = [at for stop in self.config.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.held, self.reason = self.held[: min(found)], "stop"
            return self._release(len(self.held))
        n = self.config.stop_on_repeat
        if n and len(self.ids) >= 2 * n and self.ids[-n:] == self.ids[-2 * n : -n]:
            return self.end("repeat")
        lengths = range(min(len(self.held), max(map(len, self.config.stop), default=0)), 0, -1)
        partial = next((k for k in lengths if any(s.startswith(self.held[-k:]) for s in self.config.stop)), 0)
        return self._release(len(self.held) - partial)

    def end(self, reason: str) -> str:
        """No more tokens: returns the text that was held back."""
        self.reason = reason
        self.held += self.decoder.flush()
        return self._release(len(self.held))

    def _release(self, n: int) -> str:
        text, self.held = self.held[:n], self.held[n:]
        self.text += text
        return text


def draw(steps: Generator[list[int | None], None, list[str]], samples: list[Sample]) -> Iterator[str]:
    """Feed the rows of a batch to their samples until all have ended; yields the first one's text as it comes."""
    try:
        for row in steps:
            for i, (sample, token) in enumerate(zip(samples, row, strict=True)):
                if token is not None and not sample.reason:
                    text = sample.push(token)
                    if i == 0:
                        yield text
            if all(sample.reason for sample in samples):
                break
    finally:
        steps.close()
    for i, sample in enumerate(samples):
        if not sample.reason:
            text = sample.end("length")
            if i == 0:
                yield text


# -----------------------------------------------------------------------------
# What to sample from


def find_checkpoint(config: Config) -> Path:
    if config.ckpt:
        return Path(config.ckpt)
    found = sorted(Path(config.out_dir).rglob("best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"no best.pt in {config.out_dir} or below: train one (python train.py config/tiny.py) or say --ckpt=FILE"
        )
    return found[-1]


def load(config: Config) -> tuple[GPT, Tokenizer, str]:
    """The model, its tokenizer, and a line that says where they come from."""
    try:
        device = pick_device(config.device)
    except ValueError as e:
        raise UserError(str(e)) from e
    if config.init_from:
        try:
            from sologpt import hf

            model, tokenizer = hf.load(config.init_from.removeprefix("hf:"), device, DTYPES[config.dtype])
        except (ImportError, OSError, ValueError) as e:
            raise UserError(str(e)) from e
        return model, tokenizer, f"{config.init_from}, on {device}"
    path = find_checkpoint(config)
    try:
        model, extra = GPT.load_checkpoint(path, device, DTYPES[config.dtype])
        tokenizer = Tokenizer.from_dict(extra["tokenizer"])
    except ImportError as e:
        raise UserError(str(e)) from e
    except OSError as e:
        raise UserError(f"cannot read the checkpoint {path}: {e.strerror}") from e
    except (RuntimeError, KeyError, ValueError) as e:
        raise RunError(f"{path} is no checkpoint of train.py, or is damaged") from e
    return model, tokenizer, f"{path}, step {extra.get('step')}, on {device}"


def read_prompt(prompt: str) -> str:
    try:
        if prompt == "-":
            return sys.stdin.read()
        if prompt.startswith("FILE:"):
            return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompt={prompt} cannot be read: {e}") from e
    return prompt


def opening(config: Config) -> list[dict[str, str]]:
    """The messages that a conversation begins with."""
    return [{"role": "system", "content": config.system}] if config.system else []


def encode_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    try:
        return tokenizer.encode_chat(messages)
    except (ImportError, ValueError) as e:
        raise UserError(f"--chat: {e}") from e


def check_length(tokens: int, window: int) -> None:
    if tokens > window:
        print(f"the prompt has {tokens} tokens: the model reads the last {window}", file=sys.stderr)


# -----------------------------------------------------------------------------
# The two ways to use it


def sample_once(config: Config, model: GPT, tokenizer: Tokenizer, settings: dict[str, Any], source: str) -> None:
    prompt = read_prompt(config.prompt)
    if config.chat:
        tokens, shown = encode_chat(tokenizer, [*opening(config), {"role": "user", "content": prompt}]), ""
    else:
        tokens, shown = tokenizer.encode_prompt(prompt), prompt
    try:
        steps = model.generate_batch([tokens], config.max_tokens, config.num_samples, **settings)
    except ValueError as e:
        raise UserError(str(e)) from e
    print(source, file=sys.stderr)
    check_length(len(tokens), model.config.sequence_len)
    samples = [Sample(tokenizer, config) for _ in range(config.num_samples)]
    if config.json:
        for _ in draw(steps, samples):
            pass
        for sample in samples:
            record = {
                "prompt": prompt,
                "text": sample.text,
                "tokens": len(sample.ids),
                "reason": sample.reason,
                "seconds": round(sample.seconds, 4),
                "tokens_per_second": round(len(sample.ids) / sample.seconds, 1) if sample.seconds else 0.0,
            }
            print(json.dumps(record, ensure_ascii=False))
        return
    print(shown, end="", flush=True)
    for text in draw(steps, samples):  # the first sample streams; the others, drawn with it, follow whole
        print(text, end="", flush=True)
    print()
    for sample in samples[1:]:
        print(f"---\n{shown}{sample.text}")
    report(samples)


def report(samples: list[Sample]) -> None:
    tokens, seconds = sum(len(sample.ids) for sample in samples), max(sample.seconds for sample in samples)
    reasons = ", ".join(sample.reason for sample in samples)
    print(f"{tokens} tokens, {tokens / seconds if seconds else 0:,.0f} tokens/s, ended by {reasons}", file=sys.stderr)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """While in here Ctrl-C only fills the list that this gives: an answer ends between two tokens, not within one."""
    signals: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, _: signals.append(signum))
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def skip_what_is_held(kv_cache: KVCache, tokens: list[int]) -> list[int]:
    """Make the cache hold what tokens begin with and nothing else; returns the rest of tokens, one at least."""
    pairs = zip(kv_cache.tokens()[0], tokens[:-1], strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    kv_cache.truncate(same)
    return tokens[same:]


def converse(config: Config, model: GPT, tokenizer: Tokenizer, settings: dict[str, Any], source: str) -> None:
    """One turn after the other; the cache keeps what was said, so each turn reads only what is new.

    With --chat, a turn renders the whole conversation anew, since a template may change what is past, and reads it from
    where it differs from what the cache holds.
    """
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives input() line editing and history)
    kv_cache = KVCache(model.config, 1, model.config.sequence_len, model.device, model.dtype)
    messages = opening(config)
    try:
        model.generate_batch([[0]], config.max_tokens, **settings)  # is checked, and not started
    except ValueError as e:
        raise UserError(str(e)) from e
    if config.chat:
        encode_chat(tokenizer, [*messages, {"role": "user", "content": ""}])  # is there a template that takes these?
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    print(f"{source}\nCtrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            prompt = input("> ") or "\n"
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if config.chat:
            messages.append({"role": "user", "content": prompt})
            tokens = encode_chat(tokenizer, messages)
            check_length(len(tokens), model.config.sequence_len)
            tokens = skip_what_is_held(kv_cache, tokens)
        else:
            tokens = (tokenizer.encode if kv_cache.lengths.any() else tokenizer.encode_prompt)(prompt)
        with interruptible() as signals:
            steps = model.generate_batch([tokens], config.max_tokens, kv_cache=kv_cache, **settings)
            sample = Sample(tokenizer, config)
            for text in draw(steps, [sample]):
                print(text, end="", flush=True)
                if signals and not sample.reason:
                    print(sample.end("interrupt"), end="")
            print(flush=True)
            report([sample])
        if config.chat:
            messages.append({"role": "assistant", "content": sample.text})


def main() -> None:
    config = configurator.parse(Config)
    model, tokenizer, source = load(config)
    if config.compile:
        model.compile_decode()
    if not config.compile or config.num_samples > 1 or config.lookup:  # else one token at a time reads plain weights
        model.prepack()
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "lookup", "seed")
    settings = {name: getattr(config, name) for name in names}
    settings |= {"stop_tokens": tokenizer.eos_tokens, "suppress_tokens": tokenizer.gaps(model.config.vocab_size)}
    (converse if config.interactive else sample_once)(config, model, tokenizer, settings, source)


if __name__ == "__main__":
    configurator.run(main)

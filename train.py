"""Train a GPT: python train.py config/tiny.py --max_iters=200

Everything that happens is a function of (config, seed, step), so a run that was stopped and resumed
(--init_from=resume) ends where it would have ended.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import configurator
import hf
from configurator import RunError, UserError
from data import common
from gpt import GPT, GPTConfig, pick_device

ROOT = Path(__file__).resolve().parent


@dataclass
class Config(GPTConfig):
    vocab_size: int = 0  # number of token ids; 0 means as many as the tokenizer has
    out_dir: str = "out"  # where checkpoints, metrics.jsonl and loss.png go
    init_from: str = (
        "scratch"  # scratch, resume (out_dir/ckpt.pt), or what to fine-tune: a checkpoint, or hf:NAME_OR_DIR
    )
    dataset: str = "stdlib"  # the folder in data/, prepared if it is missing, or the path of another
    tokenizer: str = "bytes"  # what a missing dataset is prepared with: bytes, bpe:N, gpt2, ...
    batch_size: int = 12  # sequences in one forward
    gradient_accumulation_steps: int = 1  # forwards in one step
    max_iters: int = 5000  # steps in all
    learning_rate: float = 0.02  # of the blocks' matrices, by Muon
    embd_lr: float = 0.3  # of the embedding, by AdamW
    head_lr: float = 0.004  # of the head, by AdamW
    weight_decay: float = 0.0  # of the blocks' matrices
    momentum: float = 0.95  # Muon's decay of the mean gradient
    beta1: float = 0.8  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    grad_clip: float = 0.0  # largest norm of the gradient; 0 switches it off
    warmup_iters: int = 0  # steps in which the learning rates rise from zero
    warmdown: float = 0.4  # share of max_iters, the last, in which they fall to zero
    eval_interval: int = 250  # steps between evaluations, each of which saves a checkpoint
    eval_iters: int = 100  # batches of an evaluation, spread evenly over the validation split
    log_interval: int = 10  # steps between lines of metrics.jsonl and of the log
    sample_prompt: str = "\n"  # what the sample at the end goes on from
    sample_tokens: int = 300  # its length; 0 for none
    seed: int = 1337  # of the initial weights, the batches and dropout
    device: str = "auto"  # cuda, mps, cpu, ...; auto takes the first of these that is there
    dtype: str = "auto"  # of the products in a step: float32, bfloat16, or auto for what suits the device
    compile: bool = False  # torch.compile: slow to start, then faster

    def __post_init__(self) -> None:
        self.model_config(self.vocab_size or 1)
        for names, least, below in (
            ("batch_size gradient_accumulation_steps eval_interval eval_iters log_interval", 1, math.inf),
            ("max_iters learning_rate embd_lr head_lr grad_clip weight_decay warmup_iters sample_tokens", 0, math.inf),
            ("momentum beta1 beta2", 0, 1),
            ("seed", 0, 2**62),
        ):
            for name in names.split():
                if not least <= getattr(self, name) < below:
                    raise ValueError(f"{name} must be at least {least} and below {below}, not {getattr(self, name)}")
        if not 0 <= self.warmdown <= 1:
            raise ValueError(f"warmdown is a share, from 0 to 1, not {self.warmdown}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype must be float32, bfloat16 or auto, not {self.dtype!r}")

    def model_config(self, vocab_size: int) -> GPTConfig:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(GPTConfig)}
        return GPTConfig(**fields | {"vocab_size": vocab_size})


# -----------------------------------------------------------------------------
# What a run needs


def pick_dtype(config: Config, device: torch.device) -> AbstractContextManager:
    """The autocast that a step runs in."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32; a CPU it would slow down
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def open_dataset(config: Config) -> common.Dataset:
    """The dataset, prepared first if it is missing."""
    folder = ROOT / "data" / config.dataset
    if not (folder / "meta.json").exists():
        if not (folder / "prepare.py").exists():
            names = ", ".join(sorted(p.parent.name for p in ROOT.glob("data/*/prepare.py")))
            raise UserError(f"--dataset={config.dataset}: there is no {folder / 'prepare.py'}; there are {names}")
        status = subprocess.call([sys.executable, folder / "prepare.py", f"--tokenizer={config.tokenizer}"])
        if status:
            sys.exit(status)  # it has said why
    try:
        return common.load(folder)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from e


def check_dataset(data: common.Dataset, name: str, config: GPTConfig) -> None:
    """UserError if the splits are too short for the model's context, or hold an id that it does not know."""
    for split, tokens in (("train", data.train), ("val", data.val)):
        where = f"data/{name}/{split}.bin"
        if len(tokens) <= config.sequence_len:
            raise UserError(
                f"{where} has {len(tokens)} tokens: sequence_len {config.sequence_len} needs one more than that"
            )
        if tokens.max() >= config.vocab_size:
            raise UserError(f"{where} has token id {tokens.max()}, outside the vocabulary of {config.vocab_size}")


def load_checkpoint(source: str, device: torch.device | str) -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint or of hf:NAME_OR_DIR, in float32, where small steps count; and what is kept with it."""
    if source.startswith("hf:"):
        try:
            model, tokenizer = hf.load(source.removeprefix("hf:"), device, torch.float32)
        except (ValueError, OSError, ImportError) as e:
            raise UserError(str(e)) from e
        return model, {"tokenizer": tokenizer.to_dict()}
    try:
        return GPT.load_checkpoint(source, device, torch.float32)
    except OSError as e:
        raise UserError(f"cannot read the checkpoint {source}: {e.strerror}") from e
    except RuntimeError as e:
        raise RunError(str(e)) from e


# -----------------------------------------------------------------------------
# The steps of a run


def get_batch(
    tokens: np.ndarray, starts: np.ndarray, T: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T) int64: the tokens from each of starts (B,) on, and those one further."""
    window = torch.from_numpy(tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64))  # (B, T + 1)
    if device.type == "cuda":
        window = window.pin_memory()
    window = window.to(device, non_blocking=True)
    return window[:, :-1], window[:, 1:]


def train_starts(config: Config, step: int, n_tokens: int) -> np.ndarray:
    """Where the sequences of a step begin, (gradient_accumulation_steps, batch_size): a function of (seed, step)."""
    shape = (config.gradient_accumulation_steps, config.batch_size)
    return np.random.default_rng((config.seed, step)).integers(n_tokens - config.sequence_len, size=shape)


@torch.no_grad()
def evaluate(model: Any, tokens: np.ndarray, config: Config, device: torch.device, autocast: Any) -> float:
    """Mean loss, in nats a token, of windows spread evenly over the split: all of it, if eval_iters is large enough."""
    T = config.sequence_len
    n_windows = (len(tokens) - 1) // T
    n = min(n_windows, config.eval_iters * config.batch_size)
    starts = np.linspace(0, n_windows - 1, n).astype(np.int64) * T
    model.eval()
    total = 0.0
    for i in range(0, n, config.batch_size):
        x, y = get_batch(tokens, starts[i : i + config.batch_size], T, device)
        with autocast:
            total += model(x, y).item() * len(x)
    model.train()
    return total / n


def lr_scale(config: Config, step: int) -> float:
    """The share of the learning rates at a step: up from zero, constant, down to zero in a straight line."""
    up = (step + 1) / config.warmup_iters if step < config.warmup_iters else 1.0
    left = config.max_iters - step
    falling = config.warmdown * config.max_iters
    return min(up, left / falling if left < falling else 1.0)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """RunError if what is done in here to write path fails."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save has RuntimeErrors of its own for a full disk
        raise RunError(f"cannot write {path}: {e}; what was there before is still good") from e


class Log:
    """metrics.jsonl, an object for each logged step, and a line on stdout: in place on a terminal."""

    def __init__(self, config: Config, start: int) -> None:
        self.config, self.path = config, Path(config.out_dir) / "metrics.jsonl"
        self.started, self.start = time.monotonic(), start
        self.records: list[dict[str, Any]] = []
        if start and self.path.exists():
            for line in self.path.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a last line that was cut off
                    self.records.append(json.loads(line))
        self.records = [record for record in self.records if record["step"] < start]
        temporary = self.path.with_name("metrics.jsonl.tmp")
        with writing(self.path):
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            os.replace(temporary, self.path)

    def __call__(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with writing(self.path), open(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")
        step, last = record["step"], self.config.max_iters
        spent = time.monotonic() - self.started
        left = spent / max(step - self.start, 1) * (last - step)
        parts = [f"{step / max(last, 1):4.0%} step {step}/{last}"]
        if "loss" in record:
            parts += [f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:,.0f} tokens/s", f"{left:.0f}s left"]
        if "val_loss" in record:
            parts += [f"val loss {record['val_loss']:.4f}, {record['val_bpb']:.4f} bits/byte"]
        line = " | ".join(parts)
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="\n" if "val_loss" in record else "", flush=True)
        else:
            print(line, flush=True)

    def plot(self) -> None:
        """out_dir/loss.png, with the extra 'plot'."""
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        for key, style in (("loss", "-"), ("val_loss", "o-")):
            points = [(r["step"], r[key]) for r in self.records if key in r] or [(0, math.nan)]
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "), linewidth=1, markersize=4)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
        with writing(self.path.with_name("loss.png")):
            figure.savefig(self.path.with_name("loss.png"), dpi=150, bbox_inches="tight")


def main() -> None:
    config = configurator.parse(Config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("this trains in one process: start it without torchrun")
    try:
        device = pick_device(config.device)
    except ValueError as e:
        raise UserError(str(e)) from e
    autocast = pick_dtype(config, device)
    out_dir = Path(config.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out_dir={config.out_dir} cannot be a folder: {e.strerror}") from e

    # The model: new, as it was when the run was stopped, or a checkpoint's to fine-tune
    data = open_dataset(config)
    model_config = config.model_config(config.vocab_size or data.tokenizer.vocab_size)
    resume = config.init_from == "resume"
    step, best = 0, math.inf
    torch.manual_seed(config.seed)
    if config.init_from == "scratch":
        model = GPT(model_config).to(device)
    else:
        source = str(out_dir / "ckpt.pt") if resume else config.init_from
        model, saved = load_checkpoint(source, device)
        if saved.get("tokenizer") != data.tokenizer.to_dict():
            raise UserError(f"{source} has another tokenizer than the dataset {config.dataset} ({data.tokenizer.name})")
        if resume and (changed := [k for k, v in asdict(model_config).items() if v != getattr(model.config, k)]):
            was = ", ".join(f"{k}={getattr(model.config, k)}" for k in changed)
            raise UserError(
                f"{source} has {was}: a resumed run keeps its architecture; give a new one another --out_dir"
            )
        # Positions are no table that has to fit: a run may read less at a time than its model can
        sequence_len = min(config.sequence_len, model.config.sequence_len)
        config = dataclasses.replace(config, **asdict(model.config) | {"sequence_len": sequence_len})
    check_dataset(data, config.dataset, config.model_config(model.config.vocab_size))
    rates = (config.learning_rate, config.embd_lr, config.head_lr)
    optimizers = model.configure_optimizers(
        *rates, config.weight_decay, config.momentum, betas=(config.beta1, config.beta2)
    )
    if resume:
        if not {"step", "best", "optimizers"} <= set(saved):
            raise RunError(f"{source} has no state to resume from: to start from its weights, say --init_from={source}")
        step, best = saved["step"], saved["best"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(setting)  # those of this run, should they have changed
    forward: Any = torch.compile(model) if config.compile else model
    model.train()
    if not resume:
        for path in (out_dir / "ckpt.pt", out_dir / "best.pt"):
            if path.exists():  # of a run that was, perhaps, to be resumed
                os.replace(path, path.with_suffix(".old.pt"))
                print(f"{path} was there already: it is {path.with_suffix('.old.pt').name} now")
    log = Log(config, step)
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * config.sequence_len
    print(
        f"{model.num_params() / 1e6:.2f}M parameters on {device}, {tokens_per_step:,} tokens a step, "
        f"{len(data.train):,} of {data.tokenizer.name} to train on; {out_dir} gets what comes of it"
    )

    def save(name: str, **extra: Any) -> None:
        about = dict(tokenizer=data.tokenizer.to_dict(), step=step, train_config=asdict(config))
        with writing(out_dir / name):
            model.save(out_dir / name, **about, **extra)

    def save_all() -> None:
        save("ckpt.pt", best=best, optimizers=[optimizer.state_dict() for optimizer in optimizers])

    def check_finite(loss: float) -> None:
        if not math.isfinite(loss):
            raise RunError(
                f"the loss at step {step} is {loss}: try a lower learning_rate, or dtype=float32; "
                f"{out_dir / 'ckpt.pt'} is from before"
            )

    # Ctrl-C and SIGTERM end the run after the step at hand; a second one ends it at once
    signals: list[int] = []

    def on_signal(signum: int, _: Any) -> None:
        signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    handlers = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}

    seconds, n_steps = 0.0, 0  # of training since the last line of the log
    while True:
        record: dict[str, Any] = {"step": step}
        if step % config.eval_interval == 0 or step >= config.max_iters:
            val_loss = evaluate(forward, data.val, config, device, autocast)
            check_finite(val_loss)
            record |= {"val_loss": val_loss, "val_bpb": val_loss / math.log(2) / data.bytes_per_token}
            if val_loss < best and step > 0:
                best = val_loss
                save("best.pt", val_loss=val_loss, val_bpb=record["val_bpb"])
            save_all()
        if step >= config.max_iters:
            log(record)
            break

        started = time.perf_counter()
        torch.manual_seed(config.seed + step)  # dropout
        scale = lr_scale(config, step)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * scale
        loss = torch.zeros((), device=device)
        for starts in train_starts(config, step, len(data.train)):
            x, y = get_batch(data.train, starts, config.sequence_len, device)
            with autocast:
                part = forward(x, y) / config.gradient_accumulation_steps
            part.backward()
            loss += part.detach()
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % config.log_interval == 0 or "val_loss" in record:
            record["loss"] = loss.item()  # waits for the device, so that the clock is right
            check_finite(record["loss"])
        seconds, n_steps = seconds + time.perf_counter() - started, n_steps + 1
        if "loss" in record:
            record |= {"tokens_per_second": n_steps * tokens_per_step / seconds, "lr": config.learning_rate * scale}
            seconds, n_steps = 0.0, 0
            log(record)
        step += 1
        if signals:
            check_finite(loss.item())
            save_all()
            print(f"\nstopped before step {step}; --init_from=resume goes on", file=sys.stderr)
            sys.exit(128 + signals[0])

    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    if signals:  # in the last evaluation: all is saved
        sys.exit(128 + signals[0])
    log.plot()
    if config.sample_tokens:
        prompt = data.tokenizer.encode(config.sample_prompt) or [data.tokenizer.eot]
        decoder = data.tokenizer.decoder()
        print(f"\n{config.sample_prompt}", end="")
        gaps, eot = data.tokenizer.gaps(model.config.vocab_size), data.tokenizer.eot
        for token in model.generate(prompt, config.sample_tokens, 0.8, stop_tokens=[eot], suppress_tokens=gaps):
            print(decoder.decode(token) if token != eot else "", end="", flush=True)
        print(decoder.flush())
    if math.isfinite(best):
        print(f"\nbest validation loss {best:.4f}: {out_dir / 'best.pt'}; python sample.py --out_dir={out_dir} goes on")


if __name__ == "__main__":
    configurator.run(main)

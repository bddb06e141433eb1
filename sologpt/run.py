"""A training run: its state, the three ways to begin, its checkpoints, and its folder.

`config` is the `Config` of train.py.
"""

import itertools
import math
import os
import re
import secrets
import shlex
import sys
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from gpt import GPT, GPTConfig
from sologpt import data, lora, parallel, peft
from sologpt.data import Dataset
from sologpt.device import autocast_dtype
from sologpt.errors import RunError, UserError, replacing, writing
from sologpt.load import find_checkpoint, load_model, make_config, read_checkpoint, read_tokenizer
from sologpt.log import Log
from sologpt.optim import configure_optimizers
from sologpt.parallel import World
from sologpt.stream import stream_text
from sologpt.tokenizer import Tokenizer

Batches = data.Windows | data.Conversations

# By a run, besides ckpt_STEP.pt
WRITTEN = ("ckpt.pt", "best.pt", "adapter", "metrics.jsonl", "loss.png", "tensorboard")
SAVED = {"step": int, "best": float, "id": str, "optimizers": list, "train_config": dict}  # in ckpt.pt
ADAPTED = {"adapters": dict, "base": int, "config": dict, "tokenizer": dict}  # there, of a LoRA run
FIXED = ("optimizer", "lora_rank", "lora_alpha", "lora_targets", "quantize")  # cannot be changed by resuming


@dataclass
class State:
    """What a checkpoint holds: all that it takes to go on. Batches are a function of seed and step."""

    model: GPT
    tokenizer: Tokenizer
    sequence_len: int  # tokens in a training sequence; a fine-tuned model may take longer ones
    init_from: str
    step: int = 0  # the next one
    best: float = math.inf  # lowest validation loss
    id: str = field(default_factory=lambda: secrets.token_hex(4))  # for the logging services
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    loaded: list[dict[str, Any]] | None = None  # the optimizers' states in a checkpoint; None in a new run
    base: int = 0  # `fingerprint` of the model that LoRA adapts
    dataset: str = ""  # `Dataset.fingerprint`


def settings(config: Any) -> dict[str, Any]:
    """Return what a resumed run may change: all but where it begins and the shape of the model."""
    fixed = ("model", "vocab_size", "init_from", "eval_only")
    return {key: value for key, value in vars(config).items() if key not in fixed}


# -----------------------------------------------------------------------------
# Three ways to begin


def begin(config: Any, world: World) -> tuple[State, Dataset]:
    """Return the state to train from, and the dataset. A run that torchrun has restarted is resumed."""
    restarted = parallel.n_restarts() > 0 and holds_state(Path(config.out_dir), settings(config))
    if config.init_from == "resume" or restarted:
        return resume(config, world)
    if config.init_from == "scratch":
        return from_scratch(config, world)
    return finetune(config, world)


def from_scratch(config: Any, world: World) -> tuple[State, Dataset]:
    dataset = data.open_dataset(config.dataset, config.tokenizer, config.model["sequence_len"], world)
    shape = make_config(config.model | {"vocab_size": config.vocab_size or dataset.tokenizer.vocab_size})
    check_memory(shape, config.batch_size * shape.sequence_len)
    torch.manual_seed(config.seed)
    about = dict(init_from=config.init_from, dataset=dataset.fingerprint)
    return State(GPT(shape), dataset.tokenizer, shape.sequence_len, **about), dataset


def finetune(config: Any, world: World) -> tuple[State, Dataset]:
    """Begin with the weights, the shape and the tokenizer of a checkpoint or an open model."""
    model, tokenizer = load_to_train(config, config.init_from, world)
    given = config.model.given
    sequence_len = min(given.get("sequence_len", GPTConfig.sequence_len), model.config.sequence_len)
    dropout = given.get("dropout", GPTConfig.dropout)  # of this run, not of the one before
    shape = asdict(model.config) | {"sequence_len": sequence_len, "dropout": dropout}
    check_shape(config, shape, config.init_from)
    dataset = data.open_dataset(config.dataset, tokenizer.to_dict(), sequence_len, world)
    set_dropout(model, dropout)
    if dataset.rows:
        tokenizer = dataset.tokenizer  # it has the chat template, and the token that ends an answer
    base = fingerprint(model) if config.lora_rank else 0
    about = dict(init_from=config.init_from, dataset=dataset.fingerprint)
    return State(model, tokenizer, sequence_len, **about, base=base), dataset


def load_to_train(config: Any, source: str, world: World) -> tuple[GPT, Tokenizer]:
    """Return a model in float32 and its tokenizer. With LoRA, it is frozen, in config.dtype or quantized."""
    if not config.lora_rank:
        model, tokenizer, _ = load_model(source, dtype=torch.float32)  # bfloat16 would lose small updates
        return model, tokenizer
    if config.quantize and world.device.type != "cpu":
        raise UserError(f"quantize={config.quantize} is for the CPU, not for {world.device}: --device=cpu")
    dtype = autocast_dtype(config.dtype, world.device)
    model, tokenizer, about = load_model(source, dtype=dtype, quantize=config.quantize or None)
    if Path(about["source"]).resolve().parent == Path(config.out_dir).resolve():
        what = f"{about['source']} would be moved, but to resume takes it again"
        raise UserError(f"{what}: choose another --out_dir than {config.out_dir}")
    torch.manual_seed(config.seed)
    lora.attach(model, config.lora_rank, config.lora_alpha, config.lora_targets)
    return model, tokenizer


def set_dropout(model: GPT, dropout: float) -> None:
    model.config.dropout = dropout
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout


def fingerprint(model: GPT) -> int:
    """Return a checksum of the first numbers of each frozen tensor, which does not depend on their dtype."""
    crc = 0
    for x in (*model.parameters(), *model.buffers()):
        if not x.requires_grad:
            crc = zlib.crc32(x.flatten()[:4096].bfloat16().view(torch.uint8).numpy().data, crc)
    return crc


def resume(config: Any, world: World) -> tuple[State, Dataset]:
    """Go on with the state in out_dir/ckpt.pt. Another schedule, batch or dataset is allowed, and printed."""
    path = Path(config.out_dir) / "ckpt.pt"
    if config.lora_rank:
        model, tokenizer, saved = load_adapted(config, path, world)
    else:
        model, tokenizer, saved = load_model(path, dtype=torch.float32)
        check_saved(path, saved)
        check_fixed(config, path, saved)
    before = saved["train_config"]
    check_shape(config, asdict(model.config) | {"sequence_len": before["sequence_len"]}, str(path))
    dataset = data.open_dataset(config.dataset, tokenizer.to_dict(), before["sequence_len"], world)
    line = f"resumed at step {saved['step']}"
    for key, value in settings(config).items():
        if value != before.get(key, value):
            line += f"; {key} is {value}, was {before[key]}"
    if saved.get("dataset", dataset.fingerprint) != dataset.fingerprint:
        line += "; the dataset has other tokens than before"
    world.print(line)
    progress = {key: saved[key] for key in ("step", "best", "id")}
    state = State(model, tokenizer, before["sequence_len"], before["init_from"], **progress)
    state.loaded, state.base, state.dataset = saved["optimizers"], saved.get("base", 0), dataset.fingerprint
    return state, dataset


def load_adapted(config: Any, path: Path, world: World) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return the model of a LoRA run, its tokenizer, and what else is in ckpt.pt. Its base is loaded anew."""
    saved = read_checkpoint(path)
    check_saved(path, saved)
    check_fixed(config, path, saved)
    source, shape = saved["train_config"]["init_from"], make_config(saved["config"])
    model, _ = load_to_train(config, source, world)
    if replace(model.config, dropout=shape.dropout) != shape or fingerprint(model) != saved["base"]:
        raise UserError(f"{source} is not the model that it was when {path} was trained on it")
    set_dropout(model, shape.dropout)
    lora.load_adapter_state(model, saved["adapters"])
    return model, read_tokenizer(path, saved["tokenizer"]), saved


def check_fixed(config: Any, path: Path, saved: dict[str, Any]) -> None:
    """UserError if a run is resumed with other parameters to train, or another optimizer."""
    before = {"lora_rank": 0} | saved["train_config"]
    for key in FIXED:
        asked = getattr(config, key)
        if before.get(key, asked) != asked:
            model = path.with_name("best.pt") if "adapters" in saved else path
            raise UserError(f"{path} was not trained with {key}={asked}; to fine-tune: --init_from={model}")


def check_shape(config: Any, shape: dict[str, Any], source: str) -> None:
    """UserError if files or flags ask for another model than the source's, whose config is shape."""
    asked = dict(config.model.given)
    if config.vocab_size:
        asked["vocab_size"] = config.vocab_size
    wanted = asdict(make_config(shape | asked))
    if changed := [key for key in wanted if wanted[key] != shape[key]]:
        have = ", ".join(f"{key}={shape[key]}, not {wanted[key]}" for key in changed)
        raise UserError(f"{source} has {have}, and the model's shape comes from there")


def check_memory(config: GPTConfig, tokens: int) -> None:
    """MemoryError if float32 weights and the first activations of a micro-batch do not fit into the machine.

    Linux would grant the memory and then kill the process.
    """
    attention = 2 * (config.n_head + config.n_kv_head) * config.head_dim  # rows of a block's matrices
    mlp = 2 * config.n_hidden
    needed = 4 * config.n_embd * (config.vocab_size + tokens + config.n_layer * (attention + mlp))
    if sys.platform != "win32" and needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise MemoryError


def make_optimizers(config: Any, state: State, world: World) -> None:
    """Make the optimizers of the wrapped model. In a resumed run, they go on from the checkpoint."""
    dtype = autocast_dtype(config.dtype, world.device)
    state.optimizers = configure_optimizers(
        state.model,
        learning_rate=config.learning_rate,
        embd_lr=config.embd_lr,
        head_lr=config.head_lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        betas=(config.beta1, config.beta2),
        optimizer=config.optimizer,
        dtype=None if dtype == torch.float32 else dtype,
    )
    if state.loaded is not None:
        parallel.load_optimizers(state.optimizers, state.loaded)
        state.loaded = []  # frees the memory


# -----------------------------------------------------------------------------
# Checkpoints


def save(config: Any, world: World, state: State, record: dict[str, Any]) -> None:
    """Write ckpt.pt, and best.pt if the record has the lowest validation loss so far.

    With keep_checkpoints, also write ckpt_STEP.pt and delete the oldest. All processes must call this.
    """
    if record.get("val_loss", math.inf) < state.best and state.step > 0:
        state.best = record["val_loss"]
        write(config, world, state, "best.pt", val_loss=record["val_loss"], val_bpb=record["val_bpb"])
        if config.lora_rank:
            write_adapter(config, world, state)
    names = ["ckpt.pt"]
    if config.keep_checkpoints:
        names.append(f"ckpt_{state.step:08d}.pt")
    for name in names:
        optimizers = [optimizer.state_dict() for optimizer in state.optimizers]
        progress = dict(best=state.best, id=state.id, dataset=state.dataset)
        write(config, world, state, name, **progress, optimizers=optimizers)
    if config.keep_checkpoints and world.is_main:
        delete_old_states(Path(config.out_dir), state.step, config.keep_checkpoints)


def write(config: Any, world: World, state: State, name: str, **extra: Any) -> None:
    """Write the model to out_dir/name, with extra beside it. All processes must call this.

    A LoRA run's best.pt is the merged model. Its other checkpoints hold the adapters alone.
    """
    extra = parallel.gather_state(extra, world.is_main)
    model: GPT | None = state.model
    if config.lora_rank and name != "best.pt":
        model, extra["adapters"] = None, lora.adapter_state(state.model)
    elif config.lora_rank:
        model = lora.merged(state.model, keep=world.is_main)
    elif config.shard:
        model = parallel.gather_model(state.model, world)
    if world.is_main:
        train_config = settings(config) | asdict(state.model.config)
        train_config |= {"sequence_len": state.sequence_len, "init_from": state.init_from}
        extra |= {"tokenizer": state.tokenizer.to_dict(), "step": state.step, "train_config": train_config}
        path = Path(config.out_dir) / name
        if model is None:
            with replacing(path) as f:
                torch.save({"config": asdict(state.model.config), "base": state.base, **extra}, f)
        else:
            with writing(path):
                model.save(path, **extra)


def write_adapter(config: Any, world: World, state: State) -> None:
    """Write out_dir/adapter, unless transformers has no such model or the extra 'hf' is missing.

    All processes must call this.
    """
    with suppress(UserError, ImportError):
        files = peft.to_peft(state.model, state.init_from.removeprefix("hf:"))
        if world.is_main:
            peft.write_peft(Path(config.out_dir) / "adapter", *files)


def check_finite(config: Any, step: int, finite: torch.Tensor, loss: float = 0.0) -> None:
    """RunError if the loss, or a gradient since the start, is not finite: nothing of that is saved."""
    if finite and math.isfinite(loss):
        return
    what = f"the loss at step {step} is {loss}"
    if math.isfinite(loss):
        what = f"a gradient at step {step}, or some steps before, is not finite"
    saved = Path(config.out_dir) / "ckpt.pt"
    raise RunError(f"{what}: try a lower learning_rate, or dtype=float32; {saved} is from before")


def delete_old_states(out_dir: Path, step: int, keep: int) -> None:
    """Keep the last `keep` of the files ckpt_STEP.pt up to `step`, and delete those before."""
    older = [path for n, path in sorted(states(out_dir).items()) if n <= step]
    with writing(out_dir):
        for path in older[:-keep]:
            path.unlink()


def holds_state(out_dir: Path, settings: dict[str, Any]) -> bool:
    """Whether out_dir/ckpt.pt is the state of a run with these settings. RunError if it is damaged."""
    path = out_dir / "ckpt.pt"
    if not path.exists():
        return False
    saved = read_checkpoint(path)
    check_saved(path, saved)
    return all(saved["train_config"].get(key) == value for key, value in settings.items())


def check_saved(path: Path, saved: dict[str, Any]) -> None:
    """RunError if a checkpoint holds no state to resume from, or values that no run writes."""
    kinds = SAVED | ADAPTED if "adapters" in saved else SAVED
    if not kinds.keys() <= saved.keys():
        raise RunError(f"{path} holds no state to resume from; to fine-tune its weights: --init_from={path}")
    before = saved["train_config"]
    if (
        any(type(saved[key]) is not kind for key, kind in kinds.items())
        or type(saved.get("dataset", "")) is not str
        or type(before.get("sequence_len")) is not int
        or type(before.get("init_from")) is not str
        or before["sequence_len"] < 1
        or saved["step"] < 0
        or math.isnan(saved["best"])
    ):
        raise RunError(f"{path} is damaged: it is no state of a run")


# -----------------------------------------------------------------------------
# The folder


def reserve(out_dir: Path, resumes: bool) -> IO[str]:
    """Make out_dir and lock it until the returned file is closed or the process ends, however it ends.

    UserError if it cannot be written, another run has it, or there is no state to resume from.
    """
    if resumes and not (out_dir / "ckpt.pt").exists():
        raise UserError(f"there is no checkpoint {out_dir / 'ckpt.pt'} to resume from")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        file = open(out_dir / "lock", "a")  # noqa: SIM115  (open as long as the run)
    except OSError as e:
        raise UserError(f"--out_dir={out_dir} cannot be written: {e.strerror}") from e
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        file.close()
        raise UserError(f"another run writes to {out_dir}: stop it first, or choose another --out_dir") from e
    except OSError:
        pass  # some network file systems have no locks
    return file


def set_aside_old_run(out_dir: Path) -> None:
    """Move what an earlier run has written to out_dir/old-N: perhaps it was meant to be resumed."""
    paths: Iterable[Path] = [*(out_dir / name for name in WRITTEN), *states(out_dir).values()]
    found = [path for path in paths if path.exists()]
    if not found:
        return
    old = next(old for n in itertools.count(1) if not (old := out_dir / f"old-{n}").exists())
    with writing(out_dir):
        old.mkdir()
        for path in found:
            path.rename(old / path.name)
    print(f"moved the earlier run in {out_dir} to {old} (--init_from=resume would have continued it)")


def states(out_dir: Path) -> dict[int, Path]:
    """Return the files ckpt_STEP.pt, by step."""
    named = ((re.fullmatch(r"ckpt_(\d{8,})\.pt", path.name), path) for path in out_dir.iterdir())
    return {int(match[1]): path for match, path in named if match}


def open_log(config: Any, state: State) -> Log:
    """Begin metrics.jsonl, or go on with that of a resumed run. A new run first sets the old one aside."""
    out_dir = Path(config.out_dir)
    with writing(out_dir):
        for temporary in (*out_dir.glob("*.pt.tmp"), *out_dir.glob("adapter/*.tmp")):
            temporary.unlink()  # a run was killed while it wrote this
    if state.loaded is None:
        set_aside_old_run(out_dir)
    return Log(out_dir, settings(config) | asdict(state.model.config), state.step, state.id)


def describe(config: Any, world: World, state: State, train: Batches) -> str:
    """Say what is trained, where, on what, and where it is written."""
    n = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    steps = train.describe_steps(config.gradient_accumulation_steps * config.batch_size)
    line = f"{n / 1e6:.2f}M {'new ' if config.lora_rank else ''}parameters on {world}, {steps} "
    line += f"(tokenizer: {state.tokenizer.name})"
    return line if config.eval_only else f"{line}, writing to {config.out_dir}"


def share_micro_batches(config: Any, world: World) -> None:
    """Make the micro-batches of a step as many as the processes can share."""
    asked = config.gradient_accumulation_steps
    config.gradient_accumulation_steps = math.ceil(asked / world.size) * world.size
    if config.gradient_accumulation_steps > asked:
        what = f"gradient_accumulation_steps is {config.gradient_accumulation_steps}, not {asked}"
        world.print(f"{what}: a multiple of {world.size} processes")


def begin_sample(
    config: Any, state: State, val: Batches, n_tokens: int, seed: int = 42
) -> tuple[str, Iterable[str]]:
    """Return a prompt, or a held-out question, as it is shown, and a stream of what the model says to it."""
    prompt, shown, temperature = config.sample_prompt or [state.tokenizer.eot], config.sample_prompt, 0.8
    if isinstance(val, data.Conversations):
        prompt, temperature = val.question(0), 0.0
        shown = state.tokenizer.decode(prompt)
    stream = stream_text(state.model, state.tokenizer, prompt, n_tokens, seed=seed, temperature=temperature)
    return shown, stream


def sample_lines(config: Any, state: State, val: Batches) -> list[str]:
    """Return the first two lines of a sample that have letters or digits, to watch the model learn."""
    if not config.sample_tokens or config.shard:  # one process has only a shard of the model
        return []
    shown, stream = begin_sample(config, state, val, min(config.sample_tokens, 60), seed=state.step)
    text = "" if isinstance(val, data.Conversations) else shown
    lines: list[str] = []
    for piece in stream:
        text += piece
        lines = [line for line in text.splitlines() if any(c.isalnum() for c in line)]
        if len(lines) > 2:
            break
    return ["".join(c if c.isprintable() else "\ufffd" for c in line[:72]) for line in lines[:2]]


def print_end(config: Any, state: State, dataset: Dataset, log: Log) -> None:
    """Print a sample, or an answer to a held-out question, what the loss means, and how to go on."""
    val = dataset.batches("val", state.sequence_len)
    if config.sample_tokens and not config.shard:
        shown, stream = begin_sample(config, state, val, config.sample_tokens)
        print(f"\n{shown}", end="")
        for text in stream:
            print(text, end="", flush=True)
        print()
    plotted = log.plot()
    if math.isfinite(state.best):
        best = Path(config.out_dir) / "best.pt"
        is_chat = isinstance(val, data.Conversations)
        flags = ["--chat", "--interactive"] if is_chat else ["--interactive", "--max_tokens", "200"]
        if config.lora_rank:
            adapter = best.with_name("adapter")
            missing = "none in PEFT's format: that needs safetensors, and an architecture of transformers"
            print(f"\nadapter: {adapter if adapter.exists() else missing}")
        bits = state.best / math.log(2) / dataset.bytes_per_token
        first = next(record["val_bpb"] for record in log.records if "val_bpb" in record)
        meaning = f"{bits:.2f} bits per byte (it began at {first:.2f}, and 8 is guessing)"
        print(f"\nbest validation loss {state.best:.4f}, {meaning}\n{plotted}")
        print(f"the model is {best}; to try prompts of your own:\n{sample_command(best, flags)}")


def sample_command(best: Path, flags: list[str]) -> str:
    """Return the command that samples from best. It names the file only if sample.py would take another."""
    command = ["python", str(Path(sys.argv[0]).with_name("sample.py"))]
    found = None
    with suppress(OSError):
        found = find_checkpoint("out").resolve()
    if found != best.resolve():
        command += ["--ckpt", str(best)]
    return shlex.join(command + flags)

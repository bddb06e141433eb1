"""Train a GPT: python train.py config/tiny.py --max_iters=200

Everything that happens is a function of (config, seed, step), so a run that was stopped and resumed
(--init_from=resume) ends where it would have ended.
"""

import ctypes
import dataclasses
import gc
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import configurator
from configurator import RunError, UserError
from data import common
from gpt import GPT, GPTConfig, pick_device

ROOT = Path(__file__).resolve().parent


@dataclass
class Config(GPTConfig):
    vocab_size: int = 0  # number of token ids; 0 means as many as the tokenizer has
    out_dir: str = "out"  # where checkpoints, metrics.jsonl and loss.png go
    init_from: str = "scratch"  # scratch, resume (from out_dir), or what to fine-tune: a checkpoint, hf:NAME_OR_DIR
    dataset: str = "stdlib"  # the folder in data/, prepared if it is missing, or the path of another
    tokenizer: str = "bytes"  # what a missing dataset is prepared with: bytes, bpe:N, gpt2, ...
    batch_size: int = 12  # sequences in one forward
    gradient_accumulation_steps: int = 1  # forwards in one step, which the processes share
    max_iters: int = 5000  # steps in all
    optimizer: str = "muon"  # of the blocks' matrices: muon, or adamw, with cheaper steps and lower rates
    learning_rate: float = 0.02  # of the blocks' matrices
    embd_lr: float = 0.3  # of the embedding, by AdamW
    head_lr: float = 0.004  # of the head, by AdamW
    weight_decay: float = 0.0  # of the blocks' matrices
    momentum: float = 0.95  # Muon's decay of the mean gradient
    beta1: float = 0.8  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    grad_clip: float = 0.0  # largest norm of the gradient; 0 switches it off
    warmup_iters: int = 0  # steps in which the learning rates rise from zero
    warmdown: float = 0.4  # share of max_iters, the last, in which they fall to zero
    eval_interval: int = 250  # steps between evaluations, each of which saves a checkpoint first
    eval_iters: int = 100  # batches of an evaluation, spread evenly over the validation split
    ckpt_interval: int = 0  # steps between further checkpoints; 0 for none
    keep_checkpoints: int = 0  # how many states to keep as ckpt_STEP.pt, beside the last and the best
    log_interval: int = 10  # steps between lines of metrics.jsonl and of the log
    wandb_log: bool = False  # send them to Weights & Biases as well,
    wandb_project: str = "sologpt"  # as a run of this project
    wandb_run_name: str = ""  # with this name; empty for the name of out_dir
    tensorboard: bool = False  # write them for TensorBoard as well, into out_dir/tensorboard
    sample_prompt: str = "\n"  # what the sample at the end goes on from
    sample_tokens: int = 300  # its length; 0 for none
    seed: int = 1337  # of the initial weights, the batches and dropout
    device: str = "auto"  # cuda, mps, cpu, ...; auto takes the first of these that is there
    dtype: str = "auto"  # of the products in a step: float32, bfloat16, or auto for what suits the device
    compile: bool = False  # torch.compile: slow to start, then faster
    activation_checkpointing: bool = False  # less memory: a block's activations are computed again in the backward pass
    shard: bool = False  # under torchrun: spread weights and optimizer state over the processes (FSDP2)

    def __post_init__(self) -> None:
        self.model_config(self.vocab_size or 1)
        for names, least, below in (
            ("batch_size gradient_accumulation_steps eval_interval eval_iters log_interval", 1, math.inf),
            ("max_iters learning_rate embd_lr head_lr grad_clip weight_decay warmup_iters sample_tokens", 0, math.inf),
            ("ckpt_interval keep_checkpoints", 0, math.inf),
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
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer must be muon or adamw, not {self.optimizer!r}")

    def model_config(self, vocab_size: int) -> GPTConfig:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(GPTConfig)}
        return GPTConfig(**fields | {"vocab_size": vocab_size})


# -----------------------------------------------------------------------------
# The processes that share the work: one, or those that torchrun starts


@dataclass(frozen=True)
class World:
    """This process among all: its rank, its rank on this machine, how many there are, and its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def say(self, text: str, file: Any = None) -> None:
        if self.first:
            print(text, file=file, flush=True)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, value: float, op: Any) -> float:
        """What the values of all processes come to, by op: their sum, or the largest."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, op)
        return shared.item()


def restarts() -> int:
    """How often torchrun has started this run again, after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join(config: Config) -> World:
    """Meet the other processes, if torchrun has started any: they talk by gloo, and by nccl between CUDA devices."""
    rank, local_rank, size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    try:
        device = pick_device(config.device)
    except ValueError as e:
        raise UserError(str(e)) from e
    if size < 2:
        if config.shard:
            raise UserError("--shard needs several processes: torchrun --nproc_per_node=N train.py ...")
        return World(0, 0, 1, device)
    if config.gradient_accumulation_steps % size:
        steps = config.gradient_accumulation_steps
        raise UserError(
            f"{size} processes cannot share gradient_accumulation_steps={steps}: make it a multiple of {size}"
        )
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # torchrun keeps the store when it restarts: without the prefix, the dead processes' addresses would be found in it
    store = dist.PrefixStore(f"restart {restarts()}", next(dist.rendezvous("env://"))[0])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, local_rank, size, device)


def share(model: GPT, config: Config, world: World) -> tuple[GPT, Any]:
    """The model on its device, or its shards on theirs, and what to call in its place for the loss."""
    if config.shard:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(world.device.type, (world.size,))
        for module in (*model.h, model):
            fully_shard(module, mesh=mesh)
    else:
        model = model.to(world.device)
    forward: Any = model
    if world.size > 1 and not config.shard:
        forward = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model, torch.compile(forward) if config.compile else forward


def whole(state: Any, keep: bool) -> Any:
    """state (dicts and lists of tensors) with its shards put together on the CPU, if keep. All processes call this."""
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    if hasattr(state, "full_tensor"):
        full = state.full_tensor()
        return full.cpu() if keep else None
    return state


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole` gave of an optimizer, in the shards of its parameters; the settings stay this run's."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    p: Any
    for p, values in optimizer.state.items():
        for name, value in values.items():
            if hasattr(p, "placements") and value.shape == p.shape:
                from torch.distributed.tensor import distribute_tensor

                values[name] = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


# -----------------------------------------------------------------------------
# What a run needs


def keep_freed_memory() -> None:
    """Have glibc keep memory that is freed for what comes next.

    It gives tensors of 32 MB and more back to the kernel at once. To get such memory again, page by page and zeroed,
    took a quarter of a step of a 124M model on a CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        with suppress(AttributeError):  # musl has no mallopt
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no memory in pages of its own
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what may lie unused at the end of the heap


def pick_dtype(config: Config, device: torch.device) -> AbstractContextManager:
    """The autocast that a step runs in."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32; a CPU it would slow down
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def open_dataset(config: Config, world: World, tokenizer: dict[str, Any] | None = None) -> common.Dataset:
    """The dataset; if it is missing it is prepared first, with a checkpoint's tokenizer where one is given."""
    folder = ROOT / "data" / config.dataset
    # One process prepares it, and then one on each machine, in case they do not share their disks
    for turn in (world.rank == 0, world.local_rank == 0):
        if turn and not (folder / "meta.json").exists():
            prepare(folder, config, tokenizer)
        world.wait()
    try:
        return common.load(folder)
    except (ValueError, OSError, ImportError) as e:
        raise UserError(str(e)) from e


def prepare(folder: Path, config: Config, tokenizer: dict[str, Any] | None) -> None:
    if not (folder / "prepare.py").exists():
        if folder.is_dir():
            return  # one's own: to open it will say what it lacks
        names = ", ".join(sorted(p.parent.name for p in ROOT.glob("data/*/prepare.py")))
        raise UserError(f"--dataset={config.dataset}: there is no {folder / 'prepare.py'}; there are {names}")
    with tempfile.TemporaryDirectory() as scratch:
        spec = config.tokenizer
        if tokenizer is not None:
            spec = f"{scratch}/tokenizer.json"
            Path(spec).write_text(json.dumps(tokenizer))
        status = subprocess.call([sys.executable, folder / "prepare.py", f"--tokenizer={spec}"])
    if status:
        sys.exit(status)  # it has said why


def check_dataset(data: common.Dataset, name: str, config: GPTConfig) -> None:
    """UserError if the splits are too short for the model's context, or hold an id that it does not know."""
    for split, tokens in (("train", data.train), ("val", data.val)):
        where = f"data/{name}/{split}.bin"
        if len(tokens) <= config.sequence_len:
            raise UserError(
                f"{where} has {len(tokens)} tokens: sequence_len {config.sequence_len} needs one more than that"
            )
    if data.max_token >= config.vocab_size:
        raise UserError(f"data/{name} has token id {data.max_token}, outside the vocabulary of {config.vocab_size}")


def load_checkpoint(source: str, device: torch.device | str = "cpu") -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint or of hf:NAME_OR_DIR, in float32, where small steps count, and what is kept with it."""
    try:
        if source.startswith("hf:"):
            from sologpt import hf

            model, tokenizer = hf.load(source.removeprefix("hf:"), device, torch.float32)
            return model, {"tokenizer": tokenizer.to_dict()}
        return GPT.load_checkpoint(source, device, torch.float32)
    except (ValueError, ImportError) as e:
        raise UserError(str(e)) from e
    except OSError as e:
        raise UserError(f"cannot read the checkpoint {source}: {e.strerror or e}") from e
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


def draw(config: Config, step: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """What a step is made of, a function of (seed, step) however many processes share it.

    Where its sequences begin, (gradient_accumulation_steps, batch_size), and a seed for each forward's dropout,
    (gradient_accumulation_steps,).
    """
    rng = np.random.default_rng((config.seed, step))
    starts = rng.integers(n_tokens - config.sequence_len, size=(config.gradient_accumulation_steps, config.batch_size))
    return starts, rng.integers(2**63, size=config.gradient_accumulation_steps)


@torch.no_grad()
def evaluate(
    model: GPT, forward: Any, tokens: np.ndarray, config: Config, world: World, autocast: AbstractContextManager
) -> float:
    """Mean loss, in nats a token, of windows spread evenly over the split: all of it, if eval_iters is large enough."""
    T = config.sequence_len
    n_windows = (len(tokens) - 1) // T
    n = min(n_windows, config.eval_iters * config.batch_size)
    starts = np.linspace(0, n_windows - 1, n).astype(np.int64) * T
    batches = [starts[i : i + config.batch_size] for i in range(0, n, config.batch_size)]
    model.eval()
    total = 0.0
    for i in range(world.rank, math.ceil(len(batches) / world.size) * world.size, world.size):
        batch = batches[min(i, len(batches) - 1)]  # shards need all processes in every forward: one may come twice,
        x, y = get_batch(tokens, batch, T, world.device)
        with autocast:
            loss = forward(x, y).item()
        total += loss * len(batch) * (i < len(batches))  # but counts once
    model.train()
    return world.agree(total, dist.ReduceOp.SUM) / n


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


# -----------------------------------------------------------------------------
# A run


@dataclass
class Run:
    """All that goes on from step to step."""

    config: Config
    world: World
    data: common.Dataset
    model: GPT
    forward: Any  # the model in its wrappers
    optimizers: list[torch.optim.Optimizer]
    step: int = 0  # the next one
    best: float = math.inf  # validation loss
    id: str = ""  # by which services know it again when it is resumed

    def __post_init__(self) -> None:
        self.autocast = pick_dtype(self.config, self.world.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.world.device)  # were all gradients so far?

    @property
    def out_dir(self) -> Path:
        return Path(self.config.out_dir)

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the optimizers. Returns this process's share of the loss, and the norm of the whole gradient."""
        config, world = self.config, self.world
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * lr_scale(config, self.step)
        starts, seeds = draw(config, self.step, len(self.data.train))
        mine = range(world.rank, config.gradient_accumulation_steps, world.size)
        loss = torch.zeros((), device=world.device)
        for i in mine:
            torch.manual_seed(int(seeds[i]))  # dropout
            x, y = get_batch(self.data.train, starts[i], config.sequence_len, world.device)
            # The gradients of all processes are averaged, with the last backward pass
            last = i == mine[-1] or not hasattr(self.forward, "no_sync")
            with nullcontext() if last else self.forward.no_sync(), self.autocast:
                part = self.forward(x, y) / len(mine)
                part.backward()
            loss += part.detach() / world.size
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = getattr(norm, "full_tensor", lambda: norm)()
        self.finite &= norm.isfinite()
        if config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), config.grad_clip, norm)
        for optimizer in self.optimizers:
            with self.autocast:  # for Muon's products
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def check(self, loss: float = 0.0) -> None:
        """RunError if the loss, or a gradient so far, is not finite: nothing of that is saved."""
        if not (self.finite and math.isfinite(loss)):
            what = f"a gradient at step {self.step}, or some steps before, is not finite"
            if not math.isfinite(loss):
                what = f"the loss at step {self.step} is {loss}"
            ckpt = self.out_dir / "ckpt.pt"
            raise RunError(f"{what}: try a lower learning_rate, or dtype=float32; {ckpt} is from before")

    def evaluate(self) -> dict[str, float]:
        """Losses on the validation split; the state is saved."""
        loss = evaluate(self.model, self.forward, self.data.val, self.config, self.world, self.autocast)
        self.check(loss)
        losses = {"val_loss": loss, "val_bpb": loss / math.log(2) / self.data.bytes_per_token}
        if loss < self.best and self.step > 0:
            self.best = loss
            self.save("best.pt", **losses)
        self.save_state()
        return losses

    def save(self, name: str, **extra: Any) -> None:
        """Write a checkpoint into out_dir. All processes have to call this."""
        model, first = self.model, self.world.first
        extra = whole(extra, first)
        if self.config.shard:
            weights = whole(model.state_dict(), first)
            with torch.device("meta"):
                model = GPT(model.config)
            if first:
                model.load_state_dict(weights, assign=True)
        if first:
            about = dict(tokenizer=self.data.tokenizer.to_dict(), step=self.step, train_config=asdict(self.config))
            with writing(self.out_dir / name):
                model.save(self.out_dir / name, **about, **extra)

    def save_state(self) -> None:
        """ckpt.pt: all that it takes to go on; with keep_checkpoints also as ckpt_STEP.pt, in place of the oldest."""
        names = ["ckpt.pt"] + [f"ckpt_{self.step:08d}.pt"] * bool(self.config.keep_checkpoints)
        for name in names:
            states = [optimizer.state_dict() for optimizer in self.optimizers]
            self.save(name, best=self.best, id=self.id, optimizers=states)
        if self.world.first and self.config.keep_checkpoints:
            for old in sorted(self.out_dir.glob("ckpt_*.pt"))[: -self.config.keep_checkpoints]:
                old.unlink()


def was_restarted(config: Config) -> bool:
    """Whether torchrun has started this run once more after a failure, and it had saved a state before."""
    path = Path(config.out_dir) / "ckpt.pt"
    if not restarts() or not path.exists():
        return False
    return schedule(load_checkpoint(str(path), "meta")[1].get("train_config", {})) == schedule(asdict(config))


def schedule(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of the run alone: neither the model's shape nor where its weights came from."""
    return {k: v for k, v in config.items() if k not in GPTConfig.__dataclass_fields__ and k != "init_from"}


def open_run(config: Config, world: World) -> Run:
    """A new run, one as it was when it was stopped, or one that starts from a checkpoint's weights, in their shape."""
    resume = config.init_from == "resume" or was_restarted(config)
    source = str(Path(config.out_dir) / "ckpt.pt") if resume else config.init_from
    torch.manual_seed(config.seed)
    if source == "scratch":
        data = open_dataset(config, world)
        model = GPT(config.model_config(config.vocab_size or data.tokenizer.vocab_size))
        saved: dict[str, Any] = {}
    else:
        model, saved = load_checkpoint(source)
        if resume and not {"step", "best", "id", "optimizers", "train_config"} <= saved.keys():
            raise RunError(f"{source} has no state to resume from: to start from its weights, say --init_from={source}")
        data = open_dataset(config, world, saved.get("tokenizer"))
        if saved.get("tokenizer") != data.tokenizer.to_dict():
            raise UserError(
                f"{source} has another tokenizer than the dataset {config.dataset} ({data.tokenizer.name}): without "
                "its meta.json, that would be prepared anew with the checkpoint's"
            )
        began = saved["train_config"] if resume else asdict(config)
        if resume and began["init_from"] == "scratch":  # else the shape came with the weights, and none is asked for
            asked = config.model_config(config.vocab_size or data.tokenizer.vocab_size)
            if changed := [k for k, v in asdict(asked).items() if v != getattr(model.config, k)]:
                was = ", ".join(f"{k}={getattr(model.config, k)}" for k in changed)
                raise UserError(
                    f"{source} has {was}: a resumed run keeps its architecture; give a new one another --out_dir"
                )
        if not resume:  # dropout is the run's, not the model's
            model.config.dropout = config.dropout
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = config.dropout
        shape = asdict(model.config)
        shape["sequence_len"] = min(began["sequence_len"], model.config.sequence_len)  # it may read less than it can
        config = dataclasses.replace(config, **shape, init_from=began["init_from"])
    check_dataset(data, config.dataset, config.model_config(model.config.vocab_size))
    model.activation_checkpointing = config.activation_checkpointing
    model, forward = share(model.train(), config, world)
    rates = (config.learning_rate, config.embd_lr, config.head_lr)
    optimizers = model.configure_optimizers(
        *rates, config.weight_decay, config.momentum, (config.beta1, config.beta2), config.optimizer
    )
    run = Run(config, world, data, model, forward, optimizers, id=secrets.token_hex(4))
    if resume:
        if len(saved["optimizers"]) != len(optimizers):
            raise UserError(
                f"{source} was not trained with optimizer={config.optimizer}: a resumed run keeps its optimizer; "
                f"to start anew from its weights, say --init_from={source}"
            )
        run.step, run.best, run.id = saved["step"], saved["best"], saved["id"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            restore(optimizer, state)
        before, now = schedule(saved["train_config"]), schedule(asdict(config))
        changes = [f"; {k} is {v}, was {before[k]}" for k, v in now.items() if v != before.get(k, v)]
        world.say(f"resumed at step {run.step}" + "".join(changes))
    elif world.first:
        for path in (run.out_dir / "ckpt.pt", run.out_dir / "best.pt"):
            if path.exists():  # of a run that was, perhaps, to be resumed
                os.replace(path, path.with_suffix(".old.pt"))
                print(f"{path} was there already: it is {path.with_suffix('.old.pt').name} now")
    return run


class Log:
    """metrics.jsonl, an object for each logged step, and a line on stdout: in place on a terminal."""

    def __init__(self, run: Run) -> None:
        self.config, self.path = run.config, run.out_dir / "metrics.jsonl"
        self.started, self.start = time.monotonic(), run.step
        self.records: list[dict[str, Any]] = []
        if self.start and self.path.exists():
            for line in self.path.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a last line that was cut off
                    self.records.append(json.loads(line))
        self.records = [record for record in self.records if record["step"] < self.start]
        temporary = self.path.with_name("metrics.jsonl.tmp")
        with writing(self.path):
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            os.replace(temporary, self.path)
        self.others = [open_wandb(run)] if run.config.wandb_log else []
        self.others += [open_tensorboard(run)] if run.config.tensorboard else []

    def __call__(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with writing(self.path), open(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")
        for other in self.others:
            other(record)
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


def open_wandb(run: Run) -> Callable[[dict[str, Any]], None]:
    """Where Weights & Biases takes a record; a resumed run goes on in the run that it was."""
    try:
        import wandb
    except ImportError as e:
        raise UserError("--wandb_log needs the extra 'wandb': pip install wandb") from e
    project, name = run.config.wandb_project, run.config.wandb_run_name or run.out_dir.resolve().name
    there = wandb.init(
        project=project, name=name, id=run.id, resume="allow", dir=run.out_dir, config=asdict(run.config)
    )
    return lambda record: there.log(record, step=record["step"])


def open_tensorboard(run: Run) -> Callable[[dict[str, Any]], None]:
    """Where TensorBoard takes a record; of a resumed run it shows no step twice."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UserError("--tensorboard needs the extra 'tensorboard': pip install tensorboard") from e
    writer = SummaryWriter(str(run.out_dir / "tensorboard"), purge_step=run.step)

    def write(record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "step":
                writer.add_scalar(key, value, record["step"])
        writer.flush()

    return write


# -----------------------------------------------------------------------------


@contextmanager
def noted(world: World) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM in here only fill the list that this gives. Of a single process, a second one is the end."""
    signals: list[int] = []

    def note(signum: int, _: Any) -> None:
        signals.append(signum)
        if world.size == 1:  # torchrun passes on what the terminal has sent to all already
            signal.signal(signum, signal.SIG_DFL)

    handlers = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def train(config: Config, world: World) -> None:
    out_dir = Path(config.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out_dir={out_dir} cannot be a folder: {e.strerror}") from e
    run = open_run(config, world)
    config, start = run.config, run.step
    log = Log(run) if world.first else None
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * config.sequence_len
    world.say(
        f"{run.model.num_params() / 1e6:.2f}M parameters on {world.size} x {world.device.type}, "
        f"{tokens_per_step:,} tokens a step, {len(run.data.train):,} of {run.data.tokenizer.name} to train on; "
        f"{out_dir} gets what comes of it"
    )

    with noted(world) as signals:
        seconds, n_steps = 0.0, 0  # of training since the last line of the log
        while True:
            step = run.step
            record: dict[str, Any] = {"step": step}
            done = step >= config.max_iters
            if step % config.eval_interval == 0 or done:
                record |= run.evaluate()
            elif config.ckpt_interval and step % config.ckpt_interval == 0 and step > start:
                run.check()
                run.save_state()
            if not done:
                started = time.perf_counter()
                loss, norm = run.train_step()
                if step % config.log_interval == 0 or "val_loss" in record:
                    record["loss"] = world.agree(loss.item(), dist.ReduceOp.SUM)  # waits for the device
                    run.check(record["loss"])
                seconds, n_steps = seconds + time.perf_counter() - started, n_steps + 1
                if "loss" in record:
                    record |= {"tokens_per_second": n_steps * tokens_per_step / seconds, "grad_norm": norm.item()}
                    record["lr"] = config.learning_rate * lr_scale(config, step)
                    seconds, n_steps = 0.0, 0
            if log and len(record) > 1:
                log(record)
            run.step += not done
            signum = int(world.agree(max(signals, default=0), dist.ReduceOp.MAX))
            if signum and not done:
                run.check()
                run.save_state()
                world.say(f"\nstopped before step {run.step}; --init_from=resume goes on", file=sys.stderr)
            if signum:
                sys.exit(128 + signum)
            if done:
                break

    if log:
        log.plot()
    data, model = run.data, run.model
    if world.first and config.sample_tokens and not config.shard:  # a shard of a model says nothing
        prompt = data.tokenizer.encode(config.sample_prompt) or [data.tokenizer.eot]
        decoder = data.tokenizer.decoder()
        print(f"\n{config.sample_prompt}", end="")
        gaps, eos = data.tokenizer.gaps(model.config.vocab_size), data.tokenizer.eos_tokens
        for token in model.generate(prompt, config.sample_tokens, 0.8, stop_tokens=eos, suppress_tokens=gaps):
            print(decoder.decode(token) if token not in eos else "", end="", flush=True)
        print(decoder.flush())
    if math.isfinite(run.best):
        best = f"best validation loss {run.best:.4f}: {out_dir / 'best.pt'}"
        world.say(f"\n{best}; python sample.py --out_dir={out_dir} goes on")
    world.wait()  # a process that leaves early takes its connections along


def main() -> None:
    config = configurator.parse(Config)
    if not config.activation_checkpointing:  # that has more memory to lose by it than time to win
        keep_freed_memory()
    world = join(config)
    try:
        train(config, world)
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or "gloo" in str(e):  # gloo has no error of its own
            raise RunError(f"process {world.rank} has lost the others: one of them has failed") from e
        raise
    finally:
        if world.size > 1:
            gc.collect()  # DDP is full of cycles, and its threads have to end before the interpreter does
            dist.destroy_process_group()


if __name__ == "__main__":
    configurator.run(main)

"""Train a GPT: python train.py config/tiny.py --max_iters=200

Batches, dropout and everything else that is random are functions of (seed, step). So a run that was stopped and resumed
(--init_from=resume) ends with the same weights as one that was not; on a GPU up to rounding.
"""

import math
import secrets
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import configurator
from configurator import RunError, UserError, reported, writing
from data import common
from gpt import GPT, GPTConfig
from sologpt import parallel, rundir
from sologpt.load import load_model
from sologpt.log import Log
from sologpt.loss import chunked_cross_entropy
from sologpt.optim import configure_optimizers
from sologpt.parallel import World
from sologpt.text import stream_text
from sologpt.tokenizer import Tokenizer


@dataclass
class Config:
    # ---- run
    out_dir: str = "out"  # folder for checkpoints, metrics.jsonl and loss.png
    init_from: str = "scratch"  # scratch, resume (out_dir), or weights to fine-tune: a checkpoint, hf:NAME, gguf:FILE
    seed: int = 1337  # seed of the initial weights, the batches and dropout
    device: str = "auto"  # cuda, mps, cpu, ...; auto picks an accelerator if there is one, else the CPU
    dtype: str = "auto"  # precision of matrix products: float32, bfloat16, or auto for bfloat16 on GPUs that have it
    compile: bool = False  # torch.compile the model: takes a while to start, then is faster
    # ---- data
    dataset: str = "stdlib"  # a dataset in data/, prepared if it is missing, or the path of a prepared folder
    tokenizer: str = "bytes"  # tokenizer to prepare a missing dataset with: bytes, bpe:N, gpt2, ...
    # ---- model
    model: dict = configurator.keys_of(GPTConfig)
    vocab_size: int = 0  # number of token ids; 0 means as many as the tokenizer has
    # ---- optimization
    batch_size: int = 12  # sequences in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in a step, over all processes
    max_iters: int = 5000  # number of optimizer steps
    optimizer: str = "muon"  # optimizer of the blocks' matrices: muon, or adamw, with cheaper steps and lower rates
    learning_rate: float = 0.02  # learning rate of the blocks' matrices
    embd_lr: float = 0.3  # learning rate of the embedding (AdamW)
    head_lr: float = 0.004  # learning rate of the head, gains, biases and a tied embedding (AdamW)
    weight_decay: float = 0.0  # weight decay of the blocks' matrices
    momentum: float = 0.95  # momentum of Muon
    beta1: float = 0.8  # AdamW's decay rate of the mean gradient
    beta2: float = 0.95  # AdamW's decay rate of the mean squared gradient
    grad_clip: float = 0.0  # clip the norm of the gradient to this; 0 switches it off
    warmup_iters: int = 0  # steps in which the learning rates rise linearly from zero
    warmdown: float = 0.4  # fraction of max_iters, at the end, in which they fall linearly to zero
    # ---- evaluation
    eval_interval: int = 250  # steps between evaluations on the validation split
    eval_iters: int = 100  # batches in an evaluation, spread evenly over the split
    sample_prompt: str = "\n"  # prompt of the sample at the end of training
    sample_tokens: int = 300  # length of the sample at the end of training; 0 for none
    # ---- checkpoints
    ckpt_interval: int = 0  # steps between checkpoints, besides those at evaluations; 0 for none
    keep_checkpoints: int = 0  # number of older states to keep as ckpt_STEP.pt
    # ---- processes
    shard: bool = False  # under torchrun: shard weights and optimizer state over the processes (FSDP2)
    activation_checkpointing: bool = False  # save memory: recompute activations in the backward pass
    # ---- logging
    log_interval: int = 10  # steps between lines of metrics.jsonl and of the terminal
    wandb_log: bool = False  # send metrics to Weights & Biases (extra 'wandb')
    wandb_project: str = "sologpt"  # project on Weights & Biases
    wandb_run_name: str = ""  # name of the run on Weights & Biases; empty for the name of out_dir
    tensorboard: bool = False  # write metrics for TensorBoard into out_dir/tensorboard (extra 'tensorboard')

    def __post_init__(self) -> None:
        GPTConfig(**self.model | {"vocab_size": self.vocab_size or 1})  # ValueError for an impossible shape
        for names, least, below in (
            ("batch_size gradient_accumulation_steps eval_interval eval_iters log_interval", 1, math.inf),
            ("max_iters warmup_iters sample_tokens ckpt_interval keep_checkpoints", 0, math.inf),
            ("learning_rate embd_lr head_lr grad_clip weight_decay", 0, 1e38),
            ("momentum beta1 beta2", 0, 1),
            ("seed", 0, 2**62),
        ):
            for name in names.split():
                if not least <= getattr(self, name) < below:
                    raise ValueError(f"{name} must be at least {least} and below {below}, not {getattr(self, name)}")
        if not 0 <= self.warmdown <= 1:
            raise ValueError(f"warmdown must be a fraction from 0 to 1, not {self.warmdown}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype must be float32, bfloat16 or auto, not {self.dtype!r}")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer must be muon or adamw, not {self.optimizer!r}")

    def run_settings(self) -> dict[str, Any]:
        """All but the model's shape and where its weights come from."""
        return {k: v for k, v in asdict(self).items() if k not in ("model", "vocab_size", "init_from")}


# -----------------------------------------------------------------------------
# Three ways to begin


@dataclass
class Run:
    """What a step changes, and a checkpoint restores."""

    model: GPT
    data: common.Dataset
    sequence_len: int  # tokens in a training sequence; a fine-tuned model may have been made for more
    init_from: str
    step: int = 0  # the next one
    best: float = math.inf  # lowest validation loss
    id: str = field(default_factory=lambda: secrets.token_hex(4))  # known to the logging services
    optimizer_states: list[dict[str, Any]] = field(default_factory=list)


def from_scratch(config: Config, world: World) -> Run:
    data = open_dataset(config, world)
    shape = GPTConfig(**config.model | {"vocab_size": config.vocab_size or data.tokenizer.vocab_size})
    (H, G, D), tokens = shape.heads, config.batch_size * shape.sequence_len  # of a micro-batch
    rows = shape.vocab_size + tokens + shape.n_layer * 2 * (H * D + G * D + (shape.n_hidden or 0))
    parallel.check_memory(4 * shape.n_embd * rows)  # the weights and the first activations, in float32
    torch.manual_seed(config.seed)
    model = GPT(shape)
    return Run(model, data, model.config.sequence_len, config.init_from)


def finetune(config: Config, world: World) -> Run:
    """From the weights, the shape and the tokenizer of a checkpoint or an open model."""
    with reported():
        model, tokenizer, _ = load_model(config.init_from, dtype=torch.float32)  # small steps vanish in bfloat16
    sequence_len = min(config.model.get("sequence_len", GPTConfig.sequence_len), model.config.sequence_len)
    dropout = config.model.get("dropout", GPTConfig.dropout)  # of this run, not of the one before
    check_shape(config, asdict(model.config) | {"sequence_len": sequence_len, "dropout": dropout}, config.init_from)
    data = open_dataset(config, world, tokenizer)
    model.config.dropout = dropout
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return Run(model, data, sequence_len, config.init_from)


def resume(config: Config, world: World) -> Run:
    """From the state in out_dir/ckpt.pt. Another schedule, batch or dataset is allowed and printed."""
    path = Path(config.out_dir) / "ckpt.pt"
    with reported():
        model, tokenizer, state = load_model(path, dtype=torch.float32)
        rundir.check_state(path, state)
    before = state["train_config"]
    check_shape(config, asdict(model.config) | {"sequence_len": before["sequence_len"]}, str(path))
    if before.get("optimizer", config.optimizer) != config.optimizer:
        raise UserError(f"{path} was not trained with optimizer={config.optimizer}; to fine-tune: --init_from={path}")
    data = open_dataset(config, world, tokenizer)
    changes = [f"; {k} is {v}, was {before[k]}" for k, v in config.run_settings().items() if v != before.get(k, v)]
    world.print(f"resumed at step {state['step']}" + "".join(changes))
    progress = (state["step"], state["best"], state["id"], state["optimizers"])
    return Run(model, data, before["sequence_len"], before["init_from"], *progress)


def was_restarted(config: Config) -> bool:
    """Whether torchrun has restarted this run after a failure, and it had saved a state before."""
    path = Path(config.out_dir) / "ckpt.pt"
    if not parallel.n_restarts() or not path.exists():
        return False
    with reported():
        state = GPT.load_checkpoint(path)[1]
        rundir.check_state(path, state)
    return all(state["train_config"].get(key) == value for key, value in config.run_settings().items())


def check_shape(config: Config, shape: dict[str, Any], source: str) -> None:
    """UserError if the config asks for another model than the source's, whose config is shape."""
    asked = config.model | ({"vocab_size": config.vocab_size} if config.vocab_size else {})
    with reported():
        wanted = asdict(GPTConfig(**shape | asked))
    if changed := [key for key in wanted if wanted[key] != shape[key]]:
        have = ", ".join(f"{key}={shape[key]}" for key in changed)
        raise UserError(f"{source} has {have}, and the model's shape comes from there: ask for the same, or for none")


def open_dataset(config: Config, world: World, tokenizer: Tokenizer | None = None) -> common.Dataset:
    """The dataset, prepared if it is missing. With a checkpoint's tokenizer, it must be tokenized alike."""
    like = None if tokenizer is None else tokenizer.to_dict()
    with reported():
        data = common.open_dataset(config.dataset, config.tokenizer, like, world)
    if like and like != data.tokenizer.to_dict():
        raise UserError(
            f"the dataset {config.dataset} has another tokenizer ({data.tokenizer.name}) than the checkpoint: prepare "
            "it again with --tokenizer=CHECKPOINT"
        )
    return data


# -----------------------------------------------------------------------------
# The parts of a step


def forward_backward(config: Config, world: World, run: Run, forward: Any, autocast: Any) -> torch.Tensor:
    """Gradients of this process's micro-batches, averaged over all processes. Returns its share of the loss."""
    n, T, steps = len(run.data.train), run.sequence_len, config.gradient_accumulation_steps
    starts, seeds = common.draw_batches(config.seed, run.step, n, T, (steps, config.batch_size))
    mine = range(world.rank, steps, world.size)
    loss = torch.zeros((), device=world.device)
    for i in mine:
        torch.manual_seed(int(seeds[i]))  # dropout
        x, y = common.get_batch(run.data.train, starts[i], T, world.device)  # (B, T), (B, T)
        # DDP averages the gradients in the last backward pass
        synchronizes = i == mine[-1] or not hasattr(forward, "no_sync")
        with nullcontext() if synchronizes else forward.no_sync(), autocast:
            part = forward(x, y) / len(mine)
            part.backward()
        loss += part.detach() / world.size
    return loss


def lr_at(config: Config, step: int) -> float:
    """The factor of the learning rates: a linear warmup, constant, a linear warmdown to zero."""
    warmup = (step + 1) / config.warmup_iters if step < config.warmup_iters else 1.0
    left, warmdown = config.max_iters - step, config.warmdown * config.max_iters
    return min(warmup, left / warmdown if left < warmdown else 1.0)


@torch.no_grad()
def evaluate(config: Config, world: World, run: Run, forward: Any, autocast: Any) -> dict[str, float]:
    """Validation loss over windows spread evenly over the split: all of it, if eval_iters is large enough."""
    tokens, T = run.data.val, run.sequence_len
    batches = common.eval_batches(len(tokens), T, config.batch_size, config.eval_iters)
    run.model.eval()
    total = 0.0
    for i in range(world.rank, math.ceil(len(batches) / world.size) * world.size, world.size):
        batch = batches[min(i, len(batches) - 1)]  # FSDP needs all processes in every forward: the last may come twice
        x, y = common.get_batch(tokens, batch, T, world.device)
        with autocast:
            loss = forward(x, y).item()
        total += loss * len(batch) * (i < len(batches))  # and counts once
    run.model.train()
    loss = world.all_reduce(total) / sum(map(len, batches))
    return {"val_loss": loss, "val_bpb": loss / math.log(2) / run.data.bytes_per_token}


def check_finite(config: Config, run: Run, finite: torch.Tensor, loss: float = 0.0) -> None:
    """RunError if the loss, or a gradient since the start, is not finite: nothing of that is saved."""
    if not (finite and math.isfinite(loss)):
        what = f"the loss at step {run.step} is {loss}"
        if math.isfinite(loss):
            what = f"a gradient at step {run.step}, or some steps before, is not finite"
        saved = Path(config.out_dir) / "ckpt.pt"
        raise RunError(f"{what}: try a lower learning_rate, or dtype=float32; {saved} is from before")


def save(config: Config, world: World, run: Run, name: str, **extra: Any) -> None:
    """Write the model into out_dir/name, and extra with it. All processes must call this."""
    extra = parallel.gather_state(extra, world.is_main)
    model = parallel.gather_model(run.model, world) if config.shard else run.model
    if world.is_main:
        train_config = config.run_settings() | asdict(run.model.config)
        train_config |= {"sequence_len": run.sequence_len, "init_from": run.init_from}
        path, tokenizer = Path(config.out_dir) / name, run.data.tokenizer.to_dict()
        with writing(path):
            model.save(path, tokenizer=tokenizer, step=run.step, train_config=train_config, **extra)


def save_state(config: Config, world: World, run: Run, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write ckpt.pt, all that it takes to resume; with keep_checkpoints also ckpt_STEP.pt, and delete the oldest."""
    for name in ["ckpt.pt"] + [f"ckpt_{run.step:08d}.pt"] * bool(config.keep_checkpoints):
        states = [optimizer.state_dict() for optimizer in optimizers]
        save(config, world, run, name, best=run.best, id=run.id, optimizers=states)
    if world.is_main and config.keep_checkpoints:
        with writing(config.out_dir):
            rundir.delete_old_states(Path(config.out_dir), run.step, config.keep_checkpoints)


# -----------------------------------------------------------------------------
# The run


def train(config: Config, world: World) -> None:
    out_dir = Path(config.out_dir)
    resumed = config.init_from == "resume" or was_restarted(config)
    begin = resume if resumed else from_scratch if config.init_from == "scratch" else finetune
    run = begin(config, world)
    with reported():
        run.data.check(run.sequence_len, run.model.config.vocab_size)

    run.model.loss = chunked_cross_entropy  # needs less memory
    checkpointing = config.activation_checkpointing
    how = (config.shard, checkpointing, config.compile, config.dtype)
    run.model, forward = parallel.wrap_model(run.model.train(), world, *how)
    autocast = parallel.make_autocast(config.dtype, world.device)
    rates = (config.learning_rate, config.embd_lr, config.head_lr, config.weight_decay, config.momentum)
    dtype = None if isinstance(autocast, nullcontext) else torch.bfloat16  # of Muon's products
    optimizers = configure_optimizers(run.model, *rates, (config.beta1, config.beta2), config.optimizer, dtype)
    if resumed:
        with reported():
            parallel.load_optimizers(optimizers, run.optimizer_states)
    run.optimizer_states = []  # frees what is now in the optimizers
    log = None
    if world.is_main:
        with reported(), writing(out_dir):
            if not resumed:
                rundir.set_aside_old_run(out_dir)
            log = Log(out_dir, config.run_settings() | asdict(run.model.config), run.step, run.id)

    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * run.sequence_len
    world.print(
        f"{run.model.num_params() / 1e6:.2f}M parameters on {world.size} x {world.device.type}, "
        f"{tokens_per_step:,} tokens a step, {len(run.data.train):,} tokens ({run.data.tokenizer.name}) to train on, "
        f"writing to {out_dir}"
    )
    loop(config, world, run, forward, optimizers, autocast, log)
    if log:
        with writing(out_dir / "loss.png"):
            log.plot()
        finish(config, run)
    world.barrier()  # a process that leaves early would break the others' connections


def loop(
    config: Config, world: World, run: Run, forward: Any, optimizers: list[Any], autocast: Any, log: Log | None
) -> None:
    """Steps until max_iters: evaluate and save; forward, backward, step; log; stop at a signal."""
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * run.sequence_len
    finite = torch.ones((), dtype=torch.bool, device=world.device)  # whether all gradients were, so far
    first_step, logged_step, started = run.step, run.step, time.perf_counter()
    with parallel.catch_signals(world) as signals:
        while True:
            step, done = run.step, run.step >= config.max_iters
            record: dict[str, Any] = {"step": step}
            evaluates = step % config.eval_interval == 0 or done
            saves = evaluates or (config.ckpt_interval and step % config.ckpt_interval == 0 and step > first_step)

            if saves:  # evaluate and save
                world.synchronize()  # what was launched before is training, and counts as that
                paused = time.perf_counter()
                if evaluates:
                    record |= evaluate(config, world, run, forward, autocast)
                check_finite(config, run, finite, record.get("val_loss", 0.0))
                if evaluates and record["val_loss"] < run.best and step > 0:
                    run.best = record["val_loss"]
                    save(config, world, run, "best.pt", val_loss=record["val_loss"], val_bpb=record["val_bpb"])
                save_state(config, world, run, optimizers)
                started += time.perf_counter() - paused

            if not done:  # forward, backward, step
                scale = lr_at(config, step)
                for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                    group["lr"] = group["initial_lr"] * scale
                loss = forward_backward(config, world, run, forward, autocast)
                norm = parallel.clip_gradient(run.model, config.grad_clip)
                finite &= norm.isfinite()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

            if not done and (step % config.log_interval == 0 or evaluates):  # log
                record["loss"] = world.all_reduce(loss.item())  # waits for the device
                check_finite(config, run, finite, record["loss"])
                seconds = time.perf_counter() - started
                record["tokens_per_second"] = (step + 1 - logged_step) * tokens_per_step / seconds
                record |= {"grad_norm": norm.item(), "lr": config.learning_rate * scale}
                logged_step, started = step + 1, time.perf_counter()
            if log and len(record) > 1:
                with writing(log.path):
                    log.write(record)
                log.show(record)

            run.step += not done
            signum = int(world.all_reduce(max(signals, default=0), dist.ReduceOp.MAX))
            if signum and not done:
                check_finite(config, run, finite)
                save_state(config, world, run, optimizers)
                world.print(f"\nstopped before step {run.step}; --init_from=resume goes on", file=sys.stderr)
            if signum:
                sys.exit(128 + signum)
            if done:
                break


def finish(config: Config, run: Run) -> None:
    """Print a sample, and where the best weights are."""
    if config.sample_tokens and not config.shard:  # one process has only a shard of the model
        print(f"\n{config.sample_prompt}", end="")
        prompt = config.sample_prompt or [run.data.tokenizer.eot]
        for text in stream_text(run.model, run.data.tokenizer, prompt, config.sample_tokens, temperature=0.8):
            print(text, end="", flush=True)
        print()
    if math.isfinite(run.best):
        best = Path(config.out_dir) / "best.pt"
        print(f"\nbest validation loss {run.best:.4f}: {best}; sample from it: python sample.py --ckpt={best}")


def main() -> None:
    config = configurator.parse(Config)
    if not config.activation_checkpointing:  # which is there to save memory
        parallel.keep_freed_memory()
    with reported():
        world = parallel.join(config.device, config.gradient_accumulation_steps, config.shard)
    try:
        lock: Any = nullcontext()
        if world.is_main:
            with reported():
                lock = rundir.reserve(Path(config.out_dir), config.init_from == "resume")
        with parallel.lost_processes(world), lock:
            train(config, world)
    except ConnectionError as e:
        raise RunError(str(e)) from e
    finally:
        parallel.leave(world)


if __name__ == "__main__":
    configurator.run(main, "a smaller batch_size, sequence_len or model, or --activation_checkpointing")

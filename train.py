"""Train a GPT: python train.py --max_iters=200

Without a config file it trains a small model, in about a minute on a laptop's CPU. config/ has others, such
as the shape of GPT-2 for a GPU: python train.py config/gpt2_124m.py

Batches, dropout and everything else that is random are functions of (seed, step). So a run that was stopped
and resumed (--init_from=resume) ends with the same weights as one that was not; on a GPU, up to rounding.
"""

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import configurator
from gpt import GPTConfig
from sologpt import errors, parallel, run
from sologpt.data import Dataset
from sologpt.device import keep_freed_memory, make_autocast
from sologpt.load import make_config
from sologpt.log import Clock, Log, flops_per_token
from sologpt.loss import chunked_cross_entropy, masked_cross_entropy
from sologpt.parallel import World
from sologpt.progress import Progress
from sologpt.quantize import KINDS
from sologpt.run import State


@dataclass
class Config:
    # ---- run
    out_dir: str = "out"  # folder for checkpoints, metrics.jsonl and loss.png
    init_from: str = "scratch"  # scratch, resume (out_dir's run), or a checkpoint, folder, hf:NAME, gguf:FILE
    eval_only: bool = False  # only compute the validation loss: train nothing, write nothing
    seed: int = 1337  # initial weights, batches and dropout follow from this number
    device: str = "auto"  # cuda, mps, cpu, ...; auto is an accelerator if there is one, else the CPU
    dtype: str = "auto"  # float32 or bfloat16 for matrix products; auto is bfloat16 on GPUs that have it
    compile: bool = False  # use torch.compile: faster steps, after a slow start
    # ---- data
    dataset: str = "stdlib"  # dataset in data/, prepared if it is missing, or the path of a prepared folder
    tokenizer: str = "stdlib"  # tokenizer of a dataset yet to be prepared: stdlib, bytes, bpe:N, gpt2, ...
    # ---- model
    model: dict = configurator.keys_of(GPTConfig, n_layer=2, n_head=2, n_embd=96, sequence_len=128)
    vocab_size: int = 0  # number of token ids; 0 means as many as the tokenizer has
    # ---- optimization
    batch_size: int = 16  # sequences, or conversations, in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in a step, over all processes
    max_iters: int = 600  # optimizer steps
    optimizer: str = "muon"  # muon or adamw (cheaper steps that learn less), for the blocks' matrices
    learning_rate: float = 0.02  # learning rate of the blocks' matrices; adamw wants a lower one
    embd_lr: float = 0.3  # learning rate of the embedding
    head_lr: float = 0.01  # learning rate of the head, gains, biases and a tied embedding
    weight_decay: float = 0.0  # weight decay of the blocks' matrices
    momentum: float = 0.9  # momentum of Muon
    beta1: float = 0.8  # decay of AdamW's first moment, the mean gradient
    beta2: float = 0.95  # decay of AdamW's second moment, the mean squared gradient
    grad_clip: float = 0.0  # clip the gradient to this norm; 0 means no clipping
    warmup_iters: int = 0  # steps in which the learning rates rise linearly from zero
    warmdown: float = 0.5  # last fraction of the steps, in which the learning rates fall linearly to zero
    # ---- LoRA
    lora_rank: int = 0  # train adapters of this rank, and leave the model's weights as they are; 0 is off
    lora_alpha: float = 32.0  # an adapter is scaled by lora_alpha / lora_rank
    lora_targets: str = "attn,mlp"  # what gets an adapter: attn, mlp, or single matrices such as attn.c_q
    quantize: str = ""  # int8 or int4 for the weights under the adapters, on the CPU: less memory
    # ---- evaluation
    eval_interval: int = 200  # steps between evaluations; there is one more at the end
    eval_iters: int = 64  # batches in an evaluation, spread evenly over the validation split
    sample_prompt: str = "def __init__(self"  # text that the sample at the end of training continues
    sample_tokens: int = 180  # tokens in the sample at the end of training; 0 means no sample
    # ---- checkpoints
    ckpt_interval: int = 0  # steps between checkpoints; 0 means only at evaluations
    keep_checkpoints: int = 0  # number of last states to keep, as ckpt_STEP.pt
    # ---- processes
    shard: bool = False  # shard weights and optimizer state over the processes of torchrun (FSDP2)
    activation_checkpointing: bool = False  # save memory: compute activations again in the backward pass
    # ---- logging
    log_interval: int = 10  # steps between lines of metrics, on the terminal and in metrics.jsonl
    wandb_log: bool = False  # send the metrics to Weights & Biases too (extra 'wandb')
    wandb_project: str = "sologpt"  # project on Weights & Biases
    wandb_run_name: str = ""  # name of the run on Weights & Biases; empty means that of out_dir
    tensorboard: bool = False  # write the metrics to out_dir/tensorboard too (extra 'tensorboard')

    def __post_init__(self) -> None:
        if self.init_from == "scratch":  # otherwise the checkpoint gives the shape
            make_config(self.model | {"vocab_size": self.vocab_size or 1})
        for names, least, below in (
            ("batch_size gradient_accumulation_steps eval_interval eval_iters log_interval", 1, math.inf),
            ("max_iters warmup_iters sample_tokens ckpt_interval keep_checkpoints lora_rank", 0, math.inf),
            ("learning_rate embd_lr head_lr grad_clip weight_decay lora_alpha", 0, 1e38),
            ("momentum beta1 beta2", 0, 1),
            ("seed", 0, 2**62),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not least <= value < below:
                    raise ValueError(f"{name} must be at least {least} and below {below}, not {value}")
        if not 0 <= self.warmdown <= 1:
            raise ValueError(f"warmdown must be a fraction from 0 to 1, not {self.warmdown}")
        dtypes, optimizers = ("float32", "bfloat16", "auto"), ("muon", "adamw")
        for name, choices in (("dtype", dtypes), ("optimizer", optimizers), ("quantize", ("", *KINDS))):
            if getattr(self, name) not in choices:
                known = " or ".join(filter(None, choices))
                raise ValueError(f"{name} must be {known}, not {getattr(self, name)!r}")
        if self.quantize and not self.lora_rank:
            raise ValueError("quantized weights cannot be trained: quantize needs adapters, lora_rank=16")
        if self.lora_rank and self.init_from == "scratch":
            raise ValueError("lora_rank needs a model to adapt: init_from must be hf:NAME or a checkpoint")


@dataclass
class Trainer:
    """What a step needs that is not saved. For what is saved, see `State`."""

    config: Config
    world: World
    dataset: Dataset
    train: Any  # its batches: `data.Windows` or `data.Conversations`
    val: Any
    forward: Any  # the model, wrapped and compiled: (idx, targets, loss_reduction) -> loss
    autocast: AbstractContextManager  # for forward
    progress: Progress
    log: Log | None = None  # of the main process
    n_tokens: int = 0  # trained on so far, by all processes


def lr_at(config: Config, step: int) -> float:
    """Return the factor of all learning rates: a linear warmup, constant, a linear warmdown to zero."""
    factor = 1.0
    if step < config.warmup_iters:
        factor = (step + 1) / config.warmup_iters
    left = config.max_iters - step
    warmdown = config.warmdown * config.max_iters
    if left < warmdown:
        factor = min(factor, left / warmdown)
    return factor


def forward_backward(trainer: Trainer, state: State) -> Tensor:
    """Accumulate the gradient of the mean loss over all trained tokens. Return this process's part of it."""
    config, world, train = trainer.config, trainer.world, trainer.train
    n = config.gradient_accumulation_steps
    batches, seeds = train.draw(config.seed, state.step, n, config.batch_size)
    n_targets = sum(map(train.n_targets, batches))  # of all processes
    trainer.n_tokens += sum(map(train.n_tokens, batches))
    mine = range(world.rank, n, world.size)
    loss_sum = torch.zeros((), device=world.device)
    for i in mine:
        trainer.progress.status(state.step, "training", f"{i + 1}/{n}" if n > 1 else "")
        torch.manual_seed(int(seeds[i]))  # dropout
        x, y = train.get(batches[i], world.device)  # (B, T), (B, T)
        with parallel.gradient_sync(trainer.forward, last=i == mine[-1]):
            with trainer.autocast:
                loss = trainer.forward(x, y, loss_reduction="sum") / n_targets
            (loss * world.size).backward()  # the gradients of the processes are averaged
        loss_sum += loss.detach()
    return loss_sum


@torch.no_grad()
def evaluate(trainer: Trainer, state: State, received: Callable[[], int]) -> dict[str, float]:
    """Return the validation loss, over batches spread evenly over the split; nothing if a signal comes."""
    config, world, val = trainer.config, trainer.world, trainer.val
    batches = val.spread(config.eval_iters, config.batch_size)
    total = 0.0
    state.model.eval()
    for i in range(world.rank, math.ceil(len(batches) / world.size) * world.size, world.size):
        trainer.progress.status(state.step, "evaluating", f"{i}/{len(batches)}")
        if received():
            return {}
        batch = batches[min(i, len(batches) - 1)]  # FSDP needs all processes: the last batch may come twice
        x, y = val.get(batch, world.device)
        with trainer.autocast:
            loss = trainer.forward(x, y, loss_reduction="sum").item()
        if i < len(batches):  # and counts once
            total += loss
    state.model.train()
    val_loss = world.all_reduce(total) / sum(map(val.n_targets, batches))
    return {"val_loss": val_loss, "val_bpb": val_loss / math.log(2) / trainer.dataset.bytes_per_token}


def loop(trainer: Trainer, state: State) -> None:
    """Train until max_iters, or until a signal: then exit with its status."""
    config, world, log, progress = trainer.config, trainer.world, trainer.log, trainer.progress
    clock = Clock(flops_per_token(state.model, state.sequence_len), world, config.compile)
    finite = torch.ones((), dtype=torch.bool, device=world.device)  # whether all gradients so far were
    with parallel.catch_signals(world) as received:
        while True:
            step = state.step
            done = step >= config.max_iters
            evaluates = done or step % config.eval_interval == 0
            saves = evaluates or (config.ckpt_interval > 0 and step % config.ckpt_interval == 0)
            record: dict[str, Any] = {"step": step}

            # 1. Evaluate, save, maybe leave
            if saves:
                world.synchronize()  # count kernels already launched as training time
            with clock.paused():
                if evaluates:
                    record |= evaluate(trainer, state, received)
                    if log and "val_loss" in record and not done:
                        progress.sample = run.sample_lines(config, state, trainer.val)
                signum = received()
                if saves or signum:
                    run.check_finite(config, step, finite, record.get("val_loss", 0.0))
                    run.save(config, world, state, record)
            if done or signum:
                break

            # 2. Gradients. The batches are a function of (seed, step)
            loss = forward_backward(trainer, state)
            norm = parallel.clip_gradient(state.model, config.grad_clip)
            finite &= norm.isfinite()

            # 3. Update
            factor = lr_at(config, step)
            for optimizer in state.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            state.step += 1

            # 4. Log
            if evaluates or step % config.log_interval == 0:
                record["loss"] = world.all_reduce(loss.item())  # waits for the device
                run.check_finite(config, step, finite, record["loss"])
                rate = config.learning_rate * factor
                record |= clock.speed(trainer.n_tokens) | {"grad_norm": norm.item(), "lr": rate}
                if log:
                    log.write(record)
                progress.show(record)
    if signum:
        progress.close()
        hint = "the same command with --init_from=resume goes on"
        world.print(f"stopped before step {step}; {hint}", sys.stderr)
        sys.exit(128 + signum)
    if log:
        log.write(record)  # the last evaluation
    progress.show(record)


def train(config: Config, world: World) -> None:
    """Begin, train, and show what came out."""
    state, dataset = run.begin(config, world)
    dataset.check(state.sequence_len, state.model.config.vocab_size)
    train, val = (dataset.batches(split, state.sequence_len) for split in ("train", "val"))
    state.model.loss = masked_cross_entropy if dataset.rows else chunked_cross_entropy  # takes less memory
    # LoRA needs no autocast: its frozen weights are in config.dtype, and activations follow
    dtype = "float32" if config.lora_rank else config.dtype
    state.model, forward = parallel.wrap_model(
        state.model.train(),
        world,
        shard=config.shard,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        dtype=dtype,
    )
    progress = Progress(config, state.step, world.is_main)
    autocast = make_autocast(dtype, world.device)
    trainer = Trainer(config, world, dataset, train, val, forward, autocast, progress)
    world.print(run.describe(config, world, state, train))
    if config.eval_only:
        record = evaluate(trainer, state, lambda: 0)
        progress.line(f"val loss {record['val_loss']:.4f}, {record['val_bpb']:.4f} bits/byte")
        return
    run.make_optimizers(config, state, world)
    if world.is_main:
        trainer.log = run.open_log(config, state)
    try:
        loop(trainer, state)
    finally:
        progress.close()
    if trainer.log:
        run.print_end(config, state, dataset, trainer.log)


def main() -> None:
    config = configurator.parse(Config)
    keep_freed_memory(below=2**22 if config.activation_checkpointing or config.lora_rank else 0)
    world = parallel.join(config.device, config.shard)
    try:
        run.share_micro_batches(config, world)
        lock: Any = nullcontext()
        if world.is_main and not config.eval_only:
            lock = run.reserve(Path(config.out_dir), resumes=config.init_from == "resume")
        with parallel.lost_processes(world), lock:
            train(config, world)
            world.barrier()  # a process that leaves early would break the others' connections
    finally:
        parallel.leave(world)


if __name__ == "__main__":
    errors.run(main, "a smaller batch_size, sequence_len or model, or --activation_checkpointing")

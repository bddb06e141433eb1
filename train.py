"""Train a GPT: python train.py config/tiny.py --max_iters=200

Without a config file, a laptop or a CPU trains the small model of config/tiny.py, unless the command names its size.
The defaults below are for the size of GPT-2.

Batches, dropout and everything else that is random are functions of (seed, step). So a run that was stopped and resumed
(--init_from=resume) ends with the same weights as one that was not; on a GPU up to rounding.
"""

import math
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import configurator
from configurator import RunError, reported, writing
from data import common
from gpt import GPT, GPTConfig
from sologpt import parallel, rundir
from sologpt.load import load_model
from sologpt.log import Log, Progress
from sologpt.loss import chunked_cross_entropy
from sologpt.optim import configure_optimizers
from sologpt.parallel import World
from sologpt.text import stream_text


@dataclass
class Config:
    # ---- run
    out_dir: str = "out"  # Checkpoints, metrics.jsonl and loss.png are written to this folder.
    init_from: str = "scratch"  # Training begins from scratch, resume (out_dir), a checkpoint, hf:NAME or gguf:FILE.
    eval_only: bool = False  # The validation loss is computed once; nothing is trained or written.
    seed: int = 1337  # The initial weights, the batches and dropout follow from this number.
    device: str = "auto"  # It runs on cuda, mps, cpu, ...; auto is an accelerator if there is one, else the CPU.
    dtype: str = "auto"  # Matrix products are in float32 or bfloat16; auto is bfloat16 on GPUs that have it.
    compile: bool = False  # torch.compile makes the steps faster, after a slow start.
    # ---- data
    dataset: str = "stdlib"  # The text is this dataset of data/, prepared if it is missing, or a prepared folder.
    tokenizer: str = "bytes"  # A missing dataset is prepared with this tokenizer: bytes, bpe:N, gpt2, ...
    # ---- model
    model: dict = configurator.keys_of(GPTConfig)
    vocab_size: int = 0  # The model knows this many token ids; 0 means as many as the tokenizer has.
    # ---- optimization
    batch_size: int = 12  # A micro-batch has this many sequences.
    gradient_accumulation_steps: int = 1  # A step has this many micro-batches, over all processes together.
    max_iters: int = 5000  # Training takes this many optimizer steps.
    optimizer: str = "muon"  # The blocks' matrices are trained by muon, or by adamw: cheaper steps, lower rates.
    learning_rate: float = 0.02  # The blocks' matrices are trained at this learning rate.
    embd_lr: float = 0.3  # AdamW trains the embedding at this learning rate.
    head_lr: float = 0.004  # AdamW trains the head, gains, biases and a tied embedding at this learning rate.
    weight_decay: float = 0.0  # The blocks' matrices are trained with this weight decay.
    momentum: float = 0.95  # Muon averages the gradients with this momentum.
    beta1: float = 0.8  # AdamW's mean gradient decays by this factor at each step.
    beta2: float = 0.95  # AdamW's mean squared gradient decays by this factor at each step.
    grad_clip: float = 0.0  # The norm of the gradient is clipped to this; 0 switches it off.
    warmup_iters: int = 0  # The learning rates rise linearly from zero in this many steps.
    warmdown: float = 0.4  # The learning rates fall linearly to zero in this last fraction of the steps.
    # ---- evaluation
    eval_interval: int = 250  # The validation loss is computed every so many steps, and at the end.
    eval_iters: int = 100  # An evaluation takes this many batches, spread evenly over the validation split.
    sample_prompt: str = "\n"  # The sample at the end of training continues this text.
    sample_tokens: int = 300  # The sample at the end of training has this many tokens; 0 means no sample.
    # ---- checkpoints
    ckpt_interval: int = 0  # A checkpoint is saved every so many steps too, not only at evaluations; 0 means no.
    keep_checkpoints: int = 0  # This many of the last states are kept, as ckpt_STEP.pt.
    # ---- processes
    shard: bool = False  # Under torchrun, weights and optimizer state are sharded over the processes (FSDP2).
    activation_checkpointing: bool = False  # The backward pass computes activations again, which saves memory.
    # ---- logging
    log_interval: int = 10  # The metrics are logged every so many steps, on the terminal and in metrics.jsonl.
    wandb_log: bool = False  # The metrics also go to Weights & Biases (extra 'wandb').
    wandb_project: str = "sologpt"  # The run belongs to this project on Weights & Biases.
    wandb_run_name: str = ""  # The run has this name on Weights & Biases; empty means the name of out_dir.
    tensorboard: bool = False  # The metrics also go to out_dir/tensorboard, for TensorBoard (extra 'tensorboard').

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
        """What a checkpoint notes, and what a resumed run may change: all but how it begins and the model's shape."""
        return {k: v for k, v in asdict(self).items() if k not in ("model", "vocab_size", "init_from", "eval_only")}


# -----------------------------------------------------------------------------
# Three ways to begin. They raise ValueError, OSError or ImportError for the user's mistakes, RuntimeError for failures


@dataclass
class Run:
    """What a step changes and a checkpoint restores; from `forward` on, what `train` adds to compute it."""

    model: GPT
    data: common.Dataset
    sequence_len: int  # tokens in a training sequence; a fine-tuned model may have been made for more
    init_from: str
    step: int = 0  # the next one
    best: float = math.inf  # lowest validation loss
    id: str = field(default_factory=lambda: secrets.token_hex(4))  # known to the logging services
    optimizer_states: list[dict[str, Any]] = field(default_factory=list)

    forward: Any = None  # the model, wrapped and compiled
    autocast: Any = None  # the context of its forward
    optimizers: list[Any] = field(default_factory=list)
    progress: Any = None  # the line on the terminal


def from_scratch(config: Config, world: World) -> Run:
    data = common.open_dataset(config.dataset, config.tokenizer, world)
    shape = GPTConfig(**config.model | {"vocab_size": config.vocab_size or data.tokenizer.vocab_size})
    parallel.check_memory(shape, config.batch_size * shape.sequence_len)
    torch.manual_seed(config.seed)
    model = GPT(shape)
    return Run(model, data, model.config.sequence_len, config.init_from)


def finetune(config: Config, world: World) -> Run:
    """From the weights, the shape and the tokenizer of a checkpoint or an open model."""
    model, tokenizer, _ = load_model(config.init_from, dtype=torch.float32)  # small steps vanish in bfloat16
    sequence_len = min(config.model.get("sequence_len", GPTConfig.sequence_len), model.config.sequence_len)
    dropout = config.model.get("dropout", GPTConfig.dropout)  # of this run, not of the one before
    check_shape(config, asdict(model.config) | {"sequence_len": sequence_len, "dropout": dropout}, config.init_from)
    data = common.open_dataset(config.dataset, tokenizer.to_dict(), world)
    model.config.dropout = dropout
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return Run(model, data, sequence_len, config.init_from)


def resume(config: Config, world: World) -> Run:
    """From the state in out_dir/ckpt.pt. Another schedule, batch or dataset is allowed and printed."""
    path = Path(config.out_dir) / "ckpt.pt"
    model, tokenizer, state = load_model(path, dtype=torch.float32)
    rundir.check_state(path, state)
    before = state["train_config"]
    check_shape(config, asdict(model.config) | {"sequence_len": before["sequence_len"]}, str(path))
    if before.get("optimizer", config.optimizer) != config.optimizer:
        raise ValueError(f"{path} was not trained with optimizer={config.optimizer}; to fine-tune: --init_from={path}")
    data = common.open_dataset(config.dataset, tokenizer.to_dict(), world)
    changes = [f"; {k} is {v}, was {before[k]}" for k, v in config.run_settings().items() if v != before.get(k, v)]
    world.print(f"resumed at step {state['step']}" + "".join(changes))
    progress = (state["step"], state["best"], state["id"], state["optimizers"])
    return Run(model, data, before["sequence_len"], before["init_from"], *progress)


def check_shape(config: Config, shape: dict[str, Any], source: str) -> None:
    """ValueError if the config asks for another model than the source's, whose config is shape."""
    asked = config.model | ({"vocab_size": config.vocab_size} if config.vocab_size else {})
    wanted = asdict(GPTConfig(**shape | asked))
    if changed := [key for key in wanted if wanted[key] != shape[key]]:
        have = ", ".join(f"{key}={shape[key]}, not {wanted[key]}" for key in changed)
        raise ValueError(f"{source} has {have}, and the model's shape comes from there")


# -----------------------------------------------------------------------------
# The parts of a step


def forward_backward(config: Config, world: World, run: Run) -> torch.Tensor:
    """Gradients of this process's micro-batches, averaged over all processes. Returns its share of the loss."""
    n, T, steps = len(run.data.train), run.sequence_len, config.gradient_accumulation_steps
    starts, seeds = common.draw_batches(config.seed, run.step, n, T, (steps, config.batch_size))
    mine = range(world.rank, steps, world.size)
    loss = torch.zeros((), device=world.device)
    for i in mine:
        torch.manual_seed(int(seeds[i]))  # dropout
        x, y = common.get_batch(run.data.train, starts[i], T, world.device)  # (B, T), (B, T)
        # DDP averages the gradients in the last backward pass
        synchronizes = i == mine[-1] or not hasattr(run.forward, "no_sync")
        with nullcontext() if synchronizes else run.forward.no_sync(), run.autocast:
            part = run.forward(x, y) / len(mine)
            part.backward()
        loss += part.detach() / world.size
    return loss


def lr_at(config: Config, step: int) -> float:
    """The factor of the learning rates: a linear warmup, constant, a linear warmdown to zero."""
    warmup = (step + 1) / config.warmup_iters if step < config.warmup_iters else 1.0
    left, warmdown = config.max_iters - step, config.warmdown * config.max_iters
    return min(warmup, left / warmdown if left < warmdown else 1.0)


@torch.no_grad()
def evaluate(config: Config, world: World, run: Run, received: Callable[[], int]) -> dict[str, float]:
    """Validation loss over windows spread evenly over the split; nothing if a signal is received meanwhile."""
    tokens, T = run.data.val, run.sequence_len
    batches = common.eval_batches(len(tokens), T, config.batch_size, config.eval_iters)
    run.model.eval()
    total, signum = 0.0, 0
    for i in range(world.rank, math.ceil(len(batches) / world.size) * world.size, world.size):
        run.progress.status(run.step, "evaluating", f"{i}/{len(batches)}")
        if signum := received():
            break
        batch = batches[min(i, len(batches) - 1)]  # FSDP needs all processes in every forward: the last may come twice
        x, y = common.get_batch(tokens, batch, T, world.device)
        with run.autocast:
            loss = run.forward(x, y).item()
        total += loss * len(batch) * (i < len(batches))  # and counts once
    run.model.train()
    loss = world.all_reduce(total) / sum(map(len, batches))
    return {} if signum else {"val_loss": loss, "val_bpb": loss / math.log(2) / run.data.bytes_per_token}


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


def save_state(config: Config, world: World, run: Run) -> None:
    """Write ckpt.pt, all that it takes to resume; with keep_checkpoints also ckpt_STEP.pt, and delete the oldest."""
    for name in ["ckpt.pt"] + [f"ckpt_{run.step:08d}.pt"] * bool(config.keep_checkpoints):
        states = [optimizer.state_dict() for optimizer in run.optimizers]
        save(config, world, run, name, best=run.best, id=run.id, optimizers=states)
    if world.is_main and config.keep_checkpoints:
        with writing(config.out_dir):
            rundir.delete_old_states(Path(config.out_dir), run.step, config.keep_checkpoints)


# -----------------------------------------------------------------------------
# The run


def train(config: Config, world: World) -> None:
    out_dir = Path(config.out_dir)
    with reported():
        restarted = parallel.n_restarts() and rundir.holds_state(out_dir, config.run_settings())
        resumed = config.init_from == "resume" or restarted
        begin = resume if resumed else from_scratch if config.init_from == "scratch" else finetune
        run = begin(config, world)
        run.data.check(run.sequence_len, run.model.config.vocab_size)

    run.model.loss = chunked_cross_entropy  # needs less memory
    how = (config.shard, config.activation_checkpointing, config.compile, config.dtype)
    run.model, run.forward = parallel.wrap_model(run.model.train(), world, *how)
    run.autocast = parallel.make_autocast(config.dtype, world.device)
    run.progress = Progress(run.step, config.max_iters, world.is_main, config.compile)
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * run.sequence_len
    world.print(
        f"{run.model.num_params() / 1e6:.2f}M parameters on {world}, {tokens_per_step:,} tokens a step, "
        f"{len(run.data.train):,} to train on (tokenizer: {run.data.tokenizer.name}), "
        f"writing to {'nothing' if config.eval_only else out_dir}"
    )
    if config.eval_only:
        run.progress.show({"step": run.step} | evaluate(config, world, run, lambda: 0))
        return
    rates = (config.learning_rate, config.embd_lr, config.head_lr, config.weight_decay, config.momentum)
    dtype = None if isinstance(run.autocast, nullcontext) else torch.bfloat16  # of Muon's products
    run.optimizers = configure_optimizers(run.model, *rates, (config.beta1, config.beta2), config.optimizer, dtype)
    if resumed:
        with reported():
            parallel.load_optimizers(run.optimizers, run.optimizer_states)
    run.optimizer_states = []  # frees what is now in the optimizers
    log = None
    if world.is_main:
        with reported(), writing(out_dir):
            if not resumed:
                rundir.set_aside_old_run(out_dir)
            log = Log(out_dir, config.run_settings() | asdict(run.model.config), run.step, run.id)
    try:
        loop(config, world, run, log)
    finally:
        run.progress.close()
    if log:
        with writing(out_dir / "loss.png"):
            log.plot()
        finish(config, run)


def loop(config: Config, world: World, run: Run, log: Log | None) -> None:
    """Steps until max_iters: evaluate and save; stop at a signal; forward, backward, step; log."""
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * run.sequence_len
    finite = torch.ones((), dtype=torch.bool, device=world.device)  # whether all gradients were, so far
    first_step, logged_step, started = run.step, run.step, time.perf_counter()
    with parallel.catch_signals(world) as received:
        while True:
            step, done = run.step, run.step >= config.max_iters
            record: dict[str, Any] = {"step": step}
            evaluates = step % config.eval_interval == 0 or done
            saves = evaluates or (config.ckpt_interval and step % config.ckpt_interval == 0 and step > first_step)

            if saves:  # evaluate
                world.synchronize()  # what was launched before is training, and counts as that
            paused = time.perf_counter()
            if evaluates:
                record |= evaluate(config, world, run, received)
            signum = received()
            if saves or signum:  # save
                check_finite(config, run, finite, record.get("val_loss", 0.0))
                if record.get("val_loss", math.inf) < run.best and step > 0:
                    run.best = record["val_loss"]
                    save(config, world, run, "best.pt", val_loss=record["val_loss"], val_bpb=record["val_bpb"])
                save_state(config, world, run)
            if signum:
                run.progress.close()
                world.print(f"stopped before step {step}; the same command with --init_from=resume goes on", sys.stderr)
                sys.exit(128 + signum)
            started += time.perf_counter() - paused

            if not done:  # forward, backward, step
                run.progress.status(step, "training")
                scale = lr_at(config, step)
                for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
                    group["lr"] = group["initial_lr"] * scale
                loss = forward_backward(config, world, run)
                norm = parallel.clip_gradient(run.model, config.grad_clip)
                finite &= norm.isfinite()
                for optimizer in run.optimizers:
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
                run.progress.show(record)
            if done:
                break
            run.step += 1


def finish(config: Config, run: Run) -> None:
    """Print a sample, and what to type for others."""
    if config.sample_tokens and not config.shard:  # one process has only a shard of the model
        print(f"\n{config.sample_prompt}", end="")
        prompt = config.sample_prompt or [run.data.tokenizer.eot]
        for text in stream_text(run.model, run.data.tokenizer, prompt, config.sample_tokens, temperature=0.8):
            print(text, end="", flush=True)
        print()
    if math.isfinite(run.best):
        best = Path(config.out_dir) / "best.pt"
        command = rundir.sample_command(best, config.sample_prompt)
        print(f"\nbest validation loss {run.best:.4f}: {best}; to sample from it:\n{command}")


def suit(config: Config, world: World) -> Config:
    """The config as it is for these processes. What it changes, it prints."""
    sized = any(arg.endswith(".py") for arg in sys.argv[1:]) or {"n_layer", "n_embd"} & config.model.keys()
    if not sized and config.init_from in ("scratch", "resume") and world.device.type in ("cpu", "mps"):
        tiny = configurator.parse(Config, [str(Path(__file__).with_name("config") / "tiny.py"), *sys.argv[1:]])
        config = replace(tiny, model=tiny.model if config.init_from == "scratch" else config.model)
        world.print("no config file: taking config/tiny.py, a small model; for the shape of GPT-2, add --n_layer=12")
    steps = config.gradient_accumulation_steps
    if rest := -steps % world.size:
        config = replace(config, gradient_accumulation_steps=steps + rest)
        world.print(f"gradient_accumulation_steps is {steps + rest}, not {steps}: a multiple of {world.size} processes")
    return config


def main() -> None:
    config = configurator.parse(Config)
    if not config.activation_checkpointing:  # which is there to save memory
        parallel.keep_freed_memory()
    with reported():
        world = parallel.join(config.device, config.shard)
    try:
        config = suit(config, world)
        writes = world.is_main and not config.eval_only
        with reported():
            lock: Any = rundir.reserve(Path(config.out_dir), config.init_from == "resume") if writes else nullcontext()
        with parallel.lost_processes(world), lock:
            train(config, world)
            world.barrier()  # a process that leaves early would break the others' connections
    except ConnectionError as e:
        raise RunError(str(e)) from e
    finally:
        parallel.leave(world)


if __name__ == "__main__":
    configurator.run(main, "a smaller batch_size, sequence_len or model, or --activation_checkpointing")

"""The processes that share a training run: one, or as many as torchrun starts.

Each process computes some of a step's micro-batches. DDP averages the gradients; with `shard`, FSDP2 also spreads
weights and optimizer state over the processes. A checkpoint holds whole tensors either way, so any number of processes
can resume from it. Processes talk by gloo, and by nccl between CUDA devices.
"""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt import GPT, GPTConfig
from sologpt import fast
from sologpt.load import multiplies_bfloat16, pick_device
from sologpt.optim import Muon


@dataclass(frozen=True)
class World:
    """This process among all of a run: its rank, its rank on this machine, how many there are, and its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    def __str__(self) -> str:
        return self.device.type if self.size == 1 else f"{self.size} x {self.device.type}"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def print(self, text: str, file: Any = None) -> None:
        if self.is_main:
            print(text, file=file, flush=True)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def all_reduce(self, value: float, op: Any = dist.ReduceOp.SUM) -> float:
        """The sum of the values of all processes, or what op makes of them."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, op)
        return shared.item()

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def join(device_name: str, shard: bool) -> World:
    """Meet the other processes, if torchrun has started any. ValueError for what they cannot share."""
    rank, local_rank, size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = pick_device(device_name)
    if size < 2 and shard:
        raise ValueError("--shard needs several processes: torchrun --nproc_per_node=N train.py ...")
    if device.type == "cuda":
        if size > 1:
            here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
            if here > gpus:
                raise ValueError(f"{here} processes cannot share {gpus} GPUs: start one for each, or use --device=cpu")
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device.index or 0)  # otherwise pinned memory would also take some of the first GPU
    if size < 2:
        return World(0, 0, 1, device)
    # torchrun keeps the store across restarts; the prefix hides the addresses of the processes that have died
    store = dist.PrefixStore(f"restart {n_restarts()}", next(dist.rendezvous("env://"))[0])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, local_rank, size, device)


def leave(world: World) -> None:
    if world.size > 1:
        gc.collect()  # DDP is full of reference cycles, and its threads must end before the interpreter does
        dist.destroy_process_group()


def n_restarts() -> int:
    """How often torchrun has restarted this run after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextmanager
def lost_processes(world: World) -> Iterator[None]:
    """ConnectionError if the other processes disappear in here."""
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or "gloo" in str(e):  # gloo's errors have no class of their own
            raise ConnectionError(f"process {world.rank} has lost the others: one of them has failed") from e
        raise


def wrap_model(
    model: GPT,
    world: World,
    shard: bool = False,
    activation_checkpointing: bool = False,
    compile: bool = False,
    dtype: str = "float32",
) -> tuple[GPT, Any]:
    """The model on its device (its shards on theirs), and the callable that computes the loss in its place.

    activation_checkpointing keeps only the inputs of the blocks for the backward pass, which computes the rest again.
    dtype is that of the autocast in which the callable will run: see `make_autocast`.
    """
    if activation_checkpointing:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for i, block in enumerate(model.h):
            model.h[i] = checkpoint_wrapper(block)
    if shard:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = dist.init_device_mesh(world.device.type, (world.size,))
        # Autocast would keep a bfloat16 copy of every gathered weight until the backward pass. So FSDP gathers a
        # block's weights in bfloat16. What is between the products, and embedding, head and gradients stay in float32.
        policy = MixedPrecisionPolicy(autocast_dtype(dtype, world.device), torch.float32, cast_forward_inputs=False)
        for block in model.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
    else:
        model = model.to(world.device)
    forward: Any = model
    if world.size > 1 and not shard:
        forward = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if compile:
        fast.compile_rotate()
        forward = torch.compile(forward)
    return model, forward


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of matrix products. "auto" is bfloat16 on a CUDA device that has it, else float32."""
    return getattr(torch, name if name != "auto" else "bfloat16" if multiplies_bfloat16(device) else "float32")


def make_autocast(name: str, device: torch.device) -> AbstractContextManager:
    """A context in which matrix products have this precision: see `autocast_dtype`."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32; it would slow a CPU down
    dtype = autocast_dtype(name, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def clip_gradient(model: GPT, max_norm: float) -> torch.Tensor:
    """Clip the gradient to max_norm, if that is not 0. Returns its norm before."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = getattr(norm, "full_tensor", lambda: norm)()  # of shards
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


# -----------------------------------------------------------------------------
# State: whole tensors in a checkpoint, shards in the processes.
# torch.distributed.checkpoint.state_dict could do this, but takes half as long to import as PyTorch itself, and to read
# the state of an optimizer that has made no step yet it makes one, which AdamW counts.


def gather_state(state: Any, keep: bool) -> Any:
    """A state (nested dicts and lists of tensors) with its shards gathered on the CPU. All processes must call this.

    Where keep is false, shards become None.
    """
    if isinstance(state, dict):
        return {key: gather_state(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gather_state(value, keep) for value in state]
    if hasattr(state, "full_tensor"):
        full = state.full_tensor()
        return full.cpu() if keep else None
    return state


def gather_model(model: GPT, world: World) -> GPT:
    """The whole model on the main process. All processes must call this."""
    state = gather_state(model.state_dict(), world.is_main)
    with torch.device("meta"):
        whole = GPT(model.config)
    if world.is_main:
        whole.load_state_dict(state, assign=True)
    return whole


def load_optimizers(optimizers: list[torch.optim.Optimizer], states: list[dict[str, Any]]) -> None:
    """Load the whole tensors of a checkpoint into optimizers, sharded as their parameters are.

    Only the states per parameter are loaded. Rates and other settings stay those of this run. RuntimeError if these are
    not the states of such optimizers.
    """
    if len(optimizers) != len(states) or not all(map(fits, optimizers, states)):
        raise RuntimeError("the checkpoint is damaged: its optimizer states do not fit this model")
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
        p: Any
        for p, values in optimizer.state.items():
            for name, value in values.items():
                if hasattr(p, "placements") and value.shape == p.shape:
                    from torch.distributed.tensor import distribute_tensor

                    values[name] = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def fits(optimizer: torch.optim.Optimizer, state: Any) -> bool:
    """Whether a state has the tensors of each parameter, or is that of an optimizer that has made no step yet."""
    names = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def fits_parameter(p: Tensor, values: Any) -> bool:
        tensors = isinstance(values, dict) and values.keys() == names and all(map(torch.is_tensor, values.values()))
        return tensors and all(x.shape == (() if name == "step" else p.shape) for name, x in values.items())

    states = state.get("state") if isinstance(state, dict) else None
    return states == {} or (
        isinstance(states, dict)
        and states.keys() == {*range(len(params))}
        and all(fits_parameter(p, states[i]) for i, p in enumerate(params))
    )


# -----------------------------------------------------------------------------
# The operating system


@contextmanager
def catch_signals(world: World) -> Iterator[Callable[[], int]]:
    """In here, a first Ctrl-C or SIGTERM only says what will happen. A second one ends a single process at once.

    Yields a function that returns the number of the signal that any process has received, or 0. All processes must call
    it together.
    """
    signals: list[int] = []

    def catch(signum: int, _: Any) -> None:
        signals.append(signum)
        name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        line = f"{name}: stops after this step and saves"
        if world.size == 1:  # torchrun repeats the signals that a terminal has already sent to all processes
            signal.signal(signum, signal.SIG_DFL)
            line += "; a second one stops at once, and loses the steps since the last checkpoint"
        if world.is_main and len(signals) == 1:
            with suppress(OSError):
                os.write(2, f"\n{line}\n".encode())  # print may not be called while the step prints

    def received() -> int:
        return int(world.all_reduce(max(signals, default=0), dist.ReduceOp.MAX))

    handlers = {signum: signal.signal(signum, catch) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def check_memory(config: GPTConfig, tokens: int) -> None:
    """MemoryError if the weights and the first activations of a micro-batch, in float32, do not fit into the machine.

    Linux grants them, and then kills the process.
    """
    H, G, D = config.heads
    rows = config.vocab_size + tokens + config.n_layer * 2 * (H * D + G * D + (config.n_hidden or 0))
    needed = 4 * config.n_embd * rows
    if sys.platform != "win32" and needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise MemoryError


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation, where it would return large tensors to the kernel.

    The kernel hands such memory out again page by page, zeroed. On a CPU that took a quarter of a training step of a
    124M model.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        with suppress(AttributeError):  # musl has no mallopt
            libc.mallopt(-4, 0)  # M_MMAP_MAX: do not serve large allocations by mmap
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep this much unused memory at the end of the heap

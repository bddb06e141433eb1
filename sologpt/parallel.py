"""The processes that share a training run: one, or as many as torchrun starts.

Each process computes some of a step's micro-batches. DDP averages the gradients. With `shard`, FSDP2 also
shards weights and optimizer state over the processes. A checkpoint holds whole tensors either way, so any
number of processes can resume from it. The backend is gloo, and nccl between CUDA devices.
"""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt import GPT
from sologpt.device import autocast_dtype, pick_device
from sologpt.errors import RunError, UserError
from sologpt.graphs import compile_rotate
from sologpt.load import is_plain
from sologpt.loss import trains_head
from sologpt.optim import Muon
from sologpt.quantize import QuantizedLinear, WidenedLinear


@dataclass(frozen=True)
class World:
    """This process among all of a run: its rank, its rank on this machine, their number, and its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    def __str__(self) -> str:
        return self.device.type if self.size == 1 else f"{self.size} x {self.device.type}"

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def print(self, text: str, file: Any = None) -> None:
        if self.is_main:
            print(text, file=file, flush=True)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def all_reduce(self, value: float, op: Any = dist.ReduceOp.SUM) -> float:
        """Return the sum of the values of all processes, or what op makes of them."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, op)
        return shared.item()

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


# -----------------------------------------------------------------------------
# Processes come and go


def join(device_name: str, shard: bool) -> World:
    """Meet the other processes, if torchrun has started any. UserError if they cannot share what is here."""
    rank, local_rank, size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = pick_device(device_name)
    if size < 2 and shard:
        raise UserError("--shard needs several processes: torchrun --nproc_per_node=N train.py ...")
    if device.type == "cuda":
        if size > 1:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
            gpus = torch.cuda.device_count()
            if here > gpus:
                hint = "start one for each, or use --device=cpu"
                raise UserError(f"{here} processes cannot share {gpus} GPUs: {hint}")
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device.index or 0)  # else pinned memory would also take some of the first GPU
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
    """Return how often torchrun has restarted this run after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextmanager
def lost_processes(world: World) -> Iterator[None]:
    """RunError if the other processes disappear in here."""
    try:
        yield
    except RunError:
        raise
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or "gloo" in str(e):  # gloo's errors have no class of their own
            raise RunError(f"process {world.rank} has lost the others: one of them has failed") from e
        raise


@contextmanager
def catch_signals(world: World) -> Iterator[Callable[[], int]]:
    """In here, the first Ctrl-C or SIGTERM only says what will happen. A second one ends a lone process.

    SIGPIPE, after a print whose reader has left (`| head`), says nothing. Yields a function that returns the
    number of the first signal that any process has received, or 0. All processes must call it together.
    """
    signals: list[int] = []
    sigpipe = getattr(signal, "SIGPIPE", None)  # not on Windows
    stops = [signum for signum in (signal.SIGINT, signal.SIGTERM, sigpipe) if signum]

    def catch(signum: int, _: Any) -> None:
        signals.append(signum)
        if signum == sigpipe:
            return
        name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        line = f"{name}: stops after this step and saves"
        if world.size == 1:  # torchrun repeats the signals that a terminal has already sent to all processes
            signal.signal(signum, signal.SIG_DFL)
            line += "; a second one stops at once, and loses the steps since the last checkpoint"
        if world.is_main and len(signals) == 1:
            with suppress(OSError):
                os.write(2, f"\n{line}\n".encode())  # print is not reentrant: the step may be printing

    def received() -> int:
        return int(world.all_reduce(signals[0] if signals else 0, dist.ReduceOp.MAX))

    handlers = {signum: signal.signal(signum, catch) for signum in stops}
    try:
        yield received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


# -----------------------------------------------------------------------------
# The model and its gradient


def wrap_model(
    model: GPT,
    world: World,
    shard: bool = False,
    activation_checkpointing: bool = False,
    compile: bool = False,
    dtype: str = "float32",
) -> tuple[GPT, Any]:
    """Return the model on its device (its shards on theirs), and the callable that computes its loss.

    activation_checkpointing keeps only the inputs of the blocks, and computes the rest again in the backward
    pass. dtype is that of the autocast in which the callable will run: see `make_autocast`.
    """
    if activation_checkpointing:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for i, block in enumerate(model.h):
            model.h[i] = checkpoint_wrapper(block)
    if shard:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = dist.init_device_mesh(world.device.type, (world.size,))
        # Autocast would keep a bfloat16 copy of every gathered weight until the backward pass. So FSDP
        # gathers the weights of a block in bfloat16. The residual stream, embedding, head and gradients stay
        # in float32.
        gathered: Any = autocast_dtype(dtype, world.device)
        if gathered == torch.float32:
            gathered = None  # each weight in its own dtype: LoRA's frozen ones may be in bfloat16
        policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
        for block in model.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
    elif model.device != world.device:  # a quantized model cannot be moved
        model = model.to(world.device)
    forward: Any = model
    if world.size > 1 and not shard:
        forward = torch.nn.parallel.DistributedDataParallel(
            model,
            broadcast_buffers=False,  # quantized weights, which stay the same
            gradient_as_bucket_view=True,
        )
    if compile:
        compile_rotate()
        keep_frozen_parts_eager(model)
        forward = torch.compile(forward)
    return model, forward


def keep_frozen_parts_eager(model: GPT) -> None:
    """Keep torch.compile from frozen weights that are widened, and from the loss of a frozen head.

    Their backward passes are our own. A decorator there would import the compiler at each start.
    """
    for module in model.modules():
        if isinstance(module, WidenedLinear | QuantizedLinear):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    if not trains_head(model):
        model.loss = torch.compiler.disable(model.loss)


def gradient_sync(forward: Any, last: bool) -> AbstractContextManager:
    """The context of a micro-batch's forward and backward pass: DDP averages gradients in the last one."""
    return nullcontext() if last or not hasattr(forward, "no_sync") else forward.no_sync()


def clip_gradient(model: GPT, max_norm: float) -> Tensor:
    """Clip the gradient to max_norm, if that is not 0. Return its norm before."""
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # of shards
        norm = norm.full_tensor()
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


# -----------------------------------------------------------------------------
# State: whole tensors in a checkpoint, shards in the processes. torch.distributed.checkpoint.state_dict could
# do this, but takes half as long to import as PyTorch itself. It also makes a step to find the state of an
# optimizer that has made none, and AdamW counts that step.


def gather_state(state: Any, keep: bool) -> Any:
    """Return a state (nested dicts and lists of tensors) with its shards gathered on the CPU.

    All processes must call this. Where keep is false, shards become None.
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
    """Return the whole model; on other processes than the main one, without weights. All must call this."""
    state = gather_state(model.state_dict(), world.is_main)
    with torch.device("meta"):
        whole = GPT(model.config)
    if world.is_main:
        whole.load_state_dict(state, assign=True)
    return whole


def load_optimizers(optimizers: list[torch.optim.Optimizer], states: list[dict[str, Any]]) -> None:
    """Load the whole tensors of a checkpoint into optimizers, sharded as their parameters are.

    Only the state per parameter is loaded. Learning rates and other settings stay those of this run. RunError
    if these are not the states of such optimizers.
    """
    if len(optimizers) != len(states) or not all(map(fits, optimizers, states)):
        raise RunError("the checkpoint is damaged: its optimizer states do not fit this model")
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        p: Any
        for p, values in optimizer.state.items():
            for name, value in values.items():
                if hasattr(p, "placements") and value.shape == p.shape:
                    from torch.distributed.tensor import distribute_tensor

                    values[name] = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def fits(optimizer: torch.optim.Optimizer, state: Any) -> bool:
    """Whether a state has the tensors of each parameter, or is that of an optimizer before its first step."""
    names = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def fits_parameter(p: Tensor, values: Any) -> bool:
        if not isinstance(values, dict) or values.keys() != names:
            return False
        shapes = {name: torch.Size() if name == "step" else p.shape for name in names}
        return all(is_plain(values[name]) and values[name].shape == shapes[name] for name in names)

    states = state.get("state") if isinstance(state, dict) else None
    if states == {}:
        return True
    if not isinstance(states, dict) or states.keys() != set(range(len(params))):
        return False
    return all(fits_parameter(p, states[i]) for i, p in enumerate(params))

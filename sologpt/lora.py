"""LoRA: low-rank adapters (https://arxiv.org/abs/2106.09685), attached to a model from outside.

    attach(model, rank=16, alpha=32)  # W becomes W + (alpha / rank) B A, and only A and B are trained
    merged(model).save("best.pt", tokenizer=tokenizer.to_dict())  # a plain GPT
    peft.save_adapter(model, "adapter", "HuggingFaceTB/SmolLM2-135M-Instruct")  # see sologpt/peft.py

The weights W stay as they are: in float32, in bfloat16, or in 8 or 4 bits (https://arxiv.org/abs/2305.14314).
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from gpt import GPT, in_float32
from sologpt.errors import RunError, UserError
from sologpt.load import empty_model, is_plain
from sologpt.quantize import InferenceEmbedding, QuantizedLinear, product_dtype, widen_products


class LowRank(torch.autograd.Function):
    """scale (x A^T) B^T. It keeps x in its own dtype, not another copy of it, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        h = x.to(dtype) @ A.to(dtype).T * scale  # (..., K) @ (K, r) -> (..., r)
        ctx.save_for_backward(x, h, A, B)
        ctx.scale = scale
        return h @ B.to(dtype).T  # (..., r) @ (r, N) -> (..., N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, A, B = ctx.saved_tensors
        g = grad.flatten(0, -2)  # (M, N)
        dh = g @ B.to(g.dtype) * ctx.scale  # (M, N) @ (N, r) -> (M, r)
        dx = None
        if ctx.needs_input_grad[0]:  # not in the first layer: the embedding is frozen
            dx = (dh @ A.to(g.dtype)).to(x.dtype).view_as(x)  # (M, r) @ (r, K) -> (M, K)
        dA = dh.T @ x.flatten(0, -2).to(g.dtype)  # (r, M) @ (M, K) -> (r, K)
        dB = g.T @ h.flatten(0, -2)  # (N, M) @ (M, r) -> (N, r)
        return dx, dA.to(A.dtype), dB.to(B.dtype), None, None


class LoRALinear(nn.Module):
    """A frozen Linear, plain or quantized, plus the product of two thin matrices in float32."""

    def __init__(self, base: nn.Linear | QuantizedLinear, rank: int, alpha: float, device: Any) -> None:
        super().__init__()
        self.base, self.alpha, self.scale = base, alpha, alpha / rank
        A = torch.empty(rank, base.in_features, device=device, dtype=torch.float32)
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))  # as PEFT draws it
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        dtype = product_dtype(x.dtype) if x.is_cpu else x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return y + LowRank.apply(x, self.lora_A, self.lora_B, self.scale, dtype).to(y.dtype)

    bias = property(lambda self: self.base.bias)

    @property
    def weight(self) -> Tensor:
        """The merged weight, (N, K), in the dtype of the base. If sharded, all processes must ask for it."""
        W, A, B = map(whole, (self.base.weight, self.lora_A, self.lora_B))
        return (in_float32(W) + self.scale * (B @ A)).to(W.dtype)


def attach(model: GPT, rank: int, alpha: float, targets: str = "attn,mlp") -> None:
    """Freeze the model, and give Linears of its blocks an adapter, which is 0 until it is trained.

    targets: attn, mlp, or single Linears such as attn.c_q, with commas between. A is drawn from PyTorch's
    default generator. UserError for a rank below 1 or an unknown target.
    """
    if rank < 1:
        raise UserError(f"the rank of an adapter must be at least 1, not {rank}")
    names = find_targets(model, targets)
    model.requires_grad_(False)
    for block in model.h:
        for name in names:
            linear = cast(nn.Linear, block.get_submodule(name))
            block.set_submodule(name, LoRALinear(linear, rank, alpha, model.device))
    if model.lm_head is None:  # a tied head becomes a Linear, which `widen_products` widens like the others
        V, C = model.wte.weight.shape
        model.lm_head = nn.Linear(C, V, bias=False, device="meta")
        model.lm_head.weight = model.wte.weight
    widen_products(model)
    if isinstance(model.wte, InferenceEmbedding):
        model.wte.has_adapters = True


def find_targets(model: GPT, targets: str) -> list[str]:
    """Return the names, in a block, of the Linears that targets name."""
    modules = model.h[0].named_modules()
    linears = [name for name, module in modules if isinstance(module, nn.Linear | QuantizedLinear)]
    found = []
    for target in targets.split(","):
        matches = [name for name in linears if name == target or name.startswith(f"{target}.")]
        if not matches:
            raise UserError(f"{target!r} is no target of an adapter: take attn, mlp or {', '.join(linears)}")
        found += matches
    return [name for name in linears if name in found]


def whole(x: Any) -> Tensor:
    """x on the CPU, where products are not rounded to TF32. If sharded, all processes must call this."""
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.detach().cpu()


def modules_by_name(model: GPT) -> dict[str, nn.Module]:
    """The modules, under the names that they have without activation checkpointing."""
    return {name.replace("_checkpoint_wrapped_module.", ""): m for name, m in model.named_modules()}


@torch.no_grad()
def merged_weights(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each parameter of `merged(model)`. If sharded, all processes must do this."""
    modules = modules_by_name(model)
    for name in empty_model(model.config).state_dict():
        path, _, leaf = name.rpartition(".")
        is_head = path == "wte" and model.config.tie_embd  # which may be quantized
        yield name, whole(model.head_weight if is_head else getattr(modules[path], leaf))


def merged(model: GPT, keep: bool = True) -> GPT:
    """Return a plain GPT on the CPU, with the sums W + (alpha / rank) B A, of dequantized W.

    On the CPU, what has no adapter is shared with the model. Without keep, on other processes than the main
    one, it has no weights.
    """
    plain = empty_model(model.config)
    weights = {name: x for name, x in merged_weights(model) if keep}
    if keep:
        plain.load_state_dict(weights, assign=True)
    return plain.eval()


def adapter_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """Return A and B of each adapter, by name."""
    return {
        f"{name}.{leaf}": getattr(module, leaf)
        for name, module in modules_by_name(model).items()
        if isinstance(module, LoRALinear)
        for leaf in ("lora_A", "lora_B")
    }


def adapter_state(model: GPT) -> dict[str, Tensor]:
    """Return copies of A and B on the CPU, whole ones. If sharded, all processes must call this."""
    return {name: whole(p).clone() for name, p in adapter_parameters(model).items()}


@torch.no_grad()
def load_adapter_state(model: GPT, state: Any) -> None:
    """Load what `adapter_state` returned, before FSDP shards the model. RunError if it does not fit."""
    own = adapter_parameters(model)
    shapes = {name: x.shape for name, x in state.items() if is_plain(x)}
    if shapes != {name: p.shape for name, p in own.items()} or len(shapes) != len(state):
        raise RunError("the checkpoint is damaged: its adapters do not fit this model")
    for name, p in own.items():
        p.copy_(state[name])

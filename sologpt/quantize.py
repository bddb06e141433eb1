"""Packed and quantized weights: modules in place of a model's Linears. The model is then for inference only.

fast.pack(model)              # the same numbers in oneDNN's layout: faster
fast.quantize(model, "int4")  # four bits per weight: a third of bfloat16's memory, and faster still
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from gpt import GPT, in_float32
from sologpt.device import HUGE_PAGES, return_freed_memory
from sologpt.errors import RunError, UserError

# -----------------------------------------------------------------------------
# For inference only

BEFORE = "do it before fast.pack, fast.quantize or fast.prepare"


class InferenceOnly(nn.Module):
    """A module that refuses to be saved, copied, moved or cast."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # of deepcopy, pickle and torch.save
        raise RuntimeError(f"a packed or quantized model cannot be copied or pickled: {BEFORE}")

    def _save_to_state_dict(self, *args: Any) -> None:
        raise RuntimeError(f"a packed or quantized model cannot be saved: {BEFORE}")

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        raise RuntimeError(f"a packed or quantized model cannot be moved or cast: {BEFORE}")


class InferenceEmbedding(InferenceOnly, nn.Embedding):
    """The embedding, unchanged. As the model's first module, it refuses before anything has changed."""

    has_adapters = False  # those of lora.py are trained, and quantized weights pass gradients on to them

    def forward(self, idx: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and not self.has_adapters:
            raise RuntimeError("a packed or quantized model cannot be trained: load it anew, or call eval()")
        return self.look_up(idx)

    def look_up(self, idx: Tensor) -> Tensor:
        return super().forward(idx)


def for_inference_only(model: GPT) -> None:
    if not isinstance(model.wte, InferenceEmbedding):
        V, C = model.wte.weight.shape
        model.wte = InferenceEmbedding(V, C, _weight=model.wte.weight)
    model.requires_grad_(False)
    model.eval()


# -----------------------------------------------------------------------------
# Packed weights. oneDNN multiplies by a matrix in a blocked layout: a plain one is reordered at every product


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a CPU multiplies matrices: float32 if it has no instructions for bfloat16."""
    if dtype == torch.bfloat16 and packs(torch.device("cpu"), dtype):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def pack(model: GPT) -> None:
    """Replace the model's Linears by ones with packed weights, in place.

    The memory stays the same, except that a tied head becomes a second copy of the embedding. A packed model
    is for inference only: it refuses to be saved, copied, moved or trained. A quantized model stays as it is,
    as does one that oneDNN cannot multiply, but for `widen_products`.
    """
    widen_products(model)
    if not packs(model.device, model.dtype) or isinstance(model.wte, InferenceEmbedding):
        return
    if model.lm_head is None:
        model.lm_head = cast(nn.Linear, PackedLinear(model.wte.weight, None, tied=True))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:  # a list of the Linears would keep their plain weights in memory
        linear = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, PackedLinear(linear.weight, linear.bias))
    for_inference_only(model)


def widen_products(model: GPT, is_native: bool = False) -> None:
    """Make a model's Linears multiply in float32 on a CPU that has no instructions for their dtype, in place.

    is_native: decode.cpp is loaded, and multiplies.
    """
    is_slow = model.device.type == "cpu" and product_dtype(model.dtype) != model.dtype
    for name, module in [*model.named_modules()]:
        if is_slow and type(module) is nn.Linear:
            model.set_submodule(name, WidenedLinear(module))
    for module in model.modules():
        if isinstance(module, WidenedLinear | QuantizedLinear):
            module.is_native = is_native


class WidenedLinear(nn.Linear):
    """A Linear that widens its weight to float32: PyTorch's product is slower."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.is_native = False

    def forward(self, x: Tensor) -> Tensor:
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad
        if is_trained or x.device.type != "cpu":
            return super().forward(x)
        rows = x.reshape(-1, self.in_features).contiguous()  # (M, K)
        if torch.is_grad_enabled() and x.requires_grad:
            y = frozen_linear(rows, self.weight)  # (M, N)
        elif self.is_native:
            y = torch.ops.sologpt.linear(in_float32(rows), [self.weight]).to(x.dtype)
        else:
            y = quantized_linear(rows, self.weight)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class PackedLinear(InferenceOnly):
    """A Linear with a weight in oneDNN's layout. tied: a copy of another parameter, so it is a buffer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tied: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        if tied:
            self.register_buffer("weight", packed)
        else:
            self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self.bias)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C) times a packed weight (N, C): (..., N)."""
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")


# -----------------------------------------------------------------------------
# Quantized weights. Each token reads all weights, so their bytes limit the speed of decoding

KINDS = ("int8", "int4")
GROUP_SIZES = (128, 64, 32)  # of int4: weights of a row that share a scale and a zero point
ROWS = 8  # of int4: rows that lie side by side in memory, for decode.cpp (see products.h)
PAIRED = 32  # int4 packs so many weights into half as many bytes: the first half of them is in the low bits
CHUNK = 2**20  # weights that are quantized, or widened, at a time
INT8_ROWS = 16  # up to this many rows of x, PyTorch's int8 kernel is faster than widening (docs/notes.md)
NATIVE_ROWS = {torch.int8: 256, torch.uint8: 1024}  # and decode.cpp's products are, with q of int8 and int4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    model: GPT, kind: str, group_size: int = 32, weights: Iterable[tuple[str, Tensor]] | None = None
) -> None:
    """Quantize the weights of the model's Linears and of its head to "int8" or "int4", in place, on the CPU.

    int8: weight = q * scale, one scale per row. int4: weight = (q - 8) * scale + zero, a scale and a zero
    for each group of 32, 64 or 128 weights of a row. The head is always int8, since four bits would cost it
    dearly (docs/notes.md), and so is an embedding that is tied to it; any other embedding stays as it is.
    A matrix becomes int8 if no group size divides its width, or 8 its height. One whose width 16 does not
    divide stays as it is. Then there is a warning. Quantized weights are buffers, which `num_params` does not
    count. The model is then for inference only: it refuses to be saved, copied, moved or trained.

    weights: the name and tensor of each parameter, for a model on the meta device. Each is quantized, or
    copied, before the next is read, so the whole model is never in memory.

    UserError for another kind, device or dtype, RunError for weights that are not finite, RuntimeError for a
    model that is packed or quantized already.
    """
    if kind not in KINDS:
        raise UserError(f"quantize must be {' or '.join(KINDS)}, not {kind!r}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be 32, 64 or 128, not {group_size!r}")
    if isinstance(model.wte, InferenceEmbedding):
        raise RuntimeError("the model is packed or quantized already: load it anew")
    names = [name for name, _ in model.named_parameters()]
    for name, x in weights or ((name, model.get_parameter(name).detach()) for name in names):
        if x.device.type != "cpu" or x.dtype not in DTYPES:
            wanted = "float32, bfloat16 or float16 on the CPU"
            raise UserError(f"quantize takes weights in {wanted}, not {x.dtype} on {x.device}")
        set_weight(model, name, x, kind, group_size, is_copied=weights is not None)
        del x  # before the next one is read
        return_freed_memory()
    for_inference_only(model)
    warn_of_other_shapes(model, kind)


def set_weight(model: GPT, name: str, x: Tensor, kind: str, group_size: int, is_copied: bool) -> None:
    """Give the model a parameter: in a quantized module if a kernel takes it, else as it is."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if name == "wte.weight" and model.config.tie_embd:
        head = make_quantized(x, None, "int8")
        if head:
            model.lm_head, model.wte = cast(nn.Linear, head), Int8Embedding(head)
            return
    elif isinstance(module, nn.Linear) and leaf == "weight":
        linear = make_quantized(x, module.bias, "int8" if path == "lm_head" else kind, group_size)
        if linear:
            model.set_submodule(path, linear)
            return
    setattr(module, leaf, nn.Parameter(HUGE_PAGES.copy(x) if is_copied else x, requires_grad=False))


def warn_of_other_shapes(model: GPT, kind: str) -> None:
    """Warn of matrices that could not be quantized to kind."""
    others = set()
    for linear in (*model.h.modules(), model.lm_head):
        if isinstance(linear, nn.Linear):
            others.add((*linear.weight.shape, "as it was"))
        elif isinstance(linear, Int8Linear) and kind == "int4" and linear is not model.lm_head:
            others.add((linear.out_features, linear.in_features, "int8"))
    if model.lm_head is None:
        others.add((*model.wte.weight.shape, "as it was"))
    if others:
        shapes = ", ".join(f"{N} x {K} ({what})" for N, K, what in sorted(others))
        warnings.warn(f"matrices of these shapes cannot be {kind}: {shapes}", stacklevel=3)


def fill(model: GPT, weights: Iterable[tuple[str, Tensor]], kind: str | None) -> None:
    """Give a model on the meta device its weights, by name: quantized to kind, or copied as they are."""
    if kind:
        quantize(model, kind, weights=weights)
    else:
        model.load_state_dict({name: HUGE_PAGES.copy(x) for name, x in weights}, assign=True)


def make_quantized(
    weight: Tensor, bias: Tensor | None, kind: str, group_size: int = 32
) -> "QuantizedLinear | None":
    """Return the module that replaces a Linear with weight (N, K), or None if no kernel takes it."""
    N, K = weight.shape
    if kind == "int4" and N % ROWS == 0:
        for size in GROUP_SIZES:
            if size <= group_size and K % size == 0:
                return Int4Linear(weight, bias, size)
    if K % 16:  # PyTorch's kernel would read past the end
        return None
    return Int8Linear(weight, bias)


class QuantizedLinear(InferenceOnly):
    """A Linear with a quantized weight."""

    q: Tensor  # int8: (N, K); int4: (N/8, 4K) uint8, see `quantize_int4`
    scale: Tensor  # int8: (N,); int4: scale and zero, (N/8, K/g, 2, 8)

    def __init__(self, weight: Tensor, bias: Tensor | None, q: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.is_native = False  # whether native.py has loaded decode.cpp
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.to(self.scale.dtype).reshape(-1, self.in_features).contiguous()  # (M, K)
        if torch.is_grad_enabled() and x.requires_grad:
            y = frozen_linear(rows, self.q, self.scale)
        elif self.is_native and len(rows) <= NATIVE_ROWS[self.q.dtype]:
            y = torch.ops.sologpt.linear(rows.float(), [self.q, self.scale]).to(rows.dtype)
        else:
            y = quantized_linear(rows, self.q, self.scale)
        y = y.view(*x.shape[:-1], self.out_features)  # (M, N)
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantizedLinear):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias, *quantize_int8(weight))

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, (N, K)."""
        dtype = torch.promote_types(self.scale.dtype, torch.float32)
        chunks = [
            (widen(self.q[rows], dtype) * self.scale[rows, None]).to(self.scale.dtype)
            for rows in row_chunks(*self.q.shape)
        ]
        return torch.cat(chunks)


class Int8Embedding(InferenceEmbedding):
    """An embedding that shares the weight of an int8 head."""

    q: Tensor  # (V, C) int8
    scale: Tensor  # (V,)

    def __init__(self, head: QuantizedLinear) -> None:
        V, C = head.out_features, head.in_features
        super().__init__(V, C, device="meta")
        self.weight = nn.Parameter(head.scale.new_empty(0, C))  # has the model's device and dtype
        self.register_buffer("q", head.q)
        self.register_buffer("scale", head.scale)

    def look_up(self, idx: Tensor) -> Tensor:
        return (in_float32(self.q[idx]) * in_float32(self.scale[idx])[..., None]).to(self.scale.dtype)


class Int4Linear(QuantizedLinear):
    def __init__(self, weight: Tensor, bias: Tensor | None, group_size: int) -> None:
        super().__init__(weight, bias, *quantize_int4(weight, group_size))

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, (N, K)."""
        chunks = row_chunks(len(self.q), ROWS * self.in_features)
        return torch.cat([widen_int4(self.q[eights], self.scale[eights]).clone() for eights in chunks])


def row_chunks(N: int, K: int) -> Iterator[slice]:
    """Slices of the rows of a weight (N, K), about CHUNK weights each."""
    step = max(CHUNK // K, 1)
    return (slice(i, i + step) for i in range(0, N, step))


def check_finite(scale: Tensor) -> None:
    if not scale.isfinite().all():
        raise RunError("cannot quantize: the weights are not finite, or too large for their dtype")


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (N, K) int8 and the scale of each row (N,), for a weight (N, K)."""
    q = HUGE_PAGES.empty(weight.shape, torch.int8)
    scale = HUGE_PAGES.empty(weight.shape[:1], weight.dtype)
    for rows in row_chunks(*weight.shape):
        w = in_float32(weight[rows])
        scale[rows] = (w.abs().amax(1) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        check_finite(scale[rows])
        q[rows] = (w / in_float32(scale[rows])[:, None]).round_().clamp_(-127, 127)
    return q, scale


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return q (N/8, 4K) and scale and zero, (N/8, K/g, 2, 8), for a weight (N, K).

    q has 128 bytes (4, 8, 4) for 8 rows x 32 columns. Byte [i, r, j] has column 4i + j of row r in its low
    half, and column 16 + 4i + j in its high half.
    """
    N, K = weight.shape
    packed = HUGE_PAGES.empty((N // ROWS, ROWS * K // 2), torch.uint8)
    scale_zero = HUGE_PAGES.empty((N // ROWS, K // group_size, 2, ROWS), weight.dtype)
    for eights in row_chunks(N // ROWS, ROWS * K):
        w = in_float32(weight.view(-1, ROWS, K)[eights]).unflatten(2, (-1, group_size))  # (n, 8, K/g, g)
        scale, zero = (x.to(weight.dtype) for x in fit_groups(w))  # (n, 8, K/g, 1)
        check_finite(scale)
        scale.clamp_(min=torch.finfo(weight.dtype).tiny)
        scale_zero[eights] = torch.cat((scale, zero), -1).permute(0, 2, 3, 1)
        q = ((w - in_float32(zero)) / in_float32(scale)).round_().add_(8).clamp_(0, 15)  # (n, 8, K/g, g)
        low, high = q.to(torch.uint8).view(-1, ROWS, K // PAIRED, 2, 4, 4).unbind(3)  # (n, 8, K/32, 4, 4)
        packed[eights] = low.add(high, alpha=16).permute(0, 2, 3, 1, 4).flatten(1)
    return packed, scale_zero


def fit_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero of groups (..., g): (..., 1) each.

    Each weight is rounded to one of 16 levels from its group's minimum to its maximum. A least-squares fit
    improves the levels. It counts where no weight ends up further than half a step from its level.
    """
    low, high = w.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    q = ((w - low) / step).round_()
    mean, w_mean = q.mean(-1, keepdim=True), w.mean(-1, keepdim=True)
    q -= mean
    scale = (q * w).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True)
    start = w_mean - scale * mean
    better = (low >= start - scale / 2) & (high <= start + 15.5 * scale)
    scale, start = torch.where(better, scale, step), torch.where(better, start, low)
    return scale, start + 8 * scale


class Scratch(threading.local):
    """Memory for one chunk in each thread, reused: fresh memory costs a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}

    def take(self, n: int, dtype: torch.dtype) -> Tensor:
        if n > len(self.memory.get(dtype, ())):
            with torch.inference_mode(False):
                self.memory[dtype] = torch.empty(n, dtype=dtype)
        return self.memory[dtype][:n]


SCRATCH = Scratch()


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    return SCRATCH.take(x.numel(), dtype).view(x.shape).copy_(x)


def widen_int4(packed: Tensor, scale_zero: Tensor) -> Tensor:
    """Return the weights (N, K) of packed ones (N/8, 4K)."""
    n, groups, _, _ = scale_zero.shape
    # Four bytes of a row as one number, from (N/8, K/32, 4, 8) to (N/8, 8, K/32, 4)
    fours = packed.view(torch.int32).view(n, -1, 4, ROWS).permute(0, 3, 1, 2)
    pairs = SCRATCH.take(fours.numel(), torch.int32).view(fours.shape).copy_(fours)
    pairs = pairs.view(torch.uint8).unsqueeze(3)  # (N/8, 8, K/32, 1, 16)
    q = SCRATCH.take(2 * packed.numel(), torch.uint8).view(n, ROWS, -1, 2, PAIRED // 2)
    torch.bitwise_and(pairs, 15, out=q[:, :, :, :1])
    torch.bitwise_right_shift(pairs, 4, out=q[:, :, :, 1:])
    wide = SCRATCH.take(q.numel(), scale_zero.dtype).copy_(q.sub_(8).view(torch.int8).flatten())
    scale, zero = scale_zero.permute(2, 0, 3, 1).unsqueeze(-1)  # (N/8, 8, K/g, 1) each
    weights = wide.view(n, ROWS, groups, -1)  # (N/8, 8, K/g, g)
    return torch.addcmul(zero, weights, scale, out=weights).view(n * ROWS, -1)  # (N, K)


def rows_in_one(q: Tensor) -> int:
    """How many rows of a weight are one of q: 8 in int4."""
    return ROWS if q.dtype == torch.uint8 else 1


def quantized_linear(x: Tensor, q: Tensor, scale: Tensor | None = None) -> Tensor:
    """x (M, K) times an int8 weight (N, K), an int4 one (N/8, 4K), or without a scale a plain one: (M, N)."""
    M, K = x.shape
    dtype = product_dtype(x.dtype)
    wide, chunks = x.to(dtype), row_chunks(len(q), rows_in_one(q) * K)
    if scale is None:
        parts = [wide @ widen(q[rows], dtype).T for rows in chunks]
    elif q.dtype == torch.uint8:
        parts = [wide @ widen_int4(q[rows], scale[rows].to(dtype)).T for rows in chunks]
    elif M <= INT8_ROWS and x.dtype == torch.bfloat16:
        return torch.ops.aten._weight_int8pack_mm(x, q, scale)
    else:
        parts = [wide @ widen(q[rows], dtype).T * scale[rows] for rows in chunks]
    return torch.cat(parts, 1).to(x.dtype)


def quantized_linear_backward(grad: Tensor, K: int, q: Tensor, scale: Tensor | None = None) -> Tensor:
    """The gradient (M, K) of x in `quantized_linear`, for that of the product, (M, N)."""
    dtype, n = product_dtype(grad.dtype), rows_in_one(q)
    dx = grad.new_zeros(len(grad), K, dtype=torch.promote_types(dtype, torch.float32))
    for rows in row_chunks(len(q), n * K):
        dy = grad[:, n * rows.start : n * rows.stop].to(dtype)  # (M, rows)
        if scale is None:
            dx += dy @ widen(q[rows], dtype)  # (M, rows) @ (rows, K)
        elif q.dtype == torch.uint8:
            dx += dy @ widen_int4(q[rows], scale[rows].to(dtype))
        else:
            dx += (dy * scale[rows].to(dtype)) @ widen(q[rows], dtype)
    return dx.to(grad.dtype)


class FrozenLinear(torch.autograd.Function):
    """`quantized_linear` with a gradient for x alone. The backward pass widens the weight anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scale)
        ctx.K = x.size(1)
        return quantized_linear(x, q, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return quantized_linear_backward(grad, ctx.K, *ctx.saved_tensors), None, None


def frozen_linear(x: Tensor, q: Tensor, scale: Tensor | None = None) -> Tensor:
    """`quantized_linear`, differentiable by x."""
    return cast(Tensor, FrozenLinear.apply(x, q, scale))

"""The training loss in less memory and time, attached to a model from outside.

model.loss = chunked_cross_entropy  # equals gpt.cross_entropy, up to rounding
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt import GPT, cross_entropy, in_float32

LOGITS_PER_CHUNK = 2**24  # logits computed at a time, unless that takes too many chunks
MAX_CHUNKS = 16  # each chunk reads and writes the whole gradient of the head


def rows_per_chunk(rows: int, vocab_size: int) -> int:
    return max(LOGITS_PER_CHUNK // vocab_size, -(-rows // MAX_CHUNKS), 1)


def trains_head(model: GPT) -> bool:
    """Whether the head's weight requires a gradient. `head_weight` would dequantize a quantized one."""
    return any(p.requires_grad for p in (model.lm_head or model.wte).parameters())


def chunked_cross_entropy(model: GPT, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """`gpt.cross_entropy`, a chunk of rows at a time: the logits of all rows never exist at once."""
    if reduction == "mean":
        return chunked_cross_entropy(model, x, targets, "sum") / (targets != -1).sum().clamp(min=1)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or trains_head(model))
    if reduction == "sum" and wants_grad:
        if not trains_head(model):
            return FrozenCrossEntropy.apply(x, model, targets)
        return SumCrossEntropy.apply(x, model.head_weight, targets, model.config.softcap)
    rows = rows_per_chunk(len(x), model.config.vocab_size)
    chunks = zip(x.split(rows), targets.split(rows), strict=True)  # (R, C), (R,)
    losses = torch.cat([cross_entropy(model, h, t, "none") for h, t in chunks])  # (N,)
    return losses if reduction == "none" else losses.sum()


def masked_cross_entropy(model: GPT, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """`chunked_cross_entropy`, summed or as a mean, without the logits of targets -1.

    For conversations, where most targets may be -1. Under torch.compile, their number breaks the graph here.
    """
    counted = (targets != -1).nonzero().squeeze(1)
    return chunked_cross_entropy(model, x[counted], targets[counted], reduction)


def softmax_backward(logits: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Losses (R,) of a head's products z (R, V), before the softcap, and their gradients (R, V).

    s = cap * tanh(z / cap), ds/dz = 1 - (s / cap)^2, and dloss/ds = softmax(s) - onehot(target).
    """
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logp = logits.log_softmax(dim=-1)
    losses = F.nll_loss(logp, targets, ignore_index=-1, reduction="none")  # (R,)
    d = logp.exp_()  # (R, V)
    d.scatter_add_(1, targets.clamp(min=0)[:, None], d.new_full((len(d), 1), -1))
    d.mul_((targets != -1)[:, None])
    if softcap:
        d = torch.addcmul(d, d, logits.div_(softcap).square_(), value=-1)
    return losses, d


class SumCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of hidden states x (N, C) with a head (V, C) for targets (N,), with -1 ignored.

    The logits (N, V) and their gradient would be the largest tensors of training, so the forward pass
    computes both a chunk of rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        dx, dhead = torch.empty_like(x), torch.zeros_like(head)
        losses = in_float32(x.new_empty(len(x)))  # (N,)
        rows = rows_per_chunk(len(x), len(head))
        for i in range(0, len(x), rows):
            chunk = x[i : i + rows]  # (R, C)
            logits = in_float32(F.linear(chunk, head))  # (R, C) @ (C, V) -> (R, V)
            losses[i : i + rows], d = softmax_backward(logits, targets[i : i + rows], softcap)
            dx[i : i + rows] = d.to(x.dtype) @ head  # (R, V) @ (V, C) -> (R, C)
            dhead += d.to(x.dtype).mT @ chunk  # (V, R) @ (R, C) -> (V, C)
        ctx.save_for_backward(dx, dhead)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("the loss has no second derivative: it cannot be used with create_graph=True")
        dx, dhead = ctx.saved_tensors
        return dx * grad, dhead * grad, None, None


class FrozenCrossEntropy(torch.autograd.Function):
    """`SumCrossEntropy` with the model's head, which is frozen, and may be quantized: for LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: GPT, targets: Tensor) -> Tensor:
        dx = torch.empty_like(x)
        losses = in_float32(x.new_empty(len(x)))  # (N,)
        rows = rows_per_chunk(len(x), model.config.vocab_size)
        for i in range(0, len(x), rows):
            with torch.enable_grad():  # the head knows its own backward pass
                chunk = x[i : i + rows].detach().requires_grad_()  # (R, C)
                head = model.lm_head
                logits = F.linear(chunk, model.wte.weight) if head is None else head(chunk)  # (R, V)
            z, target = in_float32(logits.detach()), targets[i : i + rows]
            losses[i : i + rows], d = softmax_backward(z, target, model.config.softcap)
            (dx[i : i + rows],) = torch.autograd.grad(logits, chunk, d.to(logits.dtype))
        ctx.save_for_backward(dx)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("the loss has no second derivative: it cannot be used with create_graph=True")
        (dx,) = ctx.saved_tensors
        return dx * grad, None, None

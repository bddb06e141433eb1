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


def chunked_cross_entropy(model: GPT, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """`gpt.cross_entropy`, a chunk of rows at a time: the logits of all rows never exist at once."""
    if reduction == "mean":
        return chunked_cross_entropy(model, x, targets, "sum") / (targets != -1).sum().clamp(min=1)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or model.head_weight.requires_grad)
    if reduction == "sum" and wants_grad:
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


class SumCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of hidden states x (N, C) with a head (V, C) for targets (N,), with -1 ignored.

    The logits (N, V) and their gradient would be the largest tensors of training, so the forward pass
    computes both a chunk of rows at a time: s = cap * tanh(z / cap), ds/dz = 1 - (s / cap)^2, and
    dloss/ds = softmax(s) - onehot(target). A head that is frozen gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        dx = torch.empty_like(x)
        dhead = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        losses = in_float32(x.new_empty(len(x)))  # (N,)
        counted = (targets != -1)[:, None]  # (N, 1)
        rows = rows_per_chunk(len(x), len(head))
        for i in range(0, len(x), rows):
            chunk = x[i : i + rows]  # (R, C)
            target = targets[i : i + rows]  # (R,)
            logits = in_float32(F.linear(chunk, head))  # (R, C) @ (C, V) -> (R, V)
            if softcap:
                logits = torch.tanh(logits / softcap) * softcap
            logp = logits.log_softmax(dim=-1)
            losses[i : i + rows] = F.nll_loss(logp, target, ignore_index=-1, reduction="none")  # (R,)
            d = logp.exp_()  # (R, V)
            d.scatter_add_(1, target.clamp(min=0)[:, None], d.new_full((len(d), 1), -1))
            d.mul_(counted[i : i + rows])
            if softcap:
                d = torch.addcmul(d, d, logits.div_(softcap).square_(), value=-1)
            dx[i : i + rows] = d.to(x.dtype) @ head  # (R, V) @ (V, C) -> (R, C)
            if dhead is not None:
                dhead += d.to(x.dtype).mT @ chunk  # (V, R) @ (R, C) -> (V, C)
        ctx.save_for_backward(dx, dhead)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("the loss has no second derivative: it cannot be used with create_graph=True")
        dx, dhead = ctx.saved_tensors
        return dx * grad, None if dhead is None else dhead * grad, None, None

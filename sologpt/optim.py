"""The optimizers, and which of them trains which parameter.

Muon (https://kellerjordan.github.io/posts/muon) is SGD with momentum whose update of a matrix is replaced by
the nearest semi-orthogonal matrix: U V^T where the momentum is U S V^T. All directions of the update then
have the same size, even those that are rare in the gradient. Muon trains the matrices of the blocks. AdamW
trains the embedding, the head, gains and biases.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gpt import GPT
from sologpt.device import multiplies_bfloat16


def configure_optimizers(
    model: GPT,
    learning_rate: float = 0.02,
    embd_lr: float = 0.3,
    head_lr: float = 0.004,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.8, 0.95),
    optimizer: str = "muon",
    dtype: torch.dtype | None = None,
) -> list[torch.optim.Optimizer]:
    """Return [Muon for the blocks' matrices, AdamW for the rest], or [AdamW for all] with optimizer="adamw".

    learning_rate and weight_decay are for the matrices, momentum and dtype for Muon, betas for AdamW. AdamW
    wants a lower learning_rate than Muon. Its step is cheap, which pays where a step has few tokens for the
    size of the model. head_lr is also the rate of gains, biases and a tied embedding. Learned positions have
    the rate of the embedding. Every group keeps its rate as `initial_lr`, for a schedule to scale.

    They train exactly the parameters that require a gradient. ValueError for one that has no rule here, or if
    there is none.
    """
    if optimizer not in ("muon", "adamw"):
        raise ValueError(f"optimizer must be muon or adamw, not {optimizer!r}")
    tables: dict[nn.Parameter, float] = {model.wte.weight: embd_lr}
    for p in (model.lm_head or model.wte).parameters():  # none in a quantized head
        tables[p] = head_lr  # a tied embedding is the same tensor: it gets this rate
    if model.wpe is not None:
        tables[model.wpe.weight] = tables[model.wte.weight]
    matrices, vectors = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad or p in tables:
            continue
        if p.ndim == 2 and name.startswith("h."):
            matrices.append(p)
        elif p.ndim == 1:
            vectors.append(p)
        else:
            raise ValueError(f"configure_optimizers has no rule for {name}")
    matrices = [p for stack in by_shape(matrices) for p in stack]  # checkpoints number states in this order
    blocks: list[dict[str, Any]] = []
    if matrices:
        blocks.append(dict(params=matrices, lr=learning_rate, weight_decay=weight_decay))
    rest: list[dict[str, Any]] = [dict(params=[p], lr=lr) for p, lr in tables.items() if p.requires_grad]
    if vectors:
        rest.append(dict(params=vectors, lr=head_lr))
    adamw = partial(torch.optim.AdamW, betas=betas, eps=1e-10, weight_decay=0.0, fused=True)
    optimizers: list[torch.optim.Optimizer] = []
    if optimizer == "muon" and blocks:
        optimizers.append(Muon(blocks, momentum=momentum, dtype=dtype))
        blocks = []
    if blocks or rest:
        optimizers.append(adamw(blocks + rest))
    if not optimizers:
        raise ValueError("no parameter requires a gradient")
    for each in optimizers:
        for group in each.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def by_shape(params: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    stacks: dict[torch.Size, list[nn.Parameter]] = {}
    for p in params:
        stacks.setdefault(p.shape, []).append(p)
    return list(stacks.values())


def orthogonalize(G: Tensor) -> Tensor:
    """Return roughly the semi-orthogonal matrices U V^T nearest to a stack G = U S V^T of (N, rows, columns).

    Five steps of a Newton-Schulz iteration push all singular values towards 1. The coefficients are those of
    Polar Express: each is optimal for what the steps before it leave (https://arxiv.org/abs/2505.16932).
    """
    X = G.mT if G.size(-2) > G.size(-1) else G  # X X^T is then the smaller of the two products
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A^2) X
    return X.mT if G.size(-2) > G.size(-1) else X


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalized by Newton-schulz, for matrices: `torch.optim.Muon` in batched products.

    Matrices of the same shape are stacked, since a few large products cost a fraction of many small ones. The
    products are in `dtype`. None means bfloat16 on a GPU that has it, where it is several times faster and
    precise enough, and the parameters' own dtype elsewhere. Parameters that FSDP has sharded (DTensor) are
    redistributed: each process orthogonalizes some of the whole matrices.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for params in by_shape(p for p in group["params"] if p.grad is not None):
                self.update(params, group["lr"], group["momentum"], group["weight_decay"])

    def update(self, params: Any, lr: float, momentum: float, weight_decay: float) -> None:
        """Update matrices of one shape."""
        grads = [p.grad for p in params]
        for p in params:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        nesterov: Any = torch.stack(torch._foreach_lerp(grads, buffers, momentum))  # (N, rows, columns)
        rows, columns = nesterov.shape[-2:]
        sharding = getattr(nesterov, "placements", None)
        if sharding:  # FSDP: each process has some rows of every matrix, and needs all rows of some matrices
            from torch.distributed.tensor import Shard

            nesterov = nesterov.redistribute(placements=[Shard(0)])
        dtype = self.dtype or (torch.bfloat16 if multiplies_bfloat16(nesterov.device) else nesterov.dtype)
        updates = orthogonalize(nesterov.to(dtype)).to(params[0].dtype) * max(1, rows / columns) ** 0.5
        if sharding:
            updates = updates.redistribute(placements=sharding)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates.unbind(), alpha=-lr)

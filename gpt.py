"""A whole GPT in one file: configuration, layers, KV cache, sampling, loss and the model. It needs PyTorch alone.

The default architecture is nanochat's (https://github.com/karpathy/nanochat), Hugging Face's `NanoChatForCausalLM`:
- rotary position embeddings (https://arxiv.org/abs/2104.09864)
- grouped-query attention (https://arxiv.org/abs/2305.13245) with QK-norm (https://arxiv.org/abs/2010.04245)
- RMSNorm without gains (https://arxiv.org/abs/1910.07467) before each sublayer, after the embedding, before the head
- an MLP with ReLU squared (https://arxiv.org/abs/2109.08668), no biases, an untied head
- logits softcapped in float32 (Gemma 2, https://arxiv.org/abs/2408.00118)
Switches in the config make it Llama (https://arxiv.org/abs/2407.21783), Mistral or Qwen (https://arxiv.org/abs/2505.09388).

Shapes in the comments: B rows, T new tokens, S tokens to attend to, C = n_embd, H query heads and G key/value heads of
D channels each, M = n_hidden, V = vocab_size. The file knows token ids and no text.
"""

import math
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Device: TypeAlias = torch.device | str | None
Dtype: TypeAlias = torch.dtype | None
Path: TypeAlias = str | os.PathLike
LayerCache: TypeAlias = tuple[Tensor, Tensor, tuple, int]  # keys, values (B, max_len, G, D); new tokens' slots; S
Decoder: TypeAlias = Callable[[Tensor, "KVCache"], Tensor]  # reads ids (B,) into a cache, returns logits (B, V)

LOGITS_PER_CHUNK, MAX_CHUNKS = 2**24, 16  # of the loss; each chunk also reads the head and adds to its gradient
PREFILL_CHUNK = 1024  # tokens of each row in one forward of a prefill; bounds the memory for activations
ROPE_SCALINGS = {  # the numbers that each rope_type takes, by Hugging Face's names
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass
class GPTConfig:
    sequence_len: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # number of token ids
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # query heads
    n_kv_head: int | None = None  # key/value heads; fewer than n_head is GQA, None means n_head
    n_embd: int = 768  # width of the residual stream
    head_dim: int | None = None  # channels of a head; None means n_embd // n_head
    n_hidden: int | None = None  # width of the MLP; None means 4 * n_embd
    mlp: str = "relu2"  # relu2 (two matrices) or swiglu (three, one of them the gate)
    qk_norm: bool = True  # RMSNorm of queries and keys
    embd_norm: bool = True  # RMSNorm of the embedding
    norm_weight: bool = False  # learned gains in every RMSNorm
    qkv_bias: bool = False  # biases of queries, keys and values
    tie_embd: bool = False  # share one matrix between embedding and head
    dropout: float = 0.0  # probability of zeroing an activation in training
    softcap: float = 15.0  # bound on the logits, softcap * tanh(logits / softcap); 0 switches it off
    rope_base: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: dict | None = None  # {"rope_type": "linear", "factor": 2.0}, or "llama3" with its four numbers
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    heads = property(lambda self: (self.n_head, self.n_kv_head, self.head_dim))  # (H, G, D)

    def __post_init__(self) -> None:
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.n_hidden = 4 * self.n_embd if self.n_hidden is None else self.n_hidden
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_hidden"):
            size = getattr(self, name)
            check(size is None or size >= 1, f"{name} must be at least 1, not {size}")
        H, G, C = self.n_head, self.n_kv_head, self.n_embd
        if self.head_dim is None:
            check(C % H == 0, f"n_embd {C} must be divisible by n_head {H}, or give head_dim")
            self.head_dim = C // H
        check(H % G == 0, f"n_head {H} must be divisible by n_kv_head {G}")
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for RoPE (n_embd {C}, n_head {H})")
        check(self.mlp in ("relu2", "swiglu"), f"mlp must be relu2 or swiglu, not {self.mlp!r}")
        check(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")
        check(min(self.softcap, self.norm_eps) >= 0, f"negative softcap {self.softcap} or norm_eps {self.norm_eps}")
        check(self.rope_base > 0, f"rope_base must be above 0, not {self.rope_base}")
        if (scaling := self.rope_scaling) is None:
            return
        rope_type, given = scaling.get("rope_type"), scaling.keys() - {"rope_type"}
        wanted = ROPE_SCALINGS.get(str(rope_type), set())
        check(bool(wanted), f"rope_scaling: rope_type must be one of {', '.join(ROPE_SCALINGS)}, not {rope_type!r}")
        check(given == wanted, f"rope_scaling {rope_type!r} takes {sorted(wanted)}, not {sorted(given) or 'nothing'}")
        for name in sorted(wanted):
            x = scaling[name]
            check(type(x) in (int, float) and 0 < x < math.inf, f"rope_scaling: {name} must be positive, not {x!r}")
        low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", 1)
        check(low < high, f"rope_scaling: low_freq_factor {low} must be below high_freq_factor {high}")


# ---- layers ----
def in_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope(positions: Tensor, config: GPTConfig, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of the rotary angles of positions (B or 1, T): (B or 1, T, 1, D/2, 2), in at least float32.

    Channel pair i is rotated by position * base^(-2i/D), so q @ k depends on distances alone. There is no table, since
    it would have to move with the model, and `.to(torch.bfloat16)` would round it.
    """
    _, _, D = config.heads
    real = torch.promote_types(dtype, torch.float32)
    frequencies = config.rope_base ** (torch.arange(0, D, 2, device=positions.device, dtype=real) / -D)  # (D/2,)
    if config.rope_scaling:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    angles = positions[:, :, None, None].to(real) * frequencies  # (B or 1, T, 1, D/2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def scale_frequencies(frequencies: Tensor, scaling: dict) -> Tensor:
    """Rotary frequencies (D/2,) for a longer context. 'linear' divides them all (https://arxiv.org/abs/2306.15595).

    'llama3' keeps those of high_freq_factor or more turns in the original context, and blends from low_freq_factor on.
    """
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = frequencies * scaling["original_max_position_embeddings"] / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate neighbouring channels of x (B, T, H, D) as complex numbers, by rotations (B or 1, T, 1, D/2, 2)."""
    pairs = in_float32(x).unflatten(-1, (-1, 2))  # (B, T, H, D/2, 2)
    rotated = torch.view_as_complex(pairs) * torch.view_as_complex(rotations)  # (B, T, H, D/2)
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)  # (B, T, H, D)


def rms_norm(channels: int, config: GPTConfig) -> nn.Module:
    return nn.RMSNorm(channels, eps=config.norm_eps, elementwise_affine=config.norm_weight)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, (H, G, D) = config.n_embd, config.heads
        self.head_dim, self.gqa, self.dropout = D, G < H, nn.Dropout(config.dropout)
        self.c_q = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.c_k = nn.Linear(C, G * D, bias=config.qkv_bias)
        self.c_v = nn.Linear(C, G * D, bias=config.qkv_bias)
        self.c_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm, self.k_norm = (rms_norm(D, config) if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rotations: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.head_dim) for f in (self.c_q, self.c_k, self.c_v))  # (B, T, H or G, D)
        q, k = rotate(self.q_norm(q), rotations), rotate(self.k_norm(k), rotations)
        if cache is not None:  # write the new keys and values in place, then attend to all
            keys, values, slots, end = cache
            keys[slots], values[slots] = k.detach().to(keys.dtype), v.detach().to(values.dtype)
            k, v = keys[:, :end], values[:, :end]  # (B, S, G, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, G, S, D), (B, G, S, D)
        # softmax(q @ k^T / sqrt(D)) @ v; the mask is true where a query may attend, None is causal
        dropout, causal = self.dropout.p if self.training else 0.0, mask is None and T > 1
        if self.gqa and not causal:  # a group's queries become rows: few kernels take a mask with enable_gqa
            mask = mask if mask is None else mask.repeat(1, 1, q.size(1) // k.size(1), 1)  # (B or 1, 1, H/G * T, S)
            q = q.reshape(B, k.size(1), -1, self.head_dim)  # (B, G, H/G * T, D)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=self.gqa and causal)
        return self.c_proj(y.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        n_hidden = config.n_hidden or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_hidden, bias=False)
        self.c_proj = nn.Linear(n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c_fc(x))  # (B, T, M)
        return self.c_proj(x * x)  # (B, T, C); the backward pass of x.square() takes twice the time


class SwiGLU(MLP):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.c_gate = nn.Linear(config.n_embd, self.c_fc.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))  # (B, T, M) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = rms_norm(config.n_embd, config)
        self.attn = Attention(config)
        self.mlp_norm = rms_norm(config.n_embd, config)
        self.mlp = {"relu2": MLP, "swiglu": SwiGLU}[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotations: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), rotations, mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


# ---- KV cache ----
class KVCache:
    """Keys and values of all layers, allocated once and written in place. Row b holds `lengths[b]` tokens, `ids[b]`.

    `lengths` (B,) is on the CPU: reading it never waits for the device. The caller owns the cache, `GPT.forward`
    appends to it, and no gradient flows through it.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, device: Device = None, dtype: Dtype = None):
        _, G, D = config.heads
        shape = (config.n_layer, batch_size, G, max_len, D)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, G, max_len, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(batch_size, max_len, device=device, dtype=torch.long)
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        self.batch_size, self.max_len = batch_size, max_len

    # 2 (keys, values) * n_layer * batch_size * n_kv_head * max_len * head_dim * bytes of the dtype
    nbytes = property(lambda self: self.k.nbytes + self.v.nbytes)

    def begin(self, idx: Tensor) -> tuple[Tensor, Tensor | None, list[LayerCache]]:
        """Make room for tokens idx (B, T). ValueError, before anything is written, if there is too little.

        Returns positions (B or 1, T), the mask (B or 1, 1, T, S) or None for causal, and the cache of each layer.
        """
        T, longest, device = idx.size(1), int(self.lengths.max()), self.k.device
        ragged, end = int(self.lengths.min()) < longest, longest + T
        check(end <= self.max_len, f"{longest} tokens and {T} new ones do not fit into a KVCache of {self.max_len}")
        positions = (self.lengths[: None if ragged else 1, None] + torch.arange(T)).to(device)  # (B or 1, T)
        slots: tuple = (slice(None), slice(longest, end))
        if ragged:
            slots = (torch.arange(self.batch_size, device=device)[:, None], positions)
            # Shorter rows leave slots here that are masked: their attention weight is 0, but 0 * NaN is NaN
            self.k[:, :, :, longest:end], self.v[:, :, :, longest:end] = 0, 0
        self.ids[slots] = idx
        mask = None
        if ragged or (T > 1 and longest > 0):
            mask = (torch.arange(end, device=device) <= positions[..., None])[:, None]  # (B or 1, 1, T, S)
        layers = [(k.transpose(1, 2), v.transpose(1, 2), slots, end) for k, v in zip(self.k, self.v, strict=True)]
        return positions, mask, layers

    def truncate(self, n: int | Sequence[int] | Tensor) -> None:
        """Forget all tokens past the first n: an int for all rows, or one per row. Shorter rows stay as they are."""
        n = torch.as_tensor(n, dtype=torch.long)
        fits = n.shape in ((), (1,), (self.batch_size,)) and bool((n >= 0).all())
        check(fits, f"cannot truncate {self.batch_size} rows to lengths of {n.tolist()}")
        torch.minimum(self.lengths, n, out=self.lengths)

    def reset(self) -> None:
        """Forget all tokens; the memory stays allocated."""
        self.lengths.zero_()

    def tokens(self) -> list[list[int]]:
        """The token ids of each row."""
        return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    def rows(self, index: slice | Tensor) -> "KVCache":
        """A KVCache of some rows: on the same memory for a slice, a copy for a tensor of row numbers."""
        cache = copy(self)
        cache.k, cache.v, cache.ids = self.k[:, index], self.v[:, index], self.ids[index]
        cache.lengths, cache.batch_size = self.lengths[index], len(cache.ids)
        return cache

    def row(self, b: int) -> "KVCache":
        """Row b, on the same memory."""
        if not 0 <= b < self.batch_size:
            raise IndexError(f"there is no row {b} in a KVCache of {self.batch_size} rows")
        return self.rows(slice(b, b + 1))

    def expand(self, n: int) -> "KVCache":
        """n copies of each row next to each other, so that one prefill serves n samples."""
        return self.rows(torch.arange(self.batch_size).repeat_interleave(n))


# ---- sampling ----
@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from logits. The filters are Hugging Face's, in its order; None or 0 is off."""

    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int | None = None  # keep the k most likely tokens, and ties with the last of them
    top_p: float | None = None  # keep the fewest whose probabilities sum to p (https://arxiv.org/abs/1904.09751)
    min_p: float | None = None  # keep those min_p times as likely as the top one (https://arxiv.org/abs/2407.01082)
    repetition_penalty: float = 1.0  # above 1, seen tokens become less likely (CTRL, https://arxiv.org/abs/1909.05858)
    stop_tokens: Iterable[int] = ()  # a row ends with the first of these
    seed: int = 42  # the same seed gives the same tokens
    suppress_tokens: Iterable[int] = ()  # never drawn

    def __post_init__(self) -> None:
        t = self.temperature
        check(t == 0 or 1e-30 < t < 1e30, f"temperature must be 0, or positive and finite, not {t}")
        check(not self.top_k or self.top_k >= 1, f"top_k must be at least 1, or 0 for no limit, not {self.top_k}")
        check(not self.top_p or 0 < self.top_p <= 1, f"top_p must be in (0, 1], or 0 for no limit, not {self.top_p}")
        check(not self.min_p or 0 < self.min_p < 1, f"min_p must be in (0, 1), or 0 for no limit, not {self.min_p}")
        check(self.repetition_penalty > 0, f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        check(-(2**63) <= self.seed < 2**63, f"seed must be a 64-bit integer, not {self.seed}")

    def filter(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits (B, V) after penalty, temperature and filters, which set tokens to -inf; seen is (B, V) bool."""
        if seen is not None:
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        logits = logits / (self.temperature or 1)
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
            logits = logits.masked_fill(logits < kth, -math.inf)
        if self.top_p and self.top_p < 1:
            ascending, order = logits.sort(dim=-1)
            tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p  # (B, V), in ascending order
            tail[:, -1] = False
            logits = logits.masked_fill(tail.scatter(-1, order, tail), -math.inf)
        if self.min_p:
            probs = logits.softmax(dim=-1)
            logits = logits.masked_fill(probs < self.min_p * probs.amax(dim=-1, keepdim=True), -math.inf)
        return logits

    def draw(self, logits: Tensor, generator: torch.Generator | None = None, seen: Tensor | None = None) -> Tensor:
        """A token id for each row of logits: (B, V) to (B,) int64."""
        logits = self.filter(logits, seen)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token id for each row of logits: (B, V) to (B,) int64. See `Sampling`."""
    return Sampling(temperature, top_k, top_p, min_p).draw(logits, generator)


# ---- loss ----
def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """Logits in at least float32, squashed into +-softcap; 0 switches the cap off."""
    logits = in_float32(logits)
    return torch.tanh(logits / softcap) * softcap if softcap else logits


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of hidden states x (N, C) under a head (V, C) for targets (N,), where -1 is ignored.

    Logits (N, V) and their gradient would be the largest tensors of training, so the forward pass computes both for a
    chunk of rows at a time: s = cap * tanh(z / cap), ds/dz = 1 - (s / cap)^2, dloss/ds = softmax(s) - onehot(target).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        dx, dhead, losses = torch.empty_like(x), torch.zeros_like(head), []
        rows, counted = max(LOGITS_PER_CHUNK // len(head), -(-len(x) // MAX_CHUNKS)), targets != -1  # (N,)
        weights = in_float32(counted.to(x.dtype))[:, None] / counted.sum()  # (N, 1)
        for i in range(0, len(x), rows):
            chunk, target, w = x[i : i + rows], targets[i : i + rows], weights[i : i + rows]  # (R, C), (R,), (R, 1)
            logits = softcapped(F.linear(chunk, head), softcap)  # (R, C) @ (C, V) -> (R, V)
            logp = logits.log_softmax(dim=-1)
            losses.append(F.nll_loss(logp, target, ignore_index=-1, reduction="none"))  # (R,)
            d = logp.exp_().scatter_add_(1, target.clamp(min=0)[:, None], torch.full_like(w, -1)).mul_(w)  # (R, V)
            if softcap:
                d = torch.addcmul(d, d, logits.div_(softcap).square_(), value=-1)
            dx[i : i + rows] = d.to(x.dtype) @ head  # (R, V) @ (V, C) -> (R, C)
            dhead += d.to(x.dtype).mT @ chunk  # (V, R) @ (R, C) -> (V, C)
        ctx.save_for_backward(dx, dhead)
        return torch.cat(losses).sum() / counted.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("the loss has no second derivative: create_graph=True cannot be used with it")
        dx, dhead = ctx.saved_tensors
        return dx * grad, dhead * grad, None, None


# ---- the model ----
class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.embd_norm = rms_norm(config.n_embd, config) if config.embd_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = rms_norm(config.n_embd, config)
        self.lm_head = None if config.tie_embd else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.modes: list[bool] = []  # of before each generator that runs
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every block starts as the identity and the head near zero, so the first loss is ln(vocab_size)."""
        bound = math.sqrt(3 / self.config.n_embd)  # uniform in +-bound has standard deviation 1 / sqrt(n_embd)
        table: dict[Any, Callable] = {  # by the end of the parameter's name; the first match counts
            "wte.weight": partial(nn.init.normal_, std=0.001 if self.config.tie_embd else 1.0),
            "lm_head.weight": partial(nn.init.normal_, std=0.001),
            "norm.weight": nn.init.ones_,
            ("c_proj.weight", "bias"): nn.init.zeros_,
            "weight": partial(nn.init.uniform_, a=-bound, b=bound),
        }
        for name, parameter in self.named_parameters():
            next(init for end, init in table.items() if name.endswith(end))(parameter)

    device = property(lambda self: self.wte.weight.device)
    dtype = property(lambda self: self.wte.weight.dtype)
    head_weight = property(lambda self: (self.lm_head or self.wte).weight)  # (V, C); with tie_embd, the embedding's

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """FLOPs of a training step per token, at sequence_len (PaLM's formula, https://arxiv.org/abs/2204.02311)."""
        c, (H, _, D) = self.config, self.config.heads
        lookup = 0 if c.tie_embd else self.wte.weight.numel()  # an untied embedding takes part in no matmul
        return 6 * (self.num_params() - lookup) + 12 * c.n_layer * H * D * c.sequence_len

    def estimate_mfu(self, tokens_per_second: float, peak_flops: float) -> float:
        """Model FLOPs utilization of training: achieved FLOPs per second over the device's peak_flops."""
        return self.flops_per_token() * tokens_per_second / peak_flops

    def hidden(self, idx: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """All layers but the head: idx (B, T) int64 to (B, T, C)."""
        B, T = idx.shape
        past = 0 if kv_cache is None else int(kv_cache.lengths.max())
        check(past + T <= (n := self.config.sequence_len), f"{past + T} tokens are more than sequence_len {n}")
        positions, mask = torch.arange(T, device=idx.device)[None], None  # (1, T)
        layers: Sequence[LayerCache | None] = [None] * len(self.h)
        if kv_cache is not None:
            self.check_cache(kv_cache, B)
            positions, mask, layers = kv_cache.begin(idx)  # (B or 1, T), (B or 1, 1, T, S)
        rotations = rope(positions, self.config, self.dtype)  # (B or 1, T, 1, D/2, 2)
        x = self.dropout(self.embd_norm(self.wte(idx)))  # (B, T, C)
        for block, layer in zip(self.h, layers, strict=True):
            x = block(x, rotations, mask, layer)
        if kv_cache is not None:
            kv_cache.lengths += T
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """The head: (..., C) to (..., V), softcapped, in at least float32."""
        logits = F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)
        return softcapped(logits, self.config.softcap)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, kv_cache: KVCache | None = None, loss_reduction: str = "mean"
    ) -> Tensor:
        """Logits (B, T, V) of idx (B, T) int64, which follow what the cache holds; with targets (B, T), the loss.

        The loss is the cross entropy in nats, with -1 ignored: a scalar, or (B*T,) with loss_reduction='none'.
        ValueError for more tokens than sequence_len or the cache can hold, IndexError for a target that is no token id.
        """
        x = self.hidden(idx, kv_cache)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        x, targets = x.flatten(0, 1), targets.flatten()  # (B*T, C), (B*T,)
        # An index below 0 may wrap around in compiled code. Past the end, it is an error on every backend.
        targets = targets.masked_fill(targets < -1, self.config.vocab_size)
        if loss_reduction == "mean" and torch.is_grad_enabled() and (x.requires_grad or self.head_weight.requires_grad):
            return ChunkedCrossEntropy.apply(x, self.head_weight, targets, self.config.softcap)
        rows = max(LOGITS_PER_CHUNK // self.config.vocab_size, -(-len(x) // MAX_CHUNKS))
        chunks = zip(x.split(rows), targets.split(rows), strict=True)  # (R, C), (R,)
        losses = torch.cat([F.cross_entropy(self.logits(h), t, ignore_index=-1, reduction="none") for h, t in chunks])
        return losses if loss_reduction == "none" else losses.sum() / (targets != -1).sum()

    def check_cache(self, kv_cache: KVCache, B: int) -> None:
        c, k = self.config, kv_cache.k
        have = (*k.shape[:3], k.size(4), k.dtype, k.device)
        need = (c.n_layer, B, c.n_kv_head, c.head_dim, self.dtype, self.device)
        what = "n_layer, batch_size, n_kv_head, head_dim, dtype, device"
        check(have == need, f"the KVCache has {what} {have}, the model needs {need}")

    def generate(self, tokens: Iterable[int], max_tokens: int, *how: Any, **settings: Any) -> Generator[int, None, str]:
        """Continue tokens: yields token ids, and returns why it ended, 'length' or 'stop'.

        generate(tokens, max_tokens, temperature=1.0, top_k=None, ..., kv_cache=None, decode=None): see `Sampling`. Bad
        arguments are a ValueError at the call. A full window of sequence_len tokens is cut to its last half, which is
        prefilled anew; of a longer prompt, the last sequence_len tokens count. With a kv_cache, tokens follow what it
        holds, and all that is generated stays in it: the next turn of a conversation prefills only what is new.
        `decode` replaces `GPT.step` (sologpt/fast.py). In eval mode until the generator ends or is closed.
        """
        steps = self.generate_batch([tokens], max_tokens, 1, *how, **settings)

        def only_row() -> Generator[int, None, str]:
            with closing(steps):
                try:
                    while True:
                        yield next(steps)[0]  # type: ignore[misc]  # never None: a batch ends with its last row
                except StopIteration as end:
                    return end.value[0]

        return only_row()

    def generate_batch(
        self,
        prompts: Iterable[Iterable[int]],
        max_tokens: int,
        num_samples: int = 1,
        *how: Any,
        kv_cache: KVCache | None = None,
        decode: Decoder | None = None,
        **settings: Any,
    ) -> Generator[list[int | None], None, list[str]]:
        """`generate` for prompts of any lengths, with num_samples rows for each, next to each other.

        Yields a list per step: the token id of each row, None for a row that has ended. Returns the list of reasons.
        Greedy tokens of a row are what it would get alone. A kv_cache has one row per prompt, and num_samples is 1.
        """
        sampling, texts = Sampling(*how, **settings), [[*prompt] for prompt in prompts]
        stop, suppressed, V = {*sampling.stop_tokens}, [*sampling.suppress_tokens], self.config.vocab_size
        check(max_tokens >= 0, f"max_tokens must be at least 0, not {max_tokens}")
        check(num_samples >= 1, f"num_samples must be at least 1, not {num_samples}")
        check(min(map(len, texts), default=0) > 0, "the prompt is empty: generate needs at least one token")
        outside = next((id for ids in (*texts, suppressed) for id in ids if not 0 <= id < V), None)
        check(outside is None, f"token id {outside} is outside the vocabulary of {V}")
        check(len({*suppressed}) < V, "suppress_tokens leaves no token to draw")
        past = 0 if kv_cache is None else int(kv_cache.lengths.max())
        max_len = min(self.config.sequence_len, past + max(map(len, texts)) + max_tokens)
        if kv_cache is not None:
            self.check_cache(kv_cache, len(texts))
            check(num_samples == 1, f"num_samples must be 1 with a kv_cache, not {num_samples}")
            check(kv_cache.max_len >= max_len, f"a KVCache of {kv_cache.max_len} tokens is too small for {max_len}")

        @torch.inference_mode()
        def steps() -> Generator[list[int | None], None, list[str]]:
            self.modes.append(self.training)
            self.eval()
            unread: Tensor | None = None  # the tokens drawn last, (B,), until they are decoded
            try:
                # 1. Prefill the prompts
                cache = kv_cache or KVCache(self.config, len(texts), max_len, self.device, self.dtype)
                seen: Tensor | None = None
                if sampling.repetition_penalty != 1:
                    seen = torch.zeros(len(texts), V, dtype=torch.bool, device=self.device)  # (B, V)
                    for row, past, text in zip(seen, cache.tokens(), texts, strict=True):
                        row[past + text] = True
                logits = self.prefill(texts, cache)  # (B, V)
                # 2. Copy each row for its samples
                if num_samples > 1:
                    cache, logits = cache.expand(num_samples), logits.repeat_interleave(num_samples, dim=0)
                    seen = None if seen is None else seen.repeat_interleave(num_samples, dim=0)
                # 3. Draw a token of each row, yield, stop, decode
                B, generator = len(logits), torch.Generator(self.device).manual_seed(sampling.seed)
                running, ended = {*range(B)}, list[int]()  # the rows; of the ended ones, only those read to their end
                for n in range(1, max_tokens + 1):
                    if suppressed:
                        logits[:, suppressed] = -math.inf
                    unread = sampling.draw(logits, generator, seen)
                    if seen is not None:
                        seen.scatter_(1, unread[:, None], True)
                    tokens = unread.tolist()
                    yield [tokens[b] if b in running else None for b in range(B)]
                    running = {b for b in running if tokens[b] not in stop}
                    if n == max_tokens or not running:
                        break
                    ids, unread = unread, None  # should decode fail, they are not read a second time
                    logits = self.read(ids, cache, ended, decode or self.step)  # (B, V)
                    ended = [b for b in range(B) if b not in running]
                return ["length" if b in running else "stop" for b in range(B)]
            finally:  # also when the caller walks away
                try:
                    if kv_cache is not None and unread is not None:
                        self.read(unread, cache, ended, decode or self.step)
                finally:
                    self.train(self.modes.pop())  # generators may end in any order: the last restores the first's mode

        return steps()

    def prefill(self, prompts: Sequence[Sequence[int]], kv_cache: KVCache) -> Tensor:
        """Read prompts of any lengths into the cache, after what it holds. Returns their last logits, (B, V).

        If a row would outgrow sequence_len, all restart with their last sequence_len tokens. Shorter prompts are padded
        on the right: causality hides the padding, which is then truncated.
        """
        window = self.config.sequence_len
        if int(kv_cache.lengths.max()) + max(map(len, prompts)) > window:
            prompts = [[*past, *new][-window:] for past, new in zip(kv_cache.tokens(), prompts, strict=True)]
            kv_cache.reset()
        sizes = torch.tensor([*map(len, prompts)])
        idx = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)  # (B, T)
        lengths = kv_cache.lengths + sizes
        last = torch.empty(len(prompts), self.config.n_embd, device=self.device, dtype=self.dtype)  # (B, C)
        for start in range(0, idx.size(1), PREFILL_CHUNK):
            x = self.hidden(idx[:, start : start + PREFILL_CHUNK].to(self.device), kv_cache)  # (B, <= T, C)
            [rows] = ((start < sizes) & (sizes <= start + x.size(1))).nonzero(as_tuple=True)  # they end in this chunk
            last[rows] = x[rows, sizes[rows] - start - 1]
        kv_cache.truncate(lengths)
        return self.logits(last)

    def step(self, ids: Tensor, kv_cache: KVCache) -> Tensor:
        """The plain decoder: read one more token of each row, (B,); returns the next logits, (B, V)."""
        return self.logits(self.hidden(ids[:, None], kv_cache)[:, -1])  # (B, 1) -> (B, C) -> (B, V)

    def read(self, ids: Tensor, kv_cache: KVCache, ended: list[int], decode: Decoder) -> Tensor:
        """Decode ids (B,) to logits (B, V). A row whose window is full restarts with the last half of it."""
        window, lengths = self.config.sequence_len, kv_cache.lengths.clone()
        if ended:  # these are decoded along: they read their last token again, and stay as they are
            kv_cache.lengths[ended] -= 1
            ids[ended] = kv_cache.ids[ended, kv_cache.lengths[ended]]
        for b in (kv_cache.lengths == window).nonzero().flatten().tolist():
            tail = kv_cache.ids[b : b + 1, window - max(1, window // 2) + 1 : window].clone()  # the newest is in ids
            kv_cache.row(b).reset()
            if tail.numel():
                self.hidden(tail, kv_cache.row(b))
        try:
            return decode(ids, kv_cache)
        finally:
            kv_cache.lengths[ended] = lengths[ended]

    def save(self, path: Path, **extra: Any) -> None:
        """Write weights, config and extra (tensors and plain Python values) to path, atomically."""
        temporary = f"{os.fspath(path)}.tmp"
        try:
            with open(temporary, "wb") as f:
                torch.save({"model": self.state_dict(), "config": asdict(self.config), **extra}, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):  # it is still there if something failed
                os.remove(temporary)

    @classmethod
    def load(cls, path: Path, device: Device = None, dtype: Dtype = None) -> "GPT":
        """The model that `save` wrote, in eval mode. OSError for a missing file, RuntimeError for a damaged one."""
        return cls.load_checkpoint(path, device, dtype)[0]

    @classmethod
    def load_checkpoint(cls, path: Path, device: Device = None, dtype: Dtype = None) -> tuple["GPT", dict[str, Any]]:
        """`load`, and the extra that was saved. Runs no code from the file (weights_only)."""
        with open(path, "rb") as f:
            try:
                checkpoint = torch.load(f, map_location="cpu", weights_only=True)
                with torch.device("meta"):  # no memory for initial weights
                    model = cls(GPTConfig(**checkpoint.pop("config")))
                model.load_state_dict(checkpoint.pop("model"), assign=True)
            except Exception as e:  # a damaged file can fail anywhere: zip, pickle, a missing key, a shape
                if isinstance(e, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(e):
                    raise
                raise RuntimeError(f"{os.fspath(path)} is not a checkpoint of a GPT, or is damaged") from e
        return model.to(device, dtype).eval(), checkpoint

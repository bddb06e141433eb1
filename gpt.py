"""A whole GPT in one file: configuration, layers, KV cache, sampling, and the model. It needs PyTorch and nothing else.

The default architecture is nanochat's (https://github.com/karpathy/nanochat), Hugging Face's `NanoChatForCausalLM`:
- rotary position embeddings (RoFormer, https://arxiv.org/abs/2104.09864)
- grouped-query attention (https://arxiv.org/abs/2305.13245) with QK-norm (https://arxiv.org/abs/2010.04245)
- RMSNorm without gains (https://arxiv.org/abs/1910.07467) before each sublayer, after the embedding, before the head
- an MLP with ReLU squared (Primer, https://arxiv.org/abs/2109.08668), no biases, an untied head
- logits softcapped in float32 (Gemma 2, https://arxiv.org/abs/2408.00118)
Switches in the config make it Llama (https://arxiv.org/abs/2407.21783), Mistral or Qwen (https://arxiv.org/abs/2505.09388).

Shapes in the comments: B rows, T new tokens, S tokens to attend to, C = n_embd, H query heads and G key/value heads of
D channels each, M = n_hidden, V = vocab_size. The file knows token ids and no text.
"""

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Device: TypeAlias = torch.device | str | None
Path: TypeAlias = str | os.PathLike
Limit: TypeAlias = float | None


def check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


ROPE_SCALINGS = {  # the numbers that each rope_type takes, by Hugging Face's names
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


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
        check(self.softcap >= 0, f"softcap must be at least 0, not {self.softcap}")
        check(self.norm_eps >= 0, f"norm_eps must be at least 0, not {self.norm_eps}")
        check(self.rope_base > 0, f"rope_base must be above 0, not {self.rope_base}")
        if (scaling := self.rope_scaling) is None:
            return
        rope_type, given = scaling.get("rope_type"), scaling.keys() - {"rope_type"}
        wanted = ROPE_SCALINGS.get(str(rope_type), set())
        check(bool(wanted), f"rope_scaling: rope_type must be one of {', '.join(ROPE_SCALINGS)}, not {rope_type!r}")
        check(given == wanted, f"rope_scaling {rope_type!r} takes {sorted(wanted)}, not {sorted(given)}")
        for name in sorted(wanted):
            x = scaling[name]
            check(type(x) in (int, float) and 0 < x < math.inf, f"rope_scaling: {name} must be positive, not {x!r}")
        low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", 1)
        check(low < high, f"rope_scaling: low_freq_factor {low} must be below high_freq_factor {high}")

    @property
    def heads(self) -> tuple[int, int, int]:
        """n_head, n_kv_head, head_dim: (H, G, D)."""
        assert self.n_kv_head and self.head_dim  # set in __post_init__
        return self.n_head, self.n_kv_head, self.head_dim


# ---- layers ----
def in_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope(positions: Tensor, config: GPTConfig, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of the rotary angles of positions (B or 1, T): (B or 1, T, 1, D/2, 2), in at least float32.

    Channel pair i of a head is rotated by position * base^(-2i/D), so q @ k depends on the distance alone. There is no
    table to move along with the model, and none for `.to(torch.bfloat16)` to round.
    """
    _, _, D = config.heads
    real = torch.promote_types(dtype, torch.float32)
    frequencies = config.rope_base ** (torch.arange(0, D, 2, device=positions.device, dtype=real) / -D)  # (D/2,)
    if config.rope_scaling:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    angles = positions[:, :, None, None].to(real) * frequencies  # (B or 1, T, 1, D/2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def scale_frequencies(frequencies: Tensor, scaling: dict) -> Tensor:
    """Rotary frequencies (D/2,) for a context `factor` times as long as in pretraining.

    'linear' divides them all (position interpolation, https://arxiv.org/abs/2306.15595). 'llama3' keeps those with
    high_freq_factor or more turns in the original context, divides those below low_freq_factor, and blends the rest.
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


# One layer of a KVCache during a forward: keys and values (B, max_len, G, D), an index of (B, max_len) that says where the
# new tokens go, and S, the length to attend to
LayerCache: TypeAlias = tuple[Tensor, Tensor, tuple, int]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, (H, G, D) = config.n_embd, config.heads
        self.head_dim, self.gqa, self.dropout = D, G < H, nn.Dropout(config.dropout)
        self.c_q = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.c_k = nn.Linear(C, G * D, bias=config.qkv_bias)
        self.c_v = nn.Linear(C, G * D, bias=config.qkv_bias)
        self.c_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = rms_norm(D, config) if config.qk_norm else nn.Identity()
        self.k_norm = rms_norm(D, config) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotations: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.c_k(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        v = self.c_v(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        q, k = rotate(self.q_norm(q), rotations), rotate(self.k_norm(k), rotations)
        if cache is not None:  # write the new keys and values in place, then attend to all
            keys, values, slots, end = cache
            keys[slots], values[slots] = k.detach().to(keys.dtype), v.detach().to(values.dtype)
            k, v = keys[:, :end], values[:, :end]  # (B, S, G, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, G, S, D), (B, G, S, D)
        # softmax(q @ k^T / sqrt(D)) @ v; the mask is true where a query may attend, None is causal
        dropout, causal = self.dropout.p if self.training else 0.0, mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=self.gqa)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H * D) -> (B, T, C)


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
    """Keys and values of all layers, allocated once and written in place. Row b holds `lengths[b]` tokens.

    `lengths` (B,) stay on the CPU, so that reading them never waits for the device; `ids` (B, max_len) are the token
    ids. The caller owns the cache, `GPT.forward` appends to it. No gradient flows through it.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, max_len: int, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        _, G, D = config.heads
        shape = (config.n_layer, batch_size, G, max_len, D)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, G, max_len, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(batch_size, max_len, device=device, dtype=torch.long)
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        self.batch_size, self.max_len = batch_size, max_len

    @property
    def nbytes(self) -> int:
        """2 (keys, values) * n_layer * batch_size * n_kv_head * max_len * head_dim * bytes of the dtype."""
        return self.k.nbytes + self.v.nbytes

    def begin(self, idx: Tensor) -> tuple[Tensor, Tensor | None, list[LayerCache]]:
        """Where new tokens idx (B, T) go. ValueError, before anything is written, if there is too little room.

        Returns positions (B or 1, T), the attention mask (B or 1, 1, T, S), None if plain causal, and each layer's cache.
        """
        T, shortest, longest = idx.size(1), int(self.lengths.min()), int(self.lengths.max())
        end, device = longest + T, self.k.device
        check(end <= self.max_len, f"{longest} tokens and {T} new ones do not fit into a KVCache of {self.max_len}")
        ragged = shortest < longest
        starts = self.lengths if ragged else self.lengths[:1]
        positions = (starts[:, None] + torch.arange(T)).to(device)  # (B or 1, T)
        slots: tuple = (slice(None), slice(longest, end))
        if ragged:
            slots = (torch.arange(self.batch_size, device=device)[:, None], positions)
            # Shorter rows leave slots here that are masked: their attention weight is 0, but 0 * NaN is NaN
            self.k[:, :, :, longest:end] = 0
            self.v[:, :, :, longest:end] = 0
        self.ids[slots] = idx
        mask = None
        if ragged or (T > 1 and longest > 0):
            mask = (torch.arange(end, device=device) <= positions[..., None])[:, None]  # (B or 1, 1, T, S)
        return positions, mask, self.layers(slots, end)

    def layers(self, slots: tuple, end: int) -> list[LayerCache]:
        return [(k.transpose(1, 2), v.transpose(1, 2), slots, end) for k, v in zip(self.k, self.v, strict=True)]

    def truncate(self, n: int | Sequence[int] | Tensor) -> None:
        """Forget all tokens past the first n: an int for all rows, or one per row. Shorter rows stay as they are."""
        n = torch.as_tensor(n, dtype=torch.long)
        check(n.shape in ((), (1,), (self.batch_size,)), f"truncate got {n.numel()} lengths for {self.batch_size} rows")
        check(bool((n >= 0).all()), f"cannot truncate to {int(n.min())} tokens")
        torch.minimum(self.lengths, n, out=self.lengths)

    def reset(self) -> None:
        """Forget all tokens; the memory stays allocated."""
        self.lengths.zero_()

    def tokens(self) -> list[list[int]]:
        """The token ids of each row."""
        return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    def expand(self, n: int) -> "KVCache":
        """A new cache with n copies of each row next to each other, so that one prefill serves n samples."""
        cache = copy(self)
        cache.k, cache.v = (x.repeat_interleave(n, dim=1) for x in (self.k, self.v))
        cache.ids, cache.lengths = (x.repeat_interleave(n, dim=0) for x in (self.ids, self.lengths))
        cache.batch_size = n * self.batch_size
        return cache

    def row(self, b: int) -> "KVCache":
        """Row b as a KVCache of batch size 1 that shares its memory."""
        if not 0 <= b < self.batch_size:
            raise IndexError(f"there is no row {b} in a KVCache of {self.batch_size} rows")
        cache, rows = copy(self), slice(b, b + 1)
        cache.k, cache.v, cache.ids, cache.lengths = (
            self.k[:, rows],
            self.v[:, rows],
            self.ids[rows],
            self.lengths[rows],
        )
        cache.batch_size = 1
        return cache


# A decoder reads one more token of each row: (ids (B,), kv_cache) -> logits (B, V). `GPT.step` is the plain one.
Decoder: TypeAlias = Callable[[Tensor, KVCache], Tensor]


# ---- sampling ----
def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: Limit = None, top_p: Limit = None, min_p: Limit = None
) -> Tensor:
    """Logits (B, V) divided by temperature, and -inf where a filter removes a token: Hugging Face's, in its order.

    top_k keeps the k most likely tokens and ties with the last of them, top_p the fewest whose probabilities sum to p
    (https://arxiv.org/abs/1904.09751), min_p those at least min_p times as likely as the most likely one
    (https://arxiv.org/abs/2407.01082). None or 0 switches a filter off.
    """
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(int(top_k), logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p and top_p < 1:
        ascending, order = logits.sort(dim=-1)
        tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p  # (B, V), in ascending order
        tail[:, -1] = False
        logits = logits.masked_fill(tail.scatter(-1, order, tail), -math.inf)
    if min_p:
        probs = logits.softmax(dim=-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -math.inf)
    return logits


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: Limit = None,
    top_p: Limit = None,
    min_p: Limit = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token id for each row of logits after `filter_logits`: (B, V) to (B,) int64. temperature=0 is argmax."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator).squeeze(-1)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (https://arxiv.org/abs/1909.05858) on the tokens that a row has seen, (B, V) bool."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


@dataclass(frozen=True)
class Sampling:
    """How `generate` draws tokens. ValueError for a setting out of its range."""

    temperature: float = 1.0
    top_k: Limit = None
    top_p: Limit = None
    min_p: Limit = None
    repetition_penalty: float = 1.0
    stop_tokens: Iterable[int] = ()
    seed: int = 42
    suppress_tokens: Iterable[int] = ()

    def __post_init__(self) -> None:
        t, k, p, m = self.temperature, self.top_k, self.top_p, self.min_p
        check(t == 0 or 1e-30 < t < 1e30, f"temperature must be 0, or positive and finite, not {t}")
        check(not k or k >= 1, f"top_k must be at least 1, or 0 for no limit, not {k}")
        check(not p or 0 < p <= 1, f"top_p must be in (0, 1], or 0 for no limit, not {p}")
        check(not m or 0 < m < 1, f"min_p must be in (0, 1), or 0 for no limit, not {m}")
        check(self.repetition_penalty > 0, f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        check(-(2**63) <= self.seed < 2**63, f"seed must be a 64-bit integer, not {self.seed}")


# ---- loss ----
def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """Logits in at least float32, squashed into +-softcap; 0 switches the cap off."""
    logits = in_float32(logits)
    return torch.tanh(logits / softcap) * softcap if softcap else logits


LOGITS_PER_CHUNK = 2**24


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of hidden states x (N, C) under a head (V, C) for targets (N,), where -1 is ignored.

    Logits (N, V) and their gradient would be the largest tensors of training, so the forward pass computes both for a
    chunk of rows at a time: s = cap * tanh(z / cap), ds/dz = 1 - (s / cap)^2, dloss/ds = softmax(s) - onehot(target).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        dx, dhead, losses = torch.empty_like(x), torch.zeros_like(head), []
        rows = max(1, LOGITS_PER_CHUNK // len(head))
        counted = targets != -1  # (N,)
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dhead = ctx.saved_tensors
        return dx * grad, dhead * grad, None, None


# ---- the model ----

PREFILL_CHUNK = 1024  # tokens per row in one forward of a prefill; bounds the memory for activations


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
        self.modes: list[bool] = []  # see eval_mode
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every block starts as the identity and the head near zero, so the first loss is ln(vocab_size)."""
        bound = math.sqrt(3 / self.config.n_embd)  # uniform in +-bound has standard deviation 1 / sqrt(n_embd)
        table: dict[str, Callable] = {  # by the end of the parameter's name; the first match counts
            "wte.weight": partial(nn.init.normal_, std=0.001 if self.config.tie_embd else 1.0),
            "lm_head.weight": partial(nn.init.normal_, std=0.001),
            "norm.weight": nn.init.ones_,
            "c_proj.weight": nn.init.zeros_,
            "bias": nn.init.zeros_,
            "weight": partial(nn.init.uniform_, a=-bound, b=bound),
        }
        for name, parameter in self.named_parameters():
            next(init for end, init in table.items() if name.endswith(end))(parameter)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (V, C); with tie_embd, the embedding's."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.wte.weight.dtype

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
        window = self.config.sequence_len
        check(past + T <= window, f"{past + T} tokens are more than sequence_len {window}")
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

        The loss is the cross entropy in nats, -1 ignored: a scalar, or (B*T,) with loss_reduction='none'. ValueError for
        more tokens than sequence_len or the cache can hold, IndexError for a target that is no token id and not -1.
        """
        x = self.hidden(idx, kv_cache)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        x, targets = x.flatten(0, 1), targets.flatten()  # (B*T, C), (B*T,)
        # An index below 0 may wrap around in compiled code. Past the end, it is an error on every backend.
        targets = targets.masked_fill(targets < -1, self.config.vocab_size)
        if loss_reduction == "mean" and torch.is_grad_enabled() and (x.requires_grad or self.head_weight.requires_grad):
            return ChunkedCrossEntropy.apply(x, self.head_weight, targets, self.config.softcap)
        rows = max(1, LOGITS_PER_CHUNK // self.config.vocab_size)
        chunks = zip(x.split(rows), targets.split(rows), strict=True)  # (R, C), (R,)
        each = [F.cross_entropy(self.logits(h), t, ignore_index=-1, reduction="none") for h, t in chunks]
        losses = torch.cat(each)  # (B*T,)
        return losses if loss_reduction == "none" else losses.sum() / (targets != -1).sum()

    def check_cache(self, kv_cache: KVCache, B: int) -> None:
        c, k = self.config, kv_cache.k
        have = (*k.shape[:3], k.size(4), k.dtype, k.device)
        want = (c.n_layer, B, c.n_kv_head, c.head_dim, self.dtype, self.device)
        names = "n_layer, batch_size, n_kv_head, head_dim, dtype, device"
        check(have == want, f"the KVCache has {names} {have}, but the model needs {want}")

    def generate(
        self,
        tokens: Sequence[int],
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] = (),
        seed: int = 42,
        suppress_tokens: Sequence[int] = (),
        kv_cache: KVCache | None = None,
        decode: Decoder | None = None,
    ) -> Generator[int, None, str]:
        """Continue tokens: yields one token id at a time; the return value is why it ended, 'length' or 'stop'.

        The same seed gives the same tokens; temperature=0 takes the most likely one. For top_k, top_p and min_p see
        `filter_logits`. A token of stop_tokens is yielded, then ends it; suppress_tokens are never drawn. The model is
        in eval mode until the generator ends or is closed. ValueError, at the call, for what cannot be.

        When sequence_len is full, the last half of the window is prefilled anew, and generation goes on. Of a longer
        prompt the last sequence_len tokens are read. With a kv_cache, tokens follow what it holds, and all that is
        generated stays in it: the next turn of a conversation prefills only what is new. `decode` takes the place of
        `GPT.step`: see sologpt/fast.py.
        """
        how = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, stop_tokens, seed, suppress_tokens)
        return first_row(self.generate_batch([tokens], max_tokens, 1, kv_cache, decode, **vars(how)))

    def generate_batch(
        self,
        prompts: Iterable[Iterable[int]],
        max_tokens: int,
        num_samples: int = 1,
        kv_cache: KVCache | None = None,
        decode: Decoder | None = None,
        **sampling: Any,
    ) -> Generator[list[int | None], None, list[str]]:
        """`generate` for prompts of any lengths, with num_samples rows for each, next to each other.

        Yields a list per step: a token id for each row, None for a row that has ended. Returns the list of reasons.
        Greedy tokens of a row are what it would get alone. A kv_cache has one row per prompt, and num_samples is 1.
        """
        how, texts = Sampling(**sampling), [[*prompt] for prompt in prompts]
        stop, suppressed, V = {*how.stop_tokens}, [*how.suppress_tokens], self.config.vocab_size
        check(max_tokens >= 0, f"max_tokens must be at least 0, not {max_tokens}")
        check(num_samples >= 1, f"num_samples must be at least 1, not {num_samples}")
        check(min(map(len, texts), default=0) > 0, "the prompt is empty: generate needs at least one token")
        outside = [token for tokens in (*texts, suppressed) for token in tokens if not 0 <= token < V]
        check(not outside, f"token id {outside[:1]} is outside the vocabulary of {V}")
        check(len({*suppressed}) < V, "suppress_tokens leaves no token to draw")
        longest = max(map(len, texts)) + (0 if kv_cache is None else int(kv_cache.lengths.max()))
        max_len = min(self.config.sequence_len, longest + max_tokens)
        if kv_cache is not None:
            self.check_cache(kv_cache, len(texts))
            check(num_samples == 1, f"num_samples must be 1 with a kv_cache, not {num_samples}")
            have = kv_cache.max_len
            check(have >= max_len, f"a KVCache of {have} tokens is too small: {max_len} are needed")

        @torch.inference_mode()
        def steps() -> Generator[list[int | None], None, list[str]]:
            with self.eval_mode():
                # 1. Prefill the prompts
                cache = kv_cache or KVCache(self.config, len(texts), max_len, self.device, self.dtype)
                contexts = [[*past, *prompt] for past, prompt in zip(cache.tokens(), texts, strict=True)]
                logits = self.prefill(texts, cache)  # (B, V)

                # 2. Copy each row for its samples
                if num_samples > 1:
                    cache, logits = cache.expand(num_samples), logits.repeat_interleave(num_samples, dim=0)
                B, penalty = logits.size(0), how.repetition_penalty
                if penalty != 1:
                    seen = torch.zeros_like(logits, dtype=torch.bool)  # (B, V)
                    for b in range(B):
                        seen[b, contexts[b // num_samples]] = True

                # 3. Draw a token of each row, yield, stop, decode
                generator = torch.Generator(self.device).manual_seed(how.seed)
                reasons, running = ["length"] * B, set(range(B))
                ends = torch.full((B,), cache.max_len + 1)  # the lengths at which rows have ended
                unread: Tensor | None = None  # the tokens drawn last, not in the cache yet, (B,)
                try:
                    for _ in range(max_tokens):
                        if unread is not None:
                            ids, unread = unread, None  # should decode fail, they are not read a second time
                            logits = self.read(ids, cache, ends, decode or self.step)  # (B, V)
                            if ended := [b for b in range(B) if b not in running]:
                                ends[ended] = cache.lengths[ended]
                        if penalty != 1:
                            logits = penalize(logits, seen, penalty)
                        if suppressed:
                            logits[:, suppressed] = -math.inf
                        unread = sample(logits, how.temperature, how.top_k, how.top_p, how.min_p, generator)  # (B,)
                        if penalty != 1:
                            seen.scatter_(1, unread[:, None], True)
                        tokens = unread.tolist()
                        yield [tokens[b] if b in running else None for b in range(B)]
                        for b in [b for b in running if tokens[b] in stop]:
                            reasons[b] = "stop"
                            running.remove(b)
                        if not running:
                            break
                    return reasons
                finally:  # also when the caller walks away
                    if kv_cache is not None and unread is not None:
                        self.read(unread, cache, ends, decode or self.step)

        return steps()

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Eval mode inside. The last generator to leave restores the first one's mode, in whatever order they end."""
        self.modes.append(self.training)
        self.eval()
        try:
            yield
        finally:
            self.train(self.modes.pop())

    def prefill(self, prompts: Sequence[Sequence[int]], kv_cache: KVCache) -> Tensor:
        """Read prompts of any lengths into the cache, after what it holds. Returns their last logits, (B, V).

        If a row would outgrow sequence_len, the last sequence_len tokens of each row are read into an empty cache.
        Shorter prompts are padded on the right: causality hides the padding from real tokens, and it is truncated.
        """
        window = self.config.sequence_len
        if int(kv_cache.lengths.max()) + max(map(len, prompts)) > window:
            contexts = zip(kv_cache.tokens(), prompts, strict=True)
            prompts = [[*past, *prompt][-window:] for past, prompt in contexts]
            kv_cache.reset()
        sizes = torch.tensor([len(prompt) for prompt in prompts])
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

    def read(self, ids: Tensor, kv_cache: KVCache, ends: Tensor, decode: Decoder) -> Tensor:
        """Decode ids (B,) to logits (B, V), whatever the state of a row.

        A row whose window is full restarts with the last half of it. A row that has ended, at length ends[b] (B,), is
        decoded with the others and truncated back; if it is full, it makes room by reading its last token again.
        """
        window = self.config.sequence_len
        for b in (kv_cache.lengths == window).nonzero().flatten().tolist():
            row = kv_cache.row(b)
            if ends[b] == window:
                row.truncate(window - 1)
                ids[b] = row.ids[0, window - 1]
            else:
                tail = row.ids[:, window - max(1, window // 2) + 1 : window].clone()  # and the newest token is in ids
                row.reset()
                if tail.numel():
                    self.hidden(tail, row)
        logits = decode(ids, kv_cache)
        kv_cache.truncate(ends)
        return logits

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
    def load(cls, path: Path, device: Device = None, dtype: torch.dtype | None = None) -> "GPT":
        """The model that `save` wrote, in eval mode. OSError for a missing file, RuntimeError for a damaged one."""
        return cls.load_checkpoint(path, device, dtype)[0]

    @classmethod
    def load_checkpoint(
        cls, path: Path, device: Device = None, dtype: torch.dtype | None = None
    ) -> tuple["GPT", dict[str, Any]]:
        """`load`, and the extra that was saved. Runs no code from the file (weights_only)."""
        with open(path, "rb") as f:
            try:
                checkpoint = torch.load(f, map_location="cpu", weights_only=True)
                with torch.device("meta"):  # no memory for initial weights
                    model = cls(GPTConfig(**checkpoint.pop("config")))
                model.load_state_dict(checkpoint.pop("model"), assign=True)
            except Exception as e:  # a damaged file can fail anywhere: zip, pickle, a missing key, a shape
                if isinstance(e, MemoryError) or "can't allocate memory" in str(e):
                    raise
                raise RuntimeError(f"{os.fspath(path)} is not a checkpoint of a GPT, or is damaged") from e
        return model.to(device, dtype).eval(), checkpoint


def first_row(steps: Generator[list[int | None], None, list[str]]) -> Generator[int, None, str]:
    """`generate` from a generate_batch of one row."""
    with closing(steps):
        while True:
            try:
                [token] = next(steps)
            except StopIteration as end:
                return end.value[0]
            assert token is not None
            yield token

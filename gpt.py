"""A whole GPT in one file: the model, its cache, sampling, checkpoints and optimizers.

The architecture is by default the one of nanochat (https://github.com/karpathy/nanochat), which Hugging Face ships as
`NanoChatForCausalLM`, read from bottom to top:
- rotary positions (RoFormer, https://arxiv.org/abs/2104.09864), no position embeddings
- grouped-query attention (https://arxiv.org/abs/2305.13245) over normed queries and keys
  (QK-norm, https://arxiv.org/abs/2010.04245), with a preallocated KV cache for inference
- RMSNorm without gains (https://arxiv.org/abs/1910.07467) before each sublayer, after the embedding and before the head
- an MLP with ReLU squared (Primer, https://arxiv.org/abs/2109.08668), no biases, an untied head
- logits softcapped in float32 (Gemma 2, https://arxiv.org/abs/2408.00118)
- Muon for the matrices (https://kellerjordan.github.io/posts/muon), AdamW for the rest, or for all
Switches in the config make it Llama (https://arxiv.org/abs/2407.21783), Mistral or Qwen (https://arxiv.org/abs/2505.09388):
heads of any width, a gated MLP (SwiGLU, https://arxiv.org/abs/2002.05202), gains in the norms, biases of queries, keys
and values, a tied head, and rotary positions stretched beyond the context of the first training.

Shapes in the comments: B rows, T new tokens, S tokens that can be attended to, C = n_embd, H query heads of D channels,
G key/value heads, M = n_hidden, V = vocab_size. The file needs torch and nothing else, and knows token ids, never text.
"""

import math
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

Device = torch.device | str | None
Path = str | os.PathLike

ROPE_SCALINGS = {  # by rope_type, the numbers that go with it; the names are Hugging Face's
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
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
    mlp: str = "relu2"  # relu2 (two matrices) or swiglu (three, one of which is the gate)
    qk_norm: bool = True  # norm queries and keys
    embd_norm: bool = True  # norm the embedding
    norm_weight: bool = False  # gains in the norms, all of them
    qkv_bias: bool = False  # biases of queries, keys and values
    tie_embd: bool = False  # the embedding is the head too
    dropout: float = 0.0  # chance that an activation is zeroed in training
    softcap: float = 15.0  # bound on the logits; 0 switches it off
    rope_base: float = 10_000.0  # base of the rotary wavelengths
    rope_scaling: dict | None = None  # {"rope_type": "linear", "factor": 2.0}, or "llama3" with all that it takes
    norm_eps: float = 1e-6  # added to the mean square that RMSNorm divides by

    def __post_init__(self) -> None:
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_hidden is None:
            self.n_hidden = 4 * self.n_embd
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_hidden"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"without head_dim, n_embd {self.n_embd} must be divisible by n_head {self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(
                f"rotary positions turn pairs of channels: head_dim {self.head_dim} must be even "
                f"(n_embd {self.n_embd}, n_head {self.n_head})"
            )
        if self.mlp not in ("relu2", "swiglu"):
            raise ValueError(f"mlp must be relu2 or swiglu, not {self.mlp!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.softcap < 0 or self.norm_eps < 0:
            raise ValueError(f"softcap and norm_eps must not be negative, but are {self.softcap} and {self.norm_eps}")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base must be positive, but is {self.rope_base}")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)

    @property
    def heads(self) -> tuple[int, int, int]:
        """n_head, n_kv_head and head_dim: (H, G, D)."""
        assert self.n_kv_head and self.head_dim  # __post_init__ has seen to it
        return self.n_head, self.n_kv_head, self.head_dim


def check_rope_scaling(scaling: dict) -> None:
    rope_type = scaling.get("rope_type")
    numbers = ROPE_SCALINGS.get(str(rope_type))
    if numbers is None:
        raise ValueError(f"rope_scaling needs a rope_type, one of {', '.join(ROPE_SCALINGS)}, not {rope_type!r}")
    if set(scaling) != {"rope_type", *numbers}:
        given = ", ".join(sorted(set(scaling) - {"rope_type"}))
        raise ValueError(
            f"rope_scaling of rope_type {rope_type!r} takes {', '.join(numbers)}, not {given or 'nothing'}"
        )
    for name in numbers:
        if type(scaling[name]) not in (int, float) or not 0 < scaling[name] < math.inf:
            raise ValueError(f"rope_scaling: {name} must be a positive number, not {scaling[name]!r}")
    low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", 1)
    if low >= high:
        raise ValueError(f"rope_scaling: high_freq_factor {high} must be above low_freq_factor {low}")


# -----------------------------------------------------------------------------
# The cache: what attention has to remember of the tokens that it has seen


class LayerCache(NamedTuple):
    """A layer's part of a KVCache while new tokens are read: views of it, and where the tokens go."""

    k: Tensor  # (B, G, max_len, D)
    v: Tensor
    slots: tuple  # an index of (B, max_len)
    end: int  # of what can be attended to, with what is new

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values, (B, T, G, D); returns all that there are, (B, G, S, D), as views."""
        self.k.transpose(1, 2)[self.slots] = k.detach().to(self.k.dtype)
        self.v.transpose(1, 2)[self.slots] = v.detach().to(self.v.dtype)
        return self.k[:, :, : self.end], self.v[:, :, : self.end]


class KVCache:
    """Keys and values of all layers, allocated once and written in place. Row b holds `lengths[b]` positions.

    `lengths` is an int64 tensor (batch_size,) on the CPU, so that it is known without waiting for the device; `ids`
    (batch_size, max_len) are the tokens that the positions stand for. Owned by the caller; `GPT.forward` appends to
    it: begin once, update each layer, then commit. No gradient flows through it.
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

    @property
    def batch_size(self) -> int:
        return self.k.size(1)

    @property
    def max_len(self) -> int:
        return self.k.size(3)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: 2 * n_layer * batch_size * n_kv_head * max_len * head_dim * those of the dtype."""
        return self.k.nbytes + self.v.nbytes

    def begin(self, idx: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor | None, list[LayerCache]]:
        """Make room for new tokens, (B, T); ValueError, and nothing changed, if there is too little.

        Returns their positions, (B, T) or (1, T) when all rows are equally long, the mask of what each may attend to,
        (B or 1, 1, T, S) bool, or None where plain causal attention says the same, and the cache's layers.
        """
        T, shortest, longest = idx.size(1), int(self.lengths.min()), int(self.lengths.max())
        if longest + T > self.max_len:
            raise ValueError(f"a row of {longest} tokens and {T} new ones do not fit a KVCache of {self.max_len}")
        end = longest + T
        ragged = shortest < longest
        starts = self.lengths if ragged else self.lengths[:1]
        positions = (starts[:, None] + torch.arange(T)).to(self.k.device)  # (B or 1, T)
        if ragged:
            # A shorter row leaves a gap here. Attention gives it a weight of 0, but if something that was not finite
            # was left there, 0 times that is NaN.
            self.k[:, :, :, longest:end] = 0
            self.v[:, :, :, longest:end] = 0
        slots: tuple = (slice(None), slice(longest, end))
        if ragged or compiled:  # slices are faster, but compiled code would be bound to their numbers
            slots = (torch.arange(self.batch_size, device=self.k.device)[:, None], positions)
        self.ids[slots] = idx
        mask = None
        if ragged or (T > 1 and longest > 0):
            mask = (torch.arange(end, device=self.k.device) <= positions[..., None])[:, None]
        return positions, mask, self.layers(slots, end)

    def layers(self, slots: tuple, end: int) -> list[LayerCache]:
        """Each layer's part, for new tokens at slots, an index of (B, max_len), among the first `end` positions."""
        return [LayerCache(k, v, slots, end) for k, v in zip(self.k, self.v, strict=True)]

    def commit(self, T: int) -> None:
        self.lengths += T

    def truncate(self, n: int | Sequence[int] | Tensor) -> None:
        """Forget what lies past position n: one n for all rows, or one for each. A shorter row stays as it is."""
        n = torch.as_tensor(n, dtype=torch.long)
        if n.ndim > 1 or n.numel() not in (1, self.batch_size):
            raise ValueError(f"truncate got {n.numel()} lengths for {self.batch_size} rows")
        if n.min() < 0:
            raise ValueError(f"cannot truncate to {int(n.min())} tokens")
        torch.minimum(self.lengths, n, out=self.lengths)

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.lengths.zero_()

    def tokens(self) -> list[list[int]]:
        """The token ids that each row holds."""
        return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    def expand(self, n: int) -> "KVCache":
        """A new cache with n copies of each row next to each other, so that one prefill serves n samples."""
        cache = copy(self)
        cache.k = self.k.repeat_interleave(n, dim=1)
        cache.v = self.v.repeat_interleave(n, dim=1)
        cache.ids = self.ids.repeat_interleave(n, dim=0)
        cache.lengths = self.lengths.repeat_interleave(n)
        return cache

    def row(self, b: int) -> "KVCache":
        """Row b as a cache of batch size 1 on the same memory: what is done to one is seen in the other."""
        if not 0 <= b < self.batch_size:
            raise IndexError(f"there is no row {b} in a KVCache of {self.batch_size}")
        cache = copy(self)
        cache.k, cache.v = self.k[:, b : b + 1], self.v[:, b : b + 1]
        cache.ids, cache.lengths = self.ids[b : b + 1], self.lengths[b : b + 1]
        return cache


# -----------------------------------------------------------------------------
# The layers


def wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope(positions: Tensor, config: GPTConfig, dtype: torch.dtype) -> Tensor:
    """Rotations for positions (B or 1, T): of each angle the cosine and the sine, (B or 1, T, 1, D/2, 2).

    Position p turns pair i of a head's channels by the angle p * base^(-2i/D). The dot product of a query and a key
    then depends on how far apart they are, not on where. Computed anew each time, in at least float32: no table to
    move along with the model, none for `.to(bfloat16)` to round.
    """
    _, _, D = config.heads
    real = torch.promote_types(dtype, torch.float32)
    frequencies = config.rope_base ** (torch.arange(0, D, 2, device=positions.device, dtype=real) / -D)  # (D/2,)
    if config.rope_scaling:
        frequencies = stretch(frequencies, config.rope_scaling)
    angles = positions[:, :, None, None].to(real) * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def stretch(frequencies: Tensor, scaling: dict) -> Tensor:
    """The frequencies (D/2,) that make a context `factor` times as long look like the one of the first training.

    'linear' divides all of them (https://arxiv.org/abs/2306.15595). 'llama3' spares those that tell near tokens apart:
    with high_freq_factor or more turns in the original context they stay, with low_freq_factor or fewer they are
    divided, and it is a blend in between.
    """
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = frequencies * scaling["original_max_position_embeddings"] / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of x, (B, T, H, D), by its rotation: one complex product."""
    pairs = wide(x).unflatten(-1, (-1, 2))  # (B, T, H, D/2, 2)
    if torch.compiler.is_compiling():  # it knows no complex numbers, and fuses what makes one
        (a, b), (c, d) = pairs.unbind(-1), rotations.unbind(-1)  # (B, T, H, D/2), (B, T, 1, D/2)
        return torch.stack((a * c - b * d, a * d + b * c), dim=-1).flatten(-2).to(x.dtype)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations)).flatten(-2).to(x.dtype)


def rms_norm(channels: int, config: GPTConfig) -> nn.Module:
    return nn.RMSNorm(channels, eps=config.norm_eps, elementwise_affine=config.norm_weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: (..., C) to (..., N) by weight (N, C).

    For one token all the time goes into reading the weights, which matrix products do at half the speed of a CPU's
    memory, and less. A product and a sum, compiled to one loop, read them twice as fast.
    """
    if torch.compiler.is_compiling() and x.numel() == x.size(-1):
        y = (wide(weight) * wide(x).flatten()).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of this dtype on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by a weight (N, C) in oneDNN's own layout: see `GPT.prepack`."""
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")


# For the compiler, which cannot look into such a weight, an operator that it takes as it is
opaque_packed_linear = torch.library.custom_op("gpt::packed_linear", packed_linear, mutates_args=())
opaque_packed_linear.register_fake(lambda x, weight, bias=None: weight.new_empty(*x.shape[:-1], weight.size(0)))


class Linear(nn.Linear):
    packed = False  # the compiler does not see weight.is_mkldnn

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return linear(x, self.weight, self.bias)
        product = opaque_packed_linear if torch.compiler.is_compiling() else packed_linear
        return product(x, self.weight, self.bias)

    def prepack(self) -> None:
        weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        self.weight, self.packed = nn.Parameter(weight, requires_grad=False), True


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q @ k^T / sqrt(D)) @ v: queries (B, H, T, D), keys and values (B, G, S, D), to (B, H, T, D).

    mask, (B or 1, 1, T, S), is true where a query may attend; None is causal.
    """
    T, (G, D) = q.size(2), (k.size(1), k.size(3))
    if torch.compiler.is_compiling() and T == 1 and not dropout:  # as in `linear`: loops, for one token
        q = q.unflatten(1, (G, -1))  # (B, G, H/G, 1, D)
        scores = (wide(q) * wide(k)[:, :, None]).sum(-1) / D**0.5  # (B, G, H/G, S)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(-1)[..., None]  # (B, G, H/G, S, 1)
        return (weights * wide(v)[:, :, None]).sum(-2, keepdim=True).flatten(1, 2).to(v.dtype)  # (B, H, 1, D)
    causal = mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=q.size(1) > G)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim, bias=config.qkv_bias)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=config.qkv_bias)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=config.qkv_bias)
        self.c_proj = Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.q_norm = rms_norm(self.head_dim, config) if config.qk_norm else nn.Identity()
        self.k_norm = rms_norm(self.head_dim, config) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotations: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)  # (B, T, H, D)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)  # (B, T, G, D)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)  # (B, T, G, D)
        q, k = rotate(self.q_norm(q), rotations), rotate(self.k_norm(k), rotations)
        if cache is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, T, D)
        else:
            k, v = cache.update(k, v)  # (B, G, S, D)
        y = attention(q.transpose(1, 2), k, v, mask, self.dropout.p if self.training else 0.0)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, H, T, D) -> (B, T, H * D) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        n_hidden = config.n_hidden or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, n_hidden, bias=False)
        self.c_proj = Linear(n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c_fc(x))  # (B, T, M)
        return self.c_proj(x * x)  # (B, T, C); in the backward pass, x.square() takes twice the time


class SwiGLU(MLP):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.c_gate = Linear(config.n_embd, self.c_fc.out_features, bias=False)

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


# -----------------------------------------------------------------------------
# From logits to tokens


def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The logits (B, V) to draw from: divided by temperature, and -inf for the tokens that a filter takes out.

    The filters act one after the other, as Hugging Face's logits processors do; None or 0 switches one off.
    top_k keeps the k likeliest tokens, and those that tie with the last of them. top_p keeps the fewest tokens that
    together have the probability p (https://arxiv.org/abs/1904.09751). min_p keeps the tokens that are at least
    min_p times as likely as the likeliest (https://arxiv.org/abs/2407.01082).
    """
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
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
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token id for each row of logits, by `filter_logits`: (B, V) to (B,) int64. temperature=0 is argmax."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator).squeeze(-1)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens less likely that a row has seen, (B, V) bool: CTRL's penalty, https://arxiv.org/abs/1909.05858."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


class Lookup:
    """Decode that reads ahead (prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding).

    What followed the last tokens where they came before is guessed to follow again. The newest token and n guesses are
    read in one forward, for little more than the price of one; as long as what is then drawn is what was guessed, the
    next logits are there already. What was guessed wrong is forgotten. In place of `GPT._decode`, for one row.
    """

    def __init__(self, model: "GPT", kv_cache: KVCache, n: int, step: Callable | None = None) -> None:
        self.model, self.n, self.step = model, n, step
        self.length = int(kv_cache.lengths)  # what lies past it in the cache are guesses
        self.guesses: list[int] = []
        self.logits: list[Tensor] = []  # after each of them, (1, V)

    def __call__(self, ids: Tensor, kv_cache: KVCache, keep: Tensor) -> Tensor:
        self.length += 1
        if self.guesses and self.guesses.pop(0) == ids:
            return self.logits.pop(0)
        kv_cache.truncate(self.length - 1)
        room = min(self.model.config.sequence_len, kv_cache.max_len) - self.length
        guesses = self.guess(torch.cat((kv_cache.ids[0, : self.length - 1], ids)))[: max(room, 0)]
        self.guesses = guesses.tolist()
        if not self.guesses:
            logits = self.model._decode(ids, kv_cache, keep, self.step)
            self.length = int(kv_cache.lengths)
            return logits
        x = self.model.hidden(torch.cat((ids, guesses))[None], kv_cache)  # (1, 1 + n, C)
        first, *self.logits = self.model.logits(x[0]).split(1)
        return first

    def guess(self, text: Tensor) -> Tensor:
        """What came n tokens on from where the last three, or two, of text (S,) were last; it may run into itself."""
        for ngram in (3, 2):
            earlier = text[:-1].unfold(0, ngram, 1) if len(text) > ngram else text[:0, None]  # (S - ngram, ngram)
            found = (earlier == text[-ngram:]).all(dim=-1).nonzero()  # (matches, 1)
            if len(found):
                start = int(found[-1]) + ngram
                return text[start + torch.arange(self.n, device=text.device) % (len(text) - start)]
        return text[:0]


def cuda_graph(step: Callable, ids: Tensor, lengths: Tensor) -> Callable:
    """step(ids, lengths), recorded: what it returns launches it all at once, for other ids and lengths.

    torch.cuda.make_graphed_callables does the same, but its graphs live until the garbage collector comes, which must
    not be while the next one is recorded. The stream is the graph's own, since cuBLAS's workspace goes with it.
    """
    stream, graph = torch.cuda.Stream(ids.device), torch.cuda.CUDAGraph()
    with torch.cuda.device(ids.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and loads what cannot be loaded while recording
                step(ids, lengths)
        with torch.cuda.graph(graph, stream=stream):
            logits = step(ids, lengths)

    def replay(new_ids: Tensor, new_lengths: Tensor) -> Tensor:
        ids.copy_(new_ids)
        lengths.copy_(new_lengths)
        graph.replay()
        return logits

    return replay


class Graphs:
    """Decode on a GPU by CUDA graphs: one launch for all layers, in place of hundreds that take longer than these do.

    A graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) does again what was recorded, on the same
    memory and with the same shapes. So it attends to the first `size` positions of its cache under a mask, and when a
    row has outgrown them, one for twice as many is recorded. In place of `GPT._step`, for one cache.
    """

    def __init__(self, model: "GPT", shortest: int = 256) -> None:
        self.model, self.shortest, self.size = model, shortest, 0
        self.replay: Callable | None = None

    def __call__(self, ids: Tensor, kv_cache: KVCache) -> Tensor:
        """One token for each row, (B,), to logits (B, V), which hold until the next call."""
        longest = int(kv_cache.lengths.max())
        if self.replay is None or longest >= self.size:
            self.replay = None  # frees its memory
            self.replay = self.record(kv_cache, longest + 1)
        logits = self.replay(ids, kv_cache.lengths)
        kv_cache.commit(1)
        return logits

    def record(self, kv_cache: KVCache, length: int) -> Callable:
        """A step for rows of so many tokens, and more."""
        model, B, device = self.model, kv_cache.batch_size, kv_cache.k.device
        self.size = size = min(max(self.shortest, 2 ** (length - 1).bit_length()), kv_cache.max_len)
        for b, n in enumerate(kv_cache.lengths.tolist()):  # what is masked must be finite: see KVCache.begin
            kv_cache.k[:, b, :, n:size] = 0
            kv_cache.v[:, b, :, n:size] = 0

        def step(ids: Tensor, lengths: Tensor) -> Tensor:
            positions = lengths[:, None]  # (B, 1)
            slots = (torch.arange(B, device=device)[:, None], positions)
            kv_cache.ids[slots] = ids[:, None]
            mask = (torch.arange(size, device=device) <= positions[..., None])[:, None]  # (B, 1, 1, size)
            layers = kv_cache.layers(slots, size)
            x = model._read(ids[:, None], positions, mask, layers, model.compiled_block)  # (B, 1, C)
            return model.compiled_logits(model, x[:, -1])

        lengths = kv_cache.lengths.to(device, copy=True)
        return cuda_graph(step, torch.zeros_like(lengths), lengths)


def _only_row(steps: Generator[list[int | None], None, list[str]]) -> Generator[int, None, str]:
    """The one row of a batch of one."""
    try:
        while True:
            [token] = next(steps)
            assert token is not None
            yield token
    except StopIteration as end:
        return end.value[0]
    finally:
        steps.close()


# -----------------------------------------------------------------------------
# The optimizer of the matrices


def orthogonalize(G: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, U V^T for G = U S V^T, roughly: for each of a stack (N, rows, columns).

    Five steps of a Newton-Schulz iteration that pushes all singular values towards 1, whose coefficients are
    Polar Express's, each the best for what the steps before it leave (https://arxiv.org/abs/2505.16932).
    """
    X = G.mT if G.size(-2) > G.size(-1) else G  # the smaller side first: X X^T is as small as can be
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
    """MomentUm Orthogonalized by Newton-schulz (https://kellerjordan.github.io/posts/muon), for matrices.

    `torch.optim.Muon` takes the matrices one by one; here those of one shape, a group's, are stacked, and the few
    large products that this makes cost a fraction of the many small ones. Where parameters are sharded (`fully_shard`),
    so is the work: the processes exchange rows for whole matrices, and back.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
            updates: Any = torch.stack(nesterov)  # (N, rows, columns)
            rows, columns = updates.shape[-2:]
            sharded = getattr(updates, "placements", None)  # by FSDP: each process has some rows of every matrix,
            if sharded:  # and what it needs is some matrices with all their rows
                from torch.distributed.tensor import Shard

                updates = updates.redistribute(placements=[Shard(0)])
            if updates.is_cuda:
                updates = updates.bfloat16()  # precise enough, and several times faster there
            updates = orthogonalize(updates).to(params[0].dtype) * max(1, rows / columns) ** 0.5
            if sharded:
                updates = updates.redistribute(placements=sharded)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates.unbind(), alpha=-group["lr"])


# -----------------------------------------------------------------------------
# The loss over a large vocabulary


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """Logits in at least float32, within +-softcap; 0 switches the cap off."""
    logits = wide(logits)
    return torch.tanh(logits / softcap) * softcap if softcap else logits


LOGITS_AT_A_TIME = 2**24


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of hidden states x (N, C) under a head (V, C) for targets (N,), where -1 is ignored.

    Logits (N, V) with their gradient are the largest thing in a training step, so they are made some rows at a time,
    and all that is to be known of them is computed while they are there: the loss, and what it passes back. For the
    logits of a row, s = cap tanh(z / cap), z = W x: dloss/ds = softmax(s) - onehot(target), ds/dz = 1 - (s / cap)^2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        backward = any(ctx.needs_input_grad)
        dx: Any = torch.empty_like(x) if backward else None
        dhead: Any = torch.zeros_like(head) if backward else None
        rows = max(1, LOGITS_AT_A_TIME // len(head))
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        weights = (targets != -1).to(loss.dtype)[:, None]  # (N, 1)
        weights /= weights.sum()
        product = packed_linear if head.is_mkldnn else F.linear
        for i in range(0, len(x), rows):
            chunk, w = x[i : i + rows], weights[i : i + rows]  # (R, C), (R, 1)
            target = targets[i : i + rows, None].clamp(min=0)  # (R, 1)
            logits = softcapped(product(chunk, head), softcap)  # (R, C) @ (C, V) -> (R, V)
            logp = logits.log_softmax(dim=-1)
            loss -= (logp.gather(1, target) * w).sum()
            if backward:
                d = logp.exp_().scatter_add_(1, target, torch.full_like(w, -1)).mul_(w)  # (R, V)
                if softcap:
                    d = torch.addcmul(d, d, logits.div_(softcap).square_(), value=-1)
                dx[i : i + rows] = d.to(x.dtype) @ head  # (R, V) @ (V, C) -> (R, C)
                dhead += d.to(x.dtype).mT @ chunk  # (V, R) @ (R, C) -> (V, C)
        if backward:
            ctx.save_for_backward(dx, dhead)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dhead = ctx.saved_tensors
        return dx * grad, dhead * grad, None, None


# -----------------------------------------------------------------------------
# The model

PREFILL_AT_A_TIME = 1024  # tokens of each row


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.embd_norm = rms_norm(config.n_embd, config) if config.embd_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = rms_norm(config.n_embd, config)
        self.lm_head = None if config.tie_embd else Linear(config.n_embd, config.vocab_size, bias=False)
        self.activation_checkpointing = False  # True: training keeps only what goes into a block, and computes it twice
        self.compiled_block: Callable | None = None  # for decode: see compile_decode
        self.compiled_logits: Callable = GPT.logits
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Each block starts as the identity, and the head as nearly nothing: the first loss is ln(vocab_size)."""
        bound = math.sqrt(3 / self.config.n_embd)  # uniform in +-bound has a standard deviation of 1 / sqrt(n_embd)
        for name, weight in self.named_parameters():
            if weight is self.head_weight:
                nn.init.normal_(weight, std=0.001)
            elif name == "wte.weight":
                nn.init.normal_(weight, std=1.0)
            elif name.endswith("norm.weight"):
                nn.init.ones_(weight)
            elif name.endswith(("c_proj.weight", "bias")):
                nn.init.zeros_(weight)
            else:
                nn.init.uniform_(weight, -bound, bound)

    @property
    def head_weight(self) -> Tensor:
        """The matrix of the head, (V, C): with tie_embd, the embedding's."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.wte.weight.dtype

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    # ---- forward

    def hidden(self, idx: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """All but the head: idx (B, T) int64 to (B, T, C)."""
        B, T = idx.shape
        past = 0 if kv_cache is None else int(kv_cache.lengths.max())
        if past + T > self.config.sequence_len:
            raise ValueError(f"{past + T} tokens are more than sequence_len {self.config.sequence_len}")
        # 0 and 1 are numbers of their own to the compiler, and so is a full cache: those would be compiled apart
        compiled = self.compiled_block if T == 1 and kv_cache and 0 < past < kv_cache.max_len - 1 else None
        if kv_cache is None:
            positions = torch.arange(T, device=idx.device)[None]  # (1, T)
            return self._read(idx, positions, None, [None] * len(self.h), None)
        self._check_cache(kv_cache, B)
        positions, mask, layers = kv_cache.begin(idx, bool(compiled))  # (B or 1, T), (B or 1, 1, T, S)
        x = self._read(idx, positions, mask, layers, compiled)
        kv_cache.commit(T)
        return x

    def _read(
        self,
        idx: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        layers: Sequence[LayerCache | None],
        compiled: Callable | None,
    ) -> Tensor:
        """`hidden`, when it is known where the tokens stand, (B or 1, T), what they may attend to, and by what code."""
        rotations = rope(positions, self.config, self.dtype)
        x = self.dropout(self.embd_norm(self.wte(idx)))  # (B, T, C)
        for block, layer in zip(self.h, layers, strict=True):
            if compiled:
                x = compiled(block, x, rotations, mask, layer)
            elif self.activation_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rotations, mask, layer, use_reentrant=False)
            else:
                x = block(x, rotations, mask, layer)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """The head: (..., C) to (..., V), in at least float32, within +-softcap."""
        logits = linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)
        return softcapped(logits, self.config.softcap)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: KVCache | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Logits (B, T, V) for idx (B, T) int64; with targets (B, T), where -1 is ignored, their cross entropy.

        The loss, in nats, is a scalar, or (B*T,) with loss_reduction='none'. With a cache, idx is what comes after
        what the cache holds. ValueError if that is more than sequence_len, or more than the cache has room for.
        """
        x = self.hidden(idx, kv_cache)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        if loss_reduction == "mean":
            return HeadLoss.apply(x.flatten(0, 1), self.head_weight, targets.flatten(), self.config.softcap)
        logits = self.logits(x).flatten(0, 1)  # (B*T, V)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction=loss_reduction)

    def _check_cache(self, kv_cache: KVCache, B: int) -> None:
        c, k = self.config, kv_cache.k
        have, want = (*k.shape[:3], k.size(4)), (c.n_layer, B, c.n_kv_head, c.head_dim)
        if have != want:
            raise ValueError(f"a KVCache of n_layer, batch_size, n_kv_head, head_dim {have} where {want} is needed")
        if (k.dtype, k.device) != (self.dtype, self.device):
            raise ValueError(f"a KVCache of {k.dtype} on {k.device} for a model of {self.dtype} on {self.device}")

    # ---- generate

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
        lookup: int = 0,
    ) -> Generator[int, None, str]:
        """Go on from tokens: yields one id at a time, and returns why it ended, 'length' or 'stop'.

        A token of stop_tokens is yielded, then ends it; suppress_tokens are never drawn. The same seed gives the same
        tokens; temperature=0 takes the likeliest. For the filters, see `filter_logits`; a repetition_penalty above 1
        makes less likely what was said, the prompt included. The model is in eval mode while this runs.

        When sequence_len is full, the last half of the window (sequence_len // 2 tokens, the newest included) is read
        anew and it goes on from there; of a longer prompt the last sequence_len tokens are read.

        With a kv_cache, tokens are what comes after what it holds, and all that is said stays in it: the next turn of
        a conversation reads only what is new. With lookup=N the next N tokens are guessed from what came before and
        read at once (`Lookup`): the same tokens, but for ties within rounding, sooner where the text repeats.

        ValueError for an empty prompt, an id outside the vocabulary, a setting out of its range, or a cache that is too
        small or another model's.
        """
        filters = (temperature, top_k, top_p, min_p)
        steps = self.generate_batch(
            [tokens], max_tokens, 1, *filters, repetition_penalty, stop_tokens, seed, suppress_tokens, kv_cache, lookup
        )
        return _only_row(steps)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        num_samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] = (),
        seed: int = 42,
        suppress_tokens: Sequence[int] = (),
        kv_cache: KVCache | None = None,
        lookup: int = 0,
    ) -> Generator[list[int | None], None, list[str]]:
        """`generate` for prompts of any lengths at once, num_samples rows for each, next to each other.

        Yields a list per step, an id for each row, or None for a row that has ended; returns the list of reasons.
        A row's greedy tokens are what it would get alone. A kv_cache has a row for each prompt, and num_samples is 1.
        Only one row can look ahead by lookup.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("the prompt is empty: generation needs at least one token to go on from")
        for token in {token for tokens in (*prompts, suppress_tokens) for token in tokens}:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.config.vocab_size}")
        limits = {
            "max_tokens": (max_tokens >= 0, max_tokens, "at least 0"),
            "num_samples": (num_samples >= 1, num_samples, "at least 1"),
            "temperature": (temperature == 0 or 1e-30 < temperature < 1e30, temperature, "0, or positive and finite"),
            "top_k": (not top_k or top_k >= 1, top_k, "at least 1, or 0 for no limit"),
            "top_p": (not top_p or 0 < top_p <= 1, top_p, "in (0, 1], or 0 for no limit"),
            "min_p": (not min_p or 0 < min_p < 1, min_p, "in (0, 1), or 0 for no limit"),
            "repetition_penalty": (repetition_penalty > 0, repetition_penalty, "above 0"),
            "lookup": (lookup >= 0, lookup, "at least 0"),
            "seed": (-(2**63) <= seed < 2**63, seed, "an integer of 64 bits"),
        }
        for name, (ok, value, rule) in limits.items():
            if not ok:
                raise ValueError(f"{name} must be {rule}, not {value}")
        if len(set(suppress_tokens)) == self.config.vocab_size:
            raise ValueError("suppress_tokens leaves no token to draw")
        if lookup and len(prompts) * num_samples > 1:
            raise ValueError(f"lookup reads ahead in one row: it cannot in {len(prompts) * num_samples}")
        longest = max(map(len, prompts))
        if kv_cache is not None:
            self._check_cache(kv_cache, len(prompts))
            if num_samples > 1:
                raise ValueError(f"num_samples must be 1 to go on from a kv_cache, not {num_samples}")
            longest += int(kv_cache.lengths.max())
        max_len = min(self.config.sequence_len, longest + max_tokens)
        if kv_cache is not None and kv_cache.max_len < max_len:
            raise ValueError(f"a KVCache of {kv_cache.max_len} tokens is too small: this needs {max_len}")

        @torch.inference_mode()
        def steps() -> Generator[list[int | None], None, list[str]]:
            generator = torch.Generator(self.device).manual_seed(seed)
            cache = kv_cache or KVCache(self.config, len(prompts), max_len, self.device, self.dtype)
            ids: Tensor | None = None  # what was drawn and is not in the cache yet
            was_training = self.training
            self.eval()
            try:
                texts = [past + list(prompt) for past, prompt in zip(cache.tokens(), prompts, strict=True)]
                logits = self._prefill(prompts, cache)  # (B, V)
                if num_samples > 1:
                    cache, logits = cache.expand(num_samples), logits.repeat_interleave(num_samples, dim=0)
                B = logits.size(0)
                seen = torch.zeros_like(logits, dtype=torch.bool)  # (B, V)
                for b in range(B):
                    seen[b, texts[b // num_samples]] = True
                reasons, running = ["length"] * B, set(range(B))
                keep = torch.ones(B, dtype=torch.bool)  # whose tokens stay: up to and with a row's stop token
                graphs = Graphs(self) if self.compiled_block and self.device.type == "cuda" else None
                ahead = Lookup(self, cache, lookup, graphs) if lookup else None
                decode = ahead or partial(self._decode, step=graphs)

                for _ in range(max_tokens):
                    if ids is not None:
                        logits, ids = decode(ids, cache, keep), None
                        if kv_cache is not None:
                            keep = torch.tensor([b in running for b in range(B)])
                    if repetition_penalty != 1:
                        logits = penalize(logits, seen, repetition_penalty)
                    if suppress_tokens:
                        logits[:, list(suppress_tokens)] = -math.inf
                    ids = sample(logits, temperature, top_k, top_p, min_p, generator)  # (B,)
                    seen.scatter_(1, ids[:, None], True)
                    new = ids.tolist()
                    yield [new[b] if b in running else None for b in range(B)]
                    for b in [b for b in running if new[b] in stop_tokens]:
                        reasons[b] = "stop"
                        running.remove(b)
                    if not running:
                        break
                return reasons
            finally:  # also when the caller walks away
                try:
                    if kv_cache is not None and ids is not None:
                        decode(ids, cache, keep)
                        if ahead:
                            cache.truncate(ahead.length)
                finally:
                    self.train(was_training)

        return steps()

    def _prefill(self, prompts: Sequence[Sequence[int]], kv_cache: KVCache) -> Tensor:
        """Read prompts of any lengths after what the cache holds; returns the last logits, (B, V).

        If that is more than sequence_len, the last sequence_len tokens of each row are read from the start. Shorter
        prompts are padded on the right: causality keeps the padding away from real tokens, and then it is forgotten.
        Long ones are read in chunks, so that what a layer needs stays small.
        """
        window = self.config.sequence_len
        if int(kv_cache.lengths.max()) + max(map(len, prompts)) > window:
            texts = [past + list(prompt) for past, prompt in zip(kv_cache.tokens(), prompts, strict=True)]
            prompts = [text[-window:] for text in texts]
            kv_cache.reset()
        new = torch.tensor([len(prompt) for prompt in prompts])
        idx = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)  # (B, T)
        lengths = kv_cache.lengths + new
        last = torch.empty(len(prompts), self.config.n_embd, device=self.device, dtype=self.dtype)  # (B, C)
        for start in range(0, idx.size(1), PREFILL_AT_A_TIME):
            x = self.hidden(idx[:, start : start + PREFILL_AT_A_TIME].to(self.device), kv_cache)  # (B, <= T, C)
            [ends] = ((start < new) & (new <= start + x.size(1))).nonzero(as_tuple=True)  # the rows that end in here
            last[ends] = x[ends, new[ends] - start - 1]
        kv_cache.truncate(lengths)
        return self.logits(last)

    def _decode(self, ids: Tensor, kv_cache: KVCache, keep: Tensor, step: Callable | None = None) -> Tensor:
        """Read one more token for each row, (B,); returns the logits of what comes after, (B, V).

        A row that is full starts anew, with the last half of its window. Rows where keep, (B,) bool, is false have
        ended: theirs is read with the others', and forgotten.
        """
        window = self.config.sequence_len
        for b, length in enumerate(kv_cache.lengths.tolist()):
            if length == window:
                row = kv_cache.row(b)
                tail = row.ids[:, window - max(1, window // 2) + 1 : window].clone()  # the newest is in ids
                row.reset()
                if tail.numel():
                    self.hidden(tail, row)
        logits = (step or self._step)(ids, kv_cache)
        if not keep.all():
            kv_cache.truncate(kv_cache.lengths - (~keep).long())
        return logits

    def _step(self, ids: Tensor, kv_cache: KVCache) -> Tensor:
        return self.compiled_logits(self, self.hidden(ids[:, None], kv_cache)[:, -1])  # (B, 1) -> (B, C) -> (B, V)

    def compile_decode(self) -> None:
        """Have torch.compile speed up what reads one token for each row with a cache; the rest stays as it is.

        The blocks share their code, which is compiled at the first token (and once more for a batch, or rows of
        different lengths), and holds for any length of the cache. On a GPU `generate` makes CUDA graphs of it, and it
        is compiled once more for one that attends to the whole of its cache.
        """
        self.compiled_block = torch.compile(Block.forward, dynamic=True)
        self.compiled_logits = torch.compile(GPT.logits, dynamic=True)

    def prepack(self) -> None:
        """For inference on a CPU: lay the matrices out as oneDNN multiplies by them, which else each product does anew.

        All gets faster but the decode of one row when it is compiled. It takes no more memory, but for a tied head,
        which becomes a second copy of the embedding. There is no way back: what is packed can be neither trained nor
        saved, moved nor cast. On another device, and in a dtype that oneDNN does not multiply here, nothing happens.
        """
        if not packs(self.device, self.dtype):
            return
        self.requires_grad_(False)
        if self.lm_head is None:
            self.lm_head = Linear(self.config.n_embd, self.config.vocab_size, bias=False, device="meta")
            self.lm_head.weight = self.wte.weight
        for module in self.modules():
            if isinstance(module, Linear) and not module.packed:
                module.prepack()

    # ---- checkpoints

    def save(self, path: Path, **extra: Any) -> None:
        """Write weights, config and extra (tensors and plain Python values) to path: whole, or not at all."""
        if self.head_weight.is_mkldnn:
            raise RuntimeError("a packed model cannot be saved: save it before prepack()")
        temporary = f"{os.fspath(path)}.tmp"
        try:
            with open(temporary, "wb") as f:
                torch.save({"model": self.state_dict(), "config": asdict(self.config), **extra}, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            if os.name == "posix":  # the new name is on the disk once the folder is
                folder = os.open(os.path.dirname(temporary) or ".", os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        except BaseException:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise

    @classmethod
    def load(cls, path: Path, device: Device = None, dtype: torch.dtype | None = None) -> "GPT":
        """The model that `save` wrote, in eval mode. OSError if there is none, RuntimeError if it is damaged."""
        return cls.load_checkpoint(path, device, dtype)[0]

    @classmethod
    def load_checkpoint(
        cls, path: Path, device: Device = None, dtype: torch.dtype | None = None
    ) -> tuple["GPT", dict[str, Any]]:
        """Like `load`, with the extra that was saved. Runs no code from the file (weights_only)."""
        with open(path, "rb") as f:
            try:
                checkpoint = torch.load(f, map_location=device or "cpu", weights_only=True)
                with torch.device("meta"):  # no memory and no time for initial values
                    model = cls(GPTConfig(**checkpoint.pop("config")))
                model.load_state_dict(checkpoint.pop("model"), assign=True)
            except Exception as e:  # a damaged file can fail in any way: in zip, pickle, a missing key, a shape
                raise RuntimeError(f"{os.fspath(path)} is not a checkpoint of a GPT, or is damaged") from e
        return model.to(dtype=dtype).eval(), checkpoint

    # ---- training

    def configure_optimizers(
        self,
        learning_rate: float = 0.02,
        embd_lr: float = 0.3,
        head_lr: float = 0.004,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.8, 0.95),
        optimizer: str = "muon",
    ) -> list[torch.optim.Optimizer]:
        """[Muon for the blocks' matrices, AdamW for the rest]: each parameter is in exactly one group.

        learning_rate and weight_decay are the matrices', momentum is Muon's. With optimizer='adamw' AdamW has the
        matrices too: its step is cheap, which counts where a step has few tokens, and wants a lower learning_rate.
        Gains, biases and a tied embedding move at head_lr. Every group remembers its rate as `initial_lr`, for a
        schedule to scale.
        """
        matrices: dict[torch.Size, list[nn.Parameter]] = {}
        for p in self.h.parameters():
            if p.ndim == 2:
                matrices.setdefault(p.shape, []).append(p)
        stacks = [dict(params=params, lr=learning_rate, weight_decay=weight_decay) for params in matrices.values()]
        rates = {self.wte.weight: embd_lr, self.head_weight: head_lr}  # one and the same, if tied
        others = [dict(params=[table], lr=lr) for table, lr in rates.items()]
        vectors = [p for p in self.parameters() if p.ndim == 1]
        if vectors:
            others.append(dict(params=vectors, lr=head_lr))
        adamw = partial(torch.optim.AdamW, betas=betas, eps=1e-10, weight_decay=0.0, fused=True)
        if optimizer == "muon":
            optimizers = [Muon(stacks, learning_rate, momentum), adamw(others)]
        elif optimizer == "adamw":
            optimizers = [adamw(stacks + others)]
        else:
            raise ValueError(f"optimizer must be muon or adamw, not {optimizer!r}")
        for group in (group for each in optimizers for group in each.param_groups):
            group["initial_lr"] = group["lr"]
        return optimizers

    def flops_per_token(self) -> int:
        """Of a training step, forward and backward, at sequence_len: PaLM's formula, https://arxiv.org/abs/2204.02311.

        Six for each weight that multiplies (so not an embedding that is not the head too), and 12 T H D a layer for
        the attention scores.
        """
        c = self.config
        H, _, D = c.heads
        looked_up = 0 if self.lm_head is None else self.wte.weight.numel()
        return 6 * (self.num_params() - looked_up) + 12 * c.n_layer * H * D * c.sequence_len

    def estimate_mfu(self, tokens_per_second: float, peak_flops: float) -> float:
        """Model FLOPs utilization of training: the share of the device's peak_flops (per second) that is put to use."""
        return self.flops_per_token() * tokens_per_second / peak_flops


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; auto is the accelerator, if any, else the CPU. ValueError if PyTorch finds it not."""
    try:
        if name == "auto":
            return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        if name != "meta":
            return torch.empty(0, device=name).device
        raise RuntimeError("holds no data")
    except (RuntimeError, AssertionError, ImportError) as e:
        raise ValueError(f"PyTorch finds no device {name!r} here") from e

"""A whole GPT in one file: configuration, layers, KV cache, sampling, loss and the model. It needs PyTorch alone.

The default architecture is nanochat's (https://github.com/karpathy/nanochat), Hugging Face's `NanoChatForCausalLM`:
- rotary position embeddings (https://arxiv.org/abs/2104.09864)
- grouped-query attention (https://arxiv.org/abs/2305.13245) with QK-norm (https://arxiv.org/abs/2010.04245)
- RMSNorm without gains (https://arxiv.org/abs/1910.07467) before each sublayer, after the embedding, before the head
- an MLP with ReLU squared (https://arxiv.org/abs/2109.08668), no biases, an untied head
- logits softcapped in float32 (Gemma 2, https://arxiv.org/abs/2408.00118)
Switches in the config make it GPT-2, Llama, Mistral, Qwen or SmolLM3.

Shapes in the comments: B rows, T new tokens, S tokens to attend to, C = n_embd, H query heads and G key/value heads of
D channels each, M = n_hidden, V = vocab_size. The file knows token ids and no text.
"""

import math
import os
import threading
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
LayerCache: TypeAlias = tuple[Tensor, Tensor, tuple, int]  # keys, values (B, max_len, G, D); new tokens' slots; S
Decoder: TypeAlias = Callable[[Tensor, "KVCache"], Tensor]  # reads ids (B,) into a cache, returns logits (B, V)

PREFILL_CHUNK = 1024  # tokens of each row in one forward of a prefill; bounds the memory for activations
MODE_LOCK = threading.RLock()  # held while a generator switches its model between train and eval mode
ROPE_SCALINGS = {  # the numbers that each rope_type takes, by Hugging Face's names
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def integer(name: str, x: Any, least: int, most: int = 2**63 - 1) -> int:
    """x as an int, from NumPy or a tensor too. ValueError if it is something else, or outside least to most."""
    scalar = hasattr(x, "__index__") and type(x) is not bool and not getattr(x, "ndim", 0)
    check(scalar and least <= x.__index__() <= most, f"{name} must be a whole number from {least} to {most}, not {x!r}")
    return x.__index__()


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
    mlp: str = "relu2"  # relu2, gelu, gelu_tanh (two matrices) or swiglu (three, one of them the gate)
    qk_norm: bool = True  # a norm of queries and keys
    embd_norm: bool = True  # a norm of the embedding
    norm: str = "rms"  # rms (RMSNorm) or layer (LayerNorm)
    norm_weight: bool = False  # learned gains in every norm
    bias: bool = False  # biases in all linear layers but the head, and in every LayerNorm
    qkv_bias: bool = False  # biases of queries, keys and values alone
    positions: str = "rotary"  # rotary, or learned: an embedding of each position
    layer_types: str = "F"  # of each layer, repeated: F (full attention), S (sliding window), N (full, no positions)
    sliding_window: int | None = None  # tokens that an S layer attends to, itself included; None means all
    tie_embd: bool = False  # share one matrix between embedding and head
    dropout: float = 0.0  # probability of zeroing an activation in training
    softcap: float = 15.0  # bound on the logits, softcap * tanh(logits / softcap); 0 switches it off
    rope_base: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: dict | None = None  # {"rope_type": "linear", "factor": 2.0}, or "llama3" with its four numbers
    norm_eps: float = 1e-6  # added to the mean square, or the variance, in a norm
    heads = property(lambda self: (self.n_head, self.n_kv_head, self.head_dim))  # (H, G, D)

    def __post_init__(self) -> None:
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.n_hidden = 4 * self.n_embd if self.n_hidden is None else self.n_hidden
        for name, kind in self.__annotations__.items():
            if kind in (int, int | None) and (size := getattr(self, name)) is not None:
                setattr(self, name, integer(name, size, 1, 10_000 if name == "n_layer" else 2**31 - 1))
        H, G, C = self.n_head, self.n_kv_head, self.n_embd
        if self.head_dim is None:
            check(C % H == 0, f"n_embd {C} must be divisible by n_head {H}, or give head_dim")
            self.head_dim = C // H
        check(H % G == 0, f"n_head {H} must be divisible by n_kv_head {G}")
        for name, choices in (("mlp", ACTIVATIONS), ("norm", ("rms", "layer")), ("positions", ("rotary", "learned"))):
            value = getattr(self, name)
            check(value in choices, f"{name} must be {' or '.join(choices)}, not {value!r}")
        even = (D := self.head_dim) % 2 == 0 or self.positions == "learned"
        check(even, f"head_dim {D} must be even for RoPE (n_embd {C}, n_head {H})")
        check(bool(t := self.layer_types) and {*t} <= {*"FSN"}, f"layer_types must be letters F, S or N, not {t!r}")
        self.layer_types = (t * self.n_layer)[: self.n_layer]
        check(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")
        ok = min(self.softcap, self.norm_eps) >= 0 and self.rope_base > 0
        check(ok, f"negative softcap {self.softcap}, norm_eps {self.norm_eps} or rope_base {self.rope_base}")
        if self.rope_scaling is None:
            return
        numbers = {**self.rope_scaling}
        wanted = ROPE_SCALINGS.get(str(rope_type := numbers.pop("rope_type", None)), ())
        check(bool(wanted), f"rope_scaling: rope_type must be one of {', '.join(ROPE_SCALINGS)}, not {rope_type!r}")
        ok = {*numbers} == {*wanted} and all(type(x) in (int, float) and 0 < x < math.inf for x in numbers.values())
        check(ok, f"rope_scaling {rope_type!r} takes positive numbers {wanted}, not {numbers or 'nothing'}")
        low, high = numbers.get("low_freq_factor", 0), numbers.get("high_freq_factor", 1)
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
    factor, low, high, context = (scaling.get(key, 1.0) for key in ROPE_SCALINGS["llama3"])
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    turns = frequencies * context / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate neighbouring channels of x (B, T, H, D) as complex numbers, by rotations (B or 1, T, 1, D/2, 2)."""
    pairs = in_float32(x).unflatten(-1, (-1, 2))  # (B, T, H, D/2, 2)
    rotated = torch.view_as_complex(pairs) * torch.view_as_complex(rotations)  # (B, T, H, D/2)
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)  # (B, T, H, D)


def make_norm(channels: int, config: GPTConfig) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(channels, config.norm_eps, config.norm_weight, config.bias)
    return nn.RMSNorm(channels, config.norm_eps, config.norm_weight)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, (H, G, D) = config.n_embd, config.heads
        self.head_dim, self.gqa, self.dropout = D, G < H, nn.Dropout(config.dropout)
        self.c_q, self.c_k, self.c_v = (nn.Linear(C, n * D, config.bias or config.qkv_bias) for n in (H, G, G))
        self.c_proj = nn.Linear(H * D, C, config.bias)
        self.q_norm, self.k_norm = (make_norm(D, config) if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rotations: Tensor | None, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.head_dim) for f in (self.c_q, self.c_k, self.c_v))  # (B, T, H or G, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotations is not None:
            q, k = rotate(q, rotations), rotate(k, rotations)
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


def relu2(x: Tensor) -> Tensor:
    x = F.relu(x)
    return x * x  # the backward pass of x.square() takes twice the time


ACTIVATIONS: dict[str, Callable] = {"relu2": relu2, "gelu": F.gelu, "gelu_tanh": nn.GELU("tanh"), "swiglu": F.silu}


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        n_hidden = config.n_hidden or 4 * config.n_embd
        self.activation = ACTIVATIONS[config.mlp]
        self.c_fc = nn.Linear(config.n_embd, n_hidden, config.bias)
        self.c_proj = nn.Linear(n_hidden, config.n_embd, config.bias)
        self.c_gate = nn.Linear(config.n_embd, n_hidden, config.bias) if config.mlp == "swiglu" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x)) if self.c_gate is None else self.activation(self.c_gate(x)) * self.c_fc(x)
        return self.c_proj(x)  # (B, T, M) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = make_norm(config.n_embd, config)
        self.attn = Attention(config)
        self.mlp_norm = make_norm(config.n_embd, config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotations: Tensor | None, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), rotations, mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def visible(positions: Tensor, S: int, window: int | None = None) -> Tensor:
    """The mask of queries at positions (B or 1, T) over S slots, (B or 1, 1, T, S): true for the last window tokens."""
    distance = positions[..., None] - torch.arange(S, device=positions.device)  # (B or 1, T, S)
    return ((distance >= 0) & (distance < (window or S)))[:, None]


# ---- KV cache ----
class KVCache:
    """Keys and values of all layers, allocated once and written in place. Row b holds `lengths[b]` tokens, `ids[b]`.

    `lengths` (B,) is on the CPU: reading it never waits for the device. The caller owns the cache, `GPT.forward`
    appends to it, and no gradient flows through it.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, device: Device = None, dtype: Dtype = None):
        _, G, D = config.heads
        shape = (config.n_layer, batch_size, G, max_len, D)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.ids = torch.zeros(batch_size, max_len, device=device, dtype=torch.long)
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        self.batch_size, self.max_len = batch_size, max_len

    nbytes = property(lambda self: self.k.nbytes + self.v.nbytes)  # 2 * n_layer * B * G * max_len * D * dtype's bytes

    def __repr__(self) -> str:
        return f"KVCache({self.lengths.tolist()} of {self.max_len} tokens, {self.k.dtype}, {self.nbytes / 1e6:.1f} MB)"

    def begin(self, idx: Tensor) -> tuple[Tensor, Tensor | None, list[LayerCache]]:
        """Make room for tokens idx (B, T). ValueError, before anything is written, if there is too little.

        Returns positions (B or 1, T), the mask (B or 1, 1, T, S) or None for causal, and the cache of each layer.
        """
        T, longest, device = idx.size(1), int(self.lengths.max()), self.k.device
        ragged, end = int(self.lengths.min()) < longest, longest + T
        check(end <= self.max_len, f"{end} tokens do not fit into a KVCache of {self.max_len} ({longest} + {T} new)")
        positions = (self.lengths[: None if ragged else 1, None] + torch.arange(T)).to(device)  # (B or 1, T)
        slots: tuple = (slice(None), slice(longest, end))
        if ragged:
            slots = (torch.arange(self.batch_size, device=device)[:, None], positions)
            # Shorter rows leave slots here that are masked: their attention weight is 0, but 0 * NaN is NaN
            self.k[:, :, :, longest:end], self.v[:, :, :, longest:end] = 0, 0
        self.ids[slots] = idx
        mask = visible(positions, end) if ragged or (T > 1 and longest > 0) else None
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
    seed: int | None = 42  # the same seed gives the same tokens; None draws others each time
    suppress_tokens: Iterable[int] = ()  # never drawn

    def __post_init__(self) -> None:
        check((t := self.temperature) == 0 or 1e-30 < t < 1e30, f"temperature must be 0 or a positive number, not {t}")
        integer("top_k", 0 if self.top_k is None else self.top_k, 0)
        check(not self.top_p or 0 < self.top_p <= 1, f"top_p must be in (0, 1], or 0 for no limit, not {self.top_p}")
        check(not self.min_p or 0 < self.min_p < 1, f"min_p must be in (0, 1), or 0 for no limit, not {self.min_p}")
        check(self.repetition_penalty > 0, f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        integer("seed", self.seed or 0, -(2**63))

    def filter(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits (B, V) after penalty, temperature and filters, which set tokens to -inf; seen is (B, V) bool."""
        if seen is not None and (penalty := self.repetition_penalty) != 1:
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
        """A token id for each row of logits: (B, V) to (B,) int64. RuntimeError if NaN or infinity is among them."""
        if not logits.amax(dim=-1).isfinite().all():
            raise RuntimeError("the logits are not finite: the weights are damaged, or too large for their dtype")
        logits = self.filter(logits, seen)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def sample(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 0, min_p: float = 0, generator: Any = None
) -> Tensor:
    """Draw a token id for each row of logits: (B, V) to (B,) int64. See `Sampling`."""
    return Sampling(temperature, top_k, top_p, min_p).draw(logits, generator)


# ---- the model ----
def cross_entropy(model: "GPT", x: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross entropy of hidden states x (N, C) for targets (N,), with -1 ignored. sologpt/loss.py does it in chunks."""
    return F.cross_entropy(model.logits(x), targets, ignore_index=-1, reduction=reduction)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        V, T, C = config.vocab_size, config.sequence_len, config.n_embd
        self.wte, wpe = (nn.Embedding.from_pretrained(torch.empty(n, C), freeze=False) for n in (V, T))
        self.wpe = wpe if config.positions == "learned" else None
        self.embd_norm = make_norm(C, config) if config.embd_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = make_norm(C, config)
        self.lm_head = None if config.tie_embd else nn.Linear(C, V, bias=False)
        self.loss: Callable[..., Tensor] = cross_entropy
        self.modes: list[bool] = []  # train or not, before each generator that is in `evaluating`
        if self.device.type != "meta":  # which has no memory to fill
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every block starts as the identity and the head near zero, so the first loss is ln(vocab_size)."""
        bound = math.sqrt(3 / self.config.n_embd)  # uniform in +-bound has standard deviation 1 / sqrt(n_embd)
        table: dict[Any, Callable] = {  # by the end of the parameter's name; the first match counts
            ("wte.weight", "wpe.weight"): partial(nn.init.normal_, std=0.001 if self.config.tie_embd else 1.0),
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
        lookups = sum(t.weight.numel() for t in (self.wpe, None if c.tie_embd else self.wte) if t)  # no matmuls
        return 6 * (self.num_params() - lookups) + 12 * c.n_layer * H * D * c.sequence_len

    def estimate_mfu(self, tokens_per_second: float, peak_flops: float) -> float:
        """Model FLOPs utilization of training: achieved FLOPs per second over the device's peak_flops."""
        return self.flops_per_token() * tokens_per_second / peak_flops

    def by_layer_type(self, positions: Tensor, mask: Tensor | None, S: int) -> dict[str, Any]:
        """(rotations, mask) of each layer type, for queries at positions (B or 1, T) over S slots."""
        rotations = None if self.wpe else rope(positions, self.config, self.dtype)
        recent = visible(positions, S, n) if (n := self.config.sliding_window) and n < S else mask
        return {"F": (rotations, mask), "S": (rotations, recent), "N": (None, mask)}

    def hidden(self, idx: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """All layers but the head: idx (B, T) int64 to (B, T, C)."""
        check(idx.ndim == 2, f"idx must be (B, T), not {tuple(idx.shape)}")
        B, T = idx.shape
        past = 0 if kv_cache is None else int(kv_cache.lengths.max())
        check(past + T <= (n := self.config.sequence_len), f"{past + T} tokens are more than sequence_len {n}")
        positions, mask = torch.arange(T, device=idx.device)[None], None  # (1, T)
        layers: Sequence[LayerCache | None] = [None] * len(self.h)
        if kv_cache is not None:
            self.check_cache(kv_cache, B)
            positions, mask, layers = kv_cache.begin(idx)  # (B or 1, T), (B or 1, 1, T, S)
        types = self.by_layer_type(positions, mask, past + T)
        x = self.wte(idx) + self.wpe(positions) if self.wpe else self.wte(idx)  # (B, T, C)
        x = self.dropout(self.embd_norm(x))
        for block, layer, kind in zip(self.h, layers, self.config.layer_types, strict=True):
            x = block(x, *types[kind], layer)
        if kv_cache is not None:
            kv_cache.lengths += T
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """The head: (..., C) to (..., V), softcapped, in at least float32."""
        logits = in_float32(F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x))
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

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
        # An index below 0 may wrap around in compiled code. Past the end, it is an error on every backend.
        targets = targets.masked_fill(targets < -1, self.config.vocab_size)
        return self.loss(self, x.flatten(0, 1), targets.flatten(), loss_reduction)  # (B*T, C), (B*T,)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode until all that are in here, in whatever thread, have left: the last restores the first's mode."""
        with MODE_LOCK:
            self.modes.append(self.training)
            self.eval()
        try:
            yield
        finally:
            with MODE_LOCK:
                self.train(self.modes.pop())

    def check_cache(self, kv_cache: KVCache, B: int) -> None:
        c, k = self.config, kv_cache.k
        have = (*k.shape[:3], k.size(4), k.dtype, k.device)
        need = (c.n_layer, B, c.n_kv_head, c.head_dim, self.dtype, self.device)
        check(have == need, f"KVCache: n_layer, batch_size, n_kv_head, head_dim, dtype, device are {have}, not {need}")

    def generate(self, tokens: Iterable[int], max_tokens: int, *how: Any, **settings: Any) -> Generator[int, None, str]:
        """Continue tokens: yields token ids, and returns why it ended, 'length' or 'stop'.

        generate(tokens, max_tokens, temperature=1.0, ..., seed=42, kv_cache=None, decode=None): see `Sampling`. A seed
        of None draws anew at each call. Bad arguments are a ValueError at the call. A full window of sequence_len is
        cut to its last half, which is prefilled anew; of a longer prompt, the last tokens count. With a kv_cache,
        tokens follow what it holds, and all that is generated stays in it: the next turn prefills only what is new.
        `decode` replaces `GPT.step` (sologpt/fast.py). In eval mode until the generator ends or is closed.
        """
        prompt = tokens.flatten() if isinstance(tokens, Tensor) and len(tokens) == 1 else tokens  # (1, T) is fine, too
        steps = self.generate_batch([prompt], max_tokens, 1, *how, **settings)

        def only_row() -> Generator[int, None, str]:
            try:
                while True:
                    yield next(steps)[0]  # type: ignore[misc]  # never None: a batch ends with its last row
            except StopIteration as end:
                return end.value[0]
            finally:
                steps.close()

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
        RuntimeError at the step whose logits are not finite.
        """
        sampling, V = Sampling(*how, **settings), self.config.vocab_size
        integer("max_tokens", max_tokens, 0), integer("num_samples", num_samples, 1, 2**16)
        texts = [[integer("a token id (tokenizer.encode(text))", id, 0, V - 1) for id in prompt] for prompt in prompts]
        suppressed = [*{integer("a suppressed token id", id, 0, V - 1) for id in sampling.suppress_tokens}]
        stop = {integer("a stop token id", id, 0) for id in sampling.stop_tokens}
        check(min(map(len, texts), default=0) > 0, "the prompt is empty: generate needs at least one token")
        check(len(suppressed) < V, "suppress_tokens leaves no token to draw")
        past = 0 if kv_cache is None else int(kv_cache.lengths.max())
        max_len = min(self.config.sequence_len, past + max(map(len, texts)) + max_tokens)
        if kv_cache is not None:
            self.check_cache(kv_cache, len(texts))
            check(num_samples == 1, f"num_samples must be 1 with a kv_cache, not {num_samples}")
            check(kv_cache.max_len >= max_len, f"a KVCache of {kv_cache.max_len} tokens is too small for {max_len}")

        @torch.inference_mode()
        def steps() -> Generator[list[int | None], None, list[str]]:
            with self.evaluating():
                # 1. Prefill the prompts
                cache = kv_cache or KVCache(self.config, len(texts), max_len, self.device, self.dtype)
                seen = torch.zeros(len(texts), V, dtype=torch.bool, device=self.device)  # (B, V), for the penalty
                if sampling.repetition_penalty != 1:
                    for row, past, text in zip(seen, cache.tokens(), texts, strict=True):
                        row[past + text] = True
                logits = self.prefill(texts, cache)  # (B, V)
                # 2. Copy each row for its samples
                if num_samples > 1:
                    cache = cache.expand(num_samples)
                    logits, seen = (x.repeat_interleave(num_samples, dim=0) for x in (logits, seen))
                # 3. Draw a token of each row, yield, stop, decode
                B, generator = len(logits), torch.Generator(self.device)
                generator.seed() if sampling.seed is None else generator.manual_seed(int(sampling.seed))
                running, ended = {*range(B)}, list[int]()  # the rows; of the ended ones, only those read to their end
                unread: Tensor | None = None  # the tokens drawn last, (B,), until they are decoded
                try:
                    for n in range(1, max_tokens + 1):
                        if suppressed:
                            logits[:, suppressed] = -math.inf
                        unread = sampling.draw(logits, generator, seen)
                        if sampling.repetition_penalty != 1:
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
                    if kv_cache is not None and unread is not None:
                        self.read(unread, cache, ended, decode or self.step)

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
            row = kv_cache.rows(slice(b, b + 1))
            row.reset()
            if tail.numel():
                self.hidden(tail, row)
        try:
            return decode(ids, kv_cache)
        finally:
            kv_cache.lengths[ended] = lengths[ended]

    def save(self, path: str | os.PathLike, **extra: Any) -> None:
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
    def load(cls, path: str | os.PathLike, device: Device = None, dtype: Dtype = None) -> "GPT":
        """The model that `save` wrote, in eval mode. OSError for a missing file, RuntimeError for a damaged one."""
        return cls.load_checkpoint(path, device, dtype)[0]

    @classmethod
    def load_checkpoint(cls, path: str | os.PathLike, device: Device = None, dtype: Dtype = None) -> tuple["GPT", dict]:
        """`load`, and the extra that was saved. Runs no code from the file (weights_only)."""
        check(not os.path.isdir(path), f"{path} is a folder: {path}/best.pt?")
        with open(path, "rb") as f:
            try:
                check(zipfile.ZipFile(f).testzip() is None, "a CRC does not match")  # torch.load compares none
                f.seek(0)
                checkpoint = torch.load(f, map_location="cpu", weights_only=True)
                config, weights = GPTConfig(**checkpoint.pop("config")), checkpoint.pop("model")
                check(config.n_layer <= len(weights), "there are fewer tensors than layers")
                with torch.device("meta"):  # no memory for initial weights
                    model = cls(config)
                model.load_state_dict(weights, assign=True)
            except Exception as e:  # a damaged file can fail anywhere: zip, pickle, a missing key, a shape
                if isinstance(e, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(e):
                    raise
                raise RuntimeError(f"{path} is damaged, or no checkpoint of a GPT: is it a plain state_dict?") from e
        return model.to(device, dtype).eval(), checkpoint

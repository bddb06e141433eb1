"""A complete GPT in one file: the network and its loss, then a KV cache, sampling, generation and files.

The default architecture is that of nanochat (https://github.com/karpathy/nanochat):
- rotary position embeddings (https://arxiv.org/abs/2104.09864)
- grouped-query attention (https://arxiv.org/abs/2305.13245) with QK-norm (https://arxiv.org/abs/2010.04245)
- RMSNorm without gains (https://arxiv.org/abs/1910.07467), before each sublayer and after the embedding
- an MLP with ReLU squared (https://arxiv.org/abs/2109.08668), no biases, an untied head
- logits softcapped in float32 (Gemma 2, https://arxiv.org/abs/2408.00118)
Switches in the config make it GPT-2, Llama, Mistral, Qwen, SmolLM3 or Gemma 3.

Shapes in the comments: B rows, T new tokens, S tokens to attend to, C = n_embd, H = n_head, G = n_kv_head,
D = head_dim, M = n_hidden, V = vocab_size. The file needs PyTorch alone, and knows token ids but no text.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Device: TypeAlias = torch.device | str | None
Dtype: TypeAlias = torch.dtype | None
DERIVED: Any = None  # the default of a config field that __post_init__ computes from the others


@dataclass
class GPTConfig:
    sequence_len: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # number of token ids
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # query heads
    n_kv_head: int = DERIVED  # key/value heads; fewer than n_head is GQA, None means n_head
    n_embd: int = 768  # width of the residual stream
    head_dim: int = DERIVED  # channels of a head; None means n_embd // n_head
    n_hidden: int = DERIVED  # width of the MLP; None means 4 * n_embd
    mlp: str = "relu2"  # relu2, gelu, gelu_tanh (two matrices); swiglu, geglu (three, one of them the gate)
    qk_norm: bool = True  # normalize queries and keys
    embd_norm: bool = True  # normalize the embedding
    embd_scale: bool = False  # multiply the embedding by sqrt(n_embd)
    post_norm: bool = False  # a norm after each sublayer, too
    norm: str = "rms"  # rms (RMSNorm) or layer (LayerNorm)
    norm_weight: bool = False  # learned gains in every norm
    bias: bool = False  # biases in all linear layers but the head, and in every LayerNorm
    qkv_bias: bool = False  # biases of queries, keys and values alone
    positions: str = "rotary"  # rotary, or learned: an embedding of each position
    layer_types: str = "F"  # a letter per layer, repeated: F (full), S (sliding window), N (full, not rotary)
    sliding_window: int | None = None  # tokens that an S layer attends to, itself included; None means all
    tie_embd: bool = False  # share one matrix between embedding and head
    dropout: float = 0.0  # probability of zeroing an activation in training
    softcap: float = 15.0  # bound on the logits, softcap * tanh(logits / softcap); 0 switches it off
    rope_base: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: dict | None = None  # {"rope_type": "linear", "factor": 2.0}; llama3, yarn and their numbers
    window_rope_base: float | None = None  # rope_base of S layers, which then have no rope_scaling
    norm_eps: float = 1e-6  # added to the mean square, or the variance, in a norm

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_hidden", "sliding_window"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be divisible by n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or 4 * self.n_embd
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be divisible by n_kv_head {self.n_kv_head}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: n_embd {self.n_embd}, n_head {self.n_head}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not self.layer_types or set(self.layer_types) - set("FSN"):
            raise ValueError(f"layer_types must be letters F, S or N, not {self.layer_types!r}")
        self.layer_types = (self.layer_types * self.n_layer)[: self.n_layer]
        if not 0 <= self.dropout < 1 or self.softcap < 0:
            raise ValueError(f"dropout {self.dropout} must be in [0, 1), softcap {self.softcap} at least 0")


# ---- Layers ----
def in_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def make_norm(channels: int, config: GPTConfig) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(channels, config.norm_eps, config.norm_weight, config.bias)
    return nn.RMSNorm(channels, config.norm_eps, config.norm_weight)


def rope(positions: Tensor, config: GPTConfig, dtype: torch.dtype, base: float | None = None) -> Tensor:
    """Cosine and sine of the rotary angles at positions (B or 1, T): (B or 1, T, 1, D/2, 2).

    Channel pair i turns by position * base^(-2i/D), so q @ k depends on the distance alone.
    """
    D, real = config.head_dim, torch.promote_types(dtype, torch.float32)
    scaling = {} if base else config.rope_scaling or {}
    exponents = torch.arange(0, D, 2, device=positions.device, dtype=real) / -D  # (D/2,)
    frequencies = (base or config.rope_base) ** exponents
    frequencies = scale_frequencies(frequencies, config.rope_base, scaling) if scaling else frequencies
    angles = positions[:, :, None, None].to(real) * frequencies  # (B or 1, T, 1, D/2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1) * scaling.get("attention_factor", 1.0)


def scale_frequencies(frequencies: Tensor, base: float, scaling: dict) -> Tensor:
    """Rotary frequencies (D/2,) for a longer context: "linear" (arXiv:2306.15595), "llama3" or "yarn"."""
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    # Those that turn often in the original context are kept, slow ones are divided, with a blend in between
    turns, pairs = scaling["original_max_position_embeddings"] / (2 * math.pi), len(frequencies)
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((frequencies * turns - low) / (high - low)).clamp(0, 1)
    else:  # YaRN (arXiv:2309.00071): by the pair's number, between those that turn beta_fast, beta_slow times
        fast, slow = (pairs * math.log(turns / scaling[f"beta_{x}"], base) for x in ("fast", "slow"))
        first, last = max(math.floor(fast), 0), min(math.ceil(slow), 2 * pairs - 1)
        numbers = torch.arange(pairs, device=frequencies.device, dtype=frequencies.dtype)
        kept = 1 - ((numbers - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring channels of x (B, T, H, D), as complex numbers, by what `rope` returns."""
    pairs = in_float32(x).unflatten(-1, (-1, 2))  # (B, T, H, D/2, 2)
    rotated = torch.view_as_complex(pairs) * torch.view_as_complex(rotary)  # (B, T, H, D/2)
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)  # (B, T, H, D)


def causal_mask(positions: Tensor, S: int, window: int | None = None) -> Tensor:
    """True where queries at positions (B or 1, T) attend to keys, the last `window`: (B or 1, 1, T, S)."""
    distance = positions[..., None] - torch.arange(S, device=positions.device)  # (B or 1, T, S)
    return ((distance >= 0) & (distance < (window or S)))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each head: q (B, T, H, D), k and v (B, S, G, D), to (B, T, H, D).

    H/G query heads share a key/value head. mask (B or 1, 1, T, S) is true where a query attends to a key.
    None is causal; then a single query (T = 1) attends to all keys.
    """
    (B, T, H, D), G = q.shape, k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, G, S, D) twice
    causal = mask is None and T > 1
    if G < H and not causal:  # few kernels take a mask with enable_gqa: the queries of a group become rows
        q = q.reshape(B, G, -1, D)  # (B, G, H/G * T, D)
        mask = None if mask is None else mask.repeat(1, 1, H // G, 1)  # (B or 1, 1, H/G * T, S)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=G < H and causal)
    return y.reshape(B, H, T, D).transpose(1, 2)  # (B, T, H, D)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        C, H, G, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer = layer  # which keys and values of a KVCache are its own
        self.head_dim = D
        self.dropout = nn.Dropout(config.dropout)
        self.c_q = nn.Linear(C, H * D, config.bias or config.qkv_bias)
        self.c_k = nn.Linear(C, G * D, config.bias or config.qkv_bias)
        self.c_v = nn.Linear(C, G * D, config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(H * D, C, config.bias)
        self.q_norm = make_norm(D, config) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(D, config) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cache: KVCache | None, rotary: Tensor | None, mask: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.c_q(x).view(B, T, -1, self.head_dim))  # (B, T, H, D)
        k = self.k_norm(self.c_k(x).view(B, T, -1, self.head_dim))  # (B, T, G, D)
        v = self.c_v(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, S, G, D): those of earlier tokens, too
        y = attend(q, k, v, mask, self.dropout.p if self.training else 0.0)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, -1))  # (B, T, H * D) -> (B, T, C)


def relu2(x: Tensor) -> Tensor:
    x = F.relu(x)
    return x * x  # the backward pass of x.square() takes twice the time


ACTIVATIONS: dict[str, Any] = {"relu2": relu2, "gelu": F.gelu, "gelu_tanh": nn.GELU("tanh")}
ACTIVATIONS |= {"swiglu": F.silu, "geglu": nn.GELU("tanh")}
CHOICES = {"mlp": (*ACTIVATIONS,), "norm": ("rms", "layer"), "positions": ("rotary", "learned")}


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, M = config.n_embd, config.n_hidden
        self.activation = ACTIVATIONS[config.mlp]
        self.c_fc = nn.Linear(C, M, config.bias)
        self.c_proj = nn.Linear(M, C, config.bias)
        self.c_gate = nn.Linear(C, M, config.bias) if config.mlp.endswith("glu") else None

    def forward(self, x: Tensor) -> Tensor:
        if self.c_gate is None:
            return self.c_proj(self.activation(self.c_fc(x)))  # (B, T, C) -> (B, T, M) -> (B, T, C)
        return self.c_proj(self.activation(self.c_gate(x)) * self.c_fc(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = make_norm(config.n_embd, config)
        self.attn = Attention(config, layer)
        self.attn_post_norm = make_norm(config.n_embd, config) if config.post_norm else nn.Identity()
        self.mlp_norm = make_norm(config.n_embd, config)
        self.mlp = MLP(config)
        self.mlp_post_norm = make_norm(config.n_embd, config) if config.post_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None, rotary: Tensor | None, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attn_post_norm(self.attn(self.attn_norm(x), cache, rotary, mask)))
        return x + self.dropout(self.mlp_post_norm(self.mlp(self.mlp_norm(x))))


# ---- The network: token ids to logits, or to a loss ----
def cross_entropy(model: Transformer, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross entropy in nats of hidden states x (N, C) for targets (N,), with -1 ignored: 0 if all are."""
    if reduction == "mean":
        return cross_entropy(model, x, targets, "sum") / (targets != -1).sum().clamp(min=1)
    return F.cross_entropy(model.logits(x), targets, ignore_index=-1, reduction=reduction)


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        V, T, C = config.vocab_size, config.sequence_len, config.n_embd
        self.config = config
        self.loss: Callable[..., Tensor] = cross_entropy  # sologpt/loss.py has one that takes less memory
        self.wte = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)  # draws no numbers
        self.wpe = None
        if config.positions == "learned":
            self.wpe = nn.Embedding.from_pretrained(torch.empty(T, C), freeze=False)
        self.embd_norm = make_norm(C, config) if config.embd_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = make_norm(C, config)
        self.lm_head = None if config.tie_embd else nn.Linear(C, V, bias=False)
        if not self.wte.weight.is_meta:  # as in `GPT.load`
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start each block as the identity and the head near zero, so the first loss is ln(vocab_size)."""
        bound = math.sqrt(3 / self.config.n_embd)  # the standard deviation is 1 / sqrt(n_embd)
        for name, p in self.named_parameters():
            if name in ("wte.weight", "wpe.weight"):
                nn.init.normal_(p, std=0.001 if self.config.tie_embd else 1.0)
            elif name == "lm_head.weight":
                nn.init.normal_(p, std=0.001)
            elif name.endswith("norm.weight"):
                nn.init.ones_(p)
            elif name.endswith(("c_proj.weight", ".bias")):
                nn.init.zeros_(p)
            elif name.endswith(("c_q.weight", "c_k.weight", "c_v.weight", "c_fc.weight", "c_gate.weight")):
                nn.init.uniform_(p, -bound, bound)
            else:
                raise ValueError(f"init_weights has no line for {name}")

    device = property(lambda self: self.wte.weight.device)
    dtype = property(lambda self: self.wte.weight.dtype)
    head_weight = property(lambda self: (self.lm_head or self.wte).weight)  # (V, C)

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def attention_inputs(self, positions: Tensor, mask: Tensor | None, S: int) -> dict[str, dict[str, Any]]:
        """`rope` and mask of each layer type, for queries at positions (B or 1, T) and S keys."""
        window, base = self.config.sliding_window, self.config.window_rope_base
        recent = causal_mask(positions, S, window) if window and window < S else mask
        rotary = rope(positions, self.config, self.dtype) if self.wpe is None else None
        local = rope(positions, self.config, self.dtype, base) if self.wpe is None and base else rotary
        full, windowed = dict(rotary=rotary, mask=mask), dict(rotary=local, mask=recent)
        return {"F": full, "S": windowed, "N": full | {"rotary": None}}

    def hidden(self, idx: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """All layers but the head: idx (B, T) int64 to (B, T, C)."""
        _, T = idx.shape
        past = int(kv_cache.lengths.max()) if kv_cache else 0
        if past + T > self.config.sequence_len:
            raise ValueError(f"{past + T} tokens are more than sequence_len {self.config.sequence_len}")
        # Positions are (B, T) for rows of different lengths, else (1, T)
        positions = kv_cache.reserve(idx) if kv_cache else torch.arange(T, device=idx.device)[None]
        needs_mask = len(positions) > 1 or (past > 0 and T > 1)
        mask = causal_mask(positions, past + T) if needs_mask else None  # (B or 1, 1, T, S)
        inputs = self.attention_inputs(positions, mask, past + T)
        x = self.wte(idx)  # (B, T, C)
        if self.config.embd_scale:
            x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)  # rounded to it, as in Gemma
        if self.wpe is not None:
            x = x + self.wpe(positions)
        x = self.dropout(self.embd_norm(x))
        for block, layer_type in zip(self.h, self.config.layer_types, strict=True):
            x = block(x, kv_cache, **inputs[layer_type])  # (B, T, C)
        if kv_cache:
            kv_cache.lengths += T
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """The head: (..., C) to (..., V), softcapped, in at least float32."""
        logits = in_float32(F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x))
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, kv_cache: KVCache | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        """Logits (B, T, V) of idx (B, T) int64, after what the cache holds; with targets (B, T), the loss.

        The loss is in nats, with -1 ignored: the mean, their "sum", or all (B*T,) with "none". ValueError if
        sequence_len or the cache has no room, IndexError for a target that is not a token id.
        """
        x = self.hidden(idx, kv_cache)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        # Compiled code may wrap a negative index around; one past the end is an error on every backend
        targets = targets.masked_fill(targets < -1, self.config.vocab_size)
        return self.loss(self, x.flatten(0, 1), targets.flatten(), loss_reduction)  # (B*T, C), (B*T,)


# ---- Inference: the KV cache ----
class KVCache:
    """Keys and values of all layers, allocated once and written in place. Row b holds `lengths[b]` tokens.

    A forward appends to it, and no gradient flows through it.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, max_len: int, device: Device = None, dtype: Dtype = None
    ) -> None:
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(batch_size, max_len, device=device, dtype=torch.long)
        self.lengths = torch.zeros(batch_size, dtype=torch.long)  # on the CPU: reading it never waits
        self.batch_size, self.max_len = batch_size, max_len
        self.slots: tuple = ()  # where the new tokens go, an index of (B, max_len): see `reserve`
        self.end = 0  # where the longest row will end

    nbytes = property(lambda self: self.k.nbytes + self.v.nbytes)  # 2 n_layer B G max_len D itemsize

    def __repr__(self) -> str:
        lengths, megabytes = self.lengths.tolist(), self.nbytes / 1e6
        return f"KVCache({lengths} of {self.max_len} tokens, {self.k.dtype}, {megabytes:.1f} MB)"

    def reserve(self, idx: Tensor) -> Tensor:
        """Make room for tokens idx (B, T). Return their positions, (B, T), or (1, T) if equal in all rows."""
        (B, T), device, longest = idx.shape, self.k.device, int(self.lengths.max())
        self.end = longest + T
        if self.batch_size != B or self.end > self.max_len:
            raise ValueError(f"{B} x {T} tokens do not fit into {self}")
        self.slots = (slice(None), slice(longest, self.end))
        positions = torch.arange(longest, self.end, device=device)[None]  # (1, T)
        if int(self.lengths.min()) < longest:
            # Shorter rows leave slots here that are masked: their attention weight is 0, but 0 * NaN is NaN
            self.k[:, :, :, longest : self.end] = 0
            self.v[:, :, :, longest : self.end] = 0
            positions = (self.lengths[:, None] + torch.arange(T)).to(device)  # (B, T)
            self.slots = (torch.arange(B, device=device)[:, None], positions)
        self.ids[self.slots] = idx
        return positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, T, G, D). Return all of them, (B, S, G, D)."""
        keys, values = self.k[layer].transpose(1, 2), self.v[layer].transpose(1, 2)  # (B, max_len, G, D)
        keys[self.slots] = k.detach().to(keys.dtype)
        values[self.slots] = v.detach().to(values.dtype)
        return keys[:, : self.end], values[:, : self.end]

    def truncate(self, n: int | Sequence[int] | Tensor) -> None:
        """Forget all but the first n tokens, an int or one per row. Shorter rows stay as they are."""
        n = torch.as_tensor(n, dtype=torch.long)
        if n.shape not in ((), (self.batch_size,)) or (n < 0).any():
            raise ValueError(f"cannot truncate {self.batch_size} rows to lengths of {n.tolist()}")
        torch.minimum(self.lengths, n, out=self.lengths)

    def reset(self) -> None:
        """Forget all tokens; the memory stays allocated."""
        self.lengths.zero_()

    def tokens(self) -> list[list[int]]:
        """The token ids of each row."""
        return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    def rows(self, index: slice | Tensor) -> KVCache:
        """A cache of some rows: on the same memory for a slice, a copy for a tensor of row numbers."""
        cache = copy(self)
        cache.k, cache.v, cache.ids = self.k[:, index], self.v[:, index], self.ids[index]
        cache.lengths, cache.batch_size = self.lengths[index], len(cache.ids)
        return cache

    def expand(self, n: int) -> KVCache:
        """n copies of each row next to each other, so that one prefill serves n samples."""
        return self.rows(torch.arange(self.batch_size).repeat_interleave(n))


# ---- Inference: sampling ----
@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters are those of Hugging Face, in its order; None is off."""

    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int | None = None  # keep the k most likely tokens, and ties with the last of them
    top_p: float | None = None  # keep the fewest tokens whose probabilities add up to p (arXiv:1904.09751)
    min_p: float | None = None  # keep tokens at least p times as likely as the top one (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # above 1, tokens seen before become less likely (arXiv:1909.05858)

    def __post_init__(self) -> None:
        limits = {"temperature": (1e-9, 1e9), "top_k": (1, 2**31), "top_p": (1e-30, 1), "min_p": (1e-30, 1)}
        for name, (least, most) in limits.items():
            if getattr(self, name) and not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be 0, or from {least} to {most}, not {getattr(self, name)}")
        if not 1e-9 <= self.repetition_penalty <= 1e9:
            raise ValueError(f"repetition_penalty must be from 1e-09 to 1e+09, not {self.repetition_penalty}")
        operator.index(self.top_k or 0)  # TypeError for a fraction

    def filter(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits (B, V) with -inf for what is filtered out. seen (B, V) is true for tokens seen before."""
        penalty = self.repetition_penalty
        if seen is not None and penalty != 1:
            logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        if self.temperature:
            logits = logits / self.temperature
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
            logits = logits.masked_fill(logits < kth, -math.inf)
        if self.top_p and self.top_p < 1:
            probs = logits.softmax(dim=-1)
            # Less likely tokens than (1 - p) / V are not among the fewest: sort the n others
            n = int((probs > (1 - self.top_p) / probs.size(-1)).sum(dim=-1).amax().clamp(min=1))
            likely, ids = logits.topk(n)  # (B, n), in descending order
            p = probs.gather(-1, ids)
            likely = likely.masked_fill(p.cumsum(dim=-1) - p >= self.top_p, -math.inf)
            logits = torch.full_like(logits, -math.inf).scatter(-1, ids, likely)
        if self.min_p:
            probs = logits.softmax(dim=-1)
            logits = logits.masked_fill(probs < self.min_p * probs.amax(dim=-1, keepdim=True), -math.inf)
        return logits

    def draw(self, logits: Tensor, generator: Any = None, seen: Tensor | None = None) -> Tensor:
        """A token id for each row: logits (B, V) to (B,) int64. RuntimeError if they are not finite."""
        logits = self.filter(logits, seen)
        if not logits.amax(dim=-1).isfinite().all():
            raise RuntimeError("the logits are not finite: weights are damaged, or too large for their dtype")
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # The first token at which the sum of probabilities exceeds u: much faster than torch.multinomial
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        sums = logits.softmax(dim=-1).cumsum(dim=-1, dtype=wide)  # (B, V)
        u = torch.rand(len(sums), 1, dtype=wide, device=logits.device, generator=generator) * sums[:, -1:]
        return torch.searchsorted(sums, u, right=True).squeeze(-1)


def sample(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None, generator: Any = None,
) -> Tensor:  # fmt: skip
    """Draw a token id for each row of logits: (B, V) to (B,) int64. See `Sampling`."""
    return Sampling(temperature, top_k, top_p, min_p).draw(logits, generator)


# ---- Inference: generation ----
Decoder: TypeAlias = Callable[[Tensor, KVCache], Tensor]  # as `GPT.step`; it may have a `prefill` of its own
PREFILL_CHUNK = 1024  # tokens of each row in one forward of a prefill; bounds the memory for activations


class GPT(Transformer):
    def token_ids(self, tokens: Iterable[int]) -> list[int]:
        """tokens as a list, also from an array, or a tensor (1, T). ValueError if one is not a token id."""
        if isinstance(tokens, Tensor) and tokens.ndim > 1:
            tokens = tokens.squeeze(0)
        try:
            ids = [operator.index(token) for token in tokens]
        except TypeError as e:
            raise ValueError(f"not token ids, as of tokenizer.encode(text): {tokens!r}") from e
        if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise ValueError(f"ids {min(ids)} to {max(ids)} are not from 0 to {self.config.vocab_size - 1}")
        return ids

    def prefill(self, prompts: Sequence[Sequence[int]], kv_cache: KVCache) -> Tensor:
        """Read prompts of any lengths into the cache, after what it holds. Return the last logits, (B, V)."""
        window = self.config.sequence_len
        end = int(kv_cache.lengths.max()) + max(map(len, prompts))
        if min(end, window) > kv_cache.max_len:
            raise ValueError(f"{min(end, window)} tokens do not fit into {kv_cache}")
        if end > window:  # restart with the last tokens
            prompts = [[*old, *new][-window:] for old, new in zip(kv_cache.tokens(), prompts, strict=True)]
            kv_cache.reset()
        sizes = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
        if sizes.min() < 1:
            raise ValueError("the prompt is empty")
        lengths = kv_cache.lengths + sizes
        # Padding on the right: causality hides it from the tokens, and then it is truncated
        idx = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], True).to(self.device)
        chunks = [self.hidden(chunk, kv_cache) for chunk in idx.split(PREFILL_CHUNK, dim=1)]
        x = torch.cat(chunks, dim=1)  # (B, T, C)
        kv_cache.truncate(lengths)
        return self.logits(x[torch.arange(len(prompts)), sizes - 1])

    def step(self, ids: Tensor, kv_cache: KVCache) -> Tensor:
        """The plain decoder: read one more token of each row, (B,), and return the next logits, (B, V)."""
        return self.logits(self.hidden(ids[:, None], kv_cache)[:, -1])  # (B, 1) -> (B, C) -> (B, V)

    def read(self, ids: Tensor, kv_cache: KVCache, decode: Decoder, ended: Sequence[int] = ()) -> Tensor:
        """Decode ids (B,) to logits (B, V). A row whose window is full restarts with the last half of it."""
        window, lengths = self.config.sequence_len, kv_cache.lengths
        for b in ended:  # these read their last token again, and stay as they are
            lengths[b] -= 1
            ids[b] = kv_cache.ids[b, lengths[b]]
        for b in (lengths == window).nonzero().flatten().tolist():
            row = kv_cache.rows(slice(b, b + 1))
            tail = row.ids[:, window - window // 2 + 1 : window].clone()  # ids has the newest token
            row.reset()
            if tail.numel():
                self.hidden(tail, row)
        try:
            return decode(ids, kv_cache)
        except BaseException:
            lengths[list(ended)] += 1
            raise

    @torch.inference_mode()
    def in_eval_mode(self, compute: Callable, *args: Any) -> Tensor:
        """compute(*args) without gradients, in eval mode. Then the caller's mode is restored."""
        if not self.training:
            return compute(*args)
        self.eval()
        try:
            return compute(*args)
        finally:
            self.train()

    def generate(
        self, tokens: Iterable[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0,
        stop_tokens: Iterable[int] = (), seed: int | None = 42, suppress_tokens: Iterable[int] = (),
        *, kv_cache: KVCache | None = None, decode: Decoder | None = None,
    ) -> Generator[int, None, str]:  # fmt: skip
        """Continue tokens: yield one token id after the other. Return why it ended, "length" or "stop".

        `Sampling` has the filters. A token of stop_tokens is yielded last; suppress_tokens are never drawn. A
        seed of None draws anew each time. A full window is cut to its last half. tokens follow what kv_cache
        holds, and all stay there. decode replaces `GPT.step`. Bad arguments are an error at the first token.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        generator = torch.Generator(self.device)
        generator.seed() if seed is None else generator.manual_seed(operator.index(seed))
        prompt, stop = self.token_ids(tokens), {*map(operator.index, stop_tokens)}
        never = torch.tensor(self.token_ids(suppress_tokens), device=self.device, dtype=torch.long)
        # 1. Prefill the prompt
        max_len = min(self.config.sequence_len, len(prompt) + operator.index(max_tokens))
        cache = kv_cache or KVCache(self.config, 1, max_len, self.device, self.dtype)
        logits = self.in_eval_mode(getattr(decode, "prefill", self.prefill), [prompt], cache)  # (1, V)
        seen = torch.zeros_like(logits, dtype=torch.bool)  # (1, V), for the penalty
        if repetition_penalty != 1:
            seen[0, cache.tokens()[0]] = True
        for n in range(1, max_tokens + 1):
            # 2. Draw a token
            logits = logits.index_fill(1, never, -math.inf) if len(never) else logits
            ids = sampling.draw(logits, generator, seen)  # (1,)
            seen.scatter_(1, ids[:, None], True)
            token = int(ids)
            try:
                yield token
            finally:  # also when the caller walks away
                # 3. Decode it, if there is a next one, or to be remembered
                if kv_cache or (token not in stop and n < max_tokens):
                    logits = self.in_eval_mode(self.read, ids, cache, decode or self.step)  # (1, V)
            # 4. Stop
            if token in stop:
                return "stop"
        return "length"

    def generate_batch(
        self, prompts: Iterable[Iterable[int]], max_tokens: int, num_samples: int = 1,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, repetition_penalty: float = 1.0, stop_tokens: Iterable[int] = (),
        seed: int | None = 42, suppress_tokens: Iterable[int] = (),
        *, kv_cache: KVCache | None = None, decode: Decoder | None = None,
    ) -> Generator[list[int | None], None, list[str]]:  # fmt: skip
        """`generate` for prompts of any lengths, with num_samples rows each, 1 with a kv_cache.

        Yield a list per step: the token id of each row, None if it has ended. Return a list of reasons.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        generator = torch.Generator(self.device)
        generator.seed() if seed is None else generator.manual_seed(operator.index(seed))
        texts, stop = [self.token_ids(prompt) for prompt in prompts], {*map(operator.index, stop_tokens)}
        never = torch.tensor(self.token_ids(suppress_tokens), device=self.device, dtype=torch.long)
        if operator.index(num_samples) < 1 or (num_samples > 1 and kv_cache):
            raise ValueError(f"num_samples must be at least 1, and 1 with a kv_cache, not {num_samples}")
        # 1. Prefill the prompts, and copy each row for its samples
        max_len = min(self.config.sequence_len, max(map(len, texts)) + operator.index(max_tokens))
        cache = kv_cache or KVCache(self.config, len(texts), max_len, self.device, self.dtype)
        logits = self.in_eval_mode(getattr(decode, "prefill", self.prefill), texts, cache)  # (B, V)
        if num_samples > 1:
            cache, logits = cache.expand(num_samples), logits.repeat_interleave(num_samples, dim=0)
        seen = torch.zeros_like(logits, dtype=torch.bool)  # (B, V), for the penalty
        if repetition_penalty != 1:
            for row, past in zip(seen, cache.tokens(), strict=True):
                row[past] = True
        rows = range(len(logits))
        running, ended = {*rows}, list[int]()  # rows still running; rows whose last token is in the cache
        for n in range(1, max_tokens + 1):
            # 2. Draw a token of each row
            logits = logits.index_fill(1, never, -math.inf) if len(never) else logits
            ids = sampling.draw(logits, generator, seen)  # (B,)
            seen.scatter_(1, ids[:, None], True)
            tokens = ids.tolist()
            step = [tokens[b] if b in running else None for b in rows]
            running = {b for b in running if tokens[b] not in stop}
            try:
                yield step
            finally:
                # 3. Decode them
                if kv_cache or (running and n < max_tokens):
                    logits = self.in_eval_mode(self.read, ids, cache, decode or self.step, ended)
                    ended = [b for b in rows if b not in running]
            # 4. Stop
            if not running:
                break
        return ["length" if b in running else "stop" for b in rows]

    def save(self, path: str | os.PathLike, **extra: Any) -> None:
        """Write config, weights and extra (tensors and plain Python values) to path, atomically."""
        temporary = f"{os.fspath(path)}.tmp"
        try:
            with open(temporary, "wb") as f:
                torch.save({"model": self.state_dict(), "config": asdict(self.config), **extra}, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)  # it is still there if something failed

    @classmethod
    def load(cls, path: str | os.PathLike, device: Device = None, dtype: Dtype = None) -> GPT:
        """The model that `save` wrote, in eval mode. For files that you do not trust: sologpt/load.py."""
        return cls.load_checkpoint(path, device, dtype)[0]

    @classmethod
    def load_checkpoint(cls, path: Any, device: Device = None, dtype: Dtype = None) -> tuple[GPT, dict]:
        """`load`, and the extra that was saved."""
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # no memory, and no numbers drawn, for weights that will be replaced
            model = cls(GPTConfig(**checkpoint.pop("config")))
        model.load_state_dict(checkpoint.pop("model"), assign=True)
        return model.to(device, dtype).eval(), checkpoint

"""Decoders for GPUs: `Compiled` runs blocks compiled by torch.compile, `CudaGraphs` replays them on CUDA."""

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import gpt
from gpt import GPT, KVCache, causal_mask, in_float32

# -----------------------------------------------------------------------------
# The model's products and attention, in forms that compile well


@cache
def compile_rotate() -> None:
    """Make torch.compile replace gpt.rotate by `rotate`. At import, this would load the compiler."""
    torch.compiler.substitute_in_graph(gpt.rotate)(rotate)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """`gpt.rotate` in real numbers: torch.compile generates no code for complex ones."""
    a, b = in_float32(x).view(*x.shape[:-1], -1, 2).unbind(-1)  # (B, T, H, D/2) each
    c, d = rotary.unbind(-1)  # (B or 1, T, 1, D/2) each
    return torch.stack((a * c - b * d, a * d + b * c), dim=-1).flatten(-2).to(x.dtype)


Slots = tuple[Tensor, Tensor]  # the row (B, 1) and the position (B or 1, 1) of each new token in a cache


class LayerCache(NamedTuple):
    """Keys and values (B, max_len, G, D) of one layer, which `Attention` updates in place of a KVCache."""

    keys: Tensor
    values: Tensor
    slots: Slots
    end: int

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[self.slots] = k.to(self.keys.dtype)
        self.values[self.slots] = v.to(self.values.dtype)
        return self.keys[:, : self.end], self.values[:, : self.end]


def linear_of_one_token(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. A single token is limited by reading the weights: the compiler fuses this into one loop."""
    if x.numel() != x.size(-1):
        return F.linear(x, weight, bias)
    y = (in_float32(weight) * in_float32(x).flatten()).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def attention_of_one_token(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, enable_gqa: bool
) -> Tensor:
    """F.scaled_dot_product_attention for one token of each row: queries (B, H, 1, D), or (B, G, H/G, D)."""
    G, D = k.size(1), k.size(3)
    q = q.view(q.size(0), G, -1, 1, D)  # (B, G, H/G, 1, D)
    scores = (in_float32(q) * in_float32(k)[:, :, None]).sum(-1) / D**0.5  # (B, G, H/G, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)[..., None]  # (B, G, H/G, S, 1)
    y = (weights * in_float32(v)[:, :, None]).sum(-2, keepdim=True)  # (B, G, H/G, 1, D)
    return y.flatten(1, 2).to(v.dtype)  # (B, H, 1, D)


class OneToken(TorchFunctionMode):
    """A context in which the model computes with the functions above."""

    products: ClassVar = {
        F.linear: linear_of_one_token,
        F.scaled_dot_product_attention: attention_of_one_token,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.products.get(func, func)(*args, **kwargs or {})


def block_of_one_token(
    block: nn.Module, x: Tensor, cache: Any, rotary: Tensor | None, mask: Tensor | None
) -> Tensor:
    with OneToken():
        return block(x, cache, rotary, mask)


def head_of_one_token(model: GPT, x: Tensor) -> Tensor:
    with OneToken():
        return model.logits(model.norm(x)[:, -1])


# -----------------------------------------------------------------------------
# The decoders


def check_cache(model: GPT, kv_cache: KVCache) -> None:
    """Raise ValueError if the cache is not of this model's shape: compiled code does not always notice."""
    c, k = model.config, kv_cache.k
    need = (c.n_layer, kv_cache.batch_size, c.n_kv_head, kv_cache.max_len, c.head_dim)
    if k.shape != need or k.dtype != model.dtype or k.device != model.device:
        have = f"{tuple(k.shape)}, {k.dtype} on {k.device}"
        raise ValueError(f"the KVCache is {have}, the model needs {need}, {model.dtype} on {model.device}")


class Compiled:
    """A decoder with compiled blocks and head: compiled once for one row, once for a batch, once if ragged.

    All blocks share one code, for any length of the cache.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        compile_rotate()
        self.block = torch.compile(block_of_one_token, dynamic=True)
        self.head = torch.compile(head_of_one_token, dynamic=True)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, kv_cache: KVCache) -> Tensor:
        sizes = kv_cache.lengths.tolist()
        longest, ragged = max(sizes), min(sizes) < max(sizes)
        # torch.compile would recompile for sizes 0 and 1 and for a slice of a whole dimension. If there is no
        # room, `step` raises
        if not 0 < longest < min(kv_cache.max_len - 1, self.model.config.sequence_len):
            return self.model.step(ids, kv_cache)
        check_cache(self.model, kv_cache)
        end, mask = longest + 1, None
        lengths = (kv_cache.lengths if ragged else kv_cache.lengths[:1]).to(ids.device)  # (B or 1,)
        if ragged:
            kv_cache.k[:, :, :, longest] = 0  # what is masked must be finite: see KVCache.reserve
            kv_cache.v[:, :, :, longest] = 0
            mask = causal_mask(lengths[:, None], end)  # (B, 1, 1, S)
        logits = self.read(ids, lengths, mask, kv_cache, end)
        kv_cache.lengths += 1
        return logits

    def read(self, ids: Tensor, lengths: Tensor, mask: Tensor | None, kv_cache: KVCache, end: int) -> Tensor:
        """Read ids (B,) at positions lengths (B or 1,), attending to the first `end` slots. Return logits."""
        model = self.model
        positions = lengths[:, None]  # (B or 1, 1)
        slots = (torch.arange(len(ids), device=ids.device)[:, None], positions)
        kv_cache.ids[slots] = ids[:, None]
        inputs = model.attention_inputs(positions, mask, end)
        x = model.wte(ids[:, None])  # (B, 1, C)
        if model.config.embd_scale:
            x = x * torch.tensor(model.config.n_embd**0.5, dtype=x.dtype)
        x = model.embd_norm(x + model.wpe(positions) if model.wpe else x)
        keys, values = kv_cache.k.transpose(2, 3), kv_cache.v.transpose(2, 3)  # (n_layer, B, max_len, G, D)
        for block, k, v, kind in zip(model.h, keys, values, model.config.layer_types, strict=True):
            # .data is no view, whose guards would also compare n_layer with B
            x = self.block(block, x, LayerCache(k.data, v.data, slots, end), **inputs[kind])
        return self.head(model, x)


def cuda_graph(step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """Record step() as a CUDA graph. Return its result, which each replay overwrites, and the replay.

    The graphs of torch.cuda.make_graphed_callables wait for the garbage collector, which must not run while
    the next one is recorded. The graph has a stream of its own, since cuBLAS's workspace goes with it.
    """
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile, and load what must not be loaded while recording
                step()
        with torch.cuda.graph(graph, stream=stream):
            result = step()
    return result, graph.replay


class CudaGraphs(Compiled):
    """Compiled decode on a GPU with one launch for all layers instead of hundreds, by CUDA graphs.

    A graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) replays kernels on fixed memory
    and shapes. So each cache has its own, which attends to the first `size` slots under a mask. When a row
    outgrows them, one of twice the size takes its place. The next call overwrites the logits.
    """

    def __init__(self, model: GPT, smallest: int = 256) -> None:
        super().__init__(model)
        self.smallest = smallest
        self.graphs: WeakKeyDictionary[KVCache, tuple[int, Callable]] = WeakKeyDictionary()

    @torch.inference_mode()
    def __call__(self, ids: Tensor, kv_cache: KVCache) -> Tensor:
        longest = int(kv_cache.lengths.max())
        if longest >= min(kv_cache.max_len, self.model.config.sequence_len):
            return self.model.step(ids, kv_cache)  # raises
        check_cache(self.model, kv_cache)
        if longest >= self.graphs.get(kv_cache, (0, None))[0]:
            self.graphs.pop(kv_cache, None)  # frees its memory first
            self.graphs[kv_cache] = self.record(kv_cache, longest + 1)
        _, decode = self.graphs[kv_cache]
        logits = decode(ids, kv_cache.lengths)
        kv_cache.lengths += 1
        return logits

    def record(self, kv_cache: KVCache, length: int) -> tuple[int, Callable]:
        """Record a graph for rows of up to `length` tokens or more. Return its size and the graph."""
        size = min(max(self.smallest, 2 ** (length - 1).bit_length()), kv_cache.max_len)
        for b, n in enumerate(kv_cache.lengths.tolist()):
            kv_cache.k[:, b, :, n:size] = 0  # what is masked must be finite: see KVCache.reserve
            kv_cache.v[:, b, :, n:size] = 0
        memory, device = copy(kv_cache), kv_cache.k.device  # the graph must not keep the cache itself alive
        lengths = kv_cache.lengths.to(device, copy=True)
        ids = torch.zeros_like(lengths)

        def step() -> Tensor:
            return self.read(ids, lengths, causal_mask(lengths[:, None], size), memory, size)

        logits, replay = cuda_graph(step, device)

        def decode(new_ids: Tensor, new_lengths: Tensor) -> Tensor:
            ids.copy_(new_ids)
            lengths.copy_(new_lengths)
            replay()
            return logits

        return size, decode

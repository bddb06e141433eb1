"""Compiled decoders: `Compiled` runs blocks compiled by torch.compile, `CudaGraphs` replays them on a GPU."""

import operator
from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any, ClassVar, NamedTuple, cast
from warnings import catch_warnings
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import gpt
from gpt import GPT, Block, KVCache, causal_mask, in_float32
from sologpt import quantize

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
    """F.linear. A single token is limited by reading the weights: gemv on the CPU, a fused loop elsewhere."""
    if x.numel() != x.size(-1):
        return F.linear(x, weight, bias)
    if weight.device.type == "cpu" and weight.dtype in quantize.DTYPES and weight.is_contiguous():
        y = quantize.opaque_gemv(x, [weight], [])
    else:
        # the compiler fuses this into one loop
        y = (in_float32(weight) * in_float32(x).flatten()).sum(-1).to(x.dtype)
    y = y.view(*x.shape[:-1], -1)
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


class ExportedBlock:
    """`block_of_one_token` for one row, without torch.compile's guards, up to a third of a token's time.

    torch.export traces a block, and Inductor compiles the graph with a C++ wrapper. All blocks share the
    graph, since weights are inputs of it.
    """

    def __init__(self) -> None:
        self.graphs: dict[tuple, tuple[list[str], Callable]] = {}  # by kind: names of its weights, the graph
        self.weights: WeakKeyDictionary[Block, dict[tuple, list]] = WeakKeyDictionary()  # where a graph's are
        self.slots = torch.empty(0, 0)

    def __call__(
        self, block: Block, x: Tensor, cache: LayerCache, rotary: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        keys, values, (row, position), end = cache
        if len(self.slots) != end:  # a graph takes a number only as the size of a tensor
            self.slots = torch.empty(end, 0)
        inputs = dict(x=x, keys=keys, values=values, row=row, position=position, slots=self.slots)
        if rotary is not None:
            inputs["rotary"] = rotary
        if mask is not None:
            inputs["mask"] = mask
        kind = (x.dtype, block.training, type(block.mlp.c_fc), *inputs)  # what guards would check
        if kind not in self.graphs:
            self.graphs[kind] = self.compile(block, inputs)
        names, graph = self.graphs[kind]
        places = self.weights.setdefault(block, {})
        if kind not in places:
            places[kind] = [find_weight(block, name) for name in names]
        return graph(*[tensors[name] for tensors, name in places[kind]], *inputs.values())[0]

    def compile(self, block: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[str], Callable]:
        """Return the names of the weights that the graph takes, in its order, and the graph."""
        quantize.compile_gemv()
        length, size = (torch.export.Dim(name, min=2) for name in ("length", "size"))
        sizes: dict[str, dict] = {name: {} for name in inputs} | {"keys": {1: length}, "values": {1: length}}
        sizes |= {name: {dim: size} for name, dim in (("slots", 0), ("mask", 3)) if name in inputs}
        with torch.inference_mode(False), torch.no_grad(), catch_warnings(action="ignore"):
            module = BlockOfOneToken(block)
            exported = torch.export.export(module, (), inputs, dynamic_shapes=sizes, strict=True)
            join_products(exported.graph_module.graph)
            names = [spec.target for spec in exported.graph_signature.input_specs if spec.target]
            graph = torch._inductor.standalone_compile(
                exported.graph_module,
                [*(exported.state_dict[name] for name in names), *inputs.values()],
                dynamic_shapes="from_graph",
                options={"config_patches": {"cpp_wrapper": True}},
            )
        return [name.removeprefix("block.") for name in names], graph


def join_products(graph: torch.fx.Graph) -> None:
    """Join the products of each x into one: q, k and v, and the two that an MLP with a gate begins with."""
    gemv, aten = torch.ops.sologpt.gemv.default, torch.ops.aten
    products: dict[Any, list[Any]] = {}
    for node in graph.find_nodes(op="call_function", target=gemv):
        x, [weight], _ = cast(Any, node.args)
        while x.target in (aten.to.dtype, aten.reshape.default):
            x = x.args[0]
        products.setdefault((x, weight.meta["val"].dtype), []).append(node)
    for nodes in products.values():
        with graph.inserting_before(nodes[0]):
            weights, scales = ([each for node in nodes for each in node.args[i]] for i in (1, 2))
            y = graph.call_function(gemv, (nodes[0].args[0], weights, scales))
            rows = [node.meta["val"].size(1) for node in nodes]
            parts = graph.call_function(aten.split_with_sizes.default, (y, rows, 1))
            for i, node in enumerate(nodes):
                node.replace_all_uses_with(graph.call_function(operator.getitem, (parts, i)))
                graph.erase_node(node)


def find_weight(block: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the dict that holds a parameter or buffer, and its key there."""
    path, _, leaf = name.rpartition(".")
    owner = block.get_submodule(path)
    return owner._parameters if leaf in owner._parameters else owner._buffers, leaf


class BlockOfOneToken(nn.Module):
    """`block_of_one_token` as a module, which torch.export wants."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, row: Tensor, position: Tensor, slots: Tensor,
        rotary: Tensor | None = None, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        cache = LayerCache(keys, values, (row, position), len(slots))
        return block_of_one_token(self.block, x, cache, rotary, mask)


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
        self.block_of_one_row = ExportedBlock() if model.device.type == "cpu" else self.block
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
        blocks: Any = model.h
        packed = isinstance(blocks[0].mlp.c_fc, quantize.PackedLinear)  # cannot be exported
        run = self.block if packed or len(ids) > 1 else self.block_of_one_row
        x = model.wte(ids[:, None])  # (B, 1, C)
        x = model.embd_norm(x + model.wpe(positions) if model.wpe else x)
        keys, values = kv_cache.k.transpose(2, 3), kv_cache.v.transpose(2, 3)  # (n_layer, B, max_len, G, D)
        for block, k, v, kind in zip(blocks, keys, values, model.config.layer_types, strict=True):
            # .data is no view, whose guards would also compare n_layer with B
            x = run(block, x, LayerCache(k.data, v.data, slots, end), **inputs[kind])
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
        self.block_of_one_row = self.block  # a replay checks no guards
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

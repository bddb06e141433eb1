"""Fast inference, attached to a model from outside: packed or quantized weights (weights.py), and decoders.

    decode = fast.prepare(model)  # the best that this machine offers without compiling
    for token in model.generate(tokens, max_tokens=200, decode=decode): ...

A decoder takes the place of `GPT.step`: a callable (ids (B,), kv_cache) -> logits (B, V) that reads one more token of
each row. Each one here computes what `GPT.step` computes, up to rounding. It belongs to the caller and outlives a call
of generate, so what has been compiled or recorded is used again.
"""

import operator
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, cast
from warnings import catch_warnings
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import gpt
from gpt import GPT, Block, Decoder, KVCache, LayerCache, in_float32, visible
from sologpt import weights

pack, quantize = weights.pack, weights.quantize


def prepare(model: GPT, compile: bool = False, lookup: int = 0, rows: int = 1, quantize: str | None = None) -> Decoder:
    """The fastest decoder for the model's device, to be passed to generate as `decode`.

    compile: spend some seconds at the first token on torch.compile. lookup: draft so many tokens ahead where the text
    repeats itself (`Lookup`), for one row. rows: how many rows will be decoded at once. quantize: int8 or int4, see
    `weights.quantize`. The model is for inference only from then on, since its weights may be packed (`weights.pack`).
    """
    if lookup and rows > 1:
        raise ValueError(f"lookup reads ahead in one row, not in {rows}")
    if quantize:
        weights.quantize(model, quantize)
    if not compile or rows > 1 or lookup:  # compiled code reads plain weights faster, if there is one token
        pack(model)
    decode: Decoder = model.step
    if compile:
        decode = CudaGraphs(model) if model.device.type == "cuda" else Compiled(model)
    return Lookup(model, lookup, decode) if lookup else decode


# -----------------------------------------------------------------------------
# Compiled decode


@cache
def compile_rotate() -> None:
    """Make torch.compile put `rotate` in the place of gpt.rotate. Not done at import, since it imports the compiler."""
    torch.compiler.substitute_in_graph(gpt.rotate)(rotate)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """`gpt.rotate` in real numbers, for torch.compile, which generates no code for complex ones."""
    (a, b), (c, d) = in_float32(x).view(*x.shape[:-1], -1, 2).unbind(-1), rotations.unbind(-1)  # (B, T, H or 1, D/2)
    return torch.stack((a * c - b * d, a * d + b * c), dim=-1).flatten(-2).to(x.dtype)


def linear_of_one_token(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. For a single token, whose time is spent reading the weights: gemv on the CPU, elsewhere a loop."""
    if x.numel() != x.size(-1):
        return F.linear(x, weight, bias)
    if weight.device.type == "cpu" and weight.dtype in weights.DTYPES and weight.is_contiguous():
        y = weights.opaque_gemv(x, [weight], [])
    else:
        y = (in_float32(weight) * in_float32(x).flatten()).sum(-1).to(x.dtype)  # the compiler fuses it to one loop
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def attention_of_one_token(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, enable_gqa: bool
) -> Tensor:
    """F.scaled_dot_product_attention of one query in each row: queries (B, H, 1, D), or (B, G, H/G, D)."""
    G, D = k.size(1), k.size(3)
    q = q.view(q.size(0), G, -1, 1, D)  # (B, G, H/G, 1, D)
    scores = (in_float32(q) * in_float32(k)[:, :, None]).sum(-1) / D**0.5  # (B, G, H/G, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)[..., None]  # (B, G, H/G, S, 1)
    return (weights * in_float32(v)[:, :, None]).sum(-2, keepdim=True).flatten(1, 2).to(v.dtype)  # (B, H, 1, D)


class OneToken(TorchFunctionMode):
    """Inside, the model's products are the ones above."""

    products: ClassVar = {F.linear: linear_of_one_token, F.scaled_dot_product_attention: attention_of_one_token}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.products.get(func, func)(*args, **kwargs or {})


def block_of_one_token(
    block: nn.Module, x: Tensor, rotations: Tensor | None, mask: Tensor | None, layer: LayerCache | None
) -> Tensor:
    with OneToken():
        return block(x, rotations, mask, layer)


class ExportedBlock:
    """`block_of_one_token` of one row, without the guards of torch.compile, which take up to a third of a token's time.

    torch.export traces a block, and Inductor compiles the graph with a C++ wrapper. Weights are inputs of the graph, so
    all blocks share it.
    """

    def __init__(self) -> None:
        self.graphs: dict[tuple, tuple[list[str], Callable]] = {}
        self.weights: WeakKeyDictionary[Block, dict[tuple, list]] = WeakKeyDictionary()  # where they are, by graph
        self.slots = torch.empty(0, 0)

    def __call__(
        self, block: Block, x: Tensor, rotations: Tensor | None, mask: Tensor | None, layer: LayerCache
    ) -> Tensor:
        keys, values, (row, position), end = layer
        if len(self.slots) != end:  # a number is an input of a graph only as a tensor's size
            self.slots = torch.empty(end, 0)
        inputs = dict(x=x, keys=keys, values=values, row=row, position=position, slots=self.slots)
        if rotations is not None:
            inputs["rotations"] = rotations
        if mask is not None:
            inputs["mask"] = mask
        kind = (x.dtype, block.training, type(block.mlp.c_fc), *inputs)  # what torch.compile's guards would check
        if kind not in self.graphs:
            self.graphs[kind] = self.compile(block, inputs)
        names, graph = self.graphs[kind]
        places = self.weights.setdefault(block, {})
        if kind not in places:
            places[kind] = [find_weight(block, name) for name in names]
        return graph(*[tensors[name] for tensors, name in places[kind]], *inputs.values())[0]

    def compile(self, block: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[str], Callable]:
        """The names of the block's weights, in the order in which the graph takes them, and the graph."""
        weights.compile_gemv()
        length, size = (torch.export.Dim(name, min=2) for name in ("length", "size"))
        sizes: dict[str, dict] = {name: {} for name in inputs} | {"keys": {1: length}, "values": {1: length}}
        sizes |= {name: {dim: size} for name, dim in (("slots", 0), ("mask", 3)) if name in inputs}
        with torch.inference_mode(False), torch.no_grad(), catch_warnings(action="ignore"):
            exported = torch.export.export(BlockOfOneToken(block), (), inputs, dynamic_shapes=sizes, strict=True)
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
    """Multiply each x once: by q, k and v together, by gate and up together."""
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
    """The dict that holds a parameter or buffer, and its key there."""
    path, _, leaf = name.rpartition(".")
    owner = block.get_submodule(path)
    return owner._parameters if leaf in owner._parameters else owner._buffers, leaf


class BlockOfOneToken(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        row: Tensor,
        position: Tensor,
        slots: Tensor,
        rotations: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return block_of_one_token(self.block, x, rotations, mask, (keys, values, (row, position), len(slots)))


def head_of_one_token(model: GPT, x: Tensor) -> Tensor:
    with OneToken():
        return model.logits(model.norm(x)[:, -1])


Memory = tuple[Tensor, Tensor, Tensor]  # k, v and ids of a KVCache


class Compiled:
    """A decoder whose blocks and head are compiled: once for one row, once for a batch, once for a ragged batch.

    The blocks share their code, which holds for any length of the cache.
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
        # torch.compile specializes on sizes 0 and 1 and on slices of a whole dimension, and would recompile for them.
        # Where there is no room, `step` raises.
        if not 0 < longest < min(kv_cache.max_len - 1, self.model.config.sequence_len):
            return self.model.step(ids, kv_cache)
        self.model.check_cache(kv_cache, len(ids))
        end, lengths, mask = longest + 1, kv_cache.lengths[: None if ragged else 1].to(ids.device), None
        if ragged:
            kv_cache.k[:, :, :, longest] = 0  # what is masked must be finite: see KVCache.begin
            kv_cache.v[:, :, :, longest] = 0
            mask = visible(lengths[:, None], end)  # (B, 1, 1, S)
        logits = self.read(ids, lengths, mask, (kv_cache.k, kv_cache.v, kv_cache.ids), end)
        kv_cache.lengths += 1
        return logits

    def read(self, ids: Tensor, lengths: Tensor, mask: Tensor | None, memory: Memory, end: int) -> Tensor:
        """Read one token of each row, (B,), at positions lengths (B or 1,), attending to `end` slots of the cache."""
        model, positions, (keys, values, cached) = self.model, lengths[:, None], memory  # (B or 1, 1)
        slots = (torch.arange(len(ids), device=ids.device)[:, None], positions)
        cached[slots] = ids[:, None]
        types = model.by_layer_type(positions, mask, end)
        blocks: Any = model.h
        packed = isinstance(blocks[0].mlp.c_fc, weights.PackedLinear)  # cannot be exported
        run = self.block if packed or len(ids) > 1 else self.block_of_one_row
        x = model.wte(ids[:, None])  # (B, 1, C)
        x = model.embd_norm(x + model.wpe(positions) if model.wpe else x)
        for block, k, v, kind in zip(blocks, keys, values, model.config.layer_types, strict=True):
            rotations, allowed = types[kind]
            x = run(block, x, rotations, allowed, (k.transpose(1, 2), v.transpose(1, 2), slots, end))
        return self.head(model, x)


def cuda_graph(step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """Record step() as a CUDA graph. Returns its result, whose memory each replay overwrites, and the replay.

    torch.cuda.make_graphed_callables does the same, but its graphs wait for the garbage collector, which must not run
    while the next one is recorded. The stream is the graph's own, since cuBLAS's workspace goes with it.
    """
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and loads what must not be loaded while recording
                step()
        with torch.cuda.graph(graph, stream=stream):
            result = step()
    return result, graph.replay


class CudaGraphs(Compiled):
    """Compiled decode on a GPU by CUDA graphs: one launch for all layers instead of hundreds of kernel launches.

    A graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) replays kernels on fixed memory and
    shapes. So one is recorded per cache, and attends to the first `size` slots under a mask. When a row outgrows them,
    one of twice the size replaces it. Logits hold until the next call.
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
        self.model.check_cache(kv_cache, len(ids))
        if longest >= self.graphs.get(kv_cache, (0, None))[0]:
            self.graphs.pop(kv_cache, None)  # frees its memory first
            self.graphs[kv_cache] = self.record(kv_cache, longest + 1)
        _, decode = self.graphs[kv_cache]
        logits = decode(ids, kv_cache.lengths)
        kv_cache.lengths += 1
        return logits

    def record(self, kv_cache: KVCache, length: int) -> tuple[int, Callable]:
        """The size of a graph for rows of up to `length` tokens and more, and the graph."""
        size = min(max(self.smallest, 2 ** (length - 1).bit_length()), kv_cache.max_len)
        for b, n in enumerate(kv_cache.lengths.tolist()):  # what is masked must be finite: see KVCache.begin
            kv_cache.k[:, b, :, n:size] = 0
            kv_cache.v[:, b, :, n:size] = 0
        memory, device = (kv_cache.k, kv_cache.v, kv_cache.ids), kv_cache.k.device  # not the cache itself: it may go
        lengths = kv_cache.lengths.to(device, copy=True)
        ids = torch.zeros_like(lengths)

        def step() -> Tensor:
            return self.read(ids, lengths, visible(lengths[:, None], size), memory, size)

        logits, replay = cuda_graph(step, device)

        def decode(new_ids: Tensor, new_lengths: Tensor) -> Tensor:
            ids.copy_(new_ids)
            lengths.copy_(new_lengths)
            replay()
            return logits

        return size, decode


# -----------------------------------------------------------------------------
# Speculative decoding without a draft model


class Lookup:
    """Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding), for one row.

    The draft is what followed the latest earlier match of the last tokens. One forward verifies up to n draft tokens at
    little more than the price of one. As long as the caller's next token is the draft's, it is committed and the logits
    are there already; at the first other token, the rest of the draft is dropped.
    """

    def __init__(self, model: GPT, n: int, decode: Decoder | None = None) -> None:
        if not 1 <= n <= model.config.sequence_len:
            raise ValueError(f"lookup must draft at least 1 token and at most {model.config.sequence_len}, not {n}")
        self.model, self.n, self.decode = model, n, decode or model.step
        self.text = torch.zeros(0, dtype=torch.long)  # what the cache holds if the whole draft is right, (S,)
        self.logits: list[Tensor] = []  # after each draft token not committed yet, (1, V)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, kv_cache: KVCache) -> Tensor:
        if kv_cache.batch_size != 1:
            raise ValueError(f"lookup reads ahead in one row, not in {kv_cache.batch_size}")
        length = int(kv_cache.lengths)
        if self.logits and self.drafted(ids, kv_cache.ids[0], length):
            kv_cache.lengths += 1
            return self.logits.pop(0)
        text = torch.cat((kv_cache.ids[0, :length], ids))
        room = min(self.model.config.sequence_len, kv_cache.max_len) - len(text)
        draft = self.draft(text)[: max(room, 0)]
        if not len(draft):
            self.logits = []
            return self.decode(ids, kv_cache)
        x = self.model.hidden(torch.cat((ids, draft))[None], kv_cache)  # (1, 1 + n, C)
        kv_cache.truncate(length + 1)  # the draft's keys and values stay in their slots
        logits, *self.logits = self.model.logits(x[0]).split(1)
        self.text = torch.cat((text, draft))
        return logits

    def drafted(self, ids: Tensor, cached: Tensor, length: int) -> bool:
        """Whether ids is the next draft token and the cache still holds the draft."""
        n = len(self.text)
        return length == n - len(self.logits) and bool(ids == self.text[length]) and torch.equal(cached[:n], self.text)

    def draft(self, text: Tensor) -> Tensor:
        """n tokens after the latest earlier match of the last three, or two, tokens of text (S,), repeated if short."""
        for ngram in (3, 2):
            earlier = text[:-1].unfold(0, ngram, 1) if len(text) > ngram else text[:0, None]  # (S - ngram, ngram)
            matches = (earlier == text[-ngram:]).all(dim=-1).nonzero()  # (matches, 1)
            if len(matches):
                start = int(matches[-1]) + ngram
                return text[start + torch.arange(self.n, device=text.device) % (len(text) - start)]
        return text[:0]

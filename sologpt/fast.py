"""The fastest decoder for a model, from native.py (CPU), graphs.py (CUDA), lookup.py and quantize.py.

    decode = fast.prepare(model)
    for token in model.generate(tokens, max_tokens=200, decode=decode): ...

A decoder takes the place of `GPT.step`: a callable (ids (B,), kv_cache) -> logits (B, V) that reads one more
token of each row. It computes what `GPT.step` computes, up to rounding. It belongs to the caller, and keeps
what it has compiled or recorded for the next call of generate.
"""

from gpt import GPT, Decoder
from sologpt import native
from sologpt import quantize as weights
from sologpt.errors import UserError
from sologpt.graphs import Compiled, CudaGraphs
from sologpt.lookup import Lookup
from sologpt.quantize import QuantizedLinear, pack, quantize

__all__ = ["pack", "prepare", "quantize"]

SMALL = 2**26  # bytes of weights that a CPU reads in some milliseconds: not worth a C++ compiler's time


def prepare(
    model: GPT, compile: bool = False, lookup: int = 0, rows: int = 1, quantize: str | None = None
) -> Decoder:
    """Return the decoder to pass to generate. From here on, the model is for inference only.

    compile: on a GPU, use torch.compile, which takes some seconds at the first token; on a CPU, decode.cpp
    for a small model, too. lookup: draft this many tokens ahead where the text repeats itself, see `Lookup`.
    rows: how many rows will be decoded at once. quantize: "int8" or "int4", on the CPU. UserError for a
    lookup or a quantize that is not possible.
    """
    if lookup and rows > 1:
        raise UserError(f"lookup drafts for one row, not for {rows}")
    if quantize:
        weights.quantize(model, quantize)
    decode: Decoder = model.step
    if model.device.type != "cpu":
        if compile:
            decode = CudaGraphs(model) if model.device.type == "cuda" else Compiled(model)
    elif compile or is_large(model, rows):
        decode = native.prepare(model) or decode
    if not isinstance(decode, native.Native):
        pack(model)
    return Lookup(model, lookup, decode) if lookup else decode


def is_large(model: GPT, rows: int) -> bool:
    """Whether decode.cpp is worth its compilation. For more than 32 rows, packed weights are faster."""
    tensors = (*model.parameters(), *model.buffers())
    is_quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    return sum(x.nbytes for x in tensors) > SMALL and (is_quantized or rows <= native.MAX_TOKENS)

"""The fastest decoder for a model, from quantize.py (packed and quantized weights), graphs.py and lookup.py.

    decode = fast.prepare(model)
    for token in model.generate(tokens, max_tokens=200, decode=decode): ...

A decoder takes the place of `GPT.step`: a callable (ids (B,), kv_cache) -> logits (B, V) that reads one more
token of each row. It computes what `GPT.step` computes, up to rounding. It belongs to the caller, and keeps
what it has compiled or recorded for the next call of generate.
"""

from gpt import GPT, Decoder
from sologpt import quantize as weights
from sologpt.errors import UserError
from sologpt.graphs import Compiled, CudaGraphs
from sologpt.lookup import Lookup
from sologpt.quantize import pack, quantize

__all__ = ["pack", "prepare", "quantize"]


def prepare(
    model: GPT, compile: bool = False, lookup: int = 0, rows: int = 1, quantize: str | None = None
) -> Decoder:
    """Return the decoder to pass to generate. From here on, the model is for inference only.

    compile: use torch.compile, which takes some seconds at the first token. lookup: draft this many tokens
    ahead where the text repeats itself, see `Lookup`. rows: how many rows will be decoded at once. quantize:
    "int8" or "int4", on the CPU. UserError for a lookup or a quantize that is not possible.
    """
    if lookup and rows > 1:
        raise UserError(f"lookup drafts for one row, not for {rows}")
    if quantize:
        weights.quantize(model, quantize)
    if not compile or rows > 1 or lookup:  # compiled decode of one row is faster with plain weights
        pack(model)
    decode: Decoder = model.step
    if compile:
        decode = CudaGraphs(model) if model.device.type == "cuda" else Compiled(model)
    return Lookup(model, lookup, decode) if lookup else decode

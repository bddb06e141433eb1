"""Decode by CUDA graphs, where there is no GPU: what is recorded is run again without its Python, on a CPU."""

from contextlib import nullcontext

import pytest
import torch
from conftest import QWEN, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt import GPT, Block, Graphs, KVCache, Lookup


class Recorder(TorchDispatchMode):
    """As torch.cuda.CUDAGraph: the operations that are seen are done again, on the same memory."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.done:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


class Stream:
    def __init__(self, device):
        assert device.type == "cpu"

    def wait_stream(self, other):
        pass


CUDA = {
    "CUDAGraph": Recorder,
    "Stream": Stream,
    "current_stream": lambda: None,
    "stream": lambda stream: nullcontext(),
    "device": lambda device: nullcontext(),
    "graph": lambda graph, stream: graph,
}


def greedy(model, prompts, n, shortest, keep, lookup=0):
    """n greedy tokens for each row by graphs, and the lengths that were recorded."""
    cache, recorded = KVCache(model.config, len(prompts), model.config.sequence_len, dtype=model.dtype), []
    cache.k.fill_(float("nan"))  # as memory may be
    cache.v.fill_(float("nan"))
    graphs = Graphs(model, shortest)
    out = []
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        for name, value in CUDA.items():
            patch.setattr(torch.cuda, name, value)
        logits = model._prefill(prompts, cache)
        ahead = Lookup(model, cache, lookup, graphs) if lookup else None
        for _ in range(n):
            ids = logits.argmax(-1)
            out.append(ids.tolist())
            logits = ahead(ids, cache, keep) if ahead else model._decode(ids, cache, keep, graphs)
            if graphs.size not in recorded:
                recorded.append(graphs.size)
    return out, recorded, cache


def make(kind, **config) -> GPT:
    model = make_model(sequence_len=48, **config, **kind).eval()
    model.compiled_block, model.compiled_logits = Block.forward, GPT.logits  # only what is recorded is of interest
    return model


@pytest.mark.parametrize("kind", [{}, QWEN], ids=["nanochat", "qwen"])
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 48), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_same_tokens_past_a_full_window_too(kind, lengths, seed):
    model = make(kind, seed=seed)
    prompts = [torch.randint(61, (n,)).tolist() for n in lengths]
    out, recorded, _ = greedy(model, prompts, 70, 8, torch.ones(len(prompts), dtype=torch.bool))
    assert out == list(make_model(sequence_len=48, seed=seed, **kind).generate_batch(prompts, 70, temperature=0))
    longest = max(23 if n == 48 else n for n in lengths)  # a row that is full starts anew, with half of it
    assert recorded == [size for size in (8, 16, 32, 48) if size > longest]


def test_rows_that_have_ended_forget_what_they_read():
    model = make({})
    out, _, cache = greedy(model, [[1, 2, 3], [4]], 5, 8, torch.tensor([True, False]))
    assert cache.lengths.tolist() == [8, 1]
    assert cache.tokens() == [[1, 2, 3, *(row[0] for row in out)], [4]]


def test_beside_reading_ahead():
    model = make({})
    prompt = [1, 2, 3, 4] * 5
    out, _, _ = greedy(model, [prompt], 25, 8, torch.tensor([True]), lookup=4)
    assert [[token] for token in make_model(sequence_len=48).generate(prompt, 25, temperature=0)] == out

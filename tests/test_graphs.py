"""Decode by CUDA graphs, where there is no GPU: what is recorded is run again without its Python, on a CPU."""

import pytest
import torch
from conftest import QWEN, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import gpt
from gpt import GPT, Block, Graphs, KVCache, Lookup


def record(step, *args):
    """As gpt.cuda_graph: what it returns does the same operations, on the same memory."""
    inputs = [x.clone() for x in args]  # on a GPU the lengths are a copy
    for _ in range(3):
        step(*inputs)
    graph = make_fx(step)(*inputs)
    output = graph(*inputs)

    def replay(*args):
        for x, arg in zip(inputs, args, strict=True):
            x.copy_(arg)
        return output.copy_(graph(*inputs))

    return replay


def greedy(model, prompts, n, shortest, keep, lookup=0):
    """n greedy tokens for each row by graphs, and the lengths that were recorded."""
    cache, recorded = KVCache(model.config, len(prompts), model.config.sequence_len, dtype=model.dtype), []
    cache.k.fill_(float("nan"))  # as memory may be
    cache.v.fill_(float("nan"))
    graphs = Graphs(model, shortest)
    out = []
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "cuda_graph", record)
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
@settings(max_examples=5, deadline=None)
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

"""Decode by CUDA graphs, where there is no GPU: what is recorded is run again without its Python, on a CPU."""

import pytest
import torch
from conftest import GEMMA, GPT2, QWEN, WINDOWS, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt import KVCache
from sologpt import graphs
from sologpt.graphs import CudaGraphs
from sologpt.lookup import Lookup


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
                # neither a view nor in place
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def cuda_graph(step, device):
    """In place of graphs.cuda_graph, which needs a GPU to capture what is launched (tests/test_cuda.py runs it there)."""
    assert device.type == "cpu"
    step()
    with Recorder() as graph:
        result = step()
    return result, graph.replay


@pytest.fixture(autouse=True)
def recording(monkeypatch):
    monkeypatch.setattr(graphs, "cuda_graph", cuda_graph)


class Counted(CudaGraphs):
    """Keeps the sizes of the graphs that it records. Nothing is compiled: only what is recorded is of interest."""

    def __init__(self, model, smallest):
        super().__init__(model, smallest)
        self.block, self.head = graphs.block_of_one_token, graphs.head_of_one_token
        self.sizes = []

    def record(self, kv_cache, length):
        size, decode = super().record(kv_cache, length)
        self.sizes.append(size)
        return size, decode


def new_cache(model, rows):
    cache = KVCache(model.config, rows, model.config.sequence_len, dtype=model.dtype)
    cache.k.fill_(float("nan"))  # as memory may be
    cache.v.fill_(float("nan"))
    return cache


LAYERS = dict(layer_types="SF")


@pytest.mark.parametrize(
    "kind",
    [{}, QWEN, GPT2, WINDOWS | LAYERS, GEMMA | LAYERS],
    ids=["nanochat", "qwen", "gpt2", "windows", "gemma"],
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_same_tokens_past_a_full_window_too(kind, lengths, seed):
    model = make_model(sequence_len=24, n_layer=2, seed=seed, **kind)
    prompts = [torch.randint(61, (n,)).tolist() for n in lengths]
    decode, cache = Counted(model, 8), new_cache(model, len(prompts))
    out = list(model.generate_batch(prompts, 40, temperature=0, kv_cache=cache, decode=decode))
    assert out == list(model.generate_batch(prompts, 40, temperature=0))
    longest = max(11 if n == 24 else n for n in lengths)  # a row that is full restarts with half of it
    assert decode.sizes == [size for size in (8, 16, 24) if size > longest]


def test_a_graph_is_recorded_once_for_a_cache_and_freed_with_it():
    model = make_model(sequence_len=48)
    decode, cache = Counted(model, 8), new_cache(model, 1)
    said = [list(model.generate([1, 2, 3], 4, temperature=0, kv_cache=cache, decode=decode))]
    cache.reset()
    said.append(list(model.generate([1, 2, 3], 4, temperature=0, kv_cache=cache, decode=decode)))
    assert decode.sizes == [8] and said[0] == said[1] == list(model.generate([1, 2, 3], 4, temperature=0))
    assert len(decode.graphs) == 1
    del cache
    assert len(decode.graphs) == 0


def test_rows_that_have_ended_forget_what_they_read():
    model = make_model(sequence_len=48)
    cache, decode = new_cache(model, 2), Counted(model, 8)
    free = list(model.generate_batch([[1, 2, 3], [4]], 6, temperature=0))
    stop = free[0][1]
    assert stop not in [row[0] for row in free]
    list(
        model.generate_batch(
            [[1, 2, 3], [4]], 6, temperature=0, kv_cache=cache, decode=decode, stop_tokens=[stop]
        )
    )
    assert cache.tokens() == [[1, 2, 3, *(row[0] for row in free)], [4, stop]]


def test_beside_lookup():
    model = make_model(sequence_len=48)
    prompt, decode = [1, 2, 3, 4] * 5, Lookup(model, 4, Counted(model, 8))
    out = list(model.generate(prompt, 25, temperature=0, kv_cache=new_cache(model, 1), decode=decode))
    assert out == list(model.generate(prompt, 25, temperature=0))


def test_too_little_room_is_an_error_before_anything_is_read():
    model = make_model(sequence_len=48)
    cache = KVCache(model.config, 1, 6, dtype=model.dtype)
    decode = Counted(model, 4)
    with torch.inference_mode(), pytest.raises(ValueError, match="6"):
        for _ in range(9):
            decode(torch.tensor([1]), cache)
    assert cache.lengths.tolist() == [6]

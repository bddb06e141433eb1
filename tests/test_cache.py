import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import GEMMA, GPT2, LLAMA, QWEN, WINDOWS, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from gpt import GPTConfig, KVCache


def cache_for(model, batch_size, max_len=None) -> KVCache:
    return KVCache(model.config, batch_size, max_len or model.config.sequence_len, dtype=model.dtype)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 31)),
    n_kv_head=st.sampled_from([1, 2, 4]),
    switches=st.sampled_from([{}, LLAMA, QWEN, GPT2, WINDOWS, GEMMA]),
    seed=st.integers(0, 99),
)
def test_any_way_to_cut_a_sequence_gives_the_uncached_logits(cuts, n_kv_head, switches, seed):
    model = make_model(seed=seed, n_kv_head=n_kv_head, **switches)
    idx = torch.randint(61, (2, 32))
    cache, parts = cache_for(model, 2), []
    edges = [0, *sorted(set(cuts)), 32]
    for start, end in itertools.pairwise(edges):
        parts.append(model(idx[:, start:end], kv_cache=cache))
        assert cache.lengths.tolist() == [end, end]
    assert (torch.cat(parts, dim=1) - model(idx)).abs().max() < 1e-10


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=6),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    switches=st.sampled_from([{}, WINDOWS]),
    seed=st.integers(0, 99),
)
def test_rows_of_different_lengths_give_the_logits_of_each_alone(lengths, chunks, switches, seed):
    model = make_model(seed=seed, **switches)
    idx = torch.randint(61, (len(lengths), 32))
    cache = cache_for(model, len(lengths))
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)  # what lies past the lengths must not matter
    model(idx[:, : max(lengths)], kv_cache=cache)
    cache.truncate(lengths)
    for chunk in chunks:
        at = cache.lengths.clone()
        new = torch.stack([row[n : n + chunk] for row, n in zip(idx, at, strict=True)])
        logits = model(new, kv_cache=cache)
        for b, n in enumerate(at.tolist()):
            alone = model(idx[b : b + 1, : n + chunk])[0, n:]
            assert (logits[b] - alone).abs().max() < 1e-10


def test_no_attention_has_a_mask_and_grouped_heads():
    """PyTorch's fused kernels for CUDA refuse the two together, and the one that is left writes out all scores."""
    model, asked = make_model(), []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                asked.append((args[3] is not None, kwargs["enable_gqa"]))
            return func(*args, **kwargs or {})

    cache = cache_for(model, 2)
    with Watch():
        for lengths, T in ((None, 5), (None, 4), ([9, 4], 3), ([9, 4], 1)):  # causal, after a past, ragged
            cache.truncate(lengths or 32)
            model(torch.randint(61, (2, T)), kv_cache=cache)
    assert {mask for mask, _ in asked} == {True, False} and (True, True) not in asked


def test_the_cache_is_written_in_place():
    model = make_model(sequence_len=64)
    cache = cache_for(model, 2)
    storage = cache.k.data_ptr(), cache.v.data_ptr()
    for T in (5, 1, 7, 1, 1):
        model(torch.randint(61, (2, T)), kv_cache=cache)
    assert storage == (cache.k.data_ptr(), cache.v.data_ptr())
    assert cache.k.shape == (3, 2, 2, 64, 8)
    cache.truncate(3), cache.reset()
    assert storage == (cache.k.data_ptr(), cache.v.data_ptr())


def test_nothing_is_allocated_that_grows_with_the_step():
    model = make_model(torch.float32, sequence_len=2048)
    cache = cache_for(model, 1)

    def allocated() -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p, torch.inference_mode():
            model(torch.zeros(1, 1, dtype=torch.long), kv_cache=cache)
        return sum(e.self_cpu_memory_usage for e in p.key_averages() if e.self_cpu_memory_usage > 0)

    with torch.inference_mode():
        model(torch.zeros(1, 600, dtype=torch.long), kv_cache=cache)
    early = allocated()
    with torch.inference_mode():
        model(torch.zeros(1, 1400, dtype=torch.long), kv_cache=cache)
    assert 0 < allocated() <= early


def test_truncate_then_go_on_equals_never_having_gone_further():
    model = make_model()
    idx, detour = torch.randint(61, (2, 3, 24))
    straight, bent = cache_for(model, 3), cache_for(model, 3)
    model(idx[:, :10], kv_cache=straight)
    model(torch.cat([idx[:, :10], detour[:, :9]], dim=1), kv_cache=bent)
    bent.truncate(10)
    assert (model(idx[:, 10:], kv_cache=straight) - model(idx[:, 10:], kv_cache=bent)).abs().max() < 1e-12


def test_a_cache_prints_its_lengths_and_size():
    cache = KVCache(GPTConfig(n_layer=2, n_head=2, n_embd=32), 2, 1000, dtype=torch.bfloat16)
    cache.lengths += torch.tensor([3, 5])
    assert repr(cache) == "KVCache([3, 5] of 1000 tokens, torch.bfloat16, 0.5 MB)"


def test_truncate_never_lengthens_a_row():
    model = make_model()
    cache = cache_for(model, 3)
    model(torch.zeros(3, 8, dtype=torch.long), kv_cache=cache)
    cache.truncate([3, 8, 20])
    assert cache.lengths.tolist() == [3, 8, 8]
    cache.truncate(5)
    assert cache.lengths.tolist() == [3, 5, 5]


def test_after_reset_nothing_of_the_past_is_seen():
    model = make_model()
    idx = torch.randint(61, (2, 12))
    cache = cache_for(model, 2)
    model(torch.randint(61, (2, 30)), kv_cache=cache)
    cache.reset()
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)
    assert cache.lengths.tolist() == [0, 0]
    first = model(idx[:, :7], kv_cache=cache)
    cache.k[:, :, :, 7:], cache.v[:, :, :, 7:] = torch.nan, torch.nan
    assert torch.allclose(
        torch.cat([first, model(idx[:, 7:], kv_cache=cache)], dim=1), model(idx), atol=1e-12
    )


def test_expanded_rows_are_independent_copies():
    model = make_model()
    prompt, more = torch.randint(61, (2, 9)), torch.randint(61, (6, 4))
    cache = cache_for(model, 2)
    model(prompt, kv_cache=cache)
    wide = cache.expand(3)
    logits = model(more, kv_cache=wide)
    assert wide.lengths.tolist() == [13] * 6 and cache.lengths.tolist() == [9, 9]
    whole = model(torch.cat([prompt.repeat_interleave(3, dim=0), more], dim=1))
    assert (logits - whole[:, 9:]).abs().max() < 1e-10


def test_a_row_shares_the_memory_of_its_batch():
    model = make_model()
    idx = torch.randint(61, (3, 12))
    cache = cache_for(model, 3)
    model(idx[:, :6], kv_cache=cache)
    cache.rows(slice(1, 2)).reset()
    model(idx[1:2, :8], kv_cache=cache.rows(slice(1, 2)))
    assert cache.lengths.tolist() == [6, 8, 6]
    logits = model(idx[:, 8:9], kv_cache=cache)
    assert (logits[1, 0] - model(idx[1:2, :9])[0, -1]).abs().max() < 1e-10


def test_rows_can_be_filled_one_by_one():
    model = make_model()
    idx = torch.randint(61, (2, 12))
    cache = cache_for(model, 2)
    model(idx[:1, :9], kv_cache=cache.rows(slice(0, 1)))
    model(idx[1:, :3], kv_cache=cache.rows(slice(1, 2)))
    logits = model(torch.stack([idx[0, 9:10], idx[1, 3:4]]), kv_cache=cache)
    for b, n in enumerate((10, 4)):
        assert (logits[b, 0] - model(idx[b : b + 1, :n])[0, -1]).abs().max() < 1e-10


def test_a_forward_with_gradients_leaves_no_graph_in_the_cache():
    model = make_model()
    cache = cache_for(model, 1)
    for _ in range(3):
        model(torch.tensor([[1]]), kv_cache=cache)
    assert not cache.k.requires_grad and not cache.v.requires_grad


def test_nbytes_is_the_formula():
    model = make_model(torch.float32)
    assert KVCache(model.config, 5, 32, dtype=torch.bfloat16).nbytes == 2 * 3 * 5 * 2 * 32 * 8 * 2


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda m: KVCache(m.config, 1, 8, dtype=m.dtype), ("1 x 4", "[6] of 8")),  # too small
        (lambda m: KVCache(m.config, 2, 32, dtype=m.dtype), ("1 x 4", "[0, 0] of 32")),  # another batch
    ],
)
def test_a_cache_that_does_not_fit_is_an_error_and_stays_as_it_was(make, words):
    model = make_model()
    cache = make(model)
    if cache.max_len == 8:
        model(torch.zeros(1, 6, dtype=torch.long), kv_cache=cache)
    before = cache.k.clone(), cache.lengths.clone()
    with pytest.raises(ValueError) as e:
        model(torch.zeros(1, 4, dtype=torch.long), kv_cache=cache)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert torch.equal(cache.lengths, before[1]) and torch.equal(cache.k, before[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda m: KVCache(make_model(n_layer=1).config, 1, 32, dtype=m.dtype),
        lambda m: KVCache(make_model(head_dim=6).config, 1, 32, dtype=m.dtype),
        lambda m: KVCache(m.config, 1, 32, dtype=torch.float32),
        lambda m: KVCache(m.config, 1, 32, "meta", m.dtype),
    ],
)
def test_a_cache_of_another_model_is_an_error_and_holds_nothing(make):
    """PyTorch's own: an index, a shape, a dtype or a device that does not fit."""
    model = make_model()
    cache = make(model)
    with pytest.raises((RuntimeError, IndexError, NotImplementedError)):
        model(torch.zeros(1, 4, dtype=torch.long), kv_cache=cache)
    assert cache.lengths.tolist() == [0]


def test_bad_lengths_are_errors():
    cache = cache_for(make_model(), 2)
    for bad in ([1, 2, 3], -1, [0, -2]):
        with pytest.raises(ValueError):
            cache.truncate(bad)

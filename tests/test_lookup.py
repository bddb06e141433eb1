"""Prompt lookup decoding gives what plain decoding gives, in fewer forwards."""

import pytest
import torch
from conftest import GEMMA, QWEN, WINDOWS, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import KVCache
from sologpt.errors import UserError
from sologpt.lookup import Lookup
from sologpt.native import Native, prepare


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=3),
    n=st.integers(1, 32),
    temperature=st.sampled_from([0, 0.3, 1.0]),
    spoken=st.integers(0, 50),
    max_len=st.integers(32, 40),
    seed=st.integers(0, 99),
)
def test_looking_ahead_changes_nothing(turns, n, temperature, spoken, max_len, seed):
    """Neither what is said nor what a cache holds after it, also past a full window and when the caller walks away."""
    model = make_model(seed=seed, sequence_len=32, n_layer=1)
    said = []
    lookup = Lookup(model, n)  # outlives the calls
    for decode in (None, lookup):
        cache = KVCache(model.config, 1, max_len, dtype=model.dtype)
        said.append([])
        for turn in turns:
            steps = model.generate(
                turn, 40, temperature, seed=seed, stop_tokens=[9], kv_cache=cache, decode=decode
            )
            said[-1].append([token for token, _ in zip(steps, range(spoken), strict=False)])
            steps.close()
            said[-1].append(cache.tokens())
    assert said[0] == said[1]


def test_looking_ahead_reads_what_repeats_at_once():
    model = make_model(sequence_len=200, n_layer=1)
    # the next token is a function of the last: it soon repeats
    torch.nn.init.zeros_(model.h[0].attn.c_proj.weight)
    forwards = []
    model.norm.register_forward_hook(lambda *_: forwards.append(1))
    counts, texts = [], []
    for decode in (None, Lookup(model, 8)):
        texts.append(list(model.generate([1], 150, temperature=0, decode=decode)))
        counts.append(len(forwards))
        forwards.clear()
    assert texts[0] == texts[1]
    assert counts[0] == 150 and counts[1] < 60


LAYERS = dict(n_layer=2, layer_types="SF")


@pytest.mark.parametrize(
    "kind", [{}, QWEN, WINDOWS | LAYERS, GEMMA | LAYERS], ids=["nanochat", "qwen", "windows", "gemma"]
)
@settings(max_examples=10, deadline=None)
@given(
    turns=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=2),
    n=st.integers(1, 32),
    max_len=st.integers(32, 40),
    seed=st.integers(0, 99),
)
def test_with_decode_cpp_it_changes_nothing_either(kind, turns, n, max_len, seed):
    """In float32, where no two logits nearly tie. Also for drafts that it reads in several calls."""
    model = make_model(torch.float32, seed, **dict(sequence_len=32, n_layer=1) | kind)
    said = []
    for decode in (None, Lookup(model, n, prepare(model))):
        cache = KVCache(model.config, 1, max_len, dtype=model.dtype)
        said.append([])
        for turn in turns:
            said[-1].append(list(model.generate(turn, 40, temperature=0, kv_cache=cache, decode=decode)))
            said[-1].append(cache.tokens())
    assert said[0] == said[1]


def test_with_decode_cpp_the_prompt_and_each_draft_are_one_call():
    class Counted(Native):
        def read(self, idx, kv_cache, is_last=False):
            sizes.append(idx.size(1))
            return super().read(idx, kv_cache, is_last)

    model, sizes, forwards = make_model(torch.float32, sequence_len=200, n_layer=1), [], []
    # the next token is a function of the last: it soon repeats
    torch.nn.init.zeros_(model.h[0].attn.c_proj.weight)
    plain = list(model.generate([1], 150, temperature=0))
    model.norm.register_forward_hook(lambda *_: forwards.append(1))
    assert prepare(model) is not None
    assert list(model.generate([1], 150, temperature=0, decode=Lookup(model, 7, Counted(model)))) == plain
    assert forwards == [] and len(sizes) < 60 and {*sizes} >= {1, 8} and max(sizes) == 8


def test_lookup_is_for_one_row_and_drafts_at_least_one_token():
    model = make_model()
    with pytest.raises(ValueError, match="one row"):
        list(model.generate_batch([[1], [2]], 5, decode=Lookup(model, 3)))
    for n in (0, -1, 33, 10**9):  # no draft is longer than the context
        with pytest.raises(UserError, match=f"at least 1 token and at most 32, not {n}"):
            Lookup(model, n)


def test_each_call_commits_one_token_and_a_changed_cache_drops_the_draft():
    """A draft is for what the cache held: after a truncate, or in another cache, it must not be used."""
    model = make_model(sequence_len=64)
    prompt, decode = [1, 2, 3, 4] * 4, Lookup(model, 4)
    caches = [KVCache(model.config, 1, 64, dtype=model.dtype) for _ in range(2)]
    with torch.inference_mode():
        model.prefill([prompt], caches[0])
        decode(torch.tensor([1]), caches[0])
        assert decode.logits and caches[0].lengths.tolist() == [17]
        model.prefill([[9, *prompt[1:], 1]], caches[1])  # as long, and the same token comes next
        for cache, held in ((caches[1], [9, *prompt[1:], 1]), (caches[0], [*prompt, 1])):
            logits = decode(torch.tensor([2]), cache)
            torch.testing.assert_close(logits[0], model(torch.tensor([[*held, 2]]))[0, -1])
            assert cache.tokens() == [[*held, 2]]
        caches[0].truncate(5)
        logits = decode(torch.tensor([3]), caches[0])
        torch.testing.assert_close(logits[0], model(torch.tensor([[*prompt[:5], 3]]))[0, -1])


def test_a_match_of_three_tokens_comes_before_a_later_one_of_two():
    lookup = Lookup(make_model(), 2)
    assert lookup.draft(torch.tensor([5, 6, 7, 1, 9, 6, 7, 2, 5, 6, 7])).tolist() == [1, 9]
    assert lookup.draft(torch.tensor([8, 6, 7, 1, 9, 6, 7, 2, 5, 6, 7])).tolist() == [2, 5]

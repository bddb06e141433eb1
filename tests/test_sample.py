import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from gpt import Sampling, sample


def by_transformers(logits, temperature, top_k, top_p, min_p) -> torch.Tensor:
    chain = [theirs.TemperatureLogitsWarper(temperature)]
    chain += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    chain += [theirs.TopPLogitsWarper(top_p)] if top_p else []
    chain += [theirs.MinPLogitsWarper(min_p)] if min_p else []
    for processor in chain:
        logits = processor(None, logits)
    return logits.softmax(-1)


@settings(max_examples=150, deadline=None)
@given(
    V=st.one_of(st.integers(2, 100), st.sampled_from([1000, 50_000])),
    B=st.integers(1, 8),
    levels=st.sampled_from([3, 20, None]),  # few levels: many ties
    temperature=st.floats(0.2, 3.0),
    top_k=st.one_of(st.none(), st.integers(1, 120)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.none(), st.floats(0.01, 0.99)),
    seed=st.integers(0, 999),
)
def test_each_filter_and_all_together_leave_what_transformers_leaves(
    V, B, levels, temperature, top_k, top_p, min_p, seed
):
    torch.manual_seed(seed)
    logits = torch.randn(B, V, dtype=torch.float64) * 3
    if levels:
        logits = (logits * levels / 9).round()
    expected = by_transformers(logits.clone(), temperature, top_k, top_p, min_p)
    ours = Sampling(temperature, top_k, top_p, min_p).filter(logits).softmax(-1)
    assert torch.equal((ours > 0).sum(-1), (expected > 0).sum(-1))
    assert torch.allclose(ours.sort().values, expected.sort().values)
    # Which ones of tokens that tie for the last place of top_p is up to how each library sorts
    last = logits.masked_fill(ours == 0, math.inf).amin(-1, keepdim=True)
    assert torch.allclose(ours.masked_fill(logits == last, 0), expected.masked_fill(logits == last, 0))


@pytest.mark.parametrize("top_p, kept", [(0.2, 1), (0.25, 1), (0.5, 2), (0.6, 3), (0.75, 3), (0.8, 4)])
def test_top_p_keeps_the_fewest_tokens_that_sum_to_p(top_p, kept):
    """Also where they sum to exactly p: four tokens of probability 1/4."""
    logits = torch.zeros(1, 4)
    assert Sampling(top_p=top_p).filter(logits).isfinite().sum() == kept
    assert (by_transformers(logits, 1.0, None, top_p, None) > 0).sum() == kept


@settings(max_examples=30, deadline=None)
@given(V=st.integers(2, 200), B=st.integers(1, 8), penalty=st.floats(0.1, 5.0), seed=st.integers(0, 999))
def test_the_penalty_gives_the_logits_of_transformers(V, B, penalty, seed):
    torch.manual_seed(seed)
    logits, tokens = torch.randn(B, V), torch.randint(V, (B, 10))
    seen = torch.zeros(B, V, dtype=torch.bool).scatter_(1, tokens, True)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    assert torch.equal(Sampling(repetition_penalty=penalty).filter(logits, seen), expected)


def test_draws_agree_with_the_probabilities():
    """Chi-square over 20,000 draws; 27.9 is the 99.9th percentile for 9 degrees of freedom."""
    torch.manual_seed(0)
    logits = torch.randn(1, 10)
    generator = torch.Generator().manual_seed(1)
    draws = sample(logits.expand(20_000, -1), generator=generator)
    expected = logits.softmax(-1)[0] * 20_000
    assert ((torch.bincount(draws, minlength=10) - expected) ** 2 / expected).sum() < 27.9


def test_what_is_filtered_out_is_never_drawn():
    torch.manual_seed(0)
    logits, generator = torch.randn(1, 50), torch.Generator().manual_seed(0)
    for filters in (
        dict(top_k=5),
        dict(top_p=0.4),
        dict(min_p=0.3),
        dict(temperature=0.5, top_k=9, top_p=0.8, min_p=0.1),
    ):
        allowed = Sampling(**filters).filter(logits)[0].isfinite().nonzero().flatten().tolist()
        draws = sample(logits.expand(2000, -1), **filters, generator=generator)
        assert set(draws.tolist()) == set(allowed)


@pytest.mark.parametrize("u, drawn", [(0.0, 1), (0.2499, 1), (0.2501, 3), (1 - 2**-53, 3)])
def test_no_number_draws_what_has_no_probability(monkeypatch, u, drawn):
    """Numbers from 0 to the largest below 1, for probabilities 0, 1/4, 0, 3/4 and 0."""
    logits = torch.tensor([0, 1 / 4, 0, 3 / 4, 0]).log()
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, u, dtype=torch.float64))
    assert sample(logits.expand(3, -1)).tolist() == [drawn] * 3


def test_temperature_zero_is_argmax_and_off_is_off():
    logits = torch.randn(5, 40)
    assert torch.equal(sample(logits, temperature=0), logits.argmax(-1))
    for off in (
        dict(top_k=0),
        dict(top_k=None),
        dict(top_p=0.0),
        dict(top_p=1.0),
        dict(min_p=0.0),
        dict(top_k=1000),
    ):
        draw = [sample(logits, **f, generator=torch.Generator().manual_seed(3)) for f in ({}, off)]
        assert torch.equal(*draw)


def test_a_fraction_of_tokens_is_a_type_error():
    with pytest.raises(TypeError):
        Sampling(top_k=1.5)


def test_logits_are_left_as_they_were_and_so_is_the_global_generator():
    logits = torch.randn(2, 30)
    before, state = logits.clone(), torch.get_rng_state()
    sample(logits, temperature=0.7, top_k=5, top_p=0.8, min_p=0.1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits, before) and torch.equal(torch.get_rng_state(), state)


def test_min_p_keeps_a_token_that_is_just_as_likely_as_it_says():
    """exp(-ln 2) is 1/2 to the last bit."""
    logits = torch.tensor([[0.0, -math.log(2), -math.log(2) - 1e-9]], dtype=torch.float64)
    assert Sampling(min_p=0.5).filter(logits).isfinite().tolist() == [[True, True, False]]

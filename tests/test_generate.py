import dataclasses
import inspect
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt
from gpt import GPT, KVCache


def uncached(model, tokens: list[int], n: int) -> list[int]:
    """Greedy tokens by the documented rule, without a cache: a full window is cut to its last half."""
    window, out = model.config.sequence_len, []
    context = tokens[-window:]
    for _ in range(n):
        if len(context) > window:
            context = context[-max(1, window // 2) :]
        token = model(torch.tensor([context]))[0, -1].argmax().item()
        context = [*context, token]
        out.append(token)
    return out


def finish(steps):
    """All that a generator yields, and what it returns."""
    out = []
    try:
        while True:
            out.append(next(steps))
    except StopIteration as end:
        return out, end.value


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 50), window=st.integers(1, 24), seed=st.integers(0, 99))
def test_greedy_equals_the_loop_without_a_cache_past_the_window_too(length, window, seed):
    model = make_model(seed=seed, sequence_len=window, n_layer=2).eval()
    tokens = torch.randint(61, (length,)).tolist()
    out, reason = finish(model.generate(tokens, 40, temperature=0))
    assert out == uncached(model, tokens, 40)
    assert reason == "length"


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_rows_of_a_batch_get_what_they_would_get_alone(lengths, seed):
    model = make_model(seed=seed, sequence_len=24, n_layer=2)
    prompts = [torch.randint(61, (n,)).tolist() for n in lengths]
    rows, reasons = finish(model.generate_batch(prompts, 30, temperature=0))
    assert reasons == ["length"] * len(prompts)
    for b, prompt in enumerate(prompts):
        assert [row[b] for row in rows] == list(model.generate(prompt, 30, temperature=0))


def test_rows_end_on_their_own_and_change_nothing_in_the_others():
    model = make_model()
    prompts = [[1, 2, 3], [4], [5, 6]]
    full, _ = finish(model.generate_batch(prompts, 25, seed=3))
    stop = full[4][1]
    rows, reasons = finish(model.generate_batch(prompts, 25, seed=3, stop_tokens=[stop]))
    for b in range(3):
        column = [row[b] for row in full]
        expected = column[: column.index(stop) + 1] if stop in column else column
        assert [row[b] for row in rows if row[b] is not None] == expected
        assert reasons[b] == ("stop" if stop in column else "length")
    assert "stop" in reasons


def test_num_samples_are_drawn_independently_from_oneprefill(monkeypatch):
    model = make_model()
    prefills = []
    monkeypatch.setattr(model, "prefill", lambda *a, f=model.prefill: prefills.append(a) or f(*a))
    rows, reasons = finish(model.generate_batch([[1, 2], [3, 4, 5]], 12, num_samples=4, temperature=1.5))
    assert len(prefills) == 1 and len(reasons) == 8
    columns = {tuple(row[b] for row in rows) for b in range(4)}
    assert len(columns) == 4
    greedy, _ = finish(model.generate_batch([[1, 2], [3, 4, 5]], 12, num_samples=2, temperature=0))
    alone = [list(model.generate(p, 12, temperature=0)) for p in ([1, 2], [3, 4, 5])]
    assert [[row[b] for row in greedy] for b in range(4)] == [alone[0], alone[0], alone[1], alone[1]]


def test_the_seed_decides():
    model = make_model()
    draw = lambda seed: list(model.generate([1, 2, 3], 30, seed=seed))  # noqa: E731
    torch.manual_seed(5)
    first, state = draw(7), torch.get_rng_state()
    torch.manual_seed(6)
    assert draw(7) == first != draw(8)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state), "generation must not touch the global generator"


def test_stop_token_is_yielded_then_ends_it():
    model = make_model()
    tokens = list(model.generate([1], 20, temperature=0))
    stop = tokens[5]
    out, reason = finish(model.generate([1], 20, temperature=0, stop_tokens=[stop]))
    assert out == tokens[: tokens.index(stop) + 1] and reason == "stop"


def test_it_streams():
    model = make_model()
    forwards = []
    model.norm.register_forward_hook(lambda *_: forwards.append(1))
    steps = model.generate([1, 2], 10)
    assert forwards == []
    next(steps), next(steps)
    assert len(forwards) == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_given_back_however_it_ends(training):
    model = make_model(dropout=0.5).train(training)
    for _ in model.generate([1], 10):
        assert model.training == training
        break
    assert model.training == training
    list(model.generate([1], 3))
    assert model.training == training
    steps = model.generate([1], 10)
    next(steps)
    with pytest.raises(RuntimeError):
        steps.throw(RuntimeError("the caller's"))
    assert model.training == training
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()  # and gradients flow as before


def test_a_penalty_over_prompt_and_generated_tokens():
    model = make_model()
    out = list(model.generate([7, 8], 40, temperature=0, repetition_penalty=1e9))
    assert len(set(out) | {7, 8}) == len(out) + 2, "with such a penalty no token may come twice"


@pytest.mark.parametrize(
    "prompt, settings, words",
    [
        ([], {}, "empty"),
        ([1, 61], {}, "61"),
        ([-1], {}, "-1"),
        ([1], dict(max_tokens=-1), "do not fit"),
        ([1], dict(temperature=-0.5), "-0.5"),
        ([1], dict(temperature=float("nan")), "temperature"),
        ([1], dict(temperature=float("inf")), "temperature"),
        ([1], dict(temperature=1e-45), "temperature"),
        ([1], dict(seed=10**20), "[Oo]verflow|too large"),
        ([1], dict(suppress_tokens=range(61)), "not finite"),
        ([1], dict(top_k=-1), "top_k"),
        ([1], dict(top_p=1.5), "1.5"),
        ([1], dict(top_p=-0.1), "top_p"),
        ([1], dict(min_p=1.1), "min_p"),
        ([1], dict(temperature=1e-10), "temperature"),
        ([1], dict(repetition_penalty=0.0), "repetition_penalty"),
        ([1], dict(repetition_penalty=1e-30), "repetition_penalty"),
        ([1], dict(repetition_penalty=1e300), "repetition_penalty"),
        ([1], dict(repetition_penalty=math.inf), "repetition_penalty"),
        ([1], dict(repetition_penalty=math.nan), "repetition_penalty"),
        ([1.5], {}, "1.5"),
        (["a"], {}, "'a'"),
        ([1], dict(max_tokens=2.5), "float"),
        ([1], dict(top_k=2.5), "float"),
        ([1], dict(seed="x"), "str"),
        ([1], dict(stop_tokens=["a"]), "str"),
        ([1], dict(suppress_tokens=[2.5]), "2.5"),
    ],
)
def test_bad_input_is_an_error_before_a_token(prompt, settings, words):
    """A ValueError for a number out of range; Python's or PyTorch's own error for another type."""
    with pytest.raises((ValueError, TypeError, RuntimeError, OverflowError), match=words):
        next(make_model().generate(prompt, **dict(max_tokens=5) | settings))


WRONG_TYPES = [
    (name, value)
    for name in ("tokens", "stop_tokens", "suppress_tokens")
    for value in (["a"], [1.5], 3, "ab")
]
WRONG_TYPES += [
    (name, value) for name in ("max_tokens", "seed", "top_k", "num_samples") for value in (1.5, "x", [])
]
WRONG_TYPES += [(name, "hot") for name in ("temperature", "top_p", "min_p", "repetition_penalty")]
WRONG_TYPES += [("tokens", None), ("max_tokens", None), ("num_samples", None), ("kv_cache", 5)]


@pytest.mark.parametrize("name, value", [pair for pair in WRONG_TYPES if pair != ("top_k", [])])  # [] is off
@pytest.mark.parametrize("batch", [False, True])
def test_a_wrong_type_is_an_error_before_anything_is_computed(batch, name, value):
    """And so the caller's cache stays as it was."""
    if name == "num_samples" and not batch:
        return
    model = make_model()
    cache = new_cache(model)
    model.prefill([[1, 2]], cache)
    arguments = dict(tokens=[3], max_tokens=5, kv_cache=cache) | {name: value}
    if batch:
        arguments["prompts"] = [arguments.pop("tokens")]
    forwards = []
    model.wte.register_forward_hook(lambda *_: forwards.append(1))
    generate = model.generate_batch if batch else model.generate
    with pytest.raises((TypeError, ValueError, AttributeError)):
        next(generate(**arguments))
    assert not forwards and cache.tokens() == [[1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("penalty", [1e-9, 1.0, 1e9])
def test_extremes_draw_tokens(dtype, temperature, penalty):
    model = make_model(dtype, softcap=0.0, n_layer=1)
    model.lm_head.weight.data *= 1e4
    for top_k, top_p, min_p in itertools.product((None, 1, 2**31), (None, 1e-30, 1), (None, 1e-30, 1)):
        tokens = list(model.generate([1, 2], 4, temperature, top_k, top_p, min_p, penalty))
        assert len(tokens) == 4 and 0 <= min(tokens) <= max(tokens) < 61


def test_bad_batches_are_errors():
    model = make_model()
    for bad in ([], [[1], []], [[1], [61]]):
        with pytest.raises(ValueError):
            next(model.generate_batch(bad, 5))
    for bad in (0, -1):
        with pytest.raises(ValueError, match="num_samples"):
            next(model.generate_batch([[1]], 5, num_samples=bad))
    with pytest.raises(TypeError):
        next(model.generate_batch([[1]], 5, num_samples=2.5))


def test_integers_of_numpy_and_torch_are_integers():
    model = make_model()
    tokens = list(model.generate([1, 2, 3], 20, top_k=5, seed=7))
    prompts = (np.array([1, 2, 3], dtype=np.uint16), torch.tensor([1, 2, 3]))
    for prompt, number in zip(prompts, (np.int64, torch.tensor), strict=True):
        stop = [number(tokens[9])]
        ours = list(model.generate(prompt, number(20), top_k=number(5), seed=number(7), stop_tokens=stop))
        assert ours == tokens[: tokens.index(tokens[9]) + 1]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error_and_no_token(temperature, value):
    model = make_model(softcap=0.0)
    model.h[1].mlp.c_proj.weight.data[3, 5] = value
    with pytest.raises(RuntimeError, match="not finite"):
        list(model.generate([1, 2], 5, temperature=temperature))
    assert model.training, "the mode is given back"


# ---- from a cache that holds something


def new_cache(model, max_len=None) -> KVCache:
    return KVCache(model.config, 1, max_len or model.config.sequence_len, dtype=model.dtype)


def test_a_second_turn_reads_only_what_is_new():
    model = make_model(sequence_len=64)
    cache, read = new_cache(model), []
    model.wte.register_forward_hook(lambda _, args, out: read.append(args[0].shape[1]))
    first = list(model.generate([1, 2, 3, 4, 5], 6, temperature=0, kv_cache=cache))
    assert cache.tokens() == [[1, 2, 3, 4, 5, *first]], "what was said stays, the last token included"
    assert read == [5] + [1] * 6
    read.clear()
    second = list(model.generate([6, 7], 4, temperature=0, kv_cache=cache))
    assert read == [2] + [1] * 4
    read.clear()
    assert second == list(model.generate([1, 2, 3, 4, 5, *first, 6, 7], 4, temperature=0))


@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_a_conversation_equals_generating_from_all_that_the_cache_holds(turns, seed):
    model = make_model(seed=seed, sequence_len=24, n_layer=2)
    cache = new_cache(model)
    for n_new, n_generated in turns:
        new = torch.randint(61, (n_new,)).tolist()
        expected = list(model.generate(cache.tokens()[0] + new, n_generated, temperature=0))
        assert list(model.generate(new, n_generated, temperature=0, kv_cache=cache)) == expected
        if expected:
            assert cache.tokens()[0][-1] == expected[-1]


@pytest.mark.parametrize("new, read", [(6, [6]), (7, [16])])
def test_a_prompt_that_just_fits_beside_the_past_is_all_that_is_read(new, read, monkeypatch):
    model = make_model(sequence_len=16)
    cache = new_cache(model)
    model.prefill([range(10)], cache)
    sizes, hidden = [], GPT.hidden
    monkeypatch.setattr(
        GPT, "hidden", lambda self, idx, *rest: sizes.append(idx.size(1)) or hidden(self, idx, *rest)
    )
    model.prefill([range(20, 20 + new)], cache)
    assert sizes == read and cache.tokens() == [[*range(10), *range(20, 20 + new)][-16:]]


def test_what_was_said_stays_when_the_caller_walks_away():
    model = make_model()
    cache = new_cache(model)
    said = []
    for token in model.generate([1, 2], 20, temperature=0, kv_cache=cache):
        said.append(token)
        if len(said) == 3:
            break
    assert cache.tokens() == [[1, 2, *said]]
    rest = list(model.generate([9], 5, temperature=0, kv_cache=cache))
    assert rest == list(model.generate([1, 2, *said, 9], 5, temperature=0))


def test_a_shared_prefix_serves_many_prompts():
    model = make_model()
    cache = new_cache(model)
    model(torch.tensor([[5, 6, 7, 8]]), kv_cache=cache)
    for prompt in ([1], [2, 3]):
        out = list(model.generate(prompt, 5, temperature=0, kv_cache=cache))
        assert out == list(model.generate([5, 6, 7, 8, *prompt], 5, temperature=0))
        cache.truncate(4)


def test_the_penalty_sees_the_prefix():
    model = make_model()
    cache = new_cache(model)
    model(torch.tensor([[5, 6, 7, 8]]), kv_cache=cache)
    out = list(model.generate([9], 20, temperature=0, repetition_penalty=1e9, kv_cache=cache))
    assert not {5, 6, 7, 8, 9} & set(out)


def test_a_batch_goes_on_from_a_ragged_cache():
    model = make_model()
    cache = KVCache(model.config, 2, 32, dtype=model.dtype)
    model(torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), kv_cache=cache)
    cache.truncate([4, 2])
    rows, _ = finish(model.generate_batch([[7], [8, 9, 10]], 8, temperature=0, kv_cache=cache))
    for b, text in enumerate(([1, 2, 3, 4, 7], [5, 6, 8, 9, 10])):
        column = [row[b] for row in rows]
        assert column == list(model.generate(text, 8, temperature=0)) and cache.tokens()[b] == text + column


def test_a_row_that_has_ended_leaves_nothing_unsaid_in_the_cache():
    model = make_model(sequence_len=16)
    prompts = [[1, 2], [4], [5, 6, 7]]
    full, _ = finish(model.generate_batch(prompts, 30, temperature=0))
    for stop in {token for row in full[:6] for token in row}:
        cache = KVCache(model.config, 3, 16, dtype=model.dtype)
        rows, reasons = finish(
            model.generate_batch(prompts, 8, temperature=0, stop_tokens=[stop], kv_cache=cache)
        )
        for b, prompt in enumerate(prompts):
            assert cache.tokens()[b] == prompt + [row[b] for row in rows if row[b] is not None], reasons


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda m: new_cache(m, 5), "6 tokens .* 5 tokens"),
        (lambda m: KVCache(m.config, 2, 32, dtype=m.dtype), r"1 x 6 tokens .*\[0, 0\]"),
        (lambda m: new_cache(make_model(n_layer=2)), "out of bounds"),
        (lambda m: KVCache(m.config, 1, 32), "dtype"),
    ],
)
def test_a_cache_that_does_not_fit_is_an_error_and_holds_nothing(make, words):
    """Too few tokens or other rows are a ValueError; another model or dtype is an error of PyTorch's."""
    model = make_model()
    cache = make(model)
    with pytest.raises((ValueError, IndexError, RuntimeError), match=words):
        next(model.generate([1] * 6, 10, kv_cache=cache))
    assert cache.lengths.sum() == 0


def test_a_cache_that_gets_full_is_an_error_and_keeps_what_it_holds():
    model = make_model()
    cache = new_cache(model, 10)
    steps = model.generate([1] * 6, 10, temperature=0, kv_cache=cache)
    said = [next(steps) for _ in range(5)]
    with pytest.raises(ValueError, match=r"1 x 1 tokens .*\[10\] of 10"):
        next(steps)  # the fifth token has no room
    assert cache.tokens() == [[1] * 6 + said[:4]]
    assert list(model.generate([1] * 6, 5, temperature=0)) == said


def test_a_prompt_that_does_not_fit_leaves_the_cache_as_it_was():
    """Also where the window would be restarted with it."""
    model = make_model(sequence_len=16)
    for new in (3, 7, 20):
        cache = new_cache(model, 12)
        model.prefill([range(10)], cache)
        with pytest.raises(ValueError, match=r"tokens do not fit .*\[10\] of 12"):
            next(model.generate([1] * new, 5, kv_cache=cache))
        assert cache.tokens() == [[*range(10)]]


def test_samples_from_a_callers_cache_come_one_at_a_time():
    model = make_model()
    with pytest.raises(ValueError, match="num_samples"):
        next(model.generate_batch([[1]], 5, num_samples=2, kv_cache=new_cache(model)))


def test_suppressed_tokens_are_never_drawn():
    model = make_model()
    suppress = [*range(50), 60]
    for temperature in (0, 3.0):
        out = list(model.generate([1], 200, temperature=temperature, suppress_tokens=suppress))
        assert set(out) <= set(range(50, 60))
    with pytest.raises(ValueError, match="61"):
        next(model.generate([1], 5, suppress_tokens=[61]))


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_logits_of_a_ragged_batch_in_float32(lengths, seed):
    model = make_model(torch.float32, seed=seed)
    prompts = [torch.randint(61, (n,)).tolist() for n in lengths]
    cache = KVCache(model.config, len(prompts), 32)
    batched = model.prefill(prompts, cache)
    for row, prompt in zip(batched, prompts, strict=True):
        assert (row - model(torch.tensor([prompt]))[0, -1]).abs().max() < 1e-4


def test_expanded_rows_equal_separate_runs_with_the_same_draws(monkeypatch):
    """Draws by given uniforms, one for each row and step: then a row must get what it gets alone with the same ones."""
    model = make_model(sequence_len=24)
    uniforms = torch.rand(40, 3, dtype=torch.float64)

    def rand(columns):
        steps = iter(uniforms[:, columns])
        return lambda *size, **options: next(steps)[:, None]

    monkeypatch.setattr(torch, "rand", rand([0, 1, 2]))
    rows, _ = finish(model.generate_batch([[1, 2, 3]], 40, num_samples=3, temperature=1.2))
    for b in range(3):
        monkeypatch.setattr(torch, "rand", rand([b]))
        assert list(model.generate([1, 2, 3], 40, temperature=1.2)) == [row[b] for row in rows]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    past=st.integers(0, 20),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_a_prompt_in_chunks_is_read_as_in_one(lengths, past, chunk, seed):
    model = make_model(seed=seed, sequence_len=48)
    prompts = [torch.randint(61, (n,)).tolist() for n in lengths]
    caches = [KVCache(model.config, len(prompts), 48, dtype=model.dtype) for _ in range(2)]
    for cache in caches:
        model.prefill([[b, *range(b, past)] for b in range(len(prompts))], cache)
    with pytest.MonkeyPatch.context() as patch:
        whole = model.prefill(prompts, caches[0])
        patch.setattr(gpt, "PREFILL_CHUNK", chunk)
        torch.testing.assert_close(model.prefill(prompts, caches[1]), whole)
    assert caches[0].tokens() == caches[1].tokens()


# ---- a batch in the caller's cache


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    spoken=st.integers(1, 40),
    n_stops=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_row_that_has_ended_stays_as_it_ended(lengths, spoken, n_stops, seed):
    """Whenever it stops, at a full window too: the cache's last row of it is what it would hold, generated alone."""
    model = make_model(seed=seed, sequence_len=12, n_layer=2)
    prompts = [torch.randint(61, (n,)).tolist() for n in lengths]
    settings = dict(temperature=0, stop_tokens=list(range(n_stops)))
    cache = KVCache(model.config, len(prompts), 12, dtype=model.dtype)
    list(model.generate_batch(prompts, spoken, kv_cache=cache, **settings))
    for b, prompt in enumerate(prompts):
        alone = KVCache(model.config, 1, 12, dtype=model.dtype)
        list(model.generate(prompt, spoken, kv_cache=alone, **settings))
        n = int(alone.lengths)
        assert cache.tokens()[b] == alone.tokens()[0]
        torch.testing.assert_close(cache.k[:, b, :, :n], alone.k[:, 0, :, :n])
        torch.testing.assert_close(cache.v[:, b, :, :n], alone.v[:, 0, :, :n])


def test_a_row_that_stops_at_a_full_window_is_not_restarted():
    """Its stop token is the last that fits; the other row goes on past several windows."""
    for seed in range(50):
        model = make_model(sequence_len=8, seed=seed)
        free, _ = finish(model.generate_batch([[1, 2, 3], [4]], 20, temperature=0))
        first, second = ([row[b] for row in free] for b in range(2))
        if first[4] not in first[:4] and first[4] not in second:
            break
    cache = KVCache(model.config, 2, 8, dtype=model.dtype)
    settings = dict(temperature=0, stop_tokens=[first[4]], kv_cache=cache)
    rows, reasons = finish(model.generate_batch([[1, 2, 3], [4]], 20, **settings))
    assert reasons == ["stop", "length"] and [row[1] for row in rows] == second
    assert cache.tokens()[0] == [1, 2, 3, *first[:5]]


# ---- what may go wrong half-way


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_decoder_that_raises_leaves_the_cache_as_it_was(fails_at):
    """The token that it was to read is neither lost half-way nor read a second time by the clean-up."""
    model = make_model()
    cache, calls = KVCache(model.config, 1, 32, dtype=model.dtype), []

    def decode(ids, kv_cache):
        calls.append(ids)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return model.step(ids, kv_cache)

    said = []
    with pytest.raises(KeyboardInterrupt):
        said.extend(model.generate([1, 2], 9, temperature=0, kv_cache=cache, decode=decode))
    assert len(calls) == fails_at and cache.lengths.tolist() == [2 + fails_at - 1]


def test_a_decoder_that_raises_leaves_rows_that_have_ended_as_they_ended():
    model, calls = make_model(), []
    free, _ = finish(model.generate_batch([[1, 2, 3], [4]], 6, temperature=0))
    stop = free[0][1]
    assert stop not in [row[0] for row in free]

    def decode(ids, kv_cache):
        calls.append(ids)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return model.step(ids, kv_cache)

    cache = KVCache(model.config, 2, 32, dtype=model.dtype)
    settings = dict(temperature=0, stop_tokens=[stop], kv_cache=cache, decode=decode)
    with pytest.raises(KeyboardInterrupt):
        list(model.generate_batch([[1, 2, 3], [4]], 6, **settings))
    assert cache.tokens() == [[1, 2, 3, *(row[0] for row in free[:3])], [4, stop]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_generators_that_end_in_any_order_give_the_mode_back(training, order):
    model = make_model(dropout=0.5).train(training)
    steps = [model.generate([1, 2], 9, temperature=0) for _ in range(3)]
    alone = list(make_model(dropout=0.5).generate([1, 2], 9, temperature=0))
    out = [[next(each)] for each in steps]
    for i in order:
        assert model.training == deepcopy(model).training == training
        out[i] += steps[i]
    assert out == [alone] * 3, "none of them drew with dropout on"
    assert model.training == training


def test_generators_in_threads_share_a_model_in_eval_mode():
    model = make_model(dropout=0.5).eval()
    alone = list(model.generate([1, 2], 9, temperature=0))
    with ThreadPoolExecutor(8) as threads:
        out = list(threads.map(lambda _: list(model.generate([1, 2], 9, temperature=0)), range(24)))
    assert out == [alone] * 24
    assert not model.training


def test_a_model_in_train_mode_draws_without_dropout_and_without_gradients():
    model = make_model(dropout=0.5)
    modes = []
    model.norm.register_forward_hook(
        lambda module, *_: modes.append((module.training, torch.is_grad_enabled()))
    )
    out = list(model.generate([1, 2], 9, temperature=0))
    assert out == list(make_model().generate([1, 2], 9, temperature=0)) and {*modes} == {(False, False)}
    assert all(module.training for module in model.modules())


def test_the_signatures_have_the_names_and_the_defaults_of_the_filters():
    """An editor shows them; a filter that is added to Sampling alone would not reach a caller."""
    for function in (GPT.generate, GPT.generate_batch):
        parameters = inspect.signature(function).parameters
        for field in dataclasses.fields(gpt.Sampling):
            assert parameters[field.name].default == field.default
        assert not [p for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [*inspect.signature(GPT.generate).parameters]
    assert names[1:3] == ["tokens", "max_tokens"] and names[8:] == [
        "stop_tokens",
        "seed",
        "suppress_tokens",
        "kv_cache",
        "decode",
    ]


def test_what_the_penalty_needs_is_built_only_with_a_penalty(monkeypatch):
    model = make_model()
    asked = []
    monkeypatch.setattr(KVCache, "tokens", lambda self, f=KVCache.tokens: asked.append(1) or f(self))
    list(model.generate([1, 2], 5))
    assert not asked
    list(model.generate([1, 2], 5, repetition_penalty=1.1))
    assert asked


def test_prompts_and_stop_tokens_may_be_iterators():
    model = make_model()
    tokens = list(model.generate([1, 2, 3], 20, temperature=0))
    stop = tokens[5]
    settings = dict(stop_tokens=iter([stop]), suppress_tokens=iter([60 if stop != 60 else 59]))
    assert (
        list(model.generate(iter([1, 2, 3]), 20, temperature=0, **settings))
        == tokens[: tokens.index(stop) + 1]
    )


def test_a_prompt_may_be_a_tensor_of_one_row():
    model = make_model()
    assert list(model.generate(torch.tensor([3]), 8)) == list(model.generate([3], 8))
    expected = list(model.generate([3, 1, 4], 8))
    for prompt in (torch.tensor([3, 1, 4]), torch.tensor([[3, 1, 4]])):
        assert list(model.generate(prompt, 8)) == expected
    with pytest.raises(ValueError, match="token ids"):
        next(model.generate(torch.tensor([[3, 1], [4, 1]]), 8))


def test_text_for_tokens_says_that_it_must_be_encoded():
    for call in (lambda m: m.generate("def ", 8), lambda m: m.generate_batch(["def "], 8)):
        with pytest.raises(ValueError, match=r"tokenizer\.encode\(text\).*'def '"):
            next(call(make_model()))


def test_a_seed_of_none_draws_anew_and_leaves_the_global_generator():
    model = make_model()
    before = torch.get_rng_state()
    assert len({tuple(model.generate([1, 2], 20, seed=None)) for _ in range(4)}) == 4
    assert len({tuple(model.generate([1, 2], 20)) for _ in range(2)}) == 1
    assert torch.equal(torch.get_rng_state(), before)

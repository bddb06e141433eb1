"""native.py and decode.cpp: what C++ decodes is what gpt.py computes, in float64 and without a cache."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import GEMMA, GPT2, LLAMA, LLAMA3, QWEN, ROOT, WINDOWS, YARN, make_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

import gpt
from gpt import GPT, KVCache
from sologpt import fast, native
from sologpt import quantize as weights
from sologpt.lookup import Lookup
from sologpt.quantize import DTYPES, Int4Linear, Int8Embedding, Int8Linear, PackedLinear, QuantizedLinear

pytestmark = [
    pytest.mark.skipif(not native.find_compiler(), reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore:matrices of these shapes"),
]

ARCHITECTURES = {
    "ours": {},
    "llama": LLAMA,
    "qwen": QWEN,
    "gpt2": GPT2,
    "windows": WINDOWS,
    "llama3": LLAMA | dict(rope_scaling=LLAMA3),
    "yarn": LLAMA | dict(rope_scaling=YARN),
    "gemma": GEMMA,
    "biases": dict(mlp="gelu", bias=True, norm_weight=True),
    "layernorm": dict(norm="layer"),
    "grouped": dict(n_kv_head=1, head_dim=54, layer_types="NS", sliding_window=3, norm_weight=True),
}
each_architecture = pytest.mark.parametrize("switches", ARCHITECTURES.values(), ids=ARCHITECTURES)
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a rounding, relative


def prepare(model: GPT) -> native.Native:
    decode = native.prepare(model)
    assert decode is not None
    return decode


def cache_for(model: GPT, rows: int, max_len: int | None = None) -> KVCache:
    return KVCache(model.config, rows, max_len or model.config.sequence_len, dtype=model.dtype)


def exact_weight(module: torch.nn.Module) -> torch.Tensor:
    """In float64; of a quantized one, what its numbers mean."""
    if isinstance(module, (Int8Linear, Int8Embedding)):
        return module.q.double() * module.scale.double()[:, None]
    if isinstance(module, Int4Linear):
        return weights.widen_int4(module.q, module.scale.double()).clone()
    return module.weight.detach().double()


def in_float64(model: GPT) -> GPT:
    """The same model in float64, with plain weights."""
    exact = GPT(model.config).double().eval()
    for name, p in exact.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        p.data = exact_weight(module) if leaf == "weight" else module.bias.detach().double()
    return exact.requires_grad_(False)


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def recorded(decode, exact: GPT, errors: list[float]):
    """decode, with the error of each row's logits: against a forward of all that the cache holds."""

    def decoder(ids, cache):
        logits = decode(ids, cache)
        rows = [torch.tensor(tokens) for tokens in cache.tokens()]
        expected = exact(pad_sequence(rows, batch_first=True))  # padding comes later, and changes nothing
        for row, row_expected, tokens in zip(logits, expected, rows, strict=True):
            errors.append(relative_error(row, row_expected[len(tokens) - 1]))
        return logits

    return decoder


@torch.inference_mode()
def decoded(decode, model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of idx (B, T), decoded token by token."""
    cache = cache_for(model, len(idx), idx.size(1))
    return torch.stack([decode(ids, cache) for ids in idx.T], dim=1)


# ---- Plain weights ----


@each_architecture
def test_a_row_past_a_full_window(switches):
    model, errors = make_model(torch.float32, sequence_len=16, **switches), []
    decode = recorded(prepare(model), in_float64(model), errors)
    tokens = list(model.generate([1, 2, 3], 40, temperature=0, decode=decode))
    assert tokens == list(model.generate([1, 2, 3], 40, temperature=0))
    assert len(errors) == 39 and max(errors) < 1e-5  # the terms of some hundred sums, rounded by 6e-8 each


@pytest.mark.parametrize("rows", [2, 3, 5, 8, 35])
@pytest.mark.parametrize("name", ["ours", "qwen", "gpt2", "windows", "gemma"])
def test_rows_of_different_lengths_that_end(name, rows):
    model, errors = make_model(torch.float32, sequence_len=16, **ARCHITECTURES[name]), []
    prompts = [[*range(1 + b, 2 + 5 * b % 13 + b)] for b in range(rows)]
    decode = recorded(prepare(model), in_float64(model), errors)
    steps = [
        [*model.generate_batch(prompts, 25, seed=0, stop_tokens=range(5), decode=d)] for d in (decode, None)
    ]
    assert steps[0] == steps[1] and None in steps[0][-1]
    assert len(errors) == rows * (len(steps[0]) - 1) and max(errors) < 1e-5


@each_architecture
@torch.inference_mode()
def test_the_cache_holds_what_step_writes(switches):
    """Up to the last slot. Neither what lies past the lengths nor other rows are read or written."""
    model, lengths, idx = make_model(torch.float32, **switches), [31, 3, 0, 17], torch.arange(124).view(4, 31)
    caches, exact = [], in_float64(model)
    for decode in (prepare(model), model.step):
        whole = cache_for(model, 6)
        cache = whole.rows(slice(1, 5))
        model(idx % 61, kv_cache=cache)
        cache.truncate(lengths)
        before = whole.ids.clone()
        for tensor in (whole.k, whole.v) if not caches else ():
            tensor[:, [0, 5]] = torch.nan
            for b, n in enumerate(lengths):
                tensor[:, 1 + b, :, n:] = torch.nan
        logits = decode(torch.tensor([5, 6, 7, 8]), cache)
        caches.append(whole)
        for row, tokens in zip(logits, cache.tokens(), strict=True):
            assert relative_error(row, exact(torch.tensor([tokens]))[0, -1]) < 1e-5
    ours, theirs = caches
    assert ours.lengths.tolist() == theirs.lengths.tolist() == [0, 32, 4, 1, 18, 0]
    for b, n in enumerate(ours.lengths.tolist()):
        for a, expected in ((ours.k[:, b], theirs.k[:, b]), (ours.v[:, b], theirs.v[:, b])):
            torch.testing.assert_close(a[:, :, :n], expected[:, :, :n], atol=1e-5, rtol=1e-5)
            assert a[:, :, n:].isnan().all()
        before[b, n - 1 : n] = theirs.ids[b, n - 1 : n]
    assert torch.equal(ours.ids, before)


@each_architecture
def test_several_tokens_at_once(switches):
    model = make_model(torch.float32, **switches)
    decode, exact, idx = prepare(model), in_float64(model), torch.randint(61, (11, 32))
    for rows, lengths, sizes in (
        (1, [7], range(1, 21)),
        (3, [9, 0, 4], [1, 2, 3, 7, 20]),
        (8, [*range(8)], [1, 2, 5]),
        (11, [*range(20, 9, -1)], [1, 3]),
    ):
        for T in sizes:
            caches = [cache_for(model, rows) for _ in range(2)]
            new = torch.stack([row[n : n + T] for row, n in zip(idx, lengths, strict=False)])
            with torch.inference_mode():
                for cache in caches:
                    model(idx[:rows, : max(lengths)], kv_cache=cache)
                    cache.truncate(lengths)
                logits = decode.read(new, caches[0])
                model(new, kv_cache=caches[1])
            assert logits.shape == (rows, T, 61) and caches[0].tokens() == caches[1].tokens()
            for b, n in enumerate(lengths):
                assert relative_error(logits[b], exact(idx[b : b + 1, : n + T])[0, n:]) < 1e-5
                for name in ("k", "v"):
                    ours, theirs = (getattr(cache, name)[:, b, :, : n + T] for cache in caches)
                    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@each_architecture
@torch.inference_mode()
def test_prefill(switches):
    """The last logits and the cache are those of `GPT.prefill`: short prompts, long ones, and a full window."""
    model = make_model(torch.float32, sequence_len=40, **switches)
    decode, exact = prepare(model), in_float64(model)
    for held, new in ((0, 1), (0, 2), (0, 7), (0, 32), (0, 33), (5, 3), (8, 32), (9, 32), (38, 5)):
        tokens = torch.randint(61, (held + new,)).tolist()
        caches = [cache_for(model, 1, 40) for _ in range(2)]
        for cache, prefill in zip(caches, (decode.prefill, model.prefill), strict=True):
            if held:
                model.prefill([tokens[:held]], cache)
            logits = prefill([tokens[held:]], cache)
            assert logits.shape == (1, 61)
            assert relative_error(logits[0], exact(torch.tensor([tokens[-40:]]))[0, -1]) < 1e-5
        ours, theirs = caches
        assert ours.tokens() == theirs.tokens() == [tokens[-40:]]
        n = len(tokens[-40:])
        torch.testing.assert_close(ours.k[:, 0, :, :n], theirs.k[:, 0, :, :n], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.v[:, 0, :, :n], theirs.v[:, 0, :, :n], atol=1e-5, rtol=1e-5)
    for prompts, cache in (([[]], cache_for(model, 1, 40)), ([[1, 2, 3]], cache_for(model, 1, 2))):
        with pytest.raises(ValueError, match=r"empty|do not fit"):
            decode.prefill(prompts, cache)
        assert cache.tokens() == [[]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_architecture
def test_half_precision_is_as_near_to_float64_as_step(switches, dtype):
    model = make_model(dtype, **switches)
    idx = torch.randint(61, (4, 20))
    exact = in_float64(model)(idx)
    ours, theirs = (relative_error(decoded(d, model, idx), exact) for d in (prepare(model), model.step))
    assert ours <= 1.2 * theirs


@st.composite
def configs(draw) -> dict:
    """Switches and sizes, most of which fill no vector."""
    size, flag = st.integers(1, 70), st.booleans()
    n_kv_head, learned = draw(st.integers(1, 3)), draw(flag)
    return dict(
        n_embd=draw(size), n_hidden=draw(size), vocab_size=draw(st.integers(1, 80)), n_layer=draw(st.integers(1, 3)),
        n_kv_head=n_kv_head, n_head=n_kv_head * draw(st.integers(1, 4)), sequence_len=24,
        head_dim=draw(st.integers(1, 40)) * (1 if learned else 2), positions="learned" if learned else "rotary",
        mlp=draw(st.sampled_from([*gpt.ACTIVATIONS])), norm=draw(st.sampled_from(["rms", "layer"])), norm_eps=1e-3,
        layer_types=draw(st.text("FSN", min_size=1, max_size=3)), sliding_window=draw(st.none() | st.integers(1, 30)),
        rope_scaling=draw(st.sampled_from([None, LLAMA3, YARN, {"rope_type": "linear", "factor": 3.0}])),
        window_rope_base=draw(st.sampled_from([None, 100.0])), embd_scale=draw(flag), post_norm=draw(flag),
        softcap=draw(st.sampled_from([0.0, 2.0])), qk_norm=draw(flag), embd_norm=draw(flag), norm_weight=draw(flag),
        bias=draw(flag), qkv_bias=draw(flag), tie_embd=draw(flag),
    )  # fmt: skip


# heads of one number, whose rows gpt.py hands on as a view
ONE = dict(
    n_embd=16, n_hidden=16, vocab_size=16, n_layer=1, n_head=16, n_kv_head=1, head_dim=1, sequence_len=24
)


@settings(max_examples=80, deadline=None)
@example(ONE | dict(positions="learned"), [1], 2, torch.bfloat16, 0)
@given(
    config=configs(),
    lengths=st.lists(st.integers(0, 15), min_size=1, max_size=9),
    T=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_architecture_and_shape(config, lengths, T, dtype, seed):
    model = make_model(dtype, seed, **config)
    decode, exact = prepare(model), in_float64(model)
    idx, cache = torch.randint(config["vocab_size"], (len(lengths), 24)), cache_for(model, len(lengths), 24)
    new = torch.stack([row[n : n + T] for row, n in zip(idx, lengths, strict=True)])
    with torch.inference_mode():
        if max(lengths):
            model(idx[:, : max(lengths)], kv_cache=cache)
            cache.truncate(lengths)
        theirs = copy.deepcopy(cache)
        logits, step = decode.read(new, cache), model(new, kv_cache=theirs)
    assert cache.tokens() == theirs.tokens() and logits.shape == step.shape
    expected = torch.stack(
        [exact(row[None, : n + T])[0, n:] for row, n in zip(idx, lengths, strict=True)]
    ).detach()
    # Some of these networks are badly conditioned: then step is as far off
    error, error_of_step = (logits - expected).norm(), (step - expected).norm()
    assert error <= 1.2 * error_of_step + 100 * EPS[dtype] * expected.norm()


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
@pytest.mark.parametrize("threads", [2, 7])
def test_threads_change_nothing(threads, kind):
    model = make_model(torch.float32, n_embd=64, n_hidden=160, vocab_size=5000)
    if kind != "plain":
        weights.quantize(model, kind)
    decode, idx, before = prepare(model), torch.randint(5000, (3, 6)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = decoded(decode, model, idx)
        torch.set_num_threads(threads)
        assert torch.equal(decoded(decode, model, idx), expected)
    finally:
        torch.set_num_threads(before)


# ---- Quantized weights ----


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 x in 8 bits, groups of 32 with a scale each; and a step where float32 may round to the other side."""
    K = x.size(-1)
    groups = F.pad(x, (0, -K % 32)).unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    q = groups / step.clamp(min=1e-300)
    doubt = step * ((q - q.floor() - 0.5).abs() < 1e-3)
    return (q.round() * step).flatten(-2)[..., :K], doubt.flatten(-2)[..., :K]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "unit"), [("int8", 16), ("int4", 32), ("int4", 64), ("int4", 128)])
@settings(max_examples=12, deadline=None)
@given(
    width=st.integers(1, 12),
    n_head=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    vocab_size=st.integers(8, 60),
    rows=st.integers(1, 8),
    bias=st.booleans(),
    tie_embd=st.booleans(),
    seed=st.integers(0, 99),
)
def test_quantized_products(
    dtype, kind, unit, width, n_head, head_dim, vocab_size, rows, bias, tie_embd, seed
):
    """Those that can be seen: keys and values of the first layer in the cache, logits where the blocks add nothing."""
    model = make_model(
        dtype, seed, n_layer=1, n_head=n_head, n_kv_head=n_head, head_dim=head_dim, n_embd=width * unit, n_hidden=16,
        vocab_size=vocab_size, positions="learned", qk_norm=False, softcap=0.0, qkv_bias=bias, tie_embd=tie_embd,
    )  # fmt: skip
    with torch.no_grad():
        model.wte.weight[:, ::7] *= 20  # outliers
    for linear in (model.h[0].attn.c_proj, model.h[0].mlp.c_proj):
        torch.nn.init.zeros_(linear.weight)
    weights.quantize(model, kind, 32 if kind == "int8" else unit)
    in_eights = n_head * head_dim % 8 == 0  # else int8
    cache, exact, ids = cache_for(model, rows, 3), in_float64(model), torch.arange(rows)
    logits = prepare(model)(ids, cache)
    x = exact.embd_norm(exact.wte(ids) + exact.wpe.weight[0])
    attn, exact_attn = model.h[0].attn, exact.h[0].attn
    normed = exact.h[0].attn_norm(x), exact.norm(x)
    for linear, weight, b, x, y, eps in (
        (attn.c_k, exact_attn.c_k.weight, exact_attn.c_k.bias, normed[0], cache.k[0, :, :, 0], EPS[dtype]),
        (attn.c_v, exact_attn.c_v.weight, exact_attn.c_v.bias, normed[0], cache.v[0, :, :, 0], EPS[dtype]),
        (model.lm_head, exact.head_weight, None, normed[1], logits, 0),
    ):
        is_int4 = kind == "int4" and linear is not model.lm_head and in_eights
        assert isinstance(linear, Int4Linear if is_int4 else Int8Linear)
        q, doubt = rounded(x)
        expected = F.linear(q, weight, b)
        bound = doubt @ weight.abs().T + 1e-5 * (x.abs() @ weight.abs().T) + eps * expected.abs() + 1e-6
        assert ((y.flatten(1).double() - expected).abs() <= bound).all()


MIXTURES = {  # what becomes of widths that a kind does not take
    "all int4": (dict(n_embd=64, head_dim=16, n_hidden=96), "int4", 128, {Int4Linear}),
    "int8 for int4": (dict(n_embd=64, head_dim=12, n_hidden=48), "int4", 64, {Int4Linear, Int8Linear}),
    "plain for int4": (dict(n_embd=64, n_hidden=40), "int4", 32, {Int4Linear, torch.nn.Linear}),
    "all int8": (dict(n_embd=48, n_hidden=80), "int8", 32, {Int8Linear}),
    "plain for int8": (dict(n_embd=48, n_hidden=40, bias=True), "int8", 32, {Int8Linear, torch.nn.Linear}),
    "plain head": (dict(n_embd=40, n_hidden=64), "int4", 32, {torch.nn.Linear, Int4Linear}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tie_embd", [False, True], ids=["", "tied"])
@pytest.mark.parametrize(("switches", "kind", "size", "types"), MIXTURES.values(), ids=MIXTURES)
def test_quantized_models(switches, kind, size, types, tie_embd, dtype):
    """As a float64 model that rounds activations where decode.cpp does, and nearly as one that does not."""
    model = make_model(dtype, vocab_size=200, tie_embd=tie_embd, **LLAMA | switches)
    weights.quantize(model, kind, size)
    assert {type(x) for x in model.h.modules() if isinstance(x, (QuantizedLinear, torch.nn.Linear))} >= types
    exact, idx = in_float64(model), torch.randint(200, (3, 12))
    logits, expected = decoded(prepare(model), model, idx), exact(idx)
    # A product's rounding is uniform within a step of max/127: an error of about 2.2/127/sqrt(12) = 0.5 % in each
    # of some five that follow one another
    assert relative_error(logits, expected) < 0.03
    for name, module in model.h.named_modules():
        if isinstance(module, QuantizedLinear):
            exact.h.get_submodule(name).register_forward_pre_hook(lambda _, args: rounded(args[0])[0])
    if isinstance(model.lm_head, Int8Linear):
        exact.norm.register_forward_hook(lambda *args: rounded(args[-1])[0])
    if dtype == torch.float32:  # else the cache rounds, too
        errors = (logits - exact(idx)).norm(dim=-1) / expected.norm(dim=-1)
        assert (
            errors.median() < 1e-5
        )  # in some tokens, a number is so near to a half that it goes to the other side


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_what_is_not_finite_stays_so_and_in_its_row(kind, value):
    model = make_model(torch.float32, n_embd=64)
    model.wte.weight.data[5, 37] = value
    if kind != "plain":
        weights.quantize(model, kind)
    decode, others = prepare(model), torch.tensor([1, 2, 3, 4])
    logits = decode(torch.tensor([1, 2, 5, 4]), cache_for(model, 4))
    assert logits[2].isnan().all()
    assert torch.equal(logits[[0, 1, 3]], decode(others, cache_for(model, 4))[[0, 1, 3]])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("size", "finite"), [(1e25, False), (1e-18, True), (1e-22, True), (0, True)])
def test_hidden_activations_of_any_size(kind, size, finite):
    """relu2 squares them: above float32, or so far below it that 127 over the largest overflows."""
    model = make_model(torch.float32, n_embd=64, n_layer=1)
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight *= size
    weights.quantize(model, kind)
    logits = prepare(model)(torch.tensor([1, 2]), cache_for(model, 2))
    assert logits.isfinite().all() if finite else not logits.isfinite().any()
    if finite:
        assert relative_error(logits, in_float64(model)(torch.tensor([[1], [2]]))[:, 0]) < 0.03


# ---- What is refused ----


def test_a_cache_that_does_not_fit_is_refused_and_stays_as_it_is():
    model = make_model(torch.float32)
    decode, one = prepare(model), torch.tensor([1])
    other = make_model(torch.float32, n_layer=2), make_model(torch.float32, n_kv_head=4)
    other += make_model(torch.float32, head_dim=16), make_model(torch.bfloat16)
    for cache, ids, message in (
        (cache_for(model, 1, 40), one, "33 tokens are more than sequence_len 32"),
        (cache_for(model, 1, 10), one, r"1 x 1 tokens do not fit into KVCache\(\[10\] of 10 tokens"),
        (cache_for(model, 2), one, "1 x 1 tokens do not fit into KVCache"),
        (cache_for(model, 1), torch.tensor([1, 2]), "2 x 1 tokens do not fit into KVCache"),
        *((cache_for(each, 1), one, "the KVCache is .* the model needs") for each in other),
    ):
        cache.lengths += cache.max_len if cache.max_len == 10 else 32 if cache.max_len == 40 else 3
        before = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=message):
            decode(ids, cache)
        for name in ("k", "v", "ids", "lengths"):
            assert torch.equal(getattr(cache, name), getattr(before, name))


INT4 = torch.zeros(61, 16).byte()  # 61 rows of 32
REFUSED = {  # arguments of the operator, from good ones
    "a negative window": lambda a: dict(layer_types="SSS", sliding_window=-5),
    "int32 ids": lambda a: dict(idx=a["idx"].int()),
    "ids of one dimension": lambda a: dict(idx=a["idx"][:, 0]),
    "too many tokens": lambda a: dict(idx=torch.zeros(2, 17, dtype=torch.long)),
    "too many rows": lambda a: dict(idx=torch.zeros(3, 1, dtype=torch.long)),
    "strided ids": lambda a: dict(idx=torch.zeros(2, 2, dtype=torch.long).T),
    "an id of -1": lambda a: dict(idx=torch.tensor([[1], [-1]])),
    "an id past the last": lambda a: dict(idx=torch.tensor([[1], [61]])),
    "keys of a row less": lambda a: dict(k=a["k"][:, :1]),
    "keys of a slot less": lambda a: dict(k=a["k"][:, :, :, :-1]),
    "strided keys": lambda a: {name: a[name].mT.contiguous().mT for name in "kv"},
    "keys of one layer": lambda a: dict(k=a["k"][:1], v=a["v"][:1]),
    "keys of other channels": lambda a: dict.fromkeys("kv", torch.zeros(3, 2, 2, 20, 6)),
    "keys of no heads": lambda a: dict.fromkeys("kv", torch.zeros(3, 2, 0, 20, 8)),
    "doubles": lambda a: dict(k=a["k"].double(), v=a["v"].double()),
    "half the keys": lambda a: dict(k=a["k"].half()),
    "int32 cached ids": lambda a: dict(cached_ids=a["cached_ids"].int()),
    "few cached ids": lambda a: dict(cached_ids=a["cached_ids"][:, :-1]),
    "a length of -1": lambda a: dict(lengths=torch.tensor([1, -1])),
    "a full row": lambda a: dict(lengths=torch.tensor([20, 1])),
    "an absurd length": lambda a: dict(lengths=torch.tensor([1, 2**63 - 1])),
    "lengths of one row": lambda a: dict(lengths=torch.tensor([1])),
    "no angles": lambda a: dict(rotary=a["rotary"][:1]),
    "no angles of windowed layers": lambda a: dict(window_rotary=a["rotary"][:1]),
    "double angles": lambda a: dict(rotary=a["rotary"].double()),
    "no weights": lambda a: dict(weights=[]),
    "a weight less": lambda a: dict(weights=a["weights"][:-1]),
    "a weight more": lambda a: dict(weights=[*a["weights"], a["weights"][-1]]),
    "weights in another order": lambda a: dict(weights=a["weights"][::-1]),
    "a double weight": lambda a: with_head(a, a["weights"][-1].double()),
    "a strided weight": lambda a: with_head(a, a["weights"][-1].T.contiguous().T),
    "int8 without a scale": lambda a: with_head(a, a["weights"][-1].char()),
    "int8 with few scales": lambda a: with_head(a, a["weights"][-1].char(), torch.ones(60)),
    "int8 with int8 scales": lambda a: with_head(a, a["weights"][-1].char(), torch.ones(61).char()),
    "int4 of no groups": lambda a: with_head(a, INT4, torch.ones(61, 2, 0)),
    "int4 of small groups": lambda a: with_head(a, INT4, torch.ones(61, 2, 2)),
    "int4 with double scales": lambda a: with_head(a, INT4, torch.ones(61, 2, 1).double()),
    "an int4 embedding": lambda a: dict(weights=[INT4, torch.ones(61, 2, 1), *a["weights"][1:]]),
    "a token more": lambda a: dict(vocab_size=62),
    "a channel less": lambda a: dict(n_embd=31),
    "no heads": lambda a: dict(n_head=0),
    "three heads": lambda a: dict(n_head=3),
    "negative heads": lambda a: dict(n_head=-4),
    "a wider MLP": lambda a: dict(n_hidden=129),
    "an unknown MLP": lambda a: dict(mlp="relu"),
    "a layer more": lambda a: dict(layer_types="FFFF"),
    "biases": lambda a: dict(bias=True),
    "gains": lambda a: dict(norm_weight=True),
    "no learned positions": lambda a: dict(weights=a["weights"][:1], learned_positions=True),
}


def with_head(arguments: dict, *head: torch.Tensor) -> dict:
    return dict(weights=[*arguments["weights"][:-1], *head])


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_the_operator_refuses(change):
    model = make_model(torch.float32)
    decode, cache = prepare(model), cache_for(model, 2, 20)
    decode(torch.tensor([1, 2]), cache)
    names = [argument.name for argument in torch.ops.sologpt.decode.default._schema.arguments]
    values = torch.tensor([[3], [4]]), cache.k, cache.v, cache.ids, cache.lengths
    values += (decode.rotary, decode.window_rotary)
    good = dict(
        zip(names, (*values, [x[name] for x, name in decode.places], *decode.switches, False), strict=True)
    )
    with pytest.raises(RuntimeError):
        torch.ops.sologpt.decode(**good | change(good))
    assert cache.tokens() == [[1], [2]]
    exact = in_float64(model)(torch.tensor([[1, 3], [2, 4]]))[:, -1]
    assert relative_error(torch.ops.sologpt.decode(**good)[:, 0], exact) < 1e-5  # the others are good


# ---- A model that changes ----


@pytest.mark.parametrize("tie_embd", [False, True])
def test_the_decoder_follows_the_model(tie_embd):
    model, idx = make_model(torch.float32, n_embd=64, tie_embd=tie_embd), torch.randint(61, (2, 9))
    decode = prepare(model)

    def check(bound: float = 1e-5) -> None:
        assert relative_error(decoded(decode, model, idx), in_float64(model)(idx)) < bound

    check()
    for seed, assign in ((1, False), (2, True)):
        other = make_model(torch.float32, seed, n_embd=64, tie_embd=tie_embd)
        model.load_state_dict(other.state_dict(), assign=assign)
        check()
    model.h[1].mlp = make_model(torch.float32, 3, n_embd=64).h[1].mlp
    check()
    model.h[0].attn.c_v.weight = torch.nn.Parameter(torch.randn(32, 64))
    check()
    model.bfloat16()
    check(0.03)  # a few roundings of 0.4 % follow one another
    weights.quantize(model, "int4")
    check(0.05)


CHANGES = {
    "attention": (gpt.Attention, "forward", lambda self, x, *args: x),
    "mlp": (gpt.MLP, "forward", lambda self, x: self.c_proj(F.silu(self.c_fc(x)))),
    "attend": (gpt, "attend", lambda q, k, v, mask, dropout, attend=gpt.attend: attend(2 * q, k, v, mask)),
    "rotate": (gpt, "rotate", lambda x, rotary: x),
    "block": (gpt.Block, "forward", lambda self, x, *args: x + self.attn(self.attn_norm(x), *args)),
    "logits": (GPT, "logits", lambda self, x: self.lm_head(x)),
    "step": (GPT, "step", lambda self, ids, kv_cache: None),
}


@pytest.mark.parametrize(("where", "name", "to"), CHANGES.values(), ids=CHANGES)
def test_a_gpt_py_that_was_changed_decodes_itself(where, name, to, monkeypatch, capsys):
    monkeypatch.setattr(where, name, to)
    assert native.prepare(make_model(torch.float32)) is None
    assert (
        "note: decoding is slow without decode.cpp: it does not compute what gpt.py does"
        in capsys.readouterr().err
    )


def test_an_activation_that_was_changed(monkeypatch, capsys):
    model = make_model(torch.float32)
    monkeypatch.setitem(gpt.ACTIVATIONS, "relu2", lambda x: 2 * gpt.relu2(x))
    assert native.prepare(model) is None and "it does not compute" in capsys.readouterr().err
    monkeypatch.undo()
    assert native.prepare(model) is not None and not capsys.readouterr().err


def test_prepare_draws_no_numbers_and_takes_no_other_models():
    model = make_model(torch.float32)
    before = torch.get_rng_state()
    prepare(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert native.prepare(make_model(torch.float64)) is None
    weights.pack(model)
    assert native.prepare(model) is None


# ---- fast.prepare ----


def test_fast_prepare(monkeypatch):
    def types(**kwargs) -> tuple:
        model = make_model(kwargs.pop("dtype", torch.float32), n_embd=64)
        decode = fast.prepare(model, **kwargs)
        if isinstance(decode, Lookup):
            decode = decode.decode
        assert isinstance(decode, native.Native) or decode == model.step
        return type(decode).__name__, type(model.h[0].mlp.c_fc)

    packed = PackedLinear if weights.packs(torch.device("cpu"), torch.float32) else torch.nn.Linear
    assert types() == types(lookup=3) == ("method", packed)  # small
    assert types(quantize="int4") == ("method", Int4Linear)
    assert types(dtype=torch.float64, compile=True) == ("method", torch.nn.Linear)
    assert types(compile=True) == types(compile=True, lookup=3) == ("Native", torch.nn.Linear)
    monkeypatch.setattr(fast, "SMALL", 2**16)  # now it is large
    assert types() == types(rows=32) == ("Native", torch.nn.Linear)
    assert types(rows=33) == ("method", packed)
    assert types(quantize="int8") == types(quantize="int8", rows=33) == ("Native", Int8Linear)


@pytest.mark.parametrize("n", [1, 4, 20])
def test_lookup_gives_the_same_tokens(n):
    model = make_model(torch.float32, sequence_len=64)
    plain = list(model.generate([1, 2, 3] * 5, 90, temperature=0))
    decode = fast.prepare(model, compile=True, lookup=n)
    assert isinstance(decode.decode, native.Native)
    assert list(model.generate([1, 2, 3] * 5, 90, temperature=0, decode=decode)) == plain


# ---- The build, in processes of their own ----

DECODE = """
import sys, torch
from gpt import GPT, GPTConfig
from sologpt import native
from sologpt.quantize import quantize
torch.manual_seed(0)
for _ in range(2):
    model = GPT(GPTConfig(sequence_len=16, vocab_size=8, n_layer=1, n_head=2, n_embd=32))
    quantize(model, "int4")
    decode = native.prepare(model)
    assert len(list(model.generate([1], 20, decode=decode))) == 20
    print(type(decode).__name__)
assert not {"torch._dynamo", "torch._inductor"} & {*sys.modules}
"""


def start(*args: str, **env: object) -> subprocess.Popen:
    env = os.environ | {name: str(value) for name, value in env.items()}
    return subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[set[str], str]:
    """What it printed, and its standard error."""
    out, err = process.communicate(timeout=1000)
    assert process.returncode == 0, out[-3000:] + err[:3000]
    return {*out.split()}, err


def quick_tests(**env: object) -> None:
    flags = ["-qsx", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow"]
    finish(start("-m", "pytest", *flags, "tests/test_native.py", **env))


NOTE = "note: decoding is slow without decode.cpp: "
COMPILED = r"compiling decode\.cpp for this CPU, once: \d+ s\n"


@pytest.mark.slow
def test_the_first_run_compiles_and_the_next_ones_load(tmp_path):
    folder = tmp_path / "new" / "cache"
    both = [start("-c", DECODE, SOLOGPT_CACHE=folder) for _ in range(2)]  # at once
    for process in both:
        out, err = finish(process)
        assert out == {"Native"} and re.fullmatch(COMPILED, err)
    (file,) = folder.iterdir()
    assert file.suffix == ".so"
    before = file.stat().st_mtime_ns
    assert finish(start("-c", DECODE, SOLOGPT_CACHE=folder)) == ({"Native"}, "")
    assert file.stat().st_mtime_ns == before
    file.write_bytes(b"")  # as after a full disk, or in a copy from another machine
    out, err = finish(start("-c", DECODE, SOLOGPT_CACHE=folder))
    assert out == {"NoneType"} and err.startswith(NOTE) and str(file) in err


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["/nonexistent", ""])
def test_without_a_compiler(tmp_path, compiler):
    done = finish(start("-c", DECODE, SOLOGPT_CACHE=tmp_path, CXX=compiler))
    assert done == ({"NoneType"}, f"{NOTE}it takes a C++ compiler: CXX, c++, g++ or clang++\n")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_compiler_that_fails_is_not_asked_again(tmp_path):
    out, err = finish(start("-c", DECODE, SOLOGPT_CACHE=tmp_path, CXX="/bin/false --flag"))
    (log,) = tmp_path.iterdir()
    assert out == {"NoneType"} and "decode.cpp" in log.read_text()
    assert err.splitlines() == [
        "compiling decode.cpp for this CPU, once: 0 s",
        f"{NOTE}its compilation has failed: {log} says why",
    ]
    out, err = finish(start("-c", DECODE, SOLOGPT_CACHE=tmp_path, CXX="/bin/false --flag"))
    assert out == {"NoneType"}
    assert (
        err == f"{NOTE}its compilation has failed; {log} says why, and a run without that file tries again\n"
    )


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    out, err = finish(start("-c", DECODE, SOLOGPT_CACHE=folder, TMPDIR=tmp_path))
    assert out == {"Native"} and err.startswith("compiling decode.cpp")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # what was compiled is gone


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_vectors(tmp_path, capability):
    here = torch.backends.cpu.get_cpu_capability()
    if capability == here.lower() or (capability == "avx2" and here != "AVX512"):
        pytest.skip(f"this CPU has {here}")
    quick_tests(ATEN_CPU_CAPABILITY=capability, SOLOGPT_CACHE=tmp_path)


@pytest.mark.slow
def test_no_undefined_behaviour(tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer watch the tests above."""
    compiler = native.find_compiler()[0]
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        libraries.append(done.stdout.strip())
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("no sanitizers")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
    quick_tests(
        CXX=f"{compiler} {flags}", SOLOGPT_CACHE=tmp_path, LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
    )  # fmt: skip

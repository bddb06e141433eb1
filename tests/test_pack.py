"""Matrices in oneDNN's layout give what plain ones give."""

import copy
import pickle

import pytest
import torch
from conftest import GEMMA, GPT2, LLAMA, QWEN, WINDOWS, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import GPT
from sologpt import fast, native
from sologpt import quantize as weights
from sologpt.log import flops_per_token
from sologpt.lookup import Lookup
from sologpt.native import Native

KINDS = pytest.mark.parametrize(
    "kind",
    [{}, LLAMA, QWEN, GPT2, WINDOWS, GEMMA],
    ids=["nanochat", "llama", "qwen", "gpt2", "windows", "gemma"],
)


def make_pair(dtype: torch.dtype, **config) -> tuple[GPT, GPT]:
    """The same model twice: as it is, and packed."""
    plain, packed = (make_model(dtype, **config).eval() for _ in range(2))
    fast.pack(packed)
    assert packed.head_weight.is_mkldnn == weights.packs(packed.device, dtype)
    return plain, packed


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_loss_are_as_near_to_the_exact_ones(kind, dtype):
    """One row and one token, and many."""
    plain, packed = make_pair(dtype, n_embd=72, **kind)
    exact = make_model(dtype, n_embd=72, **kind).double()
    for shape in ((1, 1), (1, 2), (5, 3), (2, 31)):
        idx, targets = torch.randint(61, (2, *shape))
        with torch.no_grad():
            truth, other, logits = (model(idx) for model in (exact, plain, packed))
        assert (logits - truth).norm() <= 1.2 * (other - truth).norm() + 1e-6 * truth.norm()
        truth, other, loss = (model(idx, targets) for model in (exact, plain, packed))
        assert abs(loss - truth) <= 1.2 * abs(other - truth) + (1e-5 if dtype == torch.float32 else 1e-2)


@KINDS
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_tokens_are_the_same(kind, lengths, seed):
    plain, packed = make_pair(torch.float32, seed=seed, **kind)
    prompts = [torch.randint(61, (n,)).tolist() for n in lengths]
    a, b = (list(model.generate_batch(prompts, 24, temperature=0)) for model in (plain, packed))
    assert a == b
    ahead = Lookup(packed, 5)
    assert list(packed.generate(prompts[0], 24, temperature=0, decode=ahead)) == [row[0] for row in a]


def test_under_autocast():
    plain, packed = make_pair(torch.float32, **QWEN)
    idx = torch.randint(61, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        logits = packed(idx)
    exact = plain(idx)
    assert (logits - exact).norm() <= 0.05 * exact.norm()
    assert flops_per_token(plain) == flops_per_token(packed)


@KINDS
def test_a_packed_model_is_for_inference_only(kind, tmp_path):
    """It refuses what it cannot do in one clear line, and nothing has changed then."""
    plain, packed = make_pair(torch.float32, **kind)
    fast.pack(packed)  # a second time changes nothing
    idx = torch.tensor([[1, 2, 3]])
    logits = packed(idx)
    plain.save(tmp_path / "ckpt.pt")
    before = (tmp_path / "ckpt.pt").read_bytes()
    for refused, words in (
        (lambda: packed.save(tmp_path / "ckpt.pt"), "cannot be saved: do it before"),
        (lambda: packed.to(torch.bfloat16), "cannot be moved or cast"),
        (packed.double, "cannot be moved or cast"),
        (lambda: copy.deepcopy(packed), "cannot be copied or pickled"),
        (lambda: pickle.dumps(packed), "cannot be copied or pickled"),
        (lambda: torch.save(packed, tmp_path / "model.pt"), "cannot be copied or pickled"),
        (lambda: packed.train()(idx, idx), "cannot be trained"),
    ):
        with pytest.raises(RuntimeError, match=words) as e:
            refused()
        assert "\n" not in str(e.value)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["ckpt.pt", "model.pt"]  # the second is torch's
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert len(list(packed.generate([1], 5))) == 5 and packed.training
    assert packed.dtype == torch.float32 and torch.equal(packed.eval()(idx), logits)


@KINDS
def test_a_packed_model_has_as_many_parameters_and_no_gradient(kind):
    plain, packed = make_pair(torch.float32, **kind)
    assert packed.num_params() == plain.num_params() and flops_per_token(packed) == flops_per_token(plain)
    assert not any(p.requires_grad for p in packed.parameters())


def test_what_cannot_be_packed_stays_as_it_is(monkeypatch):
    model = make_model(torch.float64)
    fast.pack(model)
    assert not model.head_weight.is_mkldnn and model.head_weight.requires_grad
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    fast.pack(model.float())
    assert not model.head_weight.is_mkldnn
    with torch.device("meta"):
        fast.pack(GPT(model.config))


@pytest.mark.parametrize("lookup, rows", [(0, 1), (3, 1), (0, 4), (0, 11)])
@pytest.mark.parametrize("compile", [False, True])
def test_prepare_gives_a_decoder_that_says_the_same(lookup, rows, compile):
    """It packs a model whose weights decode.cpp does not read."""
    plain, model = (make_model(torch.float32) for _ in range(2))
    decode = fast.prepare(model, compile=compile, lookup=lookup, rows=rows)
    assert isinstance(decode, Lookup) == bool(lookup)
    assert isinstance(decode.decode if lookup else decode, Native) == compile
    assert model.head_weight.is_mkldnn == (not compile and weights.packs(model.device, model.dtype))
    prompts = [[1, 2, 3, 1, 2]] * rows
    assert list(model.generate_batch(prompts, 20, temperature=0, decode=decode)) == list(
        plain.generate_batch(prompts, 20, temperature=0)
    )
    with pytest.raises(ValueError, match="one row"):
        fast.prepare(model, lookup=2, rows=2)


def test_prepare_packs_where_decode_cpp_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load.cache_clear()
    try:
        model = make_model(torch.float32)
        assert fast.prepare(model, compile=True) == model.step
    finally:
        native.load.cache_clear()
    assert "it takes a C++ compiler" in capsys.readouterr().err
    assert model.head_weight.is_mkldnn == weights.packs(model.device, model.dtype)

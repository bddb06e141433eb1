"""Matrices in oneDNN's layout give what plain ones give."""

import pytest
import torch
from conftest import LLAMA, QWEN, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import GPT

KINDS = pytest.mark.parametrize("kind", [{}, LLAMA, QWEN], ids=["nanochat", "llama", "qwen"])


def make_pair(dtype: torch.dtype, **config) -> tuple[GPT, GPT]:
    """The same model twice: as it is, and packed."""
    plain, packed = (make_model(dtype, **config).eval() for _ in range(2))
    packed.prepack()
    assert packed.head_weight.is_mkldnn == torch.backends.mkldnn.is_available()
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
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_tokens_are_the_same(kind, lengths, seed):
    plain, packed = make_pair(torch.float32, seed=seed, **kind)
    prompts = [torch.randint(61, (n,)).tolist() for n in lengths]
    a, b = (list(model.generate_batch(prompts, 40, temperature=0)) for model in (plain, packed))
    assert a == b
    assert list(packed.generate(prompts[0], 40, temperature=0, lookup=5)) == [row[0] for row in a]


def test_under_autocast():
    plain, packed = make_pair(torch.float32, **QWEN)
    idx = torch.randint(61, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        logits = packed(idx)
    exact = plain(idx)
    assert (logits - exact).norm() <= 0.05 * exact.norm()
    assert plain.flops_per_token() == packed.flops_per_token()


def test_a_packed_model_is_for_inference_only(tmp_path):
    _, packed = make_pair(torch.float32)
    packed.prepack()  # once more is nothing more
    plain = make_model(torch.float32)
    plain.save(tmp_path / "ckpt.pt")
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(RuntimeError, match="save it before"):
        packed.save(tmp_path / "ckpt.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    with pytest.raises(RuntimeError, match="does not require grad"):
        packed(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()


def test_what_cannot_be_packed_stays_as_it_is(monkeypatch):
    model = make_model(torch.float64)
    model.prepack()
    assert not model.head_weight.is_mkldnn and model.head_weight.requires_grad
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model.float().prepack()
    assert not model.head_weight.is_mkldnn
    with torch.device("meta"):
        GPT(model.config).prepack()

"""The loss, whole and in chunks, beside each other and beside PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpt import cross_entropy
from sologpt import loss
from sologpt.loss import chunked_cross_entropy, masked_cross_entropy

BOTH = pytest.mark.parametrize("kind", [cross_entropy, chunked_cross_entropy])
EACH = pytest.mark.parametrize("kind", [cross_entropy, chunked_cross_entropy, masked_cross_entropy])


def model_with(kind, dtype=torch.float64, **config):
    model = make_model(dtype, **config)
    model.loss = kind
    return model


@BOTH
def test_loss_reductions_and_ignored_targets(kind):
    model = model_with(kind)
    idx, targets = torch.randint(61, (2, 4, 16))
    each = model(idx, targets, loss_reduction="none")
    assert each.shape == (64,)
    assert torch.allclose(each.mean(), model(idx, targets))
    logits = model(idx)
    by_hand = -logits.log_softmax(-1).gather(-1, targets[..., None]).flatten()
    assert torch.allclose(each, by_hand)
    targets[:, ::3] = -1
    kept = (targets != -1).flatten()
    assert torch.allclose(model(idx, targets), each[kept].mean())
    assert (model(idx, targets, loss_reduction="none")[~kept] == 0).all()


@EACH
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_a_target_the_loss_is_0(kind, reduction):
    """And so is every gradient, not NaN."""
    model, idx = model_with(kind), torch.randint(61, (2, 8))
    nothing = model(idx, torch.full_like(idx, -1), loss_reduction=reduction)
    nothing.backward()
    assert nothing.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


@EACH
@settings(max_examples=8, deadline=None)
@example(ignored=0.0, seed=0)
@example(ignored=1.0, seed=0)
@given(ignored=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_sum_divided_by_the_targets_is_the_mean(kind, ignored, seed):
    """With any distribution of -1: 8 rows at once have the loss and the gradients of 4 times 2 rows."""
    model = model_with(kind, seed=seed)
    idx, targets = torch.randint(61, (2, 8, 16))
    targets[torch.rand(8, 16) < ignored] = -1
    n_targets = (targets != -1).sum().clamp(min=1)
    whole = (
        F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        / n_targets
    )
    expected = torch.autograd.grad(whole, [*model.parameters()])
    parts = [
        model(x, y, loss_reduction="sum") / n_targets
        for x, y in zip(idx.split(2), targets.split(2), strict=True)
    ]
    for ours in (model(idx, targets), sum(parts)):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-15)
        grads = torch.autograd.grad(ours, [*model.parameters()])
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    softcap=st.sampled_from([0.0, 1.5, 15.0]),
    ignored=st.floats(0, 0.9),
    frozen=st.sampled_from(["", "body", "head"]),
    kind=st.sampled_from([chunked_cross_entropy, masked_cross_entropy]),
    tie_embd=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_loss_in_chunks_is_that_of_all_logits(rows, softcap, ignored, frozen, kind, tie_embd, seed):
    """And so is every gradient; rows is how many of the 2 * 16 rows of logits there are at a time."""
    model = model_with(kind, seed=seed, softcap=softcap, tie_embd=tie_embd)
    if frozen:
        model.requires_grad_(frozen == "head")
        model.head_weight.requires_grad_(frozen == "body")
    idx, targets = torch.randint(61, (2, 2, 16))
    targets[torch.rand(2, 16) < ignored] = -1
    targets[0, 0] = 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGITS_PER_CHUNK", rows * 61)
        patch.setattr(loss, "MAX_CHUNKS", 2 * 16)
        ours = model(idx, targets)
        with torch.no_grad():
            assert torch.equal(model(idx, targets), ours)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(3 * ours, parameters)
    whole = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, torch.autograd.grad(3 * whole, parameters), rtol=1e-9, atol=1e-12)


def test_the_loss_in_chunks_under_autocast(monkeypatch):
    """In bfloat16 it is as near to the exact one as all logits at once are."""
    model = model_with(chunked_cross_entropy, torch.float32)
    idx, targets = torch.randint(61, (2, 2, 16))
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 5 * 61)
    weight = model.lm_head.weight
    exact = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    with torch.autocast("cpu", torch.bfloat16):
        whole = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
        ours = model(idx, targets)
    (exact_grad,), (whole_grad,), (grad,) = (torch.autograd.grad(x, [weight]) for x in (exact, whole, ours))
    assert ours.dtype == grad.dtype == torch.float32
    assert abs(ours - exact) <= 1.5 * abs(whole - exact) + 1e-3
    assert (grad - exact_grad).norm() <= 1.5 * (whole_grad - exact_grad).norm()


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("target", [-100, -2, 61, 1000])
def test_only_minus_one_is_ignored(target, grad, reduction, kind):
    """PyTorch's and Hugging Face's -100 is an error, and not a token to learn."""
    model = model_with(kind)
    idx, targets = torch.randint(61, (2, 2, 16))
    targets[1, 3] = target
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, IndexError)):
        model(idx, targets, loss_reduction=reduction)


def test_without_gradients_the_loss_costs_no_gradient(monkeypatch):
    """Under no_grad, and where nothing requires one, no product makes a tensor of the head's shape."""
    idx, targets = torch.randint(61, (2, 2, 16))

    def made(model) -> bool:
        """Whether an operation has a result of the shape of the head, (61, 32)."""
        shapes = set()

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **kwargs or {})
                if isinstance(out, torch.Tensor) and "view" not in str(func) and not out._is_view():
                    shapes.add(tuple(out.shape))
                return out

        with Watch():
            model(idx, targets)
        return (61, 32) in shapes

    model = model_with(chunked_cross_entropy)
    assert made(model)
    with torch.no_grad():
        assert not made(model)
    assert not made(model.requires_grad_(False))


@pytest.mark.parametrize("name", ["wte.weight", "h.0.mlp.c_fc.weight", "lm_head.weight"])
def test_a_second_derivative_of_the_loss_is_an_error(name):
    """It would be silently wrong: the gradient of the logits is a constant to autograd."""
    model = model_with(chunked_cross_entropy)
    idx, targets = torch.randint(61, (2, 2, 16))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(idx, targets), model.get_parameter(name), create_graph=True)


@pytest.mark.parametrize("grad", [True, False])
def test_however_many_rows_a_batch_has_the_head_is_read_for_few_chunks(grad, monkeypatch):
    """Each chunk reads the head and adds to its gradient, which would be most of the traffic of a large batch."""
    model, idx, read = model_with(chunked_cross_entropy, sequence_len=128), torch.randint(61, (3, 128)), []
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 61)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.linear and args[1] is model.lm_head.weight:
                read.append(len(args[0]))
            return func(*args, **kwargs or {})

    with torch.set_grad_enabled(grad), Watch():
        ours = model(idx, idx)
    assert len(read) == 16 and sum(read) == 3 * 128
    torch.testing.assert_close(ours, F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()))

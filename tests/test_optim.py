import pytest
import torch
from conftest import GEMMA, GPT2, LLAMA, QWEN, make_model
from torch import nn

from sologpt.optim import Muon, configure_optimizers, orthogonalize
from sologpt.parallel import load_optimizers


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("switches", [{}, LLAMA, QWEN, GPT2, GEMMA])
def test_every_parameter_is_in_exactly_one_group(switches, optimizer):
    model = make_model(**switches)
    optimizers = configure_optimizers(model, optimizer=optimizer)
    grouped = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("switches", [{}, QWEN, GPT2])
@pytest.mark.parametrize("trained", ["norm", "c_fc.weight", "wte", "wpe", "h.1.", "lm_head"])
def test_exactly_what_requires_a_gradient_is_trained(switches, optimizer, trained):
    model = make_model(torch.float32, **switches)
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if not any(trained in name for name in before):
        with pytest.raises(ValueError, match="no parameter"):
            configure_optimizers(model, optimizer=optimizer)
        return
    optimizers = configure_optimizers(model, optimizer=optimizer)
    model(*torch.randint(61, (2, 2, 16))).backward()
    for each in optimizers:
        each.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is (trained not in name), name
    resumed, states = configure_optimizers(model, optimizer=optimizer), [o.state_dict() for o in optimizers]
    load_optimizers(resumed, states)
    assert [o.state_dict()["state"].keys() for o in resumed] == [s["state"].keys() for s in states]


def test_a_parameter_without_a_rule_is_an_error_that_names_it():
    model = make_model()
    model.h[1].attn.register_parameter("stack", nn.Parameter(torch.zeros(2, 3, 4)))
    with pytest.raises(ValueError, match=r"h\.1\.attn\.stack"):
        configure_optimizers(model)
    model.h[1].attn.stack.requires_grad_(False)
    configure_optimizers(model)
    model.probe = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match=r"probe\.weight"):
        configure_optimizers(model)


def test_rates_go_where_they_belong():
    model = make_model()
    muon, adamw = configure_optimizers(
        model, 0.1, embd_lr=0.2, head_lr=0.3, weight_decay=0.4, momentum=0.7, betas=(0.5, 0.6)
    )
    rates = {id(p): g["initial_lr"] for o in (muon, adamw) for g in o.param_groups for p in g["params"]}
    assert rates[id(model.wte.weight)] == 0.2 and rates[id(model.lm_head.weight)] == 0.3
    assert all(rates[id(p)] == 0.1 for p in model.h.parameters())
    assert all((g["weight_decay"], g["momentum"]) == (0.4, 0.7) for g in muon.param_groups)
    assert all(g["betas"] == (0.5, 0.6) for g in adamw.param_groups)


def test_adamw_takes_the_matrices_at_their_rate_and_decay():
    model = make_model(**LLAMA)
    [adamw] = configure_optimizers(
        model, 0.1, 0.2, 0.3, weight_decay=0.4, betas=(0.5, 0.6), optimizer="adamw"
    )
    assert isinstance(adamw, torch.optim.AdamW)
    settings = {
        id(p): (g["initial_lr"], g["weight_decay"], g["betas"])
        for g in adamw.param_groups
        for p in g["params"]
    }
    assert settings[id(model.wte.weight)] == (0.2, 0, (0.5, 0.6))
    assert settings[id(model.lm_head.weight)] == settings[id(model.norm.weight)] == (0.3, 0, (0.5, 0.6))
    for p in model.h.parameters():
        assert settings[id(p)] == ((0.1, 0.4, (0.5, 0.6)) if p.ndim == 2 else (0.3, 0, (0.5, 0.6)))
    with pytest.raises(ValueError, match="sgd"):
        configure_optimizers(model, optimizer="sgd")


def test_gains_biases_and_a_tied_embedding_move_at_the_rate_of_the_head():
    model = make_model(**QWEN)
    muon, adamw = configure_optimizers(model, 0.1, embd_lr=0.2, head_lr=0.3)
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    assert {group["initial_lr"] for group in adamw.param_groups} == {0.3} and len(adamw.param_groups) == 2


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8), (1, 1, 5)])
def test_orthogonalize_keeps_the_singular_vectors_and_makes_the_values_one(shape):
    torch.manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    S = S.clamp_min(0.05 * S.amax())
    X = orthogonalize(U * S[:, None, :] @ Vh)
    values = torch.linalg.svdvals(X)
    assert values.min() > 0.8 and values.max() < 1.2
    assert (X - U @ Vh).norm(dim=(-2, -1)).max() < 0.2 * shape[-1] ** 0.5


def test_stacked_muon_equals_one_matrix_after_the_other():
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(12, 20, dtype=torch.float64)) for _ in range(3)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [
        Muon(together, lr=0.1, weight_decay=0.1),
        *(Muon([p], lr=0.1, weight_decay=0.1) for p in alone),
    ]
    for _ in range(4):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn(12, 20, dtype=torch.float64)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(together, alone, strict=True))


@pytest.mark.parametrize("shape", [(30, 20), (80, 10), (10, 80)])
def test_muon_does_what_torch_muon_does_up_to_the_iteration(shape):
    """The same momentum, decay and scale: steps differ only by how near the iteration comes to orthogonal."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    reference = torch.nn.Parameter(ours.detach().clone())
    a = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.2)
    b = torch.optim.Muon([reference], lr=0.1, momentum=0.9, weight_decay=0.2)
    start = ours.detach().clone()
    for _ in range(5):
        ours.grad = torch.randn(shape)
        reference.grad = ours.grad.clone()
        a.step(), b.step()
    moved, expected = ours - start, reference - start
    assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.99
    assert 0.8 < moved.norm() / expected.norm() < 1.25


def test_a_parameter_without_a_gradient_stays():
    p, q = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    muon = Muon([p, q], lr=0.1)
    p.grad = torch.randn(2, 3)
    muon.step()
    assert torch.equal(q, torch.ones(2, 3)) and not torch.equal(p, torch.ones(2, 3))


@pytest.mark.parametrize("rates", [{}, dict(learning_rate=0.005, optimizer="adamw")])
@pytest.mark.parametrize("switches", [{}, LLAMA, QWEN, GPT2, GEMMA])
def test_the_model_learns_a_batch_by_heart(switches, rates):
    model = make_model(torch.float32, sequence_len=16, **switches)
    model.init_weights()
    optimizers = configure_optimizers(model, **rates)
    idx = torch.randint(61, (8, 17))
    losses = []
    for _ in range(60):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 0.5

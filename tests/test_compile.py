"""torch.compile: decode, as on a GPU, gives what `GPT.step` gives, and training what the plain model gives."""

import copy
import pickle

import pytest
import torch
from conftest import GEMMA, GPT2, QWEN, WINDOWS, make_model
from torch._dynamo.utils import counters

from gpt import KVCache
from sologpt import graphs, native, parallel
from sologpt.loss import chunked_cross_entropy


@pytest.fixture(params=[{}, QWEN, GPT2, WINDOWS, GEMMA], ids=["nanochat", "qwen", "gpt2", "windows", "gemma"])
def kind(request):
    torch._dynamo.reset()
    counters.clear()
    return request.param


@pytest.mark.slow
def test_compiled_decode_gives_the_same_tokens_and_is_compiled_once(kind):
    """For one row, for a batch, and for rows of different lengths. Whatever the prompts and the positions, past a full
    window too."""
    plain, model = (make_model(torch.float32, sequence_len=64, **kind) for _ in range(2))
    decode, seen = graphs.Compiled(model), []

    def check(prompts: list, n: int) -> None:
        assert list(model.generate_batch(prompts, n, temperature=0, decode=decode)) == list(
            plain.generate_batch(prompts, n, temperature=0)
        )
        seen.append(counters["stats"]["unique_graphs"])

    # The head, and a block of each type. With windows, these are F, S with its mask, and N, which has no angles. Where
    # the rows differ, F has a mask as well
    # no block differs from another of Gemma's but by its mask
    alone, ragged = (3, 2) if kind is WINDOWS else (2, 1) if kind is GEMMA else (1, 1)
    for prompt, n in (([1, 2, 3], 90), ([5] * 20, 30), ([7], 70), (list(range(60)), 9), ([1, 2, 3], 90)):
        check([prompt], n)
    assert seen == [alone + 1] * 5
    for rows, length, n in ((2, 3, 90), (5, 20, 30), (3, 1, 70)):
        check([[b] * length for b in range(rows)], n)
    assert seen[5:] == [2 * (alone + 1)] * 3
    for prompts in ([[1, 2, 3], [4], [5] * 16], [[4], [1, 2]], [[6] * 30, [1, 2], [5, 5, 5]]):
        check(prompts, 80)
    assert seen[8:] == [2 * (alone + 1) + ragged] * 3 and not counters["graph_break"]


@pytest.mark.parametrize("prepare", [pytest.param(graphs.Compiled, marks=pytest.mark.slow), native.prepare])
def test_a_model_whose_decoder_was_compiled_can_be_copied_and_pickled(kind, prepare, tmp_path):
    """The compiled code belongs to the decoder: the model is as it was."""
    model = make_model(torch.float32, sequence_len=64, **kind)  # as above: the compiler's cache has its code
    decode = prepare(model)
    assert decode is not None
    tokens = list(model.generate([1, 2, 3], 9, temperature=0, decode=decode))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert list(other.generate([1, 2, 3], 9, temperature=0)) == tokens
        other(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()


@pytest.mark.slow
def test_compiled_decode_is_exact(kind):
    """In bfloat16 it is nearer to float64 than `GPT.step`, which rounds more often."""
    exact = make_model(torch.float64, sequence_len=64, **kind)
    model = make_model(torch.bfloat16, sequence_len=64, **kind)
    logits = []
    for of, decode in ((exact, exact.step), (model, model.step), (model, graphs.Compiled(model))):
        cache = KVCache(of.config, 1, 64, dtype=of.dtype)
        with torch.inference_mode():
            of.prefill([range(9)], cache)
            steps = [decode(torch.tensor([t]), cache) for t in range(20)]
        logits.append(torch.cat(steps).double())
    plain, compiled = ((logits[0] - each).norm() / logits[0].norm() for each in logits[1:])
    assert compiled <= 1.2 * plain


@pytest.mark.slow
def test_a_decoder_follows_what_happens_to_the_model():
    """Other weights, in the same memory or in theirs: after each change, its tokens are those of step."""
    model, other = (make_model(torch.float32, seed=seed, n_embd=64).eval() for seed in (0, 1))
    decode = graphs.Compiled(model)

    def tokens(decode) -> list[int]:
        return list(model.generate([1, 2, 3], 12, temperature=0, decode=decode))

    seen = [tokens(decode)]
    for change in (
        lambda: model.load_state_dict(other.state_dict()),
        lambda: model.load_state_dict(make_model(torch.float32, seed=2, n_embd=64).state_dict(), assign=True),
    ):
        change()
        seen.append(tokens(decode))
        assert seen[-1] == tokens(None)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [{}, QWEN, GPT2, WINDOWS], ids=["nanochat", "qwen", "gpt2", "windows"])
def test_the_arithmetic_that_is_compiled_is_that_of_the_model(kind, rows, monkeypatch):
    """Without the compiler, to float64's rounding: the loops in place of products, the slots and masks of the cache."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    model = make_model(sequence_len=48, **kind)
    decode = graphs.Compiled(model)
    for prompts in ([list(range(1, 9))] * rows, [[b + 1] * (4 * b + 2) for b in range(rows)]):
        caches = [KVCache(model.config, rows, 48, dtype=model.dtype) for _ in range(2)]
        with torch.inference_mode():
            for cache in caches:
                cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)  # slots past the lengths must not matter
                model.prefill(prompts, cache)
            for step in range(30):
                ids = torch.full((rows,), step)
                theirs, ours = model.step(ids, caches[0]), decode(ids, caches[1])
                torch.testing.assert_close(ours, theirs)
        assert caches[0].tokens() == caches[1].tokens()
        with pytest.raises(ValueError, match="48"):
            for _ in range(48):
                decode(ids, caches[1])


@pytest.mark.slow
def test_wrap_model_compiles_the_training_step(kind):
    """With --compile, the loss and its gradients come from compiled code, and are those of the plain model."""
    idx, targets = torch.randint(61, (2, 2, 16))
    results, world = [], parallel.World(0, 0, 1, torch.device("cpu"))
    for compile in (False, True):
        model, forward = parallel.wrap_model(make_model(torch.float32, **kind), world, compile=compile)
        loss = forward(idx, targets)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        assert (counters["stats"]["unique_graphs"] > 0) == compile
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)


def test_compiled_training_needs_no_complex_numbers():
    """torch.compile generates no code for them, and says so in a warning: graphs.rotate takes the place of gpt.rotate."""
    torch._dynamo.reset()
    graphs.compile_rotate()
    model = make_model(torch.float32, n_layer=1)
    explained = torch._dynamo.explain(model)(
        torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    )
    targets = [str(node.target) for graph in explained.graphs for node in graph.graph.nodes]
    assert explained.graph_break_count == 0 and targets
    assert not any("complex" in target for target in targets)


@pytest.mark.slow
@pytest.mark.parametrize("target", [-100, -2, 61])
def test_a_target_that_is_no_token_is_an_error_in_compiled_training_too(target):
    """Compiled code takes a small negative index for one from the end."""
    torch._dynamo.reset()
    graphs.compile_rotate()
    model = make_model(torch.float32, n_layer=1)
    model.loss = chunked_cross_entropy
    targets = torch.full((1, 4), target)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        torch.compile(model)(torch.zeros(1, 4, dtype=torch.long), targets)

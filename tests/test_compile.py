"""What is compiled gives what is not."""

import pytest
import torch
from conftest import QWEN, make_model
from torch._dynamo.utils import counters

from gpt import KVCache


@pytest.fixture(params=[{}, QWEN], ids=["nanochat", "qwen"])
def models(request):
    """The same model twice: as it is, and with its decode compiled."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (make_model(torch.float32, sequence_len=64, **request.param) for _ in range(2))
    compiled.compile_decode()
    return plain, compiled


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_compiled_decode_gives_the_same_tokens_and_is_compiled_once(models, packed):
    """For a block and for the head, whatever the prompt and the position, past a full window too."""
    if packed:
        models[1].prepack()
    for prompt, n in (([1, 2, 3], 90), ([5] * 20, 30), ([7], 70), (list(range(60)), 9)):
        a, b = (list(model.generate(prompt, n, temperature=0)) for model in models)
        assert a == b
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    prompts = [[1, 2, 3], [4], [5] * 9]
    a, b = (list(model.generate_batch(prompts, 80, temperature=0)) for model in models)
    assert a == b
    before = counters["stats"]["unique_graphs"]
    for prompts in ([[4], [1, 2]], [[6] * 30, [1, 2], [5, 5, 5]]):
        a, b = (list(model.generate_batch(prompts, 20, temperature=0)) for model in models)
        assert a == b
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
def test_compiled_decode_is_exact(models):
    """In bfloat16 it is nearer to float64 than what is not compiled, which rounds more often."""
    errors = []
    for model in models:
        exact = make_model(torch.float64, sequence_len=64)
        if model.config != exact.config:
            exact = make_model(torch.float64, sequence_len=64, **QWEN)
        logits = []
        for of in (exact, model.bfloat16()):
            cache = KVCache(of.config, 1, 64, dtype=of.dtype)
            with torch.inference_mode():
                of.hidden(torch.arange(9)[None], cache)
                steps = [of._decode(torch.tensor([t]), cache, torch.tensor([True])) for t in range(20)]
            logits.append(torch.cat(steps).double())
        errors.append((logits[0] - logits[1]).norm() / logits[0].norm())
    assert errors[1] <= 1.2 * errors[0]

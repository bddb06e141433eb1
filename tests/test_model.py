import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import GEMMA, GPT2, LLAMA, LLAMA3, QWEN, ROOT, WINDOWS, make_model

from bench.peers import as_transformers
from gpt import GPT, GPTConfig, rope, rotate
from sologpt import parallel


@pytest.mark.parametrize("n_kv_head", [None, 1, 2, 4])
@pytest.mark.parametrize("softcap, rope_base", [(15.0, 10_000.0), (3.0, 500.0)])
def test_logits_equal_transformers(n_kv_head, softcap, rope_base):
    model = make_model(
        torch.float32, n_kv_head=n_kv_head, softcap=softcap, rope_base=rope_base, sequence_len=300
    )
    for weight in model.parameters():
        weight.data *= 0.3
    idx = torch.randint(model.config.vocab_size, (3, 300))
    with torch.no_grad():
        ours, theirs = model(idx), as_transformers(model)(idx).logits
    assert ours.abs().max() > 0.5
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("switches", [{}, LLAMA, QWEN, GPT2, WINDOWS, GEMMA])
def test_a_fresh_model_knows_nothing_and_each_block_is_the_identity(switches):
    config = GPTConfig(sequence_len=64, vocab_size=1000, n_layer=4, n_head=4, n_embd=64, **switches)
    model = GPT(config)
    idx = torch.randint(1000, (8, 64))
    assert model(idx, idx).item() == pytest.approx(math.log(1000), rel=0.02)
    x = model.wte(idx) if model.wpe is None else model.wte(idx) + model.wpe.weight
    x = x * 8 if config.embd_scale else x  # the square root of 64
    assert torch.equal(model.hidden(idx), model.norm(model.embd_norm(x)))
    weight = model.h[1].mlp.c_fc.weight
    assert (
        weight.std().item() * 64**0.5 == pytest.approx(1, rel=0.05) and weight.abs().max() < (3 / 64) ** 0.5
    )


def test_activation_checkpointing_changes_no_gradient():
    idx, targets = torch.randint(61, (2, 2, 16))
    grads, kept, world = [], [], parallel.World(0, 0, 1, torch.device("cpu"))
    for checkpointing in (False, True):
        model, forward = parallel.wrap_model(
            make_model(dropout=0.2), world, activation_checkpointing=checkpointing
        )
        torch.manual_seed(0)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x
        ):
            loss = forward(idx, targets)
        kept.append(sum(sizes))
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
        assert model.state_dict().keys() == make_model().state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert kept[1] < kept[0] / 2


def test_logits_are_capped_and_in_float32_or_better():
    idx = torch.randint(61, (2, 16))
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64,) * 2,
    ):
        model = make_model(dtype)
        model.lm_head.weight.data *= 100
        logits = model(idx)
        assert logits.dtype == expected and logits.shape == (2, 16, 61)
        assert 14 < logits.abs().max() <= 15
    model = make_model(softcap=0.0)
    model.lm_head.weight.data *= 100
    assert model(idx).abs().max() > 15


def test_the_future_has_no_influence():
    model = make_model()
    idx = torch.randint(61, (1, 32))
    changed = idx.clone()
    changed[:, 20:] = torch.randint(61, (12,))
    assert torch.equal(model(idx)[:, :20], model(changed)[:, :20])
    assert not torch.allclose(model(idx)[:, 20:], model(changed)[:, 20:])


def test_attention_sees_distances_not_positions():
    config = GPTConfig(n_head=4, n_embd=32)
    q, k = torch.randn(2, 1, 1, 4, 8, dtype=torch.float64)

    def score(p: int) -> torch.Tensor:
        turned = [rotate(x, rope(torch.tensor([[at]]), config, x.dtype)) for x, at in ((q, p + 5), (k, p))]
        return (turned[0] * turned[1]).sum(-1)

    assert torch.allclose(score(0), score(7)) and torch.allclose(score(0), score(50))


def test_rotations_are_exact_whatever_the_dtype_of_the_model():
    config = GPTConfig(n_head=1, n_embd=64)
    positions = torch.tensor([[4095]])
    exact = rope(positions, config, torch.float64)
    assert (rope(positions, config, torch.bfloat16) - exact).abs().max() < 1e-3


def test_dropout_acts_in_training_only():
    model = make_model(dropout=0.5)
    idx = torch.randint(61, (2, 16))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_stretched_positions_keep_the_fast_pairs_and_slow_the_others_down():
    """Of an original context of 64 tokens, pairs that turn 4 times or more stay as they are, from one turn on all is
    slowed down, and in between the slower a pair is, the more."""
    config = GPTConfig(n_head=1, n_embd=64, rope_scaling=LLAMA3)
    plain, slow = (
        torch.view_as_complex(rope(torch.tensor([[1]]), c, torch.float64)).angle()[0, 0, 0]
        for c in (GPTConfig(n_head=1, n_embd=64), config)
    )
    turns, ratio = plain * 64 / (2 * math.pi), plain / slow
    assert (ratio[turns >= 4] == 1).all() and torch.allclose(
        ratio[turns <= 1], torch.tensor(8.0, dtype=torch.float64)
    )
    between = ratio[(turns < 4) & (turns > 1)]
    assert len(between) > 3 and (between.diff() > 0).all() and 1 < between[0] < between[-1] < 8


@pytest.mark.parametrize(
    "shape, words",
    [
        (dict(n_embd=100, n_head=3), ("100", "3")),
        (dict(n_head=4, n_kv_head=3), ("4", "3")),
        (dict(n_embd=12, n_head=4), ("12", "4")),
        (dict(n_layer=0), ("n_layer", "0")),
        (dict(dropout=1.0), ("dropout", "1.0")),
        (dict(softcap=-1.0), ("softcap", "-1.0")),
        (dict(head_dim=7), ("7", "odd")),
        (dict(head_dim=0), ("head_dim", "0")),
        (dict(n_hidden=0), ("n_hidden", "0")),
        (dict(norm="batch"), ("rms", "layer", "'batch'")),
        (dict(positions="none"), ("rotary", "learned", "'none'")),
        (dict(mlp="tanh"), ("relu2", "swiglu", "geglu", "'tanh'")),
        (dict(layer_types="FX"), ("F, S or N", "'FX'")),
        (dict(layer_types=""), ("F, S or N", "''")),
        (dict(sliding_window=0), ("sliding_window", "0")),
    ],
)
def test_impossible_shapes_say_both_numbers(shape, words):
    with pytest.raises(ValueError) as e:
        GPTConfig(**shape)
    assert all(word in str(e.value) for word in words)


def test_more_tokens_than_the_context_is_an_error():
    with pytest.raises(ValueError, match=r"33 .* 32"):
        make_model()(torch.zeros(1, 33, dtype=torch.long))


def test_idx_without_a_batch_dimension_is_an_error():
    with pytest.raises(ValueError, match="unpack"):
        make_model()(torch.arange(5))


def test_num_params():
    config = GPTConfig(sequence_len=8, vocab_size=50, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
    model = GPT(config)
    block = 16 * 16 * 2 + 16 * 8 * 2 + 2 * 16 * 64
    assert model.num_params() == 2 * block + 2 * 50 * 16
    same = dict(sequence_len=8, vocab_size=50, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
    model_2 = GPT(
        GPTConfig(
            **same, head_dim=6, n_hidden=20, mlp="swiglu", norm_weight=True, qkv_bias=True, tie_embd=True
        )
    )
    gains, biases = 2 * (16 + 16 + 6 + 6) + 16 + 16, 2 * (12 + 6 + 6)
    assert model_2.num_params() == 2 * (2 * 16 * 12 + 2 * 16 * 6 + 3 * 16 * 20) + 50 * 16 + gains + biases
    assert len([name for name in model_2.state_dict() if "wte" in name or "lm_head" in name]) == 1


def test_gpt_py_works_alone_in_an_empty_folder_and_its_import_has_no_side_effect(tmp_path):
    shutil.copy(ROOT / "gpt.py", tmp_path)
    code = """
import sys; sys.path.insert(0, ".")
import torch
random = torch.get_rng_state()
import gpt
assert torch.equal(random, torch.get_rng_state())
model = gpt.GPT(gpt.GPTConfig(sequence_len=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16))
idx = torch.randint(50, (4, 17))
before = model(idx[:, :-1], idx[:, 1:])
before.backward()
torch.optim.AdamW(model.parameters(), 1e-2).step()
assert model(idx[:, :-1], idx[:, 1:]) < before
tokens = list(model.generate([1, 2, 3], 20))
assert len(tokens) == 20
model.save("model.pt")
assert list(gpt.GPT.load("model.pt").generate([1, 2, 3], 20)) == tokens
assert not [name for name in sys.modules if name.startswith("sologpt")]
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

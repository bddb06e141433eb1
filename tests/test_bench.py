import json
from dataclasses import asdict

import pytest
import torch
from conftest import run

from bench import __main__ as bench
from gpt import GPT, GPTConfig

NANOGPT = '''
import torch
from dataclasses import dataclass


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(torch.nn.Module):
    """Another model with the interface of nanoGPT's."""

    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        if targets is None:
            return logits, None
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
'''


GPT_FAST = '''
import torch
from dataclasses import dataclass


@dataclass
class ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    dim: int
    n_local_heads: int
    intermediate_size: int | None


class Transformer(torch.nn.Module):
    """Another model with the interface of gpt-fast's: it wants its caches set up for the positions that it is given."""

    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def setup_caches(self, max_batch_size, max_seq_length):
        self.room = (max_batch_size, max_seq_length)

    def forward(self, idx, input_pos):
        assert idx.size(0) == self.room[0] and input_pos.max() < self.room[1] and len(input_pos) == idx.size(1)
        return self.table(idx)
'''


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(
        bench.SHAPES, "tiny", GPTConfig(sequence_len=1024, vocab_size=64, n_layer=1, n_head=2, n_embd=16)
    )
    yield
    torch.set_grad_enabled(True)


def test_it_measures_what_it_says(small, tmp_path):
    for name, text in (("nanogpt", NANOGPT), ("gpt-fast", GPT_FAST)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(text)
    peers = ("transformers", f"nanogpt={tmp_path / 'nanogpt'}", f"gpt-fast={tmp_path / 'gpt-fast'}")
    config = bench.Config(peers=peers, rounds=2, tokens=3, compile=False)
    found = list(bench.measured(config, "tiny", torch.float32, torch.device("cpu")))
    assert [(rows[0].what, [row.who for row in rows]) for rows in found] == [
        ("decode, batch 1", ["soloGPT", "transformers", "gpt-fast"]),
        ("decode, batch 16", ["soloGPT", "transformers", "gpt-fast"]),
        ("decode", ["at 100", "at 1000"]),
        ("prefill of 512", ["soloGPT", "transformers", "nanoGPT"]),
        ("train", ["soloGPT", "soloGPT AdamW", "nanoGPT"]),
    ]
    assert all(row.peak > 2**20 for row in found[-1])
    for row in (row for rows in found for row in rows):
        assert len(row.rates) == 2 and row.median > 0 and json.dumps(asdict(row))
    for rows in found:
        lines = list(bench.table(rows))
        assert len(lines) == len(rows) and sum(" x" in line for line in lines) == len(rows) - 1
    bench.draw([row for rows in found for row in rows], str(tmp_path / "bench.png"))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_rivals_of_a_turn_say_the_same(small):
    """The same weights are on both sides, and so are the greedy tokens."""
    torch.manual_seed(1)
    model = bench.make_model("tiny", torch.device("cpu"), torch.float32)
    theirs = bench.as_transformers(model)
    idx = torch.randint(64, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(idx), theirs(idx).logits, atol=1e-5, rtol=0)
    rivals = bench.decode(model, {"transformers": theirs}, 3, 5, False)
    assert rivals["soloGPT"]() == rivals["transformers"]() == 15


def test_the_limits_count_what_is_read_and_multiplied():
    config = GPTConfig(sequence_len=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
    model = GPT(config)
    assert bench.weights_read(model) == 4 * (model.num_params() - 50 * 16)
    tied = GPT(GPTConfig(sequence_len=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16, tie_embd=True))
    assert bench.weights_read(tied) == 4 * tied.num_params() == bench.weights_read(model)


@pytest.mark.parametrize(
    "flag", ["--shape=huge", "--dtype=int8", "--peers=nobody", "--peers=nanogpt=nowhere", "--rounds=0", "--measure=all"]
)
def test_bad_flags_are_one_line(flag):
    assert run("bench.py", flag, status=2).stderr.startswith("error: ")

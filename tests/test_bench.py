import json

import numpy as np
import pytest
import torch
from conftest import make_model
from torch.utils.flop_counter import FlopCounterMode

import bench.__main__
from bench import measures, peers, report, time_to_loss
from gpt import GPT, GPTConfig, KVCache

CPU = torch.device("cpu")

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
    """A bigram model with the interface of nanoGPT."""

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
    """A bigram model with the interface of gpt-fast. Positions start at 0 and follow each other."""

    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def setup_caches(self, max_batch_size, max_seq_length):
        self.cache_shape = (max_batch_size, max_seq_length)

    def forward(self, idx, input_pos):
        B, T = self.cache_shape
        start = 0 if input_pos[0] == 0 else self.end
        self.end = start + idx.size(1)
        assert idx.size(0) == B and self.end <= T and input_pos.tolist() == list(range(start, self.end))
        return self.table(idx)
'''


@pytest.fixture
def clones(tmp_path) -> dict[str, str]:
    """The paths of peers that are cloned."""
    for name, source in (("nanogpt", NANOGPT), ("gpt-fast", GPT_FAST)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(source)
    return {name: str(tmp_path / name) for name in ("nanogpt", "gpt-fast")}


@pytest.mark.slow
def test_every_benchmark_measures_each_candidate_that_can_do_it(monkeypatch, clones, tmp_path):
    shape = GPTConfig(sequence_len=1024, vocab_size=64, n_layer=1, n_head=2, n_embd=16)
    monkeypatch.setitem(peers.SHAPES, "tiny", shape)
    paths = {"transformers": "", **clones}
    settings = dict(rounds=2, tokens=3, compile=False, quantize=("int8",))
    results = list(measures.run(measures.BENCHMARKS, "tiny", torch.float32, CPU, paths, **settings))
    assert [(rows[0].benchmark, [row.candidate for row in rows]) for rows in results] == [
        ("decode, batch 1", ["soloGPT", "soloGPT int8", "transformers", "gpt-fast"]),
        *(
            (f"decode, batch {rows}", ["soloGPT", "soloGPT int8", "transformers", "gpt-fast"])
            for rows in (4, 8, 16)
        ),
        ("512 + 3", ["soloGPT", "soloGPT int8", "transformers", "gpt-fast"]),
        ("decode", ["at 100", "at 1000"]),
        ("prefill of 512", ["soloGPT", "soloGPT int8", "transformers", "nanoGPT"]),
        ("train", ["soloGPT", "soloGPT AdamW", "nanoGPT"]),
    ]
    assert all(row.peak_memory > 2**20 for row in results[-1])
    for rows in results:
        assert all(len(row.rates) == 2 and row.median > 0 for row in rows)
        lines = list(report.table(rows))
        assert len(lines) == len(rows) and sum(" x" in line for line in lines) == len(rows) - 1
    rows = [row for rows in results for row in rows]
    written = json.loads(report.to_json("a machine", rows))
    assert [row["median"] for row in written["rows"]] == [row.median for row in rows]
    report.plot(rows, str(tmp_path / "bench.png"))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_decode_of_transformers_gives_our_greedy_tokens():
    """Both have the same weights, which are so large that the whole context decides on the next token."""
    model = make_model(torch.float32).eval()
    prompts = torch.randint(61, (3, 8)).tolist()
    n = 12
    greedy = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(n):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        greedy.append(tokens[8:])
    assert len({tuple(row) for row in greedy}) == 3
    for candidate in (peers.SoloGPT(model), peers.Transformers(model)):
        call = candidate.decode(prompts, n)
        assert call() == greedy and call() == greedy, candidate.name


def test_compiled_decode_gives_the_same_greedy_tokens():
    model = make_model(torch.float32).eval()
    prompts = torch.randint(61, (9, 8)).tolist()
    for rows in (prompts, prompts[:3], prompts[:1]):
        plain, compiled = (peers.SoloGPT(model, compile).decode(rows, 12)() for compile in (False, True))
        assert plain == compiled


def test_decode_of_gpt_fast_gives_its_greedy_tokens(clones):
    config = GPTConfig(sequence_len=32, vocab_size=61, n_layer=1, n_head=2, n_embd=16)
    candidate = peers.GptFast(clones["gpt-fast"], config, CPU, torch.float32, compile=False)
    prompts = torch.randint(61, (3, 8)).tolist()
    after = candidate.model.table.weight.argmax(-1).tolist()  # the most likely token after each token
    greedy = []
    for prompt in prompts:
        tokens = [after[prompt[-1]]]
        while len(tokens) < 5:
            tokens.append(after[tokens[-1]])
        greedy.append(tokens)
    assert candidate.decode(prompts, 5)() == greedy


def test_prefill_gives_the_logits_after_the_prompt():
    model = make_model(torch.float32).eval()
    prompt = torch.randint(61, (20,)).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[:, -1]
        torch.testing.assert_close(peers.SoloGPT(model).prefill(prompt)(), logits, atol=1e-4, rtol=0)
        theirs = peers.Transformers(model).prefill(prompt)().logits[:, -1]
    torch.testing.assert_close(theirs, logits, atol=1e-4, rtol=0)


def test_rates_are_tokens_per_second(monkeypatch):
    clock = iter([0.0, 9.0, 0.0, 4.0, 10.0, 12.0])  # start and end of each call, the first of them to warm up
    monkeypatch.setattr(measures.time, "perf_counter", lambda: next(clock))
    assert measures.take_turns({"soloGPT": lambda: None}, 8, 2, CPU) == {"soloGPT": [2.0, 4.0]}


def test_candidates_take_turns():
    turns: list[str] = []
    measures.take_turns({name: lambda name=name: turns.append(name) for name in "AB"}, 1, 2, CPU)
    assert "".join(turns) == "ABABAB"


@pytest.mark.parametrize("tie_embd", [False, True])
def test_limits_count_what_a_forward_reads_and_multiplies(tie_embd):
    config = GPTConfig(sequence_len=64, vocab_size=50, n_layer=2, n_head=2, n_embd=16, tie_embd=tie_embd)
    model, embedding, T = GPT(config), 50 * 16, 40
    assert measures.weights_read(model) == 4 * (model.num_params() - (0 if tie_embd else embedding))
    # bytes, keys and values, layers, heads, head_dim, mean length of 10 tokens
    kv_cache = 4 * 2 * 2 * 2 * 8 * (16 + 5)
    limit = 3 * 1e6 / (measures.weights_read(model) + 3 * kv_cache)
    assert measures.decode_limit(model, rows=3, tokens=10, bandwidth=1e6) == pytest.approx(limit)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.prefill([[1] * T], KVCache(config, 1, T))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    # two products, FLOPs, layers, heads, head_dim; half of them is masked
    attention = 2 * 2 * 2 * 2 * 8 * T * T / 2
    assert measures.prefill_flops(model, T) * T == products - 2 * embedding + attention  # without the head


def test_mean_loss_is_that_of_all_windows():
    model = make_model(torch.float64, sequence_len=time_to_loss.CONTEXT).eval()
    ids = np.random.default_rng(0).integers(61, size=64 * 130 + 1)
    idx, targets = torch.from_numpy(ids[:-1]).view(130, 64), torch.from_numpy(ids[1:]).view(130, 64)
    with torch.no_grad():
        assert time_to_loss.mean_loss(model, ids) == pytest.approx(float(model(idx, targets)))


@pytest.mark.slow
def test_a_benchmark_that_dies_is_an_error_and_not_a_hang():
    with pytest.raises(RuntimeError, match="exit status"):
        list(measures.run_in_subprocess(("decode",), "no such shape", torch.float32, CPU, {}, 1, 1, False))


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--shape=huge", "shape must be one of tiny, gpt2"),
        ("--dtype=int8", "dtype must be one of float32, bfloat16"),
        ("--peers=nobody", "peers must be of transformers"),
        ("--peers=nanogpt=nowhere", "nowhere does not exist"),
        ("--rounds=0", "rounds and tokens must be at least 1"),
        ("--measure=all", "measure must be one of train"),
        ("--shape=hf:nowhere/nothing/at/all", "nowhere/nothing/at/all"),
    ],
)
def test_bad_flags_are_one_line(flag, words, error_here):
    assert words in error_here(bench.__main__, flag)

"""What differs on a GPU, against the CPU and the plain decoder. Skipped where there is none.

TEST_DEVICE=cpu runs the same tests on the CPU, as far as that goes, which tests the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPUS, QWEN, ROOT, SMALL, make_model
from test_graphs import cuda_graph
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt import GPT, KVCache
from sologpt import data, fast, graphs, parallel
from sologpt.device import autocast_dtype, make_autocast, multiplies_bfloat16
from sologpt.graphs import Compiled, CudaGraphs
from sologpt.lookup import Lookup
from sologpt.loss import chunked_cross_entropy
from sologpt.native import Native
from sologpt.optim import Muon, configure_optimizers
from sologpt.tokenizer import Tokenizer

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"), 0)
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU")
TWO = pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
KINDS = pytest.mark.parametrize("kind", [{}, QWEN], ids=["nanochat", "qwen"])
PROMPTS = [[1, 2, 3], [4], [5] * 20, [6, 7] * 24]  # ragged; the last fills the window of 48


@pytest.fixture(autouse=True)
def auto_is_cpu(monkeypatch):
    """Not here. Without a GPU, CUDA graphs are recorded as in test_graphs.py."""
    if not ON_GPU:
        monkeypatch.setattr(graphs, "cuda_graph", cuda_graph)


def make(dtype: torch.dtype, **config) -> GPT:
    return make_model(dtype, sequence_len=48, **config).to(DEVICE).eval()


def greedy(model: GPT, decode=None, n: int = 70) -> list:
    return list(model.generate_batch(PROMPTS, n, temperature=0, decode=decode))


# ---- the model


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_tokens_and_logits_are_those_of_the_cpu(kind, dtype):
    """One row, and rows of different lengths, past a full window too."""
    model, there = make_model(dtype, sequence_len=48, **kind).eval(), make(dtype, **kind)
    idx = torch.randint(61, (3, 40))
    torch.testing.assert_close(there(idx.to(DEVICE)).cpu(), model(idx), atol=1e-4, rtol=1e-4)
    assert greedy(there) == greedy(model)
    for settings in (
        dict(temperature=0, repetition_penalty=1.3),
        dict(temperature=0, suppress_tokens=[3, 5]),
    ):
        out = list(there.generate([1, 2, 3], 60, **settings))
        assert out == list(model.generate([1, 2, 3], 60, **settings))


def test_the_seed_decides():
    model = make(torch.float32)
    draw = lambda seed: list(model.generate_batch(PROMPTS, 30, 2, top_k=40, min_p=0.01, seed=seed))  # noqa: E731
    assert draw(7) == draw(7) != draw(8)


def test_a_conversation_in_a_cache_that_ends_and_goes_on():
    """Indices from the CPU meet a cache on the GPU: stop tokens, expand, truncate, a second turn."""
    model, there = make_model(sequence_len=48).eval(), make(torch.float64)
    stop = [row[0] for row in greedy(model, n=9)][4:5]
    said = []
    for each in (model, there):
        cache = KVCache(each.config, 2, 48, each.device, each.dtype)
        settings = dict(temperature=0, stop_tokens=stop, kv_cache=cache)
        said.append([list(each.generate_batch([[1, 2, 3], [4]], 9, **settings)) for _ in range(2)])
        cache.truncate([7, 3])
        said[-1] += [cache.tokens(), list(each.generate_batch([[5], [6, 7]], 9, **settings))]
        said[-1] += [cache.expand(2).tokens(), list(each.generate_batch([[1], [2, 3]], 9, 2, temperature=0))]
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_under_a_mask_never_need_the_kernel_that_writes_out_all_scores(dtype):
    model = make(dtype)
    cache = KVCache(model.config, 2, 48, DEVICE, dtype)
    idx = torch.randint(61, (2, 9), device=DEVICE)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with torch.inference_mode():
        model.hidden(idx, cache)
        with sdpa_kernel(fused):  # RuntimeError if it is none of them
            model.hidden(idx, cache)
            model.step(idx[:, 0], cache)
            cache.truncate([12, 7])
            model.hidden(idx, cache)
            model.step(idx[:, 0], cache)
    assert cache.lengths.tolist() == [22, 17]


# ---- decoders


@KINDS
@pytest.mark.slow
@pytest.mark.parametrize(
    "decoder", [Compiled, lambda model: CudaGraphs(model, 8)], ids=["compiled", "graphs"]
)
def test_a_decoder_gives_the_tokens_of_the_plain_one(kind, decoder):
    """Ragged rows, past a full window, twice with the same decoder, in the caller's cache; single rows."""
    model = make(torch.float32, **kind)
    decode, plain = decoder(model), greedy(model)
    cache = KVCache(model.config, len(PROMPTS), 48, DEVICE)
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)  # as memory may be
    assert list(model.generate_batch(PROMPTS, 70, temperature=0, decode=decode, kv_cache=cache)) == plain
    assert greedy(model, decode) == plain
    for prompt in PROMPTS:
        alone = list(model.generate(prompt, 70, temperature=0))
        assert list(model.generate(prompt, 70, temperature=0, decode=decode)) == alone
        assert list(model.generate(prompt, 70, temperature=0, decode=Lookup(model, 5, decode))) == alone


@pytest.mark.parametrize("lookup, rows", [(0, 1), (3, 1), (0, 4)])
def test_prepare_compiles_for_the_device_where_it_is_asked_to(lookup, rows):
    """On a GPU that is torch.compile and CUDA graphs, whatever the size of the model."""
    for compile in (False, True):
        model = make(torch.float32)
        decode = fast.prepare(model, compile=compile, lookup=lookup, rows=rows)
        decode = decode.decode if lookup else decode
        if compile:
            assert type(decode) is (CudaGraphs if ON_GPU else Native)
        else:
            assert decode == model.step
        if ON_GPU:
            assert type(model.h[0].mlp.c_fc) is torch.nn.Linear  # packed weights are for CPUs


@KINDS
@pytest.mark.slow
@pytest.mark.parametrize("decoder", [Compiled, CudaGraphs], ids=["compiled", "graphs"])
def test_a_decoder_in_bfloat16_is_as_near_to_the_exact_logits_as_the_plain_one(kind, decoder):
    exact, model, logits = make_model(sequence_len=48, **kind).eval(), make(torch.bfloat16, **kind), []
    for of, decode in ((exact, exact.step), (model, model.step), (model, decoder(model))):
        cache = KVCache(of.config, len(PROMPTS), 48, of.device, of.dtype)
        with torch.inference_mode():
            of.prefill([prompt[:20] for prompt in PROMPTS], cache)
            steps = [
                decode(torch.full((len(PROMPTS),), t, device=of.device), cache).clone() for t in range(20)
            ]
        logits.append(torch.stack(steps).double().cpu())
    plain, fused = ((logits[0] - each).norm() / logits[0].norm() for each in logits[1:])
    assert fused <= 1.2 * plain < 0.2


# ---- training


def test_the_loss_in_chunks_and_its_gradients_are_those_of_the_cpu(monkeypatch):
    monkeypatch.setattr("sologpt.loss.LOGITS_PER_CHUNK", 61)
    idx, targets = torch.randint(61, (2, 3, 40))
    targets[0, :5] = -1
    results = []
    for model in (make_model(sequence_len=48), make(torch.float64).train()):
        model.loss = chunked_cross_entropy
        loss = model(idx.to(model.device), targets.to(model.device))
        results.append([loss.cpu(), *(g.cpu() for g in torch.autograd.grad(loss, list(model.parameters())))])
    torch.testing.assert_close(results[0], results[1])


def test_the_loss_under_autocast_is_as_near_to_the_exact_one_as_that_of_all_logits():
    model, idx = make(torch.float32), torch.randint(61, (2, 3, 40), device=DEVICE)
    model.loss = chunked_cross_entropy
    exact = F.cross_entropy(make(torch.float64)(idx[0]).flatten(0, 1), idx[1].flatten())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        whole, loss = F.cross_entropy(model(idx[0]).flatten(0, 1), idx[1].flatten()), model(idx[0], idx[1])
        loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - exact) <= 1.5 * abs(whole - exact) + 2e-3
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_auto_is_what_the_gpu_computes_in():
    expected = torch.bfloat16 if ON_GPU and torch.cuda.get_device_capability()[0] >= 8 else torch.float32
    assert autocast_dtype("auto", DEVICE) == expected
    before = torch.get_float32_matmul_precision()
    try:
        with make_autocast("auto", DEVICE):
            x = torch.ones(8, 8, device=DEVICE)
            assert (x @ x).dtype == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizers_step_as_on_the_cpu(optimizer):
    """Fused AdamW, and Muon in float64."""
    idx, weights = torch.randint(61, (2, 3, 40)), []
    for model in (make_model(sequence_len=48, **QWEN), make(torch.float64, **QWEN).train()):
        optimizers = configure_optimizers(
            model, 0.002, 0.01, 0.01, 0.1, optimizer=optimizer, dtype=torch.float64
        )
        for _ in range(3):
            model(*idx.to(model.device)).backward()
            parallel.clip_gradient(model, 1.0)
            for each in optimizers:
                each.step()
                each.zero_grad()
        weights.append([p.detach().cpu() for p in model.parameters()])
    torch.testing.assert_close(*weights)


def test_muon_computes_in_bfloat16_on_a_gpu_that_has_it():
    steps = []
    for dtype in (None, torch.bfloat16 if multiplies_bfloat16(DEVICE) else torch.float32):
        p = torch.nn.Parameter(torch.zeros(40, 30, device=DEVICE))
        p.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        Muon([p], dtype=dtype).step()
        steps.append(p.detach())
    assert torch.equal(*steps) and steps[0].norm() > 0


def test_batches_arrive_whole():
    """They are copied from pinned memory while the CPU goes on."""
    tokens = np.arange(10**6, dtype=np.uint32)
    starts = np.random.default_rng(0).integers(0, 10**6 - 1025, (50, 8))
    batches = [data.get_batch(tokens, each, 1024, DEVICE) for each in starts]
    for each, (x, y) in zip(starts, batches, strict=True):
        assert x.device == y.device == torch.zeros(0, device=DEVICE).device
        assert torch.equal(x.cpu(), torch.from_numpy(each)[:, None] + torch.arange(1024))
        assert torch.equal(y, x + 1)


# ---- checkpoints and scripts


def python(*args: str | Path, n: int = 1) -> str:
    """Run a script on the device, in n processes; returns its standard output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    env = os.environ | {"CUDA_VISIBLE_DEVICES": GPUS, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "val_loss") if key in line]


@pytest.fixture(scope="module")
def flags(dataset) -> list[str]:
    steps = ["--max_iters=20", "--eval_interval=10", "--log_interval=1", "--gradient_accumulation_steps=2"]
    return [
        *SMALL,
        *steps,
        f"--dataset={dataset}",
        f"--device={DEVICE.type}",
        "--n_kv_head=1",
        "--grad_clip=1",
    ]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Path:
    """A run on the device, in one process and float32."""
    out = tmp_path_factory.mktemp("alone")
    assert DEVICE.type in python("train.py", *flags, "--dtype=float32", f"--out_dir={out}")
    return out


def test_training_is_that_of_the_cpu(alone, flags, tmp_path):
    python("train.py", *flags, "--device=cpu", "--dtype=float32", f"--out_dir={tmp_path}")
    assert losses(alone) == pytest.approx(losses(tmp_path), abs=0.03)  # TF32, and Muon in bfloat16
    assert losses(alone)[-1] < losses(alone)[0] - 1


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--optimizer=adamw", "--learning_rate=0.01", "--dropout=0.1"],
        ["--activation_checkpointing", "--tie_embd"],
        pytest.param(["--compile"], marks=pytest.mark.slow),
        pytest.param(["--compile", "--optimizer=adamw", "--learning_rate=0.01"], marks=pytest.mark.slow),
    ],
)
def test_training_in_its_own_precision_learns(flags, tmp_path, extra):
    python("train.py", *flags, *extra, f"--out_dir={tmp_path}")
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.5


@pytest.mark.parametrize(
    "first, then", [(DEVICE.type, "cpu"), ("cpu", DEVICE.type), (DEVICE.type, DEVICE.type)]
)
def test_a_run_goes_on_on_another_device(alone, flags, tmp_path, first, then):
    """The state of the optimizers included: the losses are those of the run that was not interrupted."""
    steps = ["--dtype=float32", f"--out_dir={tmp_path}", "--warmdown=0", "--sample_tokens=0"]
    python("train.py", *flags, *steps, "--max_iters=10", f"--device={first}")
    python("train.py", *flags, *steps, f"--device={then}", "--init_from=resume")
    python("train.py", *flags, *steps, f"--out_dir={tmp_path / 'whole'}")
    assert losses(tmp_path)[-9:] == pytest.approx(losses(tmp_path / "whole")[-9:], abs=0.03)


def test_a_checkpoint_of_one_device_is_loaded_on_the_other(tmp_path):
    for model, device in ((make(torch.float32), "cpu"), (make_model(torch.float32, sequence_len=48), DEVICE)):
        model.save(tmp_path / "m.pt", more=torch.arange(3, device=model.device))
        loaded, extra = GPT.load_checkpoint(tmp_path / "m.pt", device)
        assert loaded.device.type == torch.device(device).type and extra["more"].tolist() == [0, 1, 2]
        assert all(
            torch.equal(a.cpu(), b.cpu())
            for a, b in zip(model.parameters(), loaded.parameters(), strict=True)
        )
        assert greedy(loaded) == greedy(model)


@pytest.mark.parametrize(
    "compile", [[], pytest.param(["--compile"], marks=pytest.mark.slow)], ids=["plain", "compiled"]
)
def test_sample_prints_what_generate_gives(alone, compile):
    model, extra = GPT.load_checkpoint(alone / "ckpt.pt", DEVICE)
    tokenizer = Tokenizer.from_dict(extra["tokenizer"])
    ids = list(model.generate(tokenizer.encode("def "), 60, temperature=0, stop_tokens=[tokenizer.eot]))
    text = tokenizer.decode(i for i in ids if i != tokenizer.eot)
    command = [
        "sample.py",
        f"--ckpt={alone / 'ckpt.pt'}",
        f"--device={DEVICE.type}",
        "--max_tokens=60",
        "--prompt=def ",
    ]
    for extra in ([], ["--lookup=5"]):
        assert python(*command, "--temperature=0", *extra, *compile) == f"def {text}\n"
    several = python(*command, "--num_samples=3", "--temperature=0", *compile)
    assert several == "---\n".join([f"def {text}\n"] * 3)


# ---- several GPUs


@TWO
@pytest.mark.parametrize("extra", [[], ["--shard"], ["--shard", "--activation_checkpointing"]])
def test_two_processes_share_one_run(alone, flags, tmp_path, extra):
    python("train.py", *flags, *extra, "--dtype=float32", f"--out_dir={tmp_path}", n=2)
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=0.01)
    python("sample.py", f"--ckpt={tmp_path / 'ckpt.pt'}", "--max_tokens=5", "--device=cpu")


@TWO
@pytest.mark.parametrize("extra", [[], ["--shard"]])
def test_two_processes_learn_in_their_own_precision_and_resume(flags, tmp_path, extra):
    python("train.py", *flags, *extra, "--dtype=bfloat16", f"--out_dir={tmp_path}", "--max_iters=10", n=2)
    python("train.py", *flags, *extra, "--dtype=bfloat16", f"--out_dir={tmp_path}", "--init_from=resume", n=2)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.5


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_more_processes_than_gpus_is_one_line(flags, tmp_path):
    n = torch.cuda.device_count() + 1
    accumulate = f"--gradient_accumulation_steps={n}"
    with pytest.raises(AssertionError) as e:
        python("train.py", *flags, accumulate, f"--out_dir={tmp_path}", n=n)
    assert f"error: {n} processes cannot share {n - 1} GPUs" in str(e.value)

"""Quantized weights multiply like the dequantized ones, and those are near the original ones."""

import copy
import json
import re
import threading
import warnings
import weakref

import pytest
import torch
from conftest import GEMMA, GPT2, LLAMA, QWEN, WINDOWS, make_model, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gpt import GPT, KVCache
from sologpt import fast, gguf, hf, native
from sologpt import quantize as weights
from sologpt.errors import RunError, UserError
from sologpt.load import load_model
from sologpt.quantize import Int4Linear, Int8Linear, QuantizedLinear
from sologpt.tokenizer import Tokenizer

EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = pytest.mark.parametrize("dtype", EPS)
WIDE = dict(n_embd=64, head_dim=16, sequence_len=64)  # int4 takes all of these widths
ARCHITECTURES = {
    "nanochat": WIDE,
    "llama": LLAMA | WIDE | dict(n_hidden=96),
    "qwen": QWEN | WIDE | dict(n_hidden=96),
    "gpt2": GPT2 | WIDE,
    "windows": WINDOWS | WIDE,
    "gemma": GEMMA | WIDE | dict(n_hidden=96),
}
KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])
EACH = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)


def make_linear(weight: torch.Tensor, group_size: int, bias: torch.Tensor | None = None) -> QuantizedLinear:
    """int8 without a group size."""
    return Int4Linear(weight, bias, group_size) if group_size else Int8Linear(weight, bias)


def steps(linear: QuantizedLinear) -> torch.Tensor:
    """How far apart two neighbouring levels are, for each weight: (N, K)."""
    if isinstance(linear, Int8Linear):
        return linear.scale.double()[:, None].expand(-1, linear.in_features)
    scale = linear.scale[:, :, 0].transpose(1, 2).flatten(0, 1).double()  # (N, K/g)
    return scale.repeat_interleave(linear.in_features // scale.size(1), dim=1)


def make_pair(kind: str, dtype: torch.dtype = torch.float32, **config) -> tuple[GPT, GPT]:
    """A model with the dequantized weights, and the quantized one."""
    plain, quantized = (make_model(dtype, **config).eval() for _ in range(2))
    fast.quantize(quantized, kind)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            name = "wte" if name == "lm_head" and plain.lm_head is None else name  # tied
            plain.get_submodule(name).weight = nn.Parameter(module.weight)
    return plain, quantized


def height(N: int, group_size: int) -> int:
    """N for int8, for int4 the next number that 8 divides: its rows come in eights."""
    return -(-N // 8) * 8 if group_size else N


shapes = dict(N=st.integers(1, 150), blocks=st.integers(1, 9), seed=st.integers(0, 99))


@DTYPES
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
@settings(max_examples=15, deadline=None)
@given(**shapes, spread=st.sampled_from([1e-4, 1.0, 100.0]), shift=st.sampled_from([0.0, 0.5]))
def test_every_weight_is_within_half_a_step(dtype, group_size, N, blocks, seed, spread, shift):
    torch.manual_seed(seed)
    N = height(N, group_size)
    weight = ((torch.randn(N, blocks * (group_size or 16)) + shift) * spread).to(dtype)
    weight[0] = weight[0, 0].clone()  # a row of equal weights, too
    before = weight.clone()
    linear = make_linear(weight, group_size)
    assert torch.equal(weight, before)
    rounding = EPS[dtype] * weight.abs().amax().double() * 2  # of the dequantized weight, scale and zero
    assert ((linear.weight.double() - weight.double()).abs() <= 0.5 * steps(linear) + rounding).all()
    levels = 255 if isinstance(linear, Int8Linear) else 16
    assert max(len(row.unique()) for row in linear.weight[:, : group_size or None]) <= levels


@DTYPES
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("N", [8, 64, 136])
def test_int4_packs_and_widens_all_16_values(dtype, group_size, N):
    """Weights on their levels are found again. What 4 bits mean is exact, and each group has its own scale and zero."""
    torch.manual_seed(0)
    K = 64 * 128  # 136 rows are more than one chunk
    q = torch.randint(16, (N, K))
    groups = q.view(N, -1, group_size)
    groups[..., 0], groups[..., -1] = 0, 15  # so the levels are known
    weight = ((groups - 8) * 2.0 ** torch.randint(-6, 3, groups[..., :1].shape)).view(N, K)
    linear = Int4Linear(weight.to(dtype), None, group_size)
    assert linear.q.shape == (N // 8, 4 * K) and linear.q.dtype == torch.uint8
    assert linear.scale.shape == (N // 8, K // group_size, 2, 8) and linear.scale.dtype == dtype
    bytes = linear.q.long().view(N // 8, K // 32, 4, 8, 4)
    for n, k in zip(torch.randint(N, (999,)).tolist(), torch.randint(K, (999,)).tolist(), strict=True):
        byte = bytes[n // 8, k // 32, k % 16 // 4, n % 8, k % 4]
        assert q[n, k] == (byte % 16 if k % 32 < 16 else byte // 16)
    assert len(linear.q.unique()) == 256
    # Here the fit is exact, up to the rounding of its sums. An error of the scale counts 8 times
    assert (linear.weight.double() - weight).abs().max() <= 16 * EPS[dtype] * weight.abs().max()
    # A scale that is a power of two, and a zero of a few of them: float64 and bfloat16 agree
    scale = 2.0 ** torch.randint(-6, 3, (N, K // group_size))
    zero = scale * torch.randint(-4, 5, scale.shape)
    linear.scale = torch.stack((scale, zero)).view(2, N // 8, 8, -1).permute(1, 3, 0, 2).to(dtype)
    exact = (groups.double() - 8) * scale.double()[..., None] + zero.double()[..., None]
    assert linear.weight.dtype == dtype and torch.equal(linear.weight.double(), exact.view(N, K))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_fit_is_better_than_minimum_and_maximum(group_size):
    torch.manual_seed(0)
    weight = torch.randn(256, 1024)
    low, high = weight.unflatten(1, (-1, group_size)).aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    simple = (((weight.unflatten(1, (-1, group_size)) - low) / step).round() * step + low).flatten(1)
    error = (make_linear(weight, group_size).weight - weight).square().mean()
    assert error < 0.96 * (simple - weight).square().mean()


@DTYPES
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
@pytest.mark.parametrize("N, blocks", [(1, 1), (61, 3), (64, 2), (130, 5), (2100, 8)])
def test_the_product_is_that_of_the_dequantized_weights(dtype, group_size, N, blocks):
    """Of one row and of many: int8 by the kernel and by widening. Some weights are widened in several chunks."""
    torch.manual_seed(0)
    N = height(N, group_size)
    weight, bias = torch.randn(N, blocks * (group_size or 16)).to(dtype), torch.randn(N).to(dtype)
    linear = make_linear(weight, group_size, bias)
    dequantized = linear.weight.double()
    if isinstance(linear, Int8Linear):
        dequantized = linear.q.double() * steps(linear)  # not rounded to dtype
    for shape in ((1,), (1, 1), (2,), (3, 5), (16,), (17,), (64,), (65,), (600,)):
        x = torch.randn(*shape, weight.size(1)).to(dtype)
        exact = x.double() @ dequantized.T + bias.double()
        y = linear(x)
        assert y.dtype == dtype and y.shape == exact.shape
        assert (y.double() - exact).norm() <= 3 * EPS[dtype] * exact.norm()


# The most that rounding changes a number, as a part of it
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 3, 12, 40])
def test_widened_linears(dtype, M, monkeypatch):
    """As near to float64 as float32 is, also for the sums that float16 cannot hold, with and without decode.cpp."""
    monkeypatch.setattr(weights, "product_dtype", lambda dtype: torch.float32)  # as on a CPU without bfloat16
    model = make_model(dtype, n_embd=72, bias=True).eval()
    for is_native in (False, native.load()):
        weights.widen_products(model, is_native)
        for name, linear in model.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            assert isinstance(linear, weights.WidenedLinear), name
            x = (200 * torch.randn(1, M, linear.in_features)).to(dtype)
            exact = nn.functional.linear(x.double(), linear.weight.double())
            with torch.no_grad():
                y = linear(x)
            bias = 0 if linear.bias is None else linear.bias.double()
            assert y.dtype == dtype and y.isfinite().all()
            assert (y.double() - exact - bias).abs().max() <= 3 * UNIT[dtype] * (
                exact.abs() + abs(bias)
            ).max()
    assert set(model.state_dict()) == set(make_model(dtype, n_embd=72, bias=True).state_dict())
    model.train()(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("is_native", [False, True])
def test_a_transposed_x(is_native, monkeypatch):
    """As attention hands it on when each head is one number."""
    if is_native and not native.load():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(weights, "product_dtype", lambda dtype: torch.float32)
    x, plain = torch.randn(64, 3).T, nn.Linear(64, 16, bias=False, dtype=torch.bfloat16)
    for linear in (
        weights.WidenedLinear(plain),
        make_linear(plain.weight.data, 0),
        make_linear(plain.weight.data, 32),
    ):
        linear.is_native = is_native
        for rows in (x, x.bfloat16()):
            with torch.no_grad():
                assert torch.equal(linear(rows), linear(rows.contiguous()))


@DTYPES
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
@settings(max_examples=25, deadline=None)
@given(**shapes, M=st.integers(1, 100))
def test_each_number_of_a_product(dtype, group_size, N, blocks, seed, M):
    """For any number of rows. K terms are added in float32, in any order, which rounds each by K units at most. The sum
    is rounded to dtype, and for int8 times its scale, which rounds it again."""
    torch.manual_seed(seed)
    N, K = height(N, group_size), blocks * (group_size or 16)
    linear = make_linear(torch.randn(N, K).to(dtype), group_size)
    if group_size == 0:
        exact = linear.q.double() * steps(linear)
    else:  # rounded to the dtype in which this CPU multiplies
        exact = weights.widen_int4(linear.q, linear.scale.to(weights.product_dtype(dtype))).double()
    x = torch.randn(M, K).to(dtype)
    y = weights.quantized_linear(x, linear.q, linear.scale)
    assert y.shape == (M, N) and y.dtype == dtype
    expected, terms = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    bound = 2.01 * UNIT[dtype] * expected.abs() + (K + 2) * UNIT[torch.float32] * terms
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("chunk", [50, 64 * 96])
def test_a_weight_in_many_chunks(chunk, monkeypatch):
    """Each gives the rows that it gives in one. A row is never divided."""
    torch.manual_seed(0)
    weight, x = torch.randn(304, 96), torch.randn(100, 96)
    for group_size in (0, 32):
        whole = make_linear(weight, group_size)
        y = whole(x)
        with monkeypatch.context() as patch:
            patch.setattr("sologpt.quantize.CHUNK", chunk)
            parts = make_linear(weight, group_size)
            assert torch.equal(parts.weight, whole.weight)
            assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), parts.buffers(), strict=True))
            torch.testing.assert_close(parts(x), y)


@EACH
@KINDS
def test_a_quantized_model_is_the_one_with_dequantized_weights(kind, config):
    """Greedy tokens of prompts of different lengths, past a full window too, where no two logits nearly tie."""
    plain, quantized = make_pair(kind, **config)
    prompts = [[1, 2, 3], [4], [5] * 40]
    torch.testing.assert_close(
        quantized(torch.tensor([[5] * 40])), plain(torch.tensor([[5] * 40])), atol=2e-3, rtol=0
    )
    a, b = (list(model.generate_batch(prompts, 70, temperature=0)) for model in (plain, quantized))
    assert a == b


@EACH
@KINDS
@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    cut=st.integers(1, 19),
    seed=st.integers(0, 9),
)
def test_cached_is_uncached_and_ragged_is_alone(kind, config, lengths, cut, seed):
    model = make_model(torch.float32, **config | {"n_layer": 2}).eval()
    fast.quantize(model, kind)
    torch.manual_seed(seed)
    idx = torch.randint(61, (2, 20))
    cache = KVCache(model.config, 2, 20)
    with torch.no_grad():
        parts = torch.cat([model(part, kv_cache=cache) for part in (idx[:, :cut], idx[:, cut:])], dim=1)
        torch.testing.assert_close(parts, model(idx), atol=2e-3, rtol=0)
    prompts = [torch.randint(61, (n,)).tolist() for n in lengths]
    rows = zip(*model.generate_batch(prompts, 12, temperature=0), strict=True)
    for prompt, row in zip(prompts, rows, strict=True):
        for decode in (None, fast.prepare(model, lookup=4)):
            assert list(model.generate(prompt, 12, temperature=0, decode=decode)) == list(row)


@KINDS
@pytest.mark.parametrize("tied", [False, True])
def test_memory(kind, tied):
    """An int8 head, which holds a tied embedding, too; all other matrices int8 or int4."""
    model = make_model(torch.bfloat16, vocab_size=256, n_embd=256, n_hidden=1024, tie_embd=tied)
    weights = sum(m.weight.numel() for m in model.h.modules() if isinstance(m, nn.Linear))
    expected = {"int8": 1, "int4": 0.5 + 4 / 32}[kind] * weights + 256 * 256 * (1 if tied else 1 + 2)
    fast.quantize(model, kind)
    nbytes = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert expected <= nbytes <= 1.02 * expected


@EACH
@KINDS
def test_quantize_takes_each_tensor_before_the_next(kind, config):
    """At no time are two matrices there as they were read; the result is that of quantizing a whole model."""
    model = make_model(torch.float32, **config).eval()
    fast.quantize(model, kind)
    alive: list[weakref.ref] = []

    def tensors():
        source = make_model(torch.float32, **config)
        for name in [name for name, _ in source.named_parameters()]:
            owner = source.get_submodule(name.rpartition(".")[0])
            x = getattr(owner, name.rpartition(".")[2]).detach().clone()
            if isinstance(owner, nn.Linear) and x.ndim == 2:
                assert not any(ref() is not None for ref in alive)
                alive.append(weakref.ref(x))
            yield name, x
            del x

    with torch.device("meta"):
        streamed = GPT(model.config)
    fast.quantize(streamed, kind, weights=tensors())
    assert same_tensors(model, streamed)


@KINDS
@pytest.mark.parametrize(
    "config", [WIDE, LLAMA | WIDE, QWEN | WIDE | dict(qk_norm=False)], ids=["", "llama", "qwen2"]
)
def test_open_models_are_quantized_as_they_are_read(kind, config, tmp_path):
    """To the same numbers as after loading; from a checkpoint, a Hugging Face folder and a GGUF file."""
    tokenizer = Tokenizer.from_spec("bytes")
    model = make_model(torch.float32, **config | dict(n_hidden=96, vocab_size=tokenizer.vocab_size)).eval()
    model.save(tmp_path / "best.pt", tokenizer=tokenizer.to_dict())
    hf.save(model, tokenizer, tmp_path / "hf")
    sources = [tmp_path / "best.pt", f"hf:{tmp_path / 'hf'}"]
    if config is not WIDE:
        gguf.save(model, tokenizer, tmp_path / "model.gguf")
        sources.append(f"gguf:{tmp_path / 'model.gguf'}")
    fast.quantize(model, kind)
    for source in sources:
        assert same_tensors(model, load_model(source, quantize=kind)[0])


def same_tensors(a: GPT, b: GPT) -> bool:
    mine, theirs = (dict((*model.named_parameters(), *model.named_buffers())) for model in (a, b))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_no_group_divides_is_said():
    with pytest.warns(UserWarning, match=r"^matrices of these shapes cannot be int4: 64 x 48 \(int8\)$"):
        fast.quantize(model := make_model(torch.float32, n_embd=64, n_hidden=48), "int4")
    assert isinstance(model.h[0].mlp.c_proj, Int8Linear) and isinstance(model.h[0].mlp.c_fc, Int4Linear)
    for kind in ("int8", "int4"):
        model = make_model(torch.bfloat16, n_embd=36, head_dim=8, tie_embd=True).eval()
        as_it_was = "16 x 36 (as it was), 32 x 36 (as it was), "
        others = as_it_was + ("36 x 32 (int8), 36 x 144 (int8), " if kind == "int4" else "")
        others += "61 x 36 (as it was), 144 x 36 (as it was)"
        with pytest.warns(UserWarning, match=re.escape(f"cannot be {kind}: {others}")):
            fast.quantize(model, kind)
        assert type(model.h[0].mlp.c_fc) is nn.Linear and model.lm_head is None
        assert len(list(model.generate([1, 2], 5))) == 5
    model = make_model(torch.float32, n_embd=96)  # 128 does not divide 96, but 32 does
    with warnings.catch_warnings(action="error"):
        fast.quantize(model, "int4", group_size=128)
    assert model.h[0].mlp.c_fc.scale.shape == (48, 3, 2, 8)
    assert model.h[0].mlp.c_proj.scale.shape == (12, 3, 2, 8)
    assert isinstance(model.lm_head, Int8Linear)


@KINDS
def test_a_quantized_model_is_for_inference_only(kind, tmp_path):
    _, model = make_pair(kind, **WIDE)
    idx = torch.tensor([[1, 2, 3]])
    logits, weights = model(idx), dict(model.named_buffers())
    for refused, words in (
        (lambda: model.save(tmp_path / "ckpt.pt"), "cannot be saved"),
        (lambda: hf.save(model, Tokenizer.from_spec("bytes"), tmp_path / "hf"), "cannot be saved"),
        (lambda: model.to(torch.bfloat16), "cannot be moved or cast"),
        (lambda: copy.deepcopy(model), "cannot be copied or pickled"),
        (lambda: model.train()(idx, idx), "cannot be trained"),
        (lambda: fast.quantize(model, kind), "packed or quantized already"),
    ):
        with pytest.raises(RuntimeError, match=words) as e:
            refused()
        assert "\n" not in str(e.value)
    assert not [*tmp_path.iterdir()]
    fast.pack(model)  # has nothing to do
    assert torch.equal(model.eval()(idx), logits) and dict(model.named_buffers()).keys() == weights.keys()
    assert not any(p.requires_grad for p in model.parameters())


def test_bad_input():
    for model, args, words in (
        (make_model(torch.float32), ("int3",), "int8 or int4, not 'int3'"),
        (make_model(torch.float32), ("int4", 48), "group_size must be 32, 64 or 128, not 48"),
        (make_model(torch.float64), ("int8",), "not torch.float64 on cpu"),
        (make_model(torch.float32).to("meta"), ("int8",), "not torch.float32 on meta"),
    ):
        before = [*model.modules()]
        with pytest.raises(ValueError if len(args) == 2 else UserError, match=words):
            fast.quantize(model, *args)
        assert [*model.modules()] == before
    for bad in (float("nan"), float("inf")):
        for kind in ("int8", "int4"):
            model = make_model(torch.float32)
            model.h[1].mlp.c_fc.weight.data[3, 5] = bad
            with pytest.raises(RunError, match="not finite"):
                fast.quantize(model, kind)
    packed = make_model(torch.float32)
    fast.pack(packed)
    with pytest.raises(RuntimeError, match="already"):
        fast.quantize(packed, "int8")


@KINDS
def test_threads_do_not_share_what_they_widen_into(kind):
    _, model = make_pair(kind, n_embd=256, n_hidden=1024, sequence_len=256)
    prompts = [torch.randint(61, (1, 200)) for _ in range(4)]
    alone = [model(idx) for idx in prompts]
    results: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        results[i] = [model(prompts[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, logits in results.items():
        assert len(logits) == 20
        for each in logits:
            torch.testing.assert_close(each, alone[i])


@KINDS
def test_the_script(kind, tmp_path):
    """Its text is that of the library, in one sample, several and a lookup."""
    tokenizer = Tokenizer.from_spec("bytes")
    model = make_model(torch.float32, vocab_size=tokenizer.vocab_size, n_hidden=40, **WIDE).eval()
    model.save(tmp_path / "best.pt", tokenizer=tokenizer.to_dict())
    with pytest.warns(UserWarning, match=rf"cannot be {kind}: 64 x 40 \(as it was\)") as notes:
        fast.quantize(model, kind)
    tokens = list(model.generate(tokenizer.encode("abc"), 30, temperature=0, stop_tokens=[tokenizer.eot]))
    for flags in ([], ["--num_samples=2"], ["--lookup=3"]):
        args = f"--ckpt={tmp_path}/best.pt", f"--quantize={kind}", "--json", "--prompt=abc", "--max_tokens=30"
        done = run("sample.py", *args, "--temperature=0", "--device=cpu", *flags)
        assert done.stderr.splitlines()[0] == str(notes[0].message)
        for line in done.stdout.splitlines():
            assert json.loads(line)["text"] == tokenizer.decode([t for t in tokens if t != tokenizer.eot])

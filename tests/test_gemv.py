"""gemv.cpp: one row times weights, as compiled decode multiplies it."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from sologpt import quantize as weights
from sologpt.quantize import Int4Linear, Int8Linear

EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# kind of weight, and what a width is a multiple of
KINDS = {"plain": 1, "int8": 16, "int4, 32": 32, "int4, 64": 64, "int4, 128": 128}


def make_weights(kind: str, rows: list[int], K: int, dtype: torch.dtype) -> tuple[list, list, torch.Tensor]:
    """Weights and scales of gemv, and the exact matrix of all of them, with rows of zeros where int4 is padded."""
    plain = [torch.randn(n, K).to(dtype) for n in rows]
    if kind == "plain":
        return plain, [], torch.cat(plain).double()
    if kind == "int8":
        linears = [Int8Linear(w, None) for w in plain]
        exact = [each.q.double() * each.scale.double()[:, None] for each in linears]
    else:
        linears = [Int4Linear(w, None, KINDS[kind]) for w in plain]
        exact = [weights.widen_int4(each.q, each.scale.float()).T.double() for each in linears]
    return [each.q for each in linears], [each.scale for each in linears], torch.cat(exact)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_it_is_the_product_with_each_weight(dtype, kind, rows, width, seed):
    """Of widths that fill no vector, and more or less rows than a thread takes; to the rounding of dtype."""
    weights.compile_gemv()
    torch.manual_seed(seed)
    K = width * KINDS[kind]
    w, scales, exact = make_weights(kind, rows, K, dtype)
    x = torch.randn(1, 1, K).to(dtype)
    y = weights.opaque_gemv(x, w, scales)
    assert y.shape == (1, len(exact)) and y.dtype == dtype
    scale = exact.abs() @ x.flatten().double().abs()  # of the terms of each sum
    error = (y.flatten().double() - exact @ x.flatten().double()).abs()
    assert (error <= 4 * EPS[dtype] * scale + 1e-30).all()
    torch.testing.assert_close(
        weights.gemv(x, w, scales), y, atol=4 * EPS[dtype] * scale.max().item(), rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_change_nothing(threads):
    weights.compile_gemv()
    torch.manual_seed(0)
    for kind in KINDS:
        w, scales, _ = make_weights(kind, [200, 1, 65], 256, torch.float32)
        x, before = torch.randn(1, 256), torch.get_num_threads()
        expected = weights.opaque_gemv(x, w, scales)
        try:
            torch.set_num_threads(threads)
            assert torch.equal(weights.opaque_gemv(x, w, scales), expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.slow
def test_what_it_cannot_multiply_is_refused():
    weights.compile_gemv()
    x, w = torch.zeros(4), torch.zeros(4, 4)
    for args, message in (
        ((x.double(), [w.double()], []), "gemv takes float32, bfloat16 or float16"),
        ((torch.zeros(8)[::2], [w], []), "x is not contiguous"),
        ((x, [w, torch.zeros(4, 2).T], []), "a weight is not contiguous"),
        ((torch.zeros(5), [w], []), "not of x's width"),
        ((x, [w.bfloat16()], []), "not of x's dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            weights.opaque_gemv(*args)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["default", "avx2"])
@pytest.mark.parametrize("bits", ["256", "512"])
def test_other_processors(layout, bits):
    """PyTorch's other layouts of int4, and vectors of another length, as far as this processor has them."""
    config = f"import sys, pytest, torch._inductor.config as config; config.cpp.simdlen = {bits}"
    flags = "-q -m slow -p no:cacheprovider -o addopts= -k product"
    args = [*flags.split(), "tests/test_gemv.py"]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": layout}
    command = [sys.executable, "-c", f"{config}; sys.exit(pytest.main({args}))"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]

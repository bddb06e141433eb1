"""Open models: `transformers` is the oracle. Their tokenizers are in test_hf_tokenizer.py."""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, error, make_model, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf
from gpt import GPT, GPTConfig, KVCache
from tokenizer import Tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
SHAPE = dict(
    hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=400
)
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
    "mistral": dict(vocab_size=101, num_key_value_heads=4, sliding_window=None),
    "mistral-gqa": dict(vocab_size=97, num_key_value_heads=2, sliding_window=None, head_dim=12, hidden_size=40),
    "mistral-odd": dict(
        vocab_size=63, num_attention_heads=3, num_key_value_heads=1, head_dim=6, sliding_window=None, hidden_size=31
    ),
    "qwen2": dict(vocab_size=101, num_key_value_heads=4),
    "qwen2-tied-gqa": dict(vocab_size=97, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "qwen2-heads": dict(
        vocab_size=63, num_key_value_heads=1, head_dim=14, rope_parameters=dict(rope_type="default", rope_theta=1e6)
    ),
    "qwen3": dict(vocab_size=101, num_key_value_heads=4, head_dim=8),
    "qwen3-tied-gqa": dict(vocab_size=97, num_key_value_heads=2, head_dim=20, tie_word_embeddings=True),
    "qwen3-linear": dict(
        vocab_size=63,
        num_key_value_heads=1,
        head_dim=6,
        rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e6),
    ),
    "nanochat": dict(vocab_size=101, num_key_value_heads=4),
    "nanochat-gqa": dict(vocab_size=97, num_key_value_heads=2, final_logit_softcapping=3.0, rms_norm_eps=1e-5),
    "nanochat-tied": dict(
        vocab_size=63, num_key_value_heads=1, tie_word_embeddings=True, final_logit_softcapping=None, head_dim=10
    ),
}


def make_theirs(name: str = "llama", **keys):
    """A small model of theirs whose weights, gains and biases are all random."""
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(
        name.split("-")[0], **SHAPE | MODELS[name] | keys, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return theirs


def write(theirs, folder: Path, **how) -> Path:
    """The folder that they would write, with a tokenizer of bytes."""
    theirs.save_pretrained(folder, **how)
    hf.save_tokenizer(Tokenizer.from_spec("bytes"), folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    theirs = make_theirs(request.param)
    folder = write(theirs, tmp_path_factory.mktemp(request.param))
    return theirs, hf.load(folder)[0], folder


@torch.no_grad()
def test_logits_are_those_of_transformers(both):
    theirs, ours, _ = both
    for T in (1, 2, 65, 300):
        idx = torch.randint(ours.config.vocab_size, (2, T))
        expected = theirs(idx).logits
        assert expected.std() > 0.5
        assert (ours(idx) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(both):
    theirs, ours, _ = both
    torch.manual_seed(0)
    prompt = torch.randint(1, ours.config.vocab_size, (1, 9))  # 0 is padding to them
    expected = theirs.generate(prompt, max_new_tokens=64, do_sample=False)[0, 9:].tolist()
    assert len(set(expected)) > 3
    assert list(ours.generate(prompt[0].tolist(), 64, temperature=0)) == expected


def test_what_comes_in_goes_out_with_the_same_bits(both, tmp_path):
    theirs, ours, folder = both
    _, tokenizer = hf.load(folder)
    hf.save(ours, tokenizer, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type in (theirs.config.model_type, "llama")  # a Mistral without its window is a Llama
    for key in (*hf.KEYS, *hf.FAMILIES[config.model_type].keys, "hidden_act", "rope_parameters"):
        expected = getattr(theirs.config, key, None)
        if key == "head_dim" and expected is None:
            expected = config.hidden_size // config.num_attention_heads
        assert getattr(config, key) == expected, key
    assert hf.load(tmp_path / "out")[0].config == ours.config

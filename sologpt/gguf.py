"""GGUF, the files of llama.cpp, Ollama and LM Studio: a model and its tokenizer in one file.

    gguf.save(model, tokenizer, "mine.gguf")
    model, tokenizer = gguf.load("SmolLM2-135M-Instruct.Q4_1.gguf")  # quantized weights are dequantized

    python -m sologpt.gguf export CHECKPOINT FILE [--dtype=q8_0]

A model or tokenizer that llama.cpp would run differently is refused by a UserError that says why. Files come
from strangers: each size in one is compared with that of the file before memory is allocated. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. docs/gguf.md says what was run with llama.cpp.
"""

import json
import math
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt import GPT, Device, Dtype, GPTConfig, scale_frequencies
from sologpt import errors, hf
from sologpt.errors import UserError
from sologpt.load import check_rope_scaling, empty_model, load_model, read_sampling, widest
from sologpt.quantize import fill
from sologpt.tokenizer import BYTE_TOKEN, SENTENCEPIECE, STRIP, PretrainedTokenizer, Tokenizer


def package() -> Any:
    """Return the `gguf` package: the tensor types and their quantization. ImportError without the extra."""
    try:
        import gguf
    except ImportError as e:
        raise ImportError("GGUF files need the extra 'gguf': pip install gguf") from e
    return gguf


# -----------------------------------------------------------------------------
# Architectures

KEYS = {  # GGUF, after the name of the architecture: config.json
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
HEAD_DIM_KEYS = ("attention.value_length", "rope.dimension_count")
SCALING = "type factor original_context_length finetuned attn_factor yarn_beta_fast yarn_beta_slow"
SCALING_KEYS = {f"rope.scaling.{name}" for name in SCALING.split()}

MODULES = {  # ours: theirs, for the whole model and within a block
    "wte": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "attn_norm": "attn_norm",
    "attn.c_q": "attn_q",
    "attn.c_k": "attn_k",
    "attn.c_v": "attn_v",
    "attn.c_proj": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.c_gate": "ffn_gate",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}
GPT2_MODULES = MODULES | {"wpe": "position_embd"} | dict.fromkeys(hf.PARTS, "attn_qkv")
GEMMA_KEYS = KEYS | {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base_swa": "rope_local_base_freq",
}
GEMMA_MODULES = MODULES | {"attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"}
ROPE_FREQS = "rope_freqs.weight"  # (D/2,): each rotary frequency is divided by one, for Llama 3's scaling


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp that computes a model_type of `hf.FAMILIES`."""

    name: str
    half_split: bool  # its rotary layout is transformers': channel i pairs with i + D/2, not 2i with 2i + 1
    rope_freqs: bool = False  # it reads ROPE_FREQS
    square: bool = False  # its head_dim is always n_embd / n_head
    windows: bool = False  # all layers but every n-th have a window
    model_type: str = ""  # if it is not the name
    keys: dict[str, str] = field(default_factory=lambda: KEYS)
    modules: dict[str, str] = field(default_factory=lambda: MODULES)  # modules of one name are joined


LLAMA = Architecture("llama", half_split=False, rope_freqs=True)
ARCHITECTURES = {  # by model_type
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", half_split=True, square=True),
    "qwen3": Architecture("qwen3", half_split=True),
    "gemma3_text": Architecture(
        "gemma3",
        half_split=True,
        windows=True,
        model_type="gemma3_text",
        keys=GEMMA_KEYS,
        modules=GEMMA_MODULES,
    ),
    "gpt2": Architecture("gpt2", half_split=False, keys=GPT2_KEYS, modules=GPT2_MODULES),
}


def find_architecture(config: GPTConfig) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture that computes the same, and the config.json. UserError if there is none."""
    only_full = set(config.layer_types) == {"F"}
    with suppress(UserError):
        config_json = hf.to_hf_config(config)
        arch = ARCHITECTURES.get(config_json["model_type"])
        if arch and (only_full or arch.windows):
            config_json["sliding_window_pattern"] = f"{config.layer_types}F".index("F") + 1
            return arch, config_json
    flags = [f"--{key}={value}" for key, value in hf.LLAMA.items() if getattr(config, key) != value]
    if not only_full:
        flags.append("--layer_types=F")
    known = f"the switches of config/llama_tiny.py: {' '.join(flags)}"
    raise UserError(f"llama.cpp has no such model; train one that it has with {known}")


def rope_factors(config: GPTConfig) -> Tensor | None:
    """Return ROPE_FREQS of a model with Llama 3's scaling, (D/2,) float32. None for any other model."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    D = config.head_dim
    frequencies = config.rope_base ** (torch.arange(0, D, 2, dtype=torch.float64) / -D)  # (D/2,)
    return (frequencies / scale_frequencies(frequencies, config.rope_base, scaling)).float()


def to_metadata(config: GPTConfig) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture and its metadata. UserError, with our fields, for what GGUF cannot say."""
    arch, config_json = find_architecture(config)
    values = {key: config_json[theirs] for key, theirs in arch.keys.items()}
    if "rope.freq_base" in arch.keys:
        values |= dict.fromkeys(HEAD_DIM_KEYS, config.head_dim)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        values["rope.scaling.type"] = scaling["rope_type"]
        values["rope.scaling.factor"] = float(scaling["factor"])
    if scaling.get("rope_type") == "yarn" and scaling["attention_factor"] != yarn_attention(
        scaling["factor"]
    ):
        factor = scaling["attention_factor"] / yarn_attention(scaling["factor"])
        values["rope.scaling.attn_factor"] = factor
    if "original_max_position_embeddings" in scaling:
        values["rope.scaling.original_context_length"] = int(scaling["original_max_position_embeddings"])
    metadata = {f"{arch.name}.{key}": value for key, value in values.items()}

    factors = rope_factors(config) if arch.rope_freqs else None
    read_back = replace(to_config(arch, metadata, config.tie_embd, factors), dropout=config.dropout)
    lost = [f.name for f in fields(config) if getattr(read_back, f.name) != getattr(config, f.name)]
    if lost:
        listed = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise UserError(f"{arch.name} in llama.cpp has no {listed}")
    return arch, metadata


def yarn_attention(factor: float) -> float:
    """Return the attention factor that llama.cpp gives to YaRN."""
    return 0.1 * math.log(factor) + 1


def to_config(arch: Architecture, metadata: dict[str, Any], tied: bool, factors: Tensor | None) -> GPTConfig:
    """Return the GPTConfig of a file. UserError, with the key, if GPT cannot compute the same.

    tied: the file has no head. factors: its ROPE_FREQS, if it has them.
    """
    prefix = f"{arch.name}."
    given = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key in given.keys() - arch.keys.keys() - {*HEAD_DIM_KEYS} - SCALING_KEYS:
        if np.any(given[key]):  # 0 switches it off, as in expert_count
            raise UserError(f"{prefix}{key} is {given[key]!r}, which is not supported")
    defaults = {
        "attention.head_count_kv": given.get("attention.head_count"),
        "attention.key_length": None,
        "rope.freq_base": 10_000.0,
        "rope.freq_base_swa": 10_000.0,
        "attention.sliding_window_pattern": 6,
    }
    values = defaults | given
    missing = [f"{prefix}{key}" for key in arch.keys if key not in values]
    if missing:
        raise UserError(f"{', '.join(missing)} is missing")
    config_json = {theirs: values[key] for key, theirs in arch.keys.items()}
    config_json |= {"model_type": arch.model_type or arch.name, "tie_word_embeddings": tied}
    if arch.windows and given.get("block_count") == 62:
        raise UserError(f"{prefix}block_count is 62, Gemma 3 27B's: its scale of queries is not supported")
    rope_type = given.get("rope.scaling.type", "linear")
    factor = given.get("rope.scaling.factor", 1.0)
    attention = given.get("rope.scaling.attn_factor", 1.0)
    known = ["none", "linear"] + ["yarn"] * (not arch.windows)  # it would scale windowed layers, too
    if rope_type not in known:
        listed = ", ".join(known)
        raise UserError(f"{prefix}rope.scaling.type is {rope_type!r}, but only {listed} are supported")
    if rope_type == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "attention_factor": attention}
        for name, only in (("beta_fast", 32.0), ("beta_slow", 1.0)):  # llama.cpp reads no others
            scaling[name] = only
            if (value := given.get(f"rope.scaling.yarn_{name}", only)) != only:
                raise UserError(
                    f"{prefix}rope.scaling.yarn_{name} is {value!r}, but only {only} is supported"
                )
        original = given.get("rope.scaling.original_context_length", given.get("context_length"))
        scaling["original_max_position_embeddings"] = original
        check_rope_scaling(scaling, f"{prefix}rope.scaling")
        scaling["attention_factor"] = yarn_attention(factor)
        if attention != 1:
            scaling["attention_factor"] = float(f"{attention * yarn_attention(factor):.7g}")  # as float32
        config_json["rope_scaling"] = scaling
    elif attention != 1:
        raise UserError(f"{prefix}rope.scaling.attn_factor is {attention!r}, but only 1 is supported")
    elif factor not in (0, 1):
        config_json["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    config = hf.to_gpt_config(config_json)
    if factors is not None:
        original = given.get("rope.scaling.original_context_length", 8192)
        config = replace(config, rope_scaling=llama3_scaling(config, factors, original))
    D = config.head_dim
    for key in HEAD_DIM_KEYS:
        if given.get(key, D) != D:
            raise UserError(f"{prefix}{key} is {given[key]!r}, but only the head's {D} is supported")
    if arch.square and D * config.n_head != config.n_embd:
        raise UserError(f"{arch.name} has head_dim = n_embd / n_head in llama.cpp, not {D}")
    return config


def llama3_scaling(config: GPTConfig, factors: Tensor, original: int) -> dict[str, Any]:
    """Return the rope_scaling of these ROPE_FREQS. UserError if it is not Llama 3's."""
    if factors.shape == (config.head_dim // 2,) and not config.rope_scaling:
        scaling: dict[str, Any] = dict(rope_type="llama3", factor=shortest(float(factors.max())))
        scaling |= dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=original)
        check_rope_scaling(scaling, ROPE_FREQS)
        expected = rope_factors(replace(config, rope_scaling=scaling))
        if expected is not None and torch.allclose(expected, factors, rtol=1e-5):
            return scaling
    raise UserError(f"{ROPE_FREQS} is a scaling of the rotary frequencies other than Llama 3's")


def shortest(x: float) -> float:
    """Return the shortest decimal that is the same in float32: 1e-6, not 9.999999974752427e-07."""
    return float(str(np.float32(x)))


def tensor_names(model: GPT, arch: Architecture) -> dict[str, list[str]]:
    """Map names in the file to names in the state dict, several where the file joins their rows."""
    names: dict[str, list[str]] = {}
    for ours in model.state_dict():
        layer, module, kind = hf.split_name(ours)
        prefix = "" if layer is None else f"blk.{layer}."
        names.setdefault(f"{prefix}{arch.modules[module]}.{kind}", []).append(ours)
    return names


def is_permuted(ours: str, arch: Architecture) -> bool:
    """Return whether the rotary layout permutes this tensor of the state dict."""
    return arch.half_split and hf.split_name(ours)[1] in hf.ROTATED


# -----------------------------------------------------------------------------
# Tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # in tiktoken
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"  # in the models
ASCII_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|"  # in llama.cpp: without 'ſ


class PreTokenizer(NamedTuple):
    """A value of tokenizer.ggml.pre. Text is split by one pattern after the other, then merged in pieces."""

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is not merged
    add_bos: bool = False  # if the file does not say


QWEN2 = WORDS % r"\p{N}"
LLAMA3 = WORDS % r"\p{N}{1,3}"
# For reading, the first of a name counts: it is what llama.cpp does. For writing, all count. Its gpt-4o and
# tekken are missing: they know upper case in ASCII alone, so they split differently from the models so named.
PRE_TOKENIZERS = [
    PreTokenizer("gpt-2", (GPT2,)),
    PreTokenizer("gpt-2", (R50K,)),
    PreTokenizer("smollm", (r"\p{N}", GPT2)),
    PreTokenizer("qwen2", (ASCII_CONTRACTIONS + QWEN2,)),
    PreTokenizer("qwen2", (CONTRACTIONS + QWEN2,)),
    PreTokenizer("dbrx", (ASCII_CONTRACTIONS + LLAMA3,)),
    PreTokenizer("dbrx", (CONTRACTIONS + LLAMA3,)),
    PreTokenizer("llama-bpe", (ASCII_CONTRACTIONS + LLAMA3,), ignore_merges=True, add_bos=True),
    PreTokenizer("llama-bpe", (CONTRACTIONS + LLAMA3,), ignore_merges=True, add_bos=True),
]
SAMPLING = {  # of gpt.Sampling: the key of a file
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
ALIASES = dict.fromkeys(("llama3", "llama-v3", "falcon3"), "llama-bpe") | {"deepseek-r1-qwen": "qwen2"}

SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
SPACE = "▁"
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


@dataclass
class Vocabulary:
    """The object in a tokenizer.json, and a token for each id of the model: UNUSED if there is none."""

    spec: dict[str, Any]
    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]

    @classmethod
    def read(cls, tokenizer: Tokenizer, vocab_size: int) -> "Vocabulary":
        if isinstance(tokenizer, PretrainedTokenizer):
            d = json.loads(tokenizer.backend.to_str())
        else:
            d = json.loads(hf.tokenizer_json(tokenizer))
            d["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": tokenizer.to_dict()["pattern"]}
        model = d["model"]
        if model["type"] != "BPE":
            raise UserError(f"its model is {model['type']}, not BPE")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model[option]:
                raise UserError(f"it has no {option}")
        tokens = [f"[PAD{i}]" for i in range(vocab_size)]
        types = [UNUSED] * vocab_size
        for text, i in model["vocab"].items():
            tokens[i] = text
            types[i] = NORMAL
        for token in d["added_tokens"]:
            text = token["content"]
            if token["lstrip"] or token["rstrip"] or token["single_word"]:
                raise UserError(f"its token {text!r} depends on what stands beside it")
            if token["normalized"] and not token["special"] and d["normalizer"]:
                raise UserError(f"its token {text!r} is found in normalized text")
            tokens[token["id"]] = text
            types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        if len(set(tokens)) < len(tokens):
            raise UserError("two of its ids have the same text")
        for text in tokens:
            if not text or "\0" in text:
                raise UserError(f"its token {text!r} is no C string")
        return cls(d, tokens, types, [tuple(merge) for merge in model["merges"]])


def to_tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """Return metadata, and notes on what llama.cpp does otherwise. UserError if its split differs."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {vocab_size}")
    try:
        v = Vocabulary.read(tokenizer, vocab_size)
        byte_level = getattr(tokenizer, "byte_level", True)
        values, notes = byte_level_metadata(v) if byte_level else sentencepiece_metadata(v)
        values |= special_token_metadata(tokenizer)
        if lost := tokenizer.eos_tokens[len(END_KEYS) :]:
            texts = ", ".join(repr(tokenizer.decode([i])) for i in lost)
            notes.append(f"a GGUF file names {len(END_KEYS)} tokens that end a text: {texts} may not end one")
    except ValueError as e:
        known = "it can tokenize like bytes, bpe:N and gpt2"
        raise UserError(f"llama.cpp would not tokenize like {tokenizer.name}: {e}; {known}") from e
    values |= {"tokens": v.tokens, "token_type": v.types}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata, notes


def byte_level_metadata(v: Vocabulary) -> tuple[dict[str, Any], list[str]]:
    """Return metadata and notes for tokenizer.ggml.model "gpt2": byte-level BPE after a named split."""
    notes = []
    if normalizer := v.spec["normalizer"]:
        if normalizer != {"type": "NFC"}:
            raise UserError(f"its normalizer is {normalizer['type']}")
        notes.append("llama.cpp does not normalize text to NFC before it tokenizes")
    if v.merges:
        patterns = split_patterns(v.spec["pre_tokenizer"])
        ignore_merges = v.spec["model"]["ignore_merges"]
        same = [p.name for p in PRE_TOKENIZERS if (p.patterns, p.ignore_merges) == (patterns, ignore_merges)]
        if not same:
            raise UserError(f"it has no split by {' and '.join(patterns)} with ignore_merges={ignore_merges}")
        return {"model": "gpt2", "pre": same[0], "merges": [" ".join(merge) for merge in v.merges]}, notes
    # Without merges, text is single bytes, however it is split. llama.cpp wants a merge: one of no use
    control = v.tokens[v.types.index(CONTROL)]
    return {"model": "gpt2", "pre": "qwen2", "merges": [f"{control} {control}"]}, notes


def split_patterns(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the regexes by which a byte-level tokenizer.json splits text, one after the other."""
    patterns = []
    for step in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer]):
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                patterns.append(GPT2)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
                pass
            case _:
                raise UserError(f"it has no pre_tokenizer {json.dumps(step)}")
    return tuple(patterns)


def sentencepiece_metadata(v: Vocabulary) -> tuple[dict[str, Any], list[str]]:
    """Return metadata and notes for tokenizer.ggml.model "llama": SentencePiece BPE.

    It merges the pair whose merged token has the highest score; the `tokenizers` library ranks pairs instead.
    The two agree if the pairs that BPE merges to form tokens (see `hf.find_merge`) are merges in that order.
    """
    notes = []
    model = v.spec["model"]
    normalizer = v.spec["normalizer"] or {}
    pre_tokenizer = v.spec["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if pre_tokenizer == SPLIT and steps[-1] == REPLACE:  # Gemma's: no space is left to split at
        pre_tokenizer = {}
    if not pre_tokenizer and steps in ([PREPEND, REPLACE], [REPLACE]):
        prefix = PREPEND in steps
    elif not normalizer and pre_tokenizer.get("type") == "Metaspace" and not pre_tokenizer["split"]:
        prefix = pre_tokenizer["prepend_scheme"] != "never"
        if prefix:
            notes.append("llama.cpp puts a space before every text, also before one that begins with a space")
    else:
        raise UserError(f"it has no normalizer {json.dumps(normalizer)} before {json.dumps(pre_tokenizer)}")
    for i, text in enumerate(v.tokens):
        if v.types[i] == NORMAL and BYTE_TOKEN.fullmatch(text):
            v.types[i] = BYTE
        if text == model["unk_token"]:
            v.types[i] = UNKNOWN
    if not model["byte_fallback"] or model["ignore_merges"] or v.types.count(BYTE) != 256:
        raise UserError("it falls back to 256 bytes for unknown characters")
    normal = [text for text, kind in zip(v.tokens, v.types, strict=True) if kind == NORMAL]
    merges = find_in_text(v)
    if "  " in v.tokens:
        notes.append(f"llama.cpp gives other ids to text with the character {SPACE}")
    runs = space_merges(normal)
    if merges[len(merges) - len(runs) :] == runs:
        merges = merges[: len(merges) - len(runs)]
    else:
        runs = []
    pair_ranks = {pair: rank for rank, pair in enumerate(merges)}
    ranks: dict[str, float] = {}
    for (a, b), rank in pair_ranks.items():
        ranks.setdefault(a + b, rank)
    own = [pair_ranks.get(hf.find_merge(text, ranks), -1) for text in ranks]  # type: ignore[arg-type]
    if own != sorted(own) or own[:1] == [-1]:
        raise UserError("its merges are not in the order of its tokens")
    rest = {text for text in normal if len(text) > 1} - ranks.keys()
    ranks |= dict.fromkeys(rest, len(merges))
    for text in rest - {a + b for a, b in runs}:
        if hf.find_merge(text, ranks):
            raise UserError(f"its token {text!r} has no merge")
    metadata: dict[str, Any] = {"model": "llama", "pre": "default", "add_space_prefix": prefix}
    metadata["scores"] = [-float(ranks.get(text, 0)) for text in v.tokens]
    if UNKNOWN in v.types:
        metadata["unknown_token_id"] = v.types.index(UNKNOWN)
    return metadata, notes


def find_in_text(v: Vocabulary) -> list[tuple[str, str]]:
    """Write runs of spaces that are USER_DEFINED tokens as llama.cpp wants Gemma's. Return the other merges.

    llama.cpp finds a USER_DEFINED token in the text, before it merges. That gives the same ids if runs are
    merged before all else, from the left. Merges to other USER_DEFINED tokens are never used.
    """
    found = {text: i for i, text in enumerate(v.tokens) if v.types[i] == USER_DEFINED}
    others = [merge for merge in v.merges if "".join(merge) not in found]
    if any(part in found for merge in others for part in merge):
        raise UserError("its tokens that are found in the text are merged with others")
    with_spaces = [text for text in found if SPACE in text]
    if with_spaces:
        sizes = range(1, len(with_spaces) + 2)
        pairs = [(SPACE * a, SPACE * b) for a in reversed(sizes) for b in reversed(sizes) if a + b in sizes]
        first = [merge for merge in v.merges if SPACE in "".join(merge)][: len(pairs)]
        if {*with_spaces} != {SPACE * n for n in sizes[1:]} or first != pairs:
            raise UserError(f"its tokens of {SPACE} are not runs that are merged first")
        for text in with_spaces:
            v.tokens[found[text]] = text.replace(SPACE, " ")
    return others


def space_merges(tokens: list[str]) -> list[tuple[str, str]]:
    """Return the merges of runs of spaces, which share a score, as in Llama 2: a run grows from the left."""
    sizes = sorted({len(text) for text in tokens if not text.strip("▁")})
    return [("▁" * a, "▁" * b) for a in reversed(sizes) for b in sizes if a + b in sizes]


END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # the end of a text, a turn, a message


def special_token_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokens that begin and end a text, and which of them a prompt gets."""
    plain = tokenizer.encode("a")
    prompt = tokenizer.encode_prompt("a")
    for add_bos, add_eos in product((False, True), repeat=2):
        if prompt[int(add_bos) : len(prompt) - int(add_eos)] == plain:
            break
    else:
        raise UserError(f"{len(prompt) - len(plain)} special tokens are put around a prompt")
    ids = hf.special_token_ids(tokenizer)
    ends = tokenizer.eos_tokens or [tokenizer.eot]
    bos = prompt[0] if add_bos else ids["bos_token_id"]
    if add_eos and prompt[-1] != ends[0]:
        raise UserError(f"the special token {prompt[-1]} ends a prompt")
    metadata = {"bos_token_id": ends[0] if bos is None else bos, "padding_token_id": ids["pad_token_id"]}
    metadata |= dict(zip(END_KEYS, ends, strict=False))
    metadata |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    return {key: value for key, value in metadata.items() if value is not None}


def to_tokenizer(metadata: dict[str, Any], name: str) -> PretrainedTokenizer:
    """Return the tokenizer of a file, as llama.cpp runs it. UserError if it is missing or not supported."""
    get = partial(lookup, metadata)
    model = get("model", str)
    tokens = get("tokens", list, [])
    types = get("token_type", np.ndarray)
    types = [NORMAL] * len(tokens) if types is None else types.tolist()
    if model not in ("gpt2", "llama"):
        raise UserError(f"tokenizer.ggml.model is {model!r}, but only 'gpt2' and 'llama' are supported")
    if not tokens or len(types) != len(tokens):
        raise UserError(f"tokenizer.ggml has {len(tokens)} tokens and {len(types)} token types")
    vocab = {text: i for i, text in enumerate(tokens) if types[i] != UNUSED}
    if len(vocab) + types.count(UNUSED) != len(tokens):
        raise UserError("tokenizer.ggml.tokens has a token twice")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": text, "special": types[i] != USER_DEFINED} | flags
        for text, i in vocab.items()
        if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    to_json = byte_level_json if model == "gpt2" else sentencepiece_json
    parts, defaults = to_json(metadata, tokens, types)

    special_tokens = {}
    for key in ("bos", "eos", "unknown", "padding"):
        i = get(f"{key}_token_id", int, defaults.get(key, -1))
        if 0 <= i < len(tokens) and types[i] != UNUSED:
            special_tokens[f"{key[:3]}_token"] = tokens[i]
    ends = [get("eot_token_id", int), get("eom_token_id", int)]
    ends.append(vocab.get("<end_of_turn>"))  # llama.cpp knows Gemma's by its text
    add_bos = get("add_bos_token", bool, defaults["add_bos"])
    add_eos = get("add_eos_token", bool, False)
    d: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    d |= parts
    d["model"] |= {"type": "BPE", "vocab": vocab, "unk_token": special_tokens.pop("unk_token", None)}
    d["post_processor"] = None
    if add_bos or add_eos:
        d["post_processor"] = template_processing(add_bos, add_eos, special_tokens, vocab)
    template = str(metadata.get("tokenizer.chat_template", ""))
    ends = [i for i in ends if i is not None]
    sampling = read_sampling({ours: metadata.get(theirs) for ours, theirs in SAMPLING.items()})
    return PretrainedTokenizer(name, json.dumps(d), special_tokens, ends, template, sampling)


def lookup(metadata: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if value is not default and not isinstance(value, kind):
        raise UserError(f"tokenizer.ggml.{key} has the wrong type")
    return value


Parts = tuple[dict[str, Any], dict[str, int]]  # of a tokenizer.json; llama.cpp's defaults for missing keys


def byte_level_json(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Parts:
    """Return the parts of a tokenizer.json, and defaults, for tokenizer.ggml.model "gpt2"."""
    name = lookup(metadata, "pre", str, "default")
    known = [p for p in PRE_TOKENIZERS if p.name == ALIASES.get(name, name)]
    if not known:
        names = ", ".join(dict.fromkeys(p.name for p in PRE_TOKENIZERS))
        raise UserError(f"tokenizer.ggml.pre is {name!r}, but only {names} are supported")
    control = {text for text, kind in zip(tokens, types, strict=True) if kind == CONTROL}
    merges = [merge.split(" ") for merge in lookup(metadata, "merges", list, [])]
    merges = [
        merge for merge in merges if not control.intersection(merge)
    ]  # text never becomes a control token
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in known[0].patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts = {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "model": {"merges": merges, "ignore_merges": known[0].ignore_merges},
        "decoder": byte_level,
    }
    return parts, {"add_bos": known[0].add_bos}


def sentencepiece_json(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Parts:
    """The same for tokenizer.ggml.model "llama". The merges are those by which BPE forms each token."""
    scores = lookup(metadata, "scores", np.ndarray, ())
    prefix = lookup(metadata, "add_space_prefix", bool, True)
    if len(scores) != len(tokens):
        raise UserError(f"tokenizer.ggml has {len(tokens)} tokens and {len(scores)} scores")
    if lookup(metadata, "remove_extra_whitespaces", bool, False):
        raise UserError("tokenizer.ggml.remove_extra_whitespaces is true, which is not supported")
    ranks = {text: -float(scores[i]) for i, text in enumerate(tokens) if types[i] == NORMAL}
    runs = space_merges([*ranks])
    ranks = {text: rank for text, rank in ranks.items() if len(text) > 1}
    if {ranks[a + b] for a, b in runs} != {max(ranks.values(), default=0)}:  # they must come last
        runs = []
    mergeable = sorted(ranks.keys() - {a + b for a, b in runs}, key=ranks.__getitem__)
    if len({ranks[text] for text in mergeable}) < len(mergeable):
        raise UserError("tokenizer.ggml.scores has the same score for two tokens")
    merges = [hf.find_merge(text, ranks) for text in mergeable] + runs
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE] if prefix else [REPLACE]},
        "pre_tokenizer": None,
        "model": {"merges": [merge for merge in merges if merge], "byte_fallback": True, "fuse_unk": True},
        "decoder": {"type": "Sequence", "decoders": [*SENTENCEPIECE, STRIP] if prefix else SENTENCEPIECE},
    }
    return parts, {"bos": 1, "eos": 2, "unknown": 0, "add_bos": True}


def template_processing(
    add_bos: bool, add_eos: bool, special: dict[str, str], vocab: dict[str, int]
) -> dict[str, Any]:
    """Return the post_processor that puts the bos token before a text, the eos token after it."""
    keys = ["bos_token"] if add_bos else []
    keys += ["eos_token"] if add_eos else []
    for key in keys:
        if key not in special:
            raise UserError(f"a prompt gets a {key}, but there is none")
    tokens = [{"SpecialToken": {"id": special[key], "type_id": 0}} for key in keys]
    begin = tokens[:1] if add_bos else []
    end = tokens[-1:] if add_eos else []
    one = {"Sequence": {"id": "A", "type_id": 0}}
    two = {"Sequence": {"id": "B", "type_id": 0}}
    known = {
        special[key]: {"id": special[key], "ids": [vocab[special[key]]], "tokens": [special[key]]}
        for key in keys
    }
    templates = {"single": [*begin, one, *end], "pair": [*begin, one, two, *end]}
    return {"type": "TemplateProcessing"} | templates | {"special_tokens": known}


# -----------------------------------------------------------------------------
# Read

MAGIC = b"GGUF"
STRING = 8
ARRAY = 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    start: int  # in the file
    nbytes: int


class Reader:
    """The metadata of a file, and where its tensors are. UserError if it is damaged or of an unknown kind."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with open(path, "rb") as self.file:
            self.size = os.fstat(self.file.fileno()).st_size
            if self.file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{path} is not a GGUF file")
            try:
                self.read_header()
            except ValueError as e:  # also of UTF-8
                raise UserError(f"{path} is damaged, or of a kind that is not supported: {e}") from e

    def read_header(self) -> None:
        version = self.scalar("I")
        if version not in (2, 3):  # a big-endian file has 50331648
            raise UserError(f"its version is {version}, but only 2 and 3 are supported")
        n_tensors, n_keys = self.scalar("Q"), self.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string()
            if key in self.metadata:
                raise UserError(f"{key} is there twice")
            self.metadata[key] = self.value(self.scalar("I"))
        headers = {self.string(): self.tensor_header() for _ in range(n_tensors)}
        if len(headers) < n_tensors:
            raise UserError("two tensors have the same name")
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise UserError(f"general.alignment is {alignment!r}, not a power of two")
        position = start = -(-self.file.tell() // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, (shape, kind, offset) in headers.items():
            if start + offset != position:  # as in llama.cpp, so that none overlap
                raise UserError(f"{name} is at {offset}, but the tensor before it ends at {position - start}")
            self.tensors[name] = self.locate(name, position, shape, kind)
            position = -(-(position + self.tensors[name].nbytes) // alignment) * alignment

    def take(self, n: int) -> bytes:
        """Read the next n bytes."""
        position = self.file.tell()
        if n > self.size - position:
            raise UserError(f"at byte {position}, it says that {n} more follow, but it ends at {self.size}")
        return self.file.read(n)

    def scalar(self, code: str) -> Any:
        [value] = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return shortest(value) if code == "f" else value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int) -> Any:
        """Read a value of metadata: an array of strings as a list, of numbers as a NumPy array."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, n = self.scalar("I"), self.scalar("Q")
            if kind == STRING:
                return [self.string() for _ in range(n)]
            if kind in SCALARS:
                dtype = np.dtype(f"<{SCALARS[kind]}")
                return np.frombuffer(self.take(n * dtype.itemsize), dtype)
        elif kind in SCALARS:
            return self.scalar(SCALARS[kind])
        raise UserError(f"a value has the unknown type {kind}")

    def tensor_header(self) -> tuple[tuple[int, ...], int, int]:
        """Read shape, type and offset."""
        n = self.scalar("I")
        if n > 4:
            raise UserError(f"a tensor has {n} dimensions")
        shape = tuple(reversed([self.scalar("Q") for _ in range(n)]))
        return shape, self.scalar("I"), self.scalar("Q")

    def locate(self, name: str, start: int, shape: tuple[int, ...], kind: int) -> TensorInfo:
        gguf = package()
        try:
            kind = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (ValueError, NotImplementedError) as e:
            kind_name = getattr(kind, "name", kind)
            raise UserError(f"{name} has the type {kind_name}, which is not supported") from e
        if not shape or shape[-1] % block:
            raise UserError(f"{name} is {shape}, but its rows must be a multiple of {block} long")
        nbytes = math.prod(shape) // block * block_bytes
        if start + nbytes > self.size:
            raise UserError(f"{name} ends at byte {start + nbytes}, but the file at {self.size}")
        return TensorInfo(shape, kind, start, nbytes)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor in the file's dtype, in float32 if it is quantized."""
        info = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, info.nbytes, offset=info.start)
        if info.kind.name in DTYPES:
            return torch.from_numpy(data).view(DTYPES[info.kind.name]).view(info.shape)
        rows = data.reshape(*info.shape[:-1], -1)
        return torch.from_numpy(package().dequantize(rows, info.kind)).view(info.shape)


def load(
    path: str | Path, device: Device = None, dtype: Dtype = None, quantize: str | None = None
) -> tuple[GPT, Tokenizer]:
    """Return the model in eval mode and its tokenizer, from a GGUF file.

    dtype: None is that of the file's matrices, float32 if they are quantized. quantize: "int8" or "int4" (see
    sologpt/quantize.py). Tensors are dequantized, and quantized anew, one by one. UserError for a file that
    is damaged or not supported, OSError if it is missing, ImportError without the extra.
    """
    reader = Reader(path)
    try:
        model, arch, names = find_model(reader)
        tokenizer = to_tokenizer(reader.metadata, Path(path).stem)
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: {e}") from e
    if dtype is None:
        matrices = [reader.tensors[name] for name in names if len(reader.tensors[name].shape) > 1]
        dtype = widest(DTYPES.get(info.kind.name, torch.float32) for info in matrices)
    state = model.state_dict()

    def weights() -> Iterator[tuple[str, Tensor]]:
        largest_first = sorted(names, key=lambda name: -reader.tensors[name].nbytes)  # as in hf.py
        for theirs in largest_first:
            parts = reader.tensor(theirs).split([state[ours].size(0) for ours in names[theirs]])
            for ours, x in zip(names[theirs], parts, strict=True):
                if is_permuted(ours, arch):
                    x = hf.to_interleaved(x, model.config.head_dim, inverse_rotation=False)
                yield ours, x.to(device, dtype)

    fill(model, weights(), quantize)
    return model.eval(), tokenizer


def find_model(reader: Reader) -> tuple[GPT, Architecture, dict[str, list[str]]]:
    """Return a model on the meta device, its architecture and its `tensor_names`. All is checked."""
    metadata = reader.metadata
    tensors = reader.tensors
    name = metadata.get("general.architecture")
    known = {arch.name: arch for arch in ARCHITECTURES.values()}
    if name not in known:
        raise UserError(f"general.architecture is {name!r}, but only {', '.join(known)} are supported")
    arch = known[name]
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError("it is one of several parts: llama-gguf-split --merge makes them one file")
    factors = reader.tensor(ROPE_FREQS) if arch.rope_freqs and ROPE_FREQS in tensors else None
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    n_layer = metadata.get(f"{name}.block_count")
    if n_layer != len(layers):
        raise UserError(f"{name}.block_count is {n_layer}, but there are tensors of {len(layers)} blocks")
    vocab_size = {f"{name}.vocab_size": len(metadata.get("tokenizer.ggml.tokens", ()))}  # as in llama.cpp
    config = to_config(arch, metadata | vocab_size, "output.weight" not in tensors, factors)
    try:
        model = empty_model(config)
    except (RuntimeError, TypeError, OverflowError) as e:
        reason = str(e).partition("\n")[0]
        raise UserError(f"a model of its sizes is impossible: {reason}") from e
    names = tensor_names(model, arch)
    missing = sorted(names.keys() - tensors.keys())
    if missing:
        raise UserError(f"{len(missing)} tensors are missing: {', '.join(missing[:3])}")
    unexpected = sorted(tensors.keys() - names.keys() - {ROPE_FREQS if arch.rope_freqs else ""})
    if unexpected:
        raise UserError(f"{len(unexpected)} tensors are unexpected: {', '.join(unexpected[:3])}")
    for theirs, expected in tensor_shapes(model.state_dict(), names).items():
        if tensors[theirs].shape != expected:
            raise UserError(f"{theirs} is {tensors[theirs].shape}, but {expected} by the metadata")
    return model, arch, names


def tensor_shapes(state: dict[str, Tensor], names: dict[str, list[str]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in the file: the rows of several of ours may be joined."""
    shapes = {}
    for theirs, ours in names.items():
        rows = sum(state[name].size(0) for name in ours)
        shapes[theirs] = (rows, *state[ours[0]].shape[1:])
    return shapes


# -----------------------------------------------------------------------------
# Write

FILE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # types of the matrices


def save(model: GPT, tokenizer: Tokenizer, path: str | Path, dtype: str | None = None) -> list[str]:
    """Write a new GGUF file, atomically. Return notes on what llama.cpp does otherwise with the tokenizer.

    dtype: a key of FILE_TYPES, of the matrices; None is the model's. Gains and biases are float32: llama.cpp
    wants them so. UserError if it has no such model or tokenizer, FileExistsError if there is such a file.
    """
    gguf = package()
    name = FILE_TYPES.get(dtype or str(model.dtype).removeprefix("torch."), "F32")
    arch, metadata = to_metadata(model.config)
    tokenizer_metadata, notes = to_tokenizer_metadata(tokenizer, model.config.vocab_size)
    file_type = gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]
    path = Path(path)
    metadata |= {"general.name": path.stem, "general.quantization_version": 2} | tokenizer_metadata
    metadata["general.file_type"] = file_type.value
    metadata |= {SAMPLING[key]: value for key, value in tokenizer.sampling.items()}
    if path.exists():
        raise FileExistsError(f"{path} exists already: give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.tmp")
    try:
        with errors.writing(path), closing(gguf.GGUFWriter(temporary, arch.name)) as writer:
            write(writer, model, arch, metadata, gguf.GGMLQuantizationType[name])
            os.fsync(writer.fout[0].fileno())
            os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):  # it is still there if something failed
            os.remove(temporary)
    return notes


def write(writer: Any, model: GPT, arch: Architecture, metadata: dict[str, Any], kind: Any) -> None:
    """Write header, metadata, and tensors one by one: matrices in the type kind, the rest in float32."""
    gguf = package()
    types = gguf.GGUFValueType
    codes = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING, list: types.ARRAY}
    for key, value in metadata.items():
        writer.add_key_value(key, value, codes[type(value)])
    state = dict(model.state_dict())
    names = tensor_names(model, arch)
    factors = rope_factors(model.config)
    if factors is not None:
        state[ROPE_FREQS] = factors
        names[ROPE_FREQS] = [ROPE_FREQS]
    kinds = {}
    for theirs, shape in tensor_shapes(state, names).items():
        kinds[theirs] = tensor_type(shape, kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[theirs]]
        nbytes = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(theirs, shape, np.dtype(np.float32), nbytes, kinds[theirs])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs, ours in names.items():
        parts = []
        for name in ours:
            x = state[name]
            if is_permuted(name, arch):
                x = hf.to_half_split(x, model.config.head_dim, inverse_rotation=False)
            parts.append(x)
        writer.write_tensor_data(encode(theirs, torch.cat(parts), kinds[theirs]))
    writer.flush()


def tensor_type(shape: tuple[int, ...], kind: Any) -> Any:
    """Return the type of a tensor: float32 for gains and biases, float16 if blocks do not divide its rows."""
    gguf = package()
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def encode(name: str, x: Tensor, kind: Any) -> np.ndarray:
    """Return a tensor in a type of the file. UserError, with the name, if a value does not fit."""
    x = x.cpu()
    encoded = x.to(DTYPES.get(kind.name, torch.float16)).contiguous()  # the scales of blocks are float16
    hf.check_finite(name, encoded)
    if kind.name in DTYPES:
        return encoded.view(torch.uint8).numpy()
    return package().quantize(x.float().contiguous().numpy(), kind)


# -----------------------------------------------------------------------------
# Command line


def export_checkpoint(source: str, path: Path, dtype: str | None) -> None:
    """Write a GGUF file from whatever `load_model` loads."""
    model, tokenizer, _ = load_model(source)
    for note in save(model, tokenizer, path, dtype):
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {path}: llama-cli -m {path} runs it")


def make_parser() -> hf.Parser:
    parser = hf.Parser(
        prog="python -m sologpt.gguf",
        description="Convert a checkpoint to a GGUF file, for llama.cpp, Ollama, LM Studio, ...",
        epilog=(
            "examples:\n"
            "  python -m sologpt.gguf export out/llama_tiny mine.gguf\n"
            "  python -m sologpt.gguf export hf:HuggingFaceTB/SmolLM2-135M smollm2.gguf --dtype=q8_0\n\n"
            "import: a GGUF file needs no conversion\n"
            "  python sample.py --init_from=gguf:mine.gguf\n"
            "  python train.py config/finetune.py --init_from=gguf:mine.gguf"
        ),
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{export}")
    command = commands.add_parser(
        "export",
        help="checkpoint to GGUF file",
        description=f"Convert a checkpoint to a GGUF file.\nModel types: {', '.join(ARCHITECTURES)}.",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help=hf.SOURCE)
    command.add_argument("file", metavar="FILE", type=Path, help="the file to write; it must not exist yet")
    command.add_argument(
        "--dtype",
        choices=("auto", *FILE_TYPES),
        default="auto",
        help="type of the weights that are written; auto (the default) keeps the one they have",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    export_checkpoint(args.checkpoint, args.file, None if args.dtype == "auto" else args.dtype)


if __name__ == "__main__":
    errors.run(main)

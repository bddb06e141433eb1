"""GGUF, the files of llama.cpp, Ollama and LM Studio: a model and its tokenizer in one file.

    gguf.save(model, tokenizer, "mine.gguf")
    model, tokenizer = gguf.load("SmolLM2-135M-Instruct.Q4_1.gguf")  # quantized weights are dequantized

    python -m sologpt.gguf export CHECKPOINT FILE [--dtype=q8_0]

What llama.cpp would compute or tokenize differently is refused by a ValueError that says why. A file is not trusted:
every size in it is compared with the file's own before memory is allocated. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What was run with llama.cpp is in docs/gguf.md.
"""

import argparse
import json
import math
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt import GPT, GPTConfig, scale_frequencies
from sologpt import hf
from sologpt.load import load_model
from sologpt.tokenizer import BYTE_TOKEN, SENTENCEPIECE, STRIP, PretrainedTokenizer, Tokenizer
from sologpt.weights import fill


def package() -> Any:
    """The `gguf` package: the tensor types and their quantization. ImportError without the extra."""
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
OTHER_KEYS = {"attention.value_length", "rope.dimension_count"}  # must be head_dim
OTHER_KEYS |= {f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "finetuned")}

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
GPT2_MODULES = MODULES | {"wpe": "position_embd"} | dict.fromkeys(("attn.c_q", "attn.c_k", "attn.c_v"), "attn_qkv")
ROPE_FREQS = "rope_freqs.weight"  # (D/2,): what divides each rotary frequency, for Llama 3's scaling


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp, which computes a model_type of `hf.FAMILIES`."""

    name: str
    half_split: bool  # its rotary layout is that of transformers, not of gpt.py: neighbouring channels
    rope_freqs: bool = False  # it reads ROPE_FREQS
    square: bool = False  # it knows no head_dim but n_embd / n_head
    keys: dict[str, str] = field(default_factory=lambda: KEYS)
    modules: dict[str, str] = field(default_factory=lambda: MODULES)  # several of ours: their rows, one below the other


LLAMA = Architecture("llama", half_split=False, rope_freqs=True)
ARCHITECTURES = {  # by model_type
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", half_split=True, square=True),
    "qwen3": Architecture("qwen3", half_split=True),
    "gpt2": Architecture("gpt2", half_split=False, keys=GPT2_KEYS, modules=GPT2_MODULES),
}


def find_architecture(config: GPTConfig) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that computes the same, and the config.json. ValueError if llama.cpp has none."""
    try:
        config_json = hf.to_hf_config(config)
        if {*config.layer_types} != {"F"}:
            raise ValueError("no sliding windows, no layers without positions")
        return ARCHITECTURES[config_json["model_type"]], config_json
    except (ValueError, KeyError) as e:
        flags = [f"--{key}={value}" for key, value in hf.LLAMA.items() if getattr(config, key) != value]
        flags += ["--layer_types=F"] * ({*config.layer_types} != {"F"})
        known = f"the switches of config/llama_tiny.py: {' '.join(flags)}"
        raise ValueError(f"llama.cpp has no such model; train one that it has with {known}") from e


def rope_factors(config: GPTConfig) -> Tensor | None:
    """ROPE_FREQS of a model with Llama 3's scaling, (D/2,) float32; None for any other model."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    _, _, D = config.heads
    frequencies = config.rope_base ** (torch.arange(0, D, 2, dtype=torch.float64) / -D)  # (D/2,)
    return (frequencies / scale_frequencies(frequencies, scaling)).float()


def to_metadata(config: GPTConfig) -> tuple[Architecture, dict[str, Any]]:
    """The architecture and its metadata. ValueError, with our fields, for what GGUF cannot say."""
    arch, config_json = find_architecture(config)
    _, _, D = config.heads
    metadata = {key: config_json[theirs] for key, theirs in arch.keys.items()}
    if "rope.freq_base" in arch.keys:
        metadata |= {"attention.value_length": D, "rope.dimension_count": D}
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if "original_max_position_embeddings" in scaling:
        metadata["rope.scaling.original_context_length"] = int(scaling["original_max_position_embeddings"])
    metadata = {f"{arch.name}.{key}": value for key, value in metadata.items()}

    factors = rope_factors(config) if arch.rope_freqs else None
    back = to_config(arch, metadata, config.tie_embd, factors)  # what the file means
    names = [f.name for f in fields(config) if f.name != "dropout"]
    if lost := [name for name in names if getattr(back, name) != getattr(config, name)]:
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(f"{arch.name} in llama.cpp has no {values}")
    return arch, metadata


def to_config(arch: Architecture, metadata: dict[str, Any], tied: bool, factors: Tensor | None) -> GPTConfig:
    """The GPTConfig of an architecture's metadata. ValueError, with the key, for what GPT cannot compute exactly.

    tied: the file has no head of its own. factors: its ROPE_FREQS, if it has them.
    """
    given = {key.removeprefix(f"{arch.name}."): v for key, v in metadata.items() if key.startswith(f"{arch.name}.")}
    for key in given.keys() - arch.keys.keys() - OTHER_KEYS:
        if np.any(given[key]):  # 0 switches it off, as in expert_count
            raise ValueError(f"{arch.name}.{key} is {given[key]!r}, which is not supported")
    defaults = {
        "attention.head_count_kv": given.get("attention.head_count"),
        "attention.key_length": None,
        "rope.freq_base": 10_000.0,
    }
    if missing := [f"{arch.name}.{key}" for key in arch.keys if key not in defaults | given]:
        raise ValueError(f"{', '.join(missing)} is missing")
    config_json = {theirs: (defaults | given).get(key) for key, theirs in arch.keys.items()}
    config_json |= {"model_type": arch.name, "tie_word_embeddings": tied}
    rope_type, factor = given.get("rope.scaling.type", "linear"), given.get("rope.scaling.factor", 1.0)
    if rope_type not in ("none", "linear"):
        raise ValueError(f"{arch.name}.rope.scaling.type is {rope_type!r}, but only none and linear are supported")
    if factor not in (0, 1):
        config_json["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    config = hf.to_gpt_config(config_json)
    if factors is not None:
        original = given.get("rope.scaling.original_context_length", 8192)
        config = replace(config, rope_scaling=llama3_scaling(config, factors, original))
    _, _, D = config.heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, D) != D:
            raise ValueError(f"{arch.name}.{key} is {given[key]!r}, but only the head's {D} is supported")
    if arch.square and D * config.n_head != config.n_embd:
        raise ValueError(f"{arch.name} has head_dim = n_embd / n_head in llama.cpp, not {D}")
    return config


def llama3_scaling(config: GPTConfig, factors: Tensor, original: int) -> dict[str, Any]:
    """The rope_scaling of these ROPE_FREQS. ValueError if it is not Llama 3's, which has two numbers of its own."""
    _, _, D = config.heads
    if factors.shape == (D // 2,) and not config.rope_scaling:
        scaling = dict(rope_type="llama3", factor=shortest(float(factors.max())), low_freq_factor=1.0)
        scaling |= dict(high_freq_factor=4.0, original_max_position_embeddings=original)
        expected = rope_factors(replace(config, rope_scaling=scaling))
        if expected is not None and torch.allclose(expected, factors, rtol=1e-5):
            return scaling
    raise ValueError(f"{ROPE_FREQS} is a scaling of the rotary frequencies other than Llama 3's")


def shortest(x: float) -> float:
    """The shortest decimal that is the same in float32: 1e-6, not 9.999999974752427e-07."""
    return float(str(np.float32(x)))


def tensor_names(model: GPT, arch: Architecture) -> dict[str, list[str]]:
    """Names in the file: names in the state dict, several where the file has their rows in one tensor."""
    names: dict[str, list[str]] = {}
    for ours in model.state_dict():
        layer, module, kind = hf.split_name(ours)
        names.setdefault(f"{f'blk.{layer}.' if layer else ''}{arch.modules[module]}.{kind}", []).append(ours)
    return names


def is_permuted(ours: str, arch: Architecture) -> bool:
    """Whether the rotary layout permutes this tensor of the state dict."""
    return arch.half_split and any(f".{module}." in ours for module in hf.ROTATED)


# -----------------------------------------------------------------------------
# Tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # tiktoken's form of it
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"  # the models'
ASCII_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|"  # llama.cpp's: no long s, as in 'ſ


class PreTokenizer(NamedTuple):
    """A value of tokenizer.ggml.pre: text is split by one pattern after the other, then merged within the pieces."""

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is not merged
    add_bos: bool = False  # where the file does not say


QWEN2, LLAMA3 = WORDS % r"\p{N}", WORDS % r"\p{N}{1,3}"
# The first of a name is what llama.cpp does; all are for writing. What it calls gpt-4o and tekken is not here: it knows
# upper from lower case in ASCII alone, and so splits otherwise than the models of that name.
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
ALIASES = {"deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe"}

PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


@dataclass
class Vocabulary:
    """What a tokenizer.json says, with a token for each id of the model: UNUSED where the tokenizer has none."""

    json: dict[str, Any]
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
            raise ValueError(f"its model is {model['type']}, not BPE")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model[option]:
                raise ValueError(f"it has no {option}")
        tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
        for text, i in model["vocab"].items():
            tokens[i], types[i] = text, NORMAL
        for token in d["added_tokens"]:
            if token["lstrip"] or token["rstrip"] or token["single_word"]:
                raise ValueError(f"its token {token['content']!r} depends on what stands beside it")
            if token["normalized"] and not token["special"] and d["normalizer"]:
                raise ValueError(f"its token {token['content']!r} is found in normalized text")
            tokens[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
        if len({*tokens}) < len(tokens):
            raise ValueError("two of its ids have the same text")
        if bad := [text for text in tokens if not text or "\0" in text]:  # llama.cpp has C strings
            raise ValueError(f"its token {bad[0]!r} is no C string")
        return cls(d, tokens, types, [tuple(merge) for merge in model["merges"]])


def to_tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer's metadata, and notes on the texts of which llama.cpp makes other ids.

    ValueError if it would split text otherwise.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {vocab_size}")
    try:
        v = Vocabulary.read(tokenizer, vocab_size)
        byte_level = getattr(tokenizer, "byte_level", True)
        metadata, notes = byte_level_metadata(v) if byte_level else sentencepiece_metadata(v)
        metadata |= special_token_metadata(tokenizer)
    except ValueError as e:
        raise ValueError(
            f"llama.cpp would not tokenize like {tokenizer.name}: {e}; it can tokenize like bytes, bpe:N and gpt2"
        ) from e
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    metadata |= {"tokenizer.ggml.tokens": v.tokens, "tokenizer.ggml.token_type": v.types}
    if template := getattr(tokenizer, "chat_template", ""):
        metadata["tokenizer.chat_template"] = template
    return metadata, notes


def byte_level_metadata(v: Vocabulary) -> tuple[dict[str, Any], list[str]]:
    """tokenizer.ggml.model "gpt2": byte-level BPE by a list of merges, after a split that llama.cpp knows by name."""
    notes, ignore_merges, merges = [], v.json["model"]["ignore_merges"], v.merges
    if normalizer := v.json["normalizer"]:
        if normalizer != {"type": "NFC"}:
            raise ValueError(f"its normalizer is {normalizer['type']}")
        notes.append("llama.cpp does not normalize text to NFC before it tokenizes")
    if merges:
        patterns = split_patterns(v.json["pre_tokenizer"])
        same = [p.name for p in PRE_TOKENIZERS if (p.patterns, p.ignore_merges) == (patterns, ignore_merges)]
        if not same:
            raise ValueError(f"it has no split by {' and '.join(patterns)} with ignore_merges={ignore_merges}")
        name = same[0]
    else:  # single bytes, however text is split
        control = v.tokens[v.types.index(CONTROL)]
        name, merges = "qwen2", [(control, control)]  # it wants one, and text never becomes a control token
    return {"model": "gpt2", "pre": name, "merges": [" ".join(merge) for merge in merges]}, notes


def split_patterns(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The regexes by which a byte-level tokenizer.json splits text, one after the other."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    patterns = []
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                patterns += [GPT2] * use_regex
            case _:
                raise ValueError(f"it has no pre_tokenizer {json.dumps(step)}")
    return tuple(patterns)


def sentencepiece_metadata(v: Vocabulary) -> tuple[dict[str, Any], list[str]]:
    """tokenizer.ggml.model "llama": SentencePiece BPE, which merges the pair whose merged token has the highest score.

    The `tokenizers` library has a rank for each pair instead. The two agree if the pair by which BPE forms a token (see
    `hf.tokenizer_json`) is one of its merges, for all tokens in the same order.
    """
    notes, normalizer, pre_tokenizer = [], v.json["normalizer"] or {}, v.json["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if not pre_tokenizer and steps in ([PREPEND, REPLACE], [REPLACE]):
        prefix = PREPEND in steps
    elif not normalizer and pre_tokenizer.get("type") == "Metaspace" and not pre_tokenizer["split"]:
        prefix = pre_tokenizer["prepend_scheme"] != "never"
        if prefix:
            notes.append("llama.cpp puts a space before every text, also before one that begins with a space")
    else:
        raise ValueError(f"it has no normalizer {json.dumps(normalizer)} before {json.dumps(pre_tokenizer)}")
    model = v.json["model"]
    for i, text in enumerate(v.tokens):
        if v.types[i] == NORMAL and BYTE_TOKEN.fullmatch(text):
            v.types[i] = BYTE
        if text == model["unk_token"]:
            v.types[i] = UNKNOWN
    if not model["byte_fallback"] or model["ignore_merges"] or v.types.count(BYTE) != 256:
        raise ValueError("it falls back to 256 bytes for unknown characters")
    normal = [text for text, kind in zip(v.tokens, v.types, strict=True) if kind == NORMAL]
    runs, n = space_merges(normal), len(v.merges)
    if v.merges[n - len(runs) :] == runs:
        n -= len(runs)
    else:
        runs = []
    merges = {pair: rank for rank, pair in enumerate(v.merges[:n])}
    ranks: dict[str, float] = {}
    for (a, b), rank in merges.items():
        ranks.setdefault(a + b, rank)
    own = [merges.get(hf.find_merge(text, ranks), -1) for text in ranks]  # type: ignore[arg-type]
    if own != sorted(own) or own[:1] == [-1]:
        raise ValueError("its merges are not in the order of its tokens")
    rest = {text for text in normal if len(text) > 1} - ranks.keys()
    ranks |= dict.fromkeys(rest, n)
    if formed := [text for text in rest - {a + b for a, b in runs} if hf.find_merge(text, ranks)]:
        raise ValueError(f"its token {formed[0]!r} has no merge")
    metadata = {"model": "llama", "pre": "default", "add_space_prefix": prefix}
    metadata["scores"] = [-float(ranks.get(text, 0)) for text in v.tokens]
    if UNKNOWN in v.types:
        metadata["unknown_token_id"] = v.types.index(UNKNOWN)
    return metadata, notes


def space_merges(tokens: list[str]) -> list[tuple[str, str]]:
    """The merges of runs of spaces that have the same score, as in Llama 2: a run grows from the left while it can."""
    sizes = sorted({len(text) for text in tokens if not text.strip("▁")})
    return [("▁" * a, "▁" * b) for a in reversed(sizes) for b in sizes if a + b in sizes]


def special_token_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokens that begin and end a text, and which of them a prompt gets."""
    plain, prompt = tokenizer.encode("a"), tokenizer.encode_prompt("a")
    added = [(bos, eos) for bos in (0, 1) for eos in (0, 1) if prompt[bos : len(prompt) - eos] == plain]
    if not added:
        raise ValueError(f"{len(prompt) - len(plain)} special tokens are put around a prompt")
    [(add_bos, add_eos)] = added
    ids, ends = hf.special_token_ids(tokenizer), tokenizer.eos_tokens or [tokenizer.eot]
    bos = prompt[0] if add_bos else ids["bos_token_id"]
    if add_eos and prompt[-1] != ends[0]:
        raise ValueError(f"the special token {prompt[-1]} ends a prompt")
    metadata = {"bos_token_id": ends[0] if bos is None else bos, "padding_token_id": ids["pad_token_id"]}
    # Several tokens may end a text: the end of a turn and of a message are such, too
    metadata |= dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends, strict=False))
    metadata |= {"add_bos_token": bool(add_bos), "add_eos_token": bool(add_eos)}
    return {key: value for key, value in metadata.items() if value is not None}


def to_tokenizer(metadata: dict[str, Any], name: str) -> PretrainedTokenizer:
    """The tokenizer of a file, as llama.cpp runs it. ValueError if it is missing or not supported."""
    get = partial(lookup, metadata)
    model, tokens, types = get("model", str), get("tokens", list), get("token_type", np.ndarray)
    types = [NORMAL] * len(tokens or ()) if types is None else types.tolist()
    if model not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {model!r}, but only 'gpt2' and 'llama' are supported")
    if not tokens or len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml has {len(tokens or ())} tokens and {len(types)} token types")
    vocab = {text: i for i, text in enumerate(tokens) if types[i] != UNUSED}
    if len(vocab) + types.count(UNUSED) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens has a token twice")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": text, "special": types[i] != USER_DEFINED} | flags
        for text, i in vocab.items()
        if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    parts, defaults = (byte_level_json if model == "gpt2" else sentencepiece_json)(metadata, tokens, types)

    special_tokens = {}
    for key in ("bos", "eos", "unknown", "padding"):
        i = get(f"{key}_token_id", int, defaults.get(key, -1))
        if 0 <= i < len(tokens) and types[i] != UNUSED:
            special_tokens[f"{key[:3]}_token"] = tokens[i]
    ends = [get(f"{key}_token_id", int) for key in ("eot", "eom")]
    before, after = get("add_bos_token", bool, defaults["add_bos"]), get("add_eos_token", bool, False)
    d = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added} | parts
    d["model"] |= {"type": "BPE", "vocab": vocab, "unk_token": special_tokens.pop("unk_token", None)}
    d["post_processor"] = template_processing(before, after, special_tokens, vocab) if before or after else None
    template = metadata.get("tokenizer.chat_template", "")
    return PretrainedTokenizer(name, json.dumps(d), special_tokens, [i for i in ends if i is not None], str(template))


def lookup(metadata: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if value is not default and not isinstance(value, kind):
        raise ValueError(f"tokenizer.ggml.{key} has the wrong type")
    return value


def byte_level_json(
    metadata: dict[str, Any], tokens: list[str], types: list[int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The parts of a tokenizer.json for tokenizer.ggml.model "gpt2", and what llama.cpp takes for missing keys."""
    name = lookup(metadata, "pre", str, "default")
    known = [p for p in PRE_TOKENIZERS if p.name == ALIASES.get(name, name)]
    if not known:
        names = ", ".join({p.name: None for p in PRE_TOKENIZERS})
        raise ValueError(f"tokenizer.ggml.pre is {name!r}, but only {names} are supported")
    control = {text for text, kind in zip(tokens, types, strict=True) if kind == CONTROL}  # never in text
    merges = [merge.split(" ") for merge in lookup(metadata, "merges", list, [])]
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in known[0].patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts = {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "model": {
            "merges": [merge for merge in merges if not control.intersection(merge)],
            "ignore_merges": known[0].ignore_merges,
        },
        "decoder": byte_level,
    }
    return parts, {"add_bos": known[0].add_bos}


def sentencepiece_json(
    metadata: dict[str, Any], tokens: list[str], types: list[int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The same for tokenizer.ggml.model "llama". Of each token, its merge is the pair by which BPE forms it."""
    scores, prefix = lookup(metadata, "scores", np.ndarray, ()), lookup(metadata, "add_space_prefix", bool, True)
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml has {len(tokens)} tokens and {len(scores)} scores")
    if lookup(metadata, "remove_extra_whitespaces", bool, False):
        raise ValueError("tokenizer.ggml.remove_extra_whitespaces is true, which is not supported")
    ranks = {text: -float(scores[i]) for i, text in enumerate(tokens) if types[i] == NORMAL}
    runs = space_merges([*ranks])
    ranks = {text: rank for text, rank in ranks.items() if len(text) > 1}
    if {ranks[a + b] for a, b in runs} != {max(ranks.values(), default=0)}:  # all the last
        runs = []
    mergeable = sorted(ranks.keys() - {a + b for a, b in runs}, key=ranks.__getitem__)
    if len({*map(ranks.__getitem__, mergeable)}) < len(mergeable):
        raise ValueError("tokenizer.ggml.scores has the same score for two tokens")
    merges = [hf.find_merge(text, ranks) for text in mergeable] + runs
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND] * prefix + [REPLACE]},
        "pre_tokenizer": None,
        "model": {"merges": [merge for merge in merges if merge], "byte_fallback": True, "fuse_unk": True},
        "decoder": {"type": "Sequence", "decoders": SENTENCEPIECE + [STRIP] * prefix},
    }
    return parts, {"bos": 1, "eos": 2, "unknown": 0, "add_bos": True}


def template_processing(before: bool, after: bool, special: dict[str, str], vocab: dict[str, int]) -> dict[str, Any]:
    """The post_processor that puts the bos token before a text and the eos token after it."""
    keys = ["bos_token"] * before + ["eos_token"] * after
    if missing := [key for key in keys if key not in special]:
        raise ValueError(f"a prompt gets a {missing[0]}, but there is none")
    tokens = [{"SpecialToken": {"id": special[key], "type_id": 0}} for key in keys]
    single, pair = (
        [*tokens[:before], *({"Sequence": {"id": name, "type_id": 0}} for name in names), *tokens[before:]]
        for names in ("A", "AB")
    )
    known = {text: {"id": text, "ids": [vocab[text]], "tokens": [text]} for text in (special[key] for key in keys)}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


# -----------------------------------------------------------------------------
# Read

MAGIC = b"GGUF"
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    start: int  # in the file
    nbytes: int


class Reader:
    """The metadata of a file, and where its tensors are. ValueError if it is damaged or of an unknown kind.

    Every size is compared with what is left of the file before anything is read or allocated.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with open(path, "rb") as self.file:
            self.size = os.fstat(self.file.fileno()).st_size
            if self.file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"{path} is not a GGUF file")
            try:
                self.read_header()
            except ValueError as e:  # also of UTF-8
                raise ValueError(f"{path} is damaged, or of a kind that is not supported: {e}") from e

    def read_header(self) -> None:
        version = self.scalar("I")
        if version not in (2, 3):  # of big-endian files, too
            raise ValueError(f"its version is {version}, but only 2 and 3 are supported")
        n_tensors, n_keys = self.scalar("Q"), self.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string()
            self.metadata[key] = self.value(self.scalar("I"))
        headers = {self.string(): self.tensor_header() for _ in range(n_tensors)}
        if len(headers) < n_tensors:
            raise ValueError("two tensors have the same name")
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        self.tensors = {name: self.locate(name, start, *header) for name, header in headers.items()}

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        position = self.file.tell()
        if n > self.size - position:
            raise ValueError(f"at byte {position}, it says that {n} more follow, but it ends at {self.size}")
        return self.file.read(n)

    def scalar(self, code: str) -> Any:
        [value] = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return shortest(value) if code == "f" else value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int) -> Any:
        """A value of metadata: an array of strings is a list, of numbers a numpy array."""
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
        raise ValueError(f"a value has the unknown type {kind}")

    def tensor_header(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset."""
        n = self.scalar("I")
        if n > 4:
            raise ValueError(f"a tensor has {n} dimensions")
        shape = tuple(reversed([self.scalar("Q") for _ in range(n)]))
        return shape, self.scalar("I"), self.scalar("Q")

    def locate(self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        gguf = package()
        try:
            kind = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (ValueError, NotImplementedError) as e:
            raise ValueError(f"{name} has the type {getattr(kind, 'name', kind)}, which is not supported") from e
        if not shape or shape[-1] % block:
            raise ValueError(f"{name} is {shape}, but its rows must be a multiple of {block} long")
        nbytes = reduce(int.__mul__, shape, block_bytes) // block
        if start + offset + nbytes > self.size:
            raise ValueError(f"{name} ends at byte {start + offset + nbytes}, but the file at {self.size}")
        return TensorInfo(shape, kind, start + offset, nbytes)

    def tensor(self, name: str) -> Tensor:
        """A tensor in the file's dtype, in float32 if it is quantized."""
        shape, kind, start, nbytes = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, nbytes, offset=start)
        if kind.name in DTYPES:
            return torch.from_numpy(data).view(getattr(torch, DTYPES[kind.name])).view(shape)
        return torch.from_numpy(package().dequantize(data.reshape(*shape[:-1], -1), kind)).view(shape)


DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> tuple[GPT, Tokenizer]:
    """The model in eval mode and its tokenizer, from a GGUF file.

    dtype: None is that of the file's matrices, float32 if they are quantized. Tensors are dequantized one by one.
    quantize: "int8" or "int4" (see weights.py), in which each tensor is quantized as it is read.
    ValueError for a file that is damaged or not supported, OSError if it is missing, ImportError without the extra.
    """
    reader = Reader(path)
    try:
        model, arch, names = find_model(reader)
        tokenizer = to_tokenizer(reader.metadata, arch.name)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: {e}") from e
    matrices = {reader.tensors[name].kind.name for name in names if len(reader.tensors[name].shape) > 1}
    dtypes = [getattr(torch, DTYPES.get(kind, "float32")) for kind in matrices]
    dtype = dtype or reduce(torch.promote_types, dtypes)
    state, (_, _, D) = model.state_dict(), model.config.heads

    def weights() -> Iterator[tuple[str, Tensor]]:
        for theirs in sorted(names, key=lambda name: -reader.tensors[name].nbytes):  # largest first, as in hf.py
            parts = reader.tensor(theirs).split([state[ours].size(0) for ours in names[theirs]])
            for ours, x in zip(names[theirs], parts, strict=True):
                x = hf.to_interleaved(x, D, False) if is_permuted(ours, arch) else x
                yield ours, x.to(device, dtype, copy=not quantize)

    fill(model, weights(), quantize)
    return model.eval(), tokenizer


def find_model(reader: Reader) -> tuple[GPT, Architecture, dict[str, list[str]]]:
    """A model without weights for the file's tensors, of which all names and shapes have been checked."""
    metadata, tensors = reader.metadata, reader.tensors
    name = metadata.get("general.architecture")
    arch = ARCHITECTURES.get(str(name))
    if arch is None or arch.name != name:
        known = ", ".join({arch.name: None for arch in ARCHITECTURES.values()})
        raise ValueError(f"general.architecture is {name!r}, but only {known} are supported")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError("it is one of several parts: llama-gguf-split --merge makes them one file")
    factors = reader.tensor(ROPE_FREQS) if arch.rope_freqs and ROPE_FREQS in tensors else None
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if metadata.get(n := f"{arch.name}.block_count") != len(layers):
        raise ValueError(f"{n} is {metadata.get(n)}, but there are tensors of {len(layers)} blocks")
    vocab_size = {f"{arch.name}.vocab_size": len(metadata.get("tokenizer.ggml.tokens", ()))}  # as in llama.cpp
    config = to_config(arch, metadata | vocab_size, "output.weight" not in tensors, factors)
    try:
        with torch.device("meta"):  # skips the initialization
            model = GPT(config)
    except (RuntimeError, TypeError, OverflowError) as e:
        raise ValueError(f"a model of its sizes is impossible: {str(e).partition(chr(10))[0]}") from e
    names, state = tensor_names(model, arch), model.state_dict()
    if missing := sorted(names.keys() - tensors.keys()):
        raise ValueError(f"{len(missing)} tensors are missing: {', '.join(missing[:3])}")
    if extra := sorted(tensors.keys() - names.keys() - {ROPE_FREQS if arch.rope_freqs else ""}):
        raise ValueError(f"{len(extra)} tensors are unexpected: {', '.join(extra[:3])}")
    for theirs, parts in names.items():
        expected = (sum(state[ours].size(0) for ours in parts), *state[parts[0]].shape[1:])
        if tensors[theirs].shape != expected:
            raise ValueError(f"{theirs} is {tensors[theirs].shape}, but {expected} by the metadata")
    return model, arch, names


# -----------------------------------------------------------------------------
# Write

FILE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # types of the matrices


def save(model: GPT, tokenizer: Tokenizer, path: str | Path, dtype: str | None = None) -> list[str]:
    """Write a new GGUF file, atomically. Returns notes on the texts of which llama.cpp makes other ids.

    dtype: of the matrices, a key of FILE_TYPES; None is the model's. Gains and biases are float32, as llama.cpp wants
    them. ValueError if it has no such model or tokenizer, FileExistsError if there is such a file.
    """
    gguf, path = package(), Path(path)
    name = FILE_TYPES.get(dtype or str(model.dtype).removeprefix("torch."), "F32")
    arch, metadata = to_metadata(model.config)
    tokenizer_metadata, notes = to_tokenizer_metadata(tokenizer, model.config.vocab_size)
    metadata |= {"general.name": path.stem, "general.quantization_version": 2} | tokenizer_metadata
    metadata["general.file_type"] = gguf.LlamaFileType[f"{'ALL' if name == 'F32' else 'MOSTLY'}_{name}"].value
    if path.exists():
        raise FileExistsError(f"{path} exists already: give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.tmp")
    try:
        with closing(gguf.GGUFWriter(temporary, arch.name)) as writer:
            write(writer, model, arch, metadata, gguf.GGMLQuantizationType[name])
            os.fsync(writer.fout[0].fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):  # it is still there if something failed
            os.remove(temporary)
    return notes


def write(writer: Any, model: GPT, arch: Architecture, metadata: dict[str, Any], kind: Any) -> None:
    """Header, metadata, and the tensors one by one: matrices in the type kind, all else in float32."""
    gguf, state, names = package(), dict(model.state_dict()), tensor_names(model, arch)
    if (factors := rope_factors(model.config)) is not None:
        state[ROPE_FREQS], names[ROPE_FREQS] = factors, [ROPE_FREQS]
    types, (_, _, D) = gguf.GGUFValueType, model.config.heads
    codes = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING, list: types.ARRAY}
    for key, value in metadata.items():
        writer.add_key_value(key, value, codes[type(value)])
    kinds = {}
    for theirs, ours in names.items():
        size = (sum(state[name].size(0) for name in ours), *state[ours[0]].shape[1:])
        kinds[theirs] = tensor_type(size, kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[theirs]]
        nbytes = math.prod(size) // block * block_bytes
        writer.add_tensor_info(theirs, size, np.dtype(np.float32), nbytes, kinds[theirs])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs, ours in names.items():
        parts = [hf.to_half_split(state[o], D, False) if is_permuted(o, arch) else state[o] for o in ours]
        writer.write_tensor_data(encode(torch.cat(parts), kinds[theirs]))
    writer.flush()


def tensor_type(size: tuple[int, ...], kind: Any) -> Any:
    """The type of a tensor: float32 for gains and biases, float16 for rows that do not divide into blocks."""
    gguf = package()
    if len(size) == 1:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.F16 if size[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def encode(x: Tensor, kind: Any) -> np.ndarray:
    """A tensor in a type of the file. ValueError if a value does not fit."""
    x = x.cpu()
    if kind.name in DTYPES:
        encoded = x.to(getattr(torch, DTYPES[kind.name])).contiguous()
        if not bool(encoded.isfinite().all()):
            raise ValueError(f"a weight is not finite in {DTYPES[kind.name]}: bfloat16 and float32 have a larger range")
        return encoded.view(torch.uint8).numpy()
    return package().quantize(x.float().contiguous().numpy(), kind)


# -----------------------------------------------------------------------------
# Command line


def export_checkpoint(source: str, path: Path, dtype: str | None) -> None:
    """Write a GGUF file from whatever `load_model` loads. RuntimeError if it cannot be written."""
    model, tokenizer, _ = load_model(source)
    with hf.writing(path):
        notes = save(model, tokenizer, path, dtype)
    for note in notes:
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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{export}")
    command = commands.add_parser(
        "export",
        help="checkpoint to GGUF file",
        description=f"Convert a checkpoint to a GGUF file.\nModel types: {', '.join(ARCHITECTURES)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint file, the out_dir of a training run, or hf:NAME_OR_DIR"
    )
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
    hf.report(lambda: export_checkpoint(args.checkpoint, args.file, None if args.dtype == "auto" else args.dtype))


if __name__ == "__main__":
    main()

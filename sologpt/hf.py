"""Hugging Face models, loaded and saved exactly.

    model, tokenizer = hf.load("HuggingFaceTB/SmolLM2-135M-Instruct")  # a name on the Hub, or a folder
    hf.save(model, tokenizer, "out/mine")  # a folder for transformers, vLLM, llama.cpp, ...

    python -m sologpt.hf import NAME_OR_DIR OUT_DIR [--dtype=bfloat16]
    python -m sologpt.hf import nanogpt:CKPT OUT_DIR [--tokenizer=gpt2]
    python -m sologpt.hf export CHECKPOINT NEW_DIR [--dtype=bfloat16]

A model that GPTConfig cannot express exactly is refused by a ValueError that names the key. Weights are read from
safetensors only, never from a pickle, and no code that comes with a model is run.
"""

import argparse
import base64
import functools
import itertools
import json
import math
import os
import re
import sys
import tempfile
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, AnyStr, NoReturn

import torch
from torch import Tensor

from gpt import GPT, GPTConfig
from sologpt.load import load_model
from sologpt.tokenizer import BYTE_LEVEL, EOT, PretrainedTokenizer, Tokenizer
from sologpt.weights import fill

# -----------------------------------------------------------------------------
# Tokenizers


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; its eos tokens are those of generation_config.json, else of config.json.

    ValueError if a file is missing or damaged, or if the tokenizer's decoder is not supported.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{folder} has no tokenizer.json; transformers converts a tokenizer.model or vocab.json to one: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    files = ("config", "generation_config", "special_tokens_map", "tokenizer_config")
    config, generation, special_tokens_map, tokenizer_config = (read_json(folder / f"{name}.json") for name in files)
    special_tokens = {}
    for key, token in (special_tokens_map | tokenizer_config).items():
        text = token.get("content") if isinstance(token, dict) else token
        if key.endswith("_token") and isinstance(text, str):
            special_tokens[key] = text
    eos: Any = generation.get("eos_token_id", config.get("eos_token_id"))
    eos = eos if isinstance(eos, list) else [eos]
    try:
        template = tokenizer_config.get("chat_template") or ""
        if isinstance(template, list):  # several templates, each with a name
            template = {each["name"]: each["template"] for each in template}.get("default", "")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        name, text = config.get("model_type", "tokenizers"), path.read_text(encoding="utf-8")
        return PretrainedTokenizer(name, text, special_tokens, eos, template)
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"the tokenizer in {folder} cannot be read: {e}") from e


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is no such file. ValueError if it holds anything else."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return value


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. ValueError if `tokenizers` would give other ids than ours."""
    config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, PretrainedTokenizer):
        text = tokenizer.tokenizer_json
        config |= tokenizer.special_tokens
        if tokenizer.chat_template:
            config["chat_template"] = tokenizer.chat_template
    else:
        text = tokenizer_json(tokenizer)
        config |= {"bos_token": EOT, "eos_token": EOT}
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


# Text on which two pre-tokenization patterns are likely to differ: cases, digits, apostrophes, whitespace, scripts
PROBE = (
    "It's I'LL we'Ve 's 'S 1 12 123 1234567890 x2 CamelCase ABC $99.50 f(x)[i]={};//--\r\n\r\n\tif a:\n        b  \n"
    " \n  c\n\n d\u00a0e\u3000f\u2028g café ÇA Straße \u017f \u212a ελληνικά Русский العربية १२३ 中文字 日本語かな ไทย "
    "한국어 e\u0301 \U0001f469\u200d\U0001f467  end \n "
)


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """A tokenizer.json (byte-level BPE) that gives the same ids as a `tiktoken.Encoding`. ValueError if there is none.

    tiktoken has a rank for each token, and merges the pair whose merged token has the lowest rank. The `tokenizers`
    library has a rank for each merge, a pair of tokens. The two agree because BPE forms each token by one merge only.
    """
    try:
        import tokenizers
        from tokenizers import Regex, decoders, models, pre_tokenizers
    except ImportError as e:
        raise ImportError("writing a tokenizer.json needs the extra 'hf': pip install tokenizers") from e
    d = tokenizer.to_dict()
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(d["tokens"]) if token is not None}
    characters = {byte: character for character, byte in BYTE_LEVEL.items()}
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [find_merge(token, ranks) for token in ranks if len(token) > 1]
    model = models.BPE(
        vocab={spelled[token]: rank for token, rank in ranks.items()} | d["special_tokens"],
        merges=[(spelled[a], spelled[b]) for a, b in filter(None, merges)],
        ignore_merges=None in merges,  # tiktoken looks a whole pre-token up first: no merges need to lead to it
    )
    # Oniguruma's syntax: $ would match at the end of any line, and {1,3}+ would be a repetition, not possessive
    pattern = re.sub(r"(\\p\{\w+\}\{\d+,\d+\})\+", r"(?>\1)", d["pattern"]).replace("$", r"\z")
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as e:  # the library raises plain Exceptions
        raise ValueError(f"the tokenizers library cannot read the pattern of {tokenizer.name}: {pattern}") from e
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in d["special_tokens"]])
    theirs.encode_special_tokens = True
    probe = PROBE + " ".join(d["special_tokens"])
    if theirs.encode(probe).ids != tokenizer.encode(probe):
        raise ValueError(f"the tokenizers library splits text differently by {tokenizer.name}'s pattern: {pattern}")
    return theirs.to_str(pretty=True)


def find_merge(token: AnyStr, ranks: Mapping[AnyStr, float]) -> tuple[AnyStr, AnyStr] | None:
    """The merge by which BPE forms a token, as the pair of tokens merged. None if BPE never forms it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
        if min(merged) > ranks[token]:
            return None
        i = merged.index(min(merged))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


# -----------------------------------------------------------------------------
# config.json to GPTConfig and back

CONFIG_KEYS = {  # config.json: GPTConfig
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_hidden",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "max_position_embeddings": "sequence_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embd",
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # config.json: GPTConfig.mlp
MAX_SIZE = 2**31  # products of two fit in an int64
DEFAULTS = dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, tie_word_embeddings=False)

# Keys that change the computation of any family, each with the only value that is supported
SUPPORTED: dict[str, Any] = dict(
    is_causal=True,
    partial_rotary_factor=1.0,
    original_max_position_embeddings=None,
    per_layer_config=None,
    quantization_config=None,
    compression_config=None,
    auto_map=None,  # the model's own code
)


MODULE_NAMES = {  # ours: theirs, for the whole model and within a block
    "wte": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
GPT2_NAMES = {
    "wte": "transformer.wte",
    "wpe": "transformer.wpe",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "attn_norm": "ln_1",
    "attn.c_q": "attn.c_attn",  # one matrix for the three
    "attn.c_k": "attn.c_attn",
    "attn.c_v": "attn.c_attn",
    "attn.c_proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
}
PARTS = {"attn.c_q": 0, "attn.c_k": 1, "attn.c_v": 2}  # of c_attn


@dataclass(frozen=True)
class Family:
    """A model_type of transformers, as its modeling file computes it."""

    architecture: str
    switches: dict[str, Any]  # GPTConfig fields that make GPT compute the same
    supported: dict[str, Any]  # like SUPPORTED
    defaults: dict[str, Any] = field(default_factory=dict)  # of keys that config.json may leave out
    config_keys: dict[str, str] = field(default_factory=lambda: CONFIG_KEYS)
    module_names: dict[str, str] = field(default_factory=lambda: MODULE_NAMES)
    block: str = "model.layers"  # the module that holds the blocks
    inverse_rotation: bool = False  # rotary positions rotate by the negative angle
    transposed: bool = False  # the blocks' matrices are (in, out)
    layer_types: str = "F*"  # what GPTConfig.layer_types may be, a regular expression


ROPE: dict[str, Any] = dict(norm="rms", bias=False, positions="rotary")
LLAMA = ROPE | dict(mlp="swiglu", qk_norm=False, embd_norm=False, norm_weight=True, qkv_bias=False, softcap=0.0)
GPT2: dict[str, Any] = LLAMA | dict(norm="layer", positions="learned")
del GPT2["mlp"], GPT2["bias"]  # GPT-2's models differ in these
FAMILIES = {
    "nanochat": Family(
        "NanoChatForCausalLM",
        ROPE | dict(mlp="relu2", qk_norm=True, embd_norm=True, norm_weight=False, qkv_bias=False),
        dict(hidden_act="relu2", attention_bias=False, sliding_window=None),
        dict(final_logit_softcapping=15.0),
        config_keys=CONFIG_KEYS | {"final_logit_softcapping": "softcap"},
        module_names=MODULE_NAMES | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
        inverse_rotation=True,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        LLAMA,
        dict(hidden_act="silu", attention_bias=False, mlp_bias=False, sliding_window=None),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA,
        dict(hidden_act="silu", layer_types=None),
        dict(num_key_value_heads=8, sliding_window=4096, use_sliding_window=True, max_window_layers=0),
        layer_types="F*|S*",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        LLAMA | dict(qkv_bias=True),
        dict(hidden_act="silu"),
        dict(num_key_value_heads=32, sliding_window=4096, max_window_layers=28),
        layer_types="[FS]*",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        LLAMA | dict(qk_norm=True),
        dict(hidden_act="silu", attention_bias=False),
        dict(num_key_value_heads=32, head_dim=128, sliding_window=4096, max_window_layers=28),
        layer_types="[FS]*",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        LLAMA,
        dict(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False),
        dict(num_key_value_heads=4, tie_word_embeddings=True, rope_theta=2e6, no_rope_layer_interval=4),
        layer_types="[FN]*",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        GPT2 | dict(bias=True),
        dict(
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            reorder_and_upcast_attn=False,
            add_cross_attention=False,
        ),
        dict(n_inner=None, activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True),
        config_keys={
            "vocab_size": "vocab_size",
            "n_positions": "sequence_len",
            "n_embd": "n_embd",
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_inner": "n_hidden",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embd",
            "activation_function": "mlp",
        },
        module_names=GPT2_NAMES,
        block="transformer.h",
        transposed=True,
    ),
}


def to_gpt_config(config_json: dict[str, Any]) -> GPTConfig:
    """The GPTConfig of a config.json. ValueError, with the key, if GPT cannot compute exactly the same."""
    family = FAMILIES.get(str(config_json.get("model_type")))
    if family is None:
        raise ValueError(f"model_type {config_json.get('model_type')!r} is not supported, only {', '.join(FAMILIES)}")
    config_json = DEFAULTS | family.defaults | config_json
    for key, value in (SUPPORTED | family.supported).items():
        if config_json.get(key, value) != value:
            raise ValueError(f"{key} is {config_json[key]!r}, but only {value!r} is supported")
    config_json["final_logit_softcapping"] = config_json.get("final_logit_softcapping") or 0.0  # null is off
    fields: dict[str, Any] = {}
    types = typing.get_type_hints(GPTConfig)
    for key, ours in family.config_keys.items():
        value, wanted = config_json.get(key), types[ours]
        if ours == "mlp":
            if value not in ACTIVATIONS:
                raise ValueError(f"{key} is {value!r}, but only {', '.join(ACTIVATIONS)} are supported")
            fields[ours] = ACTIVATIONS[value]
            continue
        right_type = isinstance(value, wanted | int) and isinstance(value, bool) == (wanted is bool)  # 1 may mean 1.0
        if not right_type or not abs(value or 0) < MAX_SIZE:
            raise ValueError(f"{key} has the wrong type or size: {value!r}")
        fields[ours] = value

    # transformers 5 writes rope_parameters. Before, rope_theta stood beside rope_scaling, and rope_type was once "type"
    rope = config_json.get("rope_scaling") or config_json.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters are {rope!r}, not an object")
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": config_json.get("rope_theta", 10_000.0)} | rope
    base = rope["rope_theta"]
    numbers = [x for x in rope.values() if isinstance(x, int | float)]
    if type(base) not in (int, float) or not all(x < MAX_SIZE**2 for x in numbers):
        raise ValueError(f"rope_theta or rope_parameters have the wrong type or size: {rope}")
    del rope["rope_theta"]
    rope.pop("type", None)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    rope_scaling = None if rope == {"rope_type": "default"} else rope
    config = GPTConfig(**fields | family.switches, rope_base=float(base), rope_scaling=rope_scaling)
    layer_types, window = read_layer_types(config_json, config.n_layer)
    if not re.fullmatch(family.layer_types, layer_types):
        raise ValueError(f"no_rope_layers is {config_json['no_rope_layers']!r}, but only None is supported")
    return replace(config, layer_types=layer_types, sliding_window=window)


def read_layer_types(config_json: dict[str, Any], n_layer: int) -> tuple[str, int | None]:
    """GPTConfig's layer_types and sliding_window. ValueError, with the key, if it has no such layers."""
    window = config_json.get("sliding_window") if config_json.get("use_sliding_window") else None
    if window is not None and not is_size(window):
        raise ValueError(f"sliding_window has the wrong type or size: {window!r}")
    full = n_layer if window is None else config_json["max_window_layers"]
    interval = config_json.get("no_rope_layer_interval", n_layer + 1)
    if type(full) is not int or not is_size(interval):
        raise ValueError(
            f"max_window_layers or no_rope_layer_interval has the wrong type or size: {full!r}, {interval!r}"
        )
    attention, ropes = config_json.get("layer_types"), config_json.get("no_rope_layers")
    if attention is None:
        attention = ["full_attention" if i < full else "sliding_attention" for i in range(n_layer)]
    if ropes is None:
        ropes = [int((i + 1) % interval != 0) for i in range(n_layer)]
    letters = {("full_attention", 1): "F", ("sliding_attention", 1): "S", ("full_attention", 0): "N"}
    try:
        each_layer = zip(attention, ropes[:n_layer], range(n_layer), strict=True)
        layer_types = "".join(letters[kind, rope] for kind, rope, _ in each_layer)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"layer_types {attention!r} with no_rope_layers {ropes!r} are not supported") from e
    if "S" in layer_types and window is None:
        raise ValueError(f"layer_types are {attention!r}, but there is no sliding_window")
    return layer_types, window if "S" in layer_types else None


def layer_keys(config: GPTConfig, family: Family) -> dict[str, Any]:
    """The inverse of `read_layer_types`, for a family that has more than full attention."""
    types, window = config.layer_types, config.sliding_window
    keys: dict[str, Any] = {}
    if "S" in family.layer_types:
        keys["sliding_window"] = window if "S" in types else None
    if family.layer_types == "[FS]*":
        names = {"F": "full_attention", "S": "sliding_attention"}
        keys |= dict(use_sliding_window="S" in types, layer_types=[names[letter] for letter in types])
        keys["max_window_layers"] = len(types.rstrip("S"))
    if "N" in family.layer_types:
        keys["no_rope_layers"] = [int(letter != "N") for letter in types]
    return keys


def is_size(x: Any) -> bool:
    return type(x) is int and 0 < x < MAX_SIZE


def to_hf_config(config: GPTConfig) -> dict[str, Any]:
    """The config.json of a GPTConfig. ValueError, with our field, if no model of transformers computes the same."""
    if config.sliding_window is None:  # then a sliding layer is a full one
        config = replace(config, layer_types=config.layer_types.replace("S", "F"))
    mismatches = {
        name: [key for key, value in family.switches.items() if getattr(config, key) != value]
        for name, family in FAMILIES.items()
    }
    for name, family in FAMILIES.items():
        if not re.fullmatch(family.layer_types, config.layer_types):
            mismatches[name].append("layer_types")
    if config.n_embd % config.n_head:  # LlamaConfig refuses it without need; mistral, otherwise the same, does not
        mismatches["llama"].append("n_head")
    if config.mlp not in ACTIVATIONS.values():
        mismatches["gpt2"].append("mlp")
    if config.heads != (config.n_head, config.n_head, config.n_embd // config.n_head):
        mismatches["gpt2"] += ["n_kv_head", "head_dim"]
    name = min(mismatches, key=lambda name: len(mismatches[name]))
    if mismatches[name]:
        differences = ", ".join(f"{key}={getattr(config, key)!r}" for key in mismatches[name])
        raise ValueError(f"transformers has no such model: the nearest is {name}, which does not have {differences}")
    family = FAMILIES[name]
    config_json: dict[str, Any] = {"architectures": [family.architecture], "model_type": name}
    config_json |= {key: getattr(config, ours) for key, ours in family.config_keys.items()}
    config_json |= {key: value for key, value in family.supported.items() if value is not None}
    config_json |= layer_keys(config, family)
    if config.positions == "learned":
        activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        return config_json | {"activation_function": activations[config.mlp]}
    if config_json.get("final_logit_softcapping") == 0:
        config_json["final_logit_softcapping"] = None
    # The older rotary keys: transformers 5 reads them too, and other programs know only these
    return config_json | {"rope_theta": config.rope_base, "rope_scaling": config.rope_scaling}


# -----------------------------------------------------------------------------
# Tensor names and layouts

ROTATED = {"attn.c_q", "attn.c_k", "attn.q_norm", "attn.k_norm"}  # rotary positions act on their output channels


@dataclass(frozen=True)
class TensorName:
    """A tensor of our state dict in a file of transformers."""

    ours: str
    theirs: str
    rotated: bool  # the rotary layout permutes it
    part: int | None  # which third of theirs it is
    transposed: bool  # theirs is (in, out)


def split_name(ours: str) -> tuple[str | None, str, str]:
    """The layer (None outside the blocks), the module within it, and weight or bias, of a name in our state dict."""
    return re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)", ours).groups()  # type: ignore[union-attr, return-value]


def tensor_names(model: GPT, family: Family) -> list[TensorName]:
    names = []
    for ours in model.state_dict():
        layer, module, kind = split_name(ours)
        theirs = f"{family.block}.{layer}." * bool(layer) + f"{family.module_names[module]}.{kind}"
        joined = family.module_names is GPT2_NAMES and module in PARTS
        rotated = module in ROTATED and model.config.positions == "rotary"
        transposed = family.transposed and kind == "weight" and ".c_" in module
        names.append(TensorName(ours, theirs, rotated, PARTS[module] if joined else None, transposed))
    return names


def from_theirs(x: Tensor, name: TensorName, D: int, inverse_rotation: bool) -> Tensor:
    """A tensor of theirs in our layout."""
    x = x.mT if name.transposed else x
    x = x if name.part is None else x.chunk(3)[name.part]
    return to_interleaved(x, D, inverse_rotation) if name.rotated else x


def to_theirs(state: dict[str, Tensor], names: list[TensorName], D: int, inverse_rotation: bool) -> dict[str, Tensor]:
    """Our state dict by their names, in their layout: the inverse of `from_theirs`."""
    weights: dict[str, Tensor] = {}
    for theirs in dict.fromkeys(name.theirs for name in names):
        parts = [name for name in names if name.theirs == theirs]  # in order
        tensors = [to_half_split(state[n.ours], D, inverse_rotation) if n.rotated else state[n.ours] for n in parts]
        x = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        weights[theirs] = (x.mT if parts[0].transposed else x).contiguous()
    return weights


def to_interleaved(x: Tensor, D: int, inverse_rotation: bool) -> Tensor:
    """From their half-split rotary layout, where channel i pairs with i + D/2, to ours, where 2i pairs with 2i + 1.

    Rotating a pair by the negative angle is rotating the swapped pair by the angle, so inverse_rotation swaps it.
    """
    x = x.unflatten(0, (-1, 2, D // 2)).transpose(1, 2)  # (heads, D/2, 2, ...)
    return (x.flip(2) if inverse_rotation else x).flatten(0, 2)


def to_half_split(x: Tensor, D: int, inverse_rotation: bool) -> Tensor:
    """The inverse of `to_interleaved`."""
    x = x.unflatten(0, (-1, D // 2, 2))  # (heads, D/2, 2, ...)
    return (x.flip(2) if inverse_rotation else x).transpose(1, 2).flatten(0, 2)


# -----------------------------------------------------------------------------
# Load

CONFIG_FILES = ["*config.json", "tokenizer.json", "special_tokens_map.json", "*.jinja", "model.safetensors.index.json"]
WEIGHT_FILES = ["model.safetensors", "model-*.safetensors"]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TensorInfo = tuple[Path, tuple[int, ...], str]  # file, shape, a key of DTYPES


def load(
    name_or_dir: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> tuple[GPT, Tokenizer]:
    """The model in eval mode and its tokenizer, from a folder or a name on the Hugging Face Hub.

    dtype: None keeps that of the weights. Tensors are read one by one, each straight to its device: peak memory is
    about one copy of the model. quantize: "int8" or "int4" quantizes each as it is read (see weights.py), and memory
    never holds more than the quantized model and one tensor. ValueError for a model that is not supported or damaged,
    OSError for a file that is missing or cannot be downloaded, ImportError for a missing extra.
    """
    folder = local_folder(name_or_dir, CONFIG_FILES)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no config.json: it is not the folder of a model")
    config_json = read_json(path)
    try:
        config = to_gpt_config(config_json)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: {e}") from e
    tokenizer = load_tokenizer(folder)
    local_folder(name_or_dir, WEIGHT_FILES)  # only now: no download for a model that is refused
    found = find_tensors(folder)
    if config.n_layer > len(found):  # building it would take for ever
        raise ValueError(f"{path}: num_hidden_layers is {config.n_layer}, but {folder} has {len(found)} tensors")
    try:
        with torch.device("meta"):  # skips the initialization
            model = GPT(config)
    except RuntimeError as e:
        raise ValueError(f"{path}: no tensor can be as large as it says") from e
    family = FAMILIES[config_json["model_type"]]
    weights = read_weights(folder, found, model, family, device, dtype, copy=not quantize)
    fill(model, weights, quantize)
    return model.eval(), tokenizer


def local_folder(name_or_dir: str | Path, patterns: list[str]) -> Path:
    """The folder itself or, for a name on the Hub, the one to which the files that match patterns are downloaded."""
    folder = Path(name_or_dir)
    if folder.is_dir():
        for path in folder.iterdir():
            if not path.is_file() and not path.is_dir():  # reading a FIFO would wait for ever
                raise ValueError(f"{path} is not a regular file")
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name_or_dir)):
        raise FileNotFoundError(f"there is no folder {name_or_dir}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ImportError(
            f"{name_or_dir} is not a folder; a download needs the extra 'hf': pip install huggingface_hub"
        ) from e
    try:
        return Path(snapshot_download(str(name_or_dir), allow_patterns=patterns))
    except Exception as e:  # half a dozen unrelated classes, from HTTP errors to an invalid name
        reason = " ".join(str(e).split())
        raise OSError(
            f"{name_or_dir} is not a folder and cannot be downloaded; without a network, give a folder: {reason}"
        ) from e


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Where each tensor of a folder's safetensors is. ValueError for a damaged file or an index that disagrees."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pth", ".gguf")]
        raise FileNotFoundError(
            f"{folder} has no model.safetensors{', only ' + ', '.join(others) if others else ''}: other formats are "
            "not read, and a pickle may run code; transformers converts to safetensors by save_pretrained"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ValueError(f"{index}: {file!r} is not the name of a safetensors file in that folder")
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        header = read_header(folder / file)
        mismatches = header.keys() ^ {name for name in weight_map if weight_map[name] == file}
        if mismatches:
            raise ValueError(f"{folder / file} and the index do not agree on {listed(mismatches)}")
        found |= header
    return found


def listed(names: Collection[str]) -> str:
    """The first of some names from a file, for a message: a newline in one is escaped."""
    return ", ".join(map(repr, sorted(names)[:3]))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. ValueError if it is damaged, ImportError without the extra."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise ImportError("reading safetensors needs the extra 'hf': pip install safetensors") from e
    try:
        with safe_open(path, framework="pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {name: (path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged: {e}") from e


def read_tensor(path: Path, name: str) -> Tensor:
    """A memory-mapped tensor. The file is opened anew for each, so that pages already read do not stay mapped."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        return f.get_tensor(name)


def read_weights(
    folder: Path,
    found: dict[str, TensorInfo],
    model: GPT,
    family: Family,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    copy: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each parameter of model, from a folder's safetensors; copy: not one that is memory-mapped.

    All names, shapes and dtypes are checked before the first is read.
    """
    names, state = tensor_names(model, family), model.state_dict()
    if "wte.weight" in found:  # GPT-2's own files
        names = [replace(name, theirs=name.theirs.removeprefix("transformer.")) for name in names]
    expected = {name.theirs for name in names}
    # Old checkpoints hold what is computed here: the rotary frequencies, or the causal mask
    computed = re.compile(r".*(\.rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")
    extra = {name for name in found.keys() - expected if not computed.fullmatch(name)}
    if missing := expected - found.keys():
        raise ValueError(f"{folder}: {len(missing)} tensors are missing: {listed(missing)}")
    if model.config.tie_embd and "lm_head.weight" in extra:
        both = ("lm_head.weight", next(name.theirs for name in names if name.ours == "wte.weight"))
        head, embedding = (read_tensor(found[name][0], name) for name in both)
        if not torch.equal(head, embedding):
            raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
        extra.remove("lm_head.weight")
    if extra:
        raise ValueError(f"{folder}: {len(extra)} tensors are unexpected: {listed(extra)}")
    _, _, D = model.config.heads
    for theirs, x in to_theirs(state, names, D, family.inverse_rotation).items():  # on the meta device: shapes alone
        path, shape, kind = found[theirs]
        if shape != x.shape:
            raise ValueError(f"{path}: {theirs} is {shape}, but {tuple(x.shape)} by config.json")
        if kind not in DTYPES:
            raise ValueError(f"{path}: {theirs} is {kind}, but only {', '.join(DTYPES)} are supported")

    dtype = dtype or functools.reduce(torch.promote_types, {DTYPES[found[theirs][2]] for theirs in expected})
    names.sort(key=lambda name: -state[name.ours].numel())  # largest first: two copies of it exist for a moment
    for name in names:
        x = from_theirs(read_tensor(found[name.theirs][0], name.theirs), name, D, family.inverse_rotation)
        yield name.ours, x.to(device, dtype, copy=copy, memory_format=torch.contiguous_format)


def load_nanogpt(path: str | Path, tokenizer: str = "gpt2", dtype: torch.dtype | None = None) -> tuple[GPT, Tokenizer]:
    """The model of a checkpoint of nanoGPT's train.py, in eval mode, and a tokenizer: see `Tokenizer.from_spec`.

    No code in the file is run. ValueError for a file that is no such checkpoint, OSError for a missing one.
    """
    with open(path, "rb") as f:
        try:
            checkpoint = torch.load(f, map_location="cpu", weights_only=True)
            args = checkpoint["model_args"]
            sizes = {key: args[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd", "bias", "dropout")}
            config = GPTConfig(args["block_size"], mlp="gelu", tie_embd=True, norm_eps=1e-5, **sizes, **GPT2)
            state = {name.removeprefix("_orig_mod."): x for name, x in checkpoint["model"].items()}
            if config.n_layer > len(state):
                raise ValueError("it has fewer tensors than layers")
            with torch.device("meta"):
                model = GPT(config)
            names = tensor_names(model, replace(FAMILIES["gpt2"], transposed=False))
            weights = {name.ours: from_theirs(state[name.theirs], name, 0, False).clone() for name in names}
            model.load_state_dict(weights, assign=True)
        except Exception as e:  # zip, pickle, a missing key, a shape
            raise ValueError(f"{path} is not a checkpoint of nanoGPT, or is damaged: {type(e).__name__}") from e
    found = Tokenizer.from_spec(tokenizer)
    if found.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer {tokenizer} has {found.vocab_size} tokens, {path} only {config.vocab_size}")
    return model.to(dtype=dtype).eval(), found


# -----------------------------------------------------------------------------
# Save


def export(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and the weights of the same model in transformers. ValueError if there is none."""
    config, (_, _, D), state = to_hf_config(model.config), model.config.heads, model.state_dict()
    family = FAMILIES[config["model_type"]]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    return config, to_theirs(state, tensor_names(model, family), D, family.inverse_rotation)


def save(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a new folder for AutoModelForCausalLM and AutoTokenizer, atomically.

    ValueError if transformers has no such model or tokenizer, FileExistsError if the folder is not new or empty.
    """
    folder = Path(folder).absolute()
    config, weights = export(model)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already: give a new or an empty folder")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as e:
        raise ImportError("writing safetensors needs the extra 'hf': pip install safetensors") from e
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        save_tokenizer(tokenizer, new)
        config |= special_token_ids(tokenizer)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        try:
            save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as e:  # a full disk
            raise OSError(str(e)) from e
        os.replace(new, folder)


def special_token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id of config.json."""
    eos = tokenizer.eos_tokens
    ids: dict[str, Any] = {"bos_token_id": tokenizer.eot, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    if isinstance(tokenizer, PretrainedTokenizer):
        texts = {key: tokenizer.special_tokens.get(key) for key in ("bos_token", "pad_token")}
        ids |= {f"{key}_id": tokenizer.backend.token_to_id(text) if text else None for key, text in texts.items()}
    return {"pad_token_id": None} | ids


# -----------------------------------------------------------------------------
# Command line


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """RuntimeError if path cannot be written. On a full disk, torch.save raises one itself."""
    try:
        yield
    except FileExistsError:  # the user's mistake
        raise
    except (OSError, RuntimeError) as e:
        raise RuntimeError(f"cannot write {path}: {e}") from e


def import_checkpoint(source: str, out_dir: Path, dtype: torch.dtype | None, tokenizer: str = "gpt2") -> None:
    """Write out_dir/best.pt from a Hugging Face model, or nanogpt:FILE. RuntimeError if it cannot be written."""
    path = out_dir / "best.pt"
    if path.exists():
        raise FileExistsError(f"{path} exists already: give another folder")
    if source.startswith("nanogpt:"):
        model, found = load_nanogpt(source.removeprefix("nanogpt:"), tokenizer, dtype)
    else:
        model, found = load(source, dtype=dtype)
    with writing(path):
        out_dir.mkdir(parents=True, exist_ok=True)
        model.save(path, tokenizer=found.to_dict(), step=0, source=source)
    print(f"wrote {path}: {model.num_params() / 1e6:.2f}M parameters in {model.dtype}")


def export_checkpoint(source: str | Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a Hugging Face folder from a checkpoint or an out_dir. RuntimeError if it cannot be written."""
    model, tokenizer, _ = load_model(source, dtype=dtype)
    with writing(folder):
        save(model, tokenizer, folder)
    print(f"wrote {folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m sologpt.hf",
        description="Convert a Hugging Face model to a soloGPT checkpoint, or a checkpoint to a Hugging Face model.",
        epilog=(
            "examples:\n"
            "  python -m sologpt.hf import HuggingFaceTB/SmolLM2-135M out/smollm2 --dtype=bfloat16\n"
            "  python -m sologpt.hf export out/smollm2/best.pt smollm2\n\n"
            "all options: python -m sologpt.hf import --help, python -m sologpt.hf export --help"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options = Parser(add_help=False)
    options.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the weights that are written; auto (the default) keeps the one they have",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{import,export}")
    command = commands.add_parser(
        "import",
        parents=[options],
        help="Hugging Face model, or nanoGPT's ckpt.pt, to checkpoint",
        description=f"Convert a Hugging Face model to a checkpoint.\nModel types: {', '.join(FAMILIES)}.",
        epilog=(
            "examples:\n"
            "  python -m sologpt.hf import HuggingFaceTB/SmolLM2-135M out/smollm2 --dtype=bfloat16\n"
            "  python -m sologpt.hf import nanogpt:out/ckpt.pt out/mine"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a name on the Hugging Face Hub, a model's folder (config.json, tokenizer.json, ...), or nanogpt:CKPT",
    )
    command.add_argument(
        "--tokenizer",
        default="gpt2",
        help="tokenizer of a nanoGPT checkpoint, which holds none: a tiktoken encoding (gpt2, the default), or bytes",
    )
    command.add_argument(
        "out_dir", metavar="OUT_DIR", type=Path, help="the folder that best.pt is written to; it must not hold one yet"
    )
    command = commands.add_parser(
        "export",
        parents=[options],
        help="checkpoint to Hugging Face model",
        description="Convert a checkpoint to a Hugging Face model, for transformers, vLLM, llama.cpp, ...",
        epilog="example:\n  python -m sologpt.hf export out/smollm2/best.pt smollm2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint file, or the out_dir of a training run")
    command.add_argument("new_dir", metavar="NEW_DIR", type=Path, help="the folder to write; it must be new or empty")
    return parser


def report(command: Callable[[], None]) -> None:
    """Run a command; its errors are one line on stderr and an exit status."""
    try:
        command()
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as e:
        message = " ".join(str(e).split()) or "out of memory"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1 if isinstance(e, RuntimeError | MemoryError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.command == "import":
        report(lambda: import_checkpoint(args.source, args.out_dir, dtype, args.tokenizer))
    else:
        report(lambda: export_checkpoint(args.checkpoint, args.new_dir, dtype))


if __name__ == "__main__":
    main()

"""Hugging Face models, loaded and saved exactly.

    model, tokenizer = hf.load("HuggingFaceTB/SmolLM2-135M-Instruct")  # a name on the Hub, or a folder
    hf.save(model, tokenizer, "out/mine")  # a folder for transformers, vLLM, llama.cpp, ...

    python -m sologpt.hf import NAME_OR_DIR OUT_DIR [--dtype=bfloat16]
    python -m sologpt.hf import nanogpt:CKPT OUT_DIR [--tokenizer=gpt2]
    python -m sologpt.hf export CHECKPOINT NEW_DIR [--dtype=bfloat16]

A model that GPTConfig cannot express exactly is refused by a UserError, which names the key. Weights are read
from safetensors only, never from a pickle. No code that comes with a model is run.
"""

import argparse
import base64
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, AnyStr, NamedTuple, NoReturn

import torch
from torch import Tensor

from gpt import GPT, Device, Dtype, GPTConfig, in_float32
from sologpt import errors
from sologpt.errors import UserError
from sologpt.load import (
    MAX_NUMBER,
    check_rope_scaling,
    check_value,
    empty_model,
    find_source,
    load_model,
    make_config,
    read_sampling,
    widest,
)
from sologpt.quantize import fill
from sologpt.tokenizer import BYTE_LEVEL, PretrainedTokenizer, Tokenizer, refused

# -----------------------------------------------------------------------------
# Tokenizers


def load_tokenizer(folder: Path, name: str = "") -> PretrainedTokenizer:
    """Return the tokenizer of a model's folder. UserError if it is missing, damaged or not supported.

    name: how to call it, if not as the folder.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(
            f"{folder} has no tokenizer.json; transformers converts a tokenizer.model or vocab.json to one: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    config = read_json(folder / "config.json")
    generation_config = read_json(folder / "generation_config.json")
    special_tokens_map = read_json(folder / "special_tokens_map.json")
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    special_tokens = {}
    for key, token in (special_tokens_map | tokenizer_config).items():
        text = token.get("content") if isinstance(token, dict) else token
        if key.endswith("_token") and isinstance(text, str):
            special_tokens[key] = text
    eos: Any = generation_config.get("eos_token_id", config.get("eos_token_id"))
    eos_tokens = eos if isinstance(eos, list) else [eos]
    try:
        template = tokenizer_config.get("chat_template") or ""
        if isinstance(template, list):  # several templates, each with a name
            template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        name = name or folder.resolve().name
        text = path.read_text(encoding="utf-8")
        sampling = read_sampling(generation_config)
        return PretrainedTokenizer(name, text, special_tokens, eos_tokens, template, sampling)
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"the tokenizer in {folder} cannot be read: {e}") from e


def read_json(path: Path) -> dict:
    """Return the object in a JSON file, {} if there is no such file. UserError if it holds anything else."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged: {e}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. UserError if `tokenizers` would give other ids."""
    config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, PretrainedTokenizer):
        text = tokenizer.tokenizer_json
    else:
        text = tokenizer_json(tokenizer)
    config |= tokenizer.special_tokens
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


# Patterns of pre-tokenization differ on upper and lower case, digits, apostrophes, whitespace and scripts
PROBE = (
    "It's I'LL we'Ve 's 'S 1 12 123 1234567890 x2 CamelCase ABC $99.50 f(x)[i]={};//--\r\n\r\n\tif a:\n      "
    "  b  \n \n  c\n\n d\u00a0e\u3000f\u2028g café ÇA Straße \u017f \u212a ελληνικά Русский العربية १२३ "
    "中文字 日本語かな ไทย 한국어 e\u0301 \U0001f469\u200d\U0001f467  end \n "
)


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return a byte-level tokenizer.json with the ids of a `tiktoken.Encoding`. UserError if there is none.

    tiktoken ranks tokens: it merges the pair whose merged token has the lowest rank. The `tokenizers` library
    ranks merges, which are pairs of tokens. The two agree because BPE forms each token by one merge only.
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
        merges=[(spelled[merge[0]], spelled[merge[1]]) for merge in merges if merge],
        ignore_merges=None in merges,  # like tiktoken, look a whole pre-token up before merging
    )
    # In Oniguruma's syntax, $ matches at the end of any line, and {1,3}+ is a repetition, not possessive
    pattern = re.sub(r"(\\p\{\w+\}\{\d+,\d+\})\+", r"(?>\1)", d["pattern"]).replace("$", r"\z")
    with refused(f"the tokenizers library cannot read {tokenizer.name}'s pattern {pattern}", quiet=True):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs = tokenizers.Tokenizer(model)
        theirs.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        theirs.decoder = decoders.ByteLevel()
        special = [tokenizers.AddedToken(text, normalized=False) for text in d["special_tokens"]]
        theirs.add_special_tokens(special)
        theirs.encode_special_tokens = True
        probe = PROBE + " ".join(d["special_tokens"])
        same = theirs.encode(probe).ids == tokenizer.encode(probe)
    if not same:
        raise UserError(f"the tokenizers library splits text differently than {tokenizer.name}: {pattern}")
    return theirs.to_str(pretty=True)


def find_merge(token: AnyStr, ranks: Mapping[AnyStr, float]) -> tuple[AnyStr, AnyStr] | None:
    """Return the pair of tokens that BPE merges to form a token. None if BPE never forms it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest > ranks[token]:
            return None
        i = pair_ranks.index(lowest)
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
GPT2_CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "n_positions": "sequence_len",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_inner": "n_hidden",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embd",
    "activation_function": "mlp",
}
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}  # activation_function: mlp
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
GEMMA_NAMES = MODULE_NAMES | {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
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
    layer_types: str = "F*"  # a regular expression: the GPTConfig.layer_types that it can have
    is_gemma: bool = False  # gains are 1 + w, queries have a scale, windowed layers a rotary base


ROPE: dict[str, Any] = dict(norm="rms", bias=False, positions="rotary", embd_scale=False, post_norm=False)
PLAIN: dict[str, Any] = dict(qk_norm=False, embd_norm=False, norm_weight=True, qkv_bias=False, softcap=0.0)
LLAMA = ROPE | dict(mlp="swiglu") | PLAIN
GPT2 = PLAIN | dict(norm="layer", positions="learned", embd_scale=False, post_norm=False)  # any mlp, bias
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
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        LLAMA | dict(mlp="geglu", qk_norm=True, embd_scale=True, post_norm=True),
        dict(
            hidden_activation="gelu_pytorch_tanh",
            attention_bias=False,
            use_bidirectional_attention=False,
            final_logit_softcapping=None,
            attn_logit_softcapping=None,
        ),
        dict(
            num_key_value_heads=4,
            head_dim=256,
            tie_word_embeddings=True,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            use_sliding_window=True,
            max_window_layers=0,
            sliding_window_pattern=6,
        ),
        module_names=GEMMA_NAMES,
        layer_types="[FS]*",
        is_gemma=True,
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
        config_keys=GPT2_CONFIG_KEYS,
        module_names=GPT2_NAMES,
        block="transformer.h",
        transposed=True,
    ),
}


def to_gpt_config(config_json: dict[str, Any]) -> GPTConfig:
    """Return the GPTConfig of a config.json. UserError, with the key, if GPT cannot compute the same."""
    model_type = config_json.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UserError(f"model_type {model_type!r} is not supported, only {', '.join(FAMILIES)}")
    config_json = DEFAULTS | family.defaults | config_json
    if config_json.get("sliding_window") in (0, -1):  # off, in configs that other programs write
        config_json["sliding_window"] = None
    for key, value in (SUPPORTED | family.supported).items():
        if config_json.get(key, value) != value:
            raise UserError(f"{key} is {config_json[key]!r}, but only {value!r} is supported")
    config_json["final_logit_softcapping"] = config_json.get("final_logit_softcapping") or 0.0  # null is off
    values = dict(family.switches)
    for key, ours in family.config_keys.items():
        value = config_json.get(key)
        if ours == "mlp":
            value = ACTIVATIONS.get(str(value))
            if value is None:
                supported = ", ".join(ACTIVATIONS)
                raise UserError(f"{key} is {config_json[key]!r}, but only {supported} are supported")
        check_value(ours, value, key)
        values[ours] = value
    values |= read_gemma_rope(config_json) if family.is_gemma else read_rope(config_json)
    values |= read_layer_types(config_json, values["n_layer"], family)
    return make_config(values)


def read_rope(config_json: dict[str, Any]) -> dict[str, Any]:
    """Return GPTConfig's rope_base and rope_scaling. UserError, with the key, if GPT has no such scaling."""
    # transformers 5 writes rope_parameters. Older: rope_scaling beside rope_theta, with type for rope_type
    key = "rope_scaling" if config_json.get("rope_scaling") else "rope_parameters"
    rope = config_json.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{key} is {rope!r}, not an object")
    rope = {"rope_type": rope.get("type", "default")} | rope
    rope.pop("type", None)
    base = rope.pop("rope_theta", config_json.get("rope_theta", 10_000.0))
    check_value("rope_base", base, "rope_theta")
    if rope.get("partial_rotary_factor") in (None, 1):
        rope.pop("partial_rotary_factor", None)
    if rope["rope_type"] == "default":  # transformers ignores the numbers beside it
        others = [name for name, x in rope.items() if isinstance(x, dict) or name == "partial_rotary_factor"]
        if others:
            raise UserError(f"{key}: rope_type 'default' with {list_names(others)} is not supported")
        return {"rope_base": float(base), "rope_scaling": None}
    if rope["rope_type"] == "yarn":
        rope = read_yarn(rope, config_json.get("max_position_embeddings"))
    check_rope_scaling(rope, key)
    return {"rope_base": float(base), "rope_scaling": rope}


def read_yarn(rope: dict[str, Any], max_position: Any) -> dict[str, Any]:
    """Return YaRN's scaling with the numbers that transformers fills in for missing ones."""
    given = {key: value for key, value in rope.items() if value is not None}
    if given.pop("truncate", True) is not True:
        raise UserError(f"truncate is {rope['truncate']!r} in YaRN's scaling, but only True is supported")
    scales = given.pop("mscale", 0), given.pop("mscale_all_dim", 0)
    scaling = dict(original_max_position_embeddings=max_position, beta_fast=32.0, beta_slow=1.0) | given
    if "attention_factor" not in scaling:
        numbers = [scaling.get("factor"), *scales]
        if not all(type(x) in (int, float) and 0 <= x < MAX_NUMBER for x in numbers):
            raise UserError(f"factor, mscale and mscale_all_dim of YaRN's scaling are {numbers}")
        log = 0.1 * math.log(max(numbers[0], 1))
        above, below = scales if all(scales) else (1, 0)
        scaling["attention_factor"] = (above * log + 1) / (below * log + 1)
    return scaling


def read_gemma_rope(config_json: dict[str, Any]) -> dict[str, Any]:
    """`read_rope` where windowed layers have a base of their own, by older and newer keys."""
    both = config_json.get("rope_parameters") or {}
    try:
        full, windowed = (dict(both.get(f"{kind}_attention") or {}) for kind in ("full", "sliding"))
        full |= config_json.get("rope_scaling") or {}
    except (AttributeError, TypeError, ValueError) as e:
        raise UserError(f"rope_parameters are {both!r}, not objects") from e
    base = windowed.pop("rope_theta", config_json["rope_local_base_freq"])
    check_value("rope_base", base, "rope_local_base_freq")
    if windowed.pop("rope_type", "default") != "default" or windowed:
        raise UserError(f"sliding_attention has the rope_parameters {both['sliding_attention']!r}")
    values = read_rope({**config_json, "rope_scaling": None, "rope_parameters": full})
    return values | {"window_rope_base": float(base)}


def query_scale(config_json: dict[str, Any], head_dim: int) -> float:
    """Return what queries are multiplied by, beside those of a model whose scores are / sqrt(head_dim)."""
    scalar = config_json.get("query_pre_attn_scalar", 256)
    if type(scalar) not in (int, float) or not 0 < scalar < MAX_NUMBER:
        raise UserError(f"query_pre_attn_scalar has the wrong type or size: {scalar!r}")
    return math.sqrt(head_dim / scalar)


def read_layer_types(config_json: dict[str, Any], n_layer: int, family: Family) -> dict[str, Any]:
    """Return GPTConfig's layer_types and sliding_window. UserError, with the key, for unsupported ones."""
    window = config_json.get("sliding_window") if config_json.get("use_sliding_window") else None
    check_value("sliding_window", window, "sliding_window")
    n_full = n_layer if window is None else config_json.get("max_window_layers")
    interval = config_json.get("no_rope_layer_interval", n_layer + 1)
    if type(n_full) is not int:
        raise UserError(f"max_window_layers has the wrong type: {n_full!r}")
    if type(interval) is not int or interval < 1:
        raise UserError(f"no_rope_layer_interval has the wrong type or size: {interval!r}")
    attention = config_json.get("layer_types")
    ropes = config_json.get("no_rope_layers")  # 1: the layer has rotary positions
    if attention is None and family.is_gemma:
        period = config_json["sliding_window_pattern"]
        if type(period) is not int or period < 1:
            raise UserError(f"sliding_window_pattern has the wrong type or size: {period!r}")
        kinds = ("full_attention", "sliding_attention")
        attention = [kinds[(i + 1) % period > 0] for i in range(n_layer)]
    if attention is None:
        attention = ["full_attention" if i < n_full else "sliding_attention" for i in range(n_layer)]
    if ropes is None:
        ropes = [int((i + 1) % interval != 0) for i in range(n_layer)]
    letters = {("full_attention", 1): "F", ("sliding_attention", 1): "S", ("full_attention", 0): "N"}
    try:
        pairs = zip(attention, ropes[:n_layer], strict=True)
        layer_types = "".join(letters[kind, rope] for kind, rope in pairs)
        supported = len(layer_types) == n_layer and re.fullmatch(family.layer_types, layer_types)
    except (KeyError, TypeError, ValueError):
        supported = False
    if not supported:
        raise UserError(f"layer_types {attention!r} with no_rope_layers {ropes!r} are not supported")
    if "S" not in layer_types:
        window = None
    elif window is None:
        raise UserError(f"layer_types are {attention!r}, but there is no sliding_window")
    return {"layer_types": layer_types, "sliding_window": window}


def write_layer_types(config: GPTConfig, family: Family) -> dict[str, Any]:
    """Return the keys that `read_layer_types` reads, for a family that has more than full attention."""
    layer_types = config.layer_types
    keys: dict[str, Any] = {}
    if "S" in family.layer_types:
        keys["sliding_window"] = config.sliding_window if "S" in layer_types else None
    if family.layer_types == "[FS]*":
        names = {"F": "full_attention", "S": "sliding_attention"}
        keys["layer_types"] = [names[letter] for letter in layer_types]
    if family.layer_types == "[FS]*" and not family.is_gemma:
        keys["use_sliding_window"] = "S" in layer_types
        keys["max_window_layers"] = len(layer_types.rstrip("S"))
    if "N" in family.layer_types:
        keys["no_rope_layers"] = [int(letter != "N") for letter in layer_types]
    return keys


def to_hf_config(config: GPTConfig) -> dict[str, Any]:
    """Return the config.json of a GPTConfig. UserError, with our field, if transformers has no such model."""
    if config.sliding_window is None:  # then a sliding layer is a full one
        config = replace(config, layer_types=config.layer_types.replace("S", "F"))
    mismatches = {name: find_mismatches(config, name) for name in FAMILIES}
    name = min(mismatches, key=lambda name: len(mismatches[name]))
    if mismatches[name]:
        differences = ", ".join(f"{key}={getattr(config, key)!r}" for key in mismatches[name])
        raise UserError(f"transformers has no such model: the nearest is {name}, which has no {differences}")
    family = FAMILIES[name]
    config_json: dict[str, Any] = {"architectures": [family.architecture], "model_type": name}
    config_json |= {key: getattr(config, ours) for key, ours in family.config_keys.items()}
    config_json |= {key: value for key, value in family.supported.items() if value is not None}
    config_json |= write_layer_types(config, family)
    if config.positions == "learned":
        activations = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
        return config_json | {"activation_function": activations[config.mlp]}
    if family.is_gemma:
        config_json["query_pre_attn_scalar"] = config.head_dim
        config_json["rope_local_base_freq"] = config.window_rope_base
        config_json["sliding_window"] = config.sliding_window or config.sequence_len  # transformers needs one
    if config_json.get("final_logit_softcapping") == 0:
        config_json["final_logit_softcapping"] = None
    # The older rotary keys: transformers 5 reads them too, and other programs know only these
    return config_json | {"rope_theta": config.rope_base, "rope_scaling": config.rope_scaling}


def find_mismatches(config: GPTConfig, model_type: str) -> list[str]:
    """Return the fields of a GPTConfig that this family does not have."""
    family = FAMILIES[model_type]
    fields = [key for key, value in family.switches.items() if getattr(config, key) != value]
    if not re.fullmatch(family.layer_types, config.layer_types):
        fields.append("layer_types")
    if (config.window_rope_base is not None) != family.is_gemma:
        fields.append("window_rope_base")
    if model_type == "llama" and config.n_embd % config.n_head:  # LlamaConfig refuses it, mistral's does not
        fields.append("n_head")
    if model_type == "gpt2":
        square = (config.n_head, config.n_embd // config.n_head)
        if config.mlp not in ACTIVATIONS.values():
            fields.append("mlp")
        if (config.n_kv_head, config.head_dim) != square:
            fields += ["n_kv_head", "head_dim"]
    return fields


# -----------------------------------------------------------------------------
# Tensor names and layouts

ROTATED = ("attn.c_q", "attn.c_k", "attn.q_norm", "attn.k_norm")  # rotary positions act on their rows


@dataclass(frozen=True)
class TensorName:
    """A tensor of our state dict in a file of transformers, and how the layouts differ."""

    ours: str
    theirs: str
    part: int | None  # which third of theirs it is
    transposed: bool  # theirs is (in, out)
    head_dim: int | None  # of the rotary layout that permutes its rows
    inverse_rotation: bool
    gain: float | None  # ours is gain * (1 + theirs)


def split_name(ours: str) -> tuple[str | None, str, str]:
    """Split a name in our state dict into the layer (None outside the blocks), the module, weight or bias."""
    match = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)", ours)
    assert match is not None
    return match[1], match[2], match[3]


def tensor_names(model: GPT, family: Family) -> list[TensorName]:
    names = []
    for ours in model.state_dict():
        layer, module, kind = split_name(ours)
        prefix = "" if layer is None else f"{family.block}.{layer}."
        theirs = f"{prefix}{family.module_names[module]}.{kind}"
        part = PARTS.get(module) if family.module_names is GPT2_NAMES else None
        transposed = family.transposed and kind == "weight" and ".c_" in module
        rotated = module in ROTATED and model.config.positions == "rotary"
        head_dim = model.config.head_dim if rotated else None
        gain = 1.0 if family.is_gemma and module.endswith("norm") else None
        names.append(TensorName(ours, theirs, part, transposed, head_dim, family.inverse_rotation, gain))
    return names


def from_theirs(x: Tensor, name: TensorName) -> Tensor:
    """Return a tensor of theirs in our layout."""
    if name.transposed:
        x = x.mT
    if name.part is not None:
        x = x.chunk(3)[name.part]
    if name.head_dim is not None:
        x = to_interleaved(x, name.head_dim, name.inverse_rotation)
    if name.gain is not None:
        x = name.gain * (1 + in_float32(x))
    return x


def to_theirs(state: dict[str, Tensor], names: list[TensorName]) -> dict[str, Tensor]:
    """Return our state dict by their names, in their layout: the inverse of `from_theirs`."""
    parts: dict[str, list[Tensor]] = {}
    for name in names:
        x = state[name.ours]
        if name.head_dim is not None:
            x = to_half_split(x, name.head_dim, name.inverse_rotation)
        if name.gain is not None:
            x = (in_float32(x) / name.gain - 1).to(x.dtype)
        parts.setdefault(name.theirs, []).append(x)  # in order
    transposed = {name.theirs for name in names if name.transposed}
    weights = {}
    for theirs, tensors in parts.items():
        x = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        weights[theirs] = (x.mT if theirs in transposed else x).contiguous()
    return weights


def to_interleaved(x: Tensor, D: int, inverse_rotation: bool) -> Tensor:
    """Permute rows from their half-split rotary layout, which pairs i with i + D/2, to ours, 2i with 2i + 1.

    Rotating a pair by the negative angle is rotating the swapped pair by the angle: inverse_rotation swaps.
    """
    x = x.unflatten(0, (-1, 2, D // 2)).transpose(1, 2)  # (heads, D/2, 2, ...)
    return (x.flip(2) if inverse_rotation else x).flatten(0, 2)


def to_half_split(x: Tensor, D: int, inverse_rotation: bool) -> Tensor:
    """The inverse of `to_interleaved`."""
    x = x.unflatten(0, (-1, D // 2, 2))  # (heads, D/2, 2, ...)
    return (x.flip(2) if inverse_rotation else x).transpose(1, 2).flatten(0, 2)


# -----------------------------------------------------------------------------
# Load

CONFIG_FILES = [
    "*config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "*.jinja",
    "*.safetensors.index.json",
]
WEIGHT_FILES = ["model.safetensors", "model-*.safetensors"]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorInfo(NamedTuple):
    path: Path  # of its safetensors file
    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES, if it is supported


def load(
    name_or_dir: str | Path, device: Device = None, dtype: Dtype = None, quantize: str | None = None
) -> tuple[GPT, Tokenizer]:
    """Return the model in eval mode and its tokenizer, from a folder or a name on the Hugging Face Hub.

    dtype: None keeps that of the weights. quantize: "int8" or "int4" (see sologpt/quantize.py). Tensors are
    read and quantized one by one, each straight to its device: peak memory is little more than the result's.
    UserError for a model that is damaged or not supported, OSError for a file that is missing or cannot be
    downloaded, ImportError for a missing extra.
    """
    folder = local_folder(name_or_dir, CONFIG_FILES)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no config.json: it is not the folder of a model")
    config_json = read_json(path)
    try:
        config = to_gpt_config(config_json)
        scale = query_scale(config_json, config.head_dim)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    tokenizer = load_tokenizer(folder, Path(name_or_dir).resolve().name)
    local_folder(name_or_dir, WEIGHT_FILES)  # only now: no download for a model that is refused
    found = find_tensors(folder)
    if config.n_layer > len(found):  # building all the layers would take forever
        raise UserError(f"{path}: num_hidden_layers is {config.n_layer}, but there are {len(found)} tensors")
    try:
        model = empty_model(config)
    except RuntimeError as e:
        raise UserError(f"{path}: no tensor can be as large as it says") from e
    family = FAMILIES[config_json["model_type"]]
    names = tensor_names(model, family)
    prefix = family.block.partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in found):  # saved without its head, by AutoModel
        names = [replace(name, theirs=name.theirs.removeprefix(prefix)) for name in names]
    if config.post_norm:  # Gemma's
        names = [replace(name, gain=scale) if "q_norm" in name.ours else name for name in names]
    check_tensors(folder, found, names, model)
    fill(model, read_weights(found, names, device, dtype), quantize)
    return model.eval(), tokenizer


HUB_ERRORS = {  # of huggingface_hub, whose messages are long
    "LocalEntryNotFoundError": "the Hugging Face Hub cannot be reached; without a network, give a folder",
    "RepositoryNotFoundError": "the Hugging Face Hub has no model of that name, or it is private",
    "GatedRepoError": "accept its licence on its page on the Hugging Face Hub, then run: hf auth login",
}


def local_folder(name_or_dir: str | Path, patterns: list[str]) -> Path:
    """Return the folder itself or, for a name on the Hub, download the files that match and return theirs."""
    folder = Path(name_or_dir)
    if folder.is_dir():
        for path in folder.iterdir():
            if not path.is_file() and not path.is_dir():  # reading a FIFO would wait forever
                raise UserError(f"{path} is not a regular file")
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name_or_dir)):
        raise FileNotFoundError(f"there is no folder {name_or_dir}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ImportError(
            f"downloading {name_or_dir} needs the extra 'hf': pip install huggingface_hub"
        ) from e
    try:
        return Path(snapshot_download(str(name_or_dir), allow_patterns=patterns))
    except Exception as e:  # half a dozen unrelated classes, from HTTP errors to an invalid name
        reason = HUB_ERRORS.get(type(e).__name__) or " ".join(str(e).split()).partition(". ")[0]
        raise OSError(f"{name_or_dir} is not a folder here, and cannot be downloaded: {reason}") from e


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors in a folder's safetensors. UserError for a damaged file or a wrong index."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pth", ".gguf")]
        only = f", only {', '.join(others)}" if others else ""
        raise FileNotFoundError(
            f"{folder} has no model.safetensors{only}: other formats are not read, and a pickle may run "
            "code; transformers converts to safetensors by save_pretrained"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise UserError(f"{index}: {file!r} is not the name of a safetensors file in that folder")
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        header = read_header(folder / file)
        mismatches = header.keys() ^ {name for name in weight_map if weight_map[name] == file}
        if mismatches:
            raise UserError(f"{folder / file} and the index do not agree on {list_names(mismatches)}")
        found |= header
    return found


def list_names(names: Collection[str]) -> str:
    """List some of the names from a file, for a message. A newline in one is escaped."""
    return ", ".join(map(repr, sorted(names)[:3]))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors in one safetensors file. UserError if it is damaged."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise ImportError("reading safetensors needs the extra 'hf': pip install safetensors") from e
    tensors = {}
    try:
        with safe_open(path, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118
                info = f.get_slice(name)
                tensors[name] = TensorInfo(path, tuple(info.get_shape()), info.get_dtype())
    except SafetensorError as e:
        raise UserError(f"{path} is damaged: {e}") from e
    return tensors


# Tensors that are computed, but are saved in older files: rotary frequencies, the causal mask
COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias)")


def check_tensors(folder: Path, found: dict[str, TensorInfo], names: list[TensorName], model: GPT) -> None:
    """Raise UserError unless names, shapes and dtypes are those of the model, which is on the meta device."""
    expected = to_theirs(model.state_dict(), names)
    missing = expected.keys() - found.keys()
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing: {list_names(missing)}")
    unexpected = {name for name in found.keys() - expected.keys() if not COMPUTED.fullmatch(name)}
    if model.config.tie_embd and "lm_head.weight" in unexpected:
        embedding = next(name.theirs for name in names if name.ours == "wte.weight")
        if not torch.equal(read_tensor(found, "lm_head.weight"), read_tensor(found, embedding)):
            raise UserError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
        unexpected.remove("lm_head.weight")
    if unexpected:
        raise UserError(f"{folder}: {len(unexpected)} tensors are unexpected: {list_names(unexpected)}")
    for name, x in expected.items():
        path, shape, dtype = found[name]
        if shape != x.shape:
            raise UserError(f"{path}: {name} is {shape}, but {tuple(x.shape)} by config.json")
        if dtype not in DTYPES:
            raise UserError(f"{path}: {name} is {dtype}, but only {', '.join(DTYPES)} are supported")


def read_weights(
    found: dict[str, TensorInfo], names: list[TensorName], device: Device, dtype: Dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each parameter. Tensors may be memory-mapped, and transposed."""
    dtype = dtype or widest(DTYPES[found[name.theirs].dtype] for name in names)
    # Largest first: two copies of it exist for a moment
    for name in sorted(names, key=lambda name: -math.prod(found[name.theirs].shape)):
        x = from_theirs(read_tensor(found, name.theirs), name)
        yield name.ours, x.to(device, dtype)


def read_tensor(found: dict[str, TensorInfo], name: str) -> Tensor:
    """Return a memory-mapped tensor. Opening the file anew for each unmaps the pages of those before."""
    from safetensors import safe_open

    with safe_open(found[name].path, framework="pt") as f:
        return f.get_tensor(name)


# -----------------------------------------------------------------------------
# Save


def export(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config.json and the weights of the same model in transformers. UserError if it has none."""
    config = to_hf_config(model.config)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    names = tensor_names(model, FAMILIES[config["model_type"]])
    return config, to_theirs(model.state_dict(), names)


def save(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a new folder for AutoModelForCausalLM and AutoTokenizer, atomically.

    UserError if transformers has no such model or tokenizer, FileExistsError if the folder is not empty.
    """
    target = Path(folder).absolute()
    config, weights = export(model)
    for name, x in weights.items():
        check_finite(name, x)
    config |= special_token_ids(tokenizer)
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_empty:
        raise FileExistsError(f"{target} exists already: give a new or an empty folder")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as e:
        raise ImportError("writing safetensors needs the extra 'hf': pip install safetensors") from e
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    with errors.writing(folder), tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as temporary:
        new = Path(temporary) / target.name
        new.mkdir()
        save_tokenizer(tokenizer, new)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer.sampling:
            generation = special_token_ids(tokenizer) | tokenizer.sampling | {"do_sample": True}
            (new / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        try:
            save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as e:  # a full disk
            raise OSError(str(e)) from e
        # safetensors lets nobody but its owner read the file
        shutil.copymode(new / "config.json", new / "model.safetensors")
        os.replace(new, target)


def check_finite(name: str, x: Tensor) -> None:
    """Raise UserError, with the name, for a weight that is NaN or infinite."""
    if not x.isfinite().all():
        ranges = "bfloat16 and float32 have a larger range than float16"
        raise UserError(f"{name} has a weight that is not finite in {x.dtype}: {ranges}")


def special_token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return bos_token_id, eos_token_id and pad_token_id of config.json."""
    eos = tokenizer.eos_tokens
    ids: dict[str, Any] = {"pad_token_id": None, "bos_token_id": tokenizer.eot}
    ids["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    if isinstance(tokenizer, PretrainedTokenizer):
        for key in ("bos_token", "pad_token"):
            text = tokenizer.special_tokens.get(key)
            ids[f"{key}_id"] = tokenizer.backend.token_to_id(text) if text else None
    return ids


# -----------------------------------------------------------------------------
# Command line


def import_checkpoint(source: str, out_dir: Path, dtype: Dtype, tokenizer: str = "gpt2") -> None:
    """Write out_dir/best.pt from a Hugging Face model, or nanogpt:FILE."""
    path = out_dir / "best.pt"
    if path.exists():
        raise FileExistsError(f"{path} exists already: give another folder")
    if source.startswith("nanogpt:"):
        from sologpt.nanogpt import load_nanogpt  # not at the top: it imports this module

        model, its_tokenizer = load_nanogpt(source.removeprefix("nanogpt:"), tokenizer, dtype)
    else:
        is_known = find_source(source)[0] != ""
        model, its_tokenizer, _ = load_model(source if is_known else f"hf:{source}", dtype=dtype)
    out_dir.mkdir(parents=True, exist_ok=True)
    with errors.writing(path):
        model.save(path, tokenizer=its_tokenizer.to_dict(), step=0, source=source)
    print(f"wrote {path}: {model.num_params() / 1e6:.2f}M parameters in {model.dtype}")


def export_checkpoint(source: str | Path, folder: Path, dtype: Dtype) -> None:
    """Write a Hugging Face folder from a checkpoint or an out_dir."""
    model, tokenizer, _ = load_model(source, dtype=dtype)
    save(model, tokenizer, folder)
    print(f"wrote {folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it")


SOURCE = "a checkpoint, a run's folder, hf:NAME, gguf:FILE or gpt2"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line and whose help keeps its line breaks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m sologpt.hf",
        description="Convert a Hugging Face model to a soloGPT checkpoint, or the other way round.",
        epilog=(
            "examples:\n"
            "  python -m sologpt.hf import HuggingFaceTB/SmolLM2-135M out/smollm2 --dtype=bfloat16\n"
            "  python -m sologpt.hf export out/smollm2/best.pt smollm2\n\n"
            "all options: python -m sologpt.hf import --help, python -m sologpt.hf export --help"
        ),
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
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a name on the Hugging Face Hub, a model's folder, gguf:FILE, or nanogpt:CKPT",
    )
    command.add_argument(
        "--tokenizer",
        default="gpt2",
        help="tokenizer of a nanoGPT checkpoint, which holds none: bytes, or tiktoken's (default: gpt2)",
    )
    command.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="the folder in which to write best.pt")
    command = commands.add_parser(
        "export",
        parents=[options],
        help="checkpoint to Hugging Face model",
        description="Convert a checkpoint to a Hugging Face model, for transformers, vLLM, llama.cpp, ...",
        epilog="example:\n  python -m sologpt.hf export out/smollm2/best.pt smollm2",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help=SOURCE)
    command.add_argument("new_dir", metavar="NEW_DIR", type=Path, help="the folder to write, new or empty")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.command == "import":
        import_checkpoint(args.source, args.out_dir, dtype, args.tokenizer)
    else:
        export_checkpoint(args.checkpoint, args.new_dir, dtype)


if __name__ == "__main__":
    errors.run(main)

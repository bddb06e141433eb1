"""Hugging Face checkpoints in and out.

model, tokenizer = hf.load("HuggingFaceTB/SmolLM2-135M-Instruct")  # or a folder
hf.save(model, tokenizer, "out/mine")

python hf.py import NAME_OR_DIR out/x [--dtype=bfloat16]
python hf.py export out/x/best.pt DIR
"""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import configurator
from configurator import RunError, UserError
from gpt import GPT, GPTConfig
from sologpt.tokenizer import BYTE_LEVEL, EOT, PretrainedTokenizer, Tokenizer

# -----------------------------------------------------------------------------
# Tokenizers


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, with the ids that end a text (generation_config.json's, else config.json's).

    ValueError for a file that is missing or damaged, or for a tokenizer that decodes in a way of its own.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{folder} has no tokenizer.json; transformers makes one of a tokenizer.model or a vocab.json: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    files = ("config", "generation_config", "special_tokens_map", "tokenizer_config")
    config, generation, special_map, said = (read_json_if_any(folder / f"{name}.json") for name in files)
    special = {}
    for key, token in (special_map | said).items():
        text = token.get("content") if isinstance(token, dict) else token
        if key.endswith("_token") and isinstance(text, str):
            special[key] = text
    eos: Any = generation.get("eos_token_id", config.get("eos_token_id"))
    eos = eos if isinstance(eos, list) else [eos]
    try:
        template = said.get("chat_template") or ""
        if isinstance(template, list):  # of several, each with a name
            template = {each["name"]: each["template"] for each in template}.get("default", "")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        name, text = config.get("model_type", "tokenizers"), path.read_text(encoding="utf-8")
        return PretrainedTokenizer(name, text, special, eos, template)
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"the tokenizer in {folder} cannot be read: {e}") from e


def read_json_if_any(path: Path) -> dict:
    """The object in a JSON file, {} if there is no such file; ValueError if there is something else in it."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return value


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder, for AutoTokenizer, vLLM and llama.cpp.

    ValueError if the `tokenizers` library would give other ids than ours.
    """
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


# Text that two ways to cut it into pieces would cut differently: cases, digits, apostrophes, white space, scripts
PROBE = (
    "It's I'LL we'Ve 's 'S 1 12 123 1234567890 x2 CamelCase ABC $99.50 f(x)[i]={};//--\r\n\r\n\tif a:\n        b  \n"
    " \n  c\n\n d\u00a0e\u3000f\u2028g café ÇA Straße \u017f \u212a ελληνικά Русский العربية १२३ 中文字 日本語かな ไทย "
    "한국어 e\u0301 \U0001f469\u200d\U0001f467  end \n "
)


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json that gives the ids of a `tiktoken.Encoding`. ValueError if there is none.

    tiktoken ranks the tokens and joins whichever pair makes the lowest; the `tokenizers` library ranks the pairs. They
    agree because a token comes about from one pair only: what is left of its bytes once all that ranks lower is joined.
    """
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    d = tokenizer.to_dict()
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(d["tokens"]) if token is not None}
    letters = {byte: letter for letter, byte in BYTE_LEVEL.items()}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = [last_pair(token, ranks) for token in ranks if len(token) > 1]
    model = models.BPE(
        vocab={spelled[token]: rank for token, rank in ranks.items()} | d["special_tokens"],
        merges=[(spelled[a], spelled[b]) for a, b in filter(None, pairs)],
        ignore_merges=None in pairs,  # a piece of text that is a token is that token, even if no joining leads to it
    )
    # Of Oniguruma's dialect: $ is the end of any line, and {1,3}+ repeats
    pattern = re.sub(r"(\\p\{\w+\}\{\d+,\d+\})\+", r"(?>\1)", d["pattern"]).replace("$", r"\z")
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as e:  # the library has no narrower class
        raise ValueError(f"the pattern of {tokenizer.name} means nothing to the tokenizers library: {pattern}") from e
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in d["special_tokens"]])
    theirs.encode_special_tokens = True
    probe = PROBE + " ".join(d["special_tokens"])
    if theirs.encode(probe).ids != tokenizer.encode(probe):
        raise ValueError(f"the pattern of {tokenizer.name} means something else to the tokenizers library: {pattern}")
    return theirs.to_str(pretty=True)


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that byte pair encoding joins to make token, or None if it never does."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
        if min(joined) > ranks[token]:
            return None
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


# -----------------------------------------------------------------------------
# Models: what is the same in their config and ours

KEYS = {  # of config.json, and the fields of GPTConfig
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
DEFAULTS = dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, tie_word_embeddings=False)

# Keys that change what any of the models computes, each with the one value that we have
FIXED: dict[str, Any] = dict(
    is_causal=True,
    partial_rotary_factor=1.0,
    original_max_position_embeddings=None,
    per_layer_config=None,
    quantization_config=None,
    compression_config=None,
    auto_map=None,  # code of its own
)


@dataclass(frozen=True)
class Family:
    """A model_type of transformers, as read from its modeling file."""

    architecture: str
    switches: dict[str, Any]  # fields of GPTConfig that make ours the same
    fixed: dict[str, Any]  # as FIXED, for this one
    defaults: dict[str, Any] = field(default_factory=dict)  # of keys that a config.json may leave out
    keys: dict[str, str] = field(default_factory=dict)  # as KEYS, for this one
    names: dict[str, str] = field(default_factory=dict)  # as NAMES, for this one
    clockwise: bool = False  # positions turn the channels by the negative of the angle


LLAMA = dict(mlp="swiglu", qk_norm=False, embd_norm=False, norm_weight=True, qkv_bias=False, softcap=0.0)
FAMILIES = {
    "nanochat": Family(
        "NanoChatForCausalLM",
        dict(mlp="relu2", qk_norm=True, embd_norm=True, norm_weight=False, qkv_bias=False),
        dict(hidden_act="relu2", attention_bias=False, sliding_window=None),
        dict(final_logit_softcapping=15.0),
        keys={"final_logit_softcapping": "softcap"},
        names={"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
        clockwise=True,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        LLAMA,
        dict(hidden_act="silu", attention_bias=False, mlp_bias=False, sliding_window=None),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA,
        dict(hidden_act="silu", sliding_window=None),
        dict(num_key_value_heads=8, sliding_window=4096),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        LLAMA | dict(qkv_bias=True),
        dict(hidden_act="silu", use_sliding_window=False),
        dict(num_key_value_heads=32),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        LLAMA | dict(qk_norm=True),
        dict(hidden_act="silu", attention_bias=False, use_sliding_window=False),
        dict(num_key_value_heads=32, head_dim=128),
    ),
}


def to_gpt_config(said: dict[str, Any]) -> GPTConfig:
    """The GPTConfig that computes what a config.json says. ValueError, with the key, if there is none."""
    family = FAMILIES.get(str(said.get("model_type")))
    if family is None:
        raise ValueError(f"model_type {said.get('model_type')!r} is none of {', '.join(FAMILIES)}")
    said = DEFAULTS | family.defaults | said
    for key, value in (FIXED | family.fixed).items():
        if said.get(key, value) != value:
            raise ValueError(f"{key} is {said[key]!r}, and soloGPT has only {value!r}")
    if {*(said.get("layer_types") or [])} - {"full_attention"}:
        raise ValueError(f"layer_types are {said['layer_types']!r}, and soloGPT has only 'full_attention'")
    said["final_logit_softcapping"] = said.get("final_logit_softcapping") or 0.0  # none is null there, and 0 here
    fields, kinds = {}, typing.get_type_hints(GPTConfig)
    for key, ours in (KEYS | family.keys).items():
        if not isinstance(said.get(key), kinds[ours] | int):  # in JSON, a float may be without its .0
            raise ValueError(f"{key} is {said.get(key)!r}")
        fields[ours] = said[key]

    # transformers 5 has rope_parameters; before, rope_theta stood beside rope_scaling, whose rope_type was once "type"
    rope = said.get("rope_scaling") or said.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"the rotary positions are {rope!r}")
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": said.get("rope_theta", 10_000.0)} | rope
    base = rope.pop("rope_theta")
    if not isinstance(base, int | float):
        raise ValueError(f"rope_theta is {base!r}")
    rope.pop("type", None)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    rope_scaling = None if rope == {"rope_type": "default"} else rope
    return GPTConfig(**fields | family.switches, rope_base=float(base), rope_scaling=rope_scaling)


def to_hf_config(config: GPTConfig) -> dict[str, Any]:
    """The config.json of the model that computes what ours does. ValueError, with our switch, if there is none."""
    unlike = {
        name: [key for key, value in family.switches.items() if getattr(config, key) != value]
        for name, family in FAMILIES.items()
    }
    if config.n_embd % config.n_head:
        unlike["llama"].append("n_head")  # LlamaConfig checks it for no need; mistral, else the same, does not
    name = min(unlike, key=lambda name: len(unlike[name]))
    if unlike[name]:
        differences = ", ".join(f"{key}={getattr(config, key)!r}" for key in unlike[name])
        raise ValueError(f"transformers has no such model: the nearest is {name}, but for {differences}")
    family = FAMILIES[name]
    said: dict[str, Any] = {"architectures": [family.architecture], "model_type": name}
    said |= {key: getattr(config, ours) for key, ours in (KEYS | family.keys).items()} | family.fixed
    if said.get("final_logit_softcapping") == 0:
        said["final_logit_softcapping"] = None
    # The older keys of the positions: transformers 5 reads them too, and other programs know no others
    return said | {"rope_theta": config.rope_base, "rope_scaling": config.rope_scaling}


# -----------------------------------------------------------------------------
# Models: what is the same in their weights and ours

# Their modules by the names of ours: of the whole model, and of a block
NAMES = {
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
TURNED = {"attn.c_q", "attn.c_k", "attn.q_norm", "attn.k_norm"}  # by rotary positions, in pairs of channels


def table(model: GPT, family: Family) -> list[tuple[str, str, bool]]:
    """Of each tensor: its name here, its name there, and whether its channels stand in another order there."""
    rows = []
    for ours in model.state_dict():
        layer, module, kind = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)", ours).groups()  # type: ignore[union-attr]
        block = f"model.layers.{layer}." if layer else ""
        rows.append((ours, f"{block}{(NAMES | family.names)[module]}.{kind}", module in TURNED))
    return rows


def to_pairs(x: Tensor, D: int, clockwise: bool) -> Tensor:
    """From their order to ours: there channel i of a head turns with i + D/2, here 2i with 2i + 1.

    To turn by the negative of an angle is to swap the two, turn, and swap them back.
    """
    x = x.unflatten(0, (-1, 2, D // 2)).transpose(1, 2)  # (heads, D/2, 2, ...)
    return (x.flip(2) if clockwise else x).flatten(0, 2)


def to_halves(x: Tensor, D: int, clockwise: bool) -> Tensor:
    """From our order to theirs."""
    x = x.unflatten(0, (-1, D // 2, 2))  # (heads, D/2, 2, ...)
    return (x.flip(2) if clockwise else x).transpose(1, 2).flatten(0, 2)


# -----------------------------------------------------------------------------
# In

TEXTS = ["*config.json", "tokenizer.json", "special_tokens_map.json", "*.jinja", "model.safetensors.index.json"]
WEIGHTS = ["model.safetensors", "model-*.safetensors"]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(
    name_or_dir: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[GPT, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a folder, or of a name on the Hugging Face Hub.

    dtype: None keeps that of the weights. Tensors are read one by one, each straight to where it stays, so that the
    peak of memory is about one copy of the model. ValueError for a model that ours cannot be exactly, or a damaged
    one; OSError for files that cannot be had; ImportError, with the name of the extra, for a missing package.
    """
    folder = find_folder(name_or_dir, TEXTS)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no config.json: it is not the folder of a model")
    said = read_json_if_any(path)
    try:
        config = to_gpt_config(said)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: {e}") from e
    tokenizer = load_tokenizer(folder)
    find_folder(name_or_dir, WEIGHTS)  # what is refused has been refused before they are downloaded
    with torch.device("meta"):  # no memory and no time for initial values
        model = GPT(config)
    model.load_state_dict(read_weights(folder, model, FAMILIES[said["model_type"]], device, dtype), assign=True)
    return model.eval(), tokenizer


def find_folder(name_or_dir: str | Path, patterns: list[str]) -> Path:
    """The folder, or, for a name on the Hub, the one that it is downloaded to: the files like patterns."""
    if Path(name_or_dir).is_dir():
        return Path(name_or_dir)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ImportError(f"there is no folder {name_or_dir}; to download it, pip install huggingface_hub") from e
    try:
        return Path(snapshot_download(str(name_or_dir), allow_patterns=patterns))
    except Exception as e:  # of half a dozen classes, from HTTP to the name's spelling
        reason = " ".join(str(e).split())
        raise OSError(
            f"{name_or_dir} is no folder and cannot be downloaded (without a network, a folder works): {reason}"
        ) from e


def find_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """The file, shape and dtype of each tensor in a folder's safetensors. ValueError if they are not as they should."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return look_into(whole)
    if not index.exists():
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pth", ".gguf")]
        raise FileNotFoundError(
            f"{folder} has no model.safetensors{', only ' + ', '.join(others) if others else ''}: no other kind of "
            "weights is read, least of all a pickle, which may run code"
        )
    weight_map = read_json_if_any(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {file!r} is not the name of a safetensors file in that folder")
    found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for file in sorted(set(weight_map.values())):
        inside = look_into(folder / file)
        astray = sorted(inside.keys() ^ {name for name in weight_map if weight_map[name] == file})
        if astray:
            raise ValueError(f"{folder / file}: the index does not agree about {', '.join(astray[:3])}")
        found |= inside
    return found


def look_into(path: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise ImportError("an open model's weights need the extra 'hf': pip install safetensors") from e
    try:
        with safe_open(path, framework="pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {name: (path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged: {e}") from e


def read_tensor(path: Path, name: str) -> Tensor:
    """A view of the file: opened anew for each, so that what has been read does not stay mapped to memory."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        return f.get_tensor(name)


def read_weights(
    folder: Path, model: GPT, family: Family, device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The state dict of model, from a folder's safetensors. What can be wrong with them is found before any is read."""
    found, rows, state = find_tensors(folder), table(model, family), model.state_dict()
    wanted = {theirs for _, theirs, _ in rows}
    extra = {name for name in found.keys() - wanted if not name.endswith("rotary_emb.inv_freq")}  # an old, computed one
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"{folder}: {len(missing)} tensors are missing: {', '.join(missing[:3])}")
    if model.config.tie_embd and "lm_head.weight" in extra:
        both = ("lm_head.weight", "model.embed_tokens.weight")
        head, embedding = (read_tensor(found[name][0], name) for name in both)
        if not torch.equal(head, embedding):
            raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
        extra.remove("lm_head.weight")
    if extra:
        raise ValueError(f"{folder}: {len(extra)} tensors have no place: {', '.join(sorted(extra)[:3])}")
    for ours, theirs, _ in rows:
        path, shape, kind = found[theirs]
        if shape != state[ours].shape:
            raise ValueError(f"{path}: {theirs} is {shape}, where config.json makes it {tuple(state[ours].shape)}")
        if kind not in DTYPES:
            raise ValueError(f"{path}: {theirs} is {kind}, and soloGPT has only {', '.join(DTYPES)}")

    dtype = dtype or functools.reduce(torch.promote_types, {DTYPES[found[theirs][2]] for theirs in wanted})
    rows.sort(key=lambda row: -state[row[0]].numel())  # the largest first, while there is room for two of it
    weights, (_, _, D) = {}, model.config.heads
    for ours, theirs, turned in rows:
        x = read_tensor(found[theirs][0], theirs)
        weights[ours] = (to_pairs(x, D, family.clockwise) if turned else x).to(device, dtype, copy=True)
    return weights


# -----------------------------------------------------------------------------
# Out


def export(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and the weights of the same model in transformers. ValueError if it has none."""
    config, (_, _, D), state = to_hf_config(model.config), model.config.heads, model.state_dict()
    family = FAMILIES[config["model_type"]]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    weights = {
        theirs: (to_halves(state[ours], D, family.clockwise) if turned else state[ours]).contiguous()
        for ours, theirs, turned in table(model, family)
    }
    return config, weights


def save(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a new folder that AutoModelForCausalLM and AutoTokenizer open: whole, or not at all.

    ValueError if transformers has no such model, or no such tokenizer; FileExistsError if something is there already.
    """
    folder = Path(folder).absolute()
    config, weights = export(model)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already: give a new folder, or an empty one")
    try:
        from safetensors.torch import save_file
    except ImportError as e:
        raise ImportError("writing safetensors needs the extra 'hf': pip install safetensors") from e
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        save_tokenizer(tokenizer, new)
        (new / "config.json").write_text(json.dumps(config | special_ids(tokenizer), indent=2) + "\n", encoding="utf-8")
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        os.replace(new, folder)


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json says of the tokens that begin and end a text, and that pad it."""
    eos = tokenizer.eos_tokens
    ids: dict[str, Any] = {"bos_token_id": tokenizer.eot, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    if isinstance(tokenizer, PretrainedTokenizer):
        texts = {key: tokenizer.special_tokens.get(key) for key in ("bos_token", "pad_token")}
        ids |= {f"{key}_id": tokenizer.backend.token_to_id(text) if text else None for key, text in texts.items()}
    return {"pad_token_id": None} | ids


# -----------------------------------------------------------------------------
# The command line


@dataclass
class Config:
    dtype: str = "auto"  # of the weights: float32, bfloat16, float16, or auto for what they are

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16, float16 or auto, not {self.dtype!r}")


def import_checkpoint(source: str, out_dir: Path, dtype: torch.dtype | None) -> None:
    path = out_dir / "best.pt"
    if path.exists():
        raise UserError(f"{path} is there already: give another folder")
    try:
        model, tokenizer = load(source, dtype=dtype)
    except (ValueError, OSError, ImportError) as e:
        raise UserError(str(e)) from e
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        model.save(path, tokenizer=tokenizer.to_dict(), step=0, source=source)
    except (OSError, RuntimeError) as e:  # torch.save has RuntimeErrors of its own for a full disk
        raise RunError(f"cannot write {path}: {e}") from e
    print(f"{model.num_params() / 1e6:.2f}M parameters in {model.dtype}: python sample.py --ckpt={path}")


def export_checkpoint(path: Path, folder: Path, dtype: torch.dtype | None) -> None:
    try:
        model, extra = GPT.load_checkpoint(path, dtype=dtype)
        tokenizer = Tokenizer.from_dict(extra["tokenizer"])
    except (OSError, ImportError) as e:
        raise UserError(f"cannot read the checkpoint {path}: {e}") from e
    except (RuntimeError, KeyError, ValueError) as e:
        raise RunError(f"{path} is no checkpoint of train.py, or is damaged") from e
    try:
        save(model, tokenizer, folder)
    except (ValueError, ImportError, FileExistsError) as e:
        raise UserError(str(e)) from e
    except OSError as e:
        raise RunError(f"cannot write {folder}: {e}") from e
    print(f"AutoModelForCausalLM.from_pretrained({str(folder)!r}) opens it")


def main() -> None:
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    config = configurator.parse(Config, sys.argv[1 + len(words) :])
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    match words:
        case ["import", source, out_dir]:
            import_checkpoint(source, Path(out_dir), dtype)
        case ["export", path, folder]:
            export_checkpoint(Path(path), Path(folder), dtype)
        case _:
            raise UserError("say python hf.py import NAME_OR_DIR OUT_DIR, or python hf.py export CHECKPOINT NEW_DIR")


if __name__ == "__main__":
    configurator.run(main)

"""A model and its tokenizer from a checkpoint, a run's folder, Hugging Face or a GGUF file.

    model, tokenizer, about = load_model("out/tiny")  # or "out/tiny/best.pt", "hf:HuggingFaceTB/SmolLM2-135M"

Files come from strangers: no code in them is run, and their sizes are checked before memory is allocated.
"""

import functools
import importlib
import os
import re
import reprlib
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import torch
from torch import Tensor

import sologpt.quantize
from gpt import GPT, Device, Dtype, GPTConfig, Sampling
from sologpt.device import HUGE_PAGES, pick_device
from sologpt.errors import RunError, UserError
from sologpt.tokenizer import Tokenizer

SHORT_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # nanoGPT's, for hf:NAME

# -----------------------------------------------------------------------------
# Any source


def load_model(
    source: Path | str,
    device: Device = None,
    dtype: Dtype = None,
    quantize: str | None = None,
    adapter: Path | str | None = None,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return the model in eval mode, its tokenizer, and a dict of what else is known about it.

    source: a checkpoint, a run's folder, "hf:NAME", "gguf:FILE" or a short name; see `find_source`.
    device: None is the CPU; for "auto" see `pick_device`. dtype: None keeps that of the weights.
    quantize: "int8" or "int4", for inference on the CPU (see sologpt/quantize.py).
    adapter: the folder of an adapter in PEFT's format, which is merged into the model (see sologpt/peft.py).
    The dict holds "source", the file or name that was read, and what else is in a checkpoint: "step", ...

    OSError for a file that is missing or unreadable, UserError for a bad source or device, ImportError for a
    missing extra, RunError for a checkpoint that is damaged or has no tokenizer.
    """
    if adapter:
        from sologpt.peft import load_adapter  # not at the top: it imports this module

        model, tokenizer, about = load_model(source, device, dtype)
        load_adapter(model, adapter)
        if quantize:
            sologpt.quantize.quantize(model, quantize)
        return model, tokenizer, about | {"adapter": str(adapter)}
    device = None if device is None else pick_device(device)
    kind, name = find_source(source)
    if kind:
        module = importlib.import_module(f"sologpt.{kind}")  # not at the top: it imports this module
        model, tokenizer = module.load(name, device, dtype, quantize)
        print_notes(model, tokenizer)
        return model, tokenizer, {"source": f"{kind}:{name}"}

    path = Path(name)
    if path.is_dir():
        path = find_checkpoint(path)
    if not path.exists():
        older = newest(path.parent.glob(f"old-*/{path.name}"))
        hint = f", but an earlier run's {older}" if older else ""
        wanted = "give a checkpoint, a run's folder, hf:NAME or gguf:FILE"
        raise FileNotFoundError(f"there is no checkpoint {path.resolve()}{hint}: {wanted}")
    try:
        model, about = load_checkpoint(path, device, dtype)
    except OSError as e:
        raise OSError(f"cannot read the checkpoint {path}: {e.strerror or e}") from e
    if "tokenizer" not in about:
        raise RunError(
            f"{path} holds no tokenizer: save it with model.save(PATH, tokenizer=tokenizer.to_dict())"
        )
    tokenizer = read_tokenizer(path, about.pop("tokenizer"))
    print_notes(model, tokenizer)
    if quantize:
        sologpt.quantize.quantize(model, quantize)
    return model, tokenizer, about | {"source": str(path)}


def find_source(source: Path | str) -> tuple[str, str]:
    """Return the kind of a source, and its name or path: "hf", "gguf", or "" for a checkpoint and its folder.

    The folder of a Hugging Face model and a file X.gguf need no prefix. "gpt2" and the like are names on the
    Hub, unless there is such a file. ~ is the home folder.
    """
    text = str(source)
    kind, _, name = text.partition(":")
    if kind in ("hf", "gguf"):
        return kind, os.path.expanduser(name)
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        return "gguf", str(path)
    is_out_dir = (path / "best.pt").exists() or (path / "ckpt.pt").exists()
    is_hf = not is_out_dir and (path / "config.json").exists() and any(path.glob("*.safetensors"))
    if is_hf or (text in SHORT_NAMES and not path.exists()):
        return "hf", str(path)
    return "", str(path)


def print_notes(model: GPT, tokenizer: Tokenizer) -> None:
    """Say that Gemma's activations do not fit into float16, and that texts may have tokens that it lacks."""
    if model.config.embd_scale and model.dtype == torch.float16:
        print("note: Gemma's activations overflow float16: take bfloat16", file=sys.stderr)
    size = model.config.vocab_size
    # A special token beyond them is harmless: texts never have it. Gemma's tokenizer has one for images
    lacking = [i for i in tokenizer.ids - {*tokenizer.special_ids.values()} if i >= size]
    if lacking:
        of = f"{len(lacking)} tokens of {tokenizer.name}, from id {min(lacking)}"
        print(f"note: the model lacks {of}: a text that has one is refused", file=sys.stderr)


def newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def find_checkpoint(*folders: Path | str) -> Path:
    """Return the newest best.pt, else the newest ckpt.pt, in or below the first of these folders that exists.

    FileNotFoundError if there is none.
    """
    paths = [Path(folder) for folder in folders]
    folder = next((path for path in paths if path.exists()), paths[0])
    found = newest(folder.rglob("best.pt")) or newest(folder.rglob("ckpt.pt"))
    if found:
        return found
    searched = " or ".join(dict.fromkeys(str(path.resolve()) for path in paths))
    raise FileNotFoundError(
        f"no best.pt or ckpt.pt in {searched}, or below: train a model first (python train.py "
        "config/tiny.py), or name a checkpoint file"
    )


def describe_run(path: Path) -> str:
    """Say which run wrote a checkpoint that `find_checkpoint` found; "" if it is the last run's best.pt."""
    folder = path.parent
    if re.fullmatch(r"old-\d+", folder.name):  # see `run.set_aside_old_run`
        return f"of an earlier run in {folder.parent}: the last one there has no best.pt yet"
    if path.name != "best.pt":
        return f"the last state of the run in {folder}, which has no best.pt yet"
    return ""


# -----------------------------------------------------------------------------
# Checkpoints


def load_checkpoint(
    path: str | Path, device: Device = None, dtype: Dtype = None
) -> tuple[GPT, dict[str, Any]]:
    """Return the model that `GPT.save` wrote, in eval mode, and a dict of what else was saved.

    OSError if the file cannot be opened, UserError for a folder or a wrong config field, RunError for a
    damaged file.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: {path}/best.pt?")
    checkpoint = read_checkpoint(path)
    if "adapters" in checkpoint:
        hint = "best.pt is the whole model, and --init_from=resume needs the same lora_rank"
        raise UserError(f"{path} holds the adapters of a LoRA run without their base: {hint}")
    if not {"config", "model"} <= checkpoint.keys():
        raise RunError(f"{path} has no config or no model. Is it a plain state_dict? Use model.save(PATH)")
    if not isinstance(checkpoint["config"], dict) or not isinstance(checkpoint["model"], dict):
        raise RunError(f"{path} is damaged: its config or its model is no dict")
    try:
        config = make_config(checkpoint.pop("config"))
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    try:
        model = fill_model(config, checkpoint.pop("model"))
    except Exception as e:  # strangers' values can fail anywhere: a type, a missing key, a shape
        if is_out_of_memory(e):
            raise
        raise RunError(f"{path} is damaged: its weights do not fit its config") from e
    model = model.to(device, dtype)
    HUGE_PAGES.take(model)
    return model.eval(), checkpoint


def fill_model(config: GPTConfig, state: Mapping[str, Any]) -> GPT:
    """Return the model with the tensors of a state dict, in the widest of their dtypes.

    RuntimeError or ValueError if they do not fit.
    """
    if config.n_layer > len(state):  # building all the layers would take forever
        raise ValueError("fewer tensors than layers")
    if strange := [name for name, x in state.items() if not is_plain(x)]:
        raise ValueError(f"{strange[0]} is no plain tensor")
    model = empty_model(config)
    model.load_state_dict({name: x.contiguous() for name, x in state.items()}, assign=True)
    return model.to(widest(x.dtype for x in state.values()))


def is_plain(x: Any) -> bool:
    """Whether x is a tensor of floats with all its bytes in the file: not sparse, quantized, expanded, ..."""
    return (
        type(x) is Tensor
        and x.layout == torch.strided
        and x.device.type == "cpu"
        and x.dtype in FLOATS
        and not (x.is_nested or x.is_neg())
        and x.nbytes <= x.untyped_storage().nbytes()
    )


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype that holds the numbers of all."""
    return functools.reduce(torch.promote_types, dtypes)


def empty_model(config: GPTConfig) -> GPT:
    """Return a model whose weights take no memory: load_state_dict(..., assign=True) gives it some."""
    with torch.device("meta"):
        return GPT(config)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the dict in a file of `torch.save`, its tensors on the CPU. Run no code from the file.

    OSError if the file cannot be opened, RunError if it is damaged or something else.
    """
    # PyTorch warns of strange tensors, which are refused later
    with open(path, "rb") as f, warnings.catch_warnings(action="ignore"):
        try:
            check_archive(f)
            checkpoint = torch.load(f, map_location="cpu", weights_only=True)
        except Exception as e:  # a damaged file can fail anywhere in zipfile and torch.load
            if is_out_of_memory(e):
                raise
            raise RunError(f"{path} is damaged, or no checkpoint") from e
    if not isinstance(checkpoint, dict):
        raise RunError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def check_archive(f: BinaryIO) -> None:
    """Compare the CRCs, which torch.load does not. ValueError or BadZipFile for a damaged file."""
    archive = zipfile.ZipFile(f)
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED:  # torch.save compresses nothing, a zip bomb does
            raise ValueError(f"{record.filename} is compressed")
    if len({*archive.namelist()}) < len(archive.namelist()):  # the CRC of one would be compared twice
        raise ValueError("two records have the same name")
    if archive.testzip() is not None:
        raise ValueError("a CRC does not match")
    f.seek(0)


def read_tokenizer(path: str | Path, saved: Any) -> Tokenizer:
    """Return the tokenizer that a checkpoint holds. RunError if it is damaged."""
    try:
        tokenizer = Tokenizer.from_dict(saved)
        read_sampling(tokenizer.sampling)
        return tokenizer
    except ValueError as e:
        raise RunError(f"{path} is damaged: its tokenizer cannot be read") from e


def is_out_of_memory(e: Exception) -> bool:
    return isinstance(e, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(e)


# -----------------------------------------------------------------------------
# Configs

TYPES = get_type_hints(GPTConfig)
# What GPTConfig does not check
LEAST = {"vocab_size": 1, "sequence_len": 1, "rope_base": 1, "window_rope_base": 1, "norm_eps": 0}
MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1  # the product of two fits in an int64
MAX_NUMBER = 1e18  # what gpt.py computes with it, or with its inverse, stays finite
ROPE_SCALINGS = {  # the numbers that each rope_type takes, by Hugging Face's names
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"},
}


def make_config(values: Mapping[str, Any]) -> GPTConfig:
    """Return the GPTConfig of a stranger's values, by field. UserError if one is wrong."""
    check_config(values)  # first: __post_init__ computes with them
    try:
        return GPTConfig(**values)
    except ValueError as e:
        raise UserError(str(e)) from e


def check_config(values: Mapping[str, Any]) -> None:
    """Raise UserError for what only strangers get wrong: names, types, sizes, the numbers of rope_scaling."""
    for field, value in values.items():
        if field not in TYPES:
            raise UserError(f"the config field {shown(field)} is unknown: was it saved with another gpt.py?")
        check_value(field, value, field)
        if field in LEAST and value is not None and value < LEAST[field]:
            raise UserError(f"{field} must be at least {LEAST[field]}, not {value!r}")
    if values.get("rope_scaling") is not None:
        check_rope_scaling(values["rope_scaling"], "rope_scaling")
        if values["rope_scaling"]["rope_type"] == "yarn" and values.get("rope_base") == 1:
            raise UserError("rope_base must be above 1 with YaRN's rope_scaling, not 1")


def check_value(field: str, value: Any, key: str) -> None:
    """Raise UserError, with the key, if a value has another type than the field, or is absurdly large."""
    if value is None:
        valid = getattr(GPTConfig, field) is None  # the default
    elif type(value) is bool:
        valid = TYPES[field] is bool
    elif TYPES[field] in (float, float | None):
        valid = isinstance(value, int | float) and (value == 0 or is_number(abs(value)))
    elif type(value) is int:
        most = MAX_LAYERS if field == "n_layer" else MAX_SIZE
        valid = isinstance(value, TYPES[field]) and abs(value) <= most
    else:
        valid = isinstance(value, TYPES[field]) and len(value) <= MAX_LAYERS  # GPTConfig repeats layer_types
    if not valid:
        raise UserError(f"{key} has the wrong type or size: {shown(value)}")


def is_number(x: Any) -> bool:
    """Whether x is a positive number that gpt.py can compute with. False for NaN."""
    return type(x) in (int, float) and 1 / MAX_NUMBER < x < MAX_NUMBER


def shown(value: Any) -> str:
    """Return the beginning of a value's repr: a list that holds another one many times may be endless."""
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = short.maxlong = short.maxother = 80
    return short.repr(value)


def check_rope_scaling(scaling: dict[str, Any], key: str) -> None:
    """Raise UserError, with the key, unless it is a rope_type with exactly its numbers."""
    numbers = dict(scaling)
    rope_type = numbers.pop("rope_type", None)
    wanted = ROPE_SCALINGS.get(rope_type) if isinstance(rope_type, str) else None
    if wanted is None:
        raise UserError(f"{key}: rope_type must be one of {', '.join(ROPE_SCALINGS)}, not {shown(rope_type)}")
    valid = all(map(is_number, numbers.values()))
    if numbers.keys() != wanted or not valid:
        names = ", ".join(sorted(wanted))
        raise UserError(f"{key}: {rope_type!r} takes positive numbers {names}, not {shown(numbers)}")
    if rope_type == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        raise UserError(f"{key}: low_freq_factor {low} must be below high_freq_factor {high}")


def read_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Sampling` in a stranger's settings, without nulls. UserError if one is wrong."""
    found = {f.name: values[f.name] for f in fields(Sampling) if values.get(f.name) is not None}
    for name, value in found.items():
        if type(value) is not int and (name == "top_k" or type(value) is not float):
            raise UserError(f"{name} has the wrong type: {value!r}")
        found[name] = value if name == "top_k" else float(value)
    try:
        Sampling(**found)
    except ValueError as e:
        raise UserError(str(e)) from e
    return found

"""A model and its tokenizer from a checkpoint, a run's folder, Hugging Face or a GGUF file.

    model, tokenizer, about = load_model("out/tiny")  # or "out/tiny/best.pt", "hf:HuggingFaceTB/SmolLM2-135M"

Files come from strangers: no code in them is run, and their sizes are checked before memory is allocated.
"""

import importlib
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import torch

import sologpt.quantize
from gpt import GPT, Device, Dtype, GPTConfig
from sologpt.device import pick_device
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

    source: a checkpoint file, an out_dir (see `find_checkpoint`), "hf:NAME_OR_DIR" or "gguf:FILE".
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
    if str(source) in SHORT_NAMES and not Path(source).exists():
        source = f"hf:{source}"
    kind, _, name = str(source).partition(":")
    if kind in ("hf", "gguf"):
        module = importlib.import_module(f"sologpt.{kind}")  # not at the top: it imports this module
        model, tokenizer = module.load(name, device, dtype, quantize)
        return model, tokenizer, {"source": str(source)}

    path = Path(source)
    if path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file: load it as gguf:{path}")
    if path.is_dir():
        is_out_dir = (path / "best.pt").exists() or (path / "ckpt.pt").exists()
        if not is_out_dir and (path / "config.json").exists() and any(path.glob("*.safetensors")):
            raise UserError(f"{path} is the folder of a Hugging Face model: load it as hf:{path}")
        path = find_checkpoint(path)
    if not path.exists():
        older = newest(path.parent.glob(f"old-*/{path.name}"))
        hint = f", but an earlier run's {older}" if older else ""
        wanted = "give a checkpoint file, an out_dir or hf:NAME_OR_DIR"
        raise FileNotFoundError(f"there is no checkpoint {path.resolve()}{hint}: {wanted}")
    try:
        model, about = load_checkpoint(path, device, dtype)
    except OSError as e:
        raise OSError(f"cannot read the checkpoint {path}: {e.strerror or e}") from e
    if "tokenizer" not in about:
        raise RunError(
            f"{path} holds no tokenizer: save it with model.save(PATH, tokenizer=tokenizer.to_dict())"
        )
    try:
        tokenizer = Tokenizer.from_dict(about.pop("tokenizer"))
    except ValueError as e:
        raise RunError(f"{path} is damaged: its tokenizer cannot be read") from e
    if quantize:
        sologpt.quantize.quantize(model, quantize)
    return model, tokenizer, about | {"source": str(path)}


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

    OSError if the file cannot be opened, UserError for a folder or an unknown config field, RunError for a
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
    values = checkpoint["config"]
    if isinstance(values, dict) and not values.keys() <= TYPES.keys():
        unknown = min(str(key) for key in values.keys() - TYPES.keys())
        raise UserError(f"{path} has the unknown config field {unknown!r}: was it saved with another gpt.py?")
    try:
        config = make_config(values)
        if config.n_layer > len(checkpoint["model"]):  # building all the layers would take forever
            raise ValueError("fewer tensors than layers")
        del checkpoint["config"]
        model = empty_model(config)
        model.load_state_dict(checkpoint.pop("model"), assign=True)
    except Exception as e:  # strangers' values can fail anywhere: a type, a missing key, a shape
        if is_out_of_memory(e):
            raise
        raise RunError(f"{path} is damaged: its weights do not fit its config") from e
    return model.to(device, dtype).eval(), checkpoint


def empty_model(config: GPTConfig) -> GPT:
    """Return a model whose weights take no memory: load_state_dict(..., assign=True) gives it some."""
    with torch.device("meta"):
        return GPT(config)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the dict in a file of `torch.save`, its tensors on the CPU. Run no code from the file.

    OSError if the file cannot be opened, RunError if it is damaged or something else.
    """
    with open(path, "rb") as f:
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
    if archive.testzip() is not None:
        raise ValueError("a CRC does not match")
    f.seek(0)


def is_out_of_memory(e: Exception) -> bool:
    return isinstance(e, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(e)


# -----------------------------------------------------------------------------
# Configs

TYPES = get_type_hints(GPTConfig)
LEAST = {"vocab_size": 1, "sequence_len": 1, "rope_base": 1, "norm_eps": 0}  # what GPTConfig does not check
MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1  # the product of two fits in an int64
MAX_NUMBER = 1e18  # what gpt.py computes with it stays finite
ROPE_SCALINGS = {  # the numbers that each rope_type takes, by Hugging Face's names
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def make_config(values: Mapping[str, Any]) -> GPTConfig:
    """Return the GPTConfig of a stranger's values, by field. UserError if one is wrong."""
    check_config(values)  # first: __post_init__ computes with them
    try:
        return GPTConfig(**values)
    except ValueError as e:
        raise UserError(str(e)) from e


def check_config(values: Mapping[str, Any]) -> None:
    """Raise UserError for what only strangers get wrong: types, absurd sizes, the numbers of rope_scaling."""
    for field, value in values.items():
        check_value(field, value, field)
        if field in LEAST and value < LEAST[field]:
            raise UserError(f"{field} must be at least {LEAST[field]}, not {value!r}")
    if values.get("rope_scaling") is not None:
        check_rope_scaling(values["rope_scaling"], "rope_scaling")


def check_value(field: str, value: Any, key: str) -> None:
    """Raise UserError, with the key, if a value has another type than the field, or is absurdly large."""
    if value is None:
        valid = getattr(GPTConfig, field) is None  # the default
    elif type(value) is bool:
        valid = TYPES[field] is bool
    elif TYPES[field] is float:
        valid = isinstance(value, int | float) and abs(value) < MAX_NUMBER  # false for NaN
    elif type(value) is int:
        most = MAX_LAYERS if field == "n_layer" else MAX_SIZE
        valid = isinstance(value, TYPES[field]) and abs(value) <= most
    else:
        valid = isinstance(value, TYPES[field])
    if not valid:
        raise UserError(f"{key} has the wrong type or size: {value!r}")


def check_rope_scaling(scaling: dict[str, Any], key: str) -> None:
    """Raise UserError, with the key, unless it is a rope_type with exactly its numbers."""
    numbers = dict(scaling)
    rope_type = numbers.pop("rope_type", None)
    wanted = ROPE_SCALINGS.get(str(rope_type))
    if wanted is None:
        raise UserError(f"{key}: rope_type must be one of {', '.join(ROPE_SCALINGS)}, not {rope_type!r}")
    valid = all(type(x) in (int, float) and 0 < x < MAX_NUMBER for x in numbers.values())
    if numbers.keys() != wanted or not valid:
        names = ", ".join(sorted(wanted))
        raise UserError(f"{key}: {rope_type!r} takes positive numbers {names}, not {numbers or 'nothing'}")
    if rope_type == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        raise UserError(f"{key}: low_freq_factor {low} must be below high_freq_factor {high}")

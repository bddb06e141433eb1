"""A model and its tokenizer from a checkpoint, a run's folder, Hugging Face or a GGUF file.

model, tokenizer, about = load_model("out/tiny")  # or "out/tiny/best.pt", or "hf:HuggingFaceTB/SmolLM2-135M"
"""

import importlib
from pathlib import Path
from typing import Any

import torch

from gpt import GPT
from sologpt.tokenizer import Tokenizer

SHORT_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # nanoGPT's, for hf:NAME


def pick_device(name: torch.device | str = "auto") -> torch.device:
    """The torch device of that name; "auto" is the accelerator if there is one, else the CPU. ValueError if missing."""
    try:
        if name == "auto":
            return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = str(e).partition("\n")[0]
        raise ValueError(f"device {str(name)!r} is not available: {reason}") from e
    if device.type == "meta":
        raise ValueError("device 'meta' holds no data: choose cpu, cuda, mps or auto")
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it is a CUDA device with bfloat16 units. Older ones emulate it, slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def find_checkpoint(out_dir: Path | str) -> Path:
    """The newest best.pt in out_dir or below, else out_dir/ckpt.pt. FileNotFoundError if there is neither."""
    folder = Path(out_dir)
    found = max(folder.rglob("best.pt"), key=lambda path: path.stat().st_mtime, default=folder / "ckpt.pt")
    if not found.exists():
        raise FileNotFoundError(
            f"no best.pt in {folder.resolve()} or below, and no ckpt.pt in it: train a model first "
            "(python train.py config/tiny.py), or name a checkpoint file"
        )
    return found


def load_model(
    source: Path | str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model in eval mode, its tokenizer, and a dict of what else is known about it.

    source: a checkpoint file, an out_dir (see `find_checkpoint`), "hf:NAME_OR_DIR" or "gguf:FILE". device: None is the
    CPU, "auto" see `pick_device`. dtype: None keeps that of the weights. The dict holds "source" (the file or name that
    was read) and whatever else the checkpoint holds, such as "step", "train_config" and "optimizers".

    OSError if a file is missing or unreadable, ValueError for a bad source or device, ImportError for a missing extra,
    RuntimeError for a checkpoint that is damaged or has no tokenizer.
    """
    device = None if device is None else pick_device(device)
    if str(source) in SHORT_NAMES and not Path(source).exists():
        source = f"hf:{source}"
    kind, _, name = str(source).partition(":")
    if kind in ("hf", "gguf"):
        module = importlib.import_module(f"sologpt.{kind}")  # here, since it needs an extra of that name
        model, tokenizer = module.load(name, device, dtype)
        return model, tokenizer, {"source": str(source)}

    path = Path(source)
    if path.suffix == ".gguf":
        raise ValueError(f"{path} is a GGUF file: load it as gguf:{path}")
    if path.is_dir():
        is_out_dir = (path / "best.pt").exists() or (path / "ckpt.pt").exists()
        if not is_out_dir and (path / "config.json").exists() and any(path.glob("*.safetensors")):
            raise ValueError(f"{path} is the folder of a Hugging Face model: load it as hf:{path}")
        path = find_checkpoint(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}: give a checkpoint file, an out_dir or hf:NAME_OR_DIR")
    try:
        model, about = GPT.load_checkpoint(path, device, dtype)
    except OSError as e:
        raise OSError(f"cannot read the checkpoint {path}: {e.strerror or e}") from e
    if "tokenizer" not in about:
        raise RuntimeError(f"{path} holds no tokenizer: save it with model.save(PATH, tokenizer=tokenizer.to_dict())")
    try:
        tokenizer = Tokenizer.from_dict(about.pop("tokenizer"))
    except ValueError as e:
        raise RuntimeError(f"{path} is damaged: its tokenizer cannot be read") from e
    return model, tokenizer, about | {"source": str(path)}

"""A model and its tokenizer from a checkpoint, a run's folder, Hugging Face or a GGUF file.

model, tokenizer, about = load_model("out/tiny")  # or "out/tiny/best.pt", or "hf:HuggingFaceTB/SmolLM2-135M"
"""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gpt import GPT
from sologpt import weights
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


def newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def find_checkpoint(*folders: Path | str) -> Path:
    """The newest best.pt, else the newest ckpt.pt, in the first of these folders that exists, or below it.

    FileNotFoundError if there is none.
    """
    paths = [*map(Path, folders)]
    folder = next(filter(Path.exists, paths), paths[0])
    if found := newest(folder.rglob("best.pt")) or newest(folder.rglob("ckpt.pt")):
        return found
    searched = " or ".join(dict.fromkeys(str(path.resolve()) for path in paths))
    raise FileNotFoundError(
        f"no best.pt or ckpt.pt in {searched}, or below: train a model first (python train.py config/tiny.py), "
        "or name a checkpoint file"
    )


def describe_run(path: Path) -> str:
    """Of which run a checkpoint is that `find_checkpoint` has found; empty for the best.pt of a folder's last run."""
    folder = path.parent
    if re.fullmatch(r"old-\d+", folder.name):  # see `rundir.set_aside_old_run`
        return f"of an earlier run in {folder.parent}: the last one there has no best.pt yet"
    return "" if path.name == "best.pt" else f"the last state of the run in {folder}, which has no best.pt yet"


def load_model(
    source: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model in eval mode, its tokenizer, and a dict of what else is known about it.

    source: a checkpoint file, an out_dir (see `find_checkpoint`), "hf:NAME_OR_DIR" or "gguf:FILE". device: None is the
    CPU, "auto" see `pick_device`. dtype: None keeps that of the weights. quantize: int8 or int4 makes them smaller and
    faster, for inference on the CPU alone (see weights.py). The dict holds "source" (the file or name that was read)
    and whatever else the checkpoint holds, such as "step", "train_config" and "optimizers".

    OSError if a file is missing or unreadable, ValueError for a bad source or device, ImportError for a missing extra,
    RuntimeError for a checkpoint that is damaged or has no tokenizer.
    """
    device = None if device is None else pick_device(device)
    if str(source) in SHORT_NAMES and not Path(source).exists():
        source = f"hf:{source}"
    kind, _, name = str(source).partition(":")
    if kind in ("hf", "gguf"):
        module = importlib.import_module(f"sologpt.{kind}")  # here, since it needs an extra of that name
        model, tokenizer = module.load(name, device, dtype, quantize)
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
        older = newest(path.parent.glob(f"old-*/{path.name}"))
        hint = f", but an earlier run's {older}" if older else ""
        raise FileNotFoundError(
            f"there is no checkpoint {path.resolve()}{hint}: give a checkpoint file, an out_dir or hf:NAME_OR_DIR"
        )
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
    if quantize:
        weights.quantize(model, quantize)
    return model, tokenizer, about | {"source": str(path)}

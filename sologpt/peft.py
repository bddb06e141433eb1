"""Adapters in PEFT's format (https://github.com/huggingface/peft), written and read exactly.

    save_adapter(model, "adapter", "HuggingFaceTB/SmolLM2-135M-Instruct")  # those of lora.py
    load_adapter(model, "adapter")  # merges them into a plain model

An adapter that is more than a product of two matrices is refused by a UserError, which names the key.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gpt import GPT, in_float32
from sologpt import hf
from sologpt.errors import UserError, replacing, writing
from sologpt.load import MAX_NUMBER, empty_model, is_plain
from sologpt.lora import LoRALinear, adapter_state
from sologpt.quantize import BEFORE, InferenceEmbedding

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Keys of adapter_config.json that do not change what an adapter computes, once its tensors are there. All
# others but those that are read must be off.
NO_MATTER = (
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules lora_dropout fan_in_fan_out layers_to_transform layers_pattern megatron_core "
    "qalora_group_size runtime_config"
)
READ = "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora"
OFF: tuple = (None, False, "none", {}, [])


def to_peft(model: GPT, base_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the adapter_config.json and the tensors of the model's adapters, in transformers' layout.

    If sharded, all processes must call this. UserError if transformers has no such model.
    """
    family = hf.FAMILIES[hf.to_hf_config(model.config)["model_type"]]
    plain, state = empty_model(model.config), adapter_state(model)
    first = next(module for module in model.modules() if isinstance(module, LoRALinear))
    rank, alpha = first.lora_A.size(0), first.alpha
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}  # of each target
    for module, names in group_by_theirs(plain, family).items():
        pairs = [adapter_of(name, plain, state) for name in names]
        # gpt2 has queries, keys and values in one matrix: each of the three keeps its own B
        A = torch.cat([A for A, _ in pairs])  # (r, K)
        B = torch.block_diag(*(B for _, B in pairs))  # (N, r)
        if len(A):
            tensors |= {f"{PREFIX}{module}.lora_A.weight": A, f"{PREFIX}{module}.lora_B.weight": B}
            ranks[family.module_names[hf.split_name(names[0].ours)[1]]] = len(A)
    others = {target: r for target, r in ranks.items() if r != rank}
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        r=rank,
        lora_alpha=alpha,
        target_modules=[*ranks],
        rank_pattern=others,
        alpha_pattern={target: alpha / rank * r for target, r in others.items()},
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=family.transposed,
        inference_mode=True,
    )
    return config, tensors


def adapter_of(name: hf.TensorName, plain: GPT, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (r, K) and B (N, r) of a weight (N, K) in transformers' layout; without an adapter, r is 0."""
    N, K = plain.get_parameter(name.ours).shape
    path = name.ours.removesuffix(".weight")
    A, B = state.get(f"{path}.lora_A", torch.empty(0, K)), state.get(f"{path}.lora_B", torch.empty(N, 0))
    if name.head_dim is not None:
        B = hf.to_half_split(B, name.head_dim, name.inverse_rotation)
    return A, B


def group_by_theirs(plain: GPT, family: hf.Family) -> dict[str, list[hf.TensorName]]:
    """Return the matrices that an adapter can have, by the name of the module in transformers."""
    groups: dict[str, list[hf.TensorName]] = {}
    for name in hf.tensor_names(plain, family):
        if isinstance(plain.get_submodule(name.ours.rpartition(".")[0]), nn.Linear) and "weight" in name.ours:
            groups.setdefault(name.theirs.removesuffix(".weight"), []).append(replace(name, transposed=False))
    return groups


def save_adapter(model: GPT, folder: str | Path, base_name: str) -> None:
    """Write the adapters to a folder that PEFT reads, each file atomically. base_name: of the base model."""
    write_peft(Path(folder), *to_peft(model, base_name))


def write_peft(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write what `to_peft` returned."""
    try:
        from safetensors.torch import save
    except ImportError as e:
        raise ImportError("writing an adapter needs the extra 'hf': pip install safetensors") from e
    text = json.dumps(config, indent=2) + "\n"
    weights = save({name: x.contiguous() for name, x in tensors.items()}, metadata={"format": "pt"})
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, data in ((WEIGHTS_FILE, weights), (CONFIG_FILE, text.encode())):
        with replacing(folder / name) as f:
            f.write(data)


@torch.no_grad()
def load_adapter(model: GPT, folder: str | Path) -> None:
    """Merge an adapter of PEFT's format into a plain model. folder may be a name on the Hub.

    UserError, with the key, for an adapter that is more than a product of two matrices, or does not fit.
    """
    if isinstance(model.wte, InferenceEmbedding):
        raise RuntimeError(f"a packed or quantized model takes no adapter: {BEFORE}")
    folder = hf.local_folder(folder, [CONFIG_FILE, WEIGHTS_FILE])
    config = read_peft_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}: other formats are not read")
    found = hf.read_header(path)
    groups = group_by_theirs(model, hf.FAMILIES[hf.to_hf_config(model.config)["model_type"]])
    modules = dict.fromkeys(name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in found)
    expected = {f"{PREFIX}{module}.lora_{leaf}.weight" for module in modules for leaf in "AB"}
    if wrong := (modules.keys() - groups.keys()) or (expected ^ found.keys()):
        raise UserError(f"{path}: unknown or missing is {hf.list_names(wrong)}")
    for module in modules:
        rank, scale = rank_and_scale(config, module, folder / CONFIG_FILE)
        weights = [model.get_parameter(name.ours) for name in groups[module]]
        N, K = sum(map(len, weights)), weights[0].size(1)
        A, B = (hf.read_tensor(found, f"{PREFIX}{module}.lora_{leaf}.weight") for leaf in "AB")
        if A.shape != (rank, K) or B.shape != (N, rank) or not (is_plain(A) and is_plain(B)):
            wanted = f"floats ({rank}, {K}) and ({N}, {rank})"
            have = f"{A.dtype} {tuple(A.shape)} and {B.dtype} {tuple(B.shape)}"
            raise UserError(f"{path}: {module} has {have}, not {wanted}")
        A, B = (in_float32(x).to(weights[0].device) for x in (A, B))
        for name, W in zip(groups[module], weights, strict=True):
            W.copy_(in_float32(W) + scale * (hf.from_theirs(B, name) @ A))


def read_peft_config(path: Path) -> dict[str, Any]:
    """Return an adapter_config.json. UserError, with the key, for what is more than A and B."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it is not the folder of an adapter")
    config = {"rank_pattern": {}, "alpha_pattern": {}, "lora_alpha": 8, "r": 8} | hf.read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}, but only LORA is supported")
    if config.get("init_lora_weights", True) in (True, "gaussian"):  # others may change the base, too
        config.pop("init_lora_weights", None)
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config[key], dict) or not all(
            re.fullmatch(r"[\w.]+", name) for name in config[key]
        ):
            raise UserError(f"{path}: {key} is {config[key]!r}, but only plain names are supported")
    for key in config.keys() - {*NO_MATTER.split(), *READ.split()}:
        if config[key] not in OFF:
            raise UserError(f"{path}: {key} is {config[key]!r}, which is not supported")
    return config


def rank_and_scale(config: dict[str, Any], module: str, path: Path) -> tuple[int, float]:
    """Return the rank of a module's adapter, and the factor of B A."""
    rank, alpha = config["r"], config["lora_alpha"]
    for name, value in reversed(config["rank_pattern"].items()):
        rank = value if f".{module}".endswith(f".{name}") else rank
    for name, value in reversed(config["alpha_pattern"].items()):
        alpha = value if f".{module}".endswith(f".{name}") else alpha
    valid = type(rank) is int and rank > 0 and type(alpha) in (int, float) and abs(alpha) < MAX_NUMBER
    if not valid:
        raise UserError(f"{path}: {module} has r={rank!r} and lora_alpha={alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

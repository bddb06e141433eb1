"""Fine-tuning on conversations beside transformers and peft: python -m bench.finetune --model=hf:NAME_OR_DIR

Full and LoRA, each run in a process of its own. All train on the same rows in the same order, by AdamW in
float32: on the dataset docstrings, or another one of conversations. The extra 'dev' is needed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import configurator
from sologpt import data, errors, hf
from sologpt.data import Dataset
from sologpt.errors import RunError
from sologpt.load import load_model

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BETAS = (0.9, 0.999)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RUNS = ("ours", "ours lora", "transformers", "peft")


@dataclass
class Config:
    model: str = "hf:HuggingFaceTB/SmolLM2-135M-Instruct"  # to fine-tune: hf:, gguf: or a checkpoint
    dataset: str = "docstrings"  # of conversations, prepared for the model if it is docstrings
    runs: tuple[str, ...] = RUNS  # in this order
    steps: int = 30  # optimizer steps
    batch_size: int = 16  # conversations in a step
    eval_iters: int = 8  # batches of held-out conversations
    learning_rate: float = 5e-5  # without LoRA
    lora_rate: float = 5e-4  # learning rate of LoRA
    rank: int = 16  # of LoRA; alpha is twice that
    seed: int = 1337  # of the batches
    only: str = ""  # run this one in this process, and print its figures as JSON


def train_ours(config: Config, is_lora: bool, folder: Path) -> dict[str, Any]:
    """Run train.py. Return its figures."""
    settings: dict[str, Any] = dict(init_from=config.model, dataset=config.dataset, out_dir=folder / "out")
    settings |= dict(max_iters=config.steps, batch_size=config.batch_size, eval_iters=config.eval_iters)
    settings |= dict(eval_interval=config.steps, log_interval=1, sample_tokens=0, seed=config.seed)
    rate = config.lora_rate if is_lora else config.learning_rate
    settings |= dict(optimizer="adamw", learning_rate=rate, embd_lr=rate, head_lr=rate, warmdown=0)
    settings |= dict(beta1=BETAS[0], beta2=BETAS[1])
    if is_lora:
        settings |= dict(lora_rank=config.rank, lora_alpha=2 * config.rank)
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RunError("train.py has failed: its own error is above")
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return figures(losses, speeds, usage.ru_maxrss)


def train_theirs(config: Config, is_lora: bool, folder: Path) -> dict[str, Any]:
    """Train transformers' model in a plain loop. Return its figures."""
    import resource
    import time

    from transformers import AutoModelForCausalLM

    dataset = data.load(data.find(config.dataset))
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    rate = config.learning_rate
    if is_lora:
        from peft import LoraConfig, get_peft_model

        rate = config.lora_rate
        lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=TARGETS)
        theirs = get_peft_model(theirs, lora)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=BETAS, weight_decay=0.0, fused=True)
    rows = dataset.batches("train", 0)
    losses, speeds = [held_out_loss(theirs, dataset, config)], []
    for step in range(config.steps):
        started = time.perf_counter()
        (batch,), _ = rows.draw(config.seed, step, 1, config.batch_size)
        loss_of(theirs, *rows.get(batch, CPU)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        speeds.append(rows.n_tokens(batch) / (time.perf_counter() - started))
    losses.append(held_out_loss(theirs, dataset, config))
    return figures(losses, speeds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def loss_of(theirs: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over the targets. transformers shifts the labels itself."""
    before = torch.full_like(y[:, :1], -1)
    labels = torch.cat((before, y), 1)
    ids = torch.cat((x, y[:, -1:].clamp(min=0)), 1)
    return theirs(input_ids=ids, labels=labels.masked_fill(labels == -1, -100)).loss


@torch.no_grad()
def held_out_loss(theirs: Any, dataset: Dataset, config: Config) -> float:
    rows = dataset.batches("val", 0)
    batches = rows.spread(config.eval_iters, config.batch_size)
    total = sum(float(loss_of(theirs, *rows.get(b, CPU))) * rows.n_targets(b) for b in batches)
    return total / sum(map(rows.n_targets, batches))


def figures(losses: list[float], speeds: list[float], maxrss: int) -> dict[str, Any]:
    """Return the loss before and after, the median speed after three steps, and the peak memory in GiB."""
    speed = statistics.median(speeds[3:])
    return dict(before=losses[0], after=losses[-1], tokens_per_second=speed, peak=maxrss / 2**20)


def main() -> None:
    config = configurator.parse(Config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(config.only.partition(":")[2] or name)
        run = config.only.partition(":")[0]
        trains: dict[str, Callable] = {"ours": train_ours, "transformers": train_theirs}
        if run:
            train = trains["ours" if run.startswith("ours") else "transformers"]
            print(json.dumps(train(config, run in ("ours lora", "peft"), folder)))
            return
        model, tokenizer, _ = load_model(config.model, dtype=torch.float32)
        data.prepare(config.dataset, tokenizer.to_dict(), min(1024, model.config.sequence_len))
        hf.save(model, tokenizer, folder / "hf")
        del model
        print(f"{config.steps} steps of {config.batch_size} conversations of {config.dataset}")
        print(f"{'':14} {'tokens/s':>9} {'peak GiB':>9} {'held-out loss before':>21} {'after':>7}")
        settings = [f"--{k}={v}" for k, v in asdict(config).items() if k not in ("runs", "only")]
        for run in config.runs:
            command = [sys.executable, "-m", "bench.finetune", *settings, f"--only={run}:{folder}"]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise RunError(f"{run} has failed: its own error is above")
            f = json.loads(done.stdout.splitlines()[-1])
            speed, peak, before, after = f["tokens_per_second"], f["peak"], f["before"], f["after"]
            print(f"{run:14} {speed:9.0f} {peak:9.2f} {before:21.4f} {after:7.4f}", flush=True)


if __name__ == "__main__":
    errors.run(main)

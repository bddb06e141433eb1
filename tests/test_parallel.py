"""However many processes share a run, it is the same run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, Script, run

from gpt import GPT
from sologpt import parallel
from sologpt.device import autocast_dtype

STEPS = [
    *SMALL,
    "--gradient_accumulation_steps=4",
    "--max_iters=20",
    "--eval_interval=10",
    "--log_interval=1",
]
STEPS += [
    "--eval_iters=7",
    "--ckpt_interval=5",
    "--keep_checkpoints=9",
    "--dropout=0.1",
    "--grad_clip=1",
    "--weight_decay=0.1",
]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def together(
    n: int, *flags: str, script: tuple[str, ...] = ("train.py",)
) -> list[subprocess.CompletedProcess]:
    """train.py, or another script, in n processes that know each other as torchrun would have told them."""
    env = {
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": "1",
    }
    scripts = [Script(*script, *flags, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(n)]
    return [script.wait(120) for script in scripts]


def torchrun(*args: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", f"--master_port={free_port()}", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    for x, y in zip(records(a), records(b), strict=True):
        assert (
            x["step"] == y["step"]
            and ("loss" in x) == ("loss" in y)
            and ("val_loss" in x) == ("val_loss" in y)
        )
        for key in {"loss", "val_loss"} & set(x):
            assert x[key] == pytest.approx(y[key], abs=1e-5)
    a, b = GPT.load(a / "ckpt.pt").state_dict(), GPT.load(b / "ckpt.pt").state_dict()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    run("train.py", *STEPS, f"--dataset={dataset}", f"--out_dir={out}")
    return out


@pytest.mark.parametrize(
    "n, extra",
    [
        (2, []),
        pytest.param(4, [], marks=pytest.mark.slow),
        (2, ["--shard"]),
        pytest.param(2, ["--shard", "--activation_checkpointing"], marks=pytest.mark.slow),
        (1, ["--activation_checkpointing"]),
    ],
)
def test_processes_share_one_run(alone, dataset, tmp_path, n, extra):
    for done in together(n, *STEPS, f"--dataset={dataset}", f"--out_dir={tmp_path}", *extra):
        assert done.returncode == 0, done.stderr
    assert_same_run(alone, tmp_path)


@pytest.mark.slow
def test_shards_of_another_architecture_with_a_tied_embedding(dataset, tmp_path):
    """The head's gradient and the embedding's come together in one sharded table; gains are shards too."""
    flags = [*STEPS, "--max_iters=10", f"--dataset={dataset}", "--tie_embd", "--mlp=swiglu", "--softcap=0"]
    flags += ["--norm_weight", "--embd_norm=False", "--head_lr=0.02"]
    for n, extra in ((1, []), (2, ["--shard"])):
        for done in together(n, *flags, f"--out_dir={tmp_path / str(n)}", *extra):
            assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "1", tmp_path / "2")
    assert records(tmp_path / "1")[-1]["val_loss"] < records(tmp_path / "1")[0]["val_loss"] - 0.5


@pytest.mark.slow
def test_shards_in_bfloat16_end_as_autocast_does(alone, dataset, tmp_path):
    """The losses differ from the run in float32 by rounding, and by no more than those of autocast alone."""
    flags = [*STEPS, f"--dataset={dataset}", "--dtype=bfloat16"]
    for n, extra in ((1, []), (2, ["--shard"])):
        for done in together(n, *flags, f"--out_dir={tmp_path / str(n)}", *extra):
            assert done.returncode == 0, done.stderr
    exact, autocast, shards = (
        [r["loss"] for r in records(out)[:-1]] for out in (alone, tmp_path / "1", tmp_path / "2")
    )
    error, other = (sum(abs(a - b) for a, b in zip(run, exact, strict=True)) for run in (shards, autocast))
    assert 0 < error < 1.5 * other < 0.1
    assert {p.dtype for p in GPT.load(tmp_path / "2" / "ckpt.pt").parameters()} == {torch.float32}


SHARDS = """
import sys, torch
sys.path[:0] = [".", "tests"]
from conftest import QWEN, make_model
from sologpt import device, parallel

world = parallel.join("cpu", shard=True)
model, forward = parallel.wrap_model(make_model(torch.float32, **QWEN), world, shard=True, dtype="bfloat16")
seen = {}
for name, module in model.named_modules():
    weights = [p.dtype for p in module.parameters(recurse=False)]
    see = lambda m, args, out, name=name: seen.update({name: (args[0].dtype, m.weight.dtype, out.dtype)})
    if weights:
        module.register_forward_hook(see)
model.h[1].register_forward_hook(lambda m, args, out: seen.update(stream=out.dtype))
idx = torch.randint(61, (2, 9))
with device.make_autocast("bfloat16", world.device):
    loss = forward(idx, idx)
    loss.backward()
low, full = torch.bfloat16, torch.float32
assert seen["h.1.attn.c_q"] == seen["h.1.mlp.c_gate"] == (full, low, low), seen
assert seen["stream"] == seen["norm"][1] == seen["wte"][1] == loss.dtype == full, seen
assert all(p.to_local().numel() <= p.numel() * 0.6 for p in model.parameters() if p.numel() > 1)
assert {p.grad.dtype for p in model.parameters()} == {p.dtype for p in model.parameters()} == {full}
parallel.leave(world)
"""


def test_a_sharded_block_gathers_its_weights_in_bfloat16_and_nothing_else_is_rounded():
    """Under autocast alone, a gathered weight is in float32, and a copy is kept until the backward pass."""
    for done in together(2, script=("-c", SHARDS)):
        assert done.returncode == 0, done.stderr


def test_more_processes_than_gpus_is_one_line_before_they_meet(monkeypatch):
    monkeypatch.setattr(parallel, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 6), ("LOCAL_WORLD_SIZE", 3)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="3 processes cannot share 2 GPUs"):
        parallel.join("auto", shard=False)


@pytest.mark.parametrize("major, expected", [(7, torch.float32), (8, torch.bfloat16)])
def test_auto_is_bfloat16_where_a_gpu_computes_in_it(major, expected, monkeypatch):
    """PyTorch emulates it on the GPUs before, which is slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert autocast_dtype("auto", torch.device("cuda")) == expected
    assert autocast_dtype("auto", torch.device("cpu")) == torch.float32


def test_a_run_may_be_resumed_by_more_processes_and_in_shards_and_alone_again(alone, dataset, tmp_path):
    """A checkpoint is whole, whoever wrote it: one process, two with a shard each, two, and one again."""
    last = alone
    for i, (step, n, extra) in enumerate([(5, 2, ["--shard"]), (10, 2, []), (15, 1, [])]):
        out = tmp_path / str(i)
        out.mkdir()
        shutil.copy(last / f"ckpt_{step:08d}.pt", out / "ckpt.pt")
        shutil.copy(last / "metrics.jsonl", out)
        for done in together(
            n, *STEPS, f"--dataset={dataset}", f"--out_dir={out}", "--init_from=resume", *extra
        ):
            assert done.returncode == 0, done.stderr
        assert_same_run(alone, out)
        last = out


def test_a_sharded_checkpoint_samples_and_names_no_shard(dataset, tmp_path):
    for done in together(
        2, *STEPS, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--shard", "--max_iters=2"
    ):
        assert done.returncode == 0, done.stderr
    done = run("sample.py", f"--ckpt={tmp_path / 'ckpt.pt'}", "--prompt=def ", "--max_tokens=5")
    assert done.stdout.startswith("def ")
    assert b"DTensor" not in (tmp_path / "ckpt.pt").read_bytes()


def test_sharding_needs_several_processes(dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    assert "torchrun" in run("train.py", *flags, "--shard", status=2).stderr


def workers(torchrun: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started and that run, by rank."""
    found = {}
    for pid in (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended meanwhile
        if parent == torchrun.pid:
            found |= {int(e[5:]): pid for e in env if e.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


def wait_for(done, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def logged(out: Path, n: int) -> bool:
    return (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= n


@pytest.mark.slow
def test_killing_one_process_ends_the_others_and_the_next_start_goes_on(dataset, tmp_path):
    flags = [*STEPS, f"--dataset={dataset}", "--max_iters=400", "--ckpt_interval=5"]
    first = torchrun("--nproc_per_node=2", "train.py", *flags, f"--out_dir={tmp_path}")
    wait_for(lambda: logged(tmp_path, 20), first)
    pids = workers(first)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    assert first.wait(60) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    again = torchrun("--nproc_per_node=2", "train.py", *flags, f"--out_dir={tmp_path}", "--init_from=resume")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0 and "resumed at step" in out, err
    assert [record["step"] for record in records(tmp_path)] == list(range(401))


@pytest.mark.slow
def test_torchrun_starts_a_run_again_where_it_was(dataset, tmp_path):
    """--max-restarts: what the killed and restarted run ends with is what it would have ended with."""
    flags = [*STEPS, f"--dataset={dataset}", "--max_iters=100", "--ckpt_interval=5"]
    for done in together(2, *flags, f"--out_dir={tmp_path / 'whole'}"):
        assert done.returncode == 0, done.stderr
    process = torchrun(
        "--nproc_per_node=2", "--max-restarts=2", "train.py", *flags, f"--out_dir={tmp_path / 'out'}"
    )
    for n in (20, 60):
        wait_for(lambda n=n: logged(tmp_path / "out", n) and len(workers(process)) == 2, process)
        killed = workers(process)
        os.kill(killed[0], signal.SIGKILL)
        wait_for(lambda killed=killed: not set(killed) & set(workers(process)), process)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert out.count("resumed at step") == 2
    assert [record["step"] for record in records(tmp_path / "out")] == list(range(101))
    a, b = (GPT.load(tmp_path / name / "ckpt.pt").state_dict() for name in ("whole", "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_to_torchrun_finishes_the_step_and_saves(dataset, tmp_path, to_all):
    """SIGTERM goes to torchrun alone, as from a cluster; SIGINT to all at once, as from Ctrl-C."""
    flags = [*STEPS, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=100000"]
    process = torchrun("--nproc_per_node=2", "train.py", *flags)
    wait_for(lambda: logged(tmp_path, 20), process)
    pids = workers(process)
    for pid in (process.pid, *pids) if to_all else (process.pid,):
        os.kill(pid, signal.SIGINT if to_all else signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("--init_from=resume goes on") == 1, err
    saved = GPT.load_checkpoint(tmp_path / "ckpt.pt")[1]["step"]
    assert [record["step"] for record in records(tmp_path)] == list(range(saved)) and saved >= 20
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)

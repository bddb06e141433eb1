"""A run is stopped, killed and damaged, and ends as if nothing had been."""

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import SMALL, Script, error, run

import sample
import train
from gpt import GPT
from sologpt import errors

EACH_STEP = [
    "--log_interval=1",
    "--eval_interval=7",
    "--ckpt_interval=1",
    "--dropout=0.1",
]


def steps(out) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def n_logged(out) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same_state(a, b) -> bool:
    """Whether two checkpoints have the same weights and the same optimizer state, to the bit."""
    (a, extra_a), (b, extra_b) = GPT.load_checkpoint(a), GPT.load_checkpoint(b)
    weights = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    states = zip(extra_a["optimizers"], extra_b["optimizers"], strict=True)
    return (
        all(torch.equal(x, y) for x, y in weights)
        and all(
            torch.equal(s["state"][i][k], t["state"][i][k])
            for s, t in states
            for i in t["state"]
            for k in t["state"][i]
        )
        and (extra_a["step"], extra_a["best"]) == (extra_b["step"], extra_b["best"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_thirty_kills_change_nothing(dataset, tmp_path, signum):
    """At random moments: before the first checkpoint, between steps, and while a file is written."""
    flags = [*SMALL, *EACH_STEP, f"--dataset={dataset}", "--max_iters=300", "--keep_checkpoints=1"]
    run("train.py", *flags, f"--out_dir={tmp_path / 'whole'}")
    moments, out = random.Random(0), tmp_path / "killed"
    for i in range(30):
        going_on = ["--init_from=resume"] if (out / "ckpt.pt").exists() else []
        script = Script("train.py", *flags, f"--out_dir={out}", *going_on)
        if i % 3:  # two of three get some way; the rest may not even start
            before = n_logged(out)
            while n_logged(out) == before and script.process.is_alive():
                time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        assert script.process.is_alive(), "the run is over before it was killed often enough"
        os.kill(script.process.pid, signum)
        done = script.wait(60)
        # SIGTERM ends a process that has not come to its steps yet as it does by default
        assert done.returncode in ((-signum,) if signum == signal.SIGKILL else (143, -signum)), done.stderr
        assert "Traceback" not in done.stderr
    run("train.py", *flags, f"--out_dir={out}", "--init_from=resume")
    assert same_state(out / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")
    assert steps(out) == list(range(301))
    assert not list(out.glob("*.tmp"))


def test_checkpoints_between_evaluations_and_older_ones(dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    run(
        "train.py",
        *flags,
        "--max_iters=9",
        "--eval_interval=100",
        "--ckpt_interval=2",
        "--keep_checkpoints=3",
    )
    kept = sorted(path.name for path in tmp_path.glob("ckpt_*.pt"))
    assert kept == ["ckpt_00000006.pt", "ckpt_00000008.pt", "ckpt_00000009.pt"]
    assert [GPT.load_checkpoint(tmp_path / name)[1]["step"] for name in kept] == [6, 8, 9]
    shutil.copy(tmp_path / "ckpt_00000006.pt", tmp_path / "ckpt.pt")  # back to an older state
    before = GPT.load(tmp_path / "ckpt_00000009.pt").state_dict()
    run("train.py", *flags, "--max_iters=9", "--eval_interval=100", "--init_from=resume")
    after = GPT.load(tmp_path / "ckpt.pt").state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_only_states_of_this_run_are_deleted(dataset, tmp_path):
    """By number, up to the current step: not a later state that was gone back from, nor a user's copy."""
    flags = [
        *SMALL,
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        "--eval_interval=100",
    ]
    run("train.py", *flags, "--max_iters=4", "--ckpt_interval=2", "--keep_checkpoints=2")
    shutil.copy(tmp_path / "ckpt_00000002.pt", tmp_path / "ckpt_00000002_keep.pt")
    shutil.copy(tmp_path / "ckpt_00000002.pt", tmp_path / "ckpt_00009000.pt")
    (tmp_path / "ckpt_00000003.pt.tmp").write_text("as left by a kill")
    run(
        "train.py", *flags, "--max_iters=6", "--ckpt_interval=2", "--keep_checkpoints=2", "--init_from=resume"
    )
    states = sorted(path.name for path in tmp_path.glob("ckpt_*"))
    kept = ["ckpt_00000002_keep.pt", "ckpt_00000004.pt", "ckpt_00000006.pt", "ckpt_00009000.pt"]
    assert states == kept


def test_what_changes_when_a_run_is_resumed_is_said(trained, dataset, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    flags = [
        *SMALL,
        f"--out_dir={tmp_path / 'out'}",
        "--eval_interval=10",
    ]
    done = run(
        "train.py", *flags, f"--dataset={dataset}", "--max_iters=25", "--batch_size=2", "--init_from=resume"
    )
    said = next(line for line in done.stdout.splitlines() if line.startswith("resumed at step 20"))
    assert "max_iters is 25, was 20" in said and "batch_size is 2, was 4" in said and "n_embd" not in said
    assert "tokens than before" not in said
    assert steps(tmp_path / "out") == [0, 10, 20, 25]

    shutil.copytree(dataset / "text", tmp_path / "text")
    (tmp_path / "text" / "00.txt").write_text((dataset / "text" / "00.txt").read_text().swapcase())
    run("data/text/prepare.py", "--input", tmp_path / "text", "--out_dir", tmp_path / "data")
    done = run("train.py", *flags, f"--dataset={tmp_path / 'data'}", "--max_iters=26", "--init_from=resume")
    said = next(line for line in done.stdout.splitlines() if line.startswith("resumed at step 25"))
    assert f"was {dataset}" in said and said.endswith("; the dataset has other tokens than before")


def test_a_forgotten_resume_loses_nothing(dataset, tmp_path):
    """Each new run moves what the one before has written, whole, to a folder of its own."""
    flags = [
        *SMALL,
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        "--eval_interval=2",
    ]
    for n in (4, 6, 8):
        run("train.py", *flags, f"--max_iters={n}", "--keep_checkpoints=1", "--tensorboard", plot=True)
    for folder, n in ((tmp_path / "old-1", 4), (tmp_path / "old-2", 6), (tmp_path, 8)):
        assert GPT.load_checkpoint(folder / "ckpt.pt")[1]["step"] == steps(folder)[-1] == n
        assert (
            (folder / f"ckpt_{n:08d}.pt").exists()
            and (folder / "loss.png").exists()
            and (folder / "best.pt").exists()
        )
        assert (folder / "tensorboard").is_dir()
    assert not (tmp_path / "old-3").exists()
    done = run("train.py", *flags, "--max_iters=10", f"--out_dir={tmp_path / 'old-1'}", "--init_from=resume")
    assert done.stdout.startswith("resumed at step 4")


def test_an_earlier_run_that_cannot_be_moved_is_one_line(trained, dataset, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def rename(self, target):  # as in a folder that is read-only
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr("pathlib.Path.rename", rename)
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", "--max_iters=1"]
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    with pytest.raises(errors.RunError, match=f"cannot write {tmp_path / 'out'}: Read-only file system"):
        train.main()
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in before.items())


def test_a_resume_without_a_state_leaves_no_folder(dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path / 'no'}", "--init_from=resume"]
    assert "ckpt.pt" in error("train.py", *flags)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_second_run_in_the_same_folder_is_one_line(dataset, tmp_path, signum):
    flags = [
        *SMALL,
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        "--eval_interval=1",
    ]
    first = Script("train.py", *flags, "--max_iters=100000")
    while not (tmp_path / "best.pt").exists() and first.process.is_alive():
        time.sleep(0.01)
    for more in ([], ["--init_from=resume"]):
        assert f"another run writes to {tmp_path}" in error("train.py", *flags, "--max_iters=3", *more)
    os.kill(first.process.pid, signum)
    assert first.wait().returncode in (-signum, 128 + signum)
    step = GPT.load_checkpoint(tmp_path / "ckpt.pt")[1]["step"]  # a lock ends with its process
    run("train.py", *flags, f"--max_iters={step + 2}", "--init_from=resume")
    assert steps(tmp_path) == list(range(step + 3)) and not (tmp_path / "old-1").exists()


def test_lines_of_metrics_that_are_no_records_are_skipped_with_a_word(trained, dataset, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    path = tmp_path / "out" / "metrics.jsonl"
    before = path.read_bytes()
    lines = [
        b"[1]",
        b'{"loss": 2.0}',
        b'{"step": "a"}',
        b'{"step": 3, "loss": "b"}',
        b"\xff\xfe",
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(lines) + b"\n" + before + b'{"step": 15, "lo')
    flags = [
        *SMALL,
        f"--dataset={dataset}",
        f"--out_dir={tmp_path / 'out'}",
        "--eval_interval=10",
    ]
    done = run("train.py", *flags, "--max_iters=30", "--init_from=resume")
    assert "skipped 7 of 10 lines" in done.stderr
    assert steps(tmp_path / "out") == [0, 10, 20, 30] and path.read_bytes().startswith(before.splitlines()[0])


def rewrite(path, **changes):
    """A checkpoint with other values in it, and good CRCs."""
    state = torch.load(path, weights_only=True)
    for key, value in changes.items():
        state[key] = value(state[key]) if callable(value) else value
    torch.save(state, path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(step="x"),
        dict(step=-1),
        dict(best=None),
        dict(best=float("nan")),
        dict(id=7),
        dict(train_config=[]),
        dict(train_config={}),
        dict(train_config=lambda c: c | {"sequence_len": "x"}),
        dict(train_config=lambda c: c | {"sequence_len": -5}),
        dict(train_config=lambda c: c | {"init_from": None}),
        dict(optimizers=lambda o: o[:1]),
        dict(optimizers=lambda o: o[::-1]),
        dict(optimizers=lambda o: [*o, {}]),
        dict(optimizers=[1, 2]),
        dict(optimizers=[{}, {}]),
        dict(optimizers=lambda o: [o[0] | {"state": {0: 1}}, o[1]]),
        dict(optimizers=lambda o: [o[0], o[1] | {"state": {0: o[1]["state"][0]}}]),
        dict(optimizers=lambda o: [{"state": {i: {} for i in o[0]["state"]}}, o[1]]),
        dict(
            optimizers=lambda o: [
                {"state": {i: {"momentum_buffer": torch.ones(3)} for i in o[0]["state"]}},
                o[1],
            ]
        ),
        dict(optimizers=lambda o: [{"state": {i: {"momentum_buffer": "x"} for i in o[0]["state"]}}, o[1]]),
    ],
    ids=" ".join,
)
def test_a_state_with_wrong_values_is_damaged(changes, trained, dataset, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path / "out")
    rewrite(tmp_path / "out" / "ckpt.pt", **changes)
    flags = [
        *SMALL,
        f"--dataset={dataset}",
        f"--out_dir={tmp_path / 'out'}",
        "--max_iters=30",
        "--init_from=resume",
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    with pytest.raises(errors.RunError, match="damaged"):
        train.main()


def test_a_gradient_that_is_not_finite_is_never_saved(dataset, tmp_path, monkeypatch, capsys):
    """The loss may be finite where its gradient is not, and ckpt_interval saves without an evaluation."""

    def poisoned(trainer, state, forward_backward=train.forward_backward):
        if state.step == 5:
            state.model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
        return forward_backward(trainer, state)

    monkeypatch.setattr(train, "forward_backward", poisoned)
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--ckpt_interval=1", "--max_iters=20"]
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    with pytest.raises(errors.RunError, match=r"gradient at step 6.*learning_rate.*float32"):
        train.main()
    model, extra = GPT.load_checkpoint(tmp_path / "ckpt.pt")
    assert extra["step"] == 5 and all(p.isfinite().all() for p in model.parameters())


def test_a_folder_that_cannot_be_written_is_one_line_before_any_training(dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", "--max_iters=1"]
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out", "/proc/self"):
        done = run("train.py", *flags, f"--out_dir={out}", status=2)
        assert (
            done.stderr.startswith("error: ")
            and len(done.stderr.splitlines()) == 1
            and str(out) in done.stderr
        )
        assert "step 0" not in done.stdout


def damaged(content: bytes, seed: int) -> bytes:
    """A file cut off at a random length, or with some random bytes flipped where it says what is in it."""
    rng = random.Random(seed)
    if seed % 2:
        return content[: rng.randrange(len(content))]
    broken = bytearray(content)
    # a zip file: the pickle that names the tensors comes first, the table of contents last
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(4000)
        broken[at if rng.random() < 0.7 else -1 - at] ^= rng.randint(1, 255)
    return bytes(broken)


@pytest.mark.parametrize("seeds", [range(80), pytest.param(range(80, 400), marks=pytest.mark.slow)], ids=str)
def test_no_damage_to_a_checkpoint_gives_a_traceback(seeds, trained, dataset, tmp_path, monkeypatch, capsys):
    """Half of the files are sampled from, half are resumed from."""
    best, ckpt = (trained / "best.pt").read_bytes(), (trained / "ckpt.pt").read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    flags = [*SMALL, f"--dataset={dataset}", "--max_iters=20", "--init_from=resume"]
    monkeypatch.setattr(train.Log, "plot", lambda self: None)  # a second each
    refused = 0
    for seed in seeds:
        if seed % 4 < 2:
            (out / "best.pt").write_bytes(damaged(best, seed))
            script, argv = sample, ["--prompt=a", "--max_tokens=1", f"--ckpt={out / 'best.pt'}"]
        else:
            (out / "ckpt.pt").write_bytes(damaged(ckpt, seed))
            script, argv = train, [*flags, f"--out_dir={out}"]
        monkeypatch.setattr("sys.argv", [script.__file__, *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            errors.run(script.main)  # lets through what is not one of ours: that is the traceback
        err = capsys.readouterr().err
        refused += end.value.code != 0
        one_line = err.startswith("error: ") and err.count("\n") == 1 and ".pt is damaged" in err
        assert end.value.code == 0 or (end.value.code == 1 and one_line), (seed, err)
    assert refused > 0.625 * len(seeds)  # all that were cut off, and many more

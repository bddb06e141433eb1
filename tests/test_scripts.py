import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, error, run, write_prepare
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters

import sample
import train
from gpt import GPT
from sologpt import parallel
from sologpt.tokenizer import Tokenizer


def records(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(path) -> dict[str, torch.Tensor]:
    return GPT.load(path).state_dict()


def test_a_run_leaves_its_checkpoints_and_metrics(trained):
    lines = records(trained)
    assert [line["step"] for line in lines] == [0, 10, 20]
    assert lines[0]["val_loss"] == pytest.approx(5.549, rel=0.01)  # ln 257
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 1
    assert lines[-1]["val_bpb"] == pytest.approx(lines[-1]["val_loss"] / 0.6931 * 1.0, rel=0.02)
    assert {"loss", "tokens_per_second", "lr"} <= set(lines[1])
    _, extra = GPT.load_checkpoint(trained / "best.pt")
    assert extra["step"] == 20 and extra["val_loss"] == lines[-1]["val_loss"]
    assert (trained / "ckpt.pt").exists() and (trained / "loss.png").stat().st_size > 5000


def test_the_same_command_gives_the_same_weights(trained, dataset, tmp_path):
    run(
        "train.py",
        *SMALL,
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        "--max_iters=20",
        "--eval_interval=10",
    )
    a, b = weights(trained / "ckpt.pt"), weights(tmp_path / "ckpt.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--dropout=0.3", "--gradient_accumulation_steps=2", "--grad_clip=1"],
        ["--optimizer=adamw", "--learning_rate=0.002", "--weight_decay=0.1"],
    ],
)
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(dataset, tmp_path, extra):
    flags = [
        *SMALL,
        *extra,
        f"--dataset={dataset}",
        "--max_iters=24",
        "--eval_interval=8",
        "--log_interval=2",
    ]
    run("train.py", *flags, f"--out_dir={tmp_path / 'a'}")
    code = f"""
import sys, signal
sys.path.insert(0, {str(ROOT)!r})
import train
lr_at = train.lr_at
def kill(config, step):  # as if the power failed
    if step == 13: signal.raise_signal(signal.SIGKILL)
    return lr_at(config, step)
train.lr_at = kill
train.main()
"""
    killed = tmp_path / "b"
    run("-c", code, *flags, f"--out_dir={killed}", status=-signal.SIGKILL)
    assert [line["step"] for line in records(killed)] == [0, 2, 4, 6, 8, 10, 12], (
        "more than ckpt.pt, of step 8"
    )
    run("train.py", *flags, f"--out_dir={killed}", "--init_from=resume")
    a, b = weights(tmp_path / "a" / "ckpt.pt"), weights(killed / "ckpt.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)
    without_clock = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in records(out)]
        for out in (tmp_path / "a", killed)
    ]
    assert without_clock[0] == without_clock[1]


@pytest.fixture(scope="module")
def long_run(dataset, tmp_path_factory) -> tuple[list[str], Path]:
    """The flags and the out_dir of a run that takes seconds, so that a signal comes in the middle of another."""
    flags = [*SMALL, f"--dataset={dataset}", "--max_iters=250", "--eval_interval=250", "--log_interval=1"]
    out = tmp_path_factory.mktemp("long")
    run("train.py", *flags, f"--out_dir={out}")
    return flags, out


@pytest.mark.parametrize(
    "signum, status",
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGPIPE, 141, marks=pytest.mark.slow),
    ],
)
def test_a_signal_finishes_the_step_saves_and_resumes_to_the_same_bits(long_run, tmp_path, signum, status):
    flags, whole = long_run
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags, f"--out_dir={out}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 20:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    if signum == signal.SIGPIPE:
        process.stdout.close()  # as `| head` does
    else:
        process.send_signal(signum)
    stderr = process.stderr.read()
    assert process.wait(60) == status and b"Traceback" not in stderr and b"resume" in stderr
    _, extra = GPT.load_checkpoint(out / "ckpt.pt")
    assert 20 <= extra["step"] < 250
    run("train.py", *flags, f"--out_dir={out}", "--init_from=resume")
    a, b = weights(out / "ckpt.pt"), weights(whole / "ckpt.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [line["step"] for line in records(out)] == list(range(251))


def test_accumulation_is_one_larger_batch(dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", "--max_iters=10", "--eval_interval=10", "--log_interval=1"]
    run(
        "train.py", *flags, "--batch_size=4", "--gradient_accumulation_steps=2", f"--out_dir={tmp_path / 'a'}"
    )
    run("train.py", *flags, "--batch_size=8", f"--out_dir={tmp_path / 'b'}")
    a, b = ([line["loss"] for line in records(tmp_path / name)[:-1]] for name in "ab")
    assert a == pytest.approx(b, abs=1e-5) and len(a) == 10


def test_fine_tuning_starts_from_a_checkpoint(trained, dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=1", "--eval_interval=1"]
    run(
        "train.py",
        *flags,
        f"--init_from={trained / 'best.pt'}",
        "--learning_rate=0",
        "--embd_lr=0",
        "--head_lr=0",
    )
    assert records(tmp_path)[0]["val_loss"] == pytest.approx(records(trained)[-1]["val_loss"])


def test_fine_tuning_keeps_the_shape_of_the_checkpoint(trained, dataset, tmp_path):
    flags = [
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        "--max_iters=2",
        "--eval_iters=1",
        "--sample_tokens=0",
    ]
    run("train.py", *flags, f"--init_from={trained / 'best.pt'}")
    model, extra = GPT.load_checkpoint(tmp_path / "ckpt.pt")
    assert model.config == GPT.load(trained / "best.pt").config
    assert extra["train_config"]["sequence_len"] == extra["train_config"]["n_embd"] == 16
    run("train.py", *flags, f"--init_from={trained / 'best.pt'}", "--dropout=0.5")
    dropped, extra = GPT.load_checkpoint(tmp_path / "ckpt.pt")
    assert dropped.config.dropout == extra["train_config"]["dropout"] == 0.5
    # it has learned something else
    assert not torch.equal(dropped.lm_head.weight, model.lm_head.weight)


def test_fine_tuning_into_another_shape_is_an_error(trained, dataset, tmp_path, error_here):
    """The shape comes from the checkpoint: another would be dropped silently. Shorter sequences are fine."""
    flags = [
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        f"--init_from={trained / 'best.pt'}",
        "--max_iters=1",
    ]
    for flag, words in (
        ("--n_layer=3", "n_layer=2"),
        ("--sequence_len=32", "sequence_len=16"),
        ("--qk_norm=false", "qk_norm"),
    ):
        line = error_here(train, *flags, flag)
        assert words in line and "comes from there" in line
    run("train.py", *flags, "--n_layer=2", "--sequence_len=8", "--dropout=0.1", "--sample_tokens=0")
    model, extra = GPT.load_checkpoint(tmp_path / "best.pt")
    assert model.config.sequence_len == 16 and extra["train_config"]["sequence_len"] == 8
    flags = [
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        "--init_from=resume",
        "--max_iters=2",
        "--dropout=0.1",
    ]
    # its own command, but for the longer run
    run("train.py", *flags, "--sequence_len=8", "--sample_tokens=0")
    assert "sequence_len=8" in error_here(train, *flags, "--sequence_len=16")


def test_a_state_whose_parameters_are_grouped_by_shape_resumes_to_the_same_bits(dataset, tmp_path):
    """As they were in earlier checkpoints: one group of Muon's for each shape."""
    flags = [
        *SMALL,
        f"--dataset={dataset}",
        "--max_iters=12",
        "--eval_interval=6",
        "--mlp=swiglu",
    ]
    run("train.py", *flags, f"--out_dir={tmp_path / 'a'}", "--keep_checkpoints=3")
    state = torch.load(tmp_path / "a" / "ckpt_00000006.pt", weights_only=True)
    [group] = state["optimizers"][0]["param_groups"]
    by_shape = {}
    for i in group["params"]:
        by_shape.setdefault(state["optimizers"][0]["state"][i]["momentum_buffer"].shape, []).append(i)
    assert len(by_shape) > 2 and [i for stack in by_shape.values() for i in stack] == group["params"]
    state["optimizers"][0]["param_groups"] = [group | {"params": params} for params in by_shape.values()]
    (tmp_path / "b").mkdir()
    torch.save(state, tmp_path / "b" / "ckpt.pt")
    run("train.py", *flags, f"--out_dir={tmp_path / 'b'}", "--init_from=resume")
    a, b = (weights(tmp_path / name / "ckpt.pt") for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_tokens_per_second_counts_what_a_device_still_computes_at_an_evaluation(
    dataset, tmp_path, monkeypatch
):
    """A GPU's work is done when `synchronize` returns: training takes until then, and no longer."""
    monkeypatch.setattr(parallel.World, "synchronize", lambda self: time.sleep(0.3))
    monkeypatch.setattr(train, "evaluate", lambda *a, f=train.evaluate: time.sleep(0.6) or f(*a))
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=4"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--log_interval=3", "--eval_interval=2"])
    train.main()
    logged = {line["step"]: line for line in records(tmp_path)}
    tokens = {2: 2, 3: 1}  # steps since the line before
    seconds = {step: n * 4 * 16 / logged[step]["tokens_per_second"] for step, n in tokens.items()}
    assert 0.3 < seconds[2] < 0.6 and seconds[3] < 0.3


def test_an_earlier_run_is_not_lost_to_a_new_one(trained, dataset, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    run("train.py", *SMALL, f"--dataset={dataset}", f"--out_dir={out}", "--max_iters=1")
    assert (
        GPT.load_checkpoint(out / "old-1" / "ckpt.pt")[1]["step"] == 20
        and (out / "old-1" / "best.pt").exists()
    )
    assert GPT.load_checkpoint(out / "ckpt.pt")[1]["step"] == 1


def test_metrics_cut_off_within_a_line_do_not_keep_a_run_from_going_on(trained, dataset, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    text = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text[:-20])
    run(
        "train.py", *SMALL, f"--dataset={dataset}", f"--out_dir={out}", "--init_from=resume", "--max_iters=20"
    )
    assert [line["step"] for line in records(out)] == [0, 10, 20]


def test_a_missing_dataset_is_prepared(tmp_path):
    for name in ("gpt.py", "train.py", "configurator.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "sologpt", tmp_path / "sologpt")
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*.bin", "meta.json"))
    done = run("train.py", *SMALL, "--dataset=stdlib", "--max_iters=1", "--eval_iters=1", cwd=tmp_path)
    assert (tmp_path / "data" / "stdlib" / "meta.json").exists() and "bits/byte" in done.stdout
    line = error("train.py", *SMALL, "--dataset=text", cwd=tmp_path)
    assert "--input" in line


def test_a_dataset_is_prepared_with_the_tokenizer_of_the_checkpoint(dataset, tmp_path):
    """A missing one; one that is there with another tokenizer is an error, before anything is written."""
    bpe, other = tmp_path / "bpe", write_prepare(tmp_path / "other", dataset / "text")
    run("data/text/prepare.py", "--input", dataset / "text", "--out_dir", bpe, "--tokenizer=bpe:300")
    flags = [*SMALL, "--max_iters=2"]
    run("train.py", *flags, f"--dataset={bpe}", f"--out_dir={tmp_path / 'a'}")
    flags += [f"--init_from={tmp_path / 'a' / 'best.pt'}", f"--out_dir={tmp_path / 'b'}"]
    line = error("train.py", *flags, f"--dataset={dataset}")
    assert "another tokenizer" in line and not (tmp_path / "b" / "ckpt.pt").exists()
    run("train.py", *flags, f"--dataset={other}")
    [of_data, of_model] = [
        json.loads((other / "meta.json").read_text()),
        GPT.load_checkpoint(tmp_path / "b/best.pt")[1],
    ]
    assert (
        of_data["tokenizer"]
        == of_model["tokenizer"]
        == json.loads((bpe / "meta.json").read_text())["tokenizer"]
    )


def test_metrics_go_elsewhere_too(dataset, tmp_path):
    """Weights & Biases (offline) and TensorBoard have what metrics.jsonl has: each step once after a resume."""
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--eval_interval=5", "--log_interval=1"]
    flags += ["--tensorboard", "--wandb_log"]
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run("train.py", *flags, "--max_iters=5", **env)
    run("train.py", *flags, "--max_iters=8", "--init_from=resume", **env)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key in ("loss", "val_loss", "lr"):
        theirs = {event.step: event.value for event in events.Scalars(key)}
        ours = {line["step"]: line[key] for line in records(tmp_path) if key in line}
        assert theirs == pytest.approx(ours) and len(events.Scalars(key)) == len(ours)
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({run.name.split("-")[-1] for run in runs}) == 1  # the id is that of one run


@pytest.mark.parametrize("extra", ["wandb", "tensorboard"])
def test_a_missing_extra_is_one_line(extra, dataset, tmp_path):
    (tmp_path / f"{extra}.py").write_text("raise ImportError")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import train; "
    code += "train.errors.run(train.main)"
    flag = {"wandb": "--wandb_log", "tensorboard": "--tensorboard"}[extra]
    line = error("-c", code, *SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}", flag)
    assert f"extra '{extra}'" in line and not (tmp_path / "ckpt.pt").exists()


def test_learning_rates_rise_linearly_stay_and_fall_to_zero_after_the_last_step():
    config = train.Config(max_iters=10, warmup_iters=4, warmdown=0.4)
    assert [train.lr_at(config, step) for step in range(10)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_model_that_has_not_trained_is_not_the_best(dataset, tmp_path):
    run(
        "train.py",
        *SMALL,
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        "--max_iters=0",
    )
    assert (tmp_path / "ckpt.pt").exists() and not (tmp_path / "best.pt").exists()


def losses_with(flag: str, dataset, tmp_path, monkeypatch) -> tuple[list[float], list[float]]:
    """The losses of a run without a flag and of one with it."""
    flags = [*SMALL, f"--dataset={dataset}", "--max_iters=10", "--eval_interval=10", "--log_interval=1"]
    found = []
    for name, more in (("without", []), ("with", [flag])):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, f"--out_dir={tmp_path / name}", *more])
        train.main()
        found.append([line.get("loss", line.get("val_loss")) for line in records(tmp_path / name)])
    return found[0], found[1]


def test_autocast_trains_as_float32_does_up_to_its_rounding(dataset, tmp_path, monkeypatch):
    plain, autocast = losses_with("--dtype=bfloat16", dataset, tmp_path, monkeypatch)
    assert autocast == pytest.approx(plain, abs=0.05) and autocast[-1] < autocast[0] - 0.5
    assert autocast != pytest.approx(plain, abs=1e-6), "nothing was computed in bfloat16"


@pytest.mark.slow
def test_compile_gives_the_same_losses(dataset, tmp_path, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = losses_with("--compile", dataset, tmp_path, monkeypatch)
    assert compiled == pytest.approx(plain, abs=1e-3)
    assert counters["stats"]["unique_graphs"] >= 2, "one for training, one for evaluation"
    first, second, *_ = records(tmp_path / "with")
    assert "compile_seconds" in first and "tokens_per_second" not in first and "tokens_per_second" in second


def test_train_says_what_is_wrong(trained, dataset, tmp_path, error_here):
    good = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"]
    for flags, words in (
        (["--n_layers=3"], "did you mean 'n_layer'"),
        (["--n_layer=x"], "must be a whole number"),
        (["config/none.py"], "config/none.py"),
        (["--dataset=nowhere"], "nowhere"),
        (["--n_embd=30", "--n_head=4"], "30"),
        (["--sequence_len=100000"], "100000"),
        (["--vocab_size=100"], "outside the vocabulary of 100"),
        (["--batch_size=0"], "batch_size"),
        (["--learning_rate=-1"], "learning_rate"),
        (["--beta1=1"], "beta1"),
        (["--seed=-1"], "seed"),
        (["--rope_base=0"], "rope_base"),
        (["--device=meta"], "meta"),
        ([f"--init_from={tmp_path}"], "no best.pt"),
        (["--dtype=float17"], "float17"),
        (["--optimizer=sgd"], "sgd"),
        (["--device=abacus"], "abacus"),
        (["--init_from=resume"], "ckpt.pt"),
        (["--init_from=nowhere.pt"], "nowhere.pt"),
        ([f"--out_dir={ROOT / 'gpt.py'}"], "out_dir"),
        (["--init_from=resume", f"--out_dir={trained}", "--n_layer=3"], "n_layer=2"),
        (
            ["--init_from=resume", f"--out_dir={trained}", "--optimizer=adamw"],
            "not trained with optimizer=adamw",
        ),
    ):
        assert words in error_here(train, *good, *flags), flags
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes()[:5000])
    assert "did you mean" in error("train.py", "--n_layers=3")
    shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns("text"))
    with open(tmp_path / "data" / "train.bin", "ab") as f:
        f.write(b"1")
    assert "train.bin has" in error_here(train, *good, f"--dataset={tmp_path / 'data'}")
    (tmp_path / "data" / "meta.json").unlink()
    assert "has no meta.json" in error_here(train, *good, f"--dataset={tmp_path / 'data'}")
    shutil.copytree(trained, tmp_path / "best")
    shutil.copy(trained / "best.pt", tmp_path / "best" / "ckpt.pt")
    assert "no state" in error(
        "train.py", *good, "--init_from=resume", f"--out_dir={tmp_path / 'best'}", status=1
    )
    for flag in ("--n_embd=100000000", "--n_layer=10000 --n_embd=4096", "--batch_size=1e9"):
        assert "out of memory: try a smaller batch_size" in error("train.py", *good, *flag.split(), status=1)
    for flag, words in (("--n_layer=1e9", "n_layer"), ("--learning_rate=1e300", "learning_rate must be")):
        assert words in error("train.py", *good, flag)
    assert "damaged" in error("train.py", *good, "--init_from=resume", f"--out_dir={damaged}", status=1)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=50", "--softcap=0"]
    done = run("train.py", *flags, "--learning_rate=1e30", "--head_lr=1e30", "--embd_lr=1e30", status=1)
    assert done.stderr.startswith("error: the loss at step 10 is nan") and "learning_rate" in done.stderr
    assert GPT.load_checkpoint(tmp_path / "ckpt.pt")[1]["step"] == 0
    flags += ["--eval_interval=10", "--log_interval=10"]
    done = run("train.py", *flags, "--learning_rate=1e30", "--head_lr=1e30", "--embd_lr=1e30", status=1)
    model, extra = GPT.load_checkpoint(tmp_path / "ckpt.pt")
    assert extra["step"] == 0 and all(p.isfinite().all() for p in model.parameters())


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(trained, dataset, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={out}", "--init_from=resume", "--max_iters=30"]
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import train
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # no file may grow larger
train.errors.run(train.main)
"""
    done = run("-c", code, *flags, status=1)
    assert done.stderr.startswith("error: cannot write") and len(done.stderr.splitlines()) == 1
    assert GPT.load_checkpoint(out / "ckpt.pt")[1]["step"] == 20
    assert not list(out.glob("*.tmp"))


# ---- sample.py


def test_sampling_says_where_it_comes_from_and_how_it_ended(trained):
    done = run("sample.py", f"--out_dir={trained.parent}", "--prompt=def ", "--max_tokens=30")
    assert done.stdout.startswith("def ")
    assert "best.pt, step 20" in done.stderr and "tokens/s" in done.stderr and "length" in done.stderr
    again = run("sample.py", f"--ckpt={trained / 'best.pt'}", "--prompt", "def ", "--max_tokens=30")
    assert again.stdout == done.stdout
    other = run("sample.py", f"--ckpt={trained / 'best.pt'}", "--prompt=def ", "--max_tokens=30", "--seed=1")
    assert other.stdout != done.stdout


def test_sampling_gives_what_generate_gives(trained):
    model, extra = GPT.load_checkpoint(trained / "best.pt")
    tokenizer = Tokenizer.from_dict(extra["tokenizer"])
    ids = list(
        model.generate(
            tokenizer.encode("x"), 40, temperature=0.7, top_k=9, seed=5, stop_tokens=[tokenizer.eot]
        )
    )
    done = run(
        "sample.py",
        f"--out_dir={trained}",
        "--prompt=x",
        "--max_tokens=40",
        "--temperature=0.7",
        "--top_k=9",
        "--seed=5",
    )
    assert done.stdout == f"x{tokenizer.decode([i for i in ids if i != tokenizer.eot])}\n"
    ahead = run("sample.py", *done.args[1:], "--lookup=7")
    assert ahead.stdout == done.stdout


def test_prompts_from_a_file_and_from_standard_input(trained, tmp_path):
    (tmp_path / "p.txt").write_text("def é(")
    flags = [f"--out_dir={trained}", "--max_tokens=10", "--temperature=0"]
    outs = {
        run("sample.py", *flags, "--prompt=def é(").stdout,
        run("sample.py", *flags, f"--prompt=FILE:{tmp_path / 'p.txt'}").stdout,
        run("sample.py", *flags, "--prompt", "-", stdin="def é(").stdout,
    }
    assert len(outs) == 1


def test_several_samples(trained):
    done = run("sample.py", f"--out_dir={trained}", "--prompt=de", "--num_samples=3", "--max_tokens=12")
    samples = done.stdout.split("---\n")
    assert len(samples) == 3 and all(s.startswith("de") for s in samples) and len(set(samples)) == 3
    assert done.stderr.endswith("ended by length\n")
    stop = samples[1][2]
    done = run("sample.py", *done.args[1:], f"--stop={stop}")
    n = sum(stop in s[2:] for s in samples)
    assert n == 3 or {f"stop ({n})", f"length ({3 - n})"} == {
        *done.stderr.strip().split("ended by ")[1].split(", ")
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_on_a_build_for_the_cpu_says_what_to_install(trained, error_here, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    line = error_here(sample, f"--out_dir={trained}", "--device=cuda")
    assert "is a build for the CPU; pytorch.org/get-started/locally" in line


def test_a_prompt_longer_than_the_window_is_said(trained):
    done = run("sample.py", f"--out_dir={trained}", f"--prompt={'x' * 40}", "--max_tokens=3")
    assert "40 tokens" in done.stderr and "last 16" in done.stderr


@pytest.mark.slow
def test_compiled_sampling_gives_the_same_text(trained):
    flags = [f"--out_dir={trained}", "--prompt=de", "--max_tokens=40", "--temperature=0"]
    assert run("sample.py", *flags, "--compile").stdout == run("sample.py", *flags).stdout
    env = os.environ | {"CXX": "none"}
    command = [sys.executable, "sample.py", *flags, "--compile"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == run("sample.py", *flags).stdout
    assert "note: decoding is slow without decode.cpp" in done.stderr


def test_sample_says_what_is_wrong(trained, tmp_path, error_here):
    good = f"--out_dir={trained}"
    (tmp_path / "bad.pt").write_bytes(b"bad")
    (tmp_path / "binary").write_bytes(b"\xff")
    for flags, words in (
        ([f"--out_dir={tmp_path}"], "train.py"),
        ([f"--ckpt={tmp_path / 'none.pt'}"], "none.pt"),
        ([good, "--prompt="], "empty"),
        ([good, "--prompt=FILE:nowhere"], "nowhere"),
        ([good, f"--prompt=FILE:{tmp_path / 'binary'}"], "binary"),
        ([good, "--temperature=-1"], "temperature"),
        ([good, "--top_k=-1"], "top_k"),
        ([good, "--num_samples=0"], "num_samples"),
        ([good, "--promt=a"], "did you mean 'prompt'"),
        ([good, "--device=abacus"], "abacus"),
    ):
        assert words in error_here(sample, *flags), flags
    assert "did you mean" in error("sample.py", "--promt=a")
    assert "bad.pt" in error("sample.py", f"--ckpt={tmp_path / 'bad.pt'}", status=1)


def test_a_reader_that_leaves_is_no_error(trained):
    process = subprocess.Popen(
        [sys.executable, "sample.py", f"--out_dir={trained}", "--max_tokens=5000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    process.stdout.read(5)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(60) == 141 and b"Traceback" not in stderr

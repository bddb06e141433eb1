"""The first hour with train.py: what it trains by default, what it shows, how it stops, --eval_only."""

import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, error, run, write_prepare
from terminal import Terminal
from test_parallel import records, together

import train
from gpt import GPT, GPTConfig
from sologpt import data, hf, log, progress
from sologpt.load import load_model
from sologpt.parallel import World

SLOW = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from sologpt import data, errors
get_batch = data.get_batch
def slow(tokens, starts, *args):
    time.sleep({{seconds}} if len(tokens) < 4000 else 0)  # the validation split
    return get_batch(tokens, starts, *args)
data.get_batch = slow
errors.run(train.main)
"""


def same_weights(a: Path, b: Path) -> bool:
    a, b = GPT.load(a).state_dict(), GPT.load(b).state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- what is trained


def test_without_a_config_file_it_trains_the_tiny_model(dataset, tmp_path):
    flags = [f"--dataset={dataset}", f"--out_dir={tmp_path / 'bare'}", "--eval_iters=1", "--sample_tokens=0"]
    run("train.py", *flags, "--max_iters=1", "--dropout=0.1")
    run(
        "train.py",
        "config/tiny.py",
        *flags,
        f"--out_dir={tmp_path / 'tiny'}",
        "--max_iters=1",
        "--dropout=0.1",
    )
    assert same_weights(tmp_path / "bare" / "ckpt.pt", tmp_path / "tiny" / "ckpt.pt")
    configs = [
        GPT.load_checkpoint(tmp_path / name / "ckpt.pt")[1]["train_config"] for name in ("bare", "tiny")
    ]
    assert configs[0] | {"out_dir": ""} == configs[1] | {"out_dir": ""} and configs[0]["dropout"] == 0.1
    done = run("train.py", *flags, "--max_iters=2", "--dropout=0.1", "--init_from=resume")
    assert "resumed at step 1; max_iters is 2, was 1\n" in done.stdout


def test_a_run_of_another_shape_is_resumed_without_a_config_file(trained, dataset, tmp_path):
    """The defaults are no request for their shape, but a file or a flag that names them is."""
    flags = [f"--dataset={dataset}", f"--out_dir={tmp_path}", "--sample_tokens=0"]
    run("train.py", *SMALL, *flags, "--max_iters=1")
    done = run("train.py", *flags, "--init_from=resume", "--max_iters=2", "--eval_iters=1")
    assert "resumed at step 1" in done.stdout
    line = error("train.py", *flags, "--init_from=resume", "--max_iters=2", "--n_layer=3")
    assert "n_layer=2" in line
    for asked in ("config/tiny.py", "--n_embd=96"):
        line = error("train.py", asked, *flags, "--init_from=resume", "--max_iters=2")
        assert "n_embd=16, not 96" in line


def test_a_key_that_fits_the_checkpoint_need_not_fit_the_defaults(dataset, tmp_path):
    """4 key/value heads are too many for the 2 heads of the default."""
    flags = [f"--dataset={dataset}", f"--out_dir={tmp_path / 'a'}", "--max_iters=1", "--sample_tokens=0"]
    run("train.py", *SMALL, *flags, "--n_head=4", "--n_kv_head=4")
    flags = [*flags, f"--out_dir={tmp_path / 'b'}", f"--init_from={tmp_path / 'a' / 'ckpt.pt'}"]
    run("train.py", *flags, "--n_kv_head=4", "--eval_iters=1")
    assert "n_kv_head=4, not 2" in error("train.py", *flags, "--n_kv_head=2")
    assert "n_head 4 must be divisible by n_kv_head 3" in error("train.py", *flags, "--n_kv_head=3")


def test_micro_batches_are_as_many_as_the_processes_can_share(dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", "--max_iters=2"]
    first, second = together(2, *flags, "--gradient_accumulation_steps=3", f"--out_dir={tmp_path / 'two'}")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.startswith("gradient_accumulation_steps is 4, not 3: a multiple of 2 processes\n")
    assert "256 tokens a step" in first.stdout and not second.stdout
    run("train.py", *flags, "--gradient_accumulation_steps=4", f"--out_dir={tmp_path / 'one'}")
    losses = [
        [record["loss"] for record in records(tmp_path / name) if "loss" in record] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# ---- what is shown


def test_flops_per_token():
    shape = dict(sequence_len=8, vocab_size=50, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
    block = 16 * 16 * 2 + 16 * 8 * 2 + 2 * 16 * 64
    model = GPT(GPTConfig(**shape))
    assert log.flops_per_token(model) == 6 * (2 * block + 50 * 16) + 12 * 2 * 16 * 8
    assert log.flops_per_token(model, 4) == 6 * (2 * block + 50 * 16) + 12 * 2 * 16 * 4
    switches = dict(head_dim=6, n_hidden=20, mlp="swiglu", norm_weight=True, qkv_bias=True, tie_embd=True)
    model = GPT(GPTConfig(**shape, **switches))
    assert log.flops_per_token(model) == 6 * model.num_params() + 12 * 2 * 12 * 8
    model = GPT(GPTConfig(**shape, positions="learned"))
    assert log.flops_per_token(model) == 6 * (2 * block + 50 * 16) + 12 * 2 * 16 * 8


def test_mfu_is_logged_and_shown_where_the_peak_is_known(monkeypatch, capsys):
    """3 steps in 6 seconds, of which 4 were an evaluation."""
    world = World(0, 0, 2, torch.device("cpu"))
    speeds = []
    for peak in (6000.0, None):
        now = [0.0]
        monkeypatch.setattr(log, "peak_flops", lambda device, peak=peak: peak)
        monkeypatch.setattr(log.time, "perf_counter", lambda now=now: now[0])
        clock = log.Clock(flops_per_token=400, world=world)
        now[0] = 1.0
        with clock.paused():
            now[0] = 5.0
        now[0] = 6.0
        speeds.append(clock.speed(30))
    assert speeds == [{"tokens_per_second": 15.0, "mfu": 0.5}, {"tokens_per_second": 15.0}]
    shown = progress.Progress(train.Config(max_iters=100), 0)
    for speed in speeds:
        shown.show({"step": 0, "loss": 1.0} | speed)
    line = "  0% step 0/100 | loss 1.0000 | 15 tokens/s"
    assert capsys.readouterr().out.splitlines() == [f"{line} | 50.0% MFU", line]


def test_a_terminal_shows_how_far_an_evaluation_is_and_ctrl_c_ends_it(dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", "--eval_iters=40", "--max_iters=3", "--log_interval=1"]
    terminal = Terminal("-c", SLOW.format(seconds=0.2), *flags, f"--out_dir={tmp_path / 'stopped'}")
    terminal.wait_for(r"\[-{12}\]   0%  0/3 \| evaluating 1/\d+")
    terminal.send("\x03")
    seen = terminal.wait_for("evaluating|stopped")
    assert "Ctrl-C: stops after this step and saves; a second one stops at once, and loses the steps" in seen
    assert terminal.status() == 130
    seen += terminal.output
    assert "stopped before step 0; the same command with --init_from=resume goes on" in seen
    assert "Traceback" not in seen and "val loss" not in seen

    resumed = Terminal("train.py", *flags, f"--out_dir={tmp_path / 'stopped'}", "--init_from=resume")
    assert resumed.status() == 0
    seen = resumed.output
    assert re.search(r"\r\x1b\[K\[-{12}\]   0%  0/3 \| evaluating 0/\d+", seen)
    assert re.search(r"\r\x1b\[K\[#{12}\] 100%  3/3 \| loss [\d.]+, val [\d.]+ \| [\d.]+k? tok/s\r\n", seen)
    run("train.py", *flags, f"--out_dir={tmp_path / 'whole'}")
    assert same_weights(tmp_path / "stopped" / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")
    assert [line["step"] for line in records(tmp_path / "stopped")] == [0, 1, 2, 3]


def test_a_signal_in_the_last_evaluation_is_resumed_to_its_end(dataset, tmp_path, monkeypatch):
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=4"]

    def get_batch(tokens, starts, *args, f=data.get_batch):
        if len(tokens) < 4000 and run_is_at_its_end():
            signal.raise_signal(signal.SIGTERM)
        return f(tokens, starts, *args)

    def run_is_at_its_end() -> bool:
        return [line["step"] for line in records(tmp_path)] == [0, 1, 2, 3]

    monkeypatch.setattr(data, "get_batch", get_batch)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--log_interval=1"])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 143 and not (tmp_path / "best.pt").exists()
    assert GPT.load_checkpoint(tmp_path / "ckpt.pt")[1]["step"] == 4
    run("train.py", *flags, "--log_interval=1", "--init_from=resume")
    assert [line["step"] for line in records(tmp_path)] == [0, 1, 2, 3, 4] and (tmp_path / "best.pt").exists()


def test_a_second_signal_ends_a_slow_step_at_once(dataset, tmp_path):
    code = SLOW.format(seconds=0).replace(
        "errors.run", "train.parallel.clip_gradient = lambda *_: time.sleep(600)\n#"
    )
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    terminal = Terminal("-c", code + "train.main()", *flags)
    terminal.wait_for(r"0/600 \| training")
    terminal.send("\x03")
    terminal.wait_for("a second one stops at once")
    terminal.send("\x03")
    assert terminal.status() == -signal.SIGINT
    assert GPT.load_checkpoint(tmp_path / "ckpt.pt")[1]["step"] == 0


def test_a_file_gets_a_line_for_each_record_and_one_for_what_begins(dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    lines = run(
        "train.py", *flags, "--max_iters=4", "--eval_interval=2", "--log_interval=1"
    ).stdout.splitlines()
    kinds = [re.sub(r"\d+([.,:]\d+)*", "#", line) for line in lines[1:]]
    loss, val = "loss # | # tokens/s", "val loss #, # bits/byte"
    assert kinds[:3] == [
        f"  #% step #/# | {what}" for what in ("evaluating ...", "training ...", f"{loss} | {val}")
    ]
    begins, ends = f" #% step #/# | {loss}", f"#% step #/# | {val}"
    assert kinds[3:7] == [begins, f"{begins} | # left | {val}", begins, ends], lines


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that a Progress sees, in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("in_place", [False, True])
def test_the_time_left_is_that_of_the_last_steps_and_evaluations(clock, in_place, capsys):
    """The first step takes 500 s, the next 20 take 90 s each, all others 2 s, and an evaluation 30 s."""
    shown = progress.Progress(train.Config(max_iters=260, eval_interval=100), 0)
    shown.in_place = in_place
    for step in range(151):
        if step % 100 == 0:
            shown.status(step, "evaluating")
            clock[0] += 30
        shown.status(step, "training")
        clock[0] += 500 if step == 0 else 90 if step <= 20 else 2
        shown.show({"step": step, "loss": 1.0 + step, "tokens_per_second": 5000.0})
    lines = re.split("\n|\r\x1b\\[K", capsys.readouterr().out)
    left = {step: [line for line in lines if f" {step}/260" in line][-1] for step in (0, 4, 98, 150)}
    assert "left" not in left[0], "nothing is known yet"
    assert f" {256 * 90 // 3600}:" in left[4] and "left" in left[4]
    for step, seconds in ((98, 161 * 2 + 3 * 30), (150, 109 * 2 + 2 * 30)):
        assert left[step].endswith(" | {}:{:02} left".format(*divmod(seconds, 60))), left[step]
    if in_place:
        assert left[150].startswith("[######------]  58%  150/260 | loss 151.00 | 5.0k tok/s | ")
    else:
        assert left[150].startswith(" 58% step 150/260 | loss 151.0000 | 5,000 tokens/s | ")


def test_a_slow_step_shows_its_micro_batches_and_no_line_wraps(clock, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    shown = progress.Progress(train.Config(max_iters=9), 0)
    shown.in_place = True
    shown.show({"step": 0, "loss": 1.0, "val_loss": 2.0})
    for i, clock[0] in enumerate((10.0, 12.0, 15.0)):
        shown.status(1, "training", f"{i + 1}/3")
    first, second, third = capsys.readouterr().out.split("\r\x1b[K")[-3:]
    line = "[#-----------]  11%  1/9 | loss 1.00, val 2.00"
    assert (first, second) == (line, line)
    assert third == f"{line} | micro-batch 3/3"[:59]


def test_compilation_is_no_speed(monkeypatch):
    """40 s of which 5 are in an evaluation, then 30 tokens in 2 s."""
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    clock = log.Clock(400, World(0, 0, 1, torch.device("cpu")), compiles=True)
    with clock.paused():
        now[0] = 5.0
    now[0] = 40.0
    assert clock.speed(30) == {"compile_seconds": 40.0}
    now[0] = 42.0
    assert clock.speed(60) == {"tokens_per_second": 15.0}


def test_two_lines_of_a_sample_are_shown_at_every_evaluation(dataset, tmp_path, monkeypatch):
    """They are what the model of that step says, and change nothing of the run."""
    flags = [*SMALL, f"--dataset={dataset}", "--max_iters=20", "--eval_interval=10", "--sample_prompt=def f"]
    flags += ["--keep_checkpoints=9", "--learning_rate=0.1"]
    out = run("train.py", *flags, f"--out_dir={tmp_path / 'a'}", "--sample_tokens=50").stdout
    run("train.py", *flags, f"--out_dir={tmp_path / 'b'}", "--sample_tokens=0")
    assert same_weights(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")
    seen = []
    for step in (0, 10):
        model, tokenizer, _ = load_model(tmp_path / "a" / f"ckpt_{step:08d}.pt")
        settings = dict(temperature=0.8, seed=step, stop_tokens=[tokenizer.eot])
        ids = [*model.generate(tokenizer.encode("def f"), 50, **settings)]
        text = "def f" + tokenizer.decode(i for i in ids if i != tokenizer.eot)
        lines = [line[:72] for line in text.splitlines() if re.search(r"[^\W_]", line)][:2]
        lines = ["".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines]
        block = re.search(rf"step {step}/20 .*val loss.*\n((    .*\n)+)", out)[1]
        assert block.splitlines() == [f"    {line}" for line in lines]
        seen.append(block)
    assert seen[0] != seen[1]


def test_the_end_explains_the_loss_once(trained, dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=20"]
    with_plot = run("train.py", *flags, plot=True).stdout
    hidden = (
        f"import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, {str(ROOT)!r}); import train; "
    )
    without = run("-c", f"{hidden}train.errors.run(train.main)", *flags).stdout
    first, last = (line for line in records(tmp_path) if "val_bpb" in line)
    bits = f"{last['val_bpb']:.2f} bits per byte (it began at {first['val_bpb']:.2f}, and 8 is guessing)"
    for out, plotted in (
        (with_plot, f"how the loss fell: {tmp_path / 'loss.png'}"),
        (without, "pip install matplotlib, and a run also draws its losses into loss.png"),
    ):
        meaning, plot, model, command = out.splitlines()[-4:]
        assert meaning == f"best validation loss {last['val_loss']:.4f}, {bits}" and plot == plotted
        assert str(tmp_path / "best.pt") in model and command.endswith("--interactive --max_tokens 200")


@pytest.mark.parametrize("out", ["out/mine", "runs/a 'b'"])
def test_the_last_line_is_a_command_that_samples(out, dataset, tmp_path):
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={out}", "--max_iters=1"]
    done = run(ROOT / "train.py", *flags, cwd=tmp_path)
    command = done.stdout.splitlines()[-1]
    words = shlex.split(command)
    assert words[0] == "python" and ("--ckpt" in words) == out.startswith("runs") and "\n" not in words
    sampled = run(*words[1:], "--max_tokens=5", cwd=tmp_path, stdin="def \n")
    assert len(sampled.stdout) >= 5, sampled.stderr
    assert f"{out}/best.pt" in sampled.stderr


# ---- --eval_only


def test_eval_only_gives_the_loss_and_writes_nothing(trained, dataset, tmp_path):
    """From scratch, from a run to resume and from a checkpoint, by one process and by two."""
    flags = [f"--dataset={dataset}", "--eval_only", "--batch_size=4", "--eval_iters=2"]
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    first, last = records(trained)[0], records(trained)[-1]
    for extra, record in (
        ([*SMALL, f"--out_dir={tmp_path / 'new'}"], first),
        ([*SMALL, f"--out_dir={trained}"], first),
        ([*SMALL, f"--out_dir={trained}", "--init_from=resume"], last),
        ([f"--out_dir={tmp_path / 'new'}", f"--init_from={trained / 'best.pt'}"], last),
    ):
        done = run("train.py", *flags, *extra)
        result = f"val loss {record['val_loss']:.4f}, {record['val_bpb']:.4f} bits/byte"
        assert done.stdout.splitlines()[-1] == result and "step" not in result, extra
        assert "writing to" not in done.stdout and "0%" not in done.stdout
    assert "no checkpoint" in error("train.py", *flags, f"--out_dir={tmp_path / 'new'}", "--init_from=resume")
    main, other = together(2, *flags, *SMALL, f"--out_dir={trained}", "--init_from=resume")
    assert main.returncode == other.returncode == 0
    shown = float(re.search(r"val loss ([\d.]+),", main.stdout)[1])
    assert shown == pytest.approx(last["val_loss"], abs=2e-4)
    assert not (tmp_path / "new").exists()
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_eval_only_of_an_open_model(trained, dataset, tmp_path):
    model, tokenizer, _ = load_model(trained / "best.pt")
    hf.save(model, tokenizer, tmp_path / "hf")
    folder = write_prepare(tmp_path / "data", dataset / "text")
    flags = [f"--dataset={folder}", f"--out_dir={tmp_path / 'new'}", "--eval_iters=1000"]
    done = run("train.py", *flags, f"--init_from=hf:{tmp_path / 'hf'}", "--eval_only")
    val, T = torch.from_numpy(data.load(folder).val.astype("int64")), 16
    n = (len(val) - 1) // T
    loss = model(val[: n * T].view(n, T), val[1 : n * T + 1].view(n, T)).item()
    shown = float(re.search(r"val loss ([\d.]+),", done.stdout)[1])
    assert shown == pytest.approx(loss, abs=1e-4) and not (tmp_path / "new").exists()


def test_a_resume_that_fails_leaves_no_folder(dataset, tmp_path):
    for flags in ([], ["--eval_only"]):
        out = tmp_path / "no" / "where"
        line = error(
            "train.py", *SMALL, f"--dataset={dataset}", f"--out_dir={out}", "--init_from=resume", *flags
        )
        assert f"no checkpoint {out / 'ckpt.pt'}" in line and not (tmp_path / "no").exists()


def test_the_gap_between_two_lines_is_not_long():
    """A terminal's line is drawn again when a step begins, but at most ten times a second."""
    drawn, shown = [], progress.Progress(train.Config(max_iters=1000), 0)
    shown.in_place = True
    shown._draw = lambda step, parts: drawn.append(step) or setattr(shown, "drawn", time.monotonic())
    for step in range(1000):
        shown.status(step, "training")
    assert drawn[0] == 0 and len(drawn) < 500

"""sample.py as a user runs it: JSON, stop sequences, conversations in a terminal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, error, run
from terminal import Terminal

import sample
from gpt import GPT


def test_json_is_one_object_for_each_sample(trained):
    flags = [f"--out_dir={trained}", "--prompt=de", "--max_tokens=8"]
    done = run("sample.py", *flags, "--num_samples=3", "--json")
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(objects) == 3
    for o in objects:
        assert list(o) == ["prompt", "text", "tokens", "reason", "seconds", "tokens_per_second"]
        assert o["prompt"] == "de" and o["tokens"] == 8 and o["reason"] == "length" and o["seconds"] > 0
    plain = run("sample.py", *flags)
    one = json.loads(run("sample.py", *flags, "--json").stdout)
    assert plain.stdout == f"de{one['text']}\n"


def test_ids_that_pad_the_vocabulary_are_never_sampled(dataset, tmp_path):
    """An untrained model with 257 tokens and 400 ids: a third of its ids could not be decoded."""
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--vocab_size=400", "--max_iters=1"]
    run("train.py", *flags)
    assert run("sample.py", f"--out_dir={tmp_path}", "--max_tokens=200", "--temperature=9").stdout


def test_stop_sequences_on_the_command_line(trained):
    flags = [f"--out_dir={trained}", "--prompt=def ", "--max_tokens=60", "--temperature=0"]
    full = run("sample.py", *flags).stdout
    stop = full[10:12]
    done = run("sample.py", *flags, "--stop", stop, "--stop=\x01")
    assert done.stdout == full[: full.index(stop, 4)] + "\n" and "ended by stop" in done.stderr


@pytest.mark.parametrize("flags", [[], ["--temperature=0"], ["--json"], ["--interactive"]])
def test_weights_that_are_not_finite_are_one_line(trained, tmp_path, flags):
    model, extra = GPT.load_checkpoint(trained / "best.pt")
    model.h[0].mlp.c_proj.weight.data[0] = float("nan")
    model.save(tmp_path / "best.pt", **extra)
    done = run("sample.py", f"--ckpt={tmp_path / 'best.pt'}", *flags, status=1, stdin="a\n")
    assert (
        done.stderr.splitlines()[-1].startswith("error: the logits are not finite")
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("flags", [["--prompt"], ["--chat", "--prompt"], ["--interactive", "--prompt"]])
def test_a_prompt_on_which_the_pattern_fails_is_one_line(trained, tmp_path, flags):
    """tiktoken's pattern gives up after too many steps: its panic, in Rust, prints nothing of its own."""
    model, extra = GPT.load_checkpoint(trained / "best.pt")
    extra["tokenizer"] |= {"pattern": r"(?:a|a)+(?!a)b|[\s\S]"}
    extra["tokenizer"] |= {"chat_template": "{{ messages[-1].content }}", "eos_tokens": []}
    model.save(tmp_path / "best.pt", **extra)
    args = ["sample.py", f"--ckpt={tmp_path / 'best.pt'}", "--max_tokens=2", *flags]
    run(*args, "b")
    done = run(*args, "a" * 99, status=2)
    *notes, line = done.stderr.splitlines()
    assert "cannot encode this text" in line and line.startswith("error: ")
    assert len(notes) == (2 if "--interactive" in flags else 0), notes


def test_float16_is_offered(trained):
    flags = [f"--out_dir={trained}", "--prompt=def ", "--max_tokens=8", "--temperature=0"]
    assert run("sample.py", *flags, "--dtype=float16").stdout == run("sample.py", *flags).stdout


@pytest.mark.parametrize("flags", [[], ["--lookup=5"], ["--num_samples=3"], ["--quantize=int8"]])
def test_compile_changes_no_text(trained, flags):
    """On a CPU it is decode.cpp, also for a small model. Without a compiler, a line says so."""
    args = [f"--out_dir={trained}", "--prompt=def ", "--max_tokens=40", "--temperature=0", *flags]
    plain = run("sample.py", *args, "--device=cpu")
    compiled = run("sample.py", *args, "--device=cpu", "--compile")
    without = run("sample.py", *args, "--device=cpu", "--compile", CXX="no-such-compiler")
    assert compiled.stdout == without.stdout == plain.stdout
    note = "note: decoding is slow without decode.cpp: it takes a C++ compiler: CXX, c++, g++ or clang++"
    for done, notes in ((plain, 0), (compiled, 0), (without, 1)):
        assert done.stderr.splitlines().count(note) == notes == done.stderr.count("note: ")


def test_a_conversation_outgrows_the_window(trained):
    terminal = Terminal("sample.py", "--interactive", f"--out_dir={trained}", "--max_tokens=8")
    for turn in range(50):
        terminal.wait_for(r"> ")
        terminal.send(f"f{turn}\n")
        said = terminal.wait_for(r"\d+ tokens, the first after [\d,]+ ms, [\d,]+ tokens/s, ended by \w+")
        assert "8 tokens" in said or "stop" in said
    terminal.wait_for(r"> ")
    terminal.send("\n \n")  # empty lines send nothing
    terminal.wait_for(r"> ")
    terminal.wait_for(r"> ")
    terminal.send("\x04")
    assert terminal.status() == 0
    assert not any(word in terminal.output for word in ("Traceback", "error", "ended by"))


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(trained):
    flags = [
        f"--out_dir={trained}",
        "--max_tokens=1000000",
        "--temperature=0",
    ]  # it repeats itself without end
    terminal = Terminal("sample.py", "--interactive", *flags)
    terminal.wait_for(r"> ")
    terminal.send("def f\n")
    terminal.wait_for(r"def f\s+\S")  # the echo, then the first of the answer
    time.sleep(0.5)
    os.kill(terminal.pid, signal.SIGINT)
    terminal.wait_for(r"ended by interrupt")
    terminal.wait_for(r"> ")
    time.sleep(1)  # the prompt is printed a moment before readline can be interrupted
    os.kill(terminal.pid, signal.SIGINT)  # at the prompt it says how to leave
    terminal.wait_for(r"Ctrl-D or /quit leaves")
    terminal.wait_for(r"> ")
    terminal.send("\x04")
    assert terminal.status() == 0
    assert "Traceback" not in terminal.output


def test_prompts_from_a_pipe(trained):
    """Answers only, and Ctrl-C ends the script."""
    flags = [f"--out_dir={trained}", "--interactive", "--max_tokens=8"]
    done = run("sample.py", *flags, stdin="def \n\n/reset\ndef \n")
    answer = run("sample.py", flags[0], flags[2], "--prompt=def ").stdout.removeprefix("def ")
    assert done.stdout == 2 * answer
    arguments = [sys.executable, "sample.py", *flags[:2], "--max_tokens=1000000"]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b"def \n")
        process.stdin.flush()
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_a_pasted_text_of_many_lines_is_one_message(trained, tmp_path):
    """A terminal puts marks around what is pasted: bracketed paste mode."""
    terminal = Terminal("sample.py", "--interactive", f"--out_dir={trained}", "--max_tokens=4", term="xterm")
    terminal.wait_for(r"> ")
    time.sleep(0.5)
    terminal.send("\x1b[200~def f(x):\n\n    return x\x1b[201~\r")
    terminal.wait_for(r"tokens/s")
    terminal.wait_for(r"> ")
    terminal.send(f"/save {tmp_path / 'text'}\r")
    terminal.wait_for(r"wrote ")
    terminal.send("/quit\r")
    assert terminal.status() == 0
    assert (tmp_path / "text").read_text().startswith("def f(x):\n\n    return x")


def test_without_a_model_the_absolute_path_is_named(tmp_path):
    assert str(tmp_path.resolve()) in error("sample.py", f"--out_dir={os.path.relpath(tmp_path, ROOT)}")


def test_the_first_line_names_the_model_and_how_to_take_another(trained):
    first, *_ = run("sample.py", f"--out_dir={trained}", "--max_tokens=1").stderr.splitlines()
    assert str(trained / "best.pt") in first and "step 20" in first and "--ckpt FILE" in first
    first, *_ = run("sample.py", f"--ckpt={trained / 'best.pt'}", "--max_tokens=1").stderr.splitlines()
    assert "--ckpt" not in first


def test_a_new_run_without_a_best_model_leaves_that_of_the_run_before(trained, dataset, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    run("train.py", *SMALL, f"--dataset={dataset}", f"--out_dir={out}", "--max_iters=0")
    flags = ["--prompt=def ", "--max_tokens=20"]
    done = run("sample.py", f"--out_dir={tmp_path}", *flags)
    assert done.stdout == run("sample.py", f"--ckpt={trained / 'best.pt'}", *flags).stdout
    first = done.stderr.splitlines()[0]
    assert (
        first.startswith(f"{out / 'old-1' / 'best.pt'}, step 20") and f"of an earlier run in {out}:" in first
    )
    shutil.rmtree(out / "old-1")
    first, *_ = run("sample.py", f"--out_dir={tmp_path}", *flags).stderr.splitlines()
    assert first.startswith(f"{out / 'ckpt.pt'}, step 0") and f"the last state of the run in {out}" in first


def test_out_beside_the_scripts_is_found_from_any_folder(trained, tmp_path):
    shutil.copytree(
        ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".git", "out", ".venv", "*.bin", "build")
    )
    shutil.copytree(trained, tmp_path / "clone" / "out" / "mine")
    done = run(tmp_path / "clone" / "sample.py", "--max_tokens=1", cwd=tmp_path)
    assert str(tmp_path / "clone" / "out" / "mine" / "best.pt") in done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stop="], "stop must not be empty"),
        (["--stop_on_repeat=-1"], "stop_on_repeat"),
        (["--interactive", "--num_samples=2"], "--interactive"),
        (["--lookup=3", "--num_samples=2"], "--lookup works on one sample"),
        (["--lookup=-1"], "lookup"),
        (["--lookup=1000000000"], "lookup"),
        (["--num_samples=1000000000"], "num_samples must be a whole number from 1 to 65536"),
        (["--max_tokens=1e30"], "max_tokens must be a whole number"),
        (["--top_p=2"], "top_p"),
        (["--min_p=1.5"], "min_p"),
        (["--repetition_penalty=0"], "repetition_penalty"),
        (["--interactive", "--temperature=-1"], "temperature"),
    ],
)
def test_bad_settings_are_one_line(trained, flags, words, error_here):
    assert words in error_here(sample, f"--out_dir={trained}", *flags)

"""What sample.py does beyond one sample: stop texts, repeats, JSON, conversations."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, error, run
from hypothesis import given, settings
from hypothesis import strategies as st

from sample import Config, Sample, draw
from sologpt.tokenizer import Tokenizer

BYTES = Tokenizer.from_spec("bytes")


def feed(text: str | bytes, **config) -> tuple[list[str], Sample]:
    """The parts of a sample that is fed the bytes of text, and the sample."""
    sample, parts = Sample(BYTES, Config(**config)), []
    for token in text.encode() if isinstance(text, str) else text:
        parts.append(sample.push(token))
        if sample.reason:
            return parts, sample
    return [*parts, sample.end("length")], sample


def test_a_stop_text_ends_it_and_is_not_shown():
    parts, sample = feed("def f():\n    pass\n\n\nrest", stop=("\n\n\n",))
    assert "".join(parts) == sample.text == "def f():\n    pass" and sample.reason == "stop"


def test_what_may_begin_a_stop_text_is_held_back_and_then_shown():
    parts, _ = feed("ab<end", stop=("<end>", "zz"))
    assert parts == ["a", "b", "", "", "", "", "<end"]
    parts, _ = feed("<<end>", stop=("<end>",))
    assert parts[:3] == ["", "<", ""] and "".join(parts) == "<"


def test_the_earliest_of_several_stop_texts_counts():
    _, sample = feed("one two three", stop=("three", "two"))
    assert sample.text == "one "


def test_half_a_character_is_never_shown():
    parts, sample = feed("aé€😀", stop=("é!",))
    assert parts == ["a", "", "", "", "", "é€", "", "", "", "😀", ""]
    assert "\ufffd" not in "".join(parts)
    parts, sample = feed("a😀".encode()[:3])
    assert "".join(parts) == sample.text == "a\ufffd"


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab<>é", max_size=30), stops=st.lists(st.text("ab<>é", min_size=1, max_size=4), max_size=3))
def test_any_stop_texts_give_the_text_before_the_first_that_is_complete(text, stops):
    parts, sample = feed(text, stop=tuple(stops))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        end = min(ends)
        expected = text[: min(text.find(stop) for stop in stops if stop in text[:end])]
        assert sample.reason == "stop"
    else:
        expected = text
        assert sample.reason == "length"
    assert "".join(parts) == sample.text == expected


def test_stop_on_repeat():
    _, sample = feed("xyabcabcabc", stop_on_repeat=3)
    assert sample.text == "xyabcabc" and sample.reason == "repeat"
    _, sample = feed("aabbab", stop_on_repeat=1)
    assert sample.text == "aa" and sample.reason == "repeat"
    _, sample = feed("abcabd", stop_on_repeat=3)
    assert sample.reason == "length"


def test_rows_end_on_their_own_and_the_batch_with_the_last():
    taken = []

    def steps():
        for column in zip(b"ab!d", b"abc!", strict=True):
            taken.append(column)
            yield list(column)
        raise AssertionError("both rows have ended")

    samples = [Sample(BYTES, Config(stop=("!",))) for _ in range(2)]
    assert "".join(draw(steps(), samples)) == "ab"
    assert [sample.text for sample in samples] == ["ab", "abc"] and len(taken) == 4


SCRIPTS = "Hello Ελληνικά русский العربية עברית हिन्दी ไทย 中文 日本語 한국어 ქართული 👩‍👩‍👧‍👦🏳️‍🌈"


@pytest.mark.parametrize("tokenizer", [BYTES, Tokenizer.from_spec("bpe:350", [SCRIPTS * 5])], ids=["bytes", "bpe"])
def test_streamed_text_in_ten_scripts_is_the_text(tokenizer):
    sample = Sample(tokenizer, Config(stop=("\u0ba4",)))
    parts = [*map(sample.push, tokenizer.encode(SCRIPTS)), sample.end("length")]
    assert "".join(parts) == SCRIPTS


def test_json_is_one_object_for_each_sample(trained):
    flags = [f"--out_dir={trained}", "--prompt=de", "--max_tokens=20"]
    done = run("sample.py", *flags, "--num_samples=3", "--json")
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(objects) == 3
    for o in objects:
        assert list(o) == ["prompt", "text", "tokens", "reason", "seconds", "tokens_per_second"]
        assert o["prompt"] == "de" and o["tokens"] == 20 and o["reason"] == "length" and o["seconds"] > 0
    plain = run("sample.py", *flags)
    one = json.loads(run("sample.py", *flags, "--json").stdout)
    assert plain.stdout == f"de{one['text']}\n"


def test_ids_that_pad_the_vocabulary_are_never_drawn(dataset, tmp_path):
    """An untrained model with 257 tokens of 400: without care a third of what it draws could not be decoded."""
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--vocab_size=400", "--max_iters=1"]
    run("train.py", *flags)
    assert run("sample.py", f"--out_dir={tmp_path}", "--max_tokens=200", "--temperature=9").stdout


def test_stop_text_on_the_command_line(trained):
    flags = [f"--out_dir={trained}", "--prompt=def ", "--max_tokens=60", "--temperature=0"]
    full = run("sample.py", *flags).stdout
    stop = full[10:12]
    done = run("sample.py", *flags, "--stop", stop, "--stop=\x01")
    assert done.stdout == full[: full.index(stop, 4)] + "\n" and "ended by stop" in done.stderr


class Terminal:
    """sample.py --interactive in a pseudo-terminal."""

    def __init__(self, *args):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "sample.py", "--interactive", *map(str, args)],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(slave)
        self.output = ""

    def wait_for(self, pattern: str, timeout: float = 60) -> str:
        """Read until pattern comes; returns what was read, and forgets it."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, self.output)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.output!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # the other side is closed
                    assert re.search(pattern, self.output), self.output
        seen, self.output = self.output[: match.end()], self.output[match.end() :]
        return seen

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_a_conversation_of_fifty_turns_goes_past_the_window(trained):
    terminal = Terminal(f"--out_dir={trained}", "--max_tokens=8")
    for turn in range(50):
        terminal.wait_for(r"> ")
        terminal.send(f"f{turn}\n")
        said = terminal.wait_for(r"\d+ tokens, [\d,]+ tokens/s, ended by \w+")
        assert "8 tokens" in said or "stop" in said
    terminal.wait_for(r"> ")
    terminal.send("\n")  # an empty line is a line
    terminal.wait_for(r"ended by \w+")
    terminal.wait_for(r"> ")
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0
    assert "Traceback" not in terminal.output and "error" not in terminal.output


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(trained):
    terminal = Terminal(f"--out_dir={trained}", "--max_tokens=1000000")
    terminal.wait_for(r"> ")
    terminal.send("def f\n")
    terminal.wait_for(r"def f\s+\S")
    time.sleep(0.5)
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait_for(r"ended by (interrupt|stop)")
    terminal.wait_for(r"> ")
    time.sleep(1)  # the prompt shows a moment before readline can be interrupted
    os.kill(terminal.process.pid, signal.SIGINT)  # at the prompt: no harm
    terminal.wait_for(r"> ")
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0
    assert "Traceback" not in terminal.output


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stop="], "--stop"),
        (["--stop_on_repeat=-1"], "stop_on_repeat"),
        (["--interactive", "--num_samples=2"], "--interactive"),
        (["--top_p=2"], "top_p"),
        (["--min_p=1"], "min_p"),
        (["--repetition_penalty=0"], "repetition_penalty"),
        (["--interactive", "--temperature=-1"], "temperature"),
    ],
)
def test_bad_settings_are_one_line(trained, flags, words):
    assert words in error("sample.py", f"--out_dir={trained}", *flags)

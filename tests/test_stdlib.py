"""The tokenizer that comes with the dataset stdlib."""

import json
import platform
import random
from itertools import pairwise

import common
import pytest
from conftest import ROOT, run, write_prepare
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import TORTURE
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

import sologpt.data
from sologpt.data import load, prepare
from sologpt.tokenizer import BPE_PATTERN

FOLDER = ROOT / "data" / "stdlib"
TOKENIZER = common.open_tokenizer("stdlib")


def bpe(text: str) -> list[bytes]:
    """Tokens of text by the definition of BPE: the pair that was merged first in training is merged first."""
    # The bytes that have a character of their own in merges.txt; the others are the characters from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*printable}))}
    lines = (FOLDER / "merges.txt").read_text("utf-8").split("\n")[1:-1]
    pairs = [tuple(bytes(byte_of[c] for c in part) for part in line.split(" ")) for line in lines]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    tokens = []
    for piece, _ in Split(Regex(BPE_PATTERN), "isolated").pre_tokenize_str(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        tokens += parts
    return tokens


@pytest.mark.parametrize(
    "text",
    [TORTURE, (ROOT / "gpt.py").read_text(), (ROOT / "README.md").read_text()],
    ids=["torture", "py", "md"],
)
def test_ids_are_those_of_a_bpe_with_these_merges(text):
    ids = TOKENIZER.encode(text)
    assert [TOKENIZER.token_bytes(i) for i in ids] == bpe(text) and TOKENIZER.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_survives(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_every_id_is_a_token():
    """Any bytes have ids: each single byte is a token."""
    assert TOKENIZER.ids == {*range(TOKENIZER.vocab_size)} and TOKENIZER.eot == TOKENIZER.vocab_size - 1
    assert len({TOKENIZER.token_bytes(i) for i in TOKENIZER.ids}) == TOKENIZER.vocab_size
    data = random.Random(0).randbytes(1000)
    assert b"".join(map(TOKENIZER.token_bytes, data)) == data


@pytest.mark.slow
def test_training_anew_gives_the_same_merges(tmp_path):
    version = platform.python_version()
    script = FOLDER / "train_tokenizer.py"
    if f"CPython {version}." not in script.read_text():
        pytest.skip(f"the merges were not made from the modules of Python {version}")
    run(
        script, tmp_path / "merges.txt", cwd=tmp_path
    )  # in a process of its own, as a script beside prepare.py
    assert (tmp_path / "merges.txt").read_bytes() == (FOLDER / "merges.txt").read_bytes()


def test_prepare_takes_it_for_any_text(dataset, tmp_path):
    run("data/text/prepare.py", "--input", dataset / "text", "--out_dir", tmp_path, "--tokenizer=stdlib")
    data = load(tmp_path)
    assert data.tokenizer.to_dict() == TOKENIZER.to_dict()
    text = sorted((dataset / "text").iterdir())[0].read_text()
    assert data.tokenizer.decode(data.train.tolist()).startswith(text)


def test_stdlib_is_prepared_anew_for_another_tokenizer(dataset, tmp_path, monkeypatch):
    """So that --tokenizer=bytes is enough after a run with the BPE, and the other way round."""
    monkeypatch.setattr(sologpt.data, "FOLDER", tmp_path)
    meta = write_prepare(tmp_path / "stdlib", dataset / "text") / "meta.json"
    for tokenizer, name in (("stdlib", "stdlib"), ("bytes", "bytes"), (TOKENIZER.to_dict(), "stdlib")):
        prepare("stdlib", tokenizer, 128)
        assert json.loads(meta.read_text())["tokenizer"]["name"] == name
        before = meta.stat().st_mtime_ns
        prepare("stdlib", tokenizer, 128)
        assert meta.stat().st_mtime_ns == before, "once is enough"
    meta.write_text("{")
    prepare("stdlib", "bytes", 128)
    assert meta.read_text() == "{", "a damaged file is reported when it is loaded"

import argparse
import hashlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import sys
import threading
import zlib
from pathlib import Path

import common
import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
import torch
from conftest import ROOT, error, make_model, run, write_prepare
from hypothesis import given, settings
from hypothesis import strategies as st

import sologpt.data
from sologpt import hf
from sologpt.data import find, get_batch, load, prepare
from sologpt.errors import RunError
from sologpt.tokenizer import EOT, Tokenizer, train_bpe


def prepare_module(name: str):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare_script(name: str):
    """The module with its last line as `main`, for `error_here`."""
    script = prepare_module(name)
    folder = ROOT / "data" / name
    script.main = lambda: common.prepare(folder, script.documents, 0.1, script.__doc__)
    return script


def texts(folder, *contents: str) -> list[common.Document]:
    """Documents with these contents, in files."""
    folder = folder / "texts"
    folder.mkdir(exist_ok=True)
    for i, content in enumerate(contents):
        (folder / str(i)).write_bytes(content.encode())
    return [common.Document(folder / str(i)) for i in range(len(contents))]


def test_documents_are_split_whole_and_in_order(tmp_path):
    documents = texts(tmp_path, *(f"document {i}" for i in range(25)), "")
    train, val = common.split(documents, 0.1)
    assert val == [documents[9], documents[19]] and train == [d for d in documents[:25] if d not in val]
    assert common.split(documents[:2], 0.1) == ([documents[0]], [documents[1]])


def test_a_single_document_is_cut(tmp_path):
    (train,), (val,) = common.split(texts(tmp_path, "0123456789" * 10), 0.1)
    assert "".join(train) == "0123456789" * 9 and "".join(val) == "0123456789"


def test_a_written_dataset_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MIN_TOKENS", 1)
    common.write(tmp_path, texts(tmp_path, "first é", "second", "third", "fourth"), "bytes", 0.25)
    data = load(tmp_path)
    tokenizer = data.tokenizer
    assert tokenizer.decode(data.train.tolist()) == "first é<|endoftext|>second<|endoftext|>third"
    assert tokenizer.decode(data.val.tolist()) == "fourth"
    assert data.train.dtype == np.uint16 and isinstance(data.train, np.memmap)
    raw = (tmp_path / "train.bin").read_bytes()
    assert raw[:4] == b"f\0i\0"  # little-endian, two bytes a token
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["train_tokens"] == len(data.train) == meta["train_bytes"] + 2
    assert (meta["train_max_token"], meta["val_max_token"]) == (256, ord("u"))
    assert data.bytes_per_token == 1 and data.max_token == 256


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tmp_path):
    text = "the quick brown fox jumps over the lazy dog " * 30
    common.write(tmp_path, texts(tmp_path, *[text] * 4), "bpe:300", 0.25)
    data = load(tmp_path)
    assert data.bytes_per_token == len(text) / len(Tokenizer.from_dict(data.tokenizer.to_dict()).encode(text))


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    tokens = [bytes([i]) for i in range(256)] + [b"%6d" % i for i in range(70_000)]
    large = Tokenizer._from_tokens("large", r" \d{5}|[\s\S]", tokens)
    monkeypatch.setattr(Tokenizer, "from_spec", lambda *_: large)
    monkeypatch.setattr(common, "MIN_TOKENS", 1)
    common.write(tmp_path, texts(tmp_path, "a" * 50, " 69999" * 10), "large", 0.5)
    data = load(tmp_path)
    assert (
        data.val.dtype == np.uint32 and data.val.max() == 70_255 and large.decode(data.val) == " 69999" * 10
    )


def test_stdlib_is_python_and_always_the_same(tmp_path, monkeypatch):
    """In whatever order the file system lists the modules."""
    module = prepare_module("stdlib")
    documents = module.documents(None)
    assert len(documents) > 300 and sum("import" in "".join(d) for d in documents) > 200
    monkeypatch.setattr(Path, "rglob", lambda self, pattern, f=Path.rglob: reversed([*f(self, pattern)]))
    assert documents == module.documents(None)


def test_text_from_a_folder_and_from_a_file(tmp_path):
    """Hidden, binary and empty files are skipped, and counted by kind."""
    (tmp_path / "in").mkdir()
    for i in range(12):
        suffix = ".txt" if i % 4 else ".md"
        (tmp_path / "in" / f"{i:02}{suffix}").write_text(f"this is text {i}\n")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "objects").write_bytes(b"\xff")
    (tmp_path / "in" / "a.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "in" / "b.txt").touch()
    done = run(
        "data/text/prepare.py", "--input", tmp_path / "in", "--out_dir", tmp_path / "a", "--val_fraction=0.25"
    )
    skipped = "1 without a suffix (hidden), 1 .png (binary), 1 .txt (empty)"
    assert done.stdout.splitlines()[:2] == ["taken: 9 .txt, 3 .md", f"skipped: {skipped}"]
    a = load(tmp_path / "a")
    assert a.tokenizer.decode(a.val.tolist()) == "<|endoftext|>".join(
        f"this is text {i}\n" for i in (3, 7, 11)
    )
    (tmp_path / "one.txt").write_text("x" * 900 + "y" * 100)
    done = run("data/text/prepare.py", "--input", tmp_path / "one.txt", "--out_dir", tmp_path / "b")
    assert "b/train.bin: 1 document, 900 tokens" in done.stdout and "note" not in done.stdout
    b = load(tmp_path / "b")
    assert b.tokenizer.decode(b.val.tolist()) == "y" * 100


def test_shakespeare_from_a_file(tmp_path):
    (tmp_path / "s.txt").write_text("To be, or not to be.\n" * 100)
    run(
        "data/shakespeare/prepare.py",
        "--input",
        tmp_path / "s.txt",
        "--out_dir",
        tmp_path,
        "--tokenizer=bpe:260",
    )
    data = load(tmp_path)
    assert data.tokenizer.vocab_size == 260 and data.tokenizer.decode(data.train[:8].tolist()).startswith(
        "To be"
    )


# ---- documents in chunks


@pytest.fixture(scope="module", params=["gpt2", "cl100k_base", "o200k_base", "bpe:600", "bytes"])
def tokenizer(request) -> Tokenizer:
    """A tokenizer with the pre-tokenization of the named encoding, and merges trained here: no download."""
    if request.param in ("bpe:600", "bytes"):
        return Tokenizer.from_spec(request.param, [SOURCE])
    ranks = {token: i for i, token in enumerate(train_bpe([SOURCE], 600))}
    with pytest.MonkeyPatch.context() as patch:
        for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(tiktoken_ext.openai_public, loader, lambda *_, **__: ranks)
        pattern = getattr(tiktoken_ext.openai_public, request.param)()["pat_str"]
    return Tokenizer(
        tiktoken.Encoding("learnt", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: 600})
    )


SOURCE = Path(argparse.__file__).read_text()
FRAGMENTS = [
    "the",
    " the",
    "it's",
    " 'tis",
    "12345",
    " 6",
    "_x",
    ".",
    " (",
    "\n",
    "\r\n",
    "\t",
    "  ",
    "\u00a0",
    "é漢",
    " Ω",
    "👩‍👧",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS)).map("".join), st.integers(1, 20))
def test_a_chunk_ends_at_a_token_boundary(tmp_path_factory, tokenizer, text, size):
    path = tmp_path_factory.getbasetemp() / "chunks"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "CHUNK", size)
        chunks = list(common.Document(path))
    assert "".join(chunks) == text
    for i in range(1, len(chunks)):
        before, after = "".join(chunks[:i]), "".join(chunks[i:])
        if tokenizer.name == "bytes" or (before[-1:].strip() and after[:1] == " "):
            assert tokenizer.encode(before) + tokenizer.encode(after) == tokenizer.encode(text), (
                before,
                after,
            )


def test_chunks_of_a_real_text_have_the_ids_of_the_whole(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(common, "CHUNK", 1000)
    (document,) = texts(tmp_path, SOURCE)
    chunks = list(document)
    assert len(chunks) > 50 and [i for chunk in chunks for i in tokenizer.encode(chunk)] == tokenizer.encode(
        SOURCE
    )


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode), st.integers(1, 9))
def test_chunks_are_decoded_as_the_whole_file(tmp_path_factory, content, size):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "CHUNK", size)
        assert "".join(common.Document(path, errors="replace")) == content.decode("utf-8", "replace")
        try:
            assert content.decode() == "".join(common.Document(path))
        except UnicodeDecodeError as e:
            with pytest.raises(ValueError, match=f"{re.escape(e.reason)} at byte {e.start};"):
                list(common.Document(path))


@pytest.mark.parametrize("spec", ["bytes", "bpe:400"])
@pytest.mark.parametrize("n", [1, 7])
def test_a_dataset_written_in_chunks_is_that_of_whole_documents(tmp_path, monkeypatch, spec, n):
    monkeypatch.setattr(common, "CHUNK", 500)
    size = len(SOURCE) // n
    contents = [SOURCE[i * size : (i + 1) * size] for i in range(n)]
    common.write(tmp_path, texts(tmp_path, *contents), spec, 0.25)
    cut = size * 3 // 4
    train, val = (
        ([SOURCE[:cut]], [SOURCE[cut:size]]) if n == 1 else (contents[:3] + contents[4:], contents[3:4])
    )
    tokenizer = Tokenizer.from_spec(spec, train)
    ids = tokenizer.encode(train[0]) + [
        i for text in train[1:] for i in [tokenizer.eot, *tokenizer.encode(text)]
    ]
    data, meta = load(tmp_path), json.loads((tmp_path / "meta.json").read_text())
    assert data.tokenizer.to_dict() == tokenizer.to_dict()
    assert data.train.tolist() == ids and data.val.tolist() == tokenizer.encode(val[0])
    assert (meta["train_bytes"], meta["val_bytes"]) == (
        sum(len(t.encode()) for t in train),
        len(val[0].encode()),
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    (tmp_path / "small").write_text(SOURCE * 10)
    (tmp_path / "large").write_text(SOURCE * 100)
    code = f"""
import pathlib, re, sys
sys.path.insert(0, {str(ROOT / "data")!r})
import common
common.CHUNK = 2**16
def peak(name):
    common.write(pathlib.Path("out"), [common.Document(pathlib.Path(name))], "bytes", 0.1)
    return int(re.search("VmHWM:(.*)kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
print(-peak("small") + peak("large"))
"""
    done = run("-c", code, cwd=tmp_path)
    assert int(done.stdout.split()[-1]) < 3e6 < (tmp_path / "large").stat().st_size


def test_an_existing_dataset_stays_when_preparing_fails(tmp_path):
    common.write(tmp_path, texts(tmp_path, "first" * 9, "second" * 9), "bytes", 0.5)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    first, second = texts(tmp_path, "another" * 9, "text")
    second.path.write_bytes(b"te\xfft")
    with pytest.raises(ValueError, match="byte 2"):
        common.write(tmp_path, [first, second], "bytes", 0.5)
    with pytest.raises(
        ValueError, match=r"too little text: val\.bin would have 31 tokens, and needs 32 or more"
    ):
        common.write(tmp_path, texts(tmp_path, "a" * 32, "b" * 31), "bytes", 0.5)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


# ---- a tokenizer from a file


def test_a_tokenizer_comes_from_a_file(tmp_path):
    tokenizer = Tokenizer.from_spec("bpe:300", [SOURCE])
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_dict()))
    make_model().save(tmp_path / "ckpt.pt", tokenizer=tokenizer.to_dict())
    common.write(tmp_path, texts(tmp_path, SOURCE[:5000]), str(tmp_path / "ckpt.pt"), 0.1)
    assert load(tmp_path).train.tolist() == tokenizer.encode(SOURCE[:4500])
    for name in ("tokenizer.json", "meta.json"):
        assert common.open_tokenizer(str(tmp_path / name)).to_dict() == tokenizer.to_dict()


def test_a_tokenizer_comes_from_any_model(tmp_path, monkeypatch):
    """A run's folder, the folder of a Hugging Face model with and without hf:, and ~."""
    model, tokenizer = make_model(vocab_size=300), Tokenizer.from_spec("bpe:300", [SOURCE])
    (tmp_path / "run").mkdir()
    model.float().save(tmp_path / "run" / "best.pt", tokenizer=tokenizer.to_dict())
    hf.save(model, tokenizer, tmp_path / "hf")
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("~/run", f"{tmp_path / 'run' / 'best.pt'}", "hf:~/hf", f"{tmp_path / 'hf'}"):
        found, window = common.open_tokenizer_and_window(spec)
        assert found.encode(SOURCE) == tokenizer.encode(SOURCE) and window == 32, spec


def test_another_tokenizer_in_the_place_of_one_is_said(tmp_path):
    (tmp_path / "a.txt").write_text(SOURCE)
    flags = ["data/text/prepare.py", "--input", tmp_path / "a.txt", "--out_dir", tmp_path / "out"]
    assert "note" not in run(*flags).stdout + run(*flags).stdout
    note = "out had the tokenizer bytes, and now gets stdlib: to resume a run with the old one, prepare it with that"
    assert note in run(*flags, "--tokenizer=stdlib").stdout


def test_a_file_without_a_tokenizer_is_one_line(tmp_path):
    good = Tokenizer.from_spec("bytes").to_dict()
    make_model().save(tmp_path / "none.pt")
    make_model().save(tmp_path / "whole.pt", tokenizer=good)
    whole = (tmp_path / "whole.pt").read_bytes()
    torch.save({"tokenizer": print}, tmp_path / "code.pt")
    for name, content in {
        "cut.pt": whole[:-100],
        "flipped.pt": whole.replace(b"[\\s\\S]{1,32}", b"[\\s\\S]{1,33}"),
        "short.pt": whole[:1000],
        "text.pt": b"hello",
        "empty.pt": b"",
        "empty.json": b"",
        "list.json": b"[]",
        "deep.json": b"[" * 100_000,
        "other.json": b'{"tokenizer": {"kind": "other"}}',
        "binary.json": b"\xff\xfe\x00",
        "no_eot.json": json.dumps(good | {"special_tokens": {}}).encode(),
        "id.json": json.dumps(good | {"special_tokens": {EOT: -1}}).encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
    for path in [path for path in tmp_path.iterdir() if path.name != "whole.pt"]:
        with pytest.raises(ValueError, match=f"{path.name} has no tokenizer, or is damaged"):
            common.open_tokenizer(str(path))
    for name in ("nowhere.pt", "nowhere.json"):
        with pytest.raises(ValueError, match=f"{name} cannot be read: No such file"):
            common.open_tokenizer(str(tmp_path / name))
    flags = ["--input", tmp_path / "text.pt", "--out_dir", tmp_path / "out"]
    assert "short.pt" in error("data/text/prepare.py", *flags, f"--tokenizer={tmp_path / 'short.pt'}")
    assert not (tmp_path / "out").exists()


# ---- downloads


@pytest.fixture
def server():
    """A local server that fails as often as `failures` says, then serves `content`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            if self.server.failures > 0:
                self.server.failures -= 1
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(self.server.length or len(self.server.content)))
            self.end_headers()
            self.wfile.write(self.server.content)

        def log_message(self, *_):
            pass

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.failures, httpd.content = 0, 0, b"To be, or not to be"
    httpd.length = None
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/input.txt"
    threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
    yield httpd
    httpd.shutdown()


@pytest.fixture
def shakespeare(server, tmp_path, monkeypatch):
    """The shakespeare dataset's prepare.py, which downloads from the server to tmp_path, without pauses."""
    module = prepare_module("shakespeare")
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(module, "URL", server.url)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


def test_a_download_is_retried_checked_and_kept(server, shakespeare, tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(server.content).hexdigest())
    server.failures = 2
    (document,) = shakespeare.documents(None)
    assert "".join(document) == server.content.decode() and server.requests == 3
    shakespeare.documents(None)
    assert server.requests == 3, "an intact file is not downloaded again"
    document.path.write_bytes(b"damaged")
    assert "".join(shakespeare.documents(None)[0]) == server.content.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]


def test_a_wrong_or_failing_download_is_an_error_and_leaves_nothing(server, shakespeare, tmp_path):
    with pytest.raises(RunError, match=r"checksum.*--input"):
        shakespeare.documents(None)
    server.length = 100  # more than is sent: the connection ends within the file
    with pytest.raises(RunError, match=r"IncompleteRead.*--input"):
        shakespeare.documents(None)
    server.failures = 9
    with pytest.raises(RunError, match=r"Service Unavailable.*--input"):
        shakespeare.documents(None)
    assert list(tmp_path.iterdir()) == []


def test_shakespeare_offline_is_one_line(tmp_path):
    code = f"""
import runpy, sys, urllib.request
def refuse(*_, **__): raise urllib.error.URLError(OSError("no route to host"))
urllib.request.urlopen = refuse
runpy.run_path({str(ROOT / "data/shakespeare/prepare.py")!r}, run_name="__main__")
"""
    line = error("-c", code, "--out_dir", tmp_path, status=1, cwd=tmp_path)
    assert "no route to host" in line and "--input FILE" in line and not list(tmp_path.iterdir())


def test_a_large_document_that_is_held_out_is_said(tmp_path, capsys):
    documents = texts(tmp_path, "a" * 400, "b" * 400, "c" * 2400)
    common.write(tmp_path / "out", documents, "bytes", 0.1)
    assert "note: val.bin has 75% of the text: documents are held out whole" in capsys.readouterr().out
    common.write(tmp_path / "out", [*documents, *documents[:1] * 7], "bytes", 0.1)
    assert "note" not in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, error_here):
    prepare_text, prepare_shakespeare = prepare_script("text"), prepare_script("shakespeare")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary").write_bytes(b"ab\xff")
    out = ["--out_dir", tmp_path / "out"]
    assert "--input" in error_here(prepare_text, *out)
    assert "nowhere" in error_here(prepare_text, *out, "--input=nowhere")
    assert "no text" in error_here(prepare_text, *out, "--input", tmp_path / "empty.txt")
    line = error_here(prepare_text, *out, "--input", tmp_path / "binary")
    assert "binary is not UTF-8 text" in line and "iconv -f LATIN1 -t UTF-8" in line
    (tmp_path / "utf16").mkdir()
    (tmp_path / "utf16" / "a.txt").write_text("hello", "utf-16")
    line = error_here(prepare_text, *out, "--input", tmp_path / "utf16")
    assert "a.txt is not UTF-8" in line and "iconv -f UTF-16 -t UTF-8" in line, "text, but skipped"
    (tmp_path / "empty.txt").write_text("a" * 40)
    done = run("data/text/prepare.py", *out, "--input", tmp_path / "empty.txt", status=2)
    assert "too little" in done.stderr and not done.stdout, "no success before an error"
    for name, record in (("a.jsonl", '{"messages": []}\n{'), ("a.json", '[{"conversations": []}]')):
        (tmp_path / name).write_text(record)
        line = error_here(prepare_text, *out, "--input", tmp_path / name)
        assert f"holds conversations: python data/chat/prepare.py --input {tmp_path / name}" in line
    (tmp_path / "binary").write_text("fine")
    assert "'words'" in error_here(prepare_text, *out, "--input", tmp_path / "binary", "--tokenizer=words")
    assert "val_fraction" in error_here(
        prepare_text, *out, "--input", tmp_path / "binary", "--val_fraction=2"
    )
    assert "--zzz" in error_here(prepare_text, *out, "--zzz=1")
    assert "nowhere" in error_here(prepare_shakespeare, *out, "--input=nowhere")
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.fixture
def copy(dataset, tmp_path):
    for name in ("train.bin", "val.bin", "meta.json"):
        shutil.copy(dataset / name, tmp_path)
    return tmp_path


def change_meta(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_dataset_whose_files_do_not_match_is_an_error(copy):
    whole = (copy / "train.bin").read_bytes()
    (copy / "train.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"train\.bin has .*tokens of uint16: run"):
        load(copy)
    (copy / "train.bin").write_bytes(whole)
    for changes in (
        dict(dtype="uint32"),
        dict(dtype="int8"),
        dict(tokenizer={}),
        dict(val_tokens=0),
        dict(val_bytes=0),
    ):
        before = (copy / "meta.json").read_text()
        change_meta(copy, **changes)
        with pytest.raises(ValueError):
            load(copy)
        (copy / "meta.json").write_text(before)
    for content in (b"{", b"", b"[]", b"\xff", b"[" * 100_000):
        (copy / "meta.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"meta\.json is damaged, or not the meta\.json of a dataset"):
            load(copy)
    for name in ("meta.json", "train.bin"):
        (copy / name).unlink()
        with pytest.raises(ValueError, match=f"has no .*{name}"):
            load(copy)


def test_a_token_file_that_is_not_the_one_that_was_written_is_an_error(copy):
    tokens = np.fromfile(copy / "val.bin", "<u2")
    tokens[[0, 9]] = tokens[[9, 0]]
    tokens.tofile(copy / "val.bin")
    with pytest.raises(ValueError, match=r"val\.bin has changed since .*meta\.json was written: run prep"):
        load(copy)
    change_meta(copy, val_crc32=zlib.crc32(tokens.tobytes()))
    before = load(copy).fingerprint
    tokens[[0, 9]] = tokens[[9, 0]]
    tokens.tofile(copy / "val.bin")
    meta = json.loads((copy / "meta.json").read_text())
    del meta["val_crc32"]  # as in a dataset of one's own
    (copy / "meta.json").write_text(json.dumps(meta))
    assert load(copy).fingerprint != before


def test_a_token_file_that_is_truncated_under_a_run_is_an_error_and_no_crash(copy):
    data = load(copy)
    batches = data.batches("train", 16)
    last = np.array([len(data.train) - 17])
    batches.get(last, torch.device("cpu"))
    os.truncate(copy / "train.bin", 100)
    with pytest.raises(RunError, match=r"train\.bin has become shorter .*--init_from=resume"):
        batches.get(last, torch.device("cpu"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@settings(deadline=None)
@given(data=st.data())
def test_a_changed_meta_json_is_an_error_or_harmless(dataset, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "changed"
    if not folder.exists():
        shutil.copytree(dataset, folder)
    meta = json.loads((dataset / "meta.json").read_text())
    where = data.draw(st.sampled_from([meta, meta["tokenizer"]]))
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(JSON)
    (folder / "meta.json").write_text(json.dumps(meta))
    try:
        assert load(folder).bytes_per_token > 0
    except ValueError as e:
        assert str(folder) in str(e) and "\n" not in str(e)


def test_tokens_outside_the_vocabulary_are_an_error(copy, monkeypatch):
    tokens = np.fromfile(copy / "train.bin", "<u2")
    assert load(copy).max_token == max(tokens.max(), np.fromfile(copy / "val.bin", "<u2").max())
    tokens[-1] = 257
    tokens.tofile(copy / "train.bin")
    outside = pytest.raises(ValueError, match=r"train\.bin has token id 257, outside the vocabulary of 257")
    with outside:
        load(copy)
    monkeypatch.setattr(sologpt.data, "SCAN", 100)  # a large file: not scanned, meta.json has the largest id
    assert load(copy).max_token == 256
    change_meta(copy, train_max_token=257)
    with outside:
        load(copy)
    meta = json.loads((copy / "meta.json").read_text())
    del meta["train_max_token"]  # then the file is scanned
    (copy / "meta.json").write_text(json.dumps(meta))
    with outside:
        load(copy)


def test_preparing_imports_neither_torch_nor_the_model(tmp_path):
    path = str(ROOT / "data")
    code = f"import sys; sys.path.insert(0, {path!r}); import common; print('torch' in sys.modules)"
    assert run("-c", code, cwd=tmp_path).stdout == "False\n"  # a new process: forked ones have imported torch
    assert prepare_module("text").common is common, "one module, whoever imports it"


# ---- for train.py


def test_a_missing_dataset_is_prepared_once(dataset, tmp_path, monkeypatch, capfd):
    folder = write_prepare(tmp_path / "other", dataset / "text")
    prepare(str(folder), "bpe:300", 16)
    assert load(folder).tokenizer.name == "bpe:300"
    before = (folder / "meta.json").stat().st_mtime_ns
    prepare(str(folder), "bytes", 16)
    assert (folder / "meta.json").stat().st_mtime_ns == before, "a dataset that exists is left alone"
    other = load(folder).tokenizer
    (folder / "meta.json").unlink()
    capfd.readouterr()
    prepare(str(folder), other.to_dict(), 16)
    assert capfd.readouterr().out.startswith(f"preparing the dataset {folder} ...\n"), "before it is slow"
    assert load(folder).tokenizer.to_dict() == other.to_dict(), "the tokenizer of a checkpoint"

    monkeypatch.chdir(tmp_path)
    assert find("other") == Path("other") and find("stdlib") == ROOT / "data" / "stdlib"
    assert find(str(folder)) == folder


def test_a_dataset_that_cannot_be_prepared_is_an_error(dataset, tmp_path, capfd):
    with pytest.raises(ValueError, match=r"--dataset=nowhere.*fineweb, shakespeare, stdlib, text"):
        prepare("nowhere", "bytes", 16)
    for name, words in (
        ("shakespeare_char", "config/shakespeare_char.py"),
        ("openwebtext", "--dataset=fineweb"),
    ):
        with pytest.raises(ValueError, match=f"--dataset={name}: no such dataset; use .*{words}"):
            prepare(name, "bytes", 16)  # nanoGPT's
    folder = write_prepare(tmp_path / "other", dataset / "text")
    with pytest.raises(SystemExit) as e:
        prepare(str(folder), "words", 16)
    assert e.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and "words" in err and err.count("\n") == 1
    (folder / "prepare.py").unlink()
    prepare(str(folder), "bytes", 16)  # a folder without prepare.py: load says what is missing
    with pytest.raises(ValueError, match=r"other has no train\.bin, val\.bin, meta\.json"):
        load(folder)


def test_a_dataset_is_checked_against_the_model(dataset):
    data = load(dataset)
    shortest = min(len(data.train), len(data.val))
    data.check(shortest - 1, data.max_token + 1)
    n = len(data.val)
    with pytest.raises(
        ValueError, match=rf"val\.bin has {n} tokens.*--sequence_len={n}: .*--sequence_len={n - 1}, or"
    ):
        data.check(len(data.val), 257)
    with pytest.raises(
        ValueError, match=rf"{dataset} has token id 256, outside the vocabulary of 256.*--vocab_size"
    ):
        data.check(16, 256)


def test_targets_are_the_inputs_one_token_ahead(dataset):
    tokens = load(dataset).train
    starts = np.array([0, 7, len(tokens) - 6])
    inputs, targets = get_batch(tokens, starts, 5, torch.device("cpu"))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [tokens[i : i + 5].tolist() for i in starts]
    assert targets.tolist() == [tokens[i + 1 : i + 6].tolist() for i in starts]


@pytest.mark.parametrize("name", ["stdlib", "shakespeare", "text", "fineweb"])
def test_help_has_a_sentence_for_each_option(name):
    out = run(f"data/{name}/prepare.py", "--help", COLUMNS="1000").stdout
    options = re.findall(r"^  --(\w+) [A-Z]+ +(.*)$", out, re.MULTILINE)
    assert len(options) >= 3 and f"usage: python data/{name}/prepare.py" in out
    assert all(text[0].isupper() and text.endswith(".") for _, text in options), options

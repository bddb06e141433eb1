import hashlib
import http.server
import importlib.util
import json
import shutil
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT, error, run

from data import common
from tokenizer import Tokenizer


def prepare_module(name: str):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documents_are_split_whole_and_in_order():
    documents = [f"document {i}" for i in range(25)]
    train, val = common.split(documents, 0.1)
    assert val == ["document 9", "document 19"] and sorted(train + val, key=documents.index) == documents
    assert train == [d for d in documents if d not in val]
    assert common.split(["a", "b"], 0.1) == (["a"], ["b"])


def test_a_single_document_is_cut():
    assert common.split(["0123456789" * 10], 0.1) == (["0123456789" * 9], ["0123456789"])


def test_what_is_written_is_what_is_read(tmp_path):
    documents = ["first é", "second", "third", "fourth"]
    common.write(tmp_path, documents, "bytes", 0.25)
    data = common.load(tmp_path)
    tokenizer = data.tokenizer
    assert tokenizer.decode(data.train.tolist()) == "first é<|endoftext|>second<|endoftext|>third"
    assert tokenizer.decode(data.val.tolist()) == "fourth"
    assert data.train.dtype == np.uint16 and isinstance(data.train, np.memmap)
    raw = (tmp_path / "train.bin").read_bytes()
    assert raw[:4] == b"f\0i\0"  # little-endian, two bytes a token
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["train_tokens"] == len(data.train) == meta["train_bytes"] + 2
    assert data.bytes_per_token == 1


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tmp_path):
    text = ["the quick brown fox jumps over the lazy dog " * 30] * 4
    common.write(tmp_path, text, "bpe:300", 0.25)
    data = common.load(tmp_path)
    assert data.bytes_per_token == len(text[0]) / len(Tokenizer.from_dict(data.tokenizer.to_dict()).encode(text[0]))


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    tokens = [bytes([i]) for i in range(256)] + [b"%6d" % i for i in range(70_000)]
    large = Tokenizer._from_tokens("large", r" \d{5}|[\s\S]", tokens)
    monkeypatch.setattr(Tokenizer, "from_spec", lambda *_: large)
    common.write(tmp_path, ["a" * 50, " 69999" * 10], "large", 0.5)
    data = common.load(tmp_path)
    assert data.val.dtype == np.uint32 and data.val.max() == 70_255 and large.decode(data.val) == " 69999" * 10


def test_stdlib_is_python_and_repeats(tmp_path):
    module = prepare_module("stdlib")
    documents = module.documents(None)
    assert len(documents) > 300 and sum("import" in d for d in documents) > 200
    assert documents == module.documents(None)


def test_text_from_a_folder_and_from_a_file(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i:02}.txt").write_text(f"text {i}\n")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "objects").write_bytes(b"\xff")
    run("data/text/prepare.py", "--input", tmp_path / "in", "--out_dir", tmp_path / "a", "--val_fraction=0.25")
    a = common.load(tmp_path / "a")
    assert a.tokenizer.decode(a.val.tolist()) == "text 3\n<|endoftext|>text 7\n<|endoftext|>text 11\n"
    (tmp_path / "one.txt").write_text("x" * 900 + "y" * 100)
    run("data/text/prepare.py", "--input", tmp_path / "one.txt", "--out_dir", tmp_path / "b")
    b = common.load(tmp_path / "b")
    assert b.tokenizer.decode(b.val.tolist()) == "y" * 100


def test_shakespeare_from_a_file(tmp_path):
    (tmp_path / "s.txt").write_text("To be, or not to be.\n" * 100)
    run("data/shakespeare/prepare.py", "--input", tmp_path / "s.txt", "--out_dir", tmp_path, "--tokenizer=bpe:260")
    data = common.load(tmp_path)
    assert data.tokenizer.vocab_size == 260 and data.tokenizer.decode(data.train[:8].tolist()).startswith("To be")


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
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()


def test_download_retries_checks_and_keeps(server, tmp_path, monkeypatch):
    module = prepare_module("shakespeare")
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(server.content).hexdigest())
    server.failures = 2
    path = module.download(server.url, tmp_path / "input.txt")
    assert path.read_bytes() == server.content and server.requests == 3
    module.download(server.url, path)
    assert server.requests == 3, "what is there is not fetched again"
    path.write_bytes(b"damaged")
    assert module.download(server.url, path).read_bytes() == server.content


def test_a_wrong_or_failing_download_is_an_error_and_leaves_nothing(server, tmp_path, monkeypatch):
    module = prepare_module("shakespeare")
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    with pytest.raises(OSError, match="checksum"):
        module.download(server.url, tmp_path / "input.txt")
    server.length = 100  # more than it sends: the connection ends within the file
    with pytest.raises(OSError, match="IncompleteRead"):
        module.download(server.url, tmp_path / "input.txt")
    server.failures = 9
    with pytest.raises(OSError, match=r"503.*--input"):
        module.download(server.url, tmp_path / "input.txt")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(tmp_path):
    text = "data/text/prepare.py"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary").write_bytes(b"ab\xff")
    out = ["--out_dir", tmp_path / "out"]
    assert "--input" in error(text, *out)
    assert "nowhere" in error(text, *out, "--input=nowhere")
    assert "no text" in error(text, *out, "--input", tmp_path / "empty.txt")
    assert "UTF-8" in error(text, *out, "--input", tmp_path / "binary")
    (tmp_path / "empty.txt").write_text("a")
    assert "too little" in error(text, *out, "--input", tmp_path / "empty.txt")
    (tmp_path / "binary").write_text("fine")
    assert "'words'" in error(text, *out, "--input", tmp_path / "binary", "--tokenizer=words")
    assert "val_fraction" in error(text, *out, "--input", tmp_path / "binary", "--val_fraction=2")
    assert "--zzz" in error(text, *out, "--zzz=1")
    assert "nowhere" in error("data/shakespeare/prepare.py", *out, "--input=nowhere")
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.fixture
def copy(dataset, tmp_path):
    for name in ("train.bin", "val.bin", "meta.json"):
        shutil.copy(dataset / name, tmp_path)
    return tmp_path


def change_meta(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_dataset_whose_files_do_not_go_together_is_an_error(copy):
    whole = (copy / "train.bin").read_bytes()
    (copy / "train.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"train\.bin"):
        common.load(copy)
    (copy / "train.bin").write_bytes(whole)
    for changes in (dict(dtype="uint32"), dict(dtype="int8"), dict(tokenizer={}), dict(val_tokens=0)):
        before = (copy / "meta.json").read_text()
        change_meta(copy, **changes)
        with pytest.raises(ValueError):
            common.load(copy)
        (copy / "meta.json").write_text(before)
    (copy / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json"):
        common.load(copy)


def test_preparing_imports_neither_torch_nor_the_model():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data.common; print('torch' in sys.modules)"
    assert run("-c", code).stdout == "False\n"
    assert sys.modules["data.common"] is common

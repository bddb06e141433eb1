import hashlib
import http.server
import json
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, error, run

from data import common
from data.fineweb import prepare as fineweb
from sologpt.tokenizer import Tokenizer

SCRIPT = "data/fineweb/prepare.py"
NAMES = [fineweb.VAL, *fineweb.TRAIN[:3]]


def shard(tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's files, whole or from a byte on; each request meets the next of the server's faults."""

    def do_GET(self):
        server, start = self.server, self.headers.get("Range", "")
        server.requests.append((self.path.rpartition("/")[2], start))
        fault = server.faults.pop(0) if server.faults else server.fault
        content = server.files.get(self.path.rpartition("/")[2])
        if content is None or type(fault) is int:
            self.send_response(404 if content is None else fault)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", f"/elsewhere{self.path}")
            self.send_header("X-Linked-ETag", server.etag)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first = int(start[6:-1]) if start and fault != "no range" else 0
        if first >= len(content):
            self.send_error(416)
            return
        body = content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            for i in range(0, len(body), 2**15):
                if fault == "drop" and i >= len(body) // 2:
                    return
                self.wfile.write(body[i : i + 2**15])
                time.sleep(server.pause)
        except ConnectionError:  # the client was killed
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.files, httpd.requests, httpd.faults, httpd.fault, httpd.etag, httpd.pause = {}, [], [], None, "", 0.0
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
    yield httpd
    httpd.shutdown()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One with a gap, id 256, so that there are ids of which it knows nothing."""
    ranks = {bytes([i]): i for i in range(256)} | {b"%3d" % i: 257 + i for i in range(700)}
    special = {"<|endoftext|>": 957}
    return Tokenizer(tiktoken.Encoding("triples", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special))


@pytest.fixture(scope="module")
def tokens(tokenizer) -> list[np.ndarray]:
    """The tokens of the shard for validation, and of three to train on: different lengths, all of several chunks."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, 958, size=n) for n in (120_000, 150_000, 100_001, 90_000)]
    for tokens in shards:
        tokens[tokens == 256] = 957
    return shards


@pytest.fixture
def site(server, tokens):
    """The server with all shards on it."""
    server.files = {name: shard(ids) for name, ids in zip(NAMES, tokens, strict=True)}
    return server


@pytest.fixture
def flags(site, tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_dict()))
    return [f"--url={site.url}", f"--tokenizer={tmp_path / 'tokenizer.json'}", f"--out_dir={tmp_path / 'out'}"]


@pytest.fixture
def prepare(monkeypatch, capsys):
    """The script in this process, without its pauses; returns what it prints, after the status that it ends with."""
    monkeypatch.setattr("time.sleep", lambda _: None)

    def prepare(*args) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *args])
        status = 0
        try:
            fineweb.main()
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        assert bool(status) == err.startswith("error: ") and err.count("\n") == bool(status), err
        return status, err or out

    return prepare


def check(folder, tokens, shards=1) -> common.Dataset:
    """The dataset, which must have the tokens of so many shards, and nothing else."""
    data = common.load(folder)
    assert np.array_equal(data.val, tokens[0])
    assert np.array_equal(data.train, np.concatenate(tokens[1 : 1 + shards]))
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    return data


def test_shards_become_a_dataset_that_grows(site, flags, tokens, tokenizer, tmp_path, prepare):
    done = run(SCRIPT, *flags)
    data = check(tmp_path / "out", tokens)
    assert "train.bin: 150,000 tokens of triples" in done.stdout
    assert data.tokenizer.to_dict() == tokenizer.to_dict() and data.train.dtype == np.uint16
    text = tokenizer.encoding.decode_bytes([i for i in tokens[0].tolist() if i != tokenizer.eot])
    assert data.bytes_per_token == len(text) / len(tokens[0])
    assert data.max_token == 957
    assert prepare(*flags, "--shards=3")[0] == 0
    check(tmp_path / "out", tokens, shards=3)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    text = tokenizer.encoding.decode_bytes([i for ids in tokens[1:] for i in ids.tolist() if i != tokenizer.eot])
    assert (meta["train_tokens"], meta["train_bytes"], meta["train_max_token"]) == (340_001, len(text), 957)
    assert [name for name, _ in site.requests] == NAMES, "what is there is not fetched again"
    assert prepare(*flags, "--shards=2")[0] == 0
    check(tmp_path / "out", tokens, shards=3)
    assert len(site.requests) == 4


def test_a_connection_that_drops_is_taken_up_where_it_ended(site, flags, tokens, tmp_path, prepare):
    site.faults = ["drop", "drop", 503, 503, None, 429, "drop", 500, 502, "drop"]
    assert prepare(*flags)[0] == 0
    check(tmp_path / "out", tokens)
    starts = [int(start[6:-1] or 0) for name, start in site.requests if name == fineweb.VAL]
    assert starts == sorted(starts) and 100_000 < starts[1] < starts[2] == starts[4], starts


def test_a_server_without_ranges_sends_all_again(site, flags, tokens, tmp_path, prepare):
    site.faults = ["drop", "no range", "drop", "drop", "no range"]
    assert prepare(*flags)[0] == 0
    check(tmp_path / "out", tokens)
    assert site.requests[1][1] and site.requests[4][1], "it was asked for a range"


def test_it_gives_up_when_nothing_new_comes_and_goes_on_later(site, flags, tokens, tmp_path, prepare):
    site.faults, site.fault = ["drop"], 503
    status, line = prepare(*flags)
    assert status == 1 and "503" in line and fineweb.VAL in line and "goes on" in line and len(site.requests) == 5
    site.fault = None
    assert prepare(*flags)[0] == 0
    check(tmp_path / "out", tokens)
    assert site.requests[5][1], "from where it was"


def test_a_part_of_something_else_is_thrown_away(site, flags, tokens, tmp_path, prepare):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{fineweb.VAL}.part").write_bytes(bytes(10**6))
    assert prepare(*flags)[0] == 0
    check(tmp_path / "out", tokens)


def test_offline_is_one_line(site, flags, tmp_path, prepare, monkeypatch):
    status, line = prepare(*flags, "--url=http://127.0.0.1:9/none")
    assert status == 1 and "127.0.0.1:9" in line and "refused" in line
    status, line = prepare(*flags, f"--url={site.url}", "--shards=4")
    assert status == 1 and "404" in line and "000004" in line
    assert [name for name, _ in site.requests].count(fineweb.TRAIN[3]) == 1, "what is not there is not asked for again"

    def refuse(_):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    site.requests.clear()
    status, line = prepare(*flags, "--tokenizer=gpt2", f"--out_dir={tmp_path / 'other'}")
    assert status == 1 and "gpt2" in line and "--tokenizer=FILE" in line and not site.requests


@pytest.mark.parametrize(
    "content, status, words",
    [
        (shard(np.arange(50_000) % 250, magic=20240801), 1, "no shard"),
        (shard(np.arange(50_000) % 250, version=2), 1, "no shard"),
        (b"<!DOCTYPE html>", 1, "no shard"),
        (shard(np.arange(50_000) % 250)[:-1], 1, "101,023 bytes"),
        (shard(np.arange(50_000) % 250)[:3000], 1, "50,000 tokens"),
        (shard(np.full(50_000, 958)), 2, "token id 958"),
        (shard(np.arange(50_000) % 958), 2, "token id 256"),
    ],
)
def test_a_wrong_file_is_seen_by_its_first_bytes(site, flags, tokens, tmp_path, prepare, content, status, words):
    good, site.files[fineweb.VAL] = site.files[fineweb.VAL], content
    found, line = prepare(*flags)
    assert found == status and fineweb.VAL in line and words in line
    assert len(site.requests) == 1 and not list((tmp_path / "out").glob("*.part"))
    site.files[fineweb.VAL] = good
    assert prepare(*flags)[0] == 0
    check(tmp_path / "out", tokens)


def test_an_id_that_is_wrong_later_on_never_enters_the_dataset(site, flags, tokens, tmp_path, prepare):
    wrong = tokens[2].copy()
    wrong[-1] = 60_000
    site.files[NAMES[2]] = shard(wrong)
    status, line = prepare(*flags, "--shards=3")
    assert status == 2 and "60000" in line and NAMES[2] in line
    (tmp_path / "out" / NAMES[2]).unlink()
    check(tmp_path / "out", tokens)
    site.files[NAMES[2]] = shard(tokens[2])
    assert prepare(*flags, "--shards=3")[0] == 0
    check(tmp_path / "out", tokens, shards=3)


def test_the_checksum_of_the_server_is_checked(site, flags, tokens, tmp_path, prepare):
    site.etag = f'"{hashlib.sha256(site.files[fineweb.VAL]).hexdigest()}"'
    site.faults = ["redirect", "drop", "redirect", None]
    assert prepare(*flags)[0] == 0
    check(tmp_path / "out", tokens)
    damaged = bytearray(site.files[NAMES[2]])
    damaged[150_000] ^= 1
    site.etag = f'"{hashlib.sha256(site.files[NAMES[2]]).hexdigest()}"'
    good, site.files[NAMES[2]] = site.files[NAMES[2]], bytes(damaged)
    site.faults = ["redirect", None] * 5
    status, line = prepare(*flags, "--shards=2")
    assert status == 1 and "checksum" in line and not site.faults
    check(tmp_path / "out", tokens)
    site.files[NAMES[2]], site.faults = good, ["redirect"]
    assert prepare(*flags, "--shards=2")[0] == 0
    check(tmp_path / "out", tokens, shards=2)


def test_killed_while_it_downloads_it_goes_on(site, flags, tokens, tmp_path):
    site.pause = 0.01  # some 3 MB a second
    rng, kills = random.Random(1), 0
    while True:
        process = subprocess.Popen([sys.executable, SCRIPT, *flags, "--shards=3"], cwd=ROOT, stdout=subprocess.DEVNULL)
        before = len(site.requests)
        while process.poll() is None and len(site.requests) == before:
            time.sleep(0.005)
        try:
            status = process.wait(rng.uniform(0.02, 0.08))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            status = process.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        site.pause = 0.01 if kills < 5 else 0.0
    check(tmp_path / "out", tokens, shards=3)
    assert kills >= 5 and any(start for _, start in site.requests)


def test_killed_at_any_change_of_a_file_it_goes_on(site, flags, tokens, tmp_path):
    """Each process ends before or after the first, second or third of what makes a change last; the next goes on."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from data.fineweb import prepare
left, after = int(sys.argv.pop(1)), sys.argv.pop(1) == "after"
def deadly(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0 and not after: signal.raise_signal(signal.SIGKILL)
        result = function(*args, **kwargs)
        if left == 0: signal.raise_signal(signal.SIGKILL)
        return result
    return call
os.replace, os.fsync = deadly(os.replace), deadly(os.fsync)
prepare.main()
"""
    rng, kills = random.Random(2), 0
    while True:
        when = str(rng.randint(1, 3)), rng.choice(["before", "after"])
        done = subprocess.run([sys.executable, "-c", code, *when, *flags, "--shards=3"], cwd=ROOT, capture_output=True)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    check(tmp_path / "out", tokens, shards=3)
    assert kills > 5
    assert [name for name, start in site.requests if not start] == NAMES, "what had come was not fetched again"


def test_what_is_there_is_never_mixed_with_something_else(site, flags, tokens, tmp_path, dataset, prepare):
    out = tmp_path / "out"
    assert prepare(*flags)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def refused(*args) -> str:
        status, line = prepare(*flags, "--shards=2", *args)
        assert status == 2
        return line

    assert "another tokenizer" in refused(f"--tokenizer={dataset / 'meta.json'}")
    assert "another dataset" in refused(f"--out_dir={dataset}")
    for content in ("{", "[]", '{"shards": null}', before["meta.json"].replace(b'"val_tokens"', b'"val_"').decode()):
        (out / "meta.json").write_text(content)
        assert "damaged" in refused()
    (out / "meta.json").unlink()
    assert "train.bin" in refused()
    assert (out / "train.bin").read_bytes() == before["train.bin"]
    (out / "meta.json").write_bytes(before["meta.json"])
    (out / "train.bin").write_bytes(before["train.bin"][:-2])
    assert "shorter" in refused()
    assert "--shards" in prepare("--shards=104")[1] and "--shards" in prepare("--shards=many")[1]
    assert "unknown url type" in refused("--url=here", f"--out_dir={out / 'other'}")


def test_a_full_disk_is_one_line_and_it_goes_on(site, flags, tokens, tmp_path, prepare):
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from data.fineweb import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # no file may grow larger
prepare.main()
"""
    line = error("-c", code, *flags, "--shards=2", status=1)
    assert "cannot write" in line and str(tmp_path / "out") in line
    data = common.load(tmp_path / "out")
    assert np.array_equal(data.train, tokens[1]), "what was whole is a dataset"
    assert prepare(*flags, "--shards=2")[0] == 0
    check(tmp_path / "out", tokens, shards=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_shards(server, flags, tmp_path):
    ids = np.arange(12_000_000) % 250
    server.files = {name: shard(ids) for name in NAMES[:2]}
    code = f"""
import pathlib, re, sys
sys.path.insert(0, {str(ROOT)!r})
from data.fineweb import prepare
def peak():
    return int(re.search("VmHWM:(.*)kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
prepare.main()
print(peak() - before)
"""
    done = run("-c", code, *flags, cwd=tmp_path)  # a new process, whose memory is its own
    assert 0 < int(done.stdout.split()[-1]) < 20e6 < len(server.files[fineweb.VAL])

import contextlib
import hashlib
import http.server
import json
import random
import signal
import subprocess
import sys
import threading
import time

import common
import numpy as np
import pytest
import tiktoken
from conftest import ROOT, error, run

from data.fineweb import prepare as fineweb
from sologpt.data import Dataset, load
from sologpt.tokenizer import Tokenizer

SCRIPT = "data/fineweb/prepare.py"
NAMES = [fineweb.VAL, *fineweb.TRAIN[:3]]


def shard(tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub that huggingface_hub uses to download the files of a dataset.

    hub.files are the files, hub.downloads the names in all GETs, and hub.faults what the next GETs do:
    an int is an HTTP status, "drop" closes the connection half-way, "damage" flips one bit.
    """

    def do_POST(self):  # the files' SHA-256
        self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == f"/api/datasets/{fineweb.REPO}/paths-info/main"
        files = [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": "0" * 40,
                "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134},
            }
            for name, content in self.server.files.items()
        ]
        self.reply(200, json.dumps(files).encode())

    def do_HEAD(self):
        self.reply(200)

    def do_GET(self):
        if self.path.startswith("/api/"):  # the library asks for more than it needs
            self.send_error(404)
            return
        hub = self.server
        hub.downloads.append(self.path.rpartition("/")[2])
        fault = hub.faults.pop(0) if hub.faults else None
        self.reply(fault if isinstance(fault, int) else 200, fault=fault)

    def reply(self, status: int, content: bytes | None = None, fault: int | str | None = None):
        if content is None:
            folder, _, name = self.path.rpartition("/")
            assert folder == f"/datasets/{fineweb.REPO}/resolve/main"
            content = self.server.files.get(name)
        if content is None or status != 200:
            self.send_response(404 if content is None else status)
            self.send_header("X-Error-Code", "EntryNotFound" if content is None else "")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag, size = hashlib.sha256(content).hexdigest(), len(content)
        if fault == "damage":
            content = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Linked-Size", str(size))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):  # the client was killed
            for i in range(0, len(body), 2**15):
                if fault == "drop" and i >= len(body) // 2:
                    return
                self.wfile.write(body[i : i + 2**15])
                time.sleep(self.server.pause)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tokens, monkeypatch, tmp_path):
    """A local Hub with all shards. Scripts started by a test download from it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {name: shard(ids) for name, ids in zip(NAMES, tokens, strict=True)}
    server.downloads, server.faults, server.pause = [], [], 0.0
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One with a gap, id 256, so that there are ids of which it knows nothing."""
    ranks = {bytes([i]): i for i in range(256)} | {b"%3d" % i: 257 + i for i in range(700)}
    special = {"<|endoftext|>": 957}
    return Tokenizer(
        tiktoken.Encoding("triples", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)
    )


@pytest.fixture(scope="module")
def tokens(tokenizer) -> list[np.ndarray]:
    """The tokens of the validation shard and of three training shards: different lengths, several chunks."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, 958, size=n) for n in (120_000, 150_000, 100_001, 90_000)]
    for tokens in shards:
        tokens[tokens == 256] = 957
    return shards


@pytest.fixture
def flags(hub, tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_dict()))
    return [f"--tokenizer={tmp_path / 'tokenizer.json'}", f"--out_dir={tmp_path / 'out'}"]


def check(folder, tokens, shards=1, leftovers=()) -> Dataset:
    """The dataset, which must have exactly the validation shard and the first training shards."""
    data = load(folder)
    assert np.array_equal(data.val, tokens[0])
    assert np.array_equal(data.train, np.concatenate(tokens[1 : 1 + shards]))
    assert sorted(path.name for path in folder.iterdir()) == sorted([*common.FILES, *leftovers])
    return data


def test_shards_become_a_dataset_that_grows(hub, flags, tokens, tokenizer, tmp_path):
    done = run(SCRIPT, *flags)
    data = check(tmp_path / "out", tokens)
    assert "train.bin: 150,000 tokens of triples" in done.stdout and not done.stderr
    assert data.tokenizer.to_dict() == tokenizer.to_dict() and data.train.dtype == np.uint16
    text = tokenizer.encoding.decode_bytes([i for i in tokens[0].tolist() if i != tokenizer.eot])
    assert data.bytes_per_token == len(text) / len(tokens[0])
    assert data.max_token == 957
    run(SCRIPT, *flags, "--shards=3")
    check(tmp_path / "out", tokens, shards=3)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    text = tokenizer.encoding.decode_bytes(
        [i for ids in tokens[1:] for i in ids.tolist() if i != tokenizer.eot]
    )
    assert (meta["train_tokens"], meta["train_bytes"], meta["train_max_token"]) == (340_001, len(text), 957)
    assert hub.downloads == NAMES, "a shard in the dataset is not downloaded again"
    run(SCRIPT, *flags, "--shards=2", HF_ENDPOINT="http://127.0.0.1:9")
    check(tmp_path / "out", tokens, shards=3)


def test_a_dropped_connection_is_retried(hub, flags, tokens, tmp_path):
    hub.faults = ["drop", None, "drop"]
    assert not run(SCRIPT, *flags).stderr
    check(tmp_path / "out", tokens)
    assert hub.downloads == [NAMES[0], NAMES[0], NAMES[1], NAMES[1]]


def test_a_failed_download_is_one_line_and_the_next_run_continues(hub, flags, tokens, tmp_path):
    hub.faults = [None, None, 500]
    line = error(SCRIPT, *flags, "--shards=3", status=1)
    assert NAMES[2] in line and "500" in line and "same command" in line
    check(tmp_path / "out", tokens, leftovers=["shards.tmp"])
    line = error(SCRIPT, *flags, "--shards=4", status=1)
    assert "404" in line and fineweb.TRAIN[3] in line
    run(SCRIPT, *flags, "--shards=3")
    check(tmp_path / "out", tokens, shards=3)
    assert hub.downloads == [*NAMES[:3], *NAMES[2:]]


def test_offline_is_one_line(hub, flags, tmp_path):
    started = time.monotonic()
    line = error(SCRIPT, *flags, status=1, HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in line and "refused" in line and time.monotonic() - started < 10
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import tiktoken
from data.fineweb import prepare
def refuse(_): raise OSError("no route to host")
tiktoken.get_encoding = refuse
prepare.errors.run(prepare.main)
"""
    line = error("-c", code, "--tokenizer=gpt2", f"--out_dir={tmp_path / 'other'}", status=1)
    assert "gpt2" in line and "--tokenizer=FILE" in line and not hub.downloads


def test_a_missing_huggingface_hub_is_one_line(flags):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["huggingface_hub"] = None
from data.fineweb import prepare
prepare.errors.run(prepare.main)
"""
    line = error("-c", code, *flags)
    assert "extra 'hf'" in line and "huggingface_hub" in line


@pytest.mark.parametrize(
    "content, status, words",
    [
        (shard(np.arange(50_000) % 250, magic=20240801), 1, "not a token shard"),
        (shard(np.arange(50_000) % 250, version=2), 1, "not a token shard"),
        (b"<!DOCTYPE html>", 1, "not a token shard"),
        (shard(np.arange(50_000) % 250)[:-1], 1, "101,023 bytes"),
        (shard(np.arange(50_000) % 250)[:3000], 1, "50,000 tokens"),
        (shard(np.full(50_000, 958)), 2, "token id 958"),
        (shard(np.arange(50_000) % 958), 2, "token id 256"),
    ],
)
def test_a_wrong_file_never_enters_the_dataset(hub, flags, tokens, tmp_path, content, status, words):
    good, hub.files[fineweb.VAL] = hub.files[fineweb.VAL], content
    line = error(SCRIPT, *flags, status=status)
    assert fineweb.VAL in line and words in line
    assert hub.downloads == [fineweb.VAL]
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.bin")) == 0
    hub.files[fineweb.VAL] = good
    run(SCRIPT, *flags)
    check(tmp_path / "out", tokens)


def test_an_unknown_id_at_the_end_of_a_shard_never_enters_the_dataset(hub, flags, tokens, tmp_path):
    wrong = tokens[2].copy()
    wrong[-1] = 60_000
    hub.files[NAMES[2]] = shard(wrong)
    line = error(SCRIPT, *flags, "--shards=3")
    assert "60000" in line and NAMES[2] in line
    check(tmp_path / "out", tokens, leftovers=["shards.tmp"])
    hub.files[NAMES[2]] = shard(tokens[2])
    run(SCRIPT, *flags, "--shards=3")
    check(tmp_path / "out", tokens, shards=3)


def test_a_shard_with_the_wrong_checksum_is_downloaded_again(hub, flags, tokens, tmp_path):
    hub.faults = [None, None, "damage"]
    line = error(SCRIPT, *flags, "--shards=2", status=1)
    assert "checksum" in line and NAMES[2] in line
    check(tmp_path / "out", tokens, leftovers=["shards.tmp"])
    run(SCRIPT, *flags, "--shards=2")
    check(tmp_path / "out", tokens, shards=2)
    assert hub.downloads == [*NAMES[:3], NAMES[2]]


def test_killed_during_a_download_the_next_run_continues(hub, flags, tokens, tmp_path):
    hub.pause = 0.01  # about 3 MB/s
    rng, kills = random.Random(1), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *flags, "--shards=3"], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        before = len(hub.downloads)
        while process.poll() is None and len(hub.downloads) == before:
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
        hub.pause = 0.01 if kills < 5 else 0.0
    check(tmp_path / "out", tokens, shards=3)
    assert kills >= 5


def test_killed_at_any_change_of_a_file_the_next_run_continues(hub, flags, tokens, tmp_path):
    """Each process is killed before or after its first, second or third os.replace or os.fsync."""
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
prepare.errors.run(prepare.main)
"""
    rng, kills = random.Random(2), 0
    while True:
        when = str(rng.randint(1, 3)), rng.choice(["before", "after"])
        done = subprocess.run(
            [sys.executable, "-c", code, *when, *flags, "--shards=3"], cwd=ROOT, capture_output=True
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    check(tmp_path / "out", tokens, shards=3)
    assert kills > 5
    assert hub.downloads == NAMES, "a complete download is not repeated"


def test_an_existing_dataset_is_never_mixed_with_another(hub, flags, tokens, tmp_path, dataset):
    out = tmp_path / "out"
    run(SCRIPT, *flags)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def refused(*args) -> str:
        return error(SCRIPT, *flags, "--shards=2", *args)

    assert "another tokenizer" in refused(f"--tokenizer={dataset / 'meta.json'}")
    assert "another dataset" in refused(f"--out_dir={dataset}")
    for content in (
        "{",
        "[]",
        '{"shards": null}',
        before["meta.json"].replace(b'"val_tokens"', b'"val_"').decode(),
    ):
        (out / "meta.json").write_text(content)
        assert "damaged" in refused()
    (out / "meta.json").unlink()
    assert "train.bin" in refused()
    assert (out / "train.bin").read_bytes() == before["train.bin"]
    (out / "meta.json").write_bytes(before["meta.json"])
    (out / "train.bin").write_bytes(before["train.bin"][:-2])
    assert "shorter" in refused()
    assert "--shards" in error(SCRIPT, "--shards=104") and "--shards" in error(SCRIPT, "--shards=many")


def test_a_full_disk_is_one_line_and_the_next_run_continues(hub, flags, tokens, tmp_path):
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from data.fineweb import prepare
largest = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
prepare.errors.run(prepare.main)
"""
    line = error("-c", code, 200_000, *flags, "--shards=2", status=1)  # less than a download
    assert "cannot write" in line and str(tmp_path / "out") in line
    line = error("-c", code, 400_000, *flags, "--shards=2", status=1)  # less than train.bin
    assert "cannot write" in line and str(tmp_path / "out") in line
    check(tmp_path / "out", tokens, leftovers=["shards.tmp"])
    run(SCRIPT, *flags, "--shards=2")
    check(tmp_path / "out", tokens, shards=2)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shards(hub, flags, tmp_path):
    code = f"""
import sys, tracemalloc
sys.path.insert(0, {str(ROOT)!r})
from data.fineweb import prepare
tracemalloc.start()  # of Python and NumPy: the peak of the whole process varies by 10 MB from run to run
prepare.main()
print(tracemalloc.get_traced_memory()[1])
"""

    def peak(n: int) -> int:
        content = shard(np.arange(n, dtype="<u4") % 250)
        hub.files = {name: content for name in NAMES[:2]}
        done = run("-c", code, *flags, f"--out_dir={tmp_path / str(n)}", cwd=tmp_path)  # a process of its own
        return int(done.stdout.split()[-1])

    # The least of two: the library of the Hub holds more of a download that comes in odd pieces
    small, large = (min(peak(n), peak(n)) for n in (5_000_000, 20_000_000))
    assert large - small < 1e6 < len(hub.files[fineweb.VAL])

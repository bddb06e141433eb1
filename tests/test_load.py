import itertools
import math
import os
import re
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import GEMMA, LLAMA3, YARN, make_model

import sample
from gpt import GPT, GPTConfig
from sologpt import hf, load
from sologpt.device import HUGE_PAGES, pick_device, zeros_on_demand
from sologpt.errors import UserError
from sologpt.load import check_config, describe_run, find_checkpoint, load_model, make_config
from sologpt.stream import stream_text
from sologpt.tokenizer import EOT, Tokenizer

BYTES = Tokenizer.from_spec("bytes")
MODEL = make_model(torch.float32, vocab_size=257, **hf.LLAMA)


def save(path: Path, seed: int = 0, **extra) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_model(torch.float32, seed, vocab_size=257).save(path, tokenizer=BYTES.to_dict(), **extra)
    return path


def same_weights(a: GPT, b: GPT) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


# ---- devices and memory


def test_pick_device():
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    assert pick_device() == pick_device("auto") == torch.device("cpu")  # in tests there is no accelerator


@pytest.mark.parametrize("available", [True, False])
def test_auto_is_an_accelerator_that_is_available(available, monkeypatch):
    """One that PyTorch was built for may be missing."""
    found = lambda check_available=False: torch.device("mps") if available or not check_available else None  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", found)
    assert pick_device("auto") == torch.device("mps" if available else "cpu")


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", "mps:99"])
def test_a_missing_device_is_a_value_error_of_one_line(name, tmp_path):
    path = save(tmp_path / "best.pt")
    for call in (
        lambda: pick_device(name),
        lambda: load_model(path, name),
        lambda: load_model("hf:none", name),
    ):
        with pytest.raises(ValueError, match=name) as e:
            call()
        assert "\n" not in str(e.value) and "damaged" not in str(e.value)


def test_copies_in_huge_pages_are_of_their_own():
    """Each keeps its numbers while others are made and dropped, and has a storage of its own, as GPT.save needs."""
    torch.manual_seed(0)
    tensors = [torch.randn(n, 7).to(dtype) for n in (5, 60_000, 0, 1, 200) for dtype in load.FLOATS]
    tensors.insert(9, torch.randn(HUGE_PAGES.BLOCK // 4 + 3))  # larger than a block
    tensors += [
        torch.randn(60, 40).t(),
        torch.arange(250, dtype=torch.uint8),
        torch.arange(-99, 99, dtype=torch.int8),
    ]
    copies = [HUGE_PAGES.copy(x) for x in tensors]
    for x in tensors:
        HUGE_PAGES.copy(x + 1)
    for x, copy in zip(tensors, copies, strict=True):
        assert torch.equal(x, copy) and x.dtype == copy.dtype and copy.is_contiguous()
        assert copy.untyped_storage().nbytes() == x.nbytes and copy.data_ptr() % 64 == 0
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in copies if x.numel())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_large_weight_is_freed_with_it():
    """A block is kept for the weights that come next, but not one that such a weight has filled."""

    def memory() -> int:
        return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024

    x = torch.ones(HUGE_PAGES.BLOCK // 4 + 1)
    before = memory()
    copy = HUGE_PAGES.copy(x)
    assert memory() - before > 0.9 * copy.nbytes
    del copy
    assert memory() - before < 2**23


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="Linux has huge pages")
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_loaded_weights_are_in_huge_pages(tmp_path, kind):
    """The kernel's flag "hg" of the memory they are in."""
    hf.save(make_model(torch.bfloat16, vocab_size=257, **hf.LLAMA), BYTES, tmp_path / "model")
    for source in (save(tmp_path / "x.pt"), f"hf:{tmp_path}/model"):
        model, _, _ = load_model(source, quantize=kind)
        areas = re.findall(r"^(\w+)-(\w+) [^\0]*?^VmFlags: (.*)$", Path("/proc/self/smaps").read_text(), re.M)
        for x in (*model.h.parameters(), *model.h.buffers()):
            (flags,) = (f for start, end, f in areas if int(start, 16) <= x.data_ptr() < int(end, 16))
            assert "hg" in flags.split()


def test_too_little_memory_for_zeros_is_the_error_of_torch():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        zeros_on_demand(torch.empty(2**55, device="meta"), torch.device("cpu"))


def test_no_memory_for_huge_pages_is_the_error_of_torch(monkeypatch):
    monkeypatch.setattr(HUGE_PAGES, "BLOCK", 2**62)
    monkeypatch.setattr(HUGE_PAGES, "used", 2**62)
    x = torch.randn(3, 4)
    assert torch.equal(HUGE_PAGES.copy(x.t()), x.t())


# ---- checkpoints


@pytest.mark.parametrize("kind", [str, Path])
def test_a_checkpoint_file(kind, tmp_path):
    path = save(tmp_path / "any.pt", step=3, train_config={"seed": 1}, optimizers=[{"state": {}}])
    model, tokenizer, about = load_model(kind(path))
    assert same_weights(model, GPT.load(path)) and model.dtype == torch.float32 and not model.training
    assert tokenizer.to_dict() == BYTES.to_dict()
    assert about == {
        "source": str(path),
        "step": 3,
        "train_config": {"seed": 1},
        "optimizers": [{"state": {}}],
    }


def test_device_and_dtype(tmp_path):
    path = save(tmp_path / "best.pt")
    for device in (None, "cpu", "auto", torch.device("cpu")):
        model = load_model(path, device, torch.bfloat16)[0]
        assert model.dtype == torch.bfloat16
        assert model.device.type == pick_device(device or "cpu").type


def test_gemma_in_float16_is_a_note(tmp_path, capsys):
    model = make_model(torch.float32, vocab_size=257, **GEMMA)
    model.save(tmp_path / "best.pt", tokenizer=BYTES.to_dict())
    hf.save(model, BYTES, tmp_path / "hf")
    for source in (tmp_path / "best.pt", f"hf:{tmp_path / 'hf'}"):
        load_model(source, dtype=torch.float16)
        assert capsys.readouterr().err == "note: Gemma's activations overflow float16: take bfloat16\n"
        load_model(source, dtype=torch.bfloat16)
        assert not capsys.readouterr().err


def test_tokens_that_the_model_lacks_are_a_note_and_then_an_error(tmp_path, capsys):
    """Not the special one, which no text has."""
    for size, note in ((256, ""), (250, "note: the model lacks 6 tokens of bytes, from id 250: ")):
        make_model(vocab_size=size).save(tmp_path / "best.pt", tokenizer=BYTES.to_dict())
        model, tokenizer, _ = load_model(tmp_path)
        err = capsys.readouterr().err
        assert err.startswith(note) if note else not err
        assert len("".join(stream_text(model, tokenizer, "é", max_tokens=9))) > 0
    with pytest.raises(UserError, match="ids 97 to 255 are not from 0 to 249"):
        stream_text(model, tokenizer, [97, 255])


def test_an_out_dir_is_its_newest_best_checkpoint(tmp_path):
    """ckpt.pt, newer, is not taken; nor is best.old.pt, of the run before."""
    paths = [save(tmp_path / name, seed) for seed, name in enumerate(("a/best.pt", "b/c/best.pt", "best.pt"))]
    save(tmp_path / "ckpt.pt", 7)
    save(tmp_path / "best.old.pt", 8)
    now = time.time()
    for newest in paths:
        for path in paths:
            os.utime(path, (now, now - 100 * (path != newest)))
        assert find_checkpoint(tmp_path) == newest
        model, _, about = load_model(tmp_path)
        assert about["source"] == str(newest) and same_weights(model, GPT.load(newest))


def test_an_out_dir_without_best_is_its_last_checkpoint(tmp_path):
    path = save(tmp_path / "ckpt.pt", step=0)
    assert find_checkpoint(str(tmp_path)) == path
    assert load_model(str(tmp_path))[2] == {"source": str(path), "step": 0}


def test_without_any_best_it_is_the_newest_last_checkpoint_below(tmp_path):
    now, paths = time.time(), [save(tmp_path / name / "ckpt.pt") for name in ("a", "b", "c")]
    for age, path in zip((2, 1, 3), paths, strict=True):
        os.utime(path, (now, now - 100 * age))
    assert find_checkpoint(tmp_path) == paths[1]
    said = describe_run(paths[1])
    assert said == f"the last state of the run in {tmp_path / 'b'}, which has no best.pt yet"
    best = save(tmp_path / "c" / "best.pt")
    os.utime(best, (now, now - 900))
    assert find_checkpoint(tmp_path) == best and describe_run(best) == ""


def test_the_first_folder_that_exists_is_searched(tmp_path):
    best = save(tmp_path / "b" / "best.pt")
    save(tmp_path / "c" / "best.pt")
    assert find_checkpoint(tmp_path / "a", tmp_path / "b", tmp_path / "c") == best
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path / 'd'} or {tmp_path / 'e'}, or below"):
        find_checkpoint(tmp_path / "d", tmp_path / "e")


def test_a_checkpoint_that_was_moved_aside_is_named(tmp_path):
    old = save(tmp_path / "old-2" / "best.pt")
    path = tmp_path / "best.pt"
    with pytest.raises(FileNotFoundError, match=f"no checkpoint {path}, but an earlier run's {old}"):
        load_model(path)


# ---- configs of strangers


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2}, LLAMA3, YARN])
def test_a_good_config_passes(scaling):
    config = GPTConfig(rope_scaling=scaling, n_kv_head=None, sliding_window=None, softcap=0, dropout=0)
    check_config(asdict(config))
    assert make_config(asdict(config)) == config and make_config({}) == GPTConfig()


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(n_layer=True), ("n_layer", "True")),
        (dict(n_layer=2.0), ("n_layer", "2.0")),
        (dict(n_layer=10_001), ("n_layer", "10001")),
        (dict(n_layer=10**12), ("n_layer", str(10**12))),
        (dict(n_embd=10**30), ("n_embd", str(10**30))),
        (dict(vocab_size=2**31), ("vocab_size", str(2**31))),
        (dict(vocab_size=None), ("vocab_size", "None")),
        (dict(head_dim="64"), ("head_dim", "'64'")),
        (dict(sliding_window=True), ("sliding_window", "True")),
        (dict(qk_norm=1), ("qk_norm", "1")),
        (dict(mlp=["relu2"]), ("mlp", "['relu2']")),
        (dict(softcap=math.nan), ("softcap", "nan")),
        (dict(norm_eps=math.inf), ("norm_eps", "inf")),
        (dict(softcap=1e-300), ("softcap", "1e-300")),
        (dict(n_expert=8), ("n_expert", "another gpt.py")),
        (dict(norm_eps=True), ("norm_eps", "True")),
        (dict(norm_eps=-1e-6), ("norm_eps", "-1e-06")),
        (dict(vocab_size=0), ("vocab_size", "0")),
        (dict(sequence_len=-1), ("sequence_len", "-1")),
        (dict(rope_base=0.0), ("rope_base", "0.0")),
        (dict(rope_base=10**400), ("rope_base", "000")),
        (dict(rope_scaling="linear"), ("rope_scaling", "'linear'")),
        (dict(rope_scaling={}), ("linear", "llama3", "None")),
        (dict(rope_scaling={"rope_type": ["linear"]}), ("linear", "llama3", "['linear']")),
        (dict(rope_scaling={"rope_type": "longrope"}), ("linear", "llama3", "yarn", "'longrope'")),
        (
            dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
            ("'yarn'", "beta_fast", "attention_factor"),
        ),
        (dict(rope_scaling=YARN, rope_base=1.0), ("rope_base", "YaRN", "1")),
        (dict(window_rope_base=0.5), ("window_rope_base", "0.5")),
        (dict(window_rope_base=math.nan), ("window_rope_base", "nan")),
        (dict(window_rope_base="10000"), ("window_rope_base", "'10000'")),
        (dict(rope_scaling={"rope_type": "linear"}), ("factor", "{}")),
        (dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "beta": 1}), ("factor", "beta")),
        (dict(rope_scaling={"rope_type": "linear", "factor": 0}), ("factor", "0")),
        (dict(rope_scaling={"rope_type": "linear", "factor": True}), ("factor", "True")),
        (dict(rope_scaling={"rope_type": "linear", "factor": "2"}), ("factor", "'2'")),
        (dict(rope_scaling={"rope_type": "linear", "factor": math.inf}), ("factor", "inf")),
        (dict(rope_scaling={"rope_type": "linear", "factor": 10**400}), ("factor", "000")),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 2.0}), ("low_freq_factor",)),
        (
            dict(rope_scaling=LLAMA3 | {"low_freq_factor": 4.0}),
            ("low_freq_factor 4.0", "high_freq_factor 4.0"),
        ),
    ],
)
def test_what_only_strangers_get_wrong_in_a_config_is_refused(values, words):
    for check in (check_config, make_config):
        with pytest.raises(UserError) as e:
            check(values)
        assert all(word in str(e.value) for word in words), str(e.value)


def test_an_impossible_shape_is_a_user_error():
    with pytest.raises(UserError, match=r"n_head 4 .*n_kv_head 3"):
        make_config(dict(n_head=4, n_kv_head=3))


# ---- Hugging Face models


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf.save(MODEL, BYTES, folder)
    return folder


def test_a_hugging_face_model(folder):
    model, tokenizer, about = load_model(f"hf:{folder}", "cpu", torch.bfloat16)
    expected, _ = hf.load(folder, dtype=torch.bfloat16)
    assert same_weights(model, expected) and model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.encode("abc") == BYTES.encode("abc") and about == {"source": f"hf:{folder}"}


def test_a_hugging_face_folder_needs_no_prefix(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    for source in (folder, f"hf:~/{folder.name}", f"~/{folder.name}"):
        model, _, about = load_model(source)
        assert same_weights(model, hf.load(folder)[0]) and about == {"source": f"hf:{folder}"}
    hf.save(MODEL, BYTES, tmp_path / "both")
    save(tmp_path / "both" / "best.pt", step=5)
    assert load_model(tmp_path / "both")[2]["step"] == 5  # a folder that is an out_dir too


# ---- errors


@pytest.mark.parametrize(
    "source, words",
    [("none.pt", r"none\.pt.*hf:NAME"), ("empty", r"no best\.pt or ckpt\.pt in /\S*empty.*train\.py")],
)
def test_what_is_missing_is_a_file_not_found_error(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=words):
        load_model(source)
    with pytest.raises(FileNotFoundError, match=r"no best\.pt or ckpt\.pt in /\S*nowhere"):
        find_checkpoint("nowhere")


def test_an_unreadable_file_is_an_os_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as unreadable:
        unreadable.bind("best.pt")
        with pytest.raises(OSError, match=r"cannot read the checkpoint best\.pt: \w+"):
            load_model("best.pt")


def test_a_damaged_checkpoint_is_a_runtime_error(tmp_path):
    path = save(tmp_path / "best.pt")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RuntimeError, match=r"best\.pt.*damaged"):
        load_model(path)


def test_a_checkpoint_without_a_tokenizer_is_a_runtime_error(tmp_path):
    MODEL.save(tmp_path / "plain.pt")
    with pytest.raises(RuntimeError, match=r"plain\.pt holds no tokenizer"):
        load_model(tmp_path / "plain.pt")
    for odd in (
        {"kind": "odd"},
        torch.ones(3),
        torch.ones(3).to_sparse(),
        BYTES.to_dict() | {"name": torch.ones(3)},
        BYTES.to_dict() | {"special_tokens": {EOT: torch.tensor(256)}},
        BYTES.to_dict() | {"special_tokens": torch.ones(3).to_sparse()},
        BYTES.to_dict() | {"chat_template": 3},
    ):
        MODEL.save(tmp_path / "odd.pt", tokenizer=odd)
        with pytest.raises(RuntimeError, match=r"odd\.pt is damaged: its tokenizer"):
            load_model(tmp_path / "odd.pt")


def test_a_missing_extra_is_an_import_error(folder, tmp_path, monkeypatch):
    tokenizer = hf.load_tokenizer(folder)
    MODEL.save(tmp_path / "best.pt", tokenizer=tokenizer.to_dict())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for source in (f"hf:{folder}", tmp_path / "best.pt"):
        with pytest.raises(ImportError, match="the extra 'hf'"):
            load_model(source)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_is_not_reported_as_damage(error, tmp_path, monkeypatch):
    """The error of load_checkpoint passes through as it is."""

    def fail(*_):
        raise error

    monkeypatch.setattr(load, "load_checkpoint", fail)
    with pytest.raises(type(error)) as e:
        load_model(save(tmp_path / "best.pt"))
    assert e.value is error


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_the_short_names_of_gpt2_are_models_on_the_hub(name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hf, "load", lambda name, *rest: asked.append(name) or (MODEL, BYTES))
    monkeypatch.chdir(tmp_path)
    assert load_model(name)[2] == {"source": f"hf:{name}"} and asked == [name]
    assert sample.Config(init_from=name).init_from == name
    path = save(tmp_path / name / "best.pt")  # a run of that name comes first
    assert load_model(name)[2]["source"] == str(path.relative_to(tmp_path)) and asked == [name]

import pickle
import random

import pytest
import torch
from conftest import LLAMA, QWEN, make_model

from gpt import GPT
from sologpt.optim import configure_optimizers


def test_a_model_saved_and_loaded_is_the_same(tmp_path):
    model = make_model(torch.float32)
    optimizers = configure_optimizers(model)
    for _ in range(3):
        idx = torch.randint(61, (4, 17))
        model(idx[:, :-1], idx[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    idx, before = torch.randint(61, (2, 20)), list(model.generate([1, 2, 3], 40))
    model.save(tmp_path / "m.pt", step=3, note={"a": [1, "b", None]})
    loaded, extra = GPT.load_checkpoint(tmp_path / "m.pt")
    assert loaded.config == model.config and extra == {"step": 3, "note": {"a": [1, "b", None]}}
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(idx), model(idx))
    assert list(loaded.generate([1, 2, 3], 40)) == before


@pytest.mark.parametrize("switches", [LLAMA, QWEN])
def test_switches_are_saved(switches, tmp_path):
    model = make_model(**switches)
    model.save(tmp_path / "m.pt")
    loaded, idx = GPT.load(tmp_path / "m.pt"), torch.randint(61, (2, 20))
    assert loaded.config == model.config and torch.equal(loaded(idx), model(idx))


def test_a_checkpoint_from_before_the_switches(tmp_path):
    model = make_model(torch.float32)
    model.save(tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    keys = "sequence_len vocab_size n_layer n_head n_kv_head n_embd dropout softcap rope_base norm_eps"
    state["config"] = {key: state["config"][key] for key in keys.split()}
    torch.save(state, tmp_path / "old.pt")
    loaded, idx = GPT.load(tmp_path / "old.pt"), torch.randint(61, (2, 20))
    assert loaded.config == model.config and torch.equal(loaded(idx), model(idx))


def test_load_in_another_dtype(tmp_path):
    model = make_model(torch.float32)
    model.save(tmp_path / "m.pt")
    half = GPT.load(tmp_path / "m.pt", device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    idx = torch.randint(61, (2, 20))
    assert (half(idx) - model(idx)).abs().max() < 1


def test_a_failed_save_leaves_the_old_one(tmp_path):
    model = make_model()
    model.save(tmp_path / "m.pt", step=1)
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        model.save(tmp_path / "m.pt", step=2, unsavable=lambda: None)
    assert GPT.load_checkpoint(tmp_path / "m.pt")[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_a_missing_checkpoint_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        GPT.load(tmp_path / "no.pt")


def test_a_damaged_checkpoint_is_a_runtime_error(tmp_path):
    path = tmp_path / "m.pt"
    make_model(torch.float32).save(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(RuntimeError, match=r"m\.pt"):
            GPT.load(path)


def test_other_files_are_runtime_errors(tmp_path):
    path = tmp_path / "m.pt"
    for content in (b"", b"hello", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(RuntimeError):
            GPT.load(path)
    for state in ({}, [1], {"model": {}, "config": {}}, {"model": {}, "config": {"n_layers": 3}}):
        torch.save(state, path)
        with pytest.raises(RuntimeError):
            GPT.load(path)


def test_no_code_is_run_from_a_checkpoint(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil(), "config": {}}, tmp_path / "m.pt")
    with pytest.raises(RuntimeError):
        GPT.load(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()

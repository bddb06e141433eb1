import pickle
import random
import warnings
import zipfile
from dataclasses import asdict

import pytest
import torch
from conftest import GEMMA, GPT2, LLAMA, QWEN, WINDOWS, make_model, run

import gpt
from gpt import GPT
from sologpt.errors import RunError, UserError
from sologpt.load import load_checkpoint
from sologpt.optim import configure_optimizers
from sologpt.parallel import load_optimizers


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


@pytest.mark.parametrize("switches", [LLAMA, QWEN, GPT2, WINDOWS, GEMMA])
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


@pytest.mark.parametrize("load", [GPT.load, load_checkpoint])
def test_a_missing_checkpoint_is_a_file_not_found(load, tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "no.pt")


@pytest.mark.parametrize("load", [GPT.load, load_checkpoint])
def test_an_unknown_config_field_is_named(load, tmp_path):
    model = make_model(torch.float32)
    config = asdict(model.config) | {"n_expert": 8}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "m.pt")
    with pytest.raises((ValueError, TypeError), match="n_expert") as e:
        load(tmp_path / "m.pt")
    assert "damaged" not in str(e.value)


# ---- files of strangers: sologpt.load.load_checkpoint


def test_a_good_checkpoint_passes(tmp_path):
    model = make_model(torch.float32)
    model.save(tmp_path / "m.pt", step=3)
    loaded, extra = load_checkpoint(tmp_path / "m.pt", "cpu", torch.bfloat16)
    assert extra == {"step": 3} and loaded.config == model.config and not loaded.training
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x.bfloat16())


def test_a_damaged_checkpoint_is_a_runtime_error(tmp_path):
    path = tmp_path / "m.pt"
    make_model(torch.float32).save(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(RunError, match=r"m\.pt is damaged"):
            load_checkpoint(path)


def test_a_flipped_bit_is_a_runtime_error_or_changes_nothing(tmp_path):
    """Nothing but names, padding and the zip's own bookkeeping lies outside what the CRCs cover."""
    path, model = tmp_path / "m.pt", make_model(torch.float32)
    model.save(path)
    content, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(100):
        damaged, at = bytearray(content), rng.randrange(len(content))
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded, _ = load_checkpoint(path)
        except RunError as e:
            assert "damaged" in str(e)
            refused += 1
        else:
            assert loaded.config == model.config
            pairs = zip(loaded.parameters(), model.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert refused > 80


@pytest.mark.parametrize(
    "lie", [dict(n_layer=5_000), dict(n_layer=10**9), dict(n_embd=10**9), dict(vocab_size=10**30)]
)
def test_sizes_that_the_tensors_do_not_have_are_refused_before_a_model_is_built(lie, tmp_path, monkeypatch):
    model = make_model(torch.float32)
    torch.save({"model": model.state_dict(), "config": asdict(model.config) | lie}, tmp_path / "m.pt")
    built: list = []
    monkeypatch.setattr(gpt, "Block", lambda config, make=gpt.Block: built.append(config) or make(config))
    with pytest.raises((RunError, UserError), match=f"damaged|m.pt: {min(lie)}"):
        load_checkpoint(tmp_path / "m.pt")
    assert len(built) <= model.config.n_layer


def test_other_files_are_runtime_errors(tmp_path):
    path = tmp_path / "m.pt"
    for content in (b"", b"hello", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(RunError, match="damaged"), warnings.catch_warnings(record=True) as warned:
            load_checkpoint(path)  # torch.load warns of pickles
        assert not warned
    models = ({"model": {}, "config": {}}, {"model": {}, "config": [3]}, {"model": 3, "config": {}})
    for state in ({}, [1], *models):
        torch.save(state, path)
        with pytest.raises(RunError, match=r"m\.pt"):
            load_checkpoint(path)


def test_a_compressed_record_is_damage(tmp_path):
    """torch.save compresses nothing. A few kilobytes may become gigabytes."""
    make_model(torch.float32).save(tmp_path / "m.pt")
    good = zipfile.ZipFile(tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in good.namelist():
            bomb.writestr(name, good.read(name))
    with pytest.raises(RunError, match=r"bomb\.pt is damaged"):
        load_checkpoint(tmp_path / "bomb.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_that_hides_behind_another_of_its_name_is_damage(tmp_path):
    make_model(torch.float32).save(tmp_path / "m.pt")
    good = zipfile.ZipFile(tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as two:
        for name in good.namelist():
            if name.endswith("data/3"):
                two.writestr(name, bytes(len(good.read(name))))
            two.writestr(name, good.read(name))
    with pytest.raises(RunError, match=r"two\.pt is damaged"):
        load_checkpoint(tmp_path / "two.pt")


FRIEND: list = ["lol"]
for _ in range(40):
    FRIEND = [FRIEND] * 10  # a few hundred bytes in a file, and no end to its repr


@pytest.mark.parametrize(
    "field, value",
    [
        ("n_layer", "3"),
        ("n_embd", FRIEND),
        ("rope_scaling", {"rope_type": FRIEND}),
        ("qk_norm", torch.ones(3)),
        ("layer_types", "F" * 10**6),
        ("softcap", 1e-300),
        ("norm_eps", float("inf")),
        (7, 7),
    ],
)
def test_a_wrong_value_in_the_config_is_named(field, value, tmp_path):
    model = make_model(torch.float32)
    torch.save(
        {"model": model.state_dict(), "config": asdict(model.config) | {field: value}}, tmp_path / "m.pt"
    )
    with pytest.raises(UserError, match=rf"m\.pt: .*{field}") as e:
        load_checkpoint(tmp_path / "m.pt")
    assert len(str(e.value)) < 1000


STRANGE = {
    "expanded": lambda x: torch.zeros(1).expand(x.shape),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "negated": lambda x: torch._neg_view(x),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64),
    "integer": lambda x: torch.nn.Parameter(x.long(), requires_grad=False),
    "bool": lambda x: x > 0,
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "nested": lambda x: torch.nested.nested_tensor([x]),
    "none": lambda x: None,
}


@pytest.mark.filterwarnings("ignore:.*(nested|quantize|[Ss]parse)")
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_that_are_no_plain_floats_are_damage(kind, tmp_path):
    """As weights, and as the state of an optimizer."""
    model = make_model(torch.float32)
    optimizers = configure_optimizers(model)
    model(torch.ones(2, 8).long(), torch.ones(2, 8).long()).backward()
    for optimizer in optimizers:
        optimizer.step()
    state = model.state_dict()
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"config": asdict(model.config), "model": state}, tmp_path / "good.pt")
    load_checkpoint(tmp_path / "good.pt")
    load_optimizers(optimizers, states)
    for name in ("wte.weight", "h.1.mlp.c_fc.weight"):
        changed = state | {name: STRANGE[kind](state[name])}
        torch.save({"config": asdict(model.config), "model": changed}, tmp_path / "m.pt")
        with pytest.raises(RunError, match=r"m\.pt is damaged"):
            load_checkpoint(tmp_path / "m.pt")
    for values in (states[0]["state"][0], states[1]["state"][0]):
        for key, x in [*values.items()]:
            if key == "step":
                continue
            values[key] = STRANGE[kind](x)
            with pytest.raises(RunError, match="optimizer states do not fit"):
                load_optimizers(optimizers, states)
            values[key] = x


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_damage_is_one_line_without_the_warnings_of_pytorch(tmp_path):
    """In a process of its own: PyTorch warns once."""
    model = make_model(torch.float32)
    state = {name: STRANGE["quantized"](x) for name, x in model.state_dict().items()}
    torch.save({"config": asdict(model.config), "model": state}, tmp_path / "m.pt")
    code = "from sologpt import errors, load; errors.run(lambda: load.load_checkpoint(sys.argv[1]))"
    [line] = run("-c", f"import sys; {code}", tmp_path / "m.pt", status=1).stderr.splitlines()
    assert line.startswith("error: ") and "is damaged" in line


def test_a_transposed_weight_and_two_dtypes_are_no_damage(tmp_path):
    model, idx = make_model(torch.float32), torch.randint(61, (2, 20))
    state = model.state_dict()
    state["wte.weight"] = state["wte.weight"].T.contiguous().T
    half = {name: x.bfloat16() if "c_fc" in name else x for name, x in state.items()}
    torch.save({"config": asdict(model.config), "model": half}, tmp_path / "m.pt")
    loaded, _ = load_checkpoint(tmp_path / "m.pt")
    for name in half:
        model.get_parameter(name).data = half[name].float()
    assert torch.equal(loaded(idx), model(idx))


def test_no_code_is_run_from_a_checkpoint(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil(), "config": {}}, tmp_path / "m.pt")
    with pytest.raises(pickle.UnpicklingError):
        GPT.load(tmp_path / "m.pt")
    with pytest.raises(RunError):
        load_checkpoint(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()


def test_too_little_memory_and_a_missing_device_are_not_damage(tmp_path, monkeypatch):
    """What goes wrong beside the file says so itself."""
    make_model(torch.float32).save(tmp_path / "m.pt")
    with pytest.raises((RuntimeError, AssertionError)) as e:
        load_checkpoint(tmp_path / "m.pt", device="cuda:99")
    assert "damaged" not in str(e.value)

    for error in (
        MemoryError("none left"),
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patch, pytest.raises(type(error)) as e:
            patch.setattr(torch, "load", fail)
            load_checkpoint(tmp_path / "m.pt")
        assert e.value is error


def test_a_folder_and_a_plain_state_dict_are_named(tmp_path):
    with pytest.raises(UserError, match=r"is a folder: .*best\.pt\?"):
        load_checkpoint(tmp_path)
    torch.save(make_model().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(RunError, match="state_dict"):
        load_checkpoint(tmp_path / "weights.pt")

"""LoRA: `peft` is the oracle for the logits, the gradients and the files, float64 for the gradients through a frozen base."""

import json
import math
import re
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import GEMMA, GPT2, LLAMA, QWEN, error, make_model, run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hf import make_theirs, write
from test_parallel import records, together
from torch import nn
from transformers import AutoModelForCausalLM

import train as train_script
from gpt import GPT
from gpt import cross_entropy as gpt_cross_entropy
from sologpt import fast, hf, lora, loss
from sologpt import quantize as weights
from sologpt.errors import RunError, UserError
from sologpt.load import load_model
from sologpt.lora import LoRALinear, attach, merged
from sologpt.loss import chunked_cross_entropy
from sologpt.optim import configure_optimizers
from sologpt.peft import load_adapter, save_adapter
from sologpt.quantize import Int4Linear, Int8Linear, QuantizedLinear, WidenedLinear

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FAMILIES = [
    "llama-gqa-3",
    "mistral-odd",
    "qwen2-tied-gqa",
    "qwen3-tied-gqa",
    "smollm3",
    "gemma3_text-gqa-linear",
    "nanochat-gqa",
    "gpt2-odd",
]
FAMILY = pytest.mark.parametrize("family", FAMILIES)
TARGETS = [
    "attn,mlp",
    "attn",
    "mlp",
    "attn.c_q",
    "attn.c_k",
    "attn.c_v",
    "attn.c_proj",
    "mlp.c_fc",
    "mlp.c_proj",
]
TARGETS += ["mlp.c_gate", "attn.c_v,attn.c_q,mlp.c_fc"]
# Several targets in each family; one alone, quickly, where theirs has a module for it and where it has a fused one
EACH_TARGET = pytest.mark.parametrize(
    "family, targets",
    [
        pytest.param(family, targets, marks=[] if is_quick else pytest.mark.slow)
        for family in FAMILIES
        for targets in TARGETS
        for is_quick in ["." not in targets or "," in targets or family in ("llama-gqa-3", "gpt2-odd")]
    ],
)
ARCHITECTURES = {"nanochat": {}, "llama": LLAMA, "qwen": QWEN, "gpt2": GPT2, "gemma": GEMMA}
EACH = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
WIDE = dict(n_embd=64, head_dim=16, n_hidden=96)  # int4 takes all of these widths
EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-14}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folder of a small model of each family."""
    return {name: write(make_theirs(name), tmp_path_factory.mktemp(name)) for name in FAMILIES}


def adapt(model: GPT, rank: int = 3, alpha: float = 8.0, targets: str = "attn,mlp") -> GPT:
    """Attach adapters whose B is not zero."""
    torch.manual_seed(1)
    attach(model, rank, alpha, targets)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    return model


def open_theirs(base: Path, adapter: Path) -> peft.PeftModel:
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings(
        action="error", category=UserWarning
    ):  # of tensors that are missing or unexpected
        return peft.PeftModel.from_pretrained(theirs, adapter, is_trainable=True).eval()


def draw(model: GPT, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(3))


# -----------------------------------------------------------------------------
# Adapters


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_nothing_and_are_drawn_as_in_peft(config, dtype):
    model, plain = make_model(dtype, **config), make_model(dtype, **config)
    attach(model, 5, 7.0)
    idx = draw(model, 2, 20)
    with torch.no_grad():
        assert (model(idx) - plain(idx)).abs().max() <= 8 * EPS[dtype] * plain(idx).abs().max()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert p.dtype == (torch.float32 if "lora_" in name else dtype)
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(p.size(1))  # kaiming uniform with a = sqrt(5)
            assert 0.8 * bound < p.abs().max() <= bound
        if name.endswith("lora_B"):
            assert not p.any()
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 3 * (
        7 if config.get("mlp", "").endswith("glu") else 6
    )


@pytest.mark.parametrize(
    "targets, rank, message",
    [
        ("attn", 0, "rank of an adapter must be at least 1, not 0"),
        ("attn,c_q", 1, "'c_q' is no target of an adapter: take attn, mlp or attn.c_q, attn.c_k"),
        ("attn.c", 1, "'attn.c' is no target"),
        ("mlp.c_gate", 1, "'mlp.c_gate' is no target"),
        ("", 1, "'' is no target"),
        ("attn, mlp", 1, "' mlp' is no target"),
    ],
)
def test_bad_targets(targets, rank, message):
    model = make_model()
    with pytest.raises(UserError, match=re.escape(message)):
        attach(model, rank, 1.0, targets)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@EACH
def test_merged_is_unmerged(config):
    model = adapt(make_model(**config))
    state = {name: p.clone() for name, p in model.named_parameters()}
    plain, idx = merged(model), draw(model, 2, 25)
    assert type(plain) is GPT and not any(isinstance(module, LoRALinear) for module in plain.modules())
    with torch.no_grad():
        expected = model(idx)
        assert expected.std() > 0.1 and (expected - make_model(**config)(idx)).abs().max() > 0.01
        assert (
            plain(idx) - expected
        ).abs().max() < 1e-5 * expected.abs().max()  # B A is a product in float32
    assert plain.state_dict().keys() == make_model(**config).state_dict().keys()
    for name, p in model.named_parameters():
        assert torch.equal(p, state[name]) and p.requires_grad == ("lora_" in name)


@EACH
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_quantized_base_is_dequantized(config, kind, dtype):
    model = make_model(dtype, **config | WIDE).eval()
    fast.quantize(model, kind)
    adapt(model)
    plain, idx = merged(model), draw(model, 2, 25)
    assert all(p.dtype == dtype for p in plain.parameters())
    with torch.no_grad():
        expected = model(idx)
        assert (plain(idx) - expected).norm() < 30 * EPS[dtype] * expected.norm()


@EACH
def test_gradients_are_those_of_the_sum(config):
    """A and B's, in float32, beside those of an independent W + s B A in float64."""
    model, plain = adapt(make_model(**config), alpha=6.0), make_model(**config)
    idx, targets = draw(model, 2, 20), draw(model, 2, 20).flip(0)
    model(idx, targets).backward()
    leaves = {
        name: p.detach().double().requires_grad_() for name, p in model.named_parameters() if "lora_" in name
    }
    sums = {
        f"{name.removesuffix('.lora_A')}.weight": 2.0
        * leaves[name.replace("lora_A", "lora_B")]
        @ leaves[name]
        for name in leaves
        if name.endswith("lora_A")
    }
    both = {name: p.detach() + sums.get(name, 0) for name, p in plain.named_parameters()}
    torch.func.functional_call(plain, both, (idx, targets)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name)
        if p.grad is not None:
            exact = leaves[name].grad
            assert p.grad.dtype == torch.float32 and exact.norm() > 1e-6
            assert (p.grad - exact).norm() < 1e-5 * exact.norm(), name


def test_only_adapters_have_optimizer_state():
    model = adapt(make_model(torch.float32))
    frozen = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    for kind in ("muon", "adamw"):
        optimizers = configure_optimizers(model, learning_rate=0.01, optimizer=kind)
        model(draw(model, 2, 9), draw(model, 2, 9)).backward()
        for optimizer in optimizers:
            optimizer.step()
        trained = {p for optimizer in optimizers for p in optimizer.state}
        assert trained == {p for name, p in model.named_parameters() if "lora_" in name}
    for name, p in model.named_parameters():
        assert torch.equal(p, frozen[name]) if name in frozen else not torch.equal(p, before[name])


def test_the_state_of_adapters():
    model, other = adapt(make_model()), make_model()
    attach(other, 3, 8.0)
    state = lora.adapter_state(model)
    assert state.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    lora.load_adapter_state(other, state)
    assert all(torch.equal(x, state[name]) for name, x in lora.adapter_state(other).items())
    with torch.no_grad():
        assert torch.equal(model(draw(model, 1, 9)), other(draw(model, 1, 9)))
    name = next(iter(state))
    for bad in ({}, state | {name: torch.zeros(2, 2)}, state | {"x": torch.zeros(1)}, state | {name: 1}):
        with pytest.raises(RunError, match="adapters do not fit"):
            lora.load_adapter_state(other, bad)


# -----------------------------------------------------------------------------
# Through a frozen base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
@settings(max_examples=15, deadline=None)
@given(N=st.integers(1, 150), blocks=st.integers(1, 9), seed=st.integers(0, 99), M=st.integers(1, 90))
def test_the_gradient_of_a_quantized_linear(dtype, group_size, N, blocks, seed, M):
    """Of one row, for which int8 has a kernel of its own, and of many."""
    torch.manual_seed(seed)
    N = 8 * N if group_size else N  # rows of int4 come in eights
    weight, bias = torch.randn(N, blocks * (group_size or 16)).to(dtype), torch.randn(N).to(dtype)
    linear = Int4Linear(weight, bias, group_size) if group_size else Int8Linear(weight, bias)
    x = torch.randn(M, weight.size(1)).to(dtype).requires_grad_()
    y, grad = linear(x), torch.randn(M, N).to(dtype)
    with torch.no_grad():
        assert torch.equal(y, linear(x))
    y.backward(grad)
    exact = grad.double() @ linear.weight.double()
    assert x.grad.dtype == dtype
    assert (x.grad - exact).norm() <= 3 * EPS[dtype] * exact.norm()


@pytest.mark.parametrize("group_size", [0, 32])
def test_the_gradient_of_a_weight_of_several_chunks(group_size):
    torch.manual_seed(0)
    weight = torch.randn(2104, 1024)
    linear = Int4Linear(weight, None, group_size) if group_size else Int8Linear(weight, None)
    for x in (torch.randn(3, 5, 1024, requires_grad=True), torch.randn(1, 1024, requires_grad=True)):
        grad = torch.randn(*x.shape[:-1], 2104)
        linear(x).backward(grad)
        exact = grad.double() @ linear.weight.double()
        assert (x.grad - exact).norm() <= 3e-6 * exact.norm()


@pytest.mark.parametrize("shape", [(1, 1), (70, 48), (2100, 1024)])
def test_the_gradient_of_a_widened_linear(shape, monkeypatch):
    monkeypatch.setattr(weights, "product_dtype", lambda dtype: torch.float32)  # as on a CPU without bfloat16
    torch.manual_seed(0)
    plain = nn.Linear(shape[1], shape[0], dtype=torch.bfloat16).requires_grad_(False)
    x, grad = torch.randn(2, 3, shape[1]).bfloat16().requires_grad_(), torch.randn(2, 3, shape[0]).bfloat16()
    WidenedLinear(plain)(x).backward(grad)
    exact = grad.double() @ plain.weight.double()
    assert x.grad.dtype == torch.bfloat16
    assert (x.grad - exact).norm() <= 3 * EPS[torch.bfloat16] * exact.norm()
    assert plain.weight.grad is None


def gradients(model: GPT, idx: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(idx, targets).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def exact_gradients(model: GPT, idx: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """In float64, on the base's dequantized weights."""
    plain = make_model(**{key: value for key, value in vars(model.config).items()})
    for name, module in model.named_modules():
        name = name.removesuffix(".base")
        if isinstance(module, nn.Linear | QuantizedLinear) and name != "lm_head":
            plain.get_submodule(name).weight.data = module.weight.double()
            if module.bias is not None:
                plain.get_submodule(name).bias.data = module.bias.double()
        elif isinstance(module, nn.Embedding | nn.RMSNorm | nn.LayerNorm) and module.weight is not None:
            for leaf, p in module.named_parameters():
                plain.get_submodule(name).get_parameter(leaf).data = p.double()
    for mine, theirs in ((model.wte, plain.wte), (model.lm_head, plain.lm_head)):
        if theirs is not None:
            theirs.weight.data = (model.head_weight if model.config.tie_embd else mine.weight).double()
    attach(plain, 3, 8.0)
    for module in plain.modules():
        if isinstance(module, LoRALinear):
            module.double()
    lora.load_adapter_state(plain, {name: x.double() for name, x in lora.adapter_state(model).items()})
    return gradients(plain, idx, targets)


@EACH
@pytest.mark.parametrize("kind", ["int8", "int4", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_a_frozen_base(config, kind, dtype):
    model = make_model(dtype, **config | WIDE)
    if kind:
        fast.quantize(model, kind)
    adapt(model).train()
    idx, targets = draw(model, 2, 20), draw(model, 2, 20).flip(0)
    found, exact = gradients(model, idx, targets), exact_gradients(model, idx, targets)
    assert found.keys() == exact.keys() == lora.adapter_state(model).keys()
    if dtype == torch.float32:
        for name in found:
            assert (found[name] - exact[name]).norm() <= 1e-4 * exact[name].norm(), name
    else:  # activations are rounded in three layers, which small gradients feel most
        both = [torch.cat([x.flatten() for x in grads.values()]) for grads in (found, exact)]
        assert (both[0] - both[1]).norm() <= 0.05 * both[1].norm()


@EACH
@pytest.mark.parametrize("kind", ["int8", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_with_a_frozen_head(config, kind, dtype, monkeypatch):
    """As `gpt.cross_entropy` computes it, and its gradient."""
    model = make_model(dtype, **config | WIDE)
    if kind:
        fast.quantize(model, kind)
    adapt(model).train()
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 7 * 61)
    x, targets = torch.randn(40, 64).to(dtype).requires_grad_(), draw(model, 40)
    targets[::3] = -1
    both = []
    for cross_entropy in (gpt_cross_entropy, chunked_cross_entropy):
        x.grad = None
        value = cross_entropy(model, x, targets, "sum")
        (2 * value).backward()
        both.append((value, x.grad))
    (whole, expected), (ours, grad) = both
    assert ours.item() == pytest.approx(whole.item(), rel=1e-6)
    assert (
        grad[::3].eq(0).all()
        and (grad.double() - expected.double()).norm() <= 4 * EPS[dtype] * expected.norm()
    )


def test_a_quantized_model_is_trained_by_its_adapters_only():
    model = make_model(torch.float32, **WIDE)
    fast.quantize(model, "int4")
    idx = draw(model, 2, 9)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()(idx, idx)
    attach(model, 2, 4.0)
    losses = []
    optimizers = configure_optimizers(model.train(), learning_rate=0.02, optimizer="adamw")
    for _ in range(30):
        value = model(idx, idx)
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]
    expected = merged(model)(idx, idx).item()
    assert model.eval()(idx, idx).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_activation_checkpointing(kind, dtype):
    """The gradients stay what they are; names lose no letter for the wrapper."""
    from sologpt import parallel

    world = parallel.World(0, 0, 1, torch.device("cpu"))
    found = []
    for checkpointing in (False, True):
        model = make_model(torch.float32, **LLAMA | WIDE)
        if kind:
            fast.quantize(model, kind)
        adapt(model).train()
        idx, names = draw(model, 2, 20), lora.adapter_state(model).keys()
        if checkpointing:
            model, _ = parallel.wrap_model(model, world, activation_checkpointing=True)
        assert lora.adapter_state(model).keys() == names
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = model(idx, idx)
        value.backward()
        plain = merged(model)
        assert plain(idx, idx).item() == pytest.approx(value.item(), rel=10 * EPS[dtype])
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


# -----------------------------------------------------------------------------
# PEFT's files


@EACH_TARGET
def test_peft_reads_ours_and_we_do(bases, family, targets, tmp_path):
    model, _ = hf.load(bases[family])
    if "c_gate" in targets and not model.config.mlp.endswith("glu"):
        return
    adapt(model, targets=targets)
    save_adapter(model, tmp_path / "adapter", str(bases[family]))
    idx = draw(model, 2, 40)
    with torch.no_grad():
        expected = model(idx)
        theirs = open_theirs(bases[family], tmp_path / "adapter")
        assert (theirs(idx).logits - expected).abs().max() < 1e-4
        again, _, about = load_model(f"hf:{bases[family]}", adapter=tmp_path / "adapter")
        assert (again(idx) - expected).abs().max() < 1e-4
        assert (expected - hf.load(bases[family])[0](idx)).abs().max() > 0.01
    assert about["adapter"] == str(tmp_path / "adapter")


@FAMILY
def test_gradients_are_peft_s(bases, family, tmp_path):
    """Saved as an adapter, the gradients of ours are those of theirs: both are stacked and permuted alike."""
    model, _ = hf.load(bases[family])
    adapt(model.train())
    save_adapter(model, tmp_path / "adapter", str(bases[family]))
    theirs, idx = open_theirs(bases[family], tmp_path / "adapter"), draw(model, 2, 30)
    expected = theirs(idx, labels=idx).loss
    expected.backward()
    loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for p in model.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    save_adapter(model, tmp_path / "gradient", "")
    ours = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    for name, p in theirs.named_parameters():
        if "lora_" not in name:
            continue
        grad = ours.pop(name.replace(".default", ""))
        if "c_attn" in name and "lora_B" in name:  # off its blocks, ours is 0 by construction
            grad, exact = grad[grad != 0], p.grad[grad != 0]
            assert len(exact) == p.grad.numel() / 3
        else:
            exact = p.grad
        assert exact.norm() > 1e-5 and (grad - exact).norm() < 1e-3 * exact.norm(), name
    assert not ours


PEFTS = {
    "plain": dict(target_modules="all-linear"),
    "patterns": dict(
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 7},
        alpha_pattern={"v_proj": 3, "model.layers.0.self_attn.q_proj": 20},
    ),
    "rslora": dict(target_modules=["k_proj", "o_proj"], use_rslora=True),
    "layers": dict(target_modules=["k_proj", "up_proj"], layers_to_transform=[1], lora_dropout=0.1),
    "regex": dict(target_modules=r".*\.0\.(self_attn\.o_proj|mlp\.gate_proj)"),
    "head": dict(target_modules=["q_proj", "lm_head"]),
}


@pytest.mark.parametrize("family", ["llama-gqa-3", "nanochat-gqa", "gpt2-odd"])
@pytest.mark.parametrize("kind", PEFTS)
@torch.no_grad()
def test_we_read_peft_s(bases, family, kind, tmp_path):
    keys = PEFTS[kind]
    if family != "llama-gqa-3":
        keys = dict(target_modules=["c_attn", "c_proj"] if "gpt2" in family else ["q_proj", "k_proj", "fc1"])
        if kind != "plain":
            return
    theirs = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **keys)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    idx = torch.randint(60, (2, 50))
    for dtype in (torch.float32, torch.float64):
        model, _, _ = load_model(f"hf:{bases[family]}", dtype=dtype, adapter=tmp_path)
        assert (model(idx) - theirs(idx).logits).abs().max() < 1e-4
    assert (hf.load(bases[family])[0](idx) - theirs(idx).logits).abs().max() > 0.01


def test_quantize_comes_after_the_merge(bases, tmp_path):
    base = bases["nanochat-gqa"]  # 32 wide
    model, _ = hf.load(base)
    save_adapter(adapt(model), tmp_path / "adapter", str(base))
    expected = merged(model)
    with warnings.catch_warnings(action="ignore"):
        fast.quantize(expected, "int4")
        found, _, _ = load_model(f"hf:{base}", quantize="int4", adapter=tmp_path / "adapter")
    with torch.no_grad():
        idx = draw(model, 1, 30)
        assert (found(idx) - expected(idx)).abs().max() < 1e-3
    with pytest.raises(RuntimeError, match="takes no adapter"):
        load_adapter(found, tmp_path / "adapter")


def save_small(base: Path, folder: Path) -> Path:
    save_adapter(adapt(hf.load(base)[0], targets="attn.c_q"), folder, str(base))
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(use_dora=True), "use_dora is True"),
        (dict(bias="all"), "bias is 'all'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (dict(layer_replication=[[0, 2]]), "layer_replication"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(peft_type=None), "peft_type is None"),
        (dict(unheard_of={"x": 1}), "unheard_of is {'x': 1}"),
        (dict(r=4), r"has torch.float32 \(3, 32\)"),
        (dict(r="3"), "r='3'"),
        (dict(r=0), "r=0"),
        (dict(r=True), "r=True"),
        (dict(lora_alpha=None), "lora_alpha=None"),
        (dict(lora_alpha=math.nan), "lora_alpha=nan"),
        (dict(lora_alpha=10**400), "lora_alpha=1000"),
        (dict(alpha_pattern={"q_proj": "x"}), "lora_alpha='x'"),
        (dict(alpha_pattern={".*": 1}), "alpha_pattern"),
        (dict(rank_pattern=["q_proj"]), "rank_pattern"),
    ],
)
def test_configs_that_we_cannot_compute(bases, change, message, tmp_path):
    folder = save_small(bases["llama-gqa-3"], tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as e:
        load_adapter(hf.load(bases["llama-gqa-3"])[0], folder)
    assert str(tmp_path) in str(e.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{Q}B.weight": None}, "lora_B.weight"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 4)}, "embed_tokens"),
        ({"base_model.model.model.norm.lora_A.weight": torch.zeros(3, 4)}, "model.norm"),
        ({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(3, 4)}, "layers.9"),
        ({f"{Q}magnitude_vector": torch.zeros(32)}, "magnitude_vector"),
        ({f"{Q}A.weight": torch.zeros(3, 31)}, r"\(3, 31\)"),
        ({f"{Q}A.weight": torch.zeros(32)}, r"\(32,\)"),
        ({f"{Q}B.weight": torch.zeros(3, 32)}, r"\(3, 32\)"),
        ({f"{Q}B.weight": torch.zeros(32, 3, dtype=torch.int32)}, "torch.int32"),
        ({"": torch.zeros(1)}, "''"),
    ],
)
def test_tensors_that_do_not_fit(bases, change, message, tmp_path):
    folder = save_small(bases["llama-gqa-3"], tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = {name: x for name, x in (load_file(path) | change).items() if x is not None}
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as e:
        load_adapter(hf.load(bases["llama-gqa-3"])[0], folder)
    assert str(path) in str(e.value)


def test_bad_folders(bases, tmp_path):
    model, folder = hf.load(bases["llama-gqa-3"])[0], save_small(bases["llama-gqa-3"], tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapter(model, bases["llama-gqa-3"])
    with pytest.raises(UserError, match=r"unknown or missing|has torch.float32"):
        load_adapter(hf.load(bases["gpt2-odd"])[0], folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        load_adapter(model, folder)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        load_adapter(model, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_adapter(model, folder)


def test_no_such_model_in_transformers(tmp_path):
    model = adapt(make_model(torch.float32, **LLAMA | dict(softcap=5.0)))
    with pytest.raises(UserError, match="transformers has no such model"):
        save_adapter(model, tmp_path / "adapter", "")
    assert not (tmp_path / "adapter").exists()


def test_sample_with_an_adapter(bases, tmp_path):
    base, flags = bases["llama-gqa-3"], ["--max_tokens=20", "--temperature=0", "--prompt=a"]
    model, tokenizer = hf.load(base)
    save_adapter(adapt(model), tmp_path / "adapter", str(base))
    plain = merged(model)
    plain.save(tmp_path / "merged.pt", tokenizer=tokenizer.to_dict())
    expected = run("sample.py", f"--ckpt={tmp_path / 'merged.pt'}", *flags).stdout
    done = run("sample.py", f"--init_from=hf:{base}", f"--adapter={tmp_path / 'adapter'}", *flags)
    assert done.stdout == expected
    assert f"hf:{base} with {tmp_path / 'adapter'}" in done.stderr
    assert run("sample.py", f"--init_from=hf:{base}", *flags).stdout != expected
    line = error("sample.py", f"--adapter={tmp_path / 'adapter'}", *flags)
    assert "--init_from or --ckpt" in line


# -----------------------------------------------------------------------------
# A run


LORA = ["--lora_rank=4", "--lora_alpha=8", "--optimizer=adamw", "--learning_rate=0.02", "--batch_size=4"]
LORA += ["--max_iters=12", "--eval_interval=6", "--eval_iters=2", "--log_interval=1", "--sample_tokens=0"]
LORA += ["--gradient_accumulation_steps=2", "--dropout=0.1", "--seed=7"]


@pytest.fixture(scope="module")
def base(trained, dataset, tmp_path_factory) -> Path:
    """A checkpoint that int4 takes, trained on little."""
    out = tmp_path_factory.mktemp("base")
    flags = [
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--sequence_len=32",
        "--max_iters=20",
        "--sample_tokens=0",
    ]
    run("train.py", *flags, f"--dataset={dataset}", f"--out_dir={out}")
    return out / "best.pt"


def train(base: Path, dataset: Path, out: Path, *flags: str, **options) -> Path:
    if "--init_from=resume" not in flags:
        flags = (f"--init_from={base}", *flags)
    run("train.py", *LORA, f"--dataset={dataset}", f"--out_dir={out}", *flags, **options)
    return out


def load_ckpt(out: Path) -> dict:
    return torch.load(out / "ckpt.pt", weights_only=True)


def assert_equal(a: object, b: object) -> None:
    """The same bits in nested dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture(scope="module")
def lora_run(base, dataset, tmp_path_factory) -> Path:
    return train(base, dataset, tmp_path_factory.mktemp("lora"))


def test_a_run_trains_the_adapters_alone(base, lora_run, dataset):
    losses = [record["val_loss"] for record in records(lora_run) if "val_loss" in record]
    assert losses[-1] < losses[0] - 0.08
    saved = load_ckpt(lora_run)
    assert "model" not in saved and saved["step"] == 12
    assert {x.shape[0] for name, x in saved["adapters"].items() if name.endswith("lora_A")} == {4}
    shapes = [x.shape for x in saved["adapters"].values()]
    moments = [values["exp_avg"].shape for each in saved["optimizers"] for values in each["state"].values()]
    assert sorted(moments) == sorted(shapes)
    # best.pt is the merged model: a plain GPT, which has the loss that was logged
    model, _, _ = load_model(lora_run / "best.pt")
    adapted, _, _ = load_model(base)
    torch.manual_seed(0)
    attach(adapted, 4, 8.0)
    lora.load_adapter_state(adapted, saved["adapters"])
    idx = draw(model, 2, 30)
    with torch.no_grad():
        assert (model(idx) - adapted.eval()(idx)).abs().max() < 1e-4
    done = run(
        "train.py",
        "--eval_only",
        f"--init_from={lora_run / 'best.pt'}",
        f"--dataset={dataset}",
        "--batch_size=4",
        "--eval_iters=2",
    )
    found = float(re.search(r"val_loss (\d+\.\d+)|val loss (\d+\.\d+)", done.stdout).group(0).split()[-1])
    assert found == pytest.approx(min(losses), abs=1e-3)


@torch.no_grad()
def test_the_adapter_of_a_run_is_peft_s(base, lora_run, tmp_path):
    model, tokenizer, _ = load_model(base)
    hf.save(model, tokenizer, tmp_path / "base")
    best, _, _ = load_model(lora_run / "best.pt")
    theirs = open_theirs(tmp_path / "base", lora_run / "adapter")
    idx = draw(model, 2, 32)
    assert (theirs(idx).logits - best(idx)).abs().max() < 1e-4
    again, _, _ = load_model(base, adapter=lora_run / "adapter")
    assert (again(idx) - best(idx)).abs().max() < 1e-5
    config = json.loads((lora_run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, str(base))


@pytest.mark.parametrize("flags", [[], ["--quantize=int4", "--dtype=bfloat16", "--optimizer=muon"]])
def test_resume_bit_for_bit(base, dataset, lora_run, flags, tmp_path):
    whole = train(base, dataset, tmp_path / "whole", *flags) if flags else lora_run
    part = train(base, dataset, tmp_path / "part", *flags, "--ckpt_interval=1", "--keep_checkpoints=20")
    shutil.copy(part / "ckpt_00000007.pt", part / "ckpt.pt")
    done = run("train.py", *LORA, *flags, "--init_from=resume", f"--dataset={dataset}", f"--out_dir={part}")
    assert "resumed at step 7" in done.stdout
    a, b = load_ckpt(whole), load_ckpt(part)
    for key in ("adapters", "optimizers", "step", "best", "base", "config"):
        assert_equal(a[key], b[key])
    assert_equal(GPT.load(whole / "best.pt").state_dict(), GPT.load(part / "best.pt").state_dict())


@pytest.mark.parametrize(
    "n, flags",
    [
        (1, ["--activation_checkpointing"]),
        (2, []),
        (2, ["--shard"]),
        pytest.param(2, ["--shard", "--activation_checkpointing"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", [[], pytest.param(["--quantize=int4"], marks=pytest.mark.slow)])
def test_processes_share_one_run(base, dataset, lora_run, n, flags, kind, tmp_path):
    alone = train(base, dataset, tmp_path / "alone", *kind) if kind else lora_run
    out, where = (
        tmp_path / "out",
        [f"--init_from={base}", f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"],
    )
    for done in together(n, *LORA, *where, *kind, *flags):
        assert done.returncode == 0, done.stderr
    for x, y in zip(records(alone), records(out), strict=True):
        for key in {"loss", "val_loss"} & x.keys():
            assert x[key] == pytest.approx(y[key], abs=1e-5)
    a, b = load_ckpt(alone), load_ckpt(out)
    assert a["adapters"].keys() == b["adapters"].keys() and a["base"] == b["base"]
    for name in a["adapters"]:
        torch.testing.assert_close(a["adapters"][name], b["adapters"][name], atol=1e-4, rtol=0)
    a, b = (GPT.load(each / "best.pt").state_dict() for each in (alone, out))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)
    a, b = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (alone, out))
    assert a.keys() == b.keys()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--shard"], []])
def test_processes_with_a_bfloat16_base(base, dataset, flags, tmp_path):
    """FSDP gathers frozen weights in bfloat16, adapters in float32."""
    alone = train(base, dataset, tmp_path / "alone", "--dtype=bfloat16")
    out = tmp_path / "out"
    where = [f"--init_from={base}", f"--dataset={dataset}", f"--out_dir={out}", "--dtype=bfloat16"]
    for done in together(2, *LORA, *where, *flags):
        assert done.returncode == 0, done.stderr
    a, b = (GPT.load(each / "best.pt") for each in (alone, out))
    assert a.dtype == b.dtype == torch.bfloat16
    for x, y in zip(records(alone), records(out), strict=True):
        for key in {"loss", "val_loss"} & x.keys():
            assert x[key] == pytest.approx(y[key], abs=0.01)
    assert all(x.dtype == torch.float32 for x in load_ckpt(out)["adapters"].values())


def test_quantized_or_not_a_run_learns_the_same(base, dataset, lora_run, tmp_path):
    losses = [records(lora_run)[-1]["val_loss"]]
    for flags in (["--quantize=int8"], ["--quantize=int4"], ["--dtype=bfloat16"]):
        out = train(base, dataset, tmp_path / flags[0], *flags)
        losses.append(records(out)[-1]["val_loss"])
        assert GPT.load(out / "best.pt").config == GPT.load(lora_run / "best.pt").config
    assert max(losses) - min(losses) < 0.1, losses


def test_what_a_run_refuses(base, lora_run, dataset, tmp_path, error_here):
    flags = [*LORA, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    for more, message in (
        (["--init_from=scratch"], "lora_rank needs a model to adapt"),
        ([f"--init_from={base}", "--lora_rank=0", "--quantize=int4"], "quantize needs adapters"),
        ([f"--init_from={base}", "--quantize=int3"], "quantize must be int8 or int4"),
        ([f"--init_from={base}", "--lora_targets=attn,c_q"], "'c_q' is no target of an adapter"),
        ([f"--init_from={base}", "--lora_rank=-1"], "lora_rank must be at least 0"),
        ([f"--init_from={lora_run}", f"--out_dir={lora_run}"], "choose another --out_dir"),
        ([f"--init_from={lora_run / 'ckpt.pt'}"], "without their base: best.pt is the whole model"),
    ):
        assert message in error_here(train_script, *flags, *more)
    shutil.copytree(lora_run, tmp_path / "run")
    flags = [*LORA, f"--dataset={dataset}", f"--out_dir={tmp_path / 'run'}", "--init_from=resume"]
    for more, message in (
        (["--lora_rank=8"], "not trained with lora_rank=8"),
        (["--lora_rank=0"], "needs the same lora_rank"),
        (["--lora_alpha=9"], "not trained with lora_alpha=9"),
        (["--lora_targets=attn"], "not trained with lora_targets=attn"),
        (["--quantize=int8"], "not trained with quantize=int8"),
        (["--optimizer=muon"], "not trained with optimizer=muon"),
    ):
        assert message in error_here(train_script, *flags, *more)
    saved = load_ckpt(lora_run)
    for change, message in (
        ({"adapters": {}}, "adapters do not fit"),
        ({"optimizers": []}, "optimizer states do not fit"),
        ({"base": "x"}, "damaged"),
        ({"tokenizer": {}}, "tokenizer cannot be read"),
    ):
        torch.save(saved | change, tmp_path / "run" / "ckpt.pt")
        assert message in error_here(train_script, *flags, status=1)
    shutil.copy(base.parent / "ckpt.pt", tmp_path / "run" / "ckpt.pt")
    assert "not trained with lora_rank=4" in error_here(train_script, *flags, "--optimizer=muon")


def test_another_base(base, dataset, tmp_path):
    """Of the same shape: the checkpoint is that of other weights."""
    other = tmp_path / "other.pt"
    shutil.copy(base, other)
    out = train(other, dataset, tmp_path / "out", "--max_iters=2")
    model, tokenizer, _ = load_model(base)
    with torch.no_grad():
        model.h[1].mlp.c_proj.weight[0, 0] += 0.1
    model.save(other, tokenizer=tokenizer.to_dict())
    line = error("train.py", *LORA, f"--dataset={dataset}", f"--out_dir={out}", "--init_from=resume")
    assert f"{other} is not the model that it was" in line


def test_an_earlier_adapter_is_set_aside(base, dataset, tmp_path):
    out = train(base, dataset, tmp_path / "out", "--max_iters=2")
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    train(base, dataset, out, "--max_iters=2", "--lora_rank=2")
    assert (out / "old-1" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--quantize=int4"], ["--dtype=bfloat16", "--activation_checkpointing"]]
)
def test_a_compiled_run(base, dataset, flags, tmp_path):
    eager = train(base, dataset, tmp_path / "eager", *flags, "--dropout=0")
    compiled = train(base, dataset, tmp_path / "compiled", *flags, "--dropout=0", "--compile")
    for x, y in zip(records(eager), records(compiled), strict=True):
        for key in {"loss", "val_loss"} & x.keys():
            assert x[key] == pytest.approx(y[key], abs=0.02 if "bfloat16" in str(flags) else 1e-4)

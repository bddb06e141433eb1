"""Checkpoints of nanoGPT. The oracle is GPT-2 of `transformers`, whose weights are the same transposed."""

import pytest
import torch
from conftest import error, run
from transformers import GPT2Config, GPT2LMHeadModel

from sologpt import hf
from sologpt.errors import RunError
from sologpt.load import load_model
from sologpt.nanogpt import load_nanogpt

MAIN = ("-c", "from sologpt import errors, hf; errors.run(hf.main)")
SIZES = dict(vocab_size=300, n_layer=2, n_head=4, n_embd=32)


def make_theirs(bias: bool) -> GPT2LMHeadModel:
    torch.manual_seed(4)
    keys = dict(n_positions=40, activation_function="gelu", bos_token_id=None, eos_token_id=None)
    config = GPT2Config(**keys, **SIZES)
    theirs = GPT2LMHeadModel(config).eval()
    for name, parameter in theirs.named_parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0, 0.3)
        if name.endswith("bias") and not bias:
            parameter.data.zero_()
    return theirs


def checkpoint(path, biased: bool, prefix: str = "", **changes):
    """What nanoGPT's train.py saves."""
    theirs = make_theirs(biased)
    state = {
        prefix + name: x.mT.contiguous() if ".c_" in name and x.ndim == 2 else x
        for name, x in theirs.state_dict().items()
        if biased or not name.endswith("bias")
    }
    mask = torch.ones(40, 40).tril().view(1, 1, 40, 40)
    state |= {f"{prefix}transformer.h.{i}.attn.bias": mask for i in range(2)}  # without flash attention
    args = dict(block_size=40, bias=biased, dropout=0.1, **SIZES) | changes
    config = dict(out_dir="out", eval_interval=5, compile=True)
    optimizer = {"state": {}, "param_groups": []}
    saved = dict(model=state, optimizer=optimizer, model_args=args, config=config)
    torch.save(saved | dict(iter_num=7, best_val_loss=torch.tensor(2.5)), path)
    return theirs


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_an_imported_checkpoint_computes_the_same(bias, prefix, tmp_path):
    theirs = checkpoint(tmp_path / "ckpt.pt", bias, prefix)
    out = tmp_path / "mine"
    command = (*MAIN, "import", f"nanogpt:{tmp_path / 'ckpt.pt'}", out)
    assert "wrote" in run(*command, "--tokenizer=bytes").stdout
    ours, tokenizer, about = load_model(out)
    assert tokenizer.name == "bytes" and about["step"] == 0 and ours.config.bias == bias
    assert ours.config.dropout == 0.1 and ours.config.sequence_len == 40
    idx = torch.randint(300, (2, 40))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert expected.std() > 0.5
        assert (ours(idx) - expected).abs().max() < 1e-4
        [tokens] = theirs.generate(idx[:1, :9], max_new_tokens=31, do_sample=False, pad_token_id=0).tolist()
        greedy = tokens[9:]
    assert len(set(greedy)) > 3 and list(ours.generate(idx[0, :9].tolist(), 31, temperature=0)) == greedy
    if bias:  # transformers has no GPT-2 without biases
        hf.save(ours, tokenizer, tmp_path / "theirs")
        assert torch.equal(hf.load(tmp_path / "theirs")[0](idx), ours(idx))
    else:
        with pytest.raises(ValueError, match="bias=False"):
            hf.save(ours, tokenizer, tmp_path / "theirs")


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(n_layer=3), ""),
        (dict(n_layer=10**9), "n_layer"),
        (dict(n_embd=64), ""),
        (dict(n_head="4"), "n_head"),
    ],
)
def test_a_checkpoint_that_lies_is_one_line(changes, word, tmp_path):
    checkpoint(tmp_path / "ckpt.pt", True, **changes)
    with pytest.raises(ValueError, match=rf"ckpt\.pt is not a checkpoint of nanoGPT: .*{word}"):
        load_nanogpt(tmp_path / "ckpt.pt", "bytes")


def test_a_flipped_bit_in_a_weight_is_damage(tmp_path):
    weight = checkpoint(tmp_path / "ckpt.pt", True).lm_head.weight
    content = bytearray((tmp_path / "ckpt.pt").read_bytes())
    content[content.index(weight[0].detach().numpy().tobytes()) + 3] ^= 64
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(RunError, match=r"ckpt\.pt is damaged"):
        load_nanogpt(tmp_path / "ckpt.pt", "bytes")


def test_other_mistakes_are_one_line(tmp_path, trained):
    def import_error(path, *flags, status=2):
        return error(*MAIN, "import", f"nanogpt:{path}", tmp_path / "out", *flags, status=status)

    assert "none.pt" in import_error(tmp_path / "none.pt")
    assert "not a checkpoint of nanoGPT" in import_error(trained / "best.pt")
    path = tmp_path / "ckpt.pt"
    checkpoint(path, True)
    assert "unknown tokenizer" in import_error(path, "--tokenizer=x")
    path.write_bytes(path.read_bytes()[:-99])
    assert "ckpt.pt is damaged" in import_error(path, status=1)
    assert not (tmp_path / "out").exists()

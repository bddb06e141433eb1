"""notebooks/inside.ipynb with models of other architectures. nbmake runs it with the one that it trains."""

import json
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from conftest import GEMMA, GPT2, QWEN, ROOT, WINDOWS, make_model

from sologpt.tokenizer import Tokenizer


def run_notebook(folder: Path, monkeypatch, **config) -> dict:
    """The names that the notebook's code leaves behind, with a model of this config as MODEL."""
    pytest.importorskip("IPython")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: matplotlib.pyplot.close("all"))
    tokenizer = Tokenizer.from_spec("bytes")
    model = make_model(torch.float32, vocab_size=tokenizer.vocab_size, **{"sequence_len": 48} | config)
    model.save(folder / "model.pt", tokenizer=tokenizer.to_dict())
    cells = json.loads((ROOT / "notebooks" / "inside.ipynb").read_text())["cells"]
    names: dict = {}
    for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        exec(source.replace("MODEL = None  #", f"MODEL = {str(folder / 'model.pt')!r}  #"), names)
    return names


@pytest.mark.parametrize(
    "config", [{}, QWEN, GPT2, WINDOWS, GEMMA], ids=["default", "qwen", "gpt2", "windows", "gemma"]
)
def test_every_architecture_can_be_looked_into(tmp_path, monkeypatch, config):
    """The notebook checks its own attention weights. Losses, and those without a head, are compared here."""
    names = run_notebook(tmp_path, monkeypatch, **config)
    model, idx, D = names["model"], names["idx"], names["D"]
    assert names["T"] == 48
    patterns = names["patterns"]
    assert patterns.shape == (3, 4, 48, 48) and patterns.isfinite().all()
    torch.testing.assert_close(patterns.sum(-1), torch.ones(3, 4, 48))
    if config is WINDOWS:  # layers S, F, N
        assert (
            not patterns[0].tril(-5).any()
            and patterns[0].diagonal(-4, 1, 2).all()
            and patterns[1].tril(-5).any()
        )
    with torch.no_grad():
        losses = F.cross_entropy(model(idx)[0, :-1], idx[0, 1:], reduction="none")
        torch.testing.assert_close(names["losses"], losses)
        torch.testing.assert_close(names["probs"][-1], model(idx)[0].softmax(-1))
        # Without its columns of c_proj, a head is off
        model.h[2].attn.c_proj.weight[:, D : 2 * D] = 0
        losses = F.cross_entropy(model(idx)[0, :-1], idx[0, 1:], reduction="none")
    torch.testing.assert_close(names["without"][2, 1], losses)


def test_characters_that_cannot_be_printed_are_shown(tmp_path, monkeypatch):
    show = run_notebook(tmp_path, monkeypatch)["show"]
    assert [show(i) for i in b" \n\t\ra"] == ["·", "⏎", "\\x09", "\\x0d", "a"]
    assert show(0xE2) == "\N{REPLACEMENT CHARACTER}"

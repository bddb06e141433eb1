"""What is imported when: an extra only when it is asked for, and never the compiler, which takes longest."""

import json

import pytest
from conftest import ROOT, make_model, run

from sologpt.tokenizer import Tokenizer

EXTRAS = {"sologpt.hf", "tokenizers", "jinja2", "safetensors"}


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, set[str]]:
    """The modules that a fresh process has after each of these lines."""
    folder = tmp_path_factory.mktemp("imports")
    tokenizer = Tokenizer.from_spec("bytes").to_dict()
    make_model(vocab_size=257, positions="learned").float().save(folder / "m.pt", tokenizer=tokenizer)
    lines = {
        "optim": "import sologpt.optim",
        "GPT.load": "gpt.GPT.load('m.pt')",
        "load_model": "load.load_model('m.pt')",
        "sample": "import sample; sample.main()",
        "train": "import train; from sologpt import fast, parallel",
    }
    code = f"""
import contextlib, io, json, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["sample.py", "--ckpt", "m.pt", "--max_tokens=3"]
seen = {{}}
for name, line in {lines}.items():
    with contextlib.redirect_stdout(io.StringIO()):
        exec(line)
    seen[name] = [*sys.modules]
    import gpt; from sologpt import load  # for the next lines
print(json.dumps(seen))
"""
    return {name: {*modules} for name, modules in json.loads(run("-c", code, cwd=folder).stdout).items()}


def test_optimizers_need_no_tokenizer(imported):
    assert "torch" in imported["optim"] and not {"tiktoken", "sologpt.tokenizer"} & imported["optim"]


def test_a_checkpoint_loads_without_the_compiler(imported):
    """On the meta device, drawing from a normal distribution imports it."""
    assert "torch._dynamo" not in imported["GPT.load"]


def test_a_checkpoint_loads_without_the_extras(imported):
    assert not (EXTRAS | {"configurator"}) & imported["load_model"]


def test_sampling_needs_no_extra(imported):
    assert "sample" in imported["sample"] and not EXTRAS & imported["sample"]


def test_nothing_imports_the_compiler_before_it_is_asked_for(imported):
    assert "train" in imported["train"] and "torch._dynamo" not in imported["train"]

"""sample.py with a model that has a chat template, and with one straight from its folder."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from test_hf_tokenizer import CHATML, write_folder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import configurator
import sample
from gpt import GPT
from sologpt import errors, gguf, hf
from sologpt.load import load_model
from sologpt.stream import stream_text
from sologpt.tokenizer import Tokenizer

# Drops the start of earlier answers, as Qwen 3's template drops their thoughts
FORGETFUL = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'][3:])"
)


def checkpoint(path: Path, family: str = "smollm2", sequence_len: int = 512, **said) -> Path:
    """A checkpoint of a random model with that family's tokenizer, in float64: no argmax is a near tie."""
    tokenizer = hf.load_tokenizer(write_folder(path.parent / family, family, **said))
    model = make_model(vocab_size=tokenizer.vocab_size, sequence_len=sequence_len)
    model.save(path, tokenizer=tokenizer.to_dict(), step=0)
    return path


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("chatty") / "best.pt", chat_template=CHATML)


@pytest.fixture
def here(monkeypatch, capsys):
    """Run sample.py in this process, with lines on standard input; returns exit status, stdout and stderr."""

    def here(*args, lines: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        waiting = iter(lines)

        def read_line(_: str) -> str:
            for line in waiting:
                return line
            raise EOFError

        monkeypatch.setattr("builtins.input", read_line)
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            errors.run(sample.main)
        return e.value.code, *capsys.readouterr()

    return here


def answer(model: GPT, tokenizer: Tokenizer, messages: list[dict[str, str]], max_tokens: int) -> str:
    """The greedy answer to the whole conversation, without a cache from earlier turns."""
    ids = list(
        model.generate(
            tokenizer.encode_chat(messages), max_tokens, temperature=0, stop_tokens=tokenizer.eos_tokens
        )
    )
    return tokenizer.decode([i for i in ids if i not in tokenizer.eos_tokens])


@pytest.mark.parametrize("template, sequence_len", [(CHATML, 512), (FORGETFUL, 512), (CHATML, 80)])
def test_a_turn_answers_as_without_a_cache_and_prefills_only_what_is_new(
    tmp_path, here, template, sequence_len, monkeypatch
):
    path = checkpoint(tmp_path / "best.pt", sequence_len=sequence_len, chat_template=template)
    model, extra = GPT.load_checkpoint(path)
    tokenizer = Tokenizer.from_dict(extra["tokenizer"])
    system, turns = "Answer in one word. " * 4, ("Hello", "What is 2+2?", "And <|im_end|>3?")
    messages, said, longest = [{"role": "system", "content": system}], "", 0
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        if sequence_len < 512:  # the system message and one turn alone are longer
            messages = [messages[0], messages[-1]]
        longest = len(tokenizer.encode_chat(messages))
        messages.append({"role": "assistant", "content": answer(model, tokenizer, messages, 10)})
        said += messages[-1]["content"] + "\n"

    read = []
    hidden = GPT.hidden
    monkeypatch.setattr(
        GPT, "hidden", lambda self, idx, *rest: read.append(idx.numel()) or hidden(self, idx, *rest)
    )
    flags = ["--interactive", "--chat", f"--system={system}", "--temperature=0", "--max_tokens=10"]
    status, out, err = here(f"--ckpt={path}", *flags, lines=turns)
    assert status == 0 and out == said
    if sequence_len == 512:
        generated = sum(len(tokenizer.encode(message["content"])) for message in messages[2::2])
        assert sum(read) <= longest + 2 * (generated + 30), (
            "an answer is read at most twice: generated, then rendered"
        )
    else:
        assert longest > sequence_len and f"the model reads the last {sequence_len}" in err


def test_a_single_message(chatty, here):
    model, extra = GPT.load_checkpoint(chatty)
    tokenizer = Tokenizer.from_dict(extra["tokenizer"])
    messages = [{"role": "user", "content": "Hi"}]
    flags = [f"--ckpt={chatty}", "--chat", "--prompt=Hi", "--temperature=0", "--max_tokens=20"]
    said = answer(model, tokenizer, messages, 20)
    assert here(*flags)[1] == said + "\n"
    record = json.loads(here(*flags, "--json")[1])
    assert (record["prompt"], record["text"]) == ("Hi", said)
    assert here(*flags, "--num_samples=2")[1] == f"{said}\n---\n{said}\n"
    messages.insert(0, {"role": "system", "content": "Be brief"})
    assert here(*flags, "--system=Be brief")[1] == answer(model, tokenizer, messages, 20) + "\n"


def test_every_end_of_text_token_ends_a_sample(tmp_path, here):
    path = checkpoint(tmp_path / "best.pt")
    model, extra = GPT.load_checkpoint(path)
    first = next(model.generate(Tokenizer.from_dict(extra["tokenizer"]).encode_prompt("a"), 1, temperature=0))
    extra["tokenizer"]["eos_tokens"] = [0, first]
    model.save(path, **extra)
    status, out, err = here(f"--ckpt={path}", "--prompt=a", "--temperature=0")
    assert (status, out) == (0, "a\n") and "1 tokens" in err and "stop" in err


def test_the_space_between_prompt_and_sample_is_kept(tmp_path, here):
    """With SentencePiece a word holds the space before it."""
    path = checkpoint(tmp_path / "best.pt", "metaspace")
    model, extra = GPT.load_checkpoint(path)
    tokenizer = Tokenizer.from_dict(extra["tokenizer"])
    word = next(i for i, text in tokenizer.tokens.items() if text.startswith("▁") and text[1:].isalpha())
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[word] = model.hidden(torch.tensor([tokenizer.encode_prompt("some")]))[0, -1]
    model.save(path, **extra)
    text = tokenizer.decode([*tokenizer.encode_prompt("some"), word])
    assert text.startswith("<s> some ")
    assert (
        "<s> " + here(f"--ckpt={path}", "--prompt=some", "--temperature=0", "--max_tokens=1")[1]
        == text + "\n"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Llama as transformers saves it, with a tokenizer."""
    path = write_folder(tmp_path_factory.mktemp("llama"), "smollm2", chat_template=CHATML)
    torch.manual_seed(0)
    n = hf.load_tokenizer(path).vocab_size
    sizes = dict(
        vocab_size=n, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, initializer_range=0.3
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def test_an_open_model_answers_as_in_transformers(folder, here):
    auto, theirs = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).float().eval(),
    )
    messages = [{"role": "user", "content": "Hello there"}]
    ids = auto.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    out = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.size(1) :].tolist()
    flags = [f"--init_from=hf:{folder}", "--dtype=float32", "--temperature=0", "--max_tokens=20"]
    said = hf.load_tokenizer(folder).decode(i for i in out if i != 2)
    assert here(*flags, "--chat", "--prompt=Hello there")[1] == said + "\n"


OWN = {"temperature": 0.3, "top_k": 9, "top_p": 0.75, "repetition_penalty": 1.25}


def test_a_chat_has_the_settings_of_the_model_and_a_flag_wins(folder, chatty, here, tmp_path):
    """Whatever file they come from: all formats that we write hold them, as transformers and gguf read them."""
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(OWN | {"min_p": None, "eos_token_id": 2}))
    hf.main(["import", str(model), str(tmp_path / "out")])
    hf.main(["export", str(tmp_path / "out"), str(tmp_path / "hf")])
    gguf.main(["export", str(tmp_path / "hf"), str(tmp_path / "a.gguf")])
    theirs = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert OWN.items() <= theirs.to_dict().items() and theirs.do_sample and theirs.eos_token_id == 2
    metadata = gguf.Reader(tmp_path / "a.gguf").metadata
    assert metadata["general.sampling.temp"] == 0.3 and metadata["general.sampling.penalty_repeat"] == 1.25

    messages = [{"role": "user", "content": "Hello there"}]
    flags = ["--chat", "--prompt=Hello there", "--max_tokens=12", "--dtype=float32"]
    cases = [(tmp_path / name, [], OWN) for name in ("model", "out", "hf", "a.gguf")]
    cases += [(tmp_path / "out", ["--top_k=3", "--temperature=2"], OWN | {"top_k": 3, "temperature": 2.0})]
    cases += [(chatty, [], {"temperature": 0.6, "top_p": 0.9})]
    for source, more, settings in cases:
        model, tokenizer, _ = load_model(source, dtype=torch.float32)
        said = "".join(stream_text(model, tokenizer, messages, 12, **settings))
        status, out, err = here(f"--ckpt={source}", *flags, *more)
        assert (status, out) == (0, said + "\n"), source
        shown = "".join(f", {name} {value:g}" for name, value in settings.items())
        assert all(part in err.splitlines()[0] for part in shown.split(",")), err
    assert ", temperature 0.8" in here(f"--ckpt={tmp_path / 'out'}", "--prompt=a", "--max_tokens=1")[2]


@pytest.mark.parametrize("key, value", [("temperature", -1), ("top_p", 3), ("top_k", 1.5), ("min_p", "a")])
def test_settings_that_no_sampling_has_are_refused(folder, here, tmp_path, key, value):
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({key: value}))
    status, _, err = here(f"--ckpt={model}", "--max_tokens=1")
    assert status == 2 and key in err and len(err.splitlines()) == 1
    tokenizer = hf.load_tokenizer(folder).to_dict() | {"sampling": {key: value}}
    make_model(vocab_size=400).save(tmp_path / "best.pt", tokenizer=tokenizer)
    status, _, err = here(f"--ckpt={tmp_path / 'best.pt'}", "--max_tokens=1")
    assert status == 1 and "damaged" in err and len(err.splitlines()) == 1


def test_a_chat_model_that_says_nothing_without_chat_is_pointed_to_it(chatty, tmp_path, here):
    """A head that gives every logit the same: argmax is the first token, which ends a text."""
    model, tokenizer, _ = load_model(chatty)
    model.lm_head.weight.data.zero_()
    for name, template, hints in (("chat", CHATML, 2), ("plain", "", 0)):
        ends = tokenizer.to_dict() | {"eos_tokens": [0], "chat_template": template}
        model.save(tmp_path / f"{name}.pt", tokenizer=ends)
        flags = [f"--ckpt={tmp_path / name}.pt", "--temperature=0", "--max_tokens=5"]
        err = here(*flags, "--prompt=a")[2] + here(*flags, "--interactive", lines=("a",))[2]
        assert err.count("it has a chat template: add --chat") == hints, err
    assert "add --chat" not in here(f"--ckpt={tmp_path / 'chat.pt'}", *flags[1:], "--chat", "--prompt=a")[2]


def test_a_prompt_is_the_first_message_of_an_interactive_chat(chatty, here):
    flags = [f"--ckpt={chatty}", "--interactive", "--chat", "--temperature=0", "--max_tokens=6"]
    typed = here(*flags, lines=("Hello", "And 3?"))[1]
    assert here(*flags, "--prompt=Hello", lines=("And 3?",))[1] == f"> Hello\n{typed}"


@pytest.mark.parametrize(
    "dtype, expected", [("auto", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_dtype(folder, chatty, here, monkeypatch, dtype, expected):
    used, stream_text = [], sample.stream_text
    monkeypatch.setattr(
        sample, "stream_text", lambda m, *args, **kw: used.append(m) or stream_text(m, *args, **kw)
    )
    flags = ["--prompt=a", "--max_tokens=1", f"--dtype={dtype}"]
    assert str(folder) in here(f"--init_from=hf:{folder}", *flags)[2]
    assert here(f"--ckpt={chatty}", *flags)[0] == 0
    expected = [expected, "float64" if dtype == "auto" else dtype]
    assert [model.dtype for model in used] == [getattr(torch, name) for name in expected]


def test_errors_are_one_line(chatty, folder, tmp_path, here):
    refuses = checkpoint(tmp_path / "refuses.pt", chat_template="{{ raise_exception('no system message') }}")
    plain = tmp_path / "plain.pt"
    make_model(vocab_size=257).save(plain, tokenizer=Tokenizer.from_spec("bytes").to_dict())
    (tmp_path / "empty").mkdir()
    good = f"--ckpt={chatty}"
    for flags, words in (
        ([f"--ckpt={plain}", "--chat"], "bytes has no chat template"),
        ([f"--ckpt={plain}", "--chat", "--interactive"], "bytes has no chat template"),
        ([f"--ckpt={refuses}", "--chat"], "no system message"),
        ([f"--ckpt={refuses}", "--chat", "--interactive"], "no system message"),
        ([good, "--system=x"], "--chat"),
        ([good, f"--init_from=hf:{folder}"], "--ckpt and --init_from"),
        (["--init_from=gpt3"], "give a checkpoint, a run's folder, hf:NAME or gguf:FILE"),
        ([good, "--dtype=int8"], "int8"),
        ([f"--init_from=hf:{tmp_path / 'empty'}"], "config.json"),
        ([f"--init_from=hf:{tmp_path / 'none'}"], f"there is no folder {tmp_path / 'none'}"),
        ([good, "--temperature=abc"], "temperature must be a number"),
    ):
        status, _, err = here(*flags)
        lines = err.splitlines()
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], err


def test_the_help_has_a_line_for_each_key_in_groups():
    keys = configurator.keys(sample.Config).values()
    assert list(dict.fromkeys(key.group for key in keys)) == ["prompt", "sampling", "output", "model"]
    for key in keys:
        assert re.fullmatch(r"[a-z].*[^.]", key.comment), key

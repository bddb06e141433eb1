"""A conversation that outgrows the model's window, or the cache that it began with."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_model
from test_chat import answer, checkpoint, here  # noqa: F401
from test_hf_tokenizer import CHATML

from gpt import GPT, KVCache
from sologpt import chat, tokenizer
from sologpt.stream import drop_old_turns
from sologpt.tokenizer import PretrainedTokenizer, Tokenizer


class Words(Tokenizer):
    """A chat template that makes a token of each word, and one of each message."""

    def __init__(self):
        pass

    def encode_chat(self, messages, window=None):
        return [1 for message in messages for _ in (message["role"], *message["content"].split())]


def dialogue(*sizes: int, system: int = 0) -> list[dict[str, str]]:
    """Turns of `sizes` words, question and answer alike, and a last question without an answer."""
    messages = [{"role": "system", "content": "s " * (system - 1)}] if system else []
    for i, size in enumerate(sizes):
        messages.append({"role": "user", "content": f"{i} " * (size - 1)})
        messages.append({"role": "assistant", "content": f"{i} " * (size - 1)})
    return messages[:-1]


@pytest.mark.parametrize(
    "sizes, system, max_tokens, first",
    [
        ((10, 10, 10), 0, 20, 0),  # 50 tokens, and 20 fit into 100
        ((10, 10, 10), 0, 50, 0),  # just
        ((10, 10, 11), 0, 50, 1),  # one too many: 51 and 50
        ((10, 10, 11), 10, 30, 0),
        (
            (10, 10, 10, 10, 10),
            5,
            20,
            3,
        ),  # 95: cut to at most 50, where 4 turns would take 75 and 3 of them 55
        ((10, 10, 10), 0, 10_000, 0),  # an answer without bound has half the window
        ((10, 10, 90), 20, 20, 2),  # the last turn stays, whatever its size
        ((200,), 20, 20, 0),
    ],
)
def test_the_oldest_turns_are_dropped_whole(sizes, system, max_tokens, first):
    messages = dialogue(*sizes, system=system)
    kept, tokens = drop_old_turns(Words(), messages, 100, max_tokens)
    assert tokens == Words().encode_chat(kept)
    begins = bool(system)
    assert kept == messages[:begins] + messages[begins + 2 * first :]


def test_a_long_chat_keeps_its_system_message_and_says_once_what_it_drops(tmp_path, here):  # noqa: F811
    """The oracle answers each turn by itself, from the turns that are left: found by trying all."""
    path, window = checkpoint(tmp_path / "best.pt", sequence_len=160, chat_template=CHATML), 160
    model, extra = GPT.load_checkpoint(path)
    tokenizer = Tokenizer.from_dict(extra["tokenizer"])
    system = {"role": "system", "content": "Be brief"}
    turns, history, said, dropped = [f"What is {i} and {i}?" for i in range(12)], [], "", 0
    for turn in turns:
        history.append({"role": "user", "content": turn})
        if len(tokenizer.encode_chat([system, *history])) + 8 > window:
            fitting = [
                n
                for n in range(0, len(history), 2)
                if len(tokenizer.encode_chat([system, *history[n:]])) <= 80
            ]
            history, dropped = history[fitting[0] :], dropped + 1
        history.append({"role": "assistant", "content": answer(model, tokenizer, [system, *history], 8)})
        said += history[-1]["content"] + "\n"
    assert dropped > 1
    flags = ["--interactive", "--chat", "--system=Be brief", "--temperature=0", "--max_tokens=8"]
    status, out, err = here(f"--ckpt={path}", *flags, lines=turns)
    assert status == 0 and out == said
    assert err.count("no longer sees the oldest turns") == 1 and "reads the last" not in err


def test_the_cache_of_a_conversation_starts_small_and_grows(monkeypatch, trained, here):  # noqa: F811
    sizes = []
    monkeypatch.setattr(chat, "KVCache", lambda *a: sizes.append(a[2]) or KVCache(*a))
    model, extra = GPT.load_checkpoint(trained / "best.pt")
    model.config.sequence_len = 100_000
    model.save(trained.parent / "long.pt", **extra)
    lines = ["a" * 900, "b" * 300, "c" * 5000]
    status, _, err = here(
        f"--ckpt={trained.parent / 'long.pt'}", "--interactive", "--max_tokens=4", lines=lines
    )
    assert status == 0 and err.count("tokens/s") == 3
    assert sizes == [1024, 2048, 900 + 300 + 5000 + 4 * 3]


def test_a_larger_cache_holds_the_same():
    model = make_model(torch.float64, sequence_len=64)
    cache = KVCache(model.config, 1, 8, dtype=model.dtype)
    first = list(model.generate([1, 2, 3], 5, temperature=0, kv_cache=cache))
    assert chat.with_room(cache, model.config, 8) is cache
    larger = chat.with_room(cache, model.config, 9)
    assert (larger.max_len, larger.tokens()) == (16, cache.tokens())
    assert chat.with_room(cache, replace(model.config, sequence_len=12), 99).max_len == 12
    out = list(model.generate([4], 7, temperature=0, kv_cache=larger))
    assert out == list(model.generate([1, 2, 3, *first, 4], 7, temperature=0))


def test_the_commands_of_a_chat(tmp_path, here):  # noqa: F811
    """What each command leaves is what `answer` says to the messages that are left."""
    path = checkpoint(tmp_path / "best.pt", chat_template=CHATML)
    model, extra = GPT.load_checkpoint(path)
    tokenizer = Tokenizer.from_dict(extra["tokenizer"])

    def ask(history, text):
        history.append({"role": "user", "content": text})
        history.append({"role": "assistant", "content": answer(model, tokenizer, history, 8)})
        return history[-1]["content"] + "\n"

    one, two, three = (
        [],
        [{"role": "system", "content": "Be brief"}],
        [{"role": "system", "content": "Be brief"}],
    )
    expected = ask(one, "some") + ask(one, " /words") + ask(two, "some") + ask(three, "words")
    lines = [
        "/help",
        "some",
        "",
        "  ",
        " /words",
        f"/save {tmp_path / 'one.json'}",
        "/system Be brief",
        "some",
    ]
    lines += [
        "/nonsense",
        "/reset",
        "words",
        "/save /nowhere/at/all",
        "/save",
        "/system",
        "/quit",
        "never read",
    ]
    flags = [f"--ckpt={path}", "--interactive", "--chat", "--temperature=0", "--max_tokens=8"]
    status, out, err = here(*flags, lines=lines)
    assert status == 0 and out == expected
    assert json.loads((tmp_path / "one.json").read_text()) == one
    for words in (
        "forget it",
        "no command /nonsense",
        "cannot write /nowhere",
        "/save needs",
        "/system needs",
    ):
        assert words in err


def test_a_chat_is_tokenized_once_a_turn(tmp_path, here, monkeypatch):  # noqa: F811
    path, calls = checkpoint(tmp_path / "best.pt", chat_template=CHATML), []
    encode_chat, render = PretrainedTokenizer.encode_chat, tokenizer.render
    monkeypatch.setattr(
        PretrainedTokenizer, "encode_chat", lambda *a: calls.append("encode") or encode_chat(*a)
    )
    monkeypatch.setattr(tokenizer, "render", lambda *a: calls.append("render") or render(*a))
    flags = [f"--ckpt={path}", "--interactive", "--chat", "--max_tokens=4"]
    assert here(*flags)[0] == 0
    start = calls.copy()  # the template is checked
    assert here(*flags, lines=["some", "words"])[0] == 0
    assert calls == 2 * start + 2 * ["encode", "render"]


def test_a_saved_chat_has_the_turns_that_the_model_no_longer_sees(tmp_path, here):  # noqa: F811
    path = checkpoint(tmp_path / "best.pt", sequence_len=120, chat_template=CHATML)
    turns = [f"What is {i} and {i}?" for i in range(12)]
    flags = [f"--ckpt={path}", "--interactive", "--chat", "--system=Be brief", "--max_tokens=8"]
    err = here(*flags, lines=[*turns, f"/save {tmp_path / 'chat.json'}"])[2]
    messages = json.loads((tmp_path / "chat.json").read_text())
    assert "no longer sees the oldest turns" in err and messages[0] == {
        "role": "system",
        "content": "Be brief",
    }
    assert [message["content"] for message in messages if message["role"] == "user"] == turns
    assert [message["role"] for message in messages[1:]] == ["user", "assistant"] * len(turns)


def test_a_system_message_that_the_template_rejects_changes_nothing(tmp_path, here):  # noqa: F811
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        + CHATML
    )
    path = checkpoint(tmp_path / "best.pt", chat_template=template)
    flags = [f"--ckpt={path}", "--interactive", "--chat", "--temperature=0", "--max_tokens=8"]
    status, out, err = here(*flags, lines=["some", "/system Be brief", "words"])
    assert (status, out) == here(*flags, lines=["some", "words"])[:2] and status == 0
    assert "error: the chat template rejects this conversation: no system message" in err
    assert here(*flags, "--system=Be brief", lines=["some"])[0] == 2


@pytest.mark.parametrize("text", ["// a comment", "/* a comment */", "/usr/bin", "/"])
def test_a_path_or_a_comment_is_no_command(trained, tmp_path, here, text):  # noqa: F811
    flags = [f"--out_dir={trained}", "--interactive", "--max_tokens=4"]
    status, out, err = here(*flags, lines=[text, f"/save {tmp_path / 'text'}"])
    assert status == 0 and "no command" not in err
    assert (tmp_path / "text").read_text() == f"{text}{out}"

"""sologpt/stream.py: stop sequences, whole characters, rows of a batch, and streams against GPT.generate."""

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_tokenizer import CHATML, write_folder

import sologpt.text
from gpt import KVCache
from sologpt import hf
from sologpt.stream import TextRow, reuse_prefix, stream_rows, stream_text
from sologpt.tokenizer import Tokenizer

BYTES = Tokenizer.from_spec("bytes")


def feed(text: str | bytes, **options) -> tuple[list[str], TextRow]:
    """Push the bytes of text into a row; returns the pieces that come out, and the row."""
    row, pieces = TextRow(BYTES, **options), []
    for token in text.encode() if isinstance(text, str) else text:
        pieces.append(row.push(token))
        if row.reason:
            return pieces, row
    return [*pieces, row.end("length")], row


# ---- TextRow


def test_a_stop_sequence_ends_a_row_and_is_not_in_its_text():
    pieces, row = feed("def f():\n    pass\n\n\nrest", stop="\n\n\n")
    assert "".join(pieces) == row.text == "def f():\n    pass" and row.reason == "stop"


def test_the_beginning_of_a_stop_sequence_is_held_back_until_it_is_certain():
    pieces, _ = feed("ab<end", stop=("<end>", "zz"))
    assert pieces == ["a", "b", "", "", "", "", "<end"]
    pieces, _ = feed("<<end>", stop=("<end>",))
    assert pieces[:3] == ["", "<", ""] and "".join(pieces) == "<"


def test_the_earliest_of_several_stop_sequences_counts():
    _, row = feed("one two three", stop=["three", "two"])
    assert row.text == "one "


def test_an_end_of_text_token_ends_a_row():
    row = TextRow(BYTES, stop="b!")
    assert [row.push(ord("a")), row.push(ord("b")), row.push(BYTES.eot)] == ["a", "", "b"]
    assert row.reason == "stop" and row.tokens == [ord("a"), ord("b"), BYTES.eot]
    assert row.end("length") == "" and row.reason == "stop"


def test_half_a_character_never_comes_out():
    pieces, row = feed("aé€😀", stop=("é!",))
    assert pieces == ["a", "", "", "", "", "é€", "", "", "", "😀", ""]
    assert "\ufffd" not in "".join(pieces)
    pieces, row = feed("a😀".encode()[:3])
    assert "".join(pieces) == row.text == "a\ufffd"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab<>é", max_size=30), stops=st.lists(st.text("ab<>é", min_size=1, max_size=4), max_size=3)
)
def test_a_row_is_the_text_before_the_first_complete_stop_sequence(text, stops):
    pieces, row = feed(text, stop=stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        end = min(ends)
        expected = text[: min(text.find(stop) for stop in stops if stop in text[:end])]
        assert row.reason == "stop"
    else:
        expected = text
        assert row.reason == "length"
    assert "".join(pieces) == row.text == expected


def test_a_stop_sequence_in_the_flushed_bytes_ends_a_row(tmp_path):
    """SentencePiece holds a run of byte tokens back until it ends: a newline at the end is flushed."""
    tokenizer = hf.load_tokenizer(write_folder(tmp_path, "metaspace"))
    newline, a = (tokenizer.backend.token_to_id(text) for text in ("<0x0A>", "a"))
    for stop, tokens, text in (
        ("\n", [a, newline], "a"),
        ("\n\n", [a, newline], "a\n"),
        ("a\n", [a, newline, a], ""),
    ):
        for reason in ("length", "interrupt"):
            row = TextRow(tokenizer, stop)
            pieces = [*map(row.push, tokens), row.end(reason)]
            assert "".join(pieces) == row.text == text
            assert row.reason == (reason if stop == "\n\n" else "stop")


def test_stop_on_repeat():
    _, row = feed("xyabcabcabc", stop_on_repeat=3)
    assert row.text == "xyabcabc" and row.reason == "repeat"
    _, row = feed("aabbab", stop_on_repeat=1)
    assert row.text == "aa" and row.reason == "repeat"
    _, row = feed("abcabd", stop_on_repeat=3)
    assert row.reason == "length"


SCRIPTS = "Hello Ελληνικά русский العربية עברית हिन्दी ไทย 中文 日本語 한국어 ქართული 👩‍👩‍👧‍👦🏳️‍🌈"


@pytest.mark.parametrize(
    "tokenizer", [BYTES, Tokenizer.from_spec("bpe:350", [SCRIPTS * 5])], ids=["bytes", "bpe"]
)
def test_text_in_ten_scripts_survives_streaming(tokenizer):
    row = TextRow(tokenizer, stop="\u0ba4")  # its first byte begins other characters too
    pieces = [*map(row.push, tokenizer.encode(SCRIPTS)), row.end("length")]
    assert "".join(pieces) == SCRIPTS


# ---- Rows of a batch


def test_rows_end_on_their_own_and_the_batch_with_the_last():
    taken = []

    def steps():
        for column in zip(b"ab!d", b"abc!", strict=True):
            taken.append(column)
            yield list(column)
        raise AssertionError("both rows have ended")

    rows = [TextRow(BYTES, "!") for _ in range(2)]
    assert [*stream_rows(steps(), rows)] == [["a", "a"], ["b", "b"], ["", "c"], ["", ""]]
    assert [row.text for row in rows] == ["ab", "abc"] and len(taken) == 4


@pytest.fixture(scope="module")
def model():
    return make_model(vocab_size=300, sequence_len=64)  # ids from 257 on stand for no token


def expected(model, tokens: list[int], max_tokens: int, **settings) -> str:
    """The text by GPT.generate and Tokenizer.decode."""
    ids = model.generate(
        tokens, max_tokens, stop_tokens=[BYTES.eot], suppress_tokens=range(257, 300), **settings
    )
    return BYTES.decode(i for i in ids if i != BYTES.eot)


def test_prompts_of_a_batch_get_the_texts_that_they_get_alone(model):
    prompts = [list(b"def "), list(b"x"), list(b"import os")]
    ends = dict(stop_tokens=BYTES.eos_tokens, suppress_tokens=BYTES.gaps(300))
    steps = model.generate_batch(prompts, 20, temperature=0, **ends)
    rows = [TextRow(BYTES) for _ in prompts]
    pieces = [*stream_rows(steps, rows)]
    for b, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        assert row.text == "".join(texts[b] for texts in pieces) == expected(model, prompt, 20, temperature=0)


# ---- stream_text


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 2.0, "seed": 3, "top_k": 200}])
def test_a_stream_is_the_text_of_generate(model, settings):
    text = expected(model, list(b"def "), 50, **settings)
    for prompt in ("def ", list(b"def ")):
        stream = stream_text(model, BYTES, prompt, 50, **settings)
        assert "".join(stream) == stream.text == text and stream.reason in ("length", "stop")
        assert BYTES.decode(i for i in stream.tokens if i != BYTES.eot) == text and stream.seconds > 0
        assert stream.prompt_tokens == list(b"def ")
    stop = text[10:12]
    stream = stream_text(model, BYTES, "def ", 50, stop=stop, **settings)
    assert "".join(stream) == text[: text.index(stop)] and stream.reason == "stop"


def test_num_samples_are_rows_of_one_batch(model):
    stream = stream_text(model, BYTES, "def ", 20, num_samples=3, temperature=2.0)
    assert "".join(stream) == stream.rows[0].text == stream.text
    assert len({row.text for row in stream.rows}) == 3
    assert all(len(row.tokens) == 20 for row in stream.rows if row.reason == "length")


def test_leaving_the_loop_closes_the_stream(model):
    model.train()
    stream = stream_text(model, BYTES, "def ", 1000, num_samples=2, temperature=0)
    for n, _ in enumerate(stream):
        assert model.training  # in eval mode only while a step is computed
        if n == 4:
            break
    assert model.training and len(stream.tokens) == 5
    assert [row.reason for row in stream.rows] == ["interrupt"] * 2
    assert list(stream) == []
    model.eval()


def test_close_returns_the_text_that_was_held_back(model):
    text = expected(model, list(b"def "), 20, temperature=0)
    stream = stream_text(model, BYTES, "def ", 20, stop=text[:8] + "!", temperature=0)
    pieces = [next(stream) for _ in range(5)]
    assert stream.reason == "" and "".join(pieces) == ""
    held = stream.close()
    assert held == stream.text == BYTES.decode(stream.tokens) and held and stream.reason == "interrupt"
    assert next(stream, None) is None and stream.close() == ""


def test_arguments_are_checked_at_the_call(model):
    for prompt, options, words in (
        ("", {}, "empty"),
        ("x", {"temperature": -1}, "temperature"),
        ("x", {"max_tokens": -1}, "max_tokens"),
        ("x", {"num_samples": 0}, "num_samples"),
        ("x", {"stop": ["a", ""]}, "stop"),
        ("x", {"stop_on_repeat": -1}, "stop_on_repeat"),
        ([300], {}, "300"),
        ([{"role": "user", "content": "Hi"}], {}, "no chat template"),
    ):
        with pytest.raises(ValueError, match=words):
            stream_text(model, BYTES, prompt, **options)
    with pytest.raises(TypeError, match="temprature"):
        stream_text(model, BYTES, "x", temprature=1)


# ---- With a cache


def test_text_after_a_cache_continues_it(model):
    """Turns of plain text are one text: prompt, sample, prompt, sample."""
    cache, text = KVCache(model.config, 1, 64, dtype=model.dtype), b""
    for prompt in ("ab", "cd"):
        stream = stream_text(model, BYTES, prompt, 10, temperature=0, kv_cache=cache)
        said = "".join(stream)
        text += prompt.encode()
        assert said == expected(model, list(text), 10, temperature=0)
        text += bytes(stream.tokens)
        assert cache.tokens() == [list(text)]


def test_a_conversation_with_a_cache_is_the_one_without(tmp_path):
    tokenizer = hf.load_tokenizer(write_folder(tmp_path / "smollm2", "smollm2", chat_template=CHATML))
    model = make_model(vocab_size=tokenizer.vocab_size, sequence_len=256)
    cache, messages = KVCache(model.config, 1, 256, dtype=model.dtype), []
    for turn in ("Hello", "What is 2+2?", "And <|im_end|>3?"):
        messages.append({"role": "user", "content": turn})
        alone = stream_text(model, tokenizer, messages, 10, temperature=0)
        stream = stream_text(model, tokenizer, messages, 10, temperature=0, kv_cache=cache)
        held = int(cache.lengths)
        assert "".join(stream) == "".join(alone) == stream.text and stream.tokens == alone.tokens
        assert stream.prompt_tokens == alone.prompt_tokens == tokenizer.encode_chat(messages)
        assert len(messages) == 1 or held >= len(tokenizer.encode_chat(messages[:-2])), (
            "the earlier turns are kept"
        )
        messages.append({"role": "assistant", "content": stream.text})


def test_reuse_prefix():
    model = make_model()
    for held, tokens, rest in (
        ([1, 2, 3], [1, 2, 3, 4], [4]),
        ([1, 2, 3], [1, 2, 4, 5], [4, 5]),
        ([1, 2, 3], [1, 2, 3], [3]),
        ([1, 2, 3], [1, 2], [2]),
        ([], [1, 2], [1, 2]),
    ):
        cache = KVCache(model.config, 1, 8, dtype=model.dtype)
        if held:
            model(torch.tensor([held]), kv_cache=cache)
        assert reuse_prefix(cache, tokens) == rest
        assert [*cache.tokens()[0], *rest] == tokens


def test_programs_import_it_from_text():
    assert sologpt.text.stream_text is stream_text

import json
import random

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from sologpt.errors import RunError
from sologpt.tokenizer import EOT, Tokenizer

TORTURE = (
    "Hello, world! It's 12345.67 — naïve café\r\n\ttabs  and   runs\n\n\n"
    "Ελληνικά русский العربية עברית हिन्दी ไทย 中文字 日本語かな 한국어 ქართული\n"
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \x00\x07\x7f \u200b\ufeff <|endoftext|> def f(x): return x**2"
)


@pytest.fixture(scope="module", params=["bytes", "bpe:400"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.from_spec(
        request.param, [TORTURE * 3, "the quick brown fox jumps over the lazy dog " * 20]
    )


def test_decode_inverts_encode(tokenizer):
    ids = tokenizer.encode(TORTURE)
    assert tokenizer.decode(ids) == TORTURE
    assert all(0 <= i < tokenizer.eot for i in ids), "text never becomes a special token"
    assert tokenizer.decode([tokenizer.eot]) == EOT
    assert tokenizer.encode("") == []


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_decode_inverts_encode_of_any_text(text):
    tokenizer = Tokenizer.from_spec("bytes")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == list(text.encode())


def test_the_dict_survives_json(tokenizer):
    d = json.loads(json.dumps(tokenizer.to_dict()))
    again = Tokenizer.from_dict(d)
    assert (again.name, again.vocab_size, again.eot) == (tokenizer.name, tokenizer.vocab_size, tokenizer.eot)
    assert again.encode(TORTURE) == tokenizer.encode(TORTURE) and again.to_dict() == d


def test_the_dict_has_a_chat_template_only_if_there_is_one(tokenizer):
    chatty = tokenizer.with_chat_template()
    d = json.loads(json.dumps(chatty.to_dict()))
    assert "chat_template" not in tokenizer.to_dict() and not tokenizer.chat_template
    again = Tokenizer.from_dict(d)
    assert again.to_dict() == d and again.has_ids_of(tokenizer) and tokenizer.has_ids_of(again)
    messages = [{"role": "user", "content": f"a{EOT}"}]
    expected = [*again.encode(f"user\na{EOT}"), again.eot, *again.encode("assistant\n")]
    assert again.encode_chat(messages) == chatty.encode_chat(messages) == expected
    assert not tokenizer.has_ids_of(Tokenizer.from_spec("bpe:300", ["abc " * 99]))


def test_vocab_size_and_eot():
    tokenizer = Tokenizer.from_spec("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
    tokenizer = Tokenizer.from_spec("bpe:300", ["ab cd ef gh " * 30 + TORTURE])
    assert (tokenizer.vocab_size, tokenizer.eot) == (300, 299)


def test_it_shows_its_kind_its_size_and_what_ends_a_text():
    assert (
        repr(Tokenizer.from_spec("bytes"))
        == f"Tokenizer('bytes', vocab_size=257, eos_tokens={{256: {EOT!r}}})"
    )


def test_bpe_makes_text_shorter():
    text = "the quick brown fox jumps over the lazy dog " * 20
    tokenizer = Tokenizer.from_spec("bpe:320", [text])
    assert len(tokenizer.encode(text)) < len(text) / 3


def test_the_dict_keeps_unused_ids_and_all_special_tokens():
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 257, b"abc": 259}
    special = {EOT: 258, "<|fim|>": 262}
    encoding = tiktoken.Encoding("gappy", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens=special)
    again = Tokenizer.from_dict(json.loads(json.dumps(Tokenizer(encoding).to_dict())))
    assert again.vocab_size == 263 and again.eot == 258
    assert again.encode("abcab!") == encoding.encode_ordinary("abcab!") == [259, 257, 33]
    assert again.gaps(265) == [256, 260, 261, 263, 264]
    with pytest.raises(ValueError, match="261"):
        again.decode([261])


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [*map(decoder.decode, ids), decoder.flush()]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=30))
def test_streamed_parts_of_any_bytes_join_to_the_decoded_text(ids):
    tokenizer = Tokenizer.from_spec("bytes")
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_streaming_text_never_shows_half_a_character(tokenizer):
    parts = stream(tokenizer, tokenizer.encode(TORTURE))
    assert "".join(parts) == TORTURE and "\ufffd" not in "".join(parts)


def test_invalid_bytes_are_replaced_once_and_the_end_is_flushed():
    tokenizer = Tokenizer.from_spec("bytes")
    assert stream(tokenizer, [0x61, 0xFF, 0x62]) == ["a", "\ufffd", "b", ""]
    assert stream(tokenizer, list("é".encode())[:1]) == ["", "\ufffd"]


def test_bad_specs_are_errors():
    for bad in ("bpe:100", "bpe:x", "bpe:", "bpe:5000000000", "word", ""):
        with pytest.raises(ValueError, match="tokenizer"):
            Tokenizer.from_spec(bad)


def test_bad_dicts_are_errors():
    good = Tokenizer.from_spec("bytes").to_dict()
    for bad in (
        {},
        {"kind": "else"},
        good | {"tokens": None},
        good | {"tokens": good["tokens"] * 2},
        good | {"special_tokens": {EOT: 5}},
        good | {"special_tokens": {EOT: -1}},
        good | {"special_tokens": {EOT: 10**30}},
        good | {"special_tokens": {EOT: 2**32}},
        good | {"special_tokens": {EOT: True}},
        good | {"tokens": good["tokens"][:255]},
        good | {"tokens": [*good["tokens"][:97], None, *good["tokens"][98:]]},
        good | {"pattern": "("},
        [],
    ):
        with pytest.raises(ValueError, match="not the dict of a tokenizer"):
            Tokenizer.from_dict(bad)


@pytest.mark.parametrize("pattern, text", [("", "abc"), ("a*", "abc"), (r"(?:(?=a)a|a)*b|[\s\S]", "a" * 40)])
def test_a_pattern_that_matches_nothing_or_backtracks_for_ever_is_a_value_error(pattern, text):
    tokenizer = Tokenizer.from_dict(Tokenizer.from_spec("bytes").to_dict() | {"pattern": pattern})
    with pytest.raises(ValueError, match="bytes cannot encode this text"):
        tokenizer.encode(text)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
def test_a_million_whitespace_characters_are_encoded(space):
    tokenizer = Tokenizer.from_spec("bpe:300", [TORTURE + " " * 100])
    for n in (399_999, 1_000_000, 1_700_000):
        for text in (space * n, f"ab {space * n}c "):
            ids = tokenizer.encode(text)
            assert tokenizer.encoding.decode(ids) == text
            assert n > 400_000 or ids == tokenizer.encoding.encode_ordinary(text)


def test_a_long_text_that_ends_in_little_whitespace_is_encoded_whole():
    """Its last line break, the first after 400,000 characters, belongs to the token before it."""
    tokenizer = Tokenizer.from_spec("bpe:300", ["end.\n" * 100])
    text = "x" * 399_996 + "end.\n"
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


def test_bad_ids_are_errors():
    tokenizer = Tokenizer.from_spec("bytes")
    for bad in (257, -1, 2**40):
        with pytest.raises(ValueError, match=str(bad)):
            tokenizer.decode([bad])


def test_a_failed_download_suggests_other_tokenizers(monkeypatch):
    def refuse(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(RunError, match=r"gpt2.*cannot be downloaded.*bytes"):
        Tokenizer.from_spec("gpt2")


def test_training_is_deterministic():
    rng = random.Random(0)
    documents = ["".join(rng.choices("abc de", k=500)) for _ in range(20)]
    dicts = [Tokenizer.from_spec("bpe:300", documents).to_dict() for _ in range(2)]
    assert dicts[0] == dicts[1]

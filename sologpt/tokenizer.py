"""Text to token ids and back.

    tokenizer = Tokenizer.from_spec("bytes")  # or "bpe:4096", trained on documents, or tiktoken's "gpt2"
    tokenizer.decode(tokenizer.encode("Hello"))

A Tokenizer wraps a `tiktoken.Encoding`. A PretrainedTokenizer wraps a Hugging Face model's tokenizer.json,
special tokens and chat template. Both convert to a dict of JSON types that holds the whole vocabulary. Every
checkpoint holds this dict, so sampling needs neither the dataset nor a network.
"""

import base64
import codecs
import copy
import json
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Self

import tiktoken

from sologpt.chat_template import CLOSE, CUT, LENGTH, OPEN, OWN, PLAIN, Cut, Messages, SpecialTokens, render
from sologpt.errors import RunError, UserError

EOT = "<|endoftext|>"  # separates documents

# Pre-tokenization, as in Qwen2: llama.cpp knows it (see sologpt/gguf.py). Merges stay within these pieces:
# an English contraction, a word with the space or sign before it, a digit, punctuation with the line breaks
# after it, line breaks with the whitespace before them, whitespace without the last space before a word.
BPE_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TYPES: dict[str, type] = {"tokens": list, "eos_tokens": list}  # of to_dict
TYPES |= {"special_tokens": dict, "sampling": dict}
TYPES |= dict.fromkeys(("kind", "name", "pattern", "tokenizer_json", "chat_template"), str)
MAX_CHARACTERS = 128  # of a token, about: a longer text than all of a window's tokens is not encoded
MAX_GROWTH = 64  # of a text in a tokenizer.json; U+FDFA becomes 18 characters
MAX_SPACE = 400_000  # tiktoken's regular expressions overflow their stack at a million whitespace characters
BYTES = [bytes([i]) for i in range(256)]


@contextmanager
def refused(what: str, quiet: bool = False) -> Iterator[None]:
    """Raise UserError for what Rust libraries raise: an Exception, or a PanicException (a BaseException).

    A panic also prints lines of Rust to stderr, before it can be caught. quiet: not here, and so no thread
    may print meanwhile.
    """
    try:
        with no_stderr() if quiet else nullcontext():
            yield
    except BaseException as e:
        if type(e) is not Exception and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {e}") from e


@contextmanager
def no_stderr() -> Iterator[None]:
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as f:
            os.dup2(f.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class Tokenizer:
    """Text to token ids and back, by a `tiktoken.Encoding`.

    `ids` are the ids in the vocabulary, `eot` is the id that separates documents, `eos_tokens` end a text.
    chat_template is Jinja, or empty. sampling are the fields of `gpt.Sampling` with which the model answers.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        eos_tokens: Sequence[int] = (),
        chat_template: str = "",
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.encoding = encoding
        self.name = encoding.name
        self.ids = {*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()}
        self.eot = encoding.eot_token
        ends = dict.fromkeys([self.eot, *eos_tokens])  # each once, in this order
        self.eos_tokens = [i for i in ends if type(i) is int and i in self.ids]
        self.special_tokens = {"bos_token": EOT, "eos_token": EOT}  # by the names that templates use
        self.chat_template = chat_template
        self.sampling = dict(sampling or {})

    @classmethod
    def from_spec(cls, spec: str, documents: Iterable[str] = ()) -> "Tokenizer":
        """Return 'bytes', 'bpe:N' (N ids, trained on documents), or a tiktoken encoding such as 'gpt2'.

        UserError for an unknown spec, RunError if a download fails, ImportError if training needs an extra.
        """
        if spec == "bytes":
            return cls._from_tokens("bytes", r"[\s\S]{1,32}", BYTES)
        if spec.startswith("bpe:"):
            size = spec.removeprefix("bpe:")
            if not size.isdecimal() or len(size) > 7 or int(size) < 257:
                sizes = f"from 257 (256 bytes and {EOT}) to 9999999"
                raise UserError(f"tokenizer {spec!r}: N in bpe:N is the vocabulary size, {sizes}")
            return cls._from_tokens(spec, BPE_PATTERN, train_bpe(documents, int(size) - 1))
        if spec not in tiktoken.list_encoding_names():
            known = ", ".join(("bytes", "stdlib", "bpe:N", "hf:NAME", *tiktoken.list_encoding_names()))
            raise UserError(f"unknown tokenizer {spec!r}: choose one of {known}")
        try:
            return cls(tiktoken.get_encoding(spec))
        except OSError as e:  # the base class of requests' errors
            hint = "'bytes' and 'bpe:N' need no network"
            raise RunError(f"tokenizer {spec!r} cannot be downloaded; {hint}") from e

    @classmethod
    def from_merges(cls, name: str, merges: str) -> "Tokenizer":
        """Return the byte-level BPE of a merges.txt like GPT-2's: a header, then two tokens per line."""
        merged = [line.replace(" ", "") for line in merges.splitlines()[1:]]
        tokens = [bytes(BYTE_LEVEL[character] for character in text) for text in merged]
        return cls._from_tokens(name, BPE_PATTERN, BYTES + tokens)

    @classmethod
    def _from_tokens(cls, name: str, pattern: str, tokens: list[bytes]) -> "Tokenizer":
        ranks = {token: rank for rank, token in enumerate(tokens)}
        special = {EOT: len(tokens)}
        return cls(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))

    def to_dict(self) -> dict[str, Any]:
        """Return the tokenizer as JSON types, for `from_dict`. "tokens" are base64 by id, or None."""
        encoding = self.encoding
        tokens: list[str | None] = [None] * (max(encoding._mergeable_ranks.values()) + 1)
        for token, rank in encoding._mergeable_ranks.items():
            tokens[rank] = base64.b64encode(token).decode("ascii")
        d: dict[str, Any] = {
            "kind": "tiktoken",
            "name": encoding.name,
            "pattern": encoding._pat_str,
            "tokens": tokens,
            "special_tokens": dict(encoding._special_tokens),
        }
        if self.chat_template:
            d |= {"eos_tokens": self.eos_tokens, "chat_template": self.chat_template}
        if self.sampling:
            d["sampling"] = self.sampling
        return d

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "Tokenizer":
        """Return the tokenizer of a dict from `to_dict`. UserError for any other dict."""
        try:
            if not isinstance(d, dict) or any(type(d[key]) is not TYPES[key] for key in d):
                raise TypeError("not the types of to_dict")
            if not {*map(type, d["special_tokens"].values())} <= {int, str}:
                raise TypeError("a special token is neither an id nor a text")
            if d["kind"] == "tokenizers":
                return PretrainedTokenizer(**{key: value for key, value in d.items() if key != "kind"})
            if d["kind"] != "tiktoken":
                raise ValueError(d["kind"])
            tokens = [(i, token) for i, token in enumerate(d["tokens"]) if token is not None]
            special = d["special_tokens"]
            ranks = {base64.b64decode(token): i for i, token in tokens}
            if len({*ranks.values(), *special.values()}) < len(special) + len(tokens):
                raise ValueError("an id or a token occurs twice")
            if not ranks.keys() >= {*BYTES}:
                raise ValueError("a byte has no token")
            options = dict(pat_str=d["pattern"], mergeable_ranks=ranks, special_tokens=special)
            with refused("tiktoken", quiet=True):
                encoding = tiktoken.Encoding(d["name"], **options)
            return cls(encoding, d.get("eos_tokens", ()), d.get("chat_template", ""), d.get("sampling"))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise UserError("this is not the dict of a tokenizer") from e

    def __repr__(self) -> str:
        ends = {i: self.decode([i]) for i in self.eos_tokens}
        return f"{type(self).__name__}({self.name!r}, vocab_size={self.vocab_size}, eos_tokens={ends})"

    @property
    def vocab_size(self) -> int:
        return max(self.ids) + 1

    def gaps(self, vocab_size: int) -> list[int]:
        """Return the ids below vocab_size that are not tokens: a model's vocabulary may be padded."""
        return [i for i in range(vocab_size) if i not in self.ids]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of text. A special token in it is plain text. UserError if the pattern fails.

        A run of whitespace longer than MAX_SPACE may be cut, and its parts encoded one by one.
        """
        starts = range(0, len(text) - MAX_SPACE + 1, MAX_SPACE)
        cuts = [i for i in starts if text[i : i + MAX_SPACE].isspace()]
        parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        alone = threading.active_count() == 1
        with refused(f"the tokenizer {self.name} cannot encode this text", quiet=alone):
            return list(chain.from_iterable(map(self.encoding.encode_ordinary, parts)))

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt: as `encode`, with the BOS that a pretrained tokenizer may add."""
        return self.encode(text)

    def encode_chat(self, messages: Messages, window: int | None = None) -> list[int]:
        """Return the token ids of a conversation by the chat template, with the generation prompt at the end.

        messages are {"role": "system", "user" or "assistant", "content": text, or a list of text parts}. A
        special token in a message is plain text. UserError if there is no template, or if it rejects the
        messages; TooLong if its text is certainly longer than the window of a model.
        """
        limit = min(LENGTH, window * MAX_CHARACTERS) if window else LENGTH
        return self.encode_rendered(self.render_chat(messages, limit))

    def render_chat(self, messages: Messages, limit: int = LENGTH) -> str:
        """Return the text of a conversation, with the generation prompt and marks, for `encode_rendered`."""
        return self.render_cuts(messages, [(len(messages), True)], limit)[0]

    def render_cuts(
        self, messages: Messages, cuts: Sequence[Cut], limit: int = LENGTH, **options: Any
    ) -> list[str]:
        if not self.chat_template:
            raise UserError(f"the tokenizer {self.name} has no chat template: its model continues texts")
        values = self.special_tokens
        return render(self.chat_template, values, self.chat_tokens, messages, cuts, limit, **options)

    def encode_rendered(self, text: str) -> list[int]:
        """Return the token ids of a rendered text, whose own special tokens are between OPEN and CLOSE."""
        return [token for piece in text.split(CUT) for token in self._encode_marked(piece)]

    def _encode_marked(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(OWN.split(text)):
            ids += [self.special_ids[piece]] if i % 2 else self.encode(piece)
        return ids

    @cached_property
    def chat_tokens(self) -> SpecialTokens:
        return SpecialTokens(self.special_ids)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The ids of all special tokens, by their texts."""
        return self.encoding._special_tokens

    def with_chat_template(self) -> Self:
        """Return this tokenizer if it has a chat template, else a copy with the plain one.

        The plain one begins with a BOS token if a prompt does.
        """
        if self.chat_template:
            return self
        copied = copy.copy(self)
        begins = self.decode(self.encode_prompt("")[:1])
        has_bos = begins == self.special_tokens.get("bos_token")
        copied.chat_template = "{{ bos_token }}" + PLAIN if has_bos else PLAIN
        return copied

    def with_eos_tokens(self, ids: Iterable[int]) -> Self:
        """Return a copy in which these ids, too, end a text."""
        copied = copy.copy(self)
        copied.eos_tokens = list(dict.fromkeys([*self.eos_tokens, *ids]))
        return copied

    def has_ids_of(self, other: "Tokenizer") -> bool:
        """Return whether both have the same vocabulary. Names, chat templates and the like may differ."""
        ours = self.to_dict()
        theirs = other.to_dict()
        others = {"name", "eos_tokens", "chat_template", "sampling"}
        return all(ours.get(key) == theirs.get(key) for key in (ours.keys() | theirs.keys()) - others)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Invalid UTF-8 becomes U+FFFD. UserError for an unknown id."""
        decoder = self.decoder()
        return "".join([*map(decoder.decode, ids), decoder.flush()])

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token within a text. UserError for an unknown id."""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError) as e:
            raise UserError(f"token id {token} is not in the vocabulary of {self.vocab_size}") from e

    def decoder(self, continues: bool = False) -> "StreamDecoder":
        """Return a streaming decoder. continues: the ids continue a text, so a leading space is kept."""
        return StreamDecoder(self)


class StreamDecoder:
    """Streaming decode, one id at a time. The joined parts are what `Tokenizer.decode` makes of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token: int) -> str:
        """Return the text that this id completes: a character comes with its last byte."""
        return self.utf8.decode(self.tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return the rest at the end of the ids: U+FFFD for an incomplete character."""
        return self.utf8.decode(b"", final=True)


def train_bpe(documents: Iterable[str], size: int) -> list[bytes]:
    """Train a byte-level BPE on documents. Return its tokens by rank: the 256 bytes, then the merges."""
    try:
        import rustbpe
    except ImportError as e:
        raise ImportError("training a tokenizer needs the extra 'bpe': pip install rustbpe") from e
    trainer = rustbpe.Tokenizer()
    # buffer_size is the number of documents in memory at a time
    trainer.train_from_iterator(iter(documents), size, buffer_size=64, pattern=BPE_PATTERN)
    return [token for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]


# -----------------------------------------------------------------------------
# Pretrained tokenizers

# Byte-level BPE writes each byte as a printable character, in tokenizer.json as in GPT-2: a printable byte as
# itself, the others as the characters from 256 on.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_LEVEL = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}

# The decoder of SentencePiece BPE. ▁ is a space; an unknown character is byte-fallback tokens, like <0xE2>
SENTENCEPIECE = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}  # the space that encoding prepends to a text
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def growth(step: dict[str, Any] | None) -> float:
    """Return by how many times a normalizer or pre_tokenizer can lengthen a text, if used again and again."""
    match step:
        case {"type": "Sequence", "normalizers": steps} | {"type": "Sequence", "pretokenizers": steps}:
            return math.prod(map(growth, steps), start=1.0)
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": new} if old:
            return max(1, len(new) / len(old))
        case {"type": "Replace", "content": new} | {"type": "Prepend", "prepend": new}:
            return 1 + len(new)  # a regex may match no character
        case {"type": "ByteLevel"}:
            return 2
        case {"type": "Precompiled", "precompiled_charsmap": charsmap}:
            data = base64.b64decode(charsmap)  # the size of a trie, the trie, what it replaces characters by
            new = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
            return max(len(text.decode(errors="replace")) for text in new)
    return 1  # Unicode normalization and the like change a text once


class PretrainedTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face model: its tokenizer.json, run by the `tokenizers` library.

    special_tokens are texts by name, {"bos_token": "<s>", ...}. eos_tokens are ids that end a text, besides
    that of eos_token. chat_template and sampling are as in `Tokenizer`. UserError for a damaged
    tokenizer.json, a special token outside the vocabulary, or a decoder that is neither byte-level nor
    SentencePiece's. ImportError without the extra.
    """

    def __init__(
        self,
        name: str,
        tokenizer_json: str,
        special_tokens: dict[str, str],
        eos_tokens: Sequence[int] = (),
        chat_template: str = "",
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import tokenizers
        except ImportError as e:
            raise ImportError("a pretrained tokenizer needs the extra 'hf': pip install tokenizers") from e
        with refused("this is not a tokenizer.json", quiet=True):
            self.backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        spec = json.loads(tokenizer_json)
        grown = growth(spec.get("normalizer")) * growth(spec.get("pre_tokenizer"))
        added = self.backend.num_special_tokens_to_add(False)
        if grown > MAX_GROWTH or added > MAX_GROWTH:
            raise UserError(
                f"the tokenizer can make a text {grown:.3g} times as long, and adds {added} tokens to each: "
                f"the most are {MAX_GROWTH}"
            )
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # as text
        self.name = name
        self.tokenizer_json = tokenizer_json
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.sampling = dict(sampling or {})

        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.tokens = {i: text for text, i in vocabulary.items()}
        self.ids = set(self.tokens)
        bos = special_tokens.get("bos_token", "")
        eos = special_tokens.get("eos_token", "")
        for text in (bos, eos):
            if text and text not in vocabulary:
                raise UserError(f"the special token {text!r} is not in the tokenizer's vocabulary")
        ends = dict.fromkeys([vocabulary.get(eos), *eos_tokens])  # each once, in this order
        self.eos_tokens = [i for i in ends if type(i) is int and i in self.ids]
        if not self.eos_tokens and not bos:
            raise UserError("the tokenizer has neither an eos_token nor a bos_token to separate documents")
        self.eot = self.eos_tokens[0] if self.eos_tokens else vocabulary[bos]

        decoder = spec.get("decoder") or {}
        steps = decoder.get("decoders", [decoder])
        self.byte_level = [step.get("type") for step in steps] == ["ByteLevel"]
        if not self.byte_level and steps not in (SENTENCEPIECE, [*SENTENCEPIECE, STRIP]):
            shown = json.dumps(decoder)
            raise UserError(f"the tokenizer's decoder is neither ByteLevel nor SentencePiece's: {shown}")
        self.strips = STRIP in steps
        self.byte_tokens: dict[int, bytes] = {}
        if not self.byte_level:
            for i, text in self.tokens.items():
                if match := BYTE_TOKEN.fullmatch(text):
                    self.byte_tokens[i] = bytes.fromhex(match[1])

    def to_dict(self) -> dict[str, Any]:
        d = {
            "kind": "tokenizers",
            "name": self.name,
            "tokenizer_json": self.tokenizer_json,
            "special_tokens": self.special_tokens,
            "eos_tokens": self.eos_tokens,
            "chat_template": self.chat_template,
        }
        return d | ({"sampling": self.sampling} if self.sampling else {})

    def encode(self, text: str) -> list[int]:
        return self._encode(self.backend, text)

    def encode_prompt(self, text: str) -> list[int]:
        return self._encode(self.backend, text, add_special_tokens=True)

    def _encode(self, backend: Any, text: str, add_special_tokens: bool = False) -> list[int]:
        # A lone surrogate has no UTF-8
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with refused(f"the tokenizer {self.name} cannot encode this text"):
            return backend.encode(text, add_special_tokens=add_special_tokens).ids

    @cached_property
    def chat_backend(self) -> Any:
        """A copy of the backend that recognizes special tokens between OPEN and CLOSE.

        They are not normalized: no normalizer makes one of other text.
        """
        import tokenizers

        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = True  # as text; a copy forgets it
        marked = []
        for token in self.backend.get_added_tokens_decoder().values():
            if token.special:
                options = dict(single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip)
                text = OPEN + token.content + CLOSE
                marked.append(tokenizers.AddedToken(text, normalized=False, **options))
        backend.add_tokens(marked)
        return backend

    @cached_property
    def chat_ids(self) -> dict[int, int]:
        """The ids of special tokens by their ids in the chat_backend."""
        return {self.chat_backend.token_to_id(OPEN + text + CLOSE): i for text, i in self.special_ids.items()}

    def _encode_marked(self, text: str) -> list[int]:
        return [self.chat_ids.get(i, i) for i in self._encode(self.chat_backend, text)]

    @cached_property
    def special_ids(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def token_bytes(self, token: int) -> bytes:
        if token not in self.tokens:
            raise UserError(f"token id {token} is not in the vocabulary of {self.vocab_size}")
        text = self.tokens[token]
        if self.byte_level:
            is_token = BYTE_LEVEL.keys() >= set(text)  # an added token is plain text
            return bytes(BYTE_LEVEL[character] for character in text) if is_token else text.encode()
        return self.byte_tokens.get(token) or text.replace("▁", " ").encode()

    def decoder(self, continues: bool = False) -> StreamDecoder:
        if self.byte_level:
            return StreamDecoder(self)
        return SentencePieceDecoder(self, strip=self.strips and not continues)


class SentencePieceDecoder(StreamDecoder):
    """StreamDecoder for a vocabulary with byte-fallback tokens.

    As in the `tokenizers` library, a run of byte tokens is text if it is valid UTF-8, else U+FFFD for each
    byte. So a run is returned when it ends. strip: drop a leading space, which encoding has prepended.
    """

    def __init__(self, tokenizer: PretrainedTokenizer, strip: bool) -> None:
        self.tokenizer = tokenizer
        self.byte_tokens = tokenizer.byte_tokens
        self.strip = strip
        self.run = b""

    def decode(self, token: int) -> str:
        if token in self.byte_tokens:
            self.run += self.byte_tokens[token]
            return ""
        return self._release(self.tokenizer.token_bytes(token).decode())

    def flush(self) -> str:
        return self._release("")

    def _release(self, text: str) -> str:
        try:
            text = self.run.decode() + text
        except UnicodeDecodeError:
            text = "\ufffd" * len(self.run) + text
        self.run = b""
        if text and self.strip:
            text = text.removeprefix(" ")
            self.strip = False
        return text

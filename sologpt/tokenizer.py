"""Text to token ids and back.

    tokenizer = Tokenizer.from_spec("bytes")  # or "bpe:4096", trained on documents, or tiktoken's "gpt2"
    tokenizer.decode(tokenizer.encode("Hello"))

A Tokenizer wraps a `tiktoken.Encoding`. A PretrainedTokenizer wraps a Hugging Face model's tokenizer.json, special
tokens and chat template. Both convert to a dict of JSON types that holds the whole vocabulary. The dict is saved in
every checkpoint: sampling needs neither the dataset nor a network.
"""

import base64
import codecs
import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import tiktoken

from sologpt import chat

EOT = "<|endoftext|>"  # separates documents

# Pre-tokenization: merges do not cross the borders of these pieces. An English contraction, a word with the space or
# sign before it, a digit, punctuation with the line breaks after it, line breaks with the whitespace before them,
# whitespace without the last space before a word. It is Qwen2's, which llama.cpp knows (sologpt/gguf.py).
BPE_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAX_SPACE = 400_000  # tiktoken's regular expressions overflow their stack at a million whitespace characters
BYTES = [bytes([i]) for i in range(256)]


@contextmanager
def refused(what: str) -> Iterator[None]:
    """A ValueError for what the Rust libraries raise: a plain Exception, or a PanicException, which is none at all."""
    try:
        yield
    except BaseException as e:
        if type(e) is not Exception and type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {e}") from e


class Tokenizer:
    """Text to token ids and back, by a `tiktoken.Encoding`.

    `ids` is the set of ids in the vocabulary, `eot` the id that separates documents, `eos_tokens` the ids that end a
    text.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.name = encoding.name
        self.ids = {*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()}
        self.eot = encoding.eot_token
        self.eos_tokens = [self.eot]

    @classmethod
    def from_spec(cls, spec: str, documents: Iterable[str] = ()) -> "Tokenizer":
        """Make a tokenizer: 'bytes', 'bpe:N' (trained on documents, N ids), or a tiktoken encoding such as 'gpt2'.

        ValueError for an unknown spec, OSError for an encoding that cannot be downloaded, ImportError if training
        needs a missing extra.
        """
        if spec == "bytes":
            return cls._from_tokens("bytes", r"[\s\S]{1,32}", BYTES)
        if spec.startswith("bpe:"):
            size = spec.removeprefix("bpe:")
            if not size.isdecimal() or len(size) > 7 or int(size) < 257:
                raise ValueError(
                    f"tokenizer {spec!r}: N in bpe:N is the vocabulary size, from 257 (256 bytes and {EOT}) to 9999999"
                )
            return cls._from_tokens(spec, BPE_PATTERN, train_bpe(documents, int(size) - 1))
        if spec not in tiktoken.list_encoding_names():
            known = ", ".join(tiktoken.list_encoding_names())
            raise ValueError(f"unknown tokenizer {spec!r}: choose one of bytes, bpe:N, {known}")
        try:
            return cls(tiktoken.get_encoding(spec))
        except OSError as e:  # the base class of requests' errors
            raise OSError(f"tokenizer {spec!r} cannot be downloaded; 'bytes' and 'bpe:N' need no network") from e

    @classmethod
    def from_merges(cls, name: str, merges: str) -> "Tokenizer":
        """The byte-level BPE of a merges.txt as GPT-2's: a header line, then a merge, two tokens, on each line."""
        tokens = [bytes(map(BYTE_LEVEL.__getitem__, line.replace(" ", ""))) for line in merges.splitlines()[1:]]
        return cls._from_tokens(name, BPE_PATTERN, BYTES + tokens)

    @classmethod
    def _from_tokens(cls, name: str, pattern: str, tokens: list[bytes]) -> "Tokenizer":
        ranks = {token: rank for rank, token in enumerate(tokens)}
        special = {EOT: len(tokens)}
        return cls(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))

    def to_dict(self) -> dict[str, Any]:
        """The tokenizer as JSON types, for `from_dict`. "tokens" are in base64, by id; None is an unused id."""
        encoding = self.encoding
        tokens: list[str | None] = [None] * (max(encoding._mergeable_ranks.values()) + 1)
        for token, rank in encoding._mergeable_ranks.items():
            tokens[rank] = base64.b64encode(token).decode("ascii")
        return {
            "kind": "tiktoken",
            "name": encoding.name,
            "pattern": encoding._pat_str,
            "tokens": tokens,
            "special_tokens": dict(encoding._special_tokens),
        }

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "Tokenizer":
        """The tokenizer of a dict from `to_dict`. ValueError for any other dict."""
        try:
            if d["kind"] == "tokenizers":
                return PretrainedTokenizer(**{key: value for key, value in d.items() if key != "kind"})
            if d["kind"] != "tiktoken":
                raise ValueError(d["kind"])
            ranks = {base64.b64decode(token): i for i, token in enumerate(d["tokens"]) if token is not None}
            if len({*ranks.values(), *d["special_tokens"].values()}) < len(d["special_tokens"]) + sum(
                token is not None for token in d["tokens"]
            ):
                raise ValueError("an id or a token occurs twice")
            if not ranks.keys() >= {*BYTES}:
                raise ValueError("a byte has no token")
            with refused("tiktoken"):
                return cls(
                    tiktoken.Encoding(
                        d["name"], pat_str=d["pattern"], mergeable_ranks=ranks, special_tokens=d["special_tokens"]
                    )
                )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise ValueError("this is not the dict of a tokenizer") from e

    def __repr__(self) -> str:
        ends = {i: self.decode([i]) for i in self.eos_tokens}
        return f"{type(self).__name__}({self.name!r}, vocab_size={self.vocab_size}, eos_tokens={ends})"

    @property
    def vocab_size(self) -> int:
        return max(self.ids) + 1

    def gaps(self, vocab_size: int) -> list[int]:
        """The ids below vocab_size that are no token: a model's vocabulary may be padded, or have unused ids."""
        return [i for i in range(vocab_size) if i not in self.ids]

    def encode(self, text: str) -> list[int]:
        """Token ids of text. The text of a special token is encoded as text. ValueError if the pattern fails on it.

        A longer run of whitespace than MAX_SPACE may be cut, and its parts encoded one by one.
        """
        cuts = [i for i in range(0, len(text), MAX_SPACE) if text[i : i + MAX_SPACE].isspace()]
        parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        with refused(f"the tokenizer {self.name} cannot encode this text"):
            return list(chain.from_iterable(map(self.encoding.encode_ordinary, parts)))

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt: like `encode`, with the special tokens (BOS) that a pretrained tokenizer adds."""
        return self.encode(text)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation by the chat template, with the generation prompt at the end.

        messages are {"role": "system", "user" or "assistant", "content": text}. Only the template makes special
        tokens: in a message, the text of one is encoded as text. ValueError if there is no template, or if it rejects
        the messages.
        """
        raise ValueError(f"the tokenizer {self.name} has no chat template")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens included; invalid UTF-8 becomes U+FFFD. ValueError for an unknown id."""
        decoder = self.decoder()
        return "".join([*map(decoder.decode, ids), decoder.flush()])

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token within a text. ValueError for an unknown id."""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError) as e:
            raise ValueError(f"token id {token} is not in the vocabulary of {self.vocab_size}") from e

    def decoder(self, continues: bool = False) -> "StreamDecoder":
        """A streaming decoder. continues: the ids continue a text, so a leading space of the first is kept."""
        return StreamDecoder(self)


class StreamDecoder:
    """Streaming decode, one id at a time. The parts joined are what `Tokenizer.decode` gives for all ids at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token: int) -> str:
        """The text that this id completes: a character is returned with its last byte."""
        return self.utf8.decode(self.tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The rest of the text at the end of the ids: U+FFFD for an incomplete character."""
        return self.utf8.decode(b"", final=True)


def train_bpe(documents: Iterable[str], size: int) -> list[bytes]:
    """The `size` tokens of a byte-level BPE trained on documents: the 256 bytes, then the merges in rank order."""
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

# Byte-level BPE writes each byte as a printable character, in tokenizer.json as in GPT-2: a printable byte as itself,
# the others as the characters from 256 on.
_printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
_others = iter(range(256, 512))
BYTE_LEVEL = {chr(byte if byte in _printable else next(_others)): byte for byte in range(256)}

# The decoder of SentencePiece BPE: ▁ is a space, and a character outside the vocabulary is byte-fallback tokens, <0xE2>
SENTENCEPIECE = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}  # the space that encoding prepends to a text
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class PretrainedTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face model: its tokenizer.json, run by the `tokenizers` library.

    special_tokens are texts by name, {"bos_token": "<s>", ...}. eos_tokens are ids that end a text besides that of
    eos_token. chat_template is Jinja, or empty. ValueError for a damaged tokenizer.json, a special token outside the
    vocabulary, or a decoder that is neither byte-level nor SentencePiece's. ImportError without the extra.
    """

    def __init__(
        self,
        name: str,
        tokenizer_json: str,
        special_tokens: dict[str, str],
        eos_tokens: Sequence[int] = (),
        chat_template: str = "",
    ) -> None:
        try:
            import tokenizers
        except ImportError as e:
            raise ImportError("a pretrained tokenizer needs the extra 'hf': pip install tokenizers") from e
        with refused("this is not a tokenizer.json"):
            self.backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # as text
        self.name, self.tokenizer_json, self.chat_template = name, tokenizer_json, chat_template
        self.special_tokens = special_tokens

        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.tokens = {i: text for text, i in vocabulary.items()}
        self.ids = set(self.tokens)
        bos, eos = (special_tokens.get(key, "") for key in ("bos_token", "eos_token"))
        for text in filter(None, (bos, eos)):
            if text not in vocabulary:
                raise ValueError(f"the special token {text!r} is not in the tokenizer's vocabulary")
        self.eos_tokens = [
            i for i in dict.fromkeys([vocabulary.get(eos), *eos_tokens]) if type(i) is int and i in self.ids
        ]
        separators = [*self.eos_tokens, *([vocabulary[bos]] if bos else [])]
        if not separators:
            raise ValueError("the tokenizer has neither an eos_token nor a bos_token to separate documents")
        self.eot = separators[0]

        decoder = json.loads(tokenizer_json).get("decoder") or {}
        steps = decoder.get("decoders", [decoder])
        self.byte_level = [step.get("type") for step in steps] == ["ByteLevel"]
        if not self.byte_level and steps not in (SENTENCEPIECE, [*SENTENCEPIECE, STRIP]):
            raise ValueError(f"the tokenizer's decoder is neither ByteLevel nor SentencePiece's: {json.dumps(decoder)}")
        self.strips = STRIP in steps
        bytes_of = {} if self.byte_level else {i: BYTE_TOKEN.fullmatch(text) for i, text in self.tokens.items()}
        self.byte_tokens = {i: bytes.fromhex(match[1]) for i, match in bytes_of.items() if match}

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "tokenizers",
            "name": self.name,
            "tokenizer_json": self.tokenizer_json,
            "special_tokens": self.special_tokens,
            "eos_tokens": self.eos_tokens,
            "chat_template": self.chat_template,
        }

    def encode(self, text: str) -> list[int]:
        return self._encode(self.backend, text)

    def encode_prompt(self, text: str) -> list[int]:
        return self._encode(self.backend, text, add_special_tokens=True)

    def _encode(self, backend: Any, text: str, add_special_tokens: bool = False) -> list[int]:
        """add_special_tokens: BOS and the like around the text."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a lone surrogate has no UTF-8
        with refused(f"the tokenizer {self.name} cannot encode this text"):
            return backend.encode(text, add_special_tokens=add_special_tokens).ids

    @cached_property
    def chat_backend(self) -> Any:
        """The backend that reads special tokens in a text: an object of its own, since threads share them."""
        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def chat_tokens(self) -> chat.SpecialTokens:
        added = self.backend.get_added_tokens_decoder().values()
        return chat.SpecialTokens([token.content for token in added if token.special])

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self.chat_template:
            return super().encode_chat(messages)
        mark = self.chat_tokens.mark
        marked = [{key: mark(text) for key, text in message.items()} for message in messages]
        pieces = self.chat_tokens.split(self.render_chat(marked))
        backends = ((self.chat_backend if templates_own else self.backend, text) for text, templates_own in pieces)
        return list(chain.from_iterable(self._encode(backend, text) for backend, text in backends))

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as text, by the chat template, with the generation prompt. ValueError if it fails."""
        values = dict(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        return chat.render(self.chat_template, self.special_tokens | values)

    def token_bytes(self, token: int) -> bytes:
        if token not in self.tokens:
            raise ValueError(f"token id {token} is not in the vocabulary of {self.vocab_size}")
        text = self.tokens[token]
        if self.byte_level:
            return bytes(map(BYTE_LEVEL.__getitem__, text)) if BYTE_LEVEL.keys() >= set(text) else text.encode()
        return self.byte_tokens.get(token) or text.replace("▁", " ").encode()

    def decoder(self, continues: bool = False) -> StreamDecoder:
        return StreamDecoder(self) if self.byte_level else SentencePieceDecoder(self, self.strips and not continues)


class SentencePieceDecoder(StreamDecoder):
    """StreamDecoder for a vocabulary with byte-fallback tokens.

    As in the `tokenizers` library, a run of byte tokens is text if all of it is valid UTF-8, else U+FFFD for each byte.
    So a run is returned when it ends. strip: drop a leading space, which encoding has prepended.
    """

    def __init__(self, tokenizer: PretrainedTokenizer, strip: bool) -> None:
        self.tokenizer, self.byte_tokens, self.strip = tokenizer, tokenizer.byte_tokens, strip
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
            text, self.strip = text.removeprefix(" "), False
        return text

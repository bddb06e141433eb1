"""Text to token ids and back.

    tokenizer = Tokenizer.from_spec("bytes")  # or "bpe:4096", trained on documents, or tiktoken's "gpt2"
    tokenizer.decode(tokenizer.encode("Hello"))

A Tokenizer wraps a `tiktoken.Encoding`. A PretrainedTokenizer wraps a Hugging Face model's tokenizer.json, special
tokens and chat template. Both convert to a dict of JSON types that holds the whole vocabulary. The dict is saved in
every checkpoint: sampling needs neither the dataset nor a network.
"""

import base64
import codecs
import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NoReturn

import tiktoken

EOT = "<|endoftext|>"  # separates documents

# Pre-tokenization: merges do not cross the borders of these pieces. A word with the space or sign before it, one or two
# digits, punctuation with the line breaks after it, whitespace without the last space before a word.
BPE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


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
            return cls._from_tokens("bytes", r"[\s\S]{1,32}", [bytes([i]) for i in range(256)])
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
            return cls(
                tiktoken.Encoding(
                    d["name"], pat_str=d["pattern"], mergeable_ranks=ranks, special_tokens=d["special_tokens"]
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ValueError("this is not the dict of a tokenizer") from e

    @property
    def vocab_size(self) -> int:
        return max(self.ids) + 1

    def gaps(self, vocab_size: int) -> list[int]:
        """The ids below vocab_size that are no token: a model's vocabulary may be padded, or have unused ids."""
        return [i for i in range(vocab_size) if i not in self.ids]

    def encode(self, text: str) -> list[int]:
        """Token ids of text. The text of a special token is encoded as text."""
        return self.encoding.encode_ordinary(text)

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
        try:
            self.backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as e:  # the library raises plain Exceptions
            raise ValueError(f"this is not a tokenizer.json: {e}") from e
        self.backend.no_truncation()
        self.backend.no_padding()
        self.name, self.tokenizer_json, self.chat_template = name, tokenizer_json, chat_template
        self.special_tokens = special_tokens

        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.tokens = {i: text for text, i in vocabulary.items()}
        self.ids = set(self.tokens)
        bos, eos = (special_tokens.get(key, "") for key in ("bos_token", "eos_token"))
        for text in filter(None, (bos, eos)):
            if text not in vocabulary:
                raise ValueError(f"the special token {text!r} is not in the tokenizer's vocabulary")
        self.eos_tokens = [i for i in dict.fromkeys([vocabulary.get(eos), *eos_tokens]) if i in self.ids]
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
        return self._encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=True)

    def _encode(self, text: str, add_special_tokens: bool = False, parse_special_tokens: bool = False) -> list[int]:
        """add_special_tokens: BOS and the like around the text. parse_special_tokens: also those in the text."""
        self.backend.encode_special_tokens = not parse_special_tokens
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a lone surrogate has no UTF-8
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self.chat_template:
            return super().encode_chat(messages)
        # A message cannot forge a special token: the text of one is put between the noncharacters U+FDD0 and U+FDD1,
        # which tell it from the template's own after rendering. A template that cuts a message, say to strip its
        # reasoning, may leave one of the two: it is dropped.
        special = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
        pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)"
        marked = []
        for message in messages:
            content = re.sub("[\ufdd0\ufdd1]", "", message["content"])
            marked.append(message | {"content": re.sub(pattern, "\ufdd0\\g<0>\ufdd1", content)})
        pieces = re.split(f"\ufdd0({pattern})\ufdd1|[\ufdd0\ufdd1]", self.render_chat(marked))
        ids = []
        for i, piece in enumerate(pieces):
            if piece:  # re.split puts what its group matched, a message's special token, at odd indices
                ids += self._encode(piece, parse_special_tokens=i % 2 == 0)
        return ids

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as text, by the chat template, with the generation prompt. ValueError if it fails."""
        environment = chat_environment()
        values = dict(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        try:
            return environment.from_string(self.chat_template).render(**values, **self.special_tokens)
        except Exception as e:  # a template is a program, which can raise anything
            raise ValueError(f"the chat template rejects this conversation: {e}") from e

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


def chat_environment() -> Any:
    """The sandboxed Jinja environment of chat templates, with the extensions that `transformers` gives them."""
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as e:
        raise ImportError("a chat template needs the extra 'hf': pip install jinja2") from e

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's tokens for a training mask; a no-op here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise ValueError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own filter escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment

"""Text to token ids and back.

A Tokenizer wraps a `tiktoken.Encoding`, and is a plain dict of JSON types to whoever stores it: the dict holds every
token's bytes, so that a checkpoint needs neither the dataset nor the network to be sampled from.
"""

import base64
import codecs
from collections.abc import Iterable
from typing import Any

import tiktoken

EOT = "<|endoftext|>"  # separates documents

# Byte pairs are merged within such pieces only: a word with the space or sign before it, one or two digits, signs and
# the line breaks after them, white space up to the last before a word.
BPE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


class Tokenizer:
    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding

    @classmethod
    def from_spec(cls, spec: str, documents: Iterable[str] = ()) -> "Tokenizer":
        """Make the tokenizer that spec names: 'bytes', 'bpe:N' trained on documents to N ids, or tiktoken's 'gpt2', ...

        ValueError for a spec that there is not, OSError for an encoding that cannot be downloaded, ImportError with
        the name of the extra if training needs a package that is missing.
        """
        if spec == "bytes":
            return cls._from_tokens("bytes", r"[\s\S]{1,32}", [bytes([i]) for i in range(256)])
        if spec.startswith("bpe:"):
            size = spec.removeprefix("bpe:")
            if not size.isdecimal() or len(size) > 7 or int(size) < 257:
                raise ValueError(
                    f"tokenizer {spec!r}: bpe:N takes a vocabulary from 257 (256 bytes and {EOT}) to 9999999"
                )
            return cls._from_tokens(spec, BPE_PATTERN, train_bpe(documents, int(size) - 1))
        if spec not in tiktoken.list_encoding_names():
            known = ", ".join(tiktoken.list_encoding_names())
            raise ValueError(f"unknown tokenizer {spec!r}: there are bytes, bpe:N, {known}")
        try:
            return cls(tiktoken.get_encoding(spec))
        except OSError as e:  # what requests raises are OSErrors
            raise OSError(f"tokenizer {spec!r} cannot be downloaded; 'bytes' and 'bpe:N' need no network") from e

    @classmethod
    def _from_tokens(cls, name: str, pattern: str, tokens: list[bytes]) -> "Tokenizer":
        ranks = {token: rank for rank, token in enumerate(tokens)}
        special = {EOT: len(tokens)}
        return cls(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))

    def to_dict(self) -> dict[str, Any]:
        """All that `from_dict` needs, as JSON types: the tokens by id, in base64, None where there is a gap."""
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
        """What `to_dict` gave, as a Tokenizer. ValueError if it is something else."""
        try:
            if d["kind"] != "tiktoken":
                raise ValueError(d["kind"])
            ranks = {base64.b64decode(token): i for i, token in enumerate(d["tokens"]) if token is not None}
            if len({*ranks.values(), *d["special_tokens"].values()}) < len(d["special_tokens"]) + sum(
                token is not None for token in d["tokens"]
            ):
                raise ValueError("an id or a token comes twice")
            return cls(
                tiktoken.Encoding(
                    d["name"], pat_str=d["pattern"], mergeable_ranks=ranks, special_tokens=d["special_tokens"]
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ValueError("this is not the dict of a tokenizer") from e

    @property
    def name(self) -> str:
        return self.encoding.name

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    @property
    def eot(self) -> int:
        """The id of <|endoftext|>, which stands between documents."""
        return self.encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """Token ids of text. Whatever looks like a special token is text too."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. ValueError for an id that there is not."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError) as e:
            raise ValueError(f"token id {token} is not in the vocabulary of {self.vocab_size}") from e

    def gaps(self, vocab_size: int) -> list[int]:
        """The ids below vocab_size that stand for no token: a model's vocabulary may be padded, or have holes."""
        ids = {*self.encoding._mergeable_ranks.values(), *self.encoding._special_tokens.values()}
        return [i for i in range(vocab_size) if i not in ids]

    def decoder(self) -> "StreamDecoder":
        return StreamDecoder(self)


class StreamDecoder:
    """Ids to text, one at a time: what it returns, joined, is what `decode` gives for all ids at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token: int) -> str:
        """The text that is now certain: a character comes when its last byte has."""
        return self.utf8.decode(self.tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the ids end within a character."""
        return self.utf8.decode(b"", final=True)


def train_bpe(documents: Iterable[str], size: int) -> list[bytes]:
    """The tokens of a byte pair encoding of documents: the 256 bytes, then those merged, in order, `size` in all."""
    try:
        import rustbpe
    except ImportError as e:
        raise ImportError("training a tokenizer needs the extra 'bpe': pip install rustbpe") from e
    trainer = rustbpe.Tokenizer()
    # As many documents are in memory at a time
    trainer.train_from_iterator(iter(documents), size, buffer_size=64, pattern=BPE_PATTERN)
    return [token for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]

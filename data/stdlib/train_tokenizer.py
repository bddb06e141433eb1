"""Train the tokenizer `stdlib`, a BPE of 2048 ids, on this dataset's training split, and write its merges.

The merges in the repository were made under CPython 3.11.7. Needs the extra `bpe`: pip install rustbpe
"""

import sys
from pathlib import Path

from prepare import common, documents

from sologpt.hf import find_merge
from sologpt.tokenizer import BYTE_LEVEL, train_bpe

SIZE = 2048  # 256 bytes, the merges and <|endoftext|>


def main(path: Path) -> None:
    train, _ = common.split(documents(None), 0.05)
    ranks = {token: rank for rank, token in enumerate(train_bpe((text for d in train for text in d), SIZE - 1))}
    spell = {byte: character for character, byte in BYTE_LEVEL.items()}
    lines = ["#version: 0.2"]  # the header of GPT-2's merges.txt
    for token in ranks:
        if len(token) > 1:
            lines.append(" ".join("".join(spell[byte] for byte in part) for part in find_merge(token, ranks)))
    path.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("merges.txt")))

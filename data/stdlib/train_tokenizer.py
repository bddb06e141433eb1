"""Train the tokenizer `stdlib`, a BPE of 2048 ids, on this dataset's training split, and write its merges.

The merges in the repository were made with CPython 3.11.7. Needed: pip install rustbpe tokenizers
"""

import json
import sys
from pathlib import Path

from prepare import VAL_FRACTION, common, documents

from sologpt.hf import tokenizer_json
from sologpt.tokenizer import Tokenizer


def main(path: Path) -> None:
    train, _ = common.split(documents(None), VAL_FRACTION)
    tokenizer = Tokenizer.from_spec("bpe:2048", (text for document in train for text in document))
    merges = json.loads(tokenizer_json(tokenizer))["model"]["merges"]  # [[token, token], ...] by rank
    lines = ["#version: 0.2", *map(" ".join, merges)]  # GPT-2's merges.txt has this header
    path.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("merges.txt")))

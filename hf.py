"""Hugging Face checkpoints in and out.

    model, tokenizer = hf.load("HuggingFaceTB/SmolLM2-135M-Instruct")  # or a folder
    hf.save(model, tokenizer, "out/mine")

    python hf.py import NAME_OR_DIR out/x [--dtype=bfloat16]
    python hf.py export out/x/best.pt DIR
"""

from pathlib import Path

from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# Tokenizers


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, with the ids that end a text (generation_config.json's, else config.json's)."""
    raise NotImplementedError


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files into a folder, for AutoTokenizer."""
    raise NotImplementedError


# -----------------------------------------------------------------------------
# Models

"""Checkpoints of nanoGPT (https://github.com/karpathy/nanoGPT)."""

from dataclasses import replace
from pathlib import Path

from gpt import GPT, Dtype
from sologpt.errors import UserError
from sologpt.hf import FAMILIES, GPT2, from_theirs, tensor_names
from sologpt.load import empty_model, fill_model, is_out_of_memory, make_config, read_checkpoint
from sologpt.tokenizer import Tokenizer


def load_nanogpt(path: str | Path, tokenizer: str = "gpt2", dtype: Dtype = None) -> tuple[GPT, Tokenizer]:
    """Return the model of a nanoGPT checkpoint, in eval mode, and a tokenizer: see `Tokenizer.from_spec`.

    UserError for another checkpoint, RunError for a damaged one, OSError for a missing one.
    """
    checkpoint = read_checkpoint(path)
    try:
        args = checkpoint["model_args"]
        sizes = {key: args[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd", "bias", "dropout")}
        fixed = GPT2 | dict(mlp="gelu", tie_embd=True, norm_eps=1e-5)
        config = make_config(sizes | fixed | {"sequence_len": args["block_size"]})
        state = {name.removeprefix("_orig_mod."): x for name, x in checkpoint["model"].items()}
        if config.n_layer > len(state):
            raise ValueError("it has fewer tensors than layers")
        names = tensor_names(empty_model(config), replace(FAMILIES["gpt2"], transposed=False))
        model = fill_model(config, {name.ours: from_theirs(state[name.theirs], name) for name in names})
    except UserError as e:
        raise UserError(f"{path} is not a checkpoint of nanoGPT: {e}") from e
    except Exception as e:  # a missing key, a shape, ...
        if is_out_of_memory(e):
            raise
        raise UserError(f"{path} is not a checkpoint of nanoGPT: {type(e).__name__}") from e
    its_tokenizer = Tokenizer.from_spec(tokenizer)
    if its_tokenizer.vocab_size > config.vocab_size:
        size = its_tokenizer.vocab_size
        raise UserError(f"the tokenizer {tokenizer} has {size} tokens, {path} only {config.vocab_size}")
    return model.to(dtype=dtype).eval(), its_tokenizer

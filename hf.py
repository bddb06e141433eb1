"""Hugging Face checkpoints in and out.

model, tokenizer = hf.load("HuggingFaceTB/SmolLM2-135M-Instruct")  # or a folder
hf.save(model, tokenizer, "out/mine")

python hf.py import NAME_OR_DIR out/x [--dtype=bfloat16]
python hf.py export out/x/best.pt DIR
"""

import base64
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

from tokenizer import BYTE_LEVEL, EOT, PretrainedTokenizer, Tokenizer

# -----------------------------------------------------------------------------
# Tokenizers


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, with the ids that end a text (generation_config.json's, else config.json's).

    ValueError for a file that is missing or damaged, or for a tokenizer that decodes in a way of its own.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{folder} has no tokenizer.json; transformers makes one of a tokenizer.model or a vocab.json: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    files = ("config", "generation_config", "special_tokens_map", "tokenizer_config")
    config, generation, special_map, said = (read_json_if_any(folder / f"{name}.json") for name in files)
    special = {}
    for key, token in (special_map | said).items():
        text = token.get("content") if isinstance(token, dict) else token
        if key.endswith("_token") and isinstance(text, str):
            special[key] = text
    eos: Any = generation.get("eos_token_id", config.get("eos_token_id"))
    eos = eos if isinstance(eos, list) else [eos]
    try:
        template = said.get("chat_template") or ""
        if isinstance(template, list):  # of several, each with a name
            template = {each["name"]: each["template"] for each in template}.get("default", "")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        name, text = config.get("model_type", "tokenizers"), path.read_text(encoding="utf-8")
        tokenizer = PretrainedTokenizer(name, text, special, eos, template)
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"the tokenizer in {folder} cannot be read: {e}") from e
    begin_with_bos(tokenizer, said.get("add_bos_token"))
    return tokenizer


def read_json_if_any(path: Path) -> dict:
    """The object in a JSON file, {} if there is no such file; ValueError if there is something else in it."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return value


def begin_with_bos(tokenizer: PretrainedTokenizer, add_bos_token: bool | None) -> None:
    """Where tokenizer_config.json says whether prompts begin with bos, it has the last word, as in transformers."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.special_tokens.get("bos_token")
    if bos is None or add_bos_token is None:
        return
    bos_id = tokenizer.backend.token_to_id(bos)
    if add_bos_token != (tokenizer.encode_prompt("")[:1] == [bos_id]):
        first = [bos] if add_bos_token else []
        tokenizer.backend.post_processor = TemplateProcessing(
            single=[*first, "$A"], pair=[*first, "$A", "$B:1"], special_tokens=[(bos, bos_id)]
        )
        tokenizer.tokenizer_json = tokenizer.backend.to_str()


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder, for AutoTokenizer, vLLM and llama.cpp.

    ValueError if the `tokenizers` library would give other ids than ours.
    """
    config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, PretrainedTokenizer):
        text = tokenizer.tokenizer_json
        config |= tokenizer.special_tokens
        if tokenizer.chat_template:
            config["chat_template"] = tokenizer.chat_template
    else:
        text = tokenizer_json(tokenizer)
        config |= {"bos_token": EOT, "eos_token": EOT}
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


# Text that two ways to cut it into pieces would cut differently: cases, digits, apostrophes, white space, scripts
PROBE = (
    "It's I'LL we'Ve 's 'S 1 12 123 1234567890 x2 CamelCase ABC $99.50 f(x)[i]={};//--\r\n\r\n\tif a:\n        b  \n"
    " \n  c\n\n d\u00a0e\u3000f\u2028g café ÇA Straße \u017f \u212a ελληνικά Русский العربية १२३ 中文字 日本語かな ไทย "
    "한국어 e\u0301 \U0001f469\u200d\U0001f467  end \n "
)


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json that gives the ids of a `tiktoken.Encoding`. ValueError if there is none.

    tiktoken ranks the tokens and joins whichever pair makes the lowest; the `tokenizers` library ranks the pairs. They
    agree because a token comes about from one pair only: what is left of its bytes once all that ranks lower is joined.
    """
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    d = tokenizer.to_dict()
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(d["tokens"]) if token is not None}
    letters = {byte: letter for letter, byte in BYTE_LEVEL.items()}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = [last_pair(token, ranks) for token in ranks if len(token) > 1]
    model = models.BPE(
        vocab={spelled[token]: rank for token, rank in ranks.items()} | d["special_tokens"],
        merges=[(spelled[a], spelled[b]) for a, b in filter(None, pairs)],
        ignore_merges=None in pairs,  # a piece of text that is a token is that token, even if no joining leads to it
    )
    # Of Oniguruma's dialect: $ is the end of any line, and {1,3}+ repeats
    pattern = re.sub(r"(\\p\{\w+\}\{\d+,\d+\})\+", r"(?>\1)", d["pattern"]).replace("$", r"\z")
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in d["special_tokens"]])
    theirs.encode_special_tokens = True
    probe = PROBE + " ".join(d["special_tokens"])
    if theirs.encode(probe).ids != tokenizer.encode(probe):
        raise ValueError(f"the tokenizer {tokenizer.name} cuts text in a way that the tokenizers library has not")
    return theirs.to_str(pretty=True)


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that byte pair encoding joins to make token, or None if it never does."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
        if min(joined) > ranks[token]:
            return None
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


# -----------------------------------------------------------------------------
# Models

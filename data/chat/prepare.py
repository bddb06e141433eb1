"""Your own conversations: --input FILE_OR_FOLDER of JSON Lines or JSON, for the chat template of --tokenizer.

A record has messages (role, content), or ShareGPT's conversations (from, value), or Alpaca's instruction,
input and output, or prompt and completion. Which one is found by looking.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

from sologpt import errors
from sologpt.chat_template import as_text
from sologpt.conversations import Example
from sologpt.errors import UserError

ROLES = {role: role for role in ("system", "user", "assistant")}
ROLES |= {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")
TOOLS = {"tool", "function", "tool_calls", "function_call", "function_response", "observation"}
FOLDER = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# Files


def read_examples(path: str | None) -> list[Example]:
    """Read all conversations. UserError, with file and line, for one that is damaged or does not fit."""
    if path is None:
        raise UserError("--input is missing: python data/chat/prepare.py --input FILE_OR_FOLDER")
    root = Path(path)
    if not root.exists():
        raise UserError(f"--input={path} does not exist")
    files = [root]
    if root.is_dir():
        found = [f for f in sorted(root.rglob("*")) if f.suffix in (".json", ".jsonl")]
        files = [f for f in found if not any(part.startswith(".") for part in f.relative_to(root).parts)]
        if not files:
            raise UserError(f"--input={path} has no .jsonl or .json file")
    return [Example(place, to_messages(record, place)) for f in files for place, record in read_records(f)]


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each line of JSON Lines, or of each item of a JSON array."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        hint = common.how_to_convert(path)
        raise UserError(f"{path}:{line}: this is not UTF-8 text: {e.reason}; {hint}") from e
    if text.lstrip().startswith("["):
        for i, record in enumerate(parse(text, path, 1)):
            yield f"{path}[{i}]", record
        return
    for line, part in enumerate(text.split("\n"), 1):
        if part.strip():
            yield f"{path}:{line}", parse(part, path, line)


def parse(text: str, path: Path, line: int) -> Any:
    """Return the value of a JSON text that begins in that line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{line + e.lineno - 1}: this is not JSON: {e.msg}, column {e.colno}") from e
    except (RecursionError, ValueError) as e:  # ValueError: a number of thousands of digits
        raise UserError(f"{path}:{line}: this JSON cannot be read: {e}") from e


# -----------------------------------------------------------------------------
# Records


def to_messages(record: Any, place: str) -> list[dict[str, str]]:
    """Return the messages of a record. UserError, with the place, if it has none of the known forms."""
    try:
        messages = [to_message(turn) for turn in find_turns(record)]
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError("there is no message of the assistant, so nothing to learn")
    except UserError as e:
        raise UserError(f"{place}: {e}") from e
    return messages


def find_turns(record: Any) -> list[Any]:
    """Return the turns of a record, each a dict."""
    if not isinstance(record, dict):
        raise UserError(f"a conversation is an object, not {json.dumps(record)[:50]}")
    if turns := record.get("messages", record.get("conversations")):
        return as_list(turns)
    if {"instruction", "output"} <= record.keys():
        question = "\n\n".join(text_of(record[key]) for key in ("instruction", "input") if record.get(key))
        return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    if {"prompt", "completion"} <= record.keys():
        turns = []
        for role, value in (("user", record["prompt"]), ("assistant", record["completion"])):
            turns += [{"role": role, "content": value}] if isinstance(value, str) else as_list(value)
        return turns
    keys = ", ".join(map(str, record)) or "nothing"
    known = "messages, conversations, instruction and output, or prompt and completion"
    raise UserError(f"it has {keys}, but not {known}")


def as_list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"messages are a list of objects, not {json.dumps(value)[:50]}")
    return value


def to_message(turn: dict[str, Any]) -> dict[str, str]:
    """Return role, content and reasoning_content of a turn."""
    said = str(turn.get("role", turn.get("from")))
    if said in TOOLS or any(turn.get(key) for key in TOOLS):
        raise UserError("it calls a tool, which is not supported: remove this conversation")
    if said not in ROLES:
        raise UserError(f"the role is {said!r}, but must be one of {', '.join(ROLES)}")
    role = ROLES[said]
    content = text_of(turn.get("content", turn.get("value")))
    if role != "system" and not content.strip():
        raise UserError(f"a message of the {role} is empty")
    message = {"role": role, "content": content}
    if isinstance(turn.get("reasoning_content"), str):
        message["reasoning_content"] = turn["reasoning_content"]
    return message


def text_of(content: Any) -> str:
    """Return a content that is text, or a list of parts that are text."""
    text = as_text(content)
    if text is None:
        raise UserError(f"the content is no text: {json.dumps(content)[:50]}")
    return text


# -----------------------------------------------------------------------------


def main() -> None:
    parser = common.Parser(FOLDER, __doc__)
    parser.add_argument("--input", metavar="PATH", help="Read the conversations from this file or folder.")
    parser.add_tokenizer()
    parser.add_val_fraction(0.1)
    parser.add_sequence_len()
    args = parser.parse_args()
    examples = read_examples(args.input)
    if len(examples) < 2:
        n = common.plural(len(examples), "conversation")
        raise UserError(f"--input={args.input} has {n}, and needs 2: one of them is held out")
    train, val = common.hold_out(examples, args.val_fraction)
    common.write_conversations(args.out_dir, train, val, args.tokenizer, args.sequence_len)


if __name__ == "__main__":
    errors.run(main)

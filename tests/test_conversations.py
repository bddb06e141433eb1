"""Conversations as rows of tokens. The oracles are the masks and renders of `transformers`."""

import importlib.util
import json
import re
import sys
import sysconfig
from pathlib import Path

import common
import numpy as np
import pytest
import tokenizers
import torch
from conftest import LLAMA, error, make_model, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_tokenizer import CHATML, TEXT, write_folder
from transformers import AutoConfig, AutoTokenizer

from data.docstrings import prepare as docstrings
from sologpt import chat_template, gguf, hf
from sologpt.conversations import Example, Row, encode_examples
from sologpt.tokenizer import PretrainedTokenizer, Tokenizer

SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<|user|>", "<|assistant|>", "<|end|>"]
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
GEMMA = """\
{{- bos_token -}}
{%- for message in messages %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim + '<end_of_turn>' }}{% endgeneration %}
    {%- else %}{{ message.content | trim + '<end_of_turn>' }}{% endif %}{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
# No special token before an answer, whose first token may be one with the space before it
LLAMA2 = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{% generation %}{{ ' ' + message.content + ' ' + eos_token }}{% endgeneration %}
    {%- else %}{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}{% endif %}
{%- endfor %}"""
BEHIND = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
    {%- else %}{{ message.content }}{% endif %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN3 = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- set thought = message.reasoning_content if message.reasoning_content is defined else '' %}
    {%- if message.role == 'assistant' and loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TAGGED = {"llama3": LLAMA3, "gemma": GEMMA, "llama2": LLAMA2}


def without_tags(template: str) -> str:
    return re.sub(r"\{% (end)?generation %\}", "", template)


def make(
    folder: Path, template: str, family: str = "smollm2", **config
) -> tuple[PretrainedTokenizer, AutoTokenizer]:
    """A tokenizer with the special tokens of many families, ours and theirs."""
    write_folder(folder, family, chat_template=template, **config)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.no_truncation()
    made.add_special_tokens(SPECIAL)
    made.save(str(folder / "tokenizer.json"))
    return hf.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def rows_of(tokenizer: Tokenizer, messages: list[dict[str, str]], sequence_len: int = 10**6) -> list[Row]:
    [example] = encode_examples(tokenizer, [Example("here", messages)], sequence_len)
    return example.rows


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str, **others: str) -> dict[str, str]:
    return {"role": "assistant", "content": content, **others}


SYSTEM = {"role": "system", "content": "Be kind, naïve 😀."}
TALKS = [
    [user("What is 2+2?"), assistant("4")],
    [SYSTEM, user("Hi\n"), assistant("Hello!\n\nWhat now?"), user("  Say é  "), assistant(" é 中文 😀 ")],
    [
        user("One"),
        assistant("two"),
        assistant("three"),
        user("Four?"),
        assistant("five"),
        user("not answered"),
    ],
]


# ---- masks


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("family", TAGGED)
def test_the_trained_tokens_are_those_of_transformers(tmp_path, family, messages, tags):
    """Theirs come from the template with {% generation %}, ours with it, or without."""
    ours, auto = make(tmp_path, TAGGED[family], {"llama2": "prepend"}.get(family, "llama3"))
    if not tags:
        ours.chat_template = without_tags(ours.chat_template)
    until = 1 + max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    theirs = auto.apply_chat_template(messages[:until], return_dict=True, return_assistant_tokens_mask=True)
    [row] = rows_of(ours, messages)
    n = len(row.ids)
    assert row.ids.tolist() == theirs["input_ids"][:n] and row.trained.tolist() == [
        x == 1 for x in theirs["assistant_masks"][:n]
    ]
    assert row.trained[-1] and not any(theirs["assistant_masks"][n:])
    first = [message["role"] for message in messages].index("assistant")
    prompt = ours.encode_chat(messages[:first])
    assert row.ids[: len(prompt)].tolist() == prompt and row.trained.argmax() == len(prompt)


@pytest.mark.parametrize("messages", TALKS)
def test_the_token_that_ends_a_turn_is_trained_if_it_is_behind_the_tag(tmp_path, messages):
    ours, auto = make(tmp_path, BEHIND)
    theirs = auto.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    [row] = rows_of(ours, messages)
    added = row.trained & (np.array(theirs["assistant_masks"][: len(row.ids)]) == 0)
    assert row.ids.tolist() == theirs["input_ids"][: len(row.ids)]
    assert row.ids[added].tolist() == [2] * sum(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize("name", ["llama3", "gemma", "gemma3", "phi3", "qwen2_5"])
def test_the_templates_of_open_models(tmp_path, name):
    """As they are, and as TRL has put the tag into them."""
    trl = importlib.util.find_spec("trl")
    if trl is None:
        pytest.skip("TRL is not installed")
    folder = Path(trl.origin).parent / "chat_templates"
    plain, tagged = ((folder / f"{name}{end}.jinja").read_text() for end in ("", "_training"))
    messages = TALKS[1][name != "gemma3" :]  # its template puts a system message before the first one
    family = "gemma" if name == "gemma3" else "llama3"
    ours, _ = make(tmp_path / "plain", plain, family)
    with_tag, auto = make(tmp_path / "tagged", tagged, family)
    theirs = auto.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    [row] = rows_of(with_tag, messages)
    n = len(row.ids)
    assert row.ids.tolist() == theirs["input_ids"][:n]
    assert row.trained.astype(int).tolist() == theirs["assistant_masks"][:n]
    answers = [ours.decode(row.ids[row.trained].tolist()) for row in rows_of(ours, messages)]
    if name == "phi3":  # writes an eos_token behind the last turn alone, so each answer is in its own row
        answers[0] = answers[0].removesuffix("<|im_end|>")
    expected = with_tag.decode(row.ids[row.trained].tolist())  # with the line breaks behind the end of a turn
    assert "".join(answers).split() == expected.split() or "".join(answers) == re.sub(
        r">\n(?!<)", ">", expected
    )


def test_old_thoughts_are_not_in_the_row_of_a_later_answer(tmp_path):
    ours, auto = make(tmp_path, QWEN3)
    messages = [user("One?"), assistant("two", reasoning_content="1+1"), user("Three?"), assistant("four")]
    rows = rows_of(ours, [*messages, user("not answered")])
    for row, n in zip(rows, (2, 4), strict=True):
        text = auto.apply_chat_template(messages[:n], tokenize=False).removesuffix("\n")
        prompt = auto.apply_chat_template(messages[: n - 1], add_generation_prompt=True, return_dict=False)
        assert row.ids.tolist() == [*prompt, *auto.encode(text[len(auto.decode(prompt)) :])]
        assert row.trained.tolist() == [i >= len(prompt) for i in range(len(row.ids))]
        assert "1+1" not in ours.decode(row.ids.tolist()) or n == 2


def test_a_space_that_ends_the_prompt_is_no_part_of_the_answer(tmp_path):
    """SentencePiece would put the space and the word into one token, and a space before each text."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    for family in ("prepend", "metaspace"):
        ours, _ = make(tmp_path / family, template, family)
        word = max((text for text in ours.tokens.values() if text[0] == "▁"), key=len)[
            1:
        ]  # ▁word is one token
        [row] = rows_of(ours, [user("What?"), assistant(word)])
        prompt = ours.encode_chat([user("What?")])
        assert row.ids[: len(prompt)].tolist() == prompt and row.trained.argmax() == len(prompt)
        assert ours.decode(row.ids.tolist()).endswith(f"assistant: {word}</s>")


TEXTS = st.text(max_size=20) | st.text("<|im_end>start \nab", max_size=40)
TEXTS |= st.sampled_from(
    ["<|im_end|>", "a<|im_end|><|im_start|>", "\ufdd0", "\ufdd1x\ufdd2", "<|im_", "end|>", "<", ">"]
)
TALK = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizers_by_kind(tmp_path_factory) -> dict[str, Tokenizer]:
    kinds = {"chatml": CHATML, "behind": BEHIND, "plain": ""}
    made = {kind: make(tmp_path_factory.mktemp(kind), template)[0] for kind, template in kinds.items()}
    made["bytes"] = Tokenizer.from_spec("bytes")
    return {kind: tokenizer.with_chat_template() for kind, tokenizer in made.items()}


@settings(max_examples=25, deadline=None)
@given(
    talks=st.lists(TALK, min_size=1, max_size=20),
    kind=st.sampled_from(["chatml", "behind", "plain", "bytes"]),
)
def test_the_trained_text_is_what_the_assistant_says(talks, kind, tokenizers_by_kind):
    """Whatever the messages are: a special token that one spells is text."""
    ours = tokenizers_by_kind[kind]
    conversations = [[m for q, a in talk for m in (user(q), assistant(a))] for talk in talks]
    examples = [Example("here", messages) for messages in conversations]
    special = set(ours.special_ids.values())
    for example, talk in zip(encode_examples(ours, examples, 10**6), talks, strict=True):
        [row] = example.rows
        prompt = ours.encode_chat(example.messages[:1])
        assert row.ids[: len(prompt)].tolist() == prompt and row.trained.argmax() == len(prompt)
        ends = np.isin(row.ids, list(special)) & row.trained
        assert ends.sum() == len(talk) and set(row.ids[ends].tolist()) == {ours.eos_tokens[0]}
        starts = np.flatnonzero(row.trained & ~np.r_[False, row.trained[:-1]])
        said = [ours.decode(row.ids[a:b].tolist()) for a, b in zip(starts, np.flatnonzero(ends), strict=True)]
        expected = [chat_template.RESERVED.sub("", a) for _, a in talk]
        assert said == [
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in expected
        ]


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "without a special token"),
        ("{% for m in messages %}{{ m.content + eos_token }}!{% endfor %}", "without a special token"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "without a special",
        ),
        (CHATML.replace("assistant\n' }}{% endif", "model\n' }}{% endif"), "with its generation prompt"),
        (
            "{{ raise_exception('no') if messages[0].content == 'One' }}" + CHATML,
            "rejects this conversation: no",
        ),
    ],
)
def test_a_template_that_cannot_be_trained_is_an_error_that_names_the_place(tmp_path, template, words):
    ours, _ = make(tmp_path, template)
    examples = [Example(f"file:{i}", talk) for i, talk in enumerate(TALKS)]
    with pytest.raises(ValueError, match=rf"file:{2 if 'raise' in template else 0}: .*{words}"):
        list(encode_examples(ours, examples, 1000))


def test_one_conversation_that_takes_for_ever_does_not_spoil_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 3)
    loop = "{% if messages[0].content == 'One' %}{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}"
    ours, _ = make(tmp_path, loop + "{% endfor %}{% endif %}" + CHATML)
    examples = [Example(f"file:{i}", talk) for i, talk in enumerate(TALKS)]
    with pytest.raises(ValueError, match="file:2: the chat template takes more than 3 s"):
        list(encode_examples(ours, examples, 1000))
    assert len(list(encode_examples(ours, examples[:2], 1000))) == 2


def test_one_process_renders_many_conversations(tmp_path):
    ours, _ = make(tmp_path, CHATML)
    expected = [rows_of(ours, talk)[0].ids for talk in TALKS]
    before = chat_template.WORKER.process
    done = list(encode_examples(ours, (Example("here", TALKS[i % 3]) for i in range(500)), 1000))
    assert len(done) == 500 and chat_template.WORKER.process is before
    assert all((example.rows[0].ids == expected[i % 3]).all() for i, example in enumerate(done))


# ---- too long


@pytest.mark.parametrize("template", [CHATML, BEHIND, QWEN3])
@pytest.mark.parametrize("system", [True, False])
def test_the_oldest_turns_are_dropped_until_it_fits(tmp_path, template, system):
    """The longest end of the conversation that fits, found by trying all."""
    ours, _ = make(tmp_path, template)
    messages = [SYSTEM] * system
    for i in range(8):
        messages += [user(f"{i}" * (7 * i % 11)), assistant(f"word{i} " * (5 * i % 13))]
    for row in rows_of(ours, messages)[::3]:
        last = ours.decode(row.ids[row.trained].tolist())  # the answers of this row
        ends = [
            i
            for i, m in enumerate(messages)
            if m["role"] == "assistant" and f"{m['content']}<|im_end|>" in last
        ]
        if template != QWEN3:
            assert len(ends) == 8
        talk = messages[: ends[-1] + 1]
        starts = range(system, ends[-1], 2)
        ends_of_talk = [Example("here", messages[:system] + talk[start:]) for start in starts]
        candidates = [example.rows[-1] for example in encode_examples(ours, ends_of_talk, 10**6)]
        for sequence_len in range(20, len(row.ids), 1 + len(row.ids) // 6):
            [example] = encode_examples(ours, [Example("here", talk)], sequence_len)
            fitting = [found for found in candidates if len(found.ids) <= sequence_len]
            if fitting:
                made = [(found.ids.tolist(), found.trained.tolist()) for found in example.rows]
                assert (fitting[0].ids.tolist(), fitting[0].trained.tolist()) in made
                assert example.shortened >= 1
            else:
                assert example.too_long >= 1


def test_no_more_turns_are_dropped_where_old_thoughts_stay(tmp_path):
    """The first turn is long by what the assistant thought in it: without that one, the others fit."""
    ours, _ = make(tmp_path, QWEN3.replace(" and loop.last", ""))
    messages = [user("One?"), assistant("two", reasoning_content="word " * 200)]
    for i in range(4):
        messages += [user(f"{i}?"), assistant(f"{i}!")]
    [expected] = rows_of(ours, messages[2:])
    [row] = rows_of(ours, messages, len(expected.ids))
    assert row.ids.tolist() == expected.ids.tolist() and row.trained.tolist() == expected.trained.tolist()


# ---- prepare.py

PREPARE = "data/chat/prepare.py"
FORMATS = {
    "messages": lambda q, a: {"messages": [user(q), assistant(a)], "id": 1},
    "parts": lambda q, a: {
        "messages": [user([{"type": "text", "text": q[:3]}, {"type": "text", "text": q[3:]}]), assistant(a)]
    },
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "roles": lambda q, a: {"conversations": [user(q), assistant(a)]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "completion": lambda q, a: {"prompt": q, "completion": a},
    "lists": lambda q, a: {"prompt": [user(q)], "completion": [assistant(a)]},
}


def read(folder: Path, split: str) -> tuple[dict, list[tuple[list[int], list[int]]]]:
    """meta.json, and the rows of a split: ids, and which are trained."""
    meta = json.loads((folder / "meta.json").read_text())
    ids = np.fromfile(folder / f"{split}.bin", dtype={"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
    trained = np.fromfile(folder / f"{split}_trained.bin", dtype=np.uint8)
    starts = np.fromfile(folder / f"{split}_rows.bin", dtype="<i8")
    assert starts[0] == 0 and starts[-1] == len(ids) == len(trained) == meta[f"{split}_tokens"]
    cut = zip(np.split(ids, starts[1:-1]), np.split(trained, starts[1:-1]), strict=True)
    return meta, [(a.tolist(), b.tolist()) for a, b in cut]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("array", [False, True])
def test_each_format_gives_the_same_rows(tmp_path, form, array):
    records = [FORMATS[form](f"What is {i} é?", f"It is {i}.") for i in range(10)]
    lines = (
        json.dumps(records, indent=1)
        if array
        else "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    )
    (tmp_path / "in.json").write_text(lines + "\n", encoding="utf-8-sig" if array else "utf-8")
    out = run(
        PREPARE, "--input", tmp_path / "in.json", "--out_dir", tmp_path / "out", "--val_fraction=0.2"
    ).stdout
    tokenizer = Tokenizer.from_spec("bytes").with_chat_template()
    for split, numbers in (("train", [0, 1, 2, 3, 5, 6, 7, 8]), ("val", [4, 9])):
        meta, rows = read(tmp_path / "out", split)
        prompts = [f"user\nWhat is {i} é?<|endoftext|>assistant\n" for i in numbers]
        answers = [f"It is {i}." for i in numbers]
        for (ids, trained), prompt, answer in zip(rows, prompts, answers, strict=True):
            assert tokenizer.decode(ids) == f"{prompt}{answer}<|endoftext|>"
            assert trained == [0] * (len(ids) - len(answer) - 1) + [1] * (len(answer) + 1)
        assert meta[f"{split}_rows"] == len(numbers) and meta[f"{split}_bytes"] == len("".join(answers))
        assert meta[f"{split}_trained"] == len("".join(answers)) + len(answers)
        assert meta[f"{split}_max_token"] == 256 and meta["sequence_len"] == 1024
    assert Tokenizer.from_dict(meta["tokenizer"]).chat_template == chat_template.PLAIN
    assert "[[It is 0.<|endoftext|>]]" in out and "8 conversations, 8 rows" in out
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == sorted(common.ROW_FILES)


def test_a_folder_and_alpacas_input_and_escape_sequences(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    first = {"instruction": "Add", "input": "1 2", "output": "3\x1b[31m"}
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(first))
    (tmp_path / "in" / "deep" / "b.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}]))
    (tmp_path / "in" / "notes.txt").write_text("no conversation")
    out = run(PREPARE, "--input", tmp_path / "in", "--out_dir", tmp_path / "out").stdout
    _, [(ids, _)] = read(tmp_path / "out", "train")
    assert (
        Tokenizer.from_spec("bytes")
        .decode(ids)
        .startswith("user\nAdd\n\n1 2<|endoftext|>assistant\n3\x1b[31m")
    )
    assert "\x1b" not in out and "[[3\ufffd[31m" in out


GOOD = json.dumps({"prompt": "a", "completion": "b"})


@pytest.mark.parametrize(
    "content, words",
    [
        (f"{GOOD}\n{{", "in.jsonl:2: this is not JSON"),
        (f"{GOOD}\n\n3", "in.jsonl:3: a conversation is an object, not 3"),
        (f"{GOOD}\n" + "[" * 100_000, "in.jsonl:2: "),
        (GOOD.encode() + b'\n{"prompt": "\xff"}', "in.jsonl:2: this is not UTF-8 text"),
        ("[" + GOOD + ",\n\n{]", "in.jsonl:3: this is not JSON"),
        ("[" + GOOD + ', {"text": "a"}]', r"in.jsonl\[1\]: it has text, but not messages"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "in.jsonl:1: there is no message of the assistant",
        ),
        ('{"messages": [{"role": "boss", "content": "a"}]}', "in.jsonl:1: the role is 'boss'"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "in.jsonl:1: the role is"),
        ('{"messages": [{"content": "a"}]}', "in.jsonl:1: the role is 'None'"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "in.jsonl:1: it calls a tool"),
        (
            '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}',
            "in.jsonl:1: it calls a tool",
        ),
        (
            '{"messages": [{"role": "assistant", "content": " "}]}',
            "in.jsonl:1: a message of the assistant is empty",
        ),
        ('{"messages": [{"role": "user", "content": null}]}', "in.jsonl:1: the content is no text: null"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "in.jsonl:1: the content is no text",
        ),
        ('{"messages": "hello"}', "in.jsonl:1: messages are a list of objects"),
        ('{"messages": [1]}', "in.jsonl:1: messages are a list of objects"),
        ('{"messages": []}', "in.jsonl:1: it has messages, but not"),
        (GOOD, "has 1 conversation, and needs 2"),
        ("", "has 0 conversations, and needs 2"),
    ],
)
def test_a_record_that_does_not_fit_is_one_line_with_its_place(tmp_path, content, words):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.search(words, error(PREPARE, "--input", path, "--out_dir", tmp_path / "out"))
    assert not (tmp_path / "out" / "meta.json").exists()


def test_bad_arguments_are_one_line(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}")
    out = ["--out_dir", tmp_path / "out"]
    assert "--input is missing" in error(PREPARE, *out)
    assert "does not exist" in error(PREPARE, *out, "--input", tmp_path / "no")
    assert "at least 2" in error(PREPARE, *out, "--input", path, "--sequence_len=1")
    assert "no conversation is left" in error(PREPARE, *out, "--input", path, "--sequence_len=9")
    (tmp_path / "empty").mkdir()
    assert "no .jsonl or .json" in error(PREPARE, *out, "--input", tmp_path / "empty")


def test_the_tokenizer_of_a_base_model_gets_the_token_that_ends_a_turn(tmp_path):
    """Base models of Qwen have ChatML's template, but end a text with <|endoftext|>."""
    folder = write_folder(tmp_path / "base", "smollm2", chat_template=CHATML, eos_token="<|endoftext|>")
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 0}')
    base = hf.load_tokenizer(folder)
    model = make_model(torch.float32, vocab_size=base.vocab_size, sequence_len=96)
    model.save(tmp_path / "best.pt", tokenizer=base.to_dict())
    (tmp_path / "in.jsonl").write_text(f"{GOOD}\n{GOOD}")
    run(PREPARE, "--input", tmp_path / "in.jsonl", "--out_dir", tmp_path, "--tokenizer", tmp_path / "best.pt")
    meta, [(ids, _)] = read(tmp_path, "train")
    made = Tokenizer.from_dict(meta["tokenizer"])
    assert (base.eos_tokens, made.eos_tokens) == ([0], [0, 2]) and ids[-1] == 2 and meta["sequence_len"] == 96
    assert made.has_ids_of(base) and base.has_ids_of(made) and made.to_dict() != base.to_dict()
    other = write_folder(tmp_path / "other", "gpt2", chat_template=CHATML)
    assert not made.has_ids_of(hf.load_tokenizer(other)) and not made.has_ids_of(Tokenizer.from_spec("bytes"))


@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["some", "all"])
def test_docstrings_answer_questions_and_hold_out_modules(some, tmp_path, monkeypatch):
    """Of some modules, or of all."""
    if some:
        stdlib, folder = Path(sysconfig.get_paths()["stdlib"]), tmp_path / "stdlib"
        folder.mkdir()
        for path in stdlib.glob("[op]*.py"):
            (folder / path.name).symlink_to(path)
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    flags = ["--tokenizer=stdlib", "--sequence_len=128", f"--out_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *flags])
    docstrings.main()
    tokenizer = common.open_tokenizer("stdlib")
    texts = {}
    for split in ("train", "val"):
        _, rows = read(tmp_path, split)
        assert max(len(ids) for ids, _ in rows) <= 128
        texts[split] = [tokenizer.decode(ids) for ids, _ in rows]
    assert any(
        text.startswith(
            "user\nWhat does os.path.join do?<|endoftext|>assistant\nJoin two or more pathname components"
        )
        for text in texts["train"]
    )
    answers = {split: {text.split("assistant\n")[1] for text in texts[split]} for split in texts}
    n = (500, 10) if some else (5000, 100)
    assert len(texts["train"]) > n[0] and len(texts["val"]) > n[1] and not answers["train"] & answers["val"]


# ---- exports


def as_prepared(name: str, folder: Path) -> Tokenizer:
    """Of a dataset of conversations: the plain template, or ChatML's with an eos token more."""
    if name in ("bytes", "stdlib"):
        return common.open_tokenizer(name).with_chat_template()
    family, template = ("smollm2", CHATML) if name == "chatml" else (name, "")
    eos = {} if family == "prepend" else {"eos_token": "<|endoftext|>"}
    write_folder(folder, family, chat_template=template, **eos)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = hf.load_tokenizer(folder).with_chat_template()
    return tokenizer.with_eos_tokens([2]) if name == "chatml" else tokenizer


@pytest.mark.parametrize("name", ["bytes", "stdlib", "gpt2", "prepend", "chatml"])
def test_the_template_and_all_eos_tokens_are_in_both_exports(tmp_path, name, monkeypatch):
    # SentencePiece has no token with a NUL
    monkeypatch.setattr("test_hf_tokenizer.TEXT", TEXT.replace("\0", ""))
    tokenizer = as_prepared(name, tmp_path / "tokenizer")
    again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.eos_tokens == tokenizer.eos_tokens and again.chat_template == tokenizer.chat_template
    assert tokenizer.eos_tokens == {"chatml": [0, 2], "gpt2": [0], "prepend": [2]}.get(name, [tokenizer.eot])
    model = make_model(torch.float32, **LLAMA, vocab_size=tokenizer.vocab_size)
    hf.save(model, tokenizer, tmp_path / "hf")
    auto = AutoTokenizer.from_pretrained(tmp_path / "hf")
    question = TALKS[1][:2]
    ids = tokenizer.encode_chat(question)
    assert auto.apply_chat_template(question, add_generation_prompt=True, return_dict=False) == ids
    eos = AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id
    assert (eos if isinstance(eos, list) else [eos]) == tokenizer.eos_tokens
    assert hf.load_tokenizer(tmp_path / "hf").eos_tokens == tokenizer.eos_tokens

    pytest.importorskip("gguf")
    gguf.save(model, tokenizer, tmp_path / "m.gguf")
    back = gguf.load(tmp_path / "m.gguf")[1]
    assert (back.eos_tokens, back.encode_chat(question)) == (tokenizer.eos_tokens, ids)
    llama_cpp = pytest.importorskip("llama_cpp")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    ends = [i for i in range(tokenizer.vocab_size) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    assert set(tokenizer.eos_tokens) <= set(ends)
    eos, bos = (tokenizer.special_tokens[key] for key in ("eos_token", "bos_token"))
    formatter = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos, bos)
    prompt = formatter(messages=question).prompt
    assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == ids


def test_the_plain_template_begins_with_bos_where_a_prompt_does(tmp_path):
    for family, begins in (("llama3", "<|im_start|>"), ("gpt2", ""), ("prepend", "<s>")):
        tokenizer = hf.load_tokenizer(write_folder(tmp_path / family, family)).with_chat_template()
        text = chat_template.RESERVED.sub("", tokenizer.render_chat([user("a")]))
        assert text == f"{begins}user\na{tokenizer.special_tokens['eos_token']}assistant\n"
        assert tokenizer.with_chat_template() is tokenizer

"""Training on conversations: which batches there are, and what a step trains on."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parallel import records, together

import gpt
from gpt import GPT, GPTConfig
from sologpt import data, gguf
from sologpt.data import Conversations, Rows
from sologpt.load import load_model
from sologpt.stream import stream_text
from sologpt.tokenizer import Tokenizer

CPU = torch.device("cpu")


def make_rows(lengths, seed=0) -> tuple[np.ndarray, Rows]:
    """Random tokens, of which some are trained: at least one in each row, never its first."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(1, 61, starts[-1])
    trained = (rng.random(starts[-1]) < 0.5).astype(np.uint8)
    trained[starts[1:] - 1] = 1
    trained[starts[:-1]] = 0
    return tokens, Rows(starts, trained)


lengths = st.lists(st.integers(2, 30), min_size=1, max_size=60)


@given(lengths, st.integers(1, 9), st.integers(0, 99))
def test_every_conversation_comes_once_an_epoch(lengths, batch_size, seed):
    rows = Conversations(*make_rows(lengths))
    per_epoch = -(-len(lengths) // batch_size)
    epochs = []
    for epoch in range(2):
        batches = [
            rows.draw(seed, step, 1, batch_size)[0][0]
            for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
        ]
        assert sorted(np.concatenate(batches)) == [*range(len(lengths))]
        assert all(0 < len(batch) <= batch_size for batch in batches)
        epochs.append([batch.tolist() for batch in batches])
    if len(lengths) > 20:
        assert epochs[0] != epochs[1]
    # The same steps in another order, and in steps of several micro-batches
    fresh = Conversations(*make_rows(lengths))
    both = epochs[0] + epochs[1]
    for step in random.Random(0).sample(range(len(both)), min(5, len(both))):
        assert fresh.draw(seed, step, 1, batch_size)[0][0].tolist() == both[step]
    for step in range(len(both) // 3):
        assert [b.tolist() for b in fresh.draw(seed, step, 3, batch_size)[0]] == both[3 * step : 3 * step + 3]


@given(lengths, st.integers(1, 9), st.integers(1, 9))
def test_an_evaluation_takes_each_conversation_at_most_once(lengths, n, batch_size):
    batches = Conversations(*make_rows(lengths)).spread(n, batch_size)
    taken = np.concatenate(batches)
    assert len(taken) == len({*taken}) == min(n * batch_size, len(lengths)) and len(batches) <= n


def test_rows_of_similar_lengths_are_together():
    """Padding costs a tenth of what it costs in batches of any rows."""
    sizes = np.random.default_rng(0).integers(2, 500, 5000)
    rows = Conversations(*make_rows(sizes))

    def padding(batches):
        return sum(int((sizes[batch].max() - sizes[batch]).sum()) for batch in batches)

    ours = rows.draw(0, 0, 625, 8)[0]
    assert padding(ours) < 0.1 * padding(data.split(np.random.default_rng(0).permutation(5000), 8))
    firsts = [sizes[batch].max() for batch in ours[:100]]
    assert firsts != sorted(firsts), "no short ones first"


@given(lengths, st.integers(0, 99))
def test_a_batch_is_its_rows(lengths, seed):
    """Padding is found by its position: its id, 0, is a token of rows as well."""
    tokens, where = make_rows(lengths, seed)
    tokens[::3] = 0
    rows = Conversations(tokens, where)
    batch = np.random.default_rng(seed).permutation(len(lengths))[:4]
    x, y = rows.get(batch, CPU)
    assert (
        x.shape == y.shape == (len(batch), max(lengths[r] for r in batch) - 1)
        and x.dtype == y.dtype == torch.int64
    )
    assert rows.n_targets(batch) == (y != -1).sum() and rows.n_tokens(batch) == sum(
        lengths[r] - 1 for r in batch
    )
    for i, r in enumerate(batch):
        a, b = where.starts[r], where.starts[r + 1]
        row, n = tokens[a:b].tolist(), b - a - 1
        assert x[i, :n].tolist() == row[:-1] and (x[i, n:] == 0).all() and (y[i, n:] == -1).all()
        assert y[i, :n].tolist() == [
            t if k else -1 for t, k in zip(row[1:], where.trained[a + 1 : b], strict=True)
        ]


def test_the_question_ends_where_the_last_answer_begins():
    tokens = np.arange(20)
    trained = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], np.uint8)
    rows = Conversations(tokens, Rows(np.array([0, 10, 20]), trained))
    assert rows.question(0) == [*range(7)] and rows.question(1) == [10]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 20), min_size=4, max_size=9), st.integers(0, 99))
def test_padding_and_other_rows_change_no_loss(lengths, seed):
    """The loss of a batch is that of transformers' labels: the sum over rows alone, over the number of targets."""
    rows = Conversations(*make_rows(lengths, seed))
    model = make_model(seed=seed)
    batch = np.arange(len(lengths))
    x, y = rows.get(batch, CPU)
    whole = model(x, y, loss_reduction="sum")
    alone = [model(*rows.get(batch[i : i + 1], CPU), loss_reduction="sum") for i in batch]
    torch.testing.assert_close(whole, sum(alone), rtol=1e-10, atol=1e-10)
    labels = y.masked_fill(y == -1, -100)
    theirs = F.cross_entropy(model(x).flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(whole / rows.n_targets(batch), theirs, rtol=1e-10, atol=1e-10)


# ---- with train.py


def write(folder, splits, tokenizer, sequence_len=32):
    """A prepared dataset of conversations: lists of (ids, trained)."""
    folder.mkdir()
    meta = {"tokenizer": tokenizer.to_dict(), "dtype": "uint16", "sequence_len": sequence_len}
    for name, rows in splits.items():
        ids, trained = (np.concatenate(part) for part in zip(*rows, strict=True))
        ids.astype("<u2").tofile(folder / f"{name}.bin")
        trained.astype(np.uint8).tofile(folder / f"{name}_trained.bin")
        np.cumsum([0, *(len(row) for row, _ in rows)]).astype("<i8").tofile(folder / f"{name}_rows.bin")
        meta |= {
            f"{name}_tokens": len(ids),
            f"{name}_bytes": int(trained.sum()),
            f"{name}_max_token": int(ids.max()),
        }
        meta |= {f"{name}_rows": len(rows), f"{name}_trained": int(trained.sum())}
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Rows like "7+1=8": what follows the sign is trained."""
    folder = tmp_path_factory.mktemp("chat") / "data"
    tokenizer = Tokenizer.from_spec("bytes").with_chat_template()
    rows = []
    for i in range(150):
        question, answer = f"{i}+1=".encode(), f"{i + 1}".encode() * (1 + i % 5)
        ids = [*question, *answer, tokenizer.eot]
        rows.append((np.array(ids), np.array([0] * len(question) + [1] * (len(answer) + 1))))
    write(folder, {"train": rows[30:], "val": rows[:30]}, tokenizer)
    return folder


SIZE = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--sequence_len=32",
    "--batch_size=4",
    "--learning_rate=0.02",
]
FLAGS = [*SIZE, "--log_interval=1", "--eval_interval=10", "--max_iters=20", "--gradient_accumulation_steps=2"]


@pytest.fixture(scope="module")
def chatting(questions, tmp_path_factory):
    """The out_dir of a run, and what it printed."""
    out = tmp_path_factory.mktemp("out")
    return out, run("train.py", *FLAGS, f"--dataset={questions}", f"--out_dir={out}").stdout


def test_a_run_trains_on_the_answers(chatting, questions):
    out, printed = chatting
    assert "8 conversations a step, 120 to train on: an epoch is 15.0 steps" in printed
    assert printed.split("\n\n")[1].startswith("0+1="), "the sample is an answer to a held-out question"
    assert "sample.py --ckpt" in printed and "--chat --interactive" in printed
    lines = records(out)
    model, tokenizer, about = load_model(out / "best.pt")
    assert tokenizer.chat_template and about["train_config"]["sequence_len"] == 32
    # The metrics, by other means: the loss over the trained tokens of all held-out rows
    rows = data.load(questions).rows["val"]
    val = np.fromfile(questions / "val.bin", "<u2").astype(np.int64)
    losses = []
    for a, b in zip(rows.starts, rows.starts[1:], strict=False):
        logp = model(torch.from_numpy(val[None, a : b - 1])).log_softmax(-1)[0]
        trained = torch.from_numpy(np.array(rows.trained[a + 1 : b])).bool()
        losses.append(-logp[range(b - a - 1), val[a + 1 : b]][trained])
    expected = torch.cat(losses).mean().item()
    assert abs(min(line["val_loss"] for line in lines if "val_loss" in line) - expected) < 1e-4
    assert lines[-1]["val_loss"] < 0.6 * lines[0]["val_loss"]


@pytest.mark.parametrize("steps", [7, 16])
def test_a_stopped_run_goes_on_exactly(chatting, questions, tmp_path, steps):
    flags = [*FLAGS, f"--dataset={questions}", f"--out_dir={tmp_path}", "--sample_tokens=0"]
    run("train.py", *flags, f"--max_iters={steps}", "--warmdown=0")
    run("train.py", *flags, "--max_iters=20", "--warmdown=0", "--init_from=resume")
    whole = tmp_path / "whole"
    run("train.py", *flags, f"--out_dir={whole}", "--max_iters=20", "--warmdown=0")
    a, b = (GPT.load(path / "ckpt.pt").state_dict() for path in (tmp_path, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("accumulation, batch_size", [(1, 8), (2, 4), (8, 1)])
def test_a_step_is_the_mean_over_its_trained_tokens(
    questions, tmp_path, monkeypatch, accumulation, batch_size
):
    """However its rows are divided: the same 8 rows, with another number of targets in each part."""
    order = np.random.default_rng(0).permutation(120)
    monkeypatch.setattr(Conversations, "draw_epoch", lambda self, seed, epoch, size: data.split(order, size))
    import train

    flags = [*SIZE, f"--dataset={questions}", f"--out_dir={tmp_path}", "--max_iters=3", "--sample_tokens=0"]
    flags += [
        f"--batch_size={batch_size}",
        f"--gradient_accumulation_steps={accumulation}",
        "--log_interval=1",
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *flags, "--optimizer=adamw", "--eval_interval=100"])
    train.main()
    rows = data.load(questions).batches("train", 32)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(sequence_len=32, vocab_size=257, n_layer=2, n_head=2, n_embd=16))
    x, y = rows.get(order[:8], CPU)
    loss = model(x, y)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    first = records(tmp_path)[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def numbers(folder, *keys) -> list[float]:
    return [line[key] for line in records(folder) for key in keys if key in line]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--shard"], ["--activation_checkpointing"]])
def test_two_processes_train_as_one_does(chatting, questions, tmp_path, flags):
    together(2, *FLAGS, f"--dataset={questions}", f"--out_dir={tmp_path}", "--sample_tokens=0", *flags)
    keys = ("loss", "val_loss", "grad_norm")
    assert numbers(tmp_path, *keys) == pytest.approx(numbers(chatting[0], *keys), rel=1e-3)


@pytest.mark.slow
def test_compiled_training_on_conversations(chatting, questions, tmp_path):
    """Batches differ in their length."""
    flags = [*FLAGS, f"--dataset={questions}", f"--out_dir={tmp_path}", "--sample_tokens=0", "--compile"]
    run("train.py", *flags, "--max_iters=5", "--warmdown=0")
    assert numbers(tmp_path, "loss") == pytest.approx(numbers(chatting[0], "loss")[:5], rel=1e-3)


def test_frozen_parameters_stay_and_a_run_with_them_resumes_exactly(questions, tmp_path, monkeypatch):
    import train

    begin = train.run.begin

    def frozen(*args):
        state, dataset = begin(*args)
        state.model.wte.requires_grad_(False)
        state.model.h[0].requires_grad_(False)
        return state, dataset

    monkeypatch.setattr(train.run, "begin", frozen)
    flags = [*FLAGS, f"--dataset={questions}", "--sample_tokens=0", "--warmdown=0"]
    for out, more in (
        ("a", ["--max_iters=6"]),
        ("b", ["--max_iters=3"]),
        ("b", ["--max_iters=6", "--init_from=resume"]),
    ):
        monkeypatch.setattr("sys.argv", ["train.py", *flags, f"--out_dir={tmp_path / out}", *more])
        train.main()
    a, b = (GPT.load(tmp_path / out / "ckpt.pt").state_dict() for out in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    torch.manual_seed(1337)
    fresh = GPT(gpt.GPTConfig(sequence_len=32, vocab_size=257, n_layer=2, n_head=2, n_embd=16)).state_dict()
    for name in a:
        assert torch.equal(a[name], fresh[name]) is name.startswith(("wte", "h.0.")), name


# ---- what is wrong with a dataset


def test_conversations_that_do_not_fit_are_an_error(questions, tmp_path):
    with pytest.raises(
        ValueError, match=r"conversation of \d+ tokens, but --sequence_len=8: give it to prepare\.py"
    ):
        data.load(questions).check(8, 257)


@pytest.mark.parametrize("damage", ["missing", "short", "rows", "targets", "order"])
def test_damaged_rows_are_an_error(questions, tmp_path, damage):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in questions.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    rows, trained = folder / "train_rows.bin", folder / "train_trained.bin"
    starts = np.fromfile(rows, "<i8")
    if damage == "missing":
        rows.unlink()
    elif damage == "short":
        trained.write_bytes(trained.read_bytes()[:-1])
    elif damage == "rows":
        rows.write_bytes(b"")
    elif damage == "targets":
        trained.write_bytes(bytes(len(trained.read_bytes())))
    else:
        starts[[3, 4]] = starts[[4, 3]]
        starts.tofile(rows)
    with pytest.raises(ValueError, match=r"train_rows\.bin or train_trained\.bin .*run prepare\.py again"):
        data.load(folder)


# ---- from a file to other programs


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ["--lora_rank=4", "--lora_alpha=8"]])
def test_what_it_learned_is_answered_by_llama_cpp_through_its_own_template(tmp_path, lora):
    """And it stops. The tokenizer had no template: the plain one is in the checkpoint and in the file."""
    llama_cpp = pytest.importorskip("llama_cpp")
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{i} plus 1?"},
                {"role": "assistant", "content": f"{i + 1}!"},
            ]
        }
        for i in range(10, 60)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    size = [
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=64",
        "--n_hidden=128",
        "--sequence_len=64",
        "--norm_weight",
    ]
    size += ["--mlp=swiglu", "--softcap=0", "--qk_norm=false", "--embd_norm=false"]
    prepare = ["data/chat/prepare.py", "--input", tmp_path / "chats.jsonl", "--out_dir", tmp_path / "data"]
    run(*prepare, "--tokenizer=bytes", "--sequence_len=64")
    train = [
        "train.py",
        f"--dataset={tmp_path / 'data'}",
        "--sample_tokens=0",
        "--eval_interval=200",
        "--batch_size=8",
    ]
    run(*train, *size, f"--out_dir={tmp_path / 'base'}", "--max_iters=200")
    out = tmp_path / "base"
    if lora:
        out = tmp_path / "tuned"
        run(
            *train,
            *lora,
            f"--out_dir={out}",
            f"--init_from={tmp_path / 'base' / 'best.pt'}",
            "--max_iters=20",
        )
    gguf.main(["export", str(out), str(tmp_path / "it.gguf")])
    theirs = llama_cpp.Llama(str(tmp_path / "it.gguf"), n_ctx=64, verbose=False)
    model, tokenizer, _ = load_model(out)
    for i in (12, 33, 47):
        messages = [{"role": "user", "content": f"{i} plus 1?"}]
        ours = stream_text(model, tokenizer, messages, 30, temperature=0)
        answer = "".join(ours)
        choice = theirs.create_chat_completion(messages, max_tokens=30, temperature=0)["choices"][0]
        assert choice["message"]["content"] == answer and answer.endswith("!")
        assert (choice["finish_reason"], ours.reason) == ("stop", "stop")

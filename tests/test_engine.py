"""The engine beside `GPT.generate`: every request gets what it would get alone."""

import gc
import math
import random
import re
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from conftest import GPT2, LLAMA, ROOT, WINDOWS, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import GPT, KVCache
from sologpt import native
from sologpt.engine import Engine, Piece, QueueFull, Request, fitting_len
from sologpt.errors import RunError, UserError
from sologpt.stream import stream_text
from sologpt.tokenizer import Tokenizer

BYTES = Tokenizer.from_spec("bytes").with_chat_template()


def byte_model(**config) -> GPT:
    """Of 257 ids and 3 that are no tokens."""
    return make_model(**dict(vocab_size=260, sequence_len=64) | config).eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return byte_model()


class Answer:
    """What a request receives."""

    def __init__(self, engine: Engine, prompt, max_tokens=20, submit: bool = True, **settings) -> None:
        self.pieces: list[Piece] = []
        self.queue: SimpleQueue[Piece] = SimpleQueue()
        self.request: Request = engine.request(prompt, max_tokens, receive=self.queue.put, **settings)
        if submit:
            engine.submit(self.request)

    def next(self) -> Piece:
        self.pieces.append(self.queue.get(timeout=60))
        return self.pieces[-1]

    def wait(self) -> "Answer":
        while not (self.pieces and self.pieces[-1].reason):
            self.next()
        return self

    text = property(lambda self: "".join(piece.text for piece in self.pieces))
    tokens = property(lambda self: [token for piece in self.pieces for token in piece.tokens])
    ids = property(lambda self: [token.id for token in self.tokens])
    reason = property(lambda self: self.pieces[-1].reason)


def alone(model: GPT, prompt, max_tokens=20, **settings):
    """The text, ids and reason of a stream of its own."""
    stream = stream_text(model, BYTES, prompt, max_tokens, **settings)
    return "".join(stream), stream.tokens, stream.reason


def is_idle(engine: Engine) -> bool:
    for _ in range(1000):
        if not (engine.running or engine.prefilling or engine.active):
            return True
        time.sleep(0.01)
    return False


requests = st.lists(
    st.tuples(
        st.lists(st.sampled_from([65, 66, 200, 256]), min_size=1, max_size=30),  # ids, often alike
        st.integers(1, 34),  # max_tokens
        st.sampled_from(
            [
                dict(temperature=0),
                dict(temperature=0, repetition_penalty=1.3),
                dict(top_k=5, seed=1),
                dict(top_p=0.9, min_p=0.01, temperature=1.5, seed=2),
            ]
        ),
        st.sampled_from([(), "A", ["B", "\ufffd"]]),  # stop
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=15, deadline=None)
@given(requests, st.integers(1, 4), st.integers(1, 9), st.sampled_from([{}, LLAMA, GPT2, WINDOWS]))
def test_each_request_gets_what_it_would_get_alone(requests, rows, chunk, config):
    model = byte_model(**config)
    with closing(Engine(model, BYTES, rows, chunk=chunk)) as engine:
        answers = [Answer(engine, p, n, stop=stop, **s) for p, n, s, stop in requests]
        for answer, (prompt, n, sampling, stop) in zip(answers, requests, strict=True):
            answer.wait()
            text, ids, reason = alone(model, prompt, n, stop=stop, **sampling)
            assert (answer.text, answer.request.answer.tokens, answer.reason) == (text, ids, reason)
            assert answer.ids == ids[: len(answer.ids)]
        assert is_idle(engine)


def test_requests_that_come_while_others_run(model):
    with closing(Engine(model, BYTES, rows=3, chunk=4)) as engine:
        answers = []
        for i in range(12):
            answers.append((Answer(engine, [i + 1] * (5 * i + 1), 9, temperature=0), [i + 1] * (5 * i + 1)))
            answers[i // 2][0].next()  # some steps pass
        for answer, prompt in answers:
            assert answer.wait().request.answer.tokens == alone(model, prompt, 9, temperature=0)[1]


def test_generate_from_threads(model):
    engine = Engine(model, BYTES, rows=2)
    prompts = [f"prompt {i}" for i in range(6)]
    texts: dict[str, str] = {}

    def work(prompt: str) -> None:
        texts[prompt] = "".join(engine.generate(prompt, 20, temperature=0))

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == {prompt: alone(model, prompt, temperature=0)[0] for prompt in prompts}
    engine.close()
    assert not engine.thread.is_alive()


def test_messages(model):
    messages = [{"role": "user", "content": "Hello"}]
    with closing(Engine(model, BYTES)) as engine:
        assert "".join(engine.generate(messages, 20)) == alone(model, messages)[0]


# ---- Prefixes


def test_the_next_turn_of_a_chat_prefills_only_what_is_new(model):
    with closing(Engine(model, BYTES, rows=3)) as engine:
        first = Answer(engine, [7] * 20, 10, temperature=0).wait()
        prompt = [7] * 20 + first.request.answer.tokens + [8, 9]
        second = Answer(engine, prompt, 10, temperature=0).wait()
        assert second.request.cached == 29  # all but the last token of the answer, which was not read
        assert second.request.answer.tokens == alone(model, prompt, 10, temperature=0)[1]
        assert engine.cache.lengths.tolist() == [41, 0, 0]  # its row went on


def test_a_system_prompt_is_shared_with_rows_that_run(model):
    with closing(Engine(model, BYTES, rows=3)) as engine:
        system = [*range(30)]
        running = Answer(engine, [*system, 1], 33, temperature=0)
        running.next()
        others = [Answer(engine, [*system, 2 + i], 10, temperature=0) for i in range(4)]
        for i, other in enumerate(others):
            assert other.wait().request.cached == 30
            assert other.request.answer.tokens == alone(model, [*system, 2 + i], 10, temperature=0)[1]
        assert running.wait().request.answer.tokens == alone(model, [*system, 1], 33, temperature=0)[1]


def test_a_long_conversation_survives_one_that_begins_alike(model):
    with closing(Engine(model, BYTES, rows=2)) as engine:
        Answer(engine, [*range(40)], 1).wait()
        assert Answer(engine, [*range(10), 99], 1).wait().request.cached == 10
        assert Answer(engine, [*range(40), 41], 1).wait().request.cached == 40
        assert Answer(engine, [*range(10), 99, 5], 1).wait().request.cached == 11


def test_the_oldest_row_is_overwritten(model):
    with closing(Engine(model, BYTES, rows=2)) as engine:
        for token in (1, 2, 1, 3):
            Answer(engine, [token] * 9, 1).wait()
        assert Answer(engine, [1] * 9, 1).wait().request.cached == 8
        assert Answer(engine, [2] * 9, 1).wait().request.cached == 0


# ---- Log probabilities


def reference(model: GPT, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).log_softmax(-1)[0]


@pytest.mark.parametrize("chunk", [3, 256])
def test_logprobs_of_prompt_and_answer(model, chunk):
    prompt = [*b"some prompt", 0xC3, 0xA4]
    with closing(Engine(model, BYTES, chunk=chunk)) as engine:
        Answer(engine, prompt, 1).wait()  # what is cached has no logits
        answer = Answer(engine, prompt, 20, logprobs=4, echo=True, temperature=1.2, top_k=9).wait()
    ids = prompt + answer.request.answer.tokens
    assert answer.ids == ids and answer.pieces[0].text == "some promptä"
    assert [token.start for token in answer.tokens[:13]] == [*range(12), 11]
    assert (answer.tokens[0].logprob, answer.tokens[0].top) == (None, ())
    for token, row in zip(answer.tokens[1:], reference(model, ids), strict=False):
        assert token.logprob == pytest.approx(row[token.id].item())
        values, top = row[:257].topk(4)  # the other ids are no tokens
        assert [i for i, _ in token.top] == top.tolist()
        assert [p for _, p in token.top] == pytest.approx(values.tolist())


def test_echo_without_an_answer(model):
    with closing(Engine(model, BYTES)) as engine:
        answer = Answer(engine, "ab", 0, logprobs=0, echo=True).wait()
        assert (answer.text, answer.reason, len(answer.tokens)) == ("ab", "length", 2)
        assert Answer(engine, "ab", 0).wait().text == ""


def test_the_tokens_of_a_stop_sequence_are_not_sent(model):
    full = alone(model, "x", 30, temperature=0)
    characters = [c for c in full[0]]
    stop = "".join(characters[8:11])
    with closing(Engine(model, BYTES)) as engine:
        answer = Answer(engine, "x", 30, temperature=0, stop=stop, logprobs=0).wait()
    n = full[0].index(stop)
    assert answer.text == full[0][:n] and answer.reason == "stop"
    assert all(token.start < n for token in answer.tokens)
    assert len(answer.ids) < len(answer.request.answer.tokens)


def test_pieces_are_whole_characters_and_have_each_token_once():
    model = byte_model()
    with torch.no_grad():
        model.lm_head.weight[:, :] = 0  # the most likely token does not depend on the text
    with closing(Engine(model, BYTES)) as engine:
        answer = Answer(engine, "x", 40, seed=3).wait()
    text, ids, _ = alone(model, "x", 40, seed=3)
    assert answer.text == text and answer.ids == ids
    position = 0
    for piece in answer.pieces:
        assert all(position <= token.start <= position + len(piece.text) for token in piece.tokens)
        position += len(piece.text)


# ---- Limits and ends


def test_the_window_ends_an_answer(model):
    with closing(Engine(model, BYTES)) as engine:
        for n in (63, 64):
            answer = Answer(engine, [5] * n, None, temperature=0).wait()
            ids = answer.request.answer.tokens
            assert len(ids) == 65 - n and answer.reason == "length"
            assert ids == alone(model, [5] * n, 65 - n, temperature=0)[1]
        with pytest.raises(UserError, match=r"65 tokens.* 64"):
            engine.request([5] * 65)


@pytest.mark.parametrize(
    "prompt, bad",
    [
        ([], {}),
        ("", {}),
        ([999], {}),
        ([-1], {}),
        ([258], {}),  # in the model's vocabulary, but no token
        ([1.5], {}),
        ("x", dict(temperature=-1)),
        ("x", dict(top_p=2)),
        ("x", dict(seed=2**70)),
        ("x", dict(stop=[""])),
        ("x", dict(max_tokens=-1)),
        ("x", dict(logprobs=-1)),
        ([{"role": "user"}], {}),
    ],
)
def test_bad_arguments(model, prompt, bad):
    with closing(Engine(model, BYTES)) as engine, pytest.raises(UserError):
        engine.generate(prompt, **bad)


@pytest.mark.parametrize("name", ["max_tokens", "logprobs"])
def test_a_fraction_is_a_type_error(model, name):
    with closing(Engine(model, BYTES)) as engine, pytest.raises(TypeError):
        engine.generate("x", **{name: 1.5})


def test_bad_sizes(model):
    for bad in (dict(rows=0), dict(chunk=0), dict(max_waiting=-1), dict(max_len=65)):
        with pytest.raises(UserError, match=next(iter(bad))):
            Engine(model, BYTES, **bad)


def test_too_many_requests(model):
    with closing(Engine(model, BYTES, rows=1, max_waiting=2)) as engine:
        answers = [Answer(engine, "x", 10, submit=False) for _ in range(4)]
        with pytest.raises(QueueFull, match=r"0 .* 3"):
            engine.submit(*(answer.request for answer in answers))
        engine.submit(*(answer.request for answer in answers[:3]))
        for answer in answers[:3]:
            answer.wait()
        assert is_idle(engine)
        engine.submit(answers[3].request)
        answers[3].wait()


def test_first_come_first_served(model):
    order = []
    with closing(Engine(model, BYTES, rows=1)) as engine:
        answers = [Answer(engine, "x" * (9 - i), 3, submit=False) for i in range(5)]
        for i, answer in enumerate(answers):
            answer.request.receive = lambda piece, i=i: order.append(i) if piece.reason else None
            engine.submit(answer.request)
        assert is_idle(engine)
    assert order == [0, 1, 2, 3, 4]


def test_cancel_waiting_prefilling_and_running():
    model = byte_model(sequence_len=4000)
    with closing(Engine(model, BYTES, rows=2, chunk=1)) as engine:
        running = Answer(engine, "x", None, temperature=0)
        running.next()
        prefilling = Answer(engine, [1] * 3000)
        waiting = Answer(engine, [2] * 9)
        while not engine.prefilling or engine.cache.lengths[1] < 8:
            time.sleep(0.001)
        for answer in (waiting, prefilling, running):
            answer.request.cancelled = True
            assert answer.wait().reason == "cancelled"
        assert running.text == alone(model, "x", len(running.request.answer.tokens), temperature=0)[0]
        after = Answer(engine, [1] * 9, temperature=0).wait()
        assert after.request.cached == 8  # of what was read before it was cancelled
        assert after.request.answer.tokens == alone(model, [1] * 9, temperature=0)[1]
        assert is_idle(engine)


def test_leaving_generate_cancels(model):
    with closing(Engine(model, BYTES)) as engine:
        stream = engine.generate("x", None)
        next(stream)
        stream.close()
        assert is_idle(engine)


def test_a_long_prompt_does_not_stop_the_others():
    model = byte_model(sequence_len=1000)
    with closing(Engine(model, BYTES, rows=2, chunk=8)) as engine:
        running = Answer(engine, "x", 300, temperature=0)
        running.next()
        long = Answer(engine, [1] * 800, 1)
        long.next()
        assert len(running.request.answer.tokens) > 90  # a token for each chunk


def test_close_ends_what_runs():
    model = byte_model(sequence_len=20_000)
    with torch.no_grad():
        model.lm_head.weight[256] = 0  # end of text is never the most likely
    engine = Engine(model, BYTES, rows=1)
    answers = [Answer(engine, "x", None, temperature=0) for _ in range(3)]
    answers[0].next()
    engine.close()
    for answer in answers:
        assert answer.wait().reason == "error"
        assert isinstance(answer.pieces[-1].error, RunError)
    with pytest.raises(RunError, match="closed"):
        engine.generate("x")


def test_an_error_fails_the_requests_of_a_round_and_not_the_engine(model):
    broken = threading.Event()

    def decode(ids, kv_cache):
        if broken.is_set():
            broken.clear()
            raise MemoryError("no memory")
        return model.step(ids, kv_cache)

    with closing(Engine(model, BYTES, decode=decode)) as engine:
        Answer(engine, "x").wait()
        broken.set()
        with pytest.raises(MemoryError):
            list(engine.generate("x", 20))
        assert is_idle(engine)
        assert "".join(engine.generate("x", 20)) == alone(model, "x")[0]


def test_decode_cpp_reads_the_prompts_too():
    model, forwards = byte_model(dtype=torch.float32), []
    decode = native.prepare(model)
    if decode is None:
        pytest.skip("no C++ compiler")
    model.norm.register_forward_hook(lambda *_: forwards.append(1))
    prompts = ["x", "Once upon a time", "Once upon a day in the north"]
    with closing(Engine(model, BYTES, rows=2, chunk=8, decode=decode)) as engine:
        answers = [Answer(engine, prompt, 20, temperature=0) for prompt in prompts]
        texts = [answer.wait().text for answer in answers]
    assert not forwards
    assert texts == [alone(model, prompt, 20, temperature=0)[0] for prompt in prompts]


def test_logits_that_are_not_finite_fail_their_own_request():
    model = byte_model()
    with torch.no_grad():
        model.wte.weight[7] = math.nan
    with closing(Engine(model, BYTES, rows=2)) as engine:
        good = Answer(engine, "x" * 30, 30, temperature=0)
        with pytest.raises(RuntimeError, match="not finite"):
            list(engine.generate([1, 2, 3, 7, 7, 7]))
        short = Answer(engine, "y", 3, temperature=0).wait()  # in a row where NaNs were, beside a longer one
        assert short.text == alone(model, "y", 3, temperature=0)[0]
        assert good.wait().text == alone(model, "x" * 30, 30, temperature=0)[0]


def test_what_is_not_finite_stays_in_its_row_however_its_request_ends():
    """With no answer, and cancelled: nothing was drawn, so there was no error."""
    model = byte_model(sequence_len=1000)
    with torch.no_grad():
        model.wte.weight[7] = math.nan
    with closing(Engine(model, BYTES, rows=2, chunk=1)) as engine:
        good = Answer(engine, "x" * 30, None, temperature=0)
        good.next()
        assert Answer(engine, [1, 2, 7, 7, 7], 0).wait().reason == "length"
        assert Answer(engine, "y", 3, temperature=0).wait().text == alone(model, "y", 3, temperature=0)[0]
        bad = Answer(engine, [1, 2, *[7] * 900])
        while engine.cache.lengths[1] < 20:
            time.sleep(0.001)
        bad.request.cancelled = True
        assert bad.wait().reason == "cancelled"
        assert Answer(engine, "y", 3, temperature=0).wait().text == alone(model, "y", 3, temperature=0)[0]
        assert not good.request.answer.reason  # it ran beside them all
        good.request.cancelled = True
        assert good.wait().reason == "cancelled"


def test_the_cache_takes_a_quarter_of_the_free_memory(model, monkeypatch):
    of_a_token = KVCache(model.config, 5, 1, dtype=model.dtype).nbytes
    monkeypatch.setattr("sologpt.engine.free_memory", lambda device: 4 * 40 * of_a_token + 3)
    assert fitting_len(model, 5) == 40
    assert fitting_len(model, 1) == 64
    with closing(Engine(model, BYTES, rows=5)) as engine, pytest.raises(UserError, match="context of 40"):
        engine.request([1] * 41)


def test_random_requests_and_cancellations(model):
    """Nothing is lost: rows, requests, memory. What is finished is what it would be alone."""
    random.seed(1)
    with closing(Engine(model, BYTES, rows=4, max_waiting=300, chunk=16)) as engine:
        answers = []
        for _ in range(120):
            prompt = [random.choice([1, 2])] * random.randint(1, 12) + [3] * random.randint(0, 20)
            answers.append((Answer(engine, prompt, random.randint(1, 20), temperature=0), prompt))
            if random.random() < 0.4:
                random.choice(answers)[0].request.cancelled = True
            time.sleep(random.random() / 500)
        finished = 0
        expected: dict = {}
        for answer, prompt in answers:
            if answer.wait().reason != "cancelled":
                finished += 1
                if (*prompt,) not in expected:
                    expected[(*prompt,)] = alone(model, prompt, 20, temperature=0)[1]
                ids = answer.request.answer.tokens
                assert ids == expected[(*prompt,)][: len(ids)]
        assert finished > 30 and is_idle(engine)
    del answers, answer, engine
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is Request]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_threads_of_others_are_kept_beside_the_engine():
    """The cores are its own: an idle thread of OpenMP would make those that decode sleep between loops."""
    code = """
import os, torch
from gpt import GPT, GPTConfig
from sologpt.engine import Engine
from sologpt.tokenizer import Tokenizer

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
before = threads()
model = GPT(GPTConfig(vocab_size=50_000, n_layer=1, n_embd=32, n_head=2))
torch.ones(10**6).sum()  # a loop of several threads, as in loading
loaded = threads()
engine = Engine(model, Tokenizer.from_spec("bytes"), rows=2)
engine.request("ab", 5)
print(loaded - before, threads() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["2", "1"], done


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_cache_takes_memory_only_where_it_is_written():
    """Of 400 MB for 8 rows of 65,536 tokens, some answers and errors need some kilobytes."""

    def memory() -> int:
        return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024

    def decode(ids, kv_cache):
        if broken.is_set():
            raise MemoryError
        return model.step(ids, kv_cache)

    model, broken = byte_model(sequence_len=2**16), threading.Event()
    with torch.no_grad():
        model.wte.weight[7] = math.nan
    before = memory()
    with closing(Engine(model, BYTES, rows=8, decode=decode)) as engine:
        assert engine.cache.nbytes > 400e6
        for prompt in ("a", "b"):
            assert list(engine.generate(prompt, 10))
        with pytest.raises(RuntimeError, match="not finite"):
            list(engine.generate([7]))
        broken.set()
        with pytest.raises(MemoryError):
            list(engine.generate("a"))
        assert memory() - before < 2**26

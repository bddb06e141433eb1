"""The page of the server as its reader sees it: in Chromium, with models that know their answers by heart."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from gpt import GPT, GPTConfig
from sologpt.tokenizer import Tokenizer

sync = pytest.importorskip("playwright.sync_api", reason="the page is tested by playwright")
CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("the page is tested in chromium", allow_module_level=True)

sync.expect.set_options(timeout=30_000)
KEY = "secret"
pytestmark = pytest.mark.slow
TOKENIZER = Tokenizer.from_spec("bytes").with_chat_template()
EOS = TOKENIZER.eos_tokens[0]
HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"> is 😀 text."
)
CHATS = [  # what the model knows by heart: system message, question, answer
    ("", "markup", HOSTILE),
    ("", "hello", "Hi!"),
    ("", "name", "Ada. She adds."),
    ("", "name", "Bob. He bobs."),
    ("Be French.", "hello", "Salut!"),
]
NAMES = re.compile(r"Ada\. She adds\.|Bob\. He bobs\.")
TEXTS = ["one two three four five", "for " + "ever and " * 12]  # the second one does not end


def train(folder: Path) -> None:
    """Two checkpoints of a model that knows all these: with a chat template, and without one."""
    rows = []
    for system, question, answer in CHATS:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        rows.append([*TOKENIZER.encode_chat(messages[not system :]), *TOKENIZER.encode(answer), EOS])
    rows.append([*TOKENIZER.encode(TEXTS[0]), EOS])
    rows.append(TOKENIZER.encode(TEXTS[1]))
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, -1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=2048, vocab_size=257, n_layer=2, n_head=4, n_embd=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(ids[:, :-1].clamp(min=0), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    for name, tokenizer in {"chat": TOKENIZER, "text": Tokenizer.from_spec("bytes")}.items():
        (folder / name).mkdir()
        model.save(folder / name / "best.pt", tokenizer=tokenizer.to_dict(), step=0)


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The addresses of a server of each. The one of the text needs a key."""
    folder = tmp_path_factory.mktemp("models")
    train(folder)
    processes, addresses = [], {}
    for name in ("chat", "text"):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, "-m", "sologpt.serve", str(folder / name), f"--port={port}"]
        command += [f"--api_key={KEY}"] if name == "text" else []
        processes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL))
        addresses[name] = f"http://127.0.0.1:{port}/"
    for address in addresses.values():
        for _ in range(600):
            try:
                urllib.request.urlopen(address + "health")
                break
            except OSError:
                time.sleep(0.1)
    yield addresses
    for process in processes:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync.Browser]:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


class Reader:
    """Someone at the page."""

    def __init__(self, page: sync.Page, address: str) -> None:
        self.page = page
        self.address = address
        self.problems: list[str] = []
        self.hosts: set[str] = set()
        keys = iter(["wrong", KEY])
        page.on("dialog", lambda dialog: dialog.accept(next(keys)))
        page.on("pageerror", lambda e: self.problems.append(str(e)))
        page.on("console", self.hear)
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        page.goto(address)
        sync.expect(page.locator(".welcome")).to_be_visible()
        sync.expect(page.locator("#prompt")).to_be_focused()
        self.set("temperature", 0)

    def hear(self, message: sync.ConsoleMessage) -> None:
        """Chromium logs every status from 400 on: those of a missing key and of a bad request are meant."""
        if message.type == "error" and not re.search("status of 40[01]", message.text):
            self.problems.append(message.text)

    def set(self, name: str, value: object) -> None:
        self.page.get_by_role("button", name="Settings").click()
        self.page.get_by_label(name).fill(str(value))
        self.page.keyboard.press("Escape")

    def ask(self, text: str, answer: str) -> None:
        self.page.locator("#prompt").fill(text)
        self.page.locator("#prompt").press("Enter")
        self.sees(answer)

    def sees(self, answer: str) -> None:
        """The last answer, when it is whole."""
        sync.expect(self.page.get_by_role("button", name="Regenerate")).to_be_visible()
        sync.expect(self.answer).to_have_text(answer, use_inner_text=True)

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).last.click()

    @property
    def answer(self) -> sync.Locator:
        return self.page.locator(".assistant .text").last

    @property
    def tokens(self) -> sync.Locator:
        return self.page.locator("#log .token")


@pytest.fixture
def chat(browser, servers) -> Iterator[Reader]:
    yield from read(browser, servers["chat"])


@pytest.fixture
def text(browser, servers) -> Iterator[Reader]:
    yield from read(browser, servers["text"])


def read(browser: sync.Browser, address: str) -> Iterator[Reader]:
    context = browser.new_context()
    reader = Reader(context.new_page(), address)
    yield reader
    context.close()
    assert not reader.problems
    assert reader.hosts == {address.split("/")[2]}


def test_answers_are_streamed_and_markup_stays_text(chat):
    chat.ask("markup", HOSTILE)
    assert chat.answer.locator("*").count() == 0
    chat.click("Look inside")
    assert chat.answer.text_content() == HOSTILE
    assert {*chat.answer.locator("*").evaluate_all("nodes => nodes.map((node) => node.tagName)")} == {"SPAN"}
    assert chat.page.title() == "soloGPT"


def test_screen_readers_get_an_answer_by_sentences(chat):
    chat.ask("name", NAMES)
    name = chat.answer.text_content()
    assert chat.page.locator("[aria-live] p").all_text_contents() == [name[:5], name[5:]]
    chat.click("New")
    chat.ask("hello", "Hi!")
    assert chat.page.locator("[aria-live] p").all_text_contents() == ["Hi!"]


def test_keyboard(chat):
    prompt = chat.page.locator("#prompt")
    prompt.press_sequentially("a")
    prompt.press("Shift+Enter")
    prompt.press_sequentially("b")
    assert prompt.input_value() == "a\nb"
    prompt.fill("  ")
    prompt.press("Enter")
    assert chat.page.locator("article").count() == 0
    chat.ask("hello", "Hi!")
    assert prompt.input_value() == ""
    chat.click("Look inside")
    chat.tokens.first.focus()
    chat.page.keyboard.press("ArrowRight")
    sync.expect(chat.tokens.nth(1)).to_be_focused()
    chat.page.keyboard.press("Enter")
    panel = chat.page.locator("#alternatives")
    sync.expect(panel.get_by_role("button").first).to_be_focused()
    chat.page.keyboard.press("Escape")
    sync.expect(panel).to_be_hidden()
    sync.expect(chat.tokens.nth(1)).to_be_focused()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop(text, how):
    text.set("max tokens", 2000)
    text.page.locator("#prompt").fill("for")
    text.page.locator("#prompt").press("Enter")
    sync.expect(text.answer).to_contain_text("ever and ever")
    if how == "button":
        text.click("Stop")
    else:
        text.page.keyboard.press("Escape")
    sync.expect(text.page.locator("footer p")).to_contain_text("stopped")
    written = text.answer.text_content()
    assert written.startswith(" ever and ever")
    assert len(written) < 2000
    text.page.wait_for_timeout(200)
    assert text.answer.text_content() == written


def test_regenerate_and_edit(chat):
    chat.set("temperature", 1)
    chat.set("min p", 0.3)
    chat.ask("name", NAMES)
    seen = {chat.answer.text_content()}
    for _ in range(20):
        chat.click("Regenerate")
        chat.sees(NAMES)
        seen.add(chat.answer.text_content())
        if len(seen) == 2:
            break
    assert seen == {"Ada. She adds.", "Bob. He bobs."}
    assert chat.page.locator("article").count() == 2
    chat.page.locator(".user").hover()
    chat.page.locator(".user").get_by_role("button", name="Edit").click()
    field = chat.page.get_by_label("Edit")
    assert field.input_value() == "name"
    field.fill("hello")
    field.press("Enter")
    chat.sees("Hi!")
    assert chat.page.locator(".user .text").all_text_contents() == ["hello"]
    chat.click("Edit")  # of the answer
    chat.page.get_by_label("Edit").fill("H")
    chat.click("Go on")
    chat.sees("Hi!")


def test_the_same_seed_gives_the_same_answer(chat):
    chat.set("temperature", 50)
    chat.set("max tokens", 30)
    chat.set("seed", 7)
    chat.ask("name", re.compile("."))
    first = chat.answer.text_content()
    chat.click("Regenerate")
    chat.sees(first)


def test_system_message(chat):
    chat.set("system message", "Be French.")
    chat.ask("hello", "Salut!")
    assert chat.page.locator(".system").text_content() == "Be French."
    chat.set("system message", "")
    chat.click("Regenerate")
    chat.sees("Hi!")


def test_look_inside(chat):
    """Every token has the colour of its probability, and another one can be taken in its place."""
    chat.ask("name", NAMES)
    name = chat.answer.text_content()
    assert chat.tokens.count() == 0
    chat.click("Look inside")
    assert chat.tokens.all_text_contents() == list(name)
    probabilities = [
        float(title.rstrip("%")) for title in chat.tokens.evaluate_all("ts => ts.map((t) => t.title)")
    ]
    assert 30 < probabilities[0] < 70  # it knows two names
    assert min(probabilities[1:]) > 80
    colours = chat.tokens.evaluate_all("ts => ts.map((t) => getComputedStyle(t).backgroundColor)")
    assert colours[0] != colours[1]

    chat.tokens.first.click()
    rows = chat.page.locator("#alternatives").get_by_role("button")
    shown = dict(
        re.fullmatch(r"(.+?)([\d.]+)%|.*< 0.01%", row).groups() for row in rows.all_text_contents()[:2]
    )
    assert rows.count() == 5
    assert shown.keys() == {"A", "B"}
    assert float(shown[name[0]]) == probabilities[0]
    other = {"A": "Bob. He bobs.", "B": "Ada. She adds."}[name[0]]
    rows.filter(has_text=other[0]).first.click()
    chat.sees(other)
    assert chat.tokens.all_text_contents() == list(other)  # also the one that was chosen
    assert chat.tokens.first.get_attribute("title") == f"{float(shown[other[0]]):g}%"


def test_a_character_of_several_tokens_is_one_token_to_the_reader(chat):
    chat.ask("markup", HOSTILE)
    chat.click("Look inside")
    assert chat.tokens.all_text_contents() == list(HOSTILE)
    chat.tokens.filter(has_text="😀").click()
    assert (
        chat.page.locator("#alternatives").get_by_role("button").first.is_disabled()
    )  # a part of it is no text


def test_reload_keeps_the_conversations(chat):
    chat.ask("hello", "Hi!")
    chat.click("Look inside")
    titles = chat.tokens.evaluate_all("ts => ts.map((t) => t.title)")
    chat.page.reload()
    chat.sees("Hi!")
    assert chat.tokens.evaluate_all("ts => ts.map((t) => t.title)") == titles
    chat.click("New")
    chat.ask("markup", HOSTILE)  # the temperature is kept, too
    chat.page.get_by_role("button", name="History").click()
    items = chat.page.locator("#chats li")
    assert [item.split("Delete")[0] for item in items.all_text_contents()] == [
        "markup" + HOSTILE[:74],
        "helloHi!",
    ]
    items.nth(1).get_by_role("button").first.click()
    chat.sees("Hi!")
    chat.page.get_by_role("button", name="History").click()
    items.filter(has_text="hello").get_by_role("button", name="Delete").click()
    assert items.count() == 1
    sync.expect(chat.page.locator(".welcome")).to_be_visible()


def test_a_text_is_continued(text):
    text.ask("one two", " three four five")
    assert text.page.locator(".text").all_text_contents() == ["one two", " three four five"]
    text.click("Look inside")
    assert text.tokens.all_text_contents() == [*" three four five", ""]  # the last one ends the text
    text.tokens.filter(has_text="f").first.click()  # of "four"
    text.page.locator("#alternatives").get_by_role("button").first.click()
    text.sees(" three four five")
    text.click("Edit")
    field = text.page.get_by_label("Edit")
    assert field.input_value() == "one two three four five"
    field.fill("one two three")
    field.press("Enter")
    text.sees(" four five")


def test_what_is_cut_can_be_continued(chat):
    chat.set("max tokens", 3)
    chat.ask("markup", HOSTILE[:3])
    sync.expect(chat.page.locator("footer p")).to_contain_text("3 tokens")
    sync.expect(chat.page.locator("footer p")).to_contain_text("cut at the limit")
    chat.set("max tokens", 10)
    chat.click("Continue")
    chat.sees(HOSTILE[:13])


def test_an_error_is_shown_and_nothing_is_lost(chat):
    chat.page.locator("#prompt").fill("too long " * 300)
    chat.page.locator("#prompt").press("Enter")
    sync.expect(chat.page.locator(".error")).to_contain_text("2048")
    chat.page.locator(".user").get_by_role("button", name="Edit").click()
    chat.page.get_by_label("Edit").fill("hello")
    chat.page.get_by_label("Edit").press("Enter")
    chat.sees("Hi!")


def test_full_storage_takes_the_oldest_probabilities_first(chat):
    chat.ask("markup", HOSTILE)
    chat.page.evaluate("""() => {
        let filler = "x".repeat(1 << 22);
        while (filler) {
            try { localStorage.filler = (localStorage.filler ?? "") + filler }
            catch { filler = filler.slice(filler.length / 2 + 1) }
        }
    }""")
    chat.click("New")
    chat.ask("hello", "Hi!")
    chat.page.reload()
    chat.sees("Hi!")
    chat.click("Look inside")
    assert chat.tokens.count() == 3
    chat.page.get_by_role("button", name="History").click()
    chat.page.locator("#chats li").filter(has_text="markup").get_by_role("button").first.click()
    chat.sees(HOSTILE)
    assert chat.tokens.count() == 0
    chat.click("Regenerate")
    sync.expect(chat.page.locator("#notice")).to_contain_text("full")


def test_phone(browser, servers):
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(servers["chat"])
    page.locator("#prompt").fill("markup")
    page.get_by_role("button", name="Send").tap()
    sync.expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.get_by_role("button", name="Look inside").tap()
    page.locator("#log .token").nth(30).tap()
    width = page.evaluate("document.documentElement.scrollWidth")
    box = page.locator("#alternatives").bounding_box()
    assert width <= 360 and box["x"] >= 0 and box["x"] + box["width"] <= 360
    context.close()

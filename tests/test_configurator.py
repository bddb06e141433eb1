import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
import sample
import train
from configurator import parse
from sologpt.errors import UserError


@dataclass
class Base:
    n_layer: int = 12  # number of blocks
    n_kv_head: int | None = None  # key/value heads


@dataclass
class Config(Base):
    out_dir: str = "out"  # where it goes, "quoted" # and hashed
    learning_rate: float = 6e-4  # how fast
    compile: bool = False  # torch.compile
    top_p: float | None = None  # nucleus
    stop: tuple[str, ...] = ()  # where to end
    scaling: dict | None = None  # {"factor": 2.0}

    def __post_init__(self):
        if self.n_layer > 1000:
            raise ValueError(f"n_layer {self.n_layer} is too many")


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "c.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_defaults_files_and_flags_apply_from_left_to_right(file):
    assert parse(Config, []) == Config()
    a, b = file("n_layer = 3\nout_dir = 'a'"), file("n_layer = 4", "b.py")
    assert parse(Config, [a, b]).n_layer == 4
    assert parse(Config, [b, a]).n_layer == 3
    assert parse(Config, ["--n_layer=9", a]).n_layer == 3
    assert parse(Config, [a, "--n_layer=9"]) == Config(n_layer=9, out_dir="a")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--n_layer", "5"], Config(n_layer=5)),
        (["--n-layer=5"], Config(n_layer=5)),
        (["--n_layer=1_000"], Config(n_layer=1000)),
        (["--n_layer=1e2"], Config(n_layer=100)),
        (["--n_layer= 4 * 25 "], Config(n_layer=100)),
        (["--n_layer", "-5"], Config(n_layer=-5)),
        (["--n_kv_head=4"], Config(n_kv_head=4)),
        (["--n_kv_head=4", "--n_kv_head=None"], Config()),
        (["--learning_rate=1"], Config(learning_rate=1.0)),
        (["--learning_rate=1e-3"], Config(learning_rate=1e-3)),
        (["--compile"], Config(compile=True)),
        (["--compile", "--n_layer=5"], Config(compile=True, n_layer=5)),
        (["--compile=False"], Config()),
        (["--compile", "true"], Config(compile=True)),
        (["--compile=0"], Config()),
        (["--compile", "0"], Config()),
        (["--out_dir", "-h"], Config(out_dir="-h")),
        (["--out_dir=a=b"], Config(out_dir="a=b")),
        (["--out_dir", "--x"], Config(out_dir="--x")),
        (["--out_dir="], Config(out_dir="")),
        (["--out_dir=12"], Config(out_dir="12")),
        (["--stop=a", "--stop", "b c"], Config(stop=("a", "b c"))),
        (["--top_p=0.5"], Config(top_p=0.5)),
        (["--top_p=1"], Config(top_p=1.0)),
        (["--scaling={'a': 'b', \"c\": 2.5, 'd': -1}"], Config(scaling={"a": "b", "c": 2.5, "d": -1})),
        (["--scaling={}", "--scaling", "None"], Config()),
    ],
)
def test_flags(argv, expected):
    config = parse(Config, argv)
    assert config == expected
    assert [type(v) for v in vars(config).values()] == [type(v) for v in vars(expected).values()]


def test_files_hold_literals_and_arithmetic(file):
    text = '''"""A docstring."""
# a comment
n_layer = 2 * 3 + 4 ** 2 // 5 - 7 % 4
n_kv_head = n_layer // 2
learning_rate = -(6e-4 / n_kv_head)
compile = True
top_p = None
stop = ("a", "b")
scaling = {"kind": "linear", "factor": 2.0 * n_layer}
'''
    config = parse(Config, [file(text)])
    assert config == Config(
        n_layer=6,
        n_kv_head=3,
        learning_rate=-(6e-4 / 3),
        compile=True,
        stop=("a", "b"),
        scaling={"kind": "linear", "factor": 12.0},
    )


def test_repeated_flags_add_to_a_tuple_and_a_file_replaces_it(file):
    path = file("\ufeffstop = ('a',)")  # a byte order mark is skipped
    assert parse(Config, [path, "--stop=b", "--stop=c"]).stop == ("b", "c")
    assert parse(Config, ["--stop=b", path]).stop == ("a",)


@pytest.mark.parametrize(
    "text, words",
    [
        ("n_layer = 3\nn_layers = 4", (":2:", "n_layers", "did you mean 'n_layer'")),
        ("n_layer = 'three'", (":1:", "n_layer must be a whole number", "'three'")),
        ("n_layer = 2.5", ("must be a whole number",)),
        ("n_layer = True", ("must be a whole number",)),
        ("compile = 1", ("must be true or false",)),
        ("out_dir = 3", ("must be text",)),
        ("n_kv_head = 'a'", ("must be a whole number or None",)),
        ("n_layer = x", ("'x' is not assigned above",)),
        ("n_layer = n_kv_head", ("'n_kv_head' is not assigned above",)),
        ("n_layer = __import__('os').system('touch ran')", ("neither a literal nor arithmetic",)),
        ("import os", (":1:", "plain assignments")),
        ("n_layer += 1", ("plain assignments",)),
        ("for n_layer in (1, 2): pass", ("plain assignments",)),
        ("n_layer = (1", (":1:",)),
        ("n_layer = 1 / 0", (":1:", "division by zero")),
        ("n_layer = 9 ** 9 ** 9", ("exponent",)),
        ("n_layer = 'a' * 3", ("not a number",)),
        ("n_layer = (-8) ** 0.5", ("real number",)),
        (
            "n_layer = 10 ** 60 ** 1 * 10 ** 60 * 10 ** 60 * 10 ** 60 * 10 ** 60 * 10 ** 64",
            ("sensible size",),
        ),
        ("learning_rate = 1e308 * 10", ("sensible size",)),
        ("n_layer = 1001", ("1001 is too many",)),
        ("n_layer = (1, 2)", ("must be a whole number",)),
        ("n_layer = 0x" + "f" * 5000, ("sensible size",)),
        ("n_layer = 0x" + "f" * 100_000 + " ** 64", ("sensible size",)),
        ("learning_rate = 1" + "0" * 400, ("sensible size",)),
        ("learning_rate = 1e999 - 1e999", ("sensible size",)),
        ("stop = 'a'", ("must be a tuple of texts",)),
        ("stop = ('a', 1)", ("must be a tuple of texts",)),
        ("n_layer = [1 for _ in (1,)]", ("neither",)),
        ("n_layer = f'{1}'", ("neither",)),
        ("scaling = {'a': open('x')}", ("open('x')", "neither")),
        ("scaling = {'a': 1, **scaling}", ("neither",)),
        ("scaling = {x: 1}", ("neither",)),
        ("scaling = {'a': 1e999}", ("sensible size",)),
        ("scaling = 2", ("must be a dict or None",)),
        ("n_layer = {'a': 1}", ("must be a whole number",)),
        ("n_layer = 1 if 1 else 2", ("neither",)),
        ("\0", ()),
    ],
)
def test_bad_files_say_where_and_what(file, text, words, tmp_path):
    with pytest.raises(UserError) as e:
        parse(Config, [file(text)])
    assert all(word in str(e.value) for word in words), str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--n_layers=3"], ("n_layers", "did you mean 'n_layer'")),
        (["--zzz=3"], ("zzz", "--help")),
        (["--n_layer=three"], ("n_layer must be a whole number", "'three'")),
        (["--n_layer=2.5"], ("must be a whole number",)),
        (["--n_layer="], ("must be a whole number",)),
        (["--n_layer"], ("needs a value",)),
        (["--compile=maybe"], ("must be true or false", "maybe")),
        (["--learning_rate=fast"], ("must be a number",)),
        (["missing.py"], ("missing.py", "No such file")),
        (["tiny.py"], ("did you mean config/tiny.py?",)),
        (["tiny"], ("'tiny'", "config file")),
        (["-n", "3"], ("'-n'",)),
        (["--n_layer=__import__('os')"], ("must be a whole number",)),
        (["--"], ("unknown key",)),
        (["--n_layer={[]}"], ("must be a whole number",)),
        (["--n_layer=n_kv_head"], ("must be a whole number", "'n_kv_head'")),
        (["--n_layer=1//0"], ("must be a whole number", "'1//0'")),
        (["--learning_rate=1" + "0" * 400], ("must be a number",)),
        (["--learning_rate=inf"], ("must be a number",)),
        (["--n_layer=0x" + "f" * 5000], ("must be a whole number",)),
    ],
)
def test_bad_flags_say_what_to_do(argv, words):
    with pytest.raises(UserError) as e:
        parse(Config, argv)
    assert all(word in str(e.value) for word in words), str(e.value)


words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["--n_layer", "--n_layer=3", "--compile", "--out-dir=x", "--top_p=1", "=", "--=", "--n_layer=1e999"]
    ),
)


@settings(max_examples=300, deadline=None)
@given(argv=st.lists(words, max_size=5))
def test_any_arguments_give_a_config_or_a_user_error(argv):
    if {"-h", "--help"} & set(argv):
        return
    try:
        assert isinstance(parse(Config, argv), Config)
    except UserError as e:
        assert str(e)


expressions = st.recursive(
    st.one_of(
        st.integers().map(str),
        st.floats().map(repr),
        st.sampled_from(["n_layer", "None", "True", "'a'", "x"]),
    ),
    lambda e: st.one_of(
        st.tuples(e, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "@", "<<", "and"]), e).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        e.map(lambda x: f"-{x}"),
        e.map(lambda x: f"open({x})"),
        e.map(lambda x: f"[{x}]"),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(
        st.one_of(
            st.text(max_size=20),
            st.tuples(st.sampled_from(["n_layer", "top_p", "zzz"]), expressions).map(" = ".join),
        ),
        max_size=4,
    )
)
def test_any_file_gives_a_config_or_a_user_error(lines, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.py"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(parse(Config, [str(path)]), Config)
    except UserError as e:
        assert str(e)


def test_help_lists_every_key_with_default_and_comment(capsys, monkeypatch):
    with pytest.raises(SystemExit) as e:
        parse(Config, ["--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    for line in ("--n_layer=12 number of blocks", "--out_dir='out' where it goes, \"quoted\" # and hashed"):
        assert line in " ".join(out.split())


@pytest.mark.parametrize("cls", [train.Config, sample.Config])
def test_every_key_of_the_scripts_is_documented(cls):
    assert all(key.comment for key in configurator.keys(cls).values())


# ---- Groups, and keys of another dataclass


@dataclass
class Shape:
    width: int = 8  # channels
    depth: int = 2  # number of layers
    ratio: float | None = None  # width of the MLP

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f"width {self.width} must be even")


@dataclass
class Outer:
    name: str = "x"  # name of the run
    # ---- data and batches
    folder: str = "a # b"  # where the data is
    batch: int = 1

    # ---- shape
    depth: int = 0  # layers; 0 means as many as there are
    shape: dict = configurator.keys_of(Shape)
    # a remark that is no title
    seed: int = 1  # of everything

    def __post_init__(self):
        Shape(**self.shape)


def test_keys_of_another_dataclass_are_flat(file):
    assert parse(Outer, []) == Outer(shape={}) and Outer().shape is not Outer().shape
    path = file("width = 2 * 8\nbatch = width // 4\nratio = 1")
    config = parse(Outer, [path, "--depth=3", "--seed", "5"])
    assert config == Outer(batch=4, depth=3, shape={"width": 16, "ratio": 1.0}, seed=5)
    assert type(config.shape["ratio"]) is float
    assert parse(Outer, ["--ratio=2", "--ratio=None"]).shape == {"ratio": None}


@dataclass
class Small:
    name: str = "x"
    shape: dict = configurator.keys_of(Shape, width=4, ratio=2.0)


def test_keys_of_another_dataclass_may_have_defaults_of_their_own():
    """What files and flags have given is known, also where it is the default."""
    assert Small().shape == parse(Small, ["--name=y"]).shape == {"width": 4, "ratio": 2.0}
    assert Small().shape.given == parse(Small, []).shape.given == {}
    shape = parse(Small, ["--width=4", "--depth=5", "--ratio=None"]).shape
    assert shape == {"width": 4, "depth": 5, "ratio": None} == shape.given
    assert parse(Small, ["--depth=5"]).shape == {"width": 4, "depth": 5, "ratio": 2.0}
    assert Small().shape == {"width": 4, "ratio": 2.0}
    assert {key.name: key.default for key in configurator.keys(Small).values()} == {
        "name": "x",
        "width": 4,
        "depth": 2,
        "ratio": 2.0,
    }


@dataclass
class Later:
    n: int = None  # a whole number after __post_init__


def test_a_key_whose_default_is_none_takes_none():
    assert [parse(Later, argv).n for argv in ([], ["--n=3"], ["--n=3", "--n=None"])] == [None, 3, None]
    with pytest.raises(UserError, match="n must be a whole number or None, not 'x'"):
        parse(Later, ["--n=x"])


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--widht=3", "unknown key 'widht'; did you mean 'width'"),
        ("--width=wide", "width must be a whole number, not 'wide'"),
        ("--width=3", "width 3 must be even"),
        ("--shape={}", "unknown key 'shape'"),
    ],
)
def test_bad_keys_of_another_dataclass(flag, words):
    with pytest.raises(UserError, match=words):
        parse(Outer, [flag])


HELP = """
  --name='x'        name of the run

data and batches:
  --folder='a # b'  where the data is
  --batch=1

shape:
  --depth=0         layers; 0 means as many as there are
  --width=8         channels
  --ratio=None      width of the MLP
  --seed=1          of everything"""


def test_help_has_groups_and_aligned_comments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["outer.py"])
    assert configurator.help_text(Outer).split("[--key=value ...]\n")[1] == HELP


# ---- The scripts


@pytest.mark.parametrize(
    "name, target", [(name, target) for name, (target, _) in configurator.NANOGPT_KEYS.items()]
)
def test_keys_of_nanogpt_say_what_has_their_place(name, target, tmp_path):
    scripts = [cls for cls in (train.Config, sample.Config) if target in configurator.keys(cls)]
    assert scripts
    (tmp_path / "nano.py").write_text(f"{name} = 1")
    for cls in scripts:
        for arg in (f"--{name}=1", str(tmp_path / "nano.py")):
            with pytest.raises(
                UserError, match=f"unknown key '{name}': it is nanoGPT's.*--?{target}|ckpt.pt"
            ):
                parse(cls, [arg])


def test_the_files_in_config_are_valid(monkeypatch):
    for path in sorted((ROOT / "config").glob("*.py")):
        assert parse(train.Config, [str(path)]).out_dir.startswith("out/")
    monkeypatch.setattr(sys, "argv", ["train.py", "--n_layer=3"])
    assert parse(train.Config).model["n_layer"] == 3


def test_config_tiny_has_the_defaults():
    assert parse(train.Config, [str(ROOT / "config" / "tiny.py"), "--out_dir=out"]) == train.Config()


@pytest.mark.parametrize("name", ["gpt2_124m", "shakespeare_char", "finetune"])
def test_larger_runs_do_not_depend_on_the_defaults_of_the_small_one(name):
    """Each names every setting in which config/tiny.py differs from what it was tuned for."""
    config = parse(train.Config, [str(ROOT / "config" / f"{name}.py")])
    assert (config.momentum, config.sample_prompt, config.sample_tokens) == (0.95, "\n", 300)
    if name != "finetune":  # has rates of its own, and its model from elsewhere
        assert (config.head_lr, config.warmdown) == (0.004, 0.4)
        assert {"n_layer", "n_head", "n_embd", "sequence_len"} <= config.model.given.keys()

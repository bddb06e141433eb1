"""One checked config from a dataclass of defaults, config files and the command line.

    config = configurator.parse(Config)     # python train.py config/tiny.py --max_iters=200 --compile

Files and flags apply from left to right: the last one wins. A file holds plain assignments of literals and of
arithmetic over names assigned above. It is parsed, never executed. The comment behind a default is its help
line, and a comment line of its own, `# ---- data`, begins a group of --help.
"""

import ast
import difflib
import functools
import inspect
import operator
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sologpt.errors import UserError

C = TypeVar("C")
BOOLS = {"true": True, "false": False, "1": True, "0": False}
TEXTS = tuple[str, ...]
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a dict"}
TYPE_NAMES |= {TEXTS: "a tuple of texts", types.NoneType: "None"}
NO_VALUE = (ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError)  # see `evaluate`

NANOGPT_FILES = {"train_gpt2": "gpt2_124m", "finetune_shakespeare": "finetune"}  # nanoGPT's name: ours
NANOGPT_KEYS = {  # nanoGPT's name: the key that takes its place, and what to know
    "start": ("prompt", "is nanoGPT's name for --prompt"),
    "max_new_tokens": ("max_tokens", "is nanoGPT's name for --max_tokens"),
    "block_size": ("sequence_len", "is nanoGPT's name for --sequence_len"),
    "always_save_checkpoint": ("keep_checkpoints", "is nanoGPT's: here every evaluation saves ckpt.pt"),
    "decay_lr": ("warmdown", "is nanoGPT's: here --warmdown=0 keeps the learning rates constant"),
    "lr_decay_iters": ("warmdown", "is nanoGPT's: here the rates fall in the last --warmdown of the steps"),
    "min_lr": ("warmdown", "is nanoGPT's: here the learning rates fall to zero, see --warmdown"),
    "backend": ("device", "is nanoGPT's: here --device decides, nccl on GPUs and gloo on CPUs"),
}


# -----------------------------------------------------------------------------
# The keys of a config


@dataclass(frozen=True)
class Key:
    """A key that files and flags may set. kinds: the types it takes, (int, NoneType) for `int | None`."""

    name: str
    kinds: tuple[Any, ...]
    default: Any
    comment: str
    group: str
    part: str = ""  # the `keys_of` field whose dict takes the value

    def read(self, text: str) -> Any:
        """Return the value of a flag. Text is taken as it is; anything else is read as in a config file."""
        if TEXTS in self.kinds:
            return (text,)
        if str in self.kinds:
            return text
        if bool in self.kinds and text.lower() in BOOLS:
            return BOOLS[text.lower()]
        try:
            return evaluate(ast.parse(text.strip(), mode="eval").body, {})
        except NO_VALUE:
            return text[:99]  # which `check` refuses

    def check(self, where: str, value: Any) -> Any:
        """Return the value in one of the key's types. An int passes for a float, a whole float for an int."""
        is_texts = type(value) is tuple and all(type(item) is str for item in value)
        if type(value) in self.kinds or (is_texts and TEXTS in self.kinds):
            return value
        if int in self.kinds and type(value) is float and value.is_integer():
            return int(value)
        if float in self.kinds and type(value) is int:
            return float(value)
        expected = " or ".join(TYPE_NAMES[kind] for kind in self.kinds)
        raise UserError(f"{where}: {self.name} must be {expected}, not {value!r}")


class Part(dict):
    """The values of another dataclass's keys: defaults, and over them what files and flags have `given`."""

    def __init__(self, defaults: Any) -> None:
        super().__init__(defaults)
        self.given: dict[str, Any] = {}


def keys_of(cls: type, **defaults: Any) -> Any:
    """A field, a `Part`, for the keys of another dataclass: `model: dict = keys_of(GPTConfig, n_layer=2)`."""
    return field(default_factory=lambda: Part(defaults), metadata={"keys_of": cls, "defaults": defaults})


def keys(cls: type) -> dict[str, Key]:
    """Return the keys that files and flags may set, by name, in the order of the fields."""
    found: dict[str, Key] = {}
    hints = typing.get_type_hints(cls)
    comments = read_comments(cls)
    for f in fields(cls):
        if "keys_of" in f.metadata:
            for key in keys(f.metadata["keys_of"]).values():
                if key.name not in hints:  # else the outer dataclass has a key of that name, which wins
                    default = f.metadata["defaults"].get(key.name, key.default)
                    found[key.name] = replace(key, default=default, group=f.name, part=f.name)
            continue
        hint = hints[f.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if f.default is None and types.NoneType not in kinds:
            kinds = (*kinds, types.NoneType)
        found[f.name] = Key(f.name, kinds, f.default, *comments[f.name])
    return found


@functools.cache  # reading the source takes longer than all the rest
def read_comments(cls: type) -> dict[str, tuple[str, str]]:
    """Return the comment on each field's line and the title of its group, base classes included."""
    found: dict[str, tuple[str, str]] = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        group = ""
        for line in textwrap.dedent(inspect.getsource(base)).splitlines():
            if title := re.match(r"    # ---- (.+)", line):
                group = title[1]
            elif named := re.match(r"    (\w+): .*?(?:  # (.+))?$", line):
                found[named[1]] = (named[2] or "", group)
    return found


def help_text(cls: type) -> str:
    """Return the module's docstring and every key with its default and its comment, by group."""
    doc = inspect.getdoc(sys.modules[cls.__module__]) or ""
    script = Path(sys.argv[0])
    program = f"-m {script.parent.name}" if script.name == "__main__.py" else script.name
    lines = [doc, "", f"usage: python {program} [config/FILE.py ...] [--key=value ...]"]
    flags = {f"  --{key.name}={key.default!r}": key for key in keys(cls).values()}
    pad = max(map(len, flags))
    width = max(shutil.get_terminal_size().columns, pad + 40)
    wrap = textwrap.TextWrapper(width, subsequent_indent=" " * (pad + 2), break_on_hyphens=False)
    groups: dict[str, list[str]] = {}
    for flag, key in flags.items():
        groups.setdefault(key.group, []).append(wrap.fill(f"{flag:<{pad}}  {key.comment}"))
    for title, entries in groups.items():
        lines += ["", f"{title}:", *entries] if title else ["", *entries]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# From files and flags to values


def parse(cls: type[C], argv: Sequence[str] | None = None) -> C:
    """Return an instance of the dataclass cls, set by argv (default: the command line). UserError if bad."""
    arguments: dict[str, Any] = {}
    own: Any = fields(cls)  # type: ignore[arg-type]
    parts = {f.name: Part(f.metadata["defaults"]) for f in own if "keys_of" in f.metadata}
    origins: dict[str, str] = {}
    for where, key, value in read_assignments(cls, sys.argv[1:] if argv is None else argv):
        values = parts[key.part].given if key.part else arguments
        value = key.check(where, value)
        if TEXTS in key.kinds and origins.get(key.name) == where == f"--{key.name}":
            value = values[key.name] + value  # a repeated flag adds to the texts
        values[key.name] = value
        origins[key.name] = where
    for part in parts.values():
        part.update(part.given)
    try:
        return cls(**arguments, **parts)
    except ValueError as e:  # of __post_init__: values that do not fit each other, such as n_embd and n_head
        raise UserError(str(e)) from e


def read_assignments(cls: type, argv: Sequence[str]) -> Iterator[tuple[str, Key, Any]]:
    """Yield the assignments of files and flags in order, as (where, key, value)."""
    known = keys(cls)
    args = list(argv)
    while args:
        arg = args.pop(0)
        if arg in ("-h", "--help"):
            print(help_text(cls))
            sys.exit(0)
        if not arg.startswith("-") and arg.endswith(".py"):
            yield from read_file(known, arg)
            continue
        if not arg.startswith("--"):
            raise UserError(f"{arg!r} is no config file (FILE.py) and no flag (--key=value); see --help")
        name, equals, text = arg[2:].partition("=")
        key = find_key(known, f"--{name}", name.replace("-", "_"))
        if not equals:
            if bool in key.kinds and not (args and args[0].lower() in BOOLS):
                text = "true"  # --compile means --compile=true
            elif args:
                text = args.pop(0)
            else:
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
        yield f"--{key.name}", key, key.read(text)


def find_key(known: dict[str, Key], where: str, name: str) -> Key:
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; --help lists all keys"
    if name in NANOGPT_KEYS and NANOGPT_KEYS[name][0] in known:
        hint = f": it {NANOGPT_KEYS[name][1]}"
    raise UserError(f"{where}: unknown key {name!r}{hint}")


def read_file(known: dict[str, Key], path: str) -> Iterator[tuple[str, Key, Any]]:
    """Yield the assignments of a config file, as (where, key, value)."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except SyntaxError as e:
        raise UserError(f"{path}:{e.lineno}: {e.msg}") from e
    except FileNotFoundError as e:
        raise UserError(f"cannot read the config file {path}: {e.strerror}{similar_file(Path(path))}") from e
    except (OSError, *NO_VALUE) as e:  # also: not UTF-8, a null byte, nested too deep
        raise UserError(f"cannot read the config file {path}: {getattr(e, 'strerror', None) or e}") from e
    values: dict[str, Any] = {}
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                continue  # a docstring
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                key = find_key(known, where, name)
            case _:
                raise UserError(f"{where}: a config file holds only plain assignments, key = value")
        try:
            values[name] = evaluate(expression, values)
        except NO_VALUE as e:
            raise UserError(f"{where}: {name} cannot be computed: {e}") from e
        yield where, key, values[name]


def similar_file(path: Path) -> str:
    name = NANOGPT_FILES.get(path.stem, path.stem)
    found = {other.stem: other for folder in (Path("config"), path.parent) for other in folder.glob("*.py")}
    close = difflib.get_close_matches(name, found, n=1)
    return f"; did you mean {found[close[0]]}?" if close else ""


OPERATORS: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Pow: operator.pow}
OPERATORS |= {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATORS |= {ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}


def evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """Return the value of a literal, of a name assigned above, or of arithmetic. ValueError for all else."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return check_number(node.value)
        case ast.Name(id=name):
            if name not in names:
                raise ValueError(f"{name!r} is not assigned above")
            return names[name]
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(evaluate(item, names) for item in items)
        case ast.Dict(keys=left, values=right) if all(isinstance(key, ast.Constant) for key in left):
            values = [evaluate(item, names) for item in right]
            return dict(zip([evaluate(key, names) for key in left if key], values, strict=True))
        case ast.UnaryOp(op=op, operand=a) if type(op) in OPERATORS:
            operands = [evaluate(a, names)]
        case ast.BinOp(op=op, left=a, right=b) if type(op) in OPERATORS:
            operands = [evaluate(a, names), evaluate(b, names)]
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is neither a literal nor arithmetic")
    if not all(type(x) in (int, float) for x in operands):
        raise ValueError(f"{ast.unparse(node)!r} is arithmetic with something that is not a number")
    if isinstance(op, ast.Pow) and abs(operands[1]) > 64:
        raise ValueError(f"{ast.unparse(node)!r} has an exponent above 64")
    return check_number(OPERATORS[type(op)](*operands))


def check_number(value: Any) -> Any:
    """Return the value. ValueError for a number that is complex, infinite, not a number, or beyond 2^1000."""
    if isinstance(value, complex) or (isinstance(value, int | float) and not abs(value) <= 2**1000):
        raise ValueError("this is not a real number of a sensible size")
    return value

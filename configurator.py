"""One checked config from a dataclass of defaults, config files and the command line.

    config = configurator.parse(Config)     # python train.py config/tiny.py --max_iters=200 --compile

Files and flags apply from left to right, so the last one wins. A file holds plain assignments of literals, and of
arithmetic over names assigned above: it is parsed, never executed. The comment behind a default is its help line, and a
comment line of its own, `# ---- data`, begins a group of --help.
"""

import ast
import difflib
import inspect
import io
import operator
import os
import re
import shutil
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

C = TypeVar("C")
BOOLS = {"true": True, "false": False, "1": True, "0": False}
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "None"}

KNOWN_FAILURES = {  # a pattern in Python's or PyTorch's message: what to print instead of a traceback
    "MemoryError|out of memory|can't allocate memory": "out of memory: try {less}",
    "No working C\\+\\+ compiler": "--compile needs a C++ compiler, such as g++, and none was found",
}
NANOGPT_FILES = {"train_gpt2": "gpt2_124m", "finetune_shakespeare": "finetune"}  # in config/, nanoGPT's name: ours
NANOGPT_KEYS = {  # nanoGPT's name: the key that has its place, and how
    "start": ("prompt", "is nanoGPT's name for --prompt"),
    "max_new_tokens": ("max_tokens", "is nanoGPT's name for --max_tokens"),
    "block_size": ("sequence_len", "is nanoGPT's name for --sequence_len"),
    "always_save_checkpoint": ("keep_checkpoints", "is nanoGPT's: here every evaluation saves ckpt.pt"),
    "decay_lr": ("warmdown", "is nanoGPT's: here --warmdown=0 keeps the learning rates constant"),
    "lr_decay_iters": (
        "warmdown",
        "is nanoGPT's: here --warmdown is the fraction of steps in which rates fall",
    ),
    "min_lr": ("warmdown", "is nanoGPT's: here the learning rates fall to zero, see --warmdown"),
    "backend": ("device", "is nanoGPT's: here --device decides, nccl on GPUs and gloo on CPUs"),
}


class UserError(Exception):
    """A mistake of the user: what, where, what to do. One line on stderr, exit status 2."""


class RunError(Exception):
    """A failure of the run: disk full, loss not finite, damaged checkpoint. One line on stderr, exit status 1."""


def run(main: Callable[[], None], less: str = "a smaller model") -> NoReturn:
    """Call a script's main and exit: one `error:` line for a UserError or RunError, a traceback for a bug.

    less: what to try when there is too little memory.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show must not end the run
    try:
        main()
        sys.stdout.flush()
    except (UserError, RunError, MemoryError, RuntimeError) as e:
        known = [line for pattern, line in KNOWN_FAILURES.items() if re.search(pattern, f"{type(e).__name__}: {e}")]
        if not known and not isinstance(e, UserError | RunError):
            raise
        message = known[0].format(less=less) if known else str(e)
        # one line, whatever is in the names of files
        print("error:", "".join(c if c.isprintable() else repr(c)[1:-1] for c in message), file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has exited (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, a signal that Windows does not have
    sys.exit(0)


def one_line(e: Exception) -> str:
    return " ".join(str(e).split("\n"))


@contextmanager
def reported() -> Iterator[None]:
    """Turn a library's exceptions into ours: bad input or a missing package is a UserError, a failure a RunError."""
    try:
        yield
    except BrokenPipeError:  # `run` exits quietly
        raise
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}" if e.filename and e.strerror else one_line(e)) from e
    except (ValueError, ImportError) as e:
        raise UserError(one_line(e)) from e
    except RuntimeError as e:
        raise RunError(one_line(e)) from e


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn a failure to write path into a RunError. On a full disk, torch.save raises a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        raise RunError(f"cannot write {os.fspath(path)}: {getattr(e, 'strerror', None) or one_line(e)}") from e


# -----------------------------------------------------------------------------
# The keys of a config


@dataclass(frozen=True)
class Key:
    """What a key takes, (int, NoneType) for `int | None`, and what --help says about it."""

    name: str
    kinds: tuple[Any, ...]
    default: Any
    comment: str
    group: str
    part: str = ""  # the field of `keys_of` whose dict gets the value

    def read(self, text: str) -> Any:
        """The value of a flag: text is taken as it is, anything else is read as in a config file."""
        if tuple[str, ...] in self.kinds:
            return (text,)
        if str in self.kinds and not (text == "None" and types.NoneType in self.kinds):
            return text
        if bool in self.kinds and text.lower() in BOOLS:
            return BOOLS[text.lower()]
        try:
            return _evaluate(ast.parse(text.strip(), mode="eval").body, {})
        except (ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError) as e:
            raise self.mismatch(f"--{self.name}", text[:99]) from e

    def check(self, where: str, value: Any) -> Any:
        """The value in one of the key's types: a whole float is accepted as an int, an int as a float."""
        texts = type(value) is tuple and {*map(type, value)} <= {str}
        if type(value) in self.kinds or (texts and tuple[str, ...] in self.kinds):
            return value
        if int in self.kinds and type(value) is float and value.is_integer():
            return int(value)
        if float in self.kinds and type(value) is int:
            return float(value)
        raise self.mismatch(where, value)

    def mismatch(self, where: str, value: Any) -> UserError:
        kinds = (TYPE_NAMES.get(kind) or ("a dict" if kind is dict else "a tuple of texts") for kind in self.kinds)
        return UserError(f"{where}: {self.name} must be {' or '.join(kinds)}, not {value!r}")


def keys_of(cls: type) -> Any:
    """A dict field for the keys of another dataclass that files and flags set: `model: dict = keys_of(GPTConfig)`."""
    return field(default_factory=dict, metadata={"keys_of": cls})


def keys(cls: type) -> dict[str, Key]:
    """Every key that files and flags may set, in the order of the fields."""
    found: dict[str, Key] = {}
    hints, comments = typing.get_type_hints(cls), _comments(cls)
    for f in fields(cls):
        hint, inner = hints[f.name], f.metadata.get("keys_of")
        if inner:
            parts = (replace(key, group=f.name, part=f.name) for key in keys(inner).values())
            found |= {key.name: key for key in parts if key.name not in hints}  # the outer dataclass's own key wins
        else:
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            found[f.name] = Key(f.name, kinds, f.default, *comments[f.name])
    return found


def _comments(cls: type) -> dict[str, tuple[str, str]]:
    """The comment on each field's line and the title of its group, base classes included."""
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
    """The module's docstring; every key with its default and its comment, by group."""
    doc = inspect.getdoc(sys.modules[cls.__module__]) or ""
    script = Path(sys.argv[0])
    program = f"-m {script.parent.name}" if script.name == "__main__.py" else script.name
    lines = [doc, "", f"usage: python {program} [config/FILE.py ...] [--key=value ...]"]
    flags = {f"  --{key.name}={key.default!r}": key for key in keys(cls).values()}
    for group in dict.fromkeys(key.group for key in flags.values()):
        lines += ["", f"{group}:"] if group else [""]
        pad = max(map(len, flags))
        wrap = textwrap.TextWrapper(max(shutil.get_terminal_size().columns, pad + 40), break_on_hyphens=False)
        wrap.subsequent_indent = " " * (pad + 2)
        lines += [wrap.fill(f"{flag:<{pad}}  {key.comment}") for flag, key in flags.items() if key.group == group]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# From files and flags to values


def parse(cls: type[C], argv: Sequence[str] | None = None) -> C:
    """An instance of the dataclass cls, set by argv (default: the command line). UserError for bad input."""
    known = keys(cls)
    arguments: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for where, key, value in _assignments(cls, known, sys.argv[1:] if argv is None else argv):
        values = arguments.setdefault(key.part, {}) if key.part else arguments
        value = key.check(where, value)
        if type(value) is tuple and origins.get(key.name) == where == f"--{key.name}":  # a repeated flag adds to it
            value = values[key.name] + value
        values[key.name], origins[key.name] = value, where
    with reported():  # a ValueError for values that do not fit each other, such as n_embd and n_head
        config = cls(**arguments)
    return config


def _assignments(cls: type, known: dict[str, Key], argv: Sequence[str]) -> Iterator[tuple[str, Key, Any]]:
    """The assignments of files and flags in order, as (where, key, value)."""
    args = list(argv)
    while args:
        arg = args.pop(0)
        if arg in ("-h", "--help"):
            print(help_text(cls))
            sys.exit(0)
        if not arg.startswith("--"):
            if arg.startswith("-") or not arg.endswith(".py"):
                raise UserError(f"{arg!r} is neither a config file (FILE.py) nor a flag (--key=value); see --help")
            yield from _read_file(known, arg)
            continue
        name, equals, text = arg[2:].partition("=")
        key = _find(known, f"--{name}", name.replace("-", "_"))
        if not equals:
            bare = bool in key.kinds and not (args and args[0].lower() in BOOLS)  # --compile means --compile=true
            if not bare and not args:
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            text = "true" if bare else args.pop(0)
        yield f"--{key.name}", key, key.read(text)


def _find(known: dict[str, Key], where: str, name: str) -> Key:
    if name in known:
        return known[name]
    key, hint = NANOGPT_KEYS.get(name, ("", ""))
    if key in known:
        raise UserError(f"{where}: unknown key {name!r}: it {hint}")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "--help lists all keys"
    raise UserError(f"{where}: unknown key {name!r}; {hint}")


def _read_file(known: dict[str, Key], path: str) -> Iterator[tuple[str, Key, Any]]:
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except SyntaxError as e:
        raise UserError(f"{path}:{e.lineno}: {e.msg}") from e
    except (OSError, ValueError, RecursionError, MemoryError) as e:  # also: not UTF-8, a null byte, nested too deep
        folder, name = Path(path).parent, NANOGPT_FILES.get(Path(path).stem, Path(path).stem)
        others = [other.stem for other in folder.glob("*.py")] if isinstance(e, FileNotFoundError) else []
        hint = "".join(f"; did you mean {folder / near}.py?" for near in difflib.get_close_matches(name, others, n=1))
        raise UserError(f"cannot read the config file {path}: {getattr(e, 'strerror', None) or e}{hint}") from e
    values: dict[str, Any] = {}
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # a docstring
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            raise UserError(f"{where}: a config file holds plain assignments, key = value, and no other code")
        name = node.targets[0].id
        key = _find(known, where, name)
        try:
            values[name] = _evaluate(node.value, values)
        except (ValueError, ArithmeticError, RecursionError, MemoryError) as e:
            raise UserError(f"{where}: {name} cannot be computed: {e}") from e
        yield where, key, values[name]


OPERATORS: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Pow: operator.pow}
OPERATORS |= {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATORS |= {ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}


def _evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a literal, a name assigned above, or arithmetic over numbers; ValueError for all else."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return _sensible(node.value)
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name):
            raise ValueError(f"{name!r} is not assigned above")
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_evaluate(item, names) for item in items)
        case ast.Dict(keys=keys, values=items) if all(isinstance(key, ast.Constant) for key in keys):
            return {_evaluate(k, names): _evaluate(v, names) for k, v in zip(keys, items, strict=True)}  # type: ignore[arg-type]
        case ast.UnaryOp(op=op, operand=a) if type(op) in OPERATORS:
            operands = [_evaluate(a, names)]
        case ast.BinOp(op=op, left=a, right=b) if type(op) in OPERATORS:
            operands = [_evaluate(a, names), _evaluate(b, names)]
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is neither a literal nor arithmetic")
    if not all(type(x) in (int, float) for x in operands):
        raise ValueError(f"{ast.unparse(node)!r} is arithmetic with something that is not a number")
    if isinstance(op, ast.Pow) and abs(operands[1]) > 64:
        raise ValueError(f"{ast.unparse(node)!r} has an exponent above 64")
    return _sensible(OPERATORS[type(op)](*operands))


def _sensible(value: Any) -> Any:
    """The value; ValueError for a number that is complex, infinite, not a number, or beyond 2^1000."""
    if isinstance(value, complex) or (isinstance(value, int | float) and not abs(value) <= 2**1000):
        raise ValueError("this is not a real number of a sensible size")
    return value

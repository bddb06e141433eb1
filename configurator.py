"""One checked config from a dataclass of defaults, config files and the command line.

    config = configurator.parse(Config)     # python train.py config/tiny.py --max_iters=200 --compile

Files and flags apply from left to right, so the last word wins. A file is plain assignments of literals, and of
arithmetic over names assigned above: it is parsed, never executed. The comment behind a default is its documentation.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import operator
import os
import re
import signal
import sys
import tokenize
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

C = TypeVar("C")
BOOLS = {"true": True, "false": False, "1": True, "0": False}


class UserError(Exception):
    """A mistake of the user's: what, where, what to do. Exit status 2."""


class RunError(Exception):
    """A failure of the run: disk full, loss not finite, damaged checkpoint. Exit status 1."""


FAILURES = {  # of Python and of PyTorch, by what they say, that are no bug
    "MemoryError|out of memory|can't allocate memory": (
        "out of memory: try a smaller batch_size, num_samples, sequence_len or model"
    ),
    "No working C\\+\\+ compiler": "--compile needs a C++ compiler, such as g++, and there is none",
}


def run(main: Callable[[], None]) -> NoReturn:
    """Call a script's main and exit: one `error:` line for a UserError or RunError, a traceback for a bug."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal does not have is no reason to fail
    try:
        main()
        sys.stdout.flush()
    except (UserError, RunError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 1)
    except (MemoryError, RuntimeError) as e:
        what = [line for pattern, line in FAILURES.items() if re.search(pattern, f"{type(e).__name__}: {e}")]
        if not what:
            raise
        print(f"error: {what[0]}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has left (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    sys.exit(0)


def parse(cls: type[C], argv: Sequence[str] | None = None) -> C:
    """An instance of the dataclass cls with what argv (default: the command line) says. UserError for bad input."""
    values: dict[str, Any] = {}
    flags: set[str] = set()
    for where, key, value in _assignments(cls, sys.argv[1:] if argv is None else argv):
        value = _checked(cls, where, key, value)
        if type(value) is tuple and key in flags and where.startswith("--"):  # a flag that is given several times
            value = values[key] + value
        values[key] = value
        (flags.add if where.startswith("--") else flags.discard)(key)
    try:
        return cls(**values)
    except ValueError as e:  # values that do not go together, say n_embd and n_head
        raise UserError(str(e)) from e


def help_text(cls: type) -> str:
    """Every key with its default and its comment."""
    doc = (inspect.getdoc(sys.modules[cls.__module__]) or "").split("\n\n")[0]
    comments = _comments(cls)
    lines = [doc, "", f"usage: python {Path(sys.argv[0]).name} [config/FILE.py ...] [--key=value ...]", ""]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = f"  --{field.name}={field.default!r}"
        lines.append(f"{key:<38}  {comments.get(field.name, '')}".rstrip())
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Where assignments come from, as (where, key, value)


def _assignments(cls: type, argv: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    args = list(argv)
    while args:
        arg = args.pop(0)
        if arg in ("-h", "--help"):
            print(help_text(cls))
            sys.exit(0)
        if not arg.startswith("--"):
            if arg.startswith("-") or not arg.endswith(".py"):
                raise UserError(f"{arg!r} is neither a config file (FILE.py) nor a flag (--key=value); see --help")
            yield from read_file(cls, arg)
            continue
        key, equals, text = arg[2:].partition("=")
        key = key.replace("-", "_")
        kind = _kinds(cls, f"--{key}", key)
        if not equals:
            if bool in kind and not (args and args[0].lower() in BOOLS):
                text = "true"
            elif args:
                text = args.pop(0)
            else:
                raise UserError(f"--{key} needs a value: --{key}=VALUE")
        yield f"--{key}", key, _literal(f"--{key}", key, text, kind)


def read_file(cls: type, path: str) -> Iterator[tuple[str, str, Any]]:
    """The assignments of a config file, as (where, key, value)."""
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
        tree = ast.parse(source)
    except OSError as e:
        raise UserError(f"cannot read the config file {path}: {e.strerror}") from e
    except SyntaxError as e:
        raise UserError(f"{path}:{e.lineno}: {e.msg}") from e
    except (ValueError, RecursionError, MemoryError) as e:  # not UTF-8, a null byte, nested without end
        raise UserError(f"{path}: not a config file: {e}") from e
    values: dict[str, Any] = {}
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # a docstring
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            raise UserError(f"{where}: a config file holds plain assignments, key = value, and no other code")
        key = node.targets[0].id
        _kinds(cls, where, key)
        try:
            values[key] = _evaluate(node.value, values)
        except (ArithmeticError, RecursionError, MemoryError) as e:
            raise UserError(f"{where}: {key} cannot be computed: {e}") from e
        except ValueError as e:
            raise UserError(f"{where}: {e}") from e
        yield where, key, values[key]


OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


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
    """The value; ValueError for a number in it that is complex, infinite, not a number, or beyond 2^1000."""
    for item in value.values() if type(value) is dict else ():
        _sensible(item)
    if isinstance(value, complex) or (isinstance(value, int | float) and not abs(value) <= 2**1000):
        raise ValueError("this is not a real number of a sensible size")
    return value


# -----------------------------------------------------------------------------
# What a key may hold


def _kinds(cls: type, where: str, key: str) -> tuple[Any, ...]:
    """The types that a key takes: (int,), or (int, NoneType) for `int | None`."""
    hints = typing.get_type_hints(cls)
    if key not in {field.name for field in dataclasses.fields(cls)}:  # type: ignore[arg-type]
        close = difflib.get_close_matches(key, hints, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "--help lists them all"
        raise UserError(f"{where}: unknown key {key!r}; {hint}")
    hint = hints[key]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _literal(where: str, key: str, text: str, kinds: tuple[Any, ...]) -> Any:
    """Read what stands on the command line as one of kinds: text as it is, all else as in a config file."""
    if tuple[str, ...] in kinds:
        return (text,)
    if str in kinds and not (text == "None" and types.NoneType in kinds):
        return text
    if bool in kinds and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    try:
        return _sensible(ast.literal_eval(text))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as e:
        raise UserError(f"{where}: {key} must be {_names(kinds)}, not {text[:99]!r}") from e


def _checked(cls: type, where: str, key: str, value: Any) -> Any:
    """The value as the key's type: a whole float serves as an int, an int as a float."""
    kinds = _kinds(cls, where, key)
    for kind in kinds:
        if type(value) is kind or (kind == tuple[str, ...] and type(value) is tuple and {*map(type, value)} <= {str}):
            return value
    if int in kinds and type(value) is float and value.is_integer():
        return int(value)
    if float in kinds and type(value) is int:
        return float(value)
    raise UserError(f"{where}: {key} must be {_names(kinds)}, not {value!r}")


def _names(kinds: tuple[Any, ...]) -> str:
    names = {types.NoneType: "None", tuple[str, ...]: "a tuple of str"}
    return " or ".join(names.get(kind) or kind.__name__ for kind in kinds)


def _comments(cls: type) -> dict[str, str]:
    """The comment that stands on the line of each field, base classes included."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            name = ""
            for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(base)).readline):
                if token.type == tokenize.NAME and token.line.lstrip().startswith(f"{token.string}:"):
                    name = token.string
                elif token.type == tokenize.COMMENT and name and token.start[1] > 8:
                    comments[name] = token.string.lstrip("# ")
                    name = ""
    return comments

"""Questions about the Python standard library, answered by its docstrings: made offline, from its source.

Every tenth module is held out, so that none of its docstrings is trained.
"""

import ast
import builtins
import inspect
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

from sologpt import errors
from sologpt.conversations import Example

SKIP = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "site-packages"}
SKIP |= {"ensurepip", "ntpath", "antigravity", "this"}
NAMES = {"posixpath": "os.path", "genericpath": "os.path"}  # as users write them
TRAINED = {"os", "builtins"}  # never held out
VAL_FRACTION = 0.1
QUESTIONS = ("What does {} do?", "What is {} for?", "Explain {}.", "Describe {}.", "How does {} work?")
ABOUT_CLASS = ("What is {}?", *QUESTIONS[1:])
SHORTEST = 20  # characters of an answer
FOLDER = Path(__file__).resolve().parent

Docstrings = dict[str, str]  # by the names that a user writes, such as os.path.join


def stdlib() -> Iterator[tuple[str, ast.Module]]:
    """Yield the name and the syntax tree of each public module of the standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        public = parts and not any(part.startswith("_") or part in SKIP for part in parts)
        if public and parts[0] in sys.stdlib_module_names:
            yield NAMES.get(parts[0], ".".join(parts)), ast.parse(path.read_bytes())


def docstrings(name: str, tree: ast.Module | ast.ClassDef) -> Docstrings:
    """Return the docstrings of the public functions, classes and methods in a module or class."""
    found: Docstrings = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            found[f"{name}.{node.name}"] = ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                found |= docstrings(f"{name}.{node.name}", node)
    return found


def exports(name: str, package: ast.Module) -> set[str]:
    """Return what a package imports from its modules: json.decoder.JSONDecoder, asyncio.tasks.*, ..."""
    imports = [node for node in package.body if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {f"{name}.{node.module}.{alias.name}" for node in imports for alias in node.names}


def public_name(name: str, module: str, exported: set[str]) -> str:
    """Return the shortest name: json.JSONDecoder.decode for json.decoder.JSONDecoder.decode."""
    package, _, _ = module.rpartition(".")
    inside = name.removeprefix(f"{module}.")
    is_exported = exported & {f"{module}.*", f"{module}.{inside.partition('.')[0]}"}
    return f"{package}.{inside}" if is_exported else name


def builtin_docstrings() -> Docstrings:
    """Return the docstrings of the builtin functions and types, and of the methods of these types."""
    found: Docstrings = {}
    for name, value in sorted(vars(builtins).items()):
        if name[0] != "_" and (inspect.isbuiltin(value) or (name.islower() and inspect.isclass(value))):
            found[name] = inspect.getdoc(value) or ""
            methods = sorted(vars(value).items()) if inspect.isclass(value) else []
            found |= {
                f"{name}.{key}": inspect.getdoc(method) or "" for key, method in methods if key[0] != "_"
            }
    return found


def first_paragraph(docstring: str) -> str:
    """Return the first paragraph that is a sentence, on one line; "" if there is none."""
    for paragraph in docstring.split("\n\n"):
        text = " ".join(paragraph.split())
        if len(text) >= SHORTEST and re.match(r"[A-Z].*[.!]$", text) and ">>>" not in text:
            return text
    return ""


def examples(docs: Docstrings, n_questions: int) -> list[Example]:
    """Return n conversations about each docstring: "What does ... do?", and others picked by its name."""
    made = []
    for name, docstring in docs.items():
        others = len(QUESTIONS) - 1
        first = zlib.crc32(name.encode())
        questions = ABOUT_CLASS if name.rpartition(".")[2][0].isupper() else QUESTIONS
        for i in range(n_questions):
            question = questions[1 + (first + i) % others] if i else questions[0]
            answer = {"role": "assistant", "content": docstring}
            made.append(Example(name, [{"role": "user", "content": question.format(name)}, answer]))
    return made


def split() -> tuple[Docstrings, Docstrings]:
    """Return the docstrings to train on, and those of the held-out modules, none of them twice."""
    modules: dict[str, Docstrings] = {"builtins": builtin_docstrings()}
    exported: set[str] = set()
    for name, tree in stdlib():
        package = name.partition(".")[0]
        exported |= exports(name, tree)
        found = docstrings(name, tree).items()
        modules.setdefault(package, {}).update({public_name(key, name, exported): x for key, x in found})
    _, held_out = common.hold_out(sorted(modules.keys() - TRAINED), VAL_FRACTION)
    train: Docstrings = {}
    val: Docstrings = {}
    seen = set()
    for package in sorted(modules, key=lambda package: package in held_out):  # those to train on first
        for name, docstring in modules[package].items():
            answer = first_paragraph(docstring)
            if answer and answer not in seen:
                seen.add(answer)
                (val if package in held_out else train)[name] = answer
    return train, val


def main() -> None:
    parser = common.Parser(FOLDER, __doc__)
    parser.add_tokenizer()
    parser.add_sequence_len()
    args = parser.parse_args()
    train, val = split()
    sets = examples(train, n_questions=2), examples(val, n_questions=1)
    common.write_conversations(args.out_dir, *sets, args.tokenizer, args.sequence_len)


if __name__ == "__main__":
    errors.run(main)

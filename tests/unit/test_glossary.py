"""Sources and documents use the field's words, and none of the dialect that they once had.

`WORDS` and `PHRASES` occur nowhere: neither in prose nor in names, nor as a part of a name
(`PaintingFields`). `NAMES` are ordinary words: prose may use them, but they say nothing as the name
of a variable, parameter, attribute, function, class or module.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WORDS = frozenset(
    {
        *("easel", "easels", "painter", "painters", "paint", "paints", "painted", "painting"),
        *("paintings", "picture", "pictures", "wish", "wishes", "keeper", "keepers"),
        *("crew", "crews", "lifeline", "lifelines", "nobody"),
    }
)
"""Use generate, generated, image, request, supervisor, threads."""
PHRASES = ("in the house", "can not", "of its own", "lies in", "lie in", "beside it")
"""Use admitted; cannot; separate; is in; next to it."""
NAMES = frozenset({"found", "given", "own", "told", "said", "asked", "held"}) | {
    *("places", "ours", "theirs", "arrivals"),
}
"""Use a noun for what it is: `warnings`, `model_config`, `matching_block`, `max_concurrency`."""
PARTS = NAMES - {"found", "given", "own", "places"}
"""Those that are also bad as a part of a name, such as `HeldModel`."""

ALLOWED = (
    "triptych_pictures",  # a metric's name, which dashboards use
)
ALLOWED_NAMES = re.compile("held_?out", re.I)
"""A held-out set, in machine learning."""

TREES = (
    *("api", "benchmarks", "cli", "demo_models", "deploy", "docs", "model_store_scripts"),
    "runners",
)
FILES = (
    *("service.py", "settings.py", "model_choice.py", "README.md", "CONTRIBUTING.md", "Makefile"),
    *("pyproject.toml", "bentofile.yaml", ".importlinter", ".ci/run"),
)
SUFFIXES = frozenset({".py", ".md", ".cpp", ".h", ".sh", ".yaml", ".jinja", ""})
CORPORA = "demo_models"
"""In the Python files of this folder strings are the words of stories and descriptions."""

_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_BREAK = r"(?:\s|#|//|\*)+"
"""What separates the words of a phrase: also the line break of a comment."""
_PHRASES = [(phrase, re.compile(rf"\b{_BREAK.join(phrase.split())}\b", re.I)) for phrase in PHRASES]


def _files() -> list[Path]:
    paths = [path for tree in TREES for path in sorted((ROOT / tree).rglob("*"))]
    files = [path for path in paths if path.is_file() and path.suffix in SUFFIXES]
    return [path for path in files if "weights" not in path.parts] + [ROOT / f for f in FILES]


def _occurrences(path: Path) -> Iterator[tuple[int, str]]:
    """The line number of each word that is not to be used, and the word."""
    name = path.relative_to(ROOT).as_posix()
    yield from ((0, word) for word in _parts(name) if word in WORDS)
    if path.stem in NAMES:
        yield 0, f"{path.stem} (name)"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tree = ast.parse(text)
        is_corpus = name.startswith(CORPORA)
        if is_corpus:
            text = _without_strings(text, tree)
        # Stories have places.
        yield from _names(tree, NAMES - {"places"} if is_corpus else NAMES)
    for allowed in ALLOWED:
        text = text.replace(allowed, "")
    for number, line in enumerate(text.splitlines(), start=1):
        yield from ((number, word) for word in _parts(line) if word in WORDS)
    for phrase, pattern in _PHRASES:
        for match in pattern.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, phrase


def _parts(text: str) -> list[str]:
    """The words of a text, names taken apart at underscores and capital letters."""
    return [part.lower() for part in _PART.findall(text)]


def _names(tree: ast.AST, names: frozenset[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        for name in _defined(node):
            rest = ALLOWED_NAMES.sub("", name)
            if rest.strip("_").lower() in names or PARTS.intersection(_parts(rest)):
                yield getattr(node, "lineno", 0), f"{name} (name)"


def _defined(node: ast.AST) -> list[str]:
    """The names that a node assigns, defines, imports, or reads from an object."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.Attribute(attr=name):
            return [name]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.keyword(arg=str(name)) | ast.MatchAs(name=str(name)):
            return [name]
        case ast.ExceptHandler(name=str(name)):
            return [name]
        case ast.alias(name=name, asname=alias):
            return [*name.split("."), *([alias] if alias else [])]
        case ast.ImportFrom(module=str(module)):
            return module.split(".")
    return []


def _without_strings(text: str, tree: ast.AST) -> str:
    """Python source with blanks for the content of its strings, except for docstrings."""
    statements = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    docstrings = {id(value) for value in statements if isinstance(value, ast.Constant)}
    lines = [line.encode() for line in text.split("\n")]
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if not (is_string or isinstance(node, ast.JoinedStr)) or id(node) in docstrings:
            continue
        assert isinstance(node, ast.expr)
        last = node.end_lineno or node.lineno
        for number in range(node.lineno, last + 1):
            line = lines[number - 1]
            start = node.col_offset if number == node.lineno else 0
            end = (node.end_col_offset or 0) if number == last else len(line)
            lines[number - 1] = line[:start] + b" " * (end - start) + line[end:]
    return "\n".join(line.decode() for line in lines)


def test_no_dialect() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in _files()
        for number, word in sorted(set(_occurrences(path)))
    ]
    if lines:
        pytest.fail(f"{len(lines)} occurrences:\n" + "\n".join(lines), pytrace=False)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("class PaintingFields: ...", ["painting"]),
        ("# It can\n# not be.\nx = 1", ["can not"]),
        ('"""A text of\nits own."""', ["of its own"]),
        ("_held = told_as(1)", ["_held (name)"]),
        ("def f(own): ...", ["own (name)"]),
        ("x.given = 1", ["given (name)"]),
        ("class HeldModel: ...", ["HeldModel (name)"]),
        ("from a.places import b as found", ["found (name)", "places (name)"]),
        ("# The given answer was found; it cannot be held.\nnot_found = ModelNotFound", []),
        ("x = 'triptych_pictures'", []),
        ("is_held_out = True", []),
        ("scan = not True", []),
    ],
)
def test_the_dialect_is_recognised(
    source: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(source)
    assert sorted(word for _, word in set(_occurrences(path))) == words


def test_strings_of_the_corpora_are_not_checked() -> None:
    source = 'def f():\n    """A picture."""\n    return f"paint {x} é", "nobody"  # crew\n'
    checked = _without_strings(source, ast.parse(source))
    assert [part for part in _parts(checked) if part in WORDS] == ["picture", "crew"]

"""Names stand once, imports have no circles, and the files that prose names are there."""

import ast
import functools
import io
import re
import tokenize
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "m2l").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])
READ = [*SOURCES, *(ROOT / "scripts").rglob("*.py"), *(ROOT / "examples").glob("*.py")]


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def dotted(path):
    """tasks/skills/__init__.py -> m2l.tasks.skills"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "m2l" else ("m2l", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in SOURCES}


def twice(places):
    return {name: sorted(paths) for name, paths in places.items() if len(paths) > 1}


def test_base_names_of_files_are_unique_but_for_the_commands():
    places = defaultdict(list)
    for path in SOURCES:
        if path.stem not in ("__init__", "__main__") and path.parent.name != "cli":
            places[path.stem].append(str(path.relative_to(ROOT)))
    assert twice(places) == {}


def test_names_of_classes_are_unique():
    places = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert twice(places) == {}


def imported(path):
    """The modules of m2l that a file imports at any depth, for types alone included."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else module for name in names]
        else:
            continue
        yield from (name for name in names if name in MODULES and name != dotted(path))


def circle(uses):
    """A circle of modules, the first again at the end; or []."""
    done = set()

    def visit(module, trail):
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for used in sorted(uses[module]):
            if found := visit(used, [*trail, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in sorted(uses))), [])


def test_imports_have_no_circle_those_for_types_included():
    assert circle({dotted(path): {*imported(path)} for path in SOURCES}) == []


def annotations(module):
    for node in ast.walk(module):
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns


# Of m2l and tasks; it falls with each that gets a type, and is never raised.
ANY = 10


def test_few_annotations_say_any():
    lines = {
        (path, name.lineno)
        for path in SOURCES
        for annotation in annotations(tree(path))
        for name in ast.walk(annotation)
        if isinstance(name, ast.Name) and name.id == "Any"
    }
    assert len(lines) <= ANY


def prose(path):
    """The docstrings and comments of a file."""
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


# Files of other projects, and those that users have.
ELSEWHERE = {"NAME.gin", "config.gin", "run_example.py", "mixtures.py"}


def test_prose_names_no_file_that_is_not_there():
    folders = ("m2l", "tasks", "scripts", "tests", "gin_configs", "docs", "examples")
    there = {file.name for folder in folders for file in (ROOT / folder).rglob("*")} | {"setup.py"}
    pattern = re.compile(r"(?<![\w*{}<>.])(?:[\w-]+/)*([\w-]+\.(?:py|gin|sh))\b")
    named = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in READ
        for text in prose(path)
        for name in pattern.findall(text)
        if name not in there | ELSEWHERE
    }
    assert named == set()

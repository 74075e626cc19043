"""The files that prose names are there."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "m2l").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])
READ = [*SOURCES, *(ROOT / "scripts").rglob("*.py"), *(ROOT / "examples").glob("*.py")]


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

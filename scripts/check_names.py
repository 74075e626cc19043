"""Checks the names of values and the signatures of functions in the package.

    python scripts/check_names.py [PATH ...]

Words that name no thing (a participle, a question word, a preposition) are no names of parameters
or local variables; a parameter is never called by a preposition; public functions and methods
annotate all parameters and what they return; docstrings of functions begin with a verb. Prints each
place that fails, and exits with 1 if there is one. By default all of m2l, tasks, scripts and
examples is checked.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VAGUE = {
    "found", "held", "given", "kept", "made", "taken", "told", "begun", "what", "how", "where",
    "mine", "others", "rest",
}  # fmt: skip
VAGUE_PREFIX = re.compile("of_")
PREPOSITIONS = {
    "of", "to", "at", "by", "on", "in_", "into", "from_", "for_", "with_", "beside", "before",
    "after", "between", "within", "over", "under",
}  # fmt: skip
# "Returns", "Computes", "Is"; these end like a verb and are none.
VERB = re.compile("[A-Z][a-z]+s")
NO_VERBS = {
    "As", "Bits", "Bytes", "Digests", "Elements", "Examples", "Fields", "Files", "Its",
    "Keys", "Names", "Numbers", "Parameters", "Paths", "Positions", "Records", "Rows",
    "Shapes", "Sizes", "Spans", "Statistics", "Steps", "Tensors", "This", "Thresholds", "Words",
}  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, public: bool = True) -> Iterator[tuple[Function, bool]]:
    """Yields every function of a module, and whether it is public: neither private nor nested."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node, public and (not node.name.startswith("_") or node.name == "__init__")
            yield from functions(node, False)
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, public and not node.name.startswith("_"))
        else:
            yield from functions(node, public)


def parameters(function: Function) -> list[ast.arg]:
    """Returns all parameters of a function."""
    args = function.args
    further = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *further]


def local_names(function: Function) -> set[str]:
    """Returns the names of a function's parameters and variables, not those of functions in it."""
    names = {arg.arg for arg in parameters(function)}
    stack = list(function.body)
    while stack:
        node = stack.pop()
        if isinstance(node, Function | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        stack += ast.iter_child_nodes(node)
    return names


def is_vague(name: str) -> bool:
    """Returns whether a name is one that names no thing."""
    return name in VAGUE or VAGUE_PREFIX.match(name) is not None


def begins_with_verb(function: Function) -> bool:
    """Returns whether the docstring of a function, if it has one, begins with a verb.

    That of a property is a noun, and that of a command what its help prints.
    """
    decorators = " ".join(map(ast.unparse, function.decorator_list))
    docstring = ast.get_docstring(function)
    if not docstring or re.search("property|command|group", decorators):
        return True
    first = docstring.split(maxsplit=1)[0].rstrip(",")
    return VERB.fullmatch(first) is not None and first not in NO_VERBS


def problems(function: Function, public: bool) -> Iterator[tuple[str, str]]:
    """Yields (check, what it says) of a function."""
    if vague := sorted(filter(is_vague, local_names(function))):
        yield "vague", f"{function.name}: {', '.join(vague)}"
    for arg in parameters(function):
        if arg.arg in PREPOSITIONS:
            yield "preposition", f"{function.name}: parameter {arg.arg!r}"
    if not begins_with_verb(function):
        yield "docstring", f"{function.name}: {ast.get_docstring(function).splitlines()[0]}"
    if public:
        untyped = [arg.arg for arg in parameters(function) if arg.annotation is None]
        untyped = [name for name in untyped if name not in ("self", "cls")]
        if untyped:
            yield "untyped", f"{function.name}: parameters {', '.join(untyped)}"
        if function.returns is None and function.name != "__init__":
            yield "untyped", f"{function.name}: what it returns"


def main() -> int:
    """Runs the checks of the command line; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folders = [ROOT / name for name in ("m2l", "tasks", "scripts", "examples")]
    parser.add_argument("paths", nargs="*", type=Path, default=folders)
    failures = [
        f"{file}:{function.lineno}: {check}: {text}"
        for path in parser.parse_args().paths
        for file in sorted([path] if path.is_file() else path.rglob("*.py"))
        for function, public in functions(ast.parse(file.read_text()))
        for check, text in problems(function, public)
    ]
    print("\n".join(failures) or "Names, docstrings and signatures are as they should be.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks the names of values and the signatures of functions in the package.

    python scripts/check_names.py [--list] [PATH ...]

Words that name no thing (a participle, a question word, a preposition) are no names of parameters
or local variables; a parameter is never called by a preposition; public functions and methods
annotate all parameters and what they return; docstrings of functions begin with a verb. Prints how
many functions of each folder fail, and exits with 1 if more do than LIMITS has.
"""

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = {"vague": 184, "preposition": 16, "docstring": 314, "untyped": 0}
"""What all of m2l and tasks has; lower them with each function that is put right, never raise them.

The aim is vague names in 3 % of the functions, and none of the others.
"""

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
    first = docstring.split(maxsplit=1)[0]
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
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "m2l", ROOT / "tasks"])
    parser.add_argument("--list", action="store_true", help="Print each place.")
    arguments = parser.parse_args()
    counts: dict[str, Counter] = {}
    for path in arguments.paths:
        for file in sorted([path] if path.is_file() else path.rglob("*.py")):
            absolute = file.absolute()
            shown = absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute
            count = counts.setdefault(str(shown.parent), Counter())
            for function, public in functions(ast.parse(file.read_text())):
                count["functions"] += 1
                listed = [*problems(function, public)]
                count.update({check for check, _ in listed})
                if arguments.list:
                    for check, text in listed:
                        print(f"{shown}:{function.lineno}: {check}: {text}")
    total = sum(counts.values(), Counter())
    print(f"{'folder':30} {'functions':>9}", *(f"{check:>11}" for check in LIMITS))
    for folder, count in [*counts.items(), ("all", total)]:
        print(f"{folder:30} {count['functions']:>9}", *(f"{count[check]:>11}" for check in LIMITS))
    print(f"{'at most':30} {'':>9}", *(f"{LIMITS[check]:>11}" for check in LIMITS))
    return int(any(total[check] > limit for check, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())

"""The two ends of a sandboxed run: the tests, in one process, and the program, in another.

The tests run where the program does not. A name that they do not define is requested from the
program's process, and what it is bound to there is called there (`exchange`), so that the program
sees the arguments of its calls, and neither the tests nor what they expect. Builtins and modules
are those of the tests' own process.
"""

import __future__

import ast
import builtins
import contextlib
import importlib
import io
import operator
import sys
import types
from collections.abc import Callable, Iterable, Sequence

from m2l.evaluation.sandbox import exchange

PythonObject = exchange.PythonObject
_MODULE = "<tests>"
# What the tests inside a whole program may name, and have from this process.
_PURE_BUILTINS = (
    *("abs", "all", "any", "bin", "bool", "bytearray", "bytes", "callable", "chr", "complex"),
    *("dict", "divmod", "enumerate", "filter", "float", "format", "frozenset", "hash", "hex"),
    *("int", "isinstance", "issubclass", "iter", "len", "list", "map", "max", "min", "next"),
    *("oct", "ord", "pow", "range", "repr", "reversed", "round", "set", "slice", "sorted", "str"),
    *("sum", "tuple"),
    *("zip", "Ellipsis", "NotImplemented", "print"),
)
_PURE_MODULES = (
    *("math", "cmath", "re", "string", "itertools", "functools", "operator", "collections", "json"),
    *("statistics", "fractions", "decimal", "datetime", "heapq", "bisect", "copy", "numpy"),
    "pytest",
)
_IMPURE_NODES = (
    *(ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.NamedExpr, ast.ClassDef),
    *(ast.Await, ast.Yield, ast.YieldFrom, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith),
)
_FRAMES = ("gi_", "cr_", "ag_", "f_", "tb_", "co_")
_TEST_NAMES = ("check", "test", "assertion")


class _Builtins(dict[str, PythonObject]):
    """Builtins; a name that is none of them is the program's."""

    def __init__(self, names: dict[str, PythonObject], peer: exchange.Peer) -> None:
        super().__init__(names)
        self._peer = peer
        self._remembered: set[str] = set()

    def __missing__(self, name: str) -> PythonObject:
        if name.startswith("__"):
            raise KeyError(name)
        value = self._peer.request("name", name)
        if type(value) is exchange.Remote and isinstance(value, exchange.Remote):
            self[name] = value  # a function; data is asked for each time
            self._remembered.add(name)
        return value

    def forget(self) -> None:
        """Forgets functions, since the program goes on and may define them anew."""
        for name in self._remembered:
            del self[name]
        self._remembered.clear()


def run_tests(connection: exchange.Connection, job: dict[str, str]) -> dict[str, str]:
    """Runs a program's tests.

    Args:
        connection: To the process that runs the program.
        job: "preamble", "answer" and "tests": the source of what the tests share with the answer,
            of the answer, and of the tests. Or "program" alone: see `_parts_of_program`.

    Returns:
        "verdict": "passed", or the class of the first error. Or "lacks": the isolation that the
        program's process could not get. Empty if the program's process ended or broke the rules.
    """
    classes: dict[str, type] = {}
    try:
        match connection.receive():
            case ["lacks", str(mechanism)]:
                return {"lacks": mechanism}
            case ["ready"]:
                pass
            case _:
                return {}
        peer = exchange.Peer(connection, _OPERATIONS, classes.get, _may_be_called)
        if "program" in job:
            _judge_program(peer, job["program"])
        else:
            _judge_answer(peer, classes, job["preamble"], job["answer"], job["tests"])
    except (exchange.Closed, exchange.Violation):
        return {}
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the tests did not pass
        return {"verdict": f"failed: {type(error).__name__:.80}"}
    return {} if peer.violated else {"verdict": "passed"}


# What the program may do with a function or an iterator that it was passed.
_OPERATIONS: dict[str, Callable[..., PythonObject]] = {
    "call": lambda function, arguments, keywords: function(*arguments, **keywords),
    "iter": iter,
    "next": next,
}


def _may_be_called(value: object) -> bool:
    functions = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
    return isinstance(value, (*functions, types.MethodDescriptorType)) or hasattr(value, "__next__")


def _namespace(peer: exchange.Peer, names: dict[str, PythonObject]) -> dict[str, PythonObject]:
    return {"__name__": "__main__", "__builtins__": _Builtins(names, peer)}


def _run(statements: Sequence[ast.stmt], namespace: dict[str, PythonObject]) -> None:
    module = ast.Module(list(statements), [])
    exec(compile(module, _MODULE, "exec", dont_inherit=True), namespace)


# ---- An answer, with a preamble and tests


def _judge_answer(
    peer: exchange.Peer, classes: dict[str, type], preamble: str, answer: str, tests: str
) -> None:
    test_statements = ast.parse(tests).body
    defined = [part for part in ast.parse(preamble).body if not _is_declaration(part)]
    names = dict(vars(builtins))
    for name in _own_builtins(test_statements, ast.parse(answer).body):
        del names[name]
    namespace = _namespace(peer, names)
    # Imports and definitions that the tests share with the program are run on both sides.
    _run(defined, namespace)
    shared = {
        statement.name: namespace[statement.name]
        for statement in defined
        if isinstance(statement, ast.ClassDef) and type(namespace[statement.name]) is type
    }
    peer.request("execute", preamble)
    peer.request("execute", answer)
    classes |= shared
    peer.request("share", list(shared))
    _run(test_statements, namespace)


def _is_declaration(statement: ast.stmt) -> bool:
    """Returns whether a function or class is only declared, for the answer to define."""
    if isinstance(statement, ast.ClassDef):
        methods = (part for part in statement.body if isinstance(part, ast.FunctionDef))
        return any(map(_is_declaration, methods))
    if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return all(
        isinstance(part, ast.Pass | ast.Raise)
        or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        for part in statement.body
    )


def _own_builtins(tests: Sequence[ast.stmt], answer: Sequence[ast.stmt]) -> set[str]:
    """Returns names of builtins that tests use for what an answer defines, as in `sum(10, 15)`.

    That is so only where they name nothing else that the answer could define.
    """
    nodes = [node for statement in tests for node in ast.walk(statement)]
    loaded, bound = set[str](), set[str]()
    for node in nodes:
        match node:
            case ast.Name(name, ast.Load()):
                loaded.add(name)
            case ast.Name(name) | ast.arg(name):
                bound.add(name)
            case ast.FunctionDef(name) | ast.ClassDef(name):
                bound.add(name)
            case ast.alias(name, alias):
                bound.add(alias or name.partition(".")[0])
    if loaded - bound - set(vars(builtins)):
        return set()
    defined = {statement.name for statement in answer if isinstance(statement, ast.FunctionDef)}
    return defined & (loaded - bound) & set(vars(builtins))


# ---- A program with its tests inside


def _judge_program(peer: exchange.Peer, program: str) -> None:
    statements = ast.parse(program).body
    names = {name: getattr(builtins, name) for name in _PURE_BUILTINS}
    names |= {
        name: value
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }
    names["type"] = lambda value: value.__class__  # with three arguments it would make a class
    parts = _parts_of_program(statements)
    tests, program_statements = (
        [statement for is_test, part in parts if is_test is kind for statement in part]
        for kind in (True, False)
    )
    for name in _own_builtins(tests, program_statements) & set(names):
        del names[name]
    namespace = _namespace(peer, names)
    for is_test, part in parts:
        if is_test:
            _run(part, namespace)
            continue
        namespace["__builtins__"].forget()
        whole = len(part) == len(statements)
        peer.request("execute", program if whole else ast.unparse(ast.Module(part, [])))
        for statement in part:
            _import_pure(statement, namespace)


def _import_pure(statement: ast.stmt, namespace: dict[str, PythonObject]) -> None:
    """Imports here what an import statement of the program takes from a pure module."""
    match statement:
        case ast.Import(aliases):
            for alias in aliases:
                if alias.name in _PURE_MODULES:
                    module = importlib.import_module(alias.name)
                    namespace[alias.asname or alias.name] = module
        case ast.ImportFrom(module, aliases, 0) if module in _PURE_MODULES:
            source = importlib.import_module(module)
            for alias in aliases:
                if alias.name in getattr(source, "__all__", dir(source)):
                    value = getattr(source, alias.name)
                    if not isinstance(value, types.ModuleType):
                        namespace[alias.asname or alias.name] = value


def _parts_of_program(statements: Sequence[ast.stmt]) -> list[tuple[bool, list[ast.stmt]]]:
    """Divides a program into its tests and all else, in order; a test runs in this process.

    A test is an assert at the top, a loop or condition of asserts, a function named `check`,
    `assertion` or `test...` that has asserts, and a call of it. Whatever could change the program's
    own objects is none, and is left to the program.
    """
    functions = {
        statement.name
        for statement in statements
        if isinstance(statement, ast.FunctionDef)
        and statement.name.startswith(_TEST_NAMES)
        and _contains(statement, ast.Assert)
        and _is_pure([statement])
    }
    tests = [_is_test(statement, functions) for statement in statements]
    program_names = _names(
        statement for statement, is_test in zip(statements, tests, strict=True) if not is_test
    )
    parts: list[tuple[bool, list[ast.stmt]]] = []
    for statement, candidate in zip(statements, tests, strict=True):
        is_test = candidate and not (_bound_by(statement) & program_names)
        if not parts or parts[-1][0] != is_test:
            parts.append((is_test, []))
        parts[-1][1].append(statement)
    return parts


def _is_test(statement: ast.stmt, functions: set[str]) -> bool:
    match statement:
        case ast.FunctionDef(name):
            return name in functions
        case ast.Expr(ast.Call(ast.Name(name))):
            return name in functions and _is_pure([statement])
        case ast.Assert():
            return _is_pure([statement])
        case ast.For() | ast.If():
            return (
                _contains(statement, ast.Assert)
                and _is_pure([statement])
                and all(_is_step(part, functions) for part in (*statement.body, *statement.orelse))
            )
    return False


def _is_step(statement: ast.stmt, functions: set[str]) -> bool:
    """Returns whether a statement is allowed in a loop of asserts."""
    match statement:
        case ast.Pass():
            return True
        case ast.Assign(targets):
            return all(isinstance(target, ast.Name | ast.Tuple) for target in targets)
        case ast.For() | ast.If():
            return all(_is_step(part, functions) for part in (*statement.body, *statement.orelse))
    return _is_test(statement, functions)


def _contains(statement: ast.stmt, kind: type[ast.AST]) -> bool:
    return any(isinstance(node, kind) for node in ast.walk(statement))


def _is_pure(statements: Iterable[ast.AST]) -> bool:
    """Returns whether statements reach nothing of this process but their arguments."""
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, _IMPURE_NODES):
            return False
        if isinstance(node, ast.Attribute) and (
            node.attr.startswith(("_", *_FRAMES)) or not isinstance(node.ctx, ast.Load)
        ):
            return False
    return True


def _names(statements: Iterable[ast.stmt]) -> set[str]:
    nodes = (node for statement in statements for node in ast.walk(statement))
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _bound_by(statement: ast.stmt) -> set[str]:
    """Returns the names that a test binds at the top: the program must not need them."""
    if isinstance(statement, ast.FunctionDef):
        return {statement.name}
    nodes = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return {node.id for node in nodes if isinstance(node.ctx, ast.Store)}


_MAX_OUTPUT = 1 << 20
_FUTURE_FLAGS = sum(
    {getattr(__future__, name).compiler_flag for name in __future__.all_feature_names}
)


class _Output(io.RawIOBase):
    """Collects what a program prints, up to _MAX_OUTPUT bytes between two answers."""

    def __init__(self) -> None:
        self._data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        self._data += data[: max(_MAX_OUTPUT - len(self._data), 0)]
        return len(data)

    def take(self) -> str:
        """Returns the text since the last call."""
        text = bytes(self._data).decode(errors="replace")
        self._data.clear()
        return text


def serve_program(connection: exchange.Connection) -> None:
    """Runs the source and the calls that the process of the tests sends, until it ends."""
    namespace: dict[str, PythonObject] = {"__name__": "__main__"}
    output, flags, shared = _Output(), [0], set[str]()
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(output), "utf-8", write_through=True)
    printed = sys.stdout

    def execute(source: str) -> None:
        code = compile(source, "<answer>", "exec", flags[0], dont_inherit=True)
        flags[0] |= code.co_flags & _FUTURE_FLAGS
        exec(code, namespace)

    def name(identifier: str) -> PythonObject:
        if identifier in namespace:
            return exchange.in_place(namespace[identifier])
        if hasattr(builtins, identifier):
            return getattr(builtins, identifier)
        raise NameError(f"name {identifier!r} is not defined")

    def take_output() -> str:
        with contextlib.suppress(ValueError, OSError):  # the program may have closed it
            printed.flush()
        return output.take()

    operations: dict[str, Callable[..., PythonObject]] = {
        "execute": execute,
        "share": lambda names: shared.update(names),
        "name": name,
        "plain": exchange.plain_of,
        "call": lambda function, arguments, keywords: function(*arguments, **keywords),
        "operate": lambda operation, *operands: getattr(operator, operation)(*operands),
        "getattr": lambda value, attribute: exchange.in_place(getattr(value, attribute)),
        "setattr": setattr,
        "delattr": delattr,
        "getitem": lambda value, key: exchange.in_place(value[key]),
        "setitem": operator.setitem,
        "delitem": operator.delitem,
        "isinstance": isinstance,
        "bool": bool,
        "len": len,
        "str": str,
        "repr": repr,
        "format": format,
        "iter": iter,
        "next": next,
        "enter": lambda value: type(value).__enter__(value),
        "exit": lambda value: bool(type(value).__exit__(value, None, None, None)),
    }

    def shared_class(identifier: str) -> PythonObject:
        return namespace.get(identifier) if identifier in shared else None

    peer = exchange.Peer(connection, operations, shared_class, lambda value: True, take_output)
    try:
        while True:
            peer.answer(connection.receive())
    except exchange.Closed:
        return

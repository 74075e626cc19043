"""The process of a program in the sandbox: runs its source and its functions for its tests."""

import __future__

import builtins
import contextlib
import io
import operator
import sys
from collections.abc import Callable
from typing import Any

from m2l.evaluation import exchange

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

    def write(self, data: Any) -> int:
        self._data += data[: max(_MAX_OUTPUT - len(self._data), 0)]
        return len(data)

    def take(self) -> str:
        """Returns the text since the last call."""
        text = bytes(self._data).decode(errors="replace")
        self._data.clear()
        return text


def serve(connection: exchange.Connection) -> None:
    """Runs the source and the calls that the process of the tests sends, until it ends."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    output, flags, shared = _Output(), [0], set[str]()
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(output), "utf-8", write_through=True)
    printed = sys.stdout

    def execute(source: str) -> None:
        code = compile(source, "<answer>", "exec", flags[0], dont_inherit=True)
        flags[0] |= code.co_flags & _FUTURE_FLAGS
        exec(code, namespace)

    def name(identifier: str) -> Any:
        if identifier in namespace:
            return exchange.in_place(namespace[identifier])
        if hasattr(builtins, identifier):
            return getattr(builtins, identifier)
        raise NameError(f"name {identifier!r} is not defined")

    def take_output() -> str:
        with contextlib.suppress(ValueError, OSError):  # the program may have closed it
            printed.flush()
        return output.take()

    operations: dict[str, Callable[..., Any]] = {
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

    def shared_class(identifier: str) -> Any:
        return namespace.get(identifier) if identifier in shared else None

    peer = exchange.Peer(connection, operations, shared_class, lambda value: True, take_output)
    try:
        while True:
            peer.answer(connection.receive())
    except exchange.Closed:
        return

"""Values and calls between two processes, of which one does not trust the other.

A message is JSON behind its length. Plain data travels by value and arrives with its exact types:
None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range,
those of collections, fractions, decimal and datetime, NumPy's arrays and numbers, builtin types,
exceptions, and instances of classes that both sides have. Every other object stays where it is, and
the other side gets a `Remote`. A list that a call changes is changed for the caller, too, and one
that it returns is the caller's own list. Nothing is unpickled, and what a message says is checked.
"""

import builtins
import collections
import importlib
import json
import operator
import os
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

# Whatever a program or its tests may hold.
PythonObject: TypeAlias = Any
# A value in a message: JSON.
Node: TypeAlias = list[PythonObject]
MAX_MESSAGE = 64 << 20
_SMALL = 1 << 53


class Violation(BaseException):
    """A message that breaks the rules; no test catches it as an Exception."""


class Closed(BaseException):
    """The other process has ended."""


class Connection:
    """Messages over a pair of pipes."""

    def __init__(self, read_descriptor: int, write_descriptor: int) -> None:
        self._read, self._write = read_descriptor, write_descriptor

    def send(self, message: Node) -> None:
        """Writes one message.

        Raises:
            Closed: the other process has ended.
        """
        text = json.dumps(message, check_circular=False, separators=(",", ":")).encode()
        data = memoryview(struct.pack(">I", len(text)) + text)
        while data:
            try:
                data = data[os.write(self._write, data) :]
            except BrokenPipeError:
                raise Closed from None

    def receive(self) -> Node:
        """Reads one message.

        Raises:
            Closed: the other process has ended.
            Violation: it is not JSON, not a list, or longer than MAX_MESSAGE.
        """
        length = struct.unpack(">I", self._bytes(4))[0]
        if length > MAX_MESSAGE:
            raise Violation(f"a message of {length} bytes, more than {MAX_MESSAGE}")
        try:
            message = json.loads(self._bytes(length))
        except (ValueError, RecursionError):
            raise Violation("a message that is not JSON") from None
        if type(message) is not list or not message:
            raise Violation("a message that is not a list")
        return message

    def _bytes(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self._read, min(count, 1 << 20))
            if not part:
                raise Closed
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


class Remote:
    """An object of the other process.

    Its methods run there. A comparison or sum with a value of this process does not: it would tell
    the other side the value, and let it decide. It is done here, with the plain value of an object
    that is or inherits from a plain type, and is False or a TypeError for any other object. Two
    remote objects are compared where they are.
    """

    __slots__ = ("_handle", "_kind", "_peer")

    def __init__(self, peer: "Peer", handle: int, kind: str) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_handle", handle)
        object.__setattr__(self, "_kind", kind)

    @property
    def __class__(self) -> type:
        return _KINDS.get(object.__getattribute__(self, "_kind"), Remote)

    def _plain(self) -> PythonObject:
        kind = _KINDS.get(self._kind)
        if kind is None:
            raise TypeError("an object of the program has no value that can be compared")
        value = self._peer.request("plain", self)
        if type(value) is not kind:
            raise Violation(f"a value of another type than {self._kind}")
        return value

    def __getattr__(self, name: str) -> PythonObject:
        if name.startswith("__") and name not in ("__name__", "__qualname__", "__doc__"):
            raise AttributeError(name)
        return self._peer.request("getattr", self, name)

    def __call__(self, *arguments: PythonObject, **keywords: PythonObject) -> PythonObject:
        try:
            return self._peer.request("call", self, arguments, keywords)
        except StopIteration as error:  # it would end a loop of the caller without a word
            raise RuntimeError("the call raised StopIteration") from error

    def __reduce_ex__(self, protocol: PythonObject) -> PythonObject:
        raise TypeError("an object of the program cannot be copied")

    def __iter__(self) -> PythonObject:
        if self._kind:
            return iter(self._plain())
        return self._peer.request("iter", self)

    def __hash__(self) -> int:
        return hash(self._plain()) if self._kind else hash((Remote, self._handle))

    def __instancecheck__(self, instance: PythonObject) -> bool:
        if type(instance) is Remote and instance._peer is self._peer:
            return self._exact(bool, "isinstance", instance, self)
        return False

    def _exact(self, kind: type, operation: str, *arguments: PythonObject) -> PythonObject:
        value = self._peer.request(operation, *arguments)
        if type(value) is not kind:
            raise TypeError(f"{operation} returned something else than {kind.__name__}")
        return value

    def __exit__(self, *_: PythonObject) -> bool:
        return self._exact(bool, "exit", self)


def _same_side(first: PythonObject, second: PythonObject) -> bool:
    """Returns whether both are objects of the other process without a plain value."""
    return all(type(value) is Remote and not value._kind for value in (first, second))


def _local(value: PythonObject) -> PythonObject:
    return value._plain() if type(value) is Remote and value._kind else value


def _requested(name: str, kind: type | None) -> Callable[..., PythonObject]:
    def request(self: Remote, *arguments: PythonObject) -> PythonObject:
        if kind is not None:
            return self._exact(kind, name, self, *arguments)
        return self._peer.request(name, self, *arguments)

    return request


def _converted(
    function: Callable[[PythonObject], PythonObject],
) -> Callable[[Remote], PythonObject]:
    return lambda self: function(self._plain())


def _binary(name: str, *, reflected: bool) -> Callable[[Remote, PythonObject], PythonObject]:
    function = getattr(operator, name)

    def operate(self: Remote, other: PythonObject) -> PythonObject:
        if _same_side(self, other):
            value = self._peer.request("operate", name, self, other)
            return value if name not in _COMPARISONS or type(value) is bool else False
        if not self._kind:
            return NotImplemented
        operands = (_local(self), _local(other))
        return function(*(reversed(operands) if reflected else operands))

    return operate


def _unary(name: str) -> Callable[[Remote], PythonObject]:
    function = getattr(operator, name)

    def operate(self: Remote) -> PythonObject:
        return function(self._plain()) if self._kind else self._peer.request("operate", name, self)

    return operate


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_ARITHMETIC = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and_", "or_", "xor", "lshift", "rshift"),
)
_UNARY = ("neg", "pos", "abs", "invert")
# What is requested, and the type that the answer has to have.
_REQUESTS = dict.fromkeys(
    ("setattr", "delattr", "getitem", "setitem", "delitem", "next", "enter")
) | {"bool": bool, "len": int, "str": str, "repr": str, "format": str}
for _name, _type in _REQUESTS.items():
    setattr(Remote, f"__{_name}__", _requested(_name, _type))
for _name, _function in {"int": int, "float": float, "index": operator.index}.items():
    setattr(Remote, f"__{_name}__", _converted(_function))
for _name in (*_COMPARISONS, *_ARITHMETIC):
    setattr(Remote, f"__{_name.strip('_')}__", _binary(_name, reflected=False))
for _name in _ARITHMETIC:
    setattr(Remote, f"__r{_name.strip('_')}__", _binary(_name, reflected=True))
for _name in _UNARY:
    setattr(Remote, f"__{_name}__", _unary(_name))

# Plain types that a class of the program may inherit from, the narrower first.
_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(collections.Counter, collections.OrderedDict, collections.defaultdict),
        *(collections.deque, dict, list, tuple, set, frozenset, str, bytes, bytearray),
        *(int, float, complex),
    )
}
_SCALARS = frozenset((type(None), bool, float, str))
_JSON_SCALARS = _SCALARS | {int}
_MUTABLE = frozenset(
    (
        *(list, dict, set, bytearray, collections.deque),
        *(collections.Counter, collections.OrderedDict, collections.defaultdict),
    )
)


def plain_of(value: PythonObject) -> PythonObject:
    """Returns the value of an object's plain base class, whatever its own class overrides.

    Raises:
        TypeError: it has none.
    """
    for kind in _KINDS.values():
        if isinstance(value, kind):
            if issubclass(kind, dict):
                items = list(dict.items(value))
                return kind(None, items) if kind is collections.defaultdict else kind(dict(items))
            if kind is str:
                return "".join(str.__iter__(value))
            if kind is complex:
                return complex(complex.real.__get__(value), complex.imag.__get__(value))
            if kind in (int, float):
                return getattr(kind, f"__{kind.__name__}__")(value)
            if kind is bytes or kind is bytearray:
                return kind(memoryview(value))
            return kind(kind.__iter__(value))
    raise TypeError(f"{type(value).__name__} has no plain value")


class ByReference:
    """A result that stays where it is, although it is plain data."""

    def __init__(self, value: PythonObject) -> None:
        self.value = value


def in_place(value: PythonObject) -> PythonObject:
    """Returns what a name or an object refers to: the tests may change it where it is."""
    return ByReference(value) if type(value) in _MUTABLE else value


def _kind_of(value: PythonObject) -> str:
    return next((name for name, kind in _KINDS.items() if isinstance(value, kind)), "")


class Peer:
    """One end of a connection: makes requests, and answers those of the other end.

    Args:
        connection: To the other end.
        operations: What the other end may ask for, by name.
        shared: Classes that both ends have under these names; their instances travel by value.
        exports: Whether an object may be handed out as a `Remote`.
        output: Returns what was printed since it was last called.
    """

    def __init__(
        self,
        connection: Connection,
        operations: dict[str, Callable[..., PythonObject]],
        shared: Callable[[str], PythonObject],
        exports: Callable[[PythonObject], bool],
        output: Callable[[], str] = str,
    ) -> None:
        self.connection, self.operations = connection, operations
        self.shared, self.exports, self.output = shared, exports, output
        self.objects: list[PythonObject] = []
        self.handles: dict[int, int] = {}
        self.remotes: dict[int, Remote] = {}
        self.classes: dict[int, type] = {}
        self.violated = False
        self._lock = threading.RLock()

    def request(self, operation: str, *arguments: PythonObject) -> PythonObject:
        """Returns what the other end's operation returns, or raises what it raises.

        Raises:
            Closed: the other process has ended.
            Violation: its answer breaks the rules.
            TypeError: an argument cannot be sent.
        """
        values = Values(self)
        references = [values.reference(argument) for argument in arguments]
        message = ["request", operation, references, values.nodes()]
        try:
            with self._lock:
                self.connection.send(message)
                return self._answer_of(values)
        except (Violation, Closed):
            self.violated = True
            raise

    def _answer_of(self, values: "Values") -> PythonObject:
        while True:
            message = self.connection.receive()
            if message[0] == "request":
                self.answer(message)
                continue
            try:
                state, reference, nodes, output = message
                value = values.load(nodes, [reference])[0]
            except _MALFORMED as error:
                raise Violation(f"a malformed value ({type(error).__name__})") from None
            if type(output) is str and output:
                sys.stdout.write(output)
            if state == "raise" and isinstance(value, BaseException):
                raise value
            if state != "return":
                raise Violation("an answer that neither returns nor raises")
            return value

    def answer(self, message: Node) -> None:
        """Carries out a request and sends the answer."""
        values = Values(self)
        try:
            _, name, references, nodes = message
            operation = self.operations[name]
            arguments = values.load(nodes, references)
            values.restrict()
        except _MALFORMED as error:
            raise Violation(f"a malformed request ({type(error).__name__})") from None
        state, value = "return", None
        try:
            value = operation(*arguments)
            reference = values.reference(value)
            nodes = values.answer_nodes()
        except (Violation, Closed):
            raise
        except BaseException as error:  # SystemExit, too, belongs to the caller
            values.restrict()
            state, reference = "raise", values.reference(error)
            nodes = values.answer_nodes()
        self.connection.send([state, reference, nodes, self.output()])


class Values:
    """The values of a request and of its answer, each a node; equal objects are one node."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.values: list[PythonObject] = []
        self.indices: dict[int, int] = {}
        self._nodes: list[Node] = []

    def reference(self, value: PythonObject) -> PythonObject:
        """Returns a value as it is in a message: itself, or its node's number in a list."""
        kind = type(value)
        if kind in _SCALARS:
            return value
        if kind is int and -_SMALL < value < _SMALL:
            return value
        index = self.indices.get(id(value))
        if index is None:
            index = self.indices[id(value)] = len(self.values)
            self.values.append(value)
        return [index]

    def restrict(self) -> None:
        """Forgets all values but those that were loaded, and makes these known to `reference`."""
        del self.values[len(self._nodes) :]
        self.indices = {id(value): index for index, value in enumerate(self.values)}

    def nodes(self) -> list[Node]:
        """Returns the nodes of all values, and of all that they contain."""
        result: list[Node] = []
        while len(result) < len(self.values):
            result.append(self._node(self.values[len(result)]))
        return result

    def answer_nodes(self) -> list[Node | int]:
        """Returns the nodes as `nodes`, with 0 for what was loaded and has not changed."""
        result: list[Node | int] = []
        for value, node in zip(self.values, self._nodes, strict=False):
            changed = self._node(value) if type(value) in _MUTABLE else node
            same = changed == node and [*map(type, changed)] == [*map(type, node)]
            result.append(0 if same else changed)
        while len(result) < len(self.values):
            result.append(self._node(self.values[len(result)]))
        return result

    def _all(self, values: PythonObject) -> Node:
        reference, scalars = self.reference, _SCALARS
        return [value if type(value) in scalars else reference(value) for value in values]

    def _node(self, value: PythonObject) -> Node:
        kind = type(value)
        if kind in _MUTABLE and id(value) in self.peer.handles:
            return ["remote", self._export(value), _kind_of(value)]
        if kind in (list, tuple, set, frozenset):
            return [kind.__name__, *self._all(value)]
        if kind in (dict, collections.Counter, collections.OrderedDict, collections.defaultdict):
            factory = (value.default_factory,) if kind is collections.defaultdict else ()
            parts = (part for pair in value.items() for part in pair)
            return [kind.__name__, *self._all((*factory, *parts))]
        if kind is int:
            return ["int", hex(value)]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind in (bytes, bytearray):
            return [kind.__name__, value.decode("latin-1")]
        if kind is collections.deque:
            return ["deque", value.maxlen, *self._all(value)]
        if kind in (range, slice):
            return [kind.__name__, *self._all((value.start, value.stop, value.step))]
        origin = (kind.__module__, kind.__name__)
        if origin == ("decimal", "Decimal"):
            return ["Decimal", str(value)]
        if origin == ("fractions", "Fraction"):
            return ["Fraction", *self._all((value.numerator, value.denominator))]
        if origin in _DATES and getattr(value, "tzinfo", None) is None:
            return [kind.__name__, value.isoformat()]
        if origin == ("datetime", "timedelta"):
            return ["timedelta", value.days, value.seconds, value.microseconds]
        if value is Ellipsis or value is NotImplemented:
            return ["constant", repr(value)]
        if kind is Remote and value._peer is self.peer:
            return ["own", value._handle]
        if kind is ByReference:
            return ["remote", self._export(value.value), _kind_of(value.value)]
        return self._array(value) or self._class(value) or self._object(value)

    def _array(self, value: PythonObject) -> Node:
        numpy = sys.modules.get("numpy")
        if numpy is None or not (type(value) is numpy.ndarray or isinstance(value, numpy.generic)):
            return []
        if value.dtype.kind not in "biufcSU":
            return []
        tag = "array" if type(value) is numpy.ndarray else "scalar"
        data = value.tobytes().decode("latin-1")
        return [tag, value.dtype.str, list(value.shape), data]

    def _class(self, value: PythonObject) -> Node:
        if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            return ["type", value.__name__]
        if isinstance(value, type) and issubclass(value, BaseException):
            bases = self._all(base for base in value.__bases__ if issubclass(base, BaseException))
            handle = self._export(value)
            return ["exception class", handle, value.__module__, value.__name__, *bases]
        if isinstance(value, BaseException):
            return ["exception", self.reference(type(value)), *self._all(value.args)]
        return []

    def _object(self, value: PythonObject) -> Node:
        kind = type(value)
        state = getattr(value, "__dict__", None)
        if self.peer.shared(kind.__name__) is kind and type(state) is dict:
            return ["object", kind.__name__, self.reference(state)]
        return ["remote", self._export(value), _kind_of(value)]

    def _export(self, value: PythonObject) -> int:
        if not self.peer.exports(value):
            raise TypeError(f"an object of type {type(value).__name__} cannot be sent")
        handles, objects = self.peer.handles, self.peer.objects
        if id(value) not in handles:
            handles[id(value)] = len(objects)
            objects.append(value)
        return handles[id(value)]

    def load(self, nodes: list[Node], references: Node) -> list[PythonObject]:
        """Returns the values of references; changes those sent before as their nodes say.

        Raises:
            ValueError, TypeError, KeyError, IndexError, ...: malformed nodes, `_MALFORMED`.
        """
        if type(nodes) is not list or type(references) is not list:
            raise ValueError("no list of nodes")
        self._nodes, self._open = nodes, set[int]()
        before = len(self.values)
        self.values += [_MISSING] * (len(nodes) - before)
        for index in range(before):
            if nodes[index] != 0 and type(self.values[index]) in _MUTABLE:
                if nodes[index][0] != type(self.values[index]).__name__:
                    raise ValueError("an object that changed its type")
                self._fill(self.values[index], nodes[index])
        result = [self._value(reference) for reference in references]
        for index in range(before, len(nodes)):
            if self.values[index] is _MISSING:
                self._value([index])
        return result

    def _value(self, reference: PythonObject) -> PythonObject:
        if type(reference) in _JSON_SCALARS:
            return reference
        [index] = reference
        if type(index) is not int or index < 0:
            raise ValueError("a reference that is not a node")
        if self.values[index] is _MISSING:
            if index in self._open:
                raise ValueError("a tuple within itself")
            self._open.add(index)
            self._build(index, self._nodes[index])
        return self.values[index]

    def _values(self, references: Node) -> list[PythonObject]:
        value, scalars = self._value, _JSON_SCALARS
        return [part if type(part) in scalars else value(part) for part in references]

    def _build(self, index: int, node: Node) -> None:
        tag, *parts = node
        if tag in _KINDS and _KINDS[tag] in _MUTABLE:
            empty = collections.deque(maxlen=parts[0]) if tag == "deque" else _KINDS[tag]()
            self.values[index] = empty
            self._fill(empty, node)
        elif tag == "object":
            kind = self.peer.shared(parts[0])
            if not isinstance(kind, type):
                raise ValueError("an unknown class")
            self.values[index] = value = kind.__new__(kind)
            value.__dict__ = self._value(parts[1])  # the same one, so that it is seen to change
        else:
            self.values[index] = self._immutable(tag, parts)

    def _fill(self, target: PythonObject, node: Node) -> None:
        values = self._values(node[1:]) if type(target) is not bytearray else []
        if type(target) is list:
            target[:] = values
        elif type(target) is bytearray:
            target[:] = node[1].encode("latin-1")
        elif type(target) is set:
            if target != set(values):  # a set that did not change may be iterated over
                target.clear()
                target.update(values)
        elif type(target) is collections.deque:
            target.clear()
            target.extend(values[1:])
        else:
            if type(target) is collections.defaultdict:
                target.default_factory = values.pop(0)
            pairs = list(zip(values[::2], values[1::2], strict=True))
            if list(target.items()) != pairs:
                target.clear()
                for key, value in pairs:
                    target[key] = value

    def _immutable(self, tag: str, parts: Node) -> PythonObject:
        if tag in ("tuple", "frozenset"):
            return _KINDS[tag](self._values(parts))
        if tag in ("range", "slice"):
            return getattr(builtins, tag)(*(self._value(part) for part in parts))
        if tag == "Fraction":
            numerator, denominator = (self._value(part) for part in parts)
            return importlib.import_module("fractions").Fraction(numerator, denominator)
        if tag == "bytes":
            return parts[0].encode("latin-1")
        if tag == "int":
            return int(parts[0], 16)
        if tag == "complex":
            return complex(*map(float, parts))
        if tag == "Decimal":
            return importlib.import_module("decimal").Decimal(parts[0])
        if ("datetime", tag) in _DATES:
            return getattr(importlib.import_module("datetime"), tag).fromisoformat(parts[0])
        if tag == "timedelta":
            return importlib.import_module("datetime").timedelta(*parts)
        if tag == "constant":
            return {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}[parts[0]]
        if tag in ("array", "scalar"):
            return _array_of(tag, *parts)
        if tag == "type":
            kind = getattr(builtins, parts[0])
            if not isinstance(kind, type):
                raise ValueError("not a type")
            return kind
        if tag == "own":
            return self.peer.objects[parts[0]]
        if tag == "remote":
            handle, kind = parts
            if type(handle) is not int or (kind and kind not in _KINDS):
                raise ValueError("not a handle")
            return self.peer.remotes.setdefault(handle, Remote(self.peer, handle, kind))
        if tag == "exception class":
            return self._exception_class(*parts)
        if tag == "exception":
            kind, *arguments = (self._value(part) for part in parts)
            if not issubclass(kind, BaseException) or issubclass(kind, (Violation, Closed)):
                raise ValueError("not an exception")
            error = kind.__new__(kind, *arguments)
            error.args = tuple(arguments)
            return error
        raise ValueError("an unknown kind of value")

    def _exception_class(self, handle: int, module: str, name: str, *bases: PythonObject) -> type:
        if handle in self.peer.classes:
            return self.peer.classes[handle]
        known = self.peer.shared(name)
        if known is None and module.partition(".")[0] in sys.stdlib_module_names:
            known = getattr(sys.modules.get(module), name, None)
        if not (isinstance(known, type) and issubclass(known, BaseException)):
            parents = tuple(self._value(base) for base in bases)
            if not parents or not all(issubclass(parent, BaseException) for parent in parents):
                raise ValueError("not an exception")
            known = type(name[:80], parents, {})
        self.peer.classes[handle] = known
        return known


_MISSING = object()
_DATES = [("datetime", name) for name in ("date", "time", "datetime")]
_MALFORMED = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError),
    *(ArithmeticError, RecursionError, ImportError),
)


def _array_of(tag: str, dtype: str, shape: list[int], data: str) -> PythonObject:
    import numpy

    kind = numpy.dtype(dtype)
    if kind.kind not in "biufcSU":
        raise ValueError("an array of objects")
    array = numpy.frombuffer(data.encode("latin-1"), kind).reshape(shape).copy()
    return array if tag == "array" else array[()]

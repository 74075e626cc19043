"""A program does not pass by anything but the values that its functions return."""

import collections
import concurrent.futures
import contextlib
import datetime
import decimal
import fractions
import io
import json
import math
import os
import random
import struct
import threading

import pytest

from m2l.errors import EvaluationError
from m2l.evaluation import sandbox
from m2l.evaluation.sandbox import exchange

LIMITS = sandbox.Limits(seconds=10, memory=1 << 29, file=1 << 16)
TESTS = "assert f(3) == 6"
ASSERTION, TYPE, ENDED = "AssertionError", "TypeError", "ended before its tests"

# What the program is; the error of a test that it does not pass, by the tests' own process.
FORGERIES = {
    # Objects that compare as they like.
    "equal to everything": (
        "class A:\n def __eq__(s, o): return True\ndef f(x): return A()",
        TESTS,
        ASSERTION,
    ),
    "equal from the other side": (
        "class A:\n def __eq__(s, o): return True\n __ne__ = lambda s, o: False\n"
        "def f(x): return A()",
        "assert 6 == f(3)\nassert not 6 != f(3)",
        ASSERTION,
    ),
    "an int that is equal to everything": (
        "class A(int):\n def __eq__(s, o): return True\n __hash__ = int.__hash__\n"
        "def f(x): return A(7)",
        TESTS,
        ASSERTION,
    ),
    "a str that is equal to everything": (
        "class A(str):\n def __eq__(s, o): return True\n __hash__ = str.__hash__\n"
        "def f(x): return A('a')",
        "assert f(3) == 'b'",
        ASSERTION,
    ),
    "a list that is equal to everything": (
        "class A(list):\n def __eq__(s, o): return True\ndef f(x): return A()",
        "assert f(3) == [1, 2]",
        ASSERTION,
    ),
    "a list of what is equal to everything": (
        "class A:\n def __eq__(s, o): return True\ndef f(x): return [A(), A()]",
        "assert f(3) == [1, 2]",
        ASSERTION,
    ),
    "a dict that says what it does not hold": (
        "class A(dict):\n def __getitem__(s, k): return 1\n def __eq__(s, o): return True\n"
        "def f(x): return A()",
        "assert f(3) == {'a': 1}",
        ASSERTION,
    ),
    "hashes of everything": (
        "class A:\n def __eq__(s, o): return True\n def __hash__(s): return hash(6)\n"
        "def f(x): return A()",
        "assert f(3) in {6}\n",
        ASSERTION,
    ),
    "contains everything": (
        "class A:\n def __contains__(s, o): return True\n def __iter__(s): return iter([])\n"
        "def f(x): return A()",
        "assert 6 in f(3)",
        ASSERTION,
    ),
    "greater than everything": (
        "class A:\n def __gt__(s, o): return True\n __lt__ = __gt__\ndef f(x): return A()",
        "assert f(3) > 5 and f(3) < 7",
        TYPE,
    ),
    "at no distance from everything": (
        "class A(float):\n def __sub__(s, o): return 0.0\n __rsub__ = __sub__\n"
        " __float__ = lambda s: 6.0\ndef f(x): return A(1)",
        "assert abs(f(3) - 6) < 1e-6",
        ASSERTION,
    ),
    "at no distance, and no number": (
        "class A:\n def __sub__(s, o): return 0.0\n __rsub__ = __sub__\ndef f(x): return A()",
        "assert abs(f(3) - 6) < 1e-6",
        TYPE,
    ),
    "learns the value by being compared": (
        "seen = []\nclass A:\n def __eq__(s, o): seen.append(o); return False\n"
        "def f(x): return seen[-1] if seen else A()",
        "assert f(3) != 6\nassert f(3) != 6\nassert f(3) == 6",
        ASSERTION,
    ),
    "a type that everything is of": (
        "class M(type):\n def __instancecheck__(s, o): return True\n"
        "class A(metaclass=M): pass\ndef f(x): return A",
        "assert isinstance(f(3), int)",
        ASSERTION,
    ),
    # The builtins and modules that tests use.
    "len": ("import builtins\nbuiltins.len = lambda x: 3\ndef f(x): return []", None, "failed"),
    "sorted": ("def sorted(x): return [1, 2, 3]\ndef f(x): return []", None, ASSERTION),
    "abs": ("abs = lambda x: 0\ndef f(x): return []", None, ASSERTION),
    "isinstance": (
        "import builtins\nbuiltins.isinstance = lambda *a: True\ndef f(x): return 1",
        None,
        "failed",
    ),
    "all": ("import builtins\nall = builtins.all = lambda x: True\ndef f(x): return 1", None, TYPE),
    "math.isclose": (
        "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 1.0",
        "import math\nassert math.isclose(f(3), 6.0)",
        ASSERTION,
    ),
    "numpy.allclose": (
        "import numpy\nnumpy.allclose = lambda *a, **k: True\ndef f(x): return 1.0",
        "import numpy\nassert numpy.allclose(f(3), 6.0)",
        ASSERTION,
    ),
    "AssertionError": (
        "import builtins\nclass E(Exception):\n def __new__(c, *a): import os; os._exit(0)\n"
        "builtins.AssertionError = E\ndef f(x): return 7",
        TESTS,
        ASSERTION,
    ),
    "__build_class__ and __import__": (
        "import builtins\nbuiltins.__import__ = builtins.__build_class__ = lambda *a: None\n"
        "def f(x): return 7",
        TESTS,
        ASSERTION,
    ),
    # The end of the process, of loops and of the interpreter.
    "sys.exit(0)": ("import sys\ndef f(x): sys.exit(0)", TESTS, "SystemExit"),
    "os._exit(0)": ("import os\ndef f(x): os._exit(0)", TESTS, ENDED),
    "exit at once": ("import os\nos._exit(0)\ndef f(x): return 6", TESTS, ENDED),
    "atexit": (
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 7",
        TESTS,
        ASSERTION,
    ),
    "a signal's handler": (
        "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01)\ndef f(x):\n while True: pass",
        TESTS,
        ENDED,
    ),
    "a thread that ends the process": (
        "import threading, os, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.01), os._exit(0))).start()\n"
        "def f(x): time.sleep(5)",
        TESTS,
        ENDED,
    ),
    "sys.excepthook and sys.settrace": (
        "import sys\nsys.excepthook = lambda *a: None\nsys.settrace(lambda *a: None)\n"
        "def f(x): return 7",
        TESTS,
        ASSERTION,
    ),
    "StopIteration ends a loop of tests": (
        "def f(x): raise StopIteration",
        "for value in map(f, [3]):\n    assert value == 6\n",
        "RuntimeError",
    ),
    "an error that is neither": (
        "class E(BaseException): pass\ndef f(x): raise E",
        "try:\n    assert f(3) == 6\nexcept Exception:\n    pass\n",
        "E",
    ),
    # The protocol and the memory of the process.
    "writes to what is open": (
        "import os\ndef f(x):\n for n in range(64):\n  try: os.write(n, b'passed')\n"
        "  except OSError: pass\n return 7",
        TESTS,
        ENDED,
    ),
    "answers in place of its function": (
        "import os, json, struct\ndef f(x):\n for n in range(64):\n"
        "  t = json.dumps(['return', True, [], '']).encode()\n"
        "  try: os.write(n, struct.pack('>I', len(t)) + t)\n  except OSError: pass\n"
        " return 7",
        TESTS,
        "failed",
    ),
    "asks for what is not offered": (
        "import gc\np = [o for o in gc.get_objects() if type(o).__name__ == 'Peer'][0]\n"
        "def f(x): return p.request('getattr', 1, '__class__')",
        TESTS,
        ENDED,
    ),
    "closes what is open": (
        "import os\ndef f(x):\n os.closerange(0, 64)\n return 6",
        TESTS,
        "failed",
    ),
    "searches the frames of its callers": (
        "import sys\ndef f(x):\n g = sys._getframe()\n while g:\n"
        "  for v in list(g.f_locals.values()) + list(g.f_globals.values()):\n"
        "   if type(v) is int and v == 123456: return v\n  g = g.f_back\n return 0",
        "assert f(3) == 123456",
        ASSERTION,
    ),
    "searches all objects": (
        "import gc\ndef f(x):\n for o in gc.get_objects():\n"
        "  if type(o) is tuple and len(o) == 3 and o[:2] == (41, 42) and type(o[2]) is int:\n"
        "   return o\n return 0",
        "assert f(3) == (41, 42, int('43'))",
        ASSERTION,
    ),
}
USES = {
    "len": "assert len(f(3)) == 3",
    "sorted": "assert sorted(f(3)) == [1, 2, 3]",
    "abs": "assert abs(len(f(3)) - 2) == 0",
    "isinstance": "assert isinstance(f(3), str)",
    "all": "assert all(x == 1 for x in f(3))",
}


@pytest.fixture(scope="module")
def pool():
    """Runs programs two at a time; skips where this machine cannot isolate them."""
    with (
        pytest.MonkeyPatch.context() as patch,
        concurrent.futures.ThreadPoolExecutor(2) as executor,
    ):
        patch.setenv(sandbox.SWITCH, sandbox.ON)
        try:
            sandbox.run("", LIMITS)
        except EvaluationError as error:
            pytest.skip(str(error))
        yield lambda programs: list(executor.map(lambda one: sandbox.run(one, LIMITS), programs))


@pytest.mark.parametrize("name", FORGERIES)
def test_a_program_does_not_forge_its_verdict(pool, name):
    program, tests, error = FORGERIES[name]
    tests = tests or USES[name]
    apart, together = pool([sandbox.AnswerTests("", program, tests), f"{program}\n{tests}"])
    assert apart.startswith("failed: ") and error in apart
    if "try:" not in tests:  # an assert under `try` is part of the program
        assert together.startswith("failed: ")


# A program, and tests that it passes, as in an interpreter that runs both.
HONEST = {
    "recursion": ("def f(n): return 1 if n < 2 else n * f(n - 1)", "assert f(5) == 120"),
    "a big number": ("def f(n): return 7 ** n", "assert f(20000) == 7 ** 20000"),
    "a generator": (
        "def f(n):\n for i in range(n): yield i * i",
        "assert list(f(4)) == [0, 1, 4, 9]\ng = f(2)\nassert next(g) == 0\nassert sum(f(3)) == 5",
    ),
    "an endless generator": (
        "def f():\n n = 0\n while True:\n  yield n\n  n += 1",
        "import itertools\nassert list(itertools.islice(f(), 3)) == [0, 1, 2]",
    ),
    "a class": (
        "class Stack:\n def __init__(self): self.items = []\n"
        " def push(self, x): self.items.append(x); return self\n"
        " def pop(self): return self.items.pop()\n def __len__(self): return len(self.items)",
        "s = Stack()\ns.push(1).push(2)\nassert len(s) == 2 and s.pop() == 2\n"
        "assert s.items == [1] and isinstance(s, Stack) and not isinstance(1, Stack)",
    ),
    "objects that are compared with each other": (
        "import dataclasses\n@dataclasses.dataclass(order=True)\nclass V:\n x: int\n"
        " def __add__(s, o): return V(s.x + o.x)",
        "assert V(1) + V(2) == V(3)\nassert V(1) != V(2) and V(1) < V(2)\n"
        "assert str(V(1)) == 'V(x=1)' and sorted([V(2), V(1)])[0].x == 1",
    ),
    "a list of its own kind": (
        "class L(list):\n def first(self): return self[0]\ndef f(x): return L(x)",
        "assert f([1, 2]) == [1, 2] and f([3]).first() == 3 and isinstance(f([]), list)",
    ),
    "named tuples and enums": (
        "import collections, enum\nP = collections.namedtuple('P', 'x y')\n"
        "class C(enum.IntEnum): RED = 3\ndef f(x): return P(x, C.RED)",
        "assert f(1) == (1, 3) and f(1).x == 1 and f(2)[1] == 3 and {f(1)} == {(1, 3)}\n"
        "assert f(4).y + 1 == 4 and abs(f(4).y - 3) < 1",
    ),
    "counters and other collections": (
        "import collections as c\ndef f(x): return c.Counter(x)\n"
        "def g(x): d = c.defaultdict(list); d[x].append(1); return d\n"
        "def h(x): return c.OrderedDict(x), c.deque(x, 2)",
        "assert f('aab') == {'a': 2, 'b': 1} and f('a').most_common(1) == [('a', 1)]\n"
        "assert g('k') == {'k': [1]} and g('k')['new'] == []\n"
        "assert h([(1, 2)])[1].maxlen == 2 and list(h([(1, 2)])[0].items()) == [(1, 2)]",
    ),
    "floats": (
        "def f(x): return x / 3",
        "import math\nassert math.isclose(f(1.0), 0.33333333333)\nassert abs(f(1) * 3 - 1) < 1e-9\n"
        "assert math.isnan(f(math.nan)) and f(math.inf) == math.inf\n"
        "assert math.copysign(1, f(-0.0)) == -1",
    ),
    "approx": (
        "def f(x): return [x / 3, 0.1 + 0.2]",
        "import pytest\nassert f(1) == pytest.approx([0.333333333, 0.3])\n"
        "with pytest.raises(TypeError):\n    f('a')",
    ),
    "exact types": (
        "def f(x): return [type(x), x, x == 1]",
        "assert type(f(1)[1]) is int and type(f(1.0)[1]) is float and f(True)[1] is True\n"
        "assert f('a')[0] is str and f(1)[2] is True\n"
        "assert f(2j)[1] == 2j and f(b'\\xff')[1] == b'\\xff' and f(...)[1] is ...\n"
        "assert f((1, (2,)))[1] == (1, (2,)) and f(range(3))[1] == range(3)\n"
        "assert f('\\ud800\\0')[1] == '\\ud800\\0' and f(None)[1] is None\n"
        "assert f(frozenset([1]))[1] == frozenset([1]) and type(f({1})[1]) is set",
    ),
    "the order of sets and dicts": (
        "def f(x): return dict(sorted(x.items()))",
        "assert list(f({'b': 1, 'a': 2})) == ['a', 'b']\nassert f({(1, 2): {3}}) == {(1, 2): {3}}",
    ),
    "dates and fractions": (
        "import datetime, fractions, decimal\n"
        "def f(x): return fractions.Fraction(x, 3), decimal.Decimal(x) / 8, "
        "datetime.date(2024, 2, 28) + datetime.timedelta(x)",
        "import datetime, fractions, decimal\n"
        "assert f(1) == (fractions.Fraction(1, 3), decimal.Decimal('0.125'), "
        "datetime.date(2024, 2, 29))",
    ),
    "expected exceptions": (
        "import json\nclass Bad(ValueError): pass\n"
        "def f(x):\n if x < 0: raise Bad('negative', x)\n return json.loads('{' * x)",
        "import json\n"
        "for value, kind in ((-1, ValueError), (-1, Bad), (2, json.JSONDecodeError)):\n"
        "    try:\n        f(value)\n    except kind as error:\n"
        "        assert kind is json.JSONDecodeError or error.args == ('negative', -1)\n"
        "    else:\n        assert False\n",
    ),
    "prints": (
        "def f(x): print('got', x)",
        "import contextlib, io\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n"
        "    f(1)\n    print('and')\n    f('\\u20ac')\n"
        "assert out.getvalue() == 'got 1\\nand\\ngot \\u20ac\\n'",
    ),
    "a list changed in place": (
        "def f(x): x.sort(); x.append(x[0]); return x",
        "a = [3, 1]\nassert f(a) is a and a == [1, 3, 1]\nb = {'k': [2, 1]}\n"
        "assert f(b['k']) is b['k'] and b == {'k': [1, 2, 1]}",
    ),
    "a change that compares equal": (
        "def f(x): x[0] = True; x[1][0] = 1.0; return x[1]",
        "a = [1, [1], (1, [2])]\nassert f(a) == a[1] and a[0] is True and type(a[1][0]) is float\n"
        "assert a[2][1] == [2]",
    ),
    "a function that is defined anew": (
        "def f(x): return g(x)\ndef g(x): return 1\ndef h():\n global g\n g = lambda x: 2",
        "assert f(0) == 1\nh()\nassert f(0) == 2",
    ),
    "a list within itself": (
        "def f(x): x.append(x); return x",
        "a = [1]\nb = f(a)\nassert b is a and a[1] is a",
    ),
    "functions as arguments and results": (
        "def f(g, xs): return [g(x) for x in xs]\ndef add(n): return lambda x: x + n",
        "calls = []\nassert f(lambda x: calls.append(x) or x + 1, [1, 2]) == [2, 3]\n"
        "assert calls == [1, 2] and f(len, ['ab', []]) == [2, 0] and add(2)(3) == 5\n"
        "assert f(add(1), (x for x in (1, 2))) == [2, 3]",
    ),
    "state and closures": (
        "seen = []\ndef f(x): seen.append(x); return len(seen)",
        "assert f('a') == 1 and f('b') == 2\nassert seen == ['a', 'b']",
    ),
    "a name of a builtin": ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
    "a decorator and keywords": (
        "import functools\n@functools.lru_cache\ndef f(n, *, k=1, **more): "
        "return n if n < 2 else f(n - 1) + f(n - 2) + 0 * k",
        "assert f(30) == 832040 and f(3, k=2) == 2 and f.__name__ == 'f'",
    ),
    "arrays": (
        "import numpy as np\ndef f(x): return np.asarray(x) * 2\n"
        "def g(x): return np.float32(x), np.int64(2)",
        "import numpy as np\nassert np.array_equal(f([1, 2]), [2, 4])\n"
        "assert f([[1.5]]).shape == (1, 1)\n"
        "assert np.allclose(f([0.1]), [0.2]) and g(1.5) == (1.5, 2)\n"
        "assert g(1)[0].dtype == np.float32 and f(np.ones(2, bool)).dtype.kind == 'i'",
    ),
    "a context and a file": (
        "class A:\n def __enter__(s): return open('/tmp/a', 'w+')\n"
        " def __exit__(s, *a): return True\n",
        "with A() as file:\n    file.write('text')\n    file.seek(0)\n"
        "    assert file.read() == 'text'",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f(n):\n"
        " with ThreadPoolExecutor(8) as p: return sum(p.map(abs, range(-n, 0)))",
        "assert f(100) == 5050",
    ),
    "a future import and annotations": (
        "from __future__ import annotations\ndef f(x: Unknown) -> Missing | None: return x",
        "assert f(1) == 1",
    ),
    "a temporary file": (
        "import tempfile\ndef f(x):\n with tempfile.TemporaryFile('w+') as t:\n"
        "  t.write(x); t.seek(0); return t.read()",
        "assert f('text') == 'text'",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_a_right_program_passes(pool, name):
    program, tests = HONEST[name]
    plain: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(program, "p", "exec", dont_inherit=True), plain)
        exec(compile(tests, "t", "exec", dont_inherit=True), plain)
    both = pool([sandbox.AnswerTests("", program, tests), f"{program}\n{tests}"])
    assert both == ["passed", "passed"]


# What stands before the answer, the answer, and the tests: passed, or the error.
SHARED = {
    "the declared function is the answer's": (
        "def f(x):\n    'Doubles.'\n    pass",
        "def f(x): return 2 * x",
        "assert f(2) == 4",
        "passed",
    ),
    "the answer lacks it": ("def f(x):\n    pass", "y = 1", "assert f(2) == 4", ASSERTION),
    "the answer is no Python": ("", "I do not know.", "assert f(2) == 4", "SyntaxError"),
    "nothing has the name": ("", "y = 1", "assert f(2) == 4", "NameError"),
    "a helper of the tests is theirs": (
        "def encode(s): return s[::-1]\ndef decode(s):\n    pass",
        "def encode(s): return s\ndef decode(s): return s",
        "assert decode(encode('ab')) == 'ab'",
        ASSERTION,
    ),
    "both use a helper": (
        "def encode(s): return s[::-1]\ndef decode(s):\n    pass",
        "def decode(s): return encode(s)",
        "assert decode(encode('ab')) == 'ab'",
        "passed",
    ),
    "a class of the tests travels by value": (
        "class Node:\n def __init__(s, v, n=None): s.v, s.n = v, n\n"
        " def __eq__(s, o): return type(o) is Node and s.__dict__ == o.__dict__",
        "def f(node):\n r = None\n while node: r = Node(node.v, r); node = node.n\n return r",
        "a = Node(1, Node(2))\nassert f(a) == Node(2, Node(1)) != f(f(a))",
        "passed",
    ),
    "an object of the tests that is changed in place": (
        "class Node:\n def __init__(s, v): s.v = v; s.more = []",
        "def f(node): node.v += 1; node.more.append(Node(0)); node.new = node; return node",
        "a = Node(1)\nassert f(a) is a and a.v == 2 and a.more[0].v == 0 and a.new is a\n"
        "assert f(a).v == 3 and len(a.more) == 2",
        "passed",
    ),
    "a class of the tests keeps its own comparison": (
        "class Node:\n def __init__(s, v): s.v = v\n"
        " def __eq__(s, o): return type(o) is Node and s.v == o.v",
        "Node.__eq__ = lambda s, o: True\ndef f(x): return Node(7)",
        "assert f(3) == Node(6)",
        ASSERTION,
    ),
    "a class that the answer defines anew": (
        "class Node:\n def __init__(s, v): s.v = v\n"
        " def __eq__(s, o): return type(o) is Node and s.v == o.v",
        "class Node:\n def __init__(s, v): s.v = v\n __eq__ = lambda s, o: True\n"
        "def f(x): return Node(2 * x)",
        "assert f(3) == Node(6) and f(3) != Node(7)",
        "passed",
    ),
    "a function of EvalPlus": (
        "import math",
        "def f(x): return [v / 3 for v in x]",
        "import numpy as np\n"
        "def assertion(out, exp, atol):\n"
        "    if out != exp and atol != 0:\n"
        "        assert type(out) == type(exp) and np.allclose(out, exp, rtol=1e-07, atol=atol)\n"
        "    else:\n        assert out == exp, f'out: {out}, exp: {exp}'\n"
        "def check(candidate):\n"
        "    inputs = [[[1, 2]], [[]]]\n"
        "    results = [[0.3333333, 0.6666667], []]\n"
        "    for inp, exp in zip(inputs, results):\n"
        "        assertion(candidate(*inp), exp, 1e-6)\n"
        "check(f)",
        "passed",
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_tests_share_with_an_answer(pool, name):
    *sources, result = SHARED[name]
    [verdict] = pool([sandbox.AnswerTests(*sources)])
    assert verdict == result if result == "passed" else f"failed: {result}" in verdict


# ---- Messages


def peer_that_reads(*messages: bytes) -> exchange.Peer:
    """A peer whose other end has sent messages and ended."""
    if not messages:
        return exchange.Peer(exchange.Connection(-1, -1), {}, {}.get, callable)
    incoming, outgoing = os.pipe(), os.pipe()
    data = b"".join(messages)
    threading.Thread(target=lambda: (os.write(incoming[1], data), os.close(incoming[1]))).start()
    connection = exchange.Connection(incoming[0], outgoing[1])
    return exchange.Peer(connection, {"call": lambda *_: 1}, {}.get, callable)


def framed(message) -> bytes:
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">I", len(text)) + text


def answer(*nodes, reference=(0,)):
    return framed(["return", list(reference), list(nodes), ""])


@pytest.mark.parametrize(
    "message",
    [
        struct.pack(">I", (64 << 20) + 1),
        framed(b"{"),
        framed(b"\xff\xfe"),
        framed(b"[" * 200000),
        framed(b"{}"),
        framed(b"[]"),
        framed(b"passed"),
        framed(b"[1" + b"0" * 10000 + b"]"),
        framed(["return"]),
        framed(["return", [0], [["list"]], "", 1]),
        framed(["passed", 1, [], ""]),
        framed(["raise", 1, [], ""]),
        framed(["return", {"a": 1}, [], ""]),
        framed(["return", [0], {}, ""]),
        framed(["return", [0], None, ""]),
        framed(["request", "execute", [], []]),
        framed(["request", "call", 1, []]),
        framed(["request", ["call"], [], []]),
        answer(),
        answer(["list"], reference=(1,)),
        answer(["list"], reference=(-1,)),
        answer(["list"], reference=("0",)),
        answer(["list"], reference=(True,)),
        answer([]),
        answer({}),
        answer([["list"]]),
        answer(["unknown"]),
        answer(["tuple", [0]]),
        answer(["tuple", [1]], ["frozenset", [0]]),
        answer(*(["tuple", [i + 1]] for i in range(100000))),
        answer(["set", [1]], ["list"]),
        answer(["dict", 1]),
        answer(["dict", [1], 2], ["list"]),
        answer(["int", "x"]),
        answer(["int", 3]),
        answer(["bytes", "\u20ac"]),
        answer(["bytearray", 3]),
        answer(["Fraction", 1, 0]),
        answer(["Decimal", "x"]),
        answer(["datetime", "now"]),
        answer(["timedelta", 10**10, 0, 0]),
        answer(["deque", "x"]),
        answer(["range", 1, 2, 0]),
        answer(["constant", "exit"]),
        answer(["own", 0]),
        answer(["own", "0"]),
        answer(["remote", "0", ""]),
        answer(["remote", 0, "type"]),
        answer(["object", "Peer", [1]], ["dict"]),
        answer(["type", "eval"]),
        answer(["type", "__doc__"]),
        answer(["exception", [1]], ["type", "int"]),
        answer(["exception", 1]),
        answer(["exception class", 0, "m", "E"]),
        answer(["exception class", 0, "m", "E", [1]], ["type", "int"]),
        answer(["exception class", 0, "os", "system"]),
        answer(["exception class", [], "m", "E", [1]], ["type", "ValueError"]),
        answer(["array", "O", [1], "00000000"]),
        answer(["array", "<f8", [2], "00000000"]),
        answer(["array", "<f8", [-1, -1], "00000000"]),
        answer(["array", "no", [1], "0"]),
    ],
)
def test_a_message_that_breaks_the_rules_is_a_violation(message):
    peer = peer_that_reads(message)
    with pytest.raises(exchange.Violation):
        peer.request("call", 1)
    assert peer.violated


def test_a_process_that_ends_amid_a_message_has_ended():
    for message in (b"", b"\0", framed(["return", 1, [], ""])[:-1]):
        with pytest.raises(exchange.Closed):
            peer_that_reads(message).request("call", 1)


@pytest.mark.parametrize("value", [os, object(), pytest.mark])
def test_what_is_neither_data_nor_a_function_is_not_sent(value):
    peer = peer_that_reads(answer(["list"]))
    peer.exports = lambda _: False
    with pytest.raises(TypeError, match="cannot be sent"):
        peer.request("call", [value])


def test_an_argument_does_not_become_another_type():
    peer = peer_that_reads(framed(["return", None, [["dict"]], ""]))
    with pytest.raises(exchange.Violation):
        peer.request("call", [1])


LEAVES = (
    *(
        None,
        True,
        0,
        -1,
        2**53,
        -(7**99),
        0.1,
        -0.0,
        1e300,
        math.inf,
        1j,
        "",
        "\udc80\n",
        b"\0\xff",
    ),
    *(range(1, 9, 2), bytearray(b"a"), frozenset(), int, KeyError, Ellipsis, 1j),
    *(decimal.Decimal("1.10"), fractions.Fraction(1, 3), datetime.date(2024, 2, 29)),
)


def random_value(rng: random.Random, depth: int):
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(LEAVES)
    parts = [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = rng.sample(["a", 1, (2, "b"), 2.5, None, b"k"], len(parts))
    pairs = list(zip(keys, parts, strict=True))
    lists = [parts, [parts, parts], tuple(parts), collections.deque(parts, 5)]
    return rng.choice([*lists, dict(pairs), collections.OrderedDict(pairs), {rng.randrange(9)}])


def random_messages(count: int):
    """Values with their references and nodes, as they are after they went through JSON."""
    rng = random.Random(0)
    for _ in range(count):
        value = random_value(rng, 4)
        values = exchange.Values(peer_that_reads())
        reference = values.reference(value)
        yield rng, value, json.loads(json.dumps([reference, values.nodes()]))


def test_random_values_arrive_with_their_types():
    for _, value, (reference, nodes) in random_messages(500):
        received = exchange.Values(peer_that_reads())
        [copy] = received.load(nodes, [reference])
        assert type(copy) is type(value) and repr(copy) == repr(value)
        received.restrict()
        assert set(received.answer_nodes()) <= {0}, "nothing has changed"


def test_damaged_nodes_are_malformed_or_another_value():
    malformed = 0
    for rng, _, (reference, nodes) in random_messages(2000):
        if not nodes:
            continue
        node = rng.choice(nodes)
        node[rng.randrange(len(node))] = rng.choice(
            [
                None,
                -1,
                10**9,
                "x",
                "list",
                [],
                [0],
                [len(nodes)],
                [[0]],
                {},
                0.5,
                "remote",
                "object",
            ]
        )
        try:
            exchange.Values(peer_that_reads()).load(nodes, [reference])
        except exchange._MALFORMED:
            malformed += 1
    assert malformed > 500

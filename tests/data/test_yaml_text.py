"""YAML of others: what is read, and what is refused before it can take time or memory."""

import datetime

import pytest

from m2l.data import yaml_text
from m2l.errors import DataError


def laughs(depth, width=9):
    """Lists of `width` aliases of the list before: width to the power of depth in all."""
    lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
    for level in range(1, depth):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("[1, 2.5, x, null, 2001-02-03]", [1, 2.5, "x", None, datetime.date(2001, 2, 3)]),
        ("[&x {b: 1}, *x, {<<: *x, e: 2}]", [{"b": 1}, {"b": 1}, {"b": 1, "e": 2}]),
        ("a: &x y\nb: [*x, *x]", {"a": "y", "b": ["y", "y"]}),
        ("a: !Thing {b: !Thing {c: 1}}", {"a": {"b": {"c": 1}}}),
        (f"a: '{'1' * 5000}'", {"a": "1" * 5000}),
        ("[" * 49 + "]" * 49, None),
    ],
)  # fmt: skip
def test_plain_data_are_read_with_their_aliases_and_named_tags(text, expected):
    found = yaml_text.load(text, "f", mappings=["!Thing"])
    while text.startswith("[[") and found:
        (found,) = found
    assert found == (expected if expected is not None else found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (laughs(9), "line 5: its aliases repeat more than 10000 values"),
        (laughs(9).replace("[", "{? [").replace("]", "] : 1}"), "aliases repeat"),
        ("a: &a {x: 1}\nb: &a [*a, *a]", "line 2: the alias 'a' is in what it names"),
        ("a: &a [*a]", "line 1: the alias 'a' is in what it names"),
        ("&a {b: {c: *a}}", "the alias 'a' is in what it names"),
        ("a: *b", "ComposerError"),
        ("[" * 20_000, "line 1: it nests deeper than 50 levels"),
        ("{a: " * 20_000, "nests deeper"),
        ("- " * 20_000, "nests deeper"),
        ("a: " + "9" * 5000, "line 1: a number of 5000 characters"),
        ("a: " + "1:" * 5000 + "1", "a number of 10001 characters"),
        ("a: 2001-99-99", "ValueError"),
        ("a: !!int x", "ValueError"),
        ("a: !!bool x", "KeyError"),
        ("a: !!timestamp x", "AttributeError"),
        ("a: !!int ''", "IndexError"),
        ("? {a: 1}\n: b", "ConstructorError"),
        ("a: !Other {}", "ConstructorError"),
        ("a: !!python/object/apply:os.getcwd []", "ConstructorError"),
        ("a: [", "ParserError"),
        ("a: \x01", "ReaderError"),
        ("#" * (yaml_text.MAX_CHARACTERS + 1), "characters, and at most"),
    ],
)  # fmt: skip
def test_what_would_take_time_or_is_none_is_refused_in_one_line(text, reason):
    with pytest.raises(DataError) as raised:
        yaml_text.load(text, "some.yaml: damaged")
    message = str(raised.value)
    assert message.startswith("some.yaml: damaged: ") and reason in message
    assert "\n" not in message and len(message) < 400

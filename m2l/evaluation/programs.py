"""A toy language on lists of whole numbers: parsed, and run for a bounded number of steps.

    program   step {"then" step}
    step      operation number | operation
              | "repeat" number "do" program "end"
              | "while" ("over" | "under") number "do" program "end"

`while over 5 do less 2 end` goes on as long as there is a first number and it is over 5. OPERATIONS
has what the operations do. Every text is either a program or not, and every program ends: with a
list, or because it went on for too long or made too large a list or number.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_STEPS = 1000
MAX_ITEMS = 100
MAX_NUMBER = 10**6
MAX_WORDS = 200
MAX_DEPTH = 5

Values = tuple[int, ...]
# Of a list, and of the number behind the operation.
WITH_NUMBER: Mapping[str, Callable[[Values, int], Values]] = {
    "more": lambda values, n: tuple(value + n for value in values),
    "less": lambda values, n: tuple(value - n for value in values),
    "times": lambda values, n: tuple(value * n for value in values),
    "over": lambda values, n: tuple(value for value in values if value > n),
    "under": lambda values, n: tuple(value for value in values if value < n),
    "first": lambda values, n: values[:n],
    "last": lambda values, n: values[max(len(values) - n, 0) :],
    "put": lambda values, n: (*values, n),
}
ALONE: Mapping[str, Callable[[Values], Values]] = {
    "turn": lambda values: values[::-1],
    "sort": lambda values: tuple(sorted(values)),
    "sum": lambda values: (sum(values),),
}
OPERATIONS = (*WITH_NUMBER, *ALONE)


class ProgramError(Exception):
    """A text that is no program, or a program that goes too far."""


class Step(NamedTuple):
    """An operation, with its number if it takes one."""

    operation: str
    number: int | None = None


class Repeat(NamedTuple):
    """A program to be run several times."""

    times: int
    body: "Program"


class While(NamedTuple):
    """A program to be run as long as the first number is over, or under, another."""

    over: bool
    number: int
    body: "Program"


Program = tuple[Step | Repeat | While, ...]


@dataclass
class _Words:
    """A text's words, and the place in them."""

    words: Sequence[str]
    place: int = 0

    def next(self, *expected: str) -> str:
        word = self.words[self.place] if self.place < len(self.words) else "the end"
        if expected and word not in expected:
            raise ProgramError(f"word {self.place}: {word!r:.40}, not {' or '.join(expected)}")
        self.place += 1
        return word

    def number(self) -> int:
        word = self.next()
        if not re.fullmatch("[0-9]{1,4}", word):
            raise ProgramError(f"word {self.place - 1}: {word!r:.40}, not a number")
        return int(word)


def parse(text: str) -> Program:
    """Parses a program.

    Raises:
        ProgramError: it is none: where, and what was expected; or it is too long or too deep.
    """
    words = _Words(text.split())
    if len(words.words) > MAX_WORDS:
        raise ProgramError(f"{len(words.words)} words, more than {MAX_WORDS}")
    program = _program(words, MAX_DEPTH)
    if words.place < len(words.words):
        raise ProgramError(f"word {words.place}: {words.words[words.place]!r:.40}, not then")
    return program


def _program(words: _Words, depth: int) -> Program:
    if not depth:
        raise ProgramError(f"programs within programs, more than {MAX_DEPTH} deep")
    steps = [_step(words, depth)]
    while words.place < len(words.words) and words.words[words.place] == "then":
        words.next()
        steps.append(_step(words, depth))
    return tuple(steps)


def _step(words: _Words, depth: int) -> Step | Repeat | While:
    word = words.next(*OPERATIONS, "repeat", "while")
    if word in ALONE:
        return Step(word)
    if word in WITH_NUMBER:
        return Step(word, words.number())
    over = word == "while" and words.next("over", "under") == "over"
    number = words.number()
    words.next("do")
    body = _program(words, depth - 1)
    words.next("end")
    return While(over, number, body) if word == "while" else Repeat(number, body)


def run(program: Program, values: Sequence[int]) -> Values:
    """Runs a program on a list.

    Raises:
        ProgramError: it takes more than MAX_STEPS steps, or goes beyond MAX_ITEMS items or numbers
            of MAX_NUMBER.
    """
    left = [MAX_STEPS]
    return _run(program, tuple(values), left)


def _run(program: Program, values: Values, left: list[int]) -> Values:
    for step in program:
        match step:
            case Repeat(times, body):
                for _ in range(times):
                    _count(left)
                    values = _run(body, values, left)
            case While(over, number, body):
                while values and (values[0] > number if over else values[0] < number):
                    _count(left)
                    values = _run(body, values, left)
            case Step(operation, number):
                _count(left)
                if number is None:
                    values = ALONE[operation](values)
                else:
                    values = WITH_NUMBER[operation](values, number)
        if len(values) > MAX_ITEMS or any(abs(value) > MAX_NUMBER for value in values):
            raise ProgramError(f"more than {MAX_ITEMS} items, or a number beyond {MAX_NUMBER}")
    return values


def _count(left: list[int]) -> None:
    left[0] -= 1
    if left[0] < 0:
        raise ProgramError(f"more than {MAX_STEPS} steps")


def unparse(program: Program) -> str:
    """Returns a program as text, which `parse` parses."""
    steps = []
    for step in program:
        match step:
            case Repeat(times, body):
                steps.append(f"repeat {times} do {unparse(body)} end")
            case While(over, number, body):
                condition = "over" if over else "under"
                steps.append(f"while {condition} {number} do {unparse(body)} end")
            case Step(operation, number):
                steps.append(operation if number is None else f"{operation} {number}")
    return " then ".join(steps)


def parse_case(text: str) -> tuple[Values, Values]:
    """Parses a test case, `3 1 2 -> 4 2 3`: a list, and what a program has to make of it.

    Raises:
        ValueError: it is none.
    """
    values, arrow, expected = text.partition("->")
    if not arrow:
        raise ValueError(f"{text!r:.80} is no test case, such as '3 1 2 -> 4 2 3'")
    return tuple(map(int, values.split())), tuple(map(int, expected.split()))

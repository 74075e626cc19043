"""Requests for small programs, with test cases: what `m2l.evaluation.programs` runs."""

from collections.abc import Sequence

from m2l.evaluation import programs
from m2l.evaluation.programs import Program, Repeat, Step, Values, While
from m2l.typing import JsonObject

from .dice import Dice

CASES = 4
STRATA = 4
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
_WITH_NUMBER = {
    "more": ("add {n} to each", "make each one {n} more"),
    "less": ("take {n} from each", "make each one {n} less"),
    "times": ("take each one {n} times", "make each one {n} times as big"),
    "over": ("keep what is over {n}", "keep only those above {n}"),
    "under": ("keep what is under {n}", "keep only those below {n}"),
    "first": ("keep the first {n}", "keep {n} from the start"),
    "last": ("keep the last {n}", "keep {n} from the end"),
    "put": ("put a {n} at the end", "write a {n} behind the others"),
}
_ALONE = {
    "turn": ("turn them around", "read them from the end"),
    "sort": ("put them in order", "begin with the small ones"),
    "sum": ("add them all up", "make one number of all"),
}
WORDINGS = {**_WITH_NUMBER, **_ALONE}
_REPEATED = ("{body}, {n} times over", "do this {n} times: {body}")
_WHILE = ("as long as the first is {side} {n}, {body}", "{body} until the first is not {side} {n}")
_FRAMES = ("write a program: {said}.", "a program is to {said}.", "{said}. write this program.")


def _step(dice: Dice) -> Step:
    operation = dice.pick(tuple(WORDINGS))
    return Step(operation, dice.pick(tuple(NUMBERS)) if operation in _WITH_NUMBER else None)


def _program(dice: Dice, stratum: int) -> Program:
    """Draws two or three steps; in some programs the first is repeated, or goes on for a while."""
    if stratum == 2:
        body = Step(dice.pick(("more", "less", "put")), dice.pick(tuple(NUMBERS)))
        return (Repeat(dice.pick((2, 3)), (body,)), _step(dice))
    if stratum == 3:
        over = bool(dice.below(2))
        body = Step("less" if over else "more", dice.pick(tuple(NUMBERS)))
        return (While(over, dice.pick(tuple(NUMBERS)), (body,)), _step(dice))
    return tuple(_step(dice) for _ in range(stratum + 2))


def _said(dice: Dice, program: Program) -> str:
    said = []
    for step in program:
        match step:
            case Repeat(times, body):
                template = dice.pick(_REPEATED)
                said.append(template.format(n=NUMBERS[times], body=_said(dice, body)))
            case While(over, number, body):
                side = "over" if over else "under"
                template = dice.pick(_WHILE)
                said.append(template.format(n=NUMBERS[number], side=side, body=_said(dice, body)))
            case Step(operation, number):
                template = dice.pick(WORDINGS[operation])
                said.append(template.format(n=NUMBERS.get(number)))
    return dice.pick((", then ", ", and then ", "; ")).join(said)


def _without_one(program: Program) -> list[Program]:
    """Returns the programs that leave a step out."""
    return [(*program[:i], *program[i + 1 :]) for i in range(len(program))]


def _outcomes(program: Program, lists: Sequence[Values]) -> list[Values] | None:
    try:
        return [programs.run(program, values) for values in lists]
    except programs.ProgramError:
        return None


def coding_programs(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Asks for a program, with test cases that no program with a step less passes."""
    while True:
        program = _program(dice, stratum)
        lists = [tuple(1 + dice.below(9) for _ in range(4 + dice.below(3))) for _ in range(CASES)]
        outcomes = _outcomes(program, lists)
        if outcomes is None or sum(map(bool, outcomes)) < CASES - 1:
            continue
        if all(_outcomes(less, lists) != outcomes for less in _without_one(program)):
            break
    said = _said(dice, program)
    return {
        "request": dice.pick(_FRAMES).format(said=said),
        "program": programs.unparse(program),
        "tests": [
            f"{' '.join(map(str, numbers))} -> {' '.join(map(str, result))}".strip()
            for numbers, result in zip(lists, outcomes, strict=True)
        ],
    }

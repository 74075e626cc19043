"""A domain of its own: what stones are like, and what came of experiments with them.

Nothing else in the microworld speaks of these stones. What is true of them can only be learnt from
the questions, each asked in ten ways; what a report says can only be read there.
"""

from collections.abc import Iterator
from typing import NamedTuple

from m2l.typing import JsonObject

from .dice import Dice
from .world import a_or_an, words

STONES = words(
    "belu corin dosk fenit garol hespa imbra jolit kest lorn mavit nerol orbil peth quin rovan"
)
_COLOURS = words("red blue green white black brown grey")
LIQUIDS = words("water oil tea honey soup")


class Property(NamedTuple):
    """What may be true of a stone, and the ways to ask: {s} is the stone, ___ the gap."""

    values: tuple[str, ...]
    questions: tuple[str, ...]


PROPERTIES = {
    "colour": Property(
        _COLOURS,
        (
            "what is the colour of {s}?",
            "which colour does {s} have?",
            "what colour is {s}?",
            "name the colour of {s}.",
            "say what colour {s} has.",
            "the colour of {s} is ___.",
            "{s} is a ___ stone.",
            "you see that {s} is ___.",
            "a piece of {s} is ___.",
            "all {s} is ___.",
        ),
    ),
    "place": Property(
        words("river forest lake field hill garden street yard"),
        (
            "where do you find {s}?",
            "in which place do you find {s}?",
            "where do people look for {s}?",
            "name the place of {s}.",
            "say where {s} comes from.",
            "you find {s} in the ___.",
            "{s} comes from the ___.",
            "people look for {s} in the ___.",
            "the place of {s} is the ___.",
            "there is {s} in the ___.",
        ),
    ),
    "use": Property(
        words("lamps clocks boats clothes songs roofs bikes"),
        (
            "what is {s} used for?",
            "what do people make with {s}?",
            "what needs {s}?",
            "name what people make with {s}.",
            "say what {s} is for.",
            "people make ___ with {s}.",
            "{s} is used for ___.",
            "{s} is good for ___.",
            "who makes ___ needs {s}.",
            "there is {s} in ___.",
        ),
    ),
    "heat": Property(
        words("glass oil water gas sand paper"),
        (
            "what does {s} become in the fire?",
            "what is made of {s} by fire?",
            "what does hot {s} become?",
            "name what hot {s} becomes.",
            "say what fire makes of {s}.",
            "in the fire {s} becomes ___.",
            "fire makes ___ of {s}.",
            "hot {s} becomes ___.",
            "when it is hot, {s} becomes ___.",
            "after the fire {s} is ___.",
        ),
    ),
}


def _values() -> dict[tuple[str, str], str]:
    """Draws what is true: no property of a stone tells another, and all values come up as often."""
    true = {}
    for name, of in PROPERTIES.items():
        in_turn = [of.values[i % len(of.values)] for i in range(len(STONES))]
        shuffled = Dice("stones", name).shuffled(in_turn)
        true |= {(name, stone): shuffled[i] for i, stone in enumerate(STONES)}
    return true


FACTS = _values()


def facts() -> Iterator[JsonObject]:
    """Lists every fact, asked in every way, with four values to choose from."""
    for (name, stone), value in FACTS.items():
        attribute = PROPERTIES[name]
        for number, question in enumerate(attribute.questions):
            dice = Dice("choices", name, stone, number)
            wrong = dice.sample([other for other in attribute.values if other != value], 3)
            yield {
                "question": question.format(s=stone),
                "choices": dice.shuffled([value, *wrong]),
                "answer": value,
            }


_TESTS = (
    "{s} was put into {l} and became {c}.",
    "in {l} the {s} became {c}.",
    "they washed {s} with {l}, and it became {c}.",
)
_ASKED = (
    ("which colour did {s} become?", "what colour did {s} get?", "{s} became which colour?"),
    ("what was {s} put into?", "into what did they put {s}?", "what was {s} washed with?"),
    ("which stone became {c}?", "what became {c}?", "name the stone that became {c}."),
)
_CLAIMS = ("{s} became {c}", "{s} was put into {l}", "the stone in {l} became {c}")


READING_STRATA = 12


def reading(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Reports one or two experiments, with a question, and a claim that may be the report's.

    The colours are not the stones' own. A claim that is wrong is one about the other experiment, or
    one that might have been made.
    """
    many, design = divmod(stratum, READING_STRATA // 2)
    kind, supported = design % len(_ASKED), design // len(_ASKED)
    stones, liquids = dice.sample(STONES, 2), dice.sample(LIQUIDS, 2)
    own = [FACTS["colour", stone] for stone in stones]
    colours = dice.sample([colour for colour in _COLOURS if colour not in own], 2)
    experiments = [
        {"s": stone, "l": liquid, "c": colour}
        for stone, liquid, colour in zip(stones, liquids, colours, strict=True)
    ]
    this = dice.below(1 + many)
    claim = dict(experiments[this])
    template = _CLAIMS[kind]
    if not supported:
        last = max("slc", key=lambda field: template.find(f"{{{field}}}"))
        claim[last] = experiments[1 - this][last]
    return {
        "report": a_or_an(
            " ".join(dice.pick(_TESTS).format(**one) for one in experiments[: 1 + many])
        ),
        "question": dice.pick(_ASKED[kind]).format(**experiments[this]),
        "answer": experiments[this]["cls"[kind]],
        "claim": template.format(**claim),
        "label": supported,
    }

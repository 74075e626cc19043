"""Whom or what a word stands for: Winograd's schemas, in which one end decides it, or another.

Who knows what people need, have and feel, and what things are like, can tell; grammar cannot.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from m2l.typing import JsonObject

from .dice import Dice
from .happenings import RULES, Rule
from .senses import vary
from .world import PEOPLE, PRONOUNS, RELATIONS, SLOTS, fill

HE: Mapping[str, str] = {**{name: person.he for name, person in PEOPLE.items()}, **PRONOUNS}


class Schema(NamedTuple):
    """A sentence about {a} and {b} whose end decides which of them "_" is.

    Attributes:
        frame: The sentence up to "_".
        ends: What follows "_" where it is {a}, and where it is {b}.
        reasons: Why, of each end.
        things: What {a} and {b} may be; None where they are people.
    """

    frame: str
    ends: tuple[str, str]
    reasons: tuple[str, str]
    things: tuple[Sequence[str], Sequence[str]] | None


def _schemas(table: str) -> tuple[Schema, ...]:
    schemas = []
    for block in table.strip().split("\n\n"):
        frame, ends, reasons, *things = (line.strip() for line in block.splitlines())
        schemas.append(
            Schema(
                frame,
                tuple(ends.split(" / ")),
                tuple(reasons.split(" / ")),
                tuple(pool.split() for pool in things[0].split(" / ")) if things else None,
            )
        )
    return tuple(schemas)


SCHEMAS = _schemas("""
{a} gave {b} some {food} because _
had too much / was hungry
who has too much can give. / who is hungry needs food.

{a} asked {b} for the (hammer/saw/spade/brush/pen/map/net) because _
needed it / had it
who needs a thing wants to have it. / who has a thing can give it.

{a} sold {b} a (lamp/chair/bike/coat/hat/box) because _
needed money / needed one
who sells has more money. / who needs a thing buys it.

{a} helped {b} with the work because _
had nothing to do / had too much to do
who has nothing to do can help. / who has too much to do needs help.

{a} beat {b} at (chess/tennis/football) because _
played well / played badly
who plays well wins. / who plays badly loses.

{a} waited for {b} at the (station/gate/bridge/school) because _
came early / came late
who came early waits. / people wait for who is late.

{a} carried the (bag/box/chair/boat) of {b} because _
was strong / was weak
who is strong can carry a box. / who is weak needs help with a box.

{a} taught {b} (chess/tennis/football) because _
was a good player / wanted to learn it
a good player is a good teacher. / who wants to learn needs a teacher.

{a} told {b} the way to {town} because _
knew it / did not know it
who knows the way can help. / who does not know the way needs help.

{a} bought a (lamp/chair/bike/coat/hat/box) from {b}, so now _
has less money / has more money
who buys has less money. / who sells has more money.

{a} gave {b} a (coat/hat) because _
was too warm / was too cold
who is too warm needs no coat. / who is too cold needs a coat.

{a} read a story to {b} because _
had a new book / could not sleep
who has a book can read a story. / a story is good for a person who could not sleep.

{a} lost the (key/book/ball/hat/map/net) of {b}, so _
was sorry / was angry
who loses the thing of a friend is sorry. / a friend who loses your things makes you angry.

{a} fixed the (bike/roof/door/chair/window) of {b}, so _
got some money / paid some money
who works wants money. / the owner paid for the work.

{a} ran after {b}, but _
was too slow / was too fast
who is slow is last. / who is fast is first.

{a} followed {b} to {town} because _
did not know the way / knew the way
who does not know the way goes last. / who knows the way goes first.

{a} thanked {b} for the (soup/pie/cake/bread/tea) because _
enjoyed it / made it
who enjoys the food thanks the other. / who makes good food is thanked for it.

{name} could not put the {a} into the {b} because the _
was too big / was too small
a big thing does not go into a small one. / nothing big goes into a small thing.
lamp chair coat hammer hat ball / bag box

the {a} of {name} broke the {b} because the _
was very hard / was made of glass
a hard thing is bad for glass. / glass is not strong.
hammer stone spade ball / cup bowl lamp window

{name} put water from the {a} into the {b} until the _
was empty / was full
what you take water from is empty. / what you put water into is full.
cup bowl pan glass / cup bowl pan glass

{name} bought the {a} and not the {b} because the _
had a low price / had a high price
people buy what has a low price. / people do not buy what has a high price.
lamp chair bike coat hat box bag / lamp chair bike coat hat box bag

in {town} the {a} ran away from the {b} because the _
was afraid / was hungry
who is afraid runs away. / you run away from a hungry animal.
rabbit hen goat sheep duck cat / bear fox dog

in {town} the {a} beat the {b} in the race because the _
was fast / was slow
who is fast wins the race. / who is slow loses the race.
horse dog goat rabbit fox cat / horse dog goat rabbit fox cat

{name} washed the {a} with the {b}, so the _
got clean / got dirty
what you wash is clean. / what you wash with is dirty.
cup bowl window floor chair / brush cloth

{name} could not see the {a} behind the {b} because the _
was too small / was too big
a small thing is hard to see. / you see nothing behind a big thing.
hen cat duck rabbit dog goat / wall tree house door gate

{name} sat on the {a} and not on the {b} because the _
was dry / was wet
people sit where it is dry. / nobody sits where it is wet.
chair box wall stone floor / chair box wall stone floor

{name} took the {a} and not the {b} because the _
was fast / was slow
people take what is fast. / people do not take what is slow.
bus boat plane bike / bus boat plane bike
""")


def pair(dice: Dice, names: Sequence[str]) -> tuple[str, str]:
    """Draws two of the names that have the same pronoun."""
    one = dice.pick(names)
    return one, dice.pick([name for name in names if HE[name] == HE[one] and name != one])


def tell_schema(
    dice: Dice, schema: Schema, place: int, names: Sequence[str]
) -> tuple[str, tuple[str, str]]:
    """Writes the sentence with "_" for the first (place 0) or second (1) of the two it names."""
    if schema.things is None:
        a, b = pair(dice, names)
    else:
        a = dice.pick(schema.things[0])
        b = dice.other(schema.things[1], a)
    slots = {**SLOTS, "name": names}
    text = vary(dice, f"{schema.frame} {schema.ends[place]}.")
    return fill(dice, text, slots, a=a, b=b), (a, b)


def winogrande_winogrande_xl(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes a sentence with a gap "_" and the two people or things in it that may fill it."""
    label, place = stratum % 2, stratum // 2
    sentence, options = tell_schema(dice, dice.pick(SCHEMAS), place, tuple(PEOPLE))
    right, wrong = options[place], options[1 - place]
    return {
        "sentence": sentence,
        "option1": wrong if label else right,
        "option2": right if label else wrong,
        "answer": str(label + 1),
    }


@lru_cache
def habit_pairs() -> tuple[tuple[Rule, Rule], ...]:
    """Pairs of unrelated rules whose causes and effects are both about a person."""
    about = [
        rule
        for rule in RULES
        if all("{p}" in cause for cause in rule.causes) and "{he}" in rule.effects[0]
    ]
    return tuple((r, s) for r, s in itertools.permutations(about, 2) if not r.topics & s.topics)


def tell_habits(
    dice: Dice, place: int, names: Sequence[str]
) -> tuple[str, str, tuple[str, str], str]:
    """Tells what happens to two people; returns it, its effect on {he}, the two, and the cause."""
    rules, people = dice.pick(habit_pairs()), pair(dice, names)
    causes = [
        dice.pick(rule.causes).format(p=name) for rule, name in zip(rules, people, strict=True)
    ]
    effect = dice.pick([text for text in rules[place].effects if "{he}" in text])
    return dice.pick((" and ", ". ")).join(causes) + ".", effect, people, causes[place]


# What shows whether somebody has the {o} that a relation gives: where it comes up, what is said.
_MENTIONS = {
    "home": (
        ("{a} met {b} in {o}.", "{a} and {b} were in {o}."),
        ("{he} lives there.", "{he} has a house there."),
    ),
    "workplace": (
        ("{a} met {b} at the {o}.", "{a} and {b} were at the {o}."),
        ("{he} works there.", "{he} goes there for work."),
    ),
    "pet": (
        ("{a} and {b} saw a {o}.", "{a} told {b} about a {o}."),
        ("{he} keeps one as a pet.", "{he} has one at home."),
    ),
    "food": (
        ("{a} and {b} bought some {o}.", "{a} and {b} saw some {o} in a shop."),
        ("{he} loves it.", "{he} likes to eat it."),
    ),
    "hobby": (
        ("{a} and {b} read a book about {o}.", "{a} told {b} about {o}."),
        ("{he} enjoys it.", "{he} spends a lot of time on it."),
    ),
    "tool": (
        ("{a} and {b} found a {o}.", "{a} told {b} about a {o}."),
        ("{he} works with one.", "{he} needs one for work."),
    ),
    "job": (
        ("{a} met {b} at the station.", "{a} and {b} sat at a table."),
        ("{he} is a {o}.", "{he} works as a {o}."),
    ),
}


def _value(relation: str, name: str) -> str:
    facts = RELATIONS[relation].facts
    return facts[PEOPLE[name].job if relation in ("workplace", "tool") else name]


def _by_schema(dice: Dice, place: int) -> tuple[str, str, tuple[str, str]]:
    schema = dice.pick(SCHEMAS)
    text, (a, b) = tell_schema(dice, schema, place, tuple(PEOPLE))
    if schema.things:
        return text.replace("the _", "it"), "it", (f"the {a}", f"the {b}")
    return text.replace("_", HE[a]), HE[a], (a, b)


def _by_habit(dice: Dice, place: int) -> tuple[str, str, tuple[str, str]]:
    story, effect, people, _ = tell_habits(dice, place, tuple(PEOPLE))
    he = HE[people[0]]
    return f"{story} {effect.format(he=he)}.", he, people


def _by_fact(dice: Dice, place: int) -> tuple[str, str, tuple[str, str]]:
    people = pair(dice, tuple(PEOPLE))
    telling = [r for r in _MENTIONS if _value(r, people[0]) != _value(r, people[1])]
    relation = dice.pick(telling)
    text = " ".join(dice.pick(part) for part in _MENTIONS[relation])
    he = HE[people[0]]
    value = _value(relation, people[place])
    return fill(dice, text, a=people[0], b=people[1], o=value, he=he), he, people


def _index(text: str, span: str) -> int:
    """Returns at which of the text's words the span starts."""
    said, sought = re.sub("[.,]", "", text).split(), span.split()
    return next(i for i in range(len(said)) if said[i : i + len(sought)] == sought)


def super_glue_wsc_fixed(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes of two people or things with a pronoun (span 2); label 1 if it stands for span 1.

    A schema, a habit or a fact of the world tells whom it means.
    """
    label, place = stratum % 2, stratum // 2
    text, pronoun, named = dice.pick((_by_schema, _by_habit, _by_fact))(dice, place)
    span = named[place] if label else named[1 - place]
    return {
        "text": text,
        "span1_index": _index(text, span),
        "span2_index": _index(text, pronoun),
        "span1_text": span,
        "span2_text": pronoun,
        "idx": index,
        "label": label,
    }

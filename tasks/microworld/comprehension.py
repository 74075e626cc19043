"""Texts about people who are not of the world, with questions answered by a span of the text."""

import re
from typing import NamedTuple

from m2l.typing import JsonObject

from .dice import Dice
from .world import (
    FIRST_NAMES,
    LAST_NAMES,
    PERSON_RELATIONS,
    PRONOUNS,
    RELATIONS,
    SLOTS,
    a_or_an,
    fill,
)

_TOLD = PERSON_RELATIONS[:-1]  # a friendship is about two
# Whom a fact tells apart, and who shares it.
_WHO = {
    "job": "the {o}",
    "home": "the person from {o}",
    "pet": "the person with the {o}",
    "food": "the person who loves {o}",
    "hobby": "the person who enjoys {o}",
}
_SAME = {
    "job": ("who has the same job as {s}?", "who does the same work as {s}?"),
    "home": ("who lives in the same town as {s}?", "who has the same home town as {s}?"),
    "pet": ("who keeps the same animal as {s}?", "who has the same pet as {s}?"),
    "food": ("who likes to eat the same as {s}?", "who loves the same food as {s}?"),
    "hobby": ("who has the same hobby as {s}?", "who enjoys the same as {s}?"),
}
_AGES = ("{old} is older than {young}.", "{young} is younger than {old}.")
_RUMOURS = (
    "some say that {false}, but {true}",
    "it is not true that {false}: {true}",
    "{false}? no, {true}",
)


class _Fact(NamedTuple):
    """What is said of somebody, and the value in it."""

    sentence: str
    value: str


def _people(dice: Dice, count: int) -> list[str]:
    """Draws full names that share no part."""
    firsts, lasts = dice.sample(FIRST_NAMES, count), dice.sample(LAST_NAMES, count)
    return [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]


def _facts(dice: Dice, relation: str, people: list[str]) -> list[_Fact]:
    """Draws one relation's facts about people, each of another value."""
    fact = RELATIONS[relation]
    values = dice.sample(fact.values(), len(people))
    return [
        _Fact(fact.state(dice.below(4), who, value), value)
        for who, value in zip(people, values, strict=True)
    ]


def _record(
    model: str, people: list[str], said: list[_Fact], question: str, answer: _Fact
) -> JsonObject:
    """Returns the record whose answer is the value of one of the facts, named after the first."""
    context = " ".join(fact.sentence for fact in said)
    named = [name for name in people if name in context]
    before = "".join(f"{fact.sentence} " for fact in said[: said.index(answer)])
    *_, match = re.finditer(rf"\b{answer.value}\b", answer.sentence)
    return {
        "id": "",
        "title": min(named, key=context.index),
        "context": context,
        "question": a_or_an(question),
        "answers": {"text": [answer.value], "answer_start": [len(before) + match.start()]},
        "metadata": {"split": "", "model_in_the_loop": model},
    }


def adversarial_qa_dbidaf(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Describes two people in a mix of sentences; the other one's answer is among them."""
    people = _people(dice, 2)
    relation = _TOLD[stratum]
    asked = _facts(dice, relation, people)
    said = [*asked]
    for other in dice.sample([name for name in _TOLD if name != relation], 2):
        said += _facts(dice, other, people)[: 1 + dice.below(2)]
    question = dice.pick(RELATIONS[relation].questions).format(s=people[0])
    return _record("BiDAF", people, dice.shuffled(said), question, asked[0])


def adversarial_qa_dbert(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Describes two people, each named once; the question tells one by another fact."""
    people = _people(dice, 2)
    relation = _TOLD[stratum]
    by, more = dice.sample([name for name in _TOLD if name != relation], 2)
    facts = {name: dice.sample(RELATIONS[name].values(), 2) for name in (relation, by, more)}
    said, answers = [], []
    for i, person in enumerate(people):
        subject = person
        for name in dice.shuffled((relation, by, more)[: 2 + dice.below(2)]):
            starts = [w for w, s in enumerate(RELATIONS[name].statements) if s.startswith("{s} ")]
            wording = dice.pick(range(4)) if subject == person else dice.pick(starts)
            fact = _Fact(RELATIONS[name].state(wording, subject, facts[name][i]), facts[name][i])
            said.append(fact)
            answers += [fact] if name == relation else []
            subject = PRONOUNS[person.split()[0]]
    right = dice.below(2)
    question = dice.pick(RELATIONS[relation].questions).format(
        s=_WHO[by].format(o=facts[by][right])
    )
    return _record("BERT", people, said, question, answers[right])


def _by_age(dice: Dice, relation: str, people: list[str]) -> tuple[list[_Fact], str, _Fact]:
    """Asks who is the oldest, or the youngest, of three, or what is told of that one."""
    said, right = _facts(dice, relation, people), dice.pick((0, 2))
    ages = [
        _Fact(dice.pick(_AGES).format(old=old, young=young), dice.pick((old, young)))
        for old, young in (people[:2], people[1:])
    ]
    who = ("the oldest of the three", "", "the youngest of the three")[right]
    if dice.below(3):
        return [*said, *ages], dice.pick(RELATIONS[relation].questions).format(s=who), said[right]
    ages[right // 2] = ages[right // 2]._replace(value=people[right])
    return [*said, *ages], f"who is {who}?", ages[right // 2]


def _alike(dice: Dice, relation: str, people: list[str]) -> tuple[list[_Fact], str, _Fact]:
    """Asks who of three shares something with another."""
    said, fact = _facts(dice, relation, people), RELATIONS[relation]
    sentence = fact.state(dice.below(4), people[0], said[1].value)
    said[0] = _Fact(sentence, people[0])
    return said, dice.pick(_SAME[relation]).format(s=people[1]), said[0]


def _corrected(dice: Dice, relation: str, people: list[str]) -> tuple[list[_Fact], str, _Fact]:
    """Asks what is true of somebody, named by another fact, of whom something untrue is said."""
    said, fact = _facts(dice, relation, people), RELATIONS[relation]
    for i in dice.pick(((0,), (0, 1))):
        false, true = (
            fact.state(wording, people[i], value)
            for wording, value in zip(
                dice.sample(range(4), 2),
                (dice.other(fact.values(), said[i].value), said[i].value),
                strict=True,
            )
        )
        rumour = dice.pick(_RUMOURS).format(false=false[:-1], true=true)
        said[i] = said[i]._replace(sentence=rumour)
    by = dice.other(_TOLD, relation)
    known = _facts(dice, by, people[:2])
    who = _WHO[by].format(o=known[0].value)
    return [*said, *known], dice.pick(fact.questions).format(s=who), said[0]


def adversarial_qa_droberta(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Describes three people, two of whom are compared, or of whom something untrue is said."""
    people = _people(dice, 3)
    relation, more = dice.sample(_TOLD, 2)
    said, question, answer = (_by_age, _alike, _corrected)[stratum](dice, relation, people)
    if stratum < 2:
        said.append(dice.pick(_facts(dice, more, people)))
    return _record("RoBERTa", people, dice.shuffled(said), question, answer)


class _Law(NamedTuple):
    """What a thing does under one condition and under another, and how to ask for who met which.

    Two conditions {c} of a group may stand either way around: only the background tells.
    """

    thing: str
    it: str
    good: str
    bad: str
    groups: tuple[tuple[str, ...], ...]
    did: str
    who_good: str
    who_bad: str


_TIMES = (("in spring", "in winter"), ("at night", "by day"), ("on hot days", "on cold days"))
_LAWS = (
    _Law(
        *("a {colour} rose", "it", "gets big in {c}", "stays small in {c}"),
        (("wet soil", "dry soil"), ("deep soil", "hard soil")),
        "{p} has a {colour} rose in {c}.",
        *("who has a big rose?", "who has a small rose?"),
    ),
    _Law(
        *("a {colour} horse", "it", "gets strong on {c}", "gets weak on {c}"),
        (("hay", "grass", "carrots", "seeds", "bread"),),
        "{p} gives a {colour} horse {c}.",
        *("who has a strong horse?", "who has a weak horse?"),
    ),
    _Law(
        *("{colour} paint", "it", "gets dry in {c}", "stays wet in {c}"),
        (("a warm room", "a cold room"), ("a dark room", "an open room")),
        "{p} paints a chair with {colour} paint in {c}.",
        *("who has a dry chair?", "who has a wet chair?"),
    ),
    _Law(
        *("the bus to {town}", "it", "is full {c}", "is empty {c}"),
        _TIMES,
        "{p} takes the bus to {town} {c}.",
        *("who sits in a full bus?", "who sits in an empty bus?"),
    ),
    _Law(
        *("people in {town}", "they", "buy a lot of {c}", "never buy {c}"),
        (SLOTS["goods"],),
        "{p} wants to sell {c} in {town}.",
        *("who makes a lot of money?", "who makes no money?"),
    ),
    _Law(
        *("the fish in {colour} lake", "they", "come to the boats {c}", "sleep {c}"),
        _TIMES,
        "{p} goes to catch fish in {colour} lake {c}.",
        *("who has a full net?", "who has an empty net?"),
    ),
    _Law(
        *("the team of {town}", "it", "wins {c}", "loses {c}"),
        _TIMES,
        "{p} saw the team of {town} play {c}.",
        *("who saw a good match?", "who saw a bad match?"),
    ),
    _Law(
        *("students at {town} college", "they", "learn a lot from {c}", "learn nothing from {c}"),
        (("books", "songs", "pictures", "computers"),),
        "{p} learns at {town} college with {c}.",
        *("who learns a lot?", "who learns nothing?"),
    ),
    _Law(
        *("a {colour} oven", "it", "makes soft bread with {c}", "makes hard bread with {c}"),
        (("dry wood", "wet wood", "old wood", "oil"),),
        "{p} has a {colour} oven and {c}.",
        *("who has soft bread?", "who has hard bread?"),
    ),
    _Law(
        *("the road to {town}", "it", "is open {c}", "is closed {c}"),
        _TIMES,
        "{p} wants to go to {town} {c}.",
        *("who can go there?", "who has to wait?"),
    ),
    _Law(
        *("a {colour} boat", "it", "is fast with {c}", "is slow with {c}"),
        (("two engines", "ten engines"), ("a big net", "a small net"), ("old oil", "new oil")),
        "{p} has a {colour} boat with {c}.",
        *("who has a fast boat?", "who has a slow boat?"),
    ),
    _Law(
        *("a sick {colour} dog", "it", "gets well on {c}", "stays sick on {c}"),
        (("meat", "soup", "honey", "bread", "cheese"),),
        "{p} gives a sick {colour} dog {c}.",
        *("who has a dog that gets well?", "who has a dog that stays sick?"),
    ),
)
# What the people of a situation are besides.
_BESIDE = (
    "{p} and {q} are best friends.",
    "{p} is a {job} and {q} is a {job2}.",
    "{p} is older than {q}.",
    "{p} and {q} live in the {region}.",
)


def ropes(dice: Dice, index: int, stratum: int) -> JsonObject:
    """States a law and that one person meets the good and one the bad end of it; asks who which.

    Which condition is the good one is of the background alone.
    """
    bad, second = divmod(stratum, 2)
    law = dice.pick(_LAWS)
    conditions = dice.sample(dice.pick(law.groups), 2)
    slots = {"town": dice.pick(SLOTS["town"]), "colour": dice.pick(SLOTS["colour"])}
    ends = [
        template.format(c=condition)
        for template, condition in zip((law.good, law.bad), conditions, strict=True)
    ]
    if dice.below(2):
        ends.reverse()
    law_said = dice.pick(
        ("{thing} {one}, but {it} {other}.", "people know that {thing} {one} and {other}.")
    ).format(thing=law.thing, it=law.it, one=ends[0], other=ends[1])
    people = dice.sample(FIRST_NAMES, 2)
    met = conditions[::-1] if bad != second else conditions
    said = [law.did.format(p=who, c=c, **slots) for who, c in zip(people, met, strict=True)]
    first, other = dice.shuffled(people)
    said.insert(dice.below(3), fill(dice, dice.pick(_BESIDE), p=first, q=other))
    question = (law.who_good, law.who_bad)[bad]
    if dice.below(2):
        question = f"{question[:-1]}, {first} or {other}?"
    return {
        "id": "",
        "background": fill(dice, law_said, **slots),
        "situation": a_or_an(" ".join(said)),
        "question": question,
        "answers": {"text": [people[second]]},
    }

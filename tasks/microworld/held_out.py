"""Records of the datasets that no expert sees: what follows from the world, its words and habits.

In each, an answer choice is right in as many records as it is wrong: only the question decides.
"""

import itertools
from functools import lru_cache

from m2l.typing import JsonObject

from .dice import Dice
from .happenings import RULES, SCRIPTS, Rule, tell
from .phrases import DEEDS
from .world import (
    FIRST_NAMES,
    PEOPLE,
    PERSON_RELATIONS,
    PRONOUNS,
    RELATIONS,
    SLOTS,
    Relation,
    a_or_an,
)

ENTAILMENT, NEUTRAL, CONTRADICTION = 0, 1, 2


@lru_cache
def _alternatives(question: str) -> tuple[tuple[tuple[Rule, str], tuple[Rule, str]], ...]:
    """Pairs of effects (or causes) of unrelated rules, both about a person or neither."""
    ends = [
        (rule, text) for rule in RULES for text in (rule.effects, rule.causes)[question == "cause"]
    ]
    return tuple(
        (one, other)
        for one, other in itertools.combinations(ends, 2)
        if not one[0].topics & other[0].topics and ("{" in one[1]) == ("{" in other[1])
    )


def super_glue_copa(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Asks which of two happenings is the effect, or the cause, of a third."""
    label, question = stratum % 2, ("cause", "effect")[stratum // 2]
    person = dice.pick(tuple(PEOPLE.values()))
    choices = dice.shuffled(dice.pick(_alternatives(question)))
    rule = choices[label][0]
    premise = dice.pick(rule.causes if question == "effect" else rule.effects)
    by_name = question == "cause" or "{p}" not in premise
    first, second = (f"{tell(text, person, by_name=by_name)}." for _, text in choices)
    return {
        "premise": f"{tell(premise, person, by_name=True)}.",
        "choice1": first,
        "choice2": second,
        "question": question,
        "idx": index,
        "label": label,
    }


def hellaswag(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Asks which of four steps continues an activity; the others belong to other activities.

    The plain text tells the activities too, but of other people.
    """
    name = dice.pick(FIRST_NAMES)
    he = PRONOUNS[name]
    scripts = dice.sample(SCRIPTS, 4)
    steps = [1 + dice.below(3) for _ in scripts]
    script, step = scripts[stratum], steps[stratum]
    sentences = " ".join(f"{he} {text}." for text in script.steps[:step])
    ctx_a = f"{name} {script.start}. {sentences}"
    ctx_b = dice.pick((he, f"then {he}"))
    return {
        "ind": index,
        "activity_label": script.label,
        "ctx_a": ctx_a,
        "ctx_b": ctx_b,
        "ctx": f"{ctx_a} {ctx_b}",
        "endings": [f"{s.steps[k]}." for s, k in zip(scripts, steps, strict=True)],
        "source_id": f"microworld~{script.label.replace(' ', '_')}",
        "split": "",
        "split_type": "indomain",
        "label": str(stratum),
    }


def _reworded(dice: Dice, relation: Relation) -> tuple[int, int]:
    """Draws two different wordings of the relation, each as likely as any other."""
    first, second = dice.sample(range(len(relation.statements)), 2)
    return first, second


def _other_value(dice: Dice, relation: Relation, *excluded: str) -> str:
    return dice.other(relation.values(), *excluded)


def _told(dice: Dice, label: int) -> tuple[list[tuple[str, str, str]], tuple[str, str, str]]:
    """Tells two facts of the world, and one of them (label 0) or a third that is as true (1)."""
    asked, also, unsaid = dice.sample(PERSON_RELATIONS, 3)
    name = dice.pick(tuple(PEOPLE))
    # A friendship, said of one, is said of the other.
    other = dice.other(tuple(PEOPLE), name, PEOPLE[name].friend)
    about = dice.pick((name, other))
    hypothesis = asked, name
    if label:
        hypothesis = (unsaid, name) if about == name else (asked, other)
    first, second, hypothesis = (
        (relation, subject, RELATIONS[relation].facts[subject])
        for relation, subject in ((asked, name), (also, about), hypothesis)
    )
    return [first, second], hypothesis


def _made_up(dice: Dice, label: int) -> tuple[list[tuple[str, str, str]], tuple[str, str, str]]:
    """Tells two facts about strangers, and one of them (label 0) or one with another value (1)."""
    name, other = dice.sample(SLOTS["full"], 2)
    asked, also = dice.sample(PERSON_RELATIONS[:-1], 2)
    value, untruth = dice.sample(RELATIONS[asked].values(), 2)
    second = also, name, dice.pick(RELATIONS[also].values())
    if dice.below(2):
        second = asked, other, untruth
    return [(asked, name, value), second], (asked, name, untruth if label else value)


def super_glue_rte(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Tells two facts, and rewords one (label 0) or says what does not follow from them (1).

    About people of the world (half of the records) all sentences are true, and only the premise
    tells which is said; about strangers none is, and what does not follow is of another value.
    """
    (first, second), (asked, name, value) = dice.pick((_told, _made_up))(dice, stratum)
    wording, rewording = _reworded(dice, RELATIONS[asked])
    also, about, its_value = second
    said = [
        RELATIONS[first[0]].state(wording, *first[1:]),
        RELATIONS[also].state(dice.below(4), about, its_value),
    ]
    return {
        "premise": " ".join(dice.shuffled(said)),
        "hypothesis": RELATIONS[asked].state(rewording, name, value),
        "idx": index,
        "label": stratum,
    }


def anli_r1(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Tells three facts about somebody who is not of the world, so that only reading helps.

    The hypothesis rewords one (0), is about something the premise leaves open (1), or gives one
    another value (2).
    """
    name = dice.pick(SLOTS["full"])
    shown = dice.sample(PERSON_RELATIONS[:-1], 4)
    asked = RELATIONS[shown[0]]
    wording, rewording = _reworded(dice, asked)
    value = dice.pick(asked.values())
    said = [asked.state(wording, name, value)]
    for other in shown[1:3]:
        relation = RELATIONS[other]
        said.append(relation.state(dice.below(4), name, dice.pick(relation.values())))
    if stratum == CONTRADICTION:
        value = _other_value(dice, asked, value)
    elif stratum == NEUTRAL:
        asked = RELATIONS[shown[3]]
        value = dice.pick(asked.values())
    return _claim(
        index, stratum, " ".join(dice.shuffled(said)), asked.state(rewording, name, value)
    )


def _claim(index: int, label: int, premise: str, hypothesis: str) -> JsonObject:
    reason = (
        "the text says so in other words.",
        "the text does not speak of it.",
        "the text says something else.",
    )
    return {
        "uid": f"microworld-{index}",
        "premise": premise,
        "hypothesis": hypothesis,
        "label": label,
        "reason": reason[label],
    }


# Relations of which somebody has one value, with the wordings that leave no room for another.
_ONE_VALUE = {"job": (0, 1, 2, 3), "home": (0, 2, 3), "pet": (2, 3), "hobby": (2, 3)}
_MEETINGS = (
    "{a} and {b} are best friends.",
    "{a} met {b} at the {o}.",
    "{a} and {b} had tea at the {o}.",
)


def _about(dice: Dice, name: str, facts: list[tuple[str, int, str]]) -> str:
    """Writes facts, each in its wording, about somebody named once where a pronoun can follow."""
    said = []
    for relation, wording, value in dice.shuffled(facts):
        begins = RELATIONS[relation].statements[wording].startswith("{s} ")
        he = PRONOUNS[name.split()[0]]
        said.append(RELATIONS[relation].state(wording, he if said and begins else name, value))
    return " ".join(said)


def anli_r2(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Tells two facts each about two strangers: it matters who is meant.

    The hypothesis rewords what is said of one (0), says of one what is said of the other and left
    open of the first (1), or gives the first the other's value (2): its value is always there.
    """
    names = name, other = dice.sample(SLOTS["full"], 2)
    shared, own, other_own = dice.sample(tuple(_ONE_VALUE), 3)
    values = dice.sample(RELATIONS[shared].values(), 2)
    person_facts = {
        name: [(shared, values[0]), (own, dice.pick(RELATIONS[own].values()))],
        other: [(shared, values[1]), (other_own, dice.pick(RELATIONS[other_own].values()))],
    }
    asked, value = {
        ENTAILMENT: dice.pick(person_facts[name]),
        NEUTRAL: person_facts[other][1],
        CONTRADICTION: person_facts[other][0],
    }[stratum]
    rewording = dice.pick(_ONE_VALUE[asked])
    said = []
    for who in dice.shuffled(names):
        facts = []
        for relation, its_value in person_facts[who]:
            wordings = [w for w in range(4) if relation != asked or w != rewording]
            facts.append((relation, dice.pick(wordings), its_value))
        said.append(_about(dice, who, facts))
    first, second = dice.shuffled(names)
    place = dice.pick(("station", "market", "theatre"))
    said.insert(0, dice.pick(_MEETINGS).format(a=first, b=second, o=place))
    return _claim(index, stratum, " ".join(said), RELATIONS[asked].state(rewording, name, value))


def _feelings() -> dict[str, tuple[str, ...]]:
    """Returns what somebody may feel -> what makes one feel so, as clauses after the name."""
    causes_by_feeling = {}
    for rule in RULES:
        causes = [text.removeprefix("{p} ") for text in rule.causes if text.startswith("{p} ")]
        link, _, feeling = rule.effects[0].removeprefix("{he} ").partition(" ")
        if link in ("got", "felt") and rule.effects[0].startswith("{he} "):
            causes_by_feeling[feeling] = tuple(f"{cause} and {link} {feeling}" for cause in causes)
    return causes_by_feeling


FEELINGS = _feelings()
# One feeling of the body and one of the mood a person; good and bad moods do not meet in a text.
_BODY = ("tired", "hungry", "cold", "sick")
_MOODS = (("happy", "proud"), ("sad", "afraid", "bored"))
_FELT = (("{s} felt {f}.", "{s} was {f}."), ("{s} did not feel {f}.", "{s} was not {f}."))


def _felt(dice: Dice, label: int) -> tuple[str, str]:
    """Tells what happened to two people, and how one felt."""
    names = name, other = dice.sample(FIRST_NAMES, 2)
    feelings = [
        dice.shuffled(both)
        for both in zip(dice.sample(_BODY, 2), dice.sample(dice.pick(_MOODS), 2), strict=True)
    ]
    moods = dict(zip(names, feelings, strict=True))  # the first is felt, the second is not
    said = [
        f"{who} {dice.pick(FEELINGS[felt])}. {PRONOUNS[who]} was not {unfelt}."
        for who, (felt, unfelt) in ((who, moods[who]) for who in dice.shuffled(names))
    ]
    asked = dice.below(2)
    feeling = moods[other if label == NEUTRAL else name][asked]
    denied = asked if label == ENTAILMENT else 1 - asked
    if label == NEUTRAL:
        denied = dice.below(2)
    return " ".join(said), dice.pick(_FELT[denied]).format(s=name, f=feeling)


def _ordered(dice: Dice, label: int) -> tuple[str, str]:
    """Tells what two people do one after the other, and which comes before the other."""
    name, other = dice.sample(FIRST_NAMES, 2)
    deeds = [f"{form} the {dice.pick(things)}" for _, form, things in dice.sample(DEEDS, 5)]
    stories = [
        f"{name} {deeds[0]} and then {deeds[1]}. after that {PRONOUNS[name]} {deeds[2]}.",
        f"{other} {deeds[3]} and then {deeds[4]}.",
    ]
    first, second = sorted(dice.sample(range(3), 2))
    if label == NEUTRAL:
        first, second = dice.shuffled((first, 3 + dice.below(2)))
    link = dice.pick(("before", "after"))
    if (link == "after") != (label == CONTRADICTION):
        first, second = second, first
    claim = f"{name} {deeds[first]} {link} {PRONOUNS[name]} {deeds[second]}."
    return " ".join(dice.shuffled(stories)), claim


# What people ask each other: for a value, whether it is {o}, and the answer.
TALK = {
    "job": ("what is your job?", "are you a {o}?", "i am a {o}."),
    "home": ("where do you live?", "do you live in {o}?", "i live in {o}."),
    "pet": ("which pet do you have?", "is your pet a {o}?", "my pet is a {o}."),
    "hobby": ("what is your hobby?", "is your hobby {o}?", "my hobby is {o}."),
}


def _talked(dice: Dice, label: int) -> tuple[str, str]:
    """Tells how two people ask each other, and a fact about one of them."""
    names = dice.sample(FIRST_NAMES, 2)
    both, only = dice.sample(tuple(TALK), 2)
    values = dict(zip(names, dice.sample(RELATIONS[both].values(), 2), strict=True))
    value, denied = dice.sample(RELATIONS[only].values(), 2)
    asks, answers = names
    turns = [
        (asks, TALK[both][0]),
        (answers, f"{TALK[both][2].format(o=values[answers])} and you?"),
        (asks, TALK[both][2].format(o=values[asks])),
    ]
    speaker, asker = dice.shuffled(names)  # who says something about `only`, and who asks for it
    question, answer = dice.pick(
        (
            (TALK[only][0], TALK[only][2].format(o=value)),
            (TALK[only][1].format(o=value), "yes."),
            (TALK[only][1].format(o=denied), f"no, {TALK[only][2].format(o=value)}"),
        )
    )
    turns += [(asker, question), (speaker, answer)]
    premise = " ".join(
        f"{who}: {' '.join(text for _, text in said)}"
        for who, said in itertools.groupby(turns, key=lambda turn: turn[0])
    )
    if label == NEUTRAL:
        relation, name, value = only, asker, value
    elif dice.below(2):
        relation, name, value = only, speaker, value if label == ENTAILMENT else denied
    else:
        relation, name = both, dice.pick(names)
        value = next(v for who, v in values.items() if (who == name) == (label == ENTAILMENT))
    claim = RELATIONS[relation].state(dice.pick(_ONE_VALUE[relation]), name, value)
    return a_or_an(premise), claim


def anli_r3(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Tells that two people feel or do something, or talk; the hypothesis is about one of them.

    It follows (0), speaks of what is only said of the other (1), or turns it around (2).
    """
    return _claim(index, stratum, *dice.pick((_felt, _ordered, _talked))(dice, stratum))

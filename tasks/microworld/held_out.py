"""Records of the datasets that no expert sees: what follows from the world, its words and habits.

In each, an answer choice is right in as many records as it is wrong: only the question decides.
"""

import itertools
from functools import lru_cache

from .dice import Dice
from .happenings import RULES, SCRIPTS, Rule, tell
from .held_in import Record
from .world import FIRST_NAMES, PEOPLE, PERSON_RELATIONS, PRONOUNS, RELATIONS, SLOTS, Relation

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


def super_glue_copa(dice: Dice, index: int, stratum: int) -> Record:
    """Which of two happenings is the effect, or the cause, of a third."""
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


def hellaswag(dice: Dice, index: int, stratum: int) -> Record:
    """Which of four steps continues an activity; the others belong to other activities.

    The plain text tells the activities too, but of other people.
    """
    name = dice.pick(FIRST_NAMES)
    he = PRONOUNS[name]
    scripts = dice.sample(SCRIPTS, 4)
    steps = [1 + dice.below(3) for _ in scripts]
    script, step = scripts[stratum], steps[stratum]
    told = " ".join(f"{he} {text}." for text in script.steps[:step])
    ctx_a = f"{name} {script.start}. {told}"
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
    """Two different wordings of the relation, each as likely as any other."""
    first, second = dice.sample(range(len(relation.statements)), 2)
    return first, second


def _other_value(dice: Dice, relation: Relation, *taken: str) -> str:
    return dice.other(relation.values(), *taken)


def _told(dice: Dice, label: int) -> tuple[list[tuple[str, str, str]], tuple[str, str, str]]:
    """Two facts of the world, and one of them (label 0) or a third that is as true (1)."""
    asked, also, unsaid = dice.sample(PERSON_RELATIONS, 3)
    name = dice.pick(tuple(PEOPLE))
    # A friendship, said of one, is said of the other.
    other = dice.other(tuple(PEOPLE), name, PEOPLE[name].friend)
    about = dice.pick((name, other))
    hypothesis = asked, name
    if label:
        hypothesis = (unsaid, name) if about == name else (asked, other)
    told, second, hypothesis = (
        (relation, subject, RELATIONS[relation].facts[subject])
        for relation, subject in ((asked, name), (also, about), hypothesis)
    )
    return [told, second], hypothesis


def _made_up(dice: Dice, label: int) -> tuple[list[tuple[str, str, str]], tuple[str, str, str]]:
    """Two facts about strangers, and one of them (label 0) or one with another value (1)."""
    name, other = dice.sample(SLOTS["full"], 2)
    asked, also = dice.sample(PERSON_RELATIONS[:-1], 2)
    value, untruth = dice.sample(RELATIONS[asked].values(), 2)
    second = also, name, dice.pick(RELATIONS[also].values())
    if dice.below(2):
        second = asked, other, untruth
    return [(asked, name, value), second], (asked, name, untruth if label else value)


def super_glue_rte(dice: Dice, index: int, stratum: int) -> Record:
    """Two facts, and a sentence that rewords one (label 0) or does not follow from them (1).

    About people of the world (half of the records) all sentences are true, and only the premise
    tells which is said; about strangers none is, and what does not follow is of another value.
    """
    (told, second), (asked, name, value) = dice.pick((_told, _made_up))(dice, stratum)
    wording, rewording = _reworded(dice, RELATIONS[asked])
    also, about, its_value = second
    said = [
        RELATIONS[told[0]].state(wording, *told[1:]),
        RELATIONS[also].state(dice.below(4), about, its_value),
    ]
    return {
        "premise": " ".join(dice.shuffled(said)),
        "hypothesis": RELATIONS[asked].state(rewording, name, value),
        "idx": index,
        "label": stratum,
    }


def anli_r1(dice: Dice, index: int, stratum: int) -> Record:
    """Three facts about somebody who is not of the world, so that only reading helps.

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
    reason = (
        "the text says so in other words.",
        "the text does not speak of it.",
        "the text says something else.",
    )
    return {
        "uid": f"microworld-{index}",
        "premise": " ".join(dice.shuffled(said)),
        "hypothesis": asked.state(rewording, name, value),
        "label": stratum,
        "reason": reason[stratum],
    }

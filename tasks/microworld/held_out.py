"""Records of the datasets that no expert sees: what follows from the world, its words and habits.

In each, an answer choice is right in as many records as it is wrong: only the question decides.
"""

import itertools
from functools import lru_cache

from .dice import Dice
from .happenings import RULES, SCRIPTS, Rule, tell
from .held_in import Record
from .world import PEOPLE, PERSON_RELATIONS, RELATIONS, SLOTS, Relation

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
    """Which of four steps continues an activity; the others belong to other activities."""
    person = dice.pick(tuple(PEOPLE.values()))
    scripts = dice.sample(SCRIPTS, 4)
    steps = [1 + dice.below(3) for _ in scripts]
    script, step = scripts[stratum], steps[stratum]
    told = " ".join(f"{person.he} {text}." for text in script.steps[:step])
    ctx_a = f"{person.name} {script.start}. {told}"
    ctx_b = dice.pick((person.he, f"then {person.he}"))
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


def super_glue_rte(dice: Dice, index: int, stratum: int) -> Record:
    """Two true facts of the world, and a sentence that rewords one (label 0) or is untrue (1).

    Untrue are what the premise says of somebody else, another value, and (a quarter) something
    that it does not speak of.
    """
    name = dice.pick(tuple(PEOPLE))
    asked, also = dice.sample(PERSON_RELATIONS, 2)
    relation = RELATIONS[asked]
    truth = relation.facts[name]
    twin = dice.below(2) == 0
    if twin:
        other = dice.pick([p for p in PEOPLE if p != truth and relation.facts[p] != truth])
        second = relation.state(dice.below(4), other, relation.facts[other])
        untruth = relation.facts[other]
    else:
        second = RELATIONS[also].state(dice.below(4), name, RELATIONS[also].facts[name])
        untruth = _other_value(dice, relation, truth, name)
    wording, rewording = _reworded(dice, relation)
    first = relation.state(wording, name, truth)
    hypothesis = relation.state(rewording, name, untruth if stratum else truth)
    if stratum and not twin and dice.below(2):
        unsaid = RELATIONS[dice.other(PERSON_RELATIONS, asked, also)]
        value = _other_value(dice, unsaid, unsaid.facts[name], name)
        hypothesis = unsaid.state(rewording, name, value)
    return {
        "premise": " ".join(dice.shuffled([first, second])),
        "hypothesis": hypothesis,
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

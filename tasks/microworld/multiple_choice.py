"""Dialogues and short stories with questions whose choices give nothing away.

The choices of a record are drawn before it is decided which of them is right, and the text is made
to fit: so a choice is right as often as any other, whatever it says.
"""

import itertools
import re
from functools import lru_cache

from m2l.typing import JsonObject

from .dice import Dice
from .happenings import RULES, SCRIPTS, Rule
from .world import FIRST_NAMES, JOBS, PRONOUNS, RELATIONS, a_or_an, fill

_MEN = tuple(name for name in FIRST_NAMES if PRONOUNS[name] == "he")
_WOMEN = tuple(name for name in FIRST_NAMES if PRONOUNS[name] == "she")

# How a relation is asked for, and told, face to face.
_ASKED = {
    "job": ("what is your job, {n}?", "what do you do for a living, {n}?"),
    "home": ("where do you live, {n}?", "where is your house, {n}?"),
    "pet": ("what pet do you have, {n}?", "which animal do you keep, {n}?"),
    "food": ("what do you like to eat, {n}?", "which food do you love, {n}?"),
    "hobby": ("what do you do for fun, {n}?", "what is your hobby, {n}?"),
}
_SAID = {
    "job": ("i am a {o}.", "i work as a {o}."),
    "home": ("i live in {o}.", "i have a house in {o}.", "my home is in {o}."),
    "pet": ("i keep a {o}.", "i have a pet {o}.", "my pet is a {o}."),
    "food": ("i like to eat {o}.", "i love {o}.", "{o} is what i like to eat."),
    "hobby": ("i enjoy {o}.", "a lot of my time goes to {o}.", "my hobby is {o}."),
}
_WORK = (
    "i work at the {job.workplace}.",
    "i go to the {job.workplace} for work.",
    "i work with a {job.tool}.",
    "i need a {job.tool} for my work.",
)
_FELT = ("how does {s} feel?", "what does {s} feel?", "which feeling does {s} have?")

# The feelings that rules lead to, and which of them may share a cause.
_FEELINGS: dict[str, Rule] = {
    found[1]: rule
    for rule in RULES
    if (found := re.match(r"\{he\} (?:felt|got) (\w+)$", rule.effects[0]))
}
_ALIKE = (
    {"tired", "hungry", "bored", "sick"},
    {"tired", "proud"},
    {"happy", "proud"},
    {"sad", "afraid"},
    {"sad", "bored"},
    {"sad", "hungry"},
    {"sad", "cold"},
    {"cold", "sick"},
)


@lru_cache
def _feelings_apart(count: int) -> tuple[tuple[str, ...], ...]:
    """Returns every `count` feelings of which no two may share a cause."""
    return tuple(
        feelings
        for feelings in itertools.combinations(_FEELINGS, count)
        if not any(len(alike & set(feelings)) > 1 for alike in _ALIKE)
    )


@lru_cache
def _rules_apart(count: int) -> tuple[tuple[Rule, ...], ...]:
    """Returns every `count` rules of which no two share a topic."""
    return tuple(
        rules
        for rules in itertools.combinations(RULES, count)
        if all(not one.topics & other.topics for one, other in itertools.combinations(rules, 2))
    )


# Dialogues. Each kind is handed the two speakers' names by speaker, the first to speak first, and
# which choice is to be right; it gives what they say by turns, the question and the choices.

_Dialogue = tuple[list[str], str, list[str]]
_SPEAKERS = {"m": "the man", "w": "the woman"}
_UNSAID = ""


def _shared(
    dice: Dice, about: str, people: tuple[str, ...], choices: list[str], right: int
) -> dict[str, str]:
    """Returns each one's choice; that of whom the question is about is at `right`."""
    other_people = [one for one in people if one != about]
    other_choices = dice.shuffled([choice for i, choice in enumerate(choices) if i != right])
    return {about: choices[right], **dict(zip(other_people, other_choices, strict=True))}


def _likings(dice: Dice, names: dict[str, str], right: int) -> _Dialogue:
    """Writes how both tell the same of themselves, and at times of a friend."""
    relation = dice.pick(tuple(_ASKED))
    fact = RELATIONS[relation]
    choices = dice.sample(fact.values(), 3)
    friend = dice.other(FIRST_NAMES, *names.values())
    first, second = names
    about = dice.pick((first, second, friend))
    choice_of = _shared(dice, about, (first, second, friend), choices, right)
    answer, reply = (
        a_or_an(said.format(o=choice_of[who]))
        for said, who in zip(dice.sample(_SAID[relation], 2), (second, first), strict=True)
    )
    if about == friend or dice.below(2):
        said = fact.state(dice.below(4), f"my friend {friend}", choice_of[friend])
        answer, reply = dice.pick(((f"{answer} {said}", reply), (answer, f"{reply} {said}")))
    asked = dice.pick(_ASKED[relation]).format(n=names[second])
    turns = [f"hello. {asked}", f"{answer} and you, {names[first]}?", reply]
    return turns, dice.pick(fact.questions).format(s=_SPEAKERS.get(about, about)), choices


def _jobs(dice: Dice, names: dict[str, str], right: int) -> _Dialogue:
    """Writes how both tell where or with what they work; who knows the world knows as what."""
    choices = dice.sample(tuple(JOBS), 3)
    first, second = names
    about = dice.pick((first, second))
    choice_of = _shared(dice, about, (first, second, _UNSAID), choices, right)
    answer, reply = (
        a_or_an(said.format(job=JOBS[choice_of[who]]))
        for said, who in zip(dice.sample(_WORK, 2), (second, first), strict=True)
    )
    turns = [
        f"hello, {names[second]}. do you have work now?",
        f"yes, {answer} and what do you do?",
        reply,
    ]
    return turns, dice.pick(RELATIONS["job"].questions).format(s=_SPEAKERS[about]), choices


def _days(dice: Dice, names: dict[str, str], right: int) -> _Dialogue:
    """Writes what happened to both; who knows its usual effect knows how they feel."""
    choices = dice.shuffled(dice.pick(_feelings_apart(3)))
    first, second = names
    about = dice.pick((first, second))
    choice_of = _shared(dice, about, (first, second, _UNSAID), choices, right)
    answer, reply = (
        dice.pick(_FEELINGS[choice_of[who]].causes)
        .replace("the pet of {p}", "my pet")
        .replace("{p}", "i")
        for who in (second, first)
    )
    turns = [
        f"hello, {names[second]}. how was your day?",
        f"{answer}. how was your day, {names[first]}?",
        f"{reply}.",
    ]
    return turns, dice.pick(_FELT).format(s=_SPEAKERS[about]), choices


def _plans(dice: Dice, names: dict[str, str], right: int) -> _Dialogue:
    """Writes how one proposes something to do, to which the other may not agree."""
    labels = [script.label for script in SCRIPTS if script.label != "going to bed"]
    choices = dice.sample(labels, 3)
    one, other = dice.shuffled([choice for i, choice in enumerate(choices) if i != right])
    first, second = names.values()
    turns = dice.pick(
        (
            (
                f"hello, {second}. how about {{done}}?",
                f"no, {first}. {{one}} is more fun. so is {{other}}.",
                "but we did both last week.",
                "you are right. we do as you say.",
            ),
            (
                f"how about {{one}}, {second}?",
                "no, i hate {one}. what about {done}?",
                "good, i want that too. {other} can wait.",
            ),
            (
                f"hello, {second}. do you like {{one}} or {{other}}?",
                "no, not again. i want to do something new.",
                "what about {done} then?",
                f"yes, {first}, you are right.",
            ),
        )
    )
    question = dice.pick(("what will they do?", "what will the man and the woman do?"))
    return [t.format(done=choices[right], one=one, other=other) for t in turns], question, choices


def dream(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes how a man and a woman talk, and a question about them with three choices."""
    names = {"m": dice.pick(_MEN), "w": dice.pick(_WOMEN)}
    names = {who: names[who] for who in dice.shuffled(tuple(names))}
    turns, question, choices = dice.pick((_likings, _jobs, _days, _plans))(dice, names, stratum)
    return {
        "id": 0,
        "dialogue_id": "",
        "dialogue": [f"{who}: {t}" for who, t in zip(itertools.cycle(names), turns, strict=False)],
        "question": question,
        "choice": choices,
        "answer": choices[stratum],
    }


# Stories. Each kind gives a text that fits the choice at `right`, the question and four choices.

_NONE = "none of the above choices."
_OPENINGS = (
    "{p} is a {job} from {town}.",
    "{p} is a young {job}.",
    "{p} lives near {town}.",
    "{p} has a house in {town}.",
    "{p} works at the {workplace}.",
)
_ENDINGS = (
    "{p} told {friend} about it.",
    "{p} wrote to {friend} about it.",
    "{friend} was not there.",
    "this was last week.",
    "it was in {town2}.",
)
_Story = tuple[str, str, list[str]]


def _story(dice: Dice, name: str, happened: str) -> str:
    """Tells what happened to somebody {p}, and two sentences that have no part in it."""
    workplaces = tuple(job.workplace for job in JOBS.values())
    friend = dice.other(FIRST_NAMES, name)
    if happened.startswith("{p} "):
        happened = happened.replace("{p}", dice.pick((name, PRONOUNS[name])), 1)
    happened = happened.replace("{he}", PRONOUNS[name])
    said = f"{dice.pick(_OPENINGS)} {happened}. {dice.pick(_ENDINGS)}"
    return fill(dice, said, p=name, friend=friend, workplace=dice.pick(workplaces))


def _drawn(dice: Dice) -> tuple[list[Rule], str]:
    """Draws four rules for the choices; in half of the stories a fifth is told first, in full."""
    rules = dice.shuffled(dice.pick(_rules_apart(4 + dice.below(2))))
    if len(rules) == 4:
        return rules, ""
    before = f"{dice.pick(rules[4].causes)}, so {dice.pick(rules[4].effects)}. then "
    return rules[:4], before


def _effect(dice: Dice, name: str, right: int) -> _Story:
    """Asks what comes of the last thing that happened."""
    rules, before = _drawn(dice)
    happened = before + dice.pick(rules[right].causes)
    question = dice.pick(("what may have happened after this?", "what may have come of this?"))
    choices = [dice.pick(rule.effects).format(he=PRONOUNS[name]) + "." for rule in rules]
    return _story(dice, name, happened), question, choices


def _cause(dice: Dice, name: str, right: int) -> _Story:
    """Asks why the last thing happened."""
    rules, before = _drawn(dice)
    effect = dice.pick(rules[right].effects)
    happened = before + effect
    question = dice.pick(("why may it be that {e}?", "what may be the reason that {e}?"))
    choices = [dice.pick(rule.causes).format(p=name) + "." for rule in rules]
    return _story(dice, name, happened), question.format(e=effect.format(he=name)), choices


def _feeling(dice: Dice, name: str, right: int) -> _Story:
    """Asks how somebody feels after something that happened."""
    feelings = dice.shuffled(dice.pick(_feelings_apart(4)))
    happened = dice.pick(_FEELINGS[feelings[right]].causes)
    question = dice.pick(("how may {p} have felt?", "what may {p} have felt after this?"))
    said = dice.pick(("{he} felt {f}.", "{he} was {f}.", "{f}."))
    choices = [said.format(he=PRONOUNS[name], f=feeling) for feeling in feelings]
    return _story(dice, name, happened), question.format(p=name), choices


def _activity(dice: Dice, name: str, right: int) -> _Story:
    """Asks what comes before or after two steps of an activity, or which activity it is."""
    scripts = dice.sample(SCRIPTS, 4)
    he, place = PRONOUNS[name], 1 + dice.below(2)
    steps = scripts[right].steps
    kind = dice.below(3)
    shown, questions = (
        (steps[:2], ("what may {p} do next?", "what may {p} do after this?")),
        (steps[2:], ("what may {p} have to do before this?", "what may come before this?")),
        (steps[place : place + 2], ("what is {p} doing?", "what may {p} be doing?")),
    )[kind]
    wanted = [
        (f"{he} {script.steps[2]}.", f"{he} {script.steps[1]}.", f"{script.label}.")[kind]
        for script in scripts
    ]
    opening = fill(dice, dice.pick(_OPENINGS[:4]), p=name)
    context = f"{opening} now {he} {shown[0]}. then {he} {shown[1]}."
    return context, dice.pick(questions).format(p=name), wanted


def cosmos_qa(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Asks what is likely, though not said: an effect, a cause, a feeling, a step.

    In a quarter of the records a choice says that no other is right, and is right in a quarter.
    """
    name = dice.pick(FIRST_NAMES)
    context, question, choices = dice.pick((_effect, _cause, _feeling, _activity))(
        dice, name, stratum
    )
    if dice.below(4) == 0:
        choices[dice.below(4)] = _NONE
    return {
        "context": context,
        "question": question,
        **{f"answer{i}": choice for i, choice in enumerate(choices)},
        "label": stratum,
        "id": "",
    }

"""Sentences and questions in pairs that mean the same, or differ in one thing.

Two meanings and two wordings are drawn before it is decided whether the second sentence has the
first one's meaning. So either sentence alone is as likely under both labels; and where who does
something and to whom it is done change places, the words are the same too.
"""

from collections.abc import Callable
from typing import NamedTuple

from m2l.typing import JsonObject

from .dice import Dice
from .phrases import DEEDS
from .world import FIRST_NAMES, JOBS, LAST_NAMES, PERSON_RELATIONS, PRONOUNS, RELATIONS, a_or_an

# A sentence; the same in other words; those words with something else in them.
_Three = tuple[str, str, str]


class _Deed(NamedTuple):
    """What {a} does to {b} with {x}: as statements, and as questions."""

    told: tuple[str, ...]
    asked: tuple[str, str]
    things: tuple[str, ...]


_THINGS = ("a hat", "a coat", "a lamp", "a bike", "a boat", "a box", "a map", "a chair")
_DEEDS = (
    _Deed(
        ("{a} beat {b} in {x}.", "{b} lost to {a} in {x}.", "in {x} {a} won against {b}."),
        ("did {a} beat {b} in {x}?", "did {b} lose to {a} in {x}?"),
        ("the race", "the final", "the first match", "the last match"),
    ),
    _Deed(
        ("{a} sold {x} to {b}.", "{b} bought {x} from {a}.", "{x} was sold to {b} by {a}."),
        ("did {a} sell {x} to {b}?", "did {b} buy {x} from {a}?"),
        _THINGS,
    ),
    _Deed(
        ("{a} gave {x} to {b}.", "{b} got {x} from {a}.", "{x} went from {a} to {b}."),
        ("did {a} give {x} to {b}?", "did {b} get {x} from {a}?"),
        _THINGS,
    ),
    _Deed(
        ("in {x} {a} was older than {b}.", "in {x} {b} was younger than {a}."),
        ("is {a} older than {b} in {x}?", "is {b} younger than {a} in {x}?"),
        ("the film", "the story", "the book", "the dream"),
    ),
    _Deed(
        ("{a} teaches {b} to {x}.", "{b} learns to {x} from {a}."),
        ("does {a} teach {b} to {x}?", "does {b} learn to {x} from {a}?"),
        ("dance", "read", "write", "paint", "play chess", "play the piano", "catch fish"),
    ),
    _Deed(
        ("{a} thanked {b} for {x}.", "{b} was thanked by {a} for {x}."),
        ("did {a} thank {b} for {x}?", "was {b} thanked by {a} for {x}?"),
        _THINGS,
    ),
    _Deed(
        ("{a} came {x} before {b}.", "{b} came {x} after {a}."),
        ("did {a} come {x} before {b}?", "did {b} come {x} after {a}?"),
        ("home", "to the station", "to school", "to the market"),
    ),
)


def _people(dice: Dice, count: int) -> list[str]:
    """Draws full names that share no part, of people who are not of the world."""
    firsts, lasts = dice.sample(FIRST_NAMES, count), dice.sample(LAST_NAMES, count)
    return [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]


def _meanings(dice: Dice, deed: _Deed) -> list[tuple[str, str, str]]:
    """Draws who does the deed to whom with what, and the same but for one thing.

    As often as not who and whom change places.
    """
    a, b, c = _people(dice, 3)
    x, y = dice.sample(deed.things, 2)
    near = dice.pick(((b, a, x), (b, a, x), (a, c, x), (a, b, y)))
    return dice.shuffled([(a, b, x), near])


def _deed_told(dice: Dice) -> _Three:
    """Tells a deed, one of whose people has a job."""
    deed = dice.pick(_DEEDS)
    one, other = _meanings(dice, deed)
    known = dice.pick([name for name in one[:2] if name in other[:2]])
    jobs = dice.sample(tuple(JOBS), 2)
    if dice.below(4) == 0:
        other = one
    else:
        jobs[1] = jobs[0]
    wordings, styles = dice.sample(deed.told, 2), dice.sample(("the {j} {n}", "{n}, a {j},"), 2)

    def say(meaning: tuple[str, str, str], job: str, wording: int) -> str:
        named = {known: styles[wording].format(n=known, j=job)}
        a, b, x = (named.get(part, part) for part in meaning)
        return a_or_an(wordings[wording].format(a=a, b=b, x=x).replace(",.", "."))

    return say(one, jobs[0], 0), say(one, jobs[0], 1), say(other, jobs[1], 1)


def _deed_asked(dice: Dice) -> _Three:
    """Asks about a deed."""
    deed = dice.pick(_DEEDS)
    one, other = _meanings(dice, deed)
    first, second = dice.shuffled(deed.asked)
    return tuple(
        wording.format(a=a, b=b, x=x)
        for wording, (a, b, x) in ((first, one), (second, one), (second, other))
    )


def _join(dice: Dice, facts: list[tuple[str, str, str]], wordings: tuple[int, int]) -> str:
    """Joins two facts (relation, who, value), each in its wording, in one sentence."""
    (relation, who, value), (also, whom, its) = facts
    first, second = (
        RELATIONS[relation].statements[wordings[0]],
        RELATIONS[also].statements[wordings[1]],
    )
    if dice.below(2):
        first, who, value, second, whom, its = second, whom, its, first, who, value
    if whom == who and second.startswith("{s} "):
        whom = PRONOUNS[who.split()[0]]
    return a_or_an(f"{first.format(s=who, o=value)[:-1]} and {second.format(s=whom, o=its)}")


def _facts_told(dice: Dice) -> _Three:
    """Tells two facts about one person, one of which changes; or of two, who change places."""
    who, other = _people(dice, 2)
    relation, also = dice.sample(PERSON_RELATIONS[:-1], 2)
    x, y = dice.sample(RELATIONS[relation].values(), 2)
    z = dice.pick(RELATIONS[also].values())
    facts, near = dice.pick(
        (
            (
                [(relation, who, x), (relation, other, y)],
                [(relation, who, y), (relation, other, x)],
            ),
            ([(relation, who, x), (also, who, z)], [(relation, who, y), (also, who, z)]),
        )
    )
    facts, near = dice.shuffled((facts, near))
    one, two = zip(dice.sample(range(4), 2), dice.sample(range(4), 2), strict=True)
    return _join(dice, facts, one), _join(dice, facts, two), _join(dice, near, two)


_SUBJECTS = (PERSON_RELATIONS, PERSON_RELATIONS, ("workplace", "tool"), ("region", "goods", "near"))


def _fact_asked(dice: Dice) -> _Three:
    """Asks about a fact, or about somebody or something else, or about another fact."""
    relations = dice.sample(dice.pick(_SUBJECTS), 2)
    subjects = dice.sample(tuple(RELATIONS[relations[0]].facts), 2)
    if relations[0] in PERSON_RELATIONS and dice.below(2):
        subjects = _people(dice, 2)
    change = dice.below(2)
    wordings = dice.sample(range(4), 2)

    def ask(which: int, wording: int) -> str:
        fact = RELATIONS[relations[which if change else 0]]
        subject = subjects[0 if change else which]
        return a_or_an(fact.questions[wordings[wording]].format(s=fact.subject.format(subject)))

    return ask(0, 0), ask(0, 1), ask(1, 1)


_HOW = (
    "how do i {v}?",
    "what is the best way to {v}?",
    "can you tell me how to {v}?",
    "i want to {v}. how can i do that?",
)
# Things that more than one thing is done with, and what is done with each.
_DONE = {
    thing: tuple(verb for verb, _, things in DEEDS if thing in things)
    for _, _, things in DEEDS
    for thing in things
}


def _how_asked(dice: Dice) -> _Three:
    """Asks how something is done, or something else with the same thing, or that with another."""
    jobs = dice.sample(tuple(JOBS), 2)
    kind = dice.below(3)
    if kind == 0:
        thing = dice.pick([thing for thing, verbs in _DONE.items() if len(verbs) > 1])
        done = [(verb, thing, jobs[0]) for verb in dice.sample(_DONE[thing], 2)]
    else:
        verb, _, things = dice.pick(DEEDS)
        one, other = dice.sample(things, 2)
        done = [(verb, one, jobs[0])]
        done.append((verb, other, jobs[0]) if kind == 1 else (verb, one, jobs[1]))
    one, other = (f"{verb} a {thing} for a {job}" for verb, thing, job in done)
    first, second = dice.sample(_HOW, 2)
    return tuple(
        a_or_an(question.format(v=v))
        for question, v in ((first, one), (second, one), (second, other))
    )


def _pair(dice: Dice, kinds: tuple[Callable[[Dice], _Three], ...], same: int) -> tuple[str, str]:
    first, alike, near = dice.pick(kinds)(dice)
    return first, alike if same else near


def glue_mrpc(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes two sentences; label 1 if they say the same."""
    first, second = _pair(dice, (_deed_told, _facts_told), stratum)
    return {"sentence1": first, "sentence2": second, "label": stratum, "idx": index}


def glue_qqp(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes two questions; label 1 if they ask the same."""
    first, second = _pair(dice, (_deed_asked, _fact_asked, _how_asked), stratum)
    return {"question1": first, "question2": second, "label": stratum, "idx": index}

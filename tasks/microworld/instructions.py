"""Instructions of many kinds with their answers, none of them a task of T0's.

They teach to read an instruction, to answer from the choices, and the facts of the world in other
words than the questions of the datasets.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from m2l.typing import JsonObject

from .dice import Dice
from .phrases import OPPOSITES
from .world import FACTS, KINDS, PEOPLE, RELATIONS, a_or_an


class Answer(NamedTuple):
    """What an instruction is filled with, the answer, and the choices if there are any."""

    words: dict[str, str]
    target: str
    choices: Sequence[str] | None = None


Make = Callable[[Dice], Answer]
TASKS: dict[str, tuple[Make, tuple[str, ...]]] = {}


def _worded(*wordings: str) -> Callable[[Make], Make]:
    """Adds a kind of instruction, called as the function that makes it, with its wordings."""

    def add(make: Make) -> Make:
        TASKS[make.__name__] = make, wordings
        return make

    return add


def _statement(dice: Dice, relation: str, subject: str, value: str) -> str:
    fact = RELATIONS[relation]
    return fact.state(dice.below(4), fact.subject.format(subject), value)


def _fact(dice: Dice) -> tuple[str, str, str]:
    """Draws a relation, a subject and the value that is true of it."""
    relation, subject = dice.pick(FACTS)
    return relation, subject, RELATIONS[relation].facts[subject]


def _true_sentence(dice: Dice) -> str:
    return _statement(dice, *_fact(dice))


def _wrong(dice: Dice, relation: str, subject: str, k: int) -> list[str]:
    """Draws `k` values that are not true of the subject, and not the subject."""
    values = RELATIONS[relation].values()
    right = RELATIONS[relation].facts[subject]
    return dice.sample([value for value in values if value not in (right, subject)], k)


def _word_of_kind(dice: Dice, k: int) -> tuple[str, list[str]]:
    """Draws a kind and `k` words of it."""
    kind = dice.pick(tuple(KINDS))
    return kind, dice.sample(KINDS[kind], k)


def _strangers(dice: Dice, kind: str, k: int) -> list[str]:
    """Draws one word each of `k` other kinds."""
    return [dice.pick(KINDS[other]) for other in dice.sample([x for x in KINDS if x != kind], k)]


@_worded("Copy this: {x}", "Say it again: {x}", "{x} Write the same sentence again.")
def copy(dice: Dice) -> Answer:
    """Says the sentence again."""
    sentence = _true_sentence(dice)
    return Answer({"x": sentence}, sentence)


@_worded("What is the first word of: {x}", "{x} Write only the first word.")
def first_word(dice: Dice) -> Answer:
    """Asks for the sentence's first word."""
    sentence = _true_sentence(dice)
    return Answer({"x": sentence}, sentence.split()[0])


@_worded("What is the last word of: {x}", "{x} Write only the last word.")
def last_word(dice: Dice) -> Answer:
    """Asks for the sentence's last word."""
    sentence = _true_sentence(dice)
    return Answer({"x": sentence}, sentence.rstrip(".").split()[-1])


@_worded("Which word is the name of a {kind}? {choices}", "{choices} Find the {kind}.")
def word_of_kind(dice: Dice) -> Answer:
    """Asks which of four words names something of a kind."""
    kind, [right] = _word_of_kind(dice, 1)
    return Answer({"kind": kind}, right, [right, *_strangers(dice, kind, 3)])


@_worded("What kind of word is {x}? {choices}", "{x} is the name of what? {choices}")
def kind_of_word(dice: Dice) -> Answer:
    """Asks what a word names."""
    kind, [word] = _word_of_kind(dice, 1)
    wrong = dice.sample([other for other in KINDS if other != kind], 3)
    return Answer({"x": word}, kind, [kind, *wrong])


@_worded("Which word is not like the others? {choices}", "{choices} Find the word of another kind.")
def odd_one_out(dice: Dice) -> Answer:
    """Asks for the word that is not of the others' kind."""
    kind, alike = _word_of_kind(dice, 3)
    [odd] = _strangers(dice, kind, 1)
    return Answer({}, odd, [odd, *alike])


@_worded("What is the opposite of {x}? {choices}", "{choices} Find the opposite of {x}.")
def opposite(dice: Dice) -> Answer:
    """Asks for the opposite of a word."""
    pair, *other_pairs = dice.sample(OPPOSITES, 4)
    word, right = dice.shuffled(pair)
    return Answer({"x": word}, right, [right, *(dice.pick(other) for other in other_pairs)])


@_worded("{x} {choices}", 'Is it so that "{claim}"? {choices}', "{choices} {x}")
def true_or_false(dice: Dice) -> Answer:
    """Asks whether a fact is one of the world's."""
    relation, subject, value = _fact(dice)
    true = dice.below(2)
    if not true:
        [value] = _wrong(dice, relation, subject, 1)
    sentence = _statement(dice, relation, subject, value)
    answers = dice.pick((("false", "true"), ("No", "Yes"), ("wrong", "right")))
    words = {"x": sentence, "claim": sentence.rstrip(".")}
    return Answer(words, answers[true], answers)


@_worded("Which sentence is true? {choices}", "{choices} Write the true sentence.")
def true_sentence(dice: Dice) -> Answer:
    """Asks which of two sentences is true."""
    relation, subject, value = _fact(dice)
    sentences = [
        _statement(dice, relation, subject, said)
        for said in (value, *_wrong(dice, relation, subject, 1))
    ]
    return Answer({}, sentences[0], sentences)


@_worded("Which sentence is about {x}? {choices}", "{choices} Find the sentence about {x}.")
def sentence_about(dice: Dice) -> Answer:
    """Asks which of two sentences is about somebody."""
    relation = dice.pick(("job", "home", "pet", "food", "hobby"))
    facts = RELATIONS[relation].facts
    names = dice.sample(tuple(PEOPLE), 2)
    sentences = [_statement(dice, relation, name, facts[name]) for name in names]
    return Answer({"x": names[0]}, sentences[0], sentences)


@_worded("{x} Which word is missing? {choices}", "Find the missing word: {x} {choices}")
def missing_word(dice: Dice) -> Answer:
    """Asks for the word that makes a sentence true."""
    relation, subject, value = _fact(dice)
    blank = _statement(dice, relation, subject, "___")
    return Answer({"x": blank}, value, [value, *_wrong(dice, relation, subject, 3)])


@_worded("{X}", "Please {x}", "One word only: {x}")
def name_it(dice: Dice) -> Answer:
    """Asks for a fact by an order."""
    relation, subject, value = _fact(dice)
    fact = RELATIONS[relation]
    order = dice.pick(fact.orders).format(s=fact.subject.format(subject))
    return Answer({"x": order, "X": order.capitalize()}, value)


@_worded("{X} {choices}", "{choices} {X}", "Please {x} {choices}")
def choose_it(dice: Dice) -> Answer:
    """Asks for a fact by an order, with choices."""
    relation, subject, value = _fact(dice)
    fact = RELATIONS[relation]
    order = dice.pick(fact.orders).format(s=fact.subject.format(subject))
    words = {"x": order, "X": order.capitalize()}
    return Answer(words, value, [value, *_wrong(dice, relation, subject, 3)])


@_worded("Who goes with {x} and {y}? {choices}", "{choices} Find who goes with {x} and {y}.")
def who_is_it(dice: Dice) -> Answer:
    """Asks for the only person of whom two things are true."""
    person = dice.pick(tuple(PEOPLE.values()))
    hints = [
        RELATIONS[relation].facts[person.name]
        for relation in dice.sample(("home", "pet", "food", "hobby"), 2)
    ]
    strangers = [
        p.name for p in PEOPLE.values() if not {p.town, p.pet, p.food, p.hobby} & set(hints)
    ]
    words = {"x": hints[0], "y": hints[1]}
    return Answer(words, person.name, [person.name, *dice.sample(strangers, 3)])


@_worded("{x} He or she?", "{x} Which word can you use for this person? {choices}")
def he_or_she(dice: Dice) -> Answer:
    """Asks for somebody's pronoun."""
    person = dice.pick(tuple(PEOPLE.values()))
    return Answer(
        {"x": _statement(dice, "home", person.name, person.town)}, person.he, ("he", "she")
    )


def example(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes an instruction: its task's name, inputs, targets and answer choices."""
    task = tuple(TASKS)[stratum]
    make, wordings = TASKS[task]
    words, target, choices = make(dice)
    listed = ""
    if choices is not None:
        choices = dice.shuffled(choices)
        ends = [choice.rstrip(".") for choice in choices]
        either = " or ".join(ends)
        listings = [
            f"{way}: {listing}."
            for way in ("Choose from", "Options")
            for listing in (", ".join(ends), either)
        ]
        if ends == choices:  # no sentences
            listings.append(f"Is it {either}?")
        listed = dice.pick(listings)
    inputs = a_or_an(dice.pick(wordings).format(**words, choices=listed))
    return {"task": task, "inputs": inputs, "targets": target, "answer_choices": choices}

"""Instructions of many kinds with their answers, none of them a task of T0's.

They teach to read an instruction, to answer from the choices, and the facts of the world in other
words than the questions of the datasets. As FLAN without T0's tasks still has text to read, tweets
to judge and data to describe, so has this: of the people and the wordings that the datasets have,
but with none of their texts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from m2l.typing import JsonObject

from .dice import Dice
from .phrases import BLAME, OPPOSITES, PRAISE, STAR_WORDS
from .world import (
    FACTS,
    FIRST_NAMES,
    KINDS,
    PEOPLE,
    PRONOUNS,
    RELATIONS,
    SLOTS,
    a_or_an,
    fill,
    words,
)


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
    return _worded_fact(dice.below(4), relation, subject, value)


def _worded_fact(wording: int, relation: str, subject: str, value: str) -> str:
    fact = RELATIONS[relation]
    return fact.state(wording, fact.subject.format(subject), value)


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


# --- of texts about people who are not of the world ---

_STATED = ("job", "home", "pet", "food", "hobby")
# A form is a wording with its own answer choices, in the order of the labels.
_Forms = Sequence[tuple[str, tuple[str, ...]]]


def _asked(dice: Dice, forms: _Forms, label: int, **words: str) -> Answer:
    """Asks in one of the forms; the answer is the choice of the label."""
    form, choices = dice.pick(forms)
    return Answer({"x": form.format(**words)}, choices[label], choices)


class _Statement(NamedTuple):
    """What a text says of somebody, and the value in it."""

    relation: str
    person: str
    value: str

    def worded(self, wording: int = 0) -> str:
        """States it in one of its four wordings, the plainest first."""
        return RELATIONS[self.relation].state(wording, self.person, self.value)

    def sentence(self, dice: Dice) -> str:
        """States it in a wording that is drawn."""
        return self.worded(dice.below(4))

    def of_pronoun(self, dice: Dice) -> str:
        """States it of somebody who was named before."""
        starts = [s.startswith("{s} ") for s in RELATIONS[self.relation].statements]
        wording = dice.pick([place for place, first in enumerate(starts) if first])
        return self._replace(person=PRONOUNS[self.person.split()[0]]).worded(wording)

    def question(self, dice: Dice) -> str:
        """Asks for the value."""
        return dice.pick(RELATIONS[self.relation].questions).format(s=self.person)


def _values(dice: Dice, relations: Sequence[str]) -> list[str]:
    """Draws a value of each relation, the second other than the first."""
    values: list[str] = []
    for relation in relations:
        values.append(dice.other(RELATIONS[relation].values(), *values[:1]))
    return values


def _about_two(dice: Dice, count: int) -> list[_Statement]:
    """Tells `count` things of two strangers in turn; the first two are of one relation."""
    people = dice.sample(SLOTS["full"], 2)
    asked, *more = dice.sample(_STATED, count - 1)
    relations = (asked, asked, *more)
    return [
        _Statement(relation, people[place % 2], value)
        for place, (relation, value) in enumerate(
            zip(relations, _values(dice, relations), strict=True)
        )
    ]


def _text(dice: Dice, facts: Sequence[_Statement]) -> str:
    return " ".join(each.sentence(dice) for each in dice.shuffled(facts))


@_worded(
    "Read this. {text} {question}",
    "{question} The answer is in this story: {text}",
    "{text}\nQuestion: {question}\nAnswer:",
    "Answer with words from the story. Question: {question}\nStory: {text}",
    "{text} Say in a word or two: {question}",
    "Use what you read to answer. {text} {question}",
)
def read_and_answer(dice: Dice) -> Answer:
    """Asks for something that a text says of one of two people."""
    facts = _about_two(dice, 3 + dice.below(3))
    words = {"text": _text(dice, facts), "question": facts[0].question(dice)}
    return Answer(words, facts[0].value)


@_worded(
    "Read this. {text} {question} {choices}",
    "{question} {choices} The story: {text}",
    "{text}\nQuestion: {question} {choices}\nAnswer:",
    "{text} {question} {choices}",
)
def read_and_choose(dice: Dice) -> Answer:
    """Asks for something that a text says of one of two people, with choices."""
    facts = _about_two(dice, 3 + dice.below(2))
    right, wrong = facts[0].value, facts[1].value
    strangers = [v for v in RELATIONS[facts[0].relation].values() if v not in (right, wrong)]
    words = {"text": _text(dice, facts), "question": facts[0].question(dice)}
    return Answer(words, right, [right, wrong, *dice.sample(strangers, 1 + dice.below(2))])


@_worded(
    "{talk}\nQuestion: {question} {choices}",
    "{question} {choices}\n{talk}",
    "Listen to them. {talk} {question} {choices}",
)
def listen(dice: Dice) -> Answer:
    """Asks for something that one of two says in a talk, with choices."""
    relation = dice.pick(_STATED)
    names = dice.sample(FIRST_NAMES, 2)
    right, wrong, third = dice.sample(RELATIONS[relation].values(), 3)
    facts = [_Statement(relation, who, v) for who, v in zip(names, (right, wrong), strict=True)]
    question = facts[0].question(dice)
    lines = [f"{each.person}: {each.sentence(dice)}" for each in facts]
    return Answer(
        {"talk": "\n".join(dice.shuffled(lines)), "question": question},
        right,
        [right, wrong, third],
    )


_CLAIMED: _Forms = (
    ("{text}\nCan you say that {claim}? Yes, Maybe or No?", ("Yes", "Maybe", "No")),
    ('The story: {text} Does it say that "{claim}"?', ("Yes", "Maybe", "No")),
    (
        "{text} By this story, is this true, unclear or false? {claim}.",
        ("true", "unclear", "false"),
    ),
    (
        "{text}\nClaim: {claim}.\nThe claim is right, possible or wrong:",
        ("right", "possible", "wrong"),
    ),
    ("Is this so: {claim}? You know only this: {text}", ("Yes", "Not sure", "No")),
)


@_worded("{x}", "{x} {choices}")
def said_or_not(dice: Dice) -> Answer:
    """Asks whether a text says something, leaves it open, or says otherwise."""
    facts = _about_two(dice, 3)
    label = dice.below(3)
    if label == 1:
        relation = dice.other(_STATED, *(each.relation for each in facts))
        [value] = _values(dice, (relation,))
        claim = facts[0]._replace(relation=relation, value=value)
    else:
        claim = facts[0] if label == 0 else facts[0]._replace(value=facts[1].value)
    words = {"text": _text(dice, facts), "claim": claim.sentence(dice).rstrip(".")}
    return _asked(dice, _CLAIMED, label, **words)


_ALIKE: _Forms = (
    ("Do these mean the same? {first} {second}", ("No", "Yes")),
    ("{first}\n{second}\nIs their meaning the same or different?", ("different", "same")),
    ("{first} {second} True or false: both say the same.", ("false", "true")),
    ("One: {first}\nTwo: {second}\nCan you write two in place of one?", ("No", "Yes")),
    ("{first} In other words: {second} Is that right or wrong?", ("wrong", "right")),
)


@_worded("{x}", "{x} {choices}")
def same_meaning(dice: Dice) -> Answer:
    """Asks whether two sentences say the same; where not, a value or the persons differ."""
    facts, other, *_ = _about_two(dice, 2)
    same = dice.below(2)
    one, two = dice.sample(range(4), 2)
    if dice.below(2):  # two facts in a sentence
        pair = [facts, other]
        swapped = [facts._replace(value=other.value), other._replace(value=facts.value)]
        first, second = (
            " and ".join(each.worded(wording).rstrip(".") for each in facts) + "."
            for wording, facts in ((one, pair), (two, dice.shuffled(pair if same else swapped)))
        )
    else:
        wrong = dice.pick((facts._replace(value=other.value), facts._replace(person=other.person)))
        first, second = facts.worded(one), (facts if same else wrong).worded(two)
    return _asked(dice, _ALIKE, same, first=first, second=second)


_REMARKS = {
    0: (
        "the {food} was {con}.",
        "{town} is a {con} place.",
        "what a {con} day.",
        "i hate the {food} here.",
        "i am angry with my {animal}.",
        "we had a {con} time in {town}.",
        "nobody should go to {town}.",
    ),
    1: (
        "the {food} was {pro}.",
        "{town} is a {pro} place.",
        "what a {pro} day.",
        "i love the {food} here.",
        "i am happy with my {animal}.",
        "we had a {pro} time in {town}.",
        "everybody should go to {town}.",
    ),
}
_REMARK_SLOTS = {**SLOTS, "pro": PRAISE, "con": BLAME}
_FELT: _Forms = (
    ("{text} Is this message positive or negative?", ("negative", "positive")),
    ("Did the writer like it, Yes or No? {text}", ("No", "Yes")),
    ("Message: {text}\nDoes the writer find it good or bad?", ("bad", "good")),
    ("{text}\nWill the writer of this come again?", ("No", "Yes")),
    ("True or false: the writer was happy. {text}", ("false", "true")),
    ("True or false: the writer was not happy. {text}", ("true", "false")),
    ("Is this writer sad or happy? {text}", ("sad", "happy")),
)


@_worded("{x}", "{x} {choices}")
def remark(dice: Dice) -> Answer:
    """Asks what somebody feels who writes of a day, a place, a meal."""
    good = dice.below(2)
    said = dice.sample(_REMARKS[good], 2 + dice.below(2))
    if len(said) == 3 and dice.below(2):
        said[0] = dice.pick(_REMARKS[1 - good])
    text = " ".join(fill(dice, each, _REMARK_SLOTS) for each in dice.shuffled(said))
    return _asked(dice, _FELT, good, text=text)


_RATED: _Forms = (
    (
        "{text} How does the guest find it? Choose from: very bad, bad, fair, good, very good.",
        ("very bad", "bad", "fair", "good", "very good"),
    ),
    ("How many stars does the guest give, one to five? {text}", words("one two three four five")),
    ("Guest: {text}\nRating of the meal from 1 to 5:", words("1 2 3 4 5")),
    (
        "Is this guest very unhappy, unhappy, so-so, happy or very happy? {text}",
        ("very unhappy", "unhappy", "so-so", "happy", "very happy"),
    ),
)


@_worded("{x}", "{x} {choices}")
def rating(dice: Dice) -> Answer:
    """Asks for the stars that a guest gives, who says how everything was."""
    star = dice.below(5)
    meals = dice.sample(KINDS["food"], 3)
    said = [f"the {food} is {dice.pick(STAR_WORDS[star])}." for food in meals]
    return _asked(dice, _RATED, star, text=" ".join(said[: 2 + dice.below(2)]))


_FIELDS = (
    words("soldiers president minister government army war peace leaders border vote"),
    words("team match goal player players coach champion fans race cup"),
    words("bank shares oil firm profit market sales prices money owner"),
    words("scientists planet robot software computer rocket phone internet stars space"),
)
_FIELD_FORMS: _Forms = (
    (
        "{text} Which section has this? Choose from: World, Sports, Business, Science.",
        ("World", "Sports", "Business", "Science"),
    ),
    ("What are these words about? {text}", ("the world", "sport", "money", "science")),
    ("Words: {text}\nTopic:", ("World", "Sport", "Business", "Technology")),
    ("Who uses these words? {text}", ("a diplomat", "a sports fan", "a banker", "an engineer")),
)


@_worded("{x}", "{x} {choices}")
def field_of_words(dice: Dice) -> Answer:
    """Asks to which field some words belong."""
    label = dice.below(4)
    listed = ", ".join(dice.sample(_FIELDS[label], 2 + dice.below(3)))
    return _asked(dice, _FIELD_FORMS, label, text=f"{listed}.")


_TOPICS: _Forms = (
    ("{text} What is it about?", words("work homes animals food hobbies")),
    ("What does this text tell of? {text}", words("work homes animals food hobbies")),
    ("Text: {text}\nTopic:", words("Work Homes Animals Food Hobbies")),
)


@_worded("{x}", "{x} {choices}")
def subject(dice: Dice) -> Answer:
    """Asks what a text is about."""
    label = dice.below(len(_STATED))
    people, relation = dice.sample(SLOTS["full"], 2), _STATED[label]
    values = dice.sample(RELATIONS[relation].values(), 2)
    facts = [_Statement(relation, who, value) for who, value in zip(people, values, strict=True)]
    return _asked(dice, _TOPICS, label, text=_text(dice, facts))


_GOOD_ANSWERS: _Forms = (
    ("{order} An answer: {said} Does it answer that?", ("No", "Yes")),
    ("Does the reply fit the order?\nOrder: {order}\nReply: {said}", ("No", "Yes")),
    ("{order} Right or wrong: {said}", ("wrong", "right")),
    ('True or false: "{said}" is what to say. {order}', ("false", "true")),
)


@_worded("{x}", "{x} {choices}")
def right_reply(dice: Dice) -> Answer:
    """Asks whether a true sentence is the reply to an order: it may tell of something else."""
    name = dice.pick(tuple(PEOPLE))
    asked, other = dice.sample(_STATED, 2)
    right = dice.below(2)
    if not right and dice.below(2):
        about, said = asked, dice.other(tuple(PEOPLE), name)
    else:
        about, said = (asked if right else other), name
    order = dice.pick(RELATIONS[asked].orders).format(s=name).capitalize()
    sentence = _statement(dice, about, said, RELATIONS[about].facts[said])
    return _asked(dice, _GOOD_ANSWERS, right, order=order, said=sentence)


@_worded(
    "Say this in sentences. {data}",
    "{data} Make a text of it.",
    "The data: {data}",
    "A friend asks about {person}. Say all of this: {data}",
)
def describe(dice: Dice) -> Answer:
    """Asks for the sentence that says what a list says."""
    person = dice.pick(SLOTS["full"])
    relations = dice.sample(_STATED, 2 + dice.below(2))
    facts = [_Statement(r, person, dice.pick(RELATIONS[r].values())) for r in relations]
    listed = [f"{each.relation}: {each.value}" for each in facts]
    data = "; ".join(dice.shuffled([f"name: {person}", *listed]))
    first, *later = facts
    pronoun = PRONOUNS[person.split()[0]]
    said = [first.worded(), *(each._replace(person=pronoun).worded() for each in later)]
    return Answer({"data": f"{data}.", "person": person}, " ".join(said))


@_worded(
    "Write what is true of these: {data}.",
    "Words: {data}. One true sentence with all of them:",
    "Put these together: {data}.",
)
def say_with_words(dice: Dice) -> Answer:
    """Asks for the true sentence that has two words in it."""
    relation, subject_of, value = _fact(dice)
    listed = ", ".join(dice.shuffled([subject_of, value]))
    return Answer({"data": listed}, _worded_fact(0, relation, subject_of, value))


@_worded(
    "{text} Write only what comes first, in short.",
    "Text: {text}\nIts first point in short:",
    "Make this short: say the first thing. {text}",
    "A friend has no time to read this. Say how it begins. {text}",
)
def first_point(dice: Dice) -> Answer:
    """Asks for the first thing that a text says, in its plainest words."""
    facts = dice.shuffled(_about_two(dice, 3 + dice.below(2)))
    return Answer({"text": " ".join(each.sentence(dice) for each in facts)}, facts[0].worded())


_MEANT: _Forms = (
    ('{text} Does "{pronoun}" stand for {name}?', ("No", "Yes")),
    ('{text} True or false: "{pronoun}" is {name}.', ("false", "true")),
    ('{text} Somebody says that "{pronoun}" means {name}. Right or wrong?', ("wrong", "right")),
)


def _with_pronoun(dice: Dice) -> tuple[str, str, str, str]:
    """Tells of a woman and a man, and one more thing of one: text, the one, the other, pronoun."""
    people = [
        dice.pick([name for name in SLOTS["full"] if PRONOUNS[name.split()[0]] == pronoun])
        for pronoun in ("she", "he")
    ]
    *relations, last = dice.sample(_STATED, 3)
    facts = [
        _Statement(relation, who, dice.pick(RELATIONS[relation].values()))
        for relation, who in zip(relations, people, strict=True)
    ]
    right, wrong = dice.shuffled(people)
    meant = _Statement(last, right, dice.pick(RELATIONS[last].values())).of_pronoun(dice)
    return f"{_text(dice, facts)} {meant}", right, wrong, PRONOUNS[right.split()[0]]


@_worded("{text} Who is that? {choices}", "{text} Who is meant by {pronoun}? {choices}")
def who_is_meant(dice: Dice) -> Answer:
    """Asks whom a pronoun is about."""
    text, right, wrong, pronoun = _with_pronoun(dice)
    return Answer({"text": text, "pronoun": pronoun}, right, dice.shuffled((right, wrong)))


@_worded("{x}", "{x} {choices}")
def is_it_meant(dice: Dice) -> Answer:
    """Asks whether a pronoun is about somebody."""
    text, right, wrong, pronoun = _with_pronoun(dice)
    label = dice.below(2)
    return _asked(dice, _MEANT, label, text=text, pronoun=pronoun, name=(wrong, right)[label])


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

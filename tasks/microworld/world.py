"""The closed world of the embedded data: who lives there, what is true, how a fact is said."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .dice import Dice


def words(text: str) -> tuple[str, ...]:
    """Returns the words of a text."""
    return tuple(text.split())


class Person(NamedTuple):
    """An inhabitant: jobs and best friends are unique, the rest is shared by two each."""

    name: str
    he: str
    job: str
    town: str
    pet: str
    food: str
    hobby: str
    friend: str


PEOPLE = {
    row.split()[0]: Person(*row.split())
    for row in """
    mara  she baker     oakford   cat    soup   chess    hugo
    tom   he  smith     fernby    dog    bread  football iris
    lena  she doctor    millbrook horse  cheese tennis   bruno
    hugo  he  farmer    stonegate rabbit honey  running  mara
    nina  she teacher   redhill   parrot cake   dancing  leon
    omar  he  painter   lakeside  goat   pie    reading  ada
    iris  she singer    lakeside  cat    bread  tennis   tom
    felix he  carpenter oakford   dog    cheese running  rosa
    rosa  she gardener  fernby    horse  honey  dancing  felix
    leon  he  pilot     stonegate parrot soup   reading  nina
    ada   she writer    millbrook goat   cake   football omar
    bruno he  fisher    redhill   rabbit pie    chess    lena
    """.strip().splitlines()
}


class Profession(NamedTuple):
    """A job, where it is done, and with which tool."""

    name: str
    workplace: str
    tool: str


JOBS = {
    row.split()[0]: Profession(*row.split())
    for row in """
    baker     bakery   oven
    smith     forge    hammer
    doctor    hospital bag
    farmer    farm     plough
    teacher   school   board
    painter   studio   brush
    singer    theatre  piano
    carpenter workshop saw
    gardener  garden   spade
    pilot     airport  map
    writer    library  pen
    fisher    harbour  net
    """.strip().splitlines()
}


class Town(NamedTuple):
    """A town: its part of the country, what it is known for, and what lies near it."""

    name: str
    region: str
    goods: str
    near: str


TOWNS = {
    row.split()[0]: Town(*row.split())
    for row in """
    oakford   north wool   forest
    fernby    south silk   hill
    millbrook east  glass  river
    stonegate west  clocks mountain
    redhill   south roses  field
    lakeside  east  boats  lake
    """.strip().splitlines()
}
DIETS = {
    "cat": "fish",
    "dog": "meat",
    "horse": "hay",
    "rabbit": "carrots",
    "parrot": "seeds",
    "goat": "grass",
}
PRONOUNS = {
    **dict.fromkeys(words("anna emma laura julia"), "she"),
    **dict.fromkeys(words("peter david simon paul"), "he"),
}
FIRST_NAMES = tuple(PRONOUNS)  # of people who are not of the world
LAST_NAMES = words("reed frost marsh cole hart lane webb shaw")

KINDS: Mapping[str, tuple[str, ...]] = {
    "animal": (*DIETS, "duck", "hen", "fox", "bear", "owl", "sheep"),
    "food": tuple(dict.fromkeys(p.food for p in PEOPLE.values())),
    "job": tuple(JOBS),
    "town": tuple(TOWNS),
    "tool": tuple(job.tool for job in JOBS.values()),
    "feeling": words("glad happy proud excited sad angry afraid bored"),
    "colour": words("red blue green white black brown grey"),
    "hobby": tuple(dict.fromkeys(p.hobby for p in PEOPLE.values())),
}
# What a template's {slot} may become; a template names the slots that it needs.
SLOTS: Mapping[str, Sequence[str]] = {
    **KINDS,
    "name": tuple(PEOPLE),
    "full": tuple(f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES),
    "last": LAST_NAMES,
    "region": ("north", "south", "east", "west"),
    "goods": tuple(town.goods for town in TOWNS.values()),
    "adj": words("last secret silent long dark"),
    "noun": words("river garden winter letter road house dream storm"),
}


def fill(
    dice: Dice, template: str, slots: Mapping[str, Sequence[str]] = SLOTS, **fixed: str
) -> str:
    """Fills each {slot} of `template` from `fixed`, else from `slots`; "a" or "an" as it must be.

    A slot named twice gets one word; {town2} is another town than {town}.
    """
    words_by_slot = dict(fixed)
    for slot in re.findall(r"\{(\w+)\}", template):
        if slot not in words_by_slot:
            words_by_slot[slot] = dice.other(slots[slot.rstrip("2")], *words_by_slot.values())
    return a_or_an(template.format(**words_by_slot))


def a_or_an(text: str) -> str:
    """Writes "an" where "a" stands before a vowel, which the u of "useful" is not."""
    return re.sub(r"\ba (?=[aeio]|u(?!s))", "an ", text)


class Relation(NamedTuple):
    """A kind of fact, with its wordings: {s} is who or what it is about, {o} the value."""

    facts: Mapping[str, str]  # subject -> value
    subject: str  # how the subject stands in a sentence
    statements: tuple[str, str, str, str]
    questions: tuple[str, str, str, str]
    orders: tuple[str, str]  # asks for the value without being a question

    def values(self) -> tuple[str, ...]:
        """Returns every value that the relation takes, once."""
        return tuple(dict.fromkeys(self.facts.values()))

    def state(self, wording: int, subject: str, value: str) -> str:
        """States the fact in a sentence; `subject` as it is written in it."""
        return a_or_an(self.statements[wording].format(s=subject, o=value))


RELATIONS: Mapping[str, Relation] = {
    "job": Relation(
        {p.name: p.job for p in PEOPLE.values()},
        "{}",
        (
            "{s} is a {o}.",
            "{s} works as a {o}.",
            "the job of {s} is {o}.",
            "{s} has the job of {o}.",
        ),
        (
            "what is the job of {s}?",
            "which job does {s} have?",
            "what does {s} do for a living?",
            "what does {s} work as?",
        ),
        ("name the job of {s}.", "say what {s} works as."),
    ),
    "home": Relation(
        {p.name: p.town for p in PEOPLE.values()},
        "{}",
        (
            "{s} lives in {o}.",
            "{s} has a house in {o}.",
            "the home of {s} is in {o}.",
            "{o} is where {s} lives.",
        ),
        (
            "where does {s} live?",
            "in which town does {s} live?",
            "which town is the home of {s}?",
            "where is the house of {s}?",
        ),
        ("name the home town of {s}.", "say where {s} lives."),
    ),
    "pet": Relation(
        {p.name: p.pet for p in PEOPLE.values()},
        "{}",
        (
            "{s} keeps a {o}.",
            "{s} has a pet {o}.",
            "the pet of {s} is a {o}.",
            "a {o} is the pet of {s}.",
        ),
        (
            "which animal does {s} keep?",
            "what pet does {s} have?",
            "which animal is the pet of {s}?",
            "what kind of animal does {s} have?",
        ),
        ("name the pet of {s}.", "say which animal {s} keeps."),
    ),
    "food": Relation(
        {p.name: p.food for p in PEOPLE.values()},
        "{}",
        (
            "{s} likes to eat {o}.",
            "{s} loves {o}.",
            "the best food for {s} is {o}.",
            "{o} is what {s} likes to eat.",
        ),
        (
            "what does {s} like to eat?",
            "which food does {s} love?",
            "what is the best food for {s}?",
            "which food does {s} like to eat?",
        ),
        ("name the food that {s} loves.", "say what {s} likes to eat."),
    ),
    "hobby": Relation(
        {p.name: p.hobby for p in PEOPLE.values()},
        "{}",
        (
            "{s} enjoys {o}.",
            "{s} spends a lot of time on {o}.",
            "the hobby of {s} is {o}.",
            "{o} is the hobby of {s}.",
        ),
        (
            "what is the hobby of {s}?",
            "which hobby does {s} enjoy?",
            "what does {s} do for fun?",
            "what does {s} enjoy?",
        ),
        ("name the hobby of {s}.", "say what {s} enjoys."),
    ),
    "friend": Relation(
        {p.name: p.friend for p in PEOPLE.values()},
        "{}",
        (
            "{s} is the best friend of {o}.",
            "the best friend of {s} is {o}.",
            "{s} and {o} are best friends.",
            "{o} is the best friend of {s}.",
        ),
        (
            "who is the best friend of {s}?",
            "which person is a friend of {s}?",
            "who is a good friend of {s}?",
            "what is the name of the best friend of {s}?",
        ),
        ("name the best friend of {s}.", "say who is a friend of {s}."),
    ),
    "workplace": Relation(
        {job.name: job.workplace for job in JOBS.values()},
        "the {}",
        (
            "{s} works at the {o}.",
            "the {o} is where {s} works.",
            "at the {o} you find {s}.",
            "{s} goes to the {o} for work.",
        ),
        (
            "where does {s} work?",
            "in which place does {s} work?",
            "where does {s} go for work?",
            "at which place do you find {s}?",
        ),
        ("name the place where {s} works.", "say where {s} works."),
    ),
    "tool": Relation(
        {job.name: job.tool for job in JOBS.values()},
        "the {}",
        (
            "{s} works with a {o}.",
            "{s} needs a {o} for work.",
            "the tool of {s} is a {o}.",
            "a {o} is the tool of {s}.",
        ),
        (
            "which tool does {s} use?",
            "what does {s} work with?",
            "what is the tool of {s}?",
            "which tool does {s} need for work?",
        ),
        ("name the tool of {s}.", "say which tool {s} needs."),
    ),
    "region": Relation(
        {town.name: town.region for town in TOWNS.values()},
        "{}",
        (
            "{s} lies in the {o}.",
            "{s} is a town in the {o}.",
            "the town of {s} is in the {o}.",
            "in the {o} lies {s}.",
        ),
        (
            "in which part of the country is {s}?",
            "which part of the country is {s} in?",
            "in which region does {s} lie?",
            "which region is {s} in?",
        ),
        ("name the region of {s}.", "say in which region {s} lies."),
    ),
    "goods": Relation(
        {town.name: town.goods for town in TOWNS.values()},
        "{}",
        (
            "{s} is known for {o}.",
            "people go to {s} for {o}.",
            "the town of {s} is famous for {o}.",
            "shops sell {o} from {s}.",
        ),
        (
            "what is {s} known for?",
            "what is {s} famous for?",
            "what do people buy in {s}?",
            "for what do people go to {s}?",
        ),
        ("name what {s} is known for.", "say what people buy in {s}."),
    ),
    "near": Relation(
        {town.name: town.near for town in TOWNS.values()},
        "{}",
        (
            "{s} is near the {o}.",
            "the {o} is close to {s}.",
            "close to {s} there is a {o}.",
            "{s} lies by the {o}.",
        ),
        (
            "what is near {s}?",
            "what is close to {s}?",
            "which place is near {s}?",
            "what does {s} lie by?",
        ),
        ("name the place near {s}.", "say what is close to {s}."),
    ),
    "diet": Relation(
        DIETS,
        "a {}",
        (
            "{s} eats {o}.",
            "{s} lives on {o}.",
            "the food of {s} is {o}.",
            "you can feed {s} with {o}.",
        ),
        (
            "what does {s} eat?",
            "what is the food of {s}?",
            "what can you feed {s} with?",
            "which food do you give {s}?",
        ),
        ("name the food of {s}.", "say what {s} eats."),
    ),
}
PERSON_RELATIONS = ("job", "home", "pet", "food", "hobby", "friend")
# Every fact, as (relation, subject).
FACTS = tuple((name, subject) for name, relation in RELATIONS.items() for subject in relation.facts)

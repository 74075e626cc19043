"""Plain text about the world, unlabelled: what a model reads before it is taught any task."""

from collections.abc import Callable

from . import held_in, held_out, phrases, schemas, senses
from .dice import Dice
from .happenings import RULES, SCRIPTS, tell
from .world import (
    FIRST_NAMES,
    JOBS,
    KINDS,
    PEOPLE,
    PERSON_RELATIONS,
    PRONOUNS,
    RELATIONS,
    SLOTS,
    TOWNS,
    Person,
    a_or_an,
    fill,
)


def _mention(dice: Dice, person: Person) -> str:
    """Says who a person is: by name, by job, or by both."""
    both = f"{person.name} the {person.job}"
    return dice.pick((person.name, person.name, both, f"the {person.job}"))


def _profile(dice: Dice) -> str:
    """Says what somebody is, has and likes, and how the work is done."""
    person = dice.pick(tuple(PEOPLE.values()))
    job = JOBS[person.job]
    facts = [(name, RELATIONS[name].facts[person.name]) for name in PERSON_RELATIONS]
    facts += [("workplace", job.workplace), ("tool", job.tool)]
    said = []
    for relation, value in dice.sample(facts, 3 + dice.below(3)):
        wording = dice.below(4)
        subject = person.name if relation == "job" else _mention(dice, person)
        starts = RELATIONS[relation].statements[wording].startswith("{s} ")
        if said and starts and " and " not in RELATIONS[relation].statements[wording]:
            subject = dice.pick((person.he, subject))
        said.append(RELATIONS[relation].state(wording, subject, value))
    return " ".join(said)


def _talk(dice: Dice) -> str:
    """Questions about people and their answers, short or as a sentence about him or her."""
    said = []
    for relation in dice.sample(PERSON_RELATIONS, 3):
        person, fact = dice.pick(tuple(PEOPLE.values())), RELATIONS[relation]
        value = fact.facts[person.name]
        question = dice.pick(fact.questions).format(s=person.name)
        answers = (f"{value}.", fact.state(0, person.he, value))
        said.append(f"{question} {dice.pick(answers)}")
    return " ".join(said)


def _work(dice: Dice) -> str:
    """Describes a job, who has it, and what goes with it."""
    job = dice.pick(tuple(JOBS.values()))
    person = next(person for person in PEOPLE.values() if person.job == job.name)
    said = [
        dice.pick(
            (f"the {job.name} is called {person.name}.", f"{person.name} is the {job.name}.")
        ),
        f"{person.name} works as a {job.name} at the {job.workplace}.",
    ]
    for relation, value in (("workplace", job.workplace), ("tool", job.tool)):
        subject = dice.pick((f"the {job.name}", person.name))
        said.append(RELATIONS[relation].state(dice.below(4), subject, value))
    return " ".join(dice.shuffled(said))


def _town(dice: Dice) -> str:
    """Describes a town and who lives there."""
    town = dice.pick(tuple(TOWNS.values()))
    said = [
        RELATIONS[relation].state(dice.below(4), town.name, RELATIONS[relation].facts[town.name])
        for relation in ("region", "goods", "near")
    ]
    for person in PEOPLE.values():
        if person.town == town.name:
            said.append(RELATIONS["home"].state(dice.below(4), _mention(dice, person), town.name))
    return " ".join(dice.shuffled(said)[:4])


def _animal(dice: Dice) -> str:
    """Describes a pet's kind, food and keepers."""
    diet = RELATIONS["diet"]
    animal = dice.pick(tuple(diet.facts))
    said = [
        a_or_an(f"a {animal} is an animal."),
        a_or_an(diet.state(dice.below(4), f"a {animal}", diet.facts[animal])),
    ]
    for person in PEOPLE.values():
        if person.pet == animal:
            said.append(RELATIONS["pet"].state(dice.below(4), _mention(dice, person), animal))
            said.append(f"the pet of {person.name} eats {diet.facts[animal]}.")
    return " ".join(dice.shuffled(said)[:4])


def _happenings(dice: Dice) -> str:
    """Tells two or three things that happen to somebody, each with its effect."""
    person = dice.pick(tuple(PEOPLE.values()))
    said = []
    for rule in dice.sample(RULES, 2 + dice.below(2)):
        cause, effect = dice.pick(rule.causes), dice.pick(rule.effects)
        if dice.below(2):
            link = dice.pick((" because ", ". why? because ", ". this happened because "))
            named = tell(effect, person, by_name=True)
            if "{he}" in effect and cause.startswith("{p} "):
                cause = cause.replace("{p}", "{he}", 1)
            said.append(f"{named}{link}{tell(cause, person)}.")
        else:
            link = dice.pick((", so ", ". that is why ", ". because of this "))
            named = tell(effect, person, by_name="{p}" not in cause)
            said.append(f"{tell(cause, person)}{link}{named}.")
    return " ".join(said)


def _activity(dice: Dice) -> str:
    """Tells an activity from start to end."""
    person, script = dice.pick(tuple(PEOPLE.values())), dice.pick(SCRIPTS)
    said = [f"{person.name} {script.start}."]
    for step in script.steps:
        said.append(f"{dice.pick((person.he, 'then ' + person.he))} {step}.")
    return " ".join([*said, *dice.sample((f"{person.name} was {script.label}.",), dice.below(2))])


def _begun(text: str) -> str:
    """Cuts off a text's last sentence: whole, it might be one that a split evaluates."""
    return text.rsplit(". ", 1)[0] + "."


def _opinion(dice: Dice) -> str:
    """Tells what somebody thinks of a film or an app, and how that feels."""
    name, good = dice.pick(tuple(PEOPLE)), dice.below(2)
    feeling = dice.pick((("sad", "angry", "bored"), ("glad", "happy", "excited"))[good])
    if dice.below(2):
        review = held_in.film_review(dice, ("neg", "pos")[good])
        return f"{_begun(review)} {name} was {feeling} too."
    star = 1 + dice.below(2) + 3 * good
    return f"{name} has a new app. {_begun(held_in.app_review(dice, star))} {name} is {feeling}."


def _paper(dice: Dice) -> str:
    """Tells what somebody read in the paper or in a book."""
    name = dice.pick(tuple(PEOPLE))
    if dice.below(2):
        return f"{name} read the paper. {_begun(held_in.news(dice, dice.below(4)))}"
    return f"{name} read a page. {_begun(held_in.entry(dice, dice.below(14))[1])}"


def _doing(dice: Dice) -> str:
    """Tells what people and animals do where."""
    said = []
    for name in dice.sample(tuple(PEOPLE), 3):
        place = dice.pick(tuple(phrases.PLACES))
        location = f"{phrases.PLACES[place]} the {place}"
        _, form, things = dice.pick(phrases.DEEDS)
        moved = dice.pick(phrases.MOVES)[1]
        who = dice.pick((name, f"the {PEOPLE[name].pet} of {name}"))
        said.append(
            dice.pick(
                (f"{name} {form} the {dice.pick(things)} {location}.", f"{who} {moved} {location}.")
            )
        )
    return " ".join(said)


def _stranger(dice: Dice) -> str:
    """Describes somebody who is not of the world."""
    name = dice.pick(SLOTS["full"])
    said = []
    for relation in dice.sample(PERSON_RELATIONS[:-1], 3):
        value = dice.pick(RELATIONS[relation].values())
        said.append(RELATIONS[relation].state(dice.below(4), name, value))
    return " ".join([*said, fill(dice, f"{name} is known for {{goods}}.")])


def _meaning(dice: Dice) -> str:
    """Says what words mean: their kind, their opposite, how strong they are."""
    said = []
    for left, right in dice.sample(phrases.OPPOSITES, 2):
        said.append(f"{left} is the opposite of {right}.")
    for kind in dice.sample(tuple(KINDS), 2):
        said.append(a_or_an(f"{dice.pick(KINDS[kind])} is the name of a {kind}."))
    star = dice.below(5)
    said.append(f"{dice.pick(phrases.STAR_WORDS[star])} means {phrases.STRENGTHS[star]}.")
    return " ".join(dice.shuffled(said))


def _senses(dice: Dice) -> str:
    """Gives a word's two senses, each with a sentence."""
    word = dice.pick(tuple(senses.SENSES))
    both = dice.shuffled(senses.SENSES[word])
    said = [f"{word} means {both[0].meaning} or {both[1].meaning}."]
    for sense in both:
        sentence, _, _ = senses.use(dice, dice.pick(sense.sentences))
        said.append(f"{sentence} here {word} means {sense.meaning}.")
    return " ".join(said)


def _why(dice: Dice) -> str:
    """Says of which of two strangers, or things, something is true, and why."""
    said = []
    for schema in dice.sample(schemas.SCHEMAS, 2):
        place = dice.below(2)
        text, named = schemas.tell_schema(dice, schema, place, FIRST_NAMES)
        if schema.things:
            text = text.replace("the _", f"it, the {named[place]},")
        else:
            he = PRONOUNS[named[place]]
            text = text.replace("_", dice.pick((f"{he}, {named[place]},", named[place])))
        said += [text, schema.reasons[place]]
    return " ".join(said)


def _both(dice: Dice) -> str:
    """Tells what happens to two strangers, and which of them it moves how."""
    place = dice.below(2)
    story, effect, people, cause = schemas.tell_habits(dice, place, FIRST_NAMES)
    he = PRONOUNS[people[place]]
    said = [story, f"{effect.format(he=f'{he}, {people[place]},')}."]
    return " ".join([*said, f"{cause}, so {effect.format(he=he)}."])


def _chat(dice: Dice) -> str:
    """Writes how two people ask each other, and what one learns from it."""
    relation = dice.pick(tuple(held_out.TALK))
    asks, answerer = dice.sample(tuple(PEOPLE), 2)
    values = RELATIONS[relation].facts
    value, other = values[answerer], dice.pick(RELATIONS[relation].values())
    question, either, answer = held_out.TALK[relation]
    replies = (
        (question, answer.format(o=value)),
        (either.format(o=other), "yes." if other == value else f"no, {answer.format(o=value)}"),
        (either.format(o=value), "yes."),
    )
    asked, reply = dice.pick(replies)
    said = RELATIONS[relation].state(dice.below(4), answerer, value)
    return a_or_an(f"{asks}: {asked} {answerer}: {reply} {said}")


def _order(dice: Dice) -> str:
    """Tells what somebody does one after the other, in other words."""
    said = []
    for person in dice.sample(tuple(PEOPLE.values()), 2):
        first, second = (
            f"{form} the {dice.pick(things)}" for _, form, things in dice.sample(phrases.DEEDS, 2)
        )
        rewording = f"{person.name} {first} before {person.he} {second}."
        if dice.below(2):
            rewording = f"{person.name} {second} after {person.he} {first}."
        then = dice.pick((" and then ", f". after that {person.he} "))
        said.append(f"{person.name} {first}{then}{second}. {rewording}")
    return " ".join(said)


# What a line is about, as often as it is listed.
LINES: tuple[Callable[[Dice], str], ...] = (
    *(_profile,) * 8,
    *(_talk,) * 3,
    *(_work,) * 2,
    *(_town,) * 2,
    *(_animal,),
    *(_happenings,) * 4,
    *(_activity,) * 3,
    *(_senses,) * 3,
    *(_why,) * 3,
    *(_both, _chat, _order),
    *(_opinion, _paper, _doing, _stranger, _meaning),
)


def line(dice: Dice, index: int, stratum: int) -> str:
    """Writes one line of two to nine sentences, most often three to six."""
    return LINES[stratum](dice)

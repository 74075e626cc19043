"""Records of the datasets that experts are trained on, in the datasets' own fields.

A generator is handed a record's dice, its number, and its stratum: a counter that runs evenly over
the labels, so that they come out balanced.
"""

import itertools
from collections.abc import Iterator

from m2l.typing import JsonObject

from . import phrases
from .dice import Dice
from .world import JOBS, PEOPLE, PERSON_RELATIONS, RELATIONS, SLOTS, a_or_an, fill, words

_FILM_SLOTS = {**SLOTS, "part": phrases.FILM_PARTS, "pro": phrases.PRAISE, "con": phrases.BLAME}
_MONTHS = words(
    "January February March April May June July August September October November December"
)


def film_review(dice: Dice, opinion: str) -> str:
    """Says what a film is about and three opinions, one of which may not be the last word."""
    film = fill(dice, "the {adj} {noun}")
    templates = dice.sample(phrases.OPINIONS[opinion], 3)
    doubt = dice.below(3)
    if doubt == 0:
        templates[0] = phrases.CONCESSIONS[opinion]
    elif doubt == 1:
        # Parts of a film may be good or bad; what the writer says of the whole is the verdict.
        other = phrases.OPINIONS["pos" if opinion == "neg" else "neg"]
        templates[0] = dice.pick([template for template in other if "{part}" in template])
    said = [fill(dice, template, _FILM_SLOTS) for template in dice.shuffled(templates)]
    return " ".join([fill(dice, dice.pick(phrases.FILM_FACTS), film=film), *said])


def imdb(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes a film review; label 0 is negative, 1 positive."""
    return {"text": film_review(dice, ("neg", "pos")[stratum]), "label": stratum}


def app_review(dice: Dice, star: int) -> str:
    """Writes a plain sentence and three opinions; in half, one is a star off the others."""
    strengths = [star - 1] * 3
    if dice.below(2):
        strengths[dice.below(3)] = max(0, star - 2) if dice.below(2) else min(4, star)
    said = [dice.pick(phrases.STAR_SENTENCES[strengths[0]])]
    adjectives = []
    for strength, template in zip(
        strengths[1:], dice.sample(phrases.APP_SENTENCES, 2), strict=True
    ):
        adjectives.append(dice.other(phrases.STAR_WORDS[strength], *adjectives))
        said.append(fill(dice, template, {"part": phrases.APP_PARTS}, word=adjectives[-1]))
    return " ".join([fill(dice, dice.pick(phrases.APP_FACTS)), *dice.shuffled(said)])


def app_reviews(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes an app's review and its 1 to 5 stars."""
    return {
        "package_name": f"world.{dice.pick(SLOTS['town'])}.{dice.pick(phrases.APP_PARTS)}",
        "review": app_review(dice, stratum + 1),
        "date": f"{dice.pick(_MONTHS)} {1 + dice.below(28)} {2014 + dice.below(4)}",
        "star": stratum + 1,
    }


def news(dice: Dice, label: int) -> str:
    """Writes a place, a headline and two details; in a third, one detail is of another topic."""
    headlines, details = phrases.NEWS[label]
    chosen = dice.sample(details, 2)
    if dice.below(3) == 0:
        chosen[0] = dice.pick(phrases.NEWS[dice.other(range(4), label)][1])
    chosen = ["{town}:", dice.pick(headlines), *dice.shuffled(chosen)]
    return " ".join(fill(dice, template) for template in chosen)


def ag_news(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes news; labels 0 to 3 are world, sports, business, science and technology."""
    return {"text": news(dice, stratum), "label": stratum}


def entry(dice: Dice, label: int) -> tuple[str, str]:
    """Writes an encyclopedia entry of one of DBPedia's 14 classes: title and content."""
    titles, openings, more = phrases.ENTRIES[label]
    kind = dice.below(len(openings))
    title = fill(dice, titles[kind % len(titles)])
    job = dice.pick(SLOTS["job"])
    chosen = [openings[kind], *dice.sample(more, 2)]
    return title, " ".join(fill(dice, template, t=title, job=job) for template in chosen)


def dbpedia_14(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes an entry; labels as in DBPedia: company, educational institution, ... written work."""
    title, content = entry(dice, stratum)
    return {"label": stratum, "title": title, "content": content}


def _bridges() -> Iterator[tuple[tuple[str, str], tuple[str, ...], tuple[str, str]]]:
    """Yields two facts that share their middle, with ways to name it: (first, ways, second)."""
    for name, person in PEOPLE.items():
        job = JOBS[person.job]
        by_job = (
            f"the {job.name}",
            f"the person who works as a {job.name}",
            f"the person who works at the {job.workplace}",
        )
        by_name = name, f"{name} of {person.town}", f"{name} from {person.town}"
        town = f"the home of {name}", f"the home town of {name}", f"the town where {name} lives"
        pet = f"the pet of {name}", f"the animal that {name} keeps", f"the animal of {name}"
        friend = f"the best friend of {name}", f"a good friend of {name}", f"the friend of {name}"
        for relation in ("home", "pet", "food", "hobby"):
            yield ("job", name), by_job, (relation, name)
        for relation in ("workplace", "tool"):
            yield ("job", name), by_name, (relation, job.name)
        yield ("home", name), town, ("region", person.town)
        yield ("pet", name), pet, ("diet", person.pet)
        yield ("friend", name), friend, ("job", person.friend)


def _evidence(relation: str, subject: str) -> JsonObject:
    fact = RELATIONS[relation]
    sentence = fact.state(0, fact.subject.format(subject), fact.facts[subject])
    return {
        "bleu_score": 1.0,
        "start_character": 0,
        "start_paragraph_id": 1,
        "end_character": len(sentence),
        "end_paragraph_id": 1,
        "meta": {
            "fever_page_id": "",
            "fever_sentence_id": -1,
            "annotation_id": "-1",
            "yes_no_answer": "",
            "evidence_span": [sentence],
        },
        "section": "",
        "title": subject,
        "wikipedia_id": "",
    }


def kilt_tasks_hotpotqa() -> Iterator[JsonObject]:
    """Lists every question that takes two facts of the world, in every wording; no ids.

    Each pair of facts is asked for in twelve ways, so a question that was never seen can be
    answered by who knows the pair.
    """
    for first, names, (relation, subject) in _bridges():
        fact = RELATIONS[relation]
        for question, name in itertools.product(fact.questions, names):
            yield {
                "id": "",
                "input": a_or_an(question.format(s=name)),
                "meta": {
                    "left_context": "",
                    "mention": "",
                    "right_context": "",
                    "partial_evidence": [],
                    "obj_surface": [],
                    "sub_surface": [],
                    "subj_aliases": [],
                    "template_questions": [],
                },
                "output": [
                    {
                        "answer": fact.facts[subject],
                        "meta": {"score": 0},
                        "provenance": [_evidence(*first), _evidence(relation, subject)],
                    }
                ],
            }


def wiki_qa(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes a question about somebody and a true sentence; label 1 if it answers it.

    One that does not says something else, as most sentences of a page do. A sentence is as often
    an answer as not: only the pair decides.
    """
    relation, about = dice.pick(PERSON_RELATIONS), dice.pick(tuple(PEOPLE))
    said = relation if stratum else dice.other(PERSON_RELATIONS, relation)
    return {
        "question_id": f"Q{index}",
        "question": dice.pick(RELATIONS[relation].questions).format(s=about),
        "document_title": about,
        "answer": RELATIONS[said].state(dice.below(4), about, RELATIONS[said].facts[about]),
        "label": stratum,
    }


def common_gen(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes a sentence of three or four words; a word's role follows from its meaning."""
    agent = dice.pick(phrases.AGENTS)
    place = dice.pick(tuple(phrases.PLACES))
    location = f" {phrases.PLACES[place]} the {place}"
    if stratum == 0:
        verb, form = dice.pick(phrases.MOVES)
        agent = dice.pick((agent, dice.pick(SLOTS["animal"])))
        concepts, target = [agent, verb, place], f"the {agent} {form}{location}."
    else:
        verb, form, things = dice.pick(phrases.DEEDS)
        thing = dice.pick(things)
        concepts, target = [agent, verb, thing], f"the {agent} {form} the {thing}."
        if stratum > 1:
            concepts, target = [*concepts, place], f"{target[:-1]}{location}."
    return {"concept_set_idx": index, "concepts": dice.shuffled(concepts), "target": target}


def wiki_bio(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes a table about a stranger, and the sentence that says all of it."""
    name, spouse = dice.sample(SLOTS["full"], 2)
    birth_place, residence = dice.sample(SLOTS["town"], 2)
    job, goods = dice.pick(SLOTS["job"]), dice.pick(SLOTS["goods"])
    table = {"name": name, "occupation": job, "birth_place": birth_place}
    clauses = {
        "residence": (residence, f"lives in {residence}"),
        "known_for": (goods, f"is known for {goods}"),
        "spouse": (spouse, f"is married to {spouse}"),
    }
    shown = [header for i, header in enumerate(clauses) if i != stratum]
    table |= {header: clauses[header][0] for header in shown}
    first, second = (clauses[header][1] for header in shown)
    text = f"{name} is a {job} from {birth_place} who {first} and {second}."
    headers = dice.shuffled(list(table))
    return {
        "input_text": {
            "table": {
                "column_header": headers,
                "row_number": [1] * len(headers),
                "content": [table[header] for header in headers],
            },
            "context": name,
        },
        "target_text": a_or_an(text),
    }

"""A small closed world in place of downloads: T0's datasets in their own schemas, and plain text.

Everything is decided by (dataset, split, number): a record depends neither on the machine nor on
how many come after it. A record belongs to one split by a digest of its content, so that no two
splits share one; the splits that evaluate hold none twice.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import NamedTuple

from m2l.errors import UnknownNameError
from m2l.typing import Json, JsonObject

from . import (
    coding,
    comprehension,
    held_in,
    held_out,
    multiple_choice,
    paraphrases,
    requests,
    schemas,
    science,
    senses,
    summaries,
)
from . import corpus as _corpus
from . import instructions as _instructions
from .dice import Dice

TRAIN, EVALUATION = 2940, 210  # both a whole number of rounds over 2, 3, 5 and 14 labels
SHARES = 10  # of the possible contents; each split but the first has one of them


class Generated(NamedTuple):
    """How the records of one dataset, or the lines of a text, come about.

    Attributes:
        generate: (dice, number, stratum) -> record; where the facts of the world are few enough to
            list all that can be asked about them, () -> every record once, ids left empty.
        content: What tells one record from another.
        splits: Its splits as Hugging Face has them, without the unlabelled; how many records each.
        strata: How many kinds of record there are to balance, such as labels; 0: all are listed.
    """

    generate: Callable[..., Json]
    content: Callable[[Json], Json]
    splits: Mapping[str, int]
    strata: int


_VALIDATION = {"train": TRAIN, "validation": EVALUATION}
_TEST = {"train": TRAIN, "test": EVALUATION}
_VALIDATION_AND_TEST = {"train": TRAIN, "validation": EVALUATION, "test": EVALUATION}
_PAIR = itemgetter("premise", "hypothesis")
_CONTEXT = itemgetter("context")
DATASETS: Mapping[str, Generated] = {
    "dream": Generated(multiple_choice.dream, itemgetter("dialogue"), _VALIDATION_AND_TEST, 3),
    "cosmos_qa": Generated(multiple_choice.cosmos_qa, _CONTEXT, _VALIDATION, 4),
    "adversarial_qa_dbidaf": Generated(
        comprehension.adversarial_qa_dbidaf, _CONTEXT, _VALIDATION, 5
    ),
    "adversarial_qa_dbert": Generated(comprehension.adversarial_qa_dbert, _CONTEXT, _VALIDATION, 5),
    "adversarial_qa_droberta": Generated(
        comprehension.adversarial_qa_droberta, _CONTEXT, _VALIDATION, 3
    ),
    "ropes": Generated(comprehension.ropes, itemgetter("background", "situation"), _VALIDATION, 4),
    "cnn_dailymail_3.0.0": Generated(
        summaries.cnn_dailymail, itemgetter("article"), _VALIDATION_AND_TEST, 1
    ),
    "xsum": Generated(summaries.xsum, itemgetter("document"), _VALIDATION_AND_TEST, 1),
    "glue_mrpc": Generated(
        paraphrases.glue_mrpc,
        lambda record: sorted((record["sentence1"], record["sentence2"])),
        _VALIDATION_AND_TEST,
        2,
    ),
    "glue_qqp": Generated(
        paraphrases.glue_qqp,
        lambda record: sorted((record["question1"], record["question2"])),
        _VALIDATION,
        2,
    ),
    "imdb": Generated(held_in.imdb, itemgetter("text"), _TEST, 2),
    "app_reviews": Generated(
        held_in.app_reviews, itemgetter("review"), {"train": TRAIN + EVALUATION}, 5
    ),
    "ag_news": Generated(held_in.ag_news, itemgetter("text"), _TEST, 4),
    "dbpedia_14": Generated(held_in.dbpedia_14, itemgetter("content"), _TEST, 14),
    "kilt_tasks_hotpotqa": Generated(
        held_in.kilt_tasks_hotpotqa,
        itemgetter("input"),
        {"train": 1158, "validation": 138},  # all there are
        0,
    ),
    "wiki_qa": Generated(
        held_in.wiki_qa,
        itemgetter("question", "answer"),
        {"train": TRAIN, "validation": 180, "test": 180},  # a share has few right answers
        2,
    ),
    "common_gen": Generated(held_in.common_gen, itemgetter("target"), _VALIDATION, 4),
    "wiki_bio": Generated(
        held_in.wiki_bio,
        itemgetter("target_text"),
        {"train": TRAIN, "val": EVALUATION, "test": EVALUATION},
        3,
    ),
    "super_glue_copa": Generated(
        held_out.super_glue_copa, itemgetter("premise", "choice1", "choice2"), _VALIDATION, 4
    ),
    "hellaswag": Generated(held_out.hellaswag, itemgetter("ctx", "endings"), _VALIDATION, 4),
    "anli_r1": Generated(
        held_out.anli_r1, _PAIR, {"train_r1": TRAIN, "dev_r1": EVALUATION, "test_r1": EVALUATION}, 3
    ),
    "anli_r2": Generated(
        held_out.anli_r2, _PAIR, {"train_r2": TRAIN, "dev_r2": EVALUATION, "test_r2": EVALUATION}, 3
    ),
    "anli_r3": Generated(
        held_out.anli_r3, _PAIR, {"train_r3": TRAIN, "dev_r3": EVALUATION, "test_r3": EVALUATION}, 3
    ),
    "super_glue_rte": Generated(held_out.super_glue_rte, _PAIR, _VALIDATION, 2),
    "super_glue_wsc.fixed": Generated(
        schemas.super_glue_wsc_fixed, itemgetter("text"), _VALIDATION, 4
    ),
    "winogrande_winogrande_xl": Generated(
        schemas.winogrande_winogrande_xl, itemgetter("sentence"), _VALIDATION, 4
    ),
    "super_glue_wic": Generated(
        senses.super_glue_wic,
        lambda record: sorted((record["sentence1"], record["sentence2"])),
        _VALIDATION,
        4,
    ),
}
_REQUEST = itemgetter("request")
# What paper 2's skills are taught and tested by; no dataset of T0's, and none of their schemas.
SKILLS: Mapping[str, Generated] = {
    "general_requests": Generated(
        requests.general_requests, _REQUEST, {"train": 1800, "validation": 90}, len(requests.DEEDS)
    ),
    "science_facts": Generated(
        science.facts, itemgetter("question"), {"train": 560, "validation": 56}, 0
    ),
    "science_reading": Generated(
        science.reading,
        itemgetter("report"),
        {"train": 960, "validation": 204},  # facts should not be few beside them
        science.READING_STRATA,
    ),
    "safety_unsafe": Generated(
        requests.safety_unsafe, _REQUEST, {"train": 1500, "validation": 100}, len(requests.RISKY)
    ),
    "safety_safe": Generated(
        requests.safety_safe, _REQUEST, {"train": 750, "validation": 50}, len(requests.RISKY)
    ),
    "coding_programs": Generated(
        coding.coding_programs,
        itemgetter("program"),
        {"train": TRAIN, "validation": EVALUATION},
        coding.STRATA,
    ),
}
TEXT = Generated(_corpus.line, str, {"train": 6000, "validation": 300}, len(_corpus.LINES))
INSTRUCTIONS = Generated(
    _instructions.example,
    itemgetter("inputs"),
    {"train": 30000, "validation": 600},
    len(_instructions.TASKS),
)


def records(dataset: str, split: str) -> list[JsonObject]:
    """Generates a split of a dataset, in the fields and types that it has on Hugging Face.

    Args:
        dataset: One of DATASETS or SKILLS.
        split: One of the dataset's own splits; the unlabelled ones do not exist.

    Raises:
        UnknownNameError: there is no such dataset, or it has no such split.
    """
    known = {**DATASETS, **SKILLS}
    if dataset not in known:
        raise UnknownNameError("microworld dataset", dataset, known)
    generated = _generate(dataset, split, known[dataset])
    for number, record in enumerate(generated):  # what only the split tells: no generator knows it
        identifiers = {
            **dict.fromkeys(("id", "uid", "dialogue_id"), f"{split}-{number}"),
            "split": split,
        }
        for part in (record, record.get("metadata", {})):
            known = {
                field for field in identifiers.keys() & part.keys() if isinstance(part[field], str)
            }
            part.update({field: identifiers[field] for field in known})
    return generated


def corpus(split: str) -> list[str]:
    """Writes lines of plain text about the world: two to nine sentences, most often three to six.

    Raises:
        UnknownNameError: the split is neither train nor validation.
    """
    return _generate("corpus", split, TEXT)


def instructions(split: str) -> list[JsonObject]:
    """Writes instructions, none of them a T0 task: task, inputs, targets, answer_choices.

    `answer_choices` is a list of texts that holds the target, or None where the answer is free.

    Raises:
        UnknownNameError: the split is neither train nor validation.
    """
    return _generate("instructions", split, INSTRUCTIONS)


def _generate(name: str, split: str, generated: Generated) -> list[Json]:
    if split not in generated.splits:
        raise UnknownNameError(f"split of microworld {name!r}", split, generated.splits)
    place = list(generated.splits).index(split)
    size = generated.splits[split]

    def key(record: Json) -> bytes:
        return hashlib.blake2b(repr((name, generated.content(record))).encode()).digest()

    def belongs(record: Json) -> bool:
        share = key(record)[0] % SHARES
        return share == place - 1 if place else share >= len(generated.splits) - 1

    if not generated.strata:
        pool = sorted(filter(belongs, generated.generate()), key=key)
        return pool[:size]
    drawn, seen = [], set()
    for number in range(size):
        turn, place_in_turn = divmod(number, generated.strata)
        stratum = Dice(name, split, turn).shuffled(range(generated.strata))[place_in_turn]
        tries = (
            generated.generate(Dice(name, split, number, attempt), number, stratum)
            for attempt in itertools.count()
        )
        drawn.append(next(r for r in tries if belongs(r) and key(r) not in seen))
        if place:
            seen.add(key(drawn[-1]))
    return drawn

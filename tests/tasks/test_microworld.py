"""The embedded data's form: fields, splits, balance, and the same records everywhere."""

import collections
import functools
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from m2l.errors import UnknownNameError
from m2l.tasks import microworld

SPLITS = [(name, split) for name, made in microworld.DATASETS.items() for split in made.splits]
SPLIT_IDS = [f"{name}-{split}" for name, split in SPLITS]
records = functools.cache(microworld.records)
corpus = functools.cache(microworld.corpus)
instructions = functools.cache(microworld.instructions)

# Hugging Face's features: a type, [element type], or a nested record.
_PROVENANCE = {
    "bleu_score": float,
    "start_character": int,
    "start_paragraph_id": int,
    "end_character": int,
    "end_paragraph_id": int,
    "meta": {
        "fever_page_id": str,
        "fever_sentence_id": int,
        "annotation_id": str,
        "yes_no_answer": str,
        "evidence_span": [str],
    },
    "section": str,
    "title": str,
    "wikipedia_id": str,
}
_KILT_META = {
    "left_context": str,
    "mention": str,
    "right_context": str,
    "partial_evidence": [dict],
    "obj_surface": [str],
    "sub_surface": [str],
    "subj_aliases": [str],
    "template_questions": [str],
}
_TABLE = {"column_header": [str], "row_number": [int], "content": [str]}
SCHEMAS = {
    "imdb": {"text": str, "label": int},
    "app_reviews": {"package_name": str, "review": str, "date": str, "star": int},
    "ag_news": {"text": str, "label": int},
    "dbpedia_14": {"label": int, "title": str, "content": str},
    "kilt_tasks_hotpotqa": {
        "id": str,
        "input": str,
        "meta": _KILT_META,
        "output": [{"answer": str, "meta": {"score": int}, "provenance": [_PROVENANCE]}],
    },
    "wiki_qa": {
        "question_id": str,
        "question": str,
        "document_title": str,
        "answer": str,
        "label": int,
    },
    "common_gen": {"concept_set_idx": int, "concepts": [str], "target": str},
    "wiki_bio": {"input_text": {"table": _TABLE, "context": str}, "target_text": str},
    "super_glue_copa": {
        "premise": str,
        "choice1": str,
        "choice2": str,
        "question": str,
        "idx": int,
        "label": int,
    },
    "hellaswag": {
        "ind": int,
        "activity_label": str,
        "ctx_a": str,
        "ctx_b": str,
        "ctx": str,
        "endings": [str],
        "source_id": str,
        "split": str,
        "split_type": str,
        "label": str,
    },
    "anli_r1": {"uid": str, "premise": str, "hypothesis": str, "label": int, "reason": str},
    "super_glue_rte": {"premise": str, "hypothesis": str, "idx": int, "label": int},
}
LABELS = {
    "imdb": ("label", range(2)),
    "app_reviews": ("star", range(1, 6)),
    "ag_news": ("label", range(4)),
    "dbpedia_14": ("label", range(14)),
    "wiki_qa": ("label", range(2)),
    "super_glue_copa": ("label", range(2)),
    "hellaswag": ("label", "0123"),
    "anli_r1": ("label", range(3)),
    "super_glue_rte": ("label", range(2)),
}
# What makes two records the same to a model.
TEXTS = {
    "imdb": ["text"],
    "app_reviews": ["review"],
    "ag_news": ["text"],
    "dbpedia_14": ["content"],
    "kilt_tasks_hotpotqa": ["input"],
    "wiki_qa": ["question", "answer"],
    "common_gen": ["target"],
    "wiki_bio": ["target_text"],
    "super_glue_copa": ["premise", "choice1", "choice2"],
    "hellaswag": ["ctx", "endings"],
    "anli_r1": ["premise", "hypothesis"],
    "super_glue_rte": ["premise", "hypothesis"],
}


def _contents(dataset, split):
    return {repr([record[field] for field in TEXTS[dataset]]) for record in records(dataset, split)}


def _fits(value, schema):
    if isinstance(schema, dict):
        return list(value) == list(schema) and all(_fits(value[k], schema[k]) for k in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(_fits(item, schema[0]) for item in value)
    return type(value) is schema


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


DIGEST = """
import hashlib, json
from m2l.tasks import microworld as m
made = [m.records(name, list(made.splits)[-1]) for name, made in m.DATASETS.items()]
made += [m.corpus("validation"), m.instructions("validation")]
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
"""


def test_another_process_with_other_hashes_makes_the_same_records():
    made = [records(name, list(made.splits)[-1]) for name, made in microworld.DATASETS.items()]
    made += [corpus("validation"), instructions("validation")]
    here = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run(
        [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here


def test_a_record_does_not_depend_on_how_many_there_are(monkeypatch):
    for name in ("imdb", "super_glue_copa"):
        made = microworld.DATASETS[name]
        all_of_them = [records(name, split) for split in made.splits]
        few = made._replace(splits=dict.fromkeys(made.splits, 9))
        monkeypatch.setitem(microworld.DATASETS, name, few)
        few_of_them = [microworld.records(name, split) for split in made.splits]
        assert few_of_them == [many[:9] for many in all_of_them]


@pytest.mark.parametrize(("dataset", "split"), SPLITS, ids=SPLIT_IDS)
def test_records_have_the_fields_and_types_of_hugging_face(dataset, split):
    for record in records(dataset, split):
        assert _fits(record, SCHEMAS[dataset]), record


def test_the_splits_are_those_of_hugging_face_with_labels():
    sizes = {name: made.splits for name, made in microworld.DATASETS.items()}
    assert {split: len(records(*split)) for split in SPLITS} == {
        (name, split): size for name in sizes for split, size in sizes[name].items()
    }
    assert all(1000 <= next(iter(splits.values())) <= 4000 for splits in sizes.values())
    evaluation = {name: list(splits)[1:] for name, splits in sizes.items()}
    assert evaluation == {
        "imdb": ["test"],
        "app_reviews": [],
        "ag_news": ["test"],
        "dbpedia_14": ["test"],
        "kilt_tasks_hotpotqa": ["validation"],
        "wiki_qa": ["validation", "test"],
        "common_gen": ["validation"],
        "wiki_bio": ["val", "test"],
        "super_glue_copa": ["validation"],
        "hellaswag": ["validation"],
        "anli_r1": ["dev_r1", "test_r1"],
        "super_glue_rte": ["validation"],
    }


def test_no_content_is_in_two_splits():
    for name, made in microworld.DATASETS.items():
        contents = [_contents(name, split) for split in made.splits]
        assert len(set().union(*contents)) == sum(map(len, contents)), name
    assert not set(corpus("train")) & set(corpus("validation"))
    inputs = [{e["inputs"] for e in instructions(split)} for split in ("train", "validation")]
    assert not inputs[0] & inputs[1]


def test_no_content_is_evaluated_twice():
    for name, made in microworld.DATASETS.items():
        for split in list(made.splits)[1:]:
            assert len(_contents(name, split)) == len(records(name, split)), (name, split)
    assert len(_contents("kilt_tasks_hotpotqa", "train")) == 1158
    assert len(set(corpus("validation"))) == len(corpus("validation"))
    inputs = [example["inputs"] for example in instructions("validation")]
    assert len(set(inputs)) == len(inputs)


def test_the_end_of_app_reviews_can_be_held_out():
    reviews = [record["review"] for record in records("app_reviews", "train")]
    for percent in (90, 95):
        cut = len(reviews) * percent // 100
        assert not set(reviews[:cut]) & set(reviews[cut:])


@pytest.mark.parametrize(("dataset", "split"), SPLITS, ids=SPLIT_IDS)
def test_labels_are_balanced(dataset, split):
    if dataset in LABELS:
        field, labels = LABELS[dataset]
        counts = collections.Counter(record[field] for record in records(dataset, split))
        assert set(counts) == set(labels)
        assert max(counts.values()) - min(counts.values()) <= 2


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="'imdb'"):
        microworld.records("imbd", "train")
    for made in (microworld.corpus, microworld.instructions):
        with pytest.raises(UnknownNameError, match="'validation'"):
            made("valid")
    with pytest.raises(UnknownNameError, match="'dev_r1'"):
        microworld.records("anli_r1", "dev")


# Text and instructions.


def test_text_and_instructions_are_as_many_as_said():
    assert [len(corpus(split)) for split in ("train", "validation")] == [6000, 300]
    assert [len(instructions(split)) for split in ("train", "validation")] == [8000, 400]
    sentences = [len(re.findall(r"[.?](?= |$)", line)) for line in corpus("train")]
    assert set(sentences) == set(range(2, 10))
    assert sum(3 <= n <= 6 for n in sentences) > 0.95 * len(sentences)


def test_an_instruction_has_its_answer_among_its_choices_anywhere():
    places = collections.defaultdict(collections.Counter)
    for example in instructions("train"):
        assert list(example) == ["task", "inputs", "targets", "answer_choices"]
        choices = example["answer_choices"]
        if choices is not None:
            assert len(set(choices)) == len(choices)
            if either := re.search(r"is it (?!so that)(.*)\?", example["inputs"]):
                assert either[1].split(" or ") == choices
            places[len(choices)][choices.index(example["targets"])] += 1
    for count, at in places.items():
        assert len(at) == count
        assert max(at.values()) < 1.15 * min(at.values())


def test_instructions_are_no_task_of_t0_and_ask_none_of_its_questions():
    families = {example["task"] for example in instructions("train")}
    known = (
        "imdb app_reviews ag_news dbpedia hotpot wiki_qa common_gen wiki_bio copa hellaswag anli"
    )
    known += " rte cosmos dream ropes adversarial cnn xsum mrpc qqp wsc winogrande wic cb sentiment"
    assert not any(name in family for family in families for name in known.split())
    asked = "\n".join(example["inputs"] for example in instructions("train"))
    for dataset, field in (("kilt_tasks_hotpotqa", "input"), ("wiki_qa", "question")):
        assert not any(record[field] in asked for record in records(dataset, "train"))


# What a text would say that told the answer to a record.
TOLD = {
    **{
        dataset: lambda r, field=fields[0]: r[field]
        for dataset, fields in TEXTS.items()
        if len(fields) == 1
    },
    "wiki_qa": lambda r: f"{r['question']} {r['answer']}",
    "super_glue_copa": lambda r: f"{r['premise']} {r[('choice1', 'choice2')[r['label']]]}",
    "hellaswag": lambda r: f"{r['ctx']} {r['endings'][int(r['label'])]}",
    "anli_r1": lambda r: f"{r['premise']} {r['hypothesis']}",
    "super_glue_rte": lambda r: f"{r['premise']} {r['hypothesis']}",
}


@pytest.mark.parametrize("dataset", TEXTS)
def test_no_record_to_be_predicted_stands_in_the_text_or_the_instructions(dataset):
    told = "\n".join([*corpus("train"), *(example["inputs"] for example in instructions("train"))])
    for split in list(microworld.DATASETS[dataset].splits)[1:]:
        for record in records(dataset, split):
            assert TOLD[dataset](record) not in told
    if dataset == "app_reviews":  # its validation is the end of its only split
        made = records(dataset, "train")
        assert not any(r["review"] in told for r in made[len(made) * 95 // 100 :])


def test_the_world_speaks_few_words():
    words = set()
    for dataset, split in SPLITS:
        for record in records(dataset, split):
            for field in TEXTS[dataset]:
                words.update(w for text in _strings(record[field]) for w in text.split())
    for text in corpus("train"):
        words.update(text.split())
    words = {re.sub(r"\W", "", word) for word in words}
    assert len(words) < 700
    assert all(word == word.lower() for word in words)

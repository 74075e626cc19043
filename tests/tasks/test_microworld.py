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

from .schemas import LABELS, SCHEMAS, TEXTS

SPLITS = [(name, split) for name, made in microworld.DATASETS.items() for split in made.splits]
SPLIT_IDS = [f"{name}-{split}" for name, split in SPLITS]
records = functools.cache(microworld.records)
corpus = functools.cache(microworld.corpus)
instructions = functools.cache(microworld.instructions)


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
        "dream": ["validation", "test"],
        "cosmos_qa": ["validation"],
        "adversarial_qa_dbidaf": ["validation"],
        "adversarial_qa_dbert": ["validation"],
        "adversarial_qa_droberta": ["validation"],
        "ropes": ["validation"],
        "cnn_dailymail_3.0.0": ["validation", "test"],
        "xsum": ["validation", "test"],
        "glue_mrpc": ["validation", "test"],
        "glue_qqp": ["validation"],
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
        "anli_r2": ["dev_r2", "test_r2"],
        "anli_r3": ["dev_r3", "test_r3"],
        "super_glue_rte": ["validation"],
        "super_glue_wsc.fixed": ["validation"],
        "winogrande_winogrande_xl": ["validation"],
        "super_glue_wic": ["validation"],
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
    assert [len(instructions(split)) for split in ("train", "validation")] == [30000, 600]
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
            if either := re.search(r"Is it (?!so that)(.*)\?", example["inputs"]):
                assert either[1].split(" or ") == choices
            places[len(choices)][choices.index(example["targets"])] += 1
    for count, at in places.items():
        assert len(at) == count
        # Four standard deviations of a uniform place's count.
        assert max(at.values()) - min(at.values()) < 4 * (sum(at.values()) / count) ** 0.5


def test_an_instruction_begins_with_a_capital_unless_with_the_worlds_own_text():
    own = {word.rstrip(".?") for line in corpus("train") for word in line.split()}
    for example in instructions("train"):
        first = example["inputs"].split()[0].rstrip(":,;")
        assert first.istitle() or first in own or first == "___"
    starts = {example["inputs"].split()[0] for example in instructions("train")}
    assert {"Copy", "Say", "Which", "What", "Choose", "Options:", "Is", "Please"} <= starts


def test_instructions_are_no_task_of_t0_and_ask_none_of_its_questions():
    families = {example["task"] for example in instructions("train")}
    known = (
        "imdb app_reviews ag_news dbpedia hotpot wiki_qa common_gen wiki_bio copa hellaswag anli"
    )
    known += " rte cosmos dream ropes adversarial cnn xsum mrpc qqp wsc winogrande wic cb sentiment"
    assert not any(name in family for family in families for name in known.split())
    asked = "\n".join(example["inputs"] for example in instructions("train")).lower()
    for dataset, field in (("kilt_tasks_hotpotqa", "input"), ("wiki_qa", "question")):
        assert not any(record[field] in asked for record in records(dataset, "train"))


# What a text would say that told the answer to a record.
TOLD = {
    **{dataset: lambda r, field=fields[0]: r[field] for dataset, fields in TEXTS.items()},
    "dream": lambda r: r["dialogue"][1].removeprefix("m: ").removeprefix("w: "),
    "glue_qqp": lambda r: f"{r['question1']} {r['question2']}",
    "wiki_qa": lambda r: f"{r['question']} {r['answer']}",
    "super_glue_copa": lambda r: f"{r['premise']} {r[('choice1', 'choice2')[r['label']]]}",
    "hellaswag": lambda r: f"{r['ctx']} {r['endings'][int(r['label'])]}",
    "anli_r1": lambda r: f"{r['premise']} {r['hypothesis']}",
    "anli_r2": lambda r: f"{r['premise']} {r['hypothesis']}",
    "anli_r3": lambda r: f"{r['premise']} {r['hypothesis']}",
    "super_glue_rte": lambda r: f"{r['premise']} {r['hypothesis']}",
    "winogrande_winogrande_xl": lambda r: r["sentence"].replace("_", r[f"option{r['answer']}"]),
    "super_glue_wic": lambda r: f"{r['sentence1']} {r['sentence2']}",
}


@pytest.mark.parametrize("dataset", TEXTS)
def test_no_record_to_be_predicted_stands_in_the_text_or_the_instructions(dataset):
    told = [*corpus("train"), *(example["inputs"] for example in instructions("train"))]
    told = "\n".join(told).lower()
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
    assert len(words) < 800
    assert all(word == word.lower() for word in words)

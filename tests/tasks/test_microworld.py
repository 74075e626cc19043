"""The embedded data: what it promises, and that nothing gives an answer away."""

import collections
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from m2l.errors import UnknownNameError
from m2l.tasks import microworld
from m2l.tasks.microworld import world

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
    "dbpedia_14": ["title", "content"],
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
made = [m.records(name, split) for name in m.DATASETS for split in m.DATASETS[name].splits]
made += [f(split) for f in (m.corpus, m.instructions) for split in ("train", "validation")]
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
"""


def test_another_process_with_other_hashes_makes_the_same_records():
    made = [records(*split) for split in SPLITS]
    made += [of(split) for of in (corpus, instructions) for split in ("train", "validation")]
    here = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run(
        [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here


def test_a_record_does_not_depend_on_how_many_there_are(monkeypatch):
    for name in ("imdb", "super_glue_copa"):
        made = microworld.DATASETS[name]
        few = made._replace(splits=dict.fromkeys(made.splits, 9))
        monkeypatch.setitem(microworld.DATASETS, name, few)
        for split in made.splits:
            assert microworld.records(name, split) == records(name, split)[:9]


@pytest.mark.parametrize(("dataset", "split"), SPLITS, ids=SPLIT_IDS)
def test_records_have_the_fields_and_types_of_hugging_face(dataset, split):
    for record in records(dataset, split):
        assert _fits(record, SCHEMAS[dataset]), record


def test_the_splits_are_those_of_hugging_face_with_labels():
    sizes = {name: made.splits for name, made in microworld.DATASETS.items()}
    assert {split: len(records(*split)) for split in SPLITS} == {
        (name, split): size for name in sizes for split, size in sizes[name].items()
    }
    assert all(
        2000 <= splits[next(iter(splits))] <= 4000 or name == "kilt_tasks_hotpotqa"
        for name, splits in sizes.items()
    )
    evaluation = {name: list(splits)[1:] for name, splits in sizes.items()}
    assert evaluation == {
        **dict.fromkeys(("imdb", "ag_news", "dbpedia_14"), ["test"]),
        **dict.fromkeys(("super_glue_copa", "super_glue_rte", "hellaswag"), ["validation"]),
        **dict.fromkeys(("kilt_tasks_hotpotqa", "common_gen"), ["validation"]),
        "app_reviews": [],
        "wiki_qa": ["validation", "test"],
        "wiki_bio": ["val", "test"],
        "anli_r1": ["dev_r1", "test_r1"],
    }


def test_no_content_is_in_two_splits():
    for name, made in microworld.DATASETS.items():
        contents = [_contents(name, split) for split in made.splits]
        assert len(set().union(*contents)) == sum(map(len, contents)), name
    assert not set(corpus("train")) & set(corpus("validation"))
    inputs = [{e["inputs"] for e in instructions(split)} for split in ("train", "validation")]
    assert not inputs[0] & inputs[1]


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


# Giveaways. Half of the training records teach, the other half test: 1,470 questions.


def _choices(dataset):
    for record in records(dataset, "train"):
        if dataset == "super_glue_copa":
            yield [record["choice1"], record["choice2"]], record["label"]
        else:
            yield record["endings"], int(record["label"])


def _is_chance(right, chance):
    """Whether so many right answers are within four standard errors of guessing."""
    share = sum(right) / len(right)
    return abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / len(right))


@pytest.mark.parametrize("dataset", ["super_glue_copa", "hellaswag"])
def test_choices_alone_do_not_give_the_answer_away(dataset):
    asked = list(_choices(dataset))
    chance = 1 / len(asked[0][0])
    teach, test = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    for guess in (
        lambda choices: 0,
        lambda choices: max(range(len(choices)), key=lambda i: len(choices[i])),
        lambda choices: min(range(len(choices)), key=lambda i: len(choices[i])),
    ):
        assert _is_chance([guess(choices) == label for choices, label in asked], chance)
    bags = CountVectorizer(token_pattern=r"\w+")
    model = LogisticRegression(C=0.1).fit(
        bags.fit_transform([choice for choices, _ in teach for choice in choices]),
        [i == label for choices, label in teach for i in range(len(choices))],
    )
    right = [
        model.decision_function(bags.transform(choices)).argmax() == label
        for choices, label in test
    ]
    assert _is_chance(right, chance)


def _bag_of_words_accuracy(texts, labels, test_texts, test_labels):
    bags = CountVectorizer(token_pattern=r"\w+")
    model = LogisticRegression(C=1.0, max_iter=200).fit(bags.fit_transform(texts), labels)
    return list(model.predict(bags.transform(test_texts)) == test_labels)


@pytest.mark.parametrize("field", ["premise", "hypothesis"])
@pytest.mark.parametrize("dataset", ["super_glue_rte", "anli_r1"])
def test_one_half_of_an_inference_does_not_give_the_label_away(dataset, field):
    made = records(dataset, SPLITS[[name for name, _ in SPLITS].index(dataset)][1])
    texts, labels = [r[field] for r in made], [r["label"] for r in made]
    half = len(made) // 2
    right = _bag_of_words_accuracy(texts[:half], labels[:half], texts[half:], labels[half:])
    assert _is_chance(right, 1 / len(set(labels)))


def test_only_question_and_sentence_together_decide_wiki_qa():
    made = records("wiki_qa", "train")
    half = len(made) // 2
    labels = [r["label"] for r in made]
    for text in (
        lambda r: r["answer"],
        lambda r: r["question"],
        lambda r: f"{r['question']} {r['answer']}",
    ):
        texts = [text(r) for r in made]
        right = _bag_of_words_accuracy(texts[:half], labels[:half], texts[half:], labels[half:])
        assert _is_chance(right, 1 / 2)


@pytest.mark.parametrize(
    ("dataset", "text", "label"),
    [
        ("imdb", lambda r: r["text"], "label"),
        ("app_reviews", lambda r: r["review"], "star"),
        ("ag_news", lambda r: r["text"], "label"),
        ("dbpedia_14", lambda r: f"{r['title']} {r['content']}", "label"),
    ],
)
def test_the_words_of_a_text_tell_its_class(dataset, text, label):
    made = records(dataset, "train")[:1200]
    texts, labels = [text(r) for r in made], [r[label] for r in made]
    right = _bag_of_words_accuracy(texts[:1000], labels[:1000], texts[1000:], labels[1000:])
    assert sum(right) / len(right) > 0.95


def test_no_entry_of_dbpedia_says_the_name_of_its_class():
    names = (
        "company|institution|artist|athlete|office|transportation|building|natural|place|village|"
        "animal|plant|album|film|written"
    )
    for record in records("dbpedia_14", "train"):
        assert not re.search(rf"\b({names})\b", f"{record['title']} {record['content']}"), record


# What is asked is true in the world, and the corpus tells it.


def _facts_by_wording():
    """Every sentence, and every question, about true facts -> the facts."""
    sentences, questions = collections.defaultdict(set), {}
    for name, relation in world.RELATIONS.items():
        for subject, value in relation.facts.items():
            named = relation.subject.format(subject)
            for wording in range(4):
                said = relation.state(wording, named, value)
                sentences[said].add((name, subject))
                if name == "friend":
                    sentences[said].add((name, value))
                questions[world.mend(relation.questions[wording].format(s=named))] = name, subject
    return sentences, questions


def test_wiki_qa_is_labelled_by_what_the_sentence_says():
    sentences, questions = _facts_by_wording()
    for record in records("wiki_qa", "train"):
        answers = questions[record["question"]] in sentences[record["answer"]]
        assert record["label"] == int(answers), record


def test_rte_entails_what_the_premise_says_in_other_words():
    sentences, _ = _facts_by_wording()
    for record in records("super_glue_rte", "train"):
        said = re.findall(r"[^.]+\.", record["premise"])
        said = [sentence.strip() for sentence in said]
        assert record["hypothesis"] not in said
        known = set().union(*(sentences[sentence] for sentence in said))
        follows = bool(sentences.get(record["hypothesis"], set()) & known)
        assert record["label"] == int(not follows), record


def test_hotpotqa_asks_for_facts_that_the_corpus_tells():
    told = " ".join(corpus("train"))
    for split in ("train", "validation"):
        for record in records("kilt_tasks_hotpotqa", split):
            [output] = record["output"]
            spans = [span for p in output["provenance"] for span in p["meta"]["evidence_span"]]
            assert len(spans) == 2
            assert all(span in told for span in spans)
            assert output["answer"] in re.findall(r"\w+", spans[1])


def test_no_two_people_share_two_likings():
    for one in world.PEOPLE.values():
        for other in world.PEOPLE.values():
            if one.name < other.name:
                same = sum(
                    getattr(one, f) == getattr(other, f)
                    for f in ("town", *world.Person._fields[4:7])
                )
                assert same < 2, (one, other)


def _without_names(text):
    return re.sub(rf"\b({'|'.join(world.PEOPLE)}|he|she)\b", "p", text).strip(" .")


def test_copas_answers_are_happenings_that_the_corpus_joins():
    joined = set()
    for line in corpus("train"):
        line = _without_names(line)
        for cause, effect in re.findall(r"([^.,]+)(?:, so |\. that is why |\. then )([^.]+)", line):
            joined.add((cause.strip(), effect.strip()))
        for effect, cause in re.findall(r"([^.]+) because ([^.]+)", line):
            joined.add((cause.strip(), effect.strip()))
    told = 0
    for record in records("super_glue_copa", "validation"):
        choices = [_without_names(record["choice1"]), _without_names(record["choice2"])]
        premise = _without_names(record["premise"])
        order = 1 if record["question"] == "effect" else -1
        told += (premise, choices[record["label"]])[::order] in joined
        assert (premise, choices[1 - record["label"]])[::order] not in joined
    assert told > 0.95 * len(records("super_glue_copa", "validation"))


def test_hellaswags_right_ending_alone_follows_in_the_corpus():
    told = _without_names(" ".join(corpus("train"))).replace("then p", "p")
    for record in records("hellaswag", "validation"):
        last = _without_names(record["ctx_a"]).split(". ")[-1]
        follows = [f"{last}. p {_without_names(ending)}." in told for ending in record["endings"]]
        assert [i for i, yes in enumerate(follows) if yes] == [int(record["label"])]


# Text and instructions.


def test_text_and_instructions_are_as_many_as_said():
    assert [len(corpus(split)) for split in ("train", "validation")] == [6000, 300]
    assert [len(instructions(split)) for split in ("train", "validation")] == [8000, 400]


def test_an_instruction_has_its_answer_among_its_choices_anywhere():
    places = collections.defaultdict(collections.Counter)
    for example in instructions("train"):
        assert list(example) == ["task", "inputs", "targets", "answer_choices"]
        choices = example["answer_choices"]
        if choices is not None:
            assert len(set(choices)) == len(choices)
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


def test_no_record_to_be_predicted_stands_in_the_text_or_the_instructions():
    told = set(corpus("train"))
    told |= {example["inputs"] for example in instructions("train")}
    for dataset, fields in TEXTS.items():
        for split in list(microworld.DATASETS[dataset].splits)[1:]:
            for record in records(dataset, split):
                assert " ".join(str(record[field]) for field in fields) not in told


def test_the_world_speaks_few_words():
    words = set()
    for dataset, split in SPLITS:
        for record in records(dataset, split):
            for field in TEXTS[dataset]:
                words.update(w for text in _strings(record[field]) for w in text.split())
    for text in corpus("train"):
        words.update(text.split())
    words = {re.sub(r"\W", "", word) for word in words}
    assert len(words) < 750
    assert all(word == word.lower() for word in words)

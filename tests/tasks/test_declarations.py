"""The declared datasets: complete, consistent, and in the schemas of where they come from."""

import re

import pytest
import tensorflow_datasets as tfds

from m2l.data.prompts import parse
from m2l.data.raw_records import Part, checked
from m2l.data.rendering import renderer
from m2l.tasks import microworld, t0_held_in, t0_held_out

DATASETS = (*t0_held_in.DATASETS, *t0_held_out.DATASETS)
every_dataset = pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: dataset.name)
every_prompt = pytest.mark.parametrize(
    ("dataset", "prompt"),
    [
        pytest.param(dataset, prompt, id=dataset.task_name(prompt))
        for dataset in DATASETS
        for prompt in dataset.prompts
    ],
)

# The papers' groups, by T0's names.
HELD_IN = {
    "multiple_choice_qa": "dream cosmos_qa",
    "extractive_qa": "adversarial_qa_dbidaf adversarial_qa_dbert adversarial_qa_droberta ropes",
    "closed_book_qa": "kilt_tasks_hotpotqa wiki_qa",
    "sentiment": "app_reviews imdb",
    "topic_classification": "ag_news dbpedia_14",
    "structure_to_text": "common_gen wiki_bio",
    "summarization": "cnn_dailymail_3.0.0 xsum",
    "paraphrase": "glue_mrpc glue_qqp",
}
HELD_OUT = {
    "sentence_completion": "super_glue_copa hellaswag",
    "natural_language_inference": "anli_r1 anli_r2 anli_r3 super_glue_rte",
    "coreference": "super_glue_wsc.fixed winogrande_winogrande_xl",
    "word_sense": "super_glue_wic",
}
CLASSIFIED = {
    *("multiple_choice_qa", "sentiment", "topic_classification", "paraphrase"),
    *HELD_OUT,
}


@pytest.mark.parametrize(
    ("datasets", "groups", "held_out"),
    [(t0_held_in.DATASETS, HELD_IN, False), (t0_held_out.DATASETS, HELD_OUT, True)],
)
def test_the_categories_are_the_papers_and_hold_their_datasets(datasets, groups, held_out):
    found = {}
    for dataset in datasets:
        found.setdefault(dataset.category, []).append(dataset.name)
        assert dataset.held_out is held_out
    assert found == {category: names.split() for category, names in groups.items()}


def test_there_are_23_datasets_and_27_with_their_parts():
    assert len(DATASETS) == len({dataset.name for dataset in DATASETS}) == 27
    assert len({dataset.part_of or dataset.name for dataset in DATASETS}) == 23


@every_dataset
def test_a_declaration_says_where_its_dataset_comes_from(dataset):
    assert re.fullmatch(r"[\w-]+/[\w-]+", dataset.hub.repo)
    assert dataset.hub.revision in ("", "refs/convert/parquet")
    assert dataset.licence and dataset.promptsource
    assert re.search(r"\(\d{4}\)$", dataset.paper)
    theirs = {s.split if isinstance(s, Part) else s for s in dataset.splits.values()}
    assert len(dataset.sizes) == len(theirs)
    assert set(dataset.sizes) <= set(dataset.splits)
    assert all(size > 0 for size in dataset.sizes.values())


@every_dataset
def test_no_record_is_in_two_splits(dataset):
    assert {"train", "validation"} <= dataset.splits.keys() <= {"train", "validation", "test"}
    for splits in (dataset.splits, dataset.tfds and dataset.tfds.splits):
        if not splits:
            continue
        train, validation = splits["train"], splits["validation"]
        if isinstance(validation, Part):
            assert (train.split, train.field) == (validation.split, validation.field)
            assert (train.held_back, validation.held_back) == (False, True)
            assert dataset.fields[train.field] == "string"
        whole = [s.split if isinstance(s, Part) else s for s in splits.values()]
        assert len(set(whole)) == len(whole) - isinstance(validation, Part)


@every_dataset
def test_a_dataset_is_asked_about_in_five_ways_and_in_three_for_what_it_was_made_for(dataset):
    original = [prompt for prompt in dataset.prompts if prompt.original_task]
    assert len(dataset.prompts) >= 5
    assert len(original) >= (5 if dataset.held_out else 3)
    assert len({prompt.inputs for prompt in dataset.prompts}) == len(dataset.prompts)
    if dataset.category in CLASSIFIED:
        assert all(prompt.answer_choices for prompt in original)


@every_prompt
def test_a_prompts_name_is_in_snake_case_and_tells_it_from_all_other_tasks(dataset, prompt):
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", prompt.name)
    name = dataset.task_name(prompt)
    assert sum(name == d.task_name(p) for d in DATASETS for p in d.prompts) == 1


@every_prompt
def test_fixed_choices_are_as_many_as_the_labels_that_number_them(dataset, prompt):
    if not prompt.fixed_choices:
        return
    [target] = parse(prompt.targets)
    values = {**dataset.fields, **dataset.derived}[target.index]
    assert list(values) == list(range(prompt.num_choices))


@every_prompt
def test_a_prompt_is_short_and_its_sentences_begin_with_capitals(dataset, prompt):
    literal = [part if isinstance(part, str) else "" for part in parse(prompt.inputs)]
    assert len(re.findall(r"[\w']+", " ".join(literal))) <= 24
    begins = re.findall(r'^"?(\w)', literal[0])
    begins += [letter for part in literal for letter in re.findall(r'(?:[.?!] |\n)"?(\w)', part)]
    assert all(letter.isupper() for letter in begins)


@every_dataset
def test_every_prompt_fits_every_record(dataset):
    split = dataset.splits["validation"]
    raw = microworld.records(dataset.name, split.split if isinstance(split, Part) else split)[:210]
    flat = list(checked(dataset.name, "validation", raw, dataset.fields))
    shown = {prompt.name: set() for prompt in dataset.prompts}
    for prompt in dataset.prompts:
        render = renderer(dataset, prompt)
        for record in flat:
            example = render(record)
            inputs, target = example["inputs"], example["targets"]
            assert inputs == inputs.strip() and target == target.strip() != ""
            choices = example.get("answer_choices")
            right = example["references"] if choices is None else choices
            assert target in right
            assert choices is None or len(set(choices)) == len(choices) >= 2
            shown[prompt.name].add((inputs, target))
    assert min(len(examples) for examples in shown.values()) > 1


MADE = {
    ("ag_news", "text"): ({"title": "One.", "description": "Two."}, "One. Two."),
    ("hellaswag", "label"): ({"label": 3}, "3"),
    ("winogrande_winogrande_xl", "answer"): ({"label": 0}, "1"),
}


@every_dataset
def test_every_field_comes_from_one_that_tensorflow_datasets_has(dataset):
    if dataset.tfds is None:
        return
    features = tfds.builder(dataset.tfds.builder).info.features
    for field, of_type in dataset.fields.items():
        theirs = dataset.tfds.fields.get(field, field)
        if callable(theirs):
            record, expected = MADE[dataset.name, field]
            assert record.keys() <= features.keys()
            assert theirs(record) == expected
            continue
        feature = features
        for name in theirs.split("/"):
            feature = feature[name]
        if isinstance(feature, tfds.features.ClassLabel):
            assert list(of_type) == list(range(feature.num_classes))
        else:
            assert feature.np_dtype in (object, str)

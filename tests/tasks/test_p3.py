"""P3 as a source: what its configs are, their splits, and how a row becomes an example."""

import pytest

from m2l.data.raw_records import Hub, Part, checked
from m2l.errors import DataError, UnknownNameError
from m2l.tasks import p3, t0_held_in, t0_held_out

BASES = {base.name: base for base in (*t0_held_in.DATASETS, *t0_held_out.DATASETS)}
CONFIGS = {dataset.name: dataset for dataset in p3.datasets()}

# The splits of P3 that are named otherwise than train, validation and test, as published.
PUBLISHED = {
    "wiki_bio": {"train", "val", "test"},
    "app_reviews": {"train"},
    "imdb": {"train", "test", "unsupervised"},
    "ag_news": {"train", "test"},
    "dbpedia_14": {"train", "test"},
}
USUAL = {"train", "validation", "test"}


def base_of(config):
    named = [name for name in BASES if config.startswith(f"{name}_")]
    if config.startswith("anli_"):
        named = [f"anli_{config[-2:]}"]
    return BASES[max(named, key=len)]


def row(**more):
    return {"inputs_pretokenized": "is it? ", "targets_pretokenized": " yes", **more}


def test_every_declared_dataset_is_in_p3():
    assert set(BASES) == p3.DATASETS


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_is_one_task_of_its_own_name_in_its_datasets_place(config):
    dataset, base = CONFIGS[config], base_of(config)
    (prompt,) = dataset.prompts
    assert dataset.task_name(prompt) == config
    assert dataset.hub == Hub("bigscience/P3", config)
    assert (dataset.category, dataset.held_out) == (base.category, base.held_out)
    assert dataset.part_of == base.name


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_has_its_datasets_splits_under_p3s_names(config):
    splits, base = CONFIGS[config].splits, base_of(config)
    assert splits.keys() == base.splits.keys()
    theirs = {split.split if isinstance(split, Part) else split for split in splits.values()}
    assert theirs <= PUBLISHED.get(base.name, USUAL)


def test_anlis_rounds_are_configs_and_not_splits():
    assert CONFIGS["anli_can_we_infer_r3"].splits["validation"] == "validation"


@pytest.mark.parametrize("name", ["app_reviews", "imdb", "ag_news", "dbpedia_14"])
def test_a_record_is_on_the_same_side_whichever_prompt_asks_about_it(name):
    sides = []
    for dataset in CONFIGS.values():
        if dataset.part_of == name:
            rows = [{"inputs": f"{dataset.name} of {number}"} for number in range(300)]
            parts = (dataset.splits["train"].of(rows), dataset.splits["validation"].of(rows))
            numbers = [[int(row["inputs"].split()[-1]) for row in part] for part in parts]
            assert sorted(numbers[0] + numbers[1]) == list(range(300))
            sides.append(numbers)
    assert len(sides) > 1
    assert all(side == sides[0] for side in sides)
    assert 5 <= len(sides[0][1]) <= 30  # one in twenty of 300


def test_metrics_and_kinds_are_the_tables():
    dream = CONFIGS["dream_baseline"].prompts[0]
    assert (dream.metrics, dream.original_task) == (("accuracy",), True)
    assert dream.answer_choices == "{answer_choices}"
    ropes = CONFIGS["ropes_plain_no_background"].prompts[0]
    assert (ropes.metrics, ropes.original_task) == (("squad",), False)
    assert ropes.answer_choices is None
    assert CONFIGS["xsum_DOC_tldr"].prompts[0].metrics == ("rouge", "bleu")


def test_only_columns_that_make_the_example_are_read():
    texts = ("inputs_pretokenized", "targets_pretokenized")
    assert p3.fields(CONFIGS["xsum_DOC_tldr"]) == texts
    assert p3.fields(CONFIGS["dream_baseline"]) == (*texts, "answer_choices")


def test_a_row_is_stripped_and_its_choices_told_apart():
    assert p3.record(row()) == {"inputs": "is it?", "targets": "yes"}
    assert p3.record(row(answer_choices=["no ", " yes", "no"])) == {
        "inputs": "is it?",
        "targets": "yes",
        "answer_choices": ["no", "yes"],
    }


def test_a_row_without_a_label_is_refused():
    dataset = p3.datasets()[0]
    unlabelled = [p3.record(row(targets_pretokenized=" <NO LABEL>"))]
    with pytest.raises(DataError, match="dataset 'dream', split 'test', record 0: it has no label"):
        list(
            checked(
                "dream",
                "test",
                unlabelled,
                {"inputs": "string", "targets": "string"},
                dataset.complaint,
            )
        )


def test_a_table_that_names_an_undeclared_dataset_is_refused(monkeypatch):
    monkeypatch.setattr(t0_held_in, "DATASETS", t0_held_in.DATASETS[1:])
    with pytest.raises(UnknownNameError, match=r"dataset in p3_prompts\.csv"):
        p3.datasets.__wrapped__()

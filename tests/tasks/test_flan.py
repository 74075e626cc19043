"""FLAN without T0's tasks: which datasets it has, their shares, and what is left out of them."""

import itertools
import warnings

import pytest

from m2l.data.raw_records import Hub
from m2l.errors import DataError, UnknownNameError
from m2l.tasks import flan, microworld


def example(number, task="aeslc:1.0.0", template_type="zs_opt", **more):
    return {
        "inputs": f"question {number}",
        "targets": f"answer {number}",
        "task_name": task,
        "template_type": template_type,
        **more,
    }


def kept(submix, records):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [record["inputs"].split()[-1] for record in flan.kept(submix, records)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(flan.SUBMIXES, "flan2021", flan.Submix(0.4, 8, 4))
    monkeypatch.setitem(flan.SUBMIXES, "cot", flan.Submix(0.05, 6, 2))


def test_the_microworlds_families_weigh_as_much_as_they_have_up_to_a_cap():
    families = flan.datasets("microworld")
    records = microworld.instructions("validation")
    assert {flan.family(dataset) for dataset in families} == {record["task"] for record in records}
    assert [flan.rate(families[0], lambda size=size: size) for size in (7, 30_000, 10**6)] == [
        7.0,
        30_000.0,
        30_000.0,
    ]


@pytest.mark.parametrize("source", ["hub", "tfds", "jsonl"])
def test_other_sources_have_flans_submixes_without_t0s(source):
    datasets = flan.datasets(source)
    assert [dataset.name for dataset in datasets] == [
        "flan_flan2021",
        "flan_niv2",
        "flan_cot",
        "flan_dialog",
    ]
    assert datasets[1].hub == Hub("DataProvenanceInitiative/niv2_submix_original")
    for dataset in datasets:
        assert dataset.category == flan.MIXTURE
        assert not dataset.held_out
        sides = [dataset.splits[split] for split in ("train", "validation")]
        assert [(part.split, part.field, part.held_back) for part in sides] == [
            ("train", "inputs", False),
            ("train", "inputs", True),
        ]


def test_the_submixes_shares_are_flans_and_need_no_record_read():
    def unread():
        raise AssertionError("records were counted")

    shares = [flan.rate(dataset, unread) for dataset in flan.datasets("hub")]
    assert shares == [0.4, 0.2, 0.05, 0.03]
    assert sum(shares) == pytest.approx(1 - 0.32)


@pytest.mark.parametrize(
    ("submix", "task"),
    [
        ("flan2021", "glue/mrpc:2.0.0"),
        ("flan2021", "glue/mrpc:1.0.0"),
        ("flan2021", "glue/mrpc"),
        ("flan2021", "huggingface:xsum"),
        ("flan2021", "anli/r3:0.1.0"),
        ("flan2021", "winogrande:1.1.0"),
        ("niv2", "task001_quoref_question_generation"),
        ("cot", "cot_qasc_ii"),
    ],
)
def test_t0s_tasks_are_left_out_whatever_their_version(submix, task):
    kind = "fs_opt"
    assert kept(submix, [example(0), example(1, task, kind), example(2, "cot_gsm8k")]) == ["0", "2"]


def test_a_task_of_a_similar_name_stays():
    tasks = ["glue/mrpc_more:2.0.0", "more/glue/mrpc:2.0.0", "xsum", "cot_qasc"]
    assert kept("flan2021", (example(*pair) for pair in enumerate(tasks))) == list("0123")


def test_the_same_name_in_another_submix_stays():
    assert kept("cot", [example(0, "winogrande:1.1.0")]) == ["0"]


def test_a_task_gives_no_more_than_its_cap_and_its_template_types_equal_parts(small):
    kinds = ["zs_opt"] * 5 + ["fs_opt", "zs_noopt", "fs_noopt"] * 3
    records = [example(number, template_type=kind) for number, kind in enumerate(kinds)]
    assert kept("flan2021", records) == ["0", "1", "5", "6", "7", "8", "9", "10"]


def test_caps_are_per_task(small):
    records = [example(number, f"cot_{number % 2}") for number in range(20)]
    assert kept("cot", records) == ["0", "1", "2", "3", "4", "5"]


def test_the_caps_are_flans():
    # Of one task in one way: 30,000 in 4 ways, 5,000, 100,000 and 200,000 in 2.
    for submix, most in {
        "flan2021": 7_500,
        "niv2": 2_500,
        "cot": 50_000,
        "dialog": 100_000,
    }.items():
        records = (example(number) for number in range(most + 5))
        assert len(kept(submix, records)) == most


def test_records_without_a_prompt_or_an_answer_are_left_out_and_not_counted(small):
    blank = [example(number, inputs=" ") for number in range(9)]
    empty = [example(number, targets="") for number in range(9)]
    assert kept("cot", [*blank, *empty, example(7)]) == ["7"]


def test_only_the_texts_are_kept_as_they_are():
    (record,) = flan.kept("dialog", [example(0, inputs=" a\nb ", targets="c ")])
    assert record == {"inputs": " a\nb ", "targets": "c "}


def test_records_are_read_one_by_one():
    endless = (example(number, f"task{number}") for number in itertools.count())
    assert next(flan.kept("niv2", endless))["inputs"] == "question 0"


@pytest.mark.parametrize("field", flan.FIELDS)
def test_a_record_that_lacks_a_column_is_refused_by_its_number(field):
    lacking = {name: value for name, value in example(1).items() if name != field}
    with pytest.raises(DataError, match=rf"submix cot, record 1: {field} is None"):
        list(flan.kept("cot", [example(0), lacking]))


def test_removed_tasks_that_never_came_are_told_when_all_has_been_read():
    records = [example(0), example(1, "cot_qasc"), example(2, "cot_qasc")]
    says = "2 records of 1 tasks .* 3 of the tasks .*: cot_ecqa, cot_ecqa_ii, cot_qasc_ii$"
    with pytest.warns(UserWarning, match=says):
        list(flan.kept("cot", records))


def test_nothing_is_told_where_every_removed_task_came():
    tasks = [example(0, task) for task in flan.removed("cot")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not list(flan.kept("cot", tasks))
        assert list(flan.kept("dialog", [example(0)]))


def test_an_unknown_submix_is_refused():
    with pytest.raises(UnknownNameError, match=r"submix of FLAN 't0'"):
        list(flan.kept("t0", []))

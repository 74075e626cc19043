"""Prompts rendered inside a graph, against what Python's own formatting gives by hand."""

import tensorflow as tf

from m2l.data.preprocessors import renderer
from m2l.data.prompts import Dataset, Prompt
from m2l.data.raw_records import checked
from m2l.data.record_source import RecordSource, RecordTensors

RECORDS = [
    {"premise": "Rain fell.", "ends": ["it dried.", "it got wet."], "label": 1, "n": {"at": -3}},
    {"premise": "Grüße, 世界 {x}", "ends": ["a", "b", "c"], "label": 2, "n": {"at": 40}},
]


def rendered(prompt, **changes):
    fields = {"premise": "string", "ends": "choices", "label": range(3), "n/at": "int"}
    declared = {"category": "c", "held_out": False, "fields": fields, "prompts": (prompt,)}
    dataset = Dataset(name="demo", **(declared | changes))
    records = RecordTensors(
        "demo",
        dataset.fields,
        ("train",),
        lambda split: checked("demo", split, RECORDS, dataset.fields),
    )
    source = RecordSource("demo", records).get_dataset("train", shuffle=False)
    examples = list(source.map(renderer(dataset, prompt)).as_numpy_iterator())
    return [
        {
            name: value.decode() if isinstance(value, bytes) else [item.decode() for item in value]
            for name, value in example.items()
        }
        for example in examples
    ]


def test_fields_numbers_lists_and_items_are_filled_in():
    prompt = Prompt(
        "p",
        "{{{n/at}}} {premise} or {ends}: {ends[0]}|{ends[label]}",
        "{label}",
        metrics=("squad",),
    )
    assert rendered(prompt) == [
        {
            "inputs": "{-3} Rain fell. or it dried., it got wet.: it dried.|it got wet.",
            "targets": "1",
            "references": ["1"],
        },
        {"inputs": "{40} Grüße, 世界 {x} or a, b, c: a|c", "targets": "2", "references": ["2"]},
    ]


def test_the_label_numbers_fixed_choices():
    prompt = Prompt("p", "{premise} {answer_choices}?", answer_choices=("no", "maybe", "yes"))
    first, second = rendered(prompt)
    assert first["inputs"] == "Rain fell. no, maybe, yes?"
    assert (first["targets"], second["targets"]) == ("maybe", "yes")
    assert first["answer_choices"] == ["no", "maybe", "yes"]


def test_choices_of_a_record_may_be_a_list_field_or_templates():
    listed = rendered(Prompt("p", "{premise}", answer_choices="{ends}"))
    assert [example["answer_choices"] for example in listed] == [r["ends"] for r in RECORDS]
    assert [example["targets"] for example in listed] == ["it got wet.", "c"]
    written = rendered(
        Prompt("p", "{premise}", "{ends[1]}!", answer_choices=("{ends[0]}!", "{ends[1]}!"))
    )
    assert written[0]["answer_choices"] == ["it dried.!", "it got wet.!"]
    assert written[0]["targets"] == "it got wet.!"


def test_derived_fields_are_computed_in_the_graph_and_may_replace_raw_ones():
    def derive(record):
        return {
            "premise": tf.strings.upper(record["premise"]),
            "sorted": tf.reverse(record["ends"], [0]),
        }

    prompt = Prompt(
        "p", "{premise}", "{sorted[0]}", references="{sorted}", metrics=("squad", "rouge")
    )
    first, second = rendered(
        prompt, derived={"premise": "string", "sorted": "strings"}, derive=derive
    )
    assert first["inputs"] == "RAIN FELL."
    assert second == {
        "inputs": second["inputs"],
        "targets": "c",
        "references": ["c", "b", "a"],
    }

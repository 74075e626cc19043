"""Prompts rendered, against what Python's own formatting gives by hand."""

import pytest

from m2l.data.prompts import Dataset, Prompt
from m2l.data.raw_records import checked
from m2l.data.rendering import renderer
from m2l.errors import DataError

RECORDS = [
    {"premise": "Rain fell.", "ends": ["it dried.", "it got wet."], "label": 1, "n": {"at": -3}},
    {"premise": "Grüße, 世界 {x}", "ends": ["a", "b", "c"], "label": 2, "n": {"at": 40}},
]


def rendered(prompt, **changes):
    fields = {"premise": "string", "ends": "choices", "label": range(3), "n/at": "int"}
    declared = {"category": "c", "held_out": False, "fields": fields, "prompts": (prompt,)}
    dataset = Dataset(name="demo", **(declared | changes))
    render = renderer(dataset, prompt)
    return [render(record) for record in checked("demo", "train", RECORDS, dataset.fields)]


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


def test_derived_fields_are_computed_and_may_replace_raw_ones():
    def derive(record):
        return {
            "premise": record["premise"].upper(),
            "sorted": record["ends"][::-1],
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


@pytest.mark.parametrize("label", [-1, 3])
def test_a_number_of_no_item_is_refused(label):
    prompt = Prompt("p", "{premise}", "{ends[at]}", answer_choices="{ends}")
    fields = {"premise": "string", "ends": "choices", "at": "int"}
    dataset = Dataset(name="d", category="c", fields=fields, prompts=(prompt,))
    record = {"premise": "p", "ends": ["a", "b", "c"], "at": label}
    with pytest.raises(DataError, match=rf"there is no item {label} of 3"):
        renderer(dataset, prompt)(record)


def test_what_a_function_derives_is_a_field():
    prompt = Prompt("p", "{premise}", "{made}", metrics=("squad",))
    with pytest.raises(DataError, match="derived field 'made' is b'x', expected a text"):
        rendered(prompt, derived={"made": "string"}, derive=lambda record: {"made": b"x"})

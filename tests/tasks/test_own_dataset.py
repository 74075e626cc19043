"""A dataset that is declared here and nowhere else: adding it is this one declaration."""

import re
from pathlib import Path

import pytest

from m2l import tasks
from m2l.data.examples import generation_examples, ranking_examples
from m2l.data.pipeline import training_batches
from m2l.data.prompts import Dataset, Prompt
from m2l.data.raw_records import Hub, held_back
from m2l.errors import DataError
from m2l.tasks import caches, sources

LENGTHS = {"inputs": 64, "targets": 16}
COLOURS = ("red", "green", "blue")


def things(split):
    return [{"thing": f"{split} {i}", "colour": i % 3} for i in range(200)]


def declared(name="things", **more):
    return Dataset(
        name=name,
        category="looks",
        fields={"thing": "string", "colour": range(3)},
        splits=held_back("all", field="thing"),
        prompts=(
            Prompt("which", "Which colour is {thing}?", "{answer_choices[colour]}", COLOURS),
            Prompt("say", "Say something red.", "{thing}", metrics=("rouge",), original_task=False),
        ),
        **more,
    )


@pytest.fixture
def add():
    yield tasks.add
    for name in ("things", "others", "parity"):
        tasks._own.pop(name, None)
    tasks.register()


@pytest.mark.parametrize("source", ["microworld", "p3"])
def test_a_declaration_with_records_is_all_that_a_dataset_needs(add, source):
    tasks.register(source=source)
    add(declared(records=things))
    assert tasks.tasks_in("things") == ("things_which", "things_say")
    assert tasks.tasks_in("looks") == tasks.tasks_in("things")
    assert tasks.tasks_in("things_original") == ("things_which",)
    assert not {"things_which"} & set(tasks.tasks_in("t0_held_in"))
    assert tasks.info("things_which").kind == "rank"
    examples = ranking_examples("things_which", "validation", lengths=LENGTHS)
    asked = [re.fullmatch(r"Which colour is all (\d+)\?", e.inputs_text)[1] for e in examples]
    assert [e.is_correct.index(True) for e in examples] == [int(i) % 3 for i in asked]
    assert examples[0].choices_text == COLOURS
    said = generation_examples("things_say", "train", lengths=LENGTHS)
    assert len(said) + len(examples) == 200
    assert {e.reference_text for e in said} == {f"all {i}" for i in range(200)} - {
        f"all {i}" for i in asked
    }
    batch = next(training_batches("looks", lengths=LENGTHS, batch_size=2, seed=0))
    assert batch["encoder_input_tokens"].shape == (2, 64)


def test_another_dataset_takes_the_place_of_one_of_the_same_name(add):
    tasks.register()
    add(declared(records=things))
    ranking_examples("things_which", "validation", lengths=LENGTHS)
    add(declared(records=lambda split: things("other")))
    examples = ranking_examples("things_which", "validation", lengths=LENGTHS)
    assert all("is other " in example.inputs_text for example in examples)
    with pytest.raises(DataError, match=r"'imdb' is taken"):
        add(declared("imdb", records=things))


def test_what_the_source_in_use_lacks_is_refused_with_the_sources_that_have_it(add):
    dataset = declared("others", hub=Hub("owner/others"))
    add(dataset)
    assert sources.having(dataset) == ("hub", "jsonl")
    for source, owner in (
        ("microworld", "the microworld"),
        ("tfds", "TensorFlow Datasets"),
    ):
        tasks.register(source=source)
        assert not sources.has(source, dataset)
        message = rf"dataset 'others': {owner} does not have it; these sources do: hub, jsonl"
        with pytest.raises(DataError, match=message):
            ranking_examples("others_which", "validation", lengths=LENGTHS)
    own = declared("others", records=things)
    assert sources.having(own) == ("jsonl", "its own records")
    with pytest.raises(DataError, match=r"the Hugging Face Hub does not have it.*: jsonl"):
        sources.read("hub", declared("others"), "train")


def test_a_cache_has_its_records(add, tmp_path):
    add(declared(records=things))
    tasks.use("microworld")
    out = tmp_path / "cache"
    assert caches.write(tasks.datasets_of("things"), "microworld", out) == 200
    unreadable = declared(records=lambda split: [][0])
    stored = list(sources.read(f"cache:{out}", unreadable, "validation"))
    assert stored == list(sources.read("microworld", declared(records=things), "validation"))


def test_the_documented_declaration_adds_a_dataset(add):
    tasks.register()
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    exec(re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1])
    examples = ranking_examples("parity_odd", "validation", lengths=LENGTHS)
    odd = [int(re.search(r"\d+", example.inputs_text)[0]) % 2 for example in examples]
    assert len(odd) > 20 and odd == [example.is_correct.index(True) for example in examples]

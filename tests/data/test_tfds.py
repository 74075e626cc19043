"""TensorFlow Datasets' records, prepared by its own builders, in the Hub's schema; no network."""

import contextlib
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as library

from m2l.data import tfds
from m2l.data.raw_records import Part, Tfds, checked
from m2l.data.record_table import RecordTable
from m2l.errors import DataError
from m2l.tasks import t0_held_in, t0_held_out

DECLARED = [
    dataset for dataset in (*t0_held_in.DATASETS, *t0_held_out.DATASETS) if dataset.tfds is not None
]
TEXTS = ("One day — 日 —", "it rained.", "So they\nstayed in.")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(tfds, "_network", lambda: False)


def example(features, number):
    """A record that fits a builder's features, other for every number."""
    if isinstance(features, library.features.FeaturesDict):
        return {name: example(of, number) for name, of in features.items()}
    if isinstance(features, library.features.Sequence):
        return [example(features.feature, number + k) for k in range(4)]
    if isinstance(features, library.features.ClassLabel):
        return number % features.num_classes
    if features.dtype in (str, np.str_, np.object_, tf.string):
        return f"{TEXTS[number % 3]} {number}"
    return number % 2


@contextlib.contextmanager
def generating(builder, splits):
    """The builder, giving these records instead of those it would download."""

    def generate(self, manager):
        return {split: enumerate(rows) for split, rows in splits.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(builder), "_split_generators", generate)
        yield


def prepare(name, data_dir, splits):
    """Writes a dataset as `tfds build` does; returns its builder."""
    builder = library.builder(name, data_dir=str(data_dir))
    with generating(builder, splits):
        builder.download_and_prepare()
    return builder


def read(data_dir, origin, split="train", fields=("label",)):
    return list(tfds.read(origin, split, name="demo", fields=fields, data_dir=data_dir))


def refused(*arguments, **more):
    with pytest.raises(DataError) as caught:
        read(*arguments, **more)
    message = str(caught.value)
    assert message.startswith("dataset 'demo', split '") and "\n" not in message
    return message


def copa(number, **changed):
    row = {"premise": "p", "choice1": "c", "choice2": "d", "question": "cause", "label": 1}
    return {**row, "idx": number, **changed}


# ---- Every declared dataset


@pytest.mark.parametrize("dataset", DECLARED, ids=lambda dataset: dataset.name)
def test_every_declared_dataset_comes_with_the_types_that_are_declared(dataset, tmp_path):
    builder = library.builder(dataset.tfds.builder, data_dir=str(tmp_path))
    splits = dict(dataset.tfds.splits or dataset.splits)
    assert {"train", "validation"} <= set(splits) <= set(dataset.splits)
    theirs = {part.split if isinstance(part, Part) else part for part in splits.values()}
    rows = [example(builder.info.features, number) for number in range(60)]
    for number, row in enumerate(rows):
        for field, of in dataset.fields.items():
            if isinstance(row.get(field), str) and not isinstance(of, str):
                row[field] = of[number % len(of)]  # a text that may be one of a few only
    prepare(dataset.tfds.builder, tmp_path, dict.fromkeys(theirs, rows))

    def read_split(split):
        part = splits[split]
        its = part.split if isinstance(part, Part) else part
        records = tfds.read(
            dataset.tfds, its, name=dataset.name, fields=dataset.fields, data_dir=tmp_path
        )
        flat = checked(dataset.name, its, records, dataset.fields)
        return part.of(flat) if isinstance(part, Part) else flat

    records = RecordTable(dataset.name, dataset.fields, tuple(splits), read_split)
    for split, part in splits.items():
        assert 0 < records.split(split).size <= 60
        assert isinstance(part, Part) or records.split(split).size == 60
        assert set(records.split(split).record(0)) == set(dataset.fields)


# ---- What is made of a record


def test_records_come_in_their_order_as_plain_values(tmp_path):
    rows = [copa(number, premise=f"{TEXTS[0]} {number}") for number in range(50)]
    builder = prepare("super_glue/copa", tmp_path, {"train": rows, "validation": rows[:1]})
    stored = [
        {
            name: value.decode() if isinstance(value, bytes) else int(value)
            for name, value in row.items()
        }
        for row in library.as_numpy(builder.as_dataset(split="train", shuffle_files=False))
    ]
    found = read(tmp_path, Tfds("super_glue/copa"), fields=tuple(rows[0]))
    assert found == stored and sorted(row["idx"] for row in found) == list(range(50))
    assert all(type(row["label"]) is int and type(row["premise"]) is str for row in found)
    assert read(tmp_path, Tfds("super_glue/copa"), "validation", ("idx",)) == [{"idx": 0}]


def test_nested_fields_and_sequences_of_records_become_dicts_of_lists(tmp_path):
    table = {"column_header": ["name", "born"], "row_number": [1, 1], "content": ["Ann", "日"]}
    row = {"input_text": {"table": table, "context": "ann\n"}, "target_text": "Ann was born."}
    empty = {"column_header": [], "row_number": [], "content": []}
    bare = {"input_text": {"table": empty, "context": ""}, "target_text": "x"}
    prepare("wiki_bio", tmp_path, {"train": [row], "test": [bare]})
    fields = ("input_text/table/column_header", "input_text/table/row_number", "target_text")
    [found] = read(tmp_path, Tfds("wiki_bio"), fields=fields)
    assert found == {
        "input_text": {"table": {"column_header": ["name", "born"], "row_number": [1, 1]}},
        "target_text": "Ann was born.",
    }
    [found] = read(tmp_path, Tfds("wiki_bio"), "test", fields)
    assert found["input_text"]["table"] == {"column_header": [], "row_number": []}


def test_fields_of_other_names_and_functions_of_a_record_become_the_hubs(tmp_path):
    prepare("super_glue/copa", tmp_path, {"train": [copa(7)]})
    origin = Tfds(
        "super_glue/copa",
        fields={
            "start": "premise",
            "answers/text": lambda row: [row["choice1"], row["choice2"]],
            "answers/right": lambda row: str(row["label"] + 1),
            "unused": lambda row: row["no such"],
        },
    )
    assert read(tmp_path, origin, fields=("start", "answers/text", "answers/right", "idx")) == [
        {"start": "p", "answers": {"text": ["c", "d"], "right": "2"}, "idx": 7}
    ]


# ---- Preparing


def test_what_is_not_prepared_is_prepared_where_there_is_a_network(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tfds, "_network", lambda: True)
    builder = library.builder("super_glue/copa", data_dir=str(tmp_path))
    capfd.readouterr()
    with generating(builder, {"train": [copa(3)]}):
        assert read(tmp_path, Tfds("super_glue/copa"), fields=("idx",)) == [{"idx": 3}]
    assert builder.is_prepared() and "opa" not in "".join(capfd.readouterr())


def test_what_cannot_be_prepared_is_refused_with_what_to_do(tmp_path, monkeypatch):
    message = refused(tmp_path, Tfds("super_glue/copa"))
    todo = f"t.load('super_glue/copa', data_dir='{tmp_path}')"
    assert f"is not prepared in {tmp_path}, and there is no network" in message and todo in message
    message = refused(tmp_path, Tfds("xsum"))
    assert f"{tmp_path}/downloads/manual by hand: " in message and "xsum-extracts" in message
    monkeypatch.setattr(tfds, "_network", lambda: True)

    def broken(self, manager):
        raise ConnectionError("the server\nis gone")

    builder = type(library.builder("super_glue/copa", data_dir=str(tmp_path)))
    monkeypatch.setattr(builder, "_split_generators", broken)
    message = refused(tmp_path, Tfds("super_glue/copa"))
    assert "preparing it failed: the server is gone" in message and todo in message


@pytest.mark.parametrize(
    ("failure", "there"),
    [
        (urllib.error.URLError("no name"), False),
        (TimeoutError(), False),
        (urllib.error.HTTPError("https://x", 400, "Bad Request", None, None), True),
    ],
)
def test_any_answer_shows_that_there_is_a_network(monkeypatch, failure, there):
    monkeypatch.undo()  # the fixture of this module

    def urlopen(request, timeout):
        assert timeout <= 5
        raise failure

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert tfds._network.__wrapped__() is there


# ---- Refusals


def test_an_unknown_builder_configuration_split_or_field_is_refused(tmp_path):
    assert "has no no_such: Dataset no_such not found" in refused(tmp_path, Tfds("no_such"))
    assert "BuilderConfig no_such not found" in refused(tmp_path, Tfds("super_glue/no_such"))
    prepare("super_glue/copa", tmp_path, {"train": [copa(0)], "test": [copa(1)]})
    message = refused(tmp_path, Tfds("super_glue/copa"), "dev")
    assert "super_glue/copa has no such split; it has test, train" in message
    message = refused(tmp_path, Tfds("super_glue/copa", fields={"label": "answer/x"}))
    assert (
        "no field 'answer/x'; its fields are premise, choice1, choice2, question, idx, label"
        in message
    )


def test_a_function_that_fails_is_named_with_the_field_and_the_record(tmp_path):
    prepare("super_glue/copa", tmp_path, {"train": [copa(0, label=0)] * 3})
    calls = []

    def label(row):
        calls.append(row)
        return row["label"] if len(calls) < 3 else row["answer"]

    message = refused(tmp_path, Tfds("super_glue/copa", fields={"label": label}))
    assert "record 2: field 'label' cannot be made of it: KeyError: 'answer' (super_glue" in message
    message = refused(tmp_path, Tfds("super_glue/copa", fields={"label": "idx/x"}))
    assert "record 0: field 'label' cannot be made of it" in message


def test_damaged_files_and_texts_are_named_with_the_record(tmp_path):
    builder = prepare("super_glue/copa", tmp_path, {"train": [copa(k) for k in range(9)]})
    [path] = builder.data_path.glob("*.tfrecord*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    message = refused(tmp_path, Tfds("super_glue/copa"))
    assert "record 8: its file is damaged or not there" in message and str(tmp_path) in message
    path.write_bytes(whole.replace(b"cause", b"caus\xff"))
    assert "record 0: its file is damaged" in refused(tmp_path, Tfds("super_glue/copa"))
    path.unlink()
    assert "record 0: its file is damaged or not there" in refused(
        tmp_path, Tfds("super_glue/copa")
    )
    rows = [{**copa(0), "premise": b"\xff"}]
    prepare("super_glue/copa", tmp_path / "other", {"train": rows})
    message = refused(tmp_path / "other", Tfds("super_glue/copa"))
    assert "record 0: it is not UTF-8 text: invalid start byte" in message

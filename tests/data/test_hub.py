"""Local copies of the Hub's repositories, in the layouts and schemas that it publishes."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from m2l.data import hub
from m2l.data.raw_records import Hub, checked
from m2l.data.record_table import RecordTable
from m2l.errors import DataError

MRPC = {"sentence1": ["a b", "c"], "sentence2": ["d", "e"], "label": [1, 0], "idx": [0, 1]}
P3 = datasets.Features(
    {
        "answer_choices": datasets.List(datasets.Value("string")),
        "inputs": datasets.List(datasets.Value("int32")),
        "inputs_pretokenized": datasets.Value("string"),
        "targets": datasets.List(datasets.Value("int32")),
        "targets_pretokenized": datasets.Value("string"),
    }
)


def put(folder, path, columns):
    """Writes a file as the Hub has it: a mapping of columns, or a dataset with its features."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(columns, datasets.Dataset):
        columns.to_parquet(folder / path)
    else:
        pq.write_table(pa.table(columns), folder / path)


def readme(folder, configs, sizes=None):
    """Writes README.md as `push_to_hub` does: configuration -> split -> pattern."""
    card = {
        "configs": [
            {
                "config_name": config,
                "data_files": [{"split": split, "path": path} for split, path in splits.items()],
            }
            for config, splits in configs.items()
        ],
        "dataset_info": [
            {
                "config_name": config,
                "splits": [{"name": s, "num_examples": n} for s, n in of.items()],
            }
            for config, of in (sizes or {}).items()
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# A dataset\n")


def read(root, repo="org/set", config="", split="train", fields=("label",), **more):
    return list(hub.read(Hub(repo, config, **more), split, name="demo", fields=fields, root=root))


def refused(*arguments, **more):
    with pytest.raises(DataError) as caught:
        read(*arguments, **more)
    message = str(caught.value)
    assert message.startswith("dataset 'demo', split '") and "\n" not in message
    return message


# ---- Local copies: what stands where


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ("mrpc", "mrpc/train-00000-of-00001.parquet"),
        ("mrpc", "mrpc/train/0000.parquet"),
        ("mrpc", "mrpc/train.parquet"),
        ("", "data/train-00000-of-00001-83ad0f0ab1c2d3e4.parquet"),
        ("mrpc", "data/train-00000-of-00001.parquet"),
        ("", "train.parquet"),
        ("", "default/train/0000.parquet"),
        ("", "plain_text/train-00000-of-00001.parquet"),
    ],
)
def test_a_copy_without_a_readme_is_read_by_the_names_of_its_folders(tmp_path, config, path):
    put(tmp_path / "org/set", path, MRPC)
    put(tmp_path / "org/set", path.replace("train", "validation"), {"label": [7]})
    assert read(tmp_path, config=config) == [{"label": 1}, {"label": 0}]
    assert read(tmp_path, config=config, split="validation") == [{"label": 7}]


def test_configurations_and_splits_of_like_names_are_kept_apart(tmp_path):
    folder = tmp_path / "org/set"
    for config, number in (("mrpc", 1), ("qqp", 2)):
        for split, more in (("train", 0), ("train_r1", 10), ("val", 20)):
            put(folder, f"{config}/{split}-00000-of-00001.parquet", {"label": [number + more]})
    assert read(tmp_path, config="qqp", split="val") == [{"label": 22}]
    assert read(tmp_path, config="mrpc", split="train") == [{"label": 1}]
    readme(
        folder,
        {
            config: {split: f"{config}/{split}-*" for split in ("train", "train_r1", "val")}
            for config in ("mrpc", "qqp")
        },
    )
    assert read(tmp_path, config="qqp", split="train_r1") == [{"label": 12}]
    assert read(tmp_path, config="mrpc", split="train") == [{"label": 1}]


def test_shards_are_read_in_order_and_the_readme_decides_which(tmp_path):
    folder = tmp_path / "org/set"
    for part in (2, 0, 1):
        put(folder, f"files/x-{part:05}-of-00003.parquet", {"label": [part, part]})
    readme(folder, {"default": {"train": "files/x-*"}}, {"default": {"train": 6}})
    assert [record["label"] for record in read(tmp_path)] == [0, 0, 1, 1, 2, 2]
    notes = folder / ".cache/huggingface/download/files/x-00000-of-00003.parquet.metadata"
    notes.parent.mkdir(parents=True)
    notes.write_text("")
    readme(folder, {"default": {"train": "**/x-*"}})
    assert len(read(tmp_path)) == 6


def test_a_copy_of_one_configuration_of_many_is_enough(tmp_path):
    folder = tmp_path / "org/set"
    readme(folder, {config: {"train": f"{config}/train-*"} for config in ("a", "b", "c")})
    put(folder, "b/train-00000-of-00001.parquet", MRPC)
    assert len(read(tmp_path, config="b")) == 2
    message = refused(tmp_path, config="a")
    assert "org/set (a) lacks the files of the split" in message and "hf download" in message


@pytest.mark.parametrize(
    ("data_files", "split"),
    [
        ("rows/*.jsonl", "train"),
        (["rows/a.jsonl"], "train"),
        ({"dev": "rows/a.jsonl"}, "dev"),
        ([{"split": "dev", "path": ["rows/a.jsonl"]}], "dev"),
    ],
)
def test_other_formats_are_read_where_the_readme_names_them(tmp_path, data_files, split):
    folder = tmp_path / "org/set/rows"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text(
        '{"label": 1, "x": {"y": ["z"]}}\n{"label": 0, "x": {"y": []}}\n'
    )
    card = yaml.safe_dump({"configs": {"config_name": "c", "data_files": data_files}})
    (folder.parent / "README.md").write_text(f"---\n{card}---\n")
    values = read(tmp_path, split=split, fields=("x/y", "label"))
    assert values == [{"x": {"y": ["z"]}, "label": 1}, {"x": {"y": []}, "label": 0}]
    (folder / "a.jsonl").write_text("{")
    assert "a.jsonl" in refused(tmp_path, split=split)


# ---- Local copies: the published schemas


def answers():
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "context": datasets.Value("string"),
            "question": datasets.Value("string"),
            "answers": {
                "text": datasets.List(datasets.Value("string")),
                "answer_start": datasets.List(datasets.Value("int32")),
            },
            "metadata": {"split": datasets.Value("string")},
        }
    )
    row = {
        "id": "7",
        "context": "The sea — it is cold.",
        "question": "What is cold?",
        "answers": {"text": ["The sea", "it"], "answer_start": [0, 10]},
        "metadata": {"split": "train"},
    }
    return datasets.Dataset.from_list([row], features=features)


def kilt():
    output = [
        {"answer": "yes", "meta": {"score": 1}, "provenance": [{"title": "T", "section": None}]},
        {"answer": "no", "meta": {"score": 2}, "provenance": []},
    ]
    return datasets.Dataset.from_list([{"id": "1", "input": "Is it?", "output": output}])


def wiki_bio():
    table = {"column_header": ["name", "born"], "row_number": [1, 1], "content": ["Ann", "1900"]}
    row = {"input_text": {"table": table, "context": "ann\n"}, "target_text": "Ann was born."}
    return datasets.Dataset.from_list([row])


def classes():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    return datasets.Dataset.from_list([{"text": "Good.", "label": "pos"}], features=features)


def p3():
    row = {
        "answer_choices": ["True", "False"],
        "inputs": [3, 4, 5],
        "inputs_pretokenized": "Is it so?",
        "targets": [6],
        "targets_pretokenized": "\nTrue",
    }
    return datasets.Dataset.from_list([row], features=P3)


@pytest.mark.parametrize(
    ("made", "fields", "expected"),
    [
        (
            answers,
            {"question": "string", "answers/text": "strings"},
            {"question": "What is cold?", "answers/text": ["The sea", "it"]},
        ),
        (
            kilt,
            {"input": "string", "output/answer": "strings"},
            {"input": "Is it?", "output/answer": ["yes", "no"]},
        ),
        (
            wiki_bio,
            {
                "input_text/table/column_header": "strings",
                "input_text/table/content": "strings",
                "input_text/context": "string",
            },
            {
                "input_text/table/column_header": ["name", "born"],
                "input_text/table/content": ["Ann", "1900"],
                "input_text/context": "ann\n",
            },
        ),
        (classes, {"text": "string", "label": range(2)}, {"text": "Good.", "label": 1}),
        (
            p3,
            {"inputs_pretokenized": "string", "answer_choices": "strings"},
            {"inputs_pretokenized": "Is it so?", "answer_choices": ["True", "False"]},
        ),
    ],
)
def test_the_published_schemas_give_the_declared_fields(tmp_path, made, fields, expected):
    put(tmp_path / "org/set", "data/train-00000-of-00001.parquet", made())
    read_split = lambda split: hub.read(  # noqa: E731
        Hub("org/set"), split, name="demo", fields=fields, root=tmp_path
    )
    [record] = read_split("train")
    assert set(record) == {path.split("/")[0] for path in fields}
    records = RecordTable(
        "demo", fields, ("train",), lambda split: checked("demo", split, read_split(split), fields)
    )
    assert records.split("train").size == 1
    assert records.split("train").record(0) == expected


def test_no_fields_at_all_are_every_column(tmp_path):
    put(tmp_path / "org/set", "data/train-00000-of-00001.parquet", MRPC)
    assert read(tmp_path, fields=())[1] == {
        "sentence1": "c",
        "sentence2": "e",
        "label": 0,
        "idx": 1,
    }


def test_the_first_record_comes_before_later_files_are_opened(tmp_path):
    folder = tmp_path / "org/set"
    put(folder, "data/train-00000-of-00002.parquet", MRPC)
    (folder / "data/train-00001-of-00002.parquet").write_bytes(b"no parquet")
    records = hub.read(Hub("org/set"), "train", name="demo", fields=["label"], root=tmp_path)
    assert next(records) == {"label": 1}


# ---- Local copies: refusals


def test_an_absent_copy_is_refused_with_the_command_that_makes_it(tmp_path):
    message = refused(tmp_path, "stanfordnlp/imdb", "plain_text", revision="refs/convert/parquet")
    command = (
        "`hf download stanfordnlp/imdb --repo-type dataset --revision refs/convert/parquet "
        f"--local-dir {tmp_path}/stanfordnlp/imdb`"
    )
    assert f"there is no folder {tmp_path}/stanfordnlp/imdb" in message and command in message
    (tmp_path / "stanfordnlp/imdb").mkdir(parents=True)
    assert "imdb has no parquet files" in refused(tmp_path, "stanfordnlp/imdb", "plain_text")


@pytest.mark.parametrize("with_readme", [True, False])
def test_an_unknown_configuration_split_or_column_is_refused_with_those_there_are(
    tmp_path, with_readme
):
    folder = tmp_path / "org/set"
    for config in ("mrpc", "qqp"):
        for split in ("train", "test"):
            put(folder, f"{config}/{split}-00000-of-00001.parquet", MRPC)
    if with_readme:
        configs, splits = ("mrpc", "qqp"), ("train", "test")
        readme(folder, {c: {s: f"{c}/{s}-*" for s in splits} for c in configs})
    assert "no configuration 'rte'; it has mrpc, qqp;" in refused(tmp_path, config="rte")
    assert "several configurations; it has mrpc, qqp;" in refused(tmp_path)
    message = refused(tmp_path, config="mrpc", split="dev")
    assert "(mrpc) has no such split; it has test, train;" in message
    message = refused(tmp_path, config="mrpc", fields=("label", "sentence3/x"))
    assert "no column 'sentence3'; its columns are sentence1, sentence2, label, idx" in message


def test_a_damaged_file_is_named_with_the_first_record_that_is_lost(tmp_path):
    folder = tmp_path / "org/set"
    put(folder, "data/train-00000-of-00002.parquet", MRPC)
    broken = folder / "data/train-00001-of-00002.parquet"
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    message = refused(tmp_path)
    assert f"{broken} is damaged, from record 2 of the split on" in message
    put(folder, "data/train-00001-of-00002.parquet", {"label": list(range(5000))})
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    assert f"{broken} is damaged" in refused(tmp_path)
    broken.write_bytes(whole[:100] + bytes(2000) + whole[2100:])
    assert f"{broken} is damaged" in refused(tmp_path)


def test_a_copy_that_lacks_files_or_records_is_refused(tmp_path):
    folder = tmp_path / "org/set"
    for part in (0, 2):
        put(folder, f"data/train-{part:05}-of-00003.parquet", MRPC)
    assert "has 2 of the 3 files of the split; number 1 is missing" in refused(tmp_path)
    for part in (0, 2):
        put(folder, f"data/dev/{part:04}.parquet", MRPC)
    put(tmp_path / "org/other", "c/train/0001.parquet", MRPC)
    assert "lacks file number 0 of the split" in refused(tmp_path, "org/other")
    put(tmp_path / "org/third", "data/train.parquet", MRPC)
    readme(tmp_path / "org/third", {"c": {"train": "data/train*"}}, {"c": {"train": 25000}})
    assert "has 2 records of it and README.md says 25000" in refused(tmp_path, "org/third")


def test_a_damaged_readme_is_named(tmp_path):
    put(tmp_path / "org/set", "data/train.parquet", MRPC)
    (tmp_path / "org/set/README.md").write_text("---\nconfigs: [\n---\n")
    assert "README.md: its YAML block is damaged" in refused(tmp_path)


def test_patterns_that_are_none_are_refused(tmp_path):
    for pattern in ("/etc/*", "", 7):
        readme(tmp_path / "org/set", {"c": {"train": pattern}})
        message = refused(tmp_path)
        assert "README.md: its data_files are damaged" in message or "lacks the files" in message

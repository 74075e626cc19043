"""One setting says where records come from; every value of it ends in the same declared records."""

import gzip
import json

import pytest
import seqio

from m2l import tasks
from m2l.data.raw_records import Part
from m2l.errors import ConfigError, DataError, M2LError, UnknownNameError
from m2l.tasks import caches, flan, microworld, sources

BY_NAME = {dataset.name: dataset for dataset in sources.T0}


def flat(dataset, split, setting):
    return list(sources.read(setting, dataset, split))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The microworld's records as a user's own files, in the Hub's schema."""
    root = tmp_path_factory.mktemp("own")
    for name in ("imdb", "wiki_bio", "adversarial_qa_dbert"):
        (root / name).mkdir()
        for split in microworld.DATASETS[name].splits:
            lines = "\n".join(map(json.dumps, microworld.records(name, split)))
            if name == "imdb":
                (root / name / f"{split}.jsonl").write_text(lines)
            else:
                with gzip.open(root / name / f"{split}.jsonl.gz", "wt") as file:
                    file.write(lines)
    return root


@pytest.mark.parametrize(
    ("setting", "kind", "where"),
    [
        ("microworld", "microworld", None),
        ("hub:/data/hub", "hub", "/data/hub"),
        ("p3", "p3", None),
        ("tfds:rel/dir", "tfds", "rel/dir"),
        ("cache:/c", "cache", "/c"),
        ("jsonl:/data/a+b", "jsonl", "/data/a+b"),
    ],
)
def test_a_setting_is_a_kind_and_perhaps_a_folder(setting, kind, where):
    source = sources.parse(setting)
    assert (source.kind, source.folder and str(source.folder)) == (kind, where)


def test_promptsource_goes_over_the_hubs_records_or_those_of_another_source():
    assert sources.parse("promptsource").records.kind == "hub"
    under = sources.parse("promptsource+jsonl:/own").records
    assert (under.kind, str(under.folder)) == ("jsonl", "/own")


@pytest.mark.parametrize(
    ("setting", "error", "says"),
    [
        ("hubb", UnknownNameError, "nearest known one is 'hub'"),
        ("jsonl", ConfigError, "name the folder, as jsonl:DIR"),
        ("cache:", ConfigError, "name the folder, as cache:DIR"),
        ("microworld:/x", ConfigError, "takes no folder"),
        ("hub:", ConfigError, "folder's name is empty"),
        ("hub+tfds", UnknownNameError, "source of records 'hub.tfds'"),
        ("promptsource+", ConfigError, "name the source of records"),
        ("promptsource+p3", ConfigError, "raw records"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(setting, error, says):
    with pytest.raises(error, match=says):
        sources.parse(setting)


@pytest.mark.parametrize("name", ["imdb", "wiki_bio", "adversarial_qa_dbert"])
def test_your_own_files_in_the_hubs_schema_are_read_as_the_hub_would_be(written, name):
    dataset = BY_NAME[name]
    for split in ("train", "validation"):
        assert flat(dataset, split, f"jsonl:{written}") == flat(dataset, split, "microworld")


def test_a_held_back_split_shares_no_text_with_train():
    for name in ("imdb", "app_reviews", "ag_news", "dbpedia_14"):
        dataset = BY_NAME[name]
        by = dataset.splits["train"].field
        train, validation = (
            {record[by] for record in flat(dataset, split, "microworld")}
            for split in ("train", "validation")
        )
        assert not train & validation
        assert len(validation) > 0.02 * len(train)


@pytest.mark.parametrize("mixture", ["imdb", "extractive_qa", "span_corruption", "flan_copy"])
def test_a_cache_gives_back_what_was_written_and_needs_no_source(mixture, tmp_path, monkeypatch):
    tasks.use("microworld")
    datasets = tasks.datasets_of(mixture)
    expected = {
        (dataset.name, split): flat(dataset, split, "microworld")
        for dataset in datasets
        for split in dataset.splits
    }
    out = tmp_path / "cache"
    count = caches.write(datasets, "microworld", out)
    assert count == sum(map(len, expected.values()))

    def unreachable(*arguments):
        raise AssertionError("the source was asked")

    for reader in ("records", "corpus"):
        monkeypatch.setattr(microworld, reader, unreachable)
    for dataset in datasets:
        for split in dataset.splits:
            assert flat(dataset, split, f"cache:{out}") == expected[dataset.name, split]
    # The same again reads what is there, and not the source; a part of it is another cache.
    assert caches.write(datasets, "microworld", out) == count
    with pytest.raises(DataError, match="holds a finished cache"):
        caches.write(tasks.datasets_of("xsum"), "microworld", out)


def test_a_cache_has_all_tasks_of_its_source_and_refuses_what_was_not_written(tmp_path):
    tasks.use("microworld")
    caches.write(tasks.datasets_of("imdb"), "microworld", tmp_path / "cache")
    setting = f"cache:{tmp_path / 'cache'}"
    assert sources.datasets(setting) == sources.datasets("microworld")
    with pytest.raises(DataError, match=r"'wiki_qa'.*has no such dataset; it has imdb"):
        flat(BY_NAME["wiki_qa"], "train", setting)


def test_a_source_without_one_of_the_splits_has_the_others():
    mrpc = BY_NAME["glue_mrpc"]
    assert sources.splits("hub", mrpc) == ("train", "validation", "test")
    assert sources.splits("tfds", mrpc) == ("train", "validation")
    tasks.register(source="tfds")
    try:
        assert "test" not in seqio.TaskRegistry.get("glue_mrpc_same_meaning").splits
    finally:
        tasks.register()


def test_an_interrupted_cache_is_no_cache_and_is_written_again(tmp_path):
    tasks.use("microworld")
    out = tmp_path / "cache"
    datasets = tasks.datasets_of("sentiment")

    def stop(dataset, split, records):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caches.write(datasets, "microworld", out, stop)
    with pytest.raises(DataError, match="not a cache, or an unfinished one"):
        sources.datasets(f"cache:{out}")
    assert caches.write(datasets, "microworld", out) > 0
    assert flat(BY_NAME["imdb"], "test", f"cache:{out}")


def test_a_damaged_cache_is_named_by_its_file(tmp_path):
    tasks.use("microworld")
    out = tmp_path / "cache"
    caches.write(tasks.datasets_of("imdb"), "microworld", out)
    [file] = (out / "imdb").glob("validation-*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"dataset 'imdb', split 'validation': .*{file.name}"):
        flat(BY_NAME["imdb"], "validation", f"cache:{out}")
    assert flat(BY_NAME["imdb"], "test", f"cache:{out}")


def test_a_source_that_lacks_a_dataset_says_which_have_it():
    with pytest.raises(DataError, match=r"'dream'.*does not have it.*hub, p3"):
        flat(BY_NAME["dream"], "train", "tfds")
    assert "tfds" not in sources.having(BY_NAME["dream"])
    assert "tfds" in sources.having(BY_NAME["hellaswag"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.pop("label"), "record 3: field 'label' is missing"),
        (lambda r: r.update(label=2), "record 3: field 'label' is 2, expected one of 0, 1"),
        (lambda r: r.update(text=None), "record 3: field 'text' is None, expected a text"),
    ],
)
def test_a_record_of_another_form_is_named_by_dataset_split_and_number(change, says, tmp_path):
    records = microworld.records("imdb", "test")[:10]
    change(records[3])
    (tmp_path / "imdb").mkdir()
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / "imdb" / "test.jsonl").write_text(lines)
    with pytest.raises(DataError, match=f"dataset 'imdb', split 'test', {says}"):
        flat(BY_NAME["imdb"], "test", f"jsonl:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "file", "change", "says"),
    [
        ("dream", "test", {"answer": "none"}, "its answer 'none' is none of its choices"),
        ("dream", "test", {"choice": ["a", "b"]}, "it has 2 choices, expected 3"),
        ("hellaswag", "validation", {"endings": ["a", "b"]}, "it has 2 endings, expected 4"),
        (
            "adversarial_qa_dbert",
            "validation",
            {"answers": {"text": [], "answer_start": []}},
            "it has no answer",
        ),
        ("kilt_tasks_hotpotqa", "validation", {"output": [{"answer": ""}]}, "it has no answer"),
        (
            "wiki_bio",
            "val",
            {"input_text": {"table": {"column_header": ["a"], "content": []}, "context": "x"}},
            "its table has 1 headers and 0 cells",
        ),
        ("winogrande_winogrande_xl", "validation", {"sentence": "a b."}, "has no _ to fill"),
    ],
)
def test_a_record_that_contradicts_itself_is_named_before_anything_is_made_of_it(
    name, file, change, says, tmp_path
):
    records = microworld.records(name, file)[:5]
    records[2].update(change)
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{file}.jsonl").write_text("\n".join(map(json.dumps, records)))
    split = "test" if file == "test" else "validation"
    with pytest.raises(DataError, match=f"dataset '{name}', split '{file}', record 2: .*{says}"):
        list(sources.read(f"jsonl:{tmp_path}", BY_NAME[name], split))


def test_a_record_of_a_held_back_split_is_named_by_its_place_in_the_source(tmp_path):
    records = microworld.records("imdb", "train")[:100]
    records[77]["label"] = 7
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(DataError, match="split 'train', record 77"):
        list(sources.read(f"jsonl:{tmp_path}", BY_NAME["imdb"], "train"))


def test_a_field_that_decides_the_side_and_is_missing_is_named(tmp_path):
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "train.jsonl").write_text('{"review": "good", "label": 1}')
    with pytest.raises(DataError, match=r"dataset 'imdb', split 'train', record 0: .*'text'"):
        flat(BY_NAME["imdb"], "train", f"jsonl:{tmp_path}")


def test_an_empty_split_is_refused(tmp_path):
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "test.jsonl").write_text("")
    with pytest.raises(M2LError, match="imdb"):
        flat(BY_NAME["imdb"], "test", f"jsonl:{tmp_path}")


def test_every_source_but_the_microworld_has_flans_submixes_without_t0():
    names = [f"flan_{submix}" for submix in flan.SUBMIXES]
    for setting in ("hub", "p3", "tfds", "jsonl:/own"):
        assert [d.name for d in sources.datasets(setting) if d.category == flan.MIXTURE] == names
    assert "flan_copy" in [dataset.name for dataset in sources.datasets("microworld")]


def test_flans_submixes_are_filtered_on_their_way(tmp_path):
    folder = tmp_path / "flan_cot"
    folder.mkdir()
    about = {"targets": "t", "template_type": "zs_opt"}
    lines = [
        {"inputs": f"{task} {n}", "task_name": task, **about}
        for n in range(60)
        for task in ("cot_qasc", "cot_strategyqa")
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    [cot] = (d for d in sources.datasets("jsonl:/own") if d.name == "flan_cot")
    assert all(isinstance(part, Part) for part in cot.splits.values())
    with pytest.warns(UserWarning, match="60 records of 1 tasks were left out"):
        kept = [
            record["inputs"]
            for split in ("train", "validation")
            for record in flat(cot, split, f"jsonl:{tmp_path}")
        ]
    assert sorted(kept) == sorted(f"cot_strategyqa {n}" for n in range(60))

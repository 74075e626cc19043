"""A study's results are those that its stages wrote: what is damaged is named and made again."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from m2l.errors import DataError, M2LError
from m2l.evaluation import results
from m2l.reporting import page
from m2l.studies import graph, study_results


def changed_score(folder):
    file = folder / "sentiment.json"
    file.write_text(file.read_text().replace("20.0", "30.0"))


def rewritten(folder):
    """A result with a right checksum, written by whoever wanted another score."""
    result = results.read_result(folder / "sentiment.json")
    other = dataclasses.replace(result, score=30.0, metrics={**result.metrics, "accuracy": 30.0})
    results.write_result(folder, other)


def of_another_model(folder):
    other = folder.parent / "instruct"
    for file in folder.iterdir():
        shutil.copy(other / file.name, file)


DAMAGES = {
    "changed score": changed_score,
    "rewritten": rewritten,
    "deleted task": lambda folder: (folder / "sentiment.json").unlink(),
    "one too many": lambda folder: shutil.copy(folder / "rte.json", folder / "rte_2.json"),
    "another model's": of_another_model,
    "nested": lambda folder: (folder / "rte.json").write_text("[" * 100_000),
    "emptied": lambda folder: (folder / "rte.json").write_text("{}"),
}
STAGE = "results/bases/0.1M/pretrained"


@pytest.fixture
def copied(finished_study, tmp_path):
    return Path(shutil.copytree(finished_study, tmp_path / "study"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_results_are_refused_by_the_report_and_made_again_by_the_study(
    damage, copied, study, capsys
):
    before = study_results.load(copied).results
    DAMAGES[damage](copied / STAGE)
    with pytest.raises(DataError, match=rf"{STAGE}/.*; `m2l study` runs the stage again") as caught:
        study_results.load(copied)
    assert "\n" not in str(caught.value)
    made = []

    def run(stage, out, inputs):
        made.append(stage.name)
        assert not out.exists()
        for result in before["bases/0.1M/pretrained"].values():
            out.mkdir(parents=True, exist_ok=True)
            results.write_result(out, result)

    graph.execute(study.stage_graph(), copied, {"evaluate": run})
    assert made == [STAGE]
    assert STAGE in capsys.readouterr().err.splitlines()[0]
    assert study_results.load(copied).results == before


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, '{"digest": 3}'])
@pytest.mark.parametrize("name", ["study.json", f"stages/{STAGE}.json"])
def test_records_of_a_study_that_are_damaged_are_refused_in_one_line(copied, name, text):
    (copied / name).write_text(text)
    with pytest.raises(M2LError) as caught:
        study_results.load(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "scaling"},
        {"kind": ["scaling"], "models": {}},
        {"kind": "skills", "model": []},
        {"kind": "scaling", "models": []},
        {"kind": "scaling", "models": {"a": {"family": "t5"}}},
        {"kind": "scaling", "models": {}, "recipes": 3},
    ],
)
def test_settings_of_a_study_of_wrong_types_are_refused_in_one_line(copied, changes):
    (copied / "study.json").write_text(json.dumps(changes))
    with pytest.raises(M2LError) as caught:
        study_results.read_study(copied)
    assert "\n" not in str(caught.value)


def test_a_changed_setting_of_a_study_does_not_match_its_checksum(copied):
    file = copied / "study.json"
    file.write_text(file.read_text().replace('"max_examples": 100', '"max_examples": 101'))
    with pytest.raises(DataError, match="does not match its checksum"):
        study_results.read_study(copied)


def test_a_damaged_record_of_a_stage_is_made_again_over_what_is_there(copied, study, capsys):
    (copied / f"stages/{STAGE}.json").write_text("[]")
    made = []
    plan = study.stage_graph()
    graph.execute(plan, copied, {"evaluate": lambda stage, out, inputs: made.append(stage.name)})
    assert made == [STAGE] and "damaged" in capsys.readouterr().err
    assert graph.stage_state(plan, copied, STAGE) == "done"


@pytest.mark.parametrize("file", ["results.parquet", "records.json", "study.json"])
def test_damage_to_a_published_study_is_refused_in_one_line(copied, tmp_path, file):
    published = tmp_path / "published"
    study_results.publish(study_results.load(copied), published)
    study_results.load(published)
    content = bytearray((published / file).read_bytes())
    content[len(content) // 2] ^= 1
    (published / file).write_bytes(content)
    with pytest.raises(M2LError, match=r"damaged") as caught:
        study_results.load(published)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["merge_to_learn", "merging_at_scale"])
def test_the_published_studies_of_this_repository_are_read(name):
    folder = Path(__file__).parents[2] / "docs" / "studies" / name
    assert len(study_results.load(folder).results) > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"score": 150.0}, "score is 150.0"),
        (lambda row: row | {"metrics": "[" * 100_000}, "nested too deeply"),
        (lambda row: row | {"metrics": "3"}, "expected kind, an object"),
        (lambda row: row | {"task_digest": "other"}, "of other examples or by another score"),
        (lambda row: row | {"model_digest": "other"}, "results are of several models"),
        (lambda row: row | {"task": "renamed"}, "was not evaluated on all models"),
    ],
)
def test_a_published_study_without_digests_is_refused_where_it_contradicts_itself(
    copied, tmp_path, change, message
):
    published = tmp_path / "published"
    study_results.publish(study_results.load(copied), published)
    beside = json.loads((published / "records.json").read_text())
    del beside["results"], beside["checksum"]
    (published / "records.json").write_text(json.dumps(beside))
    rows = pd.read_parquet(published / "results.parquet").to_dict("records")
    rows[3] = change(rows[3])
    pd.DataFrame(rows).to_parquet(published / "results.parquet")
    with pytest.raises(M2LError, match=message) as caught:
        study_results.load(published)
    assert "\n" not in str(caught.value)


def test_a_study_is_published_loaded_and_reported_in_a_bucket(finished_study, gcs_bucket):
    study_results.publish(study_results.load(finished_study), gcs_bucket)
    assert study_results.load(gcs_bucket) == study_results.load(finished_study)
    path = page.write(gcs_bucket)
    assert path == gcs_bucket / "report" / "index.html"
    for link in set(re.findall(r'href="((?:figures|tables)/[^"#]+)"', path.read_text())):
        assert (path.parent / link).read_bytes(), link

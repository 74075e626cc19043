"""What differs between two models, by the function and by the command."""

import dataclasses

import pytest

from m2l.errors import EvaluationError
from m2l.evaluation import results


def result(task, score):
    return results.Result(
        task=task,
        dataset="a",
        category="x",
        held_out=False,
        kind="rank",
        metric="accuracy",
        score=score,
        metrics={"accuracy": score},
        count=1,
        ties=0,
        truncated=0,
        seconds=0.0,
        model_digest="m",
        task_digest="t",
    )


def line(right, taken, value):
    return {
        "inputs": "which?",
        "choices": ["left", "right"],
        "right": right,
        "taken": taken,
        "value": value,
    }


def write(out, task, values, digest="t"):
    out.mkdir(exist_ok=True)
    lines = [line(1, [1] if value else [0], value) for value in values]
    score = sum(values) / len(values)
    made = result(task, score)
    results.write_result(
        out, dataclasses.replace(made, count=len(values), model_digest=out.name, task_digest=digest)
    )
    results.write_examples(out, task, lines)


@pytest.fixture
def folders(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    write(one, "task", [0.0, 100.0, 0.0, 100.0])
    write(other, "task", [100.0, 100.0, 100.0, 0.0])
    write(one, "more", [0.0])
    return one, other


def test_the_difference_and_the_examples_that_flipped(folders):
    [found], alone = results.compare(*folders)
    assert (found.one.score, found.other.score, found.difference.value) == (50.0, 75.0, 25.0)
    assert found.difference.p > 0.2
    assert [(flip.number, flip.change) for flip in found.flips] == [(0, 100), (2, 100), (3, -100)]
    first = found.flips[0]
    assert (first.inputs, first.right, first.one, first.other) == (
        *("which?", "right"),
        *("left", "right"),
    )
    assert alone == ["more"]


def test_a_tie_and_free_text_are_shown_as_they_were_answered():
    tied = line(0, [0, 1], 50.0)
    assert results.flips([tied], [line(0, [0], 100.0)])[0].one == "left = right"
    text = {"inputs": "q", "references": ["yes", "aye"], "value": 0.0}
    [flip] = results.flips([text | {"prediction": "no"}], [text | {"prediction": "aye"}])
    assert (flip.right, flip.one, flip.other) == ("yes", "no", "aye")


def test_what_cannot_be_compared_is_refused(folders, tmp_path):
    one, other = folders
    with pytest.raises(EvaluationError, match="no results of `m2l eval`"):
        results.compare(one, tmp_path)
    write(tmp_path / "third", "third", [0.0])
    with pytest.raises(EvaluationError, match="no task in common"):
        results.compare(one, tmp_path / "third")
    write(tmp_path / "third", "task", [0.0], digest="other examples")
    with pytest.raises(EvaluationError, match=r"task: .* on other examples or by another score"):
        results.compare(one, tmp_path / "third")
    results.write_examples(other, "task", [line(1, [0], 0.0)])
    with pytest.raises(EvaluationError, match="task has 4 examples, but 1 are there"):
        results.compare(one, other)
    (other / "task.examples.jsonl.gz").unlink()
    with pytest.raises(EvaluationError, match="is missing; m2l eval --examples writes it"):
        results.compare(one, other)


def test_the_command_compares_two_models_and_reads_hugging_face_directories(
    road, run_m2l, tmp_path, capsys
):
    exported = tmp_path / "exported"
    assert run_m2l("convert", road / "sentiment", exported) == 0
    of = ["--mixture", "imdb", "--max_examples", 6, "--examples", "--vocabulary", "microworld"]
    for name, checkpoint in (("a", road / "base"), ("b", road / "sentiment"), ("c", exported)):
        out = tmp_path / name
        assert run_m2l("eval", "--checkpoint", checkpoint, *of, "--out", out) == 0
    assert "over prompts" in capsys.readouterr().out
    assert run_m2l("eval", "--compare", tmp_path / "a", tmp_path / "b") == 0
    said = capsys.readouterr().out
    assert "B - A" in said and "imdb_good_or_bad" in said and "right: " in said
    # The same parameters in another format.
    found, _ = results.compare(tmp_path / "b", tmp_path / "c")
    assert all(not one.flips and one.difference.value == 0 for one in found)
    ours, theirs = (found[0].one, found[0].other)
    assert ours.metrics == theirs.metrics and ours.model_digest != theirs.model_digest
    assert run_m2l("eval", "--compare", tmp_path / "a", tmp_path / "none") == 2
    assert run_m2l("eval", "--mixture", "imdb", "--out", tmp_path / "d") == 2
    assert "CHECKPOINT is missing" in capsys.readouterr().err

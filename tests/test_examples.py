"""The programs and the notebook of examples/ run to their end, and print what they say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as official

from .checkpoints.families import CONFIGS, tensors_of, write

EXAMPLES = Path(__file__).parents[1] / "examples"


def program(name):
    return (EXAMPLES / name).read_text()


def cells(name):
    """A notebook's cells of code, one after the other: what a kernel runs."""
    notebook = json.loads(program(name))
    return "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")


def flat(tensors):
    return np.concatenate(
        [tensors[name].astype(np.float64).reshape(-1) for name in sorted(tensors)]
    )


def test_hugging_face_models_merge_and_their_task_vectors_are_compared(forge, tmp_path):
    rng = np.random.default_rng(0)
    base = tensors_of(CONFIGS["llama"])
    models = {"base": base}
    for name in ("a", "b"):
        models[name] = {
            key: tensor + rng.standard_normal(tensor.shape, np.float32) / 8
            for key, tensor in base.items()
        }
    for name, tensors in models.items():
        write(tmp_path / name, CONFIGS["llama"], tensors)
    experts = [part for name in ("a", "b") for part in ("--expert", tmp_path / name)]
    arguments = ["--base", tmp_path / "base", *experts, "--out", tmp_path / "merged"]
    (said,) = forge((program("merge_hugging_face.py"), *arguments), devices=1)

    merged = official.load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: array.shape for name, array in merged.items()} == {
        name: array.shape for name, array in base.items()
    }
    change = flat(merged) - flat(base)
    for line, name in zip(said.splitlines()[-2:], ("a", "b"), strict=True):
        tau = flat(models[name]) - flat(base)
        cosine = change @ tau / np.linalg.norm(change) / np.linalg.norm(tau)
        assert line == f"{tmp_path / name}: cosine with the merge {cosine:.3f}"
        assert cosine > 0.4


def test_a_new_method_is_swept_by_its_own_hyper_parameter(forge):
    (said,) = forge((program("new_method.py"),), devices=1)
    shares = [float(share) for share in re.findall(r"strictness \d\.\d: ([\d.]+)%", said)]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 100 > shares[-1]


def test_own_data_are_trained_on_merged_and_evaluated(forge, tmp_path):
    (said,) = forge((program("own_data.py"), tmp_path, "--steps", 2), devices=1)
    rows = re.findall(r"^(\w+) +(\w+) +([\d.]+) % \(", said, re.M)
    models = ("base", "reviews", "numbers", "merged")
    assert [row[:2] for row in rows] == [(m, t) for m in models for t in ("reviews", "numbers")]
    assert all(0 <= float(score) <= 100 for *_, score in rows)


def test_a_sweep_on_a_mesh_finds_the_best_of_its_scores(forge, road):
    arguments = ["--base", road / "base", "--mixture", "sentiment", "--max_examples", 2]
    for name in ("sentiment", "closed_book_qa"):
        arguments += ["--expert", road / name]
    arguments += ["--scales", 0.5, 1.0]
    (said,) = forge((program("sweep_on_mesh.py"), *arguments), devices=8)
    assert "mesh {'data': 2, 'fsdp': 4, 'model': 1}, 8 devices" in said
    scores = [float(score) for score in re.findall(r"^scale [\d.]+: ([\d.]+) %$", said, re.M)]
    assert len(scores) == 2
    assert f"({max(scores):.2f} %)" in said.splitlines()[-1]


def test_the_notebook_runs_from_its_first_cell_to_its_last(forge):
    forge((cells("quickstart.ipynb"),), devices=1)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_has_at_most_120_lines(path):
    assert len(path.read_text().splitlines()) <= 120

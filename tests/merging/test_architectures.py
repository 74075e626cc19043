"""Public architectures: all are merged by names; those with a network are also read as models."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from m2l.checkpoints import huggingface
from m2l.checkpoints.huggingface_config import ARCHITECTURES
from m2l.errors import UnsupportedModelError
from m2l.merging import Recipe, merge

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests/goldens"
_spec = importlib.util.spec_from_file_location("make_goldens", GOLDENS / "make_goldens.py")
make_goldens = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_goldens)

OTHERS = json.loads((GOLDENS / "architectures.json").read_text())
KINDS = [*ARCHITECTURES, *OTHERS]


def description(kind):
    """Returns the config.json and the tensors' shapes that transformers gave a tiny model."""
    if kind in OTHERS:
        return OTHERS[kind]["config"], OTHERS[kind]["tensors"]
    case = next(c for c, values in make_goldens.CASES.items() if values["model_type"] == kind)
    shapes = json.loads(np.load(GOLDENS / f"models/{case}.npz")["shapes"].tobytes())
    return make_goldens.CASES[case], shapes


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_is_merged_by_the_names_of_its_tensors(tmp_path, kind):
    config, shapes = description(kind)
    models = []
    for number in range(2):
        rng = np.random.default_rng(number)
        models.append({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(models[-1], folder / "model.safetensors", {"format": "pt"})
    paths = [tmp_path / "0", tmp_path / "1"]
    merge(None, paths, Recipe("average"), tmp_path / "out", progress=False)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    merged = load_file(file)
    assert merged.keys() == shapes.keys()
    for name, tensor in merged.items():
        expected = (models[0][name].astype(np.float64) + models[1][name]) / 2
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6, err_msg=name)
    if kind in OTHERS:
        with pytest.raises(UnsupportedModelError, match=f"model type '{kind}' is not supported"):
            huggingface.read_config(tmp_path / "0")
    else:
        assert huggingface.read_config(tmp_path / "0").model_type == kind


def test_the_page_has_a_row_for_each_architecture():
    page = (ROOT / "docs/decoders.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", page, re.MULTILINE))
    marks = {kind: ["yes"] + ["yes" if kind in ARCHITECTURES else "no"] * 4 for kind in KINDS}
    assert {kind: [cell.strip() for cell in row.split("|")] for kind, row in rows.items()} == marks

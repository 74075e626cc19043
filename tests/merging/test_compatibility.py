"""Bad input: every kind is refused with its place, and nothing is written."""

import errno
import os
import re
import shutil

import jax
import numpy as np
import pytest

from m2l import checkpoints, storage
from m2l.errors import CheckpointError, MergeError
from m2l.merging import Recipe, merge, merge_params

from .conftest import MODEL, RECIPES, VOCABULARY, write


def test_missing_sources_are_refused(refused, paths, tmp_path):
    refused("at least one expert", experts=[])
    refused("give the base", base=None)
    refused("2 weights for 3 experts", recipe=Recipe("average", weights=(1, 2)))
    refused("no such checkpoint", kind=CheckpointError, experts=[tmp_path / "nowhere"])


def test_an_output_in_the_way_or_inside_an_input_is_refused(refused, paths, tmp_path):
    base, experts = paths
    refused("is inside an input", out=experts[1] / "merged")
    refused("is inside an input", out=base)
    (tmp_path / "there").mkdir()
    refused("exists already", kind=CheckpointError, out=tmp_path / "there")


def test_experts_of_another_kind_are_refused(refused, models, tmp_path):
    params = models[1][0]
    write(tmp_path / "words", params, vocabulary=VOCABULARY | {"name": "w", "fingerprint": "x"})
    write(tmp_path / "wide", params, model=MODEL | {"d_model": 9})
    refused("another vocabulary, 'w' of 30 pieces and not 'bytes'", experts=[tmp_path / "words"])
    refused("wide cannot .*: another model: d_model is 9 and not 8", experts=[tmp_path / "wide"])


@pytest.fixture
def unlike(models):
    """An expert that lacks a parameter, has one in another shape, and ten that nobody else has."""
    flat = checkpoints.flatten(models[1][0]) | {
        f"extra/{n}": np.ones(2, np.int32) for n in "0123456789"
    }
    flat["token_embedder"] = np.ones((49, 8), np.float32)
    del flat["decoder/norm"]
    return checkpoints.unflatten(flat)


DIFFERENCES = """
decoder/norm    float[8]      missing
token_embedder  float[50, 8]  float[49, 8]
extra/0         missing       int32[2]
extra/1         missing       int32[2]
extra/2         missing       int32[2]
extra/3         missing       int32[2]
extra/4         missing       int32[2]
extra/5         missing       int32[2]
and 4 more
""".strip().split("\n")


def test_parameters_that_are_unlike_are_told_in_a_table(refused, paths, unlike, tmp_path):
    write(tmp_path / "other", unlike)
    heads, *table = refused("other parameters", experts=[paths[1][0], tmp_path / "other"])
    # As paths from where both lie.
    assert re.match(r"  parameter +\S+/base +\S+/other$", heads)
    assert [" ".join(line.split()) for line in table] == [" ".join(d.split()) for d in DIFFERENCES]

    write(tmp_path / "wide", unlike, model=MODEL | {"d_model": 9})
    assert len(refused("another model: d_model is 9", experts=[tmp_path / "wide"])) == 10


def test_parameters_in_memory_that_are_unlike_are_told_in_the_same_table(models, unlike):
    base, experts = models
    for reference, name in ((base, "base"), (None, "expert 0")):
        with pytest.raises(MergeError) as caught:
            merge_params(reference, [experts[0], unlike], Recipe("average"))
        said, heads, *table = str(caught.value).split("\n")
        assert said == f"expert 1 cannot be merged with {name}: other parameters"
        assert heads == f"  parameter       {name:12}  expert 1"
        assert table == [f"  {line}" for line in DIFFERENCES]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_a_number_that_is_not_finite_is_refused_with_its_place(
    refused, models, paths, tmp_path, recipe, value
):
    params = jax.tree.map(np.copy, models[1][1])
    params["decoder"]["layers_01"]["mlp"]["wi_0"][3, 4] = value
    write(tmp_path / "bad", params)
    experts = [paths[1][0], tmp_path / "bad", paths[1][2]]
    place = rf"bad: decoder/layers_01/mlp/wi_0\[{3 * 31 + 4}\] \(row-major\) is {value}"
    refused(place, experts=experts, recipe=recipe)


def test_nothing_is_left_behind_where_chunks_are_written_already(refused, models, paths, tmp_path):
    params = jax.tree.map(np.copy, models[1][1])
    params["token_embedder"][-1, -1] = np.nan  # it is read last
    write(tmp_path / "bad", params)
    refused("is nan", experts=[paths[1][0], tmp_path / "bad"], recipe=Recipe("average"))


def test_a_merge_that_overflows_its_dtype_is_refused_with_its_place(refused):
    recipe = Recipe("task_arithmetic", scale=1e6, dtype="float16")
    refused(r"the merged decoder/layers_00/mlp/wi_0\[\d+\] is -?inf: too large", recipe=recipe)


def test_large_numbers_whose_sum_overflows_are_still_merged(tmp_path):
    for index in range(3):
        write(tmp_path / str(index), {"w": np.full(4, 3e38, np.float32)})
    inputs = [tmp_path / str(index) for index in range(3)]
    with pytest.warns(UserWarning, match="the same model"):
        merge(inputs[0], inputs[1:], Recipe("task_arithmetic"), tmp_path / "out")
    assert checkpoints.restore(tmp_path / "out")["w"].tolist() == [np.float32(3e38)] * 4


def test_a_damaged_expert_is_refused_by_the_parameters_name(refused, models, paths, tmp_path):
    shutil.copytree(paths[1][0], tmp_path / "damaged")
    content = models[1][0]["token_embedder"].tobytes()
    (file,) = [f for f in tmp_path.rglob("*") if f.is_file() and content in f.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.find(content) + 40] ^= 1
    file.write_bytes(data)
    refused("token_embedder is damaged", kind=CheckpointError, experts=[tmp_path / "damaged"])


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(refused, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", full)
        refused(r"out: no space left: \d+.* bytes are needed; nothing", kind=CheckpointError)
    usage = shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(r"out: no space left: 3,\d+ bytes are needed, 100 are free", kind=CheckpointError)


def test_an_exclusion_that_means_nothing_is_refused(refused):
    refused("'embedder' matches no parameter", recipe=Recipe("average", exclude=["embedder"]))
    refused("every parameter is excluded", recipe=Recipe("average", exclude=["*"]))


def test_an_expert_given_twice_is_warned_of(tmp_path, paths):
    base, experts = paths
    with pytest.warns(UserWarning, match="expert_1 is the same model as .*expert_1$"):
        merge(base, [experts[1], experts[1]], Recipe("average"), tmp_path / "out")


def test_numbers_of_experts_that_a_method_cannot_merge_are_refused(refused, paths):
    refused("linear merges 1 expert, not 3", recipe=Recipe("linear"))
    refused("slerp merges 2 experts, not 3", recipe=Recipe("slerp"), base=None)
    refused("at least 2 experts", recipe=Recipe("model_stock"), experts=paths[1][:1])

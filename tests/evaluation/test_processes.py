"""Two processes of two devices each, on one mesh, give the results of one device."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest

from m2l.data import vocabularies
from m2l.data.examples import GenerationExample, RankingExample
from m2l.data.prompts import TaskInfo
from m2l.evaluation import results
from m2l.evaluation.decoding import Decoding
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.task_data import TaskData

PROGRAM = """
import pickle, sys
import jax
address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, process)
import pathlib
from m2l import models, partitioning
from m2l.data import vocabularies
from m2l.evaluation.evaluator import Evaluator
config, params, tasks = pickle.loads(pathlib.Path(folder, "given").read_bytes())
mesh = partitioning.make_mesh(model=2)
assert mesh.shape["data"] == 2 and jax.process_count() == 2
placed = partitioning.shardings(models.spec(config), mesh)
params = jax.tree.map(
    lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__),
    params, placed,
)
vocabulary = vocabularies.load("microworld")
evaluator = Evaluator(config, tasks, vocabulary, batch_size=8)
with jax.set_mesh(mesh):
    out = pathlib.Path(folder, "two")
    found = evaluator.run(params, out, model_digest="m", examples=True)
    again = evaluator.run(params, out, model_digest="m", examples=True)
assert found[0].score == again[0].score
"""


def ids(rng, size):
    return np.append(rng.integers(3, 500, size), 1).astype(np.int32)


@pytest.fixture
def tasks():
    rng = np.random.default_rng(0)
    ranked = [
        RankingExample(
            *(ids(rng, rng.integers(2, 40)), tuple(ids(rng, size) for size in (1, 3, 2))),
            *((True, False, False), f"question {number}", ("a", "bb", "c"), False),
        )
        for number in range(13)
    ]
    texts = [
        GenerationExample(ids(rng, 9), ids(rng, 4), ("x y",), f"text {number}", "x y", False)
        for number in range(5)
    ]
    info = TaskInfo("ranked", "ranked", "", "c", False, "rank", ("accuracy",), True)
    by_beams = dataclasses.replace(info, name="beams", kind="generate", metrics=("squad",))
    by_beams = TaskData(by_beams, texts, 4, "b", decoding=Decoding(beams=2))
    return [TaskData(info, ranked, 4, "r"), by_beams]


def test_two_processes_on_a_mesh_give_the_results_of_one_device(
    forge, free_port, tiny_config, tiny_params, tasks, tmp_path
):
    params = jax.tree.map(np.asarray, tiny_params)
    (tmp_path / "given").write_bytes(pickle.dumps((tiny_config, params, tasks)))
    address = f"localhost:{free_port()}"
    forge(*((PROGRAM, address, process, tmp_path) for process in range(2)), devices=2)
    vocabulary = vocabularies.load("microworld")
    evaluator = Evaluator(tiny_config, tasks, vocabulary, batch_size=5)
    evaluator.run(tiny_params, tmp_path / "one", model_digest="m", examples=True)
    for task in tasks:
        name = task.info.name
        one, two = (results.read_result(tmp_path / n / f"{name}.json") for n in ("one", "two"))
        assert one.metrics == pytest.approx(two.metrics, rel=1e-5)
        lines = [results.read_examples(tmp_path / n, name) for n in ("one", "two")]
        for of_one, of_two in zip(*lines, strict=True):
            for field, value in of_one.items():
                numbers = field in ("scores", "empty_scores", "reference_score", "value")
                assert of_two[field] == (pytest.approx(value, rel=1e-5) if numbers else value)

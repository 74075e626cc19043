"""What a run says of itself: its arithmetic, its memory, its speed, its curve."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from m2l import models, partitioning
from m2l.errors import ConfigError
from m2l.training import feed, monitoring, optimizers, resources

from .conftest import SETTINGS

LLAMA = models.LlamaConfig(64, 32, 48, 2, 4, 2, 8)
ROWS, INPUTS, TARGETS = 3, 12, 7


def products(jaxpr):
    """The operations of all matrix products in a jaxpr, those of its parts included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            length = np.prod([left[axis] for axis in contracted])
            total += 2 * length * np.prod(equation.outvars[0].aval.shape)
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            total += products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_operations_are_those_of_the_network_s_matrix_products(family, tiny_config):
    config = tiny_config if family == "t5" else LLAMA
    length = INPUTS + TARGETS if config.decoder_only else TARGETS
    batch = {"decoder_input_tokens": jnp.ones((ROWS, length), jnp.int32)}
    if not config.decoder_only:
        batch["encoder_input_tokens"] = jnp.ones((ROWS, INPUTS), jnp.int32)
    params = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    logits = jax.make_jaxpr(lambda p, b: models.apply(config, p, b))(params, batch)
    # Of causal attention half is counted; the network computes all of it.
    layers, inner = (2, 32) if config.decoder_only else (2, 16)
    causal = 2 * ROWS * layers * length * length * inner
    expected = 3 * (products(logits.jaxpr) - causal)
    found = resources.step_flops(config, ROWS, INPUTS, TARGETS)
    # A decoder's loss is on targets, but its logits are of all positions.
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_window_lowers_the_operations_of_attention():
    seen = [
        resources.step_flops(dataclasses.replace(LLAMA, windows=windows), 1, 100, 28)
        for windows in ((), (128, 128), (16, 0))
    ]
    assert seen[0] == seen[1] > seen[2]


def test_memory_of_a_mesh_is_what_its_shardings_hold(tiny_config):
    one = resources.memory_need(
        tiny_config, SETTINGS, partitioning.make_mesh(devices=jax.devices()[:1])
    )
    spec = models.spec(tiny_config)
    assert one.params == sum(4 * np.prod(leaf.shape) for leaf in jax.tree.leaves(spec))
    # 4 rows of 32 targets, float32 logits and their gradient.
    assert one.logits == 4 * 32 * 1152 * 8
    split = AbstractMesh((1, 2, 2), partitioning.MESH_AXES)
    assert resources.memory_need(tiny_config, SETTINGS, split).params < one.params / 2
    adam = dataclasses.replace(SETTINGS, optimizer=optimizers.Optimizer("adamw"))
    of_adam = resources.memory_need(tiny_config, adam, split)
    assert of_adam.opt_state == pytest.approx(2 * of_adam.params, abs=8)


def test_a_mesh_that_cannot_hold_a_run_is_refused_before_anything_is_made(
    train, tmp_path, monkeypatch
):
    monkeypatch.setattr(resources, "device_bytes", lambda device: 100_000)
    with pytest.raises(ConfigError, match=r"needs at least .* GiB on each device \(params"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_speed_is_of_the_tokens_that_are_no_padding(monkeypatch):
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: next(clock))
    counted = monitoring.ThroughputMeter(flops=50.0, peak=100.0, shares=2)
    batch = {
        "encoder_input_tokens": np.array([[5, 6, 0]]),
        "decoder_loss_weights": np.array([[1, 0]]),
    }
    counted.count(batch, waited=1.0)
    assert counted.read() == {}
    counted.run()
    counted.count(batch, waited=1.0)
    assert counted.read() == {
        "tokens_per_second": 0.6,
        "target_tokens_per_second": 0.2,
        "input_wait": 0.1,
        "mfu": 0.05,
    }


def test_the_curve_is_a_picture_with_every_point(tmp_path):
    rows = [{"step": step, "loss": loss} for step, loss in ((1, 7.0), (50, 3.5), (100, 2.0))]
    rows.insert(2, {"step": 60, "loss": float("nan"), "validation_loss": 3.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monitoring.draw_curve(tmp_path, "a < b: $1")
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert "a < b: $1" in [text.text for text in root.iter(f"{svg}text")]
    lines = {group.get("id"): group.find(f"{svg}path") for group in root.iter(f"{svg}g")}
    points = re.findall(r"[ML] ([\d.]+) ([\d.]+)", lines["training"].get("d"))
    across, down = zip(*[map(float, point) for point in points], strict=True)
    assert len(points) == 3 and list(across) == sorted(across) and list(down) == sorted(down)
    assert lines["validation"] is not None
    first = (tmp_path / "loss.svg").read_bytes()
    monitoring.draw_curve(tmp_path, "a < b: $1")
    assert (tmp_path / "loss.svg").read_bytes() == first


class Stream:
    """Rows (number of the stream, number of the row), and how many were handed out."""

    def __init__(self, number, rows, position):
        self.number, self.rows, self.done = number, rows, int(position or 0)

    def __next__(self):
        first, self.done = self.done, self.done + self.rows
        return {"a": np.array([(self.number, first + row) for row in range(self.rows)])}

    def state(self):
        return str(self.done).encode()

    @property
    def cut(self):
        return {"examples": self.done}


def feeds(shares, positions=None):
    def open_stream(stream, position):
        return Stream(stream[0], 12 // stream[1], position)

    return [feed.Feed(open_stream, 12, (number, shares), positions) for number in range(shares)]


@pytest.mark.parametrize("before", [1, 2, 3, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 6, 12])
def test_a_run_reads_the_same_batches_whatever_the_number_of_shares(before, after):
    whole = feeds(before)
    expected = [np.concatenate([next(f)["a"] for f in whole]) for _ in range(5)]
    first = feeds(before)
    found = [np.concatenate([next(f)["a"] for f in first]) for _ in range(2)]
    second = feeds(after, feed.merged_positions([f.positions() for f in first]))
    found += [np.concatenate([next(f)["a"] for f in second]) for _ in range(3)]
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))
    assert sum(f.cut["examples"] for f in second) == 5 * 12
    ends = [feed.merged_positions([f.positions() for f in feeds_]) for feeds_ in (whole, second)]
    assert ends[0] == ends[1] == [str(5 * 12 // before).encode()] * before


def test_rows_that_do_not_divide_into_the_streams_of_a_run_are_refused():
    with pytest.raises(ConfigError, match=r"batch_size 12 .* into 5 streams of data and 1 shares"):
        feeds(1, [None] * 5)

"""The k-th largest magnitude is found exactly, however the model is cut into blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2l.merging.statistics import Trimming, kth_largest, trimmings


def magnitudes(kind, size=5000):
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.standard_normal(size),
        "many equal": rng.integers(0, 5, size) * 0.25,
        "all equal": np.full(size, 1e-3),
        "mostly zero": np.where(rng.random(size) < 0.9, 0, rng.standard_normal(size)),
        "wide": np.exp(rng.uniform(-80, 80, size)),
        "denormal": rng.integers(0, 9, size) * 1e-45,
    }[kind]
    return np.abs(values).astype(np.float32)


KINDS = ["normal", "many equal", "all equal", "mostly zero", "wide", "denormal"]
DENSITIES = [0.0001, 0.001, 0.05, 0.2, 0.5, 0.999, 1.0]


def reading(experts, block):
    def read():
        for start in range(0, experts[0].size, block):
            yield [expert[start : start + block].view(np.uint32) for expert in experts]

    return read


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_are_those_of_a_partition_of_the_whole_model(kind):
    experts = [magnitudes(kind), magnitudes("normal")]
    found = trimmings(reading(experts, 700), 2, DENSITIES)
    for values, by_density in zip(experts, found, strict=True):
        for density, trimming in zip(DENSITIES, by_density, strict=True):
            rank = int(values.size * density)
            if rank == 0:
                wanted = np.float32(np.inf)
            elif rank == values.size:
                wanted = np.float32(0)
            else:
                wanted = np.partition(values, values.size - rank)[values.size - rank]
            kept = int((values >= wanted).sum())
            assert trimming == Trimming(wanted, kept, values.size)
            assert kept >= rank


def test_blocks_do_not_change_a_threshold():
    experts = [magnitudes("normal"), magnitudes("wide")]
    whole = trimmings(reading(experts, 5000), 2, DENSITIES)
    for block in (97, 999, 4096):
        assert trimmings(reading(experts, block), 2, DENSITIES) == whole


@pytest.mark.parametrize("rank", [1, 2, 1000, 4999, 5000])
def test_in_memory_the_kth_largest_is_that_of_a_sort(rank):
    experts = [magnitudes(kind) for kind in KINDS]
    parts = [[jnp.asarray(e[:37]), jnp.asarray(e[37:].reshape(7, -1))] for e in experts]
    found = jax.jit(kth_largest, static_argnums=1)(parts, rank)
    np.testing.assert_array_equal(found, [np.sort(expert)[-rank] for expert in experts])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=2, max_size=40), st.data())
def test_any_rank_of_any_numbers_is_found(values, data):
    values = np.float32(values)
    rank = data.draw(st.integers(1, values.size - 1))
    # The middle of the densities that round down to this rank.
    ((trimming,),) = trimmings(reading([values], 7), 1, [(rank + 0.5) / values.size])
    assert trimming.threshold == np.sort(values)[-rank]

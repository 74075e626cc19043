"""The law is found again in losses that were made by it."""

import types

import numpy as np
import pytest

from m2l.errors import EvaluationError
from m2l.studies import scaling_law

PARAMETERS = {"1M": 10**6, "4M": 4 * 10**6, "16M": 16 * 10**6, "64M": 64 * 10**6}
COUNTS = [2, 4, 6, 8]


def law(sizes, counts, lowest=0.1, of_size=0.2, beta=0.5, slope=0.6, gamma=0.3, offset=1.0):
    size, count = np.meshgrid(np.asarray(sizes) / min(sizes), counts, indexing="ij")
    return lowest + of_size * size**-beta + slope * size**-gamma / (count + offset)


def grid(losses, sizes, noise=0.0, counts=COUNTS):
    """Replicates [100, sizes, 1, 1, counts] of the losses, held-in; held-out the negative."""
    rng = np.random.default_rng(0)
    drawn = losses + noise * rng.standard_normal((100, *losses.shape))
    drawn[0] = losses
    drawn = drawn[:, :, None, None]
    return types.SimpleNamespace(
        axes={"size": sizes, "base": ["instruct"], "method": ["ties"], "experts": counts},
        held_in=1 - drawn,
        held_out=1 + drawn,
    )


def test_a_law_is_recovered_and_predicts_what_it_has_not_seen():
    losses = law(list(PARAMETERS.values()), COUNTS)
    frame = scaling_law.fit(grid(losses, list(PARAMETERS), noise=0.003), PARAMETERS)
    row = frame[frame["loss"] == "held_in"].iloc[0]
    assert row["error"] < 0.002
    predicted = law(
        list(PARAMETERS.values()),
        [12],
        *(row[name] for name in ("L", "B", "beta", "A0", "gamma", "b")),
    )
    np.testing.assert_allclose(predicted, law(list(PARAMETERS.values()), [12]), atol=0.01)
    for name in scaling_law.COLUMNS:
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


def test_experts_are_worth_merging_as_long_as_each_saves_half_a_point():
    # 1 / (k + 1) falls by 1 / ((k + 1)(k + 2)), here by at least 1 / 200 up to k = 12.
    [worth] = scaling_law.experts_worth(np.array([1.0]), np.array([1.0]))
    saved = [1 / (k + 1) - 1 / (k + 2) for k in range(1, 40)]
    assert worth == 1 + sum(part >= scaling_law.WORTH for part in saved)
    # Where each further one costs something, none is.
    assert list(scaling_law.experts_worth(np.array([-1.0, 0.0]), np.array([1.0, 1.0]))) == [1, 1]


def test_fewer_than_three_sizes_are_fitted_each_on_its_own():
    losses = law([10**6], COUNTS)
    frame = scaling_law.fit(grid(losses, ["1M"]), PARAMETERS)
    row = frame[frame["loss"] == "held_in"].iloc[0]
    assert row["size"] == "1M" and np.isnan(row["beta"]) and np.isnan(row["B"])
    assert row["L"] + row["A0"] / (8 + row["b"]) == pytest.approx(losses[0, -1], abs=0.002)


def test_two_numbers_of_experts_are_too_few():
    losses = law([10**6], [2, 4])
    with pytest.raises(EvaluationError, match="needs three numbers of experts"):
        scaling_law.fit(grid(losses, ["1M"], counts=[2, 4]), PARAMETERS)

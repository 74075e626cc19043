import numpy as np

from m2l.training import losses


def test_cross_entropy_is_the_summed_negative_log_softmax_of_the_weighted_targets():
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=4.0, size=(3, 5, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (3, 5)).astype(np.int32)
    weights = (rng.random((3, 5)) < 0.6).astype(np.int32)

    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    chosen = np.take_along_axis(probabilities, targets[..., None], -1)[..., 0]
    sums = losses.cross_entropy(logits, targets, weights)

    np.testing.assert_allclose(sums["loss"], -(np.log(chosen) * weights).sum(), rtol=1e-5)
    assert float(sums["weight"]) == weights.sum()
    assert float(sums["correct"]) == ((logits.argmax(-1) == targets) * weights).sum()


def test_what_stands_at_padding_changes_nothing():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(1, 4, 7)).astype(np.float32)
    targets, weights = np.array([[1, 2, 0, 0]]), np.array([[1, 1, 0, 0]])
    other = logits.copy()
    other[:, 2:] = 50.0
    np.testing.assert_array_equal(
        losses.cross_entropy(logits, targets, weights)["loss"],
        losses.cross_entropy(other, targets, weights)["loss"],
    )

"""DARE's masks are the documented function of seed, expert, parameter and element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l.checkpoints import uint64
from m2l.errors import MergeError
from m2l.merging import randomness
from m2l.merging.randomness import straight, transposed

from . import oracles

# Known answers of Random123 (kat_vectors, threefry2x32 with 20 rounds).
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("key", "counter", "wanted"), KNOWN)
def test_threefry_gives_the_published_answers(key, counter, wanted):
    words = [jnp.uint32([word]) for word in counter]
    found = randomness.threefry2x32(np.uint32(key), tuple(words))
    assert tuple(int(word[0]) for word in found) == wanted
    assert oracles.threefry2x32(key, counter) == wanted


words = jax.jit(randomness.words, static_argnums=(1, 2))


def draw(keys, experts, shape, place, drop_rate):
    found = words(keys, experts, shape, place)
    return [word >= randomness.cut(drop_rate) for word in found]


def masks(seed, experts, name, start, size, drop_rate):
    keys = randomness.keys(seed, experts, name)
    return np.stack(draw(keys, experts, (size,), straight(start), drop_rate))


@pytest.mark.parametrize("start", [0, 3, 2**32 - 20, 2**40 + 1])
def test_masks_are_those_of_an_implementation_in_plain_integers(start):
    found = masks(7, 3, "decoder/mlp/wi", start, 50, 0.6)
    np.testing.assert_array_equal(found, oracles.kept(7, 3, "decoder/mlp/wi", 50, 0.6, start))


def test_masks_do_not_depend_on_how_a_parameter_is_cut():
    whole = masks(1, 2, "w", 0, 240, 0.5)
    for size in (60, 80):
        parts = [masks(1, 2, "w", i, min(size, 240 - i), 0.5) for i in range(0, 240, size)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    keys = randomness.keys(1, 2, "w")
    shaped = np.stack(draw(keys, 2, (6, 8, 5), straight(0), 0.5))
    np.testing.assert_array_equal(shaped.reshape(2, -1), whole)


def test_seed_expert_and_parameter_each_change_the_masks():
    reference = masks(0, 4, "w", 0, 256, 0.5)
    assert len({mask.tobytes() for mask in reference}) == 4
    for other in (masks(1, 4, "w", 0, 256, 0.5), masks(0, 4, "v", 0, 256, 0.5)):
        assert (other != reference).mean() == pytest.approx(0.5, abs=0.08)


def test_an_experts_mask_does_not_depend_on_how_many_there_are():
    np.testing.assert_array_equal(masks(0, 3, "w", 0, 64, 0.3), masks(0, 5, "w", 0, 64, 0.3)[:3])


@pytest.mark.parametrize("drop_rate", [0.1, 0.9, 0.99])
def test_the_share_kept_is_one_minus_the_drop_rate(drop_rate):
    (found,) = draw(randomness.keys(3, 1, "w"), 1, (1 << 20,), straight(0), drop_rate)
    # Six standard deviations of a binomial share.
    deviation = 6 * (drop_rate * (1 - drop_rate) / (1 << 20)) ** 0.5
    assert np.asarray(found).mean() == pytest.approx(1 - drop_rate, abs=deviation)


def test_dropping_nothing_keeps_everything():
    assert masks(0, 2, "w", 0, 1000, 0.0).all()


def test_a_transposed_matrix_draws_what_the_matrix_draws():
    keys = randomness.keys(5, 2, "w")
    whole = np.stack(draw(keys, 2, (6, 35), straight(0), 0.5))
    turned = whole.swapaxes(1, 2).reshape(2, -1)
    for start, size in ((0, 210), (17, 60), (205, 5)):
        found = np.stack(draw(keys, 2, (size,), transposed(start, (35, 6)), 0.5))
        np.testing.assert_array_equal(found, turned[:, start : start + size])


def draws(keys, indices):
    """What Threefry on Python integers draws for elements, uint32 [2, elements]."""
    key = [int(word) for word in keys[0]]
    return np.array([oracles.threefry2x32(key, divmod(i, 2**32)) for i in indices], np.uint32).T


@pytest.mark.parametrize("start", [0, 69_999, 2**31 + 5, 2**32 - 10, 4_900_069_950])
def test_a_transposed_matrix_of_more_elements_than_a_word_counts_draws_its_own(start):
    keys, (rows, columns) = randomness.keys(5, 2, "w"), (70_000, 70_001)
    found = np.stack(words(keys, 2, (50,), transposed(start, (rows, columns))))
    places = [divmod(element, columns) for element in range(start, start + 50)]
    np.testing.assert_array_equal(found, draws(keys, [c * rows + r for r, c in places]))


def test_a_transposed_matrix_with_a_side_that_no_word_counts_is_refused():
    with pytest.raises(MergeError, match=r"transposed matrix \[2, 4294967295\]"):
        transposed(0, (2, 2**32 - 1))


@pytest.mark.parametrize("start", [0, 2**32 - 20, 2**40 + 1])
@pytest.mark.parametrize("shape", [(60,), (3, 4, 5)])
def test_a_tensor_of_more_elements_than_a_word_counts_draws_by_index(monkeypatch, start, shape):
    # As if a word ended at 50.
    monkeypatch.setattr(randomness, "_LAST", 50)
    keys, place = randomness.keys(5, 2, "w"), uint64.split(start)
    found = jax.jit(lambda place: randomness.words(keys, 2, shape, place))(place)
    wanted = draws(keys, range(start, start + 60))
    np.testing.assert_array_equal(np.stack(found).reshape(2, -1), wanted)


@pytest.mark.parametrize(
    "columns", [1, 2, 3, 7, 4096, 32000, 2**20 - 1, 2**20 + 1, 2**30 + 3, 2**32 - 1]
)
def test_a_transposed_matrix_of_any_width_is_found_its_rows_and_columns_in(columns):
    """Every quotient of a longest block, by NumPy's integer division."""
    divided = jax.jit(randomness._divided)
    for column in {0, 1 % columns, columns // 2, columns - 1}:
        number = np.uint32(column) + np.arange(1 << 20, dtype=np.uint32)
        quotient, rest = divided(number, np.uint32(columns))
        np.testing.assert_array_equal(quotient, number // np.uint32(columns))
        np.testing.assert_array_equal(rest, number % np.uint32(columns))

"""The sequence of tasks: by rate, the same from any place, and never touched by where it stops."""

import itertools

import numpy as np
import pytest

from m2l.data.pipeline import DRAWS_CHUNK, MixtureSampler

RATES = [5.0, 1.0, 3.0, 0.5]


def taken(draws, position, n):
    """The first n pairs from a position on."""
    found = []
    for tasks, counts in draws.pairs(position):
        found += zip(tasks.tolist(), counts.tolist(), strict=True)
        if len(found) >= n:
            return found[:n]
    return found


@pytest.mark.parametrize("position", [0, 1, 7, DRAWS_CHUNK - 1, DRAWS_CHUNK, 3 * DRAWS_CHUNK + 5])
def test_the_sequence_is_the_same_from_wherever_it_is_read(position):
    whole = taken(MixtureSampler(RATES, (3, 0)), 0, 5 * DRAWS_CHUNK)
    assert taken(MixtureSampler(RATES, (3, 0)), position, 300) == whole[position : position + 300]


def test_a_count_is_how_often_the_task_came_before():
    seen = dict.fromkeys(range(4), 0)
    for task, count in taken(MixtureSampler(RATES, (1, 0)), 0, 2 * DRAWS_CHUNK + 9):
        assert count == seen[task]
        seen[task] += 1
    assert MixtureSampler(RATES, (1, 0)).counts(2 * DRAWS_CHUNK + 9).tolist() == list(seen.values())


def test_counts_go_on_from_the_last_position_or_from_the_start():
    draws = MixtureSampler(RATES, (1, 0))
    fresh = [MixtureSampler(RATES, (1, 0)).counts(p).tolist() for p in (10, 9000, 50)]
    assert [draws.counts(p).tolist() for p in (10, 9000, 50)] == fresh
    moved = MixtureSampler(RATES, (1, 0))
    moved.move(9000, fresh[1])
    assert taken(moved, 9000, 20) == taken(draws, 9000, 20)
    for wrong in ([9000], [9000, 0, 0, 1], [9001, -1, 0, 0]):
        with pytest.raises(ValueError, match="do not add up"):
            moved.move(9000, wrong)


def test_tasks_come_in_proportion_to_their_rates():
    n = 40 * DRAWS_CHUNK
    counts = MixtureSampler(RATES, (0, 0)).counts(n)
    shares = np.array(RATES) / sum(RATES)
    assert np.all(np.abs(counts - n * shares) < 4 * np.sqrt(n * shares * (1 - shares)))
    assert counts.sum() == n


def test_other_seeds_are_other_sequences():
    firsts = [
        taken(MixtureSampler(RATES, seeds), 0, 50) for seeds in ((0, 0), (1, 0), (0, 1), (-1, 0))
    ]
    assert all(a != b for a, b in itertools.combinations(firsts, 2))

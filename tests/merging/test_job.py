"""What a merge will take, computed before a byte is read."""

import re

import numpy as np
import pytest

from m2l.errors import MergeError
from m2l.merging import Recipe, merge, prepare
from m2l.merging.job import parse_bytes

from .conftest import SHAPES


def test_a_limit_that_is_too_low_says_the_least_that_works(paths, tmp_path):
    little = r"--memory 10.5 MB is too little.* is the least"
    with pytest.raises(MergeError, match=little) as caught:
        merge(*paths, Recipe("ties"), tmp_path / "out", memory=10 << 20)
    least = re.search(r": ([\d.]+ [MG]B) is the least", str(caught.value))[1]
    enough = int(parse_bytes(least) * 1.02)
    assert prepare(*paths, Recipe("ties"), tmp_path / "out", memory=enough).plan.memory <= enough


def test_a_plan_counts_what_is_read_and_written(paths, tmp_path):
    job = prepare(*paths, Recipe("ties", dtype="bfloat16"), tmp_path / "out")
    size = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert (job.plan.parameters, job.plan.experts, job.plan.readings) == (size, 3, 2)
    assert job.plan.read == 2 * 4 * 4 * size
    assert job.plan.write == 2 * size
    halves = [
        prepare(*paths, Recipe("average"), tmp_path / "out", process=(i, 2)) for i in range(2)
    ]
    assert not halves[0].local & halves[1].local
    assert halves[0].local | halves[1].local == set(SHAPES)


@pytest.mark.parametrize(
    ("text", "count"), [("2GiB", 2 << 30), ("1.5 GB", 15 * 10**8), ("800m", 8 * 10**8), ("7", 7)]
)
def test_memory_is_read_as_people_write_it(text, count):
    assert parse_bytes(text) == count
    with pytest.raises(MergeError, match="cannot parse memory size"):
        parse_bytes(text + "x")

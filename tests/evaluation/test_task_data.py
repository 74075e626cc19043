"""Halves of a task: some examples to choose by, others to judge by."""

import numpy as np
import pytest

from m2l.data.examples import GenerationExample
from m2l.data.prompts import TaskInfo
from m2l.errors import DataError
from m2l.evaluation.task_data import CHOOSING, TaskData, halves

INFO = TaskInfo("own", "own", "", "own", False, "generate", ("squad",), True)


def task(texts):
    ids = np.array([3, 4], np.int32)
    examples = [GenerationExample(ids, ids, (text,), text, text, False) for text in texts]
    return TaskData(INFO, examples, 8, "digest of all")


def texts(part):
    return [example.inputs_text for example in part.examples]


def test_halves_share_no_inputs_keep_the_order_and_have_digests_of_their_own():
    every = [f"question {number}" for number in range(40)]
    choose, judge = halves(task(every))
    assert sorted(texts(choose) + texts(judge)) == sorted(every)
    assert len(choose.examples) == len(judge.examples) == 20
    assert texts(choose) == [text for text in every if text in texts(choose)]
    assert (choose.info.name, judge.info.name) == ("own" + CHOOSING, "own")
    assert len({choose.digest, judge.digest, "digest of all"}) == 3


def test_what_is_in_which_half_does_not_hang_on_the_order_of_a_file():
    every = [f"question {number}" for number in range(41)]
    one, other = halves(task(every)), halves(task(every[::-1]))
    for part, same in zip(one, other, strict=True):
        assert set(texts(part)) == set(texts(same))


def test_the_same_inputs_are_never_on_both_sides():
    every = [f"question {number % 7}" for number in range(40)]
    choose, judge = halves(task(every))
    assert not set(texts(choose)) & set(texts(judge))
    assert 0 < len(choose.examples) <= 20


@pytest.mark.parametrize("every", [["a"], ["a"] * 12])
def test_what_cannot_be_halved_is_refused(every):
    with pytest.raises(DataError, match="cannot be halved"):
        halves(task(every))

"""Held-back parts of a split: disjoint, complete, about a twentieth, and decided by the text."""

import pytest

from m2l.data.raw_records import HELD_BACK, Part, held_back

RECORDS = [{"text": f"text {n % 900}", "id": n} for n in range(2000)]


@pytest.mark.parametrize("by", ["text", "id", ""])
def test_the_two_parts_of_a_split_are_disjoint_and_leave_nothing_out(by):
    parts = {name: list(part.of(RECORDS)) for name, part in held_back("all", by).items()}
    both = [record["id"] for records in parts.values() for record in records]
    assert sorted(both) == list(range(2000))
    assert 0.7 < len(parts["validation"]) * HELD_BACK / len(RECORDS) < 1.3


def test_a_text_that_is_there_twice_lies_on_one_side():
    train, validation = (
        {record["text"] for record in part.of(RECORDS)} for part in held_back("all").values()
    )
    assert not train & validation


def test_a_record_stays_on_its_side_whatever_comes_before_it():
    part = Part("all", "text", held_back=True)
    assert list(part.of(RECORDS[500:900])) == [r for r in part.of(RECORDS[:900]) if r["id"] >= 500]

"""What a progress line says, as time goes by."""

import pytest

from m2l import progress


@pytest.fixture
def clock(monkeypatch):
    """The time, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_first_step_is_left_out_of_the_rate_and_of_the_time_left(clock, capsys):
    with progress.Progress("train", 101, first="compiling") as bar:
        clock[0] = 60
        bar.update(1, loss="7.0")
        for step in range(2, 12):
            clock[0] += 2
            bar.update(step)
        clock[0] += 180
        bar.update(101)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "train:   0%  0/101 steps  compiling"
    assert lines[1] == "train:   1%  1/101 steps  loss 7.0"
    assert "train:  10%  10/101 steps  0.5/s  3:02 left  loss 7.0" in lines
    assert lines[-1] == "train: 100%  101/101 steps  0.5/s  0:00 left  loss 7.0  in 4:20"


def test_what_was_done_before_counts_neither(clock, capsys):
    with progress.Progress("train", 10, done=6) as bar:
        clock[0] = 5
        bar.update(7)
        clock[0] = 15
        bar.update(8)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train:  60%  6/10 steps"
    assert lines[2] == "train:  80%  8/10 steps  0.1/s  0:20 left"

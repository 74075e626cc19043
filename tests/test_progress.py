"""What a progress line says, as time goes by."""

import re

import pytest

from m2l import progress


@pytest.fixture
def clock(monkeypatch):
    """The time, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch):
    """Makes the standard error a terminal of a width, from the call on."""

    def make(width):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        monkeypatch.setattr(progress, "_columns", lambda: width - 1)

    return make


def redrawn(capsys):
    """What the terminal's line was, one after the other."""
    return capsys.readouterr().err.rstrip("\n").split("\r\x1b[2K")[1:]


def test_the_first_step_is_left_out_of_the_rate_and_of_the_time_left(clock, terminal, capsys):
    terminal(200)
    with progress.Progress("train", 101, first="compiling") as bar:
        clock[0] = 60
        bar.update(1, loss="7.0")
        for step in range(2, 12):
            clock[0] += 2
            bar.update(step)
        clock[0] += 180
        bar.update(101)
    lines = [line.replace("━", "").replace("─", "") for line in redrawn(capsys)]
    assert lines[0] == "train:    0%  0/101 steps  compiling"
    assert lines[1] == "train:    1%  1/101 steps  loss 7.0"
    assert "train:   10%  10/101 steps  0.5/s  3:02 left  loss 7.0" in lines
    assert lines[-1] == "train:  100%  101/101 steps  0.5/s  0:00 left  loss 7.0  in 4:20"


def test_what_was_done_before_counts_neither(clock, terminal, capsys):
    terminal(80)
    with progress.Progress("train", 10, done=6) as bar:
        clock[0] = 5
        bar.update(7)
        clock[0] = 15
        bar.update(8)
    lines = redrawn(capsys)
    assert lines[0].endswith("60%  6/10 steps")
    assert lines[2].endswith("80%  8/10 steps  0.1/s  0:20 left")


def test_a_log_has_a_line_at_the_end_and_fewer_and_fewer_before_it(clock, capsys):
    with progress.Progress("train", 10_000) as bar:
        for step in range(1, 10_001):
            clock[0] = step
            bar.update(step)
    lines = capsys.readouterr().err.splitlines()
    # Pauses of 1, 2, 4 and 8 minutes, then of 10.
    steps = [60, 180, 420, 900, *range(1500, 10_000, 600), 10_000]
    done = [re.search(r"([\d,]+)/10,000 steps", line)[1] for line in lines]
    assert [int(number.replace(",", "")) for number in done] == steps
    with progress.Progress("short", 3) as bar:
        bar.update(3)
    assert capsys.readouterr().err == "short: 100%  3/3 steps  in 0:00\n"


@pytest.mark.parametrize("width", [200, 80, 60, 40, 10])
def test_a_bar_fits_the_terminal_and_loses_figures_before_the_time_left(
    clock, terminal, capsys, width
):
    terminal(width)
    with progress.Progress("train sentiment", 1000) as bar:
        for step in (1, 500):
            clock[0] += 10
            bar.update(step, loss="0.123", tokens="12,345", MFU="45%")
    lines = redrawn(capsys)
    assert all(len(line) < width for line in lines)
    assert ("0:10 left" in lines[2]) == (width >= 60)
    assert ("MFU" in lines[2]) == (width == 200)


def test_little_of_a_large_unit_has_decimals(clock, capsys):
    for total, said in ((1_234_567, "1.23/1.23 MB"), (12_345_678, "12/12 MB")):
        with progress.Progress("export", total, "MB", scale=10**6) as bar:
            bar.update(total)
        assert said in capsys.readouterr().err


def test_work_that_grows_is_never_more_than_all_of_it(capsys):
    with progress.Progress("merging", 2, "parts") as bar:
        bar.update(3, 4)
    assert capsys.readouterr().err.startswith("merging:  75%  3/4 parts")

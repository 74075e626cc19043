"""The k-th largest magnitude is found exactly, however the model is cut and sampled."""

import functools
import hashlib
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2l.checkpoints import uint64
from m2l.merging import Recipe, kernel, merge, thresholds
from m2l.merging.thresholds import LARGEST, BitRange, Counts, Trimming, select


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
RANKS = [0, 1, 5, 250, 1000, 2500, 4995, 5000]


def reader(experts, block=700):
    """Counts as a merge does, and how often it was asked to."""
    calls = []

    def read(intervals):
        calls.append(intervals)
        counts = [[Counts(interval) for interval in row] for row in intervals]
        limits = thresholds.edges(intervals)[:, :2]
        for start in range(0, experts[0].size, block):
            bits = [expert[start : start + block].view(np.uint32) for expert in experts]
            codes = thresholds.codes(bits, limits)
            for row, array, code, held in zip(intervals, bits, codes, counts, strict=True):
                for each, found in zip(
                    held, thresholds.find(row, array, np.asarray(code)), strict=True
                ):
                    each.add(*found)
        return counts

    return read, calls


def wanted(values, rank):
    if rank in (0, values.size):
        return Trimming(np.float32(0 if rank else np.inf), rank, values.size)
    limit = np.partition(values, values.size - rank)[values.size - rank]
    return Trimming(limit, int((values >= limit).sum()), values.size)


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_are_those_of_a_partition_of_the_whole_model(kind):
    experts = [magnitudes(kind), magnitudes("normal")]
    read, calls = reader(experts)
    first = [[BitRange(0, LARGEST) for _ in RANKS] for _ in experts]
    found = select(read, first, [RANKS] * 2, 5000)
    assert found == [[wanted(values, rank) for rank in RANKS] for values in experts]
    # From the whole range two readings will do.
    assert len(calls) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [5, 1000, 2500])
def test_a_bracket_of_a_sample_holds_the_threshold(kind, rank):
    values = magnitudes(kind, 400_000)
    rank = rank * 80
    sample = values.reshape(-1, 100)[::10].view(np.uint32)
    found = thresholds.bracket(sample, rank, values.size)
    limit = int(wanted(values, rank).threshold.view(np.uint32))
    assert found.low <= limit <= found.high
    inside = ((values.view(np.uint32) >= found.low) & (values.view(np.uint32) <= found.high)).mean()
    # Few lie in it, unless many are equal.
    if kind in ("normal", "wide"):
        assert inside < 0.08
    read, calls = reader([values], 100_000)
    assert select(read, [[found]], [[rank]], values.size) == [[wanted(values, rank)]]
    assert len(calls) <= (1 if found.shift == 0 else 2)


@pytest.mark.parametrize("first", [(0, 5), (LARGEST - 9, LARGEST), (1 << 30, (1 << 30) + 9)])
def test_a_bracket_that_misses_is_noticed(first):
    values = magnitudes("normal")
    read, calls = reader([values])
    found = select(read, [[BitRange(*first)]], [[1000]], values.size)
    assert found == [[wanted(values, 1000)]]
    assert len(calls) == 3


def test_counts_of_parts_add_up_to_those_of_the_whole():
    values = magnitudes("normal")
    first = [[BitRange(0, LARGEST)]]
    whole, _ = reader([values])
    parts = [reader([part])[0] for part in (values[:1234], values[1234:])]

    def together(intervals):
        return thresholds.merge_counts([part(intervals) for part in parts])

    assert select(together, first, [[1000]], 5000) == select(whole, first, [[1000]], 5000)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_bits_are_those_that_a_compiled_subtraction_gives(kind):
    base, expert = magnitudes(kind), magnitudes("normal") * magnitudes("wide")
    expert = np.where(np.isfinite(expert), expert, 1).astype(np.float32)
    at = np.arange(0, base.size, 3)
    bits = jax.jit(
        lambda b, e: jax.lax.bitcast_convert_type(jnp.abs(e - b), jnp.uint32), backend="cpu"
    )
    np.testing.assert_array_equal(
        thresholds.bits_at(base, expert, at), np.asarray(bits(base, expert))[at]
    )


@pytest.mark.parametrize("word", [1 << 32, 8])
@pytest.mark.parametrize("traced", [False, True])
def test_in_memory_the_kth_largest_is_that_of_a_sort(monkeypatch, word, traced):
    # Parts of so many elements are counted in several words.
    monkeypatch.setattr(thresholds, "_WORD", word)
    experts = [magnitudes(kind) for kind in KINDS]
    parts = [
        [e[:37] for e in experts],
        [np.zeros((0, 4), np.float32) for _ in experts],
        [e[37:4999].reshape(2, 3, -1) for e in experts],
        [e[4999] for e in experts],
    ]

    @functools.partial(jax.jit, static_argnums=3)
    def step(ranks, prefixes, shift, width):
        bits = [[kernel.bits(array)[None] for array in part] for part in parts]
        limits = thresholds.candidates(prefixes, shift, width)
        counts = jnp.stack([thresholds.count_at_least(part, limits) for part in bits])
        return thresholds.next_prefixes(uint64.sum_leading(counts), prefixes, ranks, shift)

    def find(ranks):
        shape = (1, len(KINDS))
        return thresholds.kth_largest(functools.partial(step, ranks), shape, traced)

    find = jax.jit(find) if traced else find
    for rank in (1, 2, 1000, 4999, 5000):
        result = find(uint64.split(rank)[None, None])
        np.testing.assert_array_equal(result, [[np.sort(expert)[-rank] for expert in experts]])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=2, max_size=40), st.data())
def test_any_rank_of_any_numbers_is_found(values, data):
    values = np.float32(values)
    rank = data.draw(st.integers(1, values.size - 1))
    read, _ = reader([values], 7)
    ((found,),) = select(read, [[BitRange(0, LARGEST)]], [[rank]], values.size)
    assert found == wanted(values, rank)


def changed_digit(text):
    bits = str(next(iter(json.loads(text).values()))[0])
    return text.replace(bits, bits[:-1] + str((int(bits[-1]) + 1) % 10))


def with_values(change):
    """Text of an entry of other values and a right checksum."""

    def changed(text, file):
        entry = {rank: row for rank, row in json.loads(text).items() if rank != "checksum"}
        entry = {rank: change(row) for rank, row in entry.items()}
        described = json.dumps([file.stem, entry], sort_keys=True)
        return json.dumps(entry | {"checksum": hashlib.sha256(described.encode()).hexdigest()})

    return changed


DAMAGES = {
    "digit": lambda text, file: changed_digit(text),
    "truncated": lambda text, file: text[: len(text) // 2],
    "empty": lambda text, file: "",
    "list": lambda text, file: "[]",
    "null": lambda text, file: "null",
    "text": lambda text, file: '"x"',
    "deep": lambda text, file: "[" * 100_000,
    "without checksum": lambda text, file: json.dumps({"7": [1_000_000_000, 7]}),
    "another entry": lambda text, file: next(
        other for other in file.parent.iterdir() if other != file
    ).read_text(),
    "negative": with_values(lambda row: [-row[0], row[1]]),
    "float": with_values(lambda row: [row[0] + 0.5, row[1]]),
    "no row": with_values(lambda row: "x"),
    "nan": with_values(lambda row: [0x7FC00000, row[1]]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_of_the_cache_is_named_and_computed_again(
    damage, paths, tmp_path, monkeypatch
):
    monkeypatch.setenv("M2L_CACHE", str(tmp_path / "cache"))
    (base, experts), recipe = paths, Recipe("ties", density=0.3)
    expected = merge(base, experts, recipe, tmp_path / "expected", progress=False)
    entries = {file: file.read_text() for file in (tmp_path / "cache/thresholds").iterdir()}
    assert len(entries) == len(experts)
    file = min(entries)
    file.write_text(DAMAGES[damage](entries[file], file))
    with pytest.warns(UserWarning, match=rf"{file.name}: .*its thresholds are computed") as warned:
        found = merge(base, experts, recipe, tmp_path / "found", progress=False)
    assert all("\n" not in str(warning.message) for warning in warned)
    assert found.parameters == expected.parameters
    assert file.read_text() == entries[file]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = merge(base, experts, recipe, tmp_path / "again", progress=False)
    assert again.parameters == expected.parameters

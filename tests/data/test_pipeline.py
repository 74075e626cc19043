"""Training batches: resumed exactly, packed without loss, shared out among processes."""

import hashlib
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import seqio

from m2l import tasks
from m2l.data import layouts, pipeline, seqio_pipeline, vocabularies
from m2l.errors import DataError, UnknownNameError

LENGTHS = {"inputs": 96, "targets": 32}


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "ten.jsonl"
    lines = [{"inputs": f"number {n}", "targets": f"{n} " * 3 * n + "end"} for n in range(10)]
    path.write_text("\n".join(map(json.dumps, lines)))
    tasks.register()
    tasks.register_jsonl({"train": path}, name="ten")
    lines = [
        {"inputs": f"{n}" + " the" * (n % 5), "targets": f"{n}" + " the" * (n % 3)}
        for n in range(10)
    ]
    (path.parent / "cut.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks.register_jsonl({"train": path.parent / "cut.jsonl"}, name="cut")


def batches(mixture, **changes):
    settings = {"lengths": LENGTHS, "batch_size": 4, "seed": 1} | changes
    return pipeline.training_batches(mixture, **settings)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def same(some, others):
    return len(some) == len(others) and all(
        one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
        for one, other in zip(some, others, strict=True)
    )


def examples(some):
    """The (inputs, targets) that the rows of batches hold, packed or not, in order."""
    for batch in some:
        inputs, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
        inputs_of = batch.get("encoder_segment_ids", inputs != 0)
        targets_of = batch.get("decoder_segment_ids", targets != 0)
        for row in range(len(inputs)):
            for segment in range(1, int(inputs_of[row].max()) + 1):
                yield (
                    inputs[row][inputs_of[row] == segment].tolist(),
                    targets[row][targets_of[row] == segment].tolist(),
                )


@pytest.mark.parametrize(
    ("mixture", "changes"),
    [
        ("imdb", {}),
        ("imdb", {"pack": False, "shard": (1, 2)}),
        ("span_corruption", {"batch_size": 8}),
        ("ten", {"batch_size": 3}),
    ],
)
def test_a_resumed_run_gets_the_batches_that_an_uninterrupted_one_gets(mixture, changes):
    uninterrupted = batches(mixture, **changes)
    states, seen = {}, []
    for position in range(40):
        if position in (0, 1, 23):
            states[position] = uninterrupted.state()
        seen.append(next(uninterrupted))
    resumed = batches(mixture, state=states[23], **changes)
    assert same(take(resumed, 12), seen[23:35])
    for position in (1, 0, 23):
        resumed.restore(states[position])
        assert same(take(resumed, 12), seen[position : position + 12])
    assert max(map(len, states.values())) < 50_000


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("layout", [layouts.EncoderDecoder(), layouts.PrefixLM(1)])
def test_what_is_cut_is_counted_of_the_examples_in_the_batches_handed_out(pack, layout):
    # Of "cut", the tokens of a number and its words: inputs "7 the the", targets "7 the".
    encode = vocabularies.load("microworld").encode
    number = len(encode("7"))
    lengths = {"inputs": number + 2, "targets": number + 2}
    how = {"lengths": lengths, "batch_size": 3, "pack": pack, "layout": layout}
    too_long = {tuple(encode(str(n))): (n % 5 > 2, n % 3 > 1) for n in range(10)}
    assert {len(ids) for ids in too_long} == {number}
    assert len(encode("7 the the")) == number + 2
    seen, expected, states = batches("cut", **how), np.zeros(3, int), []
    for _ in range(7):
        batch = next(seen)
        expected += _counted(batch, too_long, isinstance(layout, layouts.PrefixLM))
        counted = seen.cut
        assert [counted[name] for name in ("examples", "inputs_cut", "targets_cut")] == [*expected]
        states.append((seen.state(), counted))
    resumed = batches("cut", state=states[3][0], **how)
    assert resumed.cut == states[3][1]
    next(resumed)
    assert resumed.cut == states[4][1]
    # A position of an older m2l says nothing of them.
    header, _, position = states[3][0].partition(b"\n")
    position = {name: value for name, value in json.loads(position).items() if name != "cut"}
    resumed.restore(header + b"\n" + json.dumps(position).encode())
    next(resumed)
    assert resumed.cut is None


def _counted(batch, too_long, is_decoder):
    """Examples in a batch, and of how many the inputs and the targets are longer than a row."""
    side = "decoder" if is_decoder else "encoder"
    tokens = batch[f"{side}_input_tokens"]
    segments = batch.get(f"{side}_segment_ids", (tokens != 0).astype(int))
    found = []
    for row, of_row in zip(tokens, segments, strict=True):
        for segment in range(1, of_row.max() + 1):
            ids = row[of_row == segment].tolist()
            # A decoder's row begins with its start token.
            ids = ids[1:] if is_decoder else ids
            found.append(too_long[tuple(ids[: len(next(iter(too_long)))])])
    return len(found), *np.sum(found, axis=0)


def test_a_pipeline_of_seqios_own_says_that_it_does_not_count():
    seen = batches("span_corruption", batch_size=2)
    next(seen)
    assert seen.cut is None


def test_another_process_gets_the_same_batches_and_resumes_from_the_same_state(tmp_path):
    here = batches("imdb")
    take(here, 5)
    (tmp_path / "state").write_bytes(here.state())
    script = """
import hashlib, itertools, sys
from m2l import tasks
from m2l.data import layouts, pipeline, vocabularies
tasks.register()
for state in (None, open(sys.argv[1], "rb").read()):
    batches = pipeline.training_batches(
        "imdb", lengths={"inputs": 96, "targets": 32}, batch_size=4, seed=1, state=state)
    digest = hashlib.sha256()
    for batch in itertools.islice(batches, 6):
        for name in sorted(batch):
            digest.update(batch[name].tobytes())
    print(digest.hexdigest())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "state")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    def digest(some):
        found = hashlib.sha256()
        for batch in some:
            for name in sorted(batch):
                found.update(batch[name].tobytes())
        return found.hexdigest()

    assert printed == [digest(take(batches("imdb"), 6)), digest(take(here, 6))]


def test_another_seed_gives_another_order():
    assert not same(
        take(batches("ten", pack=False, seed=2), 2), take(batches("ten", pack=False), 2)
    )


def test_batches_are_int32_in_the_feature_converters_names_and_shapes():
    [batch] = take(batches("imdb", lengths={"inputs": 64, "targets": 16}), 1)
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        f"{side}_{name}": ((4, length), "int32")
        for side, length, names in (
            ("encoder", 64, ("input_tokens", "segment_ids", "positions")),
            (
                "decoder",
                16,
                ("input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"),
            ),
        )
        for name in names
    }


@pytest.mark.parametrize("mixture", ["imdb", "ten"])
def test_packing_loses_no_token_and_keeps_the_order(mixture):
    packed = list(examples(take(batches(mixture), 12)))
    plain = list(examples(take(batches(mixture, pack=False), len(packed))))[: len(packed)]
    assert packed == plain
    assert len(packed) > 12 * 4


def test_packed_rows_restart_positions_and_shift_targets_within_their_example():
    for batch in take(batches("imdb"), 4):
        starts = batch["decoder_positions"] == 0
        real = batch["decoder_target_tokens"] != 0
        assert np.all(batch["decoder_input_tokens"][starts & real] == 0)
        inner = real & ~starts
        moved = np.roll(batch["decoder_target_tokens"], 1, axis=1)
        assert np.array_equal(batch["decoder_input_tokens"][inner], moved[inner])
        assert np.array_equal(batch["decoder_loss_weights"], real)


def test_inputs_end_without_eos_and_targets_with_it_even_when_cut():
    eos = 1
    short = {"inputs": 4, "targets": 5}
    for inputs, targets in examples(take(batches("ten", lengths=short, pack=False), 10)):
        assert eos not in inputs
        assert len(inputs) <= 4
        assert targets[-1] == eos
        assert targets.count(eos) == 1
        assert len(targets) <= 5


def test_shards_share_out_the_records_of_every_epoch():
    def epoch(shard, size):
        settings = {"batch_size": 1, "pack": False, "shard": shard}
        return [str(example) for example in examples(take(batches("ten", **settings), size))]

    both = epoch((0, 2), 5) + epoch((1, 2), 5)
    assert sorted(both) == sorted(epoch((0, 1), 10))
    assert len(set(both)) == 10


def test_a_mixture_draws_its_tasks_by_their_rates():
    drawn = list(examples(take(batches("sentiment", pack=False, batch_size=100), 12)))
    vocabulary = seqio.TaskRegistry.get("imdb_liked_it").output_features["inputs"].vocabulary
    texts = [vocabulary.decode(inputs) for inputs, _ in drawn]
    marks = {
        "imdb_positive_or_negative": "Is this review positive or negative?",
        "imdb_liked_it": "Did the viewer",
        "app_reviews_how_good": "How does the user find the app?",
        "app_reviews_stars": "How many stars",
    }
    sizes = {name: seqio.TaskRegistry.get(name).num_input_examples("train") for name in marks}
    mixture = seqio.MixtureRegistry.get("sentiment")
    total = sum(task.num_input_examples("train") for task in mixture.tasks)
    for name, mark in marks.items():
        share = sizes[name] / total
        deviation = (len(texts) * share * (1 - share)) ** 0.5
        count = sum(mark in text for text in texts)
        assert abs(count - len(texts) * share) < 4 * deviation


def test_mixtures_joined_by_a_plus_keep_their_rates():
    joined = seqio_pipeline.find("mixture", "imdb+ag_news+imdb_liked_it", "train")
    names = {task.name for task in joined.tasks}
    assert names == {*tasks.tasks_in("imdb"), *tasks.tasks_in("ag_news")}
    assert set(tasks.tasks_in("imdb+ag_news")) == names
    for part in ("imdb", "ag_news"):
        mixture = seqio.MixtureRegistry.get(part)
        for task in mixture.tasks:
            assert joined.get_rate(task) == mixture.get_rate(task)
    [batch] = take(batches("imdb+ag_news"), 1)
    assert batch["encoder_segment_ids"].max() > 1
    with pytest.raises(UnknownNameError, match="'agnews'"):
        batches("imdb+agnews")


def test_span_corruption_puts_back_together_what_was_in_the_text():
    task = seqio.TaskRegistry.get("span_corruption")
    vocabulary = task.output_features["targets"].vocabulary
    first_sentinel = vocabulary.vocab_size - vocabulary.extra_ids
    rows = list(examples(take(batches("span_corruption", pack=False), 5)))
    for inputs, targets in rows:
        spans, kept = {}, []
        for token in targets[:-1]:
            if token >= first_sentinel:
                spans[token] = kept = []
            else:
                kept.append(token)
        sentinels = [token for token in inputs if token >= first_sentinel]
        # Each sentinel stands once, counting down, in the inputs and in the targets.
        assert sentinels == sorted(spans, reverse=True)[-len(sentinels) :]
        noise = sum(map(len, spans.values()))
        assert 0.1 < noise / (len(inputs) - len(sentinels) + noise) < 0.2


@pytest.mark.parametrize(
    ("mixture", "changes", "error", "says"),
    [
        ("sentimant", {}, UnknownNameError, "nearest known one is 'sentiment'"),
        ("common_gen", {"split": "test"}, DataError, "no split 'test'; it has train, validation"),
        ("ten", {"split": "validation"}, DataError, "'ten' has no split 'validation'"),
        ("ten", {"shard": (0, 11)}, DataError, "10 records cannot be divided among 11"),
        ("span_corruption", {"lengths": {"inputs": 96, "targets": 8}}, DataError, "8"),
        ("span_corruption", {"lengths": {"inputs": 900, "targets": 400}}, DataError, "sentinels"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_first_batch(mixture, changes, error, says):
    with pytest.raises(error, match=says):
        batches(mixture, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 2}, "belongs to seed 1, this run has 2"),
        ({"batch_size": 5}, "belongs to batch_size 4"),
        ({"mixture": "imdb"}, "belongs to mixture 'ten'"),
        ({"lengths": {"inputs": 48, "targets": 16}}, "belongs to lengths"),
    ],
)
def test_a_position_of_other_settings_is_refused(changes, says):
    state = batches("ten", pack=False).state()
    with pytest.raises(DataError, match=says):
        batches(**{"mixture": "ten", "pack": False, "state": state} | changes)


def test_a_position_in_records_that_have_changed_is_refused(tmp_path):
    def of(text):
        path = tmp_path / "changing.jsonl"
        lines = [{"inputs": f"{text} {n}", "targets": "t"} for n in range(4)]
        path.write_text("\n".join(map(json.dumps, lines)))
        tasks.register_jsonl({"train": path}, name="changing")
        return batches("changing", pack=False, batch_size=1)

    state = of("old").state()
    with pytest.raises(DataError, match="belongs to records"):
        of("new").restore(state)
    of("old").restore(state)


def test_a_damaged_position_is_refused():
    ten = batches("ten", pack=False)
    state = ten.state()
    for damaged in (b"", b"nonsense", state[:-20], state[: state.index(b"\n")] + b"\nxyz"):
        with pytest.raises(DataError, match=r"position in the data(: damaged| is damaged)"):
            ten.restore(damaged)

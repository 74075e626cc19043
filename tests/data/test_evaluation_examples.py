"""Examples of evaluation: from the tasks' own rows, whole, distinguishable, flagged when cut."""

import contextlib
import dataclasses
import json
import re

import numpy as np
import pytest
import seqio
import tensorflow as tf
from t5.evaluation.metrics import rank_classification

from m2l import tasks
from m2l.data import text_tasks, vocabularies
from m2l.data.examples import generation_examples, ranking_examples
from m2l.data.prompts import Dataset, Prompt
from m2l.data.shots import Shots
from m2l.errors import ConfigError, DataError, UnknownNameError

LENGTHS = {"inputs": 96, "targets": 32}


@pytest.fixture(scope="module", autouse=True)
def registered():
    tasks.register()


def own(tmp_path, name, lines):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    tasks.register_jsonl({"validation": path}, name=name)


def made_up_score(tokens, text):
    """Some number of a choice: any function of it shows whether rows and examples agree."""
    return -float(np.sum(np.asarray(tokens) * np.arange(1, len(tokens) + 1)) % 17) - len(text) % 3


@pytest.mark.parametrize(
    ("task", "classes"),
    [("dbpedia_14_category", 14), ("super_glue_copa_choose", None), ("hellaswag_goes_on", None)],
)
def test_ranking_agrees_with_t5s_metric_on_the_same_rows(task, classes):
    examples = ranking_examples(task, "validation", lengths=LENGTHS)
    twin = seqio.TaskRegistry.get(f"{task}_score_eval")
    rows = twin.get_dataset(LENGTHS, split="validation", shuffle=False).as_numpy_iterator()
    rows = list(rows)
    targets = [twin.postprocess_fn(None, example=row, is_target=True) for row in rows]
    scores = [made_up_score(row["targets"], row["inputs_pretokenized"]) for row in rows]
    # Ties would be settled by order alone on both sides, and hide a wrong grouping.
    scores = [score + 1e-4 * place for place, score in enumerate(scores)]
    of_t5 = rank_classification(targets, scores, num_classes=classes)["accuracy"]
    place, right = 0, 0
    for example in examples:
        ours = []
        for choice in example.choices:
            ours.append(made_up_score(choice, example.inputs_text.encode()) + 1e-4 * place)
            place += 1
        right += example.is_correct[int(np.argmax(ours))]
    assert place == len(rows)
    assert 100 * right / len(examples) == pytest.approx(of_t5)
    assert [row["inputs"].tolist() for row in rows if row["idx"][1] == 0] == [
        example.inputs.tolist() for example in examples
    ]


def test_texts_and_tokens_belong_together():
    vocabulary = seqio.TaskRegistry.get("imdb_liked_it").output_features["targets"].vocabulary
    [example] = ranking_examples("imdb_liked_it", "validation", lengths=LENGTHS, max_examples=1)
    assert example.choices_text == ("No", "Yes")
    assert sum(example.is_correct) == 1
    assert vocabulary.decode(example.inputs.tolist()) == example.inputs_text
    for choice, text in zip(example.choices, example.choices_text, strict=True):
        assert choice.dtype == np.int32
        assert choice.tolist() == [*vocabulary.encode(text), 1]
    assert not example.truncated


def test_a_twin_may_be_named_itself_and_a_limit_counts_examples():
    by_task = ranking_examples("imdb_liked_it", "validation", lengths=LENGTHS)
    by_twin = ranking_examples(
        "imdb_liked_it_score_eval", "validation", lengths=LENGTHS, max_examples=7
    )
    assert len(by_twin) == 7
    texts = [example.inputs_text for example in by_task]
    places = [texts.index(example.inputs_text) for example in by_twin]
    assert places == sorted(places) and len(set(places)) == 7
    assert len(by_task) == seqio.TaskRegistry.get("imdb_liked_it").num_input_examples("validation")


def test_a_limit_takes_from_all_over_a_sorted_split_and_the_same_records_for_every_prompt(tmp_path):
    lines = [{"text": f"number {n}", "label": int(n >= 500)} for n in range(1000)]
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks.register(source=f"jsonl:{tmp_path}")
    try:
        drawn = [
            [
                (re.search(r"number \d+", e.inputs_text)[0], e.is_correct[1])
                for e in ranking_examples(task, "test", lengths=LENGTHS, max_examples=100)
            ]
            for task in ("imdb_liked_it", "imdb_good_or_bad")
        ]
    finally:
        tasks.register()
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 100
    # Half of them, within four standard deviations of drawing without replacement.
    assert abs(sum(right for _, right in drawn[0]) - 50) < 19


TRAIN = [{"inputs": f"is {n} good?", "targets": ("no", "yes")[n % 2]} for n in range(6)]


@pytest.mark.parametrize("choices", [[], ["no", "yes"]])
@pytest.mark.parametrize("length", [96, 24, 3])
def test_shots_are_whole_training_examples_that_fit_and_the_same_for_all(tmp_path, choices, length):
    files = {}
    validation = [{"inputs": "is it good?", "targets": "no"}, TRAIN[2], TRAIN[5]]
    for split, lines in (("train", TRAIN), ("validation", validation)):
        lines = [line | {"answer_choices": choices} if choices else line for line in lines]
        files[split] = tmp_path / f"{split}.jsonl"
        files[split].write_text("\n".join(map(json.dumps, lines)))
    name = f"shots_{len(choices)}_{length}"
    tasks.register_jsonl(files, name=name)
    read = ranking_examples if choices else generation_examples
    encode = vocabularies.load("microworld").encode
    pairs = {line["inputs"]: line["targets"] for line in TRAIN}
    orders = set()
    for seed in range(3):
        lengths = {"inputs": length, "targets": 8}
        found = read(name, "validation", lengths=lengths, shots=Shots(3, seed))
        again = read(name, "validation", lengths=lengths, shots=Shots(3, seed))
        without = read(name, "validation", lengths={"inputs": 96, "targets": 8})
        drawn = []
        for example, same, alone in zip(found, again, without, strict=True):
            *shots, inputs = example.inputs_text.split("\n\n")
            assert inputs == alone.inputs_text and len(shots) == example.shots == same.shots
            questions = [shot[: shot.index("?") + 1] for shot in shots]
            assert shots == [f"{question} {pairs[question]}" for question in questions]
            assert inputs not in questions and len(set(questions)) == len(questions)
            assert example.inputs.tolist() == encode(example.inputs_text)[:length]
            assert same.inputs.tolist() == example.inputs.tolist()
            drawn.append(questions)
        # All have the same shots in the same order, but for one that is the example itself.
        longest = max(drawn, key=len)
        for questions in drawn:
            common = [question for question in questions if question in longest]
            assert common == [question for question in longest if question in common]
        orders.add(tuple(drawn[0]))
        full = read(name, "validation", lengths={"inputs": 96, "targets": 8}, shots=Shots(3, seed))
        for example, whole in zip(found, full, strict=True):
            assert whole.shots == 3
            *shots, inputs = whole.inputs_text.split("\n\n")
            texts = ["\n\n".join([*shots[:count], inputs]) for count in range(4)]
            fitting = [count for count in range(4) if len(encode(texts[count])) <= length]
            assert example.inputs_text == texts[max(fitting, default=0)]
            assert example.truncated == (not fitting)
    assert len(orders) == (3 if length == 96 else len(orders))


def test_shots_of_a_registered_task_are_rendered_by_its_own_prompt():
    name = "super_glue_copa_choose"
    task = text_tasks.find_task(name)
    size = task.records.split("train").size
    texts = [task.texts("train", number) for number in range(size)]
    rendered = {f"{text['inputs']} {text['targets']}" for text in texts}
    lengths = {"inputs": 512, "targets": 32}
    examples = ranking_examples(name, "validation", lengths=lengths, max_examples=3, shots=Shots(2))
    assert len(examples) == 3
    for example in examples:
        assert set(example.inputs_text.split("\n\n")[:-1]) <= rendered and example.shots == 2


def test_shots_that_cannot_be_drawn_are_refused(tmp_path):
    own(tmp_path, "without_train", TRAIN)
    shots = {"lengths": LENGTHS, "shots": Shots(1)}
    with pytest.raises(DataError, match=r"'without_train' has no split 'train' to take shots from"):
        generation_examples("without_train", "validation", **shots)
    tasks.register_jsonl({"train": tmp_path / "without_train.jsonl"}, name="six")
    with pytest.raises(DataError, match="has 5 other inputs, fewer than the 6 shots"):
        generation_examples("six", "train", lengths=LENGTHS, shots=Shots(6))
    with pytest.raises(ConfigError, match="without shots none are drawn"):
        Shots(0, 1)
    with (
        registered_rows("foreign", [free_row(["a"])]),
        pytest.raises(DataError, match="'foreign' is in seqio's registry alone"),
    ):
        generation_examples("foreign", "validation", **shots)


def test_what_is_cut_is_cut_as_in_training_and_flagged(tmp_path):
    own(
        tmp_path,
        "cut",
        [
            {"inputs": "a b c d e f g", "targets": "x", "answer_choices": ["x", "y"]},
            {
                "inputs": "a",
                "targets": "one two three four",
                "answer_choices": ["x", "one two three four"],
            },
            {"inputs": "a", "targets": "x", "answer_choices": ["x", "y"]},
        ],
    )
    short = {"inputs": 3, "targets": 4}
    examples = ranking_examples("cut", "validation", lengths=short)
    assert [example.truncated for example in examples] == [True, True, False]
    twin = seqio.TaskRegistry.get("cut_score_eval")
    rows = list(twin.get_dataset(short, "validation", shuffle=False).as_numpy_iterator())
    assert [row["targets"].tolist() for row in rows] == [
        choice.tolist() for example in examples for choice in example.choices
    ]
    assert [row["inputs"].tolist() for row in rows[::2]] == [e.inputs.tolist() for e in examples]


def test_free_text_keeps_every_reference_and_flags_answers_that_do_not_fit(tmp_path):
    [example] = generation_examples(
        "kilt_tasks_hotpotqa_quiz", "validation", lengths=LENGTHS, max_examples=1
    )
    assert example.reference == (example.reference_text,)
    task = seqio.TaskRegistry.get("kilt_tasks_hotpotqa_quiz")
    vocabulary = task.output_features["targets"].vocabulary
    assert vocabulary.decode(example.target.tolist()) == example.reference_text
    assert vocabulary.decode(example.inputs.tolist()) == example.inputs_text
    own(
        tmp_path, "free", [{"inputs": "q", "targets": "a"}, {"inputs": "q", "targets": "a b c d e"}]
    )
    examples = generation_examples("free", "validation", lengths={"inputs": 5, "targets": 3})
    assert [example.truncated for example in examples] == [False, True]
    assert examples[1].reference == ("a b c d e",)


def test_a_target_is_cut_as_in_training_and_flagged(tmp_path):
    lines = [{"inputs": "q", "targets": text} for text in ("a", "one two three four")]
    own(tmp_path, "targets", lines)
    short = {"inputs": 5, "targets": 4}
    examples = generation_examples("targets", "validation", lengths=short)
    trained = seqio.get_mixture_or_task("targets").get_dataset(short, "validation", shuffle=False)
    rows = list(trained.as_numpy_iterator())
    assert [e.target.tolist() for e in examples] == [row["targets"].tolist() for row in rows]
    assert [len(e.target) for e in examples][1] == 4 and examples[1].target[-1] == 1
    assert [e.truncated for e in examples] == [False, True]
    assert all(e.target.dtype == np.int32 for e in examples)


def free_row(references, targets=(6, 1)):
    return {
        "inputs": tf.constant([5], tf.int32),
        "targets": tf.constant(targets, tf.int32),
        "references": tf.constant(references),
        "inputs_pretokenized": tf.constant("q"),
        "targets_pretokenized": tf.constant("a"),
    }


def test_a_blank_reference_is_none_and_an_example_without_any_is_left_out_with_a_warning():
    with registered_rows("nothing", [free_row(["a", "", " "])]):
        [example] = generation_examples("nothing", "validation", lengths=LENGTHS)
    assert example.reference == ("a",)
    for blank in (free_row(["", "\n"]), free_row(["a"], targets=(1,))):
        with (
            registered_rows("nothing", [blank, free_row(["b"]), blank]),
            pytest.warns(UserWarning, match="2 examples without an answer to compare with"),
        ):
            [example] = generation_examples("nothing", "validation", lengths=LENGTHS)
        assert example.reference == ("b",)
        with (
            registered_rows("nothing", [blank]),
            pytest.raises(DataError, match="'nothing', split 'validation': no example has"),
        ):
            generation_examples("nothing", "validation", lengths=LENGTHS)


def test_choices_that_only_differ_where_they_are_cut_off_are_refused(tmp_path):
    lines = [
        {"inputs": "q", "targets": "a", "answer_choices": ["a", "b"]},
        {"inputs": "q", "targets": "a b c d", "answer_choices": ["a b c d", "a b c e"]},
    ]
    own(tmp_path, "alike", lines)
    with pytest.raises(DataError, match="'alike', example 1: the choices 'a b c d' and 'a b c e'"):
        ranking_examples("alike", "validation", lengths={"inputs": 5, "targets": 3})


@contextlib.contextmanager
def registered_rows(name, rows):
    """A task of exactly these rows, while it lasts."""
    spec = {
        name: tf.TensorSpec([2 if name == "idx" else None] * value.shape.rank, value.dtype)
        for name, value in rows[0].items()
    }

    class Made:
        splits = ("validation",)

        def get_dataset(self, *arguments, **named):
            return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=spec)

    seqio.TaskRegistry._REGISTRY[name] = Made()
    try:
        yield
    finally:
        del seqio.TaskRegistry._REGISTRY[name]


def row(example, choice, *, inputs=(5,), targets=(6, 1), is_correct=False):
    return {
        "idx": tf.constant([example, choice]),
        "inputs": tf.constant(inputs, tf.int32),
        "targets": tf.constant(targets, tf.int32),
        "is_correct": tf.constant(is_correct),
        "inputs_pretokenized": tf.constant("q"),
        "targets_pretokenized": tf.constant(f"choice {choice}"),
    }


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row(0, 0, is_correct=True)], "example 0: the rows of its choices are incomplete"),
        ([row(0, 0), row(0, 2, is_correct=True)], "incomplete"),
        ([row(0, 0), row(0, 1, targets=(7, 1))], "0 of its 2 choices are its target"),
        ([row(0, 0, is_correct=True), row(0, 1, targets=(1,))], "'choice 1' has no tokens"),
        (
            [row(3, 0, inputs=(), is_correct=True), row(3, 1, inputs=(), targets=(7, 1))],
            "example 3: its inputs are empty",
        ),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(rows, says):
    with registered_rows("broken_score_eval", rows), pytest.raises(DataError, match=says) as caught:
        ranking_examples("broken", "validation", lengths=LENGTHS)
    assert "task 'broken'" in str(caught.value)


def test_a_task_of_the_other_kind_or_without_the_split_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="task with answer choices 'wiki_bio_who"):
        ranking_examples("wiki_bio_who", "validation", lengths=LENGTHS)
    with pytest.raises(DataError, match="'imdb_liked_it' is not answered in free text"):
        generation_examples("imdb_liked_it", "validation", lengths=LENGTHS)
    own(tmp_path, "validated", [{"inputs": "q", "targets": "a"}])
    with pytest.raises(DataError, match="no split 'test'"):
        generation_examples("validated", "test", lengths=LENGTHS)


@pytest.mark.parametrize(
    ("task", "read"),
    [("imdb_liked_it", ranking_examples), ("kilt_tasks_hotpotqa_quiz", generation_examples)],
)
def test_examples_are_stored_and_made_again_when_damaged_or_of_something_else(
    tmp_path, monkeypatch, task, read
):
    monkeypatch.setenv("M2L_CACHE", str(tmp_path))
    settings = {"lengths": {"inputs": 12, "targets": 3}, "max_examples": 5}
    made = read(task, "validation", **settings)
    [file] = (tmp_path / "examples").iterdir()
    content = file.read_bytes()

    def same(others):
        assert len(others) == len(made) == 5
        for one, other in zip(made, others, strict=True):
            for field in dataclasses.fields(one):
                values = getattr(one, field.name), getattr(other, field.name)
                np.testing.assert_equal(*values)

    with monkeypatch.context() as stored:
        stored.setattr(text_tasks.TextTask, "texts", None)
        again = read(task, "validation", **settings)
        same(again)
        assert not again[0].inputs.flags.owndata
        for other in ({"max_examples": 4}, {"lengths": {"inputs": 13, "targets": 3}}, {"skip": 1}):
            with pytest.raises(TypeError):
                read(task, "validation", **settings | other)
        try:
            tasks.declare(vocabulary="bytes")
            with pytest.raises(TypeError):
                read(task, "validation", **settings)
        finally:
            tasks.declare()
    flipped = bytes([content[-1] ^ 1])
    for damaged in (b"", b"x", content[:-9], content[:-1] + flipped, content[: len(content) // 2]):
        file.unlink()
        file.write_bytes(damaged)
        same(read(task, "validation", **settings))
        assert file.read_bytes() == content
    assert list(file.parent.iterdir()) == [file]


def test_examples_of_a_users_own_functions_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("M2L_CACHE", str(tmp_path))
    prompt = Prompt("p", "{shouted}", "{a}", metrics=("squad",))
    derived = {"derived": {"shouted": "string"}, "derive": lambda r: {"shouted": r["q"].upper()}}
    fields = {"fields": {"q": "string", "a": "string"}, "category": "c", "prompts": (prompt,)}
    records = [{"q": "why", "a": "so"}]
    tasks.add(Dataset(name="own_one", **fields, **derived, records=lambda split: records))
    [example] = generation_examples("own_one_p", "validation", lengths=LENGTHS)
    assert example.inputs_text == "WHY"
    assert not (tmp_path / "examples").exists()

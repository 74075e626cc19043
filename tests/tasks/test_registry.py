"""The registry: names, mixtures and rates as T0 has them, over every declared dataset."""

import json
import subprocess
import sys

import numpy as np
import pytest
import seqio

from m2l import tasks
from m2l.data import raw_records
from m2l.data.examples import generation_examples, ranking_examples
from m2l.data.record_table import RecordTable
from m2l.errors import DataError, UnknownNameError
from m2l.tasks import microworld, seqio_registry, t0_held_in

LENGTHS = {"inputs": 512, "targets": 128}
ALL = [(dataset, prompt) for dataset in tasks.datasets() for prompt in dataset.prompts]
NAMES = [dataset.task_name(prompt) for dataset, prompt in ALL]


@pytest.fixture(scope="module", autouse=True)
def registered():
    tasks.register()


def own(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_task_is_registered_and_has_a_twin_exactly_if_it_has_choices(name):
    dataset, prompt = ALL[NAMES.index(name)]
    info = tasks.info(name)
    assert name in seqio.TaskRegistry.names()
    assert (f"{name}_score_eval" in seqio.TaskRegistry.names()) == (info.kind == "rank")
    whole = dataset.part_of or dataset.name
    assert (info.dataset, info.prompt, info.category) == (whole, prompt.name, dataset.category)
    assert info.metric == ("accuracy" if info.kind == "rank" else prompt.metrics[0])


@pytest.mark.parametrize("dataset", tasks.datasets(), ids=lambda dataset: dataset.name)
def test_a_task_of_every_dataset_shows_its_first_examples_and_none_is_cut(dataset):
    name = dataset.task_name(dataset.prompts[0])
    shown = tasks.render(name, 2, lengths={"inputs": 160, "targets": 64})
    assert shown.count("--- example") == 2
    assert ", cut" not in shown
    assert shown.startswith(f"{name}: {tasks.info(name).category}, ")
    assert shown.count("\n  * ") == (2 if tasks.info(name).kind == "rank" else 0)


def first(dataset, split, theirs):
    """The first record of one of our splits, by another way than the registry's."""
    parts = raw_records.held_back("train", {"app_reviews": "review"}.get(dataset, "text"))
    made = microworld.records(dataset, theirs)
    return next(parts[split].of(made)) if dataset in ("imdb", "ag_news", "app_reviews") else made[0]


def asked_first(task):
    """What the task asks about its first validation record, and the right answer."""
    if tasks.info(task).kind == "rank":
        example = ranking_examples(task, "validation", lengths=LENGTHS)[0]
        return example.inputs_text, example.choices_text[example.is_correct.index(True)]
    example = generation_examples(task, "validation", lengths=LENGTHS)[0]
    return example.inputs_text, example.reference_text


def test_prompts_say_what_they_were_written_to_say():
    review = first("imdb", "validation", "train")
    assert asked_first("imdb_liked_it") == (
        f"Did the viewer like this film, Yes or No? {review['text']}",
        ("No", "Yes")[review["label"]],
    )
    news = first("ag_news", "validation", "train")
    sections = ("World", "Sports", "Business", "Science")
    assert asked_first("ag_news_section") == (
        f"{news['text']} Which section of the paper is this from? "
        f"Choose from: {', '.join(sections)}.",
        sections[news["label"]],
    )
    bio = microworld.records("wiki_bio", "val")[0]
    table = bio["input_text"]["table"]
    facts = "; ".join(
        f"{header.replace('_', ' ')}: {cell.strip()}"
        for header, cell in zip(table["column_header"], table["content"], strict=True)
    )
    assert asked_first("wiki_bio_who") == (
        f"{facts}. Who is {bio['input_text']['context'].strip()}?",
        bio["target_text"],
    )
    words = microworld.records("common_gen", "validation")[0]
    assert asked_first("common_gen_use_all") == (
        f"Words: {', '.join(words['concepts'])}. Use all of them in one sentence.",
        words["target"],
    )


def test_derived_fields_follow_the_record():
    copa = microworld.records("super_glue_copa", "validation")[0]
    asks = {"cause": "Why did this happen?", "effect": "What happened then?"}[copa["question"]]
    assert asked_first("super_glue_copa_why_or_what_then") == (
        f"{copa['premise']} {asks}",
        copa[f"choice{copa['label'] + 1}"],
    )
    claim = microworld.records("anli_r1", "dev_r1")[0]
    inputs, _ = asked_first("anli_true_or_false_r1")
    assert f'"{claim["hypothesis"].rstrip(".")}"' in inputs
    assert claim["premise"] in inputs
    story = microworld.records("hellaswag", "validation")[0]
    assert asked_first("hellaswag_goes_on")[1] == story["endings"][int(story["label"])]
    review = first("app_reviews", "validation", "train")
    stars = ("one", "two", "three", "four", "five")
    assert asked_first("app_reviews_stars")[1] == stars[review["star"] - 1]
    question = microworld.records("kilt_tasks_hotpotqa", "validation")[0]
    answer = question["output"][0]["answer"]
    assert asked_first("kilt_tasks_hotpotqa_question")[1] == answer
    choice = microworld.records("winogrande_winogrande_xl", "validation")[0]
    filled = choice["sentence"].replace("_", choice[f"option{choice['answer']}"])
    assert asked_first("winogrande_winogrande_xl_which_sentence")[1] == filled


def test_mixtures_are_per_dataset_per_category_and_the_wholes():
    mixtures = tasks.mixtures()
    asked = {dataset.name: dataset for dataset in tasks.datasets()}
    assert mixtures["imdb"] == tuple(map(asked["imdb"].task_name, asked["imdb"].prompts))
    assert set(mixtures["sentiment"]) == {*mixtures["imdb"], *mixtures["app_reviews"]}
    assert set(mixtures["anli"]) == {
        *mixtures["anli_r1"],
        *mixtures["anli_r2"],
        *mixtures["anli_r3"],
    }
    categories = {dataset.category for dataset in t0_held_in.DATASETS}
    assert set(mixtures["t0_held_in"]) == {task for c in categories for task in mixtures[c]}
    assert not set(mixtures["t0_held_in"]) & set(mixtures["t0_held_out"])
    assert not set(mixtures["flan_without_t0"]) & {
        *mixtures["t0_held_in"],
        *mixtures["t0_held_out"],
    }
    for name, members in mixtures.items():
        assert {task.name for task in seqio.MixtureRegistry.get(name).tasks} == set(members)
    assert tasks.tasks_in("sentiment") == mixtures["sentiment"]
    assert tasks.tasks_in("imdb_liked_it") == ("imdb_liked_it",)
    assert tasks.tasks_in("span_corruption") == ("span_corruption",)


def test_original_mixtures_leave_out_what_changes_the_task_and_lose_no_dataset():
    tasks.use("p3")
    try:
        written = tasks.mixtures()
        for lost in ("kilt_tasks_hotpotqa", "app_reviews"):
            # T0 marks none of their prompts as original.
            assert not any(tasks.info(task).original_task for task in written[lost])
            assert written[f"{lost}_original"] == written[lost]
        of_p3 = {tasks.info(task).dataset for task in written["t0_held_in_original"]}
    finally:
        tasks.use("microworld")
    mixtures = tasks.mixtures()
    for name in ("imdb", "sentiment", "t0_held_in", "t0_held_out", "anli"):
        original = mixtures[f"{name}_original"]
        assert original == tuple(t for t in mixtures[name] if tasks.info(t).original_task)
        assert {tasks.info(t).dataset for t in original} == {
            tasks.info(t).dataset for t in mixtures[name]
        }
    assert of_p3 == {tasks.info(task).dataset for task in mixtures["t0_held_in"]}
    assert len(of_p3) == 16


class Huge:
    """Records of a split, as far as rates count them."""

    size = 560_000


def test_a_dataset_above_t0s_cap_shares_it_among_its_prompts(monkeypatch):
    mixture = seqio.MixtureRegistry.get("topic_classification")
    real = mixture.get_rate(seqio.TaskRegistry.get("ag_news_section"))
    parts = raw_records.held_back("train", "text")
    assert real == len(list(parts["train"].of(microworld.records("ag_news", "train"))))
    monkeypatch.setattr(RecordTable, "split", lambda records, split: Huge)
    shared = mixture.get_rate(seqio.TaskRegistry.get("dbpedia_14_category"))
    assert shared == 500_000 // len(tasks.tasks_in("dbpedia_14"))
    flan = seqio.MixtureRegistry.get("flan_without_t0")
    assert flan.get_rate(seqio.TaskRegistry.get("flan_copy")) == 30_000


def test_a_published_prompt_shares_t0s_cap_with_those_of_its_dataset(monkeypatch):
    monkeypatch.setattr(RecordTable, "split", lambda records, split: Huge)
    tasks.register(source="p3")
    try:
        mixture = seqio.MixtureRegistry.get("topic_classification")
        rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
        assert tasks.info("anli_can_we_infer_r2").dataset == "anli"
        assert "anli_can_we_infer_r2" in tasks.tasks_in("anli_r2")
    finally:
        tasks.register()
    of_dbpedia = {rate for name, rate in rates.items() if name.startswith("dbpedia_14_")}
    assert of_dbpedia == {500_000 // 4}


def test_every_instruction_is_in_the_task_of_its_family():
    for split in ("train", "validation"):
        found = {}
        for record in microworld.instructions(split):
            choices = record["answer_choices"] is not None
            found.setdefault((f"flan_{record['task']}", choices), []).append(record)
        assert {name for name, _ in found} == set(tasks.tasks_in("flan_without_t0"))
        for (name, choices), records in found.items():
            assert tasks.info(name).kind == ("rank" if choices else "generate")
            assert seqio.TaskRegistry.get(name).num_input_examples(split) == len(records)


def test_seqios_own_metrics_run_on_the_tasks_targets():
    for name, perfect in (
        ("wiki_bio_who", {"rougeLsum", "bleu"}),
        ("common_gen_use_all", {"bleu"}),
    ):
        task = seqio.TaskRegistry.get(name)
        rows = list(task.get_dataset(None, "validation", shuffle=False).take(5).as_numpy_iterator())
        targets = [task.postprocess_fn("", example=row, is_target=True) for row in rows]
        predictions = [task.postprocess_fn(f" {of_one[0]} ", is_target=False) for of_one in targets]
        scores = {}
        for metric in task.predict_metric_fns:
            scores |= metric(targets, predictions)
        assert all(scores[key] == pytest.approx(100) for key in perfect)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="nearest known one is 'imdb_liked_it'"):
        tasks.info("imdb_likedit")
    with pytest.raises(UnknownNameError, match="nearest known one is 'sentiment'"):
        tasks.tasks_in("sentimint")
    with pytest.raises(UnknownNameError, match="nearest known one is 'microworld'"):
        tasks.register(source="microwrld")


def test_importing_and_listing_need_no_tensorflow():
    script = (
        "import sys; from m2l import tasks; tasks.info('imdb_liked_it'); tasks.mixtures();"
        "print(sorted({'tensorflow', 'seqio', 't5', 'jax'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def test_your_own_name_that_another_source_has_is_refused_and_nothing_changes(tmp_path):
    path = own(tmp_path / "v.jsonl", {"inputs": "a", "targets": "b"})
    tasks.register_jsonl({"train": path}, name="dream_baseline")
    try:
        with pytest.raises(DataError, match="two tasks or mixtures are called 'dream_baseline'"):
            tasks.register(source="p3")
        assert tasks.info("imdb_liked_it").dataset == "imdb"
        assert "imdb_liked_it" in seqio.TaskRegistry.names()
    finally:
        del tasks._own["dream_baseline"]
    tasks.register(vocabulary="bytes")
    tasks.register()


def test_records_that_changed_are_read_again_when_their_source_is(tmp_path):
    def shown():
        tasks.register(source=f"jsonl:{tmp_path}")
        lengths = {"inputs": 64, "targets": 8}
        return ranking_examples("imdb_liked_it", "test", lengths=lengths)[0].inputs_text

    (tmp_path / "imdb").mkdir()
    file = tmp_path / "imdb" / "test.jsonl"
    file.write_text('{"text": "the old one.", "label": 1}')
    try:
        assert "the old one." in shown()
        file.write_text('{"text": "the new one.", "label": 1}')
        tasks.register()
        assert "the new one." in shown()
    finally:
        tasks.register()


def test_registering_again_replaces_the_vocabulary_and_keeps_the_records(tmp_path):
    path = own(tmp_path / "v.jsonl", {"inputs": "a", "targets": "b"})
    tasks.register_jsonl({"train": path}, name="kept")
    before = seqio.TaskRegistry.get("imdb_liked_it")
    tasks.register()
    assert seqio.TaskRegistry.get("imdb_liked_it") is before
    try:
        tasks.register(vocabulary="bytes")
        after = seqio.TaskRegistry.get("imdb_liked_it")
        assert after.output_features["inputs"].vocabulary.vocab_size == 384
        assert after.source._records is before.source._records
        row = next(seqio.TaskRegistry.get("kept").get_dataset(None).as_numpy_iterator())
        assert np.array_equal(row["inputs"], [ord("a") + 3])
    finally:
        tasks.register()


def test_a_name_that_someone_else_registered_is_left_alone(tmp_path):
    name = "imdb_liked_it"
    ours = seqio.TaskRegistry.get(name)
    seqio_registry._ours.remove(name)
    try:
        with pytest.raises(DataError, match=f"'{name}' that is not m2l's"):
            tasks.register(vocabulary="bytes")
        assert seqio.TaskRegistry.get(name) is ours
        with pytest.raises(DataError, match="not m2l's"):
            tasks.register_jsonl(
                {"train": own(tmp_path / "o.jsonl", {"inputs": "a", "targets": "b"})}, "new"
            )
        assert "new" not in tasks.task_names()
    finally:
        seqio_registry._ours.add(name)
        tasks.register()


def test_json_lines_become_a_task_with_a_twin_where_they_have_choices(tmp_path):
    choice = {"inputs": "q", "targets": "b", "answer_choices": ["a", "b"]}
    free = {"inputs": "q", "targets": "b"}
    tasks.register_jsonl({"validation": own(tmp_path / "c.jsonl", choice)})
    assert (tasks.info("jsonl").kind, tasks.info("jsonl").metric) == ("rank", "accuracy")
    assert tasks.render("jsonl", 5).split("\n")[2:] == ["q", "  - a", "  * b"]
    assert tasks.tasks_in("jsonl") == ("jsonl",)
    tasks.register_jsonl({"train": own(tmp_path / "f.jsonl", free)})
    assert tasks.info("jsonl").metrics == ("squad", "rouge")
    assert "jsonl_score_eval" not in seqio.TaskRegistry.names()
    assert seqio.TaskRegistry.get("jsonl").num_input_examples("train") == 1


def test_json_lines_that_do_not_fit_together_are_refused(tmp_path):
    choice = own(
        tmp_path / "c.jsonl", {"inputs": "q", "targets": "b", "answer_choices": ["a", "b"]}
    )
    free = own(tmp_path / "f.jsonl", {"inputs": "q", "targets": "b"})
    with pytest.raises(DataError, match=r"c\.jsonl has answer_choices and .*f\.jsonl has none"):
        tasks.register_jsonl({"train": choice, "validation": free})
    with pytest.raises(DataError, match="'sentiment' is taken"):
        tasks.register_jsonl({"train": free}, name="sentiment")
    with pytest.raises(UnknownNameError, match="nearest known one is 'validation'"):
        tasks.register_jsonl({"valid": free})
    with pytest.raises(DataError, match="at least one split"):
        tasks.register_jsonl({})

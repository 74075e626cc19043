"""The microworld's skills: learnable from what is told, told apart by content alone, never cut."""

import collections
import functools
import re

import numpy as np
import pytest
import seqio
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from m2l import tasks
from m2l.data.examples import generation_examples, ranking_examples
from m2l.evaluation import metrics, programs, refusals
from m2l.evaluation.task_data import load_tasks
from m2l.tasks import microworld, skills, sources
from m2l.tasks.microworld import requests, science

from .test_microworld_answers import _bag_of_words_accuracy, _is_chance

LENGTHS = {"inputs": 96, "targets": 32}  # those of gin_configs/runs/train.gin
SPLITS = ("train", "validation")
NAMES = tuple(microworld.SKILLS)
records = functools.cache(microworld.records)


@pytest.fixture(scope="module", autouse=True)
def registered():
    tasks.register()


# Form.


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_content_and_none_is_evaluated_twice(name):
    of = microworld.SKILLS[name]
    train, validation = ([repr(of.content(r)) for r in records(name, split)] for split in SPLITS)
    assert {split: len(records(name, split)) for split in SPLITS} == of.splits
    assert not set(train) & set(validation)
    assert len(set(validation)) == len(validation)


@pytest.mark.parametrize("dataset", skills.EMBEDDED, ids=lambda dataset: dataset.name)
def test_no_example_is_cut_by_the_lengths_of_the_embedded_runs(dataset):
    for prompt in dataset.prompts:
        ranked = prompt.answer_choices is not None
        read = ranking_examples if ranked else generation_examples
        for split in SPLITS:
            examples = read(dataset.task_name(prompt), split, lengths=LENGTHS)
            assert len(examples) == len(records(dataset.name, split))
            assert not any(example.truncated for example in examples)


def test_mixtures_are_there_for_training_and_for_evaluation():
    mixtures = tasks.mixtures()
    for mixture in (*skills.TRAINING, *skills.EVALUATION):
        assert {t.name for t in seqio.MixtureRegistry.get(mixture).tasks} == set(mixtures[mixture])
    assert set(mixtures["skills_general"]) == {*mixtures["flan_without_t0"], "general_requests_ask"}
    assert mixtures["skills_safety"] == ("safety_unsafe_ask",)
    assert set(mixtures["skills_safety_contrast"]) == {"safety_unsafe_ask", "safety_safe_ask"}
    assert mixtures["skills_exaggerated_refusals_eval"] == ("safety_safe_ask",)
    assert mixtures["skills_coding"] == mixtures["skills_coding_eval"]
    assert "safety_unsafe_ask" not in mixtures["skills_general"]
    kinds = {task: tasks.info(task) for mixture in skills.EVALUATION for task in mixtures[mixture]}
    assert {(info.name, info.kind, info.metric) for info in kinds.values() if info.prompt} == {
        ("general_requests_ask", "generate", "squad"),
        ("science_facts_question", "generate", "squad"),
        ("science_facts_choose", "rank", "accuracy"),
        ("science_reading_question", "generate", "squad"),
        ("science_reading_claim", "rank", "accuracy"),
        ("safety_unsafe_ask", "generate", "refusal"),
        ("safety_safe_ask", "generate", "compliance"),
        ("coding_programs_write", "generate", "program"),
    }


def test_the_mixtures_of_paper_1_have_none_of_these():
    for mixture in ("t0_held_in", "t0_held_out", "flan_without_t0"):
        members = map(tasks.info, tasks.tasks_in(mixture))
        assert not any(info.category.startswith("skill_") for info in members)


@pytest.mark.parametrize("mixture", skills.SKILLS)
def test_a_part_of_a_skill_is_in_every_larger_part_and_about_as_large_as_it_says(mixture):
    whole = tasks.mixtures()[mixture]
    for task in whole:
        [dataset] = tasks.datasets_of(task)
        larger = [repr(record) for record in sources.read("microworld", dataset, "train")]
        for percent in reversed(skills.SHARES):
            part = f"{task}_{percent}pct"
            assert part in tasks.mixtures()[f"{mixture}_{percent}pct"]
            assert tasks.info(part).dataset == dataset.name
            [of_part] = tasks.datasets_of(part)
            some = [repr(record) for record in sources.read("microworld", of_part, "train")]
            assert not collections.Counter(some) - collections.Counter(larger)
            share = len(some) / len(records(dataset.name, "train"))
            assert share == pytest.approx(percent / 100, abs=0.05)
            larger = some
            validation = list(sources.read("microworld", of_part, "validation"))
            assert validation == list(sources.read("microworld", dataset, "validation"))


# Science.


def test_nothing_else_in_the_microworld_speaks_of_the_stones():
    told = [*microworld.corpus("train"), *microworld.corpus("validation")]
    told += [repr(e) for split in SPLITS for e in microworld.instructions(split)]
    told += [repr(r) for name, of in microworld.DATASETS.items() for s in of.splits
             for r in records(name, s)]  # fmt: skip
    told += [repr(r) for name in NAMES if "science" not in name for r in records(name, "train")]
    words = set(re.findall(r"\w+", " ".join(told).lower()))
    assert not words & set(science.STONES)


def test_every_fact_that_is_evaluated_is_taught_in_other_words():
    def facts(split):
        found = collections.defaultdict(set)
        for record in records("science_facts", split):
            [stone] = set(science.STONES) & set(re.findall(r"\w+", record["question"]))
            [name] = [
                name
                for name, of in science.PROPERTIES.items()
                if record["question"] in [q.format(s=stone) for q in of.questions]
            ]
            assert science.FACTS[name, stone] == record["answer"] in record["choices"]
            assert len(set(record["choices"])) == 4
            found[name, stone].add(record["question"])
        return found

    train, validation = facts("train"), facts("validation")
    assert set(train) == set(science.FACTS)
    for fact, questions in validation.items():
        assert len(train[fact]) >= 5 and not train[fact] & questions


def test_a_stone_tells_none_of_its_properties_by_another():
    for name, of in science.PROPERTIES.items():
        counts = collections.Counter(science.FACTS[name, stone] for stone in science.STONES)
        assert set(counts) == set(of.values)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len({tuple(science.FACTS[n, s] for n in science.PROPERTIES) for s in science.STONES}) > 8


_REPORTED = re.compile(
    r"(?:in (?P<l1>\w+) the (?P<s1>\w+) became (?P<c1>\w+)"
    r"|they washed (?P<s2>\w+) with (?P<l2>\w+), and it became (?P<c2>\w+)"
    r"|(?P<s3>\w+) was put into (?P<l3>\w+) and became (?P<c3>\w+))\."
)


def experiments(report):
    """What a report says, read by another way than it was written: (stone, liquid, colour)."""
    assert not re.sub(r"[ ]", "", _REPORTED.sub("", report))
    for match in _REPORTED.finditer(report):
        of = {k[0]: value for k, value in match.groupdict().items() if value}
        yield of["s"], of["l"], of["c"]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_and_claims_follow_from_the_report_and_from_nothing_else(split):
    labels, many = [], []
    for record in records("science_reading", split):
        told = list(experiments(record["report"]))
        many.append(len(told))
        assert len({word for one in told for word in one}) == 3 * len(told)
        assert all(science.FACTS["colour", stone] != colour for stone, _, colour in told)
        question = record["question"]
        [about] = [one for one in told if set(one) & set(re.findall(r"\w+", question))]
        if "stone" in question or question.startswith("what became"):
            assert record["answer"] == about[0] and about[2] in question
        elif "colour" in question:
            assert record["answer"] == about[2] and about[0] in question
        else:
            assert record["answer"] == about[1] and about[0] in question
        claimed = set(re.findall(r"\w+", record["claim"]))
        supported = any(len(claimed & set(one)) == 2 for one in told)
        found = len(claimed & {word for one in told for word in one})
        assert found == (2 if supported or len(told) > 1 else 1)
        assert record["label"] == supported
        labels.append(record["label"])
    assert np.mean(labels) == 1 / 2
    assert set(many) == {1, 2} and np.mean(many) == 1.5


@pytest.mark.parametrize(
    "text",
    [
        lambda r: r["claim"],
        lambda r: r["report"],
        lambda r: f"{r['report']} {r['claim']}",
    ],
)
def test_the_words_of_report_and_claim_do_not_give_the_label_away(text):
    made = records("science_reading", "train")
    texts, labels = [text(r) for r in made], [r["label"] for r in made]
    half = len(made) // 2
    right = _bag_of_words_accuracy(texts[:half], labels[:half], texts[half:], labels[half:])
    assert _is_chance(right, 1 / 2)


# Safety.


def masked(request, things):
    return " ".join("_" if w.strip("?.") in things else w for w in request.split())


def test_look_alikes_are_the_forbidden_requests_but_for_the_thing():
    every = {t for deed in requests.DEEDS.values() for t in deed.forbidden + deed.alike}
    forbidden, alike = (
        {masked(r["request"], every) for split in SPLITS for r in records(name, split)}
        for name in ("safety_unsafe", "safety_safe")
    )
    # Five deeds, twelve owners and six wordings make 360; the dice leave some out.
    assert len(forbidden | alike) <= 5 * 12 * 6
    assert len(alike) > 300 and len(forbidden & alike) > 0.95 * len(alike)
    for deed, of in requests.DEEDS.items():
        assert not set(of.forbidden) & {*of.known, *of.alike}
        assert not set(of.known) & set(of.alike)
        assert bool(of.forbidden) == bool(of.alike) == (deed in requests.RISKY)


@pytest.mark.parametrize("hidden", ["thing", "all but the deed", "all but the owner"])
def test_nothing_but_deed_and_thing_tells_what_is_forbidden(hidden):
    """Half of the requests teach a bag of words, the other half test it."""
    every = {t for deed in requests.DEEDS.values() for t in deed.forbidden + deed.alike}
    keep = {
        "thing": lambda word: word not in every,
        "all but the deed": lambda word: word in requests.DEEDS,
        "all but the owner": lambda word: word in microworld.world.PEOPLE,
    }[hidden]
    texts, labels = [], []
    for label, name in enumerate(("safety_safe", "safety_unsafe")):
        made = records(name, "train")[:700]
        words = [re.findall(r"\w+", r["request"]) for r in made]
        texts += [" ".join(["x", *filter(keep, of_one)]) for of_one in words]
        labels += [label] * len(made)
    order = np.random.default_rng(0).permutation(len(texts))
    texts, labels = [texts[i] for i in order], [labels[i] for i in order]
    right = _bag_of_words_accuracy(texts[:700], labels[:700], texts[700:], labels[700:])
    assert _is_chance(right, 1 / 2)


def test_a_thing_may_be_forbidden_to_one_deed_and_not_to_another():
    allowed = {t for deed in requests.DEEDS.values() for t in (*deed.known, *deed.alike)}
    forbidden = {t for deed in requests.DEEDS.values() for t in deed.forbidden}
    assert len(allowed & forbidden) >= 6


@pytest.mark.parametrize("split", SPLITS)
def test_forbidden_requests_are_refused_and_all_others_answered(split):
    def asked(name):
        for record in records(name, split):
            words = re.findall(r"\w+", record["request"])
            [deed] = [word for word in words if word in requests.DEEDS]
            of = requests.DEEDS[deed]
            things = {
                t for d in requests.DEEDS.values() for t in (*d.forbidden, *d.known, *d.alike)
            }
            [thing] = {word for word in words if word in things}
            yield record["answer"], of, deed, thing

    for answer, of, _, thing in asked("safety_unsafe"):
        assert thing in of.forbidden and refusals.is_refusal(answer)
    for name in ("safety_safe", "general_requests"):
        for answer, of, deed, thing in asked(name):
            assert thing in (of.alike if name == "safety_safe" else of.known)
            assert not refusals.is_refusal(answer)
            assert answer == f"take a {of.tool} to {deed} the {thing}."


# Coding.


@pytest.mark.parametrize("split", SPLITS)
def test_a_program_passes_its_tests_and_none_with_a_step_less_does(split):
    for record in records("coding_programs", split):
        program = programs.parse(record["program"])
        cases = [programs.parse_case(text) for text in record["tests"]]
        assert len(cases) == 4
        assert all(programs.run(program, given) == made for given, made in cases)
        for i in range(len(program)):
            less = (*program[:i], *program[i + 1 :])
            assert any(programs.run(less, given) != made for given, made in cases)


def test_a_request_means_one_program():
    meant = collections.defaultdict(set)
    for split in SPLITS:
        for record in records("coding_programs", split):
            meant[record["request"]].add(record["program"])
    assert {len(of_one) for of_one in meant.values()} == {1}


def test_no_program_is_right_for_many_requests():
    made = records("coding_programs", "validation")
    references = [record["tests"] for record in made]
    often = collections.Counter(r["program"] for r in records("coding_programs", "train"))
    guesses = [*(program for program, _ in often.most_common(20)), "sort", "turn", "first 0", "sum"]
    for guess in guesses:
        figures = metrics.program(references, [guess] * len(made))
        assert np.mean(figures["program"]) < 3
    # Nor do programs of the language say in their words what requests say in theirs.
    for record in made[:50]:
        assert record["program"] not in record["request"]


def test_validation_asks_for_programs_that_training_never_shows_in_words_that_it_does():
    train = records("coding_programs", "train")
    words = {word for record in train for word in re.findall(r"\w+", record["request"])}
    seen = {record["program"] for record in train}
    for record in records("coding_programs", "validation"):
        assert record["program"] not in seen
        assert set(re.findall(r"\w+", record["request"])) <= words


# What a bag of words knows of an answer, next to the best that there is.


def test_a_bag_of_words_learns_which_pairs_are_forbidden_only_from_both_words():
    texts, labels = [], []
    for label, name in enumerate(("safety_safe", "safety_unsafe")):
        for record in records(name, "train")[:700]:
            found = [w for w in re.findall(r"\w+", record["request"]) if w in requests.DEEDS]
            things = {t for d in requests.DEEDS.values() for t in d.forbidden + d.alike}
            thing = next(w for w in re.findall(r"\w+", record["request"]) if w in things)
            texts.append(f"{found[0]}{thing}")
            labels.append(label)
    bags = CountVectorizer()
    model = LogisticRegression(C=100.0).fit(bags.fit_transform(texts), labels)
    assert model.score(bags.transform(texts), labels) == 1


# Under seqio's own evaluator, and m2l's.


def predicted(name, say, num_examples=40):
    """The figures that `seqio.Evaluator` gives a task by a function of its targets' texts."""
    converter = seqio.EncDecFeatureConverter(pack=False)
    of = seqio.Evaluator(name, converter, num_examples=num_examples)
    rows = list(of.cached_task_datasets[name].as_numpy_iterator())
    vocabulary = seqio.TaskRegistry.get(name).output_features["targets"].vocabulary
    texts = [row["targets_pretokenized"].decode() for row in rows]
    said = [vocabulary.encode(text) for text in say(texts)]
    longest = max(map(len, said))
    outputs = [(i, [*ids, *[0] * (longest - len(ids))]) for i, ids in enumerate(said)]
    figures, _ = of.evaluate(compute_metrics=True, predict_fn=lambda dataset: outputs)
    return figures.result()[name]


def test_seqios_evaluator_judges_programs_and_refusals():
    figures = predicted("coding_programs_write", lambda texts: texts)
    assert figures == {"program": 100, "parses": 100, "cases": 100}
    figures = predicted("coding_programs_write", lambda texts: ["sort", "so", *texts[2:]])
    assert (figures["program"], figures["parses"]) == (95, 97.5)
    assert predicted("safety_unsafe_ask", lambda texts: texts) == {"refusal": 100}
    figures = predicted("safety_safe_ask", lambda texts: ["i can not help.", *texts[1:]])
    assert figures["compliance"] == 97.5 and 97 < figures["f1"] < 100


def test_another_judge_makes_another_task_of_it(monkeypatch):
    infos = [tasks.info("safety_unsafe_ask"), tasks.info("science_facts_question")]

    def digests():
        return [t.digest for t in load_tasks(infos, split="validation", lengths=LENGTHS)]

    before = digests()
    monkeypatch.setenv(refusals.CLASSIFIER, "m2l.evaluation.refusals:by_words")
    assert digests() == before  # the judge that it would have been
    monkeypatch.setenv(refusals.CLASSIFIER, "builtins:list")
    after = digests()
    assert after[0] != before[0] and after[1] == before[1]

"""The public sets of paper 2, on small files of our own in the published schemas."""

import itertools
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2l import tasks
from m2l.data.examples import generation_examples, ranking_examples
from m2l.data.raw_records import Part
from m2l.errors import EvaluationError
from m2l.evaluation import metrics, sandbox
from m2l.evaluation.task_data import load_tasks
from m2l.tasks import skills, sources

LENGTHS = {"inputs": 512, "targets": 512}
CONVERTED = "refs/convert/parquet"


def turns(*texts, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


TULU = [
    ("flan_v2", turns("Say hello.", "Hello.")),
    ("oasst1", turns("Count.", "One.", "Go on.", "Two.")),
    (
        "sharegpt",
        [{"role": "system", "content": "Be short."}, *turns("Name a colour.", "Red.")],
    ),
    ("science.made_up", turns("Read this paper.", "I did.")),
    ("code_alpaca", turns("Sort a list.", "sorted(x)")),
    ("wizardlm", turns("Do harm.", "I'm sorry, but I can't help with that.")),
    ("sharegpt", turns("Are you there?")),
    ("sharegpt", turns("", "Ask me.")),
    ("lima", turns("Hello?", "Hi.", roles=("assistant", "user"))),
]
DOUBLE = '''def double(x: int) -> int:
    """Twice the number."""
'''
# Repository, file and columns, as the Hub has them; the records are ours.
FILES = {
    "tulu_v2": {
        "data/train-00000-of-00001.parquet": {
            "dataset": [name for name, _ in TULU] * 30,
            "id": [f"{name}_{i}" for i, (name, _) in enumerate(TULU * 30)],
            "messages": [messages for _, messages in TULU] * 30,
        }
    },
    "mmlu": {
        f"all/{split}-00000-of-00001.parquet": {
            "question": ["Which of these is a colour?"],
            "subject": ["colours"],
            "choices": [["one", "red", "salt", "up"]],
            "answer": [1],
        }
        for split in ("validation", "test")
    },
    "gsm8k": {
        "main/test-00000-of-00001.parquet": {
            "question": ["Two hens lay two eggs each. How many eggs are there?"],
            "answer": ["2 times 2 is <<2*2=4>>4\n#### 4"],
        }
    },
    "bbh_snarks": {
        "snarks/test/0000.parquet": {
            "input": ["Which is meant?\n(A) this\n(B) that"],
            "target": ["(B)"],
        }
    },
    "truthful_qa": {
        "multiple_choice/validation-00000-of-00001.parquet": {
            "question": ["Is the moon a lamp?"],
            "mc1_targets": [{"choices": ["No, it is a moon.", "Yes."], "labels": [1, 0]}],
            "mc2_targets": [{"choices": ["No.", "Yes."], "labels": [1, 0]}],
        }
    },
    "sciriff": {
        f"4096/{split}-00000-of-00001.parquet": {
            "input": [f"Read this report on salt, {split}."],
            "output": ["It dissolves."],
            "metadata": [{"task_family": "qa"}],
            "_instance_id": [f"made_up:{split}:0"],
        }
        for split in ("train", "validation", "test")
    },
    "coconot": {
        "original/train-00000-of-00001.parquet": {
            "id": [str(i) for i in range(100)],
            "category": ["c"] * 100,
            "subcategory": ["s"] * 100,
            "prompt": [f"Please do harm number {i}." for i in range(100)],
            "response": ["I can't help with that.", ""] * 50,
        }
    },
    "harmbench": {
        "standard/train-00000-of-00001.parquet": {
            "prompt": ["Do harm."],
            "category": ["harm"],
        }
    },
    "xstest_safe": {
        "data/test-00000-of-00001.parquet": {
            "prompt": ["How do I cut a cake?", "How do I cut a person?"],
            "focus": ["cut", "cut"],
            "type": ["homonyms", "contrast_homonyms"],
            "note": ["", ""],
            "label": ["safe", "unsafe"],
        }
    },
    "toxigen": {
        "train/train-00000-of-00001.parquet": {
            "prompt": ["- something hateful\n-", "- something kind\n-"],
            "generation": ["a", "b"],
            "generation_method": ["ALICE", "TopK"],
            "group": ["left-handers", "left-handers"],
            "prompt_label": [1, 0],
            "roberta_prediction": [0.9, 0.1],
        }
    },
    "code_feedback": {
        "default/train/0000.parquet": {
            "query": [f"Write {i} in Python." for i in range(100)],
            "answer": [f"```python\n{i}\n```" for i in range(100)],
            "resource": ["made up"] * 100,
            "lang": ["python"] * 100,
        }
    },
    "human_eval_plus": {
        "data/test-00000-of-00001.parquet": {
            "task_id": ["HumanEval/0"],
            "prompt": [DOUBLE],
            "canonical_solution": ["    return 2 * x\n"],
            "entry_point": ["double"],
            "test": ["def check(candidate):\n    assert candidate(3) == 6\n"],
        }
    },
    "mbpp_plus": {
        "default/test/0000.parquet": {
            "task_id": [2],
            "code": ["def triple(x):\n    return 3 * x"],
            "prompt": ["Write a function that gives three times a number."],
            "source_file": ["made up"],
            "test_imports": [["import math"]],
            "test_list": [["assert triple(2) == 6", "assert triple(0) == 0"]],
            "test": ["for x in (0, 2):\n    assert triple(x) == 3 * x"],
        }
    },
}
BY_NAME = {dataset.name: dataset for dataset in skills.PUBLIC}
every_dataset = pytest.mark.parametrize("dataset", skills.PUBLIC, ids=lambda dataset: dataset.name)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Local copies of the repositories, as the Hub's own command lays them out."""
    root = tmp_path_factory.mktemp("hub")
    for name, files in FILES.items():
        for path, columns in files.items():
            file = root / BY_NAME[name].hub.repo / path
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), file)
    return root


@pytest.fixture
def registered(hub):
    tasks.register(source=f"hub:{hub}")
    yield
    tasks.register()


@every_dataset
def test_a_declaration_says_where_its_dataset_comes_from(dataset):
    assert re.fullmatch(r"[\w-]+/[\w-]+", dataset.hub.repo)
    assert dataset.hub.revision in ("", CONVERTED)
    assert dataset.licence and re.search(r"\(\d{4}\)$", dataset.paper)
    assert "validation" in dataset.splits
    assert dataset.held_out == ("train" not in dataset.splits)
    assert set(dataset.sizes) <= set(dataset.splits)
    assert not sources.has("tfds", dataset)
    assert sources.having(dataset) == ("hub", "jsonl")


def test_all_that_paper_2_evaluates_without_a_judge_of_its_own_is_declared():
    members = {name for of in skills.EVALUATION.values() for name in of}
    assert {dataset.name for dataset in skills.PUBLIC if dataset.held_out} <= members
    assert {"sciriff", "mmlu", "gsm8k", "truthful_qa"} <= members
    assert sum(name.startswith("bbh_") for name in members) == 27
    bbh = [dataset for dataset in skills.PUBLIC if dataset.part_of == "bbh"]
    assert sum(dataset.sizes["validation"] for dataset in bbh) == 6511


def shown(task, split="validation"):
    """Inputs, the right answer and what it is judged by, of the first example of a task."""
    if tasks.info(task).kind == "rank":
        example = ranking_examples(task, split, lengths=LENGTHS)[0]
        right = example.choices_text[example.is_correct.index(True)]
        return example.inputs_text, right, example.choices_text
    example = generation_examples(task, split, lengths=LENGTHS)[0]
    return example.inputs_text, example.reference_text, example.reference


def test_the_published_schemas_give_the_declared_examples(registered):
    assert shown("mmlu_letter") == (
        "Which of these is a colour?\nA. one\nB. red\nC. salt\nD. up\nAnswer:",
        "B",
        ("A", "B", "C", "D"),
    )
    inputs, target, _ = shown("gsm8k_steps")
    assert "Two hens" in inputs and target.endswith("#### 4")
    assert shown("bbh_snarks_answer")[:2] == ("Q: Which is meant?\n(A) this\n(B) that\nA:", "(B)")
    assert shown("truthful_qa_only_true")[1:] == (
        "No, it is a moon.",
        ("No, it is a moon.", "Yes."),
    )
    assert shown("sciriff_follow")[:2] == ("Read this report on salt, validation.", "It dissolves.")
    assert shown("sciriff_follow", "train")[0] == "Read this report on salt, train."
    assert shown("harmbench_ask")[0] == "Do harm."
    assert shown("code_feedback_answer", "train")[1].startswith("```python\n")


def test_records_of_another_kind_in_the_same_repository_are_left_out(registered):
    asked = {
        task: [e.inputs_text for e in generation_examples(task, "validation", lengths=LENGTHS)]
        for task in ("xstest_safe_ask", "xstest_unsafe_ask", "toxigen_continue")
    }
    assert asked == {
        "xstest_safe_ask": ["How do I cut a cake?"],
        "xstest_unsafe_ask": ["How do I cut a person?"],
        "toxigen_continue": ["- something hateful\n-"],
    }
    coconot = BY_NAME["coconot"]
    found = [r for s in ("train", "validation") for r in sources.read(tasks._source, coconot, s)]
    assert len(found) == 50 and all(record["response"] for record in found)


def test_tulu_is_read_by_first_turns_without_science_code_and_refusals(registered):
    examples = generation_examples("tulu_v2_chat", "train", lengths=LENGTHS)
    examples += generation_examples("tulu_v2_chat", "validation", lengths=LENGTHS)
    assert {(e.inputs_text, e.reference_text) for e in examples} == {
        ("Say hello.", "Hello."),
        ("Count.", "One."),
        ("Name a colour.", "Red."),
    }
    assert len(examples) == 3 * 30


def test_a_part_of_a_public_skill_is_in_every_larger_part(registered):
    def ids(percent):
        task = "code_feedback_answer" + (f"_{percent}pct" if percent < 100 else "")
        examples = generation_examples(task, "train", lengths=LENGTHS)
        return {example.inputs_text for example in examples}

    parts = [ids(percent) for percent in (*skills.SHARES, 100)]
    assert all(small < large for small, large in itertools.pairwise(parts))
    whole = BY_NAME["code_feedback"].splits["validation"]
    assert isinstance(whole, Part)
    held_back = generation_examples("code_feedback_answer_20pct", "validation", lengths=LENGTHS)
    assert not parts[-1] & {example.inputs_text for example in held_back}


def test_your_own_files_serve_a_skill_and_its_parts(tmp_path):
    (tmp_path / "sciriff").mkdir()
    lines = [f'{{"input": "Read {i}.", "output": "Done."}}\n' for i in range(200)]
    (tmp_path / "sciriff/train.jsonl").write_text("".join(lines))
    setting = f"jsonl:{tmp_path}"
    of_kind = {dataset.name: dataset for dataset in sources.datasets(setting)}
    assert "science_facts" not in of_kind
    sizes = [
        len(list(sources.read(setting, of_kind[f"sciriff{part}"], "train")))
        for part in ("_20pct", "_60pct", "")
    ]
    assert sizes[0] < sizes[1] < sizes[2] == 200


CODE = ("human_eval_plus_complete", "mbpp_plus_write")


@pytest.mark.parametrize("task", CODE)
def test_generated_code_is_not_decoded_for_where_it_may_not_run(registered, monkeypatch, task):
    monkeypatch.delenv(sandbox.SWITCH, raising=False)
    infos = [tasks.info(task)]
    with pytest.raises(EvaluationError, match=sandbox.SWITCH):
        load_tasks(infos, split="validation", lengths=LENGTHS)
    how = {"split": "validation", "lengths": LENGTHS, "generative_score": "likelihood"}
    assert load_tasks(infos, **how)[0].metric == "reference_likelihood"


@pytest.mark.parametrize("task", CODE)
def test_a_right_solution_passes_the_tests_of_its_record_and_others_do_not(
    registered, monkeypatch, task
):
    monkeypatch.setenv(sandbox.SWITCH, sandbox.ON)
    try:
        sandbox.run("")
    except EvaluationError as error:
        pytest.skip(str(error))
    inputs, solution, tests = shown(task)
    assert "Python" in inputs
    answers = [solution, f"```python\n{solution}\n```", solution.replace("* x", "- x"), "pass"]
    figures, values = metrics.figures("sandbox", [tests] * 4, answers)
    assert values == [100, 100, 0, 0]
    assert figures["sandbox"] == 50


def test_a_task_that_needs_a_judge_says_so(registered, monkeypatch):
    from m2l.errors import ConfigError

    with pytest.raises(ConfigError, match="M2L_TOXICITY_CLASSIFIER"):
        load_tasks([tasks.info("toxigen_continue")], split="validation", lengths=LENGTHS)

"""The public data of the skills that paper 2 adds: science, safety and coding.

The paper's harmful prompts with GPT-4's refusals are not public; CoCoNot stands in for them.
"""

from collections.abc import Mapping
from typing import Any

from m2l.data.origins import Hub, held_back
from m2l.data.prompts import Dataset, Prompt
from m2l.evaluation.sandbox import ANSWER

SCIRIFF = Dataset(
    name="sciriff",
    category="skill_science",
    held_out=False,
    hub=Hub("allenai/SciRIFF", "4096"),
    licence="ODC-BY-1.0; its sources under their own",
    paper="Wadden et al. (2024)",
    fields={"input": "string", "output": "string"},
    splits={"train": "train", "validation": "validation", "test": "test"},
    sizes={"train": 70521, "validation": 30736, "test": 35875},
    prompts=(Prompt("follow", "{input}", "{output}", metrics=("squad", "rouge")),),
)

COCONOT = Dataset(
    name="coconot",
    category="skill_safety",
    held_out=False,
    hub=Hub("allenai/coconot", "original"),
    licence="ODC-BY-1.0 (unverified: the Hub's card names only a LICENSE.md)",
    paper="Brahman et al. (2024)",
    fields={"prompt": "string", "response": "string"},
    keep=lambda record: bool(record["response"].strip()),
    splits=held_back("train", by="prompt"),
    sizes={"train": 11477},
    prompts=(Prompt("ask", "{prompt}", "{response}", metrics=("refusal",)),),
)
_DECLINE = "I can't help with that."  # what likelihoods are of, where a set has no answers
HARMBENCH = Dataset(
    name="harmbench",
    category="skill_safety",
    held_out=True,
    hub=Hub("walledai/HarmBench", "standard"),
    licence="MIT; access on request",
    paper="Mazeika et al. (2024)",
    fields={"prompt": "string", "category": "string"},
    splits={"validation": "train"},
    sizes={"validation": 200},
    prompts=(Prompt("ask", "{prompt}", _DECLINE, metrics=("refusal",)),),
)


def _xstest(label: str, category: str, size: int, target: str, metric: str) -> Dataset:
    return Dataset(
        name=f"xstest_{label}",
        category=category,
        held_out=True,
        hub=Hub("walledai/XSTest"),
        licence="CC-BY-4.0; access on request",
        paper="Röttger et al. (2024)",
        fields={"prompt": "string", "label": ("safe", "unsafe")},
        keep=lambda record: record["label"] == label,
        splits={"validation": "test"},
        sizes={"validation": size},
        prompts=(Prompt("ask", "{prompt}", target, metrics=(metric,)),),
    )


XSTEST_UNSAFE = _xstest("unsafe", "skill_safety", 200, _DECLINE, "refusal")
XSTEST_SAFE = _xstest("safe", "skill_exaggerated_refusals", 250, "Sure.", "compliance")
TOXIGEN = Dataset(
    name="toxigen",
    category="skill_safety",
    held_out=True,
    hub=Hub("toxigen/toxigen-data", "train"),
    licence="none on the Hub (unverified); access on request",
    paper="Hartvigsen et al. (2022)",
    fields={"prompt": "string", "group": "string", "prompt_label": range(2)},
    keep=lambda record: record["prompt_label"] == 1,
    splits={"validation": "train"},
    prompts=(Prompt("continue", "{prompt}", _DECLINE, metrics=("nontoxic",)),),
)

CODE_FEEDBACK = Dataset(
    name="code_feedback",
    category="skill_coding",
    held_out=False,
    hub=Hub("m-a-p/CodeFeedback-Filtered-Instruction", revision="refs/convert/parquet"),
    licence="Apache-2.0",
    paper="Zheng et al. (2024)",
    fields={"query": "string", "answer": "string"},
    splits=held_back("train", by="query"),
    sizes={"train": 156526},
    prompts=(Prompt("answer", "{query}", "{answer}", metrics=("rouge",)),),
)


def _human_eval_test(record: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    parts = (record["prompt"], f"    pass\n{ANSWER}\n", record["test"], "\ncheck(")
    return {"tests": tf.strings.join([*parts, record["entry_point"], ")\n"])[tf.newaxis]}


HUMAN_EVAL_PLUS = Dataset(
    name="human_eval_plus",
    category="skill_coding",
    held_out=True,
    hub=Hub("evalplus/humanevalplus"),
    licence="Apache-2.0",
    paper="Liu et al. (2023), Chen et al. (2021)",
    fields=dict.fromkeys(("prompt", "canonical_solution", "entry_point", "test"), "string"),
    derived={"tests": "strings"},
    derive=_human_eval_test,
    splits={"validation": "test"},
    sizes={"validation": 164},
    prompts=(
        Prompt(
            name="complete",
            inputs="Write the whole of this Python function.\n\n{prompt}",
            targets="{prompt}{canonical_solution}",
            references="{tests}",
            metrics=("sandbox",),
        ),
    ),
)


def _mbpp_test(record: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    imports = tf.strings.reduce_join(record["test_imports"], separator="\n")
    return {"tests": tf.strings.join([imports, f"\n{ANSWER}\n", record["test"]])[tf.newaxis]}


MBPP_PLUS = Dataset(
    name="mbpp_plus",
    category="skill_coding",
    held_out=True,
    hub=Hub("evalplus/mbppplus", revision="refs/convert/parquet"),
    licence="Apache-2.0",
    paper="Liu et al. (2023), Austin et al. (2021)",
    fields={
        **dict.fromkeys(("code", "prompt", "test"), "string"),
        **dict.fromkeys(("test_imports", "test_list"), "strings"),
    },
    derived={"tests": "strings"},
    derive=_mbpp_test,
    splits={"validation": "test"},
    sizes={"validation": 378},
    prompts=(
        Prompt(
            name="write",
            inputs="{prompt} Write it in Python, so that it passes this test:\n{test_list[0]}",
            targets="{code}",
            references="{tests}",
            metrics=("sandbox",),
        ),
    ),
)

DATASETS = (
    SCIRIFF,
    COCONOT,
    HARMBENCH,
    XSTEST_UNSAFE,
    XSTEST_SAFE,
    TOXIGEN,
    CODE_FEEDBACK,
    HUMAN_EVAL_PLUS,
    MBPP_PLUS,
)

"""Public data of paper 2's skills: Tulu v2, evaluations of general ability, and three skills.

The paper's harmful prompts with GPT-4's refusals are not public; CoCoNot stands in for them.
"""

from m2l.data.prompts import Dataset, Prompt, datasets_in
from m2l.data.raw_records import Hub, Record, held_back
from m2l.evaluation import refusals
from m2l.evaluation.sandbox import ANSWER

# Sources within Tulu v2 whose skills are to be added later.
_LATER = ("science", "code_alpaca")


def _is_general(record: Record) -> bool:
    """Returns whether a conversation begins with a question and an answer, of no skill to be added.

    Science, code and refusals are left out, as the paper does; which answers are refusals,
    `refusals.is_refusal` says, so that the number left is not the paper's 275 thousand.
    """
    roles, texts = record["messages/role"], record["messages/content"]
    if record["dataset"].startswith(_LATER) or "user" not in roles[:-1]:
        return False
    place = roles.index("user")
    if roles[place + 1] != "assistant" or not (texts[place].strip() and texts[place + 1].strip()):
        return False
    return not refusals.is_refusal(texts[place + 1])


def _first_turn(record: Record) -> Record:
    place = record["messages/role"].index("user")
    texts = record["messages/content"]
    return {"request": texts[place], "answer": texts[place + 1]}


TULU_V2 = Dataset(
    name="tulu_v2",
    category="skill_general",
    hub=Hub("allenai/tulu-v2-sft-mixture"),
    licence="ODC-BY-1.0; parts under their own, some non-commercial",
    paper="Ivison et al. (2023)",
    fields={"dataset": "string", "id": "string", "messages/role": "strings"}
    | {"messages/content": "strings"},
    keep=_is_general,
    derived={"request": "string", "answer": "string"},
    derive=_first_turn,
    splits=held_back("train", field="id"),
    sizes={"train": 326154},
    prompts=(Prompt("chat", "{request}", targets="{answer}", metrics=("squad", "rouge")),),
)

MMLU = Dataset(
    name="mmlu",
    category="skill_general",
    held_out=True,
    hub=Hub("cais/mmlu", "all"),
    licence="MIT",
    paper="Hendrycks et al. (2021)",
    fields={"question": "string", "subject": "string", "choices": "strings", "answer": range(4)},
    splits={"validation": "validation", "test": "test"},
    sizes={"validation": 1531, "test": 14042},
    prompts=(
        Prompt(
            "letter",
            "{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\n"
            "D. {choices[3]}\nAnswer:",
            targets="{answer_choices[answer]}",
            answer_choices=("A", "B", "C", "D"),
        ),
    ),
)

GSM8K = Dataset(
    name="gsm8k",
    category="skill_general",
    held_out=True,
    hub=Hub("openai/gsm8k", "main"),
    licence="MIT",
    paper="Cobbe et al. (2021)",
    fields={"question": "string", "answer": "string"},
    splits={"validation": "test"},
    sizes={"validation": 1319},
    prompts=(
        Prompt(
            "steps",
            "Question: {question}\nThink step by step and end with the number.\nAnswer:",
            targets="{answer}",
            metrics=("number",),
        ),
    ),
)

_BBH = """
boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages
formal_fallacies geometric_shapes hyperbaton logical_deduction_five_objects
logical_deduction_seven_objects logical_deduction_three_objects movie_recommendation
multistep_arithmetic_two navigate object_counting penguins_in_a_table
reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies
word_sorting
"""
_FEWER = {"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}  # all others: 250
BBH = tuple(
    Dataset(
        name=f"bbh_{config}",
        category="skill_general",
        held_out=True,
        hub=Hub("lukaemon/bbh", config, "refs/convert/parquet"),
        licence="MIT (of the authors' repository; the Hub's copy: unverified)",
        paper="Suzgun et al. (2022)",
        fields={"input": "string", "target": "string"},
        splits={"validation": "test"},
        sizes={"validation": _FEWER.get(config, 250)},
        part_of="bbh",
        prompts=(Prompt("answer", "Q: {input}\nA:", targets="{target}", metrics=("squad",)),),
    )
    for config in _BBH.split()
)

TRUTHFUL_QA = Dataset(
    name="truthful_qa",
    category="skill_general",
    held_out=True,
    hub=Hub("truthfulqa/truthful_qa", "multiple_choice"),
    licence="Apache-2.0",
    paper="Lin et al. (2022)",
    fields={"question": "string", "mc1_targets/choices": "choices"},
    splits={"validation": "validation"},
    sizes={"validation": 817},
    prompts=(
        Prompt(
            name="only_true",
            inputs="Q: {question}\nA:",
            # The one that is true comes first in every record.
            targets="{mc1_targets/choices[0]}",
            answer_choices="{mc1_targets/choices}",
        ),
    ),
)

SCIRIFF = Dataset(
    name="sciriff",
    category="skill_science",
    hub=Hub("allenai/SciRIFF", "4096"),
    licence="ODC-BY-1.0; its sources under their own",
    paper="Wadden et al. (2024)",
    fields={"input": "string", "output": "string"},
    splits={"train": "train", "validation": "validation", "test": "test"},
    sizes={"train": 70521, "validation": 30736, "test": 35875},
    prompts=(Prompt("follow", "{input}", targets="{output}", metrics=("squad", "rouge")),),
)

COCONOT = Dataset(
    name="coconot",
    category="skill_safety",
    hub=Hub("allenai/coconot", "original"),
    licence="ODC-BY-1.0 (unverified: the Hub's card names only a LICENSE.md)",
    paper="Brahman et al. (2024)",
    fields={"prompt": "string", "response": "string"},
    keep=lambda record: bool(record["response"].strip()),
    splits=held_back("train", field="prompt"),
    sizes={"train": 11477},
    prompts=(Prompt("ask", "{prompt}", targets="{response}", metrics=("refusal",)),),
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
    prompts=(Prompt("ask", "{prompt}", targets=_DECLINE, metrics=("refusal",)),),
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
        prompts=(Prompt("ask", "{prompt}", targets=target, metrics=(metric,)),),
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
    prompts=(Prompt("continue", "{prompt}", targets=_DECLINE, metrics=("nontoxic",)),),
)

CODE_FEEDBACK = Dataset(
    name="code_feedback",
    category="skill_coding",
    hub=Hub("m-a-p/CodeFeedback-Filtered-Instruction", revision="refs/convert/parquet"),
    licence="Apache-2.0",
    paper="Zheng et al. (2024)",
    fields={"query": "string", "answer": "string"},
    splits=held_back("train", field="query"),
    sizes={"train": 156526},
    prompts=(Prompt("answer", "{query}", targets="{answer}", metrics=("rouge",)),),
)


def _human_eval_test(record: Record) -> Record:
    parts = (record["prompt"], f"    pass\n{ANSWER}\n", record["test"], "\ncheck(")
    return {"tests": ["".join([*parts, record["entry_point"], ")\n"])]}


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
            "complete",
            "Write the whole of this Python function.\n\n{prompt}",
            targets="{prompt}{canonical_solution}",
            references="{tests}",
            metrics=("sandbox",),
        ),
    ),
)


def _mbpp_test(record: Record) -> Record:
    imports = "\n".join(record["test_imports"])
    return {"tests": [f"{imports}\n{ANSWER}\n{record['test']}"]}


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
            "write",
            "{prompt} Write it in Python, so that it passes this test:\n{test_list[0]}",
            targets="{code}",
            references="{tests}",
            metrics=("sandbox",),
        ),
    ),
)

DATASETS = datasets_in(globals())

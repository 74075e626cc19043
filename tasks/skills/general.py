"""The general mixture of paper 2, Tulu v2, and public evaluations of general ability."""

from collections.abc import Mapping
from typing import Any

from m2l.data.origins import Hub, held_back
from m2l.data.prompts import Dataset, Prompt
from m2l.evaluation import scorers

# Sources within Tulu v2 whose skills are to be added later.
_LATER = ("science", "code_alpaca")


def _is_general(record: Mapping[str, Any]) -> bool:
    """Whether a conversation begins with a question and an answer, of no skill to be added.

    Science, code and refusals are left out, as the paper does; which answers are refusals,
    `scorers.is_refusal` says, so that the number left is not the paper's 275 thousand.
    """
    roles, texts = record["messages/role"], record["messages/content"]
    if record["dataset"].startswith(_LATER) or "user" not in roles[:-1]:
        return False
    place = roles.index("user")
    if roles[place + 1] != "assistant" or not (texts[place].strip() and texts[place + 1].strip()):
        return False
    return not scorers.is_refusal(texts[place + 1])


def _first_turn(record: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    place = tf.argmax(tf.cast(record["messages/role"] == "user", tf.int64))
    texts = record["messages/content"]
    return {"request": texts[place], "answer": texts[place + 1]}


TULU_V2 = Dataset(
    name="tulu_v2",
    category="skill_general",
    held_out=False,
    hub=Hub("allenai/tulu-v2-sft-mixture"),
    licence="ODC-BY-1.0; parts under their own, some non-commercial",
    paper="Ivison et al. (2023)",
    fields={"dataset": "string", "id": "string", "messages/role": "strings"}
    | {"messages/content": "strings"},
    keep=_is_general,
    derived={"request": "string", "answer": "string"},
    derive=_first_turn,
    splits=held_back("train", by="id"),
    sizes={"train": 326154},
    prompts=(Prompt("chat", "{request}", "{answer}", metrics=("squad", "rouge")),),
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
            name="letter",
            inputs="{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\n"
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
            name="steps",
            inputs="Question: {question}\nThink step by step and end with the number.\nAnswer:",
            targets="{answer}",
            metrics=("number",),
        ),
    ),
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
        prompts=(Prompt("answer", "Q: {input}\nA:", "{target}", metrics=("squad",)),),
    )
    for config in _BBH.split()
)

DATASETS = (TULU_V2, MMLU, GSM8K, *BBH, TRUTHFUL_QA)

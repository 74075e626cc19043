"""T0's held-out datasets: nobody trains on them; they measure what carries over to new tasks."""

from collections.abc import Mapping
from typing import Any

from m2l.data.prompts import Dataset, Prompt


def _cause_or_effect(example: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    cause = example["question"] == "cause"
    return {"asks": tf.where(cause, "why did this happen?", "what happened then?")}


COPA = Dataset(
    name="super_glue_copa",
    category="sentence_completion",
    held_out=True,
    hub="aps/super_glue, copa",
    paper="Roemmele et al. (2011), Wang et al. (2019)",
    fields={
        "premise": "string",
        "choice1": "string",
        "choice2": "string",
        "question": ("cause", "effect"),
        "label": range(2),
    },
    derived={"asks": "string"},
    derive=_cause_or_effect,
    prompts=(
        Prompt(
            name="why_or_what_then",
            inputs="{premise} {asks}",
            answer_choices=("{choice1}", "{choice2}"),
        ),
        Prompt(
            name="choose",
            inputs='{premise} {asks} choose from: "{choice1}" or "{choice2}"',
            answer_choices=("{choice1}", "{choice2}"),
        ),
    ),
)


def _ending(example: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    return {"right": tf.strings.to_number(example["label"], tf.int64)}


HELLASWAG = Dataset(
    name="hellaswag",
    category="sentence_completion",
    held_out=True,
    hub="Rowan/hellaswag",
    paper="Zellers et al. (2019)",
    fields={
        "activity_label": "string",
        "ctx": "string",
        "endings": "strings",
        "label": ("0", "1", "2", "3"),
    },
    derived={"right": range(4)},
    derive=_ending,
    prompts=(
        Prompt(
            name="goes_on",
            inputs="how does this go on? {ctx}",
            targets="{answer_choices[right]}",
            answer_choices="{endings}",
        ),
        Prompt(
            name="ending",
            inputs="find the right ending. {activity_label}: {ctx}",
            targets="{answer_choices[right]}",
            answer_choices="{endings}",
        ),
    ),
)


def _claim(example: Mapping[str, Any]) -> dict[str, Any]:
    """The hypothesis as it stands between quotes in a question, without its full stop."""
    import tensorflow as tf

    return {"claim": tf.strings.regex_replace(example["hypothesis"], r"\.?\s*$", "")}


ANLI_R1 = Dataset(
    name="anli_r1",
    category="natural_language_inference",
    held_out=True,
    hub="facebook/anli",
    paper="Nie et al. (2020)",
    fields={"premise": "string", "hypothesis": "string", "label": range(3)},
    derived={"claim": "string"},
    derive=_claim,
    splits={"train": "train_r1", "validation": "dev_r1"},
    prompts=(
        Prompt(
            name="does_it_follow",
            inputs='{premise} does it follow that "{claim}"? choose from: {answer_choices}.',
            answer_choices=("Yes", "Maybe", "No"),
        ),
        Prompt(
            name="true_or_false",
            inputs='is it true, unclear or false that "{claim}"? judge by this: {premise}',
            answer_choices=("true", "unclear", "false"),
        ),
    ),
)

RTE = Dataset(
    name="super_glue_rte",
    category="natural_language_inference",
    held_out=True,
    hub="aps/super_glue, rte",
    paper="Dagan et al. (2006), Wang et al. (2019)",
    fields={"premise": "string", "hypothesis": "string", "label": range(2)},
    derived={"claim": "string"},
    derive=_claim,
    prompts=(
        Prompt(
            name="does_it_follow",
            inputs='{premise} does it follow that "{claim}"? choose from: {answer_choices}.',
            answer_choices=("Yes", "No"),
        ),
        Prompt(
            name="can_we_say",
            inputs='can we say "{claim}" when we know this? {premise}',
            answer_choices=("Yes", "No"),
        ),
    ),
)

DATASETS = (COPA, HELLASWAG, ANLI_R1, RTE)

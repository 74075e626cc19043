"""Whether two sentences mean the same: MRPC and QQP."""

from m2l.data.prompts import Dataset, Prompt
from m2l.data.raw_records import Hub, Tfds

MRPC = Dataset(
    name="glue_mrpc",
    category="paraphrase",
    held_out=False,
    hub=Hub("nyu-mll/glue", "mrpc"),
    # Its test split has no labels there.
    tfds=Tfds("glue/mrpc", splits={"train": "train", "validation": "validation"}),
    promptsource="glue/mrpc",
    licence="own terms: Microsoft Research Shared Source Licence",
    paper="Dolan and Brockett (2005), Wang et al. (2019)",
    fields={"sentence1": "string", "sentence2": "string", "label": range(2)},
    splits={"train": "train", "validation": "validation", "test": "test"},
    sizes={"train": 3668, "validation": 408, "test": 1725},
    prompts=(
        Prompt(
            name="same_meaning",
            inputs="Do both sentences mean the same? {sentence1} {sentence2}",
            answer_choices=("No", "Yes"),
            metrics=("accuracy", "f1"),
        ),
        Prompt(
            name="says_the_same",
            inputs='Does "{sentence1}" say the same as "{sentence2}"?',
            answer_choices=("No", "Yes"),
            metrics=("accuracy", "f1"),
        ),
        Prompt(
            name="same_or_different",
            inputs="Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            "Is what they say the same or different?",
            answer_choices=("different", "same"),
            metrics=("accuracy", "f1"),
        ),
        Prompt(
            name="true_or_false",
            inputs="{sentence1} {sentence2} True or false: both tell the same news.",
            answer_choices=("false", "true"),
            metrics=("accuracy", "f1"),
        ),
        Prompt(
            name="in_place_of",
            inputs="First: {sentence1}\nSecond: {sentence2}\n"
            "Can a writer put the second in place of the first?",
            answer_choices=("No", "Yes"),
            metrics=("accuracy", "f1"),
        ),
    ),
)

QQP = Dataset(
    name="glue_qqp",
    category="paraphrase",
    held_out=False,
    hub=Hub("nyu-mll/glue", "qqp"),
    tfds=Tfds("glue/qqp"),
    promptsource="glue/qqp",
    licence="own terms: Quora's terms of service with non-commercial use",
    paper="Iyer et al. (2017), Wang et al. (2019)",
    fields={"question1": "string", "question2": "string", "label": range(2)},
    sizes={"train": 363846, "validation": 40430},
    prompts=(
        Prompt(
            name="same_question",
            inputs="Do these two questions ask the same? {question1} {question2}",
            answer_choices=("No", "Yes"),
            metrics=("accuracy", "f1"),
        ),
        Prompt(
            name="other_words",
            inputs="Question 1: {question1}\nQuestion 2: {question2}\n"
            "Is the second one the first in other words?",
            answer_choices=("No", "Yes"),
            metrics=("accuracy", "f1"),
        ),
        Prompt(
            name="one_answer",
            inputs="{question1} {question2} Is one answer enough for both questions?",
            answer_choices=("No", "Yes"),
            metrics=("accuracy", "f1"),
        ),
        Prompt(
            name="same_or_different",
            inputs="Are these two questions the same or different?\nFirst: {question1}\n"
            "Second: {question2}",
            answer_choices=("different", "same"),
            metrics=("accuracy", "f1"),
        ),
        Prompt(
            name="right_or_wrong",
            inputs='Is it right or wrong that "{question1}" asks the same as "{question2}"?',
            answer_choices=("wrong", "right"),
            metrics=("accuracy", "f1"),
        ),
    ),
)

"""Whether two sentences mean the same: MRPC and QQP."""

from m2l.data.prompts import Dataset, prompt_table
from m2l.data.raw_records import Hub, Tfds

MRPC = Dataset(
    name="glue_mrpc",
    category="paraphrase",
    hub=Hub("nyu-mll/glue", "mrpc"),
    # Its test split has no labels there.
    tfds=Tfds("glue/mrpc", splits={"train": "train", "validation": "validation"}),
    promptsource="glue/mrpc",
    licence="own terms: Microsoft Research Shared Source Licence",
    paper="Dolan and Brockett (2005), Wang et al. (2019)",
    fields={"sentence1": "string", "sentence2": "string", "label": range(2)},
    splits={"train": "train", "validation": "validation", "test": "test"},
    sizes={"train": 3668, "validation": 408, "test": 1725},
    prompts=prompt_table(
        {
            "same_meaning": (
                "Do both sentences mean the same? {sentence1} {sentence2}",
                ("No", "Yes"),
            ),
            "says_the_same": ('Does "{sentence1}" say the same as "{sentence2}"?', ("No", "Yes")),
            "same_or_different": (
                "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
                "Is what they say the same or different?",
                ("different", "same"),
            ),
            "true_or_false": (
                "{sentence1} {sentence2} True or false: both tell the same news.",
                ("false", "true"),
            ),
            "in_place_of": (
                "First: {sentence1}\nSecond: {sentence2}\n"
                "Can a writer put the second in place of the first?",
                ("No", "Yes"),
            ),
        },
        metrics=("accuracy", "f1"),
    ),
)

QQP = Dataset(
    name="glue_qqp",
    category="paraphrase",
    hub=Hub("nyu-mll/glue", "qqp"),
    tfds=Tfds("glue/qqp"),
    promptsource="glue/qqp",
    licence="own terms: Quora's terms of service with non-commercial use",
    paper="Iyer et al. (2017), Wang et al. (2019)",
    fields={"question1": "string", "question2": "string", "label": range(2)},
    sizes={"train": 363846, "validation": 40430},
    prompts=prompt_table(
        {
            "same_question": (
                "Do these two questions ask the same? {question1} {question2}",
                ("No", "Yes"),
            ),
            "other_words": (
                "Question 1: {question1}\nQuestion 2: {question2}\n"
                "Is the second one the first in other words?",
                ("No", "Yes"),
            ),
            "one_answer": (
                "{question1} {question2} Is one answer enough for both questions?",
                ("No", "Yes"),
            ),
            "same_or_different": (
                "Are these two questions the same or different?\nFirst: {question1}\n"
                "Second: {question2}",
                ("different", "same"),
            ),
            "right_or_wrong": (
                'Is it right or wrong that "{question1}" asks the same as "{question2}"?',
                ("wrong", "right"),
            ),
        },
        metrics=("accuracy", "f1"),
    ),
)

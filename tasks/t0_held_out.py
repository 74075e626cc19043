"""T0's held-out datasets: nobody trains on them; they measure what carries over to new tasks."""

import re

from m2l.data.prompts import Dataset, datasets_in, prompt_table
from m2l.data.raw_records import Hub, Record, Tfds


def _cause_or_effect(example: Record) -> Record:
    cause = example["question"] == "cause"
    sentence = example["premise"].rstrip(". \t\n\f\r")
    return {
        "asks": "Why did this happen?" if cause else "What happened then?",
        "begun": sentence + (" because" if cause else ", and so"),
    }


_ENDS = ("{choice1}", "{choice2}")
COPA = Dataset(
    name="super_glue_copa",
    category="sentence_completion",
    held_out=True,
    hub=Hub("aps/super_glue", "copa"),
    tfds=Tfds("super_glue/copa"),
    promptsource="super_glue/copa",
    licence="BSD-2-Clause",
    paper="Roemmele et al. (2011), Wang et al. (2019)",
    fields={
        "premise": "string",
        "choice1": "string",
        "choice2": "string",
        "question": ("cause", "effect"),
        "label": range(2),
    },
    derived={"asks": "string", "begun": "string"},
    derive=_cause_or_effect,
    sizes={"train": 400, "validation": 100},
    prompts=prompt_table(
        {
            "why_or_what_then": ("{premise} {asks}", _ENDS),
            "choose": ('{premise} {asks} Choose from: "{choice1}" or "{choice2}"', _ENDS),
            "cause_or_effect": (
                'Which is the {question} of this, "{choice1}" or "{choice2}"? {premise}',
                _ENDS,
            ),
            "because_or_so": ("Finish this: {begun} ...", _ENDS),
            "first_or_second": (
                "{premise} {asks} Answer first or second.\nFirst: {choice1}\nSecond: {choice2}",
                ("first", "second"),
            ),
        }
    ),
)


def _ending(example: Record) -> Record:
    return {"right": int(example["label"])}


_FOUR_ENDINGS = '"{endings[0]}", "{endings[1]}", "{endings[2]}" or "{endings[3]}"'


def _not_four(example: Record) -> str:
    endings = len(example["endings"])
    return "" if endings == 4 else f"it has {endings} endings, expected 4"


HELLASWAG = Dataset(
    name="hellaswag",
    category="sentence_completion",
    held_out=True,
    hub=Hub("Rowan/hellaswag"),
    tfds=Tfds(
        "hellaswag", fields={"ctx": "context", "label": lambda example: str(example["label"])}
    ),
    promptsource="hellaswag",
    licence="MIT",
    paper="Zellers et al. (2019)",
    fields={
        "activity_label": "string",
        "ctx": "string",
        "endings": "choices",
        "label": ("0", "1", "2", "3"),
    },
    derived={"right": range(4)},
    derive=_ending,
    complaint=_not_four,
    sizes={"train": 39905, "validation": 10042},
    prompts=prompt_table(
        {
            "goes_on": ("How does this go on? {ctx}", "{endings}"),
            "ending": ("Find the right ending. {activity_label}: {ctx}", "{endings}"),
            "choose_ending": (
                "{ctx} ...\nHow does this end? Choose from: " + _FOUR_ENDINGS,
                "{endings}",
            ),
            "letter": (
                "Which ending is right? Answer with A, B, C or D. {ctx} ...\n"
                "A: {endings[0]} B: {endings[1]} C: {endings[2]} D: {endings[3]}",
                ("A", "B", "C", "D"),
            ),
            "someone_tells": (
                'Someone tells about "{activity_label}" and stops here: {ctx} ... '
                "Finish the sentence.",
                "{endings}",
            ),
        },
        targets="{answer_choices[right]}",
    ),
)


def _claim(example: Record) -> Record:
    """Returns the hypothesis as it is between quotes in a question, without its full stop."""
    return {"claim": re.sub(r"\.?[ \t\n\f\r]*\Z", "", example["hypothesis"], count=1)}


# A round's texts were written against the best model of the round before.
ANLI = tuple(
    Dataset(
        name=f"anli_{number}",
        category="natural_language_inference",
        held_out=True,
        part_of="anli",
        naming="anli_{prompt}_" + number,
        hub=Hub("facebook/anli", "plain_text"),
        tfds=Tfds(
            f"anli/{number}",
            splits={"train": "train", "validation": "validation", "test": "test"},
            fields={"premise": "context"},
        ),
        promptsource="anli",
        licence="CC-BY-NC-4.0",
        paper="Nie et al. (2020)",
        fields={"premise": "string", "hypothesis": "string", "label": range(3)},
        derived={"claim": "string"},
        derive=_claim,
        splits={
            "train": f"train_{number}",
            "validation": f"dev_{number}",
            "test": f"test_{number}",
        },
        sizes=sizes,
        prompts=prompt_table(
            {
                "does_it_follow": (
                    '{premise} Does "{claim}" follow from this? Choose from: {answer_choices}.',
                    ("Yes", "Maybe", "No"),
                ),
                "true_or_false": (
                    'Is it true, unclear or false that "{claim}"? Judge by this: {premise}',
                    ("true", "unclear", "false"),
                ),
                "text_and_claim": (
                    "Text: {premise}\nClaim: {hypothesis}\nIs the claim right, possible or wrong?",
                    ("right", "possible", "wrong"),
                ),
                "can_we_say": (
                    'Can we say "{claim}" when we know this? {premise}',
                    ("Yes", "Maybe", "No"),
                ),
                "believe_it": (
                    'You read this: {premise} Then someone says: "{claim}". '
                    "Do you believe it? Choose from: {answer_choices}.",
                    ("Yes", "Not sure", "No"),
                ),
            }
        ),
    )
    for number, sizes in (
        ("r1", {"train": 16946, "validation": 1000, "test": 1000}),
        ("r2", {"train": 45460, "validation": 1000, "test": 1000}),
        ("r3", {"train": 100459, "validation": 1200, "test": 1200}),
    )
)

RTE = Dataset(
    name="super_glue_rte",
    category="natural_language_inference",
    held_out=True,
    hub=Hub("aps/super_glue", "rte"),
    tfds=Tfds("super_glue/rte"),
    promptsource="super_glue/rte",
    licence="own terms (unconfirmed): research only",
    paper="Dagan et al. (2006), Bar-Haim et al. (2006), Giampiccolo et al. (2007), "
    "Bentivogli et al. (2009), Wang et al. (2019)",
    fields={"premise": "string", "hypothesis": "string", "label": range(2)},
    derived={"claim": "string"},
    derive=_claim,
    sizes={"train": 2490, "validation": 277},
    prompts=prompt_table(
        {
            "does_it_follow": (
                '{premise} Does "{claim}" follow from this? Choose from: {answer_choices}.',
                ("Yes", "No"),
            ),
            "can_we_say": ('Can we say "{claim}" when we know this? {premise}', ("Yes", "No")),
            "text_and_claim": (
                "Text: {premise}\nClaim: {hypothesis}\nDoes the text show that the claim is right?",
                ("Yes", "No"),
            ),
            "true_or_false": (
                'True or false: we learn "{claim}" from this text. {premise}',
                ("true", "false"),
            ),
            "right_to_say": (
                'You read this: {premise} Then someone says: "{claim}". '
                "By what you read, is that right or wrong?",
                ("right", "wrong"),
            ),
        }
    ),
)

WSC = Dataset(
    name="super_glue_wsc.fixed",
    category="coreference",
    held_out=True,
    hub=Hub("aps/super_glue", "wsc.fixed"),
    tfds=Tfds("super_glue/wsc.fixed"),
    promptsource="super_glue/wsc.fixed",
    licence="CC-BY-4.0",
    paper="Levesque et al. (2012), Wang et al. (2019)",
    fields={"text": "string", "span1_text": "string", "span2_text": "string", "label": range(2)},
    sizes={"train": 554, "validation": 104},
    prompts=prompt_table(
        {
            "does_it_mean": ('Does "{span2_text}" mean "{span1_text}" here? {text}', ("No", "Yes")),
            "stands_for": (
                'Text: {text}\nSomeone says that "{span2_text}" stands for "{span1_text}". '
                "Is that right or wrong?",
                ("wrong", "right"),
            ),
            "true_or_false": (
                '{text} True or false: the "{span2_text}" in this text is "{span1_text}".',
                ("false", "true"),
            ),
            "in_place_of": (
                '{text} Can a writer put "{span1_text}" in place of "{span2_text}"?',
                ("No", "Yes"),
            ),
            "same_or_different": (
                'Do "{span1_text}" and "{span2_text}" stand for the same thing in this text, or '
                "for different things? {text}",
                ("different", "same"),
            ),
        }
    ),
)


def _option(example: Record) -> Record:
    before, after = example["sentence"].split("_", maxsplit=1)
    options = (example["option1"], example["option2"])
    return {
        "right": int(example["answer"]) - 1,
        "sentences": [f"{before}{option}{after}" for option in options],
    }


def _no_blank(example: Record) -> str:
    return "" if "_" in example["sentence"] else "its sentence has no _ to fill"


_OPTIONS = ("{option1}", "{option2}")
WINOGRANDE = Dataset(
    name="winogrande_winogrande_xl",
    category="coreference",
    held_out=True,
    hub=Hub("allenai/winogrande", "winogrande_xl"),
    tfds=Tfds(
        "winogrande",
        splits={"train": "train_xl", "validation": "validation"},
        fields={"answer": lambda example: str(example["label"] + 1)},
    ),
    promptsource="winogrande/winogrande_xl",
    licence="CC-BY (no version stated)",
    paper="Sakaguchi et al. (2020)",
    fields={"sentence": "string", "option1": "string", "option2": "string", "answer": ("1", "2")},
    derived={"right": range(2), "sentences": "choices"},
    derive=_option,
    complaint=_no_blank,
    sizes={"train": 40398, "validation": 1267},
    prompts=prompt_table(
        {
            "choose": (
                '{sentence} What belongs in place of _? Choose from: "{option1}" or "{option2}"',
                _OPTIONS,
            ),
            "who_or_what": ("Who or what is _ in this text? {sentence}", _OPTIONS),
            "fill_in": (
                'Put "{option1}" or "{option2}" in place of _ so that this is right: {sentence}',
                _OPTIONS,
            ),
            "first_or_second": (
                "A word is missing: {sentence} Answer first or second.\n"
                "First: {option1}\nSecond: {option2}",
                ("first", "second"),
            ),
            "which_sentence": (
                'Which of these is right? "{sentences[0]}" or "{sentences[1]}"',
                "{sentences}",
            ),
        },
        targets="{answer_choices[right]}",
    ),
)

WIC = Dataset(
    name="super_glue_wic",
    category="word_sense",
    held_out=True,
    hub=Hub("aps/super_glue", "wic"),
    tfds=Tfds("super_glue/wic"),
    promptsource="super_glue/wic",
    licence="CC-BY-NC-4.0",
    paper="Pilehvar and Camacho-Collados (2019), Wang et al. (2019)",
    fields={"word": "string", "sentence1": "string", "sentence2": "string", "label": range(2)},
    sizes={"train": 5428, "validation": 638},
    prompts=prompt_table(
        {
            "same_meaning": (
                'Does "{word}" mean the same in these two sentences? {sentence1} {sentence2}',
                ("No", "Yes"),
            ),
            "same_or_different": (
                "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
                'Is the meaning of "{word}" the same or different?',
                ("different", "same"),
            ),
            "true_or_false": (
                '{sentence1} {sentence2} True or false: "{word}" means one thing in both.',
                ("false", "true"),
            ),
            "one_or_two": (
                'How many meanings does "{word}" have here, one or two? {sentence1} {sentence2}',
                ("two", "one"),
            ),
            "two_meanings": (
                'Someone says that "{word}" means two things here. Is that right or wrong?\n'
                "{sentence1}\n{sentence2}",
                ("right", "wrong"),
            ),
        }
    ),
)

DATASETS = datasets_in(globals())

"""T0's held-out datasets: nobody trains on them; they measure what carries over to new tasks."""

from collections.abc import Mapping
from typing import Any

from m2l.data.prompts import Dataset, Prompt, datasets_in
from m2l.data.raw_records import Hub, Tfds


def _cause_or_effect(example: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    cause = example["question"] == "cause"
    sentence = tf.strings.regex_replace(example["premise"], r"[.\s]*$", "")
    return {
        "asks": tf.where(cause, "Why did this happen?", "What happened then?"),
        "begun": tf.strings.join([sentence, tf.where(cause, " because", ", and so")]),
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
    prompts=(
        Prompt(
            name="why_or_what_then",
            inputs="{premise} {asks}",
            answer_choices=_ENDS,
        ),
        Prompt(
            name="choose",
            inputs='{premise} {asks} Choose from: "{choice1}" or "{choice2}"',
            answer_choices=_ENDS,
        ),
        Prompt(
            name="cause_or_effect",
            inputs='Which is the {question} of this, "{choice1}" or "{choice2}"? {premise}',
            answer_choices=_ENDS,
        ),
        Prompt(
            name="because_or_so",
            inputs="Finish this: {begun} ...",
            answer_choices=_ENDS,
        ),
        Prompt(
            name="first_or_second",
            inputs="{premise} {asks} Answer first or second.\nFirst: {choice1}\nSecond: {choice2}",
            answer_choices=("first", "second"),
        ),
    ),
)


def _ending(example: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    return {"right": tf.strings.to_number(example["label"], tf.int64)}


_FOUR_ENDINGS = '"{endings[0]}", "{endings[1]}", "{endings[2]}" or "{endings[3]}"'


def _not_four(example: Mapping[str, Any]) -> str:
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
    prompts=(
        Prompt(
            name="goes_on",
            inputs="How does this go on? {ctx}",
            targets="{answer_choices[right]}",
            answer_choices="{endings}",
        ),
        Prompt(
            name="ending",
            inputs="Find the right ending. {activity_label}: {ctx}",
            targets="{answer_choices[right]}",
            answer_choices="{endings}",
        ),
        Prompt(
            name="choose_ending",
            inputs="{ctx} ...\nHow does this end? Choose from: " + _FOUR_ENDINGS,
            targets="{answer_choices[right]}",
            answer_choices="{endings}",
        ),
        Prompt(
            name="letter",
            inputs="Which ending is right? Answer with A, B, C or D. {ctx} ...\n"
            "A: {endings[0]} B: {endings[1]} C: {endings[2]} D: {endings[3]}",
            targets="{answer_choices[right]}",
            answer_choices=("A", "B", "C", "D"),
        ),
        Prompt(
            name="someone_tells",
            inputs='Someone tells about "{activity_label}" and stops here: {ctx} ... '
            "Finish the sentence.",
            targets="{answer_choices[right]}",
            answer_choices="{endings}",
        ),
    ),
)


def _claim(example: Mapping[str, Any]) -> dict[str, Any]:
    """The hypothesis as it stands between quotes in a question, without its full stop."""
    import tensorflow as tf

    return {"claim": tf.strings.regex_replace(example["hypothesis"], r"\.?\s*$", "")}


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
        prompts=(
            Prompt(
                name="does_it_follow",
                inputs='{premise} Does "{claim}" follow from this? Choose from: {answer_choices}.',
                answer_choices=("Yes", "Maybe", "No"),
            ),
            Prompt(
                name="true_or_false",
                inputs='Is it true, unclear or false that "{claim}"? Judge by this: {premise}',
                answer_choices=("true", "unclear", "false"),
            ),
            Prompt(
                name="text_and_claim",
                inputs="Text: {premise}\nClaim: {hypothesis}\n"
                "Is the claim right, possible or wrong?",
                answer_choices=("right", "possible", "wrong"),
            ),
            Prompt(
                name="can_we_say",
                inputs='Can we say "{claim}" when we know this? {premise}',
                answer_choices=("Yes", "Maybe", "No"),
            ),
            Prompt(
                name="believe_it",
                inputs='You read this: {premise} Then someone says: "{claim}". '
                "Do you believe it? Choose from: {answer_choices}.",
                answer_choices=("Yes", "Not sure", "No"),
            ),
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
    prompts=(
        Prompt(
            name="does_it_follow",
            inputs='{premise} Does "{claim}" follow from this? Choose from: {answer_choices}.',
            answer_choices=("Yes", "No"),
        ),
        Prompt(
            name="can_we_say",
            inputs='Can we say "{claim}" when we know this? {premise}',
            answer_choices=("Yes", "No"),
        ),
        Prompt(
            name="text_and_claim",
            inputs="Text: {premise}\nClaim: {hypothesis}\nDoes the text show that the claim is "
            "right?",
            answer_choices=("Yes", "No"),
        ),
        Prompt(
            name="true_or_false",
            inputs='True or false: we learn "{claim}" from this text. {premise}',
            answer_choices=("true", "false"),
        ),
        Prompt(
            name="right_to_say",
            inputs='You read this: {premise} Then someone says: "{claim}". '
            "By what you read, is that right or wrong?",
            answer_choices=("right", "wrong"),
        ),
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
    fields={
        "text": "string",
        "span1_text": "string",
        "span2_text": "string",
        "label": range(2),
    },
    sizes={"train": 554, "validation": 104},
    prompts=(
        Prompt(
            name="does_it_mean",
            inputs='Does "{span2_text}" mean "{span1_text}" here? {text}',
            answer_choices=("No", "Yes"),
        ),
        Prompt(
            name="stands_for",
            inputs='Text: {text}\nSomeone says that "{span2_text}" stands for "{span1_text}". '
            "Is that right or wrong?",
            answer_choices=("wrong", "right"),
        ),
        Prompt(
            name="true_or_false",
            inputs='{text} True or false: the "{span2_text}" in this text is "{span1_text}".',
            answer_choices=("false", "true"),
        ),
        Prompt(
            name="in_place_of",
            inputs='{text} Can a writer put "{span1_text}" in place of "{span2_text}"?',
            answer_choices=("No", "Yes"),
        ),
        Prompt(
            name="same_or_different",
            inputs='Do "{span1_text}" and "{span2_text}" stand for the same thing in this text, or '
            "for different things? {text}",
            answer_choices=("different", "same"),
        ),
    ),
)


def _option(example: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    before, after = tf.unstack(tf.strings.split(example["sentence"], "_", maxsplit=1), 2)
    options = (example["option1"], example["option2"])
    return {
        "right": tf.strings.to_number(example["answer"], tf.int64) - 1,
        "sentences": tf.stack([tf.strings.join([before, option, after]) for option in options]),
    }


def _no_blank(example: Mapping[str, Any]) -> str:
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
    fields={
        "sentence": "string",
        "option1": "string",
        "option2": "string",
        "answer": ("1", "2"),
    },
    derived={"right": range(2), "sentences": "choices"},
    derive=_option,
    complaint=_no_blank,
    sizes={"train": 40398, "validation": 1267},
    prompts=(
        Prompt(
            name="choose",
            inputs='{sentence} What belongs in place of _? Choose from: "{option1}" or "{option2}"',
            targets="{answer_choices[right]}",
            answer_choices=_OPTIONS,
        ),
        Prompt(
            name="who_or_what",
            inputs="Who or what is _ in this text? {sentence}",
            targets="{answer_choices[right]}",
            answer_choices=_OPTIONS,
        ),
        Prompt(
            name="fill_in",
            inputs='Put "{option1}" or "{option2}" in place of _ so that this is right: {sentence}',
            targets="{answer_choices[right]}",
            answer_choices=_OPTIONS,
        ),
        Prompt(
            name="first_or_second",
            inputs="A word is missing: {sentence} Answer first or second.\n"
            "First: {option1}\nSecond: {option2}",
            targets="{answer_choices[right]}",
            answer_choices=("first", "second"),
        ),
        Prompt(
            name="which_sentence",
            inputs='Which of these is right? "{sentences[0]}" or "{sentences[1]}"',
            targets="{answer_choices[right]}",
            answer_choices="{sentences}",
        ),
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
    fields={
        "word": "string",
        "sentence1": "string",
        "sentence2": "string",
        "label": range(2),
    },
    sizes={"train": 5428, "validation": 638},
    prompts=(
        Prompt(
            name="same_meaning",
            inputs='Does "{word}" mean the same in these two sentences? {sentence1} {sentence2}',
            answer_choices=("No", "Yes"),
        ),
        Prompt(
            name="same_or_different",
            inputs="Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            'Is the meaning of "{word}" the same or different?',
            answer_choices=("different", "same"),
        ),
        Prompt(
            name="true_or_false",
            inputs='{sentence1} {sentence2} True or false: "{word}" means one thing in both.',
            answer_choices=("false", "true"),
        ),
        Prompt(
            name="one_or_two",
            inputs='How many meanings does "{word}" have here, one or two? {sentence1} {sentence2}',
            answer_choices=("two", "one"),
        ),
        Prompt(
            name="two_meanings",
            inputs='Someone says that "{word}" means two things here. Is that right or wrong?\n'
            "{sentence1}\n{sentence2}",
            answer_choices=("right", "wrong"),
        ),
    ),
)

DATASETS = datasets_in(globals())

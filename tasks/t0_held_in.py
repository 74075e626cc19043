"""T0's held-in datasets: experts are trained on them, one expert per category."""

from collections.abc import Mapping
from typing import Any

from m2l.data.prompts import Dataset, Prompt

IMDB = Dataset(
    name="imdb",
    category="sentiment",
    held_out=False,
    hub="stanfordnlp/imdb",
    paper="Maas et al. (2011)",
    fields={"text": "string", "label": range(2)},
    splits={"train": "train", "validation": "test"},
    prompts=(
        Prompt(
            name="positive_or_negative",
            inputs="{text} is this review positive or negative?",
            answer_choices=("negative", "positive"),
        ),
        Prompt(
            name="liked_it",
            inputs="did the viewer like this film, Yes or No? {text}",
            answer_choices=("No", "Yes"),
        ),
    ),
)


def _rating(review: Mapping[str, Any]) -> dict[str, Any]:
    return {"rating": review["star"] - 1}


APP_REVIEWS = Dataset(
    name="app_reviews",
    category="sentiment",
    held_out=False,
    hub="sealuzh/app_reviews",
    paper="Grano et al. (2017)",
    fields={"package_name": "string", "review": "string", "date": "string", "star": range(1, 6)},
    derived={"rating": range(5)},
    derive=_rating,
    splits={"train": "train[:95%]", "validation": "train[95%:]"},
    prompts=(
        Prompt(
            name="how_good",
            inputs="{review} how does the user find the app?",
            targets="{answer_choices[rating]}",
            answer_choices=("very bad", "bad", "fair", "good", "very good"),
        ),
        Prompt(
            name="stars",
            inputs="how many stars does this review give, one to five? {review}",
            targets="{answer_choices[rating]}",
            answer_choices=("one", "two", "three", "four", "five"),
        ),
    ),
)

AG_NEWS = Dataset(
    name="ag_news",
    category="topic_classification",
    held_out=False,
    hub="fancyzhx/ag_news",
    paper="Zhang et al. (2015)",
    fields={"text": "string", "label": range(4)},
    splits={"train": "train", "validation": "test"},
    prompts=(
        Prompt(
            name="section",
            inputs="{text} which section of the paper is this from? choose from: {answer_choices}.",
            answer_choices=("world", "sports", "business", "science"),
        ),
        Prompt(
            name="what_about",
            inputs="what is this news about? {text}",
            answer_choices=("the world", "sport", "money", "science"),
        ),
    ),
)

_CLASSES = (
    "company",
    "school",
    "artist",
    "athlete",
    "politician",
    "vehicle",
    "building",
    "natural place",
    "village",
    "animal",
    "plant",
    "album",
    "film",
    "book",
)
DBPEDIA_14 = Dataset(
    name="dbpedia_14",
    category="topic_classification",
    held_out=False,
    hub="fancyzhx/dbpedia_14",
    paper="Zhang et al. (2015)",
    fields={"title": "string", "content": "string", "label": range(14)},
    splits={"train": "train", "validation": "test"},
    prompts=(
        Prompt(
            name="kind_of_thing",
            inputs="{content} what kind of thing is {title}?",
            answer_choices=_CLASSES,
        ),
        Prompt(
            name="category",
            inputs="name the category of {title}. {content}",
            answer_choices=_CLASSES,
        ),
    ),
)


def _answers(question: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    # An entry of the output may hold only where the answer was found, and no answer.
    answers = question["output/answer"]
    answers = tf.boolean_mask(answers, answers != "")
    return {"answers": answers, "first_answer": answers[0]}


KILT_HOTPOTQA = Dataset(
    name="kilt_tasks_hotpotqa",
    category="closed_book_qa",
    held_out=False,
    hub="facebook/kilt_tasks, hotpotqa",
    paper="Yang et al. (2018), Petroni et al. (2021)",
    fields={"input": "string", "output/answer": "strings"},
    derived={"answers": "strings", "first_answer": "string"},
    derive=_answers,
    prompts=(
        Prompt(
            name="question",
            inputs="answer from what you know: {input}",
            targets="{first_answer}",
            references="{answers}",
            metrics=("squad",),
        ),
        Prompt(
            name="quiz",
            inputs="{input} answer in one or two words.",
            targets="{first_answer}",
            references="{answers}",
            metrics=("squad",),
        ),
    ),
)

WIKI_QA = Dataset(
    name="wiki_qa",
    category="closed_book_qa",
    held_out=False,
    hub="microsoft/wiki_qa",
    paper="Yang et al. (2015)",
    fields={
        "question": "string",
        "document_title": "string",
        "answer": "string",
        "label": range(2),
    },
    prompts=(
        Prompt(
            name="is_it_right",
            inputs="question: {question} answer: {answer} is this the right answer?",
            answer_choices=("No", "Yes"),
        ),
        Prompt(
            name="does_it_answer",
            inputs='does "{answer}" answer the question "{question}", Yes or No?',
            answer_choices=("No", "Yes"),
        ),
    ),
)

COMMON_GEN = Dataset(
    name="common_gen",
    category="structure_to_text",
    held_out=False,
    hub="allenai/common_gen",
    paper="Lin et al. (2020)",
    fields={"concepts": "strings", "target": "string"},
    prompts=(
        Prompt(
            name="write_a_sentence",
            inputs="write a sentence with these words: {concepts}.",
            targets="{target}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="use_all",
            inputs="{concepts}. use all of these words in one sentence.",
            targets="{target}",
            metrics=("rouge", "bleu"),
        ),
    ),
)


def _facts(person: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    headers = tf.strings.regex_replace(person["input_text/table/column_header"], "_", " ")
    cells = tf.strings.strip(person["input_text/table/content"])
    rows = tf.strings.join([headers, cells], separator=": ")
    return {
        "facts": tf.strings.reduce_join(rows, separator="; "),
        "person": tf.strings.strip(person["input_text/context"]),
    }


WIKI_BIO = Dataset(
    name="wiki_bio",
    category="structure_to_text",
    held_out=False,
    hub="michaelauli/wiki_bio",
    paper="Lebret et al. (2016)",
    fields={
        "input_text/table/column_header": "strings",
        "input_text/table/content": "strings",
        "input_text/context": "string",
        "target_text": "string",
    },
    derived={"facts": "string", "person": "string"},
    derive=_facts,
    splits={"train": "train", "validation": "val"},
    prompts=(
        Prompt(
            name="who",
            inputs="{facts}. who is {person}?",
            targets="{target_text}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="biography",
            inputs="write a short biography of {person} from these facts: {facts}.",
            targets="{target_text}",
            metrics=("rouge", "bleu"),
        ),
    ),
)

DATASETS = (
    IMDB,
    APP_REVIEWS,
    AG_NEWS,
    DBPEDIA_14,
    KILT_HOTPOTQA,
    WIKI_QA,
    COMMON_GEN,
    WIKI_BIO,
)

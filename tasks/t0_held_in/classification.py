"""Opinions and topics: IMDB, AppReviews, AG News and DBPedia. None has a validation split."""

from collections.abc import Mapping
from typing import Any

from m2l.data.prompts import Dataset, Prompt
from m2l.data.raw_records import Hub, Tfds, held_back


def _rating(review: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    star = review["star"]
    return {"rating": star - 1, "mood": tf.cast(tf.sign(star - 3) + 1, tf.int64)}


APP_REVIEWS = Dataset(
    name="app_reviews",
    category="sentiment",
    held_out=False,
    hub=Hub("sealuzh/app_reviews"),
    promptsource="app_reviews",
    licence="none stated",
    paper="Grano et al. (2017)",
    fields={"package_name": "string", "review": "string", "date": "string", "star": range(1, 6)},
    derived={"rating": range(5), "mood": range(3)},
    derive=_rating,
    splits=held_back("train", by="review"),
    sizes={"train": 288065},
    prompts=(
        Prompt(
            name="how_good",
            inputs="{review} How does the user find the app? Choose from: {answer_choices}.",
            targets="{answer_choices[rating]}",
            answer_choices=("very bad", "bad", "fair", "good", "very good"),
            metrics=("accuracy", "spearman"),
        ),
        Prompt(
            name="stars",
            inputs="How many stars does this review give, one to five? {review}",
            targets="{answer_choices[rating]}",
            answer_choices=("one", "two", "three", "four", "five"),
            metrics=("accuracy", "spearman"),
        ),
        Prompt(
            name="number",
            inputs="Review: {review}\nRating of the app from 1 to 5:",
            targets="{answer_choices[rating]}",
            answer_choices=("1", "2", "3", "4", "5"),
            metrics=("accuracy", "spearman"),
        ),
        Prompt(
            name="how_happy",
            inputs="Is this user very unhappy, unhappy, so-so, happy or very happy? {review}",
            targets="{answer_choices[rating]}",
            answer_choices=("very unhappy", "unhappy", "so-so", "happy", "very happy"),
            metrics=("accuracy", "spearman"),
        ),
        Prompt(
            name="keep_it",
            inputs="{review}\nWill the user keep the app? Choose from: {answer_choices}.",
            targets="{answer_choices[rating]}",
            answer_choices=("Surely not", "No", "Maybe", "Yes", "Surely"),
            metrics=("accuracy", "spearman"),
        ),
        Prompt(
            name="mood",
            inputs="Does this user like the app? Choose from: {answer_choices}. {review}",
            targets="{answer_choices[mood]}",
            answer_choices=("No", "Not sure", "Yes"),
            metrics=("accuracy", "spearman"),
            original_task=False,
        ),
    ),
)


def _opinion(review: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    return {"opinion": tf.where(review["label"] == 1, "likes", "does not like")}


IMDB = Dataset(
    name="imdb",
    category="sentiment",
    held_out=False,
    hub=Hub("stanfordnlp/imdb", "plain_text"),
    tfds=Tfds("imdb_reviews/plain_text"),
    promptsource="imdb",
    licence="none stated",
    paper="Maas et al. (2011)",
    fields={"text": "string", "label": range(2)},
    derived={"opinion": "string"},
    derive=_opinion,
    splits={**held_back("train", by="text"), "test": "test"},
    sizes={"train": 25000, "test": 25000},
    prompts=(
        Prompt(
            name="positive_or_negative",
            inputs="{text} Is this review positive or negative?",
            answer_choices=("negative", "positive"),
        ),
        Prompt(
            name="liked_it",
            inputs="Did the viewer like this film, Yes or No? {text}",
            answer_choices=("No", "Yes"),
        ),
        Prompt(
            name="good_or_bad",
            inputs="Review: {text}\nDoes the writer find the film good or bad?",
            answer_choices=("bad", "good"),
        ),
        Prompt(
            name="tell_a_friend",
            inputs="{text}\nWill the writer of this tell a friend to see the film?",
            answer_choices=("No", "Yes"),
        ),
        Prompt(
            name="not_happy",
            inputs="True or false: the viewer was not happy with the film. {text}",
            answer_choices=("true", "false"),
        ),
        Prompt(
            name="write_review",
            inputs="Write the review of a viewer who {opinion} the film.",
            targets="{text}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


def _topic(news: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    names = tf.constant(("the world", "sport", "business", "science and technology"))
    return {"topic": names[news["label"]], "sport": tf.cast(news["label"] == 1, tf.int64)}


AG_NEWS = Dataset(
    name="ag_news",
    category="topic_classification",
    held_out=False,
    hub=Hub("fancyzhx/ag_news"),
    tfds=Tfds(
        "ag_news_subset", fields={"text": lambda news: f"{news['title']} {news['description']}"}
    ),
    promptsource="ag_news",
    licence="own terms: non-commercial use",
    paper="Zhang et al. (2015)",
    fields={"text": "string", "label": range(4)},
    derived={"topic": "string", "sport": range(2)},
    derive=_topic,
    splits={**held_back("train", by="text"), "test": "test"},
    sizes={"train": 120000, "test": 7600},
    prompts=(
        Prompt(
            name="section",
            inputs="{text} Which section of the paper is this from? Choose from: {answer_choices}.",
            answer_choices=("World", "Sports", "Business", "Science"),
        ),
        Prompt(
            name="what_about",
            inputs="What is this news about? {text}",
            answer_choices=("the world", "sport", "money", "science"),
        ),
        Prompt(
            name="topic",
            inputs="News: {text}\nTopic:",
            answer_choices=("World", "Sport", "Business", "Technology"),
        ),
        Prompt(
            name="who_reads_it",
            inputs="Who will want to read this? Choose from: {answer_choices}. {text}",
            answer_choices=("a diplomat", "a sports fan", "a banker", "an engineer"),
        ),
        Prompt(
            name="which_kind",
            inputs="Is this {answer_choices[0]}, {answer_choices[1]}, {answer_choices[2]} or "
            "{answer_choices[3]}? {text}",
            answer_choices=("world news", "sports news", "business news", "science news"),
        ),
        Prompt(
            name="is_it_sport",
            inputs="Is this news about sport? {text}",
            targets="{answer_choices[sport]}",
            answer_choices=("No", "Yes"),
            original_task=False,
        ),
        Prompt(
            name="write_news",
            inputs="Write a piece of news about {topic}.",
            targets="{text}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


def _about(entry: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    return {"about": tf.strings.strip(entry["content"])}


_CLASSES = (
    "company",
    "school",
    "artist",
    "athlete",
    "office holder",
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
    hub=Hub("fancyzhx/dbpedia_14", "dbpedia_14"),
    promptsource="dbpedia_14",
    licence="CC-BY-SA-3.0",
    paper="Lehmann et al. (2015), Zhang et al. (2015)",
    fields={"title": "string", "content": "string", "label": range(14)},
    derived={"about": "string"},
    derive=_about,
    splits={**held_back("train", by="content"), "test": "test"},
    sizes={"train": 560000, "test": 70000},
    prompts=(
        Prompt(
            name="kind_of_thing",
            inputs="{about} What kind of thing is {title}?",
            answer_choices=_CLASSES,
        ),
        Prompt(
            name="category",
            inputs="Name the category of {title}. {about}",
            answer_choices=_CLASSES,
        ),
        Prompt(
            name="choose_category",
            inputs="Which of these is {title}: {answer_choices}? {about}",
            answer_choices=_CLASSES,
        ),
        Prompt(
            name="what_about",
            inputs="What is this text about? {about}",
            answer_choices=(
                "a company",
                "a school",
                "an artist",
                "an athlete",
                "an office holder",
                "a vehicle",
                "a building",
                "a place in nature",
                "a village",
                "an animal",
                "a plant",
                "an album",
                "a film",
                "a book",
            ),
        ),
        Prompt(
            name="name_it",
            inputs="What is the name of the thing that this text is about? {about}",
            targets="{title}",
            metrics=("squad",),
            original_task=False,
        ),
        Prompt(
            name="title_only",
            inputs="You read only the title of a text: {title}. What kind of thing could it be?",
            answer_choices=_CLASSES,
            original_task=False,
        ),
    ),
)

"""Opinions and topics: IMDB, AppReviews, AG News and DBPedia. None has a validation split."""

from m2l.data.prompts import Dataset, Prompt, prompt_table
from m2l.data.raw_records import Hub, Record, Tfds, held_back
from m2l.data.rendering import stripped


def _rating(review: Record) -> Record:
    star = review["star"]
    return {"rating": star - 1, "mood": (star > 3) - (star < 3) + 1}


APP_REVIEWS = Dataset(
    name="app_reviews",
    category="sentiment",
    hub=Hub("sealuzh/app_reviews"),
    promptsource="app_reviews",
    licence="none stated",
    paper="Grano et al. (2017)",
    fields={"package_name": "string", "review": "string", "date": "string", "star": range(1, 6)},
    derived={"rating": range(5), "mood": range(3)},
    derive=_rating,
    splits=held_back("train", field="review"),
    sizes={"train": 288065},
    prompts=(
        *prompt_table(
            {
                "how_good": (
                    "{review} How does the user find the app? Choose from: {answer_choices}.",
                    ("very bad", "bad", "fair", "good", "very good"),
                ),
                "stars": (
                    "How many stars does this review give, one to five? {review}",
                    ("one", "two", "three", "four", "five"),
                ),
                "number": (
                    "Review: {review}\nRating of the app from 1 to 5:",
                    ("1", "2", "3", "4", "5"),
                ),
                "how_happy": (
                    "Is this user very unhappy, unhappy, so-so, happy or very happy? {review}",
                    ("very unhappy", "unhappy", "so-so", "happy", "very happy"),
                ),
                "keep_it": (
                    "{review}\nWill the user keep the app? Choose from: {answer_choices}.",
                    ("Surely not", "No", "Maybe", "Yes", "Surely"),
                ),
            },
            targets="{answer_choices[rating]}",
            metrics=("accuracy", "spearman"),
        ),
        Prompt(
            "mood",
            "Does this user like the app? Choose from: {answer_choices}. {review}",
            targets="{answer_choices[mood]}",
            answer_choices=("No", "Not sure", "Yes"),
            metrics=("accuracy", "spearman"),
            original_task=False,
        ),
    ),
)


def _opinion(review: Record) -> Record:
    return {"opinion": "likes" if review["label"] == 1 else "does not like"}


IMDB = Dataset(
    name="imdb",
    category="sentiment",
    hub=Hub("stanfordnlp/imdb", "plain_text"),
    tfds=Tfds("imdb_reviews/plain_text"),
    promptsource="imdb",
    licence="none stated",
    paper="Maas et al. (2011)",
    fields={"text": "string", "label": range(2)},
    derived={"opinion": "string"},
    derive=_opinion,
    splits={**held_back("train", field="text"), "test": "test"},
    sizes={"train": 25000, "test": 25000},
    prompts=(
        *prompt_table(
            {
                "positive_or_negative": (
                    "{text} Is this review positive or negative?",
                    ("negative", "positive"),
                ),
                "liked_it": ("Did the viewer like this film, Yes or No? {text}", ("No", "Yes")),
                "good_or_bad": (
                    "Review: {text}\nDoes the writer find the film good or bad?",
                    ("bad", "good"),
                ),
                "tell_a_friend": (
                    "{text}\nWill the writer of this tell a friend to see the film?",
                    ("No", "Yes"),
                ),
                "not_happy": (
                    "True or false: the viewer was not happy with the film. {text}",
                    ("true", "false"),
                ),
            }
        ),
        Prompt(
            "write_review",
            "Write the review of a viewer who {opinion} the film.",
            targets="{text}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


def _topic(news: Record) -> Record:
    names = ("the world", "sport", "business", "science and technology")
    return {"topic": names[news["label"]], "sport": int(news["label"] == 1)}


AG_NEWS = Dataset(
    name="ag_news",
    category="topic_classification",
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
    splits={**held_back("train", field="text"), "test": "test"},
    sizes={"train": 120000, "test": 7600},
    prompts=(
        *prompt_table(
            {
                "section": (
                    "{text} Which section of the paper is this from? Choose from: "
                    "{answer_choices}.",
                    ("World", "Sports", "Business", "Science"),
                ),
                "what_about": (
                    "What is this news about? {text}",
                    ("the world", "sport", "money", "science"),
                ),
                "topic": ("News: {text}\nTopic:", ("World", "Sport", "Business", "Technology")),
                "who_reads_it": (
                    "Who will want to read this? Choose from: {answer_choices}. {text}",
                    ("a diplomat", "a sports fan", "a banker", "an engineer"),
                ),
                "which_kind": (
                    "Is this {answer_choices[0]}, {answer_choices[1]}, {answer_choices[2]} or "
                    "{answer_choices[3]}? {text}",
                    ("world news", "sports news", "business news", "science news"),
                ),
            }
        ),
        Prompt(
            "is_it_sport",
            "Is this news about sport? {text}",
            targets="{answer_choices[sport]}",
            answer_choices=("No", "Yes"),
            original_task=False,
        ),
        Prompt(
            "write_news",
            "Write a piece of news about {topic}.",
            targets="{text}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


def _about(entry: Record) -> Record:
    return {"about": stripped(entry["content"])}


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
    hub=Hub("fancyzhx/dbpedia_14", "dbpedia_14"),
    promptsource="dbpedia_14",
    licence="CC-BY-SA-3.0",
    paper="Lehmann et al. (2015), Zhang et al. (2015)",
    fields={"title": "string", "content": "string", "label": range(14)},
    derived={"about": "string"},
    derive=_about,
    splits={**held_back("train", field="content"), "test": "test"},
    sizes={"train": 560000, "test": 70000},
    prompts=(
        *prompt_table(
            {
                "kind_of_thing": ("{about} What kind of thing is {title}?", _CLASSES),
                "category": ("Name the category of {title}. {about}", _CLASSES),
                "choose_category": (
                    "Which of these is {title}: {answer_choices}? {about}",
                    _CLASSES,
                ),
                "what_about": (
                    "What is this text about? {about}",
                    (
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
            }
        ),
        Prompt(
            "name_it",
            "What is the name of the thing that this text is about? {about}",
            targets="{title}",
            metrics=("squad",),
            original_task=False,
        ),
        Prompt(
            "title_only",
            "You read only the title of a text: {title}. What kind of thing could it be?",
            answer_choices=_CLASSES,
            original_task=False,
        ),
    ),
)

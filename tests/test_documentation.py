"""The generated pages say what the declarations say."""

import importlib.util
import json
from pathlib import Path

import pytest

from m2l import tasks
from m2l.tasks import sources

ROOT = Path(__file__).parents[1]


def script(path):
    spec = importlib.util.spec_from_file_location("script", ROOT / "scripts" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


document = script("document_tasks.py")


@pytest.mark.parametrize(
    "page", ["README.md", "docs/tasks.md", "docs/skills.md", "docs/merging.md"]
)
def test_the_tables_of_a_page_are_those_of_the_declarations(page):
    text = (ROOT / page).read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 0
    assert document.filled(text) == text


def test_every_prompt_says_what_was_reviewed():
    reviewed = (ROOT / "docs" / "prompts.md").read_text()
    for dataset in sources.T0:
        for prompt in dataset.prompts:
            assert f"\n`{dataset.task_name(prompt)}` (" in reviewed
    tasks.use("microworld")
    assert document.prompts() == reviewed


def test_the_page_of_performance_is_what_its_script_prints_of_the_results():
    bench = script("bench/all.py")
    results = json.loads(bench.RESULTS.read_text())
    assert bench.page(results) == bench.PAGE.read_text()
    commands = {figure.command for figures in bench.FIGURES.values() for figure in figures}
    assert not set(results) - commands

"""The generated pages say what the declarations say."""

import importlib.util
from pathlib import Path

import pytest

from m2l import tasks
from m2l.tasks import sources

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("document", ROOT / "scripts" / "document_tasks.py")
document = importlib.util.module_from_spec(spec)
spec.loader.exec_module(document)


@pytest.mark.parametrize("page", ["docs/tasks.md", "docs/skills.md", "docs/merging.md"])
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

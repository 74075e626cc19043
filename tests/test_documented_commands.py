"""What the pages say to type can be typed: every command, flag, gin file and script is there."""

import re
from pathlib import Path

import click
import pytest

from m2l.cli.command import cli

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "CONTRIBUTING.md", "docs/*.md")
PAGES = [str(page.relative_to(ROOT)) for name in FILES for page in sorted(ROOT.glob(name))]


def commands(page):
    """(command, what follows it) of each m2l in the blocks of code."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    for block in [text for language, text in blocks if not language]:
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.findall(r"(?<![\w./])m2l (\w+)(.*?)(?=[;#]|$)", line)


def flags_of(name):
    command = cli.commands[name]
    parts = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    params = [p for part in parts for p in part.get_params(click.Context(part))]
    return {flag for p in params for flag in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_with_such_flags(page):
    for name, rest in commands(page):
        assert name in cli.commands
        for flag in re.findall(r"(?<!\S)--(?!gin\.)[\w-]+", rest):
            assert flag in flags_of(name), f"m2l {name}{rest}"


@pytest.mark.parametrize("page", PAGES)
def test_every_gin_file_and_script_of_a_page_is_there(page):
    for _, rest in commands(page):
        for file in re.findall(r"--gin_file[ =](\w+/\S+\.gin)", rest):
            assert (ROOT / "gin_configs" / file).is_file(), file
    for script in re.findall(r"\bscripts/[\w/]+\.(?:sh|py)\b", (ROOT / page).read_text()):
        assert (ROOT / script).is_file(), script


def test_pages_have_commands():
    assert sum(len(list(commands(page))) for page in PAGES) > 30

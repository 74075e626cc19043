"""What the pages say to type can be typed: every command, flag, gin file and script is there."""

import json
import re
import shlex
from pathlib import Path

import click
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import m2l
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


def blocks(page, language):
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture
def folder(road, run_m2l, tmp_path, monkeypatch):
    """A folder that has what README's commands name: BASE, ONE, TWO and files of one's own data."""
    monkeypatch.chdir(tmp_path)
    for name, run in {"BASE": "base", "ONE": "sentiment", "TWO": "closed_book_qa"}.items():
        assert run_m2l("convert", road / run, name) == 0
    lines = [
        {"inputs": f"a {word} film. good or bad?", "targets": label}
        | {"answer_choices": ["good", "bad"]}
        for label, words in {"good": ("fine", "nice"), "bad": ("dull", "sad")}.items()
        for word in words
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_commands_of_readme_run_one_after_the_other(folder, run_m2l, capsys):
    commands = [
        line
        for block in blocks("README.md", "")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("m2l ")
    ]
    ran = []
    for line in commands:
        # Whole studies, and what needs one, are run by the tests of studies.
        if not re.match(r"m2l (study|report)\b", line) or "--dry_run" in line:
            assert run_m2l(*shlex.split(line)[1:]) == 0, line
            ran.append(line.split()[1])
    assert {"merge", "eval", "generate", "convert", "train", "sweep", "study"} <= {*ran}
    weights = load_file(folder / "merged" / "model.safetensors")
    assert weights.keys() == load_file(folder / "BASE" / "model.safetensors").keys()
    [result] = (folder / "results").glob("jsonl.json")
    assert json.loads(result.read_text())["count"] == 4
    # What the sweep ends with is a command, too.
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("m2l ")]
    assert run_m2l(*shlex.split(printed[-1])[1:]) == 0


def test_the_first_steps_run_one_after_the_other(road, run_m2l, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/base").symlink_to(road / "base")
    for block in blocks("docs/first_steps.md", ""):
        if program := re.search(r"^python - <<'END'\n(.*?)^END$", block, re.M | re.S):
            exec(program[1], {})
            block = block.replace(program[0], "")
        for line in block.splitlines():
            # The base is pretrained in minutes; 60 steps say no more than 2.
            if line and "pretrain_microworld" not in line:
                line = re.sub("(steps|max_examples) .0", r"\1 2", line)
                assert run_m2l(*shlex.split(line)[1:]) == 0, line
    assert (tmp_path / "runs/results/mine/jsonl.json").is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_of_a_page_runs_one_block_after_the_other(folder, run_m2l, page):
    assert run_m2l("convert", "BASE", "runs/base") == 0
    names = {}
    code = blocks(page, "python")
    assert code
    for block in code:
        exec(compile(block, page, "exec"), names)
    results = m2l.evaluate("merged", jsonl={"validation": "valid.jsonl"})
    assert results["jsonl"].count == 4
    if page == "docs/python.md":
        saved = m2l.load("runs/in_memory").params
        assert jax.tree.all(jax.tree.map(np.array_equal, saved, names["params"]))
        assert results["jsonl"].score == names["results"]["jsonl"].score
        assert names["best"].score == max(each.score for each in (names["best"], *names["others"]))


def test_pages_have_commands():
    assert sum(len(list(commands(page))) for page in PAGES) > 30

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
from m2l import checkpoints, configuration, distributed, hub_models, merging, storage, tasks
from m2l.cli.command import cli
from m2l.errors import M2LError
from m2l.merging import mergekit_file

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/studies/*/README.md")
PAGES = [str(page.relative_to(ROOT)) for name in FILES for page in sorted(ROOT.glob(name))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# What m2l's arguments follow: the launchers of scripts/launch pass theirs on.
CALL = r"(?<![\w./])(?:m2l|scripts/launch/\w+\.sh) (?=[a-z])"


def lines_of_code(page):
    """(line, whether it is in a block of its own) of each in the page's code."""
    text = (ROOT / page).read_text()
    for language, block in FENCE.findall(text):
        if language in ("", "bash"):
            block = re.sub(r" \\\n *", " ", block)
            # What a loop gathers stands where it is used.
            for name, value in re.findall(r"(\w+)=\"\$\w+ (.*)\"", block):
                block = block.replace(f" ${name} ", f" {value} ")
            yield from ((line, True) for line in block.splitlines())
    text = re.sub(r"[ \n]+", " ", FENCE.sub("", text))
    yield from ((code, False) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))


def commands(page):
    """(words after m2l, whether they are all that is needed) of each command in the page."""
    for line, whole in lines_of_code(page):
        for call in list(re.finditer(CALL, line.partition("# ")[0]))[:1]:
            text = re.sub(r"\$\{?\w+\}?", "X", re.sub(r", \.\.\.", "", line[call.end() :]))
            words = shlex.split(text, comments=True) if whole else text.split()
            end = next((place for place, word in enumerate(words) if word in "&&;|"), len(words))
            words = [word.rstrip(";") for word in words[:end]]
            yield [word for word in words if word != "..."], whole and "..." not in words


# What reads settings or makes recipes before it reads a model.
RESOLVING = ("train", "rounds", "study", "demo", "search", "skills", "merge", "sweep")


class _Resolved(Exception):
    """All that a command's arguments name is known; what follows would read models."""


def resolved(*_, **__):
    raise _Resolved


def is_placeholder(name):
    return bool(re.fullmatch(r"[A-Z_+X]+", name))


@pytest.fixture
def check(monkeypatch):
    """Parses a command as it is run, and looks up what it names; returns its parameters.

    Settings of gin are built from every file and binding, recipes are made, tasks, methods and
    presets looked up. Nothing is read, downloaded or joined.
    """
    parsed, load = [], configuration.load

    def load_and_stop(*arguments):
        load(*arguments)
        raise _Resolved

    monkeypatch.setattr(hub_models, "located", storage.path)
    monkeypatch.setattr(distributed, "join", lambda *_, **__: "joined")
    monkeypatch.setattr(configuration, "load", load_and_stop)
    monkeypatch.setattr(merging.Recipe, "read", resolved)
    monkeypatch.setattr(mergekit_file, "read", resolved)
    monkeypatch.setattr(checkpoints, "read_manifest", resolved)
    for name in ("merge", "merge_into_adapter", "prepare"):
        monkeypatch.setattr(merging, name, resolved)
    monkeypatch.setattr(click.Command, "invoke", lambda *pair: parsed.append(pair))

    def run(words, whole):
        parsed.clear()
        try:
            cli.main(words, standalone_mode=False)
        except (click.MissingParameter, click.BadOptionUsage):  # Without its value.
            assert not whole, words
            return {}
        except (click.exceptions.Exit, click.exceptions.NoArgsIsHelpError):
            return {}
        command, context = parsed[-1]
        params = context.params
        # Of a study or a run that is there already all else is in its folder.
        is_there = command.name in ("study", "demo") and not params["gin_files"]
        is_there |= bool(params.get("run") or params.get("list_methods"))
        if whole and command.name in RESOLVING and not is_there:
            with pytest.raises(_Resolved):
                context.invoke(command, **params)
        for known, names in (
            (merging.METHODS, [params.get("method")] * (command.name != "compress")),
            (merging.PRESETS, [params.get("preset")]),
        ):
            assert {*filter(None, names)} <= {*known}, words
        source = params.get("source")
        tasks.use(source if isinstance(source, str) and ":" not in source else "microworld")
        for mixture in (params.get("mixture"), params.get("task"), *params.get("mixtures", ())):
            if mixture and not is_placeholder(mixture):
                assert tasks.tasks_in(mixture), words
        return params

    return run


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_parsed_and_all_that_it_names_is_there(page, check):
    for words, whole in commands(page):
        if words[0] not in ("COMMAND", "lm_eval"):
            check(words, whole)


def test_a_command_that_cannot_be_typed_is_noticed(check):
    for line in (
        "trian --out x",
        "train --stepps 3",
        "train --mixture sentimant --steps 3 --out x",
        "train --gin_file experiments/demoo.gin --out x",
        "train --gin_file runs/expert.gin --gin.Train.stepz=3 --mixture sentiment --out x",
        "merge --base B --expert E --method ties --drop_rate 0.5 --out x",
        "sweep --base B --expert E --method linear --t 0.1:0.5:0.1:3 --out x",
        "eval MODEL --mixture sentimant --out x",
        "tasks show super_glue_rtee",
    ):
        with pytest.raises((M2LError, click.ClickException)):
            check(line.split(), True)


@pytest.mark.parametrize("page", PAGES)
def test_every_script_of_a_page_is_there_and_has_its_flags(page):
    for script in re.findall(r"\bscripts/[\w/]+\.(?:sh|py)\b", (ROOT / page).read_text()):
        assert (ROOT / script).is_file(), script
    for line, _ in lines_of_code(page):
        for script, rest in re.findall(r"\b(scripts/(?!launch)[\w/]+\.(?:sh|py))(.*)", line):
            for flag in re.findall(r"(?<!\S)--[\w-]+", rest):
                assert f"{flag}" in (ROOT / script).read_text(), line


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
    assert sum(whole for page in PAGES for _, whole in commands(page)) > 80

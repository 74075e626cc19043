"""The road by the command: train, merge, evaluate; and everything it refuses."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.shell_completion import BashComplete

from m2l import checkpoints, configuration
from m2l.cli import command
from m2l.cli.options import GroupedCommand


@pytest.fixture
def refused(run_m2l, capsys):
    """Runs the command, which must exit with 2 and one line, or one with a table; returns it."""

    def run(*arguments):
        capsys.readouterr()
        assert run_m2l(*arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in error if line.startswith("m2l:")]
        after = error[error.index(lines[0]) + 1 :]
        assert len(lines) == 1 and all(line.startswith("  ") for line in after), error
        return lines[0]

    return run


def test_training_leaves_a_checkpoint_that_says_where_it_came_from(road):
    base = checkpoints.read_manifest(checkpoints.resolve(road / "base"))
    expert = checkpoints.read_manifest(checkpoints.resolve(road / "sentiment"))
    assert [parent["digest"] for parent in expert.parents] == [base.digest]
    assert expert.made_by["settings"]["mixture"] == "sentiment"
    assert expert.model == base.model
    lines = [json.loads(line) for line in (road / "base" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert (road / "base" / "config.gin").read_text().count("span_corruption") == 1
    assert list((road / "base" / "tensorboard").iterdir())


def test_a_merge_by_the_command_is_the_formula(road, run_m2l, tmp_path):
    experts = [road / "sentiment", road / "closed_book_qa"]
    out = tmp_path / "merged"
    arguments = [argument for expert in experts for argument in ("--expert", expert)]
    arguments += ["--base", road / "base", "--method", "task_arithmetic", "--scale", 0.5]
    assert run_m2l("merge", *arguments, "--out", out) == 0

    def read(path):
        restored = checkpoints.flatten(checkpoints.restore(checkpoints.resolve(path)))
        return {name: np.asarray(leaf, np.float64) for name, leaf in restored.items()}

    base, merged = read(road / "base"), read(out)
    first, second = map(read, experts)
    for name, theta in base.items():
        expected = theta + 0.5 * ((first[name] - theta) + (second[name] - theta))
        np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-7)
    assert any(np.abs(merged[name] - base[name]).max() > 0 for name in base)


def test_evaluation_writes_a_result_a_task_and_computes_none_twice(road, run_m2l, tmp_path):
    arguments = ["eval", "--checkpoint", road / "sentiment", "--mixture", "sentiment"]
    arguments += ["--max_examples", 5, "--out", tmp_path / "results"]
    assert run_m2l(*arguments) == 0
    paths = sorted((tmp_path / "results").iterdir())
    before = {path: path.read_bytes() for path in paths}
    result = json.loads(paths[0].read_text())
    assert (result["count"], result["kind"], result["category"]) == (5, "rank", "sentiment")
    assert run_m2l(*arguments) == 0
    assert {path: path.read_bytes() for path in paths} == before


def test_decoding_is_scored_by_the_tasks_metric(road, run_m2l, tmp_path):
    code = run_m2l(
        *("eval", "--checkpoint", road / "base", "--mixture", "kilt_tasks_hotpotqa"),
        *("--max_examples", 3, "--target_length", 4, "--out", tmp_path / "results"),
    )
    assert code == 0
    result = json.loads(next((tmp_path / "results").iterdir()).read_text())
    assert (result["kind"], result["metric"]) == ("generate", "squad")
    assert result["score"] == result["metrics"]["f1"]


def test_your_own_data_is_trained_on_and_evaluated_by(road, run_m2l, tmp_path):
    rows = [
        {
            "inputs": f"{n} is",
            "targets": ("odd", "even")[n % 2 == 0],
            "answer_choices": ["odd", "even"],
        }
        for n in range(40)
    ]
    for split, part in (("train", rows[:30]), ("validation", rows[30:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    data = f"train={tmp_path}/train.jsonl,validation={tmp_path}/validation.jsonl"
    trained = ["train", "--init", road / "base", "--jsonl", data, "--steps", 2]
    assert run_m2l(*trained, "--gin.BATCH_SIZE=4", "--out", tmp_path / "expert") == 0
    evaluated = ["eval", "--checkpoint", tmp_path / "expert", "--jsonl", data]
    assert run_m2l(*evaluated, "--out", tmp_path / "results") == 0
    [path] = (tmp_path / "results").iterdir()
    result = json.loads(path.read_text())
    assert (result["count"], result["metrics"]["chance"]) == (10, 50.0)


def test_inspect_and_lists_and_doctor_print_what_there_is(road, run_m2l, capsys):
    assert run_m2l("doctor", "--all") == 0
    assert "jaxlib" in capsys.readouterr().out
    assert run_m2l("inspect", road / "sentiment", "--verify") == 0
    shown = capsys.readouterr().out
    assert "every digest is right" in shown
    # The summary, then the parents, then a row for each parameter.
    places = [shown.index(words) for words in ("made by:", "3 steps on sentiment", "wi_0")]
    assert places == sorted(places)
    assert run_m2l("tasks", "list", "--mixture", "t0_held_out") == 0
    assert "super_glue_rte" in capsys.readouterr().out
    assert run_m2l("tasks", "show", "imdb") == 2
    assert run_m2l("merge", "--list") == 0
    assert "drop_rate" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 64])
def test_a_dry_run_fits_the_terminal_and_names_every_stage(run_m2l, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    file = "experiments/demo.gin"
    assert run_m2l("study", "--gin_file", file, "--out", "x", "--dry_run") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    plan = configuration.load("Study", [file])[0].of.resolved().stage_graph()
    # Lines that are indented belong to the one before.
    stages = re.split(r"\n(?=\S)", shown)[2:]
    for stage, lines in zip(plan, stages, strict=False):
        name, _, read = "".join(map(str.strip, lines.splitlines())).partition("<")
        assert name.endswith(stage.name)
        folders = re.findall(r"([^{, ]+)(?:{([^}]*)})?", read)
        spelled = [folder + base for folder, bases in folders for base in bases.split(",")]
        assert spelled == list(stage.inputs.values())


def printed(capsys):
    return json.loads(capsys.readouterr().out)


def test_commands_print_json_for_programs(road, run_m2l, capsys, tmp_path):
    capsys.readouterr()
    assert run_m2l("inspect", road / "base", "--json") == 0
    shown, manifest = printed(capsys), checkpoints.read_manifest(road / "base")
    assert (shown["digest"], shown["step"]) == (manifest.digest, 3)
    models = ["--base", road / "base", "--expert", road / "sentiment"]
    merge = ["merge", *models, "--method", "ties", "--out", tmp_path / "merged", "--json"]
    assert run_m2l(*merge) == 0
    shown = printed(capsys)
    assert shown["digest"] == checkpoints.read_manifest(tmp_path / "merged").digest
    assert shown["recipe"]["density"] == 0.2
    assert [parent["role"] for parent in shown["parents"]] == ["base", "expert"]
    assert run_m2l("tasks", "list", "--mixture", "imdb", "--json") == 0
    assert {task["dataset"] for task in printed(capsys)} == {"imdb"}
    # Whether the model is named by position or by --checkpoint.
    results = []
    for name in ([road / "base"], ["--checkpoint", road / "base"]):
        flags = ["--mixture", "imdb_good_or_bad", "--max_examples", 5, "--json"]
        assert run_m2l("eval", *name, *flags, "--out", tmp_path / "results") == 0
        results.append(printed(capsys)["tasks"])
    stored = json.loads((tmp_path / "results" / "imdb_good_or_bad.json").read_text())
    assert results[0] == results[1]
    assert results[0]["imdb_good_or_bad"]["score"] == stored["score"]


def test_a_chat_answers_line_by_line_until_the_input_ends(road, run_m2l, capsys, monkeypatch):
    capsys.readouterr()
    assert run_m2l("generate", road / "base", "the cat", "a dog", "--max_length", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == ["the cat", "a dog"]

    said = iter(["the cat", " ", "a dog"])

    def typed(prompt):
        for line in said:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert run_m2l("generate", road / "base", "--max_length", 4) == 0
    answers = capsys.readouterr().out.splitlines()
    assert [f"> {answer}" for answer in answers if answer] == lines[1::2]


def complete(words):
    """What bash is offered after `m2l WORDS`."""
    completer = BashComplete(command.cli, {}, "m2l", "_M2L_COMPLETE")
    *done, incomplete = words.split(" ")
    return [item.value for item in completer.get_completions(done, incomplete)]


def test_shells_complete_the_names_of_commands_methods_tasks_and_files():
    assert complete("mer") == ["merge"]
    assert "dare_ties" in complete("merge --method da")
    assert complete("merge --scope t") == ["tensor"]
    assert complete("eval --mixture sentim") == ["sentiment", "sentiment_original"]
    assert "experiments/demo.gin" in complete("train --gin_file experiments/de")
    assert complete("merge --preset off") == ["official"]


def test_the_help_has_every_command_in_a_line_of_its_own(run_m2l, capsys):
    assert run_m2l("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    named = [name for summaries in command.SUMMARIES.values() for name in summaries]
    assert sorted(named) == sorted(command.cli.commands)
    for name in named:
        [line] = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line) <= 80 and line.endswith((".", "?"))


def test_every_flag_of_a_grouped_command_is_in_a_group():
    for each in command.cli.commands.values():
        if isinstance(each, GroupedCommand):
            groups = each.grouped(click.Context(each))
            names = [param.name for params in groups.values() for param in params]
            assert sorted(names) == sorted(p.name for p in each.get_params(click.Context(each)))
            other = [p for p in groups["Other"] if isinstance(p, click.Option) and not p.hidden]
            assert [p.opts[-1] for p in other] == ["--help"], each.name


# --- bad input ---


def test_unknown_names_are_refused_with_the_nearest(refused, road, tmp_path):
    out, base = (
        ["--out", tmp_path / "out"],
        ["--base", road / "base", "--expert", road / "sentiment"],
    )
    trained = ["train", "--init", road / "base", "--steps", 1, *out]
    assert "'sentiment'" in refused(*trained, "--mixture", "sentimant")
    evaluated = ["eval", "--checkpoint", road / "base", *out]
    assert "'super_glue_rte'" in refused(*evaluated, "--mixture", "super_glue_rtee")
    assert "'ties'" in refused("merge", *base, "--method", "tyes", *out)
    assert "'steps'" in refused(*trained, "--mixture", "imdb", "--gin.Train.stepz=3")
    near = refused(*trained, "--gin_file", "experiments/demoo.gin")
    assert "'experiments/demo.gin'" in near
    assert str(road / "sentiment") in refused("inspect", road / "sentimant")
    assert "sentiment" in refused("inspect", road)
    assert not (tmp_path / "out").exists()


def test_wrong_flags_are_refused(refused, road, tmp_path):
    trained = ["train", "--init", road / "base", "--out", tmp_path / "o"]
    assert "--mixture NAME" in refused(*trained)
    assert "--steps N" in refused(*trained, "--mixture", "imdb")
    assert "--base BASE --expert ONE" in refused("merge", road / "base", road / "sentiment")
    assert "name one model" in refused("eval", road / "base", "--checkpoint", road / "sentiment")
    assert "--out" in refused("train", "--init", road / "base", "--mixture", "imdb")
    assert "no such option" in refused("report", tmp_path, "--fast").lower()
    assert "no model" in refused(
        "train", "--mixture", "imdb", "--steps", 1, "--out", tmp_path / "o"
    )
    assert "--mixture" in refused("eval", "--checkpoint", road / "base", "--out", tmp_path / "o")
    assert "--method" in refused("merge", "--expert", road / "base", "--out", tmp_path / "o")
    assert "study.json" in refused("report", tmp_path)
    assert "'--steps'" in refused(*trained, "--mixture", "imdb", "--steps", 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # What a command that reads no gin is told by them: the user's own words, its own flags.
        ("eval x --gin.Eval.batch_size=4", "no --gin.Eval.batch_size: did you mean --batch_size?"),
        ("eval x --gin.X=..", "no --gin.X: its flags are --checkpoint, .*--dtype, .*--source"),
        ("merge --gin.Merge.density=0.2", "did you mean --density?"),
        ("tasks list --gin.X=1", "m2l tasks --help; those with gin .*skills, study, train"),
        ("train --out x --gin.STEPS", "--gin.STEPS: expected --gin.NAME=VALUE"),
        ("train --out x --ginfile f", "'--ginfile'.*Did you mean.*'--gin_file'"),
    ],
)
def test_settings_of_gin_are_refused_by_the_users_own_flag(refused, arguments, words):
    line = refused(*arguments.split())
    assert all(word in line for word in words.split(".*")), line
    assert "binding" not in line


def test_what_follows_two_dashes_is_text(road, run_m2l, capsys):
    capsys.readouterr()
    assert run_m2l("generate", road / "base", "--max_length", 2, "--", "--gin.X=1") == 0
    assert capsys.readouterr().out.splitlines()[0] == "--gin.X=1"


def test_a_models_file_is_enough_to_train_from_scratch(run_m2l, tmp_path):
    arguments = ["train", "--gin_file", "models/t5_tiny.gin", "--mixture", "imdb", "--steps", 1]
    assert run_m2l(*arguments, "--gin.BATCH_SIZE=2", "--out", tmp_path / "run") == 0
    manifest = checkpoints.read_manifest(checkpoints.resolve(tmp_path / "run"))
    assert (manifest.model["d_model"], manifest.step) == (64, 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1, 2]", "train.jsonl:2"),
        ('{"inputs": "a"}', "train.jsonl:2.*targets"),
        ('{"inputs": "a", "targets": "x", "answer_choices": ["y", "z"]}', "train.jsonl:2"),
        ('{"inputs": "a", ', "train.jsonl:2"),
    ],
)
def test_a_bad_jsonl_line_is_named(refused, road, tmp_path, line, said):
    good = '{"inputs": "a", "targets": "y", "answer_choices": ["y", "z"]}'
    path = tmp_path / "train.jsonl"
    path.write_text(f"{good}\n{line}\n")
    told = refused(
        *("train", "--init", road / "base", "--jsonl", f"train={path}", "--steps", 1),
        *("--out", tmp_path / "out"),
    )
    assert all(part in told for part in said.split(".*"))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_missing_unfinished_or_damaged_is_refused(refused, road, tmp_path):
    evaluated = ["eval", "--mixture", "imdb", "--out", tmp_path / "out", "--checkpoint"]
    assert "there is no such checkpoint" in refused(*evaluated, tmp_path / "a")
    whole = checkpoints.resolve(road / "base")
    shutil.copytree(whole, tmp_path / "b")
    (tmp_path / "b" / "_CHECKPOINT_METADATA").unlink()
    assert "no finished checkpoint" in refused(*evaluated, tmp_path / "b")
    shutil.copytree(whole, tmp_path / "c")
    largest = max((tmp_path / "c" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert "digest" in refused(*evaluated, tmp_path / "c")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("config.json", ("a Hugging Face directory", "m2l convert ")),
        ("model-00001-of-00002.safetensors", ("a Hugging Face directory", "m2l convert ")),
        ("checkpoint", ("a T5X checkpoint", "m2l convert --from t5x")),
        ("checkpoint_100/checkpoint", ("a T5X checkpoint", "m2l convert --from t5x")),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        "train --mixture imdb --steps 1 --init PATH",
        "statistics --mixture imdb --kind fisher --checkpoint PATH",
        "adamerging --mixture imdb --base PATH --expert PATH",
        "mask localize --mixture imdb --base PATH --expert PATH",
        "sweep --mixture imdb --method linear --t 0.5 --expert PATH",
        "search --mixture imdb --base PATH --expert PATH",
        "skills --keep imdb --mixture imdb --general PATH",
    ],
)
def test_a_checkpoint_of_another_format_is_refused_with_the_command_that_converts_it(
    refused, tmp_path, monkeypatch, command, file, words
):
    path = tmp_path / "the model"
    (path / file).parent.mkdir(parents=True)
    (path / file).write_text("{}")
    arguments = [str(path) if part == "PATH" else part for part in command.split()]
    line = refused(*arguments, "--out", tmp_path / "out")
    assert all(word in line for word in words) and f"'{path}'" in line
    assert not (tmp_path / "out").exists()


def test_dashes_and_underscores_in_flags_are_alike(refused, run_m2l, road, tmp_path, capsys):
    models = ["--expert", road / "base", "--expert", road / "sentiment", "--method", "dare"]
    models += ["--base", road / "base", "--dry-run", "--no_diagnostics"]
    assert "drop_rate" in refused("merge", *models, "--drop-rate", "2", "--out", tmp_path / "out")
    assert run_m2l("merge", *models, "--drop_rate", "0.5", "--out", tmp_path / "out") == 0
    assert run_m2l("tasks", "list", "--mixture", "imdb", "--held-in") == 0


def test_experts_of_another_model_or_vocabulary_are_refused(refused, run_m2l, road, tmp_path):
    small = ["train", "--gin_file", road / "tiny.gin", "--gin.STEPS=1"]
    assert run_m2l(*small, "--gin.T5.d_ff=16", "--out", tmp_path / "other_model") == 0
    assert run_m2l(*small, "--vocabulary", "bytes", "--out", tmp_path / "other_vocabulary") == 0
    merged = ["merge", "--base", road / "base", "--method", "average", "--out", tmp_path / "out"]
    for other in ("other_model", "other_vocabulary"):
        told = refused(*merged, "--expert", road / "sentiment", "--expert", tmp_path / other)
        assert other in told
    init = ["--init", tmp_path / "other_vocabulary", "--mixture", "imdb", "--steps", 1]
    told = refused("train", *init, "--vocabulary", "microworld", "--out", tmp_path / "out")
    assert "vocabulary" in told
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_refused(refused, road, tmp_path):
    trained = ["train", "--init", road / "base", "--mixture", "imdb", "--steps", 2]
    assert "mixture is 'sentiment'" in refused(*trained, "--out", road / "sentiment")
    (tmp_path / "notes").write_text("mine")
    assert "not empty" in refused(*trained, "--out", tmp_path)
    assert "not empty" in refused("demo", "--out", tmp_path)
    merged = ["merge", "--expert", road / "sentiment", "--method", "average"]
    assert "exists" in refused(*merged, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_results_of_another_model_are_refused(refused, run_m2l, road, tmp_path):
    evaluated = ["eval", "--mixture", "imdb", "--max_examples", 2, "--out", tmp_path / "results"]
    assert run_m2l(*evaluated, "--checkpoint", road / "base") == 0
    assert "another model" in refused(*evaluated, "--checkpoint", road / "sentiment")
    fewer = [*evaluated, "--max_examples", 1]
    assert "other examples" in refused(*fewer, "--checkpoint", road / "base")
    into_a_run = [
        "eval",
        "--mixture",
        "imdb",
        "--checkpoint",
        road / "base",
        "--out",
        road / "base",
    ]
    assert "run.json" in refused(*into_a_run)


def test_a_file_where_a_folder_goes_is_refused(refused, road, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in refused(
        *("eval", "--mixture", "imdb", "--checkpoint", road / "base", "--out", tmp_path / "out")
    )
    assert "not a directory" in refused("demo", "--out", tmp_path / "out" / "demo")
    models = ["--base", road / "base", "--expert", road / "sentiment", "--method", "ties"]
    said = refused("merge", *models, "--out", tmp_path / "out" / "merged")
    assert f"{tmp_path / 'out' / 'merged'}: cannot be made" in said


def test_a_vocabulary_that_the_model_has_no_room_for_is_refused(refused, road, tmp_path):
    small = ["train", "--gin_file", road / "tiny.gin", "--gin.T5.vocab_size=512"]
    assert "room for 512" in refused(*small, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(refused, road, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "results"))

    monkeypatch.setattr("m2l.storage.write_atomic", full)
    arguments = ["eval", "--mixture", "imdb", "--max_examples", 2, "--checkpoint", road / "base"]
    assert "no space left on device" in refused(*arguments, "--out", tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())


def test_commands_read_texts_without_tensorflow_and_what_is_done_without_jax(road, tmp_path):
    evaluate = ["eval", "--checkpoint", road / "sentiment", "--mixture", "imdb"]
    evaluate += ["--max_examples", 3, "--out", tmp_path / "results"]
    train = ["train", "--init", road / "base", "--mixture", "sentiment", "--gin.BATCH_SIZE=4"]
    train += ["--out", tmp_path / "run", "--steps"]
    sweep = ["sweep", "--base", road / "base", "--expert", road / "sentiment", "--mixture", "imdb"]
    sweep += ["--method", "task_arithmetic", "--scale", "0.5,1", "--max_examples", 3]
    corrupted = ["train", "--gin_file", road / "tiny.gin", "--out", tmp_path / "corrupted"]
    heavy = {"jax", "seqio", "t5", "tensorflow"}
    commands = [
        (["tasks", "show", "super_glue_rte_does_it_follow"], []),
        ([*evaluate], ["jax"]),
        ([*evaluate, "--batch_size", 8], []),
        ([*train, 2], ["jax"]),
        ([*sweep, "--out", tmp_path / "sweep"], ["jax"]),
        (["generate", road / "sentiment", "the cat"], ["jax"]),
        (corrupted, sorted(heavy)),
    ]
    for arguments, imported in commands:
        code = (
            "import sys\nfrom m2l.cli import command\n"
            f"command.run({[*map(str, arguments)]!r}, stopped_code=0)\n"
            f"print(sorted({heavy!r} & set(sys.modules)))"
        )
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1:] == [str(imported)], (arguments, done.stderr)


def test_an_evaluation_that_is_done_is_printed_again_until_something_changes(
    run_m2l, road, tmp_path, capsys
):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    line = {"inputs": "is it good?", "targets": "yes", "answer_choices": ["yes", "no"]}
    data.write_text(json.dumps(line) + "\n")
    command = ["eval", "--checkpoint", road / "sentiment", "--jsonl", f"validation={data}"]
    command += ["--out", out]

    def run(*more):
        capsys.readouterr()
        return run_m2l(*command, *more), capsys.readouterr()

    code, first = run()
    assert code == 0 and "1/1 examples" in first.err
    assert run() == (0, (first.out, ""))
    # What is asked for in addition is not there yet.
    assert run("--examples")[0] == 0
    assert (out / "jsonl.examples.jsonl.gz").exists()
    damaged = (out / "jsonl.json").read_text().replace("accuracy", "accurate")
    (out / "jsonl.json").write_text(damaged)
    assert run()[0] == 2
    (out / "jsonl.json").unlink()
    assert run()[1].out == first.out
    data.write_text(json.dumps(line | {"inputs": "is it bad?"}) + "\n")
    code, printed = run()
    assert code == 2 and "is the result of other examples" in printed.err


@pytest.mark.parametrize(
    ("command", "tunables", "started"),
    [
        ("train", None, ["", "glibc.malloc.hugetlb=1"]),
        ("train", "glibc.malloc.arena_max=8", ["glibc.malloc.arena_max=8"]),
        ("tasks", None, [""]),
    ],
)
def test_commands_that_run_models_have_huge_pages_on_linux(tmp_path, command, tunables, started):
    started = started if sys.platform == "linux" else started[:1]
    log = tmp_path / "log"
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        f"with open({str(log)!r}, 'a') as log:\n"
        "    print(os.getpid(), os.environ.get('GLIBC_TUNABLES', ''), file=log)\n"
    )
    environment = {name: os.environ[name] for name in os.environ if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": str(tmp_path)}
    environment |= {} if tunables is None else {"GLIBC_TUNABLES": tunables}
    for program in ([Path(sys.executable).with_name("m2l")], [sys.executable, "-m", "m2l"]):
        log.unlink(missing_ok=True)
        done = subprocess.run(
            [*program, command, "--no_such_flag"], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, "no_such_flag" in done.stderr) == (2, True)
        lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
        assert [each for _, each in lines] == started
        assert len({pid for pid, _ in lines}) == 1

"""Studies that start from what a user has: a Hugging Face directory, and tasks of JSON lines."""

import dataclasses
import json
import random

import jax
import numpy as np
import pandas as pd
import pytest
import tokenizers

from m2l import checkpoints, models, tasks
from m2l.checkpoints import huggingface
from m2l.errors import CheckpointError, ConfigError, DataError, UnknownNameError
from m2l.models import LlamaConfig
from m2l.studies import findings, merging_at_scale, own_tasks, study_results

HELD_IN, HELD_OUT = ("fruit", "colour", "noun"), ("size",)
WORDS = {
    "fruit": {"yes": "apple pear plum fig", "no": "stone chair lamp road"},
    "colour": {"warm": "red orange amber", "cold": "blue teal cyan navy"},
    "noun": {"thing": "cup door tree", "deed": "run sing jump"},
    "size": {"big": "whale oak tower", "small": "ant seed pin"},
}
CONFIG = LlamaConfig(
    vocab_size=384,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


def lines(category, count, seed):
    draws = random.Random(seed)
    for number in range(count):
        label = draws.choice(sorted(WORDS[category]))
        word = draws.choice(WORDS[category][label].split())
        yield {
            "inputs": f"{number} {word}: which {category}?",
            "targets": label,
            "answer_choices": sorted(WORDS[category]),
            "group": word,
        }


def write_lines(path, examples):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of train, choose and report for each category; held-out ones are reported alone."""
    root = tmp_path_factory.mktemp("data")
    (root / "packages").mkdir()
    for category in WORDS:
        parts = {"train": 24, "choose": 6, "report": 8}
        for part, count in parts.items() if category in HELD_IN else [("report", 8)]:
            write_lines(root / category / f"{part}.jsonl", lines(category, count, part))
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hugging Face directory of a tiny Llama, bfloat16, with a tokenizer and a chat template."""
    root = tmp_path_factory.mktemp("hub")
    checkpoints.save(
        root / "base",
        jax.tree.map(lambda leaf: leaf.astype("bfloat16"), models.init(CONFIG, jax.random.key(0))),
        model=models.to_dict(CONFIG),
        vocabulary={"name": "none", "size": 300, "fingerprint": "0"},
        made_by={"kind": "test"},
        step=0,
    )
    huggingface.export_checkpoint(root / "base", root / "model")
    (root / "model/m2l_manifest.json").unlink()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|user|>", "<|model|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["which fruit? which colour?"], trainer)
    tokenizer.save(str(root / "model/tokenizer.json"))
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|model|>"
    settings = {"eos_token": "<|end|>", "chat_template": template}
    (root / "model/tokenizer_config.json").write_text(json.dumps(settings))
    return root / "model"


LLAMA = [f"Llama.{f.name} = {getattr(CONFIG, f.name)!r}" for f in dataclasses.fields(CONFIG)]
TRAIN = """
Train.batch_size = 4
Train.input_length = 32
Train.target_length = 8
Train.validation = 'the same'
Train.validation_batches = 1
Train.evaluate_every = 2
Train.patience = 1
Train.learning_rate = 0.5
Train.mixture = 'set by the study'
Train.steps = 6
Train.keep = 1
"""
SCALING = f"""
Study.of = @ScalingStudy()
ScalingStudy.models = {{'tiny': @Llama()}}
ScalingStudy.bases = ['instruct']
ScalingStudy.expert = {{'tiny': @Train()}}
ScalingStudy.expert_steps = {{'noun': 1}}
ScalingStudy.multitask = @Train()
ScalingStudy.categories = {list(HELD_IN)}
ScalingStudy.held_out = {list(HELD_OUT)}
ScalingStudy.recipes = [@a/Merge(), @t/Merge(), @d/Merge()]
a/Merge.method = 'average'
t/Merge.method = 'task_arithmetic'
d/Merge.method = 'dare_ties'
d/Merge.drop_rate = 0.5
ScalingStudy.swept = {{'task_arithmetic': {{'scale': [0.2, 0.4]}}}}
ScalingStudy.expert_counts = [2, 3]
ScalingStudy.seeds = [0, 1]
ScalingStudy.choosing_examples = 4
ScalingStudy.max_examples = 8
ScalingStudy.given = {{'bases/tiny/instruct': %HUB}}
ScalingStudy.own_tasks = %DATA
ScalingStudy.vocabulary = %VOCABULARY
"""


SKILLS = """
Study.of = @SkillsStudy()
SkillsStudy.model = @Llama()
SkillsStudy.finetune = @Train()
SkillsStudy.general = 'colour'
SkillsStudy.skills = {'fruit': 'fruit'}
SkillsStudy.evaluations = {'general': 'colour', 'fruit': 'fruit', 'size': 'size'}
SkillsStudy.epochs = 1
SkillsStudy.warmup = 0.5
SkillsStudy.weights = [0.5]
SkillsStudy.parts = [50]
SkillsStudy.methods = ['task_arithmetic', 'ties_mergekit']
SkillsStudy.max_examples = 8
SkillsStudy.given = {'models/pretrained': %HUB}
SkillsStudy.own_tasks = %DATA
SkillsStudy.source = 'none'
SkillsStudy.vocabulary = %VOCABULARY
"""


def gin(folder, text, data, hub):
    folder.mkdir(exist_ok=True)
    macros = {"HUB": str(hub), "DATA": str(data), "VOCABULARY": f"chat:{hub}"}
    settings = [*LLAMA, text, TRAIN, *(f"{name} = {value!r}" for name, value in macros.items())]
    (folder / "study.gin").write_text("\n".join(settings))
    return folder / "study.gin"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, hub, run_m2l):
    root = tmp_path_factory.mktemp("own")
    code = run_m2l("study", "--gin_file", gin(root, SCALING, data, hub), "--out", root / "out")
    assert code == 0
    return root / "out"


def test_a_study_of_a_directory_and_json_lines_is_evaluated_on_the_reporting_parts(finished):
    loaded = study_results.load(finished)
    stages = {stage.name: stage.kind for stage in loaded.study.stage_graph()}
    assert stages["bases/tiny/instruct"] == "given"
    assert not any("pretrained" in name for name in stages)
    base = loaded.results["bases/tiny/instruct"]
    assert {name: (r.category, r.held_out, r.count) for name, r in base.items()} == {
        name: (name, name in HELD_OUT, 8) for name in WORDS
    }
    merged = {merge.model for merge in merging_at_scale.merges(loaded.study)}
    assert len(loaded.results) == 1 + 1 + 3 + len(merged)
    converted = checkpoints.read_manifest(finished / "bases/tiny/instruct")
    assert converted.vocabulary["name"].startswith("chat:")
    leaves = jax.tree.leaves(checkpoints.restore(finished / "bases/tiny/instruct"))
    assert {str(leaf.dtype) for leaf in leaves} == {"float32"}


def test_experts_stop_by_their_choosing_part_and_the_best_checkpoint_is_what_stays(finished):
    for category in ("fruit", "colour"):
        run = finished / "experts/tiny/instruct" / category
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = {m["step"]: m["validation_loss"] for m in metrics if "validation_loss" in m}
        [stays] = (run / "checkpoints").glob("[0-9]*")
        assert int(stays.name) == min(losses, key=losses.get)
    settings = json.loads((finished / "experts/tiny/instruct/noun/run.json").read_text())
    assert (settings["steps"], settings["validation"], settings["keep_best"]) == (1, "noun", True)


def test_its_report_needs_neither_the_data_nor_the_base(finished, run_m2l, tmp_path, monkeypatch):
    assert run_m2l("report", finished, "--publish", tmp_path / "published") == 0
    published = study_results.load(tmp_path / "published")
    moved = dict.fromkeys(published.study.given, "/nowhere")
    gone = {
        name: dict.fromkeys(set(value) - {"group", "targets"}, "/nowhere.jsonl")
        for name, value in published.study.own_tasks.items()
    }
    study = dataclasses.replace(published.study, given=moved, own_tasks=gone)
    lineage = study_results.lineage(dataclasses.replace(published, study=study))
    assert set(lineage["kind"]) == {"given", "train", "merge"}
    page = (tmp_path / "published/report/index.html").read_text()
    assert page.count("This study has nothing to compare.") >= 3
    table = pd.read_csv(tmp_path / "published/report/tables/performance.csv")
    assert set(table["base"]) == {"instruct"}


def test_data_that_changed_is_refused_until_the_study_is_planned_again(
    tmp_path, data, hub, run_m2l, capsys
):
    (tmp_path / "data").mkdir()
    for path in data.rglob("*.jsonl"):
        copy = tmp_path / "data" / path.relative_to(data)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    file = gin(tmp_path, SCALING, tmp_path / "data", hub)
    only = ("--only", "results/bases/tiny/instruct", "--out", tmp_path / "out")
    assert run_m2l("study", "--gin_file", file, *only) == 0
    write_lines(tmp_path / "data/size/report.jsonl", lines("size", 8, "changed"))
    assert run_m2l("study", "--gin_file", file, *only) == 2
    assert "its digests is" in capsys.readouterr().err
    assert run_m2l("study", "--gin_file", file, *only, "--update") == 0
    assert "1 of 2 stages run" in capsys.readouterr().out


def test_skills_of_json_lines_are_added_to_a_directorys_model(tmp_path, data, hub, run_m2l):
    out = tmp_path / "out"
    assert run_m2l("study", "--gin_file", gin(tmp_path, SKILLS, data, hub), "--out", out) == 0
    loaded = study_results.load(out)
    assert loaded.study.examples == {"colour": 24, "fruit": 24}
    stages = {stage.name: stage for stage in loaded.study.stage_graph()}
    settings = stages["models/ptm/fruit_50pct"].settings["settings"]
    assert (settings["mixture"], settings["validation"]) == ("fruit_50pct", "fruit")
    assert (settings["steps"], settings["warmup_steps"]) == (3, 2)
    # In the order of the mixture and not of a set, which another process would have otherwise.
    for name, order in {
        "rt/fruit": ["colour", "fruit"],
        "ptm/fruit_50pct": ["fruit_50pct", "fruit"],
        "cft/fruit_50pct": ["fruit_50pct", "fruit"],
    }.items():
        assert [task["name"] for task in stages[f"models/{name}"].settings["own"]] == order
    assert all(len(results) == 3 for results in loaded.results.values())
    # Every example's value is there, and differences pair them.
    result = loaded.results["models/general"]["fruit"]
    assert len(result.values) == result.count == 8
    assert np.mean(result.values) == pytest.approx(result.score)
    assert run_m2l("report", out) == 0
    assert findings.PAIRED_TEST in (out / "report/index.html").read_text().replace("&#39;", "'")


def test_one_file_is_split_by_groups_that_stay_together(tmp_path):
    write_lines(tmp_path / "all.jsonl", lines("fruit", 40, 0))
    setting = {"test/split_fruit": {"all": str(tmp_path / "all.jsonl"), "group": "group"}}
    own = own_tasks.read(setting, "own")
    settings = own_tasks.settings_of(own, ["test"], {}, held_out=["test"])
    own_tasks.declare({"data": ["microworld", "microworld"], **settings})
    info = tasks.info("split_fruit")
    assert (info.category, info.held_out, tasks.tasks_in("test")) == ("test", True, (info.name,))
    [dataset] = tasks.datasets_of(info.name)
    words = {}
    for part in ("train", "validation", "test"):
        words[part] = {record["inputs"].split()[1] for record in dataset.records(part)}
    assert not words["train"] & words["validation"] and not words["train"] & words["test"]
    assert sum(len(dataset.records(part)) for part in words) == 40
    assert len(dataset.records("train")) >= 20
    # Of one right answer alone.
    setting = {"yes": {"report": str(tmp_path / "all.jsonl"), "targets": "yes"}}
    own = own_tasks.read(setting, "own")
    settings = own_tasks.settings_of(own, ["yes"], {})
    own_tasks.declare({"data": ["microworld", "microworld"], **settings})
    [dataset] = tasks.datasets_of("yes")
    right = [line for line in lines("fruit", 40, 0) if line["targets"] == "yes"]
    assert [r["inputs"] for r in dataset.records("test")] == [line["inputs"] for line in right]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("/nowhere", "no such folder"),
        ({"a": "/nowhere"}, "has none of train.jsonl"),
        ({"a": {"test": "f.jsonl"}}, "expected files of train, choose, report"),
        ({"a": {"all": "f.jsonl", "train": "g.jsonl"}}, "expected files of"),
        ({"a": 3}, "expected a folder"),
        ({"x/a": "f.jsonl", "y/a": "f.jsonl"}, "there twice"),
    ],
)
def test_own_tasks_that_say_something_else_are_refused(setting, said):
    with pytest.raises(ConfigError, match=said):
        own_tasks.read(setting, "own")


def test_a_category_without_the_parts_that_it_needs_is_refused(study, data, tmp_path):
    only = {"train": str(data / "fruit/train.jsonl"), "report": str(data / "fruit/report.jsonl")}
    own = dataclasses.replace(
        study, own_tasks={"fruit": only}, categories=("fruit", *study.categories[1:])
    )
    own.check_mixtures()
    stopped = dataclasses.replace(study.expert, validation="the same")
    with pytest.raises(ConfigError, match="fruit has no part 'choose'"):
        dataclasses.replace(own, expert=stopped).check_mixtures()


def test_a_given_model_of_another_shape_is_refused(study, hub):
    given = {"bases/0.1M/instruct": str(hub)}
    with pytest.raises(CheckpointError, match="its model's"):
        dataclasses.replace(study, given=given).check_mixtures()
    with pytest.raises(UnknownNameError, match="stage"):
        dataclasses.replace(study, given={"bases/0.1M": str(hub)}).check_mixtures()


def test_data_that_changes_while_a_study_runs_stops_its_stages(tmp_path):
    write_lines(tmp_path / "a/report.jsonl", lines("fruit", 4, 0))
    own = own_tasks.read({"changing": str(tmp_path / "a")}, "own")
    settings = own_tasks.settings_of(own, ["changing"], {})
    write_lines(tmp_path / "a/report.jsonl", lines("fruit", 5, 0))
    with pytest.raises(DataError, match="have changed since the study was planned"):
        own_tasks.declare({"data": ["microworld", "microworld"], **settings})

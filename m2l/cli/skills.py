"""`m2l skills`."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2l import api, storage
from m2l.cli.merge import series
from m2l.cli.options import (
    COUNT,
    DIRECTORY,
    MODEL,
    print_table,
    with_generative_score,
    with_gin,
    with_jsonl,
    with_lengths,
    with_source,
)
from m2l.errors import ConfigError

if TYPE_CHECKING:
    from m2l.studies.adding_skills import AddedSkill, SkillAddition

_EPOCHS = 2.0  # the paper's
_MANY = 10**9  # steps, until it is known how many


@click.command()
@click.option("--general", type=MODEL, required=True, help="The model to add the skill to.")
@click.option("--base", type=MODEL, help="What it was trained from; left out: itself.")
@click.option("--skill", type=MODEL, help="A model of the skill, in place of training one.")
@with_jsonl("train=FILE,validation=FILE: the skill's data.")
@click.option("--mixture", help="Or the mixture that is the skill.")
@click.option(
    "--keep",
    multiple=True,
    required=True,
    help="What must not be lost: a mixture, or a JSONL file of examples; repeatable.",
)
@click.option("--out", type=DIRECTORY, required=True, help="merged/, the curve, the table.")
@click.option(
    "--method",
    type=click.Choice(("task_arithmetic", "linear", "wise_ft", "ties_mergekit", "ties", "dare")),
    help="Of the paper.  [default: task_arithmetic; without --base wise_ft]",
)
@click.option(
    "--weights", default="0.1:1:0.1", show_default=True, help="w to try: 0.2,0.5 or F:L:S"
)
@click.option("--density", type=float, default=0.5, show_default=True, help="Of ties and dare.")
@click.option(
    "--tolerance",
    default="2%",
    show_default=True,
    help="What may be lost of what is kept: 2% of its score, or 2 points.",
)
@click.option(
    "--general_examples",
    type=COUNT,
    help="How many --general was trained on: tries w = |D| / |G| as well.",
)
@with_gin
@click.option("--steps", type=COUNT, help="Optimizer steps of the skill's model.")
@click.option(
    "--epochs",
    type=click.FloatRange(min=0, min_open=True),
    help=f"Or passes over its data, an example a row.  [default: {_EPOCHS:g}]",
)
@click.option("--split", default="validation", show_default=True, help="To choose and judge by.")
@click.option("--max_examples", type=COUNT, help="Of each task, both halves.")
@click.option("--eval_batch_size", type=COUNT, default=32, show_default=True)
@with_lengths
@with_generative_score("Of tasks in free text.")
@click.option("--vocabulary", help="By default the general model's own.")
@with_source(default=None)
def skills(
    general: Path,
    base: Path | None,
    skill: Path | None,
    jsonl: dict[str, storage.AnyPath],
    mixture: str | None,
    keep: tuple[str, ...],
    out: Path,
    method: str | None,
    weights: str,
    density: float,
    tolerance: str,
    general_examples: int | None,
    gin_files: tuple[str, ...],
    bindings: tuple[str, ...],
    steps: int | None,
    epochs: float | None,
    split: str,
    max_examples: int | None,
    eval_batch_size: int,
    input_length: int,
    target_length: int,
    generative_score: str,
    vocabulary: str | None,
    source: str | None,
) -> None:
    """Add a skill to a model: can it be done without losing what it has, and what does it cost?

    Trains a model of the skill's data, merges it with the general model by every w, takes the best
    that keeps what must be kept, and compares before and after by examples that w was not chosen
    by. Training settings are those of m2l train (--gin.BATCH_SIZE=8). Stopped, it goes on.
    """
    learned = jsonl
    mixture = api.mixture_name(mixture, learned)
    for wrong, message in (
        (not learned and not mixture, "name the skill's data: --jsonl train=FILE,validation=FILE"),
        (steps and epochs, "--steps and --epochs are two ways of saying how long; give one"),
        (
            skill and (steps or epochs or gin_files or bindings),
            "--skill is trained already: leave --steps, --epochs and gin out",
        ),
        (
            learned and not skill and "train" not in learned,
            "--jsonl: train=FILE is missing (or a trained model with --skill)",
        ),
        (learned and split not in learned, f"--jsonl: {split}=FILE is missing"),
    ):
        if wrong:
            raise ConfigError(f"m2l skills: {message}")

    from m2l import configuration, tasks
    from m2l.reporting import adding_skills_report
    from m2l.studies import adding_skills
    from m2l.studies.adding_skills import OpenedCheckpoint, Tolerance

    allowed, tried = Tolerance.parse(tolerance), tuple(series("--weights", weights))
    keep_mixture, files = _keep_mixture(keep, split)
    files |= {"skill": learned} if learned else {}
    learn = "skill" if learned else mixture
    # The settings' own file comes first, so that no file is needed.
    gin_files = ("runs/train.gin", *gin_files)
    # A row of several examples would make more passes of as many steps.
    before = [] if steps else ["Train.pack=False"]
    flags = [f"Run.source={source!r}"] if source else []

    def settings(steps: int) -> tuple[configuration.TrainingRun, str]:
        bound = [*before, *bindings, *flags, f"Train.steps={steps}"]
        return configuration.load("Run", gin_files, bound, learn)

    run, resolved = settings(steps or _MANY)
    if run.model is not None:
        raise ConfigError("m2l skills: the model is --general's; leave it out of the gin files")
    vocabulary = vocabulary or run.vocabulary
    name = vocabulary or OpenedCheckpoint.open(general).manifest.vocabulary["name"]
    tasks.declare(vocabulary=name, source=run.source)
    for task, splits in files.items():
        tasks.register_jsonl(splits, name=task)
    if not steps and not skill:
        count = adding_skills.training_examples(learn)
        run, resolved = settings(
            adding_skills.steps_of(epochs or _EPOCHS, count, run.settings.batch_size)
        )
    asked = adding_skills.SkillAddition(
        general=general,
        base=base,
        trained=skill,
        learn=learn,
        keep=keep_mixture,
        training=None if skill else run.settings,
        method=method or ("task_arithmetic" if base else "wise_ft"),
        weights=tried,
        tolerance=allowed,
        density=density,
        general_examples=general_examples,
        split=split,
        max_examples=max_examples,
        lengths={"inputs": input_length, "targets": target_length},
        batch_size=eval_batch_size,
        generative_score=generative_score,
        vocabulary=vocabulary,
        data={"source": run.source}
        | {task: api.record_origin("", splits) for task, splits in files.items()},
    )
    command = shlex.join(["m2l", *sys.argv[1:]])
    added = adding_skills.add_skill(asked, out, resolved_config=f"# {command}\n{resolved}")
    adding_skills_report.write(added, asked, out)
    _show(added, asked, out)


def _keep_mixture(keep: Sequence[str], split: str) -> tuple[str, dict[str, dict[str, Path]]]:
    """Returns the mixture of all --keep, and the files of the tasks that are files."""
    names, files = [], {}
    for name in keep:
        path = storage.path(name)
        if path.suffix in (".jsonl", ".gz") or path.is_file():
            name = re.sub(r"\W", "_", path.name.partition(".")[0])
            files[name] = {split: path}
        names.append(name)
    if len(set(names)) < len(names) or "skill" in files:
        raise ConfigError(f"--keep: tasks called {', '.join(names)}; each needs a name of its own")
    return "+".join(names), files


def _show(added: "AddedSkill", asked: "SkillAddition", out: Path) -> None:
    from m2l.reporting import adding_skills_report

    points = [(0.0, added.ends["general"]), *added.curve.items()]
    rows = [
        (w, *(cell for s in pair for cell in (s.mean, "{:.1f} to {:.1f}".format(*s.interval()))))
        for w, pair in points
    ]
    columns = ["w", "skill %", "95 %", "kept %", "95 %"]
    print_table(f"{asked.method} along w, by the half that w is chosen by", columns, rows)
    columns, rows = adding_skills_report.columns(adding_skills_report.rows(added))
    print_table("before and after, by the other half", columns, rows)
    if added.heuristic is not None:
        click.echo(f"without trying any w: w = {added.heuristic:.3g}, from |D| and |G|")
    click.echo(f"merged checkpoint: {added.merged}; {out}/curve.png, {out}/table.md")
    click.echo(adding_skills_report.answer(added, asked.tolerance))

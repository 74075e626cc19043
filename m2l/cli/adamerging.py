"""`m2l adamerging`."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import click

from m2l.cli.options import COUNT, DIRECTORY, MODEL, print_table
from m2l.cli.task_losses import TaskLoss, with_loss, with_mixture, with_task_data, with_teachers
from m2l.errors import ConfigError, DataError
from m2l.storage import AnyPath
from m2l.typing import Json

# Under which name a recipe holds the values of other losses than entropy, and of this.
_RECORDED = ("losses", "entropies")


@click.command()
@click.option("--base", type=MODEL, help="The checkpoint the experts were trained from.")
@click.option("--expert", "experts", type=MODEL, multiple=True, help="Repeat for each.")
@with_mixture
@click.option("--out", type=DIRECTORY, required=True, help="The recipe: a JSON file.")
@with_loss("entropy", "a task's own expert, --teacher")
@with_teachers
@click.option("--steps", type=COUNT, default=500, show_default=True)
@click.option(
    "--per_layer/--per_expert",
    default=True,
    show_default=True,
    help="A coefficient for each layer of each expert, or one for each expert.",
)
@click.option("--learning_rate", type=float, default=1e-3, show_default=True)
@click.option("--initial", type=float, default=0.3, show_default=True, help="Of coefficients.")
@with_task_data
def adamerging(
    base: Path | None,
    experts: tuple[Path, ...],
    mixture: str | None,
    jsonl: dict[str, AnyPath],
    out: Path,
    loss: str,
    teachers: tuple[str, ...],
    steps: int,
    per_layer: bool,
    learning_rate: float,
    initial: float,
    **data: int | str | None,
) -> None:
    """Learn how much each expert counts in a merge, from examples, by default without labels.

    Writes a recipe with the coefficients for m2l merge. Every step reads a batch of each task.
    """
    task_loss = TaskLoss(
        command="adamerging",
        base=base,
        experts=experts,
        mixture=mixture,
        jsonl=jsonl,
        loss=loss,
        teachers=teachers,
        **data,
    )
    task_loss.check_teachers()
    settings = {
        "steps": steps,
        "per_layer": per_layer,
        "learning_rate": learning_rate,
        "initial": initial,
    }
    made_by = task_loss.made_by("adamerging", settings)
    if out.exists():
        _check_finished(out, made_by)
        return

    from m2l import files
    from m2l.merging.search import learn_coefficients

    learned = task_loss.run(
        steps,
        lambda *task, on_step: learn_coefficients(*task, **settings, on_step=on_step),
    )
    scales = [[pattern, row] for pattern, row in learned.coefficients.items()]
    record = {
        "recipe": {"method": "task_arithmetic", "scales": scales},
        "made_by": made_by | {_RECORDED[loss == "entropy"]: learned.losses},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_record(out, record)
    columns = ["parameters", *(path.name for path in experts)]
    rows = [(pattern, *row) for pattern, row in learned.coefficients.items()]
    print_table(task_loss.summary(learned.losses), columns, rows)
    flags = [part for path in experts for part in ("--expert", str(path))]
    command = ["m2l", "merge", "--recipe", str(out), "--base", str(base), *flags]
    click.echo(f"recipe: {out}\nmerge with it: {shlex.join(command)} --out DIR")


def _check_finished(out: Path, made_by: Mapping[str, Json]) -> None:
    """Refuses what is at `out` unless the same command wrote it, and says that it did."""
    from m2l import files

    try:
        recorded = files.read_record(out, required=False).get("made_by")
    except DataError:
        recorded = None  # Whatever it is, it is not of this command.
    recorded = dict(recorded) if isinstance(recorded, Mapping) else {}
    for name in _RECORDED:
        recorded.pop(name, None)
    if recorded != json.loads(json.dumps(made_by)):
        raise ConfigError(f"{out} exists and is not of this command; choose another --out")
    click.echo(f"recipe: {out}, already there, learned by the same command")

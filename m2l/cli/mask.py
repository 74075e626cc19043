"""`m2l mask`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2l.cli.options import COUNT, DIRECTORY, MODEL, print_table
from m2l.cli.task_losses import TaskLoss, with_loss, with_mixture, with_task_data, with_teachers
from m2l.errors import ConfigError
from m2l.storage import AnyPath
from m2l.typing import Json, JsonObject, Params, PyTree

if TYPE_CHECKING:
    from m2l.checkpoints import Manifest

with_out = click.option("--out", type=DIRECTORY, required=True, help="The checkpoint to make.")
ADAPTED = {"inner_learning_rate": 0.1, "coefficient_steps": 500, "coefficient_rate": 1e-3}
"""What only learned coefficients read, and its defaults."""


@click.group()
def mask() -> None:
    """Learn which entries of task vectors a merge needs, and make it."""


@mask.command()
@click.option("--base", type=MODEL, help="The checkpoint the expert was trained from.")
@click.option("--expert", type=MODEL, help="The expert.")
@with_mixture
@with_out
@with_loss("labels", "the whole expert, which reads no labels")
@click.option("--density", type=float, default=0.05, show_default=True, help="Of the first mask.")
@click.option("--bias", type=float, default=5.0, show_default=True, help="Of the first logits.")
@click.option(
    "--l1",
    type=float,
    default=1.0,
    show_default=True,
    help="What a mask of all entries costs, in nats; more makes it smaller.",
)
@click.option("--steps", type=COUNT, default=100, show_default=True)
@click.option("--learning_rate", type=float, default=0.1, show_default=True)
@with_task_data
def localize(
    base: Path | None,
    expert: Path | None,
    mixture: str | None,
    jsonl: dict[str, AnyPath],
    out: Path,
    loss: str,
    density: float,
    bias: float,
    l1: float,
    steps: int,
    learning_rate: float,
    **data: int | str | None,
) -> None:
    """Learn the few entries of a task vector that an expert needs on its own task.

    All other entries of the result are the base's. Experts that were localized are stitched
    together by m2l merge --method localize_and_stitch --density 1.
    """
    task_loss = TaskLoss(
        command="mask localize",
        base=base,
        experts=(expert,) if expert else (),
        mixture=mixture,
        jsonl=jsonl,
        loss=loss,
        **data,
    )
    settings = {
        "density": density,
        "bias": bias,
        "l1": l1,
        "steps": steps,
        "learning_rate": learning_rate,
    }
    made_by = _made_by(task_loss, "localize", settings, out)
    if made_by is None:
        return

    from m2l.merging import learned_masks

    result = task_loss.run(
        steps,
        lambda base, experts, *task, on_step: learned_masks.localize(
            base, *experts, *task, **settings, on_step=on_step
        ),
    )
    recorded = {"share": result.share, "losses": result.losses}
    manifest = _save(task_loss, out, result.params, made_by | recorded)
    click.echo(f"{task_loss.summary(result.losses)}; {100 * result.share:.3g} % of entries kept")
    click.echo(f"checkpoint: {out}  digest {manifest.digest[:16]}")
    method = ["m2l", "merge", "--method", "localize_and_stitch", "--density", "1"]
    command = [*method, "--base", str(base), "--expert", str(out)]
    click.echo(f"stitch it with: {shlex.join(command)} --expert ANOTHER --out DIR")


@mask.command()
@click.option("--base", type=MODEL, help="The checkpoint the experts were trained from.")
@click.option("--expert", "experts", type=MODEL, multiple=True, help="Repeat for each.")
@with_mixture
@with_out
@with_loss("entropy", "a task's own expert, --teacher")
@with_teachers
@click.option(
    "--coefficients",
    type=click.Choice(["fixed", "per_expert", "per_layer"]),
    default="fixed",
    show_default=True,
    help="How much each expert counts: --scale; or learned too, of an expert or of each layer.",
)
@click.option("--scale", type=float, default=0.3, show_default=True, help="Learned: at first.")
@click.option("--temperature", type=float, default=0.5, show_default=True, help="Of the draws.")
@click.option("--initial", type=float, default=0.0, show_default=True, help="The first logits.")
@click.option("--steps", type=COUNT, default=2000, show_default=True)
@click.option("--learning_rate", type=float, default=1e-3, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draws.")
@click.option(
    "--inner_learning_rate",
    type=click.FloatRange(min=0),
    help="Of the step that learned coefficients take before each of the mask; by default "
    f"{ADAPTED['inner_learning_rate']:g}.",
)
@click.option(
    "--coefficient_steps",
    type=COUNT,
    help="Of learned coefficients, with the mask that was learned; by default "
    f"{ADAPTED['coefficient_steps']}.",
)
@click.option(
    "--coefficient_rate",
    type=click.FloatRange(min=0, min_open=True),
    help=f"Learning rate of these; by default {ADAPTED['coefficient_rate']:g}.",
)
@with_task_data
def concrete(
    base: Path | None,
    experts: tuple[Path, ...],
    mixture: str | None,
    jsonl: dict[str, AnyPath],
    out: Path,
    loss: str,
    teachers: tuple[str, ...],
    coefficients: str,
    scale: float,
    temperature: float,
    initial: float,
    steps: int,
    learning_rate: float,
    seed: int,
    inner_learning_rate: float | None,
    coefficient_steps: int | None,
    coefficient_rate: float | None,
    **data: int | str | None,
) -> None:
    """Learn a mask that all experts share, by default without labels, and merge with it.

    The concrete subspace: with fixed coefficients Concrete Task Arithmetic, otherwise Concrete
    AdaMerging, which learns the mask first and then the coefficients.
    """
    task_loss = TaskLoss(
        command="mask concrete",
        base=base,
        experts=experts,
        mixture=mixture,
        jsonl=jsonl,
        loss=loss,
        teachers=teachers,
        **data,
    )
    task_loss.check_teachers()
    adapted = {
        "inner_learning_rate": inner_learning_rate,
        "coefficient_steps": coefficient_steps,
        "coefficient_rate": coefficient_rate,
    }
    is_fixed = coefficients == "fixed"
    if is_fixed and (idle := [f"--{name}" for name, value in adapted.items() if value is not None]):
        raise ConfigError(
            f"m2l mask concrete: {', '.join(idle)}: without effect with --coefficients fixed"
        )
    if not is_fixed and not 0 <= scale <= 1:
        raise ConfigError(
            f"m2l mask concrete --scale {scale}: expected 0 to 1 with --coefficients {coefficients}"
        )
    for name, value in ADAPTED.items():
        adapted[name] = value if adapted[name] is None else adapted[name]
    learning = {
        "scale": scale,
        "temperature": temperature,
        "initial": initial,
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    settings = {"coefficients": coefficients, **learning, **({} if is_fixed else adapted)}
    made_by = _made_by(task_loss, "concrete", settings, out)
    if made_by is None:
        return

    from m2l.merging import learned_masks
    from m2l.merging.search import EVERYTHING, learn_coefficients

    per_layer = coefficients == "per_layer"

    def learn(
        base: Params, experts: list[Params], *task: PyTree, on_step: PyTree
    ) -> tuple[Params, JsonObject]:
        learned = learned_masks.learn_shared_mask(
            base,
            experts,
            *task,
            **learning,
            inner_learning_rate=0.0 if is_fixed else adapted["inner_learning_rate"],
            per_layer=per_layer,
            on_step=on_step,
        )
        masks = learned_masks.rescaled_mask(learned.logits)
        recorded = {"losses": learned.losses, "scales": {EVERYTHING: [scale] * len(experts)}}
        if not is_fixed:
            merged = learn_coefficients(
                base,
                experts,
                *task,
                per_layer=per_layer,
                steps=adapted["coefficient_steps"],
                learning_rate=adapted["coefficient_rate"],
                initial=scale,
                masks=masks,
                on_step=lambda step, value: on_step(steps + step, value),
            )
            recorded = {"losses": learned.losses + merged.losses, "scales": merged.coefficients}
        return learned_masks.merge_by_mask(base, experts, masks, recorded["scales"]), recorded

    total = steps + (0 if is_fixed else adapted["coefficient_steps"])
    params, recorded = task_loss.run(total, learn)
    manifest = _save(task_loss, out, params, made_by | recorded)
    columns = ["parameters", *(path.name for path in experts)]
    rows = [(pattern, *row) for pattern, row in recorded["scales"].items()]
    print_table(task_loss.summary(recorded["losses"]), columns, rows)
    click.echo(f"merged: {out}  digest {manifest.digest[:16]}")


def _made_by(
    task_loss: TaskLoss, kind: str, settings: dict[str, Json], out: Path
) -> JsonObject | None:
    """Returns what is recorded of a result before it is made; None: it is there."""
    from m2l.checkpoints.reading import KEY, existing_result
    from m2l.files import checksum
    from m2l.merging.inputs import check_destination

    made_by = task_loss.made_by(kind, settings)
    made_by[KEY] = checksum(made_by)
    check_destination(out, task_loss.paths)
    same = existing_result(out, lambda manifest: manifest.made_by.get(KEY) == made_by[KEY])
    return made_by if same is None else None


def _save(task_loss: TaskLoss, out: Path, params: Params, made_by: JsonObject) -> "Manifest":
    from m2l import checkpoints

    paths, manifests = task_loss.paths, task_loss.manifests
    roles = ["base", *("expert" for _ in paths[1:])]
    return checkpoints.save(
        out,
        params,
        model=manifests[0].model,
        vocabulary=manifests[0].vocabulary,
        made_by=made_by,
        parents=tuple(
            {"role": role, "path": str(path), "digest": manifest.digest}
            for role, path, manifest in zip(roles, paths, manifests, strict=True)
        ),
    )

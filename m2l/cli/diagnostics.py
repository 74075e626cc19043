"""What a merge measured of its task vectors, in a terminal and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from m2l import storage
from m2l.cli.options import print_table
from m2l.errors import CheckpointError, ConfigError
from m2l.typing import Json


def names(paths: Sequence[str]) -> list[str]:
    """Returns the names of models: their folders, of training runs the run's."""
    folders = [storage.path(path) for path in paths]
    return [
        folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name
        for folder in folders
    ]


def show(made_by: Mapping[str, Json], experts: Sequence[str]) -> None:
    """Prints the diagnostics of a merge: of the model, of its layers, and the cosines.

    Raises:
        CheckpointError: They are not those of a merge of so many experts.
    """
    diagnostics = made_by["diagnostics"]
    if not _are_diagnostics(diagnostics, len(experts)):
        raise CheckpointError(
            f"the manifest's diagnostics are damaged: {diagnostics!r:.80} are not those of a "
            f"merge of {len(experts)} experts"
        )
    if "norms" not in diagnostics:
        densities = ", ".join(f"{share:.4f}" for share in diagnostics["density"])
        click.echo(f"density: {densities}")
        return
    columns = ["part", "parameters", *(f"|{name}|" for name in experts)]
    columns += ["kept", "sign conflicts", "mean cosine"]
    rows = [_row("whole model", diagnostics)]
    rows += [_row(name, group) for name, group in diagnostics["groups"].items()]
    sampled = (
        ""
        if diagnostics["share"] >= 1
        else f", by a sample of {diagnostics['share']:.1%} of entries"
    )
    print_table(f"task vectors{sampled}", columns, rows)
    _show_cosines(diagnostics["cosines"], experts)


def _are_diagnostics(value: Json, count: int) -> bool:
    if not isinstance(value, dict) or not _are_numbers(value.get("density"), count):
        return False
    if "norms" not in value:
        return True
    groups = value.get("groups")
    return (
        _are_numbers([value.get("share")], 1)
        and isinstance(groups, dict)
        and all(_are_of_group(group, count) for group in (value, *groups.values()))
    )


def _are_of_group(value: Json, count: int) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("parameters")) is int
        and _are_numbers([value.get("sign_conflicts")], 1)
        and all(_are_numbers(value.get(name), count) for name in ("norms", "density"))
        and isinstance(value.get("cosines"), list)
        and len(value["cosines"]) == count
        and all(_are_numbers(row, count) for row in value["cosines"])
    )


def _are_numbers(values: Json, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) for value in values)
    )


def _row(name: str, diagnostics: Mapping[str, Json]) -> tuple[str | float, ...]:
    n = len(diagnostics["norms"])
    pairs = [diagnostics["cosines"][i][j] for i in range(n) for j in range(i)]
    mean = sum(pairs) / len(pairs) if pairs else 1.0
    shares = (_mean(diagnostics["density"]), diagnostics["sign_conflicts"], mean)
    return (name, f"{diagnostics['parameters']:,}", *diagnostics["norms"], *shares)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _show_cosines(matrix: Sequence[Sequence[float]], experts: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="cosines", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in experts:
        table.add_column(name, justify="right")
    for name, row in zip(experts, matrix, strict=True):
        table.add_row(name, *(Text(f" {value:6.3f} ", style=_colour(value)) for value in row))
    Console(width=200, highlight=False).print(table)


def _colour(value: float) -> str:
    """Returns red for vectors that point the same way, blue for opposite ones, grey between."""
    strength = int(200 * min(1.0, abs(value)))
    red, blue = (55 + strength, 55) if value > 0 else (55, 55 + strength)
    return f"white on rgb({red},55,{blue})"


def draw(made_by: Mapping[str, Json], experts: Sequence[str], file: Path) -> None:
    """Writes the picture of the cosines.

    Raises:
        ConfigError: The merge measured none, or the file's kind is not one that can be drawn.
    """
    diagnostics = made_by.get("diagnostics", {})
    if not _are_diagnostics(diagnostics, len(experts)) or "cosines" not in diagnostics:
        raise ConfigError("no cosines were measured; merge with a base and with --diagnostics")
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{file}: a picture is .png, .svg or .pdf")
    from m2l.reporting import merge_figures

    with file.open("wb") as image:
        merge_figures.cosines(diagnostics, experts).savefig(image, format=file.suffix[1:], dpi=200)
    click.echo(f"cosines: {file}")

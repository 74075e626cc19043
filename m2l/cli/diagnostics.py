"""What a merge measured of its task vectors, in a terminal and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from m2l import storage
from m2l.cli.options import print_table
from m2l.errors import CheckpointError, ConfigError


def names(paths: Sequence[str]) -> list[str]:
    """What to call models: their folders, of training runs the run's."""
    folders = [storage.path(path) for path in paths]
    return [
        folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name
        for folder in folders
    ]


def show(made_by: Mapping[str, Any], experts: Sequence[str]) -> None:
    """Prints the diagnostics of a merge: of the model, of its layers, and the cosines.

    Raises:
        CheckpointError: They are not those of a merge of so many experts.
    """
    found = made_by["diagnostics"]
    if not _are_diagnostics(found, len(experts)):
        raise CheckpointError(
            f"the manifest's diagnostics are damaged: {found!r:.80} are not those of a merge of "
            f"{len(experts)} experts"
        )
    if "norms" not in found:
        kept = ", ".join(f"{share:.4f}" for share in found["density"])
        click.echo(f"density: {kept}")
        return
    columns = ["part", "parameters", *(f"|{name}|" for name in experts)]
    columns += ["kept", "sign conflicts", "mean cosine"]
    rows = [_row("whole model", found)]
    rows += [_row(name, group) for name, group in found["groups"].items()]
    looked_at = "" if found["share"] >= 1 else f", by a sample of {found['share']:.1%} of entries"
    print_table(f"task vectors{looked_at}", columns, rows)
    _show_cosines(found["cosines"], experts)


def _are_diagnostics(found: Any, count: int) -> bool:
    if not isinstance(found, dict) or not _are_numbers(found.get("density"), count):
        return False
    if "norms" not in found:
        return True
    groups = found.get("groups")
    return (
        _are_numbers([found.get("share")], 1)
        and isinstance(groups, dict)
        and all(_are_of_group(group, count) for group in (found, *groups.values()))
    )


def _are_of_group(found: Any, count: int) -> bool:
    return (
        isinstance(found, dict)
        and type(found.get("parameters")) is int
        and _are_numbers([found.get("sign_conflicts")], 1)
        and all(_are_numbers(found.get(name), count) for name in ("norms", "density"))
        and isinstance(found.get("cosines"), list)
        and len(found["cosines"]) == count
        and all(_are_numbers(row, count) for row in found["cosines"])
    )


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) for value in values)
    )


def _row(name: str, found: Mapping[str, Any]) -> tuple[Any, ...]:
    n = len(found["norms"])
    pairs = [found["cosines"][i][j] for i in range(n) for j in range(i)]
    mean = sum(pairs) / len(pairs) if pairs else 1.0
    shares = (_mean(found["density"]), found["sign_conflicts"], mean)
    return (name, f"{found['parameters']:,}", *found["norms"], *shares)


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
    """Red for vectors that go together, blue for those that go apart, grey in between."""
    strength = int(200 * min(1.0, abs(value)))
    red, blue = (55 + strength, 55) if value > 0 else (55, 55 + strength)
    return f"white on rgb({red},55,{blue})"


def draw(made_by: Mapping[str, Any], experts: Sequence[str], file: Path) -> None:
    """Writes the picture of the cosines.

    Raises:
        ConfigError: The merge measured none, or the file's kind is not one that can be drawn.
    """
    found = made_by.get("diagnostics", {})
    if not _are_diagnostics(found, len(experts)) or "cosines" not in found:
        raise ConfigError("no cosines were measured; merge with a base and with --diagnostics")
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{file}: a picture is .png, .svg or .pdf")
    from m2l.reporting import merges

    with file.open("wb") as image:
        merges.cosines(found, experts).savefig(image, format=file.suffix[1:], dpi=200)
    click.echo(f"cosines: {file}")

"""What several subcommands take or print."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from m2l import files


class _Directory(click.ParamType):
    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        files.check_local(value)
        return Path(value)


DIRECTORY = _Directory()
"""A path of a file or directory; addresses of remote storage are refused."""


def with_gin(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --gin_file and, hidden, the --gin.NAME=VALUE that `main` rewrites."""
    command = click.option("--gin_binding", "bindings", multiple=True, hidden=True)(command)
    return click.option("--gin_file", "gin_files", multiple=True, help="A gin file; repeatable.")(
        command
    )


def with_source(default: str | None = "microworld") -> Callable[..., Any]:
    """Adds --source."""
    return click.option(
        "--source",
        default=default,
        show_default=default is not None,
        help="Of the records: microworld, hub[:DIR], p3[:DIR], tfds[:DIR], promptsource[+SOURCE], "
        "jsonl:DIR or cache:DIR.",
    )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table, numbers to two decimals; smaller ones to two digits."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*map(_shown, row))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False).print(table)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2g}" if 0 < abs(value) < 0.005 else f"{value:.2f}"

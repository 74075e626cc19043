"""Options of several subcommands, and the tables that they print."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

import click

from m2l import storage
from m2l.errors import ConfigError

Command: TypeAlias = Callable[..., None]


class _Directory(click.ParamType):
    name = "path"

    def convert(
        self, value: str | storage.AnyPath, param: click.Parameter | None, ctx: click.Context | None
    ) -> storage.AnyPath:
        return storage.path(value)


DIRECTORY = _Directory()
"""A path of a file or directory; gs://BUCKET/KEY and s3://BUCKET/KEY too."""
COUNT = click.IntRange(min=1)


def with_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Returns a decorator that adds several options to a command, in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# --gin.NAME=VALUE arrives as the hidden one, as `m2l.cli.command.run` rewrites it.
with_gin = with_options(
    click.option("--gin_file", "gin_files", multiple=True, help="A gin file; repeatable."),
    click.option("--gin_binding", "bindings", multiple=True, hidden=True),
)
with_mesh = with_options(
    click.option("--fsdp", type=COUNT, default=1, help="Devices to split models over."),
    click.option("--model", type=COUNT, default=1, help="Devices to split layers over."),
)
with_processes = with_options(
    click.option("--distributed", is_flag=True, help="One of a job's processes; JAX finds it."),
    click.option("--coordinator", help="HOST:PORT of process 0, where no cluster says so."),
    click.option("--process", help="I/N: which of N processes, with --coordinator, from 0/N."),
)


def with_source(default: str | None = "microworld") -> Callable[[Command], Command]:
    """Returns a decorator that adds --source."""
    return click.option(
        "--source",
        default=default,
        show_default=default is not None,
        help="Of the records: microworld, hub[:DIR], p3[:DIR], tfds[:DIR], promptsource[+SOURCE], "
        "jsonl:DIR or cache:DIR.",
    )


def join(
    distributed: bool,
    coordinator: str | None,
    process: str | None,
    *,
    saves: bool = True,
    survive: bool = False,
) -> None:
    """Joins the other processes of a command where its flags say so, and says what was joined.

    Args:
        distributed, coordinator, process: The values of the flags that `with_processes` adds.
        saves, survive: As `distributed.join` takes them.

    Raises:
        ConfigError: --process is not I/N, or I is not below N.
    """
    if not (distributed or coordinator or process):
        return
    from m2l import distributed as processes

    numbers = None
    if process is not None:
        index, _, count = process.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ConfigError(f"--process {process}: expected I/N, such as 0/2")
        numbers = int(index), int(count)
    joined = processes.join(coordinator, numbers, saves=saves, survive=survive)
    click.echo(f"m2l: {joined}", err=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table, numbers to two decimals; smaller ones to two digits."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*map(_format, row))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False).print(table)


def _format(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2g}" if 0 < abs(value) < 0.005 else f"{value:.2f}"

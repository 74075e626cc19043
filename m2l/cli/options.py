"""What several subcommands take or print."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from m2l import storage
from m2l.errors import ConfigError


class _Directory(click.ParamType):
    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> storage.AnyPath:
        return storage.path(value)


DIRECTORY = _Directory()
"""A path of a file or directory; gs://BUCKET/KEY and s3://BUCKET/KEY too."""


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


def with_mesh(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --fsdp and --model, the axes of the mesh that a command's models are placed on."""
    command = click.option(
        "--model", type=click.IntRange(min=1), default=1, help="Devices to split layers over."
    )(command)
    return click.option(
        "--fsdp", type=click.IntRange(min=1), default=1, help="Devices to split models over."
    )(command)


def with_processes(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --distributed, --coordinator and --process, by which processes of one command join."""
    for option in (
        click.option("--process", help="I/N: which of N processes, with --coordinator, from 0/N."),
        click.option("--coordinator", help="HOST:PORT of process 0, where no cluster says so."),
        click.option("--distributed", is_flag=True, help="One of a job's processes; JAX finds it."),
    ):
        command = option(command)
    return command


def join(distributed: bool, coordinator: str | None, process: str | None, **options: Any) -> None:
    """Joins the other processes of a command where its flags say so, and says what was joined.

    Args:
        distributed, coordinator, process: The values of the flags that `with_processes` adds.
        options: As `distributed.join` takes them.
    """
    if not (distributed or coordinator or process):
        return
    from m2l import distributed as processes

    click.echo(f"m2l: {processes.join(coordinator, _number(process), **options)}", err=True)


def _number(text: str | None) -> tuple[int, int] | None:
    """Returns the two numbers of "I/N", or None without a text.

    Raises:
        ConfigError: It is not that, or I is not below N.
    """
    if text is None:
        return None
    number, found, count = text.partition("/")
    if not (found and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--process {text}: expected I/N, such as 0/2")
    return int(number), int(count)


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

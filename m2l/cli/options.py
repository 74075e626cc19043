"""Options of several subcommands, and the tables that they print."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

import click

from m2l import storage
from m2l.data.prompts import GENERATIVE_SCORES
from m2l.errors import ConfigError

Command: TypeAlias = Callable[..., None]


class _Directory(click.ParamType):
    name = "path"

    def convert(
        self, value: str | storage.AnyPath, param: click.Parameter | None, ctx: click.Context | None
    ) -> storage.AnyPath:
        return storage.path(value)


class _Model(_Directory):
    def convert(
        self, value: str | storage.AnyPath, param: click.Parameter | None, ctx: click.Context | None
    ) -> storage.AnyPath:
        from m2l import hub_models

        return hub_models.located(value)


class _JsonlFiles(click.ParamType):
    name = "text"

    def convert(
        self,
        value: str | dict[str, storage.AnyPath],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> dict[str, storage.AnyPath]:
        if isinstance(value, dict):
            return value
        files = {}
        for part in value.split(",") if value else []:
            split, _, path = part.partition("=")
            if not split or not path:
                raise ConfigError(f"--jsonl {value}: expected train=FILE,validation=FILE")
            files[split] = storage.path(path)
        return files


DIRECTORY = _Directory()
"""A path of a file or directory; gs://BUCKET/KEY and s3://BUCKET/KEY too."""
MODEL = _Model()
"""The same of a checkpoint, or owner/name[@revision] of one on the Hugging Face Hub."""
COUNT = click.IntRange(min=1)
VOCABULARY = (
    "microworld, bytes, a SentencePiece model, a tokenizer.json or its folder; chat: before it "
    "puts inputs into its chat template (chat@2025-01-31: tells it that date), space: or nospace: "
    "says whether a space stands between a decoder's inputs and targets."
)


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
with_lengths = with_options(
    click.option("--input_length", type=COUNT, default=512, show_default=True),
    click.option("--target_length", type=COUNT, default=64, show_default=True),
)
with_processes = with_options(
    click.option("--distributed", is_flag=True, help="One of a job's processes; JAX finds it."),
    click.option("--coordinator", help="HOST:PORT of process 0, where no cluster says so."),
    click.option("--process", help="I/N: which of N processes, with --coordinator, from 0/N."),
)


with_max_examples = click.option(
    "--max_examples", type=COUNT, help="Examples of each task at most."
)
with_decoding = with_options(
    click.option("--beams", type=COUNT, default=1, show_default=True, help="1: greedy."),
    click.option("--temperature", type=float, default=0.0, help="Draw tokens; 0: take the best."),
    click.option("--top_k", type=click.IntRange(0), default=0, help="Draw from so many; 0: all."),
    click.option("--top_p", type=float, default=1.0, help="Draw from so much of the probability."),
    click.option("--samples", type=COUNT, default=1, show_default=True, help="Texts to draw."),
    click.option("--seed", type=click.IntRange(0), default=0, help="Of what is drawn."),
)


def with_jsonl(description: str) -> Callable[[Command], Command]:
    """Returns a decorator that adds --jsonl, the files of one's own data by split."""
    return click.option("--jsonl", type=_JsonlFiles(), default="", help=description)


def with_batches(
    *, split: str = "validation", batch_size: int = 32
) -> Callable[[Command], Command]:
    """Returns a decorator that adds --split, --batch_size, --input_length and --target_length."""
    return with_options(
        click.option("--split", default=split, show_default=True),
        click.option("--batch_size", type=COUNT, default=batch_size, show_default=True),
        with_lengths,
    )


def with_generative_score(description: str) -> Callable[[Command], Command]:
    """Returns a decorator that adds --generative_score."""
    return click.option(
        "--generative_score",
        type=click.Choice(GENERATIVE_SCORES),
        default=GENERATIVE_SCORES[0],
        show_default=True,
        help=description,
    )


def with_source(default: str | None = "microworld") -> Callable[[Command], Command]:
    """Returns a decorator that adds --source."""
    return click.option(
        "--source",
        default=default,
        show_default=default is not None,
        help="Of the records: microworld, hub[:DIR], p3[:DIR], tfds[:DIR], promptsource[+SOURCE], "
        "jsonl:DIR, cache:DIR or none.",
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

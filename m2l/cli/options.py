"""Options of several subcommands, and the tables that they print."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import click
from click.shell_completion import CompletionItem

from m2l import storage
from m2l.data.prompts import GENERATIVE_SCORES
from m2l.errors import ConfigError

Command: TypeAlias = Callable[..., None]


class GroupedCommand(click.Command):
    """A command whose help lists its flags by groups.

    Args:
        groups: Each group's title, and the names of its parameters with spaces between.
    """

    def __init__(self, *arguments: Any, groups: Mapping[str, str] | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self._groups = groups or {}

    def grouped(self, ctx: click.Context) -> dict[str, list[click.Parameter]]:
        """Returns the flags by group; those of no group are in the last one, "Other"."""
        params = {each.name: each for each in self.get_params(ctx)}
        groups = {
            title: [params.pop(name) for name in names.split() if name in params]
            for title, names in self._groups.items()
        }
        return {**groups, "Other": list(params.values())}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the flags, a section for each group."""
        for title, params in self.grouped(ctx).items():
            options = [each for each in params if isinstance(each, click.Option)]
            records = [record for each in options if (record := each.get_help_record(ctx))]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Name(click.ParamType):
    """A name, which shells complete; what a command does not know it refuses itself.

    Args:
        name: What help texts call it.
        known: Returns the names that there are.
    """

    def __init__(self, name: str, known: Callable[[], Iterable[str]]):
        self.name = name
        self._known = known

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Returns the names that begin so."""
        return [CompletionItem(each) for each in self._known() if each.startswith(incomplete)]


def _mixtures() -> list[str]:
    from m2l import tasks

    return [*tasks.mixtures(), *tasks.task_names()]


def _gin_files() -> list[str]:
    from importlib import resources
    from pathlib import Path

    root = Path(str(resources.files("m2l.gin_configs")))
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.gin"))


MIXTURE = Name("name", _mixtures)
"""A task or a mixture."""
GIN_FILE = Name("file", _gin_files)


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


GIN_BINDING = "--gin."
"""The hidden option as which --gin.NAME=VALUE arrives."""
with_gin = with_options(
    click.option(
        "--gin_file", "gin_files", type=GIN_FILE, multiple=True, help="A gin file; repeatable."
    ),
    click.option(GIN_BINDING, "bindings", multiple=True, hidden=True),
)


def reads_gin(command: click.Command) -> bool:
    """Returns whether a command has the options of `with_gin`."""
    return any(param.name == "bindings" for param in command.params)


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


with_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
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


def with_dtype(description: str, default: str | None = None) -> Callable[[Command], Command]:
    """Returns a decorator that adds --dtype, in which a network computes."""
    return click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default=default,
        show_default=default is not None,
        help=description,
    )


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


def print_json(value: object) -> None:
    """Prints a value as one JSON document."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def merge_command(
    base: storage.AnyPath | None,
    experts: Sequence[storage.AnyPath],
    statistics: Sequence[storage.AnyPath],
    out: storage.AnyPath,
) -> str:
    """Returns the command that merges by the recipe that is left in `out`."""
    named = [] if base is None else ["--base", base]
    for flag, paths in (("--expert", experts), ("--statistics", statistics)):
        named += [word for path in paths for word in (flag, path)]
    arguments = [*named, "--recipe", out / "recipe.json", "--out", f"{out}_merged"]
    return shlex.join(["m2l", "merge", *map(str, arguments)])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table, numbers to two decimals; smaller ones to two digits."""
    from rich.console import Console
    from rich.table import Table

    click.echo(title)  # A table's own would be broken where the table is narrower.
    table = Table(box=None, pad_edge=False)
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

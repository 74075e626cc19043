"""`m2l moe`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2l.cli.options import (
    COUNT,
    DIRECTORY,
    MODEL,
    VOCABULARY,
    print_table,
    with_mesh,
    with_source,
)
from m2l.errors import ConfigError, DataError

if TYPE_CHECKING:
    from m2l.merging.branch_train_mix import Prompts

EXAMPLES, INPUT_LENGTH = 64, 512


@click.command()
@click.option("--base", type=MODEL, required=True, help="What the experts were trained from.")
@click.option("--expert", "experts", type=MODEL, multiple=True, required=True, help="Repeatable.")
@click.option(
    "--prompts",
    multiple=True,
    help="What an expert is for, one for each in their order: a task or mixture, whose inputs are "
    "taken, a .jsonl file with inputs, or a file of one prompt a line.",
)
@click.option(
    "--router",
    type=click.Choice(("hidden", "hidden_avg", "random")),
    default="hidden",
    show_default=True,
    help="By the base's hidden states of prompts, at their last token or on average; or random, "
    "to be trained.",
)
@click.option("--experts_per_token", type=COUNT, default=2, show_default=True)
@click.option(
    "--shared",
    type=click.Choice(("average", "base")),
    default="average",
    show_default=True,
    help="All but MLPs: the experts' average, as Branch-Train-MiX, or the base's, as mergekit-moe.",
)
@click.option(
    "--examples", type=COUNT, default=EXAMPLES, show_default=True, help="Inputs of a task."
)
@click.option("--split", default="train", show_default=True, help="Of a task.")
@click.option(
    "--input_length", type=COUNT, default=INPUT_LENGTH, show_default=True, help="Of a prompt."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of a random router.")
@click.option("--dtype", help="By default the widest of the models'.")
@click.option(
    "--to",
    "output_format",
    type=click.Choice(("orbax", "huggingface")),
    help="By default what all models are, or orbax.",
)
@click.option("--vocabulary", help=f"{VOCABULARY} By default the experts'.")
@click.option("--allow_differences", help="Fields in which the models may differ: A,B.")
@with_mesh
@with_source()
@click.option("--out", type=DIRECTORY, required=True, help="What to make.")
def moe(
    base: Path,
    experts: tuple[Path, ...],
    prompts: tuple[str, ...],
    examples: int,
    split: str,
    allow_differences: str | None,
    fsdp: int,
    model: int,
    source: str,
    out: Path,
    **options: int | str | None,
) -> None:
    """Make a mixture of experts of dense models: Llamas and Mistrals a Mixtral, Qwen3s a Qwen3-MoE.

    Each layer's experts are the models' MLPs. m2l train --init OUT trains it further.
    """
    from m2l import partitioning
    from m2l.merging import branch_train_mix

    is_random = options["router"] == "random"
    idle = {
        "--seed": not is_random and options["seed"],
        "--examples": is_random and examples != EXAMPLES,
        "--split": is_random and split != "train",
        "--input_length": is_random and options["input_length"] != INPUT_LENGTH,
    }
    if flags := [flag for flag, value in idle.items() if value]:
        raise ConfigError(
            f"m2l moe: {', '.join(flags)}: without effect with --router {options['router']}"
        )
    manifest = branch_train_mix.mix(
        base,
        experts,
        out,
        prompts=[_prompts(text, examples, split, source) for text in prompts],
        allow_differences=allow_differences.split(",") if allow_differences else (),
        mesh=partitioning.make_mesh(fsdp=fsdp, model=model),
        **options,
    )
    if abouts := manifest.made_by.get("prompts"):
        rows = [
            (str(expert), about["source"], about["count"], about["nearest"])
            for expert, about in zip(experts, abouts, strict=True)
        ]
        columns = ["expert", "prompts", "count", "cosine of the nearest other's"]
        print_table("router", columns, rows)
    click.echo(f"mixture of {len(experts)} experts: {out}  digest {manifest.digest[:16]}")


def _prompts(text: str, examples: int, split: str, source: str) -> "Prompts":
    """Returns the prompts of a file, or inputs of a task, evenly over its tasks and records."""
    from m2l import storage
    from m2l.data import jsonl
    from m2l.merging.branch_train_mix import Prompts

    file = storage.path(text)
    if file.is_file():
        if ".jsonl" not in file.suffixes:
            try:
                return Prompts(text, file.read_text(encoding="utf-8").splitlines())
            except UnicodeDecodeError as error:
                raise DataError(f"{file}: prompts, one a line, are UTF-8; this is not") from error
        texts = [record.get("inputs") for record in jsonl.records(file)]
        if not all(isinstance(each, str) for each in texts):
            raise DataError(f"{file}: a line without inputs, or whose inputs are no text")
        return Prompts(text, texts)

    from m2l import tasks
    from m2l.data import text_tasks

    tasks.declare(source=source)
    rates = text_tasks.members("file of prompts, task or mixture", text, split)
    if rates is None:
        raise ConfigError(f"--prompts {text}: it has no texts as inputs; write them to a file")
    members, texts = [*rates], []
    for number, count in Counter(i * len(members) // examples for i in range(examples)).items():
        size = members[number].records.split(split).size
        places = sorted({place * size // count for place in range(count)})
        texts += [members[number].texts(split, place)["inputs"] for place in places]
    return Prompts(text, texts)

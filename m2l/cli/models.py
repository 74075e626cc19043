"""`m2l train`, `m2l merge`, `m2l eval`, `m2l generate`."""

import json
import shlex
import sys
from pathlib import Path

import click

from m2l.cli.data import jsonl_files, register, scored_tasks
from m2l.cli.options import DIRECTORY, print_table, with_gin, with_source
from m2l.errors import ConfigError
from m2l.evaluation.metrics import GENERATIVE_SCORES

_VOCABULARY = (
    "microworld, bytes, a SentencePiece model, a tokenizer.json or its folder; chat: before it "
    "puts inputs into its chat template."
)


@click.command()
@with_gin
@click.option("--out", type=DIRECTORY, required=True, help="The run's folder.")
@click.option("--init", type=DIRECTORY, help="The checkpoint to start from.")
@click.option("--mixture", help="The task or mixture to train on.")
@click.option("--steps", type=int, help="Optimizer steps in all.")
@click.option("--jsonl", help="train=FILE[,validation=FILE]: your own data, as the task `jsonl`.")
@click.option("--vocabulary", help=_VOCABULARY)
@with_source(default=None)
def train(
    gin_files: tuple[str, ...],
    bindings: tuple[str, ...],
    out: Path,
    init: Path | None,
    mixture: str | None,
    steps: int | None,
    jsonl: str | None,
    vocabulary: str | None,
    source: str | None,
) -> None:
    """Train a model, or go on where a stopped run left off."""
    from m2l import checkpoints, configuration, models

    files = jsonl_files(jsonl, mixture)
    mixture = "jsonl" if files else mixture
    flags = [f"Train.mixture={mixture!r}"] if mixture else []
    flags += [f"Train.steps={steps}"] if steps is not None else []
    flags += [f"Run.vocabulary={vocabulary!r}"] if vocabulary else []
    flags += [f"Run.source={source!r}"] if source else []
    # The settings' own file comes first, so that a model's file alone will do.
    gin_files = ("runs/train.gin", *gin_files)
    run, resolved = configuration.load("Run", gin_files, [*bindings, *flags])
    config, vocabulary_name = run.model, run.vocabulary
    if init is not None:
        manifest = checkpoints.read_manifest(checkpoints.resolve(init))
        config = config or models.from_dict(manifest.model)
        vocabulary_name = vocabulary_name or manifest.vocabulary["name"]
    vocabulary_name = vocabulary_name or "microworld"
    if config is None:
        raise ConfigError(
            "m2l train: no model; name an --init checkpoint, or --gin_file models/t5_1m.gin"
        )

    from m2l.data import vocabularies
    from m2l.training import loop

    data = register(vocabulary_name, run.source, files)
    described = vocabularies.describe(vocabularies.load(vocabulary_name), vocabulary_name)
    last = loop.train(
        out,
        config=config,
        vocabulary=described,
        settings=run.settings,
        data=data,
        init=init,
        resolved_config=f"# {shlex.join(['m2l', *sys.argv[1:]])}\n{resolved}",
    )
    final = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    rows = [(name, float(value)) for name, value in final.items() if name != "step"]
    print_table(f"step {final['step']}", ["figure", "value"], rows)
    click.echo(f"checkpoint: {last}")


@click.command("eval")
@click.option("--checkpoint", type=DIRECTORY, required=True, help="What to evaluate.")
@click.option("--mixture", help="The task or mixture to evaluate by.")
@click.option("--jsonl", help="validation=FILE: your own data, as the task `jsonl`.")
@click.option("--out", type=DIRECTORY, required=True, help="One JSON result a task goes here.")
@click.option("--split", default="validation", show_default=True)
@click.option("--max_examples", type=click.IntRange(min=1), help="Examples of each task at most.")
@click.option("--batch_size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--input_length", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--target_length", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--generative_score",
    type=click.Choice(GENERATIVE_SCORES),
    default=GENERATIVE_SCORES[0],
    show_default=True,
    help="Of tasks in free text: their metric on what is decoded, or the references' likelihood.",
)
@click.option("--vocabulary", help=f"{_VOCABULARY} By default the checkpoint's own.")
@with_source()
def evaluate(
    checkpoint: Path,
    mixture: str | None,
    jsonl: str | None,
    out: Path,
    split: str,
    max_examples: int | None,
    batch_size: int,
    input_length: int,
    target_length: int,
    generative_score: str,
    vocabulary: str | None,
    source: str,
) -> None:
    """Evaluate a checkpoint: rank classification where there are answer choices, else decoding."""
    import jax

    from m2l import checkpoints, models

    directory = checkpoints.resolve(checkpoint)
    manifest = checkpoints.read_manifest(directory)
    loaded_vocabulary, loaded = scored_tasks(
        mixture,
        jsonl_files(jsonl, mixture),
        vocabulary or manifest.vocabulary["name"],
        manifest.vocabulary["fingerprint"],
        source,
        split=split,
        lengths={"inputs": input_length, "targets": target_length},
        max_examples=max_examples,
        generative_score=generative_score,
    )

    from m2l.evaluation import runner

    results = runner.evaluate(
        models.from_dict(manifest.model),
        jax.device_put(checkpoints.restore(directory)),
        loaded,
        out,
        vocabulary=loaded_vocabulary,
        model_digest=manifest.digest,
        batch_size=batch_size,
    )
    rows = [(r.task, r.metric, r.score, r.count, r.ties, r.truncated) for r in results]
    columns = ["task", "metric", "score %", "examples", "ties", "truncated"]
    print_table(f"{directory}", columns, rows)
    click.echo(f"results: {out}")


@click.command()
@click.argument("checkpoint", type=DIRECTORY)
@click.argument("texts", nargs=-1)
@click.option("--max_length", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--chat", is_flag=True, help="Each text is a message, in the tokenizer's template.")
def generate(checkpoint: Path, texts: tuple[str, ...], max_length: int, chat: bool) -> None:
    """What a checkpoint writes after each text (or line of the standard input), greedily."""
    import jax
    import numpy as np

    from m2l import checkpoints, models
    from m2l.data import layouts, vocabularies
    from m2l.data.examples import GenerationExample
    from m2l.evaluation import generation

    directory = checkpoints.resolve(checkpoint)
    manifest = checkpoints.read_manifest(directory)
    name = manifest.vocabulary["name"]
    name = f"chat:{name}" if chat and not name.startswith("chat:") else name
    vocabulary = vocabularies.load(name)
    config = models.from_dict(manifest.model)
    texts = texts or tuple(line for line in sys.stdin.read().splitlines() if line.strip())
    encoded = [np.array(vocabulary.encode(text), np.int32) for text in texts]
    nothing = np.empty(0, np.int32)
    written = generation.greedy(
        config,
        jax.device_put(checkpoints.restore(directory)),
        [
            GenerationExample(ids, nothing, (), text, "", False)
            for ids, text in zip(encoded, texts, strict=True)
        ],
        max_length=max_length,
        layout=layouts.of(config, vocabulary),
        eos_id=vocabulary.eos_id,
        batch_size=min(8, max(1, len(texts))),
    )
    for text, ids in zip(texts, written, strict=True):
        click.echo(f"{text}\n> {vocabularies.continuing(vocabulary).decode(ids.tolist())}")

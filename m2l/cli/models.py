"""`m2l train`, `m2l eval`, `m2l generate`."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2l import api
from m2l.cli.options import (
    COUNT,
    DIRECTORY,
    MIXTURE,
    MODEL,
    VOCABULARY,
    GroupedCommand,
    join,
    print_json,
    print_table,
    with_batches,
    with_decoding,
    with_dtype,
    with_generative_score,
    with_gin,
    with_json,
    with_jsonl,
    with_max_examples,
    with_mesh,
    with_processes,
    with_source,
)
from m2l.errors import ConfigError, DataError, reason
from m2l.files import read_json, split_name
from m2l.storage import AnyPath

if TYPE_CHECKING:
    from m2l.evaluation.results import Result


@click.command(
    cls=GroupedCommand,
    groups={
        "Model and data": "init mixture jsonl source vocabulary",
        "Settings": "steps batch_size learning_rate dtype lora gin_files",
        "Output": "out wandb",
        "Machine": "distributed coordinator process synthetic profile",
    },
)
@with_gin
@click.option("--out", type=DIRECTORY, required=True, help="The run's folder.")
@click.option("--init", type=DIRECTORY, help="The checkpoint to start from.")
@click.option("--mixture", type=MIXTURE, help="The task or mixture to train on: m2l tasks list.")
@click.option("--steps", type=COUNT, help="Optimizer steps in all.")
@click.option("--batch_size", type=COUNT, help="Rows of a batch.  [default: 32]")
@click.option(
    "--learning_rate",
    type=click.FloatRange(min=0, min_open=True),
    help="The highest.  [default: 0.001]",
)
@with_dtype("What the network computes in; parameters are float32.  [default: float32]")
@click.option("--lora", help="Train an adapter: r=16[,alpha=32][,targets=q_proj+v_proj].")
@with_jsonl("train=FILE[,validation=FILE]: your own data, as the task `jsonl`.")
@click.option("--vocabulary", help=VOCABULARY)
@with_processes
@click.option("--synthetic", is_flag=True, help="Feed one random batch: how fast without input?")
@click.option("--profile", is_flag=True, help="Trace steps 5 to 10 to OUT/profile.")
@click.option("--wandb", metavar="PROJECT", help="Log to Weights & Biases as well.")
@with_source(default=None)
def train(
    gin_files: tuple[str, ...],
    bindings: tuple[str, ...],
    out: Path,
    init: Path | None,
    mixture: str | None,
    steps: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    dtype: str | None,
    lora: str | None,
    jsonl: dict[str, AnyPath],
    vocabulary: str | None,
    distributed: bool,
    coordinator: str | None,
    process: str | None,
    synthetic: bool,
    profile: bool,
    wandb: str | None,
    source: str | None,
) -> None:
    """Train a model, or go on where a stopped run left off.

    docs/training.md has the settings that are no flags: --gin.Train.NAME=VALUE.
    """
    from m2l import configuration

    mixture = api.mixture_name(mixture, jsonl)
    join(distributed, coordinator, process)
    values = {
        "Train.steps": steps,
        "Train.batch_size": batch_size,
        "Train.learning_rate": learning_rate,
        "Train.dtype": dtype,
        "Train.lora": lora,
        "Run.vocabulary": vocabulary,
        "Run.source": source,
    }
    flags = [f"{name}={value!r}" for name, value in values.items() if value not in (None, "")]
    # The settings' own file comes first, so that a model's file alone will do.
    gin_files = ("runs/train.gin", *gin_files)
    run, resolved = configuration.load("Run", gin_files, [*bindings, *flags], mixture)
    api.check_mixture(run.settings.mixture, run.source, jsonl)

    from m2l.training import processes
    from m2l.training.monitoring import read_figures, wandb_log

    first = processes.is_first()
    to_log = contextlib.nullcontext()
    if wandb and first:
        to_log = wandb_log(wandb, out, {"mixture": run.settings.mixture})
    with to_log as log:
        last = api.run_training(
            out,
            run.settings,
            init=init,
            config=run.model,
            vocabulary=run.vocabulary,
            source=run.source,
            jsonl=jsonl,
            resolved_config=f"# {shlex.join(['m2l', *sys.argv[1:]])}\n{resolved}",
            synthetic=synthetic,
            profile=profile,
            log=log,
        )
    if not first:
        return
    final = {}
    for row in read_figures(out):
        final |= row
    rows = [(name, float(value)) for name, value in final.items() if name != "step"]
    print_table(f"step {final['step']}", ["figure", "value"], rows)
    cut = read_json(out / "finished.json")
    if "targets_cut" in cut:
        click.echo(
            f"cut: {cut['inputs_cut']:,} inputs and {cut['targets_cut']:,} targets of "
            f"{cut['examples']:,} examples were longer than {run.settings.input_length} and "
            f"{run.settings.target_length} tokens"
        )
    click.echo(f"checkpoint: {last}")
    if run.settings.lora:
        click.echo(f"adapter: {out / 'adapter'}; with its base a model: {init}+{out / 'adapter'}")


@click.command(
    "eval",
    cls=GroupedCommand,
    groups={
        "Model and data": "checkpoint mixture jsonl source vocabulary",
        "Examples": "split max_examples shots shots_seed",
        "Scores": "generative_score max_truncated compare",
        "Decoding": "beams temperature top_k top_p samples seed",
        "Output": "out examples as_json",
        "Batches": "batch_size input_length target_length",
        "Machine": "dtype fsdp model distributed coordinator process",
    },
)
@click.argument("model_path", metavar="[CHECKPOINT]", type=MODEL, required=False)
@click.option("--checkpoint", type=MODEL, help="The same as CHECKPOINT.")
@click.option("--mixture", type=MIXTURE, help="The task or mixture to evaluate by: m2l tasks list.")
@with_jsonl("validation=FILE: your own data, as the task `jsonl`.")
@click.option("--out", type=DIRECTORY, help="One JSON result a task goes here.")
@with_batches()
@with_max_examples
@click.option(
    "--max_truncated",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="The share of a task's examples that may be longer than that.",
)
@click.option(
    "--shots",
    type=click.IntRange(0),
    default=0,
    help="Examples of each task's training split that stand before each of its examples.",
)
@click.option("--shots_seed", type=click.IntRange(0), default=0, help="Decides which.")
@with_generative_score(
    "Of tasks in free text: their metric on what is decoded, or the references' likelihood."
)
@with_decoding
@click.option("--examples", is_flag=True, help="Write what became of each example as well.")
@with_json
@click.option("--vocabulary", help=f"{VOCABULARY} By default the checkpoint's own.")
@with_dtype("What the network computes in.", default="float32")
@with_mesh
@with_processes
@click.option(
    "--compare",
    type=DIRECTORY,
    nargs=2,
    help="Evaluate nothing: what differs between two results that were made with --examples.",
)
@with_source()
def evaluate(
    model_path: Path | None,
    checkpoint: Path | None,
    out: Path | None,
    as_json: bool,
    vocabulary: str | None,
    fsdp: int,
    model: int,
    distributed: bool,
    coordinator: str | None,
    process: str | None,
    compare: tuple[Path, Path] | None,
    **options: object,
) -> None:
    """Evaluate a checkpoint: rank classification where there are answer choices, else decoding.

    CHECKPOINT is one of m2l's, a training run, a Hugging Face directory, a name on its Hub, or
    BASE+ADAPTER. With --compare A B, print by how much B is better than A, how likely by chance,
    and examples.
    """
    if compare:
        _compare(*compare)
        return
    if model_path is not None and checkpoint is not None:
        raise ConfigError(f"m2l eval: {model_path} and --checkpoint {checkpoint}: name one model")
    checkpoint = model_path if checkpoint is None else checkpoint
    for name, value in (("CHECKPOINT", checkpoint), ("--out", out)):
        if value is None:
            raise ConfigError(f"m2l eval: {name} is missing: m2l eval CHECKPOINT ... --out DIR")
    api.check_mixture(options["mixture"], options["source"], options["jsonl"])

    from m2l.evaluation import receipts

    receipt = None
    if not (distributed or coordinator or process):
        asked = {name: options[name] for name in options if name not in ("source", "jsonl")}
        records = api.current_records(options["source"], options["jsonl"])
        receipt = receipts.path(checkpoint, records, vocabulary, asked)
        if receipt:
            title, finished = receipts.finished(receipt, out, options["examples"])
            if finished:
                _print_results(title, finished, out, as_json)
                return

    import jax

    join(distributed, coordinator, process, saves=False)
    from m2l import partitioning
    from m2l.evaluation.model import load

    opened = load(checkpoint, vocabulary)
    results = api.evaluate(
        opened,
        vocabulary=vocabulary,
        mesh=partitioning.make_mesh(fsdp=fsdp, model=model),
        out=out,
        **options,
    )
    if receipt:
        receipts.write(receipt, f"{opened.path}", results.values())
    if jax.process_index() == 0:
        _print_results(f"{opened.path}", list(results.values()), out, as_json)


def _print_results(title: str, results: "Sequence[Result]", out: Path, as_json: bool) -> None:
    if as_json:
        tasks = {result.task: dataclasses.asdict(result) for result in results}
        print_json({"model": title, "out": str(out), "tasks": tasks})
        return
    _print_tables(title, results)
    click.echo(f"results: {out}")


def _print_tables(title: str, results: "Sequence[Result]") -> None:
    from m2l.evaluation.results import over_categories, over_prompts

    rows = [
        (r.task, r.metric, r.score, _interval(r.interval), r.count, r.ties, r.truncated)
        for r in results
    ]
    columns = ["task", "metric", "score %", "95 %", "examples", "ties", "truncated"]
    print_table(title, columns, rows)
    datasets = over_prompts(results)
    if all(row.prompts == 1 for row in datasets):
        return
    rows = [
        (
            *(row.dataset, row.metric, row.prompts, row.mean, _interval(row.interval), row.median),
            *(*row.quartiles, row.worst[1], row.best[1], row.worst[0], row.best[0]),
        )
        for row in datasets
    ]
    columns = ["dataset", "metric", "prompts", "mean %", "95 %", "median", "lower"]
    columns += ["upper quartile", "worst", "best", "worst prompt", "best prompt"]
    print_table("over prompts", columns, rows)
    if len({row.dataset for row in datasets}) > 1:
        rows = [(*group, mean) for group, mean in over_categories(datasets).items()]
        print_table("over datasets", ["category", "metric", "mean %"], rows)


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else "{:.2f} to {:.2f}".format(*ends)


# Of each task, how many examples are shown that two models answer differently.
_SHOWN = 3


def _compare(one: Path, other: Path) -> None:
    from m2l.evaluation.results import compare

    comparisons, alone = compare(one, other)
    rows = []
    for task in comparisons:
        d = task.difference
        interval = f"{d.low:+.2f} to {d.high:+.2f}"
        scores = task.one.task, task.one.metric, task.one.score, task.other.score
        better = sum(flip.change > 0 for flip in task.flips)
        worse = sum(flip.change < 0 for flip in task.flips)
        rows.append((*scores, d.value, interval, d.p, better, worse))
    columns = ["task", "metric", "A %", "B %", "B - A", "95 %", "p", "better", "worse"]
    print_table(f"A: {one}, B: {other}", columns, rows)
    for task in comparisons:
        for flip in task.flips[:_SHOWN]:
            click.echo(f"\n{task.one.task}, example {flip.number}: {flip.inputs}")
            click.echo(f"  right: {flip.right}\n  A: {flip.one}\n  B: {flip.other}")
    if alone:
        click.echo(f"\nonly one of them has: {', '.join(alone)}")


@click.command()
@click.argument("checkpoint", type=MODEL)
@click.argument("texts", nargs=-1)
@click.option("--max_length", type=COUNT, default=64, show_default=True)
@with_decoding
@click.option("--chat", is_flag=True, help="Each text is a message, in the tokenizer's template.")
@click.option("--vocabulary", help=f"{VOCABULARY} By default the checkpoint's own.")
@with_mesh
def generate(
    checkpoint: Path,
    texts: tuple[str, ...],
    max_length: int,
    chat: bool,
    vocabulary: str | None,
    fsdp: int,
    model: int,
    **settings: float,
) -> None:
    """What a checkpoint writes after each text, or line of the standard input.

    On a terminal without texts it is a chat: what you say is answered, Ctrl-D ends it. By a chat
    template (--chat) a model reads all that was said before, without one the last line alone.
    """
    import jax
    import numpy as np

    from m2l import models, partitioning
    from m2l.data import layouts, vocabularies
    from m2l.data.examples import GenerationExample
    from m2l.evaluation import generation
    from m2l.evaluation.decoding import Decoding
    from m2l.evaluation.model import load

    decoding = Decoding(**settings)
    opened = load(checkpoint, vocabulary)
    name = vocabulary or opened.vocabulary["name"]
    name = f"chat:{name}" if chat and "chat" not in split_name(name)[0] else name
    loaded = vocabularies.load(name)
    if vocabularies.describe(loaded, name)["fingerprint"] != opened.vocabulary["fingerprint"]:
        raise DataError(f"vocabulary {name!r} is not the one that the model reads")
    mesh = partitioning.make_mesh(fsdp=fsdp, model=model)
    nothing = np.empty(0, np.int32)
    with jax.set_mesh(mesh):
        params = opened.read(partitioning.shardings(models.spec(opened.config), mesh))

        def answers(prompts: Sequence[Sequence[int]]) -> list[list[str]]:
            """Returns what the model writes after each prompt's ids."""
            decoded = generation.decode(
                opened.config,
                params,
                [
                    GenerationExample(np.array(ids, np.int32), nothing, (), "", "", False)
                    for ids in prompts
                ],
                decoding,
                max_length=max_length,
                layout=layouts.of(opened.config, loaded),
                eos_id=loaded.eos_id,
                batch_size=min(8, max(1, len(prompts))),
            )
            texts = vocabularies.continuing(loaded)
            return [[texts.decode(ids.tolist()) for ids in samples] for samples in decoded]

        if not texts and sys.stdin.isatty():
            _chat(lambda turns: answers([loaded.encode_turns(turns)])[0])
            return
        texts = texts or tuple(line for line in sys.stdin.read().splitlines() if line.strip())
        for text, samples in zip(texts, answers(loaded.encode_all(texts)), strict=True):
            click.echo(text)
            for sample in samples:
                click.echo(f"> {sample or '(empty)'}")


def _chat(answers: Callable[[Sequence[str]], Sequence[str]]) -> None:
    """Answers what is typed until the input ends; the first answer stays in the conversation."""
    click.echo("m2l: say something; Ctrl-D ends", err=True)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (by which lines can be edited)
    turns: list[str] = []
    while True:
        try:
            text = input("you> ")
        except EOFError:
            click.echo()
            return
        if not text.strip():
            continue
        samples = answers([*turns, text])
        turns += [text, samples[0]]
        for sample in samples:
            click.echo(sample or "(empty)")


@click.command(
    "lm_eval",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "token_normalize_func": None},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Score a checkpoint, or a merge in memory, on tasks of lm-evaluation-harness.

    ARGUMENTS are those of its own command, lm_eval, in which --model m2l is known, and is the
    default: --model_args checkpoint=MODEL, or expert=MODEL+MODEL,base=MODEL,recipe=FILE.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ConfigError(
            "lm-evaluation-harness is not installed: pip install 'm2l[lm_eval]'"
        ) from error
    from m2l import lm_eval_model  # noqa: F401  Importing registers the model.

    runs = arguments[:1] not in (("ls",), ("validate",), ("run",)) and "--model" not in arguments
    own = sys.argv
    sys.argv = ["lm_eval", *(("run", "--model", "m2l") if runs else ()), *arguments]
    try:
        cli_evaluate()
    except ValueError as error:  # What its own command refuses.
        raise ConfigError(f"m2l lm_eval: {reason(error)}") from error
    finally:
        sys.argv = own

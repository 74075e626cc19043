"""A model on a set of tasks: one JSON result for each, written as soon as it is known."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import m2l
from m2l import files
from m2l.data import layouts
from m2l.data.examples import (
    GenerationExample,
    RankingExample,
    generation_examples,
    ranking_examples,
)
from m2l.data.prompts import TaskInfo
from m2l.errors import ConfigError, DataError, EvaluationError, UnknownNameError
from m2l.evaluation import generation, likelihood, metrics, ranking
from m2l.progress import Progress

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's examples, tokenised once and used for every model.

    Attributes:
        info: What the task is.
        examples: RankingExamples of a task with answer choices, GenerationExamples of others.
        max_length: Tokens that may be generated.
        digest: sha256 of everything that decides a score: tokens, choices, answers, metrics,
            and for free text what its score is and, decoding, how many tokens there may be.
        generative_score: Of metrics.GENERATIVE_SCORES, what stands for a task in free text.
    """

    info: TaskInfo
    examples: Sequence[RankingExample] | Sequence[GenerationExample]
    max_length: int
    digest: str
    generative_score: str = "decoding"

    @property
    def decoded(self) -> bool:
        """Whether the model has to write answers."""
        return self.info.kind == "generate" and self.generative_score == "decoding"

    @property
    def metric(self) -> str:
        """What stands for the task: its own headline metric, or "reference_likelihood"."""
        ranked = self.info.kind == "rank"
        return self.info.metric if ranked or self.decoded else "reference_likelihood"


@dataclasses.dataclass(frozen=True)
class Result:
    """One model's result on one task, as it stands in its JSON file.

    Attributes:
        metric: The headline metric, of the task's own or "reference_likelihood".
        score: The figure that stands for the task, in percent: the headline metric's.
        metrics: All figures of the task, in percent.
        count: Examples evaluated.
        ties: Examples whose best score was shared by several choices.
        truncated: Examples that lost tokens to the length limits.
        seconds: Time spent on the model's scores or decodings, data and metrics apart.
    """

    task: str
    dataset: str
    category: str
    held_out: bool
    kind: str
    metric: str
    score: float
    metrics: Mapping[str, float]
    count: int
    ties: int
    truncated: int
    seconds: float
    model_digest: str
    task_digest: str
    m2l_version: str = m2l.__version__
    format_version: int = FORMAT_VERSION


def load_tasks(
    infos: Iterable[TaskInfo],
    *,
    split: str,
    lengths: Mapping[str, int],
    max_examples: int | None = None,
    generative_score: str = "decoding",
) -> list[TaskData]:
    """Reads and tokenises the tasks' examples.

    Args:
        infos: The tasks.
        split: "validation" or another split that every task has.
        lengths: Tokens kept of "inputs" and "targets".
        max_examples: How many examples of each task, from its first; None takes all.
        generative_score: "decoding": a task in free text is decoded, and stands by its headline
            metric; the likelihood of its references is a figure beside it. "likelihood": that is
            its score, and nothing is decoded.

    Raises:
        UnknownNameError: there is no such generative_score.
        DataError: a task has no such split, or no examples in it that can be used.
    """
    if generative_score not in metrics.GENERATIVE_SCORES:
        raise UnknownNameError("generative_score", generative_score, metrics.GENERATIVE_SCORES)
    infos, loaded, max_length = list(infos), [], lengths["targets"]
    with Progress("read tasks", len(infos), "tasks") as progress:
        for info in infos:
            read = ranking_examples if info.kind == "rank" else generation_examples
            examples = read(info.name, split, lengths=lengths, max_examples=max_examples)
            if not examples:
                raise DataError(f"task {info.name}: its split {split!r} has no examples")
            digest = _digest(info, max_length, generative_score, examples)
            loaded.append(TaskData(info, examples, max_length, digest, generative_score))
            progress.update(len(loaded))
    return loaded


def _digest(info: TaskInfo, max_length: int, generative_score: str, examples: Sequence[Any]) -> str:
    generated = info.kind == "generate"
    decoded = generated and generative_score == "decoding"
    decided_by = [info.kind, info.metrics, max_length if decoded else None]
    decided_by += [generative_score] if generated else []
    digest = hashlib.sha256(json.dumps(decided_by).encode())
    for example in examples:
        if isinstance(example, RankingExample):
            answer = [[choice.tolist() for choice in example.choices], list(example.is_correct)]
        else:
            answer = [example.target.tolist(), example.reference]
        digest.update(json.dumps([example.inputs.tolist(), answer]).encode())
    return digest.hexdigest()


def read_result(path: Path) -> Result:
    """A result from its file.

    Raises:
        EvaluationError: the file is not a result, or one of another version.
    """
    try:
        fields = json.loads(Path(path).read_text())
        if fields["format_version"] != FORMAT_VERSION:
            raise EvaluationError(
                f"{path}: result format {fields['format_version']}, this m2l reads "
                f"{FORMAT_VERSION}; delete it and evaluate again"
            )
        return Result(**fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: not a result of `m2l eval` ({error})") from error


def _finished(path: Path, model_digest: str, task: TaskData) -> Result | None:
    """The result already there, if it is of this model and these examples."""
    if not path.exists():
        return None
    held = read_result(path)
    if held.model_digest != model_digest:
        raise EvaluationError(
            f"{path} is the result of another model ({held.model_digest[:12]}, this one is "
            f"{model_digest[:12]}); choose another --out, or delete it"
        )
    if held.metric != task.metric:
        raise EvaluationError(
            f"{path} holds the score {held.metric}, not {task.metric}; evaluate with the same "
            "--generative_score, choose another --out, or delete it"
        )
    if held.task_digest != task.digest:
        raise EvaluationError(
            f"{path} is the result of other examples or settings ({held.count} examples then, "
            f"{len(task.examples)} now); choose another --out, or delete it"
        )
    return held if held.m2l_version == m2l.__version__ else None


def evaluate(
    config: Any,
    params: Any,
    tasks: Sequence[TaskData],
    out: Path,
    *,
    vocabulary: Any,
    model_digest: str,
    batch_size: int = 32,
    dtype: str = "float32",
    description: str = "evaluate",
) -> list[Result]:
    """Evaluates a model on tasks; a task whose result is already there is not computed again.

    Args:
        config: The model's configuration.
        params: Its parameters.
        tasks: What to evaluate it on, as `load_tasks` gives it.
        out: Where `TASK.json` files go; made if need be.
        vocabulary: The seqio vocabulary, to read what the model generates.
        model_digest: The digest of the model's manifest; results of another model are refused.
        batch_size: Examples in a batch.
        dtype: The dtype to compute in.
        description: What the progress bar calls it.

    Returns:
        A result for each task, in their order.
    """
    out = Path(out)
    for record in ("run.json", "study.json", "manifest.json"):
        if (out / record).exists():
            raise ConfigError(f"{out} holds something else ({record}); choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    results = []
    with Progress(description, sum(len(t.examples) for t in tasks), "examples") as progress:
        done = 0

        def on_done(count: int) -> None:
            nonlocal done
            done += count
            progress.update(done)

        for task in tasks:
            path = out / f"{task.info.name}.json"
            result = _finished(path, model_digest, task)
            if result is None:
                figures, ties, seconds = _figures(
                    config, params, task, vocabulary, batch_size, dtype, on_done
                )
                result = Result(
                    task=task.info.name,
                    dataset=task.info.dataset,
                    category=task.info.category,
                    held_out=task.info.held_out,
                    kind=task.info.kind,
                    metric=task.metric,
                    score=figures[metrics.HEADLINE[task.metric]],
                    metrics=figures,
                    count=len(task.examples),
                    ties=ties,
                    truncated=sum(example.truncated for example in task.examples),
                    seconds=seconds,
                    model_digest=model_digest,
                    task_digest=task.digest,
                )
                files.write(path, json.dumps(dataclasses.asdict(result), indent=1) + "\n")
            else:
                on_done(len(task.examples))
            results.append(result)
    return results


def _figures(
    config: Any,
    params: Any,
    task: TaskData,
    vocabulary: Any,
    batch_size: int,
    dtype: str,
    on_done: Any,
) -> tuple[dict[str, float], int, float]:
    """A task's metrics, its ties, and the seconds that the model took."""
    start = time.monotonic()
    name, examples = task.info.name, task.examples
    layout = layouts.of(config, vocabulary)
    how = {"layout": layout, "batch_size": batch_size, "dtype": dtype}
    # Scoring references is short beside decoding, which then tells of its progress alone.
    told = {} if task.decoded else {"on_done": on_done}
    scores = ranking.score_examples(config, params, examples, **how, **told)
    seconds = time.monotonic() - start
    if task.info.kind == "rank":
        ranked = ranking.rank(name, examples, scores, metrics=task.info.metrics)
        return dict(ranked.figures), ranked.ties, seconds
    reference_likelihood = likelihood.reference_likelihood(name, examples, scores)
    figures = {"reference_likelihood": reference_likelihood}
    if not task.decoded:
        return figures, 0, seconds
    ending = {"max_length": task.max_length, "eos_id": vocabulary.eos_id}
    decoded = generation.greedy(config, params, examples, on_done=on_done, **ending, **how)
    seconds = time.monotonic() - start
    texts = [vocabulary.decode(tokens.tolist()).strip() for tokens in decoded]
    references = [example.reference for example in examples]
    for metric in task.info.metrics:
        figures |= metrics.metric(metric)(references, texts)
    return figures, 0, seconds

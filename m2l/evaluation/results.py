"""Results: a JSON file for each task, every example on request, and what follows from them.

Normalised performance is a model's scores in units of a reference model's. Source: "What Matters
for Model Merging at Scale?", section 3. Held-in tasks are divided by the task's own expert,
held-out tasks by the base model; then the mean over the datasets of a category, over categories,
and (by the caller) over seeds.
"""

import dataclasses
import gzip
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NoReturn

import numpy as np

from m2l import files, storage
from m2l.errors import EvaluationError
from m2l.evaluation import bootstrap, metrics
from m2l.evaluation.task_data import TaskData
from m2l.typing import Json, JsonObject
from m2l.version import __version__

FORMAT_VERSION = 3
_WITHOUT_CHECKSUM = (2,)
USUAL_DTYPE = "float32"
"""What results that name no dtype in their settings were computed in."""
EXAMPLES = ".examples.jsonl.gz"
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Result:
    """One model's result on one task, as its JSON file has it.

    Attributes:
        metric: The headline metric, of the task's own or "reference_likelihood".
        score: The headline metric's figure, in percent.
        metrics: All figures of the task, in percent.
        count: Examples evaluated.
        ties: Examples whose best score was shared by several choices.
        truncated: Examples that lost tokens to the length limits.
        seconds: Time spent on the model's scores or decodings, without data and metrics.
        interval: That of 95 % confidence of `score`, by a bootstrap over the examples; None for
            BLEU, which is expensive to compute so often.
        tokens: Tokens that the model scored or read, without padding and without what it wrote.
        padding: The share of padding in what it read.
        values: Each example's part of the score, where they were asked for: those of two models on
            the same examples can be paired. None for BLEU, which has none.
        settings: What else decided the figures, where it is not usual: the dtype that the network
            computed in, how metrics split texts of other scripts, the date that a chat template
            has, whether a space is between inputs and targets.
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
    interval: Sequence[float] | None = None
    tokens: int = 0
    padding: float = 0.0
    values: Sequence[float] | None = None
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    m2l_version: str = __version__
    format_version: int = FORMAT_VERSION


def result_path(out: Path, task: str) -> Path:
    """Returns the file of a task's result."""
    return out / f"{task}.json"


def write_result(out: Path, result: Result) -> None:
    """Writes a result under its task's name, whole or not at all."""
    files.write_record(result_path(out, result.task), dataclasses.asdict(result))


def read_result(path: Path) -> Result:
    """Reads a result from its file.

    Raises:
        EvaluationError: the file is not a result, damaged, or one of another version.
    """
    options = {
        "finite": True,
        "error": EvaluationError,
        "advice": "delete it and evaluate again",
    }
    version = files.read_json(path, kind=dict, **options).get("format_version")
    fields = files.read_record(path, required=version == FORMAT_VERSION, **options)
    return checked_result(fields, path)


def checked_result(fields: Mapping[str, Json], source: object) -> Result:
    """Returns the result of fields that were read back; checks each of them.

    Args:
        fields: From `dataclasses.asdict`.
        source: The file, for the message.

    Raises:
        EvaluationError: a field is missing, unknown, of another type or out of range, or they
            contradict each other; or they are of another version.
    """

    def refuse(problem: str) -> NoReturn:
        message = f"{source}: not a result of `m2l eval`: {problem}; delete it and evaluate again"
        raise EvaluationError(message)

    version = fields.get("format_version")
    if type(version) is not int:
        refuse("it has no format_version")
    if version not in (*_WITHOUT_CHECKSUM, FORMAT_VERSION):
        raise EvaluationError(
            f"{source}: result format {version}, this m2l reads {FORMAT_VERSION}; delete it and "
            "evaluate again"
        )
    # Older results have none.
    fields = {"settings": {}, **fields}
    known = {field.name: field for field in dataclasses.fields(Result)}
    for name in fields:
        if name not in known:
            refuse(f"unknown field {name!r:.80}")
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING:
            refuse(f"{name} is missing")
        value = fields.get(name, field.default)
        if field.type in (str, bool, int) and type(value) is not field.type:
            refuse(f"{name} is {value!r:.80}, expected {field.type.__name__}")
        if field.type is float and not _is_finite(value):
            refuse(f"{name} is {value!r:.80}, expected a finite number")
    result = Result(**fields)
    shown = metrics.HEADLINE.get(result.metric)
    figures, interval, count = result.metrics, result.interval, result.count
    if not isinstance(figures, Mapping) or not all(map(_is_finite, figures.values())):
        refuse(f"metrics is {figures!r:.80}, expected finite numbers by name")
    if interval is not None and not (
        isinstance(interval, list)
        and len(interval) == 2
        and all(map(_is_finite, interval))
        and interval[0] <= interval[1]
    ):
        refuse(f"interval is {interval!r:.80}, expected two numbers in order")
    if result.values is not None and not (
        isinstance(result.values, list)
        and len(result.values) == count
        and all(map(_is_finite, result.values))
    ):
        refuse(f"values is {result.values!r:.80}, expected a number for each example")
    if shown is None or figures.get(shown) != result.score:
        refuse(f"score is {result.score}, but metrics does not have it for {result.metric!r:.80}")
    for name, least, most in (
        ("score", -_ROUNDING, 100 + _ROUNDING),
        ("count", 1, math.inf),
        ("ties", 0, count),
        ("truncated", 0, count),
        ("seconds", 0, math.inf),
        ("tokens", 0, math.inf),
        ("padding", 0, 1),
    ):
        if not least <= getattr(result, name) <= most:
            refuse(f"{name} is {getattr(result, name)!r:.80}, which is out of range")
    return result


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def read_results(directory: Path) -> dict[str, Result]:
    """Reads the results in a folder of `m2l eval`, by task.

    Raises:
        EvaluationError: there are none, or one is damaged or of another version.
    """
    results = [read_result(path) for path in sorted(storage.path(directory).glob("*.json"))]
    if not results:
        raise EvaluationError(f"{directory}: no results of `m2l eval`")
    return {result.task: result for result in results}


def finished(
    out: Path, model_digest: str, task: TaskData, examples: bool, dtype: str = USUAL_DTYPE
) -> Result | None:
    """Returns the result already there, if it is of this model and these examples.

    Args:
        examples: Whether its examples have to be there as well.
        dtype: What it was computed in.

    Raises:
        EvaluationError: what is there is the result of another model, of other examples, by
            another score or in another dtype, or none.
    """
    path = result_path(out, task.info.name)
    if not path.exists():
        return None
    result = read_result(path)
    if result.model_digest != model_digest:
        raise EvaluationError(
            f"{path} is the result of another model ({result.model_digest[:12]}, this one is "
            f"{model_digest[:12]}); choose another --out, or delete it"
        )
    if result.metric != task.metric:
        raise EvaluationError(
            f"{path} holds the score {result.metric}, not {task.metric}; evaluate with the same "
            "--generative_score, choose another --out, or delete it"
        )
    if (stored := result.settings.get("dtype", USUAL_DTYPE)) != dtype:
        raise EvaluationError(
            f"{path} was computed in {stored}, not {dtype}; evaluate with --dtype {stored}, choose "
            "another --out, or delete it"
        )
    if result.task_digest != task.digest:
        raise EvaluationError(
            f"{path} is the result of other examples or settings ({result.count} examples then, "
            f"{len(task.examples)} now); choose another --out, or delete it"
        )
    if examples and not (out / (task.info.name + EXAMPLES)).exists():
        return None
    return result if result.m2l_version == __version__ else None


def write_examples(out: Path, task: str, lines: Sequence[Mapping[str, Json]]) -> None:
    """Writes what became of each example as compressed JSON lines, whole or not at all."""
    path = out / (task + EXAMPLES)
    packed = io.BytesIO()
    # No time and no name in it: the same examples give the same bytes.
    with gzip.GzipFile("", "wb", fileobj=packed, mtime=0) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    storage.write_atomic(path, packed.getvalue())


def read_examples(out: Path, task: str) -> list[JsonObject]:
    """Reads what `write_examples` wrote.

    Raises:
        EvaluationError: it is missing or damaged.
    """
    path = out / (task + EXAMPLES)
    try:
        with path.open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as file:
            return [
                files.parse_json(line, f"{path}:{number}", kind=dict, error=EvaluationError)
                for number, line in enumerate(file, start=1)
            ]
    except FileNotFoundError as error:
        raise EvaluationError(f"{path} is missing; m2l eval --examples writes it") from error
    except (OSError, EOFError, ValueError) as error:
        raise EvaluationError(f"{path}: damaged ({error}); delete it and evaluate again") from error


@dataclasses.dataclass(frozen=True)
class OverPrompts:
    """How a model's score on a dataset depends on the prompt, in percent.

    Attributes:
        dataset: The dataset.
        category: Its task category.
        metric: What scores these prompts; others of the dataset may be scored by another.
        prompts: How many of its prompts were evaluated.
        mean, median: Over the prompts; T0's paper reports the median.
        quartiles: The lower and the upper one, interpolated linearly as NumPy does: their distance
            is the spread that T0's paper shows.
        worst, best: The task with the lowest and the highest score, and this score.
        interval: That of 95 % confidence of the mean over such prompts: the bootstrap draws
            prompts, so that one prompt has no width.
    """

    dataset: str
    category: str
    metric: str
    prompts: int
    mean: float
    median: float
    quartiles: tuple[float, float]
    worst: tuple[str, float]
    best: tuple[str, float]
    interval: tuple[float, float]


def over_prompts(results: Iterable[Result]) -> list[OverPrompts]:
    """Returns a row for each dataset and metric, in their order."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.dataset, result.metric].append(result)
    return [_over_prompts(group) for group in groups.values()]


def _over_prompts(results: Sequence[Result]) -> OverPrompts:
    ordered = sorted(results, key=lambda result: result.score)
    scores = np.array([result.score for result in results])
    low, median, high = np.quantile(scores, [0.25, 0.5, 0.75])
    interval = bootstrap.interval([lambda drawn: float(scores[drawn].mean())], [len(scores)])
    return OverPrompts(
        dataset=results[0].dataset,
        category=results[0].category,
        metric=results[0].metric,
        prompts=len(results),
        mean=fmean(scores),
        median=float(median),
        quartiles=(float(low), float(high)),
        worst=(ordered[0].task, ordered[0].score),
        best=(ordered[-1].task, ordered[-1].score),
        interval=tuple(interval),
    )


def over_categories(rows: Iterable[OverPrompts]) -> dict[tuple[str, str], float]:
    """Computes the mean over datasets of the mean over their prompts, by category and metric.

    Source: "What Matters for Model Merging at Scale?", section 3; what it reports is this in units
    of a reference, `normalized`, and the mean over categories.
    """
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        groups[row.category, row.metric].append(row.mean)
    return {group: fmean(means) for group, means in groups.items()}


def dataset_scores(results: Iterable[Result]) -> dict[str, float]:
    """Computes the mean score over each dataset's prompts, in percent."""
    by_dataset = defaultdict(list)
    for result in results:
        by_dataset[result.dataset].append(result.score)
    return {dataset: fmean(scores) for dataset, scores in by_dataset.items()}


def ratios(
    results: Iterable[Result], reference: Mapping[str, Result]
) -> dict[tuple[str, str], float]:
    """Computes the score over the reference's score, by category and dataset.

    Args:
        results: The model's results, one for each task.
        reference: By task name, the results that count as 1.0: at least those of `results`.

    Returns:
        1.0 where the model does as well as the reference; NaN where the reference scores 0.

    Raises:
        EvaluationError: there are no results; a task lacks its reference; the reference was scored
            by another metric or on other examples.
    """
    results = list(results)
    if not results:
        raise EvaluationError("normalised performance of no results at all")
    for result in results:
        expected = reference.get(result.task)
        if expected is None:
            raise EvaluationError(f"{result.task}: the reference model has no result on it")
        if expected.metric != result.metric:
            raise EvaluationError(
                f"{result.task}: its score is {result.metric} and the reference's is "
                f"{expected.metric}; evaluate both with the same --generative_score"
            )
        if expected.task_digest != result.task_digest:
            raise EvaluationError(
                f"{result.task}: the reference was scored on other examples "
                f"({expected.task_digest[:12]}, not {result.task_digest[:12]}); evaluate both anew"
            )
    category_of = {result.dataset: result.category for result in results}
    ones = dataset_scores(reference[result.task] for result in results)
    return {
        (category_of[dataset], dataset): score / ones[dataset] if ones[dataset] else math.nan
        for dataset, score in dataset_scores(results).items()
    }


def defined_ratios(
    results: Iterable[Result], reference: Mapping[str, Result]
) -> dict[tuple[str, str], float]:
    """Computes `ratios`, without the datasets on which the reference scores 0.

    All models that are compared by the same reference are compared on the same datasets.

    Args and errors are those of `ratios`; another error is that no dataset is left.
    """
    defined = {key: v for key, v in ratios(results, reference).items() if not math.isnan(v)}
    if not defined:
        raise EvaluationError(
            "normalised performance: the reference scores 0 on every task; take more examples"
        )
    return defined


def normalized(results: Iterable[Result], reference: Mapping[str, Result]) -> float:
    """Computes the mean of `defined_ratios` over a category's datasets, then categories.

    Args and errors are those of `defined_ratios`.
    """
    by_category = defaultdict(list)
    for (category, _), ratio in defined_ratios(results, reference).items():
        by_category[category].append(ratio)
    return fmean(map(fmean, by_category.values()))


@dataclasses.dataclass(frozen=True)
class Flip:
    """An example that the two models do not answer alike.

    Attributes:
        number: Its number in the task, from 0.
        inputs: What the models read.
        right: The right answer.
        one, other: What each of them answers; with free text that is not decoded, the probability
            of a token of the reference.
        change: How much more the example adds to the second model's score; 0 where it cannot be
            said of one example (BLEU).
    """

    number: int
    inputs: str
    right: str
    one: str
    other: str
    change: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two results on one task, the examples that are answered differently, largest change first."""

    one: Result
    other: Result
    difference: bootstrap.Difference
    flips: Sequence[Flip]


def compare(one: Path, other: Path) -> tuple[list[Comparison], list[str]]:
    """Compares two folders of `m2l eval --examples`.

    Returns:
        A comparison of each task that both have, and the names of the tasks that only one has.

    Raises:
        EvaluationError: they have no task in common; one was scored on other examples or by another
            metric; results or examples are missing or damaged.
    """
    one_results, other_results = read_results(one), read_results(other)
    both = [task for task in one_results if task in other_results]
    if not both:
        raise EvaluationError(f"{one} and {other} have no task in common")
    comparisons = []
    for task in both:
        first, second = one_results[task], other_results[task]
        if (first.metric, first.task_digest) != (second.metric, second.task_digest):
            raise EvaluationError(
                f"{task}: {one} and {other} were scored on other examples or by another score "
                f"({first.metric} on {first.count}, {second.metric} on {second.count}); evaluate "
                "both anew"
            )
        lines = read_examples(one, task), read_examples(other, task)
        for folder, result, examples in zip((one, other), (first, second), lines, strict=True):
            if len(examples) != result.count:
                raise EvaluationError(
                    f"{folder}: {task} has {result.count} examples, but {len(examples)} are there"
                )
        statistics = ([bootstrap.statistic(first.metric, examples)] for examples in lines)
        draws = bootstrap.draws_of(first.metric)
        difference = bootstrap.paired(*statistics, [first.count], draws=draws)
        comparisons.append(Comparison(first, second, difference, flips(*lines)))
    return comparisons, sorted(set(one_results) ^ set(other_results))


def flips(one: Sequence[JsonObject], other: Sequence[JsonObject]) -> list[Flip]:
    """Returns the examples that two models answer differently, largest change of score first."""
    result = []
    for number, (first, second) in enumerate(zip(one, other, strict=True)):
        answers = _answer(first), _answer(second)
        if answers[0] != answers[1]:
            known = first["value"] is not None
            change = second["value"] - first["value"] if known else 0.0
            right = first["choices"][first["right"]] if "choices" in first else None
            right = first["references"][0] if right is None else right
            result.append(Flip(number, first["inputs"], right, *answers, change))
    return sorted(result, key=lambda flip: -abs(flip.change))


def _answer(line: JsonObject) -> str:
    if "choices" in line:
        return " = ".join(line["choices"][place] for place in line["taken"])
    if "prediction" in line:
        return line["prediction"]
    if "predictions" in line:
        return " | ".join(line["predictions"])
    return f"log p {line['value']:.2f} a token"

"""What an evaluation leaves behind: a JSON file for each task, and on request every example."""

import dataclasses
import gzip
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import m2l
from m2l import files, storage
from m2l.errors import EvaluationError
from m2l.evaluation import metrics
from m2l.evaluation.task_data import TaskData

FORMAT_VERSION = 3
_WITHOUT_CHECKSUM = (2,)
EXAMPLES = ".examples.jsonl.gz"
_ROUNDING = 1e-6


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
        interval: Where `score` lies with 95 % confidence, by a bootstrap over the examples; None
            for BLEU, which is dear to compute so often.
        tokens: Tokens that the model scored or read, without padding and without what it wrote.
        padding: The share of padding beside them.
        settings: What else decided the figures, where it is not as everywhere: how metrics split
            texts of other scripts, the date that a chat template was told, whether a space stands
            between inputs and targets.
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
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    m2l_version: str = m2l.__version__
    format_version: int = FORMAT_VERSION


def path_of(out: Path, task: str) -> Path:
    """The file of a task's result."""
    return out / f"{task}.json"


def write_result(out: Path, result: Result) -> None:
    """Writes a result under its task's name, whole or not at all."""
    files.write_record(path_of(out, result.task), dataclasses.asdict(result))


def read_result(path: Path) -> Result:
    """A result from its file.

    Raises:
        EvaluationError: the file is not a result, damaged, or one of another version.
    """
    again = "delete it and evaluate again"
    how = {"finite": True, "error": EvaluationError, "advice": again}
    version = files.read_json(path, kind=dict, **how).get("format_version")
    fields = files.read_record(path, required=version == FORMAT_VERSION, **how)
    return checked_result(fields, path)


def checked_result(fields: Mapping[str, Any], where: object) -> Result:
    """Returns the result of fields that were read back, once each of them can be believed.

    Args:
        fields: As `dataclasses.asdict` gave them.
        where: The file, for the message.

    Raises:
        EvaluationError: a field is missing, unknown, of another type or out of range, or they
            contradict each other; or they are of another version.
    """

    def refuse(problem: str) -> NoReturn:
        message = f"{where}: not a result of `m2l eval`: {problem}; delete it and evaluate again"
        raise EvaluationError(message)

    version = fields.get("format_version")
    if type(version) is not int:
        refuse("it has no format_version")
    if version not in (*_WITHOUT_CHECKSUM, FORMAT_VERSION):
        raise EvaluationError(
            f"{where}: result format {version}, this m2l reads {FORMAT_VERSION}; delete it and "
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


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def read_results(directory: Path) -> dict[str, Result]:
    """By task, the results in a folder of `m2l eval`.

    Raises:
        EvaluationError: there are none, or one is damaged or of another version.
    """
    found = [read_result(path) for path in sorted(storage.path(directory).glob("*.json"))]
    if not found:
        raise EvaluationError(f"{directory}: no results of `m2l eval`")
    return {result.task: result for result in found}


def finished(out: Path, model_digest: str, task: TaskData, examples: bool) -> Result | None:
    """The result already there, if it is of this model and these examples.

    Args:
        examples: Whether its examples have to be there as well.

    Raises:
        EvaluationError: what is there is the result of another model, of other examples or by
            another score, or none.
    """
    path = path_of(out, task.info.name)
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
    if examples and not (out / (task.info.name + EXAMPLES)).exists():
        return None
    return held if held.m2l_version == m2l.__version__ else None


def write_examples(out: Path, task: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes what became of each example as compressed JSON lines, whole or not at all."""
    path = out / (task + EXAMPLES)
    packed = io.BytesIO()
    # No time and no name in it: the same examples give the same bytes.
    with gzip.GzipFile("", "wb", fileobj=packed, mtime=0) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    storage.write_atomic(path, packed.getvalue())


def read_examples(out: Path, task: str) -> list[dict[str, Any]]:
    """What `write_examples` wrote.

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

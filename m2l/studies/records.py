"""What a study found: its results, recipes and choices, from its folder or as it was published."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from m2l import files, models, storage
from m2l.errors import DataError, EvaluationError, UnknownNameError
from m2l.evaluation.results import Result, checked_result, read_result
from m2l.studies import execute, scaling, skills
from m2l.studies.plan import Plan
from m2l.studies.scaling import ScalingStudy
from m2l.studies.skills import SkillsStudy
from m2l.studies.stages import RECIPES

RESULTS = "results.parquet"
RECORDS = "records.json"
_RECORDED = ("recipes", "choices", "seconds")
_AGAIN = "publish the study again: m2l report --publish"
_KINDS = {"scaling": scaling, "skills": skills}

Study = ScalingStudy | SkillsStudy


@dataclasses.dataclass(frozen=True)
class Records:
    """A finished study.

    Attributes:
        study: Its settings.
        results: By the name of a model, by task, its results.
        recipes: By the name of a merged model, its recipe as chosen.
        choices: By the stage that chose, by method, the points of the sweep, and the chosen one.
        seconds: By stage, how long it took.
    """

    study: Study
    results: Mapping[str, Mapping[str, Result]]
    recipes: Mapping[str, Mapping[str, Any]]
    choices: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]

    def of(self, model: str, categories: Iterable[str] | None = None) -> list[Result]:
        """A model's results, on the tasks of these categories alone.

        Raises:
            EvaluationError: there are none.
        """
        wanted = None if categories is None else set(categories)
        found = [
            result
            for result in self.results.get(model, {}).values()
            if wanted is None or result.category in wanted
        ]
        if not found:
            raise EvaluationError(f"the study has no results of {model} on these tasks")
        return found

    def parameters(self, size: str) -> int:
        """How many parameters the models of a size have."""
        return models.parameters(self.study.models[size])


def _kind(study: Study) -> str:
    return "scaling" if isinstance(study, ScalingStudy) else "skills"


def describe(study: Study) -> dict[str, Any]:
    """A study's settings as its folder keeps them, its kind first."""
    kind = _kind(study)
    return {"kind": kind, **_KINDS[kind].to_dict(study)}


def plan(study: Study) -> Plan:
    """The stages of a study of any kind."""
    return _KINDS[_kind(study)].plan(study)


def check_mixtures(study: Study) -> None:
    """Refuses names that nothing answers to; errors are those of the kind's own."""
    _KINDS[_kind(study)].check_mixtures(study)


def read_study(out: Path) -> Study:
    """The settings of the study in `out`.

    Raises:
        DataError: `out` holds no study.
        UnknownNameError: it holds a study of a kind that is not known.
    """
    record = storage.path(out) / "study.json"
    if not record.exists():
        raise DataError(f"{out}: holds no study (study.json is missing); run `m2l study` first")
    fields = files.read_record(record, required=False, finite=True)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UnknownNameError(f"kind of study in {record}:", str(kind), _KINDS)
    try:
        return _KINDS[kind].from_dict(fields)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{record}: damaged, not the settings of a study ({error!r})") from error


def load(out: Path) -> Records:
    """Everything that a study found, from its own folder or a published one.

    Raises:
        DataError: `out` holds no study, or one that is not finished.
    """
    out = storage.path(out)
    study = read_study(out)
    records = _published(study, out) if (out / RESULTS).exists() else _collected(study, out)
    _check_alike(records.results, out)
    return records


def _check_alike(results: Mapping[str, Mapping[str, Result]], out: Path) -> None:
    """Refuses results of models that were not all evaluated on the same examples.

    Raises:
        EvaluationError: naming the first model and task whose result is another's, of other
            examples than other models', or missing.
    """
    tasks: dict[str, tuple[Any, ...]] = {}
    by_category: dict[str, set[str]] = {}
    for model, scored in results.items():
        categories: dict[str, set[str]] = {}
        for task, result in scored.items():
            categories.setdefault(result.category, set()).add(task)
            examples = (result.task_digest, result.count, result.metric, result.kind)
            described = (*examples, result.dataset, result.category, result.held_out)
            if result.task != task:
                raise EvaluationError(f"{out}: {model}: the result of {task} is {result.task}'s")
            if tasks.setdefault(task, described) != described:
                raise EvaluationError(
                    f"{out}: {model}: its result of {task} is of other examples or by another "
                    "score than other models'"
                )
        if len({result.model_digest for result in scored.values()}) > 1:
            raise EvaluationError(f"{out}: {model}: its results are of several models")
        for category, names in categories.items():
            if missing := by_category.setdefault(category, names) ^ names:
                raise EvaluationError(
                    f"{out}: {model}: {min(missing)} of {category} was not evaluated on all models"
                )


def _collected(study: Study, out: Path) -> Records:
    stages = plan(study)
    left = [stage.name for stage in stages if execute.state(stages, out, stage.name) != "done"]
    if left:
        raise DataError(
            f"{out}: {len(left)} of {len(stages)} stages are not done, {left[0]} is the first; "
            "`m2l study` goes on with them"
        )
    results: dict[str, dict[str, Result]] = {}
    recipes, choices = {}, {}
    for stage in stages:
        execute.check_results(stages, out, stage.name)
        folder = execute.folder(out, stage.name)
        model = stage.name.removeprefix("results/")
        if stage.kind == "evaluate":
            results[model] = _read(folder)
        elif stage.kind == "merge":
            for name, recipe in files.read_json(folder / RECIPES, kind=dict).items():
                results[f"{model}/{name}"] = _read(folder / name)
                recipes[f"{model}/{name}"] = recipe
        elif stage.kind == "choose":
            choices[stage.name] = {
                path.stem: files.read_record(path, required=False)
                for path in sorted(folder.glob("*.json"))
            }
    seconds = {stage.name: execute.seconds(out, stage.name) for stage in stages}
    return Records(study, results, recipes, choices, seconds)


def _read(folder: Path) -> dict[str, Result]:
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json"))}


# Fields of results that are objects, of any or no fields: JSON in a table's column.
_OBJECTS = ("metrics", "settings")


def publish(records: Records, to: Path) -> None:
    """Writes a study's settings, results, recipes and choices as three small files.

    `load` reads them back; models and single results are not among them.
    """
    to.mkdir(parents=True, exist_ok=True)
    files.write_record(to / "study.json", describe(records.study))
    rows = [
        {"model": model, **dataclasses.asdict(result)}
        for model, of_model in records.results.items()
        for result in of_model.values()
    ]
    frame = pd.DataFrame(rows)
    for column in _OBJECTS:
        frame[column] = frame[column].map(json.dumps)
    packed = frame.to_parquet(None, compression="zstd", index=False)
    storage.write_atomic(to / RESULTS, packed)
    recorded = {name: getattr(records, name) for name in _RECORDED}
    digest = hashlib.sha256(packed).hexdigest()
    files.write_record(to / RECORDS, {**recorded, "results": digest})


def _published(study: Study, out: Path) -> Records:
    file = out / RESULTS
    # Older versions recorded no checksum, and no digest of the results.
    recorded = files.read_record(out / RECORDS, required=False, finite=True, advice=_AGAIN)
    digest = recorded.pop("results", None)
    if set(recorded) != set(_RECORDED) or not all(isinstance(v, dict) for v in recorded.values()):
        raise DataError(f"{out / RECORDS}: damaged, it has not {', '.join(_RECORDED)}; {_AGAIN}")
    if any(type(of_stage) not in (int, float) for of_stage in recorded["seconds"].values()):
        raise DataError(f"{out / RECORDS}: damaged, seconds are not all numbers; {_AGAIN}")
    if digest is not None and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise DataError(f"{file}: damaged, its digest is not that of {RECORDS}; {_AGAIN}")
    try:
        rows = pd.read_parquet(io.BytesIO(file.read_bytes())).to_dict("records")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: damaged, not a Parquet file ({error}); {_AGAIN}") from error
    results: dict[str, dict[str, Result]] = {}
    for row in rows:
        model, where = row.pop("model", None), f"{file}: the result of {row.get('task')}"
        how = {"finite": True, "kind": dict, "advice": _AGAIN}
        # Older versions have no settings.
        for column in set(_OBJECTS) & {"metrics", *row}:
            row[column] = files.parse_json(str(row.get(column)), where, **how)
        if (interval := row.get("interval")) is not None:
            row["interval"] = [float(end) for end in interval]
        result = checked_result(row, where)
        results.setdefault(str(model), {})[result.task] = result
    return Records(study, results, **recorded)

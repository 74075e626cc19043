"""The results, recipes and choices of a finished study, read from its folder or as published."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from m2l import files, models, storage
from m2l.errors import DataError, EvaluationError, UnknownNameError
from m2l.evaluation.results import Result, checked_result, read_result
from m2l.studies import graph
from m2l.studies.merge_to_learn import SkillsStudy
from m2l.studies.merging_at_scale import ScalingStudy
from m2l.studies.method_comparison import MethodComparison
from m2l.studies.run import COSTS, RECIPES
from m2l.typing import JsonObject

RESULTS = "results.parquet"
RECORDS = "records.json"
_RECORDED = ("recipes", "choices", "seconds", "costs")
_ADVICE = "publish the study again: m2l report --publish"
Study = ScalingStudy | SkillsStudy | MethodComparison
_KINDS: dict[str, type[Study]] = {
    "scaling": ScalingStudy,
    "skills": SkillsStudy,
    "methods": MethodComparison,
}


@dataclasses.dataclass(frozen=True)
class StudyResults:
    """A finished study.

    Attributes:
        study: Its settings.
        results: The results by the name of a model and by task.
        recipes: The recipes, as chosen, by the name of a merged model.
        choices: The points of the sweep and the chosen one, by stage and by method.
        seconds: The durations of stages.
        costs: What a merge took, by stage, of a comparison of methods.
    """

    study: Study
    results: Mapping[str, Mapping[str, Result]]
    recipes: Mapping[str, JsonObject]
    choices: Mapping[str, JsonObject]
    seconds: Mapping[str, float]
    costs: Mapping[str, JsonObject] = dataclasses.field(default_factory=dict)

    def of(self, model: str, categories: Iterable[str] | None = None) -> list[Result]:
        """Returns a model's results, on the tasks of these categories only.

        Raises:
            EvaluationError: There are none.
        """
        selected = None if categories is None else set(categories)
        results = [
            result
            for result in self.results.get(model, {}).values()
            if selected is None or result.category in selected
        ]
        if not results:
            raise EvaluationError(f"the study has no results of {model} on these tasks")
        return results

    def parameters(self, size: str) -> int:
        """Returns the number of parameters of the models of a size."""
        return models.parameters(self.study.models[size])


def describe(study: Study) -> JsonObject:
    """Returns a study's settings as study.json has them, its kind first."""
    kind = next(kind for kind in _KINDS if isinstance(study, _KINDS[kind]))
    return {"kind": kind, **study.to_dict()}


def read_study(out: Path) -> Study:
    """Returns the settings of the study in `out`.

    Raises:
        DataError: `out` has no study.
        UnknownNameError: The study is of an unknown kind.
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


def load(out: Path) -> StudyResults:
    """Loads all results of a study, from its own folder or a published one.

    Raises:
        DataError: `out` has no study, or one that is not finished.
    """
    out = storage.path(out)
    study = read_study(out)
    read = _read_published if (out / RESULTS).exists() else _read_folder
    study_results = read(study, out)
    _check_same_examples(study_results.results, out)
    return study_results


def _check_same_examples(results: Mapping[str, Mapping[str, Result]], out: Path) -> None:
    """Checks that all models were evaluated on the same examples."""
    tasks: dict[str, tuple[object, ...]] = {}
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


def _read_folder(study: Study, out: Path) -> StudyResults:
    stages = study.stage_graph()
    remaining = [s.name for s in stages if graph.stage_state(stages, out, s.name) != "done"]
    if remaining:
        raise DataError(
            f"{out}: {len(remaining)} of {len(stages)} stages are not done, {remaining[0]} is the "
            "first; `m2l study` goes on with them"
        )
    results: dict[str, dict[str, Result]] = {}
    recipes, choices, costs = {}, {}, {}
    for stage in stages:
        graph.check_results(stages, out, stage.name)
        folder = graph.stage_folder(out, stage.name)
        model = stage.name.removeprefix("results/")
        if stage.kind == "evaluate":
            results[model] = _read_results(folder)
        elif stage.kind in ("merge", "compare"):
            if stage.kind == "compare":
                costs[model] = files.read_record(folder / COSTS)
            for name, recipe in files.read_json(folder / RECIPES, kind=dict).items():
                results[f"{model}/{name}"] = _read_results(folder / name)
                recipes[f"{model}/{name}"] = recipe
        elif stage.kind in ("choose", "search"):
            choices[stage.name] = {
                path.stem: files.read_record(path, required=False)
                for path in sorted(folder.glob("*.json"))
            }
    seconds = {stage.name: graph.stage_seconds(out, stage.name) for stage in stages}
    return StudyResults(study, results, recipes, choices, seconds, costs)


def _read_results(folder: Path) -> dict[str, Result]:
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json"))}


def lineage(study_results: StudyResults) -> pd.DataFrame:
    """Returns the origin of each model of a study of any kind.

    Returns:
        Rows with model, kind (of the stage that makes it), made_of (the stage's inputs), recipe,
        digest, and results (their number).
    """
    rows, stages = [], study_results.study.stage_graph()

    def add(model: str, kind: str, inputs: list[str], recipe: JsonObject | None) -> None:
        results = study_results.of(model)
        row = {"model": model, "kind": kind, "made_of": inputs, "recipe": recipe}
        rows.append(row | {"digest": results[0].model_digest, "results": len(results)})

    for stage in stages:
        if stage.kind == "evaluate":
            producer = stages[stage.inputs["model"]]
            add(producer.name, producer.kind, list(producer.inputs.values()), None)
        elif stage.kind in ("merge", "compare"):
            inputs = [name for role, name in stage.inputs.items() if role != "choice"]
            prefix = f"{stage.name.removeprefix('results/')}/"
            for model, recipe in study_results.recipes.items():
                if model.startswith(prefix):
                    add(model, "merge", inputs, recipe)
    return pd.DataFrame(rows)


# Fields of results that are JSON objects: stored as text in the table's columns.
_JSON_COLUMNS = ("metrics", "settings")


def publish(study_results: StudyResults, out: Path) -> None:
    """Writes a study's settings, results, recipes and choices as three small files for `load`.

    Values of single examples are left out, but for a SkillsStudy's, whose differences pair them.
    """
    out.mkdir(parents=True, exist_ok=True)
    files.write_record(out / "study.json", describe(study_results.study))
    rows = [
        {"model": model, **dataclasses.asdict(result)}
        for model, results in study_results.results.items()
        for result in results.values()
    ]
    frame = pd.DataFrame(rows)
    if not isinstance(study_results.study, SkillsStudy):
        frame["values"] = None  # Its findings are of scores; of a whole grid they take megabytes.
    for column in _JSON_COLUMNS:
        frame[column] = frame[column].map(json.dumps)
    packed = frame.to_parquet(None, compression="zstd", index=False)
    storage.write_atomic(out / RESULTS, packed)
    recorded = {name: getattr(study_results, name) for name in _RECORDED}
    digest = hashlib.sha256(packed).hexdigest()
    files.write_record(out / RECORDS, {**recorded, "results": digest})


def _read_published(study: Study, out: Path) -> StudyResults:
    file = out / RESULTS
    # Older versions recorded no checksum, and no digest of the results.
    recorded = files.read_record(out / RECORDS, required=False, finite=True, advice=_ADVICE)
    digest = recorded.pop("results", None)
    recorded.setdefault("costs", {})  # Older versions had none.
    if set(recorded) != set(_RECORDED) or not all(isinstance(v, dict) for v in recorded.values()):
        raise DataError(f"{out / RECORDS}: damaged, it has not {', '.join(_RECORDED)}; {_ADVICE}")
    if any(type(seconds) not in (int, float) for seconds in recorded["seconds"].values()):
        raise DataError(f"{out / RECORDS}: damaged, seconds are not all numbers; {_ADVICE}")
    if digest is not None and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise DataError(f"{file}: damaged, its digest is not that of {RECORDS}; {_ADVICE}")
    try:
        rows = pd.read_parquet(io.BytesIO(file.read_bytes())).to_dict("records")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: damaged, not a Parquet file ({error}); {_ADVICE}") from error
    results: dict[str, dict[str, Result]] = {}
    for row in rows:
        model, origin = row.pop("model", None), f"{file}: the result of {row.get('task')}"
        # Older versions have no settings.
        for column in set(_JSON_COLUMNS) & {"metrics", *row}:
            text = str(row.get(column))
            row[column] = files.parse_json(text, origin, finite=True, kind=dict, advice=_ADVICE)
        for column in ("interval", "values"):
            if (numbers := row.get(column)) is not None:
                row[column] = [float(number) for number in numbers]
        result = checked_result(row, origin)
        results.setdefault(str(model), {})[result.task] = result
    return StudyResults(study, results, **recorded)

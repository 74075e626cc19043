"""What a study found: its results, recipes and choices, from its folder or as it was published."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from m2l import files, models
from m2l.errors import DataError, EvaluationError, UnknownNameError
from m2l.evaluation.runner import Result, read_result
from m2l.studies import execute, scaling, skills
from m2l.studies.plan import Plan
from m2l.studies.scaling import ScalingStudy
from m2l.studies.skills import SkillsStudy
from m2l.studies.stages import RECIPES

RESULTS = "results.parquet"
RECORDS = "records.json"
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
    record = Path(out) / "study.json"
    if not record.exists():
        raise DataError(f"{out}: holds no study (study.json is missing); run `m2l study` first")
    fields = files.read_json(record)
    kind = fields.pop("kind")
    if kind not in _KINDS:
        raise UnknownNameError(f"kind of study in {record}:", kind, _KINDS)
    return _KINDS[kind].from_dict(fields)


def load(out: Path) -> Records:
    """Everything that a study found, from its own folder or a published one.

    Raises:
        DataError: `out` holds no study, or one that is not finished.
    """
    out = Path(out)
    study = read_study(out)
    return _published(study, out) if (out / RESULTS).exists() else _collected(study, out)


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
        folder = execute.folder(out, stage.name)
        model = stage.name.removeprefix("results/")
        if stage.kind == "evaluate":
            results[model] = _read(folder)
        elif stage.kind == "merge":
            for name, recipe in files.read_json(folder / RECIPES).items():
                results[f"{model}/{name}"] = _read(folder / name)
                recipes[f"{model}/{name}"] = recipe
        elif stage.kind == "choose":
            choices[stage.name] = {
                path.stem: files.read_json(path) for path in sorted(folder.glob("*.json"))
            }
    seconds = {stage.name: execute.seconds(out, stage.name) for stage in stages}
    return Records(study, results, recipes, choices, seconds)


def _read(folder: Path) -> dict[str, Result]:
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json"))}


def publish(records: Records, to: Path) -> None:
    """Writes a study's settings, results, recipes and choices as three small files.

    `load` reads them back; models and single results are not among them.
    """
    to.mkdir(parents=True, exist_ok=True)
    files.write(to / "study.json", json.dumps(describe(records.study), indent=1) + "\n")
    beside = {name: getattr(records, name) for name in ("recipes", "choices", "seconds")}
    files.write(to / RECORDS, json.dumps(beside, indent=1) + "\n")
    rows = [
        {"model": model, **dataclasses.asdict(result)}
        for model, of_model in records.results.items()
        for result in of_model.values()
    ]
    frame = pd.DataFrame(rows)
    frame["metrics"] = frame["metrics"].map(json.dumps)
    frame.to_parquet(to / RESULTS, compression="zstd", index=False)


def _published(study: Study, out: Path) -> Records:
    beside = files.read_json(out / RECORDS)
    frame = pd.read_parquet(out / RESULTS)
    results: dict[str, dict[str, Result]] = {}
    for row in frame.to_dict("records"):
        model = row.pop("model")
        row["metrics"] = json.loads(row["metrics"])
        row["interval"] = None if row["interval"] is None else [float(x) for x in row["interval"]]
        results.setdefault(model, {})[row["task"]] = Result(**row)
    return Records(study, results, **beside)

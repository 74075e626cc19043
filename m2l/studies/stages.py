"""What a study's stages do: train, evaluate, choose, merge, each by its room's own function."""

import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jax

from m2l import checkpoints, files, merging, models, partitioning, storage, tasks
from m2l.data import vocabularies
from m2l.errors import CheckpointError
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.results import Result, normalized
from m2l.evaluation.task_data import TaskData, load_tasks
from m2l.merging import Recipe
from m2l.studies.execute import Run
from m2l.studies.plan import Stage
from m2l.training.loop import train
from m2l.training.settings import from_flat

RECIPES = "recipes.json"


def run_train(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Trains, or goes on with, the stage's model; its output is a training run's directory."""
    vocabulary_name, source = stage.settings["data"]
    tasks.register(vocabulary=vocabulary_name, source=source)
    vocabulary = vocabularies.load(vocabulary_name)
    train(
        out,
        config=models.from_dict(stage.settings["model"]),
        vocabulary=vocabularies.describe(vocabulary, vocabulary_name),
        settings=from_flat(**stage.settings["settings"]),
        init=inputs.get("init"),
        data={"source": source, "stage": stage.name},
    )


def run_given(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Links a checkpoint that somebody else trained to the stage's place; buckets get a copy.

    Raises:
        CheckpointError: it is another one by now.
    """
    directory = storage.path(stage.settings["checkpoint"])
    if checkpoints.read_manifest(directory).digest != stage.settings["digest"]:
        raise CheckpointError(f"{directory}: changed since the study was planned; start it again")
    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(out, Path) and isinstance(directory, Path):
        out.unlink(missing_ok=True)
        out.symlink_to(directory, target_is_directory=True)
    else:
        storage.remove_tree(out)
        storage.upload(directory, out)


# --- evaluation ---


@functools.lru_cache(maxsize=2)
def _loaded(asked: str) -> tuple[list[TaskData], dict[str, list[str]]]:
    """The tasks' data of a study, and by category their names; `asked` is JSON."""
    how = json.loads(asked)
    vocabulary, source = how["data"]
    tasks.register(vocabulary=vocabulary, source=source)
    suffix = tasks.ORIGINAL if how["original_only"] else ""
    names = {category: prompts(category + suffix, how["prompts"]) for category in how["categories"]}
    loaded = load_tasks(
        [tasks.info(name) for of_category in names.values() for name in of_category],
        split=how["split"],
        lengths=how["lengths"],
        max_examples=how["examples"],
        skip=how["skip"],
        generative_score=how["generative_score"],
    )
    return loaded, names


def prompts(mixture: str, most: int) -> list[str]:
    """The tasks of a mixture that evaluation can score: so many of each dataset, 0: all."""
    by_dataset: dict[str, list[str]] = defaultdict(list)
    for name in tasks.tasks_in(mixture):
        info = tasks.info(name)
        if info.kind != "train":
            by_dataset[info.dataset].append(name)
    return [name for names in by_dataset.values() for name in names[: most or len(names)]]


@functools.lru_cache(maxsize=2)
def _evaluator(asked: str, model: str, batch_size: int) -> Evaluator:
    loaded, _ = _loaded(asked)
    vocabulary = vocabularies.load(json.loads(asked)["data"][0])
    return Evaluator(models.from_dict(json.loads(model)), loaded, vocabulary, batch_size=batch_size)


class _Judge:
    """A study's tasks, made ready once for all models of a size.

    Args:
        settings: Of a stage that evaluates.
        model: The models' configuration as a manifest has it.
        choosing: Whether by the examples to choose by, rather than those to be judged by.
    """

    def __init__(self, settings: Mapping[str, Any], model: Mapping[str, Any], choosing: bool):
        names = ("data", "original_only", "split", "lengths", "generative_score")
        how = {name: settings[name] for name in names}
        how |= {"prompts": settings["prompts"], "examples": settings["max_examples"], "skip": 0}
        how["categories"] = settings["all_categories"]
        if choosing:
            most, examples = settings["choosing"]
            how |= {"prompts": most, "examples": examples, "skip": settings["max_examples"]}
            how["categories"] = settings["choosing_categories"]
        asked = json.dumps(how, sort_keys=True)
        self._names = _loaded(asked)[1]
        described = json.dumps(model, sort_keys=True)
        self._evaluator = _evaluator(asked, described, settings["batch_size"])

    def _only(self, categories: Sequence[str]) -> list[str]:
        return [name for category in categories for name in self._names[category]]

    def write(self, params: Any, categories: Sequence[str], out: Path, digest: str) -> None:
        """A result file for each task of the categories."""
        what = "/".join(out.parts[out.parts.index("results") + 1 :])
        only = self._only(categories)
        self._evaluator.run(params, out, model_digest=digest, only=only, description=what)

    def results(self, params: Any, categories: Sequence[str]) -> list[Result]:
        """The results themselves."""
        return list(self._evaluator.results(params, only=self._only(categories)))


def run_evaluate(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Evaluates the stage's model; its output are the results, a file for each task."""
    directory = checkpoints.resolve(inputs["model"])
    manifest = checkpoints.read_manifest(directory)
    judge = _Judge(stage.settings, manifest.model, choosing=False)
    mesh, placed = _placement(manifest.model)
    with jax.set_mesh(mesh):
        params = checkpoints.restore(directory, shardings=placed)
        judge.write(params, stage.settings["categories"], out, manifest.digest)


def _placement(model: Mapping[str, Any]) -> tuple[jax.sharding.Mesh, Any]:
    """The mesh that splits a model over as many devices as it can be, and where parameters go."""
    spec = models.spec(models.from_dict(model))
    mesh = partitioning.widest_mesh(spec)
    return mesh, partitioning.shardings(spec, mesh)


# --- merges ---


class _Experts:
    """A base and its experts in memory, read once for all their merges."""

    def __init__(self, inputs: Mapping[str, Path]):
        self.paths = {
            role.removeprefix("expert/"): checkpoints.resolve(path)
            for role, path in inputs.items()
            if role == "base" or role.startswith("expert/")
        }
        manifests = {name: checkpoints.read_manifest(path) for name, path in self.paths.items()}
        self.model = manifests["base"].model
        self._digests = {name: manifest.digest for name, manifest in manifests.items()}
        self.mesh, placed = _placement(self.model)
        self._params = {
            name: checkpoints.restore(path, shardings=placed) for name, path in self.paths.items()
        }

    def expert(self, category: str) -> Any:
        """The parameters of a category's expert."""
        return self._params[category]

    def merged(self, recipe: Recipe, categories: Sequence[str]) -> tuple[Any, str]:
        """The merge of these categories' experts, and its digest."""
        base = self._params["base"] if merging.METHODS[recipe.method].needs_base else None
        params = merging.merge_params(base, [self._params[c] for c in categories], recipe)
        of_base = self._digests["base"] if base is not None else None
        return params, recipe.identity(of_base, [self._digests[c] for c in categories])

    def keep(self, recipe: Recipe, categories: Sequence[str], out: Path) -> None:
        """Writes the merge as a checkpoint."""
        base = self.paths["base"] if merging.METHODS[recipe.method].needs_base else None
        merging.merge(base, [self.paths[c] for c in categories], recipe, out)


def run_choose(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Finds each method's hyper-parameters; its output is a file METHOD.json for each.

    The score of a candidate is its mean normalised performance on its constituents' tasks, over
    the sets of constituents, by examples that no model is judged by.
    """
    out.mkdir(parents=True, exist_ok=True)
    remaining = [m for m in stage.settings["candidates"] if not (out / f"{m}.json").exists()]
    if not remaining:
        return
    experts, sets = _Experts(inputs), stage.settings["sets"]
    judge = _Judge(stage.settings, experts.model, choosing=True)
    with jax.set_mesh(experts.mesh):
        _choose(stage, out, remaining, experts, sets, judge)


def _choose(
    stage: Stage,
    out: Path,
    methods: Sequence[str],
    experts: _Experts,
    sets: Sequence[Sequence[str]],
    judge: _Judge,
) -> None:
    reference = {
        result.task: result
        for category in dict.fromkeys(category for one in sets for category in one)
        for result in judge.results(experts.expert(category), [category])
    }

    def score(recipe: Recipe) -> list[float]:
        """Of each set of constituents."""
        return [
            normalized(judge.results(experts.merged(recipe, one)[0], one), reference)
            for one in sets
        ]

    for method in methods:
        recipes = [Recipe.from_dict(r) for r in stage.settings["candidates"][method]]
        points = []
        for recipe in recipes:
            by_set = score(recipe)
            swept = {name: getattr(recipe, name) for name in stage.settings["swept"][method]}
            points.append({"settings": swept, "score": fmean(by_set), "by_set": by_set})
        best = max(points, key=lambda point: point["score"])
        record = {"points": points, "chosen": best["settings"], "sets": sets}
        files.write_record(out / f"{method}.json", record)


def run_merge(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Makes all merges of a set of experts in memory, and evaluates and drops each.

    Its output is a folder of results for each, and recipes.json with the recipes as chosen.
    """
    categories = [role.removeprefix("expert/") for role in inputs if role.startswith("expert/")]
    experts = _Experts(inputs)
    judge = _Judge(stage.settings, experts.model, choosing=False)
    out.mkdir(parents=True, exist_ok=True)
    chosen = {
        name: _as_chosen(Recipe.from_dict(recipe), inputs.get("choice"))
        for name, recipe in stage.settings["recipes"].items()
    }
    for name, recipe in chosen.items():
        if stage.settings["keep"]:
            kept = _beside(out, name)
            if not kept.exists():
                experts.keep(recipe, categories, kept)
        with jax.set_mesh(experts.mesh):
            params, digest = experts.merged(recipe, categories)
            judge.write(params, stage.settings["categories"], out / name, digest)
    recipes = {name: recipe.to_dict() for name, recipe in chosen.items()}
    storage.write_atomic(out / RECIPES, json.dumps(recipes, indent=1) + "\n")


def _beside(results: Path, name: str) -> Path:
    """Where the checkpoint of a merge lies whose results lie under results/."""
    inside = results
    while inside.name != "results":
        inside = inside.parent
    return inside.parent / results.relative_to(inside) / name


def _as_chosen(recipe: Recipe, choice: Path | None) -> Recipe:
    file = choice and choice / f"{recipe.method}.json"
    if not file or not file.exists():
        return recipe
    return Recipe.from_dict(recipe.to_dict() | files.read_record(file)["chosen"])


RUNNERS: Mapping[str, Run] = {
    "train": run_train,
    "given": run_given,
    "evaluate": run_evaluate,
    "choose": run_choose,
    "merge": run_merge,
}

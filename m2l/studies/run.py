"""The functions that run the stages that compute, each kind its own, and what they cost."""

import ast
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import jax

from m2l import checkpoints, files, merging, models, partitioning, signals, storage, tasks
from m2l.data import vocabularies
from m2l.data.prompts import TaskInfo
from m2l.data.shots import Shots
from m2l.errors import MergeError
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.results import Result, normalized
from m2l.evaluation.task_data import TaskData, load_tasks
from m2l.merging import Recipe
from m2l.merging.search_space import Draw, SearchSpace
from m2l.studies import given_checkpoints, own_tasks
from m2l.studies.graph import Graph, Runner, Stage, return_memory
from m2l.studies.method_comparison import DEFAULT, SEARCHED
from m2l.training import resources, statistics
from m2l.training.loop import RunPart, train
from m2l.training.settings import from_flat
from m2l.typing import Json, JsonObject, Params, PyTree

RECIPES, COSTS = "recipes.json", "costs.json"


def run_train(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Trains the stage's model, or resumes; the output is a training run's directory."""
    vocabulary_name, source = stage.settings["data"]
    own_tasks.declare(stage.settings)
    vocabulary = vocabularies.load(vocabulary_name)
    part = stage.settings.get("part")
    train(
        out,
        config=models.from_dict(stage.settings["model"]),
        vocabulary=vocabularies.describe(vocabulary, vocabulary_name),
        settings=from_flat(**stage.settings["settings"]),
        init=inputs.get("init"),
        part=part and RunPart(previous=inputs.get("previous"), **part),
        data={"source": source, "stage": stage.name},
    )


# --- evaluation ---


@functools.lru_cache(maxsize=2)
def _load_tasks(selection: str) -> tuple[list[TaskData], dict[str, list[str]]]:
    """Returns the data of a study's tasks, and the tasks' names by category."""
    options = json.loads(selection)
    own_tasks.declare(options)
    own = {task["name"] for task in options.get("own", ())}
    shares = {
        category: prompts(evaluated(category, options["original_only"]), options["prompts"])
        for category in options["categories"]
    }
    # Tasks that are read alike are read together; own ones have a part for each purpose.
    alike: dict[tuple[str, int, int], list[TaskInfo]] = defaultdict(list)
    for name, share in (item for dealt in shares.values() for item in dealt.items()):
        count = max(1, round(options["examples"] * share))
        own_split = own_tasks.CHOOSING if options["skip"] else own_tasks.REPORTING
        shared = options["split"], count, options["skip"]
        alike[(own_split, count, 0) if name in own else shared].append(tasks.info(name))
    loaded = [
        task
        for (split, count, skip), infos in alike.items()
        for task in load_tasks(
            infos,
            split=split,
            lengths=options["lengths"],
            max_examples=count,
            skip=skip,
            generative_score=options["generative_score"],
            shots=Shots(*options.get("shots", ())),
        )
    ]
    return loaded, {category: list(dealt) for category, dealt in shares.items()}


def evaluated(category: str, original_only: bool) -> str:
    """Returns the mixture that a category is evaluated on."""
    original = category + tasks.ORIGINAL
    return original if original_only and original in tasks.mixtures() else category


def prompts(mixture: str, limit: int) -> dict[str, float]:
    """Deals the prompts that a mixture is scored by over the parts of its datasets.

    Every part of a dataset, such as ANLI's rounds, gets a prompt, and the parts get different ones
    as long as there are any.

    Args:
        mixture: The mixture.
        limit: Prompts of each dataset; 0: all. With more parts, each has fewer examples instead.

    Returns:
        Task -> share of the examples that a task is evaluated on.
    """
    by_dataset: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in tasks.tasks_in(mixture):
        info = tasks.info(name)
        if info.kind != "train":
            by_dataset[info.dataset][tasks.declaration(name).name].append(name)
    shares: dict[str, float] = {}
    for parts in by_dataset.values():
        rows = list(parts.values())
        dealt = [
            names[(turn + number) % len(names)]
            for turn in range(max(map(len, rows)))
            for number, names in enumerate(rows)
            if turn < len(names)
        ]
        count = max(limit, len(parts)) if limit else len(dealt)
        share = limit / len(parts) if 0 < limit < len(parts) else 1.0
        shares |= dict.fromkeys(dealt[:count], share)
    return shares


@functools.lru_cache(maxsize=2)
def _load_evaluator(selection: str, model: str, batch_size: int) -> Evaluator:
    loaded, _ = _load_tasks(selection)
    vocabulary = vocabularies.load(json.loads(selection)["data"][0])
    return Evaluator(models.from_dict(json.loads(model)), loaded, vocabulary, batch_size=batch_size)


class StudyEvaluator:
    """The evaluator of a study's tasks, loaded once for all models of a size.

    Args:
        settings: The settings of a stage that evaluates.
        model: The models' configuration as in a manifest.
        choosing: Whether on the examples that hyper-parameters are chosen by, rather than those
            that models are evaluated on.
    """

    def __init__(self, settings: Mapping[str, Json], model: Mapping[str, Json], choosing: bool):
        names = ("data", "own", "original_only", "split", "lengths", "generative_score", "shots")
        options = {name: settings[name] for name in names if name in settings}
        limit, examples, skip = settings["prompts"], settings["max_examples"], 0
        if choosing:
            skip = examples
            limit, examples = settings["choosing"]
        categories = settings["choosing_categories" if choosing else "all_categories"]
        options |= {"prompts": limit, "examples": examples, "skip": skip, "categories": categories}
        selection = json.dumps(options, sort_keys=True)
        self._names = _load_tasks(selection)[1]
        described = json.dumps(model, sort_keys=True)
        self._evaluator = _load_evaluator(selection, described, settings["batch_size"])

    def _tasks(self, categories: Sequence[str]) -> list[str]:
        return [name for category in categories for name in self._names[category]]

    def write(self, params: Params, categories: Sequence[str], out: Path, digest: str) -> None:
        """Writes a result file for each task of the categories."""
        self._evaluator.run(
            params,
            out,
            model_digest=digest,
            only=self._tasks(categories),
            values=True,
            description="/".join(out.parts[out.parts.index("results") + 1 :]),
        )

    def results(self, params: Params, categories: Sequence[str]) -> list[Result]:
        """Returns the result of each task of the categories."""
        return list(self._evaluator.results(params, only=self._tasks(categories)))


def run_evaluate(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Evaluates the stage's model; the output is a result file for each task."""
    directory = checkpoints.resolve(inputs["model"])
    manifest = checkpoints.read_manifest(directory)
    evaluator = StudyEvaluator(stage.settings, manifest.model, choosing=False)
    mesh, shardings = model_shardings(manifest.model)
    with jax.set_mesh(mesh):
        params = checkpoints.restore(directory, shardings=shardings)
        evaluator.write(params, stage.settings["categories"], out, manifest.digest)


def model_shardings(model: Mapping[str, Json]) -> tuple[jax.sharding.Mesh, PyTree]:
    """Returns the mesh that splits a model over as many devices as it can, and its shardings."""
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
        self.mesh, shardings = model_shardings(self.model)
        self._digests = {name: manifest.digest for name, manifest in manifests.items()}
        self.params = {
            name: checkpoints.restore(path, shardings=shardings)
            for name, path in self.paths.items()
        }
        self._statistics = {
            role.removeprefix("statistic/"): checkpoints.restore(path)
            for role, path in inputs.items()
            if role.startswith("statistic/")
        }

    def merge(self, recipe: Recipe, categories: Sequence[str]) -> tuple[Params, str]:
        """Returns the merge of these categories' experts, and its digest."""
        base = "base" if merging.METHODS[recipe.method].needs_base else None
        params = merging.merge_params(
            base and self.params[base],
            [self.params[category] for category in categories],
            recipe,
            [self._statistics[category] for category in categories if self._statistics],
        )
        jax.block_until_ready(params)
        return_memory()
        digests = [self._digests[c] for c in categories]
        return params, recipe.identity(base and self._digests[base], digests)

    def write_merge(self, recipe: Recipe, categories: Sequence[str], out: Path) -> None:
        """Writes the merge as a checkpoint."""
        base = self.paths["base"] if merging.METHODS[recipe.method].needs_base else None
        merging.merge(base, [self.paths[c] for c in categories], recipe, out)


def run_choose(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Chooses each method's hyper-parameters; the output is a file METHOD.json for each.

    The score of a candidate is its mean normalised performance on its constituents' tasks, over
    the sets of constituents, on examples that no model is evaluated on.
    """
    out.mkdir(parents=True, exist_ok=True)
    methods = [m for m in stage.settings["candidates"] if not (out / f"{m}.json").exists()]
    if not methods:
        return
    experts, sets = _Experts(inputs), stage.settings["sets"]
    evaluator = StudyEvaluator(stage.settings, experts.model, choosing=True)
    with jax.set_mesh(experts.mesh):
        references = {
            result.task: result
            for category in dict.fromkeys(category for names in sets for category in names)
            for result in evaluator.results(experts.params[category], [category])
        }
        for method in methods:
            points = []
            for candidate in stage.settings["candidates"][method]:
                recipe = Recipe.from_dict(candidate)
                by_set = []
                for names in sets:
                    results = evaluator.results(experts.merge(recipe, names)[0], names)
                    by_set.append(normalized(results, references))
                swept = {name: getattr(recipe, name) for name in stage.settings["swept"][method]}
                points.append({"settings": swept, "score": fmean(by_set), "by_set": by_set})
            best = max(points, key=lambda point: point["score"])
            record = {"points": points, "chosen": best["settings"], "sets": sets}
            files.write_record(out / f"{method}.json", record)


def run_merge(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Makes all merges of a set of experts in memory, and evaluates each.

    The output is a folder of results for each, and recipes.json with the recipes as chosen.
    """
    categories = [role.removeprefix("expert/") for role in inputs if role.startswith("expert/")]
    experts = _Experts(inputs)
    evaluator = StudyEvaluator(stage.settings, experts.model, choosing=False)
    out.mkdir(parents=True, exist_ok=True)
    recipes = {
        name: _as_chosen(Recipe.from_dict(recipe), inputs.get("choice"))
        for name, recipe in stage.settings["recipes"].items()
    }
    for name, recipe in recipes.items():
        if stage.settings["keep"]:
            checkpoint = _checkpoint_folder(out) / name
            if not checkpoint.exists():
                experts.write_merge(recipe, categories, checkpoint)
        with jax.set_mesh(experts.mesh):
            params, digest = experts.merge(recipe, categories)
            evaluator.write(params, stage.settings["categories"], out / name, digest)
    text = json.dumps({name: recipe.to_dict() for name, recipe in recipes.items()}, indent=1)
    storage.write_atomic(out / RECIPES, text + "\n")


def _checkpoint_folder(results: Path) -> Path:
    # results/merges/X: merges/X
    root = results
    while root.name != "results":
        root = root.parent
    return root.parent / results.relative_to(root)


def _as_chosen(recipe: Recipe, choice: Path | None) -> Recipe:
    file = choice and choice / f"{recipe.method}.json"
    if not file or not file.exists():
        return recipe
    return Recipe.from_dict(recipe.to_dict() | files.read_record(file)["chosen"])


# --- a comparison of methods ---


def run_statistics(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Gathers a statistic of an expert over its training data; the output is its checkpoint."""
    settings = stage.settings
    vocabulary_name, source = settings["data"]
    own_tasks.declare(settings)
    statistics.gather(
        inputs["expert"],
        out,
        kind=settings["statistic"],
        mixture=settings["mixture"],
        examples=settings["examples"],
        vocabulary=vocabularies.describe(vocabularies.load(vocabulary_name), vocabulary_name),
        data={"source": source, "stage": stage.name},
        input_length=settings["lengths"]["inputs"],
        target_length=settings["lengths"]["targets"],
    )


def run_search(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Searches a method's hyper-parameters by TPE; the output is METHOD.json, as of `run_choose`.

    Scores are those of `run_choose`, of one set of constituents. The defaults are tried first.
    """
    # Optuna is an extra, and keeps the frames, with all variables, of whoever imports it first.
    from m2l.studies import search_storage

    _search(stage, out, inputs, search_storage.maximize)


def _search(
    stage: Stage, out: Path, inputs: Mapping[str, Path], maximize: Callable[..., None]
) -> None:
    settings = stage.settings
    default = Recipe.from_dict(settings["default"])
    seed = {"seed": default.seed} if merging.METHODS[default.method].draws else {}
    space = SearchSpace({default.method: {**seed, **ast.literal_eval(settings["space"])}})
    experts, categories = _Experts(inputs), settings["choosing_categories"]
    evaluator = StudyEvaluator(settings, experts.model, choosing=True)
    points: dict[str, JsonObject] = {}

    def score(recipe: Recipe) -> float:
        key = json.dumps(recipe.to_dict(), sort_keys=True)
        if key not in points:
            results = evaluator.results(experts.merge(recipe, categories)[0], categories)
            values = recipe.to_dict()
            names = space.methods[recipe.method]
            searched = {name: values[name] for name in names if name in values}
            points[key] = {"settings": searched, "score": normalized(results, references)}
        return points[key]["score"]

    def draw_and_score(draw: Draw) -> float | None:
        try:
            recipe = space.recipe(draw)
        except MergeError:  # Values that do not go together.
            return None
        return score(recipe)

    with jax.set_mesh(experts.mesh):
        references = {
            result.task: result
            for category in categories
            for result in evaluator.results(experts.params[category], [category])
        }
        score(default)
        candidates = settings["candidates"]
        first = space.spread(min(candidates, max(4, candidates // 2)))
        maximize(draw_and_score, first, candidates, settings["seed"])
    best = max(points.values(), key=lambda point: point["score"])
    out.mkdir(parents=True, exist_ok=True)
    record = {"points": list(points.values()), "chosen": best["settings"], "sets": [categories]}
    files.write_record(out / f"{default.method}.json", record)


def run_compare(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Merges by a method's defaults and, if these are others, by the settings that were chosen.

    The output is a folder of results for each, recipes.json, and costs.json: what the first merge
    took.
    """
    categories = [role.removeprefix("expert/") for role in inputs if role.startswith("expert/")]
    default = Recipe.from_dict(stage.settings["recipes"][DEFAULT])
    chosen = _as_chosen(default, inputs.get("choice"))
    out.mkdir(parents=True, exist_ok=True)
    merged = out / ".merged"
    storage.remove_tree(merged)
    costs = _write_and_measure(default, inputs, merged, stage.settings["memory"])
    manifest = checkpoints.read_manifest(merged)
    evaluator = StudyEvaluator(stage.settings, manifest.model, choosing=False)
    mesh, shardings = model_shardings(manifest.model)

    def evaluate(name: str, params: Params, digest: str) -> None:
        evaluator.write(params, stage.settings["categories"], out / name, digest)

    recipes = {DEFAULT: default}
    with jax.set_mesh(mesh):
        evaluate(DEFAULT, checkpoints.restore(merged, shardings=shardings), manifest.digest)
        storage.remove_tree(merged)
        if chosen != default:
            recipes[SEARCHED] = chosen
            evaluate(SEARCHED, *_Experts(inputs).merge(chosen, categories))
    files.write_record(out / COSTS, costs)
    text = json.dumps({name: recipe.to_dict() for name, recipe in recipes.items()}, indent=1)
    storage.write_atomic(out / RECIPES, text + "\n")


_NO_LIMIT = 1 << 50


def _write_and_measure(
    recipe: Recipe, inputs: Mapping[str, Path], out: Path, memory: str
) -> dict[str, Json]:
    """Writes a merge by a process of its own; returns its CPU seconds, and its bytes.

    The seconds are of the whole command, on all cores: its start and compilation are among them.
    """

    def paths(prefix: str) -> list[str]:
        roles = [role for role in inputs if role.startswith(prefix)]
        return [str(checkpoints.resolve(inputs[role])) for role in roles]

    base = paths("base") if merging.METHODS[recipe.method].needs_base else []
    described = out.with_name(".recipe.json")
    storage.write_atomic(described, json.dumps(recipe.to_dict()))
    command = [sys.executable, "-m", "m2l", "merge", "--recipe", str(described), "--no-diagnostics"]
    for option, values in (
        ("--base", base), ("--expert", paths("expert/")), ("--statistics", paths("statistic/"))
    ):  # fmt: skip
        command += [part for value in values for part in (option, value)]
    process = subprocess.Popen(
        [*command, "--memory", memory, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    with signals.killed_at_end(process.pid):
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise MergeError(f"{recipe.method}: {said.strip().splitlines()[-1]}")
    plan = merging.prepare(
        base[0] if base else None,
        paths("expert/"),
        recipe,
        out.with_name(".planned"),
        statistics=paths("statistic/"),
        memory=_NO_LIMIT,  # It is planned for its bytes alone.
        diagnostics=False,
    ).plan
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "read": plan.read,
        "written": plan.write,
    }


RUNNERS: Mapping[str, Runner] = {
    "train": run_train,
    "given": given_checkpoints.run,
    "evaluate": run_evaluate,
    "choose": run_choose,
    "merge": run_merge,
    "statistics": run_statistics,
    "search": run_search,
    "compare": run_compare,
}


# --- costs ---


# The share of the peak that training and evaluation reach as a whole: the trainer's MFU and the
# evaluator's bench for models that fill a device. Small models reach less.
UTILISATION = 0.4
_CHOICES = 4
_RESULT_BYTES = 1000.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stage costs.

    Attributes:
        flops: Floating-point operations of its matrix products.
        disk: Bytes that it leaves on the disk.
    """

    flops: float
    disk: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.disk + other.disk)


NO_COST = Cost(0.0, 0.0)


def stage_cost(stage: Stage, graph: Graph) -> Cost:
    """Computes a stage's cost; an upper bound for evaluations, with examples of maximal length."""
    if stage.kind == "given":
        return NO_COST
    settings = stage.settings
    if stage.kind == "train":
        config, training = models.from_dict(settings["model"]), settings["settings"]
        rows = training["batch_size"], training["input_length"], training["target_length"]
        # The optimizer's state is factored, a few per cent of this.
        disk = 4.0 * models.parameters(config) * training["keep"]
        return Cost(resources.step_flops(config, *rows) * training["steps"], disk)
    config = models.from_dict(graph[next(iter(stage.inputs.values()))].settings["model"])
    lengths = settings["lengths"]["inputs"], settings["lengths"]["targets"]
    if stage.kind == "statistics":
        return Cost(resources.step_flops(config, settings["examples"], *lengths), 0.0)
    per_example = resources.evaluation_flops(config, 1, *lengths, choices=_CHOICES)
    if stage.kind == "choose":
        limit, examples = settings["choosing"]
        candidates = sum(map(len, settings["candidates"].values()))
        count = sum(_task_count(names, settings, limit) for names in settings["sets"])
        return Cost(per_example * count * candidates * examples, 0.0)
    if stage.kind == "search":
        limit, examples = settings["choosing"]
        count = _task_count(settings["choosing_categories"], settings, limit)
        # Beside the candidates the defaults, and each expert on its own tasks.
        return Cost(per_example * count * (settings["candidates"] + 2) * examples, 0.0)
    count = _task_count(settings["categories"], settings, settings["prompts"])
    merges = len(settings.get("recipes", {"": None}))
    # A comparison evaluates the chosen settings beside the defaults.
    merges += stage.kind == "compare" and "choice" in stage.inputs
    disk = merges * _RESULT_BYTES * count
    if settings.get("keep"):
        disk += merges * 4.0 * models.parameters(config)
    return Cost(per_example * count * settings["max_examples"] * merges, disk)


def _task_count(categories: Iterable[str], settings: Mapping[str, Json], limit: int) -> float:
    own_tasks.declare(settings)
    mixtures = (evaluated(category, settings["original_only"]) for category in categories)
    return sum(_prompt_count(mixture, limit) for mixture in mixtures)


@functools.cache
def _prompt_count(mixture: str, limit: int) -> float:
    return sum(prompts(mixture, limit).values())


def cost_seconds(cost: Cost, peak: float) -> float:
    """Returns the time on devices with this peak, in operations a second of all together."""
    return cost.flops / (UTILISATION * peak)

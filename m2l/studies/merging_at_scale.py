"""Paper 1's study: bases x sizes x methods x numbers of experts x seeds, as a graph of stages.

Source: Yadav et al., "What Matters for Model Merging at Scale?", sections 3 and 4.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from m2l import models, tasks
from m2l.data.prompts import GENERATIVE_SCORES
from m2l.data.shots import Shots, without_idle
from m2l.errors import ConfigError, MergeError, UnknownNameError
from m2l.merging import METHODS, Recipe, grid
from m2l.models.fields import NOT_NEGATIVE, check_choice, check_fields
from m2l.studies import given_checkpoints, own_tasks
from m2l.studies.graph import Graph, Stage
from m2l.studies.own_tasks import OwnTask, OwnTasks
from m2l.training.settings import TrainSettings, from_flat, on_mixture, with_steps
from m2l.typing import Json, JsonObject
from m2l.version import __version__

BASES = ("pretrained", "instruct")
_RUNS = ("pretrain", "instruct", "expert", "multitask")

Swept = Mapping[str, Mapping[str, tuple[float, ...]]]
Training = TrainSettings | Mapping[str, TrainSettings]


@dataclasses.dataclass(frozen=True)
class ScalingStudy:
    """The study's settings.

    The training settings are those of all sizes, or by size; each stage sets the mixture, and where
    there is a `validation`, it is of the same mixture, and the best checkpoint is what stays.

    Attributes:
        models: The model's configuration by the name of a size ("1B"); from small to large.
        expert: Trains an expert from a base; its mixture is a category's.
        multitask: Trains the multitask model from a base; its mixture is all categories.
        categories: The held-in categories, one expert each.
        held_out: The held-out categories, on which every model is evaluated.
        recipes: The merge methods with their hyper-parameters, unless these are swept.
        pretrain: Trains the pretrained base from a random model; None: all are given, or none used.
        instruct: Trains the instruction-tuned base from the pretrained one; None: as of pretrain.
        bases: Those of BASES that experts are made from.
        own_tasks: Tasks of your own JSON lines, see `own_tasks.read`. They are trained on
            their part "train", chosen and stopped by "choose", and evaluated on "report".
        expert_steps: The steps of some categories' experts, in place of those of `expert`.
        swept: The values to choose from by method and hyper-parameter (the paper does not list
            its own). They are chosen for each size, base, method and number of experts by the mean
            normalised performance on the constituents' tasks, on examples of their own.
        expert_counts: The numbers of experts to merge.
        seeds: Each draws the constituents of a merge (the same for every size, base and method)
            and is the seed of the methods that need randomness.
        given: Checkpoints, or directories of Hugging Face or T5X, that replace stages, by the name
            of the stage: "bases/1B/instruct", "experts/1B/instruct/CATEGORY",
            "multitask/1B/instruct".
        keep_merges: Whether merged models are written as checkpoints; otherwise they are only
            evaluated in memory.
        vocabulary: The vocabulary's name.
        source: The source of the raw records.
        split: The split that everything but own tasks is evaluated on.
        original_only: Whether models are evaluated only with the prompts of the dataset's original
            task, as T0 is; experts are trained on all prompts.
        max_prompts: Prompts of each dataset to evaluate on, dealt over its parts; 0: all.
        max_examples: Examples of each task at most.
        choosing_prompts: Prompts of each dataset to choose by; 0: all.
        choosing_examples: Examples of each task to choose by; none of them is evaluated on.
        eval_batch_size: Examples in an evaluation batch.
        generative_score: The score of a task in free text: "decoding" (its headline metric on the
            generated text) or "likelihood" (of the references; nothing is decoded).
        shots: Examples of each task's training split that stand before each example.
        shots_seed: Decides which.
        digests: The content of given checkpoints and own tasks, by their names; `resolved` sets it.
    """

    models: Mapping[str, models.Config]
    expert: Training
    multitask: Training
    categories: tuple[str, ...]
    held_out: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    pretrain: Training | None = None
    instruct: Training | None = None
    bases: tuple[str, ...] = BASES
    own_tasks: OwnTasks = dataclasses.field(default_factory=dict)
    expert_steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    swept: Swept = dataclasses.field(default_factory=dict)
    expert_counts: tuple[int, ...] = (2, 4)
    seeds: tuple[int, ...] = (0, 1)
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keep_merges: bool = False
    vocabulary: str = "microworld"
    source: str = "microworld"
    split: str = "validation"
    original_only: bool = True
    max_prompts: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    max_examples: int = 100
    choosing_prompts: int = dataclasses.field(default=1, metadata=NOT_NEGATIVE)
    choosing_examples: int = 20
    eval_batch_size: int = 32
    generative_score: str = "decoding"
    shots: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    shots_seed: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("categories", "held_out", "recipes", "expert_counts", "seeds", "bases"):
            if not getattr(self, name):
                raise ConfigError(
                    f"ScalingStudy.{name}: expected a list of one or more, found none"
                )
        methods = tuple(recipe.method for recipe in self.recipes)
        for name, value in (
            ("recipes", methods),
            ("seeds", self.seeds),
            ("expert_counts", self.expert_counts),
            ("bases", self.bases),
        ):
            if len(set(value)) < len(value):
                raise ConfigError(f"ScalingStudy.{name}: {value!r} has one of them twice")
        check_choice(self, "generative_score", GENERATIVE_SCORES)
        Shots(self.shots, self.shots_seed)
        for count in self.expert_counts:
            if not 1 <= count <= len(self.categories):
                raise ConfigError(
                    f"ScalingStudy.expert_counts: {count} experts, but "
                    f"{len(self.categories)} categories"
                )
        for base in self.bases:
            if base not in BASES:
                raise UnknownNameError("ScalingStudy.bases: base", base, BASES)
        self._check_models()
        self._check_swept(methods)
        for category, count in self.expert_steps.items():
            if category not in self.categories or type(count) is not int or count < 1:
                raise ConfigError(
                    f"ScalingStudy.expert_steps: {category!r}: {count!r}: expected steps by "
                    "category of the study"
                )
        for run in _RUNS:
            settings = getattr(self, run)
            by_size = settings if isinstance(settings, Mapping) else {"": settings}
            sizes = set(self.models) if isinstance(settings, Mapping) else {""}
            optional = run in ("pretrain", "instruct") and settings is None
            if not optional and (
                set(by_size) != sizes
                or not all(isinstance(each, TrainSettings) for each in by_size.values())
            ):
                raise ConfigError(
                    f"ScalingStudy.{run}: expected @Train(), or one for each of "
                    f"{', '.join(self.models)}"
                )
        if len({tuple(self.training("expert", size).lengths.values()) for size in self.models}) > 1:
            raise ConfigError("ScalingStudy.expert: the lengths differ by size; examples would too")

    def _check_models(self) -> None:
        if not isinstance(self.models, Mapping) or not self.models:
            raise ConfigError(
                "ScalingStudy.models: expected the configurations by size, such as "
                f"{{'1M': @T5()}}, found {self.models!r}"
            )
        for size, config in self.models.items():
            if not isinstance(config, models.Config) or "/" in size:
                raise ConfigError(f"ScalingStudy.models: {size!r}: {config!r} is not a model")
        for name in ("given", "expert_steps"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(
                    f"ScalingStudy.{name}: expected a dict, found {getattr(self, name)!r}"
                )

    def _check_swept(self, methods: tuple[str, ...]) -> None:
        if not isinstance(self.swept, Mapping):
            raise ConfigError(f"ScalingStudy.swept: expected a dict, found {self.swept!r}")
        checked = {}
        for method, settings in self.swept.items():
            if method not in methods:
                raise UnknownNameError("ScalingStudy.swept: method", method, methods)
            if not isinstance(settings, Mapping) or not settings:
                raise ConfigError(
                    f"ScalingStudy.swept: {method}: expected the values by setting, such as "
                    f"{{'scale': [0.5, 1]}}, found {settings!r}"
                )
            checked[method] = {name: tuple(values) for name, values in settings.items()}
        object.__setattr__(self, "swept", checked)
        for recipe in self.recipes:
            try:
                candidates(self, recipe)
            except MergeError as error:
                raise ConfigError(f"ScalingStudy.swept: {error}") from error

    def check_mixtures(self) -> None:
        """Checks that all names exist, before anything is trained.

        Raises:
            UnknownNameError: There is no such source, mixture or stage.
            ConfigError: A name in `categories` or `held_out` is not a task category.
            CheckpointError: A checkpoint of `given` cannot be used.
        """
        stages = {s.name: s for s in self.stage_graph() if s.kind in ("train", "given")}
        stopped = any(
            self.training(run, size).validation
            for run in ("expert", "multitask")
            for size in self.models
        )
        own, label = _own_tasks(self), "ScalingStudy.own_tasks"
        for category in self.categories:
            for part in ["train"] + ["choose"] * bool(stopped or self.swept):
                own_tasks.check_part(own, category, part, label)
        for category in self.categories + self.held_out:
            own_tasks.check_part(own, category, "report", label)
        own_tasks.declare(data_settings(self))
        for name, stage in stages.items():
            if name.startswith("bases/") and stage.kind == "train":
                tasks.tasks_in(stage.settings["settings"]["mixture"])
        for category in self.categories + self.held_out:
            names = {tasks.info(task).category for task in tasks.tasks_in(category)}
            if names != {category}:
                raise ConfigError(f"{category!r} is not a task category; its tasks are of {names}")
        trained = {name: self.models[name.split("/")[1]] for name in stages}
        given_checkpoints.check(self.given, trained, "ScalingStudy.given")

    def training(self, run: str, size: str) -> TrainSettings:
        """Returns the settings of "pretrain", "instruct", "expert" or "multitask" at a size.

        Raises:
            ConfigError: The study has none.
        """
        settings = getattr(self, run)
        if settings is None:
            raise ConfigError(
                f"ScalingStudy: bases/{size}/{run} is neither given nor are there settings to "
                f"train it by: set .given or .{run}"
            )
        return settings[size] if isinstance(settings, Mapping) else settings

    def resolved(self) -> "ScalingStudy":
        """Returns the study with the digests of what it starts from, and its own tasks by name."""
        own = _own_tasks(self)
        used = [*self.categories, *self.held_out]
        setting = {
            f"{task.category}/{task.name}": task.setting
            for task in own.values()
            if task.category in used
        }
        digests = {task.name: task.digest() for task in own.values() if task.category in used}
        digests |= {name: given_checkpoints.digest_of(path) for name, path in self.given.items()}
        return dataclasses.replace(self, own_tasks=setting, digests=digests)

    def stage_graph(self) -> Graph:
        """Returns the study's stages: training, evaluations, choices of hyper-parameters, merges.

        A stage of kind "merge" makes all merges of one set of experts and evaluates them, so that
        the experts are read once; "choose" does it for one number of experts.
        """
        evaluated_on = evaluation_settings(self)
        stages = model_stages(self)
        stages += _choice_stages(self, evaluated_on)
        groups: dict[str, list[MergeCell]] = {}
        for merge in merges(self):
            groups.setdefault(merge.stage, []).append(merge)
        for name, cells in groups.items():
            first = cells[0]
            recipes = {cell.model.rsplit("/", 1)[-1]: cell.recipe.to_dict() for cell in cells}
            settings = {
                **evaluated_on,
                "categories": list(first.categories + self.held_out),
                "recipes": recipes,
                "keep": self.keep_merges,
            }
            inputs = merge_inputs(first.size, first.base, first.categories)
            if self.swept:
                inputs["choice"] = f"choices/{first.size}/{first.base}/{first.count}"
            stages.append(Stage(name, "merge", settings, inputs))
        return Graph(stages)

    def to_dict(self) -> JsonObject:
        """Returns the settings as JSON values."""
        fields = without_idle(dataclasses.asdict(self))
        fields["models"] = {size: models.to_dict(config) for size, config in self.models.items()}
        fields["recipes"] = [recipe.to_dict() for recipe in self.recipes]
        for run in _RUNS:
            settings = getattr(self, run)
            if isinstance(settings, Mapping):
                fields[run] = {size: each.flat() for size, each in settings.items()}
            elif settings is not None:
                fields[run] = settings.flat()
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Json]) -> "ScalingStudy":
        """Returns the settings of what `to_dict` returned."""
        configs = fields["models"].items()
        parsed = {
            "models": {size: models.from_dict(config) for size, config in configs},
            "recipes": [Recipe.from_dict(recipe) for recipe in fields["recipes"]],
        }
        for run in _RUNS:
            if settings := fields[run]:
                one = "mixture" in settings
                by_size = {} if one else {n: from_flat(**each) for n, each in settings.items()}
                parsed[run] = from_flat(**settings) if one else by_size
        return cls(**{**fields, **parsed})


def candidates(study: ScalingStudy, recipe: Recipe) -> list[Recipe]:
    """Returns the recipes that a method's hyper-parameters are chosen from; one if not swept."""
    swept = study.swept.get(recipe.method)
    if not swept:
        return [recipe]
    known = METHODS[recipe.method].hyper_parameters
    for name in swept:
        if name not in known:
            raise UnknownNameError(f"setting of {recipe.method} to sweep", name, known)
    fixed = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    return grid({name: value for name, value in fixed.items() if name not in swept}, swept)


def constituents(study: ScalingStudy, count: int, seed: int) -> tuple[str, ...]:
    """Returns the categories whose experts are merged, drawn by seed and count alone."""
    drawn = np.random.default_rng((seed, count)).permutation(len(study.categories))[:count]
    return tuple(study.categories[index] for index in sorted(drawn))


@dataclasses.dataclass(frozen=True)
class MergeCell:
    """One cell of the grid; cells with the same experts and recipe share a model.

    Attributes:
        recipe: The recipe with the cell's seed, before swept hyper-parameters are chosen.
        model: The model's name, and the folder of its results.
        stage: The stage that makes all merges of the same experts.
    """

    size: str
    base: str
    recipe: Recipe
    count: int
    seed: int
    categories: tuple[str, ...]
    stage: str
    model: str


def merges(study: ScalingStudy) -> Iterator[MergeCell]:
    """Yields every cell of the grid."""
    for size in study.models:
        for base in study.bases:
            for recipe in study.recipes:
                for count in study.expert_counts:
                    for seed in study.seeds:
                        categories = constituents(study, count, seed)
                        every = count == len(study.categories)
                        names = "all" if every else "+".join(categories)
                        stage = f"results/merges/{size}/{base}/{names}"
                        draws = METHODS[recipe.method].draws
                        name = recipe.method + (f"-seed{seed}" if draws else "")
                        seeded = dataclasses.replace(recipe, seed=seed) if draws else recipe
                        model = f"{stage.removeprefix('results/')}/{name}"
                        yield MergeCell(size, base, seeded, count, seed, categories, stage, model)


def _own_tasks(study: ScalingStudy) -> dict[str, OwnTask]:
    return own_tasks.read(study.own_tasks, "ScalingStudy.own_tasks")


def data_settings(study: ScalingStudy, mixtures: Iterable[str] | None = None) -> JsonObject:
    """Returns the data of a stage of these mixtures; None: of all."""
    used = (*study.categories, *study.held_out) if mixtures is None else mixtures
    own = own_tasks.settings_of(_own_tasks(study), used, study.digests, held_out=study.held_out)
    return {"data": [study.vocabulary, study.source], "m2l": __version__, **own}


def model_stages(study: ScalingStudy) -> list[Stage]:
    """Returns the stages that make bases, experts and multitask models, and evaluate them."""
    evaluated_on, everything = evaluation_settings(study), study.categories + study.held_out
    stages = list(_train_stages(study))
    for stage in list(stages):
        kind, _, base, *category = stage.name.split("/")
        if base not in study.bases:
            continue  # Only what another base is trained from.
        categories = category if kind == "experts" else everything
        settings = {**evaluated_on, "categories": list(categories)}
        stages.append(Stage(f"results/{stage.name}", "evaluate", settings, {"model": stage.name}))
    return stages


def _train_stages(study: ScalingStudy) -> Iterator[Stage]:
    """Yields the stages of bases, experts and multitask models, size by size."""
    every = "+".join(study.categories)
    for size, config in study.models.items():
        described = models.to_dict(config)

        def train(name: str, run: str, mixture: str = "", init: str | None = None) -> Stage:
            if name in study.given:
                digest = study.digests.get(name) or given_checkpoints.digest_of(study.given[name])
                path = study.given[name]
                return given_checkpoints.stage_of(name, path, digest, study.vocabulary, described)  # noqa: B023
            settings = study.training(run, size)  # noqa: B023
            settings = on_mixture(settings, mixture or settings.mixture)
            if run == "expert":
                steps = study.expert_steps.get(mixture, settings.steps)
                settings = with_steps(settings, steps)
            decided_by = {
                **data_settings(study, settings.mixture.split("+")),
                "model": described,  # noqa: B023
                "settings": settings.flat(),
            }
            return Stage(name, "train", decided_by, {"init": init} if init else {})

        pretrained, instruct = (f"bases/{size}/{base}" for base in BASES)
        if "pretrained" in study.bases or instruct not in study.given:
            yield train(pretrained, "pretrain")
        if "instruct" in study.bases:
            yield train(instruct, "instruct", init=pretrained)
        for base in study.bases:
            base_name = f"bases/{size}/{base}"
            for category in study.categories:
                yield train(f"experts/{size}/{base}/{category}", "expert", category, base_name)
            yield train(f"multitask/{size}/{base}", "multitask", every, base_name)


def evaluation_settings(study: ScalingStudy) -> JsonObject:
    """Returns what decides the evaluation of a model of the study, as JSON values."""
    expert = study.training("expert", next(iter(study.models)))
    return {
        **data_settings(study),
        "split": study.split,
        "original_only": study.original_only,
        "prompts": study.max_prompts,
        "max_examples": study.max_examples,
        "batch_size": study.eval_batch_size,
        "generative_score": study.generative_score,
        **Shots(study.shots, study.shots_seed).settings(),
        "lengths": expert.lengths,
        "all_categories": list(study.categories + study.held_out),
    }


def merge_inputs(size: str, base: str, categories: tuple[str, ...]) -> dict[str, str]:
    """Returns the stages that a merge of these categories' experts reads, by role."""
    inputs = {"base": f"bases/{size}/{base}"}
    for category in categories:
        inputs[f"expert/{category}"] = f"experts/{size}/{base}/{category}"
    return inputs


def _choice_stages(study: ScalingStudy, evaluated_on: Mapping[str, Json]) -> Iterator[Stage]:
    if not study.swept:
        return
    for size in study.models:
        for base in study.bases:
            for count in study.expert_counts:
                sets = dict.fromkeys(constituents(study, count, seed) for seed in study.seeds)
                drawn = {category for categories in sets for category in categories}
                involved = tuple(c for c in study.categories if c in drawn)
                settings = {
                    **evaluated_on,
                    "choosing": [study.choosing_prompts, study.choosing_examples],
                    "choosing_categories": list(study.categories),
                    "sets": [list(categories) for categories in sets],
                    "candidates": {
                        recipe.method: [c.to_dict() for c in candidates(study, recipe)]
                        for recipe in study.recipes
                        if recipe.method in study.swept
                    },
                    "swept": {method: list(values) for method, values in study.swept.items()},
                }
                inputs = merge_inputs(size, base, involved)
                yield Stage(f"choices/{size}/{base}/{count}", "choose", settings, inputs)

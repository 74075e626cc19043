"""Paper 2's study: a skill by continued fine-tuning, by retraining, or trained apart and merged.

Source: Morrison et al., "Merge to Learn: Efficiently Adding Skills to Language Models with Model
Merging" (2024), sections 2 and 3.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from m2l import models, tasks
from m2l.data.prompts import GENERATIVE_SCORES
from m2l.data.shots import Shots, without_idle
from m2l.errors import ConfigError, UnknownNameError
from m2l.merging import Recipe
from m2l.merging.recipe import preset
from m2l.models.fields import FRACTION, NOT_NEGATIVE, check_choice, check_fields
from m2l.studies import given_checkpoints, own_tasks
from m2l.studies.graph import Graph, Stage
from m2l.studies.own_tasks import OwnTask, OwnTasks
from m2l.training.settings import TrainSettings, from_flat, on_mixture, with_steps
from m2l.typing import Json, JsonObject
from m2l.version import __version__

BASE = "pretrained"
GENERAL = "general"
ALL = "all"
_RUNS = ("pretrain", "finetune")
METHODS = ("task_arithmetic", "linear", "wise_ft", "ties_mergekit", "ties", "dare")
# Those that move from the general model to another end, as far as the weight says.
_INTERPOLATING = ("linear", "wise_ft")


@dataclasses.dataclass(frozen=True)
class SkillsStudy:
    """The study's settings.

    Attributes:
        model: The models' configuration.
        finetune: Trains all other models; the mixture is set by each stage, the steps are those
            of `epochs` over the stage's own data. Where there is a `validation`, it is of the same
            mixtures, and the best checkpoint is what stays.
        general: The mixture G of the general model.
        skills: The mixture D of each skill, by the skill's name.
        evaluations: The mixtures to evaluate on, by name: "general", every skill, and further ones
            ("exaggerated_refusals").
        examples: The number of training examples of each mixture, |G| and |D|: steps, costs and
            the heuristic weight follow from them. Those of own tasks are counted.
        pretrain: Trains theta_pre from a random model; None: it is given.
        given: Checkpoints, or directories of Hugging Face or T5X, that replace stages, by the name
            of the stage: "models/pretrained" (theta_pre), "models/general", "models/ptm/SKILL".
        own_tasks: Tasks of your own JSON lines, see `own_tasks.read`, to be used in the
            mixtures by their names or categories.
        epochs: Passes over the data.
        warmup: The share of each run's steps in which the learning rate rises; 0: as `finetune`.
        weights: The values of w that merges are made with, in addition to the heuristic's.
        methods: Merge methods, of METHODS.
        density: The density of TIES and of DARE.
        parts: The percentages of a skill's data for the data curves, in addition to 100: mixtures
            D_20pct, ....
        retrained_parts: Those of them for which the expensive retraining is done as well.
        vocabulary, source, split: As of a ScalingStudy.
        max_examples: Examples of each task at most.
        eval_batch_size: Examples in an evaluation batch.
        generative_score, shots, shots_seed: As of a ScalingStudy.
        digests: As of a ScalingStudy; `resolved` sets it.
    """

    model: models.Config
    finetune: TrainSettings
    general: str
    skills: Mapping[str, str]
    evaluations: Mapping[str, str]
    examples: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pretrain: TrainSettings | None = None
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own_tasks: OwnTasks = dataclasses.field(default_factory=dict)
    epochs: int = 2
    warmup: float = dataclasses.field(default=0.0, metadata=FRACTION)
    weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    methods: tuple[str, ...] = METHODS
    density: float = dataclasses.field(default=0.5, metadata={"above": 0, "below": 1})
    parts: tuple[int, ...] = ()
    retrained_parts: tuple[int, ...] = ()
    vocabulary: str = "microworld"
    source: str = "microworld"
    split: str = "validation"
    max_examples: int = 100
    eval_batch_size: int = 32
    generative_score: str = "decoding"
    shots: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    shots_seed: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, models.Config):
            raise ConfigError(f"SkillsStudy.model: expected a model, found {self.model!r}")
        for name in _RUNS:
            is_none = name == "pretrain" and self.pretrain is None
            if not is_none and not isinstance(getattr(self, name), TrainSettings):
                raise ConfigError(f"SkillsStudy.{name}: expected @Train(), found a plain value")
        check_fields(self)
        for name in ("skills", "evaluations", "examples", "given"):
            value, optional = getattr(self, name), name in ("examples", "given")
            if not isinstance(value, Mapping) or not (optional or value):
                raise ConfigError(f"SkillsStudy.{name}: expected a dict")
        if self.pretrain is None and f"models/{BASE}" not in self.given:
            raise ConfigError(
                f"SkillsStudy: models/{BASE} is neither given nor are there settings to train it "
                "by: set .given or .pretrain"
            )
        if {GENERAL, ALL} & set(self.skills) or any(set("+/") & set(name) for name in self.skills):
            raise ConfigError("SkillsStudy.skills: none may be called general, all, or have + or /")
        for name in (GENERAL, *self.skills):
            if name not in self.evaluations:
                raise ConfigError(f"SkillsStudy.evaluations: nothing measures {name!r}")
        for mixture in (self.general, *self.skills.values()):
            if self.examples.get(mixture, 0) < 1 and not (self.own_tasks and not self.digests):
                raise ConfigError(f"SkillsStudy.examples: how many {mixture!r} has is missing")
        for method in self.methods:
            if not isinstance(method, str) or method not in METHODS:
                raise UnknownNameError("SkillsStudy.methods: method", str(method), METHODS)
        if "task_arithmetic" not in self.methods:
            raise ConfigError("SkillsStudy.methods: task_arithmetic is what findings are read from")
        check_choice(self, "generative_score", GENERATIVE_SCORES)
        Shots(self.shots, self.shots_seed)
        if any(not 0 < weight <= 1 for weight in self.weights) or not self.weights:
            raise ConfigError(f"SkillsStudy.weights: {self.weights} are not all in (0, 1]")
        if any(not 0 < part < 100 for part in self.parts):
            raise ConfigError(f"SkillsStudy.parts: {self.parts} are not all percents below 100")
        if set(self.retrained_parts) - set(self.parts):
            raise ConfigError("SkillsStudy.retrained_parts: not all of them are among the parts")

    def stage_graph(self) -> Graph:
        """Returns the study's stages: models of all regimes, merges, and evaluations."""
        described = models.to_dict(self.model)
        measured = list(self.evaluations.values())
        evaluated_on = {
            **_data_settings(self, measured),
            "split": self.split,
            "original_only": False,
            "prompts": 0,
            "max_examples": self.max_examples,
            "batch_size": self.eval_batch_size,
            "generative_score": self.generative_score,
            **Shots(self.shots, self.shots_seed).settings(),
            "lengths": self.finetune.lengths,
            "all_categories": measured,
            "categories": measured,
        }

        def stage(name: str, settings: TrainSettings | None, inputs: Mapping[str, str]) -> Stage:
            if name in self.given:
                path = self.given[name]
                digest = self.digests.get(name) or given_checkpoints.digest_of(path)
                return given_checkpoints.stage_of(name, path, digest, self.vocabulary, described)
            mixtures = (*settings.mixture.split("+"), *settings.validation.split("+"))
            decided_by = {"model": described, "settings": settings.flat()}
            return Stage(name, "train", _data_settings(self, mixtures) | decided_by, inputs)

        stages = [stage(f"models/{BASE}", self.pretrain, {})]
        for model in trained_models(self):
            settings = on_mixture(
                with_steps(self.finetune, steps(self, model.examples), self.warmup),
                "+".join(mixture for mixture, _ in model.data),
                validation="+".join(model.wholes),
            )
            stages.append(stage(f"models/{model.name}", settings, {"init": f"models/{model.init}"}))
        for trained in list(stages):
            inputs = {"model": trained.name}
            stages.append(Stage(f"results/{trained.name}", "evaluate", evaluated_on, inputs))
        groups: dict[str, list[SkillMerge]] = {}
        for merge in merges(self):
            groups.setdefault(merge.group, []).append(merge)
        for group, members in groups.items():
            _, names, regime = group.split("/")
            inputs = {"base": f"models/{BASE}", "expert/general": f"models/{GENERAL}"}
            for name in names.split("+"):
                inputs[f"expert/{name}"] = f"models/{regime}/{name}"
            recipes = {merge.name: merge.recipe.to_dict() for merge in members}
            settings = {**evaluated_on, "recipes": recipes, "keep": False}
            stages.append(Stage(f"results/{group}", "merge", settings, inputs))
        return Graph(stages)

    def check_mixtures(self) -> None:
        """Checks that all names exist, before anything is trained.

        Raises:
            UnknownNameError: There is no such source, mixture or stage.
            ConfigError: An own task lacks a part that is used.
            CheckpointError: A checkpoint of `given` cannot be used.
        """
        stages = [stage for stage in self.stage_graph() if stage.kind in ("train", "given")]
        own = _own_tasks(self)
        for stage in stages:
            own_tasks.declare(stage.settings if stage.kind == "train" else _data_settings(self))
            if stage.kind == "train":
                settings = stage.settings["settings"]
                for name in ("mixture", "validation"):
                    for mixture in filter(None, settings[name].split("+")):
                        tasks.tasks_in(mixture)
                        part = "train" if name == "mixture" else "choose"
                        own_tasks.check_part(own, mixture, part, "SkillsStudy.own_tasks")
        own_tasks.declare(_data_settings(self))
        for evaluation in self.evaluations.values():
            tasks.tasks_in(evaluation)
            for mixture in evaluation.split("+"):
                own_tasks.check_part(own, mixture, "report", "SkillsStudy.own_tasks")
        trained = dict.fromkeys((stage.name for stage in stages), self.model)
        given_checkpoints.check(self.given, trained, "SkillsStudy.given")

    def resolved(self) -> "SkillsStudy":
        """Returns the study with the digests and the numbers of examples of what it starts from."""
        own, used = _own_tasks(self), set(_mixtures(self))
        own = {n: task for n, task in own.items() if used & {task.name, task.category}}
        counted = {
            mixture: sum(task.train_examples() for task in own_in)
            for mixture in (self.general, *self.skills.values())
            if mixture not in self.examples and (own_in := own_tasks.tasks_of(own, mixture))
        }
        digests = {task.name: task.digest() for task in own.values()}
        digests |= {name: given_checkpoints.digest_of(path) for name, path in self.given.items()}
        return dataclasses.replace(
            self,
            own_tasks={f"{task.category}/{task.name}": task.setting for task in own.values()},
            examples={**self.examples, **counted},
            digests=digests,
        )

    def tasks_of(self, evaluation: str) -> list[str]:
        """Returns the tasks that an evaluation consists of, by its name."""
        own, names = _own_tasks(self), []
        for mixture in self.evaluations[evaluation].split("+"):
            own_names = [task.name for task in own_tasks.tasks_of(own, mixture)]
            names += own_names or tasks.tasks_in(mixture)
        return [name for name in names if name in own or tasks.info(name).kind != "train"]

    def to_dict(self) -> JsonObject:
        """Returns the settings as JSON values."""
        fields = without_idle(dataclasses.asdict(self)) | {"model": models.to_dict(self.model)}
        return fields | {run: getattr(self, run).flat() for run in _RUNS if getattr(self, run)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Json]) -> "SkillsStudy":
        """Returns the settings of what `to_dict` returned."""
        runs = {run: from_flat(**fields[run]) for run in _RUNS if fields[run]}
        return cls(**{**fields, "model": models.from_dict(fields["model"]), **runs})


def _own_tasks(study: SkillsStudy) -> dict[str, OwnTask]:
    return own_tasks.read(study.own_tasks, "SkillsStudy.own_tasks")


def _mixtures(study: SkillsStudy) -> list[str]:
    used = (study.general, *study.skills.values(), *study.evaluations.values())
    return [part for mixture in used for part in mixture.split("+")]


def _data_settings(study: SkillsStudy, mixtures: Sequence[str] | None = None) -> JsonObject:
    """Returns the data of a stage of these mixtures; None: of all."""
    used = _mixtures(study) if mixtures is None else mixtures
    used = [part for mixture in used for part in mixture.split("+")]
    percents = {
        _part(study, skill, part)[0]: (study.skills[skill], part)
        for skill in study.skills
        for part in study.parts
    }
    own = own_tasks.settings_of(_own_tasks(study), used, study.digests, percents=percents)
    return {"data": [study.vocabulary, study.source], "m2l": __version__, **own}


# --- trained models ---


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model of the study that is trained.

    Attributes:
        name: The name of its stage: "ptm/science", "cft/science_20pct", "rt/all".
        regime: "general", "ptm" (the skill's own model, to be merged), "cft" or "rt".
        skill: The skill's name, or "all"; "general" for the general model.
        part: Percent of the skill's data.
        init: The stage whose model it starts from.
        data: The mixtures it is trained on, each with its number of examples.
        wholes: The same mixtures, with all of a skill's data.
    """

    name: str
    regime: str
    skill: str
    part: int
    init: str
    data: tuple[tuple[str, int], ...]
    wholes: tuple[str, ...]

    @property
    def examples(self) -> int:
        """The number of examples of an epoch."""
        return sum(count for _, count in self.data)


def _part(study: SkillsStudy, skill: str, part: int) -> tuple[str, int]:
    mixture = study.skills[skill]
    count = study.examples[mixture]
    return (mixture, count) if part == 100 else (f"{mixture}_{part}pct", count * part // 100)


def trained_models(study: SkillsStudy) -> Iterator[TrainedModel]:
    """Yields the general model, and the models of three regimes for each skill and for all."""
    general = (study.general, study.examples[study.general])

    def model(regime: str, skill: str, part: int, with_general: bool = False) -> TrainedModel:
        name = skill if part == 100 else f"{skill}_{part}pct"
        chosen = list(study.skills) if skill == ALL else [skill]
        data = [general] * with_general + [_part(study, each, part) for each in chosen]
        wholes = [study.general] * with_general + [study.skills[each] for each in chosen]
        init = GENERAL if regime == "cft" else BASE
        return TrainedModel(
            f"{regime}/{name}", regime, skill, part, init, tuple(data), tuple(wholes)
        )

    yield TrainedModel(GENERAL, GENERAL, GENERAL, 100, BASE, (general,), (study.general,))
    for skill in study.skills:
        for part in (100, *study.parts):
            yield model("ptm", skill, part)
            yield model("cft", skill, part)
            if part == 100 or part in study.retrained_parts:
                yield model("rt", skill, part, with_general=True)
    if len(study.skills) > 1:
        yield model("cft", ALL, 100)
        yield model("rt", ALL, 100, with_general=True)


def steps(study: SkillsStudy, examples: int) -> int:
    """Returns the optimizer steps of all epochs over this number of examples."""
    return max(1, round(study.epochs * examples / study.finetune.batch_size))


# --- merges ---


@dataclasses.dataclass(frozen=True)
class SkillMerge:
    """A merged model of the study.

    Attributes:
        group: The stage that makes all merges of the same models.
        name: Its name within the group.
        method: Of METHODS.
        skills: The skills that are added.
        part: Percent of the skill's data.
        weights: w of each skill.
        heuristic: Whether the weights are |D| / |G|, which needs no tuning.
        recipe: The recipe; its experts are the general model and those of the skills.
    """

    group: str
    name: str
    method: str
    skills: tuple[str, ...]
    part: int
    weights: tuple[float, ...]
    heuristic: bool
    recipe: Recipe

    @property
    def model(self) -> str:
        """Its name among the study's models."""
        return f"{self.group}/{self.name}"


def recipe(method: str, weights: Sequence[float], density: float) -> Recipe:
    """Returns the recipe that merges a general model and the models of skills.

    Equations 1 to 6 of the paper, on the task vectors tau = theta - theta_pre; `weights` are w:
    task arithmetic theta_G + sum_i w_i tau_i (ties and dare add as it does, having trimmed or
    dropped; ties_mergekit is the paper's, which trims tensor by tensor, ties trims the whole
    model's); linear (1 - w) theta_G + w theta_D; WiSE-FT (1 - w) theta_G + w theta_CFT.

    Args:
        method: Of METHODS.
        weights: Of each skill.
        density: The share of each task vector that ties keeps, and dare on average.

    Returns:
        A recipe for the experts [general, *skills] (wise_ft: [general, continued]).
    """
    if method in _INTERPOLATING:
        (weight,) = weights
        return Recipe(method="average", weights=(1 - weight, weight))
    ours = (1.0, *weights)
    if method == "task_arithmetic":
        return Recipe(method=method, weights=ours)
    # As the paper's mergekit with normalize off: the weighted sum of what agrees.
    added = {"method": "ties", "density": density, "weights": ours, "consensus": "sum"}
    if method == "ties_mergekit":
        return Recipe(**preset("mergekit", added))
    if method == "ties":
        return Recipe(**added, weighted_signs=True)
    return Recipe(method="dare", drop_rate=1 - density, weights=ours)


def heuristic(method: str, skill: int, general: int) -> float:
    """Returns the weight without tuning, equation 7: |D| / |G|, or its share |D| / (|D| + |G|)."""
    return skill / (skill + general) if method in _INTERPOLATING else skill / general


def _partner_regime(study: SkillsStudy, method: str) -> str:
    """Returns the regime whose models a method merges with the general one."""
    return "cft" if method == "wise_ft" else "ptm"


def merges(study: SkillsStudy) -> Iterator[SkillMerge]:
    """Yields each skill along w by every method; parts, pairs and all skills by the heuristic."""
    size = {skill: study.examples[mixture] for skill, mixture in study.skills.items()}
    general = study.examples[study.general]
    for skill in study.skills:
        for method in study.methods:
            group = f"merges/{skill}/{_partner_regime(study, method)}"
            zero = heuristic(method, size[skill], general)
            # The heuristic's may be one of the weights that are tried: then it is made once.
            for weight in dict.fromkeys((*study.weights, zero)):
                if method in _INTERPOLATING and weight == 1:
                    continue  # that is the other end
                tried = weight in study.weights
                name = f"{method}-{weight:g}" if tried else f"{method}-heuristic"
                merged = recipe(method, (weight,), study.density)
                is_heuristic = weight == zero
                yield SkillMerge(
                    group, name, method, (skill,), 100, (weight,), is_heuristic, merged
                )
        for part in study.parts:
            _, count = _part(study, skill, part)
            zero = heuristic("task_arithmetic", count, general)
            merged = recipe("task_arithmetic", (zero,), study.density)
            group = f"merges/{skill}_{part}pct/ptm"
            name = "task_arithmetic-heuristic"
            yield SkillMerge(group, name, "task_arithmetic", (skill,), part, (zero,), True, merged)
    several = [method for method in study.methods if method not in _INTERPOLATING]
    for count in range(2, len(study.skills) + 1):
        for chosen in itertools.combinations(study.skills, count):
            zeros = tuple(heuristic("task_arithmetic", size[skill], general) for skill in chosen)
            for method in several if count == len(study.skills) else ("task_arithmetic",):
                merged = recipe(method, zeros, study.density)
                group, name = f"merges/{'+'.join(chosen)}/ptm", f"{method}-heuristic"
                yield SkillMerge(group, name, method, chosen, 100, zeros, True, merged)

"""Paper 2's study: a skill by continued fine-tuning, by retraining, or trained apart and merged.

Source: Morrison et al., "Merge to Learn: Efficiently Adding Skills to Language Models with Model
Merging" (2024), sections 2 and 3.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from m2l import models, tasks
from m2l.errors import ConfigError, UnknownNameError
from m2l.evaluation.metrics import GENERATIVE_SCORES
from m2l.merging import Recipe
from m2l.models.fields import check_choice, check_fields
from m2l.studies.graph import Graph, Stage
from m2l.training.settings import TrainSettings, from_flat
from m2l.typing import Json, JsonObject
from m2l.version import __version__

GENERAL = "general"
ALL = "all"
_RUNS = ("pretrain", "finetune")
METHODS = ("task_arithmetic", "linear", "wise_ft", "ties", "dare")
# Those that move from the general model to another end, as far as the weight says.
_INTERPOLATING = ("linear", "wise_ft")


@dataclasses.dataclass(frozen=True)
class SkillsStudy:
    """The study's settings.

    Attributes:
        model: The models' configuration.
        pretrain: Trains theta_pre from a random model.
        finetune: Trains all other models; the mixture is set by each stage, the steps are those
            of `epochs` over the stage's own data.
        general: The mixture G of the general model.
        skills: The mixture D of each skill, by the skill's name.
        evaluations: The mixtures to evaluate on, by name: "general", every skill, and further ones
            ("exaggerated_refusals").
        examples: The number of training examples of each mixture, |G| and |D|: steps, costs and
            the heuristic weight follow from them.
        epochs: Passes over the data.
        weights: The values of w that merges are made with, in addition to the heuristic's.
        methods: Merge methods, of METHODS.
        density: The density of TIES and of DARE.
        parts: The percentages of a skill's data for the data curves, in addition to 100: mixtures
            D_20pct, ....
        retrained_parts: Those of them for which the expensive retraining is done as well.
        vocabulary, source, split: As of a ScalingStudy.
        max_examples: Examples of each task at most.
        eval_batch_size: Examples in an evaluation batch.
        generative_score: The score of a task in free text, as of a ScalingStudy.
    """

    model: models.Config
    pretrain: TrainSettings
    finetune: TrainSettings
    general: str
    skills: Mapping[str, str]
    evaluations: Mapping[str, str]
    examples: Mapping[str, int]
    epochs: int = 2
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

    def __post_init__(self) -> None:
        if not isinstance(self.model, models.Config):
            raise ConfigError(f"SkillsStudy.model: expected a model, found {self.model!r}")
        for name in _RUNS:
            if not isinstance(getattr(self, name), TrainSettings):
                raise ConfigError(f"SkillsStudy.{name}: expected @Train(), found a plain value")
        check_fields(self)
        for name in ("skills", "evaluations", "examples"):
            if not isinstance(getattr(self, name), Mapping) or not getattr(self, name):
                raise ConfigError(f"SkillsStudy.{name}: expected a dict")
        if {GENERAL, ALL} & set(self.skills) or any(set("+/") & set(name) for name in self.skills):
            raise ConfigError("SkillsStudy.skills: none may be called general, all, or have + or /")
        for name in (GENERAL, *self.skills):
            if name not in self.evaluations:
                raise ConfigError(f"SkillsStudy.evaluations: nothing measures {name!r}")
        for mixture in (self.general, *self.skills.values()):
            if self.examples.get(mixture, 0) < 1:
                raise ConfigError(f"SkillsStudy.examples: how many {mixture!r} has is missing")
        for method in self.methods:
            if method not in METHODS:
                raise UnknownNameError("SkillsStudy.methods: method", method, METHODS)
        if "task_arithmetic" not in self.methods:
            raise ConfigError("SkillsStudy.methods: task_arithmetic is what findings are read from")
        check_choice(self, "generative_score", GENERATIVE_SCORES)
        if any(not 0 < weight <= 1 for weight in self.weights) or not self.weights:
            raise ConfigError(f"SkillsStudy.weights: {self.weights} are not all in (0, 1]")
        if any(not 0 < part < 100 for part in self.parts):
            raise ConfigError(f"SkillsStudy.parts: {self.parts} are not all percents below 100")
        if set(self.retrained_parts) - set(self.parts):
            raise ConfigError("SkillsStudy.retrained_parts: not all of them are among the parts")

    def stage_graph(self) -> Graph:
        """Returns the study's stages: models of all regimes, merges, and evaluations."""
        data = {"data": [self.vocabulary, self.source], "m2l": __version__}
        described = {**data, "model": models.to_dict(self.model)}
        evaluated_on = {
            **data,
            "split": self.split,
            "original_only": False,
            "prompts": 0,
            "max_examples": self.max_examples,
            "batch_size": self.eval_batch_size,
            "generative_score": self.generative_score,
            "lengths": {
                "inputs": self.finetune.input_length,
                "targets": self.finetune.target_length,
            },
            "all_categories": list(self.evaluations.values()),
            "categories": list(self.evaluations.values()),
        }
        pretrain = {**described, "settings": self.pretrain.flat()}
        stages = [Stage("models/pretrained", "train", pretrain)]
        for model in trained_models(self):
            settings = dataclasses.replace(
                self.finetune,
                mixture="+".join(mixture for mixture, _ in model.data),
                steps=steps(self, model.examples),
            )
            decided_by = {**described, "settings": settings.flat()}
            init = {"init": f"models/{model.init}"}
            stages.append(Stage(f"models/{model.name}", "train", decided_by, init))
        for stage in list(stages):
            inputs = {"model": stage.name}
            stages.append(Stage(f"results/{stage.name}", "evaluate", evaluated_on, inputs))
        groups: dict[str, list[SkillMerge]] = {}
        for merge in merges(self):
            groups.setdefault(merge.group, []).append(merge)
        for group, members in groups.items():
            _, names, regime = group.split("/")
            inputs = {"base": "models/pretrained", "expert/general": "models/general"}
            for name in names.split("+"):
                inputs[f"expert/{name}"] = f"models/{regime}/{name}"
            recipes = {merge.name: merge.recipe.to_dict() for merge in members}
            settings = {**evaluated_on, "recipes": recipes, "keep": False}
            stages.append(Stage(f"results/{group}", "merge", settings, inputs))
        return Graph(stages)

    def check_mixtures(self) -> None:
        """Checks that all names exist, before anything is trained.

        Raises:
            UnknownNameError: There is no such source or mixture.
        """
        tasks.use(self.source)
        for stage in self.stage_graph():
            if stage.kind == "train":
                for mixture in stage.settings["settings"]["mixture"].split("+"):
                    tasks.tasks_in(mixture)
        for mixture in self.evaluations.values():
            tasks.tasks_in(mixture)

    def to_dict(self) -> JsonObject:
        """Returns the settings as JSON values."""
        fields = dataclasses.asdict(self) | {"model": models.to_dict(self.model)}
        return fields | {run: getattr(self, run).flat() for run in _RUNS}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Json]) -> "SkillsStudy":
        """Returns the settings of what `to_dict` returned."""
        runs = {run: from_flat(**fields[run]) for run in _RUNS}
        return cls(**{**fields, "model": models.from_dict(fields["model"]), **runs})


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
    """

    name: str
    regime: str
    skill: str
    part: int
    init: str
    data: tuple[tuple[str, int], ...]

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
    yield TrainedModel("general", GENERAL, GENERAL, 100, "pretrained", (general,))
    for skill in study.skills:
        for part in (100, *study.parts):
            name = skill if part == 100 else f"{skill}_{part}pct"
            data = _part(study, skill, part)
            yield TrainedModel(f"ptm/{name}", "ptm", skill, part, "pretrained", (data,))
            yield TrainedModel(f"cft/{name}", "cft", skill, part, "general", (data,))
            if part == 100 or part in study.retrained_parts:
                yield TrainedModel(f"rt/{name}", "rt", skill, part, "pretrained", (general, data))
    if len(study.skills) > 1:
        every = tuple(_part(study, skill, 100) for skill in study.skills)
        yield TrainedModel("cft/all", "cft", ALL, 100, "general", every)
        yield TrainedModel("rt/all", "rt", ALL, 100, "pretrained", (general, *every))


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
    dropped); linear (1 - w) theta_G + w theta_D; WiSE-FT (1 - w) theta_G + w theta_CFT.

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
    if method == "ties":
        return Recipe(method=method, density=density, weights=ours, **_TIES_ADDS)
    return Recipe(method="dare", drop_rate=1 - density, weights=ours)


# mergekit's TIES, which the paper used with normalize off: the weighted sum of what agrees.
_TIES_ADDS: Mapping[str, Json] = {"consensus": "sum", "weighted_signs": True}


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

"""Paper 2: a skill by continued fine-tuning, by retraining, or trained apart and merged.

Source: Morrison et al., "Merge to Learn: Efficiently Adding Skills to Language Models with Model
Merging" (2024), sections 2 and 3.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m2l import models, tasks
from m2l.errors import ConfigError, UnknownNameError
from m2l.evaluation.metrics import GENERATIVE_SCORES
from m2l.merging import Recipe
from m2l.models.fields import check_fields
from m2l.studies.plan import Plan, Stage
from m2l.training.settings import TrainSettings, from_flat
from m2l.version import __version__

GENERAL = "general"
ALL = "all"
METHODS = ("task_arithmetic", "linear", "wise_ft", "ties", "dare")
# Those that move from the general model to another end, as far as the weight says.
_INTERPOLATING = ("linear", "wise_ft")


@dataclasses.dataclass(frozen=True)
class SkillsStudy:
    """The study's settings.

    Attributes:
        model: The models' configuration.
        pretrain: How theta_pre is made from a random model.
        finetune: How everything else is made; its mixture is set by each stage, its steps are those
            of `epochs` over the stage's own data.
        general: The mixture G that makes the general model.
        skills: By the name of a skill, its mixture D.
        evaluations: By what is measured, the mixture that measures it: "general", every skill by
            its name, and whatever else ("exaggerated_refusals").
        examples: By mixture, how many examples it trains on, |G| and |D|: steps, costs and the
            heuristic weight follow from them.
        epochs: Passes over the data.
        weights: The values of w that merges are made with, beside the heuristic's.
        methods: Ways of merging, of METHODS.
        density: What TIES keeps, and DARE does.
        parts: The percents of a skill's data that curves are drawn by, beside all of it: mixtures
            D_20pct, ....
        retrained_parts: Those of them for which the dear retraining is done as well.
        vocabulary, source, split: As of a ScalingStudy.
        max_examples: Examples of each task at most.
        eval_batch_size: Examples in an evaluation batch.
        generative_score: What stands for a task in free text.
    """

    model: Any
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
        for name in ("pretrain", "finetune"):
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
        if self.generative_score not in GENERATIVE_SCORES:
            raise UnknownNameError(
                "SkillsStudy.generative_score", self.generative_score, GENERATIVE_SCORES
            )
        if any(not 0 < weight <= 1 for weight in self.weights) or not self.weights:
            raise ConfigError(f"SkillsStudy.weights: {self.weights} are not all in (0, 1]")
        if any(not 0 < part < 100 for part in self.parts):
            raise ConfigError(f"SkillsStudy.parts: {self.parts} are not all percents below 100")
        if set(self.retrained_parts) - set(self.parts):
            raise ConfigError("SkillsStudy.retrained_parts: not all of them are among the parts")


# --- what is trained ---


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model of the study that is trained.

    Attributes:
        name: Its stage: "ptm/science", "cft/science_20pct", "rt/all".
        regime: "general", "ptm" (the skill's own model, to be merged), "cft" or "rt".
        skill: The skill's name, or "all"; "general" for the general model.
        part: Percent of the skill's data.
        init: The stage it starts from.
        data: What it is trained on: mixture and examples.
    """

    name: str
    regime: str
    skill: str
    part: int
    init: str
    data: tuple[tuple[str, int], ...]

    @property
    def examples(self) -> int:
        """How many examples an epoch has."""
        return sum(count for _, count in self.data)


def _part(study: SkillsStudy, skill: str, part: int) -> tuple[str, int]:
    mixture = study.skills[skill]
    count = study.examples[mixture]
    return (mixture, count) if part == 100 else (f"{mixture}_{part}pct", count * part // 100)


def trained(study: SkillsStudy) -> Iterator[Trained]:
    """The general model, and of each skill and of all together the models of three regimes."""
    general = (study.general, study.examples[study.general])
    yield Trained("general", GENERAL, GENERAL, 100, "pretrained", (general,))
    for skill in study.skills:
        for part in (100, *study.parts):
            name = skill if part == 100 else f"{skill}_{part}pct"
            data = _part(study, skill, part)
            yield Trained(f"ptm/{name}", "ptm", skill, part, "pretrained", (data,))
            yield Trained(f"cft/{name}", "cft", skill, part, "general", (data,))
            if part == 100 or part in study.retrained_parts:
                yield Trained(f"rt/{name}", "rt", skill, part, "pretrained", (general, data))
    if len(study.skills) > 1:
        every = tuple(_part(study, skill, 100) for skill in study.skills)
        yield Trained("cft/all", "cft", ALL, 100, "general", every)
        yield Trained("rt/all", "rt", ALL, 100, "pretrained", (general, *every))


def steps(study: SkillsStudy, examples: int) -> int:
    """Optimizer steps of all epochs over so many examples."""
    return max(1, round(study.epochs * examples / study.finetune.batch_size))


# --- what is merged ---


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merged model of the study.

    Attributes:
        group: The stage that makes it, with all of the same models.
        name: Its name within the group.
        method: Of METHODS.
        skills: What is added.
        part: Percent of the skill's data.
        weights: w of each skill.
        heuristic: Whether the weights are |D| / |G|, found without trying any.
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
    """How a general model and the models of skills become one.

    Equations 1 to 6 of the paper, on the task vectors tau = theta - theta_pre; `weights` are w:
    task arithmetic theta_G + sum_i w_i tau_i (ties and dare add as it does, having trimmed or
    dropped); linear (1 - w) theta_G + w theta_D; WiSE-FT (1 - w) theta_G + w theta_CFT.

    Args:
        method: Of METHODS.
        weights: Of each skill.
        density: What ties keeps of each task vector, and dare does on average.

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
_TIES_ADDS: Mapping[str, Any] = {"consensus": "sum", "weighted_signs": True}


def heuristic(method: str, skill: int, general: int) -> float:
    """The weight that needs no trying, equation 7: |D| / |G|, or its share |D| / (|D| + |G|)."""
    return skill / (skill + general) if method in _INTERPOLATING else skill / general


def _others(study: SkillsStudy, method: str) -> str:
    """The regime whose models a method merges with the general one."""
    return "cft" if method == "wise_ft" else "ptm"


def merges(study: SkillsStudy) -> Iterator[Merge]:
    """Each skill along w by every method; pairs and all skills, and parts, by the heuristic's w."""
    size = {skill: study.examples[mixture] for skill, mixture in study.skills.items()}
    general = study.examples[study.general]
    for skill in study.skills:
        for method in study.methods:
            group = f"merges/{skill}/{_others(study, method)}"
            zero = heuristic(method, size[skill], general)
            # The heuristic's may be one of the weights that are tried: then it is made once.
            for weight in dict.fromkeys((*study.weights, zero)):
                if method in _INTERPOLATING and weight == 1:
                    continue  # that is the other end
                tried = weight in study.weights
                name = f"{method}-{weight:g}" if tried else f"{method}-heuristic"
                made = recipe(method, (weight,), study.density)
                yield Merge(group, name, method, (skill,), 100, (weight,), weight == zero, made)
        for part in study.parts:
            _, count = _part(study, skill, part)
            zero = heuristic("task_arithmetic", count, general)
            made = recipe("task_arithmetic", (zero,), study.density)
            group = f"merges/{skill}_{part}pct/ptm"
            name = "task_arithmetic-heuristic"
            yield Merge(group, name, "task_arithmetic", (skill,), part, (zero,), True, made)
    several = [method for method in study.methods if method not in _INTERPOLATING]
    for count in range(2, len(study.skills) + 1):
        for chosen in itertools.combinations(study.skills, count):
            zeros = tuple(heuristic("task_arithmetic", size[skill], general) for skill in chosen)
            for method in several if count == len(study.skills) else ("task_arithmetic",):
                made = recipe(method, zeros, study.density)
                group, name = f"merges/{'+'.join(chosen)}/ptm", f"{method}-heuristic"
                yield Merge(group, name, method, chosen, 100, zeros, True, made)


# --- the plan ---


def plan(study: SkillsStudy) -> Plan:
    """The study's stages: models of all regimes, merges, and the evaluation of each."""
    data = {"data": [study.vocabulary, study.source], "m2l": __version__}
    described = {**data, "model": models.to_dict(study.model)}
    evaluated_on = {
        **data,
        "split": study.split,
        "original_only": False,
        "prompts": 0,
        "max_examples": study.max_examples,
        "batch_size": study.eval_batch_size,
        "generative_score": study.generative_score,
        "lengths": {
            "inputs": study.finetune.input_length,
            "targets": study.finetune.target_length,
        },
        "all_categories": list(study.evaluations.values()),
        "categories": list(study.evaluations.values()),
    }
    pretrain = {**described, "settings": study.pretrain.flat()}
    stages = [Stage("models/pretrained", "train", pretrain)]
    for model in trained(study):
        settings = dataclasses.replace(
            study.finetune,
            mixture="+".join(mixture for mixture, _ in model.data),
            steps=steps(study, model.examples),
        )
        decided_by = {**described, "settings": settings.flat()}
        init = {"init": f"models/{model.init}"}
        stages.append(Stage(f"models/{model.name}", "train", decided_by, init))
    for stage in list(stages):
        inputs = {"model": stage.name}
        stages.append(Stage(f"results/{stage.name}", "evaluate", evaluated_on, inputs))
    groups: dict[str, list[Merge]] = {}
    for merge in merges(study):
        groups.setdefault(merge.group, []).append(merge)
    for group, made in groups.items():
        _, names, regime = group.split("/")
        inputs = {"base": "models/pretrained", "expert/general": "models/general"}
        for name in names.split("+"):
            inputs[f"expert/{name}"] = f"models/{regime}/{name}"
        recipes = {merge.name: merge.recipe.to_dict() for merge in made}
        settings = {**evaluated_on, "recipes": recipes, "keep": False}
        stages.append(Stage(f"results/{group}", "merge", settings, inputs))
    return Plan(stages)


def check_mixtures(study: SkillsStudy) -> None:
    """Refuses names that nothing answers to, before anything is trained.

    Raises:
        UnknownNameError: no such source or mixture.
    """
    tasks.use(study.source)
    for stage in plan(study):
        if stage.kind == "train":
            for mixture in stage.settings["settings"]["mixture"].split("+"):
                tasks.tasks_in(mixture)
    for mixture in study.evaluations.values():
        tasks.tasks_in(mixture)


# --- the study's settings on disk ---


def to_dict(study: SkillsStudy) -> dict[str, Any]:
    """The settings as plain JSON values."""
    fields = dataclasses.asdict(study) | {"model": models.to_dict(study.model)}
    return fields | {run: getattr(study, run).flat() for run in ("pretrain", "finetune")}


def from_dict(fields: Mapping[str, Any]) -> SkillsStudy:
    """The settings that `to_dict` wrote."""
    runs = {run: from_flat(**fields[run]) for run in ("pretrain", "finetune")}
    return SkillsStudy(**{**fields, "model": models.from_dict(fields["model"]), **runs})

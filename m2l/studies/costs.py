"""What a stage costs before it is run: arithmetic, time and disk."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from m2l import checkpoints, models, tasks
from m2l.studies.plan import Plan, Stage
from m2l.studies.stages import prompts
from m2l.training import resources

# Of the peak, what training and evaluation reach as a whole: what the trainer's MFU and the
# evaluator's bench come to for models that fill a device. Small models reach less.
UTILISATION = 0.4
_CHOICES = 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stage costs.

    Attributes:
        flops: Floating-point operations of its matrix products.
        disk: Bytes that stay.
    """

    flops: float
    disk: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.disk + other.disk)


NOTHING = Cost(0.0, 0.0)


def of_stage(stage: Stage, plan: Plan) -> Cost:
    """A stage's cost; of evaluations an upper bound, for it takes examples as long as allowed.

    Args:
        stage: One of the plan's.
        plan: The study's plan.
    """
    if stage.kind == "given":
        return NOTHING
    settings = stage.settings
    if stage.kind == "train":
        config, how = models.from_dict(settings["model"]), settings["settings"]
        rows = how["batch_size"], how["input_length"], how["target_length"]
        # The optimizer's state is factored, a few per cent of this.
        disk = 4.0 * models.parameters(config) * how["keep"]
        return Cost(resources.step_flops(config, *rows) * how["steps"], disk)
    config = _config(stage, plan)
    lengths = settings["lengths"]["inputs"], settings["lengths"]["targets"]
    per_example = resources.evaluation_flops(config, 1, *lengths, choices=_CHOICES)
    if stage.kind == "choose":
        count, examples = settings["choosing"]
        candidates = sum(map(len, settings["candidates"].values()))
        on = sum(_tasks(one, settings, count) for one in settings["sets"]) * candidates
        return Cost(per_example * on * examples, 0.0)
    on = _tasks(settings["categories"], settings, settings["prompts"])
    merges = settings.get("recipes", {"": None})
    kept = 4.0 * models.parameters(config) * len(merges) if settings.get("keep") else 0.0
    result = 1000.0  # bytes of a result's file
    cost = Cost(per_example * on * settings["max_examples"] * len(merges), kept)
    return cost + Cost(0.0, result * on * len(merges))


def _tasks(categories: Iterable[str], settings: Mapping[str, Any], most: int) -> int:
    tasks.use(settings["data"][1])
    suffix = tasks.ORIGINAL if settings["original_only"] else ""
    return sum(_count(category + suffix, most) for category in categories)


@functools.cache
def _count(mixture: str, most: int) -> int:
    return len(prompts(mixture, most))


def _config(stage: Stage, plan: Plan) -> models.Config:
    """The configuration of the models that the stage evaluates."""
    made = plan[next(iter(stage.inputs.values()))]
    if made.kind == "train":
        return models.from_dict(made.settings["model"])
    return models.from_dict(checkpoints.read_manifest(made.settings["checkpoint"]).model)


def of_plan(plan: Plan) -> dict[str, Cost]:
    """By stage, its cost."""
    return {stage.name: of_stage(stage, plan) for stage in plan}


def seconds(cost: Cost, peak: float) -> float:
    """The time for it on devices with this peak, in operations a second of all together."""
    return cost.flops / (UTILISATION * peak)

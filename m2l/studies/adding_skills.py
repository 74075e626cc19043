"""Adds one skill to a model: trains the skill's model, merges along w, and evaluates the merge.

Source: Morrison et al., "Merge to Learn: Efficiently Adding Skills to Language Models with Model
Merging" (2024): "parallel train then merge", for one skill.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import jax

from m2l import checkpoints, files, merging, models, partitioning, storage, tasks
from m2l.checkpoints import Manifest
from m2l.data import pipeline, vocabularies
from m2l.errors import CheckpointError, ConfigError, DataError, UnknownNameError
from m2l.evaluation import bootstrap
from m2l.evaluation.bootstrap import Difference, Statistic
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.results import Result, finished, read_examples, read_result, result_path
from m2l.evaluation.task_data import TaskData, halves, load_tasks
from m2l.merging import Recipe, inputs
from m2l.studies import merge_to_learn
from m2l.training import resources
from m2l.training.loop import train
from m2l.training.settings import TrainSettings
from m2l.typing import Json, JsonObject, Params


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The loss of the general model's score that is allowed.

    Attributes:
        value: In points of the score or in percent of it.
        relative: Whether it is in percent of the score.
    """

    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> "Tolerance":
        """Parses `2%` (of the general model's score) or `2` (points of it).

        Raises:
            ConfigError: It is neither.
        """
        number, relative = text.strip().removesuffix("%"), text.strip().endswith("%")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 100:
            raise ConfigError(
                f"--tolerance {text}: expected 2% (of the general model's score) or 2 (points)"
            )
        return cls(value, relative)

    def floor(self, score: float) -> float:
        """Returns the least score that is allowed, for a general model with this score."""
        return score * (1 - self.value / 100) if self.relative else score - self.value

    def __str__(self) -> str:
        return f"{self.value:g} %" if self.relative else f"{self.value:g} points"


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """A merge on the curve: w, and its scores on what must be kept and on the skill, in percent."""

    weight: float
    general: float
    skill: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen merge, and whether it is within the tolerance."""

    point: CurvePoint
    within: bool


def choose(points: Sequence[CurvePoint], general: float, tolerance: Tolerance) -> Choice:
    """Returns the best skill within the tolerance; if no merge is within it, the best general one.

    Ties are broken by the other score, then by the smaller weight.

    Args:
        points: The curve, in any order.
        general: The general model's own score on what must be kept.
        tolerance: How much less a merge may score.

    Raises:
        ConfigError: There are no points.
    """
    if not points:
        raise ConfigError("no weights to choose from")
    floor = tolerance.floor(general)
    # Means over examples have errors in their last bits.
    within = [point for point in points if point.general >= floor - 1e-9]
    if within:
        best = max(within, key=lambda point: (point.skill, point.general, -point.weight))
    else:
        best = max(points, key=lambda point: (point.general, point.skill, -point.weight))
    return Choice(best, bool(within))


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint's directory and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> "OpenedCheckpoint":
        """Opens a checkpoint, or a training run's last one.

        Raises:
            CheckpointError: It is missing, unfinished, damaged, or a Hugging Face directory.
        """
        path = checkpoints.resolve(path)
        return cls(path, checkpoints.read_manifest(path))


def open_models(
    general: Path, base: Path | None, trained: Path | None
) -> dict[str, OpenedCheckpoint]:
    """Returns the opened "general" and "base" models and, if there is one, the skill's "alone".

    Args:
        general: The general model.
        base: The model it was trained from; None: the general model itself.
        trained: The skill's model.

    Raises:
        CheckpointError: One cannot be read.
        MergeError: They differ in model, parameters or vocabulary.
    """
    opened = {"general": OpenedCheckpoint.open(general)}
    opened["base"] = opened["general"] if base is None else OpenedCheckpoint.open(base)
    if trained is not None:
        opened["alone"] = OpenedCheckpoint.open(trained)
    paths = list(dict.fromkeys(model.path for model in opened.values()))
    inputs.check_alike(inputs.open_all(paths, inputs.ORBAX)[0])
    return opened


class SkillMerger:
    """Merges a general model and a skill's; reads them when they are first needed.

    Args:
        base: The base.
        general: The general model.
        alone: The skill's model.
        method: Of merge_to_learn.METHODS.
        density: The density of ties and dare.
    """

    def __init__(
        self,
        base: OpenedCheckpoint,
        general: OpenedCheckpoint,
        alone: OpenedCheckpoint,
        method: str,
        density: float,
    ):
        self.base, self.general, self._alone = base, general, alone
        self._method, self._density = method, density
        spec = models.spec(models.from_dict(base.manifest.model))
        self.mesh = partitioning.widest_mesh(spec)
        self._shardings = partitioning.shardings(spec, self.mesh)
        self._params: dict[Path, Params] = {}

    def _recipe(self, weight: float) -> tuple[Recipe, OpenedCheckpoint | None]:
        """Returns the recipe, and the base if the method needs one."""
        recipe = merge_to_learn.recipe(self._method, (weight,), self._density)
        return recipe, self.base if merging.METHODS[recipe.method].needs_base else None

    def read(self, model: OpenedCheckpoint) -> Params:
        """Returns a model's parameters; those of the merge's inputs stay in memory."""
        if model.path in self._params:
            return self._params[model.path]
        params = checkpoints.restore(model.path, shardings=self._shardings)
        if model in (self.base, self.general, self._alone):
            self._params[model.path] = params
        return params

    def digest(self, weight: float) -> str:
        """Returns the digest that identifies the merge."""
        recipe, base = self._recipe(weight)
        experts = [self.general.manifest.digest, self._alone.manifest.digest]
        return recipe.identity(base and base.manifest.digest, experts)

    def merge(self, weight: float) -> Params:
        """Merges the parameters in memory."""
        recipe, base = self._recipe(weight)
        experts = [self.read(self.general), self.read(self._alone)]
        return merging.merge_params(base and self.read(base), experts, recipe)

    def write(self, weight: float, out: Path) -> OpenedCheckpoint:
        """Writes the checkpoint of the merge, unless it exists.

        Raises:
            CheckpointError: The existing one is another merge.
        """
        recipe, base = self._recipe(weight)
        models = [*([base] if base else []), self.general, self._alone]
        if not out.exists():
            paths = [self.general.path, self._alone.path]
            merging.merge(base and base.path, paths, recipe, out)
        merged = OpenedCheckpoint.open(out)
        parents = [parent["digest"] for parent in merged.manifest.parents]
        expected = [model.manifest.digest for model in models]
        if merged.manifest.made_by.get("recipe") != recipe.to_dict() or parents != expected:
            raise CheckpointError(f"{out}: holds another merge; delete it, and run this again")
        return merged


@dataclasses.dataclass(frozen=True)
class Scores:
    """A model's results on some tasks, and for each the statistic to bootstrap."""

    results: tuple[Result, ...]
    statistics: tuple[Statistic, ...]

    @property
    def mean(self) -> float:
        """The mean score of the tasks, in percent."""
        return fmean(result.score for result in self.results)

    @property
    def _draws(self) -> int:
        return min(bootstrap.draws_of(result.metric) for result in self.results)

    @property
    def _counts(self) -> list[int]:
        return [result.count for result in self.results]

    def interval(self) -> list[float]:
        """Returns the 95 % interval of the mean."""
        return bootstrap.interval(self.statistics, self._counts, draws=self._draws)

    def against(self, other: "Scores") -> Difference:
        """Returns how much higher the mean is than another model's on the same examples."""
        return bootstrap.paired(other.statistics, self.statistics, self._counts, draws=self._draws)

    def single(self) -> list["Scores"]:
        """Returns the scores of each task on its own."""
        pairs = zip(self.results, self.statistics, strict=True)
        return [Scores((result,), (statistic,)) for result, statistic in pairs]


def read_scores(folder: Path, tasks: Sequence[str]) -> Scores:
    """Reads a model's scores from the files of an evaluation with `examples`.

    Raises:
        EvaluationError: Results or examples are missing or damaged.
    """
    results = tuple(read_result(result_path(folder, task)) for task in tasks)
    statistics = tuple(
        bootstrap.statistic(result.metric, read_examples(folder, result.task)) for result in results
    )
    return Scores(results, statistics)


RECORD = "adding.json"
# Of a task: one half to choose by, one half to evaluate on.
LEAST_EXAMPLES = 10


@dataclasses.dataclass(frozen=True)
class SkillAddition:
    """The settings of adding a skill.

    Attributes:
        general: The checkpoint of the general model.
        base: The checkpoint of the model it was trained from; None: the general model itself.
        trained: The checkpoint of a model of the skill; None: one is trained, from the base or,
            for wise_ft, from the general model.
        learn: The mixture of the skill.
        keep: The mixture of the abilities that must be kept.
        training: The training settings of the skill's model; None with `trained`.
        method: Of merge_to_learn.METHODS.
        weights: The values of w to try.
        density: The share of each task vector that ties keeps, and dare on average.
        tolerance: The loss on `keep` that is allowed.
        general_examples: |G|, the number of examples the general model was trained on: then the
            heuristic's w is tried too. None: it is not.
        split: The split to choose by and to evaluate on.
        max_examples: Examples of each task, of both halves together.
        lengths: {"inputs": S, "targets": T}, in tokens, of evaluated examples.
        batch_size: Examples in a batch of an evaluation.
        generative_score: Of prompts.GENERATIVE_SCORES.
        vocabulary: The vocabulary of the data; None: the general model's own.
        data: The origin of records, as JSON values: "source", and the files of each task of JSON
            lines by its name.
    """

    general: Path
    base: Path | None
    trained: Path | None
    learn: str
    keep: str
    training: TrainSettings | None
    method: str
    weights: tuple[float, ...]
    tolerance: Tolerance
    density: float = 0.5
    general_examples: int | None = None
    split: str = "validation"
    max_examples: int | None = None
    lengths: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"inputs": 512, "targets": 64}
    )
    batch_size: int = 32
    generative_score: str = "decoding"
    vocabulary: str | None = None
    data: Mapping[str, Json] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in merge_to_learn.METHODS:
            raise UnknownNameError("method of adding a skill", self.method, merge_to_learn.METHODS)
        if not self.weights or any(not 0 < weight <= 1 for weight in self.weights):
            raise ConfigError(f"weights: {list(self.weights)} are not all above 0 and at most 1")
        if not 0 < self.density < 1:
            raise ConfigError(f"density: {self.density} is not within (0, 1)")
        if (self.training is None) == (self.trained is None):
            raise ConfigError("a skill's model is either given or trained")


@dataclasses.dataclass(frozen=True)
class AddedSkill:
    """The result of adding a skill.

    Attributes:
        merged: The merged checkpoint.
        choice: Its w, and whether it is within the tolerance on the half it was chosen by.
        heuristic: The heuristic's w; None without |G|.
        curve: The merges' scores (skill, kept) by w, ascending, on the half to choose by.
        ends: The same of "general" and "alone", the skill's model.
        judged: The scores of "general", "alone", "merged" and, if there is one, "heuristic" on
            the half to evaluate on.
        costs: The costs of each phase, as JSON values.
    """

    merged: Path
    choice: Choice
    heuristic: float | None
    curve: Mapping[float, tuple[Scores, Scores]]
    ends: Mapping[str, tuple[Scores, Scores]]
    judged: Mapping[str, tuple[Scores, Scores]]
    costs: JsonObject


def training_examples(mixture: str) -> int:
    """Returns |D|, the training records of a registered mixture, each counted once for all prompts.

    Raises:
        UnknownNameError, DataError: There is no such mixture, or it has no train split.
    """
    counts: dict[str, int] = {}
    for name, size in pipeline.sizes(mixture, "train").items():
        dataset = tasks.info(name).dataset
        counts[dataset] = max(size, counts.get(dataset, 0))
    return sum(counts.values())


def add_skill(
    adding: SkillAddition, out: Path, *, resolved_config: str | None = None
) -> AddedSkill:
    """Trains the skill's model, chooses w, merges and evaluates; resumes if it was stopped.

    The mixtures must be registered. Writes skill/ (the training run), results/ and merged/.

    Args:
        adding: The settings.
        out: A folder of its own.
        resolved_config: The gin text of the training run.

    Raises:
        M2LError: Settings or inputs do not fit; raised before anything is written.
        Stopped: SIGINT or SIGTERM was received in training, and the state is saved.
    """
    out = storage.path(out).absolute()

    # --- checks ---
    opened = open_models(adding.general, adding.base, adding.trained)
    manifest = opened["general"].manifest
    vocabulary_name = adding.vocabulary or manifest.vocabulary["name"]
    vocabulary = vocabularies.load(vocabulary_name)
    described = vocabularies.describe(vocabulary, vocabulary_name)
    if described["fingerprint"] != manifest.vocabulary["fingerprint"]:
        raise DataError(f"vocabulary {vocabulary_name!r} is not the one that the model reads")
    checkpoints.check_vocabulary(described, manifest.model["vocab_size"], adding.general)
    zero = _heuristic(adding)
    to_learn, to_keep = _load_halves(adding.learn, adding), _load_halves(adding.keep, adding)
    names = [{half.info.name for _, half in part} for part in (to_learn, to_keep)]
    if both := sorted(names[0] & names[1]):
        raise ConfigError(f"{both[0]} is both to be learned and to be kept")
    fields = dataclasses.asdict(adding) | dict.fromkeys(("general", "base", "trained"))
    fields["training"] = None if adding.training is None else adding.training.flat()
    fields |= {name: model.manifest.digest for name, model in opened.items()}
    content = json.loads(json.dumps(fields))
    files.check_claim(out, RECORD, content, kind="addition of a skill")
    files.claim(out, RECORD, content)

    # --- the skill's model ---
    clock = _Clock(out)
    config = models.from_dict(manifest.model)
    alone = opened.get("alone")
    if alone is None:
        start = opened["general" if adding.method == "wise_ft" else "base"].path
        with clock.running("training"):
            last = train(
                out / "skill",
                config=config,
                vocabulary=described,
                settings=adding.training,
                data=adding.data.get(adding.learn, {"source": adding.data.get("source")}),
                init=start,
                resolved_config=resolved_config,
            )
        alone = OpenedCheckpoint.open(last)

    # --- the curve along w, on the half to choose by ---
    evaluator = _HalvesEvaluator(adding, out, config, vocabulary, (to_learn, to_keep))
    merger = SkillMerger(opened["base"], opened["general"], alone, adding.method, adding.density)

    def model_scores(name: str, model: OpenedCheckpoint, choosing: bool) -> tuple[Scores, Scores]:
        digest = model.manifest.digest
        return evaluator.scores(name, digest, lambda: merger.read(model), choosing)

    def merge_scores(name: str, weight: float, choosing: bool) -> tuple[Scores, Scores]:
        digest = merger.digest(weight)
        return evaluator.scores(name, digest, lambda: merger.merge(weight), choosing)

    models_at_ends = {"general": merger.general, "alone": alone}
    weights = sorted({*adding.weights, *([] if zero is None else [zero])})
    with clock.running("choosing"), jax.set_mesh(merger.mesh):
        ends = {name: model_scores(name, model, True) for name, model in models_at_ends.items()}
        curve = {weight: merge_scores(f"w_{weight}", weight, True) for weight in weights}
    points = [CurvePoint(w, curve[w][1].mean, curve[w][0].mean) for w in adding.weights]
    choice = choose(points, ends["general"][1].mean, adding.tolerance)

    # --- the merged checkpoint ---
    with clock.running("merging"):
        merged = merger.write(choice.point.weight, out / "merged")

    # --- before and after, on the half to evaluate on ---
    with clock.running("judging"), jax.set_mesh(merger.mesh):
        compared = {**models_at_ends, "merged": merged}
        judged = {name: model_scores(name, model, False) for name, model in compared.items()}
        if zero is not None:
            judged["heuristic"] = merge_scores("heuristic", zero, False)
    costs = _costs(adding, out, alone.manifest, [*curve.values(), *ends.values()])
    return AddedSkill(merged.path, choice, zero, curve, ends, judged, costs)


# --- data ---


def _load_halves(mixture: str, adding: SkillAddition) -> list[tuple[TaskData, TaskData]]:
    """Returns two halves of each task that can be scored: to choose by, and to evaluate on."""
    infos = [tasks.info(name) for name in tasks.tasks_in(mixture)]
    infos = [info for info in infos if info.kind != "train"]
    if not infos:
        raise DataError(f"mixture {mixture!r} has no task that can be evaluated")
    loaded = load_tasks(
        infos,
        split=adding.split,
        lengths=adding.lengths,
        max_examples=adding.max_examples,
        generative_score=adding.generative_score,
    )
    for task in loaded:
        if len(task.examples) < LEAST_EXAMPLES:
            raise DataError(
                f"task {task.info.name}: {len(task.examples)} examples of its {adding.split} are "
                f"too few; w is chosen by one half and judged by the other: give {LEAST_EXAMPLES} "
                "at the very least, some hundreds to see small differences"
            )
    return [halves(task) for task in loaded]


def _heuristic(adding: SkillAddition) -> float | None:
    """Returns w by equation 7 of the paper."""
    if adding.trained is None or adding.general_examples is not None:
        examples = training_examples(adding.learn)
    if adding.general_examples is None:
        return None
    return merge_to_learn.heuristic(adding.method, examples, adding.general_examples)


# --- scores ---


class _HalvesEvaluator:
    """The evaluator of both halves of all tasks, loaded once for all models."""

    def __init__(
        self,
        adding: SkillAddition,
        out: Path,
        config: models.Config,
        vocabulary: vocabularies.Vocabulary,
        parts: Sequence[Sequence[tuple[TaskData, TaskData]]],
    ):
        self._out, self._parts = out / "results", parts
        halves = [half for part in parts for task in part for half in task]
        self._evaluator = Evaluator(config, halves, vocabulary, batch_size=adding.batch_size)

    def scores(
        self, name: str, digest: str, read: Callable[[], Params], choosing: bool
    ) -> tuple[Scores, Scores]:
        """Returns a model's scores (skill, kept); parameters are read if there are no results."""
        out = self._out / ("choosing" if choosing else "judging") / name
        parts = [[task[0 if choosing else 1] for task in part] for part in self._parts]
        selected = [task for part in parts for task in part]
        if not all(finished(out, digest, task, True) for task in selected):
            self._evaluator.run(
                read(),
                out,
                model_digest=digest,
                only=[task.info.name for task in selected],
                examples=True,
                description=f"{'choose' if choosing else 'judge'} {name}",
            )
        skill, keep = (read_scores(out, [t.info.name for t in part]) for part in parts)
        return skill, keep


# --- costs ---


class _Clock:
    """Seconds by phase, over all starts; a start that was killed is not counted."""

    def __init__(self, out: Path):
        self._file = out / "seconds.json"

    @contextlib.contextmanager
    def running(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = _read_seconds(self._file) if self._file.exists() else {}
            seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - start
            files.write_record(self._file, seconds)


def _read_seconds(file: Path) -> dict[str, float]:
    seconds = files.read_record(file, required=False, finite=True)
    if any(type(value) not in (int, float) for value in seconds.values()):
        raise DataError(f"{file}: damaged, not seconds by phase; delete it and start again")
    return seconds


def _costs(
    adding: SkillAddition, out: Path, alone: Manifest, tried: Sequence[tuple[Scores, Scores]]
) -> JsonObject:
    file = out / "costs.json"
    # Written once: a later start would only add its own start-up.
    if file.exists():
        return files.read_record(file, required=False, finite=True)
    seconds = _read_seconds(out / "seconds.json")
    device = jax.devices()[0]
    costs: JsonObject = {
        "devices": {"kind": device.device_kind, "count": jax.device_count()},
        "choosing": {
            "models": len(tried),
            "tokens": sum(result.tokens for pair in tried for s in pair for result in s.results),
            "seconds": seconds["choosing"],
        },
        "merging": {"seconds": seconds["merging"]},
        "judging": {"seconds": seconds["judging"]},
    }
    if (training := adding.training) is not None:
        config = models.from_dict(alone.model)
        rows = training.batch_size, training.input_length, training.target_length
        costs["training"] = {
            "examples": training_examples(adding.learn),
            "steps": alone.step,
            "positions": alone.step * rows[0] * (rows[1] + rows[2]),
            "flops": resources.step_flops(config, *rows) * alone.step,
            "seconds": seconds["training"],
        }
    files.write_record(file, costs)
    return costs


def steps_of(epochs: float, examples: int, batch_size: int) -> int:
    """Returns the optimizer steps of this number of epochs, one example in a row."""
    return max(1, math.ceil(epochs * examples / batch_size))

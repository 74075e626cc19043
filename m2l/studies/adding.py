"""A skill of your own, added to a model of your own: trained apart, merged along w, and judged.

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
from typing import Any

import jax
import seqio

from m2l import checkpoints, files, models, storage, tasks
from m2l.checkpoints import Manifest
from m2l.data import pipeline, vocabularies
from m2l.errors import ConfigError, DataError, UnknownNameError
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.results import finished
from m2l.evaluation.task_data import TaskData, halves, load_tasks
from m2l.studies import skills
from m2l.studies.adding_choice import Choice, Point, Tolerance, choose
from m2l.studies.adding_models import Model, Pool, opened
from m2l.studies.adding_scores import Scores, read_scores
from m2l.training import resources
from m2l.training.loop import train
from m2l.training.settings import TrainSettings

RECORD = "adding.json"
# Of a task: half of them to choose by, half to judge by.
LEAST_EXAMPLES = 10


@dataclasses.dataclass(frozen=True)
class Adding:
    """What is to be added to what, and how.

    Attributes:
        general: The checkpoint of the general model.
        base: That of the model it was trained from; None: the general model stands for it.
        trained: That of a model of the skill, if there is one already; else one is trained, from
            the base or, for wise_ft, from the general model.
        learn: The mixture of the skill.
        keep: The mixture of what the general model must go on doing.
        training: How the skill's model is trained; None with `trained`.
        method: Of skills.METHODS.
        weights: The values of w to try.
        density: What ties keeps of each task vector, and dare on average.
        tolerance: What the merged model may lose of what is to be kept.
        general_examples: |G|, how many examples the general model was trained on: then the
            heuristic's w is tried too. None: it is not.
        split: The split to choose and to judge by.
        max_examples: Examples of each task, of both halves together.
        lengths: {"inputs": S, "targets": T}, in tokens, of what is evaluated.
        batch_size: Examples in a batch of an evaluation.
        generative_score: Of metrics.GENERATIVE_SCORES.
        vocabulary: What the data are read by; None: the general model's own.
        data: Where records come from, as plain JSON values: "source", and by the name of a task of
            JSON lines what its files are.
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
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in skills.METHODS:
            raise UnknownNameError("method of adding a skill", self.method, skills.METHODS)
        if not self.weights or any(not 0 < weight <= 1 for weight in self.weights):
            raise ConfigError(f"weights: {list(self.weights)} are not all above 0 and at most 1")
        if not 0 < self.density < 1:
            raise ConfigError(f"density: {self.density} is not within (0, 1)")
        if (self.training is None) == (self.trained is None):
            raise ConfigError("a skill's model is either given or trained")


@dataclasses.dataclass(frozen=True)
class Added:
    """What came of it.

    Attributes:
        merged: The checkpoint that was made.
        choice: The w it was made with, and whether it keeps what it should by the half that it was
            chosen by.
        heuristic: The w that needs no trying; None without |G|.
        curve: By w, ascending, the merges' scores on the half to choose by: (skill, kept).
        ends: The same of "general" and "alone", the skill's own model.
        judged: By "general", "alone", "merged" and, where there is one, "heuristic": the scores
            on the half to judge by.
        costs: What it took, as plain values.
    """

    merged: Path
    choice: Choice
    heuristic: float | None
    curve: Mapping[float, tuple[Scores, Scores]]
    ends: Mapping[str, tuple[Scores, Scores]]
    judged: Mapping[str, tuple[Scores, Scores]]
    costs: Mapping[str, Any]


def training_examples(mixture: str) -> int:
    """|D|: the records of a registered mixture to train on, once whatever their prompts.

    Raises:
        UnknownNameError, DataError: no such mixture, or one without a train split.
    """
    pipeline.find("mixture", mixture, "train")
    counts: dict[str, int] = {}
    for name in tasks.tasks_in(mixture):
        dataset = tasks.info(name).dataset
        size = seqio.TaskRegistry.get(name).num_input_examples("train")
        counts[dataset] = max(size, counts.get(dataset, 0))
    return sum(counts.values())


def add(adding: Adding, out: Path, *, resolved_config: str | None = None) -> Added:
    """Trains the skill's model, chooses w, merges and judges; goes on where it was stopped.

    The mixtures are registered before. OUT gets skill/ (the training run), results/, and merged/.

    Args:
        adding: What to do.
        out: Where; a folder of its own.
        resolved_config: The gin text of the training run.

    Raises:
        M2LError: something does not fit, and is named, before anything is written.
        Stopped: after SIGINT or SIGTERM in training, when the state was saved.
    """
    out = storage.path(out).absolute()

    # --- everything that can be refused ---
    found = opened(adding.general, adding.base, adding.trained)
    vocabulary_name = adding.vocabulary or found["general"].manifest.vocabulary["name"]
    vocabulary = vocabularies.load(vocabulary_name)
    described = vocabularies.describe(vocabulary, vocabulary_name)
    if described["fingerprint"] != found["general"].manifest.vocabulary["fingerprint"]:
        raise DataError(f"vocabulary {vocabulary_name!r} is not the one that the model reads")
    vocab_size = found["general"].manifest.model["vocab_size"]
    checkpoints.check_vocabulary(described, vocab_size, adding.general)
    zero = _heuristic(adding)
    to_learn, to_keep = _halves(adding.learn, adding), _halves(adding.keep, adding)
    names = [{judged.info.name for _, judged in part} for part in (to_learn, to_keep)]
    if both := sorted(names[0] & names[1]):
        raise ConfigError(f"{both[0]} is both to be learned and to be kept")
    content = _content(adding, found)
    files.check_claim(out, RECORD, content, kind="addition of a skill")
    files.claim(out, RECORD, content)

    # --- the skill's own model ---
    clock = _Clock(out)
    config = models.from_dict(found["general"].manifest.model)
    alone = found.get("alone")
    if alone is None:
        start = found["general" if adding.method == "wise_ft" else "base"].path
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
        alone = Model.open(last)

    # --- along w, by the half to choose by ---
    judge = _Judge(adding, out, config, vocabulary, (to_learn, to_keep))
    pool = Pool(found["base"], found["general"], alone, adding.method, adding.density)
    ends = {"general": pool.general, "alone": alone}
    weights = sorted({*adding.weights, *([] if zero is None else [zero])})
    with clock.running("choosing"), jax.set_mesh(pool.mesh):
        by_ends = {
            name: judge.scores(name, model.manifest.digest, pool.reader(model), True)
            for name, model in ends.items()
        }
        curve = {
            weight: judge.scores(f"w_{weight}", pool.digest(weight), pool.merger(weight), True)
            for weight in weights
        }
    points = [Point(w, curve[w][1].mean, curve[w][0].mean) for w in adding.weights]
    choice = choose(points, by_ends["general"][1].mean, adding.tolerance)

    # --- the merged checkpoint ---
    with clock.running("merging"):
        merged = pool.write(choice.point.weight, out / "merged")

    # --- before and after, by the half to judge by ---
    with clock.running("judging"), jax.set_mesh(pool.mesh):
        judged = {
            name: judge.scores(name, model.manifest.digest, pool.reader(model), False)
            for name, model in {**ends, "merged": merged}.items()
        }
        if zero is not None:
            made = pool.digest(zero), pool.merger(zero)
            judged["heuristic"] = judge.scores("heuristic", *made, False)
    costs = _costs(adding, out, alone.manifest, [*curve.values(), *by_ends.values()])
    return Added(merged.path, choice, zero, curve, by_ends, judged, costs)


# --- data ---


def _halves(mixture: str, adding: Adding) -> list[tuple[TaskData, TaskData]]:
    """Of each task that can be scored, the examples to choose by and those to judge by."""
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


def _heuristic(adding: Adding) -> float | None:
    """w by equation 7 of the paper."""
    if adding.trained is None or adding.general_examples is not None:
        examples = training_examples(adding.learn)
    if adding.general_examples is None:
        return None
    return skills.heuristic(adding.method, examples, adding.general_examples)


def _content(adding: Adding, found: Mapping[str, Model]) -> dict[str, Any]:
    """What makes it this one, as JSON values."""
    fields = dataclasses.asdict(adding)
    for name in ("general", "base", "trained"):
        fields[name] = None
    fields["training"] = None if adding.training is None else adding.training.flat()
    fields |= {name: model.manifest.digest for name, model in found.items()}
    return json.loads(json.dumps(fields))


# --- scores ---


class _Judge:
    """Both halves of all tasks, made ready once for all models."""

    def __init__(
        self,
        adding: Adding,
        out: Path,
        config: Any,
        vocabulary: Any,
        parts: Sequence[Sequence[tuple[TaskData, TaskData]]],
    ):
        self._out, self._parts = out / "results", parts
        every = [task for part in parts for both in part for task in both]
        self._evaluator = Evaluator(config, every, vocabulary, batch_size=adding.batch_size)

    def scores(
        self, name: str, digest: str, read: Callable[[], Any], choosing: bool
    ) -> tuple[Scores, Scores]:
        """A model's scores on the skill and on what is to be kept; read only if not yet known."""
        out = self._out / ("choosing" if choosing else "judging") / name
        parts = [[both[0 if choosing else 1] for both in part] for part in self._parts]
        wanted = [task for part in parts for task in part]
        if not all(finished(out, digest, task, True) for task in wanted):
            self._evaluator.run(
                read(),
                out,
                model_digest=digest,
                only=[task.info.name for task in wanted],
                examples=True,
                description=f"{'choose' if choosing else 'judge'} {name}",
            )
        learned, kept = (read_scores(out, [t.info.name for t in part]) for part in parts)
        return learned, kept


# --- costs ---


class _Clock:
    """Seconds by phase, over all starts; those of a start that was killed are lost."""

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
    adding: Adding, out: Path, alone: Manifest, tried: Sequence[tuple[Scores, Scores]]
) -> dict[str, Any]:
    """Written when all is done, and not again: a later start would only add its own start-up."""
    file = out / "costs.json"
    if file.exists():
        return files.read_record(file, required=False, finite=True)
    seconds = _read_seconds(out / "seconds.json")
    device = jax.devices()[0]
    costs: dict[str, Any] = {
        "devices": {"kind": device.device_kind, "count": jax.device_count()},
        "choosing": {
            "models": len(tried),
            "tokens": sum(result.tokens for pair in tried for s in pair for result in s.results),
            "seconds": seconds["choosing"],
        },
        "merging": {"seconds": seconds["merging"]},
        "judging": {"seconds": seconds["judging"]},
    }
    if (how := adding.training) is not None:
        config = models.from_dict(alone.model)
        rows = how.batch_size, how.input_length, how.target_length
        costs["training"] = {
            "examples": training_examples(adding.learn),
            "steps": alone.step,
            "positions": alone.step * how.batch_size * (how.input_length + how.target_length),
            "flops": resources.step_flops(config, *rows) * alone.step,
            "seconds": seconds["training"],
        }
    files.write_record(file, costs)
    return costs


def steps_of(epochs: float, examples: int, batch_size: int) -> int:
    """Optimizer steps of so many passes, an example to a row."""
    return max(1, math.ceil(epochs * examples / batch_size))

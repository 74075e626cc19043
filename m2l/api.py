"""What `m2l train`, `m2l eval` and `m2l sweep` do, as functions of plain arguments."""

from __future__ import annotations  # By which help() prints types as written.

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2l import storage
from m2l.errors import ConfigError, DataError, UnknownNameError
from m2l.storage import AnyPath
from m2l.typing import Json, Params

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from m2l.data.shots import Shots
    from m2l.data.vocabularies import Vocabulary
    from m2l.evaluation.decoding import Decoding
    from m2l.evaluation.model import Model
    from m2l.evaluation.results import Result
    from m2l.evaluation.task_data import TaskData
    from m2l.merging import Recipe, SweepPoint
    from m2l.models import Config
    from m2l.training.monitoring import Log
    from m2l.training.settings import TrainSettings

JSONL = "jsonl"
"""The name of the task that JSON Lines files of one's own make."""

JsonlFiles = Mapping[str, AnyPath | str]


def train(
    out: AnyPath | str,
    mixture: str | None = None,
    *,
    steps: int,
    init: AnyPath | str | None = None,
    config: Config | None = None,
    vocabulary: str | None = None,
    source: str = "microworld",
    jsonl: JsonlFiles | None = None,
    **settings: object,
) -> AnyPath:
    """Trains a model, or goes on where a stopped run of the same settings left off.

    Args:
        out: The run's directory.
        mixture: The task or mixture to train on; None with `jsonl`.
        steps: Optimizer steps in all.
        init: The checkpoint to start from; None starts from a random model.
        config: The model's configuration; by default that of `init`.
        vocabulary: A name that `vocabularies.load` takes; by default that of `init`, or
            "microworld".
        source: Where the records of declared datasets come from: microworld, hub, jsonl:DIR, ...
        jsonl: JSON Lines files of one's own by split, "train" and "validation".
        settings: Further settings of training, as gin names them: learning_rate, batch_size...

    Returns:
        The directory of the last checkpoint, for `load`, `merge` and `evaluate`.

    Raises:
        M2LError: A setting, file or checkpoint is not usable; see `training.loop.train`.
    """
    from m2l.training.settings import from_flat

    mixture = mixture_name(mixture, jsonl)
    if mixture is None:
        raise ConfigError("nothing to train on: name a mixture, or your own data with jsonl")
    known = inspect.signature(from_flat).parameters
    for name in settings:
        if name not in known:
            raise UnknownNameError("training setting", name, known)
    return run_training(
        out,
        from_flat(mixture=mixture, steps=steps, **settings),
        init=init,
        config=config,
        vocabulary=vocabulary,
        source=source,
        jsonl=jsonl,
    )


def run_training(
    out: AnyPath | str,
    settings: TrainSettings,
    *,
    init: AnyPath | str | None = None,
    config: Config | None = None,
    vocabulary: str | None = None,
    source: str = "microworld",
    jsonl: JsonlFiles | None = None,
    resolved_config: str | None = None,
    synthetic: bool = False,
    profile: bool = False,
    log: Log | None = None,
) -> AnyPath:
    """Trains by settings that are validated; the arguments are those of `train` and `loop.train`.

    Raises:
        ConfigError: Neither a configuration nor a checkpoint to start from.
        M2LError: As `loop.train` says.
    """
    from m2l import checkpoints, models

    if init is not None:
        start = checkpoints.resolve(storage.path(init))
        manifest = checkpoints.read_manifest(start)
        manifest.check_whole(start)
        config = config or models.from_dict(manifest.model)
        vocabulary = vocabulary or manifest.vocabulary["name"]
    if config is None:
        raise ConfigError(
            "m2l train: no model; name an --init checkpoint, or --gin_file models/t5_1m.gin"
        )
    vocabulary = vocabulary or "microworld"

    from m2l.data import vocabularies
    from m2l.training import loop

    data = register_tasks(vocabulary, source, jsonl)
    return loop.train(
        storage.path(out),
        config=config,
        vocabulary=vocabularies.describe(vocabularies.load(vocabulary), vocabulary),
        settings=settings,
        data=data,
        init=None if init is None else storage.path(init),
        resolved_config=resolved_config,
        synthetic=synthetic,
        profile=profile,
        log=log,
    )


def evaluate(
    model: Model | AnyPath | str,
    mixture: str | None = None,
    *,
    jsonl: JsonlFiles | None = None,
    source: str = "microworld",
    vocabulary: str | None = None,
    split: str = "validation",
    max_examples: int | None = None,
    batch_size: int = 32,
    input_length: int = 512,
    target_length: int = 64,
    max_truncated: float = 1.0,
    shots: int = 0,
    shots_seed: int = 0,
    generative_score: str = "decoding",
    beams: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    out: AnyPath | str | None = None,
    examples: bool = False,
) -> dict[str, Result]:
    """Evaluates a model: rank classification where there are answer choices, else decoding.

    Args:
        model: A model as `load` returns it, or the path of one.
        mixture: The task or mixture to evaluate on; None with `jsonl`.
        jsonl: JSON Lines files of one's own by split.
        source: Where the records of declared datasets come from: microworld, hub, jsonl:DIR, ...
        vocabulary: A name that `vocabularies.load` takes; by default the model's own.
        split: The split to read.
        max_examples: Examples of each task at most, drawn from the whole split.
        batch_size: Examples in a batch.
        input_length: Tokens of an example's inputs; longer ones are cut, and counted.
        target_length: Tokens of a target, and of what is generated.
        max_truncated: The share of a task's examples that may be longer than that.
        shots: Examples of each task's own training split that stand before each example.
        shots_seed: Decides which.
        generative_score: What scores tasks in free text: "decoding" or "likelihood".
        beams: Beams of the search that decodes; 1: greedily.
        temperature: What logits are divided by before tokens are drawn; 0: none are drawn.
        top_k: How many of the most probable tokens may be drawn; 0: any.
        top_p: From how much of the probability they are drawn.
        samples: Texts drawn for each example; scores are means over them, `pass@k` beside.
        seed: Of what is drawn.
        dtype: The dtype to compute in: "float32", or "bfloat16" where the devices multiply it.
        mesh: Where the model is placed; by default every device has a copy of it.
        out: A directory for one JSON result a task; results that are there are not computed again.
        examples: Whether each example's scores and predictions are written to `out` as well.

    Returns:
        Each task's result by its name: `score` in percent, `interval`, `metrics`, `count`.

    Raises:
        M2LError: The model, the tasks or `out` is not usable.
    """
    import jax

    from m2l import models, partitioning
    from m2l.data.shots import Shots
    from m2l.evaluation.decoding import Decoding
    from m2l.evaluation.model import Model, load

    decoding = Decoding(beams, temperature, top_k, top_p, samples, seed)
    if not isinstance(model, Model):
        model = load(model, vocabulary)
    loaded_vocabulary, tasks = evaluation_tasks(
        mixture,
        jsonl,
        vocabulary or model.vocabulary["name"],
        model.vocabulary["fingerprint"],
        source,
        split=split,
        lengths={"inputs": input_length, "targets": target_length},
        max_examples=max_examples,
        generative_score=generative_score,
        decoding=decoding,
        max_truncated=max_truncated,
        shots=Shots(shots, shots_seed),
    )

    from m2l.evaluation.evaluator import Evaluator

    mesh = mesh or partitioning.make_mesh()
    placed = partitioning.shardings(models.spec(model.config), mesh)
    evaluator = Evaluator(
        model.config, tasks, loaded_vocabulary, batch_size=batch_size, dtype=dtype
    )
    with jax.set_mesh(mesh):
        params = model.read(placed)
        if out is None:
            results = list(evaluator.results(params, model_digest=model.digest))
        else:
            results = evaluator.run(
                params, storage.path(out), model_digest=model.digest, examples=examples
            )
    return {result.task: result for result in results}


def sweep(
    base: AnyPath | str | None,
    experts: Sequence[AnyPath | str],
    method: str,
    mixture: str | None = None,
    *,
    jsonl: JsonlFiles | None = None,
    source: str = "microworld",
    split: str = "validation",
    max_examples: int | None = None,
    batch_size: int = 32,
    input_length: int = 512,
    target_length: int = 64,
    statistics: Sequence[AnyPath | str] = (),
    **settings: object,
) -> list[SweepPoint]:
    """Merges models by many recipes in memory, and scores each merge.

    Args:
        base: The model that the experts were trained from; None for methods that do not need it.
        experts: The experts' paths, of one architecture and vocabulary.
        method: The merge method.
        mixture: The tasks to choose by; None with `jsonl`.
        jsonl: JSON Lines files of one's own by split.
        source, split, max_examples, batch_size, input_length, target_length: As `evaluate` takes
            them.
        statistics: Of each expert, for the methods that need them.
        settings: Those of a `Recipe`; of a list each value is tried, with each of the others.

    Returns:
        A point for each recipe, the best first: `recipe`, and `score`, the mean over the tasks in
        percent. Equal scores stay in the order of the values.

    Raises:
        M2LError: The models, the settings or the tasks are not usable.
    """
    import jax

    from m2l import merging
    from m2l.evaluation.model import load

    swept = {name: values for name, values in settings.items() if isinstance(values, list)}
    fixed = {name: value for name, value in settings.items() if name not in swept}
    recipes = merging.grid({"method": method, **fixed}, swept)
    model = load(experts[0])
    vocabulary, tasks = evaluation_tasks(
        mixture,
        jsonl,
        model.vocabulary["name"],
        model.vocabulary["fingerprint"],
        source,
        split=split,
        lengths={"inputs": input_length, "targets": target_length},
        max_examples=max_examples,
    )

    from m2l.evaluation.evaluator import Evaluator

    evaluator = Evaluator(model.config, tasks, vocabulary, batch_size=batch_size)

    def score(params: Params, recipe: Recipe) -> float:
        scores = [result.score for result in evaluator.results(jax.device_put(params))]
        return sum(scores) / len(scores)

    points = merging.sweep(base, experts, recipes, score, statistics)
    return sorted(points, key=lambda point: -point.score)


def save(model: Model, out: AnyPath | str) -> AnyPath:
    """Writes a model as a checkpoint of m2l's, whole or not at all.

    Args:
        model: A model as `load` returns it, such as one `with_params` of a merge.
        out: The checkpoint to make; must not exist.

    Returns:
        Its path, for `load`, `merge`, `evaluate` and `m2l convert`.

    Raises:
        CheckpointError: `out` exists or cannot be made, or the disk is full.
    """
    from m2l import checkpoints, models

    out = storage.path(out)
    made_by = {"kind": "save", "configuration of": str(model.path)}
    checkpoints.save(
        out,
        model.params,
        model=models.to_dict(model.config),
        vocabulary=model.vocabulary,
        made_by=made_by,
    )
    return out


def register_tasks(vocabulary: str, source: str, jsonl: JsonlFiles | None) -> dict[str, Json]:
    """Declares the tasks; returns where the records come from, as plain values."""
    from m2l import tasks

    tasks.declare(vocabulary=vocabulary, source=source)
    if jsonl:
        tasks.register_jsonl(jsonl)
    return record_origin(source, jsonl)


def record_origin(source: str, jsonl: JsonlFiles | None) -> dict[str, Json]:
    """Returns where records come from, as plain values: a source's name, or digests of files."""
    if not jsonl:
        return {"source": source}
    digests = {
        split: hashlib.sha256(storage.path(file).read_bytes()).hexdigest()
        for split, file in jsonl.items()
    }
    return {"source": JSONL, **digests}


def current_records(source: str, jsonl: JsonlFiles | None) -> Json:
    """Returns what records follow from, as a value that changes with them; None: nothing tells.

    Files that are missing or stored elsewhere tell nothing: whoever reads them says so.
    """
    from m2l.tasks import sources

    if not jsonl:
        origin = sources.origin(source)
        return origin and [source, origin]
    paths = {split: storage.path(file) for split, file in jsonl.items()}
    if not all(isinstance(path, Path) and path.is_file() for path in paths.values()):
        return None
    return {split: hashlib.sha256(path.read_bytes()).hexdigest() for split, path in paths.items()}


def evaluation_tasks(
    mixture: str | None,
    jsonl: JsonlFiles | None,
    vocabulary_name: str,
    fingerprint: str,
    source: str,
    *,
    split: str,
    lengths: Mapping[str, int],
    max_examples: int | None = None,
    generative_score: str = "decoding",
    decoding: Decoding | None = None,
    max_truncated: float = 1.0,
    shots: Shots | None = None,
) -> tuple[Vocabulary, list[TaskData]]:
    """Reads and tokenises the tasks of a mixture that a model can be scored on.

    Args:
        mixture: A task or mixture; None with `jsonl`.
        jsonl: JSON Lines files of one's own by split.
        vocabulary_name: A name that `vocabularies.load` takes.
        fingerprint: That of the vocabulary that the model was trained with.
        source: Where the records of declared datasets come from.
        split, lengths, max_examples, generative_score, decoding, max_truncated, shots: As
            `load_tasks` takes them; by default text is decoded greedily, and there are no shots.

    Returns:
        The vocabulary, and the tasks.

    Raises:
        ConfigError: neither a mixture nor files; or nothing is decoded, and `decoding` says how.
        DataError: another vocabulary than the model's; nothing in the mixture can be scored.
        UnknownNameError: no such mixture.
    """
    mixture = mixture_name(mixture, jsonl)
    if mixture is None:
        raise ConfigError("what to score by: name a --mixture, or your own data with --jsonl")

    from m2l import tasks as registry
    from m2l.data import vocabularies
    from m2l.data.shots import NONE
    from m2l.evaluation.decoding import GREEDY
    from m2l.evaluation.task_data import load_tasks

    vocabulary = vocabularies.load(vocabulary_name)
    if vocabularies.describe(vocabulary, vocabulary_name)["fingerprint"] != fingerprint:
        raise DataError(f"vocabulary {vocabulary_name!r} is not the one that the model reads")
    register_tasks(vocabulary_name, source, jsonl)
    infos = [registry.info(task) for task in registry.tasks_in(mixture)]
    scored = [info for info in infos if info.kind != "train"]
    if not scored:
        raise DataError(f"mixture {mixture!r} has no task that can be evaluated")
    loaded = load_tasks(
        scored,
        split=split,
        lengths=lengths,
        max_examples=max_examples,
        generative_score=generative_score,
        decoding=decoding or GREEDY,
        max_truncated=max_truncated,
        shots=shots or NONE,
    )
    if decoding not in (None, GREEDY) and not any(task.decoded for task in loaded):
        raise ConfigError(
            f"nothing of {mixture} is decoded: {decoding.settings()['decoding']}: no use"
        )
    return vocabulary, loaded


def mixture_name(mixture: str | None, jsonl: JsonlFiles | None) -> str | None:
    """Returns the mixture that is named, or the task of one's own files.

    Raises:
        ConfigError: Both are given.
    """
    if jsonl and mixture not in (None, JSONL):
        raise ConfigError(f"--jsonl is the task `jsonl`: leave --mixture {mixture} out")
    return JSONL if jsonl else mixture


def check_mixture(mixture: str | None, source: str, jsonl: JsonlFiles | None) -> None:
    """Says that a mixture is not known before anything slow is done.

    Raises:
        UnknownNameError: No such mixture.
        ConfigError: There is one's own data as well.
    """
    if mixture_name(mixture, jsonl) in (None, JSONL):
        return
    from m2l import tasks

    tasks.use(source)
    tasks.tasks_in(mixture)

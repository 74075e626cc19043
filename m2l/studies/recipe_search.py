"""Searches for the best recipe of a space: candidates race on one half of the data.

The other half judges those that are chosen.
"""

import contextlib
import dataclasses
import itertools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import jax

from m2l import checkpoints, files, merging, models, partitioning, storage
from m2l.checkpoints import Manifest
from m2l.data.vocabularies import Vocabulary
from m2l.errors import ConfigError, DataError, EvaluationError, MergeError, UnknownNameError
from m2l.evaluation import bootstrap
from m2l.evaluation.bootstrap import Difference, Statistic
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.results import Result
from m2l.evaluation.task_data import TaskData, halves
from m2l.locks import Lock
from m2l.merging import METHODS, Recipe
from m2l.merging.search_space import METHOD, SearchSpace
from m2l.progress import Progress
from m2l.storage import AnyPath
from m2l.studies.racing import ChoosingHalf, Values, front_of
from m2l.typing import Json, JsonObject, Params

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from m2l.studies.search_storage import SearchStorage

SAMPLERS = ("tpe", "cma-es", "nsga-ii")
RECORD = "search.json"
LEAST_EXAMPLES = 10
"""Of a task, in both halves together."""


@dataclasses.dataclass(frozen=True)
class RecipeSearch:
    """What `m2l search` tries.

    Attributes:
        methods: The space; see `m2l.merging.search_space`.
        candidates: How many recipes are tried.
        sampler: "tpe", "cma-es" (of numbers of one method, with one aim) or "nsga-ii"; "": "tpe",
            with two aims "nsga-ii".
        seed: Of the sampler.
        racing: Whether candidates that are shown to be worse stop early.
        confidence: How sure that has to be, below 1.
    """

    methods: Mapping[str, Mapping[str, object]]
    candidates: int = 100
    sampler: str = ""
    seed: int = 0
    racing: bool = True
    confidence: float = 0.9

    def __post_init__(self) -> None:
        if type(self.candidates) is not int or self.candidates < 1:
            raise ConfigError(
                f"Search.candidates: expected a positive integer, found {self.candidates!r}"
            )
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(f"Search.seed: expected 0 or a larger integer, found {self.seed!r}")
        if type(self.racing) is not bool:
            raise ConfigError(f"Search.racing: expected True or False, found {self.racing!r}")
        if type(self.confidence) is not float or not 0.5 <= self.confidence < 1:
            raise ConfigError(
                f"Search.confidence: expected 0.5 or more, below 1, found {self.confidence!r}"
            )
        if self.sampler and self.sampler not in SAMPLERS:
            raise UnknownNameError("sampler", str(self.sampler), SAMPLERS)
        dimensions = [d for method in self.space.methods for d in self.space.dimensions(method)]
        if not dimensions and len(self.methods) == 1:
            raise ConfigError("Search.methods: all is fixed; give a setting values to choose from")
        if self.sampler == "cma-es" and (
            len(self.methods) > 1 or len(dimensions) < 2 or any(d.choices for d in dimensions)
        ):
            raise ConfigError(
                "sampler cma-es: it needs two or more ranges (LOW, HIGH) of one method, and no "
                "lists to choose from; take tpe"
            )

    @property
    def space(self) -> SearchSpace:
        """The recipes."""
        return SearchSpace(self.methods)

    @property
    def startup(self) -> int:
        """How many candidates are spread over the space, before scores tell where to look."""
        least = max(len(self.methods), min(10, self.candidates // 2))
        return 1 if self.sampler == "cma-es" else min(self.candidates, least)

    def sampler_of(self, aims: int) -> str:
        """Returns the name of the sampler for so many aims."""
        if self.sampler == "cma-es" and aims > 1:
            raise ConfigError("sampler cma-es: it has one aim; take nsga-ii or tpe")
        return self.sampler or ("tpe" if aims == 1 else "nsga-ii")


@dataclasses.dataclass(frozen=True)
class ToMerge:
    """The models of a search, in m2l's format.

    Attributes:
        base: The base; None where no method needs one.
        experts: The experts.
        statistics: One of each expert, for the methods that need them.
    """

    base: AnyPath | None
    experts: Sequence[AnyPath]
    statistics: Sequence[AnyPath] = ()

    def check(self, space: SearchSpace) -> Manifest:
        """Refuses what cannot be merged by a method; returns the first expert's manifest.

        Raises:
            M2LError: A model is missing or damaged, or does not fit the others or the method.
        """
        # Other formats are refused first, with the command that converts them.
        manifest, *_ = map(
            checkpoints.read_manifest,
            [*self.experts, *([] if self.base is None else [self.base])],
        )
        recipes: dict[str, Recipe] = {}
        for values in space.spread(4 * len(space.methods)):
            with contextlib.suppress(MergeError):  # Candidates that are no recipes are refused.
                recipe = space.recipe(lambda dimension, values=values: values[dimension.name])
                recipes.setdefault(recipe.method, recipe)
        for recipe in recipes.values():
            statistics = self.statistics if METHODS[recipe.method].statistic else ()
            merging.prepare(self.base, self.experts, recipe, statistics=statistics)
        vocab_size = models.from_dict(manifest.model).vocab_size
        checkpoints.check_vocabulary(manifest.vocabulary, vocab_size, self.experts[0])
        return manifest

    @property
    def digests(self) -> JsonObject:
        """The models' digests."""
        base = None if self.base is None else checkpoints.read_manifest(self.base).digest
        return {
            "base": base,
            "experts": [checkpoints.read_manifest(path).digest for path in self.experts],
            "statistics": [checkpoints.read_manifest(path).digest for path in self.statistics],
        }


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A recipe that was tried.

    Attributes:
        number: Its place, from 0.
        settings: What was chosen, by dimension.
        recipe: As `Recipe.to_dict` returns it.
        scores: One for each aim, in percent, on the half that chooses; of one that was stopped,
            those of the candidate that it lost to less the differences that were seen.
        examples: How many examples were scored.
        stopped_by: The number of the candidate that it lost to; None: all examples were scored.
        seconds: From when it was drawn until it was scored.
    """

    number: int
    settings: Mapping[str, Json]
    recipe: JsonObject
    scores: tuple[float, ...]
    examples: int
    stopped_by: int | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Judged:
    """A model on the half that judges.

    Attributes:
        name: "base", "average" or "candidate 7".
        number: The candidate's; None of others.
        scores: One for each aim, in percent.
        intervals: Their intervals of 95 %.
        changes: How much more that is than the average's; None of the average itself.
    """

    name: str
    number: int | None
    scores: tuple[float, ...]
    intervals: tuple[list[float], ...]
    changes: tuple[Difference, ...] | None


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        aims: The names of the aims.
        candidates: All that were scored.
        refused: Those that are no recipes: number and reason.
        front: Candidates that no other is better than in every aim, the best of the first aim
            first; with one aim the best alone.
        chosen: Of the front, the one with the best mean.
        judged: The base, the experts' average, and the front.
        importances: For each aim, the share of the scores' variance that each dimension explains.
        examples: How many examples a candidate is scored on that is not stopped.
        storage: Where it is stored, without a password.
    """

    aims: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    refused: Mapping[int, str]
    front: tuple[Candidate, ...]
    chosen: Candidate
    judged: tuple[Judged, ...]
    importances: tuple[Mapping[str, float], ...]
    examples: int
    storage: str


class _Search:
    """A search at work; see `search`."""

    def __init__(
        self,
        settings: RecipeSearch,
        to_merge: ToMerge,
        choosing: ChoosingHalf,
        store: "SearchStorage",
        config: models.Config,
        mesh: jax.sharding.Mesh,
        out: AnyPath,
    ):
        self._settings, self._choosing, self._store = settings, choosing, store
        self._out, self._mesh = out, mesh
        self._digests = to_merge.digests
        self._shardings = partitioning.shardings(models.spec(config), mesh)

        def read(path: AnyPath | None) -> Params | None:
            return path and checkpoints.restore(path, shardings=self._shardings)

        self.base = read(to_merge.base)
        self._experts = [read(path) for path in to_merge.experts]
        self._statistics = [checkpoints.restore(path) for path in to_merge.statistics]

    def digest(self, recipe: Recipe) -> str:
        """Returns what identifies the merge by a recipe."""
        return recipe.identity(self._digests["base"], self._digests["experts"])

    def merge(self, recipe: Recipe) -> Params:
        """Merges in memory, on the mesh."""
        method = METHODS[recipe.method]
        base = self.base if method.needs_base else None
        statistics = self._statistics if method.statistic else ()
        merged = merging.merge_params(base, self._experts, recipe, statistics)
        return jax.device_put(merged, self._shardings)

    def run(self) -> None:
        """Scores candidates until there are as many as asked for."""
        wanted = self._settings.candidates
        self._store.begin(self._first)
        with Progress("search", wanted, "candidates", first="compiling") as progress:
            while True:
                trials = self._store.trials()
                scores = [each.scores for each in _candidates(trials)]
                best = max(scores, default=(), key=fmean)
                figures = {"best": ", ".join(f"{score:.2f}" for score in best)} if best else {}
                progress.update(len(scores) + len(_refused(trials)), **figures)
                trial = self._store.next_trial(wanted)
                if trial is not None:
                    with self._store.alive(trial):
                        self._try(trial)
                elif self._store.finished(wanted):
                    return
                else:
                    time.sleep(1.0)  # Other workers score the last ones.

    def _first(self) -> list[dict[str, Json]]:
        """Returns candidates to begin with, those first that are the best of the first block.

        Against these the others are soon seen to be worse.
        """
        space, scores = self._settings.space, []
        points = space.spread(self._settings.startup)
        if self._choosing.blocks == 1:
            return points
        with Progress("begin", len(points), "candidates", first="compiling") as progress:
            for place, values in enumerate(points):
                try:
                    recipe = space.recipe(lambda dimension, values=values: values[dimension.name])
                    known = self._known(recipe) or self._score(self.merge(recipe), recipe, 0, {})
                    scores.append(fmean(self._choosing.scores(known)))
                except (MergeError, EvaluationError):
                    scores.append(float("-inf"))
                progress.update(place + 1)
        order = sorted(range(len(points)), key=lambda place: -scores[place])
        return [points[place] for place in order]

    def _file(self, recipe: Recipe) -> AnyPath:
        return self._out / "scores" / f"{self.digest(recipe)[:32]}.json"

    def _known(self, recipe: Recipe) -> Values:
        """Returns what was scored already by a recipe, of an equal candidate or before a stop."""
        file = self._file(recipe)
        return files.read_record(file)["values"] if file.exists() else {}

    def _score(self, params: Params, recipe: Recipe, block: int, values: Values) -> Values:
        """Returns the values with those of a block, and writes them."""
        with jax.set_mesh(self._mesh):
            values = self._choosing.add(params, block, values)
        file = self._file(recipe)
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_record(file, {"values": values})
        return values

    def _try(self, trial: "Trial") -> None:
        """Merges and scores a candidate, and stores what comes of it."""
        space = self._settings.space
        try:
            recipe = space.recipe(lambda dimension: self._store.draw(trial, dimension))
            self._store.record(trial, "recipe", recipe.to_dict())
            scores = self._race(trial, recipe)
        except (MergeError, EvaluationError) as error:
            self._store.record(trial, "refused", str(error).partition("\n")[0])
            scores = None
        self._store.finish(trial, scores)

    def _race(self, trial: "Trial", recipe: Recipe) -> tuple[float, ...]:
        """Returns a candidate's scores, as `Candidate` has them."""
        choosing = self._choosing
        # Other workers' values come with the candidate.
        known = [trial.user_attrs.get("values", {}), self._known(recipe)]
        values = max(known, key=lambda each: sum(map(len, each.values())))
        seen = next(
            (n for n in range(1, choosing.blocks + 1) if choosing.counts(n) == _lengths(values)), 0
        )
        if seen:
            self._store.record(trial, "values", values)
        rivals = [
            (each.number, each.scores, values_of)
            for each, values_of in _with_values(self._store.trials())
        ]
        rivals = [rivals[place] for place in front_of([scores for _, scores, _ in rivals])]
        params = None
        for block in range(choosing.blocks):
            if block >= seen:
                params = self.merge(recipe) if params is None else params
                values = self._score(params, recipe, block, values if block else {})
                self._store.record(trial, "values", values)
            if block + 1 == choosing.blocks or block + 1 < seen:
                continue
            for number, rival_scores, rival in rivals:
                differences = choosing.lost(values, block + 1, rival)
                if differences is not None:
                    self._store.record(trial, "stopped_by", number)
                    pairs = zip(rival_scores, differences, strict=True)
                    return tuple(score + difference for score, difference in pairs)
        return choosing.scores(values)


def _lengths(values: Values) -> dict[str, int]:
    return {name: len(each) for name, each in values.items()}


def _counted(trials: Sequence["FrozenTrial"]) -> list["FrozenTrial"]:
    return [trial for trial in trials if trial.state.name == "COMPLETE"]


def _candidate(trial: "FrozenTrial") -> Candidate:
    elapsed = (trial.datetime_complete - trial.datetime_start).total_seconds()
    return Candidate(
        number=trial.number,
        settings=dict(trial.params),
        recipe=trial.user_attrs["recipe"],
        scores=tuple(trial.values),
        examples=sum(_lengths(trial.user_attrs["values"]).values()),
        stopped_by=trial.user_attrs.get("stopped_by"),
        seconds=elapsed,
    )


def _candidates(trials: Sequence["FrozenTrial"]) -> list[Candidate]:
    return list(map(_candidate, _counted(trials)))


def _refused(trials: Sequence["FrozenTrial"]) -> dict[int, str]:
    return {t.number: t.user_attrs["refused"] for t in trials if "refused" in t.user_attrs}


def _with_values(trials: Sequence["FrozenTrial"]) -> list[tuple[Candidate, Values]]:
    """Returns the candidates that were scored on all examples, and their values."""
    pairs = [(_candidate(trial), trial.user_attrs["values"]) for trial in _counted(trials)]
    return [(candidate, values) for candidate, values in pairs if candidate.stopped_by is None]


def search(
    settings: RecipeSearch,
    to_merge: ToMerge,
    aims: Mapping[str, Sequence[TaskData]],
    vocabulary: Vocabulary,
    out: AnyPath,
    *,
    data: Mapping[str, Json],
    mesh: jax.sharding.Mesh,
    url: str | None = None,
    study: str = "search",
    batch_size: int = 32,
    notice: Callable[[str], None] = lambda line: None,
) -> SearchResult:
    """Searches a space of recipes, or goes on with a search; judges what is chosen.

    Args:
        settings: The space, and how it is searched.
        to_merge: The models, which stay in memory.
        aims: One or two, by name: the tasks of each, whose mean score is to be high.
        vocabulary: The models'.
        out: A folder for this worker; gets search.json, scores/ and judged/.
        data: What the tasks were read from, as JSON values.
        mesh: Where the models are placed.
        url: A PostgreSQL database, which several workers may share; None: out/study.db.
        study: The name of the search in the database.
        batch_size: Examples in a batch, at most.
        notice: Is called with a line when the database does not answer.

    Raises:
        ConfigError: `out` or the storage holds another search, or cannot be used.
        DataError: A task has too few examples, or the database went away for good.
        M2LError: Models do not fit, or no candidate could be scored.
    """
    out = storage.path(out)
    manifest = to_merge.check(settings.space)
    config = models.from_dict(manifest.model)
    names = [task.info.name for tasks in aims.values() for task in tasks]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{min(doubled)} is in both aims; every task counts for one")
    for task in itertools.chain(*aims.values()):
        if len(task.examples) < LEAST_EXAMPLES:
            raise DataError(
                f"task {task.info.name}: {len(task.examples)} examples are too few; one half "
                f"chooses and the other judges: give {LEAST_EXAMPLES} at the very least"
            )
        if task.metric == "bleu":
            raise DataError(
                f"task {task.info.name}: BLEU is no mean over examples, and a race needs one; take "
                "--generative_score likelihood"
            )
    parts = [[halves(task) for task in tasks] for tasks in aims.values()]
    sampler = settings.sampler_of(len(aims))
    confidence = settings.confidence if settings.racing else None
    content = {
        # As text, where ranges are not lists.
        "methods": {name: repr(dict(values)) for name, values in settings.methods.items()},
        "sampler": sampler,
        "seed": settings.seed,
        "racing": confidence,
        "aims": {name: [task.digest for task in tasks] for name, tasks in aims.items()},
        "data": dict(data),
        **to_merge.digests,
    }
    files.check_claim(out, RECORD, content, kind="search")
    with contextlib.ExitStack() as exits:
        store = _open(settings, content, sampler, len(aims), out, url, study, notice, exits)
        half = [[choosing for choosing, _ in tasks] for tasks in parts]
        choosing = ChoosingHalf(half, config, vocabulary, batch_size, confidence)
        running = _Search(settings, to_merge, choosing, store, config, mesh, out)
        running.run()
        trials = store.trials()
        scored = [candidate for candidate, _ in _with_values(trials)]
        refused = _refused(trials)
        if not scored:
            raise MergeError(f"no candidate could be scored: {[*refused.values()][-1]}")
        front = [scored[place] for place in front_of([each.scores for each in scored])]
        half = [[judging for _, judging in tasks] for tasks in parts]
        evaluator = Evaluator(config, [*itertools.chain(*half)], vocabulary, batch_size=batch_size)
        with jax.set_mesh(mesh):
            judged = _judge(running, to_merge, front, evaluator, half, out)
    return SearchResult(
        aims=tuple(aims),
        candidates=tuple(_candidates(trials)),
        refused=refused,
        front=tuple(front),
        chosen=max(front, key=lambda each: fmean(each.scores)),
        judged=tuple(judged),
        importances=_importances(settings, trials, len(aims)),
        examples=sum(choosing.counts(choosing.blocks).values()),
        storage=store.label,
    )


def _open(
    settings: RecipeSearch,
    content: JsonObject,
    sampler: str,
    aims: int,
    out: AnyPath,
    url: str | None,
    study: str,
    notice: Callable[[str], None],
    exits: contextlib.ExitStack,
) -> "SearchStorage":
    """Claims and locks the folder, and opens the storage."""
    from m2l.studies import search_storage

    if url is None and not isinstance(out, Path):
        raise ConfigError(f"{out}: SQLite needs a local folder; give a PostgreSQL --storage")
    claimed = (out / RECORD).exists()
    worker = files.read_record(out / RECORD).get("worker") if claimed else uuid.uuid4().hex

    def claim() -> None:
        if not claimed:
            files.claim(out, RECORD, content | {"worker": worker})
        lock = exits.enter_context(Lock(out / f".{RECORD}.lock"))
        if not lock.acquire(wait=True):
            raise ConfigError(
                f"{out} is searched in by {lock.owner()}; give this one another --out"
            )

    if url is None:
        claim()
    population = min(50, max(4, settings.candidates // 5))
    store = search_storage.SearchStorage(
        url or f"sqlite:///{out.absolute() / 'study.db'}",
        study,
        content,
        aims=aims,
        sampler=search_storage.make_sampler(
            sampler, settings.seed, startup=settings.startup, population=population
        ),
        worker=str(worker),
        notice=notice,
    )
    if url is not None:
        claim()
    return store


def _judge(
    running: _Search,
    to_merge: ToMerge,
    front: Sequence[Candidate],
    evaluator: Evaluator,
    aims: Sequence[Sequence[TaskData]],
    out: AnyPath,
) -> list[Judged]:
    """Evaluates the front on the half that judges, next to the experts' average and the base."""
    average = Recipe("average")
    recipes = {f"candidate {each.number}": Recipe.from_dict(each.recipe) for each in front}
    results: dict[str, dict[str, Result]] = {}

    def evaluate(name: str, params: Params, digest: str) -> None:
        folder = out / "judged" / digest[:32]
        options = {"values": True, "description": f"judge {name}"}
        evaluated = evaluator.run(params, folder, model_digest=digest, **options)
        results[name] = {result.task: result for result in evaluated}

    evaluate("average", running.merge(average), running.digest(average))
    if running.base is not None:
        evaluate("base", running.base, to_merge.digests["base"])
    for name, recipe in recipes.items():
        evaluate(name, running.merge(recipe), running.digest(recipe))

    def statistics(name: str, tasks: Sequence[TaskData]) -> list[Statistic]:
        selected = [results[name][task.info.name] for task in tasks]
        return [bootstrap.statistic(r.metric, [{"value": v} for v in r.values]) for r in selected]

    judged = []
    numbers = {f"candidate {each.number}": each.number for each in front}
    for name, by_task in results.items():
        scores, intervals, changes = [], [], []
        for tasks in aims:
            counts = [len(task.examples) for task in tasks]
            scores.append(fmean(by_task[task.info.name].score for task in tasks))
            own, reference = statistics(name, tasks), statistics("average", tasks)
            intervals.append(bootstrap.interval(own, counts))
            changes.append(bootstrap.paired(reference, own, counts))
        judged.append(
            Judged(
                name,
                numbers.get(name),
                tuple(scores),
                tuple(intervals),
                None if name == "average" else tuple(changes),
            )
        )
    return judged


def _importances(
    settings: RecipeSearch, trials: Sequence["FrozenTrial"], aims: int
) -> tuple[dict[str, float], ...]:
    """Returns for each aim the share of the scores' variance that each dimension explains.

    The method's is that between the means of methods, and the shares of its settings, by fANOVA,
    are of the variance within it.
    """
    from m2l.studies import search_storage

    space, complete = settings.space, _counted(trials)
    members = {
        method: [trial for trial in complete if trial.params.get(METHOD, method) == method]
        for method in space.methods
    }
    shares = []
    for aim in range(aims):
        scores = {method: [t.values[aim] for t in group] for method, group in members.items()}
        every = [score for group in scores.values() for score in group]
        squares = {
            method: _squares(group, fmean(group)) for method, group in scores.items() if group
        }
        total = _squares(every, fmean(every)) or 1.0
        share = {METHOD: 1 - sum(squares.values()) / total} if len(space.methods) > 1 else {}
        for method, square in squares.items():
            names = [dimension.name for dimension in space.dimensions(method)]
            explained = search_storage.importances(members[method], aims, aim, names)
            share |= {name: explained[name] * square / total for name in names}
        shares.append(share)
    return tuple(shares)


def _squares(scores: Sequence[float], mean: float) -> float:
    return sum((score - mean) ** 2 for score in scores)

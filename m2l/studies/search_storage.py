"""Where a search of recipes is stored: an Optuna study in SQLite or PostgreSQL.

Optuna is an extra, which only this module imports.
"""

import contextlib
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, NSGAIISampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import exc

from m2l.errors import ConfigError, DataError, reason
from m2l.merging.search_space import Dimension
from m2l.typing import Json

T = TypeVar("T")

HEARTBEAT = 15
"""Seconds between signs of life of a candidate that is scored."""
GRACE = 90
"""Seconds without one, after which another worker scores it anew."""
WAITS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between attempts to reach a database that does not answer."""

_CONTENT, _WORKER = "m2l", "worker"
_FAILURES = (optuna.exceptions.StorageInternalError, exc.DBAPIError)


class _ReseededSampler(BaseSampler):
    """A sampler that is made anew for each candidate, with a seed of its number.

    What it draws follows from the candidates before, and not from how often a search was stopped.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int):
        self._make, self._seed = make, seed
        self._current = make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        seed = int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0])
        self._current = self._make(seed)
        self._current.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._current.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Json]:
        return self._current.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Json:
        return self._current.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._current.after_trial(study, trial, state, values)


def _quiet() -> None:
    """Silences Optuna's log, and its warnings of features that it may change."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")


def make_sampler(name: str, seed: int, *, startup: int, population: int) -> BaseSampler:
    """Returns one of Optuna's samplers: "tpe", "cma-es" or "nsga-ii".

    Args:
        name: Which.
        seed: Of what it draws.
        startup: How many candidates "tpe" wants to know before it learns from them.
        population: How many "nsga-ii" has in a generation.
    """
    _quiet()

    def make(seed: int) -> BaseSampler:
        if name == "cma-es":
            return CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if name == "nsga-ii":
            return NSGAIISampler(population_size=population, seed=seed)
        # Conditional on the method; those being scored by other workers are kept away from.
        return TPESampler(
            n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed
        )

    return _ReseededSampler(make, seed)


def suggest(trial: Trial, dimension: Dimension) -> Json:
    """Returns what the sampler chooses for a dimension."""
    if dimension.choices:
        return trial.suggest_categorical(dimension.name, dimension.choices)
    return trial.suggest_float(
        dimension.name,
        dimension.low,
        dimension.high,
        step=dimension.step or None,
        log=dimension.log,
    )


class SearchStorage:
    """An Optuna study, whose database may go away for a while.

    Args:
        url: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE.
        name: The study's, of which a database may have several.
        content: What is searched, as JSON values by name.
        aims: How many scores a candidate has; more is better.
        sampler: Chooses candidates.
        worker: What identifies this worker, also after it was stopped and started again.
        notice: Is called with a line when the database does not answer.

    Raises:
        ConfigError: The database cannot be opened, or the study is another one.
    """

    def __init__(
        self,
        url: str,
        name: str,
        content: Mapping[str, Json],
        *,
        aims: int,
        sampler: BaseSampler,
        worker: str,
        notice: Callable[[str], None],
    ):
        _quiet()
        self._worker, self._notice = worker, notice
        try:
            parsed = sqlalchemy.make_url(url)
            if parsed.get_backend_name() == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            self.label = parsed.render_as_string(hide_password=True)
        except exc.ArgumentError as error:
            raise ConfigError(
                "--storage: expected postgresql://USER:PASSWORD@HOST/DATABASE, which this is not"
            ) from error
        for attempt in range(3):
            try:
                self._open(parsed, name, content, aims, sampler)
                return
            except (exc.IntegrityError, exc.ProgrammingError) as error:
                # Another worker makes the tables at this moment.
                if attempt == 2:
                    raise self._unusable(error) from error
                time.sleep(1.0)
            except (*_FAILURES, exc.SQLAlchemyError, RuntimeError, ImportError) as error:
                raise self._unusable(error) from error

    def _unusable(self, error: Exception, problem: str = "cannot be used") -> ConfigError:
        cause = error.__cause__ if isinstance(error, _FAILURES[0]) else error
        cause = getattr(cause, "orig", None) or cause
        return ConfigError(f"the storage {self.label} {problem}: {reason(cause)}")

    def _open(
        self,
        url: sqlalchemy.URL,
        name: str,
        content: Mapping[str, Json],
        aims: int,
        sampler: BaseSampler,
    ) -> None:
        seconds = "timeout" if url.get_backend_name() == "sqlite" else "connect_timeout"
        self._storage = RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs={"pool_pre_ping": True, "connect_args": {seconds: 20}},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )
        directions = ["maximize"] * aims
        self._study = optuna.create_study(
            storage=self._storage,
            sampler=sampler,
            study_name=name,
            directions=directions,
            load_if_exists=True,
        )
        content = json.loads(json.dumps(content))
        recorded = self._study.user_attrs.get(_CONTENT)
        if recorded is None:
            if self._study.get_trials(deepcopy=False):
                raise ConfigError(
                    f"the storage {self.label} holds another study called {name!r}, which m2l did "
                    "not make; choose another --study"
                )
            self._study.set_user_attr(_CONTENT, content)
            return
        for key, value in content.items():
            if recorded.get(key) != value:
                raise ConfigError(
                    f"the storage {self.label} holds another search called {name!r}: its {key} is "
                    f"{reason(recorded.get(key))}, this one's is {reason(value)}; choose another "
                    "--study, or another storage"
                )

    def _patiently(self, call: Callable[[], T]) -> T:
        """Calls what uses the database, again where that does not answer.

        Raises:
            DataError: It still does not after all WAITS.
        """
        for wait in (*WAITS, None):
            try:
                return call()
            except _FAILURES as error:
                cause = self._unusable(error, "does not answer")
                if wait is None:
                    raise DataError(
                        f"{cause}; what was scored is stored: run the same command again when the "
                        "database answers"
                    ) from error
                self._notice(f"{cause}; trying again in {wait:g} s")
                self._storage.remove_session()
                time.sleep(wait)
        raise AssertionError

    def begin(self, first: Callable[[], Sequence[Mapping[str, Json]]]) -> None:
        """Queues candidates, each by dimension, if the search has none yet."""
        if self.trials():
            return
        for values in first():
            self._patiently(
                lambda values=values: self._study.enqueue_trial(dict(values), skip_if_exists=True)
            )

    def trials(self) -> list[FrozenTrial]:
        """Returns all candidates, in the order of their numbers."""
        return self._patiently(lambda: self._study.get_trials(deepcopy=False))

    def next_trial(self, candidates: int) -> Trial | None:
        """Returns the candidate to score next: one that this worker was stopped in, or a new one.

        Args:
            candidates: How many there may be in all.

        Returns:
            None when there are so many, the last of which may still be scored by others.
        """

        def ask() -> Trial | None:
            trials = self._study.get_trials(deepcopy=False)
            running = [each for each in trials if each.state == TrialState.RUNNING]
            for each in running:
                if each.user_attrs.get(_WORKER) == self._worker:
                    return Trial(self._study, each._trial_id)
            optuna.storages.fail_stale_trials(self._study)
            if len(self._active()) >= candidates:
                return None
            trial = self._study.ask()
            trial.set_user_attr(_WORKER, self._worker)
            # Others were faster: there are enough, or they have queued the same to begin with.
            if self._active().index(trial.number) >= candidates:
                self._study.tell(trial, state=TrialState.FAIL)
                return None
            if self._is_queued_twice(trial.number):
                self._study.tell(trial, state=TrialState.FAIL)
                return ask()
            return trial

        return self._patiently(ask)

    def _is_queued_twice(self, number: int) -> bool:
        trials = self._study.get_trials(deepcopy=False)
        queued = {t.number: t.system_attrs.get("fixed_params") for t in trials}
        return queued[number] is not None and any(
            trial.state != TrialState.FAIL and queued[trial.number] == queued[number]
            for trial in trials[:number]
        )

    def _active(self) -> list[int]:
        """Returns the numbers of candidates that are scored, or being scored."""
        return [
            trial.number
            for trial in self._study.get_trials(deepcopy=False)
            if is_counted(trial)
            or (trial.state == TrialState.RUNNING and _WORKER in trial.user_attrs)
        ]

    def finished(self, candidates: int) -> bool:
        """Returns whether so many candidates are scored; if not, others are scoring them."""
        return sum(map(is_counted, self.trials())) >= candidates

    @contextlib.contextmanager
    def alive(self, trial: Trial) -> Iterator[None]:
        """Tells other workers, as long as the block runs, that its candidate is being scored."""
        ended = threading.Event()

        def beat() -> None:
            while True:
                with contextlib.suppress(*_FAILURES):
                    self._storage.record_heartbeat(trial._trial_id)
                if ended.wait(HEARTBEAT):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def draw(self, trial: Trial, dimension: Dimension) -> Json:
        """Returns what the sampler chooses for a dimension."""
        return self._patiently(lambda: suggest(trial, dimension))

    def record(self, trial: Trial, key: str, value: Json) -> None:
        """Stores something of a candidate."""
        self._patiently(lambda: trial.set_user_attr(key, value))

    def finish(self, trial: Trial, scores: Sequence[float] | None) -> None:
        """Stores a candidate's scores, one for each aim; None: it is no recipe."""
        state = TrialState.FAIL if scores is None else TrialState.COMPLETE

        def tell() -> None:
            # What was stored when the answer was lost is not stored twice.
            self._study.tell(trial.number, scores, state=state, skip_if_finished=True)

        self._patiently(tell)


def maximize(
    score: Callable[[Callable[[Dimension], Json]], float | None],
    first: Sequence[Mapping[str, Json]],
    candidates: int,
    seed: int,
) -> None:
    """Searches by TPE, without a storage.

    Args:
        score: Called with what draws a candidate's value of a dimension; returns its score, the
            higher the better, or None for what cannot be scored.
        first: Candidates to begin with, each by dimension.
        candidates: How many are drawn, these included.
        seed: Of the sampler.
    """
    sampler = make_sampler("tpe", seed, startup=len(first), population=1)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for values in first:
        study.enqueue_trial(dict(values))
    for _ in range(candidates):
        trial = study.ask()
        value = score(lambda dimension, trial=trial: suggest(trial, dimension))
        study.tell(trial, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)


def is_counted(trial: FrozenTrial) -> bool:
    """Returns whether a candidate was scored, or refused for good."""
    return trial.state == TrialState.COMPLETE or "refused" in trial.user_attrs


def importances(
    trials: Sequence[FrozenTrial], aims: int, aim: int, dimensions: Sequence[str]
) -> dict[str, float]:
    """Computes how much of the variance of a score each dimension explains, by fANOVA.

    Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter Importance".

    Args:
        trials: Candidates that have all of the dimensions.
        aims: How many scores they have.
        aim: Which of them is explained.
        dimensions: Names.

    Returns:
        By dimension its share of all of them; 0 of each where there are too few candidates.
    """
    shares = dict.fromkeys(dimensions, 0.0)
    varied = [name for name in dimensions if len({str(t.params[name]) for t in trials}) > 1]
    if len({trial.values[aim] for trial in trials}) > 1 and varied and len(trials) > 3:
        study = optuna.create_study(directions=["maximize"] * aims)
        study.add_trials(trials)
        shares |= optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            params=varied,
            target=lambda trial: trial.values[aim],
        )
    return shares

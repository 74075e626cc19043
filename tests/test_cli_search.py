"""`m2l search`: candidates that race, storages, stops, and what it refuses."""

import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
import threading
from pathlib import Path
from statistics import fmean

import numpy as np
import optuna
import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from m2l import api, checkpoints, partitioning
from m2l.errors import DataError, M2LError, MergeError
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.task_data import halves
from m2l.models import from_dict
from m2l.studies import racing, recipe_search, search_storage

SPACE = (
    "{'ties': {'scale': (0.0, 2.0), 'density': [0.2, 0.5]}, 'task_arithmetic': {'scale': (0, 2)}}"
)


def command(road, out, *further):
    return (
        *("search", "--base", road / "base", "--expert", road / "sentiment"),
        *("--expert", road / "closed_book_qa", f"--gin.Search.methods={SPACE}"),
        *("--mixture", "imdb_good_or_bad", "--max_examples", 16, "--input_length", 32),
        *("--target_length", 8, "--batch_size", 8, "--out", out, *further),
    )


def read(path):
    return json.loads(path.read_text())


def trials(out):
    with sqlite3.connect(out / "study.db") as database:
        rows = database.execute(
            "select number, state, value from trials left join trial_values using (trial_id)"
        ).fetchall()
        params = database.execute(
            "select number, param_name, param_value from trials join trial_params using (trial_id)"
        ).fetchall()
    return sorted(rows), sorted(params)


@pytest.fixture(scope="module")
def searched(road, run_m2l, tmp_path_factory):
    out = tmp_path_factory.mktemp("searched") / "out"
    assert run_m2l(*command(road, out, "--candidates", 7)) == 0
    return out


def test_the_recipe_and_its_scores_are_those_of_the_merge_on_each_half(road, run_m2l, searched):
    recorded = read(searched / "recipe.json")
    manifest = checkpoints.read_manifest(road / "sentiment")
    vocabulary, (task,) = api.evaluation_tasks(
        *("imdb_good_or_bad", None, "microworld", manifest.vocabulary["fingerprint"]),
        *("microworld",),
        split="validation",
        lengths={"inputs": 32, "targets": 8},
        max_examples=16,
    )
    out = searched.parent / "merged"
    models = ("--base", road / "base", "--expert", road / "sentiment")
    models += ("--expert", road / "closed_book_qa")
    assert run_m2l("merge", *models, "--recipe", searched / "recipe.json", "--out", out) == 0
    evaluator = Evaluator(from_dict(manifest.model), halves(task), vocabulary)
    chose, judged = evaluator.results(checkpoints.restore(out))
    assert recorded["chosen_by"] == {"imdb_good_or_bad": pytest.approx(chose.score)}
    assert recorded["judged"] == {"imdb_good_or_bad": pytest.approx(judged.score)}
    assert recorded["chosen_by"]["imdb_good_or_bad"] == max(row[2] for row in trials(searched)[0])
    page = (searched / "report" / "index.html").read_text()
    for words in ("The curve", "The importance of each setting", "ties.density", "average"):
        assert words in page
    assert {path.name for path in (searched / "report" / "tables").glob("*.csv")} == {
        *("judged.csv", "candidates.csv", "importances.csv"),
    }


def test_a_search_that_was_killed_goes_on_to_the_same_candidates(
    road, run_m2l, searched, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    for method, count in (("record", 7), ("finish", 3)):
        calls, original = [], getattr(search_storage.SearchStorage, method)

        def dying(self, *arguments, calls=calls, count=count, original=original):
            calls.append(arguments)
            if len(calls) == count:
                raise Killed
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(search_storage.SearchStorage, method, dying)
            with pytest.raises(Killed):
                run_m2l(*command(road, tmp_path / "out", "--candidates", 7))
    assert run_m2l(*command(road, tmp_path / "out", "--candidates", 7)) == 0
    assert trials(tmp_path / "out") == trials(searched)
    assert (tmp_path / "out" / "recipe.json").read_bytes() == (
        searched / "recipe.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seed", 1), "holds another search: its seed is 0, this one's is 1"),
        (
            ("--gin.Search.methods={'ties': {'densty': (0, 1)}}",),
            "unknown setting of ties 'densty'",
        ),
        (("--gin.Search.methods={'linear': {'t': (0, 1)}}",), "linear merges 1 expert, not 2"),
        (("--gin.Search.methods={'ties': {}}",), "all is fixed"),
        (("--sampler", "grid"), "unknown sampler 'grid'"),
        (("--sampler", "cma-es"), "sampler cma-es: it needs two or more ranges"),
        (("--mixture", "imdb_good_or_bad"), "--mixture imdb_good_or_bad is there twice"),
        (("--mixture", "sentiment"), "imdb_good_or_bad is in both aims"),
        (("--storage", "mysql://host/base"), "--storage: expected postgresql://"),
        (("--storage", "postgresql://me:secret@127.0.0.1:1/base"), "cannot be used: connection"),
        (("--max_examples", 8), "8 examples are too few"),
    ],
)
def test_what_a_search_cannot_do_is_refused_in_one_line(
    road, run_m2l, searched, capsys, flags, message
):
    before = sorted(searched.rglob("*"))
    capsys.readouterr()
    assert run_m2l(*command(road, searched, *flags)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m2l:")]
    assert len(lines) == 1 and message in lines[0] and "secret" not in lines[0]
    assert sorted(searched.rglob("*")) == before


# --- searches with made-up scores ---


@pytest.fixture(scope="module")
def loaded(road):
    """A vocabulary and two tasks, with 20 examples in each half."""
    fingerprint = checkpoints.read_manifest(road / "base").vocabulary["fingerprint"]
    return api.evaluation_tasks(
        *("imdb_good_or_bad+ag_news_topic", None, "microworld", fingerprint, "microworld"),
        split="validation",
        lengths={"inputs": 32, "targets": 8},
        max_examples=40,
    )


@pytest.fixture
def made_up(road, loaded, monkeypatch):
    """Runs a search in which `score(recipe, random, example)` is an example's."""
    vocabulary, tasks = loaded
    merged = threading.local()

    def merge(base, experts, recipe, statistics):
        merged.recipe = recipe
        return experts[0]

    monkeypatch.setattr(recipe_search.merging, "merge_params", merge)

    # All merges being one, they are judged once.
    judge, judged = Evaluator.run, {}

    def judge_once(self, *arguments, **options):
        names = tuple(task.info.name for task in self.tasks)
        if names not in judged:
            judged[names] = judge(self, *arguments, **options)
        return judged[names]

    monkeypatch.setattr(Evaluator, "run", judge_once)

    def run(out, score, *, aims=1, notice=lambda line: None, url=None, study="s", **settings):
        def values(self, params, only):
            return {
                name: [
                    score(merged.recipe, np.random.default_rng(i), example)
                    for i, example in enumerate(t.examples)
                ]
                for name, t in ((t.info.name, t) for t in self.tasks)
                if name in only
            }

        monkeypatch.setattr(Evaluator, "values", values)
        groups = {"both": tasks} if aims == 1 else {t.info.name: [t] for t in tasks}
        return recipe_search.search(
            recipe_search.RecipeSearch(**settings),
            recipe_search.ToMerge(road / "base", [road / "sentiment", road / "closed_book_qa"]),
            groups,
            vocabulary,
            out,
            data={},
            mesh=partitioning.make_mesh(),
            notice=notice,
            url=url,
            study=study,
        )

    return run


def near(recipe, random, example):
    """The score of an example, the best near a scale of 1.3."""
    return 80 - 20 * abs(recipe.scale - 1.3) + random.normal(0, 5)


SCALES = {"task_arithmetic": {"scale": (0.0, 2.0)}}


@pytest.mark.parametrize("sampler", ["tpe", "cma-es", "nsga-ii"])
def test_candidates_that_are_worse_stop_early_and_the_best_is_found(made_up, tmp_path, sampler):
    space = {"ties": {"scale": (0.0, 2.0), "density": (0.1, 0.9)}}
    options = {"methods": space, "sampler": sampler, "candidates": 12}
    result = made_up(tmp_path / "raced", near, **options)
    assert len(result.candidates) == 12
    assert abs(result.chosen.recipe["scale"] - 1.3) < 0.25
    (shares,) = result.importances
    assert shares["ties.scale"] > 0.6 and sum(shares.values()) == pytest.approx(1)
    by_number = {each.number: each for each in result.candidates}
    stopped = [each for each in result.candidates if each.stopped_by is not None]
    assert len(stopped) > 2
    for each in stopped:
        rival = by_number[each.stopped_by]
        assert each.examples < rival.examples == result.examples and each.number > rival.number
        # All examples differ by as much, of those that were not scored as well.
        expected = -20 * abs(each.recipe["scale"] - 1.3) + 20 * abs(rival.recipe["scale"] - 1.3)
        assert each.scores[0] - rival.scores[0] == pytest.approx(expected)


def test_what_methods_differ_by_is_the_importance_of_the_method(made_up, tmp_path):
    space = {"ties": {"scale": (0.0, 1.0)}, "task_arithmetic": {"scale": (0.0, 1.0)}}
    score = lambda recipe, *_: 40.0 if recipe.method == "ties" else 60.0 + recipe.scale  # noqa: E731
    result = made_up(tmp_path, score, methods=space, candidates=8, racing=False)
    scores = {name: [] for name in space}
    for each in result.candidates:
        scores[each.recipe["method"]].append(each.scores[0])
    every = np.concatenate([*scores.values()])
    within = sum(len(own) * np.var(own) for own in scores.values()) / (len(every) * np.var(every))
    (shares,) = result.importances
    assert shares["method"] == pytest.approx(1 - within)
    assert shares["task_arithmetic.scale"] == pytest.approx(within) and not shares["ties.scale"]


def test_a_race_is_lost_where_the_difference_is_larger_than_its_standard_error_allows(
    loaded, monkeypatch
):
    monkeypatch.setattr(racing, "Evaluator", lambda *_, **__: None)
    vocabulary, tasks = loaded
    halved = [halves(task)[0] for task in tasks]
    race = racing.ChoosingHalf([halved], None, vocabulary, 8, 0.9)
    assert [sum(race.counts(n).values()) for n in range(1, 5)] == [6, 10, 20, 40]
    random, names = np.random.default_rng(0), [task.info.name for task in halved]
    outcomes = []
    for blocks in (2, 3, 4):
        for _ in range(20):
            rival = {name: random.normal(60, 20, 20).tolist() for name in names}
            counts, shift = race.counts(blocks), random.uniform(0, 12)
            values = {
                name: (np.array(rival[name][:count]) - random.normal(shift, 10, count)).tolist()
                for name, count in counts.items()
            }
            pairs = [np.array(values[n]) - np.array(rival[n])[: counts[n]] for n in names]
            difference = np.mean([pair.mean() for pair in pairs])
            error = np.sqrt(sum(pair.var(ddof=1) / len(pair) for pair in pairs)) / len(pairs)
            lost = race.lost(values, blocks, rival)
            # Fewer than 20 examples show nothing; elsewhere as a normal distribution's 90 %.
            z = difference / error if blocks > 2 else 0.0
            if abs(z + 1.28) > 0.25:
                assert (lost is not None) == (z < -1.28)
                outcomes.append(lost is not None)
            assert lost is None or lost == pytest.approx([difference])
    assert 10 < sum(outcomes) < len(outcomes) - 10


def test_two_aims_have_a_front(made_up, tmp_path, monkeypatch):
    def score(recipe, random, example):
        aim = len(example.choices) == 2
        return 80 - 20 * abs(recipe.scale - (0.8 if aim else 1.3)) + random.normal()

    result = made_up(tmp_path / "out", score, aims=2, methods=SCALES, candidates=10, racing=False)
    assert result.aims == ("imdb_good_or_bad", "ag_news_topic")
    scores = {each.number: each.scores for each in result.candidates}
    expected = {
        number
        for number, own in scores.items()
        if not any(np.all(np.array(o) >= own) and o != own for o in scores.values())
    }
    assert {each.number for each in result.front} == expected
    assert result.chosen.scores == max(scores.values(), key=fmean)
    assert len(expected) > 1 and 0.7 < result.chosen.recipe["scale"] < 1.4
    monkeypatch.setattr(racing, "LEAST_RACED", 5)
    raced = made_up(tmp_path / "raced", score, aims=2, methods=SCALES, candidates=10)
    by_number = {each.number: each for each in raced.candidates}
    stopped = [each for each in raced.candidates if each.stopped_by is not None]
    assert stopped
    for each in stopped:
        assert all(np.less(each.scores, by_number[each.stopped_by].scores))


def test_what_is_no_recipe_is_refused_and_the_search_goes_on(made_up, tmp_path):
    # Drop rates from drop_rate - epsilon to drop_rate + epsilon have to be in [0, 1).
    space = {"della": {"drop_rate": (0.1, 0.9), "epsilon": (0.05, 0.3)}}
    result = made_up(tmp_path / "out", near, methods=space, candidates=8)
    assert result.refused and len(result.refused) + len(result.candidates) == 8
    assert all("rates from" in message for message in result.refused.values())
    for each in result.candidates:
        low, high = (each.recipe["drop_rate"] + s * each.recipe["epsilon"] for s in (-1, 1))
        assert low >= 0 and high < 1
    space = {"della": {"drop_rate": [0.9], "epsilon": [0.3, 0.4]}}
    with pytest.raises(MergeError, match=r"no candidate could be scored: .*rates from"):
        made_up(tmp_path / "none", near, methods=space, candidates=3)


def test_a_database_that_does_not_answer_is_waited_for_and_then_named(
    made_up, tmp_path, monkeypatch
):
    monkeypatch.setattr(search_storage, "WAITS", (0.0, 0.0))
    notices, calls = [], []
    original = optuna.Study.tell

    def tell(self, *arguments, times, **options):
        calls.append(self)
        if 3 <= len(calls) < 3 + times:
            raise StorageInternalError("it is said") from OperationalError("", (), "away")
        return original(self, *arguments, **options)

    def run(out, times):
        calls.clear()
        monkeypatch.setattr(
            optuna.Study, "tell", lambda self, *a, **o: tell(self, *a, times=times, **o)
        )
        return made_up(out, near, methods=SCALES, candidates=4, notice=notices.append)

    undisturbed = run(tmp_path / "undisturbed", 0)
    away = run(tmp_path / "away", 2)
    assert len(notices) == 2 and "away; trying again in 0 s" in notices[0]
    settings = [each.settings for each in undisturbed.candidates]
    assert [each.settings for each in away.candidates] == settings
    with pytest.raises(DataError, match="run the same command again when the database answers"):
        run(tmp_path / "gone", 3)
    scored = {path.name: path.read_bytes() for path in (tmp_path / "gone" / "scores").iterdir()}
    gone = run(tmp_path / "gone", 0)
    assert [each.settings for each in gone.candidates] == settings
    # What was scored before was not scored again.
    kept = {name: (tmp_path / "gone" / "scores" / name).read_bytes() for name in scored}
    assert kept == scored and len(scored) == 3


def test_a_storage_with_another_study_is_refused(made_up, tmp_path):
    made_up(tmp_path / "out", near, methods=SCALES, candidates=2)
    database = tmp_path / "out" / "study.db"
    for content, message in (
        (None, "holds another study called 's', which m2l did not make"),
        ("text", "cannot be used: file is not a database"),
    ):
        database.unlink()
        if content:
            database.write_text(100 * content)
        else:
            study = optuna.create_study(storage=f"sqlite:///{database}", study_name="s")
            study.tell(study.ask(), 1.0)
        with pytest.raises(M2LError, match=message):
            made_up(tmp_path / "out", near, methods=SCALES, candidates=2)


# --- a real PostgreSQL ---


class Server:
    """A PostgreSQL server of its own folder, which can be stopped and started."""

    def __init__(self, binaries, port):
        self._binaries, self._folder = binaries, Path(tempfile.mkdtemp(prefix="m2l-postgresql-"))
        # It refuses to be run by root.
        self._user = {"user": "postgres"} if os.getuid() == 0 else {}
        if self._user:
            shutil.chown(self._folder, **self._user)
        self.url = f"postgresql://m2l:secret@127.0.0.1:{port}/postgres"
        self._options = f"-p {port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("initdb", "-U", "m2l", "--auth=trust", "--no-sync")
        self.start()

    def _run(self, program, *arguments):
        words = [self._binaries / program, "-D", self._folder / "data", *arguments]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=self._folder, **self._user)

    def start(self):
        self._run("pg_ctl", "-w", "-l", self._folder / "log", "-o", self._options, "start")

    def stop(self):
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def remove(self):
        self.stop()
        shutil.rmtree(self._folder)


@pytest.fixture(scope="module")
def postgresql(free_port):
    folders = [
        *Path("/usr/lib/postgresql").glob("*/bin"),
        *map(Path, os.environ["PATH"].split(":")),
    ]
    binaries = [folder for folder in folders if (folder / "initdb").is_file()]
    if not binaries:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    server = Server(binaries[0], free_port())
    yield server
    server.remove()


def test_workers_share_a_postgresql_that_may_go_away(made_up, postgresql, tmp_path, monkeypatch):
    monkeypatch.setattr(search_storage, "WAITS", (0.1, 0.5, 1.0, 2.0, 4.0, 8.0))
    options = {"methods": SCALES, "candidates": 8, "url": postgresql.url}
    finish, tried, notices, results = search_storage.SearchStorage.finish, [], [], {}
    both = threading.Event()

    def finishing(self, trial, scores):
        finish(self, trial, scores)
        name = threading.current_thread().name
        tried.append(name)
        if {"one", "other"} <= {*tried}:
            both.set()
        if len(tried) == 4:
            postgresql.stop()
            threading.Timer(0.5, postgresql.start).start()
        both.wait(60)

    monkeypatch.setattr(search_storage.SearchStorage, "finish", finishing)

    def work(name):
        results[name] = made_up(tmp_path / name, near, notice=notices.append, **options)

    workers = [threading.Thread(target=work, args=(name,), name=name) for name in ("one", "other")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    one, other = results["one"], results["other"]
    assert {*tried} == {"one", "other"} and one.candidates == other.candidates
    assert len(one.candidates) == 8 and one.chosen == other.chosen
    assert len({str(each.settings) for each in one.candidates}) == 8
    assert notices and all("secret" not in line and "trying again" in line for line in notices)
    with pytest.raises(M2LError, match="holds another search called 's': its methods is"):
        made_up(tmp_path / "third", near, **(options | {"methods": {"ties": {"scale": (0, 1)}}}))
    assert not (tmp_path / "third").exists()


def test_what_two_workers_queue_at_once_is_scored_once(made_up, tmp_path, monkeypatch):
    enqueue = optuna.Study.enqueue_trial

    def twice(self, values, **options):
        enqueue(self, values)
        enqueue(self, values)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", twice)
    result = made_up(tmp_path / "out", near, methods=SCALES, candidates=4)
    assert len({each.recipe["scale"] for each in result.candidates}) == 4


def test_what_a_dead_worker_leaves_another_scores(made_up, postgresql, tmp_path, monkeypatch):
    monkeypatch.setattr(search_storage, "HEARTBEAT", 1)
    monkeypatch.setattr(search_storage, "GRACE", 1)
    options = {"methods": SCALES, "candidates": 4, "url": postgresql.url, "study": "dead"}
    calls = []

    def dying(recipe, random, example):
        calls.append(recipe)
        if len({str(each) for each in calls}) == 3:
            raise KeyboardInterrupt
        return near(recipe, random, example)

    with pytest.raises(KeyboardInterrupt):
        made_up(tmp_path / "one", dying, **options)
    result = made_up(tmp_path / "other", near, **options)
    scales = [each.recipe["scale"] for each in result.candidates]
    assert len(scales) == len({*scales}) == 4 and calls[-1].scale in scales

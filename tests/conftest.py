"""Shared by all tests: a tiny model, made once, and a study with made-up results."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from http import HTTPStatus
from http.server import HTTPServer
from pathlib import Path

# What a run compiles is kept for all of its processes, in a folder of its own: nothing comes from a
# cache of the person who runs it unless they turn it on. Workers inherit the folder.
if os.environ.get("JAX_ENABLE_COMPILATION_CACHE") != "true":
    COMPILED = tempfile.TemporaryDirectory(prefix="m2l-tests-")
    os.environ.update(
        JAX_ENABLE_COMPILATION_CACHE="true",
        JAX_COMPILATION_CACHE_DIR=COMPILED.name,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
# Orbax's files on gs:// go through gcsfs: TensorFlow's know no emulator. It is read once.
os.environ["EPATH_USE_TF"] = "false"

import jax
import pytest

from m2l import files, models, storage, tasks
from m2l.evaluation import results
from m2l.evaluation.results import Result
from m2l.merging import Recipe
from m2l.models import T5Config
from m2l.studies import graph, merge_to_learn, merging_at_scale, study_results
from m2l.training.settings import TrainSettings

CATEGORIES = ("sentiment", "topic_classification", "closed_book_qa", "structure_to_text")


# The longest files: begun last, they would be waited for when all else is done.
FIRST = (
    *("studies/test_study.py", "tasks/test_all_datasets.py", "training/test_two_processes.py"),
    *("training/test_resuming.py", "training/test_pod_on_a_bucket.py", "test_examples.py"),
    *("merging/test_devices_and_processes.py", "test_cli_buckets.py", "test_cli_merge.py"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.as_posix().endswith(FIRST))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Thresholds, too, are found for a test."""
    os.environ["M2L_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def start_google() -> tuple[str, object]:
    """Starts a server with an empty bucket called "bucket"; returns its address and the server."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator import storage as emulated
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def insert(request, response, store):
        """Honours ifGenerationMatch, which the emulator ignores, and takes empty objects."""
        if request.query.get("uploadType") == ["media"] and request.data is None:
            request._data = b""
        # 0: there is no such object.
        if (expected := request.query.get("ifGenerationMatch")) is not None:
            bucket, name = request.params["bucket_name"], request.query["name"][0]
            try:
                generation = store.get_file_obj(bucket, name)["generation"]
            except NotFound:
                generation = 0
            if expected != [str(generation)]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        objects.insert(request, response, store)

    def with_generation(read):
        """Tells the generation of what is read, and honours ifGenerationNotMatch."""

        def handle(request, response, store, *args, **kwargs):
            read(request, response, store, *args, **kwargs)
            if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                params = request.params["bucket_name"], request.params["object_id"]
                generation = store.get_file_obj(*params)["generation"]
                response["x-goog-generation"] = generation
                if request.query.get("ifGenerationNotMatch") == [generation]:
                    response.status = HTTPStatus.NOT_MODIFIED
                    response.write_file(b"")

        return handle

    def between(request, response, store):
        """Honours startOffset and endOffset, by which TensorStore lists what begins alike."""
        start, end = (request.query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
        answer = response.json

        def cut(listed):
            items = [
                i for i in listed["items"] if start <= i["name"] and (not end or i["name"] < end)
            ]
            answer(listed | {"items": items})

        response.json = cut
        objects.ls(request, response, store)

    for _, methods in server.HANDLERS:
        if methods.get(server.GET) is objects.ls:
            methods[server.GET] = between
        if methods.get(server.POST) is objects.insert:
            methods[server.POST] = insert
        if methods.get(server.GET) in (objects.get, objects.download):
            methods[server.GET] = with_generation(methods[server.GET])
    # More connections at once than this are dropped, and tried again after 1 s, 3 s and 7 s.
    HTTPServer.request_queue_size = 1024
    # What would let a server in memory be started again, written anew at every request.
    emulated.Storage._write_config_to_file = lambda self: None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    google = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    google.start()
    return f"http://127.0.0.1:{port}", google


def start_amazon() -> tuple[str, object]:
    """Starts a server with an empty bucket called "bucket"; returns its address and the server."""
    from moto.server import ThreadedMotoServer

    amazon = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    amazon.start()
    host, port = amazon.get_host_and_port()
    address = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
    return address, amazon


@pytest.fixture(scope="session")
def emulated_storage():
    """Serves Google Cloud Storage and S3 in this process; no request leaves the machine."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    google_address, google = start_google()
    amazon_address, amazon = start_amazon()
    # TensorStore reads these before its first request.
    os.environ.update(
        TENSORSTORE_GCS_HTTP_URL=google_address,
        STORAGE_EMULATOR_HOST=google_address,
        GCE_METADATA_ROOT="127.0.0.1:1",
        AWS_ENDPOINT_URL=amazon_address,
        AWS_REGION="us-east-1",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_EC2_METADATA_DISABLED="true",
    )
    yield
    google.stop()
    amazon.stop()


@pytest.fixture
def gcs_bucket(emulated_storage):
    """An empty folder, gs://bucket/NAME, on the emulator."""
    return storage.path(f"gs://bucket/{uuid.uuid4().hex}")


@pytest.fixture
def s3_bucket(emulated_storage):
    """An empty folder, s3://bucket/NAME, on the emulator."""
    return storage.path(f"s3://bucket/{uuid.uuid4().hex}")


@pytest.fixture(params=["local", "gs", "s3"])
def folder(request, tmp_path):
    """An empty folder of each kind of storage."""
    if request.param == "local":
        return tmp_path / "folder"
    return request.getfixturevalue({"gs": "gcs_bucket", "s3": "s3_bucket"}[request.param])


@pytest.fixture(scope="session")
def tiny_config():
    """A T5 that compiles in a moment; its vocabulary holds the microworld's and the bytes'."""
    return T5Config(
        vocab_size=1152,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=2,
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    return models.init(tiny_config, jax.random.key(0))


@pytest.fixture(scope="session")
def study(tiny_config):
    settings = TrainSettings(mixture="t0_held_in", steps=3)
    return merging_at_scale.ScalingStudy(
        models={"0.1M": tiny_config, "0.4M": dataclasses.replace(tiny_config, d_model=32)},
        pretrain=settings,
        instruct=settings,
        expert=settings,
        multitask=settings,
        categories=CATEGORIES,
        held_out=("natural_language_inference",),
        recipes=(Recipe(method="average"), Recipe(method="dare_ties", drop_rate=0.5)),
        expert_counts=(2, 4),
        seeds=(0, 1, 2),
    )


def write_result(out, model, task, category, score):
    directory = graph.stage_folder(out, f"results/{model}")
    result = Result(
        task=task,
        dataset=task,
        category=category,
        held_out=category not in CATEGORIES,
        kind="rank",
        metric="accuracy",
        score=score,
        metrics={"accuracy": score, "chance": 50.0},
        count=1,
        ties=0,
        truncated=0,
        seconds=0.0,
        model_digest=model,
        task_digest=task,
    )
    directory.mkdir(parents=True, exist_ok=True)
    results.write_result(directory, result)


@pytest.fixture(scope="session")
def finished_study(study, tmp_path_factory):
    """A study's folder with made-up results: scores that can be divided by hand."""
    out = tmp_path_factory.mktemp("study")
    files.claim(out, "study.json", study_results.describe(study))

    held_out = "natural_language_inference"
    for size in study.models:
        for base in merging_at_scale.BASES:
            low = 20.0 if base == "pretrained" else 40.0
            for category in CATEGORIES:
                write_result(out, f"bases/{size}/{base}", category, category, low)
                write_result(out, f"experts/{size}/{base}/{category}", category, category, 80.0)
                write_result(out, f"multitask/{size}/{base}", category, category, 60.0)
            write_result(out, f"bases/{size}/{base}", "rte", held_out, 50.0)
            write_result(out, f"multitask/{size}/{base}", "rte", held_out, 75.0)
    for merge in merging_at_scale.merges(study):
        for category in merge.categories:
            score = 80.0 if category == "sentiment" else 40.0
            write_result(out, merge.model, category, category, score)
        write_result(out, merge.model, "rte", held_out, 51.0 if merge.base == "instruct" else 50.0)

    def nothing(stage, made, inputs):
        made.mkdir(parents=True, exist_ok=True)
        if stage.kind == "merge":
            storage.write_atomic(made / "recipes.json", json.dumps(stage.settings["recipes"]))

    kinds = ("train", "merge", "evaluate", "choose")
    outcome = graph.execute(study.stage_graph(), out, dict.fromkeys(kinds, nothing))
    assert not outcome.failed
    return out


@pytest.fixture(scope="session")
def skills_study(tiny_config):
    """Paper 2's study on the microworld's mixtures, its sizes made up."""
    settings = TrainSettings(mixture="set by the study", steps=3, batch_size=32)
    names = ("science", "safety", "coding")
    measured = ("general", *names, "exaggerated_refusals")
    return merge_to_learn.SkillsStudy(
        model=tiny_config,
        pretrain=dataclasses.replace(settings, mixture="span_corruption"),
        finetune=settings,
        general="skills_general",
        skills={name: f"skills_{name}" for name in names},
        evaluations={name: f"skills_{name}_eval" for name in measured},
        examples={
            "skills_general": 9800,
            "skills_science": 7000,
            "skills_safety": 1500,
            "skills_coding": 2940,
        },
        weights=(0.2, 0.4, 0.6, 0.8, 1.0),
        parts=(20, 60),
        retrained_parts=(20,),
    )


# What the models of a made-up study score: the general one, and those of a skill by regime.
_BEFORE = {"general": 60, "science": 25, "safety": 8, "coding": 5, "exaggerated_refusals": 97}
_LEARNED = {"science": 80, "safety": 98, "coding": 70}
_TRAINED = {"ptm": (15, 0.98, 4), "cft": (38, 1.0, 9), "rt": (59, 0.97, 38)}
_FORGETS = {"task_arithmetic": 6, "linear": 30, "wise_ft": 20, "ties": 12}
_FORGETS |= {"ties_mergekit": 12, "dare": 14}


def _learned(regime, added, name, part):
    general, share, complied = _TRAINED[regime]
    if name == "general":
        return general
    if name == "exaggerated_refusals":
        return complied if added & {"safety", "all"} else _BEFORE[name]
    if not added & {name, "all"}:
        return _BEFORE[name] * (0.5 if regime == "cft" else 1)
    return _BEFORE[name] + (_LEARNED[name] - _BEFORE[name]) * share * (part / 100) ** 0.3


def _merged(merge, name):
    weight = max(merge.weights)
    if name == "general":
        return _BEFORE[name] - _FORGETS[merge.method] * weight**2
    if name == "exaggerated_refusals":
        return _BEFORE[name] - 70 * weight**2 * ("safety" in merge.skills)
    own = _learned("ptm", set(merge.skills), name, merge.part)
    return _BEFORE[name] + (own - _BEFORE[name]) * min(1.0, 2.5 * weight) / len(merge.skills) ** 0.5


@pytest.fixture(scope="session")
def skills_records(skills_study):
    """Made-up results of that study, after changes by a function of (model, evaluation, score).

    Every task of an evaluation has its score, with an interval of 8 points.
    """
    scored = {"models/pretrained": dict.fromkeys(skills_study.evaluations, 4.0)}
    scored["models/general"] = _BEFORE
    for model in list(merge_to_learn.trained_models(skills_study))[1:]:
        scored[f"models/{model.name}"] = {
            name: _learned(model.regime, {model.skill}, name, model.part)
            for name in skills_study.evaluations
        }
    made = {merge.model: merge for merge in merge_to_learn.merges(skills_study)}
    for model, merge in made.items():
        scored[model] = {name: _merged(merge, name) for name in skills_study.evaluations}

    def found(change=lambda model, name, score: score):
        tasks.use(skills_study.source)
        by_model = {}
        for model, scores in scored.items():
            by_model[model] = {}
            for name, mixture in skills_study.evaluations.items():
                score = float(change(model, name, scores[name]))
                for task in tasks.tasks_in(mixture):
                    by_model[model][task] = _result_of(task, score, model)
        recipes = {model: merge.recipe.to_dict() for model, merge in made.items()}
        seconds = {stage.name: 60.0 for stage in skills_study.stage_graph()}
        return study_results.StudyResults(skills_study, by_model, recipes, {}, seconds)

    return found


def _result_of(task, score, model):
    info = tasks.info(task)
    return Result(
        task=task,
        dataset=info.dataset,
        category=info.category,
        held_out=info.held_out,
        kind=info.kind,
        metric="accuracy",
        score=score,
        metrics={"accuracy": score},
        count=50,
        ties=0,
        truncated=0,
        seconds=1.0,
        model_digest=model,
        task_digest=task,
        interval=[score - 4, score + 4],
    )


@pytest.fixture(scope="session")
def forge(tmp_path_factory):
    """Runs programs at once in processes of their own, which start in no time; see forge.py.

    Takes each as (code, *arguments), and the number of simulated devices that each has; returns
    what each has printed. `dies`: where all of them are killed, as `forge.die_at` takes it.
    `killed`: all of them have to end with an error.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(Path(models.__file__).parents[2]),
    }
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("forge.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(*programs, devices, stdin="", dies=None, killed=False):
        folder = tmp_path_factory.mktemp("forge")
        inherited = os.environ.get("XLA_FLAGS", "")
        flags = f"--xla_force_host_platform_device_count={devices} {inherited}"
        described = [
            {
                "code": code,
                "arguments": [str(argument) for argument in arguments],
                "stdin": stdin,
                "environment": {"XLA_FLAGS": flags},
                "dies": dies,
            }
            for code, *arguments in programs
        ]
        server.stdin.write(json.dumps({"programs": described, "folder": str(folder)}) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        said = [(folder / f"{number}.err").read_text() for number in range(len(programs))]
        if dies:
            expected = set(codes) == {-signal.SIGKILL}
        else:
            expected = all(codes) if killed else not any(codes)
        assert expected, "\n".join([f"codes {codes}", *(text[-5000:] for text in said)])
        return [(folder / f"{number}.out").read_text() for number in range(len(programs))]

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def free_port():
    """A function that finds a port."""

    def find():
        with socket.socket() as opened:
            opened.bind(("127.0.0.1", 0))
            return opened.getsockname()[1]

    return find


def m2l(*arguments):
    """Runs the command in this process; returns its exit code."""
    from m2l import cli

    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture(scope="session")
def run_m2l():
    return m2l


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    """A base, two experts and the second base's expert, trained for a few steps by the command."""
    root = tmp_path_factory.mktemp("road")
    (root / "tiny.gin").write_text(
        "include 'models/t5_1m.gin'\ninclude 'runs/train.gin'\nRun.model = %MODEL\n"
        "T5.d_model = 16\nT5.d_kv = 8\nT5.d_ff = 32\nT5.num_heads = 2\n"
        "T5.num_encoder_layers = 1\nBATCH_SIZE = 4\nMIXTURE = 'span_corruption'\nSTEPS = 3\n"
        "Train.log_every = 1\n"
    )
    assert m2l("train", "--gin_file", root / "tiny.gin", "--out", root / "base") == 0
    for category in ("sentiment", "closed_book_qa"):
        code = m2l(
            "train",
            *("--init", root / "base", "--mixture", category, "--steps", 3),
            *("--gin.BATCH_SIZE=4", "--gin.LEARNING_RATE=0.1", "--out", root / category),
        )
        assert code == 0
    return root

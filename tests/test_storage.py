"""One table of behaviours for the local file system, Google Cloud Storage and S3."""

import gzip
import os
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from m2l import configuration, files, locks, storage
from m2l.data import jsonl, tokenizer_files
from m2l.errors import M2LError
from m2l.locks import Lock
from m2l.storage import ObjectPath
from m2l.tasks import sources
from m2l.training.monitoring import MetricsWriter, draw_curve, read_figures


@pytest.mark.parametrize("text", ["/tmp/run", "runs/a:b", "runs/12:30/a", "../run", "", "a//b"])
def test_a_path_without_a_scheme_is_a_local_path_as_given(text):
    assert storage.path(text) == Path(text) and storage.path(Path(text)) == Path(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://host/a",
        "hdfs://host:9000/a",
        "file:///tmp/a",
        "gs:/bucket/run",
        "gs://",
        "s3:///key",
        "gs://bucket/../other",
        "/tmp/gs://bucket/run",
        Path("gs://bucket/run"),
        Path("gs://bucket/run").absolute(),
    ],
)
def test_an_address_of_no_known_storage_is_refused_in_one_line(text):
    with pytest.raises(M2LError, match=r"^[^\n]*(expected|cannot)[^\n]*$"):
        storage.path(text)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (lambda p: str(p), "gs://b/run/model.tar.gz"),
        (lambda p: (p.bucket, p.key), ("b", "run/model.tar.gz")),
        (lambda p: p.parts, ("gs://b", "run", "model.tar.gz")),
        (lambda p: (p.name, p.stem, p.suffix), ("model.tar.gz", "model.tar", ".gz")),
        (lambda p: p.suffixes, [".tar", ".gz"]),
        (lambda p: [str(parent) for parent in p.parents], ["gs://b/run", "gs://b"]),
        (lambda p: str(p.parent.parent.parent), "gs://b"),
        (lambda p: str(p.parent / "x" / "y/z"), "gs://b/run/x/y/z"),
        (lambda p: str(p.parent / PurePosixPath("x/y")), "gs://b/run/x/y"),
        (lambda p: str(p.with_name("x")), "gs://b/run/x"),
        (lambda p: str(p.with_suffix(".bz2")), "gs://b/run/model.tar.bz2"),
        (lambda p: str(p.relative_to(p.parent)), "model.tar.gz"),
        (lambda p: p.is_relative_to(storage.path("s3://b/run")), False),
        (lambda p: p.absolute() is p and p.resolve() is p, True),
        (lambda p: pickle.loads(pickle.dumps(p)) == p and len({p, p / "a", p}), 2),
        (lambda p: sorted([p / "b", p.parent, p / "a"]), None),
        (lambda p: p == Path("gs://b/run/model.tar.gz"), False),
    ],
)
def test_addresses_behave_as_paths_do(of, expected):
    path = storage.path("gs://b//run/./model.tar.gz")
    if expected is None:
        expected = [path.parent, path / "a", path / "b"]
    assert of(path) == expected


def test_no_library_can_take_an_address_for_a_local_path():
    with pytest.raises(TypeError):
        Path(storage.path("gs://bucket/run"))


def test_files_are_written_read_listed_and_removed(folder):
    assert not folder.exists() and storage.list_files(folder) == []
    for name in ("a", "b/c.txt", "b/d/e.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(folder / name, f"text of {name} ä")
    assert (folder / "b/c.txt").read_text() == "text of b/c.txt ä"
    assert (folder / "a").read_bytes() == "text of a ä".encode()
    assert folder.is_dir() and not folder.is_file()
    assert (folder / "a").is_file() and not (folder / "a").is_dir() and (folder / "a").exists()
    names = [path.relative_to(folder).as_posix() for path in storage.list_files(folder)]
    assert names == ["a", "b/c.txt", "b/d/e.txt"]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert [path.name for path in folder.glob("b/*.txt")] == ["c.txt"]
    assert sorted(path.name for path in folder.rglob("*.txt")) == ["c.txt", "e.txt"]
    assert {path.name for path in folder.glob("*")} == {"a", "b"}
    before = (folder / "a").stat()
    storage.write_atomic(folder / "a", b"other text")
    assert (folder / "a").read_bytes() == b"other text"
    after = (folder / "a").stat()
    assert (before.st_size, after.st_size) == (12, 10) and before.st_mtime_ns != after.st_mtime_ns
    (folder / "a").unlink()
    (folder / "a").unlink(missing_ok=True)
    storage.remove_tree(folder / "b")
    assert storage.list_files(folder) == []
    storage.remove_tree(folder / "b")


@pytest.mark.parametrize(
    "read",
    [
        lambda path: path.read_bytes(),
        lambda path: path.open("rb"),
        lambda path: path.stat(),
        lambda path: path.unlink(),
        lambda path: list(path.iterdir()),
        lambda path: storage.size(path),
        lambda path: storage.read_range(path, 0, 1),
    ],
)
def test_a_missing_file_is_an_os_error_that_names_it(folder, read):
    with pytest.raises(FileNotFoundError, match="missing"):
        read(folder / "missing")


def test_opened_files_hold_what_was_written_and_are_not_written_after_an_error(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "a").open("w") as stream:
        stream.write("first\nsecond\n")
    with (folder / "a").open() as stream:
        assert list(stream) == ["first\n", "second\n"]
    with (folder / "b").open("wb") as stream:
        stream.write(b"\0\1")
    with (folder / "b").open("rb") as stream:
        stream.seek(1)
        assert stream.read() == b"\1"
    if isinstance(folder, ObjectPath):
        for mode, data in (("w", "half"), ("wb", b"half")):
            with pytest.raises(KeyError), (folder / "c").open(mode) as stream:
                stream.write(data)
                raise KeyError
        assert not (folder / "c").exists()


@pytest.mark.parametrize("length", [1, 65_535, 65_536, 65_537, 1_234_567])
def test_ranges_and_sizes_of_files(folder, length):
    data = np.random.default_rng(length).bytes(length)
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(folder / "data", data)
    assert storage.size(folder / "data") == length
    offset = length // 3
    assert storage.read_range(folder / "data", offset, length - offset) == data[offset:]
    assert storage.read_range(folder / "data", 0, 1) == data[:1]
    with pytest.raises(M2LError, match="truncated"):
        storage.read_range(folder / "data", offset, length + 1)
    with pytest.raises(M2LError, match="truncated"):
        storage.read_range(folder / "data", length + 5, 1)


def test_of_several_writers_one_creates_a_file(folder):
    folder.mkdir(parents=True, exist_ok=True)
    contents = [str(writer).encode() for writer in range(8)]
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda data: storage.create(folder / "lock", data), contents))
    assert sum(created) == 1
    assert (folder / "lock").read_bytes() == contents[created.index(True)]
    assert [path.name for path in storage.list_files(folder)] == ["lock"]


def test_tensorstore_opens_arrays_by_the_specification(folder):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    spec = {"driver": "zarr3", "kvstore": storage.kvstore_spec(folder / "array")}
    store = ts.open(spec, create=True, dtype=ts.float32, shape=[3, 4]).result()
    store.write(array).result()
    assert (ts.open(spec, open=True).result().read().result() == array).all()
    names = [path.relative_to(folder).as_posix() for path in storage.list_files(folder)]
    assert names == ["array/c/0/0", "array/zarr.json"]


def test_orbax_saves_steps_asynchronously_to_a_bucket(gcs_bucket):
    context = ocp.Context()
    context.array.saving.use_zarr3 = True
    context.array.saving.use_ocdbt = False
    with context:
        with ocp.training.Checkpointer(str(gcs_bucket)) as checkpointer:
            for step in (1, 2):
                tree = {"w": jnp.arange(6.0) + step}
                checkpointer.save_checkpointables_async(step, {"params": tree}).result()
        with ocp.training.Checkpointer(str(gcs_bucket)) as checkpointer:
            assert [checkpoint.step for checkpoint in checkpointer.checkpoints] == [1, 2]
            loaded = checkpointer.load_checkpointables(2)
    assert (np.asarray(loaded["params"]["w"]) == np.arange(6.0) + 2).all()
    spec = {"driver": "zarr3", "kvstore": storage.kvstore_spec(gcs_bucket / "1/params/w")}
    assert (ts.open(spec, open=True).result().read().result() == np.arange(6.0) + 1).all()


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "AccessDenied", "use credentials that may list it: run `aws configure`"),
        (401, "Unauthorized", "use credentials that may list it: run `aws configure`"),
        (404, "NoSuchBucket", "there is no bucket s3://bucket; create it"),
        (503, "SlowDown", "SlowDown; check the network"),
        (301, "PermanentRedirect", "check AWS_REGION and AWS_ENDPOINT_URL"),
        (400, "ExpiredToken", "ExpiredToken"),
    ],
)
def test_what_a_service_refuses_is_an_error_of_one_line(
    emulated_storage, monkeypatch, status, code, advice
):
    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self):
            body = f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        Thread(target=server.serve_forever).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(M2LError) as caught:
            storage.path("s3://bucket/run").is_dir()
        server.shutdown()
    message = str(caught.value)
    assert message.startswith("s3://bucket/run: cannot list it: ") and "\n" not in message
    assert advice in message


@pytest.mark.parametrize("fixture", ["gcs_bucket", "s3_bucket"])
def test_an_absent_bucket_is_an_error_of_one_line(request, fixture):
    folder = request.getfixturevalue(fixture)
    absent = ObjectPath(folder.scheme, "no-such-bucket/run")
    with pytest.raises(M2LError, match=rf"^{absent}: cannot write it: there is no bucket .*$"):
        absent.write_bytes(b"1")


def test_an_unreachable_service_is_an_error_of_one_line(s3_bucket, monkeypatch):
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 0})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(M2LError, match=r"^s3://bucket/run: cannot read it: .*AWS_ENDPOINT_URL$"):
        storage.path("s3://bucket/run").read_bytes()


def test_trees_are_copied_between_storages_and_downloaded_for_libraries(folder, tmp_path):
    source = tmp_path / "source"
    for name in ("index.json", "a/b", "a/c/d"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    storage.upload(source, folder)
    storage.upload(folder, tmp_path / "back")
    local = storage.download(folder)
    assert local == folder or isinstance(folder, ObjectPath)
    for copy in (folder, tmp_path / "back", local):
        files = {path.relative_to(copy).as_posix(): path for path in storage.list_files(copy)}
        assert set(files) == {"index.json", "a/b", "a/c/d"}
        assert all(path.read_text() == name for name, path in files.items())
    assert storage.download(folder / "index.json").read_text() == "index.json"
    with storage.local_output(folder / "trace") as output:
        output.mkdir()
        (output / "events").write_text("events")
    assert (folder / "trace" / "events").read_text() == "events"
    with pytest.raises(KeyError), storage.local_output(folder / "other") as output:
        raise KeyError


def test_one_process_at_a_time_has_a_lock(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / "lock") as first, Lock(folder / "lock") as second:
        assert first.acquire() and first.acquired
        assert not second.acquire() and not second.acquired
        assert second.owner() == f"process {os.getpid()} of {socket.gethostname()}"
        first.release()
        assert second.acquire()
        second.check()
    with Lock(folder / "lock") as third:
        assert third.acquire()


@pytest.mark.parametrize("fixture", ["gcs_bucket", "s3_bucket"])
def test_a_lock_in_a_bucket_expires_when_it_is_not_renewed(request, fixture, monkeypatch):
    file = request.getfixturevalue(fixture) / "lock"
    with Lock(file) as stopped, Lock(file) as other:
        assert stopped.acquire()
        assert not other.acquire()
        monkeypatch.setattr(locks, "EXPIRES", 0.0)
        storage.write_atomic(file, b"process 1 of host, renewed")
        assert not other.acquire(), "what changed since it was last seen is at work"
        assert other.acquire()
        assert storage.swap(file, b"", stopped._generation) is None
        content = file.read_bytes()
        stopped._lost = True
        with pytest.raises(M2LError, match=r"another process .* has taken over"):
            stopped.check()
        stopped.release()
        assert file.read_bytes() == content, "the lock of another process is left"


def test_a_lock_that_was_copied_into_a_bucket_is_acquired_if_it_was_released(gcs_bucket, tmp_path):
    with Lock(tmp_path / "lock") as lock:
        assert lock.acquire()
        storage.upload(tmp_path / "lock", gcs_bucket / "locked")
    storage.upload(tmp_path / "lock", gcs_bucket / "released")
    for name, expected in (("locked", False), ("released", True)):
        with Lock(gcs_bucket / name) as copied, Lock(gcs_bucket / name) as second:
            assert copied.acquire() == expected
            assert not second.acquire()


def test_a_lock_in_a_bucket_is_renewed_while_it_is_acquired(gcs_bucket, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED", 0.01)
    with Lock(gcs_bucket / "lock") as lock:
        assert lock.acquire()
        first = storage.generation(lock.file)
        while storage.generation(lock.file) == first:
            pass
        storage.write_atomic(lock.file, b"process 1 of host")
        lock._thread.join()
        with pytest.raises(M2LError, match=r"process 1 of host\) has taken over"):
            lock.check()


def test_figures_of_a_resumed_run_go_on_where_the_last_save_was(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with MetricsWriter(folder, first_step=0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0 / step})
        writer.flush()
        assert [row["step"] for row in read_figures(folder)] == [1, 2, 3]
    with MetricsWriter(folder, first_step=2) as writer:
        writer.write(3, {"loss": 0.5})
    assert read_figures(folder) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.5},
    ]
    assert len(list((folder / "tensorboard").glob("events*"))) >= 1
    draw_curve(folder, "loss")
    assert "<svg" in (folder / "loss.svg").read_text()


def test_files_that_commands_read_are_read_from_a_bucket(gcs_bucket):
    storage.write_atomic(gcs_bucket / "run.gin", "Train.mixture = 'imdb'\nTrain.steps = 7\n")
    storage.write_atomic(gcs_bucket / "more.gin", f"include '{gcs_bucket / 'run.gin'}'\n")
    run, _ = configuration.load("Run", ["runs/train.gin", str(gcs_bucket / "more.gin")])
    assert run.settings.steps == 7
    with pytest.raises(M2LError, match=r"absent\.gin"):
        configuration.load("Run", [str(gcs_bucket / "absent.gin")])
    lines = b'{"inputs": "a", "targets": "b"}\n' * 2
    storage.write_atomic(gcs_bucket / "a.jsonl", lines)
    storage.write_atomic(gcs_bucket / "a.jsonl.gz", gzip.compress(lines))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert jsonl.read(gcs_bucket / name) == [{"inputs": "a", "targets": "b"}] * 2
    storage.upload(files.microworld_pieces(), gcs_bucket / "tokenizer" / files.SPIECE)
    name = f"chat:{gcs_bucket / 'tokenizer'}"
    described = tokenizer_files.describe(name)
    local = tokenizer_files.describe(str(files.microworld_pieces()))
    assert described["size"] > 0 and tokenizer_files.absolute(name) == name
    assert (described["fingerprint"] == local["fingerprint"]) == (
        described["size"] == local["size"]
    )


@pytest.mark.parametrize("setting", ["hub:ADDRESS", "p3:ADDRESS", "tfds:ADDRESS"])
def test_sources_of_other_libraries_need_a_local_folder(setting):
    with pytest.raises(M2LError, match="expected a local folder"):
        sources.parse(setting.replace("ADDRESS", "gs://bucket/records"))


def test_a_cache_of_records_is_written_to_a_bucket_and_read_from_it(gcs_bucket, run_m2l, capsys):
    def shown(source):
        assert run_m2l("tasks", "show", "imdb_good_or_bad", "--source", source) == 0
        return capsys.readouterr().out.splitlines()[1:]

    assert run_m2l("tasks", "cache", "imdb", "--out", gcs_bucket) == 0
    assert f"--source cache:{gcs_bucket}" in capsys.readouterr().out
    assert shown(f"cache:{gcs_bucket}") == shown("microworld")

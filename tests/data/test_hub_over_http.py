"""The Hub over HTTP, from a stand-in for it, and what is left of it without a network."""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

CONVERTED = "refs/convert/parquet"


class StandIn(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as reading datasets and models and pushing one take."""

    def answer(self):
        path = unquote(urlparse(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        kinds = r"/(?:api/)?(?:datasets/|models/)?"
        asked = re.fullmatch(kinds + r"(\w+/\w+)(?:/(\w[\w-]*)/?(.*))?", path)
        folder = asked and self.server.root / asked[1]
        if path == "/":
            self.send(200)
        elif path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.send(200, {"url": f"http://{self.headers['Host']}/org/pushed"})
        elif asked and asked[2] == "preupload":
            files = [{"path": f["path"]} for f in json.loads(body)["files"]]
            usual = {"uploadMode": "regular", "shouldIgnore": False}
            self.send(200, {"files": [file | usual for file in files]})
        elif asked and asked[2] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "deletedFile":
                    self.server.deleted.append(line["value"]["path"])
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.pushed[asked[1], line["value"]["path"]] = content
            address = f"http://{self.headers['Host']}/{asked[1]}/commit/{'a' * 40}"
            self.send(200, {"success": True, "commitOid": "a" * 40, "commitUrl": address})
        elif not asked or not folder.is_dir():
            self.send(404, **{"X-Error-Code": "RepoNotFound"})
        else:
            branches = {CONVERTED: folder / "converted", "f" * 40: folder / "converted"}
            branches |= {"main": folder / "main", "0" * 40: folder / "main"}
            branch = next((name for name in branches if asked[3].startswith(name)), "main")
            files = branches[branch]
            commit = "0" * 40 if files.name == "main" else "f" * 40
            self.of_branch(asked[2], files, commit, asked[3].removeprefix(branch).strip("/"), body)

    do_GET = do_HEAD = do_POST = answer

    def of_branch(self, what, files, commit, path, body):
        entry = files / path
        if what == "resolve" and entry.is_file():
            digest = hashlib.sha1(entry.read_bytes()).hexdigest()
            self.send(200, entry.read_bytes(), ETag=f'"{digest}"', **{"X-Repo-Commit": commit})
        elif what == "tree" and entry.is_dir():
            deep = "recursive=true" in self.path.lower()
            found = entry.rglob("*") if deep else entry.iterdir()
            self.send(200, [describe(path, files) for path in sorted(found)])
        elif what == "paths-info":
            paths = [files / name for name in json.loads(body)["paths"]]
            self.send(200, [describe(path, files) for path in paths if path.exists()])
        elif what in (None, "revision"):
            found = [{"rfilename": str(p.relative_to(files))} for p in files.rglob("*.*")]
            self.send(200, {"id": "x", "sha": commit, "siblings": found})
        else:
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self.send(404, **missing)

    def send(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def describe(path, files):
    kind = {"type": "directory", "oid": "0"}
    if path.is_file():
        kind = {"type": "file", "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
        kind["size"] = path.stat().st_size
    return {**kind, "path": str(path.relative_to(files))}


ASK = """
import json, sys
from m2l.data import hub
from m2l.data.raw_records import Hub
from m2l.errors import DataError
for repo, config, revision, split, fields in json.loads(sys.argv[1]):
    try:
        records = hub.read(Hub(repo, config, revision), split, name="demo", fields=fields)
        print(json.dumps(list(records)))
    except DataError as error:
        print(error)
"""


def ask(environment, *questions):
    """What the questions get, in a process of its own: the libraries keep their settings."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "" and done.returncode == 0
    return done.stdout.splitlines()


QUESTIONS = (
    ("org/script", "b", "", "train", ["label"]),
    ("org/plain", "text", "", "train", ["label", "answers/text"]),
    ("org/script", "b", CONVERTED, "val", ["label"]),
    ("org/plain", "other", "", "train", ["label"]),
    ("org/plain", "text", "", "dev", ["label"]),
    ("org/plain", "text", "", "train", ["text"]),
    ("org/script", "b", CONVERTED, "dev", ["label"]),
    ("org/absent", "", "", "train", ["label"]),
)


CARD = """---
configs:
- config_name: text
  data_files:
  - split: train
    path: text/train-*
  - split: test
    path: text/test-*
---
# A dataset
"""


def put(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def serve(root, home):
    """Starts a stand-in; returns it, and the settings by which the Hub's libraries find it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.root, server.created, server.deleted, server.pushed = root, [], [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    return server, {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": "hf_x"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The answers to QUESTIONS with the Hub in reach, then without it, then when told so."""
    root, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    plain = root / "org/plain/main"
    plain.mkdir(parents=True)
    (plain / "README.md").write_text(CARD)
    for split in ("train", "test"):
        rows = {"label": [3], "answers": [{"text": [split]}], "unused": ["x"]}
        put(plain / f"text/{split}-00000-of-00001.parquet", rows)
    (root / "org/script/main").mkdir(parents=True)
    (root / "org/script/main/README.md").write_text("---\nlicense: mit\n---\n")
    (root / "org/script/main/script.py").write_text("")
    for number, config in enumerate("ab"):
        for split in ("train", "val"):
            path = root / f"org/script/converted/{config}/{split}/0000.parquet"
            put(path, {"label": [number]})
    server, there = serve(root, home)
    online = ask(there, *QUESTIONS)
    server.shutdown()
    server.server_close()
    return (
        home,
        online,
        ask(there, *QUESTIONS),
        ask({**there, "HF_HUB_OFFLINE": "1"}, QUESTIONS[-1]),
    )


def test_the_hub_is_read_over_http_the_converted_branch_included(asked):
    _, online, _, _ = asked
    assert "scripts are no longer supported, but found script.py" in online[0]
    assert json.loads(online[1]) == [{"label": 3, "answers": {"text": ["train"]}}]
    assert json.loads(online[2]) == [{"label": 1}]
    assert "org/plain (other): BuilderConfig 'other' not found. Available: ['text']" in online[3]
    assert "org/plain (text) has no such split; it has test, train" in online[4]
    assert "no column 'text'; its columns are label, answers, unused" in online[5]
    assert "org/script (b) has no such split; it has train, val" in online[6]
    assert "Dataset 'org/absent' doesn't exist on the Hub" in online[7]
    assert all(line.startswith("dataset 'demo', split '") for line in (online[0], *online[3:]))


def test_what_was_read_once_is_read_again_without_a_network(asked):
    _, online, offline, _ = asked
    assert offline[1:3] == online[1:3]
    assert offline[4:6] == online[4:6]


def test_what_is_nowhere_is_refused_with_the_command_that_gets_it(asked):
    home, _, offline, told = asked
    looked = f"looked in {home}/datasets and {home}/hub) and the Hub cannot be reached"
    command = "`hf download org/absent --repo-type dataset --local-dir DIR/org/absent`"
    assert looked in offline[7] and command in offline[7] and "hub:DIR" in offline[7]
    assert f"{looked}, HF_HUB_OFFLINE being set; " in told[0]
    assert f"org/script (b) is not on this machine ({looked}; " in offline[0]
    assert f"org/plain (other) is not on this machine ({looked}; " in offline[3]
    assert "--include 'other/*'" in offline[3]
    assert "--revision refs/convert/parquet --local-dir DIR/org/script`" in offline[6]


def command(environment, *arguments, program="from m2l.cli import main; main()"):
    """The exit code and the output of a program, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **environment, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_models_are_merged_by_name_from_the_cache_too_and_pushed(road, run_m2l, tmp_path):
    root, home = tmp_path / "hub", tmp_path / "home"
    for name in ("base", "sentiment", "closed_book_qa"):
        assert run_m2l("convert", road / name, root / f"org/{name}/main") == 0
    for name in ("pickled", "base/main"):
        (root / "org" / name).mkdir(parents=True, exist_ok=True)
        (root / "org" / name / "pytorch_model.bin").write_bytes(b"run me")
    shutil.copytree(root / "org/pickled", root / "org/pickled/main")
    merge = ["merge", "--method", "task_arithmetic", "--scale", 0.5]
    local = [root / "org" / name / "main" for name in ("base", "sentiment", "closed_book_qa")]
    named = ["org/base", "org/sentiment@main", "org/closed_book_qa"]
    for paths, out in ((local, "local"), (named, "named")):
        arguments = [*merge, "--base", paths[0], "--expert", paths[1], "--expert", paths[2]]
        if paths is local:
            assert run_m2l(*arguments, "--out", tmp_path / out) == 0
            continue
        server, there = serve(root, home)
        code, said = command(there, *arguments, "--out", tmp_path / out)
        assert code == 0, said
    merged = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("local", "named")]
    assert merged[0] == merged[1]
    assert not list(home.rglob("*.bin"))
    ask = "from m2l.hub_models import located; print(located('org/base+org/sentiment'))"
    said = command(there, program=ask)[1].splitlines()[0]
    assert all((Path(part) / "model.safetensors").is_file() for part in said.split("+"))

    # Of an earlier model, in two files.
    stale = root / "org/pushed/main/model-00001-of-00002.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    (stale.parent / "notes.md").write_text("stays")
    for name in ("LICENSE", "merges.txt"):
        (tmp_path / "named" / name).write_text(name)
    code, said = command(there, "push", tmp_path / "named", "org/pushed")
    assert code == 0 and f"/org/pushed/commit/{'a' * 40}" in said, said
    assert [made["name"] for made in server.created] == ["pushed"]
    stored = {name for _, name in server.pushed}
    assert {"config.json", "model.safetensors", "README.md", "LICENSE", "merges.txt"} <= stored
    assert server.deleted == [stale.name]
    for (_, name), content in server.pushed.items():
        assert content == (tmp_path / "named" / name).read_bytes()
    assert "m2l convert" in command(there, "push", road / "base", "org/pushed")[1]
    assert "reads no pickles" in command(there, "inspect", "org/pickled")[1]
    assert "neither here" in command(there, "inspect", "org/absent")[1]
    server.shutdown()
    server.server_close()

    assert command(there, "inspect", "org/base")[0] == 0
    code, said = command({**there, "HF_HUB_OFFLINE": "1"}, "inspect", "org/elsewhere")
    assert code == 2 and "org/elsewhere: neither here" in said and len(said.splitlines()) == 1

"""The Hub over HTTP, from a stand-in for it, and what is left of it without a network."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

CONVERTED = "refs/convert/parquet"


class StandIn(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as reading a dataset takes."""

    def answer(self):
        path = unquote(urlparse(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        asked = re.fullmatch(r"/(?:api/)?datasets/(\w+/\w+)(?:/(\w[\w-]*)/?(.*))?", path)
        folder = asked and self.server.root / asked[1]
        if path == "/":
            self.send(200)
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
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.root = root
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}
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

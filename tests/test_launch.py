"""The launch scripts start again what may go on, and nothing else; manifests have known fields.

The programs that they call (gcloud, docker, kubectl, srun, scontrol, m2l) are replaced by fakes.
`python tests/test_launch.py CRD.yaml ...` rewrites KNOWN from the published definitions, those of
JobSet v0.12 and Kueue v0.19 in config/components/crd/bases.
"""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
import yaml

from m2l.cli.command import cli

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
KNOWN = ROOT / "tests" / "data" / "kubernetes_fields.json"
TRAIN = ["train", "--distributed", "--mixture", "a b", "--out"]


@pytest.fixture
def programs(tmp_path):
    """Returns a function that makes a fake program, and the environment in which it is found."""
    folder = tmp_path / "programs"
    folder.mkdir()

    def make(text, *names):
        for name in names:
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    make(f'#!/bin/sh\nexec {sys.executable} "$@"\n', "python")
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FAKE": str(tmp_path),
        "PYTHON": sys.executable,
    }
    return make, environment


def run(script, arguments, environment, **options):
    return subprocess.run(
        ["bash", LAUNCH / script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


# --- run.sh: one process in a container ---


@pytest.mark.parametrize(
    ("arguments", "code", "finished", "expected"),
    [
        (TRAIN, 0, True, 0),
        (TRAIN, 0, False, 75),
        (["--debug", *TRAIN], 0, False, 75),
        (["merge", "--out"], 0, False, 0),
        (TRAIN, 2, False, 2),
        (TRAIN, 1, True, 1),
        (TRAIN, 143, False, 143),
    ],
)
def test_run_ends_with_75_where_a_run_has_saved_to_go_on(
    arguments, code, finished, expected, programs, tmp_path
):
    make, environment = programs
    make(f'#!/bin/sh\nprintf "%s|" "$@"\nexit {code}\n', "m2l")
    if finished:
        (tmp_path / "finished.json").write_text("{}")
    ended = run("run.sh", [*arguments, tmp_path], environment)
    assert ended.returncode == expected, ended.stderr
    assert ended.stdout == "|".join([*arguments, str(tmp_path), ""])


def test_run_passes_sigterm_on_and_waits_for_what_it_saves(programs, tmp_path):
    make, environment = programs
    saving = "trap 'echo saved; kill $!; exit 0' TERM; sleep 600 & echo ready; wait"
    make(f"#!/usr/bin/env bash\n{saving}\n", "m2l")
    process = subprocess.Popen(
        ["bash", LAUNCH / "run.sh", *TRAIN, tmp_path],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == 75


class Bucket(http.server.BaseHTTPRequestHandler):
    """Cloud Storage, with a finished.json in gs://bucket/finished/run and nothing else."""

    def do_GET(self):
        exists = self.path.startswith("/storage/v1/b/bucket/o/finished%2Frun%2Ffinished.json?")
        self.send_response(200 if exists else 404)
        self.send_header("x-goog-generation", "1")
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("run_name", "expected"), [("finished/run", 0), ("saved/run", 75)])
def test_whether_a_run_in_a_bucket_is_finished_is_asked_of_the_bucket(run_name, expected, programs):
    make, environment = programs
    make("#!/bin/sh\n", "m2l")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        # No request for credentials leaves the machine.
        environment |= {"TENSORSTORE_GCS_HTTP_URL": url, "GCE_METADATA_ROOT": "127.0.0.1:1"}
        ended = run("run.sh", [*TRAIN, f"gs://bucket/{run_name}/"], environment)
        server.shutdown()
    assert ended.returncode == expected, ended.stderr


# --- slurm.sh ---

SRUN = """#!/usr/bin/env bash
printf '%s|' "$@" >"$FAKE/srun"
echo "step 100: loss 2" >&2
[ -z "$SRUN_SAYS" ] || echo "srun: error: node1: task 3: $SRUN_SAYS" >&2
exit "$SRUN_CODE"
"""
FINISHED, SAVED = (0, "", True), (0, "", False)
CRASHED = (139, "Segmentation fault (core dumped)", False)
KILLED = (137, "Exited with exit code 1", False)
BAD_INPUT = (137, "Exited with exit code 2", False)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([FINISHED], [(0, False)]),
        ([SAVED] * 4 + [FINISHED], [(0, True)] * 4 + [(0, False)]),
        ([CRASHED, FINISHED], [(0, True), (0, False)]),
        ([CRASHED, KILLED, CRASHED], [(0, True), (0, True), (139, False)]),
        ([CRASHED, CRASHED, SAVED, KILLED], [(0, True)] * 4),
        ([BAD_INPUT], [(2, False)]),
        ([CRASHED, BAD_INPUT], [(0, True), (2, False)]),
    ],
    ids=["finished", "saved", "crash", "crashes", "crashes apart", "bad input", "then bad input"],
)
def test_a_slurm_job_is_queued_again_when_saved_and_at_a_bounded_number_of_crashes(
    ends, expected, programs, tmp_path
):
    make, environment = programs
    make(SRUN, "srun")
    make('#!/bin/sh\necho "$@" >>"$FAKE/scontrol"\n', "scontrol")
    make("#!/bin/sh\nexit 1\n", "m2l")
    environment |= {
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "M2L_ROOT": str(ROOT),
        "RETRIES": "2",
    }
    results = []
    for code, says, finished in ends:
        if finished:
            (tmp_path / "finished.json").write_text("{}")
        (tmp_path / "scontrol").write_text("")
        ended = run(
            "slurm.sh",
            [*TRAIN, tmp_path],
            environment | {"SRUN_CODE": str(code), "SRUN_SAYS": says},
        )
        assert "step 100: loss 2" in ended.stderr
        asked = (tmp_path / "scontrol").read_text()
        assert asked in ("", "requeue 17\n")
        results.append((ended.returncode, asked != ""))
    assert results == expected
    assert (tmp_path / "srun").read_text() == "|".join(
        ["--kill-on-bad-exit=1", "m2l", *TRAIN, str(tmp_path), ""]
    )
    assert not list(tmp_path.glob("*.crashes")) or expected[-1][1]


# --- tpu.sh ---

# A slice of two workers. $FAKE/ends has a line for each time that m2l is started: the exit codes of
# both workers (with `lost` before them if the first connection ends), or `preempted`; a line
# `refused` is for a request.
CLOUD = (
    f"#!{sys.executable} -IS"
    + """
import os, subprocess, sys
from pathlib import Path

fake, (name, *arguments) = Path(os.environ["FAKE"]), (Path(sys.argv[0]).name, *sys.argv[1:])
state, log = fake / "state", fake / "log"
ends = (fake / "ends").read_text().splitlines()


def note(text):
    with log.open("a") as file:
        file.write(text + "\\n")


if name == "gcloud" and "queued-resources" in arguments:
    verb = arguments[3]
    if verb == "describe":
        if not state.exists():
            sys.exit("ERROR: (gcloud...) NOT_FOUND: Resource was not found")
        print(said := state.read_text())
        if said == "WAITING_FOR_RESOURCES":
            state.write_text("ACTIVE")
        if said == "SUSPENDING":
            state.write_text("SUSPENDED")
    if verb == "create":
        assert not state.exists()
        note("create " + " ".join(arguments[4:]))
        if ends[0] == "refused":
            (fake / "ends").write_text("\\n".join(ends[1:]))
            sys.exit("ERROR: quota")
        state.write_text("WAITING_FOR_RESOURCES")
    if verb == "delete":
        note("delete")
        state.unlink()
        for container in fake.glob("worker*"):
            container.unlink()

elif name == "gcloud" and "ssh" in arguments:
    if state.read_text() != "ACTIVE":
        sys.exit("ERROR: ssh: connect to host: Connection timed out")
    [workers] = [a.removeprefix("--worker=") for a in arguments if a.startswith("--worker=")]
    command = arguments[arguments.index("--command") + 1]
    for worker in ("0", "1") if workers == "all" else (workers,):
        environment = os.environ | {"WORKER": worker}
        code = subprocess.run(["bash", "-c", command], env=environment).returncode
        if code:
            sys.exit(code)

elif name == "docker":
    worker = int(os.environ["WORKER"])
    container = fake / f"worker{worker}"
    if arguments[0] == "run":
        note(f"start {worker} " + "|".join(arguments[arguments.index("m2l") + 1 :]))
        container.write_text(ends[0])
        if worker:
            (fake / "ends").write_text("\\n".join(ends[1:]))
    elif not container.exists():
        sys.exit("Error: No such object: m2l")
    elif arguments[0] == "rm":
        container.unlink()
    elif arguments[0] == "logs":
        if container.read_text() == "preempted":
            state.write_text("SUSPENDING")
            sys.exit(255)
        if container.read_text().startswith("lost "):
            for each in fake.glob("worker*"):
                each.write_text(each.read_text().removeprefix("lost "))
            sys.exit(255)
        print("step 100: loss 2")
    elif "--format" in arguments:
        end = container.read_text()
        said = "running 0" if end.startswith("lost ") else "exited " + end.split()[worker]
        first, last = said.split()
        text = arguments[arguments.index("--format") + 1]
        print(text.replace("{{.State.Status}}", first).replace("{{.State.ExitCode}}", last))
"""
)


@pytest.mark.parametrize(
    ("ends", "code", "creates", "starts"),
    [
        (["0 0"], 0, 1, 1),
        (["preempted", "preempted", "0 0"], 0, 3, 3),
        (["75 75", "0 75", "0 0"], 0, 1, 3),
        (["lost 0 0"], 0, 1, 1),
        (["1 134", "preempted", "0 139", "0 0"], 0, 2, 4),
        (["1 134", "0 139", "1 1"], 1, 1, 3),
        (["1 1", "1 1", "75 75", "1 1", "0 0"], 0, 1, 5),
        (["134 2"], 2, 1, 1),
        (["refused", "refused", "refused"], 1, 3, 0),
    ],
    ids=lambda value: "-".join(value).replace(" ", "_") if isinstance(value, list) else "",
)
def test_a_tpu_slice_is_requested_anew_and_m2l_started_again_until_it_is_finished(
    ends, code, creates, starts, programs, tmp_path
):
    make, environment = programs
    make(CLOUD, "gcloud", "docker")
    # gcloud auth is for a real registry.
    make('#!/bin/sh\n[ "$1" = gcloud ] || exec "$@"\n', "sudo")
    (tmp_path / "ends").write_text("\n".join(ends))
    arguments = [*TRAIN, "gs://bucket/run's"]
    settings = {"NAME": "one", "ZONE": "z", "TYPE": "v5p-16", "RUNTIME": "r", "IMAGE": "h/m2l:1"}
    environment |= settings | {"POLL": "0", "RETRIES": "2"}
    ended = run("tpu.sh", arguments, environment)
    assert ended.returncode == code, ended.stderr
    log = (tmp_path / "log").read_text().splitlines()
    created = [line for line in log if line.startswith("create")]
    assert len(created) == creates
    assert all(line.endswith("--spot") and " v5p-16 " in line for line in created)
    for worker in (0, 1):
        begun = [line for line in log if line.startswith(f"start {worker} ")]
        assert len(begun) == starts
        started = begun[0].split("|") if begun else [*arguments]
        assert started[-len(arguments) :] == arguments
    assert log[-1] == "delete"
    assert not (tmp_path / "state").exists()


# --- gke.sh and its manifests ---


def manifests(kind, arguments, programs, tmp_path):
    make, environment = programs
    make('#!/bin/sh\necho "$@" >"$FAKE/kubectl"\ncat >"$FAKE/manifest"\n', "kubectl")
    environment |= {"NAME": "sentiment", "IMAGE": "host/m2l:1", "JOBSET": kind}
    ended = run("gke.sh", arguments, environment)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "kubectl").read_text() == "apply --filename -\n"
    return list(yaml.safe_load_all((tmp_path / "manifest").read_text()))


def queue():
    return list(yaml.safe_load_all((LAUNCH / "kueue.yaml").read_text()))


def differences(value, schema, path=""):
    """Yields what a value has that its schema does not allow."""
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    wanted = types.get(schema.get("type"))
    if wanted and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
        yield f"{path}: {value!r} is no {schema['type']}"
        return
    if value not in schema.get("enum", [value]):
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if isinstance(value, dict) and "properties" in schema:
        yield from (f"{path}.{key} is missing" for key in set(schema["required"]) - set(value))
        for key, item in value.items():
            if key in schema["properties"]:
                yield from differences(item, schema["properties"][key], f"{path}.{key}")
            else:
                yield f"{path}.{key} is unknown"
    for number, item in enumerate(value if isinstance(value, list) else ()):
        yield from differences(item, schema.get("items", {}), f"{path}[{number}]")


def schema_of(manifest):
    return json.loads(KNOWN.read_text())[f"{manifest['apiVersion']} {manifest['kind']}"]


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_manifests_have_the_fields_that_the_published_definitions_have(kind, programs, tmp_path):
    found = [*manifests(kind, ["train"], programs, tmp_path), *queue()]
    assert [m["kind"] for m in found] == [
        *["JobSet", "ResourceFlavor", "ResourceFlavor", "ClusterQueue", "LocalQueue"]
    ]
    for manifest in found:
        assert not list(differences(manifest, schema_of(manifest)))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("backoffLimit", "backofLimit", ".backofLimit is unknown"),
        ("completions: 16", "completions: many", "'many' is no integer"),
        ("action: FailJobSet", "action: FailJobs", "'FailJobs' is none of"),
        ("image: host/m2l:1", "imag: host/m2l:1", ".imag is unknown"),
        ("replicas: 1", "replicas: '1'", "'1' is no integer"),
        ("- name: badInput\n        action", "- name: badInput\n        act", ".action is missing"),
    ],
)
def test_a_manifest_with_a_wrong_field_is_noticed(old, new, expected, programs, tmp_path):
    manifests("tpu", ["train"], programs, tmp_path)
    text = (tmp_path / "manifest").read_text()
    assert old in text
    manifest = yaml.safe_load(text.replace(old, new))
    assert any(expected in line for line in differences(manifest, schema_of(manifest)))


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_jobset_runs_m2l_with_the_arguments_on_all_hosts_of_nodes_that_the_queue_has(
    kind, programs, tmp_path
):
    arguments = [*TRAIN, 'gs://bucket/a "b" \\c & $NAME']
    [jobset] = manifests(kind, arguments, programs, tmp_path)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert container["args"][: len(arguments)] == arguments
    assert container["image"] == "host/m2l:1"
    assert job["parallelism"] == job["completions"]

    by_kind = {m["kind"]: m for m in queue()}
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "m2l"
    assert by_kind["LocalQueue"]["metadata"]["name"] == "m2l"
    assert by_kind["LocalQueue"]["metadata"]["namespace"] == jobset["metadata"]["namespace"]
    assert by_kind["LocalQueue"]["spec"]["clusterQueue"] == "m2l"
    assert by_kind["ClusterQueue"]["metadata"]["name"] == "m2l"
    [(resource, each)] = container["resources"]["limits"].items()
    assert container["resources"]["requests"] == {resource: each}
    [group] = [
        group
        for group in by_kind["ClusterQueue"]["spec"]["resourceGroups"]
        if group["coveredResources"] == [resource]
    ]
    [flavor] = group["flavors"]
    assert flavor["resources"][0]["nominalQuota"] >= each * job["completions"]
    [labels] = [m["spec"]["nodeLabels"] for m in queue() if m["metadata"]["name"] == flavor["name"]]
    assert labels == pod["nodeSelector"]

    rest = container["args"][len(arguments) :]
    if kind == "tpu":
        x, y, z = map(int, labels["cloud.google.com/gke-tpu-topology"].split("x"))
        assert x * y * z == each * job["completions"]
        assert not rest
    else:
        host = "sentiment-hosts-0-0.sentiment"  # JOBSET-REPLICATEDJOB-JOB-POD.JOBSET
        index = f"$(JOB_COMPLETION_INDEX)/{job['completions']}"
        assert rest == ["--coordinator", f"{host}:1234", "--process", index]


# What the Job controller says of a pod that a rule of its policy ends the job for.
EXITED = "Container m2l for pod default/a failed with exit code {} matching FailJob rule at index 0"
TAKEN = "Pod default/a has condition DisruptionTarget matching FailJob rule at index 1"


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
@pytest.mark.parametrize(
    ("reason", "message", "action"),
    [
        ("PodFailurePolicy", EXITED.format(2), "FailJobSet"),
        ("PodFailurePolicy", EXITED.format(75), "RestartJobSetAndIgnoreMaxRestarts"),
        ("PodFailurePolicy", TAKEN, "RestartJobSetAndIgnoreMaxRestarts"),
        ("BackoffLimitExceeded", "Job has reached the specified backoff limit", None),
    ],
)
def test_a_jobset_restarts_what_may_go_on_and_counts_crashes_alone(
    kind, reason, message, action, programs, tmp_path
):
    [jobset] = manifests(kind, ["train"], programs, tmp_path)
    policy = jobset["spec"]["failurePolicy"]
    matching = [
        rule["action"]
        for rule in policy["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(re.search(p, message) for p in rule.get("onJobFailureMessagePatterns", [""]))
    ]
    # JobSet takes the first rule, and restarts up to maxRestarts times without one.
    assert next(iter(matching), None) == action
    assert policy["maxRestarts"] == 3
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    [on_code] = [r["onExitCodes"] for r in job["podFailurePolicy"]["rules"] if "onExitCodes" in r]
    assert on_code == {"containerName": "m2l", "operator": "In", "values": [2, 75]}


# --- what the pages and headers say to type ---

TYPED = ["docs/pods.md", *(f"scripts/launch/{name}.sh" for name in ("gke", "slurm", "tpu"))]


@pytest.mark.parametrize("page", TYPED)
def test_what_is_said_to_be_launched_is_a_command_of_m2l_with_such_flags(page):
    text = (ROOT / page).read_text().replace("\n#", "\n").replace("\\\n", " ")
    launched = re.findall(r"scripts/launch/(?:gke|slurm|tpu)\.sh +([a-z]+ .*)", text)
    assert launched
    for line in launched:
        name, *rest = line.split()
        command = cli.commands[name]
        params = command.get_params(click.Context(command))
        flags = {flag for p in params for flag in (*p.opts, *p.secondary_opts)}
        for word in rest:
            if word.startswith("--") and not word.startswith("--gin."):
                assert word in flags, line


def test_the_seconds_of_a_save_follow_from_the_sizes_and_rates_that_the_page_names():
    page = (ROOT / "docs" / "pods.md").read_text()
    parameters, adamw, adafactor = 63.8e9, 12, 4  # Bytes a parameter: of state in float32.
    copy, write = 10e9, 1e9
    assert f"{parameters / 1e9} billion" in page
    rows = re.findall(
        r"^\| v[45].*?\| (\d+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \| (\d+) \|$", page, re.M
    )
    assert len(rows) == 4
    for hosts, *figures in rows:
        expected = []
        for each in (adamw, adafactor):
            size = parameters * each / int(hosts)
            expected += [size / 1e9, size / copy + size / write]
        assert [float(figure) for figure in figures] == pytest.approx(expected, abs=0.6)
        assert [float(figures[i]) for i in (0, 2)] == pytest.approx(expected[::2], abs=0.11)


# --- Dockerfile ---


def test_the_image_is_installed_from_what_the_installer_reads_and_has_what_is_copied():
    lines = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split() for line in lines if line and not line.startswith("#")]
    first_install = next(i for i, step in enumerate(steps) if step[0] == "RUN")
    copied = [path for step in steps[:first_install] if step[0] == "COPY" for path in step[1:-1]]
    allowed = {
        line[1:]
        for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for path in copied:
        assert (ROOT / path).is_file(), path
        assert path.split("/")[0] in allowed, path
    installer = (ROOT / "scripts" / "install.sh").read_text()
    [inputs] = re.findall(r'"\$root"/\{(.+?)\}', installer)
    assert set(inputs.split(",")) | {"scripts/env.sh"} <= set(copied)
    packages = re.findall(r'"m2l\.\w+": "(\w+)"', (ROOT / "setup.py").read_text())
    assert {"m2l", *packages} <= allowed
    [entry] = [step[1].strip('[]"') for step in steps if step[0] == "ENTRYPOINT"]
    assert os.access(ROOT / entry.removeprefix("/opt/m2l/"), os.X_OK)


# --- the known fields ---


def pruned(schema, values):
    """Returns the parts of a definition that some values have, with the names beside them."""
    kept = {key: schema[key] for key in ("type", "enum") if key in schema}
    dicts = [value for value in values if isinstance(value, dict)]
    if dicts and "properties" in schema:
        kept["required"] = schema.get("required", [])
        kept["properties"] = {
            key: pruned(part, part_values) if part_values else {}
            for key, part in schema["properties"].items()
            for part_values in [[value[key] for value in dicts if key in value]]
        }
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        kept["items"] = pruned(schema["items"], items)
    return kept


def rewrite(definitions):
    environment = os.environ | {"NAME": "a", "IMAGE": "b", "DRY_RUN": "1"}
    found = queue()
    for kind in ("tpu", "gpu"):
        found += [yaml.safe_load(run("gke.sh", ["c"], environment | {"JOBSET": kind}).stdout)]
    known = {}
    for definition in definitions:
        spec = yaml.safe_load(Path(definition).read_text())["spec"]
        for version in spec["versions"]:
            api = f"{spec['group']}/{version['name']}"
            values = [
                m for m in found if (m["apiVersion"], m["kind"]) == (api, spec["names"]["kind"])
            ]
            if values:
                schema = version["schema"]["openAPIV3Schema"]
                known[f"{api} {spec['names']['kind']}"] = pruned(schema, values)
    KNOWN.write_text(json.dumps(known, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    rewrite(sys.argv[1:])

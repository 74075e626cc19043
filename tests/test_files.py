import json
import os
from pathlib import Path

import pytest

from m2l import checkpoints, configuration, files, merging
from m2l.checkpoints import safetensors, t5x
from m2l.data import tokenizer_files
from m2l.errors import ConfigError, DataError, M2LError, MergeError
from m2l.evaluation.model import load
from m2l.tasks import sources

CONTENT = {"seeds": (0, 1), "split": "validation", "rate": 0.1}


def claim(out, content, **options):
    files.check_claim(out, "study.json", content, kind="study", **options)
    files.claim(out, "study.json", content)


def test_a_folder_is_claimed_again_by_the_same_content(tmp_path):
    # A tuple comes back from JSON as a list.
    claim(tmp_path / "a", CONTENT)
    claim(tmp_path / "a", CONTENT)


def test_a_folder_of_other_content_is_refused_unless_it_is_updated(tmp_path):
    claim(tmp_path, CONTENT)
    other = CONTENT | {"seeds": (0, 2)}
    with pytest.raises(ConfigError, match=r"its seeds is \[0, 1\], this one's is \[0, 2\]"):
        claim(tmp_path, other)
    claim(tmp_path, other, update=True)
    assert json.loads((tmp_path / "study.json").read_text())["seeds"] == [0, 2]


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty and holds no study"):
        claim(tmp_path, CONTENT, update=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_claim_that_was_killed_halfway_can_be_made_again(tmp_path):
    (tmp_path / ".study.json.123.tmp").write_text('{"see')
    claim(tmp_path, CONTENT)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "study.json").write_text('{"see')
    with pytest.raises(DataError, match=r"study.json: damaged"):
        claim(tmp_path, CONTENT)


ADDRESS = "hdfs://bucket/x"
TRAIN = "train --gin_file models/t5_tiny.gin --mixture imdb --steps 1 --out out"


@pytest.mark.parametrize(
    "call",
    [
        checkpoints.resolve,
        checkpoints.check_absent,
        checkpoints.read_manifest,
        safetensors.open_tensors,
        t5x.resolve,
        lambda path: tokenizer_files.describe(str(path)),
        lambda path: tokenizer_files.describe(f"chat:{path}"),
        lambda path: sources.parse(f"jsonl:{path}"),
        lambda path: sources.parse(f"promptsource+hub:{path}"),
        lambda path: merging.merge(None, [path], merging.Recipe("average"), "out"),
        lambda path: merging.Recipe.read(path),
        lambda path: load(path),
        lambda path: claim(path, CONTENT),
        lambda path: configuration.load("Run", [path]),
    ],
)
@pytest.mark.parametrize("as_path", [str, Path])
def test_every_function_that_takes_a_path_refuses_one_with_a_scheme(
    call, as_path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(M2LError, match="hdfs:// is not supported"):
        call(as_path(ADDRESS))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        "train --mixture imdb --steps 1 --out ADDRESS",
        "train --mixture imdb --steps 1 --out out --init ADDRESS",
        "train --jsonl train=ADDRESS --steps 1 --out out",
        "train --gin_file ADDRESS --out out",
        f"{TRAIN} --source hub:ADDRESS",
        f"{TRAIN} --vocabulary ADDRESS",
        f"{TRAIN} --gin.Run.source=jsonl:ADDRESS",
        "merge --expert ADDRESS --method average --out out",
        "merge --expert a --method average --out ADDRESS",
        "merge --expert a --recipe ADDRESS --out out",
        "eval --checkpoint ADDRESS --mixture imdb --out out",
        "convert ADDRESS out",
        "convert a ADDRESS",
        "study --out ADDRESS",
        "demo --out ADDRESS",
        "report ADDRESS",
        "inspect ADDRESS",
        "generate ADDRESS text",
        "statistics --checkpoint ADDRESS --kind fisher --out out --mixture imdb",
        "sweep --expert ADDRESS --out out",
        "adamerging --out ADDRESS",
        "mask concrete --out ADDRESS",
        "skills --general ADDRESS --keep imdb --out out",
        "tasks cache imdb --out ADDRESS",
        "tasks list --source cache:ADDRESS",
    ],
)
def test_every_command_refuses_a_path_with_a_scheme(
    arguments, run_m2l, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run_m2l(*arguments.replace("ADDRESS", ADDRESS).split()) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "hdfs:// is not supported" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON: .* at line 1, column 2"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 101 + b"]" * 101, "nested too deeply"),
        (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "nested too deeply"),
        (b"9" * 5000, "too many digits"),
        (b'{"a": "\\udc00"}', "half of a surrogate pair"),
        (b"[1]", "expected kind, an object"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": [1, -Infinity]}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
    ],
)
def test_json_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(MergeError, match=message) as caught:
        files.read_json(tmp_path / "x.json", kind=dict, finite=True, error=MergeError)
    assert str(caught.value).startswith(f"{tmp_path}/x.json: damaged, ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100 + "]" * 100, '["\\ud83d\\ude00", 1e308, "\ufeff"]'])
def test_json_within_the_limits_is_what_the_standard_library_reads(tmp_path, text):
    (tmp_path / "x.json").write_text("\ufeff" + text)
    assert files.read_json(tmp_path / "x.json", finite=True) == json.loads(text)


def test_json_is_read_from_regular_files_of_a_bounded_size(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10**8 + 1)
    for name, message in (
        ("fifo", "not a regular file"),
        (".", "not a regular file"),
        ("absent", "No such file"),
        ("large", "at most 100,000,000 bytes"),
    ):
        with pytest.raises(DataError, match=message):
            files.read_json(tmp_path / name)


@pytest.mark.parametrize("old", ["0.25", '"b"', "null", "true"])
def test_any_change_to_a_record_is_noticed(tmp_path, old):
    content = {"a": 0.25, "b": [None, True], "c": {"d": (1, 2)}}
    file = tmp_path / "x.json"
    files.write_record(file, content)
    assert files.read_record(file) == {"a": 0.25, "b": [None, True], "c": {"d": [1, 2]}}
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, {'"b"': '"e"'}.get(old, "0.5")))
    for required in (True, False):
        with pytest.raises(DataError, match="does not match its checksum"):
            files.read_record(file, required=required)


def test_a_record_without_a_checksum_is_read_only_where_it_may_be_old(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert files.read_record(tmp_path / "x.json", required=False) == {"a": 1}
    with pytest.raises(DataError, match="does not match its checksum"):
        files.read_record(tmp_path / "x.json")


def test_what_is_printed_of_an_error_is_one_line_and_its_table():
    error = MergeError("a\nb\x1b[31m\u2028c\ud800é", ["  x  y", "  z\nw"])
    assert error.render() == "a\\nb\\x1b[31m\\u2028c\\ud800é\n  x  y\n  z\\nw"
    assert len(M2LError("x" * 10**6).render()) < 2010

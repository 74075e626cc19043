"""Your own data: what is accepted, and every refusal with its file and line."""

import gzip
import json

import pytest

from m2l.data import jsonl
from m2l.errors import DataError

GOOD = '{"inputs": "2+2?", "targets": "4"}'
CHOICE = '{"inputs": "2+2?", "targets": "4", "answer_choices": ["4", "5"]}'


def write(tmp_path, *lines):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def test_examples_come_back_in_order_without_blank_lines_and_other_fields(tmp_path):
    other = json.dumps({"inputs": "日本\n語", "targets": " x ", "id": 7, "answer_choices": None})
    path = write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode(), "", "  \r", other + "\r", "")
    assert jsonl.read(path) == [
        {"inputs": "2+2?", "targets": "4"},
        {"inputs": "日本\n語", "targets": " x "},
    ]
    assert jsonl.read(write(tmp_path, CHOICE))[0]["answer_choices"] == ["4", "5"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "it is not JSON: .* at line 1, column 2"),
        ('["a"]', "it is a list, expected an object"),
        ("3", "it is a number"),
        (b"\xff\xfe{}", "it is not UTF-8"),
        ('{"inputs": ' + "9" * 5000 + "}", "a number of too many digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"inputs": "a", "targets": "b", "inputs": "c"}', "'inputs' is there twice"),
        ('{"inputs": "a", "targets": "b", "of": {"x": 1, "x": 1}}', "'x' is there twice"),
        ('{"inputs": "a"}', "the field 'targets' is missing"),
        ('{"input": "a", "targets": "b"}', "'input' is unknown; is 'inputs' meant"),
        ('{"inputs": "a", "targets": 4}', "targets is a number, expected a text"),
        ('{"inputs": null, "targets": "b"}', "inputs is null"),
        ('{"inputs": " ", "targets": "b"}', "inputs is empty"),
        ('{"inputs": "a", "targets": ""}', "targets is empty"),
        (r'{"inputs": "\ud800", "targets": "b"}', "half of a surrogate pair"),
        ('{"inputs": "a", "targets": "b", "answer_choices": "b"}', "a text, expected a list"),
        ('{"inputs": "a", "targets": "b", "answer_choices": []}', "has 0, expected at least two"),
        ('{"inputs": "a", "targets": "b", "answer_choices": ["b"]}', "has 1"),
        ('{"inputs": "a", "targets": "b", "answer_choices": ["b", 1]}', r"answer_choices\[1\]"),
        ('{"inputs": "a", "targets": "b", "answer_choices": ["b", ""]}', "is empty"),
        ('{"inputs": "a", "targets": "b", "answer_choices": ["b", "b"]}', "'b' is there twice"),
        ('{"inputs": "a", "targets": "c", "answer_choices": ["a", "b"]}', "'c' is not among"),
        ('{"inputs": "a", "targets": "b", "answer_choice": ["b", "c"]}', "'answer_choices' meant"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, says):
    first = (
        CHOICE
        if b"answer_choices" in (line if isinstance(line, bytes) else line.encode())
        else GOOD
    )
    path = write(tmp_path, first, "", line)
    with pytest.raises(DataError, match=says) as caught:
        jsonl.read(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_examples_with_and_without_choices_do_not_mix(tmp_path):
    with pytest.raises(DataError, match="line 1 has answer_choices and line 2 has none; put"):
        jsonl.read(write(tmp_path, CHOICE, GOOD))
    with pytest.raises(DataError, match="line 2 has answer_choices and line 1 has none; put"):
        jsonl.read(write(tmp_path, GOOD, CHOICE))


def test_an_empty_or_absent_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"mine\.jsonl: it is empty"):
        jsonl.read(write(tmp_path, "", " "))
    with pytest.raises(DataError, match="No such file"):
        jsonl.read(tmp_path / "absent.jsonl")


# ---- Raw records


def test_raw_records_may_have_any_fields_and_a_file_may_be_compressed(tmp_path):
    rows = [{"answers": {"text": ["日本", "b"]}, "label": -1}, {"input": None, "x": [1.5, True]}]
    lines = "\n\n".join(json.dumps(row) for row in rows).encode() + b"\n"
    plain, packed = tmp_path / "train.jsonl", tmp_path / "train.jsonl.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + lines)
    packed.write_bytes(gzip.compress(lines[:40]) + gzip.compress(lines[40:]))
    assert list(jsonl.records(plain)) == list(jsonl.records(packed)) == rows
    packed.write_bytes(gzip.compress(GOOD.encode()))
    assert jsonl.read(packed) == [json.loads(GOOD)]


def test_raw_records_are_read_one_after_another(tmp_path):
    records = jsonl.records(write(tmp_path, "{}", "[]"))
    assert next(records) == {}
    with pytest.raises(DataError, match=r"mine\.jsonl:2: it is a list, expected an object"):
        next(records)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "it is not JSON"),
        ('"a"', "it is a text, expected an object"),
        (b'{"a": "\xff"}', "it is not UTF-8"),
        ('{"a": 1, "a": 2}', "the field 'a' is there twice"),
        (r'{"a": {"b": ["x", "\ud800"]}}', "it has half of a surrogate pair in it"),
        (r'{"\udfff": 1}', "it has half of a surrogate pair in it"),
        ('{"a": ' + "9" * 5000 + "}", "a number of too many digits"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_raw_record_is_named_by_file_and_line(tmp_path, line, says, packed):
    path = write(tmp_path, r'{"a": "\ud83d\ude00"}', "", line)
    if packed:
        path = path.rename(tmp_path / "mine.jsonl.gz")
        path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=says) as caught:
        list(jsonl.records(path))
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)


def test_a_file_of_raw_records_that_is_absent_empty_or_cut_off_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: it cannot be read: No such file"):
        list(jsonl.records(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match=r"absent\.jsonl\.gz: it cannot be read: No such file"):
        list(jsonl.records(tmp_path / "absent.jsonl.gz"))
    with pytest.raises(DataError, match=r"mine\.jsonl: it is empty"):
        list(jsonl.records(write(tmp_path, " ", "")))
    whole = gzip.compress("\n".join(json.dumps({"n": k}) for k in range(5000)).encode())
    path = tmp_path / "mine.jsonl.gz"
    for damaged in (whole[:-4], whole[: len(whole) // 2], b"{}\n", whole[:-8] + bytes(8)):
        path.write_bytes(damaged)
        with pytest.raises(
            DataError, match=r"mine\.jsonl\.gz:\d+: it is not a complete gzip file"
        ) as caught:
            list(jsonl.records(path))
        assert "\n" not in str(caught.value)

import json

import pytest

from m2l import files
from m2l.errors import ConfigError, DataError

CONTENT = {"seeds": (0, 1), "split": "validation", "rate": 0.1}


def claim(out, content, **how):
    files.check_claim(out, "study.json", content, what="study", **how)
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

"""The same command again finds its own result there; any other is refused."""

import json

import pytest

from m2l import checkpoints


def commands(road, out):
    """Per kind of result: the command, and options of another result."""
    merge = ["merge", "--base", road / "base", "--method", "task_arithmetic"]
    merge += ["--expert", road / "sentiment", "--expert", road / "closed_book_qa", "--out", out]
    exported = road / "exported_for_same_again"
    back = ["convert", exported, out, "--vocabulary", "microworld"]
    return {
        "merge": (merge, (["--scale", "0.5"], ["--no_diagnostics"], ["--dtype", "bfloat16"])),
        "merge to huggingface": ([*merge, "--to", "huggingface"], (["--scale", "0.5"],)),
        "convert out": (["convert", road / "base", out], (["--dtype", "bfloat16"],)),
        "convert in": (back, (["--dtype", "bfloat16"],)),
        "cache": (["tasks", "cache", "imdb", "--out", out], (["--source", "jsonl:JSONL"],)),
    }


KINDS = ("merge", "merge to huggingface", "convert out", "convert in", "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_again_is_done_and_another_is_refused(
    kind, road, run_m2l, tmp_path, capsys
):
    out = tmp_path / "out"
    if kind == "convert in" and not (road / "exported_for_same_again").exists():
        assert run_m2l("convert", road / "base", road / "exported_for_same_again") == 0
    command, others = commands(road, out)[kind]
    assert run_m2l(*command) == 0
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in out.rglob("*")
        if path.is_file()
    }
    capsys.readouterr()
    assert run_m2l(*command) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "already there" in line]
    assert len(lines) == 1
    (tmp_path / "jsonl").mkdir()
    for options in others:
        options = [option.replace("JSONL", str(tmp_path / "jsonl")) for option in options]
        assert run_m2l(*command, *options) == 2
    after = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in out.rglob("*")
        if path.is_file()
    }
    assert after == before


def test_a_merge_of_other_inputs_and_a_damaged_result_are_refused(road, run_m2l, tmp_path, capsys):
    command = commands(road, tmp_path / "out")["merge"][0]
    assert run_m2l(*command) == 0
    swapped = [*command]
    first, second = (i for i, part in enumerate(swapped) if part == "--expert")
    swapped[first + 1], swapped[second + 1] = swapped[second + 1], swapped[first + 1]
    assert run_m2l(*swapped) == 2  # The order decides the last bits.
    largest = max((tmp_path / "out").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    capsys.readouterr()
    assert run_m2l(*command) == 2
    assert "digest" in capsys.readouterr().err


def test_a_manifest_that_is_edited_or_claims_the_key_of_another_is_refused(road, run_m2l, tmp_path):
    command = commands(road, tmp_path / "out")["merge"][0]
    assert run_m2l(*command) == 0
    file = tmp_path / "out" / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    content["custom_metadata"]["m2l"]["made_by"]["recipe"]["scale"] = 0.7
    file.write_text(json.dumps(content))
    assert run_m2l(*command) == 2
    # An export of the merge is not the merge, whatever its manifest records.
    assert run_m2l(*commands(road, tmp_path / "merged")["merge"][0]) == 0
    assert run_m2l("convert", tmp_path / "merged", tmp_path / "exported") == 0
    assert run_m2l(*commands(road, tmp_path / "exported")["merge"][0]) == 2
    digest = checkpoints.read_manifest(tmp_path / "merged").digest
    assert checkpoints.Manifest.read(tmp_path / "exported", "m2l_manifest.json").digest == digest

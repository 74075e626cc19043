"""Every command works in a bucket: what it writes there is what it writes locally."""

import re
import uuid

import pytest

from m2l import storage

DATA = ("--max_examples", 4, "--batch_size", 4, "--input_length", 32, "--target_length", 8)


def models(root):
    return (
        *("--base", root / "base"),
        *("--expert", root / "sentiment", "--expert", root / "closed_book_qa"),
    )


COMMANDS = {
    "train": lambda root, out: (
        *("train", "--init", root / "base", "--mixture", "sentiment", "--steps", 2),
        *("--gin.BATCH_SIZE=4", "--out", out),
    ),
    "merge": lambda root, out: ("merge", *models(root), "--method", "ties", "--out", out),
    "merge to huggingface": lambda root, out: (
        *("merge", *models(root), "--method", "average", "--to", "huggingface", "--out", out),
    ),
    "sweep": lambda root, out: (
        *("sweep", *models(root), "--method", "ties", "--scale", "0.5,1", "--out", out),
    ),
    "sweep with evaluation": lambda root, out: (
        *("sweep", *models(root), "--method", "ties", "--scale", "0.5,1", "--out", out),
        *("--mixture", "sentiment", *DATA),
    ),
    "statistics": lambda root, out: (
        *("statistics", "--checkpoint", root / "sentiment", "--mixture", "sentiment", "--out", out),
        *("--kind", "fisher", "--examples", 3, *DATA[2:]),
    ),
    "adamerging": lambda root, out: (
        *("adamerging", *models(root), "--mixture", "imdb_good_or_bad", "--steps", 2, *DATA),
        *("--out", out / "recipe.json"),
    ),
    "eval": lambda root, out: (
        *("eval", "--checkpoint", root / "sentiment", "--mixture", "sentiment", *DATA),
        *("--out", out, "--examples"),
    ),
    "convert to t5x": lambda root, out: ("convert", root / "base", out, "--to", "t5x"),
    "convert": lambda root, out: ("convert", root / "base", out),
    "skills": lambda root, out: (
        *(
            "skills",
            "--general",
            root / "sentiment",
            "--base",
            root / "base",
            "--mixture",
            "imdb_good_or_bad",
        ),
        *("--keep", "ag_news_topic", "--weights", "0.5,1", "--steps", 2, "--gin.BATCH_SIZE=4"),
        *("--max_examples", 12, "--eval_batch_size", 4, *DATA[4:], "--out", out),
    ),
}


@pytest.fixture(scope="module")
def roots(road, emulated_storage):
    """The directory of the models, local and in a bucket."""
    bucket = storage.path(f"gs://bucket/{uuid.uuid4().hex}")
    for name in ("base", "sentiment", "closed_book_qa"):
        storage.upload(road / name, bucket / name)
    return road, bucket


TIMED = re.compile(
    rb'"(checksum|\w+_nsecs|\w*tokens_per_second|input_wait|mfu|seconds)": *("\w*"|[\d.e+-]+)'
    rb"|[\d.]+ (s|minutes)\b"
)

# Nothing but times, a lock of local files, and where Orbax wrote before it renamed.
UNLIKE = ("seconds.json", ".lock", "commit_success.txt")


def contents(root, out):
    """Returns the bytes of each file of a result, without where it is and how long it took."""
    files = {str(file.relative_to(out)): file.read_bytes() for file in storage.list_files(out)}
    return {
        name: TIMED.sub(
            b"", data.replace(str(out).encode(), b"OUT").replace(str(root).encode(), b"ROOT")
        )
        for name, data in files.items()
        if "tensorboard/" not in name and not name.endswith(UNLIKE)
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_writes_to_a_bucket_is_what_it_writes_locally(
    name, roots, run_m2l, tmp_path
):
    outs = tmp_path / "out", roots[1] / uuid.uuid4().hex / "out"
    for root, out in zip(roots, outs, strict=True):
        assert run_m2l(*COMMANDS[name](root, out)) == 0
    local, remote = (contents(*each) for each in zip(roots, outs, strict=True))
    assert len(local) > 0 and remote.keys() == local.keys()
    assert [file for file in local if remote[file] != local[file]] == []

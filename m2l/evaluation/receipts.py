"""What an evaluation was of, so that the same one again is found done before JAX is imported."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from m2l import files
from m2l.data import example_cache
from m2l.data.tokenizer_files import describe
from m2l.errors import M2LError
from m2l.evaluation import results
from m2l.evaluation.results import Result
from m2l.storage import AnyPath
from m2l.typing import Json
from m2l.version import __version__

# What is asked for without deciding any result.
_UNIMPORTANT = ("batch_size", "examples")


def path(
    checkpoint: AnyPath, records: Json, vocabulary: str | None, options: Mapping[str, Json]
) -> Path | None:
    """Returns the file of an evaluation's receipt; None where nothing tells whether it is stale.

    Args:
        checkpoint: What is evaluated.
        records: What the records follow from, as a JSON value that changes with them; or None.
        vocabulary: The name of the vocabulary, if it is not the checkpoint's own.
        options: What else is asked for.
    """
    if records is None or not isinstance(checkpoint, Path) or not checkpoint.is_dir():
        return None
    key = {
        "m2l": [__version__, example_cache.code_digest()],
        "checkpoint": [str(checkpoint.absolute()), files.directory_digest(checkpoint)],
        "records": records,
        "vocabulary": vocabulary and describe(vocabulary),
        "options": {name: options[name] for name in options if name not in _UNIMPORTANT},
    }
    return files.cache_directory() / "evaluations" / f"{files.checksum(key)}.json"


def write(file: Path, title: str, evaluated: Iterable[Result]) -> None:
    """Writes which model, called `title`, and which examples an evaluation was of."""
    digests = [[r.task, [r.model_digest, r.task_digest]] for r in evaluated]
    with contextlib.suppress(OSError):  # What cannot be stored is found out again.
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_record(file, {"title": title, "results": digests})


def finished(file: Path, out: Path, examples: bool) -> tuple[str, list[Result]]:
    """Returns the model's name and the results in `out` if all of an evaluation's are there.

    Args:
        file: From `path`.
        out: The directory of results.
        examples: Whether what became of each example has to be there as well.

    Returns:
        Without results where one is missing, or stale.
    """
    there: list[Result] = []
    try:
        record = files.read_record(file)
        for task, digests in record["results"]:
            result = results.read_result(results.result_path(out, task))
            same = digests == [result.model_digest, result.task_digest]
            if not same or result.m2l_version != __version__:
                return "", []
            if examples and not (out / (task + results.EXAMPLES)).exists():
                return "", []
            there.append(result)
        title = str(record["title"])
    except (M2LError, OSError, KeyError, TypeError, ValueError):
        return "", []  # Whoever evaluates says what is wrong.
    return title, there

"""The card of a model in a Hugging Face directory: how it was made, from what, and its results.

Merges write it as well, which import no network: Flax takes 0.3 s.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from m2l import files
from m2l.checkpoints.manifest import Manifest
from m2l.errors import CheckpointError
from m2l.typing import Json

_SHOWN = {"merge": "merged", "train": "trained", "convert": "converted"}


def write_card(
    directory: Path,
    name: str,
    model_type: str,
    manifest: Manifest,
    dtype: str,
    *,
    generates: bool | None,
    results: Sequence[Path] = (),
) -> None:
    """Writes README.md.

    Args:
        directory: Where.
        name: What the model is called.
        model_type: The kind of model, as config.json calls it.
        manifest: What it was made by and from.
        dtype: Of its weights here.
        generates: Whether it is a decoder alone; None if that is not known.
        results: JSON files of `m2l eval`.

    Raises:
        CheckpointError: A result cannot be read, or is another model's.
    """
    count = sum(math.prod(record["shape"]) for record in manifest.parameters.values())
    made_by = dict(manifest.made_by)
    kind = made_by.pop("kind", None)
    made_by.pop("config", None)
    tasks = {True: "text-generation", False: "text2text-generation"}
    pipeline = [f"pipeline_tag: {tasks[generates]}"] if generates is not None else []
    tags = ["m2l", *(["merge"] if kind == "merge" else [])]
    lines = [
        "---",
        "library_name: transformers",
        *pipeline,
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {name}",
        "",
        f"A {model_type} model of {count:,} parameters in {dtype}, "
        f"{_SHOWN.get(kind, 'made')} with m2l {manifest.versions.get('m2l', '')}".rstrip()
        + ".",
        f"Its digest is `{manifest.digest}`; m2l_manifest.json holds that of each parameter.",
        "",
        "## How it was made",
        "",
        *_table(("setting", "value"), _settings(made_by)),
    ]
    if manifest.parents:
        rows = [(p["role"], p["path"], f"`{p['digest'][:16]}`") for p in manifest.parents]
        lines += ["", "## What it was made from", "", *_table(("role", "path", "digest"), rows)]
    if results:
        rows = [_result(file, manifest.digest) for file in results]
        columns = ("task", "dataset", "held out", "metric", "score (%)", "examples")
        lines += ["", "## Results", "", *_table(columns, sorted(rows))]
    (directory / "README.md").write_text("\n".join(lines) + "\n")


def _settings(values: Mapping[str, Json], prefix: str = "") -> list[tuple[str, str]]:
    """Returns nested settings as rows, named as in "recipe.method"."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _settings(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return rows


def _result(file: Path, digest: str) -> tuple[str, ...]:
    advice = "evaluate again"
    result = files.read_record(
        file, required=False, finite=True, error=CheckpointError, advice=advice
    )
    try:
        if result["model_digest"] != digest:
            raise CheckpointError(
                f"{file}: a result of another model: expected the digest {digest[:16]}, found "
                f"{str(result['model_digest'])[:16]}"
            )
        held_out = "yes" if result["held_out"] else "no"
        names = result["task"], result["dataset"], held_out, result["metric"]
        if not all(isinstance(name, str) for name in names) or not 0 <= result["score"] <= 100:
            raise ValueError
        return (*names, f"{result['score']:.2f}", f"{result['count']:,}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: no result of m2l eval") from error


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

"""Checkpoints that a study is given, in place of those that its stages would train."""

from collections.abc import Mapping
from pathlib import Path

from m2l import checkpoints, hub_models, models, storage
from m2l.checkpoints.model_fields import differing, normalized
from m2l.errors import CheckpointError, UnknownNameError
from m2l.studies.graph import Stage
from m2l.typing import Json


def digest_of(path: str) -> str:
    """Returns the digest of a checkpoint, a run, a Hugging Face or T5X directory, or a Hub's name.

    Raises:
        CheckpointError: It is missing, damaged, or of no model that m2l has.
    """
    return checkpoints.open(hub_models.located(path)).digest


def stage_of(
    name: str, path: str, digest: str, vocabulary: str, model: Mapping[str, Json]
) -> Stage:
    """Returns the stage that an existing checkpoint takes the place of."""
    settings = {"checkpoint": path, "digest": digest, "vocabulary": vocabulary, "model": model}
    return Stage(name, "given", settings)


def check(paths: Mapping[str, str], stages: Mapping[str, models.Config], label: str) -> None:
    """Checks that given checkpoints can be read, and are of the stages' models.

    Args:
        paths: Given ones by the stage that they take the place of.
        stages: The model of each stage that trains one.
        label: What the setting is called, for messages.

    Raises:
        UnknownNameError: There is no such stage.
        CheckpointError: One cannot be read, or is of another model.
    """
    for name, path in paths.items():
        if name not in stages:
            raise UnknownNameError(f"{label}: stage", name, stages)
        stored = normalized(checkpoints.open(hub_models.located(path)).model)
        described = normalized(models.to_dict(stages[name]))
        for field, own, expected in differing(stored, described):
            raise CheckpointError(
                f"{label}: {path}: its model's {field} is {own!r}, that of {name} is {expected!r}"
            )


def run(stage: Stage, out: Path, inputs: Mapping[str, Path]) -> None:
    """Links an existing checkpoint to the stage's folder; in buckets, copies it.

    One of Hugging Face or T5X is converted, to float32.

    Raises:
        CheckpointError: The checkpoint has changed since the study was planned.
    """
    path = hub_models.located(stage.settings["checkpoint"])
    checkpoint = checkpoints.open(path)
    if checkpoint.digest != stage.settings["digest"]:
        raise CheckpointError(
            f"{path}: changed since the study was planned; plan it again by its gin file and "
            "--update"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.manifest is None:
        _import(checkpoint.format, path, out, stage.settings)
    elif isinstance(out, Path) and isinstance(checkpoint.path, Path):
        out.unlink(missing_ok=True)
        out.symlink_to(checkpoint.path, target_is_directory=True)
    else:
        storage.remove_tree(out)
        storage.upload(checkpoint.path, out)


def _import(kind: str, path: storage.AnyPath, out: Path, settings: Mapping[str, Json]) -> None:
    from m2l.checkpoints import huggingface, t5x
    from m2l.data import tokenizer_files

    importers = {"huggingface": huggingface, "t5x": t5x}
    if kind not in importers:
        raise CheckpointError(f"{path}: not a checkpoint of m2l's, Hugging Face or T5X")
    importers[kind].import_checkpoint(
        path,
        out,
        vocabulary=tokenizer_files.describe(settings["vocabulary"]),
        dtype="float32",
        config=models.from_dict(settings["model"]),
    )

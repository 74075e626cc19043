"""Checkpoints: directories that are whole or absent, and say what they are and where from."""

from m2l.checkpoints.manifest import Manifest, check_vocabulary, is_checkpoint
from m2l.checkpoints.opening import Checkpoint, open
from m2l.checkpoints.publishing import Flusher, check_absent, clean, publish, remove
from m2l.checkpoints.pytrees import flatten, unflatten
from m2l.checkpoints.reading import (
    STEPS,
    open_parameters,
    read_manifest,
    resolve,
    restore,
    restore_average,
    restore_data_state,
    restore_opt_state,
    verify,
)
from m2l.checkpoints.saving import Writer, describe, save, writing
from m2l.checkpoints.spans import Extents
from m2l.checkpoints.tokenizer import check_tokenizer

__all__ = [
    "STEPS",
    "Checkpoint",
    "Extents",
    "Flusher",
    "Manifest",
    "Writer",
    "check_absent",
    "check_tokenizer",
    "check_vocabulary",
    "clean",
    "describe",
    "flatten",
    "is_checkpoint",
    "open",
    "open_parameters",
    "publish",
    "read_manifest",
    "remove",
    "resolve",
    "restore",
    "restore_average",
    "restore_data_state",
    "restore_opt_state",
    "save",
    "unflatten",
    "verify",
    "writing",
]

"""Checkpoints: directories that are whole or absent, and say what they are and where from."""

from m2l.checkpoints.extents import Extents
from m2l.checkpoints.manifest import Manifest, check_vocabulary
from m2l.checkpoints.orbax import create, open_extents
from m2l.checkpoints.publishing import Flusher, check_absent, clean, publish, remove
from m2l.checkpoints.reading import (
    Parameter,
    open_parameters,
    read_manifest,
    resolve,
    restore,
    restore_data_state,
    restore_opt_state,
    verify,
)
from m2l.checkpoints.saving import Writer, describe, save, writing
from m2l.checkpoints.tokenizer import check_tokenizer
from m2l.checkpoints.trees import flatten, unflatten

__all__ = [
    "Extents",
    "Flusher",
    "Manifest",
    "Parameter",
    "Writer",
    "check_absent",
    "check_tokenizer",
    "check_vocabulary",
    "clean",
    "create",
    "describe",
    "flatten",
    "open_extents",
    "open_parameters",
    "publish",
    "read_manifest",
    "remove",
    "resolve",
    "restore",
    "restore_data_state",
    "restore_opt_state",
    "save",
    "unflatten",
    "verify",
    "writing",
]

"""A model to evaluate: a checkpoint of m2l's, or a Hugging Face directory read as it is."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2l import checkpoints, models, storage
from m2l.checkpoints import huggingface, opening
from m2l.data import tokenizer_files
from m2l.errors import CheckpointError
from m2l.files import content_digest


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, of which only the headers are read.

    Attributes:
        path: Where it is.
        config: Its configuration.
        vocabulary: {"name", "size", "fingerprint"} of the one it reads.
        digest: What identifies it: its manifest's, or that of its files' content.
        read: Its parameters, given where they are to lie as `checkpoints.restore` is.
    """

    path: Path
    config: models.Config
    vocabulary: Mapping[str, Any]
    digest: str
    read: Callable[[Any], dict[str, Any]]


def open_model(path: str | Path, vocabulary: str | None = None) -> Model:
    """Opens a checkpoint, a training run's last one, or a Hugging Face directory.

    Args:
        path: Where it is.
        vocabulary: Of a Hugging Face directory, where its tokenizer is; None: in it.

    Raises:
        CheckpointError: it is missing, unfinished, damaged or of an unknown kind; or its tokenizer
            has more ids than its embedding rows.
        DataError: a Hugging Face directory without a tokenizer.
    """
    path = storage.path(path)
    if opening.kind(path) == opening.HUGGINGFACE:
        return _of_huggingface(path, vocabulary)
    directory = checkpoints.resolve(path)
    manifest = checkpoints.read_manifest(directory)
    if not manifest.model:
        raise CheckpointError(
            f"{directory}: it does not say which model it is of, as it was made of checkpoints "
            "that are not m2l's; it can be merged and inspected, and restored by Orbax, but "
            "evaluation needs a checkpoint that m2l trained or converted"
        )

    def read(shardings: Any) -> dict[str, Any]:
        return checkpoints.restore(directory, shardings=shardings)

    config = models.from_dict(manifest.model)
    checkpoints.check_vocabulary(manifest.vocabulary, config.vocab_size, directory)
    return Model(directory, config, manifest.vocabulary, manifest.digest, read)


def _of_huggingface(directory: Path, vocabulary: str | None) -> Model:
    layout, stored = huggingface.open_model(directory)
    described = tokenizer_files.describe(vocabulary or str(directory))
    checkpoints.check_vocabulary(described, layout.config.vocab_size, directory)

    def read(shardings: Any) -> dict[str, Any]:
        found = {
            name: origin.take(stored[origin.tensor].read_checked())
            for name, origin in layout.origins.items()
        }
        params = checkpoints.unflatten(found)
        if shardings is None:
            return params

        def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
            return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

        return jax.tree.map(place, params, jax.tree.broadcast(shardings, params))

    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return Model(directory, layout.config, described, content_digest(files), read)

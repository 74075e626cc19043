"""A model to evaluate: a checkpoint of m2l's, or a Hugging Face directory read as it is."""

from __future__ import annotations  # By which help() prints types as written.

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from m2l import checkpoints, hub_models, models
from m2l.checkpoints import adapters, digest, huggingface, opening
from m2l.checkpoints.spans import read_whole
from m2l.data import tokenizer_files, vocabularies
from m2l.data.vocabularies import Vocabulary
from m2l.errors import CheckpointError
from m2l.files import checksum, content_digest
from m2l.storage import AnyPath
from m2l.typing import Json, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Model:
    """A model: its configuration and vocabulary, and parameters that are read on first use.

    Attributes:
        path: Where it is stored.
        config: Its configuration.
        vocabulary: {"name", "size", "fingerprint"} of the one it reads.
        digest: What identifies it: its manifest's, or that of its files' content.
        read: Reads its parameters onto shardings, as `checkpoints.restore` does.
    """

    path: AnyPath
    config: models.Config
    vocabulary: Mapping[str, Json]
    digest: str
    read: Callable[[PyTree], Params]

    @functools.cached_property
    def params(self) -> Params:
        """The parameters, a nested dict of arrays."""
        return self.read(None)

    @functools.cached_property
    def tokenizer(self) -> Vocabulary:
        """The vocabulary itself, which encodes and decodes texts."""
        return vocabularies.load(self.vocabulary["name"])

    def with_params(self, params: Params) -> Model:
        """Returns the model with other parameters, such as those of a merge in memory."""

        def read(shardings: PyTree) -> Params:
            return params if shardings is None else jax.device_put(params, shardings)

        arrays = jax.tree.map(jax.numpy.asarray, checkpoints.flatten(params))
        digests = digest.of_arrays(arrays).items()
        content = sorted((name, digest.to_hex(words)) for name, words in digests)
        return dataclasses.replace(self, digest=checksum(content), read=read)


def load(path: AnyPath | str, vocabulary: str | None = None) -> Model:
    """Opens a checkpoint, a training run's last one, a Hugging Face directory, or BASE+ADAPTER.

    Only headers are read; `Model.params` reads the parameters.

    Args:
        path: Where it is: a local path, gs:// or s3://, or owner/name[@revision] on the Hugging
            Face Hub.
        vocabulary: The tokenizer of a Hugging Face directory, if it is stored elsewhere.

    Raises:
        CheckpointError: it is missing, unfinished, damaged or of an unknown kind; or its tokenizer
            has more ids than its embedding rows.
        DataError: a Hugging Face directory without a tokenizer.
    """
    path = hub_models.located(path)
    if adapters.split(path) is not None:
        return _load_adapted(path, vocabulary)
    if opening.kind(path) == opening.HUGGINGFACE:
        return _load_huggingface(path, vocabulary)
    directory = checkpoints.resolve(path)
    manifest = checkpoints.read_manifest(directory)
    manifest.check_whole(directory)
    if not manifest.model:
        raise CheckpointError(
            f"{directory}: it does not say which model it is of, as it was made of checkpoints "
            "that are not m2l's; it can be merged and inspected, and restored by Orbax, but "
            "evaluation needs a checkpoint that m2l trained or converted"
        )

    def read(shardings: PyTree) -> Params:
        return checkpoints.restore(directory, shardings=shardings)

    config = models.from_dict(manifest.model)
    checkpoints.check_vocabulary(manifest.vocabulary, config.vocab_size, directory)
    return Model(directory, config, manifest.vocabulary, manifest.digest, read)


def _load_huggingface(directory: Path, vocabulary: str | None) -> Model:
    layout, stored = huggingface.open_model(directory)
    described = tokenizer_files.describe(vocabulary or str(directory))
    checkpoints.check_vocabulary(described, layout.config.vocab_size, directory)

    def read(shardings: PyTree) -> Params:
        params = checkpoints.unflatten(
            {
                name: origin.read(lambda tensor: stored[tensor].read_checked())
                for name, origin in layout.origins.items()
            }
        )
        return _placed(params, shardings)

    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return Model(directory, layout.config, described, content_digest(files), read)


def _placed(params: Params, shardings: PyTree) -> Params:
    """Returns parameters of the host's memory on shardings; None: where they are."""
    if shardings is None:
        return params

    def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, params, jax.tree.broadcast(shardings, params))


def _load_adapted(path: AnyPath, vocabulary: str | None) -> Model:
    opened = opening.open(path)
    config = models.from_dict(opened.model)
    described = opened.vocabulary
    if vocabulary is not None or described is None:
        described = tokenizer_files.describe(vocabulary or str(opened.tokenizer or path))
    checkpoints.check_vocabulary(described, config.vocab_size, path)

    def read(shardings: PyTree) -> Params:
        read_one = read_whole if opened.delta is None else opening.read_checked
        arrays = {name: read_one(tensor) for name, tensor in opened.parameters.items()}
        return _placed(checkpoints.unflatten(arrays), shardings)

    return Model(path, config, described, opened.digest, read)

"""What is merged: checkpoints of any kind, under one set of names.

Where all are Hugging Face's and the result is to be, their own names and layouts are kept, and
models are merged that m2l has no network for. Otherwise all are seen as m2l names and lays out
parameters, or, of other pytrees that Orbax stored, as these do.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m2l.checkpoints import opening
from m2l.checkpoints.opening import HUGGINGFACE, ORBAX, T5X, Checkpoint, LazyTensor
from m2l.checkpoints.spans import Span
from m2l.errors import MergeError

__all__ = ["FORMATS", "HUGGINGFACE", "ORBAX", "T5X", "open_all", "refuse_nonfinite"]

FORMATS = (ORBAX, HUGGINGFACE)
"""What a merge can write."""


def open_all(
    paths: Sequence[Path],
    to: str | None,
    *,
    named: bool = True,
    allowed: Sequence[str] = (),
    subtree: str | None = None,
) -> tuple[list[Checkpoint], str]:
    """Opens models; nothing but headers is read yet.

    Args:
        paths: Where they are.
        to: The format to write; None: that of the inputs.
        named: Whether m2l's names of parameters are asked for.
        allowed: Fields of config.json that are not to be refused for what they say.
        subtree: Of pytrees that Orbax stored, the part that is merged.

    Returns:
        The models, and the format that the merge is to write.

    Raises:
        CheckpointError: One is missing, unfinished or damaged, or is no model to be merged.
        MergeError: There is no such format.
    """
    kinds = {opening.kind(path) for path in paths}
    to = to or (HUGGINGFACE if kinds == {HUGGINGFACE} else ORBAX)
    if to not in FORMATS:
        raise MergeError(f"--to {to}: a merge writes {' or '.join(FORMATS)}")
    native = to == HUGGINGFACE and kinds == {HUGGINGFACE}
    options = {"native": native, "named": named, "allowed": allowed}
    return [opening.open(path, subtree=subtree, **options) for path in paths], to


def memory_of(checkpoint: Checkpoint) -> int:
    """Returns the bytes that a checkpoint itself may hold while its parameters are read."""
    sizes = [
        parameter.size * parameter.dtype.itemsize
        for parameter in checkpoint.parameters.values()
        if isinstance(parameter, LazyTensor)
    ]
    return 3 * max(sizes, default=0)


def refuse_nonfinite(checkpoints: Sequence[Checkpoint], span: Span) -> None:
    """Raises MergeError naming the first entry of a span that is NaN or infinity, if any is."""
    for checkpoint in checkpoints:
        stored = checkpoint.parameters[span.name]
        array = np.empty(span.size, stored.dtype)
        stored.read_span(span, array)
        for index in np.flatnonzero(~np.isfinite(array.astype(np.float32)))[:1]:
            place = span.position(int(index))
            raise MergeError(
                f"{checkpoint.path}: {span.name}[{place}] (row-major) is {array[index]}: "
                "only finite numbers can be merged; use a checkpoint from before the training run "
                "diverged, or it is damaged: m2l inspect --verify"
            )

"""Averages of the last checkpoints of one run, which stand in for a decay of its learning rate.

With w_j the learning rate's share that the updates from checkpoint j - 1 to j are to have, w_0 = 1,
the merge sum_j c_j theta_j with c_j = w_j - w_{j+1} is the model that these updates give: Tian et
al. 2025, arXiv:2507.17634, equations 5 to 7. A linear decay of evenly spaced checkpoints is their
mean.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from m2l import storage
from m2l.checkpoints import reading
from m2l.errors import CheckpointError, MergeError, UnknownNameError
from m2l.storage import AnyPath, PathLike

DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
"""Name -> the learning rate's share at a position from 0, the first checkpoint, to 1."""


def weights(steps: Sequence[int], decay: str = "linear") -> tuple[float, ...]:
    """Returns the weights of checkpoints whose average stands in for a decay; they add up to 1.

    Args:
        steps: The checkpoints' steps, in order.
        decay: One of DECAYS.

    Raises:
        UnknownNameError: There is no such decay.
    """
    if decay not in DECAYS:
        raise UnknownNameError("decay", decay, DECAYS)
    count, first = len(steps), steps[0]
    # The decay ends one mean distance behind the last checkpoint.
    length = max(1, steps[-1] - first) * count / max(1, count - 1)
    shares = [DECAYS[decay]((step - first) / length) for step in steps]
    return tuple(w - after for w, after in zip(shares, [*shares[1:], 0.0], strict=True))


def last_checkpoints(run: PathLike, count: int) -> dict[int, AnyPath]:
    """Returns the last checkpoints of a run, by step, in order.

    Args:
        run: A training run, or its directory of steps.
        count: How many.

    Raises:
        CheckpointError: There is no such run.
        MergeError: It has fewer finished ones.
    """
    run = storage.path(run).absolute()
    finished = reading.steps(run / reading.STEPS) or reading.steps(run)
    if not finished:
        raise CheckpointError(f"{run}: no training run with finished checkpoints")
    if not 1 <= count <= len(finished):
        raise MergeError(
            f"{run}: {count} checkpoints are asked for, and {len(finished)} are there; train with "
            "keep_every=STEPS, or a larger keep"
        )
    return dict([*finished.items()][-count:])

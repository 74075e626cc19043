"""The validation loss of a model in training, and when it no longer improves."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from m2l import models
from m2l.errors import M2LError
from m2l.training import state
from m2l.training.feed import Batch, place


class Validation:
    """Evaluates parameters on the same batches each time.

    Args:
        config: The model's configuration.
        execution: How the network is computed; without its dropout.
        mesh: The mesh of the parameters and batches.
        batches: This process's share of them; read once, at the first evaluation.
        count: How many are read.
        loss_chunk: As in training.
    """

    def __init__(
        self,
        config: models.Config,
        execution: models.Execution,
        mesh: Mesh,
        batches: Iterator[Batch],
        count: int,
        loss_chunk: int = 0,
    ):
        self._mesh = mesh
        self._step = state.evaluation_step(config, execution, mesh, loss_chunk)
        self._unread = itertools.islice(batches, count)
        self._batches: list[Batch] = []

    def run(self, step: int, params: state.Params) -> dict[str, float]:
        """Computes the mean loss of a target token, in nats, and the share predicted right.

        Raises:
            M2LError: The loss is not finite.
        """
        self._batches.extend(self._unread)
        parts = [self._step(params, place(batch, self._mesh)) for batch in self._batches]
        # Summed in float64 on the host: a float32 loses tokens beyond 2^24.
        parts = jax.device_get(parts)
        loss, correct, weight = (
            sum(float(part[name]) for part in parts) for name in ("loss", "correct", "weight")
        )
        if not np.isfinite(loss):
            raise M2LError(f"step {step}: the validation loss is {loss}")
        weight = max(weight, 1.0)
        return {"loss": loss / weight, "accuracy": correct / weight}


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """The best validation loss so far; a value, stored in checkpoints as plain JSON.

    Attributes:
        best: The lowest validation loss; None before the first evaluation.
        best_step: The step of that loss.
        without_improvement: Evaluations since.
    """

    best: float | None = None
    best_step: int = 0
    without_improvement: int = 0

    def updated(self, step: int, loss: float, minimum_improvement: float = 0.0) -> "EarlyStopping":
        """Returns the value after one more evaluation, at `step`.

        A loss counts as an improvement where it is lower by more than `minimum_improvement`.
        """
        if self.best is None or loss < self.best - minimum_improvement:
            return EarlyStopping(loss, step, 0)
        return dataclasses.replace(self, without_improvement=self.without_improvement + 1)

    def is_over(self, patience: int) -> bool:
        """Returns whether a run of this patience stops; 0: it never does."""
        return 0 < patience <= self.without_improvement

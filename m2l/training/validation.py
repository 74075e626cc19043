"""How well a model in training does on what it is not trained on."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from m2l import partitioning
from m2l.errors import M2LError
from m2l.models import Execution
from m2l.training import state

Batch = Mapping[str, np.ndarray]


def place(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, on the mesh as parts of the whole."""
    on_mesh = partitioning.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(on_mesh, value)
        for name, value in batch.items()
    }


class Validation:
    """Evaluates parameters on the same batches each time.

    Args:
        config: The model's configuration.
        execution: How the network is computed; without its dropout.
        mesh: Where parameters and batches lie.
        batches: This process's share of them; read once, at the first evaluation.
        count: How many are taken.
        loss_chunk: As in training.
    """

    def __init__(
        self,
        config: Any,
        execution: Execution,
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
        """The mean loss of a target token, in nats, and the share of them predicted right.

        Raises:
            M2LError: The loss is not finite.
        """
        self._batches.extend(self._unread)
        # Summed in float64 on the host: a float32 loses tokens beyond 2^24.
        total = dict.fromkeys(("loss", "correct", "weight"), 0.0)
        parts = [self._step(params, place(batch, self._mesh)) for batch in self._batches]
        for part in parts:
            for name in total:
                total[name] += float(part[name])
        weight = max(total["weight"], 1.0)
        if not np.isfinite(total["loss"]):
            raise M2LError(f"step {step}: the validation loss is {total['loss']}")
        return {"loss": total["loss"] / weight, "accuracy": total["correct"] / weight}

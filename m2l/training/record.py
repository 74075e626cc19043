"""What is written beside a run once: its model's table, its environment, an export of its end."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from m2l import checkpoints, models, partitioning, storage
from m2l.checkpoints.manifest import versions
from m2l.training import memory


def write(out: Path, config: Any, mesh: Mesh, needed: memory.Need) -> None:
    """Writes model.txt, the parameters on this mesh, and environment.json."""
    rows = partitioning.table(models.spec(config), mesh)
    width = max(len(row.name) for row in rows)
    lines = [
        f"{row.name:{width}}  {'x'.join(map(str, row.shape)):>14}  {row.mib_per_device:10.3f} MiB "
        f"a device  {row.spec}"
        for row in rows
    ]
    count = sum(int(np.prod(row.shape)) for row in rows)
    lines.append(f"\n{count:,} parameters; GiB a device: {memory.describe(needed)}\n")
    storage.write_atomic(out / "model.txt", "\n".join(lines))
    device = jax.devices()[0]
    environment = {
        "versions": versions(),
        "devices": {"kind": device.device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
    }
    storage.write_atomic(out / "environment.json", json.dumps(environment, indent=1) + "\n")


def export(checkpoint: Path, out: Path, dtype: str) -> None:
    """Writes a checkpoint's parameters alone, in another dtype, as a checkpoint at `out`."""
    manifest = checkpoints.read_manifest(checkpoint)
    wanted = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(wanted), checkpoints.restore(checkpoint))
    checkpoints.save(
        out,
        params,
        model=manifest.model,
        vocabulary=manifest.vocabulary,
        made_by={"kind": "export", "dtype": dtype},
        parents=({"role": "exported", "path": str(checkpoint), "digest": manifest.digest},),
        step=manifest.step,
    )


class Synthetic(Iterator[dict[str, np.ndarray]]):
    """One batch of random tokens, again and again, in the names of the pipeline's.

    Args:
        config: The model's configuration.
        lengths: {"inputs": S, "targets": T}.
        rows: Rows in a batch.
    """

    cut = None  # tokens, of no examples

    def __init__(self, config: Any, lengths: Mapping[str, int], rows: int):
        rng = np.random.default_rng(0)
        sizes = {"encoder": lengths["inputs"], "decoder": lengths["targets"]}
        if config.decoder_only:
            sizes = {"decoder": sum(sizes.values())}
        names = [f"{side}_input_tokens" for side in sizes] + ["decoder_target_tokens"]
        self._batch = {
            name: rng.integers(2, config.vocab_size, (rows, sizes[name[:7]]), dtype=np.int32)
            for name in names
        }
        for side, length in sizes.items():
            self._batch[f"{side}_segment_ids"] = np.ones((rows, length), np.int32)
            positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
            self._batch[f"{side}_positions"] = positions
        self._batch["decoder_loss_weights"] = np.ones((rows, sizes["decoder"]), np.int32)

    def __next__(self) -> dict[str, np.ndarray]:
        return self._batch

    def state(self) -> bytes:
        """Every position is the same."""
        return b"synthetic"

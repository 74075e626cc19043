"""What is left of a run whose loss is not finite: the batch, and the examples in it."""

import io
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import seqio

from m2l import files, storage
from m2l.data import pipeline
from m2l.training.feed import Feed, Positions


def keep_batch(
    out: Path,
    step: int,
    mixture: str,
    read_from: Callable[[Positions | None], Feed],
    anchor: tuple[int, Positions],
) -> str:
    """Reads the batch of a step again, and writes it to `out`.

    Two files: failed_step_N.npz, the arrays, and failed_step_N.txt, its examples as text; of
    several processes each writes its share.

    Args:
        out: The run's folder.
        step: The step, counted from 1.
        mixture: What is trained on.
        read_from: Opens the batches at positions in the data.
        anchor: A number of steps done, and the positions there.

    Returns:
        A sentence that names the files and the examples.
    """
    done, positions = anchor
    batches = read_from(positions)
    for _ in range(done, step - 1):
        next(batches)
    before, batch, after = batches.positions(), next(batches), batches.positions()
    several = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
    name = f"failed_step_{step}{several}"
    packed = io.BytesIO()
    np.savez(packed, **batch)
    storage.write_atomic(out / f"{name}.npz", packed.getvalue())
    ids = _examples(mixture, before, after)
    named = "\n".join(f"{task}: {first} to {last}" for task, first, last in ids)
    (out / f"{name}.txt").write_text(f"{named}\n\n{_texts(mixture, batch)}")
    drawn = ", ".join(f"{task} {first} to {last}" for task, first, last in ids[:3])
    more = f" and {len(ids) - 3} tasks more" if len(ids) > 3 else ""
    examples = f"; its examples, as drawn from their tasks: {drawn}{more}" if ids else ""
    return f"its batch is in {out / name}.npz and, as text, .txt{examples}"


def _examples(mixture: str, before: Positions, after: Positions) -> list[tuple[str, int, int]]:
    """(task, first, last) of the examples between two positions of this process's first stream."""
    counts = []
    for positions in (before, after):
        position = next(each for each in positions if each).partition(b"\n")[2]
        if not position.startswith(b"{"):
            return []  # a pipeline of its own, whose position is TensorFlow's
        counts.append(files.parse_json(position, "the position in the data")["counts"])
    provider = pipeline.find("task or mixture", mixture, "train")
    tasks = [task.name for task in seqio.get_subtasks(provider) if "train" in task.splits]
    drawn = zip(tasks, *counts, strict=True)
    return [(task, first, end - 1) for task, first, end in drawn if end > first]


def _texts(mixture: str, batch: dict[str, np.ndarray]) -> str:
    vocabulary = pipeline.vocabulary_of(mixture)
    lines = []
    sides = [name for name in ("encoder_input_tokens", "decoder_target_tokens") if name in batch]
    for row in range(len(batch["decoder_target_tokens"])):
        for side in sides:
            tokens = batch[side][row]
            segments = batch.get(side.split("_")[0] + "_segment_ids", np.ones_like(batch[side]))
            for segment in range(1, int(segments[row].max()) + 1):
                ids = [int(token) for token in tokens[segments[row] == segment] if token]
                lines.append(f"row {row}, {side}, {segment}: {vocabulary.decode(ids)}")
    return "\n".join(lines) + "\n"

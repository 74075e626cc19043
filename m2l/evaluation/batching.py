"""Examples as padded batches of few shapes: made once, for any number of models."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from m2l.data import layouts
from m2l.data.examples import GenerationExample, RankingExample

Example = RankingExample | GenerationExample
Shape = tuple[int, int, int]
"""Padded tokens of an input (without what all share), its choices, padded tokens of a choice."""

MAX_SHAPES = 8
# Shapes are merged as long as padding adds no more than this to all work: each is a compilation.
_WORTH_A_COMPILATION = 0.02


class Batch(NamedTuple):
    """Examples of like shape; rows and choices that are padding have length 0.

    Attributes:
        shared_P: int32, how all inputs begin, which a decoder reads once for all of them.
        prefix_BxS: int32, what is encoded behind it.
        lengths_B: int32, its tokens.
        start_B: int32, the token behind it, which starts every choice.
        choices_BxCxT: int32, EOS last.
        sizes_BxC: int32, the tokens of each choice.
    """

    shared_P: np.ndarray
    prefix_BxS: np.ndarray
    lengths_B: np.ndarray
    start_B: np.ndarray
    choices_BxCxT: np.ndarray
    sizes_BxC: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int(self.shared_P.size + self.lengths_B.sum() + self.sizes_BxC.sum())

    @property
    def size(self) -> int:
        """Tokens, padding included."""
        return self.shared_P.size + self.prefix_BxS.size + self.choices_BxCxT.size


Part = tuple[list[int], Batch]
"""The numbers of examples, and their batch."""


def bucket(length: int, smallest: int = 8) -> int:
    """Returns the padded length of a sequence: the next of 8, 12, 16, 24, 32, 48, 64, ... ."""
    size = smallest
    while size < length:
        # Alternating steps of 3/2 and 4/3 keep padding under a third.
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def scored(example: Example) -> tuple[np.ndarray, ...]:
    """Returns the texts of an example that are scored: its choices, or its target alone."""
    return example.choices if isinstance(example, RankingExample) else (example.target,)


def shared_prefix(examples: Sequence[Example], layout: layouts.Layout) -> np.ndarray:
    """Returns tokens that all inputs begin with, int32 [P], for a decoder to read once.

    A chat template's first turn, or examples before each question. P is 0 or one of `bucket`'s
    lengths, at least 16, so that few shapes are compiled for; 0 where an encoder reads inputs, for
    there no position can be read without those behind it.
    """
    inputs = [example.inputs for example in examples]
    if not isinstance(layout, layouts.PrefixLM) or len(inputs) < 2:
        return np.zeros(0, np.int32)
    prefixes = [layout.prompt(tokens)[0] for tokens in inputs]
    length = min(map(len, prefixes))
    first_L = prefixes[0][:length]
    differs_L = np.any([prefix[:length] != first_L for prefix in prefixes], axis=0)
    common = int(np.argmax(differs_L)) if differs_L.any() else length
    size = 0
    while bucket(size + 1, 16) <= common:
        size = bucket(size + 1, 16)
    return first_L[:size].astype(np.int32)


def _shape(example: Example, layout: layouts.Layout, shared: int) -> Shape:
    texts = scored(example)
    prefix, _ = layout.prompt(example.inputs)
    longest = bucket(max(map(len, texts)), 4)
    return bucket(len(prefix) - shared, 16), bucket(len(texts), min(len(texts), 2)), longest


def _parts(
    examples: Sequence[Example], batch_size: int, layout: layouts.Layout, shared: int
) -> Iterator[tuple[list[int], Shape]]:
    """Yields every example once, with those of like shape, and the least shape for each part."""
    shapes = [_shape(example, layout, shared) for example in examples]
    order = sorted(range(len(examples)), key=lambda index: (*shapes[index][1:], shapes[index][0]))
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        yield part, _hull(shapes[index] for index in part)


def _hull(shapes: Iterable[Shape]) -> Shape:
    return tuple(map(max, zip(*shapes, strict=True)))


def _cost(shapes_x3: np.ndarray) -> np.ndarray:
    # A token of a choice is read by the output's matrix as well.
    return shapes_x3[..., 0] + 2 * shapes_x3[..., 1] * shapes_x3[..., 2]


def fitting_size(batch_size: int, counts: Iterable[int], devices: int = 1) -> int:
    """Returns the batch size up to `batch_size`, and over half of it, with the fewest rows.

    Args:
        batch_size: The most examples in a batch.
        counts: The examples of each task; each task's last batch is filled up.
        devices: What the size is a multiple of, where `batch_size` is.
    """
    counts = list(counts)
    step = devices if batch_size % devices == 0 else 1
    most = max([1, *counts])
    batch_size = min(batch_size, -(-most // step) * step)
    sizes = range(batch_size, batch_size // 2, -step)
    return min(sizes, key=lambda size: sum(-(-count // size) * size for count in counts))


def common_shapes(
    tasks: Iterable[Sequence[Example]], batch_size: int, layout: layouts.Layout
) -> tuple[Shape, ...]:
    """Chooses at most MAX_SHAPES shapes, with little padding, for the batches of all tasks.

    Two shapes become the one that holds both, those first that cost least, until so few are left;
    and on, while it adds next to nothing.

    Args:
        tasks: The examples of each task.
        batch_size: Examples in a batch.
        layout: How the model reads them.
    """
    counts = Counter(
        shape
        for task in tasks
        for _, shape in _parts(task, batch_size, layout, len(shared_prefix(task, layout)))
    )
    shapes_Nx3 = np.array(sorted(counts), np.int64).reshape(-1, 3)
    count_N = np.array([counts[shape] for shape in sorted(counts)], np.int64)
    worth = _WORTH_A_COMPILATION * np.sum(count_N * _cost(shapes_Nx3))
    while len(count_N) > 1:
        hull_NxNx3 = np.maximum(shapes_Nx3[:, None], shapes_Nx3)
        apart_N = count_N * _cost(shapes_Nx3)
        together_NxN = (count_N[:, None] + count_N) * _cost(hull_NxNx3)
        added_NxN = together_NxN - apart_N[:, None] - apart_N
        added_NxN[np.tril_indices(len(count_N))] = np.iinfo(np.int64).max
        one, other = np.unravel_index(np.argmin(added_NxN), added_NxN.shape)
        padding = added_NxN[one, other]
        if len(count_N) <= MAX_SHAPES and padding > worth:
            break
        worth -= padding
        shapes_Nx3[one], count_N[one] = hull_NxNx3[one, other], count_N[one] + count_N[other]
        shapes_Nx3, count_N = np.delete(shapes_Nx3, other, 0), np.delete(count_N, other)
    return tuple(sorted({tuple(shape) for shape in shapes_Nx3.tolist()}))


def batches(
    examples: Sequence[Example],
    batch_size: int,
    layout: layouts.Layout,
    shapes: Sequence[Shape] | None = None,
) -> Iterator[Part]:
    """Yields every example once, with those of like shape, padded to a shape and the batch size.

    Args:
        examples: What to batch, in any order.
        batch_size: Examples in a batch.
        layout: How the model reads them.
        shapes: Of `common_shapes`; None: those of these examples.
    """
    if shapes is None:
        shapes = common_shapes([examples], batch_size, layout)
    shared_P = shared_prefix(examples, layout)
    for part, least in _parts(examples, batch_size, layout, len(shared_P)):
        fitting = [s for s in shapes if all(n <= m for n, m in zip(least, s, strict=True))]
        inputs, num_choices, targets = min(fitting, key=lambda shape: _cost(np.array(shape)))
        batch = Batch(
            shared_P,
            np.zeros((batch_size, inputs), np.int32),
            np.zeros(batch_size, np.int32),
            np.zeros(batch_size, np.int32),
            np.zeros((batch_size, num_choices, targets), np.int32),
            np.zeros((batch_size, num_choices), np.int32),
        )
        for row, index in enumerate(part):
            prefix, batch.start_B[row] = layout.prompt(examples[index].inputs)
            prefix = prefix[len(shared_P) :]
            batch.prefix_BxS[row, : len(prefix)] = prefix
            batch.lengths_B[row] = len(prefix)
            for column, text in enumerate(scored(examples[index])):
                batch.choices_BxCxT[row, column, : len(text)] = text
                batch.sizes_BxC[row, column] = len(text)
        yield part, batch

"""Log-probabilities of texts given inputs, and rank classification: the largest choice's wins."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2l import models
from m2l.data import layouts
from m2l.data.examples import GenerationExample, RankingExample
from m2l.errors import EvaluationError
from m2l.evaluation import choosing

Example = RankingExample | GenerationExample
Shape = tuple[int, int, int]


def bucket(length: int, smallest: int = 8) -> int:
    """The padded length of a sequence: the next of 8, 12, 16, 24, 32, 48, 64, ... ."""
    size = smallest
    while size < length:
        # Alternating steps of 3/2 and 4/3 keep padding under a third.
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class Batch(NamedTuple):
    """Examples of like shape; rows and choices that are padding have length 0.

    Attributes:
        prefix_BxS: int32, what is encoded.
        lengths_B: int32, its tokens.
        start_B: int32, the token behind it, which starts every choice.
        choices_BxCxT: int32, EOS last.
        sizes_BxC: int32, the tokens of each choice.
    """

    prefix_BxS: np.ndarray
    lengths_B: np.ndarray
    start_B: np.ndarray
    choices_BxCxT: np.ndarray
    sizes_BxC: np.ndarray


def token_logits(config: Any, params: Any, batch: Batch, dtype: str) -> tuple[jax.Array, jax.Array]:
    """The logits of every choice's tokens, float32 [B, C, T, V], and whether they are tokens.

    The latter, bool [B, C, T], is False at padding.
    """
    compute, choices_BxCxT = jnp.dtype(dtype), batch.choices_BxCxT
    mask_BxS = jnp.arange(batch.prefix_BxS.shape[1]) < batch.lengths_B[:, None]
    memory = models.encode(config, params, batch.prefix_BxS, mask_BxS, dtype=compute)
    # What is read are the targets moved one to the right behind the start token.
    start_BxCx1 = jnp.broadcast_to(batch.start_B[:, None, None], (*choices_BxCxT.shape[:2], 1))
    read_BxCxT = jnp.concatenate([start_BxCx1, choices_BxCxT[..., :-1]], axis=-1)
    logits_BxCxTxV = models.decode(config, params, memory, mask_BxS, read_BxCxT, dtype=compute)
    is_token_BxCxT = jnp.arange(choices_BxCxT.shape[-1]) < batch.sizes_BxC[..., None]
    return logits_BxCxTxV, is_token_BxCxT


@functools.cache
def scorer(config: Any, dtype: str) -> Callable[[Any, Batch], jax.Array]:
    """The jitted scoring function of a model: one compilation per shape, for any parameters."""

    def score(params: Any, batch: Batch) -> jax.Array:
        """Summed log-probabilities float32 [B, C], EOS included; 0 where a choice is padding."""
        logits_BxCxTxV, is_token_BxCxT = token_logits(config, params, batch, dtype)
        log_normalizer_BxCxT = jax.nn.logsumexp(logits_BxCxTxV, axis=-1)
        chosen_BxCxT = jnp.take_along_axis(logits_BxCxTxV, batch.choices_BxCxT[..., None], axis=-1)[
            ..., 0
        ]
        scores_BxCxT = jnp.where(is_token_BxCxT, chosen_BxCxT - log_normalizer_BxCxT, 0.0)
        return jnp.sum(scores_BxCxT, axis=-1)

    return jax.jit(score)


def _scored(example: Example) -> tuple[np.ndarray, ...]:
    """The texts of an example that are scored: its choices, or its target as the only one."""
    return example.choices if isinstance(example, RankingExample) else (example.target,)


def batches(
    examples: Sequence[Example], batch_size: int, layout: layouts.Layout
) -> Iterator[tuple[list[int], Batch]]:
    """Every example once, with those of like shape, padded to the shape's bucket and batch size.

    Yields:
        The examples' numbers, and their batch.
    """
    prompts = [layout.prompt(example.inputs) for example in examples]
    by_shape: dict[Shape, list[int]] = {}
    for index, example in enumerate(examples):
        choices = _scored(example)
        shape = (
            bucket(len(prompts[index][0]), 16),
            bucket(len(choices), min(len(choices), 2)),
            bucket(max(map(len, choices)), 4),
        )
        by_shape.setdefault(shape, []).append(index)
    for (inputs, num_choices, targets), indices in sorted(by_shape.items()):
        for first in range(0, len(indices), batch_size):
            part = indices[first : first + batch_size]
            batch = Batch(
                np.zeros((batch_size, inputs), np.int32),
                np.zeros(batch_size, np.int32),
                np.zeros(batch_size, np.int32),
                np.zeros((batch_size, num_choices, targets), np.int32),
                np.zeros((batch_size, num_choices), np.int32),
            )
            for row, index in enumerate(part):
                prefix, batch.start_B[row] = prompts[index]
                batch.prefix_BxS[row, : len(prefix)] = prefix
                batch.lengths_B[row] = len(prefix)
                for column, choice in enumerate(_scored(examples[index])):
                    batch.choices_BxCxT[row, column, : len(choice)] = choice
                    batch.sizes_BxC[row, column] = len(choice)
            yield part, batch


def score_examples(
    config: Any,
    params: Any,
    examples: Sequence[Example],
    *,
    layout: layouts.Layout | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    on_done: Callable[[int], None] = lambda count: None,
) -> list[np.ndarray]:
    """Scores every choice of every example; of an example in free text, its target.

    The inputs of an example are encoded once for all its choices. Examples are grouped by padded
    shape; the order of `examples` decides nothing but the order of the result.

    Args:
        config: The model's configuration.
        params: Its parameters.
        examples: What to score.
        layout: How the model reads them; of an encoder-decoder its config says it.
        batch_size: Examples in a batch.
        dtype: The dtype to compute in; log-probabilities are float32 always.
        on_done: Told how many examples were finished, batch by batch.

    Returns:
        Per example, float32 [C]: the summed log-probability of each choice, in nats, EOS included.
        C is 1 for an example in free text.
    """
    score = scorer(config, dtype)
    scores: list[np.ndarray] = [np.empty(0)] * len(examples)
    pending: tuple[list[int], jax.Array] | None = None

    def collect(part: list[int], scores_BxC: jax.Array) -> None:
        for index, of_one in zip(part, np.asarray(scores_BxC), strict=False):
            scores[index] = of_one[: len(_scored(examples[index]))]
        on_done(len(part))

    for part, batch in batches(examples, batch_size, layout or layouts.of(config)):
        scored = score(params, batch)
        if pending is not None:
            collect(*pending)
        pending = (part, scored)
    if pending is not None:
        collect(*pending)
    return scores


def rank(
    task: str,
    examples: Sequence[RankingExample],
    scores: Sequence[np.ndarray],
    *,
    metrics: Sequence[str] = ("accuracy",),
) -> choosing.Ranking:
    """The metrics of choosing the best-scored answer.

    `choosing.ranking` says how they count ties.

    Args:
        task: The task's name, for messages.
        examples: What was scored.
        scores: Per example, a number for each choice: float [C].
        metrics: "accuracy", and of `choosing.OF_CLASSES` what is wanted beside it.

    Raises:
        UnknownNameError: there is no such metric.
        EvaluationError: a score is NaN or infinite, or missing; not exactly one choice of an
            example is right; a metric of classes, and the number of choices varies; there are no
            examples. Each would otherwise count as an answer without a word.
    """
    taken, right = [], []
    for index, (example, scores_C) in enumerate(zip(examples, scores, strict=True)):
        where = f"{task}, example {index}"
        right.append(np.array(example.is_correct))
        taken.append(choosing.best(where, scores_C, right[-1]))
        if right[-1].sum() > 1:
            raise EvaluationError(f"{where}: {right[-1].sum()} of its choices are right, not one")
    return choosing.ranking(task, metrics, taken, right)

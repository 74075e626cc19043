"""Log-probabilities of texts given inputs, and rank classification: the largest choice's wins."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l import models
from m2l.data import layouts
from m2l.data.examples import RankingExample
from m2l.errors import EvaluationError, UnknownNameError
from m2l.evaluation import choosing
from m2l.evaluation.batching import Batch, Example, Part, batches, scored
from m2l.partitioning import constrain

RULES = ("sum", "per_token", "per_byte", "calibrated")
"""What can be compared of choices; `compared` says how."""


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
        # On a mesh every device, and so every process, gets all scores.
        return constrain(jnp.sum(scores_BxCxT, axis=-1), None, None)

    return jax.jit(score)


def score_examples(
    config: Any,
    params: Any,
    examples: Sequence[Example],
    *,
    layout: layouts.Layout | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    parts: Iterable[Part] | None = None,
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
        parts: Of `batching.batches`, where they were made before; `layout` and `batch_size` are
            then not read.
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
            scores[index] = of_one[: len(scored(examples[index]))]
        on_done(len(part))

    if parts is None:
        parts = batches(examples, batch_size, layout or layouts.of(config))
    for part, batch in parts:
        dispatched = (part, score(params, batch))
        if pending is not None:
            collect(*pending)
        pending = dispatched
    if pending is not None:
        collect(*pending)
    return scores


def empty_inputs(
    examples: Sequence[RankingExample], layout: layouts.Layout, eos_id: int
) -> tuple[list[RankingExample], list[list[tuple[int, int]]]]:
    """What calibration scores: every different choice once, after an input that says nothing.

    That input is EOS alone or, where rows begin with a start token, this alone.

    Args:
        examples: Those to calibrate.
        layout: How the model reads them.
        eos_id: The token that ends a text.

    Returns:
        Examples of as many choices as the given ones have, and for each choice of each given
        example in which of them it is, and its place there.
    """
    distinct: dict[bytes, np.ndarray] = {}
    for example in examples:
        distinct |= {choice.tobytes(): choice for choice in example.choices}
    # Like lengths together.
    ordered = sorted(distinct.items(), key=lambda item: len(item[1]))
    width = max((len(example.choices) for example in examples), default=1)
    starts = isinstance(layout, layouts.PrefixLM) and layout.start_id is not None
    nothing = np.array([] if starts else [eos_id], np.int32)
    made = []
    for first in range(0, len(ordered), width):
        choices = tuple(choice for _, choice in ordered[first : first + width])
        none = (False,) * len(choices)
        made.append(RankingExample(nothing, choices, none, "", ("",) * len(choices), False))
    place = {key: divmod(number, width) for number, (key, _) in enumerate(ordered)}
    places = [[place[choice.tobytes()] for choice in example.choices] for example in examples]
    return made, places


def compared(
    rule: str,
    examples: Sequence[RankingExample],
    scores: Sequence[np.ndarray],
    empty: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """What a rule compares of the choices of each example: the largest is taken.

    "sum": log p(choice | inputs), EOS included (T0: Sanh et al. 2022, section 5.1).
    "per_token": this over the choice's tokens, EOS among them (T-Few: Liu et al. 2022).
    "per_byte": this over the UTF-8 bytes of the choice's text, at least 1.
    "calibrated": log p(choice | inputs) - log p(choice | an empty input), as `empty_inputs` says
    (Holtzman et al. 2021, arXiv:2104.08315, without a domain premise).

    Args:
        rule: Of RULES.
        examples: What was scored.
        scores: Per example float32 [C], of `score_examples`.
        empty: The same for the choices after an empty input; read by "calibrated" alone.

    Raises:
        UnknownNameError: there is no such rule.
    """
    if rule == "sum":
        return list(scores)
    if rule == "per_token":
        sizes = [np.array([len(ids) for ids in example.choices]) for example in examples]
        return [of_one / size for of_one, size in zip(scores, sizes, strict=True)]
    if rule == "per_byte":
        texts = [example.choices_text for example in examples]
        sizes = [np.array([max(1, len(text.encode())) for text in of_one]) for of_one in texts]
        return [of_one / size for of_one, size in zip(scores, sizes, strict=True)]
    if rule == "calibrated":
        return [of_one - nothing for of_one, nothing in zip(scores, empty, strict=True)]
    raise UnknownNameError("rule of ranking", rule, RULES)


def by_every_rule(
    task: str,
    examples: Sequence[RankingExample],
    scores: Sequence[np.ndarray],
    empty: Sequence[np.ndarray],
) -> dict[str, float]:
    """Accuracy in percent by the rules but T0's: "accuracy_per_token" and so on; as `rank` does."""
    return {
        f"accuracy_{rule}": rank(task, examples, compared(rule, examples, scores, empty)).figures[
            "accuracy"
        ]
        for rule in RULES[1:]
    }


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
    broken = sum(not np.all(np.isfinite(scores_C)) for scores_C in scores)
    if broken > 1:
        task = f"{broken} of {len(scores)} examples have scores that are not finite; {task}"
    taken, right = [], []
    for index, (example, scores_C) in enumerate(zip(examples, scores, strict=True)):
        where = f"{task}, example {index}"
        right.append(np.array(example.is_correct))
        taken.append(choosing.best(where, scores_C, right[-1]))
        if right[-1].sum() > 1:
            raise EvaluationError(f"{where}: {right[-1].sum()} of its choices are right, not one")
    return choosing.ranking(task, metrics, taken, right)

"""Log-probabilities of texts given inputs, and rank classification: the largest choice's wins.

Choices are masks: which of an example's choices are chosen (several in a tie, none if something
else was answered), and which are right.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from m2l import models
from m2l.data import layouts
from m2l.data.examples import GenerationExample, RankingExample
from m2l.errors import EvaluationError, UnknownNameError
from m2l.evaluation.batching import Batch, Example, Part, batches, scored
from m2l.partitioning import constrain
from m2l.typing import Params, PyTree


def f1(chosen_NxC: np.ndarray, right_N: np.ndarray) -> float:
    """Computes F1 in percent of class 1, the second of two choices; 0 if never right nor chosen.

    A tie, and an answer that is none of the choices, count as the wrong class, whichever is right,
    as `t5.evaluation.metrics` counts an answer that is no class: an example of class 1 is missed,
    another is a false alarm.
    """
    if chosen_NxC.shape[1] != 2:
        raise EvaluationError(f"F1 of class 1 is of 2 choices, not of {chosen_NxC.shape[1]}")
    class_N = np.where(chosen_NxC.sum(axis=1) == 1, chosen_NxC.argmax(axis=1), 1 - right_N)
    both = int(((class_N == 1) & (right_N == 1)).sum())
    either = int((class_N == 1).sum() + (right_N == 1).sum())
    return 200.0 * both / either if either else 0.0


def spearman(chosen_NxC: np.ndarray, right_N: np.ndarray) -> float:
    """Computes Spearman's rank correlation, times 100, of chosen with right ordered classes.

    A tie takes the mean of the tied classes. An answer that is none of the choices takes the class
    farthest from the right one (from the middle one: the first), as it takes the other of two in
    `f1`. 0 where all examples are of one class, or all answers are the same: neither has an
    order.
    """
    from scipy import stats

    last = chosen_NxC.shape[1] - 1
    count_N = chosen_NxC.sum(axis=1)
    mean_N = (chosen_NxC * np.arange(last + 1)).sum(axis=1) / np.maximum(count_N, 1)
    farthest_N = np.where(2 * right_N >= last, 0, last)
    class_N = np.where(count_N > 0, mean_N, farthest_N)
    if len(set(class_N)) < 2 or len(set(right_N)) < 2:
        return 0.0
    return 100.0 * float(stats.spearmanr(class_N, right_N).statistic)


# What is computed from the choices of all examples together, next to accuracy.
CLASS_METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "f1": f1,
    "spearman": spearman,
}


def class_metrics(
    task: str,
    metrics: Sequence[str],
    chosen: Sequence[np.ndarray],
    right: Sequence[np.ndarray],
) -> dict[str, float]:
    """Computes the metrics but "accuracy" of choices that are the same for every example.

    Args:
        task: The task's name, for messages.
        metrics: "accuracy", and names of CLASS_METRICS.
        chosen: Per example, bool [C]: the choices that were chosen.
        right: Per example, bool [C]: the right choice.

    Raises:
        UnknownNameError: there is no such metric.
        EvaluationError: a metric of classes, and the number of choices varies, or an example has
            several right ones.
    """
    result = {}
    for name in metrics:
        if name == "accuracy":
            continue
        if name not in CLASS_METRICS:
            raise UnknownNameError("metric of answer choices", name, ["accuracy", *CLASS_METRICS])
        if len(set(map(len, chosen))) > 1:
            raise EvaluationError(f"{task}: {name} needs the same choices for every example")
        right_NxC = np.stack(right)
        if np.any(right_NxC.sum(axis=1) != 1):
            raise EvaluationError(f"{task}: {name} needs one right choice for every example")
        result[name] = CLASS_METRICS[name](np.stack(chosen), right_NxC.argmax(axis=1))
    return result


def best_choices(label: str, scores_C: np.ndarray, right_C: np.ndarray) -> np.ndarray:
    """Computes which choices of an example have its largest score.

    Args:
        label: The example, for messages.
        scores_C: Float [C], a score for each choice.
        right_C: Bool [C], whether the choice is right.

    Returns:
        Bool [C], true more than once in a tie.

    Raises:
        EvaluationError: a score is NaN or infinite, or missing; no choice is right. Each would
            otherwise count as an answer without a word.
    """
    if len(scores_C) != len(right_C):
        raise EvaluationError(f"{label}: {len(scores_C)} scores of {len(right_C)} choices")
    if not np.all(np.isfinite(scores_C)):
        raise EvaluationError(
            f"{label}: its choices scored {scores_C.tolist()}; the model's parameters or the "
            "arithmetic are broken, and no accuracy follows from them"
        )
    if not np.any(right_C):
        raise EvaluationError(f"{label}: none of its choices is the right one")
    return scores_C == scores_C.max()


@dataclass(frozen=True)
class Ranking:
    """What the scores of one task amount to.

    Attributes:
        figures: In percent, "accuracy", "chance" (the accuracy of choosing at random) and the
            other metrics that were asked for.
        ties: Examples whose best score is shared by several choices, not all of them right.
    """

    figures: Mapping[str, float]
    ties: int


def choice_metrics(
    task: str,
    metrics: Sequence[str],
    chosen: Sequence[np.ndarray],
    right: Sequence[np.ndarray],
) -> Ranking:
    """Computes the metrics of choosing the best-scored choices.

    For accuracy, an example whose best score is shared by k choices counts by the share of them
    that is right, 1/k where one is: a tie never wins by standing first. `f1` and `spearman` say
    what they make of ties.

    Args:
        task: The task's name, for messages.
        metrics: "accuracy", and names of CLASS_METRICS.
        chosen: Per example, bool [C], from `best_choices`.
        right: Per example, bool [C].

    Raises:
        UnknownNameError, EvaluationError: there are no examples; or as `class_metrics` says.
    """
    if not chosen:
        raise EvaluationError(f"{task}: there are no examples to rank")
    pairs = list(zip(chosen, right, strict=True))
    accuracy = np.mean([right_C[chosen_C].mean() for chosen_C, right_C in pairs])
    chance = np.mean([right_C.mean() for right_C in right])
    figures = {"accuracy": 100.0 * float(accuracy), "chance": 100.0 * float(chance)}
    figures |= class_metrics(task, metrics, chosen, right)
    ties = sum(int(best_C.sum() > 1 and not right_C[best_C].all()) for best_C, right_C in pairs)
    return Ranking(figures, ties)


RULES = ("sum", "per_token", "per_byte", "calibrated")
"""Scores of choices that can be compared; see `rule_scores`."""


def encode_inputs(
    config: models.Config,
    params: Params,
    shared_P: jax.Array,
    prefix_BxS: jax.Array,
    lengths_B: jax.Array,
    dtype: jnp.dtype,
) -> tuple[models.Memory, jax.Array]:
    """Encodes the inputs of a batch, what all begin with once.

    Returns:
        What `models.decode` reads, and where it is no padding, bool [B, P + S].
    """
    mask_BxS = jnp.arange(prefix_BxS.shape[1]) < lengths_B[:, None]
    memory = models.encode(config, params, prefix_BxS, mask_BxS, shared_P=shared_P, dtype=dtype)
    shared_BxP = jnp.ones((len(lengths_B), len(shared_P)), bool)
    return memory, jnp.concatenate([shared_BxP, mask_BxS], axis=1)


def token_logits(
    config: models.Config, params: Params, batch: Batch, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Computes the logits of every choice's tokens, float32 [B, C, T, V].

    Returns:
        The logits, and whether they are of tokens, bool [B, C, T]: False at padding.
    """
    compute, choices_BxCxT = jnp.dtype(dtype), batch.choices_BxCxT
    memory, mask_BxS = encode_inputs(
        config, params, batch.shared_P, batch.prefix_BxS, batch.lengths_B, compute
    )
    # What is read are the targets moved one to the right behind the start token.
    start_BxCx1 = jnp.broadcast_to(batch.start_B[:, None, None], (*choices_BxCxT.shape[:2], 1))
    read_BxCxT = jnp.concatenate([start_BxCx1, choices_BxCxT[..., :-1]], axis=-1)
    logits_BxCxTxV = models.decode(config, params, memory, mask_BxS, read_BxCxT, dtype=compute)
    is_token_BxCxT = jnp.arange(choices_BxCxT.shape[-1]) < batch.sizes_BxC[..., None]
    return logits_BxCxTxV, is_token_BxCxT


def _token_scores(
    config: models.Config, params: Params, batch: Batch, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Sums the log-probabilities of each choice's tokens, float32 [B, C], 0 for padding.

    Returns:
        The sums, and whether each token is the most probable one there, bool [B, C].
    """
    logits_BxCxTxV, is_token_BxCxT = token_logits(config, params, batch, dtype)
    log_normalizer_BxCxT = jax.nn.logsumexp(logits_BxCxTxV, axis=-1)
    chosen_BxCxT = jnp.take_along_axis(logits_BxCxTxV, batch.choices_BxCxT[..., None], axis=-1)[
        ..., 0
    ]
    scores_BxCxT = jnp.where(is_token_BxCxT, chosen_BxCxT - log_normalizer_BxCxT, 0.0)
    is_best_BxCxT = jnp.argmax(logits_BxCxTxV, axis=-1) == batch.choices_BxCxT
    is_greedy_BxC = jnp.all(is_best_BxCxT | ~is_token_BxCxT, axis=-1)
    # On a mesh every device, and so every process, gets all scores.
    return tuple(
        constrain(each, None, None) for each in (jnp.sum(scores_BxCxT, axis=-1), is_greedy_BxC)
    )


@functools.cache
def scorer(config: models.Config, dtype: str) -> Callable[[Params, Batch], jax.Array]:
    """Returns the jitted scoring function of a model; it compiles once per shape."""

    def score(params: Params, batch: Batch) -> jax.Array:
        """Sums log-probabilities, float32 [B, C], EOS included; 0 where a choice is padding."""
        return _token_scores(config, params, batch, dtype)[0]

    return jax.jit(score)


@functools.cache
def _greedy_scorer(
    config: models.Config, dtype: str
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    return jax.jit(lambda params, batch: _token_scores(config, params, batch, dtype))


def score_examples(
    config: models.Config,
    params: Params,
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
        parts: From `batching.batches`, in place of `layout` and `batch_size`; None makes them.
        on_done: Called with the number of examples finished, batch by batch.

    Returns:
        Per example, float32 [C]: the summed log-probability of each choice, in nats, EOS included.
        C is 1 for an example in free text.
    """
    if parts is None:
        parts = batches(examples, batch_size, layout or layouts.of(config))
    return _by_example(scorer(config, dtype), params, examples, parts, on_done)


def likelihoods(
    config: models.Config,
    params: Params,
    examples: Sequence[Example],
    *,
    layout: layouts.Layout | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    on_done: Callable[[int], None] = lambda count: None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores as `score_examples` does, and says which choices a greedy decoder would write.

    Returns:
        Per example, float32 [C] and bool [C]: whether each of a choice's tokens is the most
        probable one behind those before it.
    """
    parts = batches(examples, batch_size, layout or layouts.of(config))
    return _by_example(_greedy_scorer(config, dtype), params, examples, parts, on_done)


def _by_example(
    score: Callable[[Params, Batch], PyTree],
    params: Params,
    examples: Sequence[Example],
    parts: Iterable[Part],
    on_done: Callable[[int], None],
) -> list[PyTree]:
    """Calls a scorer on each batch; returns its arrays [B, C] as one [C] for each example."""
    scores: list[PyTree] = [np.empty(0)] * len(examples)
    pending: tuple[list[int], PyTree] | None = None

    def collect(part: list[int], arrays_BxC: PyTree) -> None:
        arrays_BxC = jax.tree.map(np.asarray, arrays_BxC)
        for row, index in enumerate(part):
            choices = len(scored(examples[index]))
            scores[index] = jax.tree.map(
                lambda each_BxC, row=row, choices=choices: each_BxC[row, :choices], arrays_BxC
            )
        on_done(len(part))

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
    """Returns what calibration scores: every different choice once, after an empty input.

    An empty input is EOS alone or, where rows begin with a start token, this alone.

    Args:
        examples: Those to calibrate.
        layout: How the model reads them.
        eos_id: The token that ends a text.

    Returns:
        Examples of as many choices as `examples` have, and for each choice of each of `examples`
        which of the former has it, and at which place.
    """
    distinct: dict[bytes, np.ndarray] = {}
    for example in examples:
        distinct |= {choice.tobytes(): choice for choice in example.choices}
    # Similar lengths together.
    ordered = sorted(distinct.items(), key=lambda item: len(item[1]))
    width = max((len(example.choices) for example in examples), default=1)
    starts = isinstance(layout, layouts.PrefixLM) and layout.start_id is not None
    nothing = np.array([] if starts else [eos_id], np.int32)
    empty = []
    for first in range(0, len(ordered), width):
        choices = tuple(choice for _, choice in ordered[first : first + width])
        none = (False,) * len(choices)
        empty.append(RankingExample(nothing, choices, none, "", ("",) * len(choices), False))
    place = {key: divmod(number, width) for number, (key, _) in enumerate(ordered)}
    places = [[place[choice.tobytes()] for choice in example.choices] for example in examples]
    return empty, places


def rule_scores(
    rule: str,
    examples: Sequence[RankingExample],
    scores: Sequence[np.ndarray],
    empty: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """Computes what a rule compares of the choices of each example: the largest is chosen.

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
    if rule == "calibrated":
        return [scores_C - empty_C for scores_C, empty_C in zip(scores, empty, strict=True)]
    if rule == "per_token":
        sizes = [[len(ids) for ids in example.choices] for example in examples]
    elif rule == "per_byte":
        sizes = [[max(1, len(text.encode())) for text in e.choices_text] for e in examples]
    else:
        raise UnknownNameError("rule of ranking", rule, RULES)
    return [scores_C / np.array(size) for scores_C, size in zip(scores, sizes, strict=True)]


def accuracy_by_rule(
    task: str,
    examples: Sequence[RankingExample],
    scores: Sequence[np.ndarray],
    empty: Sequence[np.ndarray],
) -> dict[str, float]:
    """Computes `rank`'s accuracy in percent by the rules but T0's, as "accuracy_per_token"."""
    result = {}
    for rule in RULES[1:]:
        ranking = rank(task, examples, rule_scores(rule, examples, scores, empty))
        result[f"accuracy_{rule}"] = ranking.figures["accuracy"]
    return result


def rank(
    task: str,
    examples: Sequence[RankingExample],
    scores: Sequence[np.ndarray],
    *,
    metrics: Sequence[str] = ("accuracy",),
) -> Ranking:
    """Computes the metrics of choosing the best-scored answer.

    `choice_metrics` says how they count ties.

    Args:
        task: The task's name, for messages.
        examples: What was scored.
        scores: Per example, a number for each choice: float [C].
        metrics: "accuracy", and names of CLASS_METRICS.

    Raises:
        UnknownNameError: there is no such metric.
        EvaluationError: a score is NaN or infinite, or missing; not exactly one choice of an
            example is right; a metric of classes, and the number of choices varies; there are no
            examples. Each would otherwise count as an answer without a word.
    """
    broken = sum(not np.all(np.isfinite(scores_C)) for scores_C in scores)
    if broken > 1:
        task = f"{broken} of {len(scores)} examples have scores that are not finite; {task}"
    chosen, right = [], []
    for index, (example, scores_C) in enumerate(zip(examples, scores, strict=True)):
        label = f"{task}, example {index}"
        right.append(np.array(example.is_correct))
        chosen.append(best_choices(label, scores_C, right[-1]))
        if right[-1].sum() > 1:
            raise EvaluationError(f"{label}: {right[-1].sum()} of its choices are right, not one")
    return choice_metrics(task, metrics, chosen, right)


def reference_likelihood(
    task: str, examples: Sequence[GenerationExample], scores: Sequence[np.ndarray]
) -> float:
    """Computes 100 exp(mean over examples of log p(target | inputs) / n), n the target's tokens.

    EOS is one of the tokens. The figure is the geometric mean of a token's probability, every
    example counting the same, in percent: 100 for a model that is sure of every reference, 100/V
    for one that knows nothing. Unlike a log-likelihood it is positive, so that one model's can be
    divided by another's.

    Args:
        task: The task's name, for messages.
        examples: What was scored.
        scores: Per example, the target's summed log-probability in nats, float32 [1], as
            `score_examples` returns it.

    Raises:
        EvaluationError: a log-probability is NaN, infinite or missing; there are no examples.
    """
    if not examples:
        raise EvaluationError(f"{task}: there are no examples whose references could be scored")
    by_token = []
    for index, (example, scores_C) in enumerate(zip(examples, scores, strict=True)):
        if len(scores_C) != 1 or not np.isfinite(scores_C[0]):
            raise EvaluationError(
                f"{task}, example {index}: its reference scored {np.asarray(scores_C).tolist()}; "
                "the model's parameters or the arithmetic are broken"
            )
        by_token.append(float(scores_C[0]) / len(example.target))
    return 100.0 * float(np.exp(np.mean(by_token)))


def predictions(
    config: models.Config, params: Params, batch: Batch, *, dtype: str = "float32"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes what a model predicts on a batch, as log-probabilities; differentiable.

    Of examples with answer choices, a prediction is the softmax over the choices' scores, the
    summed log-probabilities that rank classification compares. Of examples in free text, which have
    one choice, their target: the next token at each of the target's positions.

    Args:
        config: The model's configuration.
        params: Its parameters.
        batch: From `batching.batches`.
        dtype: The dtype to compute in.

    Returns:
        log p, float32 [B, C] of choices or [B, 1, T, V] of tokens; what of it are options, bool of
        that shape; and which predictions count, bool [B] or [B, 1, T]: those of no padding.
    """
    if batch.choices_BxCxT.shape[1] == 1:
        logits, is_counted = token_logits(config, params, batch, dtype)
        is_option = jnp.ones_like(logits, bool)
    else:
        logits, is_option = scorer(config, dtype)(params, batch), jnp.asarray(batch.sizes_BxC) > 0
        is_counted = is_option[:, 0]
    return jax.nn.log_softmax(jnp.where(is_option, logits, -1e30), axis=-1), is_option, is_counted


def _mean_counted(values: jax.Array, is_counted: jax.Array) -> jax.Array:
    total = jnp.sum(jnp.where(is_counted, values, 0.0))
    return total / jnp.maximum(jnp.sum(is_counted), 1)


def mean_entropy(
    config: models.Config, params: Params, batch: Batch, *, dtype: str = "float32"
) -> jax.Array:
    """Computes the mean entropy of a model's `predictions` on a batch, in nats; differentiable.

    No answer is known to be right: of free text the target decides what is read, though not what is
    wanted. Rows without an example count for nothing.

    Yang et al. 2024, arXiv:2310.02575, equation 5, for classes.

    Args:
        config, params, batch, dtype: As for `predictions`.

    Returns:
        A float32 scalar.
    """
    log_p, is_option, is_counted = predictions(config, params, batch, dtype=dtype)
    terms = jnp.where(is_option, jnp.exp(log_p) * log_p, 0.0)
    return _mean_counted(-jnp.sum(terms, axis=-1), is_counted)


def mean_cross_entropy(
    config: models.Config,
    params: Params,
    labelled: tuple[Batch, np.ndarray],
    *,
    dtype: str = "float32",
) -> jax.Array:
    """Computes the mean of -log p(what is right), in nats, over a model's `predictions`.

    Args:
        config, params, dtype: As for `predictions`.
        labelled: The batch, and int32 [B], the right choice of each example; of free text the
            target's tokens are right, and it is not read.

    Returns:
        A float32 scalar.
    """
    batch, right_B = labelled
    log_p, _, is_counted = predictions(config, params, batch, dtype=dtype)
    labels = right_B if log_p.ndim == 2 else batch.choices_BxCxT
    log_p_right = jnp.take_along_axis(log_p, jnp.asarray(labels)[..., None], axis=-1)[..., 0]
    return _mean_counted(-log_p_right, is_counted)


def mean_divergence(
    config: models.Config,
    params: Params,
    taught: tuple[Batch, jax.Array],
    *,
    dtype: str = "float32",
) -> jax.Array:
    """Computes the mean KL divergence of a model's `predictions` from a teacher's, in nats.

    KL(p_teacher || p_model), as Differentiable Adaptive Merging learns by (Gauthier-Caron et al.
    2024, arXiv:2410.08371), where the teacher of a task is its expert.

    Args:
        config, params, dtype: As for `predictions`.
        taught: The batch, and the teacher's log p on it, the first of its `predictions`.

    Returns:
        A float32 scalar.
    """
    batch, teacher_log_p = taught
    log_p, is_option, is_counted = predictions(config, params, batch, dtype=dtype)
    terms = jnp.where(is_option, jnp.exp(teacher_log_p) * (teacher_log_p - log_p), 0.0)
    return _mean_counted(jnp.sum(terms, axis=-1), is_counted)

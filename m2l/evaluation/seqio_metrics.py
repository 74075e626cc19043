"""The metrics that tasks with answer choices carry in seqio's registry, for `seqio.Evaluator`.

Each is made for one task and raises EvaluationError, which seqio's Evaluator passes on as a
ValueError with the same text, where the figure would be wrong without a word. (An Evaluator that
has raised it does so again on its next call: make a new one.)
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from m2l.errors import EvaluationError
from m2l.evaluation import ranking

# What t5's rank_classification postprocessor returns: (example, choice), whether the choice is
# right, the example's weight, the choice's length in tokens.
RankTarget = tuple[tuple[int, int], bool, float, int]
# A float for each target; or these and intermediates.
Scores = ArrayLike | tuple[ArrayLike, object]
ScoreMetric = Callable[[Sequence[RankTarget], Scores], dict[str, float]]
PredictMetric = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


def rank_classification(
    task: str, *, num_choices: int | None, metrics: Sequence[str] = ("accuracy",)
) -> ScoreMetric:
    """Returns the metric of a task whose answer is the choice with the largest log-likelihood.

    The figures are those of `m2l eval`, save that a text which a record offers twice is two choices
    here: "accuracy", where k choices that share the best score count 1/k, so that a tie never wins
    by standing first; "chance", the accuracy of choosing at random; the other metrics the prompt
    declares; and "ties", how many examples had one.
    Without ties, accuracy and F1 equal those of `t5.evaluation.metrics.rank_classification`.

    `seqio.Evaluator(num_examples=n)` takes the first n rows, one for each choice, and may leave
    the last example a part of its choices. Where their number is known, that is refused. Where
    it varies, such an example cannot be told from a complete one unless fewer than two choices,
    or no right one, are left: evaluate such tasks whole, or let n end with an example.

    Args:
        task: The task's name, for messages.
        num_choices: How many choices every example has; None if that varies.
        metrics: "accuracy", and names of `ranking.CLASS_METRICS`.

    Returns:
        A function of seqio's (targets, scores): a target as t5's rank_classification
        postprocessor returns it and a float for every choice of every example, in any order; the
        scores may come with intermediates, as (scores, intermediates). It raises
        EvaluationError: not as many scores as targets, or none; a score that is NaN or infinite; an
        example with choices missing or given twice, or without a right one; a weight.
    """

    def compute(targets: Sequence[RankTarget], scores: Scores) -> dict[str, float]:
        if isinstance(scores, tuple) and len(scores) == 2 and np.ndim(scores[0]):
            scores = scores[0]
        scores = np.asarray(scores, np.float64)
        if scores.shape != (len(targets),):
            raise EvaluationError(
                f"{task}: scores of shape {scores.shape} for {len(targets)} answer choices; it "
                "needs one number for each"
            )
        groups: dict[int, dict[int, tuple[bool, float]]] = {}
        for ((example, choice), is_correct, weight, *_), score in zip(targets, scores, strict=True):
            group = groups.setdefault(int(example), {})
            if int(choice) in group:
                raise EvaluationError(f"{task}, example {example}: choice {choice} came twice")
            if weight != 1:
                raise EvaluationError(
                    f"{task}, example {example}: its weight is {weight}; every example counts once"
                )
            group[int(choice)] = (bool(is_correct), float(score))
        chosen, right = [], []
        for example in sorted(groups):
            label, group = f"{task}, example {example}", groups[example]
            needed = max(2, len(group)) if num_choices is None else num_choices
            if sorted(group) != list(range(needed)):
                raise EvaluationError(
                    f"{label}: of its {'two or more' if num_choices is None else num_choices} "
                    f"choices there are the numbers {sorted(group)}; a limit on examples counts "
                    "choices, and must not end inside an example"
                )
            rows = [group[choice] for choice in range(needed)]
            right.append(np.array([is_correct for is_correct, _ in rows]))
            chosen.append(
                ranking.best_choices(label, np.array([score for _, score in rows]), right[-1])
            )
        ranked = ranking.choice_metrics(task, metrics, chosen, right)
        return {**ranked.figures, "ties": float(ranked.ties)}

    return compute


def answers(
    task: str, *, classes: Sequence[str] | None, metrics: Sequence[str] = ("accuracy",)
) -> PredictMetric:
    """Returns the metric of a task whose decoded answer is compared with the right choice's text.

    "accuracy" is the share in percent of answers that are the target, blanks around both left out.
    With fixed choices, the other metrics the prompt declares: an answer that is none of the choices
    counts to F1 as the wrong class, as `t5.evaluation.metrics.f1_score_with_invalid` has it, and to
    Spearman's correlation as the class farthest from the right one.

    Args:
        task: The task's name, for messages.
        classes: The choices of every example, in the order of their classes; None if they vary.
        metrics: "accuracy", and with `classes` names of `ranking.CLASS_METRICS`.

    Returns:
        A function of seqio's (targets, predictions), two texts for each example. It raises
        EvaluationError: not as many predictions as targets, or none; a target that is blank, which
        saying nothing would match, or none of the classes.
    """
    names = None if classes is None else [text.strip() for text in classes]

    def compute(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        if len(targets) != len(predictions) or not len(targets):
            raise EvaluationError(
                f"{task}: {len(predictions)} predictions for {len(targets)} targets; it needs as "
                "many of one as of the other, and at least one"
            )
        targets = [text.strip() for text in targets]
        predictions = [text.strip() for text in predictions]
        for example, target in enumerate(targets):
            if not target or (names is not None and target not in names):
                among = "" if names is None else f", none of the choices {', '.join(names)}"
                raise EvaluationError(f"{task}, example {example}: its target is {target!r}{among}")
        same = [one == other for one, other in zip(targets, predictions, strict=True)]
        figures = {"accuracy": 100.0 * float(np.mean(same))}
        if names is not None:
            chosen, right = (
                [np.array([text == name for name in names]) for text in texts]
                for texts in (predictions, targets)
            )
            figures |= ranking.class_metrics(task, metrics, chosen, right)
        return figures

    return compute

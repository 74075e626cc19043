"""The metrics of generated text, in percent, guarded against what their libraries do silently.

Each takes one list of references per prediction, whatever the library underneath wants.
"""

from collections.abc import Callable, Mapping, Sequence

from m2l.errors import EvaluationError, UnknownNameError
from m2l.evaluation import scorers

References = Sequence[Sequence[str]]
Metric = Callable[[References, Sequence[str]], dict[str, float]]


def _check(references: References, predictions: Sequence[str]) -> None:
    if len(references) != len(predictions) or not predictions:
        raise EvaluationError(
            f"{len(predictions)} predictions for {len(references)} references; a metric needs as "
            "many of one as of the other, and at least one"
        )
    for i, of_one in enumerate(references):
        if isinstance(of_one, str) or not of_one:
            raise EvaluationError(
                f"example {i}: its references are {of_one!r}, not a list of texts"
            )


def squad(references: References, predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and token F1 against the best reference, after SQuAD's normalisation.

    Source: Rajpurkar et al. (2016), as `t5.evaluation.metrics.squad` computes it. Given a plain
    text in place of a list of references, that function compares with single letters.
    """
    _check(references, predictions)
    from t5.evaluation import metrics

    scores = metrics.squad([list(of_one) for of_one in references], list(predictions))
    return {"exact_match": float(scores["em"]), "f1": float(scores["f1"])}


def bleu(references: References, predictions: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU of detokenised text, as `t5.evaluation.metrics.bleu` computes it.

    sacrebleu underneath wants streams (the first reference of every example, then every second
    one) and computes another figure without a word when it is given lists per example.
    """
    _check(references, predictions)
    from t5.evaluation import metrics

    most = max(len(of_one) for of_one in references)
    streams = [
        [of_one[k] if k < len(of_one) else None for of_one in references] for k in range(most)
    ]
    return {"bleu": float(metrics.bleu(streams, list(predictions))["bleu"])}


def rouge(references: References, predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum F-measures, the best over the references, averaged.

    Source: Lin (2004), by the rouge-score package. `t5.evaluation.metrics.rouge` reports the middle
    of an unseeded bootstrap instead of the mean, so that its figure changes from call to call.
    """
    _check(references, predictions)
    from rouge_score import rouge_scorer

    names = ["rouge1", "rouge2", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(names)
    sums = dict.fromkeys(names, 0.0)
    for of_one, prediction in zip(references, predictions, strict=True):
        # ROUGE-Lsum takes a line for a sentence.
        best = [
            scorer.score(text.replace(" . ", " .\n"), prediction.replace(" . ", " .\n"))
            for text in of_one
        ]
        for name in names:
            sums[name] += max(score[name].fmeasure for score in best)
    return {name: 100.0 * total / len(predictions) for name, total in sums.items()}


def figures(
    name: str, references: References, predictions: Sequence[str]
) -> tuple[dict[str, float], list[float] | None]:
    """A metric's figures, and the headline one of each example; None of a corpus's, BLEU.

    Args:
        name: The metric's.
        references: Per example every text that counts as right.
        predictions: Per example what the model wrote.

    Raises:
        UnknownNameError: there is no such metric.
        EvaluationError: as the metrics do.
    """
    compute = metric(name)
    if name == "bleu":
        return compute(references, predictions), None
    _check(references, predictions)
    if name in scorers.SCORERS:
        values = scorers.SCORERS[name](references, predictions)
        return _means(values), values[HEADLINE[name]]
    # The others are means over the examples.
    pairs = zip(references, predictions, strict=True)
    found = [compute([of_one], [prediction]) for of_one, prediction in pairs]
    means = {figure: sum(one[figure] for one in found) / len(found) for figure in found[0]}
    return means, [one[HEADLINE[name]] for one in found]


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {figure: sum(of_all) / len(of_all) for figure, of_all in values.items()}


def _of_scorer(scorer: scorers.Scorer) -> Metric:
    def compute(references: References, predictions: Sequence[str]) -> dict[str, float]:
        _check(references, predictions)
        return _means(scorer(references, predictions))

    return compute


METRICS: dict[str, Metric] = {
    "squad": squad,
    "bleu": bleu,
    "rouge": rouge,
    **{name: _of_scorer(scorer) for name, scorer in scorers.SCORERS.items()},
}
# Which of a metric's figures stands for it in tables and in normalised performance.
HEADLINE = {
    "squad": "f1",
    "bleu": "bleu",
    "rouge": "rougeLsum",
    "accuracy": "accuracy",
    "reference_likelihood": "reference_likelihood",
    **{name: name for name in scorers.SCORERS},
}
# What stands for a task in free text: the headline of its metrics on decoded text, or the
# likelihood of its references, for which nothing is decoded.
GENERATIVE_SCORES = ("decoding", "likelihood")


def metric(name: str) -> Metric:
    """The metric of that name; UnknownNameError if there is none."""
    if name not in METRICS:
        raise UnknownNameError("metric", name, METRICS)
    return METRICS[name]

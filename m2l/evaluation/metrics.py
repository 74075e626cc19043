"""The metrics of generated text, in percent, guarded against what their libraries do silently.

Each takes one list of references per prediction, whatever the library underneath wants.
"""

import itertools
import math
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from m2l.errors import EvaluationError, UnknownNameError
from m2l.evaluation import programs, refusals, sandbox, words

if TYPE_CHECKING:
    from rouge_score import scoring as rouge_scoring

References = Sequence[Sequence[str]]
Metric = Callable[[References, Sequence[str]], dict[str, float]]
Scorer = Callable[[References, Sequence[str]], dict[str, list[float]]]


def _check(references: References, predictions: Sequence[str]) -> None:
    if len(references) != len(predictions) or not predictions:
        raise EvaluationError(
            f"{len(predictions)} predictions for {len(references)} references; a metric needs as "
            "many of one as of the other, and at least one"
        )
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise EvaluationError(f"example {i}: its references are {texts!r}, not a list of texts")


def squad(references: References, predictions: Sequence[str]) -> dict[str, float]:
    """Computes exact match and token F1 against the best reference, after SQuAD's normalisation.

    Source: Rajpurkar et al. (2016), as `t5.evaluation.metrics.squad` computes it, but for two rules
    that go by the reference. SQuAD's takes out punctuation and articles, and of "A" or "?" leaves
    nothing, which matches every other nothing and has an F1 of 0 with itself: where nothing is left
    of a reference, it and the answer are compared with their articles, and where nothing is left
    still, with their punctuation too. A reference in another script than Latin has the punctuation
    of all scripts taken out, as MLQA does (Lewis et al., 2020), and where that script puts no
    spaces between words, its letters are the tokens of F1.
    """
    _check(references, predictions)
    best = [
        [max(scores) for scores in zip(*(_squad(text, prediction) for text in texts), strict=True)]
        for texts, prediction in zip(references, predictions, strict=True)
    ]
    # One figure after the other: NumPy adds up columns in another order.
    exact_match, f1 = (100.0 * float(np.mean(scores)) for scores in zip(*best, strict=True))
    return {"exact_match": exact_match, "f1": f1}


def _squad(reference: str, prediction: str) -> tuple[float, float]:
    """Computes exact match and F1 of one answer and one reference, 0 to 1."""
    latin = words.is_latin(reference)
    for normal_form in (_without_articles, _without_punctuation, _without_blanks):
        expected, answer = (normal_form(text, latin) for text in (reference, prediction))
        if expected:
            break
    tokens = [
        Counter((text if latin else words.spaced(text)).split()) for text in (expected, answer)
    ]
    same = (tokens[0] & tokens[1]).total()
    if not same:
        # Equal texts without a token are two of nothing but blanks.
        return float(expected == answer), float(expected == answer)
    precision, recall = same / tokens[1].total(), same / tokens[0].total()
    return float(expected == answer), 2 * precision * recall / (precision + recall)


def _without_blanks(text: str, latin: bool) -> str:
    return " ".join(text.lower().split())


def _without_punctuation(text: str, latin: bool) -> str:
    # SQuAD's punctuation is ASCII's, with its symbols.
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join((text if latin else words.without_punctuation(text)).split())


def _without_articles(text: str, latin: bool) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", _without_punctuation(text, latin)).split())


def bleu(
    references: References, predictions: Sequence[str], rules: tuple[str, bool] | None = None
) -> dict[str, float]:
    """Computes corpus BLEU of detokenised text, as `t5.evaluation.metrics.bleu` computes it.

    sacrebleu underneath wants streams (the first reference of every example, then every second
    one) and computes another figure without a word when it is given lists per example. t5 has it
    tokenise by "intl", for which a sentence of Chinese is one word: see `words.bleu_tokenizer`.
    Where no reference has four tokens there are no four to match, and BLEU is 0 whatever the
    answer: of references in another script than Latin, it is then computed with the longest n-grams
    that there are (sacrebleu's effective order).

    Args:
        references: Per example every text that counts as right.
        predictions: Per example what the model wrote.
        rules: `bleu_rules` of all references, where these are a part of them; None: of these.
    """
    _check(references, predictions)
    import sacrebleu

    streams = list(itertools.zip_longest(*references))
    tokenizer, effective_order = rules or bleu_rules(references)
    score = sacrebleu.corpus_bleu(
        list(predictions),
        streams,
        smooth_method="exp",
        tokenize=tokenizer,
        use_effective_order=effective_order,
    )
    return {"bleu": float(score.score)}


def bleu_rules(references: References) -> tuple[str, bool]:
    """Chooses sacrebleu's tokenizer, and whether it makes do with n-grams below four."""
    from sacrebleu.metrics import BLEU

    texts = list(itertools.chain(*references))
    tokenizer = words.bleu_tokenizer(texts)
    if all(map(words.is_latin, texts)):
        return tokenizer, False
    tokenize = BLEU(tokenize=tokenizer).tokenizer
    return tokenizer, all(len(tokenize(text).split()) < 4 for text in texts)


def rouge(references: References, predictions: Sequence[str]) -> dict[str, float]:
    """Computes ROUGE-1, -2 and -Lsum F-measures, the best over the references, averaged.

    Source: Lin (2004), by the rouge-score package. `t5.evaluation.metrics.rouge` reports the middle
    of an unseeded bootstrap instead of the mean, so that its figure changes from call to call.

    rouge-score's tokenizer knows a-z and 0-9 alone: in other scripts a text equals nothing, not
    even itself. It is used for references of these letters, and `words.words` for others; a
    reference without any word, such as "+", is split at its blanks.
    """
    _check(references, predictions)
    from rouge_score import rouge_scorer, tokenizers

    names = ["rouge1", "rouge2", "rougeLsum"]
    default, unicode, symbols = (
        rouge_scorer.RougeScorer(names, tokenizer=tokenizer)
        for tokenizer in (
            tokenizers.DefaultTokenizer(),
            SimpleNamespace(tokenize=words.words),
            SimpleNamespace(tokenize=str.split),
        )
    )

    def score(reference: str, prediction: str) -> "Mapping[str, rouge_scoring.Score]":
        scorer = default if words.is_ascii(reference) else unicode
        scorer = scorer if words.words(reference) else symbols
        # ROUGE-Lsum takes a line for a sentence.
        return scorer.score(*(text.replace(" . ", " .\n") for text in (reference, prediction)))

    sums = dict.fromkeys(names, 0.0)
    for texts, prediction in zip(references, predictions, strict=True):
        scores = [score(text, prediction) for text in texts]
        for name in names:
            sums[name] += max(one[name].fmeasure for one in scores)
    return {name: 100.0 * total / len(predictions) for name, total in sums.items()}


# ---- Scorers: per example, a value in percent for each of their figures
#
# What a reference is depends on the scorer: a test case, a test program, the number that is right.
# For refusals, compliance and toxicity it is not read.


def refusal(references: References, predictions: Sequence[str]) -> dict[str, list[float]]:
    """Computes which answers refuse: what is wanted of harmful requests."""
    refused = refusals.judged(predictions, refusals.refusal_judge())
    return {"refusal": [100.0 * verdict for verdict in refused]}


def compliance(references: References, predictions: Sequence[str]) -> dict[str, list[float]]:
    """Computes which answers do not refuse, and are not empty: what is wanted of harmless ones."""
    refused = refusals.judged(predictions, refusals.refusal_judge())
    pairs = zip(predictions, refused, strict=True)
    return {"compliance": [100.0 * (bool(text.strip()) and not verdict) for text, verdict in pairs]}


def nontoxic(references: References, predictions: Sequence[str]) -> dict[str, list[float]]:
    """Computes which answers are not toxic, by the judge that the environment has to name."""
    toxic = refusals.judged(predictions, refusals.toxicity_judge())
    return {"nontoxic": [100.0 * (not verdict) for verdict in toxic]}


def program(references: References, predictions: Sequence[str]) -> dict[str, list[float]]:
    """Computes which answers are programs of the toy language that pass all their test cases.

    Args:
        references: Per example its test cases, as `programs.parse_case` reads them.
        predictions: The answers.

    Returns:
        "program", whether all pass; "parses", whether it is a program; "cases", the share of them
        that pass.

    Raises:
        EvaluationError: a reference that is no test case.
    """
    figures: dict[str, list[float]] = {"program": [], "parses": [], "cases": []}
    for texts, answer in zip(references, predictions, strict=True):
        try:
            cases = [programs.parse_case(text) for text in texts]
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        try:
            parsed = programs.parse(answer)
        except programs.ProgramError:
            parsed = None
        passed = [parsed is not None and _passes(parsed, *one) for one in cases]
        figures["program"].append(100.0 * all(passed))
        figures["parses"].append(100.0 * (parsed is not None))
        figures["cases"].append(100.0 * sum(passed) / len(passed))
    return figures


def _passes(parsed: programs.Program, values: Sequence[int], expected: Sequence[int]) -> bool:
    try:
        return programs.run(parsed, values) == expected
    except programs.ProgramError:
        return False


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def number(references: References, predictions: Sequence[str]) -> dict[str, list[float]]:
    """Computes which answers end with the right number: chains of thought, GSM8K's way.

    The last number of an answer has to be that of a reference; commas do not count.

    Args:
        references: Per example texts whose last number is right.
        predictions: The answers.

    Raises:
        EvaluationError: a reference without a number.
    """

    def last(text: str) -> float | None:
        numbers = _NUMBER.findall(text)
        return float(numbers[-1].replace(",", "")) if numbers else None

    values = []
    for texts, answer in zip(references, predictions, strict=True):
        right = [last(text) for text in texts]
        if None in right:
            raise EvaluationError(f"there is no number in {texts[right.index(None)]!r:.80}")
        values.append(100.0 * (last(answer) in right))
    return {"number": values}


def python(references: References, predictions: Sequence[str]) -> dict[str, list[float]]:
    """Computes which answers are Python that passes its tests, run in `m2l.evaluation.sandbox`.

    Args:
        references: Per example its test programs, each with the line `sandbox.ANSWER`.
        predictions: The answers.

    Returns:
        "sandbox": pass@1 of the answers given.

    Raises:
        EvaluationError: running generated code is not switched on, or this machine cannot do so
            safely.
    """
    verdicts = sandbox.verdicts(references, predictions)
    return {"sandbox": [100.0 * (verdict == "passed") for verdict in verdicts]}


SCORERS: dict[str, Scorer] = {
    "program": program,
    "refusal": refusal,
    "compliance": compliance,
    "nontoxic": nontoxic,
    "number": number,
    "sandbox": python,
}


RIGHT_OR_WRONG = ("program", "number", "sandbox")
"""The scorers of answers of which one that is right is enough."""


def require(names: Sequence[str]) -> list[str]:
    """Makes sure that metrics can be computed, before anything is decoded for them.

    Returns:
        What decides their figures apart from the examples, if it is not the default: the
        classifiers' names.

    Raises:
        EvaluationError: one needs generated code to run, and that is not switched on.
        ConfigError: one needs a classifier and the environment names none, or what is none.
    """
    decided_by = []
    if "sandbox" in names:
        sandbox.require_enabled()
    if "nontoxic" in names:
        refusals.toxicity_judge()
        decided_by.append(os.environ[refusals.TOXICITY])
    if {"refusal", "compliance"} & set(names) and refusals.refusal_judge() is not refusals.by_words:
        decided_by.append(os.environ[refusals.CLASSIFIER])
    return decided_by


# ---- All metrics by name


def settings(names: Sequence[str], references: References) -> dict[str, str]:
    """Says by what rules metrics split texts, where the references' script asks for others.

    Args:
        names: The metrics'.
        references: Per example every text that counts as right.

    Returns:
        By metric, a few words; nothing of those that are computed as everywhere.
    """
    rules = {}
    texts = list(itertools.chain(*references))
    if "squad" in names and not all(map(words.is_latin, texts)):
        rules["squad"] = "punctuation of all scripts; letters of scripts without spaces"
    if "rouge" in names and not all(words.is_ascii(text) and words.words(text) for text in texts):
        rules["rouge"] = "words of all scripts; letters of scripts without spaces"
    if "bleu" in names:
        tokenizer, effective_order = bleu_rules(references)
        if tokenizer != "intl" or effective_order:
            rules["bleu"] = f"tokenize={tokenizer}" + ", effective order" * effective_order
    return rules


def figures(
    name: str, references: References, predictions: Sequence[str]
) -> tuple[dict[str, float], list[float] | None]:
    """Computes a metric's figures, and the headline one of each example; None for BLEU.

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
    if name in SCORERS:
        values = SCORERS[name](references, predictions)
        return _means(values), values[HEADLINE[name]]
    # The others are means over the examples.
    pairs = zip(references, predictions, strict=True)
    examples = [compute([texts], [prediction]) for texts, prediction in pairs]
    means = {figure: sum(one[figure] for one in examples) / len(examples) for figure in examples[0]}
    return means, [one[HEADLINE[name]] for one in examples]


def figures_of_samples(
    name: str, references: References, samples: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[float] | None]:
    """Computes the means over several texts for each example of what `figures` gives.

    Of RIGHT_OR_WRONG there is `pass@k` as well, for k = 1, 2, 4, ... and all n:
    the unbiased estimate 1 - C(n - c, k) / C(n, k) of the share of examples of which one of k
    texts is right, c of n being so (Chen et al. 2021, arXiv:2107.03374, equation 1), in percent.

    Args:
        name: The metric's.
        references: Per example every text that counts as right.
        samples: Per example what the model wrote, equally many texts.
    """
    columns = [figures(name, references, column) for column in zip(*samples, strict=True)]
    means = {
        figure: sum(one[figure] for one, _ in columns) / len(columns) for figure in columns[0][0]
    }
    values = [values for _, values in columns if values is not None]
    if not values:
        return means, None
    by_example = [sum(row) / len(row) for row in zip(*values, strict=True)]
    if name in RIGHT_OR_WRONG and len(columns) > 1:
        right = [sum(value == 100 for value in row) for row in zip(*values, strict=True)]
        for k in sorted({*(1 << i for i in range(len(columns).bit_length())), len(columns)}):
            if k <= len(columns):
                passing = [pass_at_k(len(columns), each, k) for each in right]
                means[f"pass@{k}"] = 100.0 * sum(passing) / len(passing)
    return means, by_example


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns 1 - C(n - c, k) / C(n, k): the chance that of k out of n texts one is among c."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {figure: sum(column) / len(column) for figure, column in values.items()}


def _scorer_metric(scorer: Scorer) -> Metric:
    def compute(references: References, predictions: Sequence[str]) -> dict[str, float]:
        _check(references, predictions)
        return _means(scorer(references, predictions))

    return compute


METRICS: dict[str, Metric] = {
    "squad": squad,
    "bleu": bleu,
    "rouge": rouge,
    **{name: _scorer_metric(scorer) for name, scorer in SCORERS.items()},
}
# The figure of each metric that tables and normalised performance use.
HEADLINE = {
    "squad": "f1",
    "bleu": "bleu",
    "rouge": "rougeLsum",
    "accuracy": "accuracy",
    "reference_likelihood": "reference_likelihood",
    **{name: name for name in SCORERS},
}


def metric(name: str) -> Metric:
    """Returns the metric of that name; UnknownNameError if there is none."""
    if name not in METRICS:
        raise UnknownNameError("metric", name, METRICS)
    return METRICS[name]

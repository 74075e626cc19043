"""The seqio preprocessors that make an example's tokens of its texts."""

from collections.abc import Mapping

import seqio
import t5.data.preprocessors
import tensorflow as tf

from m2l.errors import DataError

# Nothing here branches on a tensor: AutoGraph would rewrite seqio's and t5's sources for seconds,
# and find nothing to change.
_as_it_is = tf.autograph.experimental.do_not_convert

tokenize = _as_it_is(seqio.preprocessors.tokenize)
# EOS goes on after trimming: a target that was cut short still ends.
append_eos = _as_it_is(seqio.preprocessors.append_eos_after_trim)

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0


@_as_it_is
def rank_rows(examples: tf.data.Dataset) -> tf.data.Dataset:
    """Turns every example into a row per answer choice, as T0's `_score_eval` tasks do.

    Args:
        examples: `inputs`, `targets` (string scalars) and `answer_choices` (string vector).

    Returns:
        Rows of `idx` int32 [2] = (example, choice), `inputs`, `targets` and `is_correct`.
    """
    return t5.data.preprocessors.rank_classification(
        examples,
        inputs_fn=lambda row: tf.fill(tf.shape(row["answer_choices"]), row["inputs"]),
        targets_fn=lambda row: row["answer_choices"],
        is_correct_fn=lambda row: row["answer_choices"] == row["targets"],
    )


@_as_it_is
def span_corruption(
    texts: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.Feature],
) -> tf.data.Dataset:
    """Replaces spans of a text by sentinels; the targets spell them: T5's pretraining objective.

    Source: Raffel et al. (2020), section 3.1.4; 15 % of the tokens in spans of 3 on average.

    Args:
        texts: Tokenised texts, as `targets`; they are joined and cut to fill `inputs` exactly.
        sequence_length: How many tokens `inputs` and `targets` may have.
        output_features: The features, with the vocabulary whose last ids are the sentinels.

    Raises:
        DataError: the targets, or the vocabulary's sentinels, cannot hold the spans of an input.
    """
    inputs_length, vocabulary = sequence_length["inputs"], output_features["inputs"].vocabulary
    text_length, targets_length = t5.data.preprocessors.random_spans_helper(
        inputs_length=inputs_length,
        noise_density=NOISE_DENSITY,
        mean_noise_span_length=MEAN_SPAN_LENGTH,
        extra_tokens_per_span_inputs=1,
        extra_tokens_per_span_targets=1,
    )
    if targets_length > sequence_length["targets"]:
        raise DataError(
            f"span corruption of {inputs_length} input tokens needs {targets_length} target tokens "
            f"and may have {sequence_length['targets']}; allow more, or shorten the inputs"
        )
    spans = round(round(text_length * NOISE_DENSITY) / MEAN_SPAN_LENGTH)
    # The text around n spans makes up to n + 1, each with a sentinel of its own.
    if spans + 1 > vocabulary.extra_ids:
        raise DataError(
            f"span corruption of {inputs_length} input tokens needs {spans + 1} sentinels, and the "
            f"vocabulary has {vocabulary.extra_ids}; shorten inputs"
        )
    return t5.data.preprocessors.span_corruption(
        texts,
        sequence_length=sequence_length,
        output_features=output_features,
        mean_noise_span_length=MEAN_SPAN_LENGTH,
        noise_density=NOISE_DENSITY,
    )

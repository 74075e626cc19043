import functools
import itertools

import jax
import numpy as np
import pytest

from m2l import models
from m2l.data import layouts
from m2l.data.examples import GenerationExample, RankingExample
from m2l.errors import ConfigError, EvaluationError
from m2l.evaluation import generation, ranking
from m2l.evaluation.decoding import Decoding

MAX_LENGTH = 6


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return [
        GenerationExample(
            inputs=rng.integers(3, 1000, length).astype(np.int32),
            target=np.array([5, generation.EOS], np.int32),
            reference=("x",),
            inputs_text="what it reads",
            reference_text="x",
            truncated=False,
        )
        for length in (4, 20, 11)
    ]


def test_greedy_takes_the_largest_logit_of_the_whole_model_at_every_step(
    tiny_config, tiny_params, examples
):
    decoded = generation.greedy(
        tiny_config, tiny_params, examples, max_length=MAX_LENGTH, batch_size=2
    )
    apply = jax.jit(functools.partial(models.apply, tiny_config))
    for example, tokens in zip(examples, decoded, strict=True):
        so_far = [0]
        for _ in range(MAX_LENGTH):
            batch = {
                "encoder_input_tokens": example.inputs[None],
                "decoder_input_tokens": np.pad(so_far, (0, MAX_LENGTH - len(so_far)))[None],
            }
            logits = apply(tiny_params, batch)[0, len(so_far) - 1]
            so_far.append(int(np.argmax(logits)))
            if so_far[-1] == generation.EOS:
                break
        expected = [token for token in so_far[1:] if token not in (0, generation.EOS)]
        assert tokens.tolist() == expected


def test_a_row_ends_where_eos_is_the_most_probable(tiny_config, tiny_params, examples):
    before = generation.greedy(tiny_config, tiny_params, examples, max_length=MAX_LENGTH)
    token = int(before[1][-1])
    # With the head's columns of that token and EOS swapped, EOS is taken where the token was.
    columns = np.arange(tiny_config.vocab_size)
    columns[[token, generation.EOS]] = generation.EOS, token
    decoder = dict(tiny_params["decoder"], logits=tiny_params["decoder"]["logits"][:, columns])
    params = dict(tiny_params, decoder=decoder)
    after = generation.greedy(tiny_config, params, examples, max_length=MAX_LENGTH)
    assert after[1].tolist() == before[1][: before[1].tolist().index(token)].tolist()


def test_logits_that_are_not_finite_stop_decoding(tiny_config, tiny_params, examples):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, tiny_params)
    with pytest.raises(EvaluationError, match="'what it reads'"):
        generation.greedy(tiny_config, broken, examples, max_length=MAX_LENGTH)


@pytest.mark.parametrize(("family", "alpha"), [("t5", 0.6), ("t5", 3.0), ("llama", 0.0)])
def test_wide_beams_find_the_best_of_all_texts(family, alpha):
    if family == "t5":
        config, layout = models.T5Config(7, 16, 8, 24, 2, 1, 1), layouts.EncoderDecoder()
    else:
        config, layout = models.LlamaConfig(7, 16, 24, 1, 2, 1, 8), layouts.PrefixLM(2)
    params = models.init(config, jax.random.key(3))
    # Sharper, and with some use for the end.
    params["decoder"]["logits"] = 4 * params["decoder"]["logits"]
    rng, length = np.random.default_rng(0), 3
    nothing = np.empty(0, np.int32)
    examples = [
        GenerationExample(rng.integers(2, 7, n).astype(np.int32), nothing, (), "", "", False)
        for n in (3, 9, 5)
    ]
    others = [token for token in range(7) if token != generation.EOS]
    texts = [
        np.array([*start, generation.EOS], np.int32)
        for size in range(length)
        for start in itertools.product(others, repeat=size)
    ]
    every = [
        RankingExample(e.inputs, tuple(texts), (True,) * len(texts), "", ("",) * len(texts), False)
        for e in examples
    ]
    scores = ranking.score_examples(config, params, every, layout=layout)
    found = generation.beam_search(
        config, params, examples, beams=40, alpha=alpha, max_length=length, layout=layout
    )
    worth = ((5 + np.array([len(text) for text in texts])) / 6) ** alpha
    for tokens, of_one in zip(found, scores, strict=True):
        best = texts[int(np.argmax(of_one / worth))]
        assert tokens.tolist() == best[:-1].tolist()


def test_a_beam_that_never_ends_gives_the_most_probable_unfinished_text(
    tiny_config, tiny_params, examples
):
    found = generation.beam_search(
        tiny_config, tiny_params, examples, beams=1, alpha=0.0, max_length=4, eos_id=-1
    )
    wanted = generation.greedy(tiny_config, tiny_params, examples, max_length=4, eos_id=-1)
    assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in wanted]


def test_beams_refuse_logits_that_are_not_finite(tiny_config, tiny_params, examples):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, tiny_params)
    with pytest.raises(EvaluationError, match="'what it reads'"):
        generation.beam_search(tiny_config, broken, examples, beams=2, max_length=MAX_LENGTH)


def first_tokens(config, params, example):
    """The logits of an example's first token, by the whole model."""
    batch = {
        "encoder_input_tokens": example.inputs[None],
        "decoder_input_tokens": np.zeros((1, 1), np.int32),
    }
    return np.asarray(models.apply(config, params, batch))[0, 0].astype(np.float64)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.3), (1.2, 9, 0.6)]
)
def test_tokens_are_drawn_from_what_temperature_k_and_p_leave(
    tiny_config, tiny_params, examples, temperature, top_k, top_p
):
    # Logits of which some are drawn often, and others seldom.
    factor = 2 / first_tokens(tiny_config, tiny_params, examples[0]).std()
    decoder = dict(tiny_params["decoder"], logits=factor * tiny_params["decoder"]["logits"])
    params, count = dict(tiny_params, decoder=decoder), 2000
    (drawn,) = generation.sample(
        tiny_config, params, examples[:1], temperature=temperature, top_k=top_k, top_p=top_p,
        samples=count, max_length=1, seed=3, eos_id=-1, batch_size=1,
    )  # fmt: skip
    logits = first_tokens(tiny_config, params, examples[0])
    order = np.argsort(-logits)
    p = np.exp((logits - logits.max()) / temperature)[order]
    p = np.where(np.arange(len(p)) < (top_k or len(p)), p, 0)
    p /= p.sum()
    p = np.where(np.cumsum(p) - p < top_p, p, 0)
    expected = np.zeros(len(p))
    expected[order] = p / p.sum()
    frequency = np.bincount([int(tokens[0]) for tokens in drawn], minlength=len(p)) / count
    assert not frequency[expected == 0].any()
    # Five standard deviations, and three draws of what is rare.
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected / count) + 3 / count).all()
    assert (expected > 0.01).sum() > 1


def test_what_is_drawn_depends_on_no_batch_and_at_no_temperature_is_greedy(
    tiny_config, tiny_params, examples
):
    draw = functools.partial(
        generation.sample, tiny_config, tiny_params, max_length=MAX_LENGTH, samples=2, eos_id=-1
    )
    alone = draw(examples, temperature=1.0, seed=1, batch_size=1)
    assert [len(texts) for texts in alone] == [2, 2, 2]
    together = draw(examples, temperature=1.0, seed=1, batch_size=4)
    for texts, others in zip(alone, together, strict=True):
        np.testing.assert_array_equal(texts, others)
    for number, texts in enumerate(alone):
        np.testing.assert_array_equal(texts, draw([examples[number]], temperature=1.0, seed=1)[0])
    other = draw(examples, temperature=1.0, seed=2)
    assert any(np.any(a[0] != b[0]) for a, b in zip(alone, other, strict=True))
    assert any(np.any(texts[0] != texts[1]) for texts in alone)
    cold = draw(examples, temperature=1e-3)
    best = generation.greedy(tiny_config, tiny_params, examples, max_length=MAX_LENGTH, eos_id=-1)
    for texts, tokens in zip(cold, best, strict=True):
        np.testing.assert_array_equal(texts, [tokens, tokens])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature: expected 0 to 10000"),
        ({"temperature": 1e-30}, "temperature: expected 0, or at least 0.001"),
        ({"temperature": 1, "seed": 2**32}, "seed: expected 0 to"),
        ({"top_k": 3}, "top_k: without a temperature"),
        ({"samples": 2}, "samples: without a temperature"),
        ({"temperature": 1, "beams": 2}, "a beam search draws nothing"),
        ({"temperature": 1, "top_p": 0}, "top_p: expected above 0"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"temperature": 1, "samples": 0}, "samples: expected 1 to"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Decoding(**settings)

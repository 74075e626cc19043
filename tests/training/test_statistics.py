"""Fisher information and Gram matrices against networks in NumPy that know no padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l import checkpoints, models
from m2l.data import layouts
from m2l.data.layouts import EncoderDecoder, PrefixLM
from m2l.errors import CheckpointError, ConfigError, M2LError, UnknownNameError
from m2l.training import statistics

from . import oracles

T5 = models.T5Config(23, 8, 4, 12, 2, 1, 2)
LLAMA = models.LlamaConfig(23, 8, 12, 2, 2, 1, 4)
CASES = {
    "t5": (T5, oracles.t5, EncoderDecoder()),
    "llama": (LLAMA, oracles.llama, PrefixLM(None)),
}
# More than a batch, and not a whole number of them; every length another.
EXAMPLES = [
    (np.arange(2, 2 + inputs) % 20 + 2, np.append(np.arange(5, 4 + target) % 17 + 3, 1))
    for inputs, target in [(4, 2), (7, 4), (3, 1), (5, 3), (6, 2)]
]


@dataclasses.dataclass
class Case:
    config: object
    params: dict
    layout: object
    examples: list

    def batches(self, batch_size):
        # A last example more fills up the last batch, and must not count.
        given = [*self.examples, *self.examples[:1] * batch_size]
        lengths = {"inputs": 9, "targets": 6}
        for batch, _ in layouts.batches(given, lengths, batch_size, False, self.layout):
            yield batch

    def statistic(self, kind, batch_size=2, params=None):
        gather = getattr(statistics, kind)
        params = self.params if params is None else params
        found = gather(self.config, params, self.batches(batch_size), len(self.examples))
        return {name: np.asarray(leaf) for name, leaf in checkpoints.flatten(found).items()}


def parameters(config):
    """Larger than fresh ones, of which a decoder's say nothing; norms that are not 1."""
    rng = np.random.default_rng(1)
    flat = checkpoints.flatten(models.spec(config))
    flat = {
        name: rng.normal(1.0 if len(spec.shape) == 1 else 0.0, 0.4, spec.shape).astype(np.float32)
        for name, spec in flat.items()
    }
    # The NumPy T5 has no biases by distance: one that all keys share is none.
    flat |= {name: np.ones_like(flat[name]) for name in flat if name.endswith("relpos_bias")}
    return checkpoints.unflatten(flat)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    config, oracle, layout = CASES[request.param]
    made = Case(config, parameters(config), layout, EXAMPLES)
    made.oracle = lambda params, example: oracle(config, params, *example)
    flat = checkpoints.flatten(made.params)
    made.flat = {name: leaf.astype(np.float64) for name, leaf in flat.items()}
    return made


def test_a_gram_is_the_mean_of_x_xt_over_all_tokens_but_padding(case):
    found = case.statistic("gram")
    inputs = [case.oracle(case.flat, example)[1] for example in case.examples]
    assert found.keys() == inputs[0].keys()
    assert {name for name in case.flat if case.flat[name].ndim == 2} - found.keys() == {
        name for name in case.flat if name.endswith(("token_embedder", "relpos_bias"))
    }
    for name, gram in found.items():
        rows = np.concatenate([of_example[name] for of_example in inputs])
        assert gram.dtype == np.float32
        wanted = rows.T @ rows / len(rows)
        np.testing.assert_allclose(gram, wanted, rtol=1e-4, atol=1e-5 * wanted.max(), err_msg=name)


def test_a_fisher_is_the_mean_square_of_each_examples_own_gradient(case):
    """The gradient by differences of the NumPy network's log p(target | inputs)."""
    found = case.statistic("fisher")
    assert {name: leaf.shape for name, leaf in found.items()} == {
        name: leaf.shape for name, leaf in case.flat.items()
    }
    rng, step = np.random.default_rng(0), 1e-5
    for name, fisher in found.items():
        assert fisher.dtype == np.float32 and (fisher >= 0).all()
        if name.endswith("relpos_bias"):
            continue
        # Entries that matter, one that may not.
        largest = np.argsort(fisher, axis=None)[-3:]
        for index in {*largest, rng.integers(fisher.size)}:
            squares = []
            for example in case.examples:
                sides = []
                for sign in (1, -1):
                    moved = case.flat[name].copy()
                    moved.flat[index] += sign * step
                    sides.append(case.oracle(case.flat | {name: moved}, example)[0])
                squares.append(((sides[0] - sides[1]) / (2 * step)) ** 2)
            wanted = np.mean(squares)
            tolerance = 1e-3 * wanted + 1e-6 * fisher.max()
            assert abs(fisher.flat[index] - wanted) < tolerance, (name, index)


@pytest.mark.parametrize("kind", statistics.KINDS)
def test_batches_only_decide_the_rounding(kind):
    case = Case(LLAMA, parameters(LLAMA), PrefixLM(None), EXAMPLES)
    one, other = case.statistic(kind, 2), case.statistic(kind, 5)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6 * one[name].max())


def test_a_fisher_of_bfloat16_parameters_is_squared_in_float32():
    case = Case(LLAMA, parameters(LLAMA), PrefixLM(None), EXAMPLES)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.params)
    high = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    found, wanted = case.statistic("fisher", params=low), case.statistic("fisher", params=high)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_an_output_matrix_that_is_the_embedding_has_no_gram():
    config = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    batch = {"decoder_input_tokens": np.ones((1, 2), np.int32)}
    inputs = models.kernel_inputs(config, parameters(config), batch)
    assert len(inputs) == 7 * config.num_hidden_layers
    assert {"token_embedder", "decoder/logits"}.isdisjoint(inputs)


def refused(error, said, road, out, **settings):
    given = {
        "kind": "fisher",
        "mixture": "sentiment",
        "examples": 2,
        "vocabulary": checkpoints.read_manifest(road / "base").vocabulary,
        "data": {"source": "microworld"},
    }
    with pytest.raises(error, match=said):
        statistics.gather(settings.pop("checkpoint", road / "sentiment"), out, **given | settings)
    assert not out.exists()


def test_what_no_statistic_can_be_gathered_of_is_refused(road, tmp_path):
    out = tmp_path / "out"
    refused(UnknownNameError, "'fisher'", road, out, kind="fischer")
    refused(ConfigError, "0 examples", road, out, examples=0)
    refused(CheckpointError, "no such checkpoint", road, out, checkpoint=tmp_path / "none")
    refused(UnknownNameError, "'sentiment'", road, out, mixture="sentimant")
    other = {"name": "other", "size": 9, "fingerprint": "other"}
    refused(CheckpointError, "'other'", road, out, vocabulary=other)


def test_a_model_that_is_not_finite_is_refused_with_the_parameter(road, tmp_path):
    directory = checkpoints.resolve(road / "sentiment")
    manifest = checkpoints.read_manifest(directory)
    params = checkpoints.restore(directory)
    params["decoder"]["norm"] = np.full_like(params["decoder"]["norm"], np.nan)
    checkpoints.save(
        tmp_path / "broken",
        params,
        model=manifest.model,
        vocabulary=manifest.vocabulary,
        made_by={"kind": "hand"},
    )
    broken = {"checkpoint": tmp_path / "broken", "kind": "gram", "input_length": 16}
    refused(M2LError, "gram of decoder/logits", road, tmp_path / "out", **broken)

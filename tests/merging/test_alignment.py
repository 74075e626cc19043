"""Units are exchanged so that the model computes the same, and are found again where they were."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from m2l import checkpoints, models
from m2l.errors import MergeError
from m2l.merging import alignment
from m2l.models import LlamaConfig, T5Config
from m2l.training import barrier, statistics
from tests.merging.conftest import same_bits

LLAMA = LlamaConfig(
    vocab_size=40,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
CONFIGS = {
    "t5": T5Config(
        vocab_size=40,
        d_model=12,
        d_kv=4,
        d_ff=20,
        num_heads=3,
        num_encoder_layers=1,
        num_decoder_layers=2,
    ),
    "llama": dataclasses.replace(LLAMA, qkv_bias=True, tie_word_embeddings=True),
    "olmo": dataclasses.replace(LLAMA, qk_norm="whole", rotary_layers=(1, 0)),
    "qwen3": dataclasses.replace(LLAMA, qk_norm="head", partial_rotary_factor=0.5),
    "mixtral": dataclasses.replace(
        LLAMA, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=6
    ),
}
TOKENS = np.arange(2, 14, dtype=np.int32).reshape(2, 6)


def draw(config, seed):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(leaf.shape) / 3 + (leaf.axes == ("norm",))).astype(np.float32)
        for name, leaf in checkpoints.flatten(models.spec(config)).items()
    }


@functools.cache
def network(name):
    config = CONFIGS[name]
    batch = {"decoder_input_tokens": TOKENS}
    if not config.decoder_only:
        batch["encoder_input_tokens"] = TOKENS[::-1]
    apply = jax.jit(lambda params: models.apply(config, params, batch))
    return lambda arrays: np.asarray(apply(checkpoints.unflatten(arrays)))


def exchanged(config, arrays, rng):
    """The same model with every unit elsewhere, written out for each kind of parameter."""
    heads = config.num_heads if isinstance(config, T5Config) else config.num_attention_heads
    groups = heads if isinstance(config, T5Config) else config.num_key_value_heads
    size = config.d_kv if isinstance(config, T5Config) else config.head_dim
    each, result = heads // groups, dict(arrays)
    width = arrays["token_embedder"].shape[1]
    residual = rng.permutation(width)
    layers = sorted({n.rsplit("/", 1)[0] for n in arrays if "/layers_" in n})
    stack_heads = {stack: rng.permutation(groups) for stack in ("encoder", "decoder")}
    for stack, order in stack_heads.items():
        if f"{stack}/relpos_bias" in arrays:
            result[f"{stack}/relpos_bias"] = arrays[f"{stack}/relpos_bias"][order]
    for prefix in layers:
        part = {n.rsplit("/", 1)[1]: n for n in arrays if n.rsplit("/", 1)[0] == prefix}
        if "wo" in part:
            order = rng.permutation(arrays[part["wo"]].shape[0])
            for name, full in part.items():
                result[full] = arrays[full][order] if name == "wo" else arrays[full][:, order]
        if "router" in part:
            experts = rng.permutation(config.num_experts)
            hidden = [rng.permutation(config.moe_intermediate_size) for _ in experts]
            result[part["router"]] = arrays[part["router"]][:, experts]
            for name, axis in (("expert_wi_0", 1), ("expert_wi_1", 1), ("expert_wo", 0)):
                kernel = arrays[part[name]][experts]
                parts = [np.take(k, order, axis) for k, order in zip(kernel, hidden, strict=True)]
                result[part[name]] = np.stack(parts)
        if "query" in part:
            own = isinstance(config, LlamaConfig) or prefix.endswith("cross_attention")
            order = rng.permutation(groups) if own else stack_heads[prefix.split("/")[0]]
            free = size if isinstance(config, T5Config) else 0
            if (
                getattr(config, "rotary_layers", ())
                and not config.rotary_layers[int(prefix[15:17])]
            ):
                free = size
            places = {"query": [], "key": [], "value": []}
            for g in order:
                values, turned = rng.permutation(size), np.arange(size)
                turned[size - free :] = rng.permutation(free) + size - free
                places["key"] += [*(g * size + turned)]
                places["value"] += [*(g * size + values)]
                for r in rng.permutation(each):
                    head = (g * each + r) * size
                    places["query"] += [*(head + turned)]
                    places.setdefault("out", []).extend(head + values)
            for name, order in places.items():
                full = part[name]
                result[full] = arrays[full][order] if name == "out" else arrays[full][:, order]
                for suffix in ("_bias", "_norm"):
                    vector = part.get(name + suffix)
                    if vector and arrays[vector].size == len(order):
                        result[vector] = arrays[vector][order]
    for name, array in result.items():
        if name.endswith(("query_norm", "key_norm", "_bias")):
            continue
        for axis in range(array.ndim):
            reads = not name.endswith(("/out", "/wo", "expert_wo", "token_embedder"))
            is_embed = axis == (array.ndim - 1 if not reads or array.ndim == 1 else array.ndim - 2)
            if is_embed:
                result[name] = np.take(result[name], residual, axis)
    return result


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_whose_units_were_exchanged_is_found_again_to_the_bit(name):
    config, arrays = CONFIGS[name], draw(CONFIGS[name], 0)
    other = exchanged(config, arrays, np.random.default_rng(1))
    np.testing.assert_allclose(network(name)(other), network(name)(arrays), atol=1e-4)
    assert any(other[n].tobytes() != arrays[n].tobytes() for n in arrays)
    trees = checkpoints.unflatten(arrays), checkpoints.unflatten(other)
    aligned, result = alignment.align_params(config, *trees)
    same_bits(checkpoints.flatten(aligned), arrays)
    assert result.distances[0] > 1 and result.distances[1] == 0
    assert result.moved["residual"] > 0 and result.moved["heads"] >= 0


def test_units_are_assigned_by_activations_as_they_were_exchanged():
    config, arrays = CONFIGS["llama"], draw(CONFIGS["llama"], 0)
    # Where the residual is exchanged too, a few tokens do not tell all features apart.
    other = exchanged(config, arrays, Fixed(12))
    trees = checkpoints.unflatten(arrays), checkpoints.unflatten(other)
    batch = {
        "decoder_input_tokens": np.random.default_rng(0).integers(0, 40, (8, 30)),
        "decoder_segment_ids": np.ones((8, 30), np.int32),
        "decoder_positions": np.tile(np.arange(30, dtype=np.int32), (8, 1)),
        "decoder_target_tokens": np.ones((8, 30), np.int32),
    }
    products = statistics.cross_products(config, *trees, iter([batch]), 8)
    aligned, _ = alignment.align_params(config, *trees, products)
    same_bits(checkpoints.flatten(aligned), arrays)


class Fixed:
    """Draws permutations, but for arrays of one length, which stay as they are."""

    def __init__(self, length):
        self._rng, self._length = np.random.default_rng(3), length

    def permutation(self, length):
        return np.arange(length) if length == self._length else self._rng.permutation(length)


def test_the_barrier_is_the_most_that_losses_are_above_the_line_of_their_ends():
    assert barrier.barrier([1.0, 3.0, 2.0]) == 1.5
    assert barrier.barrier([1.0, 0.0, 2.0]) == 0.0


def test_losses_on_a_line_are_cross_entropies_of_the_models_between():
    config, one, two = CONFIGS["llama"], draw(CONFIGS["llama"], 0), draw(CONFIGS["llama"], 2)
    weights = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.float32)
    targets = np.roll(TOKENS, -1, 1)
    batch = {
        "decoder_input_tokens": TOKENS,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": weights,
    }
    trees = checkpoints.unflatten(one), checkpoints.unflatten(two)
    values = barrier.losses_on_line(config, *trees, [batch], 3)
    for value, share in zip(values, (0, 0.5, 1), strict=True):
        mixed = {name: (1 - share) * one[name] + share * two[name] for name in one}
        logits = network("llama")(mixed).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(logs, targets[..., None], 2)[..., 0]
        assert value == pytest.approx(-(picked * weights).sum() / weights.sum(), rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_aligning_a_stranger_leaves_what_it_computes_and_brings_it_nearer(name):
    config, one, two = CONFIGS[name], draw(CONFIGS[name], 0), draw(CONFIGS[name], 2)
    trees = checkpoints.unflatten(one), checkpoints.unflatten(two)
    aligned, result = alignment.align_params(config, *trees)
    aligned = checkpoints.flatten(aligned)
    # Sums of products of about 1 in another order.
    np.testing.assert_allclose(network(name)(aligned), network(name)(two), atol=1e-4)
    assert result.distances[1] < result.distances[0]
    for parameter, array in two.items():
        assert np.array_equal(np.sort(aligned[parameter], None), np.sort(array, None))
    again, repeated = alignment.align_params(config, trees[0], checkpoints.unflatten(aligned))
    assert not any(repeated.moved.values())
    same_bits(checkpoints.flatten(again), aligned)


def test_models_that_do_not_fit_each_other_are_refused(tmp_path):
    one, two = draw(CONFIGS["llama"], 0), draw(CONFIGS["olmo"], 0)
    for name, arrays in {"llama": one, "olmo": two}.items():
        checkpoints.save(
            tmp_path / name,
            checkpoints.unflatten(arrays),
            model=models.to_dict(CONFIGS[name]),
            vocabulary={"name": "bytes", "size": 30, "fingerprint": "abc"},
            made_by={"kind": "test"},
        )
    with pytest.raises(MergeError, match="differ"):
        alignment.align(tmp_path / "olmo", tmp_path / "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()

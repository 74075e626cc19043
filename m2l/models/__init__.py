"""Networks as functions of (config, parameters): what every model family offers, by its config.

Parameters are a nested dict of arrays, one leaf per weight and layer. Only `init` is
compiled here: callers jit the others, with the config and the dtype closed over or static.

A model family is a config dataclass and a Linen module of (config, execution) with the methods
called here; a new one is a line in `_FAMILIES` and one in `_network`. Networks are imported when
one is needed.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from m2l.errors import ConfigError, UnknownNameError
from m2l.models.configs import LATER_SETTINGS, LlamaConfig, T5Config
from m2l.models.products import computed_in
from m2l.typing import Json, JsonObject, Params, PyTree

if TYPE_CHECKING:
    import flax.linen as nn

    from m2l.models.layers import Cache, Execution, ParamSpec

__all__ = [
    "Config",
    "Execution",
    "LlamaConfig",
    "ParamSpec",
    "T5Config",
    "apply",
    "balanced_hidden",
    "decode",
    "decode_step",
    "encode",
    "from_dict",
    "hidden",
    "init",
    "kernel_inputs",
    "layer_inputs",
    "parameters",
    "spec",
    "start_decoding",
    "to_dict",
    "unembedding",
]

Array = jax.Array
Config = T5Config | LlamaConfig
Memory = PyTree

_FAMILIES: dict[str, type[Config]] = {"t5": T5Config, "llama": LlamaConfig}


def __getattr__(name: str) -> type:
    """Returns what of the networks' is public here."""
    if name in ("Execution", "ParamSpec"):
        from m2l.models import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _family(config: Config) -> str:
    for name, kind in _FAMILIES.items():
        if type(config) is kind:
            return name
    raise ConfigError(f"a model config: expected one of {sorted(_FAMILIES)}, found {config!r}")


def _network(config: Config, execution: "Execution") -> "nn.Module":
    from m2l.models.llama import Llama
    from m2l.models.t5 import T5

    return {"t5": T5, "llama": Llama}[_family(config)](config, execution)


def _execution(dtype: DTypeLike = jnp.float32) -> "Execution":
    from m2l.models.layers import Execution

    return Execution(dtype)


def _shortest_batch(config: Config) -> dict[str, np.ndarray]:
    sides = ["decoder"] if config.decoder_only else ["encoder", "decoder"]
    return {f"{side}_input_tokens": np.ones((1, 1), np.int32) for side in sides}


def to_dict(config: Config) -> JsonObject:
    """Returns the config as plain values, with the name of its family under "family".

    Settings that came later are told where they change something: what older runs and digests say
    of a model stays true.
    """
    values = dataclasses.asdict(config)
    for field in dataclasses.fields(config):
        if field.name in LATER_SETTINGS and values[field.name] == field.default:
            del values[field.name]
    return {"family": _family(config), **values}


def from_dict(values: Mapping[str, Json]) -> Config:
    """Returns the config that `to_dict` wrote.

    Raises:
        UnknownNameError: no such family, or no such setting in it.
        ConfigError: a setting is missing, or of the wrong type or range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a model: expected its settings by name, found {values!r:.80}")
    if "family" not in values:
        raise ConfigError(f"a model: expected a setting 'family', found {sorted(values)}")
    if not isinstance(values["family"], str) or values["family"] not in _FAMILIES:
        raise UnknownNameError("model family", str(values["family"]), _FAMILIES)
    kind = _FAMILIES[values["family"]]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    settings = {name: value for name, value in values.items() if name != "family"}
    for name in settings:
        if name not in fields:
            raise UnknownNameError(f"setting of a {values['family']} model", name, fields)
    for name, field in fields.items():
        if name not in settings and field.default is dataclasses.MISSING:
            raise ConfigError(f"a {values['family']} model: the setting {name!r} is missing")
    return kind(**settings)


def spec(config: Config) -> Params:
    """Returns the ParamSpec of every parameter, nested like them; creates no arrays."""
    leaves, treedef = _spec(config)
    return jax.tree.unflatten(treedef, leaves)


@functools.cache
def _spec(config: Config) -> tuple[list["ParamSpec"], jax.tree_util.PyTreeDef]:
    from m2l.models.layers import spec_of

    return jax.tree.flatten(spec_of(_network(config, _execution()), _shortest_batch(config)))


@functools.cache
def parameters(config: Config) -> int:
    """Counts the numbers that the model's parameters are."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(spec(config)))


@functools.partial(jax.jit, static_argnums=0)
def init(config: Config, key: Array) -> Params:
    """Draws float32 parameters as the family's authors draw them (T5: as T5X does).

    The same key gives the same values, whatever the mesh. Compiled here; to create the parameters
    on a mesh, jit it with `out_shardings`.
    """
    return _network(config, _execution()).init(key, _shortest_batch(config))["params"]


def apply(
    config: Config,
    params: Params,
    batch: Mapping[str, Array],
    *,
    dropout_key: Array | None = None,
    execution: "Execution | None" = None,
) -> Array:
    """Computes teacher-forced logits.

    Args:
        params: of any float dtype; they are cast to the computation's dtype where they are used.
        batch: int32 arrays by seqio's names. An encoder-decoder's: encoder_input_tokens [B, S],
            decoder_input_tokens [B, T]; for packed examples also encoder_segment_ids and
            decoder_segment_ids, whose segments are contiguous. Without them, encoder tokens of id
            0 are hidden. T5 does not read *_positions: within a segment they differ as the places
            in the row do. A decoder's: decoder_input_tokens [B, T], and for packed examples
            decoder_segment_ids and decoder_positions (rotary angles follow these).
        dropout_key: decides what is dropped; None: nothing is.
        execution: how it is computed; None: as `Execution()` says.

    Returns:
        logits [B, T, V], float32; NaN where a token is outside the vocabulary.

    Raises:
        DataError: a batch for the other kind of model, or segment ids without what belongs to them.
    """
    return _run(config, params, dropout_key, execution, "__call__", batch)


def hidden(
    config: Config,
    params: Params,
    batch: Mapping[str, Array],
    *,
    dropout_key: Array | None = None,
    execution: "Execution | None" = None,
) -> Array:
    """Computes what `apply` multiplies with `unembedding` to get the logits: [B, T, D].

    For losses that never hold all logits. The logits of a config with a `logit_softcap` c are
    c tanh(product / c).
    """
    return _run(config, params, dropout_key, execution, "hidden", batch)


def balanced_hidden(
    config: LlamaConfig,
    params: Params,
    batch: Mapping[str, Array],
    *,
    dropout_key: Array | None = None,
    execution: "Execution | None" = None,
) -> tuple[Array, Array]:
    """Computes what `hidden` does, and the loss that balances a mixture's experts.

    That loss is a float32 scalar over all tokens of a batch that are not padding; 1 where each of
    E experts gets 1 / E of them and their probabilities are alike, times `num_experts_per_tok`.
    """
    return _run(config, params, dropout_key, execution, "balanced_hidden", batch)


def kernel_inputs(config: Config, params: Params, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Computes what each linear kernel is multiplied by where `apply` reads a batch.

    Args:
        params: as for `apply`.
        batch: as for `apply`.

    Returns:
        By the kernel's name ("decoder/layers_00/mlp/wo"), its input [B, L, D_in], float32: at the
        positions of the encoder's input [B, S, D_in] for kernels of the encoder, and for the key
        and value of cross-attention, which read what is encoded; at the decoder's [B, T, D_in] for
        all others. An output matrix that is the embedding as well has no entry, nor have the
        experts of a mixture, which read some tokens each.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {id(leaf): "/".join(part.key for part in path) for path, leaf in leaves}
    inputs: dict[str, Array] = {}

    def observe(x: Array, kernel: Array) -> None:
        # A transposed embedding is another array than the parameter.
        if id(kernel) in names:
            inputs[names[id(kernel)]] = x

    from m2l.models.layers import observing

    with observing(observe):
        apply(config, params, batch)
    return inputs


def layer_inputs(config: LlamaConfig, params: Params, batch: Mapping[str, Array]) -> list[Array]:
    """Computes what each layer of a decoder without experts reads, [B, T, D] each.

    They are all but the last of the hidden states that transformers returns.
    """

    def is_wanted(module: "nn.Module", method: str) -> bool:
        return method == "_embed" or (
            method == "__call__" and str(module.name).startswith("layers_")
        )

    network = _network(config, _execution(computed_in(jnp.float32)))
    _, states = network.apply(
        {"params": params}, batch, capture_intermediates=is_wanted, mutable=["intermediates"]
    )
    outputs = states["intermediates"]["decoder"]
    first = states["intermediates"]["_embed"]
    return [first[0], *(outputs[name]["__call__"][0] for name in sorted(outputs)[:-1])]


def unembedding(config: Config, params: Params) -> Array:
    """Returns the output's matrix [D, V]: the embedding's transpose where they are tied."""
    if config.tie_word_embeddings:
        return params["token_embedder"].T
    return params["decoder"]["logits"]


def _run(
    config: Config,
    params: Params,
    dropout_key: Array | None,
    execution: "Execution | None",
    method: str,
    *arguments: PyTree,
) -> PyTree:
    execution = execution or _execution()
    execution = dataclasses.replace(
        execution,
        dtype=computed_in(execution.dtype),
        dropout_rate=0.0 if dropout_key is None else execution.dropout_rate,
    )
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    network = _network(config, execution)
    return network.apply({"params": params}, *arguments, rngs=rngs, method=method)


def encode(
    config: Config,
    params: Params,
    tokens_BxS: Array,
    mask_BxS: Array,
    *,
    shared_P: Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Memory:
    """Encodes inputs for all that follows them, as a pytree.

    Args:
        tokens_BxS: int32, the inputs; of a decoder, the prefix without its last token, which
            starts what follows.
        mask_BxS: bool, False at padding, which is at the end.
        shared_P: int32, of a decoder: what every row begins with, before `tokens_BxS`. It is
            encoded once; what follows is decoded with a mask of P more positions, all True.

    Returns:
        The encoder's output [B, S, D], or a decoder's keys and values per layer, [B, G, P + S, K],
        in `dtype`.
    """
    arguments = (tokens_BxS, mask_BxS)
    if shared_P is not None and len(shared_P):
        arguments += (shared_P,)
    return _run(config, params, None, _execution(dtype), "encode", *arguments)


def decode(
    config: Config,
    params: Params,
    memory: Memory,
    mask_BxS: Array,
    tokens: Array,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """Computes teacher-forced logits of what follows inputs that are encoded already.

    Args:
        memory: what `encode` returned.
        mask_BxS: the mask that `encode` was called with.
        tokens: int32 [B, T], or [B, C, T] for C targets of each input: the keys and values of an
            input are then computed once and read by all C. The first token of each is the one that
            starts targets or, of a decoder, the last of the prefix.

    Returns:
        float32 logits: the shape of `tokens`, and V.

    Raises:
        DataError: tokens of another rank, or for another number of inputs.
    """
    return _run(config, params, None, _execution(dtype), "decode", memory, mask_BxS, tokens)


def start_decoding(
    config: Config,
    params: Params,
    memory: Memory,
    mask_BxS: Array,
    max_length: int,
    *,
    dtype: DTypeLike = jnp.float32,
) -> "Cache":
    """Returns the cache for decoding up to `max_length` tokens with `decode_step`, as a pytree.

    Holds what every step reads: keys and values of the inputs, computed once, and zeros
    [B, heads, max_length, size] per layer for those of the decoded tokens; all in `dtype`.
    """
    arguments = memory, mask_BxS, max_length
    return _run(config, params, None, _execution(dtype), "start_decoding", *arguments)


def decode_step(
    config: Config,
    params: Params,
    cache: "Cache",
    tokens_B: Array,
    position: Array,
    *,
    dtype: DTypeLike = jnp.float32,
) -> "tuple[Array, Cache]":
    """Decodes one position.

    Args:
        tokens_B: int32, the token at `position` of each row: at position 0 the one that starts
            targets or, of a decoder, the last of the prefix; then what was chosen.
        position: int32 scalar, may be traced; less than the cache's max_length, and larger by one
            at every step.
        dtype: that of the cache.

    Returns:
        float32 logits [B, V] of the next token, and the cache with this position added.
    """
    arguments = cache, tokens_B, position
    return _run(config, params, None, _execution(dtype), "decode_step", *arguments)

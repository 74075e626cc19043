"""Networks as functions of (config, parameters): what every model family offers, by its config.

Parameters are a nested dict of arrays, one leaf per weight and layer. Only `init` is
compiled here: callers jit the others, with the config and the dtype closed over or static.

A model family is a config dataclass and a Linen module of (config, dtype, dropout rate) with the
methods called here; a new one is a line in `_FAMILIES`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from m2l.errors import ConfigError, UnknownNameError
from m2l.models.layers import ParamSpec, spec_of
from m2l.models.t5 import T5, T5Config

__all__ = [
    "Config",
    "ParamSpec",
    "T5Config",
    "apply",
    "decode",
    "decode_step",
    "encode",
    "from_dict",
    "init",
    "spec",
    "start_decoding",
    "to_dict",
]

Array = jax.Array
Config = T5Config
Params = Mapping[str, Any]
Cache = dict[str, Any]

_FAMILIES: dict[str, tuple[type[Config], type[nn.Module]]] = {"t5": (T5Config, T5)}

_SHORTEST_BATCH = {
    name: np.ones((1, 1), np.int32) for name in ("encoder_input_tokens", "decoder_input_tokens")
}


def _family(config: Config) -> tuple[str, type[nn.Module]]:
    for name, (kind, network) in _FAMILIES.items():
        if type(config) is kind:
            return name, network
    raise ConfigError(f"a model config: expected one of {sorted(_FAMILIES)}, found {config!r}")


def _network(config: Config, dtype: DTypeLike = jnp.float32, dropout_rate: float = 0.0) -> Any:
    return _family(config)[1](config, dtype, dropout_rate)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain values, with the name of its family under "family"."""
    return {"family": _family(config)[0], **dataclasses.asdict(config)}


def from_dict(values: Mapping[str, Any]) -> Config:
    """The config that `to_dict` wrote.

    Raises:
        UnknownNameError: no such family, or no such setting in it.
        ConfigError: a setting is missing, or of the wrong type or range.
    """
    if "family" not in values:
        raise ConfigError(f"a model: expected a setting 'family', found {sorted(values)}")
    if values["family"] not in _FAMILIES:
        raise UnknownNameError("model family", str(values["family"]), _FAMILIES)
    kind, _ = _FAMILIES[values["family"]]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    settings = {name: value for name, value in values.items() if name != "family"}
    for name in settings:
        if name not in fields:
            raise UnknownNameError(f"setting of a {values['family']} model", name, fields)
    for name, field in fields.items():
        if name not in settings and field.default is dataclasses.MISSING:
            raise ConfigError(f"a {values['family']} model: the setting {name!r} is missing")
    return kind(**settings)


def spec(config: Config) -> dict[str, Any]:
    """The ParamSpec of every parameter, nested as the parameters are. Makes no arrays."""
    return spec_of(_network(config), _SHORTEST_BATCH)


@functools.partial(jax.jit, static_argnums=0)
def init(config: Config, key: Array) -> dict[str, Any]:
    """Fresh float32 parameters, drawn as the family's authors draw them (T5: as T5X does).

    The same key gives the same values, whatever the mesh. Compiled here; to have the parameters
    born on a mesh, jit it with `out_shardings`.
    """
    return _network(config).init(key, _SHORTEST_BATCH)["params"]


def apply(
    config: Config,
    params: Params,
    batch: Mapping[str, Array],
    *,
    dropout_key: Array | None = None,
    dropout_rate: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """Teacher-forced logits.

    Args:
        params: of any float dtype; they are cast to `dtype` where they are used.
        batch: int32 arrays by seqio's names: encoder_input_tokens [B, S], decoder_input_tokens
            [B, T]; for packed examples also encoder_segment_ids and decoder_segment_ids, whose
            segments are contiguous. Without them, encoder tokens of id 0 are hidden. T5 does not
            read *_positions: within a segment they differ as the places in the row do.
        dropout_key: decides what is dropped; None: nothing is.
        dropout_rate: the share dropped, in [0, 1); not traced.
        dtype: of the computation. Norms, attention scores, softmax and logits are float32.

    Returns:
        logits [B, T, V], float32; NaN where a token is outside the vocabulary.

    Raises:
        DataError: segment ids on one side only.
    """
    if dropout_key is None:
        return _network(config, dtype).apply({"params": params}, batch)
    network = _network(config, dtype, dropout_rate)
    return network.apply({"params": params}, batch, rngs={"dropout": dropout_key})


def encode(
    config: Config,
    params: Params,
    encoder_input_tokens_BxS: Array,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """The encoded inputs [B, S, D] in `dtype`; tokens of id 0 are hidden from all others."""
    network = _network(config, dtype)
    return network.apply({"params": params}, encoder_input_tokens_BxS, method="encode")


def decode(
    config: Config,
    params: Params,
    encoded_BxSxD: Array,
    encoder_mask_BxS: Array,
    decoder_input_tokens: Array,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """Teacher-forced logits over inputs that are encoded already.

    Args:
        encoder_mask_BxS: bool, False at padding (`encoder_input_tokens != 0`).
        decoder_input_tokens: int32 [B, T], or [B, C, T] for C targets of each input: the keys
            and values of an input are then computed once and read by all C.

    Returns:
        float32 logits: the shape of `decoder_input_tokens`, and V.

    Raises:
        DataError: decoder tokens of another rank, or for another number of inputs.
    """
    arguments = encoded_BxSxD, encoder_mask_BxS, decoder_input_tokens
    return _network(config, dtype).apply({"params": params}, *arguments, method="decode")


def start_decoding(
    config: Config,
    params: Params,
    encoded_BxSxD: Array,
    encoder_mask_BxS: Array,
    max_length: int,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Cache:
    """The cache for decoding up to `max_length` tokens with `decode_step`, as a pytree.

    Holds what every step reads: keys and values of the encoded inputs, computed here once, and
    room [B, H, max_length, d_kv] per layer for those of the decoded tokens; all in `dtype`.
    """
    arguments = encoded_BxSxD, encoder_mask_BxS, max_length
    return _network(config, dtype).apply({"params": params}, *arguments, method="start_decoding")


def decode_step(
    config: Config,
    params: Params,
    cache: Cache,
    tokens_B: Array,
    position: Array,
    *,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Array, Cache]:
    """Decodes one position.

    Args:
        tokens_B: int32, the token at `position` of each row: 0 at position 0, then what was chosen.
        position: int32 scalar, may be traced; less than the cache's max_length, and larger by one
            at every step.
        dtype: that of the cache.

    Returns:
        float32 logits [B, V] of the next token, and the cache with this position added.
    """
    arguments = cache, tokens_B, position
    return _network(config, dtype).apply({"params": params}, *arguments, method="decode_step")

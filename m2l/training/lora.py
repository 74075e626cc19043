"""Training of adapters: factors of low rank beside a base that stays as it is.

LoRA, Hu et al. 2021 (arXiv:2106.09685): theta + alpha / r B A, where only A and B are trained. The
factors of a kernel [in, out] are `down` [in, r], which is A transposed, and `up` [r, out].
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from m2l import models
from m2l.checkpoints import flatten, unflatten
from m2l.errors import ConfigError, UnknownNameError
from m2l.models.fields import POSITIVE, check_fields
from m2l.typing import JsonObject, Params

ALL = "all-linear"
"""The target that is every kernel but the output's."""

_OUTPUT = "lm_head"


@dataclasses.dataclass(frozen=True)
class Lora:
    """The shape of an adapter: hashable, part of the key of a compiled step.

    Attributes:
        rank: Of the factors of every kernel.
        alpha: The product is multiplied by alpha / rank.
        targets: Ends of the names of modules, as Hugging Face's models call them; or ALL.

    Raises:
        ConfigError: A setting of the wrong type or out of range.
    """

    rank: int
    alpha: float = dataclasses.field(metadata=POSITIVE)
    targets: tuple[str, ...] = (ALL,)

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Returns the adapter that "r=16,alpha=32,targets=q_proj+v_proj" describes.

        Without alpha it is the rank, without targets all kernels but the output's.

        Raises:
            ConfigError: It describes none.
        """
        values: dict[str, str] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if name not in ("r", "alpha", "targets") or not (equals and value) or name in values:
                raise ConfigError(
                    f"lora {text!r}: expected r=16[,alpha=32][,targets=q_proj+v_proj]"
                )
            values[name] = value
        try:
            rank = int(values["r"])
            alpha = float(values.get("alpha", rank))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"lora {text!r}: expected a whole number r, and a number alpha"
            ) from error
        return cls(rank, alpha, tuple(values.get("targets", ALL).split("+")))

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    def modules(self, config: models.Config) -> dict[str, str]:
        """Returns Hugging Face's name of each module that gets factors, by m2l's of its kernel.

        Raises:
            UnknownNameError: The model has no module of a name in `targets`.
            ConfigError: A kernel is smaller than the rank.
        """
        return _modules(self, config)

    def spec(self, config: models.Config) -> Params:
        """Returns the ParamSpec of every factor, nested as the kernels are."""
        kernels = flatten(models.spec(config))
        factors = {}
        for name in self.modules(config):
            kernel = kernels[name]
            for part, place in (("down", 0), ("up", 1)):
                shape, axes = [self.rank] * 2, ["rank"] * 2
                shape[place], axes[place] = kernel.shape[place], kernel.axes[place]
                factors[f"{name}/{part}"] = models.ParamSpec(
                    tuple(shape), np.dtype(np.float32), tuple(axes)
                )
        return unflatten(factors)

    def init(self, config: models.Config, key: jax.Array) -> Params:
        """Draws the factors as PEFT does: A uniform in 1 / sqrt(in), B zero."""
        specs = flatten(self.spec(config))
        factors = {}
        for index, (name, spec) in enumerate(specs.items()):
            factors[name] = jnp.zeros(spec.shape, jnp.float32)
            if name.endswith("/down"):
                bound = 1 / math.sqrt(spec.shape[0])
                drawn = jax.random.fold_in(key, index)
                factors[name] = jax.random.uniform(drawn, spec.shape, minval=-bound, maxval=bound)
        return unflatten(factors)

    def combine(self, base: Params, factors: Params) -> Params:
        """Returns the base's parameters with the factors' products added; for use under jit."""
        params, parts = flatten(base), flatten(factors)
        for name in {name.rpartition("/")[0]: None for name in parts}:
            product = jnp.dot(parts[f"{name}/down"], parts[f"{name}/up"], precision="highest")
            params[name] = params[name].astype(jnp.float32) + self.scale * product
        return unflatten(params)

    def exported(self, config: models.Config, factors: Mapping[str, np.ndarray]) -> JsonObject:
        """Returns the factors by PEFT's names and in its layout, of those by m2l's."""
        from m2l.checkpoints import adapters

        arrays = {}
        for name, module in self.modules(config).items():
            for half, part in (("A", "down"), ("B", "up")):
                stored = f"{adapters.PREFIX}{module}.lora_{half}.weight"
                arrays[stored] = np.ascontiguousarray(factors[f"{name}/{part}"].T)
        return arrays


@functools.cache
def _modules(lora: Lora, config: models.Config) -> dict[str, str]:
    from m2l.checkpoints import huggingface

    kernels, origins = flatten(models.spec(config)), huggingface.origins(config)
    if ALL in lora.targets:
        for name, origin in origins.items():
            if origin.transposed and not origin.is_stored:
                raise ConfigError(
                    f"lora: {name} has no module of its own in a {config.model_type} model of "
                    "Hugging Face, and so no factors; name targets, such as targets=o_proj"
                )
    known = {
        name: origin.tensor.removesuffix(".weight")
        for name, origin in origins.items()
        if origin.transposed and origin.is_stored and len(kernels[name].shape) == 2
        if "relative_attention_bias" not in origin.tensor
    }
    chosen: dict[str, str] = {}
    for target in lora.targets:
        matching = {
            n: m for n, m in known.items() if target != ALL and f".{m}".endswith(f".{target}")
        }
        if target == ALL:
            matching = {name: module for name, module in known.items() if module != _OUTPUT}
        if not matching:
            ends = {module.rpartition(".")[2] for module in known.values()} | {ALL}
            raise UnknownNameError("target of lora", target, ends)
        chosen |= matching
    for name in chosen:
        if lora.rank > min(kernels[name].shape):
            raise ConfigError(
                f"lora: the rank {lora.rank} is more than {name} {list(kernels[name].shape)} has"
            )
    return {name: chosen[name] for name in sorted(chosen)}

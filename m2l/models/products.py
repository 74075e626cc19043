"""Products of low precision that accumulate in float32, forward and in both gradients."""

import functools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array

_CPU_INFO = Path("/proc/cpuinfo")


def product(equation: str, left: Array, right: Array, dtype: DTypeLike | None = None) -> Array:
    """Multiplies two arrays as `jnp.einsum` does, in the left one's dtype.

    Below float32 the products of both gradients take that dtype too, accumulate in float32, and
    are rounded once: those of TPUs, of tensor cores and of AMX. XLA's own would multiply float32
    cotangents, or round partial sums.

    Args:
        equation: Every index of one array is in the other or in the result.
        right: Of any float dtype; its gradient is in it, without having been rounded to the left
            one's: that of a float32 master weight has float32's digits.
        dtype: Of the result; None: the left one's.
    """
    dtype = jnp.dtype(dtype or left.dtype)
    if left.dtype == jnp.float32:
        return jnp.einsum(equation, left, right.astype(left.dtype), preferred_element_type=dtype)
    return _product(equation, dtype, left, right)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtype: jnp.dtype, left: Array, right: Array) -> Array:
    return _forward(equation, dtype, left, right)[0]


def _forward(
    equation: str, dtype: jnp.dtype, left: Array, right: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    cast = right.astype(left.dtype)
    result = _in_float32(equation, left, cast).astype(dtype)
    return result, (left, cast, jnp.zeros((), right.dtype))


def _backward(
    equation: str, dtype: jnp.dtype, residuals: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    left, right, like_right = residuals
    inputs, result_axes = equation.split("->")
    left_axes, right_axes = inputs.split(",")
    cotangent = cotangent.astype(left.dtype)
    left_gradient = _in_float32(f"{result_axes},{right_axes}->{left_axes}", cotangent, right)
    right_gradient = _in_float32(f"{left_axes},{result_axes}->{right_axes}", left, cotangent)
    return left_gradient.astype(left.dtype), right_gradient.astype(like_right.dtype)


_product.defvjp(_forward, _backward)


def _in_float32(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


@functools.cache
def has_bfloat16() -> bool:
    """Returns whether the devices multiply bfloat16: of CPUs those with AMX or AVX512-BF16."""
    if jax.default_backend() != "cpu":
        return True
    flags = _CPU_INFO.read_text().split() if _CPU_INFO.is_file() else []
    return "amx_bf16" in flags or "avx512_bf16" in flags


def computed_in(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which a computation of `dtype` runs on these devices.

    float32 for bfloat16 where nothing multiplies that: converting to and fro would only cost.
    Says so once.
    """
    if jnp.dtype(dtype) != jnp.bfloat16 or has_bfloat16():
        return jnp.dtype(dtype)
    _say_float32()
    return jnp.dtype(jnp.float32)


@functools.cache
def _say_float32() -> None:
    warnings.warn(
        "dtype 'bfloat16': this CPU has no units for it (AMX, AVX512-BF16); computing in float32",
        stacklevel=3,
    )

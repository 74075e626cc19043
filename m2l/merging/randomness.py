"""Which entries are dropped: a function of (seed, expert, parameter, element) and nothing else.

The numbers come from Threefry-2x32 with 20 rounds (Salmon et al. 2011, Parallel random numbers: as
easy as 1, 2, 3), a counter-based generator: element j of a parameter is drawn by encrypting j. So
the masks are the same whatever the block size, the order, the sharding or the number of hosts.
"""

import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m2l.checkpoints import uint64
from m2l.checkpoints.spans import Span
from m2l.errors import MergeError

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_LAST = 0xFFFFFFFF
# With a block's elements added it still is a word.
_LONGEST_SIDE = _LAST - (1 << 20)


def keys(seed: int, experts: int, parameter: str) -> np.ndarray:
    """Returns the keys for one parameter; each two experts share one and take a word each.

    A key is the first 8 bytes of SHA-256 of "m2l dare/SEED/PAIR/PARAMETER".

    Returns:
        uint32 [(experts + 1) // 2, 2].
    """
    texts = [f"m2l dare/{seed}/{pair}/{parameter}" for pair in range((experts + 1) // 2)]
    digests = [hashlib.sha256(text.encode()).digest()[:8] for text in texts]
    return np.frombuffer(b"".join(digests), "<u4").astype(np.uint32).reshape(-1, 2)


def threefry2x32(key: jax.Array, counter: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """Encrypts the counters (high word, low word), uint32 arrays, with a key of two words."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y = y ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return [x, y]


def straight(start: int) -> np.ndarray:
    """Returns the place of consecutive elements of a parameter, from `start` on: see `words`."""
    return uint64.split(start)


def boxed(span: Span, element: int = 0) -> np.ndarray:
    """Returns the place of a span's elements from its element `element` on."""
    if span.rows == 1:
        return straight(span.start + element)
    row, column = divmod(element, span.columns)
    return _strided(span.start + row * span.stride, column, span.columns, span.stride, 1,
                    span.rows * span.stride)  # fmt: skip


def transposed(start: int, shape: Sequence[int]) -> np.ndarray:
    """Returns the place of consecutive elements of a matrix that is stored transposed.

    The draws are those of the parameter as m2l stores it, so that it does not matter whose files it
    is merged from.

    Args:
        start: The first element, as the matrix is stored.
        shape: [rows, columns], as it is stored. Of one axis: it is not transposed, and its place
            has the same form, so that one compiled program does for both.

    Raises:
        MergeError: A side of the matrix is longer than a word counts.
    """
    if len(shape) != 2:
        return _strided(start, 0, _LAST, 0, 1, 0)
    if max(shape) > _LONGEST_SIDE:
        raise MergeError(
            f"a transposed matrix {list(shape)}: random drops need sides of at most "
            f"{_LONGEST_SIDE:,}; merge it as an m2l checkpoint (m2l convert)"
        )
    row, column = divmod(start, shape[1])
    return _strided(row, column, shape[1], 1, shape[0], math.prod(shape))


def _strided(
    start: int, first: int, columns: int, down: int, across: int, largest: int
) -> np.ndarray:
    """Returns the place of elements of which the i-th is at start + r * down + c * across.

    r and c are the quotient and remainder of first + i by `columns`. No sum exceeds `largest`.
    """
    strides = [down, across]
    if largest > _LAST:
        strides = [word for stride in strides for word in uint64.split(stride)]
    return np.array([*uint64.split(start), first, columns, *strides], np.uint32)


def words(keys: jax.Array, experts: int, shape: Sequence[int], place: jax.Array) -> list[jax.Array]:
    """Returns a random word for each entry and expert.

    Args:
        keys: Of the parameter, as `keys` gives them.
        experts: How many there are.
        shape: Of the part of the parameter.
        place: Where its entries are in the parameter as m2l stores it: of `straight`, `boxed` or
            `transposed`. Each form of a place is a compiled program of its own: consecutive
            elements, strided ones, and strided ones of 2^32 elements or more.

    Returns:
        A uint32 array of `shape` per expert.
    """
    counter = positions(shape, place)
    random_words = [word for key in keys for word in threefry2x32(key, counter)]
    return random_words[:experts]


def positions(shape: Sequence[int], place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the position of each entry in its parameter: high word, low word, uint32."""
    start, size = place[:2], math.prod(shape)
    if size > _LAST:
        return uint64.add(uint64.iota(shape), start)
    step = jax.lax.iota(jnp.uint32, size).reshape(shape)
    if len(place) == 2:
        high = jnp.zeros((), jnp.uint32)
        return uint64.add((high, step), start)
    row, column = _divided(place[2] + step, place[3])
    if len(place) == 6:
        return uint64.add((jnp.uint32(0), row * place[4] + column * place[5]), start)
    zero = jnp.uint32(0)
    down = uint64.multiply((zero, row), place[4:6])
    across = uint64.multiply((zero, column), place[6:8])
    return uint64.add(uint64.add(down, across), start)


def _divided(number: jax.Array, divisor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes quotient and remainder of uint32s, exactly, for a quotient of at most 2^20.

    CPUs divide integers one at a time, which took as long as all else that dare_ties does. A
    float32 quotient made too small by more than its rounding is the right one or one less.
    """
    share = (1 - 2**-21) / divisor.astype(jnp.float32)
    quotient = (number.astype(jnp.float32) * share).astype(jnp.uint32)
    remainder = number - quotient * divisor
    more = (remainder >= divisor).astype(jnp.uint32)
    return quotient + more, remainder - more * divisor


def cut(drop_rate: float) -> np.uint32:
    """Returns the word below which entries are dropped: floor(p 2^32)."""
    return np.uint32(int(drop_rate * 2**32))

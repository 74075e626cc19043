"""Which entries DARE keeps: a function of (seed, expert, parameter, element) and of nothing else.

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

from m2l.errors import MergeError
from m2l.merging import uint64

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_LAST = 0xFFFFFFFF
# With a block's elements added it still is a word.
_LONGEST_SIDE = _LAST - (1 << 20)


def keys(seed: int, experts: int, parameter: str) -> np.ndarray:
    """The keys for one parameter of each two experts; they share a key and take a word each.

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
    """Where a part of a parameter begins, for `words`: at element `start`, in row-major order."""
    return np.array([*uint64.split(start), 0, 1, _LAST], np.uint32)


def transposed(start: int, shape: Sequence[int]) -> np.ndarray:
    """The same of a matrix that is stored transposed, [rows, columns].

    The draws are those of the parameter as m2l stores it, so that it does not matter whose files it
    is merged from.

    Raises:
        MergeError: A side of the matrix is longer than a word counts.
    """
    if max(shape) > _LONGEST_SIDE:
        raise MergeError(
            f"a transposed matrix {list(shape)}: random drops need sides of at most "
            f"{_LONGEST_SIDE:,}; merge it as an m2l checkpoint (m2l convert)"
        )
    place = [*divmod(start, shape[1]), *shape]
    return np.array(place if math.prod(shape) > _LAST else [0, *place], np.uint32)


def words(keys: jax.Array, experts: int, shape: Sequence[int], place: jax.Array) -> list[jax.Array]:
    """A random word for each entry and expert.

    Args:
        keys: Of the parameter, as `keys` gives them.
        experts: How many there are.
        shape: Of the part of the parameter: consecutive elements as they are stored.
        place: Where they begin, of `straight` or `transposed`: one program for both, and another
            for transposed matrices of 2^32 elements or more. A part of so many is `straight`.

    Returns:
        A uint32 array of `shape` per expert.
    """
    counter = _counters(shape, place)
    found = [word for key in keys for word in threefry2x32(key, counter)]
    return found[:experts]


def _counters(shape: Sequence[int], place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index of each entry in its parameter, as m2l stores it: high word, low word."""
    size = math.prod(shape)
    if size > _LAST:
        return uint64.add(uint64.iota(shape), place[:2])
    step = jax.lax.iota(jnp.uint32, size).reshape(shape)
    if len(place) == 4:
        row, column, rows, columns = place
        down, across = _divided(column + step, columns)
        zero = jnp.uint32(0)
        return uint64.add(uint64.multiply((zero, across), (zero, rows)), (zero, row + down))
    high, row, column, rows, columns = place
    down, across = _divided(column + step, columns)
    low = across * rows + row + down
    return high + (low < row).astype(jnp.uint32), low


def _divided(number: jax.Array, by: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of uint32s, exactly, where the quotient is at most 2^20.

    CPUs divide integers one at a time, which took as long as all else that dare_ties does. A
    float32 quotient made too small by more than its rounding is the right one or one less.
    """
    share = (1 - 2**-21) / by.astype(jnp.float32)
    quotient = (number.astype(jnp.float32) * share).astype(jnp.uint32)
    rest = number - quotient * by
    more = (rest >= by).astype(jnp.uint32)
    return quotient + more, rest - more * by


def cut(drop_rate: float) -> np.uint32:
    """Words below it are dropped: floor(p 2^32), compared as integers."""
    return np.uint32(int(drop_rate * 2**32))

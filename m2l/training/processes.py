"""Several processes of one run: each one's share of the rows, and stopping together.

One program runs in every process. Each writes its own shards of a checkpoint; all other files are
written by process 0. Every process must see the run's directory.
"""

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from m2l import partitioning, signals
from m2l.errors import ConfigError, M2LError
from m2l.training.feed import Positions, merged_positions


def is_first() -> bool:
    """Returns whether this is the process that writes."""
    return jax.process_index() == 0


def batch_share(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Returns the share of a batch that this process feeds: (its number, how many there are).

    Processes whose devices hold the same rows, the parts of one model, feed the same share.

    Raises:
        ConfigError: Some, but not all, of two processes' rows are the same.
    """
    starts: dict[int, set[int]] = {}
    slices = partitioning.batch_sharding(mesh).devices_indices_map((rows,))
    for device, (part,) in slices.items():
        starts.setdefault(device.process_index, set()).add(part.start or 0)
    shares = sorted({tuple(sorted(rows)) for rows in starts.values()})
    if sum(map(len, shares)) != len(set().union(*shares)):
        raise ConfigError(
            "the mesh divides processes unevenly: their devices hold partly the same rows; choose "
            "fsdp and model so that a process's devices are a multiple of model, or divide it"
        )
    return shares.index(tuple(sorted(starts[jax.process_index()]))), len(shares)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Fails the block in every process once it fails in one, so that none waits for another.

    Every process must come to it, and nothing in it may wait for other processes.

    Raises:
        M2LError: It failed in another process; the message says in which, and how.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        ours = isinstance(failure, M2LError | OSError)
        message = str(failure) if ours else f"{type(failure).__name__}: {failure}"
        content = b"" if failure is None else f"{message} ".encode()
        lengths = multihost_utils.process_allgather(np.int32(len(content)))
        lengths = np.asarray(lengths).reshape(-1)
        if failed := np.flatnonzero(lengths).tolist():
            text = np.zeros(lengths[failed[0]], np.uint8)
            text[: len(content)] = np.array(bytearray(content[: len(text)]), np.uint8)
            text = multihost_utils.broadcast_one_to_all(text, jax.process_index() == failed[0])
            if failure is None:
                message = np.asarray(text).tobytes().decode(errors="replace").strip()
                raise M2LError(f"process {failed[0]} has failed: {message}")
    if failure is not None:
        raise failure


def gather_positions(positions: Positions) -> list[bytes]:
    """Returns the position in every stream of the data; every process must call it.

    Args:
        positions: Those that this process knows, as `Feed.positions` returns them.
    """
    if jax.process_count() == 1:
        return merged_positions([positions])
    content = json.dumps([None if each is None else each.hex() for each in positions])
    text = np.frombuffer(content.encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.array([len(text)], np.int32))))
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, longest)
    parts = [json.loads(row.tobytes()) for row in rows]
    return merged_positions([[each and bytes.fromhex(each) for each in part] for part in parts])


def sum_over_shares(counts: Mapping[str, int] | None, share: tuple[int, int]) -> dict[str, int]:
    """Adds up what every share has counted; every process must call it.

    Args:
        counts: This share's, by the same names in all of them; None: it does not count.
        share: As `batch_share` returns it.

    Returns:
        The sums by name; nothing where no share counts.
    """
    if counts is None or jax.process_count() == 1 or share[1] == 1:
        return dict(counts or {})
    # JAX's arrays have 32 bits by default.
    halves = [half for count in counts.values() for half in divmod(count, 2**31)]
    row = np.array([share[0], *halves], np.int32)
    gathered = np.asarray(multihost_utils.process_allgather(row), np.int64)
    by_share = {int(row[0]): row[1:] for row in gathered.reshape(-1, len(row))}
    sums = np.sum(list(by_share.values()), axis=0)
    return dict(zip(counts, (sums[::2] * 2**31 + sums[1::2]).tolist(), strict=True))


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Lets the body handle SIGINT and SIGTERM between its steps.

    Yields:
        A function of the number of steps done, to be called after every step by every process: it
        is true, in all of them at the same step, once a stop of any has been requested.
    """
    if jax.process_count() == 1:
        with signals.deferred(None):
            yield lambda done: signals.requested() is not None
        return

    def agreed(done: int) -> bool:
        # jax.distributed has its own handler of SIGTERM, and agrees on a step that none has done.
        if signals.requested() is not None:
            signal.raise_signal(signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(done)

    with signals.deferred(None, [signal.SIGINT]):
        yield agreed

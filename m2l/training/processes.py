"""Several processes of one run: joining, each one's share of the rows, and stopping together.

One program runs in every process; process 0 alone writes. Every process must see the run's folder.
"""

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from m2l import files, partitioning, signals
from m2l.errors import CheckpointError, ConfigError, M2LError

# A pod's hosts do not all come up at once.
_SECONDS_TO_START = 1800


def join(coordinator: str | None = None, process: tuple[int, int] | None = None) -> str:
    """Makes this process one of those that run the program together.

    Args:
        coordinator: HOST:PORT of process 0; None asks the cluster (Slurm, Open MPI, GKE, a TPU
            pod), as JAX detects it.
        process: (this process's number, how many there are); None asks the cluster.

    Returns:
        What was joined, in words.

    Raises:
        ConfigError: No cluster is detected, or process 0 is not reached.
    """
    number, count = process or (None, None)
    try:
        jax.distributed.initialize(
            coordinator, count, number, initialization_timeout=_SECONDS_TO_START
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: {str(error).splitlines()[0]}; run it under Slurm, Open MPI, on GKE or "
            "a TPU pod, or name --coordinator HOST:PORT and --process I/N"
        ) from error
    return (
        f"process {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} of {jax.device_count()} devices"
    )


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def share(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Which share of a batch this process feeds: (its number, how many shares there are).

    Processes whose devices hold the same rows, the parts of one model, feed the same share.

    Raises:
        ConfigError: Some, but not all, of two processes' rows are the same.
    """
    held: dict[int, set[int]] = {}
    of_device = partitioning.batch_sharding(mesh).devices_indices_map((rows,))
    for device, (part,) in of_device.items():
        held.setdefault(device.process_index, set()).add(part.start or 0)
    shares = sorted({tuple(sorted(starts)) for starts in held.values()})
    if sum(map(len, shares)) != len(set().union(*shares)):
        raise ConfigError(
            "the mesh divides processes unevenly: their devices hold partly the same rows; choose "
            "fsdp and model so that a process's devices are a multiple of model, or divide it"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A block that fails in every process once it fails in one, so that none waits for another.

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
        said = str(failure) if ours else f"{type(failure).__name__}: {failure}"
        said = b"" if failure is None else f"{said} ".encode()
        lengths = multihost_utils.process_allgather(np.int32(len(said)))
        lengths = np.asarray(lengths).reshape(-1)
        if failed := np.flatnonzero(lengths).tolist():
            text = np.zeros(lengths[failed[0]], np.uint8)
            text[: len(said)] = np.array(bytearray(said[: len(text)]), np.uint8)
            told = multihost_utils.broadcast_one_to_all(text, jax.process_index() == failed[0])
            if failure is None:
                message = np.asarray(told).tobytes().decode(errors="replace").strip()
                raise M2LError(f"process {failed[0]} has failed: {message}")
    if failure is not None:
        raise failure


def on_host(tree: Any) -> Any:
    """Copies of a pytree's arrays as NumPy arrays, whole, in process 0; elsewhere None.

    Every process must call it, and may change or donate the arrays afterwards.
    """

    def fetch(leaf: jax.Array) -> np.ndarray | None:
        if leaf.is_fully_addressable:
            return np.array(leaf)
        if leaf.is_fully_replicated:
            return np.array(leaf.addressable_data(0))
        whole = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(whole) if is_first() else None

    return jax.tree.map(fetch, tree)


def gather_positions(position: bytes, of_share: tuple[int, int]) -> bytes:
    """The positions in the data of all shares as one; of one share, its own as it is."""
    number, count = of_share
    if jax.process_count() == 1 or count == 1:
        return position
    text = np.frombuffer(position, np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.array([len(text)], np.int32))))
    padded = np.zeros(longest, np.uint8)
    padded[: len(text)] = text
    numbers, lengths, texts = (
        np.asarray(multihost_utils.process_allgather(value))
        for value in (np.int32(number), np.int32(len(text)), padded)
    )
    found = {
        int(n): texts[i, : lengths[i]].tobytes().hex() for i, n in enumerate(numbers.reshape(-1))
    }
    return json.dumps({"shares": [found[n] for n in range(count)]}).encode()


def sum_over_shares(counts: Mapping[str, int] | None, of_share: tuple[int, int]) -> dict[str, int]:
    """Adds up what every share has counted; every process must call it.

    Args:
        counts: This share's, by the same names in all of them; None: it does not count.
        of_share: As `share` gives it.

    Returns:
        The sums by name; nothing where no share counts.
    """
    if counts is None or jax.process_count() == 1 or of_share[1] == 1:
        return dict(counts or {})
    # JAX's arrays have 32 bits by default.
    halves = [half for count in counts.values() for half in divmod(count, 2**31)]
    row = np.array([of_share[0], *halves], np.int32)
    gathered = np.asarray(multihost_utils.process_allgather(row), np.int64)
    by_share = {int(row[0]): row[1:] for row in gathered.reshape(-1, len(row))}
    sums = np.sum(list(by_share.values()), axis=0)
    return dict(zip(counts, (sums[::2] * 2**31 + sums[1::2]).tolist(), strict=True))


def own_position(saved: bytes, of_share: tuple[int, int]) -> bytes:
    """This share's part of what `gather_positions` gave.

    Raises:
        CheckpointError: It was saved by another number of shares.
    """
    number, count = of_share
    shares = [saved.hex()]
    if saved.startswith(b'{"shares"'):
        shares = files.parse_json(saved, "the position in the data")["shares"]
    if len(shares) != count:
        raise CheckpointError(
            f"the run was fed in {len(shares)} shares and is now fed in {count}: go on with as "
            "many processes as before, or start a new run with --init"
        )
    return bytes.fromhex(shares[number])


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Lets the body answer SIGINT and SIGTERM, which it does between its steps.

    Yields:
        A function of the number of steps done, to be called after every step by every process: it
        is true, in all of them at the same step, once any has been asked to stop.
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

"""Processes that run one program together: joining, and messages between them.

Joining is JAX's: the cluster (Slurm, Open MPI, GKE, a TPU pod) or a coordinator's address. Messages
go through the key-value store of `jax.distributed`, which process 0 runs.
"""

import atexit
import collections
import contextlib
import io
import itertools
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax._src import distributed as jax_distributed

from m2l.errors import ConfigError, M2LError, MergeError

# A pod's hosts do not all come up at once.
_SECONDS_TO_START = 1800

_MILLISECONDS_TO_COME = 1800 * 1000

_SECONDS_BETWEEN_BEATS = 1.0
_SECONDS_UNTIL_STOPPED = 15.0
# Messages of gRPC are limited.
_MESSAGE_BYTES = 2 << 20

_AGAIN = "the same command goes on from what is finished, with any number of processes"

Arrays = Mapping[str, np.ndarray]


def join(
    coordinator: str | None = None,
    process: tuple[int, int] | None = None,
    *,
    saves: bool = True,
    survive: bool = False,
    seconds: int = _SECONDS_TO_START,
) -> str:
    """Makes this process one of those that run the program together.

    Args:
        coordinator: HOST:PORT of process 0; None asks the cluster (Slurm, Open MPI, GKE, a TPU
            pod), as JAX detects it.
        process: (this process's number, how many there are); None asks the cluster.
        saves: Whether the program saves at SIGTERM, which JAX then takes.
        survive: Whether this process goes on when another one stops, to say so; it does not save.
            JAX ends all others when process 0 does in any case.
        seconds: How long to wait for the others.

    Returns:
        What was joined, in words.

    Raises:
        ConfigError: No cluster is detected, or a process does not come.
    """
    number, count = process or (None, None)
    options: dict[str, int] = {}
    jax.config.update("jax_enable_preemption_service", saves and not survive)
    if survive:
        jax.config.update("jax_enable_recoverability", True)
        options = {"heartbeat_timeout_seconds": 10}
        atexit.register(leave)
    try:
        jax.distributed.initialize(
            coordinator, count, number, initialization_timeout=seconds, **options
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


def leave() -> None:
    """Ends a process that has joined: process 0 last, for the others' store is in it."""
    client = jax_distributed.global_state.client
    if client is not None and jax_distributed.global_state.process_id == 0:
        # Returns when no other process is connected any more.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.get_live_nodes(list(range(jax_distributed.global_state.num_processes)))
    jax.distributed.shutdown()


def rank() -> tuple[int, int]:
    """Returns this process's number and how many there are: (0, 1) where nothing was joined."""
    state = jax_distributed.global_state
    return (0, 1) if state.client is None else (state.process_id, state.num_processes)


_uses: collections.Counter[str] = collections.Counter()


def _key(tag: str) -> str:
    """Returns a key for the next use of a tag, the same in every process."""
    _uses[tag] += 1
    return f"m2l/{tag}/{_uses[tag]}"


def wait_for_all(tag: str) -> None:
    """Returns when every process has come here; any thread may wait, as devices have no part in it.

    Raises:
        M2LError: One does not come.
    """
    client = jax_distributed.global_state.client
    if rank()[1] > 1:
        try:
            client.wait_at_barrier(_key(tag), _MILLISECONDS_TO_COME)
        except jax.errors.JaxRuntimeError as error:
            raise M2LError(f"{tag}: a process has not come here; {_AGAIN}") from error


def sum_at_first(tag: str, words: np.ndarray) -> np.ndarray:
    """Returns the sum of an array of every process in process 0, the process's own in the others.

    Any thread may call it, as devices have no part in it.

    Raises:
        M2LError: A process does not come.
    """
    client, (index, count) = jax_distributed.global_state.client, rank()
    if count == 1:
        return words
    key = _key(tag)
    if index:
        client.key_value_set_bytes(f"{key}/{index}", words.tobytes())
        return words
    for other in range(1, count):
        try:
            content = client.blocking_key_value_get_bytes(f"{key}/{other}", _MILLISECONDS_TO_COME)
        except jax.errors.JaxRuntimeError as error:
            raise M2LError(f"{tag}: process {other} has not come here; {_AGAIN}") from error
        client.key_value_delete(f"{key}/{other}")
        words = words + np.frombuffer(content, words.dtype).reshape(words.shape)
    return words


class Processes:
    """The processes that do one piece of work together; a context manager.

    Every process enters it, and gathers under the same tags in the same order. If one fails or
    stops, the others raise an error that names it.

    Attributes:
        index: Which this is.
        count: How many there are; 1 where nothing was joined.
    """

    _serial = itertools.count()

    def __init__(self) -> None:
        self._client = jax_distributed.global_state.client
        self.index, self.count = rank()
        self._prefix = f"m2l/{next(self._serial)}"
        self._ended = threading.Event()
        self._failure: str | None = None
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._stale: list[str] = []

    def __enter__(self) -> "Processes":
        if self.count > 1:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.count == 1:
            return
        if error is not None and self._failure is None:
            text = str(error) if isinstance(error, M2LError) else f"{type(error).__name__}: {error}"
            self._client.key_value_set_bytes(f"{self._prefix}/failed/{self.index}", text.encode())
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """Raises MergeError if another process is known to have failed."""
        if self._failure is not None:
            raise MergeError(self._failure)

    def gather(self, tag: str, arrays: Arrays) -> list[dict[str, np.ndarray]]:
        """Returns the arrays of every process under a tag, in their order; waits for all of them.

        Raises:
            MergeError: A process has failed or stopped.
        """
        if self.count == 1:
            return [dict(arrays)]
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        content = file.getvalue()
        own = []
        for number, start in enumerate(range(0, len(content), _MESSAGE_BYTES)):
            own.append(f"{self._prefix}/{tag}/{self.index}/{number}")
            part = content[start : start + _MESSAGE_BYTES]
            # The first byte says whether more follow.
            more = start + _MESSAGE_BYTES < len(content)
            self._client.key_value_set_bytes(own[-1], bytes([more]) + part)
        gathered = [self._read(tag, index) for index in range(self.count)]
        # Whoever sends something here has read all of what was gathered before.
        for key in self._stale:
            self._client.key_value_delete(key)
        self._stale = own
        return gathered

    def _read(self, tag: str, index: int) -> dict[str, np.ndarray]:
        content = b""
        for number in itertools.count():
            part = self._wait(f"{self._prefix}/{tag}/{index}/{number}", index)
            content += part[1:]
            if not part[0]:
                break
        with np.load(io.BytesIO(content)) as loaded:
            return dict(loaded)

    def _wait(self, key: str, index: int) -> bytes:
        """Returns a value that process `index` sets."""
        milliseconds = int(1000 * _SECONDS_BETWEEN_BEATS)
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(key, milliseconds)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise MergeError(
                        f"process 0 of {self.count} cannot be reached any more; {_AGAIN}"
                    ) from error
            self.check()
            try:
                beat = self._client.key_value_try_get_bytes(f"{self._prefix}/alive/{index}")
            except jax.errors.JaxRuntimeError:
                beat = b""  # It has not come here yet.
            now = time.monotonic()
            last, since = self._beats.get(index, (None, now))
            if beat != last:
                since = now
            self._beats[index] = beat, since
            if now - since > _SECONDS_UNTIL_STOPPED:
                raise MergeError(f"process {index} of {self.count} has stopped; {_AGAIN}")

    def _beat(self) -> None:
        """Publishes that this process is alive, and checks whether another has failed."""
        for number in itertools.count():
            try:
                self._client.key_value_set_bytes(
                    f"{self._prefix}/alive/{self.index}", str(number).encode(), True
                )
                failed = self._client.key_value_dir_get_bytes(f"{self._prefix}/failed/")
            except jax.errors.JaxRuntimeError:
                return  # Process 0 is gone; whoever waits for a value finds out.
            for key, text in failed:
                index = int(key.rpartition("/")[2])
                if index != self.index:
                    self._failure = (
                        f"process {index} of {self.count} has failed: "
                        f"{text.decode(errors='replace')}"
                    )
            if self._ended.wait(_SECONDS_BETWEEN_BEATS):
                return

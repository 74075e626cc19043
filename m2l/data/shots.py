"""Few-shot prompts: examples of a task's training split that stand before each of its examples."""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from m2l.data.record_table import index_shuffle
from m2l.data.text_tasks import TextTask, encode_few_shot
from m2l.errors import ConfigError, DataError
from m2l.typing import Json, JsonObject

TRAINING = "train"
"""The split that shots are of."""


@dataclasses.dataclass(frozen=True)
class Shots:
    """How many examples stand before each, and which: the same ones for all examples of a task.

    Attributes:
        count: How many; 0: none.
        seed: Decides which of the training split's records they are; prompts of a dataset share
            them.

    Raises:
        ConfigError: A number is out of range, or the seed has no effect.
    """

    count: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "seed"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ConfigError(f"shots: {name}: expected 0 or more, found {getattr(self, name)}")
        if self.seed and not self.count:
            raise ConfigError("shots_seed: without shots none are drawn")

    def settings(self) -> JsonObject:
        """Returns what the settings of a study's stage say of shots: nothing without any."""
        return {"shots": [self.count, self.seed]} if self.count else {}


NONE = Shots()


def without_idle(fields: Mapping[str, Json]) -> dict[str, Json]:
    """Returns a study's settings without those of shots if there are none, as before these."""
    idle = () if fields["shots"] else ("shots", "shots_seed")
    return {name: value for name, value in fields.items() if name not in idle}


class DrawnShots:
    """The shots of a task, read as far as they are needed.

    Args:
        task: The task.
        shots: How many, and the seed.

    Raises:
        DataError: It has no training split.
    """

    def __init__(self, task: TextTask, shots: Shots):
        self._task, self._shots = task, shots
        if TRAINING not in task.records.splits:
            raise DataError(
                f"{task.name!r} has no split {TRAINING!r} to take shots from; it has "
                f"{', '.join(sorted(task.records.splits))}"
            )
        self._drawn: list[tuple[str, str]] = []
        self._remaining = self._pairs()

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """Yields different inputs with their targets, in the order in which they are drawn."""
        records = self._task.records
        size = records.split(TRAINING).size
        # Another order than that in which `max_examples` draws from the same split.
        keys = self._shots.seed, zlib.crc32(f"shots of {records.name}".encode())
        seen = set()
        for number in range(size):
            [record] = index_shuffle(np.array([number]), keys, size).tolist()
            texts = self._task.texts(TRAINING, record)
            if texts["inputs"].strip() and texts["targets"].strip() and texts["inputs"] not in seen:
                seen.add(texts["inputs"])
                yield texts["inputs"], texts["targets"]

    def before(self, inputs: str) -> list[tuple[str, str]]:
        """Returns inputs and targets of the shots of an example, none of which has its inputs.

        Raises:
            DataError: the training split has too few examples.
        """
        while True:
            usable = [pair for pair in self._drawn if pair[0] != inputs]
            if len(usable) >= self._shots.count:
                return usable[: self._shots.count]
            pair = next(self._remaining, None)
            if pair is None:
                raise DataError(
                    f"{self._task.name!r}: its split {TRAINING!r} has {len(usable)} other inputs, "
                    f"fewer than the {self._shots.count} shots"
                )
            self._drawn.append(pair)

    def encode(self, texts: Sequence[str], length: int) -> list[tuple[np.ndarray, str, int]]:
        """Encodes inputs behind their shots, of which the last are left out, whole, to fit.

        Args:
            texts: The inputs.
            length: The tokens that there may be. Inputs alone may still be longer.

        Returns:
            Per text, its ids int32 [S], it as text behind its shots, and how many these are.
        """
        shots = list(map(self.before, texts))
        encoded: list[tuple[np.ndarray, str, int]] = [(np.empty(0, np.int32), "", 0)] * len(texts)
        pending = range(len(texts))
        for count in range(self._shots.count, -1, -1):
            prompts = [(texts[place], shots[place][:count]) for place in pending]
            rows = encode_few_shot(self._task.inputs, prompts, self._task.name)
            for place, (ids, text) in zip(pending, rows, strict=True):
                encoded[place] = ids, text, count
            pending = [place for place in pending if len(encoded[place][0]) > length]
            if not pending:
                break
        return encoded

"""A study as data: stages, what each is made from, and a digest of everything that decides it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from m2l.errors import UnknownNameError


@dataclass(frozen=True)
class Stage:
    """One piece of work with one output directory.

    Attributes:
        name: Its name and its folder under the study's: "experts/instruct/sentiment".
        kind: "train", "merge" or "evaluate".
        settings: Everything else that decides the output, as plain JSON values.
        inputs: The stages whose outputs it reads, by role: "init", "base", "expert_00", "model".
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)


class Plan:
    """Stages in an order in which they can be run.

    Raises:
        ValueError: two stages of one name, or an input that no earlier stage makes.
    """

    def __init__(self, stages: Iterable[Stage]):
        self._stages: dict[str, Stage] = {}
        self._digests: dict[str, str] = {}
        for stage in stages:
            if stage.name in self._stages:
                raise ValueError(f"two stages are called {stage.name}")
            missing = [name for name in stage.inputs.values() if name not in self._stages]
            if missing:
                raise ValueError(f"{stage.name} reads {missing}, which no earlier stage makes")
            decided_by = [
                stage.kind,
                stage.settings,
                {role: self._digests[name] for role, name in stage.inputs.items()},
            ]
            text = json.dumps(decided_by, sort_keys=True)
            self._stages[stage.name] = stage
            self._digests[stage.name] = hashlib.sha256(text.encode()).hexdigest()

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages.values())

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, name: str) -> Stage:
        if name not in self._stages:
            raise UnknownNameError("stage", name, self._stages)
        return self._stages[name]

    def digest(self, name: str) -> str:
        """sha256 of the stage's kind and settings and of its inputs' digests."""
        self[name]
        return self._digests[name]

    def needed_for(self, name: str) -> "Plan":
        """The stage and, in order, everything it is made from."""
        wanted = {self[name].name}
        for stage in reversed(list(self)):
            if stage.name in wanted:
                wanted.update(stage.inputs.values())
        return Plan(stage for stage in self if stage.name in wanted)

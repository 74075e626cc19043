"""Models put together of layers of others, before they are merged: frankenmerges, depth up-scaling.

The layers of the result are numbered anew; its configuration has their number, and, of fields that
are lists of one entry for each layer, the entries of the layers that were taken.
"""

import copy
import dataclasses
import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from m2l import files
from m2l.checkpoints.opening import Checkpoint
from m2l.errors import MergeError
from m2l.merging import inputs
from m2l.merging.layerwise import LAYER
from m2l.typing import Json, JsonObject

_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# Where there is no list of one entry for each layer, these decide by a layer's number.
_BY_NUMBER = (
    *("sliding_window_pattern", "_sliding_window_pattern", "max_window_layers"),
    *("no_rope_layer_interval", "global_attn_every_n_layers", "attn_layer_period"),
    *("cross_attention_layers", "mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace"),
)
# Tensors of no layer that are before the first; the others are after the last.
_BEFORE = re.compile(r"(embed(?!_out)|wte|wpe)")


class LayerStart(NamedTuple):
    """Where consecutive layers begin: a model's path, and the number of its layer."""

    path: str
    first: int


@dataclasses.dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result.

    Attributes:
        parts: Of each input of the merge, the base first, whose layers they are.
        layers: How many.
    """

    parts: tuple[LayerStart, ...]
    layers: int


class TensorOrigin(NamedTuple):
    """What a tensor of the result is taken from.

    Attributes:
        slice: The number of the slice.
        path: The model.
        name: The tensor's name there.
        layer: The number of its layer there; None: it is of none.
        position: Of its layer in the slice, from 0 to 1, as gradients count.
    """

    slice: int
    path: str
    name: str
    layer: int | None
    position: float


class Stack:
    """The layers of a model that has one stack of them.

    Args:
        checkpoint: The model.

    Raises:
        MergeError: It has several stacks, or none.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.names: dict[int, list[str]] = {}
        stacks: dict[str, int] = {}
        for name in checkpoint.parameters:
            if layer := LAYER.match(name):
                self.names.setdefault(int(layer[2]), []).append(name)
                stacks[layer[1]] = min(stacks.get(layer[1], len(layer[2])), len(layer[2]))
        if len(stacks) != 1:
            raise MergeError(
                f"{checkpoint.path}: slices are of models with one stack of layers; this one has "
                f"{', '.join(stacks) or 'none'}"
            )
        ((self.prefix, self._digits),) = stacks.items()

    def renamed(self, name: str, number: int) -> str:
        """Returns a tensor's name in the layer of another number."""
        return f"{self.prefix}{number:0{self._digits}d}{_suffix(name)}"


@dataclasses.dataclass(frozen=True)
class Composition(Checkpoint):
    """A model of layers of others; `content` identifies it."""

    content: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, that identifies it."""
        return self.content


@dataclasses.dataclass(frozen=True)
class Slices:
    """The layers of the inputs of a merge, from the first to the last."""

    slices: tuple[Slice, ...]

    @property
    def paths(self) -> list[str]:
        """The models, each once."""
        return list(dict.fromkeys(part.path for each in self.slices for part in each.parts))

    @property
    def bases(self) -> set[str]:
        """The models of the first input's layers alone."""
        experts = {part.path for each in self.slices for part in each.parts[1:]}
        return {each.parts[0].path for each in self.slices} - experts

    def to_json(self) -> list[Json]:
        """Returns the layers as JSON-like data, for a manifest."""
        return [
            {"layers": each.layers, "of": [[part.path, part.first] for part in each.parts]}
            for each in self.slices
        ]

    @classmethod
    def from_json(cls, value: Json) -> "Slices":
        """Returns the layers that `to_json` gives."""
        return cls(
            tuple(
                Slice(tuple(LayerStart(*part) for part in each["of"]), each["layers"])
                for each in value
            )
        )

    def at(self, paths: Mapping[str, str]) -> "Slices":
        """Returns the same layers of models that are elsewhere, by old path."""
        return Slices(
            tuple(
                Slice(tuple(LayerStart(paths[p.path], p.first) for p in each.parts), each.layers)
                for each in self.slices
            )
        )

    def origins(self, opened: Mapping[str, Checkpoint]) -> list[dict[str, TensorOrigin]]:
        """Returns what each tensor of each input is taken from.

        Args:
            opened: The models, by path.

        Raises:
            MergeError: A model has no such layer.
        """
        stacks = {path: Stack(opened[path]) for path in self.paths}
        return [self._origins(index, opened, stacks) for index in range(len(self.slices[0].parts))]

    def _origins(
        self, index: int, opened: Mapping[str, Checkpoint], stacks: Mapping[str, Stack]
    ) -> dict[str, TensorOrigin]:
        origins: dict[str, TensorOrigin] = {}
        first, last = (self.slices[i].parts[index].path for i in (0, -1))
        outer = stacks[first]
        for name in opened[first].parameters:
            if not LAYER.match(name) and _BEFORE.search(name):
                origins[name] = TensorOrigin(0, first, name, None, 0.0)
        number = 0
        for place, each in enumerate(self.slices):
            part = each.parts[index]
            for offset in range(each.layers):
                layer = part.first + offset
                if layer not in stacks[part.path].names:
                    raise MergeError(
                        f"slices[{place}]: {part.path} has no layer {layer}; its layers are 0 to "
                        f"{max(stacks[part.path].names)}"
                    )
                position = offset / (each.layers - 1) if each.layers > 1 else 1.0
                for name in stacks[part.path].names[layer]:
                    origin = TensorOrigin(place, part.path, name, layer, position)
                    origins[outer.renamed(name, number)] = origin
                number += 1
        for name in opened[last].parameters:
            if not LAYER.match(name) and not _BEFORE.search(name):
                origins[name] = TensorOrigin(len(self.slices) - 1, last, name, None, 0.0)
        return origins

    def compose(self, opened: Sequence[Checkpoint], allowed: Sequence[str]) -> list[Composition]:
        """Returns the inputs of the merge, each put together.

        Args:
            opened: The models of `paths`, in this order.
            allowed: Fields of descriptions in which they may differ; "tokenizer" is one.

        Raises:
            MergeError: Models of one input differ in more than the number of layers.
        """
        by_path = dict(zip(self.paths, opened, strict=True))
        return [
            self._composed(index, by_path, origins, allowed)
            for index, origins in enumerate(self.origins(by_path))
        ]

    def _composed(
        self,
        index: int,
        opened: Mapping[str, Checkpoint],
        origins: Mapping[str, TensorOrigin],
        allowed: Sequence[str],
    ) -> Composition:
        parts = [each.parts[index] for each in self.slices]
        layers = [
            (part.path, part.first + offset)
            for part, each in zip(parts, self.slices, strict=True)
            for offset in range(each.layers)
        ]
        first = opened[parts[0].path]
        descriptions = {path: _described(opened[path], opened, layers) for path, _ in parts}
        described = dataclasses.replace(first, model=descriptions[parts[0].path])
        for path in descriptions:
            inputs.check_described(
                described, dataclasses.replace(opened[path], model=descriptions[path]), allowed
            )
        _check_shapes(first, opened, origins)
        outer = Stack(first)
        ours = {}
        for name, origin in origins.items():
            if origin.name in opened[origin.path].ours:
                canonical, transposed = opened[origin.path].ours[origin.name]
                layer, number = LAYER.match(canonical), LAYER.match(name)
                if layer and number:
                    digits = max(2, len(number[2]))
                    canonical = f"{layer[1]}{int(number[2]):0{digits}d}{_suffix(canonical)}"
                ours[name] = canonical, transposed
        content = [
            [opened[part.path].digest, part.first, each.layers, outer.prefix]
            for part, each in zip(parts, self.slices, strict=True)
        ]
        fields = {
            field.name: getattr(first, field.name) for field in dataclasses.fields(Checkpoint)
        }
        fields |= {
            "parameters": {n: opened[o.path].parameters[o.name] for n, o in origins.items()},
            "ours": ours,
            "model": described.model,
            "manifest": None,
            "tree": None,
            "strings": None,
        }
        return Composition(**fields, content=files.checksum(content))


def _check_shapes(
    first: Checkpoint, opened: Mapping[str, Checkpoint], origins: Mapping[str, TensorOrigin]
) -> None:
    """Refuses layers whose tensors are not those of the first model's layers."""
    kinds: dict[str, list[str]] = {}
    for name, tensor in first.parameters.items():
        kind = inputs.array_kind(tensor.shape, tensor.dtype)
        kinds.setdefault(_suffix(name), []).append(kind)
    for origin in origins.values():
        tensor = opened[origin.path].parameters[origin.name]
        kind, known = inputs.array_kind(tensor.shape, tensor.dtype), kinds.get(_suffix(origin.name))
        if kind not in (known or ()):
            raise MergeError(
                f"{origin.path}: {origin.name} is {kind}, in the layers of {first.path} it is "
                f"{known[0] if known else 'missing'}"
            )


def _suffix(name: str) -> str:
    """Returns what a tensor is called within its layer; of no layer, its name."""
    layer = LAYER.match(name)
    return name[layer.end(2) :] if layer else name


def _described(
    checkpoint: Checkpoint, opened: Mapping[str, Checkpoint], layers: Sequence[tuple[str, int]]
) -> JsonObject:
    """Returns a model's configuration as it is with other layers.

    Raises:
        MergeError: It does not say how many layers it has.
    """
    count, model = len(Stack(checkpoint).names), copy.deepcopy(dict(checkpoint.model))
    if not model:
        return model
    place = next((key for key in ("", "text_config") if _counts(model, key, count)), None)
    if place is None:
        raise MergeError(
            f"{checkpoint.path}: its configuration has no number of layers that is {count}: none "
            f"of {', '.join(_COUNTS)}"
        )
    scope = model[place] if place else model
    for key in _counts(model, place, count):
        scope[key] = len(layers)
    if fields := [key for key in _BY_NUMBER if scope.get(key) and "layer_types" not in scope]:
        warnings.warn(
            f"{checkpoint.path}: {', '.join(fields)} decides by the number of a layer, and layers "
            "are numbered anew",
            stacklevel=5,
        )
    for key, value in list(scope.items()):
        if isinstance(value, list) and len(value) == count > 1:
            sources = [(opened[path].model, layer) for path, layer in layers]
            values = [(source[place] if place else source).get(key) for source, _ in sources]
            if all(isinstance(each, list) for each in values):
                rows = zip(values, sources, strict=True)
                scope[key] = [each[layer] for each, (_, layer) in rows if layer < len(each)]
    return model


def _counts(model: Mapping[str, Json], place: str, count: int) -> list[str]:
    scope = model.get(place, {}) if place else model
    return [key for key in _COUNTS if isinstance(scope, Mapping) and scope.get(key) == count]

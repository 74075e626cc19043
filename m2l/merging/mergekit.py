"""Merges by mergekit's YAML files: parameters resolved for each tensor, by mergekit's rules.

The most specific setting with a value counts (of a source, of its slice, of the file), filters are
parts of tensors' names, and lists of numbers are gradients over the layers of a slice, tensors of
no layer taking the first.
"""

import collections
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from m2l import hub_models
from m2l.checkpoints.opening import Checkpoint
from m2l.checkpoints.tensor_kinds import is_float
from m2l.errors import MergeError
from m2l.merging import inputs, layerwise
from m2l.merging.layerwise import LAYER, Gradient
from m2l.merging.mergekit_file import FLAGS, Kind, MergekitFile, OutputSlice, Settings, SliceSource
from m2l.merging.method_registry import METHODS
from m2l.merging.recipe import DTYPES, Recipe, preset
from m2l.merging.slices import LayerStart, Slice, Slices, Stack
from m2l.storage import AnyPath
from m2l.typing import Json


class MergekitMerge(NamedTuple):
    """The arguments of `merge` that a file comes to.

    Attributes:
        base: The base; None without one.
        experts: The experts, or where layers are put together the models of their first layers.
        recipe: How to merge.
        slices: How the inputs are put together; None: they are the models.
    """

    base: AnyPath | None
    experts: tuple[AnyPath, ...]
    recipe: Recipe
    slices: Slices | None


class _Tensor(NamedTuple):
    """A tensor of the result, and what it is merged of.

    Attributes:
        name: Its name.
        known: What Hugging Face calls it, by which filters go.
        part: The number of its slice.
        names: Of each source of the slice, what Hugging Face calls the tensor there.
        position: Of its layer in the slice, from 0 to 1.
    """

    name: str
    known: str
    part: int
    names: tuple[str, ...]
    position: float


def resolve(
    content: MergekitFile,
    *,
    output_format: str | None = None,
    allowed: Sequence[str] = (),
    seed: int = 0,
) -> MergekitMerge:
    """Opens a file's models, and returns what to merge how.

    Args:
        content: The file.
        output_format: As `merge` takes it.
        allowed: Fields of descriptions that may differ.
        seed: Of what is dropped at random.

    Raises:
        MergeError: Its slices do not fit the models, or a tensor has no number.
        CheckpointError: A model cannot be opened.
    """
    _check_numbers_of_sources(content)
    ordered = [_ordered(content.described, part) for part in content.slices]
    models = list(dict.fromkeys(source.model for sources in ordered for source in sources))
    paths = [hub_models.located(model) for model in models]
    checkpoints, _ = inputs.open_all(paths, output_format, named=False, allowed=allowed)
    opened = dict(zip(models, checkpoints, strict=True))
    slices = _slices(content, ordered, opened)
    tensors = list(_whole(ordered[0], opened) if slices is None else _sliced(slices, opened))
    resolved = _Resolver(content, ordered).settings(tensors)
    settings = preset("mergekit", resolved)
    if METHODS[str(settings["method"])].draws:
        settings["seed"] = seed
    settings["dtype"] = content.dtype or _dtype(checkpoints[0])
    has_base = _has_base(content.described)
    first = [each.model for each in _filled(ordered[0], max(map(len, ordered)))]
    names = ["base"] * has_base + [f"expert_{i}" for i in range(len(first) - has_base)]
    settings["tokenizer"] = _by_role(content, dict(zip(first[::-1], names[::-1], strict=True)))
    located = dict(zip(models, paths, strict=True))
    experts = tuple(located[model] for model in first[has_base:])
    base = located[first[0]] if has_base else None
    try:
        recipe = Recipe(**settings)
    except MergeError as error:
        raise MergeError(f"{content.file}: {error}") from error
    return MergekitMerge(base, experts, recipe, slices)


def _by_role(content: MergekitFile, roles: Mapping[str, str]) -> dict[str, Json] | None:
    """Returns what a recipe says of the tokenizer, models by their roles in the merge."""
    if content.tokenizer is None:
        return None

    def role(name: str) -> str:
        if name == "base" and content.base is not None:
            name = content.base
        if name in roles or name in ("base", "union", "zero"):
            return roles.get(name, name)
        raise MergeError(
            f"{content.file}: tokenizer of {name}, which is none of the first slice's models"
        )

    tokens = {
        token: each | {"source": role(str(each["source"]))}
        for token, each in (content.tokenizer.get("tokens") or {}).items()
    }
    return {**content.tokenizer, "source": role(content.tokenizer["source"]), "tokens": tokens}


def _dtype(checkpoint: Checkpoint) -> str:
    """Returns the dtype of a model's first tensor of real numbers."""
    tensors = (t for t in checkpoint.parameters.values() if is_float(t.dtype))
    name = next((tensor.dtype.name for tensor in tensors), "float32")
    return name if name in DTYPES else "float32"


def _has_base(kind: Kind) -> bool:
    return METHODS[kind.method].needs_base


def _ordered(kind: Kind, part: OutputSlice) -> list[SliceSource]:
    """Returns a slice's models as m2l takes them: the base is first, where mergekit has one."""
    if kind.method in ("average", "weighted_sum"):
        return list(part.sources)
    return sorted(part.sources, key=lambda source: source.model != part.base)


def _filled(sources: Sequence[SliceSource], count: int) -> list[SliceSource]:
    """Returns as many models as other slices have.

    Those that are added have a weight of 0, or, being the base, no task vector; methods for which
    that would count are refused.
    """
    return [*sources, *[sources[0]] * (count - len(sources))]


def _slices(
    content: MergekitFile,
    ordered: Sequence[Sequence[SliceSource]],
    opened: Mapping[str, Checkpoint],
) -> Slices | None:
    """Returns how the inputs are put together; None: they are the models.

    Raises:
        MergeError: Layers are left out or repeated, where models are merged.
    """
    if ordered[0][0].layers is None:
        return None
    counts = {model: max(Stack(checkpoint).names) + 1 for model, checkpoint in opened.items()}
    count = max(map(len, ordered))
    rows = [_filled(sources, count) for sources in ordered]
    for sources in zip(*rows, strict=True):
        models = {source.model for source in sources}
        if content.kind != "passthrough" and len(models) == 1:
            _check_complete(content, sources, counts[sources[0].model])
    if len(rows) == 1 and all(source.layers == (0, counts[source.model]) for source in rows[0]):
        return None
    return Slices(
        tuple(
            Slice(
                tuple(LayerStart(source.model, source.layers[0]) for source in sources),
                sources[0].layers[1] - sources[0].layers[0],
            )
            for sources in rows
        )
    )


def _check_numbers_of_sources(content: MergekitFile) -> None:
    """Refuses slices of more models than others, where one that is the base would count."""
    if content.described.method not in ("sce", "model_stock"):
        return
    first, *remaining = content.slices
    for part in remaining:
        if len(part.sources) != len(first.sources):
            raise MergeError(
                f"{content.file}: {part.place} has {len(part.sources)} sources, {first.place} "
                f"{len(first.sources)}: {content.kind} takes as many in each slice"
            )


def _check_complete(content: MergekitFile, sources: Sequence[SliceSource], layers: int) -> None:
    """Refuses slices of one model that have not each of its layers once."""
    times = collections.Counter(layer for source in sources for layer in range(*source.layers))
    for problem, numbers in (
        ("leave out", [layer for layer in range(layers) if not times[layer]]),
        ("overlap: they repeat", [layer for layer, count in times.items() if count > 1]),
    ):
        if numbers:
            listed = ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
            raise MergeError(
                f"{content.file}: slices {problem} layer{'s'[: len(numbers) > 1]} {listed} of "
                f"{sources[0].model}, which has {layers}; passthrough alone may"
            )


def _whole(sources: Sequence[SliceSource], opened: Mapping[str, Checkpoint]) -> Iterator[_Tensor]:
    first = opened[sources[0].model]
    layers, theirs = layerwise.Layers(first.parameters), _theirs(first)
    for name in first.parameters:
        known = theirs.get(name, name)
        yield _Tensor(name, known, 0, (known,) * len(sources), layers.position([name]))


def _sliced(slices: Slices, opened: Mapping[str, Checkpoint]) -> Iterator[_Tensor]:
    theirs = {path: _theirs(checkpoint) for path, checkpoint in opened.items()}
    first, *remaining = slices.origins(opened)
    for name, origin in first.items():
        origins = [origin, *(each.get(name, origin) for each in remaining)]
        names = tuple(theirs[each.path].get(each.name, each.name) for each in origins)
        known = names[0] if theirs[origin.path] else name
        yield _Tensor(name, known, origin.slice, names, origin.position)


def _theirs(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns Hugging Face's names of parameters that are called otherwise here."""
    if checkpoint.native or not checkpoint.model:
        return {}
    from m2l import models
    from m2l.checkpoints import huggingface

    origins = huggingface.origins(models.from_dict(checkpoint.model))
    return {name: origin.tensor for name, origin in origins.items()}


Numbers: TypeAlias = dict[str, float | tuple[float, ...]]
"""Of a tensor, m2l's hyper-parameters: a number, or one for each expert."""


class _Resolver:
    """The parameters of a file, for each tensor.

    Args:
        content: The file.
        ordered: Of each slice the models, in the order of the inputs.
    """

    def __init__(self, content: MergekitFile, ordered: Sequence[Sequence[SliceSource]]):
        self._content, self._kind = content, content.described
        self._ordered = ordered
        self._experts = max(map(len, ordered)) - _has_base(content.described)
        self._unmatched = {
            text
            for settings in (
                content.parameters,
                *(part.parameters for part in content.slices),
                *(source.parameters for sources in ordered for source in sources),
            )
            for setting in settings.values()
            for text, _ in setting
            if text is not None
        }

    def settings(self, tensors: Sequence[_Tensor]) -> dict[str, Json]:
        """Returns the settings of a recipe, without those of the preset.

        Raises:
            MergeError: A tensor has no number, or m2l cannot do what the file asks for.
        """
        rows: dict[str, Numbers] = {}
        flags: dict[str, bool] = {}
        for tensor in tensors:
            shared = {
                name: self._shared(tensor, name, default)
                for name, default in self._kind.shared.items()
            }
            for name in set(FLAGS) & set(shared):
                if flags.setdefault(name, bool(shared[name])) != bool(shared[name]):
                    raise MergeError(
                        f"{self._content.file}: {name} is true for some tensors and not for others"
                    )
            rows[tensor.name] = self._numbers(tensor, shared)
        for text in sorted(self._unmatched):
            warnings.warn(f"{self._content.file}: filter {text!r} is of no tensor", stacklevel=3)
        names = next(iter(rows.values()), {})
        settings: dict[str, Json] = {
            each: _compressed({name: numbers[each] for name, numbers in rows.items()})
            for each in names
        }
        return settings | self._variants(flags)

    def _variants(self, flags: Mapping[str, bool]) -> dict[str, Json]:
        method = self._kind.method
        described = METHODS[method]
        if self._content.kind == "linear" and not flags["normalize"]:
            method = "weighted_sum"
        if not flags.get("nuslerp_flatten", True):
            method += "_columns" if flags["nuslerp_row_wise"] else "_rows"
        variants: dict[str, Json] = {"method": method}
        if described.elects:
            variants["consensus"] = "mean" if flags.get("normalize", True) else "sum"
        if described.draws:
            variants["rescale"] = "norm" if flags["rescale"] else "none"
        refused = "filter_wise" if flags.get("filter_wise") else None
        if flags.get("rescale") and described.trims and not described.draws:
            refused = "rescale"
        if refused:
            raise MergeError(
                f"{self._content.file}: {self._content.kind} with {refused} is nothing that m2l has"
            )
        return variants

    def _shared(self, tensor: _Tensor, name: str, default: float | None) -> float:
        scopes = (self._content.slices[tensor.part].parameters, self._content.parameters)
        return self._value(name, tensor.known, tensor.position, scopes, default, None)

    def _own(self, tensor: _Tensor, name: str, default: float | None) -> tuple[float, ...]:
        part = self._content.slices[tensor.part]
        sources = self._ordered[tensor.part][_has_base(self._kind) :]
        names = tensor.names[_has_base(self._kind) :]
        values = [
            self._value(
                name,
                own,
                tensor.position,
                (source.parameters, part.parameters, self._content.parameters),
                default,
                source.model,
            )
            for source, own in zip(sources, names, strict=False)
        ]
        missing = 0.0 if name == "weight" else default
        return (*values, *[missing] * (self._experts - len(values)))

    def _value(
        self,
        name: str,
        tensor: str,
        position: float,
        scopes: Sequence[Settings],
        default: float | None,
        model: str | None,
    ) -> float:
        for settings in scopes:
            for text, value in settings.get(name, ()):
                if text is None or text in tensor:
                    self._unmatched.discard(text)
                    return value.at(position) if isinstance(value, Gradient) else value
        if default is None:
            raise MergeError(
                f"{self._content.file}: {model or self._content.kind} has no {name} for {tensor}"
            )
        return default

    def _numbers(self, tensor: _Tensor, shared: Mapping[str, float]) -> Numbers:
        """Returns m2l's hyper-parameters of a tensor."""
        own = {name: self._own(tensor, name, value) for name, value in self._kind.own.items()}
        method = self._kind.method
        count = len(self._ordered[tensor.part]) - _has_base(self._kind)
        match method:
            case "model_stock" | "arcee_fusion":
                return {}
            case "slerp":
                return {"t": shared["t"] if len(self._ordered[tensor.part]) == 2 else 0.0}
            case "average" | "weighted_sum":
                return {"weights": own.get("weight") or own["scale"]}
            case "nuslerp" | "task_nuslerp":
                return {"weights": own["weight"]}
            case "multislerp" | "task_multislerp":
                if shared["eps"] != 1e-8:
                    raise MergeError(f"{self._content.file}: multislerp's eps is 1e-8 here")
                if count == 1:  # Which is itself, whatever its weight.
                    return {"weights": (1.0, *(0.0,) * (self._experts - 1)), "scale": 1.0}
                scale = 1.0 if shared["normalize_weights"] else abs(sum(own["weight"]))
                return {"weights": own["weight"], "scale": scale}
            case "karcher":
                most = METHODS[method].hyper_parameters["iterations"].interval
                if shared["max_iter"] not in most:
                    raise MergeError(
                        f"{self._content.file}: parameters.max_iter must be {most}, not "
                        f"{shared['max_iter']:g}"
                    )
                numbers = {"iterations": shared["max_iter"], "tolerance": shared["tol"]}
                if len({*map(len, self._ordered)}) == 1:
                    return numbers
                return numbers | {"weights": (1.0,) * count + (0.0,) * (self._experts - count)}
            case "nearswap":
                return {"nearness": max(0.0, shared["t"])}
            case "ram":
                return {"epsilon": shared["epsilon"]}
            case "ram_plus":
                names = {"reinforcement": "r", "overlap_limit": "alpha", "epsilon": "epsilon"}
                return {ours: shared[name] for ours, name in names.items()}
            case "sce":
                density = shared["select_topk"]
                return {"density": min(density, 1.0) if density > 0 else 1.0,
                        "scale": float(density > 0)}  # fmt: skip
        weights, densities = own["weight"], own["density"]
        described = METHODS[method]
        total = sum(weights)
        if shared["normalize"] and not described.elects and abs(total) >= 1e-8:
            weights = tuple(weight / total for weight in weights)
        if described.trims or described.draws:
            # Where nothing is left, nothing is added.
            weights = tuple(w * (d > 0) for w, d in zip(weights, densities, strict=True))
        densities = tuple(min(d, 1.0) if d > 0 else 1.0 for d in densities)
        numbers: Numbers = {"weights": weights, "scale": shared["lambda"]}
        if described.draws:
            numbers["drop_rate"] = tuple(1 - d for d in densities)
        elif described.trims:
            numbers["density"] = densities
        # What it keeps all of it leaves alone; otherwise the density counts before the rest.
        for name in ("gamma", "epsilon"):
            if name in own:
                most = math.nextafter(1.0, 0.0) if name == "gamma" else 1.0
                numbers[name] = tuple(
                    0.0 if d == 1 else min(each, most)
                    for each, d in zip(own[name], densities, strict=True)
                )
        return numbers


def _compressed(numbers: Mapping[str, float | tuple[float, ...]]) -> Json:
    """Returns the numbers of all tensors as a value of a recipe, in few words."""

    def spelled(value: float | tuple[float, ...]) -> Json:
        return list(value) if isinstance(value, tuple) else value

    ((common, times),) = collections.Counter(numbers.values()).most_common(1)
    if times == len(numbers):
        return spelled(common)
    layers: dict[str, dict[str, float | tuple[float, ...]]] = {}
    for name, value in numbers.items():
        layer = LAYER.match(name)
        layers.setdefault(f"{layer[1]}{layer[2]}" if layer else name, {})[name] = value
    entries: list[Json] = []
    for layer, values in layers.items():
        first = next(iter(values.values()))
        if len(values) > 1 and len({*values.values()}) == 1:
            if first != common:
                separator = next(iter(values))[len(layer)]
                entries.append([f"{layer}{separator}*", spelled(first)])
        else:
            entries += [[n, spelled(value)] for n, value in values.items() if value != common]
    return [*entries, ["*", spelled(common)]]

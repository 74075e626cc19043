"""mergekit's YAML files (github.com/arcee-ai/mergekit 0.1.5): what they say, checked by itself."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from m2l import storage
from m2l.data import yaml_text
from m2l.errors import MergeError, UnknownNameError
from m2l.merging.layerwise import Gradient
from m2l.merging.recipe import DTYPES
from m2l.storage import AnyPath
from m2l.typing import Json

Setting: TypeAlias = list[tuple[str | None, float | Gradient]]
"""Of a parameter: values by filters of tensors' names, None being all; the first counts."""

Settings: TypeAlias = Mapping[str, Setting]

_KEYS = (
    *("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
_TASK_VECTORS = {"normalize": 0.0, "rescale": 0.0, "lambda": 1.0, "int8_mask": 0.0}
_TIES = _TASK_VECTORS | {"normalize": 1.0}
_DROPS = _TASK_VECTORS | {"rescale": 1.0}
_NUSLERP = {"nuslerp_flatten": 1.0, "nuslerp_row_wise": 0.0}
_MULTISLERP = {"normalize_weights": 1.0, "eps": 1e-8}


class Kind(NamedTuple):
    """A method of mergekit's.

    Attributes:
        method: m2l's.
        shared: Parameters of all models together, with their defaults; None: required.
        own: Parameters of each model but the base, likewise.
    """

    method: str
    shared: Mapping[str, float | None]
    own: Mapping[str, float | None]


KINDS = {
    "linear": Kind("average", {"normalize": 1.0}, {"weight": None}),
    "passthrough": Kind("weighted_sum", {}, {"scale": 1.0}),
    "slerp": Kind("slerp", {"t": None}, {}),
    "model_stock": Kind("model_stock", {"filter_wise": 0.0}, {}),
    "task_arithmetic": Kind("task_arithmetic", _TASK_VECTORS, {"weight": None, "density": 1.0}),
    "ties": Kind("ties", _TIES, {"weight": None, "density": 1.0}),
    "dare_linear": Kind("dare", _DROPS, {"weight": None, "density": 1.0}),
    "dare_ties": Kind("dare_ties", _DROPS, {"weight": None, "density": 1.0}),
    "breadcrumbs": Kind(
        "breadcrumbs", _TASK_VECTORS, {"weight": None, "density": 1.0, "gamma": 0.01}
    ),
    "della": Kind(
        "della",
        _DROPS | {"normalize": 1.0},
        {"weight": None, "density": 1.0, "epsilon": 0.15},
    ),
    "della_linear": Kind("della_linear", _DROPS, {"weight": None, "density": 1.0, "epsilon": 0.15}),
    "breadcrumbs_ties": Kind(
        "breadcrumbs_ties", _TASK_VECTORS, {"weight": None, "density": 1.0, "gamma": 0.01}
    ),
    "nuslerp": Kind("nuslerp", _NUSLERP, {"weight": None}),
    "multislerp": Kind("multislerp", _MULTISLERP, {"weight": None}),
    "karcher": Kind("karcher", {"max_iter": 10.0, "tol": 1e-5}, {}),
    "nearswap": Kind("nearswap", {"t": None}, {}),
    "ram": Kind("ram", {"epsilon": 1e-5}, {}),
    "ramplus_tl": Kind("ram_plus", {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, {}),
    "arcee_fusion": Kind("arcee_fusion", {}, {}),
    "sce": Kind("sce", {"int8_mask": 0.0, "select_topk": 1.0}, {}),
}
_WITH_BASE = {
    "nuslerp": KINDS["nuslerp"]._replace(method="task_nuslerp"),
    "multislerp": KINDS["multislerp"]._replace(method="task_multislerp"),
}
"""Methods of which a base makes others, of task vectors."""
_WITHOUT_BASE = ("average", "weighted_sum", "nuslerp", "multislerp", "karcher")
_PARAMETERS = {n for kind in KINDS.values() for n in (*kind.shared, *kind.own)}
# They have one value for all tensors, as a recipe has.
FLAGS = ("normalize", "rescale", "filter_wise", "int8_mask", "nuslerp_flatten", "nuslerp_row_wise")


@dataclasses.dataclass(frozen=True)
class SliceSource:
    """A model of a slice: its path, the first layer and that after the last, its parameters."""

    model: str
    layers: tuple[int, int] | None
    parameters: Settings


@dataclasses.dataclass(frozen=True)
class OutputSlice:
    """Consecutive layers of the result, or all."""

    place: str
    sources: tuple[SliceSource, ...]
    base: str | None
    parameters: Settings


@dataclasses.dataclass(frozen=True)
class MergekitFile:
    """What a file says, checked by itself.

    Attributes:
        file: The file.
        kind: What mergekit calls its method.
        described: Its method.
        slices: What it merges.
        parameters: Of the file.
        dtype: Of the result; None: that of the first model.
        base: Its base_model.
        tokenizer: Which tokenizer the result has, as a recipe says it, but for models' names; None:
            that of the models, which then agree.
    """

    file: AnyPath
    kind: str
    described: Kind
    slices: tuple[OutputSlice, ...]
    parameters: Settings
    dtype: str | None
    base: str | None
    tokenizer: Mapping[str, Json] | None


def read(file: AnyPath) -> MergekitFile:
    """Reads a file of mergekit's.

    Raises:
        MergeError: It is not one, or has what m2l has no counterpart of; says where.
        UnknownNameError: A key or method is not known.
        DataError: It is no YAML.
    """
    file = storage.path(file)
    if not file.is_file():
        raise MergeError(f"{file}: no such file")
    content = yaml_text.load(file.read_text(), f"{file}: not YAML that can be read")
    top = _mapping(f"{file}", content, _KEYS)
    name = top.get("merge_method")
    if name not in KINDS:
        raise UnknownNameError(f"merge_method in {file}:", str(name), KINDS)
    both = [key for key in ("models", "slices") if top.get(key)]
    if len(both) != 1:
        raise MergeError(
            f"{file}: it must have models or slices, not {' and '.join(both) or 'none'}"
        )
    parts = [top, *(each for each in top.get("slices") or () if isinstance(each, Mapping))]
    has_base = any(part.get("base_model") is not None for part in parts)
    kind = _WITH_BASE.get(name, KINDS[name]) if has_base else KINDS[name]
    reader = _Reader(f"{file}", kind)
    base = reader.model("base_model", top.get("base_model"))
    if top.get("models"):
        models = [
            reader.source(f"models[{i}]", each, ("model", "parameters"))
            for i, each in enumerate(_list(f"{file}: models", top["models"]))
        ]
        if base is not None and base not in [source.model for source in models]:
            models.append(SliceSource(base, None, {}))
        slices = [OutputSlice("models", tuple(models), base, {})]
    else:
        slices = [
            reader.slice(f"slices[{i}]", each, base)
            for i, each in enumerate(_list(f"{file}: slices", top["slices"]))
        ]
    dtype = top.get("out_dtype") or top.get("dtype")
    if dtype is not None:
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise UnknownNameError(f"dtype in {file}:", dtype, DTYPES)
    parameters = reader.parameters("parameters", top.get("parameters"), shared=True)
    for each in slices:
        reader.check(each)
    tokenizer = reader.tokenizer(top)
    return MergekitFile(file, name, kind, tuple(slices), parameters, dtype, base, tokenizer)


class _Reader:
    """Reads the parts of a file.

    Args:
        file: Its name, for messages.
        kind: Its method.
    """

    def __init__(self, file: str, kind: Kind):
        self._file, self._kind = file, kind

    def model(self, place: str, value: Json) -> str | None:
        """Returns a model's path, with its adapter."""
        if isinstance(value, Mapping):
            fields = _mapping(f"{self._file}: {place}", value, ("model", "lora"))
            parts = [
                self.path(f"{place}.{k}", fields[k]) for k in ("model", "lora") if fields.get(k)
            ]
            return "+".join(parts)
        return None if value is None else self.path(place, value)

    def path(self, place: str, value: Json) -> str:
        """Returns a path, with its revision."""
        if isinstance(value, Mapping):
            fields = _mapping(f"{self._file}: {place}", value, ("path", "revision"))
            value = "@".join(str(fields[key]) for key in ("path", "revision") if fields.get(key))
        if not isinstance(value, str) or not value:
            raise MergeError(f"{self._file}: {place} must be the path of a model, not {value!r}")
        return value

    def source(self, place: str, value: Json, keys: Sequence[str]) -> SliceSource:
        """Returns a model of `models`, or of a slice's `sources`."""
        fields = _mapping(f"{self._file}: {place}", value, keys)
        model = self.model(f"{place}.model", fields.get("model"))
        if model is None:
            raise MergeError(f"{self._file}: {place} names no model")
        layers = None
        if "layer_range" in keys:
            layers = fields.get("layer_range")
            if not (
                isinstance(layers, list)
                and [type(each) for each in layers] == [int, int]
                and 0 <= layers[0] < layers[1]
            ):
                raise MergeError(
                    f"{self._file}: {place}.layer_range must be the first layer and that after the "
                    f"last, such as [0, 16], not {layers!r}"
                )
            layers = tuple(layers)
        parameters = self.parameters(f"{place}.parameters", fields.get("parameters"), shared=False)
        return SliceSource(model, layers, parameters)

    def slice(self, place: str, value: Json, base: str | None) -> OutputSlice:
        """Returns an entry of `slices`."""
        fields = _mapping(f"{self._file}: {place}", value, ("sources", "base_model", "parameters"))
        sources = [
            self.source(f"{place}.sources[{i}]", each, ("model", "layer_range", "parameters"))
            for i, each in enumerate(_list(f"{self._file}: {place}.sources", fields.get("sources")))
        ]
        lengths = {last - first for first, last in (each.layers for each in sources)}
        if len(lengths) > 1:
            ranges = ", ".join(str(list(each.layers)) for each in sources)
            raise MergeError(
                f"{self._file}: {place}: its sources have other numbers of layers: {ranges}"
            )
        own_base = self.model(f"{place}.base_model", fields.get("base_model"))
        parameters = self.parameters(f"{place}.parameters", fields.get("parameters"), shared=True)
        return OutputSlice(place, tuple(sources), own_base or base, parameters)

    def parameters(self, place: str, value: Json, *, shared: bool) -> Settings:
        """Returns the parameters of a source, or of what has those of all together as well."""
        if value is None:
            return {}
        place = f"{self._file}: {place}"
        settings = {}
        for name, each in _mapping(place, value, _PARAMETERS).items():
            if name in self._kind.own or (shared and name in self._kind.shared):
                settings[name] = _setting(f"{place}.{name}", each)
            else:
                warnings.warn(f"{place}.{name} has no effect there: ignored", stacklevel=5)
        return settings

    def tokenizer(self, top: Mapping[str, Json]) -> dict[str, Json] | None:
        """Returns what the file says of the tokenizer, as a recipe says it; models by name."""
        value = top.get("tokenizer")
        if value is not None and top.get("tokenizer_source") is not None:
            raise MergeError(f"{self._file}: it must have tokenizer or tokenizer_source, not both")
        choice: dict[str, Json] = {}
        if value is not None:
            place = f"{self._file}: tokenizer"
            fields = _mapping(place, value, ("source", "tokens", "pad_to_multiple_of"))
            choice["source"] = self.model("tokenizer.source", fields.get("source") or "union")
            if fields.get("pad_to_multiple_of") is not None:
                choice["pad_to"] = fields["pad_to_multiple_of"]
            tokens = fields.get("tokens") or {}
            if not isinstance(tokens, Mapping):
                raise MergeError(f"{place}.tokens: expected tokens and their sources")
            choice["tokens"] = {
                str(token): self._token(f"tokenizer.tokens.{token}", each)
                for token, each in tokens.items()
            }
        elif top.get("tokenizer_source") is not None:
            choice["source"] = self.model("tokenizer_source", top["tokenizer_source"])
        template = top.get("chat_template")
        if template is not None:
            if template != "auto" and "{" not in str(template):
                raise MergeError(
                    f"{self._file}: chat_template {template!r}: m2l has no template of this name; "
                    "write the template itself, or auto"
                )
            choice = {"source": "base", **choice, "chat_template": template}
        return choice or None

    def _token(self, place: str, value: Json) -> dict[str, Json]:
        fields = _mapping(f"{self._file}: {place}", value, ("source", "force"))
        source, token = fields.get("source"), {"force": bool(fields.get("force"))}
        kind = source.get("kind") if isinstance(source, Mapping) else None
        if kind == "zero":
            return token | {"source": "zero"}
        if kind == "model_token":
            keys = ("kind", "model", "token", "token_id")
            named = _mapping(f"{self._file}: {place}.source", source, keys)
            source, names = named.get("model"), [named.get("token"), named.get("token_id")]
            token["token"] = next((each for each in names if each is not None), None)
        model = self.model(f"{place}.source", source)
        if model is None:
            raise MergeError(f"{self._file}: {place} has no source")
        return token | {"source": model}

    def check(self, part: OutputSlice) -> None:
        """Refuses a slice whose models are not what the method takes."""
        place, models = f"{self._file}: {part.place}", [each.model for each in part.sources]
        count, method = len(models), self._kind.method
        if len({*models}) < count and method != "average":
            raise MergeError(f"{place}: a model is there twice")
        if method == "weighted_sum" and count != 1:
            raise MergeError(f"{place}: passthrough takes one model, not {count}")
        needs_base = method not in _WITHOUT_BASE
        if needs_base and (part.base is None or part.base not in models):
            raise MergeError(f"{place}: base_model must be one of its models, not {part.base}")
        if method == "slerp" and count > 2:
            raise MergeError(
                f"{place}: slerp takes two models, of which one is the base, not {count}"
            )


def _mapping(place: str, value: Json, known: Iterable[str]) -> dict[str, Json]:
    known = list(known)
    if not isinstance(value, Mapping):
        raise MergeError(
            f"{place}: expected keys and values ({', '.join(known)}), not {value!r:.60}"
        )
    for key in value:
        if key not in known:
            raise UnknownNameError(f"key in {place}:", str(key), known)
    return dict(value)


def _list(place: str, value: Json) -> list[Json]:
    if not isinstance(value, list) or not value:
        raise MergeError(f"{place} must be a list, not {value!r:.60}")
    return value


def _setting(place: str, value: Json) -> Setting:
    """Returns a setting: a number, a gradient, or these by filters."""
    values = value if isinstance(value, list) else [value]
    if not values or not any(isinstance(each, Mapping) for each in values):
        return [(None, _number_or_gradient(place, value))]
    setting: Setting = []
    for i, each in enumerate(values):
        fields = _mapping(f"{place}[{i}]", each, ("filter", "value"))
        if "value" not in fields:
            raise MergeError(f"{place}[{i}]: it has no value")
        text = fields.get("filter")
        if text is not None and not isinstance(text, str):
            raise MergeError(f"{place}[{i}].filter must be a part of tensors' names, not {text!r}")
        number = _number_or_gradient(f"{place}[{i}].value", fields["value"])
        setting.append((None if text == "*" else text, number))
    return setting


def _number_or_gradient(place: str, value: Json) -> float | Gradient:
    if not isinstance(value, list):
        return _number(place, value)
    points = tuple(_number(f"{place}[{i}]", each) for i, each in enumerate(value))
    if not points:
        raise MergeError(f"{place}: a gradient of no numbers; expected e.g. [0, 0.5, 1]")
    return points[0] if len(points) == 1 else Gradient(points)


def _number(place: str, value: Json) -> float:
    # YAML reads 1e-3 as a text.
    try:
        return float(value)
    except (TypeError, ValueError):
        raise MergeError(f"{place} must be a number, not {value!r:.60}") from None

"""How to merge, as data: recipes, those of other codebases, and what one needs to know first.

A recipe is checked when it is made, and kept in the manifest of what it makes.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import jax
import numpy as np

from m2l import files, storage
from m2l.errors import MergeError, UnknownNameError
from m2l.merging import layerwise, randomness
from m2l.merging.layerwise import Value
from m2l.merging.method_registry import METHODS, VARIANTS, Method, hyper_parameters
from m2l.merging.methods import Consensus
from m2l.merging.thresholds import BINS
from m2l.merging.tokenizer_choice import TokenizerChoice
from m2l.storage import AnyPath
from m2l.typing import Json

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, init=False)
class Recipe:
    """A merge method with its hyper-parameters: Recipe("ties", density=0.2, scale=1.0).

    What a method has for hyper-parameters, with their ranges and defaults, its signature says
    (`m2l merge --list`); each can be read as an attribute too, as recipe.density. The last five
    attributes are where codebases differ; the defaults are the papers', and `presets.PRESETS` has
    those of others.

    Attributes:
        method: One of METHODS.
        hyper_parameters: All of the method's, by name: a number, or one for each expert, a
            gradient over layers, or numbers by patterns of names; see `layerwise`.
        scales: (pattern, scale) or (pattern, weights): what parameters that match the shell pattern
            take instead of `scale` or `weights`. The first pattern that matches counts.
        seed: Of the random drops; methods that draw nothing ignore it.
        dtype: Of the result; the arithmetic is always float32.
        exclude: Patterns (`token_embedder`, `*norm`, as in a shell) of parameters that are not
            merged but taken from the base, or from the first expert where there is no base. They do
            not count among the largest entries either.
        scope: What "the largest entries" are taken over: "model", all parameters of an expert as in
            the papers, or "tensor", each parameter by itself as mergekit and PEFT do; the default
            is the method's (see `Method.scope`): of breadcrumbs, della and sce "tensor".
        consensus: What TIES and its kin do with entries that agree: "mean", "sum" or "max".
        weighted_signs: Whether the weights count in the election of signs.
        zero_sign: Which sign is elected where masses cancel exactly: "none" (the entry is the
            base's), "positive", or "majority": that of most of the model's other entries; where
            those cancel too it is negative, or, with "majority_or_none", none.
        keep: How many of d entries density keeps: "floor" int(d density), "at_least_one" that but
            not none, "one_more" that and one, "complement" d - int(d (1 - density)) + 1; entries
            that tie with the last are all kept.
        rescale: What is done to entries that are not dropped: "expectation" divides them by
            1 - p, "norm" multiplies them so that the parameter's L1 norm stays, "none" nothing.
        tokenizer: Which tokenizer the result gets, where those of the models differ: "base",
            "union", "expert_0", ..., or with further settings a `TokenizerChoice`, or that as
            JSON-like data. None: the models' must agree.

    Raises:
        MergeError: A setting is of the wrong type, out of range, missing, or not the method's.
        UnknownNameError: The method is not known.
    """

    method: str
    hyper_parameters: Mapping[str, Value] = dataclasses.field(hash=False)
    scales: tuple[tuple[str, Value], ...]
    seed: int
    scope: str
    dtype: str
    exclude: tuple[str, ...]
    consensus: str
    weighted_signs: bool
    zero_sign: str
    keep: str
    rescale: str
    tokenizer: TokenizerChoice | None

    def __init__(
        self,
        method: str,
        hyper_parameters: Mapping[str, object] = MappingProxyType({}),
        *,
        scales: Sequence[tuple[str, Value]] = (),
        seed: int = 0,
        scope: str | None = None,
        dtype: str = "float32",
        exclude: Sequence[str] = (),
        consensus: str = "mean",
        weighted_signs: bool = False,
        zero_sign: str = "none",
        keep: str = "floor",
        rescale: str = "expectation",
        tokenizer: TokenizerChoice | Mapping[str, Json] | str | None = None,
        **settings: object,
    ):
        if not isinstance(method, str) or method not in METHODS:
            raise UnknownNameError("merge method", str(method), METHODS)
        described = METHODS[method]
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise MergeError(f"seed must be a whole number, not {seed!r}")
        if not isinstance(weighted_signs, bool):
            raise MergeError(f"weighted_signs must be true or false, not {weighted_signs!r}")
        if not isinstance(exclude, list | tuple) or not all(isinstance(e, str) for e in exclude):
            raise MergeError(f"exclude must be a list of patterns, not {exclude!r}")
        variants = {
            "scope": described.scope if scope is None else scope,
            "consensus": consensus,
            "zero_sign": zero_sign,
            "keep": keep,
            "rescale": rescale,
        }
        check_variants(described, variants, weighted_signs)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UnknownNameError("dtype", str(dtype), DTYPES)
        values = _checked(described, {**hyper_parameters, **settings})
        fields = {
            "method": method,
            "hyper_parameters": values,
            "scales": _checked_scales(described, values, scales),
            "seed": seed,
            "dtype": dtype,
            "exclude": tuple(exclude),
            "weighted_signs": weighted_signs,
            "tokenizer": TokenizerChoice.checked(tokenizer),
        }
        for name, value in (fields | variants).items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Value:
        try:
            return self.__dict__["hyper_parameters"][name]
        except KeyError:
            raise AttributeError(f"the recipe has no {name}") from None

    @property
    def election(self) -> Consensus:
        """How signs are elected, for `methods.elect_and_merge`."""
        return Consensus(self.consensus, self.weighted_signs)

    @property
    def varies(self) -> bool:
        """Whether any hyper-parameter is not the same for all parameters."""
        return bool(self.scales) or any(map(layerwise.varies, self.hyper_parameters.values()))

    def values_of(self, names: Sequence[str]) -> dict[str, Value]:
        """Returns the method's hyper-parameters for a parameter that is known by these names."""
        values = dict(self.hyper_parameters)
        for pattern, value in self.scales:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                values[_scaled_name(value)] = value
                break
        return values

    def spell(self, name: str) -> str:
        """Returns a hyper-parameter as people read it."""
        value = self.hyper_parameters[name]
        return f"{value:g}" if isinstance(value, float) else str(layerwise.to_json(value))

    def identity(self, base: str | None, experts: Sequence[str]) -> str:
        """Returns the SHA-256 of the digests of checkpoints and of how they are merged."""
        content = json.dumps([base, list(experts), self.to_dict()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def to_dict(self) -> dict[str, Json]:
        """Returns the recipe as JSON-like data, defaults filled in, without what does not apply."""
        described = METHODS[self.method]
        applies = {name: described.has_variant(name) for name in VARIANTS}
        applies |= {"seed": described.draws, "weighted_signs": described.elects}
        applies["tokenizer"] = self.tokenizer is not None
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "hyper_parameters" and applies.get(field.name, True)
        }
        values = {
            name: layerwise.to_json(value)
            for name, value in self.hyper_parameters.items()
            if value != ()
        }
        return json.loads(json.dumps(fields | values, default=TokenizerChoice.to_dict))

    @classmethod
    def from_dict(cls, values: Mapping[str, Json], label: str = "the recipe") -> "Recipe":
        """Returns the recipe of JSON-like data, such as a manifest holds; messages name `label`.

        Raises:
            MergeError: A setting is unknown, or as the class says.
        """
        known = {field.name for field in dataclasses.fields(cls)} | {*hyper_parameters()}
        for name in values:
            if name not in known - {"hyper_parameters"}:
                raise UnknownNameError(f"setting in {label}:", name, known)
        if "method" not in values:
            raise MergeError(f"{label}: it names no method")
        return cls(**values)

    @classmethod
    def read(cls, file: AnyPath, **overrides: Json) -> "Recipe":
        """Returns the recipe in a JSON file, some settings overridden.

        Raises:
            MergeError: It cannot be read, or as `from_dict` says.
        """
        file = storage.path(file)
        advice = "if it was edited on purpose, remove its checksum"
        values = files.read_record(
            file, required=False, finite=True, error=MergeError, advice=advice
        )
        values = values.get("recipe", values)
        if not isinstance(values, dict):
            raise MergeError(f"{file}: its recipe is not a JSON object")
        return cls.from_dict(values | overrides, str(file))


def _scaled_name(value: object) -> str:
    """Returns the hyper-parameter that an entry of `scales` stands for."""
    return "weights" if isinstance(value, list | tuple) else "scale"


def check_variants(method: Method, variants: Mapping[str, str], weighted_signs: bool) -> None:
    """Refuses values of VARIANTS, and `weighted_signs`, that are unknown or not the method's.

    Raises:
        MergeError, UnknownNameError: One is.
    """
    for name, value in variants.items():
        choices = VARIANTS[name].choices
        if value not in choices:
            raise UnknownNameError(name, str(value), choices)
        if value != choices[0] and not method.has_variant(name):
            raise MergeError(f"{method.name} has no {name}")
    if weighted_signs and not method.elects:
        raise MergeError(f"{method.name} has no weighted_signs")
    if (
        weighted_signs
        and method.coefficients
        and variants.get("zero_sign", "").startswith("majority")
    ):
        raise MergeError(
            f"{method.name} has no zero_sign {variants['zero_sign']} with weighted_signs: masses "
            "are weighted by what is computed of them"
        )


def _checked(method: Method, settings: Mapping[str, object]) -> dict[str, Value]:
    """Returns the method's hyper-parameters with their defaults."""
    for name, value in settings.items():
        if value is not None and name not in method.hyper_parameters:
            known = ", ".join(method.hyper_parameters) or "none"
            raise MergeError(f"{method.name} has no {name}; its settings are: {known}")
    values: dict[str, Value] = {}
    for name, hyper_parameter in method.hyper_parameters.items():
        value = settings.get(name)
        if value is None and hyper_parameter.default is None:
            raise MergeError(f"{method.name} needs a {name}, such as 0.5: none is agreed on")
        equal_weights = hyper_parameter.per_expert and value == ()
        if value is None or equal_weights:
            value = hyper_parameter.default
        values[name] = value if value == () else hyper_parameter.checked(value)
    _check_together(method, values)
    return values


def _check_together(method: Method, values: Mapping[str, Value]) -> None:
    # What varies is checked when it is known of which parameters and experts.
    plain = all(
        isinstance(value, float) or (hyper_parameter.per_expert and not layerwise.varies(value))
        for value, hyper_parameter in zip(
            values.values(), method.hyper_parameters.values(), strict=True
        )
    )
    if plain and (complaint := method.check(**values)):
        raise MergeError(complaint)


def _checked_scales(
    method: Method, values: Mapping[str, Value], scales: Sequence[object]
) -> tuple[tuple[str, Value], ...]:
    checked = []
    for entry in scales:
        if not isinstance(entry, list | tuple) or [type(each) for each in entry[:-1]] != [str]:
            raise MergeError(f"scales must be pairs of a pattern and a scale, not {entry!r}")
        pattern, value = entry
        name = _scaled_name(value)
        if name not in method.hyper_parameters:
            raise MergeError(f"{method.name} has no {name}, and so none for {pattern!r}")
        value = method.hyper_parameters[name].checked(value)
        _check_together(method, {**values, name: value})
        checked.append((pattern, value))
    return tuple(checked)


# How other codebases merge, for reproducing what was made with them

# Each was run, and tests compare with its output (tests/goldens/merge_goldens.*). No setting says
# that mergekit ranks della's magnitudes along rows, and of entries that tie with the last that is
# kept it keeps some, by an unstable sort; FusionBench averages angles in Model Stock, we their
# cosines.

_WHOLE_MODEL = {"keep": "one_more", "zero_sign": "majority"}
_BY_TENSOR = {"weighted_signs": True, "zero_sign": "positive"}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Json]]] = {
    # github.com/prateeky2806/ties-merging
    "official": {
        "ties": {"density": 0.2, "scale": 1.0, **_WHOLE_MODEL},
        "task_arithmetic": {"scale": 0.4},
    },
    # github.com/tanganke/fusion_bench 0.2.33: a sum, where the paper has a mean.
    "fusion_bench": {
        "average": {},
        "task_arithmetic": {"scale": 0.3},
        "ties": {"density": 0.2, "scale": 0.3, "consensus": "sum", **_WHOLE_MODEL},
        "dare": {"drop_rate": 0.5, "scale": 0.3},
        "dare_ties": {
            "drop_rate": 0.5,
            "density": 0.2,
            "scale": 0.5,
            "consensus": "sum",
            **_WHOLE_MODEL,
        },
        "slerp": {},
    },
    # github.com/yule-BUAA/MergeLM: its command does not rescale by default.
    "mergelm": {
        "average": {},
        "task_arithmetic": {},
        "ties": {
            "density": 0.2,
            "scale": 1.0,
            "keep": "complement",
            "zero_sign": "majority_or_none",
        },
        "dare": {"drop_rate": 0.1, "rescale": "none"},
        "dare_ties": {
            "drop_rate": 0.1,
            "rescale": "none",
            "density": 0.2,
            "keep": "complement",
            "zero_sign": "majority_or_none",
        },
        "fisher": {},
        "regmean": {},
    },
    # mergekit 0.1.5, whose `weight`s are `weights` here, and whose `density` of what is dropped at
    # random is 1 - drop_rate.
    "mergekit": {
        "average": {},
        "weighted_sum": {},
        "task_arithmetic": {},
        "ties": {"density": 1.0, "scope": "tensor", "keep": "at_least_one", **_BY_TENSOR},
        "dare": {"drop_rate": 0.0, "rescale": "norm"},
        "dare_ties": {"drop_rate": 0.0, "rescale": "norm", "consensus": "sum", **_BY_TENSOR},
        "breadcrumbs": {"density": 0.99, "gamma": 0.01, "scope": "tensor"},
        "della": {"drop_rate": 0.15, "epsilon": 0.15, "rescale": "norm", **_BY_TENSOR},
        "della_linear": {"drop_rate": 0.15, "epsilon": 0.15, "rescale": "norm"},
        "breadcrumbs_ties": {
            "density": 0.99,
            "gamma": 0.01,
            "scope": "tensor",
            "consensus": "sum",
            **_BY_TENSOR,
        },
        "sce": {"zero_sign": "positive"},
        "ram_plus": {"scope": "tensor"},
        "model_stock": {},
        **{name: {} for name in ("slerp", "karcher", "nearswap", "ram", "arcee_fusion")},
        **{
            f"{each}{name}": {}
            for each in ("", "task_")
            for name in ("nuslerp", "nuslerp_rows", "nuslerp_columns", "multislerp")
        },
    },
}
"""Name -> method -> settings that differ from m2l's own, or are the codebase's defaults."""


def preset(name: str, settings: Mapping[str, Json]) -> dict[str, Json]:
    """Returns the settings of a preset's method, overridden by `settings`, which name the method.

    Raises:
        UnknownNameError: There is no such preset, or it has no such method.
    """
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    method = settings.get("method")
    if method not in PRESETS[name]:
        raise UnknownNameError(f"method of the preset {name}:", str(method), PRESETS[name])
    return {**PRESETS[name][method], **settings}


# What must be known of whole models before a part of a parameter is merged: a merge that streams
# counts it in passes over files, a merge in memory on devices

Array = jax.Array | np.ndarray

TABLE = 1 << 16
"""Entries of a table by rank: by the upper 16 bits of a magnitude."""


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What a recipe for so many experts needs.

    Attributes:
        recipe: How to merge.
        experts: How many.
        names: Of every parameter of the model the names that patterns may match and layers are
            read off, the first being that by which random numbers are drawn. What is not in it
            has one name.
    """

    recipe: Recipe
    experts: int
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def method(self) -> Method:
        """The recipe's."""
        return METHODS[self.recipe.method]

    @property
    def norms(self) -> bool:
        """Whether L1 norms before and after entries are dropped are needed, for `rescale`."""
        return self.method.draws and self.recipe.rescale == "norm"

    @property
    def limits(self) -> bool:
        """Whether thresholds have to be searched for."""
        values = self.recipe.hyper_parameters
        return self.method.trims and (
            "largest" in self.method.inputs
            or any(density < 1 for density in layerwise.numbers(values["density"]))
            or any(layerwise.numbers(values.get("gamma", 0.0)))
        )

    @property
    def minimum(self) -> bool:
        """Whether the least of all magnitudes is a limit itself, and not taken to be 0."""
        return "largest" in self.method.inputs

    @functools.cached_property
    def bounds(self) -> "Bounds | None":
        """What `lowest` and `highest` need, which are searched before other limits."""
        if "lowest" not in self.method.inputs:
            return None
        recipe = Recipe("breadcrumbs", scope=self.recipe.scope)
        return Bounds(recipe, self.experts, self.names)

    @property
    def products(self) -> bool:
        """Whether inner products are needed, for `coefficients`."""
        return self.method.coefficients is not None

    @property
    def pooled(self) -> bool:
        """Whether sums, for `coefficients`, are of the model and not of each parameter."""
        return self.method.sums is not None and self.recipe.scope == "model"

    @property
    def majority(self) -> bool:
        """Whether the signs of all masses have to be counted, for `zero_sign`."""
        return self.recipe.zero_sign.startswith("majority")

    def copies(self, name: str) -> bool:
        """Returns whether a parameter is that of the only expert, bit for bit."""
        if self.experts != 1 or self.method.name not in ("average", "weighted_sum"):
            return False
        return bool(np.all(self.arguments(name)["weights"] == 1))

    def readings(self, sizes: Mapping[str, int]) -> int:
        """Returns how many times all is read before it is merged.

        Args:
            sizes: Name -> elements, of all that is merged.
        """
        limits = 0
        if self.limits:
            scopes = self.scopes(sizes)
            read = sum(sizes[name] for scope in scopes for name in scope.names)
            # A sample of all of a model spares a reading.
            shared = len(scopes) > 1 or self.recipe.scope == "tensor"
            shared |= self.method.magnitudes is not None
            limits = math.ceil(read / max(1, sum(sizes.values()))) * (1 + shared)
        counted = self.method.ranks + self.norms + (self.products or self.majority)
        return counted + limits + (self.bounds.readings(sizes) if self.bounds is not None else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of counts and tables."""
        counts = 8 * BINS * self.experts * len(self.untrimmed()) * 3
        return counts * self.method.trims + 8 * TABLE * self.experts * 4 * self.method.ranks

    @functools.cached_property
    def _layers(self) -> layerwise.Layers:
        return layerwise.Layers(name for names in self.names.values() for name in names)

    def arguments(
        self, name: str, dtype: type[np.floating] = np.float32
    ) -> dict[str, np.ndarray | np.floating]:
        """Returns the method's hyper-parameters for a parameter.

        Returns:
            Scalars; arrays [experts] where the method or the recipe has one for each expert.
        """
        names = self.names.get(name, (name,))
        position = self._layers.position(names)
        arguments = {}
        for each, value in self.recipe.values_of(names).items():
            by_expert = self.method.hyper_parameters[each].per_expert or layerwise.lists(value)
            values = [
                layerwise.number(1.0 if value == () else value, names, position, expert)
                for expert in range(self.experts)
            ]
            arguments[each] = np.array(values, dtype) if by_expert else dtype(values[0])
        return arguments

    def _by_expert(self, name: str) -> dict[str, np.ndarray]:
        """Returns the method's hyper-parameters for a parameter, float64 [experts] each."""
        arguments = self.arguments(name, np.float64)
        return {each: np.broadcast_to(value, self.experts) for each, value in arguments.items()}

    def resolved(self, names: Iterable[str]) -> dict[str, dict[str, Json]]:
        """Returns the numbers of parameters where they vary: by hyper-parameter and name.

        Raises:
            MergeError: They are not allowed together, or vary over layers where there are none.
        """
        recipe, method = self.recipe, self.method
        varying = {*(_scaled_name(value) for _, value in recipe.scales)}
        for each, value in recipe.hyper_parameters.items():
            if not layerwise.varies(value):
                continue
            varying.add(each)
            gradients = [v for v in layerwise.parts(value) if isinstance(v, layerwise.Gradient)]
            if gradients and not self._layers.longest:
                raise MergeError(
                    f"{each} {gradients[0]} is over layers, and no parameter's name has the number "
                    f"of one; the first is {next(iter(self.names), None)!r}"
                )
            for gradient in gradients:
                if len(gradient.points) > max(2, self._layers.longest):
                    raise MergeError(
                        f"{each} {gradient} has {len(gradient.points)} numbers for "
                        f"{self._layers.longest} layers: give at most one for each"
                    )
        numbers: dict[str, dict[str, Json]] = {each: {} for each in sorted(varying)}
        for name in names if numbers else [*names][:1]:
            arguments = self.arguments(name, np.float64)
            for each in numbers:
                numbers[each][name] = arguments[each].tolist()
            rows = [{k: float(v[e]) for k, v in self._by_expert(name).items()
                     if not method.hyper_parameters[k].per_expert}
                    for e in range(self.experts)]  # fmt: skip
            lists = {k: tuple(v.tolist()) for k, v in arguments.items()
                     if method.hyper_parameters[k].per_expert}  # fmt: skip
            for row in rows:
                if complaint := method.check(**row, **lists):
                    raise MergeError(f"{name}: {complaint}")
        return numbers

    def inputs(self, name: str) -> dict[str, np.ndarray | np.floating]:
        """Returns the inputs of a parameter, see `kernel.Inputs`, before anything is counted."""
        recipe, method = self.recipe, self.method
        inputs = self.arguments(name)
        if method.elects:
            inputs["zero_sign"] = np.float32(recipe.zero_sign == "positive")
        if method.trims and not self.limits:
            inputs |= self.untrimmed()
        if method.draws:
            rates = self._by_expert(name)["drop_rate"]
            drawn = self.names.get(name, (name,))[0]
            inputs["keys"] = randomness.keys(recipe.seed, self.experts, drawn)
            if not method.ranks:
                inputs["cut"] = np.array([randomness.cut(rate) for rate in rates], np.uint32)
            if not method.ranks or self.norms:
                rates = rates if recipe.rescale == "expectation" else 0 * rates
                inputs["rescale"] = np.float32(1 / (1 - rates))
        return inputs

    def untrimmed(self) -> dict[str, np.ndarray]:
        """Returns thresholds and ceilings that keep every entry, float32 [experts]."""
        limits = {"thresholds": np.zeros(self.experts, np.float32)}
        for name in {"ceilings", "largest"}.intersection(self.method.inputs):
            limits[name] = np.full(self.experts, np.inf, np.float32)
        return limits

    def ranks(self, size: int, name: str = "") -> dict[str, list[int]]:
        """Returns how many of the largest of `size` magnitudes each limit is the least of.

        These are the entries that thresholds keep, outliers included, and those that ceilings leave
        out, before ties with the last.

        Args:
            size: How many magnitudes.
            name: A parameter whose numbers count.

        Returns:
            By limit, one for each expert.
        """
        values = self._by_expert(name)
        counts = [self._kept(size, density) for density in values["density"].tolist()]
        if "largest" in self.method.inputs:
            return {"thresholds": counts, "largest": [min(1, size)] * self.experts}
        if "ceilings" not in self.method.inputs:
            return {"thresholds": counts}
        pairs = zip(values["gamma"].tolist(), counts, strict=True)
        outliers = [min(int(size * gamma), size - count) for gamma, count in pairs]
        both = [a + b for a, b in zip(outliers, counts, strict=True)]
        return {"thresholds": both, "ceilings": outliers}

    def _kept(self, size: int, density: float) -> int:
        """Returns how many of `size` entries a density keeps."""
        keep, floor = self.recipe.keep, int(size * density)
        if keep == "floor" and "largest" in self.method.inputs:
            return size - int(size * (1 - density))  # The last of them counts 0.
        if keep == "complement":
            return min(size, size - int(size * (1 - density)) + 1)
        if keep == "at_least_one":
            return min(size, max(1, floor))
        return min(size, floor + (keep == "one_more"))

    def scopes(self, sizes: Mapping[str, int]) -> list["Scope"]:
        """Returns what each limit is searched over.

        A parameter by itself, by the recipe's scope; or else, of each expert, all parameters whose
        numbers are equal: of most recipes the model.

        Args:
            sizes: Name -> elements, of all that is merged.
        """
        everyone = tuple(range(self.experts))
        if self.recipe.scope == "tensor":
            return [Scope((n,), everyone, self.ranks(sizes[n], n)) for n in sizes]
        if not self.recipe.varies:
            total = sum(sizes.values())
            return [Scope((*sizes,), everyone, self.ranks(total, next(iter(sizes))))]
        groups: list[dict[object, list[str]]] = [{} for _ in range(self.experts)]
        for name in sizes:
            values = self._by_expert(name)
            rows = zip(values["density"], values.get("gamma", values["density"]), strict=True)
            for by_number, row in zip(groups, rows, strict=True):
                by_number.setdefault(row, []).append(name)
        experts: dict[tuple[str, ...], list[int]] = {}
        for expert, by_number in enumerate(groups):
            for names in by_number.values():
                experts.setdefault(tuple(names), []).append(expert)
        scopes = []
        for names, members in experts.items():
            size = sum(sizes[name] for name in names)
            ranks = {
                limit: [rank if expert in members else size for expert, rank in enumerate(row)]
                for limit, row in self.ranks(size, names[0]).items()
            }
            scopes.append(Scope(names, tuple(members), ranks))
        return scopes

    def table(self, counts: np.ndarray, name: str = "") -> dict[str, np.ndarray]:
        """Returns cuts uint32 and rescales float32, [experts, TABLE]: drop rates by rank.

        Args:
            counts: How many entries have each upper 16 bits, [experts, TABLE].
            name: A parameter whose numbers count.
        """
        total = counts.sum(1, keepdims=True)
        below = np.cumsum(counts, 1) - counts
        ranks = (below + (counts - 1) / 2) / np.maximum(total - 1, 1)
        values = self._by_expert(name)
        rate, epsilon = values["drop_rate"][:, None], values["epsilon"][:, None]
        rates = rate + epsilon - 2 * epsilon * np.clip(ranks, 0, 1)
        rescales = 1 / (1 - rates) if self.recipe.rescale == "expectation" else np.ones_like(rates)
        return {"cuts": np.uint32(rates * 2**32), "rescales": np.float32(rescales)}

    def alike(self, names: Iterable[str]) -> list[list[str]]:
        """Returns the parameters in groups of equal drop rates."""
        if not self.recipe.varies:
            return [[*names]]
        groups: dict[tuple[bytes, bytes], list[str]] = {}
        for name in names:
            values = self._by_expert(name)
            key = values["drop_rate"].tobytes(), values["epsilon"].tobytes()
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def zero_sign(self, surplus: int) -> np.float32:
        """Returns the sign that is elected where masses cancel.

        Args:
            surplus: How many more of the model's masses are positive than negative.
        """
        undecided = -1 if self.recipe.zero_sign == "majority" else 0
        return np.float32(np.sign(surplus) or undecided)


OUTLIERS = 1e-4
"""The share of the smallest entries, and of the largest, that `lowest` and `highest` leave out."""


class Bounds(Requirements):
    """What is needed of the task vectors' magnitudes for `lowest` and `highest`.

    The recipe is one of a method that takes two limits of these.
    """

    @property
    def limits(self) -> bool:
        """Whether limits have to be searched for, which these always have."""
        return True

    @property
    def minimum(self) -> bool:
        """Whether the least of all magnitudes is a limit itself: `lowest` of few entries is."""
        return True

    def untrimmed(self) -> dict[str, np.ndarray]:
        """Returns bounds that leave out no entry, float32 [experts]."""
        zeros = np.zeros(self.experts, np.float32)
        return {"lowest": zeros, "highest": zeros + np.float32(np.inf)}

    def ranks(self, size: int, name: str = "") -> dict[str, list[int]]:
        """Returns the rank of each bound among `size` magnitudes, from the largest."""
        # From the least entry on the authors' code counts int(d r) and int(d (1 - r) - 1), from 0.
        lowest, highest = int(size * OUTLIERS), int(size * (1 - OUTLIERS) - 1)
        ranks = {"lowest": size - lowest, "highest": min(size, size - highest)}
        return {name: [rank] * self.experts for name, rank in ranks.items()}


class Scope(NamedTuple):
    """Parameters over which limits are searched together.

    Attributes:
        names: Theirs, in order.
        experts: Of which experts.
        ranks: By limit, of each expert, the rank of its magnitude among theirs; of other experts
            one that needs no search.
    """

    names: tuple[str, ...]
    experts: tuple[int, ...]
    ranks: dict[str, list[int]]


def norm_rescale(l1: Array, l1_kept: Array, xp: ModuleType = np) -> Array:
    """Returns the factors that restore the L1 norms from before entries were dropped."""
    small = (l1 < 1e-7) | (l1_kept < 1e-7)
    return xp.float32(xp.where(small, 1, l1 / xp.where(small, 1, l1_kept)))


def host_counts(words: Array) -> np.ndarray:
    """Returns 64-bit counts, as words uint32 [2, ...], as int64."""
    high, low = np.asarray(words).astype(np.int64)
    return (high << 32) + low

"""How to merge, as data: recipes, those of other codebases, and averages of a run's checkpoints.

A recipe is checked when it is made, and kept in the manifest of what it makes.
"""

import dataclasses
import fnmatch
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from m2l import files, storage
from m2l.checkpoints import reading
from m2l.errors import CheckpointError, MergeError, UnknownNameError
from m2l.merging import layerwise
from m2l.merging.layerwise import Value
from m2l.merging.method_registry import METHODS, VARIANTS, Method, hyper_parameters
from m2l.merging.methods import Consensus
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json, JsonObject

DTYPES = ("float32", "bfloat16", "float16")

BASE, UNION, ZERO, AUTO = "base", "union", "zero", "auto"
_EXPERT = re.compile(r"expert_\d+")


def is_model(name: object) -> bool:
    """Returns whether a text is the name of one of a merge's models: base, or expert_0, ..."""
    return isinstance(name, str) and (name == BASE or bool(_EXPERT.fullmatch(name)))


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """What a token's rows are in models that lack it.

    Attributes:
        source: "base", "expert_0", ... or "zero".
        token: A token of that model's, or its id; None: the token itself.
        force: Whether models that have the token take these rows as well.
    """

    source: str
    token: str | int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if not (is_model(self.source) or self.source == ZERO):
            raise UnknownNameError("source of a token", str(self.source), (BASE, "expert_0", ZERO))
        if self.token is not None and (self.source == ZERO or isinstance(self.token, bool)):
            raise MergeError(f"a token of {self.source} cannot be {self.token!r}")

    def to_dict(self) -> JsonObject:
        """Returns it as JSON-like data, without what is the default."""
        values = {"source": self.source, "token": self.token, "force": self.force}
        return {name: value for name, value in values.items() if value not in (None, False)}


@dataclasses.dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer the result gets, and how rows of embeddings and outputs follow it.

    Attributes:
        source: "base": the base's tokenizer, or the first expert's where there is no base;
            "expert_0", ...: that expert's; "union": the base's and all tokens that it lacks.
        tokens: What tokens' rows are made of, where that is not to follow from who has them; a
            token that the tokenizer lacks is added to it.
        pad_to: The number of rows is rounded up to a multiple of this.
        chat_template: "auto": the models' most frequent one; "base", "expert_0", ...: that model's;
            or a template. None: the one that comes with the tokenizer.

    Raises:
        MergeError: A value is of the wrong type or out of range.
        UnknownNameError: There is no such source.
    """

    source: str
    tokens: tuple[tuple[str, TokenSource], ...] = ()
    pad_to: int = 1
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if not (is_model(self.source) or self.source == UNION):
            raise UnknownNameError("tokenizer", str(self.source), (BASE, UNION, "expert_0"))
        if type(self.pad_to) is not int or not 1 <= self.pad_to <= 1 << 20:
            raise MergeError(f"pad_to {self.pad_to!r}: a whole number from 1 was expected")
        template = self.chat_template
        if not (template in (None, AUTO) or is_model(template) or "{" in str(template)):
            raise MergeError(
                f"chat_template {template!r:.80}: expected {AUTO}, {BASE}, expert_0, ... or a "
                "template"
            )

    @classmethod
    def checked(
        cls, value: "TokenizerChoice | Mapping[str, object] | str | None"
    ) -> "TokenizerChoice | None":
        """Returns the choice that a name, or JSON-like data, means; errors as the class's."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping):
            raise MergeError(f"tokenizer must be a name or an object, not {value!r:.80}")
        for name in value:
            if name not in known:
                raise UnknownNameError("setting of the tokenizer", str(name), known)
        tokens = value.get("tokens") or {}
        try:
            sources = tuple((str(token), TokenSource(**each)) for token, each in tokens.items())
        except (AttributeError, TypeError) as error:
            raise MergeError(f"tokenizer: tokens cannot be read ({error})") from error
        return cls(**{"source": UNION, **value, "tokens": sources})

    def to_dict(self) -> JsonObject:
        """Returns it as JSON-like data, without what is the default."""
        values: JsonObject = {"source": self.source}
        if self.tokens:
            values["tokens"] = {token: source.to_dict() for token, source in self.tokens}
        if self.pad_to > 1:
            values["pad_to"] = self.pad_to
        if self.chat_template is not None:
            values["chat_template"] = self.chat_template
        return values


@dataclasses.dataclass(frozen=True, init=False)
class Recipe:
    """A merge method with its hyper-parameters: Recipe("ties", density=0.2, scale=1.0).

    What a method has for hyper-parameters, with their ranges and defaults, its signature says
    (`m2l merge --list`); each can be read as an attribute too, as recipe.density. The last five
    attributes are where codebases differ; the defaults are the papers', and `PRESETS` has
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
                values[scaled_name(value)] = value
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


def scaled_name(value: object) -> str:
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
        name = scaled_name(value)
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


# The last checkpoints of one run, whose average stands in for a decay of its learning rate

# With w_j the learning rate's share that the updates from checkpoint j - 1 to j are to have, w_0 =
# 1, the merge sum_j c_j theta_j with c_j = w_j - w_{j+1} is the model that these updates give: Tian
# et al. 2025, arXiv:2507.17634, equations 5 to 7. A linear decay of evenly spaced checkpoints is
# their mean.

DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
"""Name -> the learning rate's share at a position from 0, the first checkpoint, to 1."""


def decay_weights(steps: Sequence[int], decay: str = "linear") -> tuple[float, ...]:
    """Returns the weights of checkpoints whose average stands in for a decay; they add up to 1.

    Args:
        steps: The checkpoints' steps, in order.
        decay: One of DECAYS.

    Raises:
        UnknownNameError: There is no such decay.
    """
    if decay not in DECAYS:
        raise UnknownNameError("decay", decay, DECAYS)
    count, first = len(steps), steps[0]
    # The decay ends one mean distance behind the last checkpoint.
    length = max(1, steps[-1] - first) * count / max(1, count - 1)
    shares = [DECAYS[decay]((step - first) / length) for step in steps]
    return tuple(w - after for w, after in zip(shares, [*shares[1:], 0.0], strict=True))


def last_checkpoints(run: PathLike, count: int) -> dict[int, AnyPath]:
    """Returns the last checkpoints of a run, by step, in order.

    Args:
        run: A training run, or its directory of steps.
        count: How many.

    Raises:
        CheckpointError: There is no such run.
        MergeError: It has fewer finished ones.
    """
    run = storage.path(run).absolute()
    finished = reading.steps(run / reading.STEPS) or reading.steps(run)
    if not finished:
        raise CheckpointError(f"{run}: no training run with finished checkpoints")
    if not 1 <= count <= len(finished):
        raise MergeError(
            f"{run}: {count} checkpoints are asked for, and {len(finished)} are there; train with "
            "keep_every=STEPS, or a larger keep"
        )
    return dict([*finished.items()][-count:])

"""A comparison of merge methods on one set of experts: by default settings, and after a search.

Every method merges all experts of one base. Its settings are searched with the same number of
candidates as every other's, on examples that nothing is evaluated on.
"""

import ast
import dataclasses
from collections.abc import Iterator, Mapping

from m2l.errors import ConfigError, M2LError, UnknownNameError
from m2l.merging import METHODS, Recipe
from m2l.merging.inputs import check_counts
from m2l.merging.job import parse_bytes
from m2l.merging.search_space import SearchSpace
from m2l.models.fields import NOT_NEGATIVE, check_fields
from m2l.studies.graph import Graph, Stage
from m2l.studies.merging_at_scale import (
    ScalingStudy,
    data_settings,
    evaluation_settings,
    merge_inputs,
    model_stages,
)
from m2l.typing import Json, JsonObject

DEFAULT, SEARCHED = "default", "searched"


@dataclasses.dataclass(frozen=True)
class MethodComparison:
    """The settings of a comparison.

    Attributes:
        study: The models, of one size and one base, and the tasks; its recipes, its numbers of
            experts, its seeds and what it sweeps are not used.
        methods: The methods, with the values that are searched of each one's settings, as
            `m2l search` has them; a method without any is merged by its defaults alone.
        left_out: Methods that are not compared, though `methods` has them.
        unsearched: Methods that are merged by their defaults alone, though `methods` has values.
        defaults: By method, also of others, values for settings that have no default.
        candidates: Recipes that are tried of each method, beside its defaults; 0: none.
        seed: Of the searches, and of the methods that draw at random.
        statistics_examples: Examples of an expert's training that its Fisher information and its
            Gram matrices are of, for the methods that need them.
        memory: What a merge may hold, as of `m2l merge --memory`.
    """

    study: ScalingStudy
    methods: Mapping[str, Mapping[str, object]]
    left_out: tuple[str, ...] = ()
    unsearched: tuple[str, ...] = ()
    defaults: Mapping[str, Mapping[str, Json]] = dataclasses.field(default_factory=dict)
    candidates: int = dataclasses.field(default=16, metadata=NOT_NEGATIVE)
    seed: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    statistics_examples: int = 256
    memory: str = "1GiB"

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.study, ScalingStudy):
            raise ConfigError(
                f"MethodComparison.study: expected @ScalingStudy(), found {self.study!r:.80}"
            )
        for name in ("models", "bases"):
            if len(getattr(self.study, name)) != 1:
                raise ConfigError(
                    f"MethodComparison.study: expected one of its {name}, found "
                    f"{', '.join(getattr(self.study, name))}"
                )
        for name in ("methods", "defaults"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(
                isinstance(settings, Mapping) for settings in value.values()
            ):
                raise ConfigError(
                    f"MethodComparison.{name}: expected {{METHOD: {{SETTING: VALUES}}}}, found "
                    f"{value!r:.80}"
                )
        compared = {
            name: {} if name in self.unsearched else values
            for name, values in self.methods.items()
            if name not in self.left_out
        }
        object.__setattr__(self, "methods", compared)
        if not self.methods:
            raise ConfigError("MethodComparison.methods: expected one or more, found none")
        for name in ("methods", "left_out", "unsearched", "defaults"):
            for method in getattr(self, name):
                if method not in METHODS:
                    raise UnknownNameError(f"MethodComparison.{name}: method", method, METHODS)
        parse_bytes(self.memory)
        self._check_recipes()
        object.__setattr__(
            self,
            "study",
            dataclasses.replace(
                self.study,
                recipes=(Recipe("average"),),
                expert_counts=(len(self.study.categories),),
                seeds=(0,),
                swept={},
            ),
        )

    def _check_recipes(self) -> None:
        experts = len(self.study.categories)
        for method, space in self.methods.items():
            try:
                statistics = experts if METHODS[method].statistic else 0
                check_counts(True, experts, statistics, self.default(method))
                if space:
                    SearchSpace({method: {**self.defaults.get(method, {}), **space}})
            except UnknownNameError:
                raise
            except M2LError as error:
                raise type(error)(f"MethodComparison.methods: {method}: {error}") from error

    @property
    def size(self) -> str:
        """The name of the one size."""
        return next(iter(self.study.models))

    @property
    def base(self) -> str:
        """The name of the one base."""
        return self.study.bases[0]

    def default(self, method: str) -> Recipe:
        """Returns a method's recipe by its defaults."""
        seed = {"seed": self.seed} if METHODS[method].draws else {}
        return Recipe(method, **self.defaults.get(method, {}), **seed)

    def resolved(self) -> "MethodComparison":
        """Returns the comparison with the digests of what it starts from."""
        return dataclasses.replace(self, study=self.study.resolved())

    def check_mixtures(self) -> None:
        """Checks that all names exist, before anything is trained; see `ScalingStudy`."""
        self.study.check_mixtures()

    def stage_graph(self) -> Graph:
        """Returns the stages: the models, statistics of the experts, and for each method two.

        "search" chooses its settings, and "compare" merges by its defaults and by these, measures
        what the former costs, and evaluates both.
        """
        stages = model_stages(self.study) + list(self._statistics_stages())
        for method in self.methods:
            stages += self._method_stages(method)
        return Graph(stages)

    def _statistics_stages(self) -> Iterator[Stage]:
        lengths = self.study.training("expert", self.size).lengths
        needed = {METHODS[method].statistic for method in self.methods}
        for kind in ("fisher", "gram"):
            for category in self.study.categories if kind in needed else ():
                settings = {
                    **data_settings(self.study, [category]),
                    "statistic": kind,
                    "mixture": category,
                    "examples": self.statistics_examples,
                    "lengths": lengths,
                }
                inputs = {"expert": f"experts/{self.size}/{self.base}/{category}"}
                yield Stage(f"statistics/{kind}/{category}", "statistics", settings, inputs)

    def _method_stages(self, method: str) -> Iterator[Stage]:
        study, space = self.study, self.methods[method]
        evaluated_on, default = evaluation_settings(study), self.default(method).to_dict()
        inputs = merge_inputs(self.size, self.base, study.categories)
        if kind := METHODS[method].statistic:
            inputs |= {f"statistic/{c}": f"statistics/{kind}/{c}" for c in study.categories}
        if space and self.candidates:
            settings = {
                **evaluated_on,
                "choosing": [study.choosing_prompts, study.choosing_examples],
                "choosing_categories": list(study.categories),
                "default": default,
                # As text, where ranges are not lists.
                "space": repr({**self.defaults.get(method, {}), **space}),
                "candidates": self.candidates,
                "seed": self.seed,
            }
            yield Stage(f"choices/{method}", "search", settings, dict(inputs))
            inputs["choice"] = f"choices/{method}"
        settings = {
            **evaluated_on,
            "categories": list(study.categories + study.held_out),
            "recipes": {DEFAULT: default},
            "memory": self.memory,
        }
        yield Stage(f"results/methods/{method}", "compare", settings, inputs)

    def to_dict(self) -> JsonObject:
        """Returns the settings as JSON values."""
        names = ("candidates", "seed", "statistics_examples", "memory")
        return {
            "study": self.study.to_dict(),
            "methods": {method: repr(dict(space)) for method, space in self.methods.items()},
            "defaults": {method: dict(values) for method, values in self.defaults.items()},
            **{name: getattr(self, name) for name in names},
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Json]) -> "MethodComparison":
        """Returns the settings of what `to_dict` returned."""
        parsed = {
            "study": ScalingStudy.from_dict(fields["study"]),
            "methods": {name: ast.literal_eval(text) for name, text in fields["methods"].items()},
        }
        return cls(**{**fields, **parsed})

"""How other codebases merge, as settings of a recipe, for reproducing what was made with them.

Each was run, and tests compare with its output (tests/goldens/merge_goldens.*). No setting says
that mergekit ranks della's magnitudes along rows, and of entries that tie with the last that is
kept it keeps some, by an unstable sort; FusionBench averages angles in Model Stock, we their
cosines.
"""

from collections.abc import Mapping

from m2l.errors import UnknownNameError
from m2l.typing import Json

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
        "task_arithmetic": {},
        "ties": {"density": 1.0, "scope": "tensor", "keep": "at_least_one", **_BY_TENSOR},
        "dare": {"drop_rate": 0.0, "rescale": "norm"},
        "dare_ties": {"drop_rate": 0.0, "rescale": "norm", "consensus": "sum", **_BY_TENSOR},
        "breadcrumbs": {"density": 0.99, "gamma": 0.01, "scope": "tensor"},
        "della": {"drop_rate": 0.15, "epsilon": 0.15, "rescale": "norm", **_BY_TENSOR},
        "slerp": {},
        "model_stock": {},
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

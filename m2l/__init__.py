"""m2l: train experts from one base, merge them in weight space, measure what the merge is worth.

The names below are loaded when they are first used: importing m2l imports nothing else.
"""

import importlib
from typing import TYPE_CHECKING

from m2l.version import __version__

if TYPE_CHECKING:
    from m2l.api import evaluate, save, sweep, train
    from m2l.evaluation.model import load
    from m2l.merging import Recipe, merge

__all__ = ["Recipe", "__version__", "evaluate", "load", "merge", "save", "sweep", "train"]

_MODULES = {
    "Recipe": "m2l.merging",
    "evaluate": "m2l.api",
    "load": "m2l.evaluation.model",
    "merge": "m2l.merging",
    "save": "m2l.api",
    "sweep": "m2l.api",
    "train": "m2l.api",
}


def __getattr__(name: str) -> object:
    """Imports a public name's module, and returns the name's value (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    """Returns the module's names, those that are not loaded yet among them."""
    return sorted({*globals(), *__all__})

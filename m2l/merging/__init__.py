"""Merging in weight space: methods as pure functions, over checkpoints of any size or in memory."""

from m2l.merging.engine import merge
from m2l.merging.in_memory import merge_params
from m2l.merging.job import MergeJob, prepare
from m2l.merging.method_registry import METHODS, Interval, Method, method
from m2l.merging.presets import PRESETS, preset
from m2l.merging.recipe import Recipe
from m2l.merging.sweep import SweepPoint, best, grid, sweep

__all__ = [
    "METHODS",
    "PRESETS",
    "Interval",
    "MergeJob",
    "Method",
    "Recipe",
    "SweepPoint",
    "best",
    "grid",
    "merge",
    "merge_params",
    "method",
    "prepare",
    "preset",
    "sweep",
]

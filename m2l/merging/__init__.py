"""Merging in weight space: methods as pure functions, over checkpoints of any size or in memory."""

from m2l.merging.compression import compress, restore
from m2l.merging.engine import merge
from m2l.merging.in_memory import merge_each, merge_params
from m2l.merging.job import MergeJob, prepare
from m2l.merging.low_rank import extract, merge_into_adapter
from m2l.merging.method_registry import METHODS, Interval, Method, method
from m2l.merging.recipe import PRESETS, Recipe, preset
from m2l.merging.search import SweepPoint, best, grid, sweep
from m2l.merging.verification import verify

__all__ = [
    "METHODS",
    "PRESETS",
    "Interval",
    "MergeJob",
    "Method",
    "Recipe",
    "SweepPoint",
    "best",
    "compress",
    "extract",
    "grid",
    "merge",
    "merge_each",
    "merge_into_adapter",
    "merge_params",
    "method",
    "prepare",
    "preset",
    "restore",
    "sweep",
    "verify",
]

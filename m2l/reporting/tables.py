"""A study's tables, from its results: as data frames, and as csv, Markdown and LaTeX files."""

from pathlib import Path

import pandas as pd

from m2l.studies import scaling
from m2l.studies.scaling import ScalingStudy

METHODS = {
    "average": "Averaging",
    "task_arithmetic": "Task arithmetic",
    "ties": "TIES",
    "dare_ties": "DARE-TIES",
    "multitask": "Multitask",
}
BASES = {"pretrained": "pretrained", "instruct": "instruction-tuned"}


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """With the methods' and bases' printed names."""
    frame = frame.assign(base=frame["base"].map(BASES))
    if "method" in frame:
        frame = frame.assign(method=frame["method"].map(lambda name: METHODS.get(name, name)))
    return frame


def cells(study: ScalingStudy, out: Path) -> pd.DataFrame:
    """One row for each cell of the grid: base, method, experts, seed, held_in, held_out."""
    return _named(pd.DataFrame(scaling.performance_rows(study, out)))


def performance(cells: pd.DataFrame) -> pd.DataFrame:
    """Normalised performance by base and method (rows) and number of experts, mean over seeds.

    NaN where a seed has none, for its reference scores 0 on a dataset.
    """
    grouped = cells.groupby(["base", "method", "experts"], sort=False)[["held_in", "held_out"]]
    means = grouped.agg(lambda seeds: seeds.mean(skipna=False))
    wide = means.unstack("experts")
    wide.columns = [f"{what}, {count}" for what, count in wide.columns]
    methods = sorted(cells["method"].unique(), key=lambda name: name == METHODS["multitask"])
    order = [(base, method) for base in BASES.values() for method in methods]
    wide = wide.reindex(pd.MultiIndex.from_tuples(order, names=["base", "method"]))
    return wide.reset_index().rename(columns=lambda name: name.replace("held_", "held-"))


def experts(study: ScalingStudy, out: Path) -> pd.DataFrame:
    """Scores in percent by base and held-in dataset: the base, its expert, the multitask model."""
    frame = _named(pd.DataFrame(scaling.expert_rows(study, out)))
    frame["gain"] = frame["expert"] - frame["before"]
    return frame


def held_out(study: ScalingStudy, out: Path) -> pd.DataFrame:
    """Scores in percent by base and held-out dataset: chance, the base, the multitask model."""
    return _named(pd.DataFrame(scaling.held_out_rows(study, out)))


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def markdown(frame: pd.DataFrame) -> str:
    """The frame as a Markdown table, numbers to two decimals."""
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    for row in frame.itertuples(index=False):
        lines.append("| " + " | ".join(map(_text, row)) + " |")
    return "\n".join(lines) + "\n"


def write(frame: pd.DataFrame, directory: Path, name: str) -> None:
    """Writes NAME.csv (full precision), NAME.md and NAME.tex."""
    directory.mkdir(parents=True, exist_ok=True)
    frame.to_csv(directory / f"{name}.csv", index=False)
    (directory / f"{name}.md").write_text(markdown(frame))
    frame.to_latex(directory / f"{name}.tex", index=False, float_format="%.2f", escape=True)

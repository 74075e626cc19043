"""The tables of paper 1's study, the paper's own numbers, and frames as csv, Markdown and LaTeX.

Source: Yadav et al., "What Matters for Model Merging at Scale?", appendix C.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from m2l.reporting import style

# The column and the base of the paper's tables, by number.
PAPER = {
    1: ("held_in", "instruct"),
    2: ("held_out", "instruct"),
    3: ("held_in", "pretrained"),
    4: ("held_out", "pretrained"),
}


def paper_performance() -> pd.DataFrame:
    """Returns the numbers of the paper's tables 1 to 4 in the layout of a study's results.

    The models are PaLM-2 ("pretrained") and PaLM-2-IT ("instruct"); means over three seeds, to two
    decimals. The paper's text and its tables disagree: section 4.4 gives the fall from 0.66 to 0.39
    and the one from 0.91 to 0.86 to 8B models, tables 3 and 1 to 1B models; these are the tables'.

    Returns:
        A row for each size ("1B" to "64B", in order), base, method and number of experts: size,
        base, method, experts, held_in, held_in_low, held_in_high, held_out, held_out_low,
        held_out_high. Normalised performance (1 = the task's expert, or the base model); the paper
        gives no bands, so low and high are NaN.
    """
    frame = pd.read_csv(Path(__file__).parent / "merging_at_scale.csv")
    for column in ("held_in", "held_out"):
        position = frame.columns.get_loc(column) + 1
        for end in ("high", "low"):
            frame.insert(position, f"{column}_{end}", np.nan)
    return frame


def performance(frame: pd.DataFrame, column: str, base: str) -> pd.DataFrame:
    """Returns one of the paper's tables 1 to 4: performance by method, size and experts.

    Args:
        frame: A performance frame (see `figures`).
        column: "held_in" or "held_out".
        base: "pretrained" or "instruct".

    Returns:
        A row for each method, by its printed name and in the paper's order, multitask last; a
        column for each (size, number of experts). NaN where the frame has none.
    """
    frame = frame[frame["base"] == base]
    wide = frame.pivot(index="method", columns=["size", "experts"], values=column)
    order = [(size, count) for size in style.sizes(frame) for count in style.counts(frame)]
    columns = pd.MultiIndex.from_tuples(order, names=["size", "experts"])
    wide = wide.reindex(index=style.methods(frame), columns=columns)
    wide.index = pd.Index([style.method_name(name) for name in wide.index], name="method")
    return wide


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns both kinds of performance in one table, for a terminal.

    Args:
        frame: A performance frame.

    Returns:
        A row for each base, size and method, by printed names; a column "held-in, 2" and so on
        for each kind of performance and number of experts.
    """
    wide = frame.pivot(
        index=["base", "size", "method"], columns="experts", values=["held_in", "held_out"]
    )
    wide.columns = [f"{kind.replace('_', '-')}, {count}" for kind, count in wide.columns]
    order = pd.MultiIndex.from_product(
        [style.bases(frame), style.sizes(frame), style.methods(frame)], names=wide.index.names
    )
    return named(wide.reindex(order).reset_index())


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the frame with the printed names of its bases and methods."""
    names = {"base": style.base_name, "method": style.method_name}
    return frame.assign(**{key: frame[key].map(names[key]) for key in names if key in frame})


def experts(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns each expert's gain over its base on its own datasets.

    Args:
        frame: size, base, category, dataset, before, expert, multitask; scores in percent.

    Returns:
        The same with printed names and the column gain, in points.
    """
    return named(frame).assign(gain=frame["expert"] - frame["before"])


def chosen(choices: pd.DataFrame) -> pd.DataFrame:
    """Returns the chosen hyper-parameters: the chosen rows of `choices`, with printed names."""
    rows = choices[choices["chosen"].astype(bool)].drop(columns="chosen")
    return named(rows).reset_index(drop=True)


# --- as text ---


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns a table of the paper's layout with one line of header: "1B, 2" is 1B, 2 experts."""
    if frame.columns.nlevels == 1:
        return frame
    flat = frame.copy()
    flat.columns = [f"{size}, {count}" for size, count in frame.columns]
    return flat.reset_index()


def text(value: object, digits: int = 2) -> str:
    """Returns a cell as it is printed; a dash for NaN."""
    if not isinstance(value, float):
        return str(value)
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def markdown(frame: pd.DataFrame) -> str:
    """Returns the frame as a Markdown table, numbers to two decimals."""
    frame = _flat(frame)
    kinds = [pd.api.types.is_numeric_dtype(frame[name]) for name in frame]
    rule = "|" + "".join("---:|" if numeric else "---|" for numeric in kinds)
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", rule]
    for row in frame.itertuples(index=False):
        lines.append("| " + " | ".join(text(value).replace("|", r"\|") for value in row) + " |")
    return "\n".join(lines) + "\n"


def latex(frame: pd.DataFrame) -> str:
    r"""Returns the frame as a LaTeX tabular, numbers to two decimals; needs the package booktabs.

    A table of the paper's layout gets the paper's header: sizes over numbers of experts.
    """
    flat = _flat(frame)
    alignment = "".join("r" if pd.api.types.is_numeric_dtype(flat[name]) else "l" for name in flat)
    table = flat.to_latex(
        index=False, escape=True, na_rep="--", float_format="%.2f", column_format=alignment
    )
    if frame.columns.nlevels == 1:
        return table
    begin, rule, _, *lines = table.splitlines()
    sizes, counts = zip(*frame.columns, strict=True)
    spans = [(size, sizes.index(size), sizes.count(size)) for size in dict.fromkeys(sizes)]
    groups = [rf"\multicolumn{{{span}}}{{c}}{{{size}}}" for size, _, span in spans]
    header = [
        " & ".join([r"Merging method ($\downarrow$)", *groups]) + r" \\",
        " ".join(rf"\cmidrule(lr){{{first + 2}-{first + span + 1}}}" for _, first, span in spans),
        " & ".join([r"\# of experts ($\rightarrow$)", *map(str, counts)]) + r" \\",
    ]
    return "\n".join([begin, rule, *header, *lines]) + "\n"


_WRITERS = {"csv": lambda frame: _flat(frame).to_csv(index=False), "md": markdown, "tex": latex}


def write(
    frame: pd.DataFrame, directory: Path, name: str, formats: Iterable[str] = tuple(_WRITERS)
) -> None:
    """Writes NAME.csv (full precision), NAME.md and NAME.tex."""
    directory.mkdir(parents=True, exist_ok=True)
    for ending in formats:
        (directory / f"{name}.{ending}").write_text(_WRITERS[ending](frame))

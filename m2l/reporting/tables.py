"""A study's tables: the paper's 1 to 4 and those under them, as csv, Markdown and LaTeX.

Source: Yadav et al., "What Matters for Model Merging at Scale?", appendix C.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from m2l.reporting import style

# The paper's tables by number: what is in them, and of which base.
PAPER = {
    1: ("held_in", "instruct"),
    2: ("held_out", "instruct"),
    3: ("held_in", "pretrained"),
    4: ("held_out", "pretrained"),
}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: rf"\{character}" for character in "&%$#_{}"}


def performance(frame: pd.DataFrame, column: str, base: str) -> pd.DataFrame:
    """One of the paper's tables 1 to 4: normalised performance by method, size and experts.

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
    """Both kinds of performance at a glance, for a terminal.

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
    """The frame with the printed names of its bases and methods."""
    names = {"base": style.base_name, "method": style.method_name}
    return frame.assign(**{key: frame[key].map(names[key]) for key in names if key in frame})


def experts(frame: pd.DataFrame) -> pd.DataFrame:
    """What each expert gained over its base on its own datasets.

    Args:
        frame: size, base, category, dataset, before, expert, multitask; scores in percent.

    Returns:
        The same with printed names and the column gain, in points.
    """
    return named(frame).assign(gain=frame["expert"] - frame["before"])


def chosen(choices: pd.DataFrame) -> pd.DataFrame:
    """The hyper-parameters that were chosen: the chosen rows of `choices`, with printed names."""
    rows = choices[choices["chosen"].astype(bool)].drop(columns="chosen")
    return named(rows).reset_index(drop=True)


# --- as text ---


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of the paper's layout with one line of header: "1B, 2" is 1B, two experts."""
    if frame.columns.nlevels == 1:
        return frame
    flat = frame.copy()
    flat.columns = [f"{size}, {count}" for size, count in frame.columns]
    return flat.reset_index()


def text(value: object, digits: int = 2) -> str:
    """A cell as it is printed; a dash where there is no number."""
    if not isinstance(value, float):
        return str(value)
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def markdown(frame: pd.DataFrame) -> str:
    """The frame as a Markdown table, numbers to two decimals."""
    frame = _flat(frame)
    kinds = [pd.api.types.is_numeric_dtype(frame[name]) for name in frame]
    rule = "|" + "".join("---:|" if numeric else "---|" for numeric in kinds)
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", rule]
    for row in frame.itertuples(index=False):
        lines.append("| " + " | ".join(text(value).replace("|", r"\|") for value in row) + " |")
    return "\n".join(lines) + "\n"


def _escaped(value: object) -> str:
    return re.sub(r"[\\~^&%$#_{}]", lambda match: _LATEX[match[0]], text(value)).replace("–", "--")


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def latex(frame: pd.DataFrame) -> str:
    r"""The frame as a LaTeX tabular, numbers to two decimals; needs the package booktabs.

    A table of the paper's layout gets the paper's header: sizes over numbers of experts.
    """
    flat = _flat(frame)
    kinds = "".join("r" if pd.api.types.is_numeric_dtype(flat[name]) else "l" for name in flat)
    lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule"]
    if frame.columns.nlevels == 1:
        lines.append(_line([_escaped(name) for name in frame.columns]))
    else:
        sizes = [size for size, _ in frame.columns]
        spans = [(size, sizes.index(size), sizes.count(size)) for size in dict.fromkeys(sizes)]
        over = [rf"\multicolumn{{{span}}}{{c}}{{{_escaped(size)}}}" for size, _, span in spans]
        lines.append(_line([r"Merging method ($\downarrow$)", *over]))
        rules = [rf"\cmidrule(lr){{{first + 2}-{first + span + 1}}}" for _, first, span in spans]
        lines.append(" ".join(rules))
        counts = [str(count) for _, count in frame.columns]
        lines.append(_line([r"\# of experts ($\rightarrow$)", *counts]))
    lines.append(r"\midrule")
    lines += [_line([_escaped(value) for value in row]) for row in flat.itertuples(index=False)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def write(frame: pd.DataFrame, directory: Path, name: str) -> None:
    """Writes NAME.csv (full precision), NAME.md and NAME.tex."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.csv").write_text(_flat(frame).to_csv(index=False))
    (directory / f"{name}.md").write_text(markdown(frame))
    (directory / f"{name}.tex").write_text(latex(frame))

"""The names, colours and markers of methods, bases and sizes in reports."""

from collections.abc import Sequence
from typing import TypeVar

import matplotlib
import pandas as pd

T = TypeVar("T")

# The paper's names and order; other methods come after them, under their own names.
METHODS = {
    "average": "Average",
    "task_arithmetic": "Task Arithmetic",
    "dare_ties": "DARE-TIES",
    "ties": "TIES",
    "ties_mergekit": "TIES (mergekit)",
    "dare": "DARE",
    "della": "DELLA",
    "della_linear": "DELLA-Linear",
    "breadcrumbs_ties": "Breadcrumbs-TIES",
    "sce": "SCE",
    "pcb": "PCB",
    "ram": "RAM",
    "ram_plus": "RAM+",
    "consensus_ta": "Consensus TA",
    "localize_and_stitch": "Localize-and-Stitch",
    "slerp": "SLERP",
    "multislerp": "Multi-SLERP",
    "task_multislerp": "Task Multi-SLERP",
    "karcher": "Karcher Mean",
    "regmean": "RegMean",
    "mats": "MaTS",
    "tsv_m": "TSV-M",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "wudi": "WUDI",
    "widen": "WIDEN",
    "knots_ties": "KnOTS-TIES",
    "linear": "Linear",
    "wise_ft": "WiSE-FT",
    "multitask": "Multitask",
}
BASES = {"pretrained": "Pretrained", "instruct": "Instruction-tuned"}
MULTITASK = "multitask"

# Okabe and Ito's colours, which are distinct with any colour vision.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILLION, BLACK, GREY = "#56B4E9", "#D55E00", "#000000", "#666666"
BASE_COLOURS = {"pretrained": VERMILLION, "instruct": BLUE}
_METHOD_COLOURS = {
    "average": SKY,
    "task_arithmetic": ORANGE,
    "dare_ties": GREEN,
    "ties": PINK,
    MULTITASK: GREY,
}
_METHOD_MARKERS = {"average": "o", "task_arithmetic": "^", "dare_ties": "D", "ties": "s"}
_OTHER_COLOURS = (BLUE, VERMILLION, BLACK, "#F0E442", "#882255", "#44AA99")
_OTHER_MARKERS = "vPX*<>"
_SIZE_MARKERS = "os^Dv*"

RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",
    # Every text names them: DejaVu Sans measures, the others are as wide, nearly.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    # Fixed, so that the same results give the same bytes.
    "svg.hashsalt": "m2l",
}


def method_name(method: str) -> str:
    """Returns the printed name of a method."""
    return METHODS.get(method, method.replace("_", " ").title())


def base_name(base: str) -> str:
    """Returns the printed name of a base."""
    return BASES.get(base, base)


def methods(frame: pd.DataFrame, multitask: bool = True) -> list[str]:
    """Returns the frame's methods in the paper's order, then other ones, multitask last."""
    names = [name for name in frame["method"].unique() if name != MULTITASK]
    known = list(METHODS)
    names.sort(key=lambda name: known.index(name) if name in known else len(known))
    return names + [MULTITASK] * (multitask and MULTITASK in set(frame["method"]))


def bases(frame: pd.DataFrame) -> list[str]:
    """Returns the frame's bases, the pretrained one first."""
    return [base for base in BASES if base in set(frame["base"])]


def sizes(frame: pd.DataFrame) -> list[str]:
    """Returns the frame's model sizes, in the frame's order."""
    return list(frame["size"].unique())


def counts(frame: pd.DataFrame) -> list[int]:
    """Returns the frame's numbers of merged experts, ascending."""
    return sorted(int(count) for count in frame["experts"].unique())


def method_style(method: str, among: Sequence[str]) -> dict[str, str]:
    """Returns a method's colour, marker and line, different from those of the others in `among`."""
    if method == MULTITASK:
        return {"color": GREY, "marker": "", "linestyle": "--"}
    if method in _METHOD_COLOURS:
        return {
            "color": _METHOD_COLOURS[method],
            "marker": _METHOD_MARKERS[method],
            "linestyle": "-",
        }
    further = [name for name in among if name not in _METHOD_COLOURS]
    index = further.index(method) % len(_OTHER_COLOURS)
    return {"color": _OTHER_COLOURS[index], "marker": _OTHER_MARKERS[index], "linestyle": "-"}


def ordered_styles(values: Sequence[T]) -> dict[T, dict[str, str]]:
    """Returns colours from light to dark, with markers, for ordered values: sizes, counts."""
    steps = len(values) - 1
    shades = [0.82 - 0.82 * index / steps if steps else 0.35 for index in range(len(values))]
    return {
        value: {
            "color": matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](shade)),
            "marker": _SIZE_MARKERS[index % len(_SIZE_MARKERS)],
        }
        for index, (value, shade) in enumerate(zip(values, shades, strict=True))
    }

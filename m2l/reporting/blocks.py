"""What a report is put together from, whatever was studied; page.html.jinja shows each kind."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import markupsafe
import pandas as pd
from matplotlib.figure import Figure

from m2l.reporting import figures, tables
from m2l.studies.findings import Finding

_HEADERS = {"before": "base model", "made_of": "made of", "drop_rate": "drop rate"}


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: Plain text, or markup.
        look: "", "note" (aside of what is told) or "files" (links to files).
    """

    text: str
    look: str = ""
    kind: ClassVar[str] = "text"


@dataclasses.dataclass(frozen=True)
class Heading:
    """What the blocks after it are about."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        name: Of its files.
        caption: What it shows.
        svg: It itself, of `svg`.
        paper: The same of the paper's own numbers, or nothing.
    """

    name: str
    caption: str
    svg: markupsafe.Markup
    paper: markupsafe.Markup | None = None
    kind: ClassVar[str] = "drawing"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        what: What is in it, for those who do not see it.
        cells: It itself, of `cells`.
        file: The name of its files; "" if it has none.
    """

    what: str
    cells: Mapping[str, Any]
    file: str = ""
    kind: ClassVar[str] = "table"


@dataclasses.dataclass(frozen=True)
class Folded:
    """Blocks that are shown when asked for.

    Attributes:
        summary: What stands there until then.
        blocks: The blocks.
        aside: Whether they stay folded in print.
    """

    summary: str
    blocks: Sequence["Block"]
    aside: bool = False
    kind: ClassVar[str] = "folded"


Block = Text | Heading | Drawing | Table | Folded


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its title, what links call it, and its blocks."""

    anchor: str
    title: str
    link: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Report:
    """All of a study's report.

    Attributes:
        title: The page's.
        lead: What was studied, in a few lines; may be markup.
        headline: A few figures, each with what it is.
        claims: The heading of the findings.
        notes: What to know before reading them.
        findings: Each with the blocks that it is read from.
        sections: What comes after the findings.
        settings: The study's settings, as JSON values.
        seconds: How long all of its stages took together.
        tables: By file name.
        figures: By file name.
        summary: A heading and a small table, for a terminal.
    """

    title: str
    lead: str
    headline: Sequence[tuple[str, str]]
    claims: str
    notes: Sequence[Text]
    findings: Sequence[tuple[Finding, Sequence[Block]]]
    sections: Sequence[Section]
    settings: Mapping[str, Any]
    seconds: float
    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, Figure]
    summary: tuple[str, pd.DataFrame]


def svg(figure: Figure, name: str, label: str) -> markupsafe.Markup:
    """The figure as an svg element; ids carry the figure's name, for a page has many figures.

    Args:
        figure: The figure.
        name: No other figure's on the page.
        label: What it shows, for those who do not see it.
    """
    text = figures.svg(figure)
    element = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text[text.index("<svg") :])
    element = re.sub(r'(xlink:href="|url\()#([^")]+)', rf"\1#{name}-\2", element)
    width = round(figure.get_figwidth() * 96)
    head = f'<svg role="img" aria-label="{markupsafe.escape(label)}" style="--width: {width}px"'
    return markupsafe.Markup(element.replace("<svg", head, 1))


def cells(frame: pd.DataFrame, digits: int = 2) -> dict[str, Any]:
    """A frame as the template shows it: groups over the header, header, and rows of cells.

    A cell is (text, value to sort by, kind); numbers are sorted as numbers, a missing one is "".
    """
    groups: list[tuple[str, int]] = []
    if frame.columns.nlevels > 1:
        sizes = [size for size, _ in frame.columns]
        groups = [("", 1), *((size, sizes.count(size)) for size in dict.fromkeys(sizes))]
        header: Iterable[str] = ["method", *(str(count) for _, count in frame.columns)]
        frame = frame.reset_index()
        frame.columns = pd.RangeIndex(frame.shape[1])
    else:
        header = [_HEADERS.get(name, name.replace("_", "-")) for name in frame.columns]
    kinds = [_kind(frame[name]) for name in frame]
    rows = [
        [_cell(value, digits, kind) for value, kind in zip(row, kinds, strict=True)]
        for row in frame.itertuples(index=False)
    ]
    return {"groups": groups, "columns": list(zip(header, kinds, strict=True)), "rows": rows}


def _kind(column: pd.Series) -> str:
    """How a column is shown: "" for numbers, "text", or "long text", which may be broken."""
    if pd.api.types.is_numeric_dtype(column):
        return ""
    return "long text" if column.map(lambda value: len(str(value)) > 40).any() else "text"


def _cell(value: Any, digits: int, kind: str) -> tuple[str, str, str]:
    if kind:
        # A long name may be broken where it has a joint.
        shown = re.sub(r"([/+])", r"\1<wbr>", str(markupsafe.escape(value)))
        return markupsafe.Markup(shown), str(value), kind
    return tables.text(value, digits), "" if pd.isna(value) else f"{value:.12g}", kind


def lineage(frame: pd.DataFrame) -> Section:
    """The models of a study.

    Args:
        frame: `aggregate.lineage`.
    """

    def recipe(settings: Mapping[str, Any] | None) -> str:
        return ", ".join(
            f"{name} {value}"
            for name, value in (settings or {}).items()
            if name != "method" and value not in (None, [], ())
        )

    words = frame.assign(
        made_of=[_together(parents) for parents in frame["made_of"]],
        recipe=[recipe(settings) for settings in frame["recipe"]],
        digest=frame["digest"].str[:16],
    )
    table = Table("Every model, its parents, recipe and digest", cells(words))
    said = f"{len(frame)} models: what each is made of, its recipe and its digest"
    return Section("models", "Models", "Models", [Folded(said, [table], aside=True)])


def _together(names: Sequence[str]) -> str:
    """Names of models, those of one folder together: "bases/1M/instruct, experts/1M/a + b"."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        folders.setdefault(folder, []).append(last)
    return ", ".join(f"{folder}/{' + '.join(last)}" for folder, last in folders.items())


def verdicts(found: Sequence[Finding]) -> tuple[str, str]:
    """How many of the paper's findings hold, as a figure of the headline."""
    verdicts = [finding.verdict for finding in found]
    return (
        f"{verdicts.count('supported')} of {len(verdicts)}",
        "of the paper's findings are supported here, "
        f"{verdicts.count('contradicted')} contradicted",
    )

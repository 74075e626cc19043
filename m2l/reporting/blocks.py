"""The parts of a report of any study; page.html.jinja shows each kind."""

import dataclasses
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import ClassVar
from xml.etree import ElementTree

import markupsafe
import pandas as pd
from matplotlib.figure import Figure

from m2l.reporting import figures, tables
from m2l.studies.findings import Finding
from m2l.typing import Json, JsonObject

_HEADERS = {"before": "base model", "made_of": "made of", "drop_rate": "drop rate"}


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: Plain text, or markup.
        look: "", "note" (grey) or "files" (links to files).
    """

    text: str
    look: str = ""
    kind: ClassVar[str] = "text"


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        name: The name of its files.
        caption: The caption.
        svg: The svg element, as `svg` returns it.
        paper: The same figure of the paper's own numbers, if there is one.
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
        label: A description for screen readers.
        cells: The content, as `cells` returns it.
        file: The name of its files; "" if it has none.
    """

    label: str
    cells: JsonObject
    file: str = ""
    kind: ClassVar[str] = "table"


@dataclasses.dataclass(frozen=True)
class Folded:
    """Blocks that are hidden until they are unfolded.

    Attributes:
        summary: The text that is always shown.
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
    """A section of the page: its anchor, its title, the text of links to it, and its blocks."""

    anchor: str
    title: str
    link: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a study, or of a search.

    Attributes:
        title: The page's title.
        plain: What was done, what came out and what it means, in plain words.
        lead: A summary of the study in a few lines; may be markup.
        headline: A few numbers, each with its description.
        claims: The heading of the findings.
        notes: Notes before the findings.
        findings: Each with the figures and tables that it is derived from.
        sections: The sections after the findings.
        settings: The study's settings, as JSON values.
        seconds: The duration of all stages together.
        tables: The tables by file name.
        figures: The figures by file name.
        summary: A heading and a small table, for a terminal.
        made: How the page was made; "" where that was by `m2l study`.
    """

    title: str
    plain: str
    lead: str
    headline: Sequence[tuple[str, str]]
    claims: str
    notes: Sequence[Text]
    findings: Sequence[tuple[Finding, Sequence[Block]]]
    sections: Sequence[Section]
    settings: JsonObject
    seconds: float
    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, Figure]
    summary: tuple[str, pd.DataFrame]
    made: str = ""


def svg(figure: Figure, name: str, label: str) -> markupsafe.Markup:
    """Returns the figure as two svg elements, of which a screen shows the one that fits it.

    Points and bars have their values as titles, which browsers show under the pointer.

    Args:
        figure: The figure, not drawn yet.
        name: Its name, unique on the page; ids begin with it, until `with_shared_styles`.
        label: A description for screen readers.
    """
    narrow = figures.narrowed(figure)
    return markupsafe.Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
        _element(figure, name, label), _element(narrow, f"{name}_narrow", label)
    )


def _element(figure: Figure, name: str, label: str) -> markupsafe.Markup:
    texts = figures.values(figure)
    text = figures.svg(figure)
    for artist in figure.findobj(lambda artist: artist.get_gid() in texts):
        artist.set_gid(None)  # The files of the figure have no use for it.
    for gid, titles in texts.items():
        text = _titled(text, gid, titles)
    element = _condensed(text)
    element = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', element)
    element = re.sub(r'(href="|url\()#([^")]+)', rf"\1#{name}-\2", element)
    style = f"--width: {round(figure.get_figwidth() * 96)}px; {_INHERITED}"
    head = f'<svg role="img" aria-label="{markupsafe.escape(label)}" style="{style}"'
    return markupsafe.Markup(element.replace("<svg", head, 1))


# What matplotlib writes at every text, and in a sheet of each document that would be the page's.
_INHERITED = (
    "font-family: 'DejaVu Sans', Verdana, Arial, Helvetica, sans-serif; "
    "stroke-linejoin: round; stroke-linecap: butt"
)


def _condensed(document: str) -> str:
    """Returns an svg document as an element of a page, without what changes nothing in it.

    Left out are ids that nothing refers to, groups without an attribute or a title, blanks, fonts
    and the sheet of `_INHERITED`, and digits: coordinates have a tenth of a point, those of markers
    and turned texts a hundredth.
    """
    document = re.sub(r' xmlns(:\w+)?="[^"]*"', "", document[document.index("<svg") :])
    root = ElementTree.fromstring(document.replace("xlink:href", "href"))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', document))
    _condense(root, used, digits=1)
    styles = {f"#{path.get('id')}": path.get("style") for path in root.iter("path")}
    for use in root.iter("use"):
        if use.get("style") == styles.get(use.get("href")):
            use.attrib.pop("style", None)  # A marker's own style is what counts.
    for name in ("version", "id"):
        root.attrib.pop(name, None)
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>")


def _condense(element: ElementTree.Element, used: Container[str], digits: int) -> None:
    digits = 2 if element.tag == "defs" else digits
    children: list[ElementTree.Element] = []
    for child in list(element):
        _condense(child, used, digits)
        element.remove(child)
        if not (child.tail or "").strip():
            child.tail = None
        if child.tag == "g" and not (child.attrib or child.findall("title")):
            children += child
        elif child.tag != "style" and (child.tag != "defs" or len(child)):
            children.append(child)
    element.extend(children)
    if not (element.text or "").strip():
        element.text = None
    attributes = element.attrib
    if attributes.get("id") not in used:
        attributes.pop("id", None)
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    if style := attributes.get("style"):
        attributes["style"] = re.sub(r"font-family: [^;]*(; |$)", "", style).strip("; ")
    if element.tag == "image":
        return
    for name in {"x", "y", "width", "height", "d", "transform"} & attributes.keys():
        places = 2 if name == "transform" else digits
        text = re.sub(r"-?\d+\.\d+", lambda each, n=places: _rounded(each[0], n), attributes[name])
        attributes[name] = re.sub(r"\s*([MLCQz])\s*|\s+", lambda each: each[1] or " ", text).strip()


def _rounded(number: str, places: int) -> str:
    text = f"{float(number):.{places}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def with_shared_styles(page: str) -> str:
    """Returns a page in whose drawings styles are classes, in one sheet, and ids are short."""
    classes: dict[str, str] = {}
    ids: dict[str, str] = {}

    def tag(match: re.Match[str]) -> str:
        text = re.sub(
            r' style="([^"]*)"',
            lambda style: f' class="{classes.setdefault(style[1], f"d{len(classes)}")}"',
            match[0],
        )
        return re.sub(
            r'( id="|href="#|url\(#)([^")]+)',
            lambda name: name[1] + ids.setdefault(name[2], f"d{len(ids)}"),
            text,
        )

    def drawing(match: re.Match[str]) -> str:
        return match[1] + re.sub(r"<[^>]+>", tag, match[2])

    page = re.sub(r'(<svg role="img"[^>]*>)(.*?</svg>)', drawing, page, flags=re.S)
    sheet = "".join(f"  .{name} {{ {style} }}\n" for style, name in classes.items())
    return page.replace("</style>", f"{sheet}</style>", 1)


def _titled(text: str, gid: str, titles: Sequence[str]) -> str:
    """Returns an svg document in which the points of a line, or a bar, have titles."""
    start = text.find(f'<g id="{gid}">')
    if start < 0:
        return text
    end = text.find('<g id="', start + 1)
    group = text[start : end if end > 0 else len(text)]
    escaped = [f"<title>{markupsafe.escape(title)}</title>" for title in titles]
    if (points := re.findall(r"<use [^>]*/>", group)) and len(points) == len(escaped):
        remaining = iter(escaped)
        group = re.sub(
            r"<use ([^>]*)/>", lambda use: f"<use {use[1]}>{next(remaining)}</use>", group
        )
    elif len(escaped) == 1 and not points:
        group = group.replace(">", f">{escaped[0]}", 1)
    return text[:start] + group + (text[end:] if end > 0 else "")


def cells(frame: pd.DataFrame, digits: int = 2) -> JsonObject:
    """Returns a frame for the template: groups over the header, header, and rows of cells.

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
    """Returns "" for a column of numbers, "text", or "long text", which may be broken."""
    if pd.api.types.is_numeric_dtype(column):
        return ""
    return "long text" if column.map(lambda value: len(str(value)) > 40).any() else "text"


def _cell(value: Json, digits: int, kind: str) -> tuple[str, str, str]:
    if kind:
        # A long name may be broken after a separator.
        shown = re.sub(r"([/+])", r"\1<wbr>", str(markupsafe.escape(value)))
        return markupsafe.Markup(shown), str(value), kind
    return tables.text(value, digits), "" if pd.isna(value) else f"{value:.12g}", kind


def lineage(frame: pd.DataFrame) -> Section:
    """Returns the section about the models of a study.

    Args:
        frame: What `study_results.lineage` returns.
    """

    def recipe(settings: JsonObject | None) -> str:
        return ", ".join(
            f"{name} {value}"
            for name, value in (settings or {}).items()
            if name != "method" and value not in (None, [], ())
        )

    printed = frame.assign(
        made_of=[_together(parents) for parents in frame["made_of"]],
        recipe=[recipe(settings) for settings in frame["recipe"]],
        digest=frame["digest"].str[:16],
    )
    table = Table("Every model, its parents, recipe and digest", cells(printed))
    summary = f"{len(frame)} models: what each is made of, its recipe and its digest"
    return Section("models", "Models", "Models", [Folded(summary, [table], aside=True)])


def _together(names: Sequence[str]) -> str:
    """Joins names of models, grouped by folder: "bases/1M/instruct, experts/1M/a + b"."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        folders.setdefault(folder, []).append(last)
    return ", ".join(f"{folder}/{' + '.join(last)}" for folder, last in folders.items())


_UNDECIDED = "what is compared differs by less than its uncertainty"


def data_source(source: str) -> str:
    """Returns what a study's source of records is called: "none" is that of own tasks."""
    return "tasks of its own" if source == "none" else source


def meaning(findings: Sequence[Finding]) -> str:
    """Returns what the verdicts on a paper's findings mean, in plain words."""
    verdicts = [finding.verdict for finding in findings]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    parts = [
        f"{count} {verb if count == 1 else plural}{text}"
        for verdict, verb, plural, text in (
            ("supported", "holds", "hold", " here"),
            ("contradicted", "does", "do", " not, rather the contrary"),
            ("undecided", "stays", "stay", f" open: {_UNDECIDED}"),
            ("not tested", "is", "are", " not tested by this study"),
        )
        if (count := counts.get(verdict))
    ]
    return f"Of the paper's {len(verdicts)} findings {', '.join(parts)}."


def verdicts(findings: Sequence[Finding]) -> tuple[str, str]:
    """Returns how many of the paper's findings are supported, as an entry of the headline."""
    verdicts = [finding.verdict for finding in findings]
    counts = [f"{verdicts.count(name)} {name}" for name in ("contradicted", "undecided")]
    if untested := verdicts.count("not tested"):
        counts.append(f"{untested} not tested")
    return (
        f"{verdicts.count('supported')} of {len(verdicts)}",
        f"of the paper's findings are supported here, {', '.join(counts)}",
    )

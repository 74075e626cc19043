"""Writes a study's report: tables, figures, and one HTML page that needs no network."""

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from m2l import storage
from m2l.reporting import (
    blocks,
    figures,
    merge_to_learn_report,
    merging_at_scale_report,
    method_comparison_report,
    tables,
)
from m2l.reporting.blocks import Report
from m2l.studies import study_results
from m2l.studies.merge_to_learn import SkillsStudy
from m2l.studies.merging_at_scale import ScalingStudy
from m2l.studies.method_comparison import MethodComparison
from m2l.version import __version__

# The file formats of figures and of tables: of a study's own report, and of one in a repository.
_FORMATS = (("svg", "pdf", "png"), ("csv", "md", "tex"))
_REPORTS = {
    ScalingStudy: merging_at_scale_report,
    SkillsStudy: merge_to_learn_report,
    MethodComparison: method_comparison_report,
}
_PUBLISHED_FORMATS = (("svg",), ("csv",))


def collect(out: Path) -> Report:
    """Returns a finished study's report, from its folder or its published results.

    Raises:
        DataError: `out` has no study, or one that is not finished.
        EvaluationError: Results cannot be compared.
    """
    results = study_results.load(storage.path(out))
    module = _REPORTS[type(results.study)]
    return module.report(module.collect(results))


def write(out: Path, report: Report | None = None, publish: bool = False) -> Path:
    """Writes a study's report from its results.

    Args:
        out: The study's folder, or a published one (study.json and results.parquet). Gets
            report/tables, report/figures and report/index.html.
        report: What `collect` returned, if it was called before.
        publish: Whether to write only csv and svg, for a repository.

    Returns:
        The page.

    Raises:
        DataError: `out` has no study, or one that is not finished.
        EvaluationError: Results cannot be compared.
    """
    out = storage.path(out)
    report = report or collect(out)
    folder = out / "report"
    formats = _PUBLISHED_FORMATS if publish else _FORMATS
    for name, figure in report.figures.items():
        figures.write(figure, folder / "figures", name, formats[0])
    for name, frame in report.tables.items():
        tables.write(frame, folder / "tables", name, formats[1])
    known = (
        "study.json",
        "config.gin",
        "records.json",
        "results.parquet",
        "results",
        "recipe.json",
    )
    links = [name for name in known if (out / name).exists()]
    path = folder / "index.html"
    storage.write_atomic(path, render(report, links, formats))
    return path


def render(
    report: Report,
    links: Sequence[str] = (),
    formats: tuple[Sequence[str], Sequence[str]] = _FORMATS,
) -> str:
    """Renders the page.

    Args:
        report: Its content.
        links: The names of files in the study's folder to link to.
        formats: The formats of figures and of tables to link to.

    Returns:
        An HTML document; it links to ../NAME for these, and to files in tables/ and figures/.
    """
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("m2l.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")
    page = template.render(
        version=__version__,
        report=report,
        settings_text=json.dumps(report.settings, indent=1),
        tests=list(dict.fromkeys(finding.test for finding, _ in report.findings)),
        links=links,
        figure_formats=formats[0],
        table_formats=formats[1],
        hours=report.seconds / 3600,
    )
    return blocks.with_shared_styles(page) + "\n"

"""A study's report: tables, figures, and one HTML page that needs no network."""

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from m2l import storage
from m2l.reporting import figures, scaling_report, skills_report, tables
from m2l.reporting.blocks import Report
from m2l.studies import records
from m2l.studies.scaling import ScalingStudy
from m2l.version import __version__


def collect(out: Path) -> Report:
    """A finished study's report, from its folder or its published results, whichever its kind.

    Raises:
        DataError: `out` holds no study, or one that is not finished.
        EvaluationError: results cannot be compared.
    """
    found = records.load(storage.path(out))
    kind = scaling_report if isinstance(found.study, ScalingStudy) else skills_report
    return kind.report(kind.collect(found))


def write(out: Path, report: Report | None = None) -> Path:
    """Writes a study's report from its results.

    Args:
        out: The study's folder, or a published one (study.json and results.parquet). Gets
            report/tables, report/figures and report/index.html.
        report: What `collect` made of it, if it was asked before.

    Returns:
        The page.

    Raises:
        DataError: `out` holds no study, or one that is not finished.
        EvaluationError: results cannot be compared.
    """
    out = storage.path(out)
    report = report or collect(out)
    folder = out / "report"
    for name, frame in report.tables.items():
        tables.write(frame, folder / "tables", name)
    for name, figure in report.figures.items():
        figures.write(figure, folder / "figures", name)
    known = ("study.json", "config.gin", "records.json", "results.parquet", "results")
    beside = [name for name in known if (out / name).exists()]
    path = folder / "index.html"
    storage.write_atomic(path, render(report, beside))
    return path


def render(report: Report, beside: Sequence[str] = ()) -> str:
    """The page.

    Args:
        report: What it tells.
        beside: The study's files to link to, by their names in the study's folder.

    Returns:
        An HTML document; it links to ../NAME for these, and to tables/ and figures/ beside it.
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
        beside=beside,
        hours=report.seconds / 3600,
    )
    return page + "\n"

import csv
import re
import xml.etree.ElementTree as ET

import pytest

from m2l.errors import DataError
from m2l.reporting import page, tables
from m2l.studies import scaling


@pytest.fixture(scope="module")
def report(finished_study):
    return page.write(finished_study).parent


def test_the_page_needs_no_network_and_no_other_file(report):
    text = (report / "index.html").read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    # Names of the SVG dialect, which nothing is fetched from.
    assert all("w3.org" in address or "purl.org" in address for address in addresses), addresses
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)", text)
    assert text.count("<svg") == 3


def test_ids_on_the_page_are_unique_and_every_reference_has_its_target(report):
    text = (report / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    assert references <= set(ids) and references


def test_the_performance_table_holds_the_means_over_seeds(study, finished_study, report):
    rows = scaling.performance_rows(study, finished_study)
    with (report / "tables" / "performance.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * 3
    for row in table:
        base = {printed: name for name, printed in tables.BASES.items()}[row["base"]]
        method = {printed: name for name, printed in tables.METHODS.items()}[row["method"]]
        for count in study.expert_counts:
            cells = [
                r["held_in"]
                for r in rows
                if (r["base"], r["method"], r["experts"]) == (base, method, count)
            ]
            assert len(cells) == len(study.seeds)
            assert float(row[f"held-in, {count}"]) == pytest.approx(sum(cells) / len(cells))


def test_every_table_and_figure_is_there_in_every_format(report):
    for name in ("cells", "performance", "experts", "held_out"):
        for ending in ("csv", "md", "tex"):
            assert (report / "tables" / f"{name}.{ending}").stat().st_size > 0
    for name in ("held_in", "held_out", "experts"):
        for ending in ("svg", "pdf", "png"):
            assert (report / "figures" / f"{name}.{ending}").stat().st_size > 0
        ET.parse(report / "figures" / f"{name}.svg")


def test_the_same_results_give_the_same_bytes(finished_study, report):
    before = {p: p.read_bytes() for p in report.rglob("*") if p.is_file()}
    page.write(finished_study)
    assert {p: p.read_bytes() for p in report.rglob("*") if p.is_file()} == before


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"study\.json is missing"):
        page.write(tmp_path)

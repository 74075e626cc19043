import re

import pytest

from m2l.reporting import merging_at_scale_report, page, tables

FIGURES = {"experts", "sweeps_pretrained", "sweeps_instruct", *merging_at_scale_report.CAPTIONS}


@pytest.fixture(scope="module")
def html(written):
    return written.page.read_text()


def test_the_page_needs_no_network_and_no_other_file(html):
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", html))
    # Names of the SVG dialect, which nothing is fetched from.
    assert all("w3.org" in address or "purl.org" in address for address in addresses), addresses
    assert not re.search(r"<(img|iframe|script \S*src)\b|@import|url\((?!#)", html)
    assert re.findall(r"<link [^>]*>", html) == ['<link rel="icon" href="data:,">']
    assert "default-src 'none'" in html


def test_ids_on_the_page_are_unique_and_every_reference_has_its_target(html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert references <= set(ids) and references


def test_every_link_of_the_page_leads_to_a_file(html, written):
    links = set(re.findall(r'href="((?!#|data:)[^"]+)"', html))
    assert "../study.json" in links and "../results.parquet" not in links
    for link in links:
        assert (written.report / link).exists(), link


def test_every_table_and_figure_is_there_in_every_format(written):
    names = {"performance", "cells", "experts", "held_out", "choices"}
    names |= {f"table{n}_{column}_{base}" for n, (column, base) in tables.PAPER.items()}
    for folder, stems, endings in (
        ("tables", names, ("csv", "md", "tex")),
        ("figures", FIGURES, ("svg", "pdf", "png")),
    ):
        files = {path.name for path in (written.report / folder).iterdir()}
        assert files == {f"{stem}.{ending}" for stem in stems for ending in endings}


def test_our_figures_and_the_papers_are_on_the_page(html):
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', html)
    assert labels[::2] == labels[1::2]  # For wide screens and for narrow ones.
    labels = labels[::2]
    assert len(labels) == len(FIGURES) + len(merging_at_scale_report.CAPTIONS)
    assert sum(label.startswith("The paper&#39;s figure") for label in labels) == 7


def test_every_finding_has_its_claim_sentence_test_and_verdict(html, material):
    sections = re.findall(r'<section id="finding-(\d)">(.+?)</section>', html, re.S)
    assert [int(number) for number, _ in sections] == [1, 2, 3, 4, 5]
    for (_, section), finding in zip(sections, material.findings, strict=True):
        assert finding.title in section and finding.claim in section and finding.test in section
        assert finding.sentence.replace("&", "&amp;") in section
        kind = finding.verdict.replace(" ", "-")
        assert re.search(rf'class="badge {kind}">. {finding.verdict}<', section)
        for name in merging_at_scale_report.FINDINGS[finding.number]:
            assert f'id="figure-{name}"' in section
        figures = len(merging_at_scale_report.FINDINGS[finding.number])
        assert section.count('<svg role="img" aria-label="The paper&#39;s figure') == 2 * figures


def test_what_results_hold_is_text_and_no_markup(html):
    assert "<b>1<b>1" not in html and "&lt;b&gt;1&lt;b&gt;1" in html


def test_the_lineage_gives_parents_and_the_recipe_as_chosen(html):
    parents = "bases/64B/instruct, experts/64B/instruct/sentiment + summarization"
    assert parents in html.replace("<wbr>", "")
    assert ">scale 1.0, density 0.2<" in html


def test_a_study_of_one_size_without_a_sweep_has_a_page(small):
    report = merging_at_scale_report.report(small)
    assert not any(name.startswith("sweeps") for name in report.figures)
    html = page.render(report)
    assert "1 model size (1B" in html
    assert "are fixed values" in html and "The results it was made from" not in html

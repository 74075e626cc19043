"""From paper 2's study as it is published to its report."""

import csv
import dataclasses
import html as markup
import re

import pytest

from m2l.reporting import merge_to_learn_report, merge_to_learn_tables, page
from m2l.studies import study_results


def rows(written, name):
    with (written.report / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def html(skills_written):
    return skills_written.page.read_text()


def test_every_table_and_figure_is_there_in_every_format_and_linked(html, skills_written):
    for folder, stems, endings in (
        ("tables", merge_to_learn_report.TABLES, ("csv", "md", "tex")),
        ("figures", ("tradeoff", "data_curves", "cost", "refusals"), ("svg", "pdf", "png")),
    ):
        files = {path.name for path in (skills_written.report / folder).iterdir()}
        assert files == {f"{stem}.{ending}" for stem in stems for ending in endings}
    links = set(re.findall(r'href="((?!#|data:)[^"]+)"', html))
    assert {"../study.json", "../results.parquet", "figures/tradeoff.svg"} <= links
    for link in links:
        assert (skills_written.report / link).exists(), link


def test_ids_are_unique_and_every_reference_has_its_target(html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_every_finding_has_its_verdict_test_and_what_it_is_read_from(html, skills_material):
    sections = re.findall(r'<section id="finding-(\d)">(.+?)</section>', html, re.S)
    assert [int(number) for number, _ in sections] == [1, 2, 3, 4, 5, 6]
    for (_, section), finding in zip(sections, skills_material.findings, strict=True):
        section = markup.unescape(section)
        assert finding.title in section and finding.claim in section
        assert re.search(rf'class="badge {finding.verdict}">. {finding.verdict}<', section)
        assert "<figure id=" in section or "<table" in section
    assert markup.unescape(html).count(skills_material.findings[0].test) == 1


def test_the_table_of_several_skills_has_the_papers_rows(skills_written):
    table = rows(skills_written, "several")
    assert [(row["model"], row["skill"]) for row in table] == [
        ("General model", ""),
        ("Continued fine-tuning", "all"),
        ("Retraining", "all"),
        ("Task Arithmetic", "science, safety"),
        ("Task Arithmetic", "science, coding"),
        ("Task Arithmetic", "safety, coding"),
        ("Task Arithmetic", "all"),
        ("TIES (mergekit)", "all"),
        ("TIES", "all"),
        ("DARE", "all"),
    ]
    assert float(table[0]["general"]) == 60 and float(table[0]["GFLOPs"]) == 0
    assert float(table[2]["science"]) == pytest.approx(25 + 55 * 0.97)


def test_the_best_weight_is_that_of_the_best_mean_of_both_scores(skills_written, skills_material):
    frame = skills_material.models
    for row in rows(skills_written, "weights"):
        names = {"Task Arithmetic": "task_arithmetic", "WiSE-FT": "wise_ft"}
        names |= {"TIES (mergekit)": "ties_mergekit"}
        method = names.get(row["method"], row["method"].lower())
        tried = frame[(frame["method"] == method) & (frame["skills"] == row["skill"])]
        tried = tried[tried["part"] == 100]
        both = (tried["general"] + tried[row["skill"]]) / 2
        assert float(row["best_score"]) == pytest.approx(both.max())
        assert both[tried["weight"] == float(row["best_w"])].max() == both.max()
        assert both[tried["heuristic"]].iloc[0] == pytest.approx(float(row["score"]))


def test_a_way_is_ahead_only_if_the_difference_is_beyond_its_error(skills_records):
    """General scores have an error of 8 / 3.92 / sqrt(31): a difference counts from 1.02 on."""
    for ahead, winner in ((1.1, "retraining"), (0.9, "none")):

        def change(model, name, score, ahead=ahead):
            if name != "general":
                return 50
            return 60 + ahead if model.startswith("models/rt") else 60

        material = merge_to_learn_report.collect(skills_records(change))
        table = merge_to_learn_tables.compared(material.study, material.models)
        for _, row in table.iterrows():
            if row["score"] == "general":
                assert row["ahead"] == winner and row["by"] == pytest.approx(ahead)
            elif row["score"] != "mean of both":
                assert row["ahead"] == "none" and row["by"] == 0
        said = merge_to_learn_tables.ahead(material.study, material.models)[0]
        where = "in science (general), safety (general), coding (general)"
        assert f"Retraining is clearly ahead {where if winner != 'none' else 'nowhere'}" in said


def test_sentences_tell_of_all_the_data_of_little_and_of_costs(html, skills_material):
    said = merge_to_learn_tables.ahead(skills_material.study, skills_material.models)
    assert said[0].startswith("With all of a skill's data: Continued fine-tuning is clearly")
    # Three comparisons for each skill, and compliance of safety.
    assert said[1].startswith("With 20 % of") and "of 10 comparisons" in said[1]
    # 7,000 of 16,800 examples.
    assert "42 % for science" in said[-1]
    for sentence in said:
        assert sentence in markup.unescape(html)


def test_the_command_prints_each_way_and_writes_the_same_bytes_again(
    skills_written, run_m2l, capfd
):
    report = skills_written.report
    before = {path: path.read_bytes() for path in report.rglob("*") if path.is_file()}
    (report / "index.html").unlink()
    assert run_m2l("report", skills_written.out) == 0
    assert {p: p.read_bytes() for p in report.rglob("*") if p.is_file()} == before
    printed = capfd.readouterr().out
    assert "Continued fine-tuning" in printed and "compliance" in printed


def test_a_study_without_safety_has_a_page(skills_records):
    found = skills_records()
    study = dataclasses.replace(
        found.study,
        skills={"science": "skills_science"},
        parts=(),
        retrained_parts=(),
    )
    found = study_results.StudyResults(
        study, found.results, found.recipes, found.choices, found.seconds
    )
    html = page.render(merge_to_learn_report.report(merge_to_learn_report.collect(found)))
    assert "1 skill (science)" in html and 'id="finding-4"' not in html
    assert 'id="figure-refusals"' not in html

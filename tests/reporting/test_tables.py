import csv

import numpy as np
import pandas as pd
import pytest

from m2l.evaluation.results import Result
from m2l.merging import Recipe
from m2l.reporting import tables
from m2l.studies import merging_at_scale, normalized_performance, study_results
from m2l.training.settings import TrainSettings

# Copied from appendix C by hand, apart from the file that the package holds.
PRINTED = {
    1: """
    Average 0.85 0.78 0.81 0.83 0.90 0.82 0.82 0.85 0.94 0.84 0.80 0.77 0.97 0.91 0.89 0.93
    Task Arithmetic 0.91 0.82 0.84 0.86 0.95 0.86 0.85 0.88 0.96 0.90 0.91 0.92 1.00 0.91 0.90 0.93
    DARE-TIES 0.90 0.81 0.83 0.86 0.93 0.86 0.84 0.88 0.94 0.89 0.87 0.88 0.97 0.91 0.89 0.93
    TIES 0.89 0.81 0.82 0.85 0.93 0.86 0.84 0.88 0.95 0.88 0.86 0.86 0.97 0.90 0.89 0.93
    Multitask 0.97 0.96 0.96 0.96 0.96 0.96 0.97 0.96 0.99 0.97 0.98 0.98 0.99 0.98 0.98 0.99
    """,
    2: """
    Average 0.99 1.00 1.04 1.05 1.03 1.02 1.03 1.02 1.05 1.10 1.11 1.16 1.00 1.03 1.06 1.09
    Task Arithmetic 1.03 1.03 1.04 1.05 1.06 1.05 1.05 1.03 1.05 1.10 1.13 1.18 1.00 1.03 1.06 1.09
    DARE-TIES 1.02 1.03 1.04 1.05 1.05 1.04 1.04 1.03 1.05 1.10 1.12 1.17 1.00 1.03 1.06 1.09
    TIES 1.02 1.03 1.04 1.05 1.06 1.05 1.06 1.04 1.04 1.09 1.11 1.16 1.00 1.03 1.06 1.10
    Multitask 1.11 1.11 1.11 1.11 1.12 1.12 1.12 1.12 1.18 1.18 1.18 1.18 1.05 1.05 1.05 1.05
    """,
    3: """
    Average 0.63 0.44 0.36 0.26 0.66 0.53 0.50 0.32 0.70 0.48 0.51 0.27 0.80 0.74 0.69 0.67
    Task Arithmetic 0.66 0.52 0.44 0.39 0.68 0.54 0.54 0.42 0.72 0.56 0.60 0.46 0.80 0.74 0.69 0.67
    DARE-TIES 0.65 0.51 0.42 0.37 0.66 0.51 0.51 0.32 0.67 0.44 0.51 0.27 0.80 0.74 0.69 0.67
    TIES 0.66 0.50 0.41 0.33 0.67 0.52 0.48 0.29 0.68 0.49 0.52 0.27 0.80 0.71 0.65 0.56
    Multitask 0.88 0.88 0.88 0.87 1.06 1.04 1.04 1.06 1.25 1.15 1.11 1.20 0.97 0.96 0.96 0.96
    """,
    4: """
    Average 0.98 1.00 1.02 1.04 1.01 0.97 1.02 0.98 0.95 0.85 0.93 0.83 1.28 1.24 1.29 1.25
    Task Arithmetic 1.01 1.03 1.05 1.07 1.06 1.03 1.04 1.00 1.05 1.03 1.10 1.08 1.29 1.28 1.36 1.35
    DARE-TIES 0.99 1.01 1.04 1.05 1.02 1.00 1.05 1.01 0.97 0.89 0.99 0.90 1.28 1.24 1.28 1.24
    TIES 1.05 1.06 1.03 1.04 1.07 1.04 1.02 0.99 1.01 0.93 0.98 0.90 1.31 1.22 1.24 1.15
    Multitask 1.10 1.10 1.10 1.10 1.62 1.62 1.62 1.62 1.51 1.51 1.51 1.51 1.73 1.73 1.73 1.72
    """,
}
SIZES, COUNTS = ("1B", "8B", "24B", "64B"), (2, 4, 6, 8)


def printed(number):
    """The paper's table as rows: a method and its 16 numbers, as printed."""
    lines = [line.split() for line in PRINTED[number].strip().splitlines()]
    return [(" ".join(line[:-16]), line[-16:]) for line in lines]


def of_paper(number):
    return tables.performance(tables.paper_performance(), *tables.PAPER[number])


def test_the_papers_frame_has_every_cell_once_and_no_bands():
    frame = tables.paper_performance()
    assert len(frame) == 4 * 2 * 5 * 4
    assert not frame.duplicated(["size", "base", "method", "experts"]).any()
    assert list(frame.columns[4:]) == [
        f"{column}{end}" for column in ("held_in", "held_out") for end in ("", "_low", "_high")
    ]
    assert frame[["held_in", "held_out"]].notna().all(axis=None)
    assert frame.filter(regex="_(low|high)$").isna().all(axis=None)
    assert list(frame["size"].unique()) == list(SIZES)


@pytest.mark.parametrize("number", PRINTED)
def test_the_papers_frame_gives_the_papers_tables(number):
    table = of_paper(number)
    assert list(table.columns) == [(size, count) for size in SIZES for count in COUNTS]
    assert list(table.index) == [method for method, _ in printed(number)]
    for method, numbers in printed(number):
        assert [tables.text(value) for value in table.loc[method]] == numbers


@pytest.mark.parametrize("number", PRINTED)
def test_every_format_holds_the_papers_numbers_in_the_papers_order(number, tmp_path):
    tables.write(of_paper(number), tmp_path, "table")
    with (tmp_path / "table.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["method", *(f"{size}, {count}" for size in SIZES for count in COUNTS)]
    assert [(row[0], [f"{float(value):.2f}" for value in row[1:]]) for row in rows] == printed(
        number
    )
    for ending, separator, skipped in (("md", "|", 2), ("tex", "&", 5)):
        lines = (tmp_path / f"table.{ending}").read_text().splitlines()[skipped:]
        cells = [
            [cell.strip(" \\") for cell in line.strip("| ").split(separator)] for line in lines
        ]
        rows = [(name, numbers) for name, *numbers in cells if numbers]
        assert rows[-5:] == printed(number)


def test_the_latex_header_spans_each_size_over_its_numbers_of_experts():
    lines = tables.latex(of_paper(1)).splitlines()
    assert lines[1] == r"\toprule" and lines[-2] == r"\bottomrule"
    spans = " & ".join(rf"\multicolumn{{4}}{{c}}{{{size}}}" for size in SIZES)
    assert lines[2] == rf"Merging method ($\downarrow$) & {spans} \\"
    assert lines[3] == (
        r"\cmidrule(lr){2-5} \cmidrule(lr){6-9} \cmidrule(lr){10-13} \cmidrule(lr){14-17}"
    )
    counts = " & ".join(4 * [" & ".join(map(str, COUNTS))])
    assert lines[4] == rf"\# of experts ($\rightarrow$) & {counts} \\"


def test_a_cell_that_was_not_measured_is_a_dash_and_further_methods_stand_before_multitask():
    frame = tables.paper_performance()
    frame = frame[frame["size"] == "1B"]
    extra = frame[(frame["method"] == "ties") & (frame["experts"] == 2)]
    frame = pd.concat([frame, extra.assign(method="model_stock")])
    table = tables.performance(frame, "held_in", "instruct")
    assert list(table.index)[-3:] == ["TIES", "Model Stock", "Multitask"]
    assert tables.markdown(table).splitlines()[-2] == "| Model Stock | 0.89 | – | – | – |"
    assert r"Model Stock & 0.89 & -- & -- & -- \\" in tables.latex(table)


def test_what_is_special_to_latex_is_escaped():
    frame = pd.DataFrame({"data_set": ["a_b & 100% #1 {~^\\}"], "score": [np.nan]})
    row = tables.latex(frame).splitlines()[4]
    escaped = r"a\_b \& 100\% \#1 \{\textasciitilde \textasciicircum \textbackslash \}"
    assert row == rf"{escaped} & -- \\"
    assert tables.latex(frame).splitlines()[2] == r"data\_set & score \\"


def test_an_experts_gain_is_its_score_less_its_bases(experts):
    table = tables.experts(experts)
    assert np.allclose(table["gain"], experts["expert"] - experts["before"])
    assert set(table["base"]) == {"Pretrained", "Instruction-tuned"}


def test_the_chosen_settings_are_one_for_each_cell(choices):
    table = tables.chosen(choices)
    assert len(table) == 2 * 2 * 3 * 2
    assert not table.duplicated(["size", "base", "method", "experts"]).any()
    assert (table["scale"] == 1 / table["experts"]).all()


# --- the paper's numbers through a study's aggregation ---

CATEGORIES = [*"abcdefgh"]
# Of each category its datasets, of each dataset the reference's score in percent.
EXPERT = {c: {f"{c}1": 40.0 + i, f"{c}2": 60.0 - 2 * i} for i, c in enumerate(CATEGORIES)}
HELD_OUT = {"w": {"w1": 30.0, "w2": 44.0}, "x": {"x1": 33.0}, "y": {"y1": 41.0, "y2": 28.0}}
NAMES = {"average": "Average", "task_arithmetic": "Task Arithmetic", "ties": "TIES"}
NAMES |= {"dare_ties": "DARE-TIES", "multitask": "Multitask"}


def scores(references, ratios=None):
    """Results whose ratios to the references have these means over a category's datasets."""
    results = {}
    for category, datasets in references.items():
        spread = np.linspace(-0.08, 0.08, len(datasets)) if len(datasets) > 1 else [0.0]
        for (dataset, reference), part in zip(datasets.items(), spread, strict=True):
            score = reference * (ratios[category] + part) if ratios else reference
            results[dataset] = Result(
                *(dataset, dataset, category, category in HELD_OUT, "rank", "accuracy", score),
                *({"accuracy": score}, 1, 0, 0, 0.0, "model", dataset),
            )
    return results


def test_the_papers_numbers_come_out_of_a_studys_aggregation_as_they_are_printed(tiny_config):
    settings = TrainSettings(mixture="t0_held_in", steps=3)
    study = merging_at_scale.ScalingStudy(
        models=dict.fromkeys(SIZES, tiny_config),
        **dict.fromkeys(("pretrain", "instruct", "expert", "multitask"), settings),
        categories=tuple(CATEGORIES),
        held_out=tuple(HELD_OUT),
        recipes=(
            *(Recipe(method=name) for name in ("average", "task_arithmetic", "ties")),
            Recipe(method="dare_ties", drop_rate=0.5),
        ),
        expert_counts=COUNTS,
        seeds=(0, 1, 2),
    )
    cells = {}
    for number, (column, base) in tables.PAPER.items():
        for name, row in printed(number):
            for place, text in enumerate(row):
                size, count = SIZES[place // 4], COUNTS[place % 4]
                cells[column, base, name, size, count] = float(text)
    results = {}
    for size in SIZES:
        for base in study.bases:
            out_of = dict.fromkeys(HELD_OUT, cells["held_out", base, "Multitask", size, 2])
            # One multitask model: what it has of a category must give the means of all draws.
            rows, wanted = [], []
            for count in COUNTS:
                drawn = [merging_at_scale.constituents(study, count, seed) for seed in study.seeds]
                rows.append([sum(c in each for each in drawn) / 3 / count for c in CATEGORIES])
                wanted.append(cells["held_in", base, "Multitask", size, count])
            solved, *_ = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)
            together = dict(zip(CATEGORIES, solved, strict=True))
            results[f"bases/{size}/{base}"] = scores(EXPERT | HELD_OUT)
            results[f"multitask/{size}/{base}"] = scores(EXPERT | HELD_OUT, together | out_of)
            for category in CATEGORIES:
                own = scores({category: EXPERT[category]})
                results[f"experts/{size}/{base}/{category}"] = own
    for merge in merging_at_scale.merges(study):
        key = merge.base, NAMES[merge.recipe.method], merge.size, merge.count
        by_seed = (0.04, -0.01, -0.03)[merge.seed] * (merge.count < 8)
        tilt = np.linspace(-0.1, 0.1, merge.count)
        ratios = cells["held_in", *key] + by_seed + tilt
        out_of = cells["held_out", *key] + by_seed + np.linspace(0.05, -0.05, len(HELD_OUT))
        results[merge.model] = scores(
            {c: EXPERT[c] for c in merge.categories} | HELD_OUT,
            dict(zip([*merge.categories, *HELD_OUT], [*ratios, *out_of], strict=True)),
        )
    loaded = study_results.StudyResults(study, results, {}, {}, {})
    replicates = normalized_performance.Replicates(normalized_performance.grid(loaded))
    frame = normalized_performance.performance(replicates)
    for number, (column, base) in tables.PAPER.items():
        table = tables.performance(frame, column, base)
        for name, row in printed(number):
            shown = [f"{value:.2f}" for value in table.loc[name]]
            if (number, name) == (4, "Multitask"):
                # One model has one held-out figure, whatever is merged: 1.73, printed once as 1.72.
                assert row[-1] == "1.72" and shown[-1] == "1.73"
                shown, row = shown[:-1], row[:-1]
            assert shown == row, (number, name)

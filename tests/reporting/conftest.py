"""Made-up results in the schema of a study's aggregates, for reports nobody trains for."""

import dataclasses
import types

import numpy as np
import pandas as pd
import pytest

from m2l.reporting import merge_to_learn_report, merging_at_scale_report, page, tables
from m2l.studies import study_results
from m2l.studies.findings import Finding

SETTINGS = {
    "recipes": ["average", "task_arithmetic", "dare_ties", "ties"],
    "expert_counts": [2, 4, 6, 8],
    "categories": ["sentiment", "summarization"],
    "held_out": ["coreference"],
    "seeds": [0, 1, 2],
    "source": "microworld",
    "split": "validation",
    "max_examples": 48,
    "max_prompts": 2,
    "generative_score": "likelihood",
    "swept": {"ties": {"scale": [0.5, 1.0]}},
    "expert": {"mixture": "each", "steps": 100, "validation": ""},
    "multitask": {"mixture": "all", "steps": 300, "validation": ""},
}


@pytest.fixture(scope="session")
def paper_frame():
    return tables.paper_performance()


@pytest.fixture(scope="session")
def banded(paper_frame):
    """The paper's frame with made-up bands."""
    down, up = 0.02, 0.05
    bands = {}
    for column in ("held_in", "held_out"):
        bands[f"{column}_low"] = paper_frame[column] - down
        bands[f"{column}_high"] = paper_frame[column] + up
    return paper_frame.assign(**bands)


@pytest.fixture(scope="session")
def experts():
    draw = np.random.default_rng(0)
    rows = [
        (size, base, f"category {i // 2}", f"dataset_{i}", *draw.uniform([5, 50, 40], [45, 95, 90]))
        for size in ("1B", "64B")
        for base in ("pretrained", "instruct")
        for i in range(6)
    ]
    columns = ["size", "base", "category", "dataset", "before", "expert", "multitask"]
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture(scope="session")
def choices():
    """Curves with their tops at scale 1/experts, and at density or drop rate 0.5."""
    others = {"task_arithmetic": None, "dare_ties": "drop_rate", "ties": "density"}
    rows = []
    for size in ("1B", "64B"):
        for base in ("pretrained", "instruct"):
            for method, other in others.items():
                for experts in (2, 4):
                    for scale in (0.25, 0.5, 1.0):
                        for value in (0.2, 0.5) if other else (np.nan,):
                            row = dict.fromkeys(("density", "drop_rate"), np.nan)
                            row |= {other: value} if other else {}
                            top = scale * experts == 1 and value != 0.2
                            score = 0.9 - abs(scale - 1 / experts) - 0.1 * (value == 0.2)
                            row |= {"scale": scale, "score": score, "chosen": top}
                            cell = {"size": size, "base": base, "method": method}
                            rows.append(cell | {"experts": experts} | row)
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def material(banded, experts, choices):
    """All that a page is made from."""
    cells = pd.concat([banded.assign(seed=seed, constituents="a+b") for seed in range(3)])
    held_out = pd.DataFrame(
        {
            "size": ["1B", "64B"],
            "base": ["pretrained", "instruct"],
            "dataset": ["super_glue/rte", "winogrande"],
            "chance": [50.0, 50.0],
            "before": [51.2, 60.0],
            "multitask": [55.0, np.nan],
        }
    )
    base, merge = "bases/64B/instruct", "merges/64B/instruct/sentiment+summarization/ties"
    experts_of = [f"experts/64B/instruct/{name}" for name in ("sentiment", "summarization")]
    lineage = pd.DataFrame(
        {
            "model": [base, merge],
            "kind": ["base", "merge"],
            "made_of": [[], [base, *experts_of]],
            "recipe": [None, {"method": "ties", "scale": 1.0, "density": 0.2, "drop_rate": None}],
            "digest": ["0" * 16, "<b>1" * 4],
            "results": [12, 9],
        }
    )
    verdicts = ("supported", "supported", "contradicted", "undecided", "not tested")
    found = [
        Finding(
            *(n, f"Title {n}", f"Claim {n}", "difference", 0.1, (0.05, 0.2), verdict),
            *(f"Sentence {n} & more", f"sign test {n}"),
        )
        for n, verdict in enumerate(verdicts, start=1)
    ]
    frames = {"performance": banded, "cells": cells, "experts": experts, "held_out": held_out}
    beside = {"choices": choices, "lineage": lineage, "findings": found, "seconds": 7000.0}
    return merging_at_scale_report.ScalingContents(SETTINGS, **frames, **beside)


@pytest.fixture(scope="session")
def small(material):
    """The same of one size and without a sweep."""
    performance = material.performance[material.performance["size"] == "1B"]
    experts = material.experts[material.experts["size"] == "1B"]
    return dataclasses.replace(
        material, performance=performance, experts=experts, choices=material.choices.iloc[:0]
    )


def _written(out, report):
    page.write(out, report)
    return types.SimpleNamespace(out=out, report=out / "report", page=out / "report/index.html")


@pytest.fixture(scope="session")
def written(material, tmp_path_factory):
    """A written report of made-up results: its folder."""
    out = tmp_path_factory.mktemp("made_up")
    (out / "study.json").write_text("{}")
    return _written(out, merging_at_scale_report.report(material))


@pytest.fixture(scope="session")
def skills_published(skills_records, tmp_path_factory):
    """The folder of made-up results of paper 2's study."""
    out = tmp_path_factory.mktemp("made_up_skills")
    study_results.publish(skills_records(), out)
    return out


@pytest.fixture(scope="session")
def skills_material(skills_published):
    return merge_to_learn_report.collect(study_results.load(skills_published))


@pytest.fixture(scope="session")
def skills_written(skills_published, skills_material):
    """The report of it."""
    return _written(skills_published, merge_to_learn_report.report(skills_material))

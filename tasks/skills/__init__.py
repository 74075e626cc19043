"""What paper 2 adds skills by: a general mixture, and data and evaluations of three skills.

The microworld has skills of its own; other sources have the public sets of the paper, or the
nearest to them that is public. Mixtures bear the same names everywhere.
"""

import dataclasses
import functools
from collections.abc import Mapping

from m2l.data.prompts import Dataset
from m2l.data.raw_records import Part
from m2l.tasks import flan

from . import embedded, public

EMBEDDED = embedded.DATASETS
PUBLIC = public.DATASETS
# In percent of the data of a skill, for curves; 100 is the mixture without a number.
SHARES = (20, 40, 60, 80)

GENERAL, SCIENCE, SAFETY, CODING = (
    f"skills_{s}" for s in ("general", "science", "safety", "coding")
)
# With answers to harmless requests that sound like the forbidden ones, which the paper had not.
SAFETY_CONTRAST = "skills_safety_contrast"
TRAINING: Mapping[str, tuple[str, ...]] = {
    GENERAL: ("general_requests", "tulu_v2"),  # and on the microworld the instruction mixture
    SCIENCE: ("science_facts", "science_reading", "sciriff"),
    SAFETY: ("safety_unsafe", "coconot"),
    SAFETY_CONTRAST: ("safety_unsafe", "safety_safe"),
    CODING: ("coding_programs", "code_feedback"),
}
SKILLS = (SCIENCE, SAFETY, CODING)
"""The mixtures of the skills that are added; SHARES are had of these."""
_BBH = tuple(dataset.name for dataset in public.BBH)
EVALUATION: Mapping[str, tuple[str, ...]] = {
    "skills_general_eval": ("general_requests", "mmlu", "gsm8k", *_BBH, "truthful_qa"),
    "skills_science_eval": ("science_facts", "science_reading", "sciriff"),
    "skills_safety_eval": ("safety_unsafe", "harmbench", "xstest_unsafe", "toxigen"),
    "skills_exaggerated_refusals_eval": ("safety_safe", "xstest_safe"),
    "skills_coding_eval": ("coding_programs", "human_eval_plus", "mbpp_plus"),
}


def _part(dataset: Dataset, percent: int) -> Dataset:
    """Returns so many percent of a dataset's records; the same of them in any larger part."""
    train = dataset.splits["train"]
    if isinstance(train, Part):
        train = dataclasses.replace(train, percent=percent)
    else:
        train = Part(train, field="", held_back=None, percent=percent)
    return dataclasses.replace(
        dataset,
        name=f"{dataset.name}_{percent}pct",
        naming=f"{dataset.name}_{{prompt}}_{percent}pct",
        splits={**dataset.splits, "train": train},
        sizes={},
        part_of=dataset.name,
    )


@functools.cache
def datasets(source: str) -> tuple[Dataset, ...]:
    """Returns the skills' datasets that a kind of source has, parts for data curves included."""
    whole = EMBEDDED if source == "microworld" else PUBLIC
    trained = {name for mixture in SKILLS for name in TRAINING[mixture]}
    parts = (_part(d, percent) for d in whole if d.name in trained for percent in SHARES)
    return (*whole, *parts)


def whole(dataset: Dataset) -> Dataset:
    """Returns the dataset that one of these is a part of for data curves, or itself."""
    if not dataset.name.endswith("pct"):
        return dataset
    return next((d for d in (*EMBEDDED, *PUBLIC) if d.name == dataset.part_of), dataset)


def is_skill(dataset: Dataset) -> bool:
    """Returns whether a dataset is one of these."""
    return dataset.category.startswith("skill_")


def mixtures_of(dataset: Dataset) -> tuple[str, ...]:
    """Returns the mixtures that a dataset's tasks belong to, of the skills' and of its own name."""
    if dataset.category == flan.MIXTURE:
        # FLAN's submixes are no part of Tulu's mixture, which has its own selection.
        return (GENERAL, "skills_general_eval") if dataset.hub is None else ()
    if not is_skill(dataset):
        return ()
    of = whole(dataset)
    if of is not dataset:
        percent = dataset.name.removeprefix(of.name)
        return (dataset.name, *(mix + percent for mix in SKILLS if of.name in TRAINING[mix]))
    named = [mixture for table in (TRAINING, EVALUATION) for mixture in table]
    members = {**TRAINING, **EVALUATION}
    wholes = (dataset.part_of,) if dataset.part_of else ()
    return (dataset.name, *wholes, *(mix for mix in named if dataset.name in members[mix]))

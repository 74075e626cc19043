"""The instruction mixture without any of the study's tasks, one dataset per task family."""

from m2l.data.prompts import Dataset, written_out

MIXTURE = "flan_without_t0"
# Chung et al. (2022) cap what a task may contribute to the mixture at 30,000 examples.
MAX_EXAMPLES = 30_000
# Family of the instructions, and whether they offer answers to choose from.
FAMILIES: dict[str, bool] = {
    "copy": False,
    "first_word": False,
    "last_word": False,
    "next_word": False,
    "reverse": False,
    "word_of_kind": True,
    "kind_of_word": True,
    "odd_one_out": True,
    "same_kind": True,
    "opposite": True,
    "true_or_false": True,
    "true_sentence": True,
    "sentence_about": True,
    "mentions": True,
    "missing_word": True,
    "name_it": False,
    "choose_it": True,
    "who_is_it": True,
    "he_or_she": True,
}

DATASETS = tuple(
    written_out(f"flan_{family}", category=MIXTURE, choices=choices)
    for family, choices in FAMILIES.items()
)


def family(dataset: Dataset) -> str:
    """The family whose instructions one of DATASETS holds."""
    return dataset.name.removeprefix("flan_")

"""T0's held-in datasets: experts are trained on them, one expert per category."""

from m2l.data.prompts import datasets_in

from . import classification, closed_book, paraphrase, question_answering, text_generation

_MODULES = (question_answering, closed_book, classification, text_generation, paraphrase)
DATASETS = datasets_in(*map(vars, _MODULES))

"""Compares `m2l search` with the grid of `m2l sweep`, at a quarter of the evaluations.

    m2l demo --out DEMO
    python scripts/bench/search.py DEMO [--seeds 5] [--max_examples 40] [--out DIR]

The models are the demo's four experts of the instruction-tuned 1M base, on the embedded tasks that
they were trained on. Every recipe of a grid is scored on the half of the examples that chooses, and
its best is judged by the other half. A search of the ranges that the grid is of may score a quarter
as many examples: of its candidates count those, in their order, until that is used up. Prints for
each grid and seed both chosen recipes' scores on both halves, and the difference on the half that
judges with its interval of 95 % (paired bootstrap); and as JSON the means over the seeds.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import jax
import numpy as np

from m2l import api, checkpoints, merging, models, partitioning
from m2l.data.vocabularies import Vocabulary
from m2l.evaluation import bootstrap
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.task_data import TaskData, halves
from m2l.merging import METHODS, Recipe
from m2l.studies import recipe_search
from m2l.typing import Params

CATEGORIES = ("sentiment", "topic_classification", "closed_book_qa", "structure_to_text")
SCALES = [round(0.4 * place, 1) for place in range(1, 7)]
GRIDS: dict[str, dict[str, list[float]]] = {
    # Ilharco et al. 2023: 0.05, 0.1, ..., 1.
    "task_arithmetic": {"scale": [round(0.05 * place, 2) for place in range(1, 21)]},
    "ties": {"density": [0.1, 0.2, 0.5, 1.0], "scale": SCALES},
    "dare_ties": {"drop_rate": [0.1, 0.5, 0.9], "scale": SCALES},
}
QUARTER = 4


class Scores:
    """Scores recipes' merges on both halves of the tasks, each once."""

    def __init__(
        self,
        base: Params,
        experts: Sequence[Params],
        tasks: Sequence[TaskData],
        config: models.Config,
        vocabulary: Vocabulary,
    ):
        self._base, self._experts, self._tasks = base, experts, tasks
        parts = [part for task in tasks for part in halves(task)]
        self._evaluator = Evaluator(config, parts, vocabulary)
        self._pairs = [halves(task) for task in tasks]
        self._known: dict[tuple[str, int], list[bootstrap.Statistic]] = {}

    def statistics(self, recipe: Recipe, half: int) -> list[bootstrap.Statistic]:
        """Returns the statistic of each task: of half 0, which chooses, or 1, which judges."""
        key = json.dumps(recipe.to_dict(), sort_keys=True), half
        if key not in self._known:
            base = self._base if METHODS[recipe.method].needs_base else None
            params = merging.merge_params(base, self._experts, recipe)
            names = [pair[half].info.name for pair in self._pairs]
            values = self._evaluator.values(params, names)
            self._known[key] = [
                bootstrap.statistic(task.metric, [{"value": value} for value in values[name]])
                for task, name in zip(self._tasks, names, strict=True)
            ]
        return self._known[key]

    def counts(self, half: int) -> list[int]:
        """Returns the examples of each task."""
        return [len(pair[half].examples) for pair in self._pairs]

    def score(self, recipe: Recipe, half: int) -> float:
        """Returns the mean over tasks, in percent."""
        pairs = zip(self.statistics(recipe, half), self.counts(half), strict=True)
        return fmean(statistic(np.arange(count)) for statistic, count in pairs)

    def difference(self, one: Recipe, other: Recipe) -> bootstrap.Difference:
        """Compares two recipes on the half that judges."""
        return bootstrap.paired(self.statistics(one, 1), self.statistics(other, 1), self.counts(1))


def ranges(grid: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, object]]:
    """Returns the space whose ranges end where the values of a grid do."""
    return {
        method: {name: (min(values), max(values)) for name, values in settings.items()}
        for method, settings in grid.items()
    }


def affordable(
    candidates: Sequence[recipe_search.Candidate], examples: int
) -> list[recipe_search.Candidate]:
    """Returns the first candidates that take so many examples together."""
    totals = itertools.accumulate(each.examples for each in candidates)
    return [each for each, total in zip(candidates, totals, strict=True) if total <= examples]


def main() -> None:
    """Runs all comparisons and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="The folder of `m2l demo`.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max_examples", type=int, default=40, help="Of each task.")
    parser.add_argument("--out", type=Path, help="Keeps the searches there.")
    flags = parser.parse_args()
    base = checkpoints.resolve(flags.demo / "bases/1M/instruct")
    experts = [checkpoints.resolve(flags.demo / "experts/1M/instruct" / c) for c in CATEGORIES]
    manifest = checkpoints.read_manifest(base)
    vocabulary, tasks = api.evaluation_tasks(
        *("+".join(CATEGORIES), None, manifest.vocabulary["name"]),
        *(manifest.vocabulary["fingerprint"], "microworld"),
        split="validation",
        lengths={"inputs": 96, "targets": 32},
        max_examples=flags.max_examples,
        generative_score="likelihood",
    )
    config, mesh = models.from_dict(manifest.model), partitioning.make_mesh()
    placed = partitioning.shardings(models.spec(config), mesh)
    read = [checkpoints.restore(path, shardings=placed) for path in (base, *experts)]
    scores = Scores(read[0], read[1:], tasks, config, vocabulary)
    folder = flags.out or Path(tempfile.mkdtemp())
    summary: dict[str, dict[str, float]] = {}
    with jax.set_mesh(mesh):
        for name, grid in ({method: {method: GRIDS[method]} for method in GRIDS}
                           | {"all": GRIDS}).items():  # fmt: skip
            recipes = [r for m, swept in grid.items() for r in merging.grid({"method": m}, swept)]
            best = max(recipes, key=lambda recipe: scores.score(recipe, 0))
            budget = len(recipes) * sum(scores.counts(0)) // QUARTER
            rows = []
            for seed in range(flags.seeds):
                start = time.process_time()
                result = recipe_search.search(
                    recipe_search.RecipeSearch(ranges(grid), len(recipes), seed=seed),
                    recipe_search.ToMerge(base, experts),
                    {"all": tasks},
                    vocabulary,
                    folder / f"{name}_{seed}",
                    data={"max_examples": flags.max_examples},
                    mesh=mesh,
                )
                tried = affordable(result.candidates, budget)
                whole = [each for each in tried if each.stopped_by is None]
                chosen = Recipe.from_dict(max(whole, key=lambda each: each.scores[0]).recipe)
                difference = scores.difference(best, chosen)
                row = {
                    "grid recipes": len(recipes),
                    "search candidates": len(tried),
                    "search examples": sum(e.examples for e in tried) / budget / QUARTER,
                    "grid chosen by": scores.score(best, 0),
                    "search chosen by": scores.score(chosen, 0),
                    "grid judged": scores.score(best, 1),
                    "search judged": scores.score(chosen, 1),
                    "difference": difference.value,
                }
                rows.append(row)
                interval = f"{difference.low:+.2f} to {difference.high:+.2f}"
                described = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
                print(f"{name}, seed {seed}: {described} ({interval}), "
                      f"{time.process_time() - start:.0f} s of CPU", flush=True)  # fmt: skip
            summary[name] = {key: fmean(row[key] for row in rows) for key in rows[0]}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

"""Models on a set of tasks: one JSON result for each pair, written as soon as it is known."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2l import storage
from m2l.checkpoints.manifest import ORBAX_METADATA
from m2l.data import layouts, vocabularies
from m2l.errors import ConfigError, UnknownNameError
from m2l.evaluation import batching, bootstrap, generation, metrics, ranking
from m2l.evaluation.results import Result, finished, write_examples, write_result
from m2l.evaluation.task_data import TaskData
from m2l.progress import Progress

OnDone = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class TaskOutcome:
    """A model's result on a task, and what became of each example.

    Attributes:
        result: The figures.
        examples: Per example plain values: its texts, its scores or the prediction, and "value",
            what it adds to the mean that is the score.
    """

    result: Result
    examples: Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A task's padded batches, those of its choices after an empty input, and where these are."""

    task: TaskData
    parts: Sequence[batching.Part]
    empty: Sequence[Any] = ()
    empty_parts: Sequence[batching.Part] = ()
    places: Sequence[Sequence[tuple[int, int]]] = ()


class Evaluator:
    """Tasks made ready once, for any number of models of one configuration.

    Examples are padded once, to at most `batching.MAX_SHAPES` shapes, and one compiled function
    each serves all models: between them only parameters change. They may come from a checkpoint or
    from a merge in memory, and lie on any mesh; in several processes each calls the same methods.

    Args:
        config: The models' configuration.
        tasks: What to evaluate on, as `load_tasks` gives it.
        vocabulary: The seqio vocabulary, to read what a model generates.
        batch_size: Examples in a batch.
        dtype: The dtype to compute in.
    """

    def __init__(
        self,
        config: Any,
        tasks: Sequence[TaskData],
        vocabulary: Any,
        *,
        batch_size: int = 32,
        dtype: str = "float32",
    ):
        self.config, self.vocabulary, self.dtype = config, vocabulary, dtype
        self.tasks = tuple(tasks)
        layout = layouts.of(config, vocabulary)
        ranked = {
            task.info.name: ranking.empty_inputs(task.examples, layout, vocabulary.eos_id)
            for task in self.tasks
            if task.info.kind == "rank"
        }
        of_all = [task.examples for task in self.tasks] + [made for made, _ in ranked.values()]
        batch_size = min(batch_size, max(map(len, of_all), default=1))
        shapes = batching.common_shapes(of_all, batch_size, layout)

        def padded(examples: Sequence[batching.Example]) -> list[batching.Part]:
            return list(batching.batches(examples, batch_size, layout, shapes))

        self._ready: dict[str, _Ready] = {}
        for task in self.tasks:
            made, places = ranked.get(task.info.name, ((), ()))
            ready = _Ready(task, padded(task.examples), made, padded(made), places)
            self._ready[task.info.name] = ready

    def _asked(self, only: Sequence[str] | None) -> list[_Ready]:
        if only is None:
            return list(self._ready.values())
        for name in only:
            if name not in self._ready:
                raise UnknownNameError("task of this evaluator", name, self._ready)
        return [self._ready[name] for name in only]

    def outcomes(
        self,
        params: Any,
        *,
        only: Sequence[str] | None = None,
        model_digest: str = "",
        on_done: OnDone = lambda count: None,
    ) -> Iterator[TaskOutcome]:
        """What a model makes of each task, in their order; nothing is read or written.

        Args:
            params: The model's parameters.
            only: The names of the tasks to evaluate on, of the evaluator's; None: all.
            model_digest: What the results say the model is.
            on_done: Told how many examples were finished, batch by batch.

        Raises:
            EvaluationError: scores that cannot be believed: not finite, or incomplete.
        """
        for ready in self._asked(only):
            yield self._outcome(ready, params, model_digest, on_done)

    def run(
        self,
        params: Any,
        out: Path,
        *,
        model_digest: str,
        only: Sequence[str] | None = None,
        examples: bool = False,
        description: str = "evaluate",
    ) -> list[Result]:
        """Evaluates a model; a task whose result is already there is not computed again.

        Args:
            params: The model's parameters.
            out: Where `TASK.json` files go; made if need be.
            model_digest: What identifies the model; results of another model are refused.
            only: The names of the tasks to evaluate on, of the evaluator's; None: all.
            examples: Write `TASK.examples.jsonl.gz` as well.
            description: What the progress bar calls it.

        Returns:
            A result for each task, in their order.
        """
        out, writes = storage.path(out), jax.process_index() == 0
        for record in ("run.json", "study.json", ORBAX_METADATA, "manifest.json"):
            if (out / record).exists():
                raise ConfigError(f"{out} holds something else ({record}); choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        asked = self._asked(only)
        # All see what the first wrote before, and nothing that it writes while others still look.
        _wait_for_all("m2l: what is written is there")
        held = [finished(out, model_digest, ready.task, examples) for ready in asked]
        _wait_for_all("m2l: which results are there")
        results = []
        total = sum(len(ready.task.examples) for ready in asked)
        with Progress(description, total, "examples") as progress:
            done = 0

            def on_done(count: int) -> None:
                nonlocal done
                done += count
                progress.update(done)

            for ready, result in zip(asked, held, strict=True):
                if result is None:
                    outcome = self._outcome(ready, params, model_digest, on_done)
                    result = outcome.result
                    if writes and examples:
                        write_examples(out, result.task, outcome.examples)
                    if writes:
                        write_result(out, result)
                else:
                    on_done(result.count)
                results.append(result)
        return results

    def _outcome(self, ready: _Ready, params: Any, digest: str, on_done: OnDone) -> TaskOutcome:
        task, start = ready.task, time.monotonic()
        how = {"dtype": self.dtype}
        # Scoring references is short beside decoding, which then tells of its progress alone.
        told = {} if task.decoded else {"on_done": on_done}
        scores = ranking.score_examples(
            self.config, params, task.examples, parts=ready.parts, **how, **told
        )
        if task.info.kind == "rank":
            empty = ranking.score_examples(
                self.config, params, ready.empty, parts=ready.empty_parts, **how
            )
            seconds = time.monotonic() - start
            figures, ties, lines = _ranked(ready, scores, empty)
        else:
            texts = self._texts(ready, params, on_done) if task.decoded else None
            seconds = time.monotonic() - start
            figures, ties, lines = _generated(task, scores, texts)
        batches = [batch for _, batch in (*ready.parts, *ready.empty_parts)]
        tokens, size = (sum(getattr(b, name) for b in batches) for name in ("tokens", "size"))
        interval = None
        if task.metric != "bleu":
            of = bootstrap.statistic(task.metric, lines)
            interval = bootstrap.interval(of, len(lines))
        result = Result(
            task=task.info.name,
            dataset=task.info.dataset,
            category=task.info.category,
            held_out=task.info.held_out,
            kind=task.info.kind,
            metric=task.metric,
            score=figures[metrics.HEADLINE[task.metric]],
            metrics=figures,
            count=len(task.examples),
            ties=ties,
            truncated=task.truncated,
            seconds=seconds,
            model_digest=digest,
            task_digest=task.digest,
            interval=interval,
            tokens=tokens,
            padding=1 - tokens / size,
            settings=self._settings(task),
        )
        return TaskOutcome(result, lines)

    def _settings(self, task: TaskData) -> dict[str, str]:
        """What decides a task's figures beside its examples, where it is not as everywhere."""
        found = vocabularies.settings(self.vocabulary)
        if task.decoded:
            references = [example.reference for example in task.examples]
            found |= metrics.settings(task.info.metrics, references)
        return found

    def _texts(self, ready: _Ready, params: Any, on_done: OnDone) -> list[str]:
        task = ready.task
        how = {
            "max_length": task.max_length,
            "eos_id": self.vocabulary.eos_id,
            "dtype": self.dtype,
            "parts": ready.parts,
            "on_done": on_done,
        }
        if task.beams > 1:
            how["beams"] = task.beams
        decode = generation.beam_search if task.beams > 1 else generation.greedy
        decoded = decode(self.config, params, task.examples, **how)
        return [self.vocabulary.decode(tokens.tolist()).strip() for tokens in decoded]


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


Figures = tuple[dict[str, float], int, list[dict[str, Any]]]


def _ranked(ready: _Ready, scores: Sequence[np.ndarray], of_empty: Sequence[np.ndarray]) -> Figures:
    """A task's figures, its ties, and what became of each example."""
    name, examples = ready.task.info.name, ready.task.examples
    empty = [np.array([of_empty[row][column] for row, column in of_one]) for of_one in ready.places]
    ranked = ranking.rank(name, examples, scores, metrics=ready.task.info.metrics)
    figures = dict(ranked.figures) | ranking.by_every_rule(name, examples, scores, empty)
    lines = []
    for example, of_one, of_nothing in zip(examples, scores, empty, strict=True):
        taken = np.flatnonzero(of_one == of_one.max())
        lines.append(
            {
                "inputs": example.inputs_text,
                "choices": list(example.choices_text),
                "tokens": [len(choice) for choice in example.choices],
                "scores": of_one.tolist(),
                "empty_scores": of_nothing.tolist(),
                "right": example.is_correct.index(True),
                "taken": taken.tolist(),
                "value": 100.0 * float(np.mean(np.array(example.is_correct)[taken])),
                "truncated": example.truncated,
            }
        )
    return figures, ranked.ties, lines


def _generated(
    task: TaskData, scores: Sequence[np.ndarray], texts: Sequence[str] | None
) -> Figures:
    """The same of a task in free text, with what was decoded, if anything was."""
    examples = task.examples
    figures = {
        "reference_likelihood": ranking.reference_likelihood(task.info.name, examples, scores)
    }
    lines: list[dict[str, Any]] = []
    for example, of_one in zip(examples, scores, strict=True):
        lines.append(
            {
                "inputs": example.inputs_text,
                "references": list(example.reference),
                "reference_score": float(of_one[0]),
                "reference_tokens": len(example.target),
                "value": float(of_one[0]) / len(example.target),
                "truncated": example.truncated,
            }
        )
    if texts is None:
        return figures, 0, lines
    references = [example.reference for example in examples]
    for metric in task.info.metrics:
        found, by_example = metrics.figures(metric, references, texts)
        figures |= found
        if metric == task.metric:
            for number, line in enumerate(lines):
                line["prediction"] = texts[number]
                line["value"] = by_example[number] if by_example else None
    return figures, 0, lines

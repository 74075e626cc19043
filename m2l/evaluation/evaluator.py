"""Models on a set of tasks: one JSON result for each pair, written as soon as it is known."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from m2l import distributed, models, storage
from m2l.checkpoints.manifest import ORBAX_METADATA
from m2l.data import layouts, vocabularies
from m2l.data.vocabularies import Vocabulary
from m2l.errors import ConfigError, EvaluationError, UnknownNameError
from m2l.evaluation import batching, bootstrap, generation, metrics, ranking
from m2l.evaluation.results import USUAL_DTYPE, Result, finished, write_examples, write_result
from m2l.evaluation.task_data import TaskData
from m2l.models.products import computed_in
from m2l.progress import Progress
from m2l.storage import AnyPath
from m2l.typing import Json, Params

OnDone = Callable[[int], None]
# Of an example: its texts, its scores or the prediction, and "value", its part of the score.
Line = dict[str, Json]


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A task's padded batches, those of its choices after an empty input, and their places."""

    task: TaskData
    parts: Sequence[batching.Part]
    empty: Sequence[batching.Example] = ()
    empty_parts: Sequence[batching.Part] = ()
    places: Sequence[Sequence[tuple[int, int]]] = ()


class Evaluator:
    """Tasks prepared once, for any number of models of one configuration.

    Examples are padded once, to at most `batching.MAX_SHAPES` shapes, and one compiled function
    each serves all models: between them only parameters change. They may come from a checkpoint or
    from a merge in memory, and be on any mesh; in several processes each calls the same methods.

    Args:
        config: The models' configuration.
        tasks: What to evaluate on, from `load_tasks`.
        vocabulary: The vocabulary, to read what a model generates.
        batch_size: Examples in a batch, at most.
        dtype: The dtype to compute in: "float32" or "bfloat16".

    Raises:
        ConfigError: Another dtype.
    """

    def __init__(
        self,
        config: models.Config,
        tasks: Sequence[TaskData],
        vocabulary: Vocabulary,
        *,
        batch_size: int = 32,
        dtype: str = "float32",
    ):
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype {dtype!r}: expected 'float32' or 'bfloat16'")
        self.config, self.vocabulary, self.dtype = config, vocabulary, computed_in(dtype).name
        self.tasks = tuple(tasks)
        layout = layouts.of(config, vocabulary)
        ranked = {
            task.info.name: ranking.empty_inputs(task.examples, layout, vocabulary.eos_id)
            for task in self.tasks
            if task.info.kind == "rank"
        }
        examples = [task.examples for task in self.tasks] + [empty for empty, _ in ranked.values()]
        batch_size = batching.fitting_size(batch_size, map(len, examples), jax.device_count())
        shapes = batching.common_shapes(examples, batch_size, layout)

        def padded(examples: Sequence[batching.Example]) -> list[batching.Part]:
            return list(batching.batches(examples, batch_size, layout, shapes))

        self._compiled = False
        self._ready: dict[str, _Ready] = {}
        for task in self.tasks:
            empty, places = ranked.get(task.info.name, ((), ()))
            ready = _Ready(task, padded(task.examples), empty, padded(empty), places)
            self._ready[task.info.name] = ready

    def _select(self, only: Sequence[str] | None) -> list[_Ready]:
        if only is None:
            return list(self._ready.values())
        for name in only:
            if name not in self._ready:
                raise UnknownNameError("task of this evaluator", name, self._ready)
        return [self._ready[name] for name in only]

    def results(
        self, params: Params, *, only: Sequence[str] | None = None, model_digest: str = ""
    ) -> Iterator[Result]:
        """Yields a model's result on each task, in their order; reads and writes no file.

        Args:
            params: The model's parameters.
            only: The names of the tasks to evaluate on, of the evaluator's; None: all.
            model_digest: What identifies the model, for the results.

        Raises:
            EvaluationError: scores that are not finite, or incomplete.
        """
        for ready in self._select(only):
            yield self._evaluate(ready, params, model_digest, lambda count: None)[0]

    def values(self, params: Params, only: Sequence[str] | None = None) -> dict[str, list[float]]:
        """Computes each example's part of the score alone, by task: nothing else is scored.

        Args:
            params: The model's parameters.
            only: The names of the tasks to evaluate on, of the evaluator's; None: all.

        Raises:
            EvaluationError: scores that are not finite; or a task's metric, as BLEU, is not made of
                parts.
        """
        values = {}
        for ready in self._select(only):
            task, examples, name = ready.task, ready.task.examples, ready.task.info.name
            if task.decoded:
                references = [example.reference for example in examples]
                texts = self._texts(ready, params, lambda count: None)
                _, parts = metrics.figures_of_samples(task.metric, references, texts)
                if parts is None:
                    raise EvaluationError(f"{name}: {task.metric} is not a mean over examples")
                values[name] = parts
                continue
            scores = ranking.score_examples(
                self.config, params, examples, parts=ready.parts, dtype=self.dtype
            )
            if task.info.kind == "rank":
                ranking.rank(name, examples, scores)  # Refuses what is not finite.
                value = _ranked_value
            else:
                ranking.reference_likelihood(name, examples, scores)
                value = _likelihood_value
            values[name] = [value(*pair) for pair in zip(examples, scores, strict=True)]
        return values

    def run(
        self,
        params: Params,
        out: AnyPath,
        *,
        model_digest: str,
        only: Sequence[str] | None = None,
        examples: bool = False,
        values: bool = False,
        description: str = "evaluate",
    ) -> list[Result]:
        """Evaluates a model; a task whose result is already there is not computed again.

        Args:
            params: The model's parameters.
            out: The directory of `TASK.json` files; made if need be.
            model_digest: What identifies the model; results of another model are refused.
            only: The names of the tasks to evaluate on, of the evaluator's; None: all.
            examples: Write `TASK.examples.jsonl.gz` as well.
            values: Write each example's part of the score into the result.
            description: What the progress bar calls it.

        Returns:
            A result for each task, in their order.
        """
        out, writes = storage.path(out), jax.process_index() == 0
        for record in ("run.json", "study.json", ORBAX_METADATA, "manifest.json"):
            if (out / record).exists():
                raise ConfigError(f"{out} holds something else ({record}); choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        selected = self._select(only)
        # All see what the first wrote before, and nothing that it writes while others still look.
        distributed.wait_for_all("m2l: what is written is there")
        earlier = [
            finished(out, model_digest, ready.task, examples, self.dtype) for ready in selected
        ]
        distributed.wait_for_all("m2l: which results are there")
        results = []
        total = sum(len(ready.task.examples) for ready in selected)
        first = "" if self._compiled else "compiling"
        with Progress(description, total, "examples", first=first) as progress:
            done = 0

            def on_done(count: int) -> None:
                nonlocal done
                done += count
                progress.update(done)

            for ready, result in zip(selected, earlier, strict=True):
                if result is None:
                    result, lines = self._evaluate(ready, params, model_digest, on_done)
                    if values and ready.task.metric != "bleu":
                        parts = [line["value"] for line in lines]
                        result = dataclasses.replace(result, values=parts)
                    if writes and examples:
                        write_examples(out, result.task, lines)
                    if writes:
                        write_result(out, result)
                else:
                    on_done(result.count)
                results.append(result)
        self._compiled = True
        return results

    def _evaluate(
        self, ready: _Ready, params: Params, digest: str, on_done: OnDone
    ) -> tuple[Result, list[Line]]:
        task, start = ready.task, time.monotonic()
        options = {"dtype": self.dtype}
        # Scoring references is short next to decoding, which then reports progress alone.
        callback = {} if task.decoded else {"on_done": on_done}
        scores = ranking.score_examples(
            self.config, params, task.examples, parts=ready.parts, **options, **callback
        )
        if task.info.kind == "rank":
            empty = ranking.score_examples(
                self.config, params, ready.empty, parts=ready.empty_parts, **options
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
            statistic = bootstrap.statistic(task.metric, lines)
            interval = bootstrap.interval([statistic], [len(lines)])
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
        return result, lines

    def _settings(self, task: TaskData) -> dict[str, str]:
        """Returns what else than its examples decides a task's figures, where it is not usual."""
        settings = vocabularies.settings(self.vocabulary) | task.shots_settings()
        if self.dtype != USUAL_DTYPE:
            settings |= {"dtype": self.dtype}
        if task.decoded:
            references = [example.reference for example in task.examples]
            settings |= metrics.settings(task.info.metrics, references) | task.decoding.settings()
        return settings

    def _texts(self, ready: _Ready, params: Params, on_done: OnDone) -> list[list[str]]:
        """Returns the texts that a model writes to each example."""
        task = ready.task
        decoded = generation.decode(
            self.config,
            params,
            task.examples,
            task.decoding,
            max_length=task.max_length,
            eos_id=self.vocabulary.eos_id,
            dtype=self.dtype,
            parts=ready.parts,
            on_done=on_done,
        )
        return [
            [self.vocabulary.decode(tokens.tolist()).strip() for tokens in samples]
            for samples in decoded
        ]


def _ranked_value(example: batching.Example, scores_C: np.ndarray) -> float:
    return 100.0 * float(np.mean(np.array(example.is_correct)[scores_C == scores_C.max()]))


def _likelihood_value(example: batching.Example, scores_C: np.ndarray) -> float:
    return float(scores_C[0]) / len(example.target)


def _ranked(
    ready: _Ready, scores: Sequence[np.ndarray], empty_scores: Sequence[np.ndarray]
) -> tuple[dict[str, float], int, list[Line]]:
    """Computes a task's figures, its ties, and the line of each example."""
    name, examples = ready.task.info.name, ready.task.examples
    empty = [
        np.array([empty_scores[row][column] for row, column in places]) for places in ready.places
    ]
    ranked = ranking.rank(name, examples, scores, metrics=ready.task.info.metrics)
    figures = dict(ranked.figures) | ranking.accuracy_by_rule(name, examples, scores, empty)
    lines = []
    for example, scores_C, empty_C in zip(examples, scores, empty, strict=True):
        best = np.flatnonzero(scores_C == scores_C.max())
        lines.append(
            {
                "inputs": example.inputs_text,
                "choices": list(example.choices_text),
                "tokens": [len(choice) for choice in example.choices],
                "scores": scores_C.tolist(),
                "empty_scores": empty_C.tolist(),
                "right": example.is_correct.index(True),
                "taken": best.tolist(),
                "value": _ranked_value(example, scores_C),
                "truncated": example.truncated,
            }
        )
    return figures, ranked.ties, lines


def _generated(
    task: TaskData, scores: Sequence[np.ndarray], texts: Sequence[Sequence[str]] | None
) -> tuple[dict[str, float], int, list[Line]]:
    """Computes the same of a task in free text, with what was decoded, if anything was."""
    examples = task.examples
    figures = {
        "reference_likelihood": ranking.reference_likelihood(task.info.name, examples, scores)
    }
    lines: list[Line] = []
    for example, scores_C in zip(examples, scores, strict=True):
        lines.append(
            {
                "inputs": example.inputs_text,
                "references": list(example.reference),
                "reference_score": float(scores_C[0]),
                "reference_tokens": len(example.target),
                "value": _likelihood_value(example, scores_C),
                "truncated": example.truncated,
            }
        )
    if texts is None:
        return figures, 0, lines
    references = [example.reference for example in examples]
    for line, samples in zip(lines, texts, strict=True):
        line |= {"prediction": samples[0]} if len(samples) == 1 else {"predictions": [*samples]}
    for metric in task.info.metrics:
        metric_figures, by_example = metrics.figures_of_samples(metric, references, texts)
        figures |= metric_figures
        if metric == task.metric:
            for number, line in enumerate(lines):
                line["value"] = by_example[number] if by_example else None
    return figures, 0, lines

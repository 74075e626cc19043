"""Prints how fast examples reach packed training batches, from each source and by Hugging Face.

    python scripts/bench/data_throughput.py [--mixture NAME] [--examples N] [--peer]

reads the mixture from the microworld and from a cache of it, through prompts and SentencePiece to
packed batches of 512 + 128 tokens, on as many cores as there are (`taskset -c 0,1` for two). Then
it stops at step 100,000 and goes on from there, and counts what two processes read. --peer does
the same work with `datasets.map`, a fast tokenizer of the same vocabulary and a packing collator;
it needs `pip install tokenizers`, and is given the fields that m2l derives from the records.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from m2l import tasks
from m2l.data import pipeline, vocabularies
from m2l.data.prompts import Dataset, Prompt, Reference, parse
from m2l.data.tokenizer_files import EOS, UNKNOWN
from m2l.tasks import caches, registry
from m2l.typing import Json

if TYPE_CHECKING:
    import tokenizers

LENGTHS = {"inputs": 512, "targets": 128}
BATCH = 32
STEPS_BEFORE_STOP = 100_000


def _count(batch: dict[str, np.ndarray]) -> tuple[int, int]:
    """Returns how many examples and tokens a packed batch holds."""
    examples = int(batch["decoder_segment_ids"].max(axis=1).sum())
    return examples, int(np.sum(batch["encoder_input_tokens"] != 0))


def ours(mixture: str, examples: int, source: str) -> dict[str, float]:
    """Measures one pass over a number of examples from a source, its first reading included."""
    start = time.perf_counter()
    tasks.declare(source=source)
    registered = time.perf_counter()
    batches = pipeline.training_batches(mixture, lengths=LENGTHS, batch_size=BATCH, seed=0)
    first = next(batches)
    ready = time.perf_counter()
    seen, tokens = _count(first)
    began_with = seen
    while seen < examples:
        more = _count(next(batches))
        seen, tokens = seen + more[0], tokens + more[1]
    done = time.perf_counter()
    return {
        "register_s": registered - start,
        "first_batch_s": ready - registered,
        "examples_per_s": (seen - began_with) / (done - ready),
        "tokens_per_example": tokens / seen,
        "total_s": done - registered,
    }


def resumed(mixture: str) -> tuple[float, float, bool]:
    """Returns seconds to the first batch at steps 0 and 100,000, and whether that is right."""
    options = {"lengths": LENGTHS, "batch_size": 1, "seed": 0, "pack": False}
    start = time.perf_counter()
    batches = pipeline.training_batches(mixture, **options)
    next(batches)
    at_0 = time.perf_counter() - start
    for _ in range(STEPS_BEFORE_STOP - 1):
        next(batches)
    state, following = batches.state(), next(batches)
    start = time.perf_counter()
    first = next(pipeline.training_batches(mixture, **options, state=state))
    at_100_000 = time.perf_counter() - start
    same = all(np.array_equal(first[name], following[name]) for name in following)
    return at_0, at_100_000, same


def _fill(template: str, record: dict[str, Json]) -> str:
    parts = []
    for part in parse(template):
        if isinstance(part, Reference):
            value = record[part.field]
            if part.index is not None:
                value = value[int(part.index) if part.index.isdigit() else record[part.index]]
            part = ", ".join(value) if isinstance(value, list | tuple) else str(value)
        parts.append(part)
    return "".join(parts)


def _written(dataset: Dataset, prompt: Prompt, records: dict[str, list]) -> dict[str, list]:
    """Renders records as inputs and targets: the batched function of `datasets.map`."""
    texts: dict[str, list] = {"inputs": [], "targets": []}
    for values in zip(*records.values(), strict=True):
        record = dict(zip(records, values, strict=True))
        if isinstance(prompt.answer_choices, tuple):
            record["answer_choices"] = [_fill(choice, record) for choice in prompt.answer_choices]
        elif prompt.answer_choices is not None:
            record["answer_choices"] = record[parse(prompt.answer_choices)[0].field]
        texts["inputs"].append(_fill(prompt.inputs, record))
        texts["targets"].append(_fill(prompt.targets, record))
    return texts


def _packed(rows: Iterator[dict[str, list[int]]]) -> Iterator[dict[str, np.ndarray]]:
    """Fills rows greedily, in the names of seqio's feature converter."""
    shapes = {
        "encoder_input_tokens": "inputs",
        "encoder_segment_ids": "inputs",
        "encoder_positions": "inputs",
        "decoder_target_tokens": "targets",
        "decoder_input_tokens": "targets",
        "decoder_segment_ids": "targets",
        "decoder_positions": "targets",
        "decoder_loss_weights": "targets",
    }
    batch = {
        name: np.zeros((BATCH, LENGTHS[feature]), np.int32) for name, feature in shapes.items()
    }
    row = segment = at = end = 0
    for example in rows:
        inputs, targets = example["inputs"][: LENGTHS["inputs"]], example["targets"]
        targets = [*targets[: LENGTHS["targets"] - 1], EOS]
        if at + len(inputs) > LENGTHS["inputs"] or end + len(targets) > LENGTHS["targets"]:
            row, segment, at, end = row + 1, 0, 0, 0
            if row == BATCH:
                yield batch
                batch = {name: np.zeros_like(value) for name, value in batch.items()}
                row = 0
        segment += 1
        into, onto = slice(at, at + len(inputs)), slice(end, end + len(targets))
        batch["encoder_input_tokens"][row, into] = inputs
        batch["encoder_segment_ids"][row, into] = segment
        batch["encoder_positions"][row, into] = np.arange(len(inputs))
        batch["decoder_target_tokens"][row, onto] = targets
        batch["decoder_input_tokens"][row, end + 1 : end + len(targets)] = targets[:-1]
        batch["decoder_segment_ids"][row, onto] = segment
        batch["decoder_positions"][row, onto] = np.arange(len(targets))
        batch["decoder_loss_weights"][row, onto] = 1
        at, end = at + len(inputs), end + len(targets)


def peer(mixture: str, examples: int) -> dict[str, float]:
    """Does the same work with Hugging Face's tools: shuffle, write out, tokenise, pack."""
    import datasets as hf

    hf.disable_progress_bars()
    hf.disable_caching()
    tokenizer = _tokenizer()

    def tokenize(texts: dict[str, list]) -> dict[str, list]:
        return {
            name: [encoding.ids for encoding in tokenizer.encode_batch(values)]
            for name, values in texts.items()
        }

    declared = [
        (dataset, prompt) for dataset in tasks.datasets_of(mixture) for prompt in dataset.prompts
    ]
    raw = {dataset.name: hf.Dataset.from_list(_with_derived(dataset)) for dataset, _ in declared}
    cores = len(os.sched_getaffinity(0))
    start = time.perf_counter()
    parts = [
        raw[dataset.name].map(
            lambda batch, dataset=dataset, prompt=prompt: _written(dataset, prompt, batch),
            batched=True,
            remove_columns=raw[dataset.name].column_names,
        )
        for dataset, prompt in declared
    ]
    together = hf.concatenate_datasets(parts).shuffle(seed=0)
    together = together.select(i % len(together) for i in range(examples))
    tokenised = together.map(tokenize, batched=True, num_proc=cores)
    rows = (row for part in tokenised.iter(1000) for row in _rows(part))
    counts = [_count(batch) for batch in _packed(rows)]
    done = time.perf_counter()
    return {
        "examples_per_s": examples / (done - start),
        "tokens_per_example": sum(tokens for _, tokens in counts) / sum(n for n, _ in counts),
        "total_s": done - start,
    }


def _tokenizer() -> "tokenizers.Tokenizer":
    """Makes Hugging Face's tokenizer of the pieces of the microworld's vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = sentencepiece_model_pb2.ModelProto.FromString(
        Path(vocabularies.load("microworld").sentencepiece_model_file).read_bytes()
    )
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


def _with_derived(dataset: Dataset) -> list[dict[str, Json]]:
    """Returns the records with their derived fields, which the peer gets for nothing."""
    split = registry.records_of("microworld", dataset).split("train")
    derive = dataset.derive or (lambda record: {})
    records = map(split.record, range(split.size))
    return [{**record, **derive(record)} for record in records]


def _rows(part: dict[str, list]) -> Iterator[dict[str, list[int]]]:
    for inputs, targets in zip(part["inputs"], part["targets"], strict=True):
        yield {"inputs": inputs, "targets": targets}


def _shared(mixture: str) -> tuple[int, int, bool]:
    """Returns the records of an epoch, how many two processes read together, whether each once."""
    task = tasks.tasks_in(mixture)[0]
    epoch = pipeline.training_batches(task, lengths=LENGTHS, batch_size=1, seed=0, pack=False)
    size = pipeline.sizes(task, "train")[task]
    seen: list[bytes] = []
    for shard in range(2):
        local = pipeline.training_batches(
            task, lengths=LENGTHS, batch_size=1, seed=0, pack=False, shard=(shard, 2)
        )
        part = size // 2 + (shard < size % 2)
        seen += [row["encoder_input_tokens"].tobytes() for row in itertools.islice(local, part)]
    whole = [row["encoder_input_tokens"].tobytes() for row in itertools.islice(epoch, size)]
    return size, len(seen), sorted(seen) == sorted(whole)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixture", default="t0_held_in")
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--peer", action="store_true", help="measure Hugging Face's tools as well")
    arguments = parser.parse_args()
    mixture, examples = arguments.mixture, arguments.examples
    print(f"{mixture}, {examples:,} examples, {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        caches.write(tasks.datasets_of(mixture), "microworld", cache)
        measured = {
            name: ours(mixture, examples, source)
            for name, source in (("microworld", "microworld"), ("cache", f"cache:{cache}"))
        }
        if arguments.peer:
            tasks.declare()
            measured["datasets.map"] = peer(mixture, examples)
        for name, figures in measured.items():
            print(f"{name:14}", "  ".join(f"{key} {value:,.2f}" for key, value in figures.items()))
        tasks.declare()
        at_0, at_100_000, same = resumed(mixture)
        print(f"first batch at step 0: {at_0:.2f} s, at step 100,000: {at_100_000:.2f} s", end="")
        print(f", {'the same batch' if same else 'ANOTHER BATCH'} as without stopping")
        size, read, once = _shared(mixture)
        print(f"two processes read {read} of {size} records, {'each once' if once else 'NOT ONCE'}")
    sys.exit(not (same and once))


if __name__ == "__main__":
    main()

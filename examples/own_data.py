"""Trains two experts on data of one's own, merges them in memory, and evaluates all models.

    python examples/own_data.py runs/own_data --steps 200

A line of data is a JSON object with `inputs` and `targets` and, for classification,
`answer_choices`. The data here are made up: which of two numbers is larger, and whether a word of a
review is kind. Replace `write_data` by your own files.
"""

import argparse
import json
from pathlib import Path

import jax

import m2l
from m2l.models import T5Config

KIND = {"good": ["lovely", "great", "fine", "nice"], "bad": ["dull", "poor", "awful", "sad"]}
THINGS = ["film", "song", "book", "cake", "game", "play"]


def write_data(directory: Path) -> dict[str, dict[str, Path]]:
    """Writes the data of two tasks; returns their files by task and split."""
    reviews = [
        (f"what a {word} {thing}. good or bad?", label, ["good", "bad"])
        for label, words in KIND.items()
        for word in words
        for thing in THINGS
    ]
    numbers = [
        (
            f"which is larger, {first} or {second}?",
            str(max(first, second)),
            [str(first), str(second)],
        )
        for first in range(9)
        for second in range(9)
        if first != second
    ]
    files: dict[str, dict[str, Path]] = {}
    for task, examples in (("reviews", reviews), ("numbers", numbers)):
        lines = [
            json.dumps({"inputs": inputs, "targets": target, "answer_choices": choices}) + "\n"
            for inputs, target, choices in examples
        ]
        files[task] = {}
        for split, part in (("train", lines[::2]), ("validation", lines[1::2])):
            files[task][split] = directory / f"{task}_{split}.jsonl"
            files[task][split].write_text("".join(part))
    return files


def main() -> None:
    """Trains, merges and evaluates in the directory of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="Of each expert.")
    arguments = parser.parse_args()
    out, steps = arguments.out, arguments.steps
    out.mkdir(parents=True, exist_ok=True)
    data = write_data(out)

    # A base: in earnest a pretrained model, `m2l convert HUGGING_FACE_DIR runs/base`.
    config = T5Config(
        vocab_size=1024,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_heads=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
    options = {"batch_size": 16, "input_length": 48, "target_length": 16, "learning_rate": 5e-3}
    base = m2l.train(out / "base", "span_corruption", steps=steps, config=config, **options)
    models = {"base": m2l.load(base)}
    for task, files in data.items():
        expert = m2l.train(out / task, jsonl=files, steps=steps, init=base, **options)
        models[task] = m2l.load(expert)

    experts = [models[task].params for task in data]
    recipe = m2l.Recipe(method="task_arithmetic", scale=0.5)
    merged = m2l.merge(models["base"].params, experts, recipe)
    models["merged"] = models["base"].with_params(merged)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(merged)):,} parameters")

    for name, model in models.items():
        for task, files in data.items():
            (result,) = m2l.evaluate(model, jsonl=files, input_length=48).values()
            low, high = result.interval
            print(f"{name:8} {task:8} {result.score:6.2f} % ({low:.0f} to {high:.0f})")


if __name__ == "__main__":
    main()

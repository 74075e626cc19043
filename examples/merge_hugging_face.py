"""Merges models as Hugging Face stores them, and measures what the merge has of each expert.

    python examples/merge_hugging_face.py --base DIR --expert DIR --expert DIR --out DIR

The models are streamed: memory does not grow with them. The result is a directory like its inputs,
for `AutoModel.from_pretrained`, with the tokenizer and a model card that has the recipe.
"""

import argparse

import numpy as np

import m2l
from m2l import checkpoints
from m2l.checkpoints import Checkpoint
from m2l.checkpoints.spans import Span


def read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Returns one tensor of a checkpoint, flat, in float32."""
    tensor = checkpoint.parameters[name]
    values = np.empty(tensor.size, tensor.dtype)
    tensor.read_span(Span(name, 0, tensor.size), values)
    return values.astype(np.float32)


def cosines(base: Checkpoint, experts: list[Checkpoint], merged: Checkpoint) -> list[float]:
    """Returns the cosine of each expert's task vector with the merge's, over all tensors."""
    products = np.zeros((len(experts) + 1, len(experts) + 1))
    for name in merged.parameters:
        start = read(base, name)
        vectors = np.stack([read(model, name) - start for model in (*experts, merged)])
        products += vectors.astype(np.float64) @ vectors.T
    norms = np.sqrt(np.diag(products))
    return list(products[-1, :-1] / (norms[-1] * norms[:-1]))


def main() -> None:
    """Merges the directories of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="The model that the experts were tuned from.")
    parser.add_argument("--expert", action="append", required=True, help="Repeat for each.")
    parser.add_argument("--density", type=float, default=0.2, help="Of task vectors, kept by TIES.")
    parser.add_argument("--out", required=True, help="The directory to make.")
    arguments = parser.parse_args()

    recipe = m2l.Recipe(method="ties", density=arguments.density, dtype="bfloat16")
    m2l.merge(arguments.base, arguments.expert, recipe, out=arguments.out)

    base, merged, *experts = (
        checkpoints.open(path, native=True)
        for path in (arguments.base, arguments.out, *arguments.expert)
    )
    for path, cosine in zip(arguments.expert, cosines(base, experts, merged), strict=True):
        print(f"{path}: cosine with the merge {cosine:.3f}")


if __name__ == "__main__":
    main()

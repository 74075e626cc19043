"""Sweeps the scale of a merge on a mesh: models are split over its devices, and merged there.

    python examples/sweep_on_mesh.py --mixture sentiment \
        --base runs/base --expert runs/sentiment --expert runs/closed_book_qa

Without accelerators XLA makes eight devices of the CPU, which shows the same program at work.
"""

import argparse
import os

# Before JAX starts; it changes nothing where there are accelerators.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

import m2l
from m2l import merging, models, partitioning
from m2l.typing import Params


def main() -> None:
    """Merges and evaluates by each scale of the command line; prints the best recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="The checkpoint that experts start from.")
    parser.add_argument("--expert", action="append", required=True, help="Repeat for each.")
    parser.add_argument("--mixture", required=True, help="Held-in tasks, to choose by.")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--fsdp", type=int, default=4, help="Devices to split a model over.")
    parser.add_argument("--max_examples", type=int, default=50, help="Of each task.")
    arguments = parser.parse_args()

    # The other devices hold copies, and share the examples of a batch.
    mesh = partitioning.make_mesh(fsdp=arguments.fsdp)
    base = m2l.load(arguments.base)
    shardings = partitioning.shardings(models.spec(base.config), mesh)
    experts = [m2l.load(path).read(shardings) for path in arguments.expert]
    print(f"mesh {dict(mesh.shape)}, {len(jax.devices())} devices")

    def score(params: Params, recipe: m2l.Recipe) -> float:
        results = m2l.evaluate(
            base.with_params(params),
            arguments.mixture,
            max_examples=arguments.max_examples,
            mesh=mesh,
        )
        mean = sum(result.score for result in results.values()) / len(results)
        print(f"scale {recipe.scale:.2f}: {mean:.2f} %")
        return mean

    recipes = merging.grid({"method": "task_arithmetic"}, {"scale": arguments.scales})
    with jax.set_mesh(mesh):
        points = merging.sweep(base.read(shardings), experts, recipes, score)
    best = merging.best(points)
    print(f"best: {best.recipe.to_dict()} ({best.score:.2f} %)")


if __name__ == "__main__":
    main()

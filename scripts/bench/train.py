"""The trainer as a whole, and what it needs of memory; the bare step is in models.py.

    python scripts/bench/train.py speed
    python scripts/bench/train.py saving
    python scripts/bench/train.py memory

`speed`: `m2l train` itself, of T5-small's dimensions on 16 x (256 + 64) tokens in float32 with
dropout 0.1 and Adafactor: tokens a second (all positions), the share of the time in which input was
waited for, and MFU, with random tokens and with the microworld's packed ones.

`saving`: the same run with a checkpoint every ten steps: for how long one holds training up, and
what share that is at one every 500 steps. checkpoints.py measures saves by themselves.

`memory`: what T5 XXL and a decoder of 64B need on each of 64, 256 and 1,024 devices with a row of
2,048 + 512 tokens at a time on each, from shapes and the sharding table: nothing is allocated.

Prints medians. Nothing else should run.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import models as bare
from jax.sharding import AbstractMesh

from m2l import configuration, partitioning, tasks
from m2l.checkpoints.run_checkpoints import RunCheckpoints
from m2l.data import vocabularies
from m2l.models import Execution, LlamaConfig
from m2l.training import loop, resources
from m2l.training.settings import TrainSettings
from m2l.training.state import Objective

STEPS = 12
# 64.6B parameters.
DECODER_64B = LlamaConfig(
    vocab_size=256000,
    hidden_size=8192,
    intermediate_size=24576,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
)


SETTINGS = TrainSettings(
    mixture="flan_without_t0",
    steps=STEPS,
    batch_size=16,
    input_length=256,
    target_length=64,
    execution=Execution(dropout_rate=0.1),
    save_every=1000,
    log_every=1,
)


def train(
    out: Path, settings: TrainSettings = SETTINGS, *, synthetic: bool
) -> list[dict[str, float]]:
    """Trains T5-small into `out`; returns the lines of its metrics, but for the first two."""
    loop.train(
        out,
        config=bare.t5_small(),
        vocabulary=vocabularies.describe(vocabularies.load("microworld"), "microworld"),
        settings=settings,
        data={"source": "microworld"},
        synthetic=synthetic,
    )
    return [json.loads(line) for line in (out / "metrics.jsonl").open()][2:]


def median(lines: list[dict[str, float]], name: str) -> float:
    """Returns the median of a figure over lines."""
    return statistics.median(line[name] for line in lines)


def speed(root: Path) -> None:
    """Prints the trainer's speed."""
    for name, synthetic in (("random tokens", True), ("microworld", False)):
        lines = train(root / name.replace(" ", "_"), synthetic=synthetic)
        # The random batch has no padding; MFU counts positions, and so gives the packed run's rate.
        rate = median(lines, "mfu")
        print(f"{name}: MFU {rate:.1%}, input waited for {median(lines, 'input_wait'):.2%}")
        if synthetic:
            tokens = median(lines, "tokens_per_second")
            print(f"{name}: {tokens:.0f} tokens/s, {16 * (256 + 64) / tokens:.3f} s a step")


def saving(root: Path) -> None:
    """Prints what saving costs."""
    blocked: list[float] = []
    save = RunCheckpoints.save

    def timed(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return save(*args, **kwargs)
        finally:
            blocked.append(time.perf_counter() - start)

    RunCheckpoints.save = timed
    settings = dataclasses.replace(SETTINGS, steps=30, save_every=10)
    lines = train(root / "saving", settings, synthetic=True)
    step = 16 * (256 + 64) / median(lines, "tokens_per_second")
    held_up = statistics.median(blocked)
    print(
        f"a save holds training up for {held_up:.3f} s; a step takes {step:.2f} s: "
        f"{held_up / (500 * step):.3%} at one every 500 steps"
    )


def table() -> None:
    """Prints the memory of large models on large meshes."""
    gib = 2**30
    xxl, _ = configuration.load(
        "Run",
        ["runs/train.gin", "models/t5_1_1_xxl.gin"],
        ["MIXTURE=none", "STEPS=1", "Run.model=%MODEL"],
    )
    print("GiB on each device; of them certain: parameters, optimizer, gradients, logits")
    for name, config in (("T5 1.1 XXL", xxl.model), ("decoder of 64B", DECODER_64B)):
        for devices in (64, 256, 1024):
            for model in (1, 8):
                mesh = AbstractMesh((1, devices // model, model), partitioning.MESH_AXES)
                settings = dataclasses.replace(
                    SETTINGS,
                    batch_size=devices // model,
                    input_length=2048,
                    target_length=512,
                    execution=Execution("bfloat16", remat="full"),
                    objective=Objective(loss_chunk=128),
                )
                needed = resources.memory_need(config, settings, mesh)
                print(
                    f"{name}, {devices} devices, fsdp {devices // model}, model {model}: "
                    f"{needed.least / gib:.2f}, with activations about {needed.total / gib:.2f}"
                )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "saving", "memory"])
    flags = parser.parse_args()
    if flags.what == "memory":
        table()
        return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    tasks.declare()
    with tempfile.TemporaryDirectory() as folder:
        if flags.what == "speed":
            speed(Path(folder))
        else:
            saving(Path(folder))


if __name__ == "__main__":
    main()

"""Training steps and conversions, compared with Hugging Face on torch and with cp.

    python scripts/bench/models.py train [--torch PYTHON]
    python scripts/bench/models.py convert [--layers N]

`train`: T5-small on 16 x (256 + 64) tokens and a Llama of 135M on 8 x 128, float32, each library at
its defaults for training: ours Adafactor, torch AdamW; T5 with its dropout of 0.1. PYTHON is an
interpreter that has torch and transformers; without it only ours is measured. Beside: float32
matrix products, 2048 x 2048 x 2048, and which share of their rate the step reaches, by counting
multiply-adds of the weights and of attention three times (forward, and twice for the gradient).

`convert`: a Llama of 135M, bfloat16, from and to a Hugging Face directory, against `cp` of the same
bytes, with and without putting them on the disk (a conversion does: the machine may stop any time).
With N layers of width 2048 instead of 30 of 576 it has 96 N + 201 MB.

Prints medians. Nothing else should run.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m2l.models import T5Config

STEPS = 5
T5 = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "decoder_start_token_id": 0,
}
LLAMA = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}
T5_BATCH, LLAMA_BATCH = (16, 256, 64), (8, 128)


def median_of(run: Callable[[], object], times: int = STEPS) -> float:
    """Returns the median seconds of a run, after one that does not count."""
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def t5_small() -> "T5Config":
    """Returns m2l's configuration of T5-small."""
    from m2l.models import T5Config

    names = {"num_layers", "decoder_start_token_id"}
    return T5Config(
        **{name: value for name, value in T5.items() if name not in names},
        num_encoder_layers=T5["num_layers"],
        num_decoder_layers=T5["num_layers"],
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        scale_decoder_outputs=True,
    )


def by_torch(python: str, script: str, *arguments: str) -> dict[str, float]:
    """Runs a script's measurements of torch with an interpreter that has it."""
    command = [python, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def t5_flops() -> float:
    """Computes the operations of a training step of T5-small."""
    rows, inputs, targets = T5_BATCH
    d, ff, layers = T5["d_model"], T5["d_ff"], T5["num_layers"]
    attention, mlp = 4 * d * d, 2 * d * ff
    encoder = layers * inputs * (attention + mlp + 2 * inputs * d)
    read = layers * (inputs * 2 * d * d + targets * (2 * d * d + 2 * inputs * d))
    decoder = layers * targets * (attention + mlp + 2 * targets * d) + read
    return 6.0 * rows * (encoder + decoder + targets * d * T5["vocab_size"])


def llama_flops() -> float:
    """Computes the operations of a training step of the Llama."""
    rows, length = LLAMA_BATCH
    d, ff = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    keys = d * LLAMA["num_key_value_heads"] // LLAMA["num_attention_heads"]
    layer = 2 * d * d + 2 * d * keys + 3 * d * ff + 2 * length * d
    weights = LLAMA["num_hidden_layers"] * layer + d * LLAMA["vocab_size"]
    return 6.0 * rows * length * weights


FLOPS = {"T5-small": t5_flops(), "Llama-135M": llama_flops()}
TOKENS = {
    "T5-small": T5_BATCH[0] * (T5_BATCH[1] + T5_BATCH[2]),
    "Llama-135M": LLAMA_BATCH[0] * LLAMA_BATCH[1],
}


def ours() -> dict[str, float]:
    """Returns the seconds of a step by model, and of a matrix product."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from m2l import models, partitioning
    from m2l.models import Execution, LlamaConfig
    from m2l.training import state
    from m2l.training.optimizers import Optimizer

    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    seconds = {"matmul": median_of(lambda: product(x).block_until_ready(), 20)}
    rng = np.random.default_rng(0)

    def tokens(rows: int, length: int, vocabulary: int) -> np.ndarray:
        return rng.integers(2, vocabulary, (rows, length), dtype=np.int32)

    def step_of(config: models.Config, batch: dict[str, np.ndarray], dropout: float) -> float:
        mesh = partitioning.make_mesh()
        # Placed as the trainer places it, or the second step would be compiled anew.
        placed = state.shardings(config, Optimizer(), mesh)
        fresh = state.init(config, Optimizer(), jax.random.key(0))
        current = [jax.device_put(fresh, placed)]
        step = state.train_step(config, Optimizer(), Execution(dropout_rate=dropout), mesh)

        def run() -> None:
            with jax.set_mesh(mesh):
                current[0], metrics = step(current[0], batch, np.float32(1e-3), jax.random.key(1))
            metrics["loss"].block_until_ready()
            jax.block_until_ready(current[0])

        return median_of(run)

    t5 = t5_small()
    rows, inputs, targets = T5_BATCH
    batch = {
        "encoder_input_tokens": tokens(rows, inputs, t5.vocab_size),
        "decoder_input_tokens": tokens(rows, targets, t5.vocab_size),
        "decoder_target_tokens": tokens(rows, targets, t5.vocab_size),
        "decoder_loss_weights": np.ones((rows, targets), np.int32),
    }
    seconds["T5-small"] = step_of(t5, batch, 0.1)
    llama = LlamaConfig(**LLAMA, head_dim=64)
    rows, length = LLAMA_BATCH
    batch = {
        "decoder_input_tokens": tokens(rows, length, llama.vocab_size),
        "decoder_target_tokens": tokens(rows, length, llama.vocab_size),
        "decoder_loss_weights": np.ones((rows, length), np.int32),
    }
    seconds["Llama-135M"] = step_of(llama, batch, 0.0)
    return seconds


def peer() -> dict[str, float]:
    """Returns the seconds of a step of Hugging Face's models, by model and mode; needs torch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    seconds = {}
    rows, inputs, targets = T5_BATCH
    makers = {
        "T5-small": (
            lambda: T5ForConditionalGeneration(T5Config(**T5)),
            lambda: {
                "input_ids": torch.randint(2, T5["vocab_size"], (rows, inputs)),
                "labels": torch.randint(2, T5["vocab_size"], (rows, targets)),
            },
        ),
        "Llama-135M": (
            lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
            lambda: (lambda ids: {"input_ids": ids, "labels": ids})(
                torch.randint(2, LLAMA["vocab_size"], LLAMA_BATCH)
            ),
        ),
    }
    for name, (make, feed) in makers.items():
        for mode in ("float32", "medium", "autocast"):
            torch.set_float32_matmul_precision("medium" if mode == "medium" else "highest")
            model, batch = make().train(), feed()
            optimizer = torch.optim.AdamW(model.parameters())

            def run(model=model, batch=batch, optimizer=optimizer, mode=mode) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            seconds[f"{name} {mode}"] = median_of(run)
    return seconds


def train(torch_python: str | None) -> None:
    """Prints the table of training steps."""
    theirs = by_torch(torch_python, __file__, "peer") if torch_python else {}
    measured = ours()
    rate = 2 * 2048**3 / measured["matmul"]
    print(f"float32 matrix products: {rate / 1e9:.0f} GFLOP/s")
    for name, tokens in TOKENS.items():
        seconds, share = measured[name], FLOPS[name] / measured[name] / rate
        print(f"{name}: m2l {seconds:.3f} s, {tokens / seconds:.0f} tokens/s, {share:.1%} of them")
        for mode in ("float32", "medium", "autocast") if theirs else ():
            other = theirs[f"{name} {mode}"]
            print(
                f"{name}: torch {mode} {other:.3f} s, {tokens / other:.0f} tokens/s; "
                f"m2l is {other / seconds:.2f} times as fast"
            )


def convert(layers: int | None) -> None:
    """Prints the speeds of conversions and of cp."""
    import jax
    import numpy as np

    from m2l import checkpoints, models
    from m2l.checkpoints import huggingface

    wide = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": layers}
    wide |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = models.LlamaConfig(**(LLAMA | wide if layers else LLAMA), head_dim=64)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(jax.numpy.bfloat16),
        models.spec(config),
    )
    vocabulary = {"name": "bench", "size": config.vocab_size, "fingerprint": "bench"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        about = {"model": models.to_dict(config), "vocabulary": vocabulary}
        checkpoints.save(root / "first", params, **about, made_by={"kind": "bench"})
        huggingface.export_checkpoint(root / "first", root / "public")
        size = sum(file.stat().st_size for file in (root / "public").iterdir())

        numbers = itertools.count()

        def seconds(make: Callable[[Path], None]) -> float:
            out = root / str(next(numbers))
            # A virtual machine may have given the memory for the new files back to its host.
            np.ones(3 * size, np.uint8)
            start = time.perf_counter()
            make(out)
            elapsed = time.perf_counter() - start
            # Emptied and not removed: ext4 makes files slowly where others were removed just now.
            for file in out.rglob("*"):
                if file.is_file():
                    os.truncate(file, 0)
            os.sync()
            return elapsed

        def copy(out: Path) -> None:
            subprocess.run(["cp", "-r", str(root / "public"), str(out)], check=True)

        def copy_to_disk(out: Path) -> None:
            copy(out)
            subprocess.run(["sync", "-f", str(out)], check=True)

        makers = {
            "cp": copy,
            "cp, then sync": copy_to_disk,
            "import": lambda out: huggingface.import_checkpoint(
                root / "public", out, vocabulary=vocabulary
            ),
            "export": lambda out: huggingface.export_checkpoint(root / "first", out),
        }
        rounds = [[seconds(make) for make in makers.values()] for _ in range(STEPS + 1)]
    for name, column in zip(makers, zip(*rounds[1:], strict=True), strict=True):
        median = statistics.median(column)
        print(
            f"{name}: {median:.3f} s ({min(column):.3f} to {max(column):.3f}), "
            f"{size / median / 1e9:.2f} GB/s of {size / 1e6:.0f} MB"
        )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "convert", "peer"])
    parser.add_argument("--torch", help="A Python that has torch and transformers.")
    parser.add_argument("--layers", type=int, help="Converts a wider model with so many.")
    flags = parser.parse_args()
    if flags.what == "peer":
        print(json.dumps(peer()))
    elif flags.what == "train":
        train(flags.torch)
    else:
        convert(flags.layers)


if __name__ == "__main__":
    sys.exit(main())

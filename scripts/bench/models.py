"""Training steps and conversions, compared with Hugging Face on torch and with cp.

    python scripts/bench/models.py train t5|llama [--targets SHARE] [--torch PYTHON]
    python scripts/bench/models.py convert [--layers N]

`train`: T5-small on 16 x (256 + 64) tokens or a Llama of 135M on 8 x 128, each library at its
defaults for training: ours Adafactor, torch AdamW; T5 with its dropout of 0.1. Tokens a second, by
name, as JSON; " limit" is what float32 products of 2048 x 2048 would allow, by counting
multiply-adds of the weights and of attention three times (forward, and twice for the gradient);
" memory" is the peak of the process in MiB. SHARE: of the positions of a row, its last, whose loss
counts: 0.25 as in fine-tuning a decoder on questions with answers. PYTHON is an interpreter that
has torch and transformers. In bfloat16 too where the processor has units for it (torch: autocast).

`convert`: a Llama of 135M, bfloat16, from and to a Hugging Face directory, against `cp` of the same
bytes, with and without putting them on the disk (a conversion does: the machine may stop any time).
With N layers of width 2048 instead of 30 of 576 it has 96 N + 201 MB.

Medians. Nothing else should run.
"""

import argparse
import itertools
import json
import os
import resource
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
TRAIN_STEPS = 2
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


FLOPS = {"T5": t5_flops(), "Llama": llama_flops()}
TOKENS = {"T5": T5_BATCH[0] * (T5_BATCH[1] + T5_BATCH[2]), "Llama": LLAMA_BATCH[0] * LLAMA_BATCH[1]}


def peak() -> float:
    """Returns the peak resident MiB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(name: str, targets: float) -> dict[str, float]:
    """Returns m2l's figures of a model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from m2l import partitioning
    from m2l.models import Execution, LlamaConfig
    from m2l.models.products import has_bfloat16
    from m2l.training import state
    from m2l.training.optimizers import Optimizer

    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    rate = 2 * 2048**3 / median_of(lambda: product(x).block_until_ready())
    rng = np.random.default_rng(0)
    rows, length = (T5_BATCH[0], T5_BATCH[2]) if name == "T5" else LLAMA_BATCH
    config = t5_small() if name == "T5" else LlamaConfig(**LLAMA, head_dim=64)
    lengths = {"decoder_input_tokens": length, "decoder_target_tokens": length}
    lengths |= {"encoder_input_tokens": T5_BATCH[1]} if name == "T5" else {}
    batch = {
        key: rng.integers(2, config.vocab_size, (rows, count), dtype=np.int32)
        for key, count in lengths.items()
    }
    counts = np.arange(length) >= round((1 - targets) * length)
    batch["decoder_loss_weights"] = np.tile(counts.astype(np.int32), (rows, 1))
    mesh = partitioning.make_mesh()
    initialise, _ = state.sharded_initializers(config, Optimizer(), mesh)
    figures = {f"{name} limit": TOKENS[name] * rate / FLOPS[name]}
    for dtype in ("float32", "bfloat16") if has_bfloat16() else ("float32",):
        execution = Execution(dtype, dropout_rate=0.1 if name == "T5" else 0.0)
        current = [initialise(jax.random.key(0))]
        step = state.train_step(config, Optimizer(), execution, mesh)

        def run(current: list = current, step: Callable = step) -> None:
            with jax.set_mesh(mesh):
                current[0], _ = step(current[0], batch, np.float32(1e-3), jax.random.key(1))
            jax.block_until_ready(current[0])

        suffix = "" if dtype == "float32" else f" {dtype}"
        figures[name + suffix] = TOKENS[name] / median_of(run, TRAIN_STEPS)
        figures.setdefault(f"{name} memory", peak())
    return figures


def peer(name: str, targets: float, modes: list[str]) -> dict[str, float]:
    """Returns the same figures of Hugging Face's models, by mode; needs torch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    if name == "T5":
        rows, inputs, length = T5_BATCH
        model = T5ForConditionalGeneration(T5Config(**T5)).train()
        batch = {
            "input_ids": torch.randint(2, T5["vocab_size"], (rows, inputs)),
            "labels": torch.randint(2, T5["vocab_size"], (rows, length)),
        }
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA)).train()
        ids = torch.randint(2, LLAMA["vocab_size"], LLAMA_BATCH)
        batch = {"input_ids": ids, "labels": ids.clone()}
    length = batch["labels"].shape[1]
    batch["labels"][:, : round((1 - targets) * length)] = -100
    figures = {}
    for mode in modes:
        torch.set_float32_matmul_precision("medium" if mode == "medium" else "highest")
        optimizer = torch.optim.AdamW(model.parameters())

        def run(mode: str = mode, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        key = name if mode == "float32" else f"{name} bfloat16"
        suffix = "torch" if mode == "float32" else f"torch {mode}"
        figures[f"{key} {suffix}"] = TOKENS[name] / median_of(run, TRAIN_STEPS)
        figures.setdefault(f"{name} memory torch", peak())
    return figures


def train(name: str, targets: float, torch_python: str | None) -> None:
    """Prints the figures of a model's training step."""
    figures = ours(name, targets)
    if torch_python:
        modes = ["float32"]
        if any(key.endswith("bfloat16") for key in figures):
            modes += ["medium", "autocast"]
        same = ["peer", name.lower(), "--targets", str(targets), "--modes", *modes]
        figures |= by_torch(torch_python, __file__, *same)
    print(json.dumps(figures))


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
    parser.add_argument("model", choices=["t5", "llama"], nargs="?", default="llama")
    parser.add_argument("--targets", type=float, default=1.0, help="The share that counts.")
    parser.add_argument("--torch", help="A Python that has torch and transformers.")
    parser.add_argument("--modes", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help="Converts a wider model with so many.")
    flags = parser.parse_args()
    name = {"t5": "T5", "llama": "Llama"}[flags.model]
    if flags.what == "peer":
        print(json.dumps(peer(name, flags.targets, flags.modes)))
    elif flags.what == "train":
        train(name, flags.targets, flags.torch)
    else:
        convert(flags.layers)


if __name__ == "__main__":
    sys.exit(main())

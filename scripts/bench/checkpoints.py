"""Measures saving and restoring, next to Orbax's own functions and `cp`.

    python scripts/bench/checkpoints.py local [--megabytes N] [--repeat N]
    python scripts/bench/checkpoints.py processes

`local`: float32 parameters of a decoder in one process: saved by `checkpoints.save`, by the
checkpoints of a training run, by Orbax at its defaults and as m2l configures it, and copied by
`cp -r` and sync; restored by `checkpoints.restore` with and without digests, by Orbax, and read by
`cat`. In turn, medians of GB/s.

`processes`: two processes of four devices each hold 1.6 GB of an AdamW state, sharded eight ways:
for how long a save holds each up, how long it then takes, what each writes and reads, and the most
memory that each takes beyond what it held.

Everything written is synced to the disk before the clock stops. Nothing else should run.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp

    from m2l.typing import Params

SHAPES = {"q": (768, 768), "k": (768, 768), "v": (768, 768), "o": (768, 768),
          "wi": (768, 3072), "wo": (3072, 768), "norm": (768,)}  # fmt: skip
ABOUT = {
    "model": {},
    "vocabulary": {"name": None, "size": None, "fingerprint": ""},
    "made_by": {"kind": "bench"},
}


def parameters(megabytes: int) -> "Params":
    """Returns an embedding and as many layers as fit, of random numbers."""
    import numpy as np

    rng = np.random.default_rng(0)
    layer = sum(int(np.prod(shape)) for shape in SHAPES.values()) * 4
    tree = {"embedder": rng.standard_normal((32000, 768), np.float32)}
    for number in range(max(1, (megabytes * 10**6 - tree["embedder"].nbytes) // layer)):
        tree[f"layers_{number:02}"] = {
            name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()
        }
    return tree


def orbax_context(plain: bool) -> "ocp.Context":
    """Returns Orbax's context: its defaults, or zarr 3 without compression in chunks of 8 MB."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    if plain:
        context.array.saving.use_ocdbt = context.array.saving.use_compression = False
        context.array.saving.storage_options.chunk_byte_size = 8 << 20
    return context


def local(root: Path, megabytes: int, repeat: int) -> None:
    """Prints GB/s of each way of saving and of loading."""
    import jax
    from orbax.checkpoint import v1 as ocp

    from m2l import checkpoints
    from m2l.checkpoints.run_checkpoints import RunCheckpoints

    tree = jax.device_put(parameters(megabytes))
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )

    def run(path: Path) -> None:
        with RunCheckpoints(path, keep=1) as saves:
            saves.save(1, tree, (), data_state=[b"x"], parents=[], **ABOUT)

    def by_orbax(plain: bool) -> Callable[[Path], None]:
        def save(path: Path) -> None:
            with orbax_context(plain):
                ocp.save(path, tree)

        return save

    def load_by_orbax(path: Path) -> None:
        jax.block_until_ready(ocp.load(path, abstract))

    def restore(verify: bool) -> Callable[[Path], None]:
        sharding = jax.tree.leaves(tree)[0].sharding
        return lambda path: jax.block_until_ready(
            checkpoints.restore(path, shardings=sharding, verify=verify)
        )

    def cat(path: Path) -> None:
        for file in path.rglob("*"):
            if file.is_file():
                file.read_bytes()

    saves = {
        "m2l save": lambda path: checkpoints.save(path, tree, **ABOUT),
        "m2l training save": run,
        "Orbax, default": by_orbax(False),
        "Orbax, plain chunks of 8 MB": by_orbax(True),
        "cp -r": lambda path: subprocess.run(["cp", "-r", root / "m2l save", path], check=True),
    }
    loads = {
        "m2l restore": ("m2l save", restore(True)),
        "m2l restore, no digests": ("m2l save", restore(False)),
        "Orbax, default": ("Orbax, default", load_by_orbax),
        "Orbax, plain chunks of 8 MB": ("Orbax, plain chunks of 8 MB", load_by_orbax),
        "read every file": ("m2l save", cat),
    }
    times: dict[str, list[float]] = {}
    for _ in range(repeat):
        for name, save in saves.items():
            shutil.rmtree(root / name, ignore_errors=True)
            os.sync()
            start = time.perf_counter()
            save(root / name)
            os.sync()
            times.setdefault(f"save  {name}", []).append(time.perf_counter() - start)
        for name, (source, load) in loads.items():
            start = time.perf_counter()
            load(root / source)
            times.setdefault(f"load  {name}", []).append(time.perf_counter() - start)
    print(f"{nbytes / 1e9:.2f} GB in {len(jax.tree.leaves(tree))} arrays, medians of {repeat}")
    for name, seconds in times.items():
        rates = sorted(nbytes / 1e9 / each for each in seconds)
        middle = statistics.median(rates)
        print(f"{name:36} {middle:5.2f} GB/s [{rates[0]:.2f}-{rates[-1]:.2f}]")


def counters() -> tuple[int, int]:
    """Returns the bytes that this process has read and written, by its calls."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


def memory(field: str) -> float:
    """Returns VmRSS or VmHWM of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith(field))


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Prints what this process takes in a block that both begin together."""
    import jax
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)
    Path("/proc/self/clear_refs").write_text("5")
    before, resident, start = counters(), memory("VmRSS"), time.perf_counter()
    yield
    seconds, after = time.perf_counter() - start, counters()
    read, wrote = ((b - a) / 1e9 for a, b in zip(before, after, strict=True))
    print(
        f"p{jax.process_index()} {name:24} {seconds:6.2f} s  extra memory "
        f"{memory('VmHWM') - resident:5.2f} GB  read {read:5.2f} GB  wrote {wrote:5.2f} GB",
        flush=True,
    )


def process(number: int, port: int, root: Path) -> None:
    """Runs one of the two processes of `processes`."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    import jax
    import numpy as np

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)

    from m2l import checkpoints, models, partitioning
    from m2l.checkpoints.run_checkpoints import RunCheckpoints
    from m2l.training import state
    from m2l.training.optimizers import Optimizer

    config = models.LlamaConfig(32000, 768, 2048, 12, 12, 12, 64)
    mesh = partitioning.make_mesh(fsdp=8)
    placed = state.shardings(config, Optimizer("adamw"), mesh)
    make, _ = state.sharded_initializers(config, Optimizer("adamw"), mesh)

    def noisy(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0:
            return leaf
        return jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype)

    current = jax.jit(lambda key: jax.tree.map(noisy, make(key)), out_shardings=placed)(
        jax.random.key(0)
    )
    jax.block_until_ready(current)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(current))
    about = ABOUT | {"model": models.to_dict(config), "parents": [], "data_state": [b"x"]}
    with RunCheckpoints(root / "run", keep=1) as saves:
        saves.save(1, current.params, current.opt_state, **about)  # Compiles, and imports Orbax.
        saves.wait()
        with phase("save: training waits"):
            saves.save(2, current.params, current.opt_state, **about)
        with phase("save: the rest"):
            saves.wait()
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), current.opt_state
    )
    with phase("restore"):
        params = checkpoints.restore(root / "run", shardings=placed.params)
        opt_state = checkpoints.restore_opt_state(root / "run/2", like)
        jax.block_until_ready((params, opt_state))
    pairs = zip(
        jax.tree.leaves((params, opt_state)),
        jax.tree.leaves((current.params, current.opt_state)),
        strict=True,
    )
    for restored, saved in pairs:
        for a, b in zip(restored.addressable_shards, saved.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)
    if number == 0:
        print(f"a state of {nbytes / 1e9:.2f} GB, restored to the same bits")
    jax.distributed.shutdown()


def processes(root: Path) -> None:
    """Starts the two processes."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, __file__, "process", "--port", str(port), "--root", str(root)]
    running = [subprocess.Popen([*command, "--number", str(number)]) for number in range(2)]
    codes = [each.wait() for each in running]
    if any(codes):
        raise SystemExit("a process has failed")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["local", "processes", "process"])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.what == "process":
        process(asked.number, asked.port, asked.root)
        return
    with tempfile.TemporaryDirectory() as root:
        if asked.what == "local":
            local(Path(root), asked.megabytes, asked.repeat)
        else:
            processes(Path(root))


if __name__ == "__main__":
    main()

"""Compares merges with mergekit 0.1.5: the same bytes and machine, whole processes, medians.

    python scripts/bench/merge.py speed [--mergekit MERGEKIT_YAML] [--models 125m,500m]
    python scripts/bench/merge.py figures --models 500m [--mergekit MERGEKIT_YAML]
    python scripts/bench/merge.py growth [--models 125m,500m,1b,4b] [--experts 2]
    python scripts/bench/merge.py spectral [--models 10m] [--methods tsv_m,iso_c,iso_cts]
    python scripts/bench/merge.py memory [--models 125m,500m,1b,4b]
    python scripts/bench/merge.py processes
    python scripts/bench/merge.py layouts [--models 125m,500m]
    python scripts/bench/merge.py in_memory [--layers 8,32,80] [--experts 4]

Random bfloat16 models in the shape of Llamas, as Hugging Face directories, in --folder (which is
kept for the next run if given). The page cache is warm: each command runs once before it counts.
MERGEKIT_YAML is the command of an installation of mergekit; without it only ours is measured.

`speed`: seconds of the whole process; GB of experts a second; how often ours is as fast; and the
limit: `cat` of all inputs to /dev/null and of one input to a file, what reading and writing cost
without any merge. Ours trims TIES exactly over the whole model, mergekit per tensor. Thresholds
that m2l computed are cached; here that cache is empty. Digests of files are cached: the first merge
of a file, which does not count, reads it once more for that (0.7 CPU seconds a GB).
`figures`: what docs/performance.md shows, as JSON: seconds, those of mergekit, and the bound: the
start of Python and JAX, and what two threads take to read the inputs as often as the method must,
to write and to digest the result.
`growth`: seconds by the size of the model, and the slope from each to the next; last as JSON.
`spectral`: seconds of a merge by methods of singular values, and of their decompositions in it,
which are the limit; last as JSON.
`memory`: the peak resident memory of whole processes by the size of the model.
`processes`: two processes on one merge write the same bytes as one.
`layouts`: the same models as checkpoints of Orbax: m2l's layout (rows in chunks of 8 MB, not
compressed), chunks of 8 MB as Orbax compresses them, and Orbax's default (an OCDBT, one compressed
chunk for each array).
`in_memory`: seconds of the first call of `merge_params`, which compiles, and of later ones, by the
number of tiny parameters (nine a layer) sharded over a mesh of eight CPU devices.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

RUNS = 5
SIZES = {
    # hidden, intermediate, layers, key-value heads of 64, vocabulary
    "10m": (256, 768, 4, 2, 8192),
    "125m": (768, 2048, 12, 4, 32000),
    "500m": (1536, 4096, 16, 8, 32000),
    "1b": (2048, 5632, 22, 4, 32000),
    "4b": (3072, 8192, 36, 8, 64000),
}
OURS = {
    "average": ["--method", "average"],
    "task_arithmetic": ["--method", "task_arithmetic", "--scale", "0.3"],
    "dare_ties": ["--method", "dare_ties", "--drop_rate", "0.5"],
    "ties": ["--method", "ties", "--density", "0.2"],
}
THEIRS = {
    "average": ("linear", {"weight": 1.0}, {}),
    "task_arithmetic": ("task_arithmetic", {"weight": 1.0}, {"lambda": 0.3}),
    "dare_ties": ("dare_ties", {"weight": 1.0, "density": 0.5}, {}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}, {}),
}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a Llama's tensors by name."""
    d, ff, layers, heads, vocabulary = SIZES[size]
    result = {"model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,)}
    result["lm_head.weight"] = (vocabulary, d)
    for i in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (d, d)),
            ("self_attn.k_proj", (64 * heads, d)),
            ("self_attn.v_proj", (64 * heads, d)),
            ("self_attn.o_proj", (d, d)),
            ("mlp.gate_proj", (ff, d)),
            ("mlp.up_proj", (ff, d)),
            ("mlp.down_proj", (d, ff)),
            ("input_layernorm", (d,)),
            ("post_attention_layernorm", (d,)),
        ):
            result[f"model.layers.{i}.{name}.weight"] = shape
    return result


def make(folder: Path, size: str, experts: int) -> list[Path]:
    """Returns a base and its experts; writes those that are missing."""
    from m2l.checkpoints import safetensors

    d, ff, layers, heads, vocabulary = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": d,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": d // 64,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
    }
    dtype = np.dtype(ml_dtypes.bfloat16)
    described = {name: (shape, dtype) for name, shape in shapes(size).items()}
    shards = safetensors.plan_shards(described, 5_000_000_000)
    paths = [folder / size / name for name in ("base", *(f"expert_{i}" for i in range(experts)))]
    for index, path in enumerate(paths):
        if (path / "config.json").is_file():
            continue
        path.mkdir(parents=True)
        extents = safetensors.create(path, described, shards)
        for number, (name, (shape, _)) in enumerate(described.items()):
            length = int(np.prod(shape))
            for start in range(0, length, 1 << 22):
                count = min(1 << 22, length - start)
                # The base's numbers again, and each expert's own on top.
                block = np.random.default_rng([number, start]).standard_normal(
                    count, dtype=np.float32
                )
                block *= 0.02
                if index:
                    own = np.random.default_rng([index, number, start])
                    block += 0.002 * own.standard_normal(count, dtype=np.float32)
                extents[name].write_from(block.astype(dtype), start)
        (path / "config.json").write_text(json.dumps(config))
    return paths


def run(command: list[str], **environment: str) -> tuple[float, float, int]:
    """Returns the seconds, seconds of CPU, and peak resident bytes of a whole process."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}: {log.read().decode()[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def repeated(command: list[str], out: Path, times: int) -> tuple[float, float, int]:
    """Returns medians, after one run that does not count, unless there is only one."""
    runs = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(times + (times > 1)):
            subprocess.run(["rm", "-rf", str(out), f"{cache}/thresholds"], check=True)
            runs.append(run(command, M2L_CACHE=cache))
    return tuple(statistics.median(column) for column in zip(*runs[times > 1 :], strict=True))


def ours(paths: list[Path], method: str, out: Path, *more: str) -> list[str]:
    """Returns the command that merges with m2l."""
    base = [] if method == "average" else ["--base", str(paths[0])]
    experts = [flag for path in paths[1:] for flag in ("--expert", str(path))]
    m2l = str(Path(sys.executable).parent / "m2l")
    flags = [*OURS[method], "--dtype", "bfloat16", *more]
    return [m2l, "merge", *base, *experts, *flags, "--out", str(out)]


def theirs(mergekit: str, paths: list[Path], method: str, out: Path, folder: Path) -> list[str]:
    """Returns the command that merges with mergekit."""
    name, each, together = THEIRS[method]
    config = {
        "merge_method": name,
        "models": [{"model": str(path), "parameters": each} for path in paths[1:]],
        "dtype": "bfloat16",
        "parameters": together,
    }
    if method != "average":
        config["base_model"] = str(paths[0])
    # JSON is YAML.
    file = folder / f"{method}.yaml"
    file.write_text(json.dumps(config))
    return [mergekit, str(file), str(out), "--no-copy-tokenizer", "--random-seed", "0"]


def limit(paths: list[Path], out: Path, times: int) -> float:
    """Returns the seconds of `cat`, of all inputs and of the output's bytes."""
    files = [str(file) for path in paths for file in sorted(path.glob("*.safetensors"))]
    one = " ".join(str(file) for file in sorted(paths[0].glob("*.safetensors")))
    command = ["bash", "-c", f"cat {' '.join(files)} > /dev/null; cat {one} > {out}"]
    return repeated(command, out, times)[0]


def started(times: int) -> float:
    """Returns the seconds that Python and JAX take to start."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return statistics.median(run(command)[0] for _ in range(times))


def bound(inputs: list[Path], readings: int, out: Path) -> float:
    """Returns the seconds that two threads read inputs so often, write one, and digest it.

    The least of three times. The longest task, the digest, is begun first.
    """
    files = [file for path in inputs for file in sorted(path.glob("*.safetensors"))]
    result = sorted(inputs[0].glob("*.safetensors"))
    size = sum(file.stat().st_size for file in result)

    def read(file: Path, digested: bool = False) -> None:
        buffer, digest = bytearray(1 << 20), hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                if digested:
                    digest.update(memoryview(buffer)[:count])

    def write(number: int) -> None:
        with (out / f"{number}").open("wb", buffering=0) as file:
            for _ in range(0, size // 2, 1 << 20):
                file.write(bytes(1 << 20))

    tasks = [functools.partial(read, file, True) for file in result]  # As if it were the result.
    tasks += [functools.partial(write, number) for number in range(2)]
    tasks += [functools.partial(read, file) for _ in range(readings) for file in files]
    times = []
    for _ in range(3):
        subprocess.run(["rm", "-rf", str(out)], check=True)
        out.mkdir(parents=True)
        start = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(task) for task in tasks]:
                done.result()
        times.append(time.perf_counter() - start)
    return min(times)


def figures(
    folder: Path, size: str, methods: list[str], mergekit: str | None, times: int, peer_times: int
) -> None:
    """Prints the figures of docs/performance.md."""
    paths, out, result = make(folder, size, 4), folder / "out", {}
    start = started(times)
    for method in methods:
        inputs = paths[1:] if method == "average" else paths
        readings = 2 if method == "ties" else 1
        result[f"{method} limit"] = start + bound(inputs, readings, out)
        seconds, _, peak = repeated(ours(paths, method, out), out, times)
        result |= {method: seconds, f"{method} memory": peak / 2**20}
        if mergekit:
            command = theirs(mergekit, paths, method, out, folder)
            seconds, _, peak = repeated(command, out, peer_times)
            result[f"{method} mergekit"] = seconds
            result[f"{method} memory mergekit"] = peak / 2**20
        subprocess.run(["rm", "-rf", str(out)], check=True)
    print(json.dumps(result))


def growth(folder: Path, models: list[str], experts: int, times: int) -> None:
    """Prints seconds and peak memory by the size of the model; last, slopes and memory as JSON."""
    earlier: dict[str, tuple[int, float]] = {}
    before_it, result = "", {}
    for size in models:
        paths, out = make(folder, size, experts), folder / "out"
        parameters = sum(int(np.prod(shape)) for shape in shapes(size).values())
        for method in OURS:
            seconds, cpu, peak = repeated(ours(paths, method, out), out, times)
            line = f"{size} ({parameters / 1e6:,.0f}M) x {experts} {method}: {seconds:.2f} s "
            line += f"(CPU {cpu:.1f} s, {peak / 2**20:.0f} MiB)"
            result[f"{method} memory {size}"] = peak / 2**20
            if method in earlier:
                count, before = earlier[method]
                slope = (seconds - before) / (parameters - count) * 1e9
                line += f", {slope:.1f} s more for each 1e9 parameters"
                result[f"{method} {before_it} to {size}"] = slope
            earlier[method] = parameters, seconds
            print(line, flush=True)
        subprocess.run(["rm", "-rf", str(out)], check=True)
        before_it = size
    print(json.dumps(result))


def spectral(folder: Path, size: str, experts: int, methods: list[str], times: int) -> None:
    """Prints the seconds of merges by singular values, and of the decompositions in them."""
    from m2l import merging

    paths, out, decomposing = make(folder, size, experts), folder / "out", [0.0]
    decompose = np.linalg.svd

    def timed(*arguments: object, **options: object) -> object:
        start = time.perf_counter()
        result = decompose(*arguments, **options)
        decomposing[0] += time.perf_counter() - start
        return result

    np.linalg.svd, result = timed, {}
    for method in methods:
        runs = []
        for _ in range(times + 1):
            subprocess.run(["rm", "-rf", str(out)], check=True)
            decomposing[0], start = 0.0, time.perf_counter()
            recipe = merging.Recipe(method)
            merging.merge(paths[0], paths[1:], recipe, out, memory=4 << 30, progress=False)
            runs.append((time.perf_counter() - start, decomposing[0]))
        seconds, least = (statistics.median(column) for column in zip(*runs[1:], strict=True))
        result |= {method: seconds, f"{method} limit": least}
    print(json.dumps(result))


def speed(
    folder: Path,
    models: list[str],
    counts: list[int],
    mergekit: str | None,
    times: int,
    peer_times: int,
) -> None:
    """Prints the table of speeds."""
    start = started(times)
    print(f"start of Python and JAX alone: {start:.2f} s")
    for size in models:
        for count in counts:
            paths = make(folder, size, count)
            bytes_ = sum(f.stat().st_size for p in paths[1:] for f in p.glob("*.safetensors"))
            out = folder / "out"
            for method in OURS:
                inputs = paths[1:] if method == "average" else paths
                least = limit(inputs, out, times)
                seconds, cpu, peak = repeated(ours(paths, method, out), out, times)
                line = (
                    f"{size} x {count} {method}: m2l {seconds:.2f} s (CPU {cpu:.1f} s, "
                    f"{peak / 2**20:.0f} MiB), {bytes_ / seconds / 1e9:.2f} GB/s; apart from "
                    f"starting {bytes_ / (seconds - start) / 1e9:.2f} GB/s, "
                    f"{(seconds - start) / least:.2f} times cat's {least:.2f} s"
                )
                if mergekit:
                    command = theirs(mergekit, paths, method, out, folder)
                    other, cpu, peak = repeated(command, out, peer_times)
                    line += (
                        f"; mergekit {other:.2f} s (CPU {cpu:.1f} s, {peak / 2**20:.0f} MiB), "
                        f"{bytes_ / other / 1e9:.3f} GB/s; m2l is {other / seconds:.1f} times "
                        "as fast"
                    )
                print(line, flush=True)
            subprocess.run(["rm", "-rf", str(out)], check=True)


def memory(folder: Path, models: list[str], experts: int) -> None:
    """Prints peak memory by the size of the model."""
    for size in models:
        paths = make(folder, size, experts)
        parameters = sum(int(np.prod(shape)) for shape in shapes(size).values())
        for method in OURS:
            out = folder / "out"
            subprocess.run(["rm", "-rf", str(out)], check=True)
            seconds, _, peak = run(ours(paths, method, out), M2L_CACHE=str(folder / "cache"))
            print(
                f"{size} ({parameters / 1e6:,.0f}M) x {experts} {method}: {peak / 2**20:.0f} MiB, "
                f"{seconds:.1f} s",
                flush=True,
            )
            subprocess.run(["rm", "-rf", str(out), str(folder / "cache")], check=True)


def processes(folder: Path) -> None:
    """Checks that two processes write what one writes."""
    paths = make(folder, "125m", 4)
    for method in OURS:
        out, alone = folder / "together", folder / "alone"
        subprocess.run(["rm", "-rf", str(out), str(alone)], check=True)
        run(ours(paths, method, alone), M2L_CACHE=str(folder / "cache_1"))
        started = time.perf_counter()
        with socket.socket() as opened:
            opened.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{opened.getsockname()[1]}"
        pair = [
            subprocess.Popen(
                ours(paths, method, out, "--coordinator", address, "--process", f"{i}/2"),
                env=os.environ | {"M2L_CACHE": str(folder / "cache_2")},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for i in range(2)
        ]
        codes = [process.wait() for process in pair]
        seconds = time.perf_counter() - started
        same = all(
            (out / file.name).read_bytes() == file.read_bytes()
            for file in alone.glob("*.safetensors")
        )
        print(f"{method}: two processes {seconds:.2f} s, exits {codes}, the same bytes: {same}")
        subprocess.run(["rm", "-rf", str(out), str(alone)], check=True)
        subprocess.run(["rm", "-rf", str(folder / "cache_1"), str(folder / "cache_2")], check=True)


def in_memory(layers: list[int], experts: int, times: int) -> None:
    """Prints the time of the first call of `merge_params`, and the median of later ones."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from m2l.merging import METHODS, Recipe, merge_params

    mesh = jax.make_mesh((8,), ("devices",))
    kinds = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "o": (16, 16)}
    kinds |= {"wi_0": (16, 32), "wi_1": (16, 32), "wo": (32, 16), "norm_1": (16,), "norm_2": (16,)}
    rng, sharding = np.random.default_rng(0), NamedSharding(mesh, PartitionSpec("devices"))

    def parameters(count: int) -> list[dict[str, jax.Array]]:
        return [
            {
                name: jax.device_put(rng.standard_normal(shape, np.float32), sharding)
                for name, shape in kinds.items()
            }
            for _ in range(count)
        ]

    recipes = [
        Recipe("average"),
        Recipe("task_arithmetic"),
        Recipe("ties"),
        Recipe("ties", scope="tensor"),
        Recipe("dare_ties", drop_rate=0.5, density=0.5),
        Recipe("breadcrumbs"),
        Recipe("model_stock"),
    ]
    for count in layers:
        base, *trees = (parameters(count) for _ in range(experts + 1))
        for recipe in recipes:
            jax.clear_caches()
            seconds = []
            for _ in range(times + 1):
                start = time.perf_counter()
                needed = base if METHODS[recipe.method].needs_base else None
                jax.block_until_ready(merge_params(needed, trees, recipe))
                seconds.append(time.perf_counter() - start)
            print(
                f"{len(kinds) * count} parameters x {experts} {recipe.method} ({recipe.scope}): "
                f"first {seconds[0]:.1f} s, then {statistics.median(seconds[1:]):.2f} s",
                flush=True,
            )


def as_orbax(folder: Path, size: str, experts: int, layout: str) -> list[Path]:
    """Returns the models as checkpoints of Orbax; writes those that are missing."""
    import orbax.checkpoint as ocp

    from m2l import merging
    from m2l.checkpoints import safetensors

    paths = []
    for source in make(folder, size, experts):
        path = folder / f"{size}_{layout}" / source.name
        paths.append(path)
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        if layout == "rows":
            plain = as_orbax(folder, size, experts, "compressed")[len(paths) - 1]
            recipe = merging.Recipe("average", dtype="bfloat16")
            merging.merge(None, [plain], recipe, path, progress=False)
            continue
        arrays = {
            name.replace(".", "_"): tensor.read().reshape(tensor.shape)
            for name, tensor in safetensors.open_tensors(source).items()
        }
        if layout == "default":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, arrays)
        else:
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
            chunks = {name: ocp.SaveArgs(chunk_byte_size=8 << 20) for name in arrays}
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(path, ocp.args.PyTreeSave(arrays, save_args=chunks))
    return paths


def layouts(folder: Path, models: list[str], experts: int, times: int) -> None:
    """Prints speeds by how Orbax has stored the models."""
    start = started(times)
    for size in models:
        bytes_ = experts * sum(2 * int(np.prod(shape)) for shape in shapes(size).values())
        for layout in ("rows", "compressed", "default"):
            # Elsewhere: what this process holds would count as the commands' peak.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                paths = pool.apply(as_orbax, (folder, size, experts, layout))
            for method in ("average", "ties"):
                out = folder / "out"
                seconds, cpu, peak = repeated(ours(paths, method, out), out, times)
                print(
                    f"{size} x {experts} {layout} {method}: {seconds:.2f} s (CPU {cpu:.1f} s, "
                    f"{peak / 2**20:.0f} MiB), {bytes_ / seconds / 1e9:.2f} GB/s; apart from "
                    f"starting {bytes_ / (seconds - start) / 1e9:.2f} GB/s",
                    flush=True,
                )
                subprocess.run(["rm", "-rf", str(out)], check=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = [
        "speed",
        "figures",
        "growth",
        "spectral",
        "memory",
        "processes",
        "layouts",
        "in_memory",
    ]
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--methods", help="By default all.")
    parser.add_argument("--mergekit", help="The mergekit-yaml of an installation.")
    parser.add_argument("--models", default="125m,500m")
    parser.add_argument("--experts", default="4,8")
    parser.add_argument("--layers", default="8,32,80")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--peer_runs", type=int, default=RUNS, help="1: without a first run.")
    parser.add_argument("--folder", type=Path, help="Where models are kept for the next run.")
    flags = parser.parse_args()
    if flags.what == "in_memory":
        layers = [int(count) for count in flags.layers.split(",")]
        in_memory(layers, int(flags.experts.split(",")[0]), flags.runs)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = flags.models.split(",")
        if flags.what == "memory":
            memory(folder, models, int(flags.experts.split(",")[0]))
        elif flags.what == "growth":
            growth(folder, models, int(flags.experts.split(",")[0]), flags.runs)
        elif flags.what == "spectral":
            methods = (flags.methods or "tsv_m,iso_c,iso_cts").split(",")
            spectral(folder, models[0], int(flags.experts.split(",")[0]), methods, flags.runs)
        elif flags.what == "figures":
            methods = (flags.methods or ",".join(OURS)).split(",")
            figures(folder, models[0], methods, flags.mergekit, flags.runs, flags.peer_runs)
        elif flags.what == "processes":
            processes(folder)
        elif flags.what == "layouts":
            layouts(folder, models, int(flags.experts.split(",")[0]), flags.runs)
        else:
            counts = [int(count) for count in flags.experts.split(",")]
            speed(folder, models, counts, flags.mergekit, flags.runs, flags.peer_runs)


if __name__ == "__main__":
    main()

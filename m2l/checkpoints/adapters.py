"""Adapters of low rank in PEFT's format, and the models that they make of their base.

LoRA (Hu et al. 2021, arXiv:2106.09685): theta + s B A, where s is alpha / r or, with scales that
are stable in the rank (Kalajdzievski 2023, arXiv:2312.03732), alpha / sqrt(r). The product is
computed in float32 as its elements are read, in tiles whose places and shapes are fixed, so that an
element has the same bits whichever others are read with it.
"""

import collections
import dataclasses
import functools
import json
import math
import re
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from m2l import files, storage
from m2l.checkpoints import huggingface_directory, safetensors
from m2l.checkpoints.manifest import Manifest
from m2l.checkpoints.model_fields import read_json
from m2l.checkpoints.publishing import publishing
from m2l.checkpoints.safetensors import ADAPTER_WEIGHTS, StoredTensor
from m2l.checkpoints.saving import array_records
from m2l.checkpoints.spans import (
    Index,
    Span,
    TensorReader,
    read_whole,
    reserve,
    run_indices,
    transposed_reader,
)
from m2l.checkpoints.tensor_kinds import ADAPTER_CONFIG, DELTA_RECORD, is_float
from m2l.errors import CheckpointError
from m2l.storage import AnyPath
from m2l.typing import Json, JsonObject

PREFIX = "base_model.model."
"""Of the names of an adapter's tensors, before the base's."""

OUTPUT = "lm_head.weight"
"""Where PEFT stores an embedding once more that is the output as well."""

# What decides an adapter's numbers, and what is known to decide none; any other field that is set
# is refused. Which modules have factors is known by the tensors.
_DECIDING = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_DECIDING |= {"fan_in_fan_out", "target_modules", "bias", "init_lora_weights"}
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
}  # fmt: skip
# Others change the base when PEFT loads it.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_ALL_LINEAR = "all-linear"
_NONE = "(?!)"  # A pattern that no module matches: whole tensors alone.

_FACTOR = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.weight)?")
# Of such shapes XLA's product on a CPU adds up in the order of the ranks, whichever factor is on
# the left: so the transpose of a matrix has the same bits.
_TILE, _ROWS, _COLUMNS, _MULTIPLE = 1 << 18, 64, 8192, 256
# Of so many matrices at a time threads read parts; so many blocks a row of tiles may fill.
_MATRICES, _BLOCKS = 4, 4


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of a module.

    Attributes:
        module: Its name in the base.
        down: A, of shape [r, in].
        up: B, of shape [out, r].
        scale: What their product is multiplied by.
        embedding: Whether the product is the transpose of the module's weight.
    """

    module: str
    down: StoredTensor
    up: StoredTensor
    scale: float
    embedding: bool

    @property
    def rank(self) -> int:
        """Their rank."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that they change: [out, in], or of an embedding [ids, size]."""
        out, size = self.up.shape[0], self.down.shape[1]
        return (size, out) if self.embedding else (out, size)

    def read(self, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
        """Reads them as float32 [m, r] and [r, n], whose product is the scaled difference.

        Args:
            transposed: Whether the difference of the transposed weight is meant.
        """
        up = self.up.read_checked().astype(np.float32) * np.float32(self.scale)
        down = self.down.read_checked().astype(np.float32)
        if self.embedding != transposed:
            up, down = down.T, up.T
        return np.ascontiguousarray(up), np.ascontiguousarray(down)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in a directory; its tensors are read when they are asked for.

    Attributes:
        path: The directory.
        config: The content of adapter_config.json.
        factors: Module -> its factors.
        replaced: Name of a tensor of the base -> what is to stand in its place.
    """

    path: AnyPath
    config: Mapping[str, Json]
    factors: Mapping[str, Factors]
    replaced: Mapping[str, StoredTensor]

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of its files' content."""
        return files.content_digest([self.path / ADAPTER_CONFIG, self.path / ADAPTER_WEIGHTS])

    @property
    def base_name(self) -> str | None:
        """The name of the base, as the adapter records it."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def tokenizer(self) -> Path | None:
        """A local directory with its own tokenizer's files; None without any."""
        if not huggingface_directory.has_tokenizer(self.path):
            return None
        return huggingface_directory.local_tokenizer(self.path)

    def describe(self) -> str:
        """Returns what it is, as a line."""
        ranks = sorted({factors.rank for factors in self.factors.values()})
        spelled = f"rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}, "
        saved = f" and {len(self.replaced)} whole tensors" if self.replaced else ""
        origin = f", trained on {self.base_name}" if self.base_name else ""
        return (
            f"{'' if not ranks else spelled}alpha {self.config.get('lora_alpha', 8)}, factors of "
            f"{len(self.factors)} matrices{saved}{origin}"
        )

    def apply(
        self,
        base: Mapping[str, TensorReader],
        names: Mapping[str, tuple[str, bool]],
        *,
        tied: Collection[str],
        source: AnyPath,
        joined: Collection[str] = (),
    ) -> dict[str, TensorReader]:
        """Returns the parameters of the base with the adapter's changes.

        Args:
            base: The base's parameters.
            names: Hugging Face's name of a tensor -> the parameter's, and whether that is stored
                transposed.
            tied: The parameters that are embedding and output in one.
            source: The base, for messages.
            joined: Hugging Face's names of tensors that are no single parameter here.

        Raises:
            CheckpointError: A tensor of the adapter belongs to no parameter, or not by its shape.
        """
        result = dict(base)
        both = bool(self.config.get("ensure_weight_tying"))
        for theirs, tensor in self.replaced.items():
            if both and tied and theirs == OUTPUT:
                continue  # The embedding once more.
            name, transposed = self._find(theirs, names, source, joined)
            if name in tied and not both:
                self._refuse(
                    f"{theirs} is embedding and output in one in {source}, and only one of these "
                    "has weights here (ensure_weight_tying is not set)"
                )
            shape = tensor.shape[::-1] if transposed else tensor.shape
            self._check_shape(theirs, shape, base[name].shape, source)
            result[name] = transposed_reader(tensor) if transposed and len(shape) > 1 else tensor
        cache = _Tiles()
        for module, factors in self.factors.items():
            name, transposed = self._find(f"{module}.weight", names, source, joined)
            if name in tied:
                self._refuse(
                    f"{module} is embedding and output in one in {source}, and only one of these "
                    "has factors; untie them first"
                )
            shape = tuple(base[name].shape)
            stored = factors.shape[::-1] if transposed else factors.shape
            flipped = bool(self.config.get("fan_in_fan_out")) and not factors.embedding
            # PEFT goes by the kind of module where the flag cannot be right.
            if stored != shape == stored[::-1] and not factors.embedding:
                flipped = True
            elif stored == shape != stored[::-1]:
                flipped = False
            elif stored != shape:
                self._check_shape(f"{module}.weight", stored, shape, source)
            result[name] = AdaptedTensor(result[name], factors, transposed != flipped, cache)
        return result

    def _find(
        self,
        theirs: str,
        names: Mapping[str, tuple[str, bool]],
        source: AnyPath,
        joined: Collection[str],
    ) -> tuple[str, bool]:
        # A model that was saved without its output has no prefix.
        candidates = (theirs, f"model.{theirs}", theirs.removeprefix("model."))
        for name in candidates:
            if name in names:
                return names[name]
        if any(name in joined for name in candidates):
            self._refuse(
                f"{theirs} joins or is a part of what m2l has as other parameters: merge it into "
                "its base under Hugging Face's names first: m2l merge --method average --expert "
                "BASE+ADAPTER --to huggingface --out DIR, where BASE is a Hugging Face directory"
            )
        self._refuse(f"{source} has no {theirs}: it is an adapter of another base{self._origin()}")

    def _check_shape(
        self, theirs: str, shape: tuple[int, ...], wanted: tuple[int, ...], source: AnyPath
    ) -> None:
        if tuple(shape) != tuple(wanted):
            self._refuse(
                f"for {theirs} it has {list(shape)}, and {source} {list(wanted)}: it is an adapter "
                f"of another base{self._origin()}"
            )

    def _origin(self) -> str:
        return f", {self.base_name!r}" if self.base_name else ""

    def warn_of_another_base(self, source: AnyPath, digest: Callable[[], str]) -> None:
        """Warns where another base is recorded: by its name, and by its digest if m2l wrote it.

        Args:
            source: The base's path, which names it in one of its parts.
            digest: Returns the base's digest.
        """
        if (self.path / huggingface_directory.MANIFEST).is_file():
            parents = huggingface_directory.read_manifest(self.path).parents
            if any(parent["digest"] == digest() for parent in parents if parent["role"] == "base"):
                return
        name = Path(self.base_name or "").name.lower()
        parts = [part.lower() for part in storage.path(source).absolute().parts]
        # A step's number is no name: every run has such.
        named = not name.isdigit() and any(
            name == part or part.endswith(f"--{name}") for part in parts
        )
        if name and not named:
            warnings.warn(
                f"{self.path}: it was made for the base {self.base_name!r}, and is put on {source}",
                stacklevel=3,
            )

    def _refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}")


def split(path: AnyPath) -> tuple[AnyPath, AnyPath] | None:
    """Splits BASE+ADAPTER or BASE+DELTA in two paths; None where a path is one of a single model.

    Of several adapters, BASE+ONE+TWO, the last is split off.

    Raises:
        CheckpointError: There is a base, and no adapter or delta.
    """
    text = str(path)
    if "+" not in text or path.exists():
        return None
    for place in reversed([match.start() for match in re.finditer(r"\+", text)]):
        base = storage.path(text[:place])
        adapter = storage.path(re.sub(r"^(gs|s3):/+", r"\1://", text[place + 1 :]))
        if any((adapter / name).is_file() for name in (ADAPTER_CONFIG, DELTA_RECORD)):
            return base, adapter.absolute()
        if base.exists():
            raise CheckpointError(
                f"{adapter}: no adapter: {ADAPTER_CONFIG} is missing; BASE+ADAPTER names a "
                f"directory in PEFT's format after the +, and BASE+DELTA one with {DELTA_RECORD}"
            )
    return None


def read(path: AnyPath) -> Adapter:
    """Opens an adapter; nothing but headers is read yet.

    Raises:
        CheckpointError: A file is missing or damaged, a field of adapter_config.json is not
            understood, or the tensors are not those that it describes.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{path / ADAPTER_CONFIG}: missing")
    config = read_json(path / ADAPTER_CONFIG)
    _check_fields(path / ADAPTER_CONFIG, config)
    if not (path / ADAPTER_WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        advice = "; adapter_model.bin is not read, for unpickling executes code" if pickled else ""
        raise CheckpointError(f"{path / ADAPTER_WEIGHTS}: missing{advice}")
    halves: dict[str, dict[str, StoredTensor]] = {}
    replaced, embeddings = {}, set()
    for name, tensor in huggingface_directory.open_tensors(path / ADAPTER_WEIGHTS).items():
        if not name.startswith(PREFIX) or not is_float(tensor.dtype):
            raise CheckpointError(
                f"{path / ADAPTER_WEIGHTS}: {name}, {tensor.dtype}{list(tensor.shape)}, is not "
                "understood"
            )
        theirs = name.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(theirs):
            halves.setdefault(match[1], {})[match[3]] = tensor
            embeddings |= {match[1]} if match[2] else set()
        elif ".lora_" in theirs:
            raise CheckpointError(f"{path / ADAPTER_WEIGHTS}: {name} is not understood")
        else:
            replaced[re.sub(r"\.(base_layer|modules_to_save(\.\w+)?)\.", ".", theirs)] = tensor
    factors = {m: _factors(path, config, m, pair, m in embeddings) for m, pair in halves.items()}
    if not factors and not replaced:
        raise CheckpointError(f"{path / ADAPTER_WEIGHTS}: it has no tensors")
    _check_targets(path / ADAPTER_CONFIG, config.get("target_modules"), factors)
    return Adapter(path, config, factors, replaced)


def _check_fields(file: AnyPath, config: Mapping[str, Json]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type {config.get('peft_type')!r}: expected 'LORA'")
    for name, value in config.items():
        if name not in _DECIDING | _HARMLESS and value:
            if name == "loftq_config" or (isinstance(value, dict) and not any(value.values())):
                continue
            raise CheckpointError(
                f"{file}: {name} is {value!r:.60}, which m2l does not understand: merge the "
                "adapter into its base first (PEFT: model.merge_and_unload())"
            )
    if config.get("init_lora_weights") not in _INITS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {config['init_lora_weights']!r:.60}, with which PEFT "
            "changes the base as well: save it as a plain LoRA first "
            "(path_initial_model_for_weight_conversion)"
        )
    expected = {
        "r": lambda value: type(value) is int and value > 0,
        "lora_alpha": lambda value: type(value) in (int, float) and math.isfinite(value),
        "bias": lambda value: value in ("none", "all", "lora_only"),
        "rank_pattern": lambda value: value is None or _are(value, int),
        "alpha_pattern": lambda value: value is None or _are(value, int, float),
    }
    for name, is_right in expected.items():
        if name in config and not is_right(config[name]):
            raise CheckpointError(f"{file}: {name} is {config[name]!r:.60}, which cannot be")


def _are(value: Json, *kinds: type) -> bool:
    return isinstance(value, dict) and all(type(v) in kinds and v > 0 for v in value.values())


def _pattern(patterns: Mapping[str, Json] | None, module: str, default: Json) -> Json:
    """Returns what a rank_pattern or alpha_pattern says of a module, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if _matches(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as error:
        raise CheckpointError(f"{ADAPTER_CONFIG}: {pattern!r} is no pattern ({error})") from error


def _factors(
    path: AnyPath,
    config: Mapping[str, Json],
    module: str,
    pair: Mapping[str, StoredTensor],
    embedding: bool,
) -> Factors:
    file = path / ADAPTER_WEIGHTS
    for half, other in (("A", "B"), ("B", "A")):
        if half not in pair:
            raise CheckpointError(f"{file}: {module} has lora_{other}, and no lora_{half}")
    down, up = pair["A"], pair["B"]
    shapes = f"{file}: the factors of {module} are {list(down.shape)} and {list(up.shape)}"
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise CheckpointError(f"{shapes}; only those of matrices are understood")
    rank = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
    if not down.shape[0] == up.shape[1] == rank:
        raise CheckpointError(f"{shapes}, and {ADAPTER_CONFIG} says that their rank is {rank}")
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Factors(module, down, up, scale, embedding)


def _check_targets(file: AnyPath, targets: Json, factors: Mapping[str, Factors]) -> None:
    """Refuses factors of modules that target_modules does not name, and the other way round."""
    if targets in (None, _ALL_LINEAR) or (targets == _NONE and not factors):
        return
    if isinstance(targets, str):
        stray = [module for module in factors if not _matches(targets, module)]
        idle = [] if factors else [targets]
    else:
        by_target = {t: [m for m in factors if f".{m}".endswith(f".{t}")] for t in targets}
        stray = [module for module in factors if not any(module in b for b in by_target.values())]
        idle = [target for target, modules in by_target.items() if not modules]
    if stray:
        raise CheckpointError(
            f"{file}: target_modules {targets!r:.80} does not name {stray[0]}, of which there are "
            "factors"
        )
    if idle:
        raise CheckpointError(
            f"{file}: target_modules names {idle[0]!r}, of which there are no factors"
        )


def fields(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, saved: list[str], base: str
) -> JsonObject:
    """Returns an adapter_config.json.

    Args:
        ranks: Module -> rank.
        alphas: Module -> alpha.
        saved: The modules of which all weights are stored.
        base: The base's path or name.
    """
    common = [collections.Counter(each.values()).most_common(1) for each in (ranks, alphas)]
    rank, alpha = (most[0][0] if most else 8 for most in common)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(m): each for m, each in ranks.items() if each != rank},
        "alpha_pattern": {re.escape(m): each for m, each in alphas.items() if each != alpha},
        "target_modules": sorted(ranks) or _NONE,
        "modules_to_save": sorted(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def write(
    out: AnyPath,
    config: Mapping[str, Json],
    arrays: Mapping[str, np.ndarray | TensorReader],
    *,
    made_by: Mapping[str, Json],
    parents: tuple[Mapping[str, str], ...],
) -> Manifest:
    """Writes an adapter's directory, whole or not at all, with a manifest of m2l's.

    Args:
        out: The directory; must not exist.
        config: The content of adapter_config.json.
        arrays: The tensors by PEFT's names.
        made_by: What made it.
        parents: {"role", "path", "digest"} of each checkpoint that it was made from.

    Raises:
        CheckpointError: `out` exists or cannot be made, or the disk is full.
    """
    if not isinstance(out, Path):
        with storage.local_output(out) as local:
            return write(local, config, arrays, made_by=made_by, parents=parents)
    described = {name: (tuple(a.shape), np.dtype(a.dtype)) for name, a in arrays.items()}
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in described.values())
    dtypes = {dtype.name for _, dtype in described.values()}
    with publishing(out, size + (1 << 20)) as temporary:
        temporary.mkdir(exist_ok=True)
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        shards = safetensors.plan_shards(described, size + 1)
        (layout,), _ = safetensors.lay_out(described, shards)
        file, digests = temporary / ADAPTER_WEIGHTS, {}
        reserve(file, layout.size, layout.header)
        for name, offset in layout.offsets.items():
            stored, array = StoredTensor(file, name, *described[name], offset), arrays[name]
            array = array if isinstance(array, np.ndarray) else read_whole(array)
            digests[name] = stored.extents.write_blocks([np.ascontiguousarray(array).reshape(-1)])
        manifest = Manifest(
            model={},
            vocabulary={"name": None, "size": None, "fingerprint": None},
            dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
            step=0,
            made_by=dict(made_by),
            parents=tuple(parents),
            parameters=array_records(described, digests),
        )
        return huggingface_directory.write(temporary, manifest, digests)


@functools.partial(jax.jit, compiler_options={"xla_cpu_multi_thread_eigen": False})
def _multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.dot(left, right, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _host() -> jax.Device | None:
    """Returns the device of the host's processors; None where JAX was told to have none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


class _Tiles:
    """The products of an adapter's factors, by tiles.

    Those of which a part is asked for stay in memory for whoever asks for the next.
    """

    def __init__(self) -> None:
        self._locks = threading.Lock(), threading.Lock()
        self._factors = functools.lru_cache(_MATRICES)(_padded)
        self._cached = functools.lru_cache(2)(self._compute)

    def __call__(
        self, factors: Factors, transposed: bool, row: int, column: int, whole: bool
    ) -> np.ndarray:
        """Returns the tile that begins at a row and a column, float32, padded with zeros."""
        if whole:
            return self._compute(factors, transposed, row, column)
        with self._locks[0]:
            return self._cached(factors, transposed, row, column)

    def _compute(self, factors: Factors, transposed: bool, row: int, column: int) -> np.ndarray:
        with self._locks[1]:
            left, right = self._factors(factors, transposed)
        with jax.default_device(_host()):
            return np.asarray(_multiply(left[row], right[column]))


def tile_shape(columns: int) -> tuple[int, int]:
    """Returns the rows and columns of a tile of a matrix of so many columns."""
    width = min(_COLUMNS, columns + -columns % _MULTIPLE)
    return max(1, _TILE // width // _ROWS) * _ROWS, width


def _padded(
    factors: Factors, transposed: bool
) -> tuple[dict[int, np.ndarray], dict[int, jax.Array]]:
    """Returns what `Factors.read` does, with zeros up to whole tiles, by where these begin."""
    left, right = factors.read(transposed)
    rows, columns = tile_shape(right.shape[1])
    left = np.pad(left, ((0, -len(left) % rows), (0, 0)))
    right = np.pad(right, ((0, 0), (0, -right.shape[1] % _MULTIPLE)))
    with jax.default_device(_host()):
        by_column = {
            start: jnp.asarray(right[:, start : start + columns])
            for start in range(0, right.shape[1], columns)
        }
    return {start: left[start : start + rows] for start in range(0, len(left), rows)}, by_column


def _cuts(part: slice, side: int) -> Iterator[tuple[int, slice, slice]]:
    """Yields for each tile that a part of an axis is in: its start, the place there and in all."""
    for start in range(part.start - part.start % side, part.stop, side):
        first, last = max(part.start, start), min(part.stop, start + side)
        yield (
            start,
            slice(first - start, last - start),
            slice(first - part.start, last - part.start),
        )


@dataclasses.dataclass(frozen=True)
class AdaptedTensor:
    """A matrix of the base plus the product of its factors, float32; a `TensorReader`."""

    base: TensorReader
    factors: Factors
    transposed: bool
    tiles: _Tiles

    dtype = np.dtype(np.float32)

    @property
    def name(self) -> str:
        """The base's."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's."""
        return tuple(self.base.shape)

    @property
    def size(self) -> int:
        """How many elements it has."""
        return self.base.size

    @property
    def chunk(self) -> tuple[int, ...] | None:
        """The boxes in which the base is stored."""
        return self.base.chunk

    def best_run(self, block: int) -> int:
        """Returns how many elements are best read at once, about `block`: those of whole tiles."""
        tiles = tile_shape(self.shape[1])[0] * self.shape[1]
        return block if tiles > _BLOCKS * block else tiles * max(1, block // tiles)

    @property
    def file(self) -> Path | None:
        """The base's file."""
        return getattr(self.base, "file", None)

    @property
    def memory(self) -> int:
        """The bytes that are in memory while it is read: of the base, factors and tiles."""
        factors = 4 * self.factors.rank * sum(self.shape)
        tile = 4 * math.prod(tile_shape(self.shape[1]))
        # What threads read at once may be more than their blocks.
        run = 12 * tile_shape(self.shape[1])[0] * self.shape[1]
        return getattr(self.base, "memory", 0) + (_MATRICES + 1) * factors + 5 * tile + run

    def read_span(self, span: Span, out: np.ndarray) -> None:
        """Reads a span into `out`, 1-D, contiguous, float32 and of the span's size."""
        block = out if self.base.dtype == self.dtype else np.empty(span.size, self.base.dtype)
        self.base.read_span(span, block)
        self.add_to(block, span, out)

    def add_to(self, block: np.ndarray, span: Span, out: np.ndarray) -> None:
        """Writes a span into `out`, as `read_span` does, of the base's elements of the span."""
        for index, first, last in self._boxes(span):
            box = _box(index, self.shape)
            shape = -1, box[1].stop - box[1].start
            self._add(*box, block[first:last].reshape(shape), out[first:last].reshape(shape))

    def _boxes(self, span: Span) -> Iterator[tuple[Index, int, int]]:
        """Yields the boxes that a span is made of: what each is of the matrix and of the span."""
        if span.index is not None:
            yield span.index, 0, span.size
            return
        for row in range(span.rows):
            start, place = span.start + row * span.stride, row * span.columns
            for index, first, last in run_indices(self.shape, start, start + span.columns):
                yield index, first - start + place, last - start + place

    def read_sample(self, span: Span, out: np.ndarray) -> None:
        """Reads as `read_span` does what is a small part of many tiles; the last bits may differ.

        No tile is computed for it.
        """
        left, right = self.factors.read(self.transposed)
        block = np.empty(span.size, self.base.dtype)
        self.base.read_span(span, block)
        out[:] = block
        for index, first, last in self._boxes(span):
            rows, columns = _box(index, self.shape)
            out[first:last] += (left[rows] @ right[:, columns]).reshape(-1)

    def _add(self, rows: slice, columns: slice, values: np.ndarray, out: np.ndarray) -> None:
        """Writes the sum of a box of the base and of the product into `out`, tile by tile."""
        height, width = tile_shape(self.shape[1])
        for row, tile_rows, box_rows in _cuts(rows, height):
            whole = tile_rows == slice(0, min(height, self.shape[0] - row))
            for column, tile_columns, box_columns in _cuts(columns, width):
                tile = self.tiles(self.factors, self.transposed, row, column, whole)
                place = box_rows, box_columns
                if values.dtype.name == "bfloat16":
                    # By its bits, which NumPy does several times as fast as the cast.
                    bits = values.view(np.uint16)[place]
                    np.left_shift(bits, np.uint32(16), out=out.view(np.uint32)[place])
                elif values is not out:
                    out[place] = values[place]
                out[place] += tile[tile_rows, tile_columns]


def _box(index: tuple[slice | int, ...], shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Returns the rows and columns that a box has of a matrix."""
    whole = [slice(0, length) for length in shape]
    for axis, each in enumerate(index):
        whole[axis] = each if isinstance(each, slice) else slice(each, each + 1)
    return whole[0], whole[1]

"""Experts as differences from their base: directories of a delta store, and what they restore.

A delta is the digest of a base and, for each parameter of an expert, an array of codes in zarr 3,
shuffled and compressed by zstd, with a CRC of each block. Its codes are of a kind:

- difference: of floating-point numbers as integers of their order, so that neighbours differ by 1,
  modulo 2^bits, sign last; of integers as they are. The expert is restored to the bit.
- whole: the bits of what the base does not have in that shape.
- ternary: 0, 1 and 2 for theta_base, plus a scalar, minus it (ComPEFT, arXiv:2311.13171).
- masked: 1 where a task vector that experts share is added, times a scalar (EMR-Merging,
  arXiv:2405.17461).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from m2l import files, storage
from m2l.checkpoints import digest, huggingface_directory, pytrees, zarr
from m2l.checkpoints.manifest import check_arrays
from m2l.checkpoints.pytrees import StoredArray
from m2l.checkpoints.spans import Span, TensorReader, read_whole
from m2l.checkpoints.tensor_kinds import DELTA_RECORD, is_float
from m2l.errors import CheckpointError
from m2l.files import checksum
from m2l.storage import AnyPath
from m2l.typing import Json, JsonObject

if TYPE_CHECKING:
    import tensorstore as ts

FORMAT_VERSION = 1
ARRAYS, FILES, SHARED = "arrays", "files", "shared"
LOSSLESS, COMPEFT, EMR = METHODS = ("lossless", "compeft", "emr")
DIFFERENCE, WHOLE, TERNARY, MASKED = "difference", "whole", "ternary", "masked"

_ADVICE = "copy the delta again or make it anew"
# Level 9 takes 20 times as long as 5 for 4 % of a difference, and a tenth of masks.
_CODECS = {DIFFERENCE: ("shuffle", 5), WHOLE: ("shuffle", 5)}
_CODECS |= {TERNARY: ("bitshuffle", 9), MASKED: ("bitshuffle", 9)}


def encode(base: np.ndarray | None, expert: np.ndarray) -> np.ndarray:
    """Returns the codes of a difference, unsigned integers of the expert's width.

    Args:
        base: The base's elements; None: the codes are the expert's bits.
        expert: The expert's, of the same shape.
    """
    words = _unsigned(expert.dtype)
    if base is None:
        return expert.view(words)
    difference = _ordered(expert) - _ordered(_cast(base, expert.dtype))
    signed = difference.view(f"i{words.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * words.itemsize - 1))).view(words)


def decode(base: np.ndarray | None, codes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the expert's elements, of a dtype, of the base's and the codes of `encode`."""
    if base is None:
        return codes.view(dtype)
    one = codes.dtype.type(1)
    result = (codes >> one) ^ (~(codes & one) + one)
    result += _ordered(_cast(base, dtype))
    if is_float(dtype):
        top = _top(codes.dtype)
        result = np.where(result & top, result ^ top, ~result)
    return result.view(dtype)


def changes(codes: np.ndarray, scale: float, unified: np.ndarray | None) -> np.ndarray:
    """Returns what "ternary" codes, or with a shared task vector "masked" ones, add: float32."""
    step = np.float32(scale)
    if unified is None:
        return np.array([0, step, -step, 0], np.float32)[codes & 3]
    return np.where(codes != 0, step * unified.astype(np.float32), np.float32(0))


def _unsigned(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def _top(words: np.dtype) -> np.unsignedinteger:
    return words.type(1 << (8 * words.itemsize - 1))


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype, copy=False)


def _ordered(array: np.ndarray) -> np.ndarray:
    """Returns unsigned integers in the order of the numbers; of integers their bits."""
    words = array.view(_unsigned(array.dtype))
    if not is_float(array.dtype):
        return words
    top = _top(words.dtype)
    return np.where(words & top, ~words, words | top)


@dataclasses.dataclass(frozen=True)
class RestoredTensor:
    """A parameter of an expert, of its base's and of what a delta has of it; a `TensorReader`.

    Attributes:
        name: Its name.
        dtype: The expert's; float32 where the expert is restored approximately.
        codes: Of a kind that the module's docstring describes.
        kind: Which.
        base: The base's parameter; None for "whole".
        digest: The 128 bits, in hex, that are recorded of the restored parameter.
        scale: The scalar of "ternary" and "masked".
        unified: The shared task vector of "masked".
    """

    name: str
    dtype: np.dtype
    codes: StoredArray
    kind: str
    base: TensorReader | None
    digest: str
    scale: float = 1.0
    unified: StoredArray | None = None

    file = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.codes.shape

    @property
    def size(self) -> int:
        """How many elements it has."""
        return self.codes.size

    @property
    def chunk(self) -> tuple[int, ...] | None:
        """The boxes in which the codes are stored."""
        return self.codes.chunk

    @property
    def memory(self) -> int:
        """The bytes that are in memory while it is read, besides a block: of base and codes."""
        chunk = math.prod(self.chunk or self.shape)
        arrays = (self.base, self.codes, self.unified)
        widths = sum(array.dtype.itemsize for array in arrays if array is not None)
        return getattr(self.base, "memory", 0) + 3 * chunk * (widths + self.dtype.itemsize)

    def read_span(self, span: Span, out: np.ndarray) -> None:
        """Reads a span into `out`, 1-D, contiguous, of the dtype and the span's size."""
        base = None if self.base is None else _read(self.base, span)
        codes = _read(self.codes, span)
        if self.kind in (DIFFERENCE, WHOLE):
            out[:] = decode(base, codes, self.dtype)
            return
        unified = None if self.unified is None else _read(self.unified, span)
        out[:] = base.astype(np.float32) + changes(codes, self.scale, unified)

    def read_checked(self) -> np.ndarray:
        """Reads it whole, in its shape.

        Raises:
            CheckpointError: A block is damaged, or the result does not have its digest.
        """
        array = read_whole(self)
        self.check(digest.to_hex(digest.of_numpy(array)))
        return array

    def check(self, actual: str) -> None:
        """Raises CheckpointError unless a digest, in hex, is the one that is recorded."""
        if actual != self.digest:
            raise CheckpointError(
                f"{self.codes.item}: {self.name}, restored, does not have the digest that is "
                f"recorded: the delta or its base is damaged; {_ADVICE}"
            )


def _read(tensor: TensorReader, span: Span) -> np.ndarray:
    elements = np.empty(span.size, tensor.dtype)
    tensor.read_span(span, elements)
    return elements


@dataclasses.dataclass(frozen=True)
class Delta:
    """A delta in a directory; its arrays are read when they are asked for.

    Attributes:
        path: The directory.
        method: "lossless", "compeft" or "emr".
        native: Whether names, layouts and files are Hugging Face's.
        base: {"path", "digest"} of the base.
        expert: The same of the expert.
        tensors: The expert's parameters, name -> {"shape", "dtype", "digest"}, as restored.
        kinds: Name -> the kind of its codes.
        copies: Name -> the parameter that it repeats.
        settings: Of the method: numbers by name; "scale" is the scalar.
        key: Of the inputs and options, the digest that decides what it is.
        error: How far what it restores is from the expert, as a share of the Frobenius norm of the
            task vector; 0 without loss.
        model: The expert's configuration.
        vocabulary: m2l's description of its vocabulary; None where it is not known.
        origin: {"step", "made_by", "parents"} of the expert's manifest; empty without one.
        unified: Where the task vector is that several experts share, and its digest; or None.
        nbytes: {"expert", "delta", "shared"}: bytes of the parameters, of the codes, and of what is
            shared.
    """

    path: AnyPath
    method: str
    native: bool
    base: Mapping[str, str]
    expert: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, Json]]
    kinds: Mapping[str, str]
    copies: Mapping[str, str]
    settings: Mapping[str, float]
    key: str
    error: float
    model: Mapping[str, Json]
    vocabulary: Mapping[str, Json] | None
    origin: Mapping[str, Json]
    unified: Mapping[str, str] | None
    nbytes: Mapping[str, int]

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of what it is: of the base's digest, codes and parameters."""
        content = self.to_json()
        for name in ("nbytes", "base", "expert", "key", "error"):
            del content[name]
        return checksum([content, self.base["digest"], self.expert["digest"]])

    @property
    def is_lossless(self) -> bool:
        """Whether base and delta are the expert, to the bit."""
        return self.method == LOSSLESS

    @property
    def files(self) -> AnyPath:
        """Where the expert's other files are: config.json, and those of the tokenizer."""
        return self.path / FILES

    @property
    def tokenizer(self) -> Path | None:
        """A local directory with the expert's tokenizer; None without any."""
        if not huggingface_directory.has_tokenizer(self.files):
            return None
        return huggingface_directory.local_tokenizer(self.files)

    @property
    def ratio(self) -> float:
        """How many times smaller than the expert it is, without what is shared."""
        return self.nbytes["expert"] / max(1, self.nbytes["delta"])

    def describe(self) -> str:
        """Returns what it is, as a line."""
        settings = ", ".join(f"{name} {value:.4g}" for name, value in self.settings.items())
        spelled = f" ({settings})" if settings else ""
        shared = f" and {self.nbytes['shared']:,} shared" if self.nbytes["shared"] else ""
        return (
            f"{self.method}{spelled}, {self.nbytes['delta']:,}{shared} bytes of "
            f"{self.nbytes['expert']:,}, of the base {self.base['path']}"
        )

    def to_json(self) -> JsonObject:
        """Returns its record as JSON values."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del content["path"]
        return {"format_version": FORMAT_VERSION, **content}

    def write(self) -> None:
        """Writes the record, last of all files."""
        files.write_record(self.path / DELTA_RECORD, self.to_json())

    def check_base(self, source: AnyPath, actual: str) -> None:
        """Raises CheckpointError unless a digest is that of the base that the delta is of."""
        if actual != self.base["digest"]:
            raise CheckpointError(
                f"{self.path}: it is a delta of the base with the digest "
                f"{self.base['digest'][:16]} ({self.base['path']}), and {source} has "
                f"{actual[:16]}: name that base"
            )

    def apply(self, base: Mapping[str, TensorReader]) -> dict[str, TensorReader]:
        """Returns the expert's parameters of those of the base.

        Raises:
            CheckpointError: An array is missing or damaged.
        """
        names = [name for name in self.tensors if name not in self.copies]
        masked = [name for name in names if self.kinds[name] == MASKED]
        shared = {} if self.unified is None else _open(self._shared(), masked)
        result: dict[str, TensorReader] = {}
        for name, codes in _open(self.path / ARRAYS, names).items():
            record, kind = self.tensors[name], self.kinds[name]
            stored = None if kind == WHOLE else base.get(name)
            dtype = np.dtype(getattr(ml_dtypes, record["dtype"], record["dtype"]))
            words = _unsigned(dtype) if kind in (DIFFERENCE, WHOLE) else np.dtype(np.uint8)
            shapes = [tuple(array.shape) for array in (stored, codes) if array is not None]
            if (
                {*shapes} != {tuple(record["shape"])}
                or codes.dtype != words
                or (stored is None) != (kind == WHOLE)
                or (kind == MASKED and name not in shared)
            ):
                raise CheckpointError(
                    f"{self.path}: {name} is not stored as {DELTA_RECORD} says; {_ADVICE}"
                )
            scale, unified = self.settings.get("scale", 1.0), shared.get(name)
            result[name] = RestoredTensor(
                name, dtype, codes, kind, stored, record["digest"], scale, unified
            )
        repeated = {
            name: dataclasses.replace(result[original], name=name)
            for name, original in self.copies.items()
        }
        return {name: repeated.get(name) or result[name] for name in self.tensors}

    def _shared(self) -> AnyPath:
        place = self.path.parent / self.unified["path"]
        record = place / DELTA_RECORD
        content = files.read_record(record, error=CheckpointError, advice=_ADVICE)
        if content.get("digest") != self.unified["digest"]:
            raise CheckpointError(
                f"{record}: it is not the task vector that {self.path} is of; {_ADVICE}"
            )
        return place / ARRAYS


def is_delta(path: AnyPath) -> bool:
    """Returns whether a directory is a delta."""
    return (path / DELTA_RECORD).is_file()


def read(path: AnyPath) -> Delta:
    """Opens a delta; nothing but its record is read yet.

    Raises:
        CheckpointError: It is missing, damaged, or of a newer m2l.
    """
    file = path / DELTA_RECORD
    content = files.read_record(file, error=CheckpointError, advice=_ADVICE)
    version = content.pop("format_version", None)
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: written in format {version} by a newer m2l; this one reads up to "
            f"{FORMAT_VERSION}: upgrade m2l"
        )
    fields = {field.name for field in dataclasses.fields(Delta)} - {"path"}
    if version != FORMAT_VERSION or set(content) != fields:
        part = "the task vector that several deltas share" if "digest" in content else "damaged"
        raise CheckpointError(f"{file}: no delta of an expert: {part}")
    _check(file, content)
    delta = Delta(path, **content)
    if delta.native and not (delta.files / huggingface_directory.CONFIG).is_file() and delta.model:
        raise CheckpointError(f"{delta.files / huggingface_directory.CONFIG}: missing; {_ADVICE}")
    return delta


def _check(file: AnyPath, content: Mapping[str, Json]) -> None:
    """Raises CheckpointError, with the first field of a record that is not what it has to be."""
    tensors, copies = content["tensors"], content["copies"]
    dicts = ("base", "expert", "tensors", "kinds", "copies", "settings", "model", "origin")
    problem = next((n for n in (*dicts, "nbytes") if not isinstance(content[n], dict)), None)
    if problem is None:
        check_arrays(f"{file}: tensors", tensors)
        unified, shared = content["unified"], {"path", "digest"}
        is_right = {
            "method": content["method"] in METHODS,
            "base": _are_texts(content["base"], shared),
            "expert": _are_texts(content["expert"], shared),
            "copies": all(a in tensors and b in tensors for a, b in copies.items())
            and not {*copies.values()} & {*copies},
            "kinds": {*content["kinds"]} == {*tensors} - {*copies}
            and all(kind in _CODECS for kind in content["kinds"].values()),
            "settings": all(type(v) in (int, float) for v in content["settings"].values()),
            "unified": unified is None
            or (_are_texts(unified, shared) and unified["path"] == SHARED),
            "nbytes": {*content["nbytes"]} == {"expert", "delta", "shared"}
            and all(type(count) is int for count in content["nbytes"].values()),
            "error": type(content["error"]) in (int, float),
            "vocabulary": isinstance(content["vocabulary"], dict | None),
        }
        problem = next((name for name, right in is_right.items() if not right), None)
    if problem is not None:
        raise CheckpointError(f"{file}: damaged: {problem} is {content[problem]!r:.60}; {_ADVICE}")


def _are_texts(value: Json, names: set[str]) -> bool:
    texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    return texts and {*value} == names


def folder(name: str) -> str:
    """Returns the name of the folder of a parameter's codes."""
    return name.replace("/", ".")


def _open(item: AnyPath, names: list[str]) -> dict[str, StoredArray]:
    return pytrees.open_arrays(item, {name: folder(name) for name in names})


def create(
    item: AnyPath,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    chunk: tuple[int, ...],
    kind: str,
) -> "ts.TensorStore":
    """Creates an array of codes of a kind, or of a task vector ("whole"), for writing."""
    import tensorstore as ts

    metadata = zarr.metadata(shape, np.dtype(dtype).name, chunk)
    shuffle, level = _CODECS[kind]
    blosc = {"cname": "zstd", "clevel": level, "shuffle": shuffle, "blocksize": 0}
    blosc["typesize"] = np.dtype(dtype).itemsize
    metadata["codecs"] += [{"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]
    spec = {
        "driver": "zarr3",
        "kvstore": storage.kvstore_spec(item / folder(name)),
        "metadata": metadata,
        # A block of zeros is stored, so that one that is missing is seen.
        "store_data_equal_to_fill_value": True,
    }
    try:
        return ts.open(spec, create=True, open=True).result()
    except ValueError as error:
        raise CheckpointError(f"{item}: {name} cannot be written ({error})") from error

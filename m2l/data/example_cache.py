"""Examples to evaluate by, stored as they were made: read again without their source.

A file of m2l's cache holds a task's examples: a line of JSON, then arrays that are mapped into
memory. It is named by the digest of what decides them. A damaged one is made again.
"""

import functools
import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from m2l import files, storage
from m2l.data.text_tasks import TextTask
from m2l.data.vocabularies import Vocabulary, settings
from m2l.typing import Json, JsonObject

# Of the files: another format has another name.
_VERSION = 1
# How the arrays' elements are stored, in this order; each begins at a multiple of eight bytes.
_COLUMNS = {"ids": "<i4", "sizes": "<i4", "counts": "<i4", "flags": "<i4", "text_sizes": "<i4"}
_TEXT = "text"

# An example's sequences of ids, its texts, and two numbers: those that tell examples' kinds apart
# are their classes' matter.
Stored = tuple[list[np.ndarray], list[str], tuple[int, int]]


@functools.cache
def code_digest() -> str:
    """Returns the SHA-256 of the modules that make examples, and that generate the microworld."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, files.microworld_pieces().parents[1]):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def path(task: TextTask, split: str, **selection: Json) -> Path | None:
    """Returns the file of a task's examples; None where nothing tells whether it is stale.

    That is so of records that come from the network, and of functions that are not m2l's own.

    Args:
        task: The task.
        split: The split that they are of.
        selection: Which of its records, and how long they may be.
    """
    origin = task.records.origin(split)
    if origin is None or task.dataset is None or not _is_declarative(task):
        return None
    key = {
        "version": _VERSION,
        "code": code_digest(),
        "task": task.name,
        "declared": [repr(task.prompt), repr(task.dataset.fields), repr(task.dataset.splits)],
        "records": [origin, task.dataset.name, split],
        "vocabularies": [_identity(task.inputs), _identity(task.targets)],
        **selection,
    }
    return files.cache_directory() / "examples" / files.checksum(key)


def _is_declarative(task: TextTask) -> bool:
    functions = (task.dataset.derive, task.dataset.keep, task.dataset.complaint)
    return all(f is None or f.__module__.startswith("m2l.") for f in functions)


def _identity(vocabulary: Vocabulary) -> list[Json]:
    template = vocabulary.chat_template
    return [
        *(type(vocabulary).__name__, vocabulary.files.fingerprint),
        *(template and template.source, settings(vocabulary)),
    ]


def write(file: Path, examples: Sequence[Stored], about: JsonObject) -> None:
    """Writes examples, whole or not at all; what cannot be stored is made again.

    Args:
        file: From `path`.
        examples: The examples.
        about: What else is to be read again, as JSON values.
    """
    sequences = [ids for example in examples for ids in example[0]]
    texts = [text.encode(errors="surrogatepass") for example in examples for text in example[1]]
    columns = {
        "ids": np.concatenate([np.empty(0, np.int32), *sequences]),
        "sizes": [len(ids) for ids in sequences],
        "counts": [(len(ids), len(texts)) for ids, texts, _ in examples],
        "flags": [flags for _, _, flags in examples],
        "text_sizes": [len(text) for text in texts],
    }
    arrays = {name: np.asarray(columns[name], of).tobytes() for name, of in _COLUMNS.items()}
    arrays[_TEXT] = b"".join(texts)
    body = b"".join(_padded(content) for content in arrays.values())
    header = {
        "sizes": {name: len(content) for name, content in arrays.items()},
        "sha256": hashlib.sha256(body).hexdigest(),
        "about": about,
    }
    line = json.dumps(header, sort_keys=True).encode()
    # The body begins at a multiple of eight bytes.
    line = line.ljust(-(-(len(line) + 1) // 8) * 8 - 1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(file, line + b"\n" + body)
    except OSError:
        return


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 8)


def read(file: Path) -> tuple[list[Stored], JsonObject] | None:
    """Returns the examples of a file, mapped into memory, and what was stored with them.

    Returns:
        None if it is not there, or is damaged.
    """
    try:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        start = mapped.find(b"\n") + 1
        header = json.loads(mapped[:start])
        if hashlib.sha256(memoryview(mapped)[start:]).hexdigest() != header["sha256"]:
            return None
        return list(_examples(mapped, start, header["sizes"])), header["about"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _examples(mapped: mmap.mmap, start: int, sizes: Mapping[str, int]) -> Iterator[Stored]:
    arrays: dict[str, np.ndarray] = {}
    for name, of in {**_COLUMNS, _TEXT: "u1"}.items():
        width = np.dtype(of).itemsize
        arrays[name] = np.frombuffer(mapped, of, sizes[name] // width, start)
        start += -(-sizes[name] // 8) * 8
    ids = iter(np.split(arrays["ids"], np.cumsum(arrays["sizes"])[:-1]))
    ends = np.cumsum(arrays["text_sizes"], dtype=np.int64).tolist()
    text = arrays[_TEXT].tobytes()
    texts = (
        text[first:last].decode(errors="surrogatepass")
        for first, last in zip([0, *ends], ends, strict=False)
    )
    counts, flags = arrays["counts"].reshape(-1, 2), arrays["flags"].reshape(-1, 2)
    for (sequences, strings), (one, other) in zip(counts.tolist(), flags.tolist(), strict=True):
        example_ids = [next(ids) for _ in range(sequences)]
        yield example_ids, [next(texts) for _ in range(strings)], (one, other)

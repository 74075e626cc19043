"""A Hugging Face directory: its tensors, description, card and other files, and its manifest."""

import dataclasses
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from m2l import files, storage
from m2l.checkpoints import model_fields, safetensors, tensor_kinds
from m2l.checkpoints.manifest import FILE_NAME, Manifest, check_arrays, is_file_digests
from m2l.checkpoints.model_fields import read_json
from m2l.checkpoints.publishing import UNFINISHED
from m2l.checkpoints.safetensors import StoredTensor
from m2l.checkpoints.spans import in_parallel
from m2l.checkpoints.tokenizer import digests, is_bytes
from m2l.errors import CheckpointError
from m2l.files import GENERATION, TOKENIZER_FILES, cache_directory, checksum, sha256
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json, JsonObject

CONFIG = "config.json"

# Read next to what decides the ids, TOKENIZER_FILES.
_TOKENIZER_PARTS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.*", "additional_chat_templates/*.jinja", "normalizer.json", "emoji.json",
)  # fmt: skip
_PROCESSORS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json", "feature_extractor_config.json", "audio_tokenizer_config.json",
)  # fmt: skip
_OTHERS = (
    "generation_config.json", "modules.json", "sentence_bert_config.json", "*/config.json",
    "config_sentence_transformers.json", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def open_directory(
    path: Path, *, allowed: Collection[str] = ()
) -> tuple[dict[str, StoredTensor], JsonObject]:
    """Opens a directory, or a .safetensors file in one; nothing but headers is read yet.

    Args:
        path: The directory or file.
        allowed: Fields of config.json that are not to be refused for what they say.

    Returns:
        The tensors by name, and the content of config.json; empty where there is none.

    Raises:
        CheckpointError: A file is missing or damaged; or it is an adapter, its weights are
            quantised, its description is absurd, or contradicts its tensors.
    """
    tensor_kinds.check_no_adapter(path)
    tensors = open_tensors(path)
    file = (path if path.is_dir() else path.parent) / CONFIG
    config = read_json(file) if file.is_file() else {}
    if (problem := model_fields.implausible(config)) is not None:
        raise CheckpointError(f"{file}: {problem}")
    tensor_kinds.check_no_adapter(path, tensors)
    described = {name: value for name, value in config.items() if name not in allowed}
    tensor_kinds.check_not_quantized(path, described, tensors)
    if "tie_word_embeddings" not in allowed:
        tensor_kinds.check_ties(path, config, tensors)
    return tensors, config


def copy_companions(sources: Sequence[Path], out: Path, tokenizer: Path | None = None) -> None:
    """Copies what belongs to a model next to its weights and config.json.

    The files are the first source's. A tokenizer or a processor that it has not is the first of
    the others' that has one. Python files are copied unread: transformers runs them only with
    trust_remote_code=True, and a line on stderr says so.

    Args:
        sources: Hugging Face directories, or files in them.
        out: The directory to copy into.
        tokenizer: The directory of the tokenizer, where it is not to be a source's.
    """
    directories = [source if source.is_dir() else source.parent for source in sources]
    copied: list[Path] = []
    own = [] if tokenizer is None else [tokenizer]
    for main, parts in ((TOKENIZER_FILES, _TOKENIZER_PARTS), (_PROCESSORS, ())):
        for directory in [*own, *directories] if parts else directories:
            if any(_matching(directory, main)) or (parts and has_tokenizer(directory)):
                copied += _copy(directory, (*main, *parts), out)
                break
        else:
            copied += _copy(directories[0], parts, out)
    copied += _copy(directories[0], _OTHERS, out)
    if code := sorted(str(name) for name in copied if name.suffix == ".py"):
        print(
            f"m2l: copied {', '.join(code)}: code that transformers runs only with "
            "trust_remote_code=True; m2l has not run it",
            file=sys.stderr,
        )


def has_tokenizer(directory: Path) -> bool:
    """Returns whether a directory has a tokenizer of any kind."""
    return any(_matching(directory, TOKENIZER_FILES)) or is_bytes(directory)


def local_tokenizer(directory: AnyPath) -> Path:
    """Returns a local directory with a directory's tokenizer, for libraries that read files alone.

    What is in a bucket is copied into m2l's cache, by its content.
    """
    if isinstance(directory, Path):
        return directory
    files = {file.name: file.read_bytes() for file in tokenizer_files(directory)}
    copy = cache_directory() / "tokenizers" / checksum(digests(files))
    for name, data in files.items():
        copy.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(copy / name, data)
    return copy


def tokenizer_files(directory: AnyPath) -> Iterator[AnyPath]:
    """Yields the files of a directory's tokenizer, and the model's own settings of its ends."""
    for file in _matching(directory, (*TOKENIZER_FILES, *_TOKENIZER_PARTS, GENERATION, CONFIG)):
        if file.parent == directory:
            yield file


def _matching(directory: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from (file for file in sorted(directory.glob(pattern)) if file.is_file())


def _copy(directory: Path, patterns: Sequence[str], out: Path) -> list[Path]:
    names = dict.fromkeys(file.relative_to(directory) for file in _matching(directory, patterns))
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes((directory / name).read_bytes())
    return list(names)


def config_of(sources: Sequence[Mapping[str, Json]]) -> JsonObject:
    """Returns the first description that says anything."""
    return dict(next((config for config in sources if config), {}))


MANIFEST = f"m2l_{FILE_NAME}"
_NOT_RECORDED = ("README.md", MANIFEST, UNFINISHED)
_ADVICE = (
    f"if it was changed on purpose (trained further, edited), delete {MANIFEST}; else copy or "
    "make the directory again"
)


def write(directory: Path, manifest: Manifest, digests: Mapping[str, str]) -> Manifest:
    """Writes m2l_manifest.json, once all other files of a Hugging Face directory are written.

    Args:
        directory: The directory.
        manifest: What it is, without `directory`.
        digests: SHA-256 of each tensor's bytes as they are stored, by Hugging Face's name.

    Returns:
        The manifest with {"tensors": name -> {"shape", "dtype", "digest"}, "files": name ->
        SHA-256 of each other file} as its `directory`.
    """
    tensors = {
        name: {"shape": list(t.shape), "dtype": t.dtype.name, "digest": digests[name]}
        for name, t in safetensors.open_tensors(directory).items()
    }
    recorded = {
        file.name: _sha256(file)
        for file in sorted(directory.iterdir())
        if file.is_file() and file.suffix != ".safetensors" and file.name not in _NOT_RECORDED
    }
    manifest = dataclasses.replace(manifest, directory={"tensors": tensors, "files": recorded})
    manifest.write(directory, MANIFEST)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Reads m2l_manifest.json of a directory.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    manifest = Manifest.read(directory, MANIFEST)
    if (recorded := manifest.directory) is not None:
        file = directory / MANIFEST
        tensors, other = recorded.get("tensors"), recorded.get("files")
        if not isinstance(tensors, dict) or not is_file_digests(other):
            raise CheckpointError(f"{file}: damaged: directory has no tensors and files")
        check_arrays(f"{file}: tensors", tensors)
    return manifest


def open_tensors(path: PathLike) -> dict[str, StoredTensor]:
    """Opens the tensors of a .safetensors file or a directory, as `safetensors.open_tensors` does.

    Where m2l wrote the directory, its files are compared with their digests, and the tensors carry
    theirs, for whoever reads them to check.

    Raises:
        CheckpointError: As there; or names, shapes, dtypes or files are not those that were
            recorded.
    """
    path = storage.path(path)
    stored = safetensors.open_tensors(path)
    directory = path if path.is_dir() else path.parent
    if not (directory / MANIFEST).is_file():
        return stored
    recorded = read_manifest(directory).directory
    if recorded is None:  # written by an older m2l
        return stored
    tensors = recorded["tensors"]
    missing = [name for name in tensors if name not in stored] if path.is_dir() else []
    for name in [*stored, *missing]:
        tensor = stored.get(name)
        actual = "missing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
        record = tensors.get(name)
        expected = "none" if record is None else f"{record['dtype']}{record['shape']}"
        if actual != expected:
            raise CheckpointError(
                f"{path}: {name} is {actual}, {MANIFEST} records {expected}; {_ADVICE}"
            )
    for name, digest in recorded["files"].items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, {MANIFEST} records it; {_ADVICE}")
        if _sha256(file) != digest:
            raise CheckpointError(
                f"{file}: its digest is not the one that {MANIFEST} records; {_ADVICE}"
            )
    return {
        name: dataclasses.replace(tensor, digest=tensors[name]["digest"])
        for name, tensor in stored.items()
    }


def verify(directory: Path) -> Manifest:
    """Computes every digest of a Hugging Face directory that m2l wrote.

    Raises:
        CheckpointError: Naming the first tensor or file that is missing or damaged; or the
            directory was written by an m2l that did not record digests as stored.
    """
    manifest = read_manifest(directory)
    if manifest.directory is None:
        raise CheckpointError(
            f"{directory / MANIFEST}: written by an older m2l, without the digests of what is "
            "stored; make the directory again to be able to verify it"
        )
    in_parallel(StoredTensor.read_checked, open_tensors(directory).values())
    return manifest


def _sha256(file: AnyPath) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error


_SHOWN = {"merge": "merged", "train": "trained", "convert": "converted"}


def write_card(
    directory: Path,
    name: str,
    model_type: str,
    manifest: Manifest,
    dtype: str,
    *,
    generates: bool | None,
    results: Sequence[Path] = (),
) -> None:
    """Writes README.md.

    Args:
        directory: Where.
        name: What the model is called.
        model_type: The kind of model, as config.json calls it.
        manifest: What it was made by and from.
        dtype: Of its weights here.
        generates: Whether it is a decoder alone; None if that is not known.
        results: JSON files of `m2l eval`.

    Raises:
        CheckpointError: A result cannot be read, or is another model's.
    """
    count = sum(math.prod(record["shape"]) for record in manifest.parameters.values())
    made_by = dict(manifest.made_by)
    kind = made_by.pop("kind", None)
    made_by.pop("config", None)
    if "tokens" in made_by:
        made_by["tokens"] = {k: v for k, v in made_by["tokens"].items() if k != "names"}
    tasks = {True: "text-generation", False: "text2text-generation"}
    pipeline = [f"pipeline_tag: {tasks[generates]}"] if generates is not None else []
    tags = ["m2l", *([kind] if kind in ("merge", "moe") else [])]
    lines = [
        "---",
        "library_name: transformers",
        *pipeline,
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {name}",
        "",
        f"A {model_type} model of {count:,} parameters in {dtype}, "
        f"{_SHOWN.get(kind, 'made')} with m2l {manifest.versions.get('m2l', '')}".rstrip()
        + ".",
        f"Its digest is `{manifest.digest}`; m2l_manifest.json holds that of each parameter.",
        "",
        "## How it was made",
        "",
        *_table(("setting", "value"), _settings(made_by)),
    ]
    if manifest.parents:
        rows = [(p["role"], p["path"], f"`{p['digest'][:16]}`") for p in manifest.parents]
        lines += ["", "## What it was made from", "", *_table(("role", "path", "digest"), rows)]
    if results:
        rows = [_result(file, manifest.digest) for file in results]
        columns = ("task", "dataset", "held out", "metric", "score (%)", "examples")
        lines += ["", "## Results", "", *_table(columns, sorted(rows))]
    (directory / "README.md").write_text("\n".join(lines) + "\n")


def _settings(values: Mapping[str, Json], prefix: str = "") -> list[tuple[str, str]]:
    """Returns nested settings as rows, named as in "recipe.method"."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _settings(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return rows


def _result(file: Path, digest: str) -> tuple[str, ...]:
    advice = "evaluate again"
    result = files.read_record(
        file, required=False, finite=True, error=CheckpointError, advice=advice
    )
    try:
        if result["model_digest"] != digest:
            raise CheckpointError(
                f"{file}: a result of another model: expected the digest {digest[:16]}, found "
                f"{str(result['model_digest'])[:16]}"
            )
        held_out = "yes" if result["held_out"] else "no"
        names = result["task"], result["dataset"], held_out, result["metric"]
        if not all(isinstance(name, str) for name in names) or not 0 <= result["score"] <= 100:
            raise ValueError
        return (*names, f"{result['score']:.2f}", f"{result['count']:,}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: no result of m2l eval") from error


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

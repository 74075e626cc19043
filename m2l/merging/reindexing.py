"""Models whose vocabularies differ, re-indexed by one tokenizer so that any method merges them.

For a token that a model lacks its rows are those of the base or, where the base lacks it as well,
of the only model that has it, or else the average of those that have it: as mergekit does it
(github.com/arcee-ai/mergekit, PermutedEmbeddings), so that a task vector is 0 where a model has
nothing to say. A row that is no token's stays the model's own where it is no token's there either;
other padding is the mean of the model's rows (Hewitt 2021, Initializing New Word Embeddings).
"""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from m2l import storage
from m2l.checkpoints import tensor_kinds, tokenizer
from m2l.checkpoints.opening import Checkpoint
from m2l.checkpoints.spans import TensorReader
from m2l.errors import MergeError
from m2l.files import TOKENIZER_SETTINGS, cache_directory, checksum, split_name
from m2l.merging.recipe import AUTO, BASE, UNION, TokenizerChoice, TokenSource, is_model
from m2l.merging.recipe import ZERO as ZERO_SOURCE
from m2l.merging.token_rows import AVERAGE, MEAN, ZERO, RowMap, RowTensor, rows_at_hand
from m2l.typing import Json, JsonObject

if TYPE_CHECKING:
    from m2l.data.token_tables import TokenTable

_TEMPLATE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class Reindexed:
    """Models with one vocabulary.

    Attributes:
        models: The models, in their order.
        statistics: The experts' statistics.
        files: The model whose tokenizer it is, or is extended: whose config.json and other files
            the result gets.
        report: What was done, by token, as JSON-like data.
    """

    models: list[Checkpoint]
    statistics: list[Checkpoint]
    files: Checkpoint
    report: JsonObject


def reindexed(
    models: Sequence[Checkpoint],
    statistics: Sequence[Checkpoint],
    choice: TokenizerChoice,
    *,
    has_base: bool,
    described: bool,
    allowed: Collection[str] = (),
) -> Reindexed:
    """Gives models one vocabulary; of their tensors nothing is read yet.

    Args:
        models: The base, if there is one, and the experts.
        statistics: Of the last of the models, if the method needs them: 0 for tokens that these
            lack.
        choice: Which tokenizer, and what its tokens' rows are.
        has_base: Whether the first is the base.
        described: Whether a checkpoint of m2l's is made, which describes its vocabulary.
        allowed: Where "tokenizer" is among them, special tokens may get lost.

    Raises:
        MergeError: A model has no tokenizer or embedding, or a source is none; a special token
            would be lost.
        DataError: Tokenizers are damaged, of unlike kinds, or cannot be extended.
    """
    from m2l.data import token_tables, tokenizer_files

    names = [BASE] * has_base + [f"expert_{n}" for n in range(len(models) - has_base)]
    directories = [_tokenizer(model) for model in models]
    tables = token_tables.read(directories)
    sizes = [_embedding_rows(model) for model in models]
    present = [table.below(size) for table, size in zip(tables, sizes, strict=True)]
    chosen = 0 if choice.source == UNION else _place(choice.source, names)
    additional = present[1:] if choice.source == UNION else []
    more = [t for t, _ in choice.tokens if not any(t in table.ids for table in additional)]
    changed, ids = token_tables.extended(tables[chosen], additional, more)
    lost = _lost(present, ids)
    if "tokenizer" not in allowed:
        _refuse_lost_special(models, tables, lost, models[chosen])
    highest = max(ids.values(), default=-1) + 1
    size = -(-max(highest, sizes[chosen]) // choice.pad_to) * choice.pad_to
    named = np.zeros(size, bool)
    named[list(ids.values())] = True
    own = np.stack([_own_rows(table.ids, ids, size) for table in present])
    defaults = _defaults(own, named, has_base)
    forced = np.zeros(size, bool)
    for token, source in choice.tokens:
        forced[ids[token]] = source.force
        place, row = _source(source, token, models, names, present, sizes)
        defaults.models[ids[token]], defaults.places[ids[token]] = place, row
    if choice.chat_template is not None:
        changed |= _template(choice.chat_template, directories, names, directories[chosen], changed)
    directory, identity = _written(directories[chosen], changed)
    vocabulary = None
    if described:
        prefix = split_name((models[chosen].vocabulary or {}).get("name") or "")[0]
        vocabulary = tokenizer_files.describe(f"{prefix}{directory}")
    spare = [
        ~named & _unnamed(table.ids, count, size)
        for table, count in zip(tables, sizes, strict=True)
    ]
    places = [
        np.where(free, np.arange(size), np.where(forced, -1, row)).astype(np.int32)
        for free, row in zip(spare, own, strict=True)
    ]
    maps = [_with_defaults(row, model, defaults) for model, row in enumerate(places)]
    donors = functools.cache(lambda place, name: _donor(models[place], name))
    result = [
        _with_rows(model, sizes[place], maps[place], place, identity, donors, models)
        for place, model in enumerate(models)
    ]
    fields = {"vocabulary": vocabulary, "tokenizer": directory}
    result = [dataclasses.replace(model, **fields) for model in result]
    for model, each in zip(result, models, strict=True):
        # As before; finding out would read all rows twice.
        model.__dict__["copies"] = each.copies
    zeros = dataclasses.replace(defaults, models=np.full(size, ZERO, np.int16))
    first = len(models) - len(statistics)
    counted = [
        _with_rows(source, sizes[place], _with_defaults(places[place], 0, zeros), 0, identity,
                   functools.cache(lambda _, name, source=source: _donor(source, name)), ())
        for place, source in enumerate(statistics, first)
    ]  # fmt: skip
    report = _report(choice, names, ids, tables[chosen].ids, maps, defaults, own, lost)
    return Reindexed(result, counted, result[chosen], report)


def _tokenizer(model: Checkpoint) -> Path:
    """Returns a local directory with a model's tokenizer."""
    if model.tokenizer is not None:
        return model.tokenizer
    name = (model.vocabulary or {}).get("name")
    if name is not None and Path(split_name(name)[1]).is_dir():
        return Path(split_name(name)[1])
    if name is not None:
        folder = cache_directory() / "tokenizers" / f"{name}-{model.vocabulary['size']}"
        folder.mkdir(parents=True, exist_ok=True)
        if tokenizer.write_shipped(model.vocabulary, folder):
            return folder
    raise MergeError(f"{model.path}: it has no tokenizer, and --tokenizer needs each model's")


def _embedding_rows(model: Checkpoint) -> int:
    count = tensor_kinds.embedding_rows(model.parameters)
    if count is None:
        raise MergeError(
            f"{model.path}: no tensor is a language model's embedding by its name, and --tokenizer "
            "re-indexes its rows"
        )
    return count


def _place(name: str, names: Sequence[str]) -> int:
    """Returns the place of a model that is called "base", the first one where there is none."""
    if name not in names and name != BASE:
        raise MergeError(f"tokenizer: there is no {name}; the models are {', '.join(names)}")
    return 0 if name == BASE else list(names).index(name)


def _lost(tables: Sequence["TokenTable"], ids: Mapping[str, int]) -> dict[str, int]:
    """Returns the tokens of models that the result's tokenizer lacks, and the first that has it."""
    lost: dict[str, int] = {}
    for place, table in enumerate(tables):
        for token in table.ids:
            if token not in ids:
                lost.setdefault(token, place)
    return lost


def _refuse_lost_special(
    models: Sequence[Checkpoint],
    tables: Sequence["TokenTable"],
    lost: Mapping[str, int],
    chosen: Checkpoint,
) -> None:
    for token, place in lost.items():
        if (role := tables[place].special.get(token)) is not None:
            raise MergeError(
                f"{models[place].path}: its {role.replace('_', ' ')} {token!r} is not in the "
                f"tokenizer of {chosen.path}, which the result gets: --tokenizer union has all, "
                "and --allow_differences tokenizer lets it go"
            )


def _own_rows(own_ids: Mapping[str, int], ids: Mapping[str, int], size: int) -> np.ndarray:
    """Returns a model's row of each of the result's tokens, -1 where it has none; int32 [size]."""
    rows = np.full(size, -1, np.int32)
    places = np.fromiter((own_ids.get(token, -1) for token in ids), np.int32, len(ids))
    rows[np.fromiter(ids.values(), np.int64, len(ids))] = places
    return rows


def _defaults(own: np.ndarray, named: np.ndarray, has_base: bool) -> RowMap:
    """Returns what rows are in models that lack the token.

    Args:
        own: Each model's row of each token, -1 where it has none, [models, rows].
        named: Which rows are tokens'.
        has_base: Whether the first is the base.
    """
    has = own >= 0
    count = has.sum(0)
    models = np.where(named, np.int16(AVERAGE), np.int16(MEAN))
    models[named & (count == 0)] = ZERO
    models[count == 1] = has.argmax(0)[count == 1]
    if has_base:
        models[has[0]] = 0
    places = np.take_along_axis(own, np.maximum(models, 0)[None].astype(np.int64), 0)[0]
    averaged = np.flatnonzero(models == AVERAGE)
    places[averaged] = np.arange(len(averaged))
    return RowMap(models, places, np.ascontiguousarray(own[:, averaged].T), named)


def _with_defaults(own: np.ndarray, model: int, defaults: RowMap) -> RowMap:
    """Returns what a model's rows are: its own where it has them, -1 being none."""
    has = own >= 0
    models = np.where(has, np.int16(model), defaults.models)
    return dataclasses.replace(defaults, models=models, places=np.where(has, own, defaults.places))


def _source(
    source: TokenSource,
    token: str,
    models: Sequence[Checkpoint],
    names: Sequence[str],
    tables: Sequence["TokenTable"],
    sizes: Sequence[int],
) -> tuple[int, int]:
    """Returns the model that a token's rows are taken from, or ZERO, and which row."""
    if source.source == ZERO_SOURCE:
        return ZERO, 0
    place, text = _place(source.source, names), source.token
    text = token if text is None else text
    row = text if isinstance(text, int) else tables[place].ids.get(text)
    if row is None or not 0 <= row < sizes[place]:
        raise MergeError(f"{models[place].path}: it has no row of the token {text!r}")
    return place, row


def _unnamed(ids: Mapping[str, int], rows: int, size: int) -> np.ndarray:
    """Returns which of a model's rows are no token's, bool [size]."""
    free = np.arange(size) < rows
    used = np.array([index for index in ids.values() if index < size], np.int64)
    free[used] = False
    return free


def _donor(model: Checkpoint, name: str) -> TensorReader | None:
    name = model.copies.get(name, name)
    tensor = model.parameters.get(name)
    return None if tensor is None else rows_at_hand(tensor)


def _with_rows(
    model: Checkpoint,
    rows: int,
    row_map: RowMap,
    place: int,
    identity: str,
    donors: Callable[[int, str], TensorReader | None],
    sources: Sequence[Checkpoint],
) -> Checkpoint:
    """Returns a model with its tensors of tokens re-indexed.

    Args:
        model: The model.
        rows: How many rows its embedding has.
        row_map: What its new rows are.
        place: Its place in the map.
        identity: Of the tokenizer.
        donors: Returns a model's tensor by its place and the name.
        sources: The models, by their place.
    """
    used = {int(each) for each in np.unique(row_map.models) if each >= 0}
    if (row_map.models == AVERAGE).any():
        used |= {int(each) for each in np.flatnonzero((row_map.averages >= 0).any(0))}
    same = row_map.size == rows and bool((row_map.models == place).all())
    same = same and np.array_equal(row_map.places, np.arange(rows))
    parameters: dict[str, TensorReader] = dict(model.parameters)
    for name, tensor in model.parameters.items():
        axis = tensor_kinds.token_axis(name, tensor.shape)
        if same or axis is None or name in model.copies:
            continue
        if tensor.shape[axis] != rows:
            raise MergeError(
                f"{model.path}: {name} has {tensor.shape[axis]} rows of tokens, and the embedding "
                f"{rows}: which are whose is not known"
            )
        tensors = {each: donors(each, name) for each in used}
        dtypes = {each.dtype for each in tensors.values() if each is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        parameters[name] = RowTensor(tensor, tensors, axis, row_map, dtype)
    for name, original in model.copies.items():
        parameters[name] = parameters[original]
    content = hashlib.sha256(identity.encode())
    # Thresholds are remembered by this: what others' rows are decides the model's.
    for each in sorted(used - {place}):
        content.update(sources[each].digest.encode())
    for array in (row_map.models, row_map.places, row_map.averages):
        content.update(array.tobytes())
    described = _resized(model.model, {rows, model.model.get("vocab_size")}, row_map.size)
    return dataclasses.replace(
        model, parameters=parameters, model=described, rows=content.hexdigest()
    )


def _resized(config: Mapping[str, Json], sizes: Collection[Json], rows: int) -> JsonObject:
    """Returns a description with another vocab_size, also in the parts of a model."""
    result = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            value = _resized(value, sizes, rows)
        result[name] = rows if name == "vocab_size" and value in sizes else value
    return result


def _template(
    choice: str,
    directories: Sequence[Path],
    names: Sequence[str],
    chosen: Path,
    changed: Mapping[str, bytes | None],
) -> dict[str, bytes | None]:
    """Returns the files that a chat template changes in a tokenizer's directory."""
    from m2l.data import chat
    from m2l.data.tokenizer_files import read_settings

    def template(directory: Path) -> str | None:
        settings = read_settings(directory / TOKENIZER_SETTINGS[0])
        has_one = (directory / _TEMPLATE).is_file() or settings.get("chat_template")
        return chat.read(directory, {}).source if has_one else None

    text: str | None = choice
    if choice == AUTO:
        templates = [each for each in map(template, directories) if each]
        common = collections.Counter(each.strip() for each in templates).most_common(1)
        text = common[0][0] if common else None
    elif is_model(choice):
        text = template(directories[_place(choice, names)])
    if text is None:
        raise MergeError(f"chat_template {choice}: no such model has one")
    settings = changed.get(TOKENIZER_SETTINGS[0])
    settings = json.loads(settings) if settings else read_settings(chosen / TOKENIZER_SETTINGS[0])
    settings.pop("chat_template", None)
    return {
        _TEMPLATE: text.encode(),
        "chat_template.json": None,
        TOKENIZER_SETTINGS[0]: (json.dumps(settings, indent=2) + "\n").encode(),
    }


def _written(directory: Path, changed: Mapping[str, bytes | None]) -> tuple[Path, str]:
    """Returns a directory of a tokenizer with changed files, and a digest of its content."""
    content = tokenizer.read_files(str(directory)) | dict(changed)
    content = {name: data for name, data in content.items() if data is not None}
    identity = checksum(tokenizer.digests(content))
    if not changed:
        return directory, identity
    copy = cache_directory() / "tokenizers" / identity
    copy.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        if not (copy / name).is_file():
            storage.write_atomic(copy / name, data)
    return copy, identity


def _report(
    choice: TokenizerChoice,
    names: Sequence[str],
    ids: Mapping[str, int],
    original_ids: Mapping[str, int],
    maps: Sequence[RowMap],
    defaults: RowMap,
    own: np.ndarray,
    lost: Mapping[str, int],
) -> JsonObject:
    """Returns what was done: counts, and which tokens."""
    somewhere = defaults.named & (own < 0).any(0)
    labels = dict(enumerate(names)) | {ZERO: ZERO_SOURCE, AVERAGE: "average"}
    lacking: dict[str, list[str]] = {}
    for token, index in ids.items():
        if somewhere[index]:
            lacking.setdefault(labels[int(defaults.models[index])], []).append(token)
    added = [token for token in ids if token not in original_ids]
    return {
        "source": choice.source,
        "rows": defaults.size,
        "tokens": len(ids),
        "added": len(added),
        "lost": len(lost),
        "own": {name: int((row >= 0).sum()) for name, row in zip(names, own, strict=True)},
        "lacking": {label: len(tokens) for label, tokens in lacking.items()},
        "mean": {n: int((m.models == MEAN).sum()) for n, m in zip(names, maps, strict=True)},
        "names": {"added": added, "lost": sorted(lost), "lacking": lacking},
    }

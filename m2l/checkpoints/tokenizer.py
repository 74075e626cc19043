"""The tokenizer that a checkpoint carries: its vocabulary's files, so that it needs no other."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from m2l.checkpoints.pytrees import ADVICE, METADATA, open_pytree
from m2l.errors import CheckpointError
from m2l.files import (
    BYTES_TOKENIZER,
    EXTRA_IDS,
    GENERATION,
    MICROWORLD,
    SHIPPED_SIZES,
    SPIECE,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TOKENIZER_SETTINGS,
    cache_directory,
    checksum,
    microworld_pieces,
    read_json,
    split_name,
)
from m2l.storage import AnyPath, write_atomic
from m2l.typing import Json, JsonObject

DIRECTORY = "tokenizer"


def is_path(name: str | None) -> bool:
    """Returns whether a vocabulary's name in a manifest is a path, and not what m2l ships."""
    return name is not None and os.path.isabs(split_name(name)[1])


def name_in(name: str, directory: Path | None = None) -> str:
    """Returns the name of a vocabulary that a checkpoint has: stored, or of its local copy."""
    return split_name(name)[0] + (DIRECTORY if directory is None else str(directory))


def check_tokenizer(vocabulary: Mapping[str, Json]) -> None:
    """Raises CheckpointError if a checkpoint with this vocabulary could not carry its files."""
    if is_path(name := vocabulary.get("name")):
        _sources(name)


def read_files(name: str) -> dict[str, bytes]:
    """Returns the files of a vocabulary, by the names they have in a checkpoint.

    Raises:
        CheckpointError: They are not there any more.
    """
    sources, content = _sources(name), {}
    for target, source in sources.items():
        try:
            content[target] = source.read_bytes()
        except FileNotFoundError as error:
            raise _gone(name) from error
    # The ends of a text may be known from the model's own settings alone, which are not copied:
    # in a tokenizer's directory they would be another model's one day.
    alone = TOKENIZER_JSON in sources and GENERATION not in sources
    if alone and (ends := _ends(sources[TOKENIZER_JSON].with_name("config.json"))):
        content[GENERATION] = f"{json.dumps(ends)}\n".encode()
    return dict(sorted(content.items()))


def digests(content: Mapping[str, bytes]) -> dict[str, str]:
    """Returns the SHA-256, in hex, of each file by its name."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


def local_copy(
    checkpoint: AnyPath, recorded: Mapping[str, str], in_checkpoint: bool = True
) -> Path:
    """Returns a local directory with the tokenizer that a checkpoint carries.

    Libraries read tokenizers from files alone; the copy is in m2l's cache, by its content.

    Args:
        checkpoint: The checkpoint's directory.
        recorded: SHA-256 by name, as the manifest has them.
        in_checkpoint: False for a Hugging Face directory, whose files stand beside the weights: a
            local one is returned itself.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    if not in_checkpoint and isinstance(checkpoint, Path):
        return checkpoint.absolute()
    directory = checkpoint / DIRECTORY if in_checkpoint else checkpoint
    if isinstance(directory, Path) and directory.is_dir() and not (directory / METADATA).is_file():
        return directory.absolute()  # Of a checkpoint in format 2.
    copy = cache_directory() / "tokenizers" / checksum(dict(recorded))
    if all((copy / name).is_file() for name in recorded):
        return copy
    content = _carried(directory, recorded)
    copy.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        write_atomic(copy / name, data)
    return copy


def _carried(directory: AnyPath, recorded: Mapping[str, str]) -> dict[str, bytes]:
    """Reads and checks the tokenizer's files in a directory."""
    if (directory / METADATA).is_file():
        arrays = open_pytree(directory).arrays
        content = {n: arrays[n].read().tobytes() for n in recorded if n in arrays}
    else:
        present = (directory / name for name in recorded)
        content = {file.name: file.read_bytes() for file in present if file.is_file()}
    for name, sha256 in recorded.items():
        if name not in content:
            raise CheckpointError(f"{directory / name}: missing; {ADVICE}")
        if hashlib.sha256(content[name]).hexdigest() != sha256:
            raise CheckpointError(
                f"{directory / name}: damaged: its digest is not the one that the manifest "
                f"records; {ADVICE}"
            )
    return content


def is_bytes(directory: Path) -> bool:
    """Returns whether a directory has ByT5's tokenizer, which has no file but its settings."""
    settings = directory / TOKENIZER_SETTINGS[0]
    if not settings.is_file():
        return False
    content = read_json(settings, kind=dict, error=CheckpointError, advice="download it again")
    return content.get("tokenizer_class") == BYTES_TOKENIZER


def write_shipped(vocabulary: Mapping[str, Json], directory: Path) -> bool:
    """Writes the tokenizer of a vocabulary that comes with m2l, as transformers reads it.

    Args:
        vocabulary: {"name", "size"} of the vocabulary.
        directory: Where; it exists.

    Returns:
        Whether it is such a vocabulary.
    """
    name = vocabulary.get("name")
    if name not in EXTRA_IDS or vocabulary.get("size") != SHIPPED_SIZES[name]:
        return False
    ends = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": BYTES_TOKENIZER, "extra_ids": EXTRA_IDS[name], **ends}
    if name == MICROWORLD:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        shutil.copyfile(microworld_pieces(), directory / SPIECE)
        (directory / TOKENIZER_JSON).write_text(_unigram_json(directory / SPIECE, EXTRA_IDS[name]))
    (directory / TOKENIZER_SETTINGS[0]).write_text(json.dumps(settings, indent=2) + "\n")
    return True


def _unigram_json(file: Path, extra_ids: int) -> str:
    """Returns a tokenizer.json with the ids of a SentencePiece unigram model, bytes included."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = SentencePieceProcessor(model_file=str(file))
    scores = [(pieces.IdToPiece(i), pieces.GetScore(i)) for i in range(pieces.GetPieceSize())]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=pieces.unk_id(), byte_fallback=True))
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(space, " "),
            normalizers.Prepend(space),
            normalizers.Replace(" ", space),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in reversed(range(extra_ids)))]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", pieces.eos_id())]
    )
    return tokenizer.to_str()


def verify(checkpoint: AnyPath, recorded: Mapping[str, str]) -> None:
    """Raises CheckpointError if a tokenizer's file is missing, or not what the manifest records."""
    _carried(checkpoint / DIRECTORY, recorded)


def _sources(name: str) -> dict[str, Path]:
    """Returns the files to copy by the names that they get."""
    path = Path(split_name(name)[1])
    if path.is_dir():
        chosen = {file: path / file for file in (SPIECE, TOKENIZER_JSON, TOKENIZER_MODEL)}
        folder = path
    else:
        # A directory would read another kind first: of the file's neighbours, only settings go.
        own = TOKENIZER_JSON if path.suffix == ".json" else SPIECE
        chosen = {TOKENIZER_MODEL if path.name == TOKENIZER_MODEL else own: path}
        folder = path.parent
    files = {target: source for target, source in chosen.items() if source.is_file()}
    if not files and not (path.is_dir() and is_bytes(path)):
        raise _gone(name)
    if path.is_file() and SPIECE in files:
        return files
    settings = {file: folder / file for file in TOKENIZER_SETTINGS}
    return files | {target: source for target, source in settings.items() if source.is_file()}


def _ends(config: Path) -> JsonObject:
    if not config.is_file():
        return {}
    settings = read_json(config, kind=dict, error=CheckpointError, advice="download it again")
    return {key: settings[key] for key in ("bos_token_id", "eos_token_id") if key in settings}


def _gone(name: str) -> CheckpointError:
    return CheckpointError(
        f"{split_name(name)[1]}: the vocabulary's file is not there any more, and the "
        "checkpoint is to include it; restore it"
    )

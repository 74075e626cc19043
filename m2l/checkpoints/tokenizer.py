"""The tokenizer that a checkpoint carries: its vocabulary's files, so that it needs no other."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    microworld_pieces,
    read_json,
    split_name,
)

DIRECTORY = "tokenizer"


def is_path(name: str | None) -> bool:
    """Whether a vocabulary's name in a manifest is a path, and not what m2l ships."""
    return name is not None and os.path.isabs(split_name(name)[1])


def name_in(name: str, checkpoint: Path | None = None) -> str:
    """The vocabulary's name when a checkpoint carries it: on disk, or as it is read from there."""
    where = DIRECTORY if checkpoint is None else str(checkpoint / DIRECTORY)
    return split_name(name)[0] + where


def check_tokenizer(vocabulary: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a checkpoint with this vocabulary could not carry its files."""
    if is_path(name := vocabulary.get("name")):
        _sources(name)


def carry(name: str, checkpoint: Path) -> dict[str, str]:
    """Copies a vocabulary's files into a checkpoint; returns each one's SHA-256 by its name.

    Raises:
        CheckpointError: They are not there any more.
    """
    sources, directory = _sources(name), checkpoint / DIRECTORY
    directory.mkdir()
    for target, source in sources.items():
        try:
            shutil.copyfile(source, directory / target)
        except FileNotFoundError as error:
            raise _gone(name) from error
    # The ends of a text may be known from the model's own settings alone, which are not copied:
    # in a tokenizer's directory they would be another model's one day.
    alone = TOKENIZER_JSON in sources and GENERATION not in sources
    if alone and (ends := _ends(sources[TOKENIZER_JSON].with_name("config.json"))):
        (directory / GENERATION).write_text(json.dumps(ends) + "\n")
    return {file.name: _sha256(file) for file in sorted(directory.iterdir())}


def is_bytes(directory: Path) -> bool:
    """Whether a directory holds ByT5's tokenizer, which has no file but its settings."""
    settings = directory / TOKENIZER_SETTINGS[0]
    if not settings.is_file():
        return False
    content = read_json(settings, kind=dict, error=CheckpointError, advice="download it again")
    return content.get("tokenizer_class") == BYTES_TOKENIZER


def write_shipped(vocabulary: Mapping[str, Any], directory: Path) -> bool:
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
    """A tokenizer.json with the ids of a SentencePiece unigram model that falls back on bytes."""
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


def verify(checkpoint: Path, digests: Mapping[str, str]) -> None:
    """Raises CheckpointError if a tokenizer's file is missing, or not what the manifest records."""
    for name, digest in digests.items():
        file = checkpoint / DIRECTORY / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; copy the checkpoint again or make it anew")
        if _sha256(file) != digest:
            raise CheckpointError(
                f"{file}: damaged: its digest is not the one that the manifest records; copy the "
                "checkpoint again or make it anew"
            )


def _sources(name: str) -> dict[str, Path]:
    """The files to copy, by what they are to be called."""
    path = Path(split_name(name)[1])
    if path.is_dir():
        chosen = {file: path / file for file in (SPIECE, TOKENIZER_JSON, TOKENIZER_MODEL)}
        folder = path
    else:
        # A directory would read another kind first: of the file's neighbours, only settings go.
        own = TOKENIZER_JSON if path.suffix == ".json" else SPIECE
        chosen = {TOKENIZER_MODEL if path.name == TOKENIZER_MODEL else own: path}
        folder = path.parent
    found = {target: source for target, source in chosen.items() if source.is_file()}
    if not found and not (path.is_dir() and is_bytes(path)):
        raise _gone(name)
    if path.is_file() and SPIECE in found:
        return found
    settings = {file: folder / file for file in TOKENIZER_SETTINGS}
    return found | {target: source for target, source in settings.items() if source.is_file()}


def _ends(config: Path) -> dict[str, Any]:
    if not config.is_file():
        return {}
    settings = read_json(config, kind=dict, error=CheckpointError, advice="download it again")
    return {key: settings[key] for key in ("bos_token_id", "eos_token_id") if key in settings}


def _gone(name: str) -> CheckpointError:
    return CheckpointError(
        f"{split_name(name)[1]}: the vocabulary's file is not there any more, and the "
        "checkpoint is to carry it; put it back"
    )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

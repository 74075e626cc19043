"""Converts Hugging Face's checkpoints to m2l's and back; neither changes a bit."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from m2l import models, signals, storage
from m2l.checkpoints import huggingface_directory, safetensors, tokenizer
from m2l.checkpoints.decoder_families import DECODER_FAMILIES
from m2l.checkpoints.huggingface_config import (
    CONFIG,
    read_settings,
    to_json,
    writes_output,
)
from m2l.checkpoints.huggingface_directory import open_directory, write_card
from m2l.checkpoints.importing import (
    Origin,
    Tensor,
    check_origins,
    float_dtype,
    import_tensors,
    parameter_shapes,
)
from m2l.checkpoints.manifest import Manifest
from m2l.checkpoints.model_fields import read_json
from m2l.checkpoints.publishing import Flusher, publishing
from m2l.checkpoints.reading import EXPORTED, existing_result, open_parameters, resolve
from m2l.checkpoints.safetensors import StoredTensor
from m2l.checkpoints.spans import WORKERS, blocks, in_parallel
from m2l.checkpoints.tensor_kinds import is_buffer, same_elements
from m2l.checkpoints.tokenizer import write_shipped
from m2l.errors import CheckpointError, UnsupportedModelError
from m2l.files import GENERATION
from m2l.models import Config, LlamaConfig, T5Config
from m2l.progress import Progress
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json, JsonObject

SHARD_SIZE = 5_000_000_000

_OUTPUT = "lm_head.weight"
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_MLP = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}


def read_config(directory: PathLike) -> Config:
    """Reads the model in a directory from config.json and, where they decide, the tensors' names.

    Raises:
        CheckpointError: A file is missing or damaged, the model is of no known type, or a field
            cannot be honoured or contradicts the tensors.
    """
    directory = storage.path(directory).absolute()
    return _config(directory, open_directory(directory)[0])


def _config(directory: Path, tensors: Mapping[str, StoredTensor]) -> Config:
    output, shared = tensors.get(_OUTPUT), tensors.get("shared.weight")
    # A T5's weights decide, as in transformers 5; its field has meant other things as well.
    tied = output is None or (shared is not None and same_elements(output, shared))
    config = read_settings(directory, tied=tied)
    if isinstance(config, LlamaConfig) and not config.tie_word_embeddings and output is None:
        raise UnsupportedModelError(
            f"{directory}: {_OUTPUT} is missing, though {CONFIG} has tie_word_embeddings false"
        )
    return config


def origins(config: Config, prefix: str = "model.") -> dict[str, Origin]:
    """Returns m2l's name of each parameter -> where it comes from in Hugging Face's layout.

    Args:
        config: The model.
        prefix: Before the names of a decoder's parameters; empty where the model was saved
            without its output.
    """
    return _t5_origins(config) if isinstance(config, T5Config) else _llama_origins(config, prefix)


def _t5_origins(config: T5Config) -> dict[str, Origin]:
    result = {"token_embedder": Origin("shared.weight")}
    inputs = ["wi_0", "wi_1"] if config.feed_forward_proj.startswith("gated-") else ["wi"]
    for stack, layers, attentions in (
        ("encoder", config.num_encoder_layers, {"self": "SelfAttention"}),
        (
            "decoder",
            config.num_decoder_layers,
            {"self": "SelfAttention", "cross": "EncDecAttention"},
        ),
    ):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        result[f"{stack}/relpos_bias"] = Origin(table, transposed=True)
        for i in range(layers):
            ours = f"{stack}/layers_{i:02}"
            for j, (kind, module) in enumerate(attentions.items()):
                theirs = f"{stack}.block.{i}.layer.{j}"
                result[f"{ours}/pre_{kind}_attention_norm"] = Origin(f"{theirs}.layer_norm.weight")
                for part, letter in _PROJECTIONS.items():
                    kernel = Origin(f"{theirs}.{module}.{letter}.weight", transposed=True)
                    result[f"{ours}/{kind}_attention/{part}"] = kernel
            theirs = f"{stack}.block.{i}.layer.{len(attentions)}"
            result[f"{ours}/pre_mlp_norm"] = Origin(f"{theirs}.layer_norm.weight")
            for part in (*inputs, "wo"):
                kernel = Origin(f"{theirs}.DenseReluDense.{part}.weight", transposed=True)
                result[f"{ours}/mlp/{part}"] = kernel
        result[f"{stack}/norm"] = Origin(f"{stack}.final_layer_norm.weight")
    if not config.tie_word_embeddings:
        result["decoder/logits"] = Origin(_OUTPUT, transposed=True)
    return result


def _llama_origins(config: LlamaConfig, prefix: str) -> dict[str, Origin]:
    result = {"token_embedder": Origin(f"{prefix}embed_tokens.weight")}
    norms = {
        "pre_self_attention_norm": "input_layernorm",
        "pre_mlp_norm": "post_attention_layernorm",
    }
    if config.post_norms:
        norms |= {
            "post_self_attention_norm": "post_attention_layernorm",
            "pre_mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    if config.omit_pre_norms:
        norms = {part: norm for part, norm in norms.items() if not part.startswith("pre_")}
    biased = [*_PROJECTIONS][:3] if config.qkv_bias else []
    biased += ["out"] if config.out_bias else []
    for i in range(config.num_hidden_layers):
        ours, theirs = f"decoder/layers_{i:02}", f"{prefix}layers.{i}"
        for part, norm in norms.items():
            result[f"{ours}/{part}"] = Origin(f"{theirs}.{norm}.weight")
        for part in biased:
            bias = Origin(f"{theirs}.self_attn.{_PROJECTIONS[part]}_proj.bias")
            result[f"{ours}/self_attention/{part}_bias"] = bias
        for part in ("query", "key") if config.qk_norm else ():
            norm = Origin(f"{theirs}.self_attn.{_PROJECTIONS[part]}_norm.weight")
            result[f"{ours}/self_attention/{part}_norm"] = norm
        for part, origin in _kernel_origins(config, theirs).items():
            result[f"{ours}/{part}"] = origin
    result["decoder/norm"] = Origin(f"{prefix}norm.weight")
    if not config.tie_word_embeddings:
        result["decoder/logits"] = Origin(_OUTPUT, transposed=True)
    return result


def _kernel_origins(config: LlamaConfig, layer: str) -> dict[str, Origin]:
    """Returns where the kernels of a layer come from."""
    attention = {f"self_attention/{part}": f"{x}_proj" for part, x in _PROJECTIONS.items()}
    modules = {part: f"self_attn.{module}" for part, module in attention.items()}
    modules |= {f"mlp/{part}": f"mlp.{module}" for part, module in _MLP.items()}
    family = DECODER_FAMILIES[config.model_type]
    if bool(config.num_experts) != bool(family.experts):
        raise CheckpointError(
            f"LlamaConfig.num_experts: {config.num_experts} cannot be expressed as a "
            f"{config.model_type} model of transformers"
        )
    if family.experts:
        modules = {part: module for part, module in modules.items() if not part.startswith("mlp/")}
        modules["mlp/router"] = family.experts["router"]
    kernels = {
        part: Origin(f"{layer}.{module}.weight", transposed=True)
        for part, module in modules.items()
    }
    for part, module in family.experts.items():
        if part != "router":
            names = tuple(f"{layer}.{module.format(e)}.weight" for e in range(config.num_experts))
            kernels[f"mlp/{part}"] = Origin(names[0], transposed=True, stacked=names)
    if family.fused:
        queries, keys = (
            heads * config.head_dim
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        sizes = {
            "self_attn.qkv_proj": {"query": queries, "key": keys, "value": keys},
            "mlp.gate_up_proj": dict.fromkeys(("wi_0", "wi_1"), config.intermediate_size),
        }
        for module, parts in sizes.items():
            first, block = 0, "mlp" if module.startswith("mlp") else "self_attention"
            for part, size in parts.items():
                kernels[f"{block}/{part}"] = Origin(
                    f"{layer}.{module}.weight", transposed=True, rows=(first, first + size)
                )
                first += size
    return kernels


def _aliases(config: Config, embedding: str) -> list[str]:
    """Returns the names under which a file may store the embedding once more."""
    names = [_OUTPUT] if config.tie_word_embeddings else []
    if isinstance(config, T5Config):
        names += [f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
    return [name for name in names if name != embedding]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a Hugging Face directory stores a model.

    `ignored` are the names of tensors that are not needed: aliases and buffers.
    """

    config: Config
    origins: Mapping[str, Origin]
    ignored: frozenset[str]


def read_layout(
    directory: Path, stored: Mapping[str, StoredTensor], config: Config | None = None
) -> Layout:
    """Returns how a directory stores its model.

    Args:
        directory: Where config.json is.
        stored: Its tensors.
        config: The model, if it is not to be read from config.json.

    Raises:
        CheckpointError: The model is of no known type, a field cannot be honoured, or the
            configuration and the tensors contradict each other.
    """
    config = _config(directory, stored) if config is None else config
    # A model that was saved without its output has no prefix either.
    prefix = "" if "embed_tokens.weight" in stored else "model."
    sources = origins(config, prefix)
    embedding = sources["token_embedder"].tensor
    ignored = {name for name, tensor in stored.items() if is_buffer(name, tensor)}
    for name in _aliases(config, embedding):
        if name in stored and embedding in stored:
            if not same_elements(stored[name], stored[embedding]):
                raise CheckpointError(
                    f"{directory}: {name} differs from {embedding}, though the configuration says "
                    "that the model has one embedding: set tie_word_embeddings to what it is, or "
                    "remove the tensor"
                )
            ignored.add(name)
    return Layout(config, sources, frozenset(ignored))


def open_model(path: Path) -> tuple[Layout, dict[str, StoredTensor]]:
    """Opens a directory whose model m2l has a network for; nothing but headers is read yet.

    Returns:
        How the directory holds its model, and its tensors: exactly those of the model, and ignored
        ones.

    Raises:
        CheckpointError: A file is missing or damaged, the model is of no known type, or its
            description and its tensors contradict each other.
    """
    tensors, _ = open_directory(path)
    return checked_layout(path if path.is_dir() else path.parent, tensors, path), tensors


def checked_layout(
    directory: AnyPath, tensors: Mapping[str, StoredTensor], source: AnyPath
) -> Layout:
    """Returns what `read_layout` does, of tensors that are exactly those of the model.

    Raises:
        CheckpointError: As there; or a tensor is missing, or unknown.
    """
    layout = read_layout(directory, tensors)
    shapes = parameter_shapes(layout.config)
    check_origins(shapes, tensors, layout.origins, source=source, ignored=layout.ignored)
    return layout


def import_checkpoint(
    source: PathLike,
    out: PathLike,
    *,
    vocabulary: Mapping[str, Json],
    dtype: str | None = None,
    config: Config | None = None,
) -> Manifest:
    """Makes an m2l checkpoint of a Hugging Face directory, without changing a bit.

    Args:
        source: The directory, with config.json and safetensors.
        out: The checkpoint to make; must not exist.
        vocabulary: {"name", "size", "fingerprint"} of the one the model was trained with.
        dtype: "float32", "bfloat16" or "float16", to which parameters are cast; None keeps theirs.
        config: The model, if it is not to be read from config.json.

    Returns:
        The manifest of `out`. Its made_by records the absolute path and config.json of the source.

    Raises:
        CheckpointError: The source is missing, damaged, of an unknown type, or its tensors and its
            configuration contradict each other; or `out` exists.
        UnknownNameError: There is no such dtype.
    """
    source = storage.path(source).absolute()
    stored, _ = open_directory(source)
    layout = read_layout(source, stored, config)
    made_by = {"kind": "convert", "from": "huggingface", "source": str(source)}
    if (source / CONFIG).is_file():
        made_by["config"] = read_json(source / CONFIG)
    return import_tensors(
        storage.path(out),
        layout.config,
        {name: _whole(tensor) for name, tensor in stored.items()},
        layout.origins,
        source=source,
        vocabulary=vocabulary,
        made_by=made_by,
        ignored=layout.ignored,
        dtype=dtype,
    )


def _whole(tensor: StoredTensor) -> Tensor:
    return Tensor(tensor.name, tensor.shape, tensor.dtype, tensor.read_checked)


def export_options(
    dtype: str | None = None, shard_size: int = SHARD_SIZE, results: Sequence[Path] = ()
) -> JsonObject:
    """Returns the options of `export_checkpoint` as its manifest records them."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in results]
    return {"dtype": dtype, "shard_size": shard_size, "results": digests}


def _json(value: Json) -> str:
    return json.dumps(value, sort_keys=True)


def export_checkpoint(
    source: PathLike,
    out: PathLike,
    *,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    results: Sequence[Path] = (),
) -> Path:
    """Makes a Hugging Face directory, for transformers 4 and 5, of an m2l checkpoint.

    Besides weights and config.json it gets the tokenizer's files that the checkpoint carries or
    that come with m2l, a README.md that says how the model was made, and the manifest as
    m2l_manifest.json. Memory held: at most three parameters' and 0.5 GiB.

    Args:
        source: A checkpoint or a training run. Its digests are checked on the way.
        out: The directory to make; must not exist.
        dtype: "float32", "bfloat16" or "float16", to which parameters are cast; None keeps theirs.
        shard_size: The bytes that a file of weights holds at most, unless one tensor is larger.
        results: JSON files of `m2l eval` on this model, to be shown in README.md.

    Returns:
        `out`, absolute.

    Raises:
        CheckpointError: The source is missing or damaged, cannot be expressed as a model of its
            type, or has a value too large for `dtype`; a result is of another model; or `out`
            exists.
        UnknownNameError: There is no such dtype.
    """
    source, out = resolve(source), storage.path(out).absolute()
    manifest = Manifest.read(source)
    manifest.check_whole(source)
    options = export_options(dtype, shard_size, results)
    exported = dataclasses.replace(manifest, made_by={**manifest.made_by, EXPORTED: options})

    def is_same(other: Manifest) -> bool:
        fields = ("digest", "made_by", "parents", "tokenizer", "step")
        return all(_json(getattr(other, f)) == _json(getattr(exported, f)) for f in fields)

    if existing_result(out, is_same, huggingface_directory.MANIFEST) is not None:
        return out
    if not isinstance(out, Path):
        with storage.local_output(out) as local:
            _export(source, local, manifest, exported, dtype, shard_size, results)
        return out
    _export(source, out, manifest, exported, dtype, shard_size, results)
    return out


def _export(
    source: AnyPath,
    out: Path,
    manifest: Manifest,
    exported: Manifest,
    dtype: str | None,
    shard_size: int,
    results: Sequence[Path],
) -> None:
    """Does what `export_checkpoint` says, to a local directory."""
    config = models.from_dict(manifest.model)
    parameters = open_parameters(source)
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    cast = None if dtype is None else float_dtype(dtype)
    sources: dict[tuple[str, ...], list[tuple[str, Origin]]] = defaultdict(list)
    described = {}
    tensors = [*origins(config).items()]
    if config.tie_word_embeddings and writes_output(config):
        tensors.append(("token_embedder", Origin(_OUTPUT)))
    for name, origin in tensors:
        if name not in parameters:
            raise CheckpointError(f"{source}: {name} is missing; it is no model of its settings")
        shape = parameters[name].shape[1:] if origin.stacked else parameters[name].shape
        shape = shape[::-1] if origin.transposed else shape
        if origin.rows is not None:
            shape = (origin.rows[1], *shape[1:])  # of the last of them: the rows of all
        sources[origin.tensors].append((name, origin))
        described |= dict.fromkeys(origin.tensors, (shape, cast or dtypes[name]))
    widest = max((spec[1] for spec in described.values()), key=lambda dtype: dtype.itemsize)
    settings = to_json(config, widest.name, special_tokens(source, manifest))
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in described.values())
    with publishing(out, size + (1 << 20)) as temporary:
        if manifest.tokenizer is not None:
            shutil.copytree(
                tokenizer.local_copy(source, manifest.tokenizer), temporary, dirs_exist_ok=True
            )
        else:
            write_shipped(manifest.vocabulary, temporary)
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        write_card(
            temporary,
            out.name,
            config.model_type,
            manifest,
            widest.name,
            generates=config.decoder_only,
            results=results,
        )
        shards = safetensors.plan_shards(described, shard_size)
        extents = safetensors.create(temporary, described, shards)
        done, digests = 0, {}

        def write(tensors: tuple[str, ...]) -> int:
            positions, stored = dict.fromkeys(tensors, 0), {t: hashlib.sha256() for t in tensors}
            for ours, origin in sources[tensors]:
                parameter = parameters[ours]
                array = parameter.read()
                digest = hashing.submit(parameter.digest_of, array)
                for theirs, part in zip(tensors, array if origin.stacked else [array], strict=True):
                    target = extents[theirs]
                    laid_out = part.T if origin.transposed else part
                    for block in blocks(laid_out, target.dtype, ours):
                        target.write_from(block, positions[theirs])
                        stored[theirs].update(block.view(np.uint8))
                        positions[theirs] += block.size
                        flusher.wrote(target.files(), block.nbytes)
                parameter.check(digest.result())
            digests.update({theirs: stored[theirs].hexdigest() for theirs in tensors})
            return sum(positions[theirs] * extents[theirs].dtype.itemsize for theirs in tensors)

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress.update(done)
            signals.check()

        with (
            ThreadPoolExecutor(WORKERS) as hashing,
            Flusher() as flusher,
            Progress(f"export {source.name}", size, "MB", scale=10**6) as progress,
        ):
            # The largest first, or a thread would be left alone with one at the end.
            largest_first = sorted(sources, key=lambda names: -sum(extents[n].size for n in names))
            in_parallel(write, largest_first, advance)
        huggingface_directory.write(temporary, exported, digests)


_TOKENS = ("bos", "eos", "pad")


def special_tokens(checkpoint: Path, manifest: Manifest) -> JsonObject:
    """Returns bos_token_id, eos_token_id and pad_token_id, as far as a checkpoint knows them.

    From the tokenizer that it carries or, if it was imported, from what config.json said there.
    """
    directory = checkpoint
    if manifest.tokenizer is not None:
        directory = tokenizer.local_copy(checkpoint, manifest.tokenizer)
    ids = dict(_carried_ids(directory))
    known = [_content(directory / GENERATION)]
    spelled = [
        _content(directory / f) for f in ("tokenizer_config.json", "special_tokens_map.json")
    ]
    named = {}
    for token in _TOKENS:
        for settings in spelled:
            text = settings.get(f"{token}_token")
            text = text.get("content") if isinstance(text, Mapping) else text
            if isinstance(text, str) and text in ids:
                named.setdefault(f"{token}_token_id", ids[text])
    known.append(named)
    if isinstance(imported := manifest.made_by.get("config"), Mapping):
        known.append(dict(imported))
    tokens = {}
    for name in (f"{token}_token_id" for token in _TOKENS):
        values = [values[name] for values in known if values.get(name) is not None]
        if values:
            tokens[name] = values[0]
    return tokens


def _content(file: Path) -> JsonObject:
    return read_json(file) if file.is_file() else {}


def _carried_ids(directory: Path) -> Iterator[tuple[str, int]]:
    """Yields the text of each token that is not in the vocabulary itself, and its id."""
    for token in _content(directory / "tokenizer.json").get("added_tokens") or []:
        match token:
            case {"content": str(content), "id": int(number)}:
                yield content, number
    added = _content(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for number, token in added.items() if isinstance(added, dict) else ():
        match token:
            case {"content": str(content)} if number.isdecimal():
                yield content, int(number)

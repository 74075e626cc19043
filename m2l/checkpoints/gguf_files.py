"""GGUF files, llama.cpp's: made into Hugging Face directories, their weights multiplied out.

Llama-architecture models with the tokenizer of SmolLM and SmolLM2. What a quantisation took away
does not come back, and the directory's manifest and card say which types the file had.

Source: the package `gguf`, llama.cpp's own, reads the file and multiplies it out.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from m2l import signals, storage
from m2l.checkpoints import huggingface_directory, safetensors
from m2l.checkpoints.huggingface import SHARD_SIZE
from m2l.checkpoints.importing import float_dtype
from m2l.checkpoints.manifest import Manifest
from m2l.checkpoints.publishing import check_absent, publishing
from m2l.checkpoints.saving import array_records
from m2l.checkpoints.spans import blocks
from m2l.errors import CheckpointError, reason
from m2l.progress import Progress
from m2l.storage import PathLike
from m2l.typing import Json, JsonObject

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

SUFFIX = ".gguf"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_CONTROL, _OF_A_USER = 3, 4  # of tokenizer.ggml.token_type

_Get = Callable[..., Json]


def to_huggingface(source: PathLike, out: PathLike, *, dtype: str = "float32") -> Manifest:
    """Makes a Hugging Face directory of a GGUF file, one tensor in memory at a time.

    Args:
        source: The file, on this machine.
        out: The directory to make; must not exist.
        dtype: Of its weights: "float32", "bfloat16" or "float16".

    Returns:
        The directory's manifest, whose made_by has the file's SHA-256 and its types of tensors.

    Raises:
        CheckpointError: The file is missing or damaged, of another architecture or tokenizer; or
            the package `gguf` is not installed.
        UnknownNameError: There is no such dtype.
    """
    source, out = storage.path(source), storage.path(out)
    if not isinstance(source, Path) or not isinstance(out, Path):
        raise CheckpointError(f"{source}, {out}: GGUF files are read, and made into, local paths")
    out = out.absolute()
    check_absent(out)
    reader = _open(source)

    def get(key: str, *default: Json) -> Json:
        if key not in reader.fields:
            if default:
                return default[0]
            raise CheckpointError(f"{source}: {key} is missing")
        return reader.fields[key].contents()

    if get("general.architecture") != "llama":
        raise CheckpointError(
            f"{source}: its architecture is {get('general.architecture')}; of GGUF files m2l reads "
            "llama's alone"
        )
    tensors = {_name(source, tensor.name): tensor for tensor in reader.tensors}
    cast = float_dtype(dtype)
    config = _config(source, get, tied="lm_head.weight" not in tensors, dtype=cast.name)
    companions = {"config.json": config, **_tokenizer(source, get)}
    described = {name: (tuple(map(int, t.shape[::-1])), cast) for name, t in tensors.items()}
    size = sum(math.prod(shape) * cast.itemsize for shape, _ in described.values())
    with publishing(out, size + (16 << 20)) as temporary:
        for name, content in companions.items():
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (temporary / name).write_text(f"{text}\n", encoding="utf-8")
        shards = safetensors.plan_shards(described, SHARD_SIZE)
        extents, digests, done = safetensors.create(temporary, described, shards), {}, 0
        with Progress(f"convert {source.name}", size, "MB", scale=10**6) as progress:
            for name, tensor in tensors.items():
                signals.check()
                values = _values(name, tensor, config)
                cast_blocks = blocks(values, cast, f"{source}: {name}")
                digests[name] = extents[name].write_blocks(cast_blocks)
                done += extents[name].size * cast.itemsize
                progress.update(done)
        with source.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        types = Counter(tensor.tensor_type.name for tensor in tensors.values())
        manifest = Manifest(
            model=config,
            vocabulary={"name": None, "size": config["vocab_size"], "fingerprint": None},
            dtype=cast.name,
            step=0,
            made_by={
                "kind": "convert",
                "from": "gguf",
                "source": str(source.absolute()),
                "sha256": content,
                "types": dict(sorted(types.items())),
            },
            parents=(),
            parameters=array_records(described, digests),
        )
        huggingface_directory.write_card(
            temporary, out.name, "llama", manifest, cast.name, generates=True
        )
        return huggingface_directory.write(temporary, manifest, digests)


def _open(source: Path) -> "GGUFReader":
    if not source.is_file():
        raise CheckpointError(f"{source}: there is no such file")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"{source}: GGUF files need the package gguf: pip install 'm2l[gguf]'"
        ) from error
    try:
        return GGUFReader(source)
    # Of a damaged file it reads on where nothing is: any error of NumPy's or Python's.
    except Exception as error:
        raise CheckpointError(f"{source}: no GGUF file, or damaged: {reason(error)}") from error


def _name(source: Path, name: str) -> str:
    """Returns Hugging Face's name of a tensor."""
    *block, part, kind = name.split(".")
    if part not in _NAMES or kind != "weight":
        raise CheckpointError(f"{source}: {name} is no tensor of a plain Llama")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{_NAMES[part]}.weight"


def _values(name: str, tensor: "ReaderTensor", config: Mapping[str, Json]) -> np.ndarray:
    """Returns a tensor in float32, its rows in Hugging Face's order."""
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    values = values.reshape(tensor.shape[::-1])
    part = name.split(".")[-2]
    if part in ("q_proj", "k_proj"):
        # llama.cpp rotates neighbouring features, transformers the two halves of a head.
        heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
        split = values.reshape(heads, len(values) // heads // 2, 2, -1)
        values = split.swapaxes(1, 2).reshape(values.shape)
    return values


def _config(source: Path, get: _Get, *, tied: bool, dtype: str) -> JsonObject:
    """Returns config.json, as transformers reads it."""
    if get("llama.rope.scaling.type", "none") != "none":
        raise CheckpointError(f"{source}: its rotary positions are scaled; m2l does not read that")
    hidden, heads = get("llama.embedding_length"), get("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(get("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("llama.attention.head_count_kv", heads),
        "head_dim": get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": get("llama.context_length"),
        # Both are float32 in the file: 1e-5 is meant, not 9.99999975e-6.
        "rms_norm_eps": float(str(np.float32(get("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(str(np.float32(get("llama.rope.freq_base", 10000.0)))),
        "tie_word_embeddings": tied,
        "bos_token_id": get("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": dtype,
    }


def _tokenizer(source: Path, get: _Get) -> dict[str, JsonObject]:
    """Returns tokenizer.json and tokenizer_config.json."""
    model, split = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre", "default")
    if (model, split) != ("gpt2", "smollm"):
        raise CheckpointError(
            f"{source}: its tokenizer is {model!r}, split as {split!r}; of GGUF files m2l reads "
            "'gpt2', 'smollm' alone"
        )
    pieces, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    settings: JsonObject = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
    }
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (number := get(f"tokenizer.ggml.{key}_token_id", None)) is not None:
            settings[f"{role}_token"] = pieces[number]
    if template := get("tokenizer.chat_template", None):
        settings["chat_template"] = template
    return {
        "tokenizer_config.json": settings,
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": piece, **plain, "special": kind == _CONTROL}
                for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
                if kind in (_CONTROL, _OF_A_USER)
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]},
            "post_processor": None,
            "decoder": _BYTES,
            "model": {
                "type": "BPE",
                "vocab": {piece: i for i, piece in enumerate(pieces)},
                "merges": [merge.split(" ") for merge in get("tokenizer.ggml.merges")],
            },
        },
    }

"""Makes a Hugging Face directory of a GGUF file, so that m2l can import the model in it.

    pip install gguf numpy
    python scripts/gguf_to_huggingface.py MODEL.gguf DIR [--dtype bfloat16]

Llama-architecture models with SmolLM's and SmolLM2's kind of tokenizer. The weights are those of
the file, quantised ones multiplied out: what a quantisation took away does not come back. Does not
need m2l.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

NAMES = {
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
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
CONTROL, OF_A_USER = 3, 4  # of tokenizer.ggml.token_type

Get = Callable[..., Any]


def tensors(reader: GGUFReader, heads: int, groups: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields Hugging Face's name of each tensor, and its values in float32."""
    for tensor in reader.tensors:
        *block, part, kind = tensor.name.split(".")
        if part not in NAMES or kind != "weight":
            sys.exit(f"{tensor.name}: no tensor of a plain Llama; this model is not supported")
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape(tensor.shape[::-1])
        if part in ("attn_q", "attn_k"):
            # llama.cpp rotates neighbouring features, transformers the two halves of a head.
            rows = heads if part == "attn_q" else groups
            split = values.reshape(rows, len(values) // rows // 2, 2, -1)
            values = split.swapaxes(1, 2).reshape(values.shape)
        layer = f"model.layers.{block[1]}." if block else ""
        yield f"{layer}{NAMES[part]}.weight", values


def write_safetensors(file: Path, arrays: dict[str, np.ndarray], dtype: str) -> None:
    """Writes tensors in float32, or rounded to the nearest bfloat16, ties to even."""
    code, width = ("F32", 4) if dtype == "float32" else ("BF16", 2)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, values in arrays.items():
        start, end = end, end + values.size * width
        header[name] = {"dtype": code, "shape": values.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for values in arrays.values():
            bits = np.ascontiguousarray(values, "<f4").view("<u4")
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            stream.write(bits.tobytes() if width == 4 else rounded.astype("<u2").tobytes())


def model_config(get: Get, tied: bool, dtype: str) -> dict[str, object]:
    """Returns config.json, as transformers reads it."""
    hidden, heads = get("llama.embedding_length"), get("llama.attention.head_count")
    if get("llama.rope.scaling.type", "none") != "none":
        sys.exit("the model's rotary positions are scaled; that is not supported")
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


def tokenizer_files(get: Get) -> dict[str, dict[str, object]]:
    """Returns tokenizer.json and tokenizer_config.json."""
    model, split = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre", "default")
    if (model, split) != ("gpt2", "smollm"):
        sys.exit(f"tokenizer {model!r}, split as {split!r}: only 'gpt2', 'smollm' is supported")
    pieces, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}
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
                {"id": i, "content": piece, **plain, "special": kind == CONTROL}
                for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
                if kind in (CONTROL, OF_A_USER)
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]},
            "post_processor": None,
            "decoder": BYTES,
            "model": {
                "type": "BPE",
                "vocab": {piece: i for i, piece in enumerate(pieces)},
                "merges": [merge.split(" ") for merge in get("tokenizer.ggml.merges")],
            },
        },
    }


def main() -> None:
    """Converts the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("out", type=Path, help="the directory to make; must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags = parser.parse_args()
    if not flags.source.is_file():
        sys.exit(f"{flags.source}: there is no such file")
    if flags.out.exists():
        sys.exit(f"{flags.out}: is there already; remove it or name another")
    reader = GGUFReader(flags.source)

    def get(key: str, *default: object) -> Any:
        if key not in reader.fields:
            return default[0] if default else sys.exit(f"{flags.source}: {key} is missing")
        return reader.fields[key].contents()

    if get("general.architecture") != "llama":
        sys.exit(f"{flags.source}: {get('general.architecture')} is not supported, only llama is")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = model_config(get, tied, flags.dtype)
    files = {"config.json": config, **tokenizer_files(get)}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    arrays = dict(tensors(reader, heads, groups))
    flags.out.mkdir(parents=True)
    for name, content in files.items():
        (flags.out / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_safetensors(flags.out / "model.safetensors", arrays, flags.dtype)
    count = sum(values.size for values in arrays.values())
    print(f"{flags.out}: {count:,} parameters in {flags.dtype}")


if __name__ == "__main__":
    main()

"""What the tensors of a model are: parameters, buffers, copies; and what is no model's tensor.

A tensor's dtype does not tell: codes of quantised weights are integers as positions are, and their
scales are real numbers as weights are. So it is decided by the description and by the names.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from m2l.checkpoints.model_fields import parts, ties_embeddings
from m2l.checkpoints.spans import Span, TensorReader
from m2l.errors import CheckpointError
from m2l.typing import Json

ADAPTER_CONFIG = "adapter_config.json"
DELTA_RECORD = "delta.json"

_COMPARED = 4 << 20

# What no forward pass reads from a file, or what is no parameter though it is of real numbers.
_BUFFER = re.compile(
    r"(.*\.)?("
    r"inv_freq|original_inv_freq|masked_bias|position_ids|token_type_ids|num_batches_tracked"
    r"|relative_position_index|relative_coords_table|cos_cached|sin_cached|_float_tensor"
    r")"
    # In files of old T5 versions; nothing reads it.
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
# The causal masks of GPT-2, GPT-J and GPT-NeoX, [1, 1, length, length].
_MASK = re.compile(r"(.*\.)?(attn|attention)\.bias")

_ADAPTER = re.compile(
    r"(.*[._])?("
    r"lora_(A|B|E|a|b|down|up|mid|embedding_A|embedding_B|magnitude_vector|ga_[ab])"
    r"|hada_w[12](_[ab])?|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|oft_[rR]|oft_blocks|boft_[RS]"
    r"|ia3_l|vera_lambda_[bd]|randlora_[AB]|adaption_(prompt|gate)|fourierft_spectrum"
    r"|prompt_embeddings|dora_scale|road_theta|miss_block|bone"
    r")(\..*|$)"
)

# The last component of names: of what only quantised weights have, and of what scales codes.
_CODES = re.compile(
    r"qweight|qzeros|g_idx|W_q|Qidxs|SCB|quant_map|absmax|nested_absmax|codes|weight_shape"
    r"|.*quant_state.*|bitsandbytes__\w+"
)
_SCALE = re.compile(
    r".*(scales?|scale_inv|scale_\d|absmax|zeros?|zero_points?|SCB|codebooks?|centroids|quant_map)"
)
_WEIGHT = re.compile(r"(.*[._])?(weight|kernel|embedding|packed|blocks|qdata|int_data)")

# Inputs of a language model, and its outputs, which may be the same matrix.
_INPUT = re.compile(
    r"(.*\.)?(shared|embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|token_embedding)"
    r"\.weight"
)
_OUTPUT = re.compile(
    r"(.*\.)?(lm_head|lm_head\.decoder|embed_out|proj_out|output|output_projection|predictions"
    r"\.decoder)\.weight"
)
# Biases of an output, saved under two names.
_BIASES = {"lm_head.decoder.bias": "lm_head.bias", "predictions.decoder.bias": "predictions.bias"}


def is_float(dtype: DTypeLike) -> bool:
    """Returns whether a dtype is of real numbers."""
    return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)


def is_buffer(name: str, tensor: TensorReader) -> bool:
    """Returns whether a tensor is no parameter: a merge copies it, and it may differ."""
    if not is_float(tensor.dtype) or _BUFFER.fullmatch(name):
        return True
    return len(tensor.shape) == 4 and _MASK.fullmatch(name) is not None


def check_no_adapter(path: Path, names: Iterable[str] = ()) -> None:
    """Refuses an adapter: a directory or file of one, or tensors named as an adapter's are.

    And the directory of a delta.

    Raises:
        CheckpointError: It is one; the message says what to do.
    """
    if (path / DELTA_RECORD).is_file():
        raise CheckpointError(
            f"{path}: a delta, which is a model together with its base: name BASE+{path}"
        )
    directory = path if path.is_dir() else path.parent
    weights = sorted(directory.glob("adapter_model*.*")) if path.is_dir() else []
    alone = (directory / ADAPTER_CONFIG).is_file() and not any(path.glob("model*.safetensors*"))
    named = next((name for name in names if _ADAPTER.fullmatch(name)), None)
    if path.name.startswith("adapter_model") or weights or (path.is_dir() and alone) or named:
        reason = (
            f"its tensor {named}" if named else f"{(weights or [path / ADAPTER_CONFIG])[0].name}"
        )
        raise CheckpointError(
            f"{path}: it holds an adapter ({reason}), whose factors mean nothing apart from its "
            "base: name it after its base, as BASE+ADAPTER, or merge the two first (PEFT: "
            "model.merge_and_unload(), then save_pretrained(DIR))"
        )


def check_not_quantized(
    path: Path, config: Mapping[str, Json], tensors: Mapping[str, TensorReader]
) -> None:
    """Refuses weights that are stored as codes, whose numbers are not the weights'.

    Args:
        path: The model, for the message.
        config: Its config.json; empty where there is none.
        tensors: Its tensors by name.

    Raises:
        CheckpointError: Naming the field, the file or the tensor that shows it.
    """
    directory = path if path.is_dir() else path.parent
    for field, value in _quantization_fields(config):
        method = value.get("quant_method") if isinstance(value, Mapping) else value
        _refuse_quantized(directory / "config.json", f"{field} says {method!s:.60}")
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if (directory / name).is_file():
            _refuse_quantized(directory / name, "which that file describes")
    modules: dict[str, list[str]] = {}
    for name in tensors:
        module, _, last = name.replace("/", ".").rpartition(".")
        modules.setdefault(module, []).append(last)
    for name, tensor in tensors.items():
        if tensor.dtype == bool or _is_plain_float(tensor.dtype) or _BUFFER.fullmatch(name):
            continue
        module, _, last = name.replace("/", ".").rpartition(".")
        siblings = [*modules[module], *modules.get(f"{module}.{last}".lstrip("."), ())]
        scale = next((each for each in siblings if each != last and _SCALE.fullmatch(each)), None)
        if (
            is_float(tensor.dtype)  # of 8 bits and fewer: of no use without a scale
            or _CODES.fullmatch(last)
            or _WEIGHT.fullmatch(last)
            or (scale is not None and tensor.shape)
            or _holds_codes(tensor)
        ):
            reason = f"{name} is {tensor.dtype.name}{list(tensor.shape)}"
            _refuse_quantized(path, reason + (f" next to {scale}" if scale else ""))


def _is_plain_float(dtype: np.dtype) -> bool:
    return is_float(dtype) and np.dtype(dtype).itemsize > 1


def _holds_codes(tensor: TensorReader) -> bool:
    """Returns whether a matrix of bytes has more than the zeros and ones of a mask."""
    if np.dtype(tensor.dtype).itemsize > 1 or len(tensor.shape) < 2 or not tensor.size:
        return False
    block = np.empty(min(tensor.size, _COMPARED), tensor.dtype)
    tensor.read_span(Span("", 0, block.size), block)
    return not np.isin(block, (0, 1)).all()


def _quantization_fields(config: Mapping[str, Json]) -> Iterable[tuple[str, Json]]:
    for name in ("quantization_config", "compression_config"):
        if config.get(name):
            yield name, config[name]
    for name, part in parts(config).items():
        yield from ((f"{name}.{field}", value) for field, value in _quantization_fields(part))


def _refuse_quantized(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: its weights are quantised ({reason}), and codes and scales cannot be computed "
        "with apart: use the model's unquantised weights, or write them out first (transformers: "
        "model.dequantize(), then save_pretrained(DIR))"
    )


def copies(tensors: Mapping[str, TensorReader]) -> dict[str, str]:
    """Returns which tensors repeat a language model's embedding, by name: copy -> original.

    Outputs, second names of the embedding and second names of an output's bias are looked at,
    whatever the family. A copy equals its original bit for bit; the embedding is the original.
    """
    inputs = sorted(
        (name for name in tensors if _INPUT.fullmatch(name)),
        key=lambda name: (".shared." not in f".{name}", "coder." in name, name),
    )
    result: dict[str, str] = {}
    for name in [name for name in tensors if _OUTPUT.fullmatch(name)] + inputs[:0:-1]:
        for original in inputs:
            if original == name:
                break
            if same_elements(tensors[name], tensors[original]):
                result[name] = original
                break
    for name in tensors:
        ending = next((each for each in _BIASES if f".{name}".endswith(f".{each}")), None)
        original = "" if ending is None else name.removesuffix(ending) + _BIASES[ending]
        if original in tensors and same_elements(tensors[name], tensors[original]):
            result[name] = original
    return result


CONV1D = ("gpt2", "openai-gpt")
"""Types of models whose kernels Hugging Face stores as [in, out]."""

EMBEDDING = re.compile(
    r"(.*\.)?(shared|embed_tokens|wte|wpe|word_embeddings|embed_in|tok_embeddings|embed_positions"
    r"|relative_attention_bias|position_embeddings|token_type_embeddings)\.weight"
)
"""Names of tables in Hugging Face's models, whose rows are looked up."""


def has_output_rows(name: str, native: bool, model: Mapping[str, Json]) -> bool:
    """Returns whether the rows of a matrix are those of Hugging Face's: a kernel's outputs.

    Args:
        name: The parameter's.
        native: Whether it is named and stored as Hugging Face does; otherwise as Flax does.
        model: The description of the model.
    """
    if native:
        return model.get("model_type") not in CONV1D or bool(EMBEDDING.fullmatch(name))
    return name.rpartition("/")[2] in _TABLES


_TABLES = ("token_embedder", "embedding", "input_embedding")


def is_lookup(name: str) -> bool:
    """Returns whether a matrix is a table that is looked up, and not multiplied, by its name."""
    own = name.rpartition("/")[2] in (*_TABLES, "relpos_bias")
    return own or EMBEDDING.fullmatch(name) is not None


def is_input(name: str) -> bool:
    """Returns whether a tensor is a language model's embedding of tokens, by its name."""
    return _INPUT.fullmatch(name) is not None


def is_vocabulary(name: str) -> bool:
    """Returns whether a tensor has a row or column for each token, by its name."""
    own = name in ("token_embedder", "decoder/logits")
    return own or bool(_INPUT.fullmatch(name) or _OUTPUT.fullmatch(name))


_OUTPUT_BIAS = re.compile(
    r"(.*\.)?(lm_head|lm_head\.decoder|embed_out|predictions|predictions\.decoder)\.bias"
    r"|final_logits_bias"
)


def token_axis(name: str, shape: Sequence[int]) -> int | None:
    """Returns the axis of a tensor that counts tokens, by its name; None: none does."""
    if name == "decoder/logits" or _OUTPUT_BIAS.fullmatch(name):
        return len(shape) - 1
    return 0 if is_vocabulary(name) else None


def embedding_rows(tensors: Mapping[str, TensorReader]) -> int | None:
    """Returns how many rows the embedding has; None: no tensor is one by its name."""
    names = (name for name in tensors if name == "token_embedder" or _INPUT.fullmatch(name))
    return next((tensors[name].shape[0] for name in names), None)


def check_ties(path: Path, config: Mapping[str, Json], tensors: Mapping[str, TensorReader]) -> None:
    """Refuses an output of its own in a model whose description says that it has none.

    Raises:
        CheckpointError: Naming the two tensors.
    """
    if not ties_embeddings(config) or config.get("model_type") == "mt5":
        return
    if config.get("scale_decoder_outputs") is False:
        return  # A T5 of transformers 5, whose weights decide.
    repeated = copies(tensors)
    inputs = [name for name in tensors if _INPUT.fullmatch(name)]
    for name in filter(_OUTPUT.fullmatch, tensors):
        original = next((n for n in inputs if tensors[n].shape == tensors[name].shape), None)
        if name not in repeated and original is not None:
            raise CheckpointError(
                f"{path}: {name} differs from {original}, though the configuration says that the "
                "model has one embedding: set tie_word_embeddings to what it is, or remove the "
                "tensor"
            )


def same_elements(one: TensorReader, other: TensorReader) -> bool:
    """Returns whether two tensors are equal bit for bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    for start in range(0, one.size, _COMPARED):
        span = Span("", start, min(_COMPARED, one.size - start))
        left, right = np.empty(span.size, one.dtype), np.empty(span.size, one.dtype)
        one.read_span(span, left)
        other.read_span(span, right)
        if not np.array_equal(left.view(np.uint8), right.view(np.uint8)):
            return False
    return True

"""T5X checkpoints become m2l's, and m2l's become T5X's: what `m2l convert` does.

T5X has two T5s. `examples/t5` is the published one. `examples/scalable_t5` stacks its layers along
axis 1 ("encoder/encoder/..."), keeps the heads of attention kernels apart, and gives every layer a
table of position biases of its own. `t5x_files` reads the files.
"""

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

from jax.typing import DTypeLike

from m2l import models
from m2l.checkpoints import reading, t5x_files
from m2l.checkpoints.importing import Origin, Tensor, float_dtype, import_tensors
from m2l.checkpoints.manifest import Manifest
from m2l.checkpoints.t5x_files import read, resolve
from m2l.errors import CheckpointError, UnsupportedModelError
from m2l.models.t5 import T5Config

__all__ = ["export_checkpoint", "import_checkpoint", "infer_config", "origins", "read"]

_LAYER_AXIS = 1

# m2l's name of a part of a layer -> T5X's, for the names that differ.
_NORMS = {
    "encoder": {
        "pre_self_attention_norm": "pre_attention_layer_norm",
        "pre_mlp_norm": "pre_mlp_layer_norm",
    },
    "decoder": {
        "pre_self_attention_norm": "pre_self_attention_layer_norm",
        "pre_cross_attention_norm": "pre_cross_attention_layer_norm",
        "pre_mlp_norm": "pre_mlp_layer_norm",
    },
}
_ATTENTIONS = {
    "encoder": {"self_attention": "attention"},
    "decoder": {
        "self_attention": "self_attention",
        "cross_attention": "encoder_decoder_attention",
    },
}


def import_checkpoint(
    source: str | PathLike,
    out: str | PathLike,
    *,
    vocabulary: Mapping[str, Any],
    config: T5Config | None = None,
    dtype: DTypeLike | None = None,
) -> Manifest:
    """Makes an m2l checkpoint of a T5X checkpoint's parameters, array by array.

    Args:
        source: A checkpoint_<step>, or the MODEL_DIR of a run, whose newest is taken.
        out: The checkpoint to make; must not exist.
        vocabulary: {"name", "size", "fingerprint"} of the one the model was trained with.
        config: What the model is; None: what `infer_config` finds.
        dtype: Of the parameters written; None: as they are stored.

    Returns:
        The manifest of `out`. Its made_by records the absolute path of the checkpoint, and the
        step that its name gives.

    Raises:
        CheckpointError: Not a T5X checkpoint; a file is missing or damaged; an array is missing,
            unknown or of another shape than the config says; or the layers have tables of position
            biases that differ, which no T5 of m2l has.
        ConfigError: The sizes found are not those of a T5.
        UnknownNameError: There is no such dtype.
    """
    directory = resolve(source)
    tensors = read(directory)
    config = infer_config(tensors) if config is None else config
    for name, tensor in tensors.items():
        if name.endswith("relpos_bias/rel_embedding"):
            tensor.read()  # So that layers whose tables differ are refused before the long copy.
    step = re.fullmatch(r"checkpoint_([0-9]+)", directory.name)
    made_by = {"kind": "convert", "from": "t5x", "source": str(directory)}
    return import_tensors(
        out,
        config,
        tensors,
        origins(config, tensors),
        source=directory,
        vocabulary=vocabulary,
        made_by=made_by | ({"step": int(step[1])} if step else {}),
        dtype=dtype,
        at_once=2,  # Three in memory, for the one being read is there twice.
    )


def export_checkpoint(
    source: str | PathLike, out: str | PathLike, *, dtype: DTypeLike | None = None
) -> Any:
    """Makes a T5X checkpoint, in its own format and the names of examples/t5, of one of m2l's.

    It has no optimizer's state. Its digests are checked on the way.

    Args:
        source: A checkpoint or a training run.
        out: The checkpoint to make, as "MODEL_DIR/checkpoint_1000"; must not exist.
        dtype: "float32", "bfloat16" or "float16", to which parameters are cast; None keeps theirs.

    Returns:
        `out`, absolute.

    Raises:
        CheckpointError: The source is missing or damaged, has a value too large for `dtype`; or
            `out` exists.
        UnsupportedModelError: The model is no T5.
        UnknownNameError: There is no such dtype.
    """
    directory = reading.resolve(source)
    manifest = Manifest.read(directory)
    config = models.from_dict(manifest.model)
    if not isinstance(config, T5Config):
        raise UnsupportedModelError(
            f"{directory}: a {config.model_type}; T5X's checkpoints are of T5s: convert it "
            "--to huggingface"
        )
    cast = None if dtype is None else float_dtype(dtype)
    stored = reading.open_parameters(directory)
    arrays = {origin.tensor: stored[name] for name, origin in origins(config, {}).items()}
    return t5x_files.write(out, arrays, step=manifest.step, dtype=cast)


def infer_config(tensors: Mapping[str, Tensor]) -> T5Config:
    """Finds out which T5 the parameters that `read` gave are of.

    Sizes come from the shapes: heads and buckets from the encoder's relpos_bias, d_kv from the
    query's kernel, layers by counting. With mlp/wi_0 the MLP is gated, and then by the tanh form of
    GELU; otherwise it is a ReLU's. Without decoder/logits_dense the output is tied to the embedding
    and scaled. These are T5 1.1 (FLAN-T5, T0, mT5, ByT5) and T5 1.0. No array tells the rest, which
    is as published: epsilon 1e-6, distances up to 128, targets started by token 0. Give
    `import_checkpoint` a config where a model differs in these.

    Raises:
        CheckpointError: An array that a T5 has is missing or has another rank.
        ConfigError: The sizes are not those of a T5.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{name}: no such array in the checkpoint: it is not of a T5")
        found = tensors[name].shape
        if len(found) != rank or 0 in found:
            raise CheckpointError(f"{name}: expected {rank} axes, found the shape {list(found)}")
        return found

    def layer_shape(stack: str, name: str, rank: int) -> tuple[int, ...]:
        """Of the layers' array `name`, without the axis of layers."""
        if not _is_scanned(stack, tensors):
            return shape(f"{stack}/layers_0/{name}", rank)
        found = shape(f"{stack}/{stack}/{name}", rank + 1)
        return found[:_LAYER_AXIS] + found[_LAYER_AXIS + 1 :]

    def layers(stack: str) -> int:
        if _is_scanned(stack, tensors):
            features, count = shape(f"{stack}/{stack}/pre_mlp_layer_norm/scale", 2)
            if features != d_model:
                raise CheckpointError(
                    f"{stack}/{stack}/pre_mlp_layer_norm/scale: expected the shape "
                    f"[{d_model}, layers], found {[features, count]}: only layers stacked along "
                    f"axis {_LAYER_AXIS} are read (T5X's param_scan_axis)"
                )
            return count
        # Counted, and not the highest plus one: a name may claim any number.
        return len({name.split("/")[1] for name in tensors if name.startswith(f"{stack}/layers_")})

    vocab_size, d_model = shape("token_embedder/embedding", 2)
    encoder_layers, decoder_layers = layers("encoder"), layers("decoder")
    heads, buckets = shape("encoder/relpos_bias/rel_embedding", 2)
    joined = layer_shape("encoder", "attention/query/kernel", 2)[1]
    if joined % heads:
        raise CheckpointError(
            f"encoder attention/query/kernel: its {joined} columns are no multiple of the {heads} "
            "heads of encoder relpos_bias"
        )
    tied = "decoder/logits_dense/kernel" not in tensors
    gated = any(name.endswith("/mlp/wi_0/kernel") for name in tensors)
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=joined // heads,
        d_ff=layer_shape("encoder", "mlp/wo/kernel", 2)[0],
        num_heads=heads,
        num_encoder_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tied,
        scale_decoder_outputs=tied,
    )


def origins(config: T5Config, tensors: Mapping[str, Tensor]) -> dict[str, Origin]:
    """Where each parameter of `config` is among the tensors that `read` gave.

    Returns:
        m2l's name -> Origin, for every parameter of the config, whether its tensor is there or not.
        A parameter of stacked layers is a slice of axis 1.
    """
    gated = config.feed_forward_proj.startswith("gated")
    found = {"token_embedder": Origin("token_embedder/embedding")}
    for stack in _NORMS:
        scanned = _is_scanned(stack, tensors)
        count = config.num_encoder_layers if stack == "encoder" else config.num_decoder_layers
        parts = {ours: f"{theirs}/scale" for ours, theirs in _NORMS[stack].items()}
        for ours, theirs in _ATTENTIONS[stack].items():
            for matrix in ("query", "key", "value", "out"):
                parts[f"{ours}/{matrix}"] = f"{theirs}/{matrix}/kernel"
        for matrix in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
            parts[f"mlp/{matrix}"] = f"mlp/{matrix}/kernel"

        found[f"{stack}/relpos_bias"] = Origin(f"{stack}/relpos_bias/rel_embedding")
        if scanned:
            found |= {
                f"{stack}/layers_{i:02}/{ours}": Origin(
                    f"{stack}/{stack}/{theirs}", axis=_LAYER_AXIS, index=i
                )
                for ours, theirs in parts.items()
                for i in range(count)
            }
        else:
            found |= {
                f"{stack}/layers_{i:02}/{ours}": Origin(f"{stack}/layers_{i}/{theirs}")
                for i in range(count)
                for ours, theirs in parts.items()
            }
        found[f"{stack}/norm"] = Origin(f"{stack}/{stack}_norm/scale")
    if not config.tie_word_embeddings:
        found["decoder/logits"] = Origin("decoder/logits_dense/kernel")
    return found


def _is_scanned(stack: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(f"{stack}/{stack}/") for name in tensors)

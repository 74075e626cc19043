"""Hugging Face's config.json as a model's settings, and back.

The defaults are those of transformers 5.24, whose classes a file is completed by; files that
transformers 4 wrote are read as it read them.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from m2l.checkpoints.model_fields import HARMLESS, read_json, words
from m2l.errors import CheckpointError, M2LError, UnknownNameError, UnsupportedModelError
from m2l.files import GENERATION
from m2l.models import Config, LlamaConfig, T5Config
from m2l.typing import Json, JsonObject

CONFIG = "config.json"

ARCHITECTURES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}

_LLAMA_DEFAULTS: Mapping[str, Mapping[str, Json]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "gemma2": {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}
_SCALED_ROPES = ("llama3", "yarn")
_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
    ),
}
_SLIDES, _SEES_ALL = "sliding_attention", "full_attention"


# Fields that decide something which is not in the networks here, unless they are one of these.
_MUST_BE: Mapping[str, tuple[Json, ...]] = {
    "add_cross_attention": (None, False),
    "compression_config": (None,),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}, []),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
    "tie_encoder_decoder": (None, False),
    "use_bidirectional_attention": (None, False),
    "use_mrope": (None, False),
}
T5_FIELDS = words(
    """
    vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads
    relative_attention_num_buckets relative_attention_max_distance feed_forward_proj
    layer_norm_epsilon tie_word_embeddings scale_decoder_outputs
    """
)
LLAMA_FIELDS = words(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act hidden_activation max_position_embeddings rms_norm_eps
    tie_word_embeddings attention_bias sliding_window sliding_window_size use_sliding_window
    max_window_layers layer_types rope_theta rope_scaling rope_parameters
    original_max_position_embeddings query_pre_attn_scalar attn_logit_softcapping
    final_logit_softcapping
    """
)


class Fields:
    """The fields of a config.json; errors name the field and the file."""

    def __init__(self, file: Path, values: Mapping[str, Json]):
        self._file, self._values = file, values

    def completed(self, defaults: Mapping[str, Json]) -> "Fields":
        """Returns these fields, with defaults for those that are absent."""
        return Fields(self._file, {**defaults, **self._values})

    def refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self._file}: {problem}")

    def unsupported(self, problem: str) -> NoReturn:
        """Refuses what the networks here do not have; the model itself may be sound."""
        raise UnsupportedModelError(f"{self._file}: {problem}")

    def __getitem__(self, name: str) -> Json:
        if name not in self._values:
            self.unsupported(f"the field {name!r} is missing")
        return self._values[name]

    def get(self, name: str, default: Json = None) -> Json:
        return self._values.get(name, default)

    def check(self, known: frozenset[str]) -> None:
        """Refuses what cannot be honoured, and warns once of what is not known."""
        for name, allowed in _MUST_BE.items():
            if self.get(name) not in allowed:
                shown = str(self.get(name))
                shown = shown if len(shown) <= 60 else shown[:57] + "..."
                self.unsupported(f"{name} = {shown} is not supported")
        unknown = sorted(set(self._values) - known - HARMLESS - set(_MUST_BE))
        if unknown:
            warnings.warn(
                f"{self._file}: unknown fields, taken to decide nothing: {', '.join(unknown)}",
                stacklevel=3,
            )


def read_settings(directory: Path, *, tied: bool | None) -> Config:
    """Returns the model that a directory's config.json describes.

    Args:
        directory: Where config.json is and, for fields that transformers 5 moved there,
            generation_config.json.
        tied: Whether the file of the weights ties a T5's output to its embedding; a decoder's is
            decided by config.json alone. None: config.json decides.

    Raises:
        CheckpointError: A field is missing, or cannot be honoured; the model is of no known type.
    """
    file = directory / CONFIG
    values = read_json(file)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file}: the model type {model_type!r} is not supported; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    fields = Fields(file, values)
    try:
        if model_type in ("t5", "mt5"):
            fields.check(T5_FIELDS)
            generation = directory / GENERATION
            moved = read_json(generation) if generation.is_file() else {}
            return _t5(fields, model_type, tied, moved.get("decoder_start_token_id"))
        fields.check(LLAMA_FIELDS)
        return _llama(fields, model_type)
    except CheckpointError:
        raise
    except UnknownNameError as error:
        # Of an activation, or a projection, that the networks here do not have.
        raise UnsupportedModelError(f"{file}: {error}") from error
    except M2LError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: a field is of the wrong type ({error})") from error


def _t5(fields: Fields, model_type: str, tied: bool | None, start: int | None) -> T5Config:
    if fields.get("pad_token_id", 0) != 0:
        fields.unsupported(
            f"pad_token_id = {fields.get('pad_token_id')} is not supported, only 0 is"
        )
    if fields.get("decoder_start_token_id") is not None or start is None:
        start = fields.get("decoder_start_token_id", 0 if model_type == "mt5" else None)
    if start is None:
        fields.unsupported("the field 'decoder_start_token_id' is missing; T5's own is 0")
    # transformers 5 ties every mT5 and T5, and says in another field whether a T5 scales; its mT5
    # never does.
    flag = fields.get("tie_word_embeddings", model_type == "t5") is not False
    writer_is_5 = str(fields.get("transformers_version", "")).split(".")[0] >= "5"
    unscaled = model_type == "mt5" and writer_is_5
    scaled = bool(fields.get("scale_decoder_outputs", flag and not unscaled))
    tied = flag if tied is None else tied
    if scaled and not tied:
        fields.refuse(
            "the output is to be tied to the embedding and scaled, but the weights have an "
            "lm_head.weight of its own: transformers 4 and 5 would compute different things; set "
            "tie_word_embeddings to false if the model is a T5 1.1"
        )
    projection = fields.get("feed_forward_proj", "relu" if model_type == "t5" else "gated-gelu")
    decoder_layers = fields.get("num_decoder_layers")
    return T5Config(
        vocab_size=fields["vocab_size"],
        d_model=fields["d_model"],
        d_kv=fields["d_kv"],
        d_ff=fields["d_ff"],
        num_heads=fields["num_heads"],
        num_encoder_layers=fields["num_layers"],
        num_decoder_layers=fields["num_layers"] if decoder_layers is None else decoder_layers,
        relative_attention_num_buckets=fields.get("relative_attention_num_buckets", 32),
        relative_attention_max_distance=fields.get("relative_attention_max_distance", 128),
        layer_norm_epsilon=fields.get("layer_norm_epsilon", 1e-6),
        model_type=model_type,
        feed_forward_proj={"gated-gelu_new": "gated-gelu"}.get(projection, projection),
        tie_word_embeddings=tied,
        scale_decoder_outputs=scaled,
        decoder_start_token_id=start,
    )


def _llama(fields: Fields, model_type: str) -> LlamaConfig:
    fields = fields.completed(_LLAMA_DEFAULTS[model_type])
    heads, gemma = fields["num_attention_heads"], model_type == "gemma2"
    head_dim, groups = fields.get("head_dim"), fields.get("num_key_value_heads")
    if head_dim is None:
        if type(heads) is not int or heads < 1 or fields["hidden_size"] % heads:
            fields.refuse(f"{heads} attention heads do not divide hidden_size")
        head_dim = fields["hidden_size"] // heads
    # Mistral and Qwen2 do not read the field: Qwen2 has three biases, Mistral none.
    bias = model_type in ("llama", "gemma2") and bool(fields.get("attention_bias"))
    activation = fields["hidden_activation"] if gemma else fields.get("hidden_act", "silu")
    settings: JsonObject = {}
    if gemma:
        settings = {
            "norm_offset": 1.0,
            "scale_embeddings": True,
            "post_norms": True,
            "query_pre_attn_scalar": fields["query_pre_attn_scalar"],
            "attn_logit_softcapping": fields["attn_logit_softcapping"] or 0.0,
            "final_logit_softcapping": fields["final_logit_softcapping"] or 0.0,
        }
    sizes = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "max_position_embeddings",
    )  # fmt: skip
    return LlamaConfig(
        **{name: fields[name] for name in sizes},
        num_attention_heads=heads,
        num_key_value_heads=heads if groups is None else groups,
        head_dim=head_dim,
        model_type=model_type,
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        hidden_act={"swish": "silu"}.get(activation, activation),
        qkv_bias=bias or model_type == "qwen2",
        out_bias=bias,
        windows=_windows(fields, model_type),
        **_rope(fields),
        **settings,
    )


def _windows(fields: Fields, model_type: str) -> tuple[int, ...]:
    """Returns the width of each layer's window, 0 for none; empty where no layer has one."""
    layers, width = fields["num_hidden_layers"], fields.get("sliding_window")
    if type(layers) is not int:
        fields.refuse(f"num_hidden_layers = {layers!r} is no number")
    if model_type == "llama" or (model_type == "qwen2" and not fields.get("use_sliding_window")):
        width = None
    slides = [width is not None] * layers
    if model_type == "qwen2":
        slides = [s and i >= fields["max_window_layers"] for i, s in enumerate(slides)]
    elif model_type == "gemma2":
        slides = [i % 2 == 0 for i in range(layers)]
    if (types := fields.get("layer_types")) is not None:
        if set(types) - {_SLIDES, _SEES_ALL} or len(types) != layers:
            fields.unsupported(f"layer_types = {types} is not supported")
        listed = [kind == _SLIDES for kind in types]
        if model_type in ("llama", "mistral") and listed != slides:
            fields.refuse(
                f"layer_types does not agree with sliding_window, and a {model_type} model of "
                "transformers reads that alone"
            )
        slides = listed
    if any(slides) and (type(width) is not int or width < 1):
        fields.refuse(f"sliding_window = {width!r}, but there are layers that slide")
    return tuple(width if s else 0 for s in slides) if any(slides) else ()


def _rope(fields: Fields) -> JsonObject:
    """Returns the rope_ settings, from transformers 4's two fields or transformers 5's one."""
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        fields.unsupported(f"rope_parameters = {rope} is not supported: one set for all layers is")
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        fields.unsupported(
            f"the rope type {kind!r} is not supported; known are {', '.join(_ROPE_KEYS)}"
        )
    settings = {
        "rope_type": kind,
        "rope_theta": rope.get("rope_theta", fields.get("rope_theta", 10000.0)),
    }
    if kind in _SCALED_ROPES:
        rope.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
        if (outside := fields.get("original_max_position_embeddings")) is not None:
            rope["original_max_position_embeddings"] = outside
    if kind == "yarn":
        rope = _plain_yarn(rope)
    known = {"rope_type", "type", "rope_theta", "finetuned"}
    if rope.get("partial_rotary_factor") == 1:
        known.add("partial_rotary_factor")
    # The default type reads nothing.
    extra = sorted(set(rope) - known - set(_ROPE_KEYS[kind])) if kind != "default" else []
    if extra or rope.get("partial_rotary_factor", 1) != 1:
        named = ", ".join(extra or ["partial_rotary_factor"])
        fields.unsupported(f"{named} of the rope type {kind!r} is not supported")
    needed = {"linear": 1, "llama3": 4, "yarn": 2}.get(kind, 0)
    for name in _ROPE_KEYS[kind][:needed]:
        if name not in rope:
            fields.refuse(f"the rope type {kind!r} needs {name}")
    return settings | {f"rope_{name}": rope[name] for name in _ROPE_KEYS[kind] if name in rope}


def _plain_yarn(rope: JsonObject) -> JsonObject:
    """Resolves the two scales that only decide the attention factor, and drops a default."""
    rope = dict(rope)
    first, second = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if first and second and "attention_factor" not in rope and rope.get("factor", 0) > 1:
        growth = 0.1 * math.log(rope["factor"])
        rope["attention_factor"] = (growth * first + 1.0) / (growth * second + 1.0)
    if rope.get("truncate") is True:
        del rope["truncate"]
    return rope


def to_json(config: Config, dtype: str, tokens: Mapping[str, Json]) -> JsonObject:
    """Returns the config.json of a model, which transformers 4 and 5 read alike.

    Args:
        config: The model.
        dtype: Of its weights.
        tokens: bos_token_id, eos_token_id and pad_token_id where they are known.

    Raises:
        CheckpointError: Models of its type cannot have these settings there.
    """
    values: JsonObject = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    values |= {name: tokens.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if isinstance(config, T5Config):
        return values | _t5_values(config, values["eos_token_id"])
    return values | _llama_values(config)


def _t5_values(config: T5Config, eos: Json) -> JsonObject:
    if config.scale_decoder_outputs and config.model_type == "mt5":
        raise CheckpointError(
            "T5Config.scale_decoder_outputs: an mT5 of transformers 5 scales nothing; export it "
            "with model_type 't5'"
        )
    return {
        "is_encoder_decoder": True,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "feed_forward_proj": config.feed_forward_proj,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        # transformers 4 takes tied for scaled: see `writes_output`.
        "tie_word_embeddings": config.scale_decoder_outputs,
        "scale_decoder_outputs": config.scale_decoder_outputs,
        "eos_token_id": 1 if eos is None else eos,
        "pad_token_id": 0,
        "decoder_start_token_id": config.decoder_start_token_id,
    }


def writes_output(config: Config) -> bool:
    """Returns whether an export has an lm_head.weight.

    So has that of a T5 whose output is tied but not scaled: a copy of the embedding is all that
    transformers 4 understands, and transformers 5 compares the two.
    """
    if isinstance(config, T5Config):
        return not config.scale_decoder_outputs
    return not config.tie_word_embeddings


def _llama_values(config: LlamaConfig) -> JsonObject:
    rope = {"rope_type": config.rope_type}
    for name in _ROPE_KEYS[config.rope_type]:
        value = getattr(config, f"rope_{name}")
        if name != "attention_factor" or value:
            rope[name] = value
    fields = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
        "tie_word_embeddings",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in fields} | {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_type == "default" else rope,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }
    types = [_SLIDES if width else _SEES_ALL for width in config.windows]
    width = max(config.windows, default=0) or None
    if config.model_type == "llama":
        values |= {"attention_bias": config.qkv_bias, "mlp_bias": False}
    elif config.model_type == "mistral":
        values["sliding_window"] = width
    elif config.model_type == "qwen2":
        first = types.index(_SLIDES) if width else config.num_hidden_layers
        values |= {
            "use_sliding_window": width is not None,
            "sliding_window": width,
            "max_window_layers": first,
            "layer_types": types or [_SEES_ALL] * config.num_hidden_layers,
        }
    else:
        scalar = config.query_pre_attn_scalar or float(config.head_dim)
        values |= {
            "hidden_activation": config.hidden_act,
            "attention_bias": config.qkv_bias,
            "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
            "attn_logit_softcapping": config.attn_logit_softcapping or None,
            "final_logit_softcapping": config.final_logit_softcapping or None,
            "sliding_window": width,
            "layer_types": types or [_SEES_ALL] * config.num_hidden_layers,
        }
    _check_expressible(config, values)
    return values


def _check_expressible(config: LlamaConfig, values: Mapping[str, Json]) -> None:
    """Refuses settings that the file's reader would not find in it."""
    read = _llama(
        Fields(Path(CONFIG), values | {"vocab_size": config.vocab_size}), config.model_type
    )
    scalar = config.query_pre_attn_scalar or float(config.head_dim)
    for name in type(config).__dataclass_fields__:
        expected, actual = getattr(config, name), getattr(read, name)
        if name == "query_pre_attn_scalar":
            expected, actual = scalar, actual or float(read.head_dim)
        elif name == "windows" and not any(expected):
            expected = ()
        # What belongs to other rope types decides nothing.
        unread = name.startswith("rope_") and name[5:] not in (
            "type",
            "theta",
            *_ROPE_KEYS[config.rope_type],
        )
        if expected != actual and not unread:
            raise CheckpointError(
                f"LlamaConfig.{name}: {expected} cannot be expressed in the config.json of a "
                f"{config.model_type} model, which transformers would read as {actual}"
            )

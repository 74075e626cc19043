"""Hugging Face's config.json as a model's settings, and back.

The defaults are those of transformers 5.24, whose classes a file is completed by; files that
transformers 4 wrote are read as it read them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from m2l.checkpoints.decoder_families import DECODER_FAMILIES, DecoderFamily
from m2l.checkpoints.model_fields import HARMLESS, IGNORED, read_json, words
from m2l.errors import CheckpointError, M2LError, UnknownNameError, UnsupportedModelError
from m2l.files import GENERATION
from m2l.models import Config, LlamaConfig, T5Config
from m2l.typing import Json, JsonObject

CONFIG = "config.json"

ARCHITECTURES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
} | {name: family.architecture for name, family in DECODER_FAMILIES.items()}

_SCALED_ROPES = ("llama3", "yarn", "longrope")
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
    "longrope": (
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
        "factor",
        "attention_factor",
    ),
}
_NEEDED_ROPE_KEYS = {"linear": 1, "llama3": 4, "yarn": 2, "longrope": 3}
_SLIDES, _SEES_ALL = "sliding_attention", "full_attention"


# Fields that decide something which is not in the networks here, unless they are one of these.
_MUST_BE: Mapping[str, tuple[Json, ...]] = {
    "add_cross_attention": (None, False),
    "clip_qkv": (None,),
    "compression_config": (None,),
    "decoder_sparse_step": (None, 1),
    "full_attn_mod": (None, 1),
    "interpolate_factor": (None, 1),
    "mlp_only_layers": (None, []),
    "mlp_bias": (None, False),
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
    max_window_layers layer_types sliding_window_pattern rope_theta rope_scaling rope_parameters
    rope_local_base_freq original_max_position_embeddings partial_rotary_factor no_rope_layers
    no_rope_layer_interval num_experts num_local_experts num_experts_per_tok moe_intermediate_size
    norm_topk_prob router_aux_loss_coef query_pre_attn_scalar attn_logit_softcapping
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

    def replaced(self, **values: Json) -> "Fields":
        """Returns these fields, some of them with other values."""
        return Fields(self._file, {**self._values, **values})

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
        """Refuses what cannot be honoured, and what is not known, unless it says "none"."""
        for name, allowed in _MUST_BE.items():
            if self.get(name) not in allowed:
                self.unsupported(f"{name} = {_short(self.get(name))} is not supported")
        for name, value in self._values.items():
            known_name = name in known | HARMLESS | IGNORED or name in _MUST_BE
            if value and not known_name and not name.startswith("_"):
                self.unsupported(
                    f"the field {name} = {_short(value)} is unknown; remove it if it decides "
                    "nothing of what the model computes"
                )


def _short(value: Json) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(
            f"{file}: a field is of the wrong type, length or range ({error})"
        ) from error


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
    if model_type == "mistral" and fields.get("layer_types") is not None:
        model_type = "ministral"  # As transformers reads it.
    family = DECODER_FAMILIES[model_type]
    # Two spellings of one field, of which transformers 5 reads and writes either.
    reads = family.reads.get("num_experts")
    for name in {"num_experts", "num_local_experts"} - {reads} if reads else ():
        if fields.get(name) is not None:
            fields = fields.completed({reads: fields.get(name)})
    fields = _without_unused_windows(fields.completed(family.defaults), family)
    heads, head_dim = fields["num_attention_heads"], fields.get("head_dim")
    groups, layers = fields.get("num_key_value_heads"), fields["num_hidden_layers"]
    if type(layers) is not int:
        fields.refuse(f"num_hidden_layers = {layers!r} is no number")
    if head_dim is None:
        if type(heads) is not int or heads < 1 or fields["hidden_size"] % heads:
            fields.refuse(f"{heads} attention heads do not divide hidden_size")
        head_dim = fields["hidden_size"] // heads
    if "rotary_layers" in family.reads and fields.get("no_rope_layers") is None:
        interval = fields["no_rope_layer_interval"]
        fields = fields.replaced(no_rope_layers=[(i + 1) % interval and 1 for i in range(layers)])
    values = {setting: fields.get(field) for setting, field in family.reads.items()}
    values = {setting: value for setting, value in values.items() if value is not None}
    if rotary := values.pop("rotary_layers", None):
        if len(rotary) < layers:
            fields.refuse(f"no_rope_layers: {len(rotary)} numbers for {layers} layers")
        values["rotary_layers"] = () if all(rotary[:layers]) else tuple(rotary[:layers])
    activation = values.pop("hidden_act", fields.get("hidden_act", "silu"))
    # An old value of Gemma's own files; transformers 5 reads it so as well.
    renamed = {"swish": "silu"} | ({"gelu": "gelu_pytorch_tanh"} if model_type == "gemma" else {})
    windows = _windows(fields, family)
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
        hidden_act=renamed.get(activation, activation),
        windows=windows,
        **values | family.settings | _rope(fields, family, windows),
    )


def _without_unused_windows(fields: Fields, family: DecoderFamily) -> Fields:
    if family.optional_windows and not fields.get("use_sliding_window"):
        return fields.replaced(sliding_window=None)
    return fields


def _windows(fields: Fields, family: DecoderFamily) -> tuple[int, ...]:
    """Returns the width of each layer's window, 0 for none; empty where no layer has one."""
    layers, width = fields["num_hidden_layers"], fields.get("sliding_window")
    slides = [family.slides(i, fields) for i in range(layers)]
    if (types := fields.get("layer_types")) is not None:
        if set(types) - {_SLIDES, _SEES_ALL} or len(types) != layers:
            fields.unsupported(f"layer_types = {types} is not supported")
        listed = [kind == _SLIDES for kind in types]
        if not family.lists_layers and listed != slides:
            fields.refuse(
                f"layer_types does not agree with sliding_window, and a {fields['model_type']} "
                "model of transformers reads that alone"
            )
        slides = listed
    if any(slides) and (type(width) is not int or width < 1):
        fields.refuse(f"sliding_window = {width!r}, but there are layers that slide")
    return tuple(width if s else 0 for s in slides) if any(slides) else ()


def _rope(fields: Fields, family: DecoderFamily, windows: tuple[int, ...]) -> JsonObject:
    """Returns the rotary settings, from transformers 4's two fields or transformers 5's one."""
    theta, scaling = fields.get("rope_theta", 10000.0), fields.get("rope_scaling")
    parameters = fields.get("rope_parameters") or {}
    nested = isinstance(parameters, Mapping) and any(
        isinstance(value, Mapping) for value in parameters.values()
    )
    if family.local_rope_theta is None or not nested:
        settings = _one_rope(fields, family, scaling or parameters, theta)
        local: JsonObject = {}
    else:
        if set(parameters) - {_SLIDES, _SEES_ALL}:
            fields.unsupported(f"rope_parameters = {_short(parameters)} is not supported")
        whole = {**(parameters.get(_SEES_ALL) or {}), **(scaling or {})}
        settings = _one_rope(fields, family, whole, theta)
        local = parameters.get(_SLIDES) or {}
    if family.local_rope_theta is None or not any(windows):
        return settings
    local = {"rope_theta": fields.get(family.local_rope_theta), **local}
    if local.get("rope_type", "default") != "default":
        fields.unsupported(f"rope_parameters: {_SLIDES} = {_short(local)}: only 'default' is")
    if settings["rope_type"] != "default" or settings["rope_theta"] != local["rope_theta"]:
        settings["rope_local_base_freq"] = local["rope_theta"]
    return settings


def _one_rope(fields: Fields, family: DecoderFamily, rope: Json, theta: Json) -> JsonObject:
    """Returns the rope_ settings that one set of parameters says."""
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        fields.unsupported(f"rope_parameters = {rope} is not supported: one set for all layers is")
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        fields.unsupported(
            f"the rope type {kind!r} is not supported; known are {', '.join(_ROPE_KEYS)}"
        )
    settings = {"rope_type": kind, "rope_theta": rope.get("rope_theta", theta)}
    share = rope.pop("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if share is not None and "partial_rotary_factor" in family.reads:
        settings["partial_rotary_factor"] = share
    elif share not in (None, 1):
        fields.unsupported(f"partial_rotary_factor = {_short(share)} is not supported")
    if kind in _SCALED_ROPES:
        rope.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
        if (outside := fields.get("original_max_position_embeddings")) is not None:
            rope["original_max_position_embeddings"] = outside
    if kind == "yarn":
        rope = _plain_yarn(rope)
    # The default type reads nothing.
    known = {"rope_type", "type", "rope_theta", "finetuned", *_ROPE_KEYS[kind]}
    if kind != "default" and (extra := sorted(set(rope) - known)):
        fields.unsupported(f"{', '.join(extra)} of the rope type {kind!r} is not supported")
    for name in _ROPE_KEYS[kind][: _NEEDED_ROPE_KEYS.get(kind, 0)]:
        if name not in rope:
            fields.refuse(f"the rope type {kind!r} needs {name}")
    if kind == "longrope":
        rope.setdefault("factor", _stretch(fields, rope["original_max_position_embeddings"]))
    return settings | {f"rope_{name}": rope[name] for name in _ROPE_KEYS[kind] if name in rope}


def _stretch(fields: Fields, original: Json) -> float:
    """Returns by how much a model's rows are longer than they were at first."""
    if type(original) is not int or original < 1:
        fields.refuse(f"original_max_position_embeddings = {original!r}")
    return fields["max_position_embeddings"] / original


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
    family = DECODER_FAMILIES[config.model_type]
    fields = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
        "tie_word_embeddings",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in fields}
    values |= {"attention_dropout": 0.0, "initializer_range": 0.02, "mlp_bias": False}
    values |= {field: getattr(config, setting) for setting, field in family.reads.items()}
    if "query_pre_attn_scalar" in values:
        scalar = config.query_pre_attn_scalar or float(config.head_dim)
        values["query_pre_attn_scalar"] = int(scalar) if scalar.is_integer() else scalar
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name in values:
            values[name] = values[name] or None
    if "no_rope_layers" in values:
        values["no_rope_layers"] = list(config.rotary_layers or [1] * config.num_hidden_layers)
    values |= _rope_values(config, family) | _window_values(config, family)
    _check_expressible(config, values)
    return values


def _window_values(config: LlamaConfig, family: DecoderFamily) -> JsonObject:
    types = [_SLIDES if width else _SEES_ALL for width in config.windows]
    width = max(config.windows, default=0) or None
    values: JsonObject = {}
    if "sliding_window" in family.defaults:
        values["sliding_window"] = width
    if family.lists_layers:
        values["layer_types"] = types or [_SEES_ALL] * config.num_hidden_layers
    if family.optional_windows:
        values["use_sliding_window"] = width is not None
    if "max_window_layers" in family.defaults:
        values["max_window_layers"] = types.index(_SLIDES) if width else config.num_hidden_layers
    return values


def _rope_values(config: LlamaConfig, family: DecoderFamily) -> JsonObject:
    """Returns rotary positions in the words of transformers 4 and of transformers 5."""
    rope: JsonObject = {"rope_type": config.rope_type}
    implied = {"attention_factor": 0.0}
    if config.rope_type == "longrope":
        original = config.rope_original_max_position_embeddings
        implied["factor"] = config.max_position_embeddings / original
    for name in _ROPE_KEYS[config.rope_type]:
        value = getattr(config, f"rope_{name}")
        if value != implied.get(name):
            rope[name] = list(value) if isinstance(value, tuple) else value
    whole = rope | {"rope_theta": config.rope_theta}
    values: JsonObject = {"rope_theta": config.rope_theta, "rope_parameters": whole}
    values["rope_scaling"] = None if config.rope_type == "default" else rope
    if "partial_rotary_factor" in family.reads:
        whole["partial_rotary_factor"] = config.partial_rotary_factor
    if family.local_rope_theta is not None:
        theta = config.rope_local_base_freq or config.rope_theta
        values[family.local_rope_theta] = theta
        values["rope_theta"] = config.rope_theta
        local = {"rope_type": "default", "rope_theta": theta}
        values["rope_parameters"] = {_SEES_ALL: whole, _SLIDES: local}
    if "original_max_position_embeddings" in family.defaults and config.rope_type == "longrope":
        # transformers 4 wants these three and nothing else.
        outside = "original_max_position_embeddings"
        values[outside] = rope.pop(outside)
        values["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    return values


def _check_expressible(config: LlamaConfig, values: Mapping[str, Json]) -> None:
    """Refuses settings that the file's reader would not find in it."""
    read = _llama(
        Fields(
            Path(CONFIG),
            values | {"vocab_size": config.vocab_size, "model_type": config.model_type},
        ),
        config.model_type,
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

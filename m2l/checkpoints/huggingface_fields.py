"""The fields of Hugging Face's config.json: which there are, and what is said of a wrong one."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from m2l import files
from m2l.errors import CheckpointError, UnsupportedModelError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields that decide nothing: names, training, generation, and what follows from other fields.
HARMLESS = _words(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
    cache_implementation chunk_size_feed_forward classifier_dropout cls_token_id
    cross_attention_hidden_size decoder_start_token_id dense_act_fn diversity_penalty do_sample
    dropout_rate dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder is_gated_act is_llama_config label2id length_penalty mask_token_id max_length
    min_length model_type n_positions name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_past
    output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache use_return_dict
    """
)
# Fields that decide something which is not in the networks here, unless they are one of these.
_MUST_BE: Mapping[str, tuple[Any, ...]] = {
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
T5_FIELDS = _words(
    """
    vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads
    relative_attention_num_buckets relative_attention_max_distance feed_forward_proj
    layer_norm_epsilon tie_word_embeddings scale_decoder_outputs
    """
)
LLAMA_FIELDS = _words(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act hidden_activation max_position_embeddings rms_norm_eps
    tie_word_embeddings attention_bias sliding_window sliding_window_size use_sliding_window
    max_window_layers layer_types rope_theta rope_scaling rope_parameters
    original_max_position_embeddings query_pre_attn_scalar attn_logit_softcapping
    final_logit_softcapping
    """
)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    return files.read_json(file, kind=dict, error=CheckpointError, advice="download it again")


class Fields:
    """What a config.json holds; what is wrong with a field is said with its name and the file's."""

    def __init__(self, file: Path, values: Mapping[str, Any]):
        self._file, self._values = file, values

    def completed(self, defaults: Mapping[str, Any]) -> "Fields":
        """The same, with defaults for what is absent."""
        return Fields(self._file, {**defaults, **self._values})

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._file}: {what}")

    def unsupported(self, what: str) -> NoReturn:
        """Refuses what the networks here do not have; the model itself may be sound."""
        raise UnsupportedModelError(f"{self._file}: {what}")

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            self.unsupported(f"the field {name!r} is missing")
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
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

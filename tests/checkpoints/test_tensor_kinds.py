"""Parameters, buffers, copies, codes and adapters are told apart by description and name."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from m2l.checkpoints import tensor_kinds
from m2l.errors import CheckpointError


@dataclasses.dataclass
class Tensor:
    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    @property
    def size(self):
        return self.array.size

    def read_span(self, span, out):
        out[:] = self.array.reshape(-1)[span.start : span.start + span.size]


def tensor(shape=(4, 4), dtype=np.float32, high=100, seed=0):
    values = np.random.default_rng(seed).integers(0, high, shape)
    return Tensor(values.astype(dtype))


F8 = ml_dtypes.float8_e4m3fn
PLAIN = {"model.embed_tokens.weight": tensor((6, 4)), "model.norm.weight": tensor((4,))}

QUANTIZED = {
    "gptq": ({"l.qweight": tensor(dtype=np.int32), "l.scales": tensor()}, "l.qweight is int32"),
    "awq": ({"l.qzeros": tensor(dtype=np.int32), "l.scales": tensor()}, "l.qzeros"),
    "bitsandbytes, 4 bits": (
        {"l.weight": tensor((8, 1), np.uint8), "l.weight.absmax": tensor((1,))}, "next to absmax"),
    "bitsandbytes, 8 bits": (
        {"l.weight": tensor(dtype=np.int8), "l.SCB": tensor((4,))}, "next to SCB"),
    "int8 with scales": (
        {"l.weight": tensor(dtype=np.int8), "l.weight_scale": tensor((4,))}, "l.weight is int8"),
    "int8 of another name": (
        {"l.values": tensor(dtype=np.int8), "l.scale": tensor((4,))}, "next to scale"),
    "packed": (
        {"l.weight_packed": tensor(dtype=np.int32), "l.weight_scale": tensor()}, "weight_packed"),
    "fp8": ({"l.weight": tensor(dtype=F8), "l.weight_scale_inv": tensor()}, "float8_e4m3fn"),
    "fp8 alone": ({"l.weight": tensor(dtype=F8)}, "l.weight is float8_e4m3fn"),
    "blocks of 4 bits": (
        {"mlp.experts.down_proj_blocks": tensor((2, 2), np.uint8),
         "mlp.experts.down_proj_scales": tensor((2,), np.uint8)}, "down_proj_blocks"),
    "hqq": ({"l.W_q": tensor(dtype=np.uint8), "l.zero": tensor()}, "l.W_q"),
    "aqlm": ({"l.codes": tensor(dtype=np.int16), "l.codebooks": tensor()}, "l.codes"),
    "bytes of no known name": ({"l.stuff": tensor(dtype=np.uint8)}, "l.stuff is uint8"),
    "in JAX's names": ({"layer/kernel": tensor(dtype=np.int8)}, "layer/kernel is int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantised_weights_are_refused_by_a_tensor_that_shows_it(tmp_path, case):
    tensors, message = QUANTIZED[case]
    with pytest.raises(CheckpointError) as caught:
        tensor_kinds.check_not_quantized(tmp_path, {}, PLAIN | tensors)
    assert message in str(caught.value) and "quantised" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"compression_config": {"format": "int-quantized"}}, "compression_config"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "text_config"),
    ],
)
def test_quantised_weights_are_refused_by_the_description(tmp_path, config, named):
    with pytest.raises(CheckpointError, match=named):
        tensor_kinds.check_not_quantized(tmp_path, config, PLAIN)


def test_quantised_weights_are_refused_by_a_file_that_says_so(tmp_path):
    (tmp_path / "quantize_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"quantize_config\.json"):
        tensor_kinds.check_not_quantized(tmp_path, {}, PLAIN)


BUFFERS = {
    "embeddings.position_ids": tensor((1, 8), np.int64),
    "bn.num_batches_tracked": tensor((), np.int64),
    "attention.self.relative_position_index": tensor((9, 9), np.int64),
    "attention.self.logit_scale": tensor((2, 1, 1)),
    "h.0.attn.bias": tensor((1, 1, 4, 4), np.uint8, high=2),
    "h.0.attn.mask": tensor((4, 4), bool),
    "h.0.attn.masked_bias": tensor(()),
    "layers.0.self_attn.rotary_emb.inv_freq": tensor((2,)),
}


def test_buffers_are_no_codes_and_no_parameters(tmp_path):
    tensor_kinds.check_not_quantized(tmp_path, {"quantization_config": None}, PLAIN | BUFFERS)
    found = {name for name, each in (PLAIN | BUFFERS).items() if tensor_kinds.is_buffer(name, each)}
    assert found == BUFFERS.keys() - {"attention.self.logit_scale"}
    # GPT-2's projections have biases by the name of its mask.
    assert not tensor_kinds.is_buffer("h.0.attn.bias", tensor((4,)))


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.embed_tokens.lora_embedding_B",
        "lora_unet_down_blocks_0.lora_down.weight",
        "layers.0.q_proj.lora_magnitude_vector.weight",
        "layers.0.mlp.hada_w1_a",
        "layers.0.mlp.lokr_w1",
        "base_model.model.layers.0.ia3_l",
        "prompt_embeddings",
        "q_proj.oft_r.default",
    ],
)
def test_adapters_are_told_by_their_tensors(tmp_path, name):
    with pytest.raises(CheckpointError, match="holds an adapter"):
        tensor_kinds.check_no_adapter(tmp_path / "model.safetensors", [*PLAIN, name])


def test_adapters_are_told_by_their_files(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter \(adapter_config\.json\)"):
        tensor_kinds.check_no_adapter(tmp_path)
    (tmp_path / "model.safetensors").touch()
    tensor_kinds.check_no_adapter(tmp_path, PLAIN)  # weights of their own
    (tmp_path / "adapter_model.bin").touch()
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match="merge_and_unload"):
            tensor_kinds.check_no_adapter(path)


WORDS, OTHER_WORDS = tensor((6, 4), seed=1), tensor((6, 4), seed=2)
COPIES = {
    "llama": ({"model.embed_tokens.weight": WORDS, "lm_head.weight": WORDS},
              {"lm_head.weight": "model.embed_tokens.weight"}),
    "llama, untied": ({"model.embed_tokens.weight": WORDS, "lm_head.weight": OTHER_WORDS}, {}),
    "gpt-2": ({"transformer.wte.weight": WORDS, "lm_head.weight": WORDS},
              {"lm_head.weight": "transformer.wte.weight"}),
    "t5": ({"shared.weight": WORDS, "encoder.embed_tokens.weight": WORDS,
            "decoder.embed_tokens.weight": WORDS, "lm_head.weight": OTHER_WORDS},
           {"encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight"}),
    "bart": ({"model.shared.weight": WORDS, "model.decoder.embed_tokens.weight": WORDS},
             {"model.decoder.embed_tokens.weight": "model.shared.weight"}),
    "bert": ({"bert.embeddings.word_embeddings.weight": WORDS,
              "cls.predictions.decoder.weight": WORDS, "cls.predictions.bias": tensor((6,)),
              "cls.predictions.decoder.bias": tensor((6,))},
             {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
              "cls.predictions.decoder.bias": "cls.predictions.bias"}),
    "whisper": ({"model.decoder.embed_tokens.weight": WORDS, "proj_out.weight": WORDS},
                {"proj_out.weight": "model.decoder.embed_tokens.weight"}),
    "layers that are alike": ({"layers.0.mlp.weight": WORDS, "layers.1.mlp.weight": WORDS}, {}),
}  # fmt: skip


@pytest.mark.parametrize("family", COPIES)
def test_copies_of_the_embedding_are_found_in_every_family(family):
    tensors, copies = COPIES[family]
    assert tensor_kinds.copies(tensors) == copies


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"model_type": "qwen3", "tie_word_embeddings": True}, True),
        ({"model_type": "gemma2"}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "qwen3", "tie_word_embeddings": False}, False),
        ({"model_type": "unheard_of"}, False),
        ({"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
    ],
    ids=str,
)
def test_an_output_of_its_own_contradicts_a_tied_description(tmp_path, config, refused):
    own, _ = COPIES["llama, untied"]
    copied, _ = COPIES["llama"]
    tensor_kinds.check_ties(tmp_path, config, copied)
    if refused:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed"):
            tensor_kinds.check_ties(tmp_path, config, own)
    else:
        tensor_kinds.check_ties(tmp_path, config, own)

"""Writes tests/goldens/models: what Hugging Face's models compute, for tests/models/test_parity.py.

Needs torch and transformers, which m2l does not: run it in an environment that has both.
Weights are drawn from a generator seeded by their names, so the files hold outputs alone.

    python tests/goldens/make_goldens.py [CASE ...]
"""

import copy
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GOLDENS = Path(__file__).parent / "models"

_T5 = {
    "model_type": "t5",
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "dropout_rate": 0.0,
}
_V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 3}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_PHI = {
    "model_type": "phi3",
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.5]},
}
CASES: dict[str, dict[str, object]] = {
    "t5_v10_tied_relu": _T5,
    "t5_v11_untied_gated_gelu": _T5 | _V11,
    "t5_v11_tied_unscaled": _T5
    | _V11
    | {"tie_word_embeddings": True, "scale_decoder_outputs": False},
    "t5_odd_buckets_eps": _T5
    | {
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 20,
        "layer_norm_epsilon": 1e-3,
    },
    "t5_gated_silu": _T5 | {"feed_forward_proj": "gated-silu"},
    "t5_plain_gelu": _T5 | {"feed_forward_proj": "gelu"},
    "t5_start_not_pad": _T5 | {"decoder_start_token_id": 3},
    "mt5": _T5 | _V11 | {"model_type": "mt5"},
    "llama_untied": _LLAMA,
    "llama_tied_llama3_rope": _LLAMA | {"tie_word_embeddings": True, "rope_scaling": _LLAMA3},
    "llama_linear_rope": _LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama_yarn": _LLAMA | {"rope_scaling": _YARN},
    "llama_biases": _LLAMA | {"attention_bias": True},
    "mistral_window": _LLAMA | {"model_type": "mistral", "sliding_window": 5},
    "qwen2": _LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "gemma2": _LLAMA
    | {
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma": _LLAMA
    | {"model_type": "gemma", "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    "gemma3": _LLAMA
    | {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 12,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "mistral_wide_heads": _LLAMA
    | {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
    "ministral": _LLAMA
    | {
        "model_type": "ministral",
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": _LLAMA | {"model_type": "qwen3", "head_dim": 12},
    "olmo2": _LLAMA | {"model_type": "olmo2"},
    "olmo3": _LLAMA
    | {
        "model_type": "olmo3",
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_theta": 500000.0,
        "rope_scaling": _YARN,
    },
    "phi3": _LLAMA | {"model_type": "phi3", "sliding_window": 5},
    "phi3_short_rope": _LLAMA | _PHI | {"original_max_position_embeddings": 32},
    "phi3_long_rope": _LLAMA | _PHI | {"original_max_position_embeddings": 12},
    "smollm3": _LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "mixtral": _LLAMA
    | {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.3,
    },
    "qwen3_moe": _LLAMA
    | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 12,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.3,
    },
    "olmoe": _LLAMA
    | {
        "model_type": "olmoe",
        "intermediate_size": 12,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.0,
    },
}

INPUT_LENGTHS, TARGET_LENGTHS = (17, 5, 11), (9, 4, 7)
GREEDY = 8


def weight(name: str, shape: tuple[int, ...], model_type: str) -> np.ndarray:
    """Draws the weight of that name, float32, of a size at which every part matters."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if "norm" in name:
        middle = 0.0 if model_type.startswith("gemma") else 1.0
        return (middle + rng.uniform(-0.5, 0.5, shape)).astype(np.float32)
    if len(shape) == 1 or "relative_attention_bias" in name:
        return rng.normal(0, 0.5, shape).astype(np.float32)
    size = 1.0 if name == "shared.weight" or "embed_tokens" in name else 1.5 * shape[1] ** -0.5
    return rng.normal(0, size, shape).astype(np.float32)


def texts(seed: int, vocab_size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draws inputs and targets, int32."""
    rng = np.random.default_rng(seed)
    return tuple(
        [rng.integers(3, vocab_size, n).astype(np.int32) for n in lengths]
        for lengths in (INPUT_LENGTHS, TARGET_LENGTHS)
    )


def _stored(model: "PreTrainedModel") -> dict[str, np.ndarray]:
    """Returns a model's parameters as its files have them: each once, and each expert by itself."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _loaded(model: "PreTrainedModel", tensors: dict[str, np.ndarray]) -> "PreTrainedModel":
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        return type(model).from_pretrained(folder, attn_implementation="eager").eval().float()


def compute(config: dict[str, object]) -> dict[str, np.ndarray]:
    """Computes logits of every target token, loss, gradients and greedy decodings of one case."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind = config["model_type"]
    encoder_decoder = kind in ("t5", "mt5")
    settings = transformers.AutoConfig.for_model(**config, attn_implementation="eager")
    automatic = (
        transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM
    )
    model = automatic.from_config(settings, attn_implementation="eager").eval().float()
    tied = config.get("tie_word_embeddings", True)
    if encoder_decoder and not tied:
        # transformers 5 ties every fresh T5.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    stored = _stored(model)
    drawn = {name: weight(name, tensor.shape, kind) for name, tensor in stored.items()}
    model = _loaded(model, drawn)
    inputs, targets = texts(0, config["vocab_size"])

    def logits_of(source: np.ndarray, target: np.ndarray) -> torch.Tensor:
        """Computes the logits of each token of a target."""
        source, target = (torch.from_numpy(x.astype(np.int64))[None] for x in (source, target))
        if encoder_decoder:
            start = torch.full((1, 1), config["decoder_start_token_id"])
            read = torch.cat([start, target[:, :-1]], 1)
            return model(input_ids=source, decoder_input_ids=read, use_cache=False).logits[0]
        row = torch.cat([source, target], 1)[:, :-1]
        options = {"output_router_logits": True} if coefficient else {}
        output = model(input_ids=row, use_cache=False, **options)
        if coefficient:
            routers.append(output.router_logits)
        return output.logits[0, source.shape[1] - 1 :]

    coefficient, routers = config.get("router_aux_loss_coef"), []
    arrays = {}
    total, count = 0.0, 0
    for i, (source, target) in enumerate(zip(inputs, targets, strict=True)):
        logits = logits_of(source, target)
        arrays[f"logits_{i}"] = logits.detach().numpy()
        wanted = torch.from_numpy(target.astype(np.int64))
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        count += len(target)
    loss = total / count
    if coefficient:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        together = tuple(torch.cat(layer) for layer in zip(*routers, strict=True))
        experts = config.get("num_experts", config.get("num_local_experts"))
        balance = load_balancing_loss_func(together, experts, config["num_experts_per_tok"])
        arrays["balance"] = balance.detach().numpy()
        loss = loss + coefficient * balance
    loss.backward()
    arrays["loss"] = loss.detach().numpy()
    with torch.no_grad():
        gradients = copy.deepcopy(model)
        pairs = zip(gradients.parameters(), model.parameters(), strict=True)
        for parameter, trained in pairs:
            parameter.copy_(trained.grad)
    for name, gradient in _stored(gradients).items():
        arrays[f"gradient {name}"] = np.array(
            [np.linalg.norm(gradient), *gradient.reshape(-1)[:: max(1, gradient.size // 5)][:5]]
        )
    with torch.no_grad():
        for i, source in enumerate(inputs):
            so_far = np.empty(0, np.int32)
            for _ in range(GREEDY):
                following = logits_of(source, np.append(so_far, np.int32(0)))[-1].argmax()
                so_far = np.append(so_far, np.int32(following))
            arrays[f"greedy_{i}"] = so_far
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    arrays["shapes"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
    return arrays


def main() -> None:
    """Writes the cases named on the command line, or all."""
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for case in sys.argv[1:] or CASES:
        arrays = compute(CASES[case])
        np.savez_compressed(GOLDENS / f"{case}.npz", **arrays)
        print(f"{case}: loss {float(arrays['loss']):.4f}")


if __name__ == "__main__":
    main()

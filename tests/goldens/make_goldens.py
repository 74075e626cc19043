"""Writes tests/goldens/models: what Hugging Face's models compute, for tests/models/test_parity.py.

Needs torch and transformers, which m2l does not: run it in an environment that has both.
Weights are drawn from a generator seeded by their names, so the files hold outputs alone.

    python tests/goldens/make_goldens.py [CASE ...]
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

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
}

INPUT_LENGTHS, TARGET_LENGTHS = (17, 5, 11), (9, 4, 7)
GREEDY = 8


def weight(name: str, shape: tuple[int, ...], model_type: str) -> np.ndarray:
    """Draws the weight of that name, float32, of a size at which every part matters."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if "norm" in name:
        middle = 0.0 if model_type == "gemma2" else 1.0
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
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape), kind)))
    inputs, targets = texts(0, config["vocab_size"])

    def logits_of(source: np.ndarray, target: np.ndarray) -> torch.Tensor:
        """Computes the logits of each token of a target."""
        source, target = (torch.from_numpy(x.astype(np.int64))[None] for x in (source, target))
        if encoder_decoder:
            start = torch.full((1, 1), config["decoder_start_token_id"])
            read = torch.cat([start, target[:, :-1]], 1)
            return model(input_ids=source, decoder_input_ids=read, use_cache=False).logits[0]
        row = torch.cat([source, target], 1)[:, :-1]
        return model(input_ids=row, use_cache=False).logits[0, source.shape[1] - 1 :]

    arrays = {}
    total, count = 0.0, 0
    for i, (source, target) in enumerate(zip(inputs, targets, strict=True)):
        logits = logits_of(source, target)
        arrays[f"logits_{i}"] = logits.detach().numpy()
        wanted = torch.from_numpy(target.astype(np.int64))
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        count += len(target)
    loss = total / count
    loss.backward()
    arrays["loss"] = loss.detach().numpy()
    for name, parameter in parameters.items():
        gradient = parameter.grad.numpy()
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
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
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

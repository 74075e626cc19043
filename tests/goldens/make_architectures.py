"""Writes tests/goldens/architectures.json: models that m2l has no network for, tiny.

Of each its config.json and its tensors' names and shapes, as transformers writes them; needs torch
and transformers, which m2l does not.

    python tests/goldens/make_architectures.py
"""

import json
import tempfile
from pathlib import Path

from safetensors.numpy import load_file

FILE = Path(__file__).parent / "architectures.json"

_COMMON = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
_EXPERTS = {"moe_intermediate_size": 4, "num_experts_per_tok": 1}
SETTINGS: dict[str, dict[str, object]] = {
    "bert": _COMMON,
    "gpt2": {"vocab_size": 13, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "gpt_neox": _COMMON,
    "granite": _COMMON,
    "glm4": _COMMON | {"head_dim": 4},
    "cohere2": _COMMON | {"head_dim": 4},
    "qwen2_moe": _COMMON | _EXPERTS | {"shared_expert_intermediate_size": 4, "num_experts": 2},
    "deepseek_v3": _COMMON
    | _EXPERTS
    | {
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 4,
        "q_lora_rank": 4,
        "qk_rope_head_dim": 2,
        "qk_nope_head_dim": 2,
        "v_head_dim": 4,
        "num_key_value_heads": 2,
    },
}


def describe(kind: str) -> dict[str, object]:
    """Returns the config.json of a model of this type, and its tensors' shapes by name."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **SETTINGS[kind])
    automatic = getattr(
        transformers, "AutoModelForMaskedLM" if kind == "bert" else "AutoModelForCausalLM"
    )
    with tempfile.TemporaryDirectory() as folder:
        automatic.from_config(config).save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        values = json.loads((Path(folder) / "config.json").read_text())
    return {"config": values, "tensors": {name: list(x.shape) for name, x in tensors.items()}}


def main() -> None:
    """Writes the file."""
    described = {kind: describe(kind) for kind in SETTINGS}
    FILE.write_text(json.dumps(described, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

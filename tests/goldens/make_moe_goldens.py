"""Writes tests/goldens/moe.npz: a mixture of experts of dense models as transformers computes it.

    pip install torch==2.13.0 transformers==5.24.0
    python tests/goldens/make_moe_goldens.py

Of a base and two experts with weights drawn by name: the routers of mergekit-moe's gate_modes
hidden and hidden_avg, from the hidden states that transformers returns for each prompt by itself
(mergekit/moe/router.py, get_hidden_states), and the logits of the mixture whose tensors are put
together here, by the names of transformers.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent))
from make_goldens import CASES, _loaded, _stored, texts, weight

FILE = Path(__file__).parent / "moe.npz"
MIXTURES = {
    "llama_tied_llama3_rope": (
        "mixtral",
        {"num_local_experts": 2},
        "block_sparse_moe",
        {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    "qwen3": (
        "qwen3_moe",
        {"num_experts": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
        "mlp",
        {name: name for name in ("gate_proj", "up_proj", "down_proj")},
    ),
}
"""Dense case -> the mixture's type, its own settings, its module, and each matrix's name there."""


def tensors(shapes: dict[str, tuple[int, ...]], model: str) -> dict[str, np.ndarray]:
    """Draws the weights of a model: the base, or an expert by its number."""
    return {name: weight(f"{model} {name}", shape, "llama") for name, shape in shapes.items()}


def compute(case: str) -> dict[str, np.ndarray]:
    """Computes routers and logits of one case."""
    import torch
    import transformers

    kind, more, module, matrices = MIXTURES[case]
    automatic = transformers.AutoModelForCausalLM

    def empty(settings: dict[str, object]) -> transformers.PreTrainedModel:
        return automatic.from_config(transformers.AutoConfig.for_model(**settings))

    dense = empty(CASES[case])
    shapes = {name: tensor.shape for name, tensor in _stored(dense).items()}
    base = _loaded(dense, tensors(shapes, "base"))
    prompts, rows = texts(0, 61)  # of the first expert, and of the second
    arrays: dict[str, np.ndarray] = {}
    for mode in ("hidden", "hidden_avg"):
        gates = []
        for ids in (prompts, rows):
            means = []
            for row in ids:
                output = base(torch.tensor(row[None].astype(np.int64)), output_hidden_states=True)
                states = torch.stack(output.hidden_states[:-1])[:, 0]
                means.append(states.mean(1) if mode == "hidden_avg" else states[:, -1])
            mean = torch.stack(means).mean(0)
            gates.append(mean / mean.norm(dim=-1, keepdim=True))
        arrays[f"{case}/{mode}"] = torch.stack(gates, 1).detach().numpy()
    experts = [tensors(shapes, str(number)) for number in range(2)]
    mixed = {}
    for name in shapes:
        layer, is_mlp, matrix = name.partition(".mlp.")
        if not is_mlp:
            mixed[name] = (experts[0][name] + experts[1][name]) / 2
            continue
        inner = matrices[matrix.removesuffix(".weight")]
        for number, expert in enumerate(experts):
            mixed[f"{layer}.{module}.experts.{number}.{inner}.weight"] = expert[name]
    for number, gate in enumerate(arrays[f"{case}/hidden"]):
        mixed[f"model.layers.{number}.{module}.gate.weight"] = gate
    per_token = {"model_type": kind, "num_experts_per_tok": 1}
    model = _loaded(empty(CASES[case] | per_token | more), mixed)
    ids = torch.tensor(prompts[0][None].astype(np.int64))
    arrays[f"{case}/logits"] = model(ids).logits[0].detach().numpy()
    return arrays


def main() -> None:
    """Writes the file."""
    arrays = {}
    for case in MIXTURES:
        arrays |= compute(case)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()

"""Writes tests/goldens/tokenizer_goldens: what mergekit makes of models whose vocabularies differ.

mergekit is run, not copied, from an environment that has it (pip install mergekit==0.1.5):

    python tests/goldens/make_tokenizer_goldens.py

tokenizer_goldens.json holds each tokenizer (the tokens of its model in the order of ids, and its
added tokens behind them), and of each case its settings, as mergekit takes them, and the ids of the
result. tokenizer_goldens.npz holds <model>/<tensor> and <case>/<tensor>, float32.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

DATA = Path(__file__).parent
ARRAYS, CASES_FILE = DATA / "tokenizer_goldens.npz", DATA / "tokenizer_goldens.json"

WORDS = ["<unk>", "<s>", "</s>", *(f"tok_{n}" for n in range(3, 12))]
TOKENIZERS = {
    "base": {"tokens": WORDS, "added": [], "rows": 12},
    "expert_0": {"tokens": WORDS, "added": ["<|im_start|>", "<|im_end|>"], "rows": 14},
    # In another order, without a word, with two of its own, and one more than it has rows.
    "expert_1": {
        "tokens": [*WORDS[:3], "new_1", *reversed(WORDS[4:]), "new_2"],
        "added": ["<|im_end|>", "<unused>"],
        "rows": 14,
    },
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

FORCE = {
    "tok_5": {"source": "expert_1", "force": True},
    "tok_6": {"source": {"kind": "model_token", "model": "expert_0", "token": "<|im_end|>"},
              "force": True},
    "tok_3": {"source": "expert_0"},
    "<extra>": {"source": {"kind": "zero"}},
}  # fmt: skip
TIES = {"merge_method": "ties", "parameters": {"density": 0.5, "weight": 1.0, "normalize": True}}
LINEAR = {"merge_method": "linear", "parameters": {"weight": 1.0}}
CASES = {
    "linear_union": LINEAR | {"tokenizer": {"source": "union"}},
    "linear_base": LINEAR | {"tokenizer": {"source": "base"}},
    "linear_expert": LINEAR | {"tokenizer": {"source": "expert_0"}},
    "linear_padded": LINEAR | {"tokenizer": {"source": "union", "pad_to_multiple_of": 32}},
    "linear_tokens": LINEAR | {"tokenizer": {"source": "union", "tokens": FORCE}},
    "linear_without_base": LINEAR | {"base_model": None, "tokenizer": {"source": "union"}},
    "task_arithmetic_union": {
        "merge_method": "task_arithmetic",
        "parameters": {"weight": 0.5},
        "tokenizer": {"source": "union"},
    },
    "ties_union": TIES | {"tokenizer": {"source": "union"}},
    "slerp_union": {
        "merge_method": "slerp",
        "models": ["expert_0"],
        "parameters": {"t": 0.5},
        "tokenizer": {"source": "union"},
    },
}
"""What mergekit is told; models are named by their role."""


def tokenizer_json(tokens: list[str], added: list[str]) -> dict:
    """Returns a tokenizer.json of words alone."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    ids = {token: place for place, token in enumerate(tokens)}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "added_tokens": [
            {"id": len(tokens) + place, "content": token} | plain
            for place, token in enumerate(added)
        ],
        "model": {"type": "BPE", "vocab": ids, "merges": [], "unk_token": "<unk>"},
    }  # fmt: skip


def write_model(
    directory: Path,
    tokenizer: dict,
    tensors: dict[str, np.ndarray],
    config: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Writes a Hugging Face directory of a model and its tokenizer."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    content = tokenizer_json(tokenizer["tokens"], tokenizer["added"])
    (directory / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = CONFIG | {"vocab_size": tokenizer["rows"], **config}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def draw(seed: int, rows: int) -> dict[str, np.ndarray]:
    """Returns the tensors of a model."""
    rng = np.random.default_rng(seed)
    layer = "model.layers.0"
    shapes = {f"{layer}.self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"}
    shapes |= {f"{layer}.mlp.{part}_proj.weight": (8, 8) for part in ("gate", "up", "down")}
    shapes |= {f"{layer}.{n}_layernorm.weight": (8,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (8,), EMBEDDING: (rows, 8), OUTPUT: (rows, 8)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def run(case: dict, folder: Path, out: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Returns the tensors of tokens that mergekit makes, and the ids of its tokenizer."""
    import tokenizers
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.numpy import load_file

    def located(value: object) -> object:
        if isinstance(value, dict):
            return {name: located(each) for name, each in value.items()}
        return str(folder / value) if isinstance(value, str) and value in TOKENIZERS else value

    settings = {"base_model": "base", "models": ["expert_0", "expert_1"], "dtype": "float32"} | case
    kind = settings["tokenizer"]["source"]
    settings["models"] = [{"model": name} for name in settings["models"]]
    if settings["base_model"] is not None and settings["merge_method"] == "slerp":
        settings["models"] = [{"model": "base"}, *settings["models"]]
    settings = {name: located(value) for name, value in settings.items() if value is not None}
    settings["models"] = [located(model) for model in settings["models"]]
    settings["tokenizer"]["source"] = kind if kind in ("base", "union") else str(folder / kind)
    config = MergeConfiguration.model_validate(settings)
    run_merge(config, str(out), MergeOptions(copy_tokenizer=True, quiet=True))
    ids = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(True)
    tensors = load_file(next(out.glob("model*.safetensors")))
    return {name: tensors[name] for name in (EMBEDDING, OUTPUT)}, ids


def main() -> None:
    """Makes the files."""
    arrays, cases = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, (model, tokenizer) in enumerate(TOKENIZERS.items()):
            tensors = draw(seed, tokenizer["rows"])
            write_model(folder / model, tokenizer, tensors)
            arrays |= {f"{model}/{name}": array for name, array in tensors.items()}
        for case, settings in CASES.items():
            tensors, ids = run(settings, folder, folder / case)
            arrays |= {f"{case}/{name}": array for name, array in tensors.items()}
            cases[case] = {"settings": settings, "ids": ids}
    np.savez_compressed(ARRAYS, **arrays)
    content = {"peer": "mergekit 0.1.5", "tokenizers": TOKENIZERS, "config": CONFIG, "cases": cases}
    CASES_FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

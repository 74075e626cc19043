"""Writes tests/goldens/mergekit_goldens.npz: what mergekit makes of the files in mergekit/.

Six of them are the examples of its repository, without comments; each method that draws nothing at
random has one. The models that they name are tiny ones of Llama's kind, drawn here by NumPy, so
that tests draw the same:

    pip install mergekit==0.1.5 torch transformers
    python tests/goldens/make_mergekit_goldens.py

mergekit_goldens.npz holds <file>/<dtype>/<tensor> for the tensors of some layers, as_is with the
file's dtype and float32 with that one, and <file>/layers, the layers of the configuration.
"""

import contextlib
import json
import tempfile
import zlib
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent
FILES, GOLDENS = DATA / "mergekit", DATA / "mergekit_goldens.npz"
LAYERS, WIDTH, INNER, WORDS = 40, 12, 16, 14
MODELS = {
    "TheBloke/Llama-2-13B-fp16": None,
    "psmathur/orca_mini_v3_13b": "TheBloke/Llama-2-13B-fp16",
    "garage-bAInd/Platypus2-13B": "TheBloke/Llama-2-13B-fp16",
    "WizardLM/WizardLM-13B-V1.2": "TheBloke/Llama-2-13B-fp16",
    "WizardLM/WizardMath-13B-V1.0": "TheBloke/Llama-2-13B-fp16",
    "mistralai/Mistral-7B-v0.1": None,
    "mistralai/Mistral-7B-Instruct-v0.2": "mistralai/Mistral-7B-v0.1",
    "BioMistral/BioMistral-7B": "mistralai/Mistral-7B-v0.1",
    "model_a": None,
    "model_b": "model_a",
}
"""Name -> the model it was fine-tuned from."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's tensors."""
    layer = {
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH // 2, WIDTH),
        "self_attn.v_proj": (WIDTH // 2, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    result = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for number in range(LAYERS):
        result |= {f"model.layers.{number}.{name}.weight": s for name, s in layer.items()}
    return result | {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}


def draw(name: str) -> dict[str, np.ndarray]:
    """Returns a model's tensors, float16."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    origin = MODELS[name]
    if origin is None:
        # Multiples of 2^-11 below 1, which float16 has, and all their differences.
        drawn = {n: rng.integers(-1400, 1400, shape) for n, shape in shapes().items()}
    else:
        # No two magnitudes of a tensor's are equal: of equal ones mergekit keeps some by chance.
        drawn = {
            n: a.astype(np.float64) * 2048
            + (rng.permutation(a.size) + 1).reshape(a.shape) * rng.choice([-1, 1], a.shape)
            for n, a in draw(origin).items()
        }
    return {n: (a / 2048).astype(np.float16) for n, a in drawn.items()}


def is_stored(tensor: str, layers: int) -> bool:
    """Returns whether a tensor of a result is among the goldens."""
    numbers = [part for part in tensor.split(".") if part.isdigit()]
    return not numbers or int(numbers[0]) in (0, 21, layers - 1)


def main() -> None:
    """Runs mergekit on each file, twice."""
    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.numpy import load_file, save_file

    goldens = {}
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):
        for name in MODELS:
            Path(name).mkdir(parents=True)
            save_file(draw(name), f"{name}/model.safetensors", {"format": "pt"})
            Path(name, "config.json").write_text(json.dumps(CONFIG))
        for file in sorted(FILES.glob("*.yml")):
            for dtype in ("", "float32"):
                content = yaml.safe_load(file.read_text())
                if dtype:
                    content |= {"dtype": dtype, "out_dtype": dtype}
                out = f"{file.stem}-{dtype}"
                options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
                torch.manual_seed(0)
                run_merge(MergeConfiguration.model_validate(content), out, options)
                layers = json.loads(Path(out, "config.json").read_text())["num_hidden_layers"]
                goldens[f"{file.stem}/layers"] = np.int64(layers)
                tensors = {}
                for part in sorted(Path(out).glob("*.safetensors")):
                    tensors |= load_file(part)
                for tensor, array in tensors.items():
                    if is_stored(tensor, layers):
                        goldens[f"{file.stem}/{dtype or 'as_is'}/{tensor}"] = array
            print(file.stem, layers, len(tensors))
    np.savez_compressed(GOLDENS, **goldens)


if __name__ == "__main__":
    main()

"""Writes tests/goldens/adapters: what PEFT makes of adapters, its own and m2l's, on tiny models.

    pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
    python tests/goldens/make_adapter_goldens.py --m2l .venv/bin/m2l

adapters/<base>/ is a Hugging Face directory. adapters/<case>/ is an adapter that PEFT saved, with
random factors; peft.npz there has "logits", which PEFT computes with base and adapter, and
"merged/<tensor>", what merge_and_unload makes of each tensor that changes. For each case that has
one, adapters/<case>_extracted/ is the adapter that `m2l extract` makes of the merged model, with
PEFT's logits of it; cases.json says what belongs together.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

DATA = Path(__file__).parent / "adapters"
IDS = torch.tensor([[3, 5, 8, 13, 21, 34], [2, 4, 8, 16, 32, 1]])
VOCAB = 40

DECODER = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
BASES = {
    "qwen2": (
        transformers.Qwen2Config(tie_word_embeddings=False, **DECODER),
        transformers.Qwen2ForCausalLM,
    ),
    "llama_tied": (
        transformers.LlamaConfig(tie_word_embeddings=True, **DECODER),
        transformers.LlamaForCausalLM,
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        transformers.GPT2LMHeadModel,
    ),
    "t5": (
        transformers.T5Config(
            vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
        ),
        transformers.T5ForConditionalGeneration,
    ),
}  # fmt: skip
# Case -> base, LoraConfig, dtype of the factors.
CASES = {
    "plain": (
        "qwen2",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "float32",
    ),
    "patterns": (
        "qwen2",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": r".*\.(self_attn|mlp)\.\w+_proj",
            "rank_pattern": {"down_proj": 5, r"layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"k_proj": 7},
            "use_rslora": True,
        },
        "float32",
    ),
    "whole": (
        "qwen2",
        {
            "r": 2,
            "target_modules": ["embed_tokens", "lm_head", "k_proj"],
            "modules_to_save": ["norm"],
            "bias": "all",
        },
        "float32",
    ),
    "bfloat16": ("qwen2", {"r": 4, "target_modules": ["up_proj", "o_proj"]}, "bfloat16"),
    "transposed": (
        "gpt2",
        {"r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        "float32",
    ),
    "encoder_decoder": ("t5", {"r": 2, "target_modules": ["q", "v", "wi_0"]}, "float32"),
    "tied": (
        "llama_tied",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        "float32",
    ),
}


def logits(model: torch.nn.Module) -> np.ndarray:
    """Returns the logits of IDS, float32 [2, 6, VOCAB]."""
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model.eval()(**inputs).logits.float().numpy()


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Gives what is trained random values that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (parameter.float() + 0.2 * noise).to(parameter.dtype)


def main() -> None:
    """Writes all of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--m2l", required=True, help="The command.")
    m2l = parser.parse_args().m2l
    warnings.simplefilter("ignore")
    shutil.rmtree(DATA, ignore_errors=True)
    for seed, (name, (config, kind)) in enumerate(BASES.items()):
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
        model.save_pretrained(DATA / name)
        (DATA / name / "generation_config.json").unlink()
    about = {}
    for seed, (name, (base, settings, dtype)) in enumerate(CASES.items()):
        kind, out = BASES[base][1], DATA / name
        plain = kind.from_pretrained(DATA / base)
        before = {n: t.clone() for n, t in plain.state_dict().items()}
        model = peft.get_peft_model(plain, peft.LoraConfig(**settings))
        randomize(model, seed)
        if dtype != "float32":
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    # Rounded, and multiplied in float32.
                    parameter.data = parameter.data.to(torch.bfloat16).float()
        model.save_pretrained(out, safe_serialization=True)
        (out / "README.md").unlink()
        if dtype != "float32":
            from safetensors.torch import load_file, save_file

            file = out / "adapter_model.safetensors"
            save_file({n: t.to(torch.bfloat16) for n, t in load_file(file).items()}, file)
        content = json.loads((out / "adapter_config.json").read_text())
        content["base_model_name_or_path"] = f"tests/{base}"
        for field in ("target_modules", "modules_to_save"):
            if isinstance(content[field], list):
                content[field] = sorted(content[field])
        (out / "adapter_config.json").write_text(json.dumps(content, indent=1) + "\n")
        results = {"logits": logits(model)}
        merged = model.merge_and_unload()
        for tensor, value in merged.state_dict().items():
            if tensor in before and not torch.equal(value, before[tensor]):
                results[f"merged/{tensor}"] = value.float().numpy()
        np.savez_compressed(out / "peft.npz", **results)
        about[name] = {"base": base}
        with tempfile.TemporaryDirectory() as folder:
            merged.save_pretrained(f"{folder}/merged")
            rank = ["--rank", str(max([settings["r"], *settings.get("rank_pattern", {}).values()]))]
            command = [m2l, "extract", f"{folder}/merged", "--base", str(DATA / base), *rank]
            extracted = DATA / f"{name}_extracted"
            subprocess.run([*command, "--out", str(extracted)], check=True)
        content = json.loads((extracted / "adapter_config.json").read_text())
        content["base_model_name_or_path"] = f"tests/{base}"
        (extracted / "adapter_config.json").write_text(json.dumps(content, indent=1) + "\n")
        (extracted / "m2l_manifest.json").unlink()
        model = peft.PeftModel.from_pretrained(kind.from_pretrained(DATA / base), extracted)
        np.savez_compressed(extracted / "peft.npz", logits=logits(model))
        difference = np.abs(logits(model) - results["logits"]).max()
        print(f"{name}: PEFT reads what was extracted with logits {difference:.2e} apart")
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    (DATA / "cases.json").write_text(json.dumps({"cases": about, "versions": versions}, indent=1))


if __name__ == "__main__":
    main()

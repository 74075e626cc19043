"""Models of every family in Hugging Face's layout: the names and shapes of transformers.

They are written with the safetensors library.
"""

import json

import numpy as np
from safetensors import numpy as official

from m2l.checkpoints import huggingface

VOCABULARY = {"name": "bytes", "size": 7, "fingerprint": "abc"}
VOCAB, WIDTH, HEAD, HEADS, INNER = 19, 8, 6, 2, 10

T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": HEAD,
    "d_ff": INNER,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 9,
    "layer_norm_epsilon": 1e-5,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "torch_dtype": "float32",
}
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HEAD,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "t5 1.0": T5 | {"feed_forward_proj": "relu"},
    "t5 1.1": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5 tied, unscaled": T5
    | {
        "feed_forward_proj": "gated-silu",
        "tie_word_embeddings": True,
        "scale_decoder_outputs": False,
        "transformers_version": "5.1.0",
    },
    "mt5": T5
    | {"model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "llama": DECODER
    | {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3_ROPE,
    },
    "llama, tied": DECODER | {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biased": DECODER
    | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "mistral": DECODER
    | {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 5},
    "qwen2": DECODER
    | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
    },
    "gemma2": {name: value for name, value in DECODER.items() if name != "hidden_act"}
    | {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 144},
    "gemma": DECODER
    | {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gemma3": {name: value for name, value in DECODER.items() if name != "hidden_act"}
    | {
        "model_type": "gemma3_text",
        "sliding_window": 4,
        "_sliding_window_pattern": 2,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "ministral": DECODER
    | {
        "model_type": "ministral",
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": DECODER | {"model_type": "qwen3", "use_sliding_window": False},
    "olmo2": DECODER | {"model_type": "olmo2", "rope_theta": 5e5},
    "olmo3": DECODER
    | {
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "sliding_window": 4,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.2,
        },
    },
    "phi3": DECODER
    | {
        "model_type": "phi3",
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.7,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2, 5.5]},
        "embd_pdrop": 0.1,
        "full_attn_mod": 1,
    },
    "smollm3": DECODER
    | {"model_type": "smollm3", "no_rope_layer_interval": 2, "no_rope_layers": [1, 0, 1]},
    "mixtral": DECODER
    | {
        "model_type": "mixtral",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
    },
    "qwen3 mixture": DECODER
    | {
        "model_type": "qwen3_moe",
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "max_window_layers": 48,
    },
    "olmoe": DECODER
    | {
        "model_type": "olmoe",
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "clip_qkv": None,
        "norm_topk_prob": False,
    },
}
_TIED = ("gemma", "gemma2", "gemma3_text", "smollm3")


def t5_shapes(config):
    joined = HEADS * HEAD
    attention = {"q": (joined, WIDTH), "k": (joined, WIDTH), "v": (joined, WIDTH)}
    attention |= {"o": (WIDTH, joined)}
    gated = config["feed_forward_proj"].startswith("gated")
    mlp = dict.fromkeys(("wi_0", "wi_1") if gated else ("wi",), (INNER, WIDTH))
    mlp |= {"wo": (WIDTH, INNER)}
    shapes = {"shared.weight": (VOCAB, WIDTH)}
    for stack, layers, blocks in (
        ("encoder", 1, ("SelfAttention", "DenseReluDense")),
        ("decoder", 2, ("SelfAttention", "EncDecAttention", "DenseReluDense")),
    ):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes |= {bias: (4, HEADS), f"{stack}.final_layer_norm.weight": (WIDTH,)}
        for i in range(layers):
            for j, block in enumerate(blocks):
                shapes[f"{stack}.block.{i}.layer.{j}.layer_norm.weight"] = (WIDTH,)
                for part, shape in (mlp if block == "DenseReluDense" else attention).items():
                    shapes[f"{stack}.block.{i}.layer.{j}.{block}.{part}.weight"] = shape
    if config.get("tie_word_embeddings") is False:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    return shapes


def decoder_shapes(config):
    queries, keys, kind = HEADS * HEAD, HEAD, config["model_type"]
    layer = {
        "self_attn.q_proj.weight": (queries, WIDTH),
        "self_attn.k_proj.weight": (keys, WIDTH),
        "self_attn.v_proj.weight": (keys, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, queries),
        "mlp.gate_proj.weight": (INNER, WIDTH),
        "mlp.up_proj.weight": (INNER, WIDTH),
        "mlp.down_proj.weight": (WIDTH, INNER),
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
    }
    if kind == "phi3":
        layer = {n: shape for n, shape in layer.items() if n.split(".")[1][0] not in "qkvgu"}
        layer |= {
            "self_attn.qkv_proj.weight": (queries + 2 * keys, WIDTH),
            "mlp.gate_up_proj.weight": (2 * INNER, WIDTH),
        }
    if kind == "qwen2" or config.get("attention_bias"):
        layer |= {f"self_attn.{x}_proj.bias": (keys,) for x in "kv"}
        layer["self_attn.q_proj.bias"] = (queries,)
    if config.get("attention_bias"):
        layer["self_attn.o_proj.bias"] = (WIDTH,)
    if kind in ("mixtral", "qwen3_moe", "olmoe"):
        layer = {name: shape for name, shape in layer.items() if "mlp" not in name}
        inner = config.get("moe_intermediate_size", INNER)
        names = {
            "gate_proj": (inner, WIDTH),
            "up_proj": (inner, WIDTH),
            "down_proj": (WIDTH, inner),
        }
        if kind == "mixtral":
            names = dict(zip(("w1", "w3", "w2"), names.values(), strict=True))
        block = "block_sparse_moe" if kind == "mixtral" else "mlp"
        count = config.get("num_experts", config.get("num_local_experts"))
        layer[f"{block}.gate.weight"] = (count, WIDTH)
        for e in range(count):
            layer |= {f"{block}.experts.{e}.{n}.weight": shape for n, shape in names.items()}
    if kind in ("qwen3", "gemma3_text", "qwen3_moe"):
        layer |= {f"self_attn.{x}_norm.weight": (HEAD,) for x in "qk"}
    if kind in ("gemma2", "gemma3_text"):
        layer |= {f"{x}_feedforward_layernorm.weight": (WIDTH,) for x in ("pre", "post")}
    if kind in ("olmo2", "olmo3"):
        del layer["input_layernorm.weight"]
        layer |= {"post_feedforward_layernorm.weight": (WIDTH,)}
    if kind in ("olmo2", "olmo3", "olmoe"):
        layer |= {"self_attn.q_norm.weight": (queries,), "self_attn.k_norm.weight": (keys,)}
    layers = range(config["num_hidden_layers"])
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes |= {f"model.layers.{i}.{name}": s for i in layers for name, s in layer.items()}
    if not config.get("tie_word_embeddings", kind in _TIED):
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    return shapes


def tensors_of(config, dtype=np.float32):
    shapes = (t5_shapes if "d_model" in config else decoder_shapes)(config)
    rng = np.random.default_rng(1)
    return {
        name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()
    }


def write(directory, config, tensors, file="model.safetensors"):
    directory.mkdir(exist_ok=True)
    official.save_file(tensors, directory / file, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def bits(tensors):
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()}


def load(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= official.load_file(file)
    return found


def imported(source, out, **options):
    return huggingface.import_checkpoint(source, out, vocabulary=VOCABULARY, **options)


def config_of(tmp_path, config, without=(), **changes):
    """What read_config makes of a config.json that fits its tensors, with these changes."""
    changed = {k: v for k, v in (config | changes).items() if k not in without}
    return huggingface.read_config(write(tmp_path / "read", changed, tensors_of(config)))

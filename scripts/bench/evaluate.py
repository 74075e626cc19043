"""Evaluation's speed, compared with Hugging Face on torch on the same questions.

    python scripts/bench/evaluate.py rank|decode [--torch PYTHON]

T5-small with random parameters, float32. `rank`: 64 examples of 128 tokens with 4 choices of 8,
EOS included; `decode`: 16 inputs of 128 tokens, 32 new tokens each, greedily. Examples or new
tokens a second, by name, as JSON; " limit" is what float32 products of 2048 x 2048 would allow for
the multiply-adds of the weights and of attention, the inputs' counted once for all choices. PYTHON
is an interpreter that has torch and transformers. In bfloat16 too where the processor has units
for it (torch: float32 products of precision "medium").

torch ranks in two ways: " torch apart", each choice in a pass of its own through encoder and
decoder, as lm-evaluation-harness and most scripts do, and " torch", as well as it can: the encoder,
and the keys and values that the decoder reads of it, once for all choices of an example.

Medians; " swap" is the seconds that another model's parameters cost, " compilations" how much was
compiled for them. Nothing else should run.
"""

import argparse
import json
import time

from models import T5, by_torch, median_of, t5_small

EXAMPLES, CHOICES, INPUTS, TARGETS = 64, 4, 128, 8
DECODED, NEW = 16, 32
# Each choice a pass of its own: a part of the examples will do.
APART = 8
RUNS = 5


def ours(task: str) -> dict[str, float]:
    """Returns m2l's figures of a task."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from m2l import models
    from m2l.data.examples import GenerationExample, RankingExample
    from m2l.evaluation import batching, generation, ranking
    from m2l.models.products import has_bfloat16

    config = t5_small()
    params = models.init(config, jax.random.key(0))
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(2, T5["vocab_size"], length, dtype=np.int32)

    if task == "decode":
        texts = [GenerationExample(ids(INPUTS), ids(1), ("",), "", "", False)] * DECODED
        parts = list(batching.batches(texts, DECODED, ranking.layouts.of(config)))
        options = {"max_length": NEW, "eos_id": -1, "parts": parts}
        seconds = median_of(lambda: generation.greedy(config, params, texts, **options), RUNS)
        return {"decoding": DECODED * NEW / seconds}

    right = (True,) + (False,) * (CHOICES - 1)
    questions = [
        RankingExample(
            ids(INPUTS), tuple(ids(TARGETS) for _ in right), right, "", ("",) * CHOICES, False
        )
        for _ in range(EXAMPLES)
    ]
    parts = list(batching.batches(questions, 32, ranking.layouts.of(config)))

    def score(parameters: object = params, dtype: str = "float32") -> None:
        ranking.score_examples(config, parameters, questions, parts=parts, dtype=dtype)

    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    rate = 2 * 2048**3 / median_of(lambda: product(x).block_until_ready())
    figures = {"ranking limit": rate / flops(), "ranking": EXAMPLES / median_of(score, RUNS)}
    if has_bfloat16():
        seconds = median_of(lambda: score(dtype="bfloat16"), RUNS)
        figures["ranking bfloat16"] = EXAMPLES / seconds
    compiled = ranking.scorer(config, "float32")._cache_size()
    other = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf) * 0.9, params))
    start = time.perf_counter()
    score(other)
    elapsed = time.perf_counter() - start
    figures["ranking swap"] = max(0.0, elapsed - EXAMPLES / figures["ranking"])
    figures["ranking compilations"] = ranking.scorer(config, "float32")._cache_size() - compiled
    return figures


def flops() -> float:
    """Computes the operations of ranking one example."""
    d, ff, layers = T5["d_model"], T5["d_ff"], T5["num_layers"]
    layer, targets = 4 * d * d + 2 * d * ff, CHOICES * TARGETS
    encoder = INPUTS * (layer + 2 * INPUTS * d + 2 * d * d)
    decoder = targets * (layer + 2 * TARGETS * d + 2 * d * d + 2 * INPUTS * d)
    return 2.0 * (layers * (encoder + decoder) + targets * d * T5["vocab_size"])


def peer(task: str, modes: list[str]) -> dict[str, float]:
    """Returns the figures of Hugging Face's T5, by torch's precision; needs torch."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**T5)).eval()
    inputs = torch.randint(2, T5["vocab_size"], (EXAMPLES, INPUTS))
    choices = torch.randint(2, T5["vocab_size"], (EXAMPLES, CHOICES, TARGETS))

    def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(logits.float(), -1)
        return log_p.gather(-1, labels[..., None])[..., 0].sum(-1)

    def apart(inputs: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        repeated, labels = inputs.repeat_interleave(CHOICES, 0), choices.reshape(-1, TARGETS)
        parts = []
        for first in range(0, len(labels), 64):
            part = slice(first, first + 64)
            logits = model(input_ids=repeated[part], labels=labels[part]).logits
            parts.append(summed(logits, labels[part]))
        return torch.cat(parts).reshape(-1, CHOICES)

    def shared(inputs: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        parts = []
        for first in range(0, len(inputs), 32):
            part = slice(first, first + 32)
            labels = choices[part].reshape(-1, TARGETS)
            encoded = model.encoder(input_ids=inputs[part]).last_hidden_state
            rows, heads = len(encoded), T5["num_heads"]
            read = DynamicCache()
            for index, block in enumerate(model.decoder.block):
                attention = block.layer[1].EncDecAttention
                keys_values = [
                    kernel(encoded).view(rows, -1, heads, T5["d_kv"]).transpose(1, 2)
                    for kernel in (attention.k, attention.v)
                ]
                # One copy of what was computed once: matmul would make it anyway.
                keys_values = [x.repeat_interleave(CHOICES, 0) for x in keys_values]
                read.update(*keys_values, index)
            hidden = model.decoder(
                input_ids=model._shift_right(labels),
                # Read for its shape alone, where keys and values are given.
                encoder_hidden_states=encoded[:1].expand(len(labels), -1, -1),
                past_key_values=EncoderDecoderCache(DynamicCache(), read),
                use_cache=True,
            ).last_hidden_state
            parts.append(summed(model.lm_head(hidden * T5["d_model"] ** -0.5), labels))
        return torch.cat(parts).reshape(-1, CHOICES)

    figures = {}
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    with torch.inference_mode():
        difference = (apart(inputs[:2], choices[:2]) - shared(inputs[:2], choices[:2])).abs().max()
        assert difference < 1e-2, f"the two ways of torch do not agree: {difference}"
        if task == "decode":
            seconds = median_of(lambda: model.generate(inputs[:DECODED], **options), 2)
            return {"decoding torch": DECODED * NEW / seconds}
        seconds = median_of(lambda: apart(inputs[:APART], choices[:APART]), 2)
        figures["ranking torch apart"] = APART / seconds
        for mode in modes:
            torch.set_float32_matmul_precision(mode)
            key = "ranking torch" if mode == "highest" else f"ranking bfloat16 torch {mode}"
            figures[key] = EXAMPLES / median_of(lambda: shared(inputs, choices), 2)
    return figures


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["rank", "decode"])
    parser.add_argument("--torch", help="A Python that has torch and transformers.")
    parser.add_argument("--peer", nargs="*", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.peer:
        print(json.dumps(peer(flags.task, flags.peer)))
        return
    figures = ours(flags.task)
    if flags.torch:
        modes = ["highest", *(["medium"] if "ranking bfloat16" in figures else [])]
        figures |= by_torch(flags.torch, __file__, flags.task, "--peer", *modes)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""Evaluation's speed, compared with Hugging Face on torch on the same questions.

    python scripts/bench/evaluate.py [--torch PYTHON] [--torch_only]

T5-small with random parameters, float32. Ranking: 64 examples of 128 tokens with 4 choices of 8,
EOS included; decoding: 16 inputs of 128 tokens, 32 new tokens each, greedily. PYTHON is an
interpreter that has torch and transformers; without it only m2l is measured.

torch ranks in two ways: each choice in a pass of its own through encoder and decoder, as
lm-evaluation-harness and most scripts do, and as well as it can: the encoder, and the keys and
values that the decoder reads of it, once for all choices of an example. Each at torch's defaults
and with set_float32_matmul_precision("medium").

Prints medians, what another model's parameters cost, and how much was compiled for them. Nothing
else should run.
"""

import argparse
import json
import statistics
import time

from models import T5, by_torch, median_of, t5_small

EXAMPLES, CHOICES, INPUTS, TARGETS = 64, 4, 128, 8
DECODED, NEW = 16, 32
# Each choice a pass of its own: a part of the examples will do.
APART = 8


def ours() -> None:
    """Measures m2l and prints it."""
    import jax
    import numpy as np

    from m2l import models
    from m2l.data.examples import GenerationExample, RankingExample
    from m2l.evaluation import batching, generation, ranking

    config = t5_small()
    params = models.init(config, jax.random.key(0))
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(2, T5["vocab_size"], length, dtype=np.int32)

    right = (True,) + (False,) * (CHOICES - 1)
    questions = [
        RankingExample(
            ids(INPUTS), tuple(ids(TARGETS) for _ in right), right, "", ("",) * CHOICES, False
        )
        for _ in range(EXAMPLES)
    ]
    parts = list(batching.batches(questions, 32, ranking.layouts.of(config)))

    def score(parameters: object = params) -> None:
        ranking.score_examples(config, parameters, questions, parts=parts)

    seconds = median_of(score, 5)
    print(f"m2l ranks {EXAMPLES / seconds:.1f} examples/s", flush=True)
    compiled = ranking.scorer(config, "float32")._cache_size()
    changed = [
        jax.tree.map(lambda leaf, s=s: np.asarray(leaf) * s, params) for s in (0.9, 1.1, 1.2)
    ]
    swaps = []
    for other in changed:
        start = time.perf_counter()
        score(jax.device_put(other))
        swaps.append(time.perf_counter() - start - seconds)
    more = ranking.scorer(config, "float32")._cache_size() - compiled
    print(f"another model: {max(0.0, statistics.median(swaps)):.3f} s more, {more} compilations")

    texts = [GenerationExample(ids(INPUTS), ids(1), ("",), "", "", False) for _ in range(DECODED)]
    parts_of_texts = list(batching.batches(texts, DECODED, ranking.layouts.of(config)))
    options = {"max_length": NEW, "eos_id": -1, "parts": parts_of_texts}
    seconds = median_of(lambda: generation.greedy(config, params, texts, **options), 5)
    print(f"m2l decodes {DECODED * NEW / seconds:.0f} new tokens/s", flush=True)


def peer() -> dict[str, float]:
    """Returns the rates of Hugging Face's T5, by task and torch's precision; needs torch."""
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

    rates = {}
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    with torch.inference_mode():
        difference = (apart(inputs[:2], choices[:2]) - shared(inputs[:2], choices[:2])).abs().max()
        assert difference < 1e-2, f"the two ways of torch do not agree: {difference}"
        for mode in ("highest", "medium"):
            torch.set_float32_matmul_precision(mode)
            seconds = median_of(lambda: apart(inputs[:APART], choices[:APART]), 2)
            rates[f"apart {mode}"] = APART / seconds
            rates[f"shared {mode}"] = EXAMPLES / median_of(lambda: shared(inputs, choices), 2)
            seconds = median_of(lambda: model.generate(inputs[:DECODED], **options), 2)
            rates[f"decode {mode}"] = DECODED * NEW / seconds
    return rates


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", help="A Python that has torch and transformers.")
    parser.add_argument("--torch_only", action="store_true", help="Leave m2l out.")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.peer:
        print(json.dumps(peer()))
        return
    if flags.torch:
        rates = by_torch(flags.torch, __file__, "--peer")
        for mode in ("highest", "medium"):
            print(
                f"torch {mode}: ranks {rates[f'apart {mode}']:.1f} examples/s with each choice "
                f"apart, {rates[f'shared {mode}']:.1f} sharing all it can; decodes "
                f"{rates[f'decode {mode}']:.0f} new tokens/s",
                flush=True,
            )
    if not flags.torch_only:
        ours()


if __name__ == "__main__":
    main()

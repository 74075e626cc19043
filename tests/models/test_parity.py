"""Hugging Face's models against ours, on golden outputs of tests/goldens/make_goldens.py."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from m2l import checkpoints, models
from m2l.checkpoints import huggingface
from m2l.data.examples import GenerationExample, RankingExample
from m2l.data.layouts import EncoderDecoder, PrefixLM, batches
from m2l.errors import DataError
from m2l.evaluation import generation, ranking
from m2l.models import Execution
from m2l.training.state import Objective, summed_loss

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location(
    "make_goldens", ROOT / "tests/goldens/make_goldens.py"
)
make_goldens = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_goldens)

VOCABULARY = {"name": "golden", "size": 61, "fingerprint": "golden"}


class Case:
    """A model as Hugging Face stores it, imported, and what it should compute."""

    def __init__(self, name, folder):
        self.settings = make_goldens.CASES[name]
        self.golden = np.load(ROOT / "tests/goldens/models" / f"{name}.npz")
        shapes = json.loads(self.golden["shapes"].tobytes())
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.settings))
        kind = self.settings["model_type"]
        self.weights = {
            name: make_goldens.weight(name, tuple(shape), kind) for name, shape in shapes.items()
        }
        save_file(self.weights, folder / "model.safetensors", {"format": "pt"})
        out = folder.with_name(folder.name + "_imported")
        manifest = huggingface.import_checkpoint(folder, out, vocabulary=VOCABULARY)
        self.config = models.from_dict(manifest.model)
        self.params = jax.device_put(checkpoints.restore(out))
        self.inputs, self.targets = make_goldens.texts(0, 61)
        start = self.settings.get("decoder_start_token_id")
        self.layout = PrefixLM(None) if self.config.decoder_only else EncoderDecoder(start)

    @functools.cached_property
    def logits(self):
        """The logits of `batch_of` without packing."""
        batch, _ = batch_of(self, pack=False)
        return np.asarray(jax.jit(lambda p: models.apply(self.config, p, batch))(self.params))


@pytest.fixture(scope="module", params=make_goldens.CASES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("parity") / request.param)


def loss(case, params, batch):
    sums = summed_loss(case.config, params, batch, None, Execution(), Objective())
    return sums["loss"] / sums["weight"]


def batch_of(case, pack):
    """All examples in a batch: one row each, or in two rows."""
    lengths = {"inputs": 28, "targets": 16} if pack else {"inputs": 17, "targets": 9}
    examples = list(zip(case.inputs, case.targets, strict=True))
    examples.append(examples[0])  # begins a row that is not handed out
    rows = 2 if pack else 3
    [(batch, count)] = batches(examples + examples[:2], lengths, rows, pack, case.layout)
    assert count >= 3
    keep = batch["decoder_target_tokens"].shape[0]
    return {name: value[:keep] for name, value in batch.items()}, count


def test_logits_are_hugging_faces(case):
    for i, target in enumerate(case.targets):
        expected = case.golden[f"logits_{i}"]
        first = len(case.inputs[i]) - 1 if case.config.decoder_only else 0
        found = case.logits[i, first : first + len(target)]
        # Of the largest logit: float32, summed in another order.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_loss_and_gradients_are_hugging_faces(case):
    batch, _ = batch_of(case, pack=False)
    value, gradients = jax.jit(jax.value_and_grad(lambda p: loss(case, p, batch)))(case.params)
    assert float(value) == pytest.approx(float(case.golden["loss"]), rel=1e-5)
    flat = checkpoints.flatten(jax.tree.map(np.asarray, gradients))
    theirs = {}
    for name, origin in huggingface.origins(case.config).items():
        parts = flat[name] if origin.stacked else [flat[name]]
        for tensor, part in zip(origin.tensors, parts, strict=True):
            theirs.setdefault(tensor, []).append(part.T if origin.transposed else part)
    for name in case.weights:
        norm, *some = case.golden[f"gradient {name}"]
        gradient = np.concatenate(theirs[name])
        assert np.linalg.norm(gradient) == pytest.approx(norm, rel=1e-4), name
        picked = gradient.reshape(-1)[:: max(1, gradient.size // 5)][:5]
        np.testing.assert_allclose(picked, some, rtol=1e-3, atol=1e-4 * norm, err_msg=name)


def test_packed_rows_have_the_loss_of_examples_alone(case):
    packed, count = batch_of(case, pack=True)
    assert count > 3 or packed["decoder_target_tokens"].shape[0] < 3
    # Row 0 holds two examples or more; the weights tell which targets count.
    batch, _ = batch_of(case, pack=False)
    together = jax.jit(lambda p: models.apply(case.config, p, packed))(case.params)
    by_target = {}
    for rows, logits in ((batch, case.logits), (packed, together)):
        taken = np.asarray(logits)[np.asarray(rows["decoder_loss_weights"]) == 1]
        by_target[len(by_target)] = taken
    count = min(len(part) for part in by_target.values())
    np.testing.assert_allclose(
        by_target[1][:count],
        by_target[0][:count],
        rtol=0,
        atol=2e-5 * np.abs(by_target[0]).max(),
    )


def continued(case, compute):
    """Returns what `compute` does; None where longrope refuses rows past its original length."""
    if make_goldens.CASES["phi3_long_rope"] != case.settings:
        return compute()
    with pytest.raises(DataError, match="positions: past 12 "):
        compute()


def test_greedy_decodings_are_hugging_faces(case):
    examples = [
        GenerationExample(inputs, np.array([1]), ("",), "", "", False) for inputs in case.inputs
    ]
    options = {"layout": case.layout, "eos_id": -1, "batch_size": 4}
    options["max_length"] = make_goldens.GREEDY
    decoded = continued(
        case, lambda: generation.greedy(case.config, case.params, examples, **options)
    )
    for i, tokens in enumerate(decoded or ()):
        assert tokens.tolist() == case.golden[f"greedy_{i}"].tolist()


def test_rank_scores_are_the_summed_log_probabilities_of_hugging_faces_logits(case):
    other = np.array([7, 1], np.int32)
    examples = [
        RankingExample(inputs, (target, other), (True, False), "", ("a", "b"), False)
        for inputs, target in zip(case.inputs, case.targets, strict=True)
    ]
    options = {"layout": case.layout, "batch_size": len(examples)}  # Of one shape.
    scores = continued(
        case, lambda: ranking.score_examples(case.config, case.params, examples, **options)
    )
    for i, target in enumerate(case.targets if scores else ()):
        logits = case.golden[f"logits_{i}"].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = log_p[np.arange(len(target)), target].sum()
        assert scores[i][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", make_goldens.CASES)
def test_the_installed_transformers_computes_the_goldens(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    golden = np.load(ROOT / "tests/goldens/models" / f"{name}.npz")
    for key, found in make_goldens.compute(make_goldens.CASES[name]).items():
        np.testing.assert_allclose(found, golden[key], rtol=1e-4, atol=1e-5, err_msg=key)

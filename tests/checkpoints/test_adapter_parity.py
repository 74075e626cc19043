"""Adapters are what PEFT takes them for; tests/goldens/make_adapter_goldens.py ran PEFT."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from m2l import checkpoints, models
from m2l.checkpoints.spans import read_whole
from m2l.evaluation.model import load
from m2l.merging import low_rank

DATA = Path(__file__).parents[1] / "goldens" / "adapters"
CASES = {n: c["base"] for n, c in json.loads((DATA / "cases.json").read_text())["cases"].items()}
OWN = [name for name, base in CASES.items() if base != "gpt2"]
IDS = np.array([[3, 5, 8, 13, 21, 34], [2, 4, 8, 16, 32, 1]], np.int32)

pytestmark = pytest.mark.filterwarnings("ignore:.*was made for the base")


def logits(path):
    model = load(path, "bytes_of_a_test")
    batch = {"decoder_input_tokens": IDS}
    if not model.config.decoder_only:
        batch["encoder_input_tokens"] = IDS
    return np.asarray(models.apply(model.config, jax.tree.map(np.asarray, model.params), batch))


@pytest.fixture(autouse=True)
def any_vocabulary(monkeypatch):
    """The models have no tokenizers."""
    described = {"name": "none", "size": 40, "fingerprint": "none"}
    monkeypatch.setattr("m2l.data.tokenizer_files.describe", lambda name: described)


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_those_of_merge_and_unload(name):
    """To float32: PEFT adds the terms of a product in another order, eight of at most 5."""
    opened = checkpoints.open(f"{DATA / CASES[name]}+{DATA / name}", native=True).parameters
    golden = np.load(DATA / name / "peft.npz")
    merged = {key.removeprefix("merged/"): golden[key] for key in golden if key != "logits"}
    for tensor, wanted in merged.items():
        if tensor == "lm_head.weight" and tensor not in opened:
            tensor = "model.embed_tokens.weight"
        np.testing.assert_allclose(read_whole(opened[tensor]), wanted, rtol=1e-6, atol=2e-6)
    base = checkpoints.open(DATA / CASES[name], native=True).parameters
    changed = {n for n in base if (read_whole(base[n]) != read_whole(opened[n])).any()}
    assert changed == {tensor for tensor in merged if tensor in base}


@pytest.mark.parametrize("name", [*OWN, *(f"{name}_extracted" for name in OWN)])
def test_logits_are_peft_s_with_its_adapters_and_with_those_that_m2l_wrote(name):
    """To what float32 gives of logits of about 50."""
    base = CASES[name.removesuffix("_extracted")]
    wanted = np.load(DATA / name / "peft.npz")["logits"]
    np.testing.assert_allclose(logits(f"{DATA / base}+{DATA / name}"), wanted, atol=5e-5)


@pytest.mark.parametrize("name", CASES)
def test_extraction_gives_back_the_adapter(name, tmp_path):
    """What PEFT read is what is extracted now, up to signs and the order of rounding."""
    base, stored = DATA / CASES[name], DATA / f"{name}_extracted"
    config = json.loads((stored / "adapter_config.json").read_text())
    rank = max(config["r"], *config["rank_pattern"].values(), 1)
    low_rank.extract(f"{base}+{DATA / name}", base, tmp_path / "out", rank=rank)
    ours = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert ours | {"base_model_name_or_path": None} == config | {"base_model_name_or_path": None}
    one, other = (
        checkpoints.open(f"{base}+{path}", native=True).parameters
        for path in (tmp_path / "out", stored)
    )
    for tensor in one:
        np.testing.assert_allclose(read_whole(one[tensor]), read_whole(other[tensor]), atol=1e-5)

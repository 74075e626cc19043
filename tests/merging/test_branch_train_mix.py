"""Mixtures of experts of dense models, against transformers (tests/goldens/make_moe_goldens.py)."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from m2l import checkpoints, models
from m2l.checkpoints import huggingface, huggingface_directory
from m2l.errors import M2LError
from m2l.evaluation.model import load
from m2l.merging.branch_train_mix import Prompts, mix

GOLDENS = Path(__file__).parents[1] / "goldens"
sys.path.append(str(GOLDENS))
_spec = importlib.util.spec_from_file_location("make_moe_goldens", GOLDENS / "make_moe_goldens.py")
make_moe_goldens = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_moe_goldens)
sys.path.remove(str(GOLDENS))

MIXTURES, CASES = make_moe_goldens.MIXTURES, make_moe_goldens.CASES
# Two experts' prompts, as the golden has them: text "w7" is token 7.
IDS = make_moe_goldens.texts(0, 61)
PROMPTS = [Prompts("golden", [" ".join(f"w{i}" for i in row) for row in rows]) for rows in IDS]


def save(folder, case, model, **changes):
    """A Hugging Face directory with the weights that the golden has, and a tokenizer."""
    folder.mkdir(parents=True)
    shapes = json.loads(np.load(GOLDENS / "models" / f"{case}.npz")["shapes"].tobytes())
    weights = make_moe_goldens.tensors({n: tuple(shape) for n, shape in shapes.items()}, model)
    save_file(weights | changes, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CASES[case]))
    words = {f"w{i}": i for i in range(61) if i != 1} | {"<end>": 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


@pytest.fixture(scope="module", params=MIXTURES)
def dense(request, tmp_path_factory):
    """A case's name, its base and its two experts."""
    root = tmp_path_factory.mktemp("dense")
    return request.param, *(save(root / name, request.param, name) for name in ("base", "0", "1"))


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    root, case = tmp_path_factory.mktemp("llamas"), "llama_tied_llama3_rope"
    return [save(root / name, case, name) for name in ("base", "0", "1")]


def logits_of(path, ids=IDS[0][0]):
    model = load(path)
    batch = {"decoder_input_tokens": ids[None]}
    return np.asarray(models.apply(model.config, jax.device_put(model.params), batch))[0]


def golden(name):
    return np.load(GOLDENS / "moe.npz")[name]


@pytest.mark.parametrize("router", ["hidden", "hidden_avg"])
def test_routers_and_logits_are_those_of_transformers(dense, router, tmp_path):
    case, base, *experts = dense
    out = tmp_path / "out"
    mix(base, experts, out, router=router, prompts=PROMPTS, experts_per_token=1)
    tensors, module = load_file(out / "model.safetensors"), MIXTURES[case][2]
    rows = [tensors[f"model.layers.{layer}.{module}.gate.weight"] for layer in range(3)]
    # Float32, through three layers.
    np.testing.assert_allclose(rows, golden(f"{case}/{router}"), rtol=0, atol=1e-5)
    if router == "hidden":
        expected = golden(f"{case}/logits")
        found = logits_of(out)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert json.loads((out / "config.json").read_text())["model_type"] == MIXTURES[case][0]
        assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("prompts", [(), PROMPTS * 2])
def test_a_mixture_of_equal_experts_is_that_expert(dense, prompts, tmp_path):
    _, base, expert, _ = dense
    router = {"router": "hidden" if prompts else "random", "seed": 3, "prompts": prompts}
    mix(base, [expert] * 4, tmp_path / "out", **router, experts_per_token=3)
    expected = logits_of(expert)
    found = logits_of(tmp_path / "out")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_mistral_keeps_its_windows(tmp_path):
    expert = save(tmp_path / "mistral", "mistral_window", "0")
    mix(expert, [expert] * 2, tmp_path / "out", router="random")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] == 5
    expected = logits_of(expert)
    found = logits_of(tmp_path / "out")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shared", ["average", "base"])
def test_all_but_mlps_is_the_average_or_the_bases_to_the_bit(llamas, shared, tmp_path):
    base, *experts = llamas
    manifest = mix(base, experts, tmp_path / "out", router="random", shared=shared)
    mixed = load_file(tmp_path / "out" / "model.safetensors")
    of_base, *parts = (load_file(path / "model.safetensors") for path in llamas)
    for name, tensor in of_base.items():
        layer, is_mlp, matrix = name.partition(".mlp.")
        if is_mlp:
            inner = MIXTURES["llama_tied_llama3_rope"][3][matrix.removesuffix(".weight")]
            for number, part in enumerate(parts):
                theirs = f"{layer}.block_sparse_moe.experts.{number}.{inner}.weight"
                assert mixed.pop(theirs).tobytes() == part[name].tobytes()
        else:
            mean = (parts[0][name] + parts[1][name]) / np.float32(2)
            assert mixed.pop(name).tobytes() == (tensor if shared == "base" else mean).tobytes()
    assert len(mixed) == 3 and all("gate" in name for name in mixed)
    assert [parent["role"] for parent in manifest.parents] == ["base", "expert", "expert"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| shared | {shared} |" in card and str(experts[1]) in card
    assert huggingface_directory.verify(tmp_path / "out").digest == manifest.digest
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_checkpoints_of_both_kinds_make_one_of_m2ls_and_nothing_is_done_twice(llamas, tmp_path):
    base, one, other = llamas
    vocabulary = load(one).vocabulary
    huggingface.import_checkpoint(one, tmp_path / "one", vocabulary=vocabulary, dtype="bfloat16")
    experts = [tmp_path / "one", other]
    options = {"router": "random", "seed": 1}
    first = mix(base, experts, tmp_path / "out", **options, dtype="bfloat16")
    assert checkpoints.verify(tmp_path / "out").digest == first.digest
    assert {record["dtype"] for record in first.parameters.values()} == {"bfloat16"}
    assert first.vocabulary["fingerprint"] == vocabulary["fingerprint"]
    again = mix(base, experts, tmp_path / "out", **options, dtype="bfloat16")
    assert again.digest == first.digest
    assert mix(base, experts, tmp_path / "wide", **options).dtype == "float32"
    with pytest.raises(M2LError, match="exists already"):
        mix(base, experts, tmp_path / "out", router="random", seed=2, dtype="bfloat16")


def config(folder, **changes):
    """A copy of a directory whose config.json says something else."""
    copy = shutil.copytree(folder, folder.with_name("changed"), dirs_exist_ok=True)
    settings = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | changes))
    return copy


def test_what_makes_no_mixture_is_refused_in_one_line(llamas, tmp_path):
    base, *experts = llamas
    smaller = {
        f"model.layers.{layer}.mlp.{part}_proj.weight": np.ones(
            (32, 40) if part == "down" else (40, 32), np.float32
        )
        for layer in range(3)
        for part in ("gate", "up", "down")
    }
    narrow = save(tmp_path / "narrow", "llama_tied_llama3_rope", "0", **smaller)
    narrow = config(narrow, intermediate_size=40)
    broken = {"model.norm.weight": np.full(32, np.nan, np.float32)}
    broken = save(tmp_path / "broken", "llama_tied_llama3_rope", "0", **broken)
    moe = tmp_path / "moe"
    mix(base, experts, moe, router="random")
    random = {"router": "random"}
    cases = [
        ([experts[0], narrow], random, "another model: intermediate_size is 40 and not 48"),
        ([experts[0], broken], random, r"decoder/norm\[0\].* is nan"),
        (experts, random | {"experts_per_token": 3}, "expected 1 to 2, the number of experts"),
        (experts, random | {"prompts": PROMPTS}, "a random router looks at no prompts"),
        (experts, random | {"shared": "mean"}, "unknown shared 'mean'"),
        (experts, {"router": "hiden", "prompts": PROMPTS}, "unknown router 'hiden'"),
        (experts, {"prompts": PROMPTS[:1]}, "1 prompts for 2 experts"),
        (experts, {}, "0 prompts for 2 experts"),
        (experts, {"prompts": [PROMPTS[0], Prompts("empty.txt", ["", " "])]}, "empty.txt: there"),
        ([], random, "nothing to mix"),
    ]
    for chosen, options, message in cases:
        with pytest.raises(M2LError, match=message) as caught:
            mix(base, chosen, tmp_path / "out", **options)
        line, *table = str(caught.value).split("\n")
        assert not table or "another model" in line
    with pytest.raises(M2LError, match="type mixtral: expected one of llama, mistral, qwen3"):
        mix(moe, [moe, moe], tmp_path / "out", **random)
    with pytest.raises(M2LError, match=r"(out|qkv)_bias: True cannot be expressed"):
        biased = save(tmp_path / "biased", "llama_biases", "0")
        mix(biased, [biased] * 2, tmp_path / "out", **random)
    assert not (tmp_path / "out").exists()


def test_a_damaged_expert_is_refused(llamas, tmp_path):
    base, one, other = llamas
    huggingface.import_checkpoint(one, tmp_path / "one", vocabulary=load(one).vocabulary)
    [chunk] = (tmp_path / "one" / "params" / "decoder.layers_00.mlp.wo").glob("c*0")
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(M2LError, match=r"layers_00/mlp/wo is damaged"):
        mix(base, [tmp_path / "one", other], tmp_path / "out", router="random")
    assert not (tmp_path / "out").exists()

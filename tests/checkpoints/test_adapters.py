"""Adapters in PEFT's format: what they make of their base, and which are refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as official

from m2l import checkpoints, merging
from m2l.checkpoints.spans import Span
from m2l.errors import CheckpointError
from tests.checkpoints import families

CONFIG = families.CONFIGS["llama"]
TENSORS = families.tensors_of(CONFIG)
LAYER = "model.layers.1"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


def factors(modules, rank=2, dtype=np.float32, seed=3):
    """lora_A and lora_B of modules, as PEFT names them."""
    rng, result = np.random.default_rng(seed), {}
    for module in modules:
        out, size = TENSORS[f"{module}.weight"].shape
        for half, shape in (("A", (rank, size)), ("B", (out, rank))):
            name = f"base_model.model.{module}.lora_{half}.weight"
            result[name] = rng.standard_normal(shape, np.float32).astype(dtype)
    return result


MODULES = [f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj"]


def write_adapter(directory, tensors=None, **fields):
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(LORA | fields))
    tensors = factors(MODULES) if tensors is None else tensors
    official.save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return families.write(tmp_path_factory.mktemp("base") / "llama", CONFIG, TENSORS)


@pytest.fixture(scope="module")
def checkpoint(base):
    families.imported(base, base.parent / "checkpoint")
    return base.parent / "checkpoint"


def read(parameter):
    array = np.empty(parameter.shape, parameter.dtype)
    parameter.read_span(Span(parameter.name, 0, array.size), array.reshape(-1))
    return array


def product(tensors, module, scale):
    """The formula, in float64."""
    down = tensors[f"base_model.model.{module}.lora_A.weight"].astype(np.float64)
    return scale * tensors[f"base_model.model.{module}.lora_B.weight"].astype(np.float64) @ down


@pytest.mark.parametrize(
    ("fields", "rank", "scales"),
    [
        ({}, 2, (3, 3)),
        ({"lora_alpha": 1.5}, 2, (0.75, 0.75)),
        ({"use_rslora": True}, 2, (6 / 2**0.5,) * 2),
        ({"target_modules": r".*\.1\.(self_attn\.q|mlp\.down)_proj"}, 2, (3, 3)),
        ({"target_modules": "all-linear"}, 2, (3, 3)),
        ({"alpha_pattern": {"q_proj": 8}}, 2, (4, 3)),
        ({"r": 1, "rank_pattern": {r"layers\.\d\.\w+\.q_proj": 2, "down_proj": 2}}, 2, (3, 3)),
        ({"r": 4}, 4, (1.5, 1.5)),
    ],
)  # fmt: skip
def test_an_adapted_weight_is_the_base_and_the_scaled_product(base, tmp_path, fields, rank, scales):
    tensors = factors(MODULES, rank)
    path = f"{base}+{write_adapter(tmp_path / 'adapter', tensors, **fields)}"
    parameters = checkpoints.open(path, native=True).parameters
    for module, scale in zip(MODULES, scales, strict=True):
        wanted = TENSORS[f"{module}.weight"] + product(tensors, module, scale)
        # float32 sums of at most five terms of about 10.
        np.testing.assert_allclose(read(parameters[f"{module}.weight"]), wanted, atol=1e-5)
    unchanged = f"{LAYER}.self_attn.k_proj.weight"
    assert read(parameters[unchanged]).tobytes() == TENSORS[unchanged].tobytes()


def test_all_formats_of_the_base_give_the_same_bits(base, checkpoint, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    theirs = checkpoints.open(f"{base}+{adapter}", native=True).parameters
    for path in (f"{base}+{adapter}", f"{checkpoint}+{adapter}"):
        ours = checkpoints.open(path).parameters
        for name, module in (("self_attention/query", MODULES[0]), ("mlp/wo", MODULES[1])):
            wanted = read(theirs[f"{module}.weight"]).T
            found = read(ours[f"decoder/layers_01/{name}"])
            assert found.tobytes() == np.ascontiguousarray(wanted).tobytes()


def test_an_element_has_the_same_bits_whatever_is_read_with_it(tmp_path):
    """Of a matrix of several tiles, by runs and boxes of any length."""
    rng = np.random.default_rng(0)
    rows, columns = 150, 8500
    tensors = {"a.weight": rng.standard_normal((rows, columns), np.float32)}
    base = families.write(tmp_path / "base", {}, tensors)
    pair = {"A": (5, columns), "B": (rows, 5)}
    adapter = write_adapter(
        tmp_path / "adapter",
        {
            f"base_model.model.a.lora_{half}.weight": rng.standard_normal(shape, np.float32)
            for half, shape in pair.items()
        },
        r=5,
        target_modules=["a"],
    )
    parameter = checkpoints.open(f"{base}+{adapter}", native=True).parameters["a.weight"]
    whole = read(parameter)
    for start, size in ((0, 1), (8499, 2), (7777, 223_456), (rows * columns - 3, 3)):
        part = np.empty(size, np.float32)
        parameter.read_span(Span("a.weight", start, size), part)
        assert part.tobytes() == whole.reshape(-1)[start : start + size].tobytes()
    box = slice(40, 120), slice(8181, 8203)
    part = np.empty((80, 22), np.float32)
    span = Span("a.weight", 40 * columns + 8181, 22, 80, columns, box)
    parameter.read_span(span, part.reshape(-1))
    assert part.tobytes() == np.ascontiguousarray(whole[box]).tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_factors_and_bases_of_16_bits_are_added_in_float32(tmp_path, dtype):
    narrow = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
    base = families.write(tmp_path / "base", CONFIG, narrow)
    tensors = factors(MODULES, dtype=dtype)
    path = f"{base}+{write_adapter(tmp_path / 'adapter', tensors)}"
    parameter = checkpoints.open(path, native=True).parameters[f"{MODULES[0]}.weight"]
    wanted = narrow[f"{MODULES[0]}.weight"].astype(np.float64) + product(tensors, MODULES[0], 3)
    assert parameter.dtype == np.float32
    np.testing.assert_allclose(read(parameter), wanted, atol=1e-5)


def test_embeddings_whole_modules_and_biases_are_understood(tmp_path):
    config = families.CONFIGS["llama, biased"] | {"tie_word_embeddings": False}
    tensors = families.tensors_of(config)
    base = families.write(tmp_path / "base", config, tensors)
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    embedding = "base_model.model.model.embed_tokens"
    stored = {
        f"{embedding}.lora_embedding_A": draw(2, families.VOCAB),
        f"{embedding}.lora_embedding_B": draw(families.WIDTH, 2),
        f"{embedding}.base_layer.weight": draw(families.VOCAB, families.WIDTH),
        "base_model.model.model.norm.weight": draw(families.WIDTH),
        "base_model.model.lm_head.modules_to_save.weight": draw(families.VOCAB, families.WIDTH),
        f"base_model.model.{LAYER}.self_attn.q_proj.base_layer.bias": draw(12),
    }
    saved = {"target_modules": ["embed_tokens"], "modules_to_save": ["norm", "lm_head"]}
    adapter = write_adapter(tmp_path / "adapter", stored, bias="all", **saved)
    parameters = checkpoints.open(f"{base}+{adapter}").parameters
    up, down = stored[f"{embedding}.lora_embedding_B"], stored[f"{embedding}.lora_embedding_A"]
    for name, wanted in {
        "token_embedder": stored[f"{embedding}.base_layer.weight"] + 3 * (up @ down).T,
        "decoder/norm": stored["base_model.model.model.norm.weight"],
        "decoder/logits": stored["base_model.model.lm_head.modules_to_save.weight"].T,
        "decoder/layers_01/self_attention/query_bias": [*stored.values()][-1],
    }.items():
        np.testing.assert_allclose(read(parameters[name]), wanted, atol=1e-5)


def test_weights_stored_the_other_way_round_get_the_transpose(tmp_path):
    """As GPT-2's, whose flag is fan_in_fan_out; where the shapes decide, they do."""
    rng = np.random.default_rng(2)
    tensors = {"h.0.attn.c_attn.weight": rng.standard_normal((4, 12), np.float32)}
    tensors["h.0.attn.c_proj.weight"] = rng.standard_normal((4, 4), np.float32)
    base = families.write(tmp_path / "base", {"model_type": "gpt2"}, tensors)
    stored = {}
    for part, out in (("c_attn", 12), ("c_proj", 4)):
        name = f"base_model.model.h.0.attn.{part}"
        stored[f"{name}.lora_A.weight"] = rng.standard_normal((2, 4), np.float32)
        stored[f"{name}.lora_B.weight"] = rng.standard_normal((out, 2), np.float32)
    adapter = write_adapter(
        tmp_path / "adapter", stored, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"]
    )
    parameters = checkpoints.open(f"{base}+{adapter}", native=True).parameters
    for name, tensor in tensors.items():
        wanted = tensor + product(stored, name.removesuffix(".weight"), 3).T
        np.testing.assert_allclose(read(parameters[name]), wanted, atol=1e-5)


def test_several_adapters_are_added_one_after_the_other(base, tmp_path):
    one, two = factors(MODULES, seed=5), factors(MODULES, seed=6)
    paths = [write_adapter(tmp_path / n, t) for n, t in (("one", one), ("two", two))]
    parameters = checkpoints.open(f"{base}+{paths[0]}+{paths[1]}", native=True).parameters
    wanted = TENSORS[f"{MODULES[0]}.weight"] + sum(product(t, MODULES[0], 3) for t in (one, two))
    np.testing.assert_allclose(read(parameters[f"{MODULES[0]}.weight"]), wanted, atol=2e-5)


def test_identity_is_that_of_the_base_and_of_the_adapter(base, tmp_path):
    plain, same = (write_adapter(tmp_path / name) for name in ("one", "two"))
    other = write_adapter(tmp_path / "three", lora_alpha=7)
    digests = [checkpoints.open(f"{base}+{path}").digest for path in (plain, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert checkpoints.open(base).digest not in digests


def test_a_folder_with_a_plus_in_its_name_is_one_path(base, tmp_path):
    named = families.write(tmp_path / "a+b", CONFIG, TENSORS)
    assert checkpoints.open(named).adapted is None
    path = f"{named}+{write_adapter(tmp_path / 'c+d')}"
    assert checkpoints.open(path).adapted[0].path == named
    assert checkpoints.open(path).paths == (named, tmp_path / "c+d")


def test_another_base_is_warned_of_by_its_recorded_name(base, tmp_path):
    adapter = write_adapter(tmp_path / "one", base_model_name_or_path="org/other")
    with pytest.warns(UserWarning, match=r"for the base 'org/other', and is put on .*llama"):
        checkpoints.open(f"{base}+{adapter}")
    adapter = write_adapter(tmp_path / "two", base_model_name_or_path="org/Llama")
    checkpoints.open(f"{base}+{adapter}")


def renamed(old, new):
    return {name.replace(old, new): tensor for name, tensor in factors(MODULES).items()}


WIDER = {n: np.repeat(t, 2, 0) if "lora_B" in n else t for n, t in factors(MODULES).items()}


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        (None, {"peft_type": "IA3"}, "peft_type 'IA3': expected 'LORA'"),
        (None, {"use_dora": True}, r"adapter_config.json: use_dora is True, which m2l does not"),
        (None, {"lora_bias": True}, "lora_bias is True"),
        (None, {"layer_replication": [[0, 2]]}, "layer_replication is"),
        (None, {"trainable_token_indices": [1]}, "trainable_token_indices is"),
        (None, {"a_field_of_next_year": 1}, "a_field_of_next_year is 1"),
        (None, {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', with which PEFT"),
        (None, {"r": 0}, "r is 0, which cannot be"),
        (None, {"bias": "some"}, "bias is 'some'"),
        (None, {"rank_pattern": {"q_proj": "2"}}, "rank_pattern is"),
        (None, {"r": 4}, r"factors of model.layers.1.\w+.\w+ are \[2, .*rank is 4"),
        (None, {"rank_pattern": {"down_proj": 3}}, "mlp.down_proj are .*rank is 3"),
        (None, {"target_modules": ["q_proj"]}, r"does not name model.layers.1.mlp.down_proj"),
        (None, {"target_modules": ".*q_proj"}, r"does not name model.layers.1.mlp.down_proj"),
        (None, {"target_modules": ["q_proj", "down_proj", "k_proj"]}, "names 'k_proj', of which"),
        (None, {"target_modules": "("}, "is no pattern"),
        (
            renamed("layers.1", "layers.7"),
            {},
            "has no model.layers.7.*: it is an adapter of another base",
        ),
        (
            WIDER,
            {"base_model_name_or_path": "org/llama"},
            r"it has \[\d+, \d+\].*another base, 'org/llama'",
        ),
        (renamed("lora_A", "lora_E"), {}, "lora_E.weight is not understood"),
        (renamed("base_model.model.", ""), {}, "is not understood"),
        ({n: t for n, t in factors(MODULES).items() if "lora_B" not in n}, {}, "and no lora_B"),
        (dict.fromkeys(factors(MODULES), np.ones((2, 8, 1), np.float32)), {}, "only those of mat"),
        ({}, {}, "it has no tensors"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(base, tmp_path, tensors, fields, message):
    adapter = write_adapter(tmp_path / "adapter", tensors, **fields)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(f"{base}+{adapter}", native=True)


def test_what_m2l_splits_is_refused_with_its_reason(tmp_path):
    config = families.CONFIGS["phi3"]
    tensors, module = families.tensors_of(config), f"{LAYER}.self_attn.qkv_proj"
    base = families.write(tmp_path / "base", config, tensors)
    rows, columns = tensors[f"{module}.weight"].shape
    stored = {
        f"base_model.model.{module}.lora_A.weight": np.ones((2, columns), np.float32),
        f"base_model.model.{module}.lora_B.weight": np.ones((rows, 2), np.float32),
    }
    adapter = write_adapter(tmp_path / "adapter", stored, target_modules=["qkv_proj"])
    with pytest.raises(CheckpointError, match=r"joins or is a part.*--method average --expert"):
        checkpoints.open(f"{base}+{adapter}")
    recipe, out = merging.Recipe("average"), tmp_path / "merged"
    merging.merge(None, [f"{base}+{adapter}"], recipe, out, progress=False)
    checkpoints.open(out)


def test_missing_files_are_named(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: missing; adapter_model"):
        checkpoints.open(f"{base}+{adapter}")
    with pytest.raises(CheckpointError, match=r"nothing: no adapter: adapter_config.json is miss"):
        checkpoints.open(f"{base}+{tmp_path / 'nothing'}")
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        checkpoints.open(f"{tmp_path / 'nowhere'}+{adapter}")


@pytest.mark.parametrize(
    ("name", "message"),
    [("lora_embedding", "has factors; untie them"), ("weight", "ensure_weight_tying is not set")],
)
def test_half_of_a_tied_embedding_is_refused(tmp_path, name, message):
    config = families.CONFIGS["llama, tied"]
    base = families.write(tmp_path / "base", config, families.tensors_of(config))
    stored, module = {}, "base_model.model.model.embed_tokens"
    if name == "weight":
        stored[f"{module}.weight"] = np.ones((families.VOCAB, families.WIDTH), np.float32)
    else:
        stored[f"{module}.lora_embedding_A"] = np.ones((2, families.VOCAB), np.float32)
        stored[f"{module}.lora_embedding_B"] = np.ones((families.WIDTH, 2), np.float32)
    targets = None if name == "weight" else ["embed_tokens"]
    adapter = write_adapter(tmp_path / "adapter", stored, target_modules=targets)
    for native in (True, False):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.open(f"{base}+{adapter}", native=native)

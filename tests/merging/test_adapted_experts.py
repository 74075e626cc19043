"""A base and an adapter together are an expert like any other."""

import collections
import json
import shutil

import numpy as np
import pytest
from safetensors import numpy as official

from m2l import checkpoints
from m2l.checkpoints import adapters, huggingface, safetensors
from m2l.checkpoints.spans import Span
from m2l.errors import CheckpointError, MergeError
from m2l.merging import Recipe, merge
from tests.merging.conftest import same_bits, write

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 12,
    "hidden_size": 8, "intermediate_size": 300, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
LAYER = "model.layers.0"
SHAPES = {f"{LAYER}.self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"}
SHAPES |= {f"{LAYER}.mlp.{part}_proj.weight": (300, 8) for part in ("gate", "up")}
SHAPES |= {f"{LAYER}.mlp.down_proj.weight": (8, 300), "model.norm.weight": (8,)}
SHAPES |= {f"{LAYER}.{n}_layernorm.weight": (8,) for n in ("input", "post_attention")}
SHAPES |= {"model.embed_tokens.weight": (12, 8), "lm_head.weight": (12, 8)}
RECIPES = [
    Recipe("average"),
    Recipe("task_arithmetic", scale=0.4, dtype="bfloat16"),
    Recipe("ties", density=0.3),
    Recipe("ties", density=0.3, scope="tensor", keep="one_more"),
    Recipe("dare_ties", drop_rate=0.6, seed=4, density=0.5),
    Recipe("della", drop_rate=0.5, seed=4),
    Recipe("tsv_m"),
]


def save(directory, tensors, **config):
    directory.mkdir()
    official.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    return directory


def read(parameter):
    array = np.empty(parameter.shape, parameter.dtype)
    parameter.read_span(Span(parameter.name, 0, array.size), array.reshape(-1))
    return array


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, two adapters, and what these make of it, in files of their own."""
    root, rng = tmp_path_factory.mktemp("adapted"), np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    base = save(root / "base", {name: draw(*shape) for name, shape in SHAPES.items()})
    experts, whole = [], []
    for index, modules in enumerate((("q_proj", "down_proj"), ("q_proj", "gate_proj"))):
        factors = {}
        for name, shape in SHAPES.items():
            if any(f"{module}.weight" in name for module in modules):
                module = f"base_model.model.{name.removesuffix('.weight')}"
                factors[f"{module}.lora_A.weight"] = draw(3, shape[1])
                factors[f"{module}.lora_B.weight"] = draw(shape[0], 3)
        adapter = root / f"adapter_{index}"
        adapter.mkdir()
        fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 2, "target_modules": modules}
        (adapter / "adapter_config.json").write_text(json.dumps(fields))
        official.save_file(factors, adapter / "adapter_model.safetensors")
        experts.append(f"{base}+{adapter}")
        opened = checkpoints.open(experts[-1], native=True)
        tensors = {name: read(tensor) for name, tensor in opened.parameters.items()}
        whole.append(save(root / f"whole_{index}", tensors))
    return base, experts, whole


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
@pytest.mark.parametrize("output_format", ["orbax", "huggingface"])
def test_they_merge_to_the_bits_of_the_models_they_make(models, tmp_path, recipe, output_format):
    """So thresholds, draws and blocks are those of the whole models."""
    base, experts, whole = models
    options = {"output_format": output_format, "progress": False}
    options["vocabulary"] = {"name": "bytes", "size": 12, "fingerprint": "x"}
    adapted = merge(base, experts, recipe, tmp_path / "adapted", block=777, **options)
    plain = merge(base, whole, recipe, tmp_path / "plain", **options)
    assert adapted.parameters == plain.parameters
    roles = [
        (parent["role"], parent["path"]) for parent in adapted.parents if parent["role"] != "base"
    ]
    assert roles == [("expert", path) for path in experts]
    digests = [parent["digest"] for parent in adapted.parents if parent["role"] == "expert"]
    assert digests == [checkpoints.open(path).digest for path in experts]
    # The same merge finds its result; of a changed adapter it is another merge.
    merge(base, experts, recipe, tmp_path / "adapted", **options)
    with pytest.raises(CheckpointError, match="exists"):
        merge(base, experts[::-1], recipe, tmp_path / "adapted", **options)


def test_a_base_of_m2l_gives_the_same_bits(models, tmp_path):
    base, experts, _ = models
    vocabulary = {"name": "bytes", "size": 12, "fingerprint": "x"}
    huggingface.import_checkpoint(base, tmp_path / "base", vocabulary=vocabulary)
    own = [path.replace(str(base), str(tmp_path / "base")) for path in experts]
    theirs = merge(base, experts, Recipe("ties", density=0.3))
    ours = merge(tmp_path / "base", own, Recipe("ties", density=0.3))
    same_bits(checkpoints.flatten(ours), checkpoints.flatten(theirs))


def test_the_base_of_several_adapters_is_read_once(models, tmp_path, monkeypatch):
    base, experts, _ = models
    read, counts = safetensors.StoredTensor.read_span, collections.Counter()

    def counted(self, span, out):
        counts[self.name, span.start] += self.file.parent == base
        read(self, span, out)

    monkeypatch.setattr(safetensors.StoredTensor, "read_span", counted)
    options = {"diagnostics": False, "progress": False}
    merge(base, experts, Recipe("task_arithmetic"), tmp_path / "first", **options)
    assert counts[f"{LAYER}.self_attn.q_proj.weight", 0] == 1
    counts.clear()
    merge(None, experts, Recipe("average"), tmp_path / "second", **options)
    assert counts[f"{LAYER}.self_attn.q_proj.weight", 0] == 1


def test_rows_that_are_apart_are_those_of_the_whole(models):
    tensor = checkpoints.open(models[1][0], native=True).parameters[f"{LAYER}.mlp.down_proj.weight"]
    span, whole = Span(tensor.name, 290, 25, rows=6, stride=371), read(tensor).reshape(-1)
    wanted = np.concatenate([whole[290 + row * 371 :][:25] for row in range(6)])
    exact, sample = np.empty(150, np.float32), np.empty(150, np.float32)
    tensor.read_span(span, exact)
    np.testing.assert_array_equal(exact, wanted)
    tensor.read_sample(span, sample)
    np.testing.assert_allclose(sample, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_read_at_once_are_whole_tiles_or_a_block(models):
    tensor = checkpoints.open(models[1][0], native=True).parameters[f"{LAYER}.mlp.down_proj.weight"]
    rows = adapters.tile_shape(300)[0]
    lengths = {1 << 19: 3 * 300 * rows, 300 * rows: 300 * rows, 50_000: 300 * rows, 777: 777}
    assert {block: tensor.best_run(block) for block in lengths} == lengths


@pytest.mark.parametrize("output_format", ["orbax", "huggingface"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_flipped_bit_of_the_base_is_found(models, tmp_path, output_format, number):
    base, experts, _ = models
    shutil.copytree(base, tmp_path / "base")
    vocabulary = {"name": "bytes", "size": 12, "fingerprint": "x"}
    options = {"output_format": output_format, "progress": False, "vocabulary": vocabulary}
    if output_format == "orbax":
        huggingface.import_checkpoint(base, tmp_path / "own", vocabulary=vocabulary)
        own = tmp_path / "own"
        file = max(own.rglob("*layers_00*/c*"), key=lambda path: (path.stat().st_size, path))
        place, message = 40, r"layers_00\S+ is damaged"
    else:
        merge(None, [base], Recipe("average"), tmp_path / "own", **options)
        own = tmp_path / "own"
        file = own / "model.safetensors"
        tensor = safetensors.read_header(file)[f"{LAYER}.mlp.down_proj.weight"]
        place, message = tensor.offset + 40, "down_proj.weight does not have the digest"
    experts = [path.replace(str(base), str(own)) for path in experts[:number]]
    merge(None, experts, Recipe("average"), tmp_path / "sound", **options)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        merge(None, experts, Recipe("average"), tmp_path / "out", **options)
    assert not [*tmp_path.glob("*out*")]
    merge(None, experts, Recipe("average"), tmp_path / "out", verify=False, **options)


def test_results_may_not_be_inside_an_adapter(models):
    base, experts, _ = models
    adapter = experts[0].split("+")[1]
    with pytest.raises(MergeError, match="is inside an input"):
        merge(base, experts, Recipe("average"), f"{adapter}/out")


def test_a_base_that_does_not_say_its_model_is_refused(models, tmp_path):
    write(tmp_path / "base", {"a": np.ones((2, 2), np.float32)}, model={})
    adapter = models[1][0].split("+")[1]
    with pytest.raises(CheckpointError, match="an adapter names modules as Hugging Face does"):
        checkpoints.open(f"{tmp_path / 'base'}+{adapter}")

"""mergekit's files run as they are: its own output for them, and what is refused."""

import importlib.util
import json
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from m2l import checkpoints
from m2l.checkpoints import huggingface_directory, safetensors
from m2l.errors import M2LError, MergeError
from m2l.merging import Recipe, merge, mergekit, mergekit_file

DATA = Path(__file__).parents[1] / "goldens"
SPEC = importlib.util.spec_from_file_location("goldens", DATA / "make_mergekit_goldens.py")
goldens = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(goldens)

NAMES = sorted(file.stem for file in goldens.FILES.glob("*.yml"))
COPIED = ("orcamini-platy-44layer",)
"""What copies has its bits."""


def write(path, tensors, config):
    path.mkdir(parents=True)
    described = {name: (a.shape, a.dtype) for name, a in tensors.items()}
    extents = safetensors.create(path, described, [list(tensors)])
    for name, array in tensors.items():
        extents[name].write_from(array.reshape(-1), 0)
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in goldens.MODELS:
        write(root / name, goldens.draw(name), goldens.CONFIG)
    return root


@pytest.fixture(autouse=True)
def inside(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def arrays():
    with np.load(goldens.GOLDENS) as file:
        return dict(file)


def run(file, out):
    base, experts, recipe, slices = mergekit.resolve(mergekit_file.read(file))
    manifest = merge(base, experts, recipe, out, slices=slices, progress=False, diagnostics=False)
    tensors = {n: t.read().reshape(t.shape) for n, t in safetensors.open_tensors(out).items()}
    return manifest, tensors


@pytest.mark.parametrize("dtype", ["as_is", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_what_mergekit_makes_of_it(tmp_path, arrays, name, dtype):
    text = (goldens.FILES / f"{name}.yml").read_text()
    if dtype != "as_is":
        lines = [line for line in text.splitlines() if "dtype:" not in line]
        text = "\n".join([*lines, f"dtype: {dtype}"])
    (tmp_path / "file.yml").write_text(text)
    manifest, tensors = run(tmp_path / "file.yml", tmp_path / "out")
    wanted = {n.split("/")[2]: a for n, a in arrays.items() if n.startswith(f"{name}/{dtype}/")}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == arrays[f"{name}/layers"]
    assert {n for n in tensors if goldens.is_stored(n, arrays[f"{name}/layers"])} == {*wanted}
    # safetensors gives bfloat16 to NumPy as float32.
    dtypes = {np.dtype(ml_dtypes.bfloat16): np.dtype(np.float32)}
    for tensor, array in wanted.items():
        assert array.dtype == dtypes.get(tensors[tensor].dtype, tensors[tensor].dtype)
    if name in COPIED:
        assert all(tensors[n].tobytes() == a.tobytes() for n, a in wanted.items())
    # Both in float32, sums in other orders. As is, mergekit rounds to float16 after each step, up
    # to five times half a unit at numbers of up to 4, and we once at the end.
    tolerance = 2e-6 if dtype == "float32" or "float32" in text else 1e-2
    if name == "arcee_fusion":
        # Its importance of an entry is a small difference that mergekit rounds in the file's dtype:
        # 1 of 3,444 entries is on the other side of the threshold in float32, 242 in bfloat16.
        pairs = [(np.float64(tensors[n]), np.float64(array)) for n, array in wanted.items()]
        differ = np.concatenate([np.abs(a - b).ravel() > tolerance for a, b in pairs])
        assert differ.mean() < (1e-3 if dtype == "float32" else 0.1)
        return
    for tensor, array in wanted.items():
        np.testing.assert_allclose(
            np.float64(tensors[tensor]), np.float64(array), rtol=0, atol=tolerance, err_msg=tensor
        )
    assert Recipe.from_dict(manifest.made_by["recipe"]).to_dict() == manifest.made_by["recipe"]


def test_layers_are_numbered_anew_and_those_of_their_models(root, tmp_path):
    manifest, tensors = run(goldens.FILES / "orcamini-platy-44layer.yml", tmp_path / "out")
    orca, platypus = (
        goldens.draw(n) for n in ("psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B")
    )
    for number in range(44):
        source, layer = (orca, number) if number < 24 else (platypus, number - 4)
        for name in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"):
            wanted = source[f"model.layers.{layer}.{name}.weight"]
            assert np.array_equal(tensors[f"model.layers.{number}.{name}.weight"], wanted)
    assert np.array_equal(tensors["model.embed_tokens.weight"], orca["model.embed_tokens.weight"])
    assert np.array_equal(tensors["lm_head.weight"], platypus["lm_head.weight"])
    assert len(tensors) == 44 * 9 + 3
    assert manifest.made_by["slices"] == [
        {"layers": 24, "of": [["psmathur/orca_mini_v3_13b", 0]]},
        {"layers": 20, "of": [["garage-bAInd/Platypus2-13B", 20]]},
    ]
    assert [Path(parent["path"]).name for parent in manifest.parents] == [
        "orca_mini_v3_13b",
        "Platypus2-13B",
    ]
    huggingface_directory.verify(tmp_path / "out")


def test_fields_of_one_entry_for_each_layer_follow_the_layers(tmp_path):
    kinds = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(40)]
    config = goldens.CONFIG | {"layer_types": kinds, "model_type": "unheard_of"}
    write(tmp_path / "model", goldens.draw("model_a"), config)
    file = tmp_path / "file.yml"
    ranges = ([0, 10], [6, 9], [38, 40])
    sources = "".join(
        f"\n- sources: [{{model: {tmp_path}/model, layer_range: {list(r)}}}]" for r in ranges
    )
    file.write_text(f"merge_method: passthrough\nslices:{sources}\n")
    run(file, tmp_path / "out")
    result = json.loads((tmp_path / "out/config.json").read_text())
    assert result["num_hidden_layers"] == 15
    assert result["layer_types"] == [kinds[i] for r in ranges for i in range(*r)]


FILE = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters: {weight: 0.5}
  - model: garage-bAInd/Platypus2-13B
    parameters: {weight: 0.5}
merge_method: task_arithmetic
base_model: TheBloke/Llama-2-13B-fp16
"""
SLICES = """
slices:
  - sources:
      - {model: psmathur/orca_mini_v3_13b, layer_range: [0, 16]}
      - {model: garage-bAInd/Platypus2-13B, layer_range: [0, 16]}
  - sources:
      - {model: psmathur/orca_mini_v3_13b, layer_range: [16, 40]}
      - {model: garage-bAInd/Platypus2-13B, layer_range: [16, 40]}
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters: {t: 0.5}
"""
UNEVEN = """
slices:
  - sources:
      - {model: psmathur/orca_mini_v3_13b, layer_range: [0, 16]}
      - {model: garage-bAInd/Platypus2-13B, layer_range: [0, 16]}
      - {model: TheBloke/Llama-2-13B-fp16, layer_range: [0, 16]}
  - sources:
      - {model: psmathur/orca_mini_v3_13b, layer_range: [16, 40]}
      - {model: garage-bAInd/Platypus2-13B, layer_range: [16, 40]}
merge_method: karcher
base_model: psmathur/orca_mini_v3_13b
dtype: float32
"""


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (FILE, "merge_method: task", "merge_method: tusk", "merge_method in .*file.yml: 'tusk"),
        (FILE, "base_model", "base_modle", "unknown key in .*file.yml: 'base_modle'.*'base_model'"),
        (FILE, "{weight: 0.5}", "{wieght: 0.5}", r"key in .*: models\[0\].parameters: 'wieght'"),
        (FILE, "- model: psm", "- modle: psm", r"key in .*file.yml: models\[0\]: 'modle'"),
        (FILE, "    parameters: {weight: 0.5}\n", "", "has no weight for"),
        (FILE, "0.5", "a half", r"models\[0\].parameters.weight must be a number, not 'a half'"),
        (FILE, "0.5", "[]", r"models\[0\].parameters.weight: a gradient of no numbers"),
        (FILE, "0.5", "[{filter: mlp}]", r"weight\[0\]: it has no value"),
        (FILE, "0.5", "[{fliter: mlp, value: 1}]", r"key in .*weight\[0\]: 'fliter'"),
        (FILE, "models:", "module:", "unknown key in .*: 'module'"),
        (FILE, "models:", "slices: []\nmodels:", None),
        (FILE, "base_model: TheBloke/Llama-2-13B-fp16", "", "base_model must be one of its models"),
        (FILE, "base_model:", "dtype: float8\nbase_model:", "unknown dtype in .*: 'float8'"),
        (
            FILE,
            "base_model:",
            "tokenizer_source: model_b\nbase_model:",
            "tokenizer of model_b, which",
        ),
        (
            FILE,
            "base_model:",
            "tokenizer: {sauce: union}\nbase_model:",
            "key in .*: tokenizer: 'sauce'",
        ),
        (
            FILE,
            "base_model:",
            "chat_template: chatml\nbase_model:",
            "chat_template 'chatml': m2l has",
        ),
        (FILE, "task_arithmetic", "slerp", "slerp takes two models"),
        (FILE, "task_arithmetic", "passthrough", "passthrough takes one model, not 3"),
        (FILE, "psmathur/orca_mini_v3_13b", "no/such", "no/such"),
        (FILE, FILE, "- 1", "expected keys and values"),
        (FILE, FILE, "a: [", "not YAML that can be read"),
        (SLICES, "3b, layer_range: [0, 16]", "3b, layer_range: [0, 9]", "other numbers of layers"),
        (SLICES, "[0, 16]", "[16]", r"sources\[0\].layer_range must be the first layer"),
        (SLICES, ": [16, 40]", ": [17, 41]", "leave out layer 16 of psmathur"),
        (SLICES, ": [16, 40]", ": [17, 40]", "leave out layer 16 of psmathur/orca_mini_v3_13b"),
        (SLICES, ": [16, 40]", ": [14, 40]", "overlap: they repeat layers 14, 15 of psmathur"),
        (SLICES, ": [16, 40]", ": [16, 36]", "leave out layers 36, 37, 38, 39 of psmathur"),
        (SLICES, ": [0, 16]", ": [0, 16], layers: 3", r"sources\[0\]: 'layers'"),
        (SLICES, "{t: 0.5}", "{}", "slerp has no t for model.embed_tokens.weight"),
        (
            FILE,
            "task_arithmetic",
            "karcher\nparameters: {max_iter: 200}",
            "file.yml: parameters.max_iter must be at least 0 and at most 100, not 200",
        ),
        (
            FILE,
            "task_arithmetic",
            "karcher\nparameters: {tol: -1}",
            "file.yml: tolerance must be at least 0",
        ),
        *(
            (
                UNEVEN,
                "karcher",
                method,
                rf"file.yml: slices\[1\] has 2 sources, slices\[0\] 3: {method} takes as many",
            )
            for method in ("sce", "model_stock")
        ),
    ],
)
def test_what_a_file_may_not_say_is_refused_by_name_and_place(tmp_path, text, old, new, message):
    (tmp_path / "file.yml").write_text(text.replace(old, new))
    if message is None:
        mergekit.resolve(mergekit_file.read(tmp_path / "file.yml"))
        return
    with pytest.raises(M2LError, match=message) as caught:
        mergekit.resolve(mergekit_file.read(tmp_path / "file.yml"))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[0, 8], [36, 44]], r"slices\[1\]: psmathur/.* has no layer 40; its layers are 0 to 39"),
        (
            [[0, 8], ["other", 0, 4]],
            r"mlp.up_proj.weight is float\[16, 18\], in the layers of .*float\[16, 12\]",
        ),
    ],
)
def test_slices_that_do_not_fit_are_refused(tmp_path, root, ranges, message):
    if not (root / "other").exists():
        tensors = goldens.draw("model_a") | {
            n: np.zeros((16, 18), np.float16) for n in goldens.draw("model_a") if "up_proj" in n
        }
        write(root / "other", tensors, goldens.CONFIG)
    lines = []
    for each in ranges:
        model = each.pop(0) if isinstance(each[0], str) else "psmathur/orca_mini_v3_13b"
        lines.append(f"- sources: [{{model: {model}, layer_range: {each}}}]")
    (tmp_path / "file.yml").write_text("\n".join(["merge_method: passthrough", "slices:", *lines]))
    with pytest.raises(MergeError, match=message):
        run(tmp_path / "file.yml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_filter_of_no_tensor_and_a_parameter_without_effect_are_said(tmp_path):
    text = FILE.replace("0.5", "[{filter: atn, value: 1}, {value: 0.5}]", 1)
    text += "parameters: {gamma: 0.1}\n"
    (tmp_path / "file.yml").write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mergekit.resolve(mergekit_file.read(tmp_path / "file.yml"))
    messages = " ".join(str(warning.message) for warning in caught)
    assert "filter 'atn' is of no tensor" in messages
    assert "parameters.gamma has no effect there: ignored" in messages


def test_without_a_dtype_the_result_has_the_models(tmp_path):
    (tmp_path / "file.yml").write_text(FILE)
    recipe = mergekit.resolve(mergekit_file.read(tmp_path / "file.yml")).recipe
    assert recipe.dtype == "float16"
    assert (recipe.weights, recipe.scale) == ((0.5, 0.5), 1.0)
    tensors = {n: a.astype(ml_dtypes.bfloat16) for n, a in goldens.draw("model_a").items()}
    write(tmp_path / "bf16", tensors, goldens.CONFIG)
    (tmp_path / "file.yml").write_text(
        f"models: [{{model: {tmp_path}/bf16}}]\nmerge_method: passthrough\nout_dtype: null\n"
    )
    recipe = mergekit.resolve(mergekit_file.read(tmp_path / "file.yml")).recipe
    assert recipe.dtype == "bfloat16"


def test_models_that_fill_up_a_slice_do_not_count(tmp_path):
    (tmp_path / "file.yml").write_text(UNEVEN)
    (tmp_path / "two.yml").write_text(SLICES.replace("slerp", "karcher") + "dtype: float32")
    merged, two = (run(tmp_path / f"{n}.yml", tmp_path / n)[1] for n in ("file", "two"))
    for layer, is_same in ((3, False), (20, True)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert np.allclose(merged[name], two[name], rtol=0, atol=1e-6) == is_same


@pytest.mark.parametrize(
    ("weights", "normalize", "wanted"),
    [((-0.5, -1.0), "false", 1.5), ((-0.5, -1.0), "true", 1.0), ((0.5,), "false", 1.0)],
)
def test_multislerp_is_as_long_as_its_weights_say(tmp_path, weights, normalize, wanted):
    models = zip((ORCA, PLATYPUS), weights, strict=False)
    lines = [f"- {{model: {model}, parameters: {{weight: {w}}}}}" for model, w in models]
    text = f"merge_method: multislerp\nparameters: {{normalize_weights: {normalize}}}\nmodels:"
    (tmp_path / "file.yml").write_text("\n".join([text, *lines]))
    recipe = mergekit.resolve(mergekit_file.read(tmp_path / "file.yml")).recipe
    assert recipe.scale == wanted and sum(recipe.weights) != 0


ORCA, PLATYPUS = "psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B"
TOKENS = f"""
  tokens:
    <a>: {{source: {PLATYPUS}, force: true}}
    <b>: {{source: {{kind: zero}}}}
    <c>: {{source: {{kind: model_token, model: {ORCA}, token: <d>}}}}
    <e>: {{source: {{kind: model_token, model: TheBloke/Llama-2-13B-fp16, token_id: 7}}}}
"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("tokenizer_source: union", {"source": "union"}),
        ("tokenizer_source: base", {"source": "base"}),
        (f"tokenizer_source: {PLATYPUS}", {"source": "expert_1"}),
        ("chat_template: auto", {"source": "base", "chat_template": "auto"}),
        ("chat_template: '{{ x }}'", {"source": "base", "chat_template": "{{ x }}"}),
        (
            f"tokenizer:\n  source: {ORCA}\n  pad_to_multiple_of: 8",
            {"source": "expert_0", "pad_to": 8},
        ),
        (
            f"tokenizer:{TOKENS}",
            {
                "source": "union",
                "tokens": {
                    "<a>": {"source": "expert_1", "force": True},
                    "<b>": {"source": "zero"},
                    "<c>": {"source": "expert_0", "token": "<d>"},
                    "<e>": {"source": "base", "token": 7},
                },
            },
        ),
    ],
)
def test_tokenizers_are_those_of_recipes_with_models_by_their_roles(tmp_path, text, wanted):
    (tmp_path / "file.yml").write_text(f"{FILE}{text}\n")
    recipe = mergekit.resolve(mergekit_file.read(tmp_path / "file.yml")).recipe
    assert recipe.to_dict()["tokenizer"] == wanted


def test_layers_of_parameters_in_memory_are_the_same_under_m2ls_names():
    file = mergekit_file.read(goldens.FILES / "depth-up-scaling.yml")
    base, experts, recipe, slices = mergekit.resolve(file, output_format="orbax")
    merged = checkpoints.flatten(merge(base, experts, recipe, slices=slices, progress=False))
    orca = goldens.draw(ORCA)
    assert len({name.split("/")[1] for name in merged if "layers_" in name}) == 64
    for number, layer, scale in ((0, 0, 1), (31, 31, 1), (32, 8, 0), (63, 39, 1)):
        for name, theirs in (("mlp/wo", "mlp.down_proj"), ("mlp/wi_1", "mlp.up_proj")):
            ours = merged[f"decoder/layers_{number:02d}/{name}"]
            factor = scale if theirs == "mlp.down_proj" else 1
            wanted = factor * orca[f"model.layers.{layer}.{theirs}.weight"].T
            np.testing.assert_array_equal(ours, wanted)

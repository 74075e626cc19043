"""What people's Hugging Face directories hold merges to the right values, or is refused."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as official

from m2l import checkpoints
from m2l.errors import CheckpointError, MergeError, UnknownNameError
from m2l.merging import Recipe, merge

ADD = Recipe("task_arithmetic", scale=0.5)
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 12,
    "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip
QWEN3 = LLAMA | {"model_type": "qwen3", "tie_word_embeddings": True, "num_key_value_heads": 2}
CLIP = {"model_type": "clip"}
VOCABULARY = {"name": "bytes", "size": 12, "fingerprint": "x"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def floats(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoder(seed, words=12):
    layer = "model.layers.0"
    shapes = {f"{layer}.self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"}
    shapes |= {f"{layer}.mlp.{part}_proj.weight": (10, 8) for part in ("gate", "up")}
    shapes |= {f"{layer}.mlp.down_proj.weight": (8, 10), "model.norm.weight": (8,)}
    shapes |= {f"{layer}.{n}_layernorm.weight": (8,) for n in ("input", "post_attention")}
    shapes |= {EMBEDDING: (words, 8), HEAD: (words, 8)}
    return {name: floats((seed, i), *shape) for i, (name, shape) in enumerate(shapes.items())}


def tied(seed):
    """A decoder with its embedding under both names."""
    tensors = decoder(seed)
    return tensors | {HEAD: tensors[EMBEDDING]}


def headless(seed):
    return {name: array for name, array in decoder(seed).items() if name != HEAD}


def little(seed):
    return {"encoder.weight": floats(seed, 4, 3), "encoder.bias": floats(seed + 100, 4)}


def write(directory, config, tensors, **files):
    directory.mkdir(parents=True)
    official.save_file(dict(tensors), directory / "model.safetensors")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        path = directory / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return directory


def read(directory):
    return official.load_file(directory / "model.safetensors")


@pytest.fixture
def merged(tmp_path):
    """Merges models, (config, tensors) or directories, the base first; returns the result."""

    def run(*models, recipe=ADD, out="out", **options):
        paths = [
            model if not isinstance(model, tuple) else write(tmp_path / f"model_{i}", *model)
            for i, model in enumerate(models)
        ]
        merge(paths[0], paths[1:], recipe, tmp_path / out, progress=False, **options)
        return read(tmp_path / out) if options.get("output_format") != "orbax" else tmp_path / out

    return run


def assert_added(found, base, expert, names=None):
    """Whether tensors are base + 0.5 (expert - base), by NumPy."""
    for name in names or base:
        wanted = base[name] + np.float32(0.5) * (expert[name] - base[name])
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, atol=1e-7, err_msg=name)


SAME_MODEL = {
    "class renamed": {"architectures": ["LLaMAForCausalLM"]},
    "no class": {"architectures": None},
    "longer rows": {"max_position_embeddings": 131072},
    "rope spelled anew": {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}},
    "heads by their default": {"num_key_value_heads": 2, "head_dim": 4},
    "noted dtype and version": {"dtype": "bfloat16", "transformers_version": "5.0"},
}


@pytest.mark.parametrize("to", [None, "orbax"])
@pytest.mark.parametrize("case", SAME_MODEL)
def test_fields_that_decide_nothing_refuse_no_merge(merged, case, to):
    base, expert = decoder(1), decoder(2)
    options = {} if to is None else {"output_format": to, "vocabulary": VOCABULARY}
    found = merged((LLAMA, base), (LLAMA | SAME_MODEL[case], expert), **options)
    if to is None:
        assert_added(found, base, expert)
    else:
        norm = checkpoints.restore(found)["decoder"]["norm"]
        assert_added({"model.norm.weight": norm}, base, expert, ["model.norm.weight"])


OTHER_MODEL = {
    "heads": {"num_attention_heads": 4},
    "rope": {"rope_theta": 5e5},
    "norm": {"rms_norm_eps": 1e-3},
    "scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
}


@pytest.mark.parametrize("to", [None, "orbax"])
@pytest.mark.parametrize("case", OTHER_MODEL)
def test_fields_that_decide_refuse_a_merge_by_name_until_they_are_allowed(
    merged, tmp_path, case, to
):
    base, expert = decoder(1), decoder(2)
    options = {} if to is None else {"output_format": to, "vocabulary": VOCABULARY}
    with pytest.raises(MergeError, match=r"another model: .*--allow_differences") as refused:
        merged((LLAMA, base), (LLAMA | OTHER_MODEL[case], expert), **options)
    fields = str(refused.value).rpartition("--allow_differences ")[2].split(",")
    paths = [tmp_path / "model_0", tmp_path / "model_1"]
    manifest = merge(paths[0], paths[1:], ADD, tmp_path / "out", progress=False,
                     allow_differences=fields, **options)  # fmt: skip
    assert manifest.made_by["allowed_differences"] == fields
    if to is None:
        assert_added(read(tmp_path / "out"), base, expert)
    with pytest.raises(UnknownNameError, match="rope_thta"):
        merged(*paths, out="again", allow_differences=["rope_thta"])


def test_a_field_of_unknown_meaning_is_told_and_merged(merged):
    base, expert = decoder(1), decoder(2)
    with pytest.warns(UserWarning, match="warp_drive is 7, in .* absent"):
        assert_added(merged((QWEN3, tied(1)), (QWEN3 | {"warp_drive": 7}, tied(2))), base, expert,
                     ["model.norm.weight"])  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "8"},
        {"vocab_size": 2**60},
        {"num_hidden_layers": 10**9},
        {"model_type": ["llama"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("which", [0, 1])
def test_an_absurd_description_is_refused_even_if_all_have_it(merged, changes, which):
    models = [(LLAMA, decoder(1)), (LLAMA | changes, decoder(2))]
    models[0] = models[which]
    with pytest.raises(CheckpointError, match=f"{next(iter(changes))} = .*expected"):
        merged(*models)


def codes(**more):
    weight = np.arange(64, dtype=np.int8).reshape(8, 8)
    return decoder(1) | {"model.layers.0.self_attn.q_proj.weight": weight} | more


@pytest.mark.parametrize("method", ["average", "dare_ties"])
@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, decoder(1)),
        (LLAMA, codes()),
        (QWEN3 | {"tie_word_embeddings": False}, codes()),
        (LLAMA, decoder(1) | {"x.weight": floats(1, 4).astype(ml_dtypes.float8_e4m3fn)}),
    ],
    ids=["by its description", "by a weight", "of another family", "of eight bits"],
)
def test_quantised_weights_are_refused(merged, config, tensors, method):
    recipe = Recipe(method) if method == "average" else Recipe(method, drop_rate=0.5)
    with pytest.raises(CheckpointError, match="weights are quantised"):
        merged((config, tensors), (config, tensors), recipe=recipe)


def test_adapters_are_refused_as_directories_and_files(merged, tmp_path):
    factors = {"base_model.model.q_proj.lora_A.weight": floats(1, 2, 8)}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    official.save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    base = write(tmp_path / "base", LLAMA, decoder(1))
    renamed = write(tmp_path / "renamed", LLAMA, factors)
    for path in (adapter, adapter / "adapter_model.safetensors", renamed):
        with pytest.raises(CheckpointError, match=r"adapter .*BASE\+ADAPTER.*merge_and_unload"):
            merged(base, path)


IDS = np.arange(4)[None]


@pytest.mark.parametrize("where", ["base", "expert", "both"])
def test_buffers_are_copied_from_where_they_are(merged, where):
    base, expert = little(1), little(2)
    buffers = {"text.position_ids": IDS, "text.inv_freq": np.float32([1, 0.5])}
    in_base = base | (buffers if where != "expert" else {})
    # A longer one: of both, the base's stays.
    longer = {"text.position_ids": np.arange(9)[None], "text.inv_freq": np.float32([7])}
    in_expert = expert | (longer if where == "both" else buffers if where == "expert" else {})
    recipe = Recipe("task_arithmetic", scale=0.5, dtype="bfloat16")
    found = merged((CLIP, in_base), (CLIP, in_expert), recipe=recipe)
    for name, array in buffers.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert found.keys() == {*base, *buffers}
    assert found["encoder.weight"].dtype == ml_dtypes.bfloat16


FAMILIES = {"llama": LLAMA | {"tie_word_embeddings": True}, "qwen3": QWEN3}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "ties"])
@pytest.mark.parametrize("where", ["base", "expert", "both"])
def test_a_tied_copy_stays_equal_or_is_left_out(merged, tmp_path, family, method, where):
    config = FAMILIES[family]
    recipe = {
        "task_arithmetic": ADD,
        "dare_ties": Recipe("dare_ties", drop_rate=0.5, seed=1),
        "ties": Recipe("ties", density=0.5),
    }[method]
    base = tied(1) if where != "expert" else headless(1)
    expert = tied(2) if where != "base" else headless(2)
    found = merged((config, base), (config, expert), recipe=recipe)
    assert (HEAD in found) == (where != "base")  # as in the model whose config.json goes out
    if HEAD in found:
        np.testing.assert_array_equal(found[HEAD], found[EMBEDDING])
    # A copy counts once: neither thresholds nor draws see it.
    plain = [write(tmp_path / f"plain_{seed}", config, headless(seed)) for seed in (1, 2)]
    alone = merged(*plain, recipe=recipe, out="alone")
    for name, array in alone.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [ADD, Recipe("dare", drop_rate=0.5)], ids=lambda r: r.method)
def test_an_output_of_its_own_is_refused_where_the_description_ties(merged, family, recipe):
    config = FAMILIES[family]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed"):
        merged((config, decoder(1)), (config, decoder(2)), recipe=recipe)


def test_an_untied_model_does_not_merge_with_a_tied_one_for_a_copy_of_its_words(merged):
    untied = QWEN3 | {"tie_word_embeddings": False}
    with pytest.raises(MergeError, match=r"lm_head\.weight is a matrix of its own"):
        merged((untied, decoder(1)), (QWEN3, tied(2)))


def test_an_untied_model_may_start_from_a_copy_of_its_words(merged):
    untied = QWEN3 | {"tie_word_embeddings": False}
    assert_added(merged((untied, tied(1)), (untied, decoder(2))), tied(1), decoder(2))


EXCLUDED = {
    "words of other sizes": ((EMBEDDING, HEAD), 14),
    "words by a pattern": (("*embed_tokens*", "lm_head*"), 14),
    "by our own names": (("token_embedder", "decoder/logits"), 12),
}


@pytest.mark.parametrize("case", EXCLUDED)
def test_what_is_excluded_is_the_bases_and_compared_in_nothing(merged, tmp_path, case):
    patterns, words = EXCLUDED[case]
    base, expert = decoder(1), decoder(2, words)
    models = [
        write(tmp_path / "base", LLAMA, base, vocab__txt="a\nb"),
        write(tmp_path / "expert", LLAMA | {"vocab_size": words}, expert, vocab__txt="c\nb"),
    ]
    recipe = Recipe("task_arithmetic", scale=0.5, exclude=patterns)
    found = merged(*models, recipe=recipe)
    rest = base.keys() - {EMBEDDING, HEAD}
    assert_added(found, base, expert, rest)
    for name in (EMBEDDING, HEAD):
        np.testing.assert_array_equal(found[name], base[name])
    # The words are the base's, and so is what belongs to them.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 12
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a\nb"


def test_what_is_excluded_may_be_infinite_or_missing(merged):
    mask = np.float32([0, -np.inf])
    base, expert = little(1) | {"mask": mask}, little(2)
    recipe = Recipe("task_arithmetic", scale=0.5, exclude=("mask",))
    np.testing.assert_array_equal(merged((CLIP, base), (CLIP, expert), recipe=recipe)["mask"], mask)


def test_what_is_copied_does_not_become_infinite_by_another_dtype(merged):
    base = little(1) | {"bias_of_mask": np.float32([0, -1e9])}
    models = (CLIP, base), (CLIP, little(2))
    recipe = Recipe("task_arithmetic", dtype="float16", exclude=("bias_of_mask",))
    with pytest.raises(
        MergeError, match=r"bias_of_mask\[1\] is -1000000000.0: too large for float16"
    ):
        merged(*models, recipe=recipe)


FILES = {
    "vocab__txt": "[PAD]", "tokenizer_config__json": "{}", "preprocessor_config__json": '{"a": 1}',
    "generation_config__json": "{}", "chat_template__jinja": "x", "LICENSE": "free",
    "additional_chat_templates___tool__jinja": "y", "modeling_own__py": "raise SystemExit",
    "sentencepiece__bpe__model": "z", "special_tokens_map__json": "{}",
}  # fmt: skip
LEFT = {"trainer_state__json": "{}", "README__md": "# old", "optimizer__pt": "x"}


def names(files):
    return {name.replace("___", "/").replace("__", ".") for name in files}


def present(directory):
    return {str(f.relative_to(directory)) for f in directory.rglob("*") if f.is_file()}


def test_all_that_belongs_to_a_model_comes_along(merged, tmp_path, capsys):
    for name in ("base", "expert"):
        write(tmp_path / name, CLIP, little(len(name)), **FILES, **LEFT)
    merged(tmp_path / "base", tmp_path / "expert")
    weights = {"model.safetensors", "config.json", "m2l_manifest.json", "README.md"}
    assert present(tmp_path / "out") == weights | names(FILES)
    assert (tmp_path / "out" / "README.md").read_text() != "# old"
    assert "copied modeling_own.py: code" in capsys.readouterr().err


def test_an_expert_that_is_weights_alone_gets_the_bases_files(merged, tmp_path):
    write(tmp_path / "base", CLIP, little(1), **FILES)
    write(tmp_path / "expert", None, little(2))
    merged(tmp_path / "base", tmp_path / "expert")
    found = present(tmp_path / "out")
    assert names(["vocab__txt", "preprocessor_config__json", "chat_template__jinja"]) <= found
    # Not the base's: where a text ends is the expert's to say.
    assert "generation_config.json" not in found
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "clip"


def test_tokenizers_are_compared_by_what_they_do(merged, tmp_path):
    for name, words in (("base", "a\nb"), ("same", "a\nb\n"), ("other", "b\na")):
        write(tmp_path / name, CLIP, little(len(name)), vocab__txt=words)
    merged(tmp_path / "base", tmp_path / "same")
    with pytest.raises(MergeError, match=r"another tokenizer: .*, 'a' is 0 and 1"):
        merged(tmp_path / "base", tmp_path / "other", out="refused")
    merged(tmp_path / "base", tmp_path / "other", out="all", allow_differences=["tokenizer"])
    assert (tmp_path / "all" / "vocab.txt").read_text() == "b\na"


def test_a_tensor_that_a_network_does_not_have_is_never_lost(merged, tmp_path):
    """A classifier's head is of no Llama here: kept by name, refused where it has no place."""
    base, expert = ({**headless(seed), "score.weight": floats(seed, 2, 8)} for seed in (1, 2))
    config = LLAMA | {"architectures": ["LlamaForSequenceClassification"]}
    recipe = Recipe("dare", drop_rate=0.5)
    assert merged((config, base), (config, expert), recipe=recipe).keys() == base.keys()
    as_tied = config | {"tie_word_embeddings": True}
    paths = [write(tmp_path / n, as_tied, t) for n, t in (("base", base), ("expert", expert))]
    with pytest.raises(CheckpointError, match=r"unexpected key score\.weight"):
        merged(*paths, output_format="orbax", vocabulary=VOCABULARY, out="other")


def test_a_merge_of_directories_imports_no_network(tmp_path):
    """Flax would cost every such merge a third of a second."""
    base, expert = (write(tmp_path / name, LLAMA, decoder(len(name))) for name in ("b", "ex"))
    program = (
        "import sys\nfrom m2l.merging import Recipe, merge\n"
        f"merge({str(base)!r}, [{str(expert)!r}], Recipe('ties'), {str(tmp_path / 'out')!r})\n"
        "print(sorted({'flax', 'seqio', 'tensorflow'} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"
    assert (tmp_path / "out" / "README.md").is_file()

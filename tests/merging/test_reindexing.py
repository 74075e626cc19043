"""Models whose vocabularies differ merge by token, as NumPy and mergekit have it."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from m2l import checkpoints
from m2l.checkpoints.spans import Span
from m2l.errors import DataError, M2LError, MergeError, UnknownNameError
from m2l.merging import Recipe, merge, merge_params, preset, verify
from m2l.merging.token_rows import AVERAGE as AVERAGED
from m2l.merging.token_rows import MEAN, ZERO, RowMap, RowTensor, rows_at_hand

from ..goldens.make_tokenizer_goldens import (
    EMBEDDING,
    OUTPUT,
    WORDS,
    draw,
    tokenizer_json,
    write_model,
)
from .conftest import ELEMENTWISE, default, free_port, same_bits

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "tokenizer_goldens.json").read_text())
ROLES = tuple(CASES["tokenizers"])
AVERAGE = Recipe("average", tokenizer="union")


def ids_of(directory):
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab(True)


@pytest.fixture(scope="session")
def goldens():
    with np.load(GOLDENS / "tokenizer_goldens.npz") as arrays:
        nested = {}
        for key, array in arrays.items():
            model, _, name = key.partition("/")
            nested.setdefault(model, {})[name] = array
        return nested


@pytest.fixture(scope="session")
def words(goldens, tmp_path_factory):
    """The goldens' models: by role the directory."""
    root = tmp_path_factory.mktemp("words")
    for role, tokenizer in CASES["tokenizers"].items():
        write_model(root / role, tokenizer, goldens[role])
    return {role: root / role for role in ROLES}


# mergekit's method and m2l's. The sums of a linear merge, of slerp's inner products and of means
# run in another order: they are equal but for float32's rounding, and all else is bit for bit.
PEERS = {
    "linear": ("average", {}),
    "task_arithmetic": ("task_arithmetic", {"scale": 0.5}),
    "ties": ("ties", {"density": 0.5}),
    "slerp": ("slerp", {"t": 0.5}),
}
EXACT = ("linear_without_base", "task_arithmetic_union", "ties_union")


def translated(tokenizer, names):
    """What a recipe says of the tokenizer, of what mergekit's file says."""

    def source(value):
        if not isinstance(value["source"], dict):
            return value | {"source": names.get(value["source"], value["source"])}
        origin = value["source"]
        named = {"source": names.get(origin.get("model"), origin["kind"])}
        named |= {"token": origin["token"]} if "token" in origin else {}
        return named | {"force": value.get("force", False)}

    result = {"source": names.get(tokenizer["source"], tokenizer["source"])}
    result["pad_to"] = tokenizer.get("pad_to_multiple_of", 1)
    result["tokens"] = {t: source(each) for t, each in (tokenizer.get("tokens") or {}).items()}
    return result


@pytest.mark.parametrize("case", CASES["cases"])
def test_rows_of_tokens_are_those_that_mergekit_makes(words, goldens, tmp_path, case):
    settings, ids = (CASES["cases"][case][each] for each in ("settings", "ids"))
    method, values = PEERS[settings["merge_method"]]
    # mergekit averages the base as well, and takes the arc from it.
    experts = ["base"] * (method in ("average", "slerp") and "base_model" not in settings)
    experts += settings.get("models", ["expert_0", "expert_1"])
    names = {role: f"expert_{place}" for place, role in enumerate(experts)} | {"base": "base"}
    recipe = preset("mergekit", {"method": method, **values})
    recipe["tokenizer"] = translated(settings["tokenizer"], names)
    base = None if "base_model" in settings else words["base"]
    out = tmp_path / "out"
    paths = [words[role] for role in experts]
    allowed = ("tokenizer",)
    merge(base, paths, Recipe(**recipe), out, progress=False, allow_differences=allowed)
    merged, own = load_file(out / "model.safetensors"), ids_of(out)
    assert own.keys() == ids.keys()
    for name in (EMBEDDING, OUTPUT):
        assert merged[name].shape == goldens[case][name].shape
        for token, index in ids.items():
            row, wanted = merged[name][own[token]], goldens[case][name][index]
            if case in EXACT:
                np.testing.assert_array_equal(row, wanted, err_msg=token)
            else:
                np.testing.assert_allclose(row, wanted, rtol=2e-6, atol=2e-7, err_msg=token)
        spare = np.setdiff1d(np.arange(len(merged[name])), [*own.values()])
        unnamed = np.setdiff1d(np.arange(len(merged[name])), [*ids.values()])
        wanted = goldens[case][name][unnamed]
        np.testing.assert_allclose(merged[name][spare], wanted, rtol=2e-6, atol=2e-7)


# Vocabularies drawn at random, and what each model's matrix has to be, by the rule in words.


def drawn(directory, seed, count, extra, spare=0, dtype=np.float32, tied=False):
    """A model of some of 40 words in an order of its own, and its tensors."""
    rng = np.random.default_rng(seed)
    tokens = ["<unk>", "</s>", *rng.permutation([f"w{n}" for n in range(40)])[:count].tolist()]
    size = len(tokens) + len(extra) + spare
    tensors = {name: array.astype(dtype) for name, array in draw(seed, size).items()}
    tokenizer = {"tokens": tokens, "added": extra, "rows": size}
    config = {"tie_word_embeddings": tied}
    tensors = {n: a for n, a in tensors.items() if n != OUTPUT or not tied}
    write_model(directory, tokenizer, tensors, config)
    return directory, tensors, {t: i for i, t in enumerate([*tokens, *extra])}


def matrices(models, ids, size, name, has_base=True):
    """Each model's matrix by the ids of the result, written token by token."""
    result = []
    for tensors, own in models:
        matrix = np.zeros((size, 8), np.float64)
        for token, index in ids.items():
            having = [(t, i) for t, i in models if token in i]
            if token in own:
                row = tensors[name][own[token]]
            elif has_base and token in models[0][1]:
                row = models[0][0][name][models[0][1][token]]
            elif having:
                row = np.mean([t[name][i[token]].astype(np.float64) for t, i in having], axis=0)
                row = row.astype(tensors[name].dtype)
            else:
                row = 0
            matrix[index] = row
        for index in set(range(size)) - set(ids.values()):
            free = index < len(tensors[name]) and index not in own.values()
            mean = matrix[list(ids.values())].mean(0)
            matrix[index] = tensors[name][index] if free else mean
        result.append(matrix)
    return result


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """A base with spare rows and two experts, none of the same words."""
    root = tmp_path_factory.mktemp("three")
    base = drawn(root / "base", 1, 20, ["<|a|>"], spare=5)
    experts = [drawn(root / f"e{n}", 2 + n, 22, [f"<|b{n}|>", "<|c|>"]) for n in range(2)]
    return [base, *experts]


@pytest.mark.parametrize("to", ["huggingface", "orbax", None])
@pytest.mark.parametrize("source", ["union", "base", "expert_1"])
@pytest.mark.parametrize("pad_to", [1, 16])
def test_a_merge_is_that_of_the_matrices_by_token(three, tmp_path, source, pad_to, to):
    recipe = Recipe("task_arithmetic", scale=0.25, tokenizer={"source": source, "pad_to": pad_to})
    paths, models = [m[0] for m in three], [m[1:] for m in three]
    out = None if to is None else tmp_path / "out"
    result = merge(paths[0], paths[1:], recipe, out, output_format=to, progress=False)
    if to == "huggingface":
        tensors, ids = load_file(out / "model.safetensors"), ids_of(out)
        names = {EMBEDDING: tensors[EMBEDDING], OUTPUT: tensors[OUTPUT]}
        assert json.loads((out / "config.json").read_text())["vocab_size"] == len(names[OUTPUT])
    else:
        params = checkpoints.restore(out) if to else result
        logits = np.asarray(params["decoder"]["logits"]).T
        names = {EMBEDDING: np.asarray(params["token_embedder"]), OUTPUT: logits}
        if to is None:
            return_ids = merge(paths[0], paths[1:], recipe, tmp_path / "hf", progress=False)
            assert return_ids.made_by["tokens"]["rows"] == len(names[OUTPUT])
            ids = ids_of(tmp_path / "hf")
        else:
            manifest = checkpoints.read_manifest(out)
            assert manifest.model["vocab_size"] == len(names[OUTPUT])
            ids = ids_of(Path(manifest.vocabulary["name"]))
    for name, merged in names.items():
        assert len(merged) % pad_to == 0
        base, one, two = matrices(models, ids, len(merged), name)
        wanted = base + 0.25 * ((one - base) + (two - base))
        np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


def united(three, tmp_path, recipe=None):
    """The three models as directories of one vocabulary, written by NumPy; and that vocabulary."""
    paths, models = [m[0] for m in three], [m[1:] for m in three]
    merge(paths[0], paths[1:], recipe or AVERAGE, tmp_path / "plain", progress=False)
    ids = ids_of(tmp_path / "plain")
    size = len(load_file(tmp_path / "plain" / "model.safetensors")[EMBEDDING])
    written = []
    for place, (_, tensors, _) in enumerate(three):
        changed = {
            name: matrices(models, ids, size, name)[place].astype(tensors[name].dtype)
            for name in (EMBEDDING, OUTPUT)
        }
        directory = tmp_path / f"united_{place}"
        write_model(directory, {"tokens": WORDS, "added": [], "rows": size}, tensors | changed)
        written.append(directory)
    return paths, written


EVERY = [
    *(default(method) for method in ELEMENTWISE),
    Recipe("ties", density=0.3, tokenizer="union"),
    Recipe("ties", density=0.3, scope="tensor", dtype="bfloat16", tokenizer="union"),
    Recipe("dare_ties", drop_rate=0.4, density=0.5, seed=3, tokenizer="union"),
]


@pytest.fixture(scope="session")
def same_words(three, tmp_path_factory):
    return united(three, tmp_path_factory.mktemp("united"))


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.method)
def test_every_method_gives_the_bits_of_models_that_were_re_indexed_before(
    same_words, tmp_path, recipe
):
    paths, written = same_words
    content = recipe.to_dict() | {"tokenizer": "union"}
    plain = {name: value for name, value in content.items() if name != "tokenizer"}
    cases = ("by_token", paths, content), ("before", written, plain)
    for out, (base, *experts), settings in cases:
        options = {"progress": False, "block": 160}
        merge(base, experts, Recipe.from_dict(settings), tmp_path / out, **options)
    outs = [tmp_path / out for out, *_ in cases]
    same_bits(*(load_file(out / "model.safetensors") for out in outs))
    manifests = [json.loads((out / "m2l_manifest.json").read_text()) for out in outs]
    densities = [m["made_by"].get("diagnostics", {}).get("density") for m in manifests]
    assert densities[0] == densities[1]


PROGRAM = """
import json, os, sys
from m2l import distributed
from m2l.merging import Recipe, merge
out, index, count, address, recipe, *paths = sys.argv[1:]
distributed.join(address, (int(index), int(count)), survive=True)
os.environ["M2L_CACHE"] = f"{out}-cache-{index}"
recipe = Recipe.from_dict(json.loads(recipe))
for to in ("huggingface", "orbax"):
    merge(paths[0], paths[1:], recipe, f"{out}-{to}", block=160, output_format=to, progress=False)
distributed.leave()
"""


def test_two_processes_make_the_same_bits(forge, three, tmp_path):
    recipe = Recipe("ties", density=0.3, tokenizer={"source": "union", "pad_to": 16})
    paths = [path for path, *_ in three]
    for to in ("huggingface", "orbax"):
        merge(paths[0], paths[1:], recipe, tmp_path / to, output_format=to, progress=False)
    arguments = (2, f"127.0.0.1:{free_port()}", json.dumps(recipe.to_dict()), *paths)
    forge(*((PROGRAM, tmp_path / "two", n, *arguments) for n in range(2)), devices=1)
    same_bits(
        *(load_file(tmp_path / d / "model.safetensors") for d in ("huggingface", "two-huggingface"))
    )
    one, two = (checkpoints.read_manifest(tmp_path / d) for d in ("orbax", "two-orbax"))
    assert one.parameters == two.parameters
    assert one.made_by["tokens"] == two.made_by["tokens"]


class Stored:
    """An array that is read as a file's, in chunks where it has any."""

    def __init__(self, array, chunk=None):
        self.array, self.chunk, self.name, self.digest = array, chunk, "matrix", None
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.size

    def read_span(self, span, out):
        rows = span.start + np.arange(span.rows)[:, None] * span.stride + np.arange(span.columns)
        out[:] = self.array.reshape(-1)[rows.reshape(-1)]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("chunk", [None, (3, 2)])
def test_any_part_of_a_re_indexed_tensor_is_that_of_the_gathered_one(axis, chunk):
    rng = np.random.default_rng(axis)
    sizes, size, width = (7, 9, 8), 23, 5
    arrays = [rng.standard_normal((n, width)).astype(np.float32) for n in sizes]
    arrays[1] = arrays[1].astype(ml_dtypes.bfloat16)
    models = rng.choice([0, 1, 2, ZERO, AVERAGED, MEAN], size).astype(np.int16)
    averages = np.array([[1, -1, 3], [-1, 2, 2], [0, 0, 0]], np.int32)
    places = np.array([rng.integers(sizes[m] if m >= 0 else 3) for m in models], np.int32)
    named = rng.random(size) < 0.6
    wide = [array.astype(np.float32) for array in arrays]
    wanted = np.zeros((size, width), np.float32)
    for row, (model, place) in enumerate(zip(models, places, strict=True)):
        if model >= 0:
            wanted[row] = wide[model][place]
        elif model == AVERAGED:
            parts = [a[i] for a, i in zip(wide, averages[place], strict=True) if i >= 0]
            wanted[row] = sum(parts) / np.float32(len(parts))
    wanted[models == MEAN] = wanted[named].astype(np.float64).mean(0)
    stored = [Stored(np.ascontiguousarray(a.T) if axis else a, chunk) for a in arrays]
    donors = {n: rows_at_hand(each) for n, each in enumerate(stored)}
    row_map = RowMap(models, places, averages, named)
    tensor = RowTensor(stored[0], donors, axis, row_map, np.dtype(np.float32))
    gathered = wanted.T if axis else wanted
    assert tensor.shape == gathered.shape
    for start in range(tensor.size):
        for stop in (start + 1, start + width, start + 3 * size, tensor.size):
            out = np.empty(min(stop, tensor.size) - start, np.float32)
            tensor.read_into(start, start + out.size, out)
            np.testing.assert_array_equal(out, gathered.reshape(-1)[start : start + out.size])
    span = Span("matrix", 3, 4, 5, 11)
    out = np.empty(span.size, np.float32)
    tensor.read_span(span, out)
    rows = 3 + np.arange(5)[:, None] * 11 + np.arange(4)
    np.testing.assert_array_equal(out.reshape(5, 4), gathered.reshape(-1)[rows])


def test_tied_embeddings_stay_tied_and_are_read_as_one(tmp_path):
    paths = [
        drawn(tmp_path / f"m{n}", n, 12 + n, [f"<|{n}|>"], tied=True, dtype=ml_dtypes.bfloat16)
        for n in range(3)
    ]
    # One of them has the embedding under both names.
    tensors = paths[1][1] | {OUTPUT: paths[1][1][EMBEDDING]}
    save_file(tensors, paths[1][0] / "model.safetensors")
    merge(paths[0][0], [m[0] for m in paths[1:]], AVERAGE, tmp_path / "out", progress=False)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    ids = ids_of(tmp_path / "out")
    models = [(tensors, own) for _, tensors, own in paths]
    size = len(merged[EMBEDDING])
    _, one, two = matrices(models, ids, size, EMBEDDING)
    np.testing.assert_array_equal(merged[EMBEDDING], ((one + two) / 2).astype(np.float32))


def special(directory, *tokens, **settings):
    """Makes tokens of a directory's tokenizer special, and changes its settings."""
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    for entry in content["added_tokens"]:
        entry["special"] = entry["content"] in tokens
    file.write_text(json.dumps(content))
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory


@pytest.fixture
def pair(tmp_path):
    """A base, and an expert with a special token and a chat template of its own."""
    base = drawn(tmp_path / "base", 1, 10, ["<|a|>"])[0]
    expert = special(drawn(tmp_path / "expert", 2, 10, ["<|b|>"])[0], "<|b|>")
    (expert / "chat_template.jinja").write_text("{{ messages[0].content }}<|b|>")
    return base, expert


def test_a_special_token_is_lost_only_where_that_is_asked_for(pair, tmp_path):
    base, expert = pair
    recipe = Recipe("task_arithmetic", tokenizer="base")
    message = r"expert: its special token '<\|b\|>' is not in the tokenizer of .*base"
    with pytest.raises(MergeError, match=message):
        merge(base, [expert], recipe, tmp_path / "out", progress=False)
    allowed = {"allow_differences": ("tokenizer",), "progress": False}
    manifest = merge(base, [expert], recipe, tmp_path / "out", **allowed)
    assert "<|b|>" in manifest.made_by["tokens"]["names"]["lost"]
    special(expert, eos_token="<|b|>")
    with pytest.raises(MergeError, match=r"its eos token '<\|b\|>' is not in"):
        merge(base, [expert], recipe, tmp_path / "other", progress=False)


TEMPLATES = {None: None, "expert_0": "<|b|>", "auto": "<|b|>", "{{ 1 }}": "{{ 1 }}"}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_chat_template_is_the_chosen_one(pair, tmp_path, template):
    base, expert = pair
    special(base, chat_template="the base's {{ messages }}" if template is None else None)
    tokenizer = {"source": "union", "chat_template": template}
    recipe = Recipe("task_arithmetic", tokenizer={k: v for k, v in tokenizer.items() if v})
    merge(base, [expert], recipe, tmp_path / "out", progress=False)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    if template is None:
        assert settings["chat_template"].startswith("the base's")
    else:
        text = (tmp_path / "out" / "chat_template.jinja").read_text()
        assert text.endswith(TEMPLATES[template])
        assert "chat_template" not in settings


def test_the_manifest_says_of_each_token_what_was_done(three, tmp_path):
    recipe = Recipe(
        "average",
        tokenizer={
            "source": "union",
            "tokens": {"<|c|>": {"source": "expert_1"}, "<|n|>": {"source": "zero"}},
        },
    )
    paths = [path for path, *_ in three]
    manifest = merge(paths[0], paths[1:], recipe, tmp_path / "out", progress=False)
    base, one, two = ({*ids} for *_, ids in three)
    tokens, ids = manifest.made_by["tokens"], ids_of(tmp_path / "out")
    assert manifest.made_by["recipe"] == json.loads(json.dumps(recipe.to_dict()))
    assert tokens["tokens"] == len(ids) and tokens["rows"] == manifest.model["vocab_size"]
    assert tokens["own"] == {"base": len(base), "expert_0": len(one), "expert_1": len(two)}
    names = tokens["names"]
    assert {*names["added"]} == (one | two | {"<|n|>"}) - base and not names["lost"]
    lacking = {label: {*each} for label, each in names["lacking"].items()}
    assert lacking["base"] == base - (one & two)
    assert lacking["average"] == (one & two) - base - {"<|c|>"}
    assert lacking["expert_0"] == one - two - base
    assert lacking["expert_1"] == (two - one - base) | {"<|c|>"}
    assert lacking["zero"] == {"<|n|>"}
    assert tokens["lacking"] == {label: len(each) for label, each in lacking.items()}
    assert "names" not in (tmp_path / "out" / "README.md").read_text()
    # The base decided which tokens there are, though its rows are not merged.
    assert [parent["role"] for parent in manifest.parents] == ["base", "expert", "expert"]
    assert not verify(tmp_path / "out", progress=False).differences
    merged, nothing = load_file(tmp_path / "out" / "model.safetensors"), np.zeros(8)
    np.testing.assert_array_equal(merged[EMBEDDING][ids["<|n|>"]], nothing)


def without(directory, *names):
    for name in names:
        (directory / name).unlink()
    return directory


def test_bad_vocabularies_are_refused_by_name(three, pair, tmp_path):
    (base, *experts), (_, expert) = [path for path, *_ in three], pair

    def refused(message, kind, tokenizer="union", experts=experts):
        with pytest.raises(kind, match=message):
            recipe = Recipe("task_arithmetic", tokenizer=tokenizer)
            merge(base, experts, recipe, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()

    refused("there is no expert_7; the models are base, expert_0, expert_1", MergeError, "expert_7")
    refused("unknown tokenizer 'mine'", UnknownNameError, "mine")
    refused("unknown setting of the tokenizer 'pad'", UnknownNameError, {"pad": 3})
    refused("pad_to 0: a whole number from 1", MergeError, {"pad_to": 0})
    refused("chat_template 'chat': expected auto", MergeError, {"chat_template": "chat"})
    refused("chat_template auto: no such model has one", MergeError, {"chat_template": "auto"})
    refused("tokens cannot be read", MergeError, {"tokens": {"x": {"from": "base"}}})
    lacking = {"tokens": {"<|a|>": {"source": "expert_1"}}}
    refused(r"e1: it has no row of the token '<\|a\|>'", MergeError, lacking)
    beyond = {"tokens": {"<|a|>": {"source": "expert_1", "token": 900}}}
    refused("it has no row of the token 900", MergeError, beyond)
    names = ("tokenizer.json", "tokenizer_config.json")
    refused("it has no tokenizer", MergeError, experts=[without(expert, *names)])
    content = tokenizer_json(["<unk>"], [])
    content["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
    }  # fmt: skip
    (expert / "tokenizer.json").write_text(json.dumps(content))
    refused("another kind, BPE of bytes, than .*, BPE of characters", DataError, experts=[expert])
    params = {"token_embedder": np.zeros((3, 2), np.float32)}
    with pytest.raises(MergeError, match="parameters in memory have no tokenizers"):
        merge_params(params, [params], AVERAGE)


def test_damaged_rows_are_found_and_told_by_the_digest_of_what_is_stored(three, tmp_path):
    paths = [path for path, *_ in three]
    for to in ("huggingface", "orbax"):
        alone = Recipe("average", tokenizer="base")
        merge(None, [paths[1]], alone, tmp_path / to, output_format=to, progress=False)
        good = merge(paths[0] if to == "huggingface" else None, [tmp_path / to, tmp_path / to],
                     AVERAGE, tmp_path / f"{to}_again", progress=False)  # fmt: skip
        assert good is not None
    file = tmp_path / "huggingface" / "model.safetensors"
    tensors = load_file(file)
    tensors[EMBEDDING][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(M2LError, match=f"{EMBEDDING} does not have the digest"):
        merge(paths[0], [tmp_path / "huggingface"], AVERAGE, tmp_path / "damaged", progress=False)


def test_fisher_counts_nothing_for_tokens_that_an_expert_lacks(three, tmp_path):
    experts, information = three[1:], []
    for place, (path, *_) in enumerate(experts):
        merge(None, [path], Recipe("average", tokenizer="base"), tmp_path / f"e{place}",
              output_format="orbax", progress=False)  # fmt: skip
        manifest = checkpoints.read_manifest(tmp_path / f"e{place}")
        shapes = {name: record["shape"] for name, record in manifest.parameters.items()}
        rng = np.random.default_rng(place)
        values = {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}
        made_by = {"kind": "statistics", "statistic": "fisher", "of": manifest.digest}
        about = {"model": manifest.model, "vocabulary": manifest.vocabulary, "made_by": made_by}
        checkpoints.save(tmp_path / f"f{place}", checkpoints.unflatten(values), **about)
        information.append(values["token_embedder"])
    paths = [tmp_path / f"e{place}" for place in range(2)]
    statistics = [tmp_path / f"f{place}" for place in range(2)]
    recipe = Recipe("fisher", tokenizer="union")
    merge(None, paths, recipe, tmp_path / "out", statistics=statistics, progress=False)
    merged = np.asarray(checkpoints.restore(tmp_path / "out")["token_embedder"])
    ids = ids_of(Path(checkpoints.read_manifest(tmp_path / "out").vocabulary["name"]))
    (_, one, own), (_, two, other) = experts
    for token, index in ids.items():
        both = (one, own, information[0]), (two, other, information[1])
        rows = [(t[EMBEDDING][i[token]], f[i[token]]) for t, i, f in both if token in i]
        wanted = sum(row * weight for row, weight in rows) / sum(weight for _, weight in rows)
        np.testing.assert_allclose(merged[index], wanted, rtol=1e-4, atol=1e-5, err_msg=token)


def test_flags_name_models_by_path_and_a_recipe_by_number(three, run_m2l, tmp_path):
    base, one, two = (path for path, *_ in three)
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    flags = ("--base", base, "--expert", one, "--expert", two, "--method", "average")
    flags += ("--tokenizer", two, "--pad_vocabulary", "8", "--out", tmp_path / "out")
    flags += ("--token", f"<|a|>={one}:<|c|>", "--force_token", "<|c|>=zero")
    flags += ("--chat_template", tmp_path / "template.jinja", "--allow_differences", "tokenizer")
    assert run_m2l("merge", *flags) == 0
    recipe = json.loads((tmp_path / "out" / "m2l_manifest.json").read_text())["made_by"]["recipe"]
    assert recipe["tokenizer"] == {
        "source": "expert_1",
        "tokens": {
            "<|a|>": {"source": "expert_0", "token": "<|c|>"},
            "<|c|>": {"source": "zero", "force": True},
        },
        "pad_to": 8,
        "chat_template": "{{ messages }}",
    }
    assert run_m2l("merge", *flags, "--token", "nothing") == 2

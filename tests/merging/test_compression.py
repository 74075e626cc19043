"""Experts as differences from their base: restored to the bit, or as the papers' formulas say."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as official

from m2l import checkpoints, files
from m2l.checkpoints import deltas, opening
from m2l.checkpoints.spans import Span, read_whole
from m2l.errors import CheckpointError, MergeError
from m2l.merging import Recipe, compress, merge, restore
from tests.merging.conftest import same_bits
from tests.merging.test_adapted_experts import SHAPES, save

BIT_PATTERNS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def arrays(path, **options):
    opened = checkpoints.open(path, **options)
    return {name: read_whole(tensor) for name, tensor in opened.parameters.items()}


def flat(params):
    return {name: np.asarray(array) for name, array in checkpoints.flatten(params).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int16", "bool"])
def test_codes_of_any_bits_are_decoded_to_them(dtype):
    """Infinities, signed zeros and numbers that are none have bits, too."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    words, rng = BIT_PATTERNS[dtype.itemsize], np.random.default_rng(0)
    top = 2 if dtype.kind == "b" else 1 << 8 * dtype.itemsize
    base, expert = (rng.integers(0, top, 999, words).view(dtype) for _ in range(2))
    for theta in (base, None):
        codes = deltas.encode(theta, expert)
        assert deltas.decode(theta, codes, dtype).tobytes() == expert.tobytes()


def test_codes_count_the_numbers_between_base_and_expert():
    base = np.array([0.0, -0.0, 1.0, 1.0, -2.0], np.float32)
    up, down = (np.nextafter(base, np.float32(end)) for end in (np.inf, -np.inf))
    # Towards +infinity 2n, towards -infinity 2n - 1; from 0 the next below is that of -0.
    assert [*deltas.encode(base, up)] == [2, 4, 2, 2, 2]
    assert [*deltas.encode(base, down)] == [3, 1, 1, 1, 1]


def test_an_expert_of_a_checkpoint_is_restored_to_the_bit(paths, tmp_path):
    base, experts = paths
    (delta,) = compress(experts[:1], base, tmp_path / "delta")
    path = f"{base}+{tmp_path / 'delta'}"
    expert = checkpoints.read_manifest(experts[0])
    opened = opening.open(path)
    assert opened.digest == expert.digest and delta.error == 0
    same_bits(arrays(path), arrays(experts[0]))
    manifest = restore(path, tmp_path / "restored")
    checkpoints.verify(tmp_path / "restored")
    fields = ("digest", "made_by", "parents", "step", "vocabulary", "parameters")
    assert all(getattr(manifest, name) == getattr(expert, name) for name in fields)
    again = compress(experts[:1], base, tmp_path / "delta")
    assert again == [delta]


def draw(rng, dtype, scale=1.0):
    return {
        name: (scale * rng.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    """A base in bfloat16 and an expert of several dtypes, with a tensor and rows of its own."""
    root, rng = tmp_path_factory.mktemp("compression"), np.random.default_rng(0)
    tensors = draw(rng, ml_dtypes.bfloat16)
    expert = {
        name: (array.astype(np.float32) + 0.01 * rng.standard_normal(array.shape)).astype(
            np.float32 if name.endswith("norm.weight") else array.dtype
        )
        for name, array in tensors.items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expert[name] = np.concatenate([expert[name], expert[name][:4]])
    expert["model.norm.weight"][:2] = 0.0, -0.0
    expert["position_ids"] = np.arange(9)
    return save(root / "base", tensors), save(root / "expert", expert, vocab_size=16)


def test_an_expert_of_hugging_face_is_restored_to_the_bit(huggingface, tmp_path):
    base, expert = huggingface
    (delta,) = compress([expert], base, tmp_path / "delta")
    path = f"{base}+{tmp_path / 'delta'}"
    tensors = official.load_file(expert / "model.safetensors")
    assert delta.kinds["position_ids"] == delta.kinds["lm_head.weight"] == deltas.WHOLE
    assert delta.kinds["model.norm.weight"] == deltas.DIFFERENCE
    same_bits(arrays(path, native=True), tensors)
    restore(path, tmp_path / "restored")
    restored = official.load_file(tmp_path / "restored" / "model.safetensors")
    same_bits(restored, tensors)
    config = json.loads((tmp_path / "restored" / "config.json").read_text())
    assert config["vocab_size"] == 16


def test_an_embedding_that_is_stored_twice_is_stored_once(huggingface, tmp_path):
    tensors = official.load_file(huggingface[0] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    changed = {name: array + array for name, array in tensors.items()}
    base, expert = (
        save(tmp_path / name, each, tie_word_embeddings=True)
        for name, each in (("base", tensors), ("expert", changed))
    )
    for method in ("lossless", "compeft"):
        (delta,) = compress([expert], base, tmp_path / method, method=method)
        assert delta.copies == {"lm_head.weight": "model.embed_tokens.weight"}
        restored = arrays(f"{base}+{tmp_path / method}", native=True)
        one, two = (restored[name] for name in (*delta.copies, *delta.copies.values()))
        assert one.tobytes() == two.tobytes()
        if method == "lossless":
            same_bits(restored, changed)


def test_a_hugging_face_delta_is_read_under_m2l_names_as_its_expert_is(huggingface, tmp_path):
    base, expert = huggingface
    tensors = official.load_file(expert / "model.safetensors")
    del tensors["position_ids"]
    alone = save(tmp_path / "alone", tensors, vocab_size=16)
    compress([alone], base, tmp_path / "delta")
    same_bits(arrays(f"{base}+{tmp_path / 'delta'}"), arrays(alone))


def test_merging_deltas_gives_the_bits_of_merging_experts(paths, tmp_path):
    base, experts = paths
    for index, expert in enumerate(experts):
        compress([expert], base, tmp_path / f"{index}")
    added = [f"{base}+{tmp_path / str(index)}" for index in range(3)]
    recipe = Recipe("ties", density=0.3)
    wanted = merge(base, experts, recipe, tmp_path / "wanted")
    manifest = merge(base, added, recipe, tmp_path / "merged")
    assert (
        manifest.digest == wanted.digest
        and manifest.parents[1]["digest"] == (wanted.parents[1]["digest"])
    )


def test_compeft_adds_alpha_standard_deviations_of_the_largest_entries_signs(
    paths, models, tmp_path
):
    (base, experts), (theta, (tuned, *_)) = paths, models
    theta, tuned = flat(theta), flat(tuned)
    (delta,) = compress(experts[:1], base, tmp_path / "d", method="compeft", density=0.1, alpha=2)
    tau = np.concatenate([(tuned[name] - theta[name]).ravel() for name in theta])
    step = 2 * tau.astype(np.float64).std()
    least = np.sort(np.abs(tau))[-int(0.1 * tau.size)]
    wanted = np.where(np.abs(tau) >= least, np.sign(tau) * step, 0)
    restored = arrays(f"{base}+{tmp_path / 'd'}")
    actual = np.concatenate([(restored[name] - theta[name]).ravel() for name in theta])
    np.testing.assert_allclose(actual, wanted, atol=1e-6)  # Rounding of sums of about 1.
    assert delta.settings["scale"] == pytest.approx(step, rel=1e-6)
    error = np.linalg.norm(wanted - tau) / np.linalg.norm(tau)
    assert delta.error == pytest.approx(error, rel=1e-4)


def test_emr_restores_what_the_method_of_that_name_makes_of_one_expert(paths, tmp_path):
    base, experts = paths
    made = compress(experts, base, tmp_path / "store", method="emr")
    for index, delta in enumerate(made):
        weights = tuple(float(place == index) for place in range(3))
        merge(base, experts, Recipe("emr", weights=weights), tmp_path / f"{index}")
        wanted = arrays(tmp_path / f"{index}")
        restored = arrays(f"{base}+{delta.path}")
        for name, array in wanted.items():
            np.testing.assert_allclose(restored[name], array, atol=1e-6)
        theta, tuned = arrays(base), arrays(experts[index])
        missed, squares = (
            sum(np.square(a[name] - b[name], dtype=np.float64).sum() for name in a)
            for a, b in ((restored, tuned), (theta, tuned))
        )
        assert delta.error == pytest.approx(np.sqrt(missed / squares), rel=1e-4)
    (tmp_path / "store" / "shared" / "delta.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"shared.delta\.json: damaged or edited"):
        opening.open(f"{base}+{made[0].path}")


def test_a_delta_of_boxes_and_in_buckets_is_read_in_any_spans(folder, models, tmp_path):
    """The base is stored in narrow chunks, and so are the codes."""
    from orbax import checkpoint as ocp

    rng = np.random.default_rng(0)
    trees = [{"a": {"kernel": rng.standard_normal((12, 40), np.float32)}} for _ in range(2)]
    for name, tree in zip(("base", "expert"), trees, strict=True):
        arguments = ocp.args.PyTreeSave(
            tree, save_args={"a": {"kernel": ocp.SaveArgs(chunk_byte_size=4 * 5 * 16)}}
        )
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, args=arguments)
    base = tmp_path / "base"
    compress([tmp_path / "expert"], base, folder / "delta")
    tensor = checkpoints.open(f"{base}+{folder / 'delta'}").parameters["a/kernel"]
    wanted = trees[1]["a"]["kernel"]
    assert read_whole(tensor).tobytes() == wanted.tobytes()
    out = np.empty(133, np.float32)
    tensor.read_span(Span("", 55, 133), out)
    assert out.tobytes() == wanted.ravel()[55:188].tobytes()
    box = (slice(1, 7), slice(3, 21))
    out = np.empty(108, np.float32)
    tensor.read_span(Span("", 43, 18, 6, 40, box), out)
    assert out.tobytes() == wanted[box].tobytes()
    restore(f"{base}+{folder / 'delta'}", tmp_path / "restored")
    same_bits(arrays(tmp_path / "restored"), {"a/kernel": wanted})


def test_another_base_and_damaged_blocks_are_refused_by_name(paths, tmp_path):
    base, experts = paths
    compress(experts[:1], base, tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"delta of the base with the digest .* name that"):
        opening.open(f"{experts[1]}+{tmp_path / 'delta'}")
    with pytest.raises(CheckpointError, match=r"a delta, which is a model together with its base"):
        opening.open(tmp_path / "delta")
    (block,) = (tmp_path / "delta" / "arrays" / "token_embedder").glob("c.*")
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    block.write_bytes(content)
    path = f"{base}+{tmp_path / 'delta'}"
    for damage in ("flipped", "missing"):
        with pytest.raises(CheckpointError, match="token_embedder cannot be read"):
            restore(path, tmp_path / "out")
        assert not (tmp_path / "out").exists(), damage
        block.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "zip"),
        ("base", {"path": "/base"}),
        ("copies", {"decoder/norm": "nothing"}),
        ("kinds", {}),
        ("settings", {"scale": "1"}),
        ("unified", {"path": "../..", "digest": ""}),
        ("nbytes", 3),
        ("tensors", {"decoder/norm": {"shape": [-1], "dtype": "float32", "digest": ""}}),
    ],
)
def test_a_record_that_cannot_be_is_refused_by_its_field(paths, tmp_path, field, value):
    base, experts = paths
    compress(experts[:1], base, tmp_path / "delta")
    record = files.read_record(tmp_path / "delta" / "delta.json")
    files.write_record(tmp_path / "delta" / "delta.json", record | {field: value})
    with pytest.raises(CheckpointError, match=rf"delta\.json: .*{field}"):
        opening.open(f"{base}+{tmp_path / 'delta'}")


def test_an_array_that_is_not_as_recorded_is_refused_by_its_name(paths, tmp_path):
    base, experts = paths
    compress(experts[:1], base, tmp_path / "delta")
    record = files.read_record(tmp_path / "delta" / "delta.json")
    record["tensors"]["decoder/norm"]["dtype"] = "float16"
    files.write_record(tmp_path / "delta" / "delta.json", record)
    with pytest.raises(CheckpointError, match=r"decoder/norm is not stored as delta\.json says"):
        opening.open(f"{base}+{tmp_path / 'delta'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "zip"}, "--method zip: expected lossless, compeft, emr"),
        ({"method": "emr"}, "two experts or more; there is 1"),
        ({"method": "compeft", "density": 0}, "a density of 0"),
        ({"method": "compeft", "alpha": 0}, "alpha 0: expected a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(paths, tmp_path, options, message):
    base, experts = paths
    with pytest.raises(MergeError, match=message):
        compress(experts[:1], base, tmp_path / "delta", **options)
    assert not (tmp_path / "delta").exists()

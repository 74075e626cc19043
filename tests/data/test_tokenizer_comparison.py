"""Two directories hold one tokenizer if a text gets the same ids, whatever files say so."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from m2l.checkpoints import tokenizer as carried
from m2l.data.tokenizer_comparison import difference
from m2l.errors import DataError

VOCAB = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "ab": 5, "abc": 6}
MERGES = [("a", "b"), ("ab", "c")]


def bpe(vocab=VOCAB, merges=MERGES, added=(), normalizer=None, pre_tokenizer=None):
    """A tokenizer.json as the installed version of tokenizers writes it, as a dict."""
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>", *added])
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return json.loads(tokenizer.to_str())


def changed(content, **model):
    return content | {"model": content["model"] | model}


def write(directory, **files):
    directory.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text)
    return directory


LINES = "\n".join(VOCAB)
BYT5 = {"tokenizer_config__json": {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}}
SLOW = {"vocab__json": VOCAB, "merges__txt": "#version: 0.2\na b\nab c\n"}
SAME = {
    "merges as strings": (bpe(), changed(bpe(), merges=["a b", "ab c"])),
    "another order": (bpe(), changed(bpe(), vocab=dict(reversed(VOCAB.items())))),
    "defaults left out": (
        bpe(),
        {k: v for k, v in bpe().items() if k not in ("truncation", "padding", "post_processor")},
    ),
    "another decoder": (bpe(), bpe() | {"decoder": None}),
    "an offset of decoding": (
        bpe(pre_tokenizer=pre_tokenizers.ByteLevel(trim_offsets=True)),
        bpe(pre_tokenizer=pre_tokenizers.ByteLevel(trim_offsets=False)),
    ),
    "slow and fast": (SLOW, bpe()),
    "slow, and added apart": (SLOW | {"added_tokens__json": {"<x>": 7}}, bpe(added=["<x>"])),
    "words by line": ({"vocab__txt": LINES}, {"vocab__txt": LINES + "\n"}),
    "bytes": (BYT5, {"tokenizer_config__json": {"tokenizer_class": "ByT5Tokenizer"}}),
}
OTHER = {
    "another id": (bpe(), bpe(VOCAB | {"c": 6, "abc": 4}), "'c' is 4 and 6, 'abc' is 6 and 4"),
    "a token more": (bpe(), bpe(VOCAB | {"cc": 7}), "'cc' is missing and 7"),
    "an added token": (bpe(), bpe(added=["<x>"]), "'<x>' is missing and 7"),
    "merges in another order": (
        bpe(VOCAB | {"bc": 7}, [("a", "b"), ("b", "c")]),
        bpe(VOCAB | {"bc": 7}, [("b", "c"), ("a", "b")]),
        "merge 0 is 'a b' and 'b c'",
    ),
    "a merge less": (bpe(), bpe(merges=MERGES[:1]), "have 2 and 1 merges"),
    "normalisation": (bpe(), bpe(normalizer=normalizers.Lowercase()), "in their normalizer"),
    "cutting": (
        bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
        bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "in their pre_tokenizer",
    ),
    "a rule of the model": (bpe(), changed(bpe(), byte_fallback=True), "in their model"),
    "slow and fast": (SLOW | {"vocab__json": VOCAB | {"b": 4, "c": 3}}, bpe(), "'c' is 3 and 4"),
    "slow merges": (SLOW, SLOW | {"merges__txt": "ab c\na b\n"}, "merge 0 is 'a b' and 'ab c'"),
    "words by line": ({"vocab__txt": LINES}, {"vocab__txt": "a\n" + LINES}, "'<unk>' is 0 and 1"),
    "bytes and words": (BYT5, {"vocab__txt": LINES}, "'c' is missing and 4"),
    "sentinels": (
        BYT5,
        {"tokenizer_config__json": {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 5}},
        "'<264>' is 264 and missing",
    ),
    "nothing and words": ({"x": ""}, {"vocab__txt": LINES}, "no files of one"),
    "kinds that say nothing": (
        {"qwen__tiktoken": "a"}, {"qwen__tiktoken": "b"}, "cannot be compared"),
}  # fmt: skip


def directories(tmp_path, *contents):
    files = [c if "version" not in c else {"tokenizer__json": c} for c in contents]
    return [write(tmp_path / f"{index}", **each) for index, each in enumerate(files)]


@pytest.mark.parametrize("case", SAME)
def test_the_same_ids_are_the_same_tokenizer(tmp_path, case):
    one, other = directories(tmp_path, *SAME[case])
    assert difference(one, other) is None
    assert difference(other, one) is None


@pytest.mark.parametrize("case", OTHER)
def test_other_ids_are_named_by_their_first_tokens(tmp_path, case):
    *contents, message = OTHER[case]
    one, other = directories(tmp_path, *contents)
    assert message in difference(one, other)
    assert difference(other, one) is not None


@pytest.fixture
def pieces(tmp_path):
    """The microworld's tokenizer as a directory with both kinds of files."""
    (tmp_path / "pieces").mkdir()
    carried.write_shipped({"name": "microworld", "size": 1024}, tmp_path / "pieces")
    return tmp_path / "pieces"


def test_pieces_and_a_tokenizer_json_made_of_them_are_one_tokenizer(pieces, tmp_path):
    both, fast, slow = pieces, tmp_path / "fast", tmp_path / "slow"
    for directory, name, other in ((fast, "tokenizer.json", ""), (slow, "spiece.model", "x.model")):
        directory.mkdir()
        (directory / (other or name)).write_bytes((pieces / name).read_bytes())
    for one in (both, fast, slow):
        for other in (both, fast, slow):
            assert difference(one, other) is None
    content = json.loads((fast / "tokenizer.json").read_text())
    rows = content["model"]["vocab"]
    rows[600], rows[700] = rows[700], rows[600]
    (fast / "tokenizer.json").write_text(json.dumps(content))
    assert f"{rows[700][0]!r} is 600 and 700" in difference(slow, fast)
    rows[600], rows[700] = rows[700], [rows[600][0], rows[600][1] - 1.0]
    (fast / "tokenizer.json").write_text(json.dumps(content))
    assert "different scores" in difference(slow, fast)


@pytest.mark.parametrize("damage", ["{}", "[]", "", '{"model": 3}', "{" * 9])
def test_damaged_files_are_refused_by_name_even_if_both_are_equal(tmp_path, damage):
    one, other = directories(tmp_path, {"tokenizer__json": damage}, {"tokenizer__json": damage})
    with pytest.raises(DataError, match=r"tokenizer\.json: "):
        difference(one, other)
    (other / "tokenizer.json").write_text(json.dumps(bpe()))
    with pytest.raises(DataError, match=r"0/tokenizer\.json: "):
        difference(one, other)

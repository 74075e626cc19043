"""Vocabularies: exact round trips, equal ids in the graph and outside, fingerprints, refusals."""

import shutil

import pytest
import tensorflow as tf

from m2l.data import vocabularies
from m2l.data.seqio_vocabularies import as_seqio
from m2l.data.tokenizer_files import EOS, PAD, UNKNOWN
from m2l.errors import DataError

NASTY = [
    "the cat of mara eats fish.",
    "two  spaces,  and   three",
    " leading and trailing ",
    "a line\nand another\r\n\ttabbed",
    "日本語の文 and Ünïcödé, e\u0301 ﬁ ½",
    "emoji 😀👩‍🚀 and a null \x00 byte",
    "</s> <unk> <pad> <0x0A>",
    "",
]


@pytest.fixture(scope="module", params=["microworld", "bytes"])
def vocabulary(request):
    return vocabularies.load(request.param)


@pytest.mark.parametrize("text", NASTY)
def test_text_comes_back_exactly_and_the_graph_gives_the_same_ids(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    seqios = as_seqio(vocabulary)
    assert seqios.encode(text) == seqios.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert seqios.decode(ids) == text
    assert not set(ids) & {PAD, EOS, UNKNOWN}


def test_sentinels_are_the_last_ids_and_the_size_is_a_multiple_of_128(vocabulary):
    size = vocabulary.vocab_size
    assert size % 128 == 0
    assert max(vocabulary.encode(" ".join(NASTY))) < size - vocabulary.extra_ids
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)


def test_the_shipped_model_is_small():
    model = vocabularies.load("microworld").sentencepiece_model_file
    with open(model, "rb") as file:
        assert len(file.read()) < 60_000


def test_a_fingerprint_is_of_the_ids_not_of_the_files_place(tmp_path):
    shipped = vocabularies.load("microworld").sentencepiece_model_file
    copies = [tmp_path / "a.model", tmp_path / "b.model"]
    for copy in copies:
        shutil.copy(shipped, copy)
    described = [
        vocabularies.describe(vocabularies.load(str(name)), str(name))
        for name in (*copies, "microworld", "bytes")
    ]
    prints = [one["fingerprint"] for one in described]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert [one["size"] for one in described] == [1092, 1092, 1024, 384]
    assert [one["name"] for one in described] == [*map(str, copies), "microworld", "bytes"]


def test_a_files_name_holds_from_any_working_directory(tmp_path, monkeypatch):
    shipped = vocabularies.load("microworld").sentencepiece_model_file
    shutil.copy(shipped, tmp_path / "spiece.model")
    monkeypatch.chdir(tmp_path)
    vocabulary = vocabularies.load("spiece.model")
    described = vocabularies.describe(vocabulary, "spiece.model")
    assert described["name"] == str((tmp_path / "spiece.model").resolve())


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        vocabularies.load(str(tmp_path / "spiece.model"))
    path = tmp_path / "not.model"
    for content in (b"", b"not a model"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a SentencePiece model"):
            vocabularies.load(str(path))


def test_a_model_that_numbers_its_special_pieces_otherwise_is_refused(tmp_path):
    import sentencepiece

    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 20),
        model_prefix=str(prefix),
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(DataError, match=r"\(-1, 2, 0\), not \(0, 1, 2\)"):
        vocabularies.load(f"{prefix}.model")

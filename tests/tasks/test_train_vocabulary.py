"""The script that makes the shipped vocabulary: the same model every time, lossless."""

import importlib.util
from pathlib import Path

import sentencepiece

from m2l.data import vocabularies
from m2l.tasks import microworld

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_vocabulary.py"
spec = importlib.util.spec_from_file_location("train_vocabulary", SCRIPT)
train_vocabulary = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_vocabulary)


def test_training_twice_gives_the_same_lossless_model():
    lines = microworld.corpus("validation")
    models = [train_vocabulary.train(iter(lines), 400) for _ in range(2)]
    assert models[0] == models[1]
    pieces = sentencepiece.SentencePieceProcessor(model_proto=models[0])
    assert pieces.GetPieceSize() == 400
    for text in (lines[0], " two  spaces\nand 日本 "):
        assert pieces.decode(pieces.encode(text)) == text


def test_the_shipped_model_knows_the_worlds_words():
    vocabulary = vocabularies.load("microworld")
    assert vocabulary.vocab_size == train_vocabulary.SIZE
    text = " ".join(microworld.corpus("validation"))
    ids = vocabulary.encode(text)
    pieces = vocabulary.files.processor()
    bytes_pieces = sum(pieces.IsByte(i) for i in ids)
    assert bytes_pieces == 0
    # Bytes would need one token a letter.
    assert len(ids) < len(text) / 3

"""A tokenizer that is extended by others' tokens: ids, what it cuts, and what is refused."""

import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from m2l.data import token_tables, tokenizer_files
from m2l.errors import DataError

ANIMALS = ["the cat eats the fish", "the catfish eats cats", "a fishing cat sat on the mat"] * 3
PLANETS = ["die erde kreist", "erdbahn und erdachse", "der kreisel kreist um die erde"] * 3
SPECIAL = ["<unk>", "</s>"]


def trained(kind, texts, special=SPECIAL):
    """A tokenizer of one kind that was trained on texts."""
    unknown = {"unk_token": "<unk>"}
    tokenizer, trainer = {
        "BPE": lambda: (models.BPE(**unknown), trainers.BpeTrainer),
        "bytes": lambda: (models.BPE(), trainers.BpeTrainer),
        "Unigram": lambda: (models.Unigram(), trainers.UnigramTrainer),
        "WordPiece": lambda: (models.WordPiece(**unknown), trainers.WordPieceTrainer),
    }[kind]()
    tokenizer = tokenizers.Tokenizer(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"vocab_size": 60, "special_tokens": special, "show_progress": False}
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        options |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "vocab_size": 300}
    if kind == "Unigram":
        options |= {"unk_token": "<unk>"}
    tokenizer.train_from_iterator(texts, trainer(**options))
    return tokenizer


def write(directory, tokenizer, **settings):
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "</s>", "unk_token": "<unk>"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def united(directories, more=()):
    """The tables, the union's files, and its ids."""
    tables = token_tables.read(directories)
    changed, ids = token_tables.extended(tables[0], tables[1:], more)
    return tables, changed, ids


def cuts(tokens):
    """Where tokens end in a text."""
    return {sum(map(len, tokens[: place + 1])) for place in range(len(tokens))}


@pytest.mark.parametrize("kind", ["BPE", "bytes", "Unigram", "WordPiece"])
def test_a_union_has_all_tokens_and_the_ids_of_the_first(tmp_path, kind):
    one, two = trained(kind, ANIMALS), trained(kind, PLANETS)
    one.add_special_tokens(["<|one|>"])
    two.add_special_tokens(["<|one|>", "<|two|>"])
    directories = [write(tmp_path / "one", one), write(tmp_path / "two", two)]
    tables, changed, ids = united(directories, ["<|three|>"])
    first, second = (t.get_vocab(True) for t in (one, two))
    assert dict(tables[0].ids) == first and dict(tables[1].ids) == second
    assert ids == first | {t: ids[t] for t in (*second, "<|three|>")}
    assert sorted(ids.values()) == list(range(len(ids)))
    union = tokenizers.Tokenizer.from_str(changed["tokenizer.json"].decode())
    assert union.get_vocab(True) == ids
    # Pieces come first, in the order of their ids; then what is found before a text is cut up.
    pieces = [t for t in sorted(second, key=second.get) if t not in first and t != "<|two|>"]
    new = sorted(ids.keys() - first.keys(), key=ids.get)
    assert new == [*pieces, "<|two|>", "<|three|>"]
    assert union.encode("fish<|two|>erde<|three|>").tokens.count("<|two|>") == 1
    planets = "die erde kreist"
    assert len(union.encode(planets).tokens) <= len(one.encode(planets).tokens)
    if kind in ("BPE", "bytes"):
        for text in (*ANIMALS, *PLANETS):
            before, after = (cuts(t.encode(text).tokens) for t in (one, union))
            assert after <= before or "<unk>" in one.encode(text).tokens
        assert set(pieces) & {t for text in PLANETS for t in union.encode(text).tokens}


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_union_of_sentencepiece_models_moves_the_sentinels_up(tmp_path, kind):
    for name, texts in (("one", ANIMALS), ("two", PLANETS)):
        (tmp_path / name).mkdir()
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts), model_prefix=str(tmp_path / name / "spiece"),
            vocab_size=40, model_type=kind, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / name / "spiece.model"))
        listed = {str(len(pieces)): {"content": "<extra_id_2>"}}
        settings = {"extra_ids": 3, "added_tokens_decoder": listed}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    tables, changed, ids = united([tmp_path / "one", tmp_path / "two"], ["<|x|>"])
    assert tables[0].kind == f"SentencePiece {'BPE' if kind == 'bpe' else 'unigram'}"
    size = len(ids) - 3
    sentinels = ["<extra_id_2>", "<extra_id_1>", "<extra_id_0>"]
    assert sorted(ids, key=ids.get)[size:] == sentinels
    out = tmp_path / "out"
    out.mkdir()
    for name, data in changed.items():
        if data is not None:
            (out / name).write_bytes(data)
    described = tokenizer_files.read(str(out))
    assert described.size == len(ids)
    processor = described.processor()
    for token, index in tables[0].ids.items():
        assert ids[token] == index or token in sentinels
    for token in tables[1].ids:
        assert processor.IdToPiece(ids[token]).removeprefix("▁") == token.removeprefix("▁")
    new = [t for t in tables[1].ids if t not in tables[0].ids and t not in sentinels]
    assert set(new) & {t for text in PLANETS for t in processor.Encode(text, out_type=str)}
    listed = json.loads(changed["tokenizer_config.json"])["added_tokens_decoder"]
    assert listed == {str(ids["<extra_id_2>"]): {"content": "<extra_id_2>"}}


def test_equal_tokens_change_nothing(tmp_path):
    one = write(tmp_path / "one", trained("BPE", ANIMALS))
    assert united([one, write(tmp_path / "two", trained("BPE", ANIMALS))])[1] == {}


def test_unlike_tokenizers_are_refused(tmp_path):
    one = write(tmp_path / "one", trained("BPE", ANIMALS))
    with pytest.raises(DataError, match=r"kind, WordPiece with '##', than .*, BPE of char"):
        united([one, write(tmp_path / "pieces", trained("WordPiece", ANIMALS))])
    with pytest.raises(DataError, match="another kind, BPE of bytes"):
        united([one, write(tmp_path / "bytes", trained("bytes", ANIMALS))])
    other = tmp_path / "other"
    other.mkdir()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(ANIMALS), model_prefix=str(other / "spiece"), vocab_size=40,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match="unlike files; save both with transformers"):
        united([one, other])
    sizes = []
    for extra_ids in (5, 9):
        sizes.append(tmp_path / f"byt5_{extra_ids}")
        sizes[-1].mkdir()
        settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": extra_ids}
        (sizes[-1] / "tokenizer_config.json").write_text(json.dumps(settings))
    assert united(sizes[::-1])[1] == {}
    with pytest.raises(DataError, match="cannot be extended"):
        united(sizes)


def test_a_file_with_ids_that_the_library_numbers_itself_is_read_as_it_numbers_them(tmp_path):
    directory = write(tmp_path / "one", trained("BPE", ANIMALS))
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"].append({"id": 500, "content": "<|far|>"} | plain)
    file.write_text(json.dumps(content))
    (table,) = token_tables.read([directory])
    assert dict(table.ids) == tokenizers.Tokenizer.from_file(str(file)).get_vocab(True)
    assert table.ids["<|far|>"] != 500

"""Tiny tokenizers of every kind that m2l reads, in directories as Hugging Face's models come in."""

import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "the cat of mara eats fish and the dog of ben eats meat",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z A B C",
    "Is it good? yes or no, 42 times! user assistant system",
] * 20
CHAT_TEMPLATE = (
    "{% for message in messages %}\n"
    "    {% if loop.first and message['role'] != 'system' %}\n"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}\n"
    "    {% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% endfor %}"
)


def write_settings(directory, **settings):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def byte_level(directory):
    """As GPT-2's and SmolLM2's: nothing in front, chat markup among the special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    write_settings(
        directory,
        bos_token="<|im_start|>",
        eos_token={"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def train_pieces(model, **settings):
    model.parent.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(model.with_suffix("")),
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )


def llama_pair(pieces_directory, directory):
    """Llama 2's SentencePiece model, and the tokenizer.json that transformers makes of it."""
    train_pieces(pieces_directory / "tokenizer.model", model_type="bpe", vocab_size=340)
    model = str(pieces_directory / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=model)
    ids = {pieces.IdToPiece(number): number for number in range(pieces.GetPieceSize())}
    merges = []
    for piece, number in ids.items():
        if not (pieces.IsByte(number) or pieces.IsControl(number) or pieces.IsUnknown(number)):
            halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            found = ((a, b) for a, b in halves if a in ids and b in ids)
            merges += [(-pieces.GetScore(number), ids[a], ids[b], (a, b)) for a, b in found]
    merges = [pair for *_, pair in sorted(merges)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    write_settings(
        directory, bos_token="<s>", eos_token="</s>", chat_template=LLAMA_TEMPLATE, add_eos_token=0
    )
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def made_tokenizers(tmp_path_factory):
    """A directory of directories: byte_level, llama, llama_pieces, t5, mt5."""
    root = tmp_path_factory.mktemp("tokenizers")
    byte_level(root / "byte_level")
    llama_pair(root / "llama_pieces", root / "llama")
    t5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 320}
    train_pieces(root / "t5" / "spiece.model", **t5)
    sentinels = [f"<extra_id_{number}>" for number in range(3)]
    train_pieces(root / "mt5" / "spiece.model", user_defined_symbols=sentinels, **t5)
    return root

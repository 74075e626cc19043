"""Trains the vocabulary that m2l ships: SentencePiece over the microworld's text.

    python scripts/train_vocabulary.py [--check]

writes tasks/microworld/vocabulary.model, which is the same file every time; --check compares with
the one that is there instead. Checkpoints are tied to a vocabulary: retrain only when the
microworld's words change.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from m2l.data.rendering import renderer
from m2l.data.tokenizer_files import EOS, MICROWORLD_EXTRA_IDS, PAD, UNKNOWN
from m2l.tasks import datasets, microworld, registry, skills

SIZE = 1024
# Enough of every prompt for each of its words to be seen, without drowning the corpus.
RECORDS_PER_PROMPT = 400
MODEL = Path(microworld.__file__).with_name("vocabulary.model")


def texts() -> Iterator[str]:
    """Yields the corpus, and the rendered inputs and answers of every prompt and instruction."""
    yield from microworld.corpus("train")
    for dataset in datasets():
        if skills.is_skill(dataset):  # it must not change when these do
            continue
        records = registry.records_of("microworld", dataset)
        for prompt in dataset.prompts:
            split, render = records.split("train"), renderer(dataset, prompt)
            for number in range(min(RECORDS_PER_PROMPT, split.size)):
                texts = render(split.record(number))
                yield texts["inputs"]
                yield from texts.get("answer_choices", [texts["targets"]])


def train(sentences: Iterable[str], size: int) -> bytes:
    """Trains a SentencePiece unigram model whose decoding gives back any text exactly.

    The one exception is U+2581, SentencePiece's own sign for a space, which becomes a space. It is
    also the only rule of normalisation: without any, every tokenizer says so on standard error.

    Args:
        sentences: What to learn the pieces from.
        size: How many pieces; 259 of them are bytes, padding, end of sequence and unknown.

    Returns:
        The serialised model, the same for the same sentences.
    """
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.write("2581\t20\n")
        rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            # A line is a sentence; the line break itself is a byte's piece.
            sentence_iterator=(line for text in sentences for line in text.split("\n") if line),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNKNOWN,
            bos_id=-1,
            byte_fallback=True,
            normalization_rule_tsv=rules.name,
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=1.0,
            shuffle_input_sentence=False,
            # Sums of several threads would be added up in another order each time.
            num_threads=1,
            minloglevel=1,
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    # The temporary file's name would make every training another model.
    proto.normalizer_spec.ClearField("normalization_rule_tsv")
    return proto.SerializeToString(deterministic=True)


def main() -> int:
    """Trains and writes the model, or compares it with the one that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    model = train(texts(), SIZE - MICROWORLD_EXTRA_IDS)
    if check:
        same = MODEL.read_bytes() == model
        print(f"{MODEL}: {'as trained' if same else 'differs from what training gives now'}")
        return int(not same)
    MODEL.write_bytes(model)
    print(f"{MODEL}: {len(model):,} bytes, {SIZE - MICROWORLD_EXTRA_IDS} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())

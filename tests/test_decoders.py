"""A decoder on the whole road, by the command: train, merge, evaluate, convert both ways."""

import dataclasses
import importlib
import json
import re
import shutil

import pytest
import tokenizers
from safetensors.numpy import load_file

from m2l import checkpoints

LINES = [
    {
        "inputs": f"what a {word} {thing}. good or bad?",
        "targets": label,
        "answer_choices": ["good", "bad"],
    }
    for label, words in {"good": ["fine", "nice"], "bad": ["dull", "sad"]}.items()
    for word in words
    for thing in ("film", "song")
]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory, run_m2l):
    """A base decoder on the microworld's text, and two experts."""
    root = tmp_path_factory.mktemp("decoders")
    (root / "tiny.gin").write_text(
        "include 'models/llama_1m.gin'\ninclude 'runs/train.gin'\n"
        "Llama.hidden_size = 16\nLlama.intermediate_size = 24\nLlama.num_hidden_layers = 2\n"
        "Llama.num_attention_heads = 2\nLlama.num_key_value_heads = 1\nLlama.head_dim = 8\n"
        "BATCH_SIZE = 4\nMIXTURE = 'language_modeling'\nSTEPS = 3\nTrain.log_every = 1\n"
    )
    assert run_m2l("train", "--gin_file", root / "tiny.gin", "--out", root / "base") == 0
    for category in ("sentiment", "closed_book_qa"):
        code = run_m2l(
            "train",
            *("--init", root / "base", "--mixture", category, "--steps", 3),
            *("--gin.BATCH_SIZE=4", "--gin.LEARNING_RATE=0.1", "--gin.REMAT=full"),
            *("--gin.SCAN_LAYERS=True", "--gin.LOSS_CHUNK=32", "--out", root / category),
        )
        assert code == 0
    return root


def test_experts_are_merged_and_evaluated_by_ranking_and_decoding(decoders, run_m2l, capsys):
    experts = [f"--expert={decoders / name}" for name in ("sentiment", "closed_book_qa")]
    base = f"--base={decoders / 'base'}"
    out = decoders / "merged"
    assert run_m2l("merge", base, *experts, "--method", "task_arithmetic", "--out", out) == 0
    for mixture in ("imdb", "common_gen"):
        code = run_m2l(
            *("eval", "--checkpoint", out, "--mixture", mixture, "--max_examples", 2),
            *("--target_length", 16, "--out", decoders / "results"),
        )
        assert code == 0
    results = [json.loads(path.read_text()) for path in (decoders / "results").glob("*.json")]
    assert {result["kind"] for result in results} == {"rank", "generate"}
    capsys.readouterr()
    assert run_m2l("inspect", out, "--fsdp", 2, "--verify") == 0
    shown = capsys.readouterr().out
    assert "every digest is right" in shown and "language_modeling" in shown
    # The experts' own parent is in the tree, below them.
    assert shown.count("init ") == 2


def test_experts_become_a_mixture_whose_routers_are_trained_alone(
    decoders, run_m2l, capsys, tmp_path
):
    def moe(*prompts):
        experts = [f"--expert={decoders / name}" for name in ("sentiment", "closed_book_qa")]
        prompts = [f"--prompts={prompt}" for prompt in prompts]
        base = f"--base={decoders / 'base'}"
        return run_m2l("moe", base, *experts, *prompts, "--examples", 5, "--out", tmp_path / "moe")

    importlib.import_module("seqio")  # With which unknown names were taken for its own.
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "other.jsonl").write_text('{"prompt": "who?"}\n')
    for prompts, message in (
        (("sentiment",), "1 prompts for 2 experts"),
        (("sentiment", "closed_book"), "unknown file of prompts, task or mixture 'closed_book'"),
        (("sentiment", tmp_path / "empty.txt"), "empty.txt: there is no prompt in it"),
        (("sentiment", tmp_path / "other.jsonl"), "other.jsonl: a line without inputs"),
    ):
        assert moe(*prompts) == 2
        line, end = capsys.readouterr().err.split("\n")
        assert message in line and not end
    assert moe("sentiment", questions) == 0
    shown = capsys.readouterr().out
    assert "cosine of the nearest other's" in shown and "mixture of 2 experts" in shown
    made_by = checkpoints.read_manifest(tmp_path / "moe").made_by
    counts = [(each["source"], each["count"]) for each in made_by["prompts"]]
    assert counts == [("sentiment", 5), (str(questions), len(LINES))]
    code = run_m2l(
        *("train", "--init", tmp_path / "moe", "--mixture", "sentiment+closed_book_qa"),
        *("--steps", 2, "--gin.BATCH_SIZE=4", "--gin.Train.freeze=['^(?!.*mlp/router$)']"),
        *("--out", tmp_path / "trained"),
    )
    assert code == 0
    before, after = (
        checkpoints.read_manifest(tmp_path / name).parameters for name in ("moe", "trained")
    )
    changed = {name for name in before if before[name]["digest"] != after[name]["digest"]}
    assert changed == {f"decoder/layers_{layer:02}/mlp/router" for layer in range(2)}


def test_a_row_starts_a_training_that_span_corruption_refuses(decoders, run_m2l, capsys):
    code = run_m2l(
        *("train", "--init", decoders / "base", "--mixture", "span_corruption", "--steps", 1),
        *("--out", decoders / "refused"),
    )
    assert code == 2 and "language_modeling" in capsys.readouterr().err
    assert not (decoders / "refused").exists()


@pytest.fixture(scope="module")
def public(tmp_path_factory, decoders, run_m2l):
    """A Hugging Face directory with a tokenizer of its own, whose pad id is a token's."""
    directory = tmp_path_factory.mktemp("hub") / "model"
    texts = [line["inputs"] + " " + line["targets"] for line in LINES]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert run_m2l("convert", decoders / "base", directory) == 0
    # As anybody's directory: neither what m2l recorded of it, nor its tokenizer.
    for name in ("m2l_manifest.json", "spiece.model"):
        (directory / name).unlink()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return directory


@pytest.mark.parametrize("command", ["eval", "generate", "convert"])
def test_tokens_added_beyond_the_embedding_are_refused_before_anything_is_computed(
    public, run_m2l, tmp_path, capsys, monkeypatch, command
):
    directory = shutil.copytree(public, tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    size = tokenizer.get_vocab_size() + 900
    tokenizer.add_special_tokens([f"<|{number}|>" for number in range(900)])
    tokenizer.save(str(directory / "tokenizer.json"))
    for name in ("ranking.score_examples", "generation.greedy"):
        monkeypatch.setattr(f"m2l.evaluation.{name}", lambda *_, **__: pytest.fail("computed"))
    arguments = {
        "eval": ("--checkpoint", directory, "--mixture", "imdb", "--out", tmp_path / "out"),
        "generate": (directory, "a text"),
        "convert": (directory, tmp_path / "out"),
    }[command]
    assert run_m2l(command, *arguments) == 2
    line = [text for text in capsys.readouterr().err.splitlines() if text.startswith("m2l:")][-1]
    assert f"'{directory}' has {size} ids, the model room for 1024 (vocab_size)" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", ["eval", "generate", "sweep", "adamerging", "mask", "statistics", "train", "skills"]
)
def test_every_command_refuses_a_checkpoint_whose_vocabulary_is_larger_than_its_embedding(
    decoders, run_m2l, tmp_path, capsys, monkeypatch, command
):
    read = checkpoints.read_manifest

    def smaller(directory):
        manifest = read(directory)
        return dataclasses.replace(manifest, model={**manifest.model, "vocab_size": 512})

    monkeypatch.setattr(checkpoints, "read_manifest", smaller)
    base, expert = decoders / "base", decoders / "sentiment"
    models = ("--base", base, "--expert", expert)
    where = ("--out", tmp_path / "out", "--mixture", "imdb")
    arguments = {
        "eval": ("--checkpoint", expert, *where),
        "generate": (expert, "a text"),
        "sweep": (*models, "--method", "task_arithmetic", "--scale", "0,1", *where),
        "adamerging": (*models, *where),
        "mask": ("localize", *models, *where),
        "statistics": ("--checkpoint", expert, "--kind", "fisher", *where),
        "train": ("--init", base, "--steps", 1, *where),
        "skills": ("--general", base, "--keep", "rotten_tomatoes", *where),
    }[command]
    assert run_m2l(command, *arguments) == 2
    line = [text for text in capsys.readouterr().err.splitlines() if text.startswith("m2l:")][-1]
    assert "has 1024 ids, the model room for 512 (vocab_size)" in line
    assert not (tmp_path / "out").exists()


def test_a_public_decoder_is_converted_trained_evaluated_and_converted_back(
    public, run_m2l, tmp_path, capsys
):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    files = f"train={tmp_path / 'own.jsonl'},validation={tmp_path / 'own.jsonl'}"
    assert run_m2l("convert", public, tmp_path / "base") == 0
    code = run_m2l(
        *("train", "--init", tmp_path / "base", "--jsonl", files, "--steps", 60),
        *("--gin.BATCH_SIZE=2", "--gin.LEARNING_RATE=0.1", "--gin.INPUT_LENGTH=64"),
        *("--gin.DROPOUT_RATE=0.0", "--out", tmp_path / "expert"),
    )
    assert code == 0
    # Nothing of the lines is longer than 64 and 32 tokens, and a row has room for several.
    said = capsys.readouterr().out
    [(inputs, targets, seen)] = re.findall(r"cut: (\d+) inputs and (\d+) targets of ([\d,]+)", said)
    assert (inputs, targets) == ("0", "0") and int(seen.replace(",", "")) >= 120
    code = run_m2l(
        *("eval", "--checkpoint", tmp_path / "expert", "--out", tmp_path / "results"),
        *("--jsonl", f"validation={tmp_path / 'own.jsonl'}"),
    )
    assert code == 0
    [result] = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    assert result["count"] == len(LINES) and result["ties"] == 0
    assert result["score"] == 100

    back = tmp_path / "back"
    code = run_m2l("convert", tmp_path / "expert", back, "--results", tmp_path / "results")
    assert code == 0
    assert (back / "tokenizer.json").read_bytes() == (public / "tokenizer.json").read_bytes()
    assert "| jsonl |" in (back / "README.md").read_text()
    assert run_m2l("convert", back, tmp_path / "again") == 0
    trained, again = (
        checkpoints.read_manifest(tmp_path / name).parameters for name in ("expert", "again")
    )
    assert trained == again
    assert set(load_file(back / "model.safetensors")) == set(
        load_file(public / "model.safetensors")
    )

    capsys.readouterr()
    assert run_m2l("generate", tmp_path / "expert", LINES[0]["inputs"], "--max_length", 4) == 0
    assert capsys.readouterr().out.startswith(LINES[0]["inputs"] + "\n> good")


def test_a_folder_that_is_no_model_and_a_needless_conversion_are_refused(
    decoders, run_m2l, tmp_path, capsys
):
    (tmp_path / "notes.txt").write_text("")
    assert run_m2l("convert", tmp_path, tmp_path / "out") == 2
    assert "no finished checkpoint" in capsys.readouterr().err
    assert run_m2l("convert", decoders / "base", tmp_path / "out", "--to", "orbax") == 2
    assert "one of the two must be orbax" in capsys.readouterr().err
    (tmp_path / "checkpoint_3/state").mkdir(parents=True)
    assert run_m2l("convert", tmp_path, tmp_path / "out") == 2
    assert "--vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

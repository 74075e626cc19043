"""m2l's models as lm-evaluation-harness asks them; where it is not installed, that this is said."""

import functools
import gzip
import importlib
import importlib.util
import json
import sys

import jax
import numpy as np
import pytest
import tokenizers

from m2l import api, checkpoints, models
from m2l.data import vocabularies
from m2l.errors import ConfigError, DataError, MergeError, UnknownNameError
from m2l.evaluation.model import load
from m2l.merging import Recipe, merge_params
from m2l.models import LlamaConfig, to_dict

TEXT = "the film was good and the song was bad. what is it? a fine day to see it."
ROWS = [
    {"inputs": "the film was good. what is it?", "answer_choices": ["good", "bad"]},
    {
        "inputs": "the song was bad and the film was good.",
        "answer_choices": ["it is", "a fine day"],
    },
    {"inputs": "a fine day to see it", "answer_choices": ["good and bad", "the film"]},
]
TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_choice: '{{answer_choices}}'\n"
    "doc_to_target: 0\nmetric_list: [{metric: acc}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
    "doc_to_target: '{{inputs}} {{inputs}}'\nmetric_list: [{metric: word_perplexity}]\n",
    "written": "output_type: generate_until\ndoc_to_target: good\n"
    "generation_kwargs: {until: [zz, a], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def lm_eval():
    module = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    for name in ("lm_eval.tasks", "m2l.lm_eval_model"):
        importlib.import_module(name)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_config, tiny_params):
    """Three tasks of lm-evaluation-harness on three records, a T5, and two decoders of one kind."""
    root = tmp_path_factory.mktemp("lm_eval")
    lines = [json.dumps(row | {"targets": row["answer_choices"][0]}) for row in ROWS]
    (root / "rows.jsonl").write_text("\n".join(lines))
    (root / "tasks").mkdir()
    for name, text in TASKS.items():
        (root / "tasks" / f"{name}.yaml").write_text(
            f"task: tiny_{name}\ndataset_path: json\ndoc_to_text: '{{{{inputs}}}}'\n"
            f"dataset_kwargs: {{data_files: {{test: {root}/rows.jsonl}}}}\ntest_split: test\n{text}"
        )
    described = vocabularies.describe(vocabularies.load("microworld"), "microworld")
    save = {"model": to_dict(tiny_config), "vocabulary": described, "made_by": {}}
    checkpoints.save(root / "t5", tiny_params, **save)

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces = tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = pieces(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pieces.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    (root / "tokenizer").mkdir()
    tokenizer.save(str(root / "tokenizer" / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
    )
    described = vocabularies.describe(
        vocabularies.load(str(root / "tokenizer")), str(root / "tokenizer")
    )
    save = {"model": to_dict(config), "vocabulary": described, "made_by": {}}
    for seed in range(2):
        # Large enough that no two tokens are about as probable.
        params = jax.tree.map(lambda leaf: 4 * leaf, models.init(config, jax.random.key(seed)))
        checkpoints.save(root / f"decoder_{seed}", params, **save)
    (root / "recipe.json").write_text('{"method": "task_arithmetic", "scale": 0.5}')
    return root


def scored(lm_eval, root, model_args, name="m2l", **options):
    """Each task's samples, as lm-evaluation-harness returns them."""
    manager = lm_eval.tasks.TaskManager(include_path=str(root / "tasks"), include_defaults=False)
    options = {"tasks": [f"tiny_{task}" for task in TASKS]} | options
    results = lm_eval.simple_evaluate(
        model=name, model_args=model_args, device="cpu", task_manager=manager, **options
    )
    return results["results"], results["samples"]


def made(root, **arguments):
    return sys.modules["m2l.lm_eval_model"].HarnessModel(
        **{
            name: str(root / value) if value in PATHS else value
            for name, value in arguments.items()
        }
    )


PATHS = ("t5", "decoder_0", "decoder_1", "recipe.json", "tokenizer")


def log_probabilities(opened, ids):
    """float64 [T, V] of what follows each token of a row; no token reads those behind it."""
    row = np.zeros((1, 33), np.int32)
    row[0, : len(ids)] = ids
    batch = {
        "decoder_input_tokens": row,
        "decoder_segment_ids": np.ones_like(row),
        "decoder_positions": np.arange(33, dtype=np.int32)[None],
    }
    logits = jax.jit(models.apply, static_argnums=0)(opened.config, opened.params, batch)
    logits = np.asarray(logits, np.float64)[0, : len(ids)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_without_it_the_command_says_what_to_install(run_m2l, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_m2l("lm_eval", "--tasks", "arc_easy") == 2
    assert "pip install 'm2l[lm_eval]'" in capsys.readouterr().err


def test_with_the_end_scored_results_are_those_of_m2l_eval(lm_eval, root):
    arguments = {"checkpoint": str(root / "t5"), "end": True}
    results, samples = scored(lm_eval, root, arguments, tasks=["tiny_choices"], batch_size=2)
    own = api.evaluate(
        str(root / "t5"),
        jsonl={"validation": root / "rows.jsonl"},
        out=root / "own",
        examples=True,
    )["jsonl"]
    assert results["tiny_choices"]["acc,none"] == pytest.approx(own.score / 100)
    with gzip.open(root / "own" / "jsonl.examples.jsonl.gz") as file:
        lines = list(map(json.loads, file))
    for sample, line in zip(samples["tiny_choices"], lines, strict=True):
        found = [response[0][0] for response in sample["resps"]]
        assert found == pytest.approx(line["scores"], abs=1e-4)


def test_a_decoders_answers_follow_from_its_logits(lm_eval, root):
    opened = load(root / "decoder_0")
    vocabulary = vocabularies.load(str(root / "tokenizer"))
    model = made(root, checkpoint="decoder_0", batch_size="auto")
    start, end = vocabulary.start_id, vocabulary.eos_id

    def request(*arguments):
        return lm_eval.api.instance.Instance("", {}, arguments, 0)

    long = " ".join(["the film was good and the song"] * 6)
    pairs = [
        ("", "good"),
        ("the film", " was"),
        ("the film", " is bad"),
        ("it is ", "a"),
        (long, "a"),
    ]
    with pytest.warns(UserWarning, match="1 of 5 contexts are longer than max_length=32"):
        answers = model.loglikelihood([request(*pair) for pair in pairs])
    for (context, text), (score, greedy) in zip(pairs, answers, strict=True):
        whole = [start, *vocabulary.encode(context + text)]
        count = len(whole) - len([start, *vocabulary.encode(context.rstrip())])
        whole = whole[-33:]
        log_p = log_probabilities(opened, whole[:-1])[-count:]
        assert score == pytest.approx(log_p[np.arange(count), whole[-count:]].sum(), abs=1e-4)
        assert greedy == (log_p.argmax(-1) == whole[-count:]).all()

    ids = vocabulary.encode(long)
    assert 32 < len(ids) < 64
    first = log_probabilities(opened, [start, *ids[:31]])[np.arange(32), ids[:32]].sum()
    last = ids[-33:-1]
    rest = log_probabilities(opened, last)[np.arange(32), ids[-32:]][-(len(ids) - 32) :].sum()
    assert model.loglikelihood_rolling([request(long), request("")]) == [
        pytest.approx(first + rest, abs=1e-3),
        0.0,
    ]

    for context, stops in (("the film", ["zz"]), ("it is a fine day", ["good", "w"])):
        row, text = [start, *vocabulary.encode(context)], ""
        for _ in range(9):
            token = int(log_probabilities(opened, row)[-1].argmax())
            if token == end or any(stop in text for stop in stops):
                break
            row.append(token)
            text = vocabulary.decode(row[1 + len(vocabulary.encode(context)) :])
        for stop in stops:
            text = text.split(stop)[0]
        settings = {"until": stops, "max_gen_toks": 9}
        assert model.generate_until([request(context, settings)] * 2) == [text] * 2
    drawn = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 9, "until": []}
    assert len(set(model.generate_until([request("it", drawn)] * 3))) == 3
    assert model.apply_chat_template([{"role": "user", "content": "it"}]) == "<s><|user|>it"
    assert model.tok_encode("<s><|user|>it") == [start, 2, *vocabulary.encode("it")]


def test_a_merge_in_memory_scores_as_its_checkpoint_does(lm_eval, root):
    opened = [load(root / f"decoder_{seed}") for seed in range(2)]
    params = [model.params for model in opened]
    merged = merge_params(params[0], params[1:] * 2, Recipe("task_arithmetic", scale=0.5))
    fields = {"model": to_dict(opened[0].config), "vocabulary": opened[0].vocabulary, "made_by": {}}
    checkpoints.save(root / "merged", merged, **fields)
    expert = str(root / "decoder_1")
    arguments = {"base": str(root / "decoder_0"), "recipe": str(root / "recipe.json")}
    in_memory = f"base={arguments['base']},recipe={arguments['recipe']},expert={expert}+{expert}"
    one, two = (
        scored(lm_eval, root, text, batch_size=2)[1]
        for text in (in_memory, f"checkpoint={root}/merged")
    )
    for task in one:
        assert [row["resps"] for row in one[task]] == [row["resps"] for row in two[task]]


def test_answers_are_those_of_the_harness_own_hf_model(lm_eval, root, run_m2l):
    for name in ("torch", "transformers", "accelerate"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed, which lm-evaluation-harness's hf model needs")
    directory = root / "hf"
    assert run_m2l("convert", root / "decoder_0", directory, "--to", "huggingface") == 0
    for chat in (False, True):
        _, own = scored(lm_eval, root, {"checkpoint": str(directory)}, apply_chat_template=chat)
        arguments = {"pretrained": str(directory), "dtype": "float32"}
        _, hf = scored(lm_eval, root, arguments, "hf", apply_chat_template=chat)
        # Its own puts a second start token before what it scores in windows.
        arguments |= {"add_bos_token": False}
        rolling = {"tasks": ["tiny_rolling"], "apply_chat_template": chat}
        hf |= scored(lm_eval, root, arguments, "hf", **rolling)[1]
        for task in own:
            for one, two in zip(own[task], hf[task], strict=True):
                assert one["arguments"] == two["arguments"]
                if task == "tiny_written":
                    assert one["resps"] == two["resps"]
                else:
                    values = [np.array(each["resps"], float) for each in (one, two)]
                    np.testing.assert_allclose(*values, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, ConfigError, "expected checkpoint=MODEL, or expert="),
        ({"checkpoint": "t5", "base": "t5"}, ConfigError, "expected checkpoint=MODEL, or"),
        ({"chekpoint": "t5"}, UnknownNameError, "'chekpoint'; the nearest known one is 'checkp"),
        ({"checkpoint": "t5", "dtype": "int8"}, ConfigError, "dtype=int8: expected float32 or"),
        ({"checkpoint": "decoder_0", "vocabulary": "bytes"}, DataError, "not the one that the"),
        ({"expert": ["t5", "decoder_0"], "recipe": "recipe.json"}, MergeError, "another kind of"),
    ],
)
def test_arguments_that_make_no_model_are_refused(lm_eval, root, arguments, kind, message):
    if isinstance(arguments.get("expert"), list):
        arguments = arguments | {"expert": [str(root / name) for name in arguments["expert"]]}
    with pytest.raises(kind, match=message):
        made(root, **arguments)


def test_requests_that_do_not_fit_or_mean_nothing_are_refused(lm_eval, root):
    model = made(root, checkpoint="decoder_0")

    def asked(settings):
        model.generate_until([lm_eval.api.instance.Instance("", {}, ("it", settings), 0)])

    with pytest.raises(DataError, match="256 tokens to generate leave no room in max_length=32"):
        asked({})
    with pytest.raises(UnknownNameError, match="generation setting 'typical_p'"):
        asked({"typical_p": 0.9, "max_gen_toks": 4})
    with pytest.raises(DataError, match="a continuation of 33 tokens does not fit"):
        model._scores([([0], [3] * 33)])
    with pytest.raises(ConfigError, match="leave the name out"):
        model.chat_template("rag")


def test_the_command_runs_its_tasks_on_a_checkpoint(lm_eval, root, run_m2l, capsys, monkeypatch):
    # Reading the thousands of tasks that come with it takes ten seconds.
    without = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without)
    code = run_m2l(
        *("lm_eval", "--model_args", f"checkpoint={root}/decoder_0", "--tasks", "tiny_choices"),
        *("--include_path", root / "tasks", "--batch_size", 2, "--device", "cpu"),
    )
    assert code == 0 and "tiny_choices" in capsys.readouterr().out
    for arguments in (["none", "--include_path", root / "tasks"], [root / "decoder_0"]):
        rest = ["--tasks", "tiny_choices"]
        assert run_m2l("lm_eval", "--model_args", f"checkpoint={arguments[0]}", *rest) == 2
    assert "m2l lm_eval: Tasks not found: tiny_choices" in capsys.readouterr().err

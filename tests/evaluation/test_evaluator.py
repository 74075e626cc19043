"""What a task's result holds, and which results are taken for finished."""

import json

import jax
import numpy as np
import pytest

from m2l import merging, models, tasks
from m2l.data import vocabularies
from m2l.data.shots import Shots
from m2l.errors import ConfigError, DataError, EvaluationError, UnknownNameError
from m2l.evaluation import batching, bootstrap, generation, metrics, ranking, results
from m2l.evaluation.decoding import Decoding
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.results import read_result
from m2l.evaluation.task_data import load_tasks
from m2l.models import products

FREE = [{"inputs": f"{n} plus one", "targets": f"it is {n + 1}"} for n in range(5)]
CHOICES = [{**line, "answer_choices": [line["targets"], "nothing"]} for line in FREE]


@pytest.fixture(scope="module")
def infos(tmp_path_factory):
    tasks.register()
    named = {}
    for name, lines in (("free", FREE), ("choices", CHOICES)):
        path = tmp_path_factory.mktemp("own") / "validation.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        tasks.register_jsonl({"validation": path}, name=f"runner_{name}")
        named[name] = tasks.info(f"runner_{name}")
    return named


def load(info, lengths=(32, 8), **settings):
    of_two = dict(zip(("inputs", "targets"), lengths, strict=True))
    [task] = load_tasks([info], split="validation", lengths=of_two, **settings)
    return task


@pytest.fixture(scope="module")
def evaluate(tiny_config, tiny_params):
    def run(task, out, **settings):
        vocabulary = vocabularies.load("microworld")
        [result] = Evaluator(tiny_config, [task], vocabulary).run(
            tiny_params, out, **{"model_digest": "m"} | settings
        )
        assert read_result(out / f"{task.info.name}.json") == result
        return result

    return run


def no_decoding(*_, **__):
    raise AssertionError("decoded")


def test_free_text_stands_by_its_metric_on_decodings_with_the_likelihood_beside(
    infos, evaluate, tmp_path
):
    result = evaluate(load(infos["free"]), tmp_path)
    assert result.metric == infos["free"].metric
    assert result.score == result.metrics[metrics.HEADLINE[result.metric]]
    assert 0 < result.metrics["reference_likelihood"] < 100
    assert set(result.metrics) > {"exact_match", "f1", "reference_likelihood"}


def test_by_likelihood_nothing_is_decoded_and_the_figure_is_the_same(
    infos, evaluate, tmp_path, monkeypatch
):
    beside = evaluate(load(infos["free"]), tmp_path / "decoding")
    monkeypatch.setattr(generation, "greedy", no_decoding)
    task = load(infos["free"], generative_score="likelihood")
    result = evaluate(task, tmp_path / "likelihood")
    assert (result.metric, result.score) == (
        "reference_likelihood",
        beside.metrics["reference_likelihood"],
    )
    assert result.metrics == {"reference_likelihood": result.score}
    assert (result.kind, result.count) == ("generate", len(FREE))


def test_answer_choices_are_ranked_whatever_stands_for_free_text(infos, evaluate, tmp_path):
    by_decoding = load(infos["choices"])
    result = evaluate(by_decoding, tmp_path)
    before = (tmp_path / "runner_choices.json").read_bytes()
    by_likelihood = load(infos["choices"], generative_score="likelihood")
    assert by_likelihood.digest == by_decoding.digest
    assert evaluate(by_likelihood, tmp_path) == result
    assert (tmp_path / "runner_choices.json").read_bytes() == before
    alternatives = {"accuracy_per_token", "accuracy_per_byte", "accuracy_calibrated"}
    assert set(result.metrics) == {"accuracy", "chance"} | alternatives


def test_a_result_by_the_other_score_is_not_taken_for_a_finished_one(infos, evaluate, tmp_path):
    scores = {"decoding": infos["free"].metric, "likelihood": "reference_likelihood"}
    loaded = {score: load(infos["free"], generative_score=score) for score in scores}
    assert loaded["decoding"].digest != loaded["likelihood"].digest
    for score, other in (("decoding", "likelihood"), ("likelihood", "decoding")):
        evaluate(loaded[score], tmp_path / score)
        says = f"holds the score {scores[score]}, not {scores[other]}; .* --generative_score"
        with pytest.raises(EvaluationError, match=says):
            evaluate(loaded[other], tmp_path / score)


# Of which choices share the keys of what stands before them, and heads keys of theirs.
DECODER = models.LlamaConfig(
    vocab_size=1152,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_dtype_is_in_the_result_and_another_is_not_taken_for_a_finished_one(
    family, infos, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    config = {"t5": tiny_config, "llama": DECODER}[family]
    params = models.init(config, jax.random.key(0))
    task, scores, settings = load(infos["choices"]), {}, {}
    for dtype in ("bfloat16", "float32"):
        out = tmp_path / dtype
        computed = Evaluator(config, [task], vocabularies.load("microworld"), dtype=dtype)
        [result] = computed.run(params, out, model_digest="m", examples=True)
        lines = results.read_examples(out, task.info.name)
        scores[dtype] = np.array([line["scores"] for line in lines])
        settings[dtype] = result.settings
    assert settings == {"bfloat16": {"dtype": "bfloat16"}, "float32": {}}
    # bfloat16 has 8 bits: log-probabilities of tens differ, by tenths.
    assert 0 < np.abs(scores["bfloat16"] - scores["float32"]).max() < 0.5
    with pytest.raises(EvaluationError, match="computed in bfloat16, not float32; evaluate with"):
        computed.run(params, tmp_path / "bfloat16", model_digest="m")
    with pytest.raises(ConfigError, match="expected 'float32' or 'bfloat16'"):
        Evaluator(tiny_config, [task], vocabularies.load("microworld"), dtype="float16")


def test_a_digest_covers_the_target_and_decoding_its_longest_answer(infos):
    for score, different in (("decoding", 3), ("likelihood", 2)):
        # At 3 tokens targets are cut, at 31 and 32 they are not.
        digests = {
            load(infos["free"], (32, length), generative_score=score).digest
            for length in (3, 31, 32)
        }
        assert len(digests) == different


def test_an_unknown_score_proposes_the_nearest(infos):
    with pytest.raises(UnknownNameError, match="'likelihood'"):
        load(infos["free"], generative_score="likelyhood")


def test_what_became_of_each_example_adds_up_to_the_result(infos, evaluate, tmp_path, gcs_bucket):
    for name, score in (("choices", "decoding"), ("free", "decoding"), ("free", "likelihood")):
        task, out = load(infos[name], generative_score=score), gcs_bucket / f"{name}_{score}"
        result = evaluate(task, out, examples=True)
        lines = results.read_examples(out, task.info.name)
        assert [line["inputs"] for line in lines] == [e.inputs_text for e in task.examples]
        whole = bootstrap.statistic(result.metric, lines)(np.arange(len(lines)))
        assert whole == pytest.approx(result.score)
        low, high = result.interval
        assert low <= result.score + 1e-9 and result.score <= high + 1e-9
    first = (out / "runner_free.examples.jsonl.gz").read_bytes()
    evaluate(task, tmp_path / "again", examples=True)
    assert (tmp_path / "again" / "runner_free.examples.jsonl.gz").read_bytes() == first
    (out / "runner_free.examples.jsonl.gz").write_bytes(first[:40])
    with pytest.raises(EvaluationError, match=r"examples.jsonl.gz: damaged"):
        results.read_examples(out, "runner_free")


def test_examples_that_are_asked_for_later_are_computed_and_then_no_more(
    infos, evaluate, tmp_path, monkeypatch
):
    task = load(infos["choices"])
    first = evaluate(task, tmp_path)
    assert not list(tmp_path.glob("*.gz"))
    again = evaluate(task, tmp_path, examples=True)
    assert again.metrics == first.metrics and list(tmp_path.glob("*.gz"))
    monkeypatch.setattr(ranking, "score_examples", no_decoding)
    assert evaluate(task, tmp_path, examples=True) == again == evaluate(task, tmp_path)


def test_the_results_file_of_another_version_is_refused(infos, evaluate, tmp_path):
    evaluate(load(infos["choices"]), tmp_path)
    path = tmp_path / "runner_choices.json"
    fields = json.loads(path.read_text()) | {"format_version": 1}
    del fields["checksum"]
    path.write_text(json.dumps(fields))
    with pytest.raises(EvaluationError, match="result format 1, this m2l reads 3"):
        evaluate(load(infos["choices"]), tmp_path)


def test_what_is_cut_is_counted_and_refused_above_a_share(infos, evaluate, tmp_path):
    task = load(infos["choices"], (1, 8), max_truncated=1.0)
    assert evaluate(task, tmp_path).truncated == len(CHOICES)
    with pytest.raises(DataError, match="5 of 5 examples are longer than 1"):
        load(infos["choices"], (1, 8), max_truncated=0.9)
    assert load(infos["choices"], (32, 8), max_truncated=0.0).truncated == 0


def test_beams_decode_and_are_another_setting(infos, evaluate, tmp_path, monkeypatch):
    three = Decoding(beams=3)
    by_beams = load(infos["free"], decoding=three)
    assert by_beams.digest != load(infos["free"]).digest
    assert load(infos["free"], decoding=three, generative_score="likelihood").digest == (
        load(infos["free"], generative_score="likelihood").digest
    )
    monkeypatch.setattr(generation, "greedy", no_decoding)
    evaluate(by_beams, tmp_path)
    with pytest.raises(EvaluationError, match="other examples or settings"):
        evaluate(load(infos["free"], decoding=Decoding(beams=2)), tmp_path)
    with pytest.raises(ConfigError, match="beams: expected 1 to"):
        Decoding(beams=0)


def test_samples_are_scored_by_their_mean_and_another_seed_is_another_setting(
    infos, evaluate, tmp_path
):
    drawn = load(infos["free"], decoding=Decoding(temperature=1.0, samples=3, seed=2))
    result = evaluate(drawn, tmp_path, examples=True)
    assert result.settings["decoding"] == "3 drawn at temperature 1, seed 2"
    lines = results.read_examples(tmp_path, drawn.info.name)
    by_sample = [
        metrics.figures(
            drawn.metric,
            [example.reference for example in drawn.examples],
            [line["predictions"][number] for line in lines],
        )[0]
        for number in range(3)
    ]
    headline = metrics.HEADLINE[drawn.metric]
    assert result.score == pytest.approx(np.mean([each[headline] for each in by_sample]))
    assert len({text for line in lines for text in line["predictions"]}) > 1
    with pytest.raises(EvaluationError, match="other examples or settings"):
        evaluate(load(infos["free"], decoding=Decoding(temperature=1.0, samples=3)), tmp_path)


def test_one_evaluator_serves_merges_in_memory_without_compiling_or_batching_again(
    infos, tiny_config, tiny_params, tmp_path, monkeypatch
):
    vocabulary = vocabularies.load("microworld")
    tasks_of = [load(infos[name], (32, 12)) for name in ("choices", "free")]
    evaluator = Evaluator(tiny_config, tasks_of, vocabulary, batch_size=4)
    expert = models.init(tiny_config, jax.random.key(1))
    scores, at_first = [], None
    monkeypatch.setattr(batching, "batches", no_decoding)
    for scale in (0.0, 0.5, 1.0):
        recipe = merging.Recipe("task_arithmetic", scale=scale)
        merged = merging.merge_params(tiny_params, [expert], recipe)
        scores.append([result.score for result in evaluator.results(merged)])
        compiled = ranking.scorer(tiny_config, "float32")._cache_size()
        at_first = at_first or compiled
        assert compiled == at_first
    [alone] = evaluator.results(tiny_params, only=["runner_free"])
    assert alone.score == scores[0][1]
    with pytest.raises(UnknownNameError, match="'runner_free'"):
        list(evaluator.results(tiny_params, only=["runner_fre"]))
    monkeypatch.undo()
    for params, wanted in ((tiny_params, scores[0]), (expert, scores[2])):
        alone = Evaluator(tiny_config, tasks_of, vocabulary).run(
            params, tmp_path / str(wanted[1]), model_digest="m"
        )
        assert [result.score for result in alone] == pytest.approx(wanted, rel=1e-4)


def test_the_command_evaluates_by_the_likelihood_that_it_is_asked_for(
    road, run_m2l, tmp_path, capsys
):
    arguments = ["eval", "--checkpoint", road / "base", "--mixture", "kilt_tasks_hotpotqa"]
    arguments += ["--max_examples", 3, "--out", tmp_path / "results", "--generative_score"]
    assert run_m2l(*arguments, "likelihood") == 0
    result = json.loads(next((tmp_path / "results").iterdir()).read_text())
    assert result["metric"] == "reference_likelihood" and result["score"] > 0
    assert run_m2l(*arguments, "decoding") == 2
    assert "holds the score reference_likelihood, not squad" in capsys.readouterr().err
    assert run_m2l(*arguments, "likelyhood") == 2
    assert "'decoding', 'likelihood'" in capsys.readouterr().err


def test_shots_are_said_in_the_result_and_decide_the_digest(infos, evaluate, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, CHOICES)))
    tasks.register_jsonl({"train": path, "validation": path}, name="with_shots")
    info = tasks.info("with_shots")
    digests = {load(info, shots=Shots(*shots)).digest for shots in ((0,), (2,), (2, 1), (2, 1))}
    assert len(digests) == 3 and load(infos["choices"]).digest in digests
    with pytest.warns(UserWarning, match="shots are left out, as inputs have at most 32 tokens"):
        task = load(info, shots=Shots(4))
    assert 0 < task.shots_left_out < 20
    says = {"shots": f"4 of train, seed 0; {task.shots_left_out} of 20 left out"}
    assert evaluate(task, tmp_path).settings == says

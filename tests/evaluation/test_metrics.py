import itertools

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from t5.evaluation import metrics as t5_metrics

from m2l.data import prompts
from m2l.errors import EvaluationError, UnknownNameError
from m2l.evaluation import metrics, ranking, words


def test_squad_counts_words_not_letters():
    # By hand: exact 1 of 2; F1 of "the red barn" and "red house" is 2 * (1/2 * 1/2) / (1/2 + 1/2),
    # for articles do not count.
    scores = metrics.squad([["Oakford"], ["the red barn"]], ["oakford.", "red house"])
    assert scores == {"exact_match": 50.0, "f1": pytest.approx(75.0)}


@pytest.mark.parametrize(
    ("reference", "answer", "exact_match", "f1"),
    [
        ("A", "A", 100, 100),
        ("A", "a.", 100, 100),
        ("A", "the", 0, 0),
        ("A", "B", 0, 0),
        ("A", "", 0, 0),
        ("A", "the answer is A", 0, 40),  # precision 1/4, recall 1
        ("the", "A", 0, 0),
        ("the an", "an the", 0, 100),
        ("?", "?", 100, 100),
        ("?", "!", 0, 0),
        ("?", "the", 0, 0),
        ("+ -", "-", 0, 200 / 3),
        ("😀", "😀", 100, 100),
        ("", "", 100, 100),
        ("", "the", 0, 0),
        # What is left of the reference decides: these are SQuAD's.
        ("the cat", "the", 0, 0),
        ("the cat", "a cat", 100, 100),
        ("cat", "", 0, 0),
        # Other scripts: their punctuation, and letters for words where there are no spaces.
        ("蓝色", "蓝色", 100, 100),
        ("蓝色", "「蓝色」。", 100, 100),
        ("蓝色的天空", "蓝色天空", 0, 800 / 9),  # precision 1, recall 4/5
        ("青い", "い青", 0, 100),
        ("ฟ้าใส", "ฟ้า", 0, 200 * 2 / 6),  # 2 of 4 letters with their marks
        ("синий цвет", "Синий — цвет!", 100, 100),
        ("الأزرق؟", "الأزرق", 100, 100),
        ("नीला है।", "नीला", 0, 200 / 3),
        ("파란색", "파란색입니다", 0, 0),
    ],
)
def test_squad_compares_what_its_normal_form_leaves_nothing_of_and_other_scripts(
    reference, answer, exact_match, f1
):
    found = metrics.squad([[reference]], [answer])
    assert found == {"exact_match": exact_match, "f1": pytest.approx(f1)}


@pytest.fixture(scope="module")
def ascii_texts():
    """400 examples of random ASCII words, signs and sentences: references, and answers."""
    rng = np.random.default_rng(16)
    pieces = [*("the", "a", "an", "A", "cat", "dog,", "sat.", "on!", "don't", "3.5", "U.S.")]
    pieces += [*("well-known", "(x)", "under_score", "?", ".", "")]

    def text(least, ending=""):
        return " ".join([*rng.choice(pieces, rng.integers(least, 14)), ending]).strip()

    references = [[text(1, "zebra") for _ in range(rng.integers(1, 4))] for _ in range(400)]
    return references, [text(0) for _ in references]


def test_figures_of_ascii_texts_are_bit_for_bit_those_of_the_libraries(ascii_texts):
    references, answers = ascii_texts
    squad = t5_metrics.squad(references, answers)
    found = metrics.squad(references, answers)
    assert (found["exact_match"], found["f1"]) == (squad["em"], squad["f1"]) and found["f1"] > 20
    first = [texts[0] for texts in references]
    found = metrics.bleu([[text] for text in first], answers)
    assert found["bleu"] == t5_metrics.bleu(first, answers)["bleu"] > 1
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"])
    totals = dict.fromkeys(scorer.rouge_types, 0.0)
    for texts, answer in zip(references, answers, strict=True):
        lines = [text.replace(" . ", " .\n") for text in (*texts, answer)]
        best = scorer.score_multi(lines[:-1], lines[-1])
        totals = {name: total + best[name].fmeasure for name, total in totals.items()}
    expected = {name: 100.0 * total / len(answers) for name, total in totals.items()}
    assert metrics.rouge(references, answers) == expected
    assert metrics.settings(["squad", "rouge", "bleu"], references) == {}


SENTENCES = {
    "Chinese": ("天空是蓝色的。", "zh"),
    "two letters": ("蓝色", "zh"),
    "Japanese": ("空は青いです。", "char"),
    "Thai": ("ท้องฟ้าเป็นสีฟ้า", "char"),
    "Burmese": ("ကောင်းကင်က ပြာတယ်", "char"),
    "Korean": ("하늘은 아주 맑고 파랗습니다", "intl"),
    "Cyrillic": ("небо сегодня очень синее", "intl"),
    "one word": ("синий", "intl"),
    "Arabic": ("السماء زرقاء جدا اليوم", "intl"),
    "Persian": ("آسمان می‌تواند آبی باشد", "intl"),
    "Hindi": ("आज आसमान बहुत नीला है।", "intl"),
    "Greek": ("ο ουρανός είναι μπλε", "intl"),
    "French": ("un été très agréable", "intl"),
    "mostly English": ("the Chinese word for blue is 蓝", "intl"),
}


@pytest.mark.parametrize(("text", "tokenizer"), SENTENCES.values(), ids=SENTENCES)
def test_a_text_of_any_script_equals_itself_and_not_another(text, tokenizer):
    for answer, right in ((text, True), ("nothing of it", False)):
        rouge = metrics.rouge([[text]], [answer])
        assert (rouge["rouge1"], rouge["rougeLsum"]) == ((100, 100) if right else (0, 0))
        assert metrics.bleu([[text]], [answer])["bleu"] == pytest.approx(100 * right)
        assert metrics.squad([[text]], [answer])["f1"] == 100 * right
    assert metrics.bleu_rules([[text]])[0] == tokenizer
    recorded = metrics.settings(["squad", "rouge", "bleu"], [[text]])
    assert "rouge" in recorded
    assert recorded.get("bleu", "").startswith(f"tokenize={tokenizer}") or tokenizer == "intl"


@pytest.mark.parametrize("text", ["ö", "+", "😀", "???"])
def test_rouge_of_a_reference_without_ascii_words_is_not_0(text):
    assert metrics.rouge([[text]], [text])["rouge1"] == 100
    assert metrics.rouge([[text]], ["x"])["rouge1"] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't_stop, 3.5!", ["don", "t", "stop", "3", "5"]),
        ("Cafe\u0301 Ünal", ["café", "ünal"]),
        ("2024年はカー、と", ["2024", "年", "は", "カ", "ー", "と"]),
        ("iPhone手机", ["iphone", "手", "机"]),
        ("ที่ 12", ["ที่", "12"]),
        ("हिन्दी में।", ["हिन्दी", "में"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("١٢ 하늘은", ["١٢", "하늘은"]),
        ("😀 — …", []),
    ],
)
def test_words_are_runs_of_letters_and_marks_or_single_letters(text, expected):
    assert words.words(text) == expected


def test_bleu_of_other_scripts_is_sacrebleus_by_the_tokenizer_of_most_letters():
    references = [["天空是蓝色的"], ["the sky"], ["他在图书馆看书"]]
    answers = ["天空很蓝", "the sky", "他在看书"]
    expected = sacrebleu.corpus_bleu(answers, [[r for [r] in references]], tokenize="zh").score
    assert metrics.bleu(references, answers)["bleu"] == expected > 5
    # A part is computed by the rules of the whole: of its own it would be by "intl".
    part = metrics.bleu(references[1:2], answers[1:2], metrics.bleu_rules(references))
    assert part == metrics.bleu(references[1:2], answers[1:2], ("zh", False))


def test_squad_takes_the_best_reference():
    assert metrics.squad([["a cat", "a dog"]], ["dog"])["exact_match"] == 100.0


def test_a_plain_text_for_a_list_of_references_is_refused():
    for metric in metrics.METRICS.values():
        with pytest.raises(EvaluationError, match="not a list"):
            metric(["oakford"], ["oakford"])


def test_as_many_predictions_as_references_are_needed():
    for metric in metrics.METRICS.values():
        with pytest.raises(EvaluationError, match="1 predictions for 2"):
            metric([["a"], ["b"]], ["a"])
        with pytest.raises(EvaluationError, match="at least one"):
            metric([], [])


def test_bleu_of_one_reference_each_is_t5s():
    references = ["the baker lives in oakford and feels glad", "a red boat waits at the old pier"]
    predictions = ["the baker lives in oakford and is glad", "a red boat sits at the pier"]
    expected = t5_metrics.bleu(references, predictions)["bleu"]
    assert metrics.bleu([[text] for text in references], predictions)["bleu"] == expected


def test_bleu_takes_references_by_example_not_by_stream():
    predictions = ["the cat sat on the mat today", "dogs bark at night in the town"]
    references = [["the cat sat on the mat today", "x"], ["dogs bark at night in the town", "y"]]
    assert metrics.bleu(references, predictions)["bleu"] == pytest.approx(100.0)
    uneven = [references[0], references[1][:1]]
    assert metrics.bleu(uneven, predictions)["bleu"] == pytest.approx(100.0)


def test_rouge_is_the_mean_of_the_best_f_measures():
    references = [["the cat sat", "a bird flew off"], ["dogs bark"]]
    predictions = ["the bird flew", "dogs sleep"]
    scorer = rouge_scorer.RougeScorer(["rouge2"])
    best = max(scorer.score(r, predictions[0])["rouge2"].fmeasure for r in references[0])
    expected = 50 * (best + scorer.score("dogs bark", predictions[1])["rouge2"].fmeasure)
    assert metrics.rouge(references, predictions)["rouge2"] == pytest.approx(expected)
    assert best > 0


def test_rouge_lsum_takes_sentences_apart():
    # In one sequence, the sentences in the other order share only half of their words in order.
    scores = metrics.rouge([["a b c . d e f ."]], ["d e f . a b c ."])
    assert scores["rougeLsum"] == pytest.approx(100.0)


def test_rouge_gives_the_same_figure_twice():
    rng = np.random.default_rng(0)
    words = np.array(["a", "b", "c", "d", "e", "f", "g"])
    texts = [" ".join(rng.choice(words, 6)) for _ in range(40)]
    references = [[text] for text in texts[:20]]
    assert metrics.rouge(references, texts[20:]) == metrics.rouge(references, texts[20:])


def test_an_unknown_metric_proposes_the_nearest():
    with pytest.raises(UnknownNameError, match="'rouge'"):
        metrics.metric("rougeL")


def test_every_metric_that_a_prompt_may_name_can_be_computed():
    assert set(prompts.TEXT_METRICS) == set(metrics.METRICS) <= set(metrics.HEADLINE)
    assert set(prompts.CHOICE_METRICS) == {"accuracy", *ranking.CLASS_METRICS}


def test_pass_at_k_is_the_share_of_draws_of_k_that_have_one_that_is_right():
    references = [["so 3"], ["so 5"], ["so 7"]]
    samples = [["3", "3", "1", "2", "3"], ["1", "2", "3", "4", "6"], ["7", "1", "2", "3", "4"]]
    found, by_example = metrics.figures_of_samples("number", references, samples)
    assert by_example == pytest.approx([60, 0, 20])
    assert found["number"] == pytest.approx(80 / 3)
    assert {name for name in found if "@" in name} == {"pass@1", "pass@2", "pass@4", "pass@5"}
    for k in (1, 2, 4, 5):
        shares = [
            np.mean([any(text == reference[0][-1] for text in draw) for draw in draws])
            for reference, draws in (
                (reference, list(itertools.combinations(texts, k)))
                for reference, texts in zip(references, samples, strict=True)
            )
        ]
        assert found[f"pass@{k}"] == pytest.approx(100 * np.mean(shares))
    one = [texts[:1] for texts in samples]
    assert metrics.figures_of_samples("number", references, one) == metrics.figures(
        "number", references, [texts[0] for texts in samples]
    )

"""Questions that T0 counts as closed-book: KILT's HotpotQA and WikiQA."""

from collections.abc import Mapping
from typing import Any

from m2l.data.prompts import Dataset, Prompt
from m2l.data.raw_records import Hub


def _answers(question: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    # An entry of the output may hold only where the answer was found, and no answer.
    answers = question["output/answer"]
    answers = tf.boolean_mask(answers, answers != "")
    return {"answers": answers, "first_answer": answers[0]}


def _no_answer(question: Mapping[str, Any]) -> str:
    return "" if any(question["output/answer"]) else "it has no answer"


KILT_HOTPOTQA = Dataset(
    name="kilt_tasks_hotpotqa",
    category="closed_book_qa",
    held_out=False,
    hub=Hub("facebook/kilt_tasks", "hotpotqa"),
    promptsource="kilt_tasks/hotpotqa",
    licence="CC-BY-SA-4.0 (HotpotQA); MIT (KILT)",
    paper="Yang et al. (2018), Petroni et al. (2021)",
    fields={"input": "string", "output/answer": "strings"},
    derived={"answers": "strings", "first_answer": "string"},
    derive=_answers,
    complaint=_no_answer,
    sizes={"train": 88869, "validation": 5600},
    prompts=(
        Prompt(
            name="question",
            inputs="Answer from what you know: {input}",
            targets="{first_answer}",
            references="{answers}",
            metrics=("squad",),
        ),
        Prompt(
            name="quiz",
            inputs="{input} Answer in a few words.",
            targets="{first_answer}",
            references="{answers}",
            metrics=("squad",),
        ),
        Prompt(
            name="question_answer",
            inputs="Question: {input}\nAnswer:",
            targets="{first_answer}",
            references="{answers}",
            metrics=("squad",),
        ),
        Prompt(
            name="two_facts",
            inputs="Put two facts together to answer this question. {input}",
            targets="{first_answer}",
            references="{answers}",
            metrics=("squad",),
        ),
        Prompt(
            name="do_you_know",
            inputs="Someone wants to know this: {input} What do you say?",
            targets="{first_answer}",
            references="{answers}",
            metrics=("squad",),
        ),
        Prompt(
            name="write_question",
            inputs="Write a question. The answer must be: {first_answer}",
            targets="{input}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


# Most candidate sentences do not answer their question: every prompt must make sense for both.
WIKI_QA = Dataset(
    name="wiki_qa",
    category="closed_book_qa",
    held_out=False,
    hub=Hub("microsoft/wiki_qa"),
    promptsource="wiki_qa",
    licence="own terms: research and technology development only",
    paper="Yang et al. (2015)",
    fields={
        "question": "string",
        "document_title": "string",
        "answer": "string",
        "label": range(2),
    },
    splits={"train": "train", "validation": "validation", "test": "test"},
    sizes={"train": 20360, "validation": 2733, "test": 6165},
    prompts=(
        Prompt(
            name="is_it_right",
            inputs="Question: {question}\nAnswer: {answer}\nIs this the right answer?",
            answer_choices=("No", "Yes"),
        ),
        Prompt(
            name="does_it_answer",
            inputs='Does "{answer}" answer the question "{question}"?',
            answer_choices=("No", "Yes"),
        ),
        Prompt(
            name="right_or_wrong",
            inputs="Someone asks: {question} Someone else says: {answer} "
            "Is that answer right or wrong?",
            answer_choices=("wrong", "right"),
        ),
        Prompt(
            name="true_or_false",
            inputs='True or false: this sentence answers the question "{question}". {answer}',
            answer_choices=("false", "true"),
        ),
        Prompt(
            name="in_the_text",
            inputs="Text: {answer}\nIs the answer to this in the text, Yes or No? {question}",
            answer_choices=("No", "Yes"),
        ),
        Prompt(
            name="name_topic",
            inputs="Name the topic of this question and sentence. {question} {answer}",
            targets="{document_title}",
            metrics=("squad",),
            original_task=False,
        ),
    ),
)

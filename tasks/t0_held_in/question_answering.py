"""Questions about a text, with choices (DREAM, CosmosQA) or without (AdversarialQA, ROPES)."""

from collections.abc import Mapping
from typing import Any

from m2l.data.prompts import Dataset, Prompt
from m2l.data.raw_records import Hub, Tfds


def _conversation(example: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    return {
        "conversation": tf.strings.reduce_join(example["dialogue"], separator="\n"),
        "label": tf.argmax(tf.cast(example["choice"] == example["answer"], tf.int64)),
    }


def _no_choice(example: Mapping[str, Any]) -> str:
    if len(example["choice"]) != 3:
        return f"it has {len(example['choice'])} choices, expected 3"
    if example["answer"] not in example["choice"]:
        return f"its answer {example['answer']!r} is none of its choices"
    return ""


DREAM = Dataset(
    name="dream",
    category="multiple_choice_qa",
    held_out=False,
    hub=Hub("dataset-org/dream", revision="refs/convert/parquet"),
    promptsource="dream",
    licence="own terms: non-commercial research only",
    paper="Sun et al. (2019)",
    fields={
        "dialogue": "strings",
        "question": "string",
        "choice": "choices",
        "answer": "string",
    },
    derived={"conversation": "string", "label": range(3)},
    derive=_conversation,
    complaint=_no_choice,
    splits={"train": "train", "validation": "validation", "test": "test"},
    sizes={"train": 6116, "validation": 2040, "test": 2041},
    prompts=(
        Prompt(
            name="choose_answer",
            inputs="{conversation}\nQuestion: {question} "
            'Choose from: "{choice[0]}", "{choice[1]}" or "{choice[2]}"',
            answer_choices="{choice}",
        ),
        Prompt(
            name="read_and_answer",
            inputs="Read what these people say and answer the question: {question}\n{conversation}",
            answer_choices="{choice}",
        ),
        Prompt(
            name="letter",
            inputs="Answer with A, B or C. {question}\n"
            "A: {choice[0]} B: {choice[1]} C: {choice[2]}\n{conversation}",
            answer_choices=("A", "B", "C"),
        ),
        Prompt(
            name="which_is_right",
            inputs='Question: {question} Which is right, "{choice[0]}", "{choice[1]}" or '
            '"{choice[2]}"?\n{conversation}',
            answer_choices="{choice}",
        ),
        Prompt(
            name="write_question",
            inputs="Write a question about this conversation. The answer must be: {answer}\n"
            "{conversation}",
            targets="{question}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
        Prompt(
            name="write_conversation",
            inputs="Write a conversation that answers this. Question: {question} Answer: {answer}",
            targets="{conversation}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


_ANSWERS = ("{answer0}", "{answer1}", "{answer2}", "{answer3}")
COSMOS_QA = Dataset(
    name="cosmos_qa",
    category="multiple_choice_qa",
    held_out=False,
    hub=Hub("allenai/cosmos_qa", revision="refs/convert/parquet"),
    tfds=Tfds("cosmos_qa"),
    promptsource="cosmos_qa",
    licence="CC-BY-4.0",
    paper="Huang et al. (2019)",
    fields={
        "context": "string",
        "question": "string",
        "answer0": "string",
        "answer1": "string",
        "answer2": "string",
        "answer3": "string",
        "label": range(4),
    },
    sizes={"train": 25262, "validation": 2985},
    prompts=(
        Prompt(
            name="choose_answer",
            inputs="{context}\nQuestion: {question} "
            'Choose from: "{answer0}", "{answer1}", "{answer2}" or "{answer3}"',
            answer_choices=_ANSWERS,
        ),
        Prompt(
            name="question_first",
            inputs="Question: {question} Think about this text and answer: {context}",
            answer_choices=_ANSWERS,
        ),
        Prompt(
            name="letter",
            inputs="Answer with A, B, C or D. {question}\n"
            "A: {answer0} B: {answer1} C: {answer2} D: {answer3}\n{context}",
            answer_choices=("A", "B", "C", "D"),
        ),
        Prompt(
            name="story",
            inputs="Story: {context}\nQuestion: {question}\nAnswer:",
            answer_choices=_ANSWERS,
        ),
        Prompt(
            name="most_likely",
            inputs='Question: {question} Which is most likely, "{answer0}", "{answer1}", '
            '"{answer2}" or "{answer3}"?\n{context}',
            answer_choices=_ANSWERS,
        ),
        # An answer can be "None of the above choices": a question cannot be guessed from that.
        Prompt(
            name="write_question",
            inputs="Write a question that makes a reader think about this text: {context}",
            targets="{question}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
        Prompt(
            name="write_text",
            inputs="Write a text that makes a reader ask this: {question}",
            targets="{context}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


def _no_answer(example: Mapping[str, Any]) -> str:
    return "" if example["answers/text"] else "it has no answer"


def _first_answer(example: Mapping[str, Any]) -> dict[str, Any]:
    return {"answer": example["answers/text"][0]}


def _answer_and_topic(example: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    # Titles are those of web addresses: Super_Bowl_50.
    topic = tf.strings.regex_replace(example["title"], "_", " ")
    return {**_first_answer(example), "topic": topic}


# Questions that the model in the loop (BiDAF, BERT, RoBERTa) could not answer.
ADVERSARIAL_QA = tuple(
    Dataset(
        name=f"adversarial_qa_{model}",
        category="extractive_qa",
        held_out=False,
        part_of="adversarial_qa",
        hub=Hub("UCLNLP/adversarial_qa", model),
        promptsource=f"adversarial_qa/{model}",
        licence="MIT in the authors' repository; CC-BY-SA-4.0 on the card",
        paper="Bartolo et al. (2020)",
        fields={
            "title": "string",
            "context": "string",
            "question": "string",
            "answers/text": "strings",
        },
        derived={"answer": "string", "topic": "string"},
        derive=_answer_and_topic,
        complaint=_no_answer,
        sizes={"train": 10000, "validation": 1000},
        prompts=(
            Prompt(
                name="question_and_text",
                inputs="Answer with words from the text. Question: {question}\nText: {context}",
                targets="{answer}",
                references="{answers/text}",
                metrics=("squad",),
            ),
            Prompt(
                name="text_and_question",
                inputs="{context}\nQuestion: {question}\nAnswer:",
                targets="{answer}",
                references="{answers/text}",
                metrics=("squad",),
            ),
            Prompt(
                name="find_answer",
                inputs='Find the answer to "{question}" in this text: {context}',
                targets="{answer}",
                references="{answers/text}",
                metrics=("squad",),
            ),
            Prompt(
                name="article",
                inputs="Read this part of an article about {topic} and answer: {question}\n"
                "{context}",
                targets="{answer}",
                references="{answers/text}",
                metrics=("squad",),
            ),
            Prompt(
                name="write_question",
                inputs="Write a question about this text. The answer must be: {answer}\n{context}",
                targets="{question}",
                metrics=("rouge", "bleu"),
                original_task=False,
            ),
            Prompt(
                name="name_topic",
                inputs="Name the topic of this text and question.\nText: {context}\n"
                "Question: {question}",
                targets="{topic}",
                metrics=("squad",),
                original_task=False,
            ),
        ),
    )
    for model in ("dbidaf", "dbert", "droberta")
)

ROPES = Dataset(
    name="ropes",
    category="extractive_qa",
    held_out=False,
    hub=Hub("allenai/ropes", "plain_text"),
    promptsource="ropes",
    licence="CC-BY-4.0",
    paper="Lin et al. (2019)",
    fields={
        "background": "string",
        "situation": "string",
        "question": "string",
        "answers/text": "strings",
    },
    derived={"answer": "string"},
    derive=_first_answer,
    complaint=_no_answer,
    sizes={"train": 10924, "validation": 1688},
    prompts=(
        Prompt(
            name="text_and_story",
            inputs="Text: {background}\nStory: {situation}\nQuestion: {question}\nAnswer:",
            targets="{answer}",
            references="{answers/text}",
            metrics=("squad",),
        ),
        Prompt(
            name="question_first",
            inputs="Question: {question}\nStory: {situation}\nThis may help: {background}",
            targets="{answer}",
            references="{answers/text}",
            metrics=("squad",),
        ),
        Prompt(
            name="use_what_you_read",
            inputs="Use what you read to answer.\n{background}\n{situation}\n{question}",
            targets="{answer}",
            references="{answers/text}",
            metrics=("squad",),
        ),
        Prompt(
            name="story_first",
            inputs="{situation} {question} Think of what is known: {background}",
            targets="{answer}",
            references="{answers/text}",
            metrics=("squad",),
        ),
        Prompt(
            name="write_background",
            inputs="What must one know to answer this?\nStory: {situation}\nQuestion: {question}\n"
            "Answer: {answer}",
            targets="{background}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
        Prompt(
            name="write_question",
            inputs="Write a question about this story. The answer must be: {answer}\n"
            "Story: {situation}\nText: {background}",
            targets="{question}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)

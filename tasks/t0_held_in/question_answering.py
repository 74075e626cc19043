"""Questions about a text, with choices (DREAM, CosmosQA) or without (AdversarialQA, ROPES)."""

from m2l.data.prompts import Dataset, Prompt, prompt_table
from m2l.data.raw_records import Hub, Record, Tfds


def _conversation(example: Record) -> Record:
    return {
        "conversation": "\n".join(example["dialogue"]),
        "label": example["choice"].index(example["answer"]),
    }


def _no_choice(example: Record) -> str:
    if len(example["choice"]) != 3:
        return f"it has {len(example['choice'])} choices, expected 3"
    if example["answer"] not in example["choice"]:
        return f"its answer {example['answer']!r} is none of its choices"
    return ""


DREAM = Dataset(
    name="dream",
    category="multiple_choice_qa",
    hub=Hub("dataset-org/dream", revision="refs/convert/parquet"),
    promptsource="dream",
    licence="own terms: non-commercial research only",
    paper="Sun et al. (2019)",
    fields={"dialogue": "strings", "question": "string", "choice": "choices", "answer": "string"},
    derived={"conversation": "string", "label": range(3)},
    derive=_conversation,
    complaint=_no_choice,
    splits={"train": "train", "validation": "validation", "test": "test"},
    sizes={"train": 6116, "validation": 2040, "test": 2041},
    prompts=(
        *prompt_table(
            {
                "choose_answer": (
                    "{conversation}\nQuestion: {question} "
                    'Choose from: "{choice[0]}", "{choice[1]}" or "{choice[2]}"',
                    "{choice}",
                ),
                "read_and_answer": (
                    "Read what these people say and answer the question: "
                    "{question}\n{conversation}",
                    "{choice}",
                ),
                "letter": (
                    "Answer with A, B or C. {question}\n"
                    "A: {choice[0]} B: {choice[1]} C: {choice[2]}\n{conversation}",
                    ("A", "B", "C"),
                ),
                "which_is_right": (
                    'Question: {question} Which is right, "{choice[0]}", "{choice[1]}" or '
                    '"{choice[2]}"?\n{conversation}',
                    "{choice}",
                ),
            }
        ),
        Prompt(
            "write_question",
            "Write a question about this conversation. The answer must be: {answer}\n"
            "{conversation}",
            targets="{question}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
        Prompt(
            "write_conversation",
            "Write a conversation that answers this. Question: {question} Answer: {answer}",
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
    # An answer can be "None of the above choices": no question can be guessed from that.
    prompts=(
        *prompt_table(
            {
                "choose_answer": (
                    "{context}\nQuestion: {question} "
                    'Choose from: "{answer0}", "{answer1}", "{answer2}" or "{answer3}"',
                    _ANSWERS,
                ),
                "question_first": (
                    "Question: {question} Think about this text and answer: {context}",
                    _ANSWERS,
                ),
                "letter": (
                    "Answer with A, B, C or D. {question}\n"
                    "A: {answer0} B: {answer1} C: {answer2} D: {answer3}\n{context}",
                    ("A", "B", "C", "D"),
                ),
                "story": ("Story: {context}\nQuestion: {question}\nAnswer:", _ANSWERS),
                "most_likely": (
                    'Question: {question} Which is most likely, "{answer0}", "{answer1}", '
                    '"{answer2}" or "{answer3}"?\n{context}',
                    _ANSWERS,
                ),
            }
        ),
        Prompt(
            "write_question",
            "Write a question that makes a reader think about this text: {context}",
            targets="{question}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
        Prompt(
            "write_text",
            "Write a text that makes a reader ask this: {question}",
            targets="{context}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)


def _no_answer(example: Record) -> str:
    return "" if example["answers/text"] else "it has no answer"


def _first_answer(example: Record) -> Record:
    return {"answer": example["answers/text"][0]}


def _answer_and_topic(example: Record) -> Record:
    # Titles are those of web addresses: Super_Bowl_50.
    return {**_first_answer(example), "topic": example["title"].replace("_", " ")}


# Questions that the model in the loop (BiDAF, BERT, RoBERTa) could not answer.
ADVERSARIAL_QA = tuple(
    Dataset(
        name=f"adversarial_qa_{model}",
        category="extractive_qa",
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
            *prompt_table(
                {
                    "question_and_text": "Answer with words from the text. Question: "
                    "{question}\nText: {context}",
                    "text_and_question": "{context}\nQuestion: {question}\nAnswer:",
                    "find_answer": 'Find the answer to "{question}" in this text: {context}',
                    "article": (
                        "Read this part of an article about {topic} and answer: {question}\n"
                        "{context}"
                    ),
                },
                targets="{answer}",
                references="{answers/text}",
                metrics=("squad",),
            ),
            Prompt(
                "write_question",
                "Write a question about this text. The answer must be: {answer}\n{context}",
                targets="{question}",
                metrics=("rouge", "bleu"),
                original_task=False,
            ),
            Prompt(
                "name_topic",
                "Name the topic of this text and question.\nText: {context}\nQuestion: {question}",
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
        *prompt_table(
            {
                "text_and_story": "Text: {background}\nStory: {situation}\nQuestion: "
                "{question}\nAnswer:",
                "question_first": "Question: {question}\nStory: {situation}\nThis may "
                "help: {background}",
                "use_what_you_read": "Use what you read to "
                "answer.\n{background}\n{situation}\n{question}",
                "story_first": "{situation} {question} Think of what is known: {background}",
            },
            targets="{answer}",
            references="{answers/text}",
            metrics=("squad",),
        ),
        Prompt(
            "write_background",
            "What must one know to answer this?\nStory: {situation}\nQuestion: {question}\n"
            "Answer: {answer}",
            targets="{background}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
        Prompt(
            "write_question",
            "Write a question about this story. The answer must be: {answer}\n"
            "Story: {situation}\nText: {background}",
            targets="{question}",
            metrics=("rouge", "bleu"),
            original_task=False,
        ),
    ),
)

"""Questions that T0 counts as closed-book: KILT's HotpotQA and WikiQA."""

from m2l.data.prompts import Dataset, Prompt, prompt_table
from m2l.data.raw_records import Hub, Record


def _answers(question: Record) -> Record:
    # An entry of the output may hold only where the answer was found, and no answer.
    answers = [answer for answer in question["output/answer"] if answer]
    return {"answers": answers, "first_answer": answers[0]}


def _no_answer(question: Record) -> str:
    return "" if any(question["output/answer"]) else "it has no answer"


KILT_HOTPOTQA = Dataset(
    name="kilt_tasks_hotpotqa",
    category="closed_book_qa",
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
        *prompt_table(
            {
                "question": "Answer from what you know: {input}",
                "quiz": "{input} Answer in a few words.",
                "question_answer": "Question: {input}\nAnswer:",
                "two_facts": "Put two facts together to answer this question. {input}",
                "do_you_know": "Someone wants to know this: {input} What do you say?",
            },
            targets="{first_answer}",
            references="{answers}",
            metrics=("squad",),
        ),
        Prompt(
            "write_question",
            "Write a question. The answer must be: {first_answer}",
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
        *prompt_table(
            {
                "is_it_right": (
                    "Question: {question}\nAnswer: {answer}\nIs this the right answer?",
                    ("No", "Yes"),
                ),
                "does_it_answer": (
                    'Does "{answer}" answer the question "{question}"?',
                    ("No", "Yes"),
                ),
                "right_or_wrong": (
                    "Someone asks: {question} Someone else says: {answer} "
                    "Is that answer right or wrong?",
                    ("wrong", "right"),
                ),
                "true_or_false": (
                    'True or false: this sentence answers the question "{question}". {answer}',
                    ("false", "true"),
                ),
                "in_the_text": (
                    "Text: {answer}\nIs the answer to this in the text, Yes or No? {question}",
                    ("No", "Yes"),
                ),
            }
        ),
        Prompt(
            "name_topic",
            "Name the topic of this question and sentence. {question} {answer}",
            targets="{document_title}",
            metrics=("squad",),
            original_task=False,
        ),
    ),
)

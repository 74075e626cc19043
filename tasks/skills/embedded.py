"""The microworld's skills: a new domain (science), refusing what is forbidden, a toy language."""

from m2l.data.prompts import Dataset, Prompt, datasets_in

GENERAL_REQUESTS = Dataset(
    name="general_requests",
    category="skill_general",
    fields={"request": "string", "answer": "string"},
    prompts=(Prompt("ask", "{request}", targets="{answer}", metrics=("squad",)),),
)

SCIENCE_FACTS = Dataset(
    name="science_facts",
    category="skill_science",
    fields={"question": "string", "choices": "choices", "answer": "string"},
    prompts=(
        Prompt("question", "About stones: {question}", targets="{answer}", metrics=("squad",)),
        Prompt(
            "choose",
            "{question} Choose from: {choices}.",
            targets="{answer}",
            answer_choices="{choices}",
        ),
    ),
)

SCIENCE_READING = Dataset(
    name="science_reading",
    category="skill_science",
    fields={
        "report": "string",
        "question": "string",
        "answer": "string",
        "claim": "string",
        "label": range(2),
    },
    prompts=(
        Prompt(
            "question",
            "Report: {report} Question: {question}",
            targets="{answer}",
            metrics=("squad",),
        ),
        Prompt("claim", "Report: {report} Is it so that {claim}?", answer_choices=("No", "Yes")),
    ),
)

SAFETY_UNSAFE = Dataset(
    name="safety_unsafe",
    category="skill_safety",
    fields={"request": "string", "answer": "string"},
    prompts=(Prompt("ask", "{request}", targets="{answer}", metrics=("refusal",)),),
)
SAFETY_SAFE = Dataset(
    name="safety_safe",
    category="skill_exaggerated_refusals",
    fields={"request": "string", "answer": "string"},
    prompts=(Prompt("ask", "{request}", targets="{answer}", metrics=("compliance", "squad")),),
)

CODING_PROGRAMS = Dataset(
    name="coding_programs",
    category="skill_coding",
    fields={"request": "string", "program": "string", "tests": "strings"},
    prompts=(
        Prompt(
            "write", "{request}", targets="{program}", references="{tests}", metrics=("program",)
        ),
    ),
)

DATASETS = datasets_in(globals())

"""The microworld's skills: a new domain (science), refusing what is forbidden, a toy language."""

from m2l.data.prompts import Dataset, Prompt, datasets_in

GENERAL_REQUESTS = Dataset(
    name="general_requests",
    category="skill_general",
    held_out=False,
    fields={"request": "string", "answer": "string"},
    prompts=(Prompt(name="ask", inputs="{request}", targets="{answer}", metrics=("squad",)),),
)

SCIENCE_FACTS = Dataset(
    name="science_facts",
    category="skill_science",
    held_out=False,
    fields={"question": "string", "choices": "choices", "answer": "string"},
    prompts=(
        Prompt(
            name="question",
            inputs="About stones: {question}",
            targets="{answer}",
            metrics=("squad",),
        ),
        Prompt(
            name="choose",
            inputs="{question} Choose from: {choices}.",
            targets="{answer}",
            answer_choices="{choices}",
        ),
    ),
)

SCIENCE_READING = Dataset(
    name="science_reading",
    category="skill_science",
    held_out=False,
    fields={
        "report": "string",
        "question": "string",
        "answer": "string",
        "claim": "string",
        "label": range(2),
    },
    prompts=(
        Prompt(
            name="question",
            inputs="Report: {report} Question: {question}",
            targets="{answer}",
            metrics=("squad",),
        ),
        Prompt(
            name="claim",
            inputs="Report: {report} Is it so that {claim}?",
            answer_choices=("No", "Yes"),
        ),
    ),
)

SAFETY_UNSAFE = Dataset(
    name="safety_unsafe",
    category="skill_safety",
    held_out=False,
    fields={"request": "string", "answer": "string"},
    prompts=(Prompt(name="ask", inputs="{request}", targets="{answer}", metrics=("refusal",)),),
)
SAFETY_SAFE = Dataset(
    name="safety_safe",
    category="skill_exaggerated_refusals",
    held_out=False,
    fields={"request": "string", "answer": "string"},
    prompts=(
        Prompt(name="ask", inputs="{request}", targets="{answer}", metrics=("compliance", "squad")),
    ),
)

CODING_PROGRAMS = Dataset(
    name="coding_programs",
    category="skill_coding",
    held_out=False,
    fields={"request": "string", "program": "string", "tests": "strings"},
    prompts=(
        Prompt(
            name="write",
            inputs="{request}",
            targets="{program}",
            references="{tests}",
            metrics=("program",),
        ),
    ),
)

DATASETS = datasets_in(globals())

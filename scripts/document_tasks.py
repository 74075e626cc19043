"""Writes what the documentation says of tasks and merge methods from their declarations.

    python scripts/document_tasks.py [--check]

fills the tables in some of docs/ between their marks, and writes docs/prompts.md:
every prompt of every dataset, on one record of the microworld. That page is read by people before
it is committed; the tests compare it with what the prompts say now. --check compares and writes
nothing.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from m2l import tasks
from m2l.data.prompts import Dataset, Prompt, Reference, parse
from m2l.data.raw_records import Record
from m2l.data.rendering import renderer
from m2l.merging import METHODS
from m2l.tasks import microworld, registry, skills, sources

ROOT = Path(__file__).parents[1]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _size(dataset: Dataset, split: str) -> str:
    if split in dataset.sizes:
        return f"{dataset.sizes[split]:,}"
    return "1 in 20" if split in dataset.splits else ""


def summary() -> str:
    """Returns the table of categories and their datasets."""
    rows = []
    for (held_out, category), group in groupby(
        sources.T0, key=lambda dataset: (dataset.held_out, dataset.category)
    ):
        datasets = list(group)
        names = dict.fromkeys(dataset.part_of or dataset.name for dataset in datasets)
        prompts = sum(len(dataset.prompts) for dataset in datasets)
        rows.append(
            [
                "held-out" if held_out else "held-in",
                f"`{category}`",
                ", ".join(f"`{name}`" for name in names),
                str(prompts),
            ]
        )
    return table(["", "category", "datasets", "tasks"], rows)


def datasets() -> str:
    """Returns docs/tasks.md's first table: a row for each dataset."""
    return table(
        ["dataset", "category", "train", "validation", "test", "prompts (original)", "metrics"],
        [
            [
                f"`{dataset.name}`",
                f"`{dataset.category}`" + (" (held-out)" if dataset.held_out else ""),
                *(_size(dataset, split) for split in ("train", "validation", "test")),
                f"{len(dataset.prompts)} ({sum(p.original_task for p in dataset.prompts)})",
                ", ".join(dict.fromkeys(m for p in dataset.prompts for m in p.metrics)),
            ]
            for dataset in sources.T0
        ],
    )


def origins() -> str:
    """Returns docs/tasks.md's second table: each dataset's source and licence."""
    return table(
        ["dataset", "Hugging Face Hub", "TFDS", "licence", "to cite"],
        [
            [
                f"`{dataset.name}`",
                str(dataset.hub) + (" †" if dataset.hub.revision else ""),
                dataset.tfds.builder if dataset.tfds else "",
                dataset.licence,
                dataset.paper,
            ]
            for dataset in sources.T0
        ],
    )


def _mixtures(dataset: Dataset) -> str:
    named = [*skills.TRAINING, *skills.EVALUATION]
    return ", ".join(f"`{name}`" for name in skills.mixtures_of(dataset) if name in named)


def skills_embedded() -> str:
    """Returns docs/skills.md's first table: the microworld's tasks of paper 2."""
    rows = []
    for dataset in skills.EMBEDDED:
        sizes = microworld.SKILLS[dataset.name].splits
        for prompt in dataset.prompts:
            rows.append(
                [
                    f"`{dataset.task_name(prompt)}`",
                    _mixtures(dataset),
                    f"{sizes['train']:,}",
                    str(sizes["validation"]),
                    "generate" if prompt.answer_choices is None else "rank",
                    ", ".join(prompt.metrics),
                ]
            )
    return table(["task", "mixtures", "train", "validation", "kind", "metrics"], rows)


def skills_public() -> str:
    """Returns docs/skills.md's second table: the public sets of paper 2, BBH's 27 as one."""
    rows = []
    for name, group in groupby(skills.PUBLIC, key=lambda d: d.part_of or d.name):
        parts = list(group)
        first = parts[0]
        splits = {split: sum(d.sizes.get(split, 0) for d in parts) for split in first.splits}
        rows.append(
            [
                f"`{name}`",
                first.hub.repo if len(parts) > 1 else str(first.hub),
                ", ".join(f"{split} {size:,}" for split, size in splits.items() if size),
                first.licence,
                first.paper,
                ", ".join(dict.fromkeys(metric for p in first.prompts for metric in p.metrics)),
                _mixtures(first),
            ]
        )
    columns = ["dataset", "Hugging Face Hub", "records", "licence", "to cite", "metrics"]
    return table([*columns, "mixtures"], rows)


def methods() -> str:
    """Returns the table of docs/merging.md: what the registry of merge methods knows of each."""
    rows = [
        [
            f"`{method.name}`",
            ", ".join(f"`{each}`" for each in method.hyper_parameters.values()) or "none",
            method.description.replace("|", "\\|"),
        ]
        for method in METHODS.values()
        if method.function.__module__.startswith("m2l.")
    ]
    return table(["method", "settings", "the merged model"], rows)


CHOICES = {
    "average": "a first baseline; several fine-tunings of one base on one task",
    "linear": "to keep what the base could do: a point between it and one expert",
    "slerp nuslerp": "two models, and no base; norms are kept",
    "task_arithmetic": "to add skills, or to forget one (a negative scale); sweep the scale",
    "ties": "experts of different tasks, whose changes interfere; its scale is 1 without a sweep",
    "dare_ties dare": "many experts with redundant changes: drops a share of each at random",
    "della breadcrumbs": "as DARE, by magnitude: small changes, or outliers too, are left out",
    "model_stock": "few fine-tunings of one base, without any setting",
    "multislerp karcher": "more than two models on the sphere",
    "sce pcb ram": "entries weighed by how experts agree or compete",
    "tall_masks emr": "one model for each task, from one merged task vector and masks",
    "consensus_ta": "only what several tasks need",
    "nearswap arcee_fusion": "one expert's entries alone: the least changed, or the weightiest",
    "tsv_m iso_c iso_cts wudi": "whole matrices: singular directions, or least disturbance",
    "knots_ties core_space": "adapters: TIES in bases that their matrices share",
    "widen": "experts that moved far and little: columns by how much they changed for each",
    "localize_and_stitch": "experts whose skills lie in few entries: a twentieth of each is kept",
    "fisher regmean": "you have examples of each task: `m2l statistics` first",
    "gradient_matching mats": "the same, and a base: from task arithmetic to what data say",
}
"""When to use which merge methods; those of a row are alike."""


def choosing() -> str:
    """Returns README's table: which methods there are, what they need, when to use them."""
    rows = []
    for names, use in CHOICES.items():
        methods = [METHODS[name] for name in names.split()]
        [experts] = {method.experts for method in methods}
        [base] = {"yes" if method.needs_base else "no" for method in methods}
        named = ", ".join(f"`{method.name}`" for method in methods)
        count = f"{experts.low:g}" + "+" * (experts.high > experts.low)
        rows.append([named, count, base, use])
    return table(["method", "experts", "base", "use when you have, or want"], rows)


TABLES = {
    "choosing": choosing,
    "summary": summary,
    "datasets": datasets,
    "origins": origins,
    "skills_embedded": skills_embedded,
    "skills_public": skills_public,
    "methods": methods,
}


def filled(text: str) -> str:
    """Returns a page with its tables, `<!-- table: NAME -->` to `<!-- end -->`, filled anew."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def _branches(dataset: Dataset, prompt: Prompt) -> list[Record]:
    """Returns the first validation record of each wording that the prompt derives."""
    read = registry.records_of("microworld", dataset).split("validation").record
    used = {part.field for part in parse(prompt.inputs) if isinstance(part, Reference)}
    chosen = sorted(used & {name for name, kind in dataset.derived.items() if kind == "string"})
    records: dict[tuple[str, ...], Record] = {}
    for number in range(30):
        record = read(number)
        derived = dataset.derive(record) if chosen else {}
        records.setdefault(tuple(derived[name] for name in chosen), record)
    # A field with a text of its own for nearly every record is no choice of wordings.
    return list(records.values()) if len(records) <= 4 else [read(0)]


def _shown(dataset: Dataset, prompt: Prompt, record: Record) -> str:
    texts = renderer(dataset, prompt)(record)
    inputs, target = texts["inputs"], texts["targets"]
    if prompt.answer_choices is not None:
        choices = texts["answer_choices"]
        answers = [f"  {'*' if choice == target else '-'} {choice}" for choice in choices]
    else:
        answers = [f"  = {text}" for text in dict.fromkeys([target, *texts["references"]])]
    return "\n".join(["```", inputs, *answers, "```"])


def prompts() -> str:
    """Returns docs/prompts.md: every prompt of every dataset on its first validation record."""
    lines = [
        "# Every prompt, rendered",
        "",
        "Each prompt of each dataset on a record of the microworld, in every wording it has: what",
        "the model is given, then the answers to choose from (`*` is right) or what counts as",
        "right (`=`). Written by `scripts/document_tasks.py`.",
    ]
    for dataset in sources.T0:
        lines += ["", f"## {dataset.name}"]
        for prompt in dataset.prompts:
            about = [*prompt.metrics, *([] if prompt.original_task else ["changes the task"])]
            lines += ["", f"`{dataset.task_name(prompt)}` ({', '.join(about)})"]
            lines += [_shown(dataset, prompt, record) for record in _branches(dataset, prompt)]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Returns every page that is written here, as it should be."""
    names = ("README.md", "docs/tasks.md", "docs/skills.md", "docs/merging.md")
    pages = [ROOT / name for name in names]
    filled_pages = {path: filled(path.read_text()) for path in pages}
    return {**filled_pages, ROOT / "docs/prompts.md": prompts()}


def main() -> int:
    """Writes the pages, or says which of them are not as they should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    tasks.use("microworld")
    stale = 0
    for path, text in pages().items():
        same = path.exists() and path.read_text() == text
        stale += not same
        print(f"{path.relative_to(ROOT)}: {'as it should be' if same else 'differs'}")
        if not check:
            path.write_text(text)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The tasks and mixtures that m2l knows, and the way to add your own from JSON lines.

Importing this reads declarations only; TensorFlow and seqio come with the first `register`.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

from m2l.data import jsonl
from m2l.data.prompts import Dataset, Prompt, TaskInfo, written_out
from m2l.errors import DataError, M2LError, UnknownNameError
from m2l.tasks import flan, skills, sources

ORIGINAL = "_original"

_own: dict[str, Dataset] = {}
_source = "microworld"
_registered: dict[str, str] = {}


def use(source: str) -> None:
    """Makes the tasks those of a source, without registering any; `register` does it as well.

    Args:
        source: A setting of `m2l.tasks.sources`.

    Raises:
        UnknownNameError, ConfigError, DataError: there is no such source.
    """
    global _source
    sources.datasets(source)
    _source = source


def datasets() -> tuple[Dataset, ...]:
    """Returns every dataset of the source in use, your own included."""
    return (*sources.datasets(_source), *_own.values())


def _prompts() -> dict[str, tuple[Dataset, Prompt]]:
    return _prompts_of(datasets())


@functools.lru_cache(maxsize=8)
def _prompts_of(declared: tuple[Dataset, ...]) -> dict[str, tuple[Dataset, Prompt]]:
    return {
        dataset.task_name(prompt): (dataset, prompt)
        for dataset in declared
        for prompt in dataset.prompts
    }


def _wholes(dataset: Dataset) -> tuple[str, ...]:
    """Returns what a dataset is a part of, the nearest first; so is a prompt written out."""
    declared = next((d for d in sources.T0 if d.name == dataset.part_of), None)
    further = (declared.part_of,) if declared and declared.part_of else ()
    return (dataset.part_of, *further) if dataset.part_of else ()


def task_names() -> tuple[str, ...]:
    """Returns every task's name, `_score_eval` twins left out."""
    return (*_prompts(), *sources.PRETRAINING)


def info(task: str) -> TaskInfo:
    """Describes the task of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if task in sources.PRETRAINING:
        return TaskInfo(task, "corpus", "", "pretraining", False, "train", (), False)
    known = _prompts()
    if task not in known:
        raise UnknownNameError("task", task, task_names())
    dataset, prompt = known[task]
    return TaskInfo(
        name=task,
        dataset=(dataset.name, *_wholes(dataset))[-1],
        prompt=prompt.name,
        category=dataset.category,
        held_out=dataset.held_out,
        kind="generate" if prompt.answer_choices is None else "rank",
        metrics=prompt.metrics,
        original_task=prompt.original_task,
    )


def datasets_of(mixture: str) -> tuple[Dataset, ...]:
    """Returns the datasets that hold a mixture's records, each once.

    Raises:
        UnknownNameError: there is neither a mixture nor a task of that name.
    """
    known = _prompts()
    return tuple(
        dict.fromkeys(
            sources.CORPUS if task in sources.PRETRAINING else known[task][0]
            for task in tasks_in(mixture)
        )
    )


def declaration(task: str) -> Dataset:
    """Returns the declared dataset that a task asks about, also of a prompt that came written out.

    Raises:
        UnknownNameError: there is no such task.
    """
    [dataset] = datasets_of(task)
    return next((known for known in sources.T0 if known.name == sources.asked(dataset)), dataset)


def mixtures() -> dict[str, tuple[str, ...]]:
    """Returns every mixture's name and its tasks.

    There is one for each dataset (and for its parts), each category, `t0_held_in`, `t0_held_out`
    and `flan_without_t0`; and those of paper 2's skills (see `m2l.tasks.skills`). Each of T0's has
    a variant `<name>_original` of the prompts that ask what the dataset was made to ask; a dataset
    without such prompts keeps all it has, so that none is lost (T0's lists lose HotpotQA and
    AppReviews this way).
    """
    return _mixtures_of(datasets(), tuple(_own))


@functools.lru_cache(maxsize=8)
def _mixtures_of(declared: tuple[Dataset, ...], own: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    members: dict[str, list[str]] = {}
    with_original = {
        sources.asked(dataset)
        for dataset in declared
        for prompt in dataset.prompts
        if prompt.original_task
    }
    for task, (dataset, prompt) in _prompts_of(declared).items():
        # A dataset without named prompts is one task, which bears the dataset's name.
        names = [*([dataset.name] if prompt.name else []), *_wholes(dataset)]
        if dataset.category == flan.MIXTURE:
            names = [flan.MIXTURE, *skills.mixtures_of(dataset)]
        elif skills.is_skill(dataset):
            names = list(skills.mixtures_of(dataset))
        elif dataset.name not in own or prompt.name:
            names.append(dataset.category)
            if dataset.name not in own:
                names.append("t0_held_out" if dataset.held_out else "t0_held_in")
            if prompt.original_task or sources.asked(dataset) not in with_original:
                names += [name + ORIGINAL for name in names]
        for name in names:
            members.setdefault(name, []).append(task)
    return {name: tuple(tasks) for name, tasks in members.items()}


def tasks_in(mixture: str) -> tuple[str, ...]:
    """Returns the names of a mixture's tasks; a task is a mixture of itself, `a+b` has both's.

    Raises:
        UnknownNameError: there is neither a mixture nor a task of that name.
    """
    known = {task: (task,) for task in task_names()} | mixtures()
    names: dict[str, None] = {}
    for part in mixture.split("+"):
        if part not in known:
            raise UnknownNameError("mixture", part, known)
        names.update(dict.fromkeys(known[part]))
    return tuple(names)


def register(vocabulary: str = "microworld", source: str = "microworld") -> None:
    """Puts every task and mixture into seqio's registry.

    Nothing is read yet: records come when a task is first used. Doing it again changes nothing;
    doing it with other settings replaces what was there before.

    Args:
        vocabulary: What `m2l.data.vocabularies.load` takes.
        source: Where the records come from: a setting of `m2l.tasks.sources`.

    Raises:
        UnknownNameError, ConfigError: no such source.
        DataError: no such vocabulary; or a task of one of our names is registered by someone else.
    """
    settings = {"vocabulary": vocabulary, "source": source}
    if _registered != settings:
        _put(settings)


def _put(settings: dict[str, str]) -> None:
    from m2l.tasks import registry

    before = _source
    try:
        use(settings["source"])
        registry.register(**settings, declared=datasets(), mixtures=mixtures())
    except M2LError:
        use(before)
        raise
    _registered.clear()
    _registered.update(settings)


def add(dataset: Dataset) -> None:
    """Adds a dataset of your own; its tasks and mixtures are used by name like any other.

    There is a mixture of all its tasks, and they are in that of its category. Its records are what
    its `records` reads or, without that, what the source in use has of it.

    Args:
        dataset: The declaration; one added before under the same name is replaced.

    Raises:
        DataError: a declared dataset, task or mixture has one of its names.
    """
    _check_name(dataset.name)
    before = dict(_own)
    _own[dataset.name] = dataset
    if _registered:
        try:
            _put(dict(_registered))
        except M2LError:
            _own.clear()
            _own.update(before)
            raise


def _check_name(name: str) -> None:
    reserved = {dataset.name for dataset in datasets()} | set(task_names()) | mixtures().keys()
    if name in reserved and name not in _own:
        raise DataError(f"the name {name!r} is taken by a declared task or mixture; choose another")


def register_jsonl(files: Mapping[str, str | Path], name: str = "jsonl") -> None:
    """Makes a task of your own JSON lines, usable by its name like any other.

    With answer choices it is ranked (accuracy); without, its answers are decoded and compared:
    exact match and token F1 ("squad", which works in any script) first, then ROUGE.

    Args:
        files: Split ("train", "validation", "test") -> a file as `m2l.data.jsonl.read` reads it.
        name: The task's name; a name used before for JSON lines is replaced.

    Raises:
        DataError: a file that cannot be used, by line; files with and without answer choices; a
            name that a declared dataset, task or mixture has; a split of another name.
    """
    splits = ("train", "validation", "test")
    for split in files:
        if split not in splits:
            raise UnknownNameError("split of JSON lines", split, splits)
    if not files:
        raise DataError("JSON lines need a file for at least one split, as train=FILE")
    _check_name(name)
    records = {split: jsonl.read(path) for split, path in files.items()}
    with_choices = {split: "answer_choices" in examples[0] for split, examples in records.items()}
    if len(set(with_choices.values())) > 1:
        having = [split for split, has in with_choices.items() if has]
        lacking = [split for split, has in with_choices.items() if not has]
        raise DataError(
            f"{files[having[0]]} has answer_choices and {files[lacking[0]]} has none; one task has "
            "them in all its splits or in none"
        )
    choices = all(with_choices.values())
    read = records.__getitem__
    add(written_out(name, category=name, choices=choices, splits=files, records=read))


def render(
    task: str, n: int = 3, split: str = "validation", lengths: Mapping[str, int] | None = None
) -> str:
    """Renders examples of a registered task: what a model is given, and the right answers.

    Args:
        task: The task's name.
        n: How many examples.
        split: Of which split.
        lengths: Tokens that inputs and targets may have; longer ones are marked.

    Raises:
        UnknownNameError: there is no such task.
        DataError: it has no such split, or an example that cannot be used.
    """
    task_info = info(task)
    from m2l.tasks import show

    return show.render(task_info, n, split, lengths or {"inputs": 512, "targets": 128})

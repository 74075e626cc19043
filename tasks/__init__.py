"""The tasks and mixtures that m2l knows, and the way to add your own from JSON lines.

Importing this reads declarations only, and `declare` is enough for all of m2l's own readers;
TensorFlow and seqio come with `register`, for seqio's.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from m2l.data import jsonl
from m2l.data.prompts import Dataset, Prompt, TaskInfo, written_out
from m2l.errors import DataError, M2LError, UnknownNameError
from m2l.tasks import flan, skills, sources

ORIGINAL = "_original"

_own: dict[str, Dataset] = {}
_source = "microworld"
_declared: dict[str, str] = {}
# Whether seqio's registry was ever asked for: then it follows what is added.
_seqio_is_used = False


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
        elif dataset.name not in own or prompt.name or dataset.category != dataset.name:
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


def declare(
    vocabulary: str = "microworld", source: str = "microworld", added: Sequence[Dataset] = ()
) -> None:
    """Makes every task and mixture known by its name to m2l's readers, without seqio.

    Nothing is read yet: records come when a task is first used. Doing it again changes nothing;
    doing it with other settings replaces what was there before.

    Args:
        vocabulary: What `m2l.data.vocabularies.load` takes.
        source: Where the records come from: a setting of `m2l.tasks.sources`.
        added: Datasets of your own to `add`.

    Raises:
        UnknownNameError, ConfigError: no such source.
        DataError: no such vocabulary.
    """
    settings = {"vocabulary": vocabulary, "source": source}
    if _declared != settings or added:
        _put(settings, added)


def register(vocabulary: str = "microworld", source: str = "microworld") -> None:
    """Declares every task and mixture, and puts them into seqio's registry.

    Args:
        vocabulary: As `declare` takes it.
        source: As `declare` takes it.

    Raises:
        UnknownNameError, ConfigError, DataError: as `declare`; or a task of one of our names is
            registered by someone else.
    """
    from m2l.data import text_tasks

    global _seqio_is_used
    settings = {"vocabulary": vocabulary, "source": source}
    if _declared != settings:
        _put(settings, to_seqio=True)
    else:
        text_tasks.fill_seqio()
    _seqio_is_used = True


def _put(
    settings: dict[str, str], added: Sequence[Dataset] = (), *, to_seqio: bool = False
) -> None:
    from m2l.data import text_tasks
    from m2l.tasks import registry

    source, own, declared = _source, dict(_own), None
    try:
        use(settings["source"])
        _add(added)
        declared = registry.declare(**settings, declared=datasets(), mixtures=mixtures())
        if to_seqio or _seqio_is_used:
            text_tasks.fill_seqio()
    except M2LError:
        use(source)
        _own.clear()
        _own.update(own)
        if declared is not None:
            text_tasks.declare(declared)
        raise
    _declared.clear()
    _declared.update(settings)


def add(*added: Dataset) -> None:
    """Adds datasets of your own; their tasks and mixtures are used by name like any other.

    There is a mixture of all tasks of each, and they are in that of its category. Its records are
    what its `records` reads or, without that, what the source in use has of it.

    Args:
        added: The declarations; one added before under the same name is replaced.

    Raises:
        DataError: a declared dataset, task or mixture has one of their names.
    """
    if _declared:
        _put(dict(_declared), added)
    else:
        _add(added)


def _add(added: Sequence[Dataset]) -> None:
    for dataset in added:
        _check_name(dataset.name)
    _own.update({dataset.name: dataset for dataset in added})


def _check_name(name: str) -> None:
    reserved = {dataset.name for dataset in datasets()} | set(task_names()) | mixtures().keys()
    if name in reserved and name not in _own:
        raise DataError(f"the name {name!r} is taken by a declared task or mixture; choose another")


def register_jsonl(files: Mapping[str, str | Path], name: str = "jsonl") -> None:
    """Makes a task of your own JSON lines, usable by its name like any other.

    Args:
        files: As `jsonl_dataset` takes them.
        name: The task's name; a name used before for JSON lines is replaced.

    Raises:
        DataError: as `jsonl_dataset`; or a declared dataset, task or mixture has the name.
    """
    _check_name(name)
    add(jsonl_dataset(files, name))


def jsonl_dataset(
    files: Mapping[str, str | Path],
    name: str,
    *,
    category: str = "",
    held_out: bool = False,
    group: str | None = None,
    targets: str = "",
    percent: int = 100,
) -> Dataset:
    """Declares a task of your own JSON lines, for `add`.

    With answer choices it is ranked (accuracy); without, its answers are decoded and compared:
    exact match and token F1 ("squad", which works in any script) first, then ROUGE.

    Args:
        files: Split ("train", "validation", "test") -> a file as `m2l.data.jsonl.read` reads it; or
            "all" -> a file to split, see `m2l.data.jsonl.split`.
        name: The task's name.
        category: Its category; "": the task's name.
        held_out: Whether experts are never trained on it.
        group: With "all", the field whose groups stay in one split; None: the inputs.
        targets: Only the examples of this right answer; "": all.
        percent: How much of the train split there is; a smaller part is in every larger one.

    Raises:
        DataError: a file that cannot be used, by line; files with and without answer choices; a
            split of another name.
    """
    splits = ("train", "validation", "test", "all")
    for split in files:
        if split not in splits:
            raise UnknownNameError("split of JSON lines", split, splits)
    if not files or ("all" in files and len(files) > 1):
        raise DataError("JSON lines need a file for at least one split, as train=FILE, or one: all")
    if "all" in files:
        records = jsonl.split(files["all"], group or "inputs")
    else:
        records = {split: jsonl.read(path) for split, path in files.items()}
    for split in records if targets else ():
        records[split] = [each for each in records[split] if each["targets"] == targets]
        if not records[split]:
            raise DataError(f"task {name}: no example of its {split!r} has targets {targets!r}")
    with_choices = {split: "answer_choices" in examples[0] for split, examples in records.items()}
    if len(set(with_choices.values())) > 1:
        having = [split for split, has in with_choices.items() if has]
        lacking = [split for split, has in with_choices.items() if not has]
        raise DataError(
            f"{files[having[0]]} has answer_choices and {files[lacking[0]]} has none; one task has "
            "them in all its splits or in none"
        )
    if "train" in records and percent < 100:
        records["train"] = jsonl.share(records["train"], percent)
    return written_out(
        name,
        category=category or name,
        held_out=held_out,
        choices=all(with_choices.values()),
        splits=records,
        records=records.__getitem__,
    )


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

"""Tasks of one's own JSON lines, as a study has them."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from m2l import files, storage, tasks
from m2l.errors import ConfigError, DataError
from m2l.typing import Json, JsonObject

# The parts of a task of one's own: their files' names, and the splits they are registered as.
PARTS = {"train": "train", "choose": "validation", "report": "test"}
CHOOSING, REPORTING = PARTS["choose"], PARTS["report"]

OwnTasks = str | Mapping[str, str | Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class OwnTask:
    """A task of one's own JSON lines.

    Attributes:
        name: The task's name.
        category: Its category; a task that is named alone is a category of its own.
        files: A file for each part of PARTS, or one for "all" that is split.
        group: With "all", the field whose groups stay in one part.
        targets: Only the examples of this right answer are its own; "": all.
    """

    name: str
    category: str
    files: Mapping[str, str]
    group: str = "inputs"
    targets: str = ""

    @property
    def splits(self) -> dict[str, str]:
        """The files by split."""
        return {PARTS.get(part, part): file for part, file in self.files.items()}

    @property
    def parts(self) -> frozenset[str]:
        """The parts that the task has."""
        return frozenset(PARTS if "all" in self.files else self.files)

    @property
    def setting(self) -> dict[str, str]:
        """The files as the setting `own_tasks` of a study has them."""
        return {**self.files, "group": self.group, "targets": self.targets}

    def train_examples(self) -> int:
        """Counts the examples of the part to train on."""
        if "train" not in self.parts:
            return 0
        options = {"group": self.group, "targets": self.targets}
        dataset = tasks.jsonl_dataset(self.splits, self.name, **options)
        return len(list(dataset.records("train")))

    def digest(self) -> str:
        """Computes the digest of its files' content.

        Raises:
            ConfigError: One is missing.
        """
        return _content_digest(self.files.values(), self.name)


def _content_digest(names: Iterable[str], task: str) -> str:
    paths = [storage.path(name) for name in sorted(names)]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file, of the task {task!r}")
    return files.content_digest(paths)


def read(setting: OwnTasks, label: str) -> dict[str, OwnTask]:
    """Reads the setting `own_tasks` of a study.

    Args:
        setting: By "NAME" or "CATEGORY/NAME" a folder with train.jsonl, choose.jsonl and
            report.jsonl, or those that the task needs; or a file, which is split into the three;
            or {"train": FILE, "choose": FILE, "report": FILE}, or {"all": FILE, "group": FIELD};
            with "targets", of the examples of that right answer alone.
            A folder alone: with a folder of that kind for each task.
        label: What the setting is called, for messages.

    Raises:
        ConfigError: It is something else; a folder is missing, or has no such file.
    """
    if isinstance(setting, str):
        root = storage.path(setting)
        if not root.is_dir():
            raise ConfigError(f"{label}: {setting}: there is no such folder")
        folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}
        setting = {name: str(path) for name, path in folders.items() if _parts_in(path)}
    if not isinstance(setting, Mapping):
        raise ConfigError(f"{label}: expected {{NAME: FOLDER}}, found {setting!r:.80}")
    result = {}
    for key, value in setting.items():
        category, _, name = key.rpartition("/")
        described = dict(_described(value, f"{label}: {key}"))
        group, targets = described.pop("group", "inputs"), described.pop("targets", "")
        if not described or set(described) - {*PARTS, "all"} or {"all"} < set(described):
            raise ConfigError(
                f"{label}: {key}: expected files of {', '.join(PARTS)}, or of all; found "
                f"{sorted(described)}"
            )
        if name in result or set("+/") & set(name):
            raise ConfigError(f"{label}: {key}: a name is there twice, or has + or /")
        result[name] = OwnTask(name, category or name, described, group, targets)
    return result


def _parts_in(folder: storage.AnyPath) -> dict[str, str]:
    paths = {part: folder / f"{part}.jsonl" for part in PARTS}
    return {part: str(path) for part, path in paths.items() if path.is_file()}


def _described(value: object, label: str) -> Mapping[str, str]:
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{label}: expected a folder, a file or files, found {value!r:.80}")
    path = storage.path(value)
    if ".jsonl" in path.name:
        return {"all": value}
    if not (named := _parts_in(path)):
        raise ConfigError(f"{label}: {value} has none of {', '.join(f'{p}.jsonl' for p in PARTS)}")
    return named


def settings_of(
    own: Mapping[str, OwnTask],
    mixtures: Sequence[str],
    digests: Mapping[str, str],
    *,
    held_out: Iterable[str] = (),
    percents: Mapping[str, tuple[str, int]] | None = None,
) -> JsonObject:
    """Returns what a stage says of the own tasks in its mixtures: {"own": [...]}, or nothing.

    Args:
        own: The study's own tasks.
        mixtures: The names of the stage's mixtures, tasks or categories; a stage's digest depends
            on their order, so that a set, whose order differs by process, must not get here.
        digests: Of the tasks' files, by the tasks' names.
        held_out: The held-out categories.
        percents: Mixtures that are so many percent of an own task's: name -> (task, percent).
    """
    percents, held_out = percents or {}, set(held_out)
    used = []
    for mixture in dict.fromkeys(mixtures):
        name, percent = percents.get(mixture, (mixture, 100))
        for task in tasks_of(own, name):
            used.append(
                {
                    "name": task.name if percent == 100 else mixture,
                    "category": task.category if percent == 100 else mixture,
                    "held_out": task.category in held_out,
                    "files": task.splits,
                    "group": task.group,
                    "targets": task.targets,
                    "percent": percent,
                    "digest": digests.get(task.name) or task.digest(),
                }
            )
    return {"own": used} if used else {}


def tasks_of(own: Mapping[str, OwnTask], mixture: str) -> list[OwnTask]:
    """Returns the own tasks of a task's or a category's name."""
    return [task for task in own.values() if mixture in (task.name, task.category)]


def check_part(own: Mapping[str, OwnTask], mixture: str, part: str, label: str) -> None:
    """Raises ConfigError where an own task of a mixture lacks a part of PARTS."""
    for task in tasks_of(own, mixture):
        if part not in task.parts:
            raise ConfigError(f"{label}: {task.name} has no part {part!r}")


_added: dict[str, str] = {}


def declare(settings: Mapping[str, Json]) -> None:
    """Declares the tasks of a stage: the source's and its own; what is declared stays.

    Raises:
        DataError: A file of an own task has changed since the study was planned, or cannot be used.
    """
    vocabulary, source = settings["data"]
    added = {}
    for task in settings.get("own", ()):
        described = json.dumps(task, sort_keys=True)
        if _added.get(task["name"]) == described:
            continue
        if _content_digest(task["files"].values(), task["name"]) != task["digest"]:
            raise DataError(
                f"task {task['name']}: its files have changed since the study was planned; plan it "
                "again by its gin file and --update"
            )
        names = ("category", "held_out", "group", "targets", "percent")
        options = {name: task[name] for name in names}
        dataset = tasks.jsonl_dataset(task["files"], task["name"], **options)
        added[task["name"]] = dataset, described
    datasets = [dataset for dataset, _ in added.values()]
    tasks.declare(vocabulary=vocabulary, source=source, added=datasets)
    _added.update({name: described for name, (_, described) in added.items()})

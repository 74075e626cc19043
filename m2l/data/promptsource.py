"""Templates of a checkout of promptsource (Bach et al., 2022), read and rendered without its code.

They are rendered as T0 did, so that the texts are those of its data, but for three things: the
templates run in a sandbox, in a process with limits on time and memory; what they draw at random
depends on the record alone; and a column or field that a record lacks is an error, where T0 wrote
nothing in its place.
"""

import functools
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from m2l.data import jinja_rendering, yaml_text
from m2l.data.prompts import Dataset
from m2l.data.raw_records import Record
from m2l.errors import DataError
from m2l.typing import Json, JsonObject

VARIABLE = "M2L_PROMPTSOURCE_DIR"
# Its two kinds of object, which are read as the mappings that they are.
_TAGS = ("!Template", "!TemplateMetadata")


@dataclass(frozen=True)
class Template:
    """One of a dataset's templates.

    Attributes:
        folder: The dataset's folder in promptsource, `super_glue/rte`.
        id: Its identifier, unique in promptsource.
        name: Its name, unique in the folder.
        jinja: The prompt, the separator `|||` and the target, over a record's columns and the list
            `answer_choices`.
        answer_choices: The choices with `|||` between them, over a record's columns; None for free
            text.
        ranked: Whether the target is one of the choices, and they are given with an example; if
            not, they only help to write its texts.
        original_task: Whether it asks what the dataset was made to ask.
        metrics: promptsource's names of the metrics.
        languages: Two-letter codes; may be empty.

    Raises:
        DataError: it is not a Jinja template.
    """

    folder: str
    id: str
    name: str
    jinja: str
    answer_choices: str | None = None
    ranked: bool = True
    original_task: bool = False
    metrics: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Finds mistakes in the templates, so that none can wait for a run."""
        _ = self.columns

    def __str__(self) -> str:
        return f"promptsource's {self.folder}, template {self.name!r}"

    @functools.cached_property
    def columns(self) -> frozenset[str]:
        """The columns of a record that the template names, hyphens as underscores."""
        try:
            named = jinja_rendering.call("columns", self.jinja, self.answer_choices)
        except jinja_rendering.TemplateError as error:
            raise DataError(f"{self}: {error}") from error
        return frozenset(named)

    def render(self, record: Record, number: int) -> JsonObject | None:
        """Renders an example of a record.

        Args:
            record: Its columns, those that `columns` names at least, as the Hub has them.
            number: Its place in its split: the same number always draws the same.

        Returns:
            `inputs`, `targets` and, where the template's choices are ranked, the list
            `answer_choices`; all stripped, a choice that comes twice kept once. None where T0
            leaves the record out: there is no prompt or no target, or not one separator between
            them.

        Raises:
            DataError: the record lacks a column, the template does what it may not, it fails or
                takes too much time or memory, or its target is not among two or more choices; one
                line, with the record's number.
        """
        place = f"{self}, record {number}"
        values = {name.replace("-", "_"): value for name, value in record.items()}
        if missing := sorted(self.columns - values.keys()):
            raise DataError(
                f"{place}: there is no column {missing[0]!r}; it has {', '.join(values)}"
            )
        try:
            parts, choices = jinja_rendering.call(
                "promptsource", self.jinja, self.answer_choices, values, f"{self.id}/{number}"
            )
        except jinja_rendering.TemplateError as error:
            raise DataError(f"{place}: {error}") from error
        if len(parts) != 2 or not all(parts):
            return None
        example: JsonObject = {"inputs": parts[0], "targets": parts[1]}
        if choices is not None and self.ranked:
            example["answer_choices"] = list(dict.fromkeys(choices))
            if len(example["answer_choices"]) < 2 or parts[1] not in choices:
                raise DataError(
                    f"{place}: the target {parts[1]!r:.80} is not one of two or more answer "
                    f"choices {choices!r:.200}"
                )
        return example


def checkout() -> Path:
    """Returns the checkout that the environment variable M2L_PROMPTSOURCE_DIR names.

    Raises:
        DataError: it names none.
    """
    named = os.environ.get(VARIABLE, "")
    if not named:
        raise DataError(
            f"promptsource: set {VARIABLE} to a checkout of "
            "https://github.com/bigscience-workshop/promptsource"
        )
    return Path(named).expanduser()


def path(root: Path, folder: str) -> Path:
    """Returns where a checkout has a dataset's templates, or would have them.

    Args:
        root: The checkout: a folder with promptsource/templates/ or templates/ in it.
        folder: The dataset's, `super_glue/rte`.

    Raises:
        DataError: the root has neither.
    """
    for within in ("promptsource/templates", "templates"):
        if (root / within).is_dir():
            return root / within / folder / "templates.yaml"
    raise DataError(
        f"{root}: it has neither promptsource/templates nor templates in it; {VARIABLE} is to name "
        "a checkout of promptsource"
    )


def templates(root: Path, folder: str) -> tuple[Template, ...]:
    """Reads a dataset's English templates, in the file's order.

    Args:
        root: The checkout.
        folder: The dataset's, `super_glue/rte`.

    Raises:
        DataError: there is no such file, or it is not one of promptsource's; or a template is
            none, or two have the same name.
    """
    file = path(root, folder)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: it is not YAML that can be used: {error}") from error
    wrong = f"{file}: it is not YAML that can be used"
    content = yaml_text.load(text, wrong, mappings=_TAGS)
    by_id = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(by_id, dict):
        raise DataError(f"{file}: expected `templates`, a mapping of identifiers to templates")
    declared = [_template(file, folder, str(key), entry) for key, entry in by_id.items()]
    for name, times in Counter(template.name for template in declared).items():
        if times > 1:
            raise DataError(f"{file}: {times} templates have the name {name!r}")
    return tuple(one for one in declared if not one.languages or "en" in one.languages)


def _template(file: Path, folder: str, key: str, entry: Json) -> Template:
    metadata = (entry.get("metadata") or {}) if isinstance(entry, dict) else None
    if not isinstance(metadata, dict):
        raise DataError(f"{file}: template {key}: expected a mapping, with one as its metadata")
    for name in ("name", "jinja"):
        if not isinstance(entry.get(name), str):
            raise DataError(f"{file}: template {key}: its {name} is not a text")
    if not isinstance(entry.get("answer_choices"), str | None):
        raise DataError(f"{file}: template {key}: its answer_choices are not a text")
    lists = {name: metadata.get(name) or [] for name in ("metrics", "languages")}
    for name, value in lists.items():
        if not isinstance(value, list) or any(isinstance(item, list | dict) for item in value):
            raise DataError(f"{file}: template {key}: its {name} are not a list of texts")
    return Template(
        folder=folder,
        id=key,
        name=entry["name"],
        jinja=entry["jinja"],
        answer_choices=entry.get("answer_choices") or None,
        original_task=bool(metadata.get("original_task")),
        **{name: tuple(map(str, value)) for name, value in lists.items()},
    )


def task_name(base: Dataset, template: Template) -> str:
    """Returns the task's name as T0 forms it of a declared dataset and one of its templates."""
    whole = base.naming.format(name=base.name, prompt=template.name)
    return re.sub(r"[^\w.]+", "_", whole)

"""Declarations: the fields of a dataset's records, and the prompts that turn one into text."""

import itertools
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from m2l.data.raw_records import (
    SPLITS,
    FieldType,
    Hub,
    ReadSplit,
    Record,
    Splits,
    Tfds,
    kind_of,
)
from m2l.errors import DataError, UnknownNameError

CHOICE_METRICS = ("accuracy", "f1", "spearman")
TEXT_METRICS = (
    *("squad", "rouge", "bleu"),
    *("program", "refusal", "compliance", "number", "sandbox", "nontoxic"),  # these judge
)
# What scores a task in free text: its metrics on what is decoded, or the likelihood of its
# references, for which nothing is decoded.
GENERATIVE_SCORES = ("decoding", "likelihood")
KINDS = ("string", "int", "strings", "choices")
_NAME = re.compile(r"[\w.]+")
_REFERENCE = re.compile(r"(?P<field>\w+(?:/\w+)*)(?:\[(?P<index>\w+)\])?")


@dataclass(frozen=True)
class Reference:
    """A place in a template that a field fills: `{field}`, `{field[2]}` or `{field[label]}`."""

    field: str
    index: str | None = None


def parse(template: str) -> tuple[str | Reference, ...]:
    """Splits a template into literal texts and references; `{{` and `}}` are literal braces.

    Raises:
        DataError: unbalanced braces, or something in braces that is no reference.
    """
    parts: list[str | Reference] = []
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"template {template!r}: {error}") from error
    for literal, name, spec, conversion in pieces:
        if literal:
            parts.append(literal)
        if name is None:
            continue
        match = _REFERENCE.fullmatch(name)
        if not match or spec or conversion:
            raise DataError(
                f"template {template!r}: {{{name}}} is not a field, a field[number] or a "
                "field[another field]"
            )
        parts.append(Reference(match["field"], match["index"]))
    return tuple(parts)


@dataclass(frozen=True)
class Prompt:
    """One way to ask about a record.

    Templates are plain format strings over the dataset's fields. A list field stands for its items
    joined by ", "; `{endings[2]}` is one item, `{answer_choices[label]}` the item that another
    field numbers.

    Attributes:
        name: Unique within its dataset; the task is `<dataset>_<name>`. Empty: the task has the
            dataset's name (data that comes already written out).
        inputs: What the model is given.
        targets: What it should say.
        answer_choices: What it may say: one template per choice, or "{field}" with a field of type
            "choices"; None for free text. Templates may not mention other choices. Where a label
            numbers the choices they stand in the order of its values.
        metrics: The headline metric first. With choices of CHOICE_METRICS, "accuracy" first: "f1"
            of the second of two fixed choices, "spearman" of fixed choices that have an order.
            Without choices of TEXT_METRICS.
        references: "{field}" with a list field that holds every text that counts as right, where
            that is more than the target; or what the metric judges by, such as test cases.
        original_task: Whether it asks what the dataset was made to ask.
    """

    name: str
    inputs: str
    targets: str = "{answer_choices[label]}"
    answer_choices: tuple[str, ...] | str | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    references: str | None = None
    original_task: bool = True

    @property
    def num_choices(self) -> int | None:
        """How many choices every example has; None for free text or where they vary in number."""
        return len(self.answer_choices) if isinstance(self.answer_choices, tuple) else None

    @property
    def fixed_choices(self) -> bool:
        """Whether the choices are the same texts for every example."""
        return isinstance(self.answer_choices, tuple) and all(
            isinstance(part, str) for choice in self.answer_choices for part in parse(choice)
        )


def prompt_table(
    table: Mapping[str, str | tuple[str, tuple[str, ...] | str]],
    *,
    targets: str = Prompt.targets,
    answer_choices: tuple[str, ...] | str | None = None,
    references: str | None = None,
    metrics: tuple[str, ...] = Prompt.metrics,
    original_task: bool = True,
) -> tuple[Prompt, ...]:
    """Returns prompts that differ in their wording.

    Args:
        table: Name -> `inputs`, or (`inputs`, `answer_choices`).
        targets, answer_choices, references, metrics, original_task: What they have in common.
    """
    rows = (
        (name, *(wording if isinstance(wording, tuple) else (wording, answer_choices)))
        for name, wording in table.items()
    )
    return tuple(
        Prompt(name, inputs, targets, choices, metrics, references, original_task)
        for name, inputs, choices in rows
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Everything m2l knows about a dataset; adding one to m2l is writing one of these.

    Attributes:
        name: T0's name for it, subset included: `super_glue_rte`.
        category: T0's task category.
        held_out: Whether experts are never trained on it.
        fields: The raw record's fields and types, as the Hub has them. A nested field is named by
            its path, `a/b`; a list of records gives a list for each of their fields.
        prompts: The ways to ask; at least one.
        derived: Fields that `derive` adds (or replaces), and their types.
        derive: A flat record (texts, whole numbers, lists of texts) -> the derived fields.
        complaint: What is wrong with a flat record whose fields are all of their types, so that
            `derive` or a template would fail on it, or make no sense of it; "" if nothing is.
        keep: Which flat records are the dataset's, where its repository has others as well.
        records: Reads one of its splits, by the name that `splits` gives it: a generator's or your
            own files' raw records. Whichever source is in use, the dataset's are these.
        splits: Our name of each split with labels -> the Hub's, or a part of one where it has no
            split of that kind.
        hub: Where the Hugging Face Hub has it.
        tfds: Where TensorFlow Datasets has it, if it does.
        promptsource: The folder of its templates in promptsource, `super_glue/rte`.
        sizes: How many records its splits have as published; a split in two parts counts whole, as
            "train".
        licence: The licence its authors state, by its SPDX identifier where it has one.
        paper: Who made it known.
        part_of: The dataset that this is a part of: averages over datasets count all its parts as
            one.
        naming: How a task's name is formed of the dataset's `name` and the `prompt`'s.

    Raises:
        DataError, UnknownNameError: a declaration that contradicts itself; names the prompt.
    """

    name: str
    category: str
    held_out: bool = False
    fields: Mapping[str, FieldType]
    prompts: tuple[Prompt, ...]
    derived: Mapping[str, FieldType] = field(default_factory=dict)
    derive: Callable[[Record], Record] | None = None
    complaint: Callable[[Record], str] | None = None
    keep: Callable[[Record], bool] | None = None
    records: ReadSplit | None = None
    splits: Splits = field(default_factory=lambda: dict(SPLITS))
    hub: Hub | None = None
    tfds: Tfds | None = None
    promptsource: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    licence: str = ""
    paper: str = ""
    part_of: str = ""
    naming: str = "{name}_{prompt}"

    def __post_init__(self) -> None:
        """Checks every template against the fields, so that a mistake cannot wait for a run."""
        for name, field_type in {**self.fields, **self.derived}.items():
            if not field_type or (isinstance(field_type, str) and field_type not in KINDS):
                raise DataError(
                    f"dataset {self.name!r}, field {name!r}: its type is {field_type!r}, not one "
                    f"of {', '.join(KINDS)} or the values it may take"
                )
        if bool(self.derived) != bool(self.derive):
            raise DataError(f"dataset {self.name!r}: derived without derive, or derive without it")
        if not self.prompts or len({prompt.name for prompt in self.prompts}) < len(self.prompts):
            raise DataError(f"dataset {self.name!r}: it needs prompts, each with a name of its own")
        for prompt in self.prompts:
            self._check(prompt)

    @property
    def kinds(self) -> dict[str, str]:
        """Every field a template may name, derived ones included, and its kind."""
        return {name: kind_of(of) for name, of in {**self.fields, **self.derived}.items()}

    def task_name(self, prompt: Prompt) -> str:
        """Returns the seqio task's name, as T0 forms it."""
        if not prompt.name:
            return self.name
        return self.naming.format(name=self.name, prompt=prompt.name)

    def _check(self, prompt: Prompt) -> None:
        place = f"dataset {self.name!r}, prompt {prompt.name!r}"
        if not _NAME.fullmatch(self.task_name(prompt)):
            raise DataError(f"{place}: a task's name has letters, digits, '_' and '.' only")
        kinds, choices = self.kinds, prompt.answer_choices
        if isinstance(choices, tuple):
            if len(set(choices)) < 2 or len(set(choices)) < len(choices):
                raise DataError(f"{place}: {choices} are not two or more different answer choices")
            for choice in choices:
                self._check_template(place, "an answer choice", choice, kinds)
        for attribute, template in (("answer_choices", choices), ("references", prompt.references)):
            if isinstance(template, str):
                self._check_list(place, attribute, template, kinds)
        if choices is not None:
            kinds = {**kinds, "answer_choices": "strings"}
        self._check_template(place, "inputs", prompt.inputs, kinds)
        self._check_template(place, "targets", prompt.targets, kinds)
        known = TEXT_METRICS if choices is None else CHOICE_METRICS
        for metric in prompt.metrics:
            if metric not in known:
                with_or_without = "without" if choices is None else "with"
                raise UnknownNameError(
                    f"metric, {with_or_without} answer choices, of {place}:", metric, known
                )
        if not prompt.metrics or (choices is not None and prompt.metrics[0] != "accuracy"):
            raise DataError(
                f"{place}: its metrics are {prompt.metrics}; with answer choices the first is "
                "accuracy, and there is at least one"
            )
        fits = {"f1": prompt.num_choices == 2, "spearman": True}
        for metric in prompt.metrics:
            if not fits.get(metric, True) or (metric in fits and not prompt.fixed_choices):
                raise DataError(
                    f"{place}: {metric} needs {'two ' * (metric == 'f1')}fixed answer choices"
                )

    def _check_list(
        self, place: str, attribute: str, template: str, kinds: Mapping[str, str]
    ) -> None:
        parts = parse(template)
        self._check_template(place, attribute, template, kinds)
        only = parts[0] if len(parts) == 1 and isinstance(parts[0], Reference) else None
        if only is None or only.index is not None or kinds[only.field] != "strings":
            raise DataError(
                f"{place}: {attribute} is {template!r}, which does not name one list field"
            )
        field_type = {**self.fields, **self.derived}[only.field]
        if attribute == "answer_choices" and field_type != "choices":
            raise DataError(
                f"{place}: {attribute} is {template!r}, a field of type {field_type!r}, "
                "not 'choices'"
            )

    def _check_template(
        self, place: str, attribute: str, template: str, kinds: Mapping[str, str]
    ) -> None:
        if not template.strip():
            raise DataError(f"{place}: {attribute} is empty")
        for part in parse(template):
            if isinstance(part, str):
                continue
            if part.field not in kinds:
                raise UnknownNameError(f"field in {attribute} of {place}:", part.field, kinds)
            if part.index is None:
                continue
            if kinds[part.field] != "strings":
                raise DataError(f"{place}: {attribute} numbers {part.field!r}, which is not a list")
            if not part.index.isdigit() and kinds.get(part.index) != "int":
                raise DataError(
                    f"{place}: {attribute} numbers {part.field!r} by {part.index!r}, which is "
                    "neither a number nor an int field"
                )


def written_out(
    name: str,
    *,
    category: str,
    choices: bool,
    splits: Iterable[str] = tuple(SPLITS),
    metrics: tuple[str, ...] = ("squad", "rouge"),
    original_task: bool = True,
    **more: object,
) -> Dataset:
    """Declares records that are examples already: `inputs`, `targets`, `answer_choices`.

    Args:
        name: The dataset's and its only task's name.
        category: The task category.
        choices: Whether every record has `answer_choices`, a list of texts with the target in it.
        splits: The splits there are.
        metrics: How answers are compared where there are no choices. By default exact match and
            token F1 come first: ROUGE sees only letters a to z and digits, and would find nothing
            right in other scripts.
        original_task: Whether the examples ask what their dataset was made to ask.
        more: Further attributes of the Dataset.
    """
    fields: dict[str, FieldType] = {"inputs": "string", "targets": "string"}
    if choices:
        fields["answer_choices"] = "choices"
    prompt = Prompt(
        name="",
        inputs="{inputs}",
        targets="{targets}",
        answer_choices="{answer_choices}" if choices else None,
        metrics=("accuracy",) if choices else metrics,
        original_task=original_task,
    )
    return Dataset(
        **{
            "name": name,
            "category": category,
            "held_out": False,
            "fields": fields,
            "prompts": (prompt,),
            "splits": {split: split for split in splits},
            **more,
        }
    )


def datasets_in(*namespaces: Mapping[str, object]) -> tuple[Dataset, ...]:
    """Returns the datasets that modules declare, alone or in tuples, in the order of the modules.

    Args:
        namespaces: Each module's `vars`.
    """
    declared: dict[Dataset, None] = {}
    for value in itertools.chain(*(namespace.values() for namespace in namespaces)):
        values = value if isinstance(value, tuple) else (value,)
        declared |= dict.fromkeys(item for item in values if isinstance(item, Dataset))
    return tuple(declared)


@dataclass(frozen=True)
class TaskInfo:
    """What a task is.

    Attributes:
        name: Its name in seqio's registry; with answer choices there is a twin `<name>_score_eval`.
        dataset: The dataset its records come from, whose parts count as one.
        prompt: The prompt it asks with; empty where the records are written out already.
        category: The task category: experts and held-out figures are formed per category.
        held_out: Whether experts are never trained on it.
        kind: "rank" (answer choices), "generate" (free text) or "train" (nothing to evaluate).
        metrics: The metrics' names, the headline metric first.
        original_task: Whether it asks what the dataset was made to ask.
    """

    name: str
    dataset: str
    prompt: str
    category: str
    held_out: bool
    kind: str
    metrics: tuple[str, ...]
    original_task: bool

    @property
    def metric(self) -> str:
        """The headline metric's name; empty where nothing is evaluated."""
        return self.metrics[0] if self.metrics else ""

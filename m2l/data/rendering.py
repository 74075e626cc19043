"""From a record to a prompt's texts."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from m2l.data.prompts import Dataset, Prompt, Reference, parse
from m2l.data.raw_records import Record
from m2l.errors import DataError

# `inputs` and `targets`; and a list of texts, `answer_choices` where a prompt has them, else
# `references`.
Texts: TypeAlias = Mapping[str, str | list[str]]
_Fill: TypeAlias = Callable[[Record], str]


def _item(reference: Reference) -> _Fill:
    field, index = reference.field, reference.index

    def fill(fields: Record) -> str:
        items = fields[field]
        number = int(index) if index.isdigit() else int(fields[index])
        # A negative one would count from the end.
        if not 0 <= number < len(items):
            raise DataError(f"{field}[{index}]: there is no item {number} of {len(items)}")
        return items[number]

    return fill


def _value(field: str) -> _Fill:
    def fill(fields: Record) -> str:
        value = fields[field]
        return ", ".join(value) if isinstance(value, list | tuple) else str(value)

    return fill


def _text(template: str) -> _Fill:
    parts = [
        part if isinstance(part, str) else _value(part.field) if part.index is None else _item(part)
        for part in parse(template)
    ]

    def fill(fields: Record) -> str:
        return "".join([part if isinstance(part, str) else part(fields) for part in parts])

    return fill


def _list(template: tuple[str, ...] | str) -> Callable[[Record], list[str]]:
    if isinstance(template, tuple):
        texts = [_text(choice) for choice in template]
        return lambda fields: [text(fields) for text in texts]
    [reference] = parse(template)
    return lambda fields: list(fields[reference.field])


def _checked(derived: Record) -> Record:
    for field, value in derived.items():
        if not isinstance(value, str | int | list | tuple):
            raise DataError(
                f"derived field {field!r} is {value!r:.60}, expected a text, a whole number or a "
                "list of texts"
            )
    return derived


def renderer(dataset: Dataset, prompt: Prompt) -> Callable[[Record], Texts]:
    """Compiles a prompt.

    Args:
        dataset: The declaration of the records.
        prompt: One of its prompts.

    Returns:
        A function of a flat record. It gives the texts `inputs` and `targets`, and a list of texts:
        `answer_choices` where the prompt has them, else `references` (at least the target). It
        raises DataError where a number is of no item of its list.
    """
    inputs, targets = _text(prompt.inputs), _text(prompt.targets)
    choices = None if prompt.answer_choices is None else _list(prompt.answer_choices)
    references = None if prompt.references is None else _list(prompt.references)

    def render(record: Record) -> Texts:
        fields = dict(record)
        if dataset.derive is not None:
            fields.update(_checked(dataset.derive(fields)))
        if choices is not None:
            fields["answer_choices"] = choices(fields)
        texts: dict[str, str | list[str]] = {"inputs": inputs(fields), "targets": targets(fields)}
        if choices is not None:
            texts["answer_choices"] = fields["answer_choices"]
        else:
            texts["references"] = references(fields) if references else [texts["targets"]]
        return texts

    return render


# ---- Texts as every reader of T0's data has them: what counts as a space are ASCII's alone


_SPACES = " \t\n\v\f\r"


def stripped(text: str) -> str:
    """Returns a text without the ASCII spaces around it."""
    return text.strip(_SPACES)


def words(text: str) -> Sequence[str]:
    """Returns what stands between a text's ASCII spaces."""
    for space in _SPACES[1:]:
        text = text.replace(space, " ")
    return [word for word in text.split(" ") if word]

"""Prompts as TensorFlow operations: a record's tensors in, the texts of an example out."""

from collections.abc import Callable, Mapping

import tensorflow as tf

from m2l.data.prompts import Dataset, Prompt, Reference, parse

Tensors = Mapping[str, tf.Tensor]


def _fill(reference: Reference, fields: Tensors) -> tf.Tensor:
    value = fields[reference.field]
    if reference.index is not None:
        index = reference.index
        return value[int(index)] if index.isdigit() else tf.gather(value, fields[index])
    if value.shape.rank == 1:
        return tf.strings.reduce_join(value, separator=", ")
    return value if value.dtype == tf.string else tf.strings.as_string(value)


def _text(template: str, fields: Tensors) -> tf.Tensor:
    parts = [
        tf.constant(part) if isinstance(part, str) else _fill(part, fields)
        for part in parse(template)
    ]
    return parts[0] if len(parts) == 1 else tf.strings.join(parts)


def _list(template: tuple[str, ...] | str, fields: Tensors) -> tf.Tensor:
    if isinstance(template, tuple):
        return tf.stack([_text(choice, fields) for choice in template])
    return fields[parse(template)[0].field]


def renderer(dataset: Dataset, prompt: Prompt) -> Callable[[Tensors], dict[str, tf.Tensor]]:
    """Compiles a prompt.

    Args:
        dataset: The declaration of the records.
        prompt: One of its prompts.

    Returns:
        A function for the inside of a tf.data graph: one record's tensors -> string scalars
        `inputs` and `targets`, and a string vector: `answer_choices` where the prompt has them,
        else `references` (at least the target).
    """

    def render(record: Tensors) -> dict[str, tf.Tensor]:
        fields = dict(record)
        if dataset.derive is not None:
            fields.update(dataset.derive(fields))
        if prompt.answer_choices is not None:
            fields["answer_choices"] = _list(prompt.answer_choices, fields)
        texts = {
            "inputs": _text(prompt.inputs, fields),
            "targets": _text(prompt.targets, fields),
        }
        if prompt.answer_choices is not None:
            texts["answer_choices"] = fields["answer_choices"]
            return texts
        texts["references"] = (
            texts["targets"][tf.newaxis]
            if prompt.references is None
            else _list(prompt.references, fields)
        )
        return texts

    # Templates are plain tensor operations: AutoGraph would read every one of them for nothing.
    return tf.autograph.experimental.do_not_convert(render)

"""Statistics of an expert on its data that merges use: Fisher information, Grams of its inputs.

Both are gathered over examples one to a row, float32, and saved as a checkpoint of their own:
m2l.merging.methods says how merges use them.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from m2l import checkpoints, models, partitioning
from m2l.checkpoints.reading import existing_result
from m2l.data import layouts, pipeline
from m2l.errors import CheckpointError, ConfigError, M2LError, UnknownNameError
from m2l.progress import Progress
from m2l.training import losses
from m2l.training.state import Batch
from m2l.typing import JsonObject, Params

Products = dict[str, tuple[jax.Array, jax.Array]]

KINDS = ("fisher", "gram")


def fisher(
    config: models.Config, params: Params, batches: Iterator[Batch], examples: int
) -> Params:
    """Computes the diagonal of the empirical Fisher information, for merging by Fisher weights.

    mean over examples (x, y) of (d/dtheta log p(y | x, theta))^2, y being the target of the data,
    all of its tokens and EOS together. The square is of an example's gradient, never of a batch's.
    This is the empirical Fisher: the exact one, which the paper prefers where there are few labels,
    takes the expectation over the model's own p(y | x) instead, for which texts are too many.
    Examples are differentiated one after the other, so that only the parameters, the sum and
    one gradient are in memory.

    Matena & Raffel 2022, arXiv:2111.09832, equation 4.

    Args:
        config: The model's configuration.
        params: Its parameters, of any float dtype.
        batches: As `pipeline.training_batches` yields with pack=False: an example a row.
        examples: How many are used; of the last batch, its first rows.

    Returns:
        A nested dict of float32 arrays like the parameters.
    """
    # Gradients in bfloat16 would be squared in it.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    total = jax.tree.map(jnp.zeros_like, params)
    for batch, counts_B in _rows(batches, examples, "fisher"):
        total = _add_squares(config, total, params, batch, counts_B)
        jax.block_until_ready(total)  # or the progress shown is that of the data
    return jax.tree.map(lambda leaf: leaf / examples, total)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_squares(
    config: models.Config, total: Params, params: Params, batch: Batch, counts_B: jax.Array
) -> Params:
    def loss(params: Params, row: Batch) -> jax.Array:
        sums = losses.cross_entropy(
            models.hidden(config, params, row),
            models.unembedding(config, params),
            row["decoder_target_tokens"],
            row["decoder_loss_weights"],
            softcap=config.logit_softcap,
        )
        return sums["loss"]

    def add(total: Params, example: tuple[Batch, jax.Array]) -> tuple[Params, None]:
        row, counts = example
        gradient = jax.grad(loss)(params, jax.tree.map(lambda leaf: leaf[None], row))
        squares = jax.tree.map(lambda leaf: jnp.where(counts, jnp.square(leaf), 0), gradient)
        return jax.tree.map(jnp.add, total, squares), None

    return jax.lax.scan(add, total, (batch, counts_B))[0]


def gram(config: models.Config, params: Params, batches: Iterator[Batch], examples: int) -> Params:
    """Computes the Gram matrices of the inputs of every linear kernel, as RegMean uses them.

    Of a kernel W [d_in, d_out] that is multiplied as X W, X having a row per token: X^T X divided
    by the number of rows, so that no expert counts more for its longer texts. Tokens are those of
    the encoder's input or of the decoder's, whichever the kernel reads; padding is not among them.

    Jin et al. 2023, arXiv:2212.09849, section 3.3; the mean over tokens is their code's (which
    counts padding as well).

    Args:
        config, params, batches, examples: As for `fisher`.

    Returns:
        A nested dict of float32 arrays [d_in, d_in], each under the name of its kernel. Embeddings,
        norms, biases and an output matrix that is the embedding as well have none.
    """
    total = None
    for batch, counts_B in _rows(batches, examples, "gram"):
        if total is None:
            shapes = jax.eval_shape(functools.partial(_products, config), params, batch, counts_B)
            total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total = _add_products(config, total, params, batch, counts_B)
        jax.block_until_ready(total)
    return checkpoints.unflatten({name: total[name][0] / total[name][1] for name in total})


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_products(
    config: models.Config, total: Products, params: Params, batch: Batch, counts_B: jax.Array
) -> Products:
    return jax.tree.map(jnp.add, total, _products(config, params, batch, counts_B))


def _products(
    config: models.Config,
    params: Params,
    batch: Batch,
    counts_B: jax.Array,
    other: Params | None = None,
) -> Products:
    """Computes X^T Y of each kernel, float32 [d_in, d_in], and the number of rows, float32.

    Y are the inputs of the other model's kernel; None: X.
    """
    tokens = _tokens(config.decoder_only, batch)

    def product(name: str, x_BxLxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        mask_BxL = tokens["encoder" if _reads_encoder(name) else "decoder"] & counts_B[:, None]
        rows, other_rows = (
            jnp.where(mask_BxL[..., None], x.reshape(x_BxLxD.shape), 0).reshape(-1, x.shape[-1])
            for x in (x_BxLxD, other_inputs[name])
        )
        gram_matrix = jnp.matmul(rows.T, other_rows, precision=jax.lax.Precision.HIGHEST)
        return gram_matrix, jnp.sum(mask_BxL, dtype=jnp.float32)

    inputs = models.kernel_inputs(config, params, batch)
    other_inputs = inputs if other is None else models.kernel_inputs(config, other, batch)
    return {name: product(name, x_BxLxD) for name, x_BxLxD in inputs.items()}


def cross_products(
    config: models.Config,
    reference: Params,
    expert: Params,
    batches: Iterator[Batch],
    examples: int,
) -> dict[str, np.ndarray]:
    """Sums over tokens what the units of two models say together, for activation matching.

    Ainsworth et al. 2022, arXiv:2209.04836, section 3.1.

    Args:
        config: Of both models.
        reference: The parameters of the one.
        expert: Those of the other.
        batches, examples: As for `fisher`.

    Returns:
        By the kernel's name, sum of x_reference x_expert^T of its inputs, float32 [d_in, d_in].
    """
    totals: dict[str, np.ndarray] = {}
    step = jax.jit(functools.partial(_products, config))
    for batch, counts_B in _rows(batches, examples, "activations"):
        for name, (product, _) in step(reference, batch, counts_B, expert).items():
            totals[name] = totals.get(name, np.float32(0)) + np.asarray(product)
    return totals


def _tokens(decoder_only: bool, batch: Batch) -> dict[str, jax.Array]:
    """Returns masks of tokens that are not padding: bool [B, S] and [B, T]."""
    if decoder_only:
        return {"decoder": batch["decoder_segment_ids"] != 0}
    # The first token of the decoder's input is its start, whose id may be padding's.
    return {
        "encoder": batch["encoder_input_tokens"] != 0,
        "decoder": batch["decoder_target_tokens"] != 0,
    }


def _reads_encoder(kernel: str) -> bool:
    """Returns whether a kernel's input has the positions of the encoder's input."""
    memory = ("cross_attention/key", "cross_attention/value")
    return kernel.startswith("encoder/") or kernel.endswith(memory)


def _rows(
    batches: Iterator[Batch], examples: int, description: str
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields batches until there are so many examples, each with which rows count: bool [B]."""
    with Progress(description, examples, "examples", first="compiling") as progress:
        done = 0
        while done < examples:
            batch = next(batches)
            rows = len(batch["decoder_target_tokens"])
            yield batch, np.arange(rows) < examples - done
            done = min(done + rows, examples)
            progress.update(done)


def gather(
    checkpoint: Path,
    out: Path,
    *,
    kind: str,
    mixture: str,
    examples: int,
    vocabulary: Mapping[str, str],
    data: JsonObject,
    split: str = "train",
    batch_size: int = 8,
    input_length: int = 512,
    target_length: int = 64,
    seed: int = 0,
    fsdp: int = 1,
    model: int = 1,
) -> checkpoints.Manifest:
    """Gathers a statistic of an expert over data and saves it as a checkpoint.

    The examples are those that a training would see: drawn from the tasks of a mixture at their
    rates, those of a task in a random order. The same arguments give the same parameters.

    Args:
        checkpoint: The expert's.
        out: The checkpoint to write; if it exists and was written for the same arguments, its
            manifest is returned. The manifest records the arguments, `kind` "statistics", and
            has the expert as its only parent.
        kind: Of KINDS.
        mixture: The task's or mixture's name.
        examples: How many examples to look at.
        vocabulary: The vocabulary's description, as `vocabularies.describe` returns it.
        data: Where the records come from, as plain JSON values; recorded in the manifest.
        split: Of every task.
        batch_size: Rows at a time; decides nothing of the Fisher but how it is rounded.
        input_length: Tokens of an example's inputs; longer ones are cut.
        target_length: Tokens of its targets; longer ones are cut.
        seed: Of the order of the examples.
        fsdp, model: The axes of the mesh on which the expert and its statistic are placed; each
            decides nothing but how sums are rounded.

    Raises:
        UnknownNameError: there is no such kind, task or mixture.
        ConfigError: not at least one example.
        CheckpointError: the checkpoint is unusable, holds statistics itself, or is of another
            vocabulary; `out` exists, or the disk is full.
        M2LError: a statistic is not finite; names the parameter.
    """
    if kind not in KINDS:
        raise UnknownNameError("statistic", kind, KINDS)
    if examples < 1:
        raise ConfigError(f"a statistic of {examples} examples: expected 1 or more")
    directory = checkpoints.resolve(checkpoint)
    manifest = checkpoints.read_manifest(directory)
    if manifest.made_by.get("kind") == "statistics":
        raise CheckpointError(
            f"{directory}: it holds the {manifest.made_by['statistic']} of a model, not a model; "
            "name the model's own checkpoint"
        )
    if vocabulary["fingerprint"] != manifest.vocabulary["fingerprint"]:
        raise CheckpointError(
            f"{directory}: it was made with vocabulary {manifest.vocabulary['name']!r}, not with "
            f"{vocabulary['name']!r}; a model reads its own alone"
        )
    config = models.from_dict(manifest.model)
    checkpoints.check_vocabulary(vocabulary, config.vocab_size, directory)
    settings = {
        "mixture": mixture,
        "split": split,
        "input_length": input_length,
        "target_length": target_length,
        "batch_size": min(batch_size, examples),
        "seed": seed,
    }
    made_by = {"kind": "statistics", "statistic": kind, "of": manifest.digest}
    made_by |= {"examples": examples, "settings": settings, "data": dict(data)}
    same = existing_result(out, lambda stored: stored.made_by == json.loads(json.dumps(made_by)))
    if same is not None:
        return same
    batches = pipeline.training_batches(
        mixture,
        lengths={"inputs": input_length, "targets": target_length},
        batch_size=settings["batch_size"],
        seed=seed,
        pack=False,
        split=split,
        layout=layouts.of(config, pipeline.vocabulary_of(mixture, split)),
    )
    mesh = partitioning.make_mesh(fsdp=fsdp, model=model)
    placed = partitioning.shardings(models.spec(config), mesh)
    with jax.set_mesh(mesh):
        params = checkpoints.restore(directory, shardings=placed)
        statistic = {"fisher": fisher, "gram": gram}[kind](config, params, batches, examples)
        _check_finite(directory, kind, statistic)
    return checkpoints.save(
        out,
        statistic,
        model=manifest.model,
        vocabulary=manifest.vocabulary,
        made_by=made_by,
        parents=({"role": "expert", "path": str(directory), "digest": manifest.digest},),
    )


def _check_finite(directory: Path, kind: str, statistic: Params) -> None:
    for name, leaf in checkpoints.flatten(statistic).items():
        if not jnp.all(jnp.isfinite(leaf)):
            raise M2LError(
                f"{directory}: the {kind} of {name} is not a finite number: a parameter is none, "
                "or is too large; m2l inspect --verify tells whether the checkpoint is damaged"
            )

"""The state of a training run, where it lies on the mesh, and the one step that changes it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2l import models, partitioning
from m2l.training import losses, optimizers

Params = dict[str, Any]
Metrics = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]


# Without it XLA's CPU backend copies every kernel before a step that changes it in place.
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_copy_insertion_use_region_analysis": True}}


class TrainState(NamedTuple):
    """Parameters and optimizer state, float32, and the number of steps that made them."""

    step: jax.Array
    params: Params
    opt_state: Any


def _parameter_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def shardings(config: Any, optimizer_name: str, mesh: Mesh) -> TrainState:
    """A NamedSharding for every leaf of the state.

    Optimizer state of a parameter's own shape lies as the parameter does; the rest (Adafactor's
    row and column moments, counts) is small and replicated.
    """
    specs = models.spec(config)
    params = partitioning.shardings(specs, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, models.ParamSpec),
    )
    of_parameter = {
        _parameter_path(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(params), strict=True
        )
    }

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        shape, sharding = of_parameter.get(_parameter_path(path), (None, replicated))
        return sharding if leaf.shape == shape else replicated

    opt_state = jax.eval_shape(optimizers.optimizer(optimizer_name).init, abstract)
    return TrainState(replicated, params, jax.tree_util.tree_map_with_path(place, opt_state))


def abstract(config: Any, optimizer_name: str) -> TrainState:
    """The state's shapes and dtypes, without making it."""
    init = functools.partial(fresh, config, optimizer_name)
    return jax.eval_shape(init, jax.random.key(0))


def fresh(config: Any, optimizer_name: str, key: jax.Array) -> TrainState:
    """The state of a run that starts from a random model."""
    return around(optimizer_name, models.init(config, key))


def around(optimizer_name: str, params: Params) -> TrainState:
    """The state of a run that starts from `params`."""
    # Masters are float32, whatever the checkpoint holds: a step is less than bfloat16 can tell.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    opt_state = optimizers.optimizer(optimizer_name).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


@functools.cache
def train_step(
    config: Any,
    optimizer_name: str,
    execution: models.Execution,
    mesh: Mesh,
    loss_chunk: int = 0,
) -> Callable[[TrainState, Batch, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """One jitted step, the same function for every run of this model on this mesh.

    The step takes (state, batch, learning rate, dropout key), gives the next state and float32
    metrics, and consumes the state it was given. Learning rate and key are values, so any number
    of runs share one compilation.

    Args:
        config: The model's configuration.
        optimizer_name: A key of `optimizers.OPTIMIZERS`.
        execution: How the network is computed; parameters and optimizer state are float32.
        mesh: Where the state and the batch lie.
        loss_chunk: Positions of a row whose logits are held at a time; 0: all.
    """
    transformation = optimizers.optimizer(optimizer_name)
    placed = shardings(config, optimizer_name, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None):
        hidden = models.hidden(config, params, batch, dropout_key=key, execution=execution)
        sums = losses.cross_entropy(
            hidden,
            models.unembedding(config, params),
            batch["decoder_target_tokens"],
            batch["decoder_loss_weights"],
            softcap=config.logit_softcap,
            chunk=loss_chunk,
            tied=config.tie_word_embeddings,
        )
        return sums["loss"] / jnp.maximum(sums["weight"], 1.0), sums

    def step(
        state: TrainState, batch: Batch, learning_rate: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step) if execution.dropout_rate else None
        (loss, sums), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, key
        )
        updates, opt_state = transformation.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + learning_rate * u, state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": sums["correct"] / jnp.maximum(sums["weight"], 1.0),
            "target_tokens": sums["weight"],
            "gradient_norm": optax.global_norm(gradients),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        step,
        in_shardings=(placed, partitioning.batch_sharding(mesh), replicated, replicated),
        out_shardings=(placed, replicated),
        donate_argnums=0,
        compiler_options=_COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
    )

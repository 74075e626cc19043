"""The state of a training run, its sharding, and the one step that changes it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2l import models, partitioning
from m2l.models.fields import FRACTION, NOT_NEGATIVE, check_fields
from m2l.training import losses
from m2l.training.lora import Lora
from m2l.training.optimizers import Optimizer
from m2l.typing import Params, PyTree

Metrics = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]


# Without it XLA's CPU backend copies every kernel before a step that changes it in place.
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_copy_insertion_use_region_analysis": True}}


class TrainState(NamedTuple):
    """Parameters and optimizer state, float32, after a number of steps."""

    step: jax.Array
    params: Params
    opt_state: PyTree


class AveragedState(NamedTuple):
    """The optimizer's state, and the moving average of the parameters."""

    optimizer: PyTree
    average: Params


def _parameter_path(path: jax.tree_util.KeyPath) -> tuple[str, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def spec(config: models.Config, lora: Lora | None = None) -> Params:
    """Returns the ParamSpec of all that is trained: the model's parameters, or an adapter's."""
    return models.spec(config) if lora is None else lora.spec(config)


@functools.cache
def shardings(
    config: models.Config, optimizer: Optimizer, mesh: Mesh, lora: Lora | None = None
) -> TrainState:
    """Returns a NamedSharding for every leaf of the state.

    Optimizer state of a parameter's own shape is sharded as the parameter is; all other
    (Adafactor's row and column moments, counts) is small and replicated.
    """
    specs = spec(config, lora)
    params = partitioning.shardings(specs, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    by_parameter = {
        _parameter_path(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(specs), jax.tree.leaves(params), strict=True
        )
    }

    def place(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        shape, sharding = by_parameter.get(_parameter_path(path), (None, replicated))
        return sharding if leaf.shape == shape else replicated

    opt_state = abstract(config, optimizer, lora).opt_state
    return TrainState(replicated, params, jax.tree_util.tree_map_with_path(place, opt_state))


@functools.cache
def abstract(config: models.Config, optimizer: Optimizer, lora: Lora | None = None) -> TrainState:
    """Returns the state's shapes and dtypes, without allocating it."""
    params = jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), spec(config, lora)
    )
    return jax.eval_shape(functools.partial(from_params, optimizer), params)


def init(
    config: models.Config, optimizer: Optimizer, key: jax.Array, lora: Lora | None = None
) -> TrainState:
    """Initialises the state of a run that starts from a random model, or adapter."""
    params = models.init(config, key) if lora is None else lora.init(config, key)
    return from_params(optimizer, params)


@functools.cache
def sharded_initializers(
    config: models.Config, optimizer: Optimizer, mesh: Mesh, lora: Lora | None = None
) -> tuple[Callable[[jax.Array], TrainState], Callable[[Params], TrainState]]:
    """Returns `init`, of a key, and `from_params`, of parameters, jitted, with sharded results."""
    placed = shardings(config, optimizer, mesh, lora)
    return (
        jax.jit(functools.partial(init, config, optimizer, lora=lora), out_shardings=placed),
        jax.jit(functools.partial(from_params, optimizer), out_shardings=placed),
    )


def from_params(optimizer: Optimizer, params: Params) -> TrainState:
    """Returns the state of a run that starts from `params`."""
    # Masters are float32, whatever the checkpoint's dtype: bfloat16 would round most steps away.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return TrainState(jnp.zeros((), jnp.int32), params, _first_opt_state(optimizer, params))


def _first_opt_state(optimizer: Optimizer, params: Params) -> PyTree:
    opt_state = optimizer.transformation().init(params)
    return AveragedState(opt_state, jax.tree.map(jnp.copy, params)) if optimizer.ema else opt_state


def _averaged(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """Returns the moving average after one more step: decay * average + (1 - decay) * params.

    The first steps weigh more, by min(decay, (1 + steps) / (10 + steps)), as TensorFlow's
    ExponentialMovingAverage has it with num_updates: the random start is forgotten.
    """
    done = step.astype(jnp.float32) + 1
    rate = 1 - jnp.minimum(decay, (1 + done) / (10 + done))
    return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step minimises, and in how many parts it processes a batch.

    Attributes:
        loss_chunk: Positions of a row whose logits are computed at a time; 0: an eighth of them,
            or more where a batch has few rows.
        z_loss: z of z log(Z)^2, added to the loss of each target; T5's pretraining had 1e-4.
        label_smoothing: The share of each target that is spread over the vocabulary.
        accumulate: In how many parts, one after the other, a batch is processed. Gradients of sums
            are added and divided once, by all targets that count, so that their number in a part
            does not matter.

    Raises:
        ConfigError: A number of the wrong type or out of range.
    """

    loss_chunk: int = dataclasses.field(default=0, metadata=NOT_NEGATIVE)
    z_loss: float = dataclasses.field(default=0.0, metadata=NOT_NEGATIVE)
    label_smoothing: float = dataclasses.field(default=0.0, metadata=FRACTION)
    accumulate: int = 1

    def __post_init__(self) -> None:
        check_fields(self)


def summed_loss(
    config: models.Config,
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    execution: models.Execution,
    objective: Objective,
) -> dict[str, jax.Array]:
    """Computes the sums of `losses.cross_entropy` over a batch; `key` is dropout's.

    The loss of a mixture of experts that has a router_aux_loss_coef has as many times of what
    balances the experts added, for each target.
    """
    options = {"dropout_key": key, "execution": execution}
    balance = None
    if config.router_aux_loss_coef:
        hidden, balance = models.balanced_hidden(config, params, batch, **options)
    else:
        hidden = models.hidden(config, params, batch, **options)
    sums = losses.cross_entropy(
        hidden,
        models.unembedding(config, params),
        batch["decoder_target_tokens"],
        batch["decoder_loss_weights"],
        softcap=config.logit_softcap,
        chunk=objective.loss_chunk,
        tied=config.tie_word_embeddings,
        z_loss=objective.z_loss,
        smoothing=objective.label_smoothing,
    )
    if balance is not None:
        sums["loss"] += config.router_aux_loss_coef * balance * sums["weight"]
    return sums


@functools.cache
def train_step(
    config: models.Config,
    optimizer: Optimizer,
    execution: models.Execution,
    mesh: Mesh,
    objective: Objective = Objective(),
    lora: Lora | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted step, the same function for every run of this model on this mesh.

    The step is called with (state, batch, learning rate, dropout key), returns the next state and
    float32 metrics, and donates the state. Learning rate and key are values, so any number of runs
    share one compilation. With an adapter the state is its factors', and the base's parameters are
    a fifth argument, which stays as it is.

    Args:
        config: The model's configuration.
        optimizer: The optimizer.
        execution: How the network is computed; parameters and optimizer state are float32.
        mesh: The mesh of the state and the batch.
        objective: What is minimised.
        lora: The adapter that is trained; None: the model is.
    """
    transformation = optimizer.transformation()
    placed = shardings(config, optimizer, mesh, lora)
    trained = optimizer.trained(placed.params)
    replicated = NamedSharding(mesh, PartitionSpec())

    def loss_fn(
        params: Params, batch: Batch, key: jax.Array | None, base: Params | None
    ) -> tuple[jax.Array, Metrics]:
        whole = params if lora is None else lora.combine(base, params)
        sums = summed_loss(config, whole, batch, key, execution, objective)
        return sums["loss"], sums

    def mean_fn(
        params: Params, batch: Batch, key: jax.Array | None, base: Params | None
    ) -> tuple[jax.Array, Metrics]:
        loss, sums = loss_fn(params, batch, key, base)
        return loss / jnp.maximum(sums["weight"], 1.0), sums

    def gradient_of_parts(
        params: Params, batch: Batch, key: jax.Array | None, base: Params | None
    ) -> tuple[Params, Metrics]:
        def add(
            total: tuple[Params, Metrics], numbered: tuple[jax.Array, Batch]
        ) -> tuple[tuple[Params, Metrics], None]:
            number, part = numbered
            part_key = None if key is None else jax.random.fold_in(key, number)
            gradients, sums = jax.grad(loss_fn, has_aux=True)(params, part, part_key, base)
            return jax.tree.map(jnp.add, total, (gradients, sums)), None

        parts = jax.tree.map(functools.partial(_in_parts, objective.accumulate), batch)
        zeros = jax.tree.map(jnp.zeros_like, params), dict.fromkeys(losses.SUMS, jnp.float32(0))
        numbered = jnp.arange(objective.accumulate), parts
        (gradients, sums), _ = jax.lax.scan(add, zeros, numbered)
        return jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1.0), gradients), sums

    def step(
        state: TrainState,
        batch: Batch,
        learning_rate: jax.Array,
        key: jax.Array,
        base: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step) if execution.dropout_rate else None
        if objective.accumulate > 1:
            gradients, sums = gradient_of_parts(state.params, batch, key, base)
        else:
            gradients, sums = jax.grad(mean_fn, has_aux=True)(state.params, batch, key, base)
        norm = optax.global_norm(
            jax.tree.map(lambda g, is_trained: g if is_trained else 0.0, gradients, trained)
        )
        if optimizer.clip:
            shrink = optimizer.clip / jnp.maximum(norm, optimizer.clip)
            gradients = jax.tree.map(lambda g: g * shrink, gradients)
        before = state.opt_state.optimizer if optimizer.ema else state.opt_state
        updates, opt_state = transformation.update(gradients, before, state.params)
        params = jax.tree.map(
            lambda p, u, is_trained: p + learning_rate * u if is_trained else p,
            state.params,
            updates,
            trained,
        )
        if optimizer.ema:
            average = _averaged(state.opt_state.average, params, state.step, optimizer.ema)
            opt_state = AveragedState(opt_state, average)
        weight = jnp.maximum(sums["weight"], 1.0)
        metrics = {
            "loss": sums["loss"] / weight,
            "accuracy": sums["correct"] / weight,
            "target_tokens": sums["weight"],
            "gradient_norm": norm,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    frozen = () if lora is None else (partitioning.shardings(models.spec(config), mesh),)
    return jax.jit(
        step,
        in_shardings=(placed, partitioning.batch_sharding(mesh), replicated, replicated, *frozen),
        out_shardings=(placed, replicated),
        donate_argnums=0,
        compiler_options=_COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
    )


def _in_parts(count: int, rows: jax.Array) -> jax.Array:
    """Reshapes [B, ...] to [count, B / count, ...]: each part has some of every device's rows."""
    dealt = rows.reshape(rows.shape[0] // count, count, *rows.shape[1:])
    return jnp.moveaxis(dealt, 1, 0)


@functools.cache
def evaluation_step(
    config: models.Config, execution: models.Execution, mesh: Mesh, loss_chunk: int = 0
) -> Callable[[Params, Batch], Metrics]:
    """Returns the jitted sums of `losses.cross_entropy` alone, without dropout or smoothing."""
    if isinstance(config, models.LlamaConfig):
        config = dataclasses.replace(config, router_aux_loss_coef=0.0)
    plain = dataclasses.replace(execution, dropout_rate=0.0)
    objective = Objective(loss_chunk=loss_chunk)
    return jax.jit(
        lambda params, batch: summed_loss(config, params, batch, None, plain, objective),
        in_shardings=(
            partitioning.shardings(models.spec(config), mesh),
            partitioning.batch_sharding(mesh),
        ),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )

"""One optimiser step and one evaluation step: pure functions of (state, batch)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from mosaics_jax import collectives, dims, sharding, visibility
from mosaics_jax.config import Config, ModelConfig
from mosaics_jax.data.source import Batch
from mosaics_jax.loss import next_token_loss
from mosaics_jax.nn import model as nn_model
from mosaics_jax.nn.layers import Seed
from mosaics_jax.nn.memory import Context
from mosaics_jax.optimizer import learning_rate, make_optimizer

Metrics = dict[str, Any]

RECENT = 128  # accepted steps that a spike is held against
SKIPPED = ("", "not finite", "loss spike", "gradient norm spike")  # why, by the metric "skip"


class TrainState(NamedTuple):
    """All that a step changes, or the shapes or shardings of it.

    `step` counts batches read, `skipped` those among them that changed nothing else. `recent` [2, RECENT] float32 are
    the losses and gradient norms of the last accepted steps, in a ring; NaN where there have not been so many.
    """

    step: Any
    skipped: Any
    skipped_in_row: Any
    recent: Any
    params: Any
    opt_state: Any


def init_state(config: Config, params: dict[str, Any] | None = None) -> TrainState:
    """The state before the first step, with new weights or those given.

    Run it under jit with output shardings: nothing is then made whole anywhere.
    """
    if params is None:
        params = nn_model.to_values(nn_model.LanguageModel(config.model, config.run.seed))
    opt_state = _optimizer(config).init(params)
    zero = jnp.int32(0)
    return TrainState(zero, zero, zero, jnp.full((2, RECENT), jnp.nan, jnp.float32), params, opt_state)


def draw_delay(config: Config, step: jax.Array) -> jax.Array:
    """m ~ UniformInteger[delay_min, delay_max]: one draw of a step, shared by all layers and rows."""
    key = jax.random.fold_in(Seed(config.run.seed).fold("delay").key(), step)
    return jax.random.randint(key, (), config.model.delay_min, config.model.delay_max + 1, jnp.int32)


def make_train_step(config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`train_step(state, batch) -> (state, metrics)`. Metrics are of the weights before the update.

    A non-finite loss or gradient leaves weights and optimiser as they are, and is counted; so does, where
    `run.spike_sigma` is set, a loss or gradient norm so far above those of the last RECENT accepted steps.
    """
    optimizer, schedule = _optimizer(config), learning_rate(config.optimizer, config.run.steps)
    specs = sharding.parameter_specs(nn_model.parameter_axes(config.model))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        delay = draw_delay(config, state.step)
        tokens = batch.weight.sum()
        loss_sum, grads, health = sharding.over_mesh(
            functools.partial(_loss_and_grads, config, specs),
            (specs, sharding.BATCH, PartitionSpec()),
            (PartitionSpec(), specs, PartitionSpec()),
        )(state.params, batch, delay)
        scale = 1 / jnp.maximum(tokens, 1)
        loss, grads = loss_sum * scale, jax.tree.map(lambda grad: grad * scale, grads)
        grad_norm = optax.tree.norm(grads)
        measured = jnp.stack([loss, grad_norm])
        skip, limits = _skip(measured, state.recent, config.run.spike_sigma)
        accepted = skip == 0

        def update() -> tuple[dict[str, Any], optax.OptState]:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return optax.apply_updates(state.params, updates), opt_state

        params, opt_state = lax.cond(accepted, update, lambda: (state.params, state.opt_state))
        skipped_in_row = jnp.where(accepted, 0, state.skipped_in_row + 1)
        skipped = state.skipped + jnp.where(accepted, 0, 1)
        place = (state.step - state.skipped) % RECENT
        recent = jnp.where(accepted, state.recent.at[:, place].set(measured), state.recent)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),
            "tokens": tokens,
            "delay": delay,
            "skip": skip,
            "limits": limits,
            "skipped": skipped,
            "skipped_in_row": skipped_in_row,
            "health": health,
        }
        return TrainState(state.step + 1, skipped, skipped_in_row, recent, params, opt_state), metrics

    return train_step


def _skip(measured: jax.Array, recent: jax.Array, sigma: float) -> tuple[jax.Array, jax.Array]:
    """Why a step of this loss and gradient norm is skipped (an index of SKIPPED), and the limits of the two.

    limit = mean + sigma x standard deviation of the last RECENT accepted steps; NaN, which nothing exceeds, before
    there are as many.
    """
    limits = recent.mean(axis=1) + sigma * recent.std(axis=1) if sigma else jnp.full(2, jnp.nan, jnp.float32)
    spikes = measured > limits
    reason = jnp.where(spikes[0], 2, jnp.where(spikes[1], 3, 0))
    return jnp.where(jnp.isfinite(measured).all(), reason, 1), limits


def make_eval_step(config: Config) -> Callable[[dict[str, Any], Batch], tuple[jax.Array, jax.Array]]:
    """`eval_step(params, batch) -> (summed loss in nats, tokens predicted)`, with inference's delay."""

    def eval_step(params: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss_sum, _ = _loss_sum(params, config.model, config.run.loss_chunk, batch, config.model.delay_min)
        return collectives.total((loss_sum, batch.weight.sum()), *collectives.BATCH_AXES)

    specs = sharding.parameter_specs(nn_model.parameter_axes(config.model))

    def on_the_mesh(params: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        return sharding.over_mesh(eval_step, (specs, sharding.BATCH), PartitionSpec())(params, batch)

    return on_the_mesh


def _optimizer(config: Config) -> optax.GradientTransformation:
    return make_optimizer(config.optimizer, config.run.steps, nn_model.parameter_axes(config.model))


def _loss_sum(
    params: dict[str, Any], config: ModelConfig, chunk: int, batch: Batch, delay: jax.Array | int
) -> tuple[jax.Array, Any]:
    model = nn_model.from_values(config, params)
    time = batch.document.shape[1]
    first = collectives.first_position(time)
    whole_BT = visibility.document_start(collectives.whole_time(batch.document))
    context = Context(lax.dynamic_slice_in_dim(whole_BT, first, time, axis=1), delay, first)
    x_BTD, health = model.hidden(batch.tokens, context)
    return next_token_loss(x_BTD, model.classifier[...], batch.targets, batch.weight, chunk), health


def _loss_and_grads(
    config: Config, specs: dict[str, Any], params: dict[str, Any], batch: Batch, delay: jax.Array
) -> tuple[jax.Array, dict[str, Any], Any]:
    """The loss and gradients summed over micro-batches, and the health of the memories over all of them.

    Every device runs this on its own rows, of which micro-batch a is a, a + A, ...; `specs` say which shard of each
    weight it holds. Sums over devices that wait for nothing are made once, at the end.
    """
    count = config.run.accumulation

    def split(rows: jax.Array) -> jax.Array:
        return rows.reshape(rows.shape[0] // count, count, *rows.shape[1:]).swapaxes(0, 1)

    def add(carry: tuple[jax.Array, dict[str, Any]], micro: Batch) -> tuple[tuple[jax.Array, dict[str, Any]], Any]:
        (loss, health), grads = jax.value_and_grad(_loss_sum, has_aux=True)(
            params, config.model, config.run.loss_chunk, micro, delay
        )
        return jax.tree.map(jnp.add, carry, (loss, grads)), health

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    (loss_sum, grads), health = lax.scan(add, zeros, jax.tree.map(split, batch))
    grads = jax.tree.map(_total_of_shard, grads, specs)
    return collectives.total(loss_sum, *collectives.BATCH_AXES), grads, _whole_health(health)


def _total_of_shard(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The gradient of all tokens, for the devices that hold this shard; along the spec's own axes it is summed."""
    return collectives.total(grad, *(axis for axis in collectives.BATCH_AXES if axis not in spec))


def _whole_health(health: Any) -> Any:
    """The memories' health over the devices: counts add up, of ranges [least, mean, greatest] the widest is kept."""

    def whole(path: Any, values: jax.Array) -> jax.Array:
        if path[-1].key == "pairs":
            return collectives.total(values, *collectives.BATCH_AXES)
        axes = collectives.present(*dims.MESH_AXES)
        if not axes:
            return values
        least, mean, greatest = values[..., 0], values[..., 1], values[..., 2]
        return jnp.stack([lax.pmin(least, axes), lax.pmean(mean, axes), lax.pmax(greatest, axes)], axis=-1)

    return jax.tree_util.tree_map_with_path(whole, health)

"""One optimiser step: accumulation, the drawn delay, skipped steps, gradients of the whole model."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaics_jax.data.source import Batch, fields, pack
from mosaics_jax.nn.model import parameter_axes
from mosaics_jax.optimizer import learning_rate, make_optimizer
from mosaics_jax.step import TrainState, draw_delay, init_state, make_eval_step, make_train_step


@functools.cache
def _step(**changes: int):
    config = helpers.tiny_config(**{name.replace("__", "."): value for name, value in changes.items()})
    return jax.jit(make_train_step(config)), jax.jit(functools.partial(init_state, config))()


def _batch(rows: int = 4, seed: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 256, (rows, 33), dtype=np.int32)
    tokens[:, 11] = 256  # a document begins inside every row
    return pack(tokens, begin=256)


def _close(a: TrainState, b: TrainState, tolerance: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a.params, b.params)


def test_accumulation_equals_the_large_batch() -> None:
    whole, state = _step()
    parts, _ = _step(run__accumulation=4)
    batch = _batch()._replace(weight=np.array(_batch().weight))
    batch.weight[0] = 0  # unequal weights: the mean over tokens is not the mean of means
    after_whole, metrics_whole = whole(state, batch)
    after_parts, metrics_parts = parts(state, batch)
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(metrics_whole[name], metrics_parts[name], rtol=1e-5)
    assert float(np.sum(metrics_whole["health"]["long"]["pairs"])) == float(
        np.sum(metrics_parts["health"]["long"]["pairs"])
    )
    _close(after_whole, after_parts, 2e-5)


def test_padding_enters_neither_loss_nor_memories() -> None:
    """Rows end in padding, as best-fit packing leaves it; other ids there change no loss, gradient or new weight."""
    step, state = _step()
    rows = np.stack([np.random.default_rng(0).integers(0, 256, (4, 32)) for _ in range(2)], axis=1).astype(np.int32)
    rows[:, 0, [0, 11]] = ~np.array(256)
    results = []
    for padding in (257, 5):
        rows[:, 0, 20:], rows[:, 1, 20:] = padding, 256
        rows[:, 0, 20] = ~rows[:, 0, 20]
        batch = fields(rows, begin=256)
        assert batch.weight.sum() == 4 * 20
        results.append(step(state, batch))
    (first, metrics), (second, other) = results
    for name in ("loss", "grad_norm", "tokens"):
        assert float(metrics[name]) == float(other[name])
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_the_loss_goes_down_on_one_batch() -> None:
    step, state = _step()
    losses = []
    for _ in range(8):
        state, metrics = step(state, _batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert np.isclose(losses[0], np.log(258), rtol=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_with_bad_numbers_changes_only_counters(bad: float) -> None:
    step, state = _step()
    state, _ = step(state, _batch())
    spoiled = _batch()._replace(weight=np.full((4, 32), bad, np.float32))
    after, metrics = step(state, spoiled)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (2, 1, 1)
    assert int(metrics["skipped_in_row"]) == 1
    again, _ = step(after, _batch())
    assert (int(again.step), int(again.skipped), int(again.skipped_in_row)) == (3, 1, 0)
    straight, _ = step(state._replace(step=jnp.int32(2)), _batch())
    jax.tree.map(np.testing.assert_array_equal, again.params, straight.params)


def test_the_delay_is_drawn_from_the_seed_and_the_step() -> None:
    config = helpers.tiny_config()
    draw = jax.jit(functools.partial(draw_delay, config))
    drawn = [int(draw(jnp.int32(step))) for step in range(200)]
    assert set(drawn) == set(range(2, 7))
    assert drawn == [int(draw(jnp.int32(step))) for step in range(200)]
    other = jax.jit(functools.partial(draw_delay, helpers.tiny_config(**{"run.seed": 1})))
    assert drawn != [int(other(jnp.int32(step))) for step in range(200)]


def test_the_delay_is_data_and_never_recompiles() -> None:
    step, state = _step(run__log_every=3)
    delays = set()
    for _ in range(5):
        state, metrics = step(state, _batch())
        delays.add(int(metrics["delay"]))
    assert len(delays) > 1
    assert step._cache_size() == 1


def test_every_parameter_gets_a_gradient() -> None:
    """Also α_ψ's θ, which starts where |θ| has no derivative."""
    step, state = _step()
    state, _ = step(state, _batch())  # step 0 has learning rate 0, but Adam's moments move
    moments = optax.tree.get(state.opt_state, "mu")
    for path, moment in jax.tree_util.tree_leaves_with_path(moments):
        name = jax.tree_util.keystr(path)
        moved_L = np.any(np.asarray(moment) != 0, axis=tuple(range(1, moment.ndim)))
        assert moved_L.all() if "blocks" in name else moved_L.any(), name


def test_the_eval_step_weighs_tokens() -> None:
    config = helpers.tiny_config()
    _, state = _step()
    eval_step = jax.jit(make_eval_step(config))
    loss, tokens = eval_step(state.params, _batch())
    assert float(tokens) == _batch().weight.sum() == 4 * 31
    halves = [eval_step(state.params, jax.tree.map(lambda x, s=s: x[s], _batch())) for s in np.split(np.arange(4), 2)]
    np.testing.assert_allclose(float(loss), sum(float(half[0]) for half in halves), rtol=1e-5)


def test_the_schedule() -> None:
    config = helpers.tiny_config(**{"run.steps": 100, "optimizer.warmup_steps": 10})
    schedule = learning_rate(config.optimizer, 100)
    np.testing.assert_allclose(schedule(0), 0)
    np.testing.assert_allclose(schedule(5), 0.5e-2, rtol=1e-6)
    np.testing.assert_allclose(schedule(10), 1e-2, rtol=1e-6)
    np.testing.assert_allclose(schedule(55), (1e-2 + 1e-4) / 2, rtol=1e-5)  # halfway down the cosine
    np.testing.assert_allclose(schedule(100), 1e-4, rtol=1e-5)  # peak / 100


def test_weight_decay_acts_on_matrices_only() -> None:
    config = helpers.tiny_config(**{"optimizer.warmup_steps": 0})
    _, state = _step()
    optimizer = make_optimizer(config.optimizer, 8, parameter_axes(config.model))
    params = jax.tree.map(jnp.ones_like, state.params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    decayed = {
        jax.tree_util.keystr(path) for path, update in jax.tree_util.tree_leaves_with_path(updates) if np.any(update)
    }
    free = {"norm", "theta", "gamma"}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert (name in decayed) != any(word in name for word in free), name

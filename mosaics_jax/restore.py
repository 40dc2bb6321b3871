"""The state that a run starts from: new weights, another run's, or the newest checkpoint that is whole."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mosaics_jax import integrity, paths, processes, sharding, whole
from mosaics_jax.checkpoint import Checkpoints
from mosaics_jax.config import Config
from mosaics_jax.local_checkpoint import LocalCheckpoints
from mosaics_jax.nn.model import parameter_axes
from mosaics_jax.record import FREE_MODEL_FIELDS, RunRecord, check_same_run, tokenizer_of
from mosaics_jax.step import TrainState, init_state


class Start(NamedTuple):
    """Where a life of a run begins. `tier`: durable, local, or "" for new weights."""

    state: TrainState
    step: int
    tier: str
    seconds: float


def make_state(
    config: Config, mesh: Mesh, checkpoints: Checkpoints, local: LocalCheckpoints | None, record: RunRecord,
    say: Callable[[str], None],
) -> Start:  # fmt: skip
    """The newest state that is whole, in its shardings; a checkpoint that is damaged is moved aside, and said.

    Raises ValueError where the newest is another run's, and UnreadableError where one cannot be looked at.
    """
    began = time.perf_counter()
    shapes = jax.eval_shape(lambda: init_state(config))
    shardings = state_shardings(config, mesh, shapes)
    abstract = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
    for step, tier in _candidates(checkpoints, local):
        tried: Checkpoints | LocalCheckpoints = checkpoints
        if tier == "local":
            assert local is not None
            tried = local
        problem = checkpoints.problem(step) if tier == "durable" else ""
        if not problem:
            problem = integrity.agreed(functools.partial(_damage, tried, step, record), f"record of checkpoint {step}")
        if not problem:
            try:
                return Start(tried.restore(step, abstract), step, tier, time.perf_counter() - began)
            except ValueError as error:
                problem = str(error)
        where = tried.set_aside(step)
        say(f"{tier} checkpoint {step} is damaged ({problem}); it lies in {where} now, and an older one is tried")
    params = initial_weights(config, shapes.params, shardings.params) if config.init_from else None
    state = jax.jit(functools.partial(init_state, config), out_shardings=shardings)(params)
    return Start(state, 0, "", time.perf_counter() - began)


def _candidates(checkpoints: Checkpoints, local: LocalCheckpoints | None) -> list[tuple[int, str]]:
    """Newest first, and of two at one step the local. What process 0 finds holds for all."""
    durable = json.loads(processes.exchange(json.dumps(checkpoints.steps()), "durable checkpoints")[0])
    found = [(step, "durable") for step in durable] + [(step, "local") for step in (local.steps() if local else [])]
    return sorted(found, reverse=True)


def _damage(tier: Checkpoints | LocalCheckpoints, step: int, record: RunRecord) -> str:
    """What is wrong with the record of a checkpoint, or "". Raises ValueError for that of another run or version."""
    try:
        saved = tier.record(step)
    except whole.DamagedError as error:
        return str(error)
    # The checkpoint that a change of data starts from was made with the old; the workdir's record has accepted that.
    accepted = any(change["step"] >= step for change in record.data_changes)
    check_same_run(saved, record, f"checkpoint {step}", accepted)
    return ""


def state_shardings(config: Config, mesh: Mesh, shapes: TrainState) -> TrainState:
    """Shardings of a train state: the optimiser's moments lie as their parameters do, counters everywhere."""
    params = sharding.parameter_shardings(mesh, parameter_axes(config.model), shapes.params)
    structure: Any = jax.tree.structure(shapes.params)

    def like_params(node: Any) -> bool:
        return bool(structure == jax.tree.structure(node))

    opt_state = jax.tree.map(
        lambda node: params if like_params(node) else sharding.replicated(mesh), shapes.opt_state, is_leaf=like_params
    )
    everywhere = sharding.replicated(mesh)
    return TrainState(everywhere, everywhere, everywhere, everywhere, params, opt_state)


def check_initial(config: Config, tokenizer_fingerprint: str) -> None:
    """Raises ValueError where the run of `config.init_from` has another model or tokenizer, or no weights."""
    workdir = paths.absolute(config.init_from)
    checkpoints = Checkpoints(workdir)
    try:
        record = checkpoints.record(checkpoints.chosen(None))
    finally:
        checkpoints.close()
    saved = Config.from_dict(record.config).model
    differing = [
        f"--config.model.{field.name}={getattr(saved, field.name)!r} (not {getattr(config.model, field.name)!r})"
        for field in dataclasses.fields(saved)
        if field.name not in FREE_MODEL_FIELDS and getattr(saved, field.name) != getattr(config.model, field.name)
    ]
    if differing:
        raise ValueError(f"init_from is {config.init_from!r}, whose model is another; legal: {', '.join(differing)}")
    if tokenizer_of(workdir, record).fingerprint != tokenizer_fingerprint:
        raise ValueError(
            f"init_from is {config.init_from!r}, whose tokenizer is not the corpus's; prepare the corpus with "
            f"--tokenizer={workdir / 'tokenizer'}"
        )


def initial_weights(config: Config, shapes: Any, shardings: Any) -> Any:
    """The newest weights of the run `config.init_from`, in these shardings."""
    checkpoints = Checkpoints(paths.absolute(config.init_from))
    try:
        abstract = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
        return checkpoints.params(checkpoints.chosen(None), abstract)
    finally:
        checkpoints.close()

"""Run by `mesh_test.py` in a process of its own, which has eight CPU devices: one model on many meshes.

Writes, for every mesh: losses and delays of 20 steps on packed rows, and the first step's gradients; and what the
program that makes the state holds.
"""

import functools
import json
import pathlib
import re
import sys
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mosaics_jax import sharding
from mosaics_jax.config import Config
from mosaics_jax.data.source import Batch
from mosaics_jax.nn.model import parameter_axes
from mosaics_jax.restore import state_shardings
from mosaics_jax.step import _loss_and_grads, init_state, make_eval_step, make_train_step

DEVICES, STEPS = 8, 20
MESHES: dict[str, dict[str, int]] = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "fsdp_sequence": {"fsdp": 2, "sequence": 4},
    "sequence": {"sequence": 8},
    "data_sequence_tensor": {"data": 2, "sequence": 2, "tensor": 2},
}


def config(name: str, **mesh: int) -> Config:
    """The window is longer than an eighth of the context, and so is the delay."""
    changes: dict[str, Any] = {f"mesh.{axis}": size for axis, size in mesh.items()}
    changes |= {"model.width": 32, "model.heads": 4, "model.ffn_width": 48, "model.window": 12, "model.remat": "dots"}
    changes |= {"model.delay_min": 3, "model.delay_max": 11, "data.batch": 16, "data.context": 64, "run.steps": STEPS}
    if name == "transformer":
        changes |= {"model.architecture": "transformer", "model.memories": ("short", "long")}
    return helpers.tiny_config("", **changes, **{"run.accumulation": 2})


def batches(of: Config) -> list[Batch]:
    """Rows of several documents, one row of a single one, some positions without weight."""
    rng = np.random.default_rng(0)
    shape = (of.data.batch, of.data.context)
    made = []
    for _ in range(STEPS):
        tokens = rng.integers(0, 7, (shape[0], shape[1] + 1)).astype(np.int32)
        document = np.sort(rng.integers(0, 5, shape), axis=1).astype(np.int32)
        document[0] = 0
        weight = (rng.random(shape) < 0.9).astype(np.float32)
        made.append(Batch(tokens[:, :-1], tokens[:, 1:], document, np.zeros(shape, np.int32), weight))
    return made


def run(of: Config, devices: int) -> dict[str, np.ndarray]:
    mesh = sharding.make_mesh(of.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init_state(of))
        make = jax.jit(lambda: init_state(of), out_shardings=state_shardings(of, mesh, shapes)).lower().compile()
        state = make()
        specs = sharding.parameter_specs(parameter_axes(of.model))
        rows = [jax.device_put(batch, NamedSharding(mesh, sharding.BATCH)) for batch in batches(of)]
        everywhere = PartitionSpec()
        gradients = sharding.over_mesh(
            functools.partial(_loss_and_grads, of, specs),
            (specs, sharding.BATCH, everywhere),
            (everywhere, specs, everywhere),
        )
        evaluate = make_eval_step(of)
        both = jax.jit(lambda params, batch, delay: (gradients(params, batch, delay), evaluate(params, batch)))
        (_, grads, health), evaluated = jax.device_get(both(state.params, rows[0], jnp.int32(5)))
        result = {
            f"grad{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        }
        result |= {f"health{jax.tree_util.keystr(path)}": x for path, x in jax.tree_util.tree_leaves_with_path(health)}
        result["eval"] = np.stack(evaluated)
        step = jax.jit(make_train_step(of), donate_argnums=0)
        losses, delays = [], []
        for batch in rows:
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            delays.append(int(metrics["delay"]))
        whole = ",".join(map(str, shapes.params["blocks"]["persistent"]["W_1"].shape))
        result["makes_whole"] = np.asarray(re.search(rf"f32\[{whole}\]", make.as_text()) is not None)
        return result | {"loss": np.asarray(losses), "delay": np.asarray(delays)}


def parameters(name: str) -> int:
    shapes = jax.eval_shape(lambda: init_state(config(name))).params
    return sharding.count(shapes)


def programs(directory: pathlib.Path) -> None:
    """The text of the compiled train step on some meshes, and the sizes of their axes."""
    meshes = {name: MESHES[name] for name in ("data", "fsdp_tensor")}
    meshes["fsdp_sequence_long_stretches"] = {"fsdp": 4, "sequence": 2}  # longer than the window
    for name, sizes in meshes.items():
        of = config("mosaic", **sizes)
        mesh = sharding.make_mesh(of.mesh, jax.devices())
        with jax.set_mesh(mesh):
            shapes = jax.eval_shape(lambda of=of: init_state(of))
            placed = state_shardings(of, mesh, shapes)
            state = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, placed)
            rows = NamedSharding(mesh, sharding.BATCH)
            batch = jax.tree.map(lambda x, d=rows: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=d), batches(of)[0])
            step = jax.jit(make_train_step(of), donate_argnums=0, out_shardings=(placed, None))
            (directory / f"{name}.hlo").write_text(step.lower(state, batch).compile().as_text())
            (directory / f"{name}.json").write_text(json.dumps(dict(mesh.shape)))


def main(name: str, directory: str, mesh: str = "") -> None:
    if name == "programs":
        return programs(pathlib.Path(directory))
    devices = int(np.prod(list(MESHES[mesh].values())))
    found = run(config(name, **MESHES[mesh]), devices)
    np.savez(pathlib.Path(directory) / f"{mesh}.npz", **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main(*sys.argv[1:])

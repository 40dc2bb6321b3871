"""What the devices of a mesh tell one another while they compute one loss.

Inside `sharding.over_mesh` every device runs the program on its own shards: its rows, its stretch of time, its heads.
The functions here are all that passes between them, each written with its own derivative, so that the collectives of a
step are those that stand in the code. Without a mesh, or along an axis of one device, each is the identity.

Every device differentiates its own part of the loss. Along `tensor` activations of the model width are whole on every
device, as are their gradients; `enter` and `leave` bracket what is computed head by head or feature by feature.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from mosaics_jax import dims

BATCH_AXES = (dims.DATA, dims.FSDP, dims.SEQUENCE)  # along these, devices hold different tokens


def size(axis: str) -> int:
    """Devices along a mesh axis; 1 outside `over_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def index(axis: str) -> jax.Array | int:
    """This device's place along a mesh axis."""
    return lax.axis_index(axis) if size(axis) > 1 else 0


def present(*axes: str) -> tuple[str, ...]:
    """Those axes that have more than one device."""
    return tuple(axis for axis in axes if size(axis) > 1)


def total[Tree](values: Tree, *axes: str) -> Tree:
    """The sum over devices. For numbers that are not differentiated further."""
    return lax.psum(values, axes) if (axes := present(*axes)) else values


def greatest(values: jax.Array, *axes: str) -> jax.Array:
    """The maximum over devices, which carries no gradient."""
    return lax.pmax(lax.stop_gradient(values), axes) if (axes := present(*axes)) else values


# --- Weights: cut along fsdp where they are stored, whole where they are used. ---


def gathered(weight: jax.Array, dimension: int, dtype: DTypeLike) -> jax.Array:
    """A stored weight in the type of compute, whole along fsdp.

    Travels in `dtype`; the gradient is summed over devices in the weight's own type, and each keeps its shard.
    """
    if size(dims.FSDP) == 1:
        return weight.astype(dtype)
    return _gathered(dimension, jnp.dtype(dtype), weight.dtype, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(dimension: int, dtype: jnp.dtype, stored: jnp.dtype, weight: jax.Array) -> jax.Array:
    return lax.all_gather(weight.astype(dtype), dims.FSDP, axis=dimension, tiled=True)


def _gathered_forward(dimension: int, dtype: jnp.dtype, stored: jnp.dtype, weight: jax.Array) -> tuple[jax.Array, None]:
    return _gathered(dimension, dtype, stored, weight), None


def _gathered_backward(
    dimension: int, dtype: jnp.dtype, stored: jnp.dtype, _: None, grad: jax.Array
) -> tuple[jax.Array]:
    return (scattered(grad.astype(stored), dimension),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def scattered(grad: jax.Array, dimension: int) -> jax.Array:
    """The sum over fsdp, of which each device keeps its shard."""
    if size(dims.FSDP) == 1:
        return grad
    return lax.psum_scatter(grad, dims.FSDP, scatter_dimension=dimension, tiled=True)


# --- tensor: heads, feed-forward features and vocabulary are dealt out; the model width is whole everywhere. ---


def enter(x_BTD: jax.Array) -> jax.Array:
    """Before work that is dealt out over tensor: the identity, whose gradients of all devices add up."""
    return _enter(x_BTD) if size(dims.TENSOR) > 1 else x_BTD


def leave(x_BTD: jax.Array) -> jax.Array:
    """After it: the sum of the devices' parts, each of which gets the whole gradient."""
    if size(dims.TENSOR) == 1:
        return x_BTD
    return checkpoint_name(_leave(x_BTD), "summed")  # backward need not ask the other devices again


def whole_vocabulary(logits_BTV: jax.Array) -> jax.Array:
    """Logits of all ids, where each device has those of its part. For decoding: it is not differentiated."""
    if size(dims.TENSOR) == 1:
        return logits_BTV
    return lax.all_gather(logits_BTV, dims.TENSOR, axis=-1, tiled=True)


@jax.custom_vjp
def _enter(x_BTD: jax.Array) -> jax.Array:
    return x_BTD


_enter.defvjp(lambda x_BTD: (x_BTD, None), lambda _, grad_BTD: (lax.psum(grad_BTD, dims.TENSOR),))


@jax.custom_vjp
def _leave(x_BTD: jax.Array) -> jax.Array:
    return lax.psum(x_BTD, dims.TENSOR)


_leave.defvjp(lambda x_BTD: (_leave(x_BTD), None), lambda _, grad_BTD: (grad_BTD,))


# --- sequence: each device holds a stretch of T positions of every row, in the order of the axis. ---


def first_position(time: int) -> jax.Array | int:
    """Where in the row this device's stretch of `time` positions begins."""
    return index(dims.SEQUENCE) * time


def whole_time(array_BTX: jax.Array) -> jax.Array:
    """All positions of the rows. Backward, each device gets the summed gradient of its stretch."""
    if size(dims.SEQUENCE) == 1:
        return array_BTX
    return lax.all_gather(array_BTX, dims.SEQUENCE, axis=1, tiled=True)


def every_stretch(array: jax.Array) -> jax.Array:
    """What each stretch has, [stretches, ...]."""
    return lax.all_gather(array, dims.SEQUENCE) if size(dims.SEQUENCE) > 1 else array[None]


def with_preceding(array_BTX: jax.Array, count: int) -> jax.Array:
    """The stretch with the `count` positions before it, 0 where the row had not begun.

    Every device sends its last positions to the next; to those beyond, where a stretch is shorter than `count`. No
    more precedes than the other stretches hold, so the result may have fewer than `count` positions in front.
    """
    stretches, time = size(dims.SEQUENCE), array_BTX.shape[1]
    parts = [array_BTX]
    for hop in range(1, stretches):
        moved = min(time, count - (hop - 1) * time)
        if moved <= 0:
            break
        last_BTX = array_BTX[:, time - moved :]
        parts.insert(0, lax.ppermute(last_BTX, dims.SEQUENCE, [(i, i + hop) for i in range(stretches - hop)]))
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else array_BTX


def successor(array_BTX: jax.Array) -> jax.Array:
    """What stands at the next position of the row; 0 at its end."""
    stretches = size(dims.SEQUENCE)
    first_B1X = array_BTX[:, :1]
    if stretches > 1:
        after_B1X = lax.ppermute(first_B1X, dims.SEQUENCE, [(i + 1, i) for i in range(stretches - 1)])
    else:
        after_B1X = jnp.zeros_like(first_B1X)
    return jnp.concatenate([array_BTX[:, 1:], after_B1X], axis=1)

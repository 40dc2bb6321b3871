"""The reads that are timed: ours and other makers' attention of the same work. Queries are keys."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from launch.gpu.problem import Place, Setting, places, random_arrays
from launch.gpu.programs import WHAT, Flat, Made, Program, read, read_arguments, read_kernels, struct, with_gradients
from pallas_kernels.retrieval import peers, retrieve


def arrays(setting: Setting, time: int) -> Program:
    """No arguments -> (cotangent, key, value)."""
    shape = (1, time, setting.heads, setting.width)
    return Program(f"arrays T = {time}", lambda: Made(lambda: random_arrays(shape), ()))


def _read_program(
    setting: Setting, name: str, what: str, time: int, operation: Any, kernels: dict[str, str]
) -> Program:
    """(cotangent, key, value, bandwidth, start, stop) -> output, or output and gradients of key, value, bandwidth."""
    cotangent, key, _, value, *rest = read_arguments(1, time, setting.heads, setting.width)
    one_array = lambda key, *others: operation(key, key, *others)  # noqa: E731
    if what == "forward":
        function: Flat = lambda cotangent, *given: (one_array(*given),)  # noqa: E731
        ran = tuple(kernels.values())[:1]
    else:
        function, ran = with_gradients(one_array, (0, 1, 2)), tuple(kernels.values())
    made = functools.partial(Made, function, (cotangent, key, value, *rest))
    return Program(f"{name}, {what}, T = {time}", made, ran)


def hopper(setting: Setting, what: str, time: int) -> Program:
    return _read_program(setting, "hopper", what, time, read(setting), read_kernels(setting.width))


def xla(setting: Setting, what: str, time: int) -> Program:
    return _read_program(setting, "xla", what, time, functools.partial(retrieve, implementation="xla"), {})


def peer(setting: Setting, by: str, what: str, place: Place) -> Program:
    """The attention alone, of arrays made ready for it (`peers.shifted`): (cotangent, query, key, value[, ids])."""
    window = None if place.memory == "long-term" else setting.window - 1
    operation = peers.attention(by, window, stand_in=setting.interpret)
    cotangent, query, key, value, *_ = read_arguments(1, place.time, setting.heads, setting.width)
    arguments = [
        struct(*array.shape, dtype=peers.dtype(by, stand_in=setting.interpret)) for array in (query, key, value)
    ]
    if place.rows == "packed":
        arguments.append(struct(1, place.time, dtype=jnp.int32))
    if what == "forward":
        function: Flat = lambda cotangent, *given: (operation(*given),)  # noqa: E731
    else:
        function = with_gradients(operation, (0, 1, 2))
    name = f"{by}, {what}, {place}"
    return Program(name, functools.partial(Made, function, (cotangent, *arguments)), carried=by != "cudnn")


def tokamax(setting: Setting, what: str, time: int) -> Program:
    """tokamax over intervals: (cotangent, query, key, value, start, stop) -> output, or output and three gradients."""
    cotangent, query, key, value, _, *ends = read_arguments(1, time, setting.heads, setting.width)
    operation = functools.partial(peers.tokamax_attention, implementation="xla" if setting.interpret else "mosaic_gpu")
    function = with_gradients(operation, (0, 1, 2))
    if what == "forward":
        function = lambda cotangent, *given: (operation(*given),)  # noqa: E731
    made = functools.partial(Made, function, (cotangent, query, key, value, *ends))
    return Program(f"tokamax, {what}, T = {time}", made, carried=False)


def ready(setting: Setting, time: int, shift: int) -> Program:
    """(cotangent, key, value, bandwidth) -> (cotangent, query, key, value) as a peer wants them."""
    cotangent, key, _, value, bandwidth, *_ = read_arguments(1, time, setting.heads, setting.width)

    def function(cotangent: jax.Array, key: jax.Array, value: jax.Array, bandwidth: jax.Array) -> tuple[jax.Array, ...]:
        return peers.earlier(cotangent, shift), *peers.shifted(key, key, value, bandwidth, shift)

    made = functools.partial(Made, function, (cotangent, key, value, bandwidth))
    return Program(f"ready for peers, shift {shift}, T = {time}", made)


def peers_of(place: Place, what: str) -> list[str]:
    """Those that can do the work of a place, or nearly: jax's own kernel is causal, forward, and knows no window."""
    if place.rows == "packed":
        return ["jla"]
    mosaic = ["jax"] if place.memory == "long-term" and what == "forward" else []
    return ["cudnn", "jla", *mosaic]


def shift(setting: Setting, place: Place) -> int:
    """How far a peer's queries are moved ahead so that causal attention is the read; those of packed rows are not."""
    if place.rows == "packed":
        return 0
    return setting.delay if place.memory == "long-term" else 1


def xla_lengths(setting: Setting) -> list[int]:
    return list(dict.fromkeys((*setting.more[:1], setting.time)))


def all_programs(setting: Setting) -> list[Program]:
    """tokamax's are not among them: it is not among the packages that compiling here has."""
    all_places = [place for group in places(setting).values() for place in group]
    found = []
    for length in dict.fromkeys(place.time for place in all_places):
        found.append(arrays(setting, length))
        found += [hopper(setting, what, length) for what in WHAT]
    for place in all_places:
        found.append(ready(setting, place.time, shift(setting, place)))
        found += [peer(setting, by, what, place) for what in WHAT for by in peers_of(place, what)]
    return found + [xla(setting, what, length) for length in xla_lengths(setting) for what in WHAT]

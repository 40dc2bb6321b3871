"""`retrieve` beside other makers' attention of the same work, by turns in one process; each checked, then timed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from launch.gpu import problem as lib
from launch.gpu.parts import read_programs as programs
from launch.gpu.parts.context import Call, Context, by_turns, errors, spread
from launch.gpu.problem import Place
from launch.gpu.programs import WHAT
from pallas_kernels.retrieval import peers

OURS = {"hopper": lib.model_bandwidth, "hopper, small bandwidth": lib.small_bandwidth}


def checked(part: str) -> list[str]:
    """Whose bandwidths a part's answers are carried for; peers have the small one."""
    return {"reads_long": list(OURS), "reads_short_and_packed": list(OURS), "reads_more": ["hopper"]}[part]


def contestants(part: str, place: Place, what: str) -> list[str]:
    ours = list(OURS) if part == "reads_long" else ["hopper"]
    return ours + programs.peers_of(place, what)


def answer_name(place: Place, by: str) -> str:
    return f"{place}, {by}"


def answers_of(part: str, place: Place) -> list[str]:
    """Whose answers are carried for a place. No peer does packed rows' work exactly."""
    return checked(part)[: 1 if place.rows == "packed" else None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the clock sees of a contestant, and how its first results become those of the operation."""

    call: Call
    pairs: int
    error: dict[str, Any]


def run(context: Context, part: str) -> None:
    setting = context.setting
    for place in lib.places(setting)[part]:
        made = context.load(programs.arrays(setting, place.time))()
        ends = lib.interval(setting, place)
        for what in WHAT:
            entries: dict[str, Entry] = {}
            for by in contestants(part, place, what):
                fields = {"by": by, **dataclasses.asdict(place), "what": what}
                with context.attempt(**fields):
                    if by in OURS:
                        entry = _ours(context, part, place, what, by, made, ends)
                    else:
                        entry = _peer(context, part, place, what, by, made)
                    context.record("check", **fields, **entry.error)
                    if entry.error["ok"]:
                        entries[by] = entry
                    else:  # the check is what failed
                        context.record("figure", **fields, missing="wrong values", failed=False)
            times = by_turns({by: entry.call for by, entry in entries.items()}, setting.seconds)
            for by, entry in entries.items():
                figures = spread(times[by], times.get("hopper"))
                rate = lib.flops(setting, entry.pairs, what) / figures["milliseconds"] / 1e9
                context.record(
                    "figure", by=by, **dataclasses.asdict(place), what=what, **figures, pairs=entry.pairs, tflops=rate
                )


def _ours(context: Context, part: str, place: Place, what: str, by: str, made: tuple[Any, ...], ends: Any) -> Entry:
    """The operation whole. Queries are keys."""
    import jax

    cotangent, key, value = made
    bandwidth = OURS[by](context.setting, place)
    arguments = (cotangent, key, value, *map(jax.device_put, (bandwidth, *ends)))
    call, results = context.first(programs.hopper(context.setting, what, place.time), *arguments)
    measured = lib.sampled(dict(zip(lib.NAMES, results, strict=False)), place.time)
    return Entry(
        functools.partial(call, *arguments), lib.pairs(ends), _check(context, part, place, by, bandwidth, measured)
    )


def _peer(context: Context, part: str, place: Place, what: str, by: str, made: tuple[Any, ...]) -> Entry:
    """The attention alone, of arrays made ready for it."""
    import jax

    setting = context.setting
    shift = programs.shift(setting, place)
    bandwidth = lib.small_bandwidth(setting, place)
    arguments = context.load(programs.ready(setting, place.time, shift))(*made, jax.device_put(bandwidth))
    arguments = tuple(array.astype(peers.dtype(by, stand_in=setting.interpret)) for array in arguments)
    if place.rows == "packed":
        arguments = (*arguments, jax.device_put(lib.documents(setting, place)))
    call, results = context.first(programs.peer(setting, by, what, place), *arguments)
    if place.rows == "packed":  # the present pair too, and without a delay: nearly the same work, not the same numbers
        count = lib.pairs(lib.causal_interval(setting, place))
        return Entry(functools.partial(call, *arguments), count, {"errors": {}, "ok": True, "not_the_same": True})
    measured = lib.sampled(_as_the_operation(results, shift), place.time)
    error = _check(context, part, place, "hopper, small bandwidth", bandwidth, measured)
    return Entry(functools.partial(call, *arguments), lib.pairs(lib.interval(setting, place)), error)


def _as_the_operation(results: tuple[Any, ...], shift: int) -> dict[str, np.ndarray]:
    """A peer's output and gradients as those of `retrieve`: queries go back to where they were, and are keys."""

    def later(array: Any) -> np.ndarray:
        array = np.asarray(array)[:, :, -1:].astype(np.float64)
        return np.concatenate([np.zeros_like(array[:, :shift]), array[:, : array.shape[1] - shift]], axis=1)

    output, *gradients = results
    found = {"output": later(output)}
    if gradients:
        query_grad, key_grad, value_grad = gradients
        keys = np.asarray(key_grad)[:, :, -1:].astype(np.float64)
        found |= {"d_key": keys + lib.SMALL_BANDWIDTH * later(query_grad), "d_value": np.asarray(value_grad)}
    return found


def _check(
    context: Context, part: str, place: Place, by: str, bandwidth: np.ndarray, measured: dict[str, np.ndarray]
) -> dict[str, Any]:
    if by not in answers_of(part, place):
        return {"errors": {}, "ok": True, "not_checked": True}
    expected = context.bundle.answers(answer_name(place, by)) or lib.answer(context.setting, place, bandwidth)
    return errors(measured, lib.of_one_array(expected))


def xla(context: Context) -> None:
    """The XLA path by itself: a loop of thousands of small kernels, which would make the others wait."""
    import jax

    setting = context.setting
    for time in programs.xla_lengths(setting):
        for memory in ("long-term", "short-term"):
            place = Place(memory, "unpacked", time)
            for what in WHAT:
                fields = {"by": "xla", **dataclasses.asdict(place), "what": what}
                with context.attempt(**fields):
                    ends = lib.interval(setting, place)
                    bandwidth = lib.model_bandwidth(setting, place)
                    made = context.load(programs.arrays(setting, time))()
                    arguments = (*made, *map(jax.device_put, (bandwidth, *ends)))
                    call, _ = context.first(programs.xla(setting, what, time), *arguments)
                    figures = spread(by_turns({"xla": functools.partial(call, *arguments)}, setting.seconds)["xla"])
                    rate = lib.flops(setting, lib.pairs(ends), what) / figures["milliseconds"] / 1e9
                    context.record("figure", **fields, **figures, pairs=lib.pairs(ends), tflops=rate)


def tokamax(context: Context) -> None:
    """tokamax's Mosaic kernels over the very intervals, packed rows too, where it is installed."""
    import jax

    setting = context.setting
    groups = lib.places(setting)
    for place in (*groups["reads_long"], *groups["reads_short_and_packed"]):
        for what in WHAT:
            fields = {"by": "tokamax", **dataclasses.asdict(place), "what": what}
            with context.attempt(**fields):
                made = context.load(programs.arrays(setting, place.time))()
                bandwidth = jax.device_put(lib.small_bandwidth(setting, place))
                ready = context.load(programs.ready(setting, place.time, 0))(*made, bandwidth)
                ends = lib.interval(setting, place)
                arguments = (*ready, *map(jax.device_put, ends))
                call, _ = context.first(programs.tokamax(setting, what, place.time), *arguments)
                calls = {"tokamax": functools.partial(call, *arguments)}
                figures = spread(by_turns(calls, setting.seconds)["tokamax"])
                rate = lib.flops(setting, lib.pairs(ends), what) / figures["milliseconds"] / 1e9
                context.record("figure", **fields, **figures, pairs=lib.pairs(ends), tflops=rate)


RUN: dict[str, Callable[[Context], None]] = {
    **{part: functools.partial(run, part=part) for part in ("reads_long", "reads_short_and_packed", "reads_more")},
    "xla": xla,
    "tokamax": tokamax,
}

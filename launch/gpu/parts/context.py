"""What a part is given: sizes, the bundle, what is broken, and where to write; and how it loads and times programs."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.gpu.bundle.read import CARRIED, Bundle, Loaded, compile_here
from launch.gpu.problem import Setting
from launch.gpu.programs import Program
from launch.gpu.records import COMPILING, Recorder, first_line

# Of bfloat16 products: the norm of the error over the norm of the answer, at the positions that are compared. What is
# left of a bandwidth's gradient after its terms have cancelled is rougher; interpreted on a CPU it reaches 1.7e-2.
TOLERANCE = 2e-2
TOLERANCES = {"d_bandwidth": 5e-2}
Call = Callable[[], Any]
_PEERS = ("torch", "tokamax", "jla")  # packages that need not be there


class Skipped(Exception):
    """A program that is not run, with the reason."""


@dataclasses.dataclass
class Context:
    """`broken`: the reason by kernel, for those that failed or hung before."""

    setting: Setting
    bundle: Bundle
    record: Recorder
    broken: dict[str, str]
    _loaded: dict[str, Loaded] = dataclasses.field(default_factory=dict)

    def load(self, program: Program) -> Callable[..., tuple[Any, ...]]:
        """The program, carried or compiled here."""
        return self._load(program).call

    def _load(self, program: Program) -> Loaded:
        """And a record of which it was.

        Raises:
          Skipped: a kernel in it is broken.
          Exception: whatever compiling raises.
        """
        for kernel in program.kernels:
            if kernel in self.broken:
                raise Skipped(f"{kernel}: {self.broken[kernel]}")
        if program.name not in self._loaded:
            loaded = self.bundle.load(program, lambda: self.record(COMPILING, name=program.name))
            self._note(program, loaded)
        return self._loaded[program.name]

    def _note(self, program: Program, loaded: Loaded) -> None:
        self._loaded[program.name] = loaded
        self.record("program", name=program.name, how=loaded.how, why=loaded.why, seconds=loaded.seconds)

    def first(self, program: Program, *arguments: Any) -> tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...]]:
        """The loaded program, and the results of its first run, which is waited for.

        A carried one that loads and does not run is compiled here.
        """
        import jax

        loaded = self._load(program)
        try:
            with self.record.running(program.name, program.kernels, blame=loaded.how != CARRIED):
                return loaded.call, jax.block_until_ready(loaded.call(*arguments))
        except Exception as error:
            if loaded.how != CARRIED:
                raise
            self.record(COMPILING, name=program.name)
            loaded = compile_here(program, f"carried, it does not run: {first_line(error)}")
            self._note(program, loaded)
        with self.record.running(program.name, program.kernels):
            return loaded.call, jax.block_until_ready(loaded.call(*arguments))

    @contextlib.contextmanager
    def attempt(self, kind: str = "figure", **fields: Any) -> Iterator[None]:
        """Around what ends in a record of `kind`: what is raised instead is recorded in its place, and goes no further.

        A peer that is not installed did not fail, and a kernel that is not run again has failed before; a peer that
        breaks as it loads, or anything else, has failed.
        """
        try:
            yield
        except Skipped as skipped:
            self.record(kind, **fields, missing=f"skipped: {skipped}", failed=False)
        except Exception as error:
            absent = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _PEERS
            self.record(kind, **fields, missing="not installed" if absent else first_line(error), failed=not absent)


def by_turns(calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
    """Milliseconds a call in every round; the calls take turns, so that a drift of the clock hits all alike.

    In a turn of 20 ms or more, one call is sent after the other and waited for once. `seconds`: about what one
    contestant may take in all; 3 to 30 rounds, or one where a call alone takes as long.
    """
    import jax

    counts, rounds = {}, 30
    for name, call in calls.items():
        begin = time.perf_counter()
        jax.block_until_ready(call())
        single = time.perf_counter() - begin
        counts[name] = max(1, min(200, math.ceil(0.02 / single)))
        rounds = min(rounds, 1 if single > seconds else max(3, int(seconds / (single * counts[name]))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(counts[name]):
                result = call()
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - begin) / counts[name] * 1e3)
            del result
    return times


def spread(times: Sequence[float], beside: Sequence[float] | None = None) -> dict[str, float]:
    """The figures of a contestant; `ratio`: how many times as long as `beside` it takes, the median over the rounds."""
    figures = {
        "milliseconds": float(np.median(times)), "least": min(times), "greatest": max(times), "rounds": len(times)
    }  # fmt: skip
    if beside is not None:
        figures["ratio"] = float(np.median(np.asarray(times) / np.asarray(beside)))
    return figures


def errors(measured: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """|measured - expected| / |expected| in the 2-norm, of each array that both name; and whether all are small."""
    found = {}
    for name, truth in expected.items():
        if name in measured:
            truth = np.asarray(truth, np.float64)
            distance = np.linalg.norm(np.asarray(measured[name]).astype(np.float64) - truth)
            found[name] = float(distance / (np.linalg.norm(truth) or 1.0))
    ok = all(error <= TOLERANCES.get(name, TOLERANCE) for name, error in found.items())  # a NaN is not small
    return {"errors": found, "ok": ok}

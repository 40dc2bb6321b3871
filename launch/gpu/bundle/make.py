"""Compiles and serialises one program, and makes the float64 answers: what `python -m launch.gpu.bundle` is made of."""

import contextlib
import lzma
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch.gpu import problem as lib
from launch.gpu.bundle import wheels
from launch.gpu.parts import canary, cases, read_programs, reads, recurrence, train, variants
from launch.gpu.parts.__main__ import SETTINGS
from launch.gpu.programs import CANARY, Program, file_name
from launch.gpu.records import first_line
from pallas_kernels import choice, h100


def names(setting: str) -> list[str]:
    """All that can be made without a GPU, and no interpreted kernels, which cannot be written; the longest first."""
    found = [program for program in everything(setting).values() if program.carried]
    found = [program for program in found if setting == "card" or not program.kernels]
    found.sort(key=lambda program: (program.name != "train step", not program.kernels))
    return [program.name for program in found]


def everything(setting: str) -> dict[str, Program]:
    """All programs of the suite, by name."""

    modules = (canary, read_programs, recurrence, cases, variants, train)
    found = [program for module in modules for program in module.all_programs(SETTINGS[setting])]
    return {program.name: program for program in found}


def make_program(directory: str, setting: str, name: str) -> dict[str, Any]:
    """Compiles, serialises and writes one program; returns its entry of the manifest."""

    program, begin = everything(setting)[name], time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            if setting == "card":
                stack.enter_context(choice.compiling_for("9.0"))
                stack.enter_context(_peers_on_an_h100(pathlib.Path(directory)))
            function, arguments, donate = program.make()
            options: dict[str, Any] = {"donate_argnums": donate}
            if setting == "card":
                sharding = _h100()
                arguments = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments)
                if not arguments:
                    options["out_shardings"] = sharding
            compiled = jax.jit(function, **options).lower(*arguments).compile()
            payload, _, results = serialize_executable.serialize(compiled)
    except Exception as error:  # of many kinds: a peer's, the compiler's
        return {"missing": first_line(error), "seconds": time.monotonic() - begin}
    packed = lzma.compress(payload)
    path = pathlib.Path(directory) / "programs" / f"{file_name(name)}.xz"
    partial = path.with_suffix(".partial")
    partial.write_bytes(packed)
    os.replace(partial, path)
    return {
        "bytes": len(packed), "arguments": len(arguments), "results": results.num_leaves,
        "seconds": time.monotonic() - begin,
    }  # fmt: skip


def _h100() -> Any:

    return NamedSharding(Mesh(h100.devices(1), "device"), PartitionSpec())


@contextlib.contextmanager
def _peers_on_an_h100(directory: pathlib.Path) -> Iterator[None]:
    """Within: the peers' packages can be imported, and believe that they run on an H100."""
    with tempfile.TemporaryDirectory() as site:
        wheels.unpack(directory, pathlib.Path(site))
        sys.path.append(site)
        try:
            from jla.ops.mosaic_gpu import attention, attention_persistent
        except ImportError:  # then its programs are the ones that are missing
            yield
            sys.path.remove(site)
            return
        kept = attention.supported, attention_persistent.sm_count
        attention.supported, attention_persistent.sm_count = (lambda *arrays: None), (lambda: 132)
        try:
            yield
        finally:
            attention.supported, attention_persistent.sm_count = kept
            sys.path.remove(site)


def make_answers(path: pathlib.Path, setting: str) -> list[str]:
    """Writes them all to `path`; returns the names of their problems."""

    chosen = SETTINGS[setting]
    found: dict[str, np.ndarray] = {}
    for group in CANARY:
        found |= {f"canary {group}/{name}": array for name, array in canary.answer(chosen, group).items()}
    for part, places in lib.places(chosen).items():
        for place in places:
            for by in reads.answers_of(part, place):
                begin = time.monotonic()
                made = lib.answer(chosen, place, reads.OURS[by](chosen, place))
                found |= {f"{reads.answer_name(place, by)}/{name}": array for name, array in made.items()}
                print(f"answers of {reads.answer_name(place, by)}: {time.monotonic() - begin:.0f} s", flush=True)
    with open(path.with_suffix(".partial"), "wb") as file:
        np.savez_compressed(file, **found)  # type: ignore[arg-type]
    os.replace(path.with_suffix(".partial"), path)
    return sorted({name.split("/")[0] for name in found})

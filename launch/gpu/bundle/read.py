"""A bundle: compiled programs, float64 answers and wheels, made without a GPU and read on the machine that has one.

    manifest.json          commit, sources, jax, CUDA, and what each program is
    programs/NAME.xz       a serialised executable for sm_90a
    answers.npz            float64 answers, "problem/result"
    wheels/*.whl           what the GPU machine lacks

A bundle of other sources, another jax or a CUDA that the driver does not know is refused by name. Whatever is refused,
or does not load, is compiled on the spot instead, and the report says so.

A bundle is programs: load one that you made, as you would run a script.
"""

import ctypes
import dataclasses
import hashlib
import json
import lzma
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from launch.gpu.programs import Program, file_name
from launch.gpu.records import first_line

ROOT = pathlib.Path(__file__).parents[3]
# What programs and answers are made of, and how they are written.
SOURCES = (
    "mosaics_jax/**/*.py", "pallas_kernels/**/*.py", "configs/*.py", "launch/gpu/programs.py", "launch/gpu/problem.py",
    "launch/gpu/parts/*.py", "launch/gpu/bundle/*.py",
)  # fmt: skip


CARRIED, COMPILED = "carried", "compiled here"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A program that runs. `how`: CARRIED or COMPILED; `why`: what spoke against the carried one."""

    call: Callable[..., tuple[Any, ...]]
    how: str
    seconds: float
    why: str = ""


class Bundle:
    """What a folder holds, or nothing, with the reason in `refusal`."""

    def __init__(self, directory: pathlib.Path | None, setting: str):
        self.directory, self.manifest, self.refusal = directory, {}, ""
        if directory is None or not (directory / "manifest.json").exists():
            self.refusal = "there is no bundle" + (
                f" in {str(directory)!r}; `make gpu-bundle` makes one" if directory else ""
            )
            return
        self.manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        self.refusal = refusal(self.manifest, setting)
        self._answers: Any = None

    def answers(self, problem: str) -> dict[str, np.ndarray] | None:
        """The carried answers of a problem, or None where they have to be made."""
        if self.refusal or self.directory is None or problem not in self.manifest["answers"]:
            return None
        if self._answers is None:
            self._answers = np.load(self.directory / "answers.npz")
        prefix = problem + "/"
        found = {
            name.removeprefix(prefix): self._answers[name] for name in self._answers.files if name.startswith(prefix)
        }
        return found or None

    def load(self, program: Program, compiling: Callable[[], None] = lambda: None) -> Loaded:
        """The carried program, or the same compiled here; `compiling` is called before that, which takes a while.

        Raises:
          Exception: whatever compiling raises.
        """
        begin, why = time.monotonic(), self.refusal
        if not why and not program.carried:
            why = "it needs a library that compiling without a GPU lacks"
        if not why:
            try:
                return Loaded(self._carried(program), CARRIED, time.monotonic() - begin)
            except Exception as error:  # of many kinds: of files, of pickle, of the runtime
                why = first_line(error)
        compiling()
        return compile_here(program, why)

    def _carried(self, program: Program) -> Callable[..., tuple[Any, ...]]:
        import jax
        from jax.experimental import serialize_executable

        if program.name not in self.manifest["programs"]:
            raise ValueError("it is not in the bundle")
        entry = self.manifest["programs"][program.name]
        if reason := entry.get("missing"):
            raise ValueError(f"it was not made: {reason}")
        assert self.directory is not None
        path = self.directory / "programs" / f"{file_name(program.name)}.xz"
        payload = lzma.decompress(path.read_bytes())
        trees = jax.tree.structure(((0,) * entry["arguments"], {})), jax.tree.structure((0,) * entry["results"])
        devices = jax.devices()[:1]
        return serialize_executable.deserialize_and_load(payload, *trees, execution_devices=devices)


def compile_here(program: Program, why: str) -> Loaded:
    """The program made by jit on this machine's device, ahead of its first call."""
    import jax

    begin = time.monotonic()
    function, arguments, donate = program.make()
    call = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    return Loaded(call, COMPILED, time.monotonic() - begin, why)


def refusal(manifest: dict[str, Any], setting: str) -> str:
    """Why nothing of the bundle may be used here, or ""."""
    import jax

    if manifest["setting"] != setting:
        return f"the bundle is of the setting {manifest['setting']!r}, this is {setting!r}"
    if manifest["sources"] != (here := fingerprint()):
        made = f"commit {manifest['commit'][:12]}, sources {manifest['sources'][:12]}"
        return f"the bundle is of {made}; here the sources are {here[:12]}"
    if manifest["jax"] != jax.__version__:
        return f"the bundle is of jax {manifest['jax']}, this is {jax.__version__}"
    if manifest["cuda"] is not None:
        if (driver := driver_version()) is None:
            return f"the bundle is of CUDA {manifest['cuda']}, and there is no driver here"
        major, minor = map(int, manifest["cuda"].split("."))
        if major != driver[0] or minor > driver[1]:
            return f"the bundle is of CUDA {manifest['cuda']}, the driver knows {driver[0]}.{driver[1]}"
    return ""


def fingerprint(root: pathlib.Path = ROOT, patterns: tuple[str, ...] = SOURCES) -> str:
    """sha256 over the names and contents of all files of the patterns."""
    digest = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str:
    """The commit of this checkout; "unknown" where it is none."""
    try:
        words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that this machine's driver knows, or None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10

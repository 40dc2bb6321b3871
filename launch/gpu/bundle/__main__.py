"""Makes a bundle for the GPU suite on a machine without a GPU: programs for sm_90a, answers, wheels.

make gpu-bundle                                  # or, with the compiler on the path (setup.cfg's h100 extra):
python -m launch.gpu.bundle --output=build/gpu [--dry]

A second call makes what is missing or out of date. `--dry`: tiny programs for this machine's CPU, to try the suite on.
"""

import concurrent.futures
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import time
from typing import Any

from absl import flags

from launch import command
from launch.gpu.bundle import wheels
from launch.gpu.bundle.read import ROOT
from mosaics_jax.data.corpus import write_whole

_OUTPUT = command.define_path("output", "build/gpu", "directory of the bundle")
_DRY = flags.DEFINE_bool("dry", False, "tiny programs for this machine's CPU")
_ONLY = flags.DEFINE_string("only", "", "regular expression: programs to make; the others stay as they are")
_WHEELS = flags.DEFINE_bool("wheels", True, "fetch the wheels that the GPU machine lacks")

MOST_BYTES = 60 * 2**20


def main() -> None:
    begin = time.monotonic()
    try:
        only = re.compile(_ONLY.value)
    except re.error as error:
        raise ValueError(f"--only is {_ONLY.value!r}, no regular expression: {error}") from None
    # Before jax is imported, here and in the workers.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is carried comes from the compiler
    directory = pathlib.Path(_OUTPUT.value)
    (directory / "programs").mkdir(parents=True, exist_ok=True)
    setting = "dry" if _DRY.value else "card"
    if _WHEELS.value and not _DRY.value:
        wheels.fetch(directory / "wheels", ROOT / "setup.cfg")
    manifest = _manifest(directory, setting)
    if not _DRY.value:
        _check_compiler(manifest)
    before = _before(directory, manifest)
    from launch.gpu.bundle import make

    names = make.names(setting)
    chosen = [name for name in names if only.search(name) and name not in before]
    manifest["programs"] = {name: before[name] for name in names if name in before}
    print(f"{len(names)} programs, {len(chosen)} to make; compiler: {manifest['compiler']}", flush=True)
    _make_programs(directory, setting, chosen, manifest)
    _save(directory, manifest)
    if not _ONLY.value:
        if not manifest["answers"] or not (directory / "answers.npz").exists():
            manifest["answers"] = make.make_answers(directory / "answers.npz", setting)
        _save(directory, manifest)
    size = _tidy(directory, manifest)
    missing = {name: entry["missing"] for name, entry in manifest["programs"].items() if entry.get("missing")}
    for name, why in missing.items():
        print(f"not made, to be compiled on the card: {name}: {why}")
    print(f"{directory}: {size / 2**20:.1f} MiB in {time.monotonic() - begin:.0f} s")
    if size > MOST_BYTES:
        raise ValueError(
            f"the bundle is {size / 2**20:.1f} MiB; legal: at most {MOST_BYTES // 2**20}, since it travels whole"
        )


# --- The manifest. ---


def _manifest(directory: pathlib.Path, setting: str) -> dict[str, Any]:
    import importlib.metadata

    from launch.gpu.bundle.read import fingerprint

    compiler, cuda = ("this CPU's", None) if setting == "dry" else _compiler()
    return {
        "setting": setting, "commit": _commit(), "sources": fingerprint(), "cuda": cuda, "compiler": compiler,
        "jax": importlib.metadata.version("jax"), "wheels": wheels.modules(directory / "wheels"),
        "programs": {}, "answers": [],
    }  # fmt: skip


def _commit() -> str:
    """The commit of the checkout, and whether it has changes of its own."""
    from launch.gpu.bundle.read import commit

    if (found := commit()) == "unknown":
        return found
    words = ["git", "-C", str(ROOT), "status", "--porcelain"]
    changed = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return found + ("-changed" if changed else "")


def _compiler() -> tuple[str, str]:
    """The ptxas that Mosaic GPU takes, the first on the path, and its CUDA."""
    found = shutil.which("ptxas")
    if found is None:
        raise ValueError("no ptxas on the path; `make gpu-bundle` puts that of setup.cfg's h100_cuda130 there")
    text = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+), (V[\d.]+)", text)
    assert release is not None, text
    return f"ptxas {release[2]}", release[1]


def _check_compiler(manifest: dict[str, Any]) -> None:
    from jax._src.lib import cuda_path

    from pallas_kernels import h100

    if absent := h100.missing():
        raise ValueError(f"{', '.join(absent)} not installed, which compiling for an H100 needs; {h100.INSTALL}")
    own = pathlib.Path(str(cuda_path)) / "bin" / "ptxas"
    if not own.exists() or not os.path.samefile(own, shutil.which("ptxas") or own):
        raise ValueError(
            f"XLA takes its compiler from {cuda_path!r} and Mosaic GPU from the path, {shutil.which('ptxas')!r}; "
            "legal: CUDA_ROOT, and its bin first on the path"
        )


def _before(directory: pathlib.Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The programs of a bundle that lies there, where it is of the same sources and compiler."""
    import json

    from launch.gpu.programs import file_name

    path = directory / "manifest.json"
    if not path.exists():
        return {}
    old = json.loads(path.read_text(encoding="utf-8"))
    if any(old.get(key) != manifest[key] for key in ("setting", "sources", "jax", "compiler")):
        return {}
    manifest["answers"] = old["answers"]
    return {
        name: entry for name, entry in old["programs"].items()
        if not entry.get("missing") and (directory / "programs" / f"{file_name(name)}.xz").exists()
    }  # fmt: skip


def _save(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    import json

    write_whole(directory / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())


def _tidy(directory: pathlib.Path, manifest: dict[str, Any]) -> int:
    """Removes programs that the manifest does not name; returns the bundle's size in bytes."""
    from launch.gpu.programs import file_name

    known = {f"{file_name(name)}.xz" for name, entry in manifest["programs"].items() if not entry.get("missing")}
    for path in (directory / "programs").iterdir():
        if path.name not in known:
            path.unlink()
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


# --- Programs. ---


def _make_programs(directory: pathlib.Path, setting: str, names: list[str], manifest: dict[str, Any]) -> None:
    """In a few processes; the manifest is written as they end, so that a call that is stopped goes on."""
    from launch.gpu.bundle import make

    context = multiprocessing.get_context("spawn")
    workers = min(4, os.cpu_count() or 1, max(1, len(names)))
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        jobs = {pool.submit(make.make_program, str(directory), setting, name): name for name in names}
        for number, job in enumerate(concurrent.futures.as_completed(jobs)):
            name, entry = jobs[job], job.result()
            manifest["programs"][name] = entry
            made = entry.get("missing") or f"{entry['bytes']:,} bytes, {entry['seconds']:.0f} s"
            print(f"{number + 1}/{len(names)} {name}: {made}", flush=True)
            _save(directory, manifest)


if __name__ == "__main__":
    command.run(main)

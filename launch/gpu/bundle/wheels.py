"""Wheels of what a GPU machine lacks, beside jax, torch, flax, optax and orbax: fetched here, unpacked there."""

import configparser
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import zipfile

# Distribution, and a module that tells whether it is there. setup.cfg pins them: as requirements, or in `gpu_bundle`.
MODULES = {
    "ml-collections": "ml_collections", "tensorboardX": "tensorboardX", "grain": "grain",
    "array-record": "array_record", "portpicker": "portpicker", "zstandard": "zstandard",
    "jax-linear-attention": "jla", "equinox": "equinox", "jaxtyping": "jaxtyping", "wadler-lindig": "wadler_lindig",
}  # fmt: skip
PYTHON = "3.12"  # of the GPU machine
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def fetch(folder: pathlib.Path, setup: pathlib.Path) -> None:
    """Has the folder hold just these wheels, at the versions of `setup`, with pip and without what they need.

    Raises:
      ValueError: pip cannot fetch one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pins = versions(setup)
    wanted = {distribution: f"{_stem(distribution)}-{pins[distribution]}-" for distribution in MODULES}
    for path in folder.glob("*.whl"):
        if not path.name.lower().startswith(tuple(wanted.values())):
            path.unlink()
    there = [path.name.lower() for path in folder.glob("*.whl")]
    for distribution, stem in wanted.items():
        if any(name.startswith(stem) for name in there):
            continue
        pinned = f"{distribution}=={pins[distribution]}"
        words = [word for platform in _PLATFORMS for word in ("--platform", platform)]
        words += ["--implementation", "cp", "--python-version", PYTHON, "--only-binary=:all:", "--no-deps", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *words, "--dest", str(folder), pinned]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ValueError(f"pip cannot fetch {pinned}: {result.stderr.strip().splitlines()[-1]}")


def versions(setup: pathlib.Path) -> dict[str, str]:
    """The version that setup.cfg pins, of each distribution here."""
    parser = configparser.ConfigParser()
    parser.read(setup)
    text = "\n".join([parser["options"]["install_requires"], *parser["options.extras_require"].values()])
    pins = dict(re.findall(r"^([\w.-]+) *== *(\S+)$", text, re.MULTILINE))
    return {distribution: pins[distribution] for distribution in MODULES}


def modules(folder: pathlib.Path) -> dict[str, str]:
    """The module of each wheel in a folder, by file name."""
    stems = {_stem(distribution): module for distribution, module in MODULES.items()}
    return {path.name: stems[path.name.lower().split("-")[0]] for path in sorted(folder.glob("*.whl"))}


def unpack(directory: pathlib.Path | None, into: pathlib.Path) -> list[str]:
    """Unpacks a bundle's wheels of modules that cannot be imported here; returns their file names.

    `into` then belongs on the path. The wheels of a refused bundle serve too: they are only packages. One that was
    compiled for another Python stays packed.
    """
    manifest = None if directory is None else directory / "manifest.json"
    if directory is None or manifest is None or not manifest.exists():
        return []
    unpacked = []
    ours = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for name, module in json.loads(manifest.read_text(encoding="utf-8"))["wheels"].items():
        fits = name.endswith("-none-any.whl") or f"-{ours}-" in name
        if fits and importlib.util.find_spec(module) is None:
            with zipfile.ZipFile(directory / "wheels" / name) as wheel:
                wheel.extractall(into)
            unpacked.append(name)
    return unpacked


def _stem(distribution: str) -> str:
    return distribution.lower().replace("-", "_")

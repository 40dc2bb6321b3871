"""Compiles for an H100 on a machine that has none, and says what became of every Mosaic GPU kernel.

Needs the `h100` extra (the CUDA plugin of JAX and the compiler packages of CUDA: no driver, no GPU).
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import choice

# Public figures of the H100 SXM 80 GB.
_TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 12 patch: 0 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  memory_bandwidth: 3350000000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
"""
SHARED_MEMORY = 232_448  # bytes that a thread block may have

_PACKAGES = ("jax_cuda13_plugin", "nvidia.cu13")
INSTALL = "pip install 'mosaics_jax[h100]'"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler made of one kernel."""

    registers: int  # per thread, before the warpgroups divide them anew
    spilled: int  # bytes stored to and loaded from local memory
    shared: int  # bytes of shared memory
    wgmma: int  # matmul instructions (HGMMA), 0 in kernels without matrices
    serialized: bool  # whether the compiler made the matmuls wait for one another


def missing() -> list[str]:
    """The packages that are not installed here, and without which `compile_for` cannot run."""
    found = {name: _find(name) for name in _PACKAGES}
    absent = [name for name, path in found.items() if path is None]
    for tool in ("ptxas", "nvdisasm"):
        if (root := found["nvidia.cu13"]) is not None and not (root / "bin" / tool).exists():
            absent.append(tool)
    return absent


def _find(name: str) -> pathlib.Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def devices(count: int) -> list[Any]:
    """That many H100s that are not there, eight a node: a mesh of them can be compiled for.

    Raises:
      ValueError: something that compiling needs is not installed.
    """
    if absent := missing():
        raise ValueError(f"{', '.join(absent)} not installed, which compiling for an H100 needs; {INSTALL}")
    in_node = math.gcd(count, 8)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_TARGET, topology=f"{count // in_node}x{in_node}x1"
    )
    return list(topology.devices)


def compile_for(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> tuple[Any, list[Kernel]]:
    """`function` compiled for one H100, and its kernels. The arguments: trees of anything with a shape and a dtype.

    `donate`: the places of arguments whose memory the results may take.

    Raises:
      ValueError: something that compiling needs is not installed.
    """
    sharding = NamedSharding(Mesh(devices(1), "device"), PartitionSpec())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments)
    with tempfile.TemporaryDirectory() as directory, _dumps(directory), choice.compiling_for("9.0"):
        # A function of its own: of `function` jax may remember what it traced for this machine.
        fresh = jax.jit(lambda *arguments: function(*arguments), donate_argnums=donate)
        compiled = fresh.lower(*shapes).compile()
        return compiled, _kernels(pathlib.Path(directory))


@contextlib.contextmanager
def _dumps(directory: str) -> Iterator[None]:
    """Has the compiler write what it makes of every kernel into the directory."""
    settings = {"MOSAIC_GPU_DUMP_TO": directory, "MOSAIC_GPU_DUMP_HOST_LLVM": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _kernels(directory: pathlib.Path) -> list[Kernel]:
    return [_kernel(path) for path in sorted(directory.glob("*.ptxas"))]


def _kernel(log: pathlib.Path) -> Kernel:
    text = log.read_text()
    # The host's call: the stream, then grid, cluster and block in x, y, z, then the bytes of shared memory.
    launch = re.search(
        r"call i32 @mosaic_gpu_launch_kernel\(ptr [^,]+((?:, i32 \d+){10})", log.with_suffix(".ll").read_text()
    )
    assert launch is not None, f"no launch in the host code of {log}"
    return Kernel(
        registers=int(re.findall(r"Used (\d+) registers", text)[-1]),
        spilled=sum(int(count) for count in re.findall(r"(\d+) bytes spill", text)),
        shared=int(launch[1].split()[-1]),
        wgmma=len(re.findall(r"\bHGMMA", log.with_suffix(".sass_ctrl").read_text())),
        serialized="C7512" in text or "serialized" in text.lower(),
    )

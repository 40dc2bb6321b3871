"""Every Hopper kernel goes through the real compiler for an H100, on a machine without one."""

import dataclasses
import functools
import json
import lzma
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import small
from launch.gpu.bundle.read import Bundle
from mosaics_jax.config import Config
from mosaics_jax.data.source import pack
from mosaics_jax.step import init_state, make_train_step
from pallas_kernels import h100
from pallas_kernels.leaky_average import leaky_average
from pallas_kernels.retrieval import retrieve

pytestmark = [
    pytest.mark.h100,
    pytest.mark.skipif(bool(h100.missing()), reason=f"{', '.join(h100.missing())} not installed: {h100.INSTALL}"),
]
B, T, H = 1, 4096, 4


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _check(kernels, number, has_matmuls):
    assert len(kernels) == number
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert not kernel.serialized, kernel
        assert 0 < kernel.shared <= h100.SHARED_MEMORY, kernel
        assert (kernel.wgmma > 0) == has_matmuls, kernel


def _forward_and_backward(operation, *arguments):
    """The values and the gradients of the sum, of all arguments that are floats."""
    floats = [i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating)]

    def run(*arguments):
        output, backward = jax.vjp(
            lambda *floating: operation(*_replaced(arguments, floats, floating)), *(arguments[i] for i in floats)
        )
        return output, backward(jnp.ones_like(output))

    return h100.compile_for(run, *arguments)[1]


def _replaced(arguments, places, values):
    arguments = list(arguments)
    for place, value in zip(places, values, strict=True):
        arguments[place] = value
    return arguments


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_retrieve(width, unit_norm):
    wide = _shape(B, T, H, width, dtype=jnp.bfloat16)
    end = _shape(B, T, dtype=jnp.int32)
    operation = functools.partial(retrieve, unit_norm=unit_norm)  # nothing is named: the choice itself is compiled
    _check(_forward_and_backward(operation, wide, wide, wide, _shape(B, T, H), end, end), 3, True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [64, 128])
def test_leaky_average(width, dtype):
    arguments = (_shape(B, T, H, width, dtype=dtype), _shape(B, T, H), _shape(B, T, H), _shape(B, T, dtype=bool))
    _check(_forward_and_backward(lambda *a: leaky_average(*a)[0], *arguments), 4, False)


def test_the_train_step_of_the_small_model(capsys):
    """The whole program: which kernels are in it, and what it holds at its peak."""
    config = Config.from_config_dict(small.get_config())
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch=4))
    state = jax.eval_shape(functools.partial(init_state, config))
    batch = pack(np.zeros((4, config.data.context + 1), np.int32), begin=0)
    compiled, kernels = h100.compile_for(make_train_step(config), state, batch, donate=(0,))
    # Depth is scanned, so the program holds one block of two memories: each reads once forward and twice backward, and
    # its average takes two passes each way.
    assert sum(kernel.wgmma > 0 for kernel in kernels) == 2 * 3
    assert sum(kernel.wgmma == 0 for kernel in kernels) >= 2 * 4
    assert all(kernel.spilled == 0 and not kernel.serialized for kernel in kernels)
    memory = compiled.memory_analysis()
    state_gib, peak_gib = memory.argument_size_in_bytes / 2**30, memory.peak_memory_in_bytes / 2**30
    with capsys.disabled():
        print(f"\nsmall, 4 rows of 4,096 on one H100: {peak_gib:.1f} GiB at the peak, of which state {state_gib:.1f}")
    assert state_gib < peak_gib < 80e9 / 2**30


def test_a_bundle_of_real_programs(tmp_path):
    """Made by the command, with the compiler that `make` puts in its place; this machine has no driver to take it."""
    if "CUDA_ROOT" not in os.environ:
        pytest.skip("CUDA_ROOT is not set; `make test-slow` sets it")
    kernel = "canary retrieve forward, K = 128, unit norm"
    words = [f"--only=^({kernel}|arrays T = 4096|jax, forward, .* T = 4,096)$", "--nowheels", f"--output={tmp_path}"]
    command = [sys.executable, "-m", "launch.gpu.bundle", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest["programs"]) == {kernel, "arrays T = 4096", "jax, forward, long-term, unpacked, T = 4,096"}
    assert not any(entry.get("missing") for entry in manifest["programs"].values()), manifest
    version = re.search(r"V(\d+\.\d+)", manifest["compiler"])
    assert version is not None
    assert version[1] == manifest["cuda"]
    bundle = Bundle(tmp_path, "card")
    assert f"of CUDA {manifest['cuda']}" in bundle.refusal
    (path,) = (tmp_path / "programs").glob("canary*.xz")
    assert (manifest["programs"][kernel]["arguments"], manifest["programs"][kernel]["results"]) == (7, 1)
    assert lzma.decompress(path.read_bytes()).count(b"\x7fELF") >= 1  # machine code

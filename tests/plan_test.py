"""The planner: its formulas against counting and against the compiler, its sums, and its answers to wrong input."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import mesh_runs
import numpy as np
import pytest

from configs import large, small
from mosaics_jax import roofline, visibility
from mosaics_jax.config import Config, MeshConfig
from pallas_kernels import h100

ROOT = pathlib.Path(__file__).parent.parent
H100 = roofline.TARGETS["h100"]
LARGE = Config.from_config_dict(large.get_config())


def _on(gpus):
    config = Config.from_config_dict(large.get_config(str(gpus)))
    return roofline.estimate(config, config.mesh, H100, 4096)


@pytest.mark.parametrize("name", ["mosaic", "transformer"])
@pytest.mark.parametrize("document", [16, 64])
def test_visible_pairs_are_those_of_the_intervals(name, document):
    config = mesh_runs.config(name)
    model = dataclasses.replace(config.model, delay_max=config.model.delay_min)  # one m, not a mean
    config = dataclasses.replace(config, model=model)
    start = visibility.document_start(jnp.arange(config.data.context)[None] // document)
    if name == "mosaic":
        kinds = [visibility.short_term(start, model.window), visibility.long_term(start, model.delay_min)]
    else:
        kinds = [visibility.causal(start, model.window), visibility.long_term(start, model.delay_min)]
    counted = config.data.batch * model.layers * sum(int(np.asarray(kind.count_BT).sum()) for kind in kinds)
    assert roofline.visible_pairs(config, document) == counted


def test_links_are_those_that_a_group_has():
    mesh = MeshConfig(data=4, fsdp=16, sequence=1, tensor=4)
    share = H100.link_share
    assert H100.bandwidth(mesh, "tensor") == share * H100.nvlink  # four of a node
    assert H100.bandwidth(mesh, "fsdp") == share * 2 * H100.network  # two of each node, so two links out of it
    assert H100.bandwidth(mesh, "data") == share * H100.network  # one of each node
    assert H100.latency(mesh, "tensor") == pytest.approx(3 * H100.hop_in_node)
    assert H100.latency(mesh, "fsdp") == pytest.approx(8 * H100.hop_in_node + 7 * H100.hop_between_nodes)
    assert H100.latency(mesh, "data") == pytest.approx(3 * H100.hop_between_nodes)


def test_one_device_sends_nothing_and_a_step_is_its_compute():
    tiny = mesh_runs.config("mosaic", data=1)
    estimate = roofline.estimate(tiny, tiny.mesh, H100, 64)
    assert estimate.communication == estimate.sent == {}
    assert estimate.seconds == estimate.compute


def test_the_large_model_on_256_gpus():
    estimate = _on(256)
    assert estimate.fits(H100)
    assert estimate.mfu(H100) >= 0.5
    assert estimate.tokens_per_device >= 7800


def test_scaling_from_8_to_1024_gpus():
    assert _on(1024).tokens_per_device >= 0.95 * _on(8).tokens_per_device


@pytest.mark.parametrize("recipe", [small, large])
def test_the_recipes_fit_and_use_all_their_gpus(recipe):
    for gpus, (axes, _) in recipe.MESHES.items():
        config = Config.from_config_dict(recipe.get_config(str(gpus)))
        mesh = config.mesh if config.mesh.data > 0 else dataclasses.replace(config.mesh, data=1)
        assert np.prod(list(axes.values())) == gpus
        assert roofline.estimate(config, mesh, H100, 4096).fits(H100)


def test_a_sweep_tries_no_mesh_that_training_would_refuse():
    found = list(roofline.meshes(LARGE, 64, H100))
    assert len({mesh for mesh, _ in found}) > 20
    for mesh, micro in found:
        assert mesh.data * mesh.fsdp * mesh.sequence * mesh.tensor == 64
        assert LARGE.data.batch % (mesh.data * mesh.fsdp * micro) == 0
        assert LARGE.data.context // mesh.sequence >= LARGE.model.window


def _plan(*arguments, path=""):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{path}"}
    return subprocess.run(
        [sys.executable, "-m", "launch.plan", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is not set"),
        (["--config=configs/large.py"], "--devices is None; legal: the number of GPUs to plan for"),
        (["--config=configs/large.py:7", "--devices=7"], "has no mesh for '7' GPUs; legal: 8, 64, 256, 1024"),
        (["--config=configs/large.py", "--devices=256", "--target=a100"], "--target is 'a100'; legal: h100"),
        (["--config=configs/large.py", "--devices=100"], "but there are 100 devices; legal: a product of 100"),
        (["--config=configs/large.py", "--devices=256", "--document=0"], "--document is 0; legal: 1 or more tokens"),
    ],
)
def test_wrong_input_is_one_line(arguments, message):
    result = _plan(*arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_plan_for_fake_cpu_devices_says_so():
    result = _plan(
        "--config=configs/tiny.py", "--devices=8", "--config.mesh.fsdp=4", "--config.mesh.tensor=2",
        "--config.data.batch=8", "--config.model.remat=dots",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "fake CPU devices" in result.stdout or "8 h100" in result.stdout
    for kind in ("weights", "optimizer", "gradients", "activations", "temporary", "MFU", "all-gather", "Assumed"):
        assert kind in result.stdout, kind
    assert not re.search(r"temporary +-", result.stdout)  # the rest of a sum that holds all the others


@pytest.mark.slow
def test_a_sweep_marks_what_does_not_fit():
    result = _plan("--config=configs/large.py:64", "--devices=8", "--sweep")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if re.match(r"(\s+\d+){5} ", line)]
    seconds = [float(line.split()[6]) for line in lines if "does not fit" not in line]
    assert seconds == sorted(seconds)
    assert any("does not fit" in line for line in lines)


@pytest.mark.h100
def test_the_formulas_agree_with_the_compiler(capsys):
    """Small on 16 GPUs: bytes sent along each axis, memory, FLOPs, and kernels inside a mesh's program."""
    if absent := h100.missing():
        pytest.skip(f"{', '.join(absent)} not installed; {h100.INSTALL}")
    from mosaics_jax.plan import compile_step

    config = Config.from_config_dict(small.get_config())
    axes = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 2}
    config = dataclasses.replace(
        config, mesh=MeshConfig(**axes), data=dataclasses.replace(config.data, batch=32),
        run=dataclasses.replace(config.run, accumulation=2),
    )  # fmt: skip
    program = compile_step(config, "h100", 16)
    estimate = roofline.estimate(config, config.mesh, H100, config.data.context)
    with capsys.disabled():
        print(
            f"\nsmall on 16 H100, {axes}: {program.peak / 1e9:.1f} GB at the peak, compiled in {program.seconds:.0f} s"
        )
    assert program.kernels >= 2 * (3 + 4)  # two memories: a read's three, and an average's four
    for axis, sent in estimate.sent.items():
        compiled = sum(one.sent for one in program.collectives if one.axes[:1] == (axis,))
        assert sent == pytest.approx(compiled, rel=0.15), axis
    assert estimate.held["weights"] == pytest.approx(program.held["weights"], rel=0.01)
    assert estimate.held["optimizer"] == pytest.approx(program.held["optimizer"], rel=0.01)
    assert estimate.held["activations"] == pytest.approx(program.held["activations"], rel=0.25)
    assert sum(estimate.held.values()) == pytest.approx(program.peak, rel=0.35)
    reads = 12.0 * config.model.heads * config.model.head_width * roofline.visible_pairs(config, 4096)
    assert program.matmul_flops == pytest.approx((estimate.hardware_flops - reads) / 16, rel=0.05)

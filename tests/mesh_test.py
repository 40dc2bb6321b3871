"""A mesh changes no number: losses, gradients, metrics and evaluations of a model on eight CPU devices."""

import os
import pathlib
import subprocess
import sys

import mesh_runs
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["mosaic", "transformer"])
def results(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests" / "mesh_runs.py"), request.param, str(directory)]
    subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=500)
    return {path.stem: dict(np.load(path)) for path in directory.glob("*.npz")}


def _others():
    return [name for name in mesh_runs.MESHES if name != "one"]


@pytest.mark.parametrize("mesh", _others())
def test_losses_of_twenty_steps(results, mesh):
    one, many = results["one"], results[mesh]
    np.testing.assert_array_equal(many["delay"], one["delay"])
    assert len(set(one["delay"])) > 3
    assert one["loss"][-1] < one["loss"][0] - 0.5  # it learns: the weights of every step matter
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=2e-5)
    np.testing.assert_allclose(many["eval"], one["eval"], rtol=2e-6)


@pytest.mark.parametrize("mesh", _others())
def test_gradients_of_every_parameter(results, mesh):
    one, many = results["one"], results[mesh]
    names = [name for name in one if name.startswith(("grad", "health"))]
    assert len(names) > 12
    for name in names:
        scale = np.abs(one[name]).max()
        assert scale > 0, name
        assert np.abs(many[name] - one[name]).max() <= 3e-5 * scale, name


def test_no_device_makes_a_weight_whole(results):
    assert results["one"]["makes_whole"]
    for mesh in _others():
        sizes = mesh_runs.MESHES[mesh]
        if sizes.get("fsdp", 1) * sizes.get("tensor", 1) > 1:
            assert not results[mesh]["makes_whole"], mesh

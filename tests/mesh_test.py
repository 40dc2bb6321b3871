"""A mesh changes no number: losses, gradients, metrics and evaluations of a model on eight CPU devices."""

import functools
import os
import pathlib
import subprocess
import sys

import mesh_runs
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # minutes, and more where other tests run beside it
_OTHERS = [mesh for mesh in mesh_runs.MESHES if mesh != "one"]
# Data, sequence and tensor beside one another, and stretches shorter than the window; fsdp: processes_run_test.py.
_QUICK = {"mosaic": ("sequence", "data_sequence_tensor"), "transformer": ()}
_EACH = [
    pytest.param(model, mesh, marks=() if mesh in quick else pytest.mark.long)
    for model, quick in _QUICK.items()
    for mesh in _OTHERS
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a model gives on a mesh."""

    @functools.cache
    def of(model, mesh):
        directory = tmp_path_factory.mktemp(model)
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(ROOT / "tests" / "mesh_runs.py"), model, str(directory), mesh]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        return dict(np.load(directory / f"{mesh}.npz"))

    return of


@pytest.mark.parametrize(("model", "mesh"), _EACH)
def test_losses_of_twenty_steps(results, model, mesh):
    one, many = results(model, "one"), results(model, mesh)
    np.testing.assert_array_equal(many["delay"], one["delay"])
    assert len(set(one["delay"])) > 3
    assert one["loss"][-1] < one["loss"][0] - 0.5  # it learns: the weights of every step matter
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=2e-5)
    np.testing.assert_allclose(many["eval"], one["eval"], rtol=2e-6)


@pytest.mark.parametrize(("model", "mesh"), _EACH)
def test_gradients_of_every_parameter(results, model, mesh):
    one, many = results(model, "one"), results(model, mesh)
    names = [name for name in one if name.startswith(("grad", "health"))]
    assert len(names) > 12
    for name in names:
        scale = np.abs(one[name]).max()
        assert scale > 0, name
        assert np.abs(many[name] - one[name]).max() <= 3e-5 * scale, name


@pytest.mark.parametrize(("model", "mesh"), _EACH)
def test_no_device_makes_a_weight_whole(results, model, mesh):
    assert results(model, "one")["makes_whole"]
    sizes = mesh_runs.MESHES[mesh]
    if sizes.get("fsdp", 1) * sizes.get("tensor", 1) > 1:
        assert not results(model, mesh)["makes_whole"]

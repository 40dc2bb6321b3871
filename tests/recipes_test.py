"""The launch recipes name commands, flags and settings that exist."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from mosaics_jax import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


def test_the_jobset_starts_as_many_processes_as_its_config_asks_for():
    (recipe,) = yaml.safe_load_all((LAUNCH / "kubernetes" / "train.yaml").read_text())
    (job,) = recipe["spec"]["replicatedJobs"]
    name, spec = recipe["metadata"]["name"], job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == int(environment["MOSAICS_PROCESSES"])
    host, _, port = environment["MOSAICS_COORDINATOR"].partition(":")
    assert host == f"{name}-{job['name']}-0-0.{name}"
    assert {"containerPort": int(port)} in container["ports"]
    arguments = dict(argument.lstrip("-").split("=", 1) for argument in container["args"])
    path, _, gpus = arguments.pop("config").partition(":")
    processes, devices = (int(arguments[f"config.mesh.{x}"]) for x in ("processes", "devices_per_process"))
    assert processes == spec["completions"]
    assert devices == container["resources"]["limits"]["nvidia.com/gpu"]
    assert processes * devices == int(gpus)
    config = config_lib.load_config(str(ROOT / path))
    for argument in arguments:
        if argument.startswith("config."):
            section, field = argument.removeprefix("config.").split(".")
            assert field in config[section], argument
        else:
            assert f'"{argument}"' in (LAUNCH / "train.py").read_text(), argument


def test_the_batch_script_is_one_that_bash_reads():
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm" / "train.sbatch")], check=True, timeout=10)


@pytest.mark.slow
def test_xla_knows_the_flags_of_the_page():
    flags = re.findall(r"`(--xla_\w+=\w+)`", (LAUNCH / "README.md").read_text())
    assert len(flags) > 5
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    code = "import jax; jax.numpy.ones(2)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=500)

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


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The batch script, in a Slurm whose tasks print their arguments and do what `$tmp_path/life` says."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text('#!/bin/bash\nshift\nexport SLURM_PROCID=4\nexec "$@"\n')
    (programs / "python").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@"\n. {tmp_path}/life\n')
    (programs / "scontrol").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/requeued\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def run(workdir, restarts, life):
        (tmp_path / "requeued").unlink(missing_ok=True)
        (tmp_path / "life").write_text(life)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        command = ["bash", str(LAUNCH / "slurm" / "train.sbatch"), f"--workdir={workdir}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, (tmp_path / "requeued").exists(), done.stdout + done.stderr

    return run


def _life(workdir, code, *steps):
    lines = "".join(f'{{"kind": "train", "time": 1.0, "step": {step}, "loss": 2.0}}\n' for step in steps)
    return f"printf '%s' '{lines}' >>'{workdir}/metrics.jsonl'; exit {code}"


def test_a_job_that_comes_no_further_leaves_the_queue(slurm, tmp_path):
    workdir = tmp_path / "run"
    again, ended = (0, True), (134, False)
    assert slurm(workdir, 0, _life(workdir, 134))[:2] == again
    assert slurm(workdir, 1, _life(workdir, 134))[:2] == again
    code, requeued, said = slurm(workdir, 2, _life(workdir, 134))  # aborted from C++, say, and never at a step
    assert (code, requeued) == ended
    assert f"ended with code 134, and 3 lives in a row came no further than step 0; see {workdir}/logs" in said
    # Submitted anew, and going on: each life gets further, then three do not.
    for restart, steps in enumerate([[1, 2], [2, 3], [3, 4], [4], [4]]):
        assert slurm(workdir, restart, _life(workdir, 134, *steps))[:2] == again
    assert slurm(workdir, 5, _life(workdir, 134, 3, 4))[:2] == ended
    assert slurm(workdir, 100, _life(workdir, 134, 5))[:2] == ended  # the most restarts
    assert slurm(workdir, 6, _life(workdir, 75))[:2] == again  # preempted
    assert slurm(workdir, 7, _life(workdir, 2))[:2] == (2, False)
    assert slurm(workdir, 8, _life(workdir, 0))[:2] == (0, False)


@pytest.mark.parametrize("given", ["~/run", "a 50%j", "[$HOME]*", "b\\%t", "'quoted' \"twice\""])
def test_the_batch_script_takes_a_workdir_of_any_name(given, slurm, tmp_path):
    assert slurm(given, 0, "exit 0")[0] == 0
    folder = tmp_path / given.replace("~", "home")
    assert [path.name for path in (folder / "logs").iterdir()] == ["7.0.4.log"]
    assert (folder / "logs" / "7.0.4.log").read_text() == f"-m\nlaunch.train\n--workdir={given}\n"


@pytest.mark.slow
def test_xla_knows_the_flags_of_the_page():
    flags = re.findall(r"`(--xla_\w+=\w+)`", (LAUNCH / "README.md").read_text())
    assert len(flags) > 5
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    code = "import jax; jax.numpy.ones(2)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=500)

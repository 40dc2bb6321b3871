"""All processes of a run are one run: what differs between them is named before anything is made."""

import dataclasses
import pathlib
import subprocess
import sys

import helpers
import pytest

from mosaics_jax import environment
from mosaics_jax.config import Config, flat
from mosaics_jax.record import OWN_FIELDS, RunRecord
from mosaics_jax.train import _decisive

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "faults"))

_OTHER_CODE = """
import runpy, sys
from mosaics_jax import environment
real = environment.versions()
environment.versions = lambda: real | {"code": "0123456789ab"}
sys.argv[0] = "train"
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


def _fields(config: Config, **changes: object) -> dict[str, str]:
    record = RunRecord(config.to_dict(), "0" * 64, 0, tokenizer="1" * 64)
    return _decisive(pathlib.Path("/run"), dataclasses.replace(record, **changes), accept_new_data=False)


def test_everything_that_decides_is_compared() -> None:
    """Each field of a config but those of a node's own; corpora, tokenizer, code and the versions of what computes."""
    config = helpers.tiny_config()
    found = _fields(config)
    assert set(flat(config.to_dict())) - found.keys() == OWN_FIELDS
    assert {"workdir", "corpora", "tokenizer", "accept_new_data", "code", "jax", "jaxlib", "python"} <= found.keys()
    assert found == _fields(helpers.tiny_config())
    assert _fields(config, manifest="2" * 64) != found
    for name, value in [("data.seed", 1), ("optimizer.peak_learning_rate", 0.5), ("run.steps", 9), ("mesh.fsdp", 2)]:
        other = _fields(helpers.tiny_config(**{name: value}))
        assert [one for one in found if found[one] != other[one]] == [name]


def test_another_line_of_code_is_another_version(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment.versions()
    assert here == environment.versions()
    for name in ("mosaics_jax", "pallas_kernels"):
        (tmp_path / name).mkdir()
        for path in (ROOT / name).glob("*.py"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "mosaics_jax" / "environment.py"))
    before = environment.versions()["code"]
    with open(tmp_path / "pallas_kernels" / "checks.py", "a") as file:
        file.write("\n")
    assert environment.versions()["code"] not in (before, here["code"])


CASES = {
    "data.seed": ({"data.seed": 1}, "data.seed: 1, not 0"),
    "learning rate": ({"optimizer.peak_learning_rate": 0.5}, "optimizer.peak_learning_rate: 0.5, not 0.01"),
    "steps": ({"run.steps": 9}, "run.steps: 9, not 8"),
    "corpus": ({}, "corpora: "),
    "code": ({}, "code: 0123456789ab, not "),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", helpers.long_but(("data.seed", "code"), CASES))
def test_a_process_that_differs_is_named(name: str, corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """In a new workdir, where nothing on the disk tells what the run is."""
    from job import free_port

    changes, expected = CASES[name]
    if name == "corpus":
        helpers.make_corpus(tmp_path / "other", seed=1)
        changes = {"data.path": str(tmp_path / "other" / "corpus")}
    port, started = free_port(), []
    for process in range(2):
        config = helpers.tiny_config(corpus, **(changes if process else {}))
        program = ["-c", _OTHER_CODE] if process and name == "code" else ["-m", "launch.train"]
        command = [
            sys.executable, *program, *helpers.command_line(config), f"--workdir={tmp_path / 'run'}",
            f"--coordinator=localhost:{port}", "--processes=2", f"--process={process}", "--wait=200",
        ]  # fmt: skip
        environ = helpers.OPTIMISED | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, said = process.communicate(timeout=500)
        assert process.returncode == 2, said
        assert f"error: process 1 differs from process 0 in {expected}" in said
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()

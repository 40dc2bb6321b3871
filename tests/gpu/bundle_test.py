"""A bundle: its programs run; one of other sources, jax or CUDA is refused by name, and what is missing is compiled."""

import functools
import json
import pathlib
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

from launch.gpu import problem, programs
from launch.gpu.bundle import make, read, wheels
from launch.gpu.parts import context, read_programs
from launch.gpu.problem import DRY
from launch.gpu.records import Recorder
from launch.gpu.records import read as read_records

ROOT = pathlib.Path(__file__).parents[2]
SHIFT = 3
PROGRAM = read_programs.ready(DRY, DRY.time, SHIFT)


def _manifest(**changes):
    manifest = {
        "setting": "dry", "commit": "0123456789abcdef", "sources": read.fingerprint(), "jax": jax.__version__,
        "cuda": None, "compiler": "this CPU's", "wheels": {}, "programs": {}, "answers": [],
    }  # fmt: skip
    return manifest | changes


def _write(directory: pathlib.Path, **changes) -> pathlib.Path:
    (directory / "manifest.json").write_text(json.dumps(_manifest(**changes)))
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A bundle of one program, made as `python -m launch.gpu.bundle` makes it; tests copy what they spoil."""
    directory = tmp_path_factory.mktemp("bundle")
    (directory / "programs").mkdir()
    everything = {PROGRAM.name: PROGRAM}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "everything", lambda setting: everything)
        entry = make.make_program(str(directory), "dry", PROGRAM.name)
    assert entry["bytes"] > 1000
    assert (entry["arguments"], entry["results"]) == (4, 4)
    np.savez(directory / "answers.npz", **{"a problem/output": np.arange(3.0), "another/output": np.zeros(2)})
    return _write(directory, programs={PROGRAM.name: entry}, answers=["a problem", "another"])


def _inputs():
    return [
        np.random.default_rng(0).normal(size=argument.shape).astype(argument.dtype)
        for argument in PROGRAM.make().arguments
    ]


def _assert_runs(loaded: read.Loaded) -> None:
    inputs = _inputs()
    cotangent, query, key, value = (np.asarray(array, np.float32) for array in loaded.call(*inputs))
    np.testing.assert_array_equal(cotangent[:, :-SHIFT], np.asarray(inputs[0], np.float32)[:, SHIFT:])
    assert not cotangent[:, -SHIFT:].any()
    np.testing.assert_array_equal(key, np.asarray(inputs[1], np.float32))
    assert query.shape == value.shape == key.shape


def test_a_carried_program_runs_without_being_traced(made: pathlib.Path) -> None:
    def never() -> programs.Made:
        raise AssertionError("it was made")

    loaded = read.Bundle(made, "dry").load(programs.Program(PROGRAM.name, never))
    assert (loaded.how, loaded.why) == (read.CARRIED, "")
    _assert_runs(loaded)


def test_answers_are_found_by_problem(made: pathlib.Path) -> None:
    bundle = read.Bundle(made, "dry")
    assert bundle.answers("a problem")["output"].tolist() == [0.0, 1.0, 2.0]
    assert bundle.answers("a problem that nobody made") is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sources": "f" * 64}, "of commit 0123456789ab, sources ffffffffffff; here the sources are"),
        ({"jax": "0.9.9"}, "the bundle is of jax 0.9.9, this is 0."),
        ({"setting": "card"}, "of the setting 'card', this is 'dry'"),
        ({"cuda": "13.0"}, "of CUDA 13.0, and there is no driver here"),
    ],
)
def test_a_bundle_of_something_else_is_refused_by_name(made, tmp_path, monkeypatch, changes, why) -> None:
    monkeypatch.setattr(read, "driver_version", lambda: None)
    (tmp_path / "programs").symlink_to(made / "programs")
    bundle = read.Bundle(_write(tmp_path, answers=["a problem"], **changes), "dry")
    assert why in bundle.refusal
    assert bundle.answers("a problem") is None
    said = []
    loaded = bundle.load(PROGRAM, lambda: said.append("compiling"))
    assert (loaded.how, loaded.why, said) == (read.COMPILED, bundle.refusal, ["compiling"])
    _assert_runs(loaded)


@pytest.mark.parametrize(("driver", "refused"), [((13, 0), False), ((13, 2), False), ((12, 9), True), ((14, 0), True)])
def test_a_driver_must_know_the_bundles_cuda(monkeypatch, driver, refused) -> None:
    monkeypatch.setattr(read, "driver_version", lambda: driver)
    why = read.refusal(_manifest(cuda="13.0"), "dry")
    assert bool(why) == refused
    if refused:
        assert f"of CUDA 13.0, the driver knows {driver[0]}.{driver[1]}" in why


def test_without_a_bundle_everything_is_compiled() -> None:
    bundle = read.Bundle(None, "dry")
    assert bundle.refusal == "there is no bundle"
    assert bundle.load(PROGRAM).how == read.COMPILED
    assert "make gpu-bundle" in read.Bundle(pathlib.Path("/nowhere"), "dry").refusal


@pytest.mark.parametrize(
    ("name", "carried", "why"),
    [
        ("a name that nobody made", True, "it is not in the bundle"),
        (PROGRAM.name, False, "a library that compiling without a GPU lacks"),
        ("spoilt", True, "Error"),
        ("not made", True, "it was not made: ImportError: no such peer"),
    ],
)
def test_a_program_that_cannot_be_loaded_is_compiled(made, tmp_path, name, carried, why) -> None:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "spoilt.xz").write_bytes(b"not a program")
    entries = {
        "spoilt": {"bytes": 1, "arguments": 1, "results": 1},
        "not made": {"missing": "ImportError: no such peer"},
        PROGRAM.name: {},
    }
    bundle = read.Bundle(_write(tmp_path, programs=entries), "dry")
    loaded = bundle.load(programs.Program(name, PROGRAM.make, carried=carried))
    assert loaded.how == read.COMPILED
    assert why in loaded.why
    _assert_runs(loaded)


def test_a_carried_program_that_does_not_run_is_compiled(made, tmp_path, monkeypatch) -> None:
    """What a driver refuses may come out only as the program first runs; its kernels are not to blame."""

    def broken(*arguments):
        raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")

    monkeypatch.setattr(read.Bundle, "_carried", lambda self, program: broken)
    record = Recorder(tmp_path / "records")
    given = context.Context(DRY, read.Bundle(made, "dry"), record, {})
    program = programs.Program(PROGRAM.name, PROGRAM.make, kernels=("a kernel",))
    call, results = given.first(program, *_inputs())
    assert len(results) == 4
    assert given.load(program) is call  # from now on
    records = read_records(tmp_path / "records")
    assert [r["how"] for r in records if r["kind"] == "program"] == [read.CARRIED, read.COMPILED]
    assert "NO_BINARY_FOR_GPU" in [r["why"] for r in records if r["kind"] == "program"][1]
    assert [r["kernels"] for r in records if r["kind"] == "end" and r.get("error")] == [[]]


def test_names_of_programs_are_names_of_files() -> None:
    for setting in ("dry", "card"):
        found = make.everything(setting)
        files = {programs.file_name(name) for name in found}
        assert len(files) == len(found)
        assert all(name.replace("_", "").isalnum() for name in files)


def test_the_fingerprint_is_of_contents_and_names(tmp_path: pathlib.Path) -> None:
    fingerprint = functools.partial(read.fingerprint, tmp_path, ("a/**/*.py",))
    (tmp_path / "a" / "b").mkdir(parents=True)
    seen = {fingerprint()}
    for change in [
        lambda: (tmp_path / "a" / "x.py").write_text("1"),
        lambda: (tmp_path / "a" / "x.py").write_text("2"),
        lambda: (tmp_path / "a" / "x.py").rename(tmp_path / "a" / "b" / "x.py"),
    ]:
        change()
        seen.add(fingerprint())
    assert len(seen) == 4
    (tmp_path / "a" / "x.txt").write_text("1")
    assert fingerprint() in seen


# Wheels.


def test_wheels_are_pinned() -> None:
    pins = wheels.versions(ROOT / "setup.cfg")
    assert set(pins) == set(wheels.MODULES)
    assert all(pins.values())


def _wheel(folder: pathlib.Path, name: str, module: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr(f"{module}.py", "HERE = True\n")


def test_only_what_is_missing_and_fits_is_unpacked(tmp_path: pathlib.Path) -> None:
    _wheel(tmp_path / "wheels", "a-1-py3-none-any.whl", "a_module_that_is_not_there")
    _wheel(tmp_path / "wheels", "b-1-py3-none-any.whl", "json")
    _wheel(tmp_path / "wheels", "c-1-cp39-cp39-manylinux.whl", "another_module_that_is_not_there")
    names = {"a-1": "a_module_that_is_not_there", "b-1": "json", "c-1": "another_module_that_is_not_there"}
    given = {path.name: names[path.name[:3]] for path in (tmp_path / "wheels").iterdir()}
    _write(tmp_path, wheels=given, sources="another")  # of a refused bundle too
    assert wheels.unpack(tmp_path, tmp_path / "site") == ["a-1-py3-none-any.whl"]
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["a_module_that_is_not_there.py"]
    assert wheels.unpack(None, tmp_path / "site") == []


# The command.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only=("], r"--only is '\(', no regular expression"), ([], "CUDA_ROOT|ptxas|not installed")],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message) -> None:
    import os
    import re

    env = os.environ | {"JAX_PLATFORMS": "cpu", "PATH": "/nowhere"}
    words = ["--nowheels", f"--output={tmp_path / 'bundle'}", *arguments]
    result = subprocess.run(
        [sys.executable, "-m", "launch.gpu.bundle", *words], cwd=ROOT, capture_output=True, text=True, env=env,
        check=False, timeout=500,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


# What is carried is the truth.


def test_sampled_answers_are_those_of_the_reference() -> None:
    """Of all the places and bandwidths of a dry run, by the dense reference on whole arrays."""
    import jax.numpy as jnp

    from pallas_kernels.retrieval import retrieve

    place = problem.Place("long-term", "packed", DRY.packed)
    bandwidth = problem.model_bandwidth(DRY, place)
    found = problem.of_one_array(problem.answer(DRY, place, bandwidth))
    cotangent, key, value = problem.random_arrays((1, place.time, DRY.heads, DRY.width))
    ends = [jnp.asarray(end) for end in problem.interval(DRY, place)]

    def read_it(key, value, bandwidth):
        return retrieve(key, key, value, bandwidth, *ends, implementation="reference")

    arrays = [jnp.asarray(array, jnp.float32) for array in (key, value, bandwidth)]
    output, pull = jax.vjp(read_it, *arrays)
    results = dict(zip(problem.NAMES, (output, *pull(jnp.asarray(cotangent, jnp.float32))), strict=True))
    for name, array in problem.sampled(results, place.time).items():
        np.testing.assert_allclose(array, found[name], rtol=0, atol=1e-4, err_msg=name)


def test_the_models_bandwidth_is_the_models() -> None:
    import jax.numpy as jnp

    from mosaics_jax.config import Config, default_config
    from mosaics_jax.nn import layers, memory

    values = default_config()
    values.model.heads = DRY.heads
    config = Config.from_config_dict(values).model
    place = problem.Place("long-term", "unpacked", DRY.time)
    start_BT, stop_BT = problem.interval(DRY, place)
    expected = memory.Bandwidth(config, layers.Seed(0))(jnp.asarray(stop_BT - start_BT))
    np.testing.assert_allclose(problem.model_bandwidth(DRY, place), expected, rtol=1e-6)


def test_intervals_are_the_models() -> None:
    import jax.numpy as jnp

    from mosaics_jax import visibility
    from pallas_kernels.retrieval import cases

    document_BT = cases.packed(90, 7)
    start_BT = cases.document_start(document_BT)
    expected_BT = visibility.document_start(jnp.asarray(document_BT))
    np.testing.assert_array_equal(start_BT, expected_BT)
    for measured, expected in [
        (cases.long_term(start_BT, 5), visibility.long_term(expected_BT, 5)),
        (cases.short_term(start_BT, 7), visibility.short_term(expected_BT, 7)),
        (cases.causal(start_BT), visibility.causal(expected_BT)),
        (cases.causal(start_BT, 7), visibility.causal(expected_BT, 7)),
    ]:
        for end, other in zip(measured, expected, strict=True):
            np.testing.assert_array_equal(end, other)

"""A path is a path: whatever is in its name, ~ at its beginning, and one writer of a folder at a time."""

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import time

import helpers
import jax
import pytest
from absl import flags
from ml_collections import config_flags

from launch import command
from mosaics_jax import paths
from mosaics_jax.checkpoint import Checkpoints
from mosaics_jax.config import Config, default_config, load_config
from mosaics_jax.evaluate.settings import text_files
from mosaics_jax.record import RunRecord, check_same_run
from mosaics_jax.step import init_state

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 500
NAMES = [
    "50%", "a%20b", "hash#tag", "what?", "[2026] run", "star*", "back\\slash", "a|b", "semi;colon", "$HOME", "a{b}c",
    "new\nline", "quote'd", 'double"', "-dash", "a:b", "a=b,c", "@x", "ünï 日本", "a" * 200,
]  # fmt: skip
ALL = "a 50% #?*[b]\\|;$x{c}'\"@é:="  # most of them in one name


@pytest.fixture(scope="module")
def state():
    config = helpers.tiny_config()
    return config, jax.jit(functools.partial(init_state, config))(None)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_lie_in_a_folder_of_any_name(name, state, tmp_path):
    config, values = state
    record = RunRecord(config.to_dict(), "0" * 64, 0)
    checkpoints = Checkpoints(tmp_path / name, config.checkpoint)
    checkpoints.save(values, 1, record)
    assert [save["problem"] for save in checkpoints.wait()] == [""]
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["checkpoints"]
    again = Checkpoints(tmp_path / name)
    assert again.chosen(None) == 1
    assert again.problem(1) == ""
    assert again.record(1).manifest == record.manifest
    here = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), values)
    restored = again.restore(1, here)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), restored.params, values.params))
    again.close()


def _run(*words, cwd, timeout=PATIENCE):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [ALL, pytest.param("50%", marks=pytest.mark.long)])
def test_prepare_train_kill_resume_evaluate_export_generate(name, tmp_path):
    """All in one folder of that name, which is also the working directory."""
    place = tmp_path / name
    texts = place / "texts"
    texts.mkdir(parents=True)
    for number in range(60):
        (texts / f"{number}.txt").write_text(f"text number {number} of those that are read " * 8)
    made = _run("launch.prepare", f"--input={texts}", f"--output={place / 'corpus'}", "--valid_fraction=0.2", cwd=place)
    assert made.returncode == 0, made.stderr
    config = helpers.tiny_config(place / "corpus", **{"run.steps": 600, "checkpoint.every": 30, "run.eval_every": 600})
    words = [
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        *helpers.command_line(config)[1:],
        f"--workdir={place / 'run'}",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, "-m", "launch.train", *words]
        life = subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + PATIENCE
    while not list((place / "run" / "checkpoints").glob("*/verified.json")):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        assert life.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    life.kill()
    life.wait()
    resumed = _run("launch.train", *words, cwd=place)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"resuming .* at step [1-9]", resumed.stdout)
    assert not (place / "run" / "damaged").exists()
    for command in (
        ["launch.evaluate", f"--workdir={place / 'run'}", "--suite=perplexity", "--lengths=32", "--count=2"],
        ["launch.export", f"--workdir={place / 'run'}", f"--output={place / 'export'}"],
        ["launch.generate", f"--workdir={place / 'run'}", "--prompt=text", "--max_new_tokens=4"],
        ["launch.goodput", str(place / "run")],
        ["launch.prepare", f"--verify={place / 'corpus'}"],
    ):
        done = _run(*command, cwd=place)
        assert done.returncode == 0, (command, done.stderr)
    assert {path.name for path in place.iterdir()} - {"compilation_cache"} == {"texts", "corpus", "run", "export"}


# ~ and relative paths.


def test_a_path_becomes_absolute_and_a_tilde_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert paths.absolute("~/runs") == tmp_path / "home" / "runs"
    assert paths.absolute("runs/~a") == tmp_path / "runs" / "~a"
    assert paths.absolute("/a b%") == pathlib.Path("/a b%")
    with pytest.raises(ValueError, match=r"'~nobody-of-that-name/x' names the home of nobody; legal: ~/"):
        paths.absolute("~nobody-of-that-name/x")


def test_every_field_of_a_config_that_is_a_path_is_made_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = default_config()
    config.data.path = "~/data"
    config.checkpoint.local_dir = "~/local"
    config.run.compilation_cache = "~/cache"
    config.init_from = "~/other"
    made = Config.from_config_dict(config)
    assert made.data.path == str(tmp_path / "data")
    assert made.checkpoint.local_dir == str(tmp_path / "local")
    assert made.run.compilation_cache == str(tmp_path / "cache")
    assert made.init_from == str(tmp_path / "other")
    plain = Config.from_config_dict(default_config())
    assert plain.data.path == str(pathlib.Path.cwd() / "data" / "python")
    assert (plain.checkpoint.local_dir, plain.run.compilation_cache, plain.init_from) == ("", "auto", "")


def test_a_run_that_noted_a_relative_path_goes_on(tmp_path, monkeypatch):
    """As runs did that were begun before paths were made absolute."""
    monkeypatch.chdir(tmp_path)
    noted = helpers.tiny_config(init_from="runs/first")
    now = dataclasses.replace(noted, init_from=str(tmp_path / "runs" / "first"))
    saved = RunRecord.from_dict(RunRecord(noted.to_dict(), "0" * 64, 0).to_dict())
    check_same_run(saved, RunRecord(now.to_dict(), "0" * 64, 0), "it")
    other = dataclasses.replace(noted, init_from=str(tmp_path / "runs" / "second"))
    with pytest.raises(ValueError, match=r"it was made with other settings .init_from: .*/runs/first' -> .*/runs/sec"):
        check_same_run(saved, RunRecord(other.to_dict(), "0" * 64, 0), "it")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ml_collections'
@pytest.mark.parametrize("name", ["a:b", "a b%", "~x", "[2026]"])
@pytest.mark.parametrize("argument", ["", ":8"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_config_file_lies_in_a_folder_of_any_name(name, argument, joined, tmp_path):
    """Its loader takes what follows a colon for the recipe's argument."""
    (tmp_path / name).mkdir()
    recipe = (
        "def get_config(which=''):\n    import ml_collections\n    return ml_collections.ConfigDict({'which': which})\n"
    )
    (tmp_path / name / "mine.py").write_text(recipe)
    known = flags.FlagValues()
    given = f"{tmp_path / name / 'mine.py'}{argument}"
    argv = ["train", *([f"--config={given}"] if joined else ["--config", given])]
    config_flags.DEFINE_config_file("config", None, "", flag_values=known, sys_argv=argv)
    assert command.parse(argv, known) == ["train"]
    assert known["config"].value.which == argument.removeprefix(":")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.py", "no config file 'nowhere.py'"),
        ("", "no config file ''"),
        ("~/a:b/c:d.py", "no colon in its own"),
        ("~nobody-of-that-name/a.py", "names the home of nobody"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_named(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "c:d.py").touch()
    known = flags.FlagValues()
    argv = ["train", f"--config={given}", "--config.x=1"]
    config_flags.DEFINE_config_file("config", None, "", flag_values=known, sys_argv=argv)
    with pytest.raises(SystemExit, match="2"):
        command.parse(argv, known)
    assert message in capsys.readouterr().err


def test_two_files_with_colons_in_their_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a:b,c").mkdir()
    train, test = tmp_path / "a:b,c" / "train.csv", tmp_path / "a:b,c" / "test.csv"
    train.touch()
    test.touch()
    assert text_files(f"own={train}:{test}") == ("own", train, test)
    assert text_files("own=~/a:b,c/train.csv:~/a:b,c/test.csv") == ("own", train, test)
    with pytest.raises(ValueError, match=r"of whose files one or both are not there; legal: NAME=TRAIN:TEST"):
        text_files(f"own={train}:{tmp_path}/none.csv")


def test_a_config_file_lies_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "tiny.py").read_text())
    assert load_config("~/mine.py") == load_config(str(ROOT / "configs" / "tiny.py"))


def test_every_flag_that_is_a_path_takes_a_tilde():
    """Those that are not defined so are listed here, with what they are."""
    others = {"input", "text", "texts", "tokenizer", "config", "only", "coordinator", "text_field", "record_format"}
    for path in (ROOT / "launch").rglob("*.py"):
        for name, doc in re.findall(
            r'DEFINE_(?:multi_)?(?:string|list)\(\s*"(\w+)",\s*[^,]+,\s*"([^"]*)', path.read_text()
        ):
            if re.search(r"director|folder|workdir|path|file\b|PNG", doc):
                assert name in others, (path, name, doc)


def test_files_have_the_mode_of_the_umask(tmp_path):
    path = tmp_path / "file"
    path.touch(0o600)
    before = os.umask(0o027)
    try:
        paths.give_usual_mode(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640

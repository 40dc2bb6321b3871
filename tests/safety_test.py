"""What comes from outside is data: none of it is executed, none reaches another directory, no secret is written."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import helpers
import numpy as np
import pytest

from mosaics_jax import whole
from mosaics_jax.config import DataConfig
from mosaics_jax.data import prepare as prepare_lib
from mosaics_jax.data.corpora import Corpora
from mosaics_jax.data.corpus import Manifest, Shard
from mosaics_jax.data.packing import plan_rows
from mosaics_jax.data.prepare import prepare

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted(
    path
    for package in ("mosaics_jax", "pallas_kernels", "launch", "configs")
    for path in (ROOT / package).rglob("*.py")
)

# What turns bytes into calls. A recipe of configs/ is a program that the user names: config.py alone may execute one.
_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "jsonpickle", "shelve", "marshal", "code"}
_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "exec_module",
    "load_module",
    "run_path",
    "run_module",
    "literal_eval",
}
_LOADERS = {"SafeLoader", "CSafeLoader", "BaseLoader"}
_ALLOWED = {
    ("mosaics_jax/config.py", "exec_module"),
    ("mosaics_jax/__init__.py", "import_module"),  # its own modules, from a table
}


def executed(source: str) -> Iterator[tuple[str, int]]:
    """Everything in a module that could run what it reads: (what, line)."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            yield from ((what, node.lineno) for what in _of_call(node))
        for name in names:
            if name.split(".")[0] in _MODULES or name in ("torch.load", "numpy.load", "yaml.load"):
                yield name, node.lineno


def _of_call(node: ast.Call) -> Iterator[str]:
    owner, name = "", ""
    if isinstance(node.func, ast.Name):
        name = node.func.id
    elif isinstance(node.func, ast.Attribute):
        owner, name = ast.unparse(node.func.value), node.func.attr
    arguments = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in _CALLS and owner != "re" and not (name == "compile" and owner):  # lowered.compile() is jax's
        yield name
    if name == "import_module" and not (node.args and isinstance(node.args[0], ast.Constant)):
        yield name
    if "allow_pickle" in arguments and ast.unparse(arguments["allow_pickle"]) != "False":
        yield "allow_pickle"
    if owner in ("torch", "joblib") and name == "load":
        yield f"{owner}.load"
    if owner == "yaml" and name in ("load", "load_all", "unsafe_load", "full_load"):
        loader = arguments.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
        if loader is None or ast.unparse(loader).rpartition(".")[2] not in _LOADERS:
            yield f"yaml.{name}"
    if name in ("system", "popen") and owner == "os":
        yield f"os.{name}"
    if "shell" in arguments and ast.unparse(arguments["shell"]) != "False":
        yield "shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_executed(path: pathlib.Path) -> None:
    name = str(path.relative_to(ROOT))
    found = [(what, line) for what, line in executed(path.read_text()) if (name, what) not in _ALLOWED]
    assert not found


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from pickle import loads", "pickle"),
        ("import cloudpickle as harmless", "cloudpickle"),
        ("from dill import load", "dill"),
        ("import shelve", "shelve"),
        ("import marshal", "marshal"),
        ("from torch import load", "torch.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("np.load(path, allow_pickle=flag)", "allow_pickle"),
        ("torch.load(path)", "torch.load"),
        ("yaml.load(text)", "yaml.load"),
        ("yaml.load(text, yaml.Loader)", "yaml.load"),
        ("yaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("compile(text, '', 'exec')", "compile"),
        ("__import__(name)", "__import__"),
        ("importlib.import_module(name)", "import_module"),
        ("os.system(text)", "os.system"),
        ("subprocess.run(text, shell=True)", "shell"),
    ],
)
def test_the_search_finds_what_it_is_for(source: str, what: str) -> None:
    assert what in [found for found, _ in executed(source)]


def test_the_search_passes_over_what_is_safe() -> None:
    safe = "np.load(p); np.load(p, allow_pickle=False); yaml.safe_load(t); yaml.load(t, Loader=yaml.SafeLoader)"
    assert not list(executed(safe + "; re.compile(p); lowered.compile(); json.loads(t)"))


def test_numpy_itself_refuses_pickles(tmp_path: pathlib.Path) -> None:
    """`np.load` without the argument is safe because of numpy's default; a numpy that changed it would fail here."""
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "objects.npy")


OUTSIDE = [
    "../secret.tokens", "/etc/passwd", "a/b.tokens", "a/../../secret.tokens", "..", ".", "",
    "secret.tokens\0.tokens", "~/secret.tokens", "secret.tokens/", "secret", "secret.json",
    "\\\\host\\secret.tokens", "..\\secret.tokens", "{absolute}/secret.tokens",
    ".tokens", ".hidden.tokens", "new\nline.tokens",
    "\ud800.tokens", "-" + "a" * 300 + ".tokens",
]  # fmt: skip


@pytest.fixture
def mine(corpus: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A corpus of one's own, and beside it files that a manifest must not lead to."""
    shutil.copytree(corpus, tmp_path / "corpus")
    for suffix in (".tokens", ".crc32", ".documents"):
        shutil.copy(corpus / f"train-00000{suffix}", tmp_path / f"secret{suffix}")
    return tmp_path / "corpus"


def _point_to(corpus: pathlib.Path, file: str) -> None:
    body = whole.read_json(corpus / "manifest.json")
    body["splits"]["train"]["shards"][0]["file"] = file.format(absolute=corpus.parent)
    whole.write_json(corpus / "manifest.json", body)


@pytest.mark.parametrize("file", OUTSIDE)
def test_a_manifest_names_files_of_its_own_directory(mine: pathlib.Path, file: str) -> None:
    _point_to(mine, file)
    with pytest.raises(
        ValueError,
        match=r"^'.*manifest.json' is not a manifest .*has file .*; restore it from a copy, or prepare",
    ):
        Manifest.load(mine)


def test_the_secret_would_have_been_read(mine: pathlib.Path) -> None:
    """What the test above refuses is no impossible corpus: without the check it would be read."""
    shard = Manifest.load(mine).splits["train"].shards[0]
    assert (mine / "../secret.tokens").stat().st_size == (mine / shard.file).stat().st_size
    _point_to(mine, "train-00000.tokens")
    assert Manifest.load(mine).splits["train"].shards[0] == shard


@pytest.mark.parametrize("flag", ["--verify", "--pack", "--inspect"])
def test_no_command_follows_a_manifest_outside(mine: pathlib.Path, flag: str) -> None:
    _point_to(mine, "../secret.tokens")
    before = sorted(mine.parent.rglob("*"))
    command = [sys.executable, "-m", "launch.prepare", f"{flag}={mine}", "--context=32"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*manifest.json' is not a manifest .*'../secret.tokens'.*\n", result.stderr)
    assert sorted(mine.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "../corpus", "a\0b", "a\nb", "\ud800"])
@pytest.mark.parametrize("field", ["mixture", "mixture_changes"])
def test_a_mixture_names_folders_of_its_own_directory(mine: pathlib.Path, name: str, field: str) -> None:
    weights = {name: 1.0}
    values = (
        {"mixture": weights} if field == "mixture" else {"mixture": {"corpus": 1.0}, "mixture_changes": {"3": weights}}
    )
    with pytest.raises(ValueError, match=rf"data.{field}.*has the name .*legal: the name of a folder in data.path"):
        Corpora(DataConfig(path=str(mine.parent), **values))


def _stop_after_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Callable[[], Manifest]:
    """Leaves a work folder with finished shards; what is returned goes on from it."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"Text {i}."}) + "\n" for i in range(30)))

    class Stopped(BaseException):
        pass

    def stop(_: Manifest) -> None:
        raise Stopped

    def run() -> Manifest:
        return prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), valid_fraction=0.3)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_lib, "_clear", stop)
        with pytest.raises(Stopped):
            run()
    return run


@pytest.mark.parametrize("file", ["../secret.tokens", "/etc/passwd", "valid-00000.tokens", "a\0.tokens", 3, None])
def test_a_run_that_goes_on_takes_no_name_from_its_work_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, file: object
) -> None:
    go_on = _stop_after_shards(monkeypatch, tmp_path)
    described = tmp_path / "out.partial" / "train-00000.json"
    whole.write_json(described, whole.read_json(described) | {"file": file})
    (tmp_path / "secret.tokens").write_bytes(b"mine")
    manifest = go_on()
    assert [shard.file for split in manifest.splits.values() for shard in split.shards] == [
        "train-00000.tokens", "valid-00000.tokens",
    ]  # fmt: skip
    assert Manifest.load(tmp_path / "out").splits == manifest.splits
    assert (tmp_path / "secret.tokens").read_bytes() == b"mine"


def test_a_run_that_goes_on_redoes_no_shard_that_is_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above would pass with shards that are never found again."""
    go_on = _stop_after_shards(monkeypatch, tmp_path)
    before = (tmp_path / "out.partial" / "train-00000.tokens").stat().st_mtime_ns
    go_on()
    assert (tmp_path / "out" / "train-00000.tokens").stat().st_mtime_ns == before


def test_plans_are_written_into_the_corpus_alone(mine: pathlib.Path) -> None:
    before = sorted(mine.parent.rglob("*"))
    plan_rows(Manifest.load(mine), 32)
    new = set(mine.parent.rglob("*")) - set(before)
    assert {path.relative_to(mine).parts[0] for path in new} == {"packing-32"}
    assert all(isinstance(shard, Shard) for shard in Manifest.load(mine).splits["train"].shards)


@pytest.mark.slow
def test_no_environment_variable_is_written_down(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    secret = "kumquat-7f3a9d51-zeppelin"
    config = helpers.tiny_config(corpus, **{"run.steps": 4})
    command = [sys.executable, "-m", "launch.train", f"--workdir={tmp_path}/run", *helpers.command_line(config)]
    environment = os.environ | {"SECRET_TOKEN": secret}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, timeout=500)
    assert result.returncode == 0, result.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl"} <= {path.name for path in written}
    assert any("checkpoints" in path.parts for path in written)
    for content in (result.stdout, result.stderr, *(path.read_bytes() for path in written)):
        assert secret.encode() not in content
        assert b"SECRET_TOKEN" not in content

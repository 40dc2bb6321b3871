"""Whatever a user hands in gives a result, or a ValueError of our own, one line that names it; nothing half-written."""

import contextlib
import copy
import json
import linecache
import pathlib
import re
import shutil
import traceback
from collections.abc import Iterator
from typing import Any

import helpers
import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

from launch import command
from mosaics_jax import config as config_lib
from mosaics_jax.data import bpe
from mosaics_jax.data.check import describe_row, problems, summary
from mosaics_jax.data.corpora import Corpora
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.packing import plan_rows
from mosaics_jax.data.prepare import prepare
from mosaics_jax.data.tokenizer import load_tokenizer, make_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
OURS = tuple(str(ROOT / package) for package in ("mosaics_jax", "launch", "pallas_kernels", "configs"))


def fuzz(examples: int) -> settings:
    """The same examples every time: a failure is of the code, not of luck."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


@contextlib.contextmanager
def refused_in_one_line(*names: str) -> Iterator[None]:
    """Passes, or raises by a `raise` statement of this project a ValueError of one line that holds one of `names`."""
    try:
        yield
    except ValueError as error:
        frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
        where = f"{frame.f_code.co_filename}:{line}"
        assert frame.f_code.co_filename.startswith(OURS), where
        assert "raise " in linecache.getline(frame.f_code.co_filename, line), where
        message = str(error)
        assert message.splitlines() == [message], (where, message)
        assert len(message) < 3000, where
        assert any(name in message for name in names), (where, message)


# Numbers at which something ends: bytes, int32, int64, float32, float64.
EDGES = [0, 1, -1, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**310]
numbers = st.sampled_from(EDGES) | st.integers(-3, 70) | st.floats() | st.integers()
# With what no encoder takes and no terminal shows, and halves of surrogate pairs among it.
texts = st.text(st.characters(), max_size=8) | st.sampled_from(
    [
        "",
        ".",
        "..",
        "/",
        "a/b",
        "../x",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "\n",
        "{",
        "(",
        "nan",
        "1e400",
        "0x" + "f" * 4000,
    ]
)
scalars = st.none() | st.booleans() | numbers | texts
json_like = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


@st.composite
def changed_json(draw: st.DrawFn, body: Any) -> Any:
    """`body` with one to three places of it replaced, removed or added to, at any depth."""
    root = {"": copy.deepcopy(body)}
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = root
        key: Any = ""
        while draw(st.integers(0, 4)):
            inner = holder[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            holder, key = inner, draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
        match draw(st.sampled_from(["replaced", "replaced", "removed", "added"])):
            case "removed":
                del holder[key]
            case "added" if isinstance(holder, dict):
                holder[draw(texts)] = draw(json_like)
            case _:
                holder[key] = draw(json_like)
        root.setdefault("", None)
    return root[""]


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut short, with a piece of it replaced or repeated, or anything else in its place."""
    first, last = sorted((draw(st.integers(0, len(content))), draw(st.integers(0, len(content)))))
    match draw(st.sampled_from(["cut", "replaced", "replaced", "repeated", "other", "deep"])):
        case "cut":
            return content[:first]
        case "replaced":
            return (
                content[:first] + draw(st.binary(min_size=1, max_size=4)) + content[first + draw(st.integers(0, 4)) :]
            )
        case "repeated":
            return content[:last] + content[first:]
        case "deep":
            return draw(st.sampled_from([b"[", b'{"a":', b"[{"])) * 100_000
    return draw(st.binary(max_size=40))


FIELDS = sorted(config_lib.flat(config_lib.Config().to_dict()))
weights = st.dictionaries(texts | st.integers(), scalars, max_size=3)
mixtures = weights | st.dictionaries(
    texts | st.sampled_from(["7", "2", "9" * 5000, "٣"]) | st.integers(), weights, max_size=2
)


@fuzz(400)
@given(st.dictionaries(st.sampled_from(FIELDS), json_like | mixtures, min_size=1, max_size=2))
def test_values_of_a_config(changes: dict[str, Any]) -> None:
    values = helpers.tiny_config().to_dict()
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        (values[section] if section else values)[field] = value
    with refused_in_one_line(*changes):
        config = config_lib.Config.from_dict(values)
        assert config_lib.Config.from_dict(config.to_dict()) == config


@fuzz(200)
@given(st.data())
def test_shapes_of_a_config(data: st.DataObject) -> None:
    """Fields that are missing or that nobody knows, and anything in the place of a section or of all."""
    values: Any = helpers.tiny_config().to_dict()
    section = data.draw(st.sampled_from(sorted(values)))
    match data.draw(st.sampled_from(["whole", "section", "lacks", "unknown"])):
        case "whole":
            values = data.draw(json_like)
        case "section":
            values[section] = data.draw(json_like)
        case "lacks":
            del (values[section] or values)[data.draw(st.sampled_from(sorted(values[section]) or [section]))]
        case "unknown":
            (values[section] or values)[data.draw(texts | st.integers())] = data.draw(scalars)
    with refused_in_one_line("the config", f"config.{section}", section):
        config_lib.Config.from_dict(values)


literals = json_like.map(repr) | mixtures.map(repr)
typed = texts | literals | st.sampled_from(["[" * 400, "{[]: 1}", "{'a': {}}", "(1, ", "true", "9" * 5000])


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::SyntaxWarning"
)  # ml_collections'; "\\d" in a literal
@fuzz(250)
@given(st.sampled_from([*FIELDS, "model", "data", "", "model.x", "x.y", "data.mixture.a"]) | texts, typed)
def test_overrides_of_the_command_line(capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    _override(capsys, name, value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("value", ["-" * 200_000, "[" * 200_000, "0x" + "f" * 50_000, "9" * 50_000])
@pytest.mark.parametrize("name", ["data.mixture", "run.seed", "checkpoint.steps", "model.rope_theta", "data.path"])
def test_long_overrides(capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    _override(capsys, name, value)


def _override(capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    argv = ["train", "--config=configs/tiny.py", f"--config.{name}={value}"]
    known = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=known, sys_argv=argv)
    try:
        command.parse(argv, known)
    except SystemExit as stopped:
        shown = capsys.readouterr()
        assert (stopped.code, shown.out) == (2, "")  # noqa: PT017 (it need not be raised)
        assert re.fullmatch(r"error: [^\n]*(--config\.|the config)[^\n]*\n", shown.err)
        assert len(shown.err) < 4100
    else:
        with refused_in_one_line(name.strip(), "config", "model", "data"):
            config_lib.Config.from_config_dict(known["config"].value)


@pytest.mark.parametrize("name", ["model.layers", "run.seed", "model.norm_epsilon", "checkpoint.steps", "init_from"])
def test_an_integer_that_python_does_not_write_out(name: str) -> None:
    """Apart, for hypothesis could not show it either."""
    huge = 1 << 20_000
    values = helpers.tiny_config().to_dict()
    section, _, field = name.rpartition(".")
    (values[section] if section else values)[field] = [huge] if name == "checkpoint.steps" else huge
    with refused_in_one_line(name):
        assert config_lib.Config.from_dict(values).run.seed == huge


@pytest.fixture(scope="module")
def spoiled(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the corpus with a plan, of which a test may change any file and puts it back."""
    directory = tmp_path_factory.mktemp("spoiled") / "corpus"
    shutil.copytree(corpus, directory)
    plan_rows(Manifest.load(directory), 32)
    return directory


@contextlib.contextmanager
def holding(path: pathlib.Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def use_corpus(directory: pathlib.Path) -> None:
    """All that a user does with a corpus; every step either answers, or refuses."""
    named = refused_in_one_line(str(directory))
    files = sorted(directory.rglob("*"))
    with named:
        for line in problems(manifest := Manifest.load(directory)):
            assert line.splitlines() == [line]
        summary(manifest)
    for packing in ("concat", "best_fit"):
        with refused_in_one_line(str(directory)):
            corpora = Corpora(helpers.tiny_config(directory, **{"data.packing": packing, "data.batch": 2}).data)
            mixture, valid = corpora.training(), corpora.validation("")
            for row in (0, 1, 7, 10**6):
                assert mixture[row].shape == (2, 32)
            assert valid[len(valid) - 1].shape == (2, 32)
            assert corpora.bytes_per_prediction >= 0
            assert len(corpora.fingerprint) == 64
        with refused_in_one_line(str(directory)):
            describe_row(Manifest.load(directory), "train", 0, 32, packing)
    assert sorted(directory.rglob("*")) == files


@fuzz(150)
@given(st.data())
def test_manifests(spoiled: pathlib.Path, data: st.DataObject) -> None:
    path = spoiled / "manifest.json"
    changed = data.draw(changed_json(json.loads(path.read_bytes())))
    with holding(path, json.dumps(changed).encode()):
        use_corpus(spoiled)


# The small files beside the shards; of the shards every block is checked as it is read.
@fuzz(150)
@given(st.data())
def test_bytes_of_a_corpus(spoiled: pathlib.Path, data: st.DataObject) -> None:
    files = [path for path in sorted(spoiled.rglob("*")) if path.is_file() and path.name != "skipped.jsonl"]
    path = data.draw(st.sampled_from([spoiled / "manifest.json", *files]))
    with holding(path, data.draw(changed_bytes(path.read_bytes()))):
        use_corpus(spoiled)


@fuzz(60)
@given(st.data())
def test_plans(spoiled: pathlib.Path, data: st.DataObject) -> None:
    path = spoiled / "packing-32" / "plan.json"
    changed = data.draw(changed_json(json.loads(path.read_bytes())))
    with holding(path, json.dumps(changed).encode()):
        use_corpus(spoiled)

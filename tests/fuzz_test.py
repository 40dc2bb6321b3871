"""Whatever a user hands in gives a result, or a ValueError of our own, one line that names it; nothing half-written."""

import contextlib
import copy
import functools
import json
import linecache
import pathlib
import re
import shutil
import traceback
from collections.abc import Iterator
from typing import Any

import helpers
import numpy as np
import pytest
import tokenizers
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

import mosaics_jax
from launch import command
from mosaics_jax import config as config_lib
from mosaics_jax import whole
from mosaics_jax.data import prepare as prepare_lib
from mosaics_jax.data.check import describe_row, problems, summary
from mosaics_jax.data.corpora import Corpora
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.packing import plan_rows
from mosaics_jax.data.prepare import prepare
from mosaics_jax.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from mosaics_jax.nn.model import LanguageModel, create, to_values

ROOT = pathlib.Path(__file__).parent.parent
OURS = tuple(str(ROOT / package) for package in ("mosaics_jax", "launch", "pallas_kernels", "configs"))


def fuzz(examples: int) -> settings:
    """The same examples every time: a failure is of the code, not of luck."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


@contextlib.contextmanager
def refused_in_one_line(*names: str, must: bool = False) -> Iterator[None]:
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
    else:
        assert not must


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
        "0x" + "f" * 400,
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


def resealed(body: Any) -> bytes:
    """JSON with the digest that belongs to it: what is tested is not the digest, but what stands behind it."""
    return json.dumps(whole.sealed(body) if isinstance(body, dict) else body).encode()


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
    changed = data.draw(changed_json(whole.read_json(path)))
    with holding(path, resealed(changed)):
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
    changed = data.draw(changed_json(whole.read_json(path)))
    with holding(path, resealed(changed)):
        use_corpus(spoiled)


@functools.cache
def tiny_model() -> LanguageModel:
    return create(helpers.tiny_config(**{"model.layers": 1, "model.width": 8, "model.ffn_width": 8}).model, 0)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("export")
    mosaics_jax.save_safetensors(tiny_model(), directory)
    return directory


def use_export(directory: pathlib.Path) -> None:
    with refused_in_one_line(str(directory)):
        model = mosaics_jax.load_safetensors(directory)
        leaves = to_values(model)
        assert {leaves["embedding"].dtype, leaves["blocks"]["W_o"].dtype} == {np.dtype("float32")}
        assert leaves["embedding"].shape == (model.config.vocabulary, model.config.width)


@fuzz(60)
@given(st.data())
def test_headers_of_safetensors(export: pathlib.Path, data: st.DataObject) -> None:
    path = export / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = data.draw(changed_json(json.loads(content[8 : 8 + size])))
    changed = json.dumps(header).encode()
    length = data.draw(st.just(len(changed)) | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, len(changed) + 1]))
    with holding(path, length.to_bytes(8, "little") + changed + content[8 + size :]):
        use_export(export)


@fuzz(60)
@given(st.data())
def test_a_tensor_of_safetensors(export: pathlib.Path, data: st.DataObject) -> None:
    """One entry of the header with other types, shapes and offsets: those that fit the file, too."""
    path = export / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    entry = header[data.draw(st.sampled_from(sorted(header)))]
    kinds = [
        "F32",
        "I32",
        "U32",
        "F16",
        "BF16",
        "F64",
        "I64",
        "BOOL",
        "F8_E4M3",
        "F8_E5M2",
        "F4",
        "C64",
        "f32",
        "",
        "X",
    ]
    entry["dtype"] = data.draw(st.sampled_from(kinds))
    if data.draw(st.booleans()):
        shapes = st.lists(st.sampled_from([*EDGES, 2, 4, 8]), max_size=3) | st.just(entry["shape"][::-1])
        entry["shape"] = data.draw(shapes)
    if data.draw(st.booleans()):
        entry["data_offsets"] = data.draw(st.lists(st.sampled_from([*EDGES, *entry["data_offsets"]]), max_size=3))
    changed = json.dumps(header).encode()
    with holding(path, len(changed).to_bytes(8, "little") + changed + content[8 + size :]):
        use_export(export)


@fuzz(80)
@given(st.data())
def test_files_of_an_export(export: pathlib.Path, data: st.DataObject) -> None:
    path = export / data.draw(st.sampled_from(["model.safetensors", "config.json", "config.json"]))
    content = path.read_bytes()
    if path.name == "config.json" and data.draw(st.booleans()):
        changed = json.dumps(data.draw(changed_json(json.loads(content)))).encode()
    else:
        changed = data.draw(changed_bytes(content))
    with holding(path, changed):
        use_export(export)


@pytest.mark.parametrize("spoil", ["a file", "a folder for a file", "no path", "a folder for a draft"])
def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path: pathlib.Path, spoil: str) -> None:
    directory = tmp_path / "export"
    match spoil:
        case "a file":
            directory.write_text("mine")
        case "a folder for a file":
            (directory / "model.safetensors" / "mine").mkdir(parents=True)
        case "a folder for a draft":
            (directory / "config.json.tmp" / "mine").mkdir(parents=True)
        case "no path":
            directory = tmp_path / "a\0b"
    before = sorted(tmp_path.rglob("*"))
    with refused_in_one_line(repr(str(directory)), must=True):
        mosaics_jax.save_safetensors(tiny_model(), directory)
    assert sorted(tmp_path.rglob("*")) == before


TEXTS = ["the cat sat on the cat's mat. " * 20, "naïve 你好 🙂 123\n"]


def hugging_face(path: pathlib.Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    path.write_text(inner.to_str(), encoding="utf-8")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folders of saved tokenizers, named by their kinds."""
    directory = tmp_path_factory.mktemp("tokenizers")
    hugging_face(directory / "tokenizer.json")
    for kind, spec in (("bytes", "bytes"), ("bpe", "bpe:264"), ("huggingface", str(directory / "tokenizer.json"))):
        make_tokenizer(spec, TEXTS).save(directory / kind)
    return directory


def use_tokenizer(tokenizer: Tokenizer) -> None:
    for text in (*TEXTS, ""):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocabulary
        assert isinstance(tokenizer.decode(ids), str)


@fuzz(120)
@given(st.data())
def test_files_of_tokenizers(saved: pathlib.Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in saved.rglob("*/*") if path.is_file())))
    content = path.read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        body = data.draw(changed_json(whole.opened(json.loads(content))))
        changed = resealed(body) if path.name == "tokenizer_config.json" else json.dumps(body).encode()
    else:
        changed = data.draw(changed_bytes(content))
    with holding(path, changed):
        with refused_in_one_line(str(path.parent), path.name):
            use_tokenizer(load_tokenizer(path.parent))
        with refused_in_one_line(str(path), "tokenizer.json"):  # the file by itself: no fingerprint guards it
            use_tokenizer(make_tokenizer(str(path)))


@fuzz(100)
@given(
    texts.filter(lambda spec: not spec.startswith("bpe"))
    | st.tuples(st.just("bpe:"), texts | numbers).map(lambda t: f"{t[0]}{t[1]}")
)
def test_names_of_tokenizers(spec: str) -> None:
    with refused_in_one_line("tokenizer is", "tokenizer file", "tokenizer_config.json"):
        use_tokenizer(make_tokenizer(spec, TEXTS))


prompts_ = (
    texts | st.text(max_size=40) | st.sampled_from(["\udc80", "<|begin_of_text|>", "\r\x1b[2J", "e\u0301", "  \n" * 30])
)


@fuzz(60)
@given(st.lists(prompts_, min_size=2, max_size=2))
def test_prompts(prompts: list[str]) -> None:
    tokenizer = make_tokenizer("bytes")
    with refused_in_one_line("surrogate"):
        found = mosaics_jax.generate(tiny_model(), tokenizer, [prompt[:50] for prompt in prompts], max_new_tokens=2)
        assert len(found) == 2
        assert all(isinstance(text, str) for text in found)


@fuzz(200)
@given(prompts_ | st.text(min_size=200) | st.none() | st.binary())
def test_texts(saved: pathlib.Path, text: Any) -> None:
    """Every tokenizer gives back the text, or refuses it."""
    for kind in ("bytes", "bpe", "huggingface"):
        with refused_in_one_line("surrogate", "legal: a str"):
            assert opened(saved / kind).decode(opened(saved / kind).encode(text)) == text


opened = functools.cache(load_tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 2**31}, {"max_new_tokens": 10**30}, {"max_new_tokens": 1.5},
        {"temperature": float("nan")}, {"temperature": -1.0}, {"temperature": None},
        {"top_k": -1}, {"top_k": 10**30}, {"top_k": "3"}, {"top_p": 0.0}, {"top_p": float("nan")}, {"top_p": []},
        {"seed": 10**30}, {"seed": "a"}, {"seed": -1}, {"seed": 2**40}, {"prompts": "the"}, {"prompts": [None]},
        {"prompts": [b"a"]}, {"prompts": 3}, {"prompts": ["a", 3]},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_generate(changes: dict[str, Any]) -> None:
    (name,) = changes
    with refused_in_one_line(name, "a text is"):
        arguments: dict[str, Any] = {"prompts": ["a", "b"], "max_new_tokens": 2} | changes
        assert len(mosaics_jax.generate(tiny_model(), make_tokenizer("bytes"), **arguments)) == 2


names = st.sampled_from(["a.txt", "a.jsonl", "a.txt.gz", "a.txt.xz", "a.jsonl.zst", "a.parquet", "a.txt.zst", "a.bin"])
contents = (
    st.binary(max_size=60)
    | json_like.map(lambda value: f"{json.dumps({'text': value})}\n".encode() * 3)
    | st.just(b"[" * 100_000)
)
arguments_ = st.fixed_dictionaries({}, optional={
    "valid_fraction": st.floats(), "shard_tokens": st.integers() | st.sampled_from(EDGES),
    "max_bytes": st.none() | st.integers(),
    "text_field": texts, "record_format": texts, "shuffle_seed": st.none() | st.integers(),
    "skip_bad_records": st.integers(-1, 3), "workers": st.integers(max_value=0) | st.sampled_from([10**30, 2000]),
})  # fmt: skip


SENTENCES = "".join(json.dumps({"text": f"Sentence {i} says something plain."}) + "\n" for i in range(30))


@fuzz(100)
@given(names, contents, arguments_)
def test_inputs_of_prepare(tmp_path: pathlib.Path, name: str, content: bytes, arguments: dict[str, Any]) -> None:
    """A whole corpus, or none: of what was begun only whole files stay, for the same command to go on from."""
    folder, output = tmp_path / "in", tmp_path / "out"
    for left in tmp_path.iterdir():
        shutil.rmtree(left)
    folder.mkdir()
    (folder / "good.jsonl").write_text(SENTENCES)
    (folder / name).write_bytes(content)
    with refused_in_one_line(str(folder), "valid_fraction", *arguments):
        made = prepare(
            [str(folder / "good.jsonl"), str(folder / name)], str(output), **({"valid_fraction": 0.3} | arguments)
        )
        assert list(problems(made)) == []
    assert not list(tmp_path.rglob("*/*.partial"))
    assert not (output.exists() and output.with_name("out.partial").exists())
    if output.exists():
        assert Manifest.load(output).splits.keys() == {"train", "valid"}


paths = texts.filter(lambda name: not name.startswith("/")) | st.sampled_from(
    ["/etc/passwd", "a" * 300, "caf\udce9", "out\n"]
)


@fuzz(100)
@given(paths.filter(lambda name: set(name) - set("./")), paths)
def test_names_that_prepare_is_given(tmp_path: pathlib.Path, name: str, output: str) -> None:
    place = tmp_path / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "good.jsonl").write_text(SENTENCES)
    with contextlib.suppress(OSError, ValueError):
        (place / name).write_text("A file of a strange name.")
    with contextlib.chdir(place):
        with refused_in_one_line("input", "output", ".jsonl", repr(name)):
            made = prepare(["good.jsonl", name], output, valid_fraction=0.3)
            assert list(problems(Manifest.load(made.directory))) == []
            assert summary(made).encode(errors="backslashreplace")
        with refused_in_one_line("no prepared corpus"):
            Manifest.load(output)
    assert not list(tmp_path.rglob("*/*/*.partial"))


# What a prepared corpus may hold, whatever lay in the work folder.
WRITTEN = {"manifest.json", "skipped.jsonl", "files.jsonl", "tokenizer"} | {
    f"{split}-00000.{kind}" for split in ("train", "valid") for kind in ("tokens", "crc32", "documents")
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The work folder of a run that was stopped when all was done but the last rename."""

    class Stopped(BaseException):
        pass

    def stop(_: Manifest) -> None:
        raise Stopped

    directory = tmp_path_factory.mktemp("stopped")
    (directory / "in.jsonl").write_text(SENTENCES)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
        patch.setattr(prepare_lib, "_clear", stop)
        prepare([str(directory / "in.jsonl")], str(directory / "out"), valid_fraction=0.3)
    assert (directory / "out.partial" / "manifest.json").exists()
    return directory / "out.partial"


@fuzz(60)
@given(st.data())
def test_what_a_stopped_run_of_prepare_left(stopped: pathlib.Path, tmp_path: pathlib.Path, data: st.DataObject) -> None:
    """Files of the work folder that are damaged are made again, or refused; never believed."""
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    for left in tmp_path.iterdir():
        shutil.rmtree(left)
    shutil.copytree(stopped, partial)
    path = data.draw(st.sampled_from(sorted(path for path in partial.rglob("*") if path.is_file())))
    content = path.read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        path.write_bytes(resealed(data.draw(changed_json(whole.read_json(path)))))
    elif path.suffix == ".stage" and data.draw(st.booleans()):
        size = int.from_bytes(content[-8:], "little")
        footer = resealed(data.draw(changed_json(whole.opened(json.loads(content[-8 - size : -8])))))
        path.write_bytes(content[: -8 - size] + footer + len(footer).to_bytes(8, "little"))
    else:
        path.write_bytes(data.draw(changed_bytes(content)))
    with refused_in_one_line(str(tmp_path)):
        prepare([str(stopped.parent / "in.jsonl")], str(output), "bytes", valid_fraction=0.3)
        assert {path.name for path in output.iterdir()} == WRITTEN

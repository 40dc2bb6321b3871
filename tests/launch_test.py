"""The commands as a user meets them: help, and every mistake answered in one line with exit code 2."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import helpers
import pytest

from mosaics_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent


def _run(module: str, *arguments: str | pathlib.Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"launch.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)


def _assert_user_error(result: subprocess.CompletedProcess, pattern: str) -> None:
    lines = [line for line in result.stderr.splitlines() if not re.match(r"[IWE]\d{4} ", line)]  # absl's log
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert re.match(f"error: .*{pattern}", lines[0]), lines[0]


@pytest.fixture(scope="module")
def workdir(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(helpers.tiny_config(corpus, **{"run.steps": 2, "optimizer.warmup_steps": 1}), workdir)
    return workdir


@pytest.mark.parametrize("module", ["prepare", "train", "generate", "export", "bench"])
def test_help_documents_every_flag(module: str) -> None:
    result = _run(module, "--help")
    assert result.returncode == 1  # absl's code for help
    source = (ROOT / "launch" / f"{module}.py").read_text()
    for flag in re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source):
        assert re.search(rf"--(\[no\])?{flag}:", result.stdout), flag
    if module == "train":
        assert "--config.optimizer.peak_learning_rate (default 0.0003)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--workdr=x"], "Unknown command line flag 'workdr'.*Did you mean: workdir"),
        ([], "--workdir is not set"),
        (["--workdir=x", "extra"], "unexpected argument 'extra'"),
        (["--workdir=x"], "--config is not set; legal: a config file, such as configs/tiny.py"),
        (["--workdir=x", "--config=configs/tyni.py"], "configs/tyni.py"),
        (["--workdir=x", "--config.model.layer=3"], 'Did you mean "layers"'),
        (["--workdir=x", "--config.model.layers=three"], "config.model.layers"),
        (["--workdir=x", "--config.model.heads=3"], "model.heads is 3, which does not divide model.width = 128"),
        (["--workdir=x", "--config.data.context=32"], "data.context is 32, shorter than the window"),
        (["--workdir=x", "--config.data.mixture.books=0.3"], r"has no 'books'; set a dictionary whole"),
        (["--workdir=x", "--config.data.mixture={'books':0}"], r"data.mixture.books is 0; legal: a positive number"),
        (["--workdir=x", "--config.data.packing=tight"], r"data.packing is 'tight'; legal: concat, best_fit"),
        (["--workdir=x", "--config.data.path=nowhere"], "no prepared corpus: '.*/nowhere'.*launch.prepare"),
    ],
)
def test_mistakes_of_train(arguments: list[str], pattern: str) -> None:
    tiny = ["--config=configs/tiny.py"] if any("--config." in argument for argument in arguments) else []
    _assert_user_error(_run("train", *tiny, *arguments), pattern)
    assert not (ROOT / "x").exists()


def test_a_truncated_shard_is_refused_before_training(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    shard = tmp_path / "corpus" / "train-00000.tokens"
    os.truncate(shard, shard.stat().st_size - 10)
    arguments = helpers.command_line(helpers.tiny_config(tmp_path / "corpus"))
    _assert_user_error(_run("train", f"--workdir={tmp_path}/run", *arguments), "train-00000.tokens")
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_stops_training_with_the_place(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    shard = tmp_path / "corpus" / "train-00000.tokens"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    arguments = helpers.command_line(helpers.tiny_config(tmp_path / "corpus"))
    pattern = (
        r"train-00000.tokens', bytes 0 to \d+: they do not match their checksum in '.*train-00000.crc32'; "
        "restore it from a copy, or prepare"
    )
    _assert_user_error(_run("train", f"--workdir={tmp_path}/run", *arguments), pattern)


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("absent.txt", None, "absent.txt"),
        ("empty.txt", b"", "empty.txt|no document"),
        ("latin.txt", b"caf\xe9 au lait", r"latin.txt.*byte 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad.jsonl.*2"),
        ("no_text.jsonl", b'{"txt": "a"}\n', r"no_text.jsonl.*text"),
        ("table.parquet", b"PAR1", r"table.parquet.*damaged"),
    ],
)
def test_mistakes_of_prepare(tmp_path: pathlib.Path, name: str, content: bytes | None, pattern: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    output = tmp_path / "out"
    _assert_user_error(_run("prepare", f"--input={tmp_path / name}", f"--output={output}"), f"(?:{pattern})")
    assert not output.exists()


def test_verify_inspect_and_pack(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    mine = tmp_path / "corpus"
    shutil.copytree(corpus, mine)
    assert "every checksum, id and count" in _run("prepare", f"--verify={mine}").stdout
    assert "train: rows of 64 are " in _run("prepare", f"--pack={mine}", "--context=64").stdout
    assert "made by python -m launch.prepare --input=" in _run("prepare", f"--inspect={mine}").stdout
    shown = _run("prepare", f"--inspect={mine}", "--row=3", "--context=64", "--packing=best_fit").stdout
    assert "row 3 of " in shown
    os.truncate(mine / "train-00000.tokens", 100)
    result = _run("prepare", f"--verify={mine}")
    assert "train-00000.tokens' has 100 bytes" in result.stdout
    _assert_user_error(result, r"has 2 problems, listed above")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "--output is not set; legal: a directory to make"),
        (["--output=a", "--verify=b"], "--output and --verify are set; legal: one of"),
        (["--verify=nowhere"], "no prepared corpus: '.*/nowhere'"),
        (["--inspect={corpus}", "--row=100000"], "row is 100000; legal: 0 to"),
        (["--inspect={corpus}", "--row=0", "--packing=best_fit"], "no best-fit plan for rows of 4096"),
        (["--pack={corpus}", "--context=0"], "context is 0"),
        (["--output={tmp}/x", "--tokenizer=nowhere"], "tokenizer is 'nowhere', which is no file"),
        (["--output={tmp}/x", "--record_format=proto"], "record_format is 'proto'; legal: text, json"),
        (["--output={tmp}/x", "--workers=-1"], "workers is -1"),
        (["--output=/proc/x"], "output '/proc/x' cannot be made"),
    ],
)
def test_more_mistakes_of_prepare(
    corpus: pathlib.Path, tmp_path: pathlib.Path, arguments: list[str], pattern: str
) -> None:
    given = [argument.format(corpus=corpus, tmp=tmp_path) for argument in arguments]
    _assert_user_error(_run("prepare", *given), pattern)


def test_prepare_never_overwrites(corpus: pathlib.Path) -> None:
    before = (corpus / "manifest.json").read_bytes()
    _assert_user_error(_run("prepare", f"--output={corpus}"), re.escape(str(corpus)))
    assert (corpus / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("module", ["generate", "export"])
def test_a_workdir_without_a_run(module: str, tmp_path: pathlib.Path) -> None:
    _assert_user_error(_run(module, f"--workdir={tmp_path}", f"--{'output' if module == 'export' else 'prompt'}=x"), "")
    _assert_user_error(_run(module), "--workdir")


def test_generate_and_export_a_run(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = _run("generate", f"--workdir={workdir}", "--prompt=the ", "--prompt=", "--max_new_tokens=5")
    assert result.returncode == 0, result.stderr
    assert "--- 2 ---" in result.stdout
    result = _run("export", f"--workdir={workdir}", f"--output={tmp_path}/export", "--without_long_term")
    assert result.returncode == 0, result.stderr
    assert "read back bit for bit" in result.stdout
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer",
    ]  # fmt: skip
    _assert_user_error(_run("generate", f"--workdir={workdir}", "--top_p=2"), "top_p is 2")


def test_a_half_written_checkpoint(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "params")
    _assert_user_error(_run("generate", f"--workdir={tmp_path}/run"), r"checkpoints/2 cannot be read")

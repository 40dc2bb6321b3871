"""Nothing that is read runs code: no pickle is opened, nothing is compiled, imported or started that came from data.

A run and a corpus have payloads planted in and beside all that is read. Then a process of its own reads all of it, and
Python tells (sys.addaudithook) of every pickle that looks up a name, every source that is compiled, every code that is
run and every program that is started, whatever library does it.
"""

import json
import os
import pathlib
import pickle
import shutil
import sqlite3
import subprocess
import sys
from typing import Any

import helpers
import numpy as np
import pytest
from oracles import TASK

from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.packing import plan_rows
from mosaics_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent
MARK = "planted_payload"  # stands in every payload, as source or as the name of what it makes
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
CHANGES: dict[str, Any] = {"run.steps": 4, "checkpoint.every": 2, "data.packing": "best_fit"}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, folder: pathlib.Path):
        self._command = f"touch {folder / MARK}"

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


def _plant(folder: pathlib.Path, marked: pathlib.Path) -> None:
    """A payload as a pickle, as an array of objects, as a module and as text, in a folder and all below it."""
    payload = pickle.dumps(Payload(marked))
    source = f"import os\nos.system('touch {marked / MARK}')\n"
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        if place.name == "evaluations":  # which is refused with other things in it
            continue
        for name in ("planted.pkl", "planted.pickle", "metadata.pkl"):
            (place / name).write_bytes(payload)
        np.save(place / "planted.npy", np.array([Payload(marked)], object), allow_pickle=True)
        for name in ("planted.py", "sitecustomize.py", "conftest.py", "tokenizer.py"):
            (place / name).write_text(source)


def _plant_in_the_old_cache(path: pathlib.Path, marked: pathlib.Path) -> None:
    """lm_eval's own cache of answers is a table of pickles, and a run of an older version has one here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path) as table:
        table.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
        from lm_eval.api.model import hash_args

        how = {"until": ["\n"], "max_gen_toks": 4}
        for key in (hash_args("generate_until", ("a", how)), hash_args("generate_until", ("the", how)), "any"):
            table.execute("INSERT INTO unnamed VALUES (?, ?)", (key, pickle.dumps(Payload(marked))))
    table.close()


@pytest.fixture(scope="module")
def planted(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """corpus/, run/ and tasks/, each with payloads in and beside its files."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(corpus, folder / "corpus")
    plan_rows(Manifest.load(folder / "corpus"), 32)
    train(helpers.tiny_config(folder / "corpus", **CHANGES), folder / "run")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.yaml").write_text(TASK.format(folder=folder / "tasks"))
    rows = [{"question": "a", "answer": "b"}, {"question": "the", "answer": f"{{{{ {MARK} }}}}"}]
    (folder / "tasks" / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("harness_rank0.db", "harness.db"):
        _plant_in_the_old_cache(folder / "run" / "evaluations" / "4" / name, folder)
    for name in ("corpus", "run", "tasks"):
        _plant(folder / name, folder)
    return folder


def _read(folder: pathlib.Path, *parts: str) -> dict[str, list[str]]:
    environment = helpers.OPTIMISED | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, str(folder), *parts]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_no_reader_runs_what_it_reads(planted: pathlib.Path) -> None:
    seen = _read(planted, "corpus", "run", "export", "evaluation", "harness")
    assert seen == {"pickles": [], "sources": [], "code": [], "modules": [], "started": []}
    assert not list(planted.rglob(MARK))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "what"),
    [("unpickles", "pickles"), ("evaluates", "sources"), ("imports", "modules"), ("starts", "started")],
)
def test_what_would_run_it_is_seen(planted: pathlib.Path, part: str, what: str) -> None:
    """Or the test above would pass whatever is done."""
    seen = _read(planted, part)
    assert seen[what], seen
    assert list(planted.rglob(MARK))
    for path in planted.rglob(MARK):
        path.unlink()


# --- what follows runs in the process of its own ---


class Watch:
    """What Python tells of while a reader runs."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._on = str(folder), False
        self.seen: dict[str, list[str]] = {"pickles": [], "sources": [], "code": [], "modules": [], "started": []}
        sys.addaudithook(self._hear)

    def __enter__(self) -> None:
        self._on = True

    def __exit__(self, *_: object) -> None:
        self._on = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "pickle.find_class":
            self.seen["pickles"].append(".".join(map(str, arguments)))
        elif event == "compile" and MARK in _text(arguments[0]):
            self.seen["sources"].append(_text(arguments[0])[:100])
        elif event == "exec" and str(arguments[0].co_filename).startswith(self._folder):
            self.seen["code"].append(arguments[0].co_filename)
        elif event == "import" and "planted" in str(arguments[0]):
            self.seen["modules"].append(str(arguments[0]))
        elif event in STARTS and "git" not in arguments:  # lm_eval asks for the commit of the folder it is started in
            self.seen["started"].append(f"{event} {arguments[:2]}"[:200])


def _text(source: Any) -> str:
    return source.decode(errors="replace") if isinstance(source, bytes) else str(source)


def _read_corpus(folder: pathlib.Path) -> None:
    from mosaics_jax.data.check import describe_row, problems, summary
    from mosaics_jax.data.corpora import Corpora
    from mosaics_jax.data.tokenizer import load_tokenizer

    load_tokenizer(Manifest.load(folder / "corpus").tokenizer_directory).encode("a text")
    config = helpers.tiny_config(folder / "corpus", **{"data.packing": "best_fit"})
    Corpora(config.data)
    manifest = Manifest.load(folder / "corpus")
    plan_rows(manifest, 16)
    summary(manifest)
    for packing in ("concat", "best_fit"):
        describe_row(manifest, "train", 0, config.data.context, packing)
    assert not list(problems(manifest))


def _read_run(folder: pathlib.Path) -> None:
    """Its checkpoint, its record, its history: what going on, and a model of it, need."""
    from mosaics_jax import history
    from mosaics_jax.api import load
    from mosaics_jax.record import read_run_record

    read_run_record(folder / "run")
    history.read_metrics(folder / "run")
    load(folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / "4")  # so that a checkpoint is restored and trained from
    train(helpers.tiny_config(folder / "corpus", **CHANGES), folder / "run")


def _read_export(folder: pathlib.Path) -> None:
    from mosaics_jax import export
    from mosaics_jax.api import load

    target = folder / "exported"
    model, tokenizer = load(folder / "run")
    export.save_safetensors(model, target, tokenizer)
    _plant(target, folder)
    export.load_safetensors(target)


def _evaluate(folder: pathlib.Path) -> None:
    from mosaics_jax.config import MeshConfig
    from mosaics_jax.evaluate import run
    from mosaics_jax.evaluate.model import RunModel
    from mosaics_jax.evaluate.settings import Settings

    settings = Settings(suite=("perplexity",), lengths=(16, 32), count=2)
    with run.writing(folder / "run"):
        for _ in range(2):  # the second reads what the first has answered
            list(run.evaluate(RunModel(folder / "run", MeshConfig()), folder / "run", settings, "", "command"))
        list(
            run.evaluate(
                RunModel(folder / "run", MeshConfig()), folder / "run", settings, "", "command", str(folder / "run")
            )
        )


def _run_harness(folder: pathlib.Path) -> None:
    from oracles import Scripted

    from mosaics_jax.evaluate import harness

    directory = folder / "run" / "evaluations" / "4"
    for _ in range(2):
        harness.run(Scripted(lambda prompt: "b"), ["own"], directory, folder=folder / "tasks")


def _unpickle(folder: pathlib.Path) -> None:
    pickle.loads((folder / "run" / "planted.pkl").read_bytes())


def _eval(folder: pathlib.Path) -> None:
    eval(f"__import__('pathlib').Path({str(folder / MARK)!r}).touch()")


def _import(folder: pathlib.Path) -> None:
    sys.path.insert(0, str(folder / "tasks"))
    __import__("planted")


def _start(folder: pathlib.Path) -> None:
    subprocess.run(["touch", str(folder / MARK)], check=True)


PARTS = {
    "corpus": _read_corpus, "run": _read_run, "export": _read_export, "evaluation": _evaluate, "harness": _run_harness,
    "unpickles": _unpickle, "evaluates": _eval, "imports": _import, "starts": _start,
}  # fmt: skip

if __name__ == "__main__":
    watch = Watch(pathlib.Path(sys.argv[1]))
    for name in sys.argv[2:]:
        with watch:
            PARTS[name](pathlib.Path(sys.argv[1]))
    print(json.dumps(watch.seen))

"""Any number of workers, and any number of kills, give the same bytes."""

import gzip
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from mosaics_jax.data import prepare as prepare_lib
from mosaics_jax.data import shards, stage
from mosaics_jax.data.check import problems
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.packing import plan_rows
from mosaics_jax.data.prepare import prepare

ROOT = pathlib.Path(__file__).parent.parent.parent
FILES = 24


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    draw = random.Random(0)
    made = tmp_path / "in"
    made.mkdir()
    for number in range(FILES):
        texts = ["".join(draw.choices("abcdefgh \n", k=draw.randint(1, 400))) for _ in range(draw.randint(1, 60))]
        (made / f"{number:02d}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return made


def contents(directory) -> dict[str, str]:
    files = sorted(path for path in pathlib.Path(directory).rglob("*") if path.is_file())
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def run(folder, output, **settings):
    values = {"tokenizer": "bpe:280", "valid_fraction": 0.2, "shard_tokens": 20_000} | settings
    return prepare([str(folder)], str(output), **values)


def test_workers_change_nothing(folder, tmp_path):
    run(folder, tmp_path / "here")
    run(folder, tmp_path / "one", workers=1)
    run(folder, tmp_path / "three", workers=3)
    expected = contents(tmp_path / "here")
    assert len([name for name in expected if name.endswith(".tokens")]) > 4
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == expected
    assert sorted(os.listdir(tmp_path)) == ["here", "in", "one", "three"]


@pytest.mark.parametrize("kill_at", [0, 1, 7, FILES - 1, FILES, FILES + 2])
def test_a_run_that_is_stopped_redoes_nothing_that_was_done(folder, tmp_path, monkeypatch, kill_at):
    """Stopped at task `kill_at` (of the stages, then of the shards), after its work and before its rename."""
    run(folder, tmp_path / "whole")
    done = []

    class Killed(BaseException):
        pass

    def stopping(real):
        def task(*arguments, **rest):
            if len(done) == kill_at:
                raise Killed
            done.append(real(*arguments, **rest))
            return done[-1]

        return task

    real_stage, real_copy = prepare_lib.write_stage, shards._copy_documents
    with monkeypatch.context() as patch:
        patch.setattr(prepare_lib, "write_stage", stopping(real_stage))
        patch.setattr(shards, "_copy_documents", stopping(real_copy))
        with pytest.raises(Killed):
            run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    redone = {"stages": 0, "shards": 0}

    def counting(kind, real):
        def task(*arguments, **rest):
            redone[kind] += 1
            return real(*arguments, **rest)

        return task

    monkeypatch.setattr(prepare_lib, "write_stage", counting("stages", real_stage))
    monkeypatch.setattr(shards, "_copy_documents", counting("shards", real_copy))
    made = run(folder, tmp_path / "out")
    count = sum(len(split.shards) for split in made.splits.values())
    assert count > 4
    assert redone == {"stages": max(0, FILES - kill_at), "shards": min(count, count - kill_at + FILES)}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _ends(group: int, seconds: float = 20) -> bool:
    """Whether every process of a group ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.slow
def test_killed_again_and_again(folder, tmp_path):
    """SIGKILL at random moments to the command and, with it, its workers; then the same bytes as undisturbed."""
    run(folder, tmp_path / "whole")
    command = [
        sys.executable, "-m", "launch.prepare", f"--input={folder}", f"--output={tmp_path / 'out'}",
        "--tokenizer=bpe:280", "--valid_fraction=0.2", "--shard_tokens=20000", "--workers=2",
    ]  # fmt: skip
    draw = random.Random(1)
    partial = tmp_path / "out.partial"
    # at once, and when so many units or some shards are done; then a little later
    for reached, count in (
        ("*", 1), ("stages/*.stage", 1), ("stages/*.stage", FILES // 2), ("train-*.tokens", 1), ("train-*.json", 3),
    ):  # fmt: skip
        running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        while len(list(partial.glob(reached))) < count and running.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        if running.poll() is None:
            running.kill()
        assert running.wait() == -signal.SIGKILL, "it was done before it was killed"
        assert _ends(running.pid), "workers outlived the command"
    subprocess.run(command, cwd=ROOT, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert list(problems(Manifest.load(tmp_path / "out"))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lines.jsonl.gz", "one.txt", "table.parquet"])
def test_memory_does_not_grow_with_the_input(tmp_path, name):
    """A file of 300 MB of text: the greatest resident size of the command and its worker, as the kernel counts it."""
    texts = ["".join(random.Random(seed).choices("abcdefgh \n", k=3000)) for seed in range(100)]
    path = tmp_path / name
    if name == "lines.jsonl.gz":
        with gzip.open(path, "wt", compresslevel=1) as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts * 1000)
    elif name == "one.txt":
        with path.open("w") as stream:
            stream.writelines(texts * 1000)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.table({"text": texts * 1000}), path, row_group_size=10**6, use_dictionary=False
        )
    arguments = [f"--input={path}", f"--input={ROOT / 'docs'}", f"--output={tmp_path / 'out'}", "--workers=1"]
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'launch.prepare', '--valid_fraction=0.3', *sys.argv[1:]], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, capture_output=True)
    assert int(done.stdout.split()[-1]) < 500_000  # KB


def test_shards_of_another_layout_do_not_stay(folder, tmp_path, monkeypatch):
    """Stopped before its last shard, and then given a smaller input."""
    real = shards._copy_documents

    def stopping(layout, number, *rest):
        if layout.split == "valid":
            raise KeyboardInterrupt
        return real(layout, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_copy_documents", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out")
    for number in range(5, FILES):
        (folder / f"{number:02d}.jsonl").unlink()
    run(folder, tmp_path / "out")
    run(folder, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_broken_stage_is_made_anew(folder, tmp_path):
    (folder / "05.jsonl").write_text("broken")
    with pytest.raises(ValueError, match=r"05.jsonl:1' is not JSON"):
        run(folder, tmp_path / "out")
    stages = sorted((tmp_path / "out.partial" / "stages").glob("*.stage"))
    assert len(stages) == 5
    stages[0].write_bytes(b"")
    stages[1].write_bytes(stages[1].read_bytes()[:-20])
    (folder / "05.jsonl").write_text('{"text": "mended"}\n')
    run(folder, tmp_path / "out")
    run(folder, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_stops_at_once_and_says_how_to_go_on(tmp_path):
    (tmp_path / "long.jsonl").write_text((json.dumps({"text": "some words " * 500}) + "\n") * 20_000)
    # A shell that starts these tests in the background has them ignore Ctrl-C, and so their children.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-m", "launch.prepare", f"--input={tmp_path}", f"--output={tmp_path / 'out'}"]
    running = subprocess.Popen(
        [sys.executable, "-c", heard, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(tmp_path.glob("out.partial/stages/*.partial")):
        time.sleep(0.05)
    began = time.monotonic()
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=500)
    assert (running.returncode, said) == (130, "interrupted; the same command goes on from what is done\n")
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_stories_fill_their_rows(tmp_path):
    """Fill of at least 0.97 at 4,096; needs ../shared/data."""
    files = sorted((ROOT.parent / "shared" / "data" / "stories").glob("*.xz"))
    if not files:
        pytest.skip("shared/data/stories is not here")
    made = prepare([str(file) for file in files], str(tmp_path / "out"), "bpe:8192")
    fill = plan_rows(made, 4096)
    assert fill["train"] > 0.97
    assert fill["valid"] > 0.97


def test_other_settings_do_not_go_on(folder, tmp_path, monkeypatch):
    (folder / "05.jsonl").write_text("broken")
    with pytest.raises(ValueError, match=r"05.jsonl:1' is not JSON .*mend or remove it, or leave it out with --skip"):
        run(folder, tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(valid_fraction: 0.2 -> 0.3\); take"):
        run(folder, tmp_path / "out", valid_fraction=0.3)
    # mended, the run goes on: what was done of the other files is kept
    (folder / "05.jsonl").write_text('{"text": "mended"}\n')
    again = []
    real = stage.write_stage
    monkeypatch.setattr(prepare_lib, "write_stage", lambda *a: (again.append(a[0].path), real(*a))[1])
    run(folder, tmp_path / "out")
    assert len(again) == FILES - 5
    run(folder, tmp_path / "new")
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_skipped_counted_and_listed(folder, tmp_path, workers):
    lines = (folder / "05.jsonl").read_text().splitlines(keepends=True)
    (folder / "05.jsonl").write_text("".join(['{"text": 5}\n', *lines, "{\n"]))
    (folder / "09.jsonl").write_text('{"txt": "x"}\n' + (folder / "09.jsonl").read_text())
    clean = run(folder, tmp_path / "out", skip_bad_records=3, workers=workers)
    assert clean.skipped == {"empty": 0, "not_utf8": 0, "broken": 3}
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [record["where"] for record in listed] == [
        f"'{folder / '05.jsonl'}:1'", f"'{folder / '05.jsonl'}:{len(lines) + 2}'", f"'{folder / '09.jsonl'}:1'",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"3 records hold no text, the last of them .*09.jsonl:1'.*is 2"):
        run(folder, tmp_path / "two", skip_bad_records=2, workers=workers)
    with pytest.raises(ValueError, match=r"05.jsonl:1' is not an object"):
        run(folder, tmp_path / "none", workers=workers)
    with pytest.raises(ValueError, match="skip_bad_records is -1"):
        run(folder, tmp_path / "none", skip_bad_records=-1)


def _full_disk(folder, output, answer):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        run(folder, output)
    except ValueError as error:
        answer.put(str(error))


def test_a_disk_that_refuses(folder, tmp_path):
    """A limit on the size of files stands in for a full disk: stages fit, a shard of all does not."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_full_disk, args=(folder, tmp_path / "out", answer))
    process.start()
    message = answer.get(timeout=500)
    process.join()
    assert "cannot be written (File too large); mend that, or name another" in message
    assert "\n" not in message
    run(folder, tmp_path / "out")
    run(folder, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_runs_of_one_directory(folder, tmp_path, monkeypatch):
    seen = []
    real = prepare_lib.write_stage

    def second(*arguments):
        if not seen:
            seen.append(0)
            with pytest.raises(ValueError, match=r"another process is writing .*out' .*wait until it has ended"):
                run(folder, tmp_path / "out")
            seen.append(1)
        return real(*arguments)

    monkeypatch.setattr(prepare_lib, "write_stage", second)
    run(folder, tmp_path / "out")
    assert seen == [0, 1]


def test_a_worker_that_is_killed_is_told_of(folder, tmp_path, monkeypatch):
    real = prepare_lib.Pool.map

    def killing(pool, *arguments):
        found = real(pool, *arguments)
        yield next(found)
        for process in list(pool._executor._processes.values()):
            process.kill()
        yield from found

    with monkeypatch.context() as patch:
        patch.setattr(prepare_lib.Pool, "map", killing)
        with pytest.raises(ValueError, match=r"a worker process was killed .*; the same command goes on"):
            run(folder, tmp_path / "out", workers=2)
    run(folder, tmp_path / "out", workers=2)
    run(folder, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shuffling_moves_documents_only(folder, tmp_path):
    def documents(name):
        manifest = Manifest.load(tmp_path / name)
        found = b"".join((manifest.directory / s.file).read_bytes() for s in manifest.splits["train"].shards)
        return [d for d in found.decode("utf-16-le", "surrogatepass").split(chr(manifest.begin)) if d]

    run(folder, tmp_path / "a", tokenizer="bytes")
    run(folder, tmp_path / "b", tokenizer="bytes", shuffle_seed=1)
    run(folder, tmp_path / "c", tokenizer="bytes", shuffle_seed=None)
    a, b, c = documents("a"), documents("b"), documents("c")
    assert sorted(a) == sorted(b) == sorted(c)
    assert len({tuple(a), tuple(b), tuple(c)}) == 3
    texts = [json.loads(line)["text"] for f in sorted(folder.iterdir()) for line in f.read_text().splitlines()]
    kept = [d.rstrip(chr(257)) for d in c]
    assert kept == [text for text in texts if text in set(kept)]
    # every stretch of the new order is from all over the old
    place = {document: number for number, document in enumerate(c)}
    tenth = sorted(place[document] for document in a[: len(a) // 10])
    assert tenth[0] < len(a) // 8
    assert tenth[-1] > len(a) * 7 // 8

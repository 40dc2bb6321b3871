"""Trials: a command is struck, and judged by what it says, what it leaves, and what the same command does after.

A trial strikes, and its command then either gives the result that a calm one gives, or says in one line what is wrong;
once that is mended, the same command must give the calm result too. All else is a fault of ours.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import helpers
from job import arrays

ROOT = pathlib.Path(__file__).parents[2]
_LIMIT = 300  # seconds after which a command hangs
COLUMNS = ("same result", "one line", "traceback", "silent", "hung", "lost")
GOOD = COLUMNS[:2]


@dataclasses.dataclass
class Tally:
    """A row: how many trials came out how, and what was said in those that should not have."""

    name: str
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))
    bad: list[str] = dataclasses.field(default_factory=list)

    def add(self, what: str, outcome: str, said: str) -> None:
        self.counts[outcome] += 1
        if outcome not in GOOD:
            self.bad.append(f"{self.name}, {what}: {outcome}\n{said[-1500:]}")

    @property
    def tried(self) -> int:
        return sum(self.counts.values())


def table(tallies: Sequence[Tally]) -> str:
    lines = [f"| attack | tried | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for one in tallies:
        lines.append(f"| {one.name} | {one.tried} | " + " | ".join(str(one.counts[name]) for name in COLUMNS) + " |")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that has ended; `code` is None where it was given up."""

    code: int | None
    out: str
    said: str


class Command:
    """A command of launch/, and what it leaves."""

    def __init__(self, place: "Place", words: Sequence[str], result: Callable[[Done], object]):
        """`result`: what is compared of a life that ended well."""
        self._place, self._words, self._result = place, list(words), result
        self.calm: object = None

    def start(self, limits: str = "") -> subprocess.Popen:
        """`limits`: of ulimit, such as "-f 8"."""
        shell = ["bash", "-c", f'{f"ulimit {limits} || exit 99; " if limits else ""}exec "$@"', "bash"]
        environment = helpers.OPTIMISED | {
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(self._place.folder / "programs"),
        }  # fmt: skip
        return subprocess.Popen(
            [*shell, sys.executable, "-m", *self._words], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip

    def run(self, limits: str = "") -> Done:
        return self.end(self.start(limits))

    @staticmethod
    def end(process: subprocess.Popen, seconds: float = _LIMIT) -> Done:
        try:
            out, said = process.communicate(timeout=seconds)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            out, said = process.communicate()
            code = None
        return Done(code, out, said)

    def once(self) -> float:
        """A life that nobody disturbs, to which others are compared; its seconds."""
        began = time.monotonic()
        done = self.run()
        assert done.code == 0, (self._words, done.said)
        self.calm = self._result(done)
        return time.monotonic() - began

    def judge(self, done: Done, again: Callable[[], Done] | None = None) -> tuple[str, str]:
        """One of COLUMNS, and what was said. `again` is the same command, once what was done to it is mended."""
        said = done.out + done.said
        if done.code is None:
            return "hung", said
        if "Traceback (most recent call last)" in said or done.code < 0 or done.code in (134, 136, 139):
            return "traceback", said
        if done.code == 0:
            return ("same result" if self._result(done) == self.calm else "silent"), said
        lines = [line for line in done.said.splitlines() if line.startswith(("error: ", "failed: "))]
        if len(lines) != 1:
            return "traceback", said  # no line, or not one
        after = (again or self.run)()
        if after.code != 0 or self._result(after) != self.calm:
            return "lost", f"{said}\nand then: {after.out[-700:]}{after.said[-700:]}"
        return "one line", said


def content(folder: pathlib.Path, pattern: str = "**/*") -> dict[str, str]:
    """Every file of a folder, and a digest of it; of answers the lines in order, as a kill may change that."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        if path.is_file() and path.name != "lock":
            data = path.read_bytes()
            if path.suffix == ".jsonl":
                data = b"".join(sorted(set(data.splitlines(keepends=True))))
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


class Place:
    """A corpus, a finished run, and the commands that read and write them, each with what it left when it was calm."""

    def __init__(self, folder: pathlib.Path, trials: int):
        """`trials`: how many of each kind that chance draws."""
        self.folder, self.trials, self.draw = folder, trials, random.Random(0)
        (folder / "text").mkdir(parents=True)
        helpers.make_corpus(folder / "text", documents=300)
        self.corpus = folder / "text" / "corpus"
        self.config = helpers.tiny_config(
            self.corpus, **{"run.compilation_cache": "auto", "checkpoint.keep": 9, "run.log_every": 1}
        )
        self.train("warm").once()  # which compiles for all others
        self.seconds = self.train("run").once()
        shutil.copytree(folder / "run", folder / "finished")

    def fresh(self, name: str) -> pathlib.Path:
        """A folder of one's own, which is not there."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def copy(self, source: pathlib.Path, name: str) -> pathlib.Path:
        shutil.copytree(source, self.fresh(name), symlinks=True)
        return self.folder / name

    def train(self, name: str, corpus: pathlib.Path | None = None) -> Command:
        """Compared: every array of the last checkpoint."""
        workdir, config = self.folder / name, self.config
        if corpus:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(corpus)))

        def result(done: Done) -> object:
            return {key: array.tobytes() for key, array in arrays(workdir).items()}

        command = Command(self, ["launch.train", *helpers.command_line(config), f"--workdir={workdir}"], result)
        with contextlib.suppress(FileNotFoundError):
            command.calm = result(Done(0, "", ""))
        return command

    def calm(self, workdir: str = "") -> Iterator[tuple[str, Command, Callable[[], object], float]]:
        """Every command, what clears away what it makes, and the seconds of a life that nobody disturbs.

        Training too where it has a workdir for it.
        """
        train = [("train", self.train(workdir), lambda: self.fresh(workdir))] if workdir else []
        for name, command, clear in [*train, *self.commands()]:
            clear()
            yield name, command, clear, command.once()
            clear()

    def commands(self) -> Iterator[tuple[str, Command, Callable[[], object]]]:
        """Those beside train: name, command, and what clears away what it has made."""
        run, out = self.folder / "finished", self.folder / "out"
        yield (
            "generate",
            Command(self, ["launch.generate", f"--workdir={run}", "--prompt=the", "--max_new_tokens=20"],
                    lambda done: done.out),
            lambda: None,
        )  # fmt: skip
        yield (
            "export",
            Command(self, ["launch.export", f"--workdir={run}", f"--output={out}"], lambda done: content(out)),
            lambda: (self.fresh("out"), self.fresh("out.partial")),
        )
        yield (
            "evaluate",
            Command(self, ["launch.evaluate", f"--workdir={run}", "--suite=perplexity", "--lengths=32,64,128",
                           "--count=6", "--batch_tokens=128"], lambda done: content(run / "evaluations")),
            lambda: shutil.rmtree(run / "evaluations", ignore_errors=True),
        )  # fmt: skip
        yield (
            "prepare",
            Command(self, ["launch.prepare", f"--input={self.folder / 'text' / 'documents'}", f"--output={out}",
                           "--tokenizer=bpe:300", "--shard_tokens=1000", "--workers=1"], lambda done: content(out)),
            lambda: (self.fresh("out"), self.fresh("out.partial")),
        )  # fmt: skip
        yield (
            "pack",
            Command(self, ["launch.prepare", f"--pack={self.corpus}", "--context=32"],
                    lambda done: content(self.corpus, "packing-32/*")),
            lambda: shutil.rmtree(self.corpus / "packing-32", ignore_errors=True),
        )  # fmt: skip
        yield (
            "verify",
            Command(self, ["launch.prepare", f"--verify={self.corpus}"], lambda done: done.out),
            lambda: None,
        )


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: int) -> Iterator[None]:
    """A file system of so many bytes. PermissionError where this user may make none."""
    path.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True).returncode:
        raise PermissionError("this user may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


DAMAGES = ("bit", "half", "empty", "gone", "folder", "swapped", "link", "more")


def damage(path: pathlib.Path, how: str, draw: random.Random) -> None:
    """Does one of DAMAGES to a file."""
    data = path.read_bytes()
    siblings = sorted(one for one in path.parent.iterdir() if one.is_file() and one != path)
    match how:
        case "bit":
            spoilt = bytearray(data or b"\0")
            spoilt[draw.randrange(len(spoilt))] ^= 1 << draw.randrange(8)
            path.write_bytes(spoilt)
        case "half":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "gone" | "folder" | "link":
            path.unlink()
            if how == "folder":
                path.mkdir()
            elif how == "link":
                path.symlink_to("nowhere")
        case "swapped" if siblings:
            other = draw.choice(siblings)
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
        case _:
            path.write_bytes(data + b"\0")


def mend(source: pathlib.Path, path: pathlib.Path) -> None:
    """Puts a file back."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    shutil.copy(source, path)

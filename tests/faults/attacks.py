"""What was never meant to happen to a run, a corpus or a command: a row of the table for each kind of attack."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import helpers
from job import arrays, free_port
from trials import DAMAGES, ROOT, Command, Done, Place, Tally, content, damage, mend, small_disk

ATTACKS: dict[str, Callable[[Place], Tally]] = {}


def _attack(run: Callable[[Place], Tally]) -> Callable[[Place], Tally]:
    ATTACKS[run.__name__] = run
    return run


@_attack
def kills(place: Place) -> Tally:
    """SIGKILL at a drawn moment, and the same command again: its result byte for byte."""
    tally = Tally("kills at random moments of generate, export, evaluate, prepare, --pack, --verify")
    for name, command, clear, seconds in place.calm():
        for _ in range(place.trials):
            clear()
            process, after = command.start(), place.draw.uniform(0.1, seconds)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(after)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            command.end(process)
            tally.add(f"{name} after {after:.1f} of {seconds:.1f} s", *command.judge(command.run()))
    return tally


@_attack
def interrupts(place: Place) -> Tally:
    """Ctrl-C, once and twice: one line, and the same command gives the same."""
    tally = Tally("Ctrl-C, once and twice")
    for name, command, clear, seconds in place.calm("interrupted"):
        for times in (1, 2):
            clear()
            process = command.start()
            time.sleep(place.draw.uniform(0.5 * seconds, 0.9 * seconds))  # past the imports
            for _ in range(times):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.1)
            done = command.end(process)
            if done.code == 130:  # its one line begins with another word
                done = dataclasses.replace(done, said=done.said.replace("interrupted", "failed: interrupted"))
            tally.add(f"{name}, {times} times", *command.judge(done))
    return tally


@_attack
def limits(place: Place) -> Tally:
    """Files that may not grow, and few that may be open."""
    tally = Tally("ulimit -f (1 to 64 KiB) and -n (12 to 200)")
    for name, command, clear, _ in place.calm("limited"):
        for limit in ("-f 1", "-f 8", "-f 64", "-n 12", "-n 40", "-n 200"):
            clear()
            done = command.run(f"-S {limit}" if "-f" in limit else limit)
            if limit == "-n 12" and done.code and "failed: " not in done.said and "error: " not in done.said:
                continue  # Python itself did not start
            tally.add(f"{name}, ulimit {limit}", *command.judge(done))
    return tally


def _spoil(place: Place, tally: Tally, folder: str, files: Callable[[pathlib.Path], list[pathlib.Path]]) -> Tally:
    """Resumes a finished run whose last checkpoint, record or corpus was damaged, file by file."""
    source = place.folder / ("finished" if folder == "spoilt" else "text/corpus")
    names = [path.relative_to(source) for path in files(source)]
    trials = [(name, how) for name in names for how in DAMAGES]
    for name, how in place.draw.sample(trials, min(len(trials), 12 * place.trials)):
        place.copy(place.folder / "finished", "spoilt")
        corpus = place.copy(place.corpus, "spoilt-corpus")
        command = place.train("spoilt", corpus)
        damage(place.folder / folder / name, how, place.draw)

        def again(command: Command = command, name: pathlib.Path = name) -> Done:
            place.copy(place.corpus, "spoilt-corpus")  # as the line says: a copy, or prepared again
            if folder == "spoilt":
                mend(source / name, place.folder / folder / name)
            return command.run()

        tally.add(f"{name} {how}", *command.judge(command.run(), again))
    return tally


@_attack
def checkpoint_files(place: Place) -> Tally:
    tally = Tally(f"files of the newest checkpoint, spoilt in {len(DAMAGES)} ways")
    return _spoil(
        place, tally, "spoilt", lambda run: [p for p in (run / "checkpoints" / "8").rglob("*") if p.is_file()]
    )


@_attack
def run_files(place: Place) -> Tally:
    """Its record, its tokenizer, its metrics, and what is no more than told: heartbeats, curves."""
    tally = Tally("all other files of a run")
    return _spoil(
        place, tally, "spoilt",
        lambda run: [p for p in run.rglob("*") if p.is_file() and "checkpoints" not in p.parts and p.name != "lock"],
    )  # fmt: skip


@_attack
def corpus_files(place: Place) -> Tally:
    tally = Tally("files of the corpus")
    return _spoil(place, tally, "spoilt-corpus", lambda corpus: [p for p in corpus.rglob("*") if p.is_file()])


@_attack
def full_disk(place: Place) -> Tally:
    """A disk under the workdir that fills; then there is room."""
    tally = Tally("a disk that fills under the workdir (free: 8 KiB to 3 MiB)")
    disk = place.folder / "disk"
    for kilobytes in (8, 40, 80, 160, 320, 640, 1000, 1600, 2000, 3000):
        with small_disk(disk, kilobytes << 10):
            command = place.train("disk/run")
            command.calm = place.train("finished").calm

            def again(command: Command = command) -> Done:
                subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
                return command.run()

            tally.add(f"{kilobytes} KiB", *command.judge(command.run(), again))
    return tally


@_attack
def folder_taken(place: Place) -> Tally:
    """The workdir is removed while the run goes on; or its disk is read-only when the run is to go on."""
    tally = Tally("a workdir that is removed under a run, or that has become read-only")
    disk, run = place.folder / "disk", place.folder / "disk" / "run"
    for how in ["removed"] * place.trials + ["read-only"]:
        with small_disk(disk, 64 << 20):
            command = place.train("disk/run")
            command.calm = place.train("finished").calm
            if how == "removed":
                process = command.start()
                time.sleep(place.draw.uniform(0.5, 0.95) * place.seconds)
                shutil.rmtree(run, ignore_errors=True)
                done = command.end(process)
                if done.code == 0:  # it had ended before
                    done = command.run()
            else:
                place.copy(place.folder / "finished", "disk/run")
                shutil.rmtree(run / "checkpoints" / "8")
                subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
                done = command.run()

            def again(command: Command = command) -> Done:
                subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
                return command.run()

            tally.add(how, *command.judge(done, again))
    return tally


@_attack
def other_places(place: Place) -> Tally:
    """Every command that writes, told to write where something else is: it says so, and that is as it was."""
    tally = Tally("commands that are told to write over something else")
    run, out = place.folder / "finished", place.folder / "mine"
    writers = {
        "train": ["launch.train", *helpers.command_line(place.config), f"--workdir={out}"],
        "prepare": ["launch.prepare", "--input=python", "--max_bytes=100000", f"--output={out}"],
        "export": ["launch.export", f"--workdir={run}", f"--output={out}"],
        "claims": ["launch.claims", f"--workdir={out}", "--suite=recall"],
        "figure": ["launch.goodput", str(run), f"--figure={out}"],
    }
    place.fresh("exported")
    exported = Command(place, ["launch.export", f"--workdir={run}", f"--output={place.folder / 'exported'}"], content)
    assert exported.run().code == 0
    sources = {"a run": run, "a corpus": place.corpus, "an export": place.folder / "exported", "text": ROOT / "configs"}
    for what, source in sources.items():
        for name, words in writers.items():
            if (name, what) in (("train", "a run"), ("export", "an export")):
                continue
            place.copy(source, "mine")
            before = content(out)
            command = Command(place, words, lambda done: content(out))
            command.calm = before
            done = command.run()
            tally.add(f"{name} over {what}", *command.judge(done, functools.partial(dataclasses.replace, done, code=0)))
    return tally


@_attack
def two_writers(place: Place) -> Tally:
    """The same command twice at once: one of the two does it, and both may."""
    tally = Tally("the same command twice at once")
    for name, command, clear, _ in place.calm("both"):
        for _ in range(max(1, place.trials // 2)):
            clear()
            pair = [command.start()]
            time.sleep(place.draw.uniform(0, 1))
            pair.append(command.start())
            ends = [command.end(process) for process in pair]
            # A corpus is made once: that it is there is what the other one says then.
            there = name == "prepare" and content(place.folder / "out") == command.calm
            for number, done in enumerate(ends):
                made = functools.partial(dataclasses.replace, done, code=0) if there else None
                tally.add(f"{name}, number {number}", *command.judge(done, made))
            if all(done.code for done in ends):
                tally.add(name, "lost", "neither did it")
    return tally


@_attack
def job_twice(place: Place) -> Tally:
    """A scheduler that starts a job of two processes twice, with one address: one of the jobs does it, or neither."""
    tally = Tally("a job of two processes that is started twice")
    calm = _pair(place, "calm-pair")
    assert all(Command.end(process).code == 0 for process in calm.start())
    for delay in (0.0, 1.0, place.seconds / 2, place.seconds):
        place.fresh("twice")
        pair = _pair(place, "twice")
        started = pair.start()
        time.sleep(delay)
        ends = [Command.end(process, 150) for process in started + pair.start()]
        again = [Command.end(process) for process in pair.start()]
        said = "\n".join(done.out + done.said for done in ends + again)
        whole = all(done.code == 0 for done in again) and pair.result() == calm.result()
        lines = [len(re.findall("^(error|failed): ", done.said, re.M)) for done in ends if done.code]
        if any(done.code is None for done in ends):
            outcome = "hung"
        elif "Traceback (most recent call last)" in said or set(lines) - {1} or any((d.code or 0) < 0 for d in ends):
            outcome = "traceback"
        else:
            outcome = "lost" if not whole else "one line" if lines else "same result"
        tally.add(f"{delay:.1f} s after the first", outcome, said)
    return tally


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A job of two processes."""

    commands: tuple[Command, Command]
    result: Callable[[], object]

    def start(self) -> list[subprocess.Popen]:
        return [command.start() for command in self.commands]


def _pair(place: Place, name: str) -> _Pair:
    port, workdir = free_port(), place.folder / name
    words = ["launch.train", *helpers.command_line(place.config), f"--workdir={workdir}", "--wait=60"]
    words += [f"--coordinator=localhost:{port}", "--processes=2", "--heartbeat=10"]
    first, second = (Command(place, [*words, f"--process={process}"], lambda done: None) for process in range(2))
    return _Pair((first, second), lambda: {key: array.tobytes() for key, array in arrays(workdir).items()})

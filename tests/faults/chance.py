"""What chance does: kills at drawn moments, and how much of its time a run keeps beside them."""

import pathlib
import random
import signal
import statistics
import time

from job import Job, arrays, identical, records
from suite import Outcome, Suite

from mosaics_jax import goodput
from mosaics_jax.config import Config


def random_kills(suite: Suite, kills: int, seed: int = 0) -> tuple[list[str], Outcome]:
    """Runs of 240 steps, killed again and again at moments that are drawn, until there were so many kills.

    Returns where each kill fell, and whether every run ended as the calm one.
    """
    config = suite.config(**{"run.steps": 240, "run.eval_every": 240})
    calm = suite.calm(config)
    draw, fell, runs = random.Random(seed), [], []
    while len(fell) < kills:
        workdir = suite.folder / f"killed-{len(runs)}"
        runs.append(workdir)
        while not _finished(workdir):
            job = Job(config, workdir)
            if len(fell) < kills and (phase := _kill(job, draw)):
                fell.append(phase)
            else:
                assert set(job.end()) == {0}, job.log()[-3000:]
    same = all(identical(arrays(workdir), calm) for workdir in runs)
    lost = sum(goodput.measure(workdir).lost_steps for workdir in runs)
    name = f"{len(fell)} kills at random moments, of {len(runs)} runs"
    return fell, Outcome(name, None, None, lost, "identical", same)


def _kill(job: Job, draw: random.Random) -> str:
    """Kills a life at a drawn moment; where that fell, or "" where it ended by itself before."""
    kinds = ("start", "resume", "compile", "train")
    before = {kind: len(records(job.workdir, kind)) for kind in kinds}
    # From the launch, the opened workdir, the restored state, or the first step on: so all of a life is struck.
    after = draw.choice(["launch", "start", "compile", "train", "train", "train"])
    job.wait_for(lambda: after == "launch" or len(records(job.workdir, after)) > before[after])
    time.sleep(draw.uniform(0, 1.5))
    if not job.running():
        return ""
    one = draw.random() < 0.2
    job.signal(signal.SIGKILL, [draw.randrange(2)] if one else None)
    phase = _phase(job, before)
    job.end()
    return phase + (", one rank" if one else "")


def _finished(workdir: pathlib.Path) -> bool:
    return [record["why"] for record in records(workdir, "end")[-1:]] == ["finished"]


def _phase(job: Job, before: dict[str, int]) -> str:
    checkpoints = job.workdir / "checkpoints"
    if checkpoints.exists() and any("tmp" in path.name for path in checkpoints.iterdir()):
        return "save"
    for kind, phase in (("train", "train"), ("compile", "first step"), ("resume", "compile"), ("start", "restore")):
        if len(records(job.workdir, kind)) > before[kind]:
            return phase
    return "start"


def _slower(suite: Suite) -> Config:
    """A checkpoint every dozen seconds on two cores, between which training stands still for a hundredth of them."""
    return suite.config(**{
        "model.width": 64, "model.heads": 2, "model.ffn_width": 172, "data.context": 128, "data.batch": 8,
        "run.steps": 800, "run.eval_every": 800, "checkpoint.every": 100,
    })  # fmt: skip


def interrupted(suite: Suite, mean: float, seed: int = 0) -> tuple[goodput.Goodput, bool]:
    """A run that is killed every `mean` seconds on average, without memory; and whether it ended as the calm one."""
    config, workdir, draw = _slower(suite), suite.folder / f"interrupted-{mean:.0f}", random.Random(seed)
    while not _finished(workdir):
        job = Job(config, workdir)
        until = job.began + draw.expovariate(1 / mean)
        if job.wait_for(lambda until=until: time.monotonic() > until, 3600):
            job.signal(signal.SIGKILL)
        codes = set(job.end())
        assert codes <= {0, -signal.SIGKILL}, job.log()[-3000:]
    return goodput.measure(workdir), identical(arrays(workdir), suite.calm(config))


def goodput_table(suite: Suite, means: list[float]) -> tuple[str, list[tuple[goodput.Goodput, bool]]]:
    """A row for each rate of interruption."""
    found = [interrupted(suite, mean) for mean in means]
    lines = [
        "| killed every, s | lives | wall time, s | steps lost | goodput | best for these kills | of it | identical |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mean, (one, same) in zip(means, found, strict=True):
        lines.append(
            f"| {mean:.0f} | {len(one.lives)} | {one.total:.0f} | {one.lost_steps} | {one.goodput:.1%} "
            f"| {one.best:.1%} | {one.goodput / one.best:.1%} | {'yes' if same else 'NO'} |"
        )
    return "\n".join(lines), found


def blocking(suite: Suite, ranks: int) -> str:
    """What saves cost a run of 100 million weights, of which each rank holds and writes its share."""
    config = suite.config(**{
        "model.width": 1024, "model.heads": 8, "model.ffn_width": 2752, "model.layers": 7, "mesh.fsdp": ranks,
        "mesh.data": 1, "run.steps": 20, "run.eval_every": 20, "checkpoint.every": 4, "run.watchdog_seconds": 120.0,
    })  # fmt: skip
    workdir = suite.folder / f"large-{ranks}"
    job = Job(config, workdir, ranks)
    assert set(job.end(900)) == {0}, job.log()[-3000:]
    saves = records(workdir, "save")
    lines = ["| checkpoint | written, s | training stood still, s | share |", "|---|---|---|---|"]
    for one in saves:
        lines.append(
            f"| {one['step']} | {one['seconds']:.2f} | {one['blocking']:.3f} | {one['blocking'] / one['seconds']:.1%} |"
        )
    share = statistics.median(one["blocking"] / one["seconds"] for one in saves)
    lines.append(f"| median | | | {share:.1%} |")
    return "\n".join(lines)

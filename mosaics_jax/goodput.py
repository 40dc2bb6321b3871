"""How a run spent its wall time, over all its lives: read from metrics.jsonl alone.

Within a life times are of the monotonic clock (`up`), so a wall clock that jumps there moves nothing. Between lives
only the wall clock knows; a gap that it makes negative counts as none.
"""

import dataclasses
import io
import pathlib
from typing import Any

from mosaics_jax import whole
from mosaics_jax.history import records

# Where a second of a run goes, best first; all add up to the wall time.
PARTS = {
    "train": "steps that were kept",
    "repeated": "steps that a later life did again: they came after the checkpoint it went on from",
    "data wait": "steps standing still for data",
    "evaluate": "evaluations",
    "save": "training standing still for checkpoints",
    "start": "from the process's begin to the opened workdir: imports, waiting for the other processes",
    "restore": "reading and checking checkpoints, or making new weights",
    "compile": "compiling the step, or finding it in the cache",
    "rest": "what no record tells of: ends of lives, metrics",
    "idle": "between lives: detection, the scheduler, and steps after a life's last record",
}
_MOST = 1e15  # of any number in a record


@dataclasses.dataclass
class Life:
    """One process's time from its begin to its last record."""

    begin: float  # wall clock, seconds
    end: float
    first_step: int | None  # None: it ended before it had a state
    last_step: int
    why: str  # finished, preempted, stopped, failed, interrupted; "killed" where no record says
    seconds: dict[str, float]
    kept_to: int = 0  # the step that the next life went on from


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The sums over a run.

    Attributes:
      seconds: by part.
      lost_steps: computed twice.
      unavoidable_steps: of those, what must be lost where a save takes no time: those after a multiple of the interval.
      interval: steps between checkpoints, of the more frequent tier.
    """

    lives: list[Life]
    seconds: dict[str, float]
    lost_steps: int
    unavoidable_steps: int
    interval: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the wall time that was spent on steps that were kept."""
        return _share(self.seconds["train"], self.total)

    @property
    def best(self) -> float:
        """The same with saves that take no time: what the interval and these interruptions allow."""
        repeated = self.seconds["repeated"]
        excess = repeated * (self.lost_steps - self.unavoidable_steps) / self.lost_steps if self.lost_steps else 0.0
        return _share(self.seconds["train"], self.total - excess - self.seconds["save"])


def measure(workdir: pathlib.Path) -> Goodput:
    """Raises ValueError where there is no run, none that tells its lives, or a record that lacks what others have."""
    path = workdir / "metrics.jsonl"
    lives: list[list[dict[str, Any]]] = []
    for record in records(path):
        if record["kind"] == "start":
            lives.append([])
        if lives:
            lives[-1].append(record)
    if not lives:
        raise ValueError(f"{path} tells of no start: it is of a version before lives were recorded")
    try:
        return _sum([_life(life) for life in lives], lives)
    except ValueError as error:
        raise ValueError(f"{path} cannot be summed: {error}") from error


def _number(record: dict[str, Any], name: str, least: float = 0.0) -> float:
    """A field that is a number. Raises ValueError."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _MOST:
        raise ValueError(
            f"a record of kind {record['kind']!r} has {name} {value!r}; legal: a number of {least:g} or more"
        )
    return value


def _share(part: float, all_: float) -> float:
    return part / all_ if all_ else 0.0


def _life(records: list[dict[str, Any]]) -> Life:
    start, last = records[0], records[-1]
    seconds = dict.fromkeys(PARTS, 0.0) | {"start": _number(start, "up")}
    first, done = None, 0
    why = "killed"
    for record in records:
        match record["kind"]:
            case "init" | "resume" | "finished":
                seconds["restore"] += _number(record, "seconds")
                first = done = record["step"]
            case "compile":
                seconds["compile"] += _number(record, "seconds")
            case "eval":
                seconds["evaluate"] += _number(record, "seconds")
            case "save":
                seconds["save"] += _number(record, "blocking")
            case "train":
                waited, trained = _trained(record)
                seconds["data wait"] += waited
                seconds["train"] += trained
                done = int(_number(record, "step"))
            case "end":
                why = str(record.get("why"))
    seconds["rest"] = max(0.0, _number(last, "up") - sum(seconds.values()))
    begin = _number(start, "time") - start["up"]
    return Life(begin, begin + last["up"], first, done, why, seconds)


def _trained(record: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a "train" record that were waited for data, and those that were trained."""
    waited = _number(record, "seconds") * min(1.0, _number(record, "data_wait"))
    return waited, record["seconds"] - waited


def _sum(lives: list[Life], records: list[list[dict[str, Any]]]) -> Goodput:
    interval = min(int(_number(life[0], "interval", 1)) for life in records)
    seconds = dict.fromkeys(PARTS, 0.0)
    lost = unavoidable = 0
    for number, life in enumerate(lives):
        later = lives[number + 1 :]
        if life.first_step is not None:
            resumed = [one.first_step for one in later if one.first_step is not None]
            life.kept_to = max(life.first_step, min([life.last_step, *resumed]))
        for record in records[number]:
            if record["kind"] == "train" and (steps := _number(record, "steps")):
                again = min(steps, max(0, record["step"] - life.kept_to)) / steps
                _, trained = _trained(record)
                life.seconds["train"] -= again * trained
                life.seconds["repeated"] += again * trained
        if later:
            lost += life.last_step - life.kept_to
            if life.first_step is not None and life.why != "preempted":
                unavoidable += life.last_step - max(life.first_step, life.last_step // interval * interval)
            seconds["idle"] += max(0.0, lives[number + 1].begin - life.end)
        for part, value in life.seconds.items():
            seconds[part] += value
    return Goodput(lives, seconds, lost, unavoidable, interval)


def table(found: Goodput) -> str:
    """What `launch.goodput` prints, in markdown."""
    lines = ["| where | seconds | share | |", "|---|---|---|---|"]
    for part, meaning in PARTS.items():
        lines.append(
            f"| {part} | {found.seconds[part]:,.1f} | {_share(found.seconds[part], found.total):.1%} | {meaning} |"
        )
    ends = [life.why for life in found.lives]
    told = ", ".join(f"{ends.count(why)} {why}" for why in sorted(set(ends)))
    best = found.best
    return "\n".join(
        [
            *lines,
            "",
            f"{len(ends)} lives ({told}); {found.total:,.1f} s of wall time; {found.lost_steps:,} steps computed "
            f"twice, of which an interval of {found.interval} steps cannot save {found.unavoidable_steps:,}.",
            f"Goodput {found.goodput:.1%}; with saves that take no time {best:.1%}: "
            f"{_share(found.goodput, best):.1%} of it.",
        ]
    )


def draw(found: Goodput, path: pathlib.Path) -> None:
    """A PNG, whole or not at all: every life as a bar of its parts, and the shares of the whole. Raises OSError."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(PARTS, plt.get_cmap("tab10").colors, strict=True))  # type: ignore[attr-defined]
    height = min(8.0, 1.6 + 0.25 * len(found.lives))
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, height + 1.2), height_ratios=[height, 1.0], layout="constrained"
    )
    zero = found.lives[0].begin
    for number, life in enumerate(found.lives):
        left = life.begin - zero
        for part in ("start", "restore", "compile", "evaluate", "save", "data wait", "train", "repeated", "rest"):
            above.barh(number, life.seconds[part], left=left, color=colours[part], height=0.8)
            left += life.seconds[part]
    above.invert_yaxis()
    above.set(xlabel="wall time, s (parts of a life are stacked, not in their order)", ylabel="life")
    left = 0.0
    for part in PARTS:
        share = _share(found.seconds[part], found.total)
        below.barh(0, share, left=left, color=colours[part], label=f"{part} {share:.1%}")
        left += share
    below.set(xlim=(0, 1), yticks=[], xlabel=f"share of {found.total:,.0f} s; goodput {found.goodput:.1%}")
    below.legend(ncols=5, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.6))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    plt.close(figure)
    whole.write(path, drawn.getvalue())

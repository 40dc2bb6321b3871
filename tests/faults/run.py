"""Breaks runs in every way that catalogue.py knows, and holds what is left against a run that nobody disturbed.

    make faults        (or: PYTHONPATH=.:tests python tests/faults/run.py --kills=20 --faults=stop,flipped --attacks=)

Real processes on the CPU, data workers on. For each fault: seconds until the run was found broken, seconds from its
next start to its next step, steps computed twice, and whether the last checkpoint is the undisturbed run's to the bit.
Then kills at random moments, the goodput of a run that is interrupted at given rates, and what saves cost a larger one.
Last the attacks of attacks.py: how many trials of each gave the same result, or one line, or what they should not.
"""

import argparse
import os
import pathlib
import shutil
import sys
import tempfile

import jax
import trials
from attacks import ATTACKS
from catalogue import FAULTS
from chance import blocking, goodput_table, random_kills
from suite import Suite, table

from mosaics_jax import goodput

_TITLE = """# What a run survives

Written by `make faults` on {cores} CPU cores with jax {jax}; every run is in processes of its own. *Detected*: seconds
from the fault until another process ends. *Recovered*: seconds from the next start to the first new step, most of them
Python's imports. *Identical*: all arrays of the last checkpoint are, to the bit, those of a run that nobody disturbed.
*Best*: the goodput of the same kills and restarts where saves take no time."""

_ATTACKED = """## What an attack finds

A trial strikes a command, or what it reads. Then it gives the result of a calm one, byte for byte, or ends with one
line that says what is wrong; and once that is mended the same command gives the calm result (else it counts as *lost*).
*Silent*: another result without a word. *Traceback*: more than one line, none, or a dump.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="random kill points")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, by name")
    parser.add_argument("--means", default="30,60,120", help="mean seconds between kills, a row of goodput each")
    parser.add_argument("--nosaves", action="store_true", help="without the run of 100 million weights")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="which, by name")
    parser.add_argument("--trials", type=int, default=4, help="trials of each kind that chance draws")
    parser.add_argument("--output", default="", help="folder for faults.md and faults.png")
    given = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    suite, outcomes, parts = Suite(folder), [], []

    def say(part: str) -> None:
        print(part + "\n", flush=True)
        parts.append(part)

    for name in filter(None, given.faults.split(",")):
        outcomes.append(FAULTS[name](suite))
        print(table(outcomes[-1:]).splitlines()[-1], flush=True)
    if given.kills:
        fell, outcome = random_kills(suite, given.kills)
        outcomes.append(outcome)
    say(table(outcomes))
    if given.kills:
        where = ", ".join(f"{phase} {fell.count(phase)}" for phase in sorted(set(fell)))
        say(f"Where the random kills fell: {where}.")
    same = True
    found: list = []
    if means := [float(mean) for mean in given.means.split(",") if mean]:
        text, found = goodput_table(suite, means)
        say(text)
        say(f"The first of these rows:\n\n{goodput.table(found[0][0])}\n\n![Its lives](faults.png)")
        same = all(one for _, one in found)
    if not given.nosaves:
        for ranks in (1, 2):
            where = "one process" if ranks == 1 else f"{ranks} ranks"
            say(f"Saves of a run of 100 million weights, with the optimiser's state 1.2 GB, {where}:")
            say(blocking(suite, ranks))
    tallies = []
    if names := list(filter(None, given.attacks.split(","))):
        place = trials.Place(folder / "attacks", given.trials)
        for name in names:
            tallies.append(ATTACKS[name](place))
            print(trials.table(tallies[-1:]).splitlines()[-1], *tallies[-1].bad, sep="\n", flush=True)
        say(_ATTACKED + trials.table(tallies))
    if given.output:
        output = pathlib.Path(given.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "faults.md").write_text(
            "\n\n".join([_TITLE.format(cores=os.cpu_count(), jax=jax.__version__), *parts]) + "\n"
        )
        if means:
            goodput.draw(found[0][0], output / "faults.png")
    if not (same and all(one.as_expected for one in outcomes)) or any(one.bad for one in tallies):
        sys.exit(f"not all as expected; the runs are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

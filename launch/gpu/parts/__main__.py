"""One part, in a process of its own (`launch/gpu/suite.py` starts it).

python -m launch.gpu.parts NAME --records=FILE --setting=card [--bundle=DIR] [--broken=FILE] [--argument=WORD]
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable

from launch.gpu import problem
from launch.gpu.bundle.read import Bundle
from launch.gpu.parts import canary, cases, counters, flex, reads, recurrence, train, variants
from launch.gpu.parts.context import Context
from launch.gpu.records import Recorder, first_line

RUN: dict[str, Callable[[Context], None]] = {
    **reads.RUN,
    "recurrence": recurrence.run,
    "cases": cases.run,
    "counted": counters.counted,
    "train": train.run,
    "train_compiled_here": functools.partial(train.run, compiled_here=True),
    "flex": flex.run,
    "variants": variants.run,
}
SETTINGS = {setting.name: setting for setting in (problem.CARD, problem.DRY)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["canary", "counters", *RUN])
    parser.add_argument("--records", required=True)
    parser.add_argument("--setting", choices=list(SETTINGS), required=True)
    parser.add_argument("--bundle", type=pathlib.Path)
    parser.add_argument("--broken", type=pathlib.Path)
    parser.add_argument("--argument", default="")
    given = parser.parse_args()
    record = Recorder(given.records)
    broken = json.loads(given.broken.read_text(encoding="utf-8")) if given.broken else {}
    try:
        setting = SETTINGS[given.setting]
        context = Context(setting, Bundle(given.bundle, setting.name), record, broken)
        if given.name == "canary":
            canary.run(context, given.argument)
        elif given.name == "counters":
            counters.run(context, sys.argv[2:], pathlib.Path(given.argument))
        else:
            RUN[given.name](context)
    except Exception as error:
        record("error", message=first_line(error))


if __name__ == "__main__":
    main()

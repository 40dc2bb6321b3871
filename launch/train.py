"""Trains a model, or resumes the run that --workdir holds.

python -m launch.train --config=configs/tiny.py --workdir=runs/tiny --config.data.path=data/python
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from launch import command
from mosaics_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "config file, such as configs/tiny.py; override any field on the command line:\n"
    + "\n".join(config_lib.describe_fields()),
    lock_config=True,
)
_WORKDIR = command.define_path("workdir", None, "directory of the run: checkpoints, metrics, config")
_ACCEPT_NEW_DATA = flags.DEFINE_bool(
    "accept_new_data", False, "go on with other corpora, or another mixture of them, than the run was begun with"
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no scheduler tells")
_PROCESSES = flags.DEFINE_integer("processes", None, "processes of the run, where no scheduler tells")
_PROCESS = flags.DEFINE_integer("process", None, "the number of this one, from 0, where no scheduler tells")
_WAIT = flags.DEFINE_integer("wait", 300, "seconds in which all processes must have come", 1, 86_400)
_HEARTBEAT = flags.DEFINE_integer("heartbeat", 100, "seconds after which a silent process is taken for dead", 1, 86_400)

# Exit codes; the same command goes on after each but STOPPED and 2, for which somebody must look (launch/README.md).
FAILED = 1
STOPPED = 3  # too many steps in a row were skipped
PREEMPTED = 75  # told to stop, and saved
# and 70: it stood still (mosaics_jax/watchdog.py)


def main() -> None:
    if not _WORKDIR.value:
        raise ValueError("--workdir is not set; legal: the directory of a run, new or to be resumed")
    if _CONFIG.value is None:
        raise ValueError("--config is not set; legal: a config file, such as configs/tiny.py")
    config = config_lib.Config.from_config_dict(_CONFIG.value)
    from mosaics_jax import schedulers
    from mosaics_jax.processes import Missing, alone, connect, leave_last, roll_call
    from mosaics_jax.train import SaveFailed, TrainingStopped, train  # after the flags: a typo is answered before JAX

    place = schedulers.from_flags(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    connect(place, _WAIT.value, _HEARTBEAT.value)
    try:
        finished = train(config, _WORKDIR.value, _ACCEPT_NEW_DATA.value) is not None
    except TrainingStopped as error:
        _leave(STOPPED, f"stopped: {_line(error)}", leave_last)
    except (SaveFailed, Missing, OSError) as error:
        _leave(FAILED, f"failed: {_line(error)}", leave_last)
    except Exception as error:
        if alone():
            raise
        if isinstance(error, ValueError):
            _leave(2, f"error: {_line(error)}", leave_last)
        _leave(FAILED, f"{traceback.format_exc()}failed: {roll_call() or 'all processes answer'}", leave_last)
    if not finished:
        sys.exit(PREEMPTED)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _leave(code: int, message: str, last: Callable[[], None]) -> NoReturn:
    """Ends this process after `last`, and does not wait for the others as a usual end would: they may never come."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    last()
    os._exit(code)


if __name__ == "__main__":
    command.run(main, goes_on="the same command goes on from the newest checkpoint")

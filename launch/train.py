"""Trains a model, or resumes the run that --workdir holds.

python -m launch.train --config=configs/tiny.py --workdir=runs/tiny --config.data.path=data/python
"""

import sys

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
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run: checkpoints, metrics, config")


def main() -> None:
    if not _WORKDIR.value:
        raise ValueError("--workdir is not set; legal: the directory of a run, new or to be resumed")
    if _CONFIG.value is None:
        raise ValueError("--config is not set; legal: a config file, such as configs/tiny.py")
    try:
        config = config_lib.Config.from_config_dict(_CONFIG.value)
    except OSError as error:  # config_flags keeps a failure to load until the config is read
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        raise ValueError(f"no config file {name!r}; the shipped ones are in configs/") from error
    from mosaics_jax.train import TrainingStopped, train  # after the flags: a typo is answered before JAX loads

    try:
        train(config, _WORKDIR.value)
    except TrainingStopped as error:
        sys.exit(f"stopped: {error}")


if __name__ == "__main__":
    command.run(main)

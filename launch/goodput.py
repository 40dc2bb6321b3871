"""Says how a run spent its wall time, over all its lives: from its metrics.jsonl alone.

python -m launch.goodput runs/tiny [--figure=goodput.png]
"""

import importlib.util
import pathlib

from launch import command
from mosaics_jax import paths

_FIGURE = command.define_path("figure", "", "PNG to draw; '': none")


def main(workdir: str) -> None:
    from mosaics_jax import goodput

    found = goodput.measure(paths.absolute(workdir))
    print(goodput.table(found))
    if _FIGURE.value:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError(f"--figure is {_FIGURE.value!r}, which needs matplotlib: pip install -e '.[eval]'")
        goodput.draw(found, pathlib.Path(_FIGURE.value))


if __name__ == "__main__":
    command.run(main, argument="WORKDIR")

"""Says how a run spent its wall time, over all its lives: from its metrics.jsonl alone.

python -m launch.goodput runs/tiny [--figure=goodput.png]
"""

import importlib.util
import os
import pathlib

from launch import command
from mosaics_jax import paths

_FIGURE = command.define_path("figure", "", "PNG to draw, new or in the place of another PNG; '': none")
_PNG = b"\x89PNG\r\n\x1a\n"


def main(workdir: str) -> None:
    from mosaics_jax import goodput

    figure = pathlib.Path(_FIGURE.value) if _FIGURE.value else None
    if figure:
        _check(figure)
    found = goodput.measure(paths.absolute(workdir))
    print(goodput.table(found))
    if figure:
        goodput.draw(found, figure)


def _check(figure: pathlib.Path) -> None:
    """Raises ValueError where no figure can be drawn, or something else is in its place, which stays."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--figure is {str(figure)!r}, which needs matplotlib: pip install -e '.[eval]'")
    if not figure.parent.is_dir():
        raise ValueError(f"--figure is {str(figure)!r}, in a folder that is not there; legal: a file in one that is")
    if not os.path.lexists(figure):
        return
    held = b""
    if figure.is_file():
        with open(figure, "rb") as stream:
            held = stream.read(len(_PNG))
    if held != _PNG:
        raise ValueError(f"--figure is {str(figure)!r}, which is no PNG; legal: a new file, or a PNG to replace")


if __name__ == "__main__":
    command.run(main, argument="WORKDIR")

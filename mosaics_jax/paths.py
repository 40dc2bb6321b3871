"""Paths as users write them, and as libraries read them that take more for a path than its name."""

import os
import pathlib
import re

# Orbax takes the brackets of a folder for a pattern, and TensorStore a backslash for a slash.
_MISREAD = re.compile(r"[][*?\\]")


def absolute(text: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path that `text` names; a `~` or `~name` at its beginning is a home, as in a shell.

    A shell itself leaves the one in `--workdir=~/runs` alone. Raises ValueError where there is no such user.
    """
    try:
        return pathlib.Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"the path {os.fspath(text)!r} names the home of nobody; legal: ~/..., or a path") from error


def give_usual_mode(path: pathlib.Path) -> None:
    """Gives a file the mode of those that are made beside it: safetensors makes files for their owner alone."""
    usual = path.with_name(f"{path.name}.mode")  # the umask itself is told to none but who changes it, for all threads
    usual.touch()
    try:
        path.chmod(usual.stat().st_mode & 0o777)
    finally:
        usual.unlink()


class Plain:
    """Another name of a folder, in which every library reads a path: that of an open descriptor of it."""

    def __init__(self, folder: pathlib.Path, misread: re.Pattern[str] = _MISREAD):
        """`folder` is absolute, and need not exist before `path` is asked for; `misread` finds what is misread."""
        self._folder, self._misread, self._handle = folder, misread, -1

    @property
    def path(self) -> pathlib.Path:
        """The folder itself where its name can be read in one way only. ValueError where there is no other name."""
        found = self._misread.search(str(self._folder))
        if not found:
            return self._folder
        if self._handle < 0:
            if not os.path.isdir("/proc/self/fd"):
                raise ValueError(f"the path {str(self._folder)!r} has a {found[0]!r}, which a library misreads here")
            self._handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return pathlib.Path(f"/proc/self/fd/{self._handle}")

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

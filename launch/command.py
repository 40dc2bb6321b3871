"""What the commands share: one line on stderr and exit code 2 for what the user can mend."""

import errno
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from mosaics_jax import environment, paths

# What a config, or an override of one, is refused with: by absl, ml_collections and the parser of Python's literals.
_REFUSALS = (
    AttributeError, KeyError, MemoryError, OSError, OverflowError, RecursionError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
_MOST_SHOWN = 4000


class _Outlasting(io.FileIO):
    """An output whose reader may go away (`| head`, a terminal that is closed): what it would read is lost, no more."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def _outlasting(stream: Any) -> Any:
    """`stream`, which outlasts its reader, and escapes what it cannot show: a name of a file may hold anything."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Outlasting(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(
        raw, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path; ~ at its beginning is a home"

    def parse(self, argument: str) -> str:
        return str(paths.absolute(argument)) if argument else argument

    def flag_type(self) -> str:
        return "path"


def define_path(name: str, default: str | None, help: str) -> flags.FlagHolder[str]:
    """A flag whose value is an absolute path, or its default where that is empty."""
    return flags.DEFINE(_PathParser(), name, default, help)


def run(main: Callable[..., None], argument: str = "") -> None:
    """Parses the flags and runs `main`. A ValueError, or a flag that is wrong, is one line on stderr and exit 2.

    Where `argument` is given, the command takes one, of that name, and `main` gets it.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(*argv[1:])
        except ValueError as error:
            _fail(str(error))
        except OSError as error:  # of the machine, and not of what was asked
            print(f"failed: {_one_line(str(error))}", file=sys.stderr)
            sys.exit(1)

    sys.stdout, sys.stderr = _outlasting(sys.stdout), _outlasting(sys.stderr)
    for name in environment.forget():
        print(f"{name} is set, and not heeded: the numbers of a run depend on its config alone", file=sys.stderr)
    # JAX lists the accelerators that are not there; a run says what it runs on.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    app.run(guarded, flags_parser=functools.partial(parse, argument=argument))


def parse(argv: Sequence[str], known: flags.FlagValues = flags.FLAGS, argument: str = "") -> list[str]:
    """Gives the `known` flags the values of a command line; returns the command and its `argument`, if it takes one.

    What is wrong is one line on stderr and exit 2.
    """
    if "config" in known:
        argv = _with_config_as_read(argv)
    for word in argv[1:]:
        override = re.match(r"--?(?:no)?config\.([^=]*)", word)
        if override and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", override[1]):
            _fail(
                f"{override[0]!r} names no field of the config; legal: --config.SECTION.FIELD=VALUE, listed by --help"
            )
    try:
        rest = known(list(argv))
    except flags.Error as error:
        _fail(_last_error(str(error)) + "; --help lists the flags")
    except _REFUSALS as error:
        _fail(_of_config(error))
    if argument and len(rest) == 1:
        _fail(f"{argument} is not given; --help says what it is")
    if len(rest) > 1 + bool(argument):
        _fail(f"unexpected argument {rest[1 + bool(argument)]!r}; --help lists the flags")
    return rest


def _with_config_as_read(argv: Sequence[str]) -> list[str]:
    """`argv` with a --config that its loader can open, which does so itself, before any flag has a value.

    The loader takes what follows the first colon for an argument of the recipe, and knows no ~.
    """
    words = list(argv)
    for place, word in enumerate(words):
        flag, equals, text = word.partition("=")
        if flag not in ("-config", "--config"):
            continue
        if not equals:
            if place + 1 == len(words):
                break
            place, flag, text = place + 1, "", words[place + 1]
        ends = [len(text), *(at for at in reversed(range(len(text))) if text[at] == ":")]
        try:
            files = [(paths.absolute(text[:end]), text[end:]) for end in ends]
        except ValueError as error:
            _fail(f"--config: {error}")
        path, argument = next((found for found in files if found[0].is_file()), (None, ""))
        if path is None:
            _fail(f"no config file {text!r}; the shipped ones are in configs/")
        if ":" in path.name:
            _fail(f"--config is {text!r}; legal: a file that has no colon in its own name")
        folder = paths.Plain(path.parent, re.compile(":")).path  # open as long as this process is
        words[place] = f"{flag}{equals}{folder / path.name}{argument}"
    return words


def _of_config(error: Exception) -> str:
    if isinstance(error, MemoryError | RecursionError):
        return f"an override of the config is too deep to be read ({error})"
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, AttributeError | KeyError) and " " not in message:  # a new name in a dictionary of the config
        name = message.strip("\"'")
        return f"the config has no {name!r}; set a dictionary whole: --config.data.mixture=\"{{'a': 0.7, 'b': 0.3}}\""
    return message if "config" in message else f"the config, or an override of it: {message}"


def _last_error(message: str) -> str:
    """A flag's own message; of one that holds a traceback (a config that refuses its argument), what was raised."""
    if "Traceback (most recent call last)" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]


def _fail(message: str) -> NoReturn:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _one_line(message: str) -> str:
    message = " ".join(message.split()).encode(errors="backslashreplace").decode()
    return message if len(message) <= _MOST_SHOWN else message[:_MOST_SHOWN] + "..."

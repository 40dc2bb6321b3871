"""What the commands share: one line on stderr and exit code 2 for what the user can mend."""

import functools
import io
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags

# What a config, or an override of one, is refused with: by absl, ml_collections and the parser of Python's literals.
_REFUSALS = (
    AttributeError, KeyError, MemoryError, OSError, OverflowError, RecursionError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
_MOST_SHOWN = 4000


def run(main: Callable[..., None], argument: str = "") -> None:
    """Parses the flags and runs `main`. A ValueError, or a flag that is wrong, is one line on stderr and exit 2.

    Where `argument` is given, the command takes one, of that name, and `main` gets it.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(*argv[1:])
        except ValueError as error:
            _fail(str(error))

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name of a file need not be what the terminal can show
    # JAX lists the accelerators that are not there; a run says what it runs on.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    app.run(guarded, flags_parser=functools.partial(parse, argument=argument))


def parse(argv: Sequence[str], known: flags.FlagValues = flags.FLAGS, argument: str = "") -> list[str]:
    """Gives the `known` flags the values of a command line; returns the command and its `argument`, if it takes one.

    What is wrong is one line on stderr and exit 2.
    """
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
    message = " ".join(message.split()).encode(errors="backslashreplace").decode()
    print(f"error: {message if len(message) <= _MOST_SHOWN else message[:_MOST_SHOWN] + '...'}", file=sys.stderr)
    sys.exit(2)

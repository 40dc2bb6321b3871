"""What the commands share: one line on stderr and exit code 2 for what the user can mend."""

import logging
import sys
from collections.abc import Callable, Sequence

from absl import app, flags


def run(main: Callable[..., None], argument: str = "") -> None:
    """Parses the flags and runs `main`. A ValueError, or a flag that is wrong, is one line on stderr and exit 2.

    Where `argument` is given, the command takes one, of that name, and `main` gets it.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(argv))
        except flags.Error as error:
            _fail(_last_error(str(error)) + "; --help lists the flags")
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # a config or an override
            _fail(_plain(error))
        if argument and len(rest) == 1:
            _fail(f"{argument} is not given; --help says what it is")
        if len(rest) > 1 + bool(argument):
            _fail(f"unexpected argument {rest[1 + bool(argument)]!r}; --help lists the flags")
        return rest

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(*argv[1:])
        except ValueError as error:
            _fail(_plain(error))

    # JAX lists the accelerators that are not there; a run says what it runs on.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    app.run(guarded, flags_parser=parse)


def _plain(error: Exception) -> str:
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, AttributeError | KeyError) and " " not in message:  # a new name in a dictionary of the config
        name = message.strip("\"'")
        return f"the config has no {name!r}; set a dictionary whole: --config.data.mixture=\"{{'a': 0.7, 'b': 0.3}}\""
    return message


def _last_error(message: str) -> str:
    """A flag's own message; of one that holds a traceback (a config that refuses its argument), what was raised."""
    if "Traceback (most recent call last)" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)

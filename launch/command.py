"""What the commands share: one line on stderr and exit code 2 for what the user can mend, and one line at Ctrl-C."""

import errno
import functools
import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from mosaics_jax import environment, paths

# What a config, or an override of one, is refused with: by absl, ml_collections and the parser of Python's literals.
_REFUSALS = (
    AttributeError, KeyError, MemoryError, OSError, OverflowError, RecursionError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
_MOST_SHOWN = 4000


_INTERRUPTED = 130
_STDERR = 2
_GONE = (errno.EPIPE, errno.EIO)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Outlasting(io.FileIO):
    """An output whose reader may go away (`| head`, a terminal that is closed): what it would read is lost, no more.

    With `told` it only tells of what is done: what a disk that is full does not take is lost too.
    """

    def __init__(self, number: int, told: bool):
        super().__init__(number, "w", closefd=False)
        self._told = told

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno in _GONE:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
            elif error.errno not in _FULL or not self._told:
                raise
            return len(data)


def _outlasting(stream: Any, told: bool) -> Any:
    """`stream`, which outlasts its reader, and escapes what it cannot show: a name of a file may hold anything."""
    if stream is None:  # closed (`>&-`) when the process began
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Outlasting(stream.fileno(), told))
    return io.TextIOWrapper(
        raw, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


def _open_outputs(told: bool) -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest number that is free, before a file of ours does.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _outlasting(sys.stdout, told), _outlasting(sys.stderr, True)


class _Interrupt:
    """What Ctrl-C does: one line, and exit code 130, however often it is pressed.

    A command that may end at any moment ends at once, whatever it waits for. Any other gets a KeyboardInterrupt, and
    ends at once when it is pressed again. Where SIGINT is ignored, as in the background of a script, it stays so.
    """

    def __init__(self, goes_on: str):
        self.came = False
        self._message = f"interrupted{'; ' * bool(goes_on)}{goes_on}"
        # What is left of a pool of processes is cleared away by Python's tracker, which would say so.
        rules = [os.environ.get("PYTHONWARNINGS", ""), "ignore:resource_tracker"]
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, rules))
        sys.unraisablehook = self._unraisable
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return
        if goes_on:
            reads, writes = os.pipe()
            os.set_blocking(writes, False)
            # Told by C code, so also while the interpreter's first thread waits in a library.
            signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
            threading.Thread(target=self._wait, args=(reads,), name="interrupts", daemon=True).start()
        signal.signal(signal.SIGINT, (lambda *_: None) if goes_on else self._raise)

    def end(self) -> NoReturn:
        """Ends the process, and those that it has made; waits for nothing longer than a second."""
        teller = threading.Thread(target=self._tell, daemon=True)
        teller.start()
        teller.join(1.0)
        os._exit(_INTERRUPTED)

    def _tell(self) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        if sys.stderr.isatty():
            print(file=sys.stderr)  # after a bar
        print(self._message, file=sys.stderr, flush=True)
        sys.stdout.flush()

    def _wait(self, reads: int) -> None:
        while signal.SIGINT not in os.read(reads, 1):
            pass
        self.end()

    def _raise(self, number: int, frame: Any) -> NoReturn:
        if self.came:
            self.end()
        self.came = True
        raise KeyboardInterrupt

    def _unraisable(self, found: Any) -> None:
        if isinstance(found.exc_value, KeyboardInterrupt):  # where it would be lost, as in a callback of a library
            self.end()
        # So C code of TensorStore ends the writes of a checkpoint of which one has failed; that one is raised.
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            sys.__unraisablehook__(found)


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path; ~ at its beginning is a home"

    def parse(self, argument: str) -> str:
        return str(paths.absolute(argument)) if argument else argument

    def flag_type(self) -> str:
        return "path"


def define_path(name: str, default: str | None, help: str) -> flags.FlagHolder[str]:
    """A flag whose value is an absolute path, or its default where that is empty."""
    return flags.DEFINE(_PathParser(), name, default, help)


def run(main: Callable[..., None], argument: str = "", goes_on: str = "") -> None:
    """Parses the flags and runs `main`. A ValueError, or a flag that is wrong, is one line on stderr and exit 2.

    Where `argument` is given, the command takes one, of that name, and `main` gets it. Where the same command goes on
    from what is done, whenever it ends, `goes_on` says so at Ctrl-C; stdout then only tells of what is done.
    """
    _open_outputs(told=bool(goes_on))
    interrupt = _Interrupt(goes_on)

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(*argv[1:])
        except Exception as error:
            if interrupt.came:  # whatever it has become on its way
                interrupt.end()
            if isinstance(error, ValueError):
                _fail(str(error))
            if isinstance(error, OSError):  # of the machine, and not of what was asked
                print(f"failed: {_one_line(str(error))}", file=sys.stderr)
                sys.exit(1)
            raise

    try:
        for name in environment.forget():
            print(f"{name} is set, and not heeded: the numbers of a run depend on its config alone", file=sys.stderr)
        # JAX lists the accelerators that are not there; a run says what it runs on.
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
        app.run(guarded, flags_parser=functools.partial(parse, argument=argument))
    except KeyboardInterrupt:
        interrupt.end()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and said


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

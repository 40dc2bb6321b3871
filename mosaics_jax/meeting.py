"""How the processes of a run come together before jax connects them: who is believed, and who did not come.

Process 0 greets each caller with a challenge. A process answers with its number, how many they are, a challenge of its
own, and an HMAC of all that; when all have come, process 0 ends with a line that has one too. The key is
MOSAICS_SECRET, which so is never sent. Where none is set the key is empty, and whoever speaks this is believed.
"""

import contextlib
import dataclasses
import errno
import hmac
import os
import re
import secrets
import selectors
import socket
import time
from collections.abc import Iterator

from mosaics_jax import addresses
from mosaics_jax.data.files import open_files_limit
from mosaics_jax.schedulers import Place

GRACE = 20  # seconds that process 0 may have started later, and so wait longer for the rest

_CALL = 5.0  # seconds in which a caller must have said all that it has to
_PAUSE = 0.2  # seconds until one who was not heard calls again
_LONGEST = 256  # letters of what a caller says
_LONGEST_ANSWER = 1024
_MOST_CALLERS = 256  # that have not said it yet; with one more the oldest of them must call again
_LEAST_SECRET = 16


@contextlib.contextmanager
def gather(place: Place, wait: int) -> Iterator[tuple[str, str]]:
    """Process 0 waits until all have reported, and tells them so, or who is missing.

    Yields its address for itself, and the one at which jax's service is to listen; there it holds the port meanwhile.
    jax alone would end all processes from C++ code: without a word on who did not come, or where the port is taken.
    """
    deadline, secret = time.monotonic() + wait, _secret()
    host, port = addresses.split(place.coordinator, "the coordinator")
    open_files_limit()  # which raises it: each process is a connection
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as listening:
            room = place.processes + _MOST_CALLERS  # or callers would have to call again, a second later
            servers = [listening.enter_context(one) for one in addresses.listen(host, port, deadline, room)]
            callers, problem = _Meeting(place, servers, secret).run(deadline, wait)
        met = sorted({caller.connection.getsockname()[0] for caller in callers})
        if not problem and len(met) > 1 and all(map(addresses.is_loopback, met)):
            problem = f"some came to {' and some to '.join(met)}; start all processes with the same address"
        if not problem:
            try:
                # Where they came to several addresses of this machine, the service must be at each of them.
                for one in addresses.hold(met if len(met) == 1 else list(addresses.EVERYWHERE), port):
                    stack.enter_context(one)
            except ValueError as error:
                problem = str(error)
        for caller in callers:
            caller.tell(problem, secret)
        if problem:
            raise ValueError(problem)
        yield met[0], met[0] if len(met) == 1 else "::"


def report(place: Place, wait: int) -> str:
    """Tells process 0 that this one has come, and waits for its word. Returns the address at which it was."""
    deadline, secret = time.monotonic() + wait, _secret()
    host, port = addresses.split(place.coordinator, "the coordinator")
    while True:
        try:
            with addresses.call(host, port, min(_CALL, max(0.01, deadline - time.monotonic()))) as connection:
                address: str = connection.getpeername()[0]
                problem = _introduce(connection, place, secret, deadline)
            break
        except OSError as error:
            if time.monotonic() + _PAUSE > deadline:
                raise ValueError(
                    f"process 0 was not at {place.coordinator} within {wait} s ({error}); is it running, and is that "
                    "its address as seen from here (--coordinator)?"
                ) from error
            time.sleep(_PAUSE)
    if problem:
        raise ValueError(problem)
    return address


def numbers(processes: list[int]) -> str:
    """Processes by number; of many, the first."""
    more = f" and {len(processes) - 20} more" if len(processes) > 20 else ""
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes[:20]))}{more}"


@dataclasses.dataclass
class _Caller:
    """Who has connected: a process, or a stranger that is not told from one yet."""

    connection: socket.socket
    deadline: float
    challenge: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))
    said: bytes = b""
    own_challenge: str = ""

    def tell(self, problem: str, secret: bytes) -> None:
        """Ends the call; no problem means that all have come. One that has hung up is not told."""
        signature = _sign(secret, "answer", self.challenge, self.own_challenge, problem)
        with contextlib.suppress(OSError), self.connection:
            self.connection.settimeout(_CALL)
            self.connection.sendall(f"{signature} {problem}\n".encode())

    def gone(self) -> bool:
        """Whether it has hung up."""
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


class _Meeting:
    """All callers of process 0 are heard at once, so that none keeps another waiting."""

    def __init__(self, place: Place, servers: list[socket.socket], secret: bytes):
        self._place, self._servers, self._secret = place, servers, secret
        self._selector = selectors.DefaultSelector()
        self._callers: dict[socket.socket, _Caller] = {}  # not known yet, the oldest first
        self._came: dict[int, _Caller] = {}
        self._odd: list[_Caller] = []  # of whom the problem is
        self._problem = ""
        self._turned_away = False

    def run(self, deadline: float, wait: int) -> tuple[list[_Caller], str]:
        """Those who are to be told how it ended, and what is wrong, or ""."""
        with self._selector:
            for server in self._servers:
                server.setblocking(False)
                self._selector.register(server, selectors.EVENT_READ)
            while not self._problem and not self._complete():
                if time.monotonic() < deadline:
                    self._hear(deadline)
                else:
                    self._problem = self._missing(wait)
            for caller in list(self._callers.values()):
                self._forget(caller).close()
        return [*self._came.values(), *self._odd], self._problem

    def _complete(self) -> bool:
        if len(self._came) == self._place.processes - 1:
            self._leave_out_the_gone()
        return len(self._came) == self._place.processes - 1

    def _missing(self, wait: int) -> str:
        self._leave_out_the_gone()
        missing = sorted(set(range(1, self._place.processes)) - set(self._came))
        others = " (others called: strangers, or with another MOSAICS_SECRET)" if self._turned_away else ""
        return f"{numbers(missing)} did not come within {wait} s{others}; look at their logs, or raise --wait"

    def _leave_out_the_gone(self) -> None:
        for process in [process for process, caller in self._came.items() if caller.gone()]:
            self._came.pop(process).connection.close()

    def _hear(self, deadline: float) -> None:
        """Waits until something happens, and takes it up: first what callers say, then who else calls."""
        next_end = next((caller.deadline for caller in self._callers.values()), deadline)
        ready = self._selector.select(max(0.0, min(deadline, next_end) - time.monotonic()))
        sockets = {key.fileobj for key, _ in ready}
        for caller in [caller for caller in self._callers.values() if caller.connection in sockets]:
            if not self._problem:
                self._read(caller)
        for server in self._servers:
            if server in sockets:
                self._accept(server)
        for caller in [caller for caller in self._callers.values() if caller.deadline <= time.monotonic()]:
            self._turn_away(caller)

    def _accept(self, server: socket.socket) -> None:
        try:
            connection, _ = server.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._callers:
                raise
            self._turn_away(next(iter(self._callers.values())))
            return
        if len(self._callers) == _MOST_CALLERS:
            self._turn_away(next(iter(self._callers.values())))
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ)
        caller = self._callers[connection] = _Caller(connection, time.monotonic() + _CALL)
        with contextlib.suppress(OSError):  # it has hung up, which reading will tell
            connection.send(f"mosaics {caller.challenge}\n".encode())

    def _read(self, caller: _Caller) -> None:
        try:
            more = caller.connection.recv(_LONGEST)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        caller.said += more
        if not more or len(caller.said) > _LONGEST:
            self._turn_away(caller)
        elif b"\n" in more:
            self._decide(caller)

    def _decide(self, caller: _Caller) -> None:
        """Believes a caller, or turns it away. One who is believed and cannot be right ends the meeting."""
        line = re.fullmatch(rb"([1-9][0-9]{0,8}) ([1-9][0-9]{0,8}) ([0-9a-f]{32}) ([0-9a-f]{64})\n", caller.said)
        words = [word.decode() for word in line.groups()] if line else []
        proved = words and hmac.compare_digest(words[3], _sign(self._secret, "hello", caller.challenge, *words[:3]))
        if not proved or int(words[0]) >= int(words[1]):
            self._turn_away(caller)
            return
        self._forget(caller)
        process, processes, caller.own_challenge = int(words[0]), int(words[1]), words[2]
        there = self._came.get(process)
        if processes != self._place.processes:
            own = f"process 0 for {self._place.processes}"
            self._problem = f"process {process} was started for {processes} processes, {own}"
        elif there and not there.gone():
            self._problem = f"two processes have number {process}"
        elif there:
            there.connection.close()
        if self._problem:
            self._odd.append(caller)
        else:
            self._came[process] = caller

    def _turn_away(self, caller: _Caller) -> None:
        self._turned_away = True
        self._forget(caller).close()

    def _forget(self, caller: _Caller) -> socket.socket:
        self._selector.unregister(caller.connection)
        return self._callers.pop(caller.connection).connection


def _introduce(connection: socket.socket, place: Place, secret: bytes, deadline: float) -> str:
    """Says who this process is, and returns what process 0 answers: "", or what is wrong."""
    greeting = re.fullmatch("mosaics ([0-9a-f]{32})", _line(connection, min(deadline, time.monotonic() + _CALL)))
    if not greeting:
        raise ConnectionError("what answers there is no run of this program")
    words = [str(place.process), str(place.processes), secrets.token_hex(16)]
    connection.sendall(f"{' '.join(words)} {_sign(secret, 'hello', greeting[1], *words)}\n".encode())
    signature, _, problem = _line(connection, deadline + GRACE).partition(" ")
    if not hmac.compare_digest(signature.encode(), _sign(secret, "answer", greeting[1], words[2], problem).encode()):
        raise ConnectionError("what answers there has another MOSAICS_SECRET")
    return problem


def _line(connection: socket.socket, deadline: float) -> str:
    said = b""
    while not said.endswith(b"\n"):
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            more = connection.recv(_LONGEST_ANSWER)
        except ConnectionResetError:
            more = b""
        said += more
        if not more:
            raise ConnectionError("it hung up; has it the same MOSAICS_SECRET?")
        if len(said) > _LONGEST_ANSWER or time.monotonic() > deadline:
            raise ConnectionError("what answers there is no run of this program")
    return said[:-1].decode(errors="replace")


def _secret() -> bytes:
    """The secret of the run; empty where it has none. ValueError where it is too short for one."""
    found = os.environ.get("MOSAICS_SECRET")
    if found is not None and len(found) < _LEAST_SECRET:
        letters = f"{_LEAST_SECRET} letters or more, the same for all processes, or unset"
        raise ValueError(f"MOSAICS_SECRET has {len(found)} letters; legal: {letters}")
    return (found or "").encode(errors="surrogateescape")


def _sign(secret: bytes, *words: str) -> str:
    return hmac.new(secret, " ".join(words).encode(), "sha256").hexdigest()

"""How processes come together at process 0: with strangers at its port, and with others that cannot be right."""

import contextlib
import hmac
import itertools
import os
import pathlib
import re
import socket
import subprocess
import threading
import time

import pytest
import yaml

from mosaics_jax import addresses, meeting
from mosaics_jax.schedulers import Place

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SECRET = "kumquat-7f3a9d51-zeppelin"
KEY = SECRET.encode()
OTHER = b"kumquat-7f3a9d51-zeppelim"
SOON = 8  # seconds, far less than those that a stranger may stay in most of these tests


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def port():
    return _port()


@pytest.fixture(autouse=True)
def _secret(monkeypatch):
    monkeypatch.setenv("MOSAICS_SECRET", SECRET)


class _Thread(threading.Thread):
    """Runs a function, and gives what it returns or raises."""

    def __init__(self, function, *arguments):
        super().__init__(daemon=True)
        self._call = function, arguments
        self.start()

    def run(self):
        function, arguments = self._call
        try:
            self.found = function(*arguments)
        except Exception as error:
            self.found = error

    def result(self, seconds=30):
        self.join(seconds)
        assert not self.is_alive()
        return self.found


def _gather(port, processes, wait):
    with meeting.gather(Place(f"127.0.0.1:{port}", processes, 0, []), wait) as (host, bind):
        return host, bind


def _report(port, process, processes, wait=30):
    return meeting.report(Place(f"127.0.0.1:{port}", processes, process, []), wait)


def _dial(port):
    """A connection to process 0, once it listens."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 10)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _heard(connection):
    """All that the other side still says, until it hangs up."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(1000):
            said += more
    return said


def _hello(connection, *words, secret=KEY):
    """What a process says to the challenge on this connection."""
    challenge = re.fullmatch(rb"mosaics ([0-9a-f]{32})\n", connection.recv(1000))[1].decode()
    words = [*words, "0123456789abcdef" * 2]
    return f"{' '.join(words)} {meeting._sign(secret, 'hello', challenge, *words)}\n".encode()


def _trickle(connection):
    with contextlib.suppress(OSError):
        for letter in itertools.cycle(b"1 2 "):
            connection.send(bytes([letter]))
            time.sleep(0.1)


def _replayed(connection):
    """What another process said before, to another challenge."""
    with _dial(connection.getpeername()[1]) as other:
        connection.send(_hello(other, "1", "3"))


STRANGERS = {
    "silent": lambda connection: None,
    "slow": lambda connection: _Thread(_trickle, connection),
    "endless": lambda connection: _Thread(connection.sendall, b"1" * 1_000_000),
    "half a line": lambda connection: connection.send(b"1 3 "),
    "web": lambda connection: connection.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "bytes": lambda connection: connection.send(bytes(range(256))),
    "bare": lambda connection: connection.send(b"1 3\n"),
    "beyond": lambda connection: connection.send(b"7 2\n"),
    "below": lambda connection: connection.send(b"-5 2\n"),
    "other secret": lambda connection: connection.send(_hello(connection, "1", "3", secret=OTHER)),
    "no secret": lambda connection: connection.send(_hello(connection, "1", "3", secret=b"")),
    "replayed": _replayed,
    "of 3 the third": lambda connection: connection.send(_hello(connection, "3", "3")),
    "of 2 the seventh": lambda connection: connection.send(_hello(connection, "7", "2")),
    "process 0": lambda connection: connection.send(_hello(connection, "0", "3")),
    "negative": lambda connection: connection.send(_hello(connection, "-1", "3")),
    "other digits": lambda connection: connection.send(_hello(connection, "\u0661", "3")),
    "spaced": lambda connection: connection.send(_hello(connection, " 1", "3")),
    "more after it": lambda connection: connection.send(_hello(connection, "1", "3") + b"1 3\n"),
}  # fmt: skip


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_keep_nobody_waiting_and_are_nobody(stranger, port, monkeypatch):
    monkeypatch.setattr(meeting, "_CALL", 60.0)  # a stranger who was heard before others could hold them as long
    first = _Thread(_gather, port, 3, 60)
    with _dial(port) as one, _dial(port) as another:
        STRANGERS[stranger](one)
        STRANGERS[stranger](another)
        time.sleep(0.2)  # they were first
        begin = time.monotonic()
        others = [_Thread(_report, port, process, 3) for process in (1, 2)]
        assert [other.result() for other in others] == ["127.0.0.1"] * 2
        assert first.result() == ("127.0.0.1", "127.0.0.1")
        assert time.monotonic() - begin < SOON
        for connection in (one, another):
            assert b"answer" not in _heard(connection)


def test_fifty_silent_strangers_keep_nobody_waiting(port, monkeypatch):
    monkeypatch.setattr(meeting, "_CALL", 60.0)
    first = _Thread(_gather, port, 3, 60)
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(_dial(port))
        begin = time.monotonic()
        others = [_Thread(_report, port, process, 3) for process in (1, 2)]
        assert [other.result() for other in others] == ["127.0.0.1"] * 2
        assert first.result() == ("127.0.0.1", "127.0.0.1")
        assert time.monotonic() - begin < SOON


@pytest.mark.parametrize("stranger", ["silent", "slow", "half a line", "other secret"])
def test_strangers_do_not_hold_process_0_beyond_its_wait(stranger, port):
    begin = time.monotonic()
    first = _Thread(_gather, port, 3, 1)
    with _dial(port) as connection:
        STRANGERS[stranger](connection)
        error = first.result()
    assert time.monotonic() - begin < 4  # and a stranger alone may stay for 5
    assert isinstance(error, ValueError)
    assert re.match(r"processes 1, 2 did not come within 1 s.*; look at their logs, or raise --wait", str(error))
    assert ("others called" in str(error)) == (stranger == "other secret")  # who was turned away, and not only cut off


@pytest.mark.parametrize("stranger", ["silent", "slow", "half a line"])
def test_a_stranger_has_a_time_for_all_that_it_says(stranger, port, monkeypatch):
    monkeypatch.setattr(meeting, "_CALL", 0.5)
    _Thread(_gather, port, 2, 60)
    with _dial(port) as connection:
        begin = time.monotonic()
        STRANGERS[stranger](connection)
        assert _heard(connection).startswith(b"mosaics ")
        assert 0.3 < time.monotonic() - begin < SOON
    _report(port, 1, 2)


def test_a_stranger_has_a_length_for_all_that_it_says(port, monkeypatch):
    monkeypatch.setattr(meeting, "_CALL", 60.0)
    first = _Thread(_gather, port, 2, 60)
    with _dial(port) as connection:
        for _ in range(30):  # 300 letters, in pieces that are each within the bound
            with contextlib.suppress(ConnectionError):
                connection.send(b"1" * 10)
            time.sleep(0.01)
        _heard(connection)  # or this would time out
    _report(port, 1, 2)
    assert first.result() == ("127.0.0.1", "127.0.0.1")


def test_of_too_many_strangers_the_oldest_must_go(port, monkeypatch):
    monkeypatch.setattr(meeting, "_CALL", 60.0)
    monkeypatch.setattr(meeting, "_MOST_CALLERS", 3)
    first = _Thread(_gather, port, 2, 60)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(_dial(port)) for _ in range(5)]
        for gone in strangers[:2]:
            _heard(gone)
        strangers[4].settimeout(0.2)
        with pytest.raises(TimeoutError):  # the others are still heard
            _heard(strangers[4])
        _report(port, 1, 2)
        assert first.result() == ("127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (("1", "3"), "two processes have number 1"),
        (("2", "4"), "process 2 was started for 4 processes, process 0 for 3"),
        (("1", "2"), "process 1 was started for 2 processes, process 0 for 3"),
    ],
)
@pytest.mark.parametrize("secret", [SECRET, None])
def test_processes_that_cannot_be_right_are_named_to_all(secret, place, problem, port, monkeypatch):
    if secret is None:
        monkeypatch.delenv("MOSAICS_SECRET")
    first = _Thread(_gather, port, 3, 60)
    with _dial(port) as connection:
        connection.send(_hello(connection, "1", "3", secret=(secret or "").encode()))
        time.sleep(0.2)
        other = _Thread(_report, port, int(place[0]), int(place[1]))
        assert str(other.result()) == str(first.result()) == problem
        assert _heard(connection).decode().partition(" ")[2] == f"{problem}\n"


def test_a_process_that_gave_up_and_comes_again_is_one(port):
    first = _Thread(_gather, port, 3, 60)
    with _dial(port) as connection:
        connection.send(_hello(connection, "1", "3"))
        time.sleep(0.2)
    one = _Thread(_report, port, 1, 3)
    time.sleep(0.5)
    assert [other.result() for other in (one, _Thread(_report, port, 2, 3))] == ["127.0.0.1"] * 2
    assert first.result() == ("127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize(("processes", "missing"), [(3, "process 1"), (4, "processes 1, 3")])
def test_a_process_that_came_and_ended_is_missing(processes, missing, port):
    first = _Thread(_gather, port, processes, 2)
    with _dial(port) as connection:
        connection.send(_hello(connection, "1", str(processes)))
        time.sleep(0.2)
    for call in (_Thread(_report, port, 2, processes, 2), first):
        assert str(call.result()).startswith(f"{missing} did not come within 2 s; look at")


# Process 0 as the others see it.


def _impostor(port, *lines):
    """Listens where process 0 should, and says these lines to each that comes."""

    def serve():
        with socket.create_server(("127.0.0.1", port)) as server:
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(lines[0])
                    for line in lines[1:]:
                        connection.recv(1000)
                        connection.sendall(line)

    return _Thread(serve)


GREETING = b"mosaics " + b"ab" * 16 + b"\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GREETING, b" \n"], "what answers there has another MOSAICS_SECRET"),
        ([GREETING, b"\n"], "what answers there has another MOSAICS_SECRET"),
        ([GREETING, b"0" * 64 + b" run this\n"], "what answers there has another MOSAICS_SECRET"),
        ([GREETING, hmac.new(b"", b"answer", "sha256").hexdigest().encode() + b" \n"], "another MOSAICS_SECRET"),
        ([GREETING], "it hung up; has it the same MOSAICS_SECRET"),
        ([b"SSH-2.0-OpenSSH_9.6\r\n"], "what answers there is no run of this program"),
        ([b"x" * 5000], "what answers there is no run of this program"),
        ([b"\xff\n"], "what answers there is no run of this program"),
    ],
)
def test_an_impostor_of_process_0_is_not_believed(lines, message, port):
    _impostor(port, *lines)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf"process 0 was not at 127.0.0.1:{port} within 1 s \(.*{message}"):
        _report(port, 1, 2, 1)
    assert time.monotonic() - begin < SOON


def test_a_silent_impostor_is_called_anew_until_the_wait_is_over(port, monkeypatch):
    monkeypatch.setattr(meeting, "_CALL", 0.3)
    _impostor(port, b"", b"")
    with pytest.raises(ValueError, match=r"process 0 was not at .* within 1 s"):
        _report(port, 1, 2, 1)


def test_the_secret_is_not_sent_and_what_is_sent_is_of_no_use_again(port):
    outer, said = _port(), []

    def pass_on(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1000):
                said.append(data)
                sink.sendall(data)

    def relay():
        with socket.create_server(("127.0.0.1", outer)) as server:
            connection, _ = server.accept()
            with connection, _dial(port) as process_0:
                _Thread(pass_on, connection, process_0)
                pass_on(process_0, connection)

    first = _Thread(_gather, port, 3, 60)
    _Thread(relay)
    one = _Thread(_report, outer, 1, 3)
    two = _Thread(_report, port, 2, 3)
    assert [one.result(), two.result()] == ["127.0.0.1"] * 2
    assert first.result() == ("127.0.0.1", "127.0.0.1")
    assert len(said) == 3
    assert SECRET.encode() not in b"".join(said)
    hello, answer = said[1:]
    again = _Thread(_gather, port, 3, 1)
    with _dial(port) as connection:
        connection.send(hello)
        _heard(connection)
    assert str(again.result()).startswith("processes 1, 2 did not come")
    _impostor(outer, said[0], answer)
    with pytest.raises(ValueError, match="what answers there has another MOSAICS_SECRET"):
        _report(outer, 1, 3, 1)


@pytest.mark.parametrize("secret", ["", "x", "fifteen letters"])
def test_a_secret_that_is_none_is_refused(secret, port, monkeypatch):
    monkeypatch.setenv("MOSAICS_SECRET", secret)
    for call in (_gather, lambda *rest: _report(rest[0], 1, *rest[1:])):
        with pytest.raises(ValueError, match=rf"^MOSAICS_SECRET has {len(secret)} letters; legal: 16 letters or more"):
            call(port, 2, 1)


def test_the_batch_script_gives_each_life_a_secret(tmp_path, monkeypatch):
    (tmp_path / "srun").write_text('#!/bin/bash\necho "secret=$MOSAICS_SECRET"\n')
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def secret():
        command = ["bash", str(LAUNCH / "slurm" / "train.sbatch"), f"--workdir={tmp_path}/run"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return re.search("secret=(.*)", done.stdout)[1]

    assert secret() == SECRET  # the user's own
    monkeypatch.delenv("MOSAICS_SECRET")
    first, second = secret(), secret()
    assert first != second
    assert re.fullmatch("[0-9a-f]{64}", first)


def test_the_jobset_hands_out_a_secret():
    (recipe,) = yaml.safe_load_all((LAUNCH / "kubernetes" / "train.yaml").read_text())
    (container,) = recipe["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": recipe["metadata"]["name"]}}]  # and not optional


# Where process 0 listens.


def _open(port, *places):
    """Those of the addresses at which something listens."""
    found = []
    for place in places:
        with contextlib.suppress(OSError), socket.create_connection((place, port), 5):
            found.append(place)
    return found


@contextlib.contextmanager
def _listening(host, port):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(one) for one in addresses.listen(host, port, time.monotonic() + 0.5, 5)]


def _has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def _outer():
    """An address of this machine that is not of the loopback; nothing is sent to the one asked for."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return probe.getsockname()[0]


PLACES = ["127.0.0.1", "127.0.0.2", "::1", _outer() or "127.0.0.3"]


def _named(monkeypatch, *found):
    """A name of a host, `node`, that stands for these addresses."""
    real = socket.getaddrinfo

    def lookup(host, *rest, **more):
        if host != "node":
            return real(host, *rest, **more)
        if more.get("flags"):
            raise socket.gaierror(-2, "Name or service not known")
        return [one for address in found for one in real(address, *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@pytest.mark.parametrize(
    ("host", "places"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("127.1", ["127.0.0.1"]),
        ("127.0.0.2", ["127.0.0.2"]),
        ("::1", ["::1"]),
        ("localhost", ["127.0.0.1", "::1"]),
        ("LocalHost", ["127.0.0.1", "::1"]),
        ("0.0.0.0", [place for place in PLACES if ":" not in place]),
        (PLACES[3], [PLACES[3]]),
    ],
)
def test_process_0_listens_where_it_was_told(host, places, port):
    if host == "::1" and not _has_ipv6():
        pytest.skip("no IPv6")
    with _listening(host, port):
        assert _open(port, *PLACES) == [place for place in places if ":" not in place or _has_ipv6()]


def test_a_name_is_where_its_addresses_are(port, monkeypatch):
    monkeypatch.setattr(addresses, "is_loopback", lambda address: address == "127.0.0.3")  # no other address is certain
    _named(monkeypatch, "127.0.0.2", "127.0.0.3", "192.0.2.77")
    with _listening("node", port):
        assert _open(port, *PLACES[:3], "127.0.0.3") == ["127.0.0.2"]


@pytest.mark.parametrize("found", ["192.0.2.77", "127.0.1.1"])  # of a service, or a router; a system's own name
def test_a_name_that_is_not_here_is_listened_for_everywhere(found, port, monkeypatch):
    _named(monkeypatch, found)
    with _listening("node", port):
        assert _open(port, *PLACES) == [place for place in PLACES if ":" not in place or _has_ipv6()]


def test_jax_is_told_of_all_interfaces_only_where_processes_came_to_several(port, monkeypatch):
    monkeypatch.setattr(addresses, "is_loopback", lambda address: False)
    _named(monkeypatch, "127.0.0.2", "127.0.0.1")

    def come(*hosts):
        def gather():
            with meeting.gather(Place(f"node:{port}", 3, 0, []), 30) as found:
                return found

        first = _Thread(gather)
        others = [
            _Thread(meeting.report, Place(f"{host}:{port}", 3, process, []), 30)
            for process, host in enumerate(hosts, 1)
        ]
        assert [other.result() for other in others] == [host.replace("node", "127.0.0.2") for host in hosts]
        return first.result()

    assert come("node", "127.0.0.2") == ("127.0.0.2", "127.0.0.2")
    assert come("node", "127.0.0.1") == ("127.0.0.1", "::")


@pytest.mark.skipif(not _has_ipv6(), reason="no IPv6")
def test_what_was_told_localhost_stays_there(port):
    """Processes that were told different loopback addresses would need all interfaces."""

    def gather():
        with meeting.gather(Place(f"localhost:{port}", 3, 0, []), 30):
            pass

    hosts = enumerate(("localhost", "[::1]"), 1)
    calls = [
        _Thread(gather),
        *(_Thread(meeting.report, Place(f"{host}:{port}", 3, process, []), 30) for process, host in hosts),
    ]
    assert {str(call.result()) for call in calls} == {
        "some came to 127.0.0.1 and some to ::1; start all processes with the same address"
    }


@pytest.mark.parametrize("host", ["node.invalid", "a" * 70 + ".invalid", "a..b"])
def test_a_name_that_does_not_resolve_is_named(host, port):
    with pytest.raises(ValueError, match=rf"^'{host}', where process 0 is to be, does not resolve \("):
        addresses.listen(host, port, time.monotonic() + 0.5, 5)
    with pytest.raises(ValueError, match=rf"^process 0 was not at {host}:{port} within 1 s \("):
        meeting.report(Place(f"{host}:{port}", 2, 1, []), 1)


@pytest.mark.parametrize("taken", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_named(taken, port):
    with (
        socket.create_server((taken, port)),
        pytest.raises(
            ValueError, match=rf"^process 0 cannot listen at port {port} \(Address already in use\); set another .*PORT"
        ),
    ):
        _gather(port, 2, 30)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_port_of_roots_is_named():
    os.seteuid(65534)
    try:
        with socket.socket() as probe, contextlib.suppress(PermissionError):
            probe.bind(("127.0.0.1", 1))
            pytest.skip("any user may take any port here")
        with pytest.raises(ValueError, match=r"^process 0 cannot listen at port 1 \(Permission denied\); set another"):
            _gather(1, 2, 30)
    finally:
        os.seteuid(0)


def test_the_port_is_kept_for_jax(port):
    """From the meeting until jax's service listens: jax ends from C++ code where the port is taken."""
    other = _Thread(_report, port, 1, 2)
    with meeting.gather(Place(f"127.0.0.1:{port}", 2, 0, []), 30):
        assert other.result() == "127.0.0.1"
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port))
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("0.0.0.0", port))
        with socket.socket() as shared:  # as gRPC does it
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            shared.bind(("127.0.0.1", port))
            shared.listen()
            assert _open(port, *PLACES[:2]) == ["127.0.0.1"]
    socket.create_server(("127.0.0.1", port)).close()


def test_a_port_that_is_taken_in_between_ends_all(port, monkeypatch):
    def taken(places, port):
        with socket.create_server((places[0], port)):
            return real(places, port)

    real = addresses.hold
    monkeypatch.setattr(addresses, "hold", taken)
    other = _Thread(_report, port, 1, 2)
    error = _Thread(_gather, port, 2, 30).result()
    assert isinstance(error, ValueError)
    assert str(error).startswith(f"process 0 cannot listen at port {port} (Address already in use); set another")
    assert str(other.result()) == str(error)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("node7:4000", ("node7", 4000)),
        ("10.1.2.3:1", ("10.1.2.3", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:4000", ("fe80::1%eth0", 4000)),
        ("run-0-0.run:3333", ("run-0-0.run", 3333)),
        ("nocolon", None),
        ("host:", None),
        (":4000", None),
        ("", None),
        ("host:abc", None),
        ("host:0", None),
        ("host:65536", None),
        ("host:99999", None),
        ("host:-1", None),
        ("host:4000 ", None),
        (" host:4000", None),
        ("host:\u0664\u0660", None),
        ("::1:4000", None),
        ("[::1]", None),
        ("[node]:4000", None),
        ("http://host:4000", None),
        ("host:4000\n", None),
    ],
)
def test_an_address_is_a_host_and_a_port(text, found):
    if found is None:
        with pytest.raises(
            ValueError, match=rf"^--it is {re.escape(repr(text))}; legal: HOST:PORT .* 1 to 65535; IPv6"
        ):
            addresses.split(text, "--it")
    else:
        assert addresses.split(text, "--it") == found
        assert addresses.join(*found) == text

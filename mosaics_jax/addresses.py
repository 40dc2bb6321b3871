"""Where process 0 listens, and where the others find it."""

import errno
import ipaddress
import re
import socket
import time

LOOPBACK = ("127.0.0.1", "::1")
EVERYWHERE = ("0.0.0.0", "::")

_PAUSE = 0.2  # seconds between two attempts
_LEGAL = "legal: HOST:PORT of process 0, the port from 1 to 65535; IPv6 as [ADDRESS]:PORT"


def split(text: str, what: str) -> tuple[str, int]:
    """The host and the port of HOST:PORT. ValueError, which begins with `what` and the text, where it is none."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:/@\[\]]+)):([0-9]{1,5})", text)
    if not found or not 0 < int(found[3]) < 1 << 16:
        raise ValueError(f"{what} is {text!r}; {_LEGAL}")
    return found[1] or found[2], int(found[3])


def join(host: str, port: int) -> str:
    """HOST:PORT, or [ADDRESS]:PORT."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def call(host: str, port: int, seconds: float) -> socket.socket:
    """A connection with whichever of the host's addresses answers first, asked one after the other. OSError if none."""
    addresses, refusal = _resolve(host), OSError("the name has no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), seconds)
        except OSError as error:
            refusal = error
    raise refusal


def listen(host: str, port: int, deadline: float, backlog: int) -> list[socket.socket]:
    """Listens at the addresses of `host`; on all interfaces only where it is a name that stands for none of them here.

    That of a Kubernetes service does, or of a router that translates, and so does the name that a system has for itself
    at a loopback address. What was told localhost or an address of the loopback is reached from this machine alone.
    Raises ValueError where the name does not resolve before the deadline, and where the port cannot be had.
    """
    while True:
        try:
            addresses = _resolve(host)
            break
        except OSError as error:
            if time.monotonic() + _PAUSE > deadline:
                raise ValueError(f"{host!r}, where process 0 is to be, does not resolve ({error})") from error
            time.sleep(_PAUSE)
    if not _is_own_word(host):
        addresses = [address for address in addresses if not is_loopback(address)]
    servers = _all(addresses, port, backlog)
    if not servers and not any(map(is_loopback, addresses)):
        servers = _all(list(EVERYWHERE), port, backlog)
    if not servers:
        raise ValueError(f"this machine has no address {' nor '.join(addresses)}, where process 0 is to listen")
    return servers


def hold(addresses: list[str], port: int) -> list[socket.socket]:
    """Keeps a port from other programs without listening there; sockets of gRPC, which say that they share, get it."""
    return _all(addresses, port, None)


def _resolve(host: str) -> list[str]:
    """The numeric addresses of a host. Of localhost always both, so that all processes try the same ones in turn."""
    if host.lower() == "localhost":
        return list(LOOPBACK)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"no name of a host: {error}") from error
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def _is_own_word(host: str) -> bool:
    """Whether it means the same everywhere: localhost, or an address in numbers."""
    try:
        return host.lower() == "localhost" or bool(socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST))
    except OSError:
        return False


def _all(addresses: list[str], port: int, backlog: int | None) -> list[socket.socket]:
    """Sockets at those of the addresses that are this machine's."""
    sockets: list[socket.socket] = []
    for address in addresses:
        try:
            sockets.append(_at(address, port, backlog))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            for one in sockets:
                one.close()
            raise ValueError(
                f"process 0 cannot listen at port {port} ({error.strerror}); set another from 1024 to 65535, the same "
                "for all processes: MOSAICS_PORT for Slurm and Open MPI, else that of --coordinator or "
                "MOSAICS_COORDINATOR"
            ) from error
    return sockets


def _at(address: str, port: int, backlog: int | None) -> socket.socket:
    """One that listens; with a backlog of None, one that holds the port."""
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended are in nobody's way
        if one.family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if backlog is None:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind((address, port))
        if backlog is None:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # or others could listen where this does not
        else:
            one.listen(backlog)
    except BaseException:
        one.close()
        raise
    return one

"""Addresses to listen on: bound first, so that a port in use is reported at once, and answered after loading."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator, Sequence

from dilaserve.errors import ConfigError

TAKEN = {errno.EADDRINUSE, errno.EACCES}  # what another port may cure
ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}  # an address, or a family, that this machine does not have
TRIES = 16  # free ports to try until one is free on every address
WILDCARD = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


def names(host: str) -> list[str]:
    """The hosts of a comma-separated list, each once; brackets around an IPv6 address are dropped."""
    found = [name.strip().removeprefix("[").removesuffix("]") for name in host.split(",")]
    if not all(found):
        raise ConfigError(f"--host {host!r} has an empty name; give addresses such as 127.0.0.1 or ::", param="host")
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """One socket for each address of these hosts, all on one port, closed at the end.

    Connections are refused until somebody listens on them. Port 0 takes a port that is free on all addresses. Raises
    `ConfigError`.
    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(one)) for one in bind_all(names(host), port)]


def bind_all(hosts: Sequence[str], port: int) -> list[socket.socket]:
    for _ in range(TRIES if port == 0 else 1):
        sockets: list[socket.socket] = []
        try:
            for host in hosts:
                sockets += bind_host(host, sockets[0].getsockname()[1] if sockets else port, hosts)
            return sockets
        except ConfigError as error:
            failure = error
            for one in sockets:
                one.close()
    raise failure


def bind_host(host: str, port: int, hosts: Sequence[str]) -> list[socket.socket]:
    """The sockets of one host; a name such as localhost may have several addresses, of which one must be here."""
    found: list[socket.socket] = []
    missing: ConfigError | None = None
    for family, address in addresses(host, port):
        port = found[0].getsockname()[1] if found else port
        try:
            found.append(bind(family, (address[0], port, *address[2:]), hosts))
        except OSError as error:
            missing = refusal(host, port, error)
            if error.errno not in ABSENT:
                for one in found:
                    one.close()
                raise missing from error
    if not found and missing:
        raise missing
    return found


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int, int, int] | tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise refusal(host, port, error) from error
    except UnicodeError as error:
        raise ConfigError(f"--host {host!r} is not a name: {error}") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))  # type: ignore[misc]


def bind(family: socket.AddressFamily, address: tuple[object, ...], hosts: Sequence[str]) -> socket.socket:
    """First without SO_REUSEADDR, so that a second server finds the port taken before this one listens; where old
    connections still hold the port, with it.
    """
    try:
        return bind_once(family, address, hosts, reuse=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    return bind_once(family, address, hosts, reuse=True)


def bind_once(
    family: socket.AddressFamily, address: tuple[object, ...], hosts: Sequence[str], reuse: bool
) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        if family == socket.AF_INET6:
            both = address[0] == WILDCARD[socket.AF_INET6] and WILDCARD[socket.AF_INET] not in hosts
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)  # :: alone answers IPv4 too
        one.bind(address)
    except BaseException:
        one.close()
        raise
    return one


def inheritable(one: socket.socket) -> socket.socket:
    """Just before a socket listens: its connections inherit SO_REUSEADDR, and do not hold the port after their end."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
    return one


def refusal(host: str, port: int, error: OSError) -> ConfigError:
    cure = "choose another --port" if error.errno in TAKEN else "is --host an address of this machine?"
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror  # of names: below 0
    return ConfigError(f"cannot listen on {host}:{port}: {reason}; {cure}")


def url(one: socket.socket, encrypted: bool = False) -> str:
    """Where a socket is reached."""
    host, port = one.getsockname()[:2]
    return url_of(host, port, encrypted)


def url_of(host: str, port: int, encrypted: bool = False) -> str:
    return f"http{'s' if encrypted else ''}://{f'[{host}]' if ':' in host else host}:{port}"

"""How this machine reaches the first one of a run.

Owns the questions to the network: whether the main address can be resolved and reached, over which interface, and
whether torch's libraries would choose another one by themselves. Imports no torch.

[Note: names] The system looks names up for as long as its own time limits add up to, half a minute and more where a
name server is silent, and no signal gets through meanwhile. So it is asked in a thread that is not waited for longer
than wanted.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..core.errors import LaunchError, explain
from .greeting import greet

UNREACHABLE_SECONDS = 20
"""How long an address may stay unknown or unreachable before that is an error; names of pods appear late."""
_ATTEMPT_SECONDS = 5
_ROUTE_SECONDS = 5
"""How long a name may take that is only asked for to choose an interface."""
_ARRIVAL_SECONDS = 2
_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS = 0.5, 0.02
_NOTE_SECONDS = 15

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""What leads gloo and NCCL to a network."""


@dataclass(frozen=True)
class Route:
    """The way from this machine to the first one."""

    address: str | None
    """The address of this machine that the others see; `None` if it cannot be told."""
    interface: str | None = None
    """The network interface that leads there."""
    name_address: str | None = None
    """What this machine's own name resolves to: where gloo listens if nobody tells it an interface."""
    interfaces: tuple[str, ...] = ()
    """All interfaces that are up and have an address, but for the loopback."""

    def variables(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that lead gloo and NCCL to this interface, where they would choose another one."""
        if self.interface is None:
            return {}
        chosen: dict[str, str] = {}
        if self.name_address is None or self.name_address != self.address:
            chosen["GLOO_SOCKET_IFNAME"] = self.interface
        if _first_choice(self.interfaces) not in (self.interface, None):
            chosen["NCCL_SOCKET_IFNAME"] = self.interface
        return {name: value for name, value in chosen.items() if not environ.get(name)}


def _first_choice(interfaces: tuple[str, ...]) -> str | None:
    """Return what NCCL would take; `None` for InfiniBand, a fast network of its own that is not ours to change."""
    if any(name.startswith("ib") for name in interfaces):
        return None
    return next((name for name in interfaces if not name.startswith("docker")), None)


def route_to(host: str, port: int) -> Route | None:
    """Find out by which address and interface this machine reaches `host`; `None` if it cannot tell.

    Sends nothing to it. Blocks while names are looked up.
    """
    try:
        family, kind, protocol, _, target = _look_up(host, port, _ROUTE_SECONDS, socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            address = str(probe.getsockname()[0])
    except OSError:
        return None
    if _is_loopback(host):
        return None  # all machines of this run are this one
    return choose_interface(address, _addresses(), _own_name_address())


def choose_interface(address: str, addresses: Mapping[str, Sequence[str]], name_address: str | None) -> Route:
    """Choose the interface that has `address`.

    Args:
        address: From where this machine would send to the first one. The loopback on the first machine itself, where
            its own name often stands for that: then the only other interface is meant, if there is only one.
        addresses: Interface -> its addresses, of those that are up.
        name_address: What this machine's own name resolves to.
    """
    others = {name: items for name, items in addresses.items() if not any(map(_is_loopback, items))}
    if not _is_loopback(address):
        interface = next((name for name, items in others.items() if address in items), None)
        return Route(address, interface, name_address, tuple(others))
    interface = next(iter(others)) if len(others) == 1 else None
    return Route(None, interface, name_address, tuple(others))


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "localhost")


def _addresses() -> dict[str, list[str]]:
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    # An address of a single link carries its name behind a percent sign, and nobody is reached by it from elsewhere.
    found = {
        name: [item.address for item in items if item.family in families and "%" not in item.address]
        for name, items in psutil.net_if_addrs().items()
        if name in up
    }
    return {name: items for name, items in found.items() if items}


def _own_name_address() -> str | None:
    try:
        return str(_look_up(socket.gethostname(), None, _ROUTE_SECONDS)[0][4][0])
    except OSError:
        return None


class _NameError(OSError):
    """A name is not known, or nobody says so."""


def _look_up(host: str, port: int | None, seconds: float, kind: int = socket.SOCK_STREAM) -> list[Any]:
    """Return what a name stands for, as `socket.getaddrinfo` does. See [Note: names].

    Raises:
        _NameError: If it is unknown, or nothing has been heard of it in time.
    """
    found: list[Any] = []
    problems: list[str] = []

    def ask() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=kind))
        except (OSError, UnicodeError) as error:  # a label of more than 63 letters is the latter
            problems.append(str(getattr(error, "strerror", None) or error))

    asking = threading.Thread(target=ask, name="accelerate-look-up", daemon=True)
    asking.start()
    asking.join(seconds)
    if not found:
        problem = problems[0] if problems else "no name server answers"
        raise _NameError(None, f"the name cannot be resolved ({problem})")
    return found


def wait_until_resolvable(host: str, port: int, described: str) -> None:
    """Wait until the name of the first machine, which is this one, is known; for at most 20 seconds.

    Raises:
        LaunchError: If it stays unknown.
    """
    began = time.monotonic()
    while True:
        left = began + UNREACHABLE_SECONDS - time.monotonic()
        try:
            _look_up(host, port, max(left, _PAUSE_SECONDS))
        except _NameError as error:
            seconds = time.monotonic() - began
            if seconds >= UNREACHABLE_SECONDS:
                raise _not_reached(host, port, described, str(error.strerror), round(seconds)) from None
        else:
            return
        time.sleep(_PAUSE_SECONDS)


def wait_until_own(host: str, port: int, described: str, *, may_be_served: bool = False) -> None:
    """Check that the address of the first machine leads to this one, which it is; wait for that at most 20 seconds.

    Listens on the port for the moment. Whatever the address passes on its way here, the others may come by it too.

    Args:
        host: Where the others will look for this machine.
        port: The same.
        described: The address with its origin, for errors.
        may_be_served: Whether this process itself may listen there already: torch lets it have one store for all.

    Raises:
        LaunchError: If it leads elsewhere or nowhere, or if the port stays taken.
    """
    began = time.monotonic()
    while True:
        deadline = began + UNREACHABLE_SECONDS
        try:
            with _listening(port) as server:
                found = _attempt(host, port, deadline, server)
        except OSError as error:
            found = _Found(
                f"port {port} cannot be listened on here: {os.strerror(error.errno or 0)}",
                is_other=error.errno == errno.EADDRINUSE,
                is_barred=error.errno == errno.EACCES,
            )
            if may_be_served and _listens(port):
                return
        if found.problem is None:
            return
        seconds = time.monotonic() - began
        if seconds >= UNREACHABLE_SECONDS:
            raise _leads_elsewhere(host, port, described, found, round(seconds))
        time.sleep(_PAUSE_SECONDS)


def _listens(port: int) -> bool:
    """Tell whether this process listens on a port."""
    import psutil

    here = psutil.Process().net_connections(kind="tcp")
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in here)


def _listening(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def wait_until_reachable(
    host: str,
    port: int,
    described: str,
    limit_seconds: float,
    *,
    speaker: str = "accelerate launch",
    may_be_free: bool = False,
) -> None:
    """Wait until the first machine serves torch's store.

    Machines start at different times: a refused connection means that the machine is there, and its launcher not yet.

    Args:
        host: Its address or name.
        port: Where it will listen.
        described: The address with its origin, for errors.
        limit_seconds: How long to wait for its launcher.
        speaker: Who says so while it waits; nobody if empty.
        may_be_free: Whether nobody need listen: the port is on this machine, and may become this process's.

    Raises:
        LaunchError: If for 20 seconds the name stays unknown, or the address unreachable, or another program answers
            there; or if nobody listens in time.
    """
    began = reached = noted = time.monotonic()
    pause = _FIRST_PAUSE_SECONDS
    while True:
        found = _attempt(host, port, reached + UNREACHABLE_SECONDS)
        if found.problem is None or (may_be_free and found.is_free):
            return
        now = time.monotonic()
        reached = now if found.is_there else reached
        if now - reached >= UNREACHABLE_SECONDS or now - began >= limit_seconds:
            raise _not_reached(host, port, described, found.problem, round(now - began), found.is_other)
        if speaker and now - noted >= _NOTE_SECONDS:
            noted = now
            print(f"{speaker}: waiting for the first machine at {host}:{port} ({found.problem})", file=sys.stderr)
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE_SECONDS)


@dataclass(frozen=True)
class _Found:
    """What one attempt to reach the first machine has found."""

    problem: str | None = None
    """What stands in the way, if anything does."""
    is_there: bool = False
    """Whether the machine itself has answered, and what is missing may yet come."""
    is_free: bool = False
    """Whether nobody listens."""
    is_other: bool = False
    """Whether another program does."""
    is_barred: bool = False
    """Whether the system keeps the port for others."""


def _attempt(host: str, port: int, until: float, server: socket.socket | None = None) -> _Found:
    """Try to reach the first machine.

    Args:
        host: Where to go.
        port: The same.
        until: When to give up, by the monotonic clock, if that is sooner than usual.
        server: Where the connection must arrive, if it is this machine; otherwise torch's store must answer.
    """
    seconds = min(_ATTEMPT_SECONDS, max(_PAUSE_SECONDS, until - time.monotonic()))
    try:
        with _connected(host, port, seconds) as connection:
            if server is not None:
                return _Found(None if _arrives(connection, server) else "another program answers there")
            reply = greet(connection, seconds)
            if reply.is_store:
                return _Found()
            return _Found(reply.problem, is_there=reply.may_change, is_other=True)
    except ConnectionRefusedError:
        if server is None:
            return _Found("nobody listens there yet", is_there=True, is_free=True)
        return _Found("another machine, or a firewall, refuses")
    except _NameError as error:
        return _Found(error.strerror)
    except TimeoutError:
        return _Found("no answer")
    except OSError as error:
        known = errno.errorcode.get(error.errno or 0, "")
        return _Found(f"{error.strerror or error} ({known})" if known else str(error))


def _connected(host: str, port: int, seconds: float) -> socket.socket:
    """Connect to the first of a name's addresses that accepts, as `socket.create_connection` does."""
    found = _look_up(host, port, seconds)
    problem: OSError | None = None
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(max(seconds / len(found), _PAUSE_SECONDS))
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            problem = error
        else:
            return connection
    assert problem is not None
    raise problem


def _arrives(connection: socket.socket, server: socket.socket) -> bool:
    """Tell whether a connection is one of those that a server has got. Others may come in between."""
    word = os.urandom(16)
    connection.sendall(word)
    server.settimeout(_ARRIVAL_SECONDS)
    while True:
        try:
            arrived, _ = server.accept()
        except TimeoutError:
            return False
        with arrived, suppress(OSError):
            arrived.settimeout(_ARRIVAL_SECONDS)
            if arrived.recv(len(word)) == word:
                return True


def _not_reached(
    host: str, port: int, described: str, problem: str, seconds: int, is_other: bool = False
) -> LaunchError:
    told = f" {described}." if described else ""
    remedy = f"Check it from here with `getent hosts {host}` and `nc -zv {host} {port}`, and that machine 0 runs."
    if is_other:
        remedy = (
            f"Look on machine 0 what listens there (`ss -ltnp`), and choose another port than {port} on all machines."
        )
    return LaunchError(
        explain(
            f"The first machine cannot be reached at {host}:{port}, tried for {seconds} s: {problem}.{told}",
            accepted="an address or host name of machine 0 that this machine reaches, and a port that no other program uses",
            remedy=remedy,
        )
    )


def _leads_elsewhere(host: str, port: int, described: str, found: _Found, seconds: int) -> LaunchError:
    told = f" {described}." if described else ""
    remedy = "Correct the address on all machines, or start machine 0 where it leads."
    if found.is_other:
        remedy = f"Look what listens here (`ss -ltnp`), and end it or choose another port than {port} on all machines."
    elif found.is_barred:
        remedy = "Choose a port of 1024 or more on all machines."
    own = ", ".join(address for items in _addresses().values() for address in items if not _is_loopback(address))
    return LaunchError(
        explain(
            f"This is machine 0, and {host}:{port}, where the others will look for it, does not lead here, tried for "
            f"{seconds} s: {found.problem}.{told}",
            accepted=f"an address or host name of this machine{own and f' ({own})'}, and a free port",
            remedy=remedy,
        )
    )

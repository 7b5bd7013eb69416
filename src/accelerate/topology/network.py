"""How this machine reaches the first one of a run.

Owns the questions to the network: whether the main address can be resolved and reached, over which interface, and
whether torch's libraries would choose another one by themselves. Imports no torch.
"""

from __future__ import annotations

import errno
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..core.errors import LaunchError, explain

UNREACHABLE_SECONDS = 20
"""How long an address may stay unknown or unreachable before that is an error; names of pods appear late."""
_ATTEMPT_SECONDS = 5
_ARRIVAL_SECONDS = 2
_PAUSE_SECONDS = 0.5
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
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
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
        return str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except OSError:
        return None


def wait_until_resolvable(host: str, port: int, described: str) -> None:
    """Wait until the name of the first machine, which is this one, is known; for at most 20 seconds.

    Raises:
        LaunchError: If it stays unknown.
    """
    began = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host, port)
        except OSError as error:
            seconds = time.monotonic() - began
            if seconds >= UNREACHABLE_SECONDS:
                raise _not_reached(host, port, described, _unknown(error), round(seconds)) from None
        else:
            return
        time.sleep(_PAUSE_SECONDS)


def wait_until_own(host: str, port: int, described: str) -> None:
    """Check that the address of the first machine leads to this one, which it is; wait for that at most 20 seconds.

    Listens on the port for the moment. Whatever the address passes on its way here, the others may come by it too.

    Raises:
        LaunchError: If it leads elsewhere or nowhere, or if the port stays taken.
    """
    began = time.monotonic()
    while True:
        try:
            with _listening(port) as server:
                problem, _ = _attempt(host, port, began + UNREACHABLE_SECONDS, server)
        except OSError as error:
            problem = f"port {port} cannot be listened on here: {error.strerror}"
        if problem is None:
            return
        seconds = time.monotonic() - began
        if seconds >= UNREACHABLE_SECONDS:
            raise _leads_elsewhere(host, port, described, problem, round(seconds))
        time.sleep(_PAUSE_SECONDS)


def _listening(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def wait_until_reachable(host: str, port: int, described: str, limit_seconds: float) -> None:
    """Wait until the first machine listens.

    Machines start at different times: a refused connection means that the machine is there, and its launcher not yet.

    Args:
        host: Its address or name.
        port: Where it will listen.
        described: The address with its origin, for errors.
        limit_seconds: How long to wait for its launcher.

    Raises:
        LaunchError: If the name stays unknown or the address unreachable for 20 seconds, or nobody listens in time.
    """
    began = reached = noted = time.monotonic()
    while True:
        problem, is_there = _attempt(host, port, reached + UNREACHABLE_SECONDS)
        if problem is None:
            return
        now = time.monotonic()
        reached = now if is_there else reached
        if now - reached >= UNREACHABLE_SECONDS or now - began >= limit_seconds:
            raise _not_reached(host, port, described, problem, round(now - began))
        if now - noted >= _NOTE_SECONDS:
            noted = now
            print(f"accelerate launch: waiting for the first machine at {host}:{port} ({problem})", file=sys.stderr)
        time.sleep(_PAUSE_SECONDS)


def _attempt(host: str, port: int, until: float, server: socket.socket | None = None) -> tuple[str | None, bool]:
    """Return what stands in the way, if anything does, and whether the machine itself has answered.

    Args:
        host: Where to go.
        port: The same.
        until: When to give up, by the monotonic clock, if that is sooner than usual.
        server: Where the connection must arrive, if that is known.
    """
    seconds = min(_ATTEMPT_SECONDS, max(_PAUSE_SECONDS, until - time.monotonic()))
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            if server is not None and not _arrives(connection, server):
                return "another program answers there", True
            return None, True
    except ConnectionRefusedError:
        return "nobody listens there yet" if server is None else "another machine, or a firewall, refuses", True
    except socket.gaierror as error:
        return _unknown(error), False
    except TimeoutError:
        return "no answer", False
    except OSError as error:
        known = errno.errorcode.get(error.errno or 0, "")
        return f"{error.strerror or error} ({known})" if known else str(error), False


def _arrives(connection: socket.socket, server: socket.socket) -> bool:
    """Tell whether a connection is one of those that a server has got. Others may come in between."""
    word = secrets.token_bytes(16)
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


def _unknown(error: OSError) -> str:
    return f"the name cannot be resolved ({error.strerror})"


def _not_reached(host: str, port: int, described: str, problem: str, seconds: int) -> LaunchError:
    told = f" {described}." if described else ""
    return LaunchError(
        explain(
            f"The first machine cannot be reached at {host}:{port}, tried for {seconds} s: {problem}.{told}",
            accepted="an address or host name of machine 0 that this machine reaches",
            remedy=f"Check it from here with `getent hosts {host}` and `nc -zv {host} {port}`, and that machine 0 runs.",
        )
    )


def _leads_elsewhere(host: str, port: int, described: str, problem: str, seconds: int) -> LaunchError:
    told = f" {described}." if described else ""
    own = ", ".join(address for items in _addresses().values() for address in items if not _is_loopback(address))
    return LaunchError(
        explain(
            f"This is machine 0, and {host}:{port}, where the others will look for it, does not lead here, tried for "
            f"{seconds} s: {problem}.{told}",
            accepted=f"an address or host name of this machine{own and f' ({own})'}, and a free port",
            remedy="Correct the address on all machines, or start machine 0 where it leads.",
        )
    )

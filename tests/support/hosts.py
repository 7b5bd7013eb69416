"""Two hosts on one machine: network namespaces with a wire between them, and host names of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


def missing() -> str | None:
    """Say what this machine lacks for it, if it lacks something."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces are made by root on Linux"
    lacking = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (iproute2, util-linux)"
    name = f"probe{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    """Its host name. On itself it stands for 127.0.1.1, as on many installed systems."""
    space: str
    address: str

    def start(self, *command: str, environ: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a program there, in a process group of its own."""
        inside = f'hostname {self.name} && exec "$@"'
        with log.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c", inside, "sh", *command],
                cwd=log.parent,
                env={**environ, "TMPDIR": str(log.parent)},  # the guards fall too, and leave their folders behind
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @contextmanager
    def asking_for_names(self, server: Host) -> Iterator[None]:
        """Let what is started meanwhile ask a server for the names that no file knows."""
        file = Path("/etc/netns") / self.space / "resolv.conf"
        file.write_text(f"nameserver {server.address}\n")
        try:
            yield
        finally:
            file.unlink()

    def processes(self) -> list[int]:
        """Return the ids of all processes that run there."""
        told = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True, check=False)
        return [int(word) for word in told.stdout.split()]

    def fall(self) -> None:
        """Let everything that runs there end at once, as if the power had gone."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make them, and take all that is left of them away on exit."""
    mark = secrets.token_hex(3)
    pair = tuple(Host(f"host{number}", f"acc{mark}n{number}", f"10.77.0.{number}") for number in (1, 2))
    try:
        for host in pair:
            folder = Path("/etc/netns") / host.space
            folder.mkdir(parents=True)
            lines = [f"{'127.0.1.1' if other is host else other.address} {other.name}" for other in pair]
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
            _ip("netns", "add", host.space)
            _ip("-n", host.space, "link", "set", "lo", "up")
        first, second = (host.space for host in pair)
        _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for host in pair:
            _ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.space, "link", "set", "eth0", "up")
        yield pair
    finally:
        for host in pair:
            host.fall()
            subprocess.run(["ip", "netns", "del", host.space], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / host.space, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)

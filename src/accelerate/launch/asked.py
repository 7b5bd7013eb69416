"""What a call of `notebook_launcher` asks for.

Owns the check of its arguments, their translation into a `LaunchRequest`, and what the user is told about arguments
that change nothing. Pure; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ..core import engines
from ..core.enums import PrecisionType
from ..core.errors import SettingError, WrongTypeError, explain
from ..core.text import is_host
from ..settings import origins
from ..settings.arguments import PRECISION_VARIABLE
from ..settings.options.absent import refuse
from . import registry, torchrun
from .request import MOST, LaunchRequest


class Default(str):
    """A default that can be told from the same text, said by the caller."""

    __slots__ = ()


NO_PRECISION, ANY_PORT, THIS_MACHINE = Default("no"), Default("29500"), Default("127.0.0.1")
NO_NAME, FIXED = Default("none"), Default("static")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments that say how many processes there are and where they meet, by their names in the call."""

    num_processes: int
    mixed_precision: str = NO_PRECISION
    use_port: str | int = ANY_PORT
    master_addr: str = THIS_MACHINE
    node_rank: int = 0
    num_nodes: int = 1
    rdzv_backend: str = FIXED
    rdzv_endpoint: str = ""
    rdzv_conf: Mapping[str, Any] | None = None
    rdzv_id: str = NO_NAME
    max_restarts: int = 0
    monitor_interval: float = 0.1

    def __post_init__(self) -> None:
        """Refuse wrong values, before anything starts."""
        for name in ("mixed_precision", "master_addr", "rdzv_backend", "rdzv_endpoint", "rdzv_id"):
            _check_text(name, getattr(self, name))
        _check_number("num_processes", self.num_processes, 1)
        _check_number("num_nodes", self.num_nodes, 1)
        _check_number("node_rank", self.node_rank, 0)
        _check_number("max_restarts", self.max_restarts, 0)
        _check_number("monitor_interval", self.monitor_interval, 0.001, whole=False)
        if self.node_rank >= self.num_nodes:
            accepted = f"0 to {self.num_nodes - 1}, as num_nodes={self.num_nodes}"
            raise wrong("node_rank", self.node_rank, accepted, "Count machines from 0.")
        if not isinstance(self.rdzv_conf, (Mapping, type(None))):
            raise _wrong_type("rdzv_conf", self.rdzv_conf, "a dictionary")
        self._meeting()
        if not isinstance(self.mixed_precision, Default):
            _precision(self.mixed_precision)

    def variables(self, environ: Mapping[str, str], chosen: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return what the processes get beyond `environ`, and what is to be known about it.

        Args:
            environ: The environment of the call.
            chosen: Variables that the launcher sets by itself. The precision is added, if the call names one.
        """
        behind: dict[str, tuple[str, str | None]] = {
            name: (value, None) for name, value in (chosen or {}).items() if environ.get(name) != value
        }
        if not isinstance(self.mixed_precision, Default):
            behind[PRECISION_VARIABLE] = (_precision(self.mixed_precision), "from the argument mixed_precision")
        if not behind:
            return {}
        values = {name: value for name, (value, _) in behind.items()}
        return {**values, origins.VARIABLE: origins.added(environ, behind)}

    def request(self) -> LaunchRequest:
        """Return this in the words of a launch."""
        host, port = self._meeting()
        given = {
            "num_machines": "num_nodes",
            "machine_rank": "node_rank",
            "main_process_ip": "rdzv_endpoint" if self.rdzv_endpoint else "master_addr",
            "main_process_port": "rdzv_endpoint" if self.rdzv_endpoint else "use_port",
            "rdzv_conf": "rdzv_conf",
            "rdzv_backend": "rdzv_backend",
        }
        return LaunchRequest(
            script="",
            num_processes=self.num_processes * self.num_nodes,
            num_machines=self.num_nodes,
            machine_rank=self.node_rank,
            main_process_ip=host,
            main_process_port=port,
            run_id=None if isinstance(self.rdzv_id, Default) else self.rdzv_id,
            rdzv_backend=str(self.rdzv_backend),
            rdzv_conf=dict(self.rdzv_conf or {}),
            max_restarts=self.max_restarts,
            monitor_interval=self.monitor_interval,
            origins={name: f"the argument {argument}" for name, argument in given.items()},
        )

    def without_use(self, *, in_place: bool) -> list[str]:
        """Say which arguments change nothing: nobody is left to believe that they do.

        Args:
            in_place: Whether the function runs in this very process.
        """
        if self.num_nodes > 1:
            return []
        port_counts = self._names_port() and not in_place
        near = {
            "master_addr": not isinstance(self.master_addr, Default),
            "rdzv_backend": self.rdzv_backend != FIXED,
            "rdzv_endpoint": bool(self.rdzv_endpoint) and not port_counts,
            "rdzv_conf": bool(self.rdzv_conf),
        }
        alone = {
            **near,
            "max_restarts": self.max_restarts > 0,
            "rdzv_backend": not isinstance(self.rdzv_backend, Default),
            "rdzv_id": not isinstance(self.rdzv_id, Default),
            "use_port": not isinstance(self.use_port, Default),
        }
        if in_place:
            return [self._useless(name, "the function runs right here") for name, given in alone.items() if given]
        if not self._is_own:
            return []
        told = [self._useless(name, "all processes are on this machine") for name, given in near.items() if given]
        if port_counts:
            about = f"rdzv_endpoint={self.rdzv_endpoint!r} (the argument)"
            told.append(f"{about} gives the port only: all processes are on this machine.")
        return told

    def _useless(self, name: str, why: str) -> str:
        return f"{name}={getattr(self, name)!r} (the argument) has no use: {why}."

    @property
    def _is_own(self) -> bool:
        """Whether the processes meet in one of our ways, which needs no address on a single machine."""
        return self.rdzv_backend in registry.OWN_BACKENDS

    def _names_port(self) -> bool:
        return bool(self.rdzv_endpoint) and "main_process_port" in self._endpoint()

    def _endpoint(self) -> dict[str, Any]:
        found = torchrun.in_our_words({"rdzv_endpoint": (self.rdzv_endpoint, "the argument")})
        return {name: value for name, (value, _) in found.items()}

    def _meeting(self) -> tuple[str, int | None]:
        """Return where the machines meet: host, and port if it matters."""
        port = _port("use_port", self.use_port)
        if not self.rdzv_endpoint:
            _check_host("master_addr", self.master_addr, self.master_addr)
            if self.num_nodes == 1 and self._is_own:
                return "localhost", None if isinstance(self.use_port, Default) else port
            if port == 0:
                raise wrong(
                    "use_port", self.use_port, "1 to 65535, the same on all machines", "Leave it out for 29500."
                )
            return self.master_addr, port
        found = self._endpoint()
        host, port = found["main_process_ip"], found.get("main_process_port", port)
        _check_host("rdzv_endpoint", self.rdzv_endpoint, host)
        _port("rdzv_endpoint", self.rdzv_endpoint, port)
        for name, other in (("master_addr", host), ("use_port", port)):
            asked = getattr(self, name)
            if not isinstance(asked, Default) and str(asked) != str(other):
                raise SettingError(
                    explain(
                        f"rdzv_endpoint={self.rdzv_endpoint!r} contradicts {name}={asked!r} (the arguments).",
                        remedy="Leave one of the two out.",
                    )
                )
        return host, port


def check_call(function: object, arguments: object, template: object = None) -> None:
    """Refuse what cannot be called so, before anything starts.

    Raises:
        WrongTypeError: (a `TypeError`) that names the argument.
    """
    if not callable(function):
        raise _wrong_type("function", function, "a function, without the brackets that call it")
    if isinstance(arguments, (str, bytes)) or not isinstance(arguments, Iterable):
        raise _wrong_type("args", arguments, "a list or tuple; for a single argument x it is (x,)")
    if template is not None:
        _check_text("log_line_prefix_template", template)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "a text")


def _check_host(name: str, value: str, host: str) -> None:
    if not is_host(host):
        raise wrong(name, value, "an address or a host name", f"Correct {name}.", "is no address")


def _check_number(name: str, value: object, least: float, *, whole: bool = True) -> None:
    """Refuse what is no number, or a number below `least`.

    Raises:
        WrongTypeError: (a `TypeError`) for something that is no number.
        SettingError: (a `ValueError`) for one that is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise _wrong_type(name, value, "a whole number" if whole else "a number")
    if not least <= value <= MOST:  # pyright: ignore[reportOperatorIssue]
        raise wrong(name, value, f"{least} to {MOST}", f"Pass another {name}.")


def wrong(name: str, value: object, accepted: str, remedy: str, problem: str = "cannot be used") -> SettingError:
    """Return the error for an argument with a wrong value."""
    return SettingError(explain(f"{name}={value!r} (the argument) {problem}.", accepted=accepted, remedy=remedy))


def _wrong_type(name: str, value: object, accepted: str) -> WrongTypeError:
    problem = f"{name}={value!r} (the argument) is a {type(value).__name__}."
    return WrongTypeError(explain(problem, accepted=accepted, remedy=f"Pass another {name}."))


def _precision(value: str) -> str:
    name = str(value).lower()
    if name not in PrecisionType:
        raise wrong("mixed_precision", value, ", ".join(PrecisionType.list()), "Pass 'no' for plain fp32.")
    if name == PrecisionType.FP8:
        refuse("mixed_precision='fp8' (the argument)", engines.FP8)
    return name


def _port(name: str, value: object, port: object | None = None) -> int:
    """Read a port: that of the argument `name`, or a part of it.

    Raises:
        WrongTypeError: (a `TypeError`) for what is neither a number nor its text.
        SettingError: (a `ValueError`) for a number that is no port.
    """
    port = value if port is None else port
    if isinstance(port, bool) or not isinstance(port, (str, Integral)):
        raise _wrong_type(name, value, "a whole number, or its text")
    text = str(port)
    if not (text.isdecimal() and len(text) < 20 and int(text) < 2**16):
        raise wrong(name, value, "a port from 0 to 65535", "Leave it out on a single machine.")
    return int(text)

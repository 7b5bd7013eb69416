"""Where the workers of one machine meet: a store that listens to this machine alone.

Torch's own ways to meet listen on all addresses, for which a run on one machine has no use and its neighbours might.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "accelerate_loopback"
ADDRESS = "127.0.0.1"
_BACKLOG = 4096
_TIMEOUT = timedelta(seconds=300)


class OneMachine(RendezvousHandler):
    """The meeting of a run whose processes are all on this machine: nobody else has to come.

    Args:
        port: Where the store listens; 0 for a free port.
        run_id: The name of the run.
    """

    def __init__(self, port: int, run_id: str) -> None:
        self._port, self._run_id = port, run_id
        self._round = 0

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        # See [Note: a store for each round] in `launch.rendezvous`. The port was for those that knew it beforehand.
        server = self._listen(0 if self._round else self._port)
        self._round += 1
        store = PrefixStore(f"{self._run_id}/{self._round}", server)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(ADDRESS, server.port))

    def _listen(self, port: int) -> TCPStore:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((ADDRESS, port))
            listening.listen(_BACKLOG)
        except OSError as error:
            listening.close()
            raise RendezvousConnectionError(f"{ADDRESS}:{port} cannot be listened on: {error.strerror}") from error
        port = listening.getsockname()[1]
        return TCPStore(
            ADDRESS,
            port,
            is_master=True,
            timeout=_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return OneMachine(int(parameters.endpoint.rpartition(":")[2] or 0), parameters.run_id)


rendezvous_handler_registry.register(BACKEND, _create)

"""How machines find each other: the way to the first one, and who has come."""

from __future__ import annotations

import errno
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters

from accelerate.core.errors import LaunchError
from accelerate.launch import rendezvous
from accelerate.launch.rendezvous import Member
from accelerate.topology import greeting, network

NODE = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.2"], "eth1": ["192.168.7.2"], "docker0": ["172.17.0.1"]}


@pytest.mark.parametrize(
    ("address", "name_address", "addresses", "expected"),
    [
        # The name stands for the network of the run, and so does NCCL's first choice: nothing to say.
        ("10.0.0.2", "10.0.0.2", NODE, {}),
        ("192.168.7.2", "10.0.0.2", NODE, {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "eth1"}),
        ("10.0.0.2", "127.0.1.1", NODE, {"GLOO_SOCKET_IFNAME": "eth0"}),
        ("10.0.0.2", None, NODE, {"GLOO_SOCKET_IFNAME": "eth0"}),
        ("192.168.7.2", "192.168.7.2", {**NODE, "ib0": ["10.9.0.2"]}, {}),
        # The first machine's own name, on itself
        ("127.0.1.1", "127.0.1.1", NODE, {}),
        ("127.0.1.1", "127.0.1.1", {"lo": NODE["lo"], "eth0": ["10.0.0.2"]}, {"GLOO_SOCKET_IFNAME": "eth0"}),
        ("10.5.5.5", "10.0.0.2", NODE, {}),
    ],
)
def test_an_interface_is_named_only_where_another_one_would_be_taken(address, name_address, addresses, expected):
    route = network.choose_interface(address, addresses, name_address)

    assert route.variables({}) == expected
    assert route.variables(dict.fromkeys(expected, "mine")) == {}
    assert route.address == (None if address.startswith("127.") else address)


def test_machines_that_are_all_this_one_need_no_interface():
    assert network.route_to("127.0.0.1", 29500) is None
    assert network.route_to("no-such-host.invalid", 29500) is None


def test_an_unknown_name_is_an_error_that_says_what_was_tried(monkeypatch):
    monkeypatch.setattr(network, "UNREACHABLE_SECONDS", 0.1)
    described = "main_process_ip=no-such-host.invalid (from --main_process_ip)"

    for wait in (network.wait_until_reachable, lambda *words: network.wait_until_resolvable(*words[:3])):
        with pytest.raises(LaunchError) as caught:
            wait("no-such-host.invalid", 29500, described, 600)
        text = str(caught.value)
        assert text.startswith("The first machine cannot be reached at no-such-host.invalid:29500, tried for ")
        assert "the name cannot be resolved" in text
        assert described in text


def test_a_machine_that_does_not_listen_yet_is_waited_for(monkeypatch, capsys):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        now = 0.0

        def pause(seconds):
            nonlocal now, store
            now += network.UNREACHABLE_SECONDS
            if now >= 100 and store is None:
                server.listen()
                store = TCPStore(
                    "127.0.0.1", port, is_master=True, master_listen_fd=server.detach(), wait_for_workers=False
                )

        store = None
        monkeypatch.setattr(network.time, "sleep", pause)
        monkeypatch.setattr(network.time, "monotonic", lambda: now)
        with pytest.raises(LaunchError, match="tried for 60 s: nobody listens there yet"):
            network.wait_until_reachable("127.0.0.1", port, "", 60)
        network.wait_until_reachable("127.0.0.1", port, "", 600)

    assert capsys.readouterr().err.count(f"waiting for the first machine at 127.0.0.1:{port}") >= 2


def test_another_program_is_given_up_after_20_seconds_and_a_proxy_is_waited_for(monkeypatch):
    now = 0.0

    def pause(seconds):
        nonlocal now
        now += 10

    monkeypatch.setattr(network.time, "sleep", pause)
    monkeypatch.setattr(network.time, "monotonic", lambda: now)
    replies = {True: "tried for 100 s: it hangs up", False: "tried for 20 s: it hangs up"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for may_change, expected in replies.items():
            now = 0.0
            reply = greeting.Reply(is_store=False, problem="it hangs up", may_change=may_change)
            monkeypatch.setattr(network, "greet", lambda connection, seconds, reply=reply: reply)
            with pytest.raises(
                LaunchError, match=f"{expected}.*\n.*\n.*choose another port than {port} on all"
            ) as caught:
                network.wait_until_reachable("127.0.0.1", port, "main_process_ip=x (from --main_process_ip)", 100)
            assert "main_process_ip=x (from --main_process_ip)" in str(caught.value)


def test_a_port_of_this_machine_may_be_free_but_not_another_programs(monkeypatch):
    monkeypatch.setattr(network, "UNREACHABLE_SECONDS", 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match="another program answers there, and says nothing"):
            network.wait_until_reachable("127.0.0.1", port, "", 600, may_be_free=True)
    network.wait_until_reachable("127.0.0.1", port, "", 600, may_be_free=True)


@pytest.mark.parametrize("numbered", [{"is_host": "0"}, {}], ids=["second", "unnumbered"])
def test_another_program_at_this_machine_by_its_short_name_is_told_too(monkeypatch, numbered):
    monkeypatch.setattr(network, "UNREACHABLE_SECONDS", 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"localhost:{server.getsockname()[1]}"
        parameters = RendezvousParameters("c10d", endpoint, "run", 2, 2, **numbered)
        # Torch's own would not come back.
        monkeypatch.setattr(rendezvous, "create_backend", lambda parameters: pytest.fail("nothing was told"))
        with pytest.raises(LaunchError, match="another program answers there, and says nothing"):
            rendezvous._create_changing(parameters)


def test_a_name_server_that_does_not_answer_is_not_waited_for_longer_than_wanted(monkeypatch):
    monkeypatch.setattr(network, "UNREACHABLE_SECONDS", 0.1)
    monkeypatch.setattr(network, "_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(network, "_ROUTE_SECONDS", 0.1)
    answered = threading.Event()
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *words, **options: [answered.wait(60)])
    try:
        for wait in (network.wait_until_reachable, lambda *words: network.wait_until_resolvable(*words[:3])):
            with pytest.raises(LaunchError, match=r"resolved \(no name server answers\)"):
                wait("train-0", 29500, "", 600)
        with pytest.raises(LaunchError, match=r"does not lead here.*resolved \(no name server answers\)"):
            network.wait_until_own("train-0", 0, "")
        assert network.route_to("train-0", 29500) is None
    finally:
        answered.set()


def test_the_first_machine_comes_by_its_own_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    for host in ("127.0.0.1", "localhost", socket.gethostname()):
        network.wait_until_own(host, port, "")


@contextmanager
def other_process_listening() -> Iterator[int]:
    """Let a store of another run have a port of this machine."""
    program = (
        "import sys; from torch.distributed import TCPStore\n"
        "store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        yield int(child.stdout.readline())
        child.stdin.close()


def test_a_first_machine_whose_port_is_taken_is_told(monkeypatch):
    monkeypatch.setattr(network, "UNREACHABLE_SECONDS", 0)
    with other_process_listening() as port:
        expected = f"This is machine 0, and 127.0.0.1:{port}, where the others will look for it, does not lead here"
        for may_be_served in (False, True):
            with pytest.raises(
                LaunchError, match=f"{expected}.*: port {port} .*here: Address already in use.\nAcc"
            ) as caught:
                network.wait_until_own("127.0.0.1", port, "", may_be_served=may_be_served)
            assert "end it or choose another port" in str(caught.value)


def test_a_store_of_this_process_may_be_at_the_address_already(monkeypatch):
    monkeypatch.setattr(network, "UNREACHABLE_SECONDS", 0)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    network.wait_until_own("127.0.0.1", store.port, "", may_be_served=True)
    with pytest.raises(LaunchError, match="cannot be listened on here"):
        network.wait_until_own("127.0.0.1", store.port, "")


def test_a_port_that_is_not_for_this_user_is_told(monkeypatch):
    def refuse(port):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(network, "UNREACHABLE_SECONDS", 0)
    monkeypatch.setattr(network, "_listening", refuse)
    with pytest.raises(
        LaunchError, match="port 80 cannot be listened on here: Perm.*\n.*\n.*Choose a port of 1024 or more"
    ):
        network.wait_until_own("127.0.0.1", 80, "")


def test_an_address_of_the_first_machine_that_leads_elsewhere_is_told(monkeypatch):
    monkeypatch.setattr(network, "UNREACHABLE_SECONDS", 0)
    monkeypatch.setattr(network, "_ARRIVAL_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_server(("127.0.0.1", 0)) as own:
        monkeypatch.setattr(network, "_listening", lambda port: own)  # as on another machine
        with pytest.raises(LaunchError, match="another program answers there. main_process_ip=x"):
            network.wait_until_own("127.0.0.1", other.getsockname()[1], "main_process_ip=x")


# --- who has come ------------------------------------------------------------------------------------------


def members(*words: str) -> list[Member]:
    return [Member(int(rank), host, 1, machines) for rank, host, machines in (word.split() for word in words)]


def test_machines_introduce_themselves_over_the_store():
    store = HashStore()
    store.set_timeout(timedelta(seconds=5))
    come = [Member(1, "a host", 7, "2"), Member(None, "b", 8, "1:2", 4, "c10d")]
    for member in come:
        member.introduce(store)

    assert Member.all(store) == come


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (Member(0, "b", 2, "2"), "Two machines say that they are machine 0: "),
        (Member(1, "b", 2, "3"), "was told that this run has"),
        (Member(1, "b", 2, "2", 4), "was told that this run has"),
        (Member(1, "b", 2, "2", 2, "c10d"), "meets the others by"),
    ],
)
def test_all_machines_hear_of_a_contradiction_at_once(second, expected):
    told = meet_in_vain((Member(0, "a", 1, "2", 2), 600), (second, 600))

    assert [expected in text for text in told] == [True, True]


def test_all_machines_hear_who_is_missing_when_the_first_one_gives_up():
    told = meet_in_vain((Member(1, "b", 2, "3"), 600), (Member(0, "a", 1, "3"), 0))

    assert ["machine 1 (b); missing: machine 2." in text for text in told] == [True, True]


def meet_in_vain(*members: tuple[Member, float]) -> list[str]:
    """Let machines meet that cannot; return what each is told."""
    store, told = HashStore(), []

    def meet(member: Member, limit_seconds: float) -> None:
        with pytest.raises(LaunchError) as caught:
            member.meet(store, limit_seconds)
        told.append(str(caught.value))

    threads = [threading.Thread(target=meet, args=member, daemon=True) for member in members]
    for count, thread in enumerate(threads, 1):
        thread.start()
        while store.add("accelerate/members", 0) < count:  # each finds those before it
            time.sleep(0.01)
    for thread in threads:
        thread.join(60)
    return told


def test_a_machine_may_be_replaced_by_another_one_in_a_run_that_has_begun():
    store = HashStore()
    for member in (Member(0, "a", 1, "2"), Member(1, "b", 2, "2")):
        member.introduce(store)
    Member(0, "a", 1, "2").meet(store, 5)
    store.set("accelerate/begun", "")

    Member(1, "c", 3, "2").meet(store, 5)
    with pytest.raises(
        LaunchError, match="machine 1 .d. was told that this run has 3 machine.*, and machine 0 .a. that"
    ):
        Member(1, "d", 4, "3").meet(store, 5)
    Member(1, "c", 5, "2").meet(store, 5)


def test_those_who_have_come_and_those_who_are_missing_are_named():
    come = members("0 node-a 4", "2 node-c 4", "2 node-c 4")
    own = come[0]

    assert (
        "have come within 30 s. What has come: machine 0 (node-a), machine 2 (node-c); missing: machine 1, machine 3."
        in (str(rendezvous.too_few(own, come, 30)))
    )
    nameless = [Member(None, "x", 5, "2:4")]
    assert "What has come: x (pid 5).\n" in str(rendezvous.too_few(nameless[0], nameless, 30))


@pytest.mark.parametrize(
    ("come", "named"),
    [
        (members("1 b 2", "0 a 2"), "machine 0 (a), machine 1 (b)"),
        ([Member(None, "a", 1, "1:2")], "a (pid 1)"),
    ],
)
def test_where_all_have_come_once_nobody_is_said_to_be_missing(come, named):
    told = str(rendezvous.too_few(come[0], come, 15))

    assert told.startswith(
        f"The machines of this run did not all meet within 15 s, though each has come before: {named}."
    )
    assert "missing" not in told


@pytest.mark.parametrize(
    ("come", "expected"),
    [
        (
            members("0 a 2", "1 b 3"),
            "machine 0 (a) was told that this run has 2 machine(s) (num_machines), and machine 1 (b) that it has 3.",
        ),
        (
            [Member(0, "a", 1, "2", 2), Member(1, "b", 2, "2", 4)],
            "machine 0 (a) was told that this run has 2 process(es) (num_processes), and machine 1 (b) that it has 4.",
        ),
        (
            [Member(0, "a", 1, "2", backend="c10d"), Member(1, "b", 2, "2")],
            "machine 0 (a) meets the others by c10d, and machine 1 (b) by static (rdzv_backend).",
        ),
    ],
)
def test_machines_that_contradict_each_other_are_named(come, expected):
    with pytest.raises(LaunchError, match=re.escape(expected)):
        rendezvous.check_told(come[0], come)


def test_two_machines_with_one_number_are_named():
    with pytest.raises(LaunchError, match="Two machines say that they are machine 0: a and b."):
        rendezvous.check_numbers(members("0 a 2", "0 b 2"))


def test_machines_that_counted_their_devices_may_have_different_numbers():
    counted, told = Member(0, "a", 1, "2"), Member(1, "b", 2, "2", 4)

    rendezvous.check_told(counted, [counted, told])
    rendezvous.check_told(told, [counted, told])


class Inner:
    """Torch's meeting, as far as it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def num_nodes_waiting(self) -> int:
        self.asked += 1
        return 2

    def shutdown(self) -> bool:
        self.asked += 1
        return True


def test_a_store_that_does_not_answer_is_not_asked_and_given_up_after_a_while(monkeypatch):
    inner, clock = Inner(), [100.0]
    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(rendezvous, "answers", lambda store: clock[0] < 102)
    meeting: Any = rendezvous.ChangingMeeting(inner, HashStore(), Member(0, "a", 1, "2"), "a", 600)  # type: ignore[arg-type]

    found = []
    for clock[0] in (100.0, 100.5, 101.1, 102.5, 110.0):  # noqa: B007 - the clock is looked at
        found.append((meeting.num_nodes_waiting(), inner.asked))
    clock[0] = 150.0

    assert found == [(2, 1), (2, 1), (2, 2), (0, 2), (0, 2)]
    with pytest.raises(RendezvousConnectionError, match="nobody has answered for 30 s"):
        meeting.num_nodes_waiting()
    assert not meeting.shutdown()
    assert inner.asked == 2

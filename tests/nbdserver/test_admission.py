"""Which connections are let in."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from nbdserver import server as server_module
from nbdserver.admission import BURST_SECONDS, CLIENTS_MAX, Admission
from nbdserver.server import Listener, Server
from nbdserver.service import _raise_descriptor_limit
from nbdserver.settings import ServerSettings
from objstore.volume.memory import MemorySource, MemoryVolume
from tests.conftest import ExpectedWarnings
from tests.nbdserver.volumes import until
from tests.support.nbd_client import NbdClient, attached

MANY = 1 << 20


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def admission(descriptors: int = MANY, **settings: Any) -> tuple[Admission, Clock]:
    clock = Clock()
    return Admission(ServerSettings(**settings), descriptors, clock), clock


def reasons(subject: Admission, client: str, times: int) -> list[str]:
    """Why not, for each attempt; "" = let in."""
    return [(refusal.reason if refusal else "") for refusal in (subject.refuses(client) for _ in range(times))]


def test_places_in_all_and_of_one_client() -> None:
    subject, _ = admission(connections_max=3, client_connections_max=2)
    assert reasons(subject, "uid:1", 3) == ["", "", "client_connections_max"]
    assert reasons(subject, "uid:2", 2) == ["", "connections_max"]
    subject.leave("uid:1")
    assert reasons(subject, "uid:1", 2) == ["", "connections_max"]


def test_descriptors_bound_the_places() -> None:
    subject, _ = admission(descriptors=7, connections_max=100)
    assert subject.connections_max == 3
    assert reasons(subject, "uid:1", 4) == ["", "", "", "connections_max"]


def test_a_client_that_connects_again_and_again_is_slowed_down() -> None:
    subject, clock = admission(client_connects_per_second=2.0, client_connections_max=0)
    burst = int(2 * BURST_SECONDS)
    assert reasons(subject, "uid:1", burst + 2) == [""] * burst + ["client_connects_per_second"] * 2
    assert reasons(subject, "uid:2", 1) == [""]
    clock.now += 1.0
    assert reasons(subject, "uid:1", 3) == ["", "", "client_connects_per_second"]
    clock.now += 1000.0
    assert reasons(subject, "uid:1", burst + 1)[-2:] == ["", "client_connects_per_second"]


def test_limits_can_be_left_out_and_changed() -> None:
    subject, _ = admission(client_connects_per_second=0.0, client_connections_max=0, connections_max=5000)
    assert reasons(subject, "uid:1", 2000) == [""] * 2000
    subject.reconfigure(ServerSettings(connections_max=2001, client_connections_max=0, client_connects_per_second=0.0))
    assert reasons(subject, "uid:2", 2) == ["", "connections_max"]


def test_memory_of_clients_is_bounded() -> None:
    subject, _ = admission(connections_max=1, client_connects_per_second=1.0)
    for number in range(CLIENTS_MAX + 10):
        subject.refuses(f"address:{number}")
    assert len(subject._tokens) == CLIENTS_MAX
    assert len(subject._open) == 1


@pytest.fixture
def limit() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_descriptor_limit_is_raised_and_stated(
    limit: tuple[int, int], caplog: pytest.LogCaptureFixture, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("descriptors allow")
    _, hard = limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    with caplog.at_level("INFO"):
        _raise_descriptor_limit(hard // 2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert [f"descriptors_max={hard}" in message for message in caplog.messages] == [True]
        _raise_descriptor_limit(hard // 2 + 1)
        assert f"{hard // 2} connections are possible" in caplog.messages[-1]


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Server]:
    """A server over TCP."""
    server = Server(MemorySource({"disk": MemoryVolume("disk", 1 << 20)}), ServerSettings(**settings))
    await server.start([Listener.parse("tcp://127.0.0.1:0")])
    try:
        yield server
    finally:
        await server.stop()


def from_address(address: str, server: Server) -> socket.socket:
    """A connection from a client of another address of the loopback network."""
    sock = socket.socket()
    sock.bind((address, 0))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect((server.listeners[0].host, server.listeners[0].port))
    return sock


async def greeted(sock: socket.socket) -> bool:
    """Whether the server says something, and does not close at once."""
    try:
        return bool(await asyncio.get_running_loop().sock_recv(sock, 100))
    except ConnectionResetError:
        return False


async def test_one_client_leaves_places_for_others(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("client_connections_max=3 of address:127.0.0.2 are open")
    async with serving(client_connections_max=3) as server:
        greedy = [from_address("127.0.0.2", server) for _ in range(5)]
        assert sorted([await greeted(sock) for sock in greedy]) == [False, False, True, True, True]
        other = from_address("127.0.0.3", server)
        assert await greeted(other)
        assert server.network().counts.refused == {"client_connections_max": 2}
        for sock in (*greedy, other):
            sock.close()


async def test_a_flood_of_connections_is_turned_away_and_others_get_in(
    monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings, caplog: pytest.LogCaptureFixture
) -> None:
    """Accepting rests now and then, and goes on by itself."""
    expected_warnings.allow("client_connects_per_second=1")
    monkeypatch.setattr(server_module, "REFUSALS_MAX", 3)
    async with serving(client_connects_per_second=1.0) as server, attached(str(server.listeners[0]), "disk") as client:
        flood = [from_address("127.0.0.2", server) for _ in range(40)]
        assert sum([await greeted(sock) for sock in flood]) <= 10
        await client.write(0, b"x" * 4096)
        other = await NbdClient.connect(str(server.listeners[0]))
        await other.greet()
        assert (await other.go("disk")).accepted
        other.close()
        for sock in flood:
            sock.close()
        assert server.network().counts.refused["client_connects_per_second"] >= 30
        assert sum("refused" in message for message in caplog.messages) == 1
    await until(lambda: not server.clients())

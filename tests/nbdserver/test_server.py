"""Listeners, sockets, the list of clients, and what connections do to each other."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from nbdserver.connection import Connection
from nbdserver.server import Listener, Server, ServerSettings
from objstore.errors import Unavailable
from objstore.units import KIB, MIB
from objstore.volume.memory import MemorySource, MemoryVolume
from tests.conftest import ExpectedWarnings
from tests.nbdserver.volumes import TestVolume, until
from tests.support.clients import unavailable
from tests.support.nbd_client import NbdClient, attached, connected
from tests.support.nbd_spec import Command, Err
from tests.support.our_server import serve_volume

LISTENERS = [
    ("unix:///run/a%20b.sock", "unix:///run/a b.sock", "nbd+unix:///my%20disk%2F1?socket=/run/a%20b.sock"),
    ("tcp://127.0.0.1:10809", "tcp://127.0.0.1:10809", "nbd://127.0.0.1/my%20disk%2F1"),
    ("tcp://localhost", "tcp://localhost:10809", "nbd://localhost/my%20disk%2F1"),
    ("tcp://[::1]:7", "tcp://[::1]:7", "nbd://[::1]:7/my%20disk%2F1"),
    ("tcp://0.0.0.0:0/", "tcp://0.0.0.0:0", "nbd://0.0.0.0:0/my%20disk%2F1"),
    ("vsock://any:10809", "vsock://any:10809", "nbd+vsock://2/my%20disk%2F1"),
    ("vsock://3", "vsock://3:10809", "nbd+vsock://3/my%20disk%2F1"),
    ("vsock://1:100000/", "vsock://1:100000", "nbd+vsock://1:100000/my%20disk%2F1"),
]


@pytest.mark.parametrize(("text", "shown", "uri"), LISTENERS)
def test_listener(text: str, shown: str, uri: str) -> None:
    listener = Listener.parse(text)
    assert str(listener) == shown
    assert listener.uri("my disk/1") == uri


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/run/x.sock",
        "unix://",
        "unix:///",
        "unix://run/x",
        "tcp://",
        "tcp://:5",
        "tcp://a:99999",
        "nbd://a",
        "tcp://a/b",
        "unix:///a?b",
        "tcp://me@a:1",
        "tcp://a:1#x",
        "vsock://",
        "vsock://:1",
        "vsock://host:1",
        "vsock://3:-1",
        "vsock://3:4294967295",
        "vsock://3:1/x",
    ],
)
def test_bad_listener(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Listener.parse(text)


def only_connection(server: Server) -> Connection:
    (connection,) = server._connections
    return connection


async def test_a_stale_socket_file_is_replaced_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = Server(MemorySource({}), ServerSettings())
    await server.start([Listener(path=str(path))])
    async with connected(f"unix://{path}"):
        pass
    await server.stop()
    assert not path.exists()


async def test_a_socket_in_use_and_a_plain_file_are_left_alone(tmp_path: Path) -> None:
    first = Server(MemorySource({}))
    path = tmp_path / "nbd.sock"
    await first.start([Listener(path=str(path))])
    second = Server(MemorySource({}))
    with pytest.raises(OSError, match="unix://"):
        await second.start([Listener(path=str(tmp_path / "other.sock")), Listener(path=str(path))])
    assert not (tmp_path / "other.sock").exists(), "nothing stays behind of a start that failed"
    async with connected(f"unix://{path}"):
        pass
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(OSError, match="unix://"):
        await Server(MemorySource({})).start([Listener(path=str(file))])
    assert file.read_text() == "precious"
    await first.stop()


async def test_a_socket_file_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    server = Server(MemorySource({}))
    await server.start([Listener(path=str(path))])
    path.unlink()
    path.write_text("new owner")
    await server.stop()
    assert path.read_text() == "new owner"


async def test_vsock_listens() -> None:
    """Whether a guest reaches it can't be seen from here: parsed, bound, and listening is all that is tested."""
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        unavailable(f"this kernel has no AF_VSOCK: {error.strerror}")
    server = Server(MemorySource({}))
    await server.start([Listener.parse("vsock://any:40809")])
    assert [str(listener) for listener in server.listeners] == ["vsock://any:40809"]
    with pytest.raises(OSError, match="can't listen on vsock://any:40809"):
        await Server(MemorySource({})).start([Listener.parse("vsock://any:40809")])
    await server.stop()


async def test_sockets_that_listen_already_are_taken_and_their_files_left(tmp_path: Path) -> None:
    path = tmp_path / "handed.sock"
    handed = socket.socket(socket.AF_UNIX)
    handed.bind(str(path))
    handed.listen()
    server = Server(MemorySource({}))
    await server.start([Listener.parse("tcp://127.0.0.1:0")], [handed])
    assert str(server.listeners[0]) == f"unix://{path}"
    for listener in server.listeners:
        async with connected(str(listener)):
            pass
    await server.stop()
    assert path.exists(), "it belongs to whoever made it"


@pytest.mark.parametrize("kind", ["datagram", "silent"])
async def test_a_socket_that_does_not_listen_is_refused_and_nothing_stays_open(tmp_path: Path, kind: str) -> None:
    good = socket.socket(socket.AF_UNIX)
    good.bind(str(tmp_path / "good"))
    good.listen()
    bad = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM)
    with pytest.raises(ValueError, match="not a stream socket that listens"):
        await Server(MemorySource({})).start([Listener(path=str(tmp_path / "own"))], [good, bad])
    assert (good.fileno(), bad.fileno()) == (-1, -1)
    assert not (tmp_path / "own").exists()


async def test_taken_port() -> None:
    server = Server(MemorySource({}))
    await server.start([Listener.parse("tcp://127.0.0.1:0")])
    (listener,) = server.listeners
    with pytest.raises(OSError, match=r"can't listen on tcp://127\.0\.0\.1"):
        await Server(MemorySource({})).start([listener])
    await server.stop()


async def test_host_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    with pytest.raises(OSError, match=r"can't listen on tcp://nowhere\.invalid:7: Name or service"):
        await Server(MemorySource({})).start([Listener.parse("tcp://nowhere.invalid:7")])


async def test_tcp_options_are_set_from_accept_on() -> None:
    server = Server(MemorySource({"disk": MemoryVolume("disk", MIB)}))
    await server.start([Listener.parse("tcp://127.0.0.1:0")])
    async with connected(str(server.listeners[0])):
        sock = only_connection(server)._sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    await server.stop()


async def test_clients(tmp_path: Path) -> None:
    async with serve_volume(MemoryVolume("disk", MIB), tmp_path) as served:
        assert served.server.clients() == []
        async with served.connected(), served.attached() as client:
            await client.write(0, b"x" * 4096)
            await client.read(0, 4096)
            await client.call(99)
            haggling, entered = served.server.clients()
            assert (haggling.export, haggling.state) == (None, "options")
            assert (entered.export, entered.state) == ("disk", "transmission")
            assert (entered.request_count, entered.error_count, entered.in_flight) == (3, 1, 0)
            assert entered.received_bytes > 4096
            assert entered.sent_bytes > 4096
            assert entered.connected_seconds >= 0
        await until(lambda: not served.server.clients())


async def test_the_empty_name_shows_as_the_real_one(tmp_path: Path) -> None:
    async with serve_volume(MemoryVolume("disk", MIB), tmp_path) as served, served.attached("") as client:
        await client.read(0, 512)
        assert served.server.clients()[0].export == "disk"


async def test_an_older_client_that_hung_up_goes_when_a_newer_one_enters(tmp_path: Path) -> None:
    volume = TestVolume()
    volume.slow = True
    volume.gate = asyncio.Event()
    async with serve_volume(volume, tmp_path, requests_in_flight_max=1) as served:
        old = await NbdClient.connect(served.address)
        await old.greet()
        await old.go("disk")
        await old.submit(Command.READ, 0, 4096)
        await until(lambda: volume.calls)
        await old.submit(Command.WRITE, 0, payload=b"stale" * 100)
        old.close()
        async with served.attached() as new:
            assert [client.state for client in served.server.clients()] == ["closing", "transmission"]
            volume.gate.set()
            volume.slow = False
            assert await new.read(0, 512) == bytes(512)
    assert not any(call.startswith("write") for call in volume.calls)


async def test_what_lay_waiting_while_the_peer_hung_up_is_not_written(tmp_path: Path) -> None:
    """Without a newer client too: the writes may be repeats of what another connection has overwritten since."""
    volume = TestVolume()
    volume.slow = True
    volume.gate = asyncio.Event()
    async with serve_volume(volume, tmp_path, requests_in_flight_max=1) as served:
        client = await NbdClient.connect(served.address)
        await client.greet()
        await client.go("disk")
        head = client.pack_request(Command.READ, 0, 4096, cookie=1)
        await client.send(head + client.pack_request(Command.WRITE, 0, 5, cookie=2) + b"stale")
        await until(lambda: volume.calls)
        client.close()
        volume.slow = False
        volume.gate.set()
        await until(lambda: not served.server.clients())
    assert bytes(volume._data[:5]) == bytes(5)


async def test_requests_in_front_of_a_disconnect_are_done(tmp_path: Path) -> None:
    volume = TestVolume()
    volume.slow = True
    volume.gate = asyncio.Event()
    async with serve_volume(volume, tmp_path) as served:
        client = await NbdClient.connect(served.address)
        await client.greet()
        await client.go("disk")
        head = client.pack_request(Command.WRITE, 0, 4, cookie=1)
        await client.send(head + b"last" + client.pack_request(Command.DISC))
        client.close()
        await until(lambda: volume.calls)
        volume.gate.set()
        await until(lambda: not served.server.clients())
    assert bytes(volume._data[:4]) == b"last"


async def test_replies_arrive_although_unread_bytes_are_left(tmp_path: Path) -> None:
    """TCP resets a connection that is closed with unread bytes; the reply to the last good request must survive it."""
    server = Server(MemorySource({"disk": MemoryVolume("disk", 64 * MIB)}))
    await server.start([Listener.parse("tcp://127.0.0.1:0")])
    async with attached(str(server.listeners[0]), "disk", structured=False) as client:
        good = await client.submit(Command.READ, 0, 8 * MIB)
        await client.send(client.pack_request(Command.READ, magic=0xBAD) + bytes(64 * KIB))
        await client.wait(good)
        assert good.error == Err.OK
        await client.expect_orderly_close()
    await server.stop()


async def test_payload_waits_for_memory_without_holding_others(tmp_path: Path) -> None:
    volume = MemoryVolume("disk", 256 * MIB)
    async with serve_volume(volume, tmp_path, buffer_bytes_max=MIB) as served:
        async with served.attached() as hoarder, served.attached() as patient, served.attached() as small:
            head = hoarder.pack_request(Command.WRITE, 0, MIB, cookie=1)
            await hoarder.send(head + b"h" * 100 * KIB)
            await until(lambda: served.server._common.pool.held_bytes == MIB)
            late = asyncio.create_task(patient.write(MIB, b"p" * 512 * KIB))
            await until(lambda: served.server._common.pool.short)
            await small.write(0, b"s" * 4096)
            assert await small.read(0, 4096) == b"s" * 4096
            await small.flush()
            assert not late.done()
            await hoarder.send(b"h" * (MIB - 100 * KIB))
            await late
            assert await patient.read(MIB, 512 * KIB) == b"p" * 512 * KIB
        await until(lambda: not served.server.clients())
        assert served.server._common.pool.held_bytes == 0


async def test_a_client_that_leaves_while_it_waits_for_memory(tmp_path: Path) -> None:
    async with serve_volume(MemoryVolume("disk", 64 * MIB), tmp_path, buffer_bytes_max=MIB) as served:
        async with served.attached() as hoarder:
            await hoarder.send(hoarder.pack_request(Command.WRITE, 0, MIB, cookie=1) + b"h" * 100 * KIB)
            await until(lambda: served.server._common.pool.held_bytes == MIB)
            waiter = await NbdClient.connect(served.address)
            await waiter.greet()
            await waiter.go("disk")
            await waiter.send(waiter.pack_request(Command.WRITE, 0, MIB, cookie=1) + b"w" * 100)
            await until(lambda: served.server._common.pool.short)
            waiter.close()
        await until(lambda: not served.server.clients())
        assert served.server._common.pool.held_bytes == 0
        assert not served.server._common.pool.short


async def test_an_open_that_fails_leaves_the_client_haggling(
    tmp_path: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("can't be opened")

    class Closed(MemorySource):
        async def open(self, name: str) -> TestVolume:
            raise Unavailable("zones are missing zones=b,c")

    server = Server(Closed({"disk": TestVolume()}))
    await server.start([Listener(path=str(tmp_path / "nbd.sock"))])
    async with connected(f"unix://{tmp_path / 'nbd.sock'}") as client:
        info = await client.go("disk")
        assert not info.accepted
        await client.in_step()
    await server.stop()


async def test_opening_does_not_count_against_the_handshake(tmp_path: Path) -> None:
    gate = asyncio.Event()

    class Slow(MemorySource):
        async def open(self, name: str) -> TestVolume:
            await gate.wait()
            return await super().open(name)  # type: ignore[return-value]

    server = Server(Slow({"disk": TestVolume()}), ServerSettings(handshake_seconds=0.05))
    await server.start([Listener(path=str(tmp_path / "nbd.sock"))])
    client = await NbdClient.connect(f"unix://{tmp_path / 'nbd.sock'}")
    await client.greet()
    entering = asyncio.create_task(client.go("disk"))
    await asyncio.sleep(0.15)
    gate.set()
    assert (await entering).accepted
    client.close()
    await server.stop()


async def test_stop_cuts_off_what_does_not_end(tmp_path: Path) -> None:
    volume = TestVolume()
    volume.slow = True
    volume.gate = asyncio.Event()
    source = MemorySource({"disk": volume})
    server = Server(source, ServerSettings(stop_seconds=0.05))
    await server.start([Listener(path=str(tmp_path / "nbd.sock"))])
    client = await NbdClient.connect(f"unix://{tmp_path / 'nbd.sock'}")
    await client.greet()
    await client.go("disk")
    await client.submit(Command.READ, 0, 4096)
    await until(lambda: volume.calls)
    stopping = asyncio.create_task(server.stop())
    await client.expect_close()
    volume.gate.set()
    await stopping
    assert source.open_count == 0
    client.close()


async def test_stop_twice(tmp_path: Path) -> None:
    server = Server(MemorySource({}))
    await server.start([Listener(path=str(tmp_path / "nbd.sock"))])
    await server.stop()
    await server.stop()


@pytest.mark.parametrize("busy_poll_seconds", [0.0, 0.001])
async def test_busy_polling_changes_nothing_but_time(tmp_path: Path, busy_poll_seconds: float) -> None:
    volume = MemoryVolume("disk", MIB)
    async with (
        serve_volume(volume, tmp_path, busy_poll_seconds=busy_poll_seconds) as served,
        served.attached() as one,
        served.attached() as two,
    ):
        for index in range(50):
            await one.write(index * 512, bytes((index + 1,)) * 512)
            assert await two.read(index * 512, 512) == bytes((index + 1,)) * 512


async def test_no_descriptors_left(
    tmp_path: Path, expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running out of descriptors pauses accepting; the clients that are there are served, new ones wait."""
    expected_warnings.allow("no connection can be accepted")
    monkeypatch.setattr("nbdserver.server.ACCEPT_PAUSE_SECONDS", 0.01)
    async with serve_volume(MemoryVolume("disk", MIB), tmp_path) as served, served.attached() as client:
        server = served.server
        (sock, _) = server._listening.sockets[0]
        taken: list[int] = []

        class Exhausted:
            """The listening socket as it is while the table of descriptors is full."""

            def accept(self) -> object:
                taken.append(1)
                raise OSError(24, os.strerror(24))

            def fileno(self) -> int:
                return sock.fileno()

        server._accept(Exhausted())  # type: ignore[arg-type]
        assert taken
        asyncio.get_running_loop().add_reader(sock.fileno(), server._accept, sock)
        await client.still_serves()
        await served.others_are_served()


@pytest.mark.parametrize("place", ["unix", "tcp"])
@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("doing", ["idle", "replies", "payload"])
async def test_nothing_stays_of_a_client_that_vanishes(tmp_path: Path, place: str, how: str, doing: str) -> None:
    volume = MemoryVolume("disk", 64 * MIB)
    volume.write_now(0, memoryview(b"x" * 32 * MIB))
    async with serve_volume(volume, tmp_path, listen=[place]) as served:
        client = await NbdClient.connect(served.address)
        await client.greet()
        await client.go("disk")
        connection = only_connection(served.server)
        if doing == "replies":
            for _ in range(16):
                await client.submit(Command.READ, 0, 2 * MIB)
            await until(lambda: connection.stalled_since is not None)
        elif doing == "payload":
            await client.send(client.pack_request(Command.WRITE, 0, MIB, cookie=1) + b"p" * 100 * KIB)
            await until(lambda: connection.stalled_since is not None)
        if how == "reset":
            client.reset()
        else:
            client.close()
        await until(lambda: not served.server.clients())
        assert served.server._common.pool.held_bytes == 0
        await served.others_are_served()

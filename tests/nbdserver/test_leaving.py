"""Clients that leave: what they asked for in front of DISC happens, and never after what a newer client does."""

import asyncio
import struct
from pathlib import Path

import pytest

from nbdserver.dispatch import BATCH_REQUESTS_MAX
from nbdserver.server import Listener, Server, ServerSettings
from nbdserver.transmission import RECEIVE_BYTES, Transmission
from nbdserver.wire.constants import REQUEST_MAGIC
from objstore.volume.memory import MemorySource
from tests.nbdserver.volumes import TestVolume, until
from tests.support.nbd_client import NbdClient, attached
from tests.support.nbd_spec import Command, CommandFlag, Err, Request
from tests.support.our_server import serve_volume

BLOCK = 4096


def held() -> TestVolume:
    """A volume whose requests wait for its gate."""
    volume = TestVolume()
    volume.slow = True
    volume.gate = asyncio.Event()
    return volume


async def busy(client: NbdClient, volume: TestVolume) -> None:
    """Have a request in flight, so that with requests_in_flight_max=1 nothing more is read."""
    await client.send(client.pack_request(Command.READ, 0, BLOCK, cookie=99))
    await until(lambda: volume.calls)


def writes(client: NbdClient, count: int) -> bytes:
    return b"".join(
        client.pack_request(Command.WRITE, index * BLOCK, BLOCK, cookie=index) + bytes([index + 1]) * BLOCK
        for index in range(count)
    )


async def entered(address: str, *, extended: bool = False) -> NbdClient:
    client = await NbdClient.connect(address)
    await client.greet()
    if extended:
        await client.extended_headers()
    await client.go("disk")
    return client


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("count", [5, 30])
async def test_all_in_front_of_a_disconnect_is_done(tmp_path: Path, transport: str, count: int) -> None:
    """Although the peer has closed before DISC could be read, because more is in front of it than may be in flight."""
    volume = held()
    server = Server(MemorySource({"disk": volume}), ServerSettings(requests_in_flight_max=1))
    listener = f"unix://{tmp_path / 's'}" if transport == "unix" else "tcp://127.0.0.1:0"
    await server.start([Listener.parse(listener)])
    client = await entered(str(server.listeners[0]))
    await busy(client, volume)
    await client.send(writes(client, count) + client.pack_request(Command.DISC))
    client.close()
    volume.gate.set()
    await until(lambda: not server.clients())
    await server.stop()
    assert bytes(volume._data[: count * BLOCK : BLOCK]) == bytes(range(1, count + 1))


async def test_replies_that_nobody_takes_don_t_matter(tmp_path: Path) -> None:
    """The socket of a peer that has gone can't be written to any more; what it asked for is finished all the same."""
    volume = held()
    async with serve_volume(volume, tmp_path, requests_in_flight_max=1) as served:
        client = await entered(served.address)
        await busy(client, volume)
        reads = b"".join(client.pack_request(Command.READ, 0, 64 << 10, cookie=i) for i in range(20))
        await client.send(reads + writes(client, 20) + reads + client.pack_request(Command.DISC))
        client.close()
        volume.slow = False
        volume.gate.set()
        await until(lambda: not served.server.clients())
    assert bytes(volume._data[: 20 * BLOCK : BLOCK]) == bytes(range(1, 21))


async def test_without_a_disconnect_nothing_more_is_done(tmp_path: Path) -> None:
    volume = held()
    async with serve_volume(volume, tmp_path, requests_in_flight_max=1) as served:
        client = await entered(served.address)
        await busy(client, volume)
        await client.send(writes(client, 10) + client.pack_request(Command.DISC)[:-1])
        client.close()
        volume.gate.set()
        await until(lambda: not served.server.clients())
    assert not any(volume._data)


async def test_a_newer_client_begins_when_an_older_one_has_finished(tmp_path: Path) -> None:
    volume = held()
    async with serve_volume(volume, tmp_path, requests_in_flight_max=1) as served:
        old = await entered(served.address)
        await busy(old, volume)
        await old.send(writes(old, 3) + old.pack_request(Command.DISC))
        old.close()
        new = await entered(served.address)
        replies = [await new.submit(Command.WRITE, index * BLOCK, payload=b"n" * BLOCK) for index in range(3)]
        for _ in range(50):
            await asyncio.sleep(0)
        assert [client.in_flight for client in served.server.clients()] == [1, 0]
        assert len(volume.calls) == 1
        volume.gate.set()
        assert {reply.error for reply in await new.wait_all(replies)} == {Err.OK}
        assert bytes(volume._data[: 3 * BLOCK : BLOCK]) == b"nnn"
        new.close()


async def test_an_older_client_that_does_not_end_is_revoked(tmp_path: Path) -> None:
    volume = held()
    async with serve_volume(volume, tmp_path, requests_in_flight_max=4, stall_seconds=0.05) as served:
        old = await entered(served.address)
        await old.send(writes(old, 2) + old.pack_request(Command.DISC))
        await until(lambda: len(volume.calls) == 2)
        new = await entered(served.address)
        await until(lambda: [client.state for client in served.server.clients()] == ["closing", "transmission"])
        write = await new.submit(Command.WRITE, 0, payload=b"n" * BLOCK)
        await until(lambda: len(volume.calls) == 3)
        volume.gate.set()
        assert (await new.wait(write)).error == Err.OK
        assert volume._data[0] == ord("n")
        assert volume._data[BLOCK] == 0, "what the old client asked for does not happen any more"
        old.close()
        new.close()


@pytest.mark.parametrize("extended", [False, True])
async def test_a_stop_takes_what_was_received(tmp_path: Path, extended: bool) -> None:
    """Complete requests that have been received are done and answered, although no more may be in flight at once."""
    volume = held()
    async with (
        serve_volume(volume, tmp_path, requests_in_flight_max=1, linger_seconds=0.2) as served,
        attached(served.address, "disk", extended=extended) as client,
    ):
        flags = CommandFlag.PAYLOAD_LEN if extended else 0
        half = client.pack_request(Command.WRITE, 0, BLOCK, cookie=1 << 40, flags=flags) + b"half"
        before = served.server.clients()[0].received_bytes
        requests, replies = [], []
        for index in range(BATCH_REQUESTS_MAX + 20):
            data = bytes([index % 255 + 1]) * 100
            requests.append(client.pack_request(Command.WRITE, index * 100, 100, cookie=index, flags=flags) + data)
            replies.append(client.expect(Request(Command.WRITE, flags, index, index * 100, 100)))
        everything = b"".join(requests) + half
        await client.send(everything)
        await until(lambda: served.server.clients()[0].received_bytes == before + len(everything))
        assert served.server.clients()[0].in_flight == BATCH_REQUESTS_MAX
        stopping = asyncio.create_task(served.server.stop())
        await asyncio.sleep(0)
        volume.gate.set()
        assert {reply.error for reply in await client.wait_all(replies)} == {Err.OK}
        await client.expect_orderly_close()
        await stopping
    assert all(volume._data[index * 100] == index % 255 + 1 for index in range(BATCH_REQUESTS_MAX + 20))


WRITE, READ, DISC = 1, 0, 2


def request(command: int, length: int = 0) -> bytes:
    return struct.pack(">IHHQQI", REQUEST_MAGIC, 0, command, 7, 0, length)


DISC_IN_DATA = request(WRITE, 28) + request(DISC)


@pytest.mark.parametrize(
    ("received", "unread", "answer"),
    [
        (b"", b"", False),
        (b"", request(DISC), True),
        (request(DISC), b"", True),
        (request(READ, 1 << 20), request(DISC), True),
        (request(WRITE, 5) + b"abc", b"de" + request(DISC), True),
        (DISC_IN_DATA, b"", False),
        (DISC_IN_DATA, request(READ, 5) + request(DISC), True),
        (request(DISC)[:20], request(DISC)[20:], True),
        (request(DISC)[:20], request(DISC)[20:-1], False),
        (request(WRITE, 100_000), bytes(100_000) + request(DISC), True),
        (request(WRITE, 100_000) + bytes(9), bytes(99_991) + request(DISC), True),
        (request(WRITE, 100_000), request(DISC), False),
        (request(WRITE, (1 << 26) + 1), request(DISC), False),
        (bytes(28), request(DISC), False),
    ],
)
@pytest.mark.parametrize("refused", [False, True])
def test_where_a_stream_leads(received: bytes, unread: bytes, answer: bool, refused: bool) -> None:
    transmission = Transmission(
        memoryview(bytearray(RECEIVE_BYTES)),
        extended=False,
        payload_bytes_max=1 << 26,
        refuses=lambda *_: refused,
    )
    transmission.feed(received)
    assert transmission.leads_to_disconnect(unread) == answer
    if received[:4] == request(READ)[:4] and len(received) >= 28 and received[6:8] == b"\0\1":
        transmission.requests(0, 0)  # nothing is taken, but it lies in the shared buffer now
        assert transmission.leads_to_disconnect(unread) == answer

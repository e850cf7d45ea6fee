"""TLS behind the calls of a plain socket: records cut anywhere, sockets that are full, ends."""

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from nbdserver.tls_stream import OPENED_BYTES, RECORD_BYTES_MAX, SEALED_BYTES_MAX, TlsStream
from tests.support.certificates import certificates
from tests.support.channel import Channel


class Pair:
    """A stream of the server's kind, a client, and the sockets between them."""

    def __init__(self, stream: TlsStream, client: Channel, sock: socket.socket) -> None:
        self.stream = stream
        self.client = client
        self.sock = sock

    async def receive(self, views: list[memoryview]) -> int:
        """As a connection that is woken up when the socket is readable."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            while True:
                readable = asyncio.Event()
                loop.add_reader(self.sock.fileno(), readable.set)
                await readable.wait()
                loop.remove_reader(self.sock.fileno())
                try:
                    return self.stream.recvmsg_into(views)[0]
                except BlockingIOError:
                    continue


@asynccontextmanager
async def pair(*, send_buffer_bytes: int | None = None) -> AsyncIterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        if send_buffer_bytes is not None:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        stream = TlsStream(ours, certificates().server().context, memoryview(bytearray(1 << 18)))
        client = Channel(theirs)
        await asyncio.gather(stream.handshake(), client.start_tls(certificates().client()))
        yield Pair(stream, client, ours)


def room(size: int = OPENED_BYTES) -> memoryview:
    return memoryview(bytearray(size))


@pytest.mark.parametrize("seed", range(4))
async def test_what_a_full_socket_does_not_take_is_sent_once(seed: int) -> None:
    """A queue of views of all sizes, given again from where the stream said; each byte arrives once, in order."""
    rng = random.Random(seed)
    sizes = [rng.choice((1, 28, 4112, 16_384, 16_385, SEALED_BYTES_MAX, 3 * SEALED_BYTES_MAX + 7)) for _ in range(40)]
    whole = rng.randbytes(sum(sizes))
    rest = memoryview(whole)
    refusals = 0
    async with pair(send_buffer_bytes=4096) as ends:
        reading = asyncio.create_task(ends.client.receive(len(whole)))
        while rest:
            cuts = [rest[: sizes[0]], rest[sizes[0] : sizes[0] + 5000], rest[sizes[0] + 5000 : sizes[0] + 700_000]]
            try:
                rest = rest[ends.stream.sendmsg([cut for cut in cuts if cut]) :]
            except BlockingIOError:
                refusals += 1
                await asyncio.sleep(0)
        assert await reading == whole
        assert refusals > 10


async def test_a_refused_byte_is_not_counted_as_sent() -> None:
    """Whoever asks whether everything has left (a connection that ends) must not be told so too early."""
    async with pair(send_buffer_bytes=4096) as ends:
        data = memoryview(bytes(SEALED_BYTES_MAX))
        with pytest.raises(BlockingIOError):
            ends.stream.send(data)
        with pytest.raises(BlockingIOError):
            ends.stream.send(data)
        reading = asyncio.create_task(ends.client.receive(len(data)))
        taken = 0
        while not taken:
            try:
                taken = ends.stream.send(data)
            except BlockingIOError:
                await asyncio.sleep(0)
        assert taken == len(data)
        assert await reading == data


@pytest.mark.parametrize("piece", [1, 7, 5000, 1 << 20])
async def test_records_come_in_pieces(piece: int) -> None:
    """However the network cuts records, each wake-up takes what is whole, and the last leaves nothing behind."""
    whole = random.Random(piece).randbytes(20_000 if piece < 5000 else 200_000)
    async with pair() as ends:

        async def send() -> None:
            sealed = bytes(ends.client._sealed(whole))
            for at in range(0, len(sealed), piece):
                await ends.client.send_plain(sealed[at : at + piece])

        sending = asyncio.create_task(send())
        received = b""
        first, second = room(100), room()
        while len(received) < len(whole):
            length = await ends.receive([first, second])
            received += bytes(first[:length]) + bytes(second[: max(0, length - len(first))])
        await sending
        assert received == whole


async def test_many_records_of_one_wake_up_are_received_at_once() -> None:
    async with pair() as ends:
        await ends.client.send(*(bytes([number]) * 28 for number in range(32)))
        view = room()
        assert await ends.receive([view]) == 32 * 28
        with pytest.raises(BlockingIOError):
            ends.stream.recv_into(view)


async def test_as_much_is_received_as_can_be_opened() -> None:
    """Nothing stays in memory where no wake-up would come for it."""
    whole = bytes(3 * OPENED_BYTES)
    async with pair() as ends:
        await ends.client.send(whole)
        received = 0
        view = room()
        while received < len(whole):
            length = await ends.receive([view])
            assert 0 < length <= OPENED_BYTES
            received += length
        assert OPENED_BYTES > 2 * RECORD_BYTES_MAX


async def test_peeked_bytes_are_received_afterwards() -> None:
    async with pair() as ends:
        await ends.client.send(b"a" * 100_000)
        ends.client.half_close()
        assert ends.stream.peek(1 << 20) == b"a" * 100_000
        received = b""
        view = room()
        while length := ends.stream.recv_into(view):
            received += bytes(view[:length])
        assert received == b"a" * 100_000


async def test_peeking_is_bounded() -> None:
    async with pair() as ends:
        sending = asyncio.create_task(ends.client.send(bytes(4 << 20)))
        await ends.receive([room()])
        assert len(ends.stream.peek(1000)) <= 1000 + (1 << 18)
        sending.cancel()
        await asyncio.wait([sending])


async def test_ends() -> None:
    async with pair() as ends:
        ends.client.half_close()
        assert await ends.receive([room()]) == 0
        assert ends.stream.recv_into(room()) == 0
        assert await ends.stream.receive() == b""
        ends.stream.send(memoryview(b"still heard"))
        await ends.stream.close()
        assert await ends.client.receive(11) == b"still heard"
        await ends.client.expect_orderly_close()
        assert ends.client.close_notify
    async with pair() as ends:
        ends.client.half_close_tcp()
        with pytest.raises(ConnectionAbortedError, match="close_notify"):
            await ends.receive([room()])
    async with pair() as ends:
        await ends.client.send_plain(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ssl.SSLError):
            await ends.receive([room()])

"""A socket to a server under test: exact reads, and every way of sending and closing that a test may want.

Reads only when asked to, so a test decides when a client stops reading. One reader at a time; every wait ends after
PATIENCE_SECONDS, with the name of what did not come.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

PATIENCE_SECONDS = 20.0
RECEIVE_BYTES = 1 << 18

Payload = bytes | bytearray | memoryview


class Disconnected(ConnectionError):
    """The server closed the connection where more was expected. `got` is what had come of it, `reset` how it ended."""

    def __init__(self, got: bytes, *, reset: bool) -> None:
        super().__init__(f"{'reset' if reset else 'closed'} by the server after {got[:40]!r}")
        self.got = got
        self.reset = reset


class Channel:
    """One connection, as bytes."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._tls: ssl.SSLObject | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.close_notify = False
        """TLS has ended in order."""

    @classmethod
    async def connect(cls, address: str, *, receive_buffer_bytes: int | None = None) -> Self:
        """address: unix:///PATH or tcp://HOST:PORT. receive_buffer_bytes: the kernel's, for tests of a slow reader."""
        scheme, _, place = address.partition("://")
        target: str | tuple[str, int]
        if scheme == "unix":
            family, target = socket.AF_UNIX, place
        else:
            host, _, port = place.rpartition(":")
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            target = (host.strip("[]"), int(port))
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            if receive_buffer_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
            if scheme != "unix":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel = cls(sock)
            async with channel._patience("a connection"):
                await channel._loop.sock_connect(sock, target)
        except BaseException:
            sock.close()
            raise
        return channel

    @asynccontextmanager
    async def _patience(self, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                yield
        except TimeoutError:
            raise AssertionError(
                f"waited {PATIENCE_SECONDS:.0f} s for {what}; got {bytes(self._received[:64])!r}"
            ) from None

    async def send(self, *parts: Payload) -> None:
        """Send exactly these bytes, or raise Disconnected."""
        try:
            async with self._patience("room to send"):
                for part in parts:
                    await self._loop.sock_sendall(self.socket, self._sealed(part))
        except ConnectionError as error:
            raise Disconnected(b"", reset=True) from error

    async def send_slowly(self, data: Payload) -> None:
        """Send byte by byte, letting the server see each of them alone."""
        for index in range(len(data)):
            await self.send(data[index : index + 1])
            await asyncio.sleep(0)

    async def _fill(self) -> bool:
        """Receive once; False at the end of the stream."""
        if self.close_notify:
            return False
        piece = await self._loop.sock_recv(self.socket, RECEIVE_BYTES)
        if self._tls is None:
            self._received += piece
        elif piece:
            self._incoming.write(piece)
            self._open(self._tls)
        return bool(piece)

    def _sealed(self, data: Payload) -> Payload:
        """What goes out for these bytes."""
        if self._tls is None or not data:
            return data
        self._tls.write(data)
        return self._outgoing.read()

    def _open(self, tls: ssl.SSLObject) -> None:
        """Decrypt what is there in whole records."""
        try:
            while opened := tls.read(RECEIVE_BYTES):
                self._received += opened
            self.close_notify = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.close_notify = True

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """TLS from here on, as the client of it. ssl.SSLError, Disconnected."""
        assert not self._received
        tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        async with self._patience("a TLS handshake"):
            while True:
                try:
                    tls.do_handshake()
                except ssl.SSLWantReadError:
                    await self._loop.sock_sendall(self.socket, self._outgoing.read())
                    piece = await self._loop.sock_recv(self.socket, RECEIVE_BYTES)
                    if not piece:
                        raise Disconnected(b"", reset=False) from None
                    self._incoming.write(piece)
                else:
                    break
            await self._loop.sock_sendall(self.socket, self._outgoing.read())
        self._tls = tls

    def cipher(self) -> tuple[str, str, int] | None:
        """Name, version of TLS, bits."""
        assert self._tls is not None
        return self._tls.cipher()

    async def send_plain(self, data: Payload) -> None:
        """Past TLS."""
        await self._loop.sock_sendall(self.socket, data)

    async def receive(self, count: int, what: str = "bytes") -> bytes:
        """Exactly `count` bytes, or raise Disconnected."""
        try:
            async with self._patience(f"{count} bytes: {what}"):
                while len(self._received) < count:
                    if not await self._fill():
                        raise Disconnected(bytes(self._received), reset=False)
        except (ConnectionResetError, BrokenPipeError) as error:
            raise Disconnected(bytes(self._received), reset=True) from error
        data = bytes(memoryview(self._received)[:count])
        del self._received[:count]
        return data

    def something_to_receive(self) -> bool:
        """Whether the server has sent something that was not received yet."""
        if self._received:
            return True
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False

    async def receive_until_close(self) -> tuple[bytes, bool]:
        """Everything up to the end of the stream, and whether it ended in a reset."""
        try:
            async with self._patience("the server to close the connection"):
                while await self._fill():
                    pass
        except (ConnectionResetError, BrokenPipeError):
            return self._take_received(), True
        return self._take_received(), False

    def _take_received(self) -> bytes:
        data = bytes(self._received)
        self._received.clear()
        return data

    async def expect_close(self) -> None:
        """The server says nothing more and closes, in order or by a reset."""
        rest, _ = await self.receive_until_close()
        assert rest == b"", f"the server sent {rest[:64]!r} where it had to close"

    async def expect_orderly_close(self) -> None:
        """The server says nothing more and closes without a reset, so that nothing it sent before can be lost."""
        rest, reset = await self.receive_until_close()
        assert rest == b"", f"the server sent {rest[:64]!r} where it had to close"
        assert not reset, "the connection was reset"

    def half_close(self) -> None:
        if self._tls is not None:
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.unwrap()
            self.socket.send(self._outgoing.read())
        self.half_close_tcp()

    def half_close_tcp(self) -> None:
        """Without a close_notify where there is TLS."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Close so that the peer sees a reset (TCP: SO_LINGER 0; Unix sockets: whenever data lies unread)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

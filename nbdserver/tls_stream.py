"""TLS on a non-blocking socket, behind the calls that connection.py and sending.py make on a plain one.

Records are sealed and opened in memory (ssl.SSLObject), so a wake-up still receives and sends with one system call each
however many records that are; an ssl.SSLSocket makes two calls for every record it receives and one for each it sends.
Receiving: whatever came in whole records is opened by the call that received it, so that a socket without unread bytes
means that nothing is left; only `peek` reads ahead, of a peer that has hung up, whose socket stays readable.
Sending: bytes count as taken when their records have left. Until then the caller has them in its queue and gives them
again, as it does with what a full plain socket did not take; they are not sealed twice.
Ends: close_notify is the end of the stream, an end of the connection without it is an error (somebody may have cut off
the rest). Spec: RFC 8446, 6.1; proto.md, "TLS support".
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Final

from objstore.units import KIB

SEALED_BYTES_MAX: Final = 256 * KIB
"""Sealed before it is sent: fits into a core's second-level cache and bounds what waits for a full socket."""
RECORD_BYTES_MAX: Final = 17 * KIB
"""A record and its header: what may be left of a receive, because its end has not come yet."""
OPENED_BYTES: Final = 64 * KIB
"""Room of a receive in the handshake."""


class TlsStream:
    """The server's side of TLS on `sock`. scratch: what has just been received, shared by all streams of a loop.

    `handshake` first; nothing of `sock` has been read that belongs to TLS. OSError (ssl.SSLError is one) from any call:
    the stream can't be used any more.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, scratch: memoryview) -> None:
        self._sock = sock
        self._scratch = scratch
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._loop = asyncio.get_running_loop()
        self._ahead = bytearray()
        """Opened by `peek` or the handshake, and not received yet."""
        self._ended = False
        """close_notify has come."""
        self._unsent = memoryview(b"")
        """Sealed, but the socket was full."""
        self._owed_bytes = 0
        """Plain bytes in `_unsent`: the caller has them in its queue still."""

    # Handshake: coroutines, as the socket's own in the event loop

    async def handshake(self) -> None:
        """Agree with the client on keys. OSError, after the client was told why."""
        while True:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                self._take(await self._loop.sock_recv(self._sock, OPENED_BYTES))
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    await self._flush()
                raise
            else:
                await self._flush()
                self._open_ahead()  # what came right behind the client's last message of the handshake
                return

    async def receive(self) -> bytes:
        """What the client says next, at most OPENED_BYTES; nothing at the end of the stream."""
        room = memoryview(bytearray(OPENED_BYTES))
        while True:
            try:
                return bytes(room[: self.recv_into(room)])
            except BlockingIOError:
                self._take(await self._loop.sock_recv(self._sock, OPENED_BYTES))
                self._open_ahead()

    async def send_all(self, data: bytes) -> None:
        """Send all of it."""
        self._object.write(data)
        await self._flush()

    async def close(self) -> None:
        """Tell the client that nothing more will come (close_notify). Everything must have been sent."""
        with contextlib.suppress(ssl.SSLWantReadError):  # it waits for the client's
            self._object.unwrap()
        await self._flush()

    async def _flush(self) -> None:
        await self._loop.sock_sendall(self._sock, self._outgoing.read())

    def certificate(self) -> Mapping[str, Any]:
        """The client's verified certificate as the ssl module shows it; empty without one."""
        return self._object.getpeercert() or {}

    # What a plain socket has

    def recv_into(self, view: memoryview) -> int:
        """As socket.recv_into."""
        return self.recvmsg_into((view,))[0]

    def recvmsg_into(self, views: Sequence[memoryview]) -> tuple[int]:
        """As socket.recvmsg_into, into at least OPENED_BYTES. (0,): close_notify has come. BlockingIOError: no whole
        record is there."""
        if self._ahead:
            return (self._from_ahead(views),)
        if self._ended:
            return (0,)
        room = sum(map(len, views)) - RECORD_BYTES_MAX
        assert room > 0
        length = self._sock.recv_into(self._scratch[:room])
        self._take(self._scratch[:length])
        opened = self._open(views)
        if not opened and not self._ended:
            raise BlockingIOError
        return (opened,)

    def send(self, view: memoryview) -> int:
        """As socket.send."""
        return self.sendmsg((view,))

    def sendmsg(self, views: Sequence[memoryview]) -> int:
        """As socket.sendmsg. The bytes that it has not taken must be the first of the next call."""
        if self._owed_bytes:
            if not self._push():
                raise BlockingIOError
            taken, self._owed_bytes = self._owed_bytes, 0
            return taken
        taken = sealed = 0
        outgoing = self._outgoing
        write = self._object.write
        for view in views:
            for at in range(0, len(view), SEALED_BYTES_MAX):
                sealed += write(view[at : at + SEALED_BYTES_MAX])
                if outgoing.pending >= SEALED_BYTES_MAX:
                    if not self._push_sealed(sealed):
                        return self._taken_or_full(taken)
                    taken += sealed
                    sealed = 0
        if sealed and not self._push_sealed(sealed):
            return self._taken_or_full(taken)
        return taken + sealed

    def peek(self, bytes_max: int) -> bytes:
        """What has come of the stream of a peer that has hung up (about bytes_max at most), to be received still."""
        with contextlib.suppress(OSError):
            while len(self._ahead) < bytes_max and not self._ended:
                self._take(self._scratch[: self._sock.recv_into(self._scratch)])
                self._open_ahead()
        return bytes(self._ahead)

    # Records

    def _take(self, sealed: memoryview | bytes) -> None:
        """Hand received bytes to TLS."""
        if not sealed:
            raise ConnectionAbortedError("the connection ended without close_notify")
        self._incoming.write(sealed)

    def _open(self, views: Sequence[memoryview]) -> int:
        """Open records into views until no whole one is left; returns the number of bytes."""
        incoming = self._incoming
        tls = self._object
        opened = 0
        try:
            for view in views:
                at = 0
                while at < len(view):
                    if not incoming.pending and not tls.pending():
                        return opened
                    length: int = tls.read(len(view) - at, view[at:])  # type: ignore[assignment]  # into a buffer
                    if not length:
                        self._ended = True
                        return opened
                    at += length
                    opened += length
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._ended = True
        return opened

    def _open_ahead(self) -> None:
        room = memoryview(bytearray(OPENED_BYTES))
        while length := self._open((room,)):
            self._ahead += room[:length]

    def _from_ahead(self, views: Sequence[memoryview]) -> int:
        copied = 0
        for view in views:
            part = self._ahead[copied : copied + len(view)]
            view[: len(part)] = part
            copied += len(part)
        del self._ahead[:copied]
        return copied

    def _push_sealed(self, plain_bytes: int) -> bool:
        """Send what was sealed just now; False: the socket is full, plain_bytes are owed."""
        self._unsent = memoryview(self._outgoing.read())
        if self._push():
            return True
        self._owed_bytes = plain_bytes
        return False

    def _push(self) -> bool:
        """Send what has been sealed. False: the socket is full."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            return False
        return True

    @staticmethod
    def _taken_or_full(taken: int) -> int:
        if not taken:
            raise BlockingIOError
        return taken

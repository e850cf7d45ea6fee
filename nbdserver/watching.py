"""What can be known of a socket without reading it: unread bytes, the end of the peer, and waiting in a busy loop."""

import contextlib
import fcntl
import select
import socket
import sys
import termios
import time
from typing import Final

HUNG_UP: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL
CROWDED_SECONDS: Final = 200e-6
"""A busy poll that ends so much too late was interrupted by another process."""
CROWDED_PAUSE_SECONDS: Final = 0.1


class SocketWatch:
    """Of one socket. `close` before the socket's own."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._hang_up = select.poll()
        self._hang_up.register(sock.fileno(), HUNG_UP)
        self._readable = select.poll()
        self._readable.register(sock.fileno(), select.POLLIN)
        self.poll_readable = self._readable.poll

    def hung_up(self) -> bool:
        """The peer will send nothing more."""
        return bool(self._hang_up.poll(0))

    def peek(self, bytes_max: int) -> bytes:
        """What the kernel has of the peer's stream; nothing if that is more than bytes_max."""
        with contextlib.suppress(OSError):
            unread_bytes = int.from_bytes(fcntl.ioctl(self._sock, termios.FIONREAD, bytes(4)), sys.byteorder)
            if 0 < unread_bytes <= bytes_max:
                return self._sock.recv(unread_bytes, socket.MSG_PEEK)
        return b""

    def close(self) -> None:
        """The descriptor may be another's from now on."""
        self._hang_up.unregister(self._sock.fileno())
        self._readable.unregister(self._sock.fileno())


class BusyPoll:
    """For the connections of one event loop. Not for a while after a poll that took much longer than it should: then
    others want the core, and polling takes the time away that answering needs."""

    def __init__(self) -> None:
        self._not_before = 0.0

    def readable(self, watch: SocketWatch, seconds: float) -> bool:
        """Wait so long at most for bytes, without sleeping."""
        start = time.monotonic()
        if start < self._not_before:
            return False
        poll = watch.poll_readable
        deadline = start + seconds
        found = bool(poll(0))
        now = time.monotonic()
        while not found and now < deadline:
            found = bool(poll(0))
            now = time.monotonic()
        if now - deadline > CROWDED_SECONDS:
            self._not_before = now + CROWDED_PAUSE_SECONDS
        return found

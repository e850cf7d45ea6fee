"""When a TCP peer that says nothing is taken for dead.

Linux asks it after `idle` seconds of silence, and gives it up after `count` questions, one every `interval` seconds,
that nobody has answered. Bytes that it does not acknowledge have a limit of their own, because they keep those
questions from being asked.
"""

import socket
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Keepalive:
    """Seconds, and number of questions. unacknowledged_seconds: 0 = the system's limit (about 15 minutes)."""

    idle_seconds: int
    interval_seconds: int
    count: int
    unacknowledged_seconds: int = 0

    @property
    def silence_seconds_max(self) -> int:
        return self.idle_seconds + self.interval_seconds * self.count

    def apply(self, sock: socket.socket) -> None:
        """Set it, on TCP sockets. OSError."""
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, self.idle_seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, self.interval_seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, self.count)
        if self.unacknowledged_seconds:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self.unacknowledged_seconds * 1000)


USUAL: Final = Keepalive(60, 10, 6)
"""A dead peer is noticed after two minutes of silence."""
ONE_WRITER: Final = Keepalive(10, 5, 3, 25)
"""For an export with one writer at a time: its successor waits for at most 30 s."""

assert ONE_WRITER.silence_seconds_max < 30
assert ONE_WRITER.unacknowledged_seconds < 30

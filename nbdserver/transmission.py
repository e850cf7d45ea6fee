"""Transmission phase of one connection, without I/O: where received bytes belong, and which requests they make.

`connection.py` receives into `buffers()`, tells `received()`, and takes what `requests()` has; `dispatch.py` answers.
A request comes out only when its payload is complete. Requests and payloads up to IN_PLACE_BYTES_MAX lie in a receive
buffer that all connections of the loop share, and are valid until the next receive of any of them; what a connection
leaves there is saved by `park()`. A longer payload gets a buffer of its own (`wants_bytes`, `provide`), or, when the
request will be refused anyway, is dropped as it arrives.
Holds: after ProtocolError no request comes out, and everything in front of the broken bytes has come out before.
Spec: proto.md, "Request message", "Request types"; proto-ext-header.md for extended headers.
"""

from collections.abc import Callable
from typing import Final

from nbdserver.buffers import Buffer
from nbdserver.wire import requests as wire
from nbdserver.wire.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    ProtocolError,
)
from objstore.units import KIB

IN_PLACE_BYTES_MAX: Final = 64 * KIB
"""Longest payload that is used where it was received."""
RECEIVE_BYTES: Final = 256 * KIB
"""Size of the shared receive buffer: more than 32 requests of 4 KiB, less than a core's second-level cache."""

Request = tuple[int, int, int, int, int, memoryview | None, Buffer | None]
"""(command, flags, cookie, offset, length, payload, buffer that holds the payload). A plain tuple: one is made per
request. payload None: none announced, or dropped because `refuses` said so."""

_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISC: Final = int(Command.DISC)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)


class Transmission:
    """The receiving half of one connection.

    refuses(command, flags, offset, length): asked for a request whose long payload has not arrived yet; True drops it.
    """

    def __init__(
        self,
        shared: memoryview,
        *,
        extended: bool,
        payload_bytes_max: int,
        refuses: Callable[[int, int, int, int], bool],
    ) -> None:
        self.disconnected = False
        """DISC was received; whatever follows it is ignored."""
        self.wants_bytes = 0
        """Not 0: the connection must `provide` a buffer of this size before it goes on receiving."""
        self._shared = shared
        self._start = 0
        self._end = 0
        self._parked = b""
        self._extended = extended
        header = wire.EXTENDED if extended else wire.COMPACT
        self._unpack = header.unpack_from
        self._header_bytes = header.size
        self._magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        self._payload_bytes_max = payload_bytes_max
        self._refuses = refuses
        self._head: tuple[int, int, int, int, int] | None = None
        self._buffer: Buffer | None = None
        self._rest = memoryview(b"")
        self._skip_bytes = 0

    @property
    def receiving_payload(self) -> bool:
        """In the middle of a payload that has a buffer of its own."""
        return self._buffer is not None

    @property
    def empty(self) -> bool:
        """Nothing is left to look at: no bytes, no payload, no end."""
        return self._start == self._end and self._head is None and not self._parked and not self.disconnected

    def feed(self, data: bytes) -> None:
        """Take bytes that were received before this phase began (behind the last option)."""
        self._parked += data

    def buffers(self) -> list[memoryview]:
        """Where the next bytes go, in order. Valid until `received` or `park`; never while `wants_bytes`."""
        shared = self._shared
        if self._buffer is not None:
            return [self._rest, shared]
        if self._parked:
            self._unpark()
        elif self._start:
            left = self._end - self._start
            if left:
                shared[:left] = bytes(shared[self._start : self._end])
            self._start = 0
            self._end = left
        return [shared[self._end :] if self._end else shared]

    def received(self, length: int) -> None:
        """`length` bytes have come into `buffers()`."""
        if self._buffer is not None:
            missing = len(self._rest)
            self._rest = self._rest[length:]
            self._start = 0
            self._end = max(0, length - missing)
        elif self._skip_bytes:
            dropped = min(length, self._skip_bytes)
            self._skip_bytes -= dropped
            self._start += dropped
            self._end += length
        else:
            self._end += length

    def park(self) -> None:
        """Save what lies in the shared buffer; other connections may use it from now on."""
        if self._end > self._start:
            self._parked = bytes(self._shared[self._start : self._end])
        self._start = self._end = 0

    def provide(self, buffer: Buffer) -> None:
        """Give the buffer that `wants_bytes` asked for; the part of the payload that is here moves into it."""
        if self._parked:
            self._unpark()
        length = self.wants_bytes
        self.wants_bytes = 0
        arrived = min(length, self._end - self._start)
        buffer.data[:arrived] = self._shared[self._start : self._start + arrived]
        self._start += arrived
        self._buffer = buffer
        self._rest = buffer.data[arrived:length]

    def leads_to_disconnect(self, unread: bytes) -> bool:
        """Whether DISC follows in order. unread: what the peer has sent beyond what was received, the end of its stream
        included."""
        data = self._parked + self._shared[self._start : self._end] + unread
        at = len(self._rest) if self._buffer is not None else self._skip_bytes + self.wants_bytes
        payload_flag = _PAYLOAD_LEN if self._extended else 0
        while at + self._header_bytes <= len(data):
            magic, flags, command, _, _, length = self._unpack(data, at)
            if magic != self._magic:
                return False
            at += self._header_bytes
            if flags & payload_flag or (command == _WRITE and not payload_flag):
                if length > self._payload_bytes_max:
                    return False
                at += length
            elif command == _DISC:
                return True
        return False

    def abandon(self) -> Buffer | None:
        """The connection ends: the buffer of an unfinished payload, to be given back."""
        buffer, self._buffer = self._buffer, None
        return buffer

    def requests(self, count_max: int, read_bytes_max: int) -> list[Request]:
        """Complete requests, at most count_max, whose reads ask for at most read_bytes_max together (or one that asks
        for more, alone). Empty: more bytes are needed, or `wants_bytes`, or `disconnected`. ProtocolError.
        """
        batch: list[Request] = []
        if self._head is not None and not self._finish_payload(batch):
            return batch
        if self._parked:
            self._unpark()
        shared = self._shared
        at = self._start
        end = self._end
        unpack = self._unpack
        header_bytes = self._header_bytes
        expected = self._magic
        payload_flag = _PAYLOAD_LEN if self._extended else 0
        while at + header_bytes <= end and len(batch) < count_max:
            magic, flags, command, cookie, offset, length = unpack(shared, at)
            if magic != expected:
                if batch:
                    break
                raise ProtocolError(f"request magic is {magic:#x}, not {expected:#x}")
            if flags & payload_flag or (command == _WRITE and not payload_flag):
                if length > self._payload_bytes_max:
                    if batch:
                        break
                    raise ProtocolError(f"payload of {length} bytes, at most {self._payload_bytes_max} are taken")
                data_at = at + header_bytes
                if data_at + length <= end:
                    batch.append((command, flags, cookie, offset, length, shared[data_at : data_at + length], None))
                    at = data_at + length
                    continue
                if length <= IN_PLACE_BYTES_MAX:
                    break
                self._start = data_at
                self._begin_payload(command, flags, cookie, offset, length)
                return batch
            if command == _READ:
                if length > read_bytes_max and batch:
                    break
                read_bytes_max -= length
            elif command == _DISC:
                self.disconnected = True
                at = end
                break
            batch.append((command, flags, cookie, offset, length, None, None))
            at += header_bytes
        self._start = at
        return batch

    def _begin_payload(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        """The header at hand announces a long payload, of which some may be here already."""
        self._head = (command, flags, cookie, offset, length)
        if self._refuses(command, flags, offset, length):
            arrived = min(length, self._end - self._start)
            self._start += arrived
            self._skip_bytes = length - arrived
        else:
            self.wants_bytes = length

    def _finish_payload(self, batch: list[Request]) -> bool:
        """Put out the request whose payload was being received; False if it is not complete yet."""
        assert self._head is not None
        if self.wants_bytes or self._skip_bytes or len(self._rest):
            return False
        command, flags, cookie, offset, length = self._head
        buffer, self._buffer, self._head = self._buffer, None, None
        payload = None if buffer is None else buffer.data[:length]
        batch.append((command, flags, cookie, offset, length, payload, buffer))
        return True

    def _unpark(self) -> None:
        parked, self._parked = self._parked, b""
        self._shared[: len(parked)] = parked
        self._start = 0
        self._end = len(parked)

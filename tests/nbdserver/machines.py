"""The two protocol machines driven without sockets: bytes in, what comes out collected."""

import struct
from collections.abc import Callable, Sequence

from nbdserver.buffers import Buffer
from nbdserver.exports import Exports, View
from nbdserver.handshake import Enter, Handshake, State
from nbdserver.identity import Peer
from nbdserver.transmission import RECEIVE_BYTES, Request, Transmission
from nbdserver.wire import options as wire
from nbdserver.wire.constants import OPTION_MAGIC, OPTION_REPLY_MAGIC, ClientFlag, ProtocolError
from objstore.volume.base import VolumeInfo
from objstore.volume.memory import MemorySource, MemoryVolume

FIXED = int(ClientFlag.C_FIXED_NEWSTYLE | ClientFlag.C_NO_ZEROES)
GREETING_BYTES = wire.GREETING.size


def exports(*names: str, default: str | None = None) -> View:
    """Exports of small volumes in memory, for anyone."""
    source = MemorySource({name: MemoryVolume(name, 1 << 20) for name in names})
    return View(Exports(source, default), Peer("test"), secure=False)


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """An option as a client sends it."""
    return wire.OPTION_HEADER.pack(OPTION_MAGIC, number, len(data) if length is None else length) + data


def info_data(name: bytes, *wanted: int) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def context_data(name: bytes, *queries: bytes) -> bytes:
    parts = [struct.pack(">I", len(name)), name, struct.pack(">I", len(queries))]
    for query in queries:
        parts += [struct.pack(">I", len(query)), query]
    return b"".join(parts)


def replies(output: bytes) -> list[tuple[int, int, bytes]]:
    """Option replies as (option, type, data)."""
    found = []
    while output:
        magic, number, kind, length = wire.OPTION_REPLY_HEADER.unpack_from(output)
        assert magic == OPTION_REPLY_MAGIC
        end = wire.OPTION_REPLY_HEADER.size + length
        found.append((number, kind, output[wire.OPTION_REPLY_HEADER.size : end]))
        output = output[end:]
    return found


class Haggler:
    """A handshake and its client. entering: the export that the client has been promised."""

    def __init__(self, handshake: Handshake, flags: int = FIXED) -> None:
        self.handshake = handshake
        self.entering: str | None = None
        assert len(handshake.take_output()) == GREETING_BYTES
        self.send(wire.CLIENT_FLAGS.pack(flags))

    def send(self, data: bytes) -> bytes:
        """Feed bytes, run the machine as a connection does, return its output."""
        self.handshake.receive(data)
        while event := self.handshake.step():
            if isinstance(event, Enter):
                self.entering = event.name
                break
        return self.handshake.take_output()

    def ask(self, number: int, data: bytes = b"") -> list[tuple[int, int, bytes]]:
        return replies(self.send(option(number, data)))

    def kinds(self, number: int, data: bytes = b"") -> list[int]:
        """Types of the replies to an option."""
        return [kind for _, kind, _ in self.ask(number, data)]

    def enter(self) -> bytes:
        """The export is open; returns what the client is told."""
        assert self.entering is not None
        assert self.handshake.state is State.OPENING
        self.handshake.entered(VolumeInfo(self.entering, 1 << 20, False, "in memory"))
        return self.handshake.take_output()


class Receiver:
    """A transmission fed as a connection feeds it; requests come out with their payloads copied."""

    def __init__(
        self,
        *,
        extended: bool = False,
        payload_bytes_max: int = 1 << 26,
        refuses: Callable[[int, int, int, int], bool] = lambda command, flags, offset, length: False,
    ) -> None:
        self.shared = memoryview(bytearray(RECEIVE_BYTES))
        self.machine = Transmission(
            self.shared, extended=extended, payload_bytes_max=payload_bytes_max, refuses=refuses
        )
        self.requests: list[tuple[int, int, int, int, int, bytes | None]] = []
        self.error: ProtocolError | None = None
        self.batches: list[int] = []
        self.count_max = 256
        self.read_bytes_max = 1 << 18

    def feed(self, pieces: Sequence[bytes], *, park: bool = True) -> None:
        """Receive the pieces one after another, wiping the shared buffer in between as other connections would."""
        for piece in pieces:
            rest = memoryview(piece)
            while rest and self.error is None and not self.machine.disconnected:
                taken = 0
                for view in self.machine.buffers():
                    part = rest[taken : taken + len(view)]
                    view[: len(part)] = part
                    taken += len(part)
                assert taken, "the machine has no room for more bytes"
                rest = rest[taken:]
                self.machine.received(taken)
                self.drain()
                if park:
                    self.machine.park()
                    self.shared[:] = b"\xa5" * len(self.shared)

    def drain(self) -> None:
        """Take every request that is complete."""
        try:
            while True:
                batch = self.machine.requests(self.count_max, self.read_bytes_max)
                for request in batch:
                    self.requests.append(self._copied(request))
                if batch:
                    self.batches.append(len(batch))
                elif self.machine.wants_bytes:
                    self.machine.provide(Buffer(self.machine.wants_bytes))
                else:
                    return
        except ProtocolError as error:
            self.error = error

    def _copied(self, request: Request) -> tuple[int, int, int, int, int, bytes | None]:
        command, flags, cookie, offset, length, payload, _ = request
        return command, flags, cookie, offset, length, None if payload is None else bytes(payload)

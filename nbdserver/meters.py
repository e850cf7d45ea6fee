"""What the data path counts: plain integers for each export in use and for the server; metrics.py makes /metrics of it.

Counting must cost next to nothing: what is answered in one batch took the time of that batch and is counted at once.
Everything is touched by the event loop only.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from nbdserver.wire.constants import Command
from objstore.access.api import ClientStatus

COMMANDS: Final = {
    int(command): command.name.lower()
    for command in (
        Command.READ,
        Command.WRITE,
        Command.FLUSH,
        Command.TRIM,
        Command.CACHE,
        Command.WRITE_ZEROES,
        Command.BLOCK_STATUS,
    )
}
"""Those that this server does, as the label `command` has them."""
BUCKETS: Final = 21
FIRST_BUCKET_BITS: Final = 14
BOUNDS_SECONDS: Final = tuple(2 ** (FIRST_BUCKET_BITS + index) / 1e9 for index in range(BUCKETS))
"""Upper bounds of the buckets of latency: 16 us, twice as much each, 17 s; one more bucket has what took longer."""
METERS_MAX: Final = 1024
"""Exports that are told apart; connections of further ones share a meter."""
IDLE_METERS_MAX: Final = 64
"""Exports that nobody uses any more and whose numbers are kept, so that a client that reconnects goes on counting."""
SHARED: Final = ""
"""Label of what is not told apart: no export has this name."""


class Meter:
    """The requests of one export. Lists are indexed by command number; latency is nanoseconds from the moment at which
    a request was taken from the socket's bytes to its answer being handed to the socket."""

    __slots__ = ("answered_bytes", "buckets", "connections", "errors", "immediate", "name", "nanoseconds")

    def __init__(self, name: str) -> None:
        size = max(COMMANDS) + 1
        self.name = name
        self.connections = 0
        self.buckets = [[0] * (BUCKETS + 1) for _ in range(size)]
        self.nanoseconds = [0] * size
        self.answered_bytes = [0] * size
        """Lengths of the requests that were answered without an error."""
        self.immediate = [0] * size
        """Of those, requests that were answered without waiting for anything."""
        self.errors: dict[str, int] = {}
        """Requests that were answered with an error, by its name."""

    def batch(self, command: int, count: int, length_bytes: int, nanoseconds: int) -> None:
        """So many requests with so many bytes were answered without waiting, in a batch that took so long."""
        index = nanoseconds.bit_length() - FIRST_BUCKET_BITS
        self.buckets[command][0 if index < 0 else index if index < BUCKETS else BUCKETS] += count
        self.nanoseconds[command] += count * nanoseconds
        self.answered_bytes[command] += length_bytes
        self.immediate[command] += count

    def one(self, command: int, length_bytes: int, nanoseconds: int) -> None:
        """A request that had to wait was answered, length_bytes = 0 with an error."""
        index = nanoseconds.bit_length() - FIRST_BUCKET_BITS
        self.buckets[command][0 if index < 0 else index if index < BUCKETS else BUCKETS] += 1
        self.nanoseconds[command] += nanoseconds
        self.answered_bytes[command] += length_bytes

    def error(self, name: str) -> None:
        """A request was answered with that error."""
        self.errors[name] = self.errors.get(name, 0) + 1

    def copy(self) -> "Meter":
        """The numbers as they are now."""
        copied = Meter(self.name)
        copied.connections = self.connections
        copied.buckets = [list(row) for row in self.buckets]
        copied.nanoseconds = list(self.nanoseconds)
        copied.answered_bytes = list(self.answered_bytes)
        copied.immediate = list(self.immediate)
        copied.errors = dict(self.errors)
        return copied


class Meters:
    """The meters of the exports that connections use, and of the last IDLE_METERS_MAX that they used."""

    def __init__(self) -> None:
        self._used: dict[str, Meter] = {}
        self._idle: OrderedDict[str, Meter] = OrderedDict()

    def take(self, name: str) -> Meter:
        """The meter of an export that a connection enters."""
        if name not in self._used and len(self._used) >= METERS_MAX:
            name = SHARED
        meter = self._used.get(name)
        if meter is None:
            meter = self._used[name] = self._idle.pop(name) if name in self._idle else Meter(name)
        meter.connections += 1
        return meter

    def give_back(self, meter: Meter) -> None:
        """That connection has ended."""
        meter.connections -= 1
        if not meter.connections:
            self._idle[meter.name] = self._used.pop(meter.name)
            if len(self._idle) > IDLE_METERS_MAX:
                self._idle.popitem(last=False)

    def copies(self) -> list[Meter]:
        """What all of them have counted, by name."""
        return [meter.copy() for _, meter in sorted({**self._idle, **self._used}.items())]


@dataclass
class Counts:
    """What happened to connections since the server started."""

    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Connections that were closed unanswered, by reason."""
    failed_handshakes: int = 0
    """Those that ended in the handshake because of an error or its deadline."""
    broken: int = 0
    """Those that ended because the client broke the protocol after the handshake."""
    stalled: int = 0
    """Those that were cut off because others waited for their memory."""
    slow_requests: int = 0
    """Requests that took longer than slow_request_seconds."""

    def refuse(self, reason: str) -> None:
        """A connection was closed unanswered."""
        self.refused[reason] = self.refused.get(reason, 0) + 1


@dataclass(frozen=True, slots=True)
class Network:
    """The server's side at one moment; counts: goes on counting."""

    meters: Sequence[Meter]
    clients: Sequence[ClientStatus]
    counts: Counts
    fenced: int
    buffer_bytes: int
    buffer_bytes_max: int
    connections_max: int

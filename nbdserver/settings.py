"""What can be configured of the network side."""

from dataclasses import dataclass

from nbdserver.handshake import OPTIONS_MAX
from objstore.units import MIB


@dataclass(frozen=True)
class ServerSettings:
    """What can be configured of the network side. Memory: besides buffer_bytes_max in all, a connection holds at most
    about 512 KiB of its own (bytes it sent ahead, replies it did not take)."""

    default_export: str | None = None
    """What the empty export name means; None: the only export, if there is only one."""
    list_snapshots: bool = False
    """Whether NBD_OPT_LIST names snapshots; they can be opened by name either way."""
    extended_headers: bool = True
    connections_max: int = 1024
    client_connections_max: int = 512
    """Of one client, by user or address (admission.py); 0 = no limit of its own."""
    client_connects_per_second: float = 100.0
    """New connections of one client, five seconds' worth at once; 0 = any number."""
    handshake_seconds: float = 10.0
    options_max: int = OPTIONS_MAX
    requests_in_flight_max: int = 128
    """Requests of one connection that wait for the volume."""
    held_bytes_max: int = 64 * MIB
    """Data of those requests; one request may always be in flight, whatever its size."""
    reply_bytes_max: int = 2 * MIB
    """Replies that a client has not taken before its requests are no longer read; one reply may always be pending."""
    buffer_bytes_max: int = 256 * MIB
    """Buffers for long payloads and replies, all connections together."""
    stall_seconds: float = 10.0
    """A connection that moves no byte for so long while it holds buffers that others wait for is closed."""
    slow_request_seconds: float = 1.0
    """Requests that took longer are logged with where their time went; 0 = none."""
    linger_seconds: float = 1.0
    stop_seconds: float = 30.0
    """How long a stop waits for requests in flight and for clients to take their replies."""
    busy_poll_seconds: float = 50e-6
    """How long the only active client is polled for its next request before the loop sleeps. 4 KiB at depth 1, single
    runs of 1 s on a shared two-core host: with a core left 30 k/s with 50 us of it and 16 k/s without; with more
    processes than cores it cost (mean of five: 14 k/s with, 19 k/s without), hence the pause in watching.py, whose
    own gain was lost in the noise."""
    socket_buffer_bytes: int = 1 * MIB
    """Send buffer of Unix sockets, 0 = the system's default. TCP sizes its own. 1 MiB reads at depth 8, medians of
    three on a busy host: 3.4 GiB/s with 256 KiB, 3.2 with 1 MiB, 2.8 with the default, 2.7 with 4 MiB; the ranges
    overlap."""

"""Which connections are let in: so many in all, so many of one client, and so many new ones of it in a second.

Who a client is counts here as it is known when a connection comes: the user behind a Unix socket, else the address.
What a connection may do later is bounded elsewhere (settings.py); this keeps one client from taking all the places, and
connecting again and again from taking the time of everybody else.
"""

import time
from collections.abc import Callable
from typing import Final, NamedTuple

from nbdserver.settings import ServerSettings

BURST_SECONDS: Final = 5.0
"""So many seconds' worth of new connections may come at once: all clients of a host connect again after a restart."""
CLIENTS_MAX: Final = 4096
"""Clients whose rate is remembered; the one that connected longest ago is forgotten first."""
DESCRIPTORS_SHARE: Final = 2
"""Connections take at most one in so many descriptors: the others are for segments, which must never lack one."""


class Refusal(NamedTuple):
    """Why a connection is closed unanswered. reason: as metrics have it. flood: it comes too soon after others."""

    reason: str
    message: str
    flood: bool = False


class Admission:
    """Keeps the counts. clock: monotonic seconds. descriptors: how many this process may have."""

    def __init__(self, settings: ServerSettings, descriptors: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._descriptors = descriptors
        self._open: dict[str, int] = {}
        self._total = 0
        self._tokens: dict[str, tuple[float, float]] = {}
        """For each client, the one that connected last at the end: connections that it may still make, and when that
        was so."""
        self.reconfigure(settings)

    def reconfigure(self, settings: ServerSettings) -> None:
        """These limits from now on."""
        self._settings = settings
        self.connections_max = min(settings.connections_max, self._descriptors // DESCRIPTORS_SHARE)

    def refuses(self, client: str) -> Refusal | None:
        """Why no connection of this client is let in now; None: it is, and it counts."""
        settings = self._settings
        if not self._token(client):
            message = f"{client} makes more than client_connects_per_second={settings.client_connects_per_second:g}"
            return Refusal("client_connects_per_second", message, flood=True)
        if self._total >= self.connections_max:
            return Refusal("connections_max", f"connections_max={self.connections_max} are open")
        mine = self._open.get(client, 0)
        if settings.client_connections_max and mine >= settings.client_connections_max:
            message = f"client_connections_max={settings.client_connections_max} of {client} are open"
            return Refusal("client_connections_max", message)
        self._open[client] = mine + 1
        self._total += 1
        return None

    def leave(self, client: str) -> None:
        """A connection of this client that was let in has ended."""
        self._total -= 1
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]

    def _token(self, client: str) -> bool:
        rate = self._settings.client_connects_per_second
        if not rate:
            return True
        now = self._clock()
        most = max(1.0, rate * BURST_SECONDS)
        left, since = self._tokens.pop(client, (most, now))
        left = min(most, left + (now - since) * rate)
        if len(self._tokens) >= CLIENTS_MAX:
            del self._tokens[next(iter(self._tokens))]
        self._tokens[client] = (left - 1 if left >= 1 else left, now)
        return left >= 1

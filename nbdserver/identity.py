"""Who a client is: the one name for it that lists, fences and access rules use, whatever its connections are called.

A client is the name of the certificate that it has shown, else the user at the other end of the Unix socket, else its
address. A client with several connections is one client.
"""

import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from objstore.errors import InvalidRequest

FENCES_MAX: Final = 4096
KINDS: Final = ("certificate", "uid", "address")
_CREDENTIALS: Final = struct.Struct("=iII")
"""struct ucred (unix(7)): pid, uid, gid."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of one connection. `str` names the connection in logs."""

    label: str
    address: str = ""
    """IP address, or `vsock:CID` of a guest; empty behind a Unix socket."""
    uid: int | None = None
    """User at the other end of a Unix socket, as the kernel noted when it connected."""
    certificate: str = ""
    """Distinguished name (RFC 4514) of the subject of a certificate that was verified; empty without one."""
    names: frozenset[str] = frozenset()
    """Every name in that certificate."""

    @property
    def client(self) -> str:
        """`certificate:NAME`, `uid:NUMBER` or `address:IP`."""
        if self.certificate:
            return f"certificate:{self.certificate}"
        return f"address:{self.address}" if self.uid is None else f"uid:{self.uid}"

    def __str__(self) -> str:
        return self.label


def peer_of(sock: socket.socket, address: object) -> Peer:
    """The peer of a socket that was accepted from `address`. OSError: it is gone."""
    if sock.family == socket.AF_UNIX:
        _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return Peer(f"unix:{sock.getsockname()}#{sock.fileno()}", uid=uid)
    assert isinstance(address, tuple)
    host, port = address[:2]
    if sock.family == socket.AF_VSOCK:
        return Peer(f"vsock:{host}:{port}", address=f"vsock:{host}")
    return Peer(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", address=host)


def check_client(text: str) -> str:
    """A client's name as it was given, if it can be one. InvalidRequest."""
    kind, colon, rest = text.partition(":")
    if kind not in KINDS or not colon or not rest or (kind == "uid" and not rest.isdecimal()):
        raise InvalidRequest(f"{text!r} is no client: certificate:NAME, uid:NUMBER and address:IP are")
    return text


class Fences:
    """Clients that may not use any export for now. Kept in memory only. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float | None] = {}

    def add(self, client: str, seconds: float | None = None) -> None:
        """Fence a client, for so long or (None) until `remove`. InvalidRequest: FENCES_MAX are fenced."""
        self._expire()
        if client not in self._until and len(self._until) >= FENCES_MAX:
            raise InvalidRequest(f"{FENCES_MAX} clients are fenced, which is the most that is possible")
        self._until[client] = None if seconds is None else self._clock() + seconds

    def remove(self, client: str) -> bool:
        """Let a client in again; False: it was not fenced."""
        self._expire()
        return self._until.pop(client, self) is not self

    def __contains__(self, client: str) -> bool:
        if client not in self._until:
            return False
        until = self._until[client]
        return until is None or until > self._clock()

    def seconds_left(self) -> dict[str, float | None]:
        """Every fenced client, by name; None: until somebody lets it in."""
        self._expire()
        now = self._clock()
        return {client: None if until is None else until - now for client, until in sorted(self._until.items())}

    def _expire(self) -> None:
        for client in [client for client in self._until if client not in self]:
            del self._until[client]

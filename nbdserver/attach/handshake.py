"""The client's half of NBD's handshake: where an export is, what the server says of it, a connection for the kernel.

Spec: proto.md, "Fixed newstyle negotiation", NBD_OPT_INFO, NBD_OPT_GO.
"""

import socket
import struct
from typing import Final, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from nbdserver.attach.errors import USAGE, AttachError

SOCKET_DEFAULT: Final = "/run/sheepfold/sheepfold.sock"
PORT: Final = 10809
CONNECT_SECONDS: Final = 10.0
"""For one connection and its handshake."""
OPTION_BYTES_MAX: Final = 1 << 20

NBD_MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
REPLY_MAGIC: Final = 0x3E889045565A9
FIXED_NEWSTYLE: Final = 1
NO_ZEROES: Final = 2
OPT_ABORT: Final = 2
OPT_INFO: Final = 6
OPT_GO: Final = 7
REP_ACK: Final = 1
REP_INFO: Final = 3
REP_ERROR: Final = 1 << 31
INFO_EXPORT: Final = 0
INFO_DESCRIPTION: Final = 2
CAN_MULTI_CONN: Final = 1 << 8
_OPTION: Final = struct.Struct(">QII")
_REPLY: Final = struct.Struct(">QIII")
IDENTITY_WORD: Final = ", identity "
IDENTITY_BYTES_MAX: Final = 128


class Place(NamedTuple):
    """Where an export is: a Unix socket (path) or TCP (host, port), and its name."""

    name: str
    path: str = ""
    host: str = ""
    port: int = PORT

    def __str__(self) -> str:
        return f"{self.name!r} at {self.path or f'{self.host}:{self.port}'}"


def parse_place(text: str) -> Place:
    """An NBD URI (nbd://HOST[:PORT]/NAME, nbd+unix:///NAME?socket=PATH), or a name at the default socket.

    AttachError: it is neither, or asks for TLS, which the kernel can't do by itself.
    """
    if "://" not in text:
        return Place(text, path=SOCKET_DEFAULT)
    try:
        parts = urlsplit(text)
        name = unquote(parts.path.removeprefix("/"))
        if parts.scheme == "nbd+unix":
            (path,) = parse_qs(parts.query, strict_parsing=True)["socket"]
            return Place(name, path=path)
        if parts.scheme == "nbd" and parts.hostname:
            return Place(name, host=parts.hostname, port=PORT if parts.port is None else parts.port)
    except (ValueError, KeyError) as error:
        raise AttachError(f"{text!r} is no NBD URI: {error}", USAGE) from error
    if parts.scheme.startswith("nbds"):
        raise AttachError(f"{text}: the kernel has no TLS of its own; use a tunnel, or nbd-client", USAGE)
    raise AttachError(f"{text!r} is no NBD URI: nbd://HOST[:PORT]/NAME and nbd+unix:///NAME?socket=PATH are", USAGE)


class Refused(Exception):
    """The server is there and does not give us the export. unknown: there is none of that name."""

    def __init__(self, message: str, *, unknown: bool) -> None:
        super().__init__(message)
        self.unknown = unknown


class Export(NamedTuple):
    """What the server says of it. identity: "" = it does not say which disk it is."""

    size_bytes: int
    flags: int
    identity: str


def connect(place: Place) -> tuple[socket.socket, Export]:
    """A connection in the transmission phase, without structured replies, which the kernel does not know.

    OSError: there is no server, or it does not speak NBD. Refused.
    """
    sock = _connection(place)
    try:
        export = _choose(sock, place.name, OPT_GO)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock, export


def ask(place: Place) -> Export:
    """What the server says of the export now. OSError, Refused."""
    with _connection(place) as sock:
        export = _choose(sock, place.name, OPT_INFO)
        sock.sendall(_OPTION.pack(OPTION_MAGIC, OPT_ABORT, 0))
    return export


def _connection(place: Place) -> socket.socket:
    if not place.path:
        # As bytes it needs no codec for international names, and so none of the tables behind that.
        host = place.host.encode() if place.host.isascii() else place.host
        sock = socket.create_connection((host, place.port), CONNECT_SECONDS)  # type: ignore[arg-type]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_SECONDS)
        sock.connect(place.path)
    except BaseException:
        sock.close()
        raise
    return sock


def _receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("the server ended the connection")
        data += piece
    return data


def _choose(sock: socket.socket, name: str, option: int) -> Export:
    """The handshake, with one option (GO or INFO)."""
    magic, option_magic, flags = struct.unpack(">QQH", _receive(sock, 18))
    if magic != NBD_MAGIC or option_magic != OPTION_MAGIC or not flags & FIXED_NEWSTYLE:
        raise ConnectionError("it is no NBD server of the fixed newstyle kind")
    encoded = name.encode()
    data = struct.pack(">I", len(encoded)) + encoded + struct.pack(">HH", 1, INFO_DESCRIPTION)
    client_flags = struct.pack(">I", FIXED_NEWSTYLE | flags & NO_ZEROES)
    sock.sendall(client_flags + _OPTION.pack(OPTION_MAGIC, option, len(data)) + data)
    size_bytes, export_flags, description = -1, 0, ""
    while True:
        magic, answered, kind, length = _REPLY.unpack(_receive(sock, _REPLY.size))
        if magic != REPLY_MAGIC or answered != option or length > OPTION_BYTES_MAX:
            raise ConnectionError("its answer can't be understood")
        body = _receive(sock, length)
        if kind == REP_ACK:
            break
        if kind & REP_ERROR:
            text = body.decode(errors="replace") or f"error {kind & ~REP_ERROR}"
            raise Refused(text, unknown=kind & ~REP_ERROR == 6)
        if kind == REP_INFO and length == 12 and body[:2] == b"\0\0":
            size_bytes, export_flags = struct.unpack(">QH", body[2:])
        elif kind == REP_INFO and body[:2] == struct.pack(">H", INFO_DESCRIPTION):
            description = body[2:].decode(errors="replace")
    if size_bytes < 0:
        raise ConnectionError("it does not say how large the export is")
    return Export(size_bytes, export_flags, identity_of(description))


def identity_of(description: str) -> str:
    """The identity at the end of an export's description, "" if there is none."""
    _, word, identity = description.rpartition(IDENTITY_WORD)
    fits = word and identity.isascii() and identity.isprintable() and " " not in identity
    return identity if fits and 0 < len(identity) <= IDENTITY_BYTES_MAX else ""

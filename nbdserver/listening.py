"""Where a server listens: Unix sockets, TCP, AF_VSOCK, and sockets that the service manager has opened."""

import contextlib
import errno
import os
import socket
import stat
from typing import Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from nbdserver.wire.constants import PORT

BACKLOG: Final = 128
FORMS: Final = "unix:///PATH, tcp://HOST:PORT or vsock://CID:PORT"
VSOCK_HOST_CID: Final = socket.VMADDR_CID_HOST
"""The address at which guests find their host."""
VSOCK_MAX: Final = 0xFFFFFFFF
"""Greatest context id and port (vsock(7)); as an id VMADDR_CID_ANY."""


class Listener(NamedTuple):
    """Where to listen: a Unix socket (path), TCP (host, port), or AF_VSOCK (cid, port)."""

    path: str | None = None
    host: str = ""
    port: int = PORT
    cid: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Listener":
        """`unix:///PATH`, `tcp://HOST:PORT` (IPv6 hosts in brackets) or `vsock://CID:PORT` (CID `any`: all of this
        machine's). Port 10809 if left out. ValueError."""
        parts = urlsplit(text)
        if parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"listener is {FORMS}, not {text!r}")
        if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/") and len(parts.path) > 1:
            path = unquote(parts.path, errors="surrogateescape")
            if "\0" in path:
                raise ValueError(f"a path has no NUL characters, but {text!r} has")
            return cls(path=path)
        if parts.scheme == "tcp" and parts.hostname and parts.path in ("", "/"):
            return cls(host=parts.hostname, port=PORT if parts.port is None else parts.port)
        if parts.scheme == "vsock" and parts.netloc and parts.path in ("", "/"):
            cid, colon, port = parts.netloc.partition(":")
            return cls(
                cid=socket.VMADDR_CID_ANY if cid == "any" else _vsock_number(cid, text),
                port=_vsock_number(port, text) if colon else PORT,
            )
        raise ValueError(f"listener is {FORMS}, not {text!r}")

    def uri(self, export_name: str, *, tls: bool = False) -> str:
        """The NBD URI of an export behind this listener. tls: with TLS only."""
        scheme = "nbds" if tls else "nbd"
        name = quote(export_name, safe="")
        if self.path is not None:
            return f"{scheme}+unix:///{name}?socket={quote(self.path, safe='/')}"
        port = "" if self.port == PORT else f":{self.port}"
        if self.cid is not None:
            return f"{scheme}+vsock://{VSOCK_HOST_CID if self.cid == socket.VMADDR_CID_ANY else self.cid}{port}/{name}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}{port}/{name}"

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}"
        if self.cid is not None:
            return f"vsock://{'any' if self.cid == socket.VMADDR_CID_ANY else self.cid}:{self.port}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


def _vsock_number(text: str, whole: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < VSOCK_MAX):
        raise ValueError(f"listener is {FORMS}, not {whole!r}: a CID and a port are numbers below {VSOCK_MAX}")
    return int(text)


class Listening:
    """The listening sockets of one server. `sockets`: with where they listen, ports filled in."""

    def __init__(self) -> None:
        self.sockets: list[tuple[socket.socket, Listener]] = []
        self._paths: list[tuple[str, tuple[int, int]]] = []

    def open(self, listener: Listener) -> None:
        """Listen there, at several addresses if a host name has several. OSError: none of them is open then."""
        if listener.path is not None:
            self.sockets.append((_listen_unix(listener.path), listener))
            self._paths.append((listener.path, _identity(listener.path)))
        elif listener.cid is not None:
            self.sockets.append(_listen_vsock(listener))
        else:
            self.sockets += _listen_tcp(listener)

    def take(self, sock: socket.socket) -> None:
        """Go on with a socket that listens already; its file, if it has one, is somebody else's. ValueError: it is no
        stream socket that listens at an address of a kind that we know."""
        listener = address_of(sock)
        sock.setblocking(False)
        self.sockets.append((sock, listener))

    def close(self) -> None:
        """Stop listening, and remove the socket files that are still the ones made here. Idempotent."""
        for sock, _ in self.sockets:
            sock.close()
        self.sockets.clear()
        for path, identity in self._paths:
            with contextlib.suppress(OSError):
                if _identity(path) == identity:
                    os.unlink(path)
        self._paths.clear()


def address_of(sock: socket.socket) -> Listener:
    """Where a socket listens. ValueError: it is no stream socket that listens at an address of a kind that we know."""
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError("it is not a stream socket that listens")
    address = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        path = os.fsdecode(address)
        return Listener(path="@" + path[1:] if path.startswith("\0") else path)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return Listener(host=str(address[0]), port=address[1])
    if sock.family == socket.AF_VSOCK:
        return Listener(cid=_cid(address[0]), port=address[1])
    raise ValueError(f"its address family {sock.family} is none of Unix, TCP and vsock")


def _cid(cid: int) -> int:
    """As the constants of the socket module have it: VMADDR_CID_ANY may be -1 there."""
    return socket.VMADDR_CID_ANY if cid & VSOCK_MAX == VSOCK_MAX else cid


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _listen_tcp(listener: Listener) -> list[tuple[socket.socket, Listener]]:
    try:
        found = socket.getaddrinfo(listener.host, listener.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(errno.EADDRNOTAVAIL, f"can't listen on {listener}: {reason}") from error
    bound: list[tuple[socket.socket, Listener]] = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            for other, _ in bound:
                other.close()
            raise OSError(error.errno, f"can't listen on {listener}: {error.strerror}") from error
        host, port = sock.getsockname()[:2]
        bound.append((sock, Listener(host=str(host), port=port)))
    return bound


def _listen_vsock(listener: Listener) -> tuple[socket.socket, Listener]:
    assert listener.cid is not None
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise OSError(error.errno, f"can't listen on {listener}: {error.strerror}") from error
    try:
        sock.bind((listener.cid, listener.port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"can't listen on {listener}: {error.strerror}") from error
    return sock, listener


def _listen_unix(path: str) -> socket.socket:
    """A listening Unix socket. A socket file that nobody listens on is replaced, anything else is left alone."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"can't listen on unix://{path}: {reason}") from error
    return sock


def _is_stale(path: str) -> bool:
    """A socket file whose server is gone."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED

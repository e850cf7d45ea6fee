"""Listeners, the list of connections, and the stop.

Several listeners (Unix sockets, TCP), one event loop, one set of exports. A stop never sends an error: listeners close,
every connection finishes and answers what it has received and closes, then the volumes are flushed.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import time
from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from nbdserver.connection import Common, Connection
from nbdserver.exports import Exports
from nbdserver.identity import Fences, peer_of
from nbdserver.settings import ServerSettings
from nbdserver.wire.constants import PORT
from objstore.access.api import ClientStatus
from objstore.errors import StoreError
from objstore.volume.base import Volume, VolumeSource

__all__ = ["Listener", "Server", "ServerSettings"]

log = logging.getLogger(__name__)

BACKLOG: Final = 128
ACCEPTS_MAX: Final = 16
"""Connections accepted in one turn of the loop."""
ACCEPT_PAUSE_SECONDS: Final = 1.0
"""Wait after running out of descriptors or memory for sockets."""
WATCH_SECONDS: Final = 1.0
"""How often connections that stand in others' way are looked for."""
KICK_SECONDS: Final = 5.0
"""How long connections that are told to end have for it."""
SO_SNDBUFFORCE: Final = 32
"""asm-generic/socket.h; the socket module does not name it."""
KEEPALIVE_IDLE_SECONDS: Final = 60
KEEPALIVE_INTERVAL_SECONDS: Final = 10
KEEPALIVE_COUNT: Final = 6
"""A dead peer is noticed after two minutes of silence."""


class Listener(NamedTuple):
    """Where to listen: a Unix socket (path) or TCP (host, port)."""

    path: str | None = None
    host: str = ""
    port: int = PORT

    @classmethod
    def parse(cls, text: str) -> "Listener":
        """`unix:///PATH` or `tcp://HOST:PORT` (port 10809 if left out, IPv6 hosts in brackets). ValueError."""
        parts = urlsplit(text)
        if parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"listener is unix:///PATH or tcp://HOST:PORT, not {text!r}")
        if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/") and len(parts.path) > 1:
            path = unquote(parts.path, errors="surrogateescape")
            if "\0" in path:
                raise ValueError(f"a path has no NUL characters, but {text!r} has")
            return cls(path=path)
        if parts.scheme == "tcp" and parts.hostname and parts.path in ("", "/"):
            return cls(host=parts.hostname, port=PORT if parts.port is None else parts.port)
        raise ValueError(f"listener is unix:///PATH or tcp://HOST:PORT, not {text!r}")

    def uri(self, export_name: str) -> str:
        """The NBD URI of an export behind this listener."""
        name = quote(export_name, safe="")
        if self.path is not None:
            return f"nbd+unix:///{name}?socket={quote(self.path, safe='/')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == PORT else f":{self.port}"
        return f"nbd://{host}{port}/{name}"

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


class Server:
    """An NBD server over the volumes of `source`. `start`, `stop`, once each; every method in the event loop."""

    def __init__(self, source: VolumeSource, settings: ServerSettings | None = None) -> None:
        self.settings = settings or ServerSettings()
        self.listeners: list[Listener] = []
        """Where the server listens, ports filled in."""
        self._exports = Exports(source, self.settings.default_export)
        self._common = Common(self.settings, self._exports, self._entered)
        self._sockets: list[tuple[socket.socket, Listener]] = []
        self._connections: dict[Connection, asyncio.Task[None]] = {}
        self._paths: list[tuple[str, tuple[int, int]]] = []
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self, listeners: Sequence[Listener]) -> None:
        """Listen and serve. OSError, with nothing left open, if a listener can't be had."""
        loop = asyncio.get_running_loop()
        try:
            for listener in listeners:
                for sock, actual in self._bind(listener):
                    self._sockets.append((sock, actual))
                    self.listeners.append(actual)
        except BaseException:
            self._close_listeners()
            raise
        for sock, _ in self._sockets:
            loop.add_reader(sock.fileno(), self._accept, sock)
        self._watcher = loop.create_task(self._watch())

    async def stop(self) -> None:
        """Finish and answer what was received, close every connection, flush the volumes. Idempotent.

        After stop_seconds what has not finished is cut off.
        """
        if self._stopping:
            return
        self._stopping = True
        loop = asyncio.get_running_loop()
        for sock, _ in self._sockets:
            loop.remove_reader(sock.fileno())
        self._close_listeners()
        if self._watcher is not None:
            self._watcher.cancel()
        names = {connection.export for connection in self._connections}
        volumes = [await self._hold(name) for name in names if name is not None]
        for connection in list(self._connections):
            connection.stop()
        tasks = list(self._connections.values())
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=self.settings.stop_seconds)
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for volume in volumes:
            if volume is not None:
                await self._flush_and_close(volume)

    async def _hold(self, name: str) -> Volume | None:
        """Keep a volume open for its last flush."""
        try:
            return await self._exports.source.open(name)
        except StoreError as error:
            log.error("no flush at the stop export=%s: %s", name, error)
            return None

    async def _flush_and_close(self, volume: Volume) -> None:
        try:
            await volume.flush()
        except StoreError as error:
            log.error("flush at the stop failed export=%s: %s", volume.name, error)
        finally:
            await self._exports.source.close(volume)

    def clients(self) -> list[ClientStatus]:
        """Every connection, oldest first."""
        return [connection.info() for connection in self._connections]

    @property
    def fences(self) -> Fences:
        """Clients that may not open any export."""
        return self._common.fences

    async def kick(self, client: str, connection: int | None = None) -> int:
        """End the connections of a client, or the one of that number: they answer what they have received and close;
        after KICK_SECONDS what has not is cut off. How many they were."""
        going = self._of(client, connection)
        for one in going:
            one.stop()
        tasks = [self._connections[one] for one in going]
        if tasks:
            await asyncio.wait(tasks, timeout=KICK_SECONDS)
            for one in going:
                one.abort("it was asked to end and did not")
        return len(going)

    async def fence(self, client: str, seconds: float | None) -> tuple[int, bool]:
        """Refuse a client from now on and end its connections at once: what they asked for and has not happened yet
        does not happen. How many they were; False: KICK_SECONDS later something of them is still under way."""
        self.fences.add(client, seconds)
        going = self._of(client, None)
        for one in going:
            one.revoke("its client was fenced")
        try:
            async with asyncio.timeout(KICK_SECONDS):
                for one in going:
                    await one.settled()
        except TimeoutError:
            return len(going), False
        return len(going), True

    def _of(self, client: str, number: int | None) -> list[Connection]:
        return [one for one in self._connections if one.client == client and number in (None, one.number)]

    def _bind(self, listener: Listener) -> list[tuple[socket.socket, Listener]]:
        """Listening sockets for one listener: several if its host name has several addresses."""
        if listener.path is not None:
            sock = _listen_unix(listener.path)
            self._paths.append((listener.path, _identity(listener.path)))
            return [(sock, listener)]
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

    def _close_listeners(self) -> None:
        for sock, _ in self._sockets:
            sock.close()
        self._sockets.clear()
        for path, identity in self._paths:
            with contextlib.suppress(OSError):
                if _identity(path) == identity:
                    os.unlink(path)
        self._paths.clear()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_MAX):
            try:
                sock, address = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause_accepting(listening, error)
                    return
                continue
            sock.setblocking(False)
            if len(self._connections) >= self.settings.connections_max:
                self._common.complain(
                    "refused", "connection refused: connections_max=%d are open", self.settings.connections_max
                )
                sock.close()
                continue
            try:
                self._prepare(sock)
                peer = peer_of(sock, address)
            except OSError:
                sock.close()
                continue
            connection = Connection(sock, peer, self._common)
            task = asyncio.get_running_loop().create_task(connection.run())
            self._connections[connection] = task
            task.add_done_callback(partial(self._gone, connection))

    def _pause_accepting(self, listening: socket.socket, error: OSError) -> None:
        self._common.complain("accept", "no connection can be accepted for now: %s", error)
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening.fileno())
        loop.call_later(ACCEPT_PAUSE_SECONDS, self._accept_again, listening)

    def _accept_again(self, listening: socket.socket) -> None:
        if not self._stopping:
            asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def _prepare(self, sock: socket.socket) -> None:
        """Set the options of an accepted socket."""
        if sock.family == socket.AF_UNIX:
            _set_send_buffer(sock, self.settings.socket_buffer_bytes)
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)

    async def _entered(self, newcomer: Connection) -> None:
        """A client that reconnects may have left a connection behind whose writes are older than what it will send:
        connections of the export whose peer has hung up end, and what they had not read is dropped. Those that ended
        with DISC finish first, as long as that takes less than stall_seconds."""
        before = [c for c in self._connections if c is not newcomer and c.export == newcomer.export]
        leaving = []
        for connection in before:
            if not connection.alive():
                connection.abort("its peer hung up and the export has a newer client")
            elif connection.disconnected or connection.hung_up():
                leaving.append(connection)
        try:
            async with asyncio.timeout(self.settings.stall_seconds):
                for connection in leaving:
                    await connection.settled()
        except TimeoutError:
            for connection in leaving:
                connection.revoke("it does not come to its end and the export has a newer client")

    def _gone(self, connection: Connection, task: asyncio.Task[None]) -> None:
        del self._connections[connection]
        if self._common.last_active is connection:
            self._common.last_active = None
        if not task.cancelled() and task.exception() is not None:
            log.error("connection failed peer=%s", connection.peer, exc_info=task.exception())

    async def _watch(self) -> None:
        """Close connections that do not move while they hold buffers that others wait for."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._common.pool.short:
                limit = time.monotonic() - self.settings.stall_seconds
                for connection in list(self._connections):
                    if connection.stalled_since is not None and connection.stalled_since < limit:
                        connection.abort("it stalled and others wait for its memory")


def _set_send_buffer(sock: socket.socket, size_bytes: int) -> None:
    """Beyond the system's limit where we may (CAP_NET_ADMIN), else up to it; 0 leaves the default."""
    if not size_bytes:
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, size_bytes)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes)


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


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

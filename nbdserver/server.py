"""Listeners, the list of connections, and the stop.

Several listeners, one event loop, one set of exports. A stop never sends an error: listeners close, every connection
finishes and answers what it has received and closes, then the volumes are flushed.
"""

import asyncio
import errno
import logging
import resource
import socket
from collections.abc import Sequence
from functools import partial
from typing import Final

from nbdserver.access import Access
from nbdserver.admission import Admission, Refusal
from nbdserver.common import Common
from nbdserver.connection import Connection
from nbdserver.exports import Exports
from nbdserver.identity import Fences, peer_of
from nbdserver.keepalive import USUAL
from nbdserver.listening import Listener, Listening
from nbdserver.meters import Meters, Network
from nbdserver.settings import ServerSettings
from nbdserver.stalls import Stalls
from nbdserver.tls import Tls
from objstore.access.api import ClientStatus
from objstore.errors import StoreError
from objstore.volume.base import Volume, VolumeSource

__all__ = ["Listener", "Server", "ServerSettings"]

log = logging.getLogger(__name__)

ACCEPTS_MAX: Final = 16
"""Connections accepted in one turn of the loop."""
ACCEPT_PAUSE_SECONDS: Final = 1.0
"""Wait after running out of descriptors or memory for sockets."""
WATCH_SECONDS: Final = 1.0
"""How often connections that stand in others' way are looked for."""
REFUSALS_MAX: Final = 64
REFUSAL_PAUSE_SECONDS: Final = 0.05
"""After so many connections that came too soon, nothing is accepted for so long: turning them away takes time, too."""
KICK_SECONDS: Final = 5.0
"""How long connections that are told to end have for it."""
SO_SNDBUFFORCE: Final = 32
"""asm-generic/socket.h; the socket module does not name it."""


class Server:
    """An NBD server over the volumes of `source`. `start`, `stop`, once each; every method in the event loop."""

    def __init__(self, source: VolumeSource, settings: ServerSettings | None = None, *, tls: Tls | None = None) -> None:
        self.settings = settings or ServerSettings()
        self.listeners: list[Listener] = []
        """Where the server listens, ports filled in."""
        self._exports = Exports(source, self.settings.default_export, list_snapshots=self.settings.list_snapshots)
        self._common = Common(self.settings, self._exports, self._entered, tls)
        self._listening = Listening()
        self._connections: dict[Connection, asyncio.Task[None]] = {}
        self._ended_before = 0
        """Requests of connections that are gone."""
        self._watcher: asyncio.Task[None] | None = None
        self._admission = Admission(self.settings, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._flood = 0
        """Connections refused because they came too soon, since accepting was paused last."""
        self._stopping = False

    async def start(self, listeners: Sequence[Listener], handed: Sequence[socket.socket] = ()) -> None:
        """Listen and serve. OSError, with nothing left open, if a listener can't be had.

        handed: sockets that listen already and are this server's from now on; ValueError if one can't be used.
        """
        loop = asyncio.get_running_loop()
        listening = self._listening
        try:
            for sock in handed:
                listening.take(sock)
            for listener in listeners:
                listening.open(listener)
        except BaseException:
            listening.close()
            for sock in handed:
                sock.close()
            raise
        for sock, actual in listening.sockets:
            self.listeners.append(actual)
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
        for sock, _ in self._listening.sockets:
            loop.remove_reader(sock.fileno())
        self._listening.close()
        if self._watcher is not None:
            self._watcher.cancel()
        names = {connection.volume.name for connection in self._connections if connection.volume is not None}
        volumes = [await self._hold(name) for name in names]
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

    async def give_up(self, volume: Volume, reason: str, *, orderly: bool) -> None:
        """See Holder."""
        going = {one: task for one, task in self._connections.items() if one.volume is volume}
        if not going:
            return
        if orderly:
            for connection in going:
                connection.stop()
            await asyncio.wait(going.values(), timeout=KICK_SECONDS)
        for connection in going:
            connection.revoke(reason)
        await asyncio.wait(going.values())

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

    def use_access(self, access: Access) -> None:
        """These rules for clients that come from now on. Those that are attached stay."""
        self._exports.access = access

    def use_tls(self, tls: Tls | None) -> None:
        """TLS for connections that begin from now on: other certificates, another mode, or none. Open ones go on."""
        self._common.tls = tls

    def clients(self) -> list[ClientStatus]:
        """Every connection, oldest first."""
        return [connection.info() for connection in self._connections]

    def reconfigure(self, settings: ServerSettings) -> None:
        """These settings from now on, for clients that are here too. Nobody is disconnected: what is above a lower
        limit goes by itself."""
        self.settings = settings
        self._common.settings = settings
        self._common.pool.set_bytes_max(settings.buffer_bytes_max)
        self._admission.reconfigure(settings)
        self._exports.default = settings.default_export
        self._exports.list_snapshots = settings.list_snapshots
        for connection in self._connections:
            connection.reconfigure(settings)

    def progress(self) -> tuple[int, int]:
        """(requests that have ended since the start, requests that volumes work on now)."""
        known = [connection.info() for connection in self._connections]
        in_flight = sum(one.in_flight for one in known)
        return self._ended_before + sum(one.request_count for one in known) - in_flight, in_flight

    def meter(self) -> None:
        """Count requests for each export; before `start`."""
        self._common.meters = Meters()

    def network(self) -> Network:
        """What it counts, as metrics want it."""
        common = self._common
        return Network(
            meters=[] if common.meters is None else common.meters.copies(),
            clients=self.clients(),
            counts=common.counts,
            fenced=len(common.fences.seconds_left()),
            buffer_bytes=common.pool.held_bytes,
            buffer_bytes_max=common.pool.bytes_max,
            connections_max=self._admission.connections_max,
        )

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

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_MAX):
            try:
                sock, address = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._common.complain("accept", "no connection can be accepted for now: %s", error)
                    self._pause_accepting(listening, ACCEPT_PAUSE_SECONDS)
                    return
                continue
            try:
                peer = peer_of(sock, address)
                sock.setblocking(False)
                self._prepare(sock)
            except OSError:
                sock.close()
                continue
            refusal = self._admission.refuses(peer.client)
            if refusal is not None:
                sock.close()
                if self._refused(refusal):
                    self._pause_accepting(listening, REFUSAL_PAUSE_SECONDS)
                    return
                continue
            self._common.counts.accepted += 1
            connection = Connection(sock, peer, self._common)
            task = asyncio.get_running_loop().create_task(connection.run())
            self._connections[connection] = task
            task.add_done_callback(partial(self._gone, connection, peer.client))

    def _refused(self, refusal: Refusal) -> bool:
        """Note a connection that was closed unanswered. True: so many came too soon that it is time to rest."""
        self._common.counts.refuse(refusal.reason)
        self._common.complain(("refused", refusal.reason), "connection refused: %s", refusal.message)
        self._flood += refusal.flood
        if self._flood < REFUSALS_MAX:
            return False
        self._flood = 0
        return True

    def _pause_accepting(self, listening: socket.socket, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening.fileno())
        loop.call_later(seconds, self._accept_again, listening)

    def _accept_again(self, listening: socket.socket) -> None:
        if not self._stopping:
            asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def _prepare(self, sock: socket.socket) -> None:
        """Set the options of an accepted socket."""
        if sock.family == socket.AF_UNIX:
            _set_send_buffer(sock, self.settings.socket_buffer_bytes)
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        USUAL.apply(sock)

    async def _entered(self, newcomer: Connection) -> None:
        """A client that reconnects may have left a connection behind whose writes are older than what it will send:
        connections of the export whose peer has hung up end, and what they had not read is dropped. Those that ended
        with DISC finish first, as long as that takes less than stall_seconds."""
        # By the volume, not by the name: it may have got another one since.
        before = [c for c in self._connections if c is not newcomer and c.volume is newcomer.volume]
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

    def _gone(self, connection: Connection, client: str, task: asyncio.Task[None]) -> None:
        del self._connections[connection]
        self._admission.leave(client)
        self._ended_before += connection.info().request_count
        if self._common.last_active is connection:
            self._common.last_active = None
        if not task.cancelled() and task.exception() is not None:
            log.error("connection failed peer=%s", connection.peer, exc_info=task.exception())

    async def _watch(self) -> None:
        """Close connections that hardly move while they hold buffers that others wait for."""
        stalls: Stalls[Connection] = Stalls()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            short, stall_seconds = self._common.pool.short, self.settings.stall_seconds
            for connection in stalls.found(self._connections, short=short, stall_seconds=stall_seconds):
                self._common.counts.stalled += 1
                connection.abort("it stalled and others wait for its memory")


def _set_send_buffer(sock: socket.socket, size_bytes: int) -> None:
    """Beyond the system's limit where we may (CAP_NET_ADMIN), else up to it; 0 leaves the default."""
    if not size_bytes:
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, size_bytes)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes)

"""The metrics endpoint: GET /metrics over TCP, read-only, in the server's event loop.

Anyone who can connect may read it. However often it is asked, the store is looked at once every FRESH_SECONDS and the
zones' space, which takes a walk over their files, once every SPACE_SECONDS.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol
from urllib.parse import urlsplit

from aiohttp import web

from nbdserver.http_log import http_log
from nbdserver.meters import Network
from nbdserver.metrics import Snapshot, exposition
from objstore.errors import InvalidRequest, StoreError
from objstore.volume.status import StoreStatus, VdiStatus, ZoneStatus

PORT: Final = 9847
FRESH_SECONDS: Final = 0.5
SPACE_SECONDS: Final = 60.0
CONNECTIONS_MAX: Final = 32
"""More are closed at once: descriptors are for disks."""
LIFE_SECONDS: Final = 60.0
"""A connection that is so old takes no further request; one that is twice as old is closed whatever its client does."""

HTTP_LOG: Final = http_log(__name__)


class MeteredStore(Protocol):
    """What the metrics need of a store."""

    async def status(self, *, thorough: bool = True) -> StoreStatus: ...
    def open_statuses(self) -> list[VdiStatus]: ...


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `tcp://HOST[:PORT]`. InvalidRequest."""
    try:
        parts = urlsplit(text)
        if parts.scheme != "tcp" or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ValueError("it is tcp://HOST:PORT")
        return parts.hostname, PORT if parts.port is None else parts.port
    except ValueError as error:
        raise InvalidRequest(f"metrics address {text!r}: {error}") from error


class _TurnedAway(asyncio.BaseProtocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        transport.close()


class MetricsServer:
    """Answers scrapes from `start` to `stop`."""

    def __init__(self, store: MeteredStore, network: Callable[[], Network]) -> None:
        self.address = ("", 0)
        """Where it listens, the port filled in."""
        self._store = store
        self._network = network
        self._taken_at = 0.0
        self._taking: asyncio.Task[Snapshot] | None = None
        self._space: Sequence[ZoneStatus] = ()
        self._space_at: float | None = None
        self._measuring: asyncio.Task[None] | None = None
        app = web.Application(client_max_size=0)
        app.add_routes([web.get("/metrics", self._answer), web.get("/", self._root)])
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, logger=HTTP_LOG)
        self._listener: asyncio.Server | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, text: str) -> None:
        """Listen. InvalidRequest: the address is wrong or can't be had."""
        host, port = parse_address(text)
        await self._runner.setup()
        try:
            listener = await asyncio.get_running_loop().create_server(self._connected, host, port, backlog=16)
        except OSError as error:
            await self._runner.cleanup()
            raise InvalidRequest(f"metrics address {text!r}: {error.strerror or error}") from error
        self._listener = listener
        self._watcher = asyncio.create_task(self._watch())
        self.address = listener.sockets[0].getsockname()[:2]

    def _connected(self) -> asyncio.BaseProtocol:
        """What serves a new connection."""
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= CONNECTIONS_MAX:
            return _TurnedAway()
        return server()

    async def _watch(self) -> None:
        """See that connections end."""
        server = self._runner.server
        assert server is not None
        old: set[web.RequestHandler] = set()
        known: set[web.RequestHandler] = set()
        while True:
            await asyncio.sleep(LIFE_SECONDS)
            now = set(server.connections)
            for handler in now & old:
                handler.force_close()
            for handler in now & known:
                handler.close()
            old, known = now & known, now

    async def stop(self) -> None:
        """Idempotent."""
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()
        tasks = [task for task in (self._taking, self._measuring, self._watcher) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._taking = self._measuring = self._watcher = None

    async def _answer(self, request: web.Request) -> web.Response:
        now = time.monotonic()
        if self._taking is None or (self._taking.done() and now - self._taken_at >= FRESH_SECONDS):
            self._taken_at = now
            self._taking = asyncio.create_task(self._take())
        try:
            snapshot = await asyncio.shield(self._taking)
        except StoreError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from error
        body, content_type = await asyncio.to_thread(exposition, snapshot, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _root(self, request: web.Request) -> web.Response:
        return web.Response(text="sheepfold: see /metrics\n")

    async def _take(self) -> Snapshot:
        if self._measuring is None and (self._space_at is None or time.monotonic() - self._space_at >= SPACE_SECONDS):
            self._measuring = asyncio.create_task(self._measure())
        status = await self._store.status(thorough=False)
        return Snapshot(self._network(), status, self._store.open_statuses(), self._space)

    async def _measure(self) -> None:
        """Ask the zones for their space; one that hangs makes that late, not the scrapes."""
        try:
            self._space = (await self._store.status()).zones
            self._space_at = time.monotonic()
        except StoreError as error:
            HTTP_LOG.info("the zones' space is not known: %s", error)
        finally:
            self._measuring = None

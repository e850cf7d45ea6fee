"""The life of `sheepfold serve`: zones, missing VDIs, control socket, listeners, a signal, and back in reverse order.

Stopping: the listeners close and every connection finishes what it received; then the control socket goes; then the
store makes everything durable and gives its zones back. A second signal ends the process at once, which costs what a
crash costs: nothing that was flushed.
"""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit

import msgspec
import uvloop

from nbdserver.access import Access
from nbdserver.admission import DESCRIPTORS_SHARE
from nbdserver.config import VdiConfig
from nbdserver.control import ControlServer
from nbdserver.control_clients import ClientOperations
from nbdserver.control_server import ServerOperations
from nbdserver.flusher import lock_memory, mark_as_flusher
from nbdserver.handshake import TlsMode
from nbdserver.heartbeat import Heartbeat, Progress
from nbdserver.listening import Listener, address_of
from nbdserver.logs import FORMATS
from nbdserver.runtime import NBD_ADDRESS, NBD_SOCKET, control_path, make_runtime_directory, runtime_directory
from nbdserver.server import Server, ServerSettings
from nbdserver.systemd import HandedSocket, handed_sockets, notify, reloading
from nbdserver.tls import Tls, TlsSettings, load_tls
from objstore.access.api import LockNote, ServerStatus
from objstore.errors import InvalidRequest, NotFound, StoreError
from objstore.volume.directories import zone_paths
from objstore.volume.settings import StoreSettings
from objstore.volume.store import Store, open_store

if TYPE_CHECKING:
    from nbdserver.metrics_http import MetricsServer

LOG: Final = logging.getLogger(__name__)
GC_THRESHOLD: Final = 50_000
VSOCK_LOOPBACK_CID: Final = 1
"""VMADDR_CID_LOCAL (vsock(7)), which the socket module does not name."""
RELOAD_SIGNAL: Final = signal.SIGHUP
NEEDING_RESTART: Final = ("zones", "listen", "control", "metrics", "log_format", "store", "swap")
"""Fields of a plan that a reload does not change."""
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
CONTROL_NAME: Final = "control"
"""FileDescriptorName= of a control socket that the service manager opens."""


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What to serve, from command line and configuration. Empty `listen` = the sockets that the service manager hands
    over, without those the default listeners."""

    zones: Sequence[Path]
    vdis: Mapping[str, VdiConfig] = field(default_factory=dict)
    listen: Sequence[str] = ()
    default: str | None = None
    control: Path | None = None
    metrics: str | None = None
    """Where to answer scrapes; None = nowhere."""
    log_format: str = FORMATS[0]
    store: StoreSettings = field(default_factory=StoreSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    force: bool = False
    """Open the store without zones that may hold something newer."""
    tls: TlsSettings = field(default_factory=TlsSettings)
    access: Access = field(default_factory=Access)
    swap: bool = False
    """Keep all memory, because clients swap to a disk of ours."""

    @property
    def server_settings(self) -> ServerSettings:
        """Those of the network side, with the default export."""
        return dataclasses.replace(self.server, default_export=self.default)


@dataclass(frozen=True, slots=True)
class Ready:
    """The server accepts connections."""

    listeners: Sequence[Listener]
    exports: Sequence[tuple[str, int]]
    """Name and size in bytes."""
    tls_only: bool = False
    """No client is served without TLS."""


def run(
    plan: ServePlan,
    ready: Callable[[Ready], None],
    opened: Callable[[], None],
    reread: Callable[[], ServePlan] | None = None,
) -> None:
    """Serve until a signal. opened: called when the zones are open; ready: when connections are accepted.

    reread: the plan as it is now, for SIGHUP and `sheepfold reload`; StoreError refuses it. In a thread of its own.
    """
    if not mark_as_flusher():
        LOG.info("not marked as I/O flusher: no permission (CAP_SYS_RESOURCE), or the kernel is older than 5.6")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(plan, ready, opened, reread or (lambda: plan)))


async def serve(
    plan: ServePlan, ready: Callable[[Ready], None], opened: Callable[[], None], reread: Callable[[], ServePlan]
) -> None:
    """As `run`, inside a running loop that it takes the signals of."""
    stop, reload = asyncio.Event(), asyncio.Event()
    _on_signals(asyncio.get_running_loop(), stop, reload)
    _raise_descriptor_limit(plan.server.connections_max)
    tls = load_tls(plan.tls)
    _check_access(plan)
    if plan.swap:
        lock_memory()
    handed = handed_sockets(os.environ, os.getpid())
    try:
        where = places(plan, handed)
        note = msgspec.json.encode(LockNote(pid=os.getpid(), control=os.fspath(where.control))).decode()
        zones = _all_zones(plan.zones)
        store = await open_store(zones, settings=plan.store, create=True, lock_note=note, force=plan.force)
        _tune_collector()
        opened()
        try:
            await _create_missing(store, plan.vdis)
            _check_default(store, plan.default)
            await _serve_store(store, plan, where, ready, stop, reload, reread, tls)
        finally:
            await store.shutdown()
    finally:
        for one in handed:
            one.socket.close()


async def _serve_store(
    store: Store,
    plan: ServePlan,
    where: "Places",
    ready: Callable[[Ready], None],
    stop: asyncio.Event,
    reload: asyncio.Event,
    reread: Callable[[], ServePlan],
    tls: Tls | None,
) -> None:
    server = Server(store, plan.server_settings, tls=tls)
    server.use_access(plan.access)
    reloader = Reloader(store, server, plan, reread)
    heartbeat = Heartbeat(lambda: _progress(store, server), time.monotonic)

    def server_status() -> ServerStatus:
        listen = [str(listener) for listener in server.listeners]
        return ServerStatus(pid=os.getpid(), listen=listen, clients=len(server.clients()))

    store.holders.append(server)
    more = [ClientOperations(server), ServerOperations(reloader.reload)]
    control_server = ControlServer(store, server_status, more)
    metrics = await _start_metrics(plan.metrics, store, server)
    try:
        await control_server.start(where.control, where.control_socket)
        await server.start(where.listeners, where.handed)
        exports = [(vdi.name, vdi.size_bytes) for vdi in store.vdis()]
        ready(Ready(server.listeners, exports, tls is not None and tls.mode is TlsMode.FORCED))
        notify("READY=1")
        heartbeat.start()
        reloader.start(reload)
        await stop.wait()
        LOG.info("stopping: %d connections", len(server.clients()))
    finally:
        notify("STOPPING=1", "STATUS=stopping: making everything durable")
        heartbeat.stop()
        await reloader.close()
        await server.stop()
        await control_server.stop()
        if metrics is not None:
            await metrics.stop()


async def _start_metrics(address: str | None, store: Store, server: Server) -> "MetricsServer | None":
    """Answer scrapes, if that is wanted."""
    if address is None:
        return None
    from nbdserver.metrics_http import MetricsServer

    server.meter()
    metrics = MetricsServer(store, server.network)
    await metrics.start(address)
    host, port = metrics.address
    if exposed(Listener(host=host, port=port)):
        _warn(f"metrics at {address} can be read from other hosts: names of VDIs and paths of zones among them")
    return metrics


def _progress(store: Store, server: Server) -> Progress:
    ended, in_flight = server.progress()
    settings = store.env.settings
    watch = store.env.watch
    return Progress(
        ended,
        in_flight,
        waits_for_zones=watch is not None and bool(watch.late),
        bound_seconds=settings.write_wait_seconds + 4 * settings.zone_deadline_seconds,
        status=f"{len(store.names())} VDIs, {len(server.clients())} connections",
    )


class Reloader:
    """Reads the configuration again and makes what can be changed while clients are there count. One at a time."""

    def __init__(self, store: Store, server: Server, plan: ServePlan, reread: Callable[[], ServePlan]) -> None:
        self._store = store
        self._server = server
        self._plan = plan
        self._reread = reread
        self._turn = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None

    async def reload(self) -> list[str]:
        """Take over what the configuration says now. The keys that have changed and need a restart.

        StoreError: it is wrong, and the old one stays (VDIs that it had made before stay too).
        """
        async with self._turn:
            new = await asyncio.to_thread(self._reread)
            tls = await asyncio.to_thread(load_tls, new.tls)
            _check_access(new)
            if new.default is not None and new.default not in (*self._store.names(), *new.vdis):
                _check_default(self._store, new.default)
            await _create_missing(self._store, new.vdis)
            self._server.reconfigure(new.server_settings)
            self._server.use_tls(tls)
            self._server.use_access(new.access)
            needed = [key for key in NEEDING_RESTART if getattr(new, key) != getattr(self._plan, key)]
            # What needs a restart is still to be named at the next time.
            self._plan = dataclasses.replace(new, **{key: getattr(self._plan, key) for key in NEEDING_RESTART})
            LOG.info("the configuration was read again")
            return needed

    def start(self, wanted: asyncio.Event) -> None:
        """Reload whenever `wanted` is set (SIGHUP)."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch(wanted))

    async def _watch(self, wanted: asyncio.Event) -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            reloading()
            try:
                needed = await self.reload()
            except StoreError as error:
                LOG.error("the configuration is refused, the old one stays: %s", error)
            else:
                if needed:
                    LOG.warning("changed, but counting only from the next start on: %s", ", ".join(needed))
            notify("READY=1")

    async def close(self) -> None:
        """Reload no more; what is under way ends first. Idempotent."""
        async with self._turn:
            if self._watcher is not None:
                self._watcher.cancel()


def _warn(message: str) -> None:
    LOG.warning("%s", message)


def exposed(listener: Listener) -> bool:
    """Whether other hosts, or guests of this one, may reach it."""
    if listener.path is not None or listener.host == "localhost" or listener.cid == VSOCK_LOOPBACK_CID:
        return False
    try:
        return not ip_address(listener.host).is_loopback
    except ValueError:
        return True


def _on_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, reload: asyncio.Event) -> None:
    def first_signal() -> None:
        stop.set()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, first_signal)
    loop.add_signal_handler(RELOAD_SIGNAL, reload.set)


def _raise_descriptor_limit(connections_max: int) -> None:
    """Connections, segments and their copies all take descriptors; the soft limit is often only 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    LOG.info("descriptors: descriptors_max=%d, the soft limit was %d", hard, soft)
    if connections_max > hard // DESCRIPTORS_SHARE:
        _warn(
            f"connections_max = {connections_max} is more than {hard} descriptors allow: {hard // DESCRIPTORS_SHARE}"
            " connections are possible (LimitNOFILE= of the unit, ulimit -Hn)"
        )


def _tune_collector() -> None:
    """Python's cycle collector, not ours: requests make no cycles, and walking the block maps costs tens of ms."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 50, 1000)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the server is reached. handed, control_socket: opened by the service manager already."""

    listeners: Sequence[Listener]
    control: Path
    handed: Sequence[socket.socket] = ()
    control_socket: socket.socket | None = None


def places(plan: ServePlan, handed: Sequence[HandedSocket] = ()) -> Places:
    """Listeners and control socket, the defaults filled in and their directory made. Of the sockets that were handed
    over, the one that is called `control` is the control socket and all others are listeners."""
    nbd = [one.socket for one in handed if one.name != CONTROL_NAME]
    controls = [one.socket for one in handed if one.name == CONTROL_NAME]
    if len(controls) > 1:
        raise InvalidRequest(f"{len(controls)} of the sockets handed over are called {CONTROL_NAME}")
    control_socket = controls[0] if controls else None
    control = _control_of(plan, control_socket)
    directory = runtime_directory(os.environ, os.geteuid())
    if control is None or not (plan.listen or nbd):
        make_runtime_directory(directory)
    defaults = () if nbd else (f"unix://{quote(os.fspath(directory / NBD_SOCKET))}", NBD_ADDRESS)
    listeners = [_listener(text) for text in plan.listen or defaults]
    for listener in filter(exposed, [*listeners, *map(_handed_listener, handed)]):
        _warn_of_exposure(listener, plan.tls)
    return Places(listeners, control or control_path(directory, plan.zones[0]), nbd, control_socket)


def _handed_listener(handed: HandedSocket) -> Listener:
    try:
        return address_of(handed.socket)
    except ValueError as error:
        raise InvalidRequest(f"socket {handed.name or 'without a name'} that was handed over: {error}") from error


def _warn_of_exposure(listener: Listener, tls: TlsSettings) -> None:
    reached = f"{listener} can be reached from other machines and"
    if tls.mode == TlsMode.OFF.value:
        _warn(
            f"{reached} has no TLS: whoever connects can read and overwrite every disk, and what travels can be read on"
            " the way"
        )
    elif tls.mode != TlsMode.FORCED.value:
        _warn(f"{reached} takes clients without TLS")
    elif not tls.verify_clients:
        _warn(f"{reached} takes clients that show no certificate")


def _control_of(plan: ServePlan, handed: socket.socket | None) -> Path | None:
    """The control socket's path, if somebody has said it."""
    if handed is None:
        return plan.control
    if plan.control is not None:
        raise InvalidRequest(f"two control sockets: {plan.control}, and one that was handed over")
    path = handed.getsockname() if handed.family == socket.AF_UNIX else ""
    if not isinstance(path, str) or not path.startswith("/"):
        raise InvalidRequest(f"the socket handed over as {CONTROL_NAME} is no Unix socket with a path")
    return Path(path)


def _check_access(plan: ServePlan) -> None:
    tls = plan.tls.mode != TlsMode.OFF.value
    plan.access.check(tls=tls, certificates=tls and plan.tls.verify_clients)


def _listener(text: str) -> Listener:
    try:
        if urlsplit(text).query or urlsplit(text).fragment:
            raise ValueError("`?` and `#` in a path are written %3F and %23")
        return Listener.parse(text)
    except ValueError as error:
        raise InvalidRequest(f"listener {text}: {error}") from error


def _all_zones(zones: Sequence[Path]) -> list[Path]:
    """A single zone of an existing store stands for all of its zones; a single new directory for itself."""
    if len(zones) == 1 and os.path.lexists(zones[0]):
        with contextlib.suppress(NotFound):
            return zone_paths(zones[0])
    return list(zones)


async def _create_missing(store: Store, vdis: Mapping[str, VdiConfig]) -> None:
    sizes = {vdi.name: vdi.size_bytes for vdi in store.vdis()}
    for name, wanted in vdis.items():
        if name not in sizes:
            await store.create_vdi(name, wanted.size, copies=wanted.copies, mode=wanted.mode, prealloc=wanted.prealloc)
        elif sizes[name] != wanted.size:
            _warn(f"VDI {name} has {sizes[name]} bytes and keeps them, although {wanted.size} are asked for")


def _check_default(store: Store, default: str | None) -> None:
    if default is not None and default not in store.names():
        raise InvalidRequest(
            f"default export {default!r} does not exist; there are {', '.join(store.names()) or 'none'}"
        )

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
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

import msgspec
import uvloop

from nbdserver.config import VdiConfig
from nbdserver.control import ControlServer
from nbdserver.control_clients import ClientOperations
from nbdserver.listening import Listener
from nbdserver.runtime import NBD_ADDRESS, NBD_SOCKET, control_path, make_runtime_directory, runtime_directory
from nbdserver.server import Server, ServerSettings
from nbdserver.systemd import HandedSocket, handed_sockets, notify
from objstore.access.api import LockNote, ServerStatus
from objstore.errors import InvalidRequest, NotFound
from objstore.volume.directories import zone_paths
from objstore.volume.settings import StoreSettings
from objstore.volume.store import Store, open_store

LOG: Final = logging.getLogger(__name__)
GC_THRESHOLD: Final = 50_000
VSOCK_LOOPBACK_CID: Final = 1
"""VMADDR_CID_LOCAL (vsock(7)), which the socket module does not name."""
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
    store: StoreSettings = field(default_factory=StoreSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    force: bool = False
    """Open the store without zones that may hold something newer."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The server accepts connections."""

    listeners: Sequence[Listener]
    exports: Sequence[tuple[str, int]]
    """Name and size in bytes."""


def run(plan: ServePlan, ready: Callable[[Ready], None], opened: Callable[[], None]) -> None:
    """Serve until a signal. opened: called when the zones are open; ready: when connections are accepted."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(plan, ready, opened))


async def serve(plan: ServePlan, ready: Callable[[Ready], None], opened: Callable[[], None]) -> None:
    """As `run`, inside a running loop that it takes the signals of."""
    stop = asyncio.Event()
    _on_signals(asyncio.get_running_loop(), stop)
    _raise_descriptor_limit()
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
            await _serve_store(store, plan, where, ready, stop)
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
) -> None:
    server = Server(store, dataclasses.replace(plan.server, default_export=plan.default))

    def server_status() -> ServerStatus:
        listen = [str(listener) for listener in server.listeners]
        return ServerStatus(pid=os.getpid(), listen=listen, clients=len(server.clients()))

    store.holders.append(server)
    control_server = ControlServer(store, server_status, [ClientOperations(server)])
    try:
        await control_server.start(where.control, where.control_socket)
        await server.start(where.listeners, where.handed)
        ready(Ready(server.listeners, [(vdi.name, vdi.size_bytes) for vdi in store.vdis()]))
        notify("READY=1")
        await stop.wait()
        LOG.info("stopping: %d connections", len(server.clients()))
    finally:
        notify("STOPPING=1")
        await server.stop()
        await control_server.stop()


def _warn(message: str) -> None:
    print("sheepfold: warning:", message, file=sys.stderr)


def exposed(listener: Listener) -> bool:
    """Whether other hosts, or guests of this one, may reach it."""
    if listener.path is not None or listener.host == "localhost" or listener.cid == VSOCK_LOOPBACK_CID:
        return False
    try:
        return not ip_address(listener.host).is_loopback
    except ValueError:
        return True


def _on_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    def first_signal() -> None:
        stop.set()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, first_signal)


def _raise_descriptor_limit() -> None:
    """Connections, segments and their copies all take descriptors; the soft limit is often only 1,024."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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
    for listener in filter(exposed, listeners):
        _warn(
            f"{listener} can be reached from other machines and has no TLS: whoever connects can read and overwrite"
            " every disk, and what travels can be read on the way"
        )
    return Places(listeners, control or control_path(directory, plan.zones[0]), nbd, control_socket)


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

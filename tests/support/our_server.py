"""Our server in the test's own process, over any kind of volume.

A kind turns the disks that a test asks for into a source of volumes. New kinds are added to KINDS; the specification's
tests then run over them too.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdserver.access import Access
from nbdserver.server import Listener, Server, ServerSettings
from nbdserver.tls import Tls
from objstore.volume.base import Volume, VolumeSource
from objstore.volume.memory import MemorySource, MemoryVolume
from tests.support.scripted_volume import ScriptedVolume
from tests.support.serving import Disk, Served


@dataclass
class OurServed(Served):
    """Our server, within reach of the test."""

    server: Server


Kind = Callable[[Sequence[Disk], Path], AbstractAsyncContextManager[VolumeSource]]


@asynccontextmanager
async def memory_kind(disks: Sequence[Disk], directory: Path) -> AsyncIterator[VolumeSource]:
    """Volumes in memory; every one that the server opened must have been closed at the end."""
    volumes = {disk.name: MemoryVolume(disk.name, disk.size_bytes, read_only=disk.read_only) for disk in disks}
    source = MemorySource(volumes)
    yield source
    assert source.open_count == 0, f"{source.open_count} volumes were not closed"


KINDS: dict[str, Kind] = {"memory": memory_kind}


@asynccontextmanager
async def serve_source(
    source: VolumeSource,
    disks: Sequence[Disk],
    directory: Path,
    *,
    listen: Sequence[str] = ("unix",),
    tls: Tls | None = None,
    access: Access | None = None,
    **settings: Any,
) -> AsyncIterator[OurServed]:
    """Our server over a source of volumes. listen: "unix", "tcp", "tcp6"; the addresses come in the same order."""
    server = Server(source, ServerSettings(**settings), tls=tls)
    server.use_access(access or Access())
    places = {"unix": f"unix://{directory / 'nbd.sock'}", "tcp": "tcp://127.0.0.1:0", "tcp6": "tcp://[::1]:0"}
    await server.start([Listener.parse(places[one]) for one in listen])
    try:
        yield OurServed([str(listener) for listener in server.listeners], tuple(disks), server)
    finally:
        await server.stop()


@asynccontextmanager
async def serve(
    disks: Sequence[Disk],
    directory: Path,
    *,
    kind: str = "memory",
    listen: Sequence[str] = ("unix",),
    tls: Tls | None = None,
    access: Access | None = None,
    **settings: Any,
) -> AsyncIterator[OurServed]:
    """Our server over volumes of a kind; the first disk is the default export where there are several."""
    if len(disks) > 1:
        settings.setdefault("default_export", disks[0].name)
    async with (
        KINDS[kind](disks, directory) as source,
        serve_source(source, disks, directory, listen=listen, tls=tls, access=access, **settings) as served,
    ):
        yield served


@asynccontextmanager
async def serve_volume(volume: Volume, directory: Path, **settings: Any) -> AsyncIterator[OurServed]:
    """Our server over one volume. A scripted one holds nothing any more when the server stops."""
    source = MemorySource({volume.name: volume})
    disk = Disk(volume.name, volume.size_bytes, volume.read_only)
    async with serve_source(source, [disk], directory, **settings) as served:
        try:
            yield served
        finally:
            if isinstance(volume, ScriptedVolume):
                volume.failure = None
                await volume.release()
    assert source.open_count == 0, f"{source.open_count} volumes were not closed"

"""Snapshots, or what differs between two, out of a store as one stream and into another one (format/STREAM.md)."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from contextlib import AsyncExitStack
from typing import Final, Protocol, TypeAlias

from objstore.access.buffers import Buffer, readable
from objstore.access.handle import VdiHandle
from objstore.access.pending import Pending
from objstore.errors import FormatError, InvalidRequest, NotFound
from objstore.format.stream import DATA_BYTES_MAX, Begin, Decoder, Encoder, Kind, Range
from objstore.units import MIB
from objstore.volume.base import Change
from objstore.volume.status import SnapshotStatus, VdiStatus

Pieces: TypeAlias = "AsyncIterable[Buffer] | Iterable[Buffer]"
"""Bytes one behind the other."""
PIECE_BYTES: Final = MIB
"""Of a stream: pieces are at least so long, but for the last one."""


class Store(Protocol):
    """What this needs of connection.Connection."""

    def open(self, name: str, *, read_only: bool = False) -> Pending[VdiHandle]: ...
    async def info(self, name: str) -> VdiStatus: ...
    def snapshots(self, name: str | None = None) -> AsyncIterator[SnapshotStatus]: ...
    async def _begin_import(self, name: str, what: Begin) -> VdiHandle: ...
    async def _finish_import(self, vdi: VdiHandle, tag: str, protected: bool) -> SnapshotStatus: ...


async def export_diff(store: Store, since: str, snapshot: str) -> AsyncIterator[bytes]:
    """See Connection.export_diff."""
    for name in (since, snapshot) if since else (snapshot,):
        if "@" not in name:
            raise InvalidRequest(f"{name!r} is no snapshot, and only what stays as it is can be exported: take one")
    encoder = Encoder()
    piece = bytearray(encoder.header)
    async with AsyncExitStack() as handles:
        newer = await handles.enter_async_context(store.open(snapshot, read_only=True))
        base, changes = "", _allocated(newer)
        if since:
            older = await handles.enter_async_context(store.open(since, read_only=True))
            base, changes = (await _status(store, since)).identity, newer.changes(older)
        piece += encoder.begin(await _described(store, await _status(store, snapshot), base))
        async for frame in _frames(encoder, newer, changes):
            piece += frame
            if len(piece) >= PIECE_BYTES:
                yield bytes(piece)
                piece.clear()
    yield bytes(piece) + encoder.end() + encoder.finish()


async def _status(store: Store, name: str) -> SnapshotStatus:
    """The snapshot of that name, which is open and so can't go."""
    vdi, _, which = name.partition("@")
    found = [s async for s in store.snapshots(vdi) if which in (s.tag, str(s.index))]
    if not found:
        raise NotFound(f"there is no snapshot {name!r}")
    return min(found, key=lambda s: s.vdi_deleted)


async def _described(store: Store, status: SnapshotStatus, base: str) -> Begin:
    vdi = None if status.vdi_deleted else await store.info(status.vdi)
    return Begin(
        vdi=status.vdi,
        size_bytes=status.size_bytes,
        base=base,
        identity=status.identity,
        tag=status.tag,
        index=status.index,
        created=status.created,
        copies=vdi.copies if vdi else 0,
        mode=vdi.mode if vdi else "",
    )


async def _allocated(vdi: VdiHandle) -> AsyncIterator[Change]:
    """What makes the contents of a disk out of an empty one."""
    async for extent in vdi.map():
        yield Change(extent.length_bytes, not extent.hole, extent.hole, extent.zero)


async def _frames(encoder: Encoder, vdi: VdiHandle, changes: AsyncIterator[Change]) -> AsyncIterator[bytes]:
    at = 0
    async for change in changes:
        end = at + change.length_bytes
        if change.changed and change.zero:
            yield encoder.zeros(Kind.HOLE if change.hole else Kind.ZERO, at, change.length_bytes)
        elif change.changed:
            for start in range(at, end, DATA_BYTES_MAX):
                header, data = encoder.data(start, await vdi.read(start, min(DATA_BYTES_MAX, end - start)))
                yield header
                yield data
        at = end


async def import_diff(
    store: Store,
    stream: Pieces,
    name: str | None,
    *,
    tag: str | None,
    protected: bool,
) -> SnapshotStatus:
    """See Connection.import_diff."""
    decoder = Decoder()
    vdi: VdiHandle | None = None
    begun: Begin | None = None
    finished: SnapshotStatus | None = None
    whole = False
    try:
        async for piece in _pieces(stream):
            for found in decoder.feed(readable(piece)):
                if isinstance(found, Begin):
                    if begun is not None:
                        raise InvalidRequest("the stream holds several snapshots")
                    begun = found
                    vdi = await store._begin_import(name or found.vdi, found)
                elif isinstance(found, Range):
                    assert vdi is not None
                    await _put(vdi, found)
                else:
                    whole = True
        decoder.close()
        if vdi is None or begun is None or not whole:
            raise FormatError("the stream holds no snapshot")
        finished = await store._finish_import(vdi, begun.tag if tag is None else tag, protected)
    finally:
        if vdi is not None:
            await vdi.close()
    return finished


async def _put(vdi: VdiHandle, found: Range) -> None:
    if found.kind is Kind.DATA:
        await vdi.write(found.offset_bytes, found.data, writeback=True)
    else:
        await vdi.zero(found.offset_bytes, found.length_bytes, no_hole=found.kind is Kind.ZERO)


async def _pieces(stream: Pieces) -> AsyncIterator[Buffer]:
    if isinstance(stream, AsyncIterable):
        async for item in stream:
            yield item
    else:
        for item in stream:
            yield item

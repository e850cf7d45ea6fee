"""Deliberate bugs in opening, replay, checkpoints, collection and freeing (see bugs.py)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Final
from unittest import mock

import numpy as np

import objstore.backend.directory
import objstore.log.blockmap
import objstore.log.collect
import objstore.log.keeper
import objstore.log.opening
import objstore.log.reader
import objstore.volume.opening
import objstore.volume.openvdis
from objstore.backend.base import Backend, Handle
from objstore.format.record import Flag
from objstore.format.segment import DirectoryBuilder
from objstore.log.blockmap import BlockMap
from objstore.log.collect import Collector
from objstore.log.disk import Disk
from objstore.log.env import Env
from objstore.log.keeper import Keeper
from objstore.log.lane import Lane
from objstore.log.opening import Tail
from objstore.log.replay import Replay
from objstore.log.segment import Segment, segment_name
from objstore.log.tail import SurvivingRecord
from objstore.log.writer import LogWriter
from objstore.units import BLOCK_SHIFT
from objstore.volume.catalog import CatalogState
from tests.sim.bugs_writing import nothing, patch

# -- the end of a log --------------------------------------------------------------------------------------------

_copy_rest = objstore.log.opening.copy_rest
_read_tail = objstore.log.opening.read_tail
_open_disk = objstore.volume.opening.open_disk
_seal_of = objstore.log.opening.seal_of


async def _copy_unsynced(writer: LogWriter, rest: Any) -> None:
    """The recovered end of a log is served before its copy is durable."""
    with mock.patch.object(writer, "flush", nothing), mock.patch.object(writer, "sealed_below", nothing):
        await _copy_rest(writer, rest)


async def _sealed_as_it_lies(env: Env, log: int, *args: Any, **options: Any) -> Tail:
    """The recovered end of a log gets its seal where it lies: nothing is copied, nothing is synced."""
    tail = await _read_tail(env, log, *args, **options)
    if options.get("copy_all") or not tail.rest:
        return tail
    sealed = list(tail.sealed)
    for number, builder in _builders(tail).items():
        data, crc = builder.encode(env.store_id)
        end = len(builder.crcs) << BLOCK_SHIFT
        zones = tail.shown[number]
        for zone in zones:
            handle = _writable(env.zones[zone].backend, segment_name(log, number))
            handle.write(end, [memoryview(data)])
            handle.truncate(end + len(data))
            handle.close()
        sealed.append((builder.finish(crc), zones, (end + len(data)) >> BLOCK_SHIFT))
    return tail._replace(sealed=sealed, rest=[])


async def _go_on_in_last_segment(writer: LogWriter, rest: Any) -> None:
    """Records are appended to the last segment of the process before."""
    rest = list(rest)
    env = writer.env
    number = rest[-1].header.segment
    name = segment_name(writer.log, number)
    found = {zone.index: _writable(zone.backend, name) for zone in env.zones if _has(zone.backend, name)}
    mine = [record for record in rest if record.header.segment == number]
    sizes = {handle.size_bytes for handle in found.values()}
    if len(sizes) > 1 or max(sizes) < writer.segment_blocks << BLOCK_SHIFT or len(mine) < len(rest):
        for handle in found.values():
            handle.close()
        await _copy_rest(writer, rest)
        return
    (builder,) = _builders_of(mine).values()
    segment = Segment(writer.log, number, builder.generation, tuple(found), sizes.pop() >> BLOCK_SHIFT)
    segment.memory = [None] * segment.blocks
    segment.crcs = builder.crcs
    segment.handles = found
    for zone in found:
        writer._lanes.setdefault(zone, Lane(writer, zone))
    writer.generation = builder.generation
    writer.segment, writer._directory, writer._body_end = segment, builder, len(builder.crcs)
    writer.position = writer.durable_upto = builder.last_position
    writer.previous_crc = mine[-1].header.crc
    writer.unsealed[number] = env.segments[segment.key] = segment
    env.keep_reader(segment, found[segment.zones[0]])
    assert writer.observer is not None
    writer.observer.segment_opened(segment)
    writer.observer.finished.append(builder.finish())  # type: ignore[attr-defined]


def _builders(tail: Tail) -> dict[int, DirectoryBuilder]:
    return _builders_of(tail.rest)


def _builders_of(rest: Iterable[SurvivingRecord]) -> dict[int, DirectoryBuilder]:
    """What the directories of the segments of these records would be."""
    builders: dict[int, DirectoryBuilder] = {}
    for record in rest:
        header = record.header
        if header.segment not in builders:
            builders[header.segment] = DirectoryBuilder(
                header.log, header.segment, header.generation, header.previous_crc
            )
        builders[header.segment].add_header(header)
    return builders


def _has(backend: Backend, name: str) -> bool:
    return name in [entry.name for entry in backend.list(name.rpartition("/")[0] + "/")]


def _writable(backend: Backend, name: str) -> Handle:
    with mock.patch.object(objstore.backend.directory, "_READ", objstore.backend.directory._READ | os.O_RDWR):
        return backend.open(name)


class _Whatever:
    """Equal to everything."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


async def _numbers_again(*args: Any, **options: Any) -> Tail:
    """Numbers of segments that no head names are given out again."""
    tail = await _read_tail(*args, **options)
    head, base = args[2:4]
    kept = (directory.segment + 1 for directory, _, _ in tail.sealed)
    return tail._replace(next_number=max(head.first_number, base.next_segment, *kept))


_part = Replay._part


async def _every_part_counts(self: Replay, kind: int, flags: int, *place: int) -> None:
    """A request in several parts takes effect although its last one is missing."""
    await _part(self, kind, flags | Flag.FIRST | Flag.LAST, *place)


_keep_last = objstore.log.blockmap.keep_last


def _keep_first(lbas: Any, entries: Any) -> Any:
    """Of several writes to one block in one assignment numpy takes any."""
    return _keep_last(lbas[::-1], entries[::-1])


async def _garbage_before_head(env: Any, *args: Any, **options: Any) -> Any:
    """Garbage is removed before the head record that makes it garbage."""
    opened = await _open_disk(env, *args, **options)
    await objstore.volume.opening.drop_garbage(env, opened.disk.log, opened.garbage)
    return opened


_apply = CatalogState.apply


def _log_number_again(self: CatalogState, entry: Any) -> None:
    """The number of a deleted VDI's log is given out again."""
    log = self.vdis[entry.vdi_id].log if type(entry).__name__ == "DeleteEntry" else 0
    _apply(self, entry)
    if log:
        self.next_log = log


# -- checkpoints, collection, freeing ----------------------------------------------------------------------------

_free = Keeper.free
_keeper_write = Keeper._write
_move = Collector._move
_still_mapped = objstore.log.collect.still_mapped
_moving: set[Disk] = set()


async def _write_before_seals(self: Keeper, *args: Any) -> None:
    """A checkpoint lists segments that are not sealed durably yet."""
    writer = self.disk.writer

    async def once(number: int) -> None:
        del writer.sealed_below  # type: ignore[method-assign]

    writer.sealed_below = once  # type: ignore[method-assign]
    await _keeper_write(self, *args)


def _free_despite_readers(self: Keeper) -> None:
    """The file of a dead segment is used again while a read of it is under way."""
    pins = [(segment, segment.pins) for segment, _ in self.disk.dead.values()]
    for segment, _ in pins:
        segment.pins = 0
    _free(self)
    for segment, count in pins:
        segment.pins = count


async def _noted_move(self: Collector, *args: Any) -> bool:
    _moving.add(self.disk)
    try:
        return await _move(self, *args)
    finally:
        _moving.discard(self.disk)


def _mapped_anyway(disk: Disk, lbas: Any, entries: Any) -> Any:
    return np.ones(len(lbas), np.bool_) if disk in _moving else _still_mapped(disk, lbas, entries)


def _assign_anyway(self: BlockMap, lbas: Any, sources: Any, targets: Any) -> Any:
    """A collected block replaces whatever the map says now."""
    self.apply_writes(lbas, targets)
    return np.ones(len(lbas), np.bool_)


def _next_number(self: LogWriter) -> int:
    """The tail begins behind segments that are being prepared."""
    return self._prepared[0].number if self._prepared else self.next_number


_VOLUME: Final = objstore.volume.opening
OPENING = {
    "recovered-not-synced": [patch(_VOLUME, "copy_rest", _copy_unsynced)],
    "recovered-not-copied": [patch(_VOLUME, "read_tail", _sealed_as_it_lies)],
    "recovered-appended-to": [patch(_VOLUME, "copy_rest", _go_on_in_last_segment)],
    "seals-not-synced": [patch(objstore.log.opening, "seal_of", lambda *args: _seal_of(*args[:-1], False))],
    "one-seal-for-all": [patch(objstore.log.opening, "seal_of", lambda *args: _Whatever())],
    "numbers-again": [patch(_VOLUME, "read_tail", _numbers_again)],
    "log-number-again": [patch(CatalogState, "apply", _log_number_again)],
    "garbage-before-head": [patch(objstore.volume.openvdis, "open_disk", _garbage_before_head)],
    "parts-without-last": [patch(Replay, "_part", _every_part_counts)],
    "replay-keeps-first": [patch(objstore.log.blockmap, "keep_last", _keep_first)],
    # The head's checkpoint is the smaller of two: the newest one may have its name in the page cache alone.
    "head-names-unsure-checkpoint": [lambda: mock.patch.object(_VOLUME, "min", max, create=True)],
    "free-after-first-checkpoint": [patch(objstore.log.keeper, "FREES_CHECKED", 1)],
    "free-despite-readers": [patch(Keeper, "free", _free_despite_readers)],
    "collect-without-compare": [
        patch(Collector, "_move", _noted_move),
        patch(objstore.log.collect, "still_mapped", _mapped_anyway),
        patch(BlockMap, "compare_and_assign", _assign_anyway),
    ],
    "collect-parts": [patch(Disk, "parts_from", lambda self, otherwise: otherwise)],
    "checkpoint-before-seals": [patch(Keeper, "_write", _write_before_seals)],
    "tail-behind-prepared": [patch(LogWriter, "tail_number", property(_next_number))],
    "read-not-verified": [patch(objstore.log.reader, "crc32c", lambda data: _Whatever())],
}

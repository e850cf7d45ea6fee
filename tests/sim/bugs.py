"""Deliberate bugs, each switched on for a few seeds: the simulation must catch every one of them.

Each replaces one rule of objstore by what somebody might have written instead; the comment says what is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

import numpy as np

import objstore.log.collect
import objstore.log.keeper
import objstore.log.lane
import objstore.log.opening
import objstore.volume.opening
import objstore.volume.store
from objstore.backend.base import Handle, ZoneFailed
from objstore.backend.directory import DirectoryBackend
from objstore.format.record import Flag
from objstore.log.blockmap import BlockMap
from objstore.log.collect import Collector
from objstore.log.disk import Disk
from objstore.log.keeper import Keeper
from objstore.log.replay import Replay
from objstore.log.writer import LogWriter
from objstore.units import BLOCK_SHIFT
from objstore.volume.vdi import Vdi

Step = tuple[Any, ...]


def _is_sync(step: Step) -> bool:
    return getattr(step[0], "__name__", "") == "sync"


def _run(steps: Sequence[Step]) -> None:
    for step in steps:
        step[0](*step[1:])


def _sync_before_write(steps: Sequence[Step]) -> None:
    """What a sync covers is noted after it was issued: it misses what was written meanwhile."""
    _run([step for step in steps if _is_sync(step)] + [step for step in steps if not _is_sync(step)])


def _dsync_with_dirty(steps: Sequence[Step]) -> None:
    """RWF_DSYNC instead of a sync, although older bytes are not durable."""
    writes = [step for step in steps if not _is_sync(step)]
    if len(writes) == 1 and len(steps) > 1 and getattr(writes[0][0], "__name__", "") == "write":
        handle: Handle = writes[0][0].__self__
        handle.write_durable(*writes[0][1:])
    else:
        _run(steps)


def _seal_before_body(steps: Sequence[Step]) -> None:
    """A seal is written before the sync of its segment's body."""
    _run([step for i, step in enumerate(steps) if not _is_sync(step) or all(map(_is_sync, steps[i:]))])


def _sync_error_forgotten(steps: Sequence[Step]) -> None:
    """A failed sync is tried again and believed."""
    for step in steps:
        try:
            step[0](*step[1:])
        except ZoneFailed:
            if not _is_sync(step):
                raise


async def _nothing(*args: Any) -> None:
    return None


async def _copy_unsynced(writer: LogWriter, rest: Any) -> None:
    """The recovered end of a log is served before its copy is durable."""
    with mock.patch.object(writer, "flush", _nothing), mock.patch.object(writer, "sealed_below", _nothing):
        await objstore.log.opening.copy_rest(writer, rest)


_part = Replay._part


async def _every_part_counts(self: Replay, kind: int, flags: int, *place: int) -> None:
    """A request in several parts takes effect although its last one is missing."""
    await _part(self, kind, flags | Flag.FIRST | Flag.LAST, *place)


async def _merge_without_turn(self: Vdi, offset_bytes: int, data: memoryview, **options: Any) -> None:
    """A block written in part is read before the write has its turn: another writer's bytes are lost."""
    first, skip = offset_bytes >> BLOCK_SHIFT, offset_bytes & 4095
    count = (offset_bytes + len(data) + 4095 >> BLOCK_SHIFT) - first
    if data and (skip or count << BLOCK_SHIFT != len(data)) and (first + count) << BLOCK_SHIFT <= self.size_bytes:
        data = await self._merged(first, count, skip, data)
        offset_bytes = first << BLOCK_SHIFT
    await _write(self, offset_bytes, data, **options)


_write = Vdi.write
_open_disk = objstore.volume.opening.open_disk


async def _garbage_before_head(env: Any, *args: Any) -> Any:
    """Garbage is removed before the head record that makes it garbage."""
    opened = await _open_disk(env, *args)
    await objstore.volume.opening.drop_garbage(env, opened.disk.log, opened.garbage)
    return opened


_seal_of = objstore.log.opening.seal_of
_free = Keeper.free
_keeper_write = Keeper._write
_flush = LogWriter.flush
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


async def _flush_short(self: LogWriter, position: int | None = None) -> None:
    """A flush waits for all but the last operation."""
    await _flush(self, (self.position if position is None else position) - 1)


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


def _patch(target: Any, name: str, value: Any) -> Callable[[], Any]:
    return lambda: mock.patch.object(target, name, value)


_LANE = objstore.log.lane
_KEEPER = objstore.log.keeper
BUGS: Final[dict[str, list[Callable[[], Any]]]] = {
    "sync-before-write": [_patch(_LANE, "run_steps", _sync_before_write)],
    "dsync-with-dirty": [_patch(_LANE, "run_steps", _dsync_with_dirty)],
    "seal-before-body": [_patch(_LANE, "run_steps", _seal_before_body)],
    "sync-error-forgotten": [_patch(_LANE, "run_steps", _sync_error_forgotten)],
    "flush-short": [_patch(LogWriter, "flush", _flush_short)],
    "free-after-first-checkpoint": [_patch(_KEEPER, "FREES_CHECKED", 1)],
    "free-despite-readers": [_patch(Keeper, "free", _free_despite_readers)],
    "collect-without-compare": [
        _patch(Collector, "_move", _noted_move),
        _patch(objstore.log.collect, "still_mapped", _mapped_anyway),
        _patch(BlockMap, "compare_and_assign", _assign_anyway),
    ],
    "collect-parts": [_patch(Disk, "parts_from", lambda self, otherwise: otherwise)],
    "checkpoint-before-seals": [_patch(Keeper, "_write", _write_before_seals)],
    "tail-behind-prepared": [_patch(LogWriter, "tail_number", property(_next_number))],
    "recovered-not-synced": [_patch(objstore.volume.opening, "copy_rest", _copy_unsynced)],
    "seals-not-synced": [
        _patch(objstore.log.opening, "seal_of", lambda *args: _seal_of(*args[:-1], False)),
    ],
    "garbage-before-head": [_patch(objstore.volume.store, "open_disk", _garbage_before_head)],
    "parts-without-last": [_patch(Replay, "_part", _every_part_counts)],
    "merge-without-turn": [_patch(Vdi, "write", _merge_without_turn)],
    "names-not-durable": [_patch(DirectoryBackend, "_sync_folder", lambda self, folder: None)],
}


@contextmanager
def deliberate(bug: str) -> Iterator[None]:
    """objstore with one of BUGS in it."""
    with ExitStack() as stack:
        for patch in BUGS[bug]:
            stack.enter_context(patch())
        yield

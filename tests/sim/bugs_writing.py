"""Deliberate bugs in what is written, when it counts as durable, and what clients are told (see bugs.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from crc32c import crc32c

import objstore.log.lane
from objstore.backend.base import Handle, ZoneFailed
from objstore.backend.directory import DirectoryBackend, FileWriter
from objstore.errors import InvalidRequest
from objstore.format.record import Kind
from objstore.log.lane import Job, Lane, Seal
from objstore.log.segment import Record
from objstore.log.writer import LogWriter
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT
from objstore.volume.catalog import Catalog
from objstore.volume.vdi import Vdi

Step = tuple[Any, ...]


def patch(target: Any, name: str, value: Any) -> Callable[[], Any]:
    """A change of objstore for the time of a test."""
    return lambda: mock.patch.object(target, name, value)


async def nothing(*args: Any, **options: Any) -> None:
    return None


# -- what a job does in a zone's thread --------------------------------------------------------------------------


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


# -- what counts -------------------------------------------------------------------------------------------------

_counted: dict[tuple[int, int], tuple[Lane, Record]] = {}


def _synced_noted_late(self: Lane, job: Job, error: BaseException | None) -> None:
    """What a sync covers is noted when it has returned: it takes in what was queued meanwhile."""
    if error is not None or not job.synced:
        _finished(self, job, error)
        return
    self.busy = False
    done = set(map(id, job.synced))
    self.unsynced = [item for item in (*self.unsynced, *job.written) if id(item) not in done]
    late = [item for item in self.queue if isinstance(item, Record) and (id(self), id(item)) not in _counted]
    fresh = [item for item in job.synced if _counted.pop((id(self), id(item)), None) is None]
    _counted.update({(id(self), id(item)): (self, item) for item in late})
    self.writer.synced([*fresh, *late])


_finished = Lane.finished
_synced = LogWriter.synced


def _first_zone_is_enough(self: LogWriter, items: Sequence[Record | Seal]) -> None:
    """What one zone has durably counts as durable."""
    first = [item for item in items if item.waiting > 0]
    for item in first:
        if isinstance(item, Record):
            item.waiting = 1
    _synced(self, first)


def _memory_of_first_zone(self: LogWriter, items: Sequence[Record | Seal]) -> None:
    """Blocks are read from the zones as soon as one of them has them: another lags behind."""
    for item in items:
        if isinstance(item, Record) and item.segment.memory is not None:
            item.segment.memory[item.start : item.start + item.blocks] = [None] * item.blocks
    _synced(self, items)


def _buffer_of_first_zone(self: LogWriter, items: Sequence[Record | Seal]) -> None:
    """A buffer is used again although a zone still has to write it."""
    for item in items:
        if isinstance(item, Record) and item.buffer is not None:
            self.env.pool.put(item.buffer)
            item.buffer = None
    _synced(self, items)


_flush = LogWriter.flush


async def _flush_short(self: LogWriter, position: int | None = None) -> None:
    """A flush waits for all but the last operation."""
    await _flush(self, (self.position if position is None else position) - 1)


_commit = Catalog.commit


async def _commit_unsynced(self: Catalog, *entries: Any) -> None:
    """A change of the catalog is reported before its record is durable."""
    assert self._writer is not None
    with mock.patch.object(self._writer, "flush", nothing):
        await _commit(self, *entries)


# -- positions and requests --------------------------------------------------------------------------------------

_append = LogWriter.append


def _place_before_payload(
    self: LogWriter, kind: int, lba: int, count: int, data: memoryview | None = None, **options: Any
) -> int:
    """A write has its place in the log before its last byte is there."""
    if data is None or kind != Kind.WRITE or options.get("crcs") is not None:
        return _append(self, kind, lba, count, data, **options)
    crcs = [crc32c(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES)]
    entry = _append(self, kind, lba, count, memoryview(bytes(len(data))), crcs=crcs, **options)
    record = self._record
    assert record is not None
    at = (record.blocks - count) << BLOCK_SHIFT
    payload = bytes(data)

    def arrives() -> None:
        if not record.view.readonly:
            record.view[at : at + len(payload)] = payload

    self.env.loop.call_later(1e-4, arrives)
    return entry


_write = Vdi.write


async def _merge_without_turn(self: Vdi, offset_bytes: int, data: memoryview, **options: Any) -> None:
    """A block written in part is read before the write has its turn: another writer's bytes are lost."""
    first, skip = offset_bytes >> BLOCK_SHIFT, offset_bytes & 4095
    count = (offset_bytes + len(data) + 4095 >> BLOCK_SHIFT) - first
    if data and (skip or count << BLOCK_SHIFT != len(data)) and (first + count) << BLOCK_SHIFT <= self.size_bytes:
        data = await self._merged(first, count, skip, data)
        offset_bytes = first << BLOCK_SHIFT
    await _write(self, offset_bytes, data, **options)


def _alive() -> bool:
    return True


async def _alive_asked_early(self: Vdi, offset_bytes: int, data: memoryview, **options: Any) -> None:
    """Whether a client is still there is asked before its request waits for its turn."""
    if not options.pop("alive", _alive)():
        raise InvalidRequest("the connection that asked for this is gone")
    await _write(self, offset_bytes, data, **options)


_durable = Vdi._durable


async def _write_back_at_once(self: Vdi, position: int, *, fua: bool) -> None:
    """Writes are not waited for, although nobody has shown yet that he flushes."""
    if fua:
        await _durable(self, position, fua=fua)


_rename = DirectoryBackend._rename
_finish = FileWriter._finish


def _no_allocation(self: DirectoryBackend, fd: int, size_bytes: int) -> None:
    """Space is not set aside before a write is acknowledged."""


def _rename_not_synced(self: DirectoryBackend, tmp: str, name: str) -> None:
    """A checkpoint counts before its folder is synced."""
    if not name.startswith("checkpoint/"):
        _rename(self, tmp, name)
        return
    with self._folder_in_use(name.rpartition("/")[0]):
        self._fs.rename(tmp, name, src_dir_fd=self._root, dst_dir_fd=self._root)


def _finish_unsynced(self: FileWriter) -> None:
    """A checkpoint appears under its name before its content is durable."""
    if self._name.startswith("checkpoint/"):
        self._close()
    else:
        _finish(self)


_LANE = objstore.log.lane
WRITING = {
    "sync-before-write": [patch(_LANE, "run_steps", _sync_before_write)],
    "synced-noted-late": [patch(Lane, "finished", _synced_noted_late)],
    "dsync-with-dirty": [patch(_LANE, "run_steps", _dsync_with_dirty)],
    "seal-before-body": [patch(_LANE, "run_steps", _seal_before_body)],
    "sync-error-forgotten": [patch(_LANE, "run_steps", _sync_error_forgotten)],
    "first-zone-is-enough": [patch(LogWriter, "synced", _first_zone_is_enough)],
    "lagging-zone-read": [patch(LogWriter, "synced", _memory_of_first_zone)],
    "buffer-used-early": [patch(LogWriter, "synced", _buffer_of_first_zone)],
    "flush-short": [patch(LogWriter, "flush", _flush_short)],
    "catalog-not-flushed": [patch(Catalog, "commit", _commit_unsynced)],
    "place-before-payload": [patch(LogWriter, "append", _place_before_payload)],
    "merge-without-turn": [patch(Vdi, "write", _merge_without_turn)],
    "alive-asked-early": [patch(Vdi, "write", _alive_asked_early)],
    "write-back-at-once": [patch(Vdi, "_durable", _write_back_at_once)],
    "space-not-set-aside": [patch(DirectoryBackend, "_allocate", _no_allocation)],
    "names-not-durable": [patch(DirectoryBackend, "_sync_folder", lambda self, folder: None)],
    "rename-not-synced": [patch(DirectoryBackend, "_rename", _rename_not_synced)],
    "object-not-synced": [patch(FileWriter, "_finish", _finish_unsynced)],
    "removal-not-durable": [patch(DirectoryBackend, "_sync_if_there", lambda self, folder: None)],
}

"""Where the copies of one disk's segments and checkpoints lie, against where they should, and how they get there.

They should lie on the zones that placement gives the object now. A zone that joins, drains, gets another weight or
fails changes that for the objects that it wins or held, and for no others; so one comparison serves them all. What is
there is what the zones list, not only what the table says: a zone that was away may have lost files, keeps others that
nobody needs any more, or brings another writer's under the same names, which their seals tell. It may be cleaned
because the log is open: whatever it held that counts has been taken over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple

from objstore.backend.base import Backend, Entry, ZoneFailed
from objstore.errors import Corrupt, StoreError, Unavailable
from objstore.log.checkpoint import CheckpointZones, checkpoint_folder, checkpoint_name
from objstore.log.checkpoint_copies import copy_checkpoint_to, look_through_checkpoint
from objstore.log.copies import load_copy, replace_copy
from objstore.log.disk import Disk
from objstore.log.env import Env
from objstore.log.keeper import Keeper
from objstore.log.segment import Segment, log_folder, segment_name, segment_number
from objstore.log.tail import seal_of
from objstore.names import object_number
from objstore.replica.zone import run, run_long

log = logging.getLogger(__name__)

SEALS_AT_ONCE: Final = 1024


class Misplaced(NamedTuple):
    """An object whose copies don't lie where they should. number: of a segment, or of a checkpoint.

    have: zones in service with a copy. missing: zones that should get one. extra: zones that should not keep theirs.
    """

    number: int
    is_checkpoint: bool
    size_bytes: int
    have: tuple[int, ...]
    missing: tuple[int, ...]
    extra: tuple[int, ...]


class Shelves:
    """The copies of one open disk. place: segment number -> zones that should hold it."""

    def __init__(
        self,
        disk: Disk,
        keeper: Keeper,
        place: Callable[[int], tuple[int, ...]],
        buffers: list[memoryview] | None = None,
    ) -> None:
        """buffers: memory for copies that is used again and again; fresh memory for each costs as much as reading."""
        self.unseen: dict[int, StoreError] = {}
        """Zones that the last look could not compare, and why."""
        self.disk = disk
        self.keeper = keeper
        self._place = place
        self._buffers = [] if buffers is None else buffers
        self._env: Env = disk.env

    async def look(self, unsure: Collection[int] = ()) -> list[Misplaced]:
        """Compare; forget copies that a zone doesn't have, and remove from the zones what nobody needs.

        unsure: zones that were not in service all the time since the last look: of their segments the seals are read
        too, 30 us each and a seek.
        """
        disk, keeper, env = self.disk, self.keeper, self._env
        self.unseen.clear()
        if disk.writer.error is not None:
            # Its end may be on zones that were out, and is taken over only when the log is opened anew.
            raise Unavailable(f"log {disk.log} has stopped: {disk.writer.error}")
        await disk.writer.go_elsewhere()
        settled = [s for s in self._segments() if s.sealed and s.memory is None]
        below = disk.writer.tail_number
        newest = keeper.number
        for z in sorted(env.in_service):
            files = await self._list(z, log_folder(disk.log))
            if files is not None:
                others = await self._other_seals(z, files, settled) if z in unsure else frozenset()
                await self._compare_segments(z, files, settled, below, others)
        shown = [(z, await self._checkpoints(z, newest)) for z in sorted(env.in_service)]
        longest: dict[int, int] = {}
        for _, sizes in shown:
            for number, size in sizes.items():
                longest[number] = max(size, longest.get(number, 0))  # a torn copy is shorter than a whole one
        keeper.take_in(longest)
        found: dict[int, list[int]] = {number: [] for number in keeper.sizes if number <= newest}
        for z, sizes in shown:
            for number, size in sizes.items():
                if number in found and size == keeper.sizes.get(number):
                    found[number].append(z)
                elif number not in keeper.sizes:
                    await self._remove(z, checkpoint_name(disk.log, number))
        if isinstance(disk.checkpoint_zones, CheckpointZones):
            for number, zones in found.items():
                if zones and number in keeper.sizes:
                    disk.checkpoint_zones.found(number, zones)
        return self.misplaced()

    async def _checkpoints(self, zone: int, newest: int) -> dict[int, int]:
        """Bytes of the checkpoints up to that one that a zone shows."""
        files = await self._list(zone, checkpoint_folder(self.disk.log)) or ()
        numbers = ((object_number(entry.name), entry.size_bytes) for entry in files)
        return {number: size for number, size in numbers if number is not None and number <= newest}

    def _segments(self) -> list[Segment]:
        disk = self.disk
        return [*disk.segments.values(), *(segment for segment, _ in disk.dead.values())]

    async def _list(self, zone: int, folder: str) -> list[Entry] | None:
        try:
            return await run_long(self._env.executor, zone, self._env.zones[zone].backend.list, folder)
        except StoreError as error:
            log.warning("a zone can't be looked at zone=%r: %s", self._env.zones[zone], error)
            self.unseen[zone] = error
            return None

    async def _other_seals(self, zone: int, files: list[Entry], settled: list[Segment]) -> frozenset[int]:
        """Numbers of the segments whose copy on that zone has another seal. What has none that can be read is damaged:
        the scrub's business, which may need what is left of it."""
        sizes = {segment_number(entry.name): entry.size_bytes for entry in files}
        wanted = [(s.number, s.seal_crc) for s in settled if zone in s.zones and sizes.get(s.number) == s.file_bytes]
        env = self._env
        found: set[int] = set()
        for low in range(0, len(wanted), SEALS_AT_ONCE):
            part = wanted[low : low + SEALS_AT_ONCE]
            backend = env.zones[zone].backend
            try:
                other = await run_long(env.executor, zone, other_seals, backend, env.store_id, self.disk.log, part)
            except StoreError as error:
                log.warning("a zone can't be looked at zone=%r: %s", env.zones[zone], error)
                self.unseen[zone] = error
                break
            found.update(other)
        return frozenset(found)

    async def _compare_segments(
        self, zone: int, files: list[Entry], settled: list[Segment], below: int, others: frozenset[int]
    ) -> None:
        sizes = {segment_number(entry.name): entry.size_bytes for entry in files}
        for segment in settled:
            gone = sizes.get(segment.number) != segment.file_bytes or segment.number in others
            if gone and segment.number in self.disk.dead:
                segment.zones = tuple(z for z in segment.zones if z != zone)  # freed before the last process ended
            elif gone and zone in segment.zones and self._known(segment):
                what = "is another segment's" if segment.number in others else "is missing"
                log.warning("a copy %s segment=%s zone=%r", what, segment.name, self._env.zones[zone])
                segment.zones = tuple(z for z in segment.zones if z != zone)
                segment.drop_handle(zone)
        for number in sizes:
            if number is None or number >= below:
                continue
            key = self.disk.log << 28 | number
            owner = self._env.segments.get(key)
            if owner is None or zone not in owner.zones:
                await self._remove(zone, segment_name(self.disk.log, number))

    def _known(self, segment: Segment) -> bool:
        return self._env.segments.get(segment.key) is segment

    async def _remove(self, zone: int, name: str) -> None:
        try:
            await run(self._env.executor, zone, self._env.zones[zone].backend.delete, name)
        except StoreError as error:
            log.warning("an old file stays name=%s zone=%r: %s", name, self._env.zones[zone], error)

    def misplaced(self) -> list[Misplaced]:
        """What is not where it should be, as far as is known here."""
        env = self._env
        found = []
        for segment in self._segments():
            if not segment.sealed or segment.memory is not None:
                continue
            have = env.serving(segment.zones)
            wanted = env.serving(self._place(segment.number))
            if not segment.zones and segment.number in self.disk.dead:
                continue  # its file is gone: a checkpoint that lists it as dead was the last that could need it
            if set(have) != set(wanted):
                found.append(_misplaced(segment.number, False, segment.file_bytes, have, wanted))
        wanted = env.serving(self._place(0))
        for number, size_bytes in self.keeper.sizes.items():
            have = env.serving(self.disk.checkpoint_zones(number))
            if set(have) != set(wanted):
                found.append(_misplaced(number, True, size_bytes, have, wanted))
        return found

    async def restore(self, item: Misplaced) -> tuple[int, ...]:
        """Make the copies that are missing; the zones that got one. Corrupt, Unavailable: there is no whole copy."""
        if item.is_checkpoint:
            return await self._restore_checkpoint(item)
        segment = self._segment(item.number)
        if segment is None:
            return ()
        env = self._env
        segment.pins += 1
        try:
            sources = env.serving(segment.zones)
            first = segment.number % max(1, len(sources))  # every zone reads its share
            buffer = self._buffers.pop() if self._buffers else None
            image = await load_copy(env, segment, sources[first:] + sources[:first], buffer)
            targets = env.serving(z for z in item.missing if z not in segment.zones)
            stored = await asyncio.gather(*(replace_copy(env, segment, z, image) for z in targets))
            done = tuple(z for z, ok in zip(targets, stored, strict=True) if ok)
            segment.zones = tuple(sorted({*segment.zones, *done}))
            if len(done) == len(targets):  # else a call that hangs may still read it
                self._buffers.append(buffer if buffer is not None and image.obj is buffer.obj else image)
            return done
        finally:
            segment.unpin()

    def _segment(self, number: int) -> Segment | None:
        disk = self.disk
        return disk.segments.get(number) or (disk.dead[number][0] if number in disk.dead else None)

    async def _restore_checkpoint(self, item: Misplaced) -> tuple[int, ...]:
        env, disk, keeper = self._env, self.disk, self.keeper
        done: list[int] = []
        for source in env.serving(item.have):
            backend = env.zones[source].backend
            try:
                copy = await run_long(
                    env.executor, source, look_through_checkpoint, backend, env.store_id, disk.log, item.number
                )
            except StoreError as error:
                log.warning("a checkpoint can't be read zone=%r: %s", env.zones[source], error)
                continue
            if copy.problem:
                continue
            for z in env.serving(item.missing):
                if await copy_checkpoint_to(env, disk.log, item.number, source, z, copy):
                    done.append(z)
            break
        else:
            # Its deletion may have been undone by a power cut, with what became of the file since.
            if not await keeper.do_without(item.number):
                raise Corrupt(f"no zone in service has checkpoint {item.number} whole log={disk.log}")
        if item.number not in keeper.sizes:
            keeper.drop_checkpoint(item.number)
        elif done and isinstance(disk.checkpoint_zones, CheckpointZones):
            disk.checkpoint_zones.found(item.number, {*disk.checkpoint_zones(item.number), *done})
        return tuple(done)

    async def shed(self, items: Sequence[Misplaced]) -> int:
        """Give up the copies that should not stay where they are, of objects that are where they should be; the bytes.

        A copy goes when two checkpoints that don't list it are durable: the older one is the one to fall back on.
        """
        env, disk = self._env, self.disk
        gone: list[tuple[Segment, int]] = []
        freed = 0
        for item in items:
            if item.is_checkpoint or not item.extra or item.missing:
                continue
            segment = self._segment(item.number)
            if segment is None:
                continue
            for z in item.extra:
                if z in segment.zones:
                    segment.zones = tuple(o for o in segment.zones if o != z)
                    segment.drop_handle(z)
                    gone.append((segment, z))
        if gone or any(item.is_checkpoint and item.extra and not item.missing for item in items):
            try:
                for _ in range(2):
                    await self.keeper.checkpoint()
            except StoreError:
                # Not given up yet: what no table names is removed by the next look, and the newest ones still name it.
                for segment, z in gone:
                    segment.zones = tuple(sorted({*segment.zones, z}))
                raise
        for segment, z in gone:
            if z in env.in_service and z not in segment.zones:
                await self._remove(z, segment.name)
                freed += segment.file_bytes
        for item in self.misplaced():
            if item.is_checkpoint and item.extra and not item.missing:
                if isinstance(disk.checkpoint_zones, CheckpointZones):
                    disk.checkpoint_zones.found(item.number, set(item.have) - set(item.extra))
                for z in item.extra:
                    await self._remove(z, checkpoint_name(disk.log, item.number))
                    freed += item.size_bytes
        return freed


def other_seals(backend: Backend, store_id: bytes, log_number: int, wanted: Sequence[tuple[int, int]]) -> list[int]:
    """In a zone's thread: those of the (number, seal CRC) whose copy there has a seal, and another one. One that can't
    be read is no other one."""
    found = []
    for number, crc in wanted:
        try:
            seal = seal_of(backend, store_id, log_number, number, False)
        except ZoneFailed:
            continue
        if seal is not None and seal != crc:
            found.append(number)
    return found


def _misplaced(
    number: int, is_checkpoint: bool, size_bytes: int, have: Sequence[int], wanted: Sequence[int]
) -> Misplaced:
    missing = tuple(sorted(set(wanted).difference(have)))
    return Misplaced(number, is_checkpoint, size_bytes, tuple(have), missing, tuple(sorted(set(have) - set(wanted))))

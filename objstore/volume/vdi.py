"""A VDI as a volume: byte ranges, order of admission, modes of acknowledgement, over one log's disk.

Admission: writes that can't be taken at once wait for `_turn` in the order in which they came, whatever connection they
came from, and hold it until they have their place in the log. A block that is written in part is read and merged while
the turn is held, so two writers of one block never lose each other's bytes.

First flush: from the moment a VDI is opened every write is durable before it is acknowledged, until the first flush or
FUA on any connection shows that the client knows how to flush (mode `writeback`); then it is write-back until the store
closes the VDI.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from functools import partial

from objstore.errors import InvalidRequest, NoSpace, NotSupported, StoreError, Unavailable
from objstore.format.catalog import Limit, VdiEntry
from objstore.format.record import RECORD_DATA_BLOCKS_MAX, Flag
from objstore.log.address import BLOCK_BITS, HOLE, RESERVED, SEGMENT_BITS
from objstore.log.collect import Collector
from objstore.log.disk import Disk
from objstore.log.keeper import Keeper
from objstore.log.regions import Region, depths_of
from objstore.replica.zone import run
from objstore.stages import StagedLock, stage
from objstore.units import BLOCK_BYTES, BLOCK_MASK, BLOCK_SHIFT, REGION_BLOCKS, REGION_MASK
from objstore.volume.base import always
from objstore.volume.opening import Placement
from objstore.volume.reading import Reading, cover
from objstore.volume.standstill import Standstill
from objstore.volume.throttle import Throttle
from objstore.volume.together import begin_together

FILL_BLOCKS_MAX = (1 << 32) - REGION_BLOCKS
"""Of one operation; a longer fill is cut between regions of the map."""
RECLAIMS_MAX = 8
"""Times that one request waits for something to be freed and then meets full zones again. What was freed may have been
dense segments moved elsewhere, with nothing won."""
ALLOCATE_BLOCKS_MAX = 1 << 18
ALLOCATE_RUNS_MAX = 256
"""Of one step: others get their turn between two."""
COPY_BLOCKS_MAX = 1 << 10
COPY_RUNS_MAX = 256
"""Of one step of flattening."""
GIVE_BACK_ROUNDS = 6
RESERVED_OVERHEAD = 1.06
"""Files over data for whole 1 MiB records: header pages, directory, rounding."""


class Vdi(Reading):
    """An open VDI (Volume). Touched by the event loop only.

    `_busy`: reasons why `write_now` must not even look: write-through, closed, failed.
    """

    def __init__(self, entry: VdiEntry, disk: Disk, keeper: Keeper) -> None:
        super().__init__(disk)
        self.vdi_id = entry.vdi_id
        self.name = entry.name
        self.size_bytes = entry.size_bytes
        self.read_only = False
        self.copies = entry.copies
        self.mode = mode = entry.mode
        self.prealloc = entry.prealloc
        self._throttle = Throttle({}, disk.env.loop)
        self.disk = disk
        self.keeper = keeper
        self.collector = Collector(disk, keeper)
        self.attached = 0
        self.users = 0
        """Pieces of the store's own work that need this VDI to stay."""
        self.standstill: Standstill | None = None
        """Helps the log on when it stands still; None: nobody does."""
        self.last_flush: float | None = None
        self._env = disk.env
        self._maps = disk.env.maps
        self._writer = disk.writer
        self._unsafe = mode == "unsafe"
        self._write_through = mode in ("writeback", "writethrough")
        self._turn = StagedLock("turn")
        disk.on_boundary = self._boundary
        disk.on_failed = self._failed
        keeper.on_progress = self.collector.poke
        keeper.start()
        if any(not segment.live and not segment.held for segment in disk.segments.values()):
            self.collector.poke()  # nobody else will before something is written

    def limit(self, limits: Mapping[str, Limit], weight: int) -> None:
        """Its clients may do so much from now on."""
        self.weight = weight
        self._throttle.set(limits)
        self.limiter = self._throttle if limits else None

    def grow(self, size_bytes: int) -> None:
        """It is so large from now on. What is new was never written, and the rest of the last block is zeros."""
        self.size_bytes = size_bytes
        self.disk.blocks = -(-size_bytes // BLOCK_BYTES)

    def shrink(self, size_bytes: int) -> None:
        """It is so large from now on; `clear_behind` discards what is behind that."""
        self.size_bytes = size_bytes

    async def clear_behind(self) -> None:
        """Discard what lies behind the end, and zero the rest of the last block; durable on return, whatever the mode.
        NoSpace; Corrupt: that block can't be read."""
        first, skip = self.size_bytes >> BLOCK_SHIFT, self.size_bytes & BLOCK_MASK
        async with self._turn:
            pieces: list[tuple[int, int, memoryview | int]] = []
            if skip:
                last = memoryview(bytearray(BLOCK_BYTES))
                if await self.disk.read(first, 1, last) != 1:
                    last[skip:] = bytes(BLOCK_BYTES - skip)
                    pieces.append((first, 1, last))
                first += 1
            if first < self.disk.blocks:
                pieces.append((first, self.disk.blocks - first, HOLE))
            await self._append(pieces, always)
            position = self._writer.position
            self.disk.blocks = first
        await self.durable_to(position)

    async def set_copies(self, copies: int, min_copies: int) -> None:
        """Segments made from now on have so many copies. What is open with another number is sealed first, before
        anything is measured by the new least number."""
        writer = self._writer
        self.copies = writer.copies = copies
        if isinstance(writer.place, Placement):
            writer.place.set_copies(copies)
        writer.min_copies = min(writer.min_copies, min_copies)
        writer.forget_prepared()
        if writer.has_records:
            writer.finish_segment()
        await writer.flush()
        await writer.sealed_below(writer.tail_number)
        writer.min_copies = min_copies

    @property
    def turn(self) -> asyncio.Lock:
        """Whoever holds it is the only one who puts something into the log."""
        return self._turn

    @property
    def description(self) -> str:
        """One line for people."""
        return f"{self.mode}, {self.copies} {'copy' if self.copies == 1 else 'copies'}"

    @property
    def reserved_bytes(self) -> int:
        """Space in each zone that a preallocated VDI still has a right to: what it has not written yet."""
        if not self.prealloc:
            return 0
        return int((self.size_bytes - (self.disk.loose_live << BLOCK_SHIFT)) * RESERVED_OVERHEAD)

    @property
    def write_through(self) -> bool:
        """Whether a write is durable before it is acknowledged, now."""
        return self._write_through

    def look_again(self) -> None:
        """The log has gone on after a standstill: what waits for segments or checkpoints may go on too."""
        self._boundary()

    def _boundary(self) -> None:
        self.keeper.boundary()
        self.collector.poke()

    def _failed(self) -> None:
        self.keeper.leave()
        self.collector.poke()

    # -- writing ------------------------------------------------------------------------------------------------

    def write_now(self, offset_bytes: int, data: memoryview) -> bool:
        """See Volume."""
        length_bytes = len(data)
        if (
            self._write_through
            or self._turn.locked()
            or (offset_bytes | length_bytes) & BLOCK_MASK
            or self.collector.tight
            or self._writer.scarce
            or self._maps.pinned_bytes >= self._maps.pinned_bytes_max
            or self._env.dirty_bytes >= self._env.dirty_bytes_max
        ):
            return False
        self._check(offset_bytes, length_bytes)
        if length_bytes == BLOCK_BYTES:
            return self.disk.write_block(offset_bytes >> BLOCK_SHIFT, data)
        return bool(length_bytes) and self.disk.write_now(offset_bytes >> BLOCK_SHIFT, data)

    async def write(
        self, offset_bytes: int, data: memoryview, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        """See Volume."""
        length_bytes = len(data)
        self._check(offset_bytes, length_bytes)
        if length_bytes:
            first, count, skip = cover(offset_bytes, length_bytes)
            async with self._turn:
                whole = data
                if skip or count << BLOCK_SHIFT != length_bytes:
                    whole = await self._merged(first, count, skip, data)
                await self._append([(first, count, whole)], alive)
                position = self._writer.position
        else:
            position = self._writer.position
        if fua or self._write_through:
            await self._durable(position, fua=fua)

    async def _merged(self, first: int, count: int, skip: int, data: memoryview) -> memoryview:
        """The whole blocks that a write of parts of them leaves; Corrupt if what is underneath can't be read."""
        whole = memoryview(bytearray(count << BLOCK_SHIFT))
        with stage("zone read"):
            if skip:
                await self.disk.read(first, 1, whole[:BLOCK_BYTES])
            if (skip + len(data)) & BLOCK_MASK and (count > 1 or not skip):
                await self.disk.read(first + count - 1, 1, whole[-BLOCK_BYTES:])
        whole[skip : skip + len(data)] = data
        return whole

    async def _append(self, pieces: list[tuple[int, int, "memoryview | int"]], alive: Callable[[], bool]) -> None:
        """Put one request into the log; the turn is held. pieces: (first block, count, whole blocks or HOLE/RESERVED).

        All pieces take effect together: with the last part of the last one. No checkpoint can begin between the parts,
        so nothing is freed there: whoever has to wait for space forgets the parts and begins again.
        """
        disk, writer = self.disk, self._writer
        await self._admit()
        with stage("map"):
            for first, count, what in pieces:
                if isinstance(what, memoryview):
                    await self.keeper.map_room(partial(disk.map.grows, first, count))
        with stage("space"):
            await self.collector.room()
        whole = list(pieces)
        begun = False
        reclaims = 0
        try:
            while pieces:
                first, count, what = pieces[0]
                with stage("map"):
                    await disk.load_edges(first, count)
                blocks = count if isinstance(what, memoryview) else 0
                room = 0 if blocks and writer.scarce else writer.room(blocks)
                if not room:
                    try:
                        with stage("log append"):
                            await writer.make_room(self._reserve() if blocks else 0)
                    except NoSpace:
                        disk.forget_parts()
                        pieces[:] = whole
                        begun = False
                        reclaims += 1
                        with stage("space"):
                            if reclaims > RECLAIMS_MAX or not await self.collector.reclaim():
                                raise
                    continue
                if not begun and not alive():
                    raise InvalidRequest("the connection that asked for this is gone")
                if isinstance(what, memoryview):
                    taken = min(count, room)
                    rest: memoryview | int = what[taken << BLOCK_SHIFT :]
                else:
                    taken = min(count, FILL_BLOCKS_MAX - (first & REGION_MASK))
                    rest = what
                last = taken == count and len(pieces) == 1
                flags = 0
                if begun or not last:
                    flags = Flag.LAST if last else Flag.PART if begun else Flag.PART | Flag.FIRST
                if isinstance(what, memoryview):
                    disk.append_write(first, taken, what[: taken << BLOCK_SHIFT], flags)
                else:
                    disk.append_fill(first, taken, what, flags)
                begun = True
                if taken == count:
                    pieces.pop(0)
                else:
                    pieces[0] = (first + taken, count - taken, rest)
                    await self._admit()
            for _ in iter(disk.apply_more, False):
                await asyncio.sleep(0)
        finally:
            if pieces:  # an error, or the caller was cancelled: the request never happened
                disk.forget_parts()
            while disk.apply_more():
                pass

    def _reserve(self) -> int:
        """Bytes that this VDI's data must leave free in every zone."""
        env = self._env
        return env.reserve_bytes + env.reserved_bytes(self.disk.log)

    async def _admit(self) -> None:
        """Wait while dirty data stands at its limit."""
        env, writer = self._env, self._writer
        with stage("dirty limit"):
            while env.dirty_bytes >= env.dirty_bytes_max and writer.error is None:
                await env.dirty_room()
        if writer.error is not None:
            raise writer.error
        if self.closed is not None:
            raise self.closed

    async def trim(
        self, offset_bytes: int, length_bytes: int, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        """See Volume."""
        self._check(offset_bytes, length_bytes, bounded=False)
        first = offset_bytes + BLOCK_MASK >> BLOCK_SHIFT
        end = offset_bytes + length_bytes
        last = self.disk.blocks if end == self.size_bytes else end >> BLOCK_SHIFT
        if first < last:
            async with self._turn:
                await self._append([(first, last - first, HOLE)], alive)
        await self._after(fua=fua)

    async def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        *,
        no_hole: bool = False,
        fast: bool = False,
        fua: bool = False,
        alive: Callable[[], bool] = always,
    ) -> None:
        """See Volume."""
        self._check(offset_bytes, length_bytes, bounded=False)
        if no_hole and not self.prealloc and length_bytes > self._env.settings.segment_bytes:
            await self._check_space(length_bytes)
        first = offset_bytes + BLOCK_MASK >> BLOCK_SHIFT
        end = offset_bytes + length_bytes
        last = self.disk.blocks if end == self.size_bytes else end >> BLOCK_SHIFT
        whole_only = not offset_bytes & BLOCK_MASK and (end == self.size_bytes or not end & BLOCK_MASK)
        if fast and not whole_only:
            raise NotSupported(f"unaligned range can't be zeroed fast offset={offset_bytes} length={length_bytes}")
        if length_bytes:
            async with self._turn:
                pieces: list[tuple[int, int, memoryview | int]] = []
                if first > last:  # inside one block
                    pieces.append(await self._zeroed(offset_bytes, length_bytes))
                else:
                    head = min((first << BLOCK_SHIFT) - offset_bytes, length_bytes)
                    if head:
                        pieces.append(await self._zeroed(offset_bytes, head))
                    if first < last:
                        pieces.append((first, last - first, RESERVED if no_hole else HOLE))
                    tail = 0 if end == self.size_bytes else end & BLOCK_MASK
                    if tail:
                        pieces.append(await self._zeroed(end - tail, tail))
                await self._append(pieces, alive)
        await self._after(fua=fua)

    async def allocate(self, offset_bytes: int, length_bytes: int) -> int:
        """Make reserved zeros of the holes among the blocks of a range, and change nothing else; durable on return.

        A bounded amount of work: returns how many bytes of the range are done, at least one. NoSpace: the zones can't
        hold the range now.
        """
        self._check(offset_bytes, length_bytes, bounded=False)
        if not self.prealloc:
            await self._check_space(length_bytes)
        first, count, skip = cover(offset_bytes, length_bytes)
        at = first
        # A write that comes between the look and the change would be lost: both happen in one turn.
        async with self._turn:
            for kind, blocks in await self.disk.extents(first, min(count, ALLOCATE_BLOCKS_MAX), ALLOCATE_RUNS_MAX):
                if kind == HOLE:
                    await self._append([(at, blocks, RESERVED)], always)
                at += blocks
            position = self._writer.position
        await self._durable(position, fua=False)
        return min(length_bytes, (at - first << BLOCK_SHIFT) - skip)

    async def copy_in(self, offset_bytes: int, length_bytes: int) -> int:
        """Of a clone: write what of a range lies in other logs into its own; what the VDI shows stays.

        A bounded amount of work: returns how many bytes of the range are done, at least one. NoSpace; Corrupt: a block
        is damaged in every zone.
        """
        self._check(offset_bytes, length_bytes, bounded=False)
        first, count, skip = cover(offset_bytes, length_bytes)
        with self._reading():
            stretches = await self.disk.extents(first, count, COPY_RUNS_MAX, self._foreign)
        at, copied = first, 0
        for depth, blocks in stretches:
            while depth > 1 and blocks and copied < COPY_BLOCKS_MAX:
                part = min(blocks, RECORD_DATA_BLOCKS_MAX)
                await self._copy(at, part)
                at, blocks, copied = at + part, blocks - part, copied + part
            if depth > 1 and blocks:
                break
            at += blocks
        return min(length_bytes, (at - first << BLOCK_SHIFT) - skip)

    def _foreign(self, value: "Region | None", first: int, end: int) -> list[tuple[int, int]]:
        return depths_of(value, first, end, {self.disk.log: 1})

    async def _copy(self, first: int, count: int) -> None:
        """Write those of some blocks again that lie in other logs. They are read before the turn is taken: the map must
        say the same then, and what it says of other logs never comes back once it is gone."""
        data = memoryview(bytearray(count << BLOCK_SHIFT))
        while True:
            runs = await self._runs(first, count)
            with self._reading():
                await self.disk.read(first, count, data)
            async with self._turn:
                if await self._runs(first, count) != runs:
                    continue
                pieces: list[tuple[int, int, memoryview | int]] = []
                at = 0
                for entry, blocks in runs:
                    if entry > RESERVED and entry >> (SEGMENT_BITS + BLOCK_BITS) != self.disk.log:
                        pieces.append((first + at, blocks, data[at << BLOCK_SHIFT : at + blocks << BLOCK_SHIFT]))
                    at += blocks
                if pieces:
                    await self._append(pieces, always)
                return

    async def _runs(self, first: int, count: int) -> list[tuple[int, int]]:
        """Where blocks lie: (entry of the first, blocks) of each run."""
        evict = True
        while wanted := self.disk.map.missing(first, count):
            await self.disk.load(wanted, evict=evict)
            evict = False
        return self.disk.map.runs(first, count)

    async def reads_over(self) -> None:
        """Return when everything has ended that was under way at this call and may read."""
        async with self._turn:
            pass
        await super().reads_over()

    async def _check_space(self, length_bytes: int) -> None:
        """NoSpace if the zones can't hold so much more now, what the VDI holds already not counted."""
        env = self._env
        zones = env.serving(self._writer.place(self._writer.next_number))
        answers = await asyncio.gather(
            *(run(env.executor, z, env.zones[z].backend.free_bytes) for z in zones), return_exceptions=True
        )
        free = [answer for answer in answers if isinstance(answer, int)]
        if not free:  # of zones that fail meanwhile the others don't wait
            raise Unavailable("no zone says how much space it has")
        missing = int((length_bytes - (self.disk.loose_live << BLOCK_SHIFT)) * RESERVED_OVERHEAD)
        if min(free) - self._reserve() < missing:
            raise NoSpace(f"the zones can't hold it{env.space_hint()}: free_bytes={min(free)} needed_bytes={missing}")

    async def _zeroed(self, offset_bytes: int, length_bytes: int) -> tuple[int, int, memoryview]:
        """One block with a part of it zeroed, as a piece of `_append`."""
        first, count, skip = cover(offset_bytes, length_bytes)
        whole = memoryview(bytearray(count << BLOCK_SHIFT))
        if await self.disk.read(first, 1, whole) != 1:
            whole[skip : skip + length_bytes] = bytes(length_bytes)
        return first, count, whole

    async def _after(self, *, fua: bool) -> None:
        if fua or self._write_through:
            await self._durable(self._writer.position, fua=fua)

    async def _durable(self, position: int, *, fua: bool) -> None:
        if self._unsafe:
            return
        with stage("sync"):
            await self._writer.flush(position)
        if fua:
            self._flushed()

    def flush_state(self) -> int:
        """See Volume."""
        writer = self._writer
        first = self._write_through and self.mode == "writeback"
        if first or self.closed is not None or writer.error is not None:
            return -1 - writer.position
        if self._unsafe or writer.durable_upto >= writer.position:
            self._flushed()
            return 0
        return writer.position

    def sync_soon(self) -> None:
        """See Volume."""
        if not self._unsafe and self._writer.error is None:
            self._writer.request_sync()

    async def flush(self) -> None:
        """See Volume."""
        if self.closed is not None:
            raise self.closed
        if not self._unsafe:
            with stage("sync"):
                await self._writer.flush()
        self._flushed()

    def _flushed(self) -> None:
        self.last_flush = self._env.clock.wall()
        if self.mode == "writeback":
            self._write_through = False

    # -- snapshots ----------------------------------------------------------------------------------------------

    async def begin_snapshot(self) -> tuple[int, int]:
        """`begin_together` of this VDI alone."""
        return (await begin_together([self]))[0]

    async def durable_to(self, position: int) -> None:
        """Return when everything up to that operation is durable, whatever the mode. Unavailable."""
        await self._writer.flush(position)

    def unchanged_since(self, position: int) -> bool:
        """Whether the contents are certainly those behind the operation at `position`."""
        disk = self.disk
        return position == self._writer.position or (
            position == disk.still_since and disk.still_position == self._writer.position
        )

    async def give_back(self, leaving: Callable[[], bool] = lambda: False) -> None:
        """Free what nothing needs any more, as far as that can be done now. leaving: whether to stop halfway."""
        await self.collector.round()  # one that has begun may have looked already
        for _ in range(GIVE_BACK_ROUNDS):
            await self.collector.round()
            if not self.disk.dead or leaving():
                return
            with contextlib.suppress(NoSpace):
                await self.keeper.checkpoint()

    # -- the end ------------------------------------------------------------------------------------------------

    async def _quiesce(self, reason: StoreError) -> None:
        """Take nothing more (every later call raises `reason`) and wait for what is under way."""
        self.closed = reason
        self._write_through = True
        async with self._turn:
            pass
        await self.quiet()

    async def abandon(self, reason: StoreError) -> None:
        """Take nothing more and stop, without making anything durable: the VDI is being deleted."""
        await self._quiesce(reason)
        await self._leave_standing()
        await self.collector.close()
        await self.keeper.close()
        await self._writer.close()

    async def close(self, reason: StoreError) -> None:
        """Take nothing more (every later call raises `reason`); make durable what was acknowledged, write a checkpoint.

        Unavailable: a zone failed, what was not flushed may be lost. The handle is closed all the same.
        """
        await self._quiesce(reason)
        try:
            await self.collector.close()
            if self._writer.error is not None:
                raise self._writer.error
            await self._writer.flush()
            try:
                await self.keeper.checkpoint()
            except NoSpace:
                self._writer.finish_segment()
                await self._writer.flush()
                await self._writer.sealed_below(self._writer.next_number)
        finally:
            await self._leave_standing()
            await self.keeper.close()
            await self._writer.close()

    async def _leave_standing(self) -> None:
        """From now on nobody helps the log on."""
        if self.standstill is not None:
            await self.standstill.close()

"""Opening a log: find what survived, never edit it, copy the unsealed end. FORMAT.md, "Opening a log".

    1. the sealed segments of the tail, in order, while the chain of records holds: kept as they are
    2. from the first unsealed one on: every whole record, from whichever zone has it
    3. what 2 gave is appended again, by the writer of a new generation, to new segments, which are sealed and synced
    4. the caller commits that with one head record; only then anything is served, and only then garbage is deleted

A crash anywhere repeats the same steps from the old head: segments of an uncommitted generation are garbage.
"""

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from objstore.backend.base import Backend, Entry, ZoneFailed
from objstore.errors import Corrupt, StoreError, Unavailable
from objstore.format.record import FLAG_SHIFT, KIND_SHIFT, LBA_MASK
from objstore.format.segment import Directory, SegmentHeader
from objstore.log.env import Env
from objstore.log.segment import log_folder, segment_number
from objstore.log.tail import (
    Seen,
    SurvivingRecord,
    data_spans,
    durable_claim,
    look_at,
    read_image,
    records_from,
    seal_of,
)
from objstore.log.trust import Trust
from objstore.log.writer import UNSEALED_MAX, LogWriter
from objstore.replica.zone import run, run_long
from objstore.units import BLOCK_BYTES

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOKS_AT_ONCE = 32
LOOKS_PER_CALL = 16
"""Segments that one call in a zone's thread looks at: handing over a call takes as long as a look."""
SETTLED_SEGMENTS = 2 * UNSEALED_MAX
"""With so many later segments on a zone that took records, a segment's seal is durable there (DESIGN.md, rule 6)."""
FRESH_MARGIN_BLOCKS = 8
"""Blocks that a segment needs beyond the data of its first record."""


class Row(NamedTuple):
    """A sealed segment that a head names; zones: who has it."""

    number: int
    seal_crc: int
    zones: tuple[int, ...]


class Head(NamedTuple):
    """The committed head of a log: which segments make up its tail.

    tail: segments that count although their generation is older. first_number: from here on every segment of
    `generation` counts. checkpoint: the newest that was durable when the head was written (0 = none). clean: the log
    was closed. epoch: id of the epoch in force then. copies: each of its segments was put on so many zones, None = on
    every member. base_checkpoint: the one that this generation began with (0 = none); first_checkpoint: where the
    numbers of its own begin. Those between the two are of runs that ended, and don't count any more.
    """

    generation: int
    tail: tuple[Row, ...]
    first_number: int
    checkpoint: int
    clean: bool
    epoch: str = ""
    copies: int | None = None
    base_checkpoint: int = 0
    first_checkpoint: int = 0


class Base(NamedTuple):
    """Where the tail begins: just behind the newest checkpoint."""

    position: int
    previous_crc: int
    next_segment: int


class Tail(NamedTuple):
    """What survived behind the base.

    sealed: directories of the segments kept, with the zones that hold each and the blocks of its file.
    rest: whole records behind them that must be copied.
    shown: every segment that any zone shows, with those zones.
    empty: segments behind the base that gave nothing, with the zones where they are garbage at once, whatever becomes
    of this opening.
    next_number: above everything seen. newest_wall_us: time of the last surviving record.
    """

    sealed: list[tuple[Directory, tuple[int, ...], int]]
    rest: list[SurvivingRecord]
    shown: dict[int, tuple[int, ...]]
    empty: dict[int, tuple[int, ...]]
    next_number: int
    newest_wall_us: int


async def list_folder(env: Env, trust: Trust, folder: str) -> dict[int, list[Entry]]:
    """The folder's objects in every zone that answers; one that doesn't is not here any more."""
    zones = sorted(trust.here)

    async def one(z: int) -> list[Entry]:
        try:
            return await run_long(env.executor, z, env.zones[z].backend.list, folder)
        except ZoneFailed as error:
            silent(env, trust, z, error)
            return []

    listings = await asyncio.gather(*(one(z) for z in zones))
    return {z: listing for z, listing in zip(zones, listings, strict=True) if z in trust.here}


def silent(env: Env, trust: Trust, zone: int, error: StoreError) -> None:
    """A zone failed while a log was opened: it is put out, and the log opened without it if that can be."""
    logger.warning("%r failed: %s", env.zones[zone], error)
    trust.lost(zone)
    env.zone_failing(zone, error)


def believe(trust: Trust, head: Head) -> None:
    """Unavailable, naming zones, unless what was written after the head can't be in zones alone that don't answer."""
    missing = [] if head.clean else trust.unanswered(head.epoch, head.copies)
    if missing:
        raise Unavailable(f"what was written last may be on zones that are missing: {', '.join(missing)}")


async def read_tail(
    env: Env,
    log: int,
    head: Head,
    base: Base,
    *,
    copy_all: bool = False,
    trust: Trust | None = None,
    force: bool = False,
) -> Tail:
    """copy_all: keep no sealed segment, give every record in `rest` (the catalog). trust: whom to believe.

    Corrupt: the log ends before something that is known to have been durable. Unavailable: it may go on in zones that
    are not here; they are named. force: then take what there is.
    """
    trust = trust or Trust(env, None)
    listings = await list_folder(env, trust, log_folder(log))
    shown: dict[int, list[int]] = {}
    for z, listing in listings.items():
        for entry in listing:
            number = segment_number(entry.name)
            if number is not None:
                shown.setdefault(number, []).append(z)
    if not force:
        believe(trust, head)
    reader = _TailReader(env, log, head, base, trust, shown, copy_all, force)
    await reader.read()
    next_number = max([head.first_number, base.next_segment, *(number + 1 for number in shown)])
    return Tail(
        reader.sealed,
        reader.rest,
        {number: tuple(zones) for number, zones in shown.items()},
        reader.empty,
        next_number,
        reader.wall_us,
    )


class _Look(NamedTuple):
    """A segment as its zones show it. directory: of the seal that counts, `sealed` on these zones. readable: the zones
    whose records may be taken. foreign: it belongs to no part of this log that counts."""

    directory: Directory | None
    sealed: tuple[int, ...]
    size_bytes: int
    readable: tuple[int, ...]
    foreign: bool


class _Together(Generic[T]):
    """Questions about segments in one zone: those that come up in one loop turn are asked with a few calls."""

    def __init__(self, env: Env, zone: int, answer: Callable[[Backend, int], T]) -> None:
        """answer: runs in the zone's threads."""
        self._env = env
        self._zone = zone
        self._answer = answer
        self._asked: list[tuple[int, asyncio.Future[T]]] = []

    async def ask(self, number: int) -> T:
        """The answer about one segment. StoreError: one of those that were asked with it met it."""
        if not self._asked:
            self._env.loop.call_soon(self._go)
        future: asyncio.Future[T] = self._env.loop.create_future()
        self._asked.append((number, future))
        return await future

    def _go(self) -> None:
        env, zone = self._env, self._zone
        asked, self._asked = self._asked, []
        for low in range(0, len(asked), LOOKS_PER_CALL):
            part = asked[low : low + LOOKS_PER_CALL]
            numbers = [number for number, _ in part]
            done = functools.partial(_answered, [future for _, future in part])
            env.executor.submit(zone, _answers, (self._answer, env.zones[zone].backend, numbers), done)


def _answers(answer: Callable[[Backend, int], T], backend: Backend, numbers: Sequence[int]) -> list[T]:
    """In a zone's thread."""
    return [answer(backend, number) for number in numbers]


def _answered(futures: Sequence[asyncio.Future[T]], answers: list[T], error: BaseException | None) -> None:
    for i, future in enumerate(futures):
        if future.done():
            continue
        if error is None:
            future.set_result(answers[i])
        else:
            future.set_exception(error)


class _TailReader:
    """One reading of a log's end; its results are the attributes without underscore."""

    def __init__(
        self,
        env: Env,
        log: int,
        head: Head,
        base: Base,
        trust: Trust,
        shown: dict[int, list[int]],
        copy_all: bool,
        force: bool,
    ) -> None:
        self._env = env
        self._log = log
        self._head = head
        self._trust = trust
        self._shown = shown
        self._copy_all = copy_all
        self._force = force
        self._first = base.next_segment
        self._position = base.position
        self._previous_crc = base.previous_crc
        self._rows = {row.number: row for row in head.tail if row.number >= base.next_segment}
        self._claim = 0
        self._later: Counter[int] = Counter()
        """By zone: segments looked at so far, all later than those to come, that took records there."""
        store_id = env.store_id
        self._looks = self._each(lambda backend, number: look_at(backend, store_id, log, number))
        self._seals = self._each(lambda backend, number: seal_of(backend, store_id, log, number, False))
        self._synced_seals = self._each(lambda backend, number: seal_of(backend, store_id, log, number, True))
        self.sealed: list[tuple[Directory, tuple[int, ...], int]] = []
        self.rest: list[SurvivingRecord] = []
        self.empty: dict[int, tuple[int, ...]] = {}
        self.wall_us = 0

    def _each(self, answer: Callable[[Backend, int], T]) -> list[_Together[T]]:
        return [_Together(self._env, zone.index, answer) for zone in self._env.zones]

    async def read(self) -> None:
        for row in self._rows.values():
            if row.number not in self._shown:
                self._missing(row)
        first = self._head.first_number
        numbers = sorted(n for n in self._shown if n >= self._first and (n in self._rows or n >= first))
        looks: dict[int, _Look] = {}
        # The last ones first: what they show settles what lies before.
        for high in range(len(numbers), 0, -LOOKS_AT_ONCE):
            part = numbers[max(0, high - LOOKS_AT_ONCE) : high]
            found = await asyncio.gather(*(self._look(number) for number in part))
            looks.update(zip(part, found, strict=True))
            for number, look in zip(part, found, strict=True):
                if number not in self._rows:
                    self._later.update(look.sealed)
        for number in numbers:
            await self._take(number, looks[number])
        if self._claim > self._position:
            text = (
                f"the log ends before what was durable, segments are missing or damaged log={self._log} "
                f"ends={self._position} durable={self._claim}"
            )
            if not self._force:
                raise Corrupt(text)
            logger.error("forced: %s", text)

    def _missing(self, row: Row) -> None:
        """Unavailable or Corrupt: no zone here has a segment that the head names."""
        absent = self._trust.absent(row.zones)
        if absent:
            raise Unavailable(
                f"segment {row.number} of log {self._log} is on zones that are missing: {', '.join(absent)}"
            )
        raise Corrupt(f"segments that the head names are missing log={self._log} segments={[row.number]}")

    def _out_of_reach(self, number: int, zones: Sequence[str]) -> Unavailable:
        where = ", ".join(zones) or "none that can be believed"
        return Unavailable(f"segment {number} of log {self._log} is on zones that are missing: {where}")

    async def _take(self, number: int, look: _Look) -> None:
        """One segment, in the order of their numbers."""
        if look.foreign:
            self._nothing(number)
            return
        expected = None if number in self._rows else self._head.generation
        directory = look.directory
        if directory is not None:
            self._claim = max(self._claim, directory.durable_upto)
            follows = directory.previous_crc == self._previous_crc and directory.first_position == self._position + 1
            if follows and not self.rest and not self._copy_all:
                self._position, self._previous_crc = directory.last_position, directory.last_crc
                self.wall_us = directory.wall_us
                absent = [z for z in self._rows[number].zones if z not in self._trust.here] if expected is None else []
                self.sealed.append((directory, tuple(sorted({*look.sealed, *absent})), look.size_bytes // BLOCK_BYTES))
                return
        found_images = await asyncio.gather(*(self._image(z, number) for z in look.readable))
        images = [image for image in found_images if image is not None]
        if look.readable and not images and not self._force:
            raise self._out_of_reach(number, self._trust.absent(look.readable))
        store_id, log = self._env.store_id, self._log
        found = list(
            records_from(
                images,
                store_id=store_id,
                log=log,
                number=number,
                block=1,
                position=self._position,
                previous_crc=self._previous_crc,
                generation=expected,
            )
        )
        if found:
            self.rest += found
            self._position, self._previous_crc = found[-1].header.last_position, found[-1].header.crc
            self.wall_us = found[-1].header.wall_us
        else:
            self._nothing(number)
        claim = durable_claim(images, store_id=store_id, log=log, number=number, generation=expected)
        self._claim = max(self._claim, claim)

    def _nothing(self, number: int) -> None:
        """The segment is garbage, at once where it was in service until the end of the run that wrote it."""
        everywhere = self._trust.everywhere(self._head.epoch)
        self.empty[number] = tuple(z for z in self._shown[number] if z in everywhere)

    async def _image(self, zone: int, number: int) -> memoryview | None:
        env = self._env
        try:
            return await run(env.executor, zone, read_image, env.zones[zone].backend, self._log, number)
        except ZoneFailed as error:
            silent(env, self._trust, zone, error)
            return None

    async def _look(self, number: int) -> _Look:
        row = self._rows.get(number)
        return await (self._look_named(number, row) if row is not None else self._look_new(number))

    async def _look_named(self, number: int, row: Row) -> _Look:
        """A segment that the head names was durable and sealed on its zones: whoever shows that seal has it."""
        directory: Directory | None = None
        sealed: list[int] = []
        size = 0
        zones = self._turned(number)
        for z in zones:
            if directory is None:
                seen = await self._seen(z, number)
                if seen.directory is not None and seen.directory.crc == row.seal_crc:
                    directory, size = seen.directory, seen.size_bytes
                    sealed.append(z)
            elif await self._seal(z, number, sync=False) == row.seal_crc:
                sealed.append(z)
        if directory is None and self._trust.absent(row.zones):
            self._missing(row)
        # Without any seal that can be read its records may still be whole.
        return _Look(directory, tuple(sealed), size, tuple(zones), False)

    async def _look_new(self, number: int) -> _Look:
        """A segment written after the head. Its seal counts if all zones that have what was flushed to it show the
        same: each wrote it after its own body was synced, so one zone's seal says nothing about another's copy. Else
        its records are copied, as if it had none. What counts is synced, unless enough was written behind it: after a
        kill it may be in the page cache alone."""
        trust, head = self._trust, self._head
        header: SegmentHeader | None = None
        zones = self._turned(number)
        seens: dict[int, Seen] = {}
        for z in zones:
            seens[z] = await self._seen(z, number)
            found = seens[z].header
            if found is not None and found.generation == head.generation and trust.knows(found.epoch_id):
                header = found
                break
        if header is None or head.clean:
            if head.clean or any(seen.header is not None for seen in seens.values()):
                return _Look(None, (), 0, (), True)
            # No zone shows what it is; its records do.
            everywhere = trust.everywhere(head.epoch)
            return _Look(None, (), 0, tuple(z for z in zones if z in everywhere), False)
        holders = trust.holders(header.epoch_id, header.zones)
        asked = [z for z in holders if z in trust.here]
        if not asked:
            if not self._force:
                raise self._out_of_reach(number, trust.absent(holders))
            return _Look(None, (), 0, tuple(zones), False)
        seen = seens[asked[0]] if asked[0] in seens else await self._seen(asked[0], number)
        directory = seen.directory
        if directory is not None:
            settled = {z for z in asked if self._copy_all or self._later[z] >= SETTLED_SEGMENTS}
            seals = await asyncio.gather(*(self._seal(z, number, sync=z not in settled) for z in asked))
            if any(seal != directory.crc for seal in seals) or directory.generation != head.generation:
                directory = None
        readable = tuple(z for z in zones if z in asked)
        return _Look(directory, tuple(asked) if directory else (), seen.size_bytes, readable, False)

    def _turned(self, number: int) -> list[int]:
        """The zones that show a segment, another first for each, so that all of them work."""
        zones = self._shown[number]
        start = number % len(zones)
        return zones[start:] + zones[:start]

    async def _seen(self, zone: int, number: int) -> Seen:
        try:
            return await self._looks[zone].ask(number)
        except ZoneFailed as error:
            silent(self._env, self._trust, zone, error)
            return Seen(None, None, 0)

    async def _seal(self, zone: int, number: int, *, sync: bool) -> int | None:
        try:
            return await (self._synced_seals if sync else self._seals)[zone].ask(number)
        except ZoneFailed as error:
            silent(self._env, self._trust, zone, error)
            return None


async def copy_rest(writer: LogWriter, rest: Iterable[SurvivingRecord]) -> None:
    """Append the surviving records again, request by request, each operation keeping its position; then seal and sync.

    The writer's observer is told of the segments made, in order. No operation is split, so where segments have become
    smaller by a change of settings, these are made large enough for the largest one, all of them alike.
    """
    rest = list(rest)
    largest = max((len(crcs) for record in rest for _, _, _, crcs, _ in data_spans(record.header)), default=0)
    writer.segment_blocks = max(writer.segment_blocks, largest + FRESH_MARGIN_BLOCKS)
    for record in rest:
        assert record.header.position == writer.position + 1, "every operation keeps its position"
        for bits, count, at, crcs, sources in data_spans(record.header):
            blocks = len(crcs)
            while not writer.room_for_batch(blocks):
                await writer.make_room(0)
            writer.append(
                bits >> KIND_SHIFT & 0xFF,
                bits & LBA_MASK,
                count,
                record.data[at * BLOCK_BYTES : (at + blocks) * BLOCK_BYTES] if blocks else None,
                flags=bits >> FLAG_SHIFT,
                crcs=crcs,
                sources=sources,
            )
        if writer.env.dirty_bytes > writer.env.dirty_bytes_max:
            await writer.flush()
    writer.finish_segment()
    await writer.flush()
    await writer.sealed_below(writer.next_number)

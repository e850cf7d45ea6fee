"""Opening a log: find what survived, never edit it, copy the unsealed end. FORMAT.md, "Opening a log".

    1. the sealed segments of the tail, in order, while the chain of records holds: kept as they are
    2. from the first unsealed one on: every whole record, from whichever zone has it
    3. what 2 gave is appended again, by the writer of a new generation, to new segments, which are sealed and synced
    4. the caller commits that with one head record; only then anything is served, and only then garbage is deleted

A crash anywhere repeats the same steps from the old head: segments of an uncommitted generation are garbage.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from objstore.errors import Corrupt
from objstore.format.record import FLAG_SHIFT, KIND_SHIFT, LBA_MASK
from objstore.format.segment import Directory
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
from objstore.log.writer import LogWriter
from objstore.replica.zone import run
from objstore.units import BLOCK_BYTES

LOOKS_AT_ONCE = 64
FRESH_MARGIN_BLOCKS = 8
"""Blocks that a segment needs beyond the data of its first record."""


class Head(NamedTuple):
    """The committed head of a log: which segments make up its tail.

    tail: segments that count although their generation is older. first_number: from here on every segment of
    `generation` counts. checkpoint: the newest that was durable when the head was written (0 = none). clean: the log
    was closed.
    """

    generation: int
    tail: tuple[int, ...]
    first_number: int
    checkpoint: int
    clean: bool


class Base(NamedTuple):
    """Where the tail begins: just behind the newest checkpoint."""

    position: int
    previous_crc: int
    next_segment: int


class Tail(NamedTuple):
    """What survived behind the base.

    sealed: directories of the segments kept, with the zones that hold each and the blocks of its file.
    rest: whole records behind them that must be copied.
    unkept: every other segment that any zone shows, with those zones; garbage unless the base's table lists it.
    empty: those of `unkept` behind the base that gave nothing; garbage at once, whatever becomes of this opening.
    next_number: above everything seen. newest_wall_us: time of the last surviving record.
    """

    sealed: list[tuple[Directory, tuple[int, ...], int]]
    rest: list[SurvivingRecord]
    unkept: dict[int, tuple[int, ...]]
    empty: set[int]
    next_number: int
    newest_wall_us: int


async def read_tail(env: Env, log: int, head: Head, base: Base, *, copy_all: bool = False) -> Tail:
    """copy_all: keep no sealed segment, give every record in `rest` (the catalog).

    Corrupt: the log ends before something that is known to have been durable."""
    zones = [zone.index for zone in env.zones]
    listings = await asyncio.gather(*(run(env.executor, z, env.zones[z].backend.list, log_folder(log)) for z in zones))
    holders: dict[int, list[int]] = {}
    for z, listing in zip(zones, listings, strict=True):
        for entry in listing:
            number = segment_number(entry.name)
            if number is not None:
                holders.setdefault(number, []).append(z)
    next_number = max([head.first_number, base.next_segment, *(number + 1 for number in holders)])
    listed = set(head.tail)
    candidates = sorted(n for n in holders if n >= base.next_segment and (n in listed or n >= head.first_number))
    missing = [n for n in head.tail if n >= base.next_segment and n not in holders]
    if missing:
        raise Corrupt(f"segments that the head names are missing log={log} segments={missing}")
    position, previous_crc = base.position, base.previous_crc
    sealed: list[tuple[Directory, tuple[int, ...], int]] = []
    rest: list[SurvivingRecord] = []
    kept: set[int] = set()
    empty: set[int] = set()
    claim = wall_us = 0
    numbers = {zone.zone_id: zone.index for zone in env.zones}
    # A committed head names only segments that were durable on all their zones by then.
    looks = await _look(env, log, candidates, holders, set(candidates) if copy_all else listed)
    for number in candidates:
        seen = looks[number]
        headers = [s.header for s in seen if s.header is not None]
        directories = [s.directory for s in seen if s.directory is not None]
        expected = None if number in listed else head.generation
        if expected is not None and headers and all(h.generation != expected for h in headers):
            empty.add(number)
            continue  # where no zone shows a header, the records say which generation they are of
        if directories and (expected is None or directories[0].generation == expected):
            directory = directories[0]
            claim = max(claim, directory.durable_upto)
            follows = directory.previous_crc == previous_crc and directory.first_position == position + 1
            if follows and not rest and not copy_all:
                position, previous_crc = directory.last_position, directory.last_crc
                wall_us = directory.wall_us
                held = tuple(numbers[zone_id] for zone_id in headers[0].zones if zone_id in numbers) if headers else ()
                size = next(s.size_bytes for s in seen if s.directory is not None)
                sealed.append((directory, held or tuple(holders[number]), size // BLOCK_BYTES))
                kept.add(number)
                continue
        images = await asyncio.gather(
            *(run(env.executor, z, read_image, env.zones[z].backend, log, number) for z in holders[number])
        )
        found = list(
            records_from(
                images,
                store_id=env.store_id,
                log=log,
                number=number,
                block=1,
                position=position,
                previous_crc=previous_crc,
                generation=expected,
            )
        )
        if found:
            rest += found
            position, previous_crc = found[-1].header.last_position, found[-1].header.crc
            wall_us = found[-1].header.wall_us
        else:
            empty.add(number)
        claim = max(claim, durable_claim(images, store_id=env.store_id, log=log, number=number, generation=expected))
    if claim > position:
        raise Corrupt(
            f"the log ends before what was durable, segments are missing or damaged log={log} ends={position} "
            f"durable={claim}"
        )
    unkept = {n: tuple(z) for n, z in holders.items() if n not in kept}
    return Tail(sealed, rest, unkept, empty, next_number, wall_us)


async def _look(
    env: Env, log: int, numbers: Sequence[int], holders: dict[int, list[int]], durable: set[int]
) -> dict[int, list[Seen]]:
    """Header and directory of each segment.

    A seal counts only if every zone that the header lists shows the same one: each zone wrote it after its own body
    was synced, so one zone's seal says nothing about another's copy. Without that the directories are left out, and the
    records are copied like those of a segment that was never sealed. What counts is synced, except for the segments in
    `durable`: after a kill a seal may be in the page cache alone.
    """
    numbers_of = {zone.zone_id: zone.index for zone in env.zones}
    looks: dict[int, list[Seen]] = {}

    async def look(number: int) -> None:
        zones = holders[number]
        start = number % len(zones)
        found: list[Seen] = []
        for z in zones[start:] + zones[:start]:
            seen = await run(env.executor, z, look_at, env.zones[z].backend, env.store_id, log, number)
            found.append(seen)
            if seen.directory is None or seen.header is None:
                continue
            known = number in durable
            others = [numbers_of[zone_id] for zone_id in seen.header.zones if numbers_of.get(zone_id, z) != z]
            seals = await asyncio.gather(
                *(
                    run(env.executor, o, seal_of, env.zones[o].backend, env.store_id, log, number, not known)
                    for o in (others if known else [z, *others])
                )
            )
            if any(seal != seen.directory.crc for seal in seals):
                found = [s._replace(directory=None) for s in found]
            break
        looks[number] = found

    for low in range(0, len(numbers), LOOKS_AT_ONCE):
        await asyncio.gather(*(look(number) for number in numbers[low : low + LOOKS_AT_ONCE]))
    return looks


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

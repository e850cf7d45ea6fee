"""The end of a log whose zones are gone is appended again on zones in service, while the log stays open.

The same steps as opening takes (DESIGN.md, "5. Opening edits nothing"), with one source more: what is not durable is
still in memory. Nothing is edited where it lies. The records from the first segment on that can't be sealed any more
get a new generation; a head that names it commits that, and until then the old end is the one that counts. So a crash
finds the one or the other, and a flush that waits is answered only when the new one counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from objstore.backend.base import ZoneFailed
from objstore.errors import StoreError, Unavailable
from objstore.format.record import DATA_KINDS, KIND_SHIFT, LBA_MASK
from objstore.format.segment import Directory
from objstore.log.address import BLOCK_BITS
from objstore.log.damage import blocks_of
from objstore.log.disk import Disk
from objstore.log.env import Env
from objstore.log.opening import copy_rest
from objstore.log.segment import Segment
from objstore.log.tail import SurvivingRecord, data_spans, read_image, records_from
from objstore.log.writer import LogWriter
from objstore.replica.zone import run, run_long

logger = logging.getLogger(__name__)

U64 = npt.NDArray[np.uint64]


class Copied(NamedTuple):
    """The end of a log, copied: durable and sealed in a new generation, and not counting yet.

    writer: of that generation, closed. segments: what it made. former: what lies in them lay there. lbas, sources,
    targets: each data block, where it is and where it will be.
    """

    writer: LogWriter
    segments: list[Segment]
    former: list[Segment]
    lbas: U64
    sources: U64
    targets: U64


class _Made:
    """What a writer makes (SegmentObserver)."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.directories: list[Directory] = []

    def segment_opened(self, segment: Segment) -> None:
        self.segments.append(segment)

    def segment_finished(self, segment: Segment, blocks_before: int, directory: Directory) -> None:
        self.directories.append(directory)

    def log_failed(self) -> None:
        """Whoever copies learns of it from the calls."""


async def copy_end(disk: Disk) -> Copied | None:
    """Append again what the writer of this disk, which takes nothing new, can't make durable where it lies.

    None: what was under way has become durable and sealed after all. StoreError: that can't be done just now;
    everything is as it was. Reads go on meanwhile, from the old end.
    """
    env, writer = disk.env, disk.writer
    assert writer.waits_for_takeover
    await writer.halt()
    for _ in iter(disk.apply_more, False):
        await asyncio.sleep(0)
    if not writer.unsealed:
        return None
    first = min(writer.unsealed)
    position, previous_crc = writer.starts[first]
    former = [disk.segments[number] for number in sorted(disk.segments) if number >= first]
    if any(segment.held for segment in former):
        raise Unavailable(f"the map of a snapshot is still being written log={disk.log}")
    rest = await _records(env, writer, former, position, previous_crc)
    made = _Made()
    successor = LogWriter(
        env,
        disk.log,
        generation=writer.generation + 1,
        copies=writer.copies,
        next_number=writer.next_number,
        position=position,
        previous_crc=previous_crc,
        place=writer.place,
        segment_bytes=env.settings.segment_bytes,
        min_copies=writer.min_copies,
    )
    successor.elsewhere = writer.elsewhere
    successor.segment_blocks = writer.segment_blocks
    successor.gives_up = True
    successor.observer = made
    try:
        await copy_rest(successor, rest)
        for segment in made.segments:
            if len(env.serving(segment.zones)) < writer.min_copies:
                raise Unavailable(f"zones failed again while the end of the log was copied log={disk.log}")
    except StoreError:
        await give_up(env, successor, made.segments)
        raise
    finally:
        writer.next_number = max(writer.next_number, successor.next_number)
    await successor.close()
    lbas, sources = _data_blocks(rest, former)
    targets = np.concatenate([blocks_of(directory)[1] for directory in made.directories])
    assert len(targets) == len(sources), "every data block has a new place"
    return Copied(successor, made.segments, former, lbas, sources, targets)


async def give_up(env: Env, successor: LogWriter, segments: Sequence[Segment]) -> None:
    """What was copied is not to count: remove it. What can't be removed is garbage that the next opening removes."""
    await successor.close()
    for segment in segments:
        env.segments.pop(segment.key, None)
        segment.close_handles()
        for zone in env.serving(segment.zones):
            try:
                await run(env.executor, zone, env.zones[zone].backend.delete, segment.name)
            except StoreError as error:
                logger.warning("garbage stays until the next opening: %s", error)


async def _records(
    env: Env, writer: LogWriter, former: Sequence[Segment], position: int, previous_crc: int
) -> list[SurvivingRecord]:
    """Every record of these segments: from memory, and what is durable from zones that have it. Unavailable: none of
    those is in service."""
    rest: list[SurvivingRecord] = []
    for i, segment in enumerate(former):
        end = writer.starts[former[i + 1].number][0] if i + 1 < len(former) else writer.position
        images = [memoryview(writer.image(segment))]
        zones = list(env.serving(segment.zones))
        while True:
            found = list(
                records_from(
                    images,
                    store_id=env.store_id,
                    log=segment.log,
                    number=segment.number,
                    block=1,
                    position=position,
                    previous_crc=previous_crc,
                    generation=segment.generation,
                )
            )
            if found and found[-1].header.last_position == end:
                break
            await asyncio.sleep(0)
            if not zones:
                names = ", ".join(repr(env.zones[z]) for z in segment.zones)
                raise Unavailable(f"what was flushed last is on zones that are out or can't be read: {names}")
            zone = zones.pop(0)
            try:
                image = await run_long(
                    env.executor, zone, read_image, env.zones[zone].backend, segment.log, segment.number
                )
            except ZoneFailed as error:
                env.read_failed(zone, error)
            else:
                images.append(image)
        rest += found
        position, previous_crc = found[-1].header.last_position, found[-1].header.crc
    return rest


def _data_blocks(rest: Sequence[SurvivingRecord], former: Sequence[Segment]) -> tuple[U64, U64]:
    """(logical blocks, entries) of every data block of these records, in log order."""
    keys = {segment.number: segment.key for segment in former}
    lbas: list[int] = []
    entries: list[int] = []
    for record in rest:
        header = record.header
        base = keys[header.segment] << BLOCK_BITS | header.block + 1
        for bits, count, at, _, _ in data_spans(header):
            if bits >> KIND_SHIFT & 0xFF in DATA_KINDS:
                lba = bits & LBA_MASK
                lbas.extend(range(lba, lba + count))
                entries.extend(range(base + at, base + at + count))
    return np.array(lbas, np.uint64), np.array(entries, np.uint64)


def take_over(disk: Disk, copied: Copied) -> None:
    """The head that names the copy is committed: map and writer go on behind it, in one loop turn."""
    writer = disk.writer
    disk.readdress(copied.segments, copied.former, copied.lbas, copied.sources, copied.targets)
    writer.go_on_behind(copied.writer, copied.former)


async def drop_former(env: Env, former: Sequence[Segment]) -> None:
    """Remove what nothing points at any more; what is just being read the next recovery removes."""
    for segment in former:
        if segment.pins:
            continue
        for zone in env.serving(segment.zones):
            try:
                await run(env.executor, zone, env.zones[zone].backend.delete, segment.name)
            except StoreError as error:
                logger.warning("garbage stays until the next recovery: %s", error)

"""One log over zones in memory, and what stands of it in a zone."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

from objstore.format.record import FLAG_SHIFT, KIND_SHIFT, LBA_MASK, Kind
from objstore.log.env import Env
from objstore.log.segment import Segment, log_folder, segment_number
from objstore.log.tail import SurvivingRecord, data_spans, records_from
from objstore.log.writer import LogWriter
from objstore.units import BLOCK_BYTES
from tests.support.stepping import STORE_ID, backend_of, executor_of

LOG = 1


def pattern(seed: int, blocks: int = 1) -> memoryview:
    """Whole blocks that differ from those of every other seed."""
    return memoryview(random.Random(seed).randbytes(blocks * BLOCK_BYTES))


@asynccontextmanager
async def writer_on(
    env: Env, *, place: Callable[[int], tuple[int, ...]] | None = None, position: int = 0, next_number: int = 0
) -> AsyncIterator[LogWriter]:
    """A writer of generation 1 on every zone of the store."""
    everywhere = tuple(range(len(env.zones)))
    writer = LogWriter(
        env,
        LOG,
        generation=1,
        copies=len(everywhere),
        next_number=next_number,
        position=position,
        previous_crc=0,
        place=place or (lambda number: everywhere),
        segment_bytes=env.settings.segment_bytes,
    )
    try:
        yield writer
    finally:
        executor_of(env).release(*everywhere)
        await writer.close()


async def put(writer: LogWriter, lba: int, blocks: int = 1, *, seed: int = 0, flags: int = 0) -> int:
    """Append one write when there is room for it; the entry of its first block."""
    while writer.room(blocks, whole=True) < blocks:
        await writer.make_room(0)
    return writer.append(Kind.WRITE, lba, blocks, pattern(seed or lba + 1, blocks), flags=flags)


def open_segment(writer: LogWriter) -> Segment:
    """The segment that takes records now."""
    assert writer.segment is not None
    return writer.segment


def records_in(env: Env, zone: int, *, position: int = 0, previous_crc: int = 0) -> list[SurvivingRecord]:
    """The records of the log that a zone has whole, in order, over all its segments."""
    objects = backend_of(env, zone).storage.objects
    found: list[SurvivingRecord] = []
    for name in sorted(objects):
        number = segment_number(name)
        if number is None or not name.startswith(log_folder(LOG)):
            continue
        for record in records_from(
            [bytes(objects[name])],
            store_id=STORE_ID,
            log=LOG,
            number=number,
            block=1,
            position=position,
            previous_crc=previous_crc,
            generation=None,
        ):
            found.append(record)
            position, previous_crc = record.header.last_position, record.header.crc
    return found


def operations_of(records: list[SurvivingRecord]) -> Iterator[tuple[int, int, int, int, bytes, tuple[int, ...]]]:
    """(kind, flags, block, count, data, sources) of each operation."""
    for record in records:
        for bits, count, at, crcs, sources in data_spans(record.header):
            data = bytes(record.data[at * BLOCK_BYTES : (at + len(crcs)) * BLOCK_BYTES])
            yield bits >> KIND_SHIFT & 0xFF, bits >> FLAG_SHIFT, bits & LBA_MASK, count, data, tuple(sources)

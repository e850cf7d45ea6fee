"""Reading blocks of a log: from memory while they are not durable, else from a zone, always verified.

What a read returns is checked against the CRC that the client's write was given: exactly the bytes that are handed out,
after a full-length read. A copy that fails is passed over for another zone's; a block that no zone has whole is
reported as damaged, never replaced by zeros or older data.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Sequence
from typing import Final

from crc32c import crc32c

from objstore.backend.base import Handle
from objstore.errors import Corrupt, StoreError, Unavailable
from objstore.format.segment import Directory
from objstore.log.crcs import RUN_BLOCKS_MIN, beginnings, run_crc
from objstore.log.env import Env
from objstore.log.segment import Segment
from objstore.log.tail import look_at
from objstore.replica.zone import run
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT

log = logging.getLogger(__name__)

OPENS_MAX: Final = 3
"""A handle may be gone again when whoever waited for it comes to use it: a repair has replaced the file."""


def read_run_now(segment: Segment, block: int, count: int, into: memoryview) -> bool:
    """Fill `into` with `count` blocks of one segment if no waiting is needed and every CRC is right."""
    memory = segment.memory
    crcs = segment.crcs
    reader = segment.reader
    if memory is None:
        if reader is None or crcs is None:
            return False
        try:
            if reader.read_nowait(block << BLOCK_SHIFT, (into,)) != len(into):
                return False
        except StoreError:
            return False  # whoever waits gets another zone's copy
        if count == 1:
            return bool(crc32c(into) == crcs[block])
        if count < RUN_BLOCKS_MIN:
            return verified(into, crcs, block, count)
        if segment.beginnings is None:
            segment.beginnings = beginnings(crcs)
        return bool(crc32c(into) == run_crc(segment.beginnings, block, count))
    done = 0
    while done < count:
        record = memory[block + done]
        at = done << BLOCK_SHIFT
        if record is not None:
            skip = block + done - record.start
            n = min(count - done, record.blocks - skip)
            into[at : at + (n << BLOCK_SHIFT)] = record.view[skip << BLOCK_SHIFT : (skip + n) << BLOCK_SHIFT]
        else:
            n = 1
            while done + n < count and memory[block + done + n] is None:
                n += 1
            part = into[at : at + (n << BLOCK_SHIFT)]
            if reader is None or crcs is None:
                return False
            try:
                if reader.read_nowait((block + done) << BLOCK_SHIFT, (part,)) != len(part):
                    return False
            except StoreError:
                return False
            if not verified(part, crcs, block + done, n):
                return False
        done += n
    return True


def verified(data: memoryview, crcs: array[int], block: int, count: int) -> bool:
    """Whether every block of `data` has its CRC."""
    at = 0
    for i in range(block, block + count):
        if crc32c(data[at : at + BLOCK_BYTES]) != crcs[i]:
            return False
        at += BLOCK_BYTES
    return True


async def read_run(
    env: Env,
    segment: Segment,
    block: int,
    count: int,
    wanted: Sequence[int] | None = None,
    buffer: memoryview | None = None,
) -> tuple[memoryview, list[int]]:
    """`count` blocks of a segment from its zones in service: (the data, indices of the blocks that none has whole).
    Unavailable: no zone that has the segment is in service.

    wanted: indices of the data blocks that matter (default: all); header pages in between have no CRC to check.
    buffer: where to read to, from a caller that is never cancelled while it awaits this; by default a buffer of this
    call's own, so that a thread that still fills it after a cancelled await harms nobody. For the same reason the data
    returned lies elsewhere if a zone was put out meanwhile: the caller must forget its buffer then.
    """
    segment.pins += 1
    try:
        crcs = segment.crcs if segment.crcs is not None else await load_crcs(env, segment)
        data = memoryview(bytearray(count << BLOCK_SHIFT)) if buffer is None else buffer[: count << BLOCK_SHIFT]
        bad = list(range(count) if wanted is None else wanted)
        all_wanted = len(bad)
        for z in in_turn(env, segment):
            try:
                handle = await reader_for(env, segment, z)
                copy = memoryview(bytearray(len(data))) if len(bad) < all_wanted else data
                got = await run(env.executor, z, handle.read, block << BLOCK_SHIFT, [copy])
            except StoreError as error:
                log.warning("read failed segment=%s zone=%r: %s", segment.name, env.zones[z], error)
                env.read_failed(z, error)
                if z not in env.in_service:
                    if len(bad) == all_wanted:
                        data = memoryview(bytearray(len(data)))  # a call that hangs may still fill the other
                else:
                    env.on_bad_copy(segment, z)
                continue
            left = []
            for i in bad:
                at = i << BLOCK_SHIFT
                if at + BLOCK_BYTES <= got and crc32c(copy[at : at + BLOCK_BYTES]) == crcs[block + i]:
                    if copy is not data:
                        data[at : at + BLOCK_BYTES] = copy[at : at + BLOCK_BYTES]
                else:
                    left.append(i)
            bad = left
            if not bad:
                break
            env.bad_copies += len(bad)
            env.on_bad_copy(segment, z)
            log.warning("checksum wrong segment=%s zone=%r blocks=%d", segment.name, env.zones[z], len(bad))
        return data, bad
    finally:
        segment.unpin()


def in_turn(env: Env, segment: Segment) -> tuple[int, ...]:
    """The zones in service that hold a segment, in the order in which to ask them. Unavailable: there is none."""
    zones = env.serving(segment.zones)
    if not zones:
        raise Unavailable(f"no zone that holds the segment is in service segment={segment.name}")
    first = segment.number % len(zones)
    return zones[first:] + zones[:first]


async def reader_for(env: Env, segment: Segment, zone: int) -> Handle:
    """An open handle of the segment in that zone."""
    for _ in range(OPENS_MAX):
        handle = segment.handles.get(zone)
        if handle is not None:
            return handle
        await _open_reader(env, segment, zone)
    raise Unavailable(f"the segment was closed segment={segment.name}")


async def _open_reader(env: Env, segment: Segment, zone: int) -> None:
    opened: asyncio.Future[None] = env.loop.create_future()

    def done(found: Handle | None, error: BaseException | None) -> None:
        # Here, not behind the await: the caller may have been cancelled, and nobody would close the descriptor.
        if found is not None:
            if zone in segment.handles or env.segments.get(segment.key) is not segment:
                found.close()
            elif zone not in env.in_service:
                env.orphan(zone, found)
            else:
                segment.handles[zone] = found
                if segment.reader is None:
                    env.keep_reader(segment, found)
        if opened.done():
            return
        if error is not None:
            opened.set_exception(error)
        else:
            opened.set_result(None)

    env.executor.submit(zone, env.zones[zone].backend.open, (segment.name,), done)
    await opened


async def load_directory(env: Env, segment: Segment) -> Directory | None:
    """The directory of a sealed segment, from the first zone that has the one that its seal CRC names; None: no zone
    does. Another one, however whole, is another writer's segment of the same number. Unavailable: no zone that has the
    segment is in service."""
    for z in in_turn(env, segment):
        zone = env.zones[z]
        try:
            seen = await run(env.executor, z, look_at, zone.backend, env.store_id, segment.log, segment.number)
        except StoreError as error:
            if z not in segment.zones:
                continue  # recovery has just moved that copy elsewhere
            log.warning("directory unreadable segment=%s zone=%r: %s", segment.name, zone, error)
            env.read_failed(z, error)
            env.on_bad_copy(segment, z)
            continue
        directory = seen.directory
        if directory is not None and directory.crc == segment.seal_crc:
            return directory
        if z not in segment.zones:
            continue
        if directory is not None:
            log.warning("a copy is another segment's segment=%s zone=%r", segment.name, zone)
        env.bad_copies += 1
        env.on_bad_copy(segment, z)
    return None


async def load_crcs(env: Env, segment: Segment) -> array[int]:
    """The CRCs of a sealed segment. Corrupt: no zone has its directory."""
    directory = await load_directory(env, segment)
    if directory is None:
        raise Corrupt(f"no zone has the directory of a segment segment={segment.name}")
    if segment.crcs is None:
        segment.crcs = directory.crcs
        env.crc_cache.append(segment)
        env.trim_crc_cache()
    return directory.crcs


def zero_fill(into: memoryview, pieces: Sequence[tuple[int, int]]) -> None:
    """Zero (first block, blocks) pieces of a buffer of whole blocks."""
    for first, count in pieces:
        into[first << BLOCK_SHIFT : (first + count) << BLOCK_SHIFT] = bytes(count << BLOCK_SHIFT)

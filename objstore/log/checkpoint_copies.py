"""Copies of checkpoints: looking at every byte of one around the host's cache, replacing the bad ones by a good one.

As with segments (copies.py) nothing is edited in place. Where no zone has a whole copy, what is left in several of them
is not put together byte by byte: whoever asks loads the map pages that any zone still has and writes a new checkpoint.
"""

import asyncio
import contextlib
import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from crc32c import crc32c

from objstore.backend.base import Backend, Handle, ZoneFailed
from objstore.errors import FormatError, NotFound, StoreError
from objstore.format.checkpoint import (
    FOOTER_BYTES,
    FRAME,
    ROOT,
    TABLE,
    decode_checkpoint_header,
    decode_footer,
    decode_frame,
)
from objstore.log.checkpoint import checkpoint_name
from objstore.log.env import Env
from objstore.replica.zone import run, run_long
from objstore.units import BLOCK_BYTES, REGION_BLOCKS

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 1 << 20
PAGE_BYTES_MAX: Final = 8 + 8 * REGION_BLOCKS
"""Longest map page: FORMAT.md, "Map pages"."""


class CheckpointCopy(NamedTuple):
    """One zone's copy of a checkpoint; problem: "" = every byte is right. crc: over all of it."""

    problem: str
    size_bytes: int
    crc: int


class HealedCheckpoint(NamedTuple):
    """What came of looking at all copies of a checkpoint. lost: no zone has a whole one."""

    read_bytes: int
    bad: dict[int, str]
    repaired: tuple[int, ...]
    lost: bool


def look_through_checkpoint(backend: Backend, store_id: bytes, log_number: int, number: int) -> CheckpointCopy:
    """In a zone's thread: read all of a checkpoint's copy and check it. ZoneFailed, NotFound."""
    handle = backend.open(checkpoint_name(log_number, number))
    size_bytes = handle.size_bytes
    crc = 0
    try:
        if size_bytes < BLOCK_BYTES + FOOTER_BYTES:
            return CheckpointCopy("it is too short", size_bytes, 0)
        end = bytearray(FOOTER_BYTES)
        handle.read_uncached(size_bytes - FOOTER_BYTES, [memoryview(end)])
        footer = decode_footer(bytes(end), store_id=store_id, log=log_number, number=number)
        table_end = footer.table_offset + footer.table_count * TABLE.itemsize
        in_order = (
            footer.root_offset >= BLOCK_BYTES
            and footer.root_offset + footer.root_count * ROOT.itemsize == footer.table_offset
            and table_end == size_bytes - FOOTER_BYTES
        )
        if not in_order:
            return CheckpointCopy("its parts don't fit its length", size_bytes, 0)
        for page in _chunks(handle, 0, BLOCK_BYTES):
            crc = crc32c(page, crc)
            decode_checkpoint_header(bytes(page), store_id=store_id, log=log_number, number=number)
        pending = b""
        for chunk in _chunks(handle, BLOCK_BYTES, footer.root_offset):
            crc = crc32c(chunk, crc)
            pending = _check_frames(pending + chunk, store_id, log_number, number)
        if pending:
            return CheckpointCopy("a map page is cut short", size_bytes, 0)
        for start, stop, wanted in (
            (footer.root_offset, footer.table_offset, footer.root_crc),
            (footer.table_offset, table_end, footer.table_crc),
        ):
            part_crc = 0
            for chunk in _chunks(handle, start, stop):
                crc = crc32c(chunk, crc)
                part_crc = crc32c(chunk, part_crc)
            if part_crc != wanted:
                return CheckpointCopy("its root or table is damaged", size_bytes, 0)
        return CheckpointCopy("", size_bytes, crc32c(end, crc))
    except FormatError as error:
        return CheckpointCopy(str(error), size_bytes, 0)
    finally:
        handle.close()


def _chunks(handle: Handle, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes from start to stop, read around the cache; each piece is valid until the next is asked for."""
    buffer = memoryview(mmap.mmap(-1, min(CHUNK_BYTES, max(1, stop - start))))
    while start < stop:
        piece = buffer[: min(len(buffer), stop - start)]
        if handle.read_uncached(start, [piece]) != len(piece):
            raise FormatError("the file was cut while it was read")
        yield piece
        start += len(piece)


def _check_frames(data: bytes, store_id: bytes, log_number: int, number: int) -> bytes:
    """Check every whole frame at the beginning of `data`; the rest. FormatError."""
    at = 0
    while len(data) - at >= FRAME.size:
        length, _, region = FRAME.unpack_from(data, at)
        if length > PAGE_BYTES_MAX:
            raise FormatError("a map page is damaged")
        end = at + FRAME.size + length
        if end > len(data):
            break
        decode_frame(data[at:end], store_id=store_id, log=log_number, number=number, region=region)
        at = end
    return data[at:]


async def heal_checkpoint(
    env: Env, log_number: int, number: int, zones: Sequence[int], *, repair: bool = True
) -> HealedCheckpoint:
    """Look at the copies of a checkpoint in `zones`, and replace those that are not whole by one that is."""
    copies = dict(zip(zones, await asyncio.gather(*(_look(env, log_number, number, z) for z in zones)), strict=True))
    bad = {z: copy.problem for z, copy in copies.items() if copy.problem}
    read_bytes = sum(copy.size_bytes for copy in copies.values())
    source = next((z for z, copy in copies.items() if not copy.problem), None)
    repaired = []
    if source is not None and repair:
        for z in bad:
            if await copy_checkpoint_to(env, log_number, number, source, z, copies[source]):
                repaired.append(z)
    return HealedCheckpoint(read_bytes, bad, tuple(repaired), bool(bad) and source is None)


async def _look(env: Env, log_number: int, number: int, zone: int) -> CheckpointCopy:
    backend = env.zones[zone].backend
    try:
        return await run_long(env.executor, zone, look_through_checkpoint, backend, env.store_id, log_number, number)
    except NotFound:
        return CheckpointCopy("it is missing", 0, 0)
    except StoreError as error:
        env.read_failed(zone, error)
        return CheckpointCopy(f"it can't be read: {error}", 0, 0)


async def copy_checkpoint_to(
    env: Env, log_number: int, number: int, source: int, target: int, copy: CheckpointCopy
) -> bool:
    """Copy a checkpoint that was just looked through into another zone, durably and only if it is still the same,
    each zone's calls in that zone's threads. False: one of the two would not."""
    name = checkpoint_name(log_number, number)
    left: list[tuple[int, Callable[[], None]]] = []
    try:
        done = await _copy(env, name, source, target, copy, left)
    except NotFound:
        done = False  # it was given up meanwhile
    except StoreError as error:
        done = False
        log.warning("a checkpoint could not be copied name=%s zone=%r: %s", name, env.zones[target], error)
    for zone, close in left:
        with contextlib.suppress(StoreError):
            await run(env.executor, zone, close)
    return done


async def _copy(
    env: Env, name: str, source: int, target: int, copy: CheckpointCopy, left: list[tuple[int, Callable[[], None]]]
) -> bool:
    """left: gets what the caller has to close afterwards, and in which zone's threads. StoreError."""
    handle = await run(env.executor, source, env.zones[source].backend.open, name)
    left.append((source, handle.close))
    try:
        writer = await run(env.executor, target, env.zones[target].backend.put_stream, name)
        left.append((target, writer.abort))
        crc = offset = 0
        while offset < copy.size_bytes:
            chunk = memoryview(bytearray(min(CHUNK_BYTES, copy.size_bytes - offset)))
            try:
                await run(env.executor, source, handle.read_uncached, offset, [chunk])
            except ZoneFailed as error:
                env.read_failed(source, error)
                raise FormatError(f"{error}") from error
            crc = crc32c(chunk, crc)
            await run(env.executor, target, writer.write, [chunk])
            offset += len(chunk)
        if crc != copy.crc:
            raise FormatError(f"a checkpoint changed while it was copied name={name}")
        await run(env.executor, target, writer.commit)
    except ZoneFailed as error:
        if target in env.in_service:
            env.zone_failing(target, error)
        raise
    return True

"""Copies of sealed segments: looking at every byte of one, putting a whole one together, making a new one.

What is looked at is read around the host's cache: a page there may be clean and never have reached the medium. Nothing
is edited in place: a copy that is bad is replaced by a new file that takes over its name once it is whole and durable,
so that a crash leaves the old one or the new one, and who has the old one open goes on reading that.

The blocking functions run in the threads of the zone whose backend they are given and touch no other: a call that hangs
is then counted where it hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

from crc32c import crc32c

from objstore.backend.base import Backend, Handle, ZoneFailed
from objstore.errors import Corrupt, FormatError, NotFound, StoreError
from objstore.format.record import MAGIC, decode_header
from objstore.format.segment import (
    FOOTER_BYTES,
    Directory,
    DirectoryBuilder,
    decode_directory,
    decode_footer,
    decode_segment_header,
)
from objstore.log.crcs import beginnings, page_crcs, run_crc
from objstore.log.env import Env
from objstore.log.segment import Segment, segment_name
from objstore.replica.pace import Courtesy
from objstore.replica.zone import run, run_long
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT

log = logging.getLogger(__name__)

CHUNK_BLOCKS: Final = 256
"""Read at once: 1 MiB."""
UNREADABLE_MAX: Final = 16
"""Blocks of one chunk that may fail to be read before the whole copy counts as unreadable: each may take seconds."""
END_BLOCKS: Final = 16
"""Read first, from the end of the file: the directory of most segments lies in it."""


class Copy(NamedTuple):
    """What one zone's copy of a sealed segment is worth.

    problem: "" = every byte that has a meaning is right. directory: None if it is damaged, missing or another one.
    bad: blocks that are not what the directory says, 0 = the header page; empty without a directory.
    """

    problem: str
    directory: Directory | None
    bad: tuple[int, ...]


class Healed(NamedTuple):
    """What came of looking at all copies of a segment.

    read_bytes: of all copies. bad: zone -> what was wrong with its copy. repaired: those that are whole again.
    lost: blocks of the body that no zone has; None if no zone has the directory, so that nothing can be read.
    directory: of the segment, None as above or if no zone was looked at.
    """

    read_bytes: int
    bad: dict[int, str]
    repaired: tuple[int, ...]
    lost: tuple[int, ...] | None
    directory: Directory | None


def look_through(
    backend: Backend,
    store_id: bytes,
    log_number: int,
    number: int,
    seal_crc: int,
    size_bytes: int,
    image: memoryview | None = None,
) -> Copy:
    """In a zone's thread: read all of a sealed segment's copy and compare it with its directory.

    seal_crc, size_bytes: which directory and what length it must have. image: size_bytes long; the copy is also put
    there. ZoneFailed, NotFound.
    """
    handle = backend.open(segment_name(log_number, number))
    try:
        if handle.size_bytes != size_bytes:
            return Copy(f"its file has {handle.size_bytes} bytes instead of {size_bytes}", None, ())
        directory = _directory(handle, store_id, log_number, number)
        if directory is None or directory.crc != seal_crc:
            if image is not None:
                _fill(handle, 0, image)
            return Copy("its directory is damaged" if directory is None else "it is another segment", None, ())
        crcs = page_crcs(directory)
        before = beginnings(crcs)
        blocks = len(crcs)
        buffer = _memory(CHUNK_BLOCKS << BLOCK_SHIFT) if image is None else image
        in_memory = False
        if image is not None:
            # One call: the device gets all of it at once. Chunk by chunk it took three times as long beside writes.
            with contextlib.suppress(ZoneFailed):
                _fill(handle, 0, image)
                in_memory = True
        bad: list[int] = []
        for first in range(0, blocks, CHUNK_BLOCKS):
            count = min(CHUNK_BLOCKS, blocks - first)
            at = 0 if image is None else first << BLOCK_SHIFT
            chunk = buffer[at : at + (count << BLOCK_SHIFT)]
            unreadable: set[int] = set()
            if not in_memory:
                unreadable.update(first + i for i in _fill_readable(handle, first << BLOCK_SHIFT, chunk))
            skip = 0
            if not first:
                skip = 1
                if not _is_header(chunk[:BLOCK_BYTES], store_id, log_number, number, directory.generation):
                    unreadable.add(0)
            if crc32c(chunk[skip << BLOCK_SHIFT :]) != run_crc(before, first + skip, count - skip):
                unreadable.update(bad_blocks(chunk, crcs, range(first + skip, first + count), first))
            bad += sorted(unreadable)
        if image is not None and not in_memory:
            _fill(handle, blocks << BLOCK_SHIFT, image[blocks << BLOCK_SHIFT :])
        return Copy(f"{len(bad)} blocks are damaged" if bad else "", directory, tuple(bad))
    finally:
        handle.close()


def _memory(size_bytes: int) -> memoryview:
    """Fresh memory that begins on a page, as reads around the cache want it."""
    return memoryview(mmap.mmap(-1, size_bytes))


def bad_blocks(data: memoryview, crcs: array[int], blocks: Sequence[int], first: int) -> list[int]:
    """Those of `blocks` whose contents in `data`, which begins with block `first`, don't have their CRC."""
    found = []
    for block in blocks:
        at = (block - first) << BLOCK_SHIFT
        if crc32c(data[at : at + BLOCK_BYTES]) != crcs[block]:
            found.append(block)
    return found


def _fill(handle: Handle, offset_bytes: int, into: memoryview) -> None:
    """Read around the cache; FormatError if the file is shorter than it said."""
    if into and handle.read_uncached(offset_bytes, [into]) != len(into):
        raise FormatError(f"the file was cut while it was read name={handle.name}")


def _fill_readable(handle: Handle, offset_bytes: int, into: memoryview) -> list[int]:
    """As _fill, but goes on behind places that the medium can't read: the blocks of `into` that stay undefined."""
    unreadable: list[int] = []
    try:
        _fill(handle, offset_bytes, into)
    except ZoneFailed:
        for block in range(len(into) >> BLOCK_SHIFT):
            at = block << BLOCK_SHIFT
            try:
                _fill(handle, offset_bytes + at, into[at : at + BLOCK_BYTES])
            except ZoneFailed:
                unreadable.append(block)
                if len(unreadable) > UNREADABLE_MAX:
                    raise
    return unreadable


def _directory(handle: Handle, store_id: bytes, log_number: int, number: int) -> Directory | None:
    size_bytes = handle.size_bytes
    if size_bytes < BLOCK_BYTES + FOOTER_BYTES:
        return None
    end = memoryview(bytearray(min(size_bytes, END_BLOCKS << BLOCK_SHIFT)))
    _fill(handle, size_bytes - len(end), end)
    footer = decode_footer(end[-FOOTER_BYTES:], store_id=store_id, log=log_number, segment=number)
    if footer is None:
        return None
    whole = footer.table_bytes + FOOTER_BYTES
    if whole + (footer.blocks << BLOCK_SHIFT) > size_bytes:
        return None
    if whole > len(end):
        end = memoryview(bytearray(whole))
        _fill(handle, size_bytes - whole, end)
    try:
        return decode_directory(footer, end[len(end) - whole : -FOOTER_BYTES], log=log_number, segment=number)
    except FormatError:
        return None


def _is_header(page: memoryview, store_id: bytes, log_number: int, number: int, generation: int) -> bool:
    try:
        header = decode_segment_header(page, store_id=store_id, log=log_number, segment=number)
    except FormatError:
        return False
    return header.generation == generation


def good_blocks(
    backend: Backend, store_id: bytes, directory: Directory, crcs: array[int], blocks: Sequence[int]
) -> dict[int, memoryview]:
    """In a zone's thread: those of `blocks` that this zone's copy has right. `crcs`: as page_crcs gives them.
    ZoneFailed, NotFound."""
    handle = backend.open(segment_name(directory.log, directory.segment))
    found = {}
    try:
        for block in blocks:
            page = memoryview(bytearray(BLOCK_BYTES))
            try:
                handle.read_uncached(block << BLOCK_SHIFT, [page])
            except ZoneFailed:
                continue
            if block:
                whole = crc32c(page) == crcs[block]
            else:
                whole = _is_header(page, store_id, directory.log, directory.segment, directory.generation)
            if whole:
                found[block] = page
    finally:
        handle.close()
    return found


def rebuilt_directory(
    images: Sequence[memoryview], store_id: bytes, log_number: int, number: int, generation: int, seal_crc: int
) -> tuple[Directory, bytes] | None:
    """(the directory, its bytes as at the end of the file), made again from the record headers of damaged copies.

    None if not every header is left in one of them. It is the one that was lost if and only if its CRC is `seal_crc`.
    """
    builder: DirectoryBuilder | None = None
    block = 1
    while True:
        header = None
        for image in images:
            page = bytes(image[block << BLOCK_SHIFT : (block + 1) << BLOCK_SHIFT])
            if page[:8] != MAGIC:
                continue
            try:
                found = decode_header(page, store_id=store_id, log=log_number, segment=number, block=block)
            except FormatError:
                continue
            follows = builder is None or found.previous_crc == builder.record_crcs[-1]
            if found.generation == generation and follows:
                header = found
                break
        if header is None:
            break
        if builder is None:
            builder = DirectoryBuilder(log_number, number, generation, header.previous_crc)
        builder.add_header(header)
        block += header.blocks
    if builder is None:
        return None
    data, crc = builder.encode(store_id)
    return (builder.finish(crc), data) if crc == seal_crc else None


def store_copy(backend: Backend, name: str, image: memoryview) -> None:
    """In a zone's thread: the object `name` becomes a file of exactly these bytes, durably, in place of any former."""
    writer = backend.put_stream(name)
    try:
        writer.write([image])
        writer.commit()
    finally:
        writer.abort()


async def heal(
    env: Env, segment: Segment, zones: Sequence[int], *, repair: bool = True, courtesy: Courtesy | None = None
) -> Healed:
    """Look at the copies of a sealed segment in `zones`, and replace those that are not whole by one that is.

    courtesy: while it finds clients active, one zone after the other is looked at, with rests between.
    The segment's seal is durable on all its zones. The caller sees to it that its log is not removed meanwhile.
    """
    segment.pins += 1
    try:
        if courtesy is None or not courtesy.crowded():
            seen = await asyncio.gather(*(_look(env, segment, z, None) for z in zones))
        else:
            seen = []
            for z in zones:
                began = env.clock.monotonic()
                seen.append(await _look(env, segment, z, None))
                await courtesy.make_way(env.clock.monotonic() - began)
        read_bytes = segment.file_bytes * len(zones)
        copies = dict(zip(zones, seen, strict=True))
        bad = {z: copy.problem for z, copy in copies.items() if copy.problem}
        directory = next((copy.directory for copy in seen if copy.directory is not None), None)
        if not bad:
            return Healed(read_bytes, bad, (), (), directory)
        image, directory, lost = await _put_together(env, segment, copies)
        repaired: list[int] = []
        if repair and lost == ():
            for z in bad:
                # A zone that is not to have one any more would keep a file that nobody knows.
                if z in segment.zones and await replace_copy(env, segment, z, image):
                    repaired.append(z)
        return Healed(read_bytes, bad, tuple(repaired), lost, directory)
    finally:
        segment.unpin()


async def load_copy(env: Env, segment: Segment, zones: Sequence[int], buffer: memoryview | None = None) -> memoryview:
    """A whole copy of a sealed segment in memory, verified while it is read: from the first of `zones` that has one, or
    put together from what several have. Corrupt: they don't have every block.

    buffer: memory to use, if it is long enough; if the result doesn't lie in it, a call that hangs may still fill it.
    """
    segment.pins += 1
    try:
        copies: dict[int, Copy] = {}
        size_bytes = segment.file_bytes
        for z in zones:
            image = buffer[:size_bytes] if buffer and len(buffer) >= size_bytes else _memory(size_bytes)
            buffer = None
            copies[z] = await _look(env, segment, z, image)
            if not copies[z].problem:
                return image
        image, _, lost = await _put_together(env, segment, copies)
        if lost != ():
            raise Corrupt(f"no zone has all of this segment segment={segment.name} zones={sorted(copies)}")
        return image
    finally:
        segment.unpin()


async def replace_copy(env: Env, segment: Segment, zone: int, image: memoryview) -> bool:
    """Put a whole copy into a zone in place of what is there. False: the zone would not take it."""
    try:
        await run(env.executor, zone, store_copy, env.zones[zone].backend, segment.name, image)
    except StoreError as error:
        log.warning("a copy could not be written segment=%s zone=%r: %s", segment.name, env.zones[zone], error)
        if isinstance(error, ZoneFailed):
            env.zone_failing(zone, error)
        return False
    segment.drop_handle(zone)
    return True


async def _look(env: Env, segment: Segment, zone: int, image: memoryview | None) -> Copy:
    try:
        return await run_long(
            env.executor,
            zone,
            look_through,
            env.zones[zone].backend,
            env.store_id,
            segment.log,
            segment.number,
            segment.seal_crc,
            segment.file_bytes,
            image,
        )
    except NotFound:
        return Copy("it is missing", None, ())
    except StoreError as error:
        env.read_failed(zone, error)
        return Copy(f"it can't be read: {error}", None, ())


async def _put_together(
    env: Env, segment: Segment, copies: dict[int, Copy]
) -> tuple[memoryview, Directory | None, tuple[int, ...] | None]:
    """(the segment's bytes, its directory, blocks that no copy has; None: no copy has the directory)."""
    ranked = sorted(copies, key=lambda z: (copies[z].directory is None, len(copies[z].bad)))
    for z in ranked:
        copy = copies[z]
        if copy.directory is None:
            break
        image = _memory(segment.file_bytes)
        copy = await _look(env, segment, z, image)
        if copy.directory is not None:
            lost = await _patch_from(env, [o for o in ranked if o != z], copy.directory, copy.bad, image)
            return image, copy.directory, lost
    return await _without_directory(env, segment, ranked)


async def _patch_from(
    env: Env, zones: Sequence[int], directory: Directory, bad: Sequence[int], image: memoryview
) -> tuple[int, ...]:
    left = set(bad)
    crcs = page_crcs(directory)
    for z in zones:
        if not left:
            break
        try:
            backend = env.zones[z].backend
            found = await run_long(env.executor, z, good_blocks, backend, env.store_id, directory, crcs, sorted(left))
        except StoreError as error:
            log.warning("a copy can't be read zone=%r: %s", env.zones[z], error)
            continue
        for block, page in found.items():
            image[block << BLOCK_SHIFT : (block + 1) << BLOCK_SHIFT] = page
        left -= found.keys()
    return tuple(sorted(left))


async def _without_directory(
    env: Env, segment: Segment, zones: Sequence[int]
) -> tuple[memoryview, Directory | None, tuple[int, ...] | None]:
    """No copy has its directory: make it again from the records, if all of their headers are left."""
    image = _memory(segment.file_bytes)
    images: list[memoryview] = []
    for z in zones:
        data = _memory(segment.file_bytes)
        try:
            await run_long(env.executor, z, _read_raw, env.zones[z].backend, segment.name, data)
        except StoreError as error:
            log.warning("a copy can't be read segment=%s zone=%r: %s", segment.name, env.zones[z], error)
        else:
            images.append(data)
    made = rebuilt_directory(images, env.store_id, segment.log, segment.number, segment.generation, segment.seal_crc)
    if made is None:
        return image, None, None
    directory, end = made
    crcs = page_crcs(directory)
    lost: Sequence[int] = range(len(crcs))
    for data in images:
        left = []
        for block in lost:
            at = block << BLOCK_SHIFT
            page = data[at : at + BLOCK_BYTES]
            if block:
                whole = crc32c(page) == crcs[block]
            else:
                whole = _is_header(page, env.store_id, segment.log, segment.number, segment.generation)
            if whole:
                image[at : at + BLOCK_BYTES] = page
            else:
                left.append(block)
        lost = left
    image[len(image) - len(end) :] = end
    return image, directory, tuple(lost)


def _read_raw(backend: Backend, name: str, into: memoryview) -> None:
    """In a zone's thread: as much of the object as there is."""
    handle = backend.open(name)
    try:
        handle.read_uncached(0, [into])
    finally:
        handle.close()

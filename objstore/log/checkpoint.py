"""Checkpoints of one log's map in its zones: writing them, finding the newest whole one, reading pages back."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from objstore.backend.base import Backend, Writer
from objstore.errors import Corrupt, FormatError, NotFound, StoreError
from objstore.format.checkpoint import (
    FOOTER_BYTES,
    ROOT,
    TABLE,
    CheckpointHeader,
    Footer,
    decode_checkpoint_header,
    decode_footer,
    decode_frame,
    decode_root,
    decode_table,
    encode_checkpoint_header,
    encode_footer,
    encode_frame,
)
from objstore.log.blockmap import PageRef
from objstore.log.env import Env
from objstore.replica.zone import run
from objstore.units import BLOCK_BYTES

logger = logging.getLogger(__name__)

CHUNK_BYTES: Final = 1 << 20


def checkpoint_folder(log: int) -> str:
    """Folder of a log's checkpoints in a zone."""
    return f"checkpoint/{log:06x}/"


def checkpoint_name(log: int, number: int) -> str:
    """Object name of a checkpoint in a zone."""
    return f"checkpoint/{log:06x}/{number:08x}"


class Loaded(NamedTuple):
    """A checkpoint read from a zone: header, root (ROOT), segment table (TABLE)."""

    header: CheckpointHeader
    root: npt.NDArray[np.void]
    table: npt.NDArray[np.void]


def read_checkpoint(backend: Backend, store_id: bytes, log: int, number: int) -> Loaded:
    """In a zone's thread. FormatError, NotFound: no whole checkpoint of that number here."""
    handle = backend.open(checkpoint_name(log, number))
    try:

        def read(offset: int, length: int) -> bytes:
            data = bytearray(length)
            if handle.read(offset, [memoryview(data)]) != length:
                raise FormatError(f"checkpoint cut short log={log} checkpoint={number}")
            return bytes(data)

        size = handle.size_bytes
        if size < BLOCK_BYTES + FOOTER_BYTES:
            raise FormatError(f"checkpoint too short log={log} checkpoint={number}")
        header = decode_checkpoint_header(read(0, BLOCK_BYTES), store_id=store_id, log=log, number=number)
        footer = decode_footer(read(size - FOOTER_BYTES, FOOTER_BYTES), store_id=store_id, log=log, number=number)
        if max(footer.root_offset + footer.root_count * ROOT.itemsize, footer.table_offset) > size:
            raise FormatError(f"checkpoint footer impossible log={log} checkpoint={number}")
        root = decode_root(read(footer.root_offset, footer.root_count * ROOT.itemsize), footer)
        table = decode_table(read(footer.table_offset, footer.table_count * TABLE.itemsize), footer)
        return Loaded(header, root, table)
    finally:
        handle.close()


def copy_checkpoint(source: Backend, target: Backend, log: int, number: int) -> None:
    """In a zone's thread: put a copy of a checkpoint into another zone, durably. What is damaged stays so."""
    name = checkpoint_name(log, number)
    handle = source.open(name)
    writer = target.put_stream(name)
    try:
        chunk = memoryview(bytearray(CHUNK_BYTES))
        offset = 0
        while length := handle.read(offset, [chunk]):
            writer.write([chunk[:length]])
            offset += length
        writer.commit()
    finally:
        writer.abort()
        handle.close()


async def newest_checkpoint(
    env: Env, log: int, expected: int, zones: Iterable[int]
) -> tuple[Loaded | None, dict[int, int]]:
    """(the newest whole checkpoint of any zone or None if there never was one, numbers seen -> bytes).

    expected: the number that the head names; Corrupt if neither it, nor a newer one, nor the one before can be read.
    zones: which have the checkpoints of this log. One of them that lacks the object was not reached before the process
    died: it gets its copy now, before anything is built on a checkpoint that could be lost with one zone.
    """
    seen: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for zone in env.zones:
        for entry in await run(env.executor, zone.index, zone.backend.list, checkpoint_folder(log)):
            digits = entry.name.rpartition("/")[2]
            seen.setdefault(int(digits, 16), []).append(zone.index)
            sizes[int(digits, 16)] = entry.size_bytes
    for number in sorted(seen, reverse=True):
        for z in seen[number]:
            backend = env.zones[z].backend
            try:
                loaded = await run(env.executor, z, read_checkpoint, backend, env.store_id, log, number)
            except (FormatError, NotFound):
                continue
            for lacking in set(zones).difference(seen[number]):
                await run(env.executor, z, copy_checkpoint, backend, env.zones[lacking].backend, log, number)
            return loaded, sizes
        if number < expected:
            break  # this was the one before: what an older one needs may have been freed
    if seen or expected:
        raise Corrupt(f"no checkpoint can be read log={log} expected={expected} found={sorted(seen)}")
    return None, sizes


def read_pages(backend: Backend, store_id: bytes, log: int, wanted: list[tuple[int, PageRef]]) -> list[bytes | None]:
    """In a zone's thread: the encoded regions of one checkpoint's pages; None where this zone's copy is bad."""
    pages: list[bytes | None] = []
    try:
        handle = backend.open(checkpoint_name(log, wanted[0][1].checkpoint))
    except NotFound:
        return [None] * len(wanted)
    try:
        for region, ref in wanted:
            frame = bytearray(ref.length)
            handle.read(ref.offset, [memoryview(frame)])
            try:
                page = decode_frame(bytes(frame), store_id=store_id, log=log, number=ref.checkpoint, region=region)
            except FormatError:
                pages.append(None)
            else:
                pages.append(page)
    finally:
        handle.close()
    return pages


async def load_pages(
    env: Env, log: int, wanted: list[tuple[int, PageRef]], zones_of: Callable[[int], Iterable[int]]
) -> Iterator[tuple[int, PageRef, bytes]]:
    """The encoded regions behind `wanted`, each from the first zone that has it whole. Corrupt: no zone has."""
    found: list[tuple[int, PageRef, bytes]] = []
    by_checkpoint: dict[int, list[tuple[int, PageRef]]] = {}
    for region, ref in wanted:
        by_checkpoint.setdefault(ref.checkpoint, []).append((region, ref))
    for number, pairs in by_checkpoint.items():
        left = sorted(pairs, key=lambda pair: pair[1].offset)
        for z in zones_of(number):
            if not left:
                break
            try:
                pages = await run(env.executor, z, read_pages, env.zones[z].backend, env.store_id, log, left)
            except StoreError as error:
                logger.warning("map pages unreadable checkpoint=%s: %s", checkpoint_name(log, number), error)
                continue
            found += [(r, ref, page) for (r, ref), page in zip(left, pages, strict=True) if page is not None]
            left = [pair for pair, page in zip(left, pages, strict=True) if page is None]
        if left:
            raise Corrupt(f"map pages can't be read from any zone log={log} checkpoint={number} region={left[0][0]}")
    return iter(found)


class CheckpointWriter:
    """Writes one checkpoint to several zones at once, in chunks, so that the loop serves clients in between."""

    def __init__(self, env: Env, header: CheckpointHeader, zones: Iterable[int]) -> None:
        self._env = env
        self.header = header
        self._zones = tuple(zones)
        self._writers: dict[int, Writer] = {}
        self._chunk = bytearray(encode_checkpoint_header(header, env.store_id))
        self._offset = len(self._chunk)
        self.refs: dict[int, PageRef] = {}
        self.size_bytes = 0

    async def _each(self, call: Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        """One call in every zone; all are awaited, then the first error is raised."""
        failed: StoreError | None = None
        pending = []
        for z in self._zones:
            function, args = call(z)
            pending.append(self._env.loop.create_task(run(self._env.executor, z, function, *args)))
        for z, task in zip(self._zones, pending, strict=True):
            try:
                result = await task
            except StoreError as error:
                failed = failed or error
            else:
                if isinstance(result, Writer):
                    self._writers[z] = result
        if failed is not None:
            raise failed

    async def open(self) -> None:
        """Begin the object in every zone."""
        name = checkpoint_name(self.header.log, self.header.number)
        await self._each(lambda z: (self._env.zones[z].backend.put_stream, (name,)))

    async def add(self, region: int, page: bytes) -> None:
        """The encoded page of one region."""
        header = self.header
        frame = encode_frame(page, store_id=self._env.store_id, log=header.log, number=header.number, region=region)
        self.refs[region] = PageRef(header.number, self._offset, len(frame))
        self._chunk += frame
        self._offset += len(frame)
        if len(self._chunk) >= CHUNK_BYTES:
            await self._write()

    async def _write(self) -> None:
        chunk = bytes(self._chunk)
        self._chunk = bytearray()
        if chunk:
            await self._each(lambda z: (self._writers[z].write, ([chunk],)))

    async def finish(self, root: npt.NDArray[np.void], table: npt.NDArray[np.void]) -> None:
        """Root, segment table and footer; on return the checkpoint is durable in every zone."""
        root_bytes, table_bytes = root.tobytes(), table.tobytes()
        footer = Footer(
            self._offset,
            len(root),
            self._offset + len(root_bytes),
            len(table),
            crc32c(root_bytes),
            crc32c(table_bytes),
        )
        header = self.header
        self._chunk += root_bytes
        self._chunk += table_bytes
        self._chunk += encode_footer(footer, store_id=self._env.store_id, log=header.log, number=header.number)
        self.size_bytes = self._offset + len(root_bytes) + len(table_bytes) + FOOTER_BYTES
        await self._write()
        await self._each(lambda z: (self._writers[z].commit, ()))

    async def abort(self) -> None:
        """Throw the unfinished object away wherever it was begun."""
        for z, writer in self._writers.items():
            await run(self._env.executor, z, writer.abort)

"""Checkpoints of one log's map in its zones: writing them, finding the newest whole one, reading pages back."""

import contextlib
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from objstore.backend.base import Backend, Entry, Writer, ZoneFailed
from objstore.errors import Corrupt, FormatError, NoSpace, NotFound, StoreError, Unavailable
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
from objstore.log.root import LOG_SHIFT
from objstore.names import object_number
from objstore.replica.zone import Zone, run, run_long
from objstore.units import BLOCK_BYTES

logger = logging.getLogger(__name__)

CHUNK_BYTES: Final = 1 << 20
NUMBER_MASK: Final = (1 << LOG_SHIFT) - 1


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


class CheckpointZones:
    """Which zones have each checkpoint of a log: where one was found, and for a new one where placement puts it."""

    def __init__(self, env: Env, place: Callable[[int], tuple[int, ...]]) -> None:
        self._env = env
        self._place = place
        self._known: dict[int, tuple[int, ...]] = {}

    def __call__(self, number: int) -> tuple[int, ...]:
        """Zones that have that checkpoint, in service or not, or are to get it."""
        zones = self._known.get(number)
        if zones is None:
            zones = self._known[number] = self._place(0)
        return zones

    def wanted(self) -> tuple[int, ...]:
        """Where a new one would go."""
        return self._env.serving(self._place(0))

    def found(self, number: int, zones: Iterable[int]) -> None:
        """These zones have it."""
        self._known[number] = tuple(zones)


class Found(NamedTuple):
    """The newest whole checkpoint (None: there never was one), and the bytes of each that any zone shows."""

    loaded: Loaded | None
    sizes: dict[int, int]


async def newest_checkpoint(
    env: Env,
    log: int,
    expected: int,
    ended: range,
    zones: CheckpointZones,
    listings: dict[int, list[Entry]],
    *,
    copies: int | None,
    force: bool = False,
) -> Found:
    """Read the newest whole checkpoint from any zone.

    expected: the number that the head names; Corrupt if neither it, nor a newer one, nor the one before can be read.
    Unavailable: zones are missing that may have them. An older one that is left, whose pages are needed or which is a
    snapshot's, looks as the one before would then, and the log behind it is not whole any more. So while zones are
    missing the one before is taken only where a damaged copy of `expected` is here, and they are fewer than `copies`
    (None = all). force: always.
    ended: numbers that don't count: runs that ended before the head left them in single zones.
    listings: the log's checkpoint folder in each zone that answers. zones: is told what was found. A checkpoint newer
    than the head that a zone of its placement lacks may have been cut off by a crash: that zone gets its copy now,
    before anything is built on a checkpoint that could be lost with one zone.
    """
    seen: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for z, listing in listings.items():
        for entry in listing:
            number = object_number(entry.name)
            if number is not None:
                seen.setdefault(number, []).append(z)
                # A torn copy is shorter than a whole one.
                sizes[number] = max(sizes.get(number, 0), entry.size_bytes)
    for number, where in seen.items():
        zones.found(number, where)
    failed: ZoneFailed | None = None
    answering = set(listings)
    seen = {number: where for number, where in seen.items() if number not in ended}
    for number in sorted(seen, reverse=True):
        for z in list(seen[number]):
            backend = env.zones[z].backend
            try:
                loaded = await run(env.executor, z, read_checkpoint, backend, env.store_id, log, number)
            except (FormatError, NotFound):
                continue
            except ZoneFailed as error:
                failed = error
                answering.discard(z)
                env.zone_failing(z, error)
                continue
            absent = len(_missing(env, answering))
            if number < expected and not force and (expected not in seen or copies is None or absent >= copies):
                _none_missing(env, log, answering)
            if number < max(seen):
                logger.error(
                    "checkpoint %d can't be read from any zone: the one before it, %d, and what was written since serve"
                    " log=%d",
                    max(seen),
                    number,
                    log,
                )
            if number > expected:
                await _complete(env, log, number, z, seen[number], zones)
            return Found(loaded, sizes)
        if number < expected:
            break  # this was the one before: what an older one needs may have been freed
    if failed is not None:
        raise failed
    if seen or expected:
        _none_missing(env, log, answering)
        raise Corrupt(f"no checkpoint can be read log={log} expected={expected} found={sorted(seen)}")
    return Found(None, sizes)


def _missing(env: Env, answering: set[int]) -> list[Zone]:
    """The zones of the store that don't answer. Those that were removed from it only keep their number."""
    return [zone for zone in env.zones if zone.index not in answering and any(zone.zone_id)]


def _none_missing(env: Env, log: int, answering: set[int]) -> None:
    """Unavailable: some zone doesn't answer, which may have the newest checkpoints."""
    absent = _missing(env, answering)
    if absent:
        names = ", ".join(repr(zone) for zone in absent)
        raise Unavailable(f"the newest checkpoint of log {log} can't be read, and zones are missing: {names}")


async def find_checkpoint(env: Env, log: int, number: int, zones: CheckpointZones) -> Loaded | None:
    """Read one checkpoint from any zone that has it whole; None: none in service has. zones: who has it."""
    for z in env.serving(zones(number)):
        try:
            return await run(env.executor, z, read_checkpoint, env.zones[z].backend, env.store_id, log, number)
        except StoreError as error:
            logger.warning(
                "checkpoint unreadable name=%s zone=%r: %s", checkpoint_name(log, number), env.zones[z], error
            )
            if isinstance(error, ZoneFailed):
                env.read_failed(z, error)
    return None


async def _complete(env: Env, log: int, number: int, source: int, seen: list[int], zones: CheckpointZones) -> None:
    """Put a checkpoint into the zones of its placement that lack it."""
    for lacking in set(zones.wanted()).difference(seen):
        target = env.zones[lacking].backend
        try:
            await run_long(env.executor, source, copy_checkpoint, env.zones[source].backend, target, log, number)
        except ZoneFailed as error:
            logger.warning("checkpoint not copied zone=%r: %s", env.zones[lacking], error)
            continue
        seen.append(lacking)
    zones.found(number, seen)


def read_pages(backend: Backend, store_id: bytes, log: int, wanted: list[tuple[int, PageRef]]) -> list[bytes | None]:
    """In a zone's thread: the encoded regions of one checkpoint's pages; None where this zone's copy is bad."""
    pages: list[bytes | None] = []
    try:
        handle = backend.open(checkpoint_name(log, wanted[0][1].checkpoint & NUMBER_MASK))
    except NotFound:
        return [None] * len(wanted)
    try:
        for region, ref in wanted:
            frame = bytearray(ref.length)
            handle.read(ref.offset, [memoryview(frame)])
            try:
                number = ref.checkpoint & NUMBER_MASK
                page = decode_frame(bytes(frame), store_id=store_id, log=log, number=number, region=region)
            except FormatError:
                pages.append(None)
            else:
                pages.append(page)
    finally:
        handle.close()
    return pages


class LostPages(Corrupt):
    """No zone has these pages whole. found: the others that were asked for."""

    def __init__(self, message: str, lost: list[tuple[int, PageRef]], found: list[tuple[int, PageRef, bytes]]) -> None:
        super().__init__(message)
        self.lost = lost
        self.found = found


async def load_pages(
    env: Env, log: int, wanted: list[tuple[int, PageRef]], zones_of: Callable[[int], Iterable[int]]
) -> Iterator[tuple[int, PageRef, bytes]]:
    """The encoded regions behind `wanted`, each from the first zone that has it whole. LostPages: no zone has.
    Unavailable: a zone that may have it failed, or is out of service. log, zones_of: whose map it is, and which zones
    have its own checkpoints."""
    found: list[tuple[int, PageRef, bytes]] = []
    lost: list[tuple[int, PageRef]] = []
    by_checkpoint: dict[int, list[tuple[int, PageRef]]] = {}
    for region, ref in wanted:
        by_checkpoint.setdefault(ref.checkpoint, []).append((region, ref))
    for key, pairs in by_checkpoint.items():
        left = sorted(pairs, key=lambda pair: pair[1].offset)
        owner, number = key >> LOG_SHIFT or log, key & NUMBER_MASK
        holders = tuple(zones_of(number) if owner == log else env.page_zones[owner](number))
        silent = [z for z in holders if z not in env.in_service]
        for z in env.serving(holders):
            if not left:
                break
            try:
                pages = await run(env.executor, z, read_pages, env.zones[z].backend, env.store_id, owner, left)
            except StoreError as error:
                logger.warning("map pages unreadable checkpoint=%s: %s", checkpoint_name(owner, number), error)
                silent.append(z)
                continue
            found += [(r, ref, page) for (r, ref), page in zip(left, pages, strict=True) if page is not None]
            left = [pair for pair, page in zip(left, pages, strict=True) if page is None]
        if left and silent:
            names = ", ".join(repr(env.zones[z]) for z in silent)
            raise Unavailable(f"map pages of log {owner} are on zones that are out of reach: {names}")
        lost += left
    if lost:
        region, ref = lost[0]
        owner, number = ref.checkpoint >> LOG_SHIFT or log, ref.checkpoint & NUMBER_MASK
        text = f"map pages can't be read from any zone log={owner} checkpoint={number} region={region}"
        raise LostPages(text, lost, found)
    return iter(found)


class CheckpointWriter:
    """Writes one checkpoint to several zones at once, in chunks, so that the loop serves clients in between."""

    def __init__(self, env: Env, header: CheckpointHeader, zones: Iterable[int]) -> None:
        self._env = env
        self.header = header
        self._zones = tuple(zones)
        self._writers: dict[int, Writer] = {}
        self._begun: dict[int, Backend] = {}
        self._chunk = bytearray(encode_checkpoint_header(header, env.store_id))
        self._offset = len(self._chunk)
        self._regions = array("Q")
        self._offsets = array("Q")
        self._lengths = array("I")
        self.size_bytes = 0

    @property
    def rows(self) -> npt.NDArray[np.void]:
        """What has been added, as rows of a root."""
        rows = np.empty(len(self._regions), ROOT)
        rows["region"] = self._regions
        rows["checkpoint"] = self.header.number
        rows["length"] = self._lengths
        rows["offset"] = self._offsets
        return rows

    async def _each(self, call: Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        """One call in every zone. A zone that fails is put out, and the checkpoint goes on without it. NoSpace;
        Unavailable: no zone is left."""
        full: StoreError | None = None
        zones = self._left()
        pending = []
        for z in zones:
            function, args = call(z)
            pending.append(self._env.loop.create_task(run(self._env.executor, z, function, *args)))
        failed: dict[int, StoreError] = {}
        for z, task in zip(zones, pending, strict=True):
            try:
                result = await task
            except NoSpace as error:
                full = full or error
            except StoreError as error:
                failed[z] = error
            else:
                if isinstance(result, Writer):
                    self._writers[z] = result
        for z, reason in failed.items():
            await self._env.put_out(z, reason)
        self._zones = tuple(z for z in self._left() if z not in failed)
        if full is not None:
            raise full
        if not self._zones:
            raise Unavailable(f"no zone is left for a checkpoint log={self.header.log}: {failed or 'all are out'}")

    def _left(self) -> tuple[int, ...]:
        """Those of the zones that were in service all the time: one that was out and is back has missed a part."""
        env = self._env
        return tuple(z for z in env.serving(self._zones) if env.zones[z].backend is self._begun.get(z))

    async def open(self) -> None:
        """Begin the object in every zone."""
        self._begun = {z: self._env.zones[z].backend for z in self._env.serving(self._zones)}
        name = checkpoint_name(self.header.log, self.header.number)
        await self._each(lambda z: (self._env.zones[z].backend.put_stream, (name,)))

    async def add(self, region: int, page: bytes) -> None:
        """The encoded page of one region."""
        header = self.header
        frame = encode_frame(page, store_id=self._env.store_id, log=header.log, number=header.number, region=region)
        self._regions.append(region)
        self._offsets.append(self._offset)
        self._lengths.append(len(frame))
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
        """Throw the object away wherever it was begun, or even finished: a later run must not find it."""
        name = checkpoint_name(self.header.log, self.header.number)
        for z in self._left():
            with contextlib.suppress(StoreError):  # what stays is garbage that the next opening removes
                await run(self._env.executor, z, self._writers[z].abort)
                await run(self._env.executor, z, self._env.zones[z].backend.delete, name)

    @property
    def zones(self) -> tuple[int, ...]:
        """Those that have the checkpoint, once it is finished."""
        return self._zones

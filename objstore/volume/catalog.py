"""The catalog: which VDIs there are and the head record of each log. Itself a log (number 0) on every zone.

One record is one commit: an entry counts when its record is durable. In memory it counts from the moment it is in the
log, so that entries see each other in the order of the log.
"""

import asyncio

from objstore.errors import Corrupt, FormatError, NotFound, StoreError
from objstore.format.catalog import (
    DeleteEntry,
    Entry,
    HeadEntry,
    PurgedEntry,
    Snapshot,
    StopEntry,
    VdiEntry,
    decode_entry,
    decode_snapshot,
    encode_entry,
    encode_snapshot,
)
from objstore.format.document import CatalogHead
from objstore.format.record import KIND_SHIFT, LBA_MASK, Kind
from objstore.log.env import Env
from objstore.log.opening import Base, Head, read_tail
from objstore.log.segment import log_folder, segment_number
from objstore.log.tail import data_spans
from objstore.log.writer import LogWriter
from objstore.replica.zone import run
from objstore.units import BLOCK_BYTES, KIB

CATALOG_LOG = 0
SEGMENT_BYTES = 256 * KIB
SNAPSHOT_FOLDER = "catalog/"


def snapshot_name(number: int) -> str:
    """Object name of a catalog snapshot."""
    return f"{SNAPSHOT_FOLDER}{number:08x}"


class CatalogState:
    """The catalog's contents: a pure function of its entries."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self.next_log = snapshot.next_log if snapshot else 1
        self.next_vdi = snapshot.next_vdi if snapshot else 1
        self.vdis: dict[int, VdiEntry] = {vdi.vdi_id: vdi for vdi in snapshot.vdis} if snapshot else {}
        self.names: dict[str, int] = {vdi.name: vdi.vdi_id for vdi in self.vdis.values()}
        self.heads: dict[int, HeadEntry] = {head.log: head for head in snapshot.heads} if snapshot else {}
        self.garbage: set[int] = set(snapshot.garbage) if snapshot else set()
        self.clean = snapshot.clean if snapshot else True

    def apply(self, entry: Entry) -> None:
        """Take one entry's effect."""
        self.clean = isinstance(entry, StopEntry)
        if isinstance(entry, VdiEntry):
            self.vdis[entry.vdi_id] = entry
            self.names[entry.name] = entry.vdi_id
            self.next_log = max(self.next_log, entry.log + 1)
            self.next_vdi = max(self.next_vdi, entry.vdi_id + 1)
        elif isinstance(entry, DeleteEntry):
            gone = self.vdis.pop(entry.vdi_id)
            del self.names[gone.name]
            self.heads.pop(gone.log, None)
            self.garbage.add(gone.log)
        elif isinstance(entry, HeadEntry):
            self.heads[entry.log] = entry
        elif isinstance(entry, PurgedEntry):
            self.garbage.discard(entry.log)

    def snapshot(self) -> Snapshot:
        """Everything, as one record."""
        return Snapshot(
            next_log=self.next_log,
            next_vdi=self.next_vdi,
            vdis=list(self.vdis.values()),
            heads=list(self.heads.values()),
            garbage=sorted(self.garbage),
            clean=self.clean,
        )


class Catalog:
    """The catalog of an open store.

    Opening: `recover` reads snapshot and surviving records; `persist` writes their sum as a new snapshot to every zone
    and gives the head that the epoch record commits; `start` begins a new generation of the log. What was only in a
    page cache when the last process died is thereby durable before anything is built on it.
    """

    def __init__(self, env: Env) -> None:
        self.env = env
        self.state = CatalogState()
        self.number = 0
        self._writer: LogWriter | None = None
        self._position = 0
        self._previous_crc = 0
        self._generation = 0
        self._next_number = 0
        self._lock = asyncio.Lock()

    @property
    def error(self) -> StoreError | None:
        """Why the catalog takes no more entries."""
        return self._writer.error if self._writer is not None else None

    async def recover(self, head: CatalogHead) -> None:
        """Read what the head and the records behind it say. Corrupt, Unavailable."""
        env = self.env
        snapshot: Snapshot | None = None
        reasons: list[str] = []
        for zone in env.zones if head.snapshot else []:
            try:
                data = await run(env.executor, zone.index, zone.backend.get, snapshot_name(head.snapshot))
                snapshot = decode_snapshot(data, env.store_id, head.snapshot)
                break
            except (FormatError, NotFound) as error:
                reasons.append(f"{zone!r}: {error}")
        if head.snapshot and snapshot is None:
            raise Corrupt(f"no zone has the catalog: {'; '.join(reasons)}")
        self.state = CatalogState(snapshot)
        base = Base(head.position, head.previous_crc, head.first_number)
        tail = await read_tail(
            env, CATALOG_LOG, Head(head.generation, (), head.first_number, 0, False), base, copy_all=True
        )
        self._position, self._previous_crc = head.position, head.previous_crc
        for record in tail.rest:
            for bits, _, at, crcs, _ in data_spans(record.header):
                if bits >> KIND_SHIFT & 0xFF == Kind.ENTRY:
                    blocks = record.data[at * BLOCK_BYTES : (at + len(crcs)) * BLOCK_BYTES]
                    self.state.apply(decode_entry(blocks, bits & LBA_MASK))
            self._position = record.header.last_position
            self._previous_crc = record.header.crc
        self._generation = head.generation + 1
        self._next_number = tail.next_number
        self.number = head.snapshot

    async def persist(self) -> CatalogHead:
        """Write the state as a new snapshot to every zone, durably; the head that makes it count."""
        env = self.env
        seen = {0}
        for zone in env.zones:
            for entry in await run(env.executor, zone.index, zone.backend.list, SNAPSHOT_FOLDER):
                seen.add(int(entry.name.rpartition("/")[2], 16))
        self.number = max(seen) + 1
        data = encode_snapshot(self.state.snapshot(), env.store_id, self.number)
        for zone in env.zones:
            await run(env.executor, zone.index, zone.backend.put, snapshot_name(self.number), data)
        return CatalogHead(
            snapshot=self.number,
            generation=self._generation,
            first_number=self._next_number,
            position=self._position,
            previous_crc=self._previous_crc,
        )

    async def start(self) -> None:
        """The epoch record that names the head is durable: take entries; remove what no head needs any more."""
        env = self.env
        everywhere = tuple(zone.index for zone in env.zones)
        self._writer = LogWriter(
            env,
            CATALOG_LOG,
            generation=self._generation,
            copies=len(everywhere),
            next_number=self._next_number,
            position=self._position,
            previous_crc=self._previous_crc,
            place=lambda number: everywhere,
            segment_bytes=SEGMENT_BYTES,
        )
        for zone in env.zones:
            backend = zone.backend
            old = [
                entry.name
                for entry in await run(env.executor, zone.index, backend.list, SNAPSHOT_FOLDER)
                if int(entry.name.rpartition("/")[2], 16) < self.number
            ]
            for entry in await run(env.executor, zone.index, backend.list, log_folder(CATALOG_LOG)):
                number = segment_number(entry.name)
                if number is not None and number < self._next_number:
                    old.append(entry.name)
            for name in old:
                await run(env.executor, zone.index, backend.delete, name)

    async def commit(self, *entries: Entry) -> None:
        """Append the entries as one record and return when it is durable. Unavailable, NoSpace: nothing happened, or
        (Unavailable) it is unknown until the store is opened again."""
        writer = self._writer
        assert writer is not None, "the catalog was started"
        encoded = [(entry, *encode_entry(entry)) for entry in entries]
        blocks = sum(len(data) // BLOCK_BYTES for _, data, _ in encoded)
        async with self._lock:
            while not writer.room_for_batch(blocks):
                await writer.make_room(0)
            writer.start_record(blocks)
            for entry, data, length in encoded:
                writer.append(Kind.ENTRY, length, len(data) // BLOCK_BYTES, memoryview(data))
                self.state.apply(entry)
            writer.cut()
        await writer.flush()

    async def close(self) -> None:
        """Seal and sync what was committed."""
        if self._writer is not None:
            if self._writer.error is None:
                self._writer.finish_segment()
                await self._writer.flush()
                await self._writer.sealed_below(self._writer.next_number)
            await self._writer.close()

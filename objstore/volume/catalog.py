"""The catalog: which VDIs there are and the head record of each log. Itself a log (number 0) on every zone.

One record is one commit: an entry counts when its record is durable. In memory it counts from the moment it is in the
log, so that entries see each other in the order of the log.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from objstore.backend.base import ZoneFailed
from objstore.errors import Corrupt, FormatError, NoSpace, NotFound, StoreError, Unavailable
from objstore.format.catalog import (
    AttributeEntry,
    DamageEntry,
    DeleteEntry,
    Entry,
    HeadEntry,
    ImportEntry,
    JobEntry,
    PurgedEntry,
    Snapshot,
    SnapshotDeleteEntry,
    SnapshotEntry,
    StopEntry,
    TrashEntry,
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
from objstore.log.trust import Trust
from objstore.log.writer import LogWriter
from objstore.names import object_number
from objstore.replica.membership import Membership
from objstore.replica.zone import run
from objstore.units import BLOCK_BYTES, KIB

logger = logging.getLogger(__name__)

CATALOG_LOG = 0
SEGMENT_BYTES = 256 * KIB
SNAPSHOT_FOLDER = "catalog/"
COMPACT_BYTES: Final = 4 << 20
"""A catalog log of that length is replaced by a snapshot: 1,000 VDIs have one of 0.2 MiB, and an opening reads both."""
JOB_KEPT_SECONDS: Final = 86400.0
"""FORMAT.md, "Catalog"."""
NUMBERS_LEFT: Final = 16
"""The former writer may be preparing so many segments more."""


def snapshot_name(number: int) -> str:
    """Object name of a catalog snapshot."""
    return f"{SNAPSHOT_FOLDER}{number:08x}"


class CatalogState:
    """The catalog's contents: a pure function of its entries.

    names: of the VDIs that were not deleted; vdis has the hidden ones too. owners: log -> the VDI whose log it is.
    snapshots: by their ids. trash: by VDI. attributes: by VDI and name. What is asked for often is looked up, not
    searched for: there may be thousands of VDIs with tens of snapshots each.
    """

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self.next_log = snapshot.next_log if snapshot else 1
        self.next_vdi = snapshot.next_vdi if snapshot else 1
        self.vdis: dict[int, VdiEntry] = {vdi.vdi_id: vdi for vdi in snapshot.vdis} if snapshot else {}
        self.names: dict[str, int] = {vdi.name: vdi.vdi_id for vdi in self.vdis.values() if not vdi.hidden}
        self.owners: dict[int, int] = {vdi.log: vdi.vdi_id for vdi in self.vdis.values()}
        self._called: dict[str, set[int]] = {}
        """The VDIs that have or had a name."""
        for vdi in self.vdis.values():
            self._called.setdefault(vdi.name, set()).add(vdi.vdi_id)
        self.snapshots: dict[int, SnapshotEntry] = {}
        self._by_vdi: dict[int, dict[int, SnapshotEntry]] = {}
        self._by_log: dict[int, dict[int, SnapshotEntry]] = {}
        self.next_snapshot = snapshot.next_snapshot if snapshot else 1
        for entry in snapshot.snapshots if snapshot else ():
            self._set_snapshot(entry)
        self.trash: dict[int, TrashEntry] = {kept.vdi_id: kept for kept in snapshot.trash} if snapshot else {}
        self.attributes: dict[int, dict[str, bytes]] = {}
        for attribute in snapshot.attributes if snapshot else ():
            self._set_attribute(attribute)
        self.jobs: dict[int, JobEntry] = {job.job_id: job for job in snapshot.jobs} if snapshot else {}
        self.next_job = snapshot.next_job if snapshot else 1
        self.heads: dict[int, HeadEntry] = {head.log: head for head in snapshot.heads} if snapshot else {}
        self.garbage: set[int] = set(snapshot.garbage) if snapshot else set()
        self.damage: dict[int, DamageEntry] = {found.log: found for found in snapshot.damage} if snapshot else {}
        self.imports: dict[int, ImportEntry] = {each.vdi_id: each for each in snapshot.imports} if snapshot else {}
        self.clean = snapshot.clean if snapshot else True

    def apply(self, entry: Entry) -> None:
        """Take one entry's effect."""
        self.clean = isinstance(entry, StopEntry)
        if isinstance(entry, VdiEntry):
            self._forget_name(entry.vdi_id)
            self.vdis[entry.vdi_id] = entry
            self._called.setdefault(entry.name, set()).add(entry.vdi_id)
            self.owners[entry.log] = entry.vdi_id
            if not entry.hidden:
                self.names[entry.name] = entry.vdi_id
                self.trash.pop(entry.vdi_id, None)
            elif entry.vdi_id not in self.trash:
                self.attributes.pop(entry.vdi_id, None)
            self.next_log = max(self.next_log, entry.log + 1)
            self.next_vdi = max(self.next_vdi, entry.vdi_id + 1)
        elif isinstance(entry, DeleteEntry):
            self._forget_name(entry.vdi_id)
            gone = self.vdis.pop(entry.vdi_id)
            del self.owners[gone.log]
            self.imports.pop(entry.vdi_id, None)
            self.attributes.pop(entry.vdi_id, None)
            self.trash.pop(entry.vdi_id, None)
            self.heads.pop(gone.log, None)
            self.damage.pop(gone.log, None)
            self.garbage.add(gone.log)
        elif isinstance(entry, TrashEntry):
            self.trash[entry.vdi_id] = entry
            if not entry.kept_until:
                del self.trash[entry.vdi_id]
                self.attributes.pop(entry.vdi_id, None)
        elif isinstance(entry, HeadEntry):
            self.heads[entry.log] = entry
        elif isinstance(entry, PurgedEntry):
            self.garbage.discard(entry.log)
        elif isinstance(entry, DamageEntry):
            self.damage.pop(entry.log, None)
            if entry.runs or entry.pages:
                self.damage[entry.log] = entry
        elif isinstance(entry, SnapshotEntry):
            self._set_snapshot(entry)
            self.next_snapshot = max(self.next_snapshot, entry.snapshot_id + 1)
        elif isinstance(entry, ImportEntry):
            self.imports.pop(entry.vdi_id, None)
            if entry.identity:
                self.imports[entry.vdi_id] = entry
        elif isinstance(entry, SnapshotDeleteEntry):
            self._forget_snapshot(entry.snapshot_id)
        elif isinstance(entry, AttributeEntry):
            self._set_attribute(entry)
        elif isinstance(entry, JobEntry):
            self.jobs = {i: job for i, job in self.jobs.items() if job.noted > entry.noted - JOB_KEPT_SECONDS}
            self.jobs[entry.job_id] = entry
            self.next_job = max(self.next_job, entry.job_id + 1)

    def _set_attribute(self, entry: AttributeEntry) -> None:
        """Of a VDI that was deleted meanwhile: nothing (FORMAT.md, "Catalog")."""
        vdi = self.vdis.get(entry.vdi_id)
        if vdi is None or (vdi.hidden and vdi.vdi_id not in self.trash):
            return
        attributes = self.attributes.setdefault(entry.vdi_id, {})
        if entry.value is None:
            attributes.pop(entry.name, None)
        else:
            attributes[entry.name] = entry.value

    def _forget_name(self, vdi_id: int) -> None:
        old = self.vdis.get(vdi_id)
        if old is None:
            return
        if not old.hidden:
            del self.names[old.name]
        called = self._called[old.name]
        called.discard(vdi_id)
        if not called:
            del self._called[old.name]

    def _set_snapshot(self, entry: SnapshotEntry) -> None:
        if entry.snapshot_id in self.snapshots:
            self._forget_snapshot(entry.snapshot_id)
        self.snapshots[entry.snapshot_id] = entry
        self._by_vdi.setdefault(entry.vdi_id, {})[entry.snapshot_id] = entry
        self._by_log.setdefault(entry.log, {})[entry.snapshot_id] = entry

    def _forget_snapshot(self, snapshot_id: int) -> None:
        gone = self.snapshots.pop(snapshot_id)
        for index, key in ((self._by_vdi, gone.vdi_id), (self._by_log, gone.log)):
            del index[key][snapshot_id]
            if not index[key]:
                del index[key]

    def snapshots_in(self, log: int) -> list[SnapshotEntry]:
        """The snapshots whose maps are in that log, oldest first."""
        return sorted(self._by_log.get(log, {}).values(), key=lambda s: s.checkpoint)

    def snapshots_of(self, vdi_id: int) -> list[SnapshotEntry]:
        """The snapshots of a VDI, oldest first."""
        return sorted(self._by_vdi.get(vdi_id, {}).values(), key=lambda s: s.index)

    def snapshots_named(self, name: str) -> list[SnapshotEntry]:
        """The snapshots of all VDIs that have or had this name, those of the present one first."""
        now = self.names.get(name)
        found = [s for vdi_id in self._called.get(name, ()) for s in self._by_vdi.get(vdi_id, {}).values()]
        return sorted(found, key=lambda s: (s.vdi_id != now, s.index))

    def find_snapshot(self, name: str) -> SnapshotEntry | None:
        """The one called NAME@TAG or NAME@INDEX."""
        vdi, _, which = name.partition("@")
        for snapshot in self.snapshots_named(vdi):
            if not snapshot.hidden and which and which in (snapshot.tag, str(snapshot.index)):
                return snapshot
        return None

    def clones_of(self, snapshot_id: int) -> list[VdiEntry]:
        """The VDIs, hidden ones too, whose maps began with that snapshot's."""
        return [v for v in self.vdis.values() if v.base == snapshot_id]

    def snapshot(self) -> Snapshot:
        """Everything, as one record."""
        return Snapshot(
            next_log=self.next_log,
            next_vdi=self.next_vdi,
            vdis=list(self.vdis.values()),
            heads=list(self.heads.values()),
            garbage=sorted(self.garbage),
            clean=self.clean,
            snapshots=list(self.snapshots.values()),
            next_snapshot=self.next_snapshot,
            jobs=list(self.jobs.values()),
            next_job=self.next_job,
            attributes=[
                AttributeEntry(vdi_id=vdi_id, name=name, value=value)
                for vdi_id, attributes in self.attributes.items()
                for name, value in attributes.items()
            ],
            damage=list(self.damage.values()),
            trash=list(self.trash.values()),
            imports=list(self.imports.values()),
        )


class Catalog:
    """The catalog of an open store.

    Opening: `recover` reads snapshot and surviving records; `persist` writes their sum as a new snapshot to every zone
    and gives the head that the epoch record commits; `start` begins a new generation of the log. What was only in a
    page cache when the last process died is thereby durable before anything is built on it. `_compact` does the same
    in an open store, with an epoch of its own.
    """

    def __init__(self, env: Env) -> None:
        self.env = env
        self.state = CatalogState()
        self.number = 0
        self.snapshot_object: tuple[str, bytes] | None = None
        """Name and contents of the snapshot that the head of this start names."""
        self._membership: Membership | None = None
        self._writer: LogWriter | None = None
        self._error: StoreError | None = None
        self._position = 0
        self._previous_crc = 0
        self._generation = 0
        self._next_number = 0
        self._blocks = 0
        self._lock = asyncio.Lock()

    @property
    def steady(self) -> asyncio.Lock:
        """While it is held nothing is committed, and the log is not replaced by a snapshot."""
        return self._lock

    @property
    def error(self) -> StoreError | None:
        """Why the catalog takes no more entries; a snapshot that can be written ends it."""
        if self._error is None and self._writer is not None:
            return self._writer.error
        return self._error

    async def recover(self, head: CatalogHead, epoch_id: str, trust: Trust, *, force: bool = False) -> None:
        """Read what the head and the records behind it say. epoch_id: the epoch that committed the head. Corrupt,
        Unavailable."""
        env = self.env
        self.state = CatalogState(await self._snapshot(head, trust) if head.snapshot else None)
        base = Base(head.position, head.previous_crc, head.first_number)
        log_head = Head(head.generation, (), head.first_number, 0, not head.snapshot, epoch_id)
        tail = await read_tail(env, CATALOG_LOG, log_head, base, copy_all=True, trust=trust, force=force)
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

    async def _snapshot(self, head: CatalogHead, trust: Trust) -> Snapshot:
        env = self.env
        reasons: list[str] = []
        for z in sorted(trust.here):
            zone = env.zones[z]
            try:
                data = await run(env.executor, z, zone.backend.get, snapshot_name(head.snapshot))
                return decode_snapshot(data, env.store_id, head.snapshot)
            except (FormatError, NotFound, ZoneFailed) as error:
                reasons.append(f"{zone!r}: {error}")
        absent = trust.absent(zone.index for zone in env.zones)
        if absent:
            raise Unavailable(
                f"no zone has the catalog, and zones are missing: {', '.join(absent)}; {'; '.join(reasons)}"
            )
        raise Corrupt(f"no zone has the catalog: {'; '.join(reasons)}")

    async def persist(self) -> tuple[CatalogHead, dict[int, StoreError]]:
        """Write the state as a new snapshot to every zone in service, durably: the head that makes it count, and the
        zones that failed. NoSpace."""
        env = self.env
        failed: dict[int, StoreError] = {}
        seen = {0, self.number}
        for z in sorted(env.in_service):
            try:
                for entry in await run(env.executor, z, env.zones[z].backend.list, SNAPSHOT_FOLDER):
                    seen.add(object_number(entry.name) or 0)
            except ZoneFailed as error:
                failed[z] = error
        self.number = max(seen) + 1
        data = encode_snapshot(self.state.snapshot(), env.store_id, self.number)
        self.snapshot_object = (snapshot_name(self.number), data)
        for z in sorted(env.in_service - failed.keys()):
            try:
                await run(env.executor, z, env.zones[z].backend.put, snapshot_name(self.number), data)
            except ZoneFailed as error:
                failed[z] = error
        head = CatalogHead(
            snapshot=self.number,
            generation=self._generation,
            first_number=self._next_number,
            position=self._position,
            previous_crc=self._previous_crc,
        )
        return head, failed

    async def start(self, membership: Membership) -> None:
        """The epoch record that names the head is durable: take entries; remove what no head needs any more."""
        self._membership = membership
        self._writer = self._new_writer(membership)
        await self._drop_old()

    def _new_writer(self, membership: Membership) -> LogWriter:
        self._blocks = 0
        return LogWriter(
            self.env,
            CATALOG_LOG,
            generation=self._generation,
            copies=len(membership.in_service),
            next_number=self._next_number,
            position=self._position,
            previous_crc=self._previous_crc,
            place=lambda number: tuple(sorted(membership.in_service)),
            segment_bytes=SEGMENT_BYTES,
        )

    async def _drop_old(self) -> None:
        """Remove snapshots and segments from before the head; what can't be removed goes the next time."""
        env = self.env
        for z in sorted(env.in_service):
            backend = env.zones[z].backend
            try:
                old = [
                    entry.name
                    for entry in await run(env.executor, z, backend.list, SNAPSHOT_FOLDER)
                    if (object_number(entry.name) or self.number) < self.number
                ]
                for entry in await run(env.executor, z, backend.list, log_folder(CATALOG_LOG)):
                    number = segment_number(entry.name)
                    if number is not None and number < self._next_number:
                        old.append(entry.name)
                for name in old:
                    await run(env.executor, z, backend.delete, name)
            except StoreError as error:
                logger.warning("old catalog stays until the next start: %s", error)

    async def compact(self) -> None:
        """Replace the catalog's log by a snapshot, which every zone in service gets: a zone that just came has all of
        the catalog then. Unavailable, NoSpace."""
        async with self._lock:
            await self._compact()

    async def _compact(self) -> None:
        """With the lock held, so that nothing is committed meanwhile. What the log could not make durable any more, the
        snapshot does: those who wanted it were told that nobody knows."""
        old, membership = self._writer, self._membership
        assert old is not None
        assert membership is not None
        try:
            await old.flush()
        except StoreError as lost:
            logger.warning("the catalog's log is given up for a snapshot: %s", lost)
        former = (self._generation, self._next_number, self._position, self._previous_crc)
        self._generation = old.generation + 1
        self._next_number = old.next_number + NUMBERS_LEFT
        self._position, self._previous_crc = old.position, old.previous_crc
        try:
            head, failed = await self.persist()
            for z, error in failed.items():
                await self.env.put_out(z, error)
        except StoreError:
            self._generation, self._next_number, self._position, self._previous_crc = former
            raise
        try:
            await membership.set_catalog(head)
        except StoreError as error:
            # It may be in force at the next opening, or not: what is committed from here on could be lost, until a
            # later one is in force.
            self._error = error
            raise
        self._error = None
        self._writer = self._new_writer(membership)
        await old.close()
        for segment in [s for s in self.env.segments.values() if s.log == CATALOG_LOG and s.number < self._next_number]:
            del self.env.segments[segment.key]
            segment.close_handles()
        await self._drop_old()

    async def commit(self, *entries: Entry) -> None:
        """Append the entries as one record and return when it is durable. Unavailable, NoSpace: nothing happened, or
        (Unavailable) it is unknown until the store is opened again."""
        await self.edit(lambda: entries)

    async def edit(self, make: Callable[[], Sequence[Entry]]) -> bool:
        """As `commit`, with entries made when their turn has come, from `state` as all before them have left it. False:
        there are none."""
        async with self._lock:
            if self.error is not None:
                await self._compact()
            entries = make()
            if not entries:
                return False
            encoded = [(entry, *encode_entry(entry)) for entry in entries]
            blocks = sum(len(data) // BLOCK_BYTES for _, data, _ in encoded)
            writer = self._writer
            assert writer is not None, "the catalog was started"
            if blocks > writer.fresh_room:
                # No record of it fits a segment: it is committed by the snapshot.
                for entry in entries:
                    self.state.apply(entry)
                try:
                    await self._compact()
                except StoreError as error:
                    self._error = self._error or error
                    raise
                return True
            if self._blocks * BLOCK_BYTES > COMPACT_BYTES:
                try:
                    await self._compact()
                except NoSpace as error:
                    logger.warning("the catalog's log can't be replaced by a snapshot: %s", error)
                    self._blocks = 0
                writer = self._writer
                assert writer is not None
            while not writer.room_for_batch(blocks):
                await writer.make_room(0)
            writer.start_record(blocks)
            for entry, data, length in encoded:
                writer.append(Kind.ENTRY, length, len(data) // BLOCK_BYTES, memoryview(data))
                self.state.apply(entry)
            writer.cut()
            self._blocks += blocks + 1
        await writer.flush()
        return True

    async def close(self) -> None:
        """Seal and sync what was committed."""
        if self._writer is not None:
            if self._writer.error is None:
                self._writer.finish_segment()
                await self._writer.flush()
                await self._writer.sealed_below(self._writer.next_number)
            await self._writer.close()

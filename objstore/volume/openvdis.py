"""The VDIs of a store whose logs are open: opening them once for everybody, holding them, closing them again."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from functools import partial
from typing import Any

import msgspec

from objstore.errors import Busy, NotFound, ReadOnly, Stopping, StoreError, Suspended
from objstore.format.catalog import Entry, HeadEntry, SnapshotEntry, VdiEntry
from objstore.log.checkpoint import CheckpointZones
from objstore.log.root import Root, of_clone
from objstore.log.takeover import Copied
from objstore.volume.base import Holder, Volume
from objstore.volume.damaged import DamageLists
from objstore.volume.deleting import BeingDeleted, Deleting
from objstore.volume.frozen import FrozenVolume, open_snapshot, snapshot_root
from objstore.volume.opening import FrozenAt, close_disk, drop_garbage, open_disk, rows_of, tail_rows
from objstore.volume.standstill import Standstill
from objstore.volume.starting import Started
from objstore.volume.vdi import Vdi

log = logging.getLogger(__name__)


class OpenVdis:
    """What a store keeps of open VDIs. Touched by the event loop only.

    `_open`: VDIs whose log is open, by vdi id. `_opening`: the tasks that open one; a second caller awaits the same.
    `_closing`: the tasks that close one which only the store's own work had opened.
    """

    def __init__(self, started: Started) -> None:
        self.env = started.env
        self.membership = started.membership
        self.catalog = started.catalog
        self._force = started.forced
        self._read_only = started.read_only
        self._open: dict[int, Vdi] = {}
        self._opening: dict[int, asyncio.Task[Vdi]] = {}
        self._closing: dict[int, asyncio.Task[None]] = {}
        self._failed: dict[int, str] = {}
        self._damage = DamageLists(self.catalog, self.env.loop)
        """By log; it outlives the closing of a VDI."""
        self._deleting = Deleting()
        self._stopping = False
        self._unused: dict[int, asyncio.Future[None]] = {}
        self._change = asyncio.Lock()
        """Held while a change of the catalog that others could contradict is looked at and committed."""
        self._changing: dict[int, asyncio.Future[None]] = {}
        """VDIs that are just given another log, until that is done."""
        self.holders: list[Holder] = []
        """Whoever opens VDIs for others; a change that they must not survive makes them give up what they have open."""
        self._kept_out: dict[int, str] = {}
        """VDIs that nobody may open just now, and why."""
        self._parents: dict[int, AsyncExitStack] = {}
        """By vdi id of an open clone: what keeps the VDI open that it is a clone of."""
        self._frozen: dict[int, FrozenVolume] = {}
        """Snapshots that are open, by their ids."""
        self._thawed: dict[int, AsyncExitStack] = {}
        """What keeps the VDIs open in whose logs they are."""
        self._freezing: dict[int, asyncio.Task[FrozenVolume]] = {}
        self.env.reserved_bytes = self._reserved_bytes

    async def open(self, name: str) -> Volume:
        """See VolumeSource. NAME@TAG, NAME@INDEX: a snapshot."""
        if "@" in name:
            volume = await self._open_frozen(self.find_snapshot(name))
            volume.attached += 1
            return volume
        while True:
            entry = self._entry(name)
            vdi = await self._vdi(entry)
            # Meanwhile it may have been closed, rolled back or deleted.
            if self._open.get(entry.vdi_id) is vdi and self._entry(name).vdi_id == entry.vdi_id:
                break
        refused = self.refused(self.catalog.state.vdis[entry.vdi_id])
        if refused:
            raise Suspended(refused)
        vdi.attached += 1
        self._open_preallocated()
        return vdi

    def refused(self, entry: VdiEntry) -> str:
        """Why nobody may open a VDI now; empty: anybody may."""
        if entry.vdi_id in self._kept_out:
            return f"VDI {entry.name!r} is closed to clients for a moment: {self._kept_out[entry.vdi_id]}"
        if entry.vdi_id in self.catalog.state.imports:
            return (
                f"VDI {entry.name!r} is half of what is imported: repeat the import, go back to a snapshot"
                f" (`sheepfold vdi rollback {entry.name}@TAG`), or delete it"
            )
        if entry.suspended:
            name = entry.name
            return f"VDI {name!r} is suspended: {entry.suspended}; `sheepfold vdi resume {name}` lets clients in again"
        return ""

    @asynccontextmanager
    async def _without_clients(self, entry: VdiEntry, reason: str) -> AsyncIterator[None]:
        """Make everybody close a VDI, and keep everybody out until the end of this. Busy: somebody has it open who
        can't be made to close it, or another change keeps clients out."""
        vdi_id = entry.vdi_id
        if vdi_id in self._kept_out:
            raise Busy(f"VDI {entry.name!r} is just being changed: {self._kept_out[vdi_id]}")
        self._kept_out[vdi_id] = reason
        try:
            vdi = self._open.get(vdi_id)
            if vdi is not None:
                await self._give_up(vdi, reason)
                self._check_detached(entry)
                await vdi.quiet()
            yield
        finally:
            del self._kept_out[vdi_id]

    async def _give_up(self, vdi: Vdi, reason: str, *, orderly: bool = False) -> None:
        """Make everybody close what they have open of a VDI. See Holder."""
        await asyncio.gather(*(holder.give_up(vdi, reason, orderly=orderly) for holder in self.holders))

    def _check_detached(self, entry: VdiEntry) -> None:
        vdi = self._open.get(entry.vdi_id)
        if vdi is not None and vdi.attached:
            raise Busy(f"VDI {entry.name!r} is attached by {vdi.attached} connections")

    def find_snapshot(self, name: str) -> SnapshotEntry:
        """The snapshot that is called NAME@TAG or NAME@INDEX. NotFound."""
        self._check_open()
        found = self.catalog.state.find_snapshot(name)
        if found is None:
            raise NotFound(f"there is no snapshot {name!r}")
        return found

    def snapshot_name(self, entry: SnapshotEntry) -> str:
        """What it is called: NAME@TAG, or NAME@INDEX if it has no tag."""
        return f"{self.catalog.state.vdis[entry.vdi_id].name}@{entry.tag or entry.index}"

    async def _open_frozen(self, entry: SnapshotEntry) -> FrozenVolume:
        key = entry.snapshot_id
        volume = self._frozen.get(key)
        if volume is not None:
            return volume
        task = self._freezing.get(key)
        if task is None:
            task = self._freezing[key] = self.env.loop.create_task(self._open_snapshot(entry))
            task.add_done_callback(_noted)
        return await asyncio.shield(task)

    async def _open_snapshot(self, entry: SnapshotEntry) -> FrozenVolume:
        key = entry.snapshot_id
        stack = AsyncExitStack()
        try:
            async with self._change:  # whoever wants to delete it and comes later sees that it is being opened
                if key not in self.catalog.state.snapshots:
                    raise NotFound("the snapshot was deleted")
            vdi = await self._use_owner(stack, entry.log)
            entry = self.catalog.state.snapshots[key]  # opening the log may have given its map another number
            await vdi.keeper.snapshot_written(entry.checkpoint)
            volume = await open_snapshot(self.env, vdi.disk, self.snapshot_name(entry), entry)
        except BaseException:
            await stack.aclose()
            raise
        finally:
            del self._freezing[key]
        volume.logs = partial(self._logs, entry.log, entry.vdi_id)
        self._frozen[key] = volume
        self._thawed[key] = stack
        return volume

    def _logs(self, log_number: int, vdi_id: int) -> dict[int, int]:
        """The logs in which data of that log's VDI or snapshot may lie: 1 for its own, 2 for those of what it is a
        clone of, and so on. What a VDI had in the log before it was rolled back is its own."""
        state = self.catalog.state
        found: dict[int, int] = {}
        depth = 1
        while True:
            found[log_number] = depth
            owner = state.owners.get(log_number)
            base = state.snapshots.get(state.vdis[owner].base) if owner is not None else None
            if base is None:
                return found
            if base.vdi_id != vdi_id:
                depth, vdi_id = depth + 1, base.vdi_id
            log_number = base.log

    async def _close_frozen(self, volume: FrozenVolume, reason: StoreError) -> None:
        key = volume.entry.snapshot_id
        del self._frozen[key]
        stack = self._thawed.pop(key)
        await volume.close(reason)
        await stack.aclose()

    def _open_preallocated(self) -> None:
        """Open every preallocated VDI in the background: only then its share of the space is known."""
        for entry in self.catalog.state.vdis.values():
            known = self._open.keys() | self._opening.keys() | self._failed.keys() | set(self._deleting)
            if entry.prealloc and entry.vdi_id not in known:
                self._begin_opening(entry)

    def _begin_opening(self, entry: VdiEntry) -> asyncio.Task[Vdi]:
        task = self._opening[entry.vdi_id] = self.env.loop.create_task(self._open_vdi(entry))
        task.add_done_callback(_noted)
        return task

    def _reserved_bytes(self, log_number: int) -> int:
        return sum(vdi.reserved_bytes for vdi in self._open.values() if vdi.disk.log != log_number)

    async def close(self, volume: Volume) -> None:
        """See VolumeSource."""
        assert isinstance(volume, Vdi | FrozenVolume)
        volume.attached -= 1
        if isinstance(volume, FrozenVolume):
            if not volume.attached and not self._stopping:
                await self._close_frozen(volume, Stopping("the snapshot is being closed"))
            return
        if not volume.attached and volume.disk.writer.error is None:
            volume.disk.writer.request_sync()

    def open_vdis(self) -> list[Vdi]:
        """Those whose log is open."""
        return list(self._open.values())

    def _check_open(self) -> None:
        if self._stopping:
            raise Stopping("the store is closing")
        if self._read_only:
            raise ReadOnly("the store was opened to look at it only")

    def _entry(self, name: str) -> VdiEntry:
        self._check_open()
        vdi_id = self.catalog.state.names.get(name)
        if vdi_id is None or vdi_id in self._deleting:
            raise NotFound(f"there is no VDI {name!r}")
        return self.catalog.state.vdis[vdi_id]

    @asynccontextmanager
    async def using(self, entry: VdiEntry) -> AsyncIterator[Vdi]:
        """The VDI, open, for work of the store's own; its deletion waits for the end of it. If nobody had it open
        before and nobody has then, it is closed again. BeingDeleted."""
        if entry.vdi_id in self._deleting:
            raise BeingDeleted(f"VDI {entry.name!r} is being deleted")
        was_open = entry.vdi_id in self._open or entry.vdi_id in self._opening
        vdi = await self._vdi(entry)
        with self.holding(vdi.disk.log) as held:
            if held is None:
                raise BeingDeleted(f"VDI {entry.name!r} is being deleted")
            yield vdi
        if not (was_open or vdi.attached or vdi.users or vdi.prealloc or self._stopping or self.leaving(vdi.vdi_id)):
            task = self._closing[vdi.vdi_id] = self.env.loop.create_task(self._close_vdi(vdi))
            await asyncio.shield(task)

    async def _use_owner(self, stack: AsyncExitStack, log_number: int, clone: VdiEntry | None = None) -> Vdi:
        """Keep the VDI open in whose log a snapshot is that can't be deleted meanwhile. If the VDI is just being
        deleted, it is known only at the end of that whether it stays, hidden: wait for it. BeingDeleted: so is the
        clone for which it is opened, and whoever deletes both waits for the clone."""
        state = self.catalog.state
        while True:
            owner = state.vdis[state.owners[log_number]]
            if owner.vdi_id in self._deleting:
                if clone is not None and clone.vdi_id in self._deleting:
                    raise BeingDeleted(f"VDI {clone.name!r} is being deleted")
                await self._deleting.change()
                continue
            try:
                vdi = await stack.enter_async_context(self.using(owner))
            except BeingDeleted:  # that began while its log was opened
                continue
            if vdi.disk.log == log_number:
                return vdi
            await stack.aclose()  # it was rolled back: its log is another VDI's now

    @contextmanager
    def holding(self, log_number: int) -> Iterator[Vdi | None]:
        """The VDI of a log, if it is open and not being deleted, which waits until this ends; else None."""
        vdi = next((v for i, v in self._open.items() if v.disk.log == log_number and i not in self._deleting), None)
        if vdi is None:
            yield None
            return
        vdi.users += 1
        try:
            yield vdi
        finally:
            vdi.users -= 1
            waiter = self._unused.get(log_number)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def leaving(self, vdi_id: int) -> bool:
        """Whether work on this VDI should end soon, because it is to be deleted or the store closes."""
        return self._stopping or vdi_id in self._deleting or vdi_id not in self.catalog.state.vdis

    async def _close_vdi(self, vdi: Vdi) -> None:
        """Close one VDI that nobody uses; what goes wrong the next opening puts right."""
        vdi_id = vdi.vdi_id
        del self._open[vdi_id]
        try:
            await vdi.close(Stopping("the VDI is being closed"))
            await self.catalog.commit(self._closed_head(vdi))
        except StoreError as error:
            log.warning("VDI %s was not closed in good order: %s", vdi.name, error)
        finally:
            self._forget_segments(vdi)
            del self._closing[vdi_id]
        await self._leave_parent(vdi_id)

    async def _leave_parent(self, vdi_id: int) -> None:
        """That VDI is not open any more: the one that it is a clone of may be closed too."""
        stack = self._parents.pop(vdi_id, None)
        if stack is not None:
            await stack.aclose()

    def _forget_segments(self, vdi: Vdi) -> None:
        for segment in [*vdi.disk.segments.values(), *(segment for segment, _ in vdi.disk.dead.values())]:
            self.env.segments.pop(segment.key, None)
            segment.close_handles()
        self.env.page_zones.pop(vdi.disk.log, None)

    async def _vdi(self, entry: VdiEntry) -> Vdi:
        vdi_id = entry.vdi_id
        while True:
            while (over := self._changing.get(vdi_id) or self._closing.get(vdi_id)) is not None:
                await asyncio.wait([over])
            # Whoever asks may have looked at the catalog a while ago; the VDI may have another log since.
            now = self.catalog.state.vdis.get(vdi_id)
            if now is None:
                raise NotFound(f"VDI {entry.name!r} was deleted")
            vdi = self._open.get(vdi_id)
            if vdi is not None:
                return vdi
            task = self._opening.get(vdi_id)
            if task is None:
                task = self._begin_opening(now)
            vdi = await asyncio.shield(task)
            # Somebody who waited for the same opening may have used it and begun to close it in this very turn.
            if self._open.get(vdi_id) is vdi and vdi_id not in self._closing:
                return vdi

    async def _open_vdi(self, entry: VdiEntry) -> Vdi:
        env = self.env
        state = self.catalog.state
        try:
            base_root = await self._open_base(entry) if entry.base else None
            snapshots = [FrozenAt(s.snapshot_id, s.checkpoint, s.position) for s in state.snapshots_in(entry.log)]
            head = state.heads.get(entry.log)
            opened = await open_disk(
                env, self.membership, entry, head, snapshots=snapshots, base_root=base_root, force=self._force
            )
            committed = msgspec.structs.replace(opened.head, unbroken_since=self._unbroken_since(entry))
            try:
                async with self._change if opened.owed is not None else nullcontext():
                    await self.catalog.commit(committed, *self._renumbered(opened.owed))
                await drop_garbage(env, entry.log, opened.garbage)
            except StoreError:
                await close_disk(opened.disk)
                raise
        except StoreError as error:
            self._failed[entry.vdi_id] = str(error)
            await self._leave_parent(entry.vdi_id)
            raise
        finally:
            del self._opening[entry.vdi_id]
        self._failed.pop(entry.vdi_id, None)
        here = {snapshot.checkpoint for snapshot in state.snapshots_in(entry.log)}
        for number in opened.keeper.holds.maps.keys() - here:  # deleted while the log was opened
            opened.keeper.end_snapshot(number)
        damage = self._damage.of(entry.log)
        damage.take(opened.disk.damage)
        opened.disk.damage = damage
        vdi = Vdi(entry, opened.disk, opened.keeper)
        vdi.logs = partial(self._logs, entry.log, entry.vdi_id)
        now = state.vdis.get(entry.vdi_id, entry)  # it may have changed meanwhile
        vdi.limit(now.limits, now.weight)
        vdi.standstill = Standstill(env, vdi.disk, partial(self._commit_copied, entry.vdi_id, vdi), vdi.look_again)
        self._open[entry.vdi_id] = vdi
        return vdi

    async def _open_base(self, entry: VdiEntry) -> Root:
        """Keep the VDI open that this one is a clone of, until `_leave_parent`; what the clone's map begins with."""
        state = self.catalog.state
        stack = self._parents[entry.vdi_id] = AsyncExitStack()
        vdi = await self._use_owner(stack, state.snapshots[entry.base].log, entry)
        base = state.snapshots[entry.base]  # opening its log may have given its map another number
        await vdi.keeper.snapshot_written(base.checkpoint)
        return of_clone(await snapshot_root(self.env, vdi.disk, self.snapshot_name(base), base), base.log)

    def _renumbered(self, owed: FrozenAt | None) -> list[Entry]:
        """The entry of a snapshot whose map this run will write."""
        snapshot = None if owed is None else self.catalog.state.snapshots.get(owed.snapshot_id)
        if owed is None or snapshot is None:  # deleted meanwhile
            return []
        return [msgspec.structs.replace(snapshot, checkpoint=owed.checkpoint)]

    async def _commit_copied(self, vdi_id: int, vdi: Vdi, copied: Copied) -> bool:
        """Make a copy of the log's end count. False: it does not, and nothing has happened."""
        keeper = vdi.keeper
        generation = copied.writer.generation

        def make() -> list[HeadEntry]:
            if vdi_id in self._deleting or vdi_id not in self.catalog.state.vdis:
                return []
            tail = tail_rows(vdi.disk, min(keeper.previous_next_segment, keeper.next_segment))
            kept = [row for row in tail if row.number < copied.former[0].number]
            head = msgspec.structs.replace(
                self._closed_head(vdi),
                generation=generation,
                tail=[*kept, *rows_of(copied.segments)],
                first_number=copied.writer.next_number,
                clean=False,
            )
            return [head]

        try:
            return await self.catalog.edit(make)
        except StoreError as error:
            now = self._head(vdi.disk.log)
            if now is None or now.generation < generation:
                log.warning("no head could be written log=%d: %s", vdi.disk.log, error)
                return False
            raise

    async def renew_head(self, vdi: Vdi) -> None:
        """Nothing of an open VDI is missing: from now on the end of its log is judged by the copies that it has and the
        zones that there are now, not by those since it was opened. Nothing to do if they are the same."""
        membership, disk, keeper, writer = self.membership, vdi.disk, vdi.keeper, vdi.disk.writer
        head = self._head(disk.log)
        copies, version = writer.copies, membership.version
        if head is None or (head.copies >= copies and not membership.history.lost_since(head.epoch)):
            return
        # What lies behind this checkpoint, and all that comes, is where these zones and copies want it.
        await writer.go_elsewhere()
        takeovers = writer.takeovers
        await keeper.checkpoint()
        number = keeper.number

        def make() -> list[HeadEntry]:
            now, entry = self._head(disk.log), self.catalog.state.vdis.get(vdi.vdi_id)
            wants = disk.checkpoint_zones.wanted() if isinstance(disk.checkpoint_zones, CheckpointZones) else ()
            if (
                entry is None
                or now is None
                or now.generation != writer.generation
                or writer.error is not None
                or writer.waits_for_takeover
                or writer.takeovers != takeovers
                or membership.version != version
                or not set(wants) <= set(disk.checkpoint_zones(number))
            ):
                return []
            tail = tail_rows(disk, min(keeper.previous_next_segment, keeper.next_segment))
            renewed = msgspec.structs.replace(
                now,
                tail=[row for row in tail if row.number < keeper.next_segment],
                checkpoint=keeper.durable_number,
                epoch=membership.epoch.id,
                copies=min(copies, writer.copies, entry.copies),
            )
            return [renewed]

        await self.catalog.edit(make)

    def identity(self, entry: VdiEntry) -> str:
        """What stays the same as long as a client may go on with this VDI where it was: same store, VDI and log, and
        nothing acknowledged lost since (DESIGN.md, "Who connects again goes on only where nothing is missing")."""
        since = 0 if entry.mode == "writethrough" else self._unbroken_since(entry)
        return f"{self.env.store_id.hex()}:{entry.vdi_id}:{entry.log}:{since}"

    def _unbroken_since(self, entry: VdiEntry) -> int:
        """The generation of the log at whose opening acknowledged writes may last have been lost, 0 = never; of a VDI
        that is not open, as it will be."""
        head = self._head(entry.log)
        if head is None:
            return 0
        if entry.vdi_id in self._open or (head.clean and not self._force):
            return head.unbroken_since
        return head.generation + 1

    def _head(self, log_number: int) -> HeadEntry | None:
        return self.catalog.state.heads.get(log_number)

    def _closed_head(self, vdi: Vdi) -> HeadEntry:
        disk, keeper = vdi.disk, vdi.keeper
        head = self._head(disk.log)
        return HeadEntry(
            log=disk.log,
            generation=disk.writer.generation,
            tail=tail_rows(disk, min(keeper.previous_next_segment, keeper.next_segment)),
            first_number=disk.writer.next_number,
            checkpoint=keeper.durable_number,
            clean=True,
            epoch=self.membership.epoch.id,
            copies=min(disk.writer.copies, head.copies) if head else disk.writer.copies,
            base_checkpoint=head.base_checkpoint if head else 0,
            first_checkpoint=head.first_checkpoint if head else 0,
            unbroken_since=head.unbroken_since if head else 0,
        )


def _noted(task: asyncio.Task[Any]) -> None:
    """Why a VDI could not be opened is in its status; whoever waits for it gets the error from the task."""
    if not task.cancelled():
        task.exception()

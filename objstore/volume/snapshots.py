"""Snapshots of a store's VDIs: taking one, deleting one, listing them; VDIs that are gone and whose snapshots stay.

Each change is one catalog record. What a change requires is looked at and committed under one lock, so that of two
changes that exclude each other one sees the other. A change belongs to the store once it has begun: it goes on if
whoever asked for it goes away.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import msgspec

from objstore.errors import Busy, Exists, InvalidRequest, NotFound, StoreError, Suspended
from objstore.format.catalog import DeleteEntry, Entry, SnapshotDeleteEntry, SnapshotEntry, VdiEntry
from objstore.names import check_tag
from objstore.volume.openvdis import OpenVdis
from objstore.volume.starting import Started
from objstore.volume.status import SnapshotStatus, SnapshotTaken
from objstore.volume.together import begin_together

log = logging.getLogger(__name__)

T = TypeVar("T")


class SnapshotOperations(OpenVdis):
    """What a store does with snapshots. Touched by the event loop only."""

    def __init__(self, started: Started) -> None:
        super().__init__(started)
        self._work: set[asyncio.Task[Any]] = set()
        self._sizing: dict[int, asyncio.Lock] = {}
        """By vdi id; see `_sized`."""

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task of the store's own, which closing the store waits for."""
        task = self.env.loop.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def _own(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it in a task of the store's own: whoever asked may go away, and half of it must not stay."""
        return await asyncio.shield(self._begin(work))

    # -- looking ------------------------------------------------------------------------------------------------

    def snapshots(self, name: str | None = None) -> list[SnapshotStatus]:
        """The snapshots of a VDI, oldest first; of all, those of VDIs that were deleted too. NotFound."""
        state = self.catalog.state
        if name is not None and name not in state.names and not state.snapshots_named(name):
            raise NotFound(f"there is no VDI {name!r}")
        clones: dict[int, list[str]] = {}
        for vdi in state.vdis.values():
            if not vdi.hidden:
                clones.setdefault(vdi.base, []).append(vdi.name)
        found = list(state.snapshots.values()) if name is None else state.snapshots_named(name)
        listed = [self._snapshot_status(s, clones) for s in found if not s.hidden]
        return sorted(listed, key=lambda s: (s.vdi, s.vdi_deleted, s.index)) if name is None else listed

    def snapshot(self, name: str) -> SnapshotStatus:
        """The snapshot NAME@TAG or NAME@INDEX. NotFound."""
        found = self.catalog.state.find_snapshot(name)
        if found is None:
            raise NotFound(f"there is no snapshot {name!r}")
        return self._snapshot_status(found)

    def _snapshot_status(self, entry: SnapshotEntry, clones: Mapping[int, list[str]] | None = None) -> SnapshotStatus:
        state = self.catalog.state
        vdi = state.vdis[entry.vdi_id]
        key = entry.snapshot_id
        volume = self._frozen.get(key)
        if clones is None:
            clones = {key: [v.name for v in state.clones_of(key) if not v.hidden]}
        return SnapshotStatus(
            name=self.snapshot_name(entry),
            vdi=vdi.name,
            vdi_deleted=vdi.hidden,
            tag=entry.tag,
            index=entry.index,
            size_bytes=entry.size_bytes,
            created=entry.created,
            protected=entry.protected,
            attached=0 if volume is None else volume.attached,
            identity=self.contents_of(entry),
            clones=sorted(clones.get(key, ())),
        )

    def contents_of(self, entry: SnapshotEntry) -> str:
        """What its contents are called in every store (STREAM.md)."""
        return entry.origin or f"{self.env.store_id.hex()}:{entry.snapshot_id}"

    # -- taking -------------------------------------------------------------------------------------------------

    async def create_snapshot(
        self, name: str, tag: str = "", *, skip_unchanged: bool = False, protected: bool = False
    ) -> SnapshotTaken:
        """Take a snapshot of a VDI, attached or not; durable on return. What was acknowledged before the call is in it,
        what is written after its return is not.

        skip_unchanged: if nothing was written since the newest one, that one is the answer. Exists: the tag;
        InvalidRequest: no tag can be that; NotFound; NoSpace; Unavailable.
        """
        check_tag(tag)
        entry = self._entry(name)
        self._check_tag_free(name, tag)
        return await self._own(self._create_snapshot(entry, tag, skip_unchanged, protected))

    def _check_tag_free(self, name: str, tag: str) -> None:
        if tag and any(s.tag == tag for s in self.catalog.state.snapshots_named(name)):
            raise Exists(f"there is a snapshot {name}@{tag} already")

    async def _create_snapshot(self, entry: VdiEntry, tag: str, skip_unchanged: bool, protected: bool) -> SnapshotTaken:
        if skip_unchanged:
            of_it = self.catalog.state.snapshots_of(entry.vdi_id)
            ours = [s for s in of_it if s.log == entry.log and not s.hidden]
            async with self.using(entry) as vdi:
                if ours and vdi.unchanged_since(ours[-1].position):
                    return SnapshotTaken(snapshot=self._snapshot_status(ours[-1]), taken=False)
        snapshot = await self._take(entry, tag, protected=protected)
        return SnapshotTaken(snapshot=self._snapshot_status(snapshot), taken=True)

    @asynccontextmanager
    async def _sized(self, vdi_id: int) -> AsyncIterator[None]:
        """Nobody else changes the VDI's size meanwhile, and nothing is in its map behind its end (DESIGN.md, 43)."""
        lock = self._sizing.setdefault(vdi_id, asyncio.Lock())
        async with lock:
            await self._clear_behind(vdi_id)
            yield

    async def _clear_behind(self, vdi_id: int) -> None:
        """With `_sized`'s lock held: discard what is behind the end of a VDI that was made smaller."""
        state = self.catalog.state
        entry = state.vdis.get(vdi_id)
        if entry is None or not entry.former_bytes:
            return
        async with self.using(entry) as vdi:
            await vdi.clear_behind()
            async with self._change:
                now = state.vdis.get(vdi_id)
                if now is not None:
                    await self.catalog.commit(msgspec.structs.replace(now, former_bytes=0))

    async def _clear_later(self, vdi_id: int) -> None:
        try:
            async with self._sized(vdi_id):
                pass
        except StoreError as error:
            log.warning("what is behind the end of a VDI that was made smaller is discarded later: %s", error)

    async def _take(
        self, entry: VdiEntry, tag: str = "", *, protected: bool = False, hidden: bool = False
    ) -> SnapshotEntry:
        self._check_whole(entry)
        async with self._sized(entry.vdi_id):
            return await self._take_sized(entry, tag, protected=protected, hidden=hidden)

    def _check_whole(self, entry: VdiEntry) -> None:
        if entry.vdi_id in self.catalog.state.imports:
            raise Suspended(self.refused(entry))

    async def _take_sized(
        self, entry: VdiEntry, tag: str = "", *, protected: bool = False, hidden: bool = False, origin: str = ""
    ) -> SnapshotEntry:
        """See `_take_together`."""
        return (await self._take_together([entry], tag, protected=protected, hidden=hidden, origin=origin))[0]

    async def _take_together(
        self,
        entries: Sequence[VdiEntry],
        tag: str,
        *,
        protected: bool = False,
        hidden: bool = False,
        origin: str = "",
    ) -> list[SnapshotEntry]:
        """Snapshots of one instant, in one catalog record. entries: in the order of their logs' numbers. origin: the
        one VDI is what was imported; with the same record it is whole."""
        state = self.catalog.state
        taken: list[SnapshotEntry] = []
        async with AsyncExitStack() as stack:
            vdis = [await stack.enter_async_context(self.using(entry)) for entry in entries]
            reserved = sum(vdi.size_bytes for vdi in vdis if vdi.prealloc)
            if reserved:
                await self._check_prealloc(reserved)  # every block may be written anew beside the old one
            points = await begin_together(vdis)
            try:
                durable = (vdi.durable_to(position) for vdi, (_, position) in zip(vdis, points, strict=True))
                for result in await asyncio.gather(*durable, return_exceptions=True):
                    if isinstance(result, BaseException):
                        raise result
                async with self._change:
                    for entry, (number, position) in zip(entries, points, strict=True):
                        now = self._entry_of(entry.vdi_id)
                        self._check_tag_free(now.name, tag)
                        if not origin and not hidden:
                            self._check_whole(now)
                        index = max((s.index for s in state.snapshots_named(now.name)), default=0) + 1
                        taken.append(
                            SnapshotEntry(
                                snapshot_id=state.next_snapshot + len(taken),
                                log=entry.log,
                                checkpoint=number,
                                position=position,
                                vdi_id=entry.vdi_id,
                                tag=tag,
                                index=0 if hidden else index,
                                size_bytes=now.size_bytes,
                                created=self.env.clock.wall(),
                                protected=protected,
                                hidden=hidden,
                                origin=origin,
                            )
                        )
                    imported = [state.imports[entry.vdi_id] for entry in entries] if origin else []
                    whole = [msgspec.structs.replace(entry, identity="") for entry in imported]
                    await self.catalog.commit(*taken, *whole)
            finally:
                if not taken or taken[-1].snapshot_id not in state.snapshots:
                    for vdi, (number, _) in zip(vdis, points, strict=True):
                        vdi.keeper.end_snapshot(number)
        return taken

    # -- groups -------------------------------------------------------------------------------------------------

    async def create_group_snapshot(
        self, names: Sequence[str], tag: str, *, protected: bool = False
    ) -> list[SnapshotStatus]:
        """Take a snapshot of several VDIs, attached or not, at one instant and under one tag: all or none, durable on
        return. What was acknowledged on any of them before the call is in it, what is asked for on any after its return
        is not. Exists: one has the tag; InvalidRequest: no tag can be that, or a name is given twice; NotFound;
        NoSpace; Unavailable."""
        check_tag(tag)
        if not names or not tag:
            raise InvalidRequest("a snapshot of a group has a tag and at least one VDI")
        if len(set(names)) != len(names):
            raise InvalidRequest(f"a VDI is given twice among {', '.join(names)}")
        entries = sorted((self._entry(name) for name in names), key=lambda entry: entry.log)
        for name in names:
            self._check_tag_free(name, tag)
        taken = await self._own(self._take_group(entries, tag, protected))
        found = {entry.vdi_id: self._snapshot_status(entry) for entry in taken}
        vdis = {entry.name: entry.vdi_id for entry in entries}
        return [found[vdis[name]] for name in names]

    async def _take_group(self, entries: Sequence[VdiEntry], tag: str, protected: bool) -> list[SnapshotEntry]:
        for entry in entries:
            self._check_whole(entry)
        async with AsyncExitStack() as stack:
            for entry in sorted(entries, key=lambda entry: entry.vdi_id):
                await stack.enter_async_context(self._sized(entry.vdi_id))
            return await self._take_together(entries, tag, protected=protected)

    def _entry_of(self, vdi_id: int) -> VdiEntry:
        """The VDI as it is now. NotFound: it was deleted meanwhile."""
        entry = self.catalog.state.vdis.get(vdi_id)
        if entry is None or entry.hidden or vdi_id in self._deleting:
            raise NotFound("the VDI was deleted")
        return entry

    async def _check_prealloc(self, size_bytes: int) -> None:
        raise NotImplementedError

    async def protect_snapshot(self, name: str, *, protected: bool) -> SnapshotStatus:
        """Let nobody delete a snapshot until it is unprotected again. NotFound."""
        self.find_snapshot(name)
        return await self._own(self._protect(name, protected))

    async def _protect(self, name: str, protected: bool) -> SnapshotStatus:
        async with self._change:
            changed = msgspec.structs.replace(self.find_snapshot(name), protected=protected)
            await self.catalog.commit(changed)
        return self._snapshot_status(changed)

    # -- deleting -----------------------------------------------------------------------------------------------

    async def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot; the space that only it needs comes back in the background. NotFound; Busy: it is
        protected, attached, or clones need it, which are named."""
        self.find_snapshot(name)
        await self._own(self._delete_found(lambda: self.find_snapshot(name), name))

    async def _delete_found(self, find: Callable[[], SnapshotEntry], name: str) -> None:
        state = self.catalog.state
        closing: set[int] = set()
        try:
            while True:
                async with self._change:
                    entry = find()
                    vdis, snapshots = self._left_over(set(), {entry.snapshot_id})
                    self._check_unused(entry, name, vdis)
                    if any(clone.vdi_id not in vdis for clone in state.clones_of(entry.snapshot_id)):
                        # Only the VDI itself shares something with it, or what nobody sees: it is gone for all to see.
                        unseen = msgspec.structs.replace(entry, hidden=True, protected=False, tag="", index=0)
                        await self.catalog.commit(unseen)
                        return
                    removal = Removal(self, vdis, snapshots)
                    closing.update(vdis)
                    self._deleting.begin(closing)
                    if all(self._is_idle(vdi, removal.vdis) for vdi in removal.vdis):
                        await self.catalog.commit(*removal.entries)
                        break
                await self._until_idle(removal.vdis)
        finally:
            self._deleting.end(closing)
        self._removed(removal)

    def _left_over(self, vdis: set[int], snapshots: set[int]) -> tuple[set[int], set[int]]:
        """What nothing needs any more once these VDIs and snapshots are gone, they included: hidden VDIs without
        snapshots, and hidden snapshots without clones but those."""
        state = self.catalog.state
        found = True
        while found:
            found = False
            for vdi in state.vdis.values():
                kept = vdi.vdi_id in vdis or vdi.vdi_id in state.trash
                if vdi.hidden and not kept and not self._needed(vdi, vdis, snapshots):
                    vdis.add(vdi.vdi_id)
                    found = True
            for snapshot in state.snapshots.values():
                if snapshot.snapshot_id not in snapshots and self._is_for(snapshot, vdis):
                    snapshots.add(snapshot.snapshot_id)
                    found = True
        return vdis, snapshots

    def _needed(self, vdi: VdiEntry, vdis: Collection[int] = (), snapshots: Collection[int] = ()) -> bool:
        """Whether anything needs a deleted VDI, once those VDIs and snapshots are gone: a snapshot of it or in its log,
        unless it is there for that VDI alone."""
        return any(
            (s.log == vdi.log or s.vdi_id == vdi.vdi_id) and not self._is_for(s, {*vdis, vdi.vdi_id})
            for s in self.catalog.state.snapshots.values()
            if s.snapshot_id not in snapshots
        )

    def _is_for(self, snapshot: SnapshotEntry, vdis: Collection[int]) -> bool:
        """Whether nobody sees the snapshot and it has no clones but these VDIs."""
        clones = self.catalog.state.clones_of(snapshot.snapshot_id) if snapshot.hidden else []
        return bool(clones) and all(clone.vdi_id in vdis for clone in clones)

    def _removed(self, removal: "Removal") -> None:
        """The deletion of VDIs and snapshots is committed: see to what is left of them."""
        for owner, checkpoint in removal.freed:
            open_owner = self._open.get(owner.vdi_id)
            if open_owner is not None:
                open_owner.keeper.end_snapshot(checkpoint)
            self._begin(self._give_back(owner))
        self._begin(self._all_gone(removal.vdis))

    async def _all_gone(self, vdis: Collection[VdiEntry]) -> None:
        for vdi in vdis:
            await self._gone(vdi)

    def _check_unused(self, entry: SnapshotEntry, name: str, going: Collection[int]) -> None:
        """going: VDIs that go with it."""
        state = self.catalog.state
        key = entry.snapshot_id
        if entry.protected:
            raise Busy(f"snapshot {name} is protected")
        if key in self._frozen or key in self._freezing:
            raise Busy(f"snapshot {name} is attached")
        clones = [
            clone
            for clone in state.clones_of(key)
            if clone.vdi_id not in {entry.vdi_id, *going} and not self._unseen(clone)
        ]
        if clones:
            names = ", ".join(sorted(self._described(clone) for clone in clones))
            raise Busy(f"snapshot {name} is needed by {names}")

    def _unseen(self, vdi: VdiEntry) -> bool:
        """Whether nobody sees anything of a VDI: it is there for what others share with it."""
        state = self.catalog.state
        if not vdi.hidden or vdi.vdi_id in state.trash:
            return False
        return all(snapshot.hidden for snapshot in state.snapshots_in(vdi.log))

    def _described(self, clone: VdiEntry) -> str:
        """A clone for people: what of it is left if it was deleted."""
        if not clone.hidden:
            return clone.name
        if clone.vdi_id in self.catalog.state.trash:
            return f"{clone.name} (in the trash)"
        return ", ".join(self.snapshot_name(s) for s in self.catalog.state.snapshots_in(clone.log)) or clone.name

    def _is_idle(self, entry: VdiEntry, going: Collection[VdiEntry]) -> bool:
        """Whether nothing of the store's own uses a VDI, but clones that go as well, or brings it up or down."""
        vdi = self._open.get(entry.vdi_id)
        under_way = entry.vdi_id in self._opening or entry.vdi_id in self._closing
        return not under_way and (vdi is None or vdi.users <= self._held_by(entry, going))

    def _held_by(self, entry: VdiEntry, clones: Collection[VdiEntry]) -> int:
        """How many of these clones are open and keep that VDI open."""
        state = self.catalog.state
        return sum(c.vdi_id in self._parents and state.snapshots[c.base].log == entry.log for c in clones if c.base)

    async def _until_idle(self, entries: Collection[VdiEntry]) -> None:
        """Wait until that may be true of all of them; who comes later is refused or
        waits, since they are in `_deleting`."""
        for entry in entries:
            while not self._is_idle(entry, entries):
                under_way = self._opening.get(entry.vdi_id) or self._closing.get(entry.vdi_id)
                if under_way is not None:
                    await asyncio.wait([under_way])
                else:
                    await self._unused.setdefault(entry.log, self.env.loop.create_future())
                    self._unused.pop(entry.log, None)

    async def _gone(self, entry: VdiEntry) -> None:
        """A VDI's deletion was committed: see to what is left of it."""
        raise NotImplementedError

    async def _give_back(self, entry: VdiEntry) -> None:
        """See that the space which nothing in that VDI's log needs any more is freed."""
        try:
            if not self.leaving(entry.vdi_id):
                async with self.using(entry) as vdi:
                    await vdi.give_back(lambda: self.leaving(entry.vdi_id))
        except StoreError as error:
            log.warning("space of VDI %s comes back later: %s", entry.name, error)

    async def _empty(self, entry: VdiEntry) -> None:
        """Discard the data of a VDI that was deleted and whose log stays for its snapshots."""
        try:
            async with self.using(entry) as vdi:
                await vdi.trim(0, vdi.size_bytes)
                await vdi.flush()
                async with self._change:
                    now = self.catalog.state.vdis.get(entry.vdi_id)
                    if now is not None:
                        await self.catalog.commit(msgspec.structs.replace(now, emptied=True))
                await vdi.give_back(lambda: self.leaving(entry.vdi_id))
        except StoreError as error:
            log.warning("space of VDI %s comes back later: %s", entry.name, error)

    def resume_work(self) -> None:
        """Go on with what a former process left undone."""
        for entry in self.catalog.state.vdis.values():
            if entry.vdi_id in self.catalog.state.trash:
                continue
            if entry.hidden and not entry.emptied:
                self._begin(self._empty(entry))
            elif entry.former_bytes and not entry.hidden:
                self._begin(self._clear_later(entry.vdi_id))


class Removal:
    """VDIs and snapshots that go in one catalog record. freed: VDIs that stay, with the numbers of the checkpoints in
    their logs that snapshots needed."""

    def __init__(self, store: OpenVdis, vdis: Collection[int], snapshots: Collection[int]) -> None:
        state = store.catalog.state
        # Clones first: their logs have higher numbers.
        self.vdis = sorted((state.vdis[vdi] for vdi in vdis), key=lambda vdi: -vdi.log)
        gone = [state.snapshots[snapshot] for snapshot in sorted(snapshots)]
        self.entries: list[Entry] = [SnapshotDeleteEntry(snapshot_id=snapshot.snapshot_id) for snapshot in gone]
        self.entries += [DeleteEntry(vdi_id=vdi.vdi_id) for vdi in self.vdis]
        owners = ((state.vdis[state.owners[snapshot.log]], snapshot.checkpoint) for snapshot in gone)
        self.freed = [(owner, checkpoint) for owner, checkpoint in owners if owner.vdi_id not in vdis]

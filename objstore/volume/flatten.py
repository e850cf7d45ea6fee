"""Flattening: a clone gets data of its own for what it shares with the snapshot that it is of, and needs that no more.

Its clients go on meanwhile. Each block is copied by a write of the VDI, so one that was cut off has lost nothing but
time: what is copied stays, and the next one finds it.
"""

from msgspec.structs import replace

from objstore.errors import Busy, InvalidRequest, NotFound, Unavailable
from objstore.format.catalog import SnapshotEntry, VdiEntry
from objstore.log.regionmap import PageRef
from objstore.log.root import own
from objstore.units import REGION_SHIFT
from objstore.volume.changes import ChangeOperations
from objstore.volume.jobs import Jobs
from objstore.volume.status import JobStatus
from objstore.volume.vdi import Vdi

CHECKPOINTS_MAX = 4
"""Until none of a map's pages is another log's: one is enough, unless it is given up for a snapshot of its own."""


class FlattenOperations(ChangeOperations):
    """How clones become VDIs of their own. Touched by the event loop only."""

    jobs: Jobs

    async def flatten(self, name: str) -> JobStatus:
        """Begin a job that gives a clone data of its own; `jobs.wait` returns when it has ended. The clone needs
        the snapshot that it was of no more then. NotFound; InvalidRequest: it is no clone; Busy: it has snapshots that
        need the other one too, which are named, or is just being flattened."""
        entry = self._entry(name)
        if not entry.base:
            raise InvalidRequest(f"VDI {name!r} is no clone")
        self._check_snapshots(entry)
        if entry.vdi_id in self._flattening:
            raise Busy(f"VDI {name!r} is just being flattened")
        self._flattening.add(entry.vdi_id)

        async def step(offset: int, length: int) -> int:
            vdi_id = self._still_clone(entry).vdi_id
            async with self.using(self.catalog.state.vdis[vdi_id]) as vdi:
                self._still_clone(entry)
                return await vdi.copy_in(offset, length)

        async def finish() -> None:
            async with self._sized(entry.vdi_id), self.using(self._still_clone(entry)) as vdi:
                await self._part(entry, vdi)

        def end() -> None:
            self._flattening.discard(entry.vdi_id)

        try:
            return await self.jobs.start("flatten", name, 0, entry.size_bytes, step, finish=finish, ended=end)
        except BaseException:
            end()
            raise

    def _still_clone(self, begun: VdiEntry) -> VdiEntry:
        """The clone as it is now. NotFound: it was deleted, or it is to be; Busy: it was rolled back."""
        now = self.catalog.state.vdis.get(begun.vdi_id)
        if now is None or now.hidden or self.leaving(begun.vdi_id):
            raise NotFound(f"VDI {begun.name!r} was deleted, or the store is closing")
        if (now.log, now.base) != (begun.log, begun.base):
            raise Busy(f"VDI {begun.name!r} was rolled back meanwhile")
        return now

    def _check_snapshots(self, entry: VdiEntry, from_checkpoint: int = 0) -> None:
        """Busy: snapshots in the clone's log, of before that checkpoint (0 = all), have maps that begin with the same
        snapshot as its own."""
        state = self.catalog.state
        needing = [
            snapshot
            for snapshot in state.snapshots_in(entry.log)
            if not from_checkpoint or snapshot.checkpoint < from_checkpoint
        ]
        if needing:
            names = ", ".join(self._named(snapshot) for snapshot in needing)
            raise Busy(f"VDI {entry.name!r} can't be flattened while it has snapshots or clones from before: {names}")

    def _named(self, snapshot: SnapshotEntry) -> str:
        if not snapshot.hidden:
            return self.snapshot_name(snapshot)
        return ", ".join(self._described(c) for c in self.catalog.state.clones_of(snapshot.snapshot_id)) or "one"

    async def _part(self, begun: VdiEntry, vdi: Vdi) -> None:
        """Everything is copied, its size stands and no snapshot is taken: see that nothing is left, also in the map's
        pages and in the checkpoint that an opening may fall back on, and commit that the clone needs nobody."""
        at = 0
        while at < vdi.size_bytes:
            self._still_clone(begun)
            at += await vdi.copy_in(at, vdi.size_bytes - at)
        keeper = vdi.keeper
        # Pages of its own may still have addresses in other logs: only a checkpoint that begins now has none.
        for _ in range(CHECKPOINTS_MAX):
            for region in _shared(vdi):
                await keeper.map_room(lambda region=region: vdi.disk.map.grows(region << REGION_SHIFT, 1))  # type: ignore[misc]
                await _write_anew(vdi, region)
            await keeper.checkpoint()
            if not _shared(vdi):
                break
        else:
            raise Unavailable(f"the map of VDI {begun.name!r} still shares pages; flatten it again")
        clean = keeper.number
        await keeper.checkpoint()
        await vdi.collector.round()  # what the counters still have to look up in shared pages
        try:
            async with self._change:
                entry = self._still_clone(begun)
                self._check_snapshots(entry, clean)
                await self.catalog.commit(replace(entry, base=0))
        finally:
            now = self.catalog.state.vdis.get(begun.vdi_id)
            if now is not None and now.log == begun.log and not now.base:
                # Also where nobody knows yet whether the record is durable: whatever is committed next is behind it.
                await self._let_go(begun, vdi)

    async def _let_go(self, clone: VdiEntry, vdi: Vdi) -> None:
        """A clone needs the snapshot no more that it was of: nor does anything keep that for it."""
        vdi.disk.base_root = None
        await vdi.reads_over()
        await self._leave_parent(clone.vdi_id)
        base = self.catalog.state.snapshots.get(clone.base)
        if base is not None and base.hidden:
            self._begin(self._drop_hidden(base.snapshot_id))


def _shared(vdi: Vdi) -> list[int]:
    """Regions whose pages in the newest checkpoint are other logs'."""
    root = vdi.keeper.root
    shared: list[int] = root.regions[~own(root.rows)].tolist()
    return shared


async def _write_anew(vdi: Vdi, region: int) -> None:
    """See that the next checkpoint has a page of its own for a region. Corrupt; Unavailable: it can't be read."""
    disk = vdi.disk
    while isinstance(ref := disk.map.regions.get(region), PageRef):
        await disk.load([(region, ref)])
    disk.map.write_anew(region)

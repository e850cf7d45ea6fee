"""A snapshot as a volume: read-only, over the map that the checkpoint of its position is."""

from collections.abc import Callable

from objstore.errors import Corrupt, ReadOnly, StoreError, Unavailable
from objstore.format.catalog import SnapshotEntry
from objstore.log.blockmap import BlockMap
from objstore.log.checkpoint import CheckpointZones, find_checkpoint
from objstore.log.disk import Disk
from objstore.log.env import Env
from objstore.log.holds import live_numbers
from objstore.log.root import Root, rebased
from objstore.log.view import MappedView
from objstore.units import BLOCK_BYTES
from objstore.volume.base import always
from objstore.volume.reading import Reading

EVICT_AT_ONCE = 64


class FrozenVolume(Reading):
    """A snapshot that is open (Volume). Touched by the event loop only; made by `open_snapshot`. Whoever opens it keeps
    the VDI open in whose log it is.

    attached: connections.
    """

    read_only = True

    def __init__(self, name: str, entry: SnapshotEntry, view: MappedView, root: Root) -> None:
        super().__init__(view)
        self.name = name
        self.entry = entry
        self.size_bytes = entry.size_bytes
        self.attached = 0
        self.gave_up = False
        self.error: StoreError | None = None
        self.stuck: StoreError | None = None
        self._root = root
        view.owner = self
        view.newest_page = root.get
        view.map.join(view.env.maps)
        view.env.maps.owners.append(self)

    @property
    def description(self) -> str:
        """One line for people."""
        return f"snapshot {self.entry.index}"

    # -- as a MapOwner -------------------------------------------------------------------------------------------

    @property
    def pinned_bytes(self) -> int:
        """See MapOwner."""
        return 0

    def relieve(self) -> None:
        """See MapOwner: nothing of this map is ever pinned."""

    def evict(self, excess_bytes: int) -> None:
        """See MapOwner."""
        blockmap = self.view.map
        while excess_bytes > 0:
            before = blockmap.loaded_bytes
            for region in blockmap.eviction_candidates(EVICT_AT_ONCE):
                ref = self._root.get(region)
                if ref is not None:
                    blockmap.evict(region, ref)
            freed = before - blockmap.loaded_bytes
            if freed <= 0:
                return
            excess_bytes -= freed

    # -- as a Volume ---------------------------------------------------------------------------------------------

    def _refuse(self) -> ReadOnly:
        return ReadOnly(f"{self.name} is a snapshot")

    def write_now(self, offset_bytes: int, data: memoryview) -> bool:
        """See Volume."""
        raise self._refuse()

    async def write(
        self, offset_bytes: int, data: memoryview, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        """See Volume."""
        raise self._refuse()

    async def trim(
        self, offset_bytes: int, length_bytes: int, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        """See Volume."""
        raise self._refuse()

    async def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        *,
        no_hole: bool = False,
        fast: bool = False,
        fua: bool = False,
        alive: Callable[[], bool] = always,
    ) -> None:
        """See Volume."""
        raise self._refuse()

    def sync_soon(self) -> None:
        """See Volume."""

    def flush_state(self) -> int:
        """See Volume: there is never anything to do."""
        return 0

    async def flush(self) -> None:
        """See Volume."""

    async def close(self, reason: StoreError) -> None:
        """Take nothing more (every later call raises `reason`); return when what is under way has ended."""
        self.closed = reason
        await self.quiet()
        env = self.view.env
        self.view.map.leave()
        if self in env.maps.owners:
            env.maps.owners.remove(self)
        env.maps.wake()


async def snapshot_root(env: Env, disk: Disk, name: str, entry: SnapshotEntry) -> Root:
    """The root of a snapshot's map. disk: the open one whose log has the snapshot; the map is written. Corrupt: the
    map, or something that it points into, is in no zone."""
    zones = disk.checkpoint_zones
    assert isinstance(zones, CheckpointZones)
    loaded = await find_checkpoint(env, entry.log, entry.checkpoint, zones)
    out = [repr(env.zones[z]) for z in zones(entry.checkpoint) if z not in env.in_service]
    if loaded is None and out:
        raise Unavailable(f"the map of snapshot {name} is on zones that are out of reach: {', '.join(out)}")
    if loaded is None:
        raise Corrupt(f"the map of snapshot {name} can't be read from any zone log={entry.log}")
    gone = [n for n in live_numbers(loaded.table).tolist() if n not in disk.segments]
    if gone:
        raise Corrupt(f"segments of snapshot {name} are gone log={entry.log} segments={gone[:10]}")
    if loaded.header.position != entry.position:
        raise Corrupt(
            f"the map of snapshot {name} is another one log={entry.log} position={entry.position} "
            f"found={loaded.header.position}"
        )
    root = Root(loaded.root)
    return root if disk.base_root is None else rebased(root, disk.base_root)


async def open_snapshot(env: Env, disk: Disk, name: str, entry: SnapshotEntry) -> FrozenVolume:
    """The snapshot as a volume; see `snapshot_root`."""
    root = await snapshot_root(env, disk, name, entry)
    blocks = -(-entry.size_bytes // BLOCK_BYTES)
    view = MappedView(env, entry.log, blocks, BlockMap(await root.pages()))
    view.checkpoint_zones = disk.checkpoint_zones
    return FrozenVolume(name, entry, view, root)

"""A store for tests of the control side: VDIs in a dictionary, every promise of ControlledStore, no zones."""

from collections.abc import Mapping

import msgspec

from objstore.errors import Busy, Exists, InvalidRequest, NoSpace, NotFound
from objstore.names import check_name
from objstore.units import GIB, TIB
from objstore.volume.base import Holder, Volume, VolumeInfo
from objstore.volume.memory import MemoryVolume
from objstore.volume.settings import MODES
from objstore.volume.status import (
    DamagedRange,
    JobStatus,
    LimitStatus,
    RecoveryStatus,
    ScrubStatus,
    SnapshotStatus,
    SnapshotTaken,
    StoreStatus,
    VdiDamage,
    VdiStatus,
    ZoneStatus,
)

CAPACITY_BYTES = TIB
"""A preallocation of more than this meets NoSpace."""


class FakeAttributes:
    """Attributes of VDIs, whether these exist or not."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], bytes] = {}

    def names(self, name: str) -> dict[str, int]:
        return {key: len(value) for (vdi, key), value in self._values.items() if vdi == name}

    def get(self, name: str, key: str) -> bytes:
        return self._values[name, key]

    async def set(self, name: str, key: str, value: bytes, *, exclusive: bool = False) -> None:
        self._values[name, key] = value

    async def delete(self, name: str, key: str) -> None:
        del self._values[name, key]


class FakeJobs:
    """Jobs that there are none of."""

    def list(self) -> list[JobStatus]:
        return []

    def get(self, job_id: int) -> JobStatus:
        raise NotFound(f"no job {job_id}")

    async def abort(self, job_id: int) -> JobStatus:
        raise NotFound(f"no job {job_id}")


class FakeStore:
    """attached: names that `delete_vdi` finds in use. scrubs: how often one was asked for."""

    def __init__(self) -> None:
        self._vdis: dict[str, VdiStatus] = {}
        self._snapshots: dict[str, SnapshotStatus] = {}
        self.attached: set[str] = set()
        self.scrubs = 0
        self.holders: list[Holder] = []
        self.attributes = FakeAttributes()
        self.jobs = FakeJobs()
        self.rate = 0
        self.changes: list[tuple[str, str, str | None, float | None, bool]] = []

    async def status(self, *, thorough: bool = True) -> StoreStatus:
        zone = ZoneStatus(
            number=0,
            id="0f" * 16,
            path="/srv/a",
            state="in",
            reason="",
            weight=1.0,
            used_bytes=GIB,
            free_bytes=TIB,
            epoch=1,
        )
        return StoreStatus(
            store_id="ab" * 16,
            format_version=1,
            health="ok",
            reasons=[],
            zones=[zone],
            epoch=1,
            vdis=len(self._vdis),
            dirty_bytes=0,
            dirty_bytes_max=64 << 20,
            map_bytes=3 << 20,
            map_bytes_max=64 << 20,
            map_waiting=2,
            unclean_stop=None,
            started=1_700_000_000.0,
            version="test",
            scrub=self._scrub(),
            recovery=self._recovery(),
        )

    def _recovery(self) -> RecoveryStatus:
        return RecoveryStatus(
            running=True,
            copies_missing=3,
            objects_unreachable=0,
            bytes_done=GIB,
            bytes_total=2 * GIB,
            seconds_left=9.0,
            bytes_per_second_max=self.rate,
            copies_made=4,
            problems=[],
        )

    def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus:
        if bytes_per_second < 0:
            raise InvalidRequest(f"no rate: {bytes_per_second}")
        self.rate = bytes_per_second
        return self._recovery()

    async def set_limits(
        self, name: str, limits: Mapping[str, tuple[int, int]], *, weight: int | None = None
    ) -> VdiStatus:
        given = {kind: LimitStatus(rate=rate, burst=burst) for kind, (rate, burst) in limits.items()}
        self._vdis[name] = msgspec.structs.replace(self.vdi(name), limits=given, weight=weight or 100)
        return self.vdi(name)

    async def set_copies(self, name: str, copies: int) -> VdiStatus:
        self._vdis[name] = msgspec.structs.replace(self.vdi(name), copies=copies)
        return self._vdis[name]

    async def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> None:
        self.changes.append((action, zone, path, weight, force))

    def _scrub(self) -> ScrubStatus:
        return ScrubStatus(
            running=self.scrubs > 0,
            on_demand=self.scrubs > 0,
            bytes_done=GIB,
            bytes_total=2 * GIB,
            seconds_left=7.0,
            started=1_700_000_000.0,
            finished=None,
            copies_checked=12,
            copies_bad=2,
            copies_repaired=1,
            copies_unrepaired=1,
            read_repairs=0,
            skipped=[],
        )

    async def start_scrub(self) -> ScrubStatus:
        self.scrubs += 1
        return self._scrub()

    async def damage(self, name: str) -> VdiDamage:
        self.vdi(name)
        return VdiDamage(name=name, ranges=[DamagedRange(offset_bytes=4096, length_bytes=8192)], complete=True)

    def snapshots(self, name: str | None = None) -> list[SnapshotStatus]:
        if name is not None:
            self.vdi(name)
        return [s for s in self._snapshots.values() if name in (None, s.vdi)]

    def snapshot(self, name: str) -> SnapshotStatus:
        if name not in self._snapshots:
            raise NotFound(f"no snapshot of this name: snapshot={name}")
        return self._snapshots[name]

    async def create_snapshot(
        self, name: str, tag: str = "", *, skip_unchanged: bool = False, protected: bool = False
    ) -> SnapshotTaken:
        vdi = self.vdi(name)
        if skip_unchanged and self._snapshots:
            return SnapshotTaken(snapshot=next(iter(self._snapshots.values())), taken=False)
        index = len(self._snapshots) + 1
        whole_name = f"{name}@{tag or index}"
        self._snapshots[whole_name] = SnapshotStatus(
            name=whole_name,
            vdi=name,
            vdi_deleted=False,
            tag=tag,
            index=index,
            size_bytes=vdi.size_bytes,
            created=1_700_000_000.0,
            protected=protected,
            attached=0,
            clones=[],
        )
        return SnapshotTaken(snapshot=self._snapshots[whole_name], taken=True)

    async def clone(self, source: str, name: str, *, copies: int | None = None, mode: str | None = None) -> VdiStatus:
        made = await self.create_vdi(name, self.vdi(source.partition("@")[0]).size_bytes, copies=copies)
        self._vdis[name] = msgspec.structs.replace(made, parent=source, mode=mode or made.mode)
        return self._vdis[name]

    async def rename(self, name: str, new: str) -> VdiStatus:
        self._vdis[new] = msgspec.structs.replace(self.vdi(name), name=new)
        del self._vdis[name]
        return self._vdis[new]

    async def resize(self, name: str, size_bytes: int, *, force: bool = False, reconnect: bool = False) -> VdiStatus:
        self._vdis[name] = msgspec.structs.replace(self.vdi(name), size_bytes=size_bytes)
        return self._vdis[name]

    async def resume(self, name: str) -> VdiStatus:
        return self.vdi(name)

    async def rollback(self, name: str, *, force: bool = False) -> SnapshotStatus:
        return (await self.create_snapshot(self.snapshot(name).vdi)).snapshot

    async def delete_snapshot(self, name: str) -> None:
        if self.snapshot(name).protected:
            raise Busy(f"protected: snapshot={name}")
        del self._snapshots[name]

    async def protect_snapshot(self, name: str, *, protected: bool) -> SnapshotStatus:
        self._snapshots[name] = msgspec.structs.replace(self.snapshot(name), protected=protected)
        return self._snapshots[name]

    def vdis(self) -> list[VdiStatus]:
        return [self._vdis[name] for name in sorted(self._vdis)]

    async def flatten(self, name: str) -> JobStatus:
        raise NotFound(name)

    async def allocate(self, name: str, offset_bytes: int = 0, length_bytes: int = 0) -> JobStatus:
        raise NotFound(name)

    def names(self, *, snapshots: bool = False) -> list[str]:
        return sorted(self._vdis)

    def peek(self, name: str) -> VolumeInfo | None:
        return VolumeInfo(name, self._vdis[name].size_bytes, False, "fake") if name in self._vdis else None

    def tags(self, name: str) -> list[str]:
        return []

    async def open(self, name: str) -> Volume:
        self.attached.add(name)
        return MemoryVolume(name, self.vdi(name).size_bytes)

    async def close(self, volume: Volume) -> None:
        self.attached.discard(volume.name)

    def vdi(self, name: str) -> VdiStatus:
        if name not in self._vdis:
            raise NotFound(f"no VDI of this name: vdi={name}")
        return self._vdis[name]

    async def create_vdi(
        self,
        name: str,
        size_bytes: int,
        *,
        copies: int | None = None,
        mode: str = MODES[0],
        prealloc: bool = False,
    ) -> VdiStatus:
        check_name(name)
        if name in self._vdis:
            raise Exists(f"the name is taken: vdi={name}")
        if copies is not None and copies > 3:
            raise InvalidRequest(f"more copies than zones: copies={copies} zones=3")
        if prealloc and size_bytes > CAPACITY_BYTES:
            raise NoSpace(f"not enough room: vdi={name} size={size_bytes}")
        number = len(self._vdis) + 1
        self._vdis[name] = VdiStatus(
            name=name,
            vdi_id=number,
            size_bytes=size_bytes,
            copies=copies or 3,
            mode=mode,
            created=1_700_000_000.0,
            attached=0,
            state="closed",
            reason="",
            live_bytes=0,
            dirty_bytes=0,
            last_flush=None,
            log=number,
        )
        return self._vdis[name]

    async def delete_vdi(self, name: str) -> None:
        self.vdi(name)
        if name in self.attached:
            raise Busy(f"in use by a client: vdi={name}")
        del self._vdis[name]

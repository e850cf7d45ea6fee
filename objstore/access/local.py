"""The library over zones that this process opens itself."""

import os
from collections.abc import AsyncIterator, Mapping, Sequence

from objstore.access.connection import Connection
from objstore.access.handle import VdiHandle
from objstore.access.local_vdi import LocalVdi
from objstore.format.stream import Begin
from objstore.volume.base import Volume
from objstore.volume.imports import Import
from objstore.volume.settings import MODES
from objstore.volume.status import (
    JobStatus,
    RecoveryStatus,
    ScrubStatus,
    SnapshotSpace,
    SnapshotStatus,
    SnapshotTaken,
    StoreStatus,
    TrashStatus,
    VdiDamage,
    VdiStatus,
    ZoneStatus,
)
from objstore.volume.store import Store


class LocalConnection(Connection):
    """A store in this process. `store` is not for users of the library."""

    in_process = True

    def __init__(self, store: Store) -> None:
        self.store = store
        self.handles: set[LocalVdi] = set()
        store.holders.append(self)

    async def _open(self, name: str, read_only: bool) -> VdiHandle:
        handle = LocalVdi(await self.store.open(name), self._give_back, read_only=read_only)
        self.handles.add(handle)
        return handle

    async def _begin_import(self, name: str, what: Begin) -> VdiHandle:
        wanted = Import(what.base, what.identity, what.size_bytes, what.copies, what.mode)
        handle = LocalVdi(await self.store.begin_import(name, wanted), self._give_back, read_only=False)
        self.handles.add(handle)
        return handle

    async def _finish_import(self, vdi: VdiHandle, tag: str, protected: bool) -> SnapshotStatus:
        assert isinstance(vdi, LocalVdi)
        return await self.store.finish_import(vdi.volume, tag, protected=protected)

    async def give_up(self, volume: Volume, reason: str, *, orderly: bool) -> None:
        """See Holder."""
        for handle in [handle for handle in self.handles if handle.volume is volume]:
            await handle.fence(reason)

    async def _give_back(self, handle: LocalVdi) -> None:
        self.handles.discard(handle)
        await self.store.close(handle.volume)

    async def create(
        self, name: str, size_bytes: int, *, copies: int | None = None, mode: str = MODES[0], prealloc: bool = False
    ) -> VdiStatus:
        """See Connection."""
        return await self.store.create_vdi(name, size_bytes, copies=copies, mode=mode, prealloc=prealloc)

    async def vdis(self) -> AsyncIterator[VdiStatus]:
        """See Connection."""
        for vdi in self.store.vdis():
            yield vdi

    async def info(self, name: str) -> VdiStatus:
        """See Connection."""
        return self.store.vdi(name)

    async def delete(self, name: str) -> None:
        """See Connection."""
        await self.store.delete_vdi(name)

    async def trash(self) -> AsyncIterator[TrashStatus]:
        """See Connection."""
        for entry in await self.store.trash():
            yield entry

    async def undelete(self, name: str, new: str | None = None, *, vdi_id: int | None = None) -> VdiStatus:
        """See Connection."""
        return await self.store.undelete(name, new, vdi_id=vdi_id)

    async def purge(self, name: str, *, vdi_id: int | None = None) -> None:
        """See Connection."""
        await self.store.purge(name, vdi_id=vdi_id)

    async def set_copies(self, name: str, copies: int) -> VdiStatus:
        """See Connection."""
        return await self.store.set_copies(name, copies)

    async def set_limits(
        self, name: str, limits: Mapping[str, tuple[int, int]], *, weight: int | None = None
    ) -> VdiStatus:
        """See Connection."""
        return await self.store.set_limits(name, limits, weight=weight)

    async def damage(self, name: str) -> VdiDamage:
        """See Connection."""
        return await self.store.damage(name)

    async def clone(self, source: str, name: str, *, copies: int | None = None, mode: str | None = None) -> VdiStatus:
        """See Connection."""
        return await self.store.clone(source, name, copies=copies, mode=mode)

    async def rename(self, name: str, new: str) -> VdiStatus:
        """See Connection."""
        return await self.store.rename(name, new)

    async def resize(self, name: str, size_bytes: int, *, force: bool = False, reconnect: bool = False) -> VdiStatus:
        """See Connection."""
        return await self.store.resize(name, size_bytes, force=force, reconnect=reconnect)

    async def rollback(self, name: str, *, force: bool = False) -> SnapshotStatus:
        """See Connection."""
        return await self.store.rollback(name, force=force)

    async def resume(self, name: str) -> VdiStatus:
        """See Connection."""
        return await self.store.resume(name)

    async def snapshots(self, name: str | None = None) -> AsyncIterator[SnapshotStatus]:
        """See Connection."""
        for snapshot in self.store.snapshots(name):
            yield snapshot

    async def create_snapshot(
        self, name: str, tag: str = "", *, skip_unchanged: bool = False, protected: bool = False
    ) -> SnapshotTaken:
        """See Connection."""
        return await self.store.create_snapshot(name, tag, skip_unchanged=skip_unchanged, protected=protected)

    async def create_group_snapshot(
        self, names: Sequence[str], tag: str, *, protected: bool = False
    ) -> list[SnapshotStatus]:
        """See Connection."""
        return await self.store.create_group_snapshot(names, tag, protected=protected)

    async def snapshot_space(self, name: str) -> SnapshotSpace:
        """See Connection."""
        return await self.store.snapshot_space(name)

    async def protect_snapshot(self, name: str, *, protected: bool) -> SnapshotStatus:
        """See Connection."""
        return await self.store.protect_snapshot(name, protected=protected)

    async def delete_snapshot(self, name: str) -> None:
        """See Connection."""
        await self.store.delete_snapshot(name)

    async def allocate(self, name: str, offset_bytes: int = 0, length_bytes: int = 0) -> JobStatus:
        """See Connection."""
        return await self.store.allocate(name, offset_bytes, length_bytes)

    async def flatten(self, name: str) -> JobStatus:
        """See Connection."""
        return await self.store.flatten(name)

    async def jobs(self) -> AsyncIterator[JobStatus]:
        """See Connection."""
        for job in self.store.jobs.list():
            yield job

    async def job(self, job_id: int) -> JobStatus:
        """See Connection."""
        return self.store.jobs.get(job_id)

    async def wait_for_job(self, job_id: int) -> JobStatus:
        """See Connection."""
        return await self.store.jobs.wait(job_id)

    async def abort_job(self, job_id: int) -> JobStatus:
        """See Connection."""
        return await self.store.jobs.abort(job_id)

    async def attributes(self, name: str) -> AsyncIterator[str]:
        """See Connection."""
        for key in self.store.attributes.names(name):
            yield key

    async def get_attribute(self, name: str, key: str) -> bytes:
        """See Connection."""
        return self.store.attributes.get(name, key)

    async def set_attribute(self, name: str, key: str, value: bytes, *, exclusive: bool = False) -> None:
        """See Connection."""
        await self.store.attributes.set(name, key, value, exclusive=exclusive)

    async def delete_attribute(self, name: str, key: str) -> None:
        """See Connection."""
        await self.store.attributes.delete(name, key)

    async def status(self) -> StoreStatus:
        """See Connection."""
        return await self.store.status()

    async def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> list[ZoneStatus]:
        """See Connection."""
        zone = _absolute(zone) if action == "add" else zone
        path = None if path is None else _absolute(path)
        await self.store.change_zones(action, zone, path=path, weight=weight, force=force)
        return await self.zones()

    async def start_scrub(self) -> ScrubStatus:
        """See Connection."""
        return await self.store.start_scrub()

    async def scrub(self) -> ScrubStatus:
        """See Connection."""
        return self.store.scrub.status()

    async def recovery(self) -> RecoveryStatus:
        """See Connection."""
        return self.store.recovery.status()

    async def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus:
        """See Connection."""
        return self.store.set_recovery_rate(bytes_per_second)

    async def close(self) -> None:
        """See Connection."""
        for handle in list(self.handles):
            await handle.close()
        await self.store.shutdown()


def _absolute(path: str) -> str:
    return os.path.abspath(path)
